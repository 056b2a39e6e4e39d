"""The competitors behind one face: flash_cupy, dense attention and PyTorch's backends.

Each says how to compute o, and o with what a backward pass needs. PyTorch is no dependency: where
it cannot be imported its backends are absent. Arrays go to and from it by DLPack, without a copy.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from cells import DTYPES, Cell
from costs import dense_vjp, peak_bytes
from timing import Call
from transformer import Array

import flash_cupy
from flash_cupy.cuda import force_family

_HALF = ("float16", "bfloat16")

#: Of inputs with outliers: the share of these, and how much larger they are.
OUTLIER_RATE, OUTLIER_FACTOR = 1e-3, 10


class Inputs(NamedTuple):
    """Arrays of a cell, of its `shapes`."""

    q: Array
    k: Array
    v: Array
    do: Array


def random_inputs(cell: Cell, xp: Any) -> Inputs:
    """Draw normal numbers, perhaps with outliers; zeros would draw less power and run faster."""
    rng = xp.random.default_rng(0)
    dtype = DTYPES[cell.dtype]
    drawn = "float64" if dtype == "float64" else "float32"
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  gives NumPy the name of the dtype

    def draw(shape: tuple[int, ...]) -> Array:
        x = rng.standard_normal(shape, dtype=drawn)
        if cell.inputs == "outliers":
            x = xp.where(rng.random(shape, dtype=drawn) < OUTLIER_RATE, OUTLIER_FACTOR * x, x)
        return x.astype(np.dtype(dtype))

    return Inputs(*map(draw, cell.shapes))


class Competitor(ABC):
    """An attention that is measured."""

    name: str
    #: Timed by itself, since it holds N×N matrices between its passes.
    apart = False
    #: Those axes of VARIANTS of which it takes the default alone.
    lacks: tuple[str, ...] = ()

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        #: Where `peak_bytes` lets CuPy allocate. It outlives its arrays: the memory of split blocks
        #: of a pool that is gone never comes back.
        self.pool = None if xp is np else xp.cuda.MemoryPool()

    def takes(self, cell: Cell) -> bool:
        """Whether it is meant for the cell at all."""
        return not set(self.lacks) & set(cell.varied)

    @abstractmethod
    def forward(self, x: Inputs, cell: Cell) -> Any:
        """Compute o."""

    @abstractmethod
    def vjp(self, x: Inputs, cell: Cell) -> tuple[Any, Callable[[], tuple[Any, ...]]]:
        """Compute o for training, and the function that returns dq, dk and dv."""

    def prepare(self, x: Inputs, cell: Cell) -> Callable[[], tuple[Any, ...]]:
        """Do what comes before a pass; the function returned is the pass itself."""
        x = self.inputs(x)
        if cell.direction == "forward":
            return lambda: (self.forward(x, cell),)
        if cell.direction != "both":
            return self.vjp(x, cell)[1]

        def both() -> tuple[Any, ...]:
            o, backprop = self.vjp(x, cell)
            return (o, *backprop())

        return both

    def inputs(self, x: Inputs) -> Inputs:
        """Turn arrays of `xp` into its own."""
        return x

    def array(self, result: Any) -> Array:
        """Turn a result into an array of `xp`."""
        return result

    def peak_bytes(self, call: Call) -> int:
        """Find the most memory held at once in a call."""
        if self.pool is None:
            return peak_bytes(call, self.xp)
        before = self.pool.total_bytes()  # 0 after `release`, so that it grows by all that is taken
        with self.xp.cuda.using_allocator(self.pool.malloc):
            call()
        return int(self.pool.total_bytes() - before)

    def release(self) -> None:
        """Give cached memory back to the device, so that others can have it."""
        if self.pool is not None:
            self.pool.free_all_blocks()
            self.xp.get_default_memory_pool().free_all_blocks()


# ------------------------------------------------------------------------------------- flash_cupy


class Ours(Competitor):
    """The library that this benchmark is about."""

    name = "flash_cupy"

    def options(self, cell: Cell) -> dict[str, Any]:
        """Options of every call; NumPy arrays stay on the CPU."""
        options = cell.visible
        if self.xp is np:
            options["device"] = "cpu"
        if cell.dtype == "tf32":
            options["precision"] = "tf32"
        return options

    def forward(self, x: Inputs, cell: Cell) -> Array:
        """Compute o, and lse, which the kernels write anyway."""
        return flash_cupy.attention(x.q, x.k, x.v, **self.options(cell))

    def vjp(self, x: Inputs, cell: Cell) -> tuple[Array, Callable[[], tuple[Array, ...]]]:
        """Compute o and lse; dq, dk and dv by recomputation from lse."""
        options = self.options(cell)
        o, lse = flash_cupy.attention_forward(x.q, x.k, x.v, **options)
        deterministic = cell.direction == "deterministic"
        return o, lambda: flash_cupy.attention_backward(
            x.do, x.q, x.k, x.v, o, lse, deterministic=deterministic, **options
        )


class OursDefault(Ours):
    """The backward pass as it is by default, beside the deterministic one."""

    name = "default backward"

    def takes(self, cell: Cell) -> bool:
        """Only deterministic cells: in all others it is the same as `Ours`."""
        return cell.direction == "deterministic"

    def vjp(self, x: Inputs, cell: Cell) -> tuple[Array, Callable[[], tuple[Array, ...]]]:
        """Leave `deterministic` off."""
        return super().vjp(x, replace(cell, direction="backward"))


class OursPortable(Ours):
    """The kernels for every GPU, where the library would choose others made for this one."""

    name = "flash_cupy portable"

    def takes(self, cell: Cell) -> bool:
        """Only 16-bit types: others have no other kernels."""
        return DTYPES[cell.dtype] in _HALF

    def forward(self, x: Inputs, cell: Cell) -> Array:
        """Compute o and lse."""
        with force_family("portable"):
            return super().forward(x, cell)

    def vjp(self, x: Inputs, cell: Cell) -> tuple[Array, Callable[[], tuple[Array, ...]]]:
        """Compute both passes by them."""
        with force_family("portable"):
            o, backprop = super().vjp(x, cell)

        def portable_backprop() -> tuple[Array, ...]:
            with force_family("portable"):
                return backprop()

        return o, portable_backprop


# ------------------------------------------------------------------------------- dense attention


class Specification(Competitor):
    """`flash_cupy.dense_attention`, whose backward pass computes P a second time."""

    name = "dense_attention"

    def forward(self, x: Inputs, cell: Cell) -> Array:
        """Compute o with all of S and P at once."""
        return flash_cupy.dense_attention(x.q, x.k, x.v, device="cpu", **cell.visible)

    def vjp(self, x: Inputs, cell: Cell) -> tuple[Array, Callable[[], tuple[Array, ...]]]:
        """Compute o now; dq, dk and dv from q, k, v and do alone."""
        o, backprop = dense_vjp(x.q, x.k, x.v, device="cpu", **cell.visible)
        return o, lambda: backprop(x.do)


class Dense(Competitor):
    """Dense attention as a careful user writes it: in place, P kept for the backward pass."""

    name = "dense"
    apart = True
    lacks = ("kv_heads", "window")

    def forward(self, x: Inputs, cell: Cell) -> Array:
        """Compute O = P V."""
        return self._matmul(self._softmax(x, cell), x.v)

    def vjp(self, x: Inputs, cell: Cell) -> tuple[Array, Callable[[], tuple[Array, ...]]]:
        """Compute O = P V; dS = scale P (dP - rowsum(P dP)) and its products with P kept."""
        p = self._softmax(x, cell)
        scale = 1 / math.sqrt(cell.head_dim)

        def backprop() -> tuple[Array, ...]:
            dv = self._matmul(p.mT, x.do)
            ds = self._matmul(x.do, x.v.mT)
            ds -= (p * ds).sum(axis=-1, keepdims=True)
            ds *= p
            ds *= scale
            return self._matmul(ds, x.k), self._matmul(ds.mT, x.q), dv

        return self._matmul(p, x.v), backprop

    def _softmax(self, x: Inputs, cell: Cell) -> Array:
        """P, (batch, heads, seqlen, seqlen), in the dtype of q."""
        s = self._matmul(x.q, x.k.mT)
        s *= 1 / math.sqrt(cell.head_dim)
        if cell.causal:
            i = self.xp.arange(cell.seqlen)
            self.xp.copyto(s, -math.inf, where=i[:, None] < i)
        s -= s.max(axis=-1, keepdims=True)
        self.xp.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
        return s

    def _matmul(self, a: Array, b: Array) -> Array:
        """Batched product of (batch, heads, m, k) and (batch, heads, k, n).

        Of 16-bit arrays head by head: the batched product of CuPy up to 14.2 computes float16 in
        float32 and takes no bfloat16, while that of two matrices uses the tensor cores.
        """
        if self.xp is np or a.itemsize > 2:
            return a @ b
        c = self.xp.empty((*a.shape[:-1], b.shape[-1]), a.dtype)
        for head in np.ndindex(c.shape[:-2]):
            self.xp.matmul(a[head], b[head], out=c[head])
        return c


# ---------------------------------------------------------------------------------------- PyTorch

#: Backends of scaled_dot_product_attention: our name, the dtypes it takes, what it lacks, whether
#: it is dense.
TORCH_BACKENDS = {
    "CUDNN_ATTENTION": ("torch cuDNN", _HALF, ("window",), False),
    "FLASH_ATTENTION": ("torch flash", _HALF, ("head_dim_v",), False),  # FlashAttention-2
    "EFFICIENT_ATTENTION": ("torch efficient", (*_HALF, "float32"), ("window",), False),
    "MATH": ("torch math", (*_HALF, "float32", "float64"), ("window",), True),
}


class TorchPeer(Competitor):
    """An attention of PyTorch's tensors and gradients, on the same (null) stream as CuPy."""

    def __init__(self, xp: Any, torch: Any) -> None:
        super().__init__(xp)
        self.torch = torch

    @abstractmethod
    def attend(self, cell: Cell, q: Any, k: Any, v: Any) -> Any:
        """Compute o, with a gradient."""

    def forward(self, x: Inputs, cell: Cell) -> Any:
        """Compute o without what a backward pass needs."""
        return self.attend(cell, x.q, x.k, x.v)

    def vjp(self, x: Inputs, cell: Cell) -> tuple[Any, Callable[[], tuple[Any, ...]]]:
        """Compute o and the graph to it, which stays for any number of backward passes."""
        torch = self.torch
        torch.use_deterministic_algorithms(cell.direction == "deterministic")
        torch.utils.deterministic.fill_uninitialized_memory = False
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (x.q, x.k, x.v))
        o = self.attend(cell, *leaves)
        return o, lambda: torch.autograd.grad(o, leaves, x.do, retain_graph=True)

    def inputs(self, x: Inputs) -> Inputs:
        """Share the arrays' memory."""
        return Inputs(*map(self.torch.from_dlpack, x))

    def array(self, result: Any) -> Array:
        """Share the tensor's memory."""
        return self.xp.from_dlpack(result.detach())

    def peak_bytes(self, call: Call) -> int:
        """Ask PyTorch's own pool."""
        cuda = self.torch.cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        return int(cuda.max_memory_allocated() - before)

    def release(self) -> None:
        """Empty PyTorch's own pool."""
        self.torch.cuda.empty_cache()


class Torch(TorchPeer):
    """A backend of PyTorch's scaled_dot_product_attention."""

    def __init__(self, xp: Any, torch: Any, backend: str) -> None:
        super().__init__(xp, torch)
        self.backend = backend
        self.name, self.dtypes, self.lacks, self.apart = TORCH_BACKENDS[backend]

    def takes(self, cell: Cell) -> bool:
        """Only what the backend has kernels for."""
        return DTYPES[cell.dtype] in self.dtypes and super().takes(cell)

    def attend(self, cell: Cell, q: Any, k: Any, v: Any) -> Any:
        """Compute o by this backend and no other."""
        if cell.window is not None:
            return self.attend_window(cell, q, k, v)
        grouped = {} if cell.kv_heads is None else {"enable_gqa": True}
        attention = self.torch.nn.attention
        backend = getattr(attention.SDPBackend, self.backend)
        with attention.sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why other backends do not apply
            return self.torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=cell.causal, **grouped
            )

    def attend_window(self, cell: Cell, q: Any, k: Any, v: Any) -> Any:
        """Compute o by the operator under FLASH_ATTENTION, since the function takes no window.

        Its arrays are (batch, seqlen, heads, features); it has a gradient.
        """
        left, right = cell.visible["window"]
        o, *_ = self.torch.ops.aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)),
            cum_seq_q=None,
            cum_seq_k=None,
            max_q=cell.seqlen,
            max_k=cell.seqlen,
            dropout_p=0.0,
            is_causal=False,  # the window is
            return_debug_mask=False,
            window_size_left=left,
            window_size_right=right,
        )
        return o.transpose(1, 2)


class FlashAttention4(TorchPeer):
    """The package flash-attn-4: attention for Hopper and Blackwell in CUTLASS' Python language."""

    name = "flash-attn-4"

    def __init__(self, xp: Any, torch: Any, attention: Callable[..., Any]) -> None:
        super().__init__(xp, torch)
        self.attention = attention

    def takes(self, cell: Cell) -> bool:
        """Only 16-bit types."""
        return DTYPES[cell.dtype] in _HALF and super().takes(cell)

    def attend(self, cell: Cell, q: Any, k: Any, v: Any) -> Any:
        """Compute o; its arrays are (batch, seqlen, heads, features)."""
        window = (None, None) if cell.window is None else cell.visible["window"]
        result = self.attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            causal=cell.causal and cell.window is None,
            window_size=window,
            deterministic=cell.direction == "deterministic",
        )
        o = result[0] if isinstance(result, tuple) else result  # its log-sum-exp, or None, follows
        return o.transpose(1, 2)


def torch_peers(xp: Any) -> list[Competitor]:
    """Return what computes with PyTorch, none where it is not installed or sees no GPU."""
    try:
        import torch
        import torch.nn.attention
    except (ImportError, OSError):  # OSError: a CUDA library of PyTorch is missing
        return []
    if not torch.cuda.is_available():
        return []
    known = dir(torch.nn.attention.SDPBackend)
    backends = [Torch(xp, torch, backend) for backend in TORCH_BACKENDS if backend in known]
    return [*backends, *flash_attention_4(xp, torch)]


def flash_attention_4(xp: Any, torch: Any) -> list[Competitor]:
    """Return the package flash-attn-4, if it is installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except (ImportError, OSError):
        return []
    return [FlashAttention4(xp, torch, flash_attn_func)]


def competitors(xp: Any) -> list[Competitor]:
    """Return all that can be measured on arrays of `xp`; the first is flash_cupy."""
    ours: list[Competitor] = [Ours(xp), OursDefault(xp)]
    if xp is np:
        return [*ours, Specification(xp)]
    if xp.cuda.Device().compute_capability == "90":
        ours.append(OursPortable(xp))
    return [*ours, *torch_peers(xp), Dense(xp)]
