"""The `data` section of a recipe: where text comes from and how it becomes rows.

`DataConfig` only describes and checks itself; `train.data.preparation` acts on it. Keys have the names that a user
writes after `data.`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError


@dataclass
class DataConfig:
    """One corpus. `source` stdlib is the Python library's own files; hf is a `datasets` name or local files."""

    source: str = "stdlib"  # stdlib | hf
    path: str | None = None  # hf: name of a dataset, or a local file or folder of .txt, .jsonl, .json or .parquet
    name: str | None = None  # hf: the dataset's configuration
    split: str = "train"  # hf: as `datasets` spells it, slices such as train[:10%] too
    text_column: str = "text"  # hf: the column that holds a document
    max_documents: int | None = None  # of the shuffled documents, the first so many; null = all
    heldout: float = 0.01  # fraction of documents kept from training
    fim_rate: float = 0.1  # fraction of training documents in fill-in-the-middle form
    vocab_size: int | None = None  # of the tokenizer to train; null = the model's
    tokenizer: str | None = None  # path of a tokenizer.json; null = train one on a sample
    cache: str | None = None  # null = $WEFT_CACHE, else ~/.cache/weft
    rebuild: bool = False  # prepare again, replacing what the cache holds

    def check(self) -> None:
        """Raise `UserError` if the section contradicts itself."""
        if self.source not in ("stdlib", "hf"):
            raise UserError(f"data.source={self.source}: expected stdlib or hf")
        if self.source == "hf" and not self.path:
            raise UserError("data.path=null: data.source=hf needs the name of a dataset, or a local file or folder")
        if not 0.0 <= self.fim_rate <= 1.0:
            raise UserError(f"data.fim_rate={self.fim_rate}: expected a fraction from 0 to 1")
        if not 0.0 < self.heldout < 1.0:
            raise UserError(f"data.heldout={self.heldout}: expected a fraction between 0 and 1")
        if self.max_documents is not None and self.max_documents < 2:
            raise UserError(f"data.max_documents={self.max_documents}: expected at least 2, one of them held out")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"data.vocab_size={self.vocab_size}: expected a positive number, or null for the model's")
        if self.tokenizer is not None and not Path(self.tokenizer).is_file():
            raise UserError(f"data.tokenizer={self.tokenizer}: no such file; expected a tokenizer.json")

    def where(self) -> str:
        """The key and value that name the corpus, to open an error message."""
        return f"data.path={self.path}" if self.source == "hf" else f"data.source={self.source}"

    def cache_directory(self) -> Path:
        """Folder below which prepared data lives."""
        return Path(self.cache or os.environ.get("WEFT_CACHE") or "~/.cache/weft").expanduser()
