"""Predicted traffic against a count of every access; the reading of Nsight Compute's output."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import traffic
from cells import Cell
from traffic_pictures import save_picture

CELL = Cell(2, 3, 64, 16, "full", "bfloat16", "forward")
PRINTED = """==PROF== Connected to process 7
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","lts__t_bytes.sum"
"","","byte","byte","byte"
"0","traffic_marker","64","0","64"
"1","softmax","1,000","500","3000"
"2","gemm","10","5","30"
"3","traffic_marker","64","0","64"
"4","attention_forward","7","8","9"
==WARNING== something else
"""


def loads(tile_q: int, tile_k: int) -> int:
    """Bytes of the tiled forward pass of a head, by walking its tiles as the kernel does."""
    total = 0
    for _ in range(0, CELL.seqlen, tile_q):
        total += 2 * tile_q * CELL.head_dim * 2 + 4 * tile_q  # Q, O, L
        for _ in range(0, CELL.seqlen, tile_k):
            total += 2 * tile_k * CELL.head_dim * 2  # K, V
    return total


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_tiled_forward(tile: int) -> None:
    found = traffic.predicted(CELL, tile)
    assert found["tiled"] == 6 * loads(tile, 16)
    assert found["least"] == 6 * loads(64, 64)


def test_tiled_backward_reads_queries_once_a_tile_of_keys() -> None:
    cell, nd, n = replace(CELL, direction="backward"), 64 * 16, 64
    one, four = (traffic.predicted(cell, tile)["tiled"] / 6 for tile in (64, 16))
    assert four - one == 3 * (2 * nd * 2 + nd * 4 + 2 * n * 4)


def test_dense_traffic_grows_with_the_square_and_does_not_depend_on_tiles() -> None:
    for direction, squares, linear in (("forward", 4, 4), ("backward", 7, 8)):
        cell = replace(CELL, direction=direction)
        expected = 6 * 2 * (squares * 64**2 + linear * 64 * 16)
        assert traffic.predicted(cell, 16)["dense"] == expected
        assert traffic.predicted(cell, None)["dense"] == expected


def test_operations_of_the_tiled_passes_are_those_of_the_benchmark() -> None:
    for direction in traffic.DIRECTIONS:
        cell = replace(CELL, direction=direction)
        assert traffic.operations("flash", cell) == cell.flops
    assert traffic.operations("dense", replace(CELL, direction="backward")) == 2 * CELL.flops


def test_counts_are_summed_from_marker_to_marker() -> None:
    first, second = traffic.read_counts(PRINTED)
    assert first == {"dram_read": 1010, "dram_written": 505, "l2": 3030, "kernels": 2}
    assert second == {"dram_read": 7, "dram_written": 8, "l2": 9, "kernels": 1}
    assert traffic.read_counts("==ERROR== no permission\n") == []


@pytest.mark.parametrize("found", ["n/a", "(!) nan"])
def test_counts_that_cannot_be_read_are_no_counts(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\ncat <<END\n{PRINTED.replace('500', found)}END\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="cannot be read"):
        traffic.counted([("dense", CELL)], tmp_path / "passes")
    ncu.write_text(f"#!/bin/sh\ncat <<END\n{PRINTED}END\n")
    assert traffic.counted([("dense", CELL)] * 2, tmp_path / "passes")[1]["l2"] == 9


def record(cell: Cell) -> dict:
    result = {"ms": 1.0, "gflop": 2.0, "dram_read": 1e9, "dram_written": 5e8, "l2": 3e9}
    fields = {key: getattr(cell, key) for key in ("batch", "heads", "seqlen", "head_dim")}
    return {
        **fields,
        "direction": cell.direction,
        "results": {name: dict(result) for name in traffic.ATTENTIONS},
        "predicted": traffic.predicted(cell, 128),
    }


def test_table_picture_and_the_papers_setting(tmp_path: Path) -> None:
    options = {"tokens": 4096, "heads": 2, "seqlens": [512, 1024], "head_dims": [64]}
    cells = traffic.cells_of(argparse.Namespace(**options))
    assert [cell.batch for cell in cells] == [8, 8, 4, 4, 64, 64]
    figures = {"header": {"device": "a GPU"}, "records": [record(cell) for cell in cells]}
    path = tmp_path / "traffic.json"
    traffic.save(path, figures)
    dense, flash = json.loads(path.read_text())["paper"]
    assert dense["ms"] == flash["ms"] == 2.0
    assert dense["gigabytes"] == pytest.approx(3.0)
    assert dense["paper"]["gigabytes"] == 40.3
    assert flash["predicted_gigabytes"] < 0.1 * dense["predicted_gigabytes"]
    assert "backward" in traffic.table(figures["records"])
    assert save_picture(path, figures).stat().st_size > 10_000


def test_without_nsight_compute_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="ncu"):
        traffic.counted([("dense", CELL)], tmp_path / "passes")
