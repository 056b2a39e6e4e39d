"""AdamW on one flat vector of parameters, and its learning rate: warm-up, then a cosine to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from transformer import Array, array_module, operations


@dataclass(frozen=True)
class Schedule:
    """Learning rate over `steps` steps: a straight line up to `peak`, then half a cosine to 0."""

    peak: float
    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        """Learning rate of step 0, 1, ..., steps − 1; none of them is zero."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) and clipped gradients.

    Parameters
    ----------
    value, grad
        Flat vectors of all parameters and of their gradients; `value` changes in place.
    decayed
        How many parameters, from the first, the decay pulls towards zero.
    work
        Copy of `value`, perhaps in another dtype, that is to follow it.
    clip
        The gradient is scaled down to this Euclidean norm where it is longer.
    """

    def __init__(
        self,
        value: Array,
        grad: Array,
        decayed: int,
        work: Array | None = None,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.xp = array_module(value)
        self.value, self.grad = value, grad
        self.work = value if work is None else work
        self.beta1, self.beta2 = beta1, beta2
        self.mean = self.xp.zeros_like(value)
        self.square = self.xp.zeros_like(value)
        self.steps = 0
        self.adamw = operations(self.xp).adamw
        self._options = {
            "decayed": decayed,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "decay": decay,
            "clip": clip,
        }

    def constants(self, step: int, learning_rate: float) -> np.ndarray:
        """Return the numbers that change from step to step, for the step 0, 1, ..."""
        t = step + 1
        corrections = 1 / (1 - self.beta1**t), 1 / (1 - self.beta2**t)
        return np.array([learning_rate, *corrections], self.value.dtype)

    def step(self, learning_rate: float) -> None:
        """Move `value` against `grad`, which is zero afterwards, ready for the next gradients."""
        self.apply(self.xp.asarray(self.constants(self.steps, learning_rate)))
        self.steps += 1

    def apply(self, constants: Array) -> None:
        """Do a step whose constants are an array on the device: such a step can be recorded."""
        self.adamw(
            self.value, self.grad, self.mean, self.square, self.work, constants, **self._options
        )
