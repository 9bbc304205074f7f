"""``rollouts rl``: reinforcement learning from verifiable rewards."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.cli.train import add_train_parser, copy_checkpoint, run_training, write_final

if TYPE_CHECKING:
    from rollouts.recipes.build_rl import RLRun
    from rollouts.recipes.rl_schema import RLRecipe


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    add_train_parser(
        subparsers,
        "rl",
        help="reinforcement learning from rewards that can be checked",
        description="Reinforcement learning: sample answers to prompts, judge them, and make the better ones likelier. "
        "Running it again in the same run folder resumes it.",
    )


def run(args: argparse.Namespace) -> int:
    return run_training("rl", args, train)


def train(recipe: RLRecipe, is_new: bool, fork_step: Path | None, use_fsdp: bool) -> None:
    """Train on this rank; the first rank also makes the run's folder, samples, logs, and writes the results."""
    import anyio

    from rollouts.models import parse_device
    from rollouts.pipeline.run_report import write_run_report
    from rollouts.recipes import build, build_rl
    from rollouts.recipes.run_folder import create_run
    from rollouts.training import distributed_utils as ranks

    shared: Any = recipe  # rl recipes have the sections that these functions read
    functions = build_rl.load_functions(recipe)
    build.require_loggers(shared)
    device = ranks.init_process_group(parse_device(recipe.device)) if use_fsdp else parse_device(recipe.device)
    prompts, validation = build_rl.load_data(recipe, functions)
    model, tokenizer = build.build_model(shared, device)
    build_rl.check_prompts(recipe, prompts, tokenizer, model.config.max_position_embeddings)
    rl = build_rl.build_run(recipe, functions, model, tokenizer, prompts, validation, device, use_fsdp)
    if is_new and ranks.is_main():
        create_run(recipe, functools.partial(copy_step, recipe, fork_step) if fork_step else None)
    ranks.barrier()
    try:
        history = anyio.run(functools.partial(train_and_log, recipe, rl))
    finally:
        rl.close()
    sharded = use_fsdp and recipe.distributed.checkpoint_format == "sharded"
    weights = rl.backend.get_weights().wait() if sharded else None
    if ranks.is_main():
        report = write_run_report(recipe, history)
        write_final(shared, rl.backend, weights)  # last: a run that has it is finished
        print(f"{recipe.run_dir}: {summarize(report)}; the model is in {Path(recipe.run_dir) / 'final'}")


def copy_step(recipe: RLRecipe, step: Path, run_folder: Path) -> None:
    """Commit a copy of another run's step, with those of the models that learn beside the policy.

    Raises:
        UserError: the other run has no such model, or its step is damaged.
    """
    from rollouts.training.checkpoints import verify_checkpoint

    copy_checkpoint(step, run_folder)
    companions = {
        "critic": recipe.critic is not None and not recipe.shares_trunk,
        "process_reward": recipe.process_reward is not None,
    }
    for name in (name for name, has_own in companions.items() if has_own):
        checkpoints = f"{name}_checkpoints"  # beside the policy's, as build_companion has it
        beside = step.parent.parent / checkpoints / step.name
        verify_checkpoint(beside)
        copy_checkpoint(beside, run_folder, checkpoints)


async def train_and_log(recipe: RLRecipe, rl: RLRun) -> list[dict[str, Any]]:
    from rollouts.providers.http import close_clients
    from rollouts.recipes import build
    from rollouts.training import RolloutLog, run_rl_training
    from rollouts.training import distributed_utils as ranks

    logger = build.build_loggers(recipe, rl.config.num_steps) if ranks.is_main() else None  # type: ignore[arg-type]
    rollout_log = RolloutLog(Path(recipe.run_dir) / "rollouts.jsonl")
    try:
        async with rl.serving():
            return await run_rl_training(
                rl.backend, rl.data_buffer, rl.manager, rl.engines, rl.config, logger,
                rollout_log=rollout_log, **rl.extras,
            )  # fmt: skip
    finally:
        await close_clients()
        rollout_log.close()
        if logger is not None:
            logger.close()


def summarize(report: dict[str, Any]) -> str:
    """For example ``200 steps, reward 0.1250 -> 0.7812, held-out reward 0.6900``."""
    parts, metrics = [f"{report['steps']} steps"], report["metrics"]
    if "reward_mean" in metrics:
        parts.append(f"reward {metrics['reward_mean']['first']:.4f} -> {metrics['reward_mean']['last']:.4f}")
    if "eval_reward" in metrics:
        parts.append(f"held-out reward {metrics['eval_reward']['last']:.4f}")
    return ", ".join(parts)
