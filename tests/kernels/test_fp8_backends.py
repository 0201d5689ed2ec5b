"""Backends: what they say when they cannot, the layouts that they make, and how `auto` chooses.

Their libraries are stood in for by `cublas_model`, which refuses any layout that is not documented; kernels that need a
GPU to run at all are tested in tests/gpu.
"""

import json
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from kernels.fp8 import (
    BLOCKS,
    COLUMNS,
    ROWS,
    BackendError,
    backends,
    formats,
    fp8_grouped_linear,
    fp8_linear,
    fp8_quantize,
)
from kernels.fp8.backends import BACKENDS, GEMMS, GROUPED, OPERATIONS, auto, layouts, reference
from kernels.fp8.compare import Case, Sizes, calc_diff, judge
from tests.kernels import cublas_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = [
    Sizes(),
    Sizes(M=1, N=16, K=144, counts=[0, 1, 0]),
    Sizes(M=130, N=400, K=128, counts=[131, 5]),
    Sizes(M=16, N=128, K=1168, counts=[0, 0]),
]


@pytest.fixture
def transformer_engine(monkeypatch):
    """The backend, on the model of its library."""
    cublas_model.install_transformer_engine(monkeypatch)
    backends.load.cache_clear()
    yield backends.load("transformer_engine")
    backends.load.cache_clear()
    monkeypatch.delitem(__import__("sys").modules, "kernels.fp8.backends.transformer_engine")


@pytest.fixture
def cublas(monkeypatch):
    """The backend, on the model of its library."""
    module = backends.load("cublas")
    monkeypatch.setattr(module, "scaled_mm", cublas_model.scaled_mm)
    return module


# -- layouts


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", GEMMS)
def test_cublas_gets_documented_layouts_and_gives_the_references_results(cublas, operation, dtype, sizes):
    assert judge(Case(operation, sizes, CPU, dtype), "cublas").diff < (1e-12 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [*GEMMS, *GROUPED])
def test_transformer_engine_gets_its_layouts_and_gives_the_references_results(
    transformer_engine, operation, dtype, sizes
):
    case = Case(operation, sizes, CPU, dtype)
    if case.x.shape[0]:
        assert judge(case, "transformer_engine").diff < (1e-12 if dtype == torch.float32 else 1e-6)
    else:
        result, expected = case.run("transformer_engine")[0], case.run("reference")[0]
        assert result.shape == expected.shape and result.dtype == expected.dtype


def several(count: int) -> tuple[list, list, list, list]:
    """Several weights on one input: codes and scales of weights, and of output gradients."""
    g = torch.Generator().manual_seed(1)
    weights = [formats.quantize(torch.randn(16 * (i + 3), 144, generator=g), BLOCKS) for i in range(count)]
    dys = [formats.quantize(torch.randn(40, len(w), generator=g), ROWS) for w, _ in weights]
    return *map(list, zip(*weights, strict=True)), *map(list, zip(*dys, strict=True))


@pytest.mark.parametrize("name", ["cublas", "transformer_engine"])
def test_several_weights_on_one_input_are_summed_in_fp32(name, request):
    module = request.getfixturevalue(name)
    weights, weight_scales, dys, dy_scales = several(3)
    expected = reference.linear_dgrad(dys, dy_scales, weights, weight_scales)
    result = module.linear_dgrad(dys, dy_scales, weights, weight_scales, torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, module.linear_dgrad(dys, dy_scales, weights, weight_scales).bfloat16())
    torch.testing.assert_close(result.float(), expected, rtol=2**-8, atol=0)
    x = formats.quantize(torch.randn(40, 144), ROWS)
    before = [torch.randn(len(w), 144) for w in weights]
    ours, theirs = ([b.clone() for b in before] for _ in range(2))
    reference.linear_wgrad(*x, dys, dy_scales, ours)
    module.linear_wgrad(*x, dys, dy_scales, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scales_that_lie_as_cublas_reads_them_are_not_copied():
    codes, scales = formats.quantize(torch.randn(32, 256), ROWS)
    turned = scales.t().contiguous()
    assert layouts.rows(codes, turned.t())[1].data_ptr() == turned.data_ptr()
    assert layouts.rows(codes, scales)[1].data_ptr() != scales.data_ptr()


def test_a_weight_is_transposed_once_and_forgotten_with_it():
    codes, _ = formats.quantize(torch.randn(2, 128, 256), BLOCKS)
    turned = layouts.transposed(codes)
    assert layouts.transposed(codes) is turned
    assert torch.equal(turned.float(), codes.float().transpose(1, 2))
    held = len(layouts._transposed)
    del codes
    assert len(layouts._transposed) == held - 1


# -- Transformer Engine's own quantiser


@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize("shape", [(40, 272), (2, 130, 144), (1, 16)])
def test_its_quantiser_fits_the_canonical_shapes_and_agrees_with_powers_of_two(transformer_engine, tile, shape):
    x = (torch.randn(shape) * torch.logspace(-6, 6, shape[-1])).bfloat16()
    for power_of_two in (True, False):
        codes, scales = transformer_engine.quantize(x, tile, power_of_two)
        expected, expected_scales = formats.quantize(x, tile, power_of_two)
        assert codes.shape == expected.shape and scales.shape == expected_scales.shape
        if power_of_two:
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scales, expected_scales)
        else:
            torch.testing.assert_close(scales, expected_scales, rtol=2**-22, atol=0)
            differing = (codes.view(torch.uint8) != expected.view(torch.uint8)).double().mean()
            assert differing < 0.01


def test_its_quantiser_loses_infinities_which_is_why_auto_leaves_it_out(transformer_engine):
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 3] = torch.inf
    codes, scales = transformer_engine.quantize(x, ROWS)
    assert formats.dequantize(codes, scales, ROWS).isfinite().all()
    assert not formats.dequantize(*formats.quantize(x, ROWS), ROWS).isfinite().all()
    assert "quantize" in BACKENDS["transformer_engine"].inexact


# -- what cannot be


def test_a_weight_that_cannot_be_tiled_is_named(cublas, transformer_engine):
    x, w = formats.quantize(torch.randn(16, 128), ROWS), formats.quantize(torch.randn(24, 128), BLOCKS)
    for name in ("cublas", "transformer_engine"):
        with pytest.raises(BackendError, match=rf"fp8.backend={name}: a weight of 24 x 128; expected multiples of 16"):
            fp8_linear(*x, [w[0]], [w[1]], torch.bfloat16, name)
    with pytest.raises(BackendError, match=r"transformer_engine: rows of 100; expected a multiple of 16"):
        fp8_quantize(torch.randn(4, 100), ROWS, False, "transformer_engine")


def test_an_operation_that_a_backend_lacks_is_named_with_those_that_have_it():
    x, w = formats.quantize(torch.randn(16, 128), ROWS), formats.quantize(torch.randn(1, 128, 128), BLOCKS)
    with pytest.raises(
        BackendError, match=r"cublas has no grouped_linear; expected one of auto, reference, transformer_engine, triton"
    ):
        fp8_grouped_linear(*x, *w, [16], torch.bfloat16, "cublas")
    with pytest.raises(BackendError, match="cublas has no quantize"):
        fp8_quantize(torch.randn(4, 128), ROWS, False, "cublas")
    assert backends.lacking("cublas") == ["quantize", *GROUPED]
    assert not any(backends.lacking(name) for name in BACKENDS if name != "cublas")


def test_on_a_cpu_there_is_the_reference_and_auto_means_it():
    assert backends.available(CPU) == ["reference"]
    assert backends.resolve("auto", CPU) == backends.resolve("reference", CPU) == "reference"
    with pytest.raises(
        BackendError, match=r"^needs a GPU of compute capability 9.0 or newer, and torch sees none here"
    ):
        backends.resolve("triton", CPU)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU to be asked about: its capability, the CUDA of torch, and the packages that are installed."""
    machine = SimpleNamespace(capability=(9, 0), packages={"triton", "transformer_engine"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imagined")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: object() if name in machine.packages else None
    )
    monkeypatch.setattr(backends, "load", lambda name: SimpleNamespace())
    return machine


def test_every_obstacle_is_one_sentence(gpu, monkeypatch):
    assert backends.available(GPU) == ["transformer_engine", "triton", "cublas", "reference"]
    assert backends.resolve("auto", GPU) == "auto"
    gpu.packages.remove("transformer_engine")
    with pytest.raises(BackendError) as error:
        backends.resolve("transformer_engine", GPU)
    assert str(error.value) == (
        "needs the package transformer_engine, which is not installed: pip install 'weft[gpu]'; "
        "expected auto or triton or cublas or reference"
    )
    gpu.capability = (10, 0)
    assert backends.obstacle("cublas", GPU) == (
        "needs a GPU of compute capability 9.0 (Hopper); NVIDIA Imagined has 10.0"
    )
    assert backends.obstacle("triton", GPU) is None
    gpu.capability = (8, 0)
    assert "8.0" in str(backends.obstacle("auto", GPU)) and backends.available(GPU) == ["reference"]
    gpu.capability = (9, 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert backends.obstacle("cublas", GPU) == (
        f"needs torch for CUDA 12.9 or newer; torch {torch.__version__} has 12.8"
    )


def test_a_package_that_does_not_load_is_an_obstacle(gpu, monkeypatch):
    def broken(name):
        raise BackendError(f"{name} cannot be imported: undefined symbol")

    monkeypatch.setattr(backends, "load", broken)
    assert backends.obstacle("transformer_engine", GPU) == "transformer_engine cannot be imported: undefined symbol"
    assert backends.available(GPU) == ["reference"]


# -- auto


@pytest.fixture
def contest(monkeypatch, tmp_path):
    """Three candidates with the reference's arithmetic, whose times are given; and an empty memory."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    auto._memory.cache_clear()
    auto.trusted.cache_clear()
    times, timed = {"transformer_engine": 5e-6, "triton": 3e-6, "cublas": 4e-6}, []

    def seconds(call, device, repeats):
        call()
        timed.append(called[-1])
        return times[called[-1]]

    called: list[str] = []

    def implementation(name, operation):
        def noted(*operands):
            called.append(name)
            return getattr(reference, operation)(*operands)

        return SimpleNamespace(**{operation: noted})

    monkeypatch.setattr(auto, "trusted", lambda operation, device: list(times))
    monkeypatch.setattr(auto.backends, "implementation", implementation)
    monkeypatch.setattr(auto.compare, "seconds", seconds)
    yield SimpleNamespace(times=times, timed=timed, folder=tmp_path)
    auto._memory.cache_clear()


def multiply(rows: int = 40, width: int = 128) -> torch.Tensor:
    g = torch.Generator().manual_seed(rows)
    x = formats.quantize(torch.randn(rows, 256, generator=g), ROWS)
    w = formats.quantize(torch.randn(width, 256, generator=g), BLOCKS)
    expected = reference.linear(*x, [w[0]], [w[1]])
    [result] = auto.linear(*x, [w[0]], [w[1]])
    assert torch.equal(result, expected[0])
    return result


def test_auto_measures_a_shape_once_and_says_what_it_picked(contest, capsys):
    multiply(40)
    assert contest.timed == ["transformer_engine", "triton", "cublas"]
    multiply(33)  # 33 to 64 rows share a choice
    assert len(contest.timed) == 3
    multiply(65)
    assert len(contest.timed) == 6
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"weft: fp8.backend=auto: linear: {rows} rows, 128x256, float32: picked triton "
        "(transformer_engine 5.0 us, triton 3.0 us, cublas 4.0 us)"
        for rows in (64, 128)
    ]


def test_what_was_picked_binds_every_process_that_shares_the_file(contest, capsys):
    multiply()
    contest.times.update(cublas=1e-6)
    auto._memory.cache_clear()  # another process, in which cublas would have won
    multiply()
    assert len(contest.timed) == 3
    [file] = contest.folder.glob("fp8-choices-*.json")
    written = json.loads(file.read_text())
    assert written["device"] == "cpu" and written["torch"] == metadata.version("torch")
    assert [choice["picked"] for choice in written["choices"].values()] == ["triton"]


def test_ranks_other_than_the_first_are_silent(contest, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    multiply()
    assert capsys.readouterr().err == ""


def test_weight_gradients_are_measured_on_something_else(contest):
    x, dy = formats.quantize(torch.randn(40, 128), ROWS), formats.quantize(torch.randn(40, 64), ROWS)
    expected, out = torch.ones(64, 128), torch.ones(64, 128)
    reference.linear_wgrad(*x, [dy[0]], [dy[1]], [expected])
    auto.linear_wgrad(*x, [dy[0]], [dy[1]], [out])
    assert len(contest.timed) == 3 and torch.equal(out, expected)


def test_widths_that_cannot_be_tiled_leave_their_backends_out(contest):
    multiply(width=24)
    assert contest.timed == []  # only triton tiles 24
    assert auto.candidates("linear", CPU, (24, 256)) == ["triton"]


def test_a_preferred_backend_is_kept_unless_another_is_clearly_faster():
    assert auto.fastest({"transformer_engine": 1.0, "triton": 0.985}) == "transformer_engine"
    assert auto.fastest({"transformer_engine": 1.0, "triton": 0.97}) == "triton"
    assert auto.fastest({"transformer_engine": 1.0, "triton": 0.97, "cublas": 0.96}) == "triton"


def test_auto_trusts_nobody_who_differs_from_the_reference(monkeypatch, capsys):
    def off_by_a_tile(x, x_scales, weights, weight_scales, dtype):
        return reference.linear(x, x_scales.roll(1, 1), weights, weight_scales, dtype)

    def missing(*operands):
        raise RuntimeError("no kernel image")

    modules = {
        "transformer_engine": SimpleNamespace(linear=off_by_a_tile, prepare_weight=lambda codes: codes),
        "triton": SimpleNamespace(linear=missing, prepare_weight=lambda codes: codes),
        "cublas": SimpleNamespace(linear=reference.linear, prepare_weight=lambda codes: codes),
        "reference": reference,
    }
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(backends, "load", modules.__getitem__)
    monkeypatch.setattr(backends, "available", lambda device: list(modules))
    auto.trusted.cache_clear()
    assert auto.candidates("linear", CPU) == ["cublas"]
    auto.trusted.cache_clear()
    printed = capsys.readouterr().err
    assert "linear of transformer_engine is left out: it differs from the reference by" in printed
    assert "linear of triton is left out: no kernel image" in printed


def test_auto_on_a_cpu_is_the_reference_for_everything():
    auto.trusted.cache_clear()
    assert all(auto.candidates(operation, CPU) == ["reference"] for operation in OPERATIONS)


# -- the judge


@pytest.mark.parametrize("operation", [*GEMMS, *GROUPED])
def test_the_reference_agrees_with_fp64_on_what_its_operands_stand_for(operation):
    assert judge(Case(operation, Sizes(), CPU, torch.float32), "reference").diff < 1e-12


def test_calc_diff_is_zero_for_equals_two_for_opposites_and_grows_with_noise():
    x = torch.randn(1000)
    assert calc_diff(x, x) == pytest.approx(0, abs=1e-12) and calc_diff(x, -x) == pytest.approx(2)
    assert calc_diff(x, x + 0.1 * torch.randn(1000)) == pytest.approx(0.005, rel=0.5)
    assert calc_diff(torch.zeros(3), torch.zeros(3)) == 0
