"""Starting real vLLM and SGLang servers out of .engines/, each in its own virtual environment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINES = Path(os.environ.get("ROLLOUTS_ENGINES") or ROOT / ".engines")
START_SECONDS = 400
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def need(name: str) -> Path:
    """The interpreter of an engine's environment; the test is skipped where there is none."""
    python = ENGINES / name / "bin" / "python"
    if not (ENGINES / name / ".installed").is_file():
        pytest.skip(f"no {name} in {ENGINES}: run `make test-engines`, which installs it")
    return python


@contextmanager
def vllm_server(folder: Path, log: Path, *arguments: str, allow_lora: bool = False) -> Iterator[str]:
    """A vLLM server of the model in ``folder``, under the name ``tiny``; gives its address."""
    command = [
        str(need("vllm").with_name("vllm")), "serve", str(folder), "--served-model-name", "tiny", "--dtype", "float32",
        "--max-model-len", "2048", "--enforce-eager", "--enable-scale-out",
        "--logprobs-mode", "processed_logprobs", *arguments,
    ]  # fmt: skip
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if allow_lora:
        settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    with _running(command, settings, log) as url:
        yield url


@contextmanager
def sglang_server(folder: Path, log: Path, *arguments: str) -> Iterator[str]:
    """An SGLang server of the model in ``folder``, on torch's own kernels; gives its address."""
    command = [
        str(need("sglang")), "-m", "sglang.launch_server", "--model-path", str(folder), "--served-model-name", "tiny",
        "--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
        "--mem-fraction-static", "0.2", "--max-total-tokens", "32768", "--sleep-on-idle", *arguments,
    ]  # fmt: skip
    settings = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(Path(__file__).parent / "sglang_stubs")}
    with _running(command, settings, log) as url:
        yield url


@contextmanager
def _running(command: list[str], settings: dict[str, str], log: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | OFFLINE | settings
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(server, url, log)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the server did not start in {START_SECONDS} s:\n{log.read_text()[-3000:]}")
