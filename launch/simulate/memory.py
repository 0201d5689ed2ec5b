"""What every pipeline rank holds, instruction by instruction, and where it holds most.

What stays: parameters, gradients, this rank's share of masters and moments, and, from the first forward and backward of
a step on, quantised weights and their transposed copies. What comes and goes: activations, operands of deferred weight
gradients, messages on their way, buffers of exchanges, logits, and what else a pass needs while it runs. All sizes are
those of the stages' own tensors (`work`), piece by piece; the passes of a pair take turns as in `race`, so that one may
have let go what the other takes. A share is added for what an allocator cannot use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.simulate.stages.storage import Bytes
from launch.simulate.stages.work import PassWork, Piece, StageWork
from launch.simulate.step.race import turns
from parallel.mesh import Mesh
from parallel.replicas import homes
from parallel.schedule import Program, lower
from parallel.schedule.program import Instruction, Message, makes, needs, passes
from train.optim import MOMENTS
from train.recipe import Recipe

FRAGMENTED = 0.04  # of what comes and goes; PyTorch's caching allocator, expandable segments on
MOVING = ("activations", "deferred weights", "working", "communication buffers", "logits")


@dataclass
class Peak:
    """Bytes by part when a rank holds most, and the instruction that then runs.

    curve: for each instruction of the rank the most bytes during it, and those after it.
    """

    parts: dict[str, float]
    instruction: Instruction
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stays(
    held: set[int], stages: Mapping[int, StageWork], program: Program, mesh: Mesh, moments: str
) -> dict[str, float]:
    """Bytes that a rank holding the stages `held` has all the time."""
    parts = dict.fromkeys(("parameters", "gradients", "optimizer"), 0.0)
    users = {stage for stage, work in stages.items() if work.tied}
    for stage in held:
        work, places = stages[stage], homes(program.placement, {stage})
        again = stage != min(users & held, default=stage)  # the rank has the tied parameter with another stage
        tied = 0 if again else work.tied
        parts["parameters"] += work.parameter_size * (work.dense + tied + work.experts)
        parts["gradients"] += work.gradient_size * (work.dense + tied + work.experts)
        state = work.gradient_size + 2 * MOMENTS[moments].itemsize
        copies = (work.dense, places, None), (tied, homes(program.placement, users), None), (work.experts, places, 0)
        for count, positions, rank in copies:
            parts["optimizer"] += state * count / len(mesh.replicas(positions, rank)) if count else 0.0
    return parts


def together(works: Sequence[PassWork]) -> tuple[Bytes, Bytes]:
    """Of passes that take turns: bytes by part at the fullest, and after the last, beyond those before the first."""
    now, most, fullest = Bytes(), 0, Bytes()
    afterwards = (one.afterwards for one in works)
    for piece in (*(event for _, event in turns(works)), *afterwards):
        if isinstance(piece, Piece):
            if (total := now.total() + piece.fullest.total()) > most:
                most, fullest = total, Bytes(now)
                fullest.update(piece.fullest)
            now.update(piece.left)
    return fullest, now


class Messages:
    """Bytes of messages between stages: being received, handed over on the rank, and being sent."""

    def __init__(self, program: Program, size: int) -> None:
        self.program, self.size = program, size
        self.waiting: set[Message] = set()  # made or arriving, until somebody takes or sends them
        self.leaving: list[bool] = []  # whether an instruction has run since it was posted

    @property
    def bytes(self) -> int:
        """All."""
        return self.size * (len(self.waiting) + len(self.leaving))

    def begin(self, instruction: Instruction) -> None:
        """From now on the passes hold what they start from."""
        self.waiting -= {*needs(self.program, instruction)}

    def end(self, instruction: Instruction) -> None:
        """What is made waits to be sent or taken."""
        self.waiting |= {*makes(self.program, instruction)}
        self.leaving = [True] * len(self.leaving)

    def post(self, kind: str, message: Message) -> None:
        """A send lets those go that have been posted before the last instruction."""
        if kind == "SEND":
            self.waiting.discard(message)
            self.leaving = [*(done for done in self.leaving if not done), False]
        else:
            self.waiting.add(message)


def peaks(program: Program, stages: Mapping[int, StageWork], mesh: Mesh, moments: str, reserved: int = 0) -> list[Peak]:
    """The peak of each pipeline rank. reserved: bytes that are taken outside the allocator."""
    seen: dict[tuple[int, ...], tuple[Bytes, int, Bytes, int]] = {}

    def running(instruction: Instruction) -> tuple[Bytes, int, Bytes, int]:
        works = [stages[stage].passes[kind] for kind, stage, _ in passes(instruction)[::-1]]
        key = tuple(map(id, works))
        if key not in seen:
            fullest, left = together(works)
            seen[key] = fullest, fullest.total(), left, left.total()
        return seen[key]

    found = []
    for held, lowered in zip(program.placement, lower(program), strict=True):
        fixed = stays({*held}, stages, program, mesh, moments) | {"outside the allocator": float(reserved)}
        always, quantised = sum(fixed.values()), 0
        done: set[tuple[str, int]] = set()
        stock, stocked = Bytes(dict.fromkeys(MOVING, 0)), 0
        messages, curve = Messages(program, stages[0].message), list[tuple[float, float]]()
        best, most = Peak(fixed, ("F", held[0], 0)), 0.0
        for instruction in lowered:
            if instruction[0] in ("SEND", "RECV"):
                messages.post(instruction[0], instruction[1:4])
                continue
            if instruction[0] == "R":
                continue
            for kind, stage, _ in passes(instruction):
                copies = {"F": stages[stage].cached, "B": stages[stage].turned, "I": stages[stage].turned}.get(kind, 0)
                kind = "B" if kind == "I" else kind
                if (kind, stage) not in done:
                    done.add((kind, stage))
                    quantised += copies
            messages.begin(instruction)
            fullest, more, left, change = running(instruction)
            total = always + quantised + (1 + FRAGMENTED) * (stocked + more + messages.bytes)
            if total > most:
                most = total
                parts = {name: float(stock[name] + fullest[name]) for name in MOVING}
                parts["communication buffers"] += messages.bytes
                slack = FRAGMENTED * sum(parts.values())
                parts = {"quantised weights": float(quantised)} | parts | {"fragmentation": slack}
                best = Peak(fixed | parts, instruction, curve)
            stock.update(left)
            stocked += change
            messages.end(instruction)
            curve.append((total, always + quantised + (1 + FRAGMENTED) * (stocked + messages.bytes)))
        found.append(best)
    return found


def remedies(peak: Peak, recipe: Recipe) -> list[str]:
    """What would make a peak lower, the cheapest first."""
    layout, parts = recipe.parallel, peak.parts
    more = [choice for choice in ("norms", "swiglu", "mla_up") if choice not in recipe.train.recompute]
    found = [f"train.recompute=[{','.join([*recipe.train.recompute, *more])}]"] if more else []
    if recipe.optim.moments != "bf16":
        found.append("optim.moments=bf16")
    if layout.microbatch_size > 1:
        found.append(f"parallel.microbatch_size={layout.microbatch_size // 2}")
    if parts["deferred weights"] > 0.1 * peak.total:
        found.append("a schedule that defers no weight gradients, such as 1f1b or dualpipe")
    if parts["parameters"] + parts["gradients"] > 0.4 * peak.total:
        found.append("more ranks for parallel.pipeline or parallel.expert")
    if not more and "layer" not in recipe.train.recompute:
        found.append("train.recompute=[layer]")
    return found
