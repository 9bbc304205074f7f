"""The embedded engine: continuous batching over a live model, in one thread.

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
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.inference.completion import Completion, CompletionChunk, StopReason
from rollouts.inference.grammars import Grammars, TokenMasks, unpack_bits
from rollouts.inference.kv_cache import PAGE_SIZE, KVCache
from rollouts.inference.model_runner import ModelShape, make_forward
from rollouts.inference.native import native_library, release_threads
from rollouts.inference.protocol import PauseMode, UpdateMode
from rollouts.inference.random_numbers import stream_start, uniforms
from rollouts.inference.sampler import BatchParams, Sampled, history_of, sample
from rollouts.inference.sampling_params import SamplingParams
from rollouts.inference.scheduler import Plan, Scheduler
from rollouts.inference.sequences import LiveSample, Request, Rows
from rollouts.inference.step_inputs import make_step
from rollouts.inference.stop_strings import StopStrings
from rollouts.inference.wake import Wake, call_now, current_wake
from rollouts.inference.weights import copy_weights, weights_checksum
from rollouts.training.types import TrainFuture

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EmbeddedEngine:
    """Generates with a transformers model that it shares with whoever trains it: weights are read where they lie.

    Greedy and seeded samples do not depend on which requests share their batch, up to the last bits of the matrix
    products, which may depend on the number of rows. Use it as a context manager, or ``close`` it.

    Args:
        model: a transformers causal language model, or a peft model around one; on the CPU or a GPU.
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
        causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
        shape = ModelShape.of(causal_lm)
        self.max_length = min(shape.max_positions, max_length or 4096)
        self.vocab_size = shape.vocab_size
        weight = causal_lm.get_input_embeddings().weight
        self._device = weight.device
        self._tokenizer = tokenizer
        self._eos_ids = _eos_ids(causal_lm, tokenizer)
        self._grammars = Grammars(tokenizer, shape.vocab_size, self._eos_ids)
        self._forward = make_forward(causal_lm, self.max_length, native)
        self._library = native_library() if native and weight.device.type == "cpu" else None
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
        self._rows = Rows(max_rows, self.max_length, shape.vocab_size)
        self._scheduler = Scheduler(self._rows, self._cache, step_tokens)
        self._scheduler.weight_version = weight_version
        self._batch_of = b""  # the rows that the next two speak of
        self._batch_params: BatchParams = None  # type: ignore[assignment]
        self._token_masks: TokenMasks | None = None

        self._requests: set[Request] = set()
        self._news: dict[Wake, list[Callable[[], object]]] = {}
        self._updates: deque[_Update] = deque()
        self._paused = 0
        self._pause: ExitStack | None = None  # what pause_generation holds
        self._pausing = threading.Lock()
        self._closed = False
        self._error: BaseException | None = None
        self._inbox: deque[Callable[[], object]] = deque()
        self._inbox_changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rollouts-engine", daemon=True)
        self._thread.start()

    # -- callers' side ------------------------------------------------------------------------------------------------

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

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> Completion:
        """One sample. Cancelling the caller frees its row and pages at the next step.

        Raises:
            UserError: the prompt or a parameter does not fit the model; ``params.n`` is not 1.
        """
        if params is not None and params.n != 1:
            raise UserError(f"generate gives one sample, but sampling parameter n is {params.n}; use generate_group")
        return (await self.generate_group(prompt_ids, params))[0]

    async def generate_group(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> list[Completion]:
        """The ``n`` samples of one prompt, which is prefilled once."""
        import anyio

        params = params or SamplingParams()
        await self.compile_grammar(params)
        event = anyio.Event()
        request = self._submit(prompt_ids, params, current_wake(), event.set)
        try:
            await event.wait()
        finally:
            self._cancel(request)
        return _results(request)

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[CompletionChunk]:
        """The samples as they grow. Close the iterator, or cancel the caller, to stop sampling."""
        import anyio

        params = params or SamplingParams()
        await self.compile_grammar(params)
        event = anyio.Event()
        request = self._submit(prompt_ids, params, current_wake(), lambda: event.set(), streaming=True)
        try:
            while True:
                await event.wait()
                event = anyio.Event()  # before the chunks are taken: whoever adds one later sets the new event
                done = request.done
                while request.chunks:
                    yield request.chunks.popleft()
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
            self._send(lambda: self._admit(*requests))
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
        mode: UpdateMode = "drain",
    ) -> TrainFuture[int]:
        """Serve new weights from the next step on; ``await`` the result or ``.wait()`` for it: the version.

        The prefix cache is emptied, and prompts half computed begin anew.

        Args:
            weights: parameters by name, or a model, to copy from; None, or the engine's own model, if a trainer has
                changed them where they lie (inside ``paused()``, unless nothing was running).
            version: None = one more than now.
            mode: what becomes of samples in flight. ``drain``: they finish first, on the old weights, and nothing new
                starts. ``continue``: they go on, on the keys and values that they have; their spans tell the versions.
                ``abort``: they end with what they have. What has not begun to run waits for the new weights.

        Raises (through the result):
            UserError: names or shapes do not fit; the weights are unchanged then.
        """
        if mode not in ("drain", "continue", "abort"):
            raise UserError(f"weight update mode {mode!r} is unknown; use drain, continue or abort")
        future: TrainFuture[int] = TrainFuture("update_weights")
        update = _Update(None if weights is self.model else weights, version, mode, future)
        self._send(lambda: self._updates.append(update))
        return future

    def weights_checksum(self) -> str:
        """SHA-256 over the names, shapes and bytes of the served parameters, taken between two steps."""
        with self.paused():
            return weights_checksum(self.model)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step runs inside: the place where a trainer changes shared weights. Samples in flight stay as they are."""
        reached = threading.Event()

        def pause() -> None:
            self._paused += 1
            reached.set()

        def resume() -> None:
            self._paused -= 1

        self._send(pause)
        while not reached.wait(0.1):
            self._check_alive()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # closed meanwhile
                self._send(resume)

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
        ended: TrainFuture[None] = TrainFuture("abort_all")

        def abort() -> None:
            for request in list(self._requests):
                self._abort(request)
            ended.set_result(None)

        self._send(abort)
        await ended

    async def is_healthy(self) -> bool:
        """Whether the engine's thread lives."""
        return self._error is None and not self._closed

    def close(self) -> None:
        """Stop the engine; samples in flight raise RuntimeError where they are awaited."""

        def close() -> None:
            self._closed = True

        with suppress(RuntimeError):
            self._send(close)
        self._thread.join()

    def __enter__(self) -> EmbeddedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    ) -> Request:
        prompt = np.asarray(prompt_ids, dtype=np.int64)
        self._check(prompt, params)
        request = Request(prompt.astype(np.int32), params, wake, notify, streaming, self._grammars.bound_text(params))
        release_threads()
        if start:
            self._send(lambda: self._admit(request))
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
                self._send(lambda: self._abort(request))

    def _send(self, command: Callable[[], object]) -> None:
        with self._inbox_changed:
            self._check_alive()
            self._inbox.append(command)
            self._inbox_changed.notify()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise RuntimeError("the engine's thread has failed") from self._error
        if self._closed:
            raise RuntimeError("the engine is closed")

    # -- the engine thread --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._closed:
                self._run_commands()
                self._apply_updates()
                if not self._paused and not self._closed:
                    self._step()
                self._deliver()
        except BaseException as error:  # a dead engine must not leave anyone waiting
            self._error = error
        with self._inbox_changed:
            self._closed = True
            while self._inbox:
                self._inbox.popleft()()
        failure = RuntimeError("the engine was closed" if self._error is None else "the engine's thread has failed")
        failure.__cause__ = self._error
        for update in self._updates:
            update.future.set_exception(failure)
        for request in self._requests:
            request.error = failure
            self._tell(request)
        self._deliver()

    def _run_commands(self) -> None:
        with self._inbox_changed:
            while not self._inbox and (self._paused or (self._scheduler.idle and not self._updates)):
                release_threads()
                self._inbox_changed.wait()
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()

    def _admit(self, *requests: Request) -> None:
        for request in requests:
            self._admit_one(request)

    def _admit_one(self, request: Request) -> None:
        params = request.params
        own = int(stream_start(self._seed, self._num_requests)) if params.seed is None else params.seed
        # Sample i of a group has stream i of one seed, or the first stream of its own.
        streams = [(seed, 0) for seed in own] if isinstance(own, tuple) else [(own, i) for i in range(params.n)]
        self._num_requests += 1
        self._requests.add(request)
        bound_text = request.bound_text
        ends = not params.ignore_eos or bound_text is not None
        stop_ids = {*params.stop_token_ids, *(self._eos_ids if ends else ())}
        for index in range(params.n):
            self._num_sequences += 1
            self._scheduler.waiting.append(
                LiveSample(
                    request=request,
                    index=index,
                    tokens=request.prompt,
                    num_prompt=len(request.prompt),
                    max_length=min(len(request.prompt) + params.max_tokens, self.max_length),
                    stop_ids=np.array(sorted(stop_ids), np.int64),
                    random_start=stream_start(*streams[index]),
                    arrival=self._num_sequences,
                    stop_strings=StopStrings(self._tokenizer, params.stop) if params.stop else None,  # type: ignore[arg-type]
                    bound_text=None if bound_text is None else bound_text.copy(),
                )
            )

    def _abort(self, request: Request) -> None:
        if request in self._requests:
            for sample in self._samples(request):
                self._scheduler.remove(sample)
                self._finish(sample, StopReason.ABORTED)

    def _fail(self, request: Request, error: Exception) -> None:
        for each in self._samples(request):
            self._scheduler.remove(each)
        request.error = error
        self._requests.discard(request)
        self._tell(request)

    def _samples(self, request: Request | None = None) -> list[LiveSample]:
        """Those that are not done, of one request or of all."""
        running = [sample for sample in self._rows.sequences if sample is not None]
        return [s for s in (*running, *self._scheduler.waiting) if request is None or s.request is request]

    def _apply_updates(self) -> None:
        while self._updates:
            update = self._updates[0]
            in_flight = [s for s in self._samples() if s.row >= 0 or s.started]
            if update.mode == "drain" and in_flight:
                return
            self._updates.popleft()
            try:
                if update.weights is not None:
                    copy_weights(update.weights, self.model)
            except UserError as error:
                update.future.set_exception(error)
                continue
            if update.mode == "abort":
                for sample in in_flight:
                    self._scheduler.remove(sample)
                    self._finish(sample, StopReason.ABORTED)
            version = self.weight_version + 1 if update.version is None else update.version
            self._scheduler.change_weights(version)
            self._forward.refresh()
            update.future.set_result(version)

    def _step(self) -> None:
        plan = self._scheduler.plan(admit_new=not self._updates)
        if plan is None:
            return
        step = make_step(plan, self._rows, self._cache, self._device, self._forward.needs_reads)
        logits = self._forward(step, self._cache)
        sampled = self._sample(plan.sampling, logits) if len(plan.sampling) else None
        keep = self._scheduler.computed(plan)
        if sampled is not None:
            self._append(plan, keep, sampled)

    def _sample(self, rows: np.ndarray, logits: torch.Tensor) -> Sampled:
        state = self._rows
        key = rows.tobytes() + state.generation.to_bytes(8, "little")
        if self._batch_of != key:
            self._batch_of = key
            self._batch_params, self._token_masks = state.batch_params(rows, self._device), state.token_masks(rows)
        params = self._batch_params
        ends = state.num_tokens[rows]
        history = is_output = None
        if params.penalized is not None:
            p = rows[state.penalized[rows]]
            history, is_output = (
                x.to(self._device) for x in history_of(state.tokens[p], state.num_prompt[p], state.num_tokens[p])
            )
        allowed = None
        if self._token_masks is not None:
            allowed = unpack_bits(self._token_masks.bits().to(self._device), self.vocab_size)
        numbers = torch.from_numpy(uniforms(state.random_start[rows], ends - state.num_prompt[rows])).to(self._device)
        return sample(logits, params, numbers, history, is_output, allowed, self._library)

    def _append(self, plan: Plan, keep: np.ndarray, sampled: Sampled) -> None:
        """Record the step's tokens, then look at those rows alone that end or that something watches."""
        sampled_ids, log_probs, raw_log_probs = _to_host(sampled.token_ids, sampled.log_probs, sampled.raw_log_probs)
        rows, state = plan.sampling[keep], self._rows
        token_ids, log_probs, raw_log_probs = sampled_ids[keep], log_probs[keep], raw_log_probs[keep]
        stopped, full = self._scheduler.append(rows, token_ids, log_probs, raw_log_probs)
        if self._token_masks is not None:
            bound = np.nonzero(state.constrained[plan.sampling])[0]
            goes_on = keep.copy()
            goes_on[keep] = ~stopped
            self._token_masks.consume(np.nonzero(goes_on[bound])[0], sampled_ids[bound[goes_on[bound]]])
        top = [_to_host(x)[0][keep] for x in sampled.top] if sampled.top is not None else None
        for i in np.nonzero(stopped | full | state.watched[rows])[0]:
            row, token_id = int(rows[i]), int(token_ids[i])
            sample = state.sequences[row]
            if sample is None:
                continue  # its request has failed with another of its samples
            if top is not None and (count := sample.request.params.top_log_probs):
                pairs = zip(top[1][i, :count].tolist(), top[0][i, :count].tolist(), strict=True)
                sample.top_log_probs.append(list(pairs))
            match = sample.stop_strings.push(token_id) if sample.stop_strings is not None else None
            if sample.request.streaming:
                sample.request.chunks.append(
                    CompletionChunk(sample.index, [token_id], [float(log_probs[i])], [float(raw_log_probs[i])])
                )
                self._tell(sample.request)
            if stopped[i] or match is not None or full[i]:
                self._scheduler.retire(row)
                if sample.bound_text is not None and (error := sample.bound_text.error) is not None:
                    name = sample.request.params.constrained
                    self._fail(sample.request, UserError(f"sampling parameter {name} cost too much: {error}"))
                elif stopped[i]:
                    self._finish(sample, StopReason.STOP_TOKEN, token_id)
                else:
                    self._finish(sample, StopReason.LENGTH if match is None else StopReason.STOP_STRING, match)

    def _finish(self, sample: LiveSample, reason: StopReason, match: int | str | None = None) -> None:
        request = sample.request
        completion = sample.complete(reason, match)
        request.completions[sample.index] = completion
        if request.streaming:
            request.chunks.append(CompletionChunk(sample.index, [], [], [], completion))
        if request.done:
            self._requests.discard(request)
        if request.done or request.streaming:
            self._tell(request)

    def _tell(self, request: Request) -> None:
        """Remember to notify the request's caller; one call an event loop and step."""
        self._news.setdefault(request.wake, []).append(request.notify)

    def _deliver(self) -> None:
        for wake, functions in self._news.items():
            # RuntimeError: the loop is closed, and nobody waits in it any more.
            with suppress(RuntimeError):
                wake(lambda functions=functions: [function() for function in functions])  # type: ignore[misc]
        self._news = {}


class _Update:
    """A weight update that waits for its place between two steps."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor] | nn.Module | None,
        version: int | None,
        mode: UpdateMode,
        future: TrainFuture[int],
    ) -> None:
        self.weights, self.version, self.mode, self.future = weights, version, mode, future


def _results(request: Request) -> list[Completion]:
    if request.error is not None:
        raise request.error
    return [request.completions[i] for i in range(request.params.n)]


def _to_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Tensors of one shape as arrays, with one transfer from a GPU; float64 holds every id and float32 exactly."""
    if tensors[0].device.type == "cpu":
        return [x.numpy() for x in tensors]
    packed = torch.stack([x.double() for x in tensors]).cpu()
    return [x.to(like.dtype).numpy() for x, like in zip(packed, tensors, strict=True)]


def _eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The ids that end a sample unless told otherwise: all that model and tokenizer name."""
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        ids |= set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return ids
