"""The byte-level tokenizer loses nothing, keeps special tokens out of text, and fits its vocabulary."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from parallel.errors import UserError
from tests.train.data.conftest import odd_documents
from train.data import tokenizer

VOCABULARY = 420


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(odd_documents(100), VOCABULARY).save(str(path))
    return path


@pytest.fixture(scope="module")
def encoder(trained) -> tokenizer.Encoder:
    return tokenizer.Encoder(trained, VOCABULARY, fim_rate=0.1)


spelled = st.sampled_from(["<|eos_token|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", "\n", "12345", " "])


@given(texts=st.lists(st.lists(spelled | st.text(), max_size=5).map("".join), max_size=5))
def test_any_text_comes_back_and_never_makes_a_special_token(encoder, trained, texts):
    ids = encoder.encode([[text] for text in texts])
    assert Tokenizer.from_file(str(trained)).decode(ids.tolist(), skip_special_tokens=False) == "".join(texts)
    assert not {0, 1, 2, 3} & set(ids.tolist())


def test_special_tokens_and_texts_keep_their_places(encoder):
    a, b = (encoder.tokenizer.encode(text).ids for text in ("return", "12345"))
    ids = encoder.encode([[1, "return", 2, "", 3, "12345", 0], ["return", 0]])
    assert ids.tolist() == [1, *a, 2, 3, *b, 0, *a, 0]
    assert ids.dtype == np.uint16


def test_punctuation_may_join_line_breaks_and_numbers_stay_short(trained):
    vocabulary = Tokenizer.from_file(str(trained)).get_vocab()
    assert "):Ċ" in vocabulary
    assert not any(token.isdigit() and len(token) > 3 for token in vocabulary)
    assert "123" in vocabulary


def test_token_beyond_the_vocabulary_is_refused_by_name(trained):
    last = max(Tokenizer.from_file(str(trained)).get_vocab().values())
    tokenizer.Encoder(trained, last + 1, 0.1)
    with pytest.raises(UserError, match=rf"{trained}.* has id {last}, beyond the vocabulary of {last}"):
        tokenizer.Encoder(trained, last, 0.1)


def test_wide_vocabulary_is_stored_in_four_bytes(trained):
    assert tokenizer.Encoder(trained, 129280, 0.1).encode([["x", 0]]).dtype == np.int32


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"data.vocab_size=259: .* at least 260"):
        tokenizer.train(["text"], 259)


def renamed(trained: Path, folder: Path, **changes: str) -> Path:
    text = trained.read_text()
    for old, new in changes.items():
        text = text.replace(f"<|{old}|>", new)
    path = folder / "renamed.json"
    path.write_text(text)
    return path


def test_missing_special_tokens_are_named(trained, tmp_path):
    with pytest.raises(UserError, match=r"expected one of <\|eos_token\|>.* for eos$"):
        tokenizer.Encoder(renamed(trained, tmp_path, eos_token="<end>"), VOCABULARY, 0.0)
    path = renamed(trained, tmp_path, fim_hole="<gap>")
    with pytest.raises(UserError, match=r"for fim_hole, or data.fim_rate=0"):
        tokenizer.Encoder(path, VOCABULARY, 0.1)
    tokenizer.Encoder(path, VOCABULARY, 0.0)


def test_the_released_tokenizers_spelling_is_understood(trained, tmp_path):
    path = renamed(trained, tmp_path, eos_token="<｜end▁of▁sentence｜>", fim_begin="<｜fim▁begin｜>")
    assert tokenizer.Encoder(path, VOCABULARY, 0.1).special == tokenizer.SpecialTokens(0, 1, 2, 3)


def test_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3')
    with pytest.raises(UserError, match=rf"data.tokenizer={path}: not a tokenizer.json"):
        tokenizer.Encoder(path, VOCABULARY, 0.0)
