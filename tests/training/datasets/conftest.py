"""Tokenizers for the mask tests: three real ones, and small ones made here with templates of other families."""

from __future__ import annotations

import copy
import gzip
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LLAMA3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def _qwen(version: str, data: Path, folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    source = data / "tokenizers" / "qwen"
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes(gzip.decompress((source / f"{name}.gz").read_bytes()))
    shutil.copy(source / f"tokenizer_config.{version}.json", folder / "tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def qwen25(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return _qwen("qwen2.5", shared_data, tmp_path_factory.mktemp("qwen2.5"))


@pytest.fixture(scope="session")
def qwen3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return _qwen("qwen3", shared_data, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def minimind(shared_data: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "minimind")


@pytest.fixture(params=["qwen25", "qwen3", "minimind"])
def real_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def unmarked_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The project's tokenizer and template with the {% generation %} marks taken out."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template, removed = re.subn(r"\{%-\s*(end)?generation\s*-%\}", "", tokenizer.chat_template)
    assert removed == 2
    return tokenizer


@pytest.fixture(scope="session")
def llama3_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Llama 3's special tokens, template, and offsets (which leave out leading blanks) over the tiny vocabulary."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(
        {"bos_token": names[0], "eos_token": names[3], "additional_special_tokens": names[1:3]}
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer
