"""Hatchling's hooks: they compile the code, and make the README's links work on PyPI's page.

`backends/native/calls.c` is compiled where there is a C compiler; `python hatch_build.py` does it without a build.
Without a compiler, or on another processor, the package is pure Python and layers run in torch operators.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "smoa_kernels" / "backends" / "native"
SOURCE = FOLDER / "calls.c"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
# By platform and library.py's instruction_set(): each instruction set is a library of its own, and one is loaded.
VARIANTS = {
    "linux-x86_64": {
        "AVX2": ["-DVECTOR_BYTES=32", *AVX2],
        "AVX512": ["-DVECTOR_BYTES=64", *AVX512],
    },
    # GCC schedules before it gives out registers here, not on x86, and would then keep half of a tile's sums in memory.
    "linux-aarch64": {"NEON": ["-DVECTOR_BYTES=16", "-fno-schedule-insns"]},
}


def compiler() -> list[str] | None:
    """CC of the environment, or the first that is found; none where the wheel is for other machines."""
    if sysconfig.get_platform() not in VARIANTS:
        return None
    commands = (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"])
    return next((command for command in commands if command and shutil.which(command[0])), None)


def digest_of(sources: list[Path]) -> str:
    """The digest that a library holds of its sources; library.py compares it."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def compile_library(into: Path, *options: str) -> list[Path]:
    """Compile every variant into a folder, also by `options`; none without a compiler, nor those that it fails at."""
    cc, made = compiler(), []
    if cc is None:
        return []
    digest = digest_of(sorted(FOLDER.glob("*.[ch]")))
    for name, flags in VARIANTS[sysconfig.get_platform()].items():
        library = into / f"linear_{name.lower()}.so"
        command = [*cc, "-O3", "-shared", "-fPIC", *flags, f'-DSOURCE="{digest}"', *options, str(SOURCE)]
        # In a folder of its own first: a process may have the old one loaded, or look for it now.
        with tempfile.TemporaryDirectory(dir=into) as own:
            unfinished = Path(own, library.name)
            try:
                subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", error)
                print(
                    f"backends/native is left out for {name}, {shlex.join(cc)} failed: {reason}",
                    file=sys.stderr,
                )
                continue
            unfinished.replace(library)
        made.append(library)
    return made


def with_absolute_links(readme: str, repository: str, version: str) -> str:
    """The README as PyPI shows it, which has none of our files: links lead to those of the version's tag."""

    def absolute(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        return f"{picture}{text}({repository}/{'raw' if picture else 'blob'}/v{version}/{path})"

    return re.sub(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)", absolute, readme)


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
    from hatchling.metadata.plugin.interface import MetadataHookInterface
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

    class LongDescription(MetadataHookInterface):
        """Makes the long description of README.md."""

        PLUGIN_NAME = "custom"

        def update(self, metadata: dict[str, Any]) -> None:
            """Called with what pyproject.toml's `project` says."""
            readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
            text = with_absolute_links(readme, metadata["urls"]["Repository"], metadata["version"])
            metadata["readme"] = {"content-type": "text/markdown", "text": text}


if __name__ == "__main__":
    for path in compile_library(FOLDER):
        print(f"made {path}")
