"""Every argument of a public function or setting has a row in a table of this folder."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from smoa_kernels import FusedSMoALinear, smoa_linear

from . import test_layer, test_operator
from .harness import Change


def arguments(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def changed(*tables: Sequence[Change]) -> set[str]:
    return {name for table in tables for change, _, _ in table for name in change}


def test_the_operators() -> None:
    assert arguments(smoa_linear) == changed(
        test_operator.ARGUMENTS, test_operator.CHOICES, test_operator.TENSORS
    )


def test_the_layers() -> None:
    given = arguments(FusedSMoALinear.from_linear) - {"linear"}  # it has its own table
    assert given == changed(test_layer.SETTINGS, test_layer.BLOCKS)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the peft extra")
def test_the_configurations() -> None:
    from smoa_kernels.peft import SMoAConfig

    from . import test_tuner

    own = set(inspect.get_annotations(SMoAConfig))
    assert own <= changed(test_tuner.CONFIGURATIONS)
