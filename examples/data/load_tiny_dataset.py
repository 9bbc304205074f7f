"""Five question-answer pairs as training samples, enough to see that a backend learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rollouts.training.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY_SFT = Path(__file__).parent / "tiny_sft.jsonl"


def load_tiny_sft(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """One sample a row, ``"Q: {prompt}\\nA: {completion}"`` and an end token; the mask is 0 on the prompt, 1 behind it.

    The whole text is tokenized at once and the mask found by character offsets: tokenized alone, the prompt could end
    in a token that the whole text does not have (its last space belongs to " Paris").
    """
    samples = []
    for line in TINY_SFT.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = f"Q: {row['prompt']}\nA:"
        encoded = tokenizer(f"{prompt} {row['completion']}", add_special_tokens=False, return_offsets_mapping=True)
        mask = [float(end > len(prompt)) for _, end in encoded["offset_mapping"]]
        samples.append(
            Sample(
                tokens=[*encoded["input_ids"], tokenizer.eos_token_id],
                loss_mask=[*mask, 1.0],
                prompt=row["prompt"],
                response=row["completion"],
            )
        )
    print(f"Loaded {len(samples)} samples")
    return samples
