"""What is measured: a cell is one shape, mask, dtype and pass; a preset is a set of cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

#: Tokens and features of a cell whose batch and heads are not given: a model of this width.
TOKENS = 16384
HIDDEN_SIZE = 2048

MASKS = ("full", "causal")

#: Work of each pass as a multiple of the forward pass, which has two of the seven products.
#: 'deterministic' is a backward pass that gives equal bits in equal calls.
DIRECTIONS = {"forward": 1.0, "backward": 2.5, "deterministic": 2.5, "both": 3.5}

#: What the arrays are made of. 'tf32' is float32 with precision='tf32' for flash_cupy; its peers
#: compute in float32.
DTYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "tf32": "float32",
    "float64": "float64",
}


@dataclass(frozen=True)
class Cell:
    """One measurement: q, k, v, o of shape (batch, heads, seqlen, head_dim)."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    mask: str
    dtype: str  # a key of DTYPES
    direction: str  # a key of DIRECTIONS

    @property
    def causal(self) -> bool:
        """Whether a query sees only keys up to its own position."""
        return self.mask == "causal"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of each of q, k, v and do."""
        return self.batch, self.heads, self.seqlen, self.head_dim

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the arrays that the pass returns."""
        gradients = ("dq", "dk", "dv")
        return {"forward": ("o",), "both": ("o", *gradients)}.get(self.direction, gradients)

    @property
    def flops(self) -> float:
        """Operations of the matrix products: 4 B H N² D forward, half when causal."""
        pairs = self.seqlen**2 / (2 if self.causal else 1)
        forward = 4 * self.batch * self.heads * pairs * self.head_dim
        return forward * DIRECTIONS[self.direction]

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.heads} N{self.seqlen} D{self.head_dim}"
        return f"{shape} {self.mask} {self.dtype} {self.direction}"


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

    def cells(self) -> Iterator[Cell]:
        """Go through the grid, the pass changing fastest."""
        axes = (self.dtypes, self.head_dims, self.masks, self.seqlens, self.directions)
        for dtype, head_dim, mask, seqlen, direction in product(*axes):
            batch = self.batch or max(1, TOKENS // seqlen)
            heads = self.heads or max(1, HIDDEN_SIZE // head_dim)
            yield Cell(batch, heads, seqlen, head_dim, mask, dtype, direction)


@dataclass(frozen=True)
class Preset:
    """Grids that are measured together, against the named peers (None: all there are)."""

    grids: tuple[Grid, ...]
    peers: tuple[str, ...] | None = None
    timed: bool = True  # False: memory and errors alone, one call a cell


_FLOAT32 = ("float32", "tf32")
_DOUBLING = tuple(2**n for n in range(10, 18))

PRESETS = {
    "peers": Preset((Grid((64, 128, 256), (512, 2048, 8192, 16384)),)),
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
