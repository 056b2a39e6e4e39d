"""The Hopper family's kernels, executed on the CPU by the simulated device of tests/host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import HOST
from errors import assert_exact, assert_finite_alike
from host.device import missing_compiler
from host.machine import HOPPER, HostMachine
from strategies import (
    BFLOAT16,
    FLOAT16,
    FLOAT64,
    GROWTHS,
    LAYOUTS,
    NONFINITE,
    Case,
    growing_case,
    make_case,
    nonfinite_case,
)

import flash_cupy
from flash_cupy.cuda import force_family, hopper, hopper_backward
from flash_cupy.cuda.engine import CudaEngine
from flash_cupy.cuda.plan import Card
from flash_cupy.problem import Problem

Run = Callable[..., tuple[np.ndarray, ...]]


@pytest.fixture(scope="module")
def hopper_engine() -> Iterator[CudaEngine]:
    """The CUDA engine on a simulated GPU of compute capability 9.0."""
    if reason := missing_compiler():
        pytest.skip(reason)
    machine = HostMachine(HOPPER)
    yield CudaEngine(machine)
    machine.host.close()


@pytest.fixture
def forget_plans(hopper_engine: CudaEngine) -> Iterator[Callable[[], None]]:
    """To call when plans are to be chosen anew, which they also are after the test."""

    def forget() -> None:
        hopper_engine._works.clear()
        for cache in (hopper_backward.choose_plan, hopper_backward.workspace):
            cache.cache_clear()

    yield forget
    forget()


@pytest.fixture
def long_plans(forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of long sequences for those that can be simulated."""
    for module, name in ((hopper, "FORWARD_TILES"), (hopper_backward, "BACKWARD_TILES")):
        table = {
            key: [row._replace(min_seqlen=0) for row in rows]
            for key, rows in getattr(module, name).items()
        }
        monkeypatch.setattr(module, name, table)
    forget_plans()


@pytest.fixture
def four_consumers(forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward plan of rows that fill its tiles for all others, too."""
    rows = hopper.FORWARD_TILES[64, 64]
    chosen = [row._replace(most_waste=None, min_seqlen=0) for row in rows if row.consumers == 4]
    monkeypatch.setitem(hopper.FORWARD_TILES, (64, 64), [*chosen, *rows])
    forget_plans()


@pytest.fixture
def whole_heads(forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of many short heads for a few of them: a block computes all gradients of one."""
    monkeypatch.setattr(hopper_backward, "LEAST_BUSY", 0)
    forget_plans()


@pytest.fixture(params=[None, "long_plans", "four_consumers"])
def plans(request: pytest.FixtureRequest) -> None:
    """A call's own plans, and those of others."""
    if request.param is not None:
        request.getfixturevalue(request.param)


@pytest.fixture
def forward(hopper_engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Compute (o, lse) of a case with the family."""
    monkeypatch.setattr("flash_cupy.engine.tiled", hopper_engine)

    def run(case: Case, layout: Any = None) -> tuple[np.ndarray, ...]:
        q, k, v = (x if layout is None else layout(np, x) for x in (case.q, case.k, case.v))
        with force_family("hopper"):
            return flash_cupy.attention_forward(q, k, v, device="cpu", **case.options)

    return run


@pytest.fixture
def both(hopper_engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Compute (o, lse, dq, dk, dv) of a case with the family."""
    monkeypatch.setattr("flash_cupy.engine.tiled", hopper_engine)

    def run(case: Case, deterministic: bool = False) -> tuple[np.ndarray, ...]:
        with force_family("hopper"):
            return HOST.run(case, deterministic=deterministic)

    return run


# batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, dtype, options
CASES: dict[str, tuple[Any, ...]] = {
    "one row, one key": ((), 1, 1, 1, 1, 64, 64, FLOAT16, {}),
    "ragged ends": ((), 2, 2, 193, 257, 64, 64, BFLOAT16, {}),
    "causal, more keys": ((), 1, 1, 193, 300, 64, 64, FLOAT16, {"causal": True}),
    "rows that see nothing": ((), 2, 2, 420, 67, 64, 64, BFLOAT16, {"causal": True}),
    "window": ((), 1, 1, 340, 340, 64, 64, FLOAT16, {"window": (30, 10)}),
    "grouped heads and a batch": ((2,), 4, 2, 140, 270, 128, 128, BFLOAT16, {"causal": True}),
    "short queries of groups": ((2,), 8, 2, 3, 150, 64, 64, BFLOAT16, {"softcap": 4.0}),
    "several items a block": ((2,), 8, 2, 260, 150, 128, 128, FLOAT16, {}),
    "softcap and alibi": (
        (2,),
        2,
        1,
        65,
        270,
        64,
        64,
        FLOAT16,
        {"alibi": True, "softcap": 3.0, "window": (None, 3)},
    ),
    "head dims between those of kernels": ((), 1, 1, 130, 300, 88, 72, FLOAT16, {"causal": True}),
    "other head dim of v": ((), 1, 1, 130, 260, 192, 128, BFLOAT16, {}),
    "wide heads": ((), 2, 1, 140, 161, 256, 256, BFLOAT16, {"causal": True}),
    "tickets": ((), 2, 1, 260, 1030, 64, 64, BFLOAT16, {"window": (200, 0)}),
    "consumers that see more or less": ((), 1, 1, 576, 576, 64, 64, BFLOAT16, {"causal": True}),
    "consumers that see other keys": ((), 2, 1, 420, 420, 64, 64, FLOAT16, {"window": (20, 20)}),
    "fewer keys, several tiles": ((), 1, 1, 500, 260, 64, 64, FLOAT16, {"causal": True}),
    "consumers without rows": ((2,), 2, 1, 65, 700, 64, 64, BFLOAT16, {}),
    "consumers without rows, masked": (
        (2,),
        2,
        1,
        65,
        700,
        64,
        64,
        FLOAT16,
        {"window": (560, 0)},
    ),
    "consumers without rows or turns": ((), 2, 1, 60, 600, 256, 256, FLOAT16, {"causal": True}),
    "consumers beyond what rows see": ((), 1, 1, 193, 193, 64, 64, FLOAT16, {"window": (5, 0)}),
    "the tiles of long rows": ((), 1, 1, 70, 4100, 128, 128, FLOAT16, {}),
    "full tiles between masks": ((), 2, 1, 200, 1100, 128, 128, BFLOAT16, {"window": (600, 0)}),
    "full tiles behind a mask, wide": ((), 1, 1, 150, 500, 256, 256, FLOAT16, {"causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_softmax(forward: Run, name: str) -> None:
    *shape, dtype, options = CASES[name]
    case = make_case(*shape, dtype, seed=1, **options)
    assert_exact(case, forward(case))


#: With a mask and of head dim 64: there two, three or four consumers share an item.
MASKED = [
    name for name, case in CASES.items() if case[5] == 64 and {"causal", "window"} & case[-1].keys()
]


@pytest.mark.parametrize(
    "name", [*MASKED, "full tiles between masks", "full tiles behind a mask, wide"]
)
def test_masks_with_the_plans_of_long_sequences(long_plans: None, forward: Run, name: str) -> None:
    test_equals_dense_softmax(forward, name)


@pytest.mark.parametrize("name", [*MASKED, "ragged ends", "consumers without rows"])
def test_items_of_four_consumers(four_consumers: None, forward: Run, name: str) -> None:
    test_equals_dense_softmax(forward, name)


@pytest.mark.parametrize("seqlen", [127, 128, 129, 191, 192, 193, 255, 256, 257])
def test_lengths_around_the_tiles(plans: None, forward: Run, seqlen: int) -> None:
    case = make_case((), 1, 1, seqlen, seqlen, 64, 64, FLOAT16, seed=seqlen, causal=True)
    assert_exact(case, forward(case))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_scores_that_grow_from_tile_to_tile(
    four_consumers: None, forward: Run, head_dim: int, growth: float, causal: bool
) -> None:
    case = growing_case(400, head_dim, FLOAT16, growth, causal=causal)
    assert_exact(case, forward(case))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_growing_scores_with_the_plans_of_long_sequences(
    long_plans: None, forward: Run, head_dim: int, growth: float, causal: bool
) -> None:
    case = growing_case(600, head_dim, BFLOAT16, growth, causal=causal)
    assert_exact(case, forward(case))


@pytest.mark.parametrize("what", NONFINITE)
@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (64, True), (128, False)])
def test_nonfinite_scores_of_long_rows(
    long_plans: None, forward: Run, head_dim: int, causal: bool, what: str
) -> None:
    case = nonfinite_case(600, head_dim, BFLOAT16, what, causal=causal)
    assert_finite_alike(case, forward(case))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_strided_views(forward: Run, layout: Any) -> None:
    case = make_case((2,), 2, 1, 33, 40, 64, 64, FLOAT16, seed=3, causal=True)
    expected = forward(case)
    try:
        got = forward(case, layout)
    except ValueError as error:
        assert "the hopper family cannot take this call" in str(error)
        pytest.skip(str(error))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("seqlen", "head_dim", "window", "keys"),
    # In the second case, with three consumers, the first one of rows 192 to 383 sees the whole tile
    # of key 100, of which the other two see a part, and nothing of the tile of key 290.
    [(300, 128, (50, 9), (140, 255)), (400, 64, (260, 0), (100, 290))],
)
def test_nan_reaches_exactly_the_rows_that_see_it(
    plans: None,
    forward: Run,
    seqlen: int,
    head_dim: int,
    window: tuple[int, int],
    keys: tuple[int, int],
) -> None:
    case = make_case((), 2, 1, seqlen, seqlen, head_dim, head_dim, BFLOAT16, seed=4, window=window)
    v = case.v.copy()
    finite = np.ones((2, seqlen, head_dim), bool)
    for key, column, value in zip(keys, (3, 60), (np.nan, np.inf), strict=True):
        v[0, key, column] = value
        finite[:, key - window[1] : key + window[0] + 1, column] = False
    case = replace(case, v=v)
    o, lse = forward(case)
    np.testing.assert_array_equal(np.isfinite(o.astype(FLOAT64)), finite)
    assert_finite_alike(case, (o, lse))


# As above; backward, too, and whether in a fixed order.
BACKWARD_CASES: dict[str, tuple[Any, ...]] = {
    "one row, one key": ((), 1, 1, 1, 1, 64, 64, FLOAT16, {}, False),
    "ragged ends": ((), 2, 2, 193, 257, 64, 64, BFLOAT16, {}, True),
    "causal, more keys": ((), 1, 1, 193, 300, 128, 128, FLOAT16, {"causal": True}, False),
    "rows that see nothing": ((), 2, 2, 300, 67, 64, 64, BFLOAT16, {"causal": True}, True),
    "window": ((), 1, 1, 270, 270, 128, 128, FLOAT16, {"window": (30, 10)}, False),
    "grouped heads and a batch": ((2,), 4, 2, 140, 170, 64, 64, BFLOAT16, {"causal": True}, True),
    "softcap and alibi": (
        (2,),
        2,
        1,
        65,
        170,
        128,
        128,
        FLOAT16,
        {"alibi": True, "softcap": 3.0, "window": (None, 3)},
        False,
    ),
    "head dims between those of kernels": ((), 1, 1, 130, 140, 88, 72, FLOAT16, {}, False),
    "other head dim of v": ((), 1, 1, 130, 100, 192, 128, BFLOAT16, {"causal": True}, True),
    "narrow v": ((), 1, 1, 130, 140, 128, 72, BFLOAT16, {}, True),
    "wide heads": ((), 2, 1, 70, 161, 256, 256, BFLOAT16, {"causal": True}, False),
    "wide heads, in order": ((), 2, 1, 150, 70, 256, 256, FLOAT16, {"causal": True}, True),
    "wide heads, softcap": ((), 1, 1, 70, 70, 256, 256, FLOAT16, {"softcap": 3.0}, False),
    "wide heads, groups, alibi": ((), 4, 2, 70, 130, 256, 256, BFLOAT16, {"alibi": True}, True),
    "wide heads, narrower v": ((), 1, 1, 70, 70, 256, 192, BFLOAT16, {}, False),
}


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_gradients_equal_those_of_dense_softmax(both: Run, name: str) -> None:
    *shape, dtype, options, deterministic = BACKWARD_CASES[name]
    case = make_case(*shape, dtype, seed=2, **options)
    results = both(case, deterministic)
    assert_exact(case, results)
    if deterministic:  # the threads run in another order
        for x, y in zip(results, both(case, deterministic), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (90, 20)}], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "deterministic"),
    [(128, 128, False), (128, 128, True), (128, 64, False), (96, 96, False), (64, 96, True)],
)
def test_plans_of_long_sequences(
    long_plans: None,
    both: Run,
    mask: dict[str, Any],
    head_dim: int,
    head_dim_v: int,
    deterministic: bool,
) -> None:
    case = make_case((), 2, 1, 250, 300, head_dim, head_dim_v, BFLOAT16, seed=3, **mask)
    assert_exact(case, both(case, deterministic))


@pytest.fixture
def few_places(forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections so short that dq_sum has places for a part of some dozens of heads."""
    dq_places = hopper_backward.dq_places

    def checked(card: Card, problem: Problem, plan: hopper_backward.HopperBackwardPlan) -> int:
        places = dq_places(card, problem, plan)
        assert places < hopper_backward.key_head_count(problem)
        return places

    for name in ("SECTION_TILES", "SHORT_SECTION_TILES", "SECTION_STEPS", "SHORT_SECTION_STEPS"):
        monkeypatch.setattr(hopper_backward, name, 2)
    monkeypatch.setattr(hopper_backward, "dq_places", checked)
    forget_plans()


#: More key heads than dq_sum has places for. As above.
REUSED_PLACES: dict[str, tuple[Any, ...]] = {
    "more than twice as many": ((3,), 24, 24, 9, 30, 128, 128, FLOAT16, {}, False),
    "a tile a head, masked": ((3,), 14, 14, 70, 60, 64, 64, BFLOAT16, {"causal": True}, False),
    "several tiles": ((2,), 10, 10, 40, 300, 64, 64, FLOAT16, {}, True),
    "several tiles, masked": (
        (2,),
        10,
        10,
        130,
        200,
        128,
        128,
        BFLOAT16,
        {"window": (90, 9)},
        True,
    ),
    "groups": ((3,), 26, 13, 20, 30, 128, 128, FLOAT16, {"softcap": 3.0}, True),
    "groups, several tiles": ((2,), 20, 10, 70, 150, 128, 128, BFLOAT16, {}, True),
    "narrow heads": ((3,), 12, 12, 20, 30, 72, 104, FLOAT16, {"alibi": True}, False),
    "wide heads": ((3,), 12, 12, 20, 50, 256, 256, BFLOAT16, {}, False),
    "wide heads, several tiles": ((2,), 12, 12, 20, 150, 256, 256, FLOAT16, {}, True),
    "other head dim of v": ((3,), 15, 15, 20, 90, 192, 128, FLOAT16, {"causal": True}, True),
}


@pytest.mark.parametrize("name", REUSED_PLACES)
def test_places_that_are_used_again(few_places: None, both: Run, name: str) -> None:
    *shape, dtype, options, deterministic = REUSED_PLACES[name]
    case = make_case(*shape, dtype, seed=4, **options)
    assert_exact(case, both(case, deterministic))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_nan_in_places_that_are_used_again(few_places: None, both: Run, head_dim: int) -> None:
    """It stays with its head: one whose place another will have, and one that has another's."""
    case = make_case((), 40, 40, 20, 30, head_dim, head_dim, FLOAT16, seed=4, causal=True)
    clean = both(case)
    k = case.k.copy()
    k[[3, 38], 29, 5] = np.nan
    spoilt = both(replace(case, k=k))
    assert np.isnan(spoilt[2][[3, 38], 19, 5]).all()
    others = ~np.isin(np.arange(40), [3, 38])
    for x, y in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(x[others], y[others])


#: Without groups, softcap and slopes; up to 512 queries.
WHOLE_HEAD_CASES: dict[str, tuple[Any, ...]] = {
    "one row, one key": ((), 1, 1, 1, 1, 64, 64, FLOAT16, {}),
    "one tile": ((), 1, 1, 64, 128, 64, 64, BFLOAT16, {}),
    "ragged ends": ((), 2, 2, 193, 257, 64, 64, BFLOAT16, {}),
    "narrow heads and a batch": ((2,), 2, 2, 70, 290, 40, 56, FLOAT16, {"causal": True}),
    "keys that no query sees": ((), 1, 1, 70, 700, 64, 64, FLOAT16, {"window": (60, 0)}),
    "rows that see nothing": ((), 2, 2, 300, 67, 64, 64, BFLOAT16, {"causal": True}),
    "window": ((), 1, 1, 340, 340, 64, 64, FLOAT16, {"window": (30, 10)}),
    "all rows": ((), 1, 1, 512, 400, 64, 64, BFLOAT16, {"causal": True}),
}


@pytest.mark.parametrize("name", WHOLE_HEAD_CASES)
def test_blocks_of_a_whole_head(whole_heads: None, both: Run, name: str) -> None:
    *shape, dtype, options = WHOLE_HEAD_CASES[name]
    case = make_case(*shape, dtype, seed=2, **options)
    results = both(case)
    assert_exact(case, results)
    for x, y in zip(results, both(case, deterministic=True), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("row", [70, 150])
@pytest.mark.parametrize("name", ["q", "k", "do"])
def test_nan_in_blocks_of_a_whole_head(whole_heads: None, both: Run, name: str, row: int) -> None:
    check_nan(both, name, 64, 64, row)


@pytest.mark.parametrize("name", ["q", "k", "do"])
def test_nan_where_keys_are_in_registers(both: Run, name: str) -> None:
    check_nan(both, name, 64, 64, alibi=True)


@pytest.mark.parametrize("name", ["q", "k", "do"])
def test_nan_in_plans_of_long_sequences(long_plans: None, both: Run, name: str) -> None:
    check_nan(both, name, 128, 128)


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "do"])
def test_nan_reaches_the_gradients_of_what_sees_it(
    both: Run, name: str, head_dims: tuple[int, int]
) -> None:
    check_nan(both, name, *head_dims)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["q", "k", "do"])
def test_nan_where_a_consumer_has_nothing_to_see(
    whole_heads: None, both: Run, name: str, head_dim: int
) -> None:
    check_nan(both, name, head_dim, head_dim, row=30)


def check_nan(
    both: Run, name: str, head_dim: int, head_dim_v: int, row: int = 70, **options: Any
) -> None:
    """Spoil a row of an input: what has nothing to do with it is as exact as without."""
    dims = head_dim, head_dim_v
    case = make_case((), 1, 1, 200, 200, *dims, FLOAT16, seed=5, causal=True, **options)
    spoilt = getattr(case, name).copy()
    spoilt[0, row, 3] = np.inf if name == "do" else np.nan
    case = replace(case, **{name: spoilt})
    results = both(case, True)
    assert_finite_alike(case, results)
    rows = np.arange(200)
    if name == "k":  # all queries from there on see it, and with them all keys are spoilt
        untouched = (rows < row, rows < 0, rows < 0)
    else:
        untouched = (rows != row, rows > row, rows > row)
    for x, expected in zip(results[2:], untouched, strict=True):
        np.testing.assert_array_equal(np.isfinite(x[0].astype(FLOAT64)).all(axis=1), expected)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", ["q", "do", "dlse"])
def test_nan_in_a_query_that_sees_nothing(
    whole_heads: None, both: Run, name: str, head_dim: int, alibi: bool
) -> None:
    dims = head_dim, head_dim
    case = make_case((), 1, 1, 100, 70, *dims, FLOAT16, seed=6, causal=True, alibi=alibi)
    spoilt = getattr(case, name).copy()
    spoilt[0, 5] = np.nan
    results = both(replace(case, **{name: spoilt}))
    assert_exact(case, results)


#: Head dims, options.
NAN_AMONG_GROUPS = [
    (88, 72, {"window": (50, 20), "alibi": True}),
    (192, 128, {"causal": True}),
    (256, 256, {"window": (90, 0), "softcap": 3.0}),
]


@pytest.mark.parametrize(("head_dim", "head_dim_v", "options"), NAN_AMONG_GROUPS, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_nan_among_groups_and_a_batch(
    both: Run, name: str, head_dim: int, head_dim_v: int, options: dict[str, Any]
) -> None:
    case = make_case((2,), 4, 2, 110, 140, head_dim, head_dim_v, BFLOAT16, seed=6, **options)
    spoilt = getattr(case, name).copy()
    spoilt[1, 1, [60, 99], [70, 2]] = np.nan, -np.inf
    case = replace(case, **{name: spoilt})
    assert_finite_alike(case, both(case))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_rows_of_which_all_scores_are_minus_infinity(both: Run, head_dim: int) -> None:
    """As a single key with an infinite entry gives to every other query."""
    case = make_case((), 1, 1, 20, 1, head_dim, head_dim, FLOAT16, seed=7)
    k = case.k.copy()
    k[0, 0, 5] = -np.inf
    case = replace(case, k=k)
    assert_finite_alike(case, both(case))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_missing_queries_do_not_meet_an_infinite_key(both: Run, head_dim: int) -> None:
    """A tile's rows beyond the last query are zeros: their score with it is NaN."""
    case = make_case((), 1, 1, 129, 2, head_dim, head_dim, FLOAT16, seed=7, causal=True)
    k = case.k.copy()
    k[0, 1, 9] = -np.inf
    case = replace(case, k=k)
    assert_finite_alike(case, both(case))


def test_infinity_that_a_softcap_hides_from_lse(both: Run) -> None:
    case = make_case((), 1, 1, 200, 200, 64, 64, FLOAT16, seed=6, causal=True, softcap=2.0)
    q = case.q.copy()
    q[0, 70, 3] = np.inf
    case = replace(case, q=q)
    assert_finite_alike(case, both(case, True))


#: Where an infinite or missing value is out of sight, or meets one: seqlen_q, seqlen_k, causal, the
#: input that is spoilt, its row, and by what.
HIDDEN_BY_SOFTCAP = [
    (100, 130, True, "k", 100, np.nan),
    (40, 1, False, "k", 0, np.inf),
    (64, 40, False, "q", 7, np.inf),
]


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("spoilt", HIDDEN_BY_SOFTCAP, ids=str)
def test_softcap_keeps_out_what_is_out_of_sight(
    both: Run, spoilt: tuple[int, int, bool, str, int, float], alibi: bool, head_dim: int
) -> None:
    *seqlens, causal, name, row, value = spoilt
    dims = head_dim, head_dim
    case = make_case(
        (), 1, 1, *seqlens, *dims, FLOAT16, seed=8, causal=causal, softcap=2.0, alibi=alibi
    )
    x = getattr(case, name).copy()
    x[0, row, 3] = value
    case = replace(case, **{name: x})
    assert_finite_alike(case, both(case))
