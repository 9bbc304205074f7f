"""The values that flow through training: samples, batches and configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from rollouts.types import ImmediateTrainFuture, TrainFuture, WeightSpan

if TYPE_CHECKING:
    import torch

__all__ = [
    "ImmediateTrainFuture",
    "RLSample",
    "RLTrainingConfig",
    "RolloutBatch",
    "SFTTrainingConfig",
    "Sample",
    "SampleStatus",
    "TrainFuture",
    "WeightSpan",
]


class SampleStatus(StrEnum):
    """How far a sample got: only COMPLETED and TRUNCATED samples carry a whole response."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Sample:
    """One sequence to learn from: a conversation (SFT), a document (pre-training) or a rollout (RL).

    Every per-token field has ``len(tokens)`` entries and index ``t`` speaks of ``tokens[t]`` itself,
    not of the prediction made at ``t``: ``loss_mask[t] == 1`` means "learn to produce ``tokens[t]``".
    ``rollout_log_probs`` and ``advantages`` may be given for the masked tokens' full length or be None.

    Raises:
        ValueError: a per-token field's length differs from ``len(tokens)``.
    """

    tokens: Sequence[int] = ()
    loss_mask: Sequence[float] = ()
    prompt: str | list[dict[str, Any]] = ""
    response: str = ""
    id: str = ""
    group_id: str = ""
    rollout_log_probs: Sequence[float] | None = None
    advantages: Sequence[float] | None = None
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    status: SampleStatus = SampleStatus.COMPLETED
    stop_reason: str | None = None
    weight_versions: list[WeightSpan] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.tokens)
        for name in ("loss_mask", "rollout_log_probs", "advantages"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ValueError(f"Sample {self.id!r}: {name} has {len(values)} entries for {n} tokens")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss: masked in, and not the first (nothing predicts a first token)."""
        mask: Any = self.loss_mask[1:]
        if hasattr(mask, "tolist"):  # an array
            mask = mask.tolist()
        return len(mask) - mask.count(0)

    @property
    def input_ids(self) -> torch.Tensor:
        """``tokens`` as an int64 tensor [len]."""
        import torch

        return torch.as_tensor(self.tokens, dtype=torch.int64)

    labels = input_ids  # the loss shifts; labels are the tokens themselves

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; ``from_dict`` gives back an equal sample."""
        # Without the lists, of which `asdict` would look at every number.
        d = asdict(replace(self, tokens=(), loss_mask=(), rollout_log_probs=None, advantages=None))
        d["status"] = self.status.value
        for name in ("tokens", "loss_mask", "rollout_log_probs", "advantages"):
            values = getattr(self, name)
            d[name] = None if values is None else [x.item() if hasattr(x, "item") else x for x in values]
        return d

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """Inverse of ``to_dict``; leaves ``data`` untouched, keeps unknown keys in ``metadata``."""
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        known["status"] = SampleStatus(known.get("status", SampleStatus.COMPLETED))
        known["weight_versions"] = [
            w if isinstance(w, WeightSpan) else WeightSpan(**w) for w in known.get("weight_versions", ())
        ]
        known["metadata"] = {**known.get("metadata", {}), **{k: v for k, v in data.items() if k not in known}}
        return cls(**known)


RLSample = Sample  # the checklist's second name for the same thing


@dataclass(frozen=True)
class SFTTrainingConfig:
    """How long and how to train; everything about the model and optimizer lives in the backend.

    Args:
        num_steps: optimizer steps in the whole run (a resumed run stops at the same step).
        batch_size: samples per optimizer step, over all ranks and micro-batches.
        max_tokens_per_micro_batch: tokens of one packed forward pass on one rank; a longer sample has one to itself.
        packing: pack samples of a step back to back, isolated from one another; False pads them into rows.
        shuffle, seed: reshuffle every epoch from ``(seed, epoch)``; False keeps the given order.
        log_every, eval_every, checkpoint_every: steps between console lines, validations and checkpoints; 0 = never
            (a checkpoint at the last step is always written, and the last step is always validated).
        early_stopping_patience: stop after this many validations without a lower loss; 0 = never.
        keep_checkpoints: newest checkpoints kept on disk; 0 keeps all.
        max_bad_steps: abort after this many steps in a row with a non-finite gradient.
    """

    num_steps: int
    batch_size: int
    max_tokens_per_micro_batch: int = 8192
    packing: bool = True
    shuffle: bool = True
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0
    early_stopping_patience: int = 0
    keep_checkpoints: int = 3
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "max_tokens_per_micro_batch", "max_bad_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("log_every", "eval_every", "checkpoint_every", "early_stopping_patience", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (never) or more, got {getattr(self, name)}")


TrainingConfig = SFTTrainingConfig


@dataclass
class RolloutBatch:
    """The finished rollouts of one training step: whole groups, those of one prompt side by side.

    Args:
        samples: every one of them, also those that failed (nothing is learned from them).
        epoch_id: passes over the prompts when the last of them was dealt.
        step_id: the training step that the batch is for, counting from 0.
        metadata: how it came about, for example ``{"dropped": {"zero_variance": 3}}``.
    """

    samples: list[Sample]
    epoch_id: int = 0
    step_id: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> list[Sequence[int]]:
        return [s.tokens for s in self.samples]

    @property
    def loss_masks(self) -> list[Sequence[float]]:
        return [s.loss_mask for s in self.samples]

    @property
    def rewards(self) -> list[float | None]:
        """None where a sample has no reward, which is not a reward of 0."""
        return [s.reward for s in self.samples]

    @property
    def response_lengths(self) -> list[int]:
        """Learned tokens of each sample."""
        return [s.num_loss_tokens for s in self.samples]


@dataclass(frozen=True)
class RLTrainingConfig:
    """How to learn from rollouts; how they are made (prompts a step, samples a prompt) is ``RolloutConfig``'s.

    A step consumes one batch of rollouts: ``num_epochs`` passes over it, each in ``mini_batches`` optimizer steps.

    Args:
        num_steps: batches of rollouts in the whole run (a resumed run stops at the same step).
        batch_size: prompts a step, where no rollout manager says it: rollouts stored on disk, for example.
        mini_batches: optimizer steps in one pass over a batch; groups may be divided over them.
        num_epochs: passes over a batch; its mini-batches are drawn anew for each.
        max_tokens_per_micro_batch: tokens of one packed forward pass on one rank; a longer sample has one to itself.
        advantage: name of an estimator in ``rollouts.training.algorithms``, or a function in its form.
        advantage_options: the estimator's own options, for example ``{"norm_by_std": False}``.
        baseline: a constant subtracted from every reward, instead of an estimator; None = use ``advantage``.
        loss: ``PolicyLossConfig``, its options as a mapping, or a loss function; None = the backend's own loss if it
            was given one, else a clipped policy loss with its defaults.
        correction: of the gap between sampler and trainer, a ``CorrectionConfig`` or its name; None = the loss's own,
            or ``tis`` where rollouts may be stale.
        temperature: at which the rollouts were sampled, and at which log-probs are computed.
        kl_in_reward: weight of the KL to the reference model subtracted from each token's reward; 0 = none.
        old_log_probs: whose log-probs the loss compares with: ``trainer`` computes them once at the start of a step,
            ``rollout`` takes the sampler's, ``auto`` computes them where several optimizer steps a batch need them
            (with one they equal the log-probs of the loss itself, however old the rollouts are).
        max_staleness: how many steps the weights that sampled a token may lag behind those that learn from it. 0 waits
            for every batch; k generates up to k batches ahead while training goes on.
        sync_every: steps between weight updates of the engines.
        learning_rate: of every step, instead of the backend's own schedule.
        value_steps: steps at the start in which the critic alone learns (PPO).
        value_coef, value_clip: weight and clip of the value loss where the critic is a head on the policy's trunk.
        seed: of everything random in the loop.
        log_every, eval_every, checkpoint_every: steps between console lines, evaluations and checkpoints; 0 = never
            (a checkpoint at the last step is always written, and the last step is always evaluated).
        keep_checkpoints: newest checkpoints kept on disk; 0 keeps all.
        max_bad_steps: abort after this many gradients in a row that are not finite.
    """

    num_steps: int
    batch_size: int | None = None
    mini_batches: int = 1
    num_epochs: int = 1
    max_tokens_per_micro_batch: int = 8192
    advantage: str | Callable[..., Any] = "grpo"
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    baseline: float | None = None
    loss: Any = None
    correction: Any = None
    temperature: float = 1.0
    kl_in_reward: float = 0.0
    old_log_probs: Literal["auto", "trainer", "rollout"] = "auto"
    max_staleness: int = 0
    sync_every: int = 1
    learning_rate: float | None = None
    value_steps: int = 0
    value_coef: float = 0.1
    value_clip: float | None = 0.5
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        at_least_one = ("num_steps", "mini_batches", "num_epochs", "max_tokens_per_micro_batch", "sync_every")
        for name in (*at_least_one, "max_bad_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        never = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        for name in ("max_staleness", "kl_in_reward", "value_steps", "value_coef", *never):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("batch_size", "learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if self.old_log_probs not in ("auto", "trainer", "rollout"):
            raise ValueError(f"old_log_probs is {self.old_log_probs!r}; use auto, trainer or rollout")
