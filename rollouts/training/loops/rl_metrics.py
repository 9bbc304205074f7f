"""What a step of rollouts looks like in numbers, and the files and clocks that a training loop keeps of it."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rollouts.training.loops.rl_batches import group_samples, is_learnable
from rollouts.training.metrics import drop_lines_from
from rollouts.training.types import RolloutBatch, Sample, SampleStatus

SOLVED = 0.999  # a reward that counts as a solved task, for pass@k


def describe_rollouts(batch: RolloutBatch, version: int) -> dict[str, float]:
    """Rewards, groups, lengths, staleness and drops of one batch.

    Args:
        version: of the weights that are about to learn; the staleness of a token is this minus its own version.

    Returns:
        ``reward_mean``, ``_std``, ``_min``, ``_max`` over judged samples, ``reward/<name>`` of each named part,
        ``reward_task/<task>`` where samples have ``metadata["task"]``, ``pass@1`` and ``pass@<group size>`` (share of
        groups with a solved sample), counts and shares of what was left out, groups
        ``dropped/<reason>`` and ``requeued/<reason>`` and reward ``faults/<kind>`` since the batch before.
    """
    samples, judged = batch.samples, [s for s in batch.samples if is_learnable(s)]
    groups = group_samples(judged)
    rewards = [_reward(s) for s in judged]
    lengths = [s.num_loss_tokens for s in judged]
    metrics = {
        "samples": len(samples),
        "groups": len(group_samples(samples)),
        "masked_samples": len(samples) - len(judged),
        "singleton_groups": sum(len(g) == 1 for g in groups),
        "zero_variance_groups": _share(len(g) > 1 and len({s.reward for s in g}) == 1 for g in groups),
        "truncated": _share(s.status is SampleStatus.TRUNCATED for s in judged),
        "response_tokens": sum(lengths),
    }
    if judged:
        group_stds = [float(np.std([_reward(s) for s in g], ddof=1)) for g in groups if len(g) > 1]
        solved = [[_reward(s) >= SOLVED for s in g] for g in groups]
        metrics |= {
            "reward_mean": float(np.mean(rewards)),
            "reward_std": float(np.std(rewards)),
            "reward_min": min(rewards),
            "reward_max": max(rewards),
            "group_reward_std": float(np.mean(group_stds)) if group_stds else 0.0,
            "solved_all": _share(all(g) for g in solved),
            "solved_none": _share(not any(g) for g in solved),
            "pass@1": float(np.mean([np.mean(g) for g in solved])),
            f"pass@{max(map(len, groups))}": _share(any(g) for g in solved),
            "response_length_mean": float(np.mean(lengths)),
            "response_length_max": max(lengths),
        }
    parts = ((name, v) for s in judged if len(s.rewards) > 1 for name, v in s.rewards.items())
    metrics |= _means_by("reward", parts)
    tasks = ((str(s.metadata["task"]), s.reward) for s in judged if "task" in s.metadata)
    metrics |= _means_by("reward_task", tasks)
    spans = [(version - w.version, w.end - w.start) for s in judged for w in s.weight_versions if w.end > w.start]
    if spans:
        ages, tokens = zip(*spans)
        metrics |= {"staleness_mean": float(np.average(ages, weights=tokens)), "staleness_max": max(ages)}
    for what in ("dropped", "requeued", "faults"):
        counts: Mapping[str, int] = batch.metadata.get(what, {})
        metrics |= {f"{what}/{reason}": count for reason, count in counts.items()}
    return metrics


class Stopwatch:
    """Seconds spent in each phase of a step, as ``seconds/<phase>``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call, and a fresh start."""
        taken = {f"seconds/{name}": value for name, value in self.seconds.items()}
        self.seconds.clear()
        return taken


class RolloutLog:
    """Appends every consumed sample to ``rollouts.jsonl``: tokens, log-probs, reward, advantages, and its step.

    As in ``metrics.jsonl``, the first step logged by a resumed run takes the place of itself and all after it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def log(self, step: int, samples: Sequence[Sample]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_lines_from(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")
        for sample in samples:
            row = {"step": step, **sample.to_dict()}
            self._file.write(json.dumps(_without_nan(row), allow_nan=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _reward(sample: Sample) -> float:
    assert sample.reward is not None, "only judged samples are counted"
    return float(sample.reward)


def _share(conditions: Any) -> float:
    values = [bool(c) for c in conditions]
    return sum(values) / len(values) if values else 0.0


def _means_by(prefix: str, pairs: Any) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        values[name].append(float(value))
    return {f"{prefix}/{name}": math.fsum(v) / len(v) for name, v in sorted(values.items())}


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value
