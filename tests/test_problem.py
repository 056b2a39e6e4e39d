"""Every error about a caller's input, with its message."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import flash_cupy
from flash_cupy.gpu import why_no_gpu


def array(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


Q, K, V = array(2, 4, 5, 8), array(2, 2, 6, 8), array(2, 2, 6, 3)
O, LSE = array(2, 4, 5, 3), array(2, 4, 5)

WRONG_CALLS = [
    # q, k and v: the kind of thing
    (dict(q=[[1.0]]), TypeError, "q: got builtins.list, takes a NumPy or CuPy array"),
    (dict(k=None), TypeError, "k: got builtins.NoneType, takes a NumPy or CuPy array"),
    (dict(v=np.float32(1)), TypeError, "v: got numpy.float32, takes a NumPy or CuPy array"),
    (dict(q=np.ma.masked_array(Q)), TypeError, "q: got numpy.ma.MaskedArray, takes"),
    (dict(q=Q.astype(object)), TypeError, "q: got dtype object, takes float16, bfloat16"),
    (dict(k=K.astype(complex)), TypeError, "k: got dtype complex128, takes float16, bfloat16"),
    (dict(v=V.astype(int)), TypeError, "v: got dtype int64, takes float16, bfloat16"),
    (dict(q=Q.astype(">f4")), TypeError, "q: got dtype >f4, takes .* in native byte order"),
    (
        dict(k=K.astype(np.float64)),
        TypeError,
        r"q, k and v: got mixed dtypes \(q float32, k float64, v float32\), takes one dtype",
    ),
    # shapes
    (dict(q=array(8)), ValueError, r"q: got shape \(8,\), takes at least the two axes"),
    (dict(k=array(2, 2, 6, 0)), ValueError, r"k: got head dim 0 in shape \(2, 2, 6, 0\)"),
    (
        dict(k=array(2, 2, 6, 7)),
        ValueError,
        r"k: got head dim 7 \(last axis of \(2, 2, 6, 7\)\), takes q's head dim 8 "
        r"\(q has shape \(2, 4, 5, 8\)\)",
    ),
    (
        dict(v=array(2, 2, 7, 3)),
        ValueError,
        r"v: got 7 keys \(axis -2 of \(2, 2, 7, 3\)\), takes as many as k, 6",
    ),
    (
        dict(v=array(2, 1, 6, 3)),
        ValueError,
        r"v: got 1 heads \(axis -3 of \(2, 1, 6, 3\)\), takes as many as k, 2",
    ),
    (
        dict(q=array(2, 3, 5, 8)),
        ValueError,
        r"q: got 3 heads \(axis -3 of \(2, 3, 5, 8\)\), takes a multiple of k's heads, 2",
    ),
    (
        dict(k=array(2, 0, 6, 8), v=array(2, 0, 6, 3)),
        ValueError,
        "q: got 4 heads .* takes a multiple of k's heads, 0",
    ),
    (
        dict(k=array(3, 2, 6, 8)),
        ValueError,
        r"q, k and v: got batch axes \(2,\), \(3,\) and \(2,\), takes axes that broadcast",
    ),
    # options
    (dict(causal=1), TypeError, "causal: got 1, takes True or False"),
    (dict(causal=None), TypeError, "causal: got None, takes True or False"),
    (dict(window=5), TypeError, r"window: got 5, takes None or a tuple \(left, right\)"),
    (dict(window=[1, 2]), TypeError, r"window: got \[1, 2\], takes None or a tuple"),
    (dict(window=(1,)), ValueError, "window: got 1 sides, takes two"),
    (dict(window=(1.0, 2)), TypeError, r"window: got \(1.0, 2\), takes a whole number or None"),
    (dict(window=(True, 2)), TypeError, r"window: got \(True, 2\), takes a whole number or None"),
    (dict(window=(-1, 2)), ValueError, r"window: got \(-1, 2\), takes sides >= 0"),
    (dict(scale="1"), TypeError, "scale: got '1', takes None or a finite number >= 0"),
    (dict(scale=True), TypeError, "scale: got True, takes None or a finite number"),
    (dict(scale=-1), ValueError, "scale: got -1, takes None or a finite number >= 0"),
    (dict(scale=float("inf")), ValueError, "scale: got inf, takes None or a finite number"),
    (dict(scale=float("nan")), ValueError, "scale: got nan, takes None or a finite number"),
    (dict(softcap=0), ValueError, "softcap: got 0, takes None or a finite number > 0"),
    (dict(softcap=-2.0), ValueError, "softcap: got -2.0, takes None or a finite number > 0"),
    (dict(softcap=array(1)), TypeError, "softcap: got .*, takes None or a finite number > 0"),
    (dict(alibi_slopes=[0.5] * 4), TypeError, "alibi_slopes: got builtins.list, takes a NumPy"),
    (
        dict(alibi_slopes=array(4, dtype=np.float16)),
        TypeError,
        "alibi_slopes: got dtype float16, takes float32 or float64",
    ),
    (
        dict(alibi_slopes=array(3)),
        ValueError,
        r"alibi_slopes: got shape \(3,\), takes \(H,\) = \(4,\) or \(\*batch, H\) = \(2, 4\)",
    ),
    (dict(device="tpu"), ValueError, "device: got 'tpu', takes None, 'cpu' or 'gpu'"),
    (dict(device=0), TypeError, "device: got 0, takes None, 'cpu' or 'gpu'"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG_CALLS)
@pytest.mark.parametrize(
    "function",
    [
        flash_cupy.attention,
        flash_cupy.attention_forward,
        flash_cupy.attention_vjp,
        flash_cupy.dense_attention,
    ],
)
def test_wrong_calls(function: Any, wrong: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        function(**{"q": Q, "k": K, "v": V, **wrong})


WRONG_BACKWARD_CALLS = [
    (dict(do=O.astype(np.float64)), TypeError, "do: got dtype float64, takes float32 where q is"),
    (dict(do=[O]), TypeError, "do: got builtins.list, takes a NumPy or CuPy array"),
    (dict(do=O[..., :2]), ValueError, r"do: got shape \(2, 4, 5, 2\), takes \(2, 4, 5, 3\)"),
    (dict(o=O[:1]), ValueError, r"o: got shape \(1, 4, 5, 3\), takes \(2, 4, 5, 3\)"),
    (dict(lse=LSE[..., :4]), ValueError, r"lse: got shape \(2, 4, 4\), takes \(2, 4, 5\)"),
    (dict(lse=LSE.astype(np.float64)), TypeError, "lse: got dtype float64, takes float32"),
    (dict(dlse=LSE[0]), ValueError, r"dlse: got shape \(4, 5\), takes \(2, 4, 5\)"),
    (dict(deterministic=1), TypeError, "deterministic: got 1, takes True or False"),
    (dict(out=(Q,)), TypeError, r"out: got tuple, takes a tuple \(dq, dk, dv\)"),
    (dict(k=K[..., :7]), ValueError, "k: got head dim 7"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG_BACKWARD_CALLS)
def test_wrong_backward_calls(wrong: dict, error: type, message: str) -> None:
    arguments = {"do": O, "q": Q, "k": K, "v": V, "o": O, "lse": LSE, **wrong}
    with pytest.raises(error, match=f"^{message}"):
        flash_cupy.attention_backward(**arguments)


def test_dense_backward_checks_the_same() -> None:
    with pytest.raises(ValueError, match=r"^do: got shape \(2, 4, 5, 2\), takes \(2, 4, 5, 3\)"):
        flash_cupy.dense_attention_backward(O[..., :2], Q, K, V)


def _read_only() -> Any:
    x = np.empty_like(O)
    x.flags.writeable = False
    return x


WRONG_OUTS = [
    ([O], TypeError, "out (o): got builtins.list, takes a NumPy or CuPy array"),
    (O.astype(np.float64), TypeError, "out (o): got dtype float64, takes float32"),
    (O[..., :2], ValueError, "out (o): got shape (2, 4, 5, 2), takes (2, 4, 5, 3)"),
    (_read_only(), ValueError, "out (o): got a read-only array, takes a writeable one"),
    (
        np.lib.stride_tricks.as_strided(O, O.shape, (0, *O.strides[1:])),
        ValueError,
        "out (o): got strides (0, 60, 12, 4), with which elements share memory",
    ),
    (
        np.lib.stride_tricks.as_strided(Q, O.shape, O.strides),
        ValueError,
        "out (o): got memory that overlaps q, takes memory of its own",
    ),
]


@pytest.mark.parametrize("out, error, message", WRONG_OUTS)
def test_wrong_out(out: Any, error: type, message: str) -> None:
    before = Q.copy()
    with pytest.raises(error, match="^" + re.escape(message)):
        flash_cupy.attention(Q, K, V, out=out)
    np.testing.assert_array_equal(Q, before)


def test_wrong_out_tuples() -> None:
    with pytest.raises(TypeError, match=r"^out: got ndarray, takes a tuple \(o, lse\)"):
        flash_cupy.attention_forward(Q, K, V, out=O)
    o = np.empty_like(O)
    with pytest.raises(ValueError, match=r"^out \(lse\): got memory that overlaps out \(o\)"):
        flash_cupy.attention_forward(Q, K, V, out=(o, o.reshape(-1)[:40].reshape(2, 4, 5)))
    with pytest.raises(TypeError, match=r"^out \(lse\): got dtype float64, takes float32"):
        flash_cupy.attention_forward(Q, K, V, out=(None, LSE.astype(np.float64)))
    with pytest.raises(ValueError, match=r"^out \(dk\): got memory that overlaps k"):
        flash_cupy.attention_backward(O, Q, K, V, O, LSE, out=(None, K, None))


def test_interleaved_out_is_no_overlap() -> None:
    """Every second element of memory that also holds q."""
    both = np.ones((*Q.shape, 2), np.float32)
    v = array(2, 2, 6, 8)
    q, out = both[..., 0], both[..., 1]
    assert flash_cupy.attention(q, K, v, out=out) is out
    assert (both[..., 0] == 1).all()


def test_gpu_that_is_not_there() -> None:
    reason = why_no_gpu()
    if reason is None:
        assert flash_cupy.attention(Q, K, V, device="gpu").shape == O.shape
        return
    with pytest.raises(ValueError, match=r"^device: got 'gpu', but .*; takes 'cpu' or None here"):
        flash_cupy.attention(Q, K, V, device="gpu")


def test_equal_looking_options_are_told_apart() -> None:
    """Checked calls are remembered; 1 must not pass for True because True did."""
    flash_cupy.attention(Q, K, V, causal=True, window=(1, 2))
    with pytest.raises(TypeError, match=r"^causal"):
        flash_cupy.attention(Q, K, V, causal=1)
    with pytest.raises(TypeError, match=r"^window"):
        flash_cupy.attention(Q, K, V, causal=True, window=(1.0, 2.0))


def test_numpy_integers_and_floats_are_numbers() -> None:
    o = flash_cupy.attention(
        Q, K, V, causal=np.True_, window=(np.int64(3), None), scale=np.float32(0.5), device="cpu"
    )
    np.testing.assert_array_equal(
        o, flash_cupy.attention(Q, K, V, causal=True, window=(3, None), scale=0.5, device="cpu")
    )


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_compile_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^no GPU to compile for: CuPy "):
        flash_cupy.compile([64], np.float16)
