"""Checkpoint tensors written and read by every rank on its own, through torch's distributed checkpoint.

Trusted only: torch's index of the shards (``shards/.metadata``) is a pickle. Load such a step only from a source that
you would run code from; the ``full`` format has no pickle in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from rollouts.training.checkpoints import CheckpointError, UnwrittenCheckpointError

SHARDS = "shards"


def has_shards(folder: Path) -> bool:
    return (folder / SHARDS).is_dir()


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write this rank's part of ``tensors`` (sharded or plain) into ``folder/shards``; every rank calls it.

    Raises:
        UnwrittenCheckpointError: on every rank, when the disk of any is full or fails.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=folder / SHARDS, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        rank, cause = _first_failure(error)
        if not isinstance(cause, OSError):
            raise cause from error
        raise UnwrittenCheckpointError(
            f"checkpoint {folder / SHARDS} could not be written by rank {rank}: {cause}; earlier checkpoints are "
            "untouched: make room or mend the disk and start the run again to resume"
        ) from error


def read_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place, however they are sharded now; every rank calls it.

    Raises:
        CheckpointError: a tensor is absent or has another shape, or a file cannot be read.
    """
    try:
        dcp.load(dict(tensors), checkpoint_id=folder / SHARDS, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        _, cause = _first_failure(error)
        reason = str(cause).partition("\n")[0]
        raise CheckpointError(f"checkpoint {folder} does not fit this model, or cannot be read: {reason}") from error


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """torch's exception holds those of all ranks, and is no ``Exception``, so that it must not travel further."""
    rank = min(error.failures)
    return rank, error.failures[rank][0]
