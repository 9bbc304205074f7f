"""What a recipe may say: one strict pydantic model for each kind of run, with defaults that work.

Sections that configure an object of the library (model initialization, optimizer, data sets, ...) repeat its fields
and defaults, because importing that object would import torch; tests compare the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz")


class CommandLineText(str):
    """Text typed on the command line: a relative path in it starts at the current folder, not at the recipe's."""


def absolute_path(value: Any, info: ValidationInfo) -> Any:
    """A file or folder, made absolute: from the recipe's folder, or from the current one for an override."""
    if not isinstance(value, str) or not value:
        return value
    base = Path.cwd() if isinstance(value, CommandLineText) else (info.context or {}).get("base", Path.cwd())
    return str((base / Path(value).expanduser()).absolute())


def path_or_hub_name(value: Any, info: ValidationInfo) -> Any:
    """Like ``absolute_path``, but a name such as ``Qwen/Qwen3-0.6B`` that is no path here stays a name on the hub."""
    path = absolute_path(value, info)
    if not isinstance(path, str) or not path:
        return path
    is_path = value.startswith((".", "~", "/")) or value.endswith((*DATA_SUFFIXES, "/")) or value.count("/") > 1
    return path if is_path or Path(path).exists() else str(value)


def text_is_path(value: Any) -> Any:
    """Shorthand: a section that is only a path may be written as that path."""
    return {"path": value} if isinstance(value, str) else value


def one_is_a_list(value: Any) -> Any:
    """Shorthand: a list of one may be written without the brackets."""
    return value if isinstance(value, list) or value is None else [value]


FilePath = Annotated[str, BeforeValidator(absolute_path), Field(min_length=1)]
PathOrHubName = Annotated[str, BeforeValidator(path_or_hub_name), Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DataSpec(Section):
    """One source of rows.

    path: file, folder or hub name. repeat: passes over it in one epoch of the mixture (0.5 takes half).
    weight: share of the mixture instead of repeat. max_samples: use only so many of its rows.
    subset, split: for a hub name. text_field: the column that holds plain text.
    """

    path: PathOrHubName
    repeat: float = Field(1.0, gt=0)
    weight: float | None = Field(None, gt=0)
    max_samples: int | None = Field(None, ge=1)
    subset: str | None = None
    split: str = "train"
    text_field: str | None = None


DataSpecs = Annotated[list[Annotated[DataSpec, BeforeValidator(text_is_path)]], BeforeValidator(one_is_a_list)]


class Data(Section):
    """What to learn from.

    max_length: longer conversations are skipped and counted, never cut (null: no limit). on_bad_row: fail at the first
    malformed row or skip it and count. cache_dir: where tokenized data is kept (null: the user's cache folder).
    """

    train: DataSpecs = Field(min_length=1)
    validation: DataSpecs = []
    max_length: int | None = Field(None, ge=2)
    on_bad_row: Literal["fail", "skip"] = "fail"
    cache_dir: FilePath | None = None


class ModelInit(Section):
    """The shape of a model made from scratch with random weights. The vocabulary's size comes from the tokenizer."""

    architecture: Literal["qwen3", "qwen2", "llama"] = "qwen3"
    hidden_size: int = Field(320, ge=1)
    num_layers: int = Field(6, ge=1)
    num_heads: int = Field(5, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    vocab_size: int | None = Field(None, ge=1)
    tie_embeddings: bool = True
    max_position_embeddings: int = Field(32768, ge=1)
    rope_theta: float = Field(1e6, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)


class Lora(Section):
    """Train low-rank adapters instead of the weights. target_modules: names, or all-linear."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[list[str], BeforeValidator(one_is_a_list)] = ["all-linear"]


class Model(Section):
    """Which weights to start from: a folder or hub name (path), or random ones (init, with a tokenizer's folder)."""

    path: PathOrHubName | None = None
    init: ModelInit | None = None
    tokenizer: PathOrHubName | None = None
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    lora: Lora | None = None
    activation_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path and self.init:
            raise ValueError("path and init exclude one another; keep one (--model.init null drops the other)")
        if not self.path and not self.init:
            raise ValueError(
                "says neither path nor init; set model.path to a folder or hub name, or model.init to a shape"
            )
        if self.init and not self.tokenizer:
            raise ValueError("init needs a tokenizer; set model.tokenizer to a folder that holds one")
        if self.init and self.lora:
            raise ValueError("init and lora exclude one another; an adapter on random weights learns next to nothing")
        return self


class Train(Section):
    """How long and how to train; the meaning of each key is ``rollouts.training.SFTTrainingConfig``'s.

    num_epochs: passes over the data, turned into num_steps (one of the two; one epoch when neither is given).
    """

    num_steps: int | None = Field(None, ge=1)
    num_epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(32, ge=1)
    max_tokens_per_micro_batch: int = Field(8192, ge=1)
    packing: bool = True
    shuffle: bool = True
    log_every: int = Field(10, ge=0)
    eval_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(0, ge=0)
    keep_checkpoints: int = Field(3, ge=0)
    early_stopping_patience: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_bad_steps: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.num_steps and self.num_epochs:
            raise ValueError(
                "num_steps and num_epochs exclude one another; keep one (--train.num_epochs null drops the other)"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW for every weight, or Muon for the matrices of the layers and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    muon_lr: float = Field(0.02, gt=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)


class Schedule(Section):
    """How the learning rate moves: warm-up, then down to min_lr_ratio of the peak.

    warmup_steps: null takes warmup_ratio of the run. start_ratio: the factor at step 0 of the warm-up. decay_ratio: the
    share of the run that wsd (warm-up, stable, decay) spends decaying.
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    warmup_steps: int | None = Field(None, ge=0)
    start_ratio: float = Field(0.1, ge=0, le=1)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    decay_ratio: float = Field(0.2, gt=0, le=1)


class Distributed(Section):
    """How several devices share the work; auto means FSDP under torchrun and one device otherwise."""

    strategy: Literal["auto", "none", "fsdp"] = "auto"
    sharding: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"] = "FULL_SHARD"
    cpu_offload: bool = False
    checkpoint_format: Literal["full", "sharded"] = "full"


LoggerName = Literal["jsonl", "console", "wandb", "tensorboard", "trackio"]


class Recipe(Section):
    """What every kind of run has. run_dir: the run's folder (default: runs/<recipe's name> in the current folder)."""

    keep_nulls: ClassVar[bool] = False  # write keys without a value too, where that differs from leaving them out

    kind: str
    run_dir: FilePath
    seed: int = Field(0, ge=0, lt=2**32)


class TrainingRecipe(Recipe):
    """What sft and pretrain have in common."""

    device: str = "auto"
    model: Annotated[Model, BeforeValidator(text_is_path)]
    data: Data
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    distributed: Distributed = Distributed()
    loggers: list[LoggerName] = ["jsonl", "console"]

    @model_validator(mode="after")
    def _adapters_are_whole(self) -> Self:
        if self.model.lora and self.distributed.checkpoint_format == "sharded":
            raise ValueError("model.lora and distributed.checkpoint_format: sharded exclude one another; use full")
        return self


class SFTRecipe(TrainingRecipe):
    """Supervised fine-tuning: learn the assistant's turns of conversations."""

    kind: Literal["sft"] = "sft"


class PretrainTrain(Train):
    """As Train, with batch_size counting blocks. block_length: tokens of a block."""

    block_length: int = Field(512, ge=2)


class PretrainRecipe(TrainingRecipe):
    """Pre-training: learn every token of documents, cut into blocks of equal length."""

    kind: Literal["pretrain"] = "pretrain"
    train: PretrainTrain = PretrainTrain()


class TokenizerTraining(Section):
    """How to train a tokenizer.

    vocab_size counts the special tokens. A pair seen less often than min_frequency is never merged.
    """

    vocab_size: int = Field(ge=1)
    min_frequency: int = Field(2, ge=1)


class TokenizerData(Section):
    """The text to learn a vocabulary from."""

    train: DataSpecs = Field(min_length=1)


class TokenizerRecipe(Recipe):
    """A byte-level BPE tokenizer with a chat template, written to run_dir."""

    kind: Literal["tokenizer"] = "tokenizer"
    data: TokenizerData
    tokenizer: TokenizerTraining


class SpeedrunStage(Section):
    """How the speedrun trains one model; batch_size counts blocks (base) or conversations (sft)."""

    batch_size: int = Field(ge=1)
    num_epochs: float = Field(1.0, gt=0)
    block_length: int = Field(256, ge=2)
    optimizer: Optimizer = Optimizer(name="muon", lr=3e-3)
    schedule: Schedule = Schedule(name="linear", min_lr_ratio=0.0)
    log_every: int = Field(50, ge=0)
    eval_every: int = Field(100, ge=0)
    checkpoint_every: int = Field(200, ge=0)


class SpeedrunRL(Section):
    """How the speedrun's chat model learns from its own answers.

    families: of problems to ask. num_steps: batches of prompts x samples answers, each learned from in
    mini_batches optimizer steps. max_tokens: of an answer.
    """

    families: list[str] = Field(min_length=1)
    num_steps: int = Field(ge=1)
    prompts: int = Field(16, ge=1)
    samples: int = Field(8, ge=2)
    mini_batches: int = Field(1, ge=1)
    max_tokens: int = Field(48, ge=1)
    optimizer: Optimizer = Optimizer(lr=1e-3)
    schedule: Schedule = Schedule(name="linear", min_lr_ratio=0.1)
    log_every: int = Field(20, ge=0)
    checkpoint_every: int = Field(100, ge=0)


class SpeedrunRecipe(Recipe):
    """The whole pipeline on data made by code.

    documents, conversations: how many to make. validation: how many of each for the validation loss. held_out:
    questions a family of tasks. rehearsal: share of the documents that sft reads again. careless: share of wrong
    demonstrations of comparing, sorting and reversing, which sft imitates and rl unlearns. precision: auto takes
    bfloat16 where the device has instructions for it. max_new_tokens, temperature: of the sampled replies.
    """

    kind: Literal["speedrun"] = "speedrun"
    device: str = "auto"
    documents: int = Field(ge=1)
    conversations: int = Field(ge=1)
    validation: int = Field(ge=1)
    held_out: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    model: ModelInit
    base: SpeedrunStage
    sft: SpeedrunStage
    rl: SpeedrunRL
    rehearsal: float = Field(0.1, ge=0)
    careless: float = Field(0.55, ge=0, le=1)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.8, ge=0)


KINDS: dict[str, type[Recipe]] = {
    "sft": SFTRecipe,
    "pretrain": PretrainRecipe,
    "tokenizer": TokenizerRecipe,
    "speedrun": SpeedrunRecipe,
}
