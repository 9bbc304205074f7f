"""Sending tensors to an engine's processes over gloo: the trainer is rank 0 of a small group, the engine the rest.

    trainer                                        engine
    WeightGroup(): a store listens on a port
    HTTP: "join the group at host:port"   ----->   connects to the store
    join(): meets the engine's ranks      <---->
    HTTP: "names, dtypes, shapes come"    ----->   posts one receive a tensor, in order
    send(): one broadcast a tensor        ----->   loads them
                                          <-----   HTTP: done

Each engine has a group of its own, so that one that dies takes nobody with it; the time-out ends whatever waits for it.
"""

from __future__ import annotations

import atexit
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import Backend, GroupName, PrefixStore, _new_process_group_helper, _world

BUCKET_BYTES = 1 << 29


def join_process_group(store: dist.Store, rank: int, world_size: int, name: str, seconds: float) -> dist.ProcessGroup:
    """A gloo group beside whatever groups the process has, as SGLang makes its own; torch offers no public way."""
    timeout = timedelta(seconds=seconds)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend("gloo"), PrefixStore(name, store), group_name=GroupName(name), timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def broadcast(group: dist.ProcessGroup, tensors: Iterable[torch.Tensor]) -> None:
    """Send (rank 0) or receive tensors, in order; blocks. Raises RuntimeError when the others do not take part."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    for work in [group.broadcast([tensor], options) for tensor in tensors]:
        work.wait()


class WeightGroup:
    """The trainer's end of a group with one engine.

    Args:
        address: under which the engine's machine reaches this one.
        num_workers: the engine's processes.
        timeout: seconds that any step may take.
    """

    def __init__(self, address: str, num_workers: int, timeout: float) -> None:
        self.address, self.world_size, self.timeout = address, num_workers + 1, timeout
        self.name = f"rollouts_{uuid.uuid4().hex[:12]}"
        self._store = dist.TCPStore(
            "0.0.0.0" if address not in ("127.0.0.1", "localhost") else address,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout),
        )
        self.port = self._store.port
        self._changing = threading.Lock()
        self._group: dist.ProcessGroup | None = None
        self._closed = False
        atexit.register(self.close)  # gloo's threads, left alone, now and then abort a process that ends

    def join(self) -> None:
        """Meet the engine's processes; blocks. Raises RuntimeError when they do not come."""
        group = join_process_group(self._store, 0, self.world_size, self.name, self.timeout)
        with self._changing:
            if self._closed:  # nobody waits for it any more
                dist.destroy_process_group(group)
            else:
                self._group = group

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        assert self._group is not None, "join() comes first"
        broadcast(self._group, tensors)

    def close(self) -> None:
        """Leave the group, which torch would keep with its threads and sockets until the process ends.

        A thread that is in ``join`` or ``send`` stays there until the others answer or its time is up.
        """
        atexit.unregister(self.close)
        with self._changing:
            self._closed = True
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None


def named_tensors(weights: Mapping[str, torch.Tensor] | nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, contiguous on the CPU; of tied ones the first, as Hugging Face stores them."""
    given = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else dict(weights)
    tensors, seen = {}, set()
    for name, tensor in given.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if place not in seen:
            seen.add(place)
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def buckets(tensors: Mapping[str, torch.Tensor], limit: int = BUCKET_BYTES) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors of at most ``limit`` bytes together; a larger one is alone."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
