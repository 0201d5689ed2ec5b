"""A small corpus of odd documents, and configurations that read it from a local file."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from train.data.config import DataConfig


def odd_documents(count: int) -> list[str]:
    """Distinct documents, from a few characters to several rows, in several scripts, one spelling special tokens."""
    random = Random(5)
    words = [
        "def",
        "self",
        "return",
        "x = 12345",
        "naïve",
        "日本語",
        "🧵",
        "\t",
        "\r\n",
        "if (a):\n",
        "    ",
        "...",
        " ",
    ]
    documents = [f"{i}:" + "".join(random.choices(words, k=random.randint(1, 400))) for i in range(count - 1)]
    return [*documents, "ends <|eos_token|> and <|fim_hole|> as text, " * 20]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def documents() -> list[str]:
    return odd_documents(120)


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Callable[..., DataConfig]:
    """`corpus(**changes)` -> configuration of those documents in a JSONL file, with a cache of the test's own."""
    path = write_jsonl(tmp_path / "documents.jsonl", documents)

    def configure(**changes) -> DataConfig:
        options: dict[str, Any] = {"source": "hf", "path": str(path), "heldout": 0.1, "cache": str(tmp_path / "cache")}
        return DataConfig(**(options | changes))

    return configure
