"""Small hard graphs with batch norms, and what ``fold`` must make of each."""

from fold_graphs.base import Graph, randomise
from fold_graphs.layers import AFTER, BEFORE
from fold_graphs.paths import MERGING, SHUFFLES, SIMPLE

__all__ = ["GRAPHS", "Graph", "randomise"]

GRAPHS: list[Graph] = [*AFTER, *BEFORE, *SIMPLE, *SHUFFLES, *MERGING]
