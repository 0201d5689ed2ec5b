"""The whole way from text to rows, judged from the rows; and what happens to files that are lost or damaged."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from parallel.errors import UserError
from tests.train.data.conftest import write_jsonl
from train.data import packing
from train.data.config import DataConfig
from train.data.preparation import FILES, Prepared, load, prepare
from train.data.rows import Rows
from train.data.sampler import row_ids
from train.data.sources import StandardLibrary

SIZES: dict[str, Any] = {"vocab_size": 500, "sequence_length": 15, "seed": 1}
QUIET = SIZES | {"progress": False}
EOS, BEGIN, HOLE, END = 0, 1, 2, 3


def documents_in(rows: Rows, tokenizer: Path) -> tuple[list[str], int]:
    """Read rows back into documents, undoing fill-in-the-middle, and count those; an unfinished last one is left."""
    vocabulary = Tokenizer.from_file(str(tokenizer))
    texts, rearranged, start = [], 0, 0
    ids = rows[range(len(rows))].flatten().tolist()
    for stop in (i for i, token in enumerate(ids) if token == EOS):
        parts, start = ids[start:stop], stop + 1
        if parts and parts[0] == BEGIN:
            hole, end = parts.index(HOLE), parts.index(END)
            prefix, suffix, middle = parts[1:hole], parts[hole + 1 : end], parts[end + 1 :]
            texts.append("".join(vocabulary.decode(part) for part in (prefix, middle, suffix)))
            rearranged += 1
        else:
            texts.append(vocabulary.decode(parts))
    return texts, rearranged


def test_rows_hold_every_document_once_and_heldout_ones_stay_apart(corpus, documents):
    prepared = prepare(corpus(fim_rate=0.5), **QUIET)
    train, rearranged = documents_in(prepared.train, prepared.tokenizer)
    heldout, untouched = documents_in(prepared.heldout, prepared.tokenizer)
    assert len(set(train)) == len(train)
    assert set(train) | set(heldout) <= set(documents)
    assert not set(train) & set(heldout)
    assert len(train) >= 107 and len(heldout) >= 11  # of 108 and 12: the last of a split may be cut off
    assert 25 <= rearranged <= 83  # 54 +- 5.6 standard deviations
    assert untouched == 0
    assert prepared.counts["train_documents"] == 108 and prepared.counts["heldout_documents"] == 12


def test_standard_library_is_reproduced_from_its_rows(tmp_path):
    config = DataConfig(max_documents=150, heldout=0.05, cache=str(tmp_path))
    prepared = prepare(config, vocab_size=1024, sequence_length=256, seed=0, progress=False)
    train, rearranged = documents_in(prepared.train, prepared.tokenizer)
    heldout, _ = documents_in(prepared.heldout, prepared.tokenizer)
    source = StandardLibrary(config)
    sources = Counter(source.texts(range(len(source))))
    assert not Counter(train + heldout) - sources
    skipped = prepared.counts["empty_documents"] + prepared.counts["undecodable_documents"]
    assert 148 <= len(train) + len(heldout) + skipped <= 150
    assert 0 < rearranged < 50  # of about 140 at rate 0.1
    assert prepared.train[[0]].shape == (1, 257)


def contents(prepared: Prepared) -> dict[str, str]:
    return {name: hashlib.sha256((prepared.directory / name).read_bytes()).hexdigest() for name in FILES}


def test_preparing_twice_gives_the_same_bytes_and_another_seed_another_order(corpus, tmp_path):
    first = prepare(corpus(), **QUIET)
    again = prepare(corpus(cache=str(tmp_path / "elsewhere")), **QUIET)
    other = prepare(corpus(), **QUIET | {"seed": 2})
    assert again.fingerprint == first.fingerprint != other.fingerprint
    assert contents(again) == contents(first)
    assert contents(other)["heldout.arrow"] != contents(first)["heldout.arrow"]


def test_what_is_prepared_is_used_again_until_asked_to_rebuild(corpus):
    def made(config: DataConfig) -> int:
        return (prepare(config, **QUIET).directory / "manifest.json").stat().st_mtime_ns

    first = made(corpus())
    assert made(corpus()) == first
    rebuilt = made(corpus(rebuild=True))
    assert rebuilt > first
    assert made(corpus()) == rebuilt


def test_changed_documents_or_settings_are_other_data(corpus, documents, tmp_path):
    config = corpus()
    prints = {prepare(config, **QUIET).fingerprint}
    prints.add(prepare(config, **QUIET | {"sequence_length": 16}).fingerprint)
    prints.add(prepare(config, **QUIET | {"vocab_size": 400}).fingerprint)
    prints.add(prepare(corpus(fim_rate=0.0), **QUIET).fingerprint)
    write_jsonl(Path(str(config.path)), [*documents, "one more"])
    prints.add(prepare(config, **QUIET).fingerprint)
    assert len(prints) == 5


def test_unigram_entropy_equals_a_direct_count(corpus):
    prepared = prepare(corpus(), **QUIET)
    seen = Counter(t for row in prepared.train[range(len(prepared.train))].tolist() for t in row[1:])
    total = sum(seen.values()) + 500
    rows = prepared.heldout[range(len(prepared.heldout))]
    nats = [-math.log((seen[t] + 1) / total) for row in rows.tolist() for t in row[1:]]
    assert prepared.unigram_nats == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    assert prepared.unigram(rows) == pytest.approx(prepared.unigram_nats, rel=1e-12)
    assert prepared.unigram(rows[3:5]) == pytest.approx(sum(nats[45:75]) / 30, rel=1e-12)


def test_empty_and_null_documents_are_counted_and_skipped(corpus, documents, tmp_path):
    path = write_jsonl(tmp_path / "gaps.jsonl", [*documents, "", "  \n", ""])
    with path.open("a") as file:
        file.write('{"text": null}\n')
    prepared = prepare(corpus(path=str(path)), **QUIET)
    assert prepared.counts["empty_documents"] == 4
    texts = [text for rows in (prepared.train, prepared.heldout) for text in documents_in(rows, prepared.tokenizer)[0]]
    assert "" not in texts


def test_max_documents_limits_the_shuffled_documents(corpus):
    counts = prepare(corpus(max_documents=50), **QUIET).counts
    assert counts["train_documents"] == 45 and counts["heldout_documents"] == 5


def test_own_tokenizer_is_used_as_it_is(corpus, tmp_path):
    first = prepare(corpus(), **QUIET)
    shutil.copy(first.tokenizer, tmp_path / "mine.json")
    prepared = prepare(corpus(tokenizer=str(tmp_path / "mine.json")), **QUIET)
    assert contents(prepared) == contents(first)
    with pytest.raises(UserError, match=r"beyond the vocabulary of 450"):
        prepare(corpus(tokenizer=str(tmp_path / "mine.json")), **QUIET | {"vocab_size": 450})


def test_vocabulary_larger_than_the_models_is_refused(corpus):
    with pytest.raises(UserError, match=r"data.vocab_size=501: expected at most the model's 500"):
        prepare(corpus(vocab_size=501), **QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "data.source=web: expected stdlib or hf"),
        ({"path": None}, "data.path=null: data.source=hf needs"),
        ({"fim_rate": 1.1}, "data.fim_rate=1.1: expected a fraction"),
        ({"heldout": 0.0}, "data.heldout=0.0: expected a fraction"),
        ({"max_documents": 1}, "data.max_documents=1: expected at least 2"),
        ({"vocab_size": 0}, "data.vocab_size=0: expected a positive number"),
        ({"tokenizer": "no.json"}, "data.tokenizer=no.json: no such file"),
    ],
)
def test_contradictory_settings_are_refused_in_the_users_words(corpus, changes, message):
    with pytest.raises(UserError) as caught:
        corpus(**changes).check()
    assert str(caught.value).startswith(message)


def test_data_that_ends_before_the_first_row_is_refused(corpus, tmp_path):
    path = write_jsonl(tmp_path / "few.jsonl", ["a few words"] * 5)
    with pytest.raises(UserError, match=r"few.jsonl: the heldout split has \d+ tokens, less than one row of 1001"):
        prepare(corpus(path=str(path)), **QUIET | {"sequence_length": 1000})
    single = write_jsonl(tmp_path / "single.jsonl", ["a few words"])
    with pytest.raises(UserError, match=r"single.jsonl: has 1 documents; expected at least 2"):
        prepare(corpus(path=str(single)), **QUIET)
    assert not list((tmp_path / "cache" / "data").glob("*.tmp"))


def test_loading_before_preparing_says_what_to_do(corpus):
    with pytest.raises(UserError, match=r"is missing: make it with `weft data prepare`"):
        load(corpus(), **SIZES)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", [Path.unlink, truncate])
def test_missing_or_truncated_file_is_named_by_every_process_and_rebuilt_on_request(corpus, name, harm):
    prepared = prepare(corpus(), **QUIET)
    before = contents(prepared)
    harm(prepared.directory / name)
    for opened in (lambda: load(corpus(), **SIZES), lambda: prepare(corpus(), **QUIET)):
        with pytest.raises(UserError, match=r"data.rebuild=true") as caught:
            opened()
        assert str(prepared.directory) in str(caught.value) and name in str(caught.value)
    assert contents(prepare(corpus(rebuild=True), **QUIET)) == before
    assert load(corpus(), **SIZES).fingerprint == prepared.fingerprint


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_before_ranks_start(corpus, name):
    prepared = prepare(corpus(), **QUIET)
    flip(prepared.directory / name)
    with pytest.raises(UserError, match=rf"{name} is damaged: .* data.rebuild=true"):
        prepare(corpus(), **QUIET)


def test_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"data.cache={tmp_path / 'file'}: preparing data failed"):
        prepare(corpus(cache=str(tmp_path / "file")), **QUIET)


KILLED = """
import json, os, signal, sys
from train.data import packing, preparation
from train.data.config import DataConfig
write = packing.write
def die(path, *rest):
    if path.name == "train.arrow":
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, *rest)
packing.write = die
preparation.prepare(DataConfig(**json.loads(sys.argv[1])), **json.loads(sys.argv[2]))
"""


def test_killed_preparation_leaves_nothing_that_counts(corpus):
    arguments = [json.dumps(dataclasses.asdict(corpus())), json.dumps(QUIET)]
    result = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, env=os.environ)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(UserError, match="is missing"):
        load(corpus(), **SIZES)
    prepared = prepare(corpus(), **QUIET)
    assert sorted(path.name for path in prepared.directory.iterdir()) == sorted([*FILES, "manifest.json"])


def test_processes_that_meet_prepare_once(corpus, monkeypatch):
    written = []
    write = packing.write
    monkeypatch.setattr(packing, "write", lambda path, *rest: written.append(path.name) or write(path, *rest))
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(prepare, corpus(), **QUIET) for _ in range(3)]
        assert len({job.result().fingerprint for job in jobs}) == 1
    assert sorted(written) == ["heldout.arrow", "train.arrow"]


def rows_of_this_rank(config: DataConfig, steps: int, batch: int) -> list[list[int]]:
    """What one rank reads of `steps` global batches."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows, share = load(config, **SIZES).train, batch // world
    return [
        rows[row_ids(step * batch + rank * share, share, len(rows), seed=9)].flatten().tolist() for step in range(steps)
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_read_what_one_process_reads(corpus, workers, world):
    config, steps, batch = corpus(), 5, 8
    prepared = prepare(config, **QUIET)
    shares = workers(world).run(rows_of_this_rank, config, steps, batch)
    for step in range(steps):
        alone = prepared.train[row_ids(step * batch, batch, len(prepared.train), seed=9)].flatten().tolist()
        assert [token for share in shares for token in share[step]] == alone


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    assert DataConfig().cache_directory() == tmp_path
    monkeypatch.delenv("WEFT_CACHE")
    assert DataConfig().cache_directory() == Path.home() / ".cache" / "weft"
