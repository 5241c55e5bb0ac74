"""What the library costs beside its peers: `make bench` measures, `report.py` writes tables and figures."""

import sys
from pathlib import Path

# The examples are scripts, not a package: their folder goes on the path, as Python puts it there for a script.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
