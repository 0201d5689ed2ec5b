"""What FP8 does to the three GEMMs of a linear: `python -m tests.benchmarks.fp8_errors` prints the tables of
docs/explanations/fp8.md.

1. Errors of Fprop, Dgrad and Wgrad: block-scaled, per tensor, with gradients in E5M2, on normal data and on outliers.
2. The same for outliers of growing size.
3. The negative control: activation gradients in 128x128 blocks, on gradients of a short training run of recipe `tiny`
   and on gradients whose tokens differ in size (report, appendix B.2).
4. What the smallest amax, 1e-4, does to gradients of a sum and of a mean over many tokens.
5. What Hopper's tensor cores lose without promotion to FP32 (report section 3.3.2), emulated.

An element of a product of `a` [M, K] and `b` [K, N] is about |row of a| |column of b| / sqrt(K) large if the two are
random. Its relative error is its distance from the product in FP64 of the unrounded operands over that: so the error of
a large row does not hide those of the others. Tables give the root mean square over all elements, and the largest.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.fp8 import BLOCKS, COLUMNS, ROWS, fp8_linear, fp8_linear_dgrad, fp8_linear_wgrad
from kernels.fp8.formats import dequantize, join, quantize, split, tile_scales
from tests.benchmarks.one_process import Batches, OneProcess, recipe_of, start_world_of_one
from train.engine import loss_scale

K = 4096
BATCHES = {"sum of losses": 1, "mean over 2,048 tokens": 2048, "mean over 62.9 million tokens": 15360 * 4096}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GEMMS = "Fprop", "Dgrad", "Wgrad"

Tile = tuple[int, int]
Error = tuple[float, float]  # root mean square, largest
Loss = tuple[float, float]  # root mean square error, share of a gradient that is rounded to zero
Operands = dict[str, tuple[Tensor, Tensor]]  # GEMM -> a [M, K], b [K, N]


# -- data
def normal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=generator)


def with_large_channels(generator: torch.Generator, tokens: int, channels: int) -> Tensor:
    """One channel in 512 is 100 to 1,000 times larger than the others, in every token."""
    x = normal(generator, tokens, channels)
    x[:, some(generator, channels, 512)] *= torch.logspace(2, 3, max(channels // 512, 1))
    return x


def with_massive_activations(generator: torch.Generator, tokens: int, channels: int, largest: float = 3e5) -> Tensor:
    """One channel in 512 is much larger in one token of a hundred, up to `largest` times the size of all others.

    Trained models have such values, up to 100,000 times their neighbours': Sun et al. 2024, arXiv 2402.17762.
    """
    x = normal(generator, tokens, channels)
    chosen = some(generator, channels, 512)
    sizes = largest ** torch.linspace(1, 2 / 3, len(chosen))
    there = some(generator, tokens, 100).unsqueeze(1), chosen
    x[there] = x[there].sign() * sizes
    return x


def with_unlike_tokens(generator: torch.Generator, tokens: int, channels: int, decades: float = 1.0) -> Tensor:
    """Tokens differ in size: the logarithm to the base 10 of their lengths is normal with this standard deviation."""
    return normal(generator, tokens, channels) * 10 ** (decades * normal(generator, tokens, 1))


def some(generator: torch.Generator, count: int, one_in: int) -> Tensor:
    return torch.randperm(count, generator=generator)[: max(count // one_in, 1)]


DATA = {
    "normal": normal,
    "channels x 100 to 1,000": with_large_channels,
    "massive activations": with_massive_activations,
}


def operands(make: Callable[..., Tensor], width: int, seed: int = 0) -> Operands:
    """Operands of the three GEMMs, each contracted over K: activations and gradients from `make`, normal weights."""
    g = torch.Generator().manual_seed(seed)
    x, dy = (make(g, width, K) for _ in range(2))
    w, w_dgrad = normal(g, width, K) * 0.02, normal(g, K, width) * 0.02
    x_wgrad, dy_wgrad = (make(g, K, width) for _ in range(2))
    return {"Fprop": (x, w.t()), "Dgrad": (dy, w_dgrad), "Wgrad": (dy_wgrad.t(), x_wgrad)}


# -- recipes
def reference(gemm: str, a: Tensor, b: Tensor, power_of_two: bool = False) -> Tensor:
    """The product by weft's operators: E4M3, 1x128 and 128x128 tiles, Wgrad requantised to 128x1."""
    if gemm == "Wgrad":
        out = torch.zeros(a.shape[0], b.shape[1])
        dy, x = quantize(a.t().contiguous(), ROWS, power_of_two), quantize(b, ROWS, power_of_two)
        fp8_linear_wgrad(*x, [dy[0]], [dy[1]], [out], "reference")
        return out
    codes, scales = quantize(a, ROWS, power_of_two)
    if gemm == "Fprop":
        w, w_scales = quantize(b.t().contiguous(), BLOCKS)
        return fp8_linear(codes, scales, [w], [w_scales], torch.float32, "reference")[0]
    w, w_scales = quantize(b, BLOCKS)
    return fp8_linear_dgrad([codes], [scales], [w], [w_scales], torch.float32, "reference")


def rounded(x: Tensor, tile: Tile, dtype: torch.dtype = E4M3) -> Tensor:
    """`x` as a format of eight bits with a scale for each tile gives it back."""
    tiles = split(x, tile)
    scales = tile_scales(tiles.abs().amax((-3, -1), keepdim=True), False, torch.finfo(dtype).max)
    return join((tiles / scales).to(dtype).float() * scales, *x.shape)


def in_blocks(gemm: str, a: Tensor, b: Tensor, gradients: torch.dtype) -> Tensor:
    """As `reference`, with output gradients in another format, and an exact product."""
    if gemm == "Wgrad":
        a = rounded(rounded(a.t(), ROWS, gradients), COLUMNS, gradients).t()
        b = rounded(rounded(b, ROWS), COLUMNS)
    else:
        a, b = rounded(a, ROWS, gradients if gemm == "Dgrad" else E4M3), rounded(b, BLOCKS)
    return a.double() @ b.double()


def per_tensor(gemm: str, a: Tensor, b: Tensor, gradients: torch.dtype) -> Tensor:
    """One scale for each operand, from its own largest magnitude, and an exact product."""
    whole_a, whole_b = (max(x.shape) for x in (a, b))
    a = rounded(a, (whole_a, whole_a), E4M3 if gemm == "Fprop" else gradients)
    return a.double() @ rounded(b, (whole_b, whole_b)).double()


WEFT, PER_TENSOR = "block-scaled E4M3 (weft)", "per tensor, E4M3"
RECIPES: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    WEFT: reference,
    "the same, power-of-two scales": partial(reference, power_of_two=True),
    "block-scaled, gradients in E5M2": partial(in_blocks, gradients=E5M2),
    PER_TENSOR: partial(per_tensor, gradients=E4M3),
    "per tensor, gradients in E5M2": partial(per_tensor, gradients=E5M2),
}


def error(product: Tensor, a: Tensor, b: Tensor) -> Error:
    """Root mean square and largest relative error of `product` = a @ b, as the module says."""
    a, b = a.double(), b.double()
    size = a.norm(dim=1, keepdim=True) * b.norm(dim=0) / a.shape[1] ** 0.5
    relative = ((product.double() - a @ b) / size)[size > 0]
    return relative.square().mean().sqrt().item(), relative.abs().max().item()


def gemm_errors(make: Callable[..., Tensor], recipe: str, width: int) -> dict[str, Error]:
    return {gemm: error(RECIPES[recipe](gemm, a, b), a, b) for gemm, (a, b) in operands(make, width).items()}


# -- the negative control
def real_gradients(steps: int, *overrides: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (gradient of its output [T, N], weight [N, K]) in the last of `steps` steps of recipe `tiny` in BF16.

    Gradients are those of the sum of the tokens' losses. Layers: the linears that have an input to themselves. Tokens
    whose gradient is rounding noise are left out: the first of a sequence has no choice what to attend to.
    """
    run = OneProcess(recipe_of("precision=bf16", "parallel.microbatch_size=8", *overrides))
    batches, caught = Batches(run.recipe), {}
    linears = {name: m for name, m in run.stage.named_modules() if name.endswith(("_b_proj", "o_proj", "down_proj"))}

    def watch(name: str, layer: torch.nn.Module, inputs: object, y: Tensor) -> None:
        y.register_hook(lambda dy: caught.update({name: (dy.flatten(0, -2).float(), layer.weight.detach().float())}))

    for name, layer in linears.items():
        layer.register_forward_hook(partial(watch, name))
    for step in range(steps):
        rows = batches(step)
        run.step(step, rows)
    tokens = rows[:, 1:].numel()
    lengths = {name: dy.norm(dim=1) for name, (dy, _) in caught.items()}
    heard = {name: length > 1e-4 * length.median() for name, length in lengths.items()}
    return {name: (dy[heard[name]] * (tokens / loss_scale(tokens)), w) for name, (dy, w) in caught.items()}


def control(dy: Tensor, weight: Tensor, tile: Tile) -> Loss:
    """What Dgrad loses with `dy` in `tile`, an exact weight, and a gradient far above the smallest amax."""
    dy = dy * (448 / dy.abs().max())
    dy_8 = dequantize(*quantize(dy, tile), tile)
    return error(dy_8.double() @ weight.double(), dy, weight)[0], share_to_zero(dy, dy_8)


def cast(dy: Tensor) -> Loss:
    """What a gradient loses in 1x128 tiles: the root mean square of its tokens' relative errors."""
    dy_8 = dequantize(*quantize(dy, ROWS), ROWS)
    tokens = (dy_8 - dy).double().norm(dim=1) / dy.double().norm(dim=1)
    return tokens.square().mean().sqrt().item(), share_to_zero(dy, dy_8)


def share_to_zero(dy: Tensor, dy_8: Tensor) -> float:
    return ((dy_8 == 0) & (dy != 0)).float().mean().item()


def mean(losses: Iterable[Loss]) -> Loss:
    errors, to_zero = zip(*losses, strict=True)
    return sum(errors) / len(errors), sum(to_zero) / len(to_zero)


# -- accumulation
def tensor_core(a: Tensor, b: Tensor, promote: int | None) -> Tensor:
    """a [M, K] @ b [K, N] of E4M3 values as Hopper adds them, every `promote` products into FP32 (None: never).

    32 products are cut off 13 bits below the largest one's leading bit and added; the sum is added to a register with
    13 bits of fraction, cut off likewise. Source: arXiv 2505.09343, section 3.1.1.
    """
    total = torch.zeros(a.shape[0], b.shape[1])
    register = torch.zeros(total.shape, dtype=torch.float64)
    for first in range(0, a.shape[1], 32):
        products = a[:, first : first + 32].double().unsqueeze(2) * b[first : first + 32].double()
        register = cut(register + cut(products, products.abs().amax(1, keepdim=True)).sum(1))
        if promote and (first + 32) % promote == 0:
            total += register.float()
            register.zero_()
    return total + register.float()


def cut(x: Tensor, largest: Tensor | None = None) -> Tensor:
    """`x` without what lies 13 bits below the leading bit of `largest`, or of each element itself."""
    exponent = torch.frexp(x if largest is None else largest).exponent - 14
    return torch.ldexp(torch.ldexp(x, -exponent).trunc(), exponent)


def accumulation_errors(width: int) -> Iterator[tuple[str, list[Error]]]:
    """Of E4M3 values with both signs and with one: no promotion, promotion every 128, FP32; over the product's size."""
    g = torch.Generator().manual_seed(0)
    for name, sample in {"normal": torch.randn, "uniform in [0, 1)": torch.rand}.items():
        a = quantize(sample(width, K, generator=g), ROWS)[0].float()
        b = quantize(sample(width, K, generator=g), BLOCKS)[0].float().t()
        exact = a.double() @ b.double()
        products = tensor_core(a, b, None), tensor_core(a, b, 128), a @ b
        relative = [(product.double() - exact) / exact.square().mean().sqrt() for product in products]
        yield name, [(each.square().mean().sqrt().item(), each.abs().max().item()) for each in relative]


# -- tables
def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(*errors: Error) -> list[str]:
    return [f"{percent(each)} / {percent(most)}" for each, most in errors]


def percent(x: float) -> str:
    """Two significant digits, or three of a larger number."""
    return f"{100 * x:.3g}" if x > 0.01 else f"{100 * x:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of recipe tiny before its gradients are taken")
    parser.add_argument("--width", type=int, default=512, help="rows and columns of the products")
    arguments = parser.parse_args()

    print(f"Relative error in %, root mean square / largest; K = {K}\n")
    for name, make in DATA.items():
        rows = ([recipe, *shown(*gemm_errors(make, recipe, arguments.width).values())] for recipe in RECIPES)
        print(table([name, *GEMMS], rows))

    rows = []
    for largest in (1e3, 1e4, 3e4, 1e5, 3e5, 1e6):
        make = partial(with_massive_activations, largest=largest)
        fine, coarse = (gemm_errors(make, recipe, arguments.width)["Fprop"][0] for recipe in (WEFT, PER_TENSOR))
        rows.append([f"{largest:,.0f}", f"{100 * fine:.2f}", f"{100 * coarse:.2f}", f"{coarse / fine:.1f}"])
    print(table(["largest outlier over the rest", "block-scaled, %", "per tensor, %", "ratio"], rows))

    start_world_of_one()
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in real_gradients(arguments.steps).items():
        kinds.setdefault(name.rsplit(".", 1)[1], []).append(layer)
    cases = {f"`{kind}` of `tiny` after {arguments.steps} steps": layers for kind, layers in kinds.items()}
    g = torch.Generator().manual_seed(0)
    for decades in (0.5, 1.0, 1.5):
        layer = with_unlike_tokens(g, 2048, 1024, decades), normal(g, 1024, arguments.width)
        cases[f"normal, tokens apart by {decades} decades"] = [layer]
    rows = []
    for name, layers in cases.items():
        (fine, fine_lost), (coarse, coarse_lost) = (
            mean(control(*layer, tile) for layer in layers) for tile in (ROWS, BLOCKS)
        )
        apart = sum(dy.norm(dim=1).log10().std().item() for dy, _ in layers) / len(layers)
        lost = percent(fine_lost), percent(coarse_lost)
        rows.append([name, f"{apart:.2f}", percent(fine), percent(coarse), f"{coarse / fine:.2f}", *lost])
    header = "gradient of the output of", "decades between tokens", "1x128, %", "128x128, %", "ratio"
    print(table([*header, "1x128: to zero, %", "128x128: to zero, %"], rows))

    rows = []
    for kind, layers in kinds.items():
        losses = [mean(cast(dy / tokens) for dy, _ in layers) for tokens in BATCHES.values()]
        rows.append([f"`{kind}`", *(f"{percent(each)} / {percent(lost)}" for each, lost in losses)])
    print(table(["error / to zero, %", *BATCHES], rows))

    columns = "one register of 13 bits", "promoted every 128", "FP32"
    print(table(["values", *columns], ([name, *shown(*each)] for name, each in accumulation_errors(128))))


if __name__ == "__main__":
    main()
