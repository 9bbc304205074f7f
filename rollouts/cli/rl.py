"""``rollouts rl``: reinforcement learning from verifiable rewards."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.cli.common import add_recipe_arguments, resolve_recipe

if TYPE_CHECKING:
    from rollouts.recipes.build_rl import Functions, RLRun
    from rollouts.recipes.rl_schema import RLRecipe


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "rl",
        help="reinforcement learning from rewards that can be checked",
        description="Reinforcement learning: sample answers to prompts, judge them, and make the better ones likelier. "
        "Running it again in the same run folder resumes it.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--on-bad-row", choices=["fail", "skip"], help="short for --data.on_bad_row")
    parser.add_argument(
        "--fork-from",
        metavar="RUN_OR_STEP",
        help="start a new run from another's checkpoint: a run's folder, or one of its checkpoints/step_NNNNNN",
    )


def run(args: argparse.Namespace) -> int:
    """Resolve the recipe, train, from the last checkpoint if the folder holds one, and write ``final/``.

    Whatever can be wrong with the input is found before the run's folder is made.
    """
    if args.on_bad_row:
        args.overrides.setdefault("data.on_bad_row", args.on_bad_row)
    recipe: Any = resolve_recipe("rl", args)
    if recipe is None:
        return 0

    from rollouts.cli.train import find_fork, wants_fsdp
    from rollouts.recipes.run_folder import RunState, inspect_run

    state = inspect_run(recipe)
    folder = Path(recipe.run_dir)
    if state is RunState.FINISHED:
        print(f"{folder}: this run is finished; its model is in {folder / 'final'}")
        return 0
    use_fsdp = wants_fsdp(recipe)

    from rollouts.recipes.build_rl import load_functions
    from rollouts.training import WeightSyncError
    from rollouts.training import distributed_utils as ranks

    functions = load_functions(recipe)
    fork_step = find_fork(args.fork_from) if args.fork_from and state is RunState.NEW else None
    try:
        train(recipe, functions, state is RunState.NEW, fork_step, use_fsdp)
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes {folder} from its last checkpoint", file=sys.stderr)
        return 130
    except (FloatingPointError, WeightSyncError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        ranks.cleanup()
    return 0


def train(recipe: RLRecipe, functions: Functions, is_new: bool, fork_step: Path | None, use_fsdp: bool) -> None:
    """Train on this rank; the first rank also makes the run's folder, samples, logs, and writes the results."""
    import anyio

    from rollouts.cli.train import copy_checkpoint, write_final
    from rollouts.models import parse_device
    from rollouts.recipes import build, build_rl
    from rollouts.recipes.run_folder import create_run
    from rollouts.training import distributed_utils as ranks

    shared: Any = recipe  # rl recipes have the sections that these functions read
    build.require_loggers(shared)
    device = ranks.init_process_group(parse_device(recipe.device)) if use_fsdp else parse_device(recipe.device)
    prompts = build_rl.build_prompts(recipe, recipe.data.train)
    validation = build_rl.build_prompts(recipe, recipe.data.validation) if recipe.data.validation else []
    model, tokenizer = build.build_model(shared, device)
    build_rl.check_prompts(prompts, tokenizer)
    rl = build_rl.build_run(recipe, functions, model, tokenizer, prompts, validation, device, use_fsdp)
    if is_new and ranks.is_main():
        create_run(recipe, functools.partial(copy_checkpoint, fork_step) if fork_step else None)
    ranks.barrier()
    try:
        history = anyio.run(functools.partial(train_and_log, recipe, rl))
    finally:
        rl.close()
    sharded = use_fsdp and recipe.distributed.checkpoint_format == "sharded"
    weights = rl.backend.get_weights().wait() if sharded else None
    if ranks.is_main():
        report = write_report(recipe, history)
        write_final(shared, rl.backend, weights)  # last: a run that has it is finished
        print(f"{recipe.run_dir}: {summarize(report)}; the model is in {Path(recipe.run_dir) / 'final'}")


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


def write_report(recipe: RLRecipe, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Write and return ``report.json``: the run's kind, its steps, and statistics of every metric over them."""
    from rollouts.training.metrics import compute_stats, read_metrics

    folder = Path(recipe.run_dir)
    rows = read_metrics(folder / "metrics.jsonl") if "jsonl" in recipe.loggers else history
    report = {
        "kind": recipe.kind,
        "algorithm": recipe.algorithm,
        "steps": history[-1]["step"],
        "metrics": compute_stats(rows),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def summarize(report: dict[str, Any]) -> str:
    """For example ``200 steps, reward 0.1250 -> 0.7812, held-out reward 0.6900``."""
    parts, metrics = [f"{report['steps']} steps"], report["metrics"]
    if "reward_mean" in metrics:
        parts.append(f"reward {metrics['reward_mean']['first']:.4f} -> {metrics['reward_mean']['last']:.4f}")
    if "eval_reward" in metrics:
        parts.append(f"held-out reward {metrics['eval_reward']['last']:.4f}")
    return ", ".join(parts)
