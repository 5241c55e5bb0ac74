"""Runs a pytest session on compiled code under AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.

A fault ends the process with a report. Gaps between the pieces of a workspace are poisoned (`take` in operand.h).
"""

import atexit
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

import pytest

import hatch_build
from smoa_kernels.backends.native import library

HERE = library.instruction_set()
OPTIONS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
if HERE == "AVX512":  # gcc 12 aligns the stack to 32 bytes only when it guards that
    OPTIONS += ["--param", "asan-stack=0"]

os.environ.pop("LD_PRELOAD")  # for this process, not for the compiler
PLATFORM = sysconfig.get_platform()
hatch_build.VARIANTS = {PLATFORM: {HERE: hatch_build.VARIANTS[PLATFORM][HERE]}}
library._FOLDER = Path(tempfile.mkdtemp(prefix="sanitized-"))
atexit.register(shutil.rmtree, library._FOLDER)
for source in sorted(hatch_build.FOLDER.glob("*.[ch]")):
    shutil.copy2(source, library._FOLDER)
hatch_build.compile_library(library._FOLDER, *OPTIONS)
if (reason := library.unsupported_reason()) is not None:
    raise pytest.UsageError(f"nothing to sanitize: {reason}")
