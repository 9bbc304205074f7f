"""Training a byte-level BPE tokenizer and saving it as a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rollouts.errors import UserError
from rollouts.models.chat_templates import CHAT_TEMPLATE, END_OF_TEXT, MARKUP_TOKENS, SPECIAL_TOKENS, TURN_END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# How text is cut before merging: the rule of Qwen2, 2.5 and 3, which transformers, vLLM, SGLang and llama.cpp ("qwen2")
# all know. Words take one leading space, every digit stands alone, newlines stay together.
PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + len(MARKUP_TOKENS)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int = 2,
    chat_template: str = CHAT_TEMPLATE,
    model_max_length: int = 32768,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``; the same texts in the same order give the same tokenizer.

    All 256 bytes are in the vocabulary and nothing is normalized, so ``decode(encode(text)) == text`` for every text
    that UTF-8 can hold. Ids 0, 1, 2 are ``<|endoftext|>`` (padding, and the end of a document), ``<|im_start|>`` and
    ``<|im_end|>`` (the end of a turn, and the EOS token: generation stops there); the think and tool tags follow, then
    the bytes, then the merges in the order learned.

    Args:
        texts: any iterable; it is read once and never held as a whole.
        vocab_size: tokens in all, at least ``MIN_VOCAB_SIZE``. Text too small or too uniform to supply that many merges
            gives a smaller vocabulary and a logged warning; ``len(tokenizer)`` tells.
        min_frequency: a pair seen less often than this is never merged.

    Raises:
        UserError: ``vocab_size`` is too small, or ``texts`` holds no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {MIN_VOCAB_SIZE - 256} control tokens need "
            f"{MIN_VOCAB_SIZE}; use {MIN_VOCAB_SIZE} or more (512 for a toy, 4096 and up for text)"
        )
    num_chars = 0

    def counted() -> Iterable[str]:
        nonlocal num_chars
        for text in texts:
            num_chars += len(text)
            yield text

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *MARKUP_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(counted(), trainer)
    if num_chars == 0:
        raise UserError("the data to train a tokenizer on holds no text; give files with at least one non-empty text")

    # The trainer flags every token given to it as special; the tags are text for parsers to read back, so unflag them.
    state = json.loads(bpe.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = chat_template
    if len(tokenizer) < vocab_size:
        logger.warning("the text gave only %d of the %d tokens asked for", len(tokenizer), vocab_size)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write the tokenizer and its chat template into ``folder`` in the Hugging Face layout, and return the folder.

    transformers 5 names the class of a plain tokenizer.json ``TokenizersBackend``, which transformers 4 (still inside
    many engine images) refuses; the older name means the same to both, so that is what is written.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder
