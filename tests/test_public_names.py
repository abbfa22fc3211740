"""What `import normtool` offers stays what it is, whichever modules have been imported since."""

import pkgutil

import normtool


def test_no_module_is_called_like_a_public_name() -> None:
    """Python sets `normtool.swap` to the module `normtool/swap.py` once anything imports that."""
    modules = {module.name for module in pkgutil.iter_modules(normtool.__path__)}
    assert modules.isdisjoint(normtool.__all__)
