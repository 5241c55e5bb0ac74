"""The reader of JSON a value at a time: what `json` reads at once, wherever what is held of the text ends."""

import io
import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
from draws import share

from smoa_kernels.kernels import json_reader
from smoa_kernels.kernels.json_reader import MOST_CHARACTERS, JsonReader

pytest.importorskip("hypothesis", reason="hypothesis draws the values")
from hypothesis import given
from hypothesis import strategies as st

LONGEST = 40


@pytest.fixture(autouse=True, scope="module")
def _little_is_held() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "MOST_CHARACTERS", LONGEST)
        patch.setattr(json_reader, "_HELD", 2 * LONGEST)
        yield


def reader(text: str) -> JsonReader:
    return JsonReader(io.StringIO(text))


gaps = st.lists(st.sampled_from(["", " ", "\n\r\t ", " " * 3 * LONGEST]), min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
).filter(lambda value: len(json.dumps(value)) <= LONGEST)


# An emoji is twelve characters of JSON, and a name may be as long as a value.
names = st.text(max_size=6).filter(lambda name: len(json.dumps(name)) <= LONGEST)


def spaced(tokens: list[str], gaps: list[str]) -> str:
    """The gaps again and again, one before each token and one at the end."""
    around = cycle(gaps)
    return "".join(next(around) + token for token in tokens) + next(around)


@share(0.2)
@given(values=st.lists(values, max_size=30), gaps=gaps)
def test_lists(values: list[Any], gaps: list[str]) -> None:
    tokens = [part for value in values for part in (",", json.dumps(value))][1:]
    text = spaced(["[", *tokens, "]"], gaps)
    read = reader(text)
    assert list(read.items()) == json.loads(text) == values
    read.end()


@share(0.2)
@given(values=st.dictionaries(names, values, max_size=30), gaps=gaps)
def test_objects(values: dict[str, Any], gaps: list[str]) -> None:
    members = [(",", json.dumps(name), ":", json.dumps(value)) for name, value in values.items()]
    tokens = [part for member in members for part in member][1:]
    text = spaced(["{", *tokens, "}"], gaps)
    read = reader(text)
    assert {name: read.value() for name in read.members()} == json.loads(text) == values
    read.end()


@share(0.2)
@given(text=st.text('[]{},:"1 a\\', max_size=12))
def test_what_is_no_json_is_refused(text: str) -> None:
    """And what is, is read: a list by its items, an object by its members, whatever they hold."""

    def read() -> Any:
        found = reader(text)
        start = text.lstrip()[:1]
        value: Any
        if start == "[":
            value = list(found.items())
        elif start == "{":
            value = {name: found.value() for name in found.members()}
        else:
            value = found.value()
        found.end()
        return value

    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"at character|no name"):
            read()
    else:
        assert read() == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting '\\[' at character 0"),
        ("[1, 2", "Expecting '\\]' at character 5"),
        ("[1, 2,]", "Expecting value at character 6"),
        ("[1 2]", "Expecting '\\]' at character 3"),
        (f"[{'1, ' * 100}x]", "Expecting value at character 301"),
        (f'["{"x" * 3 * LONGEST}"]', "Unterminated string starting at at character 1"),
        ("[1] 2", "Extra data at character 4"),
    ],
)
def test_errors_say_where(text: str, words: str) -> None:
    read = reader(text)
    with pytest.raises(ValueError, match=words):
        (list(read.items()), read.end())


def test_what_is_nested_without_end() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "MOST_CHARACTERS", MOST_CHARACTERS)
        patch.setattr(json_reader, "_HELD", 2 * MOST_CHARACTERS)
        with pytest.raises(RecursionError):
            reader("[" * MOST_CHARACTERS).value()
