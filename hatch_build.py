"""Compiles `smoa_kernels/native/linear.c` where there is a C compiler: hatchling's hook, and `python hatch_build.py`.

Without one, or on another processor, the package is pure Python and layers run in torch operators.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "smoa_kernels" / "native"
SOURCE = FOLDER / "linear.c"
# By torch.backends.cpu.get_cpu_capability(): each instruction set is a library of its own, and one is loaded.
VARIANTS = {
    "AVX2": ["-DVECTOR_BYTES=32", "-mavx2", "-mfma"],
    "AVX512": ["-DVECTOR_BYTES=64", "-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
}


def compiler() -> str | None:
    """CC of the environment, or the first that is found; none on processors without these instruction sets."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32":
        return None
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compile_library(into: Path) -> list[Path]:
    """Compile every variant into a folder; nothing where there is no compiler, or where it fails."""
    cc, made = compiler(), []
    if cc is None:
        return []
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    for name, flags in VARIANTS.items():
        library = into / f"linear_{name.lower()}.so"
        command = [cc, "-O3", "-shared", "-fPIC", *flags, f'-DSOURCE="{digest}"', str(SOURCE), "-ldl"]
        # Under another name first: a process may have the old one loaded, or look for it now.
        unfinished = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"smoa_kernels/native is left out, {cc} failed: {done.stderr}", file=sys.stderr)
            return []
        unfinished.replace(library)
        made.append(library)
    return made


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # as a command, without the build backend
    pass
else:

    class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """Puts the libraries into the wheel, which then is for one kind of machine."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Called before a wheel is built, and before an editable installation."""
            if self.target_name != "wheel":
                return
            libraries = compile_library(FOLDER)
            if libraries:
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
                build_data["artifacts"] += [path.relative_to(self.root).as_posix() for path in libraries]


if __name__ == "__main__":
    for path in compile_library(FOLDER):
        print(f"made {path}")
