"""Where documents come from: the Python standard library, a dataset of the Hub, or local files.

A source tells its identity without reading a document (it names the prepared data), then opens into something that
gives texts by number. `None` is a document that cannot be decoded; preparation counts and skips it.
"""

import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import UserError
from train.data.config import DataConfig

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Documents(Protocol):
    def __len__(self) -> int: ...

    def texts(self, ids: Sequence[int]) -> list[str | None]: ...


class Source(Protocol):
    def __init__(self, config: DataConfig) -> None: ...

    def identity(self) -> Any:
        """JSON-able; changes whenever the documents may have changed."""

    def open(self, scratch: Path) -> Documents:
        """The documents in a fixed order; `scratch` is a folder that lives until preparation ends."""


class StandardLibrary:
    """The .py files of the running Python, in the order of their paths, installed packages left out."""

    def __init__(self, config: DataConfig) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        self.paths = sorted(self._walk())

    def _walk(self) -> Iterator[Path]:
        for folder, inside, files in os.walk(self.root):
            inside[:] = set(inside) - {"site-packages", "dist-packages"}
            yield from (Path(folder, name) for name in files if name.endswith(".py"))

    def identity(self) -> Any:
        return [[path.relative_to(self.root).as_posix(), path.stat().st_size] for path in self.paths]

    def open(self, scratch: Path) -> Documents:
        return self

    def __len__(self) -> int:
        return len(self.paths)

    def texts(self, ids: Sequence[int]) -> list[str | None]:
        return [self._read(self.paths[i]) for i in ids]

    def _read(self, path: Path) -> str | None:
        try:
            with tokenize.open(path) as file:  # honours the file's own coding line
                return file.read()
        except (SyntaxError, UnicodeDecodeError):
            return None


class HuggingFace:
    """What `datasets.load_dataset` reads: a dataset's name, or local files of one kind, alone or below a folder.

    Each .txt file of a folder is a document; a single .txt file has one per paragraph, between blank lines.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        path = Path(config.path or "").expanduser()
        if path.suffix in BUILDERS and not path.exists():
            raise UserError(f"data.path={config.path}: no such file")
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        self.files = [file for file in candidates if file.suffix in BUILDERS and file.is_file()]
        builders = {BUILDERS[file.suffix] for file in self.files}
        if len(builders) > 1:
            raise UserError(f"data.path={config.path}: holds files of several kinds ({', '.join(sorted(builders))})")
        self.builder = builders.pop() if builders else None

    def identity(self) -> Any:
        stats = [(file, file.stat()) for file in self.files]
        files = [[file.as_posix(), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
        return [self.config.path, self.config.name, self.config.split, self.config.text_column, files]

    def open(self, scratch: Path) -> Documents:
        import datasets  # here, for it takes most of a second

        try:
            dataset = self._load(scratch)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()
            raise UserError(f"{self.config.where()}: cannot be read: {' '.join(cause[:2])}") from error
        column = self.config.text_column
        if not isinstance(dataset, datasets.Dataset):
            raise UserError(f"data.split={self.config.split}: expected one split, such as train")
        if column not in dataset.column_names:
            raise UserError(f"data.text_column={column}: expected one of {', '.join(dataset.column_names)}")
        if dataset.features[column].dtype not in ("string", "large_string"):
            raise UserError(f"data.text_column={column}: expected text, found {dataset.features[column].dtype}")
        return Column(dataset.select_columns([column]), column)

    def _load(self, scratch: Path) -> Any:
        from datasets import load_dataset

        if self.builder is None:
            return load_dataset(self.config.path, self.config.name, split=self.config.split)
        options: dict[str, Any] = {}
        if self.builder == "text":
            options["sample_by"] = "document" if len(self.files) > 1 else "paragraph"
        files = [str(file) for file in self.files]
        return load_dataset(self.builder, data_files=files, split=self.config.split, cache_dir=str(scratch), **options)


class Column:
    """One text column of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def texts(self, ids: Sequence[int]) -> list[str | None]:
        return [text or "" for text in self.dataset[list(ids)][self.column]]


SOURCES: dict[str, type[Source]] = {"stdlib": StandardLibrary, "hf": HuggingFace}
