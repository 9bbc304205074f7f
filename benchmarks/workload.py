"""What every arm of a supervised-training benchmark shares: the model's shape, the ragged samples, the step clock."""

from __future__ import annotations

import random
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A Qwen3-architecture model with tied embeddings and one key-value head for every two heads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // 2

    @property
    def num_parameters(self) -> int:
        """Every trained number, the tied embedding counted once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        norms = 2 * self.hidden_size + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + norms
        return self.num_layers * layer + (self.vocab_size + 1) * self.hidden_size

    def training_flops(self, lengths: list[int]) -> int:
        """Forward and backward operations of isolated causal samples: ``6 * parameters`` a token, and attention.

        A sample of n tokens attends over n(n+1)/2 pairs; scores and values are two products of 2 operations a number,
        three times over for forward and backward. Recomputation and padding never count.
        """
        attention = 6 * self.num_layers * self.num_heads * self.head_dim * sum(n * (n + 1) for n in lengths)
        return 6 * self.num_parameters * sum(lengths) + attention

    def hf_config(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of ``Qwen3Config``."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **changes,
        }


SHAPES = {
    "A": Shape(hidden_size=128, num_layers=4, num_heads=4, head_dim=32, vocab_size=512),
    "B": Shape(hidden_size=320, num_layers=6, num_heads=10, head_dim=32, vocab_size=4096),
    "C": Shape(hidden_size=768, num_layers=12, num_heads=12, head_dim=64, vocab_size=16384),
}

# Rows of one optimizer step by sequence limit: what a padded or packed trainer calls its batch size.
ROWS = {256: {"A": 16, "B": 16, "C": 8}, 1024: {"A": 4, "B": 4, "C": 2}}

# Log-normal sample lengths (median, standard deviation of the logarithm), drawn again when outside [16, limit]. At 256
# this is GSM8K's question and answer in a 6,400-token vocabulary; at 1024, longer and more ragged conversations.
LENGTHS = {256: (200, 0.34), 1024: (450, 0.60)}


@dataclass(frozen=True)
class Workload:
    """One comparison: a shape, a sequence limit, and which tokens learn.

    Args:
        shape: a key of ``SHAPES``.
        sequence: the longest sample, and the length of a packed row, in tokens; a key of ``ROWS``.
        completion_only: True masks the first half of each sample out of the loss; False lets every token learn.
        seed: of the samples and of the weights.
    """

    shape: str
    sequence: int
    completion_only: bool = False
    seed: int = 0

    @property
    def model_shape(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def rows(self) -> int:
        return ROWS[self.sequence][self.shape]

    @property
    def tokens_per_step(self) -> int:
        """The most tokens that one optimizer step may hold."""
        return self.rows * self.sequence

    def samples(self, num_steps: int) -> list[list[int]]:
        """Random token ids, at least ``num_steps`` full steps of them; a longer list starts with the shorter one."""
        draw = random.Random(self.seed)
        median, log_std = LENGTHS[self.sequence]
        samples: list[list[int]] = []
        missing = num_steps * self.tokens_per_step
        while missing > 0:
            length = round(median * draw.lognormvariate(0.0, log_std))
            if 16 <= length <= self.sequence:
                samples.append(draw.choices(range(1, self.model_shape.vocab_size), k=length))
                missing -= length
        return samples

    def loss_mask(self, sample: list[int]) -> list[int]:
        """1 for each token of the sample that learns."""
        prompt = len(sample) // 2 if self.completion_only else 0
        return [0] * prompt + [1] * (len(sample) - prompt)

    def make_model(self, dtype: str = "float32", **config: Any) -> PreTrainedModel:
        """The shape as a plain transformers model with random weights."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(self.seed)
        model = Qwen3ForCausalLM(Qwen3Config(**self.model_shape.hf_config(**config)))
        assert model.num_parameters() == self.model_shape.num_parameters
        return model.to(getattr(torch, dtype))


class StepClock:
    """Times optimizer steps from the end of one to the end of the next, so that data loading counts.

    ``seconds``, ``cpu_seconds`` (of all threads) and ``tokens`` hold one entry a timed step; ``imports_mb`` is the
    memory of the process before it made a model.

    Args:
        warmup: steps before the clock starts (compilation, allocation); at least 1.
        steps: steps that are timed.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.tokens: list[int] = []
        self.imports_mb = 0.0
        self._seen = 0
        self._last = self._last_cpu = 0.0

    @property
    def total(self) -> int:
        return self.warmup + self.steps

    def imported(self) -> None:
        """The arm has imported what it needs and is about to make its model."""
        self.imports_mb = peak_memory_mb()

    def step_done(self, num_tokens: int) -> None:
        """A step that carried ``num_tokens`` real tokens (padding excluded) has ended."""
        now, cpu = time.perf_counter(), time.process_time()
        self._seen += 1
        if self._seen > self.warmup:
            self.seconds.append(now - self._last)
            self.cpu_seconds.append(cpu - self._last_cpu)
            self.tokens.append(num_tokens)
        self._last, self._last_cpu = now, cpu


def peak_memory_mb() -> float:
    """The highest resident memory of this process so far, in MB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
