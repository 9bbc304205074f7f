"""Recipes of kind rl: presets beneath what is said, sections that repeat the library's fields, shipped recipes."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml

from rollouts.errors import UserError
from rollouts.recipes import rl_schema
from rollouts.recipes.build_rl import (
    build_config,
    build_rollouts,
    build_servers,
    check_prompts,
    load_functions,
    optimizer_steps,
)
from rollouts.recipes.load import load_recipe, to_yaml
from rollouts.recipes.rl_schema import ALGORITHMS, RLRecipe
from rollouts.training import (
    RLTrainingConfig,
    RolloutConfig,
    Sample,
    SGLangEngine,
    VLLMEngine,
    create_pytorch_backend,
)
from rollouts.training.algorithms.advantages import AdvantageConfig
from rollouts.training.algorithms.policy_losses import PolicyLossConfig
from rollouts.training.remote_engines import RolloutsEngine
from rollouts.training.rollout_gen import EngineGenerate
from rollouts.training.weight_delivery import WeightDelivery

MINIMAL: dict[str, Any] = {"model": "org/model", "data": {"train": "rows.jsonl"}, "reward": "gsm8k"}
SHIPPED = sorted(Path(rl_schema.__file__).parent.glob("rl_*.yaml"))


def load(folder: Path, overrides: dict[str, str] | None = None, **values: Any) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **values}))
    return load_recipe("rl", path, overrides)


def error_of(folder: Path, overrides: dict[str, str] | None = None, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, overrides, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_algorithm_is_one_line(tmp_path: Path) -> None:
    assert set(ALGORITHMS) == set(RLRecipe.model_fields["algorithm"].annotation.__args__)
    for name in ALGORITHMS:
        recipe = load(tmp_path, algorithm=name)
        functions = load_functions(recipe)
        config, rollouts = build_config(recipe, functions), build_rollouts(recipe, functions, generate=print)
        assert rollouts.n_samples_per_prompt == recipe.rollout.n_samples_per_prompt
        if name == "dapo":
            assert config.loss.bounds == (0.2, 0.28) and config.loss.aggregate_by == "token-mean"
            assert rollouts.filter_fn is not None and rollouts.over_sampling_factor == 1.5
        if name == "dr_grpo":
            assert config.advantage_options["norm_by_std"] is False and config.loss.max_length == 512
        if name == "ppo":
            assert config.advantage == "gae" and recipe.critic is not None and recipe.needs_reference
        if name == "gspo":
            assert config.loss.name == "gspo" and config.loss.bounds == (3e-4, 4e-4)


def test_the_schedule_spans_the_steps_of_the_policy(tmp_path: Path) -> None:
    steps = {"num_steps": 10, "mini_batches": 4, "value_steps": 5}
    assert optimizer_steps(load(tmp_path, algorithm="ppo", train=steps)) == 5 * 4
    assert optimizer_steps(load(tmp_path, algorithm="ppo", critic={"shared": True}, train=steps)) == 10 * 4


def test_servers_as_engines(tmp_path: Path, make_tiny_model: Any) -> None:
    backend = create_pytorch_backend(make_tiny_model())
    for kind, engine in (("sglang", SGLangEngine), ("vllm", VLLMEngine), ("rollouts", RolloutsEngine)):
        for url in ("http://localhost:1234", ["http://localhost:1234", "http://other:5"]):
            recipe = load(tmp_path, engine={"kind": kind, "url": url})
            delivery = WeightDelivery(backend.model, tmp_path / "weights", recipe.engine.weights)
            built = build_servers(recipe, load_functions(recipe), backend, delivery).engines
            assert [type(server) for server in built] == [engine] * len(recipe.engine.url)
            assert [server.base_url for server in built] == recipe.engine.url
            assert engine.__name__ in repr(built[0])


def generate_when_told(samples: list[Sample], engine: Any) -> list[Sample]:
    """As a user writes it who knows no async."""
    assert engine == "the engine" and TOLD.wait(60)
    return samples


TOLD = threading.Event()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_function_that_is_not_async_stops_nothing_else(tmp_path: Path, backend: str) -> None:
    recipe = load(tmp_path, rollout={"generate": f"{__file__}:generate_when_told"})
    functions = load_functions(recipe)
    functions.generate.__globals__["TOLD"] = told = threading.Event()
    generate: Any = EngineGenerate("the engine", None)  # type: ignore[arg-type]
    generate_fn = build_rollouts(recipe, functions, generate).generate_fn
    done: list[Sample] = []

    async def main() -> None:
        async def ask() -> None:
            done.extend(await generate_fn([Sample(tokens=[1], loss_mask=[0])]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            told.set()

    anyio.run(main, backend=backend)
    assert len(done) == 1


def test_what_the_recipe_says_comes_first(tmp_path: Path) -> None:
    recipe = load(tmp_path, {"loss.eps_high": "0.4", "rollout.filter": "null"}, algorithm="dapo", loss={"eps_low": 0.1})
    assert (recipe.loss.eps_low, recipe.loss.eps_high, recipe.loss.aggregation) == (0.1, 0.4, "token-mean")
    assert recipe.rollout.filter is None and recipe.rollout.over_sampling_factor == 1.5
    other = load(tmp_path, algorithm="gspo", loss="ppo_clip")
    assert (other.loss.name, other.loss.eps_low, other.loss.aggregation) == ("ppo_clip", None, None)


@pytest.mark.parametrize("values", [{}, {"algorithm": "dapo", "rollout": {"filter": None}}, {"algorithm": "ppo"}])
def test_the_resolved_recipe_loads_as_itself(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = load(tmp_path, **values)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(recipe))
    assert load_recipe("rl", resolved) == recipe


def test_sections_repeat_the_defaults_of_what_they_configure() -> None:
    pairs = [
        (rl_schema.RLTrain, RLTrainingConfig, {"num_steps", "checkpoint_every", "max_grad_norm"}),
        (rl_schema.Advantage, AdvantageConfig, {"reward_weights"}),
        (rl_schema.Loss, PolicyLossConfig, {"correction"}),
        (rl_schema.Rollout, RolloutConfig, {"batch_size", "n_samples_per_prompt"}),
    ]
    for section, library, apart in pairs:
        fields = {f.name: f.default for f in dataclasses.fields(library)}
        for name, info in section.model_fields.items():
            if name in fields and name not in apart:
                assert info.default == fields[name], (section.__name__, name)


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "did you mean --rollout.batch_size?" in error_of(tmp_path, {"rollout.batchsize": "3"})
    assert "critic go together" in error_of(tmp_path, advantage="gae")
    assert "critic.coef has no effect" in error_of(tmp_path, algorithm="ppo", critic={"coef": 0.5})
    assert "critic.path has no effect" in error_of(tmp_path, algorithm="ppo", critic={"shared": True, "path": "there"})
    assert "rollout.max_staleness" in error_of(tmp_path, train={"sync_every": 2})
    assert "data.validation" in error_of(tmp_path, train={"eval_every": 2})
    assert "algorithm" in error_of(tmp_path, algorithm="gprpo")
    assert "needs url" in error_of(tmp_path, engine={"kind": "vllm"})
    assert "model.lora" in error_of(tmp_path, engine={"kind": "vllm", "url": "http://x", "weights": "adapter"})
    for values, message in (
        ({"reward": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"loss": "gpso"}, "did you mean 'gspo'"),
        ({"advantage": "nothing"}, "advantage"),
        ({"rollout": {"filter": "nonzero_std"}}, "reward_nonzero_std"),
    ):
        with pytest.raises(UserError, match=message):
            load_functions(load(tmp_path, **values))


def test_prompts_that_the_engine_has_no_room_for(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """One that fits is enough: the others are left out, and counted, when their turn comes."""
    long, short = Sample(prompt="one " * 60, id="long"), Sample(prompt="one", id="short")

    def check(*prompts: Sample, positions: int = 500, **values: Any) -> None:
        check_prompts(load(tmp_path, **{"engine": {"max_length": 20}} | values), prompts, tiny_tokenizer, positions)

    check(long, short)
    check(long, rollout={"generate": "mine.py:generate"})
    check(long, engine={"kind": "vllm", "url": "http://localhost:1"})
    check(long, engine={})
    for prompts, values in (((long, long), {}), ((long,), {"engine": {}, "positions": 20})):
        with pytest.raises(UserError, match="the engine's 20 tokens"):
            check(*prompts, **values)


def test_functions_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def reward(sample): return 1.0\n"
        "def keep(group): return True\n"
        "def advantage(batch, gamma): return batch.rewards * gamma\n"
        "def loss(logits, labels, loss_mask, **fields): return logits.mean()\n"
        "async def generate(samples, engine): return samples\n"
    )
    recipe = load(
        tmp_path,
        reward=["mine.py:reward", {"function": "length", "weight": 0.1, "options": {"max_tokens": 5}}],
        rollout={"filter": "mine.py:keep", "generate": "mine.py:generate"},
        advantage="mine.py:advantage",
        loss="mine.py:loss",
    )
    assert recipe.loss.name == f"{tmp_path}/mine.py:loss"  # paths start at the recipe's folder
    functions = load_functions(recipe)
    config = build_config(recipe, functions)
    assert config.loss.__name__ == "loss" and config.advantage_options == {"gamma": 1.0}
    assert functions.filter([Sample()]) is True and functions.reward[1].weight == 0.1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe("rl", path)
    build_config(recipe, load_functions(recipe))
    assert recipe.data.train[0].path == "openai/gsm8k" and recipe.model.path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_there_are_four_shipped() -> None:
    assert [p.stem for p in SHIPPED] == ["rl_gsm8k_grpo", "rl_gsm8k_grpo_lora", "rl_gsm8k_ppo", "rl_gsm8k_prime"]


def test_the_documented_keys_are_all_of_them_with_their_defaults(tmp_path: Path) -> None:
    text = (Path(rl_schema.__file__).parents[2] / "docs" / "rl.md").read_text()
    documented = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    path = tmp_path / "documented.yaml"
    path.write_text(yaml.safe_dump(documented))
    load_recipe("rl", path)  # nothing in it is unknown
    for name in ("rollout", "engine", "advantage", "loss", "train", "evaluation"):
        section = RLRecipe.model_fields[name].default
        assert documented[name] == section.model_dump(), name
    top = {"run_dir", "seed", "device", "distributed", "loggers"}  # as in docs/recipes.md
    assert set(RLRecipe.model_fields) - top == set(documented)
