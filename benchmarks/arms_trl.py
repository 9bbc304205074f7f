"""TRL's SFTTrainer as an arm, in each of its packings and precisions."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.workload import StepClock, Workload

PACKINGS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "grouped": {"packing": False, "train_sampling_strategy": "group_by_length"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split"},
    "padding_free": {"packing": False, "padding_free": True, "max_length": None},
}
# Settings of SFTConfig by option; "bf16" trains a model whose weights are bfloat16, "autocast" one in float32.
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"bf16": False},
    "autocast": {"bf16": True},
    "bf16": {"bf16": False},
    "compile": {"torch_compile": True},
    "checkpointing": {"gradient_checkpointing": True},
}


def run(workload: Workload, clock: StepClock, packing: str, *options: str) -> None:
    """Train with ``SFTTrainer`` (AdamW, clipping at 1, constant rate) for the clock's steps.

    Args:
        packing: a key of ``PACKINGS``.
        options: keys of ``OPTIONS``; exactly one of them a precision.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock.imported()

    class Clock(TrainerCallback):
        tokens_before = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_done(trainer._total_train_tokens - self.tokens_before)  # TRL's own count, padding excluded
            self.tokens_before = trainer._total_train_tokens

    samples = workload.samples(clock.total + 2)
    masks = map(workload.loss_mask, samples)
    labels = [[t if m else -100 for t, m in zip(s, mask, strict=True)] for s, mask in zip(samples, masks, strict=True)]
    settings: dict[str, Any] = {
        "max_length": workload.sequence,
        "per_device_train_batch_size": workload.rows,
        "max_steps": clock.total,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **PACKINGS[packing],
    }
    for option in options:
        settings |= OPTIONS[option]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            workload.make_model("bfloat16" if "bf16" in options else "float32"),
            args=SFTConfig(folder, **settings),
            train_dataset=Dataset.from_dict({"input_ids": samples, "labels": labels}),
            processing_class=_tokenizer(workload.model_shape.vocab_size),
            callbacks=[Clock()],
        )
        trainer.train()


def _tokenizer(vocab_size: int) -> Any:
    """A tokenizer that is only asked for its padding token: the samples come as ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")
