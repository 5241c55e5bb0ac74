"""Profiles of hypothesis for the tests. A file that imports this is skipped where hypothesis is missing."""

import pytest

pytest.importorskip("hypothesis", reason="hypothesis draws the problems")
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

__all__ = ["PROFILES", "HealthCheck", "assume", "example", "given", "settings", "share", "st"]

PROFILES = {"ci": 300, "nightly": 10_000}
"""How many problems are drawn for the C oracle in all (test_fuzz.py); the variable HYPOTHESIS_PROFILE chooses."""


def share(part: float) -> settings:
    """Draws this fraction of the profile's number of examples."""
    return settings(max_examples=round(part * settings().max_examples))
