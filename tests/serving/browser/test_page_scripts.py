"""Hostile text, wherever it comes from, runs no script on the chat page and fetches nothing from anybody else.

What is counted: calls of ``alert`` and its like, requests that leave the server, dialogs, new pages, console errors and
reports of the page's policy. The policy is the second line: with it switched off, the first must hold alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from page_driver import Driver
from scripted_server import Delta, in_pieces, scripted
from xss_corpus import corpus

pytestmark = pytest.mark.browser

VECTORS = corpus()

# Elements and attributes of the page that no text may bring into it.
FIND_DANGERS = """
() => {
  const own = new Set("A ARTICLE ASIDE BODY BR BUTTON CODE DD DETAILS DIALOG DIV DL DT EM FOOTER FORM H1 H2 H3 H4 H5 H6 HEAD "
    .concat("HEADER HR HTML INPUT KBD LABEL LI LINK MAIN META NAV NOSCRIPT OL P PATH LINE PRE S SCRIPT SECTION SPAN STRONG ")
    .concat("SUMMARY SVG TABLE TBODY TD TEXTAREA TH THEAD TITLE TR UL BLOCKQUOTE DEL").split(" "));
  const found = [];
  for (const node of document.querySelectorAll("*")) {
    const name = node.tagName.toUpperCase();
    if (!own.has(name)) found.push(`<${name}>`);
    if (["SCRIPT", "LINK", "META"].includes(name) && node.parentNode !== document.head) found.push(`<${name}> in the body`);
    for (const { name: attribute, value } of node.attributes) {
      if (/^on/i.test(attribute)) found.push(`${name} ${attribute}`);
      if (/^(src|srcset|action|formaction|background|poster|ping|data|xlink:href|srcdoc|http-equiv)$/i.test(attribute) && name !== "SCRIPT")
        found.push(`${name} ${attribute}=${value}`);
      if (attribute === "href" && name !== "LINK" && !/^(https?:|mailto:|#message$)/i.test(value.trim())) found.push(`${name} ${attribute}=${value}`);
      if (attribute === "style" && /url|image|import|@|expression/i.test(value)) found.push(`${name} ${attribute}=${value}`);
      if (attribute === "id" && node.closest(".prose")) found.push(`${name} ${attribute}=${value}`);
    }
  }
  for (const link of document.querySelectorAll(".prose a"))
    if (link.target !== "_blank" || !link.rel.includes("noopener")) found.push(`A ${link.href} keeps its opener`);
  return found;
}
"""  # noqa: E501


@pytest.fixture(params=["policy", "no policy"])
def open_page(request: Any, chromium: Any) -> Iterator[Any]:
    """Opens the page with and without its policy, and checks at the end that nothing happened."""
    drivers: list[Driver] = []

    def opened(url: str, **context: Any) -> Driver:
        drivers.append(Driver(chromium, url, bypass_csp=request.param == "no policy", **context))
        return drivers[-1]

    yield opened
    for driver in drivers:
        inspect(driver)
        driver.close()


def inspect(driver: Driver) -> None:
    """Wait for what fires late, then look at what has happened and at what the page now holds."""
    driver.page.wait_for_timeout(300)
    driver.check()
    assert driver.page.evaluate(FIND_DANGERS) == []


def store(driver: Driver, *conversations: dict[str, Any]) -> None:
    """Write conversations into the browser's database, as an older or a hostile page might have; the last is opened."""
    driver.page.evaluate(
        """async (conversations) => {
          const database = await new Promise((resolve) => {
            const request = indexedDB.open("rollouts", 1);
            request.onsuccess = () => resolve(request.result);
          });
          const transaction = database.transaction("conversations", "readwrite");
          for (const one of conversations) transaction.objectStore("conversations").put(one);
          await new Promise((resolve) => (transaction.oncomplete = resolve));
          localStorage.setItem("rollouts.last", conversations.at(-1).id);
        }""",
        list(conversations),
    )
    driver.load()


def click_all(driver: Driver, selector: str) -> None:
    """Click every such button, each of which may be drawn anew meanwhile."""
    count = driver.page.locator(selector).count()
    driver.page.evaluate(
        "([selector, count]) => { for (let i = 0; i < count; i++) document.querySelectorAll(selector)[i].click() }",
        [selector, count],
    )


def reply(content: str, model: str = "m", **step: Any) -> dict[str, Any]:
    return {"model": model, "versions": [{"steps": [{"content": content, **step}]}]}


def test_the_corpus_and_its_detectors_are_alive(chromium: Any) -> None:
    """In a page that shows text as markup, without a policy, the same vectors run and fetch a great deal."""
    with scripted(["m"], lambda body: []) as url:
        driver = Driver(chromium, url, bypass_csp=True)
        driver.page.evaluate("() => document.body.replaceChildren()")
        for start in range(0, len(VECTORS), 100):
            driver.page.evaluate(
                """(vectors) => {
                  for (const vector of vectors) {
                    const box = document.body.appendChild(document.createElement("div"));
                    box.innerHTML = vector;
                  }
                }""",
                [v for v in VECTORS[start : start + 100] if not re.search(r"refresh|<base|location|<iframe", v)],
            )
        driver.page.wait_for_timeout(1500)
        ran = set(driver.page.evaluate("window.ran"))
        dangers = driver.page.evaluate(FIND_DANGERS)
        assert len(VECTORS) >= 600
        assert len(ran) >= 60 and len(set(driver.outside)) >= 8 and len(dangers) >= 300, (len(ran), len(dangers))
        driver.close()


def test_model_output_and_model_names(open_page: Any) -> None:
    """Every vector is a model's name, and what that model says, in small pieces."""

    def script(body: dict[str, Any]) -> list[Delta]:
        return in_pieces(body["model"], 9)

    with scripted(VECTORS, script) as url:
        driver = open_page(url)
        driver.page.click("#models summary")
        assert driver.page.locator(".choice").count() == len(VECTORS)
        driver.page.keyboard.press("Escape")
        store(driver, {"id": "all", "models": VECTORS, "turns": []})
        driver.ask("go")
        driver.page.locator(".reply.live").first.wait_for(state="detached")
        assert driver.page.locator(".reply").count() == len(VECTORS)
        assert driver.page.locator(".problem").count() == 0
        plain = next(i for i, vector in enumerate(VECTORS) if vector.startswith("<script>alert("))
        assert driver.replies[plain] == VECTORS[plain]  # markup is shown as the text that it is
        inspect(driver)


def test_user_text(open_page: Any) -> None:
    with scripted(["m"], lambda body: [{"content": "ok"}]) as url:
        driver = open_page(url)
        for i, vector in enumerate(VECTORS[::3]):
            if i % 12 == 0:
                driver.page.click("#new")
            driver.ask(vector)
        assert len(driver.titles) >= len(VECTORS) // 36
        driver.page.fill("#search", VECTORS[0])
        inspect(driver)


def test_tool_calls(open_page: Any) -> None:
    def script(body: dict[str, Any]) -> list[Delta]:
        first = int(body["messages"][-1]["content"])
        return [
            {"tool_calls": [{"index": k, "id": v, "function": {"name": v, "arguments": arguments}}]}
            for k, v in enumerate(VECTORS[first : first + 60])
            for arguments in (v, )
        ]  # fmt: skip

    with scripted(["m"], script) as url:
        driver = open_page(url)
        for first in range(0, len(VECTORS), 60):
            driver.page.click("#new")
            driver.ask(str(first))
            calls = driver.page.locator("details.call")
            assert calls.count() == min(60, len(VECTORS) - first)
            calls.evaluate_all("list => list.forEach((one) => (one.open = true))")
            assert VECTORS[first].split()[0] in calls.first.locator("pre").inner_text()
            inspect(driver)


def test_stored_conversations(open_page: Any) -> None:
    """Every field that is kept holds a vector; some fields have the wrong shape altogether."""

    def hostile(vector: str) -> dict[str, Any]:
        top = [{"text": vector, "logprob": -1}, {"text": "x", "logprob": vector}]
        token = {"text": vector, "logprob": -1, "top": top}
        call = {"id": vector, "name": vector, "arguments": f'{{"a": {vector!r}}}', "result": vector}
        step = {
            "content": vector,
            "reasoning": vector,
            "calls": [call],
            "finish": vector,
            "usage": {"completion_tokens": vector},
        }
        return {
            "id": vector, "title": vector, "system": vector, "tools": vector, "models": [vector, 7, None],
            "settings": {"temperature": vector, "stop": [vector], vector: vector, "__proto__": {"polluted": 1}},
            "updated": vector,
            "turns": [
                {"id": vector, "user": vector, "replies": [
                    {"model": vector, "current": vector, "versions": [
                        {"steps": [step], "error": vector},
                        {"steps": [{"content": vector, "tokens": [token]}]},
                    ]},
                    reply(f"<think>{vector}</think>{vector}", vector),
                ]},
                {"user": {"text": vector}, "replies": [{"versions": "none"}, None, {"versions": [{"steps": [None]}]}]},
                None,
            ],
        }  # fmt: skip

    with scripted(["m"], lambda body: []) as url:
        driver = open_page(url)
        for start in range(0, len(VECTORS), 125):
            some = VECTORS[start : start + 125]
            whole = {"id": "all", "turns": [turn for vector in some for turn in hostile(vector)["turns"][:1]]}
            store(driver, *map(hostile, some), whole)
            assert driver.page.locator(".turn").count() == len(some)
            tokens = driver.page.locator(".token")  # the later version is shown first
            assert tokens.count() == len(some)
            for i in range(0, len(some), 25):
                tokens.nth(i).focus()
            click_all(driver, '[aria-label="Show tokens"]')
            inspect(driver)
            click_all(driver, '[aria-label="Earlier version"]')  # with calls, thoughts and errors
            driver.page.locator("details").evaluate_all("list => list.forEach((one) => (one.open = true))")
            assert driver.page.locator(".call pre").count() >= len(some)
            inspect(driver)
            driver.page.locator(".conversation").first.click()
            driver.page.click("#settings-button")
            inspect(driver)
        assert driver.page.evaluate("({}).polluted === undefined")


def test_probabilities_errors_and_odd_streams(open_page: Any) -> None:
    def script(body: dict[str, Any]) -> list[Delta]:
        content = [{"token": v, "logprob": -0.5, "top_logprobs": [{"token": v, "logprob": -0.5}]} for v in VECTORS]
        return [{"content": "x", "logprobs": {"content": content}}]

    with scripted(["m"], script) as url:
        driver = open_page(url)
        driver.page.click("#probabilities")
        driver.ask("go")
        tokens = driver.page.locator(".token")
        assert tokens.count() == len(VECTORS)
        for i in range(0, len(VECTORS), 20):
            tokens.nth(i).focus()
            assert driver.page.locator("#token-tip code").first.is_visible()
        inspect(driver)
        for vector in VECTORS[::25]:
            answer = {"status": 400, "json": {"error": {"message": vector}}}
            driver.context.route("**/chat/completions", lambda route, _, answer=answer: route.fulfill(**answer))
            driver.page.click("#new")
            driver.ask("go")
            assert driver.page.locator(".problem").text_content() == vector
        inspect(driver)
