"""`rollouts rl` with servers as engines: two `rollouts serve` processes, one of which is killed and comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rollouts.cli.main import main
from rollouts.inference import SamplingParams
from rollouts.training.engine_pool import EnginePool
from rollouts.training.weight_digests import digest
from rollouts.training.weight_push import named_tensors
from rollouts.training.weight_sync import SGLangEngine, WeightSyncError, WeightSyncManager

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from running_server import Running, running

# What the run calls: rewards are shares of low ids, and the samples of certain steps wait for what the test is about.
FUNCTIONS = """
import os, signal, subprocess
from pathlib import Path
import anyio, httpx

FOLDER = Path(__file__).parent

async def score(sample):
    version = sample.weight_versions[0].version
    if (FOLDER / "doomed").exists():
        pid, url = (FOLDER / "doomed").read_text().split()
        if version == 1 and not (FOLDER / "killed").exists():
            (FOLDER / "killed").touch()
            os.kill(int(pid), signal.SIGKILL)
        if version == 3:  # by now the run has gone on without it for a step
            (FOLDER / "may_restart").touch()
            with anyio.fail_after(240):
                while not await serves(url, "3"):
                    await anyio.sleep(0.05)
    ids = [token for token, learned in zip(sample.tokens, sample.loss_mask) if learned]
    return sum(token < 256 for token in ids) / len(ids)

score.isolation = "inline"

async def serves(url, version):
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(url + "/model_info")).json()["weight_version"] == version
    except httpx.TransportError:
        return False

async def restart(url):
    while not (FOLDER / "may_restart").exists():
        await anyio.sleep(0.02)
    command = (FOLDER / "command").read_text().split("\\n")
    with open(FOLDER / "again.log", "w") as log:
        process = subprocess.Popen([*command, "--port", url.rpartition(":")[2]], stdout=log, stderr=log)
    (FOLDER / "started_again").write_text(str(process.pid))
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    words = "apple bridge candle dragon engine forest garden harbor".split()
    rows = [{"prompt": f"Tell me about the {word}"} for word in words]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return {
        "model": {"path": str(tiny_model_dir), "precision": "float32"},
        "data": {"train": "prompts.jsonl", "validation": "prompts.jsonl"},
        "reward": "functions.py:score",
        "rollout": {"batch_size": 4, "n_samples_per_prompt": 4, "max_tokens": 8, "reward_timeout_s": 300},
        "train": {"num_steps": 5, "checkpoint_every": 0},
        "optimizer": {"lr": 1e-2},
        "device": "cpu",
        "run_dir": str(tmp_path / "run"),
    }


def run(recipe: dict[str, Any], folder: Path) -> int:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return main(["rl", str(path)])


@pytest.fixture
def command(tiny_model_dir: Path) -> list[str]:
    flags = "--precision float32 --max-length 128 --cache-mb 16".split()
    return [sys.executable, "-m", "rollouts", "serve", str(tiny_model_dir), *flags]


@pytest.fixture
def servers(command: list[str], tmp_path: Path) -> Iterator[list[tuple[str, int]]]:
    """Two servers, each a process of its own: address and process id."""
    reserved, processes = [socket.socket() for _ in range(2)], []
    try:
        for port in reserved:  # bound, not listening: nobody else gets it while a killed server is away
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(("127.0.0.1", 0))
            serve = [*command, "--port", str(port.getsockname()[1])]
            processes.append(subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, start_new_session=True))
        found = []
        for process in processes:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("serving"))
            found.append((line.split()[-1], process.pid))
        yield found
    finally:
        if (tmp_path / "started_again").exists():
            with suppress(ProcessLookupError):
                os.kill(int((tmp_path / "started_again").read_text()), signal.SIGKILL)
        for process in processes:
            process.kill()
            process.wait()
        for port in reserved:
            port.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def get(url: str, path: str) -> httpx.Response:
    return httpx.get(url + path, trust_env=False, timeout=60)


def digests(url: str) -> dict[str, str]:
    answer = httpx.post(url + "/weights_checker", json={"action": "checksum"}, trust_env=False, timeout=60)
    return answer.json()["ranks"][0]["checksums"]


def num_generated(url: str) -> int:
    """Requests to /generate that a server has answered."""
    found = re.findall(r'path="/generate"[^}]*} (\d+)', get(url, "/metrics").text)
    return sum(map(int, found))


def assert_sampled_by(model: Any, samples: list[dict[str, Any]]) -> None:
    """The log-probs that a server gave are those of this model, by transformers' own forward pass."""
    for sample in samples:
        [span] = sample["weight_versions"]
        ids = torch.tensor([sample["tokens"]])
        with torch.no_grad():
            table = model(ids).logits[0].log_softmax(-1)
        expected = table[:-1].gather(1, ids[0, 1:, None])[span["start"] - 1 :, 0]
        found = torch.tensor(sample["rollout_log_probs"])[span["start"] :]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_run_outlives_a_server_and_takes_it_back(
    recipe: dict[str, Any], servers: list[tuple[str, int]], command: list[str], tmp_path: Path
) -> None:
    (first, _), (second, pid) = servers
    (tmp_path / "doomed").write_text(f"{pid} {second}")
    (tmp_path / "command").write_text("\n".join(command))
    engine = {"kind": "rollouts", "url": [first, second], "restart": "functions.py:restart", "timeout_s": 120}
    assert run({**recipe, "engine": engine}, tmp_path) == 0

    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert max(row["mismatch_kl"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    samples = lines(tmp_path / "run" / "rollouts.jsonl")
    assert len(samples) == 5 * 16
    for sample in samples:
        assert [span["version"] for span in sample["weight_versions"]] == [sample["step"] - 1]
    assert (tmp_path / "started_again").exists()
    assert_sampled_by(AutoModelForCausalLM.from_pretrained(recipe["model"]["path"]), samples[:16])

    final = named_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final"))
    expected = {name: digest(tensor) for name, tensor in final.items()}
    for url in (first, second):
        assert get(url, "/model_info").json()["weight_version"] == "5"
        assert digests(url) == expected
        assert num_generated(url) > 0  # the second in its second life


# Servers in threads of this process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Running]]:
    with running(tiny_model_dir, tiny_tokenizer) as one, running(tiny_model_dir, tiny_tokenizer) as other:
        yield [one, other]


@pytest.mark.parametrize("weights", ["auto", "disk"])
@pytest.mark.parametrize("lora", [False, True])
def test_servers_end_with_what_the_run_ends_with(
    recipe: dict[str, Any], served: list[Running], tmp_path: Path, weights: str, lora: bool
) -> None:
    """Pushed (our own servers take no adapter alone) or through a folder, of which one is kept; LoRA merged."""
    recipe["engine"] = {"kind": "rollouts", "url": [s.url for s in served], "weights": weights}
    recipe["train"] |= {"num_steps": 2, "eval_every": 2}
    recipe["rollout"]["max_staleness"] = 1 if lora else 0
    if lora:
        recipe["model"]["lora"] = {"r": 4}
    assert run(recipe, tmp_path) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["mismatch_kl"] < 1e-4 and "eval_reward" in rows[1]
    final = named_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final"))
    start = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"])
    for server in served:
        assert server.served.engine.weight_version == 2
        for name, tensor in server.served.engine.model.named_parameters():
            torch.testing.assert_close(tensor, final[name], atol=1e-6 if lora else 0, rtol=0)
        assert not torch.equal(next(server.served.engine.model.parameters()), next(start.parameters())) or lora
    folders = sorted(path.name for path in (tmp_path / "run").glob("weights/*"))
    assert folders == (["version_000002"] if weights == "disk" else [])


def test_what_cannot_be_is_said_in_a_line(
    recipe: dict[str, Any], served: list[Running], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"kind": "rollouts", "url": served[0].url, "weights": "adapter"}
    for engine, status, message in (
        ({"kind": "rollouts", "url": "http://127.0.0.1:9"}, 2, "engine.url: sglang default at http://127.0.0.1:9"),
        (adapter, 2, "engine.weights: adapter needs model.lora"),
        ({"kind": "vllm"}, 2, "needs url"),
        ({"kind": "rollouts", "url": [served[0].url] * 2}, 2, "twice"),
        ({"kind": "rollouts", "url": served[0].url, "restart": "functions.py:nothing"}, 2, "nothing"),
    ):
        assert run({**recipe, "engine": engine}, tmp_path) == status
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1], error


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_pool_goes_past_the_dead_and_spreads_over_the_living(
    served: list[Running], tiny_model_dir: Path, anyio_backend: str
) -> None:
    dead = SGLangEngine("http://127.0.0.1:9", timeout=120, max_retries=0)
    alive = [SGLangEngine(server.url, timeout=120) for server in served]
    params = SamplingParams(max_tokens=4, n=3)
    may_return, restarted = anyio.Event(), list[Any]()

    async def restart(engine: Any) -> Any:
        await may_return.wait()
        restarted.append(engine)
        return alive[1] if engine is dead else engine

    with anyio.fail_after(240):
        async with WeightSyncManager([dead, alive[0]], restart, restart_delays=[0.0]) as manager:
            pool = EnginePool(manager)
            await manager.sync(tiny_model_dir, 7)
            assert manager.engines == [alive[0]] and await pool.get_weight_version() == 7
            await manager.drop(alive[0])

            async def ask() -> None:
                for sample in await pool.generate_group([5, 6, 7], params):
                    assert [span.version for span in sample.weight_versions] == [7]

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(ask)  # waits: there is no engine
                await anyio.wait_all_tasks_blocked()
                may_return.set()
            assert restarted
            for engine in manager.engines:  # what came back was given the weights first
                assert await engine.get_weight_version() == 7
            await pool.abort_all()

        async with WeightSyncManager([dead, *alive], version=7) as manager:
            pool = EnginePool(manager)
            asked: list[Any] = []
            for engine in manager.engines:
                engine.generate_group = _noting(engine, asked)  # type: ignore[method-assign]
            async with anyio.create_task_group() as tasks:
                for _ in range(6):
                    tasks.start_soon(pool.generate_group, [5, 6, 7], params)
            assert set(asked) == {dead, *alive} and manager.engines == alive
            assert abs(asked.count(alive[0]) - asked.count(alive[1])) <= 2
            for engine in alive:
                await manager.drop(engine)
            with pytest.raises(WeightSyncError, match="no engine is left"):
                await pool.generate_group([5, 6, 7], params)


def _noting(engine: Any, asked: list[Any]) -> Any:
    generate = engine.generate_group

    async def noted(*arguments: Any) -> Any:
        asked.append(engine)
        return await generate(*arguments)

    return noted
