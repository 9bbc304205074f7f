"""Loading: what a folder must hold, what is refused in one line, and that nothing in a folder is ever executed."""

from __future__ import annotations

import json
import pickle
import shutil

import jinja2
import pytest
import torch

from rollouts.errors import UserError
from rollouts.models.load import load_hf_model, load_tokenizer, parse_device, parse_dtype

IDS = torch.tensor([[5, 300, 17, 2, 9, 480]])


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(pattern, *args, **kwargs):
    with pytest.raises(UserError, match=pattern) as caught:
        load_hf_model(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_model_is_that_of_transformers(tiny_model_dir, dtype, expected, capsys):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_hf_model(str(tiny_model_dir), device="cpu", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=expected)
    assert model.dtype == expected and not model.training
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert len(tokenizer) == 512
    assert f"{model.num_parameters():,} parameters, {str(expected)[6:]}, cpu" in capsys.readouterr().out


def test_only_the_first_rank_speaks(tiny_model_dir, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    load_hf_model(tiny_model_dir, device="cpu")
    assert capsys.readouterr().out == ""


def test_eos_serves_where_there_is_no_padding_token(folder):
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    edit_json(folder / "config.json", pad_token_id=None)
    edit_json(folder / "generation_config.json", pad_token_id=None)
    model, tokenizer = load_hf_model(folder, device="cpu")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_a_model_is_named_by_its_folder_or_its_hub_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model, _ = load_hf_model("model", device="cpu")
    assert model.name_or_path == str(folder.resolve())


def test_a_hub_name_is_looked_up_in_the_cache_and_kept_as_the_name(tiny_model_dir, tmp_path, monkeypatch):
    """Offline, with the cache laid out as the hub client does; the name is what an adapter will call its base."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_model_dir, repository / "snapshots" / ("0" * 40))
    model, tokenizer = load_hf_model("someone/tiny", device="cpu")
    assert model.name_or_path == "someone/tiny"
    assert len(tokenizer) == 512


def test_sharded_weights(tiny_model_dir, folder):
    model, tokenizer = load_hf_model(tiny_model_dir, device="cpu", dtype="float32")
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again, _ = load_hf_model(folder, device="cpu", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    next(folder.glob("*.safetensors")).unlink()
    refused("cannot be loaded", folder, device="cpu")


def test_folders_that_are_not_there():
    refused("/no/such/folder does not exist", "/no/such/folder")
    refused("runs/sft/final does not exist", "runs/sft/final")
    refused("is no folder, and the hub gave no model", "nobody/no-such-model")  # HF_HUB_OFFLINE: no network is tried


def test_a_file_is_not_a_model(folder):
    refused("is a file", folder / "config.json")


def test_no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    refused("holds no tokenizer", folder, device="cpu")


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    refused("the tokenizer in .* cannot be loaded", folder, device="cpu")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused("config.json does not exist", folder, device="cpu")


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    refused("config.json", folder, device="cpu")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused("holds no weights", folder, device="cpu")


def test_weights_only_as_a_pickle(folder):
    weights = load_hf_model(folder, device="cpu")[0].state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(r"only as a pickle \(pytorch_model.bin\)", folder, device="cpu")


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot be loaded", folder, device="cpu")


def test_weights_of_another_shape(folder):
    edit_json(folder / "config.json", hidden_size=32)
    refused(
        r"do not fit its config.json: model.embed_tokens.weight has shape \[512, 64\] in place of \[512, 32\]",
        folder,
        device="cpu",
    )


def test_missing_tensors_are_not_filled_with_random_values(folder):
    edit_json(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused("lack 11 tensors .*, for example model.layers.2", folder, device="cpu")


def test_a_tokenizer_larger_than_the_embedding(folder, make_tiny_model, tiny_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    refused("513 tokens, but the model's embedding has only 512", folder, device="cpu")


@pytest.mark.parametrize("dtype", ["int8", "float8", "", "auto", torch.int64])
def test_dtypes_that_are_not(tiny_model_dir, dtype):
    refused("is not supported; use bfloat16", tiny_model_dir, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu:0", "meta", "", "cuda:x"])
def test_devices_that_are_not(tiny_model_dir, device):
    refused("device", tiny_model_dir, device=device)


def test_names_of_dtypes_and_devices():
    assert parse_dtype("bf16") is parse_dtype("torch.bfloat16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")
    assert parse_device("auto") == parse_device(None)
    assert parse_device(None).type == (torch.accelerator.current_accelerator() or torch.device("cpu")).type


# The canary: code and pickles planted in a folder would leave a file behind if anything ran them.

EVIL_CODE = """
import transformers
open({canary!r}, "w").close()
class EvilConfig(transformers.Qwen3Config): pass
class EvilModel(transformers.Qwen3ForCausalLM): pass
class EvilTokenizer(transformers.PreTrainedTokenizerFast): pass
"""


class Planted:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def evil(folder, canary):
    """A complete model folder that points at its own code everywhere transformers looks for such a pointer."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(EVIL_CODE.format(canary=str(canary)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL_CODE.format(canary=str(canary)))
    edit_json(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilModel",
            "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
        },
    )
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]},
    )
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Planted(str(canary))))
    return folder


def test_the_canary_would_sing(evil, canary):
    """The trap works: with remote code allowed, transformers does run it, and so does unpickling."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(evil, trust_remote_code=True)
    assert canary.exists()
    canary.unlink()
    pickle.loads((evil / "pytorch_model.bin").read_bytes())
    assert canary.exists()


def test_a_known_architecture_loads_without_its_own_code(evil, canary):
    model, tokenizer = load_hf_model(evil, device="cpu")
    load_tokenizer(evil)
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert type(model).__module__.startswith("transformers.")
    assert not canary.exists()


def test_an_unknown_architecture_is_refused_without_running_it(evil, canary):
    edit_json(evil / "config.json", model_type="evil", architectures=["EvilModel"])
    refused("code that comes with a model is never run", evil, device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("tokenizer_class", ["EvilTokenizer", "PreTrainedTokenizerFast", None])
def test_a_tokenizer_never_runs_its_own_code(evil, canary, tokenizer_class):
    edit_json(evil / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    (evil / "config.json").unlink()
    try:
        load_tokenizer(evil)
    except UserError as error:
        assert "\n" not in str(error)
    assert not canary.exists()


def test_an_adapter_never_runs_code_or_a_pickle(evil, canary, tiny_model_dir, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(evil / "adapter_model.bin", adapter)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(evil),
        "target_modules": ["q_proj"],
        "auto_mapping": {"base_model_class": "EvilModel", "parent_library": "modeling_evil"},
        "megatron_config": {},
        "megatron_core": "modeling_evil",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refused("only safetensors are loaded", adapter, device="cpu")
    assert not canary.exists()


def test_a_template_cannot_reach_out_of_its_sandbox(folder, canary):
    escape = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
    (folder / "chat_template.jinja").write_text(escape.replace("CANARY", str(canary)))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not canary.exists()
