"""The thread that computes: commands between steps, steps, and the news that they make.

It never waits for a caller. Everything here but ``send``, ``check_alive``, ``alive`` and ``close`` runs in the thread
itself; other threads reach it by sending functions.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.inference.completion import CompletionChunk, StopReason
from rollouts.inference.grammars import TokenMasks, unpack_bits
from rollouts.inference.kv_cache import KVCache
from rollouts.inference.model_runner import Forward, NativeForward
from rollouts.inference.native import native_library, release_threads
from rollouts.inference.native_decode import NativeDecode
from rollouts.inference.protocol import UpdateMode
from rollouts.inference.random_numbers import uniforms
from rollouts.inference.sampler import BatchParams, Sampled, history_of, sample
from rollouts.inference.scheduler import Plan, Scheduler
from rollouts.inference.sequences import BROKEN, FULL, STOPPED, LiveSample, PromptScores, Request, Rows
from rollouts.inference.step_inputs import make_step
from rollouts.inference.wake import Wake
from rollouts.inference.weights import copy_weights
from rollouts.types import TrainFuture

# More streams than these get their tokens no more often than every so many seconds, several at once and all at the same
# time: a message costs far more than what is in it, and waking the thread that sends it takes a core from this one.
FEW_STREAMS, STREAM_SECONDS = 8, 0.04


@dataclass(frozen=True)
class WeightUpdate:
    """A weight update that waits for its place between two steps; see ``EmbeddedEngine.update_weights``."""

    weights: Mapping[str, torch.Tensor] | nn.Module | None
    version: int | None
    mode: UpdateMode | Literal["retract"]
    future: TrainFuture[int]


class EngineThread:
    """Runs from the moment it is made until ``close``; what it waits for are commands."""

    def __init__(
        self, model: nn.Module, forward: Forward, rows: Rows, cache: KVCache, scheduler: Scheduler, native: bool
    ) -> None:
        self.scheduler = scheduler
        self.updates: deque[WeightUpdate] = deque()
        self.pauses = 0
        self.error: BaseException | None = None
        self._model = model
        self._forward = forward
        self._rows = rows
        self._cache = cache
        self._device = cache.keys[0].device
        self._step_device = torch.device("cpu") if forward.on_host else self._device
        self._library = native_library() if native and self._device.type == "cpu" else None
        self._native_decode = NativeDecode(forward, rows, cache) if isinstance(forward, NativeForward) else None
        self._batch_of = b""  # the rows that the next two speak of
        self._batch_params: BatchParams = None  # type: ignore[assignment]
        self._token_masks: TokenMasks | None = None
        self._requests: set[Request] = set()
        self._news: dict[Wake, list[Callable[[], object]]] = {}
        self._closed = False
        self._inbox: deque[Callable[[], object]] = deque()
        self._inbox_changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rollouts-engine", daemon=True)
        self._thread.start()

    # -- from any thread ----------------------------------------------------------------------------------------------

    def send(self, command: Callable[[], object]) -> None:
        """Run ``command`` between two steps, after those sent before.

        Raises:
            RuntimeError: the engine is closed or has failed.
        """
        with self._inbox_changed:
            self.check_alive()
            self._inbox.append(command)
            self._inbox_changed.notify()

    def check_alive(self) -> None:
        if self.error is not None:
            raise RuntimeError("the engine's thread has failed") from self.error
        if self._closed:
            raise RuntimeError("the engine is closed")

    @property
    def alive(self) -> bool:
        return self.error is None and not self._closed

    def close(self) -> None:
        def close() -> None:
            self._closed = True

        with suppress(RuntimeError):
            self.send(close)
        self._thread.join()

    # -- the loop -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._closed:
                self._run_commands()
                self._apply_updates()
                if self.pauses:
                    self._tell_all_streams()
                elif not self._closed:
                    self._step()
                self._deliver()
        except BaseException as error:  # a dead engine must not leave anyone waiting
            self.error = error
        with self._inbox_changed:
            self._closed = True
            while self._inbox:
                with suppress(Exception):  # those that come after it, and whoever waits, must still be told
                    self._inbox.popleft()()
        failure = RuntimeError("the engine was closed" if self.error is None else "the engine's thread has failed")
        failure.__cause__ = self.error
        for update in self.updates:
            update.future.set_exception(failure)
        for request in self._requests:
            request.error = failure
            self._tell(request)
        self._deliver()

    def _run_commands(self) -> None:
        with self._inbox_changed:
            while not self._inbox and (self.pauses or (self.scheduler.idle and not self.updates)):
                release_threads()
                self._inbox_changed.wait()
            count = len(self._inbox)
        for _ in range(count):  # when one raises, those after it are still there to be told
            self._inbox.popleft()()

    def _apply_updates(self) -> None:
        while self.updates:
            update = self.updates[0]
            in_flight = [s for s in self._samples() if s.row >= 0 or s.started]
            if update.mode == "drain" and in_flight:
                return
            self.updates.popleft()
            try:
                if update.weights is not None:
                    copy_weights(update.weights, self._model)
            except BaseException as error:
                update.future.set_exception(error)
                if isinstance(error, UserError):
                    continue
                raise  # some of the weights may be new
            if update.mode == "abort":
                for each in in_flight:
                    self.scheduler.remove(each)
                    self._finish(each, StopReason.ABORTED)
            version = self.scheduler.weight_version + 1 if update.version is None else update.version
            self._tell_all_streams()  # a chunk's tokens are of one version
            self.scheduler.change_weights(version, retract=update.mode == "retract")
            self._forward.refresh()
            update.future.set_result(version)

    def _deliver(self) -> None:
        for wake, functions in self._news.items():
            # RuntimeError: the loop is closed, and nobody waits in it any more.
            with suppress(RuntimeError):
                wake(lambda functions=functions: [function() for function in functions])  # type: ignore[misc]
        self._news = {}

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, request: Request, samples: list[LiveSample]) -> None:
        self._requests.add(request)
        self.scheduler.waiting.extend(samples)

    def abort(self, request: Request) -> None:
        """End the request's samples with what they have."""
        for each in self._samples(request):
            self.scheduler.remove(each)
            self._finish(each, StopReason.ABORTED)

    def abort_where(self, chosen: Callable[[Request], bool]) -> None:
        for request in [request for request in self._requests if chosen(request)]:
            self.abort(request)

    def _samples(self, request: Request | None = None) -> list[LiveSample]:
        """Those that are not done, of one request or of all."""
        running = [each for each in self._rows.sequences if each is not None]
        return [s for s in (*running, *self.scheduler.waiting) if request is None or s.request is request]

    def _finish(self, sample: LiveSample, reason: StopReason, match: int | str | None = None) -> None:
        request = sample.request
        completion = sample.complete(reason, match)
        if request.streaming:
            self._tell_tokens(sample)
            request.chunks.append(CompletionChunk(sample.index, [], [], [], completion))
        request.completions[sample.index] = completion  # last: whoever finds the request done has all of its chunks
        if request.done:
            self._requests.discard(request)
        if request.done or request.streaming:
            self._tell(request)

    def _fail(self, request: Request, error: Exception) -> None:
        for each in self._samples(request):
            self.scheduler.remove(each)
        request.error = error
        self._requests.discard(request)
        self._tell(request)

    def _tell(self, request: Request) -> None:
        """Remember to notify the request's caller; one call an event loop and step."""
        self._news.setdefault(request.wake, []).append(request.notify)

    # -- a step -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        plan = self.scheduler.plan(admit_new=not self.updates)
        if plan is None:
            return
        self._look_up_params(plan.sampling)
        if self._native_decode is not None and not plan.chunks and self._batch_params.plain:
            flags = self._native_decode(plan.decoding)
            self.scheduler.num_sampled += len(plan.decoding)
            if flags is not None:
                self._look_at(plan.decoding, flags)
            self._tell_streams()
            return
        step = make_step(plan, self._rows, self._cache, self._step_device, self._forward.needs_reads)
        logits = self._forward(step, self._cache)
        count = len(plan.sampling)
        for scored, (row, start, end) in plan.scored:
            _score(self._rows.sequences[row].request.scores, logits[scored], start, end)  # type: ignore[union-attr, arg-type]
        sampled = self._sample(plan.sampling, logits[:count]) if count else None
        keep = self.scheduler.computed(plan)
        if sampled is not None:
            self._append(plan, keep, sampled)

    def _look_up_params(self, rows: np.ndarray) -> None:
        key = rows.tobytes() + self._rows.generation.to_bytes(8, "little")
        if self._batch_of != key:
            self._batch_of = key
            self._batch_params = self._rows.batch_params(rows, self._device)
            self._token_masks = self._rows.token_masks(rows)

    def _sample(self, rows: np.ndarray, logits: torch.Tensor) -> Sampled:
        state, params = self._rows, self._batch_params
        ends = state.num_tokens[rows]
        history = is_output = None
        if params.penalized is not None:
            p = rows[state.penalized[rows]]
            history, is_output = (
                x.to(self._device) for x in history_of(state.tokens[p], state.num_prompt[p], state.num_tokens[p])
            )
        allowed = None
        if self._token_masks is not None:
            allowed = unpack_bits(self._token_masks.bits().to(self._device), logits.shape[1])
        numbers = torch.from_numpy(uniforms(state.random_start[rows], ends - state.num_prompt[rows])).to(self._device)
        return sample(logits, params, numbers, history, is_output, allowed, self._library)

    def _append(self, plan: Plan, keep: np.ndarray, sampled: Sampled) -> None:
        """Record the step's tokens, then look at those rows alone that end or that something watches."""
        sampled_ids, log_probs, raw_log_probs = _to_host(sampled.token_ids, sampled.log_probs, sampled.raw_log_probs)
        rows, state = plan.sampling[keep], self._rows
        token_ids, log_probs, raw_log_probs = sampled_ids[keep], log_probs[keep], raw_log_probs[keep]
        flags = self.scheduler.append(rows, token_ids, log_probs, raw_log_probs)
        if self._token_masks is not None:
            bound = np.nonzero(state.constrained[plan.sampling])[0]
            goes_on = keep.copy()
            goes_on[keep] = flags & STOPPED == 0
            self._token_masks.consume(np.nonzero(goes_on[bound])[0], sampled_ids[bound[goes_on[bound]]])
        top = [_to_host(x)[0][keep] for x in sampled.top] if sampled.top is not None else None
        self._look_at(rows, flags, top)
        self._tell_streams()

    def _look_at(self, rows: np.ndarray, flags: np.ndarray, top: list[np.ndarray] | None = None) -> None:
        """What is left to do for those of ``rows`` [B] that have flags after their new tokens."""
        state = self._rows
        for i in np.nonzero(flags)[0]:
            row, flag = int(rows[i]), flags[i]
            live = state.sequences[row]
            if live is None:
                continue  # its request has failed with another of its samples
            token_id = int(state.tokens[row, state.num_tokens[row] - 1])
            if flag & BROKEN:
                version = self.scheduler.weight_version
                self._fail(live.request, UserError(f"weights {version} of the model are broken: its log-probs are NaN"))
                continue
            if top is not None and (count := live.request.params.top_log_probs):
                live.top_log_probs.append(
                    list(zip(top[1][i, :count].tolist(), top[0][i, :count].tolist(), strict=True))
                )
            match = live.stop_strings.push(token_id) if live.stop_strings is not None else None
            if flag & (STOPPED | FULL) or match is not None:
                self.scheduler.retire(row)
                if live.bound_text is not None and (error := live.bound_text.error) is not None:
                    name = live.request.params.constrained
                    self._fail(live.request, UserError(f"sampling parameter {name} cost too much: {error}"))
                elif flag & STOPPED:
                    self._finish(live, StopReason.STOP_TOKEN, token_id)
                else:
                    self._finish(live, StopReason.LENGTH if match is None else StopReason.STOP_STRING, match)

    # -- streams ------------------------------------------------------------------------------------------------------

    def _tell_streams(self) -> None:
        """Give those streams their tokens whose time has come: the first at once, those of a crowd at every tick."""
        tell_at, now = self._rows.tell_at, time.monotonic()
        streams = np.nonzero(tell_at < np.inf)[0]
        next_tick = (now // STREAM_SECONDS + 1) * STREAM_SECONDS if len(streams) > FEW_STREAMS else now
        for row in streams[tell_at[streams] <= now]:
            live = self._rows.sequences[row]
            assert live is not None
            if self._tell_tokens(live):
                tell_at[row] = next_tick

    def _tell_all_streams(self) -> None:
        for live in self._samples():
            if live.request.streaming:
                self._tell_tokens(live)

    def _tell_tokens(self, sample: LiveSample) -> bool:
        """Give a sample's stream its untold tokens; False if there are none."""
        first, row, state = sample.num_told, sample.row, self._rows
        if row >= 0:
            untold = slice(sample.num_prompt + first, state.num_tokens[row])
            tokens, log_probs, raw = (x[row, untold] for x in (state.tokens, state.log_probs, state.raw_log_probs))
        else:
            tokens = sample.tokens[sample.num_prompt + first :]
            log_probs, raw = sample.log_probs[first:], sample.raw_log_probs[first:]
        if not len(tokens):
            return False
        sample.num_told += len(tokens)
        top = sample.top_log_probs[first:] if sample.request.params.top_log_probs else None
        of_tokens = tokens.tolist(), log_probs.tolist(), raw.tolist()
        sample.request.chunks.append(
            CompletionChunk(sample.index, *of_tokens, top_log_probs=top, weight_version=self.scheduler.weight_version)
        )
        self._tell(sample.request)
        return True


def _score(scores: PromptScores, logits: torch.Tensor, start: int, end: int) -> None:
    """Note the log-probs of prompt tokens [start + 1, end + 1), of which ``logits`` [end - start, V] speak."""
    log_probs = logits.float().log_softmax(-1)
    tokens = torch.from_numpy(scores.tokens[start + 1 : end + 1].astype(np.int64)).to(logits.device)
    scores.log_probs += log_probs.gather(-1, tokens[:, None])[:, 0].tolist()
    if scores.num_top:
        values, ids = log_probs.topk(min(scores.num_top, logits.shape[-1]), dim=-1)
        scores.top += [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def _to_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Tensors of one shape as arrays, with one transfer from a GPU; float64 holds every id and float32 exactly."""
    if tensors[0].device.type == "cpu":
        return [x.numpy() for x in tensors]
    packed = torch.stack([x.double() for x in tensors]).cpu()
    return [x.to(like.dtype).numpy() for x, like in zip(packed, tensors, strict=True)]
