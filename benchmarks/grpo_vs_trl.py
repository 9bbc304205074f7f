"""Group relative policy optimization, end to end, against TRL's GRPOTrainer: same model, prompts, reward and samples.

    python -m benchmarks.grpo_vs_trl                       # shapes A and B, three rounds: about 20 minutes on 2 cores
    python -m benchmarks.grpo_vs_trl --shapes A --rounds 1 --steps 3

A step is 16 prompts of 64 tokens, 8 samples of 64 new tokens each at temperature 1, a reward that varies within groups,
one AdamW step on all of them. Every measurement is a process of its own; a round runs every arm once, one after the
other. Samples a second are counted over whole steps: generation, reward, advantages, training and weight sync.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.workload import SHAPES, StepClock, Workload, peak_memory_mb

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 64, 64
ARMS = ["rollouts:bf16:compile", "rollouts:bf16", "rollouts:fp32", "trl:bf16", "trl:autocast", "trl:fp32"]


def prompts(vocab_size: int, count: int, seed: int = 0) -> Iterator[list[int]]:
    """Random ids, none of them the end token 0."""
    draw = random.Random(seed)
    return (draw.choices(range(1, vocab_size), k=PROMPT_TOKENS) for _ in range(count))


def reward(token_ids: list[int]) -> float:
    """The share of even ids: cheap, and different for every sample."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def word_tokenizer(vocab_size: int) -> Any:
    """One word a token, ``w0`` to ``w<n>``: TRL wants prompts as text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0")


def run_trl(workload: Workload, clock: StepClock, precision: str, *_: str) -> None:
    """``GRPOTrainer`` with its settings that generate fastest here: one generation and one optimizer step a batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock.imported()

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_done(PROMPTS * SAMPLES)

    def reward_fn(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert all(len(ids) == NEW_TOKENS for ids in completion_ids)
        return [reward(ids) for ids in completion_ids]

    vocab_size = workload.model_shape.vocab_size
    rows = [" ".join(f"w{t}" for t in p) for p in prompts(vocab_size, PROMPTS * (clock.total + 1))]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            temperature=1.0,
            max_steps=clock.total,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=precision == "autocast",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        GRPOTrainer(
            workload.make_model("bfloat16" if precision == "bf16" else "float32"),
            reward_funcs=reward_fn,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=word_tokenizer(vocab_size),
            callbacks=[Clock()],
        ).train()


def run_rollouts(workload: Workload, clock: StepClock, precision: str, *options: str) -> None:
    """``run_rl_training`` on the embedded engine, synchronous, with the trainer's own weights.

    ``bf16`` computes in bfloat16 and keeps float32 master weights. Prompts are text for both, and of as many tokens.
    """
    from rollouts.training import OptimizerConfig, create_pytorch_backend

    clock.imported()

    class Clock:
        def log(self, step: int, metrics: dict[str, Any]) -> None:
            clock.step_done(PROMPTS * SAMPLES)
            phases = {k: round(v, 3) for k, v in metrics.items() if "seconds" in k}
            print(step, phases, file=sys.stderr, flush=True)

        def close(self) -> None: ...

    backend = create_pytorch_backend(
        workload.make_model(),
        precision="bfloat16" if precision == "bf16" else "float32",
        optimizer=OptimizerConfig(lr=1e-5),
        compile="compile" in options,
    )
    # Two halves: half the groups, each its prompt once and eight replies with the token before them, are 4,664 tokens.
    train_by_grpo(backend, clock.total, Clock(), max_tokens_per_micro_batch=4672)


def train_by_grpo(
    backend: Any, num_steps: int, logger: Any, num_prompts: int = PROMPTS, num_samples: int = SAMPLES,
    new_tokens: int = NEW_TOKENS, **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Steps of ``num_prompts`` x ``num_samples`` by an engine over the backend's own weights; the steps' metrics."""
    import anyio

    from rollouts.inference import EmbeddedEngine, SamplingParams
    from rollouts.training import (
        AsyncRolloutManager,
        DataBuffer,
        EngineGenerate,
        RLTrainingConfig,
        RolloutConfig,
        Sample,
        run_rl_training,
    )

    def reward_fn(sample: Sample) -> float:
        ids = sample.tokens[PROMPT_TOKENS:]
        assert len(ids) == new_tokens
        return reward(list(ids))

    reward_fn.isolation = "inline"  # type: ignore[attr-defined]  # as TRL calls its own
    vocab_size = backend.model.config.vocab_size
    tokenizer = word_tokenizer(vocab_size)
    texts = [" ".join(f"w{t}" for t in p) for p in prompts(vocab_size, num_prompts * (num_steps + 1))]
    buffer = DataBuffer([Sample(prompt=text, id=str(i)) for i, text in enumerate(texts)])
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    with EmbeddedEngine(backend.model, max_length=PROMPT_TOKENS + new_tokens + 1) as engine:
        rollouts = RolloutConfig(
            batch_size=num_prompts,
            n_samples_per_prompt=num_samples,
            generate_fn=EngineGenerate(engine, tokenizer, params),
            reward_fn=reward_fn,
        )
        config = RLTrainingConfig(num_steps=num_steps, **settings)
        manager = AsyncRolloutManager(buffer, rollouts)
        return anyio.run(run_rl_training, backend, buffer, manager, [engine], config, logger)


# One measurement ------------------------------------------------------------------------------------------------------


def measure(task: dict[str, Any], output: Path) -> None:
    """In the child: run one arm, write its result as JSON to ``output``."""
    family, *options = task["arm"].split(":")
    clock = StepClock(task["warmup"], task["steps"])
    run = {"trl": run_trl, "rollouts": run_rollouts}[family]
    run(Workload(task["shape"], 256), clock, *options)
    rate = PROMPTS * SAMPLES / statistics.median(clock.seconds)
    output.write_text(json.dumps({"samples_per_second": rate, "peak_mb": peak_memory_mb(), "seconds": clock.seconds}))


def measure_in_child(arm: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    task = json.dumps({"arm": arm, "shape": shape, "warmup": arguments.warmup, "steps": arguments.steps})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.grpo_vs_trl", "--measure", task, "--output", str(output)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if child.returncode != 0 or not output.exists():
            raise SystemExit(f"{arm} failed:\n{child.stderr[-2000:]}")
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["A", "B"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)  # one arm, in the process of its own
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        return measure(arguments.measure, arguments.output)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for shape in arguments.shapes:
        rates: dict[str, list[float]] = {arm: [] for arm in arguments.arms}
        memory: dict[str, float] = {}
        for number in range(arguments.rounds):
            for arm in arguments.arms:
                result = measure_in_child(arm, shape, arguments)
                rates[arm].append(result["samples_per_second"])
                memory[arm] = result["peak_mb"]
                print(f"{shape} round {number + 1}: {arm}: {rates[arm][-1]:.1f} samples/s", file=sys.stderr, flush=True)
        print(f"\n{shape}: {SHAPES[shape].num_parameters:,} parameters\n")
        print("| arm | samples/s | peak MB |\n| --- | --- | --- |")
        for arm in arguments.arms:
            print(f"| {arm} | {statistics.median(rates[arm]):.1f} | {memory[arm]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
