"""One model that is served: its engine and tokenizer, who is in line, and whether it is paused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.inference.protocol import UpdateMode
from rollouts.serving.errors import RequestError
from rollouts.serving.settings import Settings
from rollouts.serving.text import TokenNames
from rollouts.serving.weight_updates import WeightUpdates

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_model(models: Mapping[str, ServedModel], name: str | None) -> ServedModel:
    """The model that a request is about; the first if it names none. Raises RequestError (404)."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise RequestError(
            f"the model {name[:100]!r} is not served here; GET /v1/models lists those that are",
            "model",
            status=404,
            code="model_not_found",
        )
    return models[name]


class ServedModel:
    """State of one served model.

    Args:
        name: under which clients ask for it.
        path: where it was loaded from, as the person who started the server wrote it.
    """

    def __init__(
        self,
        name: str,
        path: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        *,
        max_rows: int = 256,
        max_length: int | None = None,
        cache_bytes: int = 1 << 30,
        seed: int = 0,
    ) -> None:
        self.name, self.path, self.tokenizer, self.settings = name, path, tokenizer, settings
        self.engine = EmbeddedEngine(
            model, tokenizer, max_rows=max_rows, max_length=max_length, cache_bytes=cache_bytes, seed=seed
        )
        self.updates = WeightUpdates(self, settings.group_timeout)
        self.token_names = TokenNames(tokenizer)
        self.created = int(time.time())
        self.request_ids: set[str] = set()  # of the requests that clients have named and that run or wait
        self.num_active = 0
        self._max_active = max_rows + settings.max_queue
        self._pause = ExitStack()
        self.paused = False
        self._changes = threading.Lock()  # pausing and weight updates, one at a time
        self._tokenizing = anyio.CapacityLimiter(1)

    def close(self) -> None:
        self.engine.close()

    # -- requests -----------------------------------------------------------------------------------------------------

    def check_places(self, count: int) -> None:
        """Raises RequestError (429) unless ``count`` more samples may join the line."""
        if self.num_active + count > self._max_active:
            raise RequestError(
                f"{self.num_active} samples of {self.name} are running or waiting; ask again later",
                status=429,
                code="queue_full",
            )

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Places for ``count`` samples, as long as the context lasts. Raises as ``check_places`` does."""
        self.check_places(count)
        self.num_active += count
        try:
            yield
        finally:
            self.num_active -= count

    @contextmanager
    def named(self, request_id: str | None) -> Iterator[None]:
        """A name for a request as long as the context lasts. Raises RequestError: another one has it."""
        if request_id is None:
            yield
            return
        if request_id in self.request_ids:
            raise RequestError("rid: a request with this id is running already", "rid")
        self.request_ids.add(request_id)
        try:
            yield
        finally:
            self.request_ids.discard(request_id)

    async def encode(self, text: str, param: str) -> list[int]:
        """Token ids of plain text."""
        ids = await anyio.to_thread.run_sync(self.tokenizer.encode, text, limiter=self._tokenizing)
        return self.check_prompt(ids, param)

    async def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> list[int]:
        """Token ids of a conversation in the model folder's own template, up to where the assistant speaks."""
        if self.tokenizer.chat_template is None:
            raise RequestError(f"{self.name} has no chat template; use /v1/completions", "model")

        def render() -> list[int]:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages,  # type: ignore[arg-type]
                tools=tools,  # type: ignore[arg-type]
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **options,
            )

        try:
            ids = await anyio.to_thread.run_sync(render, limiter=self._tokenizing)
        except Exception as error:  # a template may fail in any way on messages that it was not written for
            reason = str(error).strip().partition("\n")[0][:300]
            raise RequestError(
                f"the model's chat template cannot render these messages: {reason}", "messages"
            ) from error
        return self.check_prompt(ids, "messages")

    def check_prompt(self, ids: Sequence[int], param: str) -> list[int]:
        """The ids, if the engine can take them. Raises RequestError."""
        if not ids:
            raise RequestError(f"{param} is empty; give at least one token", param)
        if len(ids) >= self.engine.max_length:
            raise RequestError(
                f"{param} has {len(ids)} tokens, but {self.name} holds {self.engine.max_length} with the answer",
                param,
                code="context_length_exceeded",
            )
        if min(ids) < 0 or max(ids) >= self.engine.vocab_size:
            raise RequestError(f"{param} has token ids outside the vocabulary of {self.engine.vocab_size}", param)
        return list(ids)

    def has_tokens(self, *texts: str) -> bool:
        """Whether each text is one token of the vocabulary that the tokenizer keeps whole."""
        return all(text in self.tokenizer.get_added_vocab() for text in texts)

    async def sampling_params(self, num_prompt: int, names: dict[str, str], **arguments: Any) -> SamplingParams:
        """The parameters, if this server allows them; ``names`` are the request's own names where they differ.

        Raises:
            RequestError: one is out of range, or a schema or grammar is of no use; the message names the request's
                field.
        """
        try:
            params = SamplingParams(**arguments)
            await self.engine.compile_grammar(params)
        except UserError as error:
            field = next((name for name in arguments if f"parameter {name} " in str(error)), None)
            name = names.get(field or "", field)
            reason = str(error).partition("cannot be used: ")[2] or str(error).rpartition("; ")[2]
            raise RequestError(f"{name}: {reason}" if name else str(error), name) from error
        limits, engine = self.settings, self.engine
        room = engine.max_length - num_prompt
        checks = {
            "n": (params.n <= limits.max_n, f"at most {limits.max_n} samples of one prompt are allowed"),
            "max_tokens": (params.max_tokens <= room, f"the prompt leaves room for {room} tokens"),
            "stop": (
                len(params.stop) <= limits.max_stops and all(len(s) <= limits.max_stop_chars for s in params.stop),
                f"at most {limits.max_stops} strings of {limits.max_stop_chars} characters are allowed",
            ),
            "stop_token_ids": (
                len(params.stop_token_ids) <= limits.max_stops,
                f"at most {limits.max_stops} are allowed",
            ),
            "top_log_probs": (params.top_log_probs <= limits.max_top_log_probs, f"at most {limits.max_top_log_probs}"),
            "logit_bias": (
                all(0 <= token < engine.vocab_size for token in params.logit_bias),
                f"token ids lie between 0 and {engine.vocab_size - 1}",
            ),
        }
        for field, (good, message) in checks.items():
            if not good:
                name = names.get(field, field)
                raise RequestError(f"{name}: {message}", name)
        return params

    # -- weights ------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the engine between two steps; requests wait. Blocks until it has stopped."""
        with self._changes:
            if not self.paused:
                self._pause.enter_context(self.engine.paused())
                self.paused = True

    def resume(self) -> None:
        with self._changes:
            self._pause.close()
            self.paused = False

    async def retract(self) -> None:
        """Send the samples that run back to the line: their keys and values are computed anew when they go on."""
        await self.engine.update_weights(None, self.engine.weight_version, "retract")

    def change_weights(
        self,
        weights: Mapping[str, torch.Tensor] | nn.Module | None,
        version: int | None,
        mode: UpdateMode | None = None,
    ) -> int:
        """Serve other weights; gives their version. Blocks.

        Unless ``mode`` says otherwise samples in flight finish first on the old weights; those of a paused engine,
        which cannot, go on with the new.

        Raises:
            UserError: the weights do not fit; the old ones are served then.
        """
        with self._changes:
            mode = mode or ("continue" if self.paused else "drain")
            return self.engine.update_weights(weights, version, mode).wait()
