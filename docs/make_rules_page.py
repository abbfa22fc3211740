"""Writes docs/rules.md from the docstrings of the rules (`make docs`); a test holds the page against them."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

from normtool import merging, rules
from normtool.reasons import EXPLANATIONS
from normtool.travel import Rule

PAGE = Path(__file__).parent / "rules.md"

HEAD = """# Rules

*Made from the modules in `normtool/rules/` by `make docs`. Do not edit.*

An affine map `s·x + t` per channel leaves a norm backward, into what made the norm's input, or forward, into
all that reads its output. Each operator it meets absorbs it (its constants change), passes it on (to other
tensors, on an axis that may be another one), merges with it (it is such a map itself, and goes), or stops it.
What has no rule here stops it too. Where the scale `s` alone can leave, the shift `t` stays in the norm's place
as an Add.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for info in pkgutil.iter_modules(rules.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"normtool.rules.{info.name}")
        parts.append(_section(module, *_kinds(module)))
    parts.append(_section(merging))
    parts.append(_reasons())
    return "\n".join(parts)


def _section(module: ModuleType, *kinds: str) -> str:
    title, _, body = (module.__doc__ or "").partition("\n")
    listed = [f"*{', '.join(kinds)}*"] if kinds else []
    return "\n\n".join([f"## {title.removesuffix('.')}", *listed, body.strip("\n")]) + "\n"


def _kinds(module: ModuleType) -> list[str]:
    found = [rule for rule in vars(module).values() if inspect.isclass(rule) and issubclass(rule, Rule)]
    return [f"`{kind}`" for rule in found if rule.__module__ == module.__name__ for kind in rule.kinds]


def _reasons() -> str:
    rows = "\n".join(f"| `{code}` | {meaning} | {remedy} |" for code, (meaning, remedy) in EXPLANATIONS.items())
    return f"## Verdicts and reasons\n\n| code | meaning | what to do |\n|---|---|---|\n{rows}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
