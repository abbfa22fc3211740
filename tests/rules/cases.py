"""The test table of the rules, found by looking: every `cases_*` module here has some rows of it."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.rules.table import Case, Violation


def _families() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("cases_"):
            yield importlib.import_module(f"tests.rules.{module.name}")


def cases() -> list[Case]:
    return [case for family in _families() for case in family.cases()]


def violations() -> list[Violation]:
    return [violation for family in _families() for violation in family.violations()]
