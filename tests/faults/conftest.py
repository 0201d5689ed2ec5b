"""Faults: every test here is one of them, and a run of `make test-faults` leaves the table of what it saw.

`@pytest.mark.fault(N)` says which row a test shows; a row is kept if all of its tests pass. With `--faults-table FILE`
the rows, their tests' number and their outcome are written into the page that users read.
"""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.faults.commands import small_words

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
    """Overrides that make `tiny` a run of seconds."""
    return small_words(tmp_path_factory.mktemp("small"))


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
