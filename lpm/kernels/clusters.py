"""What cluster alternates (`lpm.kernels.alternates`) hold, as arrays, and how several compete for one slot.

Only agents near an infection cost more than a plain day. An agent's decision word says "yes" below its probability p;
the words just above it, a window of q, offer the flip "infected after all" with weight ṗ/q. So the dense loop reads
tables of bytes as a plain one does (`lpm.kernels.cpu`) and merely compares with a larger bound. The window is as wide
as the flip's mass: about as many flips are offered as events happen, each of the size of one. Only where that is
seldom, early in an epidemic, when every event weighs much, are more and smaller ones offered (`chance`).

Only alternatives in which something may happen cost anything. Most of those held late in an epidemic are settled: who
differs has nothing left to decide and infects nobody, here or in truth. A slot's status says so, in one byte; a settled
one is left alone until somebody of its group moves or something competes for it, and what it adds to the derivatives of
people per stage stays as it is.

Threads share the agents in the actual step and the slots afterwards, a range of each layer to each. Sums of weights are
kept by runs of slots and added up in their order: which thread does what changes no bit. The loops, numba compiled
on first use and cached on disk, stand in `lpm.kernels.offers` (the actual step and what it offers) and
`lpm.kernels.evolution` (how alternatives go on).
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
from numpy.typing import NDArray

from lpm.kernels.addresses import Addresses, byte_column, column
from lpm.philox import word

__all__ = [
    "BARE",
    "GONE",
    "HELD",
    "LIVE",
    "LONGEST",
    "NOBODY",
    "NOWHERE",
    "OLD",
    "RUNS",
    "SCALE",
    "SELDOM",
    "SHORTEST",
    "SMALLEST",
    "TOUCHED",
    "Day",
    "Flips",
    "Floats",
    "Frame",
    "Fresh",
    "Ints",
    "Outcome",
    "Part",
    "Sent",
    "Slots",
    "active",
    "chance",
    "identity_of",
    "key_of",
    "layer_of",
    "own_slot",
    "race",
    "word_of",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SMALLEST = 0.05
"""Smallest size of an offered flip, unless every one is offered."""

SELDOM = 0.005
"""Flips are offered in the size of one event where that makes more of them than this, by agent and day."""

SCALE = 4294967296.0
GONE, NOBODY, OLD, HELD = -4, -3, -2, -1
"""Who has a slot after a step, besides the offers, which are numbered from 0: the alternative ends, nothing has been
looked at, it goes on, it goes on against offers."""

NOWHERE = np.int8(-128)
"""In place of a distance between slots: there is no other slot."""

LIVE, TOUCHED = np.uint8(1), np.uint8(2)
"""Status of a slot: somebody who differs may move, or infects, in the alternative or in truth; somebody moved or
competes in this step."""

RUNS, SHORTEST = 16, 1 << 12
"""The slots of a layer are cut into at most so many runs, of at least so many slots; sums are kept by run."""

LONGEST = 1 << 14
"""Most slots of a stretch. Loops list a stretch's active slots at a time: a list of all would be 4 bytes of each."""


class Frame(NamedTuple):
    """What does not change in a run.

    Attributes:
        cells: columns (`lpm.kernels.addresses`): each agent's cell in each network [networks].
        slot: columns: each agent's group in each layer, and which of its slots is theirs; or their slot, −1 for none
            [layers, 2].
        layout: first slot of the first group and slots per group, or 0 and 1; see `own_slot` [layers, 2].
        classes: class of each agent; empty where there is only one [agents].
        first_id: the first id, where they follow one another.
        ids: every id, where they don't; else empty [agents].
        network: the network of each layer, −1 for the layer of single people [layers].
        layer: the layer of each network, −1 for linear ones [networks].
        first_cell: where a network's cells begin among all [networks].
        first_slot: where a layer's slots begin [layers + 1].
        alone: where the slots of people outside all groups of a layer begin [layers].
        run: slots of a run of each layer [layers].
        graph: the number of each network among those of edges (graphs), or −1 [networks].
        sources: columns: over edges, where those whom each agent reads begin, and who they are [networks, 2].
        first_linear: where a linear network's cells begin among those of linear networks [networks].
        width: slots per group [layers].
        infectivity: [networks, stages].
        infection_edge: or −1 [stages].
        infection_scale: [stages].
        exit_edge: or −1 [stages, branches].
        busy: 1 where there is something to decide, or infectivity [stages].
        loud: 1 where there is infectivity [stages].
        advance: 1 where leaving adds infectiousness or an outcome, 0 where it takes some [stages, branches].
        edge_of: transition from one stage to another, or −1 [stages, stages].
        target: [edges].
        susceptibility: [classes].
    """

    cells: Addresses
    slot: Addresses
    layout: Ints
    classes: NDArray[np.int16]
    first_id: np.uint64
    ids: NDArray[np.uint64]
    network: Ints
    layer: Ints
    first_cell: Ints
    first_slot: Ints
    alone: Ints
    run: Ints
    graph: Ints
    sources: Addresses
    first_linear: Ints
    width: Ints
    infectivity: Floats
    infection_edge: Ints
    infection_scale: Floats
    exit_edge: Ints
    busy: NDArray[np.int8]
    loud: NDArray[np.int8]
    advance: Ints
    edge_of: Ints
    target: Ints
    susceptibility: Floats


class Day(NamedTuple):
    """What a step needs, of one lane.

    Attributes:
        pressure: infectious pressure in each cell [cells].
        code: a bound of what decides or offers a flip there, as a byte (`lpm.kernels.cpu`) [cells].
        base: words below this may decide or offer something, by stage and class [stages · classes].
        reach: how much a unit of code adds to it [stages · classes].
        among: columns (`lpm.kernels.addresses`): how many people of a cell a member's infectivity is shared out among
            [networks].
        factor: hazard per unit of pressure [networks].
        factor_dot: its derivatives [networks, P].
        linear: derivatives and reference (last) of the hazard in cells of linear networks [linear cells, P + 1].
        sent: reference of what each agent's differences add to each sum over edges [graphs, agents].
        exit: thresholds [stages, branches, classes].
        window: ends of the windows in which a flip is offered [stages, branches, classes].
        exit_weight: derivatives and reference (last) of a flip [stages, branches, classes, P + 1].
        address: step + 1, protocol number, and the two words of the seed [4].
    """

    pressure: Floats
    code: NDArray[np.uint8]
    base: Floats
    reach: Floats
    among: Addresses
    factor: Floats
    factor_dot: Floats
    linear: Floats
    sent: Floats
    exit: Ints
    window: Ints
    exit_weight: Floats
    address: NDArray[np.uint64]


class Slots(NamedTuple):
    """The alternatives of one lane, one per slot.

    Attributes:
        weight: by parameter, the reference last [slots, P + 1].
        excess: infectivity in the own layer less the actual one, rounded to 24 bits [slots].
        status: see `LIVE` and `TOUCHED` [slots].
        first: where the list of differing agents begins, or −1 if it never had one [slots].
        held: how many they are; 0 for an empty slot [slots].
        winner: the last offer to the slot, from which a chain leads through all; then, who has it [slots].

    Only if there are several layers or edges, else empty:
        seed: the agent it began with, or −1 [slots].
        imported: whether the seed came from another layer [slots].

    Only if there are several layers, else empty:
        generation: grows when the alternative is replaced; a link would have to last through 65,536 of them to be
            taken for another [slots].
        apart: how far from the seed's own slot the one in which it differs too lies, in each other layer, or `NOWHERE`
            [slots, layers − 1].
        link: that slot's generation then [slots, layers − 1].

    Only if there are edges, else empty:
        via: whose differences over edges the seed's began with, or −1 [slots].
        left: the part of the neighbours whom the seed has not infected yet, over each graph's edges [slots, graphs].
    """

    weight: Floats
    excess: NDArray[np.float32]
    status: NDArray[np.uint8]
    first: NDArray[np.int32]
    held: NDArray[np.uint8]
    winner: NDArray[np.int32]
    seed: NDArray[np.int32]
    imported: NDArray[np.int8]
    generation: NDArray[np.uint16]
    apart: NDArray[np.int8]
    link: NDArray[np.uint16]
    via: NDArray[np.int32]
    left: NDArray[np.float32]


class Flips(NamedTuple):
    """Decisions of this step that could have come out otherwise.

    Attributes:
        agent: who [flips].
        stage: where they would be now [flips].
        branch: −1 for an infection, else which exit [flips].
        size: |reference weight|, by which it competes [flips].
        factor: of the derivatives of the hazard (infections); the stage left (exits) [flips].
        via: whose differences over edges it is due to, or −1; empty without edges [flips].
        following: the offer before it to the agent's slot of a layer, or −1 [flips, layers].
        chosen: random word of its race there [flips, layers].
        span: begin and end of those that each thread found [threads, 2].
    """

    agent: NDArray[np.int32]
    stage: NDArray[np.int8]
    branch: NDArray[np.int8]
    size: NDArray[np.float32]
    factor: NDArray[np.float32]
    via: NDArray[np.int32]
    following: NDArray[np.int32]
    chosen: NDArray[np.uint32]
    span: Ints


class Fresh(NamedTuple):
    """Agents who differ in a slot from this step on.

    Attributes:
        agent: who [fresh].
        slot: where [fresh].
        stage: the alternative one [fresh].
        following: the offer before it to the agent's slot of a layer, or −1; in the layer of `slot`, to that [fresh,
            layers].
        span: begin and end of those that each thread found [threads, 2].

    Among the offers to a slot they are numbered after the room for flips.
    """

    agent: NDArray[np.int32]
    slot: NDArray[np.int32]
    stage: NDArray[np.int8]
    following: NDArray[np.int32]
    span: Ints


class Part(NamedTuple):
    """The slots of one thread, a range of each layer.

    Attributes:
        low: first slot [layers].
        high: end of the slots [layers].
        stretch: layer, run (of all), first slot and end of each stretch, all slots in their order [stretches, 4].
        room: for a list of those of a stretch in which something may happen; see `active` [LONGEST + 1].
    """

    low: Ints
    high: Ints
    stretch: Ints
    room: NDArray[np.int32]


class Outcome(NamedTuple):
    """How the slots of one thread were competed for, in their order.

    Attributes:
        ratio: of the sizes of all that competed for a slot to the winner's [contests].
        begin: how many contests the earlier layers had [layers].
        imports: weights of imported alternatives, as they begin [imports, P + 1].
    """

    ratio: NDArray[np.float32]
    begin: Ints
    imports: Floats


class Sent(NamedTuple):
    """What seeds add to sums over edges, which is not their whole difference: for the way back.

    Attributes:
        network: number of the network [sent].
        slot: where [sent].
        agent: the seed [sent].
        via: who does not hear of it, or −1 [sent].
        stages: in the alternative and in truth [sent, 2].
        part: how much of the difference the others hear of [sent].
    """

    network: NDArray[np.int8]
    slot: NDArray[np.int32]
    agent: NDArray[np.int32]
    via: NDArray[np.int32]
    stages: NDArray[np.int8]
    part: NDArray[np.float32]


BARE = {"nogil": True, "cache": True, "_nrt": False}
"""How loops are compiled that make no array: without counting references, where threads would wait for each other."""

# Functions that run once per slot or agent take arrays, not the tuples above: where references are counted, a call
# counts those of every array of a tuple, which costs more than what the function does. Those that run several times per
# slot are inlined: to hand over all fields of each array takes longer than a few additions.


@nb.njit(**BARE, inline="always")
def chance(mass: float) -> float:
    """Probability with which a flip of some mass, |derivative of a probability|, is offered; its weight is over it."""
    return max(mass, min(mass / SMALLEST, SELDOM))


@nb.njit(**BARE, inline="always")
def key_of(chosen: np.uint64, size: float) -> float:
    """The key of a candidate, by its random word: the smallest of several wins with probability ∝ its size."""
    return float(-np.log((float(np.int64(chosen)) + 0.5) / SCALE) / size)


@nb.njit(**BARE, inline="always")
def identity_of(first_id: np.uint64, ids: NDArray[np.uint64], i: int) -> np.uint64:
    """An agent's id; see `Frame`."""
    return ids[i] if ids.shape[0] > 0 else first_id + np.uint64(i)


@nb.njit(**BARE)
def word_of(identity: np.uint64, address: NDArray[np.uint64], variate: int) -> np.uint64:
    """An agent's random word in this step, by what it is for; variate 0 is that of the actual step."""
    counter = address[1] << np.uint64(16) | np.uint64(variate)
    drawn: np.uint64 = word(identity, address[0], counter, address[2], address[3])
    return drawn


@nb.njit(**BARE)
def race(identity: np.uint64, address: NDArray[np.uint64], variate: int, size: float) -> float:
    """The key of a candidate, by whose it is and in which race: so in any order."""
    key: float = key_of(word_of(identity, address, variate), size)
    return key


@nb.njit(**BARE)
def layer_of(first_slot: Ints, q: int) -> int:
    """The layer of a slot."""
    layer = 0
    while q >= first_slot[layer + 1]:
        layer += 1
    return layer


@nb.njit(**BARE, inline="always")
def own_slot(slot: Addresses, layout: Ints, layer: int, i: int) -> int:
    """An agent's slot in a layer, or −1; see `Frame.slot`."""
    group = layout[layer, 0] + column(slot[layer, 0], i) * layout[layer, 1]
    return int(group + byte_column(slot[layer, 1], i))


@nb.njit(**BARE)
def active(low: int, high: int, status: NDArray[np.uint8], room: NDArray[np.int32]) -> int:
    """List those of the slots `low` to `high` − 1, at most `LONGEST`, in which something may happen; how many."""
    found = 0
    for q in range(low, high):
        room[found] = q
        found += status[q] != 0
    return found
