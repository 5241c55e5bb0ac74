"""A pytest plugin that notes the forms of kernels which tests launch. It compiles and runs none of them.

`ahead.py` starts pytest with it. Numbers are missing, so most tests fail, after their last launch or before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton

from ..fake_gpu import FakeDriver, FakeGpu, pretend_cpu

_given = json.loads(os.environ["BRINGUP_FORMS"])
_noted = Path(_given["folder"], str(os.getpid()))
_gpu = SimpleNamespace(**_given["gpu"])


def _note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
    """Write a line: the kernel's name, and what its `preload` takes. Being true, it stops Triton before it compiles."""
    with _noted.open("a", encoding="utf-8") as lines:
        lines.write(f"{fn.name} {compile['specialization_data']}\n")
    return True


pretend_cpu(f"sm_{_gpu.major}{_gpu.minor}", _gpu.multi_processor_count)  # before tests import the kernels
triton.runtime.driver.set_active(FakeDriver(FakeGpu(1, _gpu)))
triton.knobs.runtime.jit_cache_hook = _note
