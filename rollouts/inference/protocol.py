"""What rollout generation and a trainer may ask of any engine: the embedded one, SGLang, vLLM."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rollouts.inference.completion import Completion
    from rollouts.inference.sampling_params import SamplingParams

UpdateMode = Literal["drain", "continue", "abort"]
PauseMode = Literal["keep", "abort"]


class Sampler(Protocol):
    """What rollout generation asks of an engine, or of several that stand behind one."""

    async def generate_group(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> list[Completion]:
        """``params.n`` samples of one prompt: ids, log-probs at the sampling temperature, and weight versions.

        Raises:
            UserError: the prompt or a parameter does not fit the model.
        """
        ...

    async def get_weight_version(self) -> int:
        """The version of the weights that serve now."""
        ...

    async def abort_all(self) -> None:
        """End all samples, waiting ones too, with what they have; each says that it was aborted."""
        ...


@runtime_checkable
class InferenceEngine(Sampler, Protocol):
    """Samples tokens with weights that somebody else trains.

    Everything is awaited, under asyncio or trio. Cancelling a caller of ``generate_group`` frees what its samples held.
    """

    def update_weights(
        self,
        weights: Mapping[str, torch.Tensor] | nn.Module | None = None,
        version: int | None = None,
        mode: UpdateMode = "drain",
    ) -> Awaitable[int]:
        """Serve these weights from the next token on and forget cached text; gives the version they are served as.

        Args:
            weights: parameters by their Hugging Face names, or a model; None where engine and trainer share them.
            version: None = one more than now.
            mode: samples in flight finish first (``drain``), go on with the new weights (``continue``), or end with
                what they have (``abort``).
        """
        ...

    def update_weights_from_checkpoint(
        self, folder: str | Path, version: int | None = None, mode: UpdateMode = "drain"
    ) -> Awaitable[int]:
        """The same from a folder in the Hugging Face layout that the engine can read."""
        ...

    async def get_weights_checksum(self) -> str:
        """A digest of the served parameters; equal weights give equal digests on engines of one kind."""
        ...

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        """No token is sampled until ``continue_generation``; samples in flight wait (``keep``) or end (``abort``)."""
        ...

    async def continue_generation(self) -> None: ...

    async def is_healthy(self) -> bool:
        """Whether the engine answers now."""
        ...
