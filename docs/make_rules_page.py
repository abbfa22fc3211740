"""Writes docs/rules.md from the docstrings of the rules (`make docs`); a test holds the page against them."""

import importlib
import inspect
import pkgutil
from pathlib import Path

from normtool import rules
from normtool.reasons import EXPLANATIONS
from normtool.travel import BackwardRule

PAGE = Path(__file__).parent / "rules.md"

HEAD = """# Rules

*Made from the modules in `normtool/rules/` by `make docs`. Do not edit.*

An affine map `s·x + t` per channel travels backward from a norm. Each operator it meets absorbs it (its
constants change), passes it on (it is such a map itself), or stops it. What has no rule here stops it too.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for info in pkgutil.iter_modules(rules.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"normtool.rules.{info.name}")
        title, _, body = (module.__doc__ or "").partition("\n")
        parts.append(f"## {title.removesuffix('.')}\n\n*{_kinds(module)}*\n\n{body.strip(chr(10))}\n")
    parts.append(_reasons())
    return "\n".join(parts)


def _kinds(module: object) -> str:
    found = [rule for rule in vars(module).values() if inspect.isclass(rule) and issubclass(rule, BackwardRule)]
    return ", ".join(f"`{kind}`" for rule in found for kind in getattr(rule, "kinds", ()))


def _reasons() -> str:
    rows = "\n".join(f"| `{code}` | {meaning} | {remedy} |" for code, (meaning, remedy) in EXPLANATIONS.items())
    return f"## Verdicts and reasons\n\n| code | meaning | what to do |\n|---|---|---|\n{rows}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
