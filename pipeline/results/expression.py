"""The language of queries: read by a parser of its own into a small tree, and never evaluated as Python.

    or_     := and_ ("or" and_)*                      names      variables of the table
    and_    := not_ ("and" not_)*                     numbers    12, 0.5, 1e-3, nan
    not_    := "not" not_ | comparison                strings    "Au" or 'Au'
    compare := sum (("<" | "<=" | ">" | ">=" | "==" | "!=") sum)* | sum ["not"] "in" "[" value, … "]"
    sum     := product (("+" | "-") product)*         functions  abs(a), isnan(a)
    product := sign (("*" | "/") sign)*
    sign    := ("-" | "+") sign | number | string | name | function "(" or_ ")" | "(" or_ ")"

Comparisons chain (``0.5 < probability <= 0.9``). A missing value (NaN; -1 where nothing was computed) compares as false
with everything, and != is true for it; ``isnan`` finds it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from schemas.errors import SettingsError

MAX_LENGTH = 10_000
MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?+(?![\w.]))"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<string>\"[^\"\n]*\"|'[^'\n]*')"
    r"|(?P<symbol><=|>=|==|!=|[<>+\-*/()\[\],]))"
)
_HINTS = {
    "=": "compare with ==", "&": "write `and`", "|": "write `or`", "~": "write `not`", "!": "write `not`",
    "^": "there are no powers", ".": "names have no attributes", "'": "the string does not end",
    '"': "the string does not end",
}  # fmt: skip
_WORDS = {"and", "or", "not", "in"}
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
FUNCTIONS = ("abs", "isnan")


@dataclass(frozen=True)
class Node:
    """One operation: its operator, its operands, and where it stands in the text.

    ``op`` is "or", "and", "not", "in" (``value``: the list), "compare" or "chain" (``value``: the operators between the
    operands, left to right), "negative", "call" (``value``: the function), "name", "number" or "string".
    """

    op: str
    args: tuple[Node, ...]
    value: Any
    position: int


@dataclass(frozen=True)
class Token:
    """A word of the text."""

    kind: str
    text: str
    position: int


def fail(text: str, position: int, problem: str) -> NoReturn:
    """Raise a ``SettingsError`` that points at a position of the query."""
    start = max(0, position - 60)
    line = text[start : start + 100].replace("\n", " ")
    raise SettingsError(f"query, character {position + 1}: {problem}\n  {line}\n  {' ' * (position - start)}^")


def _tokens(text: str) -> list[Token]:
    if len(text) > MAX_LENGTH:
        raise SettingsError(f"the query has {len(text)} characters; expected at most {MAX_LENGTH}")
    tokens, end = [], 0
    stripped = len(text.rstrip())
    while end < stripped:
        match = _TOKEN.match(text, end)
        if match is None:
            at = end + len(text[end:]) - len(text[end:].lstrip())
            word = re.match(r"[\w.]+|.", text[at:])
            found = word.group() if word else text[at]
            hint = _HINTS.get(found[0])
            fail(text, at, f"{found!r} is not understood" + (f"; {hint}" if hint else ""))
        kind = match.lastgroup or ""
        word_text = match.group(kind)
        tokens.append(Token("symbol" if word_text in _WORDS else kind, word_text, match.start(kind)))
        end = match.end()
    return [*tokens, Token("end", "the end", len(text))]


class _Parser:
    """Recursive descent over the grammar above; refuses to go deeper than ``MAX_DEPTH``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.at = 0
        self.depth = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def take(self, *symbols: str) -> Token | None:
        if self.token.kind == "symbol" and self.token.text in symbols:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def need(self, symbol: str) -> None:
        if self.take(symbol) is None:
            fail(self.text, self.token.position, f"{self.token.text!r} found where {symbol!r} was expected")

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            fail(self.text, self.token.position, f"nested more than {MAX_DEPTH} deep; expected a simpler expression")

    def whole(self) -> Node:
        node = self.or_()
        if self.token.kind != "end":
            fail(self.text, self.token.position, f"{self.token.text!r} found where an operator or the end was expected")
        return node

    def between(self, op: str, operand: Callable[[], Node], *operators: str) -> Node:
        """Operands with operators between them, as one flat node: a long query does not become a deep tree."""
        position = self.token.position
        operands, found = [operand()], []
        while operator := self.take(*operators):
            found.append(operator.text)
            operands.append(operand())
        return Node(op, tuple(operands), tuple(found), position) if found else operands[0]

    def or_(self) -> Node:
        self.deeper()
        node = self.between("or", self.and_, "or")
        self.depth -= 1
        return node

    def and_(self) -> Node:
        return self.between("and", self.not_, "and")

    def not_(self) -> Node:
        if operator := self.take("not"):
            self.deeper()
            node = Node("not", (self.not_(),), None, operator.position)
            self.depth -= 1
            return node
        return self.comparison()

    def comparison(self) -> Node:
        node = self.between("compare", self.sum_, *COMPARISONS)
        negated = self.take("not")
        if inside := self.take("in"):
            node = Node("in", (node,), self.list_(), inside.position)
            return Node("not", (node,), None, negated.position) if negated else node
        if negated:
            fail(self.text, negated.position, "'not' found where an operator was expected; write `a not in […]`")
        return node

    def list_(self) -> tuple[Any, ...]:
        self.need("[")
        values = []
        while True:
            sign = -1 if self.take("-") else 1
            token = self.token
            if token.kind not in ("number", "string") or (sign < 0 and token.kind == "string"):
                fail(self.text, token.position, f"{token.text!r} found where a number or a string was expected")
            literal = self.atom().value
            values.append(sign * literal if token.kind == "number" else literal)
            if not self.take(","):
                break
        self.need("]")
        return tuple(values)

    def sum_(self) -> Node:
        return self.between("chain", self.product, "+", "-")

    def product(self) -> Node:
        return self.between("chain", self.sign, "*", "/")

    def sign(self) -> Node:
        if operator := self.take("-", "+"):
            self.deeper()
            node = self.sign()
            self.depth -= 1
            return Node("negative", (node,), None, operator.position) if operator.text == "-" else node
        return self.atom()

    def atom(self) -> Node:
        token = self.token
        if self.take("("):
            node = self.or_()
            self.need(")")
            return node
        if token.kind not in ("number", "string", "name"):
            fail(self.text, token.position, f"{token.text!r} found where a name, a number or a string was expected")
        self.at += 1
        if token.kind == "number":
            value = float(token.text)
            if not math.isfinite(value):
                fail(
                    self.text, token.position, f"the number {token.text[:20]} is too large; expected less than 1.8e308"
                )
            return Node("number", (), value, token.position)
        if token.kind == "string":
            return Node("string", (), token.text[1:-1], token.position)
        if token.text.lower() == "nan":
            fail(self.text, token.position, "nothing compares with nan; write isnan(name)")
        if self.take("("):
            if token.text not in FUNCTIONS:
                fail(
                    self.text,
                    token.position,
                    f"unknown function {token.text!r}; expected one of {', '.join(FUNCTIONS)}",
                )
            argument = self.or_()
            self.need(")")
            return Node("call", (argument,), token.text, token.position)
        return Node("name", (), token.text, token.position)


def parse(text: str) -> Node:
    """Read a query; a ``SettingsError`` points at the first character that is not understood."""
    if not text.strip():
        raise SettingsError("the query is empty; expected a condition such as `column_count > 50 and snr > 2`")
    return _Parser(text).whole()


def names(node: Node) -> set[str]:
    """Names that a query uses."""
    own = {node.value} if node.op == "name" else set()
    return own.union(*(names(arg) for arg in node.args))


def unknown_name(name: str, known: Iterable[str]) -> str:
    """What is wrong with a name, the nearest that is known, and all that are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown name {name!r}{hint} Known names: {', '.join(known)}"
