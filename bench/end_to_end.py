"""Train published models with dense attention and with flash_cupy, and measure what it changes.

    python bench/end_to_end.py                          all models and lengths (needs a GPU)
    python bench/end_to_end.py --config gpt2-small --seqlen 1024 --peers

Both attentions train the same model from the same start on the same data. Recorded are tokens a
second, milliseconds a step (by events on the device), the attention's share of them, peak memory,
the use of the device's matrix units, and the loss of every step. PyTorch trains the same model
beside them where it is installed. ``--largest context`` and ``--largest batch`` find what fits.

All figures go to ``<output>/<device>/end_to_end/<config>.json`` after each setting, pictures beside
it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from attention import reason
from costs import attention_named, flash_vjp
from end_to_end_pictures import save_pictures
from machine import array_module, describe, slug
from optimizer import Schedule
from report import align
from timing import alternate, timer_for
from torch_peer import TORCH_PEERS, TorchTrainer, import_torch
from tqdm import tqdm
from trainer import EAGER_STEPS, Trainer, losses_of, own_memory
from transformer import Attend, Config, bfloat16
from workloads import WORKLOADS, Workload, stacked

Result = dict[str, Any]

OURS = ("dense", "flash")

#: Dense bfloat16 products, operations a second, by the makers' data sheets.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12}

LEAST_STEPS = EAGER_STEPS + 4  # one timed by itself, one to warm up, one timed, one taken apart

MOST_TOKENS = {"context": 2**17, "batch": 2**20}  # where the search for the largest ends


def attend_by(name: str, xp: Any) -> Attend:
    """Choose the attention 'flash' or 'dense' for arrays of `xp`."""
    if xp is np:
        return attention_named(name, xp)
    from ops_cupy import dense_attention_vjp

    return {"flash": flash_vjp, "dense": dense_attention_vjp}[name]


# -------------------------------------------------------------------------------------- measuring


def attempt(measurement: Callable[[], Result]) -> Result:
    """Do it, or say why it could not be done: running out of memory is a result."""
    try:
        return measurement()
    except Exception as error:  # whatever a competitor raises is part of the record
        failed = reason(error)
    gc.collect()  # of what the error held
    return {"failed": failed}


def measure(workload: Workload, config: Config, data: Any, name: str, xp: Any) -> Result:
    """Train by `Trainer` with the attention `name`: some steps one by one, the others recorded."""
    schedule = Schedule(workload.learning_rate, len(data.tokens), warmup=len(data.tokens) // 10)
    with own_memory(xp) if xp is not np else nullcontext() as pool:
        result = attempt(lambda: train(config, data, attend_by(name, xp), schedule, xp, pool))
    return result


def train(
    config: Config, data: Any, attend: Attend, schedule: Schedule, xp: Any, pool: Any
) -> Result:
    """Do the steps; times are means over those that are timed together."""
    trainer, timer = Trainer(config, attend, data, schedule, xp), timer_for(xp)
    result: Result = {}
    for _ in range(EAGER_STEPS):
        trainer.step()
    result["ms_eager"] = timer(trainer.step)() * 1e3
    if xp is not np:
        result["peak_bytes"] = pool.total_bytes()
        try:
            trainer.record()
        except Exception as error:  # then the steps are launched kernel by kernel
            result["not_recorded"] = reason(error)
    trainer.step()
    rest = trainer.steps - trainer.done - (xp is not np)
    with tqdm(total=rest, desc="training", unit="step", leave=False) as bar:

        def all_steps() -> None:
            for _ in range(rest):
                trainer.step()
                bar.update()

        result["ms_per_step"] = timer(all_steps)() * 1e3 / rest
    if xp is not np:
        from breakdown import breakdown

        try:
            result["ms_by_operation"] = breakdown(trainer)  # the last step
        except Exception as error:
            result["ms_by_operation"] = reason(error)
    result["losses"] = losses_of(trainer)
    return result


def measure_attention(config: Config, batch: int, seqlen: int, name: str, xp: Any) -> Result:
    """Time the attention of all layers alone, forward and backward, in the model's layout."""
    attend = attend_by(name, xp)

    def timed() -> Result:
        rng = np.random.default_rng(0)
        shape = (4, batch, seqlen, config.heads, config.width // config.heads)
        drawn = xp.asarray(rng.standard_normal(shape, np.float32))
        arrays = drawn.astype(bfloat16() if config.mixed else config.dtype)
        q, k, v, do = (x.swapaxes(1, 2) for x in arrays)
        o, *gradients = (xp.empty_like(x).swapaxes(1, 2) for x in arrays)

        def call() -> None:
            _, backprop = attend(q, k, v, out=o, causal=config.causal)
            backprop(do, out=tuple(gradients))

        call()  # compiles, fills the pool
        return {"ms_attention": alternate({name: call}, xp, 0.1)[name] * 1e3 * config.layers}

    with own_memory(xp) if xp is not np else nullcontext():
        result = attempt(timed)
    return result


def measure_torch(torch: Any, peer: str, workload: Workload, config: Config, data: Any) -> Result:
    """Train by PyTorch; times as in `train`."""
    schedule = Schedule(workload.learning_rate, len(data.tokens), warmup=len(data.tokens) // 10)

    def train() -> Result:
        cuda = torch.cuda
        trainer = TorchTrainer(torch, peer, config, data, schedule)
        for _ in range(EAGER_STEPS + 2):
            trainer.step()
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.synchronize()
        start.record()
        rest = trainer.steps - trainer.done
        for _ in range(rest):
            trainer.step()
        end.record()
        end.synchronize()
        return {
            "ms_per_step": start.elapsed_time(end) / rest,
            "peak_bytes": cuda.max_memory_allocated(),
            "losses": trainer.losses.tolist(),
        }

    torch.cuda.reset_peak_memory_stats()
    result = attempt(train)
    gc.collect()
    torch.cuda.empty_cache()
    if peer == "torch compiled":
        torch.compiler.reset()
    return result


def measure_setting(
    workload: Workload,
    seqlen: int,
    batch: int,
    steps: int,
    names: Sequence[str],
    peers: Sequence[str],
    xp: Any,
    device: str,
) -> Result:
    """Measure all competitors at one length and batch."""
    config = workload.at(seqlen)
    data = stacked(workload.batches(seqlen, batch), steps)
    results: dict[str, Result] = {}
    for name in names:
        result = measure(workload, config, data, name, xp)
        if "failed" not in result:
            alone = measure_attention(config, batch, seqlen, name, xp)
            result |= {} if "failed" in alone else alone
        results[name] = result
        print(f"  {name:<16} {line(result, batch * seqlen)}", flush=True)
    torch = import_torch() if peers and xp is not np else None
    for peer in peers if torch is not None else ():
        results[peer] = measure_torch(torch, peer, workload, config, data)
        print(f"  {peer:<16} {line(results[peer], batch * seqlen)}", flush=True)
    flops = workload.flops(seqlen, batch)
    peak = next((x for name, x in PEAK_FLOPS.items() if device.startswith(name)), None)
    for result in results.values():
        if "ms_per_step" in result:
            seconds = result["ms_per_step"] * 1e-3
            result["tokens_per_second"] = batch * seqlen / seconds
            result["tflops"] = flops / seconds * 1e-12
            if peak is not None:
                result["flops_utilisation"] = flops / seconds / peak
        if "ms_attention" in result:
            result["attention_share"] = result["ms_attention"] / result["ms_per_step"]
    record = {"seqlen": seqlen, "batch": batch, "steps": steps, "flops": flops, "results": results}
    return record | compared(results)


def line(result: Result, tokens: int) -> str:
    """Say in a line what was measured."""
    if "failed" in result:
        return str(result["failed"])
    parts = [
        f"{result['ms_per_step']:8.2f} ms/step",
        f"{tokens / result['ms_per_step'] * 1e3:10,.0f} tokens/s",
        f"loss {result['losses'][0]:.3f} → {result['losses'][-1]:.3f}",
    ]
    if "ms_attention" in result:
        parts.append(f"attention {result['ms_attention']:.2f} ms")
    if "peak_bytes" in result:
        parts.append(f"{result['peak_bytes'] / 2**30:.2f} GiB")
    if "not_recorded" in result:
        parts.append(f"no graph: {result['not_recorded']}")
    return "  ".join(parts)


def compared(results: dict[str, Result]) -> Result:
    """Our speed over that of the others, and how far the two attentions' loss curves differ."""
    flash = results.get("flash", {})
    if "ms_per_step" not in flash:
        return {}
    others = {n: r for n, r in results.items() if n != "flash" and "ms_per_step" in r}
    found: Result = {
        "ratios": {name: r["ms_per_step"] / flash["ms_per_step"] for name, r in others.items()}
    }
    if "dense" in others:
        pairs = zip(others["dense"]["losses"], flash["losses"], strict=False)
        found["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
    return found


def largest(workload: Workload, kind: str, name: str, xp: Any) -> Result:
    """Double the context (of one sequence) or the batch until a step runs out of memory."""
    seqlen, batch, fits, failed = workload.seqlens[0], 1, 0, None
    while failed is None and seqlen * batch <= MOST_TOKENS[kind]:
        config = workload.at(seqlen)
        data = stacked(workload.batches(seqlen, batch), 1)
        schedule = Schedule(workload.learning_rate, 1, warmup=0)

        def one_step(config: Config = config, data: Any = data, schedule: Any = schedule) -> Result:
            trainer = Trainer(config, attend_by(name, xp), data, schedule, xp)
            trainer.step()
            return {"loss": losses_of(trainer)[0]}

        with own_memory(xp):
            failed = attempt(one_step).get("failed")
        if failed is None:
            fits = seqlen if kind == "context" else batch
        seqlen, batch = (2 * seqlen, 1) if kind == "context" else (seqlen, 2 * batch)
    print(f"  {name:<16} largest {kind}: {fits:,} ({failed or 'no larger one tried'})", flush=True)
    return {"fits": fits, "ended_by": failed}


# ----------------------------------------------------------------------------------------- output


def load(path: Path) -> Result:
    """Return what is recorded already: a run adds to it."""
    if path.exists():
        recorded: Result = json.loads(path.read_text(encoding="utf-8"))
        return recorded
    return {"records": [], "largest": {}}


def add_record(figures: Result, record: Result) -> None:
    """Put a record in its place; it replaces one of the same setting, or adds competitors to it."""
    records = figures["records"]
    keys = ("seqlen", "batch", "steps")
    same = [r for r in records if all(r[key] == record[key] for key in keys)]
    for old in same:
        results = old["results"] | record["results"]
        record = record | {"results": results} | compared(results)
        records.remove(old)
    records.append(record)
    records.sort(key=lambda r: tuple(r[key] for key in keys))


def save(path: Path, figures: Result) -> None:
    """Write all that is known so far; a run that is killed leaves a whole file."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def table(figures: Result) -> str:
    """Lay the records out."""
    rows = [["N", "B", "", "ms/step", "tokens/s", "attention", "GiB", "MFU", "flash is"]]
    for record in figures["records"]:
        for name, r in record["results"].items():
            row = [str(record["seqlen"]), str(record["batch"]), name]
            if "failed" in r:
                rows.append([*row, r["failed"][:30], *[""] * 5])
                continue
            share, used = r.get("attention_share"), r.get("flops_utilisation")
            ratio = record.get("ratios", {}).get(name)
            row += [f"{r['ms_per_step']:.2f}", f"{r['tokens_per_second']:,.0f}"]
            row.append("" if share is None else f"{share:.0%}")
            row.append(f"{r['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in r else "")
            row.append("" if used is None else f"{used:.0%}")
            row.append("" if ratio is None else f"{ratio:.2f}×")
            rows.append(row)
    return align(rows)


# ------------------------------------------------------------------------------------ the program


def parser() -> argparse.ArgumentParser:
    """Define the options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    published = [name for name in WORKLOADS if name != "tiny"]
    add("--config", choices=list(WORKLOADS), nargs="+", default=published, help="(all but tiny)")
    add("--seqlen", type=int, nargs="+", help="default: the configuration's")
    add("--batch", type=int, help="default: as many as have the tokens of the shortest default")
    add("--steps", type=int, default=30, help="of training, for each competitor (30)")
    add("--attention", choices=OURS, nargs="+", default=OURS, help="(both)")
    peers = list(TORCH_PEERS)
    add("--peers", choices=peers, nargs="*", default=peers, help="none: --peers alone (all)")
    add("--largest", choices=list(MOST_TOKENS), nargs="+", default=[], help="find what fits, only")
    add("--device", choices=("cpu", "gpu"), help="default: gpu where there is one, else cpu")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="(bench/results)")
    add("--pictures-only", type=Path, nargs="+", metavar="JSON", help="draw these results, no more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the options ask for."""
    options = parser()
    args = options.parse_args(argv)
    if args.pictures_only:
        for path in args.pictures_only:
            print(*save_pictures(path, load(path)))
        return 0
    if args.steps < LEAST_STEPS:
        options.error(f"--steps: got {args.steps}, takes at least {LEAST_STEPS}")
    try:
        xp = array_module("gpu" if args.largest else args.device)
    except ValueError as error:
        options.error(str(error))
    if args.peers and not args.largest and xp is not np and import_torch() is None:
        # Asked before CuPy loads cuBLAS: PyTorch may be linked to a newer one of the same name.
        print("PyTorch cannot be imported or sees no GPU: no peers")
    header = describe(xp)
    folder = args.output / slug(header["device"]) / "end_to_end"
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.config:
        workload, path = WORKLOADS[name], folder / f"{name}.json"
        figures = load(path) | {"header": header, "config": name, "workload": asdict(workload)}
        for kind in args.largest:
            print(f"{name}: largest {kind}")
            found = {a: largest(workload, kind, a, xp) for a in args.attention}
            figures["largest"] |= {kind: figures["largest"].get(kind, {}) | found}
            save(path, figures)
        for seqlen in () if args.largest else args.seqlen or workload.seqlens:
            batch = args.batch or workload.batch_at(seqlen)
            print(f"{name}: {batch} × {seqlen} tokens, {args.steps} steps", flush=True)
            setting = (workload, seqlen, batch, args.steps, args.attention, args.peers)
            add_record(figures, measure_setting(*setting, xp, header["device"]))
            save(path, figures)
        print(f"{table(figures)}\nclaimed: {workload.claimed}× ({workload.baseline})")
        print(f"written {path}")
        print(*save_pictures(path, figures), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
