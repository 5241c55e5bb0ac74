"""How often bfloat16 code misses the L1 cache of a processor that is not here: `python -m tests.cpu_emulator.misses`.

Valgrind's cachegrind runs misses.c, its instructions emulated, with that processor's cache, and counts for each
function. It knows nothing of what is asked for ahead: a miss is a line that is not in the L1 cache by itself.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

from hatch_build import FOLDER

from .build import compile_program

L1 = {"Zen 5": "49152,12,64", "Zen 4": "32768,8,64"}
"""Bytes, ways, bytes of a line."""
TOKENS, APART = (8, 64), (0, 32)


def compile_misses(output: Path) -> None:
    """Writes the program."""
    features = ["-DVECTOR_BYTES=64", '-DSOURCE=""', f"-I{FOLDER}"]
    compile_program(
        "avx512bf16", *features, "-g", str(Path(__file__).with_suffix(".c")), "-lm", "-o", str(output)
    )


def count_misses(program: Path, cache: str, tokens: int, apart: int) -> Counter[str]:
    """Lines that each function found missing when it read them."""
    events = program.with_name("events")
    options = ["--tool=cachegrind", "--cache-sim=yes", f"--cachegrind-out-file={events}"]
    options += [f"--D1={cache}", "--LL=8388608,16,64"]
    command = ["valgrind", *options, program, str(tokens), str(apart)]
    subprocess.run(command, check=True, capture_output=True)
    found, function, column = Counter[str](), "", 0
    for line in events.read_text().splitlines():
        if line.startswith("events:"):
            # Lines of counts begin with a number of their own, as this one does with a name.
            column = line.split().index("D1mr")
        elif line.startswith("fn="):
            function = line[3:].split(".")[0]
        elif line[:1].isdigit():
            found[function] += int(line.split()[column])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "misses")
        compile_misses(program)
        for (name, cache), tokens, apart in product(L1.items(), TOKENS, APART):
            found = count_misses(program, cache, tokens, apart)
            most = ", ".join(f"{function} {misses:,}" for function, misses in found.most_common(3))
            rows = f"{tokens} tokens, rows {2 * (2048 + apart)} bytes apart"
            print(f"{name}, {rows}: {found.total():,} ({most})")


if __name__ == "__main__":
    main()
