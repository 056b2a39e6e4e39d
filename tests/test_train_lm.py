"""The training script: corpus, optimizer, equal loss curves of both attentions, command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import text
import train_lm
from costs import ATTENTIONS, dense_vjp
from optimizer import AdamW, Schedule
from train_lm import Run
from transformer import Config

TINY = Config(context=16, layers=2, heads=2, width=16)


# ------------------------------------------------------------------------------------- the corpus


def test_split_takes_the_end_of_every_document() -> None:
    train, validation = text.split([b"0123456789", b"a", b"abcdefghijklmnopqrst"], share=0.2)
    assert bytes(train) == b"01234567" + b"a" + b"abcdefghijklmnop"
    assert bytes(validation) == b"89" + b"" + b"qrst"


def test_unigram_entropy() -> None:
    assert text.unigram_entropy(np.frombuffer(b"aaaa", np.uint8)) == 0
    assert text.unigram_entropy(np.frombuffer(b"abcd", np.uint8)) == pytest.approx(math.log(4))
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert text.unigram_entropy(np.frombuffer(b"aaba", np.uint8)) == pytest.approx(uneven)


def test_batches_are_windows_and_repeat_with_the_seed() -> None:
    data = np.arange(50, dtype=np.uint8)
    tokens, targets = next(text.batches(data, batch=200, context=4, seed=1))
    np.testing.assert_array_equal(tokens, tokens[:, :1] + np.arange(4))
    np.testing.assert_array_equal(targets, tokens + 1)
    assert (tokens.min(), targets.max()) == (0, 49)  # both ends of the text are reached
    again, _ = next(text.batches(data, batch=200, context=4, seed=1))
    other, _ = next(text.batches(data, batch=200, context=4, seed=2))
    np.testing.assert_array_equal(tokens, again)
    assert (tokens != other).any()


def test_batches_refuse_a_text_shorter_than_the_context() -> None:
    with pytest.raises(ValueError, match="text of 4 bytes is too short for context 4"):
        next(text.batches(np.zeros(4, np.uint8), batch=1, context=4, seed=0))


def test_documents_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, content in (
        ("b/two.txt", b"two"),
        ("one.txt", b"one"),
        (".secret", b"no"),
        (".hidden/three", b"no"),
        ("empty", b""),
        ("picture", b"\x89\0"),
    ):
        (tmp_path / name).write_bytes(content)
    assert text.read_documents(tmp_path) == [b"one", b"two"]
    assert text.read_documents(tmp_path / "one.txt") == [b"one"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no text found in .*nothing"):
        text.read_documents(tmp_path / "nothing")


def test_python_sources_leave_out_tests_and_installed_packages() -> None:
    sources = text.python_sources()
    assert any(path.name == "textwrap.py" for path in sources)
    assert not any({"site-packages", "test"} & set(path.parts) for path in sources)


# ---------------------------------------------------------------------------------- the optimizer


def test_adamw_against_the_formula_one_scalar_at_a_time() -> None:
    value, grads = np.array([0.5, -2.0]), [(0.3, -0.1), (-0.2, 0.4), (0.1, 0.05)]
    grad = np.zeros(2)
    optimizer = AdamW(value, grad, decayed=1, beta1=0.8, beta2=0.9, decay=0.5, clip=10.0)
    expected = value.copy()
    m, v = [0.0, 0.0], [0.0, 0.0]
    for t, pair in enumerate(grads, start=1):
        rate = 0.1 / t
        for i, g in enumerate(pair):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g * g
            step = (m[i] / (1 - 0.8**t)) / (math.sqrt(v[i] / (1 - 0.9**t)) + 1e-8)
            decay = 0.5 if i == 0 else 0.0
            expected[i] -= rate * (step + decay * expected[i])
        grad[:] = pair
        optimizer.step(rate)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_array_equal(grad, 0)


def test_adamw_clips_the_norm_and_leaves_short_gradients() -> None:
    grad = np.array([3.0, 4.0])
    optimizer = AdamW(np.zeros(2), grad, decayed=0, beta1=0.0, clip=1.0)
    optimizer.step(0.1)
    np.testing.assert_allclose(optimizer.mean, [0.6, 0.8])
    grad[:] = 0.3, 0.4
    optimizer.step(0.1)
    np.testing.assert_allclose(optimizer.mean, [0.3, 0.4])
    optimizer.step(0.1)  # a zero gradient has no direction to keep
    np.testing.assert_array_equal(optimizer.mean, 0)


def test_schedule_warms_up_then_falls_along_a_cosine() -> None:
    schedule = Schedule(peak=2.0, steps=20, warmup=4)
    np.testing.assert_allclose([schedule(s) for s in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0])
    assert schedule(12) == pytest.approx(1.0)
    assert 0 < schedule(19) < 0.02
    assert Schedule(peak=2.0, steps=1, warmup=0)(0) == 2.0


# ------------------------------------------------------------------------------------- training


def losses_with(attention: str, config: Config, steps: int) -> list[float]:
    """Train on a text that a model can learn, from the same start each time."""
    data = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8)
    run = Run(config, np, data, data, Schedule(1e-2, steps, warmup=2), batch=4, seed=1)
    return [float(loss) for loss in run.start(attention)[1]]


def test_training_lowers_the_loss() -> None:
    losses = losses_with("flash", TINY, steps=150)
    assert losses[0] == pytest.approx(math.log(256), rel=0.15)  # knows nothing
    assert losses[-1] < 1.5


def test_validation_is_on_the_validation_text() -> None:
    known, unknown = (np.frombuffer(part * 20, np.uint8) for part in (b"abcd", b"wxyz"))
    run = Run(TINY, np, known, unknown, Schedule(1e-2, 20, warmup=2), batch=4, seed=1)
    model, history = train_lm.train(run, "flash")
    assert history["train"][-1] < 2 < math.log(256) < history["validation"][-1][1]
    assert history["validation"][-1] == (20, run.validate(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-11)])
def test_both_attentions_give_the_same_loss_curve(dtype: str, tolerance: float) -> None:
    # Longer than a tile of the CPU engine, so that the tiles' sums do differ from the dense ones.
    config = Config(context=300, layers=2, heads=2, width=16, dtype=dtype)
    flash, dense = (losses_with(name, config, steps=20) for name in ("flash", "dense"))
    np.testing.assert_allclose(flash, dense, rtol=tolerance)
    assert flash[-1] < 0.9 * flash[0]


def test_largest_difference_is_relative_and_over_the_shorter_curve() -> None:
    assert train_lm.largest_difference([2.0, 4.0, 9.0], [2.0, 3.0]) == 0.25


# ------------------------------------------------------------------------------ the command line


def run(tmp_path: Path, *options: str) -> int:
    sizes = "--device cpu --layers 1 --heads 2 --width 16 --context 32 --batch 2 --steps 12"
    out = ["--out", str(tmp_path / "out"), "--table", "16", "70"]
    return train_lm.main([*sizes.split(), *out, *options])


@pytest.mark.parametrize("attention", ["flash", "dense"])
def test_command_line(attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "text.txt"
    source.write_bytes(b"a rose is a rose is a rose, said she. " * 60)
    assert run(tmp_path, "--text", str(source), "--attention", attention) == 0
    printed = capsys.readouterr().out
    for part in ("nats/byte", "unigram", "tokens/s", "context", "ratio", "Generated"):
        assert part in printed
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert len(figures["train"]) == 12
    assert figures["validation"][-1][0] == 12
    assert figures["largest_relative_difference"] < 1e-4
    assert [row["context"] for row in figures["attention_costs"]] == [16, 70]
    assert all(row["flash"]["bytes"] > 0 for row in figures["attention_costs"])
    assert figures["sample"].startswith("def ")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "10", "--heads", "3"], "width 10 is not a multiple of heads 3"),
        (["--steps", "0"], "0 is not positive"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--context", "100"], "too short for context 100"),
    ],
)
def test_command_line_errors(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_bytes(b"short " * 60)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--text", str(source), *options)
    assert message in capsys.readouterr().err


def test_attention_that_differs_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arrays: np.ndarray, **options: object) -> tuple:
        return dense_vjp(*arrays, **{**options, "causal": False})

    monkeypatch.setitem(ATTENTIONS, "dense", wrong)
    assert run(tmp_path) == 1
