"""The trainer's own step as one rank of many.

`rank` runs it on fake tensors, `communication` compares what ranks say.
"""
