"""The attention benchmark: what it counts, times, compares, records and draws; here on the CPU."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import accuracy
import attention
import machine
import numpy as np
import overheads
import peers
import pictures
import pytest
import report
import timing
from cells import DIRECTIONS, PRESETS, VARIANTS, Cell, Grid

import flash_cupy
from flash_cupy.cuda.launch import Gpu
from flash_cupy.cuda.params import ATTENTION_PARAMS

CELL = Cell(batch=2, heads=3, seqlen=50, head_dim=8, mask="full", dtype="float32", direction="both")

CASES = [
    {"mask": "full"},
    {"mask": "causal"},
    {"mask": "causal", "window": 9},
    {"mask": "full", "heads": 6, "kv_heads": 2},
    {"mask": "causal", "window": 40, "heads": 6, "kv_heads": 2, "head_dim_v": 5},
    {"mask": "full", "inputs": "outliers"},
]

# ---------------------------------------------------------------------------- cells and statistics


def test_flops_by_hand() -> None:
    cell = Cell(2, 3, 8, 4, "full", "float32", "forward")
    assert cell.flops == 4 * 2 * 3 * 8 * 8 * 4 == 6144
    assert replace(cell, mask="causal").flops == 3072
    assert replace(cell, direction="backward").flops == 2.5 * 6144
    assert replace(cell, direction="deterministic").flops == 2.5 * 6144
    assert replace(cell, direction="both").flops == 3.5 * 6144


def test_flops_of_variants_by_hand() -> None:
    cell = Cell(2, 3, 8, 4, "full", "float32", "forward")
    assert replace(cell, kv_heads=1, inputs="outliers").flops == cell.flops
    # Q Kᵀ over 4 features and P V over 2; backward Q Kᵀ, dS K, dSᵀ Q and dO Vᵀ, Pᵀ dO.
    assert replace(cell, head_dim_v=2).flops == 2 * 2 * 3 * 8 * 8 * (4 + 2)
    wide = replace(cell, head_dim_v=2, direction="backward")
    assert wide.flops == 2 * 2 * 3 * 8 * 8 * (3 * 4 + 2 * 2)
    assert replace(wide, direction="both").flops == 2 * 2 * 3 * 8 * 8 * (4 * 4 + 3 * 2)


def test_flops_count_the_pairs_in_the_window() -> None:
    whole = Cell(1, 1, 8192, 128, "causal", "float32", "forward")
    assert replace(whole, window=8192).flops == replace(whole, window=9000).flops == whole.flops
    for window in (1, 1024, 8191):
        pairs = sum(min(i + 1, window) for i in range(8192))
        flops = replace(whole, window=window).flops
        assert flops == pytest.approx(4 * pairs * 128, abs=4 * 8192 / 2 * 128)  # half the diagonal


def test_variant_names_what_is_not_the_default() -> None:
    causal = replace(CELL, mask="causal")
    assert causal.variant == ""
    assert replace(causal, kv_heads=1, window=8).variant == "Hkv1 W8"
    assert str(replace(causal, head_dim_v=4, inputs="outliers")).endswith("both Dv4 outliers")
    assert str(causal).endswith("float32 both")


def test_cells_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="kv_heads: got 2, takes a divisor of 3"):
        replace(CELL, kv_heads=2)
    with pytest.raises(ValueError, match="window: got 8 and mask full, takes"):
        replace(CELL, window=8)
    with pytest.raises(ValueError, match="window: got 0 and mask causal, takes a number from 1"):
        replace(CELL, window=0, mask="causal")


def test_variants_are_short_cells() -> None:
    cells = PRESETS["variants"].cells()
    assert len(cells) == len(set(cells)) == 8 + 2 + 16 + 8 + 16 + 4
    assert {cell.variant for cell in cells} == {"", "Hkv8", "W1024", "Dv128", "outliers"}
    usual = Cell(2, 16, 8192, 128, "full", "bfloat16", "backward")
    assert max(cell.flops for cell in cells) <= 2 * usual.flops
    assert {cell.batch * cell.seqlen for cell in cells if cell.kv_heads} == {4096, 8192}


def test_grids_fill_up_to_16k_tokens_of_2048_features() -> None:
    cells = [cell for grid in PRESETS["peers"].grids for cell in grid.cells()]
    assert len(cells) == len(set(cells)) == 2 * 24
    assert all(cell.batch * cell.seqlen == 16384 for cell in cells)
    assert all(cell.heads * cell.head_dim == 2048 for cell in cells)
    (cell,) = Grid((64,), (32,), ("full",), directions=("forward",), batch=1, heads=8).cells()
    assert cell.shape == (1, 8, 32, 64)


def test_quick_is_four_cells() -> None:
    assert sum(len(list(grid.cells())) for grid in PRESETS["quick"].grids) == 4


def test_geometric_mean() -> None:
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4)
    assert report.geometric_mean([0.5, 1.0, 2.0]) == pytest.approx(1)


def test_ratios_leave_out_what_was_not_timed() -> None:
    timed = {"flash_cupy": {"ms": 2.0}, "a": {"ms": 5.0}, "b": {"failed": "no"}}
    assert report.ratios(timed) == {"a": 2.5}
    assert report.ratios({"flash_cupy": {"failed": "no"}, "a": {"ms": 5.0}}) == {}


def record(cell: Cell, times: dict[str, float | str]) -> report.Record:
    """A record with the given times, or reasons of failure."""
    results: dict[str, dict[str, Any]] = {
        name: {"failed": ms}
        if isinstance(ms, str)
        else {"ms": ms, "tflops": cell.flops / ms * 1e-9, "peak_bytes": 2**20, "errors": {}}
        for name, ms in times.items()
    }
    axes = {**asdict(cell), "variant": cell.variant}
    return {**axes, "results": results, "ratios": report.ratios(results)}


def test_summary_by_hand() -> None:
    other = replace(CELL, head_dim=16)
    records = [
        record(CELL, {"flash_cupy": 1.0, "dense": 2.0}),
        record(other, {"flash_cupy": 1.0, "dense": 8.0}),
        record(replace(other, seqlen=70), {"flash_cupy": 2.0, "dense": 1.0}),
        record(replace(other, seqlen=90), {"flash_cupy": 2.0, "dense": "no"}),
    ]
    (row,) = report.summary(records)
    assert row["cells"] == 3
    assert row["geometric_mean"] == pytest.approx(2)
    assert row["by_head_dim"] == {"8": pytest.approx(2), "16": pytest.approx(2)}
    assert row["worst"] == {"ratio": 0.5, "head_dim": 16, "seqlen": 70, "mask": "full"}
    assert "D16 N70 full" in report.summary_table([row])


def test_variants_are_kept_apart() -> None:
    """In means, in pairs of masks and in tables."""
    causal = replace(CELL, mask="causal")
    cells = {CELL: 2.0, causal: 1.0, replace(causal, window=8): 0.5, replace(CELL, kv_heads=1): 4.0}
    records = [record(cell, {"flash_cupy": ms, "dense": 4.0}) for cell, ms in cells.items()]
    rows = report.summary(records)
    assert [(row["variant"], row["cells"]) for row in rows] == [("", 2), ("W8", 1), ("Hkv1", 1)]
    assert [pair["variant"] for pair in report.causal_over_full(records)] == [""]
    for printed in (report.table(records, "tflops"), report.summary_table(rows)):
        assert [line.count("W8") for line in printed.splitlines()].count(1) == 1
        assert "Hkv1" in printed


def test_records_from_before_variants(tmp_path: Path) -> None:
    records = [record(replace(CELL, seqlen=n), {"flash_cupy": 1.0, "dense": 2.0}) for n in (8, 16)]
    for old in records:
        for name in ("variant", *VARIANTS):
            del old[name]
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"header": {"device": "a card"}, "cells": records}))
    header, read = report.read(path)
    assert report.summary(read)[0]["cells"] == 2
    assert "variant" in report.table(read, "tflops")
    assert [name for name, _ in pictures._speed(header, read)] == ["float32-both"]
    assert attention.main(["--pictures-only", str(path)]) == 0
    assert (tmp_path / "old-memory-float32-d8-b2-h3.png").exists()


def test_errors_are_compared_where_both_are_known() -> None:
    def of(o: float, dq: float) -> dict[str, Any]:
        return {"errors": {"o": {"rms": o, "max": 9.0}, "dq": {"rms": dq, "max": 9.0}}}

    results = {"flash_cupy": of(1.0, 3.0), "dense": of(2.0, 2.0), "exact": of(0.0, 0.0)}
    assert report.error_ratio(results, "dense") == 1.5
    assert report.error_ratio(results, "exact") is None
    assert report.error_ratio({**results, "no": {"failed": "no"}}, "no") is None
    records = [
        record(replace(CELL, seqlen=n), {"flash_cupy": 1.0, "dense": 2.0}) for n in (8, 9, 10)
    ]
    for each, error in zip(records, (4.0, 0.5, 2.0), strict=True):
        for name, of_name in (("flash_cupy", of(1.0, 1.0)), ("dense", of(error, error))):
            each["results"][name] |= of_name
    (row,) = report.summary(records)
    assert row["worst_error_ratio"] == 2.0
    assert report.summary_table([row]).endswith("2.00")


def test_causal_over_full() -> None:
    causal, alone = replace(CELL, mask="causal"), replace(CELL, mask="causal", seqlen=9)
    times = ((CELL, 4.0), (causal, 3.0), (alone, 1.0))
    (pair,) = report.causal_over_full([record(cell, {"flash_cupy": ms}) for cell, ms in times])
    assert (pair["seqlen"], pair["ratio"]) == (50, 0.75)


# ------------------------------------------------------------------------------------------- timing


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (0.01, 5), (9.0, 30)])
def test_alternate_takes_turns_and_medians(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def timer(call: Callable[[], None]) -> Callable[[], float]:
        call()
        outlier = len(called) == 3
        taken = 1.0 if outlier else {"a": 0.001, "b": 0.003}[called[-1]]
        return lambda: taken

    monkeypatch.setattr(timing, "timer_for", lambda xp: timer)
    calls = {name: partial(called.append, name) for name in ("a", "b")}
    assert timing.alternate(calls, np, seconds) == {"a": 0.001, "b": 0.003}
    orders = ["".join(called[i : i + 2]) for i in range(0, len(called), 2)]
    assert orders == [orders[i % 2] for i in range(rounds)]
    assert set(orders) == {"ab", "ba"}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_each_follows_each_other_once(count: int) -> None:
    order = timing.each_after_each("abcdef"[:count])
    pairs = list(zip(order, order[1:] + order[:1], strict=True))
    assert sorted(pairs) == (list(itertools.permutations("abcdef"[:count], 2)) or [("a", "a")])


def test_cpu_timer() -> None:
    ticks = iter([10.0, 12.5])
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: next(ticks))
        assert timing.cpu_timer(lambda: done.append(1))() == 2.5
    assert done == [1]


# ----------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_specification_in_float64(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = replace(CELL, **case)
    x = peers.random_inputs(cell, np)
    q, k, v, do = (array[-1].astype(np.float64) for array in x)
    window = (cell.window - 1, None) if cell.window else None
    options = {"causal": cell.mask == "causal", "window": window, "device": "cpu"}
    o = flash_cupy.dense_attention(q, k, v, **options)
    dq, dk, dv = flash_cupy.dense_attention_backward(do, q, k, v, **options)
    group = 3 if cell.kv_heads else 1
    o, dq, dk, dv = o[-group:], dq[-group:], dk[-1:], dv[-1:]
    monkeypatch.setattr(accuracy, "BLOCK_ROWS", 16)
    expected = accuracy.reference(x, cell, np)
    for name, truth in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items():
        np.testing.assert_allclose(expected[name], truth, rtol=1e-12, atol=1e-14)

    monkeypatch.setattr(accuracy, "WHOLE_SEQLEN", 32)
    last = accuracy.reference(x, cell, np)
    assert set(last) == {"o", "dq"}
    np.testing.assert_allclose(last["o"], o[:, -16:], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(last["dq"], dq[:, -16:], rtol=1e-12, atol=1e-14)


def test_errors_by_hand() -> None:
    truth = np.ones((2, 4, 2))
    result = np.full((2, 3, 5, 2), 9.0, np.float32)  # only the last heads and rows count
    result[-1, -2:, -4:] = 1
    result[-1, -1, -1] = (1 - 0.5, 1 + 0.25)
    rms = ((0.5**2 + 0.25**2) / 16) ** 0.5
    assert accuracy.errors({"o": result}, {"o": truth}) == {
        "o": {"rms": pytest.approx(rms), "max": 0.5}
    }


# ------------------------------------------------------------------------------------- competitors


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_competitors_agree(direction: str, case: dict[str, Any]) -> None:
    cell = replace(CELL, direction=direction, **case)
    x = peers.random_inputs(cell, np)
    assert tuple(array.shape for array in x) == cell.shapes
    expected = accuracy.reference(x, cell, np)
    for competitor in [*peers.competitors(np), peers.Dense(np)]:
        if not competitor.takes(cell) and isinstance(competitor, peers.Dense):
            continue
        trial = attention.trial(competitor, x, cell, expected)
        assert tuple(trial["errors"]) == cell.results
        assert all(error["max"] < 1e-5 for error in trial["errors"].values()), competitor.name
        assert trial["peak_bytes"] > 0


@pytest.mark.parametrize("case", [case for case in CASES if "window" not in case], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_torch_agrees(direction: str, case: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    competitor = peers.Torch(np, torch, "MATH")
    competitor.peak_bytes = peers.Ours(np).peak_bytes  # PyTorch's own is of a GPU
    cell = replace(CELL, direction=direction, **case)
    x = peers.random_inputs(cell, np)
    trial = attention.trial(competitor, x, cell, accuracy.reference(x, cell, np))
    assert all(error["max"] < 1e-5 for error in trial["errors"].values())


class FakePools:
    """CuPy's pools, as far as a competitor uses them: they count and never forget."""

    def __init__(self) -> None:
        self.bytes, self.kept, self.freed, self.current = 0, 0, 0, None
        self.cuda = SimpleNamespace(MemoryPool=lambda: self, using_allocator=self.using)
        self.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=self.note)

    def malloc(self, size: int) -> None:
        self.bytes += size

    def total_bytes(self) -> int:
        return self.bytes

    def free_all_blocks(self) -> None:
        self.bytes = self.kept

    def note(self) -> None:
        self.freed += 1

    @contextmanager
    def using(self, allocator: Any) -> Iterator[None]:
        self.current = allocator
        yield
        self.current = None


def test_memory_of_a_trial_is_counted_and_given_back() -> None:
    """In a pool that stays: that of a pool which is gone may stay allocated for good."""
    xp = FakePools()
    competitor = peers.Ours(xp)
    xp.bytes = 5  # of an array that lives
    assert competitor.peak_bytes(lambda: xp.current(70)) == 70
    assert xp.current is None
    xp.kept = 5
    competitor.release()
    assert (xp.bytes, xp.freed) == (5, 1)
    assert competitor.peak_bytes(lambda: xp.current(3)) == 3


def test_default_backward_is_a_peer_of_the_deterministic_one_only() -> None:
    taking = [d for d in DIRECTIONS if peers.OursDefault(np).takes(replace(CELL, direction=d))]
    assert taking == ["deterministic"]


def test_tf32_is_float32_with_an_option() -> None:
    cell = replace(CELL, dtype="tf32")
    assert peers.random_inputs(cell, np).q.dtype == np.float32
    assert peers.Ours(np).options(cell)["precision"] == "tf32"


def test_torch_backends_take_the_dtypes_they_have_kernels_for() -> None:
    taking = {
        dtype: [
            backend
            for backend in peers.TORCH_BACKENDS
            if peers.Torch(np, None, backend).takes(replace(CELL, dtype=dtype))
        ]
        for dtype in ("bfloat16", "tf32", "float64")
    }
    assert taking["bfloat16"] == list(peers.TORCH_BACKENDS)
    assert taking["tf32"] == ["EFFICIENT_ATTENTION", "MATH"]
    assert taking["float64"] == ["MATH"]


def test_peers_take_the_variants_they_have_kernels_for() -> None:
    half = replace(CELL, dtype="bfloat16", mask="causal", heads=4)
    present = [peers.Ours(np), peers.Dense(np)]
    present += [peers.Torch(np, None, backend) for backend in peers.TORCH_BACKENDS]

    def missing(**axes: Any) -> set[str]:
        return {peer.name for peer in present if not peer.takes(replace(half, **axes))}

    others = {"torch cuDNN", "torch efficient", "torch math"}
    assert missing() == missing(inputs="outliers") == set()
    assert missing(window=8) == {"dense", *others}
    assert missing(kv_heads=2) == {"dense"}
    assert missing(head_dim_v=4) == {"torch flash"}


class FakeTensor:
    """An array that is transposed like a tensor of PyTorch."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def transpose(self, one: int, other: int) -> FakeTensor:
        return FakeTensor(self.array.swapaxes(one, other))


def test_torch_flash_has_the_window_from_the_operator_under_it() -> None:
    """Its arguments and results as in PyTorch 2.11, its arrays (batch, seqlen, heads, features)."""

    def operator(
        query: FakeTensor,
        key: FakeTensor,
        value: FakeTensor,
        cum_seq_q: None,
        cum_seq_k: None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Any, ...]:
        assert not is_causal and (max_q, max_k) == (50, 50)
        q, k, v = (x.transpose(1, 2).array for x in (query, key, value))
        window = (window_size_left, window_size_right)
        o = flash_cupy.dense_attention(q, k, v, window=window, device="cpu")
        return FakeTensor(o).transpose(1, 2), None, None, None, None

    aten = SimpleNamespace(_flash_attention_forward=operator)
    torch = SimpleNamespace(ops=SimpleNamespace(aten=aten))
    cell = replace(CELL, mask="causal", window=9, heads=6, kv_heads=2)
    x = peers.random_inputs(cell, np)
    o = peers.Torch(np, torch, "FLASH_ATTENTION").attend(cell, *map(FakeTensor, x[:3]))
    np.testing.assert_allclose(o.array, peers.Ours(np).forward(x, cell), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"mask": "causal"},
        {"mask": "causal", "window": 9},
        {"direction": "deterministic"},
    ],
    ids=str,
)
def test_flash_attention_4_agrees(case: dict[str, Any], returns_lse: bool) -> None:
    """Its arrays are (batch, seqlen, heads, features), its windows have None for no limit."""

    def flash_attn_func(
        q: FakeTensor,
        k: FakeTensor,
        v: FakeTensor,
        causal: bool,
        window_size: tuple[int | None, int | None],
        deterministic: bool,
    ) -> Any:
        assert deterministic == (case.get("direction") == "deterministic")
        arrays = (x.transpose(1, 2).array for x in (q, k, v))
        o = flash_cupy.dense_attention(*arrays, causal=causal, window=window_size, device="cpu")
        o = FakeTensor(o).transpose(1, 2)
        return (o, None) if returns_lse else o

    cell = replace(CELL, heads=6, kv_heads=2, **case)
    x = peers.random_inputs(cell, np)
    peer = peers.FlashAttention4(np, None, flash_attn_func)
    assert peer.takes(replace(cell, dtype="bfloat16")) and not peer.takes(cell)
    o = peer.attend(cell, *map(FakeTensor, x[:3]))
    np.testing.assert_allclose(o.array, peers.Ours(np).forward(x, cell), rtol=1e-5, atol=1e-6)


def test_flash_attention_4_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(flash_attn_func=len)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=package))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    assert [peer.attention for peer in peers.flash_attention_4(np, None)] == [len]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert peers.flash_attention_4(np, None) == []


def test_outliers_are_few_and_large() -> None:
    cell = replace(CELL, seqlen=4000, batch=1, dtype="float64")
    usual = peers.random_inputs(replace(cell, head_dim=1), np)
    assert max(abs(array).max() for array in usual) < 8
    for array in peers.random_inputs(replace(cell, inputs="outliers"), np):
        assert array.shape == cell.shape
        assert 1e-4 < (abs(array) > 6).mean() < 1e-3  # of those 10 times as large 55 %
        assert abs(array).max() > 10


def test_torch_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert peers.torch_peers(np) == []


def test_torch_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = SimpleNamespace(SDPBackend=SimpleNamespace(MATH=0, FLASH_ATTENTION=1))
    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False), nn=SimpleNamespace(attention=backends)
    )
    for name, module in (("", torch), (".nn", torch.nn), (".nn.attention", backends)):
        monkeypatch.setitem(sys.modules, f"torch{name}", module)
    assert peers.torch_peers(np) == []
    torch.cuda.is_available = lambda: True
    names = [peer.name for peer in peers.torch_peers(np)]
    assert names == ["torch flash", "torch math"]  # this one has no others


def test_every_competitor_has_a_colour() -> None:
    present = [*peers.competitors(np), peers.Dense(np), peers.OursPortable(np)]
    names = {peer.name for peer in present}
    names |= {name for name, *_ in peers.TORCH_BACKENDS.values()} | {peers.FlashAttention4.name}
    assert names == set(pictures.COLOURS)


# ------------------------------------------------------------------------------------- the program


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], Path]:
    """Run the program on tiny cells; return its status, its JSON and the file's path."""
    sizes = "--device cpu --head-dims 8 --seqlens 20 40 --batch 1 --heads 2 --seconds 0.001"
    status = attention.main([*sizes.split(), "--out", str(tmp_path), *options])
    (path,) = tmp_path.glob("*/custom.json")
    assert path.parent.name == machine.slug(machine.describe(np)["device"])
    return status, json.loads(path.read_text()), path


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, figures, path = run(tmp_path, "--directions", "forward", "deterministic")
    assert status == 0
    assert {"device", "date", "numpy", "python", "cores"} <= set(figures["header"])
    assert len(figures["cells"]) == 2 * 2 * 2
    for cell, direction in zip(
        figures["cells"], itertools.cycle(["forward", "deterministic"]), strict=False
    ):
        assert cell["direction"] == direction
        names = {"flash_cupy", "dense_attention"}
        names |= {"default backward"} if direction == "deterministic" else set()
        assert set(cell["results"]) == names
        assert set(cell["ratios"]) == names - {"flash_cupy"}
        results = {"o"} if direction == "forward" else {"dq", "dk", "dv"}
        assert set(cell["reference_rms"]) == results
        for result in cell["results"].values():
            assert result["tflops"] == pytest.approx(cell["flops"] / result["ms"] * 1e-9)
            assert result["peak_bytes"] > 0
            assert set(result["errors"]) == results
    assert len(figures["causal_over_full"]) == 4
    assert {row["peer"] for row in figures["summary"]} == {"dense_attention", "default backward"}

    drawn = sorted(path.parent.glob("*.png"))
    assert [picture.stem for picture in drawn] == [
        "custom-float32-deterministic",
        "custom-float32-forward",
        "custom-memory-float32-d8-b1-h2",
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in drawn)
    printed = capsys.readouterr().out
    for part in ("TFLOP/s", "MiB", "geometric means", "causal over full", "written"):
        assert part in printed

    drawn[0].unlink()
    assert attention.main(["--pictures-only", str(path)]) == 0
    assert drawn[0].exists()


def test_peer_that_fails_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("too large\nby far")

    monkeypatch.setattr(peers.Specification, "forward", fail)
    status, figures, _ = run(tmp_path, "--directions", "forward", "--masks", "full")
    assert status == 0
    for cell in figures["cells"]:
        assert cell["results"]["dense_attention"] == {"failed": "MemoryError: too large"}
        assert cell["results"]["flash_cupy"]["ms"] > 0
        assert cell["ratios"] == {}
    printed = capsys.readouterr().out
    assert "no memory" in printed
    assert "dense_attention failed in 2 of 2 cells: MemoryError: too large" in printed


def test_peer_that_fails_when_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "alternate", lambda *args: 1 / 0)
    status, figures, _ = run(tmp_path, "--directions", "forward", "--masks", "full")
    assert status == 1
    result = figures["cells"][0]["results"]["flash_cupy"]
    assert result["failed"] == "ZeroDivisionError: division by zero"
    assert result["errors"]["o"]["max"] < 1e-5


def test_memory_is_given_back_before_the_inputs_of_each_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyTorch keeps of the last cell, CuPy could not have for the arrays of the next one."""
    order: list[str] = []
    inputs = attention.random_inputs
    monkeypatch.setattr(attention, "release", lambda present: order.append(f"{len(present)}"))
    monkeypatch.setattr(
        attention, "random_inputs", lambda *args: order.append("inputs") or inputs(*args)
    )
    run(tmp_path, "--directions", "forward", "--masks", "full")
    everyone = f"{len(peers.competitors(np))}"
    starts = [place for place, what in enumerate(order) if what == "inputs"]
    assert len(starts) == 2
    assert all(order[place - 1] == everyone for place in starts)


def test_chosen_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--directions", "forward", "--masks", "full")
    _, figures, _ = run(tmp_path, *options, "--peers")
    assert {name for cell in figures["cells"] for name in cell["results"]} == {"flash_cupy"}
    _, figures, _ = run(tmp_path, *options, "--peers", "dense_attention")
    assert all("dense_attention" in cell["results"] for cell in figures["cells"])
    with pytest.raises(SystemExit, match="2"):
        attention.main(["--device", "cpu", "--peers", "torch lightning"])
    message = "--peers: torch lightning: not one of those on this machine, flash_cupy, default"
    assert message in capsys.readouterr().err


def test_program_with_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variant = "--masks causal --kv-heads 1 --window 9 --head-dim-v 4 --inputs outliers"
    status, figures, path = run(tmp_path, *variant.split())
    assert status == 0
    for cell in figures["cells"]:
        axes = {name: cell[name] for name in VARIANTS}
        assert axes == {"kv_heads": 1, "window": 9, "head_dim_v": 4, "inputs": "outliers"}
        assert set(cell["results"]) == {"flash_cupy", "dense_attention"}
    assert "Hkv1 W9 Dv4 outliers" in capsys.readouterr().out
    assert (path.parent / "custom-float32-forward-hkv1-w9-dv4-outliers.png").exists()
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--window", "9")
    assert "window: got 9 and mask full" in capsys.readouterr().err


def test_presets_name_peers_that_there_are() -> None:
    names = {name for preset in PRESETS.values() for name in preset.peers or ()}
    assert names <= set(pictures.COLOURS)
    assert PRESETS["peers"].peers == (
        "torch cuDNN",
        "torch flash",
        "flash-attn-4",
        "flash_cupy portable",
    )


def test_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(PRESETS["memory"], grids=PRESETS["cpu"].grids)  # has no peer named 'dense'
    monkeypatch.setitem(PRESETS, "memory", preset)
    status, figures, path = run(tmp_path, "--preset", "memory", "--directions", "both")
    assert status == 0
    for cell in figures["cells"]:
        assert set(cell["results"]) == {"flash_cupy"}
        assert set(cell["results"]["flash_cupy"]) == {"peak_bytes", "errors"}
    assert [picture.stem for picture in path.parent.glob("*.png")] == [
        "custom-memory-float32-d8-b1-h2"
    ]


def test_picture_marks_where_memory_ran_out(tmp_path: Path) -> None:
    records = [
        record(replace(CELL, seqlen=n), {"flash_cupy": 1.0, "dense": failed})
        for n, failed in ((64, 2.0), (128, "OutOfMemoryError: 1 GiB"), (256, "RuntimeError: no"))
    ]
    header = {"device": "a card", "memory_bytes": 2**30}
    ((_, figure),) = pictures._memory(header, records)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    marks = lines["dense: out of memory"]
    np.testing.assert_array_equal(marks.get_xydata(), [[128, 1]])
    np.testing.assert_array_equal(lines["dense"].get_xdata(), [64])


def test_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "why_no_gpu", lambda: "there is none")
    assert machine.array_module(None) is np
    with pytest.raises(SystemExit, match="2"):
        attention.main(["--device", "gpu"])
    assert "--device gpu: there is none" in capsys.readouterr().err


def test_slug() -> None:
    assert machine.slug("NVIDIA H200 (80 GB)") == "nvidia-h200-80-gb"


# --------------------------------------------------------------------------------------- overheads


def test_launches_are_repeated_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """By CuPy's kernels with plain bytes, and as they are prepared."""
    made: list[Any] = []
    kernels = [partial(made.append, n) for n in range(2)]

    def fake_kernel(grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
        made.append((grid, block, [(x.dtype.kind, x.nbytes) for x in args], shared_mem))

    plan = SimpleNamespace(threads=64, shared_bytes=5)
    launch = SimpleNamespace(kernel=fake_kernel, blocks=3, plan=plan)
    params = np.zeros(1, ATTENTION_PARAMS)

    def prepare(work: Any, stream: int, *addresses: int) -> tuple[Any, ...]:
        return tuple(PreparedNote(kernel, (params,)) for kernel in kernels)

    monkeypatch.setattr(overheads.launching, "prepare", prepare)

    def call() -> None:
        work = SimpleNamespace(launches=(launch, launch))
        for ready in overheads.launching.prepare(work, 0):
            ready()

    by_cupy, prepared = overheads.launches_of(call)
    assert made == [0, 1]
    overheads.one_by_one(by_cupy)()
    assert made[2:] == [((3,), (64,), [("V", params.nbytes)], 5)] * 2
    overheads.one_by_one(prepared)()
    assert made[4:] == [0, 1]
    call()
    assert len(by_cupy) == len(prepared) == 2  # no longer noted


class PreparedNote(NamedTuple):
    """What a `PreparedLaunch` is to those who repeat it."""

    launch: Callable[[], None]
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        self.launch()


def test_loads_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "load", lambda self, kernel, plan: kernel)
    load = Gpu.load
    with overheads.timed_loads() as seconds:
        for kernel in ("row_dots", "store_dq"):
            Gpu().load(kernel, None)
    assert list(seconds) == ["row_dots", "store_dq"] and min(seconds.values()) >= 0
    assert Gpu.load is load


def test_microseconds_are_medians_of_loops_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overheads, "CALLS", 4)
    monkeypatch.setattr(overheads, "LOOPS", 3)
    clock, steps, order = [0.0], iter([1, 2, 9, 2, 1, 2]), []

    def tick(name: str) -> None:
        if not order or order[-1] != name:
            order.append(name)
            clock.append(clock[-1] + 1e-6 * 4 * next(steps))

    monkeypatch.setattr(overheads.time, "perf_counter", lambda: clock[-1])
    calls = {name: partial(tick, name) for name in ("a", "b")}
    times = overheads.microseconds(calls, lambda: None)
    assert order == ["a", "b"] * 3
    assert times == {"a": pytest.approx(1), "b": pytest.approx(2)}


def test_first_calls_are_compiled_and_then_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two processes that share a cache on disk, which is empty at first and gone at last."""
    caches: list[Path] = []

    def elsewhere(cache: Path, xp: Any) -> list[dict[str, Any]]:
        assert list(cache.iterdir()) == [cache / "kernel"] * len(caches)
        (cache / "kernel").touch()
        caches.append(cache)
        row = {"dtype": "float16", "head_dim": 64, "causal": True, "pass": "forward"}
        return [{**row, "seconds": 2.0 / len(caches), "kernels": {"k": 1.0 / len(caches)}}]

    monkeypatch.setattr(overheads, "first_calls_elsewhere", elsewhere)
    (row,) = overheads.compiled_and_cached(np)
    assert row["compiled"] == {"seconds": 2.0, "kernels": {"k": 1.0}}
    assert row["cached"] == {"seconds": 1.0, "kernels": {"k": 0.5}}
    assert caches[0] == caches[1] and not caches[0].exists()
    printed = overheads.overheads_table({"first_calls": [row], "calls": []})
    assert "float16  64  causal  forward" in printed and "2.000" in printed


def test_overheads_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU there are no kernels; the rest is the same, processes included."""
    monkeypatch.setattr(overheads, "CALLS", 1)
    monkeypatch.setattr(overheads, "LOOPS", 1)
    program = ["--preset", "overheads", "--device", "cpu", "--out", str(tmp_path)]
    assert attention.main(program) == 0
    (path,) = tmp_path.glob("*/overheads.json")
    figures = json.loads(path.read_text())
    assert set(figures) == {"header", "calls", "first_calls"}
    assert [row["pass"] for row in figures["calls"]] == ["forward", "backward", "deterministic"]
    for row in figures["calls"]:
        assert row["over"] == pytest.approx(row["call"] - row["launches"])
    assert len(figures["first_calls"]) == 3 * len(overheads.FIRST_CALLS)
    assert all(row["compiled"]["seconds"] > 0 for row in figures["first_calls"])
    printed = capsys.readouterr().out
    assert "First calls" in printed and "CPU time of later calls" in printed
