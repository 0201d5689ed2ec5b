"""Byte-level BPE: text to token ids and back, without loss.

`train` learns one from a sample; `Encoder` wraps a trained or a given `tokenizer.json`. Text is cut into words before
merging: runs of punctuation may take the line breaks that follow, numbers are at most three digits (report section
4.1). Special tokens are only ever inserted by `fim` and the end of a document: their spelling inside text is text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from parallel.errors import UserError
from train.data.fim import SpecialTokens

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The spellings known for each special token, ours first, then the released DeepSeek tokenizers' and common others.
SPELLINGS = {
    "eos": ("<|eos_token|>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "</s>"),
    "fim_begin": ("<|fim_begin|>", "<｜fim▁begin｜>", "<|fim_prefix|>"),
    "fim_hole": ("<|fim_hole|>", "<｜fim▁hole｜>", "<|fim_suffix|>"),
    "fim_end": ("<|fim_end|>", "<｜fim▁end｜>", "<|fim_middle|>"),
}
SMALLEST_VOCABULARY = 256 + len(SPELLINGS)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` entries (fewer if the text has fewer pairs to merge)."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.vocab_size={vocab_size}: a byte-level tokenizer needs 256 bytes and {len(SPELLINGS)} special "
            f"tokens, so at least {SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[spellings[0] for spellings in SPELLINGS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Encoder:
    """Encodes arranged documents with the tokenizer at `path`, whose ids must lie below `vocab_size`.

    Raises `UserError` if the file cannot be read, has an id beyond the vocabulary or lacks a special token that
    `fim_rate` calls for.
    """

    def __init__(self, path: Path, vocab_size: int, fim_rate: float) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise UserError(f"data.tokenizer={path}: not a tokenizer.json that can be read ({error})") from error
        self.tokenizer.encode_special_tokens = True  # a special token spelled out in a document is plain text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        token, last = max(self.tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
        if last >= vocab_size:
            raise UserError(
                f"data.tokenizer={path}: token {token!r} has id {last}, beyond the vocabulary of {vocab_size} "
                f"(expected ids 0 to {vocab_size - 1})"
            )
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        eos = self._special(path, "eos")
        needed = ("fim_begin", "fim_hole", "fim_end") if fim_rate > 0 else ()
        self.special = SpecialTokens(eos, *([self._special(path, role) for role in needed] or [eos] * 3))

    def _special(self, path: Path, role: str) -> int:
        ids = [self.tokenizer.token_to_id(spelling) for spelling in SPELLINGS[role]]
        found = [i for i in ids if i is not None]
        if not found:
            remedy = "" if role == "eos" else ", or data.fim_rate=0"
            raise UserError(f"data.tokenizer={path}: expected one of {', '.join(SPELLINGS[role])} for {role}{remedy}")
        return found[0]

    def encode(self, documents: Sequence[list[str | int]]) -> np.ndarray:
        """Token ids of arranged documents end to end, one array of `dtype`."""
        texts = [part for parts in documents for part in parts if isinstance(part, str)]
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        ids: list[int] = []
        for parts in documents:
            for part in parts:
                if isinstance(part, str):
                    ids.extend(next(encoded).ids)
                else:
                    ids.append(part)
        return np.array(ids, dtype=self.dtype)
