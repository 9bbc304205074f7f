"""A transformers model and what reads its logits as one module, so that one forward call (and FSDP) covers both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rollouts.errors import UserError
from rollouts.models.critic import VALUE_HEAD
from rollouts.models.packed_attention import packed_mask, use_packed_attention
from rollouts.models.products import PLAIN_LINEARS
from rollouts.training.backends.protocol import Batch
from rollouts.training.sft_losses import DeferredLogits, LossFn

# Models whose logits are more than one matrix product of the hidden states compute them themselves.
_LOGIT_EXTRAS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class LossModel(nn.Module):
    """``forward(batch, loss_fn)`` -> what ``loss_fn(logits, labels, loss_mask, **other batch fields)`` gives.

    Args:
        model: a transformers causal language model or sequence classifier (which gives scores [B, S, labels] for
            logits), or a peft model around one.

    Raises:
        UserError: the model's attention does more than softmax(q k) v (attention sinks, for example), or it has a value
            head and computes its logits in a way of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        causal_lm: Any = model
        self._causal_lm = causal_lm.get_base_model() if hasattr(model, "peft_config") else causal_lm
        if not self._causal_lm._supports_sdpa:
            raise UserError(
                f"{type(self._causal_lm).__name__} cannot be trained here: transformers gives it no plain attention "
                "(sdpa), which packed attention stands in for; take another model"
            )
        use_packed_attention(self._causal_lm)
        self._scores = hasattr(self._causal_lm, "score")  # a sequence classifier; its own forward reads one token alone
        # An adapter on the output layer makes it more than one matrix product, too.
        plain_head = type(self._causal_lm.get_output_embeddings()) in PLAIN_LINEARS
        self._defer = plain_head and not any(getattr(self._causal_lm.config, name, None) for name in _LOGIT_EXTRAS)

        if hasattr(self._causal_lm, VALUE_HEAD) and not self._defer:
            raise UserError(
                f"a value head does not fit {type(self._causal_lm).__name__}: its logits are more than one product of "
                "the last hidden states; take a critic of its own (critic.shared: false)"
            )

    def forward(self, batch: Batch, loss_fn: LossFn) -> Any:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        if "cu_seqlens" in batch:
            inputs |= {
                "position_ids": batch["position_ids"],
                "attention_mask": packed_mask(batch["input_ids"].device),
                "cu_seqlens": batch["cu_seqlens"],
                "max_seqlen": batch["max_seqlen"],
            }
            if "prefixes" in batch:
                inputs["prefixes"] = batch["prefixes"]
        # Rows padded on the right need no mask: under causal attention no token sees the padding behind it.
        logits: torch.Tensor | DeferredLogits
        if self._scores:
            logits = self._causal_lm.score(self._causal_lm.base_model(**inputs).last_hidden_state)
        elif self._defer and getattr(loss_fn, "accepts_deferred_logits", False):
            hidden = self._causal_lm.base_model(**inputs).last_hidden_state
            head = self._causal_lm.get_output_embeddings()
            value_head = getattr(self._causal_lm, VALUE_HEAD, None)
            logits = DeferredLogits(
                hidden, head.weight, getattr(head, "bias", None), batch.get("loss_positions"),
                None if value_head is None else value_head.weight,
            )  # fmt: skip
        else:
            logits = self.model(**inputs).logits
        extras = {k: batch[k] for k in batch if k not in _MODEL_KEYS}
        return loss_fn(logits, batch["labels"], batch["loss_mask"], **extras)


_MODEL_KEYS = {
    "input_ids", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen", "prefixes",
    "loss_positions",
}  # fmt: skip


def flops_per_token(model: Any, mean_length: float) -> float:
    """Floating-point operations of one forward and backward pass per token: 6 per weight that multiplies it, and
    6 * layers * width * length of causal attention (arXiv:2204.02311, appendix B, halved for the causal half)."""
    config = getattr(model, "config", None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    if embedding is not None and (head is None or head.weight is not embedding.weight):
        weights -= embedding.weight.numel()  # a look-up multiplies nothing
    heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
    head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // max(heads, 1))
    return 6.0 * weights + 6.0 * layers * heads * head_dim * mean_length
