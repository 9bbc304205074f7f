"""LoRA: what is trained, what is saved, and that plain peft and the merged weights agree with us."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollouts.errors import UserError
from rollouts.models.load import load_hf_model
from rollouts.models.lora import LoRAConfig, add_lora, merge_lora, save_lora

IDS = torch.tensor([[5, 300, 17, 2, 9, 480]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model, steps=3):
    """The model after a few steps, so that the adapter does something."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_only_the_adapter_is_trained_and_it_starts_as_nothing(make_tiny_model):
    base, before = make_tiny_model(), logits(make_tiny_model())
    model = add_lora(base, LoRAConfig(r=4, alpha=8))
    assert torch.equal(logits(model), before)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # A and B of seven matrices in each of two layers
    assert all("lora_" in name for name in trainable)
    trained(model)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_one_seed_gives_one_adapter(make_tiny_model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (add_lora(make_tiny_model(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [torch.cat([p.flatten() for n, p in m.named_parameters() if "lora_A" in n]) for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_target_modules(make_tiny_model):
    model = add_lora(make_tiny_model(), LoRAConfig(r=2, target_modules=("q_proj", "v_proj")))
    layers = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize("names", ["all-linear", ("all-linear",), ["all-linear"]])
def test_all_linear_layers_but_the_output(make_tiny_model, names):
    model = add_lora(make_tiny_model(tie_embeddings=False), LoRAConfig(r=2, target_modules=names))
    layers = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_update_is_alpha_over_r_times_b_a(make_tiny_model):
    model = trained(add_lora(make_tiny_model(), LoRAConfig(r=4, alpha=6)))
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    weight, a, b = layer.base_layer.weight.detach().clone(), layer.lora_A.default.weight, layer.lora_B.default.weight
    merged = merge_lora(model).model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged, weight + 6 / 4 * b @ a)


def test_the_saved_adapter_loads_in_plain_peft_and_merges_to_the_same_logits(tiny_model_dir, tmp_path):
    base, tokenizer = load_hf_model(tiny_model_dir, device="cpu", dtype="float32")
    model = trained(add_lora(base))
    expected = logits(model)
    folder = save_lora(model, tmp_path / "adapter", tokenizer)
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), folder
    )
    assert torch.equal(logits(plain), expected)

    ours, _ = load_hf_model(folder, device="cpu", dtype="float32")
    assert torch.equal(logits(ours), expected)
    assert [n for n, p in ours.named_parameters() if p.requires_grad]  # ready to be trained on
    merged = merge_lora(ours)
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_stays_float32_over_bfloat16_weights(make_tiny_model):
    model = add_lora(make_tiny_model(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_base_may_be_named_relative_to_its_adapter(tiny_model_dir, make_tiny_model, tmp_path):
    folder = save_lora(add_lora(make_tiny_model()), tmp_path / "adapter")
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    with pytest.raises(UserError, match="does not name its base"):
        load_hf_model(folder, device="cpu")
    (tmp_path / "base").symlink_to(tiny_model_dir)
    config.write_text(json.dumps({**values, "base_model_name_or_path": "../base"}))
    load_hf_model(folder, device="cpu")
    config.write_text(json.dumps({**values, "base_model_name_or_path": "."}))
    with pytest.raises(UserError, match="is an adapter too"):
        load_hf_model(folder, device="cpu")


def test_a_value_that_is_not_finite_is_not_merged(make_tiny_model):
    model = add_lora(make_tiny_model())
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        merge_lora(model)


@pytest.mark.parametrize(
    "changes",
    [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"target_modules": ()}],
)
def test_bad_values_are_one_clear_line(changes):
    with pytest.raises(UserError, match=f"model.lora.{next(iter(changes))}"):
        LoRAConfig(**changes)


def test_unknown_target_modules_name_the_known_ones(make_tiny_model):
    with pytest.raises(UserError, match="linear layers are down_proj, gate_proj, k_proj"):
        add_lora(make_tiny_model(), LoRAConfig(target_modules=("query",)))
