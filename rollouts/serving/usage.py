"""What both OpenAI endpoints report about finished samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollouts.inference import Completion, StopReason
from rollouts.serving.generation import Job


def usage(jobs: Sequence[Job], groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """Token counts; a prompt counts once, however many samples it has."""
    prompt = sum(len(job.prompt_ids) for job in jobs)
    cached = sum(min((c.num_cached_tokens for c in group), default=0) for group in groups)
    sampled = sum(len(completion.token_ids) for group in groups for completion in group)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason(completion: Completion) -> str:
    """OpenAI's word for why a sample ended; ``abort`` is vLLM's."""
    if completion.stop_reason is StopReason.LENGTH:
        return "length"
    return "abort" if completion.stop_reason is StopReason.ABORTED else "stop"
