"""A named error as one readable block."""

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bayestie._errors import BayestieError


def error_block(error: BayestieError) -> RenderableType:
    """What was found, what was expected, what to do: one panel."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold red", no_wrap=True)
    lines.add_column(overflow="fold")
    lines.add_row("found", Text(error.found))
    lines.add_row("expected", Text(error.expected))
    lines.add_row("fix", Text(error.fix))
    return Panel(lines, title=Text(error.what, style="bold red"), title_align="left", border_style="red")
