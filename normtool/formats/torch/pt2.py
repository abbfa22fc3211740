"""May torch read this .pt2 file? Refused is what would make it run code, load a library, or unpack a bomb.

torch.export.load trusts its file. It unpickles (example inputs with a fallback to no restrictions, pickled
weights and custom objects with none at once), it loads compiled code (AOTInductor), and makes Python of text:
shape expressions go through sympy's parser, guards and the names of inputs through `exec`, the targets of nodes
lead to any function that can be reached from `torch`. So everything of that kind is checked against what
torch.export.save writes, with torch's own reader of the archive: what is checked is what is read.
"""

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.export import first_line
from normtool.formats.torch.sniff import ZIP_COMPLAINTS, open_regular

#: A .pt2 archive may unpack to this many times its size (it stores, it does not compress), and 64 MiB.
_MOST_EXPANSION = 8
_SMALL = 1 << 26

_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_PAYLOADS = ("data/weights/", "data/constants/")

#: What runs when it is read: compiled code, and pickles that no restriction applies to.
_COMPILED = "data/aotinductor/"
_OBJECTS = ("custom_obj_", "opaque_obj_")

#: Names of nodes and arguments become Python source.
_IDENTIFIER = re.compile(r"[\w.]*")

#: Other names are put between quotes there.
_QUOTABLE = re.compile(r"[^\"'\\\x00-\x1f]*")

#: Where free text stands: it is quoted by `repr`, or (the strings of `metadata`) kept and shown.
_TEXTS = frozenset(["as_string", "as_strings"])

#: Functions that a node may call. An operator that reads or writes files, or other processes, is none.
_OPERATOR = re.compile(
    r"torch\.ops\.(?!(?:image|debugprims|c10d|profiler|symm_mem)\.)\w+\.\w+(?:\.\w+)?|#[\w:.]+"
)
_FUNCTION = re.compile(
    r"torch\._?sym_\w+|math\.\w+|builtins\.round|torch\._functorch\.predispatch\.\w+|torch\._C\._set_grad_enabled|"
    r"torch\.autograd\.grad_mode\.set_grad_enabled|torch\.amp\.autocast_mode\._(enter|exit)_autocast|"
    r"torch\.fx\.experimental\.symbolic_shapes\.cast_symbool_to_symint_guardless"
)
_FILE_OPERATORS = ("torch.ops.aten.from_file.",)
_ARITHMETIC = frozenset(
    "abs add and_ eq floordiv ge getitem gt inv invert le lshift lt mod mul ne neg not_ or_ pos pow rshift sub "
    "truediv xor".split()
)

#: What shape expressions call, as torch writes them (`srepr`).
_SYMPY = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Gt Ge Lt Le Equality Unequality "
    "GreaterThan LessThan StrictGreaterThan StrictLessThan And Or Not Piecewise ExprCondPair Tuple "
    "ceiling floor sqrt log FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt "
    "CeilDiv IntTrueDiv FloatTrueDiv LShift RShift IsNonOverlappingAndDenseIndicator TruncToFloat "
    "TruncToInt RoundToInt RoundDecimal ToFloat FloatPow PowByNatural Identity".split()
)

#: What guards on input shapes call, and read of a tensor or of `math`.
_GUARD_CALLS = _SYMPY | frozenset("max min abs int float round sym_max sym_min sym_float sym_ite".split())
_GUARD_ATTRIBUTES = frozenset(
    "size stride storage_offset dim shape dtype isnan inf floor ceil trunc sqrt sym_max sym_min "
    "sym_float".split()
)
_GUARD_NAMES = frozenset(["L", "math", "torch", "inf"])

_NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Call, ast.keyword, ast.Load, ast.Tuple, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip

#: Characters of one expression; Python's own parser gives up far beyond it.
_LONGEST = 20_000

#: 2 ** 9 is a shape, 9 ** 9 ** 9 keeps a computer busy.
_LARGEST_EXPONENT = 64


def check_pt2(path: Path) -> frozenset[str]:
    """The types that its inputs and outputs are nested in, which torch must know in order to read it.

    Raises UnsafeModel, or UnreadableModel for what is no such file or lacks a part.
    """
    open_regular(path).close()
    try:
        archive = torch._C.PyTorchFileReader(str(path))
        names = archive.get_all_records()
    except (RuntimeError, ValueError, OSError) as error:
        if _is_of_torch_2_7(path):
            older = "was saved by torch 2.7 or older; load and save it again with torch 2.8 or newer"
            raise UnreadableModel(f"{path}: {older}") from None
        raise UnreadableModel(f"{path}: is not a readable .pt2 file ({_first(error)})") from None
    check = _Check(path, archive, names)
    check.run()
    return frozenset(check.types)


def _is_of_torch_2_7(path: Path) -> bool:
    """Such archives are pickles, which today's torch reads with a warning, and without restrictions."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "serialized_exported_program.json" in archive.namelist()
    except ZIP_COMPLAINTS:
        return False


class _Check:
    def __init__(self, path: Path, archive: Any, names: list[str]) -> None:
        self.path, self.archive, self.names = path, archive, names
        self.types: set[str] = set()

    def run(self) -> None:
        if _MODEL not in self.names:
            raise UnreadableModel(f"{self.path}: {self._what_instead()}")
        self._check_size(self.archive, self.names, self.path.stat().st_size, "")
        for name in self.names:
            if name.startswith(_COMPILED):
                raise UnsafeModel(
                    f"{self.path}: holds compiled code ({name}); export it with torch.export.save"
                )
            if name.startswith("models/") and name != _MODEL:
                raise UnreadableModel(
                    f"{self.path}: holds several models ({name}); save each to a file of its own"
                )
        self._check_pickle(_INPUTS)
        for folder in _PAYLOADS:
            self._check_payload(folder)
        self._check_program(self._json(_MODEL))

    def _what_instead(self) -> str:
        if any(name.startswith(_COMPILED) for name in self.names):
            return "holds compiled code alone; save the program itself with torch.export.save"
        return "holds no program of torch.export.save"

    # ---- records --------------------------------------------------------------------------

    def _check_size(self, archive: Any, names: list[str], size: int, where: str) -> None:
        try:
            claimed = sum(archive.get_record_size(name) for name in names)
        except RuntimeError as error:
            raise UnreadableModel(f"{self.path}: is not a readable .pt2 file ({_first(error)})") from None
        self._check_claim(claimed, size, where)

    def _check_claim(self, claimed: int, size: int, where: str) -> None:
        if claimed > _MOST_EXPANSION * size + _SMALL:
            raise UnsafeModel(f"{self.path}: {where}unpacks to {claimed} bytes, far beyond its size; refused")

    def _read(self, name: str) -> bytes:
        if name not in self.names:
            raise UnreadableModel(f"{self.path}: lacks {name}")
        try:
            content: bytes = self.archive.get_record(name)
        except (RuntimeError, OverflowError) as error:
            raise UnreadableModel(f"{self.path}: {name} cannot be read ({_first(error)})") from None
        return content

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._read(name).decode())
        except (ValueError, RecursionError) as error:
            raise UnreadableModel(f"{self.path}: {name} is no JSON ({_first(error)})") from None

    def _check_pickle(self, name: str) -> None:
        """Read it as torch will at first: where that fails, torch goes on without restrictions."""
        content = self._read(name)
        if not content:
            return
        try:
            if content.startswith(b"PK"):
                archive = torch._C.PyTorchFileReader(io.BytesIO(content))
                self._check_size(archive, archive.get_all_records(), len(content), f"{name} ")
            torch.load(io.BytesIO(content), weights_only=True)
        except UnreadableModel:
            raise
        except pickle.UnpicklingError as error:
            raise UnsafeModel(
                f"{self.path}: {name} asks for more than tensors; reading it would run code ({_first(error)})"
            ) from None
        except Exception as error:  # torn, or of a device that is not here
            raise UnreadableModel(f"{self.path}: {name} cannot be read ({_first(error)})") from None

    def _check_payload(self, folder: str) -> None:
        """Weights or constants: raw bytes, or a pickle where the table says so."""
        legacy = f"{folder}model.pt"
        if legacy in self.names:
            self._check_pickle(legacy)
            return
        document = self._json(f"{folder}model_{folder.split('/')[1]}_config.json")
        entries = document.get("config") if isinstance(document, dict) else None
        if not isinstance(entries, dict):
            raise UnreadableModel(f"{self.path}: the table of {folder} is none")
        claimed = 0
        for name, entry in entries.items():
            self._check_names([name], _QUOTABLE)
            claimed += self._check_entry(folder, entry)
        self._check_claim(claimed, self.path.stat().st_size, f"{folder} ")

    def _check_entry(self, folder: str, entry: Any) -> int:
        """How many elements it claims, which need not be stored: strides may be 0."""
        record = entry.get("path_name") if isinstance(entry, dict) else None
        if not isinstance(record, str):
            raise UnreadableModel(f"{self.path}: the table of {folder} is none")
        if record.startswith(_OBJECTS):
            raise UnsafeModel(f"{self.path}: holds a pickled object ({record}); reading it would run code")
        if entry.get("use_pickle"):
            self._check_pickle(folder + record)
            return 0
        meta = entry.get("tensor_meta")
        if not isinstance(meta, dict) or _device(meta) == "meta":
            return 0
        count = 1
        for length in meta.get("sizes") or ():
            each = length.get("as_int") if isinstance(length, dict) else None
            count *= each if isinstance(each, int) else 1
        return count

    # ---- the program ----------------------------------------------------------------------

    def _check_program(self, document: Any) -> None:
        for key, value in _strings(document):
            if key in ("target", "as_operator"):
                if not _is_operator(value):
                    raise UnsafeModel(
                        f"{self.path}: a node calls {value[:60]!r}, which is no operator; refused"
                    )
            elif key == "expr_str":
                self._check_expression(value, is_arithmetic(value))
            elif key == "guards_code":
                self._check_expression(value, is_guard(value))
            elif key in ("in_spec", "out_spec"):
                self._check_structure(value, of_inputs=key == "in_spec")
            else:
                pattern = _IDENTIFIER if key in ("name", "as_name", "forward_arg_names") else _QUOTABLE
                self._check_names([value], pattern)
        for each in _dicts(document):
            self._check_constant_inputs(each)
            ranges = each.get("range_constraints")
            for symbol in ranges if isinstance(ranges, dict) else ():
                self._check_expression(symbol, is_arithmetic(symbol))

    def _check_expression(self, text: str, harmless: bool) -> None:
        if not harmless:
            raise UnsafeModel(f"{self.path}: the shape expression {text[:60]!r} is no arithmetic; refused")

    def _check_names(self, names: list[Any], pattern: re.Pattern[str]) -> None:
        for name in names:
            if isinstance(name, str) and not pattern.fullmatch(name):
                raise UnsafeModel(f"{self.path}: the name {name[:60]!r} would become Python code; refused")

    def _check_constant_inputs(self, graph: Mapping[str, Any]) -> None:
        """A text that is an input of the graph is put into its guards."""
        given = graph.get("inputs") if "nodes" in graph else None
        for each in given if isinstance(given, list) else ():
            self._check_names([each.get("as_string") if isinstance(each, dict) else None], _QUOTABLE)

    def _check_structure(self, text: str, of_inputs: bool) -> None:
        """How inputs or outputs are nested: torch imports the modules of enums and of default factories."""
        try:
            spec = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UnreadableModel(
                f"{self.path}: {_MODEL} has no structure of inputs ({_first(error)})"
            ) from None
        for each in _dicts(spec):
            context = each.get("context")
            self.types.add(str(each.get("type")))
            if each.get("type") == "collections.defaultdict":
                raise UnsafeModel(f"{self.path}: a defaultdict among the inputs or outputs names code; refused")
            if isinstance(context, str):
                context = self._context(context)
            if any("__enum__" in inner for inner in _dicts(context)):
                raise UnsafeModel(f"{self.path}: an enum among the inputs or outputs names code; refused")
            self._check_names([value for _, value in _strings(context)], _QUOTABLE)
        if of_inputs:
            self._check_names(_keywords(spec, self._context), _IDENTIFIER)

    def _context(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text


def _device(meta: Mapping[str, Any]) -> Any:
    device = meta.get("device")
    return device.get("type") if isinstance(device, dict) else None


def _keywords(spec: Any, parse: Any) -> list[Any]:
    """Names of keyword arguments: the keys of the dict beside the tuple of positional ones."""
    try:
        context = parse(spec[1]["children_spec"][1]["context"])
    except (TypeError, KeyError, IndexError):
        return []
    return list(context) if isinstance(context, list) else []


def _strings(document: Any) -> Iterator[tuple[str, str]]:
    """Every string that is no free text, under the key it stands at; keys count as strings.

    What is nested deeper below a free key is none: a tensor may be called `metadata`.
    """
    pending: list[tuple[str, Any, bool]] = [("", document, False)]  # the last: is it free text?
    while pending:
        key, each, free = pending.pop()
        if isinstance(each, dict):
            yield from (("", name) for name in each)
            free = key == "metadata"
            pending += [(name, value, free and isinstance(value, str)) for name, value in each.items()]
        elif isinstance(each, list):
            pending += [(key, value, False) for value in each]
        elif isinstance(each, str) and not free and key not in _TEXTS:
            yield key, each


def _dicts(document: Any) -> Iterator[Mapping[str, Any]]:
    pending = [document]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield each
            pending += each.values()
        elif isinstance(each, list):
            pending += each


def _first(error: BaseException) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))[:200]


# ---- text that torch would evaluate -------------------------------------------------------------


def _is_operator(target: str) -> bool:
    if target.startswith("_operator."):
        return target.removeprefix("_operator.") in _ARITHMETIC
    if target.startswith(_FILE_OPERATORS):
        return False
    return bool(_OPERATOR.fullmatch(target) or _FUNCTION.fullmatch(target))


def is_arithmetic(text: str) -> bool:
    """Is it a shape expression: symbols, numbers, operators, and functions of `_SYMPY`?"""
    nodes = _parsed(text)
    return nodes is not None and all(isinstance(node, _NODES) and _is_plain(node, _SYMPY) for node in nodes)


def is_guard(text: str) -> bool:
    """Is it a condition on inputs: `L['x'].size()[0] % 2 == 0` and its like?"""
    nodes = _parsed(text)
    if nodes is None:
        return False
    for node in nodes:
        if isinstance(node, ast.Attribute):
            if node.attr not in _GUARD_ATTRIBUTES:
                return False
        elif isinstance(node, ast.Name):
            if node.id not in _GUARD_NAMES | _GUARD_CALLS:
                return False
        elif isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name | ast.Attribute):
                return False
        elif not isinstance(node, (*_NODES, ast.Subscript)) or not _is_plain(node, frozenset()):
            return False
    return True


def _parsed(text: str) -> list[ast.AST] | None:
    if len(text) > _LONGEST:
        return None
    try:
        return list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_plain(node: ast.AST, functions: frozenset[str]) -> bool:
    if isinstance(node, ast.Call):
        called = isinstance(node.func, ast.Name) and node.func.id in functions
        return called and (_name_of(node) not in _POWERS or _is_small(node.args[1:2]))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return _is_small([node.right])
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or _QUOTABLE.fullmatch(node.value) is not None
    return True


_POWERS = frozenset("Pow PowByNatural FloatPow LShift".split())


def _name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_small(exponents: list[ast.expr]) -> bool:
    """A number, perhaps negative or inside Integer(…), and no large one."""
    for node in (inner for each in exponents for inner in ast.walk(each)):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            if abs(node.value) > _LARGEST_EXPONENT:
                return False
        elif isinstance(node, ast.BinOp) or (isinstance(node, ast.Call) and _name_of(node) in _POWERS):
            return False
    return True
