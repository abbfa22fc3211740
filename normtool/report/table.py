"""Sections as text: rich tables for people, CSV and Markdown for other programs.

Names come from model files, so they may hold anything: control characters are shown escaped, Markdown and
HTML are quoted, and a cell that a spreadsheet would run as a formula gets an apostrophe.
"""

import csv
import html
import io
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from normtool.report.sections import Section, sections

#: Width where there is no terminal: as wide as the content wants, within reason.
_PIPE_WIDTH = 160


def to_text(result: Any, verbose: bool = False) -> str:
    """A result as plain tables, without colour."""
    return plain_text(sections(result, verbose))


def plain_text(parts: list[Section]) -> str:
    file = io.StringIO()
    print_tables(Console(file=file, width=_PIPE_WIDTH, color_system=None, force_terminal=False), parts)
    return file.getvalue()


def print_tables(console: Console, parts: list[Section]) -> None:
    for part in parts:
        if part.rows:
            console.print(_table(part))
        if part.note:
            console.print(Text(part.note, style="dim"))
        if part.rows or part.note:
            console.print()


def _table(part: Section) -> Table:
    table = Table(title=Text(part.title, style="bold"), title_justify="left", box=None, pad_edge=False)
    for column in part.columns:
        right = column in part.right
        table.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in part.rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    return table


def to_csv(parts: list[Section]) -> str:
    """The first section that has rows; numbers without thousands separators."""
    part = next((part for part in parts if part.rows), parts[0])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(part.columns)
    numeric = [column in part.right for column in part.columns]
    for row in part.rows:
        writer.writerow(
            cell.replace(",", "") if number else _no_formula(_printable(cell))
            for cell, number in zip(row, numeric, strict=True)
        )
    return out.getvalue()


def to_markdown(parts: list[Section]) -> str:
    return "\n".join(_markdown(part) for part in parts if part.rows or part.note)


def _markdown(part: Section) -> str:
    lines = [f"### {_quoted(part.title)}", ""]
    if part.rows:
        lines.append(f"| {' | '.join(part.columns)} |")
        lines.append(f"|{'|'.join('---:' if column in part.right else '---' for column in part.columns)}|")
        lines += [f"| {' | '.join(map(_quoted, row))} |" for row in part.rows]
    if part.note:
        lines += ["", _quoted(part.note)]
    return "\n".join([*lines, ""])


def _printable(text: str) -> str:
    """Control characters (newlines, ANSI codes) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(text: str) -> str:
    return html.escape(_printable(text), quote=False).replace("|", "\\|").replace("`", "\\`")


def _no_formula(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
