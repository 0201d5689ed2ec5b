"""Rows of tokens on disk, read by number.

A row is `sequence_length + 1` tokens. The file is one Arrow stream that `datasets` maps into memory: opening it costs
nothing, reading touches only the rows asked for, and processes of a node share the pages.
"""

from collections.abc import Sequence
from pathlib import Path

import torch


class Rows:
    """The rows of one split; `rows[ids]` gives int64 tokens `[len(ids), sequence_length + 1]`."""

    def __init__(self, path: Path) -> None:
        from datasets import Dataset  # which takes most of a second, and not every command reads rows

        self.dataset = Dataset.from_file(str(path)).with_format("numpy")
        self.row_length: int = self.dataset.features["tokens"].length

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ids: Sequence[int]) -> torch.Tensor:
        """Tokens of the rows `ids`, in that order. Raises `IndexError` beyond the last row."""
        tokens = self.dataset[list(ids)]["tokens"].astype("int64")
        return torch.from_numpy(tokens).reshape(-1, self.row_length)
