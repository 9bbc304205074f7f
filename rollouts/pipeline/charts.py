"""Pages that are whole by themselves, with curves as SVG: no script, no outside resource, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Points = Sequence[Sequence[float]]

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


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML document of sections that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def curve_chart(name: str, what: str, curves: Mapping[str, Points]) -> str:
    """An SVG of a quantity over the steps of training and, as dots, in validation; ``name`` is its color's.

    Args:
        curves: points (step, value) under ``train``, at least one, and ``validation``.
    """
    train, validation = curves["train"], curves["validation"]
    width, height, left, bottom, top = 440, 240, 46, 26, 8
    last_step = max(int(train[-1][0]), 2)
    running = running_mean(train, 0.95)
    steps = sorted(y for _, y in train)
    usual = steps[len(steps) // 40 : len(steps) - len(steps) // 40]  # what sticks out of a long run does not flatten it
    values = [*usual, *(y for _, y in [*running, *validation])]
    high, low = max(*values, 0.0), min(*values, 0.0)
    high = high if high > low else 1.0
    tick = nice_step((high - low) / 4)
    high, low = math.ceil(high / tick) * tick, math.floor(low / tick) * tick

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - 1) / (last_step - 1), (min(max(y, low), high) - low) / (high - low)
        return left + across * (width - left - 8), top + (1 - up) * (height - top - bottom)

    def path(points: Points) -> str:
        every = max(1, len(points) // 400)
        return "M" + "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in points[::every])

    grid = ""
    for i in range(round(low / tick), round(high / tick) + 1):
        _, y = place(1, i * tick)
        grid += f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        grid += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{i * tick:g}</text>'
    step_tick = max(1, int(nice_step(last_step / 5)))
    for x in range(step_tick, last_step + 1, step_tick):
        grid += f'<text x="{place(x, 0)[0]:.1f}" y="{height - 8}" text-anchor="middle">{x}</text>'
    dots = ""
    for step, value in validation:
        across, down = place(step, value)
        title = f"<title>step {step}: {value:.4g}</title>"
        dots += f'<circle class="fill-{name} dot" cx="{across:.1f}" cy="{down:.1f}" r="4.5">{title}</circle>'
    lines = (
        f'<path class="raw stroke-{name}" d="{path(train)}"/><path class="curve stroke-{name}" d="{path(running)}"/>'
    )
    final = f"validation {what} {validation[-1][1]:.4g}" if validation else f"{what} {running[-1][1]:.4g} on average"
    final += f" after {last_step:,} steps"
    label = f"{what} from {train[0][1]:.4g} to {train[-1][1]:.4g}; {final}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(label)}">'
        f'{grid}{lines}{dots}</svg><div class="small soft">{escape(final)}</div>'
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


def facts(pairs: Mapping[str, str], settings: str) -> str:
    """Machine, versions, and the settings in full."""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in pairs.items())
    return (
        f'<h2>Machine and versions</h2>\n<div class="scroll"><table>{rows}</table></div>\n'
        f"<details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"
    )
