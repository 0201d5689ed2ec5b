"""What every pipeline rank holds, instruction by instruction, and where it holds most.

What stays: parameters, their quantised copies, gradients, and this rank's share of masters and moments. What comes and
goes: activations from a forward to its backward, operands of deferred weight gradients from `I` to `W`, and what a pass
itself needs while it runs. All sizes are those that the stages' own tensors have (`work`). A share is added for what an
allocator cannot use.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.simulate.work import StageWork
from parallel.mesh import Mesh
from parallel.replicas import homes
from parallel.schedule import Program
from parallel.schedule.program import Instruction, passes
from train.optim import MOMENTS

FRAGMENTED = 0.04  # of what comes and goes; PyTorch's caching allocator, expandable segments on


@dataclass(frozen=True)
class Peak:
    """Bytes by part when a rank holds most, and the instruction that then runs."""

    parts: dict[str, float]
    instruction: Instruction

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stays(
    held: set[int], stages: Mapping[int, StageWork], program: Program, mesh: Mesh, moments: str
) -> dict[str, float]:
    """Bytes that a rank holding the stages `held` has all the time."""
    parts = dict.fromkeys(("parameters", "quantised weights", "gradients", "optimizer"), 0.0)
    users = {stage for stage, work in stages.items() if work.tied}
    for stage in held:
        work, places = stages[stage], homes(program.placement, {stage})
        again = stage != min(users & held, default=stage)  # the rank has the tied parameter with another stage
        tied = 0 if again else work.tied
        parts["parameters"] += work.parameter_size * (work.dense + tied + work.experts)
        parts["quantised weights"] += work.cached
        parts["gradients"] += work.gradient_size * (work.dense + tied + work.experts)
        state = work.gradient_size + 2 * MOMENTS[moments].itemsize
        copies = (work.dense, places, None), (tied, homes(program.placement, users), None), (work.experts, places, 0)
        for count, positions, rank in copies:
            parts["optimizer"] += state * count / len(mesh.replicas(positions, rank)) if count else 0.0
    return parts


def peaks(program: Program, stages: Mapping[int, StageWork], mesh: Mesh, moments: str) -> list[Peak]:
    """The peak of each pipeline rank."""
    found = []
    for held, instructions in zip(program.placement, program.program, strict=True):
        fixed = stays({*held}, stages, program, mesh, moments)
        activations = deferred = 0.0
        best = Peak(fixed, ("F", held[0], 0))
        for instruction in instructions:
            working = 0.0
            for kind, stage, _ in passes(instruction):
                work = stages[stage].passes[kind]
                working += work.peak - (work.kept if kind in "FI" else 0)
                activations += work.kept if kind == "F" else 0.0
            deferred += sum(stages[s].passes["I"].kept for kind, s, _ in passes(instruction) if kind == "I")
            moving = {"activations": activations, "deferred weights": deferred, "working": working}
            slack = FRAGMENTED * sum(moving.values())
            now = Peak(fixed | moving | {"fragmentation": slack}, instruction)
            if now.total > best.total:
                best = now
            for kind, stage, _ in passes(instruction):
                activations -= stages[stage].passes["F"].kept if kind in "BI" else 0.0
                deferred -= stages[stage].passes["I"].kept if kind == "W" else 0.0
        found.append(best)
    return found
