"""A terminal for texts that may come from files of others."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from gradscope.files import printable


class PlainConsole(Console):
    """A console that shows texts as they are: brackets are no markup, and control characters are escaped.

    Give a style with `rich.text.Text` or ``style=``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **{"highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Called by rich for every text, also in the cells and titles of tables."""
        return super().render_str(printable(text), **options)
