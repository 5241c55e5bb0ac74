"""Finds the largest tensor that torch's operators make."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Notes the most elements of any floating-point result of an operator, except memory at known addresses."""

    def __init__(self, *known_places):
        super().__init__()
        self.known_places, self.elements = known_places, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tensor.itemsize > 1:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known_places:
                    self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
        return result
