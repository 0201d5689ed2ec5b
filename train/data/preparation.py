"""Text to rows, once: `prepare` makes what is missing, `load` opens it.

Prepared data lives at CACHE/data/FINGERPRINT, named by everything that determines its bytes. It is written aside and
renamed into place, so it exists whole or not at all. Its `manifest.json` records size and hash of every file: `load`
(each rank, each start) compares sizes, `prepare` (one process, before them) reads and compares every byte.
"""

import hashlib
import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from parallel.errors import UserError
from train.data import packing, tokenizer
from train.data.config import DataConfig
from train.data.corpus import Corpus
from train.data.rows import Rows
from train.data.sources import SOURCES

VERSION = 1  # of the bytes made here; raise it with any change that alters them
FILES = ("tokenizer.json", "train.arrow", "heldout.arrow", "unigram.npy")
REMEDY = "make it anew with data.rebuild=true"


@dataclass(frozen=True)
class Prepared:
    """Prepared data, open for reading.

    `unigram_logs`: float64 `[vocab_size]`, log-probabilities of a unigram model of the training rows' targets (any
    token of a row but its first), add-one smoothed. `unigram_nats`: its mean cross-entropy on the targets of all
    held-out rows. `counts`: `train_documents`, `train_rows`, `train_dropped_tokens`, the same for `heldout`,
    `empty_documents` and `undecodable_documents`.
    """

    directory: Path
    train: Rows
    heldout: Rows
    unigram_logs: torch.Tensor
    unigram_nats: float
    vocab_size: int
    fingerprint: str
    tokenizer: Path
    counts: dict[str, int]

    def unigram(self, rows: torch.Tensor) -> float:
        """Mean cross-entropy in nats of the unigram model on the targets of `rows` `[n, sequence_length + 1]`."""
        return -self.unigram_logs[rows[:, 1:]].mean().item()


def prepare(config: DataConfig, *, vocab_size: int, sequence_length: int, seed: int, progress: bool = True) -> Prepared:
    """Make the rows unless the cache holds them (`config.rebuild` makes them anew), check every byte and open them.

    `vocab_size` is the model's; rows have `sequence_length + 1` tokens. One process of a run calls this before its
    ranks `load`; several that meet wait for each other. Raises `UserError` for a source that cannot be read or is too
    small, a tokenizer that does not fit, a cache that cannot be written, or damaged data in it.
    """
    job = _Job(config, vocab_size, sequence_length, seed)
    if config.rebuild or not job.directory.exists():
        try:
            job.directory.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{job.directory}.lock"):
                if config.rebuild or not job.directory.exists():
                    job.build(progress)
        except OSError as error:
            raise UserError(f"data.cache={config.cache_directory()}: preparing data failed: {error}") from error
    return job.open(every_byte=True)


def load(config: DataConfig, *, vocab_size: int, sequence_length: int, seed: int) -> Prepared:
    """Open what `prepare` made with the same arguments. Raises `UserError` for what is missing or truncated."""
    return _Job(config, vocab_size, sequence_length, seed).open(every_byte=False)


class _Job:
    """One preparation: its arguments, the fingerprint they add up to and the folder it names."""

    def __init__(self, config: DataConfig, vocab_size: int, sequence_length: int, seed: int) -> None:
        config.check()
        self.config, self.seed, self.row_length = config, seed, sequence_length + 1
        self.vocab_size = config.vocab_size or vocab_size
        if self.vocab_size > vocab_size:
            raise UserError(f"data.vocab_size={self.vocab_size}: expected at most the model's {vocab_size}")
        self.source = SOURCES[config.source](config)
        self.fingerprint = self._fingerprint()
        self.directory = config.cache_directory() / "data" / self.fingerprint

    def _fingerprint(self) -> str:
        determines: dict[str, Any] = asdict(self.config)
        del determines["cache"], determines["rebuild"]
        if self.config.tokenizer:
            determines["tokenizer"] = _sha256(Path(self.config.tokenizer))
        determines |= {"version": VERSION, "documents": self.source.identity(), "seed": self.seed}
        determines |= {"vocab_size": self.vocab_size, "row_length": self.row_length}
        return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:16]

    def build(self, progress: bool) -> None:
        """Write everything into a folder aside, then rename it into place."""
        aside = self.directory.with_suffix(".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            self._write(aside, progress)
            shutil.rmtree(self.directory, ignore_errors=True)
            aside.rename(self.directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _write(self, folder: Path, progress: bool) -> None:
        corpus = Corpus(self.source.open(folder / "scratch"), self.config, self.seed)
        vocabulary = folder / "tokenizer.json"
        if self.config.tokenizer:
            shutil.copyfile(self.config.tokenizer, vocabulary)
        else:
            tokenizer.train(corpus.sample(), self.vocab_size).save(str(vocabulary))
        encoder = tokenizer.Encoder(vocabulary, self.vocab_size, self.config.fim_rate)
        hidden = None if progress else True  # None: a bar on a terminal, nothing in a log file
        with tqdm(total=len(corpus), desc="preparing data", unit=" documents", disable=hidden) as bar:
            heldout, train = (self._pack(folder, split, corpus, encoder, bar) for split in ("heldout", "train"))
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        logs = np.log(train.targets + 1.0) - np.log(train.targets.sum() + self.vocab_size)
        np.save(folder / "unigram.npy", logs)
        counts = {
            "train_documents": len(corpus.splits["train"]),
            "train_rows": train.rows,
            "train_dropped_tokens": train.dropped,
            "heldout_documents": len(corpus.splits["heldout"]),
            "heldout_rows": heldout.rows,
            "heldout_dropped_tokens": heldout.dropped,
            **{f"{reason}_documents": count for reason, count in corpus.skipped.items()},
        }
        manifest = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "data": asdict(self.config),
            "vocab_size": self.vocab_size,
            "python": platform.python_version(),
            "counts": counts,
            "unigram_nats": -float(logs @ heldout.targets / heldout.targets.sum()),
            "files": {
                name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in FILES
            },
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    def _pack(self, folder: Path, split: str, corpus: Corpus, encoder: tokenizer.Encoder, bar: tqdm) -> packing.Packed:
        streams = corpus.tokens(split, encoder, bar.update)
        packed = packing.write(folder / f"{split}.arrow", streams, self.row_length, self.vocab_size, encoder.dtype)
        if packed.rows == 0:
            remedy = "more text or a larger data.heldout" if split == "heldout" else "more text"
            raise UserError(
                f"{self.config.where()}: the {split} split has {packed.dropped} tokens, less than one row "
                f"of {self.row_length}; expected {remedy}, or a smaller train.sequence_length"
            )
        return packed

    def open(self, every_byte: bool) -> Prepared:
        """Check the files against the manifest, by size or by `every_byte`, and open them."""
        folder = self.directory
        if not folder.exists():
            raise UserError(f"prepared data {folder} is missing: make it with `weft data prepare` and the same recipe")
        manifest = _read_manifest(folder / "manifest.json")
        for name in FILES:
            _check(folder / name, **manifest["files"][name], every_byte=every_byte)
        return Prepared(
            directory=folder,
            train=Rows(folder / "train.arrow"),
            heldout=Rows(folder / "heldout.arrow"),
            unigram_logs=torch.from_numpy(np.load(folder / "unigram.npy")),
            unigram_nats=manifest["unigram_nats"],
            vocab_size=manifest["vocab_size"],
            fingerprint=manifest["fingerprint"],
            tokenizer=folder / "tokenizer.json",
            counts=manifest["counts"],
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"prepared data {path} is missing or damaged ({error}); {REMEDY}") from error


def _check(path: Path, bytes: int, sha256: str, every_byte: bool) -> None:
    if not path.is_file():
        raise UserError(f"prepared data {path} is missing; {REMEDY}")
    if (size := path.stat().st_size) != bytes:
        raise UserError(f"prepared data {path} has {size} bytes, expected {bytes}; {REMEDY}")
    if every_byte and _sha256(path) != sha256:
        raise UserError(f"prepared data {path} is damaged: its SHA-256 is not the manifest's; {REMEDY}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
