"""Run PEFT's own test suite with SMoA: downloads the sdist of the installed PEFT, then `pytest` with `plugin.py`.

    python tests/peft_suite/run.py [--folder DIR] [--hira] [pytest options]

With `--hira` it runs PEFT's own HiRA tests on accelerated HiRA layers instead, with `hira_plugin.py`.

The folder (default: a cache below the user's) keeps the sources and the tiny models for the next run.
"""

import argparse
import fcntl
import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def fetch_tests(folder: Path) -> Path:
    """The `tests` folder of the installed PEFT's sdist."""
    version = importlib.metadata.version("peft")
    sources = folder / f"peft-{version}"
    if not sources.is_dir():
        command = [sys.executable, "-m", "pip", "download", f"peft=={version}", "--quiet", "--no-deps"]
        subprocess.run([*command, "--no-binary", "peft", "-d", str(folder)], check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    (sources / "tests" / "__init__.py").touch()  # its modules use relative imports
    return sources / "tests"


def main() -> int:
    """Download PEFT's tests, make the models, and run pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smoa-kernels" / "peft-suite"
    parser.add_argument("--folder", type=Path, default=cache)
    parser.add_argument("--hira", action="store_true")
    options, rest = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE))
    from models import make_models
    from plugin import MODULES

    models = options.folder.resolve() / "models"
    with (options.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # CI runs both suites at once
        tests = fetch_tests(options.folder.resolve())
        make_models(models)
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    files = [str(tests / f"{name}.py") for name in MODULES]
    plugin = "hira_plugin" if options.hira else "plugin"
    settings = ["-p", plugin, "-c", os.devnull, "--rootdir", str(tests.parent), "-q", "-rfEs"]
    command = [sys.executable, "-m", "pytest", *settings, *files, *rest]
    return subprocess.run(command, cwd=models, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
