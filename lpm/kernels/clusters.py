"""What cluster alternates (`lpm.kernels.alternates`) hold, as arrays, and how several compete for one slot.

Only agents near an infection cost more than a plain day. An agent's decision word says "yes" below its probability p;
the words just above it, a window of q, offer the flip "infected after all" with weight ṗ/q. So the dense loop reads the
same tables as a plain one and merely compares with a larger bound, and all else runs over short lists. The loops, numba
compiled on first use and cached on disk, stand in `lpm.kernels.offers` (the actual step and what it offers) and
`lpm.kernels.evolution` (how alternatives go on).
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.cpu import _one_minus_exp
from lpm.philox import word

__all__ = [
    "FLOOR",
    "NOBODY",
    "OLD",
    "SCALE",
    "Day",
    "Flips",
    "Floats",
    "Frame",
    "Fresh",
    "Ints",
    "Slots",
    "compete",
    "hazard",
    "layer_of",
    "race",
    "threshold",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FLOOR = 0.05
"""Smallest size of an offered flip: a smaller one, n, is offered with probability n/FLOOR at 1/that weight."""

SCALE = 4294967296.0
NOBODY, OLD = -2, -1
"""Who wins a slot besides the offers, which are numbered from 0: nobody, or the alternative that has it."""


class Frame(NamedTuple):
    """What does not change in a run.

    Attributes:
        cells: cell of each agent in each network, networks numbered one after another [agents, networks].
        slot: the agent's slot in each layer, −1 for none [agents, layers].
        classes: [agents].
        ids: [agents].
        network: the network of each layer, −1 for the layer of single people [layers].
        layer: the layer of each network, −1 for linear ones [networks].
        first_cell: where a network's cells begin [networks].
        first_slot: where a layer's slots begin [layers + 1].
        first_linear: where a linear network's cells begin among those of linear networks [networks].
        width: slots per group [layers].
        infectivity: [networks, stages].
        infection_edge: or −1 [stages].
        infection_scale: [stages].
        exit_edge: or −1 [stages, branches].
        advance: 1 where leaving adds infectiousness or an outcome, 0 where it takes some [stages, branches].
        edge_of: transition from one stage to another, or −1 [stages, stages].
        target: [edges].
        susceptibility: [classes].
    """

    cells: NDArray[np.int32]
    slot: NDArray[np.int32]
    classes: Ints
    ids: NDArray[np.uint64]
    network: Ints
    layer: Ints
    first_cell: Ints
    first_slot: Ints
    first_linear: Ints
    width: Ints
    infectivity: Floats
    infection_edge: Ints
    infection_scale: Floats
    exit_edge: Ints
    advance: Ints
    edge_of: Ints
    target: Ints
    susceptibility: Floats


class Day(NamedTuple):
    """What a step needs, of one lane.

    Attributes:
        pressure: infectious pressure in each cell [cells].
        share: pressure from one unit of infectivity of a member [cells].
        factor: hazard per unit of pressure [networks].
        factor_dot: its derivatives [networks, P].
        linear: derivatives and reference (last) of the hazard in cells of linear networks [linear cells, P + 1].
        exit: thresholds [stages, branches, classes].
        window: ends of the windows in which a flip is offered [stages, branches, classes].
        exit_weight: derivatives and reference (last) of a flip [stages, branches, classes, P + 1].
        address: step + 1, protocol number, and the two words of the seed [4].
    """

    pressure: Floats
    share: Floats
    factor: Floats
    factor_dot: Floats
    linear: Floats
    exit: Ints
    window: Ints
    exit_weight: Floats
    address: NDArray[np.uint64]


class Slots(NamedTuple):
    """The alternatives of one lane, one per slot.

    Attributes:
        weight: by parameter, the reference last [slots, P + 1].
        excess: infectivity in the own layer less the actual one [slots].
        first: where the list of differing agents begins [slots].
        held: how many they are; 0 for an empty slot [slots].
        seed: the agent it began with, or −1 [slots].
        imported: whether the seed came from another layer [slots].
        generation: grows when the alternative is replaced [slots].
        source: slot of each layer in which the seed differs too, or −1 [slots, layers].
        link: that slot's generation then, or −1 [slots, layers].
        total: sizes of the alternatives that compete [slots].
        best: smallest key among them [slots].
        winner: which has it [slots].
        head: first fresh difference, or −1 [slots].
    """

    weight: Floats
    excess: Floats
    first: Ints
    held: NDArray[np.int32]
    seed: NDArray[np.int32]
    imported: NDArray[np.int8]
    generation: NDArray[np.int32]
    source: NDArray[np.int32]
    link: NDArray[np.int32]
    total: Floats
    best: Floats
    winner: NDArray[np.int32]
    head: NDArray[np.int32]


class Flips(NamedTuple):
    """Decisions of this step that could have come out otherwise.

    Attributes:
        agent: who [flips].
        stage: where they would be now [flips].
        branch: −1 for an infection, else which exit [flips].
        size: |reference weight| [flips].
        factor: of the derivatives of the hazard (infections) [flips].
        length: how many there are [1].
    """

    agent: NDArray[np.int32]
    stage: NDArray[np.int8]
    branch: NDArray[np.int8]
    size: Floats
    factor: Floats
    length: Ints


class Fresh(NamedTuple):
    """Agents who differ in a slot from this step on.

    Attributes:
        agent: who [fresh].
        slot: where [fresh].
        stage: the alternative one [fresh].
        following: next of the same slot, or −1 [fresh].
        length: how many there are [1].
    """

    agent: NDArray[np.int32]
    slot: NDArray[np.int32]
    stage: NDArray[np.int8]
    following: NDArray[np.int32]
    length: Ints


# Functions that run once per slot or agent take arrays, not the tuples above: a call counts references to every array
# of a tuple, which costs more than what the function does.


@nb.njit(nogil=True, cache=True)
def race(identity: np.uint64, address: NDArray[np.uint64], variate: int, size: float) -> float:
    """The key of a candidate: the smallest of several wins with probability ∝ its size, in any order."""
    chosen = word(identity, address[0], address[1] << np.uint64(16) | np.uint64(variate), address[2], address[3])
    return float(-np.log((float(chosen) + 0.5) / SCALE) / size)


@nb.njit(nogil=True, cache=True)
def compete(
    total: Floats,
    best: Floats,
    winner: NDArray[np.int32],
    touched: NDArray[np.int32],
    count: int,
    q: int,
    candidate: int,
    size: float,
    key: float,
) -> int:
    """Let a candidate compete for slot q; returns how many slots are touched now."""
    if winner[q] == NOBODY and total[q] == 0.0:
        touched[count] = q
        count += 1
        best[q] = np.inf
    total[q] += size
    if key < best[q]:
        best[q] = key
        winner[q] = candidate
    return count


@nb.njit(nogil=True, cache=True)
def layer_of(first_slot: Ints, q: int) -> int:
    """The layer of a slot."""
    layer = 0
    while q >= first_slot[layer + 1]:
        layer += 1
    return layer


@nb.njit(nogil=True, cache=True)
def hazard(frame: Frame, day: Day, i: int) -> float:
    """The actual hazard of somebody fully susceptible, in the plain executor's order."""
    total = 0.0
    for n in range(frame.cells.shape[1]):
        total = total + day.factor[n] * day.pressure[frame.cells[i, n]]
    return total


@nb.njit(nogil=True, cache=True)
def threshold(total: float) -> int:
    """A word below this says that a hazard strikes."""
    return int(np.floor(_one_minus_exp(total) * SCALE))
