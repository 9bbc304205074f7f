"""New models from a small configuration, in architectures that every engine already knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rollouts.errors import UserError
from rollouts.models.load import cast_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = ("qwen3", "llama", "qwen2")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer (RMSNorm, SwiGLU, rotary positions, grouped-query attention).

    Prefer ``qwen3``. Beside a ``qwen2`` configuration transformers reads every tokenizer as Qwen's own class, which
    composes characters first (NFC), so text with decomposed accents no longer survives encoding.

    Args:
        architecture: ``qwen3`` (queries and keys are normalized), ``llama``, or ``qwen2`` (they have biases).
        num_kv_heads: key/value heads, a divisor of ``num_heads``; None = ``num_heads``.
        head_dim: None = ``hidden_size // num_heads``. ``qwen2`` allows no other value.
        intermediate_size: width of the feed-forward block; None = 3 x hidden_size, rounded up to a multiple of 64.
        vocab_size: rows of the embedding; None = as many as the tokenizer has tokens.
        tie_embeddings: the output layer is the embedding itself.
        initializer_range: standard deviation of the initial weights.

    Raises:
        UserError: a value is out of range or two do not fit together.
    """

    architecture: str = "qwen3"
    hidden_size: int = 320
    num_layers: int = 6
    num_heads: int = 5
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    tie_embeddings: bool = True
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"model.architecture {self.architecture!r} is unknown; use one of {', '.join(ARCHITECTURES)}"
            )
        for name in ("num_kv_heads", "head_dim", "intermediate_size", "vocab_size"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        for name in ("hidden_size", "num_layers", "num_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"):
            self._check_positive(name)
        if self.num_heads % self.kv_heads:
            raise UserError(f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads {self.num_heads}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_heads {self.num_heads}; "
                "change one of them or give model.head_dim"
            )
        if self.head_size % 2:
            raise UserError(f"model.head_dim {self.head_size} is odd; rotary positions need an even one")
        if self.architecture == "qwen2" and self.head_size * self.num_heads != self.hidden_size:
            raise UserError(
                "model.head_dim of qwen2 must be hidden_size / num_heads; leave it out, or use qwen3 or llama"
            )

    def _check_positive(self, name: str) -> None:
        if getattr(self, name) <= 0:
            raise UserError(f"model.{name} must be greater than 0, got {getattr(self, name)}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def feed_forward_size(self) -> int:
        return -(-3 * self.hidden_size // 64) * 64 if self.intermediate_size is None else self.intermediate_size


def make_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A randomly initialized model for ``tokenizer``, on the CPU; one seed gives one set of weights.

    Weights are drawn in float32 and then cast, so models of one seed differ between dtypes by rounding only. The global
    random state is left as it was. EOS, BOS and padding ids go into the config and the generation config.

    Raises:
        UserError: ``config.vocab_size`` is smaller than the tokenizer.
    """
    import transformers

    vocab_size = len(tokenizer) if config.vocab_size is None else config.vocab_size
    if vocab_size < len(tokenizer):
        raise UserError(
            f"model.vocab_size {vocab_size} is smaller than the tokenizer, which has {len(tokenizer)} tokens; "
            "raise it or leave it out"
        )
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.architecture != "qwen2":  # whose code always divides hidden_size by the number of heads
        shape["head_dim"] = config.head_size
    hf_config = transformers.AutoConfig.for_model(config.architecture, **shape, **token_ids)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.generation_config.update(**token_ids)
    cast_parameters(model, dtype)
    model.config.dtype = dtype
    return model.eval()
