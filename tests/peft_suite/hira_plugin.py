"""pytest plugin that runs PEFT's own HiRA tests, in PEFT's test modules, with every injected model accelerated."""

import functools

import pytest
from peft import HiraConfig
from peft.tuners.hira import HiraModel
from plugin import pytest_configure  # noqa: F401  # which pytest calls here too

from smoa_kernels.peft import accelerate_hira

ACCELERATED = []


def _accelerated(inject):
    @functools.wraps(inject)
    def inject_adapter(self, *args, **kwargs):
        found = inject(self, *args, **kwargs)
        try:
            ACCELERATED.append(len(accelerate_hira(self.model).taken))
        except ValueError:  # an adapter may have no layer here
            ACCELERATED.append(0)
        return found

    return inject_adapter


HiraModel.inject_adapter = _accelerated(HiraModel.inject_adapter)


def pytest_collection_modifyitems(config, items):
    """Keep what runs with `HiraConfig`."""
    kept, dropped = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        (kept if HiraConfig in [*parameters.values()] else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_sessionfinish(session):
    """Fail where nothing was accelerated: the run would prove nothing."""
    if not sum(ACCELERATED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Say how much was accelerated."""
    layers, models = sum(ACCELERATED), sum(map(bool, ACCELERATED))
    terminalreporter.write_line(
        f"{layers} HiRA layers were accelerated, in {models} of {len(ACCELERATED)} injections"
    )
