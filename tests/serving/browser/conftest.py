"""A headless Chromium, and a server of tiny models for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aviary_server import BY_HEART, Aviary, learn, serving
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser without any history; a test opens its own context in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[browser]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium here: make test-browser installs it on Debian")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def parrots(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> dict[str, PreTrainedModel]:
    """Models that know ``BY_HEART``."""
    models = {}
    for name, conversations in BY_HEART.items():
        models[name] = make_tiny_model(hidden_size=128, num_layers=3)
        learn(models[name], tiny_tokenizer, conversations)
    return models


@pytest.fixture(scope="session")
def aviary(parrots: dict[str, PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Aviary]:
    with serving(parrots, tiny_tokenizer) as one:
        yield one
