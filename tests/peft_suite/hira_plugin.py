"""pytest plugin that runs PEFT's own HiRA tests, in PEFT's test modules, and accelerates every injected model."""

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
        except ValueError:  # the model may have no HiRA layer
            ACCELERATED.append(0)
        return found

    return inject_adapter


HiraModel.inject_adapter = _accelerated(HiraModel.inject_adapter)


def pytest_collection_modifyitems(config, items):
    """Keep the tests that use `HiraConfig`."""
    kept, dropped = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        (kept if HiraConfig in [*parameters.values()] else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_sessionfinish(session):
    """Fail if nothing was accelerated, since the run would prove nothing."""
    if not sum(ACCELERATED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
