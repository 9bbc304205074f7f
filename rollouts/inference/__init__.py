"""The embedded engine: fast generation in one process, from weights that it shares with their trainer."""

from rollouts.inference.completion import Completion, CompletionChunk, StopReason
from rollouts.inference.engine import EmbeddedEngine
from rollouts.inference.sampling_params import SamplingParams

__all__ = ["Completion", "CompletionChunk", "EmbeddedEngine", "SamplingParams", "StopReason"]
