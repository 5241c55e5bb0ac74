"""Draw the commands' output: `make docs-screens` writes docs/screens/NAME.svg, which the site shows.

Each command runs as a reader would run it, in colours and 110 columns wide; rich draws its output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
SCREENS = ROOT / "docs" / "screens"
WIDTH = 110
# The file's name is the command's; "overview" is the output of `smoa-kernels` alone.
COMMANDS = {
    "overview": "",
    "info": "info",
    "tune": "tune --dry-run --gpu h100 --shape 4096x4096 --tokens 8192 --kernel sum_partials",
}


def main() -> None:
    """Draw every command, or those whose names are given."""
    SCREENS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or COMMANDS:
        command = f"smoa-kernels {COMMANDS[name]}".strip()
        (SCREENS / f"{name}.svg").write_text(drawn(command, printed(COMMANDS[name])), encoding="utf-8")
        print(f"drawn: {command}")


def printed(arguments: str) -> str:
    """A command's output on a terminal, in ANSI codes."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SMOA_", "CUDA_", "TRITON_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "smoa_kernels.cli", *arguments.split()],
        env=kept | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    if str(ROOT) in done.stdout:  # `info` names the checkout where compiled code cannot be used
        raise SystemExit(f"{arguments} names {ROOT}: build its compiled code first, python hatch_build.py")
    # The same on every machine, and as wide: it stands in a table.
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(\S*)", lambda path: f"~{path[1]}" + " " * (len(home) - 1), done.stdout)


def drawn(command: str, output: str) -> str:
    """An SVG of a terminal; a reader's own fonts show it."""
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(output))
    svg = console.export_svg(title="", unique_id="screen")
    return re.sub(r" *@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # rich's font is fetched


if __name__ == "__main__":
    main()
