"""Pickles of a checkpoint, looked at before PyTorch unpickles them.

`pickletools` names the instructions of a pickle and carries out none. What may be called is decided by
PyTorch's `weights_only` allow-list alone; the scan here only takes away what that list lets a small file do
to the memory of the reader.
"""

import pickletools
from pathlib import Path
from typing import IO

from normtool.errors import UnreadableModel, UnsafeModel

#: Bytes and instructions. A state dict of 10,000 tensors takes 1.2 MB and 300,000.
LARGEST_PICKLE = 64 << 20
MOST_INSTRUCTIONS = 5_000_000

#: On the allow-list, and able to make as much of nothing as a number in the pickle says.
_AMPLIFIERS = frozenset(
    [
        "__builtin__ bytearray",
        "builtins bytearray",
        "torch._utils _rebuild_device_tensor_from_cpu_tensor",
        "torch._utils _rebuild_device_tensor_from_numpy",
    ]
)

#: `bytes` are pickled as a call of this, which copies its argument at each call.
_ENCODE = "_codecs encode"

#: Codecs that make bytes longer, so that thirty calls make a gigabyte.
_GROWING_CODECS = frozenset("base64 base_64 hex quopri quoted_printable quotedprintable uu".split())


def check_pickle(stream: IO[bytes], path: Path) -> int:
    """Read one pickle to its end; return how many strings are in it.

    Raises UnreadableModel where it is torn, UnsafeModel beyond the bounds above.
    """
    called: set[str] = set()
    codecs: set[str] = set()
    strings = calls = longest = 0
    start = stream.tell()
    try:
        for count, (instruction, argument, position) in enumerate(pickletools.genops(stream)):
            if count > MOST_INSTRUCTIONS or (position or 0) - start > LARGEST_PICKLE:
                raise UnsafeModel(
                    f"{path}: its pickle has more than {MOST_INSTRUCTIONS:,} instructions or "
                    f"{LARGEST_PICKLE:,} bytes; save the model's state_dict() alone, or as .safetensors"
                )
            if instruction.name == "GLOBAL":
                called.add(str(argument))
            elif isinstance(argument, str):
                strings, longest = strings + 1, max(longest, len(argument))
                codecs.add(argument.lower().replace("-", "_").removesuffix("_codec"))
            calls += instruction.name == "REDUCE"
    except ValueError as error:
        raise UnreadableModel(f"{path}: its pickle is torn or damaged ({_short(error)})") from None
    amplifiers = called & _AMPLIFIERS
    if _ENCODE in called and (calls * longest > LARGEST_PICKLE or codecs & _GROWING_CODECS):
        amplifiers |= {_ENCODE}
    if amplifiers:
        name = min(amplifiers).replace(" ", ".")
        raise UnsafeModel(
            f"{path}: its pickle asks for `{name}`, which can claim any amount of memory; "
            "save the model's state_dict() alone, or as .safetensors"
        )
    return strings


def _short(error: ValueError) -> str:
    return ascii(str(error).partition("\n")[0])[1:-1][:80]
