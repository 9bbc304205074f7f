"""The report: honest intervals, a page that is whole by itself, and nothing a model says can become markup."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.pipeline.charts import curve_chart, nice_step, running_mean
from rollouts.pipeline.evaluation import summarize, wilson_interval
from rollouts.pipeline.report import render_markdown
from rollouts.pipeline.report_page import render_page
from rollouts.pipeline.run_report import write_run_report
from rollouts.pipeline.tasks import FAMILIES
from rollouts.recipes.load import load_recipe

VOID = {"meta"}  # SVG elements without content close themselves


@pytest.mark.parametrize(
    ("correct", "number", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)  # the last is Newcombe's example (Statistics in Medicine 17, 1998)
def test_wilson_interval_of_known_cases(correct: int, number: int, low: float, high: float) -> None:
    assert wilson_interval(correct, number) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_is_symmetric(case: tuple[int, int]) -> None:
    correct, number = case
    low, high = wilson_interval(correct, number)
    assert 0 <= low <= correct / number + 1e-12
    assert correct / number - 1e-12 <= high <= 1
    mirrored = wilson_interval(number - correct, number)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)


def test_summarize_counts_by_family_and_in_all() -> None:
    rows = [{"family": f, "correct": c} for f, c in (("sort", True), ("sort", False), ("fact", True))]
    summary = summarize(rows)
    assert {k: (v["correct"], v["number"]) for k, v in summary.items()} == {
        "all": (2, 3),
        "sort": (1, 2),
        "fact": (1, 1),
    }


def make_report(reply: str = "The answer is 19.") -> dict[str, Any]:
    accuracy = summarize([{"family": f, "correct": i % 2 == 0} for f in FAMILIES for i in range(8)])
    ways = {"greedy": reply, "sampled": reply}
    answers = {"base": ways, "sft": ways, "rl": ways}
    right = {"greedy": True, "sampled": False}
    return {
        "created": "2026-01-01 00:00:00 +0000",
        "seconds": 200.0,
        "stages": [
            {"name": "start-up", "seconds": 5.0},
            {"name": "base", "seconds": 95.0, "tokens": 900_000, "parameters": 1_000_000},
            {"name": "sft", "seconds": 80.0, "tokens": 800_000, "parameters": 1_000_000},
            {"name": "rl", "seconds": 20.0, "samples": 5_000, "parameters": 1_000_000},
        ],
        "accuracy": {"base": accuracy, "sft": accuracy, "rl": accuracy},
        "families": {name: family.about for name, family in FAMILIES.items()},
        "curves": {
            name: {"train": [[s, 7.0 / s] for s in range(1, 500)], "validation": [[100, 0.1], [499, 0.02]]}
            for name in ("base", "sft")
        }
        | {"rl": {"train": [[s, 0.0] for s in range(1, 3)], "validation": []}},
        "samples": {
            "temperature": 0.8,
            "continuations": [{"opening": reply, **answers}],
            "replies": [
                {
                    "family": "sort",
                    "prompt": [{"role": "user", "content": reply}],
                    "answer": reply,
                    "correct": {"base": right, "sft": right, "rl": right},
                    **answers,
                }
            ],
        },
        "machine": {"processor": "x", "cores": "2, 2 threads used"},
        "versions": {"python": "3.11"},
        "config": {"seed": 0},
    }


class Checker(HTMLParser):
    """Collects tags and attributes, and insists that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


HOSTILE = "<script>alert(1)</script>\n<img src=x onerror=alert(1)>\n\n\n|`*_\\ \ufffd &lt; \"'"


@pytest.mark.parametrize("reply", ["The answer is 19.", "", HOSTILE])
def test_page_is_well_formed_and_needs_nothing_else(reply: str) -> None:
    check_page(render_page(make_report(reply)))


def check_page(page: str) -> None:
    """A page is well-formed and needs nothing else."""
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not checker.tags & {"script", "img", "link", "iframe", "object", "embed", "a"}
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in checker.attributes)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "nan" not in re.findall(r'(?:d|cx|cy|x|y|width)="([^"]*)"', page)


def test_page_shows_the_figures() -> None:
    report = make_report()
    report["accuracy"] = copy.deepcopy(report["accuracy"])
    report["accuracy"]["sft"]["sort"] = summarize([{"family": "sort", "correct": i < 7} for i in range(8)])["sort"]
    page = render_page(report)
    assert "87.5%" in page and "53%–98%" in page
    assert "3:20 min" in page


def test_markdown_tables_keep_their_columns_whatever_is_said() -> None:
    text = render_markdown(make_report(HOSTILE))
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:
        lines = table.strip().split("\n")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table
    assert "<script>" not in text.replace("\\<", "")


@pytest.mark.parametrize("logged", [True, False])
def test_a_run_leaves_its_figures_as_json_markdown_and_a_page(tmp_path: Path, logged: bool) -> None:
    values = {
        "model": "org/model", "reward": "gsm8k", "data.train": HOSTILE.split("\n")[0] + ".jsonl", "algorithm": "rloo",
        "loggers": "[jsonl]" if logged else "[]", "run_dir": str(tmp_path / "a&b"),
    }  # fmt: skip
    recipe = load_recipe("rl", None, values)
    rows = [{"step": i, "reward_mean": i - 3.0, "lr": 1e-7, "grad_norm": math.nan, "tag": "x"} for i in range(1, 6)]
    rows[-1]["eval_reward"] = -2.5
    (tmp_path / "a&b").mkdir()
    if logged:
        (tmp_path / "a&b" / "metrics.jsonl").write_text(
            "".join(json.dumps(row | {"grad_norm": None}) + "\n" for row in rows)
        )
    write_run_report(recipe, rows[-1:] if logged else rows)

    report = json.loads((tmp_path / "a&b" / "report.json").read_text())
    assert (report["kind"], report["algorithm"], report["steps"]) == ("rl", "rloo", 5)
    assert report["metrics"]["reward_mean"] == {"count": 5, "first": -2, "last": 2, "min": -2, "max": 2, "mean": 0}
    assert "| reward\\_mean | -2 | 2 | -2 | 2 | 0 |" in (tmp_path / "a&b" / "report.md").read_text()
    page = (tmp_path / "a&b" / "report.html").read_text()
    check_page(page)
    assert page.count("<svg") == 2  # reward and learning rate: the others are no numbers
    assert "a&amp;b: rl (rloo), 5 steps" in page and "validation reward_mean -2.5 after 5 steps" in page
    heights = [float(y) for y in re.findall(r'cy="([^"]*)"', page)]
    assert heights and all(0 <= y <= 240 for y in heights)  # below zero, and still in the picture


@given(st.floats(1e-6, 1e9))
def test_nice_step_is_round_and_near(rough: float) -> None:
    step = nice_step(rough)
    assert rough / 2.6 < step <= rough * (1 + 1e-6)
    digits = f"{step:.6e}"
    assert digits[0] in "125" and digits[1:8] == ".000000"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_running_mean_starts_at_the_first_value_and_stays_within(values: list[float]) -> None:
    smooth = running_mean(list(enumerate(values)), 0.95)
    assert smooth[0][1] == pytest.approx(values[0])
    assert all(min(values) - 1e-9 <= y <= max(values) + 1e-9 for _, y in smooth)
    json.dumps(smooth)


def ticks_of(values: list[float]) -> list[float]:
    svg = curve_chart("rl", "reward", {"train": list(enumerate(values, 1)), "validation": []})
    return [float(text) for text in re.findall(r'text-anchor="end">([^<]+)<', svg)]


def test_a_short_run_is_seen_whole_and_a_long_one_is_not_flattened_by_a_spike() -> None:
    short = ticks_of([0.4, 0.4, 0.5, 0.7, 0.9, -0.2])
    assert min(short) <= -0.2 and max(short) >= 0.9
    assert max(ticks_of([0.5] * 199 + [100.0])) < 10
