"""Who goes where: a population is cut so that local networks stay whole, for the ranks of one owner.

Households and other groups that a model keeps inside a shard (paper, eq. 1: everything but ⊕ is local) hold their
people together; groups that share their sums may be cut. People who are joined through any chain of local groups and
edges form one *cluster*; clusters are dealt out in runs of equal size: in the order of their people or, if that cuts
fewer shared groups, in the order of the shared groups they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lpm.errors import InputError
from lpm.networks import Edges, Groups, Network

__all__ = ["clusters", "partition"]


def partition(networks: Sequence[Network], agents: int, ranks: int) -> NDArray[np.int32]:
    """The rank of each agent [agents].

    Args:
        networks: of the whole population.
        agents: how many there are.
        ranks: over how many processes they are spread.

    Raises:
        InputError: if local networks join so many people that some rank would get less than half of its share; it
            names the network to be declared shared.

    Guarantee: the same for the same networks; no group of a local network and no edge is cut.
    """
    if ranks == 1:
        return np.zeros(agents, dtype=np.int32)
    local = sorted((n for n in networks if not n.shared), key=_largest_group)
    dealt = _deal(clusters(local, agents), networks, ranks)
    if dealt is not None:
        return dealt
    for count in range(len(local) + 1):
        # The first network, from small groups to large, with which no even cut is left.
        if _deal(clusters(local[:count], agents), networks, ranks) is None:
            break
    if count == 0:
        raise InputError(f"{agents} agents can't be spread over {ranks} ranks.", "Use fewer ranks or more agents.")
    name = local[count - 1].name
    remedy = f"Declare {name} with shared=True (and its number of groups), so that only its sums cross ranks"
    if isinstance(local[count - 1], Edges):
        remedy = "Edges can't be cut: run in one process"
    raise InputError(
        f"The local network {name} joins too many agents to be spread over {ranks} ranks: it must stay whole.",
        f"{remedy}, or use fewer ranks.",
    )


def _largest_group(network: Network) -> tuple[int, str]:
    if isinstance(network, Groups):
        sizes = np.bincount(network.cell_of, minlength=1)
        return int(sizes[1:].max(initial=0) if network.outsiders else sizes.max(initial=0)), network.name
    return network.agents, network.name


def clusters(local: Sequence[Network], agents: int) -> NDArray[np.int64]:
    """The cluster of each agent, those joined by any chain of groups and edges, numbered by its first agent [agents].

    Args:
        local: networks.
        agents: how many there are.
    """
    sources: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    nodes = agents
    for network in local:
        if isinstance(network, Edges):
            sources.append(network.source.numpy())
            targets.append(network.reader.numpy())
            continue
        assert isinstance(network, Groups)
        inside = np.flatnonzero(network.cell_of > 0) if network.outsiders else np.arange(network.agents)
        sources.append(inside)
        targets.append(network.cell_of[inside].astype(np.int64) + nodes)
        if network.mixing is not None:
            first, second = np.nonzero(np.asarray(network.mixing))
            sources.append(first + nodes)
            targets.append(second + nodes)
            outside = np.flatnonzero(network.cell_of == 0) if network.outsiders else np.zeros(0, dtype=np.int64)
            sources.append(outside)
            targets.append(np.full(outside.size, nodes, dtype=np.int64))
        nodes += network.cells
    source, target = (np.concatenate([np.zeros(0, dtype=np.int64), *parts]) for parts in (sources, targets))
    graph = coo_array((np.ones(source.size, dtype=np.int8), (source, target)), shape=(nodes, nodes))
    label = connected_components(graph, directed=False)[1][:agents]
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    order = np.empty(first.size, dtype=np.int64)
    order[np.argsort(first)] = np.arange(first.size)
    return order[label]


def _deal(cluster: NDArray[np.int64], networks: Sequence[Network], ranks: int) -> NDArray[np.int32] | None:
    """Deal clusters, numbered by first agent, out evenly; None if some rank would get less than half of its share."""
    sizes = np.bincount(cluster)
    if sizes.size < ranks:
        return None
    shared = sorted((n for n in networks if n.shared), key=lambda n: (n.cells, n.name))
    dealt = [_in_runs(np.arange(sizes.size), sizes, ranks)]
    if shared:
        first = np.unique(cluster, return_index=True)[1]
        by_group = np.lexsort([first, *(n.cell_of[first].astype(np.int64) for n in reversed(shared))])
        dealt.append(_in_runs(by_group, sizes, ranks))
    dealt = [rank for rank in dealt if not _uneven(rank, sizes, ranks, 0.9)]
    if dealt:
        # Agents that follow one another make the faster shard, so that another order must be worth it.
        pieces = [_pieces(shared, rank[cluster], ranks) for rank in dealt]
        return dealt[0 if 0.95 * pieces[0] <= pieces[-1] else -1][cluster]
    # A few large clusters: the largest first, each to the rank that holds the fewest agents so far.
    rank, held = np.empty(sizes.size, dtype=np.int32), np.zeros(ranks, dtype=np.int64)
    for k in np.lexsort([np.arange(sizes.size), -sizes]):
        rank[k] = int(np.argmin(held))
        held[rank[k]] += sizes[k]
    return None if _uneven(rank, sizes, ranks, 0.5) else rank[cluster]


def _in_runs(order: NDArray[np.int64], sizes: NDArray[np.int64], ranks: int) -> NDArray[np.int32]:
    """The rank of each cluster, if clusters in this order are cut into runs of equal size."""
    reached = np.cumsum(sizes[order])
    middle = 2 * reached - sizes[order]  # twice the number of agents up to the middle of each cluster
    rank = np.empty(sizes.size, dtype=np.int32)
    rank[order] = np.minimum(middle * ranks // (2 * reached[-1]), ranks - 1)
    return rank


def _pieces(shared: Sequence[Network], rank_of: NDArray[np.int32], ranks: int) -> int:
    """Into how many pieces the ranks cut all shared groups together."""
    found = 0
    for network in shared:
        seen = np.zeros((network.cells, ranks), dtype=np.bool_)
        seen[network.cell_of, rank_of] = True
        found += int(seen.sum())
    return found


def _uneven(rank: NDArray[np.int32], sizes: NDArray[np.int64], ranks: int, least: float) -> bool:
    held = np.bincount(rank, weights=sizes, minlength=ranks)
    return bool(held.min() < least * sizes.sum() / ranks)
