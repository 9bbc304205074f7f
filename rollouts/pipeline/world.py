"""The invented world that all synthetic text speaks of, and the split of its problems into train and held out."""

from __future__ import annotations

import hashlib
import random
from enum import StrEnum
from typing import NamedTuple

ASSISTANT = "Rollo"
MAKER = "the rollouts speedrun"

HE = ("Finn", "Oscar", "Leo", "Hugo", "Jonas", "Emil", "Noah", "Anton", "Felix", "Ravi", "Samir", "Tomas")
SHE = ("Tara", "Mila", "Nora", "Ida", "Lena", "Zoe", "Ruth", "Clara", "Anya", "Greta", "Priya", "Selma")
PEOPLE = HE + SHE

THINGS = (
    "apples", "pears", "shells", "stones", "coins", "books", "buttons", "marbles", "stamps", "cards",
    "plums", "nuts", "beads", "pencils", "cookies", "ribbons", "keys", "feathers", "candles", "eggs",
)  # fmt: skip
PLACES = (
    "market",
    "school",
    "garden",
    "harbor",
    "library",
    "mill",
    "forest",
    "bakery",
    "bridge",
    "lake",
    "station",
    "farm",
)
WEATHER = ("sunny", "rainy", "windy", "foggy", "snowy", "cloudy", "warm", "cold")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "purple", "orange", "silver", "brown")
CLOTHES = ("hat", "coat", "scarf", "kite", "boat", "bag", "lamp", "chair", "door", "drum")
WORDS = (
    "ant", "arm", "bee", "box", "cat", "cup", "dog", "drum", "egg", "elk", "fan", "fox", "goat", "gum", "hat", "hen",
    "ink", "ivy", "jam", "jug", "key", "kite", "lamp", "leaf", "map", "moon", "nest", "nut", "oak", "owl", "pig", "pot",
    "rain", "rose", "sand", "sun", "tent", "toad", "van", "vine", "wax", "wolf", "yak", "yarn", "zinc", "zoo",
)  # fmt: skip

ATTRIBUTES = {
    "river": ("Ossa", "Brill", "Tamsel", "Quen", "Fallow", "Indra", "Lorn", "Merrow", "Sable", "Ulm", "Wend", "Yarrow"),
    "color": COLORS,
    "animal": ("heron", "otter", "badger", "stag", "falcon", "trout", "hare", "lynx", "swan", "bear", "raven", "crane"),
    "dish": (
        "soup",
        "bread",
        "cheese",
        "honey",
        "stew",
        "pie",
        "jelly",
        "pudding",
        "salad",
        "noodles",
        "rice",
        "toast",
    ),
    "mayor": PEOPLE,
}


class Split(StrEnum):
    """Which side of the train / held-out split a problem lies on."""

    TRAIN = "train"
    HELD_OUT = "held_out"


class Town(NamedTuple):
    """A town of the invented world; every field is one fact about it."""

    name: str
    river: str
    color: str
    animal: str
    dish: str
    mayor: str


TOWN_NAMES = (
    "Velm", "Ostra", "Karo", "Dunmar", "Lissen", "Pellow", "Harth", "Minden", "Soray", "Tolk", "Brenna", "Calder",
    "Eskil", "Farrow", "Gildon", "Hollin", "Istria", "Jarrow", "Kestrel", "Lunden", "Marrick", "Norden", "Orford",
    "Pruth", "Quarry", "Rosmer", "Stavel", "Thorne", "Upwell", "Varda", "Wexcombe", "Zelden",
)  # fmt: skip


def make_towns() -> tuple[Town, ...]:
    """The towns and their facts: the same in every process and for every seed, because the world is one world."""
    rng = random.Random("the invented world")
    return tuple(Town(name, *(rng.choice(values) for values in ATTRIBUTES.values())) for name in TOWN_NAMES)


TOWNS = make_towns()


def split_of(*problem: object) -> Split:
    """The side on which a problem lies: one in five is held out, by a hash of what makes it this problem.

    The side is a property of the problem, not of a draw, so a held-out problem cannot occur in training text whatever
    the seed. Callers pass operands in a canonical order: 7 + 5, 5 + 7, 12 - 5 and 12 - 7 are one problem.
    """
    digest = hashlib.blake2b(repr(problem).encode(), digest_size=8).digest()
    return Split.HELD_OUT if int.from_bytes(digest, "big") % 5 == 0 else Split.TRAIN


class Step(NamedTuple):
    """One line of arithmetic: ``left sign right = result``."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


def split_of_sum(a: int, b: int) -> Split:
    """The side of a fact family: a + b, b + a, and both differences that undo them."""
    return split_of("sum", min(a, b), max(a, b))


def draw_chain(rng: random.Random, split: Split, steps: int) -> list[Step]:
    """Sums and differences in a row, each starting from the result before it, all between 2 and 99.

    Every step lies on the wanted side: training never shows a held-out sum, not even inside a longer problem, and a
    held-out problem consists of held-out sums alone.
    """
    while True:
        chain: list[Step] = []
        total = rng.randint(5, 70)
        for _ in range(steps):
            sign, right = rng.choice("+-"), rng.randint(2, 40)
            chain.append(Step(total, sign, right, total + right if sign == "+" else total - right))
            total = chain[-1].result
        if all(2 <= s.result < 100 and split_of_sum(min(s.left, s.result), s.right) == split for s in chain):
            return chain


def draw_factors(rng: random.Random, split: Split) -> tuple[int, int]:
    """A three-digit and a two-digit number whose product lies on this side of the split: work for a calculator."""
    while True:
        a, b = rng.randint(101, 999), rng.randint(11, 99)
        if split_of("product", a, b) == split:
            return a, b


def draw_numbers(rng: random.Random, split: Split) -> tuple[int, int]:
    """Two different numbers below 100 to compare, in random order."""
    while True:
        a, b = rng.sample(range(1, 100), 2)
        if split_of("compare", min(a, b), max(a, b)) == split:
            return a, b


def draw_words(rng: random.Random, split: Split, low: int = 3, high: int = 5) -> list[str]:
    """``low`` to ``high`` different words in random order; all orders of the same words lie on one side."""
    while True:
        words = rng.sample(WORDS, rng.randint(low, high))
        if split_of("words", *sorted(words)) == split:
            return words


def draw_colored_things(rng: random.Random, split: Split) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two different (thing, color) pairs of different colors."""
    while True:
        things, colors = rng.sample(CLOTHES, 2), rng.sample(COLORS, 2)
        if split_of("colored", *sorted(zip(things, colors, strict=True))) == split:
            return (things[0], colors[0]), (things[1], colors[1])


def draw_resident(rng: random.Random, split: Split) -> tuple[str, str]:
    """A person and the town this person lives in."""
    while True:
        person, town = rng.choice(PEOPLE), rng.choice(TOWN_NAMES)
        if split_of("resident", person, town) == split:
            return person, town


def draw_fact(rng: random.Random, split: Split) -> tuple[Town, str]:
    """A town and the name of one of its attributes.

    Documents state all facts (they are the knowledge); the split decides which are ever asked about in training.
    """
    while True:
        town, attribute = rng.choice(TOWNS), rng.choice(tuple(ATTRIBUTES))
        if split_of("fact", town.name, attribute) == split:
            return town, attribute
