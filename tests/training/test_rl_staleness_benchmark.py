"""``benchmarks.rl_staleness`` reads runs as they are: ages of tokens, seconds of the loop, faster and no worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rl_staleness import loop_seconds, oldest_token, report, run_arm, untrained


def test_a_run_of_two_steps(tmp_path: Path) -> None:
    run = run_arm(tmp_path, untrained(tmp_path / "model"), "judge", max_staleness=2, seed=0, steps=2)
    assert run["oldest"] <= 2 and run["correct"] < 100
    assert run["loop"] == pytest.approx(run["waiting"] + run["learning"]) and 0 < run["loop"] < run["seconds"]
    samples = (tmp_path / "judge_2_0" / "rollouts.jsonl").read_text().splitlines()
    assert len(samples) == 2 * 32 * 8
    assert all(json.loads(line)["reward"] is not None for line in samples)  # the judge was heard


def test_the_oldest_token_of_all_spans_counts(tmp_path: Path) -> None:
    rows = [
        {"step": 4, "weight_versions": [{"version": 1, "start": 2, "end": 3}, {"version": 3, "start": 3, "end": 9}]},
        {"step": 6, "weight_versions": [{"version": 5, "start": 2, "end": 9}]},
    ]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert oldest_token(path) == 2


def test_the_first_step_is_not_timed(tmp_path: Path) -> None:
    steps = [{"seconds/generate": waited, "seconds/train": 2.0, "step": 1} for waited in (50.0, 1.0, 0.5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in steps))
    assert loop_seconds(path) == {"loop": 5.5, "waiting": 1.5, "learning": 4.0}


@pytest.mark.parametrize(("correct", "verdict"), [(970, "yes"), (930, "no")])
def test_worse_is_where_the_intervals_are_apart(correct: int, verdict: str) -> None:
    def run(knob: int, seed: int, right: int, loop: float) -> dict[str, Any]:
        seconds = {"loop": loop, "waiting": 1.0, "learning": loop - 1.0}
        return {"setting": "judge", "max_staleness": knob, "seed": seed, "correct": right, "oldest": knob, **seconds}

    runs = [run(0, 0, 980, 20.0), run(0, 1, 980, 22.0), run(2, 0, correct, 10.0), run(2, 1, correct, 10.0)]
    last = report(450, runs).splitlines()[-1]
    assert last.endswith(f"| 2.10 (2.00 to 2.20) | {verdict} |")
