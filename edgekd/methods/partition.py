"""Which filters of a teacher belong together: equal groups of them, by the spectrum or the communities of a graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# A gain below this share of the strongest edge is none: sums in another order would find the opposite.
ROUNDING = 1e-9
# NoNN's: so many filters of an image count, this share of the edges stays, and Louvain's resolution.
MOST_ACTIVE, STRONGEST, RESOLUTION = 50, 0.01, 0.7


def correlations(features: Floats) -> Floats:
    """|corr| [D, D] of features [N, D]; a feature that never changes is correlated with none."""
    centred = features - features.mean(0)
    norms = np.linalg.norm(centred, axis=0)
    unit = np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0)
    graph: Floats = np.abs(unit.T @ unit)
    np.fill_diagonal(graph, 0)
    return graph


def coactivations(features: Floats) -> Floats:
    """The graph [D, D] of filters that answer to the same images, as NoNN's code makes it of features [N, D].

    With a the features of an image, negative ones 0, divided by the largest, and the smaller ones 0 but for 50:

        w_ij = sum over images of a_i a_j |a_i - a_j|,      divided by the largest; the strongest hundredth stays

    Ours: at least as many edges stay as there are filters. NoNN's 256 filters keep 1.3 each by that hundredth, but of
    32 nearly all would be alone.
    """
    active = features.clip(min=0)
    active = np.divide(active, active.max(1, keepdims=True), out=np.zeros_like(active), where=active > 0)
    if (fewer := active.shape[1] - MOST_ACTIVE) > 0:
        np.put_along_axis(active, np.argsort(active, axis=1, kind="stable")[:, :fewer], 0, axis=1)
    graph: Floats = sum((np.outer(a, a) * np.abs(a[:, None] - a) for a in active), np.zeros([active.shape[1]] * 2))
    edges = np.sort(graph[np.triu_indices(len(graph), 1)])
    edges = edges[edges > 0]
    if len(edges):
        kept = min(len(edges), max(len(graph), round(STRONGEST * len(edges))))
        graph = np.where(graph >= edges[-kept], graph / edges[-1], 0.0)
    return graph


def louvain_groups(graph: Floats, count: int) -> list[Indices]:
    """The nodes of a graph with edge weights [D, D] in `count` groups of equal size, after their communities.

    Communities are Louvain's (Blondel, Guillaume, Lambiotte, Lefebvre, J. Stat. Mech. P10008, 2008). NoNN's students
    take what sizes these have; boards are equal, so here the largest goes first, to the group with most room, and what
    has no room there goes on to the next [R].
    """
    import networkx  # torch's, and slow to import

    found = networkx.community.louvain_communities(networkx.from_numpy_array(graph), resolution=RESOLUTION, seed=0)
    size, groups = len(graph) // count, [np.empty(0, np.int64) for _ in range(count)]
    for community in sorted(map(sorted, found), key=lambda one: (-len(one), one)):
        while community:
            number = min(range(count), key=lambda one: len(groups[one]))
            room = size - len(groups[number])
            groups[number] = np.sort(np.append(groups[number], community[:room]))
            community = community[room:]
    return groups


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
