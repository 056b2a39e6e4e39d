"""How far a result may be from the truth."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from engines import CPU, Engine
from ml_dtypes import finfo
from strategies import FLOAT64, Case

import flash_cupy

NAMES = ("o", "lse", "dq", "dk", "dv")


def dense(case: Case, dtype: np.dtype | None = None, engine: Engine = CPU) -> tuple[Any, ...]:
    """Return (o, lse, dq, dk, dv) of the specification, computed in ``dtype`` where engine is."""
    options = {**engine.options_of(case), "dtype": dtype}
    q, k, v, do, dlse = (engine.array(x) for x in (case.q, case.k, case.v, case.do, case.dlse))
    o, lse = flash_cupy.dense_attention_forward(q, k, v, **options)
    grads = flash_cupy.dense_attention_backward(do, q, k, v, dlse=dlse, **options)
    return tuple(engine.download(x) for x in (o, lse, *grads))


def assert_exact(
    case: Case,
    results: tuple[Any, ...],
    engine: Engine = CPU,
    rows: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Check results, or the first few of them, against float64 and the specification's own error.

    float64 agrees to 1e-12. In the other dtypes the error is at most twice that of the
    specification computed in the same dtype, plus one (float32: a few) of the largest entry's
    units in the last place. The specification is computed where ``engine`` is. ``rows`` says by a
    result's name, for results with one axis before their rows, which of these to check.
    """
    reference = dense(case.astype(FLOAT64), FLOAT64, engine)
    same_dtype = dense(case, engine=engine)
    for name, got, expected, spec in zip(NAMES, results, reference, same_dtype, strict=False):
        assert got.shape == expected.shape, name
        assert got.dtype == spec.dtype, name
        if name in rows:
            got, expected, spec = (np.compress(rows[name], x, 1) for x in (got, expected, spec))
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected), err_msg=name)
        got, spec = (np.where(np.isneginf(x), 0, x).astype(FLOAT64) for x in (got, spec))
        expected = np.where(np.isneginf(expected), 0, expected)
        _check_error(name, case.dtype, got, expected, spec)


def assert_finite_alike(case: Case, results: tuple[Any, ...]) -> None:
    """Check that what is finite in the specification is so in the results, as exact as ever.

    And that no more is finite. As in `assert_exact`, these may be the first few results.
    """
    reference = dense(case.astype(FLOAT64), FLOAT64)
    for name, got, expected, spec in zip(NAMES, results, reference, dense(case), strict=False):
        got, spec = got.astype(FLOAT64), spec.astype(FLOAT64)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=name)
        _check_error(name, case.dtype, got[finite], expected[finite], spec[finite])


def _check_error(
    name: str, dtype: np.dtype, got: np.ndarray, expected: np.ndarray, spec: np.ndarray
) -> None:
    """Check one result against float64; ``spec`` is what the specification makes of it."""
    largest = max(1.0, abs(expected).max(initial=0))
    error = abs(got - expected).max(initial=0)
    if dtype == FLOAT64:
        bound = 1e-12 * largest
    else:
        bound = 2 * abs(spec - expected).max(initial=0) + _unit(name, dtype) * largest
    assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def _unit(name: str, dtype: np.dtype) -> float:
    dtype = np.dtype(np.float32) if name == "lse" else dtype
    return float(finfo(dtype).eps) * (4 if dtype == np.float32 else 1)
