"""The pools of worker processes do what distributed tests rely on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.workers import Pool, WorkerError


def add_ranks(offset):
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return os.getpid(), total.item(), torch.get_num_threads()


def make_group_of_first():
    group = dist.new_group([0])
    return dist.get_rank(group)


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise KeyError("no such thing")
    dist.barrier()


def leave_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def wait_forever():
    if dist.get_rank() == 1:
        time.sleep(1000)


@pytest.fixture
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_call_runs_on_every_rank_of_one_world(workers, size):
    first = workers(size).run("tests.test_workers:add_ranks", 10)
    again = workers(size).run(add_ranks, offset=10)
    assert first == again, "the same processes serve every call"
    assert [total for _, total, _ in first] == [sum(range(size)) + 10 * size] * size
    assert {threads for *_, threads in first} == {1}


def test_groups_of_one_call_are_unknown_to_the_next(workers):
    assert workers(2).run(make_group_of_first) == workers(2).run(make_group_of_first) == [0, -1]


def test_an_exception_comes_back_with_its_traceback_and_the_pool_recovers(pool):
    with pytest.raises(WorkerError, match=r"(?s)rank 1: .*fail_on_rank_1.*KeyError: 'no such thing'"):
        pool.run(fail_on_rank_1)
    assert [total for _, total, _ in pool.run(add_ranks, 0)] == [1, 1]


def test_a_worker_that_dies_is_named(pool):
    with pytest.raises(WorkerError, match="rank 1: died with exit code 3"):
        pool.run(leave_on_rank_1)


def test_a_hang_shows_where_it_hangs(pool):
    pool.run(add_ranks, 0)
    with pytest.raises(WorkerError, match=r"(?s)rank 1: no answer.*wait_forever") as caught:
        pool.run(wait_forever, timeout=1)
    assert "rank 0" not in str(caught.value)
