"""Groups of 2 and of 4 processes for this folder, and the tests that run in each process of one (`networks.in_two`)."""

import pytest
from processes import Processes, four, two  # noqa: F401


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest) -> Processes:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that uses a group of processes, and does not ask for it by name, in each of them."""
    for mark in pyfuncitem.iter_markers("usefixtures"):
        arguments = [pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames]
        pyfuncitem.funcargs[mark.args[0]].run(pyfuncitem.obj, *arguments)
        return True
    return None
