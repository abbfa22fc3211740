"""Arithmetic with the elements of small tensors that are made of lengths.

An element is a number, a product of symbols (`lengths.Product`), or None where nothing is known of it. Only
exact arithmetic is followed: a sum of two symbols is unknown, and so is 0.7·10 in float32.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from normtool.lengths import Length, Product, over, plus, times
from normtool.values import Array

Element = Length | Fraction | None

#: Integers up to here are exact in float32; quotients of those up to the second are rounded to no integer.
_EXACT, _EXACT_QUOTIENT = 1 << 24, 1 << 20


def listed(elements: list[Any], shape: tuple[int, ...]) -> Array:
    """An array of elements, which numpy is not to look into."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def fitted(elements: Array, dtype: np.dtype[Any] | None) -> Array:
    """The elements as `dtype` holds them: None for what it cannot hold, or would round."""
    return listed([_held(each, dtype) for each in elements.reshape(-1)], elements.shape)


def _held(element: Element, dtype: np.dtype[Any] | None) -> Element:
    if dtype is None:
        return None if isinstance(element, Fraction) else element
    if dtype.kind == "f" and dtype.itemsize >= 4:
        return None if isinstance(element, int) and abs(element) > _EXACT else element
    if dtype.kind in "iu" and not isinstance(element, Fraction):
        if isinstance(element, Product):
            return element if dtype.itemsize >= 4 else None
        limits = np.iinfo(dtype)
        return element if element is None or limits.min <= element <= limits.max else None
    return element if isinstance(element, bool) else None


def cast(element: Element, dtype: np.dtype[Any]) -> Element:
    if isinstance(element, Fraction) and dtype.kind in "iu":
        return int(element)  # towards 0
    if dtype.kind == "b" and isinstance(element, int):
        return bool(element)
    return int(element) if isinstance(element, bool) else element


# ---- arithmetic -------------------------------------------------------------------------------


def number(exact: Fraction) -> Element:
    """A float32, as an int where it is one; None where it would be rounded."""
    if exact.denominator == 1:
        return exact.numerator
    is_binary = exact.denominator & (exact.denominator - 1) == 0
    return exact if is_binary and max(abs(exact.numerator), exact.denominator) <= _EXACT else None


def _is_rounded(element: Element) -> bool:
    """Is it a quotient such as 7/3, which stands here as it is and in the model rounded?"""
    return isinstance(element, Fraction) and number(element) is None


def add(a: Element, b: Element) -> Element:
    if a is None or b is None or _is_rounded(a) or _is_rounded(b):
        return None
    if isinstance(a, Fraction) or isinstance(b, Fraction):
        return None if isinstance(a, Product) or isinstance(b, Product) else number(Fraction(a) + b)
    return plus(a, b)


def subtract(a: Element, b: Element) -> Element:
    if isinstance(a, Product) and isinstance(b, Product):
        if a.symbols != b.symbols or a.factor < b.factor:
            return None
        return Product(a.factor - b.factor, a.symbols) if a != b else 0
    if b == 0:
        return a
    return None if b is None or isinstance(b, Product) else add(a, -b)


def multiply(a: Element, b: Element) -> Element:
    if a is None or b is None or _is_rounded(a) or _is_rounded(b):
        return None
    if isinstance(a, Fraction) or isinstance(b, Fraction):
        if not isinstance(a, Product) and not isinstance(b, Product):
            return number(Fraction(a) * b)
        length, part = (a, b) if isinstance(a, Product) else (b, a)
        scaled = length.factor * part if isinstance(length, Product) and isinstance(part, Fraction) else None
        whole = scaled is not None and scaled > 0 and scaled.denominator == 1
        return Product(int(scaled), length.symbols) if whole else None  # type: ignore[arg-type, union-attr]
    negative = any(isinstance(each, int) and each < 0 for each in (a, b))
    return None if negative and (isinstance(a, Product) or isinstance(b, Product)) else times(a, b)


def divide(a: Element, b: Element) -> Element:
    """Of floats. A quotient stays as it is until it is cut to an integer."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0 or max(abs(a), abs(b)) > _EXACT_QUOTIENT:
            return None
        quotient = Fraction(a, b)
        return quotient.numerator if quotient.denominator == 1 else quotient
    if a is None or b is None or isinstance(a, Fraction) or isinstance(b, Fraction):
        return None
    return over(a, b)


def divide_integers(a: Element, b: Element) -> Element:
    """Towards 0, as C does."""
    if isinstance(a, int) and isinstance(b, int):
        return int(Fraction(a, b)) if b else None
    return divide(a, b)


def divide_exactly(a: Element, b: Element) -> Element:
    """Where nothing says whether integers are divided or floats."""
    quotient = divide(a, b)
    return None if isinstance(quotient, Fraction) else quotient


def remainder(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return a % b if a >= 0 and b > 0 else None
    if isinstance(a, Product) and isinstance(b, int):
        return 0 if b > 0 and a.factor % b == 0 else None
    return None


def round_down(a: Element) -> Element:
    return a.__floor__() if isinstance(a, Fraction) else a


def round_up(a: Element) -> Element:
    return a.__ceil__() if isinstance(a, Fraction) else a


def negate(a: Element) -> Element:
    return None if a is None or isinstance(a, Product) else -a


def larger(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return a if a == b else _length_beside(a, b)


def _length_beside(a: Element, b: Element) -> Element:
    """No length is below 0."""
    if isinstance(a, Product) and isinstance(b, int) and b <= 0:
        return a
    return b if isinstance(b, Product) and isinstance(a, int) and a <= 0 else None


def smaller(a: Element, b: Element) -> Element:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a if a == b else None


def equal(a: Element, b: Element) -> Element:
    if a is None or b is None or _is_rounded(a) or _is_rounded(b):
        return None
    if a == b:
        return True
    one, other = (a, b) if isinstance(a, Product) else (b, a)
    if isinstance(one, Product):
        return False if not isinstance(other, Product) and other < 0 else None
    return False


def choose(condition: Element, a: Element, b: Element) -> Element:
    if isinstance(condition, bool):
        return a if condition else b
    return a if a == b else None


def elementwise(function: Callable[..., Element], *operands: Array) -> Array:
    result = np.frompyfunc(function, len(operands), 1)(*operands)
    return result if isinstance(result, np.ndarray) else listed([result], ())
