"""`rollouts serve`: answer OpenAI's and SGLang's HTTP APIs with models in this process."""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path
from typing import Any

from rollouts.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve models over HTTP, in OpenAI's and SGLang's languages",
        description="Serve one or more models over HTTP: /v1/chat/completions, /v1/completions, /generate and more. "
        "Only this machine can reach the server unless --host says otherwise, which needs an --api-key.",
    )
    parser.add_argument("models", metavar="[NAME=]MODEL", nargs="+", help="model folder, run folder or hub name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="bearer token that clients must send; better set ROLLOUTS_API_KEY instead"
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a host name that clients may call the server by",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: up to 4096)")
    parser.add_argument(
        "--max-rows", type=int, default=256, metavar="N", help="samples that run at once (default: 256)"
    )
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="samples that wait (default: 1024)")
    parser.add_argument("--cache-mb", type=int, default=1024, metavar="N", help="memory of the cache (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of requests without one (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    names = name_models(args.models)
    for flag in ("max_length", "max_rows", "max_queue", "cache_mb"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; give a number above 0")

    from rollouts.serving.settings import Settings

    settings = Settings(
        host=args.host,
        api_key=args.api_key or os.environ.get("ROLLOUTS_API_KEY"),
        allowed_hosts=tuple(args.allow_host),
        max_queue=args.max_queue,
    )

    from rollouts.serving.server import bind, make_server

    with bind(args.host, args.port) as listening:  # before the models load: a port in use is told at once
        from rollouts.cli.export import find_source
        from rollouts.models.load import load_hf_model
        from rollouts.serving.served_model import ServedModel

        served = {}
        for name, path in names.items():
            folder = Path(path).expanduser()
            model, tokenizer = load_hf_model(
                find_source(folder) if folder.is_dir() else path, args.device, args.precision
            )
            served[name] = ServedModel(
                name, path, model, tokenizer, settings,
                max_rows=args.max_rows, max_length=args.max_length, cache_bytes=args.cache_mb << 20, seed=args.seed,
            )  # fmt: skip
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        ready = f"serving {', '.join(served)} at {url}"
        gc.collect()
        gc.freeze()  # else Python looks for garbage among all of torch now and then, while every stream waits
        try:
            make_server(served, settings, on_ready=lambda: print(ready, flush=True)).run(sockets=[listening])
        finally:
            for one in served.values():
                one.close()
            gc.freeze()  # at exit Python would look for garbage among all of torch, for seconds
    return 0


def name_models(arguments: list[str]) -> dict[str, str]:
    """Models by the name that clients ask for: ``NAME=MODEL``, or the model's own, its folder's last part.

    Raises:
        UserError: a name twice.
    """
    names: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).expanduser().is_dir():
            path = argument
            folder = Path(path).expanduser()
            parts = [part for part in folder.resolve().parts if part != "final"]  # of a run: the run's own name
            name = parts[-1] if folder.is_dir() else path
        if not name or not path:
            raise UserError(f"{argument!r} names no model; write NAME=MODEL")
        if name in names:
            raise UserError(f"two models have the name {name}; write NAME=MODEL to tell them apart")
        names[name] = path
    return names
