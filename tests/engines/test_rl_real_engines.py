"""`rollouts rl` with a real vLLM and a real SGLang server as its engine: three steps of GRPO, a sync after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import yaml
from real_engines import sglang_server, vllm_server
from transformers import AutoModelForCausalLM, PreTrainedModel

from rollouts.cli.main import main
from rollouts.training.weight_sync import SGLangEngine, VLLMEngine, WeightSyncError, check_engine

pytestmark = [pytest.mark.engines, pytest.mark.anyio]

TEMPERATURE = 0.8


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model_folder(save_tiny_model: Callable[..., Path]) -> Path:
    """A float32 model with heads of 32, which vLLM's CPU attention wants."""
    return save_tiny_model(initializer_range=0.1, head_dim=32, max_position_embeddings=2048)


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def address(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[tuple[str, str]]:
    log = model_folder.parent / f"rl_{request.param}.log"
    if request.param == "vllm":
        with vllm_server(model_folder, log, "--weight-transfer-config", '{"backend": "gloo"}') as url:
            yield "vllm", url
    else:
        with sglang_server(model_folder, log) as url:
            yield "sglang", url


def train(model_folder: Path, task: dict[str, Any], folder: Path, engine: dict[str, Any], **changes: Any) -> list[Any]:
    """Run the recipe; gives the metrics of its steps."""
    values = {
        **task,
        "model": {"path": str(model_folder), "precision": "float32"},
        "rollout": {"batch_size": 4, "n_samples_per_prompt": 4, "max_tokens": 16, "temperature": TEMPERATURE},
        "train": {"num_steps": 3, "checkpoint_every": 0, "eval_every": 3},
        "optimizer": {"lr": 3e-3},
        "engine": engine,
        "device": "cpu",
        "run_dir": str(folder / "run"),
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["rl", str(folder / "recipe.yaml")]) == 0
    return lines(folder / "run" / "metrics.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_probs(model: PreTrainedModel, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """transformers' own: for each token its log-prob given those before it; the first has none."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0].float()
    table = torch.log_softmax(logits[:-1] / temperature, dim=-1)
    return [0.0, *table.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()]


def check_samples(start: Path, run: Path, num_steps: int = 3) -> None:
    """Every step's samples are of that step's weights; the first ones' log-probs are those of the starting model."""
    model = AutoModelForCausalLM.from_pretrained(start)
    samples = lines(run / "rollouts.jsonl")
    assert len(samples) == 16 * num_steps
    for sample in samples:
        [span] = sample["weight_versions"]
        assert span["version"] == sample["step"] - 1
        if sample["step"] == 1:
            expected = log_probs(model, sample["tokens"], TEMPERATURE)[span["start"] :]
            assert sample["rollout_log_probs"][span["start"] :] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("weights", ["push", "disk"])
@pytest.mark.parametrize("lora", [False, True])
async def test_three_steps_of_grpo(
    address: tuple[str, str], model_folder: Path, rl_task: dict[str, Any], tmp_path: Path, weights: str, lora: bool
) -> None:
    """All weights, or an adapter merged into them; out of memory, or through a folder."""

    kind, url = address
    model: dict[str, Any] = {"path": str(model_folder), "precision": "float32"}
    if lora:
        model["lora"] = {"r": 4}
    engine = {"kind": kind, "url": url, "weights": weights}
    rows = await anyio.to_thread.run_sync(lambda: train(model_folder, rl_task, tmp_path, engine, model=model))
    assert [row["step"] for row in rows] == [1, 2, 3] and "eval_reward" in rows[2]
    assert max(row["mismatch_kl"] for row in rows) < 1e-6
    assert all(row["grad_norm"] > 0 for row in rows)
    check_samples(model_folder, tmp_path / "run")

    served = VLLMEngine(url, timeout=60) if kind == "vllm" else SGLangEngine(url, timeout=60)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    coverage, gap = await check_engine(
        served, 3, None if lora else tmp_path / "run" / "final", reference=partial(log_probs, final), tolerance=1e-4
    )
    assert gap is not None and (coverage == 1) == (lora or kind == "sglang")
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(WeightSyncError, match="off the trainer's"):
        await check_engine(served, 3, reference=partial(log_probs, start), tolerance=1e-4)


async def test_an_adapter_alone_on_vllm(model_folder: Path, rl_task: dict[str, Any], tmp_path: Path) -> None:
    """`weights: auto` finds out that this server takes adapters; the base model stays where it is."""

    flags = ("--enable-lora", "--max-lora-rank", "8")
    with vllm_server(model_folder, tmp_path / "lora.log", *flags, allow_lora=True) as url:
        model = {"path": str(model_folder), "precision": "float32", "lora": {"r": 8}}
        engine = {"kind": "vllm", "url": url}
        rows = await anyio.to_thread.run_sync(
            lambda: train(model_folder, rl_task, tmp_path, engine, model=model, optimizer={"lr": 1e-2})
        )
        assert max(row["mismatch_kl"] for row in rows) < 1e-5
        check_samples(model_folder, tmp_path / "run")
        [folder] = (tmp_path / "run" / "weights").iterdir()
        assert folder.name == "version_000003" and (folder / "adapter_config.json").is_file()
        served = VLLMEngine(url, "rollouts", timeout=60)
        final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
        await check_engine(served, 3, reference=partial(log_probs, final), tolerance=1e-3)
