"""The library's cost beside its peers': `make bench` measures, `report.py` writes tables and figures."""

import sys
from pathlib import Path

# The examples are scripts, not a package, so their folder is put on the path, as Python does for a script.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
