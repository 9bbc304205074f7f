"""Models: loading, making and exporting them; tokenizer training; chat templates; LoRA."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {  # public name -> module; resolved on first use, so that a tokenizer can be trained without importing torch
    "CHAT_TEMPLATE": "chat_templates",
    "train_tokenizer": "tokenizer",
    "save_tokenizer": "tokenizer",
    "ModelConfig": "make",
    "make_model": "make",
    "load_hf_model": "load",
    "load_tokenizer": "load",
    "cast_parameters": "load",
    "parse_dtype": "load",
    "parse_device": "load",
    "LoRAConfig": "lora",
    "add_lora": "lora",
    "save_lora": "lora",
    "merge_lora": "lora",
    "make_critic": "critic",
    "add_value_head": "critic",
    "make_reward_model": "reward_model",
    "load_reward_model": "load",
    "export_model": "export",
    "export_checkpoint": "export",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
