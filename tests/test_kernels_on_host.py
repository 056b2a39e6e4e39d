"""The CUDA kernels, executed on the CPU by the simulated device of tests/host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engines import Engine
from errors import assert_exact, assert_finite_alike
from strategies import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, LAYOUTS, make_case

# batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, dtype, options
CASES = {
    "one row, one key": ((), 1, 1, 1, 1, 64, 64, FLOAT16, {}),
    "two tiles and a ragged end": ((), 1, 1, 131, 135, 64, 64, BFLOAT16, {}),
    "causal, more keys": ((), 1, 1, 67, 150, 64, 64, FLOAT16, {"causal": True}),
    "causal, more queries": ((), 1, 1, 150, 67, 32, 32, BFLOAT16, {"causal": True}),
    "window": ((), 1, 1, 140, 140, 64, 64, FLOAT16, {"window": (30, 10)}),
    "grouped heads and a batch": ((2,), 4, 2, 40, 70, 64, 64, BFLOAT16, {"causal": True}),
    "short queries of groups": ((2,), 8, 2, 3, 70, 64, 64, FLOAT16, {}),
    "softcap": ((), 1, 1, 65, 65, 64, 64, FLOAT16, {"softcap": 2.0, "causal": True}),
    "alibi": ((2,), 2, 1, 65, 70, 64, 64, FLOAT16, {"alibi": True, "window": (None, 3)}),
    "other head dim of v": ((), 1, 1, 33, 65, 96, 40, BFLOAT16, {}),
    "head dims that fill no chunk": ((), 2, 1, 33, 40, 59, 111, FLOAT16, {"causal": True}),
    "wide heads": ((), 1, 1, 65, 70, 256, 256, BFLOAT16, {"causal": True}),
    "float32": ((), 2, 1, 70, 75, 64, 64, FLOAT32, {"causal": True}),
    "float32, ragged": ((), 1, 1, 31, 33, 31, 17, FLOAT32, {"softcap": 3.0}),
    "float32, wide": ((), 1, 1, 33, 65, 128, 128, FLOAT32, {}),
    "float64": ((), 2, 1, 70, 75, 64, 64, FLOAT64, {"causal": True}),
    "float64, every option": (
        (2,),
        2,
        1,
        33,
        65,
        24,
        40,
        FLOAT64,
        {"alibi": True, "softcap": 3.0, "window": (40, 5), "scale": 0.3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_softmax(host_engine: Engine, name: str) -> None:
    *shape, dtype, options = CASES[name]
    case = make_case(*shape, dtype, seed=1, **options)
    assert_exact(case, host_engine.run(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_backward(host_engine: Engine, dtype: np.dtype) -> None:
    case = make_case((), 2, 1, 70, 67, 32, 32, dtype, seed=2, causal=True)
    first = host_engine.run(case, deterministic=True)
    assert_exact(case, first)
    again = host_engine.run(case, deterministic=True)  # the threads run in another order
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_strided_views(host_engine: Engine, layout) -> None:
    case = make_case((2,), 2, 1, 33, 40, 24, 16, FLOAT16, seed=3, causal=True)
    got = host_engine.run(case, layout, deterministic=True)
    for x, y in zip(got, host_engine.run(case, deterministic=True), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lead", [(), (1,)], ids=str)
def test_keys_and_values_of_a_whole_batch(host_engine: Engine, lead: tuple[int, ...]) -> None:
    """Kernels write gradients of every entry, in memory that is strided like the sums."""
    case = make_case((3,), 2, 1, 20, 33, 16, 16, FLOAT32, seed=5, causal=True)
    k, v = (x[:1].reshape(*lead, *x.shape[1:]) for x in (case.k, case.v))
    repeated = {name: np.repeat(getattr(case, name)[:1], 3, axis=0) for name in ("k", "v")}
    *expected, dk, dv = host_engine.run(replace(case, **repeated))
    sums = (x.sum(axis=0).reshape(*lead, *x.shape[1:]) for x in (dk, dv))
    for got, y in zip(host_engine.run(replace(case, k=k, v=v)), (*expected, *sums), strict=True):
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, FLOAT64], ids=str)
def test_nan_reaches_exactly_the_rows_that_see_it(host_engine: Engine, dtype: np.dtype) -> None:
    case = make_case((), 1, 1, 70, 70, 16, 16, dtype, seed=4, causal=True)
    v = case.v.copy()
    v[0, 40, 3] = np.nan
    clean = host_engine.run(case, deterministic=True)
    o, _, dq, _, dv = host_engine.run(replace(case, v=v), deterministic=True)
    assert np.isnan(o[0, 40:, 3].astype(FLOAT64)).all()
    np.testing.assert_array_equal(o[0, :40], clean[0][0, :40])
    np.testing.assert_array_equal(dq[0, :40], clean[2][0, :40])
    np.testing.assert_array_equal(dv, clean[4])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", [None, "tf32"])
@pytest.mark.parametrize("name", ["q", "k", "do"])
def test_nan_in_float32_reaches_the_gradients_of_what_sees_it(
    host_engine: Engine, name: str, precision: str | None, deterministic: bool
) -> None:
    options = {"causal": True} if precision is None else {"causal": True, "precision": precision}
    case = make_case((), 1, 1, 70, 70, 16, 16, FLOAT32, seed=5, **options)
    spoilt = getattr(case, name).copy()
    spoilt[0, 40, 3] = np.nan
    clean = host_engine.run(case, deterministic=deterministic)
    _, _, dq, dk, dv = host_engine.run(replace(case, **{name: spoilt}), deterministic=deterministic)
    np.testing.assert_allclose(dq[0, :40], clean[2][0, :40], rtol=1e-5, atol=1e-6)
    if name == "k":
        assert np.isnan(dq[0, 40:]).all()
    else:
        np.testing.assert_array_equal(dk[0, 41:], clean[3][0, 41:])
        np.testing.assert_array_equal(dv[0, 41:], clean[4][0, 41:])
        assert np.isnan((dk if name == "q" else dv)[0, :41, 3]).all()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT64], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_of_which_all_scores_are_minus_infinity(
    host_engine: Engine, dtype: np.dtype, deterministic: bool
) -> None:
    """As a single key with an infinite entry gives to every other query."""
    case = make_case((), 1, 1, 20, 1, 64, 64, dtype, seed=7)
    k = case.k.copy()
    k[0, 0, 5] = -np.inf
    case = replace(case, k=k)
    assert_finite_alike(case, host_engine.run(case, deterministic=deterministic))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [3e3, 1e15])
def test_huge_float32_logits_give_no_nan(
    host_engine: Engine, size: float, deterministic: bool
) -> None:
    """Logits of 1e7 and 1e30: a weight may come out above 1, and scales beyond float."""
    case = make_case((), 1, 1, 40, 40, 16, 16, FLOAT32, seed=6)
    q, k = (np.float32(size) * x for x in (case.q, case.k))
    results = host_engine.run(replace(case, q=q, k=k), deterministic=deterministic)
    assert all(np.isfinite(x).all() for x in results[:2])
    assert not any(np.isnan(x).any() for x in results)
