"""Which filters of a teacher belong together: equal groups of correlated ones, by the spectrum of their graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# A gain below this share of the strongest edge is none: sums in another order would find the opposite.
ROUNDING = 1e-9


def correlations(features: Floats) -> Floats:
    """|corr| [D, D] of features [N, D]; a feature that never changes is correlated with none."""
    centred = features - features.mean(0)
    norms = np.linalg.norm(centred, axis=0)
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    graph: Floats = np.abs(unit.T @ unit)
    np.fill_diagonal(graph, 0)
    return graph


def spectral_groups(graph: Floats, count: int) -> list[Indices]:
    """The nodes of a graph with edge weights [D, D] in `count` groups of equal size, strong edges within them.

    Recursive bisection: the Fiedler vector, the eigenvector of the graph's Laplacian with the second smallest
    eigenvalue, orders the nodes; the cut is where the sizes are right, and exchanges mend it (Kernighan and Lin, 1970).
    """

    def split(nodes: Indices, parts: int) -> list[Indices]:
        if parts == 1:
            return [np.sort(nodes)]
        left = parts // 2
        order = nodes[np.argsort(_fiedler(graph[np.ix_(nodes, nodes)]), kind="stable")]
        at = len(nodes) * left // parts
        one, other = _exchanged(graph, order[:at], order[at:])
        return split(one, left) + split(other, parts - left)

    return split(np.arange(len(graph), dtype=np.int64), count)


def _exchanged(graph: Floats, one: Indices, other: Indices) -> tuple[Indices, Indices]:
    """Two groups after all exchanges of one node for one, the best first, that weaken what is between the groups."""
    one, other = one.copy(), other.copy()
    while True:
        drawn_out, drawn_in = (
            graph[np.ix_(own, others)].sum(1) - graph[np.ix_(own, own)].sum(1)
            for own, others in ((one, other), (other, one))
        )
        gains = drawn_out[:, None] + drawn_in[None] - 2 * graph[np.ix_(one, other)]
        i, j = np.unravel_index(gains.argmax(), gains.shape)
        if gains[i, j] <= ROUNDING * graph.max():
            return one, other
        one[i], other[j] = other[j], one[i]


def _fiedler(graph: Floats) -> Floats:
    laplacian = np.diag(graph.sum(1)) - graph
    vector: Floats = np.linalg.eigh(laplacian)[1][:, 1]
    return vector
