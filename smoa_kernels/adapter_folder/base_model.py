"""`BaseModel`: finds and reads the parameters that an adapter's file names in a base model's folder."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .reading import opened, read_json

if TYPE_CHECKING:
    from .architecture import Architecture

INDEX = "model.safetensors.index.json"


class BaseModel:
    """A base model's folder. Most parameters are stored under the model's names; `architecture` knows the others.

    Attributes:
        files: the file of each tensor, by stored name.
        index: the index of the files as it is stored; None if there is none.
        config: the model's configuration; empty where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, config = folder, dict[str, Path](), folder / "config.json"
        self.config = read_json(config) if config.is_file() else {}
        self.index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
        if self.index is not None:
            files: Any = self.index.get("weight_map")
            if not isinstance(files, dict) or any(Path(str(file)).name != file for file in files.values()):
                raise ValueError(f"{folder / INDEX} is not an index of safetensors files in its folder")
            self.files = {name: folder / file for name, file in files.items()}
        else:
            single = folder / "model.safetensors"  # transformers prefers this file to all others
            for path in [single] if single.is_file() else sorted(folder.glob("*.safetensors")):
                self.files |= dict.fromkeys(_names(path), path)
        if not self.files:
            raise FileNotFoundError(
                f"there are no safetensors files in {folder}, as save_pretrained writes them; `hf download NAME` "
                "fetches a model and prints its folder"
            )

    @cached_property
    def architecture(self) -> Architecture:
        """How the model's class stores parameters; made late, because importing transformers takes seconds."""
        from .architecture import Architecture

        return Architecture(self.folder, self.files)

    def stored_name(self, name: str) -> str | None:
        """The stored name of a parameter; None if no stored tensor holds exactly its values."""
        stored = self._same_name(name)
        return self.architecture.renamed.get(name) if stored is None else stored

    def weight_name(self, layer: str) -> str:
        """The name of a layer's weight: `<layer>.weight`, or `<layer>_weight` as of `nn.MultiheadAttention`."""
        own = f"{layer}_weight"
        return f"{layer}.weight" if self._same_name(own) is None else own

    def _same_name(self, name: str) -> str | None:
        """The stored name that agrees with the parameter's; in a model saved without its head, names may lack the first
        part or have one more."""
        if name in self.files:
            return name
        shorter = name.partition(".")[2]
        if shorter in self.files:
            return shorter
        longer = [stored for stored in self.files if stored.partition(".")[2] == name]
        return longer[0] if len(longer) == 1 else None

    def read(self, stored: str) -> Tensor:
        """Read a tensor by its stored name, mapped into memory."""
        return self.read_all([stored])[stored]

    def read_all(self, stored: Collection[str]) -> dict[str, Tensor]:
        """The same for several, and opens each of their files once."""
        tensors: dict[str, Tensor] = {}
        for path in {self.files[name] for name in stored}:
            with opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in stored if self.files[name] == path}
        return tensors

    def get(self, name: str) -> Tensor | None:
        """Read a parameter as the model has it, assembled from parts if need be; None if the folder lacks it."""
        stored = self.stored_name(name)
        if stored is not None:
            return self.read(stored)
        return self.architecture.assemble(name, self.read) if name in self.architecture.parts else None

    def by_file(self) -> dict[Path, list[str]]:
        """The names of the tensors in each file; all files are readable and hold them."""
        names: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            names.setdefault(path, []).append(name)
        for path, expected in names.items():
            if missing := sorted({*expected}.difference(_names(path))):
                raise ValueError(f"{path} lacks {missing[0]}, which {INDEX} says it holds")
        return names

    def stores_swapped(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether W0 of `shape` (N, C) is stored (C, N), by the stored shape, or by the layer's class if N = C."""
        stored = self._same_name(f"{name}.weight")
        if stored is None:
            return False
        if shape[0] != shape[1]:
            return tuple(self.read(stored).shape) != shape
        if self.architecture.swapped is None:
            raise ValueError(
                f"{name}: its weight is square. Whether it is stored transposed, as a Conv1D's is, the model's class "
                f"alone shows, and transformers knows none for {self.folder}"
            )
        return any(self._same_name(swapped) == stored for swapped in self.architecture.swapped)


def _names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())
