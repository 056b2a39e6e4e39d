"""A transformer with its own backward pass, written once for NumPy and CuPy arrays.

Every piece is a function from its input to `(output, backprop)`. `backprop` takes the gradient of
the output, adds those of the piece's parameters to their `grad`, returns that of the input, and is
called at most once. What the backward pass needs is kept in the closure, so nothing else does the
bookkeeping: composing the pieces forwards composes their gradients backwards.

Shapes: B sequences of N tokens, T = B·N tokens in all, width W, H heads of D = W/H features.
Between the pieces an activation is (T, W): one token a row, so each linear map is one product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Array = Any
"""A NumPy or a CuPy array."""

Backprop = Callable[[Array], Array]
Piece = Callable[[Array, "Parameters", str], tuple[Array, Backprop]]
"""A part of the model that looks its parameters up under its name."""
Attend = Callable[..., tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]]
"""Attention as `flash_cupy.attention_vjp` does it: `attend(q, k, v, **options)`."""


@dataclass(frozen=True)
class Config:
    """Sizes of a transformer; the defaults learn in a minute on two CPU cores.

    `alibi` tells the attention where tokens are by a penalty on distance (Press et al., 2022); a
    small model learns from it much sooner than from a learned vector a position, the alternative.
    """

    vocabulary: int = 256
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    causal: bool = True
    alibi: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(slots=True)
class Parameter:
    """An array that is learned and the sum of its gradients since they were last cleared."""

    value: Array
    grad: Array


class Parameters:
    """All parameters by name, in one flat vector, with their gradients in a second one.

    An optimizer sees two vectors, a piece of the model sees named views of them. Matrices come
    first: the first `matrix_size` elements are those that weight decay is for.
    """

    def __init__(self, initial: dict[str, np.ndarray], xp: Any) -> None:
        ordered = dict(sorted(initial.items(), key=lambda item: item[1].ndim < 2))
        self.value = xp.asarray(np.concatenate([array.ravel() for array in ordered.values()]))
        self.grad = xp.zeros_like(self.value)
        self.matrix_size = sum(array.size for array in ordered.values() if array.ndim >= 2)
        self.named: dict[str, Parameter] = {}
        start = 0
        for name, array in ordered.items():
            part = slice(start, start := start + array.size)
            self.named[name] = Parameter(
                self.value[part].reshape(array.shape), self.grad[part].reshape(array.shape)
            )

    def __getitem__(self, name: str) -> Parameter:
        return self.named[name]

    def affine(self, name: str) -> tuple[Parameter, Parameter]:
        """Weight and bias of the piece `name`."""
        return self.named[f"{name}.weight"], self.named[f"{name}.bias"]


def initial_parameters(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Draw normal weights of deviation 0.02, zero biases and unit gains, as GPT-2 starts.

    The maps whose output is added to the residual stream start smaller, by 1/√(number of them), so
    that the stream's variance does not grow with depth. The token table starts at 1/√W: it is the
    output too, and its logits have variance one (all but that of the token itself).
    """
    rng = np.random.default_rng(seed)
    width, dtype = config.width, np.dtype(config.dtype)
    arrays: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, scale: float = 0.02) -> None:
        arrays[name] = (scale * rng.standard_normal(shape)).astype(dtype)

    def linear_map(name: str, inputs: int, outputs: int, scale: float = 0.02) -> None:
        normal(f"{name}.weight", inputs, outputs, scale=scale)
        arrays[f"{name}.bias"] = np.zeros(outputs, dtype)

    def norm(name: str) -> None:
        arrays[f"{name}.weight"] = np.ones(width, dtype)
        arrays[f"{name}.bias"] = np.zeros(width, dtype)

    into_stream = 0.02 / math.sqrt(2 * config.layers)
    normal("token", config.vocabulary, width, scale=1 / math.sqrt(width))
    if not config.alibi:
        normal("position", config.context, width)
    for layer in range(config.layers):
        norm(f"{layer}.attention.norm")
        linear_map(f"{layer}.attention.qkv", width, 3 * width)
        linear_map(f"{layer}.attention.out", width, width, into_stream)
        norm(f"{layer}.mlp.norm")
        linear_map(f"{layer}.mlp.up", width, 4 * width)
        linear_map(f"{layer}.mlp.down", 4 * width, width, into_stream)
    norm("norm")
    return arrays


# ------------------------------------------------------------------------------------- the pieces


def array_module(array: Array) -> Any:
    """`numpy` for a NumPy array, `cupy` for a CuPy array."""
    return sys.modules[type(array).__module__]


def linear(x: Array, weight: Parameter, bias: Parameter) -> tuple[Array, Backprop]:
    """`y = x @ weight + bias`: x (T, I), weight (I, O), bias (O,), y (T, O)."""
    y = x @ weight.value
    y += bias.value

    def backprop(dy: Array) -> Array:
        weight.grad += x.T @ dy
        bias.grad += dy.sum(axis=0)
        return dy @ weight.value.T

    return y, backprop


def layer_norm(
    x: Array, weight: Parameter, bias: Parameter, epsilon: float = 1e-5
) -> tuple[Array, Backprop]:
    """Normalise every row of x (T, W) to mean 0 and variance 1, then scale and shift it."""
    xp, width = array_module(x), x.shape[1]
    normal = x - x.mean(axis=1, keepdims=True)
    variance = xp.einsum("tw,tw->t", normal, normal)[:, None] / width
    inverse = 1 / xp.sqrt(variance + epsilon)  # (T, 1)
    normal *= inverse
    y = normal * weight.value
    y += bias.value

    def backprop(dy: Array) -> Array:
        weight.grad += xp.einsum("tw,tw->w", dy, normal)
        bias.grad += dy.sum(axis=0)
        # A row's gradient loses its mean and its part along the row: both were normalised away.
        dx = dy * weight.value
        along = xp.einsum("tw,tw->t", dx, normal)[:, None] / width
        dx -= dx.mean(axis=1, keepdims=True)
        dx -= normal * along
        dx *= inverse
        return dx

    return y, backprop


_GELU_A = math.sqrt(2 / math.pi)
_GELU_B = 0.044715 * _GELU_A


def gelu(x: Array) -> tuple[Array, Backprop]:
    """`y = x/2·(1 + tanh u)`, `u = a·x + b·x³`: GELU by its usual approximation with tanh."""
    xp = array_module(x)
    half = x * x
    half *= _GELU_B
    half += _GELU_A
    half *= x
    xp.tanh(half, out=half)
    half *= 0.5
    half += 0.5  # (1 + tanh u)/2, all that the backward pass needs beside x
    y = half * x

    def backprop(dy: Array) -> Array:
        # With h = (1 + tanh u)/2:  y' = h + x·h',  h' = 2·h·(1 − h)·u',  u' = a + 3b·x²
        slope = x * x
        slope *= 6 * _GELU_B
        slope += 2 * _GELU_A
        slope *= x
        slope *= 1 - half
        slope += 1
        slope *= half
        slope *= dy
        return slope

    return y, backprop


def embedding(tokens: Array, table: Parameter) -> tuple[Array, Backprop]:
    """Each token's row of the table (V, W): tokens (T,) → (T, W)."""
    xp = array_module(tokens)

    def backprop(dx: Array) -> None:
        xp.add.at(table.grad, tokens, dx)  # tokens have no gradient

    return table.value[tokens], backprop


def add_positions(x: Array, table: Parameter, context: int) -> tuple[Array, Backprop]:
    """Add row i of the table (≥ N, W) to token i of every sequence: x (T, W)."""
    sequences = (-1, context, x.shape[1])
    y = (x.reshape(sequences) + table.value[:context]).reshape(x.shape)

    def backprop(dy: Array) -> Array:
        table.grad[:context] += dy.reshape(sequences).sum(axis=0)
        return dy

    return y, backprop


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the heads' penalties on distance: 2^(−8/H), 2^(−16/H), ..., 2^(−8)."""
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)


def attention(
    x: Array, parameters: Parameters, name: str, *, heads: int, context: int, attend: Attend
) -> tuple[Array, Backprop]:
    """Multi-head self-attention over sequences of `context` tokens: (T, W) → (T, W)."""
    xp = array_module(x)
    by_head = (-1, context, heads, x.shape[1] // heads)  # (B, N, H, D)
    qkv, back_qkv = linear(x, *parameters.affine(f"{name}.qkv"))

    # (T, 3W) holds q, k and v of a token side by side; `attend` reads each in place, through its
    # strides, as (B, H, N, D).
    q, k, v = (part.reshape(by_head).swapaxes(1, 2) for part in xp.split(qkv, 3, axis=1))
    o, back_attend = attend(q, k, v)
    y, back_out = linear(o.swapaxes(1, 2).reshape(x.shape), *parameters.affine(f"{name}.out"))

    def backprop(dy: Array) -> Array:
        do = back_out(dy).reshape(by_head).swapaxes(1, 2)
        dqkv = [part.swapaxes(1, 2).reshape(x.shape) for part in back_attend(do)]
        return back_qkv(xp.concatenate(dqkv, axis=1))

    return y, backprop


def mlp(x: Array, parameters: Parameters, name: str) -> tuple[Array, Backprop]:
    """Two linear maps with GELU between them: (T, W) → (T, 4W) → (T, W)."""
    wide, back_up = linear(x, *parameters.affine(f"{name}.up"))
    active, back_gelu = gelu(wide)
    y, back_down = linear(active, *parameters.affine(f"{name}.down"))
    return y, lambda dy: back_up(back_gelu(back_down(dy)))


def residual(x: Array, parameters: Parameters, name: str, piece: Piece) -> tuple[Array, Backprop]:
    """`x + piece(layer_norm(x))`, the pre-norm residual connection."""
    normal, back_norm = layer_norm(x, *parameters.affine(f"{name}.norm"))
    y, back_piece = piece(normal, parameters, name)
    y += x

    def backprop(dy: Array) -> Array:
        dx = back_norm(back_piece(dy))
        dx += dy
        return dx

    return y, backprop


def cross_entropy(x: Array, table: Parameter, targets: Array) -> tuple[Array, Backprop]:
    """Mean of `−log softmax(x @ table.T)[target]` in nats: x (T, W), table (V, W), targets (T,).

    `table` is the token embedding: input and output of the model are tied.
    """
    xp, rows = array_module(x), len(x)
    logits = x @ table.value.T
    logits -= logits.max(axis=1, keepdims=True)
    at_target = (xp.arange(rows), targets)
    chosen = logits[at_target]
    p = xp.exp(logits, out=logits)
    total = p.sum(axis=1, keepdims=True)
    p /= total
    loss = (xp.log(total[:, 0]) - chosen).mean()

    def backprop(dloss: Array) -> Array:
        dlogits = p
        dlogits[at_target] -= 1
        dlogits *= dloss / rows
        table.grad += dlogits.T @ x
        return dlogits @ table.value

    return loss, backprop


# -------------------------------------------------------------------------------------- the model


class Transformer:
    """Pre-norm transformer with a tied output, built as GPT-2 is.

    Parameters
    ----------
    config
        Sizes.
    attend
        The attention, called as `attend(q, k, v, causal=..., alibi_slopes=...)`; see
        `flash_cupy.attention_vjp`.
    xp
        `numpy` or `cupy`: where the parameters are, and so all the work.
    seed
        Of the initial parameters; equal for both array modules.
    """

    def __init__(self, config: Config, attend: Attend, xp: Any = np, seed: int = 0) -> None:
        self.config, self.xp = config, xp
        self.parameters = Parameters(initial_parameters(config, seed), xp)
        slopes = xp.asarray(alibi_slopes(config.heads), config.dtype) if config.alibi else None
        self.attend = partial(attend, causal=config.causal, alibi_slopes=slopes)

    def hidden(self, tokens: Array) -> tuple[Array, Backprop]:
        """Last hidden layer: tokens (B, N) → (T, W)."""
        parameters, config, context = self.parameters, self.config, tokens.shape[1]
        if context > config.context:
            raise ValueError(f"{context} tokens a sequence: the model takes {config.context}")

        x, back = embedding(tokens.ravel(), parameters["token"])
        backs = [back]
        if not config.alibi:
            x, back = add_positions(x, parameters["position"], context)
            backs.append(back)
        pieces: dict[str, Piece] = {
            "attention": partial(
                attention, heads=config.heads, context=context, attend=self.attend
            ),
            "mlp": mlp,
        }
        for layer in range(config.layers):
            for name, piece in pieces.items():
                x, back = residual(x, parameters, f"{layer}.{name}", piece)
                backs.append(back)
        x, back = layer_norm(x, *parameters.affine("norm"))
        backs.append(back)

        def backprop(dx: Array) -> None:
            while backs:  # a piece's activations are freed as soon as it is done
                dx = backs.pop()(dx)

        return x, backprop

    def loss(self, tokens: Array, targets: Array) -> tuple[Array, Callable[[], None]]:
        """Mean loss in nats a token; `backprop()` adds the gradients of all parameters."""
        x, back_hidden = self.hidden(tokens)
        loss, back_loss = cross_entropy(x, self.parameters["token"], targets.ravel())
        return loss, lambda: back_hidden(back_loss(1.0))

    def next_logits(self, tokens: Array) -> Array:
        """Scores (B, V) of the token that follows tokens (B, N)."""
        x, _ = self.hidden(tokens)
        last = x.reshape(*tokens.shape, -1)[:, -1]
        return last @ self.parameters["token"].value.T
