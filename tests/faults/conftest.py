"""Faults: every test here is one of them, and a run of `make test-faults` leaves the table of what it saw.

`@pytest.mark.fault(N)` says which row a test shows; a row is kept if all of its tests pass. With `--faults-table FILE`
the rows, their tests' number and their outcome are written into the page that users read.
"""

import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.commands import ONE_RANK, TWO_RANKS, small_words, train

HERE = Path(__file__).parent
PROMISES = {
    1: ("SIGKILL of a rank at each phase of a save", "what it had begun is ignored; the previous step resumes"),
    2: ("SIGKILL while saving a step that exists", "a committed directory is never written into"),
    3: ("kill of rank 0 around the rename that commits", "old or new, never a mix"),
    4: ("one flipped byte in each file in turn", "named; `auto` takes the last good one, an explicit step refuses"),
    5: ("a truncated shard", "as 4"),
    6: ("a deleted shard or manifest", "as 4"),
    7: ("every checkpoint bad, `resume=auto`", "an error; never a silent start at step 0"),
    8: ("a step that does not exist", "the error lists those that do"),
    9: ("disk full in the middle of a save", "all ranks agree, training goes on, loudly; no partial one stays"),
    10: ("run directory read-only or absent", "refused before training starts"),
    11: ("a crafted pickle among a checkpoint's files", "not executed"),
    12: ("`_target_: os.system` or any other in a recipe", "refused on every path"),
    13: ("a key with a typo, an unknown `+key`, a wrong type", "exit code 2, one message, a suggestion"),
    14: ("a layout that does not divide", "refused before any process group, with the arithmetic"),
    15: ("resume with another model shape", "names the fields that differ"),
    16: ("resume with another learning rate or batch", "needs explicit consent, and is logged"),
    17: ("stop at a step, resume", "bitwise the run that was not stopped"),
    18: ("save with 4 ranks, load with 1 or 2", "the same samples; loss within tolerance"),
    19: ("another pipeline, expert width or schedule at load", "the state is equal by name"),
    20: ("sizes that the ranks do not divide", "17 holds"),
    21: ("NaN gradient on one rank", "all ranks skip the step, nothing moves; K in a row: a dump, and the end"),
    22: ("a loss spike that persists", "rollback, R times at most; the window of data is skipped and recorded"),
    23: ("bit flip in one replica's parameter", "found in the step that used it, rank and parameter named, mended"),
    24: ("SIGTERM or SIGUSR1 to the agent or to one rank", "one checkpoint at one step, `PREEMPTED`, no orphans"),
    25: ("SIGTERM during a save; a second SIGTERM", "the save in flight commits or is discarded"),
    26: ("a rank stopped (SIGSTOP) beyond the timeout", "the run fails near the timeout and names the rank"),
    27: ("a rank raises before the first collective", "the job ends within 30 s; the first traceback is the one shown"),
    28: ("missing or truncated data shard", "the check at the start names the file"),
    29: ("token beyond the vocabulary, empty document, early end", "an error, or a counted skip"),
    30: ("data changed between save and resume", "fingerprint error, with an override"),
    31: ("clock one hour back; two launches in one second", "order by step; unique run id"),
    32: ("all tokens to one expert; an expert with none", "no crash; a metric tells"),
    33: ("W&B unreachable or without key", "training unaffected; the key is in no log, recipe or checkpoint"),
    34: ("port in use; two jobs in one run directory", "a clear error; a lock"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", metavar="FILE", help="write the table of faults there")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--faults-table"):
        config.pluginmanager.register(Table(Path(config.getoption("--faults-table"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides that make `tiny` a run of seconds, of as many ranks as `tiny` has."""
    least = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "n_routed_experts": 8}
    words = small_words(tmp_path_factory.mktemp("small"), vocab_size=512, **least)
    quiet = ["train.eval_rows=0", "log.bias_every=0", "log.load_every=0"]
    return [*words, "precision=bf16", "train.batch.start=4", *quiet]


@pytest.fixture
def endless(small, tmp_path) -> list[str]:
    """A run that would go on for long, without a checkpoint before."""
    return [*small, *TWO_RANKS, "train.steps=20000", "checkpoint.every=10000", f"run.dir={tmp_path}"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> list[str]:
    """Overrides that make `tiny` a run of one process that takes seconds, and saves each step."""
    words = small_words(tmp_path_factory.mktemp("corpus"), vocab_size=509, num_hidden_layers=3)
    saves = ["checkpoint.every=1", "checkpoint.keep_last=5"]
    return [*words, *ONE_RANK, "data.vocab_size=500", "precision=fp32", "train.eval_rows=0", *saves]


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory) -> tuple[list[str], Path]:
    """Overrides and folder of a run of two steps, both saved."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*corpus, f"run.dir={folder}", "run.name=first"]
    assert train(*words, "train.steps=2")[0] == 0
    return words, folder / "first"


@pytest.fixture
def run(trained, tmp_path) -> tuple[list[str], Path]:
    """A copy of it that a test may spoil; three steps are wanted now."""
    words, folder = trained
    shutil.copytree(folder, tmp_path / "first")
    return [*words, f"run.dir={tmp_path}", "train.steps=3"], tmp_path / "first"


class Table:
    """Collects the outcomes of the tests of each row."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.rows: dict[int, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item):
        report = yield
        if report.when == "call" or report.failed or report.skipped:
            for mark in item.iter_markers("fault"):
                self.rows[mark.args[0]][report.outcome] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        lines = [
            "# Faults, and what comes of them",
            "",
            "Made by `make test-faults`, which really injects each fault on CPU processes: kills, stops and signals",
            "processes, flips and truncates bytes, fills a disk. What users do about them:",
            "[how-to/faults.md](../how-to/faults.md).",
            "",
            "| # | fault | promise | tries | outcome |",
            "|---|---|---|---|---|",
        ]
        for number, (fault, promise) in PROMISES.items():
            seen = self.rows[number]
            outcome = "held" if seen["passed"] == seen.total() > 0 else "**broken**" if seen["failed"] else "not tried"
            lines.append(f"| {number} | {fault} | {promise} | {seen.total()} | {outcome} |")
        self.page.write_text("\n".join(lines) + "\n")
