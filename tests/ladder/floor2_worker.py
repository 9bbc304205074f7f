"""One rank of floor 2 under torchrun, or all of it when started alone: python floor2_worker.py MODEL ROWS OUT."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from rollouts.models import load_hf_model
from rollouts.training import (
    OptimizerConfig,
    ScheduleConfig,
    SFTTrainingConfig,
    create_fsdp_backend,
    create_pytorch_backend,
    load_sft_dataset,
    run_sft_training,
)
from rollouts.training.distributed_utils import barrier, cleanup, init_process_group, is_main


def main() -> None:
    model_folder, rows, out = map(Path, sys.argv[1:])
    init_process_group("cpu")
    model, tokenizer = load_hf_model(model_folder, "cpu", "float32")
    samples = load_sft_dataset(rows, tokenizer, cache_dir=out / "cache")
    create = create_fsdp_backend if "WORLD_SIZE" in os.environ else create_pytorch_backend
    backend = create(
        model,
        tokenizer,
        checkpoint_dir=out / "checkpoints",
        precision="float32",
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig("linear"),
        num_steps=12,
        device="cpu",
    )
    config = SFTTrainingConfig(num_steps=12, batch_size=8, max_tokens_per_micro_batch=256, checkpoint_every=6)
    history = asyncio.run(run_sft_training(backend, samples, config, resume=True))
    barrier()
    if is_main():
        (out / "history.json").write_text(json.dumps(history))
    cleanup()


if __name__ == "__main__":
    main()
