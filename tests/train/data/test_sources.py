"""What sources find, what they refuse, and in which words."""

import inspect
import json
import sysconfig
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parallel.errors import UserError
from tests.train.data.conftest import write_jsonl
from train.data.config import DataConfig
from train.data.sources import HuggingFace, StandardLibrary

TEXTS = ["first\nwith two lines", "zweiter — naïve", "第三"]


def read(config: DataConfig, scratch: Path) -> list[str | None]:
    documents = HuggingFace(config).open(scratch)
    return documents.texts(range(len(documents)))


def test_standard_library_holds_this_pythons_sources_and_no_packages():
    source = StandardLibrary(DataConfig())
    assert source.paths == sorted(source.paths)
    assert not any("site-packages" in path.parts for path in source.paths)
    number = source.paths.index(Path(inspect.getfile(textwrap)))
    assert source.texts([number]) == [inspect.getsource(textwrap)]
    assert len(source) > 500


def test_sources_own_encoding_is_honoured_and_an_unreadable_file_is_none(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes("# coding: latin-1\ns = 'é'\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"s = '\xff\xfe'\n")
    (tmp_path / "c.py").write_bytes(b"# coding: no-such-thing\n")
    (tmp_path / "d.py").write_bytes(b"")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "e.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    source = StandardLibrary(DataConfig())
    assert source.texts(range(len(source))) == ["# coding: latin-1\ns = 'é'\n", None, None, ""]


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS, "stars": [1, 2, 3]}), path)


def write_text(path: Path) -> None:
    path.write_text("\n\n".join(TEXTS))


def write_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    for name, text in zip(["a.txt", "b.txt", "inner/c.txt"], TEXTS, strict=True):
        (path / name).write_text(text)


FORMATS = {
    "a.jsonl": lambda path: write_jsonl(path, TEXTS),
    "a.json": write_json,
    "a.parquet": write_parquet,
    "a.txt": write_text,
    "folder": write_folder,
}


@pytest.mark.parametrize("name", FORMATS)
def test_local_files_give_their_documents(tmp_path, name):
    FORMATS[name](tmp_path / name)
    assert read(DataConfig(source="hf", path=str(tmp_path / name)), tmp_path / "scratch") == TEXTS


def test_slices_and_other_columns_are_read(tmp_path):
    pq.write_table(pa.table({"content": [*TEXTS, None]}), tmp_path / "a.parquet")
    config = DataConfig(source="hf", path=str(tmp_path / "a.parquet"), text_column="content", split="train[1:]")
    assert read(config, tmp_path / "scratch") == [*TEXTS[1:], ""]


def refusal(tmp_path: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(DataConfig(source="hf", **options), tmp_path / "scratch")
    return str(caught.value)


def test_missing_file_is_named(tmp_path):
    assert refusal(tmp_path, path=str(tmp_path / "no.jsonl")) == f"data.path={tmp_path / 'no.jsonl'}: no such file"


def test_mixed_folder_is_refused(tmp_path):
    write_json(tmp_path / "a.json")
    write_text(tmp_path / "b.txt")
    assert "files of several kinds (json, text)" in refusal(tmp_path, path=str(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_truncated_file_is_named(tmp_path, name):
    path = tmp_path / name
    FORMATS[name](path)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"data.path={path}: cannot be read: " in refusal(tmp_path, path=str(path))


def test_wrong_column_lists_those_there_are(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    message = refusal(tmp_path, path=path, text_column="txt")
    assert message == "data.text_column=txt: expected one of text, stars"
    assert refusal(tmp_path, path=path, text_column="stars") == "data.text_column=stars: expected text, found int64"


def test_unknown_split_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert "cannot be read" in refusal(tmp_path, path=path, split="test")
    assert "data.split=None: expected one split" in refusal(tmp_path, path=path, split=None)
