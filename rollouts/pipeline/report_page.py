"""The speedrun's report as one self-contained HTML page: no script, no outside resource, light and dark."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from rollouts.progress import format_duration

Points = Sequence[Sequence[float]]

MODELS = {"base": "BASE", "sft": "SFT", "rl": "RL"}

SCORES_NOTE = (
    "Greedy replies in chat format, graded exactly. No held-out problem occurs in training, in any wording: a hash of "
    "its operands decides on which side it lies. The base model has only read documents and has never seen a chat, so "
    "it is near 0% whatever it knows; what it knows shows where it continues a text."
)

STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #1c2026; --soft: #646c78; --line: #e4e6e9;
  --base: #87909f; --sft: #2563c9; --rl: #b35c00; --good: #18794e; --bad: #b4372f; --shade: #f2f3f5; }
@media (prefers-color-scheme: dark) { :root { --page: #131519; --card: #1a1d23; --ink: #e4e7eb; --soft: #9aa3b0;
  --line: #2d323a; --base: #8a94a4; --sft: #6ea4ff; --rl: #f0a04b; --good: #5bc992; --bad: #f0867d;
  --shade: #22262d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .5rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: .4rem 0 1rem; max-width: 46rem; }
.soft { color: var(--soft); font-weight: 400; } .small { font-size: .85rem; }
pre, .said { font: .82rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.3; letter-spacing: -.02em; }
.tile > span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .85rem; }
th, td { padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.all td { font-weight: 600; border-bottom: 2px solid var(--line); }
td > .small { display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .75rem; }
.card { margin-bottom: .75rem; min-width: 0; } .pair > * { min-width: 0; }
.turn { display: grid; grid-template-columns: 5rem 1fr; margin: .2rem 0; }
.turn > span { color: var(--soft); font-size: .8rem; padding-top: .15rem; }
.said { background: var(--shade); border-radius: .4rem; padding: .45rem .6rem; margin: .3rem 0; white-space: pre-wrap;
  overflow: auto; overflow-wrap: anywhere; max-height: 9rem; }
.said em { font-style: normal; color: var(--soft); }
.label { font-size: .75rem; font-weight: 600; letter-spacing: .04em; margin-top: .6rem; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 600; }
.base { color: var(--base); } .sft { color: var(--sft); } .rl { color: var(--rl); }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.raw { fill: none; stroke-width: 1; opacity: .3; }
.stroke-base { stroke: var(--base); } .stroke-sft { stroke: var(--sft); } .stroke-rl { stroke: var(--rl); }
.fill-base { fill: var(--base); } .fill-sft { fill: var(--sft); } .fill-rl { fill: var(--rl); }
.fill-other { fill: var(--line); }
.dot { stroke: var(--card); stroke-width: 1.5; }
pre { background: var(--shade); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); margin: .8rem 0; }
"""


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
        facts(report),
        NEXT,
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>rollouts speedrun</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


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


def curve_chart(name: str, what: str, curves: dict[str, Points]) -> str:
    """An SVG of a quantity over the steps of training and, as dots, in validation."""
    train, validation = curves["train"], curves["validation"]
    width, height, left, bottom, top = 440, 240, 38, 26, 8
    last_step = max(int(train[-1][0]), 2)
    running = running_mean(train, 0.95)
    high = max([y for _, y in [*running, *validation]] + [1e-6])
    tick = nice_step(high / 4)
    high = math.ceil(high / tick) * tick

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - 1) / (last_step - 1)
        return left + across * (width - left - 8), top + (1 - min(y, high) / high) * (height - top - bottom)

    def path(points: Points) -> str:
        every = max(1, len(points) // 400)
        return "M" + "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in points[::every])

    grid = ""
    for i in range(round(high / tick) + 1):
        _, y = place(1, i * tick)
        grid += f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        grid += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{i * tick:g}</text>'
    step_tick = max(1, int(nice_step(last_step / 5)))
    for x in range(step_tick, last_step + 1, step_tick):
        grid += f'<text x="{place(x, 0)[0]:.1f}" y="{height - 8}" text-anchor="middle">{x}</text>'
    dots = ""
    for step, value in validation:
        across, down = place(step, value)
        title = f"<title>step {step}: {value:.3f}</title>"
        dots += f'<circle class="fill-{name} dot" cx="{across:.1f}" cy="{down:.1f}" r="4.5">{title}</circle>'
    lines = (
        f'<path class="raw stroke-{name}" d="{path(train)}"/><path class="curve stroke-{name}" d="{path(running)}"/>'
    )
    final = f"validation {what} {validation[-1][1]:.3f}" if validation else f"{what} {running[-1][1]:.3f} on average"
    final += f" after {last_step:,} steps"
    label = f"{what} from {train[0][1]:.2f} to {train[-1][1]:.2f}; {final}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}">{grid}{lines}{dots}</svg>'
        f'<div class="small soft">{final}</div>'
    )


def running_mean(points: Points, keep: float) -> list[tuple[float, float]]:
    """Exponential running mean, corrected for its start, so that the first point is the first value."""
    mean, weight, smooth = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append((x, mean / weight))
    return smooth


def nice_step(rough: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that does not exceed ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return max(m * power for m in (1, 2, 5) if m * power <= rough * (1 + 1e-9))


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


def facts(report: dict[str, Any]) -> str:
    """Machine, versions, and the settings in full."""
    pairs = {**report["machine"], **report["versions"]}
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in pairs.items())
    config = escape(json.dumps(report["config"], indent=1))
    return (
        f'<h2>Machine and versions</h2>\n<div class="scroll"><table>{rows}</table></div>\n'
        f"<details><summary>Settings</summary><pre>{config}</pre></details>"
    )
