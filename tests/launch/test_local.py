"""`weft train` and `torchrun -m train` with real processes; only what a rank does once it runs is a stand-in.

A `sitecustomize` on the workers' path puts a few lines in the place of `train.trainer`, so that a rank can be made to
fail, hang or tell what it sees within the second that it takes to start.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import environment
from train.compose import compose

ROOT = Path(__file__).parents[2]
LAUNCH = (
    "import sys; from launch import cli, local; local.prepare = lambda *a, **k: None; sys.exit(cli.main(sys.argv[1:]))"
)
TWO_RANKS = ["parallel.pipeline=1", "parallel.data=2", "parallel.expert=1", "parallel.schedule=1f1b"]
STAND_IN = """
import sys, types
trainer = types.ModuleType("train.trainer")
exec('''
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ.get("RANK", "0"))
def main(recipe):
{body}
''', trainer.__dict__)
sys.modules["train.trainer"] = trainer
"""


class Launcher:
    """Starts commands in an empty folder, with `body` as what each rank does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, body: str, command: list[str], **variables: str) -> subprocess.Popen:
        stand_in = self.folder / "stand_in"
        stand_in.mkdir(exist_ok=True)
        indented = "\n".join(f"    {line}" for line in body.splitlines())
        (stand_in / "sitecustomize.py").write_text(STAND_IN.replace("{body}", indented))
        kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**kept, "PYTHONPATH": f"{stand_in}:{ROOT}", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def weft(self, body: str, *words: str, **variables: str) -> subprocess.Popen:
        return self.start(body, [sys.executable, "-P", "-c", LAUNCH, *words], **variables)

    def torchrun(self, body: str, processes: int, *words: str) -> subprocess.Popen:
        run = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return self.start(body, [*run, "-m", "train", *words])


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that is to end by itself."""
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


TELL = """
told = {"rank": rank, "steps": recipe.train.steps, "name": recipe.run.name, "schedule": recipe.parallel.schedule}
told |= {name: os.environ.get(name) for name in ("WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
Path(f"told-{rank}.json").write_text(json.dumps(told))
"""


def test_every_rank_gets_the_resolved_recipe_and_only_the_run_directory_appears(launcher):
    (launcher.folder / "train.py").write_text("raise SystemExit('a file of the user is not weft')")
    mine = "defaults:\n  - tiny\n  - _self_\ntrain:\n  steps: 77\n"
    (launcher.folder / "mine.yaml").write_text(mine)
    code, out, err = end(launcher.weft(TELL, "train", "recipe=mine.yaml", "train.seed=3"))
    assert (code, err) == (0, "")
    told = [json.loads((launcher.folder / f"told-{rank}.json").read_text()) for rank in range(4)]
    threads = str(max(1, (os.cpu_count() or 1) // 4))
    for rank in range(4):
        assert told[rank] == {
            "rank": rank,
            "steps": 77,
            "name": "mine",
            "schedule": "dualpipe",
            "WORLD_SIZE": "4",
            "OMP_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": "lo",
        }
    assert out.startswith("runs/mine: 4 processes = pipeline 2 x data 2 x context 1")
    config = (launcher.folder / "runs/mine/config.yaml").read_text()
    assert "seed: 3" in config and "${" not in config
    stood_there = {"train.py", "mine.yaml", "stand_in", *(f"told-{rank}.json" for rank in range(4))}
    assert {path.name for path in launcher.folder.iterdir()} == stood_there | {"runs"}


def test_variables_that_the_user_has_set_stay():
    given = {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0"}
    chosen = environment(compose(["recipe=tiny", "train.threads=2"]), given)
    assert {name: chosen[name] for name in given} == given
    assert environment(compose(["recipe=tiny", "train.threads=2"]), {})["OMP_NUM_THREADS"] == "2"


def test_the_first_failure_is_shown_once_and_its_consequences_are_not(launcher):
    body = """
if rank == 1:
    Path("failing").touch()
    raise RuntimeError("the cause")
while not Path("failing").exists():
    time.sleep(0.01)
time.sleep(0.1)
raise ConnectionError("a consequence")
"""
    code, _, err = end(launcher.weft(body, "train", *TWO_RANKS))
    assert code == 1
    assert err.startswith("weft: rank 1 failed")
    assert err.count("Traceback") == 1 and "RuntimeError: the cause" in err and "a consequence" not in err


def test_a_mistake_that_only_a_rank_can_see_is_one_message(launcher):
    body = "from parallel.errors import UserError\nraise UserError('checkpoint.resume=7: expected one of 5, 10')"
    code, _, err = end(launcher.weft(body, "train", *TWO_RANKS))
    assert (code, err) == (2, "weft: checkpoint.resume=7: expected one of 5, 10\n")


def test_a_killed_rank_ends_the_run_and_is_named(launcher):
    body = "if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    code, _, err = end(launcher.weft(body, "train", *TWO_RANKS))
    assert code == 1
    assert "rank 1" in err and "SIGKILL" in err and "Traceback" not in err


def test_ctrl_c_stops_every_rank_with_one_line(launcher):
    body = "Path(f'pid-{rank}').write_text(str(os.getpid()))\ntime.sleep(60)"
    process = launcher.weft(body, "train", *TWO_RANKS)
    pids = [launcher.folder / f"pid-{rank}" for rank in range(2)]
    until = time.monotonic() + 60
    while not all(pid.exists() and pid.read_text() for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert err == "weft: stopped by SIGINT; runs/tiny keeps what it had committed\n"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
def test_a_sweep_gives_each_job_its_own_run_and_goes_on_after_a_refused_one(launcher):
    words = ["train", "--multirun", *TWO_RANKS, "train.batch.start=9,8"]
    code, out, err = end(launcher.weft("pass", *words))
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("weft: train.batch.start=9: expected a multiple of")
    assert [line.split(":")[0] for line in out.splitlines()] == ["runs/tiny-1"]


def test_torchrun_composes_in_each_rank(launcher):
    assert end(launcher.torchrun(TELL, 2, "recipe=tiny", "train.steps=9", *TWO_RANKS))[0] == 0
    for rank in range(2):
        told = json.loads((launcher.folder / f"told-{rank}.json").read_text())
        assert (told["rank"], told["steps"], told["schedule"]) == (rank, 9, "1f1b")
    assert "steps: 9" in (launcher.folder / "runs/tiny/config.yaml").read_text()
    assert not (launcher.folder / "outputs").exists()


def test_torchrun_with_another_number_of_processes_is_refused_once(launcher):
    code, _, err = end(launcher.torchrun(TELL, 2, "recipe=tiny"))
    assert code != 0
    assert err.count("weft: processes started: 2; expected parallel.pipeline=2") == 1
    assert not list(launcher.folder.glob("told-*"))
