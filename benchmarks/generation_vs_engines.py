"""Throughput and latency of `rollouts serve` beside real vLLM and SGLang servers, on one model and one machine.

    make test-engines                                        # once: it installs the engines under .engines/
    python -m benchmarks.generation_vs_engines               # model B, bfloat16, one server after another
    python -m benchmarks.generation_vs_engines --engines rollouts vllm --concurrency 16
    python -m benchmarks.generation_vs_engines --in-process  # no servers: the engine, vLLM and `generate` themselves

Every request has 64 prompt tokens and samples 64 at temperature 1 with log-probs. In the closed loop so many clients
ask again as soon as they are answered: once unstreamed, for tokens per second, and once streamed, for the time to the
first token (TTFT) and the time per token after it (TPOT). Servers and clients share the machine's cores. vLLM is
compiled unless --eager is given; SGLang runs on torch's own kernels, the only ones that it has on such a CPU.

In process every arm has a process of its own and no server: `generate_batch` of the embedded engine, vLLM's `LLM`
without its second process and with the allocator and the OpenMP that it asks for (its fastest way here), transformers'
`generate`, and its continuous batching, which are spared the log-probs. They take turns, round by round; the best round
of each counts.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import anyio
import httpx

from benchmarks.serving_latency import NEW_TOKENS, make_model_folder, percentiles, prompts_of
from benchmarks.workload import SHAPES
from rollouts.inference import SamplingParams
from rollouts.providers import Endpoint, sample_tokens, stream_tokens

ROOT = Path(__file__).resolve().parents[1]
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
PROVIDERS = {"rollouts": "sglang", "vllm": "vllm", "sglang": "sglang"}


def command(engine: str, folder: str, port: int, eager: bool) -> tuple[list[str], dict[str, str]]:
    """How a server is started, and its environment beside ours."""
    bins = {name: ROOT / ".engines" / name / "bin" for name in ("vllm", "sglang")}
    if engine == "rollouts":
        return [
            sys.executable,
            "-m",
            "rollouts",
            "serve",
            f"m={folder}",
            "--port",
            str(port),
            "--max-length",
            "256",
        ], {}
    if engine == "vllm":
        settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        arguments = ["--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "256", "--enable-scale-out"]
        arguments += ["--enforce-eager"] if eager else []
        return [str(bins["vllm"] / "vllm"), "serve", folder, "--port", str(port), *arguments], settings
    stubs = str(ROOT / "tests" / "engines" / "sglang_stubs")
    arguments = "--device cpu --attention-backend torch_native --sampling-backend pytorch --dtype bfloat16".split()
    arguments += "--mem-fraction-static 0.2 --max-total-tokens 40000 --sleep-on-idle --log-level error".split()
    python = [str(bins["sglang"] / "python"), "-m", "sglang.launch_server", "--model-path", folder, "--port", str(port)]
    return [*python, *arguments], {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": stubs}


@contextmanager
def started(engine: str, folder: str, eager: bool) -> Iterator[Endpoint]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words, settings = command(engine, folder, port, eager)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | settings
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"{engine} ended while it started; run it by hand: {' '.join(words)}")
            try:
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield Endpoint(PROVIDERS[engine], "m", url)  # type: ignore[arg-type]
    finally:
        server.terminate()
        server.wait(60)


async def measure(engine: str, endpoint: Endpoint, concurrency: int, vocab_size: int) -> None:
    """One closed loop: a line of figures."""
    prompts = prompts_of(max(2 * concurrency, 4), vocab_size, seed=concurrency)
    first, each = list[float](), list[float]()
    waiting = iter(prompts)

    async def client() -> None:
        for prompt in waiting:
            asked, came = time.perf_counter(), list[float]()
            async for chunk in stream_tokens(endpoint, prompt, PARAMS):
                if chunk.token_ids:
                    came.append(time.perf_counter())
            first.append(came[0] - asked)
            each.append((came[-1] - came[0]) / (NEW_TOKENS - 1))

    started_at = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(concurrency):
            tasks.start_soon(client)
    streamed = len(prompts) * NEW_TOKENS / (time.perf_counter() - started_at)

    whole = prompts_of(len(prompts), vocab_size, seed=concurrency + 1)  # once more, unstreamed: what a trainer does
    started_at = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for i in range(concurrency):

            async def trainer(own: list[list[int]]) -> None:
                for prompt in own:
                    await sample_tokens(endpoint, prompt, PARAMS)

            tasks.start_soon(trainer, whole[i::concurrency])
    unstreamed = len(whole) * NEW_TOKENS / (time.perf_counter() - started_at)
    print(
        f"{engine:10} {concurrency:5} {unstreamed:10,.0f} {streamed:10,.0f} "
        f"{percentiles(first):>20} {percentiles(each):>18}",
        flush=True,
    )


async def run(arguments: argparse.Namespace, folder: str) -> None:
    vocab_size = SHAPES[arguments.shape].vocab_size
    print(f"{'':10} {'at':>5} {'tokens/s':>10} {'streamed':>10} {'TTFT ms p50 / p99':>20} {'TPOT ms p50 / p99':>18}")
    for engine in arguments.engines:
        with started(engine, folder, arguments.eager) as endpoint:
            for prompt in prompts_of(8, vocab_size, seed=0):  # what is compiled at first use is compiled now
                await sample_tokens(endpoint, prompt, PARAMS)
            for concurrency in arguments.concurrency:
                await measure(engine, endpoint, concurrency, vocab_size)


# -- in process: one process an arm, which runs a round whenever it reads a line "concurrency seed" --------------------


def work(arm: str, shape: str, rounds: IO[str]) -> None:
    """What the process of an arm of ours does."""
    import torch
    import transformers

    from benchmarks.generation_vs_transformers import (
        random_prompts,
        run_continuous_batching,
        run_engine,
        run_transformers,
    )
    from rollouts.inference import EmbeddedEngine

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SHAPES[shape].hf_config())
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    engine = EmbeddedEngine(model, max_length=256, max_rows=256) if arm == "rollouts" else None
    for line in rounds:
        count, seed = map(int, line.split())
        prompts = random_prompts(count, config.vocab_size, seed)
        if engine:
            seconds = run_engine(engine, prompts, seed)
        elif arm == "generate":
            seconds = run_transformers(model, prompts, None)
        else:
            seconds = run_continuous_batching(model, prompts)
        print("seconds", seconds, flush=True)
    if engine:
        engine.close()


@contextmanager
def working(arm: str, shape: str, folder: str, eager: bool) -> Iterator[subprocess.Popen[str]]:
    words, environment = [sys.executable, "-m", "benchmarks.generation_vs_engines", "--shape", shape, "--arm", arm], {}
    if arm == "vllm":
        home = ROOT / ".engines" / "vllm"
        worker = str(ROOT / "benchmarks" / "vllm_in_process.py")
        words = [str(home / "bin" / "python"), worker, folder, *(["eager"] if eager else [])]
        allocator = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
        openmp = [*home.glob("lib/*/site-packages/torch/lib/libgomp*")]
        environment = {"LD_PRELOAD": ":".join(map(str, allocator + openmp))}
    process = subprocess.Popen(
        words, env=os.environ | environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def one_round(process: subprocess.Popen[str], concurrency: int, seed: int) -> float:
    """Seconds, as the process itself took them; before and after it stands still, whatever its threads would do."""
    assert process.stdin is not None and process.stdout is not None
    os.killpg(process.pid, signal.SIGCONT)
    process.stdin.write(f"{concurrency} {seed}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("seconds "):
            os.killpg(process.pid, signal.SIGSTOP)
            return float(line.split()[1])
    raise SystemExit(f"an arm ended: {' '.join(map(str, process.args))}")


def run_in_process(arguments: argparse.Namespace, folder: str) -> None:
    arms = ["rollouts", "vllm", "generate", "continuous"]
    if not (ROOT / ".engines" / "vllm" / "bin" / "python").exists():
        print("vllm is left out: .engines/vllm is missing (make test-engines installs it)")
        arms.remove("vllm")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # processes that stand still must not outlive this one
    with ExitStack() as stack:
        processes = {arm: stack.enter_context(working(arm, arguments.shape, folder, arguments.eager)) for arm in arms}
        for seed, process in enumerate(processes.values()):  # one after another: all that starting takes
            one_round(process, 1, seed)
        others = "".join(f"{f'of {arm}':>14}" for arm in arms[1:])
        print(f"{'at':>5} " + "".join(f"{arm:>12}" for arm in arms) + others + "   tokens/s, and ours as a multiple")
        for concurrency in arguments.concurrency:
            best = dict.fromkeys(arms, float("inf"))
            for round_ in range(arguments.rounds + 1):  # the first one does not count
                for arm, process in processes.items():
                    seconds = one_round(process, concurrency, 1000 * round_ + concurrency)
                    best[arm] = min(best[arm], seconds if round_ else float("inf"))
            rates = "".join(f"{concurrency * NEW_TOKENS / best[arm]:12,.0f}" for arm in arms)
            ratios = "".join(f"{best[arm] / best['rollouts']:14.2f}" for arm in arms[1:])
            print(f"{concurrency:5} {rates}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--shape", default="B", choices=list(SHAPES))
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation")
    parser.add_argument("--in-process", action="store_true", help="no servers")
    parser.add_argument("--rounds", type=int, default=3, help="in process, after one that does not count")
    parser.add_argument("--arm", choices=["rollouts", "generate", "continuous"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        return work(arguments.arm, arguments.shape, sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        make_model_folder(arguments.shape, Path(folder))
        if arguments.in_process:
            return run_in_process(arguments, folder)
        anyio.run(run, arguments, folder)


if __name__ == "__main__":
    main()
