"""What a speedrun leaves to be read: report.json with every figure, and report.md and report.html made from it."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import rollouts
from rollouts.pipeline.report_page import SCORES_NOTE, render_page
from rollouts.pipeline.stages import SpeedrunConfig
from rollouts.pipeline.tasks import FAMILIES
from rollouts.progress import format_duration
from rollouts.training.metrics import read_metrics

Report = dict[str, Any]


def write_report(run_dir: Path, config: SpeedrunConfig, records: Sequence[dict[str, Any]]) -> Report:
    """Collect the stages' records, loss curves, scores and samples; write the three files and return the report."""
    report = {
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seconds": sum(record["seconds"] for record in records),
        "stages": list(records),
        "accuracy": next(record["accuracy"] for record in records if "accuracy" in record),
        "families": {name: family.about for name, family in FAMILIES.items()},
        "losses": {name: loss_curves(run_dir / name / "metrics.jsonl") for name in ("base", "sft")},
        "samples": json.loads((run_dir / "evaluation" / "samples.json").read_text(encoding="utf-8")),
        "machine": describe_machine(),
        "versions": {
            "rollouts": rollouts.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "tokenizers")},
        },
        "config": asdict(config),
    }
    texts = {
        "report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_page(report),
    }
    for name, text in texts.items():
        temporary = run_dir / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(run_dir / name)
    return report


def loss_curves(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of every training step, and of every validation."""
    rows = read_metrics(metrics)
    return {
        "train": [(row["step"], row["loss"]) for row in rows],
        "validation": [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None],
    }


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
    """The report as Markdown: scores, what each model says, losses, time, machine."""
    accuracy, losses, samples = report["accuracy"], report["losses"], report["samples"]
    scores = [
        [family, *(score_text(accuracy[model][family]) for model in ("base", "sft")), accuracy["sft"][family]["number"]]
        for family in accuracy["sft"]
    ]
    said = [
        [
            reply["family"],
            reply["prompt"][-1]["content"],
            reply["answer"],
            *(reply[m]["greedy"] for m in ("base", "sft")),
        ]
        for reply in samples["replies"]
    ]
    continued = [[c["opening"], c["base"]["greedy"], c["sft"]["greedy"]] for c in samples["continuations"]]
    curves = [
        [model, len(curve["train"]), f"{curve['train'][0][1]:.3f}", f"{curve['train'][-1][1]:.3f}",
         f"{curve['validation'][-1][1]:.3f}"]
        for model, curve in losses.items()
    ]  # fmt: skip
    times = [[stage["name"], format_duration(stage["seconds"])] for stage in report["stages"]]
    facts = [*report["machine"].items(), *report["versions"].items()]
    return "\n".join(
        [
            f"# Speedrun of {report['created']}",
            "",
            f"A tokenizer, a base model and a chat model, made from nothing in {format_duration(report['seconds'])}.",
            "",
            "## Held-out problems: right answers with 95% Wilson intervals",
            "",
            *table(["family", "BASE", "SFT", "problems"], scores),
            "",
            SCORES_NOTE,
            "",
            "## What each says (greedy)",
            "",
            *table(["family", "question", "answer", "BASE", "SFT"], said),
            "",
            *table(["opening", "BASE goes on", "SFT goes on"], continued),
            "",
            "## Losses",
            "",
            *table(["model", "steps", "first", "last", "validation"], curves),
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
