"""What the shipped rewards make of responses as models write them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.errors import UserError
from rollouts.training.rewards import REWARDS, RewardSpec, load_reward, load_rewards, score_samples
from rollouts.training.rewards.answers import exact_match, extract_gsm8k, gsm8k, numeric, regex
from rollouts.training.rewards.judge import llm_judge
from rollouts.training.rewards.shape import answer_format, length, overlong
from rollouts.training.rewards.symbolic import symbolic_math
from rollouts.training.types import Sample


def said(response: str, answer: Any = None, **changes: Any) -> Sample:
    metadata = {} if answer is None else {"answer": answer}
    return Sample(prompt="What?", response=response, metadata=metadata, **changes)


def test_exact_match() -> None:
    assert exact_match(said("  Paris\n", "Paris")) == 1.0
    assert exact_match(said("paris", "Paris")) == 0.0
    assert exact_match(said("paris", "Paris"), ignore_case=True) == 1.0
    assert exact_match(said(" Paris", "Paris"), ignore_space=False) == 0.0
    assert exact_match(said("Paris.", "Paris")) == 0.0
    assert exact_match(said("hm <answer>Lyon</answer> no, <answer> Paris </answer>", "Paris"), tag="answer") == 1.0
    for broken in ("Paris", "<answer>Paris", "Paris</answer>", "</answer>Paris<answer>", ""):
        assert exact_match(said(broken, "Paris"), tag="answer") == 0.0


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The total is $1,234.50 in all.", "1234.5", 1),
        ("It weighs 12kg", 12, 1),
        ("x = -3", "-3", 1),
        ("7 - 4 = 3", "3", 1),
        ("7-4", "4", 1),  # a minus between numbers is no sign
        ("about 1e3 apples", "1000", 1),
        ("1,000,000", "1000000", 1),
        ("1,2", "2", 1),  # a list, not thousands
        (".5", "0.5", 1),
        ("50%", "50", 1),
        ("The answer is 72.", "72", 1),
        ("72 or 73", "72", 0),
        ("seventy-two", "72", 0),
        ("", "72", 0),
        ("version x72", "72", 0),
        ("72.000000001", "72", 1),
        ("72.001", "72", 0),
        ("123456789012345678901", "123456789012345678902", 1),  # within a millionth
        ("9" * 5000, "1", 0),
        ("1e999", "1", 0),
    ],
)
def test_numeric(response: str, answer: Any, right: int) -> None:
    assert numeric(said(response, answer)) == right


def test_numeric_reads_a_tag_and_a_tolerance() -> None:
    assert numeric(said("<answer>3</answer> then 4", "3"), tag="answer") == 1.0
    assert numeric(said("3.2", "3"), tolerance=0.1) == 1.0
    assert numeric(said("3.4", "3"), tolerance=0.1) == 0.0


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "so {} in all.", "#### {}", "${}!", "It is {}, I think"]))
@settings(max_examples=200, deadline=None)
def test_numeric_finds_any_number_in_any_frame(n: int, frame: str) -> None:
    for text in (str(n), f"{n:,}", f"{n}.0"):
        assert numeric(said(frame.format(text), str(n))) == 1.0
        assert numeric(said(frame.format(text), str(n + max(2, abs(n) // 1000)))) == 0.0


def as_verl_scores(response: str, truth: str, method: str) -> float:
    """verl's rules for GSM8K, written from their description."""
    if method == "strict":
        found = re.findall(r"#### (\-?[0-9\.\,]+)", response[-300:])
        return float(bool(found) and found[-1].replace(",", "").replace("$", "") == truth)
    found = [n for n in re.findall(r"(\-?[0-9\.\,]+)", response[-300:]) if n not in ("", ".")]
    return float(bool(found) and found[-1] == truth)


@pytest.mark.parametrize("method", ["strict", "flexible"])
def test_gsm8k_scores_as_verl_does(method: str) -> None:
    responses = ["#### 72", "so #### 72 and", "####72", "#### 7", "72", "it is 72 now", "#### 71\n#### 72", "#### -72",
                 "x" * 400 + "#### 72", "#### 72" + "x" * 400, "#### 1,072", "2. first\n70 + 2 = 72", "#### six",
                 ""]  # fmt: skip
    for response in responses:
        mine = gsm8k(said(response, "72"), method=method)
        assert mine == as_verl_scores(response, "72", method), response


def test_gsm8k_forgives_punctuation() -> None:
    assert gsm8k(said("The answer is #### 1,234.", "1234")) == 1.0
    assert gsm8k(said("In all 1,234.", "1,234"), method="flexible") == 1.0
    assert gsm8k(said("#### .", "72")) == 0.0
    assert gsm8k(said("#### 5", "72"), format_score=0.1) == 0.1
    assert gsm8k(said("5", "72"), format_score=0.1) == 0.0


def test_gsm8k_on_the_data_itself(shared_data: Path) -> None:
    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 1319
    for row in rows:
        truth = row["answer"].split("#### ")[1].replace(",", "")
        for answer in (row["answer"], truth):
            assert gsm8k(said(row["answer"], answer)) == 1.0
            assert gsm8k(said(f"I think it is {truth}.", answer), method="flexible") == 1.0
            assert numeric(said(f"So {int(truth):,} of them.", answer)) == 1.0
            assert gsm8k(said(f"#### {int(truth) + 1}", answer)) == 0.0
        assert extract_gsm8k(row["answer"]) == truth


def test_regex() -> None:
    assert regex(said("abc 12"), pattern=r"\d+") == 1.0
    assert regex(said("abc"), pattern=r"\d+") == 0.0
    assert regex(said("answer: 4\nanswer: 5", "5"), pattern=r"answer: (?P<answer>\d)") == 1.0
    assert regex(said("answer: 4\nanswer: 5", "4"), pattern=r"answer: (?P<answer>\d)") == 0.0
    assert regex(said("x=1 y=2", "2"), pattern=r"x=(\d) y=(?P<answer>\d)") == 1.0
    assert regex(said("ANSWER:\n4"), pattern="answer:.4", flags="is") == 1.0


def test_a_pattern_that_explodes_is_stopped() -> None:
    samples = [said("a" * 60 + "b"), said("aaa")]
    reward = RewardSpec("regex", options={"pattern": r"^(a+)+$"})
    report = anyio.run(lambda: score_samples(samples, reward, timeout=1.0))
    assert report.faults == {"timeout": 1} and [s.reward for s in samples] == [None, 1.0]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so $\boxed{\frac{1}{2}}$", r"\frac{1}{2}", 1),
        ("0.5", r"$\frac{1}{2}$", 1),
        ("The answer is 1/2", "0.5", 1),
        (r"$x = 3$", "3", 1),
        (r"$(x+1)^2$", "x^2 + 2x + 1", 1),
        (r"$\{1, 2\}$", r"\{2, 1\}", 1),
        (r"$(1, 2)$", "(2, 1)", 0),
        (r"$\frac{1}{3}$", r"\frac{1}{2}", 0),
        (r"first $1$ then \boxed{2}, not $3$", "2", 1),
        ("no idea at all", "2", 0),
        ("", "2", 0),
        (r"$\frac{$ \boxed{", "2", 0),
    ],
)
def test_symbolic_mathematics(response: str, answer: str, right: int) -> None:
    assert symbolic_math(said(response, answer)) == right


def test_symbolic_mathematics_off_the_main_thread_and_out_of_time() -> None:
    # math-verify's own limits would raise in a thread, and turn the second sample into a wrong answer in the main one.
    samples = [said(r"\boxed{4}", "4")]
    report = anyio.run(lambda: score_samples(samples, "math", isolation="thread"))
    assert report.failed == 0 and samples[0].reward == 1.0

    samples = [said(r"$9^{9^{9^9}}$", "4"), said(r"\boxed{4}", "4"), said("5", "4")]
    report = anyio.run(lambda: score_samples(samples, "math", timeout=6.0, max_concurrent=3))
    assert [s.reward for s in samples] == [None, 1.0, 0.0]
    assert samples[0].metadata["reward_error"].startswith("timeout: math")


def test_format() -> None:
    def right(response: str, **options: Any) -> float:
        return answer_format(said(response), **options)

    assert right("<think>a</think><answer>b</answer>") == 1.0
    assert right(" <think>\na\n</think>\n\n<answer> b </answer>\n") == 1.0
    assert right("a</think><answer>b</answer>", opened=True) == 1.0
    assert right("<reason>a</reason>", tags=["reason"]) == 1.0
    for wrong in (
        "", "b", "<think>a</think>", "<answer>b</answer><think>a</think>", "<think>a</think>x<answer>b</answer>",
        "<think>a</think><answer>b</answer>x", "x<think>a</think><answer>b</answer>",
        "<think> </think><answer>b</answer>",
        "<think>a</think><answer></answer>", "<think>a</think><think>c</think><answer>b</answer>",
        "<think>a<think>c</think><answer>b</answer>", "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a<answer>b</think></answer>", "</think>a<think><answer>b</answer>",
    ):  # fmt: skip
        assert right(wrong) == 0.0, wrong


def test_lengths_count_what_the_model_wrote() -> None:
    def of(tokens: int) -> Sample:
        return Sample(tokens=[1] * (tokens + 7), loss_mask=[0] * 7 + [1] * tokens)

    assert [length(of(n), max_tokens=5, min_tokens=2) for n in (1, 2, 5, 6)] == [0.0, 1.0, 1.0, 0.0]
    # DAPO's example: 16,384 tokens of which the last 4,096 are the buffer.
    for n, penalty in ((12_288, 0.0), (14_336, -0.5), (16_384, -1.0), (20_000, -1.0)):
        assert overlong(of(n), max_tokens=16_384, buffer=4_096) == pytest.approx(penalty)
        assert overlong(of(n), max_tokens=16_384, buffer=4_096, factor=0.5) == pytest.approx(penalty / 2)
    with pytest.raises(ValueError):
        overlong(of(3), max_tokens=5, buffer=0)


def test_judge() -> None:
    asked: list[list[dict[str, Any]]] = []

    def replies(*texts: Any) -> Callable[..., Any]:
        queue = list(texts)

        async def chat(messages: list[dict[str, Any]]) -> Any:
            asked.append(messages)
            return queue.pop(0)

        return chat

    async def grade(reply: Any, **options: Any) -> float:
        return await llm_judge(said("my response", "the truth"), chat=replies(reply), **options)

    assert anyio.run(lambda: grade("Good.\nGRADE: 8")) == 0.8
    assert anyio.run(lambda: grade("grade: 1 or rather\n**GRADE: 3.5**", low=1, high=5)) == 0.625
    assert anyio.run(lambda: grade(SimpleNamespace(content="GRADE: 10"))) == 1.0
    text = asked[0][1]["content"]
    assert "What?" in text and "the truth" in text and "my response" in text
    marks = [re.search(r"Response:\n(\w+)\n", m[1]["content"]) for m in asked]
    assert len({m[1] for m in marks if m}) == len(asked)  # a new mark each time
    for useless in ("no grade", "GRADE: 11", "GRADE: -1", ""):
        samples = [said("a")]
        report = anyio.run(
            lambda samples=samples, useless=useless: score_samples(
                samples, RewardSpec("judge", options={"chat": replies(useless)})
            )
        )
        assert samples[0].reward is None and report.faults == {"raised": 1}  # left out, not scored 0


@pytest.mark.parametrize("name", ["exact_match", "numeric", "math", "gsm8k"])
@pytest.mark.parametrize("answer", [None, "", "  ", True, ["1"]])
def test_without_a_reference_answer_nothing_is_scored(name: str, answer: Any) -> None:
    with pytest.raises(ValueError, match="no reference answer"):
        REWARDS[name](said("1", answer))


def test_options_are_checked_before_the_run() -> None:
    for spec, message in (
        (RewardSpec("gsm8", options={}), "did you mean 'gsm8k'"),
        (RewardSpec("gsm8k", options={"metod": "strict"}), "no option 'metod' (did you mean 'method'?)"),
        (RewardSpec("regex"), "option 'pattern' is needed"),
        (RewardSpec("gsm8k", weight=float("nan")), "weight must be a number"),
        ({"function": "gsm8k", "wieght": 1}, "unknown key 'wieght'"),
        ({"weight": 1}, "no function"),
    ):
        with pytest.raises(UserError) as caught:
            load_reward(spec)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    for several in ([], ["gsm8k", "gsm8k"]):
        with pytest.raises(UserError):
            load_rewards(several)
    assert [r.name for r in load_rewards(["gsm8k", RewardSpec("gsm8k", name="loose")])] == ["gsm8k", "loose"]
