"""ListOps: nested operations on lists of digits, whose value, a digit, is to be found.

    [MAX 2 9 [MIN 4 7 ] 0 ]  →  9

The grammar of Nangia and Bowman (2018) with the sizes of the Long-Range Arena (Tay et al., 2021):
a node is a digit with probability 3/4 and at the greatest depth, else one of four operators on 2 to
10 arguments; a tree is kept when its length is between the limits. Trees grow level by level, many
at once, in arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

OPERATORS = ("MIN", "MAX", "MED", "SM")  # SM is the sum modulo 10
PAD, CLS, DIGIT, OPERATOR, CLOSE = 0, 1, 2, 12, 16  # tokens; the first digit and operator
VOCABULARY = 24  # 17, filled up to a multiple of 8
CLASSES = 16  # 10 digits, filled up likewise

OPERATOR_SHARE = 0.25
MAX_DEPTH = 10
MAX_ARGUMENTS = 10
TREES_AT_ONCE = 4000


@dataclass
class Level:
    """The nodes of many trees at one depth, those of a parent side by side."""

    tree: Array
    parent: Array  # index in the level above; 0 for a root
    operator: Array  # of OPERATORS, -1 for a digit
    digit: Array
    arguments: Array  # how many; 0 for a digit

    def kept(self, alive: Array, alive_parent: Array) -> tuple[Level, Array]:
        """Drop the nodes of dead trees; also returns where the others were."""
        keep = alive[self.tree]
        new_parent = np.cumsum(alive_parent) - 1
        parts = (x[keep] for x in (self.operator, self.digit, self.arguments))
        return Level(self.tree[keep], new_parent[self.parent[keep]], *parts), keep


def samples(
    count: int, seed: int, min_length: int = 500, max_length: int = 2000
) -> tuple[Array, Array]:
    """Draw `count` expressions longer than `min_length` and shorter than `max_length` tokens.

    Returns
    -------
    tokens : (count, max_length - 1), uint8
        Filled up with PAD.
    values : (count,), int32
        What the expressions come to, 0 to 9.
    """
    rng = np.random.default_rng(seed)
    tokens: list[Array] = []
    values: list[Array] = []
    while sum(map(len, values)) < count:
        drawn, value = _expressions(rng, min_length, max_length)
        tokens.append(drawn)
        values.append(value)
    return np.concatenate(tokens)[:count], np.concatenate(values)[:count]


def _expressions(rng: np.random.Generator, min_length: int, max_length: int) -> tuple[Array, Array]:
    levels, length = _grow(rng, max_length)
    alive = (length > min_length) & (length < max_length)
    alive_parent = np.ones(1, bool)
    for i, level in enumerate(levels):
        levels[i], alive_parent = level.kept(alive, alive_parent)
    lengths, values = _evaluate(levels)
    tree = np.cumsum(alive) - 1  # the number of a tree among those kept
    tokens = np.full((alive.sum(), max_length - 1), PAD, np.uint8)
    start = np.zeros(len(levels[0].tree), np.int64)
    for i, level in enumerate(levels):
        row, is_operator = tree[level.tree], level.operator >= 0
        tokens[row, start] = np.where(is_operator, OPERATOR + level.operator, DIGIT + level.digit)
        tokens[row[is_operator], (start + lengths[i] - 1)[is_operator]] = CLOSE
        if i + 1 < len(levels):
            below = levels[i + 1].parent
            before = np.cumsum(lengths[i + 1]) - lengths[i + 1]
            first = np.cumsum(level.arguments) - level.arguments  # of a node's children
            start = start[below] + 1 + before - before[first[below]]
    return tokens, values.astype(np.int32)


def _grow(rng: np.random.Generator, max_length: int) -> tuple[list[Level], Array]:
    """Grow trees from operators (a lone digit is too short anyway); trees too long stop growing.

    Returns the levels and the trees' lengths, which are only right for those that went on.
    """
    tree = np.arange(TREES_AT_ONCE)
    parent = np.zeros(TREES_AT_ONCE, np.int64)
    length = np.zeros(TREES_AT_ONCE, np.int64)
    levels: list[Level] = []
    for depth in range(1, MAX_DEPTH + 1):
        size = len(tree)
        is_operator = rng.random(size) < OPERATOR_SHARE
        is_operator |= depth == 1
        is_operator &= depth < MAX_DEPTH
        arguments = is_operator * rng.integers(2, MAX_ARGUMENTS + 1, size)
        operator = np.where(is_operator, rng.integers(len(OPERATORS), size=size), -1)
        level = Level(tree, parent, operator, rng.integers(10, size=size), arguments)
        levels.append(level)
        length += np.bincount(tree, 1 + is_operator, TREES_AT_ONCE).astype(np.int64)
        level.arguments = arguments * (length < max_length)[tree]
        parent = np.repeat(np.arange(size), level.arguments)
        tree = tree[parent]
        if not len(tree):
            break
    return levels, length


def _evaluate(levels: list[Level]) -> tuple[list[Array], Array]:
    """Lengths of all nodes, level by level, and the values of the roots."""
    lengths = [np.empty(0, np.int64)] * len(levels)
    below_length = below_value = np.empty(0, np.int64)
    for i in reversed(range(len(levels))):
        level = levels[i]
        is_operator = level.operator >= 0
        length, value = 1 + is_operator.astype(np.int64), level.digit.copy()
        if is_operator.any():
            count = level.arguments[is_operator]
            first = np.cumsum(count) - count
            length[is_operator] += np.add.reduceat(below_length, first)
            value[is_operator] = _apply(level.operator[is_operator], below_value, first, count)
        lengths[i] = below_length = length
        below_value = value
    return lengths, below_value


def _apply(operator: Array, arguments: Array, first: Array, count: Array) -> Array:
    """Values of operators whose arguments, `count` of them from `first` on, stand side by side."""
    table = np.full((len(count), MAX_ARGUMENTS), 10, np.int64)
    which = np.repeat(np.arange(len(count)), count)
    table[which, np.arange(len(arguments)) - first[which]] = arguments
    table.sort(axis=1)
    rows = np.arange(len(count))
    median = (table[rows, (count - 1) // 2] + table[rows, count // 2]) // 2
    total = np.add.reduceat(arguments, first) % 10
    return np.choose(operator, [table[:, 0], table[rows, count - 1], median, total])
