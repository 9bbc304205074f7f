"""The synthetic data: held-out problems never occur in training, references are right, every process agrees."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.pipeline.documents import DOCUMENT_KINDS, make_documents
from rollouts.pipeline.tasks import (
    CARELESS_FAMILIES,
    FAMILIES,
    extract_answer,
    is_correct,
    is_correct_turn,
    make_conversations,
    make_held_out,
    make_problems,
    mistaken,
    parse_tool_call,
    run_calculator,
    turns,
)
from rollouts.pipeline.world import Split, split_of, split_of_sum

SEEDS = st.integers(0, 10**6)


def training_texts(seed: int) -> list[str]:
    """Every document and every message that a speedrun of this seed would train on, in small."""
    conversations = make_conversations(seed, 1500, careless=0.55)
    messages = [m["content"] for c in conversations for m in (*c.prompt, *c.reply)]
    calls = [json.dumps(m["tool_calls"]) for c in conversations for m in c.reply if "tool_calls" in m]
    return [*make_documents(seed, 1500), *messages, *calls]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for seed in (0, 1, 2) for text in training_texts(seed)]


def test_no_held_out_sum_is_worked_out_in_training(texts: list[str]) -> None:
    lines = [m for text in texts for m in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text)]
    assert len(lines) > 5000
    for left, sign, right, result in lines:
        a, b, c = int(left), int(right), int(result)
        assert (a + b if sign == "+" else a - b) == c
        # The fact family is the two parts of the larger number, however it is told.
        assert split_of_sum(*((a, b) if sign == "+" else (b, c))) is Split.TRAIN
        assert split_of_sum(*((b, a) if sign == "+" else (c, b))) is Split.TRAIN


def test_no_held_out_product_comparison_or_list_occurs_in_training(texts: list[str]) -> None:
    everything = "\n".join(texts)
    products = re.findall(r"(\d+) \* (\d+)", everything)
    assert len(products) > 300
    assert {split_of("product", int(a), int(b)) for a, b in products} == {Split.TRAIN}
    pairs = re.findall(r"(\d+) (?:is larger than|is smaller than|or|and) (\d+)", everything)
    assert len(pairs) > 2000
    assert {split_of("compare", *sorted((int(a), int(b)))) for a, b in pairs} == {Split.TRAIN}
    lists = re.findall(r"(?:wrote a list|Again|in this list|order|A to Z|here|after [a-z]+): ([a-z, ]+)\.", everything)
    assert len(lists) > 2000
    assert {split_of("words", *sorted(listed.split(", "))) for listed in lists} == {Split.TRAIN}


@given(SEEDS, SEEDS)
@settings(max_examples=20, deadline=None)
def test_held_out_questions_never_stand_in_training(seed: int, other_seed: int) -> None:
    held_out = make_held_out(seed, 8)
    trained = make_conversations(other_seed, 400)
    for family in FAMILIES:
        keys = {p.key for p in held_out if p.family == family}
        assert len(keys) == sum(p.family == family for p in held_out) > 0
        assert not keys & {p.key for p in trained if p.family == family}
    chats = {json.dumps(c.prompt) for c in trained}
    assert not any(json.dumps(p.prompt) in chats for p in held_out)


def test_documents_state_the_facts_whose_questions_are_held_out() -> None:
    """Otherwise the family "fact" would ask for what nobody could know."""
    documents = "\n".join(make_documents(0, 6000))
    facts = [p for p in make_held_out(0, 64) if p.family == "fact"]
    assert len(facts) > 20
    for problem in facts:
        assert problem.reply[0]["content"] in documents


@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from(list(Split)), SEEDS)
@settings(max_examples=200, deadline=None)
def test_the_reference_reply_is_right_and_a_changed_answer_is_wrong(family: str, split: Split, seed: int) -> None:
    problem = FAMILIES[family].make(random.Random(seed), split)
    final = problem.reply[-1]["content"]
    assert is_correct(problem, final)
    assert not is_correct(problem, final.replace(problem.answer, f"not {problem.answer}"))
    assert not is_correct(problem, "")
    for message in problem.reply:
        if message["role"] == "tool":
            assert message["content"] == problem.answer


@given(SEEDS, st.sampled_from(list(Split)))
@settings(max_examples=50, deadline=None)
def test_arithmetic_answers_follow_from_the_story(seed: int, split: Split) -> None:
    """Recomputed from the question's own numbers and verbs, without the generator's chain."""
    problem = FAMILIES["two steps"].make(random.Random(seed), split)
    numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
    changes = re.split(r"\. ", problem.question)[1:3]
    loses = [not re.search(r"more", change) for change in changes]
    total = numbers[0]
    for number, loss in zip(numbers[1:], loses, strict=True):
        total += -number if loss else number
    assert problem.answer == str(total)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("12 + 7 = 19. The answer is 19.", "19"),
        ("In order: ant, bee, cow.", "ant, bee, cow"),
        ("The answer is 19. The answer is 20", "20"),
        ("a call\n→ 14040\nThe answer is 14040.", "14040"),
        ("19", ""),
        ("", ""),
        ("The answer is \n", ""),
    ],
)
def test_extract_answer(reply: str, answer: str) -> None:
    assert extract_answer(reply) == answer


@given(st.text())
def test_extract_answer_takes_any_text(reply: str) -> None:
    assert extract_answer(f"{reply} is 7.") == "7"
    extract_answer(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "<tool_call>\n{broken\n</tool_call>",
        "<tool_call>\n[1]\n</tool_call>",
        '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "calculator"',
    ],
)
def test_malformed_tool_calls_are_none(reply: str) -> None:
    assert parse_tool_call(reply) is None


def test_the_calculator_multiplies_and_nothing_else() -> None:
    call = parse_tool_call('<tool_call>\n{"name": "calculator", "arguments": {"expression": "312 * 45"}}\n</tool_call>')
    assert call and run_calculator(call["arguments"]) == "14040"
    for arguments in (
        None,
        {},
        "2*2",
        {"expression": 4},
        {"expression": "__import__('os')"},
        {"expression": "2 ** 99"},
    ):
        assert run_calculator(arguments).startswith("error")


def test_data_is_the_same_in_every_process() -> None:
    """Python randomizes string hashes per process; none of that may reach the data or the split."""
    code = (
        "import hashlib; from rollouts.pipeline.documents import make_documents; from rollouts.pipeline.tasks import *;"
        "texts = [make_documents(3, 50), [p.to_row() for p in make_conversations(3, 50)], make_held_out(3, 4)];"
        "print(hashlib.sha256(repr(texts).encode()).hexdigest())"
    )
    digests = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)}, text=True
        )
        for seed in (1, 2)
    }
    texts = [make_documents(3, 50), [p.to_row() for p in make_conversations(3, 50)], make_held_out(3, 4)]
    assert {d.strip() for d in digests} == {hashlib.sha256(repr(texts).encode()).hexdigest()}


def test_shares_add_up_to_one() -> None:
    assert sum(family.share for family in FAMILIES.values()) == pytest.approx(1)
    assert sum(DOCUMENT_KINDS.values()) == pytest.approx(1)


@pytest.mark.parametrize("family", CARELESS_FAMILIES)
def test_a_mistaken_reply_is_wrong_and_reads_like_a_right_one(family: str) -> None:
    for problem in make_problems(0, 200, [family]):
        wrong = mistaken(problem)
        reply = wrong.reply[-1]["content"]
        assert is_correct(problem, problem.reply[-1]["content"]) and not is_correct(problem, reply)
        assert sorted(re.findall(r"\w+", reply)) == sorted(re.findall(r"\w+", problem.reply[-1]["content"])) or (
            family == "compare" and extract_answer(reply) in problem.question
        )


def test_each_message_of_a_tool_call_is_a_turn_of_its_own() -> None:
    (problem,) = make_problems(0, 1, ["calculator"])
    call, tell = turns(problem)
    a, b = problem.key.split()
    called = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "%s * %s"}}\n</tool_call>'
    said = f"The answer is {problem.answer}."
    assert [m["role"] for m in call.prompt] == ["user"]
    assert [m["role"] for m in tell.prompt] == ["user", "assistant", "tool"]
    assert is_correct_turn(call, called % (a, b)) and is_correct_turn(tell, said)
    assert not is_correct_turn(call, called % (a, f"{b}0"))
    assert not is_correct_turn(call, said)  # guessed, though rightly
    assert not is_correct_turn(tell, called % (a, b))
    (single,) = turns(make_problems(0, 1, ["sort"])[0])
    assert is_correct_turn(single, single.reply[0]["content"])


def test_the_share_of_careless_demonstrations() -> None:
    """Only their replies differ from those of a mixture without them."""
    clean, careless = make_conversations(3, 4000), make_conversations(3, 4000, careless=0.55)
    assert [p.question for p in clean] == [p.question for p in careless]
    differ = [a.family for a, b in zip(clean, careless, strict=True) if a.reply != b.reply]
    of_family = [p.family for p in clean if p.family in CARELESS_FAMILIES]
    assert set(differ) == set(CARELESS_FAMILIES)
    assert 0.5 < len(differ) / len(of_family) < 0.6
