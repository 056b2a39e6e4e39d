"""Packing of grouped heads: which calls, as views, and with the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engines import Engine
from errors import assert_exact
from strategies import BFLOAT16, FLOAT32, make_case

from flash_cupy.cuda.packing import MAX_PACKED_ROWS, OF_QUERIES, pack_groups
from flash_cupy.problem import Options, Problem


def call(seqlen_q: int, layout: Any = None, **options: Any) -> tuple[Problem, dict[str, Any]]:
    """A backward call of 8 query heads and 2 key heads, on the CPU's arrays."""
    q, o = np.zeros((3, 8, seqlen_q, 16), np.float32), np.zeros((3, 8, seqlen_q, 24), np.float32)
    if layout is not None:
        q = layout(q)
    k, v = np.zeros((3, 2, 40, 16), np.float32), np.zeros((3, 2, 40, 24), np.float32)
    problem = Problem.of(q, k, v, Options(device="cpu", **options))
    tensors = {"q": q, "k": k, "v": v, "o": o, "do_": o.copy(), "dq": np.zeros_like(q)}
    tensors |= {name: np.zeros(o.shape[:-1], np.float32) for name in ("lse", "dlse")}
    if options.get("alibi_slopes") is not None:
        tensors["alibi_slopes"] = options["alibi_slopes"]
    return problem, tensors


@pytest.mark.parametrize("seqlen_q", [1, 3, MAX_PACKED_ROWS])
def test_rows_of_a_group_become_rows_of_a_head(seqlen_q: int) -> None:
    problem, tensors = call(seqlen_q)
    packed, views = pack_groups(problem, tensors)
    assert (packed.heads, packed.group, packed.seqlen_q) == (2, 1, 4 * seqlen_q)
    assert packed.o_shape == (3, 2, 4 * seqlen_q, 24)
    for name in OF_QUERIES:
        x = tensors[name]
        view = x.reshape(3, 2, 4 * seqlen_q, *x.shape[3:])
        assert views[name] == (view.shape, view.strides, view.dtype)
    assert views["k"] is tensors["k"]


def test_one_row_hides_nothing_from_a_causal_mask() -> None:
    assert pack_groups(*call(1, causal=True))[0].group == 1


@pytest.mark.parametrize(
    ("seqlen_q", "options"),
    [
        (MAX_PACKED_ROWS + 1, {}),
        (3, {"causal": True}),
        (3, {"window": (5, None)}),
        (3, {"alibi_slopes": np.ones(8, np.float32)}),
    ],
)
def test_rows_that_differ_stay_apart(seqlen_q: int, options: dict[str, Any]) -> None:
    problem, tensors = call(seqlen_q, **options)
    assert pack_groups(problem, tensors) == (problem, tensors)


def test_rows_that_no_stride_walks_stay_apart() -> None:
    def heads_last(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)

    problem, tensors = call(3, heads_last)
    assert pack_groups(problem, tensors)[0] is problem
    assert pack_groups(*call(1, heads_last))[0].group == 1


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_packed_calls_equal_dense_softmax(engine: Engine, dtype: np.dtype, seqlen_q: int) -> None:
    case = make_case((2,), 8, 2, seqlen_q, 70, 64, 64, dtype, seed=3, softcap=4.0)
    assert_exact(case, engine.run(case))
