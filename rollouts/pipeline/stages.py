"""The stages of the speedrun: each reads folders, writes one folder, and returns what the report says about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import torch

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.models import ModelConfig, export_checkpoint, load_hf_model, load_tokenizer, make_model, parse_device
from rollouts.models.tokenizer import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer
from rollouts.pipeline.documents import make_documents
from rollouts.pipeline.evaluation import grade_problems, summarize
from rollouts.pipeline.generation import generate, reply_to_problems
from rollouts.pipeline.tasks import (
    FAMILIES,
    Problem,
    is_correct,
    is_correct_turn,
    make_conversations,
    make_held_out,
    make_problems,
    turns,
)
from rollouts.pipeline.world import Split
from rollouts.training.backends.optimizers import OptimizerConfig, ScheduleConfig
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.backends.pytorch_factory import create_pytorch_backend
from rollouts.training.checkpoints import find_latest
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.datasets.dataset_loaders import SampleDataset, load_sft_dataset
from rollouts.training.datasets.sources import DatasetSpec
from rollouts.training.functions import nearest
from rollouts.training.loops import PretrainingConfig, TokenBlocks, run_pretraining, run_sft_training
from rollouts.training.loops.rl_loop import run_rl_training
from rollouts.training.loops.rl_metrics import RolloutLog
from rollouts.training.metrics import CompositeLogger, ConsoleLogger, JSONLLogger
from rollouts.training.rollout_gen.config import RolloutConfig
from rollouts.training.rollout_gen.engine_generate import EngineGenerate
from rollouts.training.rollout_gen.manager import AsyncRolloutManager
from rollouts.training.types import RLTrainingConfig, Sample, SFTTrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Summary = dict[str, Any]
Loop = Callable[..., Coroutine[Any, Any, list[dict[str, Any]]]]  # a training loop with most of its arguments given

OPENINGS = ("One sunny morning", "Tara had 12 apples.", "About Velm.", "Finn wrote a list: sun, ant, moon.")


@dataclass(frozen=True)
class TrainingStage:
    """How one model is trained: ``num_epochs`` passes over the data it is given.

    Args:
        batch_size: blocks (pre-training) or conversations (SFT) of an optimizer step.
        block_length: tokens of a pre-training block.
        log_every, eval_every, checkpoint_every: in steps; 0 = only at the end.
    """

    batch_size: int
    num_epochs: float = 1.0
    block_length: int = 256
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("muon", lr=3e-3))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("linear", min_lr_ratio=0.0))
    log_every: int = 50
    eval_every: int = 100
    checkpoint_every: int = 200

    def num_steps(self, count: int) -> int:
        """Steps that pass over ``count`` blocks or conversations ``num_epochs`` times."""
        return math.ceil(count * self.num_epochs / self.batch_size)


@dataclass(frozen=True)
class RLStage:
    """How the chat model learns from its own replies: GRPO on fresh problems with exactly checkable answers.

    Args:
        families: the kinds of problems, asked in equal parts.
        num_steps: batches of replies; each problem is asked in one of them only.
        prompts, samples: problems of a batch, and replies to each.
        mini_batches: optimizer steps that a batch is divided into.
        max_tokens: of a reply.
        log_every, checkpoint_every: in steps; 0 = only at the end.

    Raises:
        UserError: a family that there is not.
    """

    families: tuple[str, ...]
    num_steps: int
    prompts: int = 16
    samples: int = 8
    mini_batches: int = 1
    max_tokens: int = 48
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adamw", lr=5e-4))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("linear", min_lr_ratio=0.1))
    log_every: int = 20
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise UserError(f"no family of problems {name!r}{nearest(name, FAMILIES)}; use {', '.join(FAMILIES)}")


@dataclass(frozen=True)
class SpeedrunConfig:
    """Everything that decides how a speedrun comes out.

    Args:
        documents, conversations: how many to make for pre-training and SFT.
        validation: how many of each to make for the validation loss, from held-out problems.
        held_out: questions a family of tasks, for the evaluation.
        careless: share of wrong demonstrations in some families (``tasks.CARELESS_FAMILIES``): what SFT imitates and RL
            unlearns.
        rehearsal: share of the documents that SFT reads again, so that it does not unlearn them.
        precision: of computing: ``"float32"``, ``"bfloat16"`` (with float32 master weights), or ``"auto"`` for
            bfloat16 where the device has instructions for it.
        max_new_tokens: bound of each reply.
        temperature: of the sampled replies that the report shows beside the greedy ones.

    Raises:
        UserError: ``vocab_size`` is too small to hold all bytes.
    """

    documents: int
    conversations: int
    validation: int
    held_out: int
    vocab_size: int
    model: ModelConfig
    base: TrainingStage
    sft: TrainingStage
    rl: RLStage
    rehearsal: float = 0.1
    careless: float = 0.55
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    max_new_tokens: int = 64
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"vocab_size {self.vocab_size} is too small; use {MIN_VOCAB_SIZE} or more")


def make_data(config: SpeedrunConfig, out: Path) -> Summary:
    """Write the synthetic data as JSONL: documents, conversations, validation sets of both, and held-out problems."""
    seed, validation = config.seed, config.validation
    documents = make_documents(seed, config.documents, Split.TRAIN)
    conversations = make_conversations(seed, config.conversations, Split.TRAIN, config.careless)
    held_out = make_held_out(seed, config.held_out)
    write_jsonl(out / "documents.jsonl", ({"text": text} for text in documents))
    write_jsonl(out / "conversations.jsonl", (problem.to_row() for problem in conversations))
    unseen_documents = make_documents(seed, validation, Split.HELD_OUT)
    unseen_conversations = make_conversations(seed, validation, Split.HELD_OUT)
    write_jsonl(out / "documents_validation.jsonl", ({"text": text} for text in unseen_documents))
    write_jsonl(out / "conversations_validation.jsonl", (problem.to_row() for problem in unseen_conversations))
    write_jsonl(out / "held_out.jsonl", map(asdict, held_out))
    return {"documents": len(documents), "conversations": len(conversations), "held_out": len(held_out)}


def make_tokenizer(config: SpeedrunConfig, data: Path, out: Path) -> Summary:
    """Train the tokenizer on a part of the documents and conversations; write it in the Hugging Face layout."""
    texts = [row["text"] for row in read_jsonl(data / "documents.jsonl")[:4000]]
    for row in read_jsonl(data / "conversations.jsonl")[:2000]:
        texts += [message["content"] for message in row["messages"]]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    save_tokenizer(tokenizer, out)
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    return {"tokens": len(tokenizer), "characters_per_token": sum(map(len, texts)) / tokens}


def train_base(config: SpeedrunConfig, data: Path, tokenizer_folder: Path, out: Path) -> Summary:
    """Pre-train a new model on the documents; ``out`` is a run's folder with metrics, checkpoints and ``final/``."""
    tokenizer = load_tokenizer(tokenizer_folder)
    model = make_model(config.model, tokenizer, seed=config.seed).to(parse_device(config.device))
    samples, validation = load_samples(data, "documents", tokenizer)
    blocks = TokenBlocks(samples, config.base.block_length, config.seed)
    options = loop_options(config, config.base, len(blocks))
    loop_config = PretrainingConfig(**options, block_length=config.base.block_length)
    loop = partial(run_pretraining, documents=samples, config=loop_config, validation=validation)
    return train("base", config, config.base, model, tokenizer, samples, loop, loop_config.num_steps, out)


def train_sft(config: SpeedrunConfig, data: Path, base_folder: Path, out: Path) -> Summary:
    """Fine-tune the base model on the conversations; ``out`` as in ``train_base``."""
    model, tokenizer = load_hf_model(base_folder / "final", config.device, "float32")
    samples, validation = load_samples(data, "conversations", tokenizer, rehearsal=config.rehearsal)
    loop_config = SFTTrainingConfig(**loop_options(config, config.sft, len(samples)))
    loop = partial(run_sft_training, samples=samples, config=loop_config, validation=validation)
    return train("sft", config, config.sft, model, tokenizer, samples, loop, loop_config.num_steps, out)


def train_rl(config: SpeedrunConfig, sft_folder: Path, out: Path) -> Summary:
    """Let the chat model learn from its own graded replies; ``out`` as in ``train_base``, with ``rollouts.jsonl``."""
    stage = config.rl
    model, tokenizer = load_hf_model(sft_folder / "final", config.device, "float32")
    backend = make_backend(config, stage, model, tokenizer, stage.num_steps * stage.mini_batches, out)
    problems = make_problems(config.seed, stage.num_steps * stage.prompts, stage.families)
    asked = [each[i % len(each)] for i, each in enumerate(map(turns, problems))]  # one message of the assistant each
    prompts = [
        Sample(
            prompt=list(p.prompt),
            id=f"{i}",
            metadata={"number": i, "answer": p.answer, "task": p.family, "tools": list(p.tools) or None},
        )
        for i, p in enumerate(asked)
    ]

    async def reply_is_right(sample: Sample) -> float:
        return float(is_correct_turn(asked[sample.metadata["number"]], sample.response))

    buffer = DataBuffer(prompts, shuffle=False)
    loop_config = RLTrainingConfig(
        num_steps=stage.num_steps,
        mini_batches=stage.mini_batches,
        loss={"eps_high": 0.28},
        seed=config.seed,
        log_every=stage.log_every,
        checkpoint_every=stage.checkpoint_every,
        keep_checkpoints=1,
    )
    params = SamplingParams(max_tokens=stage.max_tokens)
    with (
        EmbeddedEngine(model, tokenizer, max_length=512, max_rows=stage.prompts * stage.samples) as engine,
        closing(RolloutLog(out / "rollouts.jsonl")) as rollout_log,
    ):
        rollouts = RolloutConfig(
            batch_size=stage.prompts,
            n_samples_per_prompt=stage.samples,
            generate_fn=EngineGenerate(engine, tokenizer, params),
            reward_fn=reply_is_right,
            seed=config.seed,
        )
        manager = AsyncRolloutManager(buffer, rollouts)
        loop = partial(run_rl_training, backend, buffer, manager, [engine], loop_config, rollout_log=rollout_log)
        last = run_loop("rl", loop, stage.num_steps, stage.log_every, out)
    return {
        **describe_model(backend),
        "steps": stage.num_steps,
        "samples": stage.num_steps * stage.prompts * stage.samples,
        "reward": last["reward_mean"],
    }


def load_samples(
    data: Path, name: str, tokenizer: PreTrainedTokenizerBase, rehearsal: float = 0.0
) -> tuple[SampleDataset, SampleDataset]:
    """Tokenized training samples of that name, ``rehearsal`` of the documents among them, and validation samples."""
    training = [DatasetSpec(str(data / f"{name}.jsonl"))]
    if rehearsal:
        training.append(DatasetSpec(str(data / "documents.jsonl"), repeat=rehearsal))
    validation = data / f"{name}_validation.jsonl"
    load = partial(load_sft_dataset, tokenizer=tokenizer, cache_dir=data / "tokenized")
    return load(training), load(validation)


def loop_options(config: SpeedrunConfig, stage: TrainingStage, count: int) -> dict[str, Any]:
    """What both loops are told, for data of ``count`` blocks or conversations."""
    return {
        "num_steps": stage.num_steps(count),
        "batch_size": stage.batch_size,
        "seed": config.seed,
        "eval_every": stage.eval_every,
        "checkpoint_every": stage.checkpoint_every,
        "keep_checkpoints": 1,
    }


def train(
    name: str,
    config: SpeedrunConfig,
    stage: TrainingStage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: SampleDataset,
    loop: Loop,
    num_steps: int,
    out: Path,
) -> Summary:
    """Run a loop over ``samples`` that takes a backend, and say what it made of the model."""
    backend = make_backend(config, stage, model, tokenizer, num_steps, out)
    last = run_loop(name, partial(loop, backend), num_steps, stage.log_every, out)
    return {
        **describe_model(backend),
        "steps": num_steps,
        "tokens": int(samples.lengths.sum()),
        "learned_tokens": int(samples.loss_counts.sum()),
        "val_loss": last["val_loss"],
    }


def make_backend(
    config: SpeedrunConfig,
    stage: TrainingStage | RLStage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_steps: int,
    out: Path,
) -> PyTorchTrainingBackend:
    """A backend for ``num_steps`` optimizer steps that keeps its checkpoints in ``out``."""
    return create_pytorch_backend(
        model,
        tokenizer,
        checkpoint_dir=out / "checkpoints",
        precision=native_precision(model.device) if config.precision == "auto" else config.precision,
        optimizer=stage.optimizer,
        schedule=stage.schedule,
        num_steps=num_steps,
    )


def run_loop(name: str, loop: Loop, num_steps: int, log_every: int, out: Path) -> dict[str, Any]:
    """Run ``loop``, from its last checkpoint if ``out`` holds one, and write the model to ``out/final``.

    Returns:
        The metrics of the last step.
    """
    logger = CompositeLogger([JSONLLogger(out / "metrics.jsonl"), ConsoleLogger(num_steps, log_every, name)])
    with closing(logger):
        history = anyio.run(partial(loop, metrics_logger=logger))
    step = find_latest(out / "checkpoints")
    assert step is not None, "the loop commits its last step"
    export_checkpoint(step, out / "final", overwrite=True)
    return history[-1]


def describe_model(backend: PyTorchTrainingBackend) -> Summary:
    precision = str(backend.compute_dtype).removeprefix("torch.")
    return {"parameters": sum(p.numel() for p in backend.model.parameters()), "precision": precision}


def native_precision(device: torch.device) -> str:
    """bfloat16 where the device has instructions for it, else float32: emulated, it is the slower of the two."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch does not have it
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


def evaluate(config: SpeedrunConfig, data: Path, models: Mapping[str, Path], out: Path) -> Summary:
    """Grade each model's greedy replies to the held-out problems, and sample from all of them.

    Writes ``{name}.jsonl`` with every graded reply, and ``samples.json``: continuations of a few openings, and one
    held-out problem a family, each greedy and sampled.
    """
    problems = [Problem(**row) for row in read_jsonl(data / "held_out.jsonl")]
    shown = [next(p for p in problems if p.family == family) for family in FAMILIES]
    accuracy, continued, replied = {}, {}, {}
    for name, folder in models.items():
        model, tokenizer = load_hf_model(folder / "final", config.device, "float32")
        graded = grade_problems(model, tokenizer, problems, max_new_tokens=config.max_new_tokens)
        write_jsonl(out / f"{name}.jsonl", graded)
        accuracy[name] = summarize(graded)
        ways = {"greedy": 0.0, "sampled": config.temperature}
        options: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
        continued[name] = {w: generate(model, tokenizer, OPENINGS, temperature=t, **options) for w, t in ways.items()}
        replied[name] = {
            w: reply_to_problems(model, tokenizer, shown, temperature=t, **options) for w, t in ways.items()
        }
    samples = {
        "temperature": config.temperature,
        "continuations": [
            {"opening": opening, **{name: {w: texts[w][i] for w in texts} for name, texts in continued.items()}}
            for i, opening in enumerate(OPENINGS)
        ],
        "replies": [
            {
                "family": p.family,
                "prompt": p.prompt,
                "answer": p.answer,
                "correct": {name: {w: is_correct(p, texts[w][i]) for w in texts} for name, texts in replied.items()},
                **{name: {w: texts[w][i] for w in texts} for name, texts in replied.items()},
            }
            for i, p in enumerate(shown)
        ],
    }
    (out / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    return {"accuracy": accuracy}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
