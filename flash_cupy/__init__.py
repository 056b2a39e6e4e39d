"""Exact attention for NumPy and CuPy programs, in memory that grows with N and not with N²."""

from .ahead import compile
from .attention import attention, attention_backward, attention_forward, attention_vjp
from .dense import dense_attention, dense_attention_backward, dense_attention_forward
from .version import __version__

__all__ = [
    "__version__",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_vjp",
    "compile",
    "dense_attention",
    "dense_attention_backward",
    "dense_attention_forward",
]
