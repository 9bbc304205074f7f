"""The tokenizer trained here: reproducible, lossless, and the same after a save and a load by transformers."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollouts.errors import UserError
from rollouts.models.chat_templates import CHAT_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS
from rollouts.models.tokenizer import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer

TEXTS = [f"the number {i} and the word {chr(97 + i % 26) * 3}" for i in range(400)]


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_every_text_survives_encoding(tiny_tokenizer, text):
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text, add_special_tokens=False)) == text


@given(
    pieces=st.lists(st.sampled_from([*SPECIAL_TOKENS, *MARKUP_TOKENS, " ", "\n", "\r\n", "a", "é", "e\u0301", "한"]))
)
@settings(max_examples=200, deadline=None)
def test_control_tokens_between_text_survive_too(tiny_tokenizer, pieces):
    text = "".join(pieces)
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    assert tiny_tokenizer.decode(ids) == text
    for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS):
        assert ids.count(tiny_tokenizer.convert_tokens_to_ids(token)) == pieces.count(token)


def test_ids_of_control_tokens_are_fixed_and_only_chatml_is_hidden(tiny_tokenizer):
    assert tiny_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]) == [
        0,
        1,
        2,
        3,
    ]
    assert (tiny_tokenizer.eos_token, tiny_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tiny_tokenizer.encode("<|im_start|><tool_call>x</tool_call><|im_end|>", add_special_tokens=False)
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>x</tool_call>"


def test_training_is_reproducible_and_depends_on_the_text():
    first, again = (train_tokenizer(iter(TEXTS), 320).backend_tokenizer.to_str() for _ in range(2))
    other = train_tokenizer(TEXTS[:100], 320).backend_tokenizer.to_str()
    assert first == again
    assert first != other


def test_loads_as_a_plain_hugging_face_folder(tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    folder = save_tokenizer(tiny_tokenizer, tmp_path / "tok")
    loaded = AutoTokenizer.from_pretrained(folder)
    text = "Café e\u0301 12345 <think> \n\n x<|im_end|>"
    assert loaded.encode(text) == tiny_tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.chat_template == CHAT_TEMPLATE
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (2, 0, 512)
    # the class name that transformers 4 knows as well
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_little_text_gives_fewer_tokens_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(["ab ab"], 1000)
    assert MIN_VOCAB_SIZE < len(tokenizer) < 1000
    assert f"only {len(tokenizer)} of the 1000" in caplog.text


@pytest.mark.parametrize(
    ("texts", "size", "message"), [(TEXTS, 100, "too small"), ([], 512, "no text"), ([""], 512, "no text")]
)
def test_bad_input_is_one_clear_line(texts, size, message):
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(texts, size)
    assert "\n" not in str(caught.value)
