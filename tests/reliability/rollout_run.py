"""A run that only rolls out: a real engine, a reward, a filter, and a commit a step, which a test can kill anywhere."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.models.load import load_hf_model
from rollouts.training.checkpoints import checkpoint_transaction, find_latest, read_json, sweep_orphans, write_json
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.filters import FilterResult
from rollouts.training.rollout_gen import AsyncRolloutManager, EngineGenerate, RolloutConfig
from rollouts.training.types import Sample


@dataclass(frozen=True)
class RolloutRun:
    """Ten steps of three of seven prompts, two samples each; a commit every second step."""

    folder: Path
    model: Path
    num_steps: int = 10
    max_staleness: int = 0
    over_sampling_factor: float = 1.0
    order: Any = "dealt"
    overlap: bool = False


async def reward(sample: Sample) -> float:
    return float(sum(sample.tokens) % 5)


def not_both_zero(group: list[Sample]) -> FilterResult:
    return FilterResult(any(s.reward for s in group), "zeros")


def roll_out(run: RolloutRun) -> None:
    """Do the run, or what is left of it. The state of the last commit lists what every committed step consumed."""
    with (run.folder.with_suffix(".log")).open("a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    model, tokenizer = load_hf_model(str(run.model), device="cpu", dtype="float32")
    prompts = [Sample(prompt=[{"role": "user", "content": f"What is {i}?"}], id=f"q{i}") for i in range(7)]
    sweep_orphans(run.folder)
    with EmbeddedEngine(model, max_length=256) as engine:
        config = RolloutConfig(
            batch_size=3,
            n_samples_per_prompt=2,
            generate_fn=EngineGenerate(engine, tokenizer, SamplingParams(max_tokens=40, ignore_eos=True)),
            reward_fn=reward,
            filter_fn=not_both_zero,
            over_sampling_factor=run.over_sampling_factor,
            max_staleness=run.max_staleness,
            order=run.order,
            overlap=run.overlap,
        )
        asyncio.run(_steps(run, engine, AsyncRolloutManager(DataBuffer(prompts, seed=1), config)))


async def _steps(run: RolloutRun, engine: EmbeddedEngine, manager: AsyncRolloutManager) -> None:
    step, consumed = 0, []
    if found := find_latest(run.folder):
        state = read_json(found / "trainer_state.json")
        step, consumed = state["step"], state["consumed"]
        manager.load_state_dict(state["rollouts"])
        await engine.update_weights(version=step)
    async with manager:
        while step < run.num_steps:
            batch = await manager.generate_batch()
            groups = [batch.samples[i : i + 2] for i in range(0, 6, 2)]
            assert batch.step_id == step and all(a.group_id == b.group_id for a, b in groups)
            consumed.append([[group[0].metadata["prompt_id"], group[0].group_id] for group in groups])
            await asyncio.sleep(0.002)  # training
            step += 1
            await engine.update_weights(version=step)
            manager.weight_version = step
            if step % 2 == 0:
                with checkpoint_transaction(run.folder, step, keep=2) as folder:
                    rollouts = manager.state_dict()
                    write_json(
                        folder / "trainer_state.json", {"step": step, "consumed": consumed, "rollouts": rollouts}
                    )
