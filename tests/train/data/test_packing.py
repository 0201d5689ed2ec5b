"""Packing keeps every token in its order, and counts what it drops."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import packing
from train.data.rows import Rows


@given(
    streams=st.lists(st.lists(st.integers(0, 9), max_size=40), max_size=8),
    row_length=st.integers(2, 12),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_rows_and_the_dropped_rest_are_the_stream(streams, row_length, dtype):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        packed = packing.write(path, [np.array(s, dtype) for s in streams], row_length, 10, dtype)
        with pa.ipc.open_stream(path) as reader:
            rows = reader.read_all()["tokens"].to_pylist()
        flat = [token for stream in streams for token in stream]
        assert [token for row in rows for token in row] == flat[: len(flat) - packed.dropped]
        assert packed.rows == len(rows) == len(flat) // row_length
        assert packed.dropped == len(flat) % row_length
        targets = Counter(token for row in rows for token in row[1:])
        assert packed.targets.tolist() == [targets[token] for token in range(10)]


@pytest.mark.parametrize("token", [10, -1, 2**31 - 1])
def test_token_beyond_the_vocabulary_is_refused(tmp_path, token):
    with pytest.raises(ValueError, match="expected 0 to 9"):
        packing.write(tmp_path / "rows.arrow", [np.array([1, token], np.int32)], 2, 10, np.int32)


def test_rows_are_read_by_number_in_any_order(tmp_path):
    tokens = np.arange(600, dtype=np.uint16)
    packing.write(tmp_path / "rows.arrow", [tokens[:250], tokens[250:]], 6, 600, np.uint16)
    rows = Rows(tmp_path / "rows.arrow")
    assert len(rows) == 100
    read = rows[[99, 0, 40, 40]]
    assert read.tolist() == [tokens[6 * i : 6 * i + 6].tolist() for i in (99, 0, 40, 40)]
    assert str(read.dtype) == "torch.int64"
    assert rows[[]].shape == (0, 6)
    with pytest.raises(IndexError):
        rows[[100]]
