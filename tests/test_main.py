"""``python -m flash_cupy``: what it prints, and that a wrong engine makes it fail."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest
from strategies import FLOAT32, FLOAT64

from flash_cupy import __main__ as main
from flash_cupy import arrays, tiled


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "SEQLEN", 64)


def test_all_checks_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main() == 0
    printed = capsys.readouterr().out
    assert "flash_cupy" in printed and "GPU: " in printed and "engines: cpu" in printed
    assert printed.count("  ok") == len(main.OPTIONS) * 4 * (
        2 if "engines: cpu, gpu" in printed else 1
    )
    assert "all checks passed" in printed


@pytest.mark.parametrize("wrong", [1e-4, np.nan])
def test_a_wrong_result_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    forward = tiled.forward

    def slightly_wrong(problem, q, k, v, alibi_slopes, o, lse):
        forward(problem, q, k, v, alibi_slopes, o, lse)
        o[..., 0, 0] += wrong

    monkeypatch.setattr(tiled, "forward", slightly_wrong)
    assert main.main() == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "checks FAILED" in printed


@pytest.mark.parametrize("wrong, status", [(0, 0), (1, 1)])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, wrong: float, status: int) -> None:
    backward = tiled.backward

    def perhaps_wrong(problem, *args):
        backward(problem, *args)
        dk = args[-3]
        dk[..., 0, 0] += wrong

    monkeypatch.setattr(tiled, "backward", perhaps_wrong)
    monkeypatch.setattr(arrays, "dtypes", lambda: frozenset([FLOAT32, FLOAT64]))
    monkeypatch.delitem(sys.modules, "flash_cupy.__main__")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("flash_cupy", run_name="__main__")
    assert exit.value.code == status
