"""Training on several devices: parameters, gradients and moments sharded over the ranks of torchrun by FSDP2."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rollouts.errors import UserError
from rollouts.failpoints import failpoint
from rollouts.models.tokenizer import save_tokenizer
from rollouts.training import distributed_utils as ranks
from rollouts.training.backends.optimizers import AnyOptimizer, OptimizerFactory
from rollouts.training.backends.protocol import Batch, Metrics
from rollouts.training.backends.pytorch import PyTorchTrainingBackend, decoder_layers
from rollouts.training.backends.sharded import write_shards
from rollouts.training.checkpoints import checkpoint_transaction, write_json
from rollouts.training.sft_losses import LossFn, causal_lm_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FSDPConfig:
    """How the model is laid out over the ranks.

    Args:
        sharding_strategy: ``FULL_SHARD`` shards everything and gathers a layer's weights for each pass;
            ``SHARD_GRAD_OP`` keeps them gathered from forward to backward; ``NO_SHARD`` replicates (plain data
            parallelism).
        mixed_precision: compute in bfloat16; weights, gradient sums and moments stay float32.
        cpu_offload: keep shards, gradients and moments in host memory.
        checkpoint_format: ``full`` gathers the model on rank 0 and writes the same safetensors folder as one device
            does, readable by any number of ranks; ``sharded`` lets every rank write its part with torch's distributed
            checkpoint, for models that no host can hold. Its index is a pickle: load only what you trust.
    """

    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"] = "FULL_SHARD"
    mixed_precision: bool = True
    cpu_offload: bool = False
    checkpoint_format: Literal["full", "sharded"] = "full"

    def __post_init__(self) -> None:
        if self.sharding_strategy not in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"):
            raise UserError(
                f"sharding_strategy {self.sharding_strategy!r} is not known: use FULL_SHARD, SHARD_GRAD_OP or NO_SHARD"
            )
        if self.checkpoint_format not in ("full", "sharded"):
            raise UserError(f"checkpoint_format {self.checkpoint_format!r} is not known: use full or sharded")


class FSDPTrainingBackend(PyTorchTrainingBackend):
    """``TrainingBackend`` over all ranks of the process group; every rank makes the same calls with its own batches.

    After a forward or backward pass that failed, loading a checkpoint does not help: a new backend is needed.

    Args:
        model: whole on every rank, with equal weights; it is sharded here, in float32.
        optimizer: a factory ``model -> optimizer``: an optimizer made before the sharding would step tensors that the
            model no longer uses.
        config: the layout.
        Everything else as ``PyTorchTrainingBackend``.

    Raises:
        UserError: no process group, or an optimizer instead of a factory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer | OptimizerFactory,
        loss_fn: LossFn = causal_lm_loss,
        checkpoint_dir: str | Path | None = None,
        config: FSDPConfig | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        if not dist.is_initialized():
            raise UserError("FSDPTrainingBackend needs a process group: launch by torchrun and call init_process_group")
        if not callable(optimizer):
            raise UserError("pass an optimizer factory (model -> optimizer), to be called after the model is sharded")
        self.config = config or FSDPConfig()
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() != "gloo" else "cpu"
        super().__init__(model, optimizer, loss_fn, checkpoint_dir, device, **kwargs)
        self.rank, self.world_size = ranks.get_rank(), ranks.get_world_size()
        self._torn = False
        if self.rank == 0:
            logger.info("[Rank 0/%d] FSDPTrainingBackend initialized", self.world_size)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.mixed_precision else torch.float32

    def find_checkpoint(self) -> Path | None:
        return self._from_main_rank(super().find_checkpoint)

    # Layout ---------------------------------------------------------------------------------------------------------

    def _place_model(self) -> None:
        self.model.to(device=self.device, dtype=torch.float32)
        # Pinned host memory is a GPU's way to copy; without one, offloading leaves everything where it is.
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        options: dict[str, Any] = {
            "mesh": self._mesh(),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if self.config.mixed_precision else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": offload if self.config.cpu_offload else OffloadPolicy(),
        }
        full = self.config.sharding_strategy == "FULL_SHARD"
        for layer in decoder_layers(self.model):
            fully_shard(layer, reshard_after_forward=full, **options)
        # The root holds embedding, last norm and output projection, and computes the loss: gathered to the end.
        fully_shard(self._loss_model, reshard_after_forward=False, **options)
        for module in self._loss_model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a loss is a sum over ranks too
                module.set_force_sum_reduction_for_comms(True)  # the only reduction gloo knows

    def _mesh(self) -> Any:
        world = ranks.get_world_size()
        if self.config.sharding_strategy == "NO_SHARD":
            return init_device_mesh(self.device.type, (world, 1), mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(self.device.type, (world,), mesh_dim_names=("shard",))

    def _reshard(self) -> None:
        """Drop gathered weights, which no later change of the shards would reach; a backward pass does it by itself."""
        for module in self._loss_model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _forward_backward(self, batches: Sequence[Batch]) -> Callable[[], Metrics]:
        with self._pass():
            return super()._forward_backward(batches)

    def _evaluate(self, batches: Sequence[Batch]) -> Callable[[], Metrics]:
        with self._pass():
            measured = super()._evaluate(batches)
        self._reshard()
        return measured

    def _read(self, batches: Sequence[Batch], reader: LossFn, adapter: bool = True) -> list[torch.Tensor]:
        with self._pass():
            read = super()._read(batches, reader, adapter)
        self._reshard()
        return read

    @contextmanager
    def _pass(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._torn = True
            raise

    def _load_checkpoint(self, folder: Path) -> dict[str, Any]:
        if self._torn:  # torch's FSDP then skips the reduction of gradients, in silence
            raise RuntimeError("a pass over the sharded model failed half-way: make a new backend and load into that")
        return super()._load_checkpoint(folder)

    def _sync_gradients(self, enabled: bool) -> None:
        self._loss_model.set_requires_gradient_sync(enabled)  # type: ignore[operator]

    def _gradient_norm(self) -> torch.Tensor:
        return _whole(super()._gradient_norm())

    # Ranks ----------------------------------------------------------------------------------------------------------

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return ranks.all_reduce(x)

    def _gather(self, value: Any) -> list[Any]:
        return ranks.all_gather(value)

    def _on_main_rank(self, run: Callable[[], None]) -> None:
        self._from_main_rank(run)

    def _from_main_rank(self, run: Callable[[], Any]) -> Any:
        """Rank 0's result, or its exception, on every rank: nobody waits for a rank that has failed."""
        value, error = None, None
        if ranks.is_main():
            try:
                value = run()
            except Exception as failure:
                error = failure
        value, error = ranks.broadcast((value, error))
        if error is not None:
            raise error
        return value

    def _host_tensors(self, named: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Whole tensors on rank 0's host, one gathered after the other; nothing on the other ranks."""
        for name, tensor in named:
            whole = _whole(tensor.detach())
            if ranks.is_main():
                yield name, whole.cpu()

    def _place_tensor(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not isinstance(like, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def _place_moments(self, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masters = self._weights.masters
        return {
            key: value if value.ndim == 0 else self._place_tensor(value, masters[key.rpartition("#")[0]])
            for key, value in moments.items()
        }

    def _get_weights(self) -> dict[str, torch.Tensor]:
        tied = {name: id(p) for name, p in self.model.named_parameters(remove_duplicate=False)}
        whole: dict[int | str, torch.Tensor] = {}  # tied weights are gathered once, and stay one tensor
        weights = super()._get_weights()
        for name, tensor in weights.items():
            if (key := tied.get(name, name)) not in whole:
                whole[key] = _whole(tensor)
        return {name: whole[tied.get(name, name)] for name in weights}

    # Sharded checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, step: int, metrics: Metrics, state: dict[str, Any]) -> Path:
        if self.config.checkpoint_format == "full":
            return super()._save_checkpoint(step, metrics, state)
        if self.checkpoint_dir is None:
            raise UserError("this backend has no checkpoint_dir: give one to save checkpoints")
        failpoint("train.after_optim_step")
        root, trainer = self.checkpoint_dir, self._trainer_state(step, metrics, state)
        weights = self._sharded_weights(name for name, _ in self.model.named_parameters())
        if hasattr(self.model, "peft_config"):
            weights = {name: weights[name] for name in self._weights.masters}
        trainer["weights"] = sorted(weights)
        tensors = {f"model.{name}": weight for name, weight in weights.items()}
        tensors |= {f"optim.{key}": value for key, value in self._moments()}

        with ExitStack() as transaction:  # entered and closed on rank 0 alone; the others write into its folder
            partial = self._from_main_rank(
                lambda: transaction.enter_context(checkpoint_transaction(root, step, self.keep_checkpoints))
            )
            write_shards(partial, tensors)
            self._on_main_rank(lambda: self._write_beside_shards(partial, trainer))
            self._on_main_rank(transaction.close)
        return root / f"step_{step:06d}"

    def _write_beside_shards(self, partial: Path, trainer: dict[str, Any]) -> None:
        self.model.config.save_pretrained(partial)  # type: ignore[union-attr,operator]
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, partial)
        write_json(partial / "trainer_state.json", trainer)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
