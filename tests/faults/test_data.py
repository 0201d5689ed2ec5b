"""Rows 28 and 29: data that is damaged, does not fit the vocabulary, is empty or ends. An error, or a count."""

import json
import math
from pathlib import Path

import pytest

from launch import cli
from tests.commands import ONE_RANK, fit, records, refused


def prepared(words: list[str]) -> Path:
    cache = [word.removeprefix("data.cache=") for word in words if word.startswith("data.cache=")][-1]
    assert cli.main(["data", "prepare", *words]) == 0
    return max(Path(cache).glob("data/*/manifest.json"), key=lambda path: path.stat().st_mtime).parent


@pytest.mark.fault(28)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_of_data_is_named_before_any_rank_starts(small, tmp_path, capsys, damage):
    words = [*small, f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path}", *ONE_RANK]
    shard = prepared(words) / "train.arrow"
    contents = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        middle = len(contents) // 2
        flipped = contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]
        shard.write_bytes(contents[:middle] if damage == "truncated" else flipped)
    told = refused(capsys, "train", *words)
    assert str(shard) in told and "data.rebuild=true" in told


@pytest.mark.fault(29)
def test_a_tokenizer_beyond_the_vocabulary_is_refused(small, tmp_path, capsys):
    own = prepared([*small, f"data.cache={tmp_path / 'cache'}"]) / "tokenizer.json"
    smaller = ["model.vocab_size=300", f"data.tokenizer={own}", f"data.cache={tmp_path / 'other'}"]
    told = refused(capsys, "train", *small, *ONE_RANK, *smaller, f"run.dir={tmp_path}")
    assert "beyond the vocabulary of 300" in told


@pytest.mark.slow
@pytest.mark.fault(29)
def test_empty_documents_are_counted_and_data_that_ends_early_begins_again(workers, small, tmp_path):
    texts = ["def function(): pass\n" * 40, "", "  \n", "import this\n" * 90, "x = 1\n" * 200]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))
    words = [*small, *ONE_RANK, f"data.path={tmp_path / 'few.jsonl'}", f"data.cache={tmp_path / 'cache'}"]
    counts = json.loads((prepared(words) / "manifest.json").read_text())["counts"]
    assert counts["empty_documents"] == 8
    steps = counts["train_rows"] // 4 + 3
    workers(1).run(fit, [*words, f"train.steps={steps}", "checkpoint.every=0", f"run.dir={tmp_path}", "run.name=few"])
    assert (
        all(math.isfinite(each["loss"]) for each in records(tmp_path / "few"))
        and len(records(tmp_path / "few")) == steps
    )
