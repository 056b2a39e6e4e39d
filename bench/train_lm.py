"""Train a byte-level language model on real text with attention from flash_cupy.

    python bench/train_lm.py

learns the source of the Python standard library in little more than a minute on two CPU cores. It
prints the validation loss beside the unigram entropy of the text, a sample of generated text, the
largest difference between the loss curves of tiled and dense attention, and what each costs in
time and memory as the context grows. A picture of the loss and all figures are left in `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # NumPy's BLAS reads it when it is loaded
    # Products as small as these gain little from a second thread, and BLAS threads wait for each
    # other by spinning: beside any other work on the machine they slow training down many times.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import text
from costs import ATTENTIONS, attention_costs, attention_named, cost_table
from machine import array_module
from matplotlib.figure import Figure
from optimizer import AdamW, Schedule
from tqdm import tqdm
from transformer import Array, Config, Transformer

VALIDATIONS = 5  # in a run, evenly spread
VALIDATION_WINDOWS = 64
SHOWN_EVERY = 10  # steps between the losses in the progress bar
CHECKED_STEPS = 20  # of training, repeated with the other attention
CURVE_TOLERANCE = 1e-4  # relative, between the two loss curves in float32
CPU_CONTEXTS = (256, 512, 1024, 2048, 4096)
GPU_CONTEXTS = (1024, 2048, 4096, 8192)
PROMPT = b"def "
SAMPLE_BYTES = 400
TEMPERATURE = 0.7


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """All that decides how training goes; equal runs with equal attention give equal losses."""

    config: Config
    xp: Any
    training: np.ndarray
    validation: np.ndarray
    schedule: Schedule
    batch: int
    seed: int

    def start(self, attention: str) -> tuple[Transformer, Iterator[Array]]:
        """Make a new model; taking the next loss from the iterator trains it by one step."""
        attend = attention_named(attention, self.xp)
        model = Transformer(self.config, attend, self.xp, self.seed)
        return model, self._steps(model)

    def _steps(self, model: Transformer) -> Iterator[Array]:
        xp, parameters = self.xp, model.parameters
        optimizer = AdamW(parameters.value, parameters.grad, parameters.matrix_size)
        windows = text.batches(self.training, self.batch, self.config.context, self.seed)
        for step, (tokens, targets) in enumerate(islice(windows, self.schedule.steps)):
            loss = model.gradients(xp.asarray(tokens), xp.asarray(targets))
            optimizer.step(self.schedule(step))
            yield loss  # an array: a GPU may still be computing it

    def validate(self, model: Transformer) -> float:
        """Mean loss in nats a byte, on the same windows of the validation text each time."""
        windows = text.batches(self.validation, self.batch, self.config.context, seed=0)
        batches = islice(windows, max(1, VALIDATION_WINDOWS // self.batch))
        losses = [
            float(model.loss(self.xp.asarray(tokens), self.xp.asarray(targets)))
            for tokens, targets in batches
        ]
        return sum(losses) / len(losses)


def train(run: Run, attention: str) -> tuple[Transformer, dict[str, Any]]:
    """Train behind a progress bar; returns the model, its losses and the tokens a second."""
    model, steps = run.start(attention)
    total, tokens = run.schedule.steps, run.batch * run.config.context
    losses: list[Array] = []
    validated: list[tuple[int, float]] = []
    seconds, mark = 0.0, time.perf_counter()
    with tqdm(total=total * tokens, unit="tok", unit_scale=True) as bar:
        for done, loss in enumerate(steps, start=1):
            losses.append(loss)
            bar.update(tokens)
            if done % SHOWN_EVERY == 0:  # reading a loss waits for the GPU: not in every step
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            if done * VALIDATIONS // total > (done - 1) * VALIDATIONS // total:
                float(loss)
                seconds += time.perf_counter() - mark
                validated.append((done, run.validate(model)))
                mark = time.perf_counter()
    history = {
        "train": [float(loss) for loss in losses],
        "validation": validated,
        "tokens_per_second": total * tokens / seconds,
    }
    return model, history


def generate(model: Transformer, prompt: bytes, length: int, temperature: float, seed: int) -> str:
    """Continue `prompt` by `length` bytes, each drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    tokens = list(prompt)
    for _ in range(length):
        window = model.xp.asarray([tokens[-model.config.context :]])
        last = model.xp.asarray([window.size - 1])
        logits = np.asarray(model.logits(window, last)[0].tolist()) / temperature
        p = np.exp(logits - logits.max())
        tokens.append(int(rng.choice(len(p), p=p / p.sum())))
    return bytes(tokens).decode("utf-8", errors="replace")


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Largest relative difference between two loss curves, over the shorter of them."""
    return max(abs(a - b) / abs(a) for a, b in zip(losses, others, strict=False))


# ----------------------------------------------------------------------------------------- output


def nats_and_bits(nats: float) -> str:
    """Write the entropy of a byte in both units."""
    return f"{nats:.3f} nats/byte ({nats / math.log(2):.3f} bits/byte)"


def print_run(run: Run, attention: str) -> None:
    """Say what is about to be trained."""
    size = run.config
    print(f"text       {len(run.training):,} bytes to train, {len(run.validation):,} to validate")
    print(
        f"model      {size.layers} layers, {size.heads} heads, width {size.width}, "
        f"context {size.context}, {size.dtype}"
    )
    print(
        f"training   {attention} attention, {run.xp.__name__}, "
        f"{run.schedule.steps} steps of {run.batch} × {size.context} bytes",
        flush=True,
    )


def save_picture(path: Path, history: dict[str, Any], entropy: float, title: str) -> None:
    """Draw the loss curves and the unigram entropy."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss, nats/byte")
    steps = range(1, len(history["train"]) + 1)
    axes.plot(steps, history["train"], color="0.7", linewidth=0.7, label="training")
    axes.plot(*zip(*history["validation"], strict=True), "o-", label="validation")
    axes.axhline(entropy, color="black", linestyle="--", label="unigram entropy")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------ the program


def positive(value: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def parser() -> argparse.ArgumentParser:
    """Define the options."""
    options = argparse.ArgumentParser(
        description="Train a byte-level language model with attention from flash_cupy."
    )
    size = Config()

    def number(name: str, default: int, text: str) -> None:
        options.add_argument(name, type=positive, default=default, help=f"{text} ({default})")

    add = options.add_argument
    add("--attention", choices=list(ATTENTIONS), default="flash", help="trains the model (flash)")
    add("--device", choices=("cpu", "gpu"), help="default: gpu where CuPy finds one, else cpu")
    number("--layers", size.layers, "blocks of attention and MLP")
    number("--heads", size.heads, "attention heads a layer")
    number("--width", size.width, "features a token")
    number("--context", size.context, "bytes a sequence")
    number("--batch", 2, "sequences a step")
    number("--steps", 1000, "steps of the optimizer")
    add("--learning-rate", type=float, default=3e-3, help="its peak, after warm-up (3e-3)")
    add("--seed", type=int, default=0, help="of parameters, batches and sample (0)")
    add("--text", type=Path, help="file or folder to learn; default: Python's standard library")
    add("--out", type=Path, default=Path("runs/train_lm"), help="for picture and figures (runs/…)")
    add("--table", type=positive, nargs="+", help="context lengths at which attention is measured")
    return options


def run_from(args: argparse.Namespace) -> Run:
    """Turn the options into a run, or raise a ValueError or OSError that names what is wrong."""
    training, validation = text.split(text.read_documents(args.text))
    for part in (training, validation):
        next(text.batches(part, args.batch, args.context, args.seed))
    return Run(
        Config(context=args.context, layers=args.layers, heads=args.heads, width=args.width),
        array_module(args.device),
        training,
        validation,
        Schedule(args.learning_rate, args.steps, warmup=args.steps // 10),
        args.batch,
        args.seed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and compare; the status is 1 when the attentions' loss curves differ."""
    options = parser()
    args = options.parse_args(argv)
    try:
        run = run_from(args)
    except (ValueError, OSError) as error:
        options.error(str(error))

    print_run(run, args.attention)
    model, history = train(run, args.attention)
    entropy = text.unigram_entropy(run.validation)
    print(f"speed      {history['tokens_per_second']:,.0f} tokens/s")
    print(f"validation {nats_and_bits(history['validation'][-1][1])}")
    print(f"unigram    {nats_and_bits(entropy)}: the least loss without context")

    (other,) = set(ATTENTIONS) - {args.attention}
    repeated = [float(loss) for loss in islice(run.start(other)[1], CHECKED_STEPS)]
    difference = largest_difference(history["train"], repeated)
    print(
        f"exactness  the first {len(repeated)} losses with {other} attention differ by "
        f"{difference:.1e} at most (relative)\n"
    )

    contexts = args.table or (CPU_CONTEXTS if run.xp is np else GPU_CONTEXTS)
    costs = attention_costs(run.xp, run.config, contexts)
    print(f"Attention of one layer, one sequence:\n{cost_table(costs)}\n")
    sample = generate(model, PROMPT, SAMPLE_BYTES, TEMPERATURE, args.seed)
    print(f"Generated at temperature {TEMPERATURE}:\n{sample}\n")

    args.out.mkdir(parents=True, exist_ok=True)
    save_picture(args.out / "loss.png", history, entropy, f"{args.attention} attention")
    figures = {
        "config": asdict(run.config),
        "schedule": asdict(run.schedule),
        "attention": args.attention,
        "array_module": run.xp.__name__,
        "batch": run.batch,
        "seed": run.seed,
        "unigram_entropy": entropy,
        **history,
        "largest_relative_difference": difference,
        "attention_costs": costs,
        "sample": sample,
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(f"written    {args.out / 'loss.png'}, {args.out / 'figures.json'}")
    return int(difference > CURVE_TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
