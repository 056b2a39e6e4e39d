"""Properties of attention, for every engine."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from engines import Engine
from errors import NAMES, assert_exact, dense
from hypothesis import assume, given
from ml_dtypes import finfo
from strategies import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LAYOUTS,
    SEQLENS,
    Case,
    cases,
    layouts,
    make_case,
)

import flash_cupy
from flash_cupy import tiled

FLOATS = (FLOAT32, FLOAT64)


def assert_same(got: tuple, expected: tuple) -> None:
    """Check for equal bits, NaN equal to NaN."""
    for name, x, y in zip(NAMES, got, expected, strict=False):
        np.testing.assert_array_equal(x, y, err_msg=name)


@given(case=cases())
def test_equals_dense_softmax(engine: Engine, case: Case) -> None:
    assert_exact(case, engine.run(case))


@pytest.mark.parametrize("seqlen_q", SEQLENS[::3])
@pytest.mark.parametrize("seqlen_k", SEQLENS[1::3])
@pytest.mark.parametrize("causal", [False, True])
def test_all_ragged_ends(engine: Engine, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    case = make_case((), 2, 1, seqlen_q, seqlen_k, 16, 24, FLOAT64, seed=0, causal=causal)
    assert_exact(case, engine.run(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_every_option(engine: Engine, dtype: np.dtype) -> None:
    case = make_case(
        (2,), 6, 2, 97, 131, 40, 31, dtype, 1, alibi=True, causal=True, window=(70, 5), softcap=3.0
    )
    assert_exact(case, engine.run(case))


@given(case=cases(smallest=1), layout=layouts)
def test_strided_view_equals_its_copy(engine: Engine, case: Case, layout) -> None:
    assert_same(engine.run(case, layout, deterministic=True), engine.run(case, deterministic=True))


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_zero_strides(engine: Engine, name: str) -> None:
    """One row, broadcast over the sequence."""
    case = make_case((2,), 3, 3, 33, 40, 8, 8, FLOAT64, seed=3, causal=True)
    x = getattr(case, name)
    case = replace(case, **{name: np.broadcast_to(x[..., :1, :], x.shape).copy()})
    assert_same(
        engine.run(case, _broadcast_if_constant, deterministic=True),
        engine.run(case, deterministic=True),
    )


def _broadcast_if_constant(xp, x):
    return xp.broadcast_to(x[..., :1, :], x.shape) if (x == x[..., :1, :]).all() else x


@given(case=cases(dtypes=FLOATS, smallest=1), seed=st.integers(0, 100))
def test_permuting_keys_changes_nothing(engine: Engine, case: Case, seed: int) -> None:
    case = replace(case, options={**case.options, "causal": False, "window": None})
    case.options.pop("alibi_slopes", None)
    order = np.random.default_rng(seed).permutation(case.k.shape[-2])
    o, lse, dq, dk, dv = engine.run(case)
    permuted = replace(case, k=case.k[..., order, :], v=case.v[..., order, :])
    o2, lse2, dq2, dk2, dv2 = engine.run(permuted)
    expected = (o, lse, dq, dk[..., order, :], dv[..., order, :])
    for x, y in zip((o2, lse2, dq2, dk2, dv2), expected, strict=True):
        np.testing.assert_allclose(x, y, **_close(case))


def _close(case: Case) -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-11} if case.dtype == FLOAT64 else {"rtol": 0, "atol": 2e-4}


@given(case=cases(dtypes=FLOATS, smallest=1), shift=st.floats(-30, 30))
def test_constant_added_to_scores_changes_only_lse(
    engine: Engine, case: Case, shift: float
) -> None:
    """A further feature, 1 in every key, adds ``scale * q_extra`` to all scores of a row."""
    case = replace(case, options={**case.options, "softcap": None, "scale": 0.5})
    q_extra = np.full((*case.q.shape[:-1], 1), 2 * shift, case.dtype)
    k_extra = np.ones((*case.k.shape[:-1], 1), case.dtype)
    shifted = replace(
        case,
        q=np.concatenate([case.q, q_extra], axis=-1),
        k=np.concatenate([case.k, k_extra], axis=-1),
    )
    o, lse = engine.forward(case)
    o2, lse2 = engine.forward(shifted)
    np.testing.assert_allclose(o2, o, **_close(case))
    np.testing.assert_allclose(lse2, lse + shift, **_close(case))


@given(case=cases(smallest=2), data=st.data())
def test_unseen_keys_change_nothing(engine: Engine, case: Case, data: st.DataObject) -> None:
    """Keys out of a row's sight leave o, lse and dq of that row bit-equal."""
    case = replace(case, options={**case.options, "causal": True})
    seqlen_q, seqlen_k = case.q.shape[-2], case.k.shape[-2]
    key = data.draw(st.integers(0, seqlen_k - 1), "first changed key")
    unaffected = max(0, min(seqlen_q, key - (seqlen_k - seqlen_q)))
    k, v = case.k.copy(), case.v.copy()
    k[..., key:, :] *= -3
    v[..., key:, :] += 100
    before = engine.run(case, deterministic=True)[:3]
    after = engine.run(replace(case, k=k, v=v), deterministic=True)[:3]
    rows = slice(0, unaffected)
    for x, y, axis in zip(before, after, (-2, -1, -2), strict=True):
        index = (..., rows) if axis == -1 else (..., rows, slice(None))
        np.testing.assert_array_equal(x[index], y[index])


@given(case=cases(dtypes=FLOATS, smallest=2), data=st.data())
def test_merging_two_halves_by_lse_gives_the_whole(
    engine: Engine, case: Case, data: st.DataObject
) -> None:
    case = replace(case, options={"softcap": case.options["softcap"]})
    cut = data.draw(st.integers(1, case.k.shape[-2] - 1), "cut")
    o, lse = engine.forward(case)
    halves = [
        engine.forward(replace(case, k=case.k[..., part, :], v=case.v[..., part, :]))
        for part in (slice(None, cut), slice(cut, None))
    ]
    merged = np.logaddexp(halves[0][1], halves[1][1])
    mixed = sum(np.exp(part - merged)[..., None] * x for x, part in halves)
    np.testing.assert_allclose(merged, lse, **_close(case))
    np.testing.assert_allclose(mixed, o, **_close(case))


@given(case=cases(dtypes=FLOATS, smallest=1))
def test_grouped_heads_equal_repeated_heads(engine: Engine, case: Case) -> None:
    """dK and dV of a key head are the sums over its query heads."""
    kv_heads, heads = case.k.shape[-3], case.q.shape[-3]
    group = heads // kv_heads
    repeated = replace(case, k=case.k.repeat(group, axis=-3), v=case.v.repeat(group, axis=-3))
    o, lse, dq, dk, dv = engine.run(case)
    o2, lse2, dq2, dk2, dv2 = engine.run(repeated)
    *batch, _, n, _ = dk2.shape
    dk2, dv2 = (x.reshape(*batch, kv_heads, group, n, -1).sum(axis=-3) for x in (dk2, dv2))
    for x, y in zip((o, lse, dq, dk, dv), (o2, lse2, dq2, dk2, dv2), strict=True):
        np.testing.assert_allclose(x, y, **_close(case))


@given(case=cases(dtypes=FLOATS, smallest=1), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_laws(engine: Engine, case: Case, factor: float) -> None:
    """Powers of two move exactly between q, k and scale, and through v and do."""
    base = replace(case, options={**case.options, "scale": 0.5})
    o, lse, dq, dk, dv = engine.run(base, deterministic=True)
    by_scale = replace(base, q=base.q * factor, options={**base.options, "scale": 0.5 / factor})
    assert_same(engine.run(by_scale, deterministic=True), (o, lse, dq / factor, dk, dv))
    moved = replace(base, q=base.q * factor, k=base.k / factor)
    assert_same(engine.run(moved, deterministic=True), (o, lse, dq / factor, dk * factor, dv))
    assert_same(engine.forward(replace(base, v=base.v * factor)), (o * factor, lse))


@given(case=cases(smallest=1))
def test_inputs_are_unchanged(engine: Engine, case: Case) -> None:
    arrays = {name: engine.array(getattr(case, name).copy()) for name in ("q", "k", "v", "do")}
    before = {name: engine.download(x).copy() for name, x in arrays.items()}
    options = {**case.options, **engine.options}
    if options.get("alibi_slopes") is not None:
        options["alibi_slopes"] = engine.array(options["alibi_slopes"])
    o, lse = flash_cupy.attention_forward(arrays["q"], arrays["k"], arrays["v"], **options)
    o_before, lse_before = engine.download(o).copy(), engine.download(lse).copy()
    flash_cupy.attention_backward(
        arrays["do"], arrays["q"], arrays["k"], arrays["v"], o, lse, **options
    )
    for name, x in arrays.items():
        np.testing.assert_array_equal(engine.download(x), before[name], err_msg=name)
    assert_same((engine.download(o), engine.download(lse)), (o_before, lse_before))


@pytest.mark.parametrize("dtype", [BFLOAT16, *FLOATS], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_extreme_logits(engine: Engine, dtype: np.dtype, size: float) -> None:
    case = make_case((), 2, 2, 65, 70, 16, 16, dtype, seed=5, causal=True, scale=1.0)
    case = replace(case, q=(case.q.astype(FLOAT64) * size / 4).astype(dtype))
    results = engine.run(case)
    assert all(np.isfinite(x.astype(FLOAT64)).all() for x in results)
    reference = dense(case.astype(FLOAT64), FLOAT64)
    np.testing.assert_allclose(
        results[1], reference[1], rtol=1e-3 if dtype == BFLOAT16 else 1e-6, atol=0
    )


@pytest.mark.parametrize("shift", [-1e6, 1e6])
def test_scores_far_from_zero(engine: Engine, shift: float) -> None:
    """Every score of a row is large, of one sign: the first maximum must not stand in the way."""
    case = make_case((), 2, 2, 33, 40, 16, 16, FLOAT64, seed=5, scale=1.0)
    q, k = case.q.copy(), case.k.copy()
    q[..., 0], k[..., 0] = 0, 1
    o, lse = engine.forward(replace(case, q=q, k=k))
    q[..., 0] = shift
    o2, lse2 = engine.forward(replace(case, q=q, k=k))
    np.testing.assert_allclose(o2, o, rtol=0, atol=1e-8)
    np.testing.assert_allclose(lse2, lse + shift, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_no_key(engine: Engine, dtype: np.dtype) -> None:
    """With more queries than keys, causal alignment leaves the first rows nothing to see."""
    case = make_case((), 2, 1, 100, 33, 16, 16, dtype, seed=6, causal=True)
    blind = 100 - 33
    o, lse, dq, dk, dv = (x.astype(FLOAT64) for x in engine.run(case))
    assert (o[..., :blind, :] == 0).all()
    assert np.isneginf(lse[..., :blind]).all()
    assert (dq[..., :blind, :] == 0).all()
    assert np.isfinite(lse[..., blind:]).all()
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv))


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_empty(engine: Engine, batch: tuple[int, ...], seqlen_q: int, seqlen_k: int) -> None:
    case = make_case(batch, 2, 1, seqlen_q, seqlen_k, 8, 16, FLOAT32, seed=7)
    o, lse, dq, dk, dv = engine.run(case)
    assert o.shape == (*batch, 2, seqlen_q, 16)
    assert (o == 0).all()
    assert np.isneginf(lse).all()
    assert (dq.shape, dk.shape, dv.shape) == (case.q.shape, case.k.shape, case.v.shape)
    assert not dq.any() and not dk.any() and not dv.any()


@pytest.mark.parametrize("kv_heads", [0, 2])
def test_no_heads(engine: Engine, kv_heads: int) -> None:
    case = make_case((2,), 0, kv_heads, 5, 6, 8, 16, FLOAT32, seed=7)
    o, lse, dq, dk, dv = engine.run(case)
    assert (o.shape, lse.shape, dq.shape) == ((2, 0, 5, 16), (2, 0, 5), (2, 0, 5, 8))
    assert (dk.shape, dv.shape) == ((2, kv_heads, 6, 8), (2, kv_heads, 6, 16))
    assert not dk.any() and not dv.any()
    assert_same((o, lse, dq, dk, dv), dense(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "where, bad",
    # An infinite key gives scores of -inf and +inf, which softmax can make finite again.
    [("k", "nan"), ("v", "nan"), ("v", "inf"), ("v", "-inf")],
)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (10, 20)}, {"causal": True, "softcap": 2.0}], ids=str
)
def test_bad_number_in_a_key_reaches_exactly_the_rows_that_see_it(
    engine: Engine, dtype: np.dtype, where: str, bad: str, options: dict
) -> None:
    case = make_case((), 2, 1, 90, 70, 16, 16, dtype, seed=8, **options)
    key = 37
    x = getattr(case, where).copy()
    x[..., key, 3] = float(bad)
    results = engine.run(replace(case, **{where: x}), deterministic=True)
    o = results[0].astype(FLOAT64)
    distance = np.arange(90) + 70 - 90 - key
    left, right = options.get("window", (np.inf, np.inf))
    right = 0 if options.get("causal") else right
    sees = (distance <= left) & (distance >= -right)
    assert sees.any() and not sees.all()
    bad_rows = ~np.isfinite(o).all(axis=-1)
    np.testing.assert_array_equal(bad_rows, np.broadcast_to(sees, bad_rows.shape))
    # The gradients of rows that do not see it are as they would be without as well, and those of
    # keys that no row sees beside it.
    diagonal, keys = np.flatnonzero(sees)[:, None] + 70 - 90, np.arange(70)
    beside = ((keys >= diagonal - left) & (keys <= diagonal + right)).any(axis=0)
    assert options.get("causal") or not beside.all()
    rows = dict.fromkeys(("o", "lse", "dq"), ~sees) | dict.fromkeys(("dk", "dv"), ~beside)
    assert_exact(case, results, rows=rows)


def test_nan_reaches_rows_that_give_it_no_weight(engine: Engine) -> None:
    """A weight that underflows to 0 is not a mask."""
    case = make_case((), 1, 1, 40, 40, 16, 16, FLOAT32, seed=8, causal=True, scale=1.0)
    q, k, v = case.q.copy(), case.k.copy(), case.v.copy()
    q[..., 0], k[..., 20, 0], v[..., 20, 3] = 100, -100, np.nan
    o, _ = engine.forward(replace(case, q=q, k=k, v=v))
    np.testing.assert_array_equal(np.isnan(o[0, :, 3]), np.arange(40) >= 20)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["q", "do"])
def test_bad_row_reaches_only_keys_in_sight(engine: Engine, name: str, dtype: np.dtype) -> None:
    case = make_case((), 1, 1, 80, 80, 16, 16, dtype, seed=9, causal=True)
    x = getattr(case, name).copy()
    x[..., 40, 2] = np.nan
    results = engine.run(replace(case, **{name: x}), deterministic=True)
    *_, dk, dv = results
    assert np.isnan(dk[0, :41]).all() and np.isnan(dv[0, :41, 2]).all()
    of_keys, of_queries = np.arange(80) > 40, np.arange(80) != 40
    rows = dict.fromkeys(("dk", "dv"), of_keys) | dict.fromkeys(("o", "lse", "dq"), of_queries)
    assert_exact(case, results, rows=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_gives_no_warning(engine: Engine, dtype: np.dtype) -> None:
    """What does not fit is inf or NaN in the result, as in the specification."""
    case = make_case((), 2, 1, 33, 40, 16, 16, dtype, seed=10)
    do, v = case.do.copy(), case.v.copy()
    do[:, 5], v[:, 0] = np.inf, 0
    largest = float(finfo(dtype).max)
    do[:, 6:], v[:, 1:] = (np.full_like(x, largest) for x in (do[:, 6:], v[:, 1:]))
    case = replace(case, do=do, v=v)
    for results in (engine.run(case), dense(case)):
        assert not np.isfinite(results[-1].astype(FLOAT64)).any()


@given(case=cases(dtypes=FLOATS, smallest=1))
def test_batch_axes_broadcast(engine: Engine, case: Case) -> None:
    """Gradients of a broadcast input are sums over the axes along which it was repeated."""
    assume(case.q.ndim == 3)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 2, *case.q.shape)).astype(case.dtype)
    k, v = case.k, np.stack([case.v, case.v[..., ::-1, :]])
    do = rng.standard_normal((3, 2, *case.do.shape)).astype(case.dtype)
    dlse = rng.standard_normal(do.shape[:-1]).astype(case.dlse.dtype)
    broadcast = Case(q, k, v, do, dlse, case.options)
    full = replace(
        broadcast,
        k=np.broadcast_to(k, (3, 2, *k.shape)).copy(),
        v=np.broadcast_to(v, (3, *v.shape)).copy(),
    )
    o, lse, dq, dk, dv = engine.run(broadcast)
    assert (dk.shape, dv.shape) == (k.shape, v.shape)
    o2, lse2, dq2, dk2, dv2 = engine.run(full)
    expected = (o2, lse2, dq2, dk2.sum(axis=(0, 1)), dv2.sum(axis=0))
    for x, y in zip((o, lse, dq, dk, dv), expected, strict=True):
        np.testing.assert_allclose(x, y, **_close(case))


@pytest.mark.parametrize("repeated", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("lead", [(), (1,)], ids=str)
@pytest.mark.parametrize("alibi", [False, True])
def test_inputs_broadcast_alone(
    engine: Engine, repeated: str, lead: tuple[int, ...], alibi: bool
) -> None:
    case = make_case((3,), 4, 2, 33, 40, 8, 16, FLOAT64, seed=11, alibi=alibi, causal=True)
    alone = {name: getattr(case, name)[0] for name in repeated}
    broadcast = replace(case, **{name: x.reshape(*lead, *x.shape) for name, x in alone.items()})
    full = replace(
        case,
        **{name: np.broadcast_to(x, getattr(case, name).shape).copy() for name, x in alone.items()},
    )
    expected = dict(zip(NAMES, engine.run(full), strict=True))
    for name, x in alone.items():
        expected[f"d{name}"] = expected[f"d{name}"].sum(axis=0).reshape(*lead, *x.shape)
    for got, y in zip(engine.run(broadcast), expected.values(), strict=True):
        np.testing.assert_allclose(got, y, **_close(case))


def test_two_and_three_axes(engine: Engine) -> None:
    case = make_case((), 1, 1, 33, 40, 8, 16, FLOAT64, seed=11, causal=True)
    flat = Case(case.q[0], case.k[0], case.v[0], case.do[0], case.dlse[0], options=case.options)
    results = engine.run(flat, deterministic=True)
    expected = engine.run(case, deterministic=True)
    assert [x.shape for x in results] == [(33, 16), (33,), (33, 8), (40, 8), (40, 16)]
    assert_same(results, tuple(x[0] for x in expected))
    one_head = engine.run(replace(case, q=case.q[0]), deterministic=True)
    assert [x.shape for x in one_head[:3]] == [(1, 33, 16), (1, 33), (33, 8)]
    assert_same(one_head, (*expected[:2], expected[2][0], *expected[3:]))


@given(case=cases(dtypes=FLOATS, smallest=1))
def test_out_is_written_and_returned(engine: Engine, case: Case) -> None:
    """Results land in the caller's arrays, whatever their layout."""
    expected = engine.run(case, deterministic=True)
    q, k, v, do = (engine.array(x) for x in (case.q, case.k, case.v, case.do))
    options = engine.options_of(case)

    def poisoned(x):
        big = engine.xp.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), x.dtype)
        return big[..., ::2]

    out = tuple(poisoned(x) for x in expected)
    o, lse = flash_cupy.attention_forward(q, k, v, out=out[:2], **options)
    assert o is out[0] and lse is out[1]
    grads = flash_cupy.attention_backward(
        do,
        q,
        k,
        v,
        o,
        lse,
        dlse=engine.array(case.dlse),
        deterministic=True,
        out=out[2:],
        **options,
    )
    assert all(x is y for x, y in zip(grads, out[2:], strict=True))
    assert_same(tuple(engine.download(x) for x in out), expected)
    single = poisoned(expected[0])
    assert flash_cupy.attention(q, k, v, out=single, **options) is single
    assert_same((engine.download(single),), expected[:1])
    assert flash_cupy.attention_vjp(q, k, v, out=single, **options)[0] is single


@given(case=cases(smallest=1))
def test_vjp_is_forward_and_backward(engine: Engine, case: Case) -> None:
    case = replace(case, dlse=np.zeros_like(case.dlse))
    q, k, v, do = (engine.array(x) for x in (case.q, case.k, case.v, case.do))
    options = engine.options_of(case)
    expected = engine.run(case, deterministic=True)
    o, backprop = flash_cupy.attention_vjp(q, k, v, deterministic=True, **options)
    results = tuple(engine.download(x) for x in (o, *backprop(do)))
    assert_same((results[0], expected[1], *results[1:]), expected)
    o, backprop = flash_cupy.attention_vjp(q, k, v, **options)
    results = tuple(engine.download(x) for x in (o, *backprop(do)))
    np.testing.assert_array_equal(results[0], expected[0])
    for got, x in zip(results[1:], expected[2:], strict=True):
        np.testing.assert_allclose(
            got.astype(FLOAT64), x.astype(FLOAT64), rtol=0, atol=_grad_tolerance(case, x)
        )


@pytest.mark.parametrize("deterministic", [False, True])
def test_vjp_hands_deterministic_on(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    given = []
    monkeypatch.setattr(tiled, "backward", lambda *args: given.append(args[-1]))
    x = np.ones((5, 8), np.float32)
    flash_cupy.attention_vjp(x, x, x, deterministic=deterministic, device="cpu")[1](x)
    assert given == [deterministic]


def _grad_tolerance(case: Case, x: np.ndarray) -> float:
    eps = {FLOAT16: 2e-3, BFLOAT16: 1.6e-2, FLOAT32: 1e-6, FLOAT64: 1e-14}[case.dtype]
    return 4 * eps * max(1.0, float(abs(x.astype(FLOAT64)).max(initial=0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_backward_repeats_bit_for_bit(engine: Engine, dtype: np.dtype) -> None:
    case = make_case((2,), 4, 2, 131, 129, 40, 32, dtype, seed=12, causal=True)
    first = engine.run(case, deterministic=True)
    for _ in range(5):
        assert_same(engine.run(case, deterministic=True), first)
    assert_exact(case, first)


@pytest.mark.parametrize("name", [layout.__name__ for layout in LAYOUTS])
def test_layouts_are_what_they_say(name: str) -> None:
    """The layouts above do reach memory in other ways than a contiguous array."""
    layout = next(x for x in LAYOUTS if x.__name__ == name)
    x = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4)
    y = layout(np, x)
    np.testing.assert_array_equal(x, y)
    assert y.strides != x.strides or not y.flags.writeable
