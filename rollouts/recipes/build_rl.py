"""From a validated ``rl`` recipe to what the RL loop takes: models, engine, prompts, rollouts and evaluation."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rollouts.errors import UserError
from rollouts.inference import EmbeddedEngine, SamplingParams
from rollouts.inference.protocol import InferenceEngine, Sampler
from rollouts.models import load_hf_model, parse_dtype
from rollouts.models.critic import add_value_head, make_critic
from rollouts.models.load import cast_parameters
from rollouts.providers import ProviderError
from rollouts.recipes.rl_schema import Critic, RLRecipe
from rollouts.recipes.schema import DataSpec
from rollouts.training.algorithms.advantages import ESTIMATORS
from rollouts.training.algorithms.policy_losses import POLICY_LOSSES, PolicyLossConfig
from rollouts.training.algorithms.reward_model import make_prime_loss
from rollouts.training.algorithms.value import ValueLossConfig, make_value_loss
from rollouts.training.backends import pytorch_factory as factory
from rollouts.training.backends.fsdp import FSDPConfig
from rollouts.training.backends.optimizers import OptimizerConfig
from rollouts.training.backends.pytorch import PyTorchTrainingBackend
from rollouts.training.backends.reference import BaseModel, FrozenModel
from rollouts.training.datasets.data_buffer import DataBuffer
from rollouts.training.datasets.dataset_loaders import load_rl_prompts, load_samples_from_jsonl
from rollouts.training.datasets.sources import DatasetSpec
from rollouts.training.engine_pool import EnginePool
from rollouts.training.filters import FILTERS, judge
from rollouts.training.functions import load_function
from rollouts.training.loops.rl_batches import group_samples
from rollouts.training.loops.rl_evaluate import RewardEvaluation
from rollouts.training.loops.rl_loop import StoredRollouts, deal_stored
from rollouts.training.loops.rl_step import ProcessRewards, own_log_probs
from rollouts.training.remote_engines import RolloutsEngine, SGLangEngine, VLLMEngine
from rollouts.training.rewards.registry import RewardSpec, load_rewards
from rollouts.training.rollout_gen import AsyncRolloutManager, EngineGenerate, RolloutConfig
from rollouts.training.rollout_gen.concurrency import call
from rollouts.training.rollout_gen.greedy import GreedyBaselines
from rollouts.training.types import RLTrainingConfig, Sample
from rollouts.training.weight_delivery import WeightDelivery
from rollouts.training.weight_sync import WeightSyncManager

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Functions:
    """What the recipe names: found before anything large is loaded."""

    reward: list[RewardSpec]
    filter: Callable[..., Any] | None
    generate: Callable[..., Any] | None
    advantage: str | Callable[..., Any]
    loss: str | Callable[..., Any]
    restart: Callable[..., Any] | None = None


def load_functions(recipe: RLRecipe) -> Functions:
    """Raises UserError for a name that is unknown and a function that cannot be loaded."""
    rewards = [RewardSpec(r.function, r.weight, r.name, r.options) for r in recipe.reward]
    if rewards:
        load_rewards(rewards)
    rollout = recipe.rollout
    return Functions(
        reward=rewards,
        filter=load_function(rollout.filter, FILTERS, "filter") if rollout.filter else None,
        generate=load_function(rollout.generate, None, "generate") if rollout.generate else None,
        advantage=_named(recipe.advantage.name, list(ESTIMATORS), "advantage"),
        loss=_named(recipe.loss.name, list(POLICY_LOSSES), "policy loss"),
        restart=load_function(recipe.engine.restart, None, "restart") if recipe.engine.restart else None,
    )


def _named(spec: str, known: list[str], what: str) -> str | Callable[..., Any]:
    """A name of the library's own, as it is; or the user's function."""
    return spec if spec in known else load_function(spec, dict.fromkeys(known, print), what)


@dataclass
class RLRun:
    """Everything that ``run_rl_training`` takes, of one rank."""

    backend: PyTorchTrainingBackend
    config: RLTrainingConfig
    data_buffer: DataBuffer[Sample] | None = None
    manager: AsyncRolloutManager | GreedyBaselines | StoredRollouts | None = None
    engines: list[InferenceEngine] | WeightSyncManager = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)  # reference, critic, evaluate
    delivery: WeightDelivery | None = None  # of weights to servers

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Inside, servers that failed are brought back.

        Raises:
            UserError: one does not answer at the beginning, or not with log-probs that can be trained on.
        """
        if not isinstance(self.engines, WeightSyncManager):
            yield
            return
        servers: list[Any] = self.engines.engines
        try:
            for server in servers:
                await server.take_over()  # a run that was killed may have left it paused
                await server.connect()
            if self.delivery is not None:
                await self.delivery.choose(servers)
        except ProviderError as error:
            raise UserError(f"engine.url: {error}") from error
        try:
            async with self.engines:
                yield
        finally:
            for server in servers:
                await server.aclose()

    def close(self) -> None:
        for engine in self.engines if isinstance(self.engines, list) else ():
            if isinstance(engine, EmbeddedEngine):
                engine.close()


def build_run(
    recipe: RLRecipe,
    functions: Functions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sample],
    validation: Sequence[Sample],
    device: torch.device,
    use_fsdp: bool,
) -> RLRun:
    """Make the objects, copies of the model before the backend may shard it."""
    precision = parse_dtype(recipe.model.precision)
    is_main = not use_fsdp or torch.distributed.get_rank() == 0
    apart = use_fsdp or recipe.rollout.max_staleness > 0  # an engine that cannot read the trainer's own weights
    served = _copy(model, precision) if apart and is_main and recipe.engine.kind == "embedded" else None
    extras: dict[str, Any] = {}
    if recipe.needs_reference and recipe.model.lora is None:
        extras["reference"] = FrozenModel(model, device, precision)
    if recipe.critic is not None and not recipe.shares_trunk:
        extras["critic"] = build_critic(recipe, model, device, use_fsdp)
    if recipe.process_reward is not None:
        extras["process"] = build_process_rewards(recipe, model, tokenizer, device, use_fsdp)

    if recipe.shares_trunk:
        if not isinstance(functions.loss, str):
            raise UserError("critic.shared needs a policy loss by name; take another loss.name or a critic of its own")
        add_value_head(model)  # not before the copies, which have no use for it
    backend = build_backend(recipe, model, tokenizer, device, use_fsdp)
    if recipe.shares_trunk:
        extras["critic"] = backend
    if recipe.needs_reference and recipe.model.lora is not None:
        extras["reference"] = BaseModel(backend)
    run = RLRun(backend, build_config(recipe, functions), extras=extras)
    if is_main:
        engine: Sampler
        if recipe.engine.kind == "stored":
            run.manager, run.config = deal_stored(prompts, run.config)
            extras["reward_fn"] = functions.reward or None  # judges those without a reward
            return run
        if recipe.engine.kind == "embedded":
            embedded = build_engine(recipe, served if served is not None else backend.model, tokenizer)
            run.engines, engine = [embedded], embedded
        else:
            run.delivery = WeightDelivery(backend.model, Path(recipe.run_dir) / "weights", recipe.engine.weights)
            run.engines = build_servers(recipe, functions, backend, run.delivery)
            engine = EnginePool(run.engines)
        run.data_buffer = DataBuffer(prompts, seed=recipe.seed)
        generate = EngineGenerate(engine, tokenizer, build_sampling(recipe, functions))
        run.manager = AsyncRolloutManager(run.data_buffer, build_rollouts(recipe, functions, generate))
        if recipe.advantage.name == "remax":
            greedy = EngineGenerate(engine, tokenizer, replace(generate.params, temperature=0.0))
            run.manager = GreedyBaselines(run.manager, greedy, functions.reward)
        if recipe.train.eval_every and validation:
            extras["evaluate"] = build_evaluation(recipe, functions, engine, tokenizer, validation)
    return run


def load_data(recipe: RLRecipe, functions: Functions) -> tuple[list[Sample], list[Sample]]:
    """What is learned from, prompts or stored rollouts, and the prompts of the evaluation.

    Raises:
        UserError: a source that is missing or holds nothing of use, or bad rows.
    """
    if recipe.engine.kind == "stored":
        return load_stored(recipe, functions), []
    validation = build_prompts(recipe, recipe.data.validation) if recipe.data.validation else []
    return build_prompts(recipe, recipe.data.train), validation


def load_stored(recipe: RLRecipe, functions: Functions) -> list[Sample]:
    """Rollouts that runs left, without the groups that the filter refuses; groups of two files are never one."""
    kept: list[Sample] = []
    for number, spec in enumerate(recipe.data.train):
        for group in group_samples(load_samples_from_jsonl(spec.path)):
            if functions.filter is None or judge(functions.filter, group):
                kept += [replace(s, group_id=f"{number}/{s.group_id}" if s.group_id else "") for s in group]
    if not kept:
        raise UserError(f"{recipe.data.train[0].path}: holds no rollouts to learn from; give a run's rollouts.jsonl")
    return kept


def build_prompts(recipe: RLRecipe, specs: list[DataSpec]) -> list[Sample]:
    """The prompts of some of the recipe's data. Raises UserError as ``load_rl_prompts``."""
    sources = [DatasetSpec(**spec.model_dump()) for spec in specs]
    return load_rl_prompts(sources, on_bad_row=recipe.data.on_bad_row)


def build_config(recipe: RLRecipe, functions: Functions) -> RLTrainingConfig:
    advantage, loss, critic = recipe.advantage, recipe.loss, recipe.critic or Critic()
    options: dict[str, Any] = advantage.model_dump(exclude={"name"})
    options["reward_weights"] = tuple(advantage.reward_weights)
    if callable(functions.advantage):  # a function of the user's own gets the options that it takes
        options = _accepted(functions.advantage, options)
    if isinstance(functions.loss, str):
        keys = loss.model_dump(exclude={"correction", "dual_clip", "max_length"})
        policy_loss: Any = PolicyLossConfig(
            **keys, dual_clip=loss.dual_clip or None, max_length=loss.max_length or recipe.rollout.max_tokens
        )
    else:
        policy_loss = functions.loss
    return RLTrainingConfig(
        batch_size=recipe.rollout.batch_size,
        **recipe.train.model_dump(exclude={"max_grad_norm"}),
        advantage=functions.advantage,
        advantage_options=options,
        loss=policy_loss,
        correction=loss.correction,
        temperature=recipe.rollout.temperature,
        max_staleness=recipe.rollout.max_staleness,
        seed=recipe.seed,
        value_coef=critic.coef,
        value_clip=critic.clip,
    )


def build_sampling(recipe: RLRecipe, functions: Functions) -> SamplingParams:
    rollout = recipe.rollout
    return SamplingParams(
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=tuple(rollout.stop),
    )


def build_rollouts(recipe: RLRecipe, functions: Functions, generate: EngineGenerate) -> RolloutConfig:
    rollout = recipe.rollout
    same = (
        "batch_size", "n_samples_per_prompt", "over_sampling_factor", "order", "max_staleness", "max_retries",
        "generate_timeout_s", "reward_timeout_s", "max_dropped_groups",
    )  # fmt: skip
    generate_fn: Any = generate
    if functions.generate is not None:
        generate_fn = _WithEngine(functions.generate, generate)
    return RolloutConfig(
        **{name: getattr(rollout, name) for name in same},
        generate_fn=generate_fn,
        reward_fn=functions.reward,  # type: ignore[arg-type]
        filter_fn=functions.filter,
        overlap=rollout.max_staleness > 0,
        seed=recipe.seed,
    )


class _WithEngine:
    """The user's ``generate(samples, engine=..., tokenizer=..., params=...)``, given those of them that it takes."""

    def __init__(self, function: Callable[..., Any], default: EngineGenerate) -> None:
        offered = {"engine": default.engine, "tokenizer": default.tokenizer, "params": default.params}
        self._function, self._offered = function, _accepted(function, offered)
        self.abort = default.abort

    async def __call__(self, samples: list[Sample], **kwargs: Any) -> list[Sample]:
        return await call(self._function, samples, **self._offered, **kwargs)  # a thread's, if it is not async


def build_engine(recipe: RLRecipe, model: Any, tokenizer: PreTrainedTokenizerBase) -> EmbeddedEngine:
    section = recipe.engine
    return EmbeddedEngine(
        model,
        tokenizer,
        max_rows=section.max_rows,
        max_length=section.max_length,
        cache_bytes=int(section.cache_gb * 2**30),
        seed=recipe.seed,
    )


def build_servers(
    recipe: RLRecipe, functions: Functions, backend: PyTorchTrainingBackend, delivery: WeightDelivery
) -> WeightSyncManager:
    """The servers that the recipe names, kept on the backend's weights and checked by its log-probs."""
    section = recipe.engine
    kind = {"vllm": VLLMEngine, "sglang": SGLangEngine, "rollouts": RolloutsEngine}[section.kind]
    key = os.environ.get("ROLLOUTS_API_KEY")
    engines = [kind(url, api_key=key, timeout=section.timeout_s, max_retries=1) for url in section.url]

    async def restart(engine: Any) -> Any:
        if functions.restart is not None:
            await call(functions.restart, engine.base_url)
        await engine.reconnect()
        return engine

    reference, tolerance = own_log_probs(backend)
    return WeightSyncManager(engines, restart, prepare=delivery, reference=reference, tolerance=tolerance)


def build_evaluation(
    recipe: RLRecipe,
    functions: Functions,
    engine: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sample],
) -> RewardEvaluation:
    section = recipe.evaluation
    params = replace(build_sampling(recipe, functions), temperature=section.temperature)
    return RewardEvaluation(
        prompts[: section.max_samples],
        EngineGenerate(engine, tokenizer, params),
        functions.reward,
        n_samples_per_prompt=section.n_samples_per_prompt,
        seed=recipe.seed,
    )


def build_backend(
    recipe: RLRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, use_fsdp: bool
) -> PyTorchTrainingBackend:
    from rollouts.recipes.build import build_backend as build

    head_lr = recipe.critic.lr if recipe.critic is not None and recipe.shares_trunk else None
    return build(recipe, model, tokenizer, device, optimizer_steps(recipe), use_fsdp, head_lr)  # type: ignore[arg-type]


def optimizer_steps(recipe: RLRecipe) -> int:
    """Optimizer steps of the whole run, which the learning rate's schedule spans."""
    train = recipe.train
    resting = 0 if recipe.shares_trunk else train.value_steps  # a head's steps are the policy's
    return max(train.num_steps - resting, 1) * train.mini_batches * train.num_epochs


def build_critic(
    recipe: RLRecipe, policy: PreTrainedModel, device: torch.device, use_fsdp: bool
) -> PyTorchTrainingBackend:
    section = recipe.critic
    assert section is not None
    start: Any = policy if section.path is None else load_hf_model(section.path, device="cpu", dtype="float32")[0]
    options = {
        "optimizer": OptimizerConfig(lr=section.lr, weight_decay=section.weight_decay),
        "max_grad_norm": section.max_grad_norm,
        "loss_fn": make_value_loss(ValueLossConfig(section.clip)),
    }
    return build_companion(recipe, "critic", make_critic(start), device, use_fsdp, options)


def build_process_rewards(
    recipe: RLRecipe, policy: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device, use_fsdp: bool
) -> ProcessRewards:
    section = recipe.process_reward
    assert section is not None
    model: Any = copy.deepcopy(policy) if section.path is None else load_hf_model(section.path, "cpu", "float32")[0]
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    model.requires_grad_(True)
    reference = FrozenModel(model, device, parse_dtype(recipe.model.precision))
    options = {
        "tokenizer": tokenizer,
        "optimizer": OptimizerConfig(lr=section.lr),
        "max_grad_norm": section.max_grad_norm,
        "loss_fn": make_prime_loss(section.beta),
    }
    backend = build_companion(recipe, "process_reward", model, device, use_fsdp, options)
    return ProcessRewards(backend, reference, section.beta)


def build_companion(
    recipe: RLRecipe, name: str, model: PreTrainedModel, device: torch.device, use_fsdp: bool, options: dict[str, Any]
) -> PyTorchTrainingBackend:
    """The backend of a model that learns beside the policy, with checkpoints of its own."""
    options = {
        "checkpoint_dir": Path(recipe.run_dir) / f"{name}_checkpoints",
        "precision": recipe.model.precision,
        "device": device,
        "activation_checkpointing": recipe.model.activation_checkpointing,
        **options,
    }
    if use_fsdp:
        config = FSDPConfig(recipe.distributed.sharding, recipe.model.precision == "bfloat16")
        return factory.create_fsdp_backend(model.to(device), config=config, **options)  # type: ignore[arg-type]
    return factory.create_pytorch_backend(model.to(device), **options)  # type: ignore[arg-type]


def check_prompts(
    recipe: RLRecipe, prompts: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, max_positions: int
) -> None:
    """Look at prompts before anything is written: ``max_positions`` is the longest that the model can read, in tokens.

    Raises:
        UserError: the first prompt cannot be rendered (a template that fails does so for every prompt), or none leaves
            the engine room for a response.
    """
    if recipe.engine.kind == "stored":
        return  # tokens already

    def length(sample: Sample) -> int:
        try:
            return len(EngineGenerate(None, tokenizer).render(sample))  # type: ignore[arg-type]
        except Exception as error:
            raise UserError(f"prompt {sample.id}: the tokenizer's chat template fails on it: {error}") from error

    first = length(prompts[0])
    if recipe.engine.kind != "embedded" or recipe.rollout.generate is not None:
        return
    limit = min(max_positions, recipe.engine.max_length or 4096)  # as the engine has it
    if first >= limit and all(length(sample) >= limit for sample in prompts[1:]):
        raise UserError(
            f"{recipe.data.train[0].path}: none of the {len(prompts)} prompts is shorter than the engine's {limit} "
            f"tokens for prompt and response (the first has {first}); raise engine.max_length or shorten the prompts"
        )


def _copy(model: Any, precision: torch.dtype) -> Any:
    copied = copy.deepcopy(model).requires_grad_(False)
    cast_parameters(copied, precision)
    return copied


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {name: value for name, value in offered.items() if name in {p.name for p in parameters}}
