"""`weft doctor --fp8`: the table, and the exit code when a backend is wrong."""

from types import SimpleNamespace

import pytest

from kernels.fp8 import backends
from kernels.fp8.backends import OPERATIONS, auto, reference
from launch import cli


def test_on_a_cpu_the_reference_is_held_against_fp64_and_the_others_say_why_not(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["doctor", "--fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FP8 on CPU, torch ")
    for name in ("transformer_engine", "triton", "cublas"):
        [line] = [line for line in lines if line.startswith(name)]
        assert "no: needs a GPU of compute capability 9.0" in line and ("has no " in line) == (name != "triton")
    table = [line.split() for line in lines if line.endswith("  ok")]
    assert [row[:2] for row in table] == [[operation, "reference"] for operation in OPERATIONS]
    assert lines[-1] == "every operation is right"


@pytest.fixture
def wrong_cublas(monkeypatch):
    """A machine where `cublas` works, gives a bit more than it should, and cannot do Wgrad at all."""

    def dgrad(*operands):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long story")

    module = SimpleNamespace(
        prepare_weight=lambda codes: codes,
        linear=lambda *operands: [1.01 * y for y in reference.linear(*operands)],
        linear_dgrad=dgrad,
        linear_wgrad=reference.linear_wgrad,
    )
    modules = {"cublas": module, "reference": reference}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(backends, "load", modules.__getitem__)
    monkeypatch.setattr(backends, "available", lambda device: list(modules))
    auto.trusted.cache_clear()
    yield
    auto.trusted.cache_clear()


def test_a_backend_that_is_wrong_or_fails_makes_the_exit_code_1(wrong_cublas, capsys):
    assert cli.main(["doctor", "--fp8"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.split()[1:2] == ["cublas"]}
    assert rows["linear"].endswith("DIFFERS")
    assert rows["linear_dgrad"].endswith("FAILED CUBLAS_STATUS_NOT_SUPPORTED")
    assert rows["linear_wgrad"].endswith("ok")
    assert lines[-1] == "2 operations are wrong"
