"""JSON read a value at a time, so that a file's size bounds neither what is read at once nor what is made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = ["MOST_CHARACTERS", "JsonReader"]

# Of a value, which is read at once. Twice as many are held: as Python's objects up to 32 bytes for each of them
# (`{"":{}},` again and again), so 4 MiB.
MOST_CHARACTERS = 2**16
_HELD = 2 * MOST_CHARACTERS

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonReader:
    """What stands in a stream of JSON, from its start: whoever asks knows what may come next.

    Every method raises ValueError where something else comes or a value that is too long, as those of more than
    `MOST_CHARACTERS` may be, and RecursionError where one is nested too deeply.

    Args:
        stream: open for reading.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text, self._at, self._before = "", 0, 0  # what is held, read up to, and has been let go

    def value(self) -> Any:
        """The next value, whole."""
        self._next()
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} at character {self._before + error.pos}") from error
        return value

    def members(self) -> Iterator[str]:
        """The names in an object; the value of each is to be read before the next is asked for."""
        for _ in self._parts("{", "}"):
            name = self.value()
            if not isinstance(name, str):
                raise ValueError(f"no name at character {self._before + self._at}")
            self._take(":")
            yield name

    def items(self) -> Iterator[Any]:
        """The values in a list, one after another."""
        for _ in self._parts("[", "]"):
            yield self.value()

    def end(self) -> None:
        """Nothing may follow."""
        if self._next():
            raise ValueError(f"Extra data at character {self._before + self._at}")

    def _parts(self, opening: str, closing: str) -> Iterator[None]:
        self._take(opening)
        if self._next() != closing:
            yield
            while self._next() == ",":
                self._at += 1
                yield
        self._take(closing)

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"Expecting {character!r} at character {self._before + self._at}")
        self._at += 1

    def _next(self) -> str:
        """The next character that is no space, nothing at the end; a whole value from it on is held."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # which may be empty
            self._at = space.end()
            ahead = len(self._text) - self._at
            more = self._stream.read(_HELD - ahead) if ahead < MOST_CHARACTERS else ""
            if not more:
                return self._text[self._at : self._at + 1]
            self._text, self._at, self._before = self._text[self._at :] + more, 0, self._before + self._at
