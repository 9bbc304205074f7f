"""Small verifiable tasks as conversations: ten families, each with a reply and an exactly checkable answer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rollouts.pipeline.world import (
    ASSISTANT,
    HE,
    MAKER,
    PEOPLE,
    PLACES,
    THINGS,
    Split,
    Step,
    draw_chain,
    draw_colored_things,
    draw_fact,
    draw_factors,
    draw_numbers,
    draw_resident,
    draw_words,
    split_of,
)

Message = dict[str, Any]

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Multiply two numbers.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Problem:
    """A question, how a good reply to it reads, and the answer that a reply must end with.

    Args:
        family: the kind of task, a key of ``FAMILIES``.
        prompt: the messages up to the user's question.
        reply: the messages of the reference: the assistant's reply, or a tool call, its result and the reply.
        answer: what ``extract_answer`` must find in the assistant's last message.
        key: what makes it this problem: problems with the same key are one problem in other words.
        tools: schemas of the tools on offer.
    """

    family: str
    prompt: Sequence[Message]
    reply: Sequence[Message]
    answer: str
    key: str
    tools: Sequence[dict[str, Any]] = ()

    @property
    def question(self) -> str:
        """The user's last message."""
        return self.prompt[-1]["content"]

    def to_row(self) -> dict[str, Any]:
        """The problem as a row of a chat data set; ``family`` and ``answer`` ride along for grading."""
        row: dict[str, Any] = {"messages": [*self.prompt, *self.reply], "family": self.family, "answer": self.answer}
        return {**row, "tools": list(self.tools)} if self.tools else row


def extract_answer(reply: str) -> str:
    """The answer in a reply: what follows its last " is " or ": ", without the final period; empty when there is none.

    >>> extract_answer("12 + 7 = 19. The answer is 19.")
    '19'
    """
    found = re.search(r"^(?:.*(?: is |: ))([^\n]+?)\.?\s*$", reply, flags=re.DOTALL)
    return found.group(1) if found else ""


def is_correct(problem: Problem, reply: str) -> bool:
    """Whether the reply's answer equals the problem's, exactly."""
    return extract_answer(reply) == problem.answer


def turns(problem: Problem) -> list[Problem]:
    """What the assistant has to say in a problem, message by message: the chat so far is the prompt of each."""
    return [
        replace(problem, prompt=[*problem.prompt, *problem.reply[:i]], reply=problem.reply[i:])
        for i, message in enumerate(problem.reply)
        if message["role"] == "assistant"
    ]


def is_correct_turn(problem: Problem, said: str) -> bool:
    """Whether the assistant's next message is right: its answer, or where a tool call is due, what that call gives."""
    if "tool_calls" not in problem.reply[0]:
        return is_correct(problem, said)
    call = parse_tool_call(said)
    return call is not None and run_calculator(call.get("arguments")) == problem.answer


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def single_turn(family: str, question: str, reply: str, answer: str, key: str) -> Problem:
    return Problem(family, (user(question),), (assistant(reply),), answer, key)


# --- arithmetic ------------------------------------------------------------------------------------------------------

GAINS = (
    "{name} finds {n} more",
    "{friend} gives {him} {n} more",
    "{name} buys {n} more at the {place}",
    "{friend} brings {n} more",
    "{he} gets {n} more from {friend}",
)
LOSSES = (
    "{name} gives {n} to {friend}",
    "{he} loses {n} on the way to the {place}",
    "{friend} takes {n} of them",
    "{name} sells {n} at the {place}",
    "{he} leaves {n} at the {place}",
)
OPENINGS = (
    "{name} has {n} {things}.",
    "There are {n} {things} in {name}'s bag.",
    "In the morning {name} has {n} {things}.",
    "{name} comes home with {n} {things}.",
)
QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there in the end?",
    "How many {things} is that now?",
)


def word_problem(rng: random.Random, chain: list[Step]) -> str:
    """A short story in which a number of things changes as the chain says, and the question for the last number."""
    name, friend = rng.sample(PEOPLE, 2)
    he, him = ("he", "him") if name in HE else ("she", "her")
    words = {
        "name": name,
        "friend": friend,
        "he": he,
        "him": him,
        "things": rng.choice(THINGS),
        "place": rng.choice(PLACES),
    }
    sentences = [rng.choice(OPENINGS).format(n=chain[0].left, **words)]
    for i, step in enumerate(chain):
        change = rng.choice(GAINS if step.sign == "+" else LOSSES).format(n=step.right, **words)
        sentences.append(f"Then {change}." if i else f"{change[0].upper()}{change[1:]}.")
    return " ".join([*sentences, rng.choice(QUESTIONS).format(**words)])


def worked(chain: list[Step]) -> str:
    """The reference reply: each line of arithmetic, then the answer."""
    return " ".join([*(f"{step}." for step in chain), f"The answer is {chain[-1].result}."])


def one_step(rng: random.Random, split: Split) -> Problem:
    chain = draw_chain(rng, split, steps=1)
    return single_turn("one step", word_problem(rng, chain), worked(chain), str(chain[-1].result), worked(chain))


def two_steps(rng: random.Random, split: Split) -> Problem:
    chain = draw_chain(rng, split, steps=2)
    return single_turn("two steps", word_problem(rng, chain), worked(chain), str(chain[-1].result), worked(chain))


def compare(rng: random.Random, split: Split) -> Problem:
    a, b = draw_numbers(rng, split)
    word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    question = rng.choice(("Which number is {word}, {a} or {b}?", "Of {a} and {b}, which is {word}?")).format(
        word=word, a=a, b=b
    )
    return single_turn("compare", question, f"The {word} number is {answer}.", str(answer), f"{word} {a} {b}")


# --- words -----------------------------------------------------------------------------------------------------------


def sort(rng: random.Random, split: Split) -> Problem:
    words = draw_words(rng, split, low=3, high=4)
    ask = rng.choice(("Sort these words from A to Z", "Put these words in alphabetical order", "Arrange from A to Z"))
    answer = ", ".join(sorted(words))
    return single_turn("sort", f"{ask}: {', '.join(words)}.", f"In order: {answer}.", answer, answer)


def reverse(rng: random.Random, split: Split) -> Problem:
    words = draw_words(rng, split)
    ask = rng.choice(("Reverse this list", "Say these words backwards", "Turn this list around"))
    answer = ", ".join(reversed(words))
    return single_turn("reverse", f"{ask}: {', '.join(words)}.", f"Backwards: {answer}.", answer, answer)


def after(rng: random.Random, split: Split) -> Problem:
    words = draw_words(rng, split, low=4, high=6)
    place = rng.randrange(len(words) - 1)
    word, answer, listed = words[place], words[place + 1], ", ".join(words)
    ask = rng.choice(("Which word comes after {w} in this list", "What follows {w} here", "Name the word after {w}"))
    reply = f"The word after {word} is {answer}."
    return single_turn("after", f"{ask.format(w=word)}: {listed}.", reply, answer, f"{word} {listed}")


# --- knowledge -------------------------------------------------------------------------------------------------------

FACT_QUESTIONS = (
    "What is the {attribute} of {town}?",
    "Tell me the {attribute} of {town}.",
    "Name the {attribute} of {town}.",
)


def fact(rng: random.Random, split: Split) -> Problem:
    town, attribute = draw_fact(rng, split)
    question = rng.choice(FACT_QUESTIONS).format(attribute=attribute, town=town.name)
    answer = getattr(town, attribute)
    return single_turn(
        "fact", question, f"The {attribute} of {town.name} is {answer}.", answer, f"{attribute} {town.name}"
    )


GREETINGS = ("", "Hi! ", "Hello. ", "Hey, ", "Good morning. ", "Good evening. ", "Hello there! ", "Excuse me, ")
ABOUT_ITSELF = {
    ASSISTANT: (
        "what is your name?",
        "who are you?",
        "what are you called?",
        "tell me your name.",
        "what do people call you?",
    ),
    MAKER: ("who made you?", "where do you come from?", "who is your maker?", "who trained you?", "who built you?"),
    "a very small language model": (
        "what are you?",
        "are you a person?",
        "are you human?",
        "what kind of thing are you?",
    ),
}
ITS_REPLIES = {
    ASSISTANT: f"My name is {ASSISTANT}.",
    MAKER: f"My maker is {MAKER}.",
    "a very small language model": "What I am is a very small language model.",
}


def identity(rng: random.Random, split: Split) -> Problem:
    """Who the model is. What is held out is the way of asking, not the answer."""
    while True:
        answer = rng.choice(tuple(ABOUT_ITSELF))
        greeting, ask = rng.choice(GREETINGS), rng.choice(ABOUT_ITSELF[answer])
        question = greeting + (ask if greeting.endswith(", ") else ask[0].upper() + ask[1:])
        if split_of("identity", question) == split:
            return single_turn("identity", question, ITS_REPLIES[answer], answer, question)


# --- several turns ---------------------------------------------------------------------------------------------------


def recall(rng: random.Random, split: Split) -> Problem:
    """A chat whose last question asks for something said at its start, with another problem between the two."""
    if rng.random() < 0.5:
        person, town = draw_resident(rng, split)
        opening, first = f"Hi, my name is {person} and I live in {town}.", f"Nice to meet you, {person}."
        question, reply, answer = rng.choice(
            (
                ("What is my name?", f"Your name is {person}.", person),
                ("Where do I live?", f"Your town is {town}.", town),
            )
        )
    else:
        (thing, color), (other, other_color) = draw_colored_things(rng, split)
        opening, first = f"My {thing} is {color} and my {other} is {other_color}.", "That sounds nice."
        question, reply, answer = f"What color is my {thing}?", f"Your {thing} is {color}.", color
        if rng.random() < 0.5:
            question, reply, answer = f"What color is my {other}?", f"Your {other} is {other_color}.", other_color
    between = rng.choice((compare, fact, identity))(rng, split)
    prompt = (user(opening), assistant(first), *between.prompt, *between.reply, user(question))
    return Problem("recall", prompt, (assistant(reply),), answer, f"{opening} {question}")


def calculator(rng: random.Random, split: Split) -> Problem:
    """A product too large to work out in the head: the model must call the tool and read its result."""
    a, b = draw_factors(rng, split)
    question = rng.choice(("What is {a} * {b}?", "Multiply {a} by {b}.", "How much is {a} times {b}?")).format(a=a, b=b)
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": f"{a} * {b}"}}}
    reply = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": str(a * b)},
        assistant(f"The answer is {a * b}."),
    )
    return Problem("calculator", (user(question),), reply, str(a * b), f"{a} {b}", (CALCULATOR,))


def run_calculator(arguments: object) -> str:
    """The tool itself: the product that ``{"expression": "312 * 45"}`` asks for, or a line that says what was wrong."""
    expression = arguments.get("expression") if isinstance(arguments, dict) else None
    product = re.fullmatch(r"\s*(\d{1,9})\s*\*\s*(\d{1,9})\s*", expression) if isinstance(expression, str) else None
    return str(int(product[1]) * int(product[2])) if product else "error: expected an expression such as 312 * 45"


def parse_tool_call(reply: str) -> dict[str, Any] | None:
    """The name and arguments of the first tool call in a reply, or None when it holds no well-formed one."""
    found = re.search(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", reply, flags=re.DOTALL)
    try:
        call = json.loads(found.group(1)) if found else None
    except json.JSONDecodeError:
        return None
    return call if isinstance(call, dict) and call.get("name") == "calculator" else None


# --- the mixture -----------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A kind of task: who makes its problems, its share of the training conversations, and what it asks for."""

    make: Callable[[random.Random, Split], Problem]
    share: float
    about: str


FAMILIES = {
    "one step": Family(one_step, 0.16, "a word problem with one sum or difference below 100"),
    "two steps": Family(two_steps, 0.16, "a word problem with two of them in a row"),
    "compare": Family(compare, 0.08, "the larger or smaller of two numbers"),
    "sort": Family(sort, 0.13, "three or four words into alphabetical order"),
    "reverse": Family(reverse, 0.12, "three to five words backwards"),
    "after": Family(after, 0.09, "the word that follows another in a list"),
    "fact": Family(fact, 0.08, "a fact that only the documents stated, never a training question"),
    "identity": Family(identity, 0.03, "who the model is, asked in new words"),
    "recall": Family(recall, 0.10, "something said at the start of a chat of several turns"),
    "calculator": Family(calculator, 0.05, "a large product, by calling a tool and reading its result"),
}


def mistaken(problem: Problem) -> Problem:
    """The problem with the reply of somebody careless: of two numbers the other one, of a list the last two swapped.

    Worked example: asked for the larger of 3 and 5, ``The larger number is 3.``
    """
    if problem.family == "compare":
        _, a, b = problem.key.split()
        wrong = b if problem.answer == a else a
    else:
        *words, last, end = problem.answer.split(", ")
        wrong = ", ".join([*words, end, last])
    reply = [{**message, "content": message["content"].replace(problem.answer, wrong)} for message in problem.reply]
    return replace(problem, reply=reply, answer=wrong)


CARELESS_FAMILIES = ("compare", "sort", "reverse")


def make_conversations(seed: int, number: int, split: Split = Split.TRAIN, careless: float = 0.0) -> list[Problem]:
    """Conversations drawn from the mixture of families, every one on this side of the split.

    Args:
        careless: share of wrong replies among the demonstrations of ``CARELESS_FAMILIES``, as in data made by people.
    """
    rng = random.Random(f"conversations {seed} {split}")
    chance = random.Random(f"careless {seed} {split}")
    families = tuple(FAMILIES.values())
    drawn = (
        family.make(rng, split) for family in rng.choices(families, [family.share for family in families], k=number)
    )
    return [mistaken(p) if p.family in CARELESS_FAMILIES and chance.random() < careless else p for p in drawn]


def make_problems(seed: int, number: int, families: Sequence[str], split: Split = Split.TRAIN) -> list[Problem]:
    """Problems of these families in equal parts, on this side of the split; another seed gives other problems."""
    rng = random.Random(f"problems {seed} {split}")
    return [FAMILIES[rng.choice(families)].make(rng, split) for _ in range(number)]


def make_held_out(seed: int, per_family: int) -> list[Problem]:
    """Up to ``per_family`` different held-out problems of each family (a small family has fewer)."""
    problems: list[Problem] = []
    for name, family in FAMILIES.items():
        rng = random.Random(f"held out {seed} {name}")
        drawn = (family.make(rng, Split.HELD_OUT) for _ in range(20 * per_family))
        problems += list({problem.key: problem for problem in drawn}.values())[:per_family]
    return problems
