"""What every verb that trains does: a recipe into a trained model, going on where it was."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollouts.cli.common import add_recipe_arguments, resolve_recipe
from rollouts.errors import UserError

if TYPE_CHECKING:
    import torch

    from rollouts.recipes.schema import TrainingRecipe
    from rollouts.training.backends.pytorch import PyTorchTrainingBackend

Train = Callable[[Any, bool, "Path | None", bool], None]  # (recipe, is_new, fork_step, use_fsdp): trains on this rank


def add_train_parser(subparsers: argparse._SubParsersAction[Any], verb: str, help: str, description: str) -> None:
    parser = subparsers.add_parser(verb, help=help, description=description)
    add_recipe_arguments(parser)
    parser.add_argument("--on-bad-row", choices=["fail", "skip"], help="short for --data.on_bad_row")
    parser.add_argument(
        "--fork-from",
        metavar="RUN_OR_STEP",
        help="start a new run from another's checkpoint: a run's folder, or one of its checkpoints/step_NNNNNN",
    )


def run_training(kind: str, args: argparse.Namespace, train: Train | None = None) -> int:
    """Resolve the recipe, train, from the last checkpoint if the folder holds one, and write ``final/``.

    Whatever can be wrong with the input is found before the run's folder is made.
    """
    if args.on_bad_row:
        args.overrides.setdefault("data.on_bad_row", args.on_bad_row)
    recipe: Any = resolve_recipe(kind, args)
    if recipe is None:
        return 0
    return run_in_turn([(recipe, train or train_on_data)], args.fork_from)


def run_in_turn(runs: Sequence[tuple[Any, Train]], fork_from: str | None = None) -> int:
    """Run recipes one after the other, those that are finished already but named. Returns the exit code."""
    from rollouts.recipes.run_folder import RunState, inspect_run
    from rollouts.training import distributed_utils as ranks

    try:
        for recipe, train in runs:
            folder = Path(recipe.run_dir)
            state = inspect_run(recipe)
            if state is RunState.FINISHED:
                print(f"{folder}: this run is finished; its model is in {folder / 'final'}")
                continue
            use_fsdp = wants_fsdp(recipe)
            fork_step = find_fork(fork_from) if fork_from and state is RunState.NEW else None
            train(recipe, state is RunState.NEW, fork_step, use_fsdp)
            ranks.barrier()  # what the first rank wrote last is there for the next run on every rank
    except KeyboardInterrupt:
        print(f"interrupted; the same command resumes {folder} from its last checkpoint", file=sys.stderr)
        return 130
    finally:
        ranks.cleanup()
    return 0


def wants_fsdp(recipe: TrainingRecipe) -> bool:
    """Whether this process is one rank of several, as torchrun says in the environment."""
    strategy, launched = recipe.distributed.strategy, "WORLD_SIZE" in os.environ
    if strategy == "fsdp" and not launched:
        raise UserError(
            "distributed.strategy is fsdp, but this is a single process; launch it with "
            "torchrun --nproc-per-node N -m rollouts VERB RECIPE.yaml"
        )
    if strategy == "none" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("distributed.strategy is none, but torchrun started several processes; set it to auto or fsdp")
    return strategy == "fsdp" or (strategy == "auto" and launched)


def find_fork(source: str) -> Path:
    """The checkpoint that ``--fork-from`` names: a step's folder, or the latest step of a run's folder."""
    from rollouts.training.checkpoints import find_latest, verify_checkpoint

    folder = Path(source).resolve()  # checkpoints/latest is a link
    if (folder / "trainer_state.json").is_file():
        verify_checkpoint(folder)
        return folder
    step = find_latest(folder / "checkpoints")
    if step is None:
        raise UserError(f"--fork-from {source}: holds no checkpoint; name a run's folder or a step of its checkpoints")
    return step


def train_on_data(recipe: TrainingRecipe, is_new: bool, fork_step: Path | None, use_fsdp: bool) -> None:
    """Train on this rank; the first rank also makes the run's folder, logs, and writes the results."""
    import anyio

    from rollouts.models import parse_device
    from rollouts.pipeline.run_report import write_run_report
    from rollouts.recipes import build
    from rollouts.recipes.run_folder import create_run
    from rollouts.training import distributed_utils as ranks

    build.require_loggers(recipe)
    build.check_sources(recipe)
    device = ranks.init_process_group(parse_device(recipe.device)) if use_fsdp else parse_device(recipe.device)
    patient = ranks.gloo_group(ranks.LONGEST_WAIT)
    model, tokenizer = build.build_model(recipe, device)
    if not ranks.is_main():
        ranks.barrier(patient)  # the first rank fills the cache of tokenized data, the others read it
    samples = build.build_samples(recipe, recipe.data.train, tokenizer)
    validation = build.build_samples(recipe, recipe.data.validation, tokenizer) if recipe.data.validation else None
    if ranks.is_main():
        ranks.barrier(patient)
    config = build.build_config(recipe, samples)
    backend = build.build_backend(recipe, model, tokenizer, device, config.num_steps, use_fsdp)
    if is_new and ranks.is_main():
        create_run(recipe, functools.partial(copy_checkpoint, fork_step) if fork_step else None)
    ranks.barrier()
    logger = build.build_loggers(recipe, config.num_steps) if ranks.is_main() else None
    try:
        history = anyio.run(
            functools.partial(loop_of(recipe.kind), backend, samples, config, logger, validation=validation)
        )
    finally:
        if logger is not None:
            logger.close()
    # A sharded checkpoint is no model folder: every rank takes part in gathering the weights instead.
    weights = backend.get_weights().wait() if use_fsdp and recipe.distributed.checkpoint_format == "sharded" else None
    if ranks.is_main():
        report = write_run_report(recipe, history)
        write_final(recipe, backend, weights)  # last: a run that has it is finished
        print(f"{recipe.run_dir}: {summarize(report)}; the model is in {Path(recipe.run_dir) / 'final'}")


def loop_of(kind: str) -> Any:
    """The training loop of a kind of recipe."""
    from rollouts import training

    names = {"pretrain": "run_pretraining", "dpo": "run_preference_training", "reward-model": "run_reward_training"}
    return getattr(training, names.get(kind, "run_sft_training"))


def copy_checkpoint(step: Path, run_folder: Path, checkpoints: str = "checkpoints") -> None:
    """Commit a copy of another run's step as the first step of a run that is being made."""
    from rollouts.training.checkpoints import MANIFEST, checkpoint_transaction, read_json

    number = read_json(step / "trainer_state.json")["step"]
    with checkpoint_transaction(run_folder / checkpoints, number) as partial:
        shutil.copytree(step, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))


def write_final(
    recipe: TrainingRecipe, backend: PyTorchTrainingBackend, weights: Mapping[str, torch.Tensor] | None
) -> None:
    """Write the trained model to ``final/``, from ``weights`` or else from the last checkpoint.

    The adapter of a LoRA run is kept in ``adapter/``; ``final/`` is then the model with it merged in.
    """
    from rollouts.models import export_checkpoint, export_model
    from rollouts.training.checkpoints import find_latest

    folder = Path(recipe.run_dir)
    if weights is not None:
        export_model(backend.model, backend.tokenizer, folder / "final", state_dict=weights)
        return
    step = find_latest(folder / "checkpoints")
    assert step is not None, "the loop commits its last step"
    has_adapter = recipe.model.lora is not None
    if has_adapter:
        export_checkpoint(step, folder / "adapter", overwrite=True)
    export_checkpoint(step, folder / "final", merge_lora=has_adapter)


def summarize(report: Mapping[str, Any]) -> str:
    """For example ``200 steps, loss 6.2120 -> 2.3145, validation loss 2.4001``."""
    parts = [f"{report['steps']} steps"]
    metrics = report["metrics"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']['first']:.4f} -> {metrics['loss']['last']:.4f}")
    if "val_loss" in metrics:
        parts.append(f"validation loss {metrics['val_loss']['last']:.4f}")
    if report["kind"] in ("dpo", "reward-model") and "val_accuracy" in metrics:
        parts.append(f"held-out pairs in the right order {metrics['val_accuracy']['last']:.1%}")
    return ", ".join(parts)
