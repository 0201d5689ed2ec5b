"""Traced steps of real processes: their files against the format, the program and the shares that were measured."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from parallel import timeline
from parallel.recorder import Recorder
from parallel.schedule import build
from parallel.schedule.program import spell
from parallel.trace import OFF
from tests.train.layouts import LAYOUTS, batch_of, small_recipe
from train.engine import Engine

RANKS, STEPS = 4, [2, 3]
ANSWERS = {  # what each phase of the trace event format that is used here must have, besides name, pid and tid
    "M": {"args": dict},
    "X": {"cat": str, "ts": float, "dur": float, "args": dict},
    "C": {"ts": float, "args": dict},
}


@dataclass
class Run:
    """shares: by step, as rank 0 measured them. seen: losses and norms of each rank's steps."""

    folder: Path
    shares: dict[int, dict[str, float]]
    seen: tuple[list[dict[str, float]], ...]


def traced(folder: str | None) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Three steps of the small recipe and an evaluation between them: (shares, losses and gradient norm) of each."""
    layout = LAYOUTS["dualpipe 2, data 2, expert 2"] | {"node_size": 1, "dispatch": "all_to_all"}
    recipe, device = small_recipe(layout, "fp32"), torch.device("cpu")
    trace = Recorder(device, pipelines=2, directory=Path(folder), skip=1, keep=2) if folder else OFF
    engine = Engine(recipe, device, trace)
    measured, seen = [], []
    for number in range(1, STEPS[-1] + 1):
        rows, size = batch_of(number, recipe), recipe.train.batch.start
        tokens = {mb: rows[list(ids)] for mb, ids in engine.sequences(size).items()}
        trace.begin(number, engine.program(size))
        totals = engine.forward_backward(tokens, size, 0.3)
        _, norm = engine.update(1e-3, 1e-3, totals)
        measured.append(trace.end())
        engine.evaluate(tokens, size)
        seen.append(totals.losses | {"norm": norm})
    return measured, seen


@pytest.fixture(scope="module")
def run(workers, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    measured, seen = zip(*workers(RANKS).run(traced, str(folder / "traces")), strict=True)
    assert all(each == measured[0] for each in measured), "the same on every rank"
    return Run(folder, dict(enumerate(measured[0], 1)), seen)


@pytest.fixture(scope="module")
def files(run) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    paths = sorted((run.folder / "traces").iterdir())
    assert [path.name for path in paths] == [f"rank-0000{rank}.json" for rank in range(RANKS)]
    return [json.loads(path.read_text(), parse_constant=refuse) for path in paths]


def of(trace: dict, *cats: str, step: int | None = None) -> list[dict]:
    """Events of some categories, in one recorded step or all, by time."""
    about = [each for each in trace["otherData"]["steps"] if step in (None, each["step"])]
    spans = [(each["begin"], each["end"]) for each in about]
    found = [event for event in trace["traceEvents"] if event.get("cat") in cats]
    return [event for event in found if any(begin <= event["ts"] <= end for begin, end in spans)]


def within(event: dict, other: dict) -> bool:
    """Whether one span lies in another, up to the rounding of doubles."""
    return other["ts"] <= event["ts"] + 1e-4 and event["ts"] + event["dur"] <= other["ts"] + other["dur"] + 1e-4


# ---------------------------------------------------------------- the format
def test_every_event_is_one_that_the_format_knows(files):
    for rank, trace in enumerate(files):
        assert trace["displayTimeUnit"] == "ms" and set(trace) == {"displayTimeUnit", "otherData", "traceEvents"}
        for event in trace["traceEvents"]:
            fields = ANSWERS[event["ph"]]
            assert set(event) == {"name", "ph", "pid", "tid", *fields}
            assert isinstance(event["name"], str) and event["name"]
            assert event["pid"] == rank and isinstance(event["tid"], int)
            assert all(isinstance(event[key], kind) for key, kind in fields.items())
            assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0
        counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
        assert counters and all(event["args"]["MB"] > 10 for event in counters)


def test_ranks_stages_steps_and_threads_have_names(files):
    for rank, trace in enumerate(files):
        names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
        (process,) = (event["args"]["name"] for event in names if event["name"] == "process_name")
        stages = "0 and 1" if rank < 2 else "1 and 0"
        assert process == f"rank {rank}: pipeline {rank % 2}, position {rank // 2}, stages {stages}"
        threads = {event["tid"]: event["args"]["name"] for event in names if event["name"] == "thread_name"}
        assert {event["tid"] for event in trace["traceEvents"]} == set(threads)
        assert {name.split()[0] for name in threads.values()} == {"compute", "experts", "pipeline", "gradients"}
        assert [event["name"] for event in of(trace, "step")] == [f"step {step}" for step in STEPS]


def test_spans_of_a_thread_nest(files):
    for trace in files:
        threads: dict[int, list[dict]] = {}
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                threads.setdefault(event["tid"], []).append(event)
        for events in threads.values():
            open_spans: list[dict] = []
            for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
                while open_spans and open_spans[-1]["ts"] + open_spans[-1]["dur"] <= event["ts"] + 1e-4:
                    open_spans.pop()
                assert all(within(event, each) for each in open_spans)
                open_spans.append(event)


# ---------------------------------------------------------------- what it says
def test_instructions_are_the_program_in_its_order(files):
    program = build("dualpipe", 2, 4)
    for rank, trace in enumerate(files):
        for step in STEPS:
            instructions = of(trace, "instruction", step=step)
            assert [event["name"] for event in instructions] == [spell(ins) for ins in program.program[rank // 2]]
            assert all(one["ts"] + one["dur"] <= other["ts"] + 1e-4 for one, other in pairwise(instructions))


def test_waits_for_experts_lie_in_instructions_and_each_exchange_is_waited_for_once(files):
    for trace in files:
        instructions, waits = of(trace, "instruction"), of(trace, "wait")
        experts = [event for event in waits if event["args"]["on"] == "experts"]
        assert all(any(within(event, each) for each in instructions) for event in experts)
        rows = [event["name"] for event in experts if event["name"] != "wait for counts"]
        assert len(experts) > len(rows)
        posted = of(trace, "experts")
        assert sorted(rows) == sorted(f"wait for {event['name']}" for event in posted)
        assert all(event["args"]["bytes"] > 0 and event["dur"] > 0 for event in posted)
        assert all(event["args"]["across"] == event["args"]["bytes"] for event in posted), "each rank is a node"
        received = [event for event in waits if event["name"] == "wait for receive"]
        assert all(any(within(event, each) for each in instructions) for event in received)


def test_both_ends_of_a_message_are_there_with_its_bytes_on_one_clock(files):
    for one, other in ((files[0], files[2]), (files[2], files[0])):
        sent = [event for event in of(one, "pipeline", step=2) if event["name"].startswith("send")]
        received = {event["name"]: event for event in of(other, "pipeline", step=2) if "receive" in event["name"]}
        assert len(sent) == len(received)
        for event in sent:
            arrival = received[event["name"].replace("send", "receive")]
            assert event["args"]["bytes"] == arrival["args"]["bytes"] == 32 * 64 * 4  # tokens x width in FP32
            assert event["ts"] < arrival["ts"] + arrival["dur"] + 1e6, "posted before it arrived, but for a lost second"


def test_measured_shares_follow_from_the_files(run, files):
    for shares in run.shares.values():
        assert all(0 <= shares[key] <= 1 for key in ("bubble", "exposed_comm", "exposed_comm_pairs"))
    for step in STEPS:
        parts = []
        for trace in files:
            work = of(trace, "instruction", step=step)
            left = [event for event in of(trace, "compute", step=step) if not any(within(event, each) for each in work)]
            begin, end = work[0]["ts"], max(event["ts"] + event["dur"] for event in work + left)
            waits = {"experts": 0.0, "pipeline": 0.0, "gradients": 0.0}
            for event in of(trace, "wait", step=step):
                waits[event["args"]["on"]] += event["dur"] if event["ts"] + event["dur"] <= end else 0
            parts.append((begin, end, waits))
        bubble = exposed = 0.0
        for rank, (begin, end, waits) in enumerate(parts):
            last = max(parts[rank % 2][1], parts[rank % 2 + 2][1])
            bubble += (waits["pipeline"] + last - end) / (last - begin) / RANKS
            exposed += waits["experts"] / (last - begin) / RANKS
        assert run.shares[step]["bubble"] == pytest.approx(bubble, abs=1e-6)
        assert run.shares[step]["exposed_comm"] == pytest.approx(exposed, abs=1e-6)


def test_compare_reads_the_last_recorded_step(run):
    measured = timeline.read(run.folder)
    assert (measured.step, measured.program) == (STEPS[-1], build("dualpipe", 2, 4))
    assert measured.shares == run.shares[STEPS[-1]]
    assert all(bar.end > bar.begin for row in measured.rows for bar in row)


def test_a_traced_step_computes_the_same(run, workers):
    assert [seen for _, seen in workers(RANKS).run(traced, None)] == list(run.seen)
