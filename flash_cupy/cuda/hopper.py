"""The Hopper family: kernels for compute capability 9.0, on wgmma and TMA.

What calls it can take, and the plans of its forward kernel with the table of their tiles. The
backward kernels' are in hopper_backward.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..arrays import Array
from ..problem import Problem
from .params import BATCH_AXES
from .plan import CHUNK_BYTES, Card, KernelPlan, Plan, ceil_div, head_count, score_options
from .tensor_maps import BOX_COLUMNS, STRIDE_LIMIT, SWIZZLE_BYTES, BoxMap
from .tensors import OF_Q_DTYPE, WIDEST_ACCESS, fill_params

#: Batch axes that a tensor map has.
MAP_BATCH_AXES = 2

#: Rows of a warpgroup's products.
GROUP_ROWS = 64

#: Tiles in shared memory begin at a multiple of this, see kernels_cu/hopper_tile.cuh.
SWIZZLE_ALIGNMENT = 1024

BARRIER_BYTES = 8


def why_not(
    problem: Problem, tensors: Mapping[str, Array], alignment: int, card: Card
) -> str | None:
    """Say why the family cannot take a call; None if it can.

    Parameters
    ----------
    problem, tensors
        The call.
    alignment
        The addresses of the tensors of q's dtype, modulo `WIDEST_ACCESS`, combined by or.
    card
        The GPU.
    """
    if not card.hopper:
        return "it takes a GPU of compute capability 9.0, and NVRTC 12.9 or newer"
    if problem.dtype.itemsize != 2:
        return f"got {problem.dtype}, takes float16 or bfloat16"
    if alignment % WIDEST_ACCESS:
        return f"an array does not begin at a multiple of {WIDEST_ACCESS} bytes"
    params = fill_params(problem, tensors)[0]
    batch = params["batch"].tolist()
    if any(extent > 1 for extent in batch[: BATCH_AXES - MAP_BATCH_AXES]):
        return f"more than {MAP_BATCH_AXES} batch axes remain of {problem.batch}"
    for name in OF_Q_DTYPE:
        if name in tensors:
            itemsize = problem.dtype.itemsize
            tensor = params[name]
            for step in (tensor["row"], tensor["head"], *tensor["batch"]):
                stride = int(step) * itemsize
                if stride % WIDEST_ACCESS or not 0 <= stride < STRIDE_LIMIT:
                    return (
                        f"{name} has a stride of {stride} bytes, takes multiples of "
                        f"{WIDEST_ACCESS} that are not negative"
                    )
    return None


def box_maps(
    plan: KernelPlan, tensors: Mapping[str, Array], params: Any
) -> tuple[tuple[str, BoxMap], ...]:
    """Return the maps of a launch by the names of their tensors, all but the addresses.

    ``params`` is the filled record of the parameters.
    """
    maps = []
    for name, rows in plan.boxes.items():
        x, tensor = tensors[name], params[name]
        axes = slice(None, BATCH_AXES - MAP_BATCH_AXES - 1, -1)  # the last ones, backwards
        heads = x.shape[-3] if x.ndim > 2 else 1
        extents = (x.shape[-1], x.shape[-2], heads, *params["batch"][axes].tolist())
        steps = (tensor["row"], tensor["head"], *tensor["batch"][axes])
        # An axis of extent 1 has no step: any that the driver takes will do.
        strides = tuple(
            int(step) * x.itemsize if extent > 1 else WIDEST_ACCESS
            for step, extent in zip(steps, extents[1:], strict=True)
        )
        maps.append((name, BoxMap(0, plan.element, extents, strides, rows)))
    return tuple(maps)


@dataclass(frozen=True)
class HopperPlan(Plan):
    """What the plans of the family's attention kernels have in common.

    Attributes
    ----------
    warps
        Four of a warpgroup that feeds the others, and four of each consumer.
    """

    target: ClassVar[tuple[str, ...]] = ("-arch=sm_90a",)
    overlaps: ClassVar[bool] = True

    def tile_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a tile in shared memory: whole boxes."""
        return ceil_div(columns, BOX_COLUMNS) * rows * SWIZZLE_BYTES

    def options(self) -> tuple[str, ...]:
        """Return the compiler options that carry this plan into a kernel."""
        return (*super().options(), f"-DPLAN_SHARED_BYTES={self.shared_bytes}")


@dataclass(frozen=True)
class HopperForwardPlan(HopperPlan):
    """A row for kernels_cu/hopper_forward.cu.

    Attributes
    ----------
    q_stages
        Of q; with two, that of the next item comes during the present one.
    o_over_q
        Whether o leaves by way of q's place in shared memory, or by a place of its own.
    ahead
        Blocks of 16 keys whose exponentials are computed while the largest score is found.
    optimistic
        Whether steps of full tiles look for large sums of exponentials instead of large scores,
        and compute the scores a second time where they find one.
    producer_registers, consumer_registers
        Of a thread of the first warpgroup, and of the others.
    l2_bytes
        K and V that all blocks together read at a time: what L2 keeps.
    dynamic
        Whether items go to whichever block is free.
    """

    persistent: ClassVar[bool] = True

    q_stages: int
    o_over_q: bool
    ahead: int
    optimistic: bool
    producer_registers: int
    consumer_registers: int
    l2_bytes: int
    dynamic: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        consumers = self.warps // 4 - 1
        if self.warps % 4 or self.tile_m != GROUP_ROWS * consumers:
            raise ValueError(f"{self.warps} warps cannot own tile_m={self.tile_m} rows")
        if consumers < 2:
            raise ValueError("consumers take turns: it takes two at least")

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the stages of q, k and v, o; barriers, items."""
        q, o = (self.tile_bytes(self.tile_m, n) for n in (self.head_dim, self.head_dim_v))
        k, v = (self.tile_bytes(self.tile_n, n) for n in (self.head_dim, self.head_dim_v))
        barriers = ceil_div(6 + 2 * self.q_stages + 4 * self.stages, 2) * 2 * BARRIER_BYTES
        items = 2 * 3 * CHUNK_BYTES
        return (
            SWIZZLE_ALIGNMENT
            + (max(q, o) if self.o_over_q else self.q_stages * q + o)
            + self.stages * (k + v)
            + barriers
            + items
        )

    @property
    def boxes(self) -> dict[str, int]:
        """Rows of a box of each tensor that goes by TMA."""
        return {"q": self.tile_m, "k": self.tile_n, "v": self.tile_n, "o": GROUP_ROWS}

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of rows and head, if there are multiprocessors enough."""
        return ceil_div(problem.seqlen_q, self.tile_m) * head_count(problem)


class ForwardTiles(NamedTuple):
    """The tuned part of a `HopperForwardPlan`, and the calls that it is for."""

    tile_n: int
    consumers: int
    stages: int = 2  # of k and v
    q_stages: int = 1
    ahead: int = 1  # as in the plan, as `optimistic` is
    optimistic: bool = False
    band: bool = True  # with causal or window, too
    modified: bool = True  # with softcap and ALiBi, too: they take registers
    min_seqlen: int = 0  # of keys
    most_waste: float | None = None  # rows that fill up the last tile, as a share of the queries
    l2_bytes: int = 8 << 20  # of K and V that blocks read at a time, where items are dynamic

    def suits(self, problem: Problem, options: Mapping[str, bool]) -> bool:
        """Whether a call is one of those."""
        waste = -problem.seqlen_q % (GROUP_ROWS * self.consumers) / problem.seqlen_q
        return (
            problem.seqlen_k >= self.min_seqlen
            and (self.most_waste is None or waste <= self.most_waste)
            and (self.band or not options["band"])
            and (self.modified or not (options["softcap"] or options["alibi"]))
        )


#: What optimistic rows have in common: scores that are computed again are not modified again, and
#: in masked steps, which are few, exponentials ahead gain nothing.
_OPTIMISTIC: dict[str, Any] = {"optimistic": True, "ahead": 0, "modified": False}

#: What rows of four consumers have in common.
_FOUR: dict[str, Any] = {"stages": 6, "q_stages": 2, "l2_bytes": 16 << 20}

#: By the largest head dims (of q and k, of v and o); of each list the first row that suits.
FORWARD_TILES: dict[tuple[int, int], list[ForwardTiles]] = {
    (64, 64): [
        ForwardTiles(128, 3, stages=3, **_OPTIMISTIC, band=False, most_waste=0.02),
        ForwardTiles(64, 4, **_FOUR, **_OPTIMISTIC, band=False, most_waste=0.25),
        ForwardTiles(64, 4, **_FOUR, **_OPTIMISTIC, min_seqlen=1280),
        ForwardTiles(64, 4, **_FOUR, ahead=0, modified=False, most_waste=0.25),
        ForwardTiles(128, 3, stages=3, **_OPTIMISTIC, band=False),
        ForwardTiles(128, 2, modified=False),
        ForwardTiles(96, 3, l2_bytes=16 << 20),
    ],
    (96, 96): [ForwardTiles(128, 2, q_stages=2)],
    (128, 128): [
        ForwardTiles(160, 2, **_OPTIMISTIC, band=False, min_seqlen=2048),
        ForwardTiles(160, 2, modified=False, min_seqlen=4096),
        ForwardTiles(128, 2, q_stages=2),
    ],
    (192, 128): [
        ForwardTiles(128, 2, modified=False, l2_bytes=16 << 20),
        ForwardTiles(112, 2, l2_bytes=16 << 20),
    ],
    (192, 192): [
        ForwardTiles(112, 2, modified=False, l2_bytes=16 << 20),
        ForwardTiles(96, 2, l2_bytes=16 << 20),
    ],
    (256, 256): [
        ForwardTiles(80, 2, ahead=0, band=False, modified=False, min_seqlen=1024),
        ForwardTiles(80, 2, ahead=0, modified=False, min_seqlen=2048, l2_bytes=32 << 20),
        ForwardTiles(64, 2, ahead=0, modified=False, l2_bytes=32 << 20),
        ForwardTiles(48, 2, ahead=0, l2_bytes=32 << 20),
    ],
}

#: Registers of a thread of the first warpgroup and of a consumer, by the number of consumers: what
#: a block is launched with, 168 for each of 384 threads, 128 for each of 512 or 96 for each of 640.
REGISTERS = {2: (40, 232), 3: (32, 160), 4: (32, 112)}

#: K and V that the blocks read at a time, with items in a fixed order.
STATIC_L2_BYTES = 1 << 20

#: Keys from which on items go to whichever block is free.
MIN_DYNAMIC_SEQLEN = 1024


def plan_forward(card: Card, problem: Problem, tensors: Container[str]) -> HopperForwardPlan:
    """Choose the plan of a forward call that the family can take, see `why_not`."""
    options = score_options(problem, tensors)
    row = next(
        row
        for (head_dim, head_dim_v), rows in FORWARD_TILES.items()
        if problem.head_dim <= head_dim and problem.head_dim_v <= head_dim_v
        for row in rows
        if row.suits(problem, options)
    )
    producer_registers, consumer_registers = REGISTERS[row.consumers]
    dynamic = "tickets" in tensors

    def plan(q_stages: int, o_over_q: bool) -> HopperForwardPlan:
        return HopperForwardPlan(
            element=problem.dtype.name,
            access_bytes=WIDEST_ACCESS,
            warps=4 * (1 + row.consumers),
            head_dim=_padded(problem.head_dim),
            head_dim_v=_padded(problem.head_dim_v),
            tile_m=GROUP_ROWS * row.consumers,
            tile_n=row.tile_n,
            stages=row.stages,
            blocks_per_sm=1,
            **options,
            q_stages=q_stages,
            o_over_q=o_over_q,
            ahead=row.ahead,
            optimistic=row.optimistic,
            producer_registers=producer_registers,
            consumer_registers=consumer_registers,
            l2_bytes=row.l2_bytes if dynamic else STATIC_L2_BYTES,
            dynamic=dynamic,
        )

    apart = plan(row.q_stages, False), plan(1, False)
    return next((x for x in apart if x.shared_bytes <= card.shared_bytes), plan(1, True))


def lengths() -> tuple[tuple[int, int], ...]:
    """Return numbers of queries and keys of calls that have all plans between them.

    Two keys at least: with one, a causal mask would hide nothing and be dropped.
    """
    every = [row for rows in FORWARD_TILES.values() for row in rows]
    queries = {2, *(GROUP_ROWS * row.consumers for row in every if row.most_waste is not None)}
    keys = {2, MIN_DYNAMIC_SEQLEN, *(row.min_seqlen for row in every)} - {0}
    return tuple(itertools.product(sorted(queries), sorted(keys)))


def is_dynamic(problem: Problem) -> bool:
    """Whether the blocks of a forward call take items as they get free, for which it has tickets.

    Items differ in length only with a mask. With short sequences the fixed order is as good, and
    with head dims above 128 better.
    """
    masked = problem.band.left is not None or problem.band.right is not None
    return masked and problem.seqlen_k >= MIN_DYNAMIC_SEQLEN


def _padded(head_dim: int) -> int:
    """Return the head dim that kernels are compiled for; TMA fills up with zeros."""
    return next(padded for padded in (64, 96, 128, 192, 256) if padded >= head_dim)


@dataclass(frozen=True)
class HopperClearTicketsPlan(KernelPlan):
    """The only plan for kernels_cu/hopper_clear_tickets.cu."""

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return 1."""
        return 1


def plan_clear_tickets(
    card: Card, problem: Problem, tensors: Container[str]
) -> HopperClearTicketsPlan:
    """Plan the kernel before the forward one of calls that have tickets."""
    return HopperClearTicketsPlan(problem.dtype.name, WIDEST_ACCESS, warps=1)


#: Which function plans which kernel of the family.
PLANS: dict[str, Callable[[Card, Problem, Container[str]], KernelPlan]] = {
    "hopper_clear_tickets": plan_clear_tickets,
    "hopper_forward": plan_forward,
}
