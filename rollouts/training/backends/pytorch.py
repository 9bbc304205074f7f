"""Training on one device: weights, optimizer and their checkpoints behind the few verbs of ``TrainingBackend``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.failpoints import failpoint
from rollouts.models.critic import VALUE_HEAD, is_value_head, without_value_head
from rollouts.models.export import write_model
from rollouts.models.gated_mlp import use_gated_products
from rollouts.models.load import cast_parameters
from rollouts.models.products import use_fast_products
from rollouts.models.rotated_heads import use_rotated_heads
from rollouts.training.backends.loss_model import LossModel
from rollouts.training.backends.master_weights import MasterWeights
from rollouts.training.backends.optimizers import (
    AnyOptimizer,
    OptimizerFactory,
    Schedule,
    load_optimizer_state,
    optimizer_name,
    optimizer_state,
    trainable_parameters,
)
from rollouts.training.backends.protocol import Batch, Metrics
from rollouts.training.backends.readers import (
    collision_reader,
    log_prob_and_value_reader,
    log_prob_reader,
    read_values,
    reference_reader,
)
from rollouts.training.backends.sharded import has_shards, read_shards
from rollouts.training.checkpoints import (
    checkpoint_transaction,
    find_latest,
    read_json,
    read_tensors,
    require_same,
    sweep_orphans,
    write_json,
    write_tensors,
)
from rollouts.training.hardware import keep_freed_memory
from rollouts.training.rng import capture_rng, restore_rng
from rollouts.training.sft_losses import LossFn, LossOutput, as_loss_output, causal_lm_loss
from rollouts.training.types import TrainFuture

T = TypeVar("T")

_HEAD_FILE = f"{VALUE_HEAD}.safetensors"  # apart, so that a step is a model folder like any other


class PyTorchTrainingBackend:
    """``TrainingBackend`` on one device.

    Operations run when they are called; on CUDA only the reading of their results waits for the device. Parameters in
    half precision get float32 master weights, which is what the optimizer steps and what a checkpoint holds.

    Args:
        model: a transformers causal language model (or peft model); moved to ``device``.
        optimizer: over ``model.parameters()``, or a factory ``model -> optimizer``.
        loss_fn: ``(logits, labels, loss_mask, **other batch fields)`` -> LossOutput, or a scalar mean over tokens.
        checkpoint_dir: folder of ``step_NNNNNN/``; None = no checkpoints.
        device: None = where the model is.
        precision: to compute in; None = as the parameters are.
        tokenizer: saved beside the weights, so that a step is a complete model folder.
        schedule: factor of the learning rate per applied step; None = constant.
        max_grad_norm: global norm to which gradients are clipped; None = no clipping.
        max_bad_steps: raise after this many non-finite gradients in a row.
        keep_checkpoints: newest steps kept on disk; 0 keeps all.
        activation_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: compile each decoder layer (needs a C++ compiler on the CPU; tens of seconds at the first step).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer | OptimizerFactory,
        loss_fn: LossFn = causal_lm_loss,
        checkpoint_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        *,
        precision: torch.dtype | None = None,
        tokenizer: Any = None,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        max_bad_steps: int = 5,
        keep_checkpoints: int = 3,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        self.rank, self.world_size = 0, 1
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model
        self.loss_fn = loss_fn
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.max_bad_steps = max_bad_steps
        self.keep_checkpoints = keep_checkpoints
        self.step = 0  # optimizer steps applied; the schedule's clock
        self.weight_version = 0  # changes of the weights, by a step or by loading
        self.skipped_steps = 0
        self._bad_in_a_row = 0
        # What the accumulated gradient is to be divided by.
        self._count = torch.zeros((), dtype=torch.float32, device=self.device)
        self._norm: torch.Tensor | None = None
        self._poison: str | None = None

        self._loss_model = LossModel(model)
        use_fast_products(model)
        use_gated_products(model)
        use_rotated_heads(model)
        if activation_checkpointing:
            _checkpoint_activations(model)
        if compile:
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)
        self._place_model()
        exact = {name: p.detach() for name, p in trainable_parameters(model)}  # before rounding to `precision`
        if precision is not None:
            cast_parameters(model, precision)
        self.optimizer = optimizer(model) if callable(optimizer) else optimizer
        self._weights = MasterWeights(trainable_parameters(model), self.optimizer, exact)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    # The verbs ------------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch | Sequence[Batch]) -> TrainFuture[Metrics]:
        return self._submit("forward_backward", lambda: self._forward_backward(_as_list(batch)))

    def optim_step(self, lr: float | None = None, max_grad_norm: float | None = None) -> TrainFuture[Metrics]:
        return self._submit("optim_step", lambda: self._optim_step(lr, max_grad_norm))

    def evaluate(self, batch: Batch | Sequence[Batch]) -> TrainFuture[Metrics]:
        return self._submit("evaluate", lambda: self._evaluate(_as_list(batch)))

    def compute_log_probs(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0, adapter: bool = True
    ) -> TrainFuture[list[torch.Tensor]]:
        if not adapter and not hasattr(self.model, "peft_config"):
            raise UserError("log-probs without the adapter need a model that has one; see model.lora")
        reader = log_prob_reader(temperature)
        return self._submit("compute_log_probs", lambda: self._read(_as_list(batch), reader, adapter))

    def compute_collisions(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0
    ) -> TrainFuture[list[torch.Tensor]]:
        reader = collision_reader(temperature)
        return self._submit("compute_collisions", lambda: self._read(_as_list(batch), reader))

    def compute_values(self, batch: Batch | Sequence[Batch]) -> TrainFuture[list[torch.Tensor]]:
        return self._submit("compute_values", lambda: self._read(_as_list(batch), read_values))

    def compute_log_probs_and_values(
        self, batch: Batch | Sequence[Batch], temperature: float = 1.0
    ) -> TrainFuture[list[torch.Tensor]]:
        """Both [N, 2] in one pass, of a model with a value head."""
        reader = log_prob_and_value_reader(temperature)
        return self._submit("compute_log_probs_and_values", lambda: self._read(_as_list(batch), reader))

    def compute_base_states(self, batches: Sequence[Batch]) -> TrainFuture[list[Any]]:
        """``ref_logits`` of each micro-batch by the base beneath the adapter; see ``reference_reader``."""
        reader = reference_reader(is_base=True)
        return self._submit("compute_base_states", lambda: self._read(batches, reader, adapter=False))

    def save_checkpoint(
        self, step: int, metrics: Metrics | None = None, state: dict[str, Any] | None = None
    ) -> TrainFuture[Path]:
        return self._submit("save_checkpoint", lambda: self._save_checkpoint(step, metrics or {}, state or {}))

    def load_checkpoint(self, path: str | Path) -> TrainFuture[dict[str, Any]]:
        def load() -> dict[str, Any]:
            self._poison = "load_checkpoint failed before"  # until all of it is in place, the state is unknown
            state = self._load_checkpoint(Path(path))
            self._poison = None
            return state

        self._poison = None  # loading is what puts a failed backend into a known state again
        return self._submit("load_checkpoint", load)

    def get_weights(self) -> TrainFuture[dict[str, torch.Tensor]]:
        return self._submit("get_weights", self._get_weights)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> TrainFuture[None]:
        return self._submit("load_weights", lambda: self._load_weights(weights))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision of the model's matrix products."""
        return next(self.model.parameters()).dtype

    def find_checkpoint(self) -> Path | None:
        """The committed step to resume from, after sweeping what a killed run left; None if there is none."""
        if self.checkpoint_dir is None:
            return None
        sweep_orphans(self.checkpoint_dir)
        return find_latest(self.checkpoint_dir)

    def _submit(self, operation: str, run: Callable[[], T | Callable[[], T]]) -> TrainFuture[T]:
        """Run now. ``run`` returns the value, or a function that reads it from the device when someone asks."""
        future: TrainFuture[T] = TrainFuture(operation)
        if self._poison is not None:
            future.set_exception(RuntimeError(f"{operation} refused: {self._poison}; load a checkpoint first"))
            return future
        try:
            value = run()
        except Exception as error:
            if not isinstance(error, UserError):
                self._poison = f"{operation} failed before ({type(error).__name__}: {error})"
            future.set_exception(error)
            return future
        if callable(value):
            future.set_lazy_result(value)
        else:
            future.set_result(value)
        return future

    # Gradients ------------------------------------------------------------------------------------------------------

    def _forward_backward(self, batches: Sequence[Batch]) -> Callable[[], Metrics]:
        self.model.train()
        outputs = []
        for i, batch in enumerate(batches):
            self._sync_gradients(i == len(batches) - 1)
            output = self._loss(batch)
            output.total.backward()
            outputs.append(_detached(output))
        names, sums = self._global_sums(outputs)
        self._count = self._count + sums[1]
        self._norm = self._gradient_norm()
        norm = self._norm / self._count.clamp(min=1.0)
        return lambda: {**_means(names, sums), "grad_norm": norm.item()}

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[Batch]) -> Callable[[], Metrics]:
        self.model.eval()
        names, sums = self._global_sums([_detached(self._loss(batch)) for batch in batches])
        return lambda: _means(names, sums)

    @torch.no_grad()
    def _read(self, batches: Sequence[Batch], reader: LossFn, adapter: bool = True) -> list[torch.Tensor]:
        self.model.eval()
        with nullcontext() if adapter else self.model.disable_adapter():  # type: ignore[operator]
            return [self._loss_model(self._to_device(batch), reader) for batch in batches]

    def _loss(self, batch: Batch) -> LossOutput:
        placed = self._to_device(batch)
        return as_loss_output(self._loss_model(placed, self.loss_fn), placed["loss_mask"])

    @torch.no_grad()
    def _optim_step(self, lr: float | None, max_grad_norm: float | None) -> Metrics:
        if self._norm is None:
            raise UserError("optim_step has no gradient to apply: call forward_backward first")
        norm = (self._norm / self._count.clamp(min=1.0)).item()
        metrics = {"grad_norm": norm}
        if math.isfinite(norm):
            self._apply_gradient(norm, lr, max_grad_norm)
            self._bad_in_a_row = 0
        else:
            self.skipped_steps += 1
            self._bad_in_a_row += 1
        self._weights.zero_grad()
        self._count, self._norm = torch.zeros_like(self._count), None
        if self._bad_in_a_row >= self.max_bad_steps:
            raise FloatingPointError(
                f"{self._bad_in_a_row} gradients in a row were not finite; the weights are those before the first of "
                "them. Lower the learning rate, or look at the batches of these steps"
            )
        current = self.optimizer.param_groups[0]["lr"]
        skipped = float(not math.isfinite(norm))
        return metrics | {"lr": current, "step": self.step, "skipped": skipped, "skipped_steps": self.skipped_steps}

    def _apply_gradient(self, norm: float, lr: float | None, max_grad_norm: float | None) -> None:
        limit = max_grad_norm if max_grad_norm is not None else self.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit is not None else 1.0
        torch._foreach_mul_(self._weights.gradients(), clip / max(self._count.item(), 1.0))  # the one division
        factor = self.schedule(self.step) if self.schedule is not None else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr if lr is not None else group["initial_lr"] * factor
        self.optimizer.step()
        self._weights.publish()
        self.step += 1
        self.weight_version += 1

    def _to_device(self, batch: Batch) -> Batch:
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }

    def _global_sums(self, outputs: list[LossOutput]) -> tuple[list[str], torch.Tensor]:
        """Metric names, and [loss sum, loss count, then (sum, count) a metric] over micro-batches and ranks."""
        names = list(outputs[0].metrics)
        rows = [
            torch.stack([o.total, o.count, *(x.float() for name in names for x in o.metrics[name])]) for o in outputs
        ]
        return names, self._all_reduce(torch.stack(rows).sum(dim=0))

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, step: int, metrics: Metrics, state: dict[str, Any]) -> Path:
        if self.checkpoint_dir is None:
            raise UserError("this backend has no checkpoint_dir: give one to save checkpoints")
        failpoint("train.after_optim_step")
        trainer = self._trainer_state(step, metrics, state)
        weights = dict(self._host_tensors(self._saved_weights().items()))
        moments = dict(self._host_tensors(self._moments()))
        root = self.checkpoint_dir

        def write() -> None:
            with checkpoint_transaction(root, step, self.keep_checkpoints) as partial:
                write_model(self.model, self.tokenizer, partial, state_dict=weights)  # type: ignore[arg-type]
                if head := {name: weight for name, weight in weights.items() if is_value_head(name)}:
                    write_tensors(partial / _HEAD_FILE, head)
                write_tensors(partial / "optimizer.safetensors", moments)
                write_json(partial / "trainer_state.json", trainer)

        self._on_main_rank(write)
        return root / f"step_{step:06d}"

    def _trainer_state(self, step: int, metrics: Metrics, state: dict[str, Any]) -> dict[str, Any]:
        """What a step holds beside tensors; the same on every rank."""
        return {
            "step": step,
            "optimizer_step": self.step,
            "weight_version": self.weight_version,
            "skipped_steps": self.skipped_steps,
            "bad_steps_in_a_row": self._bad_in_a_row,
            "world_size": self.world_size,
            "optimizer": optimizer_name(self.optimizer),
            "moments": {key: value.ndim > 0 for key, value in self._moments()},
            "metrics": metrics,
            "rng": self._gather(capture_rng()),
            "state": state,
        }

    def _load_checkpoint(self, folder: Path) -> dict[str, Any]:
        trainer = read_json(folder / "trainer_state.json")
        require_same({"optimizer": trainer["optimizer"]}, {"optimizer": optimizer_name(self.optimizer)}, folder)
        if has_shards(folder):
            moments = self._read_sharded_tensors(folder, trainer["moments"], trainer["weights"])
        else:
            self._load_all(self._read_weights(folder))
            moments = self._place_moments(read_tensors(folder / "optimizer.safetensors"))
        load_optimizer_state(self.optimizer, self._weights.masters, moments)
        self._weights.zero_grad()
        self._count, self._norm = torch.zeros_like(self._count), None
        self.step = trainer["optimizer_step"]
        self.weight_version = trainer["weight_version"]
        self.skipped_steps = trainer["skipped_steps"]
        self._bad_in_a_row = trainer["bad_steps_in_a_row"]
        if self.rank < len(trainer["rng"]):
            restore_rng(trainer["rng"][self.rank])
        return trainer["state"]

    def _moments(self) -> Iterable[tuple[str, torch.Tensor]]:
        return optimizer_state(self.optimizer, {id(m): name for name, m in self._weights.masters.items()})

    def _saved_weights(self) -> dict[str, torch.Tensor]:
        """The masters and, unless an adapter is saved alone, whatever of the model does not train."""
        if hasattr(self.model, "peft_config"):
            return dict(self._weights.masters)
        return {**self.model.state_dict(), **self._weights.masters}

    def _read_weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights of a step by the model's own names; peft leaves its adapter's name out of those it saves."""
        files = sorted(folder.glob("model*.safetensors")) or [folder / "adapter_model.safetensors"]
        files += folder.glob(_HEAD_FILE)
        tensors = {name: tensor for path in files for name, tensor in read_tensors(path).items()}
        names = [name for name, _ in self.model.named_parameters()]
        return {name: tensors[saved] for name in names if (saved := _saved_name(name, tensors)) in tensors}

    def _read_sharded_tensors(
        self, folder: Path, kinds: Mapping[str, bool], saved: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Fill the masters, and what of ``saved`` is frozen, in place from a sharded step; returns the moments.

        ``kinds``: moment -> is it per weight?
        """
        masters = self._weights.masters
        moments = {
            key: torch.zeros_like(masters[key.rpartition("#")[0]], requires_grad=False)
            if per_weight
            else torch.zeros((), dtype=torch.float32)
            for key, per_weight in kinds.items()
        }
        weights = self._sharded_weights({*masters, *saved})
        read_shards(
            folder, {f"model.{k}": v for k, v in weights.items()} | {f"optim.{k}": v for k, v in moments.items()}
        )
        self._weights.publish()
        return moments

    def _sharded_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those of the model's weights that ``names`` holds: masters, or frozen parameters."""
        wanted = set(names)
        own = {name: p.detach() for name, p in self.model.named_parameters()}
        own |= {name: master.detach() for name, master in self._weights.masters.items()}
        return {name: weight for name, weight in own.items() if name in wanted}

    def _load_masters(self, tensors: Mapping[str, torch.Tensor], head_too: bool) -> None:
        masters = {n: m for n, m in self._weights.masters.items() if head_too or not is_value_head(n)}
        for name, master in masters.items():
            if name not in tensors:
                raise UserError(f"checkpoint lacks the weight {name!r}: it is of another model")
            if tensors[name].shape != master.shape:
                shapes = f"{list(tensors[name].shape)} there, {list(master.shape)} here"
                raise UserError(f"checkpoint does not fit the model: {name!r} has shape {shapes}")
        for name, master in masters.items():
            self._weights.set(name, self._place_tensor(tensors[name], master))

    def _get_weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in without_value_head(self.model.state_dict()).items()}

    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._load_all(weights, head_too=False)
        self.weight_version += 1

    def _load_all(self, weights: Mapping[str, torch.Tensor], head_too: bool = True) -> None:
        """The masters, all of them, and the frozen weights that are there (an adapter is saved without its base)."""
        self._load_masters(weights, head_too)
        for name, parameter in self.model.named_parameters():
            if name in weights and name not in self._weights.masters:  # frozen
                parameter.detach().copy_(self._place_tensor(weights[name], parameter))

    # What several ranks do otherwise (see FSDPTrainingBackend) ------------------------------------------------------

    def _place_model(self) -> None:
        self.model.to(self.device)

    def _sync_gradients(self, enabled: bool) -> None:
        """Whether the coming backward pass is to combine gradients over ranks."""

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _gather(self, value: Any) -> list[Any]:
        return [value]

    def _gradient_norm(self) -> torch.Tensor:
        """2-norm of the accumulated, undivided gradient over all ranks."""
        return torch.nn.utils.get_total_norm(self._weights.gradients())

    def _host_tensors(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, tensor.detach()) for name, tensor in named)

    def _place_tensor(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return value

    def _place_moments(self, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value if value.ndim == 0 else value.to(self.device) for key, value in moments.items()}

    def _on_main_rank(self, run: Callable[[], None]) -> None:
        run()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, where recomputation, compilation and sharding are applied."""
    return max((list(m) for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[])


def _checkpoint_activations(model: Any) -> None:
    # The older name warns since transformers 5.23, the newer is not there before.
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _saved_name(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return name if name in tensors else name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _as_list(batch: Batch | Sequence[Batch]) -> Sequence[Batch]:
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    if not batches:
        raise ValueError("an empty list of micro-batches has no loss")
    return batches


def _detached(output: LossOutput) -> LossOutput:
    return LossOutput(output.total.detach(), output.count, output.metrics)


def _means(names: list[str], sums: torch.Tensor) -> Metrics:
    loss, count, *rest = sums.tolist()
    means = {name: s / n if n else 0.0 for name, s, n in zip(names, rest[::2], rest[1::2], strict=True)}
    return {"loss": loss / count if count else 0.0, "num_tokens": count, **means}
