"""What is measured: a cell is one shape, mask, dtype and pass; a preset is a set of cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

#: Tokens and features of a cell whose batch and heads are not given: a model of this width.
TOKENS = 16384
HIDDEN_SIZE = 2048

MASKS = ("full", "causal")

#: Matrix products of each pass over head_dim (Q Kᵀ; again, dS K and dSᵀ Q) and over head_dim_v
#: (P V; dO Vᵀ and Pᵀ dO). 'deterministic' is a backward pass that gives equal bits in equal calls.
DIRECTIONS = {"forward": (1, 1), "backward": (3, 2), "deterministic": (3, 2), "both": (4, 3)}

#: What the arrays are made of. 'tf32' is float32 with precision='tf32' for flash_cupy; its peers
#: compute in float32.
DTYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "tf32": "float32",
    "float64": "float64",
}

#: What the entries are: normal numbers, or such with a few far larger ones among them.
INPUTS = ("normal", "outliers")

#: Axes that most cells leave at their default, and the label of each where it is not.
VARIANTS = {"kv_heads": "Hkv", "window": "W", "head_dim_v": "Dv", "inputs": ""}


@dataclass(frozen=True)
class Cell:
    """One measurement: q, k, v and o of shape (batch, heads, seqlen, features)."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    mask: str
    dtype: str  # a key of DTYPES
    direction: str  # a key of DIRECTIONS
    kv_heads: int | None = None  # of k and v, a divisor of heads; None: heads
    window: int | None = None  # keys a query of a causal cell sees, itself the last; None: all
    head_dim_v: int | None = None  # of v and o; None: head_dim
    inputs: str = "normal"  # one of INPUTS

    def __post_init__(self) -> None:
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads: got {self.kv_heads}, takes a divisor of {self.heads}")
        if self.head_dim_v is not None and self.head_dim_v < 1:
            raise ValueError(f"head_dim_v: got {self.head_dim_v}, takes a number from 1")
        if self.window is not None and not (self.causal and self.window > 0):
            got = f"{self.window} and mask {self.mask}"
            raise ValueError(f"window: got {got}, takes a number from 1 and mask causal")

    @property
    def causal(self) -> bool:
        """Whether a query sees only keys up to its own position."""
        return self.mask == "causal"

    @property
    def visible(self) -> dict[str, Any]:
        """Options of flash_cupy's functions that say which keys a query sees."""
        window = None if self.window is None else (self.window - 1, 0)
        return {"causal": self.causal, "window": window}

    @property
    def variant(self) -> str:
        """Name what is not at its default: empty for most cells."""
        return " ".join(f"{VARIANTS[axis]}{getattr(self, axis)}" for axis in self.varied)

    @property
    def varied(self) -> list[str]:
        """Those of VARIANTS that are not at their default."""
        return [axis for axis in VARIANTS if getattr(self, axis) != getattr(Cell, axis)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of q, and of k, v and o where they have as many heads and features."""
        return self.batch, self.heads, self.seqlen, self.head_dim

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of q, k, v and do."""
        keys = self.batch, self.kv_heads or self.heads, self.seqlen
        head_dim_v = self.head_dim_v or self.head_dim
        do = (*self.shape[:3], head_dim_v)
        return self.shape, (*keys, self.head_dim), (*keys, head_dim_v), do

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the arrays that the pass returns."""
        gradients = ("dq", "dk", "dv")
        return {"forward": ("o",), "both": ("o", *gradients)}.get(self.direction, gradients)

    @property
    def flops(self) -> float:
        """Operations of the matrix products: 4 B H N² D forward, half when causal.

        In a window of W keys W (2 N - W) of the N² pairs are left, of which half are causal.
        """
        reach = min(self.window or self.seqlen, self.seqlen)
        pairs = reach * (2 * self.seqlen - reach) / (2 if self.causal else 1)
        products, products_v = DIRECTIONS[self.direction]
        features = products * self.head_dim + products_v * (self.head_dim_v or self.head_dim)
        return 2 * self.batch * self.heads * pairs * features

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.heads} N{self.seqlen} D{self.head_dim}"
        return f"{shape} {self.mask} {self.dtype} {self.direction} {self.variant}".rstrip()


@dataclass(frozen=True)
class Grid:
    """All combinations of the axes; without batch or heads as many as make TOKENS, HIDDEN_SIZE."""

    head_dims: tuple[int, ...]
    seqlens: tuple[int, ...]
    masks: tuple[str, ...] = MASKS
    dtypes: tuple[str, ...] = ("bfloat16",)
    directions: tuple[str, ...] = ("forward", "backward")
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    window: int | None = None
    head_dim_v: int | None = None
    inputs: str = "normal"

    def cells(self) -> Iterator[Cell]:
        """Go through the grid, the pass changing fastest."""
        axes = (self.dtypes, self.head_dims, self.masks, self.seqlens, self.directions)
        variant = {axis: getattr(self, axis) for axis in VARIANTS}
        for dtype, head_dim, mask, seqlen, direction in product(*axes):
            batch = self.batch or max(1, TOKENS // seqlen)
            heads = self.heads or max(1, HIDDEN_SIZE // head_dim)
            yield Cell(batch, heads, seqlen, head_dim, mask, dtype, direction, **variant)


@dataclass(frozen=True)
class Preset:
    """Grids that are measured together, against the named peers (None: all there are)."""

    grids: tuple[Grid, ...]
    peers: tuple[str, ...] | None = None
    timed: bool = True  # False: memory and errors alone, one call a cell

    def cells(self) -> list[Cell]:
        """Go through all grids, a cell of several once."""
        return list(dict.fromkeys(cell for grid in self.grids for cell in grid.cells()))


_FUSED = ("torch cuDNN", "torch flash", "flash-attn-4")
_FLOAT32 = ("float32", "tf32")
_DOUBLING = tuple(2**n for n in range(10, 18))

PRESETS = {
    "peers": Preset(
        (Grid((64, 128, 256), (512, 2048, 8192, 16384)),),
        peers=(*_FUSED, "flash_cupy portable"),
    ),
    "quick": Preset((Grid((128,), (2048,)),)),
    "dtypes": Preset(
        (
            Grid((64, 128), (2048,), dtypes=("float16",)),
            Grid((128,), (2048,), ("full",), _FLOAT32, batch=8, heads=16),
            Grid((64,), (2048,), ("causal",), _FLOAT32, batch=8, heads=16),
            Grid((64, 128), (2048,), dtypes=("float64",), batch=2, heads=16),
        )
    ),
    "deterministic": Preset(
        (Grid((64, 128, 256), (512, 2048, 8192), directions=("backward", "deterministic")),),
        peers=(),
    ),
    "variants": Preset(
        (
            # Four times as wide, so a quarter of the tokens; at N 8192 no less than a sequence.
            Grid((128,), (2048,), batch=2, heads=64, kv_heads=8),
            Grid((128,), (8192,), batch=1, heads=64, kv_heads=8),
            Grid((128,), (8192,), ("causal",), window=1024),
            Grid((96, 192), (2048, 8192)),
            Grid((192,), (2048, 8192), head_dim_v=128),
            Grid((128,), (2048, 8192), dtypes=("bfloat16", "float16")),
            Grid((64, 128), (2048,), ("full",), inputs="outliers"),
        ),
        peers=_FUSED,
    ),
    # To where dense attention does not fit, and flash_cupy alone to a million.
    "memory": Preset(
        (
            Grid((128,), _DOUBLING, ("full",), directions=("forward", "both"), batch=1, heads=8),
            Grid((128,), (2**18, 2**20), ("full",), directions=("forward",), batch=1, heads=8),
        ),
        peers=("dense",),
        timed=False,
    ),
    "cpu": Preset(
        (
            Grid(
                (64,),
                (2048, 4096),
                dtypes=("float32",),
                directions=("forward", "backward", "both"),
                batch=1,
                heads=8,
            ),
        )
    ),
}
