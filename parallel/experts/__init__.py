"""Expert parallelism: how tokens reach their experts and come back.

A dispatcher is a strategy: `local` when every expert is here, `all_to_all` straight to the experts' ranks,
`hierarchical` by way of their nodes, and `deepep` by DeepEP's kernels. Dispatch is a linear map from tokens to rows
sorted by expert (a token has one row for each expert that it chose); combine is its transpose. So each also serves as
the other's backward, with the layout that the forward made: nothing is routed twice.
"""

from parallel.experts.all_to_all import AllToAll
from parallel.experts.build import build, choose
from parallel.experts.deepep import DeepEP
from parallel.experts.dispatch import Combine, Dispatch, Dispatcher, Layout, Tag, Traffic
from parallel.experts.hierarchical import Hierarchical
from parallel.experts.local import LocalExperts

__all__ = [
    "AllToAll",
    "Combine",
    "DeepEP",
    "Dispatch",
    "Dispatcher",
    "Hierarchical",
    "Layout",
    "LocalExperts",
    "Tag",
    "Traffic",
    "build",
    "choose",
]
