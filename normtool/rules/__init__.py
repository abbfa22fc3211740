"""Every rule, found by looking: each module of this package defines classes with a `kinds` tuple."""

import importlib
import pkgutil
from functools import cache

from normtool.travel import Rule


@cache
def all_rules() -> dict[str, Rule]:
    """Op kind → the rule that answers for it. Raises TypeError when two rules claim one kind."""
    found: dict[str, Rule] = {}
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for rule in contents.values():
            if not (isinstance(rule, type) and issubclass(rule, Rule)):
                continue
            for kind in rule.kinds:
                if kind in found:
                    raise TypeError(f"{kind!r} has two rules: {found[kind]} and {rule}")
                found[kind] = rule()
    return found
