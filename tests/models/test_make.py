"""New models: reproducible, the shape asked for, and plain transformers models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts import models
from rollouts.errors import UserError
from rollouts.models.export import export_model
from rollouts.models.load import load_tokenizer
from rollouts.models.make import ARCHITECTURES, ModelConfig, make_model
from rollouts.models.tokenizer import save_tokenizer

IDS = torch.tensor([[5, 300, 17, 2, 9, 480]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_by_transformers_gives_the_same_logits(
    make_tiny_model, tiny_tokenizer, tmp_path, architecture, tied
):
    model = make_tiny_model(architecture=architecture, tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    save_tokenizer(tiny_tokenizer, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(loaded).__name__.lower().startswith(architecture)
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) is tied
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id, loaded.generation_config.eos_token_id) == (2, 0, 2)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("12 apples<|im_end|>") == tiny_tokenizer.encode(
        "12 apples<|im_end|>"
    )


def test_the_parameter_count_is_that_of_the_shape(make_tiny_model):
    h, layers, q, kv, ff, vocab = 64, 2, 4 * 16, 2 * 16, 192, 512
    per_layer = h * q + 2 * h * kv + q * h + 3 * h * ff + 2 * h + 2 * 16  # projections, feed-forward, norms
    assert make_tiny_model().num_parameters() == vocab * h + layers * per_layer + h


def test_a_seed_gives_one_model_and_leaves_the_global_random_state_alone(make_tiny_model):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = make_tiny_model(seed=3), make_tiny_model(seed=3), make_tiny_model(seed=4)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_lower_precision_is_the_same_model_rounded(make_tiny_model):
    full, half = make_tiny_model(seed=1), make_tiny_model(seed=1, dtype=torch.bfloat16)
    for a, b in zip(full.parameters(), half.parameters()):
        assert torch.equal(a.bfloat16(), b)
    for a, b in zip(full.buffers(), half.buffers()):  # rotary frequencies stay exact
        assert torch.equal(a, b)


def test_the_vocabulary_may_be_larger_than_the_tokenizer_but_not_smaller(make_tiny_model):
    assert make_tiny_model(vocab_size=640).get_input_embeddings().num_embeddings == 640
    with pytest.raises(UserError, match="512 tokens"):
        make_tiny_model(vocab_size=500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt5"}, "use one of qwen3, llama, qwen2"),
        ({"num_layers": 0}, "num_layers must be greater than 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be greater than 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "does not divide"),
        ({"hidden_size": 100, "num_heads": 3, "num_kv_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"architecture": "qwen2", "hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32}, "qwen2"),
    ],
)
def test_a_shape_that_cannot_be_is_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig(**changes)
    assert "\n" not in str(caught.value)


def test_the_default_shape_is_a_10m_model(tiny_tokenizer):
    model = make_model(ModelConfig(vocab_size=6400), tiny_tokenizer)
    assert 8e6 < model.num_parameters() < 12e6


def test_a_model_for_a_published_tokenizer(shared_data, tmp_path):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "minimind")
    model = make_model(ModelConfig(hidden_size=64, num_layers=1, num_heads=2), tokenizer)
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    folder = export_model(model, tokenizer, tmp_path / "out")
    loaded, again = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "How many are 12 and 30?"}]
    ids = again.apply_chat_template(messages, return_tensors="pt", return_dict=False)
    assert ids.tolist() == [tokenizer.apply_chat_template(messages, return_dict=False)]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_package_is_imported_without_torch():
    code = "import sys, rollouts.models, rollouts.models.chat_templates; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    for name in models.__all__:
        assert getattr(models, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = models.no_such_name
