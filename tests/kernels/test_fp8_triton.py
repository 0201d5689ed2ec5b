"""The Triton kernels, in Triton's interpreter, and without Triton.

The interpreter is switched on by the environment before triton is imported, so its tests run in a process of their own.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")


def triton_version() -> Version:
    """Zero where there is none, as outside Linux."""
    try:
        return Version(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return Version("0")


@pytest.mark.skipif(
    triton_version() < Version("3.9"), reason="needs the interpreter of triton 3.9, which knows NumPy 2.4"
)
def test_kernels_index_mask_and_scale_as_the_reference_does():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", str(INTERPRETED)]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_kernels_import_without_triton_and_the_backend_says_what_is_missing():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import kernels.fp8, kernels.linear\n"
        "try: import kernels.fp8.backends.triton\n"
        "except ImportError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0 and "triton" in ran.stdout, ran.stdout + ran.stderr
