"""Problem: one attention call, checked and normalised.

Every error about a caller's input is raised here and nowhere else: ``TypeError`` for a wrong kind
of thing, ``ValueError`` for a wrong value or shape. A `Problem` holds no array data, so that calls
that look alike share one (`Problem.of` remembers them).
"""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from . import arrays
from .arrays import Array
from .band import Band
from .gpu import why_no_gpu

Window = tuple[int | None, int | None]
Device = Literal["cpu", "gpu"]
Precision = Literal["tf32"]

#: What the accumulators of a tile leave room for in the registers of a GPU; the widest kernels in
#: cuda/plan.py.
MAX_GPU_HEAD_DIM = 256


class Options(NamedTuple):
    """The options that every function takes, as the caller gave them."""

    causal: bool = False
    window: Window | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Array | None = None
    device: Device | None = None
    precision: Precision | None = None


@dataclass(frozen=True, eq=False)  # compared by identity: `Problem.of` keeps one for equal calls
class Problem:
    """Shapes, options and device of one call.

    The full problem is ``q (*batch, heads, seqlen_q, head_dim)``,
    ``k (*batch, kv_heads, seqlen_k, head_dim)``, ``v (*batch, kv_heads, seqlen_k, head_dim_v)``
    and ``o (*batch, heads, seqlen_q, head_dim_v)``; the arrays themselves may lack batch axes or
    have extent 1 there (broadcasting).
    """

    kind: arrays.Kind
    device: Device
    dtype: np.dtype[Any]
    batch: tuple[int, ...]
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    band: Band
    scale: float
    softcap: float | None
    precision: Precision | None
    o_shape: tuple[int, ...]

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, options: Options) -> Problem:
        """Check a call's arrays and options.

        Raises
        ------
        TypeError
            Not NumPy or CuPy arrays, a mixture of both, an unsupported or a mixed dtype, options
            of a wrong type.
        ValueError
            Shapes that do not fit, options out of range, a device that is not there.
        """
        causal, window, scale, softcap, slopes, device, precision = options
        named = {"q": q, "k": k, "v": v}
        if slopes is not None:
            named["alibi_slopes"] = slopes
        call = (
            arrays.common_kind(named),
            device,
            *(q.shape, q.dtype, k.shape, k.dtype, v.shape, v.dtype),
            *(causal, scale, softcap),
            # Or else 1 would pass for True after a call with True.
            (type(causal), type(scale), type(softcap)),
            _check_window(window),
            *((None, None) if slopes is None else (slopes.shape, slopes.dtype)),
            precision,
            # Not asked by those who want the CPU: the answer takes an import of CuPy.
            None if isinstance(device, str) and device == "cpu" else why_no_gpu(),
        )
        try:
            return _problem(*call)
        except TypeError:  # an option that cannot be looked up, or an error of the check itself
            return _problem.__wrapped__(*call)

    @cached_property
    def empty(self) -> bool:
        """Whether there is no pair of a row and a key at all, and so nothing to compute."""
        return 0 in (*self.batch, self.heads, self.seqlen_q, self.seqlen_k)

    @cached_property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // max(self.kv_heads, 1)

    @cached_property
    def compute_dtype(self) -> np.dtype[Any]:
        """Dtype of L, D and of the sums: float64 for float64, float32 for all else."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    @cached_property
    def rows_shape(self) -> tuple[int, ...]:
        """Batch axes, heads and rows of o, with the head axis even where o has none."""
        return (*self.batch, self.heads, self.seqlen_q)

    @cached_property
    def lse_shape(self) -> tuple[int, ...]:
        """One log-sum-exp for each row of o."""
        return self.o_shape[:-1]

    def check_rows(self, inputs: dict[str, Array | None]) -> None:
        """Check ``do`` and ``o`` (like o) and ``lse`` and ``dlse`` (like lse) of a backward call.

        Only dlse may be None.

        Raises
        ------
        TypeError
            Another kind of array than q, or another dtype than the one that belongs to q.
        ValueError
            A shape that does not belong to q.
        """
        given = {name: x for name, x in inputs.items() if x is not None or name != "dlse"}
        self._check_like(given, self._rows)

    @cached_property
    def _rows(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shapes and dtypes of what belongs to the rows of q."""
        o, lse = (self.o_shape, self.dtype), (self.lse_shape, self.compute_dtype)
        return {"do": o, "o": o, "lse": lse, "dlse": lse}

    def check_out(
        self,
        out: tuple[Array | None, ...],
        takes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]],
        inputs: dict[str, Array | None],
    ) -> None:
        """Check arrays that a caller wants results written to, before any work.

        ``takes`` has the name, the shape and the dtype of each result, in the order of ``out``.

        Raises
        ------
        TypeError
            Not a tuple of arrays like q, or a dtype that is not the result's.
        ValueError
            A shape that is not the result's, read-only memory, or an overlap with an input, with
            another output or with itself.
        """
        if not isinstance(out, tuple) or len(out) != len(takes):
            raise TypeError(f"out: got {type(out).__name__}, takes a tuple ({', '.join(takes)})")
        takes = {f"out ({name})": like for name, like in takes.items()}
        given = {label: x for label, x in zip(takes, out, strict=True) if x is not None}
        self._check_like(given, takes)
        for label, x in given.items():
            if not arrays.writeable(x):
                raise ValueError(f"{label}: got a read-only array, takes a writeable one")
        found = arrays.first_overlap(
            tuple([arrays.place(x) for x in given.values()]),
            tuple([arrays.place(x) for x in inputs.values() if x is not None]),
        )
        if found is None:
            return
        label = [*given][found[0]]
        other = [*(name for name, x in inputs.items() if x is not None), *given][found[1]]
        if label == other:
            raise ValueError(
                f"{label}: got strides {given[label].strides}, with which elements share memory; "
                "takes an array with a place of its own for each element"
            )
        raise ValueError(f"{label}: got memory that overlaps {other}, takes memory of its own")

    def _check_like(
        self,
        named: dict[str, Array],
        takes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]],
    ) -> None:
        """Check arrays against the shapes and dtypes that belong to q."""
        for name, x in named.items():
            kind = arrays.kind_of(name, x)
            if kind != self.kind:
                raise TypeError(
                    f"{name}: got a {kind} array, takes a {self.kind} array as q, k and v are"
                )
            shape, dtype = takes[name]
            if x.dtype != dtype:
                raise TypeError(
                    f"{name}: got dtype {x.dtype}, takes {dtype} where q is {self.dtype}"
                )
            if x.shape != shape:
                raise ValueError(f"{name}: got shape {x.shape}, takes {shape}")
        if self.kind == "cupy":
            arrays.check_device(named)


@lru_cache(maxsize=4096)
def _problem(
    kind: arrays.Kind,
    device: Device | None,
    q: tuple[int, ...],
    q_dtype: np.dtype[Any],
    k: tuple[int, ...],
    k_dtype: np.dtype[Any],
    v: tuple[int, ...],
    v_dtype: np.dtype[Any],
    causal: bool,
    scale: float | None,
    softcap: float | None,
    types: tuple[type, ...],
    window: Window,
    slopes: tuple[int, ...] | None,
    slopes_dtype: np.dtype[Any] | None,
    precision: Precision | None,
    no_gpu: str | None,
) -> Problem:
    """Check all that depends on nothing but the arguments given here.

    Of arrays these are shapes and dtypes; of the current device, why it is none, see `why_no_gpu`.
    ``types`` are those of the options before it, which only tell apart what looks equal.
    """
    _check_axes(q, k, v)
    fits_gpu = max(q[-1], v[-1]) <= MAX_GPU_HEAD_DIM
    device = _resolve_device(kind, device, fits_gpu, no_gpu)
    if device == "gpu" and not fits_gpu:
        raise ValueError(
            f"q and v: got head dims {q[-1]} and {v[-1]}, takes at most {MAX_GPU_HEAD_DIM} on the "
            "GPU (NumPy arrays of any head dim run on the CPU)"
        )
    dtype = _check_dtypes({"q": q_dtype, "k": k_dtype, "v": v_dtype})
    causal = check_flag("causal", causal)
    scale = _check_number("scale", scale, "a finite number >= 0")
    softcap = _check_number("softcap", softcap, "a finite number > 0", positive=True)
    precision = _check_precision(precision, dtype)
    seqlen_q, head_dim = q[-2:]
    seqlen_k, head_dim_v = v[-2:]
    heads, kv_heads = _check_heads(q, k, v)
    batch = _check_batch(q, k, v)
    if slopes is not None:
        _check_slopes(slopes, slopes_dtype, (*batch, heads))
    one_head = len(q) == len(k) == len(v) == 2
    o_shape = (*(() if one_head else (*batch, heads)), seqlen_q, head_dim_v)
    return Problem(
        kind=kind,
        device=device,
        dtype=dtype,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        band=Band.of(seqlen_q, seqlen_k, causal, window),
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
        softcap=softcap,
        precision=precision,
        o_shape=o_shape,
    )


def _check_dtypes(named: dict[str, np.dtype[Any]]) -> np.dtype[Any]:
    for name, dtype in named.items():
        if dtype not in arrays.dtypes():
            raise TypeError(
                f"{name}: got dtype {dtype}, takes float16, bfloat16 (ml_dtypes), float32 or "
                "float64 in native byte order"
            )
    if len(set(named.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in named.items())
        raise TypeError(f"q, k and v: got mixed dtypes ({got}), takes one dtype for all three")
    return next(iter(named.values()))


def _check_axes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Check the last two axes, (sequence, feature)."""
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) < 2:
            raise ValueError(
                f"{name}: got shape {shape}, takes at least the two axes (sequence, head dim)"
            )
        if shape[-1] == 0:
            raise ValueError(f"{name}: got head dim 0 in shape {shape}, takes at least 1")
    if k[-1] != q[-1]:
        raise ValueError(
            f"k: got head dim {k[-1]} (last axis of {k}), takes q's head dim {q[-1]} "
            f"(q has shape {q})"
        )
    if v[-2] != k[-2]:
        raise ValueError(
            f"v: got {v[-2]} keys (axis -2 of {v}), takes as many as k, {k[-2]} (k has shape {k})"
        )


def _head_count(shape: tuple[int, ...]) -> int:
    return shape[-3] if len(shape) > 2 else 1


def _check_heads(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[int, int]:
    heads, kv_heads = _head_count(q), _head_count(k)
    if _head_count(v) != kv_heads:
        raise ValueError(
            f"v: got {_head_count(v)} heads (axis -3 of {v}), takes as many as k, {kv_heads} "
            f"(k has shape {k})"
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"q: got {heads} heads (axis -3 of {q}), takes a multiple of k's heads, {kv_heads} "
            f"(k has shape {k})"
        )
    return heads, kv_heads


def _check_batch(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(q[:-3], k[:-3], v[:-3])
    except ValueError:
        raise ValueError(
            f"q, k and v: got batch axes {q[:-3]}, {k[:-3]} and {v[:-3]}, takes axes that "
            "broadcast against each other"
        ) from None


def _check_slopes(
    slopes: tuple[int, ...], dtype: np.dtype[Any] | None, lead: tuple[int, ...]
) -> None:
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"alibi_slopes: got dtype {dtype}, takes float32 or float64")
    heads = lead[-1:]
    if slopes not in (heads, lead):
        raise ValueError(
            f"alibi_slopes: got shape {slopes}, takes (H,) = {heads} or (*batch, H) = {lead}"
        )


def check_flag(name: str, value: bool) -> bool:
    """Check an option that is on or off."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {value!r}, takes True or False")
    return bool(value)


def _check_window(window: Window | None) -> Window:
    if window is None:
        return (None, None)
    if not isinstance(window, tuple):
        raise TypeError(f"window: got {window!r}, takes None or a tuple (left, right)")
    if len(window) != 2:
        raise ValueError(f"window: got {len(window)} sides, takes two: (left, right)")
    left, right = (_check_side(window, side) for side in window)
    return (left, right)


def _check_side(window: Window, side: int | None) -> int | None:
    if side is None:
        return None
    if isinstance(side, bool | np.bool_) or not hasattr(side, "__index__"):
        raise TypeError(f"window: got {window!r}, takes a whole number or None on each side")
    if (count := operator.index(side)) < 0:
        raise ValueError(f"window: got {window!r}, takes sides >= 0 (keys in sight) or None")
    return count


def _check_number(
    name: str, value: float | None, takes: str, *, positive: bool = False
) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, takes None or {takes}")
    try:
        number = float(value)
    except OverflowError:  # of a Python int
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name}: got {value!r}, takes None or {takes}")
    return number


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    *most, last = map(repr, (None, *choices))
    takes = f"takes {', '.join(most)} or {last}"
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}, {takes}")
    if value not in (None, *choices):
        raise ValueError(f"{name}: got {value!r}, {takes}")


def _check_precision(precision: Precision | None, dtype: np.dtype[Any]) -> Precision | None:
    _check_choice("precision", precision, get_args(Precision))
    if precision is not None and dtype != np.float32:
        raise ValueError(f"precision: got {precision!r} for {dtype}, takes None there")
    return precision


def _resolve_device(
    kind: arrays.Kind, device: Device | None, fits_gpu: bool, no_gpu: str | None
) -> Device:
    """NumPy arrays run on the GPU where there is one; CuPy arrays stay where they are."""
    _check_choice("device", device, get_args(Device))
    if kind == "cupy" and device == "cpu":
        raise ValueError(
            "device: got 'cpu' with CuPy arrays, takes 'gpu' or None there (cupy.asnumpy brings "
            "an array to the CPU)"
        )
    if device == "cpu" or (device is None and kind == "numpy" and not fits_gpu):
        return "cpu"
    if no_gpu is None:
        return "gpu"
    if kind == "cupy":
        raise ValueError(f"q, k and v: got CuPy arrays, but {no_gpu}")
    if device == "gpu":
        raise ValueError(f"device: got 'gpu', but {no_gpu}; takes 'cpu' or None here")
    return "cpu"
