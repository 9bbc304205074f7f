"""Writing a model as a Hugging Face folder that transformers, vLLM and SGLang load as is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rollouts.errors import UserError
from rollouts.models import lora
from rollouts.models.critic import without_value_head
from rollouts.models.folders import check_free, new_folder
from rollouts.models.load import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_folder,
    find_model_folder,
    has_tokenizer,
    load_tokenizer,
    load_weights,
    parse_dtype,
    quiet_on_pipe,
)
from rollouts.models.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_SHARD_SIZE = "5GB"
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # widest first


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write config, generation config, safetensors (sharded above 5 GB), tokenizer and chat template into ``folder``.

    The folder appears at once, complete, or not at all. A tied output layer is stored once, as the embedding. ``model``
    is left as it is, also when ``dtype`` differs from its own.

    Args:
        dtype: of the stored weights; None = as they are.
        metadata: written as ``rollouts.json`` beside the weights, for example the recipe and the step.
        state_dict: the weights to store instead of the model's own, for example those gathered from shards.
        overwrite: replace a folder that exists.

    Raises:
        UserError: ``folder`` exists, ``dtype`` is not supported, or ``model`` carries an adapter (merge it first).
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            "a model with an adapter cannot be exported as plain weights; merge it first, or save the adapter"
        )
    weights = model.state_dict() if state_dict is None else state_dict
    if dtype is not None:
        dtype = parse_dtype(dtype)
        weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in weights.items()}
    with new_folder(folder, overwrite=overwrite) as partial:
        write_model(model, tokenizer, partial, state_dict=weights, max_shard_size=max_shard_size)
        if metadata is not None:
            _write_json(partial / "rollouts.json", metadata)
    return Path(folder)


def write_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    state_dict: Mapping[str, torch.Tensor],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write ``state_dict`` as the weights of ``model`` (or of its adapter) into a folder that exists, file by file.

    For callers that make the whole folder appear at once themselves; everyone else calls ``export_model``.
    """
    quiet_on_pipe()
    weights = without_value_head(state_dict)
    if hasattr(model, "peft_config"):
        lora.write_adapter(model, folder, weights)
    else:
        # Gathered weights and casts share no memory: transformers would not see what is tied, and store it twice.
        for name in model.all_tied_weights_keys:
            weights.pop(name, None)
        stored = next(t.dtype for t in weights.values() if t.is_floating_point())
        model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)  # empties `weights`
        _write_json(folder / "config.json", {"dtype": str(stored).removeprefix("torch.")})  # it wrote the model's own
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    dtype: str | torch.dtype | None = None,
    merge_lora: bool = False,
    *,
    overwrite: bool = False,
) -> Path:
    """Export the model in a checkpoint step, a ``final/`` folder or an adapter folder, without the training state.

    A full model is written in ``dtype`` (None = as stored). An adapter is copied as it is; with ``merge_lora`` it is
    added, in float32, to its base model, and the result is written in ``dtype`` (None = as the base is stored).

    Raises:
        UserError: no model in ``source``, ``out`` exists, or options that do not go together.
    """
    source, dtype = Path(source), None if dtype is None else parse_dtype(dtype)
    check_free(out, overwrite=overwrite)
    folder = find_model_folder(source)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if merge_lora and not adapter:
        raise UserError(f"{source} holds no adapter ({ADAPTER_CONFIG}); leave out --merge-lora")
    if adapter and not merge_lora:
        if dtype is not None:
            raise UserError(
                f"{source} holds an adapter, which keeps its own precision; add --merge-lora or drop --dtype"
            )
        return _copy_adapter(folder, Path(out), overwrite=overwrite)
    base = base_folder(folder)
    tokenizer = load_tokenizer(folder if has_tokenizer(folder) else base)
    if adapter:
        model = lora.merge_lora(load_weights(folder, torch.float32))
        dtype = dtype or stored_dtype(base)
    else:
        model = load_weights(folder, stored_dtype(folder))
    return export_model(model, tokenizer, out, dtype=dtype, overwrite=overwrite)


def stored_dtype(folder: Path) -> torch.dtype:
    """The widest floating-point dtype among a folder's safetensors, whatever its config.json says. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    found = set()
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}; take another copy of the model") from error
    return next((dtype for name, dtype in SAFETENSORS_DTYPES.items() if name in found), torch.float32)


def _copy_adapter(folder: Path, out: Path, *, overwrite: bool) -> Path:
    with new_folder(out, overwrite=overwrite) as partial:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, partial / name)
        save_tokenizer(load_tokenizer(folder if has_tokenizer(folder) else base_folder(folder)), partial)
    return out


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` over what the file holds already."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
