"""Latency and throughput of `rollouts serve`, beside the engine in a process of its own without a server.

    python -m benchmarks.serving_latency                              # model B, bfloat16, all arms
    python -m benchmarks.serving_latency --concurrency 64 --rounds 5  # the server's overhead alone
    python -m benchmarks.serving_latency --rates 5 20 --seconds 30    # arrivals at random, so many a second

Every request has 64 prompt tokens and samples 64 at temperature 1. In the closed loop so many clients each ask again as
soon as they are answered; "engine" is `generate_batch` with as many prompts at once. Rounds alternate between the arms:
medians of the rates, and of their shares of the engine's rate in the same round. In the open loop requests come by a
Poisson process whether or not others are answered: time to the first token (TTFT), time per token after it (TPOT) and
time to the end, at the client.

Engine, server and clients share the machine's cores; the engine has --threads of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.workload import SHAPES

PROMPT_TOKENS = 64
NEW_TOKENS = 64


@dataclass(frozen=True)
class Answered:
    """When one answer came, in seconds after its request was due, and how many events it had."""

    first: float
    last: float
    num_events: int


def make_model_folder(shape: str, folder: Path) -> None:
    """A random model and a tokenizer with a text for every id; as for speed, any would do."""
    import torch
    import transformers

    from rollouts.models.tokenizer import train_tokenizer

    config = SHAPES[shape].hf_config()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    tokenizer = train_tokenizer((" ".join(rng.choices(words, k=50)) for _ in range(4_000)), config["vocab_size"])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompts_of(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """New ones each time: nothing may come from the prefix cache."""
    rng = random.Random(seed)
    return [[rng.randrange(9, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


# -- the engine alone: a process that runs a round whenever it reads a line --------------------------------------------


def run_engine(folder: str, threads: int, dtype: str, max_rows: int) -> None:
    import torch
    import transformers

    from rollouts.inference import EmbeddedEngine, SamplingParams

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with EmbeddedEngine(model, max_length=256, max_rows=max_rows) as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            seed, concurrency = map(int, line.split())
            prompts = prompts_of(concurrency, model.config.vocab_size, seed)
            params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
            started = time.perf_counter()
            engine.generate_batch(prompts, params)
            print(time.perf_counter() - started, flush=True)


# -- clients: as little work as possible, for they take it from the server's cores -------------------------------------


def body_of(prompt: list[int], stream: bool) -> bytes:
    body = {"model": "m", "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "stream": stream}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def ask(port: int, raw: bytes, due: float) -> Answered:
    """Send a request on a connection of its own and read its answer to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head[:16], head
        if b"text/event-stream" not in head:
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            now = time.perf_counter() - due
            return Answered(now, now, 1)
        first, num_events, ending = 0.0, 0, b""
        while b"[DONE]" not in ending:
            data = await reader.read(1 << 16)
            assert data, "the server closed the connection"
            first = first or time.perf_counter() - due
            num_events += data.count(b"data: {")
            ending = (ending + data)[-40:]
        return Answered(first, time.perf_counter() - due, num_events)
    finally:
        writer.close()


async def closed_loop(port: int, concurrency: int, stream: bool, vocab_size: int, seed: int, each: int) -> float:
    """Seconds until every one of the clients has been answered ``each`` times."""
    prompts = prompts_of(concurrency * each, vocab_size, seed)
    bodies = [body_of(prompt, stream) for prompt in prompts]

    async def client(i: int) -> None:
        for raw in bodies[i * each : (i + 1) * each]:
            await ask(port, raw, time.perf_counter())

    started = time.perf_counter()
    await asyncio.gather(*map(client, range(concurrency)))
    return time.perf_counter() - started


async def open_loop(port: int, rate: float, seconds: float, vocab_size: int) -> list[Answered]:
    """Requests that arrive at random, ``rate`` a second on average."""
    rng = random.Random(0)
    dues, due = [], 0.0
    while (due := due + rng.expovariate(rate)) < seconds:
        dues.append(due)
    bodies = [body_of(prompt, True) for prompt in prompts_of(len(dues), vocab_size, seed=1)]
    started = time.perf_counter()

    async def client(i: int) -> Answered:
        await asyncio.sleep(started + dues[i] - time.perf_counter())
        return await ask(port, bodies[i], started + dues[i])

    return await asyncio.gather(*map(client, range(len(dues))))


# -- the run -----------------------------------------------------------------------------------------------------------


@contextmanager
def started(command: list[str], threads: int, ready: str) -> Iterator[tuple[IO[str], IO[str], str]]:
    """A process, its input and output, and the line by which it says that it is ready."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin and process.stdout
    try:
        yield process.stdin, process.stdout, next(line for line in process.stdout if line.startswith(ready))
    finally:
        process.terminate()
        process.wait()


def percentiles(values: list[float]) -> str:
    cuts = statistics.quantiles(values, n=100)
    return f"{1e3 * statistics.median(values):,.1f} / {1e3 * cuts[98]:,.1f}"


def share(rates: list[float], of: list[float]) -> str:
    ratio = statistics.median(rate / other for rate, other in zip(rates, of, strict=True))
    return "" if rates is of else f" ({ratio:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="B", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--concurrency", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--rates", nargs="*", type=float, default=[5.0, 20.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals at each rate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the engine")
    parser.add_argument("--engine-process", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine_process:
        run_engine(arguments.engine_process, arguments.threads, arguments.dtype, max([1, *arguments.concurrency]))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model_folder(arguments.shape, Path(folder))
        measure(folder, arguments)


def measure(folder: str, arguments: argparse.Namespace) -> None:
    vocab_size = SHAPES[arguments.shape].vocab_size
    engine_command = [sys.executable, "-m", "benchmarks.serving_latency", "--engine-process", folder]
    engine_command += ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
    engine_command += ["--concurrency", *map(str, arguments.concurrency)]
    server_command = [sys.executable, "-m", "rollouts", "serve", f"m={folder}", "--port", "0"]
    server_command += ["--precision", arguments.dtype, "--max-length", "256"]
    with (
        started(engine_command, arguments.threads, "ready") as (engine_in, engine_out, _),
        started(server_command, arguments.threads, "serving") as (_, _, ready),
    ):
        port = int(ready.rpartition(":")[2])

        def engine(concurrency: int, seed: int) -> float:
            engine_in.write(f"{seed} {concurrency}\n")
            engine_in.flush()
            return float(engine_out.readline())

        def server(concurrency: int, seed: int, stream: bool) -> float:
            return asyncio.run(closed_loop(port, concurrency, stream, vocab_size, seed, 1))

        arms: dict[str, Callable[[int, int], float]] = {
            "engine": engine,
            "server, whole answers": lambda concurrency, seed: server(concurrency, seed, False),
            "server, streams": lambda concurrency, seed: server(concurrency, seed, True),
        }
        print(f"model {arguments.shape}, {arguments.dtype}, {arguments.threads} threads for the engine")
        print("\n| concurrency | " + " | ".join(f"{arm}, tokens/s" for arm in arms) + " |")
        print("|" + "---|" * (len(arms) + 1))
        for concurrency in arguments.concurrency:
            rates: dict[str, list[float]] = {name: [] for name in arms}
            for round_ in range(arguments.rounds + 1):
                for i, (name, arm) in enumerate(arms.items()):
                    seconds = arm(concurrency, 1000 * concurrency + 10 * round_ + i)
                    if round_:  # the first one warms up
                        rates[name].append(concurrency * NEW_TOKENS / seconds)
            row = " | ".join(f"{statistics.median(each):,.0f}{share(each, rates['engine'])}" for each in rates.values())
            print(f"| {concurrency} | {row} |", flush=True)
        if arguments.rates:
            print("\n| requests/s | tokens/s | TTFT ms, p50 / p99 | TPOT ms, p50 / p99 | end ms, p50 / p99 |")
            print("|---|---|---|---|---|")
        for rate in arguments.rates:
            begun = time.perf_counter()
            answers = asyncio.run(open_loop(port, rate, arguments.seconds, vocab_size))
            throughput = len(answers) * NEW_TOKENS / (time.perf_counter() - begun)
            columns = (
                [answer.first for answer in answers],
                [(answer.last - answer.first) / (NEW_TOKENS - 1) for answer in answers],
                [answer.last for answer in answers],
            )
            print(f"| {rate:g} | {throughput:,.0f} | " + " | ".join(map(percentiles, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()
