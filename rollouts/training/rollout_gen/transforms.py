"""Pure functions from groups of samples to the batch of a training step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rollouts.errors import UserError
from rollouts.training.filters import judge
from rollouts.training.rollout_gen.config import RolloutConfig
from rollouts.training.types import RolloutBatch, Sample


def apply_sample_transforms(samples: list[Sample], config: RolloutConfig) -> list[Sample]:
    """The samples after ``config.transforms``, without the groups that ``config.filter_fn`` refuses.

    Groups are told by ``group_id``; a sample without one is a group of its own. A pure function for samples that have
    been generated and scored; the manager does the same a group at a time, with the scoring between the two.
    """
    kept = []
    for group in groups_of(samples):
        group = transform(group, config)
        if config.filter_fn is None or judge(config.filter_fn, group):
            kept += group
    return kept


def transform(group: list[Sample], config: RolloutConfig) -> list[Sample]:
    """One group after ``config.transforms``. Raises UserError when one of them changes how many samples it has."""
    for function in config.transforms:
        count = len(group)
        group = list(function(group))
        if len(group) != count:
            name = getattr(function, "__name__", repr(function))
            raise UserError(
                f"transform {name} made {len(group)} samples of a group of {count}; advantages need whole groups: "
                "mask a sample's loss instead of removing it, or drop the whole group with a filter"
            )
    return group


def groups_of(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples by ``group_id``, wherever they stand; groups in the order of their first sample."""
    groups: dict[Any, list[Sample]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.group_id or place, []).append(sample)
    return list(groups.values())


def convert_to_batch(samples: list[Sample], epoch_id: int = 0, step_id: int = 0, **metadata: Any) -> RolloutBatch:
    """Samples as the batch of one training step, those of a group side by side. Raises UserError if there are none."""
    if not samples:
        raise UserError("a rollout batch needs at least one sample; was every group filtered out?")
    flat = [sample for group in groups_of(samples) for sample in group]
    return RolloutBatch(flat, epoch_id=epoch_id, step_id=step_id, metadata=metadata)
