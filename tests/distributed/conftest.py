"""Groups of 2 and of 4 processes for this folder."""

import pytest
from processes import Processes, four, two  # noqa: F401


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest) -> Processes:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])
