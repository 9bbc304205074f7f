"""Fixtures shared by all tests: real data where it is at hand, and a tiny tokenizer and model made on the spot."""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Set before torch or transformers is imported: tests never reach a network, and workers running side by side share the
# cores instead of each starting one thread per core.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


# How long an example takes says what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


SHARE_OF_BYTES = """
def share_of_bytes(sample):
    ids = [token for token, learned in zip(sample.tokens, sample.loss_mask) if learned]
    return sum(token < 256 for token in ids) / len(ids)

share_of_bytes.isolation = "inline"
"""


@pytest.fixture(autouse=True)
def _logging_as_found() -> Iterator[None]:
    """A command run inside a test sends the package's messages to a stderr that is gone when the test is over."""
    logger = logging.getLogger("rollouts")
    found = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, level = found
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files; tests that need it are skipped where it is absent."""
    beside_repository = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ROLLOUTS_TEST_DATA") or beside_repository)
    if not folder.is_dir():
        pytest.skip("no real data here: set ROLLOUTS_TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests of compiled code: skipped where nothing can compile it, failing where something cannot be compiled."""
    if os.environ.get("ROLLOUTS_NATIVE") == "0":
        pytest.skip("ROLLOUTS_NATIVE=0 forbids compiled code")
    if platform.system() != "Linux" or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("compiled code needs Linux and g++")


@pytest.fixture(scope="session")
def compiled_step() -> None:
    """For tests of runs that are the same to the last bit, which torch's operators do not promise."""
    from rollouts.inference.native import native_library

    if native_library() is None:
        pytest.skip("runs repeat to the last bit by the engine's compiled step alone, which needs Linux and g++")


@pytest.fixture
def same_on_any_threads() -> Callable[[Callable[[], Sequence[torch.Tensor]]], Sequence[torch.Tensor]]:
    """``same_on_any_threads(compute)`` -> tensors that are the same to the last bit on 1, 2 and 3 threads."""
    import torch

    def check(compute: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(compute())
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
        return results[0]

    return check


PEOPLE = "Anna Boris Clara David Elena Farid Grace Hugo Irina Jonas Kamila Leo Marta Nadia Oscar Priya"
VERBS = "sees finds carries paints counts borrows follows remembers describes visits trusts opens"
THINGS = (
    "apple bridge candle dragon engine forest garden harbor island journal kettle lantern mirror needle orchard "
    "pencil quilt river shadow table umbrella violin window yellow zebra"
)
PLACES = "morning village winter station mountain library kitchen market ocean castle factory hospital"


def tiny_texts(count: int = 2000, seed: int = 0) -> Iterator[str]:
    """Simple sentences and sums, made by code: varied enough for a few hundred merges."""
    rng = random.Random(seed)
    for _ in range(count):
        a, b = rng.randrange(100), rng.randrange(100)
        person, verb, thing, other, place = (
            rng.choice(words.split()) for words in (PEOPLE, VERBS, THINGS, THINGS, PLACES)
        )
        yield rng.choice(
            (
                f"{person} {verb} the {thing} near the {place}.",
                f"What is {a} + {b}? The answer is {a + b}.",
                f"Please tell me about the {thing} and the {other}.\n",
            )
        )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly 512 tokens and the project's chat template."""
    from rollouts.models.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(tiny_texts(), vocab_size=512)
    assert len(tokenizer) == 512
    return tokenizer


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """``make_tiny_model(seed=0, dtype=torch.float32, **changes)``: a new random Qwen3 with 512 tokens and 2 layers."""
    import torch

    from rollouts.models.make import ModelConfig, make_model

    torch.set_num_threads(1)
    tiny = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
        return make_model(ModelConfig(**{**tiny, **changes}), tiny_tokenizer, seed=seed, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def save_tiny_model(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """``save_tiny_model(**changes)``: a tiny model and tokenizer in a new folder, in the Hugging Face layout."""

    def save(**changes: object) -> Path:
        folder = tmp_path_factory.mktemp("tiny_model")
        make_tiny_model(**changes).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_model_dir(save_tiny_model: Callable[..., Path]) -> Path:
    """The tiny model and tokenizer saved in the Hugging Face layout; read-only by agreement, copy it to change it."""
    return save_tiny_model()


@pytest.fixture
def rl_task(tmp_path: Path) -> dict[str, object]:
    """Prompts, and a reward that random models get a part of, written to ``tmp_path``; the recipe's keys for them."""
    words = "apple bridge candle dragon engine forest garden harbor".split()
    rows = [{"prompt": f"Tell me about the {word}", "answer": word} for word in words]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(SHARE_OF_BYTES)
    data = {"train": "prompts.jsonl", "validation": "prompts.jsonl"}
    return {"data": data, "reward": "reward.py:share_of_bytes"}
