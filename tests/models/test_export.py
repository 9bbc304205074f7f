"""Export: plain transformers gives the same logits, tied weights lie there once, nothing half-written is left."""

from __future__ import annotations

import json
import resource
import shutil

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.errors import RunError, UserError
from rollouts.models.export import export_checkpoint, export_model, stored_dtype
from rollouts.models.folders import new_folder
from rollouts.models.load import load_hf_model
from rollouts.models.lora import add_lora, save_lora

IDS = torch.tensor([[5, 300, 17, 2, 9, 480]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def stored(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    """An adapter over the tiny model that changes its logits."""
    base, tokenizer = load_hf_model(tiny_model_dir, device="cpu", dtype="float32")
    model = add_lora(base)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return save_lora(model, tmp_path / "adapter", tokenizer), logits(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_plain_transformers_gives_the_same_logits(make_tiny_model, tiny_tokenizer, tmp_path, tied, dtype):
    model = make_tiny_model(tie_embeddings=tied)
    folder = export_model(model, tiny_tokenizer, tmp_path / "out", dtype=dtype, metadata={"step": 7})
    assert ("lm_head.weight" in stored(folder)) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # in the dtype that its config.json names
    assert loaded.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    assert model.dtype == torch.float32  # the model itself is as it was
    expected = model if dtype is None else make_tiny_model(tie_embeddings=tied, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(expected))
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer.chat_template
    assert json.loads((folder / "rollouts.json").read_text()) == {"step": 7}


def test_gathered_weights_replace_the_models_own(make_tiny_model, tmp_path):
    model, other = make_tiny_model(seed=0), make_tiny_model(seed=1)
    gathered = {
        name: t.clone() for name, t in other.state_dict().items()
    }  # no longer share memory, like all-gathered ones
    folder = export_model(model, None, tmp_path / "out", state_dict=gathered)
    assert "lm_head.weight" not in stored(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(other))


def test_large_models_are_sharded(make_tiny_model, tmp_path):
    model = make_tiny_model()
    folder = export_model(model, None, tmp_path / "out", max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert stored_dtype(folder) == torch.float32


def test_an_existing_folder_is_kept_unless_told(make_tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_model(make_tiny_model(), None, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]
    export_model(make_tiny_model(), None, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(OSError, match="disk"), new_folder(tmp_path / name, overwrite=overwrite) as partial:
            (partial / "file").write_text("half")
            raise OSError("disk full")
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"old", "old/file"}
    assert (tmp_path / "old" / "file").read_text() == "old"


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tiny_model_dir, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of a file; the weights are larger
    try:
        with pytest.raises(RunError, match=r"out could not be written: .*File too large.*; make room"):
            export_checkpoint(tiny_model_dir, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_model_with_an_adapter_is_not_written_as_plain_weights(make_tiny_model, tmp_path):
    with pytest.raises(UserError, match="merge it first"):
        export_model(add_lora(make_tiny_model()), None, tmp_path / "out")


def test_checkpoint_keeps_the_stored_precision_whatever_the_config_says(tiny_model_dir, tmp_path):
    """Checkpoints hold float32 master weights of a model that computes in bfloat16."""
    step = shutil.copytree(tiny_model_dir, tmp_path / "step")
    config = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (step / "trainer_state.json").write_text("{}")
    (step / "optimizer.safetensors").write_bytes(b"never read")
    out = export_checkpoint(step, tmp_path / "out")
    before, after = stored(tiny_model_dir), stored(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    assert not (out / "optimizer.safetensors").exists() and not (out / "trainer_state.json").exists()
    half = export_checkpoint(step, tmp_path / "half", dtype="float16")
    assert {t.dtype for t in stored(half).values()} == {torch.float16}
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"


def test_adapter_merged_into_plain_weights(adapter, tmp_path):
    folder, expected = adapter
    out = export_checkpoint(folder, tmp_path / "out", merge_lora=True)
    assert not (out / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_adapter_merged_in_float32_before_it_is_rounded(adapter, tmp_path):
    folder, _ = adapter
    full = stored(export_checkpoint(folder, tmp_path / "full", merge_lora=True))
    half = stored(export_checkpoint(folder, tmp_path / "half", dtype="bfloat16", merge_lora=True))
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)


def test_adapter_copied_as_it_is(adapter, tiny_model_dir, tmp_path):
    folder, expected = adapter
    out = export_checkpoint(folder, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, out)), expected)
    AutoTokenizer.from_pretrained(out)


def test_options_that_do_not_go_together(adapter, tiny_model_dir, tmp_path):
    folder, _ = adapter
    with pytest.raises(UserError, match="keeps its own precision"):
        export_checkpoint(folder, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(UserError, match="holds no adapter"):
        export_checkpoint(tiny_model_dir, tmp_path / "out", merge_lora=True)
    with pytest.raises(UserError, match="not supported"):
        export_checkpoint(tiny_model_dir, tmp_path / "out", dtype="int4")
    assert not (tmp_path / "out").exists()
