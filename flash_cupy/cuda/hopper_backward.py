"""The plans of the Hopper family's backward kernels, with the table of their tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from ..arrays import Array
from ..problem import MAX_GPU_HEAD_DIM, Problem
from .hopper import BARRIER_BYTES, GROUP_ROWS, SWIZZLE_ALIGNMENT, HopperPlan
from .params import BATCH_AXES
from .plan import Card, KernelPlan, ceil_div, head_count, score_options
from .tensor_maps import BOX_COLUMNS
from .tensors import WIDEST_ACCESS, access_bytes

#: Bytes of an element of L, D and of the sums.
SUM_BYTES = 4

#: Calls whose plans are remembered.
MAX_PLANS = 4096


@dataclass(frozen=True)
class HopperBackwardPlan(HopperPlan):
    """A row for kernels_cu/hopper_backward.cu; tile_m queries a step, tile_n keys a block.

    Attributes
    ----------
    stages
        Of Q, dO and dS.
    deterministic
        Whether the blocks add to dQ in a fixed order.
    head_rows
        Most queries of a call whose blocks compute a whole head each, or 0: a tile of keys.
    early_exponentials
        Whether P is computed while the product for dP runs, or behind it.
    own_masks
        Whether a consumer masks where its own keys ask for it, or any of the block's.
    writers_fence
        Whether the warps that add dQ let the asynchronous proxy see it, or the consumers.
    """

    kernel: ClassVar[str] = "hopper_backward"

    deterministic: bool
    head_rows: int
    early_exponentials: bool
    own_masks: bool
    writers_fence: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warps % 4 or self.tile_n != GROUP_ROWS * self.consumers:
            raise ValueError(f"{self.warps} warps cannot own tile_n={self.tile_n} keys")
        blocks = ceil_div(self.head_dim, BOX_COLUMNS)
        if self.consumers % blocks or self.tile_m * blocks // self.consumers % 16:
            raise ValueError(
                f"{self.consumers} consumers cannot share dQ of tile_m={self.tile_m} queries and "
                f"{self.head_dim} dims"
            )

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return self.warps // 4 - 1

    @property
    def dq_parts(self) -> int:
        """Parts of a tile of dq_sum, see hopper_dq_sum.cuh."""
        return self.consumers

    @property
    def barriers(self) -> int:
        """Barriers in shared memory: full and empty ones of q, do and dS; three for all."""
        return 6 * self.stages + 3

    @property
    def passed_bytes(self) -> int:
        """Bytes of what consumers pass on: the stages of dS, and dQ, of a tile or a head."""
        dq = max(self.tile_m, self.head_rows) * dq_columns(self.head_dim) * SUM_BYTES
        return self.stages * self.tile_bytes(self.tile_m, self.tile_n) + dq

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: k, v; stages of q, do, row terms; `passed_bytes`; small things."""
        keys, queries = (
            self.tile_bytes(rows, self.head_dim) + self.tile_bytes(rows, self.head_dim_v)
            for rows in (self.tile_n, self.tile_m)
        )
        row_terms = 2 * self.tile_m * SUM_BYTES
        words = 4 * (4 + 2 * 4 + 3 + BATCH_AXES)  # `Word` in hopper_backward_block.cuh
        return (
            SWIZZLE_ALIGNMENT
            + keys
            + self.stages * (queries + row_terms)
            + self.passed_bytes
            + self.barriers * BARRIER_BYTES
            + words
        )

    @property
    def gradient_rows(self) -> int:
        """Rows of a box of dk and dv."""
        return GROUP_ROWS

    @property
    def boxes(self) -> dict[str, int]:
        """Rows of a box of each tensor that goes by TMA."""
        return {
            "q": self.tile_m,
            "k": self.tile_n,
            "v": self.tile_n,
            "do_": self.tile_m,
            "dk": self.gradient_rows,
            "dv": self.gradient_rows,
            "dq": self.tile_m * ceil_div(self.head_dim, BOX_COLUMNS) // self.dq_parts,
        }

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every head, or for every key head's tile of keys and some that round."""
        if self.head_rows:
            return head_count(problem)
        return self.schedule(problem, tensors)[0]

    def counts(self, problem: Problem, tensors: Mapping[str, Array]) -> dict[str, int]:
        """Return the places of dq_sum, and when blocks take which key head and round which dQ."""
        return {} if self.head_rows else self.schedule(problem, tensors)[1]

    def schedule(
        self, problem: Problem, tensors: Mapping[str, Array]
    ) -> tuple[int, dict[str, int]]:
        """Return the number of blocks, and what kernels_cu/hopper_dq_rounding.cuh needs of them."""
        places, heads = sum_places(problem, tensors), key_head_count(problem)
        tiles = ceil_div(problem.seqlen_k, self.tile_n)
        shares = tiles * heads
        lag = shares if places == heads else places * tiles // 2 // self.warps * self.warps
        periods = (shares - lag) // self.warps
        last = shares - periods * self.warps
        pieces = ceil_div(LAST_ROUNDING_WARPS, last)
        return shares + periods + ceil_div(last * pieces, self.warps), {
            "dq_heads": places,
            "section": section_heads(problem, self),
            "dq_lag": lag,
            "dq_pieces": pieces,
        }


@dataclass(frozen=True)
class HopperBackwardWidePlan(HopperBackwardPlan):
    """A row for kernels_cu/hopper_backward_wide.cu.

    Attributes
    ----------
    weight_stages
        Of P and dS.
    """

    kernel: ClassVar[str] = "hopper_backward_wide"

    weight_stages: int

    def __post_init__(self) -> None:
        HopperPlan.__post_init__(self)
        if self.warps % 4 or self.tile_n % (16 * self.consumers):
            raise ValueError(f"{self.warps} warps cannot share tile_n={self.tile_n} keys")
        if self.dq_parts % self.consumers or self.head_dim_v % BOX_COLUMNS:
            raise ValueError(f"{self.consumers} consumers cannot share {self.head_dim} dims")

    @property
    def dq_parts(self) -> int:
        """Parts of a tile of dq_sum: blocks of 64 dims."""
        return self.head_dim // BOX_COLUMNS

    @property
    def barriers(self) -> int:
        """Barriers in shared memory: full and empty ones of q and do; three for all."""
        return 4 * self.stages + 3

    @property
    def passed_bytes(self) -> int:
        """Bytes of what consumers pass on: the stages of P and dS."""
        return self.weight_stages * 2 * self.tile_bytes(self.tile_m, self.tile_n)

    @property
    def gradient_rows(self) -> int:
        """Rows of a box of dk and dv."""
        return self.tile_n


@dataclass(frozen=True)
class HopperRowDotsPlan(KernelPlan):
    """A row for kernels_cu/hopper_row_dots.cu; the rest as in the backward plan."""

    tile_m: int
    head_dim_v: int
    consumers: int

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of rows and head."""
        return ceil_div(problem.seqlen_q, self.tile_m) * head_count(problem)

    def counts(self, problem: Problem, tensors: Mapping[str, Array]) -> dict[str, int]:
        """Return how much of dq_sum there is to clear."""
        return {"dq_heads": sum_places(problem, tensors)}


def dq_columns(head_dim: int) -> int:
    """Return the columns of a row of dq_sum: whole blocks of 64."""
    return ceil_div(head_dim, BOX_COLUMNS) * BOX_COLUMNS


def shared_columns(head_dim_v: int, consumers: int) -> int:
    """Return the columns of dv: blocks of 64 for each consumer, the last one may have one less."""
    blocks = ceil_div(head_dim_v, BOX_COLUMNS)
    while blocks % consumers not in (0, consumers - 1):
        blocks += 1
    return blocks * BOX_COLUMNS


class BackwardTiles(NamedTuple):
    """The tuned part of a `HopperBackwardPlan`, and the calls that it is for."""

    tile_m: int
    tile_n: int = 128
    consumers: int = 2
    weight_stages: int | None = None  # of a `HopperBackwardWidePlan`
    alibi: bool = True  # these two take registers
    softcap: bool = True
    band: bool = True  # with causal or window, too
    min_head_dim: int = 0  # of q and k
    min_seqlen: int = 0  # of keys
    max_head_dim_v: int = MAX_GPU_HEAD_DIM
    masks: bool = False  # compiled for masks in any case
    head_rows: int = 0  # most queries of a head, if a block computes a whole one
    # What these are is said at `HopperBackwardPlan`; wide kernels know only one way. Which is
    # faster follows from no rule: the compiler is short of registers.
    early_exponentials: bool = False
    own_masks: bool = True
    writers_fence: bool = True

    def suits(self, problem: Problem, options: Mapping[str, bool], multiprocessors: int) -> bool:
        """Whether a call is one of those."""
        return (
            padded_head_dim(problem.head_dim) >= self.min_head_dim
            and padded_head_dim(problem.head_dim_v) <= self.max_head_dim_v
            and problem.seqlen_k >= self.min_seqlen
            and (self.band or not options["band"])
            and (self.alibi or not options["alibi"])
            and (self.softcap or not options["softcap"])
            and (self.head_rows == 0 or self.suits_heads(problem, multiprocessors))
        )

    def suits_heads(self, problem: Problem, multiprocessors: int) -> bool:
        """Whether blocks that compute whole heads can take a call, and keep the GPU busy."""
        heads = head_count(problem)
        rounds = ceil_div(heads, multiprocessors)
        return (
            problem.group == 1
            and problem.seqlen_q <= self.head_rows
            and problem.seqlen_k <= MAX_HEAD_KEYS
            and heads >= LEAST_BUSY * rounds * multiprocessors
        )


#: Steps of 80 queries: they leave no registers to ALiBi and softcap, and each consumer computes dQ
#: of 64 dims, so there are to be two such blocks of dims.
_EIGHTY: dict[str, Any] = dict(alibi=False, softcap=False, min_head_dim=96)

#: By the largest head dim; of each list the first row that suits.
BACKWARD_TILES: dict[int, list[BackwardTiles]] = {
    64: [
        BackwardTiles(
            64, alibi=False, softcap=False, head_rows=512, band=False, early_exponentials=True
        ),
        BackwardTiles(64, alibi=False, softcap=False, head_rows=512),
        BackwardTiles(128, alibi=False, band=False, early_exponentials=True),
        BackwardTiles(128, alibi=False, early_exponentials=True, own_masks=False),
        BackwardTiles(64),
    ],
    96: [
        BackwardTiles(80, **_EIGHTY, band=False, min_seqlen=2048, early_exponentials=True),
        BackwardTiles(80, **_EIGHTY, min_seqlen=4096),
        BackwardTiles(64),
    ],
    128: [
        BackwardTiles(80, **_EIGHTY, band=False, min_seqlen=1024, writers_fence=False),
        BackwardTiles(80, **_EIGHTY, min_seqlen=4096, own_masks=False, writers_fence=False),
        BackwardTiles(64),
    ],
    192: [
        BackwardTiles(64, tile_n=96, consumers=3, weight_stages=2, max_head_dim_v=128),
        BackwardTiles(64, tile_n=96, consumers=3, weight_stages=1),
    ],
    256: [BackwardTiles(64, tile_n=64, weight_stages=2, masks=True)],
}

#: Of Q and dO.
STAGES = 2

#: Where a block computes a whole head: the least share of the multiprocessors that must have work,
#: and the most keys. What it saves it saves once a head; its steps are slower than others.
LEAST_BUSY = 0.8
MAX_HEAD_KEYS = 1024

#: Heads that keep any GPU busy.
MANY_HEADS = 1024

#: The least warps that round the last shares of dQ.
LAST_ROUNDING_WARPS = 1536

#: Tiles of keys in a section of heads under a mask, whose tiles blocks take side by side, the
#: longest first: about as many as run at a time; fewer of short heads, whose dQ then stays in L2.
SECTION_TILES = 128
SHORT_SECTION_TILES = 32
SHORT_HEAD_TILES = 8

#: Without a mask in a fixed order, where a block adds to dQ a step or more behind the block of the
#: tile of keys before it: steps that the blocks of a section, which start one after another, have
#: between two tiles of a head. Of short heads and of others.
SHORT_SECTION_STEPS = 128
SECTION_STEPS = 192


def kernels(card: Card, problem: Problem, alibi: bool, deterministic: bool) -> tuple[str, ...]:
    """Return the kernels of a call's backward, in the order of their launches."""
    return ("hopper_row_dots", choose_plan(card, problem, alibi, deterministic).kernel)


@lru_cache(MAX_PLANS)
def choose_plan(
    card: Card, problem: Problem, alibi: bool, deterministic: bool
) -> HopperBackwardPlan:
    """Choose the plan of a backward call that the family can take, see `hopper.why_not`."""
    options = score_options(problem, ("alibi_slopes",) if alibi else ())
    head_dim, head_dim_v = (padded_head_dim(n) for n in (problem.head_dim, problem.head_dim_v))
    widest = max(head_dim, head_dim_v)
    row = next(
        row for row in BACKWARD_TILES[widest] if row.suits(problem, options, card.multiprocessors)
    )
    # Compiled for masks it takes fewer registers, which some rows and both modifications need.
    options["band"] |= row.masks or (options["softcap"] and options["alibi"])
    weight_stages = row.weight_stages
    wide = weight_stages is not None
    plan: dict[str, Any] = dict(
        element=problem.dtype.name,
        access_bytes=WIDEST_ACCESS,
        warps=4 * (1 + row.consumers),
        head_dim=widest if wide else head_dim,
        head_dim_v=shared_columns(head_dim_v, row.consumers) if wide else head_dim_v,
        tile_m=row.tile_m,
        tile_n=row.tile_n,
        stages=STAGES,
        blocks_per_sm=1,
        **options,
        deterministic=deterministic and not row.head_rows,  # a single block adds to dq anyway
        head_rows=row.head_rows,
        early_exponentials=row.early_exponentials,
        own_masks=row.own_masks,
        writers_fence=row.writers_fence,
    )
    if weight_stages is None:
        return HopperBackwardPlan(**plan)
    return HopperBackwardWidePlan(**plan, weight_stages=weight_stages)


@lru_cache(MAX_PLANS)
def workspace(
    card: Card, problem: Problem, alibi: bool, deterministic: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of row_dots, and of dq_sum, dq_counts and dq_turns where needed.

    Rows fill up whole tiles.
    """
    plan = choose_plan(card, problem, alibi, deterministic)
    heads, tiles = head_count(problem), ceil_div(problem.seqlen_q, plan.tile_m)
    rows = tiles * plan.tile_m
    shapes: dict[str, tuple[int, ...]] = {"row_dots": (heads, rows, 2)}
    if not plan.head_rows:
        places = dq_places(card, problem, plan) * problem.group
        shapes["dq_sum"] = (places, rows, dq_columns(plan.head_dim))
        shapes["dq_counts"] = (2, key_head_count(problem))
    if plan.deterministic:
        shapes["dq_turns"] = (heads, tiles, plan.consumers)
    return shapes


def plan_backward(card: Card, problem: Problem, tensors: Mapping[str, Array]) -> HopperBackwardPlan:
    """Plan the main kernel; `tensors` are all those of the call, its workspace included."""
    return choose_plan(card, problem, "alibi_slopes" in tensors, "dq_turns" in tensors)


def plan_row_dots(card: Card, problem: Problem, tensors: Mapping[str, Array]) -> HopperRowDotsPlan:
    """Plan the kernel before it."""
    plan = plan_backward(card, problem, tensors)
    return HopperRowDotsPlan(
        element=plan.element,
        access_bytes=access_bytes(tensors, 0),
        warps=4,
        tile_m=plan.tile_m,
        head_dim_v=plan.head_dim_v,
        consumers=plan.consumers,
    )


def key_head_count(problem: Problem) -> int:
    """Return how many key heads all batch entries have."""
    return head_count(problem) // problem.group


def section_heads(problem: Problem, plan: HopperBackwardPlan) -> int:
    """Return the key heads of a section, see kernels_cu/head_tiles.cuh.

    Under a mask some tiles are longer than others. Without one it takes sections only in a fixed
    order, as tiles of a head wait for each other.
    """
    tiles = ceil_div(problem.seqlen_k, plan.tile_n)
    short = tiles <= SHORT_HEAD_TILES
    if problem.band.left is None and problem.band.right is None:
        if not plan.deterministic:
            return 1
        steps = ceil_div(problem.seqlen_q, plan.tile_m) * problem.group
        return ceil_div(SHORT_SECTION_STEPS if short else SECTION_STEPS, steps)
    return ceil_div(SHORT_SECTION_TILES if short else SECTION_TILES, tiles)


def dq_places(card: Card, problem: Problem, plan: HopperBackwardPlan) -> int:
    """Return for how many key heads dq_sum has a place.

    All, or whole sections, twice as many as it takes from a share's computation to its rounding:
    all of its section and a good round of blocks. The same time passes until the place is used.
    """
    section = section_heads(problem, plan)
    blocks = section * ceil_div(problem.seqlen_k, plan.tile_n)
    lag = blocks + 17 * card.multiprocessors // 16 + plan.warps
    return min(key_head_count(problem), section * ceil_div(2 * lag, blocks))


def sum_places(problem: Problem, tensors: Mapping[str, Array]) -> int:
    """Return for how many key heads a call's dq_sum has a place; 0: there is none."""
    return tensors["dq_sum"].shape[0] // problem.group if "dq_sum" in tensors else 0


def padded_head_dim(head_dim: int) -> int:
    """Return the head dim that kernels are compiled for; TMA fills up with zeros."""
    return next(padded for padded in BACKWARD_TILES if padded >= head_dim)


def lengths() -> tuple[int, ...]:
    """Return numbers of keys from which on calls may have other plans than with fewer keys."""
    starts = {row.min_seqlen for rows in BACKWARD_TILES.values() for row in rows}
    return tuple(sorted(starts - {0}))


def head_counts() -> tuple[int, ...]:
    """Return numbers of heads with which calls may have other plans than with one."""
    return (MANY_HEADS,)


#: Which function plans which kernel of the family's backward.
PLANS: dict[str, Callable[[Card, Problem, Mapping[str, Array]], KernelPlan]] = {
    "hopper_row_dots": plan_row_dots,
    "hopper_backward": plan_backward,
    "hopper_backward_wide": plan_backward,
}
