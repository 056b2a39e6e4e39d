"""What only a GPU can show: large problems, streams, graphs, other memory; and every head dim."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from engines import Engine, gpu_engine
from errors import assert_exact, assert_finite_alike, dense
from strategies import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GROWTHS,
    NONFINITE,
    Case,
    growing_case,
    make_case,
    nonfinite_case,
)

import flash_cupy
import flash_cupy.cuda
from flash_cupy import gpu as gpu_module
from flash_cupy.cuda import force_family
from flash_cupy.gpu import why_no_gpu

pytestmark = pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")

HEAD_DIMS = (1, 8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
SEQLEN_PAIRS = (
    (1, 1),
    (3, 513),
    (64, 128),
    (113, 203),
    (239, 1),
    (799, 3),
    (1024, 1023),
    (4224, 4224),
)
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (100, 30)},
    "causal window": {"causal": True, "window": (64, None)},
    "softcap": {"causal": True, "softcap": 3.0},
    "alibi": {"alibi": True, "causal": True},
}


#: NumPy arrays, which travel to the GPU and back.
STAGED = Engine("staged", np, lambda x: x, lambda x: x, {"device": "gpu"})


@pytest.fixture(params=["default", "portable"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The kernels that the GPU takes by default, and for 16-bit types those for every GPU."""
    if request.param == "default":
        yield gpu_engine()
        return
    if request.node.callspec.params.get("dtype") in (FLOAT32, FLOAT64):
        pytest.skip("the portable kernels are the default of this dtype")
    with force_family("portable"):
        yield gpu_engine()


def poison_pool() -> None:
    """Leave NaN in the memory that the next arrays will be allocated from."""
    import cupy

    blocks = [cupy.full(1 << size, float("nan"), np.float64) for size in range(6, 24, 2)]
    del blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(gpu: Engine, head_dim: int, dtype: np.dtype) -> None:
    case = make_case((2,), 2, 1, 113, 203, head_dim, head_dim, dtype, head_dim, causal=True)
    poison_pool()
    assert_exact(case, gpu.run(case))
    assert_exact(case, gpu.run(case, deterministic=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim, head_dim_v", [(64, 32), (192, 128), (40, 256), (256, 59), (128, 96)]
)
def test_other_head_dim_of_v(gpu: Engine, head_dim: int, head_dim_v: int, dtype: np.dtype) -> None:
    case = make_case((), 2, 2, 203, 113, head_dim, head_dim_v, dtype, 1, window=(90, 20))
    assert_exact(case, gpu.run(case))
    assert_exact(case, gpu.run(case, deterministic=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlens", SEQLEN_PAIRS, ids=str)
def test_lengths_masks_and_grouped_heads(
    gpu: Engine, seqlens: tuple[int, int], mask: str, dtype: np.dtype
) -> None:
    case = make_case((1,), 4, 2, *seqlens, 64, 64, dtype, seed=2, **MASKS[mask])
    poison_pool()
    results = gpu.run(case)
    if seqlens[1] == 1 and dtype == FLOAT32:
        check_cancelling_gradients(case, *results[2:4])
        results = results[:2]
    assert_exact(case, results, gpu)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("seqlen", "causal"), [(2100, False), (2100, True), (4150, True)])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(128, 128), (96, 96), (96, 64), (64, 96)])
def test_backward_of_long_rows(
    head_dim: int, head_dim_v: int, seqlen: int, causal: bool, deterministic: bool
) -> None:
    """Lengths from which on steps have more queries, or masks are applied otherwise."""
    shape = 2, 1, seqlen - 7, seqlen, head_dim, head_dim_v
    case = make_case((), *shape, BFLOAT16, seed=5, causal=causal)
    poison_pool()
    assert_exact(case, gpu_engine().run(case, deterministic=deterministic))


#: Lengths and head dims with which the forward pass finds large scores in different ways.
LONG_ROWS = [(500, 64), (2100, 64), (2100, 128), (700, 256)]


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize(("seqlen", "head_dim"), LONG_ROWS)
def test_scores_that_grow(
    gpu: Engine, seqlen: int, head_dim: int, growth: float, causal: bool, dtype: np.dtype
) -> None:
    case = growing_case(seqlen, head_dim, dtype, growth, causal=causal)
    assert_exact(case, gpu.run(case)[:2])


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("what", NONFINITE)
@pytest.mark.parametrize(("seqlen", "head_dim"), LONG_ROWS)
def test_nonfinite_scores_of_long_rows(
    gpu: Engine, seqlen: int, head_dim: int, what: str, causal: bool, dtype: np.dtype
) -> None:
    case = nonfinite_case(seqlen, head_dim, dtype, what, causal=causal)
    assert_finite_alike(case, gpu.run(case)[:2])


def check_cancelling_gradients(case: Case, dq: Any, dk: Any) -> None:
    """Bound dq and dk where a row sees a single key, from the rounding of dO V^T and D.

    P = 1, so dS = dO V^T - D cancels; in dense attention to the last bit, here up to the rounding
    of both. Each is a sum of products dO_id V_jd with a relative error of 4 eps at most: the two
    operands keep 2^-24, the product of their small parts is left out, and D / 32 sums of 32 terms
    are rounded. So dS is off by 8 eps sum_d |dO_id V_jd|, and dq, dk by that times scale k, q.
    """
    exact = case.astype(FLOAT64)
    terms = abs(exact.do).max() * abs(exact.v).sum(-1).max()
    ds_error = 8 * np.finfo(np.float32).eps * terms / np.sqrt(case.q.shape[-1])
    _, _, dq_exact, dk_exact, _ = dense(exact, FLOAT64)
    rows = case.q.shape[-2] * case.q.shape[-3] // case.k.shape[-3]  # that see the key
    assert abs(dq - dq_exact).max() <= ds_error * abs(exact.k).max()
    assert abs(dk - dk_exact).max() <= ds_error * abs(exact.q).max() * rows


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "seqlens", [(1, 1), (63, 130), (200, 200), (512, 512), (512, 70), (300, 700)], ids=str
)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_many_short_heads(head_dim: int, seqlens: tuple[int, int], mask: str) -> None:
    """So many that a block computes all gradients of one: equal bits, asked for or not."""
    gpu = gpu_engine()
    case = make_case((11,), 12, 12, *seqlens, head_dim, head_dim, BFLOAT16, 3, **MASKS[mask])
    poison_pool()
    results = gpu.run(case)
    assert_exact(case, results)
    if not MASKS[mask].keys() & {"softcap", "alibi"}:
        for x, y in zip(results, gpu.run(case, deterministic=True), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_grouped_heads(gpu: Engine, heads: int, kv_heads: int, deterministic: bool) -> None:
    case = make_case((2,), heads, kv_heads, 200, 300, 128, 128, BFLOAT16, seed=3, causal=True)
    assert_exact(case, gpu.run(case, deterministic=deterministic), gpu)


def test_tf32_is_close(gpu: Engine) -> None:
    """Rounded to 10 bits after the point, errors stay near 1e-3."""
    case = make_case((2,), 4, 2, 300, 300, 64, 64, FLOAT32, seed=4, causal=True)
    exact = gpu.run(case)
    rounded = gpu.run(replace(case, options={**case.options, "precision": "tf32"}))
    for x, y in zip(exact, rounded, strict=True):
        error = abs(x - y).max() / abs(x).max()
        assert 1e-6 < error < 4e-3


def _random(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> Any:
    import cupy

    rng = cupy.random.default_rng(seed)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def _forward_of_rows(q: Any, k: Any, v: Any, rows: slice) -> Any:
    """The specification for some rows only, in float64."""
    return flash_cupy.dense_attention(q[..., rows, :], k, v, dtype=np.float64)


def test_a_million_keys() -> None:
    """Inputs, outputs and O(N): 8 heads of 2^20 rows in bfloat16 take 8 GB in all."""
    import cupy

    q, k, v = (_random((8, 1 << 20, 128), BFLOAT16, seed) for seed in range(3))
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    # A window keeps the time short; a full row of keys is seen by the rows below.
    o, lse = flash_cupy.attention_forward(q, k, v, window=(4096, 0))
    assert pool.total_bytes() - before < 1.1 * (o.nbytes + lse.nbytes)
    rows = slice((1 << 20) - 64, 1 << 20)
    full = flash_cupy.attention(q[:1, rows], k[:1], v[:1])
    expected = _forward_of_rows(q[:1], k[:1], v[:1], rows)
    assert float(abs(full.astype(np.float64) - expected).max()) < 1e-4


def test_more_than_2_31_elements() -> None:
    """The last rows lie beyond 32-bit offsets."""
    seqlen = (1 << 31) // 64 // 64 + 1000
    q = _random((64, seqlen, 64), FLOAT16)
    assert q.size > 1 << 31
    o, lse = flash_cupy.attention_forward(q, q, q, window=(100, 0))
    # As many rows as have the same plan, from a multiple of all tiles of keys on.
    tail = q[-1:, -2024:]
    expected, expected_lse = flash_cupy.attention_forward(tail, tail, tail, window=(100, 0))
    np.testing.assert_array_equal(o[-1:, -500:].get(), expected[:, -500:].get())
    np.testing.assert_array_equal(lse[-1:, -500:].get(), expected_lse[:, -500:].get())


def test_more_heads_than_a_grid_axis_has_blocks(gpu: Engine) -> None:
    case = make_case((300,), 256, 256, 3, 5, 16, 16, FLOAT16, seed=5, causal=True)
    assert 300 * 256 > 65_535
    assert_exact(case, gpu.run(case))


def test_many_batch_axes(gpu: Engine) -> None:
    """Axes in an order that no single stride can walk."""
    case = make_case((2, 3, 2), 2, 1, 33, 40, 16, 16, FLOAT32, seed=6, causal=True)

    def scattered(xp: Any, x: Any) -> Any:
        order = (2, 0, 1, *range(3, x.ndim))
        return xp.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order).tolist())

    for x, y in zip(
        gpu.run(case, scattered, deterministic=True),
        gpu.run(case, deterministic=True),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_another_stream() -> None:
    """The call waits for nothing and nothing but its stream waits for it."""
    import cupy

    q = _random((4, 1000, 64), FLOAT16)
    expected = flash_cupy.attention(q, q, q, causal=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        late = q * 1
        o = flash_cupy.attention(late, late, late, causal=True)
    stream.synchronize()
    np.testing.assert_array_equal(o.get(), expected.get())


@pytest.mark.parametrize("seqlen", [300, 1100])  # the longer one clears tickets
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_graph(deterministic: bool, seqlen: int) -> None:
    """Capture forward and backward, then replay them on other numbers."""
    import cupy

    q, k, v, do = (_random((2, 4, seqlen, 64), BFLOAT16, seed) for seed in range(4))
    cupy.cuda.runtime.deviceSynchronize()  # what follows runs on another stream

    def step() -> tuple[Any, ...]:
        o, lse = flash_cupy.attention_forward(q, k, v, causal=True)
        grads = flash_cupy.attention_backward(
            do, q, k, v, o, lse, causal=True, deterministic=deterministic
        )
        return (o, lse, *grads)

    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()  # what a replay uses must not be given to others meanwhile
    with stream:
        step()  # compiles
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            captured = step()
            graph = stream.end_capture()
        q[...] = q[..., ::-1, :].copy()
        expected = [x.copy() for x in step()]
        for x in captured:
            x[...] = float("nan")
        graph.launch()
    stream.synchronize()
    for x, y in zip(captured, expected, strict=True):
        x, y = x.get().astype(np.float64), y.get().astype(np.float64)
        if deterministic:
            np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_allclose(x, y, rtol=0, atol=0.02)


def test_the_first_use_of_a_thread() -> None:
    """It may be a launch: here all memory is there before."""
    q = _random((4, 100, 64), FLOAT16)
    expected = flash_cupy.attention_forward(q, q, q)
    results = tuple(x * 0 for x in expected)
    thread = threading.Thread(target=partial(flash_cupy.attention_forward, q, q, q, out=results))
    thread.start()
    thread.join()
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_array_equal(x.get(), y.get())


class Repeated(NamedTuple):
    """A call that is made a thousand times."""

    heads: int
    seqlen: int
    head_dim: int
    options: dict[str, Any]
    dtype: np.dtype = BFLOAT16
    head_dim_v: int | None = None  # default: head_dim
    group: int = 1
    spoilt: bool = False  # the last key, of which most queries must get to know nothing

    def arrays(self) -> list[Any]:
        """q, k, v and do."""
        kv_heads, dim_v = self.heads // self.group, self.head_dim_v or self.head_dim
        shapes = [(self.heads, self.head_dim), (kv_heads, self.head_dim)]
        shapes += [(kv_heads, dim_v), (self.heads, dim_v)]
        arrays = [
            _random((2, heads, self.seqlen, dim), self.dtype, seed)
            for seed, (heads, dim) in enumerate(shapes)
        ]
        if self.spoilt:
            arrays[1][..., -1, :] = float("nan")
        return arrays


FULL: dict[str, Any] = {}
CAUSAL = {"causal": True}

#: Blocks of tiles of keys, and of whole heads; then more heads than have places where dQ adds up.
REPEATED = [Repeated(*x, 64, CAUSAL, dtype) for dtype in DTYPES for x in ((2, 517), (66, 500))]
REPEATED += [Repeated(50, 1030, dim, x) for dim in (64, 128) for x in (FULL, CAUSAL)]
REPEATED += [Repeated(30, 1030, 256, x) for x in (FULL, CAUSAL, CAUSAL | {"softcap": 5.0})]
REPEATED += [Repeated(30, 1030, 192, x, head_dim_v=128) for x in (FULL, CAUSAL)]
REPEATED += [Repeated(100, 1030, 128, x, group=4) for x in (FULL, CAUSAL)]
REPEATED += [Repeated(n, 1030, dim, CAUSAL, spoilt=True) for n, dim in ((50, 128), (30, 256))]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_a_thousand_equal_results(case: Repeated) -> None:
    """Forward and deterministic backward, while another stream keeps the GPU busy."""
    import cupy

    def bits(x: Any) -> Any:
        return x.view(f"u{x.itemsize}")  # NaN equals itself so

    q, k, v, do = case.arrays()
    o, lse = flash_cupy.attention_forward(q, k, v, **case.options)
    options = case.options | {"deterministic": True}
    first = flash_cupy.attention_backward(do, q, k, v, o, lse, **options)
    assert bool(cupy.isnan(first[0][..., :-1, :]).any()) is False
    load = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.ones((2048, 2048), np.float32)
    names = ("o", "dq", "dk", "dv")
    different = cupy.zeros(len(names), np.int64)  # elements, in all runs
    for _ in range(1000):
        with load:
            busy @ busy
        again = flash_cupy.attention_backward(do, q, k, v, o, lse, **options)
        again = (flash_cupy.attention(q, k, v, **case.options), *again)
        for i, (x, y) in enumerate(zip(again, (o, *first), strict=True)):
            different[i] += (bits(x) != bits(y)).sum()
    assert dict(zip(names, different.tolist(), strict=True)) == dict.fromkeys(names, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_default_backward_differs_by_rounding_only(
    dtype: np.dtype, head_dim: int, causal: bool
) -> None:
    """dK and dV are bit-equal in a thousand runs under load; dQ is summed in a free order."""
    import cupy

    q, k, v, do = (_random((2, 2, 1030, head_dim), dtype, seed) for seed in range(4))
    o, lse = flash_cupy.attention_forward(q, k, v, causal=causal)
    dq, dk, dv = flash_cupy.attention_backward(do, q, k, v, o, lse, causal=causal)
    load = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.ones((1024, 1024), np.float32)
    different, moved = cupy.zeros((), np.int64), cupy.zeros((), np.float32)
    for _ in range(1000):
        with load:
            busy @ busy
        again = flash_cupy.attention_backward(do, q, k, v, o, lse, causal=causal)
        different += (again[1] != dk).sum() + (again[2] != dv).sum()
        cupy.maximum(moved, abs(again[0].astype(np.float32) - dq.astype(np.float32)).max(), moved)
    rounding = 1e-5 if dtype == FLOAT32 else 2.0**-8
    assert int(different) == 0
    assert float(moved) <= rounding * float(abs(dq.astype(np.float32)).max())


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 16, 1 << 18, 64 << 20])
def test_numpy_arrays_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, options: dict, chunk_bytes: int, dtype: np.dtype
) -> None:
    """In chunks of a head, a few heads, or all of it; with broadcasting, GQA and slopes."""
    monkeypatch.setattr("flash_cupy.cuda.staging.CHUNK_BYTES", chunk_bytes)
    case = make_case((3,), 4, 2, 97, 130, 32, 40, dtype, seed=7, alibi=True, **options)
    for got in (STAGED.run(case), STAGED.run(case, deterministic=True)):
        assert all(isinstance(x, np.ndarray) for x in got)
        assert_exact(case, got)
    for shared in (replace(case, v=case.v[0]), replace(case, k=case.k[:1], v=case.v[0])):
        assert_exact(shared, STAGED.run(shared))


def test_many_small_numpy_arrays_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of batch entries go in a few chunks, through all the lanes, ragged at the end."""
    monkeypatch.setattr("flash_cupy.cuda.staging.CHUNK_BYTES", 1 << 20)
    case = make_case((1001, 3), 2, 1, 17, 19, 16, 16, FLOAT16, seed=8, causal=True)
    assert_exact(case, STAGED.run(case))


def test_a_failed_call_leaves_nothing_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_cupy.cuda.staging.CHUNK_BYTES", 1 << 16)
    case = make_case((40,), 2, 2, 64, 64, 32, 32, FLOAT32, seed=9)
    forward, calls = flash_cupy.cuda.CudaEngine.forward, []

    def fail_late(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        forward(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(flash_cupy.cuda.CudaEngine, "forward", fail_late)
        flash_cupy.attention(case.q, case.k, case.v, device="gpu")
    assert_exact(case, STAGED.run(case))


def test_user_set_allocator() -> None:
    """All memory comes from CuPy's current allocator."""
    import cupy

    q = _random((2, 300, 64), FLOAT64)
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        o, lse = flash_cupy.attention_forward(q, q, q)
        used = pool.used_bytes()
        flash_cupy.attention_backward(o, q, q, q, o, lse)
    assert used >= o.nbytes + lse.nbytes
    assert pool.total_bytes() > used


def test_second_gpu() -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    q = _random((2, 300, 64), FLOAT16)
    expected = flash_cupy.attention(q, q, q).get()
    with cupy.cuda.Device(1):
        other = cupy.asarray(q.get())
        np.testing.assert_array_equal(flash_cupy.attention(other, other, other).get(), expected)
    with pytest.raises(ValueError, match=r"q: got an array on GPU 1, takes arrays on the current"):
        flash_cupy.attention(other, other, other)


def test_second_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not fit for the engine is told by the device that is current."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    why_not_on = gpu_module._why_not_on
    monkeypatch.setattr(gpu_module, "_why_not_on", lambda n: "it is old" if n else why_not_on(n))
    q = _random((2, 300, 64), FLOAT16)
    expected = flash_cupy.attention(q, q, q)
    with cupy.cuda.Device(1):
        other = cupy.asarray(q.get())
        with pytest.raises(ValueError, match=r"^q, k and v: got CuPy arrays, but it is old"):
            flash_cupy.attention(other, other, other)
    np.testing.assert_array_equal(flash_cupy.attention(q, q, q).get(), expected.get())


def test_mixture_of_libraries() -> None:
    q = _random((4, 8), FLOAT32)
    with pytest.raises(TypeError, match=r"got a mixture \(q cupy, k numpy, v cupy\)"):
        flash_cupy.attention(q, q.get(), q)
    with pytest.raises(TypeError, match=r"do: got a numpy array, takes a cupy array"):
        o, lse = flash_cupy.attention_forward(q, q, q)
        flash_cupy.attention_backward(o.get(), q, q, q, o, lse)
    with pytest.raises(ValueError, match=r"device: got 'cpu' with CuPy arrays"):
        flash_cupy.attention(q, q, q, device="cpu")
    wide = _random((4, 257), FLOAT32)
    with pytest.raises(
        ValueError, match=r"q and v: got head dims 257 and 8, takes at most 256 on the"
    ):
        flash_cupy.attention(wide, wide, q)


def test_error_no_worse_than_twice_dense_in_16_bit(gpu: Engine) -> None:
    """Dense attention as one writes it with CuPy: every matrix rounded to the arrays' dtype."""
    import cupy

    for dtype in (FLOAT16, BFLOAT16):
        q, k, v = (_random((4, 2048, 128), dtype, seed) for seed in range(3))
        s = (q.astype(np.float32) @ k.astype(np.float32).swapaxes(-1, -2)).astype(dtype)
        s = s.astype(np.float32) / np.float32(np.sqrt(128))
        p = cupy.exp(s - s.max(axis=-1, keepdims=True))
        p = (p / p.sum(axis=-1, keepdims=True)).astype(dtype)
        dense = (p.astype(np.float32) @ v.astype(np.float32)).astype(dtype)
        exact = flash_cupy.dense_attention(q, k, v, dtype=np.float64)
        error, allowed = (
            float(cupy.sqrt(((x.astype(np.float64) - exact) ** 2).mean()))
            for x in (flash_cupy.attention(q, k, v), dense)
        )
        assert error <= 2 * allowed


def test_compile_ahead_leaves_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    flash_cupy.compile([(40, 64), 32], FLOAT16, softcap=True, progress=False)
    flash_cupy.compile([32], FLOAT32, precision="tf32", deterministic=True, progress=False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cupy, "RawModule", refuse)
    q = _random((2, 100, 32), FLOAT32)
    _, backprop = flash_cupy.attention_vjp(q, q, q, precision="tf32", deterministic=True)
    backprop(q)
    for heads, (head_dim, head_dim_v) in itertools.product((2, 132), ((40, 64), (32, 32))):
        q = _random((heads, 100, head_dim), FLOAT16)
        v = _random((heads, 100, head_dim_v), FLOAT16)
        for options in ({}, {"causal": True}):
            o, lse = flash_cupy.attention_forward(q, q, v, softcap=3.0, **options)
            flash_cupy.attention_backward(o, q, q, v, o, lse, softcap=3.0, **options)
