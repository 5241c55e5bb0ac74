"""Writes adapters elsewhere and then moves them, so that an interruption leaves the old files or the new files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .format import CONFIG_NAME, METHOD, WEIGHTS_NAME

# Part of the name of the hidden folder that a save writes to.
_SCRATCH = ".saving-"


@contextmanager
def replacing(folder: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """Give a hidden folder to write to, which becomes `folder` when the block ends without an exception.

    All files are on the disk by then. A new folder is renamed. In an old one files are replaced, configurations last;
    a kill between two of them leaves files of both saves, which :func:`check_seal` notices. Where an exception ends the
    block, `folder` stays as it was.

    Args:
        folder: what is written.
        new: it is new or empty and no mount point, and is always renamed.

    Raises:
        OSError: the files could not be written; the message names `folder`.
    """
    folder = Path(folder)
    is_new, name = new or not folder.exists(), f"{_SCRATCH}{uuid.uuid4().hex[:8]}"
    # In an old folder, beside which another file system may begin.
    scratch = folder.parent / f".{folder.name}{name}" if is_new else folder / name
    try:
        try:
            scratch.mkdir(parents=True)
            yield scratch
            files = [file for file in scratch.rglob("*") if file.is_file()]
            for file in files:
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
            if new or not folder.exists():  # another process may have made it meanwhile
                if folder.exists():
                    folder.rmdir()  # an error if it is not empty
                scratch.rename(folder)
                return
            for file in files:
                (folder / file.relative_to(scratch)).parent.mkdir(parents=True, exist_ok=True)
        # A full disk's error names no file, or a file in the scratch folder; safetensors' errors are not OSErrors.
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", 0) is None:  # of the hub's client, or of a block within
                raise
            raise OSError(f"cannot save to {folder}, which is as it was: {error}") from error
        for file in sorted(files, key=lambda file: file.name == CONFIG_NAME):
            os.replace(file, folder / file.relative_to(scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the SHA-256 of the weights into the configuration beside them, for each SMoA adapter under `folder`.

    No file system renames two files at once, so a kill may leave one file of each save, whose ranks and shapes may
    agree.
    """
    for path in folder.rglob(CONFIG_NAME):
        weights = path.with_name(WEIGHTS_NAME)
        values = json.loads(path.read_text(encoding="utf-8"))
        if weights.is_file() and values["peft_type"] == METHOD:
            values["weights_sha256"] = _sha256(weights)
            path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def check_seal(folder: Path, expected: str | None) -> None:
    """Warn if the SHA-256 of the weights in `folder` is not `expected`; None accepts any.

    Raises:
        ValueError: a save was killed after it moved the weights and before it moved their configuration.
    """
    weights = folder.resolve() / WEIGHTS_NAME  # of a folder given as "." too, the one above is searched
    if expected is None or not weights.is_file() or (digest := _sha256(weights)) == expected:
        return
    message = f"{weights} is not the file that {CONFIG_NAME} beside it was saved with: its SHA-256 is another"
    # An adapter that is not named "default" has a subfolder of its own.
    for place in (weights.parent, weights.parent.parent):
        for path in place.glob(f"{_SCRATCH}*/**/{CONFIG_NAME}"):
            if digest in path.read_text(encoding="utf-8", errors="replace"):
                raise ValueError(f"{message}. A save was killed: move {path} here to complete it")
    warnings.warn(f"{message}. Another tool wrote it, or it is damaged", UserWarning, stacklevel=2)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
