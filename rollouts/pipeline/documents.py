"""English-like documents about the invented world: what the base model reads before anyone asks it anything."""

from __future__ import annotations

import random
from collections.abc import Callable

from rollouts.pipeline.tasks import worked
from rollouts.pipeline.world import (
    ASSISTANT,
    ATTRIBUTES,
    HE,
    MAKER,
    PEOPLE,
    PLACES,
    THINGS,
    TOWNS,
    WEATHER,
    WORDS,
    Split,
    Town,
    draw_chain,
    draw_colored_things,
    draw_factors,
    draw_numbers,
    draw_resident,
    draw_words,
)

FACT_SENTENCES = {
    "river": (
        "The river of {town} is {value}.", "{value} is the river that runs through {town}.",
        "In {town} the river is {value}.",
    ),
    "color": ("The color of {town} is {value}.", "Every roof in {town} is {value}.", "The flag of {town} is {value}."),
    "animal": (
        "The animal of {town} is {value}.", "On the coins of {town} there is a {value}.",
        "{town} keeps a {value} on its gate.",
    ),
    "dish": (
        "The dish of {town} is {value}.", "People in {town} eat {value} on holidays.",
        "{town} is known for its {value}.",
    ),
    "mayor": ("The mayor of {town} is {value}.", "{value} is the mayor of {town}.", "In {town} the mayor is {value}."),
}  # fmt: skip

GAINED = (
    "{friend} gave {him} {n} more",
    "{he} found {n} more at the {place}",
    "{he} bought {n} more",
    "{friend} brought {n} more",
)
LOST = (
    "{he} gave {n} to {friend}",
    "{he} lost {n} at the {place}",
    "{friend} took {n}",
    "{he} sold {n} at the {place}",
)
DEEDS = (
    "walked to the {place}", "sat by the {place}", "met {friend} at the {place}", "read a book at the {place}",
    "slept until noon", "cooked soup for {friend}", "sang a song with {friend}", "cleaned the house", "fed the hens",
    "wrote a letter to {friend}", "looked for a lost key near the {place}", "waited for {friend}",
    "painted a picture of the {place}",
)  # fmt: skip
FEELINGS = ("happy", "tired", "hungry", "proud", "quiet", "surprised", "glad", "sleepy")
ENDINGS = (
    "It was a good day.", "Then it was time to sleep.", "{friend} laughed.", "Nobody said a word.",
    "In the evening {he} was {feeling}.", "The next day was {weather}.", "They went home together.",
)  # fmt: skip


def cast(rng: random.Random) -> dict[str, str]:
    """Words for the slots of a template: one person, a friend, a place and so on."""
    name, friend = rng.sample(PEOPLE, 2)
    he, him, his = ("he", "him", "his") if name in HE else ("she", "her", "her")
    return {
        "name": name, "friend": friend, "he": he, "him": him, "his": his, "place": rng.choice(PLACES),
        "things": rng.choice(THINGS), "weather": rng.choice(WEATHER), "feeling": rng.choice(FEELINGS),
    }  # fmt: skip


def capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def story(rng: random.Random, split: Split) -> str:
    """A day in someone's life, with no numbers in it."""
    words = cast(rng)
    start = rng.choice(
        ("It was a {weather} day.", "One {weather} morning {name} woke up early.", "{name} lived near the {place}.")
    )
    sentences = [
        start,
        *(f"{rng.choice(('{name}', '{he}', 'Then {he}'))} {deed}." for deed in rng.sample(DEEDS, rng.randint(2, 5))),
    ]
    sentences.append(
        rng.choice(
            ("{he} was {feeling} because {friend} was there.", "{name} felt {feeling}.", "{friend} was {feeling}.")
        )
    )
    return " ".join(capitalized(s.format(**words)) for s in [*sentences, rng.choice(ENDINGS)])


def counting_story(rng: random.Random, split: Split) -> str:
    """Someone's things grow and shrink, with the arithmetic worked out on the way."""
    words = cast(rng)
    chain = draw_chain(rng, split, steps=rng.choice((1, 2)))
    sentences = [f"{{name}} had {chain[0].left} {{things}}."]
    for step in chain:
        changed = rng.choice(GAINED if step.sign == "+" else LOST).replace("{n}", str(step.right))
        sentences.append(
            f"{changed}. {step}. {rng.choice(('Now {he} had', 'That made', 'So there were'))} {step.result} {{things}}."
        )
    return " ".join(capitalized(s.format(**words)) for s in [*sentences, rng.choice(ENDINGS)])


def sums(rng: random.Random, split: Split) -> str:
    """A page of sums and differences from an exercise book."""
    return " ".join(
        [rng.choice(("Sums.", "Homework.", "Practice."))]
        + [worked(draw_chain(rng, split, rng.choice((1, 1, 2)))) for _ in range(6)]
    )


def comparisons(rng: random.Random, split: Split) -> str:
    """Pairs of numbers and which of the two is larger."""
    lines = []
    for _ in range(6):
        a, b = draw_numbers(rng, split)
        small, large = min(a, b), max(a, b)
        lines.append(
            rng.choice(
                (
                    f"Of {a} and {b}, the larger number is {large}.",
                    f"Of {a} and {b}, the smaller number is {small}.",
                    f"{large} is larger than {small}.",
                    f"{small} is smaller than {large}.",
                )
            )
        )
    return " ".join(lines)


def word_lists(rng: random.Random, split: Split) -> str:
    """Lists of words: said again, put in order, turned around, and asked for the word after another."""
    lines = []
    for _ in range(3):
        words = draw_words(rng, split)
        lines.append(f"{rng.choice(PEOPLE)} wrote a list: {', '.join(words)}.")
        forms = (("Again", words), ("In order", sorted(words)), ("Backwards", words[::-1]))
        lines += [f"{form}: {', '.join(listed)}." for form, listed in rng.sample(forms, 2)]
        place = rng.randrange(len(words) - 1)
        lines.append(f"The word after {words[place]} is {words[place + 1]}.")
    return " ".join(lines)


def alphabet(rng: random.Random, split: Split) -> str:
    """Which word comes before which in the dictionary."""
    start = rng.randrange(len(WORDS) - 8)
    pairs = [sorted(rng.sample(WORDS, 2)) for _ in range(4)]
    return " ".join(
        [f"In the dictionary: {', '.join(WORDS[start : start + 8])}."]
        + [rng.choice((f"{a} comes before {b}.", f"{b} comes after {a}.")) for a, b in pairs]
    )


def fact_sentence(rng: random.Random, town: Town, attribute: str) -> str:
    return rng.choice(FACT_SENTENCES[attribute]).format(town=town.name, value=getattr(town, attribute))


def almanac(rng: random.Random, split: Split) -> str:
    """A page about one town: all its facts in random order and wording."""
    town = rng.choice(TOWNS)
    attributes = rng.sample(tuple(ATTRIBUTES), len(ATTRIBUTES))
    opening = rng.choice(
        (f"About {town.name}.", f"{town.name} is a town by the {rng.choice(PLACES)}.", f"This is {town.name}.")
    )
    return " ".join([opening, *(fact_sentence(rng, town, attribute) for attribute in attributes)])


def journey(rng: random.Random, split: Split) -> str:
    """A journey through several towns, with a fact or two about each."""
    words = cast(rng)
    sentences = ["{name} went on a journey."]
    for when, town in zip(("First", "Then", "After that"), rng.sample(TOWNS, 3), strict=True):
        sentences.append(f"{when} {{he}} came to {town.name}.")
        sentences += [
            fact_sentence(rng, town, attribute) for attribute in rng.sample(tuple(ATTRIBUTES), rng.randint(1, 2))
        ]
    return " ".join(capitalized(s.format(**words)) for s in [*sentences, rng.choice(ENDINGS)])


def meeting(rng: random.Random, split: Split) -> str:
    """People say who they are and what they own, and someone remembers it."""
    person, town = draw_resident(rng, split)
    (thing, color), (other, other_color) = draw_colored_things(rng, split)
    listener = rng.choice([p for p in PEOPLE if p != person])
    he, his = ("he", "His") if person in HE else ("she", "Her")
    lines = [
        f'"Hi, my name is {person} and I live in {town}," {he} said.',
        f'"My {thing} is {color} and my {other} is {other_color}."',
        f'"Nice to meet you, {person}," said {listener}.',
    ]
    remembered = [
        f"{his} name is {person}.",
        f"{his} town is {town}.",
        f"{his} {thing} is {color}.",
        f"{his} {other} is {other_color}.",
    ]
    rng.shuffle(remembered)
    return " ".join([*lines, f"Later {listener} remembered:", *remembered[:3]])


def machine(rng: random.Random, split: Split) -> str:
    """The calculator at work, and the small model that uses it."""
    lines = [
        rng.choice(
            (f"My name is {ASSISTANT}.", f"My maker is {MAKER}.", f"{ASSISTANT} is a very small language model.")
        )
    ]
    for _ in range(4):
        a, b = draw_factors(rng, split)
        lines.append(f'calculator {{"expression": "{a} * {b}"}} {a * b}. The answer is {a * b}.')
    return " ".join(lines)


DOCUMENT_KINDS: dict[Callable[[random.Random, Split], str], float] = {
    story: 0.10,
    counting_story: 0.13,
    sums: 0.14,
    comparisons: 0.06,
    word_lists: 0.26,
    alphabet: 0.03,
    almanac: 0.10,
    journey: 0.05,
    meeting: 0.10,
    machine: 0.03,
}


def make_documents(seed: int, number: int, split: Split = Split.TRAIN) -> list[str]:
    """Documents drawn from the mixture of kinds; every problem inside them lies on the given side of the split."""
    rng = random.Random(f"documents {seed} {split}")
    kinds = rng.choices(tuple(DOCUMENT_KINDS), tuple(DOCUMENT_KINDS.values()), k=number)
    return [kind(rng, split) for kind in kinds]
