"""Formulas as people and models write them, in LaTeX or in plain text, read into a tree of `formula_values.py`.

    sum      product (("+" | "-") product)*
    product  signed (("*" | "/" | beside) signed)*
    signed   "-" signed | power
    power    atom "!"? ("^" signed)?
    atom     number | name | function power | "(" sum ")" | "{" sum "}" | "|" sum "|" | "\\frac" atom atom

`1 1/2` and `1\\frac{1}{2}` are mixed numbers. What is not of this grammar, is longer than `LONGEST`, deeper than
`DEEPEST`, or is a word (`no` is not n·o) is no formula. Nothing is evaluated while it is read.
"""

from __future__ import annotations

import re
from fractions import Fraction

from .formula_values import FUNCTIONS, Node

LONGEST = 200
"""Characters, and with it tokens."""
DEEPEST = 30
LONGEST_NUMBER = 40
"""Digits."""
_GREEK = "alpha beta gamma delta theta lambda mu phi omega sigma rho tau epsilon".split()  # noqa: SIM905
_NAMES = {"pi", "infty", *_GREEK}
_GREEK_LETTERS = tuple(zip("αβγδθλμφωσρτε", (rf"\{name} " for name in _GREEK), strict=True))
_REPLACED = (
    *((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac"), (r"\left", ""), (r"\right", "")),
    *((r"\cdot", "*"), (r"\times", "*"), ("×", "*"), ("·", "*"), ("⋅", "*"), ("∙", "*"), (r"\div", "/"), ("÷", "/")),
    *(("**", "^"), ("–", "-"), ("π", r"\pi "), ("∞", r"\infty "), ("√", r"\sqrt "), (r"\lvert", "|")),
    *((r"\rvert", "|"), (r"\,", " "), (r"\;", " "), (r"\!", ""), (r"\:", " "), ("\\ ", " "), ("~", " "), ("{,}", "")),
)
_SPACES = re.compile(r"\\(?:quad|qquad)\b")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.?\d*|\.\d+)(?P<power>[eE][+-]?\d{1,3}(?![\w.]))?"
    r"|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>[-+*/^()\[\]{}|!_]))"
)
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
_STARTS_ATOM = ("number", "name", "function", "(", "{", "[")


class NotAFormulaError(ValueError):
    """The text is none."""


def plain_formula(text: str) -> str:
    """`text` with one sign for each operation, however it was written; to be split and read."""
    for written, sign in (*_REPLACED, *_GREEK_LETTERS):
        text = text.replace(written, sign)
    return _SPACES.sub(" ", text)


def read_formula(text: str) -> Node:
    """The tree of a text that `plain_formula` gave.

    Raises:
        NotAFormulaError: it is none.
    """
    if len(text) > LONGEST:
        raise NotAFormulaError
    reader = _Reader(_tokens(text))
    node = reader.sum(0)
    if reader.kind() != "end":
        raise NotAFormulaError
    return node


Token = tuple[str, str]
"""Its kind (number, name, function, a sign) and its text."""


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotAFormulaError
        at = found.end()
        tokens += _named(found, at, text, tokens)
    return tokens


def _named(found: re.Match[str], at: int, text: str, before: list[Token]) -> list[Token]:
    if number := found["number"]:
        if len(number) > LONGEST_NUMBER or (before and before[-1][0] == "name" and text[found.start() - 1].isalpha()):
            raise NotAFormulaError  # H2O is no product
        return [("number", number.replace(",", "") + (found["power"] or ""))]
    if sign := found["sign"]:
        return [(sign, sign)]
    word = found["command"] or found["word"]
    folded = word.lower() if found["word"] else word
    if folded in FUNCTIONS:
        return [("function", folded)]
    if folded == "frac":
        return [("frac", folded)]
    if folded in _NAMES:
        return [("name", folded)]
    if found["command"] or len(word) > 2:
        raise NotAFormulaError
    return [("name", letter) for letter in word]


class _Reader:
    """Tokens, read from left to right by recursive descent."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def kind(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._tokens[at][0] if at < len(self._tokens) else "end"

    def _take(self) -> Token:
        if self.kind() == "end":
            raise NotAFormulaError
        self._at += 1
        return self._tokens[self._at - 1]

    def sum(self, depth: int) -> Node:
        if depth > DEEPEST:
            raise NotAFormulaError
        node = self._product(depth)
        while self.kind() in ("+", "-"):
            sign, _ = self._take()
            right = self._product(depth)
            node = Node("+", (node, right if sign == "+" else Node("neg", (right,))))
        return node

    def _product(self, depth: int) -> Node:
        node = self._signed(depth)
        while True:
            if self.kind() in ("*", "/"):
                sign, _ = self._take()
                node = Node(sign, (node, self._signed(depth)))
            elif self.kind() in _STARTS_ATOM or self.kind() == "frac":
                node = self._beside(node, depth)
            else:
                return node

    def _beside(self, node: Node, depth: int) -> Node:
        """A product without a sign, or a mixed number: a whole one and a fraction of whole ones beside it."""
        whole = node.args[0] if node.op == "neg" else node
        integer = whole.op == "number" and whole.number.denominator == 1
        if integer and (self.kind() == "frac" or [self.kind(ahead) for ahead in range(3)] == ["number", "/", "number"]):
            part = self._power(depth)
            if self.kind() == "/" and part.op == "number":
                self._take()
                part = Node("/", (part, self._power(depth)))
            if part.op == "/" and all(piece.op == "number" for piece in part.args):
                mixed = Node("+", (whole, part))
                return Node("neg", (mixed,)) if node.op == "neg" else mixed
            return Node("*", (node, part))
        if self.kind() == "number":
            raise NotAFormulaError  # `2 3` is two numbers
        return Node("*", (node, self._power(depth)))

    def _signed(self, depth: int) -> Node:
        if depth > DEEPEST:
            raise NotAFormulaError
        if self.kind() in ("-", "+"):
            sign, _ = self._take()
            inner = self._signed(depth + 1)
            return Node("neg", (inner,)) if sign == "-" else inner
        return self._power(depth)

    def _power(self, depth: int) -> Node:
        node = self._atom(depth)
        if self.kind() == "!":
            self._take()
            node = Node("!", (node,))
        if self.kind() == "^":
            self._take()
            node = Node("^", (node, self._signed(depth + 1)))
        return node

    def _atom(self, depth: int) -> Node:
        if depth > DEEPEST:
            raise NotAFormulaError
        kind, text = self._take()
        if kind == "number":
            return Node("number", number=Fraction(text))
        if kind == "name":
            return Node("name", name=text)
        if kind == "frac":
            return Node("/", (self._short(depth + 1), self._short(depth + 1)))
        if kind == "function":
            return self._function(text, depth + 1)
        if kind in _CLOSING:
            node = self.sum(depth + 1)
            if self._take()[0] != _CLOSING[kind]:
                raise NotAFormulaError
            return Node("abs", (node,)) if kind == "|" else node
        raise NotAFormulaError

    def _function(self, name: str, depth: int) -> Node:
        if name == "sqrt" and self.kind() == "[":  # \sqrt[3]{8}
            root = self._atom(depth)
            return Node("^", (self._atom(depth), Node("/", (Node("number", number=Fraction(1)), root))))
        if name == "log" and self.kind() == "_":  # \log_2 8
            self._take()
            base = self._atom(depth)
            return Node("/", (Node("ln", (self._power(depth),)), Node("ln", (base,))))
        if self.kind() == "^":  # \sin^2 x
            self._take()
            power = self._atom(depth)
            return Node("^", (Node(name, (self._power(depth),)), power))
        return Node(name, (self._power(depth) if name != "sqrt" else self._short(depth),))

    def _short(self, depth: int) -> Node:
        """An argument; without braces one digit, as LaTeX has it: `\\frac12` is one half."""
        kind, text = self._tokens[self._at] if self.kind() != "end" else ("end", "")
        if (
            kind == "number"
            and self._at
            and self._tokens[self._at - 1][0] in ("frac",)
            and text.isdigit()
            and len(text) == 2
        ):
            self._tokens[self._at : self._at + 1] = [("number", text[0]), ("number", text[1])]
        return self._atom(depth)
