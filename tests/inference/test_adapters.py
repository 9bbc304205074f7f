"""Models with adapters: served as their merged layers, and as they are after each update."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from plain import plain_greedy, plain_log_probs, random_prompt
from transformers import PreTrainedModel

from rollouts.errors import UserError
from rollouts.inference import Completion, EmbeddedEngine, SamplingParams
from rollouts.inference.forward import make_forward
from rollouts.inference.model_runner import NativeForward
from rollouts.inference.native import native_library

PROMPT = random_prompt(40)
SAMPLED = SamplingParams(max_tokens=20, seed=3, n=3, ignore_eos=True)


@torch.no_grad()
def adapt(model: PreTrainedModel, seed: int = 0, **options: object) -> PeftModel:
    """A LoRA model whose adapter changes a good part of what the model says; dropout is on and in training mode."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": "all-linear", **options}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.normal_(std=0.2)
    return peft_model.train()


def assert_served(model: PeftModel, completions: list[Completion]) -> None:
    """Log-probs are a plain forward's through the adapters, without dropout."""
    model.eval()
    for got in completions:
        expected = plain_log_probs(model, PROMPT, got.token_ids)
        torch.testing.assert_close(got.log_probs, expected, atol=1e-4, rtol=0)
    model.train()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
    ids=["lora", "dora", "modules to save", "embeddings"],
)
def test_adapted_models_are_served_as_transformers_runs_them(
    make_peaked_model: Callable[..., PreTrainedModel], native: bool, options: dict[str, object]
) -> None:
    model = adapt(make_peaked_model(tie_embeddings=False), **options)
    bare = make_peaked_model(tie_embeddings=False)
    with EmbeddedEngine(model, max_length=128, native=native) as engine:
        got = engine.generate_batch([PROMPT], SAMPLED)
        assert_served(model, got)
        (greedy,) = engine.generate_batch([PROMPT], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        assert greedy.token_ids == plain_greedy(model.eval(), PROMPT, 20)
        assert greedy.token_ids != plain_greedy(bare, PROMPT, 20)
    if native and native_library() is not None:
        assert isinstance(make_forward(model.get_base_model(), 128), NativeForward)


def test_a_trained_adapter_is_served_after_an_update(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    model = adapt(make_peaked_model())
    with EmbeddedEngine(model, max_length=128) as engine:
        before = engine.generate_batch([PROMPT], SAMPLED)
        with engine.paused(), torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        engine.update_weights().wait(10)
        after = engine.generate_batch([PROMPT], SAMPLED)
    assert_served(model, after)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


@pytest.mark.parametrize("what", ["model", "named parameters", "adapter"])
def test_weights_of_another_adapted_model(make_peaked_model: Callable[..., PreTrainedModel], what: str) -> None:
    model, other = adapt(make_peaked_model()), adapt(make_peaked_model(), seed=1)
    weights = {"model": other, "named parameters": dict(other.named_parameters()),
               "adapter": get_peft_model_state_dict(other)}[what]  # fmt: skip
    with EmbeddedEngine(model, max_length=128) as engine:
        checksum = engine.weights_checksum()
        if what == "adapter":
            incomplete = dict(list(weights.items())[1:])  # type: ignore[attr-defined]
            with pytest.raises(UserError, match="lacks"):
                engine.update_weights(incomplete).wait(10)
            assert engine.weights_checksum() == checksum
        engine.update_weights(weights).wait(10)
        assert_served(other, engine.generate_batch([PROMPT], SAMPLED))
        with EmbeddedEngine(other, max_length=64) as reference:
            assert engine.weights_checksum() == reference.weights_checksum() != checksum


def test_a_disabled_or_merged_adapter(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    model = adapt(make_peaked_model())
    with EmbeddedEngine(model, max_length=128) as engine:
        with model.disable_adapter():
            engine.update_weights().wait(10)
        bare = make_peaked_model()
        for got in engine.generate_batch([PROMPT], SAMPLED):
            expected = plain_log_probs(bare, PROMPT, got.token_ids)
            torch.testing.assert_close(got.log_probs, expected, atol=1e-4, rtol=0)
        with engine.paused():
            model.merge_adapter()
        engine.update_weights().wait(10)
        assert_served(model, engine.generate_batch([PROMPT], SAMPLED))


def test_adapters_outside_the_layers_are_refused(make_peaked_model: Callable[..., PreTrainedModel]) -> None:
    model = get_peft_model(make_peaked_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="PROMPT_TUNING"):
        EmbeddedEngine(model, max_length=128)
