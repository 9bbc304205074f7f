"""From a validated recipe to the library's objects: model, samples, backend and loggers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rollouts.recipes.build_preference import build_pair_config, build_pairs
from rollouts.recipes.preference_schema import DPORecipe, RewardModelRecipe
from rollouts.recipes.schema import DataSpec, PretrainTrain, TrainingRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rollouts.training.backends.pytorch import PyTorchTrainingBackend
    from rollouts.training.datasets.dataset_loaders import SampleDataset
    from rollouts.training.datasets.preferences import PreferenceDataset
    from rollouts.training.metrics import MetricsLogger
    from rollouts.training.types import SFTTrainingConfig

log = logging.getLogger(__name__)


def build_model(recipe: TrainingRecipe, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's model, in float32 and with a fresh adapter if it asks for one, and its tokenizer.

    Raises:
        UserError: see ``load_hf_model`` and ``ModelConfig``.
    """
    from rollouts import models
    from rollouts.models.load import check_vocabulary

    section = recipe.model
    if section.init is not None:
        config = models.ModelConfig(**section.init.model_dump())
        tokenizer = models.load_tokenizer(section.tokenizer)
        model = models.make_model(config, tokenizer, seed=recipe.seed)
        count = sum(p.numel() for p in model.parameters())
        log.info("new %s model: %s parameters", config.architecture, f"{count:,}")
    else:
        if recipe.kind == "reward-model":
            model, tokenizer = models.load_reward_model(section.path, "cpu", "float32", recipe.seed)
        else:
            model, tokenizer = models.load_hf_model(section.path, device="cpu", dtype="float32")
        if section.tokenizer is not None:
            tokenizer = models.load_tokenizer(section.tokenizer)
            check_vocabulary(model, tokenizer, section.tokenizer)
    if section.lora is not None:
        targets = section.lora.target_modules
        lora = section.lora.model_dump() | {
            "target_modules": targets[0] if targets == ["all-linear"] else tuple(targets)
        }
        model = models.add_lora(model, models.LoRAConfig(**lora), seed=recipe.seed)
    return model.to(device), tokenizer


def build_samples(
    recipe: TrainingRecipe, specs: list[DataSpec], tokenizer: PreTrainedTokenizerBase
) -> SampleDataset | PreferenceDataset:
    """What some of the recipe's data holds: samples, or pairs for the kinds that learn preferences.

    Raises:
        UserError: see ``load_sft_dataset`` and ``load_preference_dataset``.
    """
    if isinstance(recipe, DPORecipe | RewardModelRecipe):
        return build_pairs(recipe, specs, tokenizer)
    from rollouts.training.datasets.dataset_loaders import load_sft_dataset
    from rollouts.training.datasets.sources import DatasetSpec

    return load_sft_dataset(
        [DatasetSpec(**spec.model_dump()) for spec in specs],
        tokenizer,
        max_length=recipe.data.max_length,
        on_bad_row=recipe.data.on_bad_row,
        cache_dir=recipe.data.cache_dir,
        seed=recipe.seed,
    )


def check_sources(recipe: TrainingRecipe) -> None:
    """Raise UserError for a source that is not there, or of an unknown kind: told before a model is loaded."""
    from rollouts.training.datasets.sources import DatasetSpec, source_names

    for spec in (*recipe.data.train, *recipe.data.validation):
        source_names(DatasetSpec(**spec.model_dump()))


def build_config(recipe: TrainingRecipe, samples: SampleDataset | PreferenceDataset) -> SFTTrainingConfig:
    """The loop's configuration; ``num_epochs`` becomes the steps that pass over the samples, or blocks, so often."""
    if isinstance(recipe, DPORecipe | RewardModelRecipe):
        return build_pair_config(recipe, len(samples))
    from rollouts.training import SFTTrainingConfig
    from rollouts.training.loops import PretrainingConfig, TokenBlocks

    train = recipe.train
    options = train.model_dump(exclude={"num_steps", "num_epochs", "max_grad_norm"}) | {"seed": recipe.seed}
    count = len(samples)
    if isinstance(train, PretrainTrain):
        count = len(TokenBlocks(cast("SampleDataset", samples), train.block_length, recipe.seed))
    num_steps = train.num_steps or math.ceil(count * (train.num_epochs or 1) / train.batch_size)
    kind = PretrainingConfig if isinstance(train, PretrainTrain) else SFTTrainingConfig
    return kind(num_steps=num_steps, **options)


def build_backend(
    recipe: TrainingRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    num_steps: int,
    use_fsdp: bool,
    value_head_lr: float | None = None,
) -> PyTorchTrainingBackend:
    """One device's backend, or the FSDP backend over all ranks."""
    from rollouts.training.backends import pytorch_factory as factory
    from rollouts.training.backends.fsdp import FSDPConfig
    from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig

    options: dict[str, Any] = {
        "checkpoint_dir": Path(recipe.run_dir) / "checkpoints",
        "precision": recipe.model.precision,
        "optimizer": OptimizerConfig(**recipe.optimizer.model_dump()),
        "value_head_lr": value_head_lr,
        "schedule": ScheduleConfig(**recipe.schedule.model_dump()),
        "num_steps": num_steps,
        "device": device,
        "max_grad_norm": recipe.train.max_grad_norm,
        "max_bad_steps": recipe.train.max_bad_steps,
        "keep_checkpoints": recipe.train.keep_checkpoints,
        "activation_checkpointing": recipe.model.activation_checkpointing,
        "compile": recipe.model.compile,
    }
    if not use_fsdp:
        return factory.create_pytorch_backend(model, tokenizer, **options)
    section = recipe.distributed
    config = FSDPConfig(
        sharding_strategy=section.sharding,
        mixed_precision=recipe.model.precision == "bfloat16",
        cpu_offload=section.cpu_offload,
        checkpoint_format=section.checkpoint_format,
    )
    return factory.create_fsdp_backend(model, tokenizer, config=config, **options)


def require_loggers(recipe: TrainingRecipe) -> None:
    """Raise UserError for a logger whose package is not installed."""
    from rollouts.training import metrics

    for name in recipe.loggers:
        if name not in ("jsonl", "console"):
            metrics.require_extra(name)


def build_loggers(recipe: TrainingRecipe, num_steps: int) -> MetricsLogger:
    """The recipe's loggers as one. A tracker that cannot start is warned about and left out."""
    from rollouts.training import metrics

    folder = Path(recipe.run_dir)
    config = recipe.model_dump(mode="json")
    makers: dict[str, Callable[[], MetricsLogger]] = {
        "jsonl": lambda: metrics.JSONLLogger(folder / "metrics.jsonl"),
        "console": lambda: metrics.ConsoleLogger(num_steps, recipe.train.log_every, recipe.kind),
        "wandb": lambda: metrics.WandbLogger(folder, config),
        "tensorboard": lambda: metrics.TensorBoardLogger(folder),
        "trackio": lambda: metrics.TrackioLogger(folder, config),
    }
    loggers = []
    for name in recipe.loggers:
        try:
            loggers.append(makers[name]())
        except Exception as error:
            log.warning(
                "warning: the %s logger cannot start and is left out: %s: %s", name, type(error).__name__, error
            )
    return metrics.CompositeLogger(loggers)
