"""``rollouts rl`` on GSM8K from end to end: real problems, two rewards, a small model, and every line of its books."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import math_verify
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollouts.cli.main import main

STEPS, PROMPTS, SAMPLES = 4, 4, 6
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def problems(shared_data: Path) -> list[dict[str, str]]:
    """Rows of GSM8K as they are, short ones whose answer is a digit: a tiny model may guess it."""
    with gzip.open(shared_data / "gsm8k" / "train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [r for r in rows if re.search(r"#### [2-9]$", r["answer"]) and len(r["question"]) < 200]
    return rows[: STEPS * PROMPTS + 5]


@pytest.fixture(scope="module")
def model_dir(shared_data: Path, problems: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model made from a small configuration that was taught one thing by ``rollouts sft``: to guess ``#### n``."""
    folder = tmp_path_factory.mktemp("gsm8k_model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": p["question"]},
                {"role": "assistant", "content": f"#### {2 + i % 8}"},
            ]
        }
        for i, p in enumerate(problems)
    ]
    (folder / "guesses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {
            "init": SHAPE,
            "tokenizer": str(shared_data / "tokenizers" / "minimind"),
            "precision": "float32",
        },
        "data": {"train": "guesses.jsonl"},
        "train": {"num_steps": 40, "batch_size": 16},
        "optimizer": {"name": "muon", "lr": 5e-3},
        "device": "cpu",
        "run_dir": str(folder / "sft"),
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sft", str(folder / "sft.yaml")]) == 0
    return folder / "sft" / "final"


@pytest.fixture
def run(tmp_path: Path, model_dir: Path, problems: list[dict[str, str]]) -> Callable[..., Path]:
    """``run(name, *overrides)`` runs ``rollouts rl`` on the problems and gives the run's folder."""
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    recipe = {
        "model": {"path": str(model_dir), "precision": "float32"},
        "data": {"train": "gsm8k.jsonl"},
        "reward": [{"function": "math", "weight": 1.0}, {"function": "gsm8k", "weight": 0.5}],
        "rollout": {"batch_size": PROMPTS, "n_samples_per_prompt": SAMPLES, "max_tokens": 8},
        "engine": {"max_length": 256},
        "train": {"num_steps": STEPS, "checkpoint_every": 2},
        "optimizer": {"lr": 1e-3},
        "device": "cpu",
    }
    (tmp_path / "rl.yaml").write_text(yaml.safe_dump(recipe))

    def start(name: str, *overrides: str) -> Path:
        assert main(["rl", str(tmp_path / "rl.yaml"), "--run_dir", str(tmp_path / name), *overrides]) == 0
        return tmp_path / name

    return start


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def final_number(text: str) -> str | None:
    found = re.findall(r"#### (-?\d+)", text)
    return found[-1] if found else None


def test_every_line_of_the_books_is_right(run, model_dir: Path, problems: list[dict[str, str]]) -> None:
    folder = run("run")
    samples, metrics = lines_of(folder / "rollouts.jsonl"), lines_of(folder / "metrics.jsonl")
    answers = {p["question"]: p["answer"] for p in problems}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert len(samples) == STEPS * PROMPTS * SAMPLES == len({s["id"] for s in samples})
    assert len({s["prompt"][-1]["content"] for s in samples}) == STEPS * PROMPTS  # no problem twice
    assert {s["reward"] for s in samples} >= {0.0, 1.5}  # otherwise nothing below is put to the test

    for sample in samples:
        question = sample["prompt"][-1]["content"]
        assert sample["metadata"]["answer"] == answers[question]
        start = sample["loss_mask"].index(1)
        prompt = tokenizer.apply_chat_template(sample["prompt"], add_generation_prompt=True, return_dict=False)
        assert sample["tokens"][:start] == prompt and all(sample["loss_mask"][start:])
        assert sample["response"] == tokenizer.decode(sample["tokens"][start:], skip_special_tokens=True)

        truth = final_number(answers[question])
        marked = float(final_number(sample["response"]) == truth)
        parsed = math_verify.parse(sample["response"], parsing_timeout=None)
        equal = float(
            bool(parsed)
            and math_verify.verify(math_verify.parse(truth, parsing_timeout=None), parsed, timeout_seconds=None)
        )
        assert sample["rewards"] == {"math": equal, "gsm8k": marked}
        assert sample["reward"] == equal + 0.5 * marked
        assert sample["weight_versions"] == [
            {"version": sample["step"] - 1, "start": start, "end": len(sample["tokens"])}
        ]

    for step in range(1, STEPS + 1):
        own, row = [s for s in samples if s["step"] == step], metrics[step - 1]
        groups = [[s for s in own if s["group_id"] == g] for g in dict.fromkeys(s["group_id"] for s in own)]
        assert [len(g) for g in groups] == [SAMPLES] * PROMPTS
        for group in groups:
            assert len({s["prompt"][-1]["content"] for s in group}) == 1
            rewards = np.array([s["reward"] for s in group])
            expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            for sample, advantage in zip(group, expected, strict=True):
                wanted = advantage * np.array(sample["loss_mask"])
                np.testing.assert_allclose(sample["advantages"], wanted, atol=1e-5)
        assert (row["step"], row["samples"], row["groups"]) == (step, len(own), PROMPTS)
        assert row["reward_mean"] == pytest.approx(np.mean([s["reward"] for s in own]))
        for name in ("math", "gsm8k"):
            assert row[f"reward/{name}"] == pytest.approx(np.mean([s["rewards"][name] for s in own]))
        assert row[f"pass@{SAMPLES}"] == np.mean([any(s["reward"] >= 1 for s in g) for g in groups])
        assert row["response_tokens"] == sum(sum(s["loss_mask"]) for s in own)
        assert row["staleness_max"] == 0 and row["masked_samples"] == 0 and row["mismatch_kl"] < 1e-5
        assert not [name for name in row if name.startswith(("dropped/", "faults/"))]

    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for sample in samples[:: SAMPLES // 2]:
        if sample["step"] == 1:
            ids, start = torch.tensor([sample["tokens"]]), sample["loss_mask"].index(1)
            with torch.no_grad():
                found = policy(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            sampled = torch.tensor(sample["rollout_log_probs"][start:])
            torch.testing.assert_close(sampled, found[start - 1 :], atol=1e-4, rtol=0)


@pytest.mark.usefixtures("compiled_step")
def test_a_stopped_run_goes_on_where_it_was(run) -> None:
    whole, parts = run("whole"), run("parts", "--train.num_steps", "2")
    shutil.rmtree(parts / "final")
    (parts / "recipe.yaml").write_text((whole / "recipe.yaml").read_text().replace(str(whole), str(parts)))
    run("parts")
    assert lines_of(parts / "rollouts.jsonl") == lines_of(whole / "rollouts.jsonl")
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "final") for folder in (whole, parts))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.usefixtures("compiled_step")
def test_the_layouts_of_verl_and_trl_make_the_same_run(run, tmp_path: Path, problems: list[dict[str, str]]) -> None:
    def as_it_is(number: int, row: dict[str, str]) -> dict[str, Any]:
        return row

    def as_verl(number: int, row: dict[str, str]) -> dict[str, Any]:
        return {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": row["question"]}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": final_number(row["answer"])},
            "extra_info": {"split": "train", "index": number, "answer": row["answer"], "question": row["question"]},
        }

    def as_trl(number: int, row: dict[str, str]) -> dict[str, Any]:
        return {"prompt": row["question"], "solution": final_number(row["answer"])}

    found: list[Any] = []
    for layout in (as_it_is, as_verl, as_trl):
        file = tmp_path / layout.__name__ / "gsm8k.parquet"  # ids come of the file's name, and seeds of ids
        file.parent.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([layout(i, r) for i, r in enumerate(problems)]), file)
        folder = run(f"run_{layout.__name__}", "--data.train", str(file), "--train.num_steps", "2")
        keys = ("id", "tokens", "reward", "advantages", "rollout_log_probs")
        found.append([[sample[key] for key in keys] for sample in lines_of(folder / "rollouts.jsonl")])
    assert len(found[0]) == 2 * PROMPTS * SAMPLES and any(reward > 0 for _, _, reward, *_ in found[0])
    assert found[1] == found[0] and found[2] == found[0]
