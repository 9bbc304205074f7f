"""Optimizers and learning-rate schedules: what they are made of, and how their state becomes plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.models.critic import is_value_head

Schedule = Callable[[int], float]
"""Optimizer step (0-based) -> factor that multiplies every group's base learning rate."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, with which hyper-parameters.

    Args:
        name: ``"adamw"``, or ``"muon"`` for Muon on the hidden matrices and AdamW on embeddings, output projection,
            norms and biases (https://kellerjordan.github.io/posts/muon).
        lr, betas, eps, weight_decay: AdamW's; weight decay is never applied to vectors (norms and biases).
        muon_lr, muon_momentum: Muon's own; ``muon_lr`` is not on AdamW's scale (0.02 is usual from scratch).
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon_lr: float = 0.02
    muon_momentum: float = 0.95


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over ``num_steps`` optimizer steps.

    Args:
        name: ``constant``, ``linear`` or ``cosine`` decay to ``min_lr_ratio``, or ``wsd`` (warm-up, stable, linear
            decay over the last ``decay_ratio`` of the run; arXiv:2404.06395).
        warmup_steps: steps of linear warm-up; None takes ``warmup_ratio`` of the run.
        start_ratio: factor at step 0 of the warm-up.
    """

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    start_ratio: float = 0.1
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2


def make_schedule(config: ScheduleConfig, num_steps: int) -> Schedule:
    """The factor as a pure function of the step; it reaches ``min_lr_ratio`` at the last step ``num_steps - 1``."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * num_steps)
    last = max(num_steps - 1, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return config.start_ratio + (1.0 - config.start_ratio) * step / warmup
        if config.name == "constant":
            return 1.0
        begin = max(warmup, round((1.0 - config.decay_ratio) * num_steps)) if config.name == "wsd" else warmup
        progress = min(max(step - begin, 0) / max(last - begin, 1), 1.0)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.name == "cosine" else 1.0 - progress
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape

    return factor


def create_warmup_cosine_scheduler(
    num_steps: int, warmup_ratio: float = 0.03, min_lr_ratio: float = 0.1, start_ratio: float = 0.1
) -> Schedule:
    """Linear warm-up from ``start_ratio``, then cosine decay to ``min_lr_ratio``, over ``num_steps`` steps."""
    config = ScheduleConfig("cosine", warmup_ratio, None, start_ratio, min_lr_ratio)
    return make_schedule(config, num_steps)


class CombinedOptimizer:
    """Several optimizers that step as one, each over its own parameters."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


AnyOptimizer = torch.optim.Optimizer | CombinedOptimizer
OptimizerFactory = Callable[[nn.Module], AnyOptimizer]


def optimizer_name(optimizer: AnyOptimizer) -> str:
    """What kind of moments it has: ``"AdamW"``, ``"Muon+AdamW"``."""
    return "+".join(type(inner).__name__ for inner in _inner_optimizers(optimizer))


def _inner_optimizers(optimizer: AnyOptimizer) -> list[torch.optim.Optimizer]:
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]


def create_adamw_optimizer(
    model: nn.Module,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, vectors don't."""
    return _adamw(trainable_parameters(model), OptimizerConfig("adamw", lr, betas, eps, weight_decay))


def create_optimizer(model: nn.Module, config: OptimizerConfig, value_head_lr: float | None = None) -> AnyOptimizer:
    """The optimizer of ``config`` over the trainable parameters of ``model`` (wrap the model first, then call this).

    Args:
        value_head_lr: of a value head (``add_value_head``), which starts from nothing; None = ``config.lr``.

    Raises:
        UserError: nothing to train, or an unknown name.
    """
    named = trainable_parameters(model)
    if not named:
        raise UserError("the model has no trainable parameter: check model.lora.target_modules or requires_grad")
    if config.name == "adamw":
        return _adamw(named, config, value_head_lr)
    if config.name == "muon":
        hidden, rest = _split_for_muon(model, named)
        muon = torch.optim.Muon(
            [p for _, p in hidden],
            lr=config.muon_lr,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
        )
        return CombinedOptimizer([muon, _adamw(rest, config, value_head_lr)]) if rest else muon
    raise UserError(f"optimizer.name {config.name!r} is not known: use adamw or muon")


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that trains, each tied parameter once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _adamw(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, value_head_lr: float | None = None
) -> torch.optim.AdamW:
    named = list(named)
    head = [p for name, p in named if is_value_head(name)]
    params = [p for name, p in named if not is_value_head(name)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        {"params": head, "weight_decay": 0.0, "lr": value_head_lr or config.lr},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _split_for_muon(
    model: nn.Module, named: list[tuple[str, nn.Parameter]]
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = [n for n, _ in named if "lm_head" in n or is_value_head(n)]
    hidden = [(n, p) for n, p in named if p.ndim == 2 and id(p) not in tables and n not in heads]
    chosen = {id(p) for _, p in hidden}
    return hidden, [(n, p) for n, p in named if id(p) not in chosen]


def optimizer_state(optimizer: AnyOptimizer, names: dict[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every moment as (``"<parameter name>#<state key>"``, tensor); ``names`` maps ``id(parameter)`` to its name."""
    for inner in _inner_optimizers(optimizer):
        for parameter, state in inner.state.items():
            for key, value in state.items():
                yield f"{names[id(parameter)]}#{key}", torch.as_tensor(value)


def load_optimizer_state(
    optimizer: AnyOptimizer, parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    """Inverse of ``optimizer_state``. ``parameters`` maps names to the optimizer's own parameters.

    A parameter that has never had a gradient has no state, and gets none.

    Raises:
        UserError: the state belongs to other parameters or another optimizer.
    """
    owner: dict[int, torch.optim.Optimizer] = {}
    fused: set[int] = set()
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            owner |= {id(p): inner for p in group["params"]}
            fused |= {id(p) for p in group["params"] if group.get("fused")}
    expected = {name for name, p in parameters.items() if id(p) in owner}
    found = {key.rpartition("#")[0] for key in tensors}
    if foreign := sorted(found - expected):
        raise UserError(
            f"optimizer state does not fit this model: it has moments of {foreign[0]!r}, which does not train here; "
            "resume with the model and optimizer of the run, or load weights only"
        )
    for inner in set(owner.values()):
        inner.state.clear()
    for key, value in tensors.items():
        name, _, field = key.rpartition("#")
        parameter = parameters[name]
        # Step counts stay on the host, except that fused kernels read them on the device.
        at = parameter.device if id(parameter) in fused else value.device
        owner[id(parameter)].state[parameter][field] = value.to(at)
