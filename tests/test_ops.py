"""Every row of the operator table against the schemas of onnx, of ONNX Runtime for its own, and of torch."""

from collections.abc import Iterator
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from normtool.ops import ATEN, MICROSOFT, ROWS, TABLE, OpRow, Spelling, aten_spellings, find_spelling, slot_name
from normtool.planner import OLDEST_OPSET

#: Slots that only a later version of the operator has; they come last and stay empty before.
LATER_SLOTS = {("Pad", 11): 1, ("Pad", 13): 1, ("Upsample", 7): 1}

#: Spellings that no schema describes, though files use them.
WITHOUT_SCHEMA = {
    (MICROSOFT, "SimplifiedLayerNormalization"),
    (MICROSOFT, "MatMulInteger"),
    ("", "SkipLayerNormalization"),
    ("", "SkipSimplifiedLayerNormalization"),
}

#: Slot → what the schemas call it. A slot that is not here goes by its own name.
SCHEMA_NAMES = {
    "x": "x input data",
    "a": "a x",  # Where
    "b": "b y",  # Where
    "weight": "w scale weight gamma",
    "bias": "b bias beta",
    "skip_bias": "bias",
    "mean": "mean input_mean",
    "var": "var input_var",
    "table": "data",
    "condition": "cond condition",
    "slope": "slope",
    "exponent": "y",
    "like": "target_type",
    "value": "constant_value",
    "shape": "shape input",
    "trip_count": "m",
    "carried": "v_initial",
    "scale": "x_scale y_scale",
    "zero_point": "x_zero_point y_zero_point",
    "weight_scale": "w_scale",
    "weight_zero_point": "w_zero_point b_zero_point",
}

#: Attributes that only some versions of their operator have; elsewhere the default stands in for it.
IN_SOME_VERSIONS = {
    ("batch_norm", "training_mode"),
    ("batch_norm", "spatial"),
    ("batch_norm", "is_test"),
    ("reshape", "allowzero"),
    ("shape", "start"),
    ("quantize_linear", "axis"),
    ("dequantize_linear", "axis"),
    ("average_pool", "ceil_mode"),
    ("max_pool", "ceil_mode"),
    *((f"reduce_{each}", "noop_with_empty_axes") for each in ("mean", "sum", "prod", "sum_square", "l1", "l2")),
}

standard_schemas = onnx.defs.get_all_schemas_with_history()
runtime_schemas = getattr(runtime, "get_all_operator_schema", list)()


def schemas_of(domain: str, op_type: str) -> list[Any]:
    """Every version of one operator, in force or not."""
    for known in (standard_schemas, runtime_schemas):
        found = [schema for schema in known if (schema.domain, schema.name) == (domain, op_type)]
        if found:
            return found
    return []


def cases() -> Iterator[Any]:
    """(row, spelling, schema) for each version of each operator that a model we fold may use."""
    for row in TABLE:
        for op_type, domain in dict.fromkeys((s.op_type, s.domain) for s in onnx_spellings(row)):
            schemas = sorted(schemas_of(domain, op_type), key=lambda schema: schema.since_version)
            ends = [*(schema.since_version for schema in schemas[1:]), 10**6]
            for schema, end in zip(schemas, ends, strict=False):  # none at all, for some
                version = schema.since_version if domain else max(schema.since_version, OLDEST_OPSET)
                if version >= end or schema.deprecated:
                    continue
                spelling, found = found_in(domain, op_type, version)
                assert found is row
                name = f"{domain}::{op_type}" if domain else op_type
                yield pytest.param(row, spelling, schema, id=f"{name}-{schema.since_version}")


def onnx_spellings(row: OpRow) -> list[Spelling]:
    return [spelling for spelling in row.spellings if spelling.domain != ATEN]


def found_in(domain: str, op_type: str, version: int) -> tuple[Spelling, OpRow]:
    found = find_spelling(domain, op_type, version)
    assert found is not None
    return found


def is_variadic(parameters: Any) -> bool:
    return bool(parameters) and parameters[-1].option == type(parameters[-1].option).Variadic


every_schema = pytest.mark.parametrize(("row", "spelling", "schema"), list(cases()))


@every_schema
def test_slots(row, spelling, schema):
    """As many as the schema has inputs, and in the same order."""
    if spelling.slots == ("inputs*",):
        assert is_variadic(schema.inputs)
        return
    later = LATER_SLOTS.get((schema.name, schema.since_version), 0)
    slots = spelling.slots[: len(spelling.slots) - later]
    assert len(slots) == len(schema.inputs)
    assert any(slot.endswith("*") for slot in slots) == is_variadic(schema.inputs)
    for slot, parameter in zip(slots, schema.inputs, strict=True):
        bare = slot.removesuffix("*")
        assert parameter.name.lower() in SCHEMA_NAMES.get(bare, bare).split()


@every_schema
def test_outputs(row, spelling, schema):
    """A name for each; the names of optional ones are ours."""
    if is_variadic(schema.outputs):
        assert row.outputs[-1].endswith("*")
    else:
        assert len(row.outputs) >= len(schema.outputs)
        assert len(set(row.outputs)) == len(row.outputs)


@every_schema
def test_defaults(row, spelling, schema):
    """Bit for bit what the schema says, float32 included."""
    for name, value in row.defaults.items():
        attribute = schema.attributes.get(name)
        if attribute is None:
            assert (row.kind, name) in IN_SOME_VERSIONS
            continue
        default = default_of(attribute)
        assert default is None or (type(default), default) == (type(value), value)


def default_of(attribute: Any) -> Any:
    stored = attribute.default_value if hasattr(attribute, "default_value") else attribute._default_value
    if isinstance(stored, bytes):
        stored = onnx.AttributeProto.FromString(stored)
    if not stored.type:
        return None
    value = onnx.helper.get_attribute_value(stored)
    return value.decode() if isinstance(value, bytes) else value


# ---- ATen ---------------------------------------------------------------------------------------

aten_rows = [(row, spelling) for row in TABLE for spelling in row.spellings if spelling.domain == ATEN]
every_aten_row = pytest.mark.parametrize(
    ("row", "spelling"), aten_rows, ids=[f"{row.kind}-{spelling.op_type}" for row, spelling in aten_rows]
)


def aten_schemas(op_type: str) -> list[Any]:
    """Every overload but the `out=` ones, which have arguments that nobody exports."""
    packet = getattr(torch.ops.aten, op_type)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return [s for s in schemas if not any(a.is_out for a in s.arguments)]


def normalised(argument: str) -> str:
    """fx's normalized_arguments calls `self` `input`."""
    return "input" if argument == "self" else argument


@every_aten_row
def test_aten_arguments_exist(row, spelling):
    """Each argument of the row is one of the operator, and so is each value it insists on."""
    known = {normalised(a.name) for schema in aten_schemas(spelling.op_type) for a in schema.arguments}
    assert known
    assert set(spelling.arguments) | set(spelling.required) <= known
    assert not set(spelling.arguments) & set(spelling.required)


@every_aten_row
def test_aten_row_covers_an_overload(row, spelling):
    """What no row says makes the op unknown, unless it is None; one overload needs no more."""
    said = set(spelling.arguments) | set(spelling.required)
    left = [
        {
            normalised(a.name)
            for a in schema.arguments
            if not a.has_default_value() or a.default_value is not None
        }
        - said
        for schema in aten_schemas(spelling.op_type)
    ]
    assert set() in left


@every_aten_row
def test_aten_arguments_go_to_known_slots(row, spelling):
    """No two arguments to one slot, and every tensor to a slot that ONNX's spellings have too."""
    canonical = [name for name in spelling.arguments.values() if name]
    assert len(set(canonical)) == len(canonical)
    slots = {slot.removesuffix("*") for s in onnx_spellings(row) for slot in s.slots}
    tensors = {
        spelling.arguments.get(normalised(a.name), "")
        for schema in aten_schemas(spelling.op_type)
        for a in schema.arguments
        if str(a.type) in ("Tensor", "Optional[Tensor]", "List[Tensor]")
    } - {""}
    assert not onnx_spellings(row) or tensors <= slots | STATISTICS.get(row.kind, set())


#: Tensors that only ATen's operator reads.
STATISTICS = {"instance_norm": {"mean", "var"}}


@every_aten_row
def test_aten_in_place_namesake_takes_the_same_arguments(row, spelling):
    """`relu_` has the row of `relu`."""
    if not hasattr(torch.ops.aten, f"{spelling.op_type}_"):
        return
    packet = getattr(torch.ops.aten, f"{spelling.op_type}_")
    written = [getattr(packet, overload)._schema.arguments for overload in packet.overloads()]
    plain = {normalised(a.name) for schema in aten_schemas(spelling.op_type) for a in schema.arguments}
    assert all({normalised(a.name) for a in arguments} <= plain for arguments in written)


@pytest.mark.parametrize(
    ("op_type", "kinds"),
    [
        ("convolution", ["conv", "conv_transpose"]),
        ("adaptive_avg_pool2d", ["adaptive_average_pool", "global_average_pool"]),
        ("flatten", ["reshape"]),
        ("relu", ["relu"]),
        ("nothing", []),
    ],
)
def test_aten_spellings(op_type, kinds):
    assert sorted(row.kind for _, row in aten_spellings(op_type)) == kinds


class TestTable:
    def test_an_aten_spelling_hides_none_behind_it(self):
        """The first whose values are right is taken; one that insists on none takes every call."""
        for op_type in {spelling.op_type for _, spelling in aten_rows}:
            insisting = [bool(spelling.required) for spelling, _ in aten_spellings(op_type)]
            assert all(insisting[:-1]), op_type

    def test_every_default_is_one_of_some_schema(self):
        for row in filter(onnx_spellings, TABLE):
            known = {
                name
                for spelling in row.spellings
                for schema in schemas_of(spelling.domain, spelling.op_type)
                for name, attribute in schema.attributes.items()
                if default_of(attribute) is not None
            }
            assert set(row.defaults) <= known, row.kind

    @pytest.mark.skipif(not runtime_schemas, reason="this ONNX Runtime shows no schemas of its own")
    def test_spellings_without_schema(self):
        spellings = {(s.domain, s.op_type) for row in TABLE for s in onnx_spellings(row)}
        assert {key for key in spellings if not schemas_of(*key)} == WITHOUT_SCHEMA

    def test_a_spelling_begins_with_a_version(self):
        for row in TABLE:
            for spelling in row.spellings:
                versions = {s.since_version for s in schemas_of(spelling.domain, spelling.op_type)}
                assert spelling.since == 1 or spelling.since in versions, spelling

    def test_kinds_and_spellings_are_unique(self):
        assert len(ROWS) == len(TABLE)
        keys = [(s.domain, s.op_type, s.since, str(s.required)) for row in TABLE for s in row.spellings]
        assert len(set(keys)) == len(keys)

    @pytest.mark.parametrize("row", TABLE, ids=lambda row: row.kind)
    def test_slots_have_one_name_each(self, row):
        for spelling in row.spellings:
            assert len(set(spelling.slots)) == len(spelling.slots)
            assert not any(slot.endswith("*") for slot in spelling.slots[:-1])


class TestFindSpelling:
    @pytest.mark.parametrize(
        ("op_type", "version", "slots"),
        [
            ("Clip", 6, 1),
            ("Clip", 10, 1),
            ("Clip", 11, 3),
            ("Squeeze", 12, 1),
            ("Squeeze", 13, 2),
            ("Slice", 9, 1),
            ("Slice", 10, 5),
            ("Resize", 10, 2),
            ("Resize", 11, 4),
            ("Dropout", 11, 1),
            ("Dropout", 99, 3),
            ("LayerNormalization", 12, 3),  # no standard has it there, ONNX Runtime runs it
        ],
    )
    def test_version(self, op_type, version, slots):
        assert len(found_in("", op_type, version)[0].slots) == slots

    @pytest.mark.parametrize(
        ("domain", "op_type"), [("", "Nothing"), ("org.example", "Conv"), (MICROSOFT, "Conv")]
    )
    def test_unknown(self, domain, op_type):
        assert find_spelling(domain, op_type, 17) is None

    @pytest.mark.parametrize(
        ("names", "position", "slot"),
        [
            (("x", "weight"), 1, "weight"),
            (("x", "weight"), 2, "extra.2"),
            (("inputs*",), 0, "inputs.0"),
            (("inputs*",), 7, "inputs.7"),
            (("m", "cond", "carried*"), 2, "carried.0"),
            (("m", "cond", "carried*"), 4, "carried.2"),
            ((), 0, "extra.0"),
        ],
    )
    def test_slot_name(self, names, position, slot):
        assert slot_name(names, position) == slot
