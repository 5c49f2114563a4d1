"""What a parsed query means: kinds are checked before any data are read, then it is computed array by array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.results.expression import Node, fail, names, parse, unknown_name

Kind = Literal["number", "text", "truth"]
_WHAT = {"number": "a number", "text": "a text", "truth": "a condition"}
_UFUNCS: dict[str, Callable[[Any, Any], Any]] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal,
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "and": np.logical_and, "or": np.logical_or,
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """What a query must know of a variable: its kind, and the words for its numbers where it is a flag."""

    kind: Kind
    labels: Mapping[str, int] | None = None


class Predicate:
    """A condition over the rows of a table."""

    def __init__(self, text: str, fields: Mapping[str, Field]) -> None:
        """Parse and check ``text``; a ``SettingsError`` points at what is wrong in it."""
        self._text, self._fields = text, fields
        self._root = parse(text)
        self.names = frozenset(names(self._root))
        if (kind := self._kind(self._root)) != "truth":
            fail(text, self._root.position, f"the query gives {_WHAT[kind]}; expected a condition such as `snr > 2`")

    def __call__(self, arrays: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        """Truth of each row (row,); ``arrays`` maps each name used to its values (row,), numbers missing as NaN."""
        with np.errstate(all="ignore"):
            result = self._value(self._root, arrays)
        return np.broadcast_to(np.asarray(result, dtype=bool), (rows,))

    def _kind(self, node: Node) -> Kind:
        if node.op in ("number", "string"):
            return "number" if node.op == "number" else "text"
        if node.op == "name":
            if node.value not in self._fields:
                fail(self._text, node.position, unknown_name(node.value, self._fields))
            return self._fields[node.value].kind
        if node.op == "compare":
            return self._comparison(node)
        if node.op == "in":
            kind = self._kind(node.args[0])
            for value in node.value:
                listed = Node("string" if isinstance(value, str) else "number", (), value, node.position)
                self._comparable(node, "==", (node.args[0], kind), (listed, self._kind(listed)))
            return "truth"
        wanted: Kind = "truth" if node.op in ("and", "or", "not") else "number"
        for arg in node.args:
            if (kind := self._kind(arg)) != wanted:
                fail(self._text, arg.position, f"{_WHAT[kind]} found where {_WHAT[wanted]} was expected")
        return "truth" if node.op in ("and", "or", "not") or node.value == "isnan" else "number"

    def _comparison(self, node: Node) -> Kind:
        operands = [(arg, self._kind(arg)) for arg in node.args]
        for left, right, operator in zip(operands, operands[1:], node.value, strict=False):
            self._comparable(node, operator, left, right)
        return "truth"

    def _comparable(self, node: Node, operator: str, left: tuple[Node, Kind], right: tuple[Node, Kind]) -> None:
        kinds = {left[1], right[1]}
        labels = self._labels(left[0]) or self._labels(right[0])
        if labels is not None and kinds == {"number", "text"}:
            word = (left if left[1] == "text" else right)[0].value
            if word not in labels or operator not in ("==", "!="):
                expected = f"== or != and one of {', '.join(labels)}"
                fail(self._text, node.position, f"{operator} {word!r} found; expected {expected}")
            return
        if len(kinds) > 1:
            fail(self._text, node.position, f"{_WHAT[left[1]]} is compared with {_WHAT[right[1]]}")
        if kinds != {"number"} and operator not in ("==", "!="):
            fail(self._text, node.position, f"{operator} found between {left[1]}s; expected == or !=")

    def _labels(self, node: Node) -> Mapping[str, int] | None:
        return self._fields[node.value].labels if node.op == "name" else None

    def _value(self, node: Node, arrays: Mapping[str, np.ndarray]) -> Any:
        if node.op in ("number", "string"):
            return node.value
        if node.op == "name":
            return arrays[node.value]
        if node.op == "in":
            operand = self._value(node.args[0], arrays)
            labels = self._labels(node.args[0]) or {}
            truths = [np.equal(operand, labels.get(value, value)) for value in node.value]
            return np.logical_or.reduce(truths)
        if node.op == "compare":
            return self._compare(node, arrays)
        values = [self._value(arg, arrays) for arg in node.args]
        if node.op == "not":
            return np.logical_not(values[0])
        if node.op == "negative":
            return -values[0]
        if node.op == "call":
            return _plain(np.isnan(values[0]) if node.value == "isnan" else np.abs(values[0]))
        result = values[0]
        for operator, value in zip(node.value, values[1:], strict=True):
            result = _plain(_UFUNCS[operator](result, value))
        return result

    def _compare(self, node: Node, arrays: Mapping[str, np.ndarray]) -> Any:
        """Every neighbouring pair of a chain holds; a word beside a flag stands for its number."""
        values = [self._value(arg, arrays) for arg in node.args]
        result: Any = True
        for i, operator in enumerate(node.value):
            left, right = values[i], values[i + 1]
            if labels := self._labels(node.args[i]) or self._labels(node.args[i + 1]):
                left, right = (labels[v] if isinstance(v, str) else v for v in (left, right))
            result = np.logical_and(result, _UFUNCS[operator](left, right))
        return result


def _plain(result: Any) -> Any:
    """A single number as Python's float, which takes part in the precision of the array beside it.

    So ``probability >= 1 - 0.1`` holds for a stored float32 of 0.9, just as ``probability >= 0.9`` does.
    """
    return result.item() if np.ndim(result) == 0 else result
