"""Rounding, blocks of rows and lazy products, each against exact numbers."""

from fractions import Fraction
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtool import values
from normtool.proof import HALF_ULP, _within_half_ulp, ulp_distance
from normtool.values import (
    EXTENDED,
    Computed,
    Dense,
    Rounded,
    Scaled,
    byte_count,
    element_count,
    is_float,
    round_to,
    row_blocks,
    to_array,
    working_dtype,
)

Array = np.ndarray[Any, Any]

HALF_TYPES = [
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fnuz,
    ml_dtypes.float8_e5m2fnuz,
]
WIDE_TYPES = [np.float64, EXTENDED]


def each(types: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", [np.dtype(t) for t in types], ids=lambda dtype: dtype.name)


half_types = each(HALF_TYPES)
wide_types = pytest.mark.parametrize("wide", WIDE_TYPES, ids=["from-float64", "from-extended"])


def finite_codes(dtype: np.dtype[Any]) -> Array:
    """Bit patterns of every finite number ≥ 0, ascending."""
    codes = np.arange(1 << (dtype.itemsize * 8 - 1)).astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # some of the patterns are signalling NaNs
        return codes[np.isfinite(numbers(codes, dtype))]


def numbers(codes: Array, dtype: np.dtype[Any]) -> Array:
    return codes.view(dtype).astype(np.float64)


class TestRoundTo:
    """Nearest, ties to the even pattern, decided once: at every tie that the type has."""

    @wide_types
    @half_types
    @pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
    def test_every_tie(self, dtype, wide, sign):
        codes = finite_codes(dtype)
        numeric = numbers(codes, dtype).astype(wide)
        lower, upper = numeric[:-1], numeric[1:]
        ties = (lower + upper) / 2
        even = np.where(codes[:-1] % 2 == 0, lower, upper)
        for given_, expected in (
            (ties, even),
            (np.nextafter(ties, wide(np.inf)), upper),  # float32 would call these ties
            (np.nextafter(ties, wide(0)), lower),
            (np.nextafter(lower, wide(np.inf)), lower),
            (np.nextafter(upper, wide(0)), upper),
            (numeric, numeric),
        ):
            got = round_to(sign * given_, dtype)
            assert got.dtype == dtype
            assert np.array_equal(got.astype(np.float64), sign * expected.astype(np.float64))

    def test_ml_dtypes_alone_rounds_twice(self):
        """The reason for the detour: a number just above a tie is taken for the tie."""
        above = np.nextafter(np.float64(1 + 2.0**-8), np.inf)
        assert float(above.astype(ml_dtypes.bfloat16)) == 1.0
        assert float(round_to(np.array(above), np.dtype(ml_dtypes.bfloat16))) == 1 + 2.0**-7

    @wide_types
    @half_types
    def test_overflow(self, dtype, wide):
        """To infinity, or NaN where the type has none; half an ulp past the largest is where it begins."""
        codes = finite_codes(dtype)
        below, largest = numbers(codes[-2:], dtype).astype(wide)
        tie = largest + (largest - below) / 2
        stays = np.array([largest, np.nextafter(tie, wide(0))])
        goes = np.array([np.nextafter(tie, wide(np.inf)), 2 * largest, 1e300, np.inf])
        assert np.all(round_to(stays, dtype).astype(np.float64) == float(largest))
        assert not np.isfinite(round_to(goes, dtype).astype(np.float64)).any()
        assert not np.isfinite(round_to(-goes, dtype).astype(np.float64)).any()

    @wide_types
    @half_types
    def test_tiny(self, dtype, wide):
        smallest = wide(numbers(finite_codes(dtype)[1:2], dtype)[0])
        tiny = np.array([1e-300, smallest / 4, np.nextafter(smallest / 2, wide(0)), smallest / 2], wide)
        assert np.all(round_to(tiny, dtype).astype(np.float64) == 0)
        above = np.nextafter(smallest / 2, wide(1))
        assert round_to(np.array(above), dtype).astype(np.float64) == smallest

    @half_types
    def test_what_is_no_number(self, dtype):
        got = round_to(np.array([np.nan, -np.nan]), dtype).astype(np.float64)
        assert np.isnan(got).all()
        if not dtype.name.endswith("uz"):  # those have no negative zero
            assert np.signbit(round_to(np.array(-0.0), dtype).astype(np.float64))

    @pytest.mark.skipif(np.finfo(EXTENDED).nmant < 60, reason="no wider type than float64 here")
    @pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 24), (np.float64, 53)])
    @given(st.integers(0, 2**60), st.integers(-120, 60), st.booleans())
    @settings(deadline=None, max_examples=200)
    def test_full_types_from_extended(self, dtype, bits, mantissa, exponent, negative):
        """Against integers: keep `bits` bits of a 64-bit mantissa, ties to even."""
        mantissa |= 1 << 60
        cut = 61 - bits
        kept, rest = mantissa >> cut, mantissa & ((1 << cut) - 1)
        half = 1 << (cut - 1)
        kept += rest > half or (rest == half and kept % 2 == 1)
        sign = -1 if negative else 1
        exact = np.ldexp(
            EXTENDED(sign) * EXTENDED(mantissa >> 30) * 2**30 + sign * (mantissa & (2**30 - 1)), exponent
        )
        got = round_to(np.array(exact), np.dtype(dtype))
        assert Fraction(*got[()].as_integer_ratio()) == sign * Fraction(kept << cut) * Fraction(2) ** exponent

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)], ids=str)
    @half_types
    def test_shape(self, dtype, shape):
        assert round_to(np.ones(shape), dtype).shape == shape


class TestUlpDistance:
    @each([*HALF_TYPES, np.float32, np.float64])
    @given(st.data())
    @settings(deadline=None, max_examples=150)
    def test_against_fractions(self, dtype, data):
        """One unit is the step from the stored number to the next larger one of its type."""
        largest, first_normal = (code_of(n, dtype) for n in (limits(dtype).max, limits(dtype).smallest_normal))
        code = data.draw(
            st.one_of(
                st.integers(1, largest - 1),
                st.integers(1, first_normal + 2),
                st.just(first_normal - 1),
            )
        )
        (stored,) = np.array([code], f"u{dtype.itemsize}").view(dtype)
        offset = Fraction(data.draw(st.integers(-(2**20), 2**20)), 2**18) * step(stored)
        sign = data.draw(st.sampled_from([1, -1]))
        wanted = EXTENDED(float(exact(stored) + offset))  # rounded to float64, which moves it again:
        expected = abs(exact(stored) - Fraction(*wanted.as_integer_ratio())) / step(stored)
        got = ulp_distance(np.array([sign * stored], dtype), np.array([sign * wanted]))
        assert got[0] == pytest.approx(float(expected), rel=1e-15, abs=0)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_below_float64(self, dtype):
        """Extended numbers between two neighbours: what the proof is about."""
        stored = np.array([1, 1.5, 2.0**-126, 3e-310 if dtype is np.float64 else 1e-44], dtype)
        step = np.spacing(stored).astype(EXTENDED)
        for part in (EXTENDED(1) / 4, EXTENDED(1) / 2, EXTENDED(3) / 4, EXTENDED(7)):
            assert np.array_equal(ulp_distance(stored, stored.astype(EXTENDED) + part * step), np.full(4, part))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("scale", [1e-45, 1e-38, 1.0, 1e38], ids=str)
    def test_the_short_way_takes_a_rounding_and_no_neighbour_of_it(self, dtype, scale):
        exact = np.random.default_rng(0).uniform(1, 3, 1000).astype(EXTENDED) * EXTENDED(scale)
        stored = exact.astype(dtype)
        for each, wanted in zip(stored[:, None], exact[:, None], strict=True):
            assert _within_half_ulp(each, wanted)
            for neighbour in (np.nextafter(each, dtype(0)), np.nextafter(each, dtype(np.inf))):
                far = ulp_distance(neighbour, wanted)[0] > HALF_ULP
                assert not (far and _within_half_ulp(neighbour, wanted))
        assert not _within_half_ulp(np.nextafter(stored, dtype(0)), exact)
        assert _within_half_ulp(stored[0].reshape(()), exact[0].reshape(()))

    @each([*HALF_TYPES, np.float32])
    @given(st.floats(allow_nan=False, allow_infinity=False))
    @settings(deadline=None, max_examples=150)
    def test_a_correct_rounding_is_within_half_an_ulp(self, dtype, number):
        wide = np.array([number])
        stored = round_to(wide, dtype)
        if np.isfinite(stored.astype(np.float64)).all():
            assert ulp_distance(stored, wide.astype(EXTENDED))[0] <= 0.5 < HALF_ULP

    @each([*HALF_TYPES, np.float32, np.float64])
    def test_stored_zero(self, dtype):
        """Its last place is the smallest number of the type, so nothing can underflow unnoticed."""
        smallest = EXTENDED(float(limits(dtype).smallest_subnormal))
        wanted = np.array([0, smallest / 2, smallest, 3 * smallest, -smallest])
        assert ulp_distance(np.zeros(5, dtype), wanted).tolist() == [0, 0.5, 1, 3, 1]

    @half_types
    def test_one_off_is_noticed(self, dtype):
        codes = finite_codes(dtype)[1:]
        assert np.all(ulp_distance(codes[:-1].view(dtype), numbers(codes[1:], dtype).astype(EXTENDED)) == 1)
        assert np.all(ulp_distance(codes[1:].view(dtype), numbers(codes[:-1], dtype).astype(EXTENDED)) >= 0.5)


def exact(number: Any) -> Fraction:
    return Fraction(float(number))


def step(number: Any) -> Fraction:
    """From a stored number to the next larger one of its type: count one up in its bits."""
    bits = np.abs(np.array(number)).view(f"u{number.dtype.itemsize}")
    return exact((bits + 1).view(number.dtype)) - exact(abs(number))


def limits(dtype: np.dtype[Any]) -> Any:
    return np.finfo(dtype) if dtype in (np.float16, np.float32, np.float64) else ml_dtypes.finfo(dtype)


def code_of(number: Any, dtype: np.dtype[Any]) -> int:
    return int(np.array(number, dtype).view(f"u{dtype.itemsize}"))


shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


class TestRowBlocks:
    @given(shapes, st.integers(1, 60))
    @settings(deadline=None, max_examples=200)
    def test_covers_exactly(self, shape, block):
        with mock.patch.object(values, "BLOCK", block):
            blocks = list(row_blocks(Dense(np.empty(shape))))
        rows = shape[0] if shape else 1
        assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
        per_row = element_count(shape[1:])
        assert all(stop - start == 1 or (stop - start) * per_row <= block for start, stop in blocks)
        assert all(stop > start for start, stop in blocks)

    def test_blocks_are_as_large_as_allowed(self):
        with mock.patch.object(values, "BLOCK", 10):
            assert list(row_blocks(Dense(np.empty((7, 3))))) == [(0, 3), (3, 6), (6, 7)]


STORED = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32, np.float64]


@each(STORED)
class TestScaled:
    @given(data=st.data())
    @settings(deadline=None, max_examples=60)
    def test_rows_equal_the_whole(self, dtype, data):
        shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
        factor_shape = tuple(data.draw(st.sampled_from([1, n])) for n in shape)
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        source = rng.standard_normal(shape).astype(dtype)
        kept = source.copy()
        factor = rng.standard_normal(factor_shape).astype(EXTENDED)
        scaled = Scaled(Dense(source), factor)
        wide = working_dtype(dtype)
        product = source.astype(wide) * factor.astype(wide)
        whole = round_to(product, dtype)
        assert (scaled.shape, scaled.dtype) == (shape, dtype)
        rows = shape[0] if shape else 1
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        expected = (whole[start:stop], product[start:stop]) if shape else (whole, product)
        got = scaled.rows(start, stop), scaled.exact_rows(start, stop)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
        assert np.array_equal(to_array(scaled), whole)
        assert np.array_equal(source, kept)  # nothing was multiplied in place

    def test_against_fractions(self, dtype):
        """Multiplied wide and rounded once, not twice."""
        rng = np.random.default_rng(0)
        source = rng.standard_normal(300).astype(dtype)
        factor = rng.standard_normal(300)
        got = Scaled(Dense(source), factor).rows(0, 300)
        for stored, a, b in zip(got, source, factor, strict=True):
            assert abs(exact(stored) - exact(a) * exact(b)) <= Fraction(HALF_ULP) * step(stored)


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "count", "size"),
        [
            ("float64", 3, 24),
            ("bfloat16", 3, 6),
            ("float8_e5m2", 3, 3),
            ("bool", 3, 3),
            ("int8", 3, 3),
            ("complex64", 3, 24),
            ("int4", 7, 4),
            ("uint4", 8, 4),
            ("float4_e2m1fn", 1, 1),
            ("int2", 9, 3),
            ("uint2", 0, 0),
        ],
    )
    def test_byte_count(self, name, count, size):
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        assert byte_count(Dense(np.zeros(count, dtype))) == size

    def test_counts_do_not_overflow(self):
        assert element_count((2**40, 2**40, 3)) == 3 * 2**80

    @pytest.mark.parametrize(("name", "answer"), [("bfloat16", True), ("float8_e4m3fn", True), ("int4", False)])
    def test_is_float(self, name, answer):
        assert is_float(np.dtype(getattr(ml_dtypes, name))) is answer

    def test_what_is_stored_is_the_rounding_of_the_exact_rows(self):
        """The proof looks at the exact rows alone, and rounds them itself."""
        thirds = np.arange(12).reshape(4, 3) / EXTENDED(3)
        values = [
            Rounded(thirds, np.dtype(np.float32)),
            Computed((4, 3), np.dtype(np.float32), lambda: thirds),
            Scaled(Dense(thirds.astype(np.float32)), np.full((4, 1), 1 / EXTENDED(7))),
        ]
        for value in values:
            assert np.array_equal(value.rows(1, 3), round_to(value.exact_rows(1, 3), value.dtype))

    def test_rounded_holds_the_exact_values_too(self):
        value = Rounded(np.array([1 / EXTENDED(3), 2]), np.dtype(np.float16))
        assert value.rows(0, 1) == np.float16(1 / 3)
        assert value.exact_rows(0, 1) == 1 / EXTENDED(3)
