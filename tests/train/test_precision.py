"""What a recipe's FP8 backend means on a machine, and the one message when it cannot be."""

import pytest
import torch

from parallel.errors import UserError
from train.compose import compose
from train.precision import fp8_backend

CPU = torch.device("cpu")


def test_auto_is_the_reference_on_a_cpu_and_without_fp8():
    assert fp8_backend(compose(["recipe=tiny"]), CPU) == "reference"
    assert fp8_backend(compose(["recipe=tiny", "precision=bf16"]), torch.device("cuda")) == "reference"


@pytest.mark.parametrize("name", ["triton", "transformer_engine"])
def test_a_backend_that_cannot_run_here_is_named_with_what_it_needs_and_what_would_work(name):
    with pytest.raises(UserError) as error:
        fp8_backend(compose(["recipe=tiny", f"fp8.backend={name}"]), CPU)
    assert str(error.value).startswith(f"fp8.backend={name}: needs a GPU of compute capability 9.0")
    assert str(error.value).endswith("torch sees none here; expected auto or reference")
