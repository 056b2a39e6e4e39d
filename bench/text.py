"""The corpus: text files as bytes, split into training and validation, cut into random windows."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import numpy as np

VOCABULARY = 256
"""A token is a byte."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders inside the standard library's that hold other people's code, tests or no source."""


def files_in(folder: Path, skip: Set[str] = frozenset()) -> list[Path]:
    """All files under `folder`, in a fixed order, except in folders named in `skip` and hidden."""
    found = []
    for place, folders, names in os.walk(folder):
        # Written back, the list tells os.walk where to go on.
        folders[:] = sorted(name for name in folders if name not in skip and name[0] != ".")
        found += [Path(place, name) for name in sorted(names) if name[0] != "."]
    return found


def python_sources() -> list[Path]:
    """Source files of this machine's Python standard library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    return [file for file in files_in(library, _NOT_LIBRARY) if file.suffix == ".py"]


def read_documents(source: Path | None = None) -> list[bytes]:
    """Read `source`, a file or a folder, or by default the Python standard library.

    Of a folder every file counts, save those that are hidden, empty or binary (with a zero byte).
    """
    if source is None:
        files = python_sources()
    elif source.is_dir():
        files = files_in(source)
    else:
        files = [source]
    contents = (file.read_bytes() for file in files)
    documents = [content for content in contents if content and b"\0" not in content]
    if not documents:
        where = "the Python standard library" if source is None else source
        raise ValueError(f"no text found in {where}; --text takes a text file or a folder of them")
    return documents


def split(documents: Sequence[bytes], share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation text, uint8: the end of every document, `share` of it, validates.

    Cut inside the documents, the two halves are alike in kind whether the corpus is one file or a
    folder of them, and no byte is in both.
    """
    cuts = [len(document) - round(len(document) * share) for document in documents]
    train = b"".join(document[:cut] for document, cut in zip(documents, cuts, strict=True))
    validation = b"".join(document[cut:] for document, cut in zip(documents, cuts, strict=True))
    return np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)


def unigram_entropy(text: np.ndarray) -> float:
    """Entropy of single bytes in nats: the least loss on `text` of a model that sees no context."""
    counts = np.bincount(text, minlength=VOCABULARY)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def batches(
    text: np.ndarray, batch: int, context: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless random windows of `text`: tokens and the tokens that follow, (batch, context) each.

    Equal arguments give equal windows, so that two runs see the same data.
    """
    starts = len(text) - context
    if starts < 1:
        raise ValueError(
            f"text of {len(text)} bytes is too short for context {context}: it takes more bytes "
            f"than the context, after the split into training and validation"
        )
    rng = np.random.default_rng(seed)
    while True:
        start = rng.integers(starts, size=(batch, 1))
        window = text[start + np.arange(context + 1)].astype(np.int64)
        yield window[:, :-1], window[:, 1:]
