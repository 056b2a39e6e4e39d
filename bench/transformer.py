"""A transformer with its own backward pass, written once for NumPy and CuPy arrays.

The model is put together here; the arithmetic is in `ops_numpy` and, with the same functions, as
fused kernels in `ops_cupy`. Every piece is a function from its input to `(output, backprop)`.
`backprop` takes the gradient of the output, adds those of the piece's parameters to their `grad`
and returns that of the input. What the backward pass needs is kept in the closure, so nothing else
does the bookkeeping.

A layer is two blocks, attention and MLP, each around the stream x: ``x + piece(norm(x)) + bias``.
Adding a block's result to the stream and normalising the sum for the next block are one operation,
`add_norm`: on a GPU it is one pass over memory instead of three.

Shapes: B sequences of N tokens, T = B·N tokens in all, width W, H heads of D = W/H features.
Between the pieces an activation is (T, W): one token a row, so each linear map is one product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import numpy as np

Array = Any
"""A NumPy or a CuPy array."""

Backprop = Callable[[Array], Array]
Piece = Callable[..., tuple[Array, Backprop]]
Attend = Callable[..., tuple[Array, Callable[..., Any]]]
"""Attention: `attend(q, k, v, out=o, **options)` gives o and `backprop(do, out=(dq, dk, dv))`."""


@dataclass(frozen=True)
class Config:
    """Sizes of a transformer; the defaults learn in a minute on two CPU cores.

    `alibi` tells the attention where tokens are by a penalty on distance (Press et al., 2022); a
    small model learns from it much sooner than from a learned vector a position, the alternative.
    The output is the token table, or a table of its own where `classes` are to be told apart.
    With `mixed` precision activations and the operands of products are bfloat16; parameters,
    their gradients and all sums stay in `dtype`.
    """

    vocabulary: int = 256
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    causal: bool = True
    alibi: bool = True
    classes: int = 0
    dtype: str = "float32"
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def output(self) -> str:
        """Name of the table whose product with the last hidden layer are the logits."""
        return "classes" if self.classes else "token"


@dataclass(slots=True)
class Parameter:
    """An array that is learned, the sum of its gradients, and its copy for matrix products."""

    value: Array
    grad: Array
    work: Array  # the value itself, or with mixed precision rounded to bfloat16


class Parameters:
    """All parameters by name, in one flat vector, with their gradients in a second one.

    An optimizer sees whole vectors, a piece of the model sees named views of them. Matrices come
    first: the first `matrix_size` elements are those that weight decay is for.
    """

    def __init__(self, initial: dict[str, np.ndarray], xp: Any, mixed: bool = False) -> None:
        ordered = dict(sorted(initial.items(), key=lambda item: item[1].ndim < 2))
        self.value = xp.asarray(np.concatenate([array.ravel() for array in ordered.values()]))
        self.grad = xp.zeros_like(self.value)
        self.work = self.value.astype(bfloat16()) if mixed else self.value
        self.matrix_size = sum(array.size for array in ordered.values() if array.ndim >= 2)
        self.named: dict[str, Parameter] = {}
        start = 0
        for name, array in ordered.items():
            part = slice(start, start := start + array.size)
            views = (x[part].reshape(array.shape) for x in (self.value, self.grad, self.work))
            self.named[name] = Parameter(*views)

    def __getitem__(self, name: str) -> Parameter:
        return self.named[name]

    def affine(self, name: str) -> tuple[Parameter, Parameter]:
        """Weight and bias of the piece `name`."""
        return self.named[f"{name}.weight"], self.named[f"{name}.bias"]


def bfloat16() -> np.dtype[Any]:
    """Return NumPy's dtype of that name, which the package ml_dtypes adds."""
    import ml_dtypes  # noqa: F401  gives NumPy the name of the dtype

    return np.dtype("bfloat16")


@lru_cache(maxsize=1)  # competitors start from the same; nobody changes these arrays
def initial_parameters(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Draw normal weights of deviation 0.02, zero biases and unit gains, as GPT-2 starts.

    The maps whose output is added to the residual stream start smaller, by 1/√(number of them), so
    that the stream's variance does not grow with depth. The token table starts at 1/√W: it is the
    output too, and its logits have variance one (all but that of the token itself).
    """
    rng = np.random.default_rng(seed)
    width, dtype = config.width, np.dtype(config.dtype)
    drawn = np.float32 if config.mixed else np.float64  # large models in half the time
    arrays: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, scale: float = 0.02) -> None:
        arrays[name] = (scale * rng.standard_normal(shape, drawn)).astype(dtype, copy=False)

    def linear_map(name: str, inputs: int, outputs: int, scale: float = 0.02) -> None:
        normal(f"{name}.weight", inputs, outputs, scale=scale)
        arrays[f"{name}.bias"] = np.zeros(outputs, dtype)

    def norm(name: str) -> None:
        arrays[f"{name}.weight"] = np.ones(width, dtype)
        arrays[f"{name}.bias"] = np.zeros(width, dtype)

    into_stream = 0.02 / math.sqrt(2 * config.layers)
    normal("token", config.vocabulary, width, scale=1 / math.sqrt(width))
    if config.classes:
        normal("classes", config.classes, width)
    if not config.alibi:
        normal("position", config.context, width)
    for layer in range(config.layers):
        norm(f"{layer}.attention.norm")
        linear_map(f"{layer}.attention.qkv", width, 3 * width)
        linear_map(f"{layer}.attention.out", width, width, into_stream)
        norm(f"{layer}.mlp.norm")
        linear_map(f"{layer}.mlp.up", width, 4 * width)
        linear_map(f"{layer}.mlp.out", 4 * width, width, into_stream)
    norm("norm")
    return arrays


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the heads' penalties on distance: 2^(−8/H), 2^(−16/H), ..., 2^(−8)."""
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)


def array_module(array: Array) -> Any:
    """`numpy` for a NumPy array, `cupy` for a CuPy array."""
    return sys.modules[type(array).__module__]


def operations(xp: Any) -> Any:
    """Return the module of the model's arithmetic on arrays of `xp`."""
    return import_module("ops_numpy" if xp is np else "ops_cupy")


# ------------------------------------------------------------------------------------- the pieces


def linear(
    ops: Any, x: Array, weight: Parameter, bias: Parameter | None = None
) -> tuple[Array, Backprop]:
    """`x @ weight (+ bias)`: x (T, I), weight (I, O), bias (O,)."""
    y = ops.linear(x, weight.work, None if bias is None else bias.value)

    def backprop(dy: Array) -> Array:
        bias_grad = None if bias is None else bias.grad
        return ops.linear_backward(dy, x, weight.work, weight.grad, bias_grad)

    return y, backprop


def attention(
    ops: Any,
    x: Array,
    parameters: Parameters,
    name: str,
    *,
    heads: int,
    context: int,
    attend: Attend,
) -> tuple[Array, Backprop]:
    """Multi-head self-attention over sequences of `context` tokens, but for the output's bias."""
    by_head = (-1, context, heads, x.shape[1] // heads)  # (B, N, H, D)

    def heads_of(part: Array) -> Array:  # (T, W), columns of a wider array or not, as (B, H, N, D)
        return part.reshape(by_head).swapaxes(1, 2)

    def parts(qkv: Array) -> tuple[Array, ...]:
        # (T, 3W) holds q, k and v of a token side by side; they are used in place.
        width = qkv.shape[1] // 3
        return tuple(heads_of(qkv[:, i * width : (i + 1) * width]) for i in range(3))

    qkv, back_qkv = linear(ops, x, *parameters.affine(f"{name}.qkv"))
    o = ops.empty_like(x)
    _, back_attend = attend(*parts(qkv), out=heads_of(o))
    y, back_out = linear(ops, o, parameters[f"{name}.out.weight"])

    def backprop(dy: Array) -> Array:
        do = heads_of(back_out(dy))
        dqkv = ops.empty_like(qkv)
        back_attend(do, out=parts(dqkv))
        return back_qkv(dqkv)

    return y, backprop


def mlp(ops: Any, x: Array, parameters: Parameters, name: str) -> tuple[Array, Backprop]:
    """Two linear maps with GELU between them, (T, W) → (T, 4W) → (T, W), but for the last bias."""
    weight, bias = parameters.affine(f"{name}.up")
    wide, back_up = linear(ops, x, weight)
    y, back_out = linear(ops, ops.bias_gelu(wide, bias.value), parameters[f"{name}.out.weight"])

    def backprop(dy: Array) -> Array:
        return back_up(ops.bias_gelu_backward(back_out(dy), wide, bias.value, bias.grad))

    return y, backprop


Update = tuple[Array, Parameter] | tuple[None, None]
"""What a block adds to the stream: an array and a bias; nothing before the first block."""


def add_norm(
    ops: Any, x: Array, update: Update, gain: Parameter, shift: Parameter
) -> tuple[Array, Array, Callable[[Array, Array | None], Array]]:
    """`x + update` and its rows normalised.

    `backprop(dnormal, dx)` takes the gradients of both (dx None: zero, otherwise overwritten) and
    returns the gradient of x, which is that of the update as well.
    """
    y, bias = update
    x, normal, statistics = ops.add_norm(
        x, y, None if bias is None else bias.value, gain.value, shift.value
    )

    def backprop(dnormal: Array, dx: Array | None) -> Array:
        bias_grad = None if bias is None else bias.grad
        return ops.add_norm_backward(
            dnormal, dx, x, statistics, gain.value, gain.grad, shift.grad, bias_grad
        )

    return x, normal, backprop


# -------------------------------------------------------------------------------------- the model


class Transformer:
    """Pre-norm transformer, built as GPT-2 is.

    Parameters
    ----------
    config
        Sizes.
    attend
        The attention, called as `attend(q, k, v, out=..., causal=..., alibi_slopes=...)`.
    xp
        `numpy` or `cupy`: where the parameters are, and so all the work.
    seed
        Of the initial parameters; equal for both array modules.
    """

    def __init__(self, config: Config, attend: Attend, xp: Any = np, seed: int = 0) -> None:
        self.config, self.xp, self.ops = config, xp, operations(xp)
        self.parameters = Parameters(initial_parameters(config, seed), xp, config.mixed)
        slopes = xp.asarray(alibi_slopes(config.heads), config.dtype) if config.alibi else None
        self.attend: Attend = partial(attend, causal=config.causal, alibi_slopes=slopes)

    def hidden(self, tokens: Array) -> tuple[Array, Backprop]:
        """Last hidden layer: tokens (B, N) → (T, W)."""
        ops, parameters, config, context = self.ops, self.parameters, self.config, tokens.shape[1]
        if context > config.context:
            raise ValueError(f"{context} tokens a sequence: the model takes {config.context}")
        token = parameters["token"]
        position = None if config.alibi else parameters["position"]
        pieces: dict[str, Piece] = {
            "attention": partial(
                attention, heads=config.heads, context=context, attend=self.attend
            ),
            "mlp": mlp,
        }

        flat = tokens.ravel()
        x = ops.embed(flat, token.work, None if position is None else position.work, context)
        update: Update = (None, None)
        backs = []
        for layer in range(config.layers):
            for kind, piece in pieces.items():
                name = f"{layer}.{kind}"
                x, normal, back_norm = add_norm(ops, x, update, *parameters.affine(f"{name}.norm"))
                y, back_piece = piece(ops, normal, parameters, name)
                update = (y, parameters[f"{name}.out.bias"])
                backs.append((back_norm, back_piece))
        _, normal, back_last = add_norm(ops, x, update, *parameters.affine("norm"))

        def backprop(dnormal: Array) -> None:
            dx = back_last(dnormal, None)
            while backs:  # a block's activations are freed as soon as it is done
                back_norm, back_piece = backs.pop()
                dx = back_norm(back_piece(dx), dx)
            position_grad = None if position is None else position.grad
            ops.embed_backward(dx, flat, token.grad, position_grad, context)

        return normal, backprop

    def loss(self, tokens: Array, targets: Array, rows: Array | None = None) -> Array:
        """Mean cross-entropy in nats of the predictions at `rows` of the T tokens (None: all)."""
        x, _ = self.hidden(tokens)
        x = x if rows is None else self.ops.gather(x, rows)
        return self.ops.cross_entropy(x, self._output.work, targets.ravel())

    def gradients(self, tokens: Array, targets: Array, rows: Array | None = None) -> Array:
        """Add the gradients of `loss` to those of all parameters; returns the loss."""
        hidden, backprop = self.hidden(tokens)
        x = hidden if rows is None else self.ops.gather(hidden, rows)
        output = self._output
        loss, dx = self.ops.cross_entropy_backward(x, output.work, targets.ravel(), output.grad)
        backprop(dx if rows is None else self.ops.scatter(dx, rows, len(hidden)))
        return loss

    def logits(self, tokens: Array, rows: Array) -> Array:
        """Scores (R, V) of what may stand at `rows` of the T tokens."""
        x, _ = self.hidden(tokens)
        return self.ops.logits(self.ops.gather(x, rows), self._output.work)

    @property
    def _output(self) -> Parameter:
        return self.parameters[self.config.output]
