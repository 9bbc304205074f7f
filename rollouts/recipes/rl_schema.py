"""What a recipe of kind ``rl`` may say, and the algorithms of the field as tables of defaults.

``algorithm: dapo`` is no code path: it fills in what the recipe does not say, from ``ALGORITHMS``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from rollouts.recipes.schema import (
    KINDS,
    Data,
    Distributed,
    LoggerName,
    Model,
    Optimizer,
    PathOrHubName,
    Recipe,
    Schedule,
    Section,
    absolute_path,
    one_is_a_list,
    text_is_path,
)

Correction = Literal["none", "tis", "sequence_tis", "icepop", "mis", "geometric"]

# name -> section -> key -> value; a recipe's own keys come first. Everything not named here has the section's default.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {
        "advantage": {"name": "gae", "lam": 0.95},
        "critic": {},
        "train": {"mini_batches": 4, "kl_in_reward": 0.001, "value_steps": 5},
        "rollout": {"n_samples_per_prompt": 1, "batch_size": 256},
    },
    "grpo": {
        "advantage": {"name": "grpo"},
        "loss": {"aggregation": "seq-mean-token-mean", "kl_coef": 0.001, "kl": "k3"},
    },
    "dr_grpo": {
        "advantage": {"name": "grpo", "norm_by_std": False},
        "loss": {"aggregation": "seq-mean-token-sum-norm"},
    },
    "dapo": {
        "advantage": {"name": "grpo"},
        "loss": {"eps_low": 0.2, "eps_high": 0.28, "aggregation": "token-mean"},
        "rollout": {"filter": "reward_nonzero_std", "over_sampling_factor": 1.5},
        "train": {"mini_batches": 4},
    },
    "rloo": {"advantage": {"name": "rloo"}, "loss": {"name": "reinforce", "aggregation": "seq-mean-token-sum"}},
    "reinforce_plus_plus": {
        "advantage": {"name": "reinforce_plus_plus"},
        "train": {"mini_batches": 4, "kl_in_reward": 0.001},
    },
    "remax": {
        "advantage": {"name": "remax"},
        "loss": {"name": "reinforce"},
        "rollout": {"n_samples_per_prompt": 1, "batch_size": 128},
    },
    "prime": {
        "advantage": {"name": "prime"},
        "process_reward": {},
        "rollout": {"filter": "reward_nonzero_std", "over_sampling_factor": 2.0},
    },
    "gspo": {
        "advantage": {"name": "grpo"},
        "loss": {"name": "gspo", "eps_low": 3e-4, "eps_high": 4e-4, "aggregation": "seq-mean-token-mean"},
        "train": {"mini_batches": 4},
    },
    "cispo": {
        "advantage": {"name": "grpo"},
        "loss": {"name": "cispo", "eps_low": 1.0, "eps_high": 0.28, "aggregation": "token-mean"},
        "train": {"mini_batches": 4},
    },
}


def text_is_name(value: Any) -> Any:
    """Shorthand: a section that is only a name may be written as that name."""
    return {"name": value} if isinstance(value, str) else value


def text_is_function(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


def function_path(value: Any, info: ValidationInfo) -> Any:
    """``file.py:function`` with the file made absolute, as every path of a recipe."""
    if not isinstance(value, str) or ".py:" not in value:
        return value
    file, _, name = value.rpartition(":")
    return f"{absolute_path(type(value)(file), info)}:{name}"


FunctionName = Annotated[str, BeforeValidator(function_path), Field(min_length=1)]


class Reward(Section):
    """One reward of possibly several; the sample's reward is their weighted sum.

    function: a name (gsm8k, math, exact_match, ...), pkg.module:function, or file.py:function. name: of its metric.
    options: the function's own keyword arguments.
    """

    function: FunctionName
    weight: float = 1.0
    name: str = ""
    options: dict[str, Any] = Field({})


class Rollout(Section):
    """How prompts become samples; see ``rollouts.training.RolloutConfig`` and ``SamplingParams``.

    batch_size: prompts a step. max_tokens, temperature, top_p, top_k, min_p, stop: of a response. filter: a name
    (reward_nonzero_std, any_success, ...) or a function of a group. generate: a function in place of the engine's
    plain completion. max_staleness: steps that sampling may be ahead of training; above 0 both go on at once, the
    engine with a copy of the weights. overlap is set with it.
    """

    batch_size: int = Field(32, ge=1)
    n_samples_per_prompt: int = Field(8, ge=1)
    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: Annotated[list[str], BeforeValidator(one_is_a_list)] = Field([])
    filter: FunctionName | None = None
    generate: FunctionName | None = None
    over_sampling_factor: float = Field(1.0, ge=1)
    order: Literal["dealt", "finished"] = "dealt"
    max_staleness: int = Field(0, ge=0)
    max_retries: int = Field(5, ge=0)
    generate_timeout_s: float | None = Field(600.0, gt=0)
    reward_timeout_s: float = Field(30.0, gt=0)
    max_dropped_groups: int = Field(0, ge=0)


class Engine(Section):
    """What samples. kind: embedded, or servers that run already and are sent the weights: of SGLang, vLLM or
    `rollouts serve` (rollouts). ROLLOUTS_API_KEY is the key that they want, if any. With stored nothing samples:
    data.train are rollouts that some run left (its rollouts.jsonl), and reward may be missing.

    Of servers: url: an address, or several that share the work. weights: pushed out of the trainer's memory (push),
    through a folder in the run's that they can read (disk), a LoRA adapter alone (adapter), or the first of adapter,
    push and disk that all of them take (auto). restart: a function of the address of one that failed, which starts it
    again; null waits for somebody else to. timeout_s: of an answer, and of each step of an update.
    Of the embedded engine: max_rows: sequences at once. max_length: of prompt and response (null: the model's limit, at
    most 4,096). cache_gb: memory for keys and values.
    """

    kind: Literal["embedded", "rollouts", "sglang", "vllm", "stored"] = "embedded"
    url: Annotated[list[str], BeforeValidator(one_is_a_list)] = Field([])
    weights: Literal["auto", "push", "disk", "adapter"] = "auto"
    restart: FunctionName | None = None
    timeout_s: float = Field(300.0, gt=0)
    max_rows: int = Field(256, ge=1)
    max_length: int | None = Field(None, ge=2)
    cache_gb: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _servers_have_addresses(self) -> Self:
        if (self.kind in ("embedded", "stored")) == bool(self.url):
            raise ValueError("kind rollouts, sglang or vllm needs url, the servers' addresses; no other kind has one")
        if len(set(self.url)) < len(self.url):
            raise ValueError("url names a server twice; name each once")
        return self


class Advantage(Section):
    """The estimator: a name or a function of ``AdvantageBatch``; see ``rollouts.training.algorithms.advantages``."""

    name: FunctionName = "grpo"
    norm_by_std: bool = True
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    reward_weights: list[float] = Field([])


class Loss(Section):
    """The policy loss: a name or a loss function; see ``rollouts.training.algorithms.policy_losses``.

    dual_clip: 0 is off. max_length: of ``seq-mean-token-sum-norm`` (null: rollout.max_tokens). correction: null is
    tis where rollouts may be stale, else none.
    """

    name: FunctionName = "ppo_clip"
    eps_low: float | None = Field(None, ge=0)
    eps_high: float | None = Field(None, ge=0)
    dual_clip: float = Field(3.0, ge=0)
    aggregation: (
        Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] | None
    ) = None
    max_length: int | None = Field(None, ge=1)
    kl: str = "k3"
    kl_coef: float = Field(0.0, ge=0)
    entropy_coef: float = 0.0
    correction: Correction | None = None


class Critic(Section):
    """What expects rewards (PPO): a model of its own, or with shared: true a head on the policy's trunk. path: null
    starts from the policy's weights. clip: of a value's change from what it was at the start of the step. coef: weight
    of the shared critic's loss beside the policy's; its lr is the head's."""

    shared: bool = False
    path: PathOrHubName | None = None
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(0.5, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    coef: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        foreign = {"coef"} if not self.shared else {"path", "weight_decay", "max_grad_norm"}
        for name in sorted(foreign):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"critic.{name} has no effect with critic.shared: {str(self.shared).lower()}; drop it")
        return self


class ProcessReward(Section):
    """The implicit process reward model of PRIME, which learns from outcomes alone. path: null starts from the
    policy's weights. beta: scale of its log-ratio to its own start."""

    path: PathOrHubName | None = None
    lr: float = Field(1e-6, gt=0)
    beta: float = Field(0.05, gt=0)
    max_grad_norm: float = Field(10.0, gt=0)


class RLTrain(Section):
    """How to learn; the meaning of each key is ``rollouts.training.RLTrainingConfig``'s."""

    num_steps: int = Field(100, ge=1)
    mini_batches: int = Field(1, ge=1)
    num_epochs: int = Field(1, ge=1)
    max_tokens_per_micro_batch: int = Field(8192, ge=1)
    kl_in_reward: float = Field(0.0, ge=0)
    old_log_probs: Literal["auto", "trainer", "rollout"] = "auto"
    sync_every: int = Field(1, ge=1)
    value_steps: int = Field(0, ge=0)
    log_every: int = Field(1, ge=0)
    eval_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(50, ge=0)
    keep_checkpoints: int = Field(3, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_bad_steps: int = Field(5, ge=1)


class Evaluation(Section):
    """Greedy answers to the first prompts of data.validation, judged by the same reward. temperature: above 0
    samples. n_samples_per_prompt: more than one gives pass@k too."""

    max_samples: int = Field(200, ge=1)
    temperature: float = Field(0.0, ge=0)
    n_samples_per_prompt: int = Field(1, ge=1)


class RLRecipe(Recipe):
    """Reinforcement learning from verifiable rewards.

    algorithm: fills in what the recipe leaves open. reference: the model that KL is measured against: auto takes the
    starting weights where some KL is asked for (the base model under a LoRA adapter), none has none.
    """

    keep_nulls: ClassVar[bool] = True

    kind: Literal["rl"] = "rl"
    algorithm: Literal[
        "ppo", "grpo", "dr_grpo", "dapo", "rloo", "reinforce_plus_plus", "remax", "prime", "gspo", "cispo"
    ] = "grpo"
    device: str = "auto"
    model: Annotated[Model, BeforeValidator(text_is_path)]
    data: Data
    reward: Annotated[list[Annotated[Reward, BeforeValidator(text_is_function)]], BeforeValidator(one_is_a_list)] = (
        Field([])
    )
    rollout: Rollout = Rollout()
    engine: Engine = Engine()
    advantage: Annotated[Advantage, BeforeValidator(text_is_name)] = Advantage()
    loss: Annotated[Loss, BeforeValidator(text_is_name)] = Loss()
    reference: Literal["auto", "start", "none"] = "auto"
    critic: Critic | None = None
    process_reward: ProcessReward | None = None
    train: RLTrain = RLTrain()
    evaluation: Evaluation = Evaluation()
    optimizer: Optimizer = Optimizer(lr=1e-6)
    schedule: Schedule = Schedule(name="constant", warmup_ratio=0.0)
    distributed: Distributed = Distributed()
    loggers: list[LoggerName] = Field(["jsonl", "console"])

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Defaults of the algorithm, beneath what the recipe says."""
        if not isinstance(values, dict) or values.get("algorithm", "grpo") not in ALGORITHMS:
            return values
        filled = dict(values)
        for section, defaults in ALGORITHMS[values.get("algorithm", "grpo")].items():
            given = text_is_name(values.get(section, {}))
            if not isinstance(given, dict):
                continue  # null switches a part off; anything else is refused below
            name = defaults.get("name", getattr(cls.model_fields[section].default, "name", None))
            renamed = given.get("name", name) != name
            filled[section] = given if renamed else {**defaults, **given}
        return filled

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.advantage.name == "gae") != (self.critic is not None):
            raise ValueError("advantage gae and a critic go together; set both (algorithm: ppo) or neither")
        if (self.advantage.name == "prime") != (self.process_reward is not None):
            raise ValueError("advantage prime and process_reward go together; set both (algorithm: prime) or neither")
        if self.reference == "none" and (self.loss.kl_coef or self.train.kl_in_reward):
            raise ValueError("reference is none, but a KL to it is asked for; set both KL weights to 0")
        if self.train.sync_every > self.rollout.max_staleness + 1:
            raise ValueError("train.sync_every makes rollouts older than rollout.max_staleness allows; raise that")
        if not self.reward and self.engine.kind != "stored":
            raise ValueError("reward is missing; add it to the recipe or give --reward VALUE")
        if self.engine.kind == "stored":
            self._fits_stored()
        if self.train.eval_every and not self.data.validation:
            raise ValueError("train.eval_every is set, but data.validation names no prompts; add them")
        if self.engine.weights == "adapter" and not self.model.lora:
            raise ValueError("engine.weights: adapter needs model.lora; set it, or take push or disk")
        if self.model.lora and self.distributed.checkpoint_format == "sharded":
            raise ValueError("model.lora and distributed.checkpoint_format: sharded exclude one another; use full")
        return self

    def _fits_stored(self) -> None:
        if (
            self.train.eval_every
            or self.rollout.generate
            or self.rollout.max_staleness
            or self.advantage.name == "remax"
        ):
            raise ValueError(
                "engine.kind: stored samples nothing: leave out train.eval_every, rollout.generate, "
                "rollout.max_staleness and the algorithm remax"
            )
        if any(spec.repeat != 1 or spec.weight or spec.max_samples for spec in self.data.train):
            raise ValueError("engine.kind: stored reads whole files: leave repeat, weight and max_samples out of data")

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a head on the policy."""
        return self.critic is not None and self.critic.shared

    @property
    def needs_reference(self) -> bool:
        return self.reference == "start" or (
            self.reference == "auto" and bool(self.loss.kl_coef or self.train.kl_in_reward)
        )


KINDS["rl"] = RLRecipe
