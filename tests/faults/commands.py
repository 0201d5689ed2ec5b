"""Real runs from real command lines: a small recipe, its processes, and what they leave in the run directory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.train.layouts import SMALL

ROOT = Path(__file__).parents[2]
WEFT = [sys.executable, "-P", "-c", "import sys; from launch.cli import main; sys.exit(main())"]
TRAIN = [*WEFT, "train"]
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO_RANKS = ["parallel.pipeline=1", "parallel.data=2", "parallel.expert=1", "parallel.schedule=1f1b"]
ONE_RANK = [*TWO_RANKS, "parallel.data=1"]


def small_words(folder: Path) -> list[str]:
    """Overrides that make `tiny` a run of seconds, on weft's own sources as they are."""
    sources = [json.dumps({"text": path.read_text()}) for path in sorted((ROOT / "train").rglob("*.py"))]
    (folder / "sources.jsonl").write_text("\n".join(sources) + "\n")
    least = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
    }
    sizes = {f"model.{key}": value for key, value in (SMALL | least).items()}
    data = {"data.path": folder / "sources.jsonl", "data.heldout": 0.1, "data.cache": folder / "cache"}
    train = {"train.sequence_length": 32, "train.threads": 1, "optim.lr.warmup_tokens": 512}
    words = ["recipe=tiny", "data=hf", *(f"{key}={value}" for key, value in (sizes | data | train).items())]
    return [
        *words,
        "precision=bf16",
        "train.batch.start=4",
        "train.eval_rows=0",
        "log.bias_every=0",
        "log.load_every=0",
    ]


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


def until_step(step: int, run: Path, process: subprocess.Popen) -> None:
    """Wait until a run has reported a step."""
    file = run / "metrics.jsonl"

    def reached() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}: {process.communicate()}")
        return file.exists() and file.read_text().count("\n") >= step

    until(reached, f"step {step}")


def gone(processes: dict[int, psutil.Process], seconds: float = 0) -> bool:
    """Whether none of these runs any more, at the latest after so many seconds."""
    _, alive = psutil.wait_procs(list(processes.values()), timeout=seconds)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
