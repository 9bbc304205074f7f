"""Fixtures of the kill tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from steering import finish, kill
from training_run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """A temporary folder in memory where there is one: a killed process loses nothing either way, and fsync is free."""
    folder = new_folder_in_memory()
    yield folder
    shutil.rmtree(folder)


def new_folder_in_memory() -> Path:
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="rollouts-test-", dir=shm if shm.is_dir() else None))


@pytest.fixture(scope="session")
def model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16,000 parameters with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("model"), tiny_tokenizer, hidden_size=16)


@pytest.fixture(scope="session")
def wider_model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights of other shapes."""
    return save_model(tmp_path_factory.mktemp("wider"), tiny_tokenizer, hidden_size=24)


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> Path:
    from rollouts.models.make import ModelConfig, make_model

    shape = ModelConfig(hidden_size=hidden_size, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    make_model(shape, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def new_run(ram_path: Path, model_folder: Path) -> Callable[..., Run]:
    """``new_run(**changes)``: a run that has not started yet."""
    return lambda folder=ram_path / "run", **changes: Run(folder, model_folder, **changes)


@pytest.fixture(scope="session")
def kept_folders() -> Iterator[Callable[[], Path]]:
    """Makes folders in memory that last as long as the session."""
    folders: list[Path] = []

    def make() -> Path:
        folders.append(new_folder_in_memory())
        return folders[-1]

    yield make
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def uninterrupted(kept_folders: Callable[[], Path]) -> Callable[[Run], Run]:
    """``uninterrupted(run)``: the same run done in one go, each kind once a session."""
    done: dict[Run, Run] = {}

    def get(run: Run) -> Run:
        kind = replace(run, folder=Path())
        if kind not in done:
            done[kind] = replace(run, folder=kept_folders())
            finish(done[kind])
        return done[kind]

    return get


@pytest.fixture(scope="session")
def killed_kinds() -> dict[Run, Path]:
    """Folder of a killed run by the kind of run, filled by ``killed``."""
    return {}


@pytest.fixture
def killed(
    new_run: Callable[..., Run], killed_kinds: dict[Run, Path], kept_folders: Callable[[], Path]
) -> Callable[..., Run]:
    """``killed(**changes)``: a run with steps 2 and 4 on disk that was killed before the commit of step 6."""

    def copy(**changes: Any) -> Run:
        run = new_run(**changes)
        kind = replace(run, folder=Path())
        if kind not in killed_kinds:
            killed_kinds[kind] = kept_folders()
            kill(replace(run, folder=killed_kinds[kind]), "train.after_optim_step@3")
        shutil.copytree(killed_kinds[kind], run.folder, symlinks=True)
        return run

    return copy
