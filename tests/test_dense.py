"""The specification itself: against sums written out pair by pair, and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from errors import dense
from hypothesis import given, settings
from strategies import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Case, cases, make_case

import flash_cupy


def softmax_by_hand(case: Case, b: tuple[int, ...], h: int, i: int) -> tuple[np.ndarray, float]:
    """One row of o and its lse, key by key, in Python floats."""
    q, k, v, options = case.q[b], case.k[b], case.v[b], case.options
    seqlen_q, seqlen_k, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    kv_head = h // (q.shape[0] // k.shape[0])
    left, right = options["window"] or (None, None)
    slopes = options.get("alibi_slopes")
    scale = 1 / math.sqrt(head_dim) if options["scale"] is None else options["scale"]
    weights, values = [], []
    for j in range(seqlen_k):
        diagonal = i + seqlen_k - seqlen_q
        if options["causal"] and j > diagonal:
            continue
        if left is not None and j < diagonal - left:
            continue
        if right is not None and j > diagonal + right:
            continue
        score = scale * math.fsum(
            float(x) * float(y) for x, y in zip(q[h, i], k[kv_head, j], strict=True)
        )
        if options["softcap"] is not None:
            score = options["softcap"] * math.tanh(score / options["softcap"])
        if slopes is not None:
            slope = slopes[h] if slopes.ndim == 1 else slopes[(*b, h)]
            score -= float(slope) * abs(diagonal - j)
        weights.append(math.exp(score))
        values.append(v[kv_head, j])
    total = math.fsum(weights)
    if not weights:
        return np.zeros(v.shape[-1]), -math.inf
    o = sum(w * x for w, x in zip(weights, values, strict=True)) / total
    return o, math.log(total)


@settings(max_examples=25)
@given(cases(dtypes=(FLOAT64,), smallest=1, max_seqlen=17))
def test_equals_the_sums_written_out(case: Case) -> None:
    o, lse = flash_cupy.dense_attention_forward(case.q, case.k, case.v, **case.options)
    for *b, h, i in np.ndindex(lse.shape):
        o_i, lse_i = softmax_by_hand(case, tuple(b), h, i)
        np.testing.assert_allclose(o[(*b, h, i)], o_i, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(lse[(*b, h, i)], lse_i, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(cases(dtypes=(FLOAT64,), smallest=1, max_seqlen=33))
def test_gradients_equal_finite_differences(case: Case) -> None:
    """Along a random direction, for a loss that weighs o by do and lse by dlse."""
    direction = [
        np.random.default_rng(1).standard_normal(x.shape) for x in (case.q, case.k, case.v)
    ]

    def loss(step: float) -> float:
        q, k, v = (x + step * d for x, d in zip((case.q, case.k, case.v), direction, strict=True))
        o, lse = flash_cupy.dense_attention_forward(q, k, v, **case.options)
        seen = np.isfinite(lse)
        return float((o * case.do).sum() + (lse[seen] * case.dlse[seen]).sum())

    grads = flash_cupy.dense_attention_backward(
        case.do, case.q, case.k, case.v, dlse=case.dlse, **case.options
    )
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    h = 1e-5
    # a stencil of fourth order
    numeric = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert numeric == pytest.approx(slope, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_number_reaches_only_what_is_in_sight(name: str, bad: float) -> None:
    case = make_case((), 1, 1, 30, 30, 8, 8, FLOAT64, seed=0, window=(2, 3))
    x = getattr(case, name).copy()
    x[:, 12, 5] = bad
    distance = np.arange(30)[:, None] - np.arange(30)
    sees = (distance <= 2) & (distance >= -3)
    rows = sees[:, 12] if name in "kv" else np.arange(30) == 12
    keys = sees[rows].any(axis=0)
    results, clean = dense(replace(case, **{name: x})), dense(case)
    for got, expected, reached in zip(results, clean, (rows, rows, rows, keys, keys), strict=True):
        np.testing.assert_array_equal(got[:, ~reached], expected[:, ~reached])
    assert not all(np.isfinite(got).all() for got in results)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_dtypes_of_results(dtype: np.dtype) -> None:
    case = make_case((), 2, 1, 5, 6, 8, 3, dtype, seed=0)
    o, lse = flash_cupy.dense_attention_forward(case.q, case.k, case.v)
    assert (o.dtype, lse.dtype) == (dtype, FLOAT32)
    o64, lse64 = flash_cupy.dense_attention_forward(case.q, case.k, case.v, dtype=FLOAT64)
    assert (o64.dtype, lse64.dtype) == (FLOAT64, FLOAT64)
    np.testing.assert_array_equal(flash_cupy.dense_attention(case.q, case.k, case.v), o)
    grads = flash_cupy.dense_attention_backward(case.do, case.q, case.k, case.v)
    assert {x.dtype for x in grads} == {dtype}
    assert [x.shape for x in grads] == [case.q.shape, case.k.shape, case.v.shape]


def test_nan_in_a_key_reaches_no_gradient_of_unseen_keys() -> None:
    """A row of NaN passes NaN on to the keys it sees, and to no other."""
    case = make_case((), 1, 1, 20, 20, 4, 4, FLOAT64, seed=0, causal=True)
    k = case.k.copy()
    k[0, 5, 0] = np.nan
    _, _, dv = flash_cupy.dense_attention_backward(
        case.do, case.q, k, case.v, causal=True, window=(2, None)
    )
    assert np.isnan(dv[0, 3:8]).all()  # seen by rows 5 to 7, which see key 5
    assert np.isfinite(dv[0, :3]).all() and np.isfinite(dv[0, 8:]).all()
