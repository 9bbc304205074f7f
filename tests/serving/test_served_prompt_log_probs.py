"""What the model thinks of a prompt: echo, prompt_logprobs and SGLang's input log-probs, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

IDS = [(7 * i) % 500 + 9 for i in range(40)]


@pytest.fixture(scope="module")
def reference(served_weights: Path) -> torch.Tensor:
    """[39, V]: log-probs of what follows each of the prompt's tokens but the last."""
    model = AutoModelForCausalLM.from_pretrained(served_weights / "a")
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)


def test_echo(server: Any, reference: torch.Tensor, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As evaluation harnesses ask: no tokens, or one, and the log-probs of the prompt."""
    own = reference.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()
    best = reference.max(-1).values.tolist()
    text = tiny_tokenizer.decode(IDS)
    for max_tokens in (0, 1):
        answer = server.openai.completions.create(
            model="tiny", prompt=IDS, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0
        )
        choice = answer.choices[0]
        log_probs = choice.logprobs
        assert choice.text.startswith(text) and (choice.text == text or max_tokens)
        assert log_probs.token_logprobs[0] is None and log_probs.top_logprobs[0] is None
        assert log_probs.token_logprobs[1:40] == pytest.approx(own, abs=1e-4)
        assert [max(top.values()) for top in log_probs.top_logprobs[1:40]] == pytest.approx(best, abs=1e-4)
        assert len(log_probs.tokens) == len(log_probs.text_offset) == 40 + max_tokens
        assert "".join(log_probs.tokens[:40]) == text and choice.finish_reason == "length"
        assert answer.usage.completion_tokens == max_tokens
    plain = server.openai.completions.create(model="tiny", prompt="Anna sees", echo=True, max_tokens=3, seed=1)
    assert plain.choices[0].text.startswith("Anna sees") and plain.choices[0].logprobs is None
    stream = server.openai.completions.create(
        model="tiny", prompt="Anna sees", echo=True, max_tokens=3, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == plain.choices[0].text


def test_prompt_logprobs_as_vllm_has_them(server: Any, reference: torch.Tensor) -> None:
    answer = server.post("/v1/completions", model="tiny", prompt=[IDS, IDS[:5]], max_tokens=2, prompt_logprobs=3).json()
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert first[0] is None and len(first) == 40 and len(second) == 5
    for i, entry in enumerate(first[1:]):
        assert entry[str(IDS[i + 1])]["logprob"] == pytest.approx(float(reference[i, IDS[i + 1]]), abs=1e-4)
        ranked = {v["rank"]: int(k) for k, v in entry.items() if v["rank"]}
        assert [ranked[rank] for rank in (1, 2, 3)] == reference[i].topk(3).indices.tolist()
    assert second[4][str(IDS[4])]["logprob"] == pytest.approx(first[4][str(IDS[4])]["logprob"], abs=1e-4)


def test_input_log_probs_as_sglang_has_them(server: Any, reference: torch.Tensor) -> None:
    body: dict[str, Any] = {
        "input_ids": IDS, "sampling_params": {"max_new_tokens": 2}, "return_logprob": True, "top_logprobs_num": 1
    }  # fmt: skip
    for start in (0, 30):
        meta = server.post("/generate", **body, logprob_start_len=start).json()["meta_info"]
        entries, tops = meta["input_token_logprobs"], meta["input_top_logprobs"]
        assert [token for _, token, _ in entries] == IDS[start:] and len(tops) == len(entries)
        for i, ((log_prob, token, _), top) in enumerate(zip(entries, tops, strict=True), start):
            if i == 0:
                assert log_prob is None and top is None
                continue
            assert log_prob == pytest.approx(float(reference[i - 1, token]), abs=1e-4)
            assert top[0][1] == int(reference[i - 1].argmax())
    assert server.post("/generate", **body).json()["meta_info"]["input_token_logprobs"] == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 50}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
    ],
)
def test_errors(server: Any, change: dict[str, Any], param: str) -> None:
    response = server.post("/v1/completions", model="tiny", prompt="a", **change)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
