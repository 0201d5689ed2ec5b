"""What a recipe's step would cost on a cluster: time, memory and money, without the cluster.

The recipe's own stages run on fake tensors (`world`, `work`), a cluster sheet says what their operators take (`sheet`),
the pipeline's own program is executed with those times (`race`, `engine`), and `result` tells the outcome. Nothing of
the model is written down here: change a layer, and the price follows.
"""
