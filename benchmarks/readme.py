"""Sections of the README that a program writes, between markers that name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["README", "Section"]

README = Path(__file__).resolve().parent.parent / "README.md"


@dataclass(frozen=True)
class Section:
    """What one program writes.

    Attributes:
        author: the program's path, as the markers name it.
    """

    author: str

    @property
    def start(self) -> str:
        """The marker above."""
        return f"<!-- written by {self.author}: -->"

    @property
    def end(self) -> str:
        """The marker below."""
        return f"<!-- :written by {self.author} -->"

    def replace(self, text: str, content: str) -> str:
        """The README with new text between this section's markers.

        Raises:
            ValueError: the markers are not there, once each and in order.
        """
        start, end = self.start, self.end
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise ValueError(f"the README must hold {start} and then {end}, once each")
        before, _, rest = text.partition(start)
        return f"{before}{start}\n\n{content.strip()}\n\n{end}{rest.partition(end)[2]}"
