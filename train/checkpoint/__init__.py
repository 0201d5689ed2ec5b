"""Checkpoints by parameter name: `directory` knows which exist and how one is committed, `state` what is inside.

save(directory, step, {**zero.state_dict(), "router_bias": {name: tensor}}, meta, keep_last)
if (step := resume_step(directory, "auto")) is not None:
    state = {**zero.state_dict(), "router_bias": biases}    # the tensors of whatever layout runs now
    meta = load(directory, step, state, expected={"model": ...})
    zero.load_state_dict(state)
"""

from train.checkpoint.directory import committed, newest, read_meta, resume_step
from train.checkpoint.state import load, save

__all__ = ["committed", "load", "newest", "read_meta", "resume_step", "save"]
