"""Plans: which kernel computes a call, with which tiles.

A plan is one row of the table in tiles.py, completed by what the call asks for (element type, head
dims, mask, alignment). The kernels get its fields as macros, PLAN_TILE_M and so on, and have no
constants of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

from ..arrays import Array
from ..problem import MAX_GPU_HEAD_DIM, Problem
from .tiles import (
    BACKWARD_DQ_TILES,
    BACKWARD_TILES,
    FORWARD_TILES,
    MAX_SLICE,
    BackwardDqTiles,
    BackwardTiles,
)

#: Head dims that kernels are compiled for; those in between are filled up with zeros on chip.
HEAD_DIMS = (32, 64, 96, 128, 160, 192, MAX_GPU_HEAD_DIM)

#: Bytes of each element type of the kernels. tensorfloat32 is float32 multiplied with less
#: precision.
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "tensorfloat32": 4, "float": 4, "double": 8}

#: Those that are split into float16 parts on chip, see kernels_cu/split.cuh.
SPLIT_ELEMENTS = ("tensorfloat32", "float")
OPERAND_BYTES = 2 * 8 * 4 + 4 * 16

WARP = 32
CHUNK_BYTES = 16
MAX_REGISTERS = 255


class Card(NamedTuple):
    """What a plan depends on of a GPU."""

    compute_capability: tuple[int, int]
    shared_bytes: int  # that one block can have
    multiprocessors: int = 1
    hopper: bool = False  # whether kernels for sm_90a can be compiled here and run on it

    def holds(self, blocks: int, shared_bytes: int) -> bool:
        """Whether a multiprocessor has shared memory for so many blocks of so many bytes."""
        reserved = 1024  # by the system, for every block
        return blocks * (shared_bytes + reserved) <= self.shared_bytes + reserved


def padded_head_dim(head_dim: int) -> int:
    """Return the head dim that a kernel for `head_dim` is compiled for."""
    return next(padded for padded in HEAD_DIMS if padded >= head_dim)


def row_bytes(columns: int, element: str) -> int:
    """Bytes of a row of a tile in shared memory: an odd number of chunks, see tile.cuh."""
    return (columns * ELEMENT_BYTES[element] // CHUNK_BYTES | 1) * CHUNK_BYTES


@dataclass(frozen=True)
class KernelPlan(ABC):
    """How one kernel is compiled and launched.

    Attributes
    ----------
    element
        Element type of the kernel, a key of `ELEMENT_BYTES`.
    access_bytes
        Width of accesses to global memory; divides the address and the length of all rows.
    warps
        Warps of a block of threads.
    """

    #: Compiler options beside the macros and those that every kernel gets.
    target: ClassVar[tuple[str, ...]] = ()
    #: Whether at most one block a multiprocessor is launched, which then does the work of several.
    persistent: ClassVar[bool] = False
    #: Whether the kernel may start before the one ahead of it in a call has ended.
    overlaps: ClassVar[bool] = False

    element: str
    access_bytes: int
    warps: int

    def __post_init__(self) -> None:
        if self.element not in ELEMENT_BYTES:
            raise ValueError(f"element is {self.element!r}, not one of {', '.join(ELEMENT_BYTES)}")
        if self.access_bytes not in (2, 4, 8, 16) or self.access_bytes < self.element_bytes:
            raise ValueError(
                f"access_bytes is {self.access_bytes}, not 2, 4, 8 or 16 and at least an element "
                f"({self.element_bytes})"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.element]

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element of L, D and of the sums: float, or double for double."""
        return max(4, self.element_bytes)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * WARP

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 0

    @property
    def boxes(self) -> dict[str, int]:
        """Rows of a box of each tensor that goes by TMA, in the order of the kernel's maps."""
        return {}

    @abstractmethod
    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return the number of blocks of a launch."""

    def counts(self, problem: Problem, tensors: Mapping[str, Array]) -> dict[str, int]:
        """Return what a launch's parameters hold beside what is the call's own."""
        return {}

    def options(self) -> tuple[str, ...]:
        """Return the compiler options that carry this plan into a kernel."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return tuple(
            f"-DPLAN_{name.upper()}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in values
        )


@dataclass(frozen=True)
class Plan(KernelPlan):
    """What the plans of the attention kernels have in common.

    Attributes
    ----------
    head_dim, head_dim_v
        Columns of the tiles of q and k, and of v and o.
    tile_m, tile_n
        Rows (queries) and columns (keys) of a tile of scores.
    stages
        Tiles in flight: 1, or 2 where the next one is loaded during a whole step.
    blocks_per_sm
        Blocks that the registers of a multiprocessor must suffice for.
    band, softcap, alibi
        Which parts of the score policy are compiled in; `band` is causal or a window.
    """

    head_dim: int
    head_dim_v: int
    tile_m: int
    tile_n: int
    stages: int
    blocks_per_sm: int
    band: bool
    softcap: bool
    alibi: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_dim", "head_dim_v", "tile_m", "tile_n"):
            value = getattr(self, name)
            if value <= 0 or value % 16:
                raise ValueError(f"{name} is {value}, not a positive multiple of 16")

    @property
    def operand_bytes(self) -> int:
        """Bytes of shared memory that making operands takes, see split.cuh."""
        return OPERAND_BYTES if self.element in SPLIT_ELEMENTS else 0

    def tile_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a tile in shared memory."""
        return rows * row_bytes(columns, self.element)


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """A row for kernels_cu/attention_forward.cu.

    Attributes
    ----------
    head_dim_v
        May be narrower than v: then several blocks compute a slice of o's columns each.
    dim_unroll
        Steps of 16 along head_dim that Q K^T is unrolled by.
    dim_v_group
        Steps of 16 along head_dim_v of P V between two branches that skip missing columns of v;
        fewer steps take fewer registers.
    """

    dim_unroll: int
    dim_v_group: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile_m % (16 * self.warps):
            raise ValueError(f"{self.warps} warps cannot own 16-row blocks of tile_m={self.tile_m}")
        # o, S and the top and sum of each row are in registers all the time.
        words = max(self.element_bytes // 4, 1)
        rows = self.tile_m // self.warps
        held = rows * (self.head_dim_v + self.tile_n) // WARP * words
        if held > MAX_REGISTERS - 32:
            raise ValueError(f"o and S take {held} registers of a thread's {MAX_REGISTERS}: {self}")

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: q and the stages of k and v, in the end o in the same place."""
        d, dv = (row_bytes(n, self.element) for n in (self.head_dim, self.head_dim_v))
        inputs = self.tile_m * d + self.stages * self.tile_n * (d + dv)
        return self.operand_bytes + max(inputs, self.tile_m * dv)

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of rows, slice of o and head."""
        slices = ceil_div(problem.head_dim_v, self.head_dim_v)
        return ceil_div(problem.seqlen_q, self.tile_m) * slices * head_count(problem)


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """A row for kernels_cu/attention_backward.cu; tile_m queries a step, tile_n keys a block.

    Attributes
    ----------
    key_warps
        Rows of the grid of warps: along the keys. Its columns are along those of dK and dV.
    dq_row_warps
        Rows of the grid of warps for dQ.
    unroll
        Steps of 16 that products are unrolled by.
    sum_dq
        Whether dQ is added up here, or left to attention_backward_dq.
    """

    key_warps: int
    dq_row_warps: int
    unroll: int
    sum_dq: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        dq_cols = self.warps // self.dq_row_warps
        shares = (
            (self.tile_n, self.key_warps),
            (self.tile_m, min(self.col_warps, self.tile_m // 16)),
            (self.head_dim, self.col_warps),
            (self.head_dim_v, self.col_warps),
            (self.tile_m, self.dq_row_warps),
            (self.head_dim, dq_cols),
        )
        for extent, warps in shares:
            if extent % (16 * warps):
                raise ValueError(f"{warps} warps cannot share {extent} in blocks of 16: {self}")

    @property
    def col_warps(self) -> int:
        """Columns of the grid of warps."""
        return self.warps // self.key_warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: k and v, the stages of q, do and the row terms; dS, P."""
        keys, queries = (
            self.tile_bytes(rows, self.head_dim) + self.tile_bytes(rows, self.head_dim_v)
            for rows in (self.tile_n, self.tile_m)
        )
        row_terms = 2 * self.tile_m * self.sum_bytes
        origins = 4 * 8  # addresses of the tensors of the queries
        weights = 2 if self.col_warps > 1 else int(self.sum_dq)
        return (
            origins
            + self.operand_bytes
            + keys
            + self.stages * (queries + row_terms)
            + weights * self.tile_bytes(self.tile_n, self.tile_m)
        )

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of keys and key head."""
        kv_heads = head_count(problem) // problem.group
        return ceil_div(problem.seqlen_k, self.tile_n) * kv_heads


@dataclass(frozen=True)
class BackwardDqPlan(Plan):
    """A row for kernels_cu/attention_backward_dq.cu; tile_m queries a block, tile_n keys a step.

    Attributes
    ----------
    dq_cols
        Columns of dQ that a block computes.
    unroll
        Steps of 16 along the head dims that S and dP are unrolled by.
    """

    dq_cols: int
    unroll: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: q and do, the stages of k and v."""
        queries, keys = (
            self.tile_bytes(rows, self.head_dim) + self.tile_bytes(rows, self.head_dim_v)
            for rows in (self.tile_m, self.tile_n)
        )
        return self.operand_bytes + queries + self.stages * keys

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of queries, slice of dq and head."""
        slices = ceil_div(problem.head_dim, self.dq_cols)
        return ceil_div(problem.seqlen_q, self.tile_m) * slices * head_count(problem)


@dataclass(frozen=True)
class RowDotsPlan(KernelPlan):
    """A row for kernels_cu/row_dots.cu."""

    head_dim_v: int
    tile_m: int

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of rows and head."""
        return ceil_div(problem.seqlen_q, self.tile_m) * head_count(problem)


@dataclass(frozen=True)
class StoreDqPlan(KernelPlan):
    """A row for kernels_cu/store_dq.cu."""

    head_dim: int
    tile_m: int
    softcap: bool

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: a tile of dq."""
        return self.tile_m * row_bytes(self.head_dim, self.element)

    def blocks(self, problem: Problem, tensors: Mapping[str, Array]) -> int:
        """Return one for every tile of rows and head."""
        return ceil_div(problem.seqlen_q, self.tile_m) * head_count(problem)


def ceil_div(a: int, b: int) -> int:
    """Return the quotient, rounded up."""
    return -(-a // b)


def head_count(problem: Problem) -> int:
    """Query heads of all batch entries."""
    return math.prod(problem.batch) * problem.heads


def score_options(problem: Problem, tensors: Container[str]) -> dict[str, bool]:
    """Return which parts of the score policy a call with these tensors needs, see `Plan`."""
    return {
        "band": problem.band.left is not None or problem.band.right is not None,
        "softcap": problem.softcap is not None,
        "alibi": "alibi_slopes" in tensors,
    }


def slice_width(head_dim_v: int, element: str) -> int:
    """Columns of o that a block computes: all, or one of two or more slices."""
    slices = -(-head_dim_v // MAX_SLICE.get(element, max(HEAD_DIMS)))
    return padded_head_dim(-(-head_dim_v // slices))


def plan_forward(
    card: Card,
    element: str,
    head_dim: int,
    head_dim_v: int,
    access_bytes: int,
    *,
    band: bool,
    softcap: bool,
    alibi: bool,
) -> ForwardPlan:
    """Choose the plan of a forward call.

    Parameters
    ----------
    card
        The GPU.
    element
        A key of `ELEMENT_BYTES`.
    head_dim, head_dim_v
        Of the call, 1 to 256.
    access_bytes
        See `Plan`.
    band, softcap, alibi
        See `Plan`.

    Raises
    ------
    ValueError
        No row of the table fits the card's shared memory.
    """
    head_dim = padded_head_dim(head_dim)
    rows = FORWARD_TILES[element][max(head_dim, padded_head_dim(head_dim_v))]
    plans = [
        ForwardPlan(
            element=element,
            head_dim=head_dim,
            head_dim_v=slice_width(head_dim_v, element),
            access_bytes=access_bytes,
            band=band,
            softcap=softcap,
            alibi=alibi,
            **row._asdict(),
        )
        for row in rows
    ]
    for blocks in (lambda plan: plan.blocks_per_sm, lambda plan: 1):
        for plan in plans:
            if card.holds(blocks(plan), plan.shared_bytes):
                return plan
    raise ValueError(
        f"no kernel for head dims {head_dim} and {head_dim_v} of {element} fits in "
        f"{card.shared_bytes} bytes of shared memory; the smallest takes {plans[-1].shared_bytes}"
    )


def _padded_to(columns: int, warps: int) -> int:
    """Columns that `warps` warps can share in blocks of 16."""
    return ceil_div(columns, 16 * warps) * 16 * warps


def _backward_plan(
    row: BackwardTiles, head_dim: int, head_dim_v: int, options: dict[str, Any]
) -> BackwardPlan:
    col_warps, dq_col_warps = row.warps // row.key_warps, row.warps // row.dq_row_warps
    return BackwardPlan(
        **row._asdict(),
        head_dim=_padded_to(head_dim, max(col_warps, dq_col_warps)),
        head_dim_v=_padded_to(head_dim_v, col_warps),
        **options,
    )


def _backward_dq_plan(
    row: BackwardDqTiles, head_dim: int, head_dim_v: int, options: dict[str, Any]
) -> BackwardDqPlan:
    dq_cols = slice_width(head_dim, options["element"])
    return BackwardDqPlan(
        **row._asdict(),
        head_dim=ceil_div(head_dim, dq_cols) * dq_cols,
        head_dim_v=head_dim_v,
        dq_cols=dq_cols,
        **options,
    )


def plan_kernel(
    kernel: str,
    card: Card,
    element: str,
    head_dim: int,
    head_dim_v: int,
    access_bytes: int,
    *,
    band: bool,
    softcap: bool,
    alibi: bool,
    sum_dq: bool,
) -> KernelPlan:
    """Choose the plan of any kernel, as `plan_forward` does."""
    if kernel == "attention_forward":
        return plan_forward(
            card,
            element,
            head_dim,
            head_dim_v,
            access_bytes,
            band=band,
            softcap=softcap,
            alibi=alibi,
        )
    head_dim, head_dim_v = padded_head_dim(head_dim), padded_head_dim(head_dim_v)
    if kernel == "row_dots":
        return RowDotsPlan(element, access_bytes, 4, head_dim_v, 64)
    if kernel == "store_dq":
        return StoreDqPlan(element, access_bytes, 4, head_dim, 32, softcap)
    options: dict[str, Any] = dict(
        element=element, access_bytes=access_bytes, band=band, softcap=softcap, alibi=alibi
    )
    widest = max(head_dim, head_dim_v)
    plans: list[BackwardPlan] | list[BackwardDqPlan]
    if kernel == "attention_backward":
        options["sum_dq"] = sum_dq
        plans = [
            _backward_plan(row, head_dim, head_dim_v, options)
            for row in _rows_for(widest, BACKWARD_TILES[element])
        ]
    else:
        plans = [
            _backward_dq_plan(row, head_dim, head_dim_v, options)
            for row in _rows_for(widest, BACKWARD_DQ_TILES[element])
        ]
    for plan in plans:
        if plan.shared_bytes <= card.shared_bytes:
            return plan
    raise ValueError(
        f"no backward kernel for head dims {head_dim} and {head_dim_v} of {element} fits in "
        f"{card.shared_bytes} bytes of shared memory; the smallest takes {plans[-1].shared_bytes}"
    )


def _rows_for(head_dim: int, table: dict[int, list[Any]]) -> list[Any]:
    """Rows of the narrowest head dim of a table that is wide enough."""
    return next(rows for widest, rows in table.items() if head_dim <= widest)
