"""New weights over HTTP, by every way there is: what serves then is told by version, checksum and samples."""

from __future__ import annotations

import base64
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_weights import model_checksum
from safetensors.torch import load_file, save
from trainer import GROUP

IDS = [20, 30, 40, 50]


def checksum(server: Any) -> str:
    answer = server.post("/weights_checker", action="checksum").json()
    assert answer["checksum"] == answer["per_engine_checksum"]
    return answer["checksum"]


def greedy(server: Any) -> list[int]:
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    return server.post("/generate", input_ids=IDS * 10, sampling_params=params).json()["output_ids"]


@pytest.fixture
def weights(server: Any, served_weights: Path) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """The tensors of both folders; the server has those of ``a``, before and after."""
    yield {name: load_file(served_weights / name / "model.safetensors") for name in "ab"}
    assert server.post("/update_weights_from_disk", model_path=str(served_weights / "a")).json()["success"]


def as_text(tensors: dict[str, torch.Tensor]) -> str:
    return base64.b64encode(save(tensors)).decode()


def test_the_checksum_is_that_of_the_files(server: Any, weights: Any, served_weights: Path) -> None:
    assert checksum(server) == model_checksum(weights["a"])
    server.post("/update_weights_from_disk", model_path=str(served_weights / "b"))
    assert checksum(server) == model_checksum(weights["b"])


def test_tensors_in_the_request(server: Any, weights: Any) -> None:
    before, (old, new) = greedy(server), (weights["a"], weights["b"])
    answer = server.post("/update_weights_from_tensor", serialized_named_tensors=[as_text(new)], weight_version="70")
    assert answer.json()["weight_version"] == "70" and checksum(server) == model_checksum(new)
    assert greedy(server) != before
    names = list(old)
    halves = [{name: old[name] for name in part} for part in (names[:9], names[9:])]
    answer = server.post("/update_weights_from_tensor", serialized_named_tensors=[*map(as_text, halves)])
    assert answer.json()["weight_version"] == "71" and greedy(server) == before


def test_a_session_serves_all_its_pieces_at_once(server: Any, weights: Any) -> None:
    old, new = checksum(server), weights["b"]
    version = server.http.get("/model_info").json()["weight_version"]
    names = list(new)
    assert server.post("/begin_weight_update").json()["success"]
    for part in (names[:5], names[5:]):
        assert checksum(server) == old
        text = as_text({name: new[name] for name in part})
        answer = server.post("/update_weights_from_tensor", serialized_named_tensors=[text], weight_version="90")
        assert answer.json()["weight_version"] == version
    assert server.post("/end_weight_update").json()["weight_version"] == "90"
    assert checksum(server) == model_checksum(new)
    # Half of a model is refused at the end, and nothing changes.
    server.post("/begin_weight_update", selector="all")
    server.post("/update_weights_from_tensor", serialized_named_tensors=[as_text({names[0]: new[names[0]]})])
    answer = server.post("/end_weight_update")
    assert answer.status_code == 400 and "lacks" in answer.json()["message"]
    assert checksum(server) == model_checksum(new)
    assert server.post("/end_weight_update").status_code == 400


def test_weights_from_a_trainers_process_group(server: Any, weights: Any, served_weights: Path) -> None:
    """Tensor by tensor, and as one bucket of bytes."""
    command = [sys.executable, str(Path(__file__).with_name("trainer.py")), str(served_weights / "b")]
    trainer = subprocess.Popen([*command, "each", "flat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdin and trainer.stdout
    try:
        port = int(trainer.stdout.readline())
        group = {"group_name": GROUP, "master_address": "127.0.0.1", "master_port": port, "backend": "gloo"}
        joined = server.post("/init_weights_update_group", **group, rank_offset=1, world_size=2)
        assert joined.json()["success"], joined.text
        for version, load_format in (("500", None), ("600", "flattened_bucket")):
            server.post("/update_weights_from_disk", model_path=str(served_weights / "a"))
            assert server.post("/begin_weight_update").json()["success"]
            for _ in range(2):
                sent = json.loads(trainer.stdout.readline())
                sent |= {"group_name": GROUP, "weight_version": version, "load_format": load_format}
                with ThreadPoolExecutor() as pool:
                    answer = pool.submit(server.post, "/update_weights_from_distributed", **sent)
                    trainer.stdin.write("send\n")
                    trainer.stdin.flush()
                    assert answer.result().json()["success"]
            assert server.post("/end_weight_update").json()["weight_version"] == version
            assert checksum(server) == model_checksum(weights["b"])
        assert server.post("/destroy_weights_update_group", group_name=GROUP).json()["success"]
        assert server.post("/destroy_weights_update_group", group_name=GROUP).status_code == 400
        trainer.stdin.write("end\n")
        trainer.stdin.close()
        assert trainer.wait(120) == 0
    finally:
        trainer.kill()
        trainer.wait()


def test_retracted_samples_go_on_with_keys_of_the_new_weights(server: Any, weights: Any, served_weights: Path) -> None:
    """After a retract the rest of a sample is what the new weights alone make of the text so far."""
    params = {"temperature": 0, "max_new_tokens": 700, "ignore_eos": True}
    goal = server.served.engine.num_sampled_tokens + 50
    with ThreadPoolExecutor() as pool:
        with server.held(lambda: server.served.engine.num_sampled_tokens >= goal) as reached:
            answer = pool.submit(server.post, "/generate", input_ids=IDS, sampling_params=params, return_logprob=True)
            assert reached.wait(60)
            assert server.post("/pause_generation", mode="retract").json()["status"] == "ok"
        assert (server.served.engine.num_running, server.served.engine.num_waiting) == (0, 1)
        assert server.post("/update_weights_from_disk", model_path=str(served_weights / "b")).json()["success"]
        server.post("/continue_generation", torch_empty_cache=True)
        result = answer.result().json()
    ids, meta = result["output_ids"], result["meta_info"]
    first, second = meta["weight_versions"]
    assert (first["start"], second["end"]) == (0, 700) and 0 < first["end"] < 700
    cut = first["end"]
    params["max_new_tokens"] = 700 - cut
    rest = server.post("/generate", input_ids=IDS + ids[:cut], sampling_params=params, return_logprob=True).json()
    assert rest["output_ids"] == ids[cut:]
    log_probs = [p for p, _, _ in meta["output_token_logprobs"]][cut:]
    assert log_probs == pytest.approx([p for p, _, _ in rest["meta_info"]["output_token_logprobs"]], abs=1e-3)


def test_another_name_for_the_same_weights(server: Any, weights: Any) -> None:
    before = checksum(server)
    answer = server.post("/update_weight_version", new_version="1234", abort_all_requests=False).json()
    assert answer["success"] and answer["new_version"] == "1234"
    assert server.http.get("/model_info").json()["weight_version"] == "1234" and checksum(server) == before


def test_a_text_in_flight_may_be_aborted_by_an_update(server: Any, weights: Any) -> None:
    params = {"max_new_tokens": 1000, "ignore_eos": True, "temperature": 0}
    engine = server.served.engine
    with ThreadPoolExecutor() as pool, server.held(lambda: engine.num_running == 1) as reached:
        answer = pool.submit(server.post, "/generate", input_ids=IDS, sampling_params=params)
        assert reached.wait(60)
        texts = [as_text(weights["b"])]
        server.post("/update_weights_from_tensor", serialized_named_tensors=texts, abort_all_requests=True)
        assert answer.result(60).json()["meta_info"]["finish_reason"]["type"] == "abort"


def as_pickle() -> str:
    """As SGLang's own clients send tensors."""
    buffer = io.BytesIO()
    ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL).dump([("model.norm.weight", torch.zeros(64).numpy())])
    return base64.b64encode(buffer.getvalue()).decode()


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"]}, "not a safetensors file"),
    ("/update_weights_from_tensor", {"serialized_named_tensors": [as_pickle()]}, "pickle"),
    ("/update_weights_from_tensor", {"serialized_named_tensors": ["?"]}, "base64"),
    ("/update_weights_from_tensor", {"serialized_named_tensors": []}, "serialized_named_tensors"),
    ("/update_weights_from_distributed", {"names": ["x"], "dtypes": ["float32"], "shapes": [[1]]}, "'x'"),
    ("/update_weights_from_distributed", {"names": ["x"], "dtypes": [], "shapes": [[1]]}, "one entry a tensor"),
    (
        "/update_weights_from_distributed",
        {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[10**9]]},
        "shape",
    ),
    (
        "/update_weights_from_distributed",
        {"names": ["model.norm.weight"], "dtypes": ["object"], "shapes": [[64]]},
        "dtype",
    ),
    (
        "/update_weights_from_distributed",
        {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]},
        "no group",
    ),
    ("/init_weights_update_group", {"master_address": "10.1.2.3"}, "loopback"),
    ("/init_weights_update_group", {"master_address": "127.0.0.1", "rank_offset": 2}, "rank_offset"),
    ("/init_weights_update_group", {"master_address": "127.0.0.1", "backend": "nccl"}, "backend"),
    ("/update_weight_version", {"new_version": "abc"}, "new_version"),
]


@pytest.mark.parametrize(("path", "body", "word"), BAD)
def test_what_cannot_be_is_refused_and_changes_nothing(server: Any, path: str, body: dict[str, Any], word: str) -> None:
    before = checksum(server)
    if path.startswith("/init"):
        body = {"master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo", **body}
    response = server.post(path, **body)
    assert response.status_code == 400 and word in response.text, response.text
    assert checksum(server) == before


def test_health_tells_of_a_dead_engine(own_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert own_server.http.get("/health").status_code == 200
    state = own_server.http.get("/server_info").json()["models"][0]
    assert state["served_model_name"] == "tiny" and state["num_running_reqs"] == 0

    def fail() -> None:
        raise OSError("a fault in the engine's thread")

    own_server.served.engine._thread.send(fail)
    own_server.until(lambda: not own_server.served.engine.alive)
    for path in ("/health", "/health_generate"):
        response = own_server.http.get(path)
        assert response.status_code == 503 and "tiny" in response.json()["error"]["message"]
    for stream in (False, True):
        response = own_server.post("/generate", input_ids=IDS, stream=stream)
        assert response.status_code == 503 or "engine" in response.text
    told = [record for record in caplog.records if record.exc_info and record.name.startswith("rollouts")]
    assert len(told) == 1 and "a fault in the engine's thread" in caplog.text  # once, not at every request
