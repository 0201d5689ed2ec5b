"""The trainer's own step as one rank of many.

`rank` runs it on fake tensors, where a `witness` looks on and passes are `repeating` themselves; `communication`
compares what ranks say, `report` tells it.
"""
