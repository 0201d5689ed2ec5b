"""The documents of a source in the order of training: shuffled, split, some rearranged, encoded.

The shuffle is the sampler's bijection keyed by the seed. The first documents are held out and kept as they are; the
rest train, a fraction of them in fill-in-the-middle form, drawn from (seed, position) alone.
"""

from collections.abc import Callable, Iterator
from random import Random

import numpy as np

from parallel.errors import UserError
from train.data import fim
from train.data.config import DataConfig
from train.data.sampler import row_ids
from train.data.sources import Documents
from train.data.tokenizer import Encoder

BATCH = 128  # documents encoded at once
SAMPLE_CHARACTERS = 8_000_000  # that a tokenizer learns from


class Corpus:
    """Shuffled documents; `splits` gives each split's range of positions, `skipped` counts what held no text."""

    def __init__(self, documents: Documents, config: DataConfig, seed: int) -> None:
        self.documents, self.seed, self.fim_rate = documents, seed, config.fim_rate
        total = min(len(documents), config.max_documents or len(documents))
        if total < 2:
            raise UserError(f"{config.where()}: has {total} documents; expected at least 2, one of them held out")
        cut = min(max(1, round(config.heldout * total)), total - 1)
        self.splits = {"heldout": range(cut), "train": range(cut, total)}
        self.skipped = {"empty": 0, "undecodable": 0}

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def sample(self) -> Iterator[str]:
        """The first training documents, about `SAMPLE_CHARACTERS` of text."""
        characters = 0
        for batch in self._batches("train"):
            for _, text in batch:
                yield text or ""
                characters += len(text or "")
                if characters >= SAMPLE_CHARACTERS:
                    return

    def tokens(self, split: str, encoder: Encoder, advance: Callable[[int], object]) -> Iterator[np.ndarray]:
        """Token ids of a split, some documents at a time; tells `advance` how many each time."""
        rate = self.fim_rate if split == "train" else 0.0
        for batch in self._batches(split):
            arranged = []
            for position, text in batch:
                if text is not None and text.strip():
                    arranged.append(fim.arrange(text, encoder.special, rate, Random(f"{self.seed}:{position}")))
                else:
                    self.skipped["undecodable" if text is None else "empty"] += 1
            yield encoder.encode(arranged)
            advance(len(batch))

    def _batches(self, split: str) -> Iterator[list[tuple[int, str | None]]]:
        positions = self.splits[split]
        for first in range(positions.start, positions.stop, BATCH):
            batch = range(first, min(first + BATCH, positions.stop))
            texts = self.documents.texts(row_ids(first, len(batch), len(self.documents), self.seed))
            yield list(zip(batch, texts, strict=True))
