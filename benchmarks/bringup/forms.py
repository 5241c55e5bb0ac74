"""A pytest plugin that notes the forms of the kernels that tests launch, and neither compiles nor runs them.

`ahead.py` starts pytest with it. Results are never written, so most tests fail; their later launches are not noted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton

from smoa_kernels.kernels.architectures import architecture_of

from ..fake_gpu import FakeDriver, FakeGpu, pretend_cpu

_given = json.loads(os.environ["BRINGUP_FORMS"])
_noted = Path(_given["folder"], str(os.getpid()))
_gpu = SimpleNamespace(**_given["gpu"])


def _note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
    """Write a line: the kernel's name, and what its `preload` takes. True stops Triton before it compiles."""
    with _noted.open("a", encoding="utf-8") as lines:
        lines.write(f"{fn.name} {compile['specialization_data']}\n")
    return True


pretend_cpu(architecture_of(_gpu), _gpu.multi_processor_count)  # before tests import the kernels
triton.runtime.driver.set_active(FakeDriver(FakeGpu(1, _gpu)))
triton.knobs.runtime.jit_cache_hook = _note
