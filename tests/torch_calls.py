"""Records the calls of torch's operators, the largest tensor that they make, what backward keeps; sets the threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Calls(TorchDispatchMode):
    """Notes each call of an operator with its positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> set[str]:
        """The operators' names, without overloads."""
        return {func.overloadpacket.__name__ for func, _ in self.made}


class Largest(TorchDispatchMode):
    """Records the size of an operator's largest floating-point result, except memory at known addresses."""

    def __init__(self, *known_places: int) -> None:
        super().__init__()
        self.known_places, self.elements = known_places, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.itemsize > 1:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known_places:
                    self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
        return result


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """Lists the tensors that the body saves for backward."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
