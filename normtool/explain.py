"""What a verdict, a reason code or a norm is: the text behind `normtool explain`."""

import difflib
from pathlib import Path

from normtool.errors import UsageError
from normtool.reasons import EXPLANATIONS

#: The pages of docs/norms: in the wheel beside this file, in a checkout beside the package.
_PAGES = (
    Path(__file__).parent / "docs" / "norms",
    Path(__file__).parent.parent / "docs" / "norms",
)


def explain(code: str) -> str:
    """The explanation of a reason code, a verdict, or a norm kind such as `batch_norm`.

    Raises UsageError with the nearest known words for anything else.
    """
    if code in EXPLANATIONS:
        meaning, remedy = EXPLANATIONS[code]
        return f"{code}\n\n{meaning}\n{remedy}\n"
    page = norm_pages().get(code)
    if page is not None:
        return page.read_text(encoding="utf-8")
    near = difflib.get_close_matches(code, known_codes(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known_codes())}"
    raise UsageError(f"nothing to explain under {code!r}; {hint}")


def norm_pages() -> dict[str, Path]:
    """Norm kind → its page."""
    folder = next((folder for folder in _PAGES if folder.is_dir()), None)
    pages = sorted(folder.glob("*.md")) if folder else []
    return {page.stem: page for page in pages if page.stem != "index"}


def known_codes() -> list[str]:
    return [*EXPLANATIONS, *norm_pages()]
