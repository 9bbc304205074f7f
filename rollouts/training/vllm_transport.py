"""The weight transport that ``vllm_plugin`` registers; it runs inside vLLM's workers and imports vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollouts.training.weight_push import broadcast, join_process_group


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the trainer's store listens, and the group's name and size."""

    address: str
    port: int
    world_size: int
    name: str
    timeout: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """Tensors that are sent now, in order, or a ``folder`` of safetensors instead."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    folder: str | None = None


class GlooTransport(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives checkpoint-format weights on every worker and lets the model load and shard them."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: dist.ProcessGroup | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        seconds = timedelta(seconds=init_info.timeout)
        store = dist.TCPStore(init_info.address, init_info.port, timeout=seconds)
        self._group = join_process_group(store, rank, init_info.world_size, init_info.name, init_info.timeout)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        if update_info.folder is not None:
            for path in sorted(Path(update_info.folder).glob("*.safetensors")):
                self.model.load_weights(load_file(path).items())
            return
        assert self._group is not None, "init_weight_transfer_engine comes first"
        tensors = [
            torch.empty(shape, dtype=getattr(torch, name))
            for name, shape in zip(update_info.dtype_names, update_info.shapes, strict=True)
        ]
        broadcast(self._group, tensors)
        self.model.load_weights((n, t.to(self.device)) for n, t in zip(update_info.names, tensors, strict=True))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
