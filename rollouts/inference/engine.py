"""The embedded engine: continuous batching over a live model, in one thread (engine_thread.py).

    caller (asyncio task, trio task or thread)            engine thread
    ------------------------------------------            -------------------------------------------
    generate / stream / generate_batch
      put a command into the inbox  ----- wakes ----->    between two steps: run all commands in order
      wait for the request's event                        step: plan -> forward -> sample -> append
      ...                           <--- wakes ------     a sample is done, or a stream has news
    cancelled: put "cancel" into the inbox  ------->      the row and its pages are free at the next step
    update_weights: put "update" in, wait  --------->     drain: first the samples in flight, with the old weights
                                    <--- wakes ------     weights, version, empty prefix cache: all between two steps
    paused(): put "pause" in, wait  ---------------->     acknowledge, then run commands only
    close(): put "close" in, join   ---------------->     fail what is left, return

Callers never touch rows, cache or scheduler, and the engine thread never waits for a caller: it runs functions in
event loops without waiting for them. The only lock guards the inbox.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.inference.adapters import base_of
from rollouts.inference.completion import Completion, CompletionChunk, take_chunks
from rollouts.inference.engine_thread import EngineThread, WeightUpdate
from rollouts.inference.forward import make_forward
from rollouts.inference.grammars import Grammars
from rollouts.inference.kv_cache import PAGE_SIZE, KVCache
from rollouts.inference.model_runner import ModelShape
from rollouts.inference.native import release_threads
from rollouts.inference.protocol import PauseMode, UpdateMode
from rollouts.inference.random_numbers import stream_start
from rollouts.inference.sampling_params import SamplingParams
from rollouts.inference.scheduler import Scheduler
from rollouts.inference.sequences import LiveSample, PromptScores, Request, Rows
from rollouts.inference.stop_strings import StopStrings
from rollouts.inference.wake import Wake, call_now, current_wake
from rollouts.inference.weights import weights_checksum, weights_digests
from rollouts.types import TrainFuture

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EmbeddedEngine:
    """Generates with a transformers model that it shares with whoever trains it: weights are read where they lie.

    Greedy and seeded samples do not depend on which requests share their batch, up to the last bits of the matrix
    products, which may depend on the number of rows. Use it as a context manager, or ``close`` it.

    Args:
        model: a transformers causal language model, or a peft model around one; on the CPU or a GPU. Layers with
            adapters (LoRA) are served by merged copies of their own, made anew by each ``update_weights``.
        tokenizer: needed for stop strings and structured output only.
        max_rows: sequences that run at once.
        max_length: longest prompt and sample together; None = the model's own limit, at most 4,096.
        cache_bytes: memory for keys and values, at most; never less than one longest sequence needs.
        step_tokens: tokens that a step computes at most; a longer prompt is prefilled over several steps.
        seed: of requests without a seed of their own.
        weight_version: version of the weights as they are now.
        native: decode in compiled code where the model and the machine allow; False keeps to torch operators.

    Raises:
        UserError: the model cannot be served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_rows: int = 256,
        max_length: int | None = None,
        cache_bytes: int = 1 << 30,
        step_tokens: int = 1024,
        seed: int = 0,
        weight_version: int = 0,
        native: bool = True,
    ) -> None:
        self.model = model
        causal_lm = base_of(model)
        shape = ModelShape.of(causal_lm)
        self.max_length = min(shape.max_positions, max_length or 4096)
        self.vocab_size = shape.vocab_size
        weight = causal_lm.get_input_embeddings().weight
        self._tokenizer = tokenizer
        self._eos_ids = _eos_ids(causal_lm, tokenizer)
        self._grammars = Grammars(tokenizer, shape.vocab_size, self._eos_ids)
        self._seed = seed
        self._num_requests = 0
        self._num_sequences = 0

        row_pages = -(-self.max_length // PAGE_SIZE)
        page_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * PAGE_SIZE * weight.element_size()
        num_pages = max(min(max_rows * row_pages, cache_bytes // page_bytes), row_pages)
        self._cache = KVCache(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, num_pages, max_rows, self.max_length,
            weight.dtype, weight.device,
        )  # fmt: skip
        rows = Rows(max_rows, self.max_length, shape.vocab_size)
        self._scheduler = Scheduler(rows, self._cache, step_tokens)
        self._scheduler.weight_version = weight_version
        self._pause: ExitStack | None = None  # what pause_generation holds
        self._pausing = threading.Lock()
        forward = make_forward(causal_lm, self.max_length, native)
        self._thread = EngineThread(model, forward, rows, self._cache, self._scheduler, native)

    @property
    def weight_version(self) -> int:
        return self._scheduler.weight_version

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens computed so far; those found in the cache or shared with another sample do not count."""
        return self._scheduler.num_prefilled

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def num_sampled_tokens(self) -> int:
        return self._scheduler.num_sampled

    @property
    def num_pages(self) -> int:
        """Pages of the cache, 16 tokens each."""
        return self._cache.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that no running sequence holds."""
        return self._cache.num_available

    @property
    def num_running(self) -> int:
        """Sequences that own a row now."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def alive(self) -> bool:
        """False once the engine is closed, or its thread has failed."""
        return self._thread.alive

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Completion:
        """One sample. Cancelling the caller frees its row and pages at the next step.

        Raises:
            UserError: the prompt or a parameter does not fit the model; ``params.n`` is not 1.
        """
        if params is not None and params.n != 1:
            raise UserError(f"generate gives one sample, but sampling parameter n is {params.n}; use generate_group")
        return (await self.generate_group(prompt_ids, params, request_id))[0]

    async def generate_group(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> list[Completion]:
        """The ``n`` samples of one prompt, which is prefilled once. ``abort(request_id)`` ends them early."""
        import anyio

        params = params or SamplingParams()
        await self.compile_grammar(params)
        event = anyio.Event()
        request = self._submit(prompt_ids, params, current_wake(), event.set, request_id=request_id)
        try:
            await event.wait()
        finally:
            self._cancel(request)
        return _results(request)

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[CompletionChunk]:
        """The samples as they grow. Close the iterator, or cancel the caller, to stop sampling."""
        import anyio

        params = params or SamplingParams()
        await self.compile_grammar(params)
        event = anyio.Event()
        make_event = type(event)  # anyio looks up at each call of its own which library runs the loop
        request = self._submit(
            prompt_ids, params, current_wake(), lambda: event.set(), streaming=True, request_id=request_id
        )
        try:
            while True:
                await event.wait()
                event = make_event()  # before the chunks are taken: whoever adds one later sets the new event
                done = request.done
                for chunk in take_chunks(request.chunks):
                    yield chunk
                if done:
                    _results(request)
                    return
        finally:
            self._cancel(request)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Samples of all prompts, in their order; with ``n`` > 1 those of one prompt stand side by side. Blocks."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        requests: list[Request] = []
        done = threading.Semaphore(0)
        try:
            for prompt, p in zip(prompts, params, strict=True):
                requests.append(self._submit(prompt, p, call_now, done.release, start=False))
            self._thread.send(lambda: self._admit(*requests))
            for _ in requests:
                done.acquire()
        finally:
            for request in requests:
                self._cancel(request)
        return [completion for request in requests for completion in _results(request)]

    def update_weights(
        self,
        weights: Mapping[str, torch.Tensor] | nn.Module | None = None,
        version: int | None = None,
        mode: UpdateMode | Literal["retract"] = "drain",
    ) -> TrainFuture[int]:
        """Serve new weights from the next step on; ``await`` the result or ``.wait()`` for it: the version.

        The prefix cache is emptied, and prompts half computed begin anew.

        Args:
            weights: parameters by name, or a model, to copy from; None, or the engine's own model, if a trainer has
                changed them where they lie (inside ``paused()``, unless nothing was running). For a peft model the
                adapter's alone will do, named as peft saves them.
            version: None = one more than now.
            mode: what becomes of samples in flight. ``drain``: they finish first, on the old weights, and nothing new
                starts. ``continue``: they go on, on the keys and values that they have; their spans tell the versions.
                ``retract``: they go on, on keys and values computed anew by the new weights. ``abort``: they end with
                what they have. What has not begun to run waits for the new weights.

        Raises (through the result):
            UserError: names or shapes do not fit; the weights are unchanged then.
        """
        if mode not in ("drain", "continue", "retract", "abort"):
            raise UserError(f"weight update mode {mode!r} is unknown; use drain, continue, retract or abort")
        future: TrainFuture[int] = TrainFuture("update_weights")
        update = WeightUpdate(None if weights is self.model else weights, version, mode, future)
        self._thread.send(lambda: self._thread.updates.append(update))
        return future

    def flush_cache(self) -> TrainFuture[None]:
        """Forget the keys and values of finished text; samples in flight go on undisturbed."""
        return self._between_steps("flush_cache", self._cache.flush)

    def abort(self, request_id: str) -> TrainFuture[None]:
        """End the samples of requests with this id, running or waiting, with what they have; no such one is no error.

        Whoever awaits them gets completions with stop reason ABORTED, exact up to the last token.
        """
        return self._between_steps("abort", lambda: self._thread.abort_where(lambda request: request.id == request_id))

    def weights_checksum(self) -> str:
        """SHA-256 over the names, shapes and bytes of the served parameters, taken between two steps."""
        with self.paused():
            return weights_checksum(self.model)

    def weights_digests(self) -> dict[str, str]:
        """SHA-256 of each served parameter's bytes, taken between two steps."""
        with self.paused():
            return weights_digests(self.model)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step runs inside: the place where a trainer changes shared weights. Samples in flight stay as they are."""
        reached = threading.Event()

        def pause() -> None:
            self._thread.pauses += 1
            reached.set()

        def resume() -> None:
            self._thread.pauses -= 1

        self._thread.send(pause)
        while not reached.wait(0.1):
            self._thread.check_alive()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # closed meanwhile
                self._thread.send(resume)

    # The same as `InferenceEngine` has it: nothing below blocks an event loop.

    async def update_weights_from_checkpoint(
        self, folder: str | Path, version: int | None = None, mode: UpdateMode = "drain"
    ) -> int:
        """Serve the weights of a model folder. Raises UserError: they cannot be loaded or do not fit."""
        import anyio.to_thread

        from rollouts.models.load import load_weights

        dtype = next(self.model.parameters()).dtype
        weights = await anyio.to_thread.run_sync(load_weights, Path(folder), dtype)
        return await self.update_weights(weights, version, mode)

    async def get_weight_version(self) -> int:
        return self.weight_version

    async def get_weights_checksum(self) -> str:
        import anyio.to_thread

        return await anyio.to_thread.run_sync(self.weights_checksum)

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        """Stop between two steps until ``continue_generation``; pausing twice is pausing once."""
        import anyio.to_thread

        def pause() -> None:
            with self._pausing:
                if self._pause is None:
                    self._pause = ExitStack()
                    self._pause.enter_context(self.paused())

        if mode == "abort":
            await self.abort_all()
        await anyio.to_thread.run_sync(pause)

    async def continue_generation(self) -> None:
        import anyio.to_thread

        def resume() -> None:
            with self._pausing:
                if self._pause is not None:
                    self._pause.close()
                    self._pause = None

        await anyio.to_thread.run_sync(resume)

    async def abort_all(self) -> None:
        """End all samples with what they have, those that wait for a row too."""
        await self._between_steps("abort_all", lambda: self._thread.abort_where(lambda request: True))

    async def is_healthy(self) -> bool:
        """Whether the engine's thread lives."""
        return self.alive

    def close(self) -> None:
        """Stop the engine; samples in flight raise RuntimeError where they are awaited."""
        self._thread.close()

    def __enter__(self) -> EmbeddedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _between_steps(self, name: str, work: Callable[[], object]) -> TrainFuture[None]:
        done: TrainFuture[None] = TrainFuture(name)

        def run() -> None:
            try:
                work()
            except BaseException as error:
                done.set_exception(error)
                raise
            done.set_result(None)

        self._thread.send(run)
        return done

    async def compile_grammar(self, params: SamplingParams) -> None:
        """Off the event loop's thread, as it may take a second; requests then find it compiled. Raises UserError."""
        import anyio.to_thread

        if params.constrained:
            await anyio.to_thread.run_sync(self._grammars.bound_text, params)

    def _submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        wake: Wake,
        notify: Callable[[], object],
        *,
        streaming: bool = False,
        start: bool = True,
        request_id: str | None = None,
    ) -> Request:
        prompt = np.asarray(prompt_ids, dtype=np.int64)
        self._check(prompt, params)
        prompt = prompt.astype(np.int32)
        scores = PromptScores(prompt, params.top_log_probs) if params.prompt_log_probs else None
        bound_text = self._grammars.bound_text(params)
        request = Request(prompt, params, wake, notify, streaming, request_id, scores, bound_text)
        release_threads()
        if start:
            self._thread.send(lambda: self._admit(request))
        return request

    def _check(self, prompt: np.ndarray, params: SamplingParams) -> None:
        if prompt.ndim != 1 or not len(prompt):
            raise UserError("the prompt is empty; give at least one token id")
        if prompt.min() < 0 or prompt.max() >= self.vocab_size:
            raise UserError(f"the prompt has token ids outside the model's vocabulary of {self.vocab_size}")
        if len(prompt) >= self.max_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, which leaves none of the engine's {self.max_length} for a "
                "sample; shorten it or raise max_length"
            )
        if params.stop and self._tokenizer is None:
            raise UserError("sampling parameter stop needs an engine with a tokenizer; give it one")
        if any(not 0 <= token < self.vocab_size for token in params.logit_bias):
            raise UserError(f"sampling parameter logit_bias has ids outside the vocabulary of {self.vocab_size}")

    def _cancel(self, request: Request) -> None:
        if not request.done:
            with suppress(RuntimeError):
                self._thread.send(lambda: self._thread.abort(request))

    def _admit(self, *requests: Request) -> None:
        """In the engine's thread: a seed for each sample and a place in line."""
        for request in requests:
            self._thread.admit(request, self._live_samples(request))

    def _live_samples(self, request: Request) -> list[LiveSample]:
        params, bound_text = request.params, request.bound_text
        own = int(stream_start(self._seed, self._num_requests)) if params.seed is None else params.seed
        # Sample i of a group has stream i of one seed, or the first stream of its own.
        streams = [(seed, 0) for seed in own] if isinstance(own, tuple) else [(own, i) for i in range(params.n)]
        self._num_requests += 1
        self._num_sequences += params.n
        ends = not params.ignore_eos or bound_text is not None
        stop_ids = np.array(sorted({*params.stop_token_ids, *(self._eos_ids if ends else ())}), np.int64)
        return [
            LiveSample(
                request=request,
                index=index,
                tokens=request.prompt,
                num_prompt=len(request.prompt),
                max_length=min(len(request.prompt) + params.max_tokens, self.max_length),
                stop_ids=stop_ids,
                random_start=stream_start(*streams[index]),
                arrival=self._num_sequences + index,
                stop_strings=StopStrings(self._tokenizer, params.stop) if params.stop else None,  # type: ignore[arg-type]
                bound_text=None if bound_text is None else bound_text.copy(),
            )
            for index in range(params.n)
        ]


def _results(request: Request) -> list[Completion]:
    if request.error is not None:
        raise request.error
    return [request.completions[i] for i in range(request.params.n)]


def _eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The ids that end a sample unless told otherwise: all that model and tokenizer name."""
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        ids |= set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return ids
