"""A cluster sheet: what a machine's parts can do, as curves fitted to measurements, and where each figure is from.

`recipes/cluster/*.yaml` hold them. A matrix product runs in waves of tiles over the SMs, and takes waves x (begin + k x
each) + launch; what is no product takes its bytes over the memory's rate, or its operations over the unit's. The sheet
knows nothing of models: it answers how long an operator, an exchange or a message takes.
"""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

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
class Link:
    """bytes_per_second of one GPU in one direction, and seconds until the first byte arrives."""

    bytes_per_second: float
    latency: float

    def seconds(self, size: int) -> float:
        return self.latency + size / self.bytes_per_second


@dataclass(frozen=True)
class Sheet:
    """One cluster. Times are seconds, sizes bytes, rates per second and GPU.

    products: by unit ("fp8", "bf16", "fp32"). attention: operations per second and SM, by operator. memory: bytes per
    second. launch: the least that any operator takes. exchange: what an expert exchange across nodes reaches while
    GEMMs run beside it; exchange_alone: with nothing beside it. comm_sms: those that GEMMs leave to it. read: the
    host's wait for numbers that are there. provenance: of every figure.
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
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return self.gpus // self.node_size

    def seconds(self, cost: Cost, name: str, sms: int | None = None) -> float:
        """How long an operator takes on `sms` of the SMs (all, unless told)."""
        sms = sms or self.sms
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
        if cost.products:
            return cost.unit in self.products
        return cost.unit == "vector" or name in self.attention

    def exchange_seconds(self, inside: int, across: int, beside: bool = True) -> float:
        """An exchange of rows that sends these bytes; of the hops across and inside the faster hides under the slower.

        beside: whether GEMMs run meanwhile.
        """
        if not across:
            return self.inside.seconds(inside) if inside else 0.0
        link = self.exchange if beside else self.exchange_alone
        return link.latency + max(across / link.bytes_per_second, inside / self.inside.bytes_per_second)


# ---------------------------------------------------------------- reading one
def sheet_names() -> list[str]:
    """Names of weft's own sheets."""
    folder = files("recipes") / "cluster"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read(cluster: str) -> Sheet:
    """The sheet `NAME`, or that of a file `PATH.yaml`. Raises `UserError` for what is unknown or incomplete."""
    path = Path(cluster)
    if path.suffix == ".yaml" and path.is_file():
        text = path.read_text()
    elif cluster in sheet_names():
        text = (files("recipes") / "cluster" / f"{cluster}.yaml").read_text()
    else:
        raise UserError(
            f"cluster={cluster}: expected one of {', '.join(sheet_names())}, or an existing .yaml file"
            + did_you_mean(cluster, sheet_names())
        )
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"cluster={cluster}: expected plain YAML; {' '.join(str(error).split())}") from None
    sheet = _fill(Sheet, found, f"cluster={cluster}")
    assert isinstance(sheet, Sheet)
    return sheet


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
    if getattr(kind, "__origin__", None) is dict:
        if not isinstance(value, dict):
            raise UserError(f"{place}: {value!r}, expected a section")
        return {str(key): _fill(get_args(kind)[1], item, f"{place}.{key}") for key, item in value.items()}
    if getattr(kind, "__origin__", None) is tuple:
        return tuple(value)
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise UserError(f"{place}: {value!r}, expected {_words(kind)}") from None


def _optional(kind: Any) -> set[str]:
    return {each.name for each in fields(kind) if each.default is not MISSING or each.default_factory is not MISSING}


def _words(kind: Any) -> str:
    return {int: "an integer", float: "a number", str: "text"}.get(kind, "a section")
