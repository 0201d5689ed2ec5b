"""Checkpoints by parameter name, whole or not there, that any layout writes and any other reads.

`checkpoints` is what a run uses: save behind the training, find the newest that is whole, load. Beneath it `directory`
knows which names mean a whole one and `disk` the steps that make one; `manifest` says what is in it, `shards` are its
files. `resuming` compares a checkpoint with the run that takes it up; `export` turns one into a model for inference.
docs/explanations/checkpoints.md tells why.
"""

from train.checkpoint.checkpoints import Checkpoints, Saved

__all__ = ["Checkpoints", "Saved"]
