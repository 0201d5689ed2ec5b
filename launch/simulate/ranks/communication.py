"""What a rank says to others, in order, and whether what several ranks say fits together.

Each collective, send and receive of torch.distributed is an operator of `c10d`, under NCCL and gloo as under PyTorch's
fake process group. `heard` reads such an operator's arguments; `disagreements` compares the logs of ranks that were
looked at one by one: what would hang, or swap data in silence, if they ran together.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, zip_longest
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

OPERATIONS = {
    "alltoall_base_": "all-to-all",
    "allreduce_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "broadcast_": "broadcast",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
}


@dataclass(frozen=True)
class Communicator:
    """A process group: what it is for, and its ranks."""

    use: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One communication, as one rank issues it.

    gives, takes: bytes; of an all-to-all to and from each rank, else of the buffer that is read and the one that is
    written. peer: of a send or receive, its rank in the world.
    """

    operation: str
    group: Communicator
    dtype: str
    gives: tuple[int, ...]
    takes: tuple[int, ...]
    peer: int | None = None

    @property
    def bytes(self) -> int:
        """Of the larger of the two buffers."""
        return max(sum(self.gives), sum(self.takes))


def heard(operator: Any, args: Sequence[Any]) -> Call:
    """The call that an operator of `c10d` is."""
    names = (argument.name for argument in operator._schema.arguments)
    given = dict(zip(names, args, strict=False))  # what has a default may be left out at the end
    group = dist.ProcessGroup.unbox(given["process_group"])
    operation = OPERATIONS[operator._opname]
    reads: Any = next(
        (given[name] for name in ("input", "input_tensor", "input_tensors", "tensors") if name in given), []
    )
    writes: Any = next((given[name] for name in ("output", "output_tensor", "output_tensors") if name in given), reads)
    dtype = next((str(each.dtype).removeprefix("torch.") for each in tree_leaves((reads, writes))), "")
    gives: tuple[int, ...] = (_size(reads),)
    takes: tuple[int, ...] = (_size(writes),)
    if operation == "all-to-all":
        gives = _parts(reads, given["input_split_sizes"], group.size())
        takes = _parts(writes, given["output_split_sizes"], group.size())
    peer = given.get("dst", given.get("src"))
    if peer is not None:
        gives, takes = (gives, ()) if operation == "send" else ((), takes)
    who = _communicator(group)
    return Call(operation, who, dtype, gives, takes, None if peer is None else who.ranks[peer])


def disagreements(logs: Mapping[int, Sequence[Call]]) -> list[str]:
    """What does not fit together in the logs of several ranks, by rank; nothing is known of ranks that have none.

    The collectives on a communicator must be the same on all of its ranks, in order and size, where in an all-to-all
    each rank expects what the other gives. From rank to rank, what one communicator sends must be received, in order.
    """
    collectives: dict[Communicator, dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    messages: dict[tuple[Communicator, int, int], dict[str, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for rank, log in logs.items():
        for call in log:
            if call.peer is None:
                collectives[call.group][rank].append(call)
            elif call.peer in logs:
                way = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
                messages[call.group, *way][call.operation].append(call)
    found = []
    for group, by_rank in collectives.items():
        members = [rank for rank in group.ranks if rank in logs]
        fine: set[tuple[int, ...]] = set()  # what ranks repeat, they repeat together
        for number, calls in enumerate(zip_longest(*(by_rank[rank] for rank in members))):
            these = tuple(map(id, calls))
            if these in fine:
                continue
            fine.add(these)
            if trouble := _unlike(group, dict(zip(members, calls, strict=True))):
                found.append(f"{group.use} of ranks {spans(group.ranks)}: its collective number {number} is {trouble}")
                break  # whatever comes after is shifted
    for (group, source, target), calls_by_side in messages.items():
        pairs = zip_longest(calls_by_side["send"], calls_by_side["receive"])
        for number, (sent, received) in enumerate(pairs):
            if not (sent and received and (sent.gives, sent.dtype) == (received.takes, received.dtype)):
                words = f"{_spell(sent)} on rank {source} and {_spell(received)} on rank {target}"
                found.append(f"{group.use}, from rank {source} to rank {target}: message number {number} is {words}")
                break
    return found


def spans(ranks: Sequence[int]) -> str:
    """Ranks in few characters: 0..127, 1920..2047; or 0..1920 by 128."""
    if len(ranks) > 2 and (step := ranks[1] - ranks[0]) > 1 and list(ranks) == [*range(ranks[0], ranks[-1] + 1, step)]:
        return f"{ranks[0]}..{ranks[-1]} by {step}"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words if len(words) <= 4 else [*words[:2], "...", words[-1]])


# ---------------------------------------------------------------- inside
def _unlike(group: Communicator, calls: Mapping[int, Call | None]) -> str:
    """How the members' calls differ, in words; nothing if they are one and the same collective."""
    kinds = {rank: _kind(call) for rank, call in calls.items()}
    if len(set(kinds.values())) > 1:
        who = {kind: [rank for rank, one in kinds.items() if one == kind] for kind in kinds.values()}
        return "; ".join(f"{_spell(calls[ranks[0]])} on ranks {spans(ranks)}" for ranks in who.values())
    if not any(call and call.operation == "all-to-all" for call in calls.values()):
        return ""
    for one, other in combinations_with_replacement(calls, 2):
        for source, target in ((one, other), (other, one)):
            sender, receiver = calls[source], calls[target]
            assert sender is not None and receiver is not None
            given, taken = sender.gives[group.ranks.index(target)], receiver.takes[group.ranks.index(source)]
            if given != taken:
                return f"an all-to-all in which rank {source} gives {given} bytes to rank {target}, who takes {taken}"
    return ""


def _kind(call: Call | None) -> tuple[Any, ...]:
    """What must be the same on all ranks."""
    if call is None:
        return ()
    sizes = () if call.operation == "all-to-all" else (call.gives, call.takes)
    return call.operation, call.dtype, *sizes


def _spell(call: Call | None) -> str:
    return f"{call.operation} of {call.bytes} bytes, {call.dtype}" if call else "none"


def _communicator(group: dist.ProcessGroup) -> Communicator:
    return _known(group.group_name, group.group_desc, tuple(dist.get_process_group_ranks(group)))


@cache
def _known(name: str, use: str, ranks: tuple[int, ...]) -> Communicator:
    """One object for each, however many calls have it."""
    return Communicator("world" if name == "0" else use, ranks)


def _size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor))


def _parts(rows: Tensor, splits: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Bytes for each rank, of rows that go to so many."""
    width = prod(rows.shape[1:]) * rows.element_size()
    return tuple(count * width for count in splits or [len(rows) // ranks] * ranks)
