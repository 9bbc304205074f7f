"""From pending samples to finished ones by way of an inference engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rollouts.errors import UserError
from rollouts.inference.completion import Completion, StopReason
from rollouts.inference.protocol import Sampler
from rollouts.inference.sampling_params import SamplingParams
from rollouts.training.rollout_gen.concurrency import gather
from rollouts.training.rollout_gen.seeds import sampling_seed
from rollouts.training.types import Sample, SampleStatus, WeightSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STATUS = {StopReason.LENGTH: SampleStatus.TRUNCATED, StopReason.ABORTED: SampleStatus.ABORTED}


class EngineGenerate:
    """The default ``generate_fn``: continues each sample's prompt with an engine, every sample by its own seed.

    Samples that begin with the same tokens go out as one request, whose prompt the engine computes once, and all
    requests go out at once; what a sample becomes depends on its own seed and the weights alone.

    Args:
        engine: may be replaced (``generate.engine = other``) when one has died; retries then go to the new one.
        tokenizer: its chat template renders prompts that are lists of messages, with ``metadata["tools"]``; a text
            prompt is continued as it stands.
        params: of every sample; ``metadata["seed"]`` takes the place of its seed. None = the engine's defaults.
    """

    def __init__(
        self, engine: Sampler, tokenizer: PreTrainedTokenizerBase, params: SamplingParams | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.params = params or SamplingParams()
        if self.params.n != 1:
            raise UserError(
                f"sampling parameter n is {self.params.n}; set n_samples_per_prompt in the rollout settings"
            )

    async def __call__(self, samples: list[Sample]) -> list[Sample]:
        """Finish ``samples`` in place: tokens, loss mask, log-probs at the sampling temperature, spans, response.

        A sample that has response tokens already goes on from them, and keeps their log-probs and spans. When the call
        is cancelled, samples whose tokens have come keep them.

        Raises:
            UserError: a prompt cannot be rendered or does not fit the model.
        """
        self._start(samples)
        requests: dict[Any, list[Sample]] = {}
        for sample in samples:
            requests.setdefault((tuple(sample.tokens), sample_length(sample)), []).append(sample)
        await gather(self._continue, requests.values())
        return samples

    async def get_weight_version(self) -> int:
        """Of the weights that the engine serves now."""
        return await self.engine.get_weight_version()

    async def abort(self) -> None:
        """Every call in flight returns soon, with what its samples have."""
        await self.engine.abort_all()

    def _start(self, samples: Sequence[Sample]) -> None:
        """Give samples without tokens those of their prompt; each prompt is rendered once."""
        prompt: Any = None
        ids: list[int] = []
        for sample in samples:
            if len(sample.tokens):
                continue
            if not ids or sample.prompt != prompt:
                prompt, ids = sample.prompt, self.render(sample)
            set_tokens(sample, ids, [0] * len(ids), [0.0] * len(ids))

    def render(self, sample: Sample) -> list[int]:
        """Token ids of a sample's prompt, up to where the assistant speaks."""
        if not sample.prompt:
            raise UserError(f"sample {sample.id!r}: has no prompt; give a text, messages or tokens")
        if isinstance(sample.prompt, str):
            return list(self.tokenizer(sample.prompt)["input_ids"])
        return list(
            self.tokenizer.apply_chat_template(
                sample.prompt, tools=sample.metadata.get("tools"), add_generation_prompt=True, return_dict=False
            )
        )

    async def _continue(self, samples: list[Sample]) -> None:
        """Samples with the same tokens, of which equally many are sampled already."""
        done = sample_length(samples[0])
        if done >= self.params.max_tokens:  # the limit was higher when they began
            for sample in samples:
                sample.status, sample.stop_reason = SampleStatus.TRUNCATED, StopReason.LENGTH.value
            return
        params = replace(
            self.params, n=len(samples), seed=self._seeds(samples, done), max_tokens=self.params.max_tokens - done
        )
        completions = await self.engine.generate_group(list(samples[0].tokens), params)
        for sample, completion in zip(samples, completions, strict=True):
            add_completion(sample, completion)
            sample.response = self.tokenizer.decode(response_tokens(sample), skip_special_tokens=True)

    def _seeds(self, samples: list[Sample], done: int) -> int | tuple[int, ...] | None:
        seeds = [sample.metadata.get("seed") for sample in samples]

        def continued(seed: Any) -> Any:
            """A continued sample must not meet the numbers again that chose its first tokens."""
            return sampling_seed(seed, "continued", done) if done and seed is not None else seed

        return continued(self.params.seed) if None in seeds else tuple(map(continued, seeds))


def add_completion(sample: Sample, completion: Completion) -> None:
    """Append what an engine sampled; lists are replaced, not changed, so that copies of the sample stay as they are."""
    start, count = len(sample.tokens), len(completion.token_ids)
    set_tokens(
        sample,
        [*sample.tokens, *completion.token_ids],
        [*sample.loss_mask, *[1] * count],
        [*(sample.rollout_log_probs or [0.0] * start), *completion.log_probs],
    )
    spans = list(sample.weight_versions)
    for span in completion.weight_versions:
        moved = WeightSpan(span.version, span.start + start, span.end + start)
        if spans and (spans[-1].version, spans[-1].end) == (moved.version, moved.start):
            moved = WeightSpan(moved.version, spans.pop().start, moved.end)
        spans.append(moved)
    sample.weight_versions = spans
    sample.stop_reason = completion.stop_reason.value
    sample.status = _STATUS.get(completion.stop_reason, SampleStatus.COMPLETED)


def set_tokens(sample: Sample, tokens: list[int], loss_mask: list[Any], log_probs: list[float]) -> None:
    sample.tokens, sample.loss_mask, sample.rollout_log_probs = tokens, loss_mask, log_probs


def sample_length(sample: Sample) -> int:
    """Tokens that the model has sampled so far."""
    return sum(1 for learned in sample.loss_mask if learned)


def response_tokens(sample: Sample) -> list[int]:
    return [token for token, learned in zip(sample.tokens, sample.loss_mask, strict=True) if learned]
