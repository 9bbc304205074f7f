"""What a speedrun leaves to be read: report.json with every figure, and report.md and report.html made from it."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rollouts
from rollouts.pipeline.report_page import MODELS, SCORES_NOTE, render_page
from rollouts.pipeline.tasks import FAMILIES
from rollouts.progress import format_duration
from rollouts.training.metrics import read_metrics

if TYPE_CHECKING:
    from rollouts.pipeline.stages import SpeedrunConfig

Report = dict[str, Any]


def write_report(run_dir: Path, config: SpeedrunConfig, records: Sequence[dict[str, Any]]) -> Report:
    """Collect the stages' records, learning curves, scores and samples; write the three files and return the report."""
    report = {
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seconds": sum(record["seconds"] for record in records),
        "stages": list(records),
        "accuracy": next(record["accuracy"] for record in records if "accuracy" in record),
        "families": {name: family.about for name, family in FAMILIES.items()},
        "curves": {
            "base": curves(run_dir / "base" / "metrics.jsonl", "loss"),
            "sft": curves(run_dir / "sft" / "metrics.jsonl", "loss"),
            "rl": curves(run_dir / "rl" / "metrics.jsonl", "reward_mean"),
        },
        "samples": json.loads((run_dir / "evaluation" / "samples.json").read_text(encoding="utf-8")),
        "machine": describe_machine(),
        "versions": describe_software(),
        "config": asdict(config),
    }
    texts = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_page(report),
    }
    write_texts(run_dir, texts)
    return report


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by name, each whole or not at all."""
    for name, text in texts.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def curves(metrics: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of a metric at every training step, and at every validation."""
    rows = read_metrics(metrics)
    return {"train": curve(rows, name), "validation": curve(rows, f"val_{name}")}


def curve(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric at the steps where it is a number."""
    points = ((row["step"], row.get(name)) for row in rows)
    return [(step, value) for step, value in points if value is not None and math.isfinite(value)]


def describe_software() -> dict[str, str]:
    packages = {package: version(package) for package in ("torch", "transformers", "tokenizers")}
    return {"rollouts": rollouts.__version__, "python": platform.python_version(), **packages}


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory and accelerator of this machine, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine = {
        "processor": processor_name(),
        "cores": f"{cores}, {torch.get_num_threads()} threads used",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return machine


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def render_markdown(report: Report) -> str:
    """The report as Markdown: scores, what each model says, learning, time, machine."""
    accuracy, samples = report["accuracy"], report["samples"]
    scores = [
        [family, *(score_text(accuracy[model][family]) for model in MODELS), accuracy["rl"][family]["number"]]
        for family in accuracy["rl"]
    ]
    said = [
        [reply["family"], reply["prompt"][-1]["content"], reply["answer"], *(reply[m]["greedy"] for m in MODELS)]
        for reply in samples["replies"]
    ]
    continued = [[c["opening"], *(c[m]["greedy"] for m in MODELS)] for c in samples["continuations"]]
    learning = [
        [MODELS[model], what, len(curve["train"]), *(f"{curve['train'][i][1]:.3f}" for i in (0, -1)),
         f"{curve['validation'][-1][1]:.3f}" if curve["validation"] else "–"]
        for (model, curve), what in zip(report["curves"].items(), ("loss", "loss", "reward"))
    ]  # fmt: skip
    times = [[stage["name"], format_duration(stage["seconds"])] for stage in report["stages"]]
    facts = [*report["machine"].items(), *report["versions"].items()]
    return "\n".join(
        [
            f"# Speedrun of {report['created']}",
            "",
            "A tokenizer, a base model, a chat model and one that learned from its own answers, made from nothing in "
            f"{format_duration(report['seconds'])}.",
            "",
            "## Held-out problems: right answers with 95% Wilson intervals",
            "",
            *table(["family", *MODELS.values(), "problems"], scores),
            "",
            SCORES_NOTE,
            "",
            "## What each says (greedy)",
            "",
            *table(["family", "question", "answer", *MODELS.values()], said),
            "",
            *table(["opening", *(f"{label} goes on" for label in MODELS.values())], continued),
            "",
            "## Learning",
            "",
            *table(["model", "", "steps", "first", "last", "validation"], learning),
            "",
            "## Time",
            "",
            *table(["stage", "time"], times),
            "",
            "## Machine and versions",
            "",
            *table(["", ""], facts),
            "",
        ]
    )


def score_text(score: dict[str, float]) -> str:
    return f"{score['accuracy']:.1%} ({score['low']:.1%} to {score['high']:.1%})"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; line breaks become a sign, and what Markdown would read as markup is escaped."""

    def cell(value: object) -> str:
        return re.sub(r"([\\|<*_`])", r"\\\1", re.sub(r"\s*\n\s*", " ⏎ ", str(value).strip()))

    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(map(cell, cells))} |"

    return [line(head), f"|{' --- |' * len(head)}", *map(line, rows)]
