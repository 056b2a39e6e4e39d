"""Train the encoder of the Long-Range Arena on ListOps, with attention from flash_cupy.

    python bench/train_listops.py

takes some minutes on a GPU, and leaves the accuracy on held-out expressions, a picture of it and
all figures in `--out`. The model is the benchmark's: 6 layers of width 512 with 8 heads, a learned
position, and a token CLS whose last hidden layer is classified; without dropout, and with the
padding as tokens like others. Guessing the most frequent digit gets about 17 % right.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from end_to_end import OURS, attend_by
from machine import array_module, describe
from matplotlib.figure import Figure
from optimizer import Schedule
from tqdm import tqdm
from trainer import EAGER_STEPS, Trainer, losses_of, own_memory
from workloads import WORKLOADS, Batch, listops_batches, stacked

REPORTED = 0.37  # of the benchmark's Transformer (Tay et al., 2021), and of Dao et al. (2022)
SHOWN_EVERY = 50  # steps between the losses in the progress bar


def accuracy(trainer: Trainer, held_out: Sequence[Batch]) -> float:
    """Share of expressions whose value gets the highest score."""
    xp, right = trainer.xp, 0
    for tokens, targets, rows in held_out:
        scores = trainer.model.logits(xp.asarray(tokens), xp.asarray(rows))
        chosen = scores.astype(np.float32).argmax(axis=1)
        right += int((chosen == xp.asarray(targets)).sum())
    return right / sum(len(batch.targets) for batch in held_out)


def train(
    trainer: Trainer, held_out: Sequence[Batch], every: int
) -> Iterator[list[tuple[int, float]]]:
    """Do all steps behind a progress bar; yields all accuracies, after every `every` steps."""
    measured: list[tuple[int, float]] = []
    with tqdm(total=trainer.steps, unit="step") as bar:
        while trainer.done < trainer.steps:
            trainer.step()
            bar.update()
            if trainer.done == EAGER_STEPS and trainer.xp is not np:
                trainer.record()
            if trainer.done % SHOWN_EVERY == 0:  # reading a loss waits for the GPU
                loss = float(trainer.losses[trainer.done - 1])
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if trainer.done % every == 0 or trainer.done == trainer.steps:
                measured.append((trainer.done, accuracy(trainer, held_out)))
                tqdm.write(f"step {trainer.done}: {measured[-1][1]:.1%} right")
                yield measured


def save_picture(path: Path, losses: Sequence[float], measured: Sequence[Any], title: str) -> None:
    """Draw loss and accuracy over the steps."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(losses) + 1), losses, color="0.6", linewidth=0.7)
    left.set(xlabel="step", ylabel="training loss, nats")
    right.plot(*zip(*measured, strict=True), "o-", color="black", markersize=3)
    right.axhline(REPORTED, color="tab:blue", linestyle="--", label="reported for this model")
    right.set(xlabel="step", ylabel="accuracy on held-out expressions")
    right.set_ylim(bottom=0)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    """Define the options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, model = options.add_argument, WORKLOADS["lra"].model
    add("--attention", choices=OURS, default="flash", help="(flash)")
    add("--device", choices=("cpu", "gpu"), help="default: gpu where there is one, else cpu")
    add("--seqlen", type=int, default=2048, help="tokens a sequence, padding included (2048)")
    add("--batch", type=int, default=32, help="expressions a step (32)")
    add("--steps", type=int, default=5000, help="(5000)")
    add("--samples", type=int, default=96000, help="to train with; 20 s to draw (96000)")
    add("--held-out", type=int, default=2000, help="to measure the accuracy with (2000)")
    add("--every", type=int, default=500, help="steps from one measurement to the next (500)")
    add("--learning-rate", type=float, default=5e-4, help="its peak (5e-4)")
    add("--layers", type=int, default=model.layers, help=f"({model.layers})")
    add("--heads", type=int, default=model.heads, help=f"({model.heads})")
    add("--width", type=int, default=model.width, help=f"({model.width})")
    add("--seed", type=int, default=0, help="of parameters and expressions (0)")
    add("--out", type=Path, default=Path("runs/train_listops"), help="(runs/train_listops)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Draw expressions, train, and write down what came of it."""
    options = parser()
    args = options.parse_args(argv)
    try:
        xp = array_module(args.device)
        sizes = {"layers": args.layers, "heads": args.heads, "width": args.width}
        model = replace(WORKLOADS["lra"].model, context=args.seqlen, mixed=xp is not np, **sizes)
    except ValueError as error:
        options.error(str(error))
    print(f"drawing {args.samples + args.held_out:,} expressions", flush=True)
    drawn = listops_batches(args.seqlen, args.batch, args.seed, count=args.samples)
    data = stacked(drawn, args.steps)
    other = listops_batches(
        args.seqlen, args.batch, args.seed + 1, count=args.held_out, endless=False
    )
    held_out = list(islice(other, args.held_out // args.batch))
    args.out.mkdir(parents=True, exist_ok=True)
    title = f"ListOps, {args.seqlen} tokens, {args.attention} attention"
    picture, path = args.out / "listops.png", args.out / "listops.json"
    with own_memory(xp) if xp is not np else nullcontext():
        for figures in run(args, model, data, held_out, xp):  # a run that is stopped leaves some
            save_picture(picture, figures["losses"], figures["accuracy"], title)
            path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"written {picture}, {path}")
    return 0


def run(
    args: argparse.Namespace, model: Any, data: Batch, held_out: Sequence[Batch], xp: Any
) -> Iterator[dict[str, Any]]:
    """Train; yields all figures so far, at each measurement."""
    schedule = Schedule(args.learning_rate, args.steps, warmup=args.steps // 10)
    trainer = Trainer(model, attend_by(args.attention, xp), data, schedule, xp, args.seed)
    start = time.perf_counter()
    for measured in train(trainer, held_out, args.every):
        yield {
            "header": describe(xp),
            "config": asdict(model),
            **{key: value for key, value in vars(args).items() if key not in ("out", "device")},
            "seconds": time.perf_counter() - start,
            "losses": losses_of(trainer),
            "accuracy": measured,
            "reported": REPORTED,
        }


if __name__ == "__main__":
    raise SystemExit(main())
