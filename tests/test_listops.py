"""ListOps: the generator against an evaluator that reads the expressions one token at a time."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import listops
import numpy as np
import pytest
import train_listops

FUNCTIONS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda x: int(statistics.median(x)),
    "SM": lambda x: sum(x) % 10,
}


def evaluate(tokens: list[int]) -> tuple[int, int]:
    """Value of an expression and its greatest depth; the whole of it must be one expression."""
    stack: list[list] = [[]]
    depth = 0
    for token in tokens:
        if token >= listops.OPERATOR and token != listops.CLOSE:
            stack.append([listops.OPERATORS[token - listops.OPERATOR]])
        elif token == listops.CLOSE:
            name, *arguments = stack.pop()
            assert 2 <= len(arguments) <= listops.MAX_ARGUMENTS
            stack[-1].append(FUNCTIONS[name](arguments))
        else:
            assert listops.DIGIT <= token < listops.DIGIT + 10
            stack[-1].append(token - listops.DIGIT)
        depth = max(depth, len(stack))
    assert len(stack) == 1
    (value,) = stack[0]
    return value, depth


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    return listops.samples(300, seed=1, min_length=100, max_length=500)


def test_values_are_what_the_expressions_come_to(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    for tokens, value in zip(*drawn, strict=True):
        expression = tokens[tokens != listops.PAD].tolist()
        assert 100 < len(expression) < 500
        assert not tokens[len(expression) :].any()  # all padding is at the end
        found, depth = evaluate(expression)
        assert found == value
        assert depth <= listops.MAX_DEPTH


def test_operators_digits_and_values_are_spread(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    tokens, values = drawn
    counts = np.bincount(tokens[tokens != listops.PAD], minlength=listops.CLOSE + 1)
    operators = counts[listops.OPERATOR : listops.CLOSE]
    digits = counts[listops.DIGIT : listops.DIGIT + 10]
    assert operators.max() < 1.1 * operators.min()
    assert digits.max() < 1.1 * digits.min()
    assert counts[listops.CLOSE] == operators.sum()
    assert set(values) == set(range(10))


def test_equal_seeds_give_equal_expressions() -> None:
    a, b, c = (listops.samples(20, seed)[0] for seed in (5, 5, 6))
    assert a.shape == (20, 1999)
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_the_training_script_learns_and_leaves_its_figures(tmp_path: Path) -> None:
    sizes = "--layers 1 --heads 2 --width 16 --seqlen 32 --batch 4 --samples 40 --held-out 20"
    steps = "--steps 40 --every 20 --learning-rate 1e-2 --device cpu"
    arguments = [*sizes.split(), *steps.split(), "--out", str(tmp_path)]
    assert train_listops.main(arguments) == 0
    figures = json.loads((tmp_path / "listops.json").read_text(encoding="utf-8"))
    assert [step for step, _ in figures["accuracy"]] == [20, 40]
    assert all(0 <= share <= 1 for _, share in figures["accuracy"])
    assert np.mean(figures["losses"][-5:]) < figures["losses"][0]
    assert (tmp_path / "listops.png").exists()
