"""Python in the documents runs as it is written, on the tiny model and against a server of ours."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, running
from transformers import PreTrainedTokenizerFast

import rollouts
from rollouts.training import Sample
from rollouts.training.rewards import RewardRunner

DOCS = Path(rollouts.__file__).parents[1] / "docs"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, **names: Any) -> dict[str, Any]:
    """The names that a block leaves, which may await at its outermost level."""
    done = eval(compile(code, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
    if inspect.iscoroutine(done):
        asyncio.run(done)
    return names


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    with running(tiny_model_dir, tiny_tokenizer, max_length=2048) as server:
        yield server


def test_a_loop_of_ones_own(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("rl.md")
    names = run(code.replace(MODEL, str(tiny_model_dir)).replace("num_steps=10", "num_steps=2"))
    names["engine"].close()
    assert [row["step"] for row in names["metrics"]] == [1, 2]


def test_rewards() -> None:
    define, score = blocks("rewards.md")
    names = run(define)
    sample = Sample(prompt="1 + 1?", response="2, please. #### 2", metadata={"answer": "2"})
    report = run(score, polite=names["polite"], RewardRunner=RewardRunner, samples=[sample])["report"]
    assert report.scored == 1 and report.failed == 0 and sample.reward == pytest.approx(2)


def test_endpoints(server: Running) -> None:
    code = blocks("engines.md")[0].replace("http://localhost:30000", server.url).replace("my-model", "tiny")
    names = run(code.replace("max_tokens=512", "max_tokens=8"), prompt_ids=[5, 6, 7])
    assert len(names["samples"]) == 8 and names["answer"].message.role == "assistant"


def test_new_weights_for_servers(server: Running, tiny_model_dir: Path) -> None:
    code = blocks("engines.md")[1].replace("http://localhost:30000", server.url)
    code = code.replace(', VLLMEngine("http://localhost:8000")', "")
    code = code.replace("runs/mine/checkpoints/step_000050", str(tiny_model_dir))
    names = run(code, my_log_probs=None, my_restart=None, model=str(tiny_model_dir))
    assert names["engines"] and server.served.engine.weight_version == names["manager"].version


def test_openai_client(server: Running) -> None:
    (code,) = blocks("serving.md")
    names = run(code.replace("http://127.0.0.1:8000", server.url).replace('"first"', '"tiny"'))
    assert names["answer"].choices[0].message.role == "assistant"
