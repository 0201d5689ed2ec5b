"""A cluster sheet: what a machine's parts can do, as curves fitted to measurements, and where each figure is from.

`recipes/cluster/*.yaml` hold them. A matrix product runs in waves of tiles over the SMs, and takes waves x (begin + k x
each) + launch; what is no product takes its bytes over the memory's rate, or its operations over the unit's. The sheet
knows nothing of models: it answers how long an operator, an exchange or a message takes.
"""

import os
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.resources import files
from math import ceil, inf
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import yaml

from kernels.ops import Cost, Product
from parallel.errors import UserError
from train.recipe import did_you_mean


@dataclass(frozen=True)
class Waves:
    """Matrix products of one precision: waves x (begin + k x each) + launch; a wave is one tile on each SM."""

    begin: float
    each: float
    launch: float
    tile: tuple[int, int] = (128, 128)

    def seconds(self, product: Product, sms: int) -> float:
        """One product of `product.groups` parts."""
        rows, columns = self.tile
        tiles = ceil(product.m / rows) * ceil(product.n / columns)
        return ceil(tiles / sms) * (self.begin + product.k * self.each) + self.launch


@dataclass(frozen=True)
class Line:
    """Calls of one operator: call + turns x turn + operations x operation + bytes x byte; seconds each.

    A turn is one block of 128 along the contracted width of one matrix product: what FP8's reference loops over.
    """

    call: float
    turn: float = 0.0
    operation: float = 0.0
    byte: float = 0.0

    @staticmethod
    def features(cost: Cost) -> tuple[float, float, float, float]:
        """What the four coefficients are multiplied by."""
        turns = sum(product.groups * ceil(product.k / 128) for product in cost.products)
        return 1, turns, cost.flops, cost.bytes

    def seconds(self, cost: Cost) -> float:
        """Of one call."""
        _, turns, operations, size = self.features(cost)
        return self.call + turns * self.turn + operations * self.operation + size * self.byte


def operator_key(name: str, cost: Cost) -> str:
    """Under which name `Sheet.operators` has an operator: products of unlike precision have curves of their own."""
    return f"{name}.{cost.unit}" if cost.products else name


@dataclass(frozen=True)
class Link:
    """bytes_per_second of one GPU in one direction, and seconds until the first byte arrives."""

    bytes_per_second: float
    latency: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bytes_per_second


@dataclass(frozen=True)
class Cores:
    """Of a machine whose ranks are processes on its cores: how many there are, and what more than operators uses them.

    together, crowded: how many times as much processor time everything takes while all cores are busy, and while there
    are more busy processes than cores. between: seconds of Python for each operator, and between_fp8 more for a product
    in FP8. message: processor time of an exchange or a message. pace: seconds of calibration's yardstick when all this
    was measured (`launch.calibrate.pace`). paces: how many times as long everything takes on each core; 1 unless told.
    """

    count: int
    together: float
    between: float
    message: Link
    crowded: float = 1.0
    between_fp8: float = 0.0
    pace: float = 0.0
    paces: tuple[float, ...] = ()

    def python(self, key: str) -> float:
        """Seconds that Python takes for an operator beside it; key: `operator_key`."""
        return self.between + (self.between_fp8 if key.endswith(".fp8") else 0.0)


@dataclass(frozen=True)
class Sheet:
    """One cluster. Times are seconds, sizes bytes, rates per second and GPU.

    products: by unit ("fp8", "bf16", "fp32"). attention: operations per second and SM, by operator. memory: bytes per
    second. launch: the least that any operator takes. exchange: what an expert exchange across nodes reaches while
    GEMMs run beside it; exchange_alone: with nothing beside it. comm_sms: those that GEMMs leave to it. read: the
    host's wait for numbers that are there. gap: seconds that it leaves a GPU idle between two instructions. copy_out,
    storage: from a GPU to its host, and from there to where checkpoints lie. reserved: bytes that the framework cannot
    allocate, for contexts and communicators. These four are 0 where nobody knows. operators: measured one by one
    (`operator_key`); they go before all other curves. optimizer: bytes per second, the memory's unless told. cores:
    of a machine whose ranks have no device of their own. provenance: of every figure.
    """

    name: str
    gpus: int
    node_size: int
    sms: int
    memory_bytes: int
    price_per_hour: float
    peak: dict[str, float]
    products: dict[str, Waves]
    attention: dict[str, float]
    memory: float
    launch: float
    inside: Link
    across: Link
    exchange: Link
    exchange_alone: Link
    comm_sms: int
    read: float
    gap: float = 0.0
    copy_out: float = 0.0
    storage: float = 0.0
    reserved: int = 0
    operators: dict[str, Line] = field(default_factory=dict)
    optimizer: float = 0.0
    cores: Cores | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return self.gpus // self.node_size

    def seconds(self, cost: Cost, name: str, sms: int | None = None) -> float:
        """How long an operator takes on `sms` of the SMs (all, unless told)."""
        sms = sms or self.sms
        key = operator_key(name, cost)
        if measured := self.operators.get(key):
            return measured.seconds(cost) * self.sms / sms + (self.cores.python(key) if self.cores else 0.0)
        if cost.products and cost.unit in self.products:
            curve = self.products[cost.unit]
            return sum(curve.seconds(product, sms) for product in cost.products)
        moved = cost.bytes / self.memory
        if cost.products:
            return self.launch + max(moved, cost.flops / self.peak.get(cost.unit, min(self.peak.values())))
        if cost.unit == "attention":
            rate = self.attention.get(name, self.peak["bf16"] / self.sms)
            return self.launch + max(moved, cost.flops / (rate * sms))
        return max(self.launch, moved)

    def covers(self, cost: Cost, name: str) -> bool:
        """Whether an operator's time comes from a curve or the memory's rate, and not from a bare peak."""
        if operator_key(name, cost) in self.operators:
            return True
        if cost.products:
            return cost.unit in self.products
        return cost.unit == "vector" or name in self.attention

    def exchange_seconds(self, inside: float, across: float, beside: bool = True) -> float:
        """An exchange of rows that sends these bytes; of the hops across and inside the faster hides under the slower.

        beside: whether GEMMs run meanwhile.
        """
        if not across:
            return self.inside.seconds(inside) if inside else 0.0
        link = self.exchange if beside else self.exchange_alone
        return link.latency + max(across / link.bytes_per_second, inside / self.inside.bytes_per_second)


# ---------------------------------------------------------------- reading one
LOCAL = "local"


def local_path() -> Path:
    """Where `weft calibrate` leaves the sheet of this machine: under $WEFT_CACHE, else ~/.cache/weft."""
    return Path(os.environ.get("WEFT_CACHE") or "~/.cache/weft").expanduser() / "cluster" / f"{LOCAL}.yaml"


def sheet_names() -> list[str]:
    """Names of weft's own sheets."""
    folder = files("recipes") / "cluster"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read(cluster: str) -> Sheet:
    """The sheet `NAME`, or that of a file `PATH.yaml`. Raises `UserError` for what is unknown or incomplete."""
    path = Path(cluster)
    if cluster == LOCAL:
        path = local_path()
        if not path.is_file():
            raise UserError(
                f"cluster={LOCAL}: {path} does not exist; expected this machine's sheet: run weft calibrate"
            )
    if path.suffix == ".yaml" and path.is_file():
        text = path.read_text()
    elif cluster in sheet_names():
        text = (files("recipes") / "cluster" / f"{cluster}.yaml").read_text()
    else:
        raise UserError(
            f"cluster={cluster}: expected one of {', '.join([*sheet_names(), LOCAL])}, or an existing .yaml file"
            + did_you_mean(cluster, [*sheet_names(), LOCAL])
        )
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"cluster={cluster}: expected plain YAML; {' '.join(str(error).split())}") from None
    sheet = _fill(Sheet, found, f"cluster={cluster}")
    assert isinstance(sheet, Sheet)
    if sheet.cores and sheet.cores.paces:
        check_paces(sheet.cores, f"cluster={cluster}: cores: paces")
    return sheet


def check_paces(cores: Cores, place: str) -> None:
    """Raise `UserError` unless there is one for each core."""
    paces = cores.paces
    if len(paces) != cores.count or not all(isinstance(pace, int | float) and 0 < pace < inf for pace in paces):
        raise UserError(f"{place}: {list(paces)}, expected {cores.count} numbers above 0, one for each core")


def _fill(kind: Any, value: Any, place: str) -> Any:
    """`value`, as YAML has it, in the dataclass or type that the sheet wants there."""
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{place}: {value!r}, expected a section with {', '.join(f.name for f in fields(kind))}")
        known = {each.name: each for each in fields(kind)}
        for key in value:
            if key not in known:
                raise UserError(f"{place}: {key}: no such figure in a sheet{did_you_mean(key, list(known))}")
        hints = get_type_hints(kind)
        for name in known:
            if name not in value and name not in _optional(kind):
                raise UserError(f"{place}: {name} is missing; expected {_words(hints[name])}")
        return cast(Any, kind)(**{key: _fill(hints[key], item, f"{place}: {key}") for key, item in value.items()})
    if get_origin(kind) is UnionType:  # a section that a sheet may leave out
        return _fill(get_args(kind)[0], value, place)
    if getattr(kind, "__origin__", None) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{place}: {value!r}, expected a section")
        return {str(key): _fill(get_args(kind)[1], item, f"{place}.{key}") for key, item in value.items()}
    if getattr(kind, "__origin__", None) is tuple:
        if not isinstance(value, list):
            raise UserError(f"{place}: {value!r}, expected a list of numbers")
        return tuple(value)
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise UserError(f"{place}: {value!r}, expected {_words(kind)}") from None


def _optional(kind: Any) -> set[str]:
    return {each.name for each in fields(kind) if each.default is not MISSING or each.default_factory is not MISSING}


def _words(kind: Any) -> str:
    return {int: "an integer", float: "a number", str: "text"}.get(kind, "a section")
