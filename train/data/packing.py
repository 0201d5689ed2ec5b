"""Documents end to end, cut into rows of fixed length and written as one Arrow file.

There is no padding and no mask between documents (report section 4.1); a document may run over several rows. What is
left at the end of a split and does not fill a row is dropped, and counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass
class Packed:
    """What one split came to; `targets[v]` counts token `v` over all positions of its rows but each row's first."""

    targets: np.ndarray
    rows: int = 0
    dropped: int = 0


def write(path: Path, streams: Iterable[np.ndarray], row_length: int, vocab_size: int, dtype: type) -> Packed:
    """Pack token arrays of any length into rows of `row_length` at `path`: one column `tokens` of fixed-size lists.

    Raises `ValueError` for a token beyond `0 .. vocab_size-1`.
    """
    schema = pa.schema({"tokens": pa.list_(pa.from_numpy_dtype(dtype), row_length)})
    packed = Packed(targets=np.zeros(vocab_size, dtype=np.int64))
    rest: np.ndarray = np.empty(0, dtype)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for stream in streams:
            if stream.size and not 0 <= stream.min() <= stream.max() < vocab_size:
                raise ValueError(f"tokens {stream.min()} to {stream.max()}: expected 0 to {vocab_size - 1}")
            tokens = np.concatenate([rest, stream])
            count = len(tokens) // row_length
            whole, rest = np.split(tokens, [count * row_length])
            packed.rows += count
            packed.targets += np.bincount(whole.reshape(-1, row_length)[:, 1:].ravel(), minlength=vocab_size)
            column = pa.FixedSizeListArray.from_arrays(pa.array(whole), row_length)
            writer.write_batch(pa.record_batch([column], schema=schema))
    packed.dropped = len(rest)
    return packed
