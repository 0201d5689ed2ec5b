"""What the tables of FP8's errors claim, on smaller products and after fewer steps."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks import fp8_errors
from tests.benchmarks.fp8_errors import BATCHES, BLOCKS, PER_TENSOR, ROWS, WEFT, cast, control, gemm_errors, mean
from tests.kernels import numpy_fp8

WIDTH = 256
ROOT = Path(__file__).parents[2]


def of_each_gemm(data: str, recipe: str) -> list[float]:
    return [rms for rms, _ in gemm_errors(fp8_errors.DATA[data], recipe, WIDTH).values()]


def test_tiles_are_five_times_better_than_one_scale_a_tensor_where_activations_are_massive():
    fine, coarse = (of_each_gemm("massive activations", recipe) for recipe in (WEFT, PER_TENSOR))
    assert all(one >= 5 * other for one, other in zip(coarse, fine, strict=True))
    assert max(fine) < 0.07


def test_e5m2_gradients_are_worse_in_both_gemms_that_read_them():
    _, *e4m3 = of_each_gemm("normal", WEFT)
    _, *e5m2 = of_each_gemm("normal", "block-scaled, gradients in E5M2")
    assert all(one > 1.4 * other for one, other in zip(e5m2, e4m3, strict=True))


def test_power_of_two_scales_spare_the_weight_gradient_its_second_rounding():
    *_, free = of_each_gemm("normal", WEFT)
    *_, powers = of_each_gemm("normal", "the same, power-of-two scales")
    assert powers < 0.8 * free


def layers_of_a_run(text: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    own_text = "data=hf", f"data.path={text}", f"data.cache={text.parent}", "data.heldout=0.1", "model.vocab_size=512"
    short = "train.sequence_length=64", "train.eval_rows=8", "model.num_nextn_predict_layers=0"
    return fp8_errors.real_gradients(4, *own_text, *short)


@pytest.mark.slow
def test_gradients_in_blocks_are_worse_in_every_kind_of_layer_of_a_training_run(workers, tmp_path):
    sources = [json.dumps({"text": path.read_text()}) for path in sorted((ROOT / "train").rglob("*.py"))]
    (tmp_path / "sources.jsonl").write_text("\n".join(sources) + "\n")
    [layers] = workers(1).run(layers_of_a_run, tmp_path / "sources.jsonl")
    for kind in ("q_b_proj", "kv_b_proj", "o_proj", "down_proj"):
        mine = [layer for name, layer in layers.items() if kind in name]
        fine, coarse = (mean(control(*layer, tile) for layer in mine) for tile in (ROWS, BLOCKS))
        assert coarse[0] > 1.01 * fine[0] and coarse[1] >= fine[1], kind
    by_batch = [mean(cast(dy / tokens) for dy, _ in layers.values()) for tokens in BATCHES.values()]
    assert by_batch[0][0] < 0.05 < 0.3 < by_batch[2][0] and by_batch[0][1] < 0.01 < 0.3 < by_batch[2][1]


def test_gradients_in_blocks_lose_the_quiet_tokens():
    g = torch.Generator().manual_seed(0)
    layer = fp8_errors.with_unlike_tokens(g, 512, 512, decades=1.0), torch.randn(512, WIDTH, generator=g)
    (fine, fine_lost), (coarse, coarse_lost) = (control(*layer, tile) for tile in (ROWS, BLOCKS))
    assert coarse > 3 * fine and fine_lost < 1e-3 < 1e-2 < coarse_lost


def test_promotion_makes_up_for_the_narrow_register():
    for _, (narrow, promoted, fp32) in fp8_errors.accumulation_errors(32):
        assert narrow[1] > 2e-3 > 1e-3 > promoted[1] > fp32[1]


def test_cutting_keeps_thirteen_bits_below_the_leading_one():
    x = torch.tensor(
        [1 + 2.0**-13, 1 + 2.0**-14, -(1 + 2.0**-13 + 2.0**-14), 2.0**-13, 2.0**-14, 0], dtype=torch.float64
    )
    own = fp8_errors.cut(x)
    assert own.tolist() == [1 + 2.0**-13, 1, -(1 + 2.0**-13), 2.0**-13, 2.0**-14, 0]
    assert fp8_errors.cut(x, torch.tensor(1.5, dtype=torch.float64)).tolist()[3:] == [2.0**-13, 0, 0]


@pytest.mark.parametrize(("dtype", "form"), [(fp8_errors.E4M3, numpy_fp8.E4M3), (fp8_errors.E5M2, numpy_fp8.E5M2)])
def test_the_formats_beside_ours_round_like_the_numpy_model(dtype, form):
    x = torch.randn(100, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 200)
    codes, scales = numpy_fp8.quantize(x.numpy(), *ROWS, form=form)
    expected = numpy_fp8.dequantize(codes, scales, *ROWS, form)
    assert torch.equal(fp8_errors.rounded(x, ROWS, dtype), torch.from_numpy(expected).float())
