"""Every error about a caller's input, with its message."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import flash_cupy
from flash_cupy import ahead, arrays, problem
from flash_cupy.arrays import place
from flash_cupy.cuda import hopper, plan
from flash_cupy.gpu import why_no_gpu
from flash_cupy.problem import Options, Problem


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
    (dict(v=V[0, 0].view(np.matrix)), TypeError, "v: got numpy.matrix, takes a NumPy or CuPy"),
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
    (dict(alibi_slopes=array(1, 4)), ValueError, r"alibi_slopes: got shape \(1, 4\), takes \(H,\)"),
    (dict(scale=10**400), ValueError, "scale: got 10+, takes None or a finite number >= 0"),
    (dict(device="tpu"), ValueError, "device: got 'tpu', takes None, 'cpu' or 'gpu'"),
    (dict(device=0), TypeError, "device: got 0, takes None, 'cpu' or 'gpu'"),
    (dict(device=Q), TypeError, "device: got array.*, takes None, 'cpu' or 'gpu'"),
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
    with pytest.raises(error, match=f"(?s)^{message}"):
        function(**{"q": Q, "k": K, "v": V, **wrong})


WRONG_BACKWARD_CALLS = [
    (dict(do=O.astype(np.float64)), TypeError, "do: got dtype float64, takes float32 where q is"),
    (dict(do=None), TypeError, "do: got builtins.NoneType, takes a NumPy or CuPy array"),
    (dict(o=None), TypeError, "o: got builtins.NoneType, takes a NumPy or CuPy array"),
    (dict(lse=None), TypeError, "lse: got builtins.NoneType, takes a NumPy or CuPy array"),
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
    with pytest.raises(ValueError, match=r"^dlse: got shape \(4, 5\), takes \(2, 4, 5\)"):
        flash_cupy.dense_attention_backward(O, Q, K, V, dlse=LSE[0])


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


INPUTS = dict(q=Q, k=K, v=V, alibi_slopes=array(4))
ROWS = dict(do=O, o=O, lse=LSE, dlse=LSE)


def _placed_on(x: Any, out_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A copy of x, and an array for a result that begins at the same address."""
    memory = np.empty(1000, np.float32)
    copy = memory[: x.size].reshape(x.shape)
    copy[...] = x
    return copy, memory[: np.prod(out_shape)].reshape(out_shape)


@pytest.mark.parametrize("name", INPUTS)
def test_out_may_overlap_no_input_of_the_forward_pass(name: str) -> None:
    x, out = _placed_on(INPUTS[name], O.shape)
    with pytest.raises(ValueError, match=rf"^out \(o\): got memory that overlaps {name}, takes"):
        flash_cupy.attention(**{**INPUTS, name: x}, out=out)


@pytest.mark.parametrize("name", [*INPUTS, *ROWS])
def test_out_may_overlap_no_input_of_the_backward_pass(name: str) -> None:
    x, dv = _placed_on({**INPUTS, **ROWS}[name], V.shape)
    with pytest.raises(ValueError, match=rf"^out \(dv\): got memory that overlaps {name}, takes"):
        flash_cupy.attention_backward(**{**INPUTS, **ROWS, name: x}, out=(None, None, dv))


@pytest.mark.parametrize(
    "shape, strides, overlaps",
    [
        ((3, 4), (16, 4), False),
        ((3, 4), (-16, -4), False),
        ((3, 4), (4, 12), False),
        ((3, 4), (12, 4), True),
        ((3, 4), (-12, 4), True),
        ((3, 4), (0, 4), True),
        ((3, 4), (16, 2), True),
        ((1, 4), (0, 4), False),
        ((0, 4), (0, 4), False),
        ((2, 2, 2), (8, 4, 12), True),
    ],
)
def test_elements_that_share_memory(shape: tuple, strides: tuple, overlaps: bool) -> None:
    start = np.zeros(100, np.float32)[50:]
    x = np.lib.stride_tricks.as_strided(start, shape, strides)
    assert arrays.overlaps_itself(place(x)) == overlaps


def test_interleaved_out_is_no_overlap() -> None:
    """Every second element of memory that also holds q."""
    both = np.ones((*Q.shape, 2), np.float32)
    v = array(2, 2, 6, 8)
    q, out = both[..., 0], both[..., 1]
    assert flash_cupy.attention(q, K, v, out=out) is out
    assert (both[..., 0] == 1).all()


def test_fractions_are_numbers() -> None:
    o = flash_cupy.attention(Q, K, V, scale=Fraction(1, 3), device="cpu")
    np.testing.assert_array_equal(o, flash_cupy.attention(Q, K, V, scale=1 / 3, device="cpu"))


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


@pytest.mark.parametrize("wrong, message", [(1, "1"), (None, "None"), ("yes", "'yes'")])
def test_vjp_checks_deterministic_before_any_work(wrong: Any, message: str) -> None:
    out = np.full_like(O, 7)
    with pytest.raises(TypeError, match=f"^deterministic: got {message}, takes True or False"):
        flash_cupy.attention_vjp(Q, K, V, deterministic=wrong, out=out)
    assert (out == 7).all()


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_compile_without_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^no GPU to compile for: CuPy "):
        flash_cupy.compile([64], np.float16)


@pytest.mark.parametrize("dtype", [np.int32, ">f4", "float8"])
def test_compile_checks_its_dtype(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"^dtype: got |not understood"):
        flash_cupy.compile([64], dtype)


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let `compile` make its calls on NumPy arrays, and note them."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str) -> None:
        function = getattr(ahead, name)

        def noted(*arrays: Any, **options: Any) -> Any:
            calls.append((name, [x.shape for x in arrays], arrays[0].dtype, options))
            return function(*arrays, **options)

        monkeypatch.setattr(ahead, name, noted)

    note("attention_forward")
    note("attention_backward")
    monkeypatch.setattr(ahead, "why_no_gpu", lambda: None)
    # Where there is a GPU, too, NumPy arrays are to stay on the CPU.
    monkeypatch.setattr("flash_cupy.problem.why_no_gpu", lambda: "this test has none")
    monkeypatch.setitem(sys.modules, "cupy", np)
    return calls


def test_compile_makes_the_calls_it_is_asked_for(compiled_calls: list[tuple[Any, ...]]) -> None:
    flash_cupy.compile(
        [8, (16, 4)], "float32", precision="tf32", deterministic=True, progress=False
    )
    forward, backward = compiled_calls[::2], compiled_calls[1::2]
    assert [shapes[1:] for _, shapes, _, _ in forward] == [
        [(1, 2, 8), (1, 2, 8)],
        [(1, 2, 8), (1, 2, 8)],
        [(1, 2, 16), (1, 2, 4)],
        [(1, 2, 16), (1, 2, 4)],
    ]
    assert [options["causal"] for *_, options in forward] == [False, True] * 2
    assert {name for name, *_ in backward} == {"attention_backward"}
    assert all(options["deterministic"] for *_, options in backward)
    assert {options["precision"] for *_, options in compiled_calls} == {"tf32"}


def test_compile_with_few_kernels(compiled_calls: list[tuple[Any, ...]]) -> None:
    flash_cupy.compile(
        [8], "bfloat16", masks=[True], softcap=True, alibi=True, backward=False, progress=False
    )
    # The plans of 16-bit calls may depend on the lengths.
    lengths = [(q[1], k[1]) for _, (q, k, _), _, _ in compiled_calls]
    assert lengths == list(hopper.lengths())
    for name, _, dtype, options in compiled_calls:
        assert (name, dtype.name, options["precision"]) == ("attention_forward", "bfloat16", None)
        assert options["causal"] and options["softcap"] and options["alibi_slopes"].shape == (1,)


def test_compile_checks_options(compiled_calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ValueError, match=r"^precision: got 'fast', takes None or 'tf32'"):
        flash_cupy.compile([8], np.float32, precision="fast", progress=False)
    with pytest.raises(ValueError, match=r"^precision: got 'tf32' for float16, takes None there"):
        flash_cupy.compile([8], np.float16, precision="tf32", progress=False)
    with pytest.raises(TypeError, match=r"^deterministic: got 1, takes True or False"):
        flash_cupy.compile([8], np.float16, deterministic=1, progress=False)


def test_precision_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^precision: got 'fast', takes None or 'tf32'"):
        flash_cupy.attention(Q, K, V, precision="fast")
    with pytest.raises(TypeError, match=r"^precision: got 32, takes None or 'tf32'"):
        flash_cupy.attention(Q, K, V, precision=32)
    q, k, v = (x.astype(np.float64) for x in (Q, K, V))
    with pytest.raises(ValueError, match=r"^precision: got 'tf32' for float64, takes None there"):
        flash_cupy.attention(q, k, v, precision="tf32")


@pytest.fixture
def gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let checks believe in a GPU."""
    monkeypatch.setattr(problem, "why_no_gpu", lambda: None)


def test_numpy_arrays_go_to_a_gpu_that_is_there(gpu_is_there: None) -> None:
    assert Problem.of(Q, K, V, Options()).device == "gpu"
    assert Problem.of(Q, K, V, Options(device="gpu")).device == "gpu"
    assert Problem.of(Q, K, V, Options(device="cpu")).device == "cpu"


def test_each_call_goes_by_the_device_that_is_current(
    gpu_is_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call like one that ran on another GPU is not taken for it."""
    assert Problem.of(Q, K, V, Options()).device == "gpu"
    monkeypatch.setattr(problem, "why_no_gpu", lambda: "GPU 1 is too old")
    assert Problem.of(Q, K, V, Options()).device == "cpu"
    with pytest.raises(ValueError, match=r"^device: got 'gpu', but GPU 1 is too old; takes 'cpu'"):
        Problem.of(Q, K, V, Options(device="gpu"))
    monkeypatch.setattr(problem, "why_no_gpu", lambda: None)
    assert Problem.of(Q, K, V, Options()).device == "gpu"


def test_the_cpu_is_not_asked_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "why_no_gpu", lambda: 1 / 0)
    assert Problem.of(Q, K, V, Options(device="cpu")).device == "cpu"


def test_widest_heads_on_a_gpu_are_those_of_the_widest_kernel() -> None:
    assert max(plan.HEAD_DIMS) == problem.MAX_GPU_HEAD_DIM


@pytest.mark.parametrize("head_dim, head_dim_v", [(257, 3), (3, 257)])
def test_wide_heads_run_on_the_cpu(gpu_is_there: None, head_dim: int, head_dim_v: int) -> None:
    q, k, v = array(5, head_dim), array(6, head_dim), array(6, head_dim_v)
    assert flash_cupy.attention(q, k, v).shape == (5, head_dim_v)
    message = f"got head dims {head_dim} and {head_dim_v}, takes at most 256 on the GPU"
    with pytest.raises(ValueError, match=f"^q and v: {message}"):
        flash_cupy.attention(q, k, v, device="gpu")


@pytest.fixture
def cupy_array(gpu_is_there: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make CuPy arrays over host memory: checks ask for their addresses and never read them."""
    import cupy

    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)

    def on_device(x: Any, device: int = 0) -> Any:
        memory = cupy.cuda.UnownedMemory(x.ctypes.data, x.nbytes, x, device_id=device)
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        return cupy.ndarray(x.shape, x.dtype, memptr=pointer, strides=x.strides)

    return on_device


def test_cupy_arrays_stay_on_their_gpu(cupy_array: Callable[..., Any]) -> None:
    q, k, v = map(cupy_array, (Q, K, V))
    assert Problem.of(q, k, v, Options()).device == "gpu"
    with pytest.raises(ValueError, match=r"^device: got 'cpu' with CuPy arrays, takes 'gpu' or"):
        flash_cupy.attention(q, k, v, device="cpu")
    with pytest.raises(ValueError, match=r"^v: got an array on GPU 1, takes .* GPU 0"):
        flash_cupy.attention(q, k, cupy_array(V, device=1))


def test_cupy_arrays_on_a_gpu_that_is_too_old(
    cupy_array: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = map(cupy_array, (Q, K, V))
    assert Problem.of(q, k, v, Options()).device == "gpu"
    monkeypatch.setattr(problem, "why_no_gpu", lambda: "GPU 0 is too old")
    with pytest.raises(ValueError, match=r"^q, k and v: got CuPy arrays, but GPU 0 is too old"):
        flash_cupy.attention(q, k, v)


def test_numpy_and_cupy_arrays_do_not_mix(cupy_array: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^q, k, v: got a mixture \(q numpy, k cupy, v numpy\)"):
        flash_cupy.attention(Q, cupy_array(K), V)
    with pytest.raises(TypeError, match=r"^q, k, v, alibi_slopes: got a mixture"):
        flash_cupy.attention(Q, K, V, alibi_slopes=cupy_array(array(4)))
    with pytest.raises(TypeError, match=r"^out \(o\): got a cupy array, takes a numpy array"):
        flash_cupy.attention(Q, K, V, out=cupy_array(O), device="cpu")
    with pytest.raises(TypeError, match=r"^do: got a cupy array, takes a numpy array"):
        flash_cupy.attention_backward(cupy_array(O), Q, K, V, O, LSE, device="cpu")


def test_overlap_on_a_gpu_is_found_without_asking_it(cupy_array: Callable[..., Any]) -> None:
    """No kernel could run here; packed gradients interleave in every training step."""
    packed = cupy_array(array(5, 3, 8))
    dq, dk, _ = (packed[:, i] for i in range(3))
    assert not arrays.overlap(place(dq), place(dk))
    assert arrays.overlap(place(dq), place(packed[2:3, 0]))
    assert arrays.overlaps_itself(place(cupy_array(np.broadcast_to(array(1, 8), (5, 8)))))
