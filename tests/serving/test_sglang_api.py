"""SGLang's endpoints: what was sampled, weights from disk, pausing, aborting."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rollouts.inference import SamplingParams

IDS = [20, 30, 40, 50]


def test_generate_reports_what_the_engine_sampled(server: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (reference,) = server.served.engine.generate_batch(
        [IDS], SamplingParams(seed=7, temperature=0.7, max_tokens=16, top_log_probs=2)
    )
    sampling = {"sampling_seed": 7, "temperature": 0.7, "max_new_tokens": 16, "top_k": -1}
    answer = server.post(
        "/generate", input_ids=IDS, sampling_params=sampling, return_logprob=True, top_logprobs_num=2
    ).json()
    meta = answer["meta_info"]
    assert answer["output_ids"] == reference.token_ids
    assert [token for _, token, _ in meta["output_token_logprobs"]] == reference.token_ids
    assert [p for p, _, _ in meta["output_token_logprobs"]] == pytest.approx(reference.log_probs, abs=1e-5)
    assert meta["finish_reason"] == {"type": "length", "length": 16}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 16)
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": 16}]
    # Where the sampled token is among the likeliest, both ways of telling its log-prob agree: at the temperature.
    for (p, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert [p] * sum(t == token for _, t, _ in top) == pytest.approx([q for q, t, _ in top if t == token], abs=1e-4)


def test_batches_and_groups_are_lists(server: Any) -> None:
    params = {"temperature": 0, "max_new_tokens": 5}
    single = server.post("/generate", input_ids=IDS, sampling_params=params).json()
    batch = server.post(
        "/generate", input_ids=[IDS, IDS[:2]], sampling_params=[{**params, "n": 2}, params], rid=["a", "b"]
    ).json()
    assert [answer["meta_info"]["id"] for answer in batch] == ["a", "a", "b"]
    assert batch[0]["output_ids"] == batch[1]["output_ids"] == single["output_ids"]
    assert len(server.post("/generate", text=["Anna"], sampling_params=params).json()) == 1


def test_streams_hold_all_so_far(server: Any) -> None:
    body = {"text": "Clara", "sampling_params": {"sampling_seed": 3, "max_new_tokens": 30, "stop": "e"}}
    whole = server.post("/generate", **body).json()
    with server.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert [events[-1][key] for key in ("text", "output_ids")] == [whole[key] for key in ("text", "output_ids")]
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    for before, after in zip(events, events[1:], strict=False):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]


def test_weights_from_disk_by_version_and_checksum(server: Any, served_weights: Path) -> None:
    def greedy() -> list[int]:
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        return server.post("/generate", input_ids=IDS * 10, sampling_params=params).json()["output_ids"]

    def checksum() -> str:
        return server.post("/weights_checker", action="checksum").json()["checksum"]

    old, old_sum = greedy(), checksum()
    answer = server.post("/update_weights_from_disk", model_path=str(served_weights / "b"), weight_version="41")
    assert answer.json()["success"] and answer.json()["weight_version"] == "41"
    assert server.http.get("/get_model_info").json()["weight_version"] == "41"
    assert greedy() != old and checksum() != old_sum
    assert server.post("/update_weights_from_disk", model_path=str(served_weights / "a")).json()["success"]
    assert server.http.get("/model_info").json()["weight_version"] == "42"
    assert (greedy(), checksum()) == (old, old_sum)


def test_weights_that_do_not_fit_change_nothing(server: Any, tmp_path: Path) -> None:
    before = server.post("/weights_checker", action="checksum").json()
    for path in (str(tmp_path), str(tmp_path / "none"), "https://example.com/model", "Qwen/Qwen2.5-0.5B"):
        answer = server.post("/update_weights_from_disk", model_path=path)
        assert answer.status_code == 400 and not answer.json()["success"]
    assert server.post("/weights_checker", action="checksum").json() == before


def held_amid(server: Any) -> AbstractContextManager[threading.Event]:
    """The engine stands still inside when it has sampled some tokens more."""
    goal = server.served.engine.num_sampled_tokens + 50
    return server.held(lambda: server.served.engine.num_sampled_tokens >= goal)


def test_pausing_in_place_and_going_on_with_new_weights(server: Any, served_weights: Path) -> None:
    params = {"temperature": 0, "max_new_tokens": 700, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        with held_amid(server) as reached:
            answer = pool.submit(server.post, "/generate", input_ids=IDS, sampling_params=params)
            assert reached.wait(60)
            assert server.post("/pause_generation", mode="in_place").status_code == 200
        count = server.served.engine.num_sampled_tokens
        assert server.http.get("/health_generate").status_code == 503
        assert server.post("/update_weights_from_disk", model_path=str(served_weights / "b")).json()["success"]
        assert server.served.engine.num_sampled_tokens == count and not answer.done()
        assert server.post("/continue_generation").status_code == 200
        meta = answer.result().json()["meta_info"]
    first, second = meta["weight_versions"]
    assert int(second["version"]) == int(first["version"]) + 1 and second["end"] == 700
    assert server.post("/update_weights_from_disk", model_path=str(served_weights / "a")).json()["success"]


@pytest.mark.parametrize("how", ["rid", "all", "pause"])
def test_aborted_samples_keep_what_they_have(server: Any, how: str) -> None:
    params = {"temperature": 0, "max_new_tokens": 1000, "ignore_eos": True}
    expected = server.post("/generate", input_ids=IDS, sampling_params={**params, "max_new_tokens": 900}).json()
    with ThreadPoolExecutor() as pool, held_amid(server) as reached:
        answer = pool.submit(
            server.post, "/generate", input_ids=IDS, sampling_params=params, rid="r1", return_logprob=True
        )
        assert reached.wait(60)
        if how == "pause":
            server.post("/pause_generation")
            server.post("/continue_generation")
        else:
            server.post("/abort_request", **({"rid": "r1"} if how == "rid" else {"abort_all": True}))
        result = answer.result(60).json()
    count = result["meta_info"]["completion_tokens"]
    assert result["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < count < 900 and result["output_ids"] == expected["output_ids"][:count]
    assert len(result["meta_info"]["output_token_logprobs"]) == count
    server.until(lambda: server.served.engine.num_running == 0)


def test_flush_cache_forgets_prompts(server: Any) -> None:
    def cached() -> int:
        body: Any = {"input_ids": list(range(100, 200)), "sampling_params": {"max_new_tokens": 1}}
        return server.post("/generate", **body).json()["meta_info"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert server.post("/flush_cache").json()["success"]
    assert cached() == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input_ids"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [512]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [1.5]}, "input_ids.0"),
        ({"input_ids": [True]}, "input_ids.0"),
        ({"input_ids": [1] * 2000}, "input_ids"),
        ({"input_ids": [[1], [600]]}, "input_ids.1"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"n": 500}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"regex": "("}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"ebnf": "a"}}, "sampling_params.ebnf"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "model": "other"}, "model"),
    ],
)
def test_errors_name_the_field(server: Any, body: dict[str, Any], param: str) -> None:
    response = server.post("/generate", **body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param, response.text


def test_metrics(server: Any) -> None:
    server.post("/generate", input_ids=IDS, sampling_params={"max_new_tokens": 3, "ignore_eos": True})
    counted = 'rollouts_requests_total{path="/generate",status="200"}'
    server.until(lambda: counted in server.http.get("/metrics").text)  # it is counted once the answer is out
    text = server.http.get("/metrics").text
    assert 'rollouts_weight_version{model="tiny"}' in text
    assert 'rollouts_running_samples{model="tiny"} 0.0' in text


def test_health(server: Any) -> None:
    assert server.http.get("/health").status_code == server.http.get("/health_generate").status_code == 200
