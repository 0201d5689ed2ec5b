"""How fast weft is in one process, beside transformers' DeepSeek-V3: `python -m tests.benchmarks.against_transformers`.

Both train recipe `tiny` without MTP in FP32, from the same weights on the same rows: 2,048 tokens a step, clipping and
AdamW included. Transformers runs with whichever of its expert implementations and micro-batch splits is fastest here,
with SDPA and fused AdamW; weft with its fastest split. Whole steps alternate, and the median of the pairs' ratios
counts, for a machine with other work to do slows both of a pair alike. Then BF16, FP8 and MTP beside weft's own FP32.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

# Before torch is imported: a thread that spins while another process has its partner's core would time that process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.benchmarks.one_process import WITHOUT_MTP, Batches, OneProcess, recipe_of, start_world_of_one
from train.model.config import ModelConfig
from train.optim import learning_rate
from train.recipe import Recipe

SPLITS = (1, 2, 4, 8)  # sequences in a micro-batch
HOPELESS = 10.0  # an implementation whose first step takes so many times the fastest one's is not tried further

Step = Callable[[int, Tensor], float]

VARIANTS = {
    "BF16": ("precision=bf16", WITHOUT_MTP),
    "FP8 (emulated)": ("precision=fp8", WITHOUT_MTP),
    "FP32 with MTP": ("precision=fp32",),
    "FP8 with MTP": ("precision=fp8",),
}


class Theirs:
    """Transformers' model of the recipe's shape, with the optimizer that its users would reach for."""

    def __init__(self, recipe: Recipe) -> None:
        self.optim = recipe.optim
        self.model = DeepseekV3ForCausalLM(config_of(recipe.model)).train()
        matrices, gains = ([p for p in self.model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.optim.weight_decay}, {"params": gains, "weight_decay": 0.0}],
            betas=(self.optim.betas[0], self.optim.betas[1]),
            eps=self.optim.eps,
            fused=True,
        )

    def step(self, number: int, rows: Tensor, experts: str, split: int) -> float:
        """A whole step with one expert implementation, `split` sequences in a micro-batch; returns its mean loss."""
        self.model.set_experts_implementation(experts)
        total = 0.0
        for part in rows.split(split):
            logits = self.model(part[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum") / rows[:, 1:].numel()
            loss.backward()
            total += loss.item()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim.lr, (number + 1) * rows[:, 1:].numel())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def config_of(model: ModelConfig) -> DeepseekV3Config:
    """Transformers' configuration of the same shape."""
    sizes = {key: value for key, value in vars(model).items() if key != "rope_scaling"}
    sizes |= {"num_key_value_heads": model.num_attention_heads, "num_nextn_predict_layers": 0}
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    return DeepseekV3Config(**sizes, rope_parameters=rope, attn_implementation="sdpa")


def timed(step: Step, number: int, rows: Tensor) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    step(number, rows)
    return time.perf_counter() - began


def alternate(steps: Mapping[str, Step], batches: Batches, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round: back and forth, on the round's batch, after an untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds + 1):
        rows = batches(number)
        for name in order:
            seconds[name].append(timed(steps[name], number, rows))
        order.reverse()
    return {name: times[1:] for name, times in seconds.items()}


def fastest(steps: Mapping[str, Step], batches: Batches, rounds: int) -> str:
    """The name of the fastest step, after showing all."""
    medians = {name: statistics.median(times) for name, times in alternate(steps, batches, rounds).items()}
    for name, seconds in medians.items():
        print(f"  {name:32} {seconds:7.3f} s a step", flush=True)
    return min(medians, key=lambda name: medians[name])


def promising(theirs: Theirs, rows: Tensor) -> list[str]:
    """Expert implementations that run on this CPU, without the hopelessly slow."""
    seconds: dict[str, float] = {}
    for experts in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        step = partial(theirs.step, experts=experts, split=1)
        try:
            seconds[experts] = timed(step, 0, rows)
        except Exception as error:  # each has conditions of its own: a GPU, a dtype, a package
            theirs.optimizer.zero_grad()
            print(f"  {experts}: does not run here ({str(error).splitlines()[0]})")
    slow = {name: taken for name, taken in seconds.items() if taken > HOPELESS * min(seconds.values())}
    for name, taken in slow.items():
        print(f"  {name}: {taken:.1f} s a step, left out")
    return [name for name in seconds if name not in slow]


def ratios(one: Step, other: Step, batches: Batches, pairs: int) -> list[float]:
    """Time of `one` over time of `other`, pair by pair, in rising order."""
    seconds = alternate({"one": one, "other": other}, batches, pairs)
    return sorted(a / b for a, b in zip(seconds["one"], seconds["other"], strict=True))


def spread(values: list[float]) -> str:
    """Median, and the middle half of the values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def same_work(ours: OneProcess, theirs: Theirs, rows: Tensor) -> None:
    """Give transformers' model weft's weights, and hold the first losses against each other."""
    theirs.model.load_state_dict(ours.stage.state_dict(), strict=True)
    one, other = ours.step(0, rows), theirs.step(0, rows, "eager", 1)
    print(f"first loss: weft {one:.6f}, transformers {other:.6f}")
    if abs(one - other) > 1e-5 * other:
        raise SystemExit("they do not compute the same thing: a comparison of times would mean nothing")


def compare(threads: int, pairs: int, tuning: int, batches: Batches) -> tuple[str, dict[str, str]]:
    """One column of the tables: who ran how, and the ratios by name."""
    torch.set_num_threads(threads)
    print(f"\n{threads} thread{'s' * (threads > 1)}", flush=True)
    base = ("precision=fp32", WITHOUT_MTP)
    ours = {split: OneProcess(recipe_of(*base, f"parallel.microbatch_size={split}")) for split in SPLITS}
    theirs = Theirs(ours[1].recipe)
    same_work(ours[1], theirs, batches(0))
    choices = {
        f"{experts} {split}": partial(theirs.step, experts=experts, split=split)
        for experts in promising(theirs, batches(0))
        for split in SPLITS
    }
    their_best = fastest(choices, batches, tuning)
    our_choices = {f"weft {split}": one.step for split, one in ours.items()}
    our_best = fastest(our_choices, batches, tuning)

    fp32, split = our_choices[our_best], our_best.split()[1]
    found = {"transformers / weft": spread(ratios(choices[their_best], fp32, batches, pairs))}
    for name, overrides in VARIANTS.items():
        variant = OneProcess(recipe_of(*overrides, f"parallel.microbatch_size={split}"))
        found[f"weft {name} / FP32"] = spread(ratios(variant.step, fp32, batches, pairs))
        print(f"  {name}: {found[f'weft {name} / FP32']}", flush=True)
    experts, their_split = their_best.split()
    return f"transformers: {experts}, micro-batches of {their_split}; weft: of {split}", found


def main() -> None:
    parser = argparse.ArgumentParser(description="weft's speed in one process beside transformers'")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs behind each ratio")
    parser.add_argument("--tuning", type=int, default=3, help="rounds by which the fastest settings are chosen")
    options = parser.parse_args()
    start_world_of_one()
    batches = Batches(recipe_of())
    columns = {n: compare(n, options.pairs, options.tuning, batches) for n in options.threads}

    print("\nratio of the times of a step: median of alternating pairs (middle half)\n")
    print("| |" + "".join(f" {n} thread{'s' * (n > 1)} |" for n in columns))
    print("|---|" + "---|" * len(columns))
    for row in next(iter(columns.values()))[1]:
        print(f"| {row} |" + "".join(f" {found[row]} |" for _, found in columns.values()))
    print("".join(f"\n{n} thread{'s' * (n > 1)}: {how}" for n, (how, _) in columns.items()))


if __name__ == "__main__":
    main()
