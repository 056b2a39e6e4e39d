"""What is trained end to end: published models with their data, and what was claimed of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import listops
import numpy as np
import text
from transformer import Config


class Batch(NamedTuple):
    """One step's data, int32: what `Transformer.gradients` takes."""

    tokens: np.ndarray  # (B, N)
    targets: np.ndarray  # (R,)
    rows: np.ndarray | None  # (R,) of the B·N tokens, at which targets are to be predicted


@dataclass(frozen=True)
class Workload:
    """A model, its task and the setting it is measured in by default."""

    model: Config
    task: str  # a key of TASKS
    batch: int
    seqlens: tuple[int, ...]
    learning_rate: float
    claimed: float  # times faster than the baseline, by Dao et al. (2022)
    baseline: str

    def at(self, seqlen: int) -> Config:
        """Return the model for sequences of `seqlen` tokens."""
        return replace(self.model, context=seqlen)

    def batch_at(self, seqlen: int) -> int:
        """As many sequences as have the tokens of the default setting, one at least."""
        return max(1, self.batch * self.seqlens[0] // seqlen)

    def batches(self, seqlen: int, batch: int, seed: int = 0) -> Iterator[Batch]:
        """Draw data without end; equal arguments give equal data."""
        return TASKS[self.task](seqlen, batch, seed)

    def flops(self, seqlen: int, batch: int) -> float:
        """Operations of the matrix products of a step, forward and backward.

        Twice the multiplications, three times (the backward pass has two products for each of the
        forward pass); of causal attention the half that is not masked. Recomputation does not
        count.
        """
        model, tokens = self.model, batch * seqlen
        layer = 12 * model.width**2 + 2 * seqlen * model.width / (2 if model.causal else 1)
        predictions = tokens * SHARE_PREDICTED[self.task]
        if self.task == "listops":
            predictions = batch
        output = (model.classes or model.vocabulary) * model.width
        return 6 * (model.layers * layer * tokens + output * predictions)


# ---------------------------------------------------------------------------------------- the data

_MASK = text.VOCABULARY  # the token that hides another
_SHARE_HIDDEN = 0.15
SHARE_PREDICTED = {"text": 1.0, "masked text": _SHARE_HIDDEN, "listops": 0.0}


def text_batches(seqlen: int, batch: int, seed: int) -> Iterator[Batch]:
    """Bytes of Python's standard library; to predict is the byte that follows."""
    training, _ = text.split(text.read_documents())
    for tokens, targets in text.batches(training, batch, seqlen, seed):
        yield Batch(tokens.astype(np.int32), targets.astype(np.int32).ravel(), None)


def masked_text_batches(seqlen: int, batch: int, seed: int) -> Iterator[Batch]:
    """The same text; to predict are 15 % of the bytes (Devlin et al., 2019).

    Of these 80 % are hidden, 10 % are replaced by another, 10 % stay. Their number is the same in
    every sequence, as in implementations that are made for speed.
    """
    training, _ = text.split(text.read_documents())
    rng = np.random.default_rng(seed)
    hidden = max(1, round(_SHARE_HIDDEN * seqlen))
    for tokens, _ in text.batches(training, batch, seqlen, seed):
        columns = rng.permuted(np.tile(np.arange(seqlen), (batch, 1)), axis=1)[:, :hidden]
        rows = (columns + seqlen * np.arange(batch)[:, None]).ravel()
        flat = tokens.astype(np.int32).ravel()
        targets = flat[rows]
        draw = rng.random(rows.size)
        flat[rows[draw < 0.8]] = _MASK
        other = rows[draw >= 0.9]
        flat[other] = rng.integers(text.VOCABULARY, size=other.size)
        yield Batch(flat.reshape(batch, seqlen), targets, rows.astype(np.int32))


def listops_batches(
    seqlen: int, batch: int, seed: int, count: int | None = None, endless: bool = True
) -> Iterator[Batch]:
    """Expressions behind a token CLS, at which their value is to be predicted.

    Their length is from a quarter of `seqlen` (at most 500, as in the Long-Range Arena) to all of
    it; `count` of them are drawn and then repeat in random order, or once in their own order.
    """
    longest = min(seqlen, 2000 if seqlen == 2048 else seqlen)
    count = 32 * batch if count is None else count
    tokens, values = listops.samples(count, seed, min(500, seqlen // 4), longest)
    padded = np.full((count, seqlen), listops.PAD, np.int32)
    padded[:, 0] = listops.CLS
    padded[:, 1 : 1 + tokens.shape[1]] = tokens
    rows = (seqlen * np.arange(batch)).astype(np.int32)
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count) if endless else np.arange(count)
        for start in range(0, count - batch + 1, batch):
            chosen = order[start : start + batch]
            yield Batch(padded[chosen], values[chosen], rows)
        if not endless:
            return


TASKS = {"text": text_batches, "masked text": masked_text_batches, "listops": listops_batches}

# -------------------------------------------------------------------------------------- the models

_GPT2 = Config(vocabulary=50304, alibi=False, mixed=True)
_LONG = (1024, 2048, 4096, 8192)

WORKLOADS = {
    "gpt2-small": Workload(
        replace(_GPT2, layers=12, heads=12, width=768),
        *("text", 16, _LONG, 6e-4, 3.5, "Hugging Face, 1024 tokens"),
    ),
    "gpt2-medium": Workload(
        replace(_GPT2, layers=24, heads=16, width=1024),
        *("text", 16, _LONG, 3e-4, 3.0, "Hugging Face, 1024 tokens"),
    ),
    # Pre-norm and without the output's extra layer, otherwise as published.
    "bert-large": Workload(
        replace(_GPT2, layers=24, heads=16, width=1024, vocabulary=30528, causal=False),
        *("masked text", 32, (512,), 3e-4, 1.15, "MLPerf 1.1's record, 512 tokens"),
    ),
    "lra": Workload(
        Config(
            vocabulary=listops.VOCABULARY,
            classes=listops.CLASSES,
            layers=6,
            heads=8,
            width=512,
            causal=False,
            alibi=False,
            mixed=True,
        ),
        *("listops", 64, (1024, 2048, 4096), 5e-4, 2.4, "standard attention, 1024 to 4096 tokens"),
    ),
    # For a try on any machine, and for the tests.
    "tiny": Workload(
        Config(context=64, layers=2, heads=2, width=32, alibi=False),
        *("text", 4, (64,), 3e-3, 1.0, "none"),
    ),
}


def stacked(batches: Iterator[Batch], steps: int) -> Batch:
    """Put the data of `steps` steps into arrays with one more axis, the step."""
    taken = list(islice(batches, steps))
    tokens, targets, rows = zip(*taken, strict=True)
    return Batch(np.stack(tokens), np.stack(targets), None if rows[0] is None else np.stack(rows))
