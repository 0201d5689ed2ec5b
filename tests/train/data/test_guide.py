"""The commands of docs/how-to/data.md do what the guide says (on 200 documents, to be quick)."""

import json
import re
import shlex
from pathlib import Path

import pytest

from launch import cli
from tests.train.data.conftest import odd_documents

GUIDE = Path(__file__).parents[3] / "docs" / "how-to" / "data.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if "needs the network" not in line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory that holds the files the guide speaks of."""
    documents = [text * 20 for text in odd_documents(40)]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    (tmp_path / "notes.txt").write_text("\n\n".join(documents))
    (tmp_path / "books").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_guide_prepares_rows(folder, monkeypatch, capsys):
    monkeypatch.setenv("WEFT_CACHE", str(folder / "cache"))
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "weft"
        assert cli.main([*words, "data.max_documents=200"]) == 0, capsys.readouterr().err
        assert "rows to train on" in capsys.readouterr().out
    manifests = [json.loads(path.read_text()) for path in folder.glob("cache/data/*/manifest.json")]
    assert len(manifests) == 4  # the last command made the first one's rows again
    stdlib = next(m for m in manifests if m["data"]["source"] == "stdlib")
    assert stdlib["data"]["rebuild"]
    assert stdlib["counts"]["train_rows"] > 1000
