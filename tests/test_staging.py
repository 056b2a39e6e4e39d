"""How NumPy arrays are cut into chunks for the GPU; here the CPU engine computes the chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from strategies import FLOAT32, FLOAT64, Case, make_case

import flash_cupy
from flash_cupy import tiled
from flash_cupy.cuda import staging
from flash_cupy.cuda.params import BATCH_AXES
from flash_cupy.cuda.staging import Extent, StagedEngine, box_lengths
from flash_cupy.problem import Options, Problem

KIB = 1024


class HostLane:
    """A lane whose device is the host: what was not copied in time is NaN."""

    def __init__(self) -> None:
        self.stream = _Stream()
        self.unfinished: list[tuple[Any, Any]] = []

    def upload(self, name: str, x: Any) -> Any:
        return x.copy()

    def result(self, name: str, x: Any) -> Any:
        self.unfinished.append((x, np.full(x.shape, np.nan, x.dtype)))
        return self.unfinished[-1][1]

    def download(self) -> None:
        pass

    def finish(self) -> None:
        for x, computed in self.unfinished:
            x[...] = computed
        self.unfinished.clear()


class _Stream(nullcontext):
    synchronized = 0

    def synchronize(self) -> None:
        self.synchronized += 1


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Problem]]:
    """Put the staged engine on the host in place of the CPU engine, with chunks of some bytes."""
    problems: list[Problem] = []

    def forward(problem: Problem, *arrays: Any) -> None:
        problems.append(problem)
        tiled.forward(problem, *arrays)

    def backward(problem: Problem, do: Any, q: Any, k: Any, v: Any, *more: Any) -> None:
        # Gradients come with all batch axes, what broadcast inputs get is summed on the host.
        *_, dq, dk, dv, _ = more
        q, k, v = (np.broadcast_to(x, dx.shape) for x, dx in ((q, dq), (k, dk), (v, dv)))
        problems.append(problem)
        tiled.backward(problem, do, q, k, v, *more)

    engine = StagedEngine(SimpleNamespace(forward=forward, backward=backward))
    monkeypatch.setattr(staging, "Lane", HostLane)

    def use(chunk_bytes: int) -> list[Problem]:
        monkeypatch.setattr(staging, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr("flash_cupy.engine.tiled", engine)
        problems.clear()
        return problems

    return use


def run(case: Case) -> tuple[Any, ...]:
    options = {**case.options, "device": "cpu"}
    o, lse = flash_cupy.attention_forward(case.q, case.k, case.v, **options)
    grads = flash_cupy.attention_backward(
        case.do, case.q, case.k, case.v, o, lse, dlse=case.dlse, **options
    )
    return (o, lse, *grads)


@st.composite
def broadcast_cases(draw: st.DrawFn) -> Case:
    """Any batch axes, along which each of q, k and v may repeat or which it may lack."""
    batch = draw(st.lists(st.integers(1, 4), max_size=3).map(tuple))
    kv_heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 99))
    case = make_case(batch, kv_heads * group, kv_heads, 3, 4, 2, 3, FLOAT64, seed, alibi=True)
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        repeated = draw(st.sets(st.integers(0, len(batch) - 1))) if batch else ()
        x = x[tuple(slice(0, 1) if axis in repeated else slice(None) for axis in range(x.ndim))]
        for _ in range(draw(st.integers(0, len(batch)))):
            x = x[0] if x.shape[0] == 1 else x
        case = replace(case, **{name: x})
    shape = np.broadcast_shapes(*(x.shape[:-3] for x in (case.q, case.k, case.v)))
    do, dlse = (np.resize(x, (*shape, *x.shape[len(batch) :])) for x in (case.do, case.dlse))
    slopes = case.options["alibi_slopes"]
    slopes = slopes if slopes.ndim == 1 else np.resize(slopes, (*shape, slopes.shape[-1]))
    return replace(case, do=do, dlse=dlse, options={**case.options, "alibi_slopes": slopes})


@given(case=broadcast_cases(), chunk_bytes=st.sampled_from([1, 300, 1000, 3000, 1 << 20]))
def test_chunks_make_up_the_whole(staged: Any, case: Case, chunk_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_cupy.engine.tiled", tiled)
        expected = run(case)
    staged(chunk_bytes)
    for got, whole in zip(run(case), expected, strict=True):
        np.testing.assert_allclose(got, whole, rtol=1e-12, atol=1e-12)


def test_arrays_of_one_head_without_a_head_axis(staged: Any) -> None:
    case = make_case((), 1, 1, 5, 6, 4, 4, FLOAT32, seed=0)
    flat = replace(case, **{name: getattr(case, name)[0] for name in ("q", "k", "v", "do", "dlse")})
    expected = run(flat)
    assert len(staged(1)) == 0
    for got, whole in zip(run(flat), expected, strict=True):
        np.testing.assert_array_equal(got, whole)


def test_small_heads_share_a_chunk(staged: Any) -> None:
    """4096 batch entries of two heads, 2 KiB each in forward: 64 chunks and not 4096."""
    case = make_case((4096,), 2, 2, 8, 8, 16, 16, FLOAT32, seed=0)
    entry = 2 * 4 * (8 * 16 * 4 + 8)  # q, k, v and o; lse
    problems = staged(64 * entry)
    flash_cupy.attention(case.q, case.k, case.v, device="cpu")
    assert len(problems) == 64
    assert {(problem.batch, problem.kv_heads) for problem in problems} == {((64,), 2)}


def test_equal_chunks_share_a_problem(staged: Any) -> None:
    """Launches are remembered by problem; ragged ends differ by one at most."""
    case = make_case((10,), 1, 1, 8, 8, 16, 16, FLOAT32, seed=0)
    problems = staged(4 * 4 * (8 * 16 * 4 + 8))
    flash_cupy.attention(case.q, case.k, case.v, device="cpu")
    assert [problem.batch for problem in problems] == [(4,), (3,), (3,)]
    assert problems[1] is problems[2]


def test_streams_are_waited_for_after_an_error(
    staged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[HostLane] = []
    monkeypatch.setattr(staging, "Lane", lambda: made.append(HostLane()) or made[-1])
    staged(1)
    monkeypatch.setattr(tiled, "forward", lambda *args: 1 / 0)
    case = make_case((3,), 1, 1, 2, 2, 2, 2, FLOAT32, seed=0)
    with pytest.raises(ZeroDivisionError):
        flash_cupy.attention(case.q, case.k, case.v, device="cpu")
    assert [lane.stream.synchronized for lane in made] == [1, 1]


# ----------------------------------------------------------------------------------- planning alone


def test_all_at_once_where_it_fits() -> None:
    assert box_lengths((5, 3, 8), [Extent(KIB, (True, True, True))], 1 << 30) == (5, 3, 8)


@pytest.mark.parametrize(
    "budget, lengths",
    [
        (1, (1, 1, 1)),
        (3 * KIB, (1, 1, 3)),
        (16 * KIB, (1, 2, 8)),
        (24 * KIB, (1, 3, 8)),
        (100 * KIB, (4, 3, 8)),
    ],
)
def test_last_axes_first(budget: int, lengths: tuple[int, ...]) -> None:
    assert box_lengths((5, 3, 8), [Extent(KIB, (True, True, True))], budget) == lengths


def test_along_what_repeats_first() -> None:
    """Keys shared by the batch are uploaded once: a chunk has all entries of some heads."""
    q, k = Extent(KIB, (True, True)), Extent(100 * KIB, (False, True))
    assert box_lengths((8, 4), [q, k], 250 * KIB) == (8, 2)
    assert box_lengths((8, 4), [q, k], 108 * KIB) == (8, 1)
    # What repeats is larger than the budget: as much of the rest goes with it.
    assert box_lengths((1000, 4), [q, k], 10 * KIB) == (100, 1)


def test_no_more_batch_axes_than_kernels_have() -> None:
    extents = (2,) * (BATCH_AXES + 2)
    lengths = box_lengths((*extents, 3), [Extent(1, (True,) * (len(extents) + 1))], 1 << 20)
    assert lengths == (1, 1, *(2,) * BATCH_AXES, 3)


def test_boxes_cover_each_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any budget; and no chunk is beyond it unless it is a single head."""
    q, k, v = (np.empty((4, 1, 7, h, 5, 2), FLOAT32) for h in (6, 3, 3))
    o, lse = np.empty((4, 1, 7, 6, 5, 2), FLOAT32), np.empty((4, 1, 7, 6, 5), FLOAT32)
    problem = Problem.of(q, k[0], v, Options(device="cpu"))
    arrays = {"q": q, "k": k[0], "v": v, "o": o, "lse": lse}
    for budget in (1, 500, 2000, 5000, 20000, 10**6):
        monkeypatch.setattr(staging, "CHUNK_BYTES", budget)
        seen = np.zeros((4, 1, 7, 3), int)
        for chunk in staging.chunks(problem, arrays, {}):
            seen[chunk.box] += 1
            parts = {name: chunk.part_of(name, x) for name, x in arrays.items()}
            lead = (*chunk.problem.batch, chunk.problem.heads)
            assert parts["o"].shape == (*lead, 5, 2) == chunk.problem.o_shape
            assert parts["lse"].shape == (*lead, 5)
            assert parts["k"].shape == (1, chunk.problem.batch[2], chunk.problem.kv_heads, 5, 2)
            heads = math.prod(chunk.problem.batch) * chunk.problem.kv_heads
            allowed = max(budget, 2 * parts["k"].nbytes)
            assert heads == 1 or sum(x.nbytes for x in parts.values()) <= allowed
        assert (seen == 1).all()


@pytest.mark.parametrize("extent, length", [*itertools.product((1, 7, 10, 64), (1, 3, 9, 64))])
def test_cuts(extent: int, length: int) -> None:
    parts = staging._cut(extent, length)
    assert parts[0].start == 0 and parts[-1].stop == extent
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) == sizes[0] <= length and min(sizes) >= max(sizes) - 1
    assert len(parts) == -(-extent // length)
