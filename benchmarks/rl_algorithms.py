#!/usr/bin/env python3
"""Every named algorithm from one model that learned a task from careless teachers: does it unlearn their mistake?

    python -m benchmarks.rl_algorithms                          # all of them, three seeds: about 20 minutes, 2 cores
    python -m benchmarks.rl_algorithms --arms grpo --seeds 0    # the model and one run: a few minutes

The task: say a list of letters backwards. In 55% of the demonstrations the last two letters of the answer are swapped,
so a model of 0.25M parameters knows how and is wrong more often than right. Held-out lists never occur in training:
the side on which a list lies is a hash of it. An arm is ``rollouts rl --algorithm NAME``, or ``rollouts dpo`` on pairs
of the first model's own answers; the reward is 1 for the exact answer, else 0. Learning rates and steps are for a model
this small (``run_arm``, ``ARMS``); everything else is the preset's. Accuracy counts answers sampled at temperature 1,
not greedy ones: it moves with the policy's probabilities. Intervals are Wilson's. Every run is a process, and its
seconds include starting Python; sampling the pairs of DPO and evaluation are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rollouts.pipeline.evaluation import wilson_interval
from rollouts.pipeline.world import Split, split_of

LETTERS = "abcdefghjkmnprst"
CARELESS = 0.55
HELD_OUT, DPO_PROMPTS, DPO_SAMPLES = 1000, 1500, 4
MAX_TOKENS = 12


class Problem(NamedTuple):
    letters: str

    @property
    def question(self) -> str:
        return f"Backwards: {' '.join(self.letters)}"

    @property
    def answer(self) -> str:
        return " ".join(reversed(self.letters))

    @property
    def mistake(self) -> str:
        """What the careless teacher says: the last two of the answer swapped."""
        first, second, *rest = self.letters
        return " ".join([*reversed(rest), first, second])


def draw_problems(seed: int, split: Split) -> Iterator[Problem]:
    """Different lists of four to six different letters on one side of the split, without end."""
    rng, seen = random.Random(f"{seed} {split}"), set()
    while True:
        letters = "".join(rng.sample(LETTERS, rng.randint(4, 6)))
        if letters not in seen and split_of("backwards", letters) == split:
            seen.add(letters)
            yield Problem(letters)


def take(number: int, seed: int, split: Split) -> list[Problem]:
    return [problem for problem, _ in zip(draw_problems(seed, split), range(number))]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def demonstration(problem: Problem, reply: str) -> dict[str, Any]:
    return {"messages": [*user(problem), {"role": "assistant", "content": reply}]}


# The commands that users run ------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float


def rollouts(verb: str, recipe: dict[str, Any], threads: int) -> Cost:
    """Run ``rollouts VERB`` on a recipe, in a process of its own."""
    run_dir = Path(recipe["run_dir"])
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "import sys; from rollouts.cli.main import main; sys.exit(main())",
        verb,
        str(path),
    ]
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise SystemExit(f"rollouts {verb} {path} failed:\n{child.stdout[-1500:]}\n{child.stderr[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Cost(time.monotonic() - begin, cpu)


def train_sft(folder: Path, threads: int, careless: float = CARELESS, num_heads: int = 4, head_dim: int = 24) -> Cost:
    """The model that every arm starts from: ``folder/sft/final``."""
    from rollouts.models.tokenizer import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer

    chance = random.Random("careless")
    problems = take(24_000, 0, Split.TRAIN)
    rows = [demonstration(p, p.mistake if chance.random() < careless else p.answer) for p in problems]
    texts = [message["content"] for row in rows[:1000] for message in row["messages"]]
    save_tokenizer(train_tokenizer(texts, MIN_VOCAB_SIZE + 40), folder / "tokenizer")
    recipe = {
        "kind": "sft",
        "run_dir": str(folder / "sft"),
        "model": {
            "init": {
                "hidden_size": num_heads * head_dim,
                "num_layers": 2,
                "num_heads": num_heads,
                "head_dim": head_dim,
                "intermediate_size": num_heads * head_dim * 8 // 3 // 32 * 32,
            },
            "tokenizer": str(folder / "tokenizer"),
            "precision": "float32",
        },
        "data": {"train": write_rows(folder / "demonstrations.jsonl", rows)},
        "train": {"num_steps": 700, "batch_size": 64, "log_every": 100},
        "optimizer": {"name": "muon", "lr": 3e-3},
    }
    return rollouts("sft", recipe, threads)


# Answers --------------------------------------------------------------------------------------------------------------


def sample_answers(model_folder: Path, problems: Sequence[Problem], samples: int = 1, seed: int = 0) -> list[list[str]]:
    """What the model says at temperature 1, ``samples`` times a problem."""
    from rollouts.inference import EmbeddedEngine, SamplingParams
    from rollouts.models import load_hf_model

    model, tokenizer = load_hf_model(model_folder, "cpu", "float32")
    prompts = [tokenizer.apply_chat_template(user(p), add_generation_prompt=True, return_dict=False) for p in problems]
    params = [SamplingParams(max_tokens=MAX_TOKENS, n=samples, seed=1_000_003 * seed + i) for i in range(len(prompts))]
    with EmbeddedEngine(model, tokenizer, max_length=64) as engine:
        completions = engine.generate_batch(prompts, params)
    texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True).strip() for c in completions]
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def count_correct(model_folder: Path, seed: int = 0) -> int:
    """Of ``HELD_OUT`` lists that no training has seen."""
    problems = take(HELD_OUT, 1, Split.HELD_OUT)
    answers = sample_answers(model_folder, problems, seed=seed)
    return sum(answer == p.answer for p, (answer,) in zip(problems, answers, strict=True))


def preference_pairs(model_folder: Path, seed: int) -> list[dict[str, Any]]:
    """One pair from each training problem that the model answers both rightly and wrongly."""
    problems = take(DPO_PROMPTS, 100 + seed, Split.TRAIN)
    pairs = []
    for p, answers in zip(problems, sample_answers(model_folder, problems, DPO_SAMPLES, seed), strict=True):
        wrong = [a for a in answers if a != p.answer]
        if p.answer in answers and wrong:
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (p.answer, wrong[0]))
            pairs.append({"prompt": user(p), "chosen": chosen, "rejected": rejected})
    return pairs


# The arms -------------------------------------------------------------------------------------------------------------

ARMS: dict[str, dict[str, Any]] = {
    "ppo": {"critic": {"lr": 3e-3}},
    "ppo_shared": {"algorithm": "ppo", "critic": {"shared": True, "lr": 3e-3}},
    "grpo": {},
    "dr_grpo": {},
    "dapo": {"train": {"num_steps": 15}},  # its filter asks for ever more prompts where most are solved
    "rloo": {},
    "reinforce_plus_plus": {},
    "remax": {},
    "prime": {"process_reward": {"lr": 1e-4}, "train": {"num_steps": 15}},
    "gspo": {},
    "cispo": {},
    "dpo": {},
}
RL_STEPS = 40


def run_arm(folder: Path, arm: str, seed: int, threads: int) -> dict[str, Any]:
    """Train one arm; its steps, held-out correct answers and cost."""
    run_dir = folder / f"{arm}_{seed}"
    recipe: dict[str, Any] = {
        "run_dir": str(run_dir),
        "seed": seed,
        "model": {"path": str(folder / "sft" / "final"), "precision": "float32"},
        "optimizer": {"lr": 1e-3},
        "loggers": ["jsonl"],
    }
    if arm == "dpo":
        pairs = preference_pairs(folder / "sft" / "final", seed)
        train = {"num_steps": 80, "batch_size": 32}
        data = {"train": write_rows(folder / f"pairs_{seed}.jsonl", pairs)}
        recipe |= {"kind": "dpo", "data": data, "train": train, "optimizer": {"lr": 3e-4}}
    else:
        problems = take(16_000, 200 + seed, Split.TRAIN)
        rows = ({"prompt": user(p), "answer": p.answer} for p in problems)
        rollout = {"max_tokens": MAX_TOKENS, **ARMS[arm].get("rollout", {})}
        train = {"num_steps": RL_STEPS, "checkpoint_every": 0, **ARMS[arm].get("train", {})}
        recipe |= {
            "kind": "rl",
            "algorithm": arm,
            "data": {"train": write_rows(folder / f"prompts_{arm}_{seed}.jsonl", rows)},
            "reward": "exact_match",
            **ARMS[arm],
            "rollout": rollout,
            "train": train,
            "engine": {"max_length": 64, "cache_gb": 0.1},
        }
    cost = rollouts(recipe["kind"], recipe, threads)
    correct = count_correct(run_dir / "final", seed)
    return {"arm": arm, "seed": seed, "steps": train["num_steps"], "correct": correct, **cost._asdict()}


def percent(correct: int, number: int) -> str:
    low, high = wilson_interval(correct, number)
    return f"{100 * correct / number:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def report(before: int, runs: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each arm: its seeds pooled, and the lowest of them."""
    lines = [
        f"Before: {percent(before, HELD_OUT)}% of {HELD_OUT} held-out lists.",
        "",
        "| algorithm | steps | held-out accuracy, % (95%) | lowest seed | seeds up (95%) | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    ceiling = wilson_interval(before, HELD_OUT)[1]
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        if own:
            correct = [run["correct"] for run in own]
            up = sum(wilson_interval(c, HELD_OUT)[0] > ceiling for c in correct)  # intervals apart: stricter than 95%
            mean = {key: sum(run[key] for run in own) / len(own) for key in ("steps", "seconds", "cpu_seconds")}
            lines.append(
                f"| {arm} | {mean['steps']:.0f} | {percent(sum(correct), HELD_OUT * len(own))} "
                f"| {100 * min(correct) / HELD_OUT:.1f} | {up} of {len(own)} "
                f"| {mean['seconds']:.0f} | {mean['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results/rl_algorithms"))
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    start, results = folder / "start.json", folder / "runs.jsonl"
    if not start.exists():
        cost = train_sft(folder, arguments.threads)
        start.write_text(json.dumps({"correct": count_correct(folder / "sft" / "final"), **cost._asdict()}))
    begun = json.loads(start.read_text())
    print(f"start: {percent(begun['correct'], HELD_OUT)}%, {begun['seconds']:.0f} s", flush=True)

    def read_runs() -> list[dict[str, Any]]:
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    done = {(run["arm"], run["seed"]) for run in read_runs()}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if (arm, seed) not in done:
                run = run_arm(folder, arm, seed, arguments.threads)
                print(json.dumps(run), flush=True)
                with results.open("a") as file:
                    file.write(json.dumps(run) + "\n")
    print(report(begun["correct"], read_runs()))


if __name__ == "__main__":
    main()
