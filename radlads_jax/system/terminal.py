"""Where tables are printed, and how a command shows how far it has come."""

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Of what is no terminal: a log is scrolled sideways, and rich's 80 columns cut the words of a table.
_WIDTH_OF_LOGS = 160


def tables() -> Console:
    """As wide as the terminal or notebook, and as COLUMNS says; a file or pipe has 160 columns."""
    console = Console()
    known = console.is_terminal or console.is_jupyter or "COLUMNS" in os.environ
    return console if known else Console(width=_WIDTH_OF_LOGS)


def progress_bar(doing: str, *, show: bool) -> Progress:
    """On stderr: what is being done, how many parts of it are, and the time left."""
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)
