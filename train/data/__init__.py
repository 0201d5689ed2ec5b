"""From text to rows of tokens: what a run reads, and in which order.

`preparation` turns a source (`sources`) into memory-mapped rows once: `corpus` shuffles and splits the documents,
`fim` rearranges some, `tokenizer` learns or loads a byte-level BPE, `packing` lays them end to end. `rows` reads the
result by number, `sampler` says which rows stand at which positions of the run, and `config` is the recipe's section.
"""

from train.data.config import DataConfig
from train.data.preparation import Prepared, load, prepare
from train.data.rows import Rows
from train.data.sampler import row_ids

__all__ = ["DataConfig", "Prepared", "Rows", "load", "prepare", "row_ids"]
