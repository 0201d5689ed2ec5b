"""A simulated step as a trace: what reads a real run's traces reads it, and its shares are those of the result."""

import json
from statistics import fmean

import pytest

from launch import cli
from launch.simulate import result
from launch.simulate.cluster import sheet
from launch.simulate.output import trace
from parallel import timeline
from parallel.errors import UserError
from train.compose import compose


@pytest.fixture(scope="module")
def found():
    return result.simulate(compose(["recipe=tiny", "parallel.pipeline=2"]), sheet.read("h800x2048"))


@pytest.fixture(scope="module")
def run(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    trace.write(found, folder)
    return folder


def test_the_reader_of_real_traces_reads_every_instruction_and_wait(found, run):
    measured = timeline.read(run)
    assert measured.program == found.program
    for bars, row in zip(measured.rows, found.timeline.ranks, strict=True):
        for bar, slot in zip(bars, row, strict=True):
            assert (bar.begin, bar.end) == pytest.approx((slot.begin, slot.end), abs=1e-8)
            waited = sum(end - begin for on, begin, end in bar.waits if on == "experts")
            assert waited == pytest.approx(slot.race.exposed, abs=1e-7)


def test_its_shares_are_the_results(found, run):
    shares = timeline.read(run).shares
    length = fmean(found.timeline.seconds - row[0].begin for row in found.timeline.ranks)
    assert shares["exposed_comm"] == pytest.approx(found.exposed_comm / length, rel=0.05)
    whole = [sum(slot.end - slot.begin for slot in row) for row in found.timeline.ranks]
    lengths = [found.timeline.seconds - row[0].begin for row in found.timeline.ranks]
    idle = [1 - busy / length for busy, length in zip(whole, lengths, strict=True)]
    assert shares["bubble"] == pytest.approx(fmean(idle), abs=1e-6)


def test_one_file_has_all_ranks_as_processes_with_the_lanes_of_a_real_trace(found, run):
    events = json.loads((run / "traces" / "all.json").read_text())["traceEvents"]
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(named) == found.program.ranks and "stages 0 and 1" in named[0]
    lanes = {event["args"]["name"].split()[0] for event in events if event["name"] == "thread_name"}
    assert lanes == {"compute", "experts", "pipeline"}
    inside = [event["args"] for event in events if event.get("cat") == "experts"]
    assert inside and all(args["bytes"] > 0 and "across" in args for args in inside)


def test_compare_draws_it(run, capsys):
    assert cli.main(["schedule", "--compare", str(run)]) == 0
    assert "measured" in capsys.readouterr().out


def test_a_folder_that_cannot_be_is_refused(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--trace .*file: expected a folder to write into"):
        trace.write(found, tmp_path / "file")
