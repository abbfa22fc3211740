"""Opens an .onnx file of any size without reading its weights.

A protobuf message is a list of (tag, length, content) fields (protobuf.dev/programming-guides/encoding). The
large `raw_data` of initializers and Constant nodes (in bodies and functions too) is left in the file and
replaced, in a *skeleton* of the same model, by an external-data reference to its offset. Every other byte is
passed on as it stands, so protobuf itself still parses the model and nothing is lost, unknown fields included.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from normtool.values import Value, byte_count

#: raw_data longer than this stays in the file. Shape inference wants to see the small integer tensors.
STAYS_IN_FILE = 2048

#: Begins every `location` that is ours and no file name: files cannot have a NUL in theirs. The token keeps
#: a model file from using it, by chance or on purpose.
LAZY = f"\0normtool:{secrets.token_hex(8)}:"

#: `location` of data that lies in the model file itself.
EMBEDDED = LAZY + "embedded"

#: `location` of data that a rewrite will compute, followed by its key.
PENDING = LAZY + "pending:"

# field numbers of onnx.proto
_MODEL_GRAPH, _MODEL_FUNCTION, _FUNCTION_NODE = 7, 25, 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_ATTRIBUTE, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 5, 5, 6
_TENSOR_RAW_DATA, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 9, 13, 14

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5

#: message → {field: message of the field}: the way down to the tensors
_DESCENT = {
    "model": {_MODEL_GRAPH: "graph", _MODEL_FUNCTION: "function"},
    "function": {_FUNCTION_NODE: "node"},
    "graph": {_GRAPH_NODE: "node", _GRAPH_INITIALIZER: "tensor"},
    "node": {_NODE_ATTRIBUTE: "attribute"},
    "attribute": {_ATTRIBUTE_TENSOR: "tensor", _ATTRIBUTE_GRAPH: "graph"},
}

#: Protobuf itself refuses messages that are nested deeper than this.
_DEEPEST = 100

#: Tag of `data_location`.
_DATA_LOCATION = bytes([_TENSOR_DATA_LOCATION << 3 | _VARINT])

#: Entry of a stripped tensor that spelled out `data_location: DEFAULT`, as onnx.load leaves it.
_SAID_DEFAULT = "said_default"

Buffer = memoryview

#: A stretch of the file to write: bytes, or a tensor's content still to be produced.
Piece = bytes | Value


@dataclass(frozen=True)
class Field:
    number: int
    wire_type: int
    start: int
    content: int
    end: int


def skeleton(buffer: Buffer) -> bytes:
    """The model without its large `raw_data`, as bytes that protobuf parses.

    Raises ValueError where the bytes are not a protobuf message.
    """
    return b"".join(_strip(buffer, 0, len(buffer), "model"))


def fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of one message. Raises ValueError on a truncated or impossible one."""
    position = start
    while position < end:
        tag, content = read_varint(buffer, position, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _DELIMITED:
            length, content = read_varint(buffer, content, end)
            stop = content + length
        elif wire_type == _VARINT:
            _, stop = read_varint(buffer, content, end)
        elif wire_type in (_FIXED64, _FIXED32):
            stop = content + (8 if wire_type == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if stop > end or number == 0:
            raise ValueError(f"a field at byte {position} runs past byte {end}")
        yield Field(number, wire_type, position, content, stop)
        position = stop


def read_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    """(number, position behind it)."""
    number = shift = 0
    while position < end and shift < 70:
        byte = buffer[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise ValueError(f"a number at byte {position} does not end")


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def delimited_header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return varint(number << 3 | _DELIMITED) + varint(length)


def _delimited(number: int, content: bytes) -> bytes:
    return delimited_header(number, len(content)) + content


def _strip(buffer: Buffer, start: int, end: int, message: str, depth: int = 0) -> Iterator[bytes]:
    """The message's fields, with every tensor on the way down stripped."""
    descent = _DESCENT[message] if depth < _DEEPEST else {}
    copied = start  # fields that pass untouched are copied in runs
    for field in fields(buffer, start, end):
        inner = descent.get(field.number)
        if inner is None or field.wire_type != _DELIMITED or field.end - field.content <= STAYS_IN_FILE:
            continue
        yield bytes(buffer[copied : field.start])
        if inner == "tensor":
            parts = _strip_tensor(buffer, field.content, field.end)
        else:
            parts = _strip(buffer, field.content, field.end, inner, depth + 1)
        yield _delimited(field.number, b"".join(parts))
        copied = field.end
    yield bytes(buffer[copied:end])


def _strip_tensor(buffer: Buffer, start: int, end: int) -> Iterator[bytes]:
    parts = list(fields(buffer, start, end))
    data = next((part for part in parts if part.number == _TENSOR_RAW_DATA), None)
    if data is None or data.end - data.content <= STAYS_IN_FILE or _is_external(buffer, parts):
        yield bytes(buffer[start:end])
        return
    entries = {"location": EMBEDDED, "offset": str(data.content), "length": str(data.end - data.content)}
    for part in parts:
        if part.number == _TENSOR_DATA_LOCATION:
            entries[_SAID_DEFAULT] = "1"
        elif part is not data:
            yield bytes(buffer[part.start : part.end])
    yield _DATA_LOCATION + b"\x01"
    for key, value in entries.items():
        entry = _delimited(1, key.encode()) + _delimited(2, value.encode())
        yield _delimited(_TENSOR_EXTERNAL_DATA, entry)


def _is_external(buffer: Buffer, parts: list[Field]) -> bool:
    """Does the tensor claim external data? With raw data beside it, that is not ours to sort out."""
    return any(
        part.number == _TENSOR_EXTERNAL_DATA
        or (part.number == _TENSOR_DATA_LOCATION and buffer[part.content] != 0)
        for part in parts
    )


def inflate(skeleton: bytes, resolve: Callable[[dict[str, str]], Value]) -> list[Piece]:
    """The inverse of `skeleton`: the pieces of the file in which lazy tensors hold their data again.

    `resolve` gives the value that a tensor's external-data entries stand for.
    """
    return _inflate(memoryview(skeleton), skeleton, 0, len(skeleton), "model", resolve)


def size_of(pieces: list[Piece]) -> int:
    """Bytes of all pieces together."""
    return sum(len(piece) if isinstance(piece, bytes) else byte_count(piece) for piece in pieces)


def _inflate(
    buffer: Buffer,
    content: bytes,
    start: int,
    end: int,
    message: str,
    resolve: Callable[[dict[str, str]], Value],
) -> list[Piece]:
    marker, copied = LAZY.encode(), start
    pieces: list[Piece] = []
    descent = _DESCENT.get(message, {})
    for field in fields(buffer, start, end):
        inner = descent.get(field.number)
        if inner is None or content.find(marker, field.content, field.end) < 0:
            continue
        pieces.append(content[copied : field.start])
        inflate_part = _inflate_tensor if inner == "tensor" else _inflate
        part = inflate_part(buffer, content, field.content, field.end, inner, resolve)
        pieces += [delimited_header(field.number, size_of(part)), *part]
        copied = field.end
    return [*pieces, content[copied:end]]


def _inflate_tensor(
    buffer: Buffer,
    content: bytes,
    start: int,
    end: int,
    message: str,
    resolve: Callable[[dict[str, str]], Value],
) -> list[Piece]:
    pieces: list[Piece] = []
    entries: dict[str, str] = {}
    for field in fields(buffer, start, end):
        if field.number == _TENSOR_EXTERNAL_DATA:
            pair = [content[f.content : f.end].decode() for f in fields(buffer, field.content, field.end)]
            entries[pair[0]] = pair[1]
        elif field.number != _TENSOR_DATA_LOCATION:
            pieces.append(content[field.start : field.end])
    if not entries.get("location", "").startswith(LAZY):
        return [content[start:end]]
    if _SAID_DEFAULT in entries:
        pieces.append(_DATA_LOCATION + b"\x00")
    value = resolve(entries)
    return [*pieces, delimited_header(_TENSOR_RAW_DATA, byte_count(value)), value]
