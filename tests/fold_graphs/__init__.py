"""Small hard graphs with batch norms, and what ``fold`` must make of each."""

from fold_graphs.base import Graph, randomise
from fold_graphs.forms import FORMS, NORMS
from fold_graphs.layers import AFTER, BEFORE
from fold_graphs.obstacles import DATA, SHARED, USED, WATCHED
from fold_graphs.paths import MERGING, SHUFFLES, SIMPLE

__all__ = ["GRAPHS", "NORMS", "Graph", "randomise"]

GRAPHS: list[Graph] = [
    *AFTER, *BEFORE, *SIMPLE, *SHUFFLES, *MERGING, *SHARED, *USED, *WATCHED, *DATA, *NORMS, *FORMS,
]  # fmt: skip
