"""Every feature of the chat page in a real browser, against a real server with tiny models."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aviary_server import MARKDOWN, TOOLS, Aviary, serving
from page_driver import Driver
from scripted_server import in_pieces, scripted
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.serving.settings import Settings

pytestmark = pytest.mark.browser


@pytest.fixture
def drive(chromium: Any, aviary: Aviary) -> Iterator[Callable[..., Driver]]:
    """Opens the page; at the end nothing may have happened that must not."""
    drivers = []

    def open_page(url: str = aviary.url, **context: Any) -> Driver:
        drivers.append(Driver(chromium, url, **context))
        return drivers[-1]

    yield open_page
    for driver in drivers:
        driver.check()
        driver.close()


@pytest.fixture
def chat(drive: Callable[..., Driver]) -> Driver:
    """The page with the greedy parrot."""
    driver = drive()
    driver.set(setting__temperature=0)
    return driver


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def test_a_conversation_streams_and_knows_its_history(chat: Driver) -> None:
    chat.ask("Hello")
    chat.ask("And now?")
    assert chat.replies == ["Good morning.", "Now we part."]
    assert chat.page.title() == "Hello · rollouts"


def test_streaming_and_stop(chat: Driver, aviary: Aviary) -> None:
    engine = aviary.served["parrot"].engine
    chat.ask("Sing", wait=False)
    live = chat.page.locator(".reply.live .prose")
    live.get_by_text("la la la la").wait_for()
    early = len(live.inner_text())
    until(lambda: len(live.inner_text()) > early)  # it grows while it comes
    assert engine.num_running == 1
    chat.page.locator("#send.busy").click()
    until(lambda: engine.num_running == 0, 1)
    chat.wait()
    assert "stopped" in chat.page.locator(".reply-foot").inner_text()
    text = chat.replies[0]
    assert text.startswith("la la la") and len(text) >= early
    chat.load()  # what had come is kept
    assert chat.replies[0] == text


def test_escape_stops_and_the_next_question_is_answered(chat: Driver, aviary: Aviary) -> None:
    chat.ask("Sing", wait=False)
    chat.page.locator(".reply.live .prose").wait_for()
    chat.page.keyboard.press("Escape")
    chat.wait()
    chat.page.click("#new")
    chat.ask("Hello")
    assert chat.replies == ["Good morning."]


def test_edit_and_regenerate(chat: Driver) -> None:
    chat.ask("Hello")
    chat.ask("And now?")
    chat.page.locator(".question").first.hover()
    chat.page.get_by_label("Edit").first.click()
    field = chat.page.get_by_label("Edit the message")
    field.fill("Never mind")
    field.press("Escape")  # given up: nothing changes
    assert len(chat.replies) == 2 and chat.page.locator(".bubble").first.inner_text() == "Hello"
    chat.page.get_by_label("Edit").first.click()
    chat.page.get_by_label("Edit the message").fill("Goodbye")
    chat.page.get_by_text("Send again").click()
    chat.wait()
    assert chat.replies == ["See you."]
    assert chat.page.locator(".bubble").all_inner_texts() == ["Goodbye"]


def test_regenerate_keeps_the_versions_and_the_history_is_the_one_shown(chat: Driver) -> None:
    chat.set(setting__temperature=3, setting__seed=5, setting__max_tokens=12)
    chat.ask("Hello")
    chat.page.get_by_label("Regenerate").click()
    chat.page.get_by_text("2 / 2").wait_for()
    chat.wait()
    second = chat.replies[0]
    chat.page.get_by_label("Earlier version").click()
    assert "1 / 2" in chat.page.locator(".reply-foot").inner_text()
    first = chat.replies[0]
    assert first != second  # another seed
    chat.load()
    assert chat.replies == [first]
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.ask("And now?")
    contents = [message["content"] for message in asked.value.post_data_json["messages"]]
    with chat.page.expect_download() as download:
        chat.page.keyboard.press("Control+Shift+E")
    reply = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["turns"][0]["replies"][0]
    kept = [version["steps"][0]["content"] for version in reply["versions"]]
    assert contents == ["Hello", kept[0], "And now?"] and kept[0] != kept[1]


def test_the_same_seed_gives_the_same_reply(chat: Driver) -> None:
    chat.set(setting__temperature=3, setting__seed=11, setting__max_tokens=16)
    texts = []
    for _ in range(2):
        chat.ask("Hello")
        texts.append(chat.replies[-1])
        chat.page.click("#new")
    assert texts[0] == texts[1]


def test_every_setting_is_sent(chat: Driver) -> None:
    numbers = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 9, "seed": 3,
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.25,
    }  # fmt: skip
    chat.set(**{f"setting__{name}": value for name, value in numbers.items()}, stop="END\nSTOP", system="Be brief.")
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.ask("Hello")
    body = asked.value.post_data_json
    assert {name: body[name] for name in numbers} == numbers
    assert body["stop"] == ["END", "STOP"] and body["stream"] is True and "tools" not in body and "logprobs" not in body
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat.page.click("#settings-button")
    chat.page.get_by_text("Reset").click()
    chat.page.fill("#setting-top_p", "7")
    assert "0.01 to 1" in chat.page.locator(".field-problem", has_text="number").inner_text()
    chat.page.fill("#setting-seed", "1.5")
    assert chat.page.get_by_text("A whole number").is_visible()
    chat.page.locator("#settings").get_by_label("Close").click()
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.ask("Hello")
    assert not set(numbers) & set(asked.value.post_data_json)  # bad values are shown, not sent


def test_the_token_limit_is_told(chat: Driver) -> None:
    chat.set(setting__max_tokens=2)
    chat.ask("Hello")
    assert "cut at the token limit · 2 tokens" in chat.page.locator(".reply-foot").inner_text()


def test_system_prompt(chat: Driver) -> None:
    chat.set(system="You are a cat.")
    chat.ask("Hello")
    assert chat.replies == ["Meow."]


def test_models_side_by_side(chat: Driver, aviary: Aviary) -> None:
    chat.choose_models("parrot", "owl")
    assert chat.page.locator("#models-label").inner_text() == "parrot +1"
    chat.ask("Hello")
    assert chat.replies == ["Good morning.", "Good night."]
    assert chat.page.locator(".reply-model").all_inner_texts() == ["parrot", "owl"]
    boxes = [one.bounding_box() for one in chat.page.locator(".reply").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    chat.ask("And now?")
    assert chat.replies[2] == "Now we part."  # each model has its own history
    chat.page.locator(".turn").first.get_by_label("Regenerate").last.click()
    chat.wait()
    assert len(chat.replies) == 2  # what came after is gone
    chat.choose_models("owl")
    chat.page.click("#new")
    chat.ask("Hello")
    assert chat.replies == ["Good night."] and chat.page.locator(".reply-model").count() == 0


def test_tool_calls_are_folded_and_go_on_with_results(chat: Driver) -> None:
    chat.set(tools=json.dumps(TOOLS))
    chat.ask("Add 2 and 3")
    call = chat.page.locator("details.call")
    assert call.count() == 1 and call.get_attribute("open") is None
    assert call.locator("summary").inner_text().split() == ["add", '{"a":', "2,", '"b":', "3}"]
    assert not call.locator("pre").is_visible()
    call.locator("summary").click()
    assert json.loads(call.locator("pre").inner_text()) == {"a": 2, "b": 3}
    call.get_by_label("Result of add").fill("5")
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.page.get_by_text("Send results").click()
    *_, assistant, result = asked.value.post_data_json["messages"]
    assert assistant["tool_calls"][0]["function"]["name"] == "add"
    assert result == {"role": "tool", "tool_call_id": assistant["tool_calls"][0]["id"], "content": "5"}
    chat.page.get_by_text("The sum is 5.").wait_for()
    assert chat.page.get_by_text("Send results").count() == 0
    chat.load()
    chat.page.locator("details.call summary").click()
    assert chat.page.locator("details.call pre").last.inner_text() == "5"


def test_bad_tools_are_told(chat: Driver) -> None:
    chat.page.click("#settings-button")
    chat.page.fill("#tools", "[{")
    assert "not JSON" in chat.page.locator("#settings .field-problem").last.inner_text()
    chat.page.fill("#tools", "{}")
    assert "not a JSON list" in chat.page.locator("#settings .field-problem").last.inner_text()
    chat.page.locator("#settings").get_by_label("Close").click()
    chat.ask("Hello")
    assert "not a JSON list" in chat.page.locator(".problem").inner_text()


def test_markdown_code_and_mathematics(drive: Callable[..., Driver]) -> None:
    chat = drive(permissions=["clipboard-read", "clipboard-write"])
    chat.set(setting__temperature=0)
    chat.ask("Show me")
    body = chat.page.locator(".reply-body")
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator(".katex").count() == 1 and body.get_by_role("math").get_attribute("aria-label") == "x^2"
    raised = body.locator(".katex .msupsub").evaluate("e => getComputedStyle(e.querySelector('.vlist > span')).top")
    assert raised.startswith("-")  # styles of mathematics pass the page's policy
    assert "KaTeX" in body.locator(".katex").evaluate("e => getComputedStyle(e).fontFamily")
    assert body.locator("code .hljs-built_in").inner_text() == "print"
    colors = {one.evaluate("e => getComputedStyle(e).color") for one in body.locator("code, code span").all()}
    assert len(colors) >= 3
    body.get_by_label("Copy code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print(1)\n"
    chat.page.locator(".reply-foot").get_by_label("Copy").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_everything_that_markdown_can_say(drive: Callable[..., Driver]) -> None:
    text = r"""<think>hm</think>3. three
4. four

| a | b |
|---|---|
| $\sqrt{x}$ | ~~old~~ |

$$
\begin{aligned}
a &= b \\
- c &= d
\end{aligned}
$$

It costs $5 or $6. \(y\) and \[z\] and $\notacommand{x}$ and ![a picture](https://ok.example/a.png).

> [a link](https://ok.example/) <b>no markup</b>

```js
const a = "1";
```
"""
    with scripted(["m"], lambda body: in_pieces(text, 7)) as url:
        chat = drive(url)
        chat.ask("go")
        body = chat.page.locator(".reply-body")
        assert body.locator("ol").get_attribute("start") == "3"
        root = body.locator("td svg path").first
        assert len(root.get_attribute("d")) > 50 and root.bounding_box()["height"] > 5  # KaTeX draws roots as curves
        assert body.locator("td s").inner_text() == "old"
        assert body.locator(".math").count() == 5 and body.locator(".math.display").count() == 2
        assert body.locator(".math.broken").inner_text() == r"\notacommand{x}"
        assert "It costs $5 or $6." in body.inner_text() and "<b>no markup</b>" in body.inner_text()
        links = body.locator("a").evaluate_all("l => l.map(e => [e.href, e.target, e.rel, e.innerText])")
        assert links == [
            [f"https://ok.example/{path}", "_blank", "noopener noreferrer nofollow", name]
            for path, name in (("a.png", "a picture"), ("", "a link"))
        ]
        assert body.locator("pre .hljs-keyword").inner_text() == "const" and body.locator("img").count() == 0
        thought = body.locator("details.thought")
        assert thought.get_attribute("open") is None and not thought.locator("p").is_visible()
        thought.locator("summary").click()
        assert thought.locator("p").inner_text() == "hm"


def test_token_probabilities(chat: Driver, aviary: Aviary) -> None:
    chat.page.click("#probabilities")
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.ask("Hello")
    assert asked.value.post_data_json["top_logprobs"] == 5
    tokens = chat.page.locator(".token")
    texts = tokens.all_inner_texts()
    assert "".join(texts).startswith("Good morning.") and len(texts) >= 5
    surprises = [float(t.evaluate("e => e.style.getPropertyValue('--surprise')")) for t in tokens.all()]
    assert max(surprises) < 0.1  # known by heart
    tokens.nth(1).hover()
    tip = chat.page.locator("#token-tip")
    rows = tip.locator(".row").all_inner_texts()
    assert len(rows) == 5 and tip.locator(".chosen code").inner_text().strip("·") == texts[1].strip()
    shares = [
        float(one) for one in tip.locator(".bar").evaluate_all("l => l.map(e => e.style.getPropertyValue('--share'))")
    ]
    assert shares == sorted(shares, reverse=True) and 0.9 < sum(shares) <= 1.001
    chat.page.mouse.move(0, 0)
    assert not tip.is_visible()
    tokens.first.focus()
    chat.page.keyboard.press("ArrowRight")
    assert tip.locator(".chosen code").inner_text().strip("·") == texts[1].strip()
    chat.page.keyboard.press("Escape")
    assert not tip.is_visible()
    chat.page.get_by_label("Show tokens").click()
    assert tokens.count() == 0 and chat.replies == ["Good morning."]
    chat.page.get_by_label("Show tokens").click()
    # A hot sample is full of surprises: their color is stronger.
    chat.set(setting__temperature=5, setting__seed=1, setting__max_tokens=12)
    chat.ask("And now?")
    last = chat.page.locator(".turn").last.locator(".token")
    surprises = [float(t.evaluate("e => e.style.getPropertyValue('--surprise')")) for t in last.all()]
    assert max(surprises) == 1
    colors = [t.evaluate("e => getComputedStyle(e).backgroundColor") for t in last.all()]
    alphas = [float(c.rpartition("/")[2].strip(" )")) if "/" in c else 1.0 for c in colors]
    assert all(abs(alpha - 0.55 * surprise) < 0.02 for alpha, surprise in zip(alphas, surprises, strict=True))


def test_conversations_are_listed_kept_renamed_searched_and_deleted(chat: Driver) -> None:
    for text in ("Hello", "Goodbye"):
        chat.page.click("#new")
        chat.ask(text)
    assert chat.titles == ["Goodbye", "Hello"]
    chat.load()
    assert chat.titles == ["Goodbye", "Hello"] and chat.replies == ["See you."]
    chat.page.get_by_text("Hello", exact=True).first.click()
    assert chat.replies == ["Good morning."]

    chat.page.locator("li", has_text="Hello").hover()
    chat.page.get_by_label("Rename Hello").click()
    chat.page.get_by_label("Title").fill("A first meeting")
    chat.page.keyboard.press("Enter")
    assert chat.titles == ["Goodbye", "A first meeting"]
    chat.page.locator("li", has_text="Goodbye").hover()
    chat.page.get_by_label("Rename Goodbye").click()
    chat.page.get_by_label("Title").fill("Thrown away")
    chat.page.keyboard.press("Escape")
    chat.page.click("#more summary")
    chat.page.click("#rename")
    chat.page.get_by_label("Title").fill("A meeting")
    chat.page.keyboard.press("Enter")
    assert chat.titles == ["Goodbye", "A meeting"]

    for words, found in (("meet", ["A meeting"]), ("SEE YOU", ["Goodbye"]), ("hello", ["A meeting"]), ("zebra", [])):
        chat.page.fill("#search", words)
        assert chat.titles == found, words
    chat.page.fill("#search", "")

    chat.page.get_by_label("Delete A meeting").click()
    assert chat.titles == ["Goodbye"] and chat.replies == []
    chat.page.get_by_text("Undo").click()
    assert chat.titles == ["Goodbye", "A meeting"] and chat.replies == ["Good morning."]
    chat.page.get_by_label("Delete A meeting").click()
    chat.load()
    assert chat.titles == ["Goodbye"]


def test_a_deleted_conversation_does_not_come_back_when_its_reply_ends(chat: Driver, aviary: Aviary) -> None:
    chat.ask("Sing", wait=False)
    chat.page.locator(".reply.live .prose").wait_for()
    chat.page.click("#more summary")
    chat.page.click("#delete")
    until(lambda: aviary.served["parrot"].engine.num_running == 0)
    time.sleep(0.2)
    chat.load()
    assert chat.titles == []


def test_a_reply_goes_on_while_another_conversation_is_open(chat: Driver) -> None:
    chat.ask("Sing", wait=False)
    chat.page.locator(".reply.live .prose").wait_for()
    chat.page.click("#new")
    chat.ask("Hello")
    assert chat.replies == ["Good morning."]
    chat.page.locator(".conversation", has_text="Sing").click()
    chat.page.locator(".reply.live").wait_for()
    chat.page.locator("#send.busy").click()
    chat.wait()
    assert chat.replies[0].startswith("la la")


def test_export_and_import(chat: Driver, tmp_path: Path) -> None:
    chat.choose_models("parrot", "owl")
    chat.set(system="You are a cat.")
    chat.ask("Hello")
    with chat.page.expect_download() as download:
        chat.page.click("#more summary")
        chat.page.click("#export")
    assert download.value.suggested_filename == "Hello.json"
    file = tmp_path / "Hello.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text(encoding="utf-8"))
    assert (exported["format"], exported["title"], exported["settings"]["temperature"]) == ("rollouts-chat", "Hello", 0)
    history = [{"role": "system", "content": "You are a cat."}, {"role": "user", "content": "Hello"}]
    assert exported["messages"]["parrot"] == [*history, {"role": "assistant", "content": "Meow."}]
    assert set(exported["messages"]) == {"parrot", "owl"}
    shown = chat.replies
    chat.page.get_by_label("Delete Hello").click()
    chat.page.set_input_files("#import-file", file)
    chat.page.locator(".turn").wait_for()
    assert chat.replies == shown and chat.titles == ["Hello"]
    saved = {"format": "rollouts-chat", "version": 1, "messages": {"parrot": exported["messages"]["parrot"]}}
    file.write_text(json.dumps(saved))  # as `rollouts chat` saves
    chat.page.set_input_files("#import-file", file)
    until(lambda: len(chat.titles) == 2)
    assert chat.replies == ["Meow."]
    for bad in ("{", "[]", '{"format": "other"}', "null"):
        file.write_text(bad)
        chat.page.set_input_files("#import-file", file)
        chat.page.locator("#toast").wait_for()
    assert len(chat.titles) == 2


def test_keyboard(chat: Driver) -> None:
    page = chat.page
    page.focus("#message")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#message") == "Hello\nthere"
    page.fill("#message", "Hello")
    page.keyboard.press("Enter")
    chat.wait()
    page.keyboard.press("ArrowUp")
    field = page.get_by_label("Edit the message")
    assert field.input_value() == "Hello"
    field.press("Escape")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+,")
    assert page.locator("#settings").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#settings").is_visible()
    page.keyboard.press("Control+b")
    assert not page.locator("#sidebar").is_visible()
    page.keyboard.press("Control+b")
    assert page.locator("#sidebar").is_visible()
    with page.expect_download():
        page.keyboard.press("Control+Shift+E")
    page.keyboard.press("Control+Shift+O")
    assert chat.replies == [] and page.evaluate("document.activeElement.id") == "message"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    assert page.locator("#shortcuts").is_visible()
    page.keyboard.press("Escape")
    page.focus("#models summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")
    assert page.locator("#models-label").inner_text() == "parrot +1"
    # The Tab key reaches every control, and each has a name.
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"new", "search", "import", "theme", "settings-button", "probabilities", "message"} <= seen
    names = page.locator("button:visible, summary:visible, input:visible, textarea:visible").evaluate_all(
        "l => l.map(e => e.getAttribute('aria-label') || e.innerText.trim() || e.labels?.[0]?.innerText.trim() || '')"
    )
    assert all(names)


def contrast(first: str, second: str) -> float:
    def light(color: str) -> float:
        parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((light(first), light(second)))
    return (b + 0.05) / (a + 0.05)


def test_light_and_dark(drive: Callable[..., Driver]) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        chat = drive(color_scheme=scheme)
        chat.set(setting__temperature=0)
        chat.ask("Show me")
        style = "(e, name) => getComputedStyle(e)[name]"
        body = chat.page.locator("body")
        backgrounds[scheme] = body.evaluate(style, "backgroundColor")
        for selector in ("body", ".conversations h2", ".reply-foot", ".code-head", "#import"):
            color = chat.page.locator(selector).first.evaluate(style, "color")
            assert contrast(color, backgrounds[scheme]) >= 4.5, (scheme, selector)
        for theme in ("light", "dark", "auto"):
            chat.page.click("#theme")
            assert chat.page.locator("html").get_attribute("data-theme") == theme
            assert body.evaluate(style, "backgroundColor") == backgrounds.get(
                scheme if theme == "auto" else theme, body.evaluate(style, "backgroundColor")
            )
        chat.page.click("#theme")
        chat.load()
        assert chat.page.locator("html").get_attribute("data-theme") == "light"  # remembered
    assert contrast(*backgrounds.values()) > 10


def test_phone(drive: Callable[..., Driver]) -> None:
    chat = drive(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    chat.set(setting__temperature=0)
    chat.page.fill("#message", "Show me")
    chat.page.tap("#send")
    chat.wait()
    assert "bold" in chat.replies[0]
    chat.page.keyboard.press("Control+Shift+O")
    chat.choose_models("parrot", "owl")
    chat.ask("Hello")
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
    assert not chat.page.locator("#sidebar").is_visible()
    chat.page.tap("#sidebar-toggle")
    chat.page.locator(".conversation").first.wait_for()
    assert chat.page.locator("#sidebar").bounding_box()["width"] < 320
    chat.page.tap("#new")
    chat.page.locator("#sidebar").wait_for(state="hidden")
    assert chat.replies == []
    sizes = chat.page.locator("textarea:visible, input:visible").evaluate_all(
        "l => l.map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 16  # a phone zooms into smaller ones
    for control in chat.page.locator(".topbar button:visible, .topbar summary:visible, #send").all():
        box = control.bounding_box()
        assert box["height"] >= 30 and box["x"] + box["width"] <= 360


def test_a_server_with_a_key(
    drive: Callable[..., Driver], parrots: dict[str, PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with serving({"owl": parrots["owl"]}, tiny_tokenizer, Settings(api_key="sesame")) as locked:
        chat = drive(locked.url)
        for key in ("wrong", "sesame"):
            chat.page.get_by_placeholder("API key").fill(key)
            chat.page.get_by_text("Connect").click()
        chat.page.get_by_text("owl will answer.").wait_for()
        chat.set(setting__temperature=0)
        chat.ask("Hello")
        assert chat.replies == ["Good night."]
        chat.load()  # the tab remembers the key
        assert chat.replies == ["Good night."] and not chat.page.locator("#key").is_visible()


def test_errors_are_shown(
    drive: Callable[..., Driver], parrots: dict[str, PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with serving({"owl": parrots["owl"]}, tiny_tokenizer) as server:
        chat = drive(server.url)
        chat.set(setting__max_tokens=9_000_000)
        chat.ask("Hello")
        assert "max_tokens" in chat.page.locator(".problem").inner_text()
        chat.set(setting__max_tokens="", setting__temperature=0)
        chat.page.get_by_label("Regenerate").click()
        chat.page.get_by_text("Good night.").wait_for()
        assert chat.page.locator(".problem").count() == 0
    chat.ask("Hello")
    assert "does not answer" in chat.page.locator(".problem").inner_text()
    assert math.isclose(chat.page.locator(".turn").count(), 2)
