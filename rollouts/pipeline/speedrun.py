"""The speedrun from end to end: the stages in order, complete ones skipped, with a line on each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rollouts.pipeline import stages
from rollouts.pipeline.report import write_report
from rollouts.progress import format_duration

STAGE_RECORD = "stage.json"  # written when a stage is complete: its name, seconds and summary


def run_speedrun(run_dir: Path, config: stages.SpeedrunConfig, startup_seconds: float = 0.0) -> dict[str, Any]:
    """Run what is left of the speedrun in ``run_dir`` and write ``report.{json,md,html}``; returns the report.

    A stage whose folder is complete is not run again; a training stage that was interrupted goes on from its last
    checkpoint. The caller sees to it that ``config`` is the one the folder was begun with.

    Args:
        startup_seconds: what the process spent before this call, for the account of where the time went.
    """
    data, tokenizer, base, sft, rl = (run_dir / name for name in ("data", "tokenizer", "base", "sft", "rl"))
    work: dict[str, Callable[[Path], stages.Summary]] = {
        "data": partial(stages.make_data, config),
        "tokenizer": partial(stages.make_tokenizer, config, data),
        "base": partial(stages.train_base, config, data, tokenizer),
        "sft": partial(stages.train_sft, config, data, base),
        "rl": partial(stages.train_rl, config, sft),
        "evaluation": partial(stages.evaluate, config, data, {"base": base, "sft": sft, "rl": rl}),
    }
    records = [{"name": "start-up", "seconds": startup_seconds}]
    for number, (name, make) in enumerate(work.items(), 1):
        records.append(run_stage(f"[{number}/{len(work)}] {name}", name, run_dir / name, make))
    return write_report(run_dir, config, records)


def run_stage(title: str, name: str, folder: Path, make: Callable[[Path], stages.Summary]) -> dict[str, Any]:
    """The record of a stage: that of ``folder`` if it is complete, else ``make(folder)`` is run and recorded there."""
    path = folder / STAGE_RECORD
    if path.is_file():
        print(f"{title}: complete, skipped", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"{title}: {ABOUT[name]}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    summary = make(folder)
    record = {"name": name, "seconds": time.perf_counter() - started, **summary}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"      {describe(record)}", flush=True)
    return record


ABOUT = {
    "data": "making documents, conversations and held-out problems",
    "tokenizer": "training a byte-level BPE tokenizer",
    "base": "pre-training a new model on the documents",
    "sft": "fine-tuning it on the conversations",
    "rl": "letting it learn from its own answers, each graded",
    "evaluation": "asking all three models the held-out problems",
}


def describe(record: dict[str, Any]) -> str:
    """One line of what a stage made and how long it took."""
    match record["name"]:
        case "data":
            text = f"{record['documents']:,} documents, {record['conversations']:,} conversations, "
            text += f"{record['held_out']} held-out problems"
        case "tokenizer":
            text = f"{record['tokens']:,} tokens, {record['characters_per_token']:.2f} characters each"
        case "base" | "sft":
            text = f"{record['parameters']:,} parameters, {record['steps']:,} steps, {record['tokens']:,} tokens, "
            text += f"validation loss {record['val_loss']:.3f}"
        case "rl":
            text = f"{record['steps']:,} steps, {record['samples']:,} answers, {record['reward']:.0%} right at the end"
        case _:
            scores = [f"{name} {accuracy['all']['accuracy']:.1%}" for name, accuracy in record["accuracy"].items()]
            text = f"right answers: {', '.join(scores)}"
    return f"{text} ({format_duration(record['seconds'])})"
