"""The speedrun's report as one self-contained HTML page."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from rollouts.pipeline.charts import curve_chart, facts, page
from rollouts.progress import format_duration

MODELS = {"base": "BASE", "sft": "SFT", "rl": "RL"}

SCORES_NOTE = (
    "Greedy replies in chat format, graded exactly. No held-out problem occurs in training, in any wording: a hash of "
    "its operands decides on which side it lies. The base model has only read documents and has never seen a chat, so "
    "it is near 0% whatever it knows; what it knows shows where it continues a text."
)


def render_page(report: dict[str, Any]) -> str:
    """The whole page. Everything that a model or a machine said is escaped."""
    took = format_duration(report["seconds"])
    cores = report["machine"]["cores"].partition(",")[0]
    where = report["machine"].get("accelerator") or f"{cores} CPU core{'s' if cores != '1' else ''}"
    sections = [
        f"<h1>From nothing to a chat model in {escape(took)}</h1>",
        f'<p class="soft">A tokenizer, a base model, a fine-tuned model and one that learned from its own answers, '
        f"trained on {escape(where)} with text that was made on the spot. {escape(report['created'])}.</p>",
        tiles(report),
        scores(report),
        learning(report),
        replies(report),
        continuations(report),
        times(report),
        facts(report["machine"] | report["versions"], json.dumps(report["config"], indent=1)),
        NEXT,
    ]
    return page("rollouts speedrun", sections)


NEXT = """<h2>What to try next</h2>
<pre>rollouts chat runs/speedrun/rl                                # talk to it in the terminal
rollouts serve runs/speedrun/base runs/speedrun/rl            # or in the browser, side by side
rollouts speedrun --seed 1 --run_dir runs/seed1               # how much of this is luck?
rollouts speedrun --rl.num_steps 1000 --run_dir runs/long     # more of its own answers
rollouts export runs/speedrun/rl OUT --dtype bfloat16         # for transformers, vLLM, SGLang</pre>"""


def tiles(report: dict[str, Any]) -> str:
    """The figures to remember."""
    reached = " → ".join(
        f'<span class="{model}">{report["accuracy"][model]["all"]["accuracy"]:.0%}</span>' for model in MODELS
    )
    stages = {stage["name"]: stage for stage in report["stages"]}
    figures = [
        (reached, "of held-out problems right"),
        (f"{stages['sft']['parameters'] / 1e6:.2f}M", "parameters"),
        (f"{(stages['base']['tokens'] + stages['sft']['tokens']) / 1e6:.2f}M", "tokens read"),
        (f"{stages['rl']['samples']:,}", "answers of its own"),
        (format_duration(report["seconds"]), "in all"),
    ]
    cells = "".join(f'<div class="tile"><b>{figure}</b><span>{what}</span></div>' for figure, what in figures)
    return f'<div class="tiles">{cells}</div>'


def scores(report: dict[str, Any]) -> str:
    """The table of accuracies with their intervals, in figures and drawn."""
    accuracy = report["accuracy"]
    rows = []
    for family, last in accuracy["rl"].items():
        found = {model: accuracy[model][family] for model in MODELS}
        cells = "".join(
            f'<td class="number">{score["accuracy"]:.1%}'
            f'<span class="soft small">{score["low"]:.0%}–{score["high"]:.0%}</span></td>'
            for score in found.values()
        )
        rows.append(
            f"<tr{' class=all' if family == 'all' else ''}><td>{escape(family)}"
            f'<span class="soft small">{escape(report["families"].get(family, ""))}</span></td>{cells}'
            f'<td>{interval_plot(found)}</td><td class="number soft">{last["number"]}</td></tr>'
        )
    heads = "".join(f'<th class="number">{label}</th>' for label in MODELS.values())
    return (
        f"<h2>What changed</h2>\n<p>{SCORES_NOTE} Below each figure, and as a bar, its 95% Wilson interval.</p>\n"
        f'<div class="scroll"><table><tr><th>family</th>{heads}<th>0 – 100%</th><th class="number">problems</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def interval_plot(scores: dict[str, dict[str, float]]) -> str:
    """Each model's accuracy as a dot on a line from 0 to 100%, with its interval as a bar."""
    marks, height = "", 14 * len(scores) + 6
    for i, (name, s) in enumerate(scores.items()):
        y = 10 + 14 * i
        marks += (
            f'<rect class="fill-{name}" opacity=".3" x="{5 + 2 * 100 * s["low"]:.1f}" y="{y - 4}" rx="2" '
            f'width="{max(200 * (s["high"] - s["low"]), 1):.1f}" height="8"/>'
            f'<circle class="fill-{name} dot" cx="{5 + 200 * s["accuracy"]:.1f}" cy="{y}" r="5"/>'
        )
    label = ", ".join(f"{MODELS[name]} {s['accuracy']:.0%}" for name, s in scores.items())
    grid = "".join(f'<line class="axis" x1="{x}" x2="{x}" y1="2" y2="{height - 2}"/>' for x in (5, 55, 105, 155, 205))
    box = f'width="210" height="{height}" viewBox="0 0 210 {height}"'
    return f'<svg {box} role="img" aria-label="{label}">{grid}{marks}</svg>'


def learning(report: dict[str, Any]) -> str:
    """The curves side by side: losses, and the reward of what RL learned from."""
    curves = report["curves"]
    cards = (
        ("base", "BASE: pre-training on documents", curve_chart("base", "loss", curves["base"])),
        ("sft", "SFT: fine-tuning on conversations", curve_chart("sft", "loss", curves["sft"])),
        ("rl", "RL: learning from its own answers", curve_chart("rl", "reward", curves["rl"])),
    )
    charts = "".join(f'<div class="card"><h3 class="{name}">{title}</h3>{chart}</div>' for name, title, chart in cards)
    return (
        "<h2>Learning</h2>\n<p>Loss per learned token by step: training (faint, with its running mean) and validation "
        "(dots) on texts full of held-out problems. Reward: the share of right answers among those sampled in a step."
        f'</p>\n<div class="pair">{charts}</div>'
    )


def replies(report: dict[str, Any]) -> str:
    """One held-out problem a family: what was asked and what each model says, greedy and sampled."""
    cards = []
    for reply in report["samples"]["replies"]:
        turns = "".join(
            f'<div class="turn"><span>{escape(message["role"])}</span><div>{escape(message["content"])}</div></div>'
            for message in reply["prompt"]
        )
        boxes = {
            model: [f"{MARKS[reply['correct'][model][way]]} {shown(text)}" for way, text in reply[model].items()]
            for model in MODELS
        }
        title = f'{escape(reply["family"])} <span class="soft small">right is: {escape(reply["answer"])}</span>'
        cards.append(f'<div class="card"><h3>{title}</h3>{turns}{side_by_side(boxes)}</div>')
    temperature = report["samples"]["temperature"]
    return (
        "<h2>Side by side</h2>\n<p>The first held-out problem of each family, answered by each model. "
        f"Above: greedy; below: sampled at temperature {temperature:g}.</p>\n{''.join(cards)}"
    )


def continuations(report: dict[str, Any]) -> str:
    """How each model goes on from the opening of a document."""
    cards = []
    for sample in report["samples"]["continuations"]:
        opening = f"<em>{escape(sample['opening'])}</em>"
        boxes = {model: [opening + escape(text.rstrip()) for text in sample[model].values()] for model in MODELS}
        cards.append(f'<div class="card">{side_by_side(boxes)}</div>')
    return (
        "<h2>Continuing a text</h2>\n<p>The base model writes on in the manner of its documents; fine-tuning on short "
        f"replies changes that, too. Above: greedy; below: sampled.</p>\n{''.join(cards)}"
    )


MARKS = {
    True: '<span class="right" title="right">✓</span>',
    False: '<span class="wrong" title="wrong">✗</span>',
}


def shown(text: str) -> str:
    """A model's text, escaped; runs of blank lines become one."""
    return escape(re.sub(r"\n\s*\n", "\n", text.strip())) or "<em>(nothing)</em>"


def side_by_side(boxes: dict[str, list[str]]) -> str:
    """Each model's boxes of HTML under its name, in columns where there is room."""
    columns = (
        f'<div><div class="label {model}">{label}</div>'
        + "".join(f'<div class="said">{box}</div>' for box in boxes[model])
        + "</div>"
        for model, label in MODELS.items()
    )
    return f'<div class="pair">{"".join(columns)}</div>'


def times(report: dict[str, Any]) -> str:
    """Seconds of each stage, in figures and as bars."""
    rows = []
    for stage in report["stages"]:
        color = stage["name"] if stage["name"] in MODELS else "other"
        share = 100 * stage["seconds"] / report["seconds"]
        bar = (
            f'<svg width="100%" height="14"><rect class="fill-{color}" width="{share:.2f}%" height="14" rx="2"/></svg>'
        )
        rows.append(
            f'<tr><td>{escape(stage["name"])}</td><td class="number">{stage["seconds"]:.1f} s</td>'
            f'<td style="width:65%">{bar}</td></tr>'
        )
    return f'<h2>Where the time went</h2>\n<div class="scroll"><table>{"".join(rows)}</table></div>'
