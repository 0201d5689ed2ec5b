"""Small runs: their recipe, their real command lines and processes, and what they leave in the run directory."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from launch import cli
from tests.train.layouts import SMALL
from train import __main__ as worker
from train.compose import compose
from train.trainer import Trainer

ROOT = Path(__file__).parents[1]
WEFT = [sys.executable, "-P", "-c", "import sys; from launch.cli import main; sys.exit(main())"]
TRAIN = [*WEFT, "train"]
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO_RANKS = ["parallel.pipeline=1", "parallel.data=2", "parallel.expert=1", "parallel.schedule=1f1b"]
ONE_RANK = [*TWO_RANKS, "parallel.data=1"]


def small_words(folder: Path, **model: int) -> list[str]:
    """Overrides that make `tiny` a run of seconds, on weft's own sources as they are; `model` beside `SMALL`."""
    sources = [json.dumps({"text": path.read_text()}) for path in sorted((ROOT / "train").rglob("*.py"))]
    (folder / "sources.jsonl").write_text("\n".join(sources) + "\n")
    sizes = {f"model.{key}": value for key, value in (SMALL | model).items()}
    data = {"data.path": folder / "sources.jsonl", "data.heldout": 0.1, "data.cache": folder / "cache"}
    train = {"train.sequence_length": 32, "train.threads": 1, "optim.lr.warmup_tokens": 512}
    return ["recipe=tiny", "data=hf", *(f"{key}={value}" for key, value in (sizes | data | train).items())]


# ---------------------------------------------------------------- processes
def start(command: list[str], words: list[str], **variables: str) -> subprocess.Popen:
    """A command on its way, seen from outside as a user's shell would start it."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ranks}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *words], env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen, code: int | None = 0, timeout: float = 110) -> tuple[str, str]:
    """What a command prints that must end with this exit code (None: any)."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {timeout:.0f} s: {process.communicate()}") from None
    assert code is None or process.returncode == code, (process.returncode, out[-2000:], err)
    return out, err


def ranks_of(agent: int) -> dict[int, psutil.Process]:
    """The processes of a launcher's ranks that run now, by rank."""
    found = {}
    for child in psutil.Process(agent).children():
        try:
            environment = child.environ()
            if child.status() != psutil.STATUS_ZOMBIE and "RANK" in environment:
                found[int(environment["RANK"])] = child
        except psutil.Error:  # gone, or not yet itself
            continue
    return found


def until(condition: Callable[[], object], what: str, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.02)


def until_step(step: int, run: Path, process: subprocess.Popen, seconds: float = 100) -> None:
    """Wait until a run has reported a step."""
    file = run / "metrics.jsonl"

    def reached() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}: {process.communicate()}")
        return file.exists() and file.read_text().count("\n") >= step

    until(reached, f"step {step}", seconds)


def gone(processes: dict[int, psutil.Process], seconds: float = 0) -> bool:
    """Whether none of these runs any more, at the latest after so many seconds."""
    _, alive = psutil.wait_procs(list(processes.values()), timeout=seconds)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


# ---------------------------------------------------------------- in this process
def train(*words: object) -> tuple[int, str]:
    """`python -m train` in this process: exit code and what it says on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return worker.main([str(word) for word in words]), said.getvalue()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def fit(words: list[str]) -> None:
    """A whole run on this rank of the pool."""
    Trainer(compose(words), torch.device("cpu")).fit()


def refused(capsys, *words: object) -> str:
    """What `weft` answers to words that it must not act upon."""
    assert cli.main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and not dist.is_initialized()
    return told


# ---------------------------------------------------------------- what is left
def records(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def course(run: Path) -> list[tuple]:
    """What must be equal to the bit, step by step."""
    return [tuple(each[key] for key in ("step", "tokens", "loss", "mtp_loss", "grad_norm")) for each in records(run)]


def tensors(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that holds tensors."""
    manifest = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items()}


def saved(run: Path) -> list[int]:
    """The steps of all committed checkpoints; fails if anything else lies beside them."""
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("."))
    return [int(name.removeprefix("step-")) for name in names if not name.endswith(".tmp")]
