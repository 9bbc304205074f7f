"""Small helpers over torch.distributed that also work, as the obvious no-op, in a single process."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import time
from typing import Any

import torch
import torch.distributed as dist

LONGEST_WAIT = 7 * 24 * 3600.0  # seconds for what one rank does alone: to tokenize all the data, to sample a batch


def init_process_group(device: torch.device | str | None = None, timeout_seconds: float = 1800.0) -> torch.device:
    """Join the group torchrun describes in the environment (NCCL on CUDA, gloo on the CPU); returns this rank's device.

    Without torchrun's variables nothing is joined. Calling it twice is harmless.
    """
    use_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(local)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
        atexit.register(cleanup)
    return local


def gloo_group(timeout_seconds: float = 1800.0) -> dist.ProcessGroup | None:
    """A CPU group over all ranks, for small Python objects and long waits; None in a single process."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds))


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return get_rank() == 0


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until all ranks are here, as long as the group's time-out; None = that of ``init_process_group``."""
    if dist.is_initialized():
        dist.barrier(group)


def all_reduce(tensor: torch.Tensor, op: Any = None) -> torch.Tensor:
    """Sum (or ``op``) over ranks, in place; returns ``tensor``."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=op if op is not None else dist.ReduceOp.SUM)
    return tensor


def all_gather(value: Any) -> list[Any]:
    """Every rank's ``value`` (any picklable object, trusted peers only), in rank order."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast(value: Any, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Rank ``source``'s ``value`` (any picklable object, trusted peers only) on every rank of the group."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def distributed_masked_whiten(x: torch.Tensor, mask: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """(x - mean) * rsqrt(var + eps), mean and var (ddof = 1) over the valid tokens of all ranks.

    Args:
        x, mask: same shape; entries with mask 0 do not count. Fewer than two valid entries leave ``x`` unchanged.
    """
    mask = mask.to(x.dtype)
    sums = all_reduce(torch.stack([mask.sum(), (x * mask).sum()]).double())
    count, mean = sums[0], (sums[1] / sums[0].clamp(min=1)).to(x.dtype)
    if count < 2:
        return x
    squares = all_reduce((((x - mean) * mask) ** 2).sum().double())
    return (x - mean) * torch.rsqrt((squares / (count - 1)).to(x.dtype) + eps)


def print_rank_0(*args: Any, **kwargs: Any) -> None:
    if is_main():
        print(*args, **kwargs, flush=True)


def cleanup() -> None:
    """Leave the process group; done at exit if nobody has done it before."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
        # gloo's threads release the tensors of a finished exchange a little after its caller was let go, and need the
        # interpreter for that: one that is on its way out aborts the process ("terminate called without ...").
        time.sleep(0.5)
