"""A server on loopback, started once a module, with a tiny model and its tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running_server import Running, running
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollouts.serving.settings import Settings


@pytest.fixture(scope="session")
def served_weights(make_tiny_model: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, ``a`` and ``b``, with models whose samples differ; each peaked, so that text is not noise alone."""
    root = tmp_path_factory.mktemp("served")
    for seed, name in enumerate("ab"):
        make_tiny_model(seed=seed, initializer_range=0.2).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def server(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    with running(served_weights / "a", tiny_tokenizer) as one:
        yield one


@pytest.fixture
def own_server(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    """For one test alone, which may break it."""
    with running(served_weights / "a", tiny_tokenizer) as one:
        yield one


@pytest.fixture
def small_server(served_weights: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Running]:
    """One row and a line of two: easy to fill."""
    with running(served_weights / "a", tiny_tokenizer, Settings(max_queue=2), max_rows=1, max_length=4096) as one:
        yield one
