"""Tables on stdout. Colours on a terminal without NO_COLOR, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

PIPE_WIDTH = 160  # where nobody says how wide the screen is


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """One table; numbers to the right, None as a dash."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [[_text(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = all(row[i][:1].isdigit() or row[i] == "–" for row in rows)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    console.print(Text(title, "bold"))
    console.print(table)


def _text(cell: object) -> str:
    if cell is None:
        return "–"
    return {True: "yes", False: "no"}[cell] if isinstance(cell, bool) else str(cell)
