#!/usr/bin/env python3
"""GRPO that samples while it learns (`max_staleness` 2) beside GRPO that takes turns: no worse, and faster?

    python -m benchmarks.rl_staleness                       # everything, three seeds: about 20 minutes on 2 idle cores
    python -m benchmarks.rl_staleness --settings judge --seeds 0
    python -m benchmarks.rl_staleness --settings embedded --heads 8 --schedule constant --correction sequence_tis
    python -m benchmarks.rl_staleness --quick               # two steps of an untrained model: does it run?

Task, first model and held-out lists are those of ``benchmarks.rl_algorithms``: lists of letters backwards, answered by
a model that learned from careless teachers. Settings differ in what sampling waits for:

- ``embedded``: nothing. The engine is in the trainer's process and each of the two has one thread, so that side by side
  they use two cores and one after the other one.
- ``both_cores``: the same with two threads for each: nothing is left over that overlapping could use.
- ``judge``: a reward that answers after ``JUDGE_SECONDS``, as a judge elsewhere would; one thread each.
- ``server``: `rollouts serve` in a process of its own samples, with weights pushed to it; one thread each.

A run is `rollouts rl` in a process of its own, the same number of steps either way. ``waiting`` are the loop's seconds
in which it has no samples to learn from, ``learning`` those of log-probs, updates and sync; ``loop`` is both, without
starting Python and without the first step. Staleness is read from every sampled token that was learned from, and one
older than the knob ends the benchmark. Accuracy is of answers at temperature 1 to held-out lists, with Wilson's
intervals, which know of no seeds: those stand beside it, one by one.

The learning rate falls to a tenth over the run: at a constant one accuracy moves by points from step to step until the
end, with or without staleness, and what the last step happens to leave is all that a run shows.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rl_algorithms import (
    HELD_OUT,
    MAX_TOKENS,
    RL_STEPS,
    count_correct,
    percent,
    rollouts,
    take,
    train_sft,
    user,
    write_rows,
)
from rollouts.pipeline.evaluation import wilson_interval
from rollouts.pipeline.world import Split

STALENESS = (0, 2)
HEAD_DIM = 32  # attention of such heads is compiled: in its place Python would take turns with the engine's
JUDGE_SECONDS = 0.1
JUDGE = f"""
import anyio

async def judge(sample):
    await anyio.sleep({JUDGE_SECONDS})
    return float(sample.response.strip() == sample.metadata["answer"])
"""


class Setting(NamedTuple):
    threads: int = 1
    judged_elsewhere: bool = False
    served: bool = False


SETTINGS = {
    "embedded": Setting(),
    "both_cores": Setting(threads=2),
    "judge": Setting(judged_elsewhere=True),
    "server": Setting(served=True),
}


class Learning(NamedTuple):
    """What both knobs learn with."""

    lr: float = 1e-3
    schedule: str = "linear"
    correction: str | None = None  # of what is stale; None = the default's

    @property
    def folder(self) -> str:
        return f"{self.schedule}_{self.lr:g}" + (f"_{self.correction}" if self.correction else "")


LEARNING = Learning()


# One run --------------------------------------------------------------------------------------------------------------


def run_arm(
    folder: Path, model: Path, name: str, max_staleness: int, seed: int, steps: int, learning: Learning = LEARNING
) -> dict[str, Any]:
    """Train once; what the run's own files tell of it, and held-out correct answers."""
    setting = SETTINGS[name]
    run_dir = folder / f"{name}_{max_staleness}_{seed}"
    rows = ({"prompt": user(p), "answer": p.answer} for p in take(16_000, 200 + seed, Split.TRAIN))
    recipe: dict[str, Any] = {
        "kind": "rl",
        "algorithm": "grpo",
        "run_dir": str(run_dir),
        "seed": seed,
        "model": {"path": str(model), "precision": "float32"},
        "data": {"train": write_rows(folder / f"prompts_{name}_{max_staleness}_{seed}.jsonl", rows)},
        "reward": "exact_match",
        "rollout": {"max_tokens": MAX_TOKENS, "max_staleness": max_staleness},
        "train": {"num_steps": steps, "checkpoint_every": 0},
        "engine": {"max_length": 64, "cache_gb": 0.1},
        "optimizer": {"lr": learning.lr},
        "schedule": {"name": learning.schedule, "warmup_ratio": 0.0},
        "loggers": ["jsonl"],
    }
    if learning.correction is not None and max_staleness > 0:
        recipe["loss"] = {"correction": learning.correction}
    if setting.judged_elsewhere:
        (folder / "judge.py").write_text(JUDGE)
        recipe["reward"] = f"{folder / 'judge.py'}:judge"
    with server(model, folder / f"{run_dir.name}.log", setting.threads) if setting.served else nullcontext() as url:
        if url is not None:
            recipe["engine"] = {"kind": "rollouts", "url": url}
        cost = rollouts("rl", recipe, setting.threads)
    correct = count_correct(run_dir / "final", seed)
    oldest = oldest_token(run_dir / "rollouts.jsonl")
    if oldest > max_staleness:
        raise SystemExit(f"{run_dir}: learned from a token {oldest} steps old, where max_staleness is {max_staleness}")
    run = {"setting": name, "max_staleness": max_staleness, "seed": seed, "steps": steps, "correct": correct}
    return {**run, "oldest": oldest, **loop_seconds(run_dir / "metrics.jsonl"), **cost._asdict()}


def oldest_token(path: Path) -> int:
    """Most steps between the weights that sampled a token and those that learned from it."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return max(row["step"] - 1 - span["version"] for row in rows for span in row["weight_versions"])


def loop_seconds(path: Path) -> dict[str, float]:
    """Seconds of the loop, waiting for samples and learning from them, without its first step, which warms up."""
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]
    phases = [{k.removeprefix("seconds/"): v for k, v in step.items() if k.startswith("seconds/")} for step in steps]
    waiting = sum(phase["generate"] for phase in phases)
    loop = sum(sum(phase.values()) for phase in phases)
    return {"loop": loop, "waiting": waiting, "learning": loop - waiting}


@contextmanager
def server(model: Path, log: Path, threads: int) -> Iterator[str]:
    """`rollouts serve` of a model; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    main = "import sys; from rollouts.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "serve", str(model), "--port", str(port), "--precision", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(child, url, log)
            yield url
        finally:
            child.terminate()
            child.wait()


def wait_until_healthy(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and child.poll() is None:
        try:
            opener.open(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"rollouts serve did not start:\n{log.read_text()[-1500:]}")


# All of them ----------------------------------------------------------------------------------------------------------


def report(before: int, runs: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each setting and knob, its seeds pooled; seconds are medians of seeds."""
    lines = [
        f"Before: {percent(before, HELD_OUT)}% of {HELD_OUT} held-out lists.",
        "",
        "| setting | max_staleness | held-out accuracy, % (95%) | of each seed | oldest token "
        "| loop, s | waiting | learning | faster | no worse |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SETTINGS:
        pairs = {knob: [r for r in runs if (r["setting"], r["max_staleness"]) == (name, knob)] for knob in STALENESS}
        for knob, own in pairs.items():
            if not own:
                continue
            seconds = {key: statistics.median(r[key] for r in own) for key in ("loop", "waiting", "learning")}
            correct = [r["correct"] for r in sorted(own, key=lambda r: r["seed"])]
            each = ", ".join(f"{100 * c / HELD_OUT:.1f}" for c in correct)
            accuracy = f"{percent(sum(correct), HELD_OUT * len(own))} | {each}"
            lines.append(
                f"| {name} | {knob} | {accuracy} "
                f"| {max(r['oldest'] for r in own)} | {seconds['loop']:.1f} | {seconds['waiting']:.1f} "
                f"| {seconds['learning']:.1f} | {compare(pairs, knob)} |"
            )
    return "\n".join(lines)


def compare(pairs: dict[int, list[dict[str, Any]]], knob: int) -> str:
    """How many times faster than synchronous, seed by seed, and whether the intervals of accuracy meet."""
    base = {r["seed"]: r for r in pairs[STALENESS[0]]}
    both = [(base[r["seed"]], r) for r in pairs[knob] if r["seed"] in base]
    if knob == STALENESS[0] or not both:
        return "|"
    ratios = sorted(a["loop"] / b["loop"] for a, b in both)
    number = HELD_OUT * len(both)
    floor = wilson_interval(sum(a["correct"] for a, _ in both), number)[0]
    ceiling = wilson_interval(sum(b["correct"] for _, b in both), number)[1]
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"{spread} | {'yes' if ceiling >= floor else 'no'}"


def untrained(folder: Path) -> Path:
    """A model that knows nothing, to see that everything runs."""
    from rollouts.models.make import ModelConfig, make_model
    from rollouts.models.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

    tokenizer = train_tokenizer([p.question for p in take(200, 0, Split.TRAIN)], MIN_VOCAB_SIZE + 40)
    size = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, head_dim=16, intermediate_size=64)
    for part in (make_model(size, tokenizer, seed=0), tokenizer):
        part.save_pretrained(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--heads", type=int, default=3, help=f"of {HEAD_DIM} channels: the model's width (default: 3)")
    parser.add_argument("--steps", type=int, default=RL_STEPS)
    parser.add_argument("--lr", type=float, default=LEARNING.lr)
    parser.add_argument("--schedule", choices=["linear", "constant"], default=LEARNING.schedule)
    parser.add_argument("--correction", help="loss.correction where max_staleness is above 0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results/rl_staleness"))
    arguments = parser.parse_args(argv)
    folder = (arguments.folder / ("quick" if arguments.quick else f"heads_{arguments.heads}")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    learning = Learning(arguments.lr, arguments.schedule, arguments.correction)
    model, steps, seeds = folder / "sft" / "final", arguments.steps, arguments.seeds
    if arguments.quick:
        model, steps, seeds = untrained(folder / "untrained"), 2, [0]
    elif not model.exists():
        train_sft(folder, threads=2, num_heads=arguments.heads, head_dim=HEAD_DIM)
    start, arms = folder / "start.json", folder / learning.folder
    arms.mkdir(exist_ok=True)
    results = arms / "runs.jsonl"
    if not start.exists():
        start.write_text(json.dumps({"correct": count_correct(model)}))
    runs = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(run["setting"], run["max_staleness"], run["seed"]) for run in runs}
    for seed in seeds:
        for name in arguments.settings:
            for knob in STALENESS:
                if (name, knob, seed) not in done:
                    runs.append(run_arm(arms, model, name, knob, seed, steps, learning))
                    print(json.dumps(runs[-1]), flush=True)
                    with results.open("a") as file:
                        file.write(json.dumps(runs[-1]) + "\n")
    print(report(json.loads(start.read_text())["correct"], runs))


if __name__ == "__main__":
    main()
