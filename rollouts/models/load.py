"""Loading a model and its tokenizer from a folder or the hub: safetensors only, and no code of the folder ever runs."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rollouts.errors import UserError
from rollouts.models.reward_model import is_reward_model, make_reward_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # weights and text; no pickles, no Python
_LOADING = threading.Lock()  # transformers swaps functions of its own meanwhile, such as the tying of weights
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_hf_model(
    model_name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = torch.bfloat16,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in eval mode, and print how many parameters it has.

    Weights come from safetensors only, ``trust_remote_code`` is off, and from the hub only weights and text files are
    downloaded. A folder with a LoRA adapter gives its base model with the adapter in place, ready to be trained on.
    Where the tokenizer has no padding token, the EOS token serves.

    Args:
        model_name: a folder in the Hugging Face layout (a run's ``final/`` or a checkpoint step is one), or a hub name.
        device: None or ``"auto"`` for the accelerator if there is one, else the CPU; or for example ``"cuda:1"``.
        dtype: of the weights, whatever they were stored in.

    Raises:
        UserError: no such folder or hub model, no safetensors weights, no tokenizer, weights that do not fit the
            configuration, an architecture that needs code of its own, or a dtype or device that does not exist; or a
            reward model, which writes no text.
    """
    model, tokenizer = _load_any_model(model_name, device, dtype)
    if hasattr(model, "score"):
        raise UserError(f"{model_name} is a reward model, which gives scores and writes no text; use load_reward_model")
    return model, tokenizer


def load_reward_model(
    path: str | Path,
    device: str | torch.device | None = "auto",
    dtype: str | torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer; one with a new head where the folder holds a language model.

    Raises:
        UserError: as ``load_hf_model``; the model classifies into several labels; or ``make_reward_model``'s.
    """
    model, tokenizer = _load_any_model(path, device, dtype)
    if not hasattr(model, "score"):
        return make_reward_model(model, seed), tokenizer
    if not is_reward_model(model):
        raise UserError(f"{path} sorts into {model.config.num_labels} labels; a reward model gives one score")
    return model, tokenizer


def _load_any_model(
    model_name: str | Path, device: str | torch.device | None, dtype: str | torch.dtype
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """As ``load_hf_model``, for a language model or a sequence classifier."""
    dtype, device = parse_dtype(dtype), parse_device(device)  # first, as they are checked in no time
    folder = find_model_folder(model_name)
    model = load_weights(folder, dtype)
    tokenizer = load_tokenizer(folder if has_tokenizer(folder) else base_folder(folder))
    # An adapter trained on this model names it by this: the hub's name, not the place of a download on this machine.
    model.name_or_path = str(folder.resolve()) if Path(model_name).expanduser().is_dir() else str(model_name)
    check_vocabulary(model, tokenizer, folder)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    model = model.to(device)
    if os.environ.get("RANK", "0") == "0":
        count = sum(p.numel() for p in model.parameters())
        print(f"{model_name}: {count:,} parameters, {str(dtype).removeprefix('torch.')}, {device}", flush=True)
    return model, tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub model; EOS serves as the padding token where there is none.

    Raises:
        UserError: no such folder or hub model, no tokenizer in it, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = find_model_folder(path)
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} holds no tokenizer (tokenizer.json); copy the files of the model's tokenizer into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `tokenizers` raises plain Exception on a damaged file
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no EOS token; set eos_token in its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Raise UserError when the tokenizer, that of ``folder``, has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the model's embedding has only {rows} rows; "
            "they do not belong together"
        )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"``, ``"bf16"``, ``"torch.bfloat16"`` or the dtype itself, likewise float32 and float16, to a dtype.

    Raises:
        UserError: any other value.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype {dtype!r} is not supported; use bfloat16, float32 or float16")
    return found


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of ``model`` in place and leave its buffers alone, as ``from_pretrained(dtype=...)`` does.

    ``model.to(bfloat16)`` would round the rotary frequencies too, by up to 2^-9: whole turns a few thousand tokens on.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def parse_device(device: str | torch.device | None = "auto") -> torch.device:
    """A device that exists: ``"auto"`` and None mean the current accelerator if there is one, else the CPU.

    Raises:
        UserError: the name is not a device's, or this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device == "auto":
        if accelerator is None:
            return torch.device("cpu")
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {str(device)!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if parsed.type == "cpu":
        return parsed
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == parsed.type else 0
    if (parsed.index or 0) >= count:
        raise UserError(
            f"device {str(device)!r} does not exist: this machine has {count} of that kind; use auto or cpu"
        )
    return parsed


def find_model_folder(name: str | Path) -> Path:
    """The local folder of a model: ``name`` itself if it is a folder, else the hub's snapshot, downloaded if need be.

    Raises:
        UserError: neither a folder nor a model that can be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; give the folder that holds the model")
    if not HUB_NAME.fullmatch(str(name)):
        raise UserError(f"model folder {name} does not exist; give a folder, or a hub name such as Qwen/Qwen2.5-0.5B")
    from huggingface_hub import snapshot_download

    try:  # folders inside a repository hold other formats of the same weights
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = _first_line(error).rstrip(".")
        raise UserError(
            f"{name} is no folder, and the hub gave no model of that name ({reason}); check the spelling or the network"
        ) from error


def load_weights(folder: Path, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    """The model in ``folder`` (with its base model, for an adapter) on the CPU in ``dtype``. Raises UserError."""
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, dtype)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _refuse_what_cannot_load(folder)
    quiet_on_pipe()
    named = read_json(folder / "config.json").get("architectures") or [""]
    is_classifier = str(named[0]).endswith("ForSequenceClassification")
    kind: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    try:
        with _LOADING:
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below
            )
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        raise UserError(f"the model in {folder} cannot be loaded: {_first_line(error)}") from error
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {name} has shape {list(stored)} in place of "
            f"{list(expected)}; take config.json and weights from one model"
        )
    if info["missing_keys"]:  # transformers would go on with random values
        names = sorted(info["missing_keys"])
        raise UserError(
            f"the weights in {folder} lack {len(names)} tensors that its config.json asks for, for example {names[0]}; "
            "take config.json and weights from one model"
        )
    return model


def _refuse_what_cannot_load(folder: Path) -> None:
    finals = [folder / "final"] if (folder / "final").is_dir() else sorted(folder.glob("*/final"))  # of a run's stages
    hint = f"that is a run: give {' or '.join(map(str, finals))}" if finals else "give a model in Hugging Face's layout"
    config = read_json(folder / "config.json", hint=hint)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        own_code = ", and code that comes with a model is never run" if "auto_map" in config else ""
        raise UserError(
            f"the model in {folder} has the architecture {config.get('model_type')!r}, which this version of "
            f"transformers does not know{own_code}; use a model whose architecture it does"
        )
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run code when read; "
                "convert them to safetensors"
            )
        raise UserError(f"{folder} holds no weights (model.safetensors); give the folder of a complete model")


def _load_adapter(folder: Path, dtype: torch.dtype) -> PeftModel:
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"the adapter in {folder} has no {ADAPTER_WEIGHTS}; only safetensors are loaded")
    base = load_weights(base_folder(folder), dtype)
    if read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS" and not hasattr(base, "score"):
        base = make_reward_model(base)  # whose head the adapter brings
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()
    except Exception as error:
        raise UserError(f"the adapter in {folder} cannot be loaded onto its base: {_first_line(error)}") from error


def base_folder(folder: Path) -> Path:
    """The folder of the model an adapter was trained on; ``folder`` itself where it holds no adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder / ADAPTER_CONFIG} does not name its base model; set base_model_name_or_path in it")
    beside = (
        folder / base
    ).resolve()  # a base may be named relative to its adapter, so that both can be moved together
    found = beside if beside.is_dir() else find_model_folder(base)
    if (found / ADAPTER_CONFIG).is_file():
        raise UserError(f"the base of the adapter in {folder} is an adapter too ({base}); merge that one first")
    return found


def quiet_on_pipe() -> None:
    """Switch the progress bars of transformers off where nobody watches a terminal: on a pipe they are noise."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_json(path: Path, hint: str = "the folder is incomplete") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {hint}")
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
