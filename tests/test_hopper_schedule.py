"""The order in which blocks of the Hopper backward main kernel compute and round, without a GPU.

`Grid` mirrors in Python what decides on it in the kernels: who computes, rounds and waits for what.
All numbers come from the plan, as for a launch. The blocks then run one after another in the order
of their indices, and each must find what it would wait for: so nobody waits for a later one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
from cubins import HOPPER as HOPPER_CARD
from hypothesis import assume, given, settings
from strategies import BFLOAT16, windows

from flash_cupy.cuda.hopper_backward import HopperBackwardPlan, choose_plan, workspace
from flash_cupy.cuda.params import BAND_LIMIT
from flash_cupy.cuda.plan import Card, ceil_div
from flash_cupy.cuda.tensors import Layout
from flash_cupy.problem import Options, Problem

HOPPER = Card(**HOPPER_CARD)
HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]

#: More take long; fewer multiprocessors show as well what happens after the first places.
MOST_SHARES = 3000


class HeadTile(NamedTuple):
    head: int
    tile: int


class Role(NamedTuple):
    computes: bool
    share: int
    piece: int = 0
    pieces: int = 0


class Piece(NamedTuple):
    """What a warp rounds: one of some pieces of a share."""

    share: int
    piece: int
    pieces: int


def nth_head_tile(number: int, tiles: int, heads: int, section: int) -> HeadTile:
    """The mirror of kernels_cu/head_tiles.cuh."""
    first = number // (section * tiles) * section
    rest = number - first * tiles
    wide = min(section, heads - first)
    return HeadTile(first + rest % wide, rest // wide)


def range_of(owner: int, owners: int, count: int) -> range:
    """The mirror of `DqRounding::range_of`."""
    some, more = divmod(count, owners)
    begin = owner * some + min(owner, more)
    return range(begin, begin + some + (owner < more))


def visible_tiles(band: tuple[int, int], rows: range, tile: int, columns: int) -> range:
    """The mirror of kernels_cu/score.cuh."""
    low, high = band
    first, last = max(rows[0] + low, 0), min(rows[-1] + high, columns - 1)
    begin = first // tile
    return range(begin, begin if last < first else last // tile + 1)


def rows_of(tile: int, rows: int, count: int) -> range:
    return range(tile * rows, min((tile + 1) * rows, count))


@dataclass(frozen=True)
class Grid:
    """The blocks of a launch: mirrors of `DqRounding`, and where it is said of `BackwardBlock`.

    ``places`` is what the kernels know as dq_heads: of how many key heads dq_sum has room.
    """

    problem: Problem
    plan: HopperBackwardPlan
    blocks: int
    key_heads: int
    places: int
    section: int
    lag: int
    pieces: int

    @property
    def tiles(self) -> int:
        """Tiles of keys of a head."""
        return ceil_div(self.problem.seqlen_k, self.plan.tile_n)

    @property
    def query_tiles(self) -> int:
        return ceil_div(self.problem.seqlen_q, self.plan.tile_m)

    @property
    def shares(self) -> int:
        return self.key_heads * self.tiles

    @property
    def reuses(self) -> bool:
        """Whether heads add up where others did."""
        return self.places < self.key_heads

    # ---- who does what --------------------------------------------------------------------------

    def role(self, block: int) -> Role:
        warps, lag = self.plan.warps, self.lag
        if block < lag:
            return Role(True, block)
        block -= lag
        periods = (self.shares - lag) // warps
        if block < periods * (warps + 1):
            period, place = divmod(block, warps + 1)
            if place < warps:
                return Role(True, lag + period * warps + place)
            return Role(False, period * warps, 0, 1)
        block -= periods * (warps + 1)
        rest = self.shares - lag - periods * warps
        if block < rest:
            return Role(True, self.shares - rest + block)
        piece = (block - rest) * warps
        return Role(False, periods * warps + piece // self.pieces, piece % self.pieces, self.pieces)

    def share(self, number: int) -> HeadTile:
        return nth_head_tile(number, self.tiles, self.key_heads, self.section)

    def place_of(self, number: int) -> HeadTile:
        """`BackwardBlock::place_of`: what a block computes that stands for a share."""
        head, tile = self.share(number)
        return HeadTile(head, self.tiles - 1 - tile if self.plan.deterministic else tile)

    def rounded_by(self, role: Role) -> Iterator[Piece]:
        """`DqRounding::run_block`: what the warps of a block round."""
        for warp in range(self.plan.warps):
            more, piece = divmod(role.piece + warp, role.pieces)
            if role.share + more < self.shares:
                yield Piece(role.share + more, piece, role.pieces)

    @property
    def head_parts(self) -> int:
        """Parts of a key head's dQ, with all of its group."""
        return self.problem.group * self.query_tiles * self.plan.dq_parts

    @property
    def part_eights(self) -> int:
        """`DqRounding::EIGHTS`: what warps load and round, 8 queries of 64 dims each."""
        dim_parts = ceil_div(self.plan.head_dim, 64)
        return self.plan.tile_m * dim_parts // self.plan.dq_parts // 8

    def eights_of(self, piece: Piece) -> range:
        """`DqRounding::round_piece`: those of a warp."""
        parts = range_of(self.share(piece.share).tile, self.tiles, self.head_parts)
        first, count = parts.start * self.part_eights, len(parts) * self.part_eights
        own = range_of(piece.piece, piece.pieces, count)
        return range(first + own.start, first + own.stop)

    def roles(self) -> list[Role]:
        """Of all blocks, in the order of their indices."""
        return [self.role(block) for block in range(self.blocks)]

    def rounded(self) -> list[Piece]:
        """What all blocks round."""
        rounding = (role for role in self.roles() if not role.computes)
        return [piece for role in rounding for piece in self.rounded_by(role)]

    # ---- turns ----------------------------------------------------------------------------------

    def band(self) -> tuple[int, int]:
        band = self.problem.band
        low = -BAND_LIMIT if band.left is None else band.offset - band.left
        return low, BAND_LIMIT if band.right is None else band.offset + band.right

    def steps_of(self, key_tile: int) -> range:
        """`BackwardBlock::query_tiles`: the tiles of queries that add to dQ for a tile of keys."""
        low, high = self.band()
        keys = rows_of(key_tile, self.plan.tile_n, self.problem.seqlen_k)
        return visible_tiles((-high, -low), keys, self.plan.tile_m, self.problem.seqlen_q)

    def last_turns(self) -> np.ndarray:
        """What `BackwardBlock::turn` takes the tile of keys from, of each tile of queries."""
        last = []
        for tile in range(self.query_tiles):
            queries = rows_of(tile, self.plan.tile_m, self.problem.seqlen_q)
            seen = visible_tiles(self.band(), queries, self.plan.tile_n, self.problem.seqlen_k)
            last.append(seen.stop - 1)
        return np.array(last)


def make_grid(card: Card, problem: Problem, alibi: bool, deterministic: bool) -> Grid | None:
    """The grid of a call's main kernel; None if its blocks compute whole heads."""
    plan = choose_plan(card, problem, alibi, deterministic)
    if plan.head_rows:
        return None
    assert plan.deterministic == deterministic
    shapes = workspace(card, problem, alibi, deterministic)
    dq_sum = Layout.contiguous(shapes["dq_sum"], np.dtype(np.float32))
    blocks, counts = plan.schedule(problem, {"dq_sum": dq_sum})
    return Grid(
        problem,
        plan,
        blocks,
        key_heads=shapes["dq_counts"][1],
        places=counts["dq_heads"],
        section=counts["section"],
        lag=counts["dq_lag"],
        pieces=counts["dq_pieces"],
    )


def make_problem(
    batch: int,
    kv_heads: int,
    group: int,
    lengths: tuple[int, int],
    dims: tuple[int, int],
    **options: Any,
) -> Problem:
    """A problem of arrays that take no memory."""
    seqlen_q, seqlen_k = lengths
    head_dim, head_dim_v = dims
    shapes = (
        (batch, kv_heads * group, seqlen_q, head_dim),
        (batch, kv_heads, seqlen_k, head_dim),
        (batch, kv_heads, seqlen_k, head_dim_v),
    )
    q, k, v = (np.broadcast_to(np.zeros((), BFLOAT16), shape) for shape in shapes)
    return Problem.of(q, k, v, Options(device="cpu", **options))


def seqlens() -> st.SearchStrategy[int]:
    """Short ones, and neighbours of tiles' ends."""
    near = st.builds(lambda n, more: 32 * n + more, st.integers(1, 300), st.integers(-1, 1))
    return st.integers(1, 300) | near


@st.composite
def grids(draw: st.DrawFn, deterministic: bool | None = None, reuses: bool = False) -> Grid:
    """Draw a call, and a card of few or many multiprocessors."""
    seqlen_k = draw(seqlens())
    lengths = draw(seqlens() | st.just(seqlen_k)), seqlen_k
    key_heads = draw(st.integers(1, max(1, MOST_SHARES // ceil_div(seqlen_k, 64))))
    batch = draw(st.sampled_from([1, 1, 2, 3]).filter(lambda n: n <= key_heads))
    problem = make_problem(
        batch,
        key_heads // batch,
        draw(st.sampled_from([1, 1, 2, 3, 8])),
        lengths,
        draw(st.sampled_from(HEAD_DIMS)),
        causal=draw(st.booleans()),
        window=draw(windows()),
        softcap=draw(st.sampled_from([None, None, None, 5.0])),
    )
    alibi = draw(st.sampled_from([False, False, False, True]))
    card = HOPPER._replace(multiprocessors=draw(st.integers(1, 16) | st.integers(1, 132)))
    if deterministic is None:
        deterministic = draw(st.booleans())
    grid = make_grid(card, problem, alibi, deterministic)
    assume(grid is not None)
    assert grid is not None
    assume(grid.reuses or not reuses)
    return grid


#: A shape takes some milliseconds.
many = settings(max_examples=3 * settings().max_examples)


@many
@given(grids())
def test_every_share_is_computed_by_one_block(grid: Grid) -> None:
    assert 0 <= grid.lag <= grid.shares  # no difference of unsigned numbers wraps around
    computed = [role.share for role in grid.roles() if role.computes]
    assert computed == list(range(grid.shares))
    expected = {(head, tile) for head in range(grid.key_heads) for tile in range(grid.tiles)}
    assert {grid.place_of(share) for share in computed} == expected


@many
@given(grids())
def test_every_piece_of_a_share_is_rounded_once(grid: Grid) -> None:
    rounded = Counter(grid.rounded())
    assert set(rounded.values()) == {1}
    pieces_of: dict[int, list[Piece]] = {}
    for piece in sorted(rounded):
        pieces_of.setdefault(piece.share, []).append(piece)
    assert list(pieces_of) == list(range(grid.shares))
    for share, pieces in pieces_of.items():
        count = len(pieces)
        assert count in (1, grid.pieces)
        assert pieces == [Piece(share, piece, count) for piece in range(count)]


@many
@given(grids())
def test_every_part_of_dq_is_rounded_once(grid: Grid) -> None:
    ranges: dict[int, list[range]] = {head: [] for head in range(grid.key_heads)}
    for piece in grid.rounded():
        ranges[grid.share(piece.share).head].append(grid.eights_of(piece))
    for of_head in ranges.values():
        own = sorted((x for x in of_head if x), key=lambda x: x.start)
        assert own[0].start == 0 and own[-1].stop == grid.head_parts * grid.part_eights
        assert all(x.stop == y.start for x, y in pairwise(own))


def check_waits(grid: Grid) -> None:
    """Run the blocks one after another: all that one waits for was done by blocks before it."""
    added, rounded = [0] * grid.key_heads, [0] * grid.key_heads
    for block, role in enumerate(grid.roles()):
        if role.computes:
            head = grid.place_of(role.share).head
            before = head - grid.places  # `wait_for_place`
            assert before < 0 or rounded[before] == grid.tiles, block
            added[head] += 1
        else:
            for piece in grid.rounded_by(role):
                head = grid.share(piece.share).head
                assert added[head] == grid.tiles, block
                rounded[head] += 1


@many
@given(grids())
def test_nobody_waits_for_a_later_block(grid: Grid) -> None:
    check_waits(grid)


@many
@given(grids(reuses=True))
def test_nobody_waits_for_a_place_in_vain(grid: Grid) -> None:
    check_waits(grid)


@many
@given(grids(deterministic=True))
def test_turns_come_in_the_order_of_blocks(grid: Grid) -> None:
    """Of a group's first query head; those of the others come like them."""
    turns = np.zeros((grid.key_heads, grid.query_tiles), int)
    last, steps = grid.last_turns(), [grid.steps_of(tile) for tile in range(grid.tiles)]
    for block, role in enumerate(grid.roles()):
        if role.computes:
            head, tile = grid.place_of(role.share)
            own = slice(steps[tile].start, steps[tile].stop)
            assert (turns[head, own] == last[own] - tile).all(), block
            turns[head, own] += 1


@many
@given(grids(reuses=True))
def test_shares_of_places_that_are_used_again_are_rounded_in_one_piece(grid: Grid) -> None:
    """Each is counted once where others wait for as many as the head has tiles."""
    for piece in grid.rounded():
        head = grid.share(piece.share).head
        assert piece.pieces == 1 or head + grid.places >= grid.key_heads


@many
@given(grids(reuses=True))
def test_places_are_whole_sections_and_enough(grid: Grid) -> None:
    """What kernels_cu/hopper_dq_rounding.cuh takes its order from."""
    section = grid.section * grid.tiles
    assert grid.places % grid.section == 0
    assert section <= grid.lag + 1
    assert grid.places * grid.tiles >= grid.lag + section + grid.plan.warps
