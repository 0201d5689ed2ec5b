"""What every test finds: one thread per process, loopback gloo, and the pools of worker processes."""

import os

# Before torch is imported, here and in the workers that inherit it: bitwise comparisons need one thread everywhere.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")

import hypothesis
import pytest
import torch

from tests.workers import Workers

torch.set_num_threads(1)
hypothesis.settings.register_profile("weft", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("weft")


@pytest.fixture(scope="session")
def workers():
    """`workers(n).run("tests.some.module:function", *args)` -> the results of n ranks."""
    pools = Workers()
    yield pools
    pools.close()
