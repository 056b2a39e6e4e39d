"""AdamW on one flat vector of parameters, and its learning rate: warm-up, then a cosine to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformer import Array, array_module


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

    Everything is in place, on whole vectors: a step costs no memory beyond one scratch vector.

    Parameters
    ----------
    value, grad
        Flat vectors of all parameters and of their gradients; `value` changes in place.
    decayed
        How many parameters, from the first, the decay pulls towards zero.
    clip
        The gradient is scaled down to this Euclidean norm where it is longer.
    """

    def __init__(
        self,
        value: Array,
        grad: Array,
        decayed: int,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        epsilon: float = 1e-8,
        decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.xp = array_module(value)
        self.value, self.grad, self.decayed = value, grad, decayed
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.decay, self.clip = decay, clip
        self.mean = self.xp.zeros_like(value)
        self.square = self.xp.zeros_like(value)
        self.scratch = self.xp.empty_like(value)
        self.steps = 0

    def step(self, learning_rate: float) -> None:
        """Move `value` against `grad`, which is zero afterwards, ready for the next backprop."""
        xp, value, grad, scratch = self.xp, self.value, self.grad, self.scratch
        self.steps += 1

        # The norm stays an array: on a GPU the step never waits for the device.
        grad *= xp.minimum(1.0, self.clip / xp.sqrt(grad @ grad + self.epsilon**2))

        # mean ← β₁·mean + (1 − β₁)·grad, square ← β₂·square + (1 − β₂)·grad²
        self.mean *= self.beta1
        self.mean += xp.multiply(grad, 1 - self.beta1, out=scratch)
        self.square *= self.beta2
        grad *= grad
        self.square += xp.multiply(grad, 1 - self.beta2, out=scratch)

        # value ← value − rate·(mean/(1 − β₁ᵗ) / (√(square/(1 − β₂ᵗ)) + ε) + decay·value)
        xp.sqrt(self.square, out=scratch)
        scratch *= 1 / math.sqrt(1 - self.beta2**self.steps)
        scratch += self.epsilon
        xp.divide(self.mean, scratch, out=scratch)
        scratch *= learning_rate / (1 - self.beta1**self.steps)
        value[: self.decayed] *= 1 - learning_rate * self.decay
        value -= scratch
        grad.fill(0)
