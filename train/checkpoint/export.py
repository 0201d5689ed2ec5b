"""A checkpoint as a model for inference: Hugging Face's safetensors, BF16, under the names of the released weights.

Stacked experts become one matrix each, every MTP module gets its copies of embedding and head, as released. What comes
out has no manifest and no optimizer: nothing takes it for a checkpoint. Parameters are read from the masters, or from
their average, one file of the result at a time.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from parallel.errors import UserError
from train.checkpoint import directory as names
from train.checkpoint import shards
from train.checkpoint.manifest import DTYPES, Manifest
from train.checkpoint.shards import Part


@dataclass(frozen=True)
class Source:
    """Where an exported tensor lies: elements from `start` on of the checkpoint's tensor `name`, as `shape`."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def export(run: Path, out: Path, average: bool = False, step: int | None = None, file_bytes: int = 5 * 10**9) -> int:
    """Write the model of a run's checkpoint of `step` (None: the newest that is whole) to `out`; returns the step.

    average: the parameters' average instead of themselves. Raises UserError if there is no such checkpoint, it is
    damaged or holds no average, or if `out` has something in it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: expected a folder that does not exist or is empty")
    folder, manifest = whole(run / "checkpoints", step)
    if average and not any(name.startswith("ema.") for name in manifest.tensors):
        raise UserError(f"--ema: {folder} holds no average of the parameters; expected a run with optim.ema_decay")
    model = manifest.meta["model"]
    tensors = dict(sources(manifest, "ema" if average else "master", model))
    meta = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in tensors.items()}
    plan = split_state_dict_into_shards_factory(
        meta,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=file_bytes,
    )
    draft = out.with_name(f"{out.name}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for file, held in plan.filename_to_tensors.items():
            read = {name: tensor_of(folder, manifest, tensors[name]) for name in held}
            save_file(read, draft / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        (draft / "config.json").write_text(json.dumps(config_of(model), indent=2))
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write into; {error}") from error
    return manifest.step


def whole(directory: Path, step: int | None) -> tuple[Path, Manifest]:
    """The checkpoint of a step, or the newest whole one, every file of it verified."""
    steps = names.committed(directory)
    if not steps or (step is not None and step not in steps):
        there_are = ", ".join(map(str, steps)) or "no checkpoint"
        raise UserError(f"{directory}: expected a checkpoint{f' of step {step}' if step else ''}; it has {there_are}")
    problems: list[str] = []
    for each in [step] if step is not None else reversed(steps):
        folder = names.path_of(directory, each)
        try:
            manifest = Manifest.of(folder, each)
        except UserError as damaged:
            problems.append(str(damaged))
            continue
        found = shards.verify(folder, manifest, list(manifest.files), os.cpu_count() or 1)
        if not found:
            return folder, manifest
        problems += found
    raise UserError("; ".join(problems))


def sources(manifest: Manifest, key: str, model: dict[str, Any]) -> Iterator[tuple[str, Source]]:
    """(name in the released weights, where it lies) of every tensor of the model."""
    inner = model["moe_intermediate_size"]
    for stored, tensor in manifest.tensors.items():
        part, _, name = stored.partition(".")
        if part == "router_bias":
            yield name, Source(stored, 0, tensor.shape, DTYPES[tensor.dtype])
        elif part == key and ".experts." in name:
            experts, rows, width = tensor.shape
            prefix, _, kind = name.rpartition(".")
            split = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
            height = inner if len(split) == 2 else rows
            for expert in range(experts):
                for place, each in enumerate(split):
                    start = (expert * rows + place * height) * width
                    yield f"{prefix}.{expert}.{each}.weight", Source(stored, start, (height, width))
        elif part == key:
            yield name, Source(stored, 0, tensor.shape)
    for depth in range(model["num_nextn_predict_layers"]):
        layer = f"model.layers.{model['num_hidden_layers'] + depth}"
        copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
        for copy, name in copies.items():
            yield f"{layer}.{copy}.weight", Source(f"{key}.{name}", 0, manifest.tensors[f"{key}.{name}"].shape)


def tensor_of(folder: Path, manifest: Manifest, source: Source) -> torch.Tensor:
    """An exported tensor, read from wherever its elements lie."""
    stored = manifest.tensors[source.name]
    flat = torch.empty(prod(source.shape), dtype=DTYPES[stored.dtype])
    shards.read(folder, manifest, [Part(source.name, flat, source.start, stored.shape)], threads=1)
    return flat.view(source.shape).to(source.dtype)


def config_of(model: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's `config.json` of a model of weft's."""
    sizes = {key: value for key, value in model.items() if key not in ("rope_scaling", "initializer_range")}
    scaling = {"type": "yarn", **model["rope_scaling"]} if model["rope_scaling"] else None
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **sizes,
        "num_key_value_heads": model["num_attention_heads"],
        "rope_scaling": scaling,
        "initializer_range": model["initializer_range"],
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
