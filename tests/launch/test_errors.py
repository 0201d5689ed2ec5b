"""Every row of docs/reference/errors.md: the command is run, and prints exactly what the table says."""

import re
import shlex
from pathlib import Path

import pytest

from launch import cli
from train import __main__ as worker

TEXT = (Path(__file__).parents[2] / "docs/reference/errors.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| `(.+)` \|$", TEXT, re.MULTILINE)
FILES = re.findall(r"^`(\S+\.yaml)`:\n\n```yaml\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a user stands who has written the files of the page, and started no ranks."""
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path.parent / "cache"))  # where nobody has calibrated
    return tmp_path


def test_the_page_has_rows_and_files():
    assert len(ROWS) > 50 and len(FILES) == 7


@pytest.mark.parametrize(("command", "message"), ROWS, ids=[command for command, _ in ROWS])
def test_command_prints_its_row_once_and_ends_with_exit_code_2(command, message, folder, capsys):
    program, *words = shlex.split(command)
    code = cli.main(words) if program == "weft" else worker.main(words[2:])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    expected = re.escape(f"weft: {message}\n").replace("…", ".+")
    assert re.fullmatch(expected, printed.err), printed.err
    left = {path.name for path in folder.iterdir()}
    assert left <= {Path(name).parts[0] for name, _ in FILES}, "a refused command left files behind"
