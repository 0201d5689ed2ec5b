"""`weft verify RUN`: a table of all checkpoints, and exit code 1 when one is damaged."""

from launch import cli
from tests.train.checkpoint.states import save


def test_it_reads_every_checkpoint_and_names_what_is_damaged(workers, tmp_path, capsys):
    workers(2).run(save, tmp_path / "checkpoints", 10, 20)
    assert cli.main(["verify", str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "files", "bytes", "verdict"]
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / "checkpoints" / step).glob("*.safetensors"))
        for step in ("step-00000010", "step-00000020")
    ]
    assert [row.split() for row in rows] == [
        ["10", "2", f"{sizes[0]:,}", "whole"],
        ["20", "2", f"{sizes[1]:,}", "whole"],
    ]
    shard = tmp_path / "checkpoints/step-00000010/rank-00001-000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (tmp_path / "checkpoints/step-00000020/manifest.json").unlink()
    (tmp_path / "checkpoints/step-00000030.tmp").mkdir()
    assert cli.main(["verify", str(tmp_path)]) == 1
    _, ten, twenty, *told = capsys.readouterr().out.splitlines()
    assert ten.split()[-1] == twenty.split()[-1] == "damaged" and len(told) == 2
    assert told[0].startswith(f"{shard}: its SHA-256") and "manifest.json: it is missing" in told[1]


def test_a_folder_without_checkpoints_is_refused(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "expected the folder of a run with checkpoints" in capsys.readouterr().err
