"""Rows 26, 27 and 34: ranks that hang, fail or die, and neighbours. What the launcher says, and starts again."""

import os
import random
import signal
import socket
import time

import psutil
import pytest
import torch.distributed as dist

from launch import cli, rendezvous
from tests.commands import (
    ONE_RANK,
    TRAIN,
    TWO_RANKS,
    course,
    finish,
    fit,
    gone,
    ranks_of,
    refused,
    start,
    tensors,
    until,
    until_step,
)
from tests.launch.test_local import Launcher
from train.checkpoint.directory import committed
from train.safety.lock import claim


@pytest.mark.slow
@pytest.mark.fault(26)
def test_a_stopped_rank_is_named_near_the_timeout(endless, tmp_path):
    timeout = 20
    process = start(TRAIN, [*endless, f"parallel.timeout_seconds={timeout}", "run.name=stopped"])
    until_step(2, tmp_path / "stopped", process)
    ranks = ranks_of(process.pid)
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, err = finish(process, 1)
    assert time.monotonic() - began < timeout + 20
    assert f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) has not been heard of for" in err
    assert err.count("Traceback") <= 1 and gone(ranks)


@pytest.mark.fault(27)
def test_a_rank_that_raises_before_the_first_collective_ends_the_job_with_its_traceback(tmp_path):
    body = """
if rank == 1:
    raise RuntimeError("the cause")
import torch.distributed as dist
dist.init_process_group("gloo")
"""
    began = time.monotonic()
    _, err = finish(Launcher(tmp_path).weft(body, "train", *TWO_RANKS), 1)
    assert time.monotonic() - began < 30 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert err.startswith("weft: rank 1 failed") and err.count("Traceback") == 1 and "RuntimeError: the cause" in err


@pytest.mark.fault(34)
def test_a_port_in_use_is_told_before_any_rank_starts(small, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(capsys, "train", *small, *ONE_RANK, f"run.rendezvous=127.0.0.1:{port}", f"run.dir={tmp_path}")
    assert told.startswith(f"weft: run.rendezvous=127.0.0.1:{port}: expected") and "Address already in use" in told


@pytest.mark.fault(34)
def test_the_rendezvous_listens_at_its_address_only():
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    handler = rendezvous.OneMachine(RendezvousParameters(rendezvous.NAME, "127.0.0.1:0", "run", 1, 1))
    place = handler.next_rendezvous().bootstrap_store_info
    listening = [each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    assert [each.ip for each in listening if each.port == place.master_port] == [place.master_addr] == ["127.0.0.1"]
    rank = dist.TCPStore(place.master_addr, place.master_port, is_master=False, wait_for_workers=False)
    rank.set("key", "value")

    handler.endpoint = f"127.0.0.1:{place.master_port}"
    again = handler.next_rendezvous().bootstrap_store_info
    assert again.master_port == place.master_port
    rank = dist.TCPStore(again.master_addr, again.master_port, is_master=False, wait_for_workers=False)
    assert not rank.check(["key"]), "a restart finds nothing of the start before"


@pytest.mark.fault(34)
@pytest.mark.parametrize("who", [".lock", ".launcher.lock"])
def test_a_second_job_in_a_run_directory_is_refused(small, tmp_path, capsys, who):
    words = [*small, *ONE_RANK, f"run.dir={tmp_path}", "run.name=taken"]
    with claim(tmp_path / "taken", who):
        told = refused(capsys, "train", *words)
        assert told.startswith("weft: run.name=taken: another job is at work in")
        assert not (tmp_path / "taken/config.yaml").exists(), "what the other job reads stays as it is"


@pytest.mark.slow
def test_a_killed_rank_is_started_again_with_the_others_and_nothing_is_lost(workers, small, tmp_path):
    words = [*small, *TWO_RANKS, "train.steps=8", "checkpoint.every=2", f"run.dir={tmp_path}"]
    process = start(TRAIN, [*words, "run.name=killed", "run.max_restarts=1"])
    until_step(5, tmp_path / "killed", process)
    ranks_of(process.pid)[1].kill()
    _, err = finish(process)
    assert err.count("weft: restart 1 of 1, from the newest checkpoint") == 1 and err.count("Traceback") <= 1
    workers(2).run(fit, [*words, "run.name=whole"], timeout=300)
    assert course(tmp_path / "killed") == course(tmp_path / "whole")
    assert tensors(tmp_path / "killed", 8) == tensors(tmp_path / "whole", 8)


@pytest.mark.slow
def test_restarts_are_bounded_and_a_mistake_is_not_tried_again(tmp_path):
    count = "Path(f'start-{os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}-{rank}').touch()\n"
    words = ["train", *TWO_RANKS, "run.max_restarts=2"]
    _, err = finish(Launcher(tmp_path).weft(f"{count}raise RuntimeError('always')", *words), 1)
    assert {path.name.split("-")[1] for path in tmp_path.glob("start-*")} == {"0", "1", "2"}
    assert err.count("weft: restart") == 2 and err.count("Traceback") == 3
    mistake = "from parallel.errors import UserError\nraise UserError('checkpoint.resume=7: expected one of 5')"
    _, err = finish(Launcher(tmp_path).weft(mistake, *words), 2)
    assert err == "weft: checkpoint.resume=7: expected one of 5\n"


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(17)
def test_fifty_kills_at_random_times_change_nothing(workers, small, tmp_path, capsys):
    """One long run; random ranks are killed at random times, in starts and saves too (WEFT_SOAK_KILLS: how often)."""
    kills, chance = int(os.environ.get("WEFT_SOAK_KILLS", "50")), random.Random(0)
    steps = 40 * kills
    words = [*small, *TWO_RANKS, f"train.steps={steps}", "checkpoint.every=5", "log.every=1000", f"run.dir={tmp_path}"]
    run = tmp_path / "soak"
    process = start(TRAIN, [*words, "run.name=soak", f"run.max_restarts={2 * kills}"])
    for _ in range(kills):
        until(lambda: len(ranks_of(process.pid)) == 2, "both ranks", 200)
        time.sleep(chance.uniform(0, 8))
        victim = chance.choice(sorted(ranks_of(process.pid).items()))[1]
        victim.kill()
        victim.wait(60)
        if committed(run / "checkpoints"):
            assert cli.main(["verify", str(run)]) == 0, capsys.readouterr().out
    finish(process, timeout=1200)
    workers(2).run(fit, [*words, "run.name=whole"], timeout=1200)
    assert course(run) == course(tmp_path / "whole")
    assert tensors(run, steps) == tensors(tmp_path / "whole", steps)
