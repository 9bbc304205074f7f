"""What a training run leaves to be read: report.json, and report.md and report.html made from it and the metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.pipeline.charts import curve_chart, facts, page
from rollouts.pipeline.report import curve, describe_machine, describe_software, table, write_texts
from rollouts.recipes.load import to_yaml
from rollouts.training.metrics import compute_stats, read_metrics

if TYPE_CHECKING:
    from rollouts.recipes.schema import Recipe

# Metrics worth a curve, where a run has them: the metric, and what it is in validation.
CURVES = {
    "loss": "val_loss",
    "accuracy": "val_accuracy",
    "reward_mean": "eval_reward",
    "response_length_mean": "",
    "entropy": "",
    "kl_ref": "",
    "mismatch_kl": "",
    "zero_variance_groups": "",
    "grad_norm": "",
    "lr": "",
    "tokens_per_second": "",
}
COLUMNS = ("first", "last", "min", "max", "mean")


def write_run_report(recipe: Recipe, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the three files into the run's folder.

    Args:
        history: the metrics of the steps that this process did, for a run that logs none to ``metrics.jsonl``.

    Returns:
        The report: the run's kind, its steps, statistics of every metric over them, machine and versions.
    """
    folder = Path(recipe.run_dir)
    settings = recipe.model_dump(mode="json")
    rows = read_metrics(folder / "metrics.jsonl") if "jsonl" in settings["loggers"] else list(history)
    report = {
        "kind": recipe.kind,
        **({"algorithm": settings["algorithm"]} if "algorithm" in settings else {}),
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "steps": history[-1]["step"],
        "metrics": compute_stats(rows),
        "machine": describe_machine(),
        "versions": describe_software(),
    }
    texts = {
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.md": render_markdown(folder.name, report),
        "report.html": render_page(folder.name, report, rows, to_yaml(recipe)),
    }
    write_texts(folder, texts)
    return report


def title_of(name: str, report: Mapping[str, Any]) -> str:
    """For example ``first: rl (grpo), 200 steps``."""
    algorithm = f" ({report['algorithm']})" if "algorithm" in report else ""
    return f"{name}: {report['kind']}{algorithm}, {report['steps']:,} steps"


def figures(report: Mapping[str, Any]) -> list[list[str]]:
    """A row of every metric: its name, and its statistics over the steps."""
    return [[name, *(f"{stats[c]:.5g}" for c in COLUMNS)] for name, stats in report["metrics"].items()]


def render_markdown(name: str, report: Mapping[str, Any]) -> str:
    known = [*report["machine"].items(), *report["versions"].items()]
    return "\n".join(
        [
            f"# {title_of(name, report)}",
            "",
            report["created"],
            "",
            *table(["metric", *COLUMNS], figures(report)),
            "",
            *table(["", ""], known),
            "",
        ]
    )


def render_page(name: str, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], settings: str) -> str:
    """Curves, figures and the whole recipe on one page that needs nothing else."""
    color = "rl" if "algorithm" in report else "sft"
    charts = ""
    for metric, validation in CURVES.items():
        curves = {"train": curve(rows, metric), "validation": curve(rows, validation)}
        if curves["train"]:
            charts += f'<div class="card"><h3>{metric}</h3>{curve_chart(color, metric, curves)}</div>'
    heads = "".join(f'<th class="number">{column}</th>' for column in COLUMNS)
    lines = "".join(
        f"<tr><td>{escape(metric)}</td>{''.join(f'<td class=number>{value}</td>' for value in values)}</tr>"
        for metric, *values in figures(report)
    )
    sections = [
        f"<h1>{escape(title_of(name, report))}</h1>",
        f'<p class="soft">{escape(report["created"])}. Faint: each step; line: its running mean; dots: validation.</p>',
        f'<div class="pair">{charts}</div>',
        f'<h2>Every metric</h2>\n<div class="scroll"><table><tr><th>metric</th>{heads}</tr>{lines}</table></div>',
        facts(report["machine"] | report["versions"], settings),
    ]
    return page(f"{name} – rollouts", sections)
