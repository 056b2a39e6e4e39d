"""The table and the picture of peak memory over length."""

from __future__ import annotations

from pathlib import Path

import memory

RECORDS = [
    {"seqlen": n, "attention": name, "pass": direction, "peak_bytes": n * factor << 10}
    for n in (512, 1024)
    for name, factor in (("dense", 50), ("flash", 2))
    for direction in memory.PASSES
]
FAILED = {"seqlen": 1024, "attention": "dense", "pass": memory.PASSES[1], "failed": "MemoryError"}


def test_table_and_picture(tmp_path: Path) -> None:
    records = [*RECORDS, *({**r, "seqlen": 2048} for r in RECORDS[-2:]), {**FAILED, "seqlen": 2048}]
    header, first, _, last = memory.table(records).splitlines()
    assert header.split()[0] == "N"
    assert first.split() == ["512", "25.0", "1.0", "25.0×", "25.0", "1.0", "25.0×"]
    assert last.split() == ["2048", "-", "2.0", "-", "-", "2.0", "-"]
    figures = {"header": {"device": "a GPU", "memory_bytes": 1 << 37}, "heads": 1, "head_dim": 64}
    path = memory.save_picture(tmp_path / "peaks.json", figures | {"records": records})
    assert path.stat().st_size > 10_000
