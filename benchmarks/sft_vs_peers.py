"""Supervised training throughput of rollouts against TRL's SFTTrainer and a bare transformers loop, side by side.

Every measurement is a process of its own, so that its peak memory is its own. A round runs every arm once, one after
the other; the next round starts elsewhere in the list, so that a machine whose speed drifts favors nobody. After the
first round the peers that are far from the best of their family drop out.

    python -m benchmarks.sft_vs_peers                                    # everything: some hours on 2 cores
    python -m benchmarks.sft_vs_peers --shapes A --sequences 256 --rounds 1 --steps 5      # a glance
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.workload import ROWS, SHAPES, StepClock, Workload, peak_memory_mb

# family:way[:option...], see the arms_*.py modules. TRL: packing, then precision.
ARMS = [
    "rollouts:bf16",
    "rollouts:bf16:compile",
    "rollouts:fp32",
    "trl:wrapped:autocast",
    "trl:wrapped:bf16",
    "trl:wrapped:fp32",
    "trl:wrapped:autocast:compile",
    "trl:wrapped:bf16:compile",
    "trl:wrapped:fp32:compile",
    "trl:padded:autocast",
    "trl:padded:bf16",
    "trl:padded:fp32",
    "trl:grouped:autocast",
    "trl:grouped:bf16",
    "trl:grouped:fp32",
    "trl:bfd:autocast",
    "trl:bfd:fp32",
    "trl:bfd_split:autocast",
    "trl:padding_free:autocast",
    "bare:autocast",
    "bare:bf16",
    "bare:fp32",
    "bare:autocast:compile",
    "bare:bf16:compile",
    "bare:fp32:compile",
]
DEFAULT_STEPS = {"A": 20, "B": 10, "C": 4}
STAYS = 0.75  # of the best rate of its family after the first round; a slower peer is not measured again

Result = dict[str, Any]


def main() -> None:
    args = parse_arguments()
    if args.measure is not None:
        return measure(args.measure, args.output)
    arms = [arm for arm in ARMS if any(fnmatch.fnmatch(arm, pattern) for pattern in args.arms)]
    arms += [pattern for pattern in args.arms if "*" not in pattern and pattern not in ARMS]
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    report: Result = {"machine": describe_machine(args), "peak": measure_matrix_peak(), "workloads": []}
    name = time.strftime("sft_vs_peers-%Y%m%d-%H%M%S")
    args.output.mkdir(parents=True, exist_ok=True)
    for sequence in args.sequences:
        for shape in args.shapes:
            workload = Workload(shape, sequence, args.completion_only)
            steps = args.steps or DEFAULT_STEPS[shape]
            results = run_rounds(arms, workload, args.rounds, args.warmup, steps, args.time_limit, args.clock)
            report["workloads"].append({"workload": asdict(workload), "results": results})
            text = render(report)
            (args.output / f"{name}.json").write_text(json.dumps(report, indent=1))
            (args.output / f"{name}.md").write_text(text)
    print(text)
    print(f"written to {args.output / name}.md and .json", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sequences", nargs="+", type=int, choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN", help="e.g. 'rollouts:*' 'trl:wrapped:*'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps of each measurement")
    parser.add_argument("--steps", type=int, help=f"timed steps of each measurement (default: {DEFAULT_STEPS})")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock",
        choices=["seconds", "cpu_seconds"],
        default="seconds",
        help="cpu_seconds with --threads 1 compares arms even while other processes hold the cores",
    )
    parser.add_argument("--completion-only", action="store_true", help="the first half of each sample carries no loss")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds after which a measurement is given up")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)  # one arm, in the process of its own
    return parser.parse_args()


# One measurement ------------------------------------------------------------------------------------------------------


def measure(task: Result, output: Path) -> None:
    """In the child: run one arm, write its result as JSON to ``output``."""
    family, *options = task["arm"].split(":")
    clock = StepClock(task["warmup"], task["steps"])
    importlib.import_module(f"benchmarks.arms_{family}").run(Workload(**task["workload"]), clock, *options)
    result = {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "tokens": clock.tokens,
        "peak_mb": peak_memory_mb(),
        "imports_mb": clock.imports_mb,
    }
    output.write_text(json.dumps(result))


def measure_in_child(arm: str, workload: Workload, warmup: int, steps: int, time_limit: float) -> Result:
    """The arm's result, or ``{"error": ...}``.

    This process stays small, without torch: Linux starts a child's peak memory from its parent's size.
    """
    task = json.dumps({"arm": arm, "workload": asdict(workload), "warmup": warmup, "steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.sft_vs_peers", "--measure", task, "--output", str(output)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=time_limit)
        except subprocess.TimeoutExpired:
            return {"arm": arm, "error": f"not done in {time_limit:.0f} s"}
        if child.returncode != 0 or not output.exists():
            lines = [line for line in child.stderr.splitlines() if line.strip()]
            return {"arm": arm, "error": lines[-1] if lines else f"exit code {child.returncode}"}
        return {"arm": arm, **json.loads(output.read_text())}


def run_rounds(
    arms: list[str], workload: Workload, rounds: int, warmup: int, steps: int, time_limit: float, clock: str
) -> list[list[Result]]:
    """``results[round]`` in the order measured."""
    results: list[list[Result]] = []
    for number in range(rounds):
        start = number * len(arms) // rounds
        measured = []
        for arm in arms[start:] + arms[:start]:
            result = measure_in_child(arm, workload, warmup, steps, time_limit)
            measured.append(result)
            told = result.get("error") or f"{rate(result, clock):,.0f} tokens/s, {result['peak_mb']:,.0f} MB"
            print(f"{workload.shape} {workload.sequence} round {number + 1}: {arm}: {told}", file=sys.stderr)
        results.append(measured)
        if number == 0:
            arms = contenders(arms, measured, clock)
    return results


def contenders(arms: list[str], measured: list[Result], clock: str) -> list[str]:
    """Every arm of ours that ran, and of each other family those near its best: in speed, or in isolating samples."""
    rates = {result["arm"]: rate(result, clock) for result in measured if "error" not in result}

    def stays(arm: str) -> bool:
        rivals = [a for a in rates if family(a) == family(arm)]
        return arm in rates and (family(arm) == "rollouts" or rates[arm] >= STAYS * max(rates[a] for a in rivals))

    best_isolated = max((a for a in rates if family(a) == "trl" and isolates(a)), key=rates.__getitem__, default=None)
    return [arm for arm in arms if stays(arm) or arm == best_isolated]


def family(arm: str) -> str:
    return arm.split(":")[0]


def isolates(arm: str) -> bool:
    """Whether a sample never sees its neighbors in a packed row."""
    return family(arm) != "bare" and "wrapped" not in arm


def rate(result: Result, clock: str) -> float:
    """Tokens per second of ``clock``: the median over steps, which others' bursts on a shared machine move least."""
    return statistics.median(t / s for t, s in zip(result["tokens"], result[clock], strict=True))


# The report -----------------------------------------------------------------------------------------------------------


def describe_machine(args: argparse.Namespace) -> Result:
    from importlib.metadata import version

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "clock": args.clock,
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }


def measure_matrix_peak() -> dict[str, float]:
    """Operations per second by precision."""
    command = [sys.executable, "-m", "benchmarks.matrix_peak"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def render(report: Result) -> str:
    machine, peak = report["machine"], report["peak"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        "# Supervised training, side by side",
        "",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, load {machine['load_before']:.1f} before "
        f"the run; {versions}; rates by `{machine['clock']}`. Measured matrix product: "
        f"{peak['fp32'] / 1e9:,.0f} GFLOP/s in float32, {peak['bf16'] / 1e9:,.0f} in bfloat16.",
        "",
        "Tokens/s counts tokens that carry information (padding excluded): the median over rounds, with their range. "
        "`x TRL` is the median over rounds of the ratio to TRL's fastest arm. GFLOP/s and utilization count 6 "
        "operations a parameter and token and isolated causal attention, against the matrix product in the arm's own "
        "precision. Busy is CPU time over wall time and threads: well below 100% means that others held the cores. "
        "Peak MB is the whole process, imports (in brackets) included.",
    ]
    for entry in report["workloads"]:
        lines += ["", *render_workload(Workload(**entry["workload"]), entry["results"], peak, machine)]
    return "\n".join(lines) + "\n"


def render_workload(
    workload: Workload, rounds: list[list[Result]], peak: dict[str, float], machine: Result
) -> Iterable[str]:
    clock = machine["clock"]
    good = [{r["arm"]: r for r in measured if "error" not in r} for measured in rounds]
    rates = {arm: [rate(r[arm], clock) for r in good if arm in r] for arm in good[0]}
    # An arm that dropped out after the first round is not a candidate for the best: its one figure is noisier.
    finalists = [arm for arm in rates if len(rates[arm]) == len(rounds)]
    best_trl = max(
        (a for a in finalists if family(a) == "trl"), key=lambda a: statistics.median(rates[a]), default=None
    )
    shape = workload.model_shape
    samples = [len(sample) for sample in workload.samples(20)]
    flops_per_token = shape.training_flops(samples) / sum(samples)
    learned = "the second half of each sample learns" if workload.completion_only else "every token learns"
    yield f"## {workload.shape}: {shape.num_parameters / 1e6:.2f}M parameters, {workload.sequence} x {workload.rows}"
    yield ""
    yield (
        f"hidden {shape.hidden_size}, {shape.num_layers} layers, vocabulary {shape.vocab_size:,}; samples of "
        f"{min(samples)} to {max(samples)} tokens, mean {statistics.mean(samples):.0f}; {learned}."
    )
    yield ""
    yield "| arm | isolated | tokens/s | range | x TRL | GFLOP/s | utilization | busy | peak MB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for arm in sorted(rates, key=lambda a: -statistics.median(rates[a])):
        speed = statistics.median(rates[arm])
        ratios = [rate(r[arm], clock) / rate(r[best_trl], clock) for r in good if best_trl and arm in r]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
        gflops = speed * flops_per_token / 1e9
        precision = "fp32" if "fp32" in arm else "bf16"
        runs = [r[arm] for r in good if arm in r]
        busy = sum(sum(r["cpu_seconds"]) for r in runs) / sum(sum(r["seconds"]) for r in runs) / machine["threads"]
        memory = statistics.median(r["peak_mb"] for r in runs)
        yield (
            f"| {arm} | {'yes' if isolates(arm) else 'no'} | {speed:,.0f} | {min(rates[arm]):,.0f} to "
            f"{max(rates[arm]):,.0f} | {ratio} | {gflops:,.0f} | "
            f"{gflops * 1e9 / peak[precision]:.0%} | {busy:.0%} | {memory:,.0f} ({runs[0]['imports_mb']:,.0f}) |"
        )
    for result in rounds[0]:
        if "error" in result:
            yield f"| {result['arm']} | | failed: {result['error'][:120]} | | | | | | |"


if __name__ == "__main__":
    main()
