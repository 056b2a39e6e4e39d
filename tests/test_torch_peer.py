"""The PyTorch peer trains the very same model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from costs import flash_vjp
from optimizer import Schedule
from torch_peer import TorchTrainer
from trainer import Trainer, losses_of
from workloads import WORKLOADS, stacked

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("peer", ["torch", "torch dense"])
@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        ("text", {}),
        ("masked text", {"causal": False, "vocabulary": 264}),
        ("listops", {"causal": False, "classes": 16}),
    ],
)
def test_equal_losses(task: str, sizes: dict[str, Any], peer: str) -> None:
    workload = replace(
        WORKLOADS["tiny"], task=task, model=replace(WORKLOADS["tiny"].model, **sizes)
    )
    steps = 6
    data = stacked(workload.batches(64, 4), steps)
    schedule = Schedule(3e-3, steps, warmup=1)
    ours = Trainer(workload.at(64), partial(flash_vjp, device="cpu"), data, schedule, np)
    theirs = TorchTrainer(torch, peer, workload.at(64), data, schedule, device="cpu")
    for _ in range(steps):
        ours.step()
        theirs.step()
    np.testing.assert_allclose(theirs.losses.tolist(), losses_of(ours), atol=1e-2)
