"""Groups of 2 and of 4 processes for this folder."""

from collections.abc import Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    group = Processes(2)
    yield group
    group.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    group = Processes(4)
    yield group
    group.stop()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest) -> Processes:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])
