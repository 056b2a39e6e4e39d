"""The engines under test behind one face: NumPy arrays in, NumPy arrays out.

A test takes the fixture ``engine`` and runs once for each engine of this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from strategies import Case, Layout

import flash_cupy
from flash_cupy.gpu import why_no_gpu


@dataclass(frozen=True)
class Engine:
    """How to bring arrays to an engine and results back."""

    name: str
    xp: ModuleType
    upload: Callable[[Any], Any]
    download: Callable[[Any], Any]
    options: dict[str, Any]

    def array(self, x: Any, layout: Layout | None = None) -> Any:
        """Bring a NumPy array to the engine, in the given memory layout."""
        x = self.upload(x)
        return x if layout is None else layout(self.xp, x)

    def forward(self, case: Case, layout: Layout | None = None) -> tuple[Any, Any]:
        """Return (o, lse)."""
        q, k, v = (self.array(x, layout) for x in (case.q, case.k, case.v))
        o, lse = flash_cupy.attention_forward(q, k, v, **self.options_of(case))
        return self.download(o), self.download(lse)

    def run(
        self, case: Case, layout: Layout | None = None, deterministic: bool = False
    ) -> tuple[Any, ...]:
        """Return (o, lse, dq, dk, dv), the gradients by do and dlse."""
        q, k, v, do = (self.array(x, layout) for x in (case.q, case.k, case.v, case.do))
        options = self.options_of(case)
        o, lse = flash_cupy.attention_forward(q, k, v, **options)
        grads = flash_cupy.attention_backward(
            do,
            q,
            k,
            v,
            o,
            lse,
            dlse=self.array(case.dlse),
            deterministic=deterministic,
            **options,
        )
        return tuple(self.download(x) for x in (o, lse, *grads))

    def options_of(self, case: Case) -> dict[str, Any]:
        """The case's options, and the device."""
        options = {**case.options, **self.options}
        if options.get("alibi_slopes") is not None:
            options["alibi_slopes"] = self.array(options["alibi_slopes"])
        return options


def _identity(x: Any) -> Any:
    return x


CPU = Engine("cpu", np, _identity, _identity, {"device": "cpu"})

#: The CUDA engine on a simulated device, where the fixture ``host_engine`` has put it in place.
HOST = Engine("host", np, _identity, _identity, {"device": "cpu"})


def available_engines() -> list[Engine]:
    """The CPU engine always, the GPU where there is one."""
    engines = [CPU]
    if why_no_gpu() is None:
        engines.append(gpu_engine())
    return engines


def gpu_engine() -> Engine:
    """CuPy arrays, on the GPU."""
    import cupy

    return Engine("gpu", cupy, cupy.asarray, cupy.asnumpy, {})
