"""What a recipe's `precision` and `fp8` mean on this machine."""

import torch

from kernels.fp8.backends import BackendError, resolve
from parallel.errors import UserError
from train.recipe import Recipe


def fp8_backend(recipe: Recipe, device: torch.device) -> str:
    """The FP8 backend of the recipe on `device`. Raises `UserError` for one that cannot run there."""
    if recipe.precision != "fp8":
        return "reference"
    try:
        return resolve(recipe.fp8.backend, device)
    except BackendError as error:
        raise UserError(f"fp8.backend={recipe.fp8.backend}: {error}") from None
