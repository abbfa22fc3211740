"""Lengths of axes: integers, and products of symbols such as `12*batch`.

Two lengths that compare equal are the same number whenever the model runs. Of two that do not, nothing is
known, unless both are integers. An axis of which nothing is said gets a symbol of its own (onnx does that too,
and calls it `unk__7`), so that it is recognised where it turns up again.
"""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

#: What the symbol of an unnamed axis begins with where onnx has made it, and here; no name in a file does.
ONNX_UNNAMED, _UNNAMED = "unk__", "\0"

#: What exporters write for "any", though by the standard it would be one length wherever it stands.
_SAYS_NOTHING = re.compile(r"[\W\d]*|none|unknown|any|dynamic", re.IGNORECASE)

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Product:
    """`factor` (at least 1) times one symbol or more, in order."""

    factor: int
    symbols: tuple[str, ...]


Length = int | Product
Lengths = tuple[Length, ...]


def unnamed() -> Product:
    """A length of which nothing is known."""
    return Product(1, (f"{_UNNAMED}{next(_numbers)}",))


@functools.lru_cache(maxsize=1 << 14)
def computed(*how: Hashable) -> Product:
    """The length that follows from others in this way: nobody knows it, but it is the same each time."""
    return unnamed()


def read(length: int | str | None) -> Length:
    """`"196*s77"` is 196 times a symbol; what is no product is a symbol as a whole."""
    if isinstance(length, int):
        return length
    named = None if length is None else _named(length)
    return unnamed() if named is None else named


@functools.lru_cache(maxsize=1 << 14)
def _named(length: str) -> Length | None:
    if _SAYS_NOTHING.fullmatch(length):
        return None
    parts = length.split("*")
    if not all(re.fullmatch(r"\w+", part) for part in parts):
        return Product(1, (length,))
    factor = math.prod(int(part) for part in parts if part.isdecimal())
    symbols = tuple(sorted(part for part in parts if not part.isdecimal()))
    return Product(factor, symbols) if factor else 0


def written(length: Length, name: Callable[[str], str]) -> int | str | None:
    """The length as a graph states it, with a `name` for each symbol made here.

    An axis of length 0 is not stated: exporters write 0 for "any".
    """
    if isinstance(length, int):
        return length if length > 0 else None
    symbols = [name(symbol) if symbol.startswith(_UNNAMED) else symbol for symbol in length.symbols]
    if length.factor == 1 and len(symbols) == 1:
        return symbols[0]
    if not all(re.fullmatch(r"\w+", symbol) for symbol in symbols):
        return None
    return "*".join([*([str(length.factor)] if length.factor > 1 else []), *symbols])


def is_unnamed(length: Length) -> bool:
    """Does a symbol occur in it that nobody has named?"""
    if isinstance(length, int):
        return False
    return any(symbol.startswith((_UNNAMED, ONNX_UNNAMED)) for symbol in length.symbols)


def settled(length: Length, known: Mapping[str, int]) -> Length:
    """The length with the symbols replaced that have turned out to be numbers."""
    if isinstance(length, int) or known.keys().isdisjoint(length.symbols):
        return length
    numbers = [known[symbol] for symbol in length.symbols if symbol in known]
    return _product(length.factor * math.prod(numbers), [s for s in length.symbols if s not in known])


def solved(length: Length, number: int) -> tuple[str, int] | None:
    """What the one unnamed symbol is, where this length is `number`."""
    if isinstance(length, int) or len(length.symbols) > 1 or not is_unnamed(length):
        return None
    if number <= 0 or number % length.factor:
        return None
    return length.symbols[0], number // length.factor


def times(a: Length, b: Length) -> Length:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    (factor_a, symbols_a), (factor_b, symbols_b) = _parts(a), _parts(b)
    return _product(factor_a * factor_b, [*symbols_a, *symbols_b])


def product(lengths: Iterable[Length]) -> Length:
    total: Length = 1
    for length in lengths:
        total = times(total, length)
    return total


def over(a: Length, b: Length) -> Length | None:
    """a / b where it certainly divides; b is not 0 in any run that gets there."""
    (factor_a, symbols_a), (factor_b, symbols_b) = _parts(a), _parts(b)
    left = Counter(symbols_a)
    left.subtract(symbols_b)
    if factor_b <= 0 or factor_a % factor_b or any(count < 0 for count in left.values()):
        return None
    return _product(factor_a // factor_b, left.elements())


def crossed_out(a: Length, b: Length) -> tuple[Length, Length]:
    """What is left of both without the symbols that they share (and no run goes through an empty axis)."""
    (factor_a, symbols_a), (factor_b, symbols_b) = _parts(a), _parts(b)
    left, right = Counter(symbols_a), Counter(symbols_b)
    return _product(factor_a, (left - right).elements()), _product(factor_b, (right - left).elements())


def plus(a: Length, b: Length) -> Length | None:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    (factor_a, symbols_a), (factor_b, symbols_b) = _parts(a), _parts(b)
    return Product(factor_a + factor_b, symbols_a) if symbols_a == symbols_b else None


def broadcast(a: Length, b: Length) -> Length:
    """The length of two axes that are broadcast against each other. Raises ValueError where they cannot be.

    A symbol beside a number that is not 1 is that number, or is 1: both give the number.
    """
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) and isinstance(b, int):
        raise ValueError(f"lengths {a} and {b} cannot be broadcast")
    if isinstance(a, int):
        return a
    return b if isinstance(b, int) else computed("broadcast", frozenset([a, b]))


def broadcast_shapes(shapes: Iterable[Lengths]) -> Lengths:
    result: Lengths = ()
    for shape in shapes:
        if shape == result:
            continue
        rank = max(len(result), len(shape))
        padded = [(1,) * (rank - len(each)) + each for each in (result, shape)]
        result = tuple(broadcast(a, b) for a, b in zip(*padded, strict=True))
    return result


def _parts(length: Length) -> tuple[int, tuple[str, ...]]:
    return (length, ()) if isinstance(length, int) else (length.factor, length.symbols)


def _product(factor: int, symbols: Iterable[str]) -> Length:
    ordered = tuple(sorted(symbols))
    if not ordered or factor == 0:
        return factor
    if factor < 0:
        raise ValueError(f"{factor} times {'*'.join(ordered)} is no length")
    return Product(factor, ordered)
