"""What a checkpoint and the run that takes it up must have in common, and what may differ if the user says so.

`identity` is what decides the course of a training: model, data, precision, optimizer, and what `train` says of
batches, losses and seed. Where to stop, how to log and the layout are not in it: they may change freely.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from parallel.errors import UserError
from train.checkpoint.checkpoints import Saved
from train.recipe import Recipe

DECISIVE = ("seed", "sequence_length", "batch", "mtp_weight", "bias_speed", "balance_alpha", "force_balanced")
"""Keys of `train` that decide what a step computes."""


def identity(recipe: Recipe, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of its run; `fingerprint` is that of the prepared data."""
    whole = asdict(recipe)
    found = {key: whole[key] for key in ("model", "precision", "optim", "train")}
    found["train"] = {key: whole["train"][key] for key in DECISIVE}
    return {**found, "data": {"fingerprint": fingerprint}}


def changes(saved: Saved, now: Mapping[str, Any], allow: list[str]) -> list[str]:
    """What differs between a checkpoint's identity and this run's, each as a line for the log.

    Raises UserError for what `checkpoint.allow` (keys, or sections of keys) does not cover.
    """
    found = list(differences({key: saved.meta.get(key) for key in now}, now))
    refused = [
        (key, before, after) for key, before, after in found if not any(covers(allowed, key) for allowed in allow)
    ]
    if refused:
        fields = ", ".join(f"{key}={after} (saved with {before})" for key, before, after in refused)
        keys = ",".join(key for key, _, _ in refused)
        raise UserError(
            f"{fields}: expected what checkpoint {saved.folder} was saved with, or checkpoint.allow=[{keys}] to go on "
            "with what is new"
        )
    return [f"{key} changes from {before} to {after} after step {saved.step}" for key, before, after in found]


def covers(allowed: str, key: str) -> bool:
    """Whether an entry of `checkpoint.allow` names a key or a section that holds it."""
    return key == allowed or key.startswith(f"{allowed}.")


def differences(saved: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, value now) of every leaf that differs between two JSON-like trees."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for name in sorted({*saved, *now}):
            yield from differences(saved.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif saved != now:
        yield key, saved, now
