"""One forward pass of a step's tokens through the live model, keys and values going to the paged cache.

``StructuredForward`` reads the weights of Llama-shaped models itself, without the dispatch of transformers' modules;
``NativeForward`` does so in one compiled call; ``GenericForward`` calls any other transformers
model with its attention replaced. All read the module's own parameters at every step and hold no copy.

Shapes: T tokens of the step, D of them decoding, B with logits, C hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
import ctypes
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rollouts.errors import UserError
from rollouts.inference.adapters import merged_layers
from rollouts.inference.attention import Step, paged_attention
from rollouts.inference.kv_cache import KVCache
from rollouts.models.products import PLAIN_LINEARS

_PAGED_ATTENTION = "rollouts_paged"


class Forward(Protocol):
    """A forward pass over the cache.

    ``needs_reads``: whether it wants ``step.reads``. ``on_host``: whether it wants the step in the host's memory.
    """

    needs_reads: bool
    on_host: bool

    def __call__(self, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits [B, V] of ``step.outputs``."""
        ...

    def refresh(self) -> None:
        """Look at the model anew: its parameters may be other objects now."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """What the cache must know of a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        config = model.config
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
            config.max_position_embeddings,
        )


class StructuredForward:
    """Llama, Mistral, Qwen2 and Qwen3. Adapted layers (LoRA) are merged at each refresh; linear layers of other kinds
    are called as modules."""

    needs_reads, on_host = True, False

    def __init__(self, model: Any, max_length: int) -> None:
        base = model.model
        config = self.config = model.config
        self._model = model
        self._layers = list(base.layers)
        self.head_dim = self._layers[0].self_attn.head_dim
        self.scale = self._layers[0].self_attn.scaling
        self._eps = config.rms_norm_eps
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in self._layers]
        if config.model_type == "mistral":
            windows = [config.sliding_window] * len(windows)
        self.windows = windows
        like = base.embed_tokens.weight
        positions = torch.arange(max_length, device=like.device)[None]
        cos, sin = base.rotary_emb(like.new_empty(0), positions)
        self.cos, self.sin = cos[0], sin[0]  # [max_length, d], rounded as the model rounds them
        self.refresh()

    def __call__(self, step: Step, cache: KVCache) -> torch.Tensor:
        base = self._model.model
        cos, sin = self.cos[step.positions, None], self.sin[step.positions, None]  # [T, 1, d]
        x = F.embedding(step.token_ids, self._plain(base.embed_tokens).weight)
        for i, layer in enumerate(self._layers):
            attention, mlp = layer.self_attn, layer.mlp
            h = self._norm(x, layer.input_layernorm)
            query, key, value = (
                self._linear(h, linear).view(h.shape[0], -1, self.head_dim)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = self._norm(query, attention.q_norm), self._norm(key, attention.k_norm)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            out = paged_attention(query, key, value, cache.keys[i], cache.values[i], step, self.scale, self.windows[i])
            x = x + self._linear(out.flatten(1), attention.o_proj)
            h = self._norm(x, layer.post_attention_layernorm)
            gated = mlp.act_fn(self._linear(h, mlp.gate_proj)) * self._linear(h, mlp.up_proj)
            x = x + self._linear(gated, mlp.down_proj)
        return self._linear(self._norm(x[step.outputs], base.norm), self._model.lm_head)

    def refresh(self) -> None:
        self._merged = merged_layers(self._model)  # all others are asked for their parameters at every step

    def _plain(self, module: nn.Module) -> Any:
        return self._merged.get(module, module)

    def _linear(self, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        plain = self._plain(module)
        return F.linear(x, plain.weight, plain.bias) if type(plain) in PLAIN_LINEARS else plain(x)

    def parameters(self) -> list[torch.Tensor | None]:
        """Embedding, last norm, output layer, and 15 a layer in the order of ``Layer`` in step.cpp."""
        base, plain = self._model.model, self._plain
        tensors = [plain(base.embed_tokens).weight, base.norm.weight, plain(self._model.lm_head).weight]
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = [plain(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)]
            tensors += [layer.input_layernorm.weight, *(p.weight for p in projections), *(p.bias for p in projections)]
            tensors += (
                [attention.q_norm.weight, attention.k_norm.weight] if hasattr(attention, "q_norm") else [None] * 2
            )
            tensors += [layer.post_attention_layernorm.weight]
            tensors += [plain(p).weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        return tensors

    def fits_native(self) -> bool:
        """Whether the compiled step can read this model: plain linear layers on the CPU, of widths that it takes."""
        linears = {n: self._plain(m) for n, m in self._model.named_modules() if n.endswith(("_proj", "lm_head"))}
        biased = {name for name, linear in linears.items() if getattr(linear, "bias", None) is not None}
        if (
            any(type(linear) not in PLAIN_LINEARS for linear in linears.values())
            or any(not name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in biased)
            or self.config.hidden_act != "silu"
        ):
            return False
        tensors = [x for x in self.parameters() if x is not None]
        dtype = tensors[0].dtype
        widths = (self.config.hidden_size, self.head_dim, self.config.intermediate_size)
        return (
            dtype in (torch.float32, torch.bfloat16)
            and all(x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous() for x in tensors)
            and all(width % 16 == 0 for width in widths)
        )

    def _norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self._eps)
        return norm.weight * y.to(x.dtype)


class _NativeModel(ctypes.Structure):
    """``Model`` of step.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in (
            "num_layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab_size", "num_threads",
            "long_waits")]
        + [(name, ctypes.c_uint64) for name in ("layers", "embedding", "final_norm", "head", "cos", "sin")]
        + [(name, ctypes.c_double) for name in ("eps", "scale")]
    )  # fmt: skip


# A machine without a core to spare computes on one thread before it is asked again: not yet after its first slow step,
# for a server that writes to its clients takes a core for no longer than that; then longer each time, up to the most.
_SECONDS_ALONE, _MOST_SECONDS_ALONE = 0.005, 0.05


class NativeForward:
    """A whole step in one compiled call.

    A token's logits are bitwise the same whatever else the step computes, however its prompt was cut, and on any number
    of threads. Only where the processor has a matrix unit (AMX) does ``StructuredForward`` take the chunks of bfloat16
    prompts: it is several times as fast there, and its last bits may depend on the chunk.
    """

    needs_reads, on_host = False, True

    def __init__(self, structured: StructuredForward, library: ctypes.CDLL) -> None:
        config = structured.config
        self._structured = structured
        self._cos, self._sin = structured.cos.float().contiguous(), structured.sin.float().contiguous()
        self._layers = np.zeros((config.num_hidden_layers, 18), np.int64)
        self._layers[:, 17] = [window or 0 for window in structured.windows]
        self._model = _NativeModel(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            structured.head_dim, config.intermediate_size, config.vocab_size, 1, 0, self._layers.ctypes.data, 0, 0, 0,
            self._cos.data_ptr(), self._sin.data_ptr(), config.rms_norm_eps, structured.scale,
        )  # fmt: skip
        self.bfloat16 = structured.parameters()[0].dtype == torch.bfloat16  # type: ignore[union-attr]
        self._chunks_apart = self.bfloat16 and torch.cpu._is_amx_tile_supported()
        address, count = ctypes.c_void_p, ctypes.c_int64
        self._step = library.step_bfloat16 if self.bfloat16 else library.step_float32
        self._step.argtypes = (
            address, count, address, address, address, address, count, count, address, address, address
        )  # fmt: skip
        self._step.restype = None
        self.library = library
        self._bytes = library.step_bytes
        self._bytes.argtypes, self._bytes.restype = (address, count, count, count), count
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, dtype=torch.float32)  # kept: new memory of this size costs more than writing it
        self._alone_until, self._slow_steps = 0.0, 0  # in a row, of those on several threads
        self._shapes = [None if x is None else x.shape for x in structured.parameters()]
        self.refresh()

    def refresh(self) -> None:
        self._structured.refresh()
        self._parameters = self._structured.parameters()
        self._present = [x for x in self._parameters if x is not None]
        self._addresses: list[int] = []  # none yet: looked up by the next step

    def __call__(self, step: Step, cache: KVCache) -> torch.Tensor:
        if not self._chunks_apart or not step.chunks:
            return self._run(step, cache)
        logits = self._structured(without_decoding(step), cache)
        return torch.cat((self._run(without_chunks(step), cache), logits)) if step.num_decode else logits

    def _run(self, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits [B, V] float32, which the next step overwrites."""
        outputs, table = len(step.outputs), cache.page_table
        model, logits, memory = self.prepare(cache, len(step.token_ids), outputs)
        self._step(
            ctypes.addressof(model), len(step.token_ids), step.token_ids.data_ptr(), step.positions.data_ptr(),
            step.rows.data_ptr(), table.ctypes.data, table.shape[1], outputs, step.outputs.data_ptr(), logits, memory,
        )  # fmt: skip
        self.end_step()
        return self._logits[: outputs * model.vocab_size].view(outputs, model.vocab_size)

    def prepare(self, cache: KVCache, tokens: int, outputs: int) -> tuple[_NativeModel, int, int]:
        """The model as it is now, and addresses of memory for a step's logits and for its work."""
        self._point(cache)
        model = self._model
        model.num_threads = 1 if time.monotonic() < self._alone_until else torch.get_num_threads()
        size = self._bytes(ctypes.addressof(model), tokens, outputs, cache.page_table.shape[1])
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        if len(self._logits) < outputs * model.vocab_size:
            # Said wherever C++ writes: torch's default is another while transformers loads a model in any thread.
            self._logits = torch.empty(outputs * model.vocab_size, dtype=torch.float32)
        return model, self._logits.data_ptr(), self._memory.data_ptr()

    def end_step(self) -> None:
        """What a compiled step has told about its threads."""
        if self._model.num_threads > 1:
            self._note_waits(self._model.long_waits)

    def _note_waits(self, long_waits: int) -> None:
        """Decide how long to go on alone after a step in which threads have waited so often for each other."""
        if long_waits <= 3:
            self._slow_steps = 0
            return
        self._alone_until = time.monotonic() + min(self._slow_steps * _SECONDS_ALONE, _MOST_SECONDS_ALONE)
        self._slow_steps += 1

    def _point(self, cache: KVCache) -> None:
        """Write down where parameters and pages lie now: an assignment to a parameter's ``data`` moves it."""
        addresses = list(map(torch.Tensor.data_ptr, self._present))
        if addresses == self._addresses:
            return
        shapes = [None if x is None else x.shape for x in self._parameters]
        if not self._structured.fits_native() or shapes != self._shapes:
            raise RuntimeError("a parameter has changed shape, precision or device under the engine")
        self._addresses = addresses
        embedding, norm, head, *layers = (0 if x is None else x.data_ptr() for x in self._parameters)
        self._model.embedding, self._model.final_norm, self._model.head = embedding, norm, head
        self._layers[:, :15] = np.array(layers).reshape(-1, 15)
        self._layers[:, 15] = [x.data_ptr() for x in cache.keys]
        self._layers[:, 16] = [x.data_ptr() for x in cache.values]


def without_chunks(step: Step) -> Step:
    """The decoding tokens alone."""
    d = step.num_decode
    return replace(
        step,
        token_ids=step.token_ids[:d],
        positions=step.positions[:d],
        rows=step.rows[:d],
        pages=step.pages[:d],
        offsets=step.offsets[:d],
        chunks=[],
        outputs=step.outputs[:d],
    )


def without_decoding(step: Step) -> Step:
    """The chunks alone."""
    d = step.num_decode
    return replace(
        step,
        token_ids=step.token_ids[d:],
        positions=step.positions[d:],
        pages=step.pages[d:],
        offsets=step.offsets[d:],
        rows=step.rows[d:],
        num_decode=0,
        chunks=[replace(chunk, first=chunk.first - d) for chunk in step.chunks],
        outputs=step.outputs[d:] - d,
    )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GenericForward:
    """Any transformers causal model that takes its attention from transformers' attention interface.

    A trainer may compute with the same model in another thread at any moment, with its own attention, its dropout and
    its adapters switched on or off. So nothing of the model is changed: the modules that run here are copies, in
    evaluation mode, whose parameters and buffers are the model's own.
    """

    needs_reads, on_host = True, False

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        if not getattr(model, "_supports_attention_backend", False):
            raise UserError(f"the engine cannot serve {type(model).__name__}: its attention cannot be replaced")
        AttentionInterface.register(_PAGED_ATTENTION, _interface_attention)
        AttentionMaskInterface.register(_PAGED_ATTENTION, sdpa_mask)
        self._model = model
        self.refresh()

    def refresh(self) -> None:
        shared = {id(own): own for m in self._model.modules() for own in (m._parameters, m._buffers)}
        self._copy = copy.deepcopy(self._model, shared).eval()
        self._copy.config._attn_implementation = _PAGED_ATTENTION

    def __call__(self, step: Step, cache: KVCache) -> torch.Tensor:
        return self._copy(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=step.token_ids.device),
            use_cache=False,
            logits_to_keep=step.outputs,
            paged_step=step,
            paged_cache=cache,
        ).logits[0]


def _interface_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged_step: Step | None = None,
    paged_cache: KVCache | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, d], key and value [1, K, T, d] -> ([1, T, H, d], None)."""
    if softcap is not None:
        raise UserError(f"the engine cannot serve {type(module).__name__}: it caps its attention scores")
    assert paged_step is not None and paged_cache is not None
    out = paged_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        paged_cache.keys[module.layer_idx],
        paged_cache.values[module.layer_idx],
        paged_step,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
    )
    return out[None], None
