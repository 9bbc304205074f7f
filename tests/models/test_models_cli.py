"""`rollouts tokenizer` and `rollouts export` as typed: what they write, what they refuse, their exit codes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.cli.main import main
from rollouts.training.checkpoints import checkpoint_transaction

ROWS = [
    {"text": "The quick brown fox jumps over the lazy dog. " * 3},
    {
        "messages": [
            {"role": "user", "content": "How many apples are 12 and 30 apples?"},
            {"role": "assistant", "content": "12 and 30 apples are 42 apples."},
        ]
    },
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_tokenizer_from_flags(data, tmp_path, capsys):
    out = tmp_path / "tok"
    assert main(["tokenizer", "--data", str(data), "--vocab-size", "300", "--out", str(out)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 300
    assert str(len(tokenizer)) in capsys.readouterr().out
    assert len(tokenizer.encode(" apples")) == 1  # learned from the conversation
    assert len(tokenizer.encode("ow")) == 1 or len(tokenizer.encode("qu")) == 1  # and from the document
    assert "generation" in tokenizer.chat_template


def test_tokenizer_from_a_recipe_is_the_same(data, tmp_path):
    recipe = tmp_path / "tok.yaml"
    recipe.write_text("kind: tokenizer\nrun_dir: one\ndata: {train: rows.jsonl}\ntokenizer: {vocab_size: 999}\n")
    assert main(["tokenizer", str(recipe), "--tokenizer.vocab_size", "300"]) == 0
    assert main(["tokenizer", "--data", str(data), "--vocab-size", "300", "--out", str(tmp_path / "two")]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    assert yaml.safe_load((one / "recipe.yaml").read_text())["tokenizer"]["vocab_size"] == 300


def test_dry_run_prints_and_stops(data, tmp_path, capsys):
    out = tmp_path / "tok"
    assert main(["tokenizer", "--data", str(data), "--vocab-size", "300", "--out", str(out), "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == str(out)
    assert not out.exists()


def test_bad_input_is_one_line_and_exit_code_2(data, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    common = ["--vocab-size", "300", "--out", str(tmp_path / "tok")]
    for argv, expected in (
        (["tokenizer", "--data", str(bad), *common], f"{bad}:2: text must be a string"),
        (["tokenizer", "--data", str(tmp_path / "empty.jsonl"), *common], "no text"),
        (["tokenizer", "--data", str(tmp_path / "none.jsonl"), *common], "none.jsonl"),
        (["tokenizer", "--data", str(data), "--vocab-size", "ten", "--out", str(tmp_path / "tok")], "vocab_size"),
        (["tokenizer", "--data", str(data), "--vocab-size", "300", "--out", str(tmp_path / "taken")], "not empty"),
        (["tokenizer", "--data", str(data), *common, "--data.train.0.weight", "2"], "repeat and weight"),
        (["tokenizer", "--data", str(data), "--vocab-size", "300", "--out", "/proc/tok"], "cannot be made"),
        (["tokenizer"], "data is missing"),
        (["tokenizer", "--data", str(data), "--tokenizer", "3"], "--tokenizer is 3 where a section of keys was expec"),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, error
    assert not (tmp_path / "tok").exists()


@pytest.fixture
def run(tiny_model_dir, make_tiny_model, tmp_path):
    """A run folder with two checkpoint steps (seeds 1 and 2) and a final model (seed 0)."""
    folder = tmp_path / "run"
    for step in (1, 2):
        with checkpoint_transaction(folder / "checkpoints", step) as partial:
            shutil.copytree(tiny_model_dir, partial, dirs_exist_ok=True)
            make_tiny_model(seed=step).save_pretrained(partial)
    shutil.copytree(tiny_model_dir, folder / "final")
    return folder


def is_seed(folder, make_tiny_model, seed):
    embedding = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    return torch.equal(embedding, make_tiny_model(seed=seed).get_input_embeddings().weight)


def test_export_of_a_run_a_step_and_a_folder(run, make_tiny_model, tmp_path, capsys):
    for number, (source, seed) in enumerate([(run, 2), (run / "checkpoints" / "step_000001", 1), (run / "final", 0)]):
        out = tmp_path / f"out{number}"
        assert main(["export", str(source), str(out)]) == 0, capsys.readouterr().err
        assert is_seed(out, make_tiny_model, seed)
        AutoTokenizer.from_pretrained(out)
    shutil.rmtree(run / "checkpoints")
    assert main(["export", str(run), str(tmp_path / "of_final"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "of_final").dtype == torch.bfloat16


def test_export_takes_no_damaged_step(run, make_tiny_model, tmp_path, capsys):
    weights = run / "checkpoints" / "step_000002" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 1
    weights.write_bytes(content)
    assert main(["export", str(weights.parent), str(tmp_path / "out")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    damaged = shutil.copytree(run / "final", tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"not weights")
    assert main(["export", str(damaged), str(tmp_path / "out")]) == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0  # the step before it, with a warning
    assert is_seed(tmp_path / "out", make_tiny_model, 1)


def test_export_of_nothing(run, tmp_path, capsys):
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for argv, expected in (
        (["export", str(tmp_path / "none"), "out"], "does not exist"),
        (["export", str(tmp_path / "begun"), str(tmp_path / "out")], "no checkpoint yet"),
        (["export", str(run), str(run)], "not empty"),
        (["export", str(run), str(tmp_path / "out"), "--dtype", "int4"], "not supported"),
        (["export", str(run), str(tmp_path / "out"), "--merge-lora"], "no adapter"),
        (["export", str(run)], "OUT"),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, error
    assert not (tmp_path / "out").exists()


def test_export_of_a_sharded_run_needs_its_final_model(run, make_tiny_model, tmp_path, capsys):
    step = run / "checkpoints" / "step_000003"
    with checkpoint_transaction(run / "checkpoints", 3) as partial:
        (partial / "shards").mkdir()
        (partial / "shards" / "__0_0.distcp").write_bytes(b"x")
    assert main(["export", str(step), str(tmp_path / "out")]) == 2
    assert "let the run finish" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert is_seed(tmp_path / "out", make_tiny_model, 0)
