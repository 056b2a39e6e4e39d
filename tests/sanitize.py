"""Run a small set of calls under compute-sanitizer: its four tools, one after the other.

    python tests/sanitize.py [tool ...] [--families hopper]

needs a GPU and compute-sanitizer on the PATH; the exit status is 1 if a tool reports anything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FAMILIES = ("portable", "hopper")


def calls(families: Sequence[str]) -> None:
    """Both passes of each dtype and family: ragged ends, masks, groups and NaN."""
    import cupy
    import numpy as np
    from ml_dtypes import bfloat16

    import flash_cupy
    from flash_cupy.cuda import force_family

    # Each array is an allocation of its own, so that an access beyond its end shows.
    cupy.cuda.set_allocator(None)
    rng = np.random.default_rng(0)

    def array(*shape: int, dtype: type) -> cupy.ndarray:
        return cupy.asarray(rng.standard_normal(shape, np.float32).astype(dtype))

    cases = [
        # heads of q and of k and v, seqlen_q, seqlen_k, head_dim, head_dim_v, options
        (2, 1, 130, 131, 64, 64, {"causal": True}),
        (2, 1, 67, 200, 128, 128, {"window": (50, 20)}),
        (2, 1, 100, 70, 59, 40, {"softcap": 2.0, "causal": True}),
        (2, 1, 1100, 1100, 128, 128, {"causal": True}),
        (2, 1, 40, 65, 256, 256, {}),
        (2, 1, 90, 130, 128, 96, {"causal": True}),
        (2, 1, 70, 100, 192, 128, {"causal": True}),
        # As many queries and keys as have plans of their own.
        (1, 1, 256, 256, 64, 64, {"causal": True}),
        (1, 1, 90, 2100, 128, 128, {}),
        (1, 1, 90, 4100, 128, 128, {"causal": True}),
        (1, 1, 90, 2100, 96, 96, {}),
        (1, 1, 90, 4100, 96, 64, {"causal": True}),
    ]
    # As many heads as have blocks of their own.
    sms = cupy.cuda.Device().attributes["MultiProcessorCount"]
    whole_heads = [(sms, sms, 70, 140, 64, 64, {"causal": True})]
    kinds = [(dtype, "portable") for dtype in (np.float16, bfloat16, np.float32, np.float64)]
    if cupy.cuda.Device().compute_capability == "90":
        kinds += [(np.float16, "hopper"), (bfloat16, "hopper")]
    for dtype, family in kinds:
        if family not in families:
            continue
        for case in cases + (whole_heads if family == "hopper" else []):
            heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v, options = case
            q = array(heads, seqlen_q, head_dim, dtype=dtype)
            k = array(kv_heads, seqlen_k, head_dim, dtype=dtype)
            v = array(kv_heads, seqlen_k, head_dim_v, dtype=dtype)
            do = array(heads, seqlen_q, head_dim_v, dtype=dtype)
            if family == "hopper" and (head_dim * 2 % 16 or head_dim_v * 2 % 16):
                continue
            # initcheck does not see what TMA writes: o, dk, dv, and dq of whole heads.
            out, gradients_out = (None, None), (None, None, None)
            if family == "hopper":
                out = (cupy.zeros_like(do), None)
                gradients_out = tuple(cupy.zeros_like(x) for x in (q, k, v))
            if "window" in options:
                k[0, -1, 0] = do[0, 0, 0] = np.nan  # for what keeps it out of what does not see it
            with force_family(family):
                o, lse = flash_cupy.attention_forward(q, k, v, out=out, **options)
                results = [o]
                for deterministic in (False, True):
                    results += flash_cupy.attention_backward(
                        do,
                        q,
                        k,
                        v,
                        o,
                        lse,
                        deterministic=deterministic,
                        out=gradients_out,
                        **options,
                    )
            finite = all(np.isfinite(x.get().astype(np.float32)).all() for x in results)
            assert finite == ("window" not in options)
    cupy.cuda.Device().synchronize()


def run(tools: Sequence[str], families: Sequence[str]) -> int:
    """Run the calls under each tool; return how many of the tools report anything."""
    failures = 0
    for tool in tools:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        for name in ("attention", "hopper", "row_dots", "store_dq"):
            command += ["--kernel-name", f"kns={name}"]
        program = [sys.executable, __file__, "--calls", "--families", *families]
        result = subprocess.run([*command, *program])
        print(f"{tool}: {'clean' if result.returncode == 0 else 'REPORTS ERRORS'}")
        failures += result.returncode != 0
    return failures


def main() -> int:
    """Do what the options ask for."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("tools", nargs="*", metavar="tool", help=f"(all: {', '.join(TOOLS)})")
    options.add_argument("--families", choices=FAMILIES, nargs="+", default=FAMILIES, help="(both)")
    options.add_argument("--calls", action="store_true", help="run the calls, without a tool")
    args = options.parse_args()
    if set(args.tools) - set(TOOLS):
        options.error(f"tools: got {', '.join(args.tools)}, takes {', '.join(TOOLS)}")
    if args.calls:
        calls(args.families)
        return 0
    return int(run(args.tools or TOOLS, args.families) > 0)


if __name__ == "__main__":
    sys.exit(main())
