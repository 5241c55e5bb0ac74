"""The check of every row of these tables: a call raises its exception with its words, and changes nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import LinearProblem
from torch import Tensor, nn

from smoa_kernels import FusedSMoALinear


@dataclass
class World:
    """Objects and files that a bad call must not change."""

    problem: LinearProblem
    linear: nn.Linear
    layer: FusedSMoALinear
    folder: Path

    def bits(self) -> dict[str, object]:
        """Every tensor's bytes and requires_grad, every file's bytes."""
        p = self.problem
        tensors = {name: value for name, value in vars(p).items() if isinstance(value, Tensor)}
        tensors |= {f"partition {i}": t for i, t in enumerate(p.partition.tensors())}
        tensors |= {f"linear {name}": t for name, t in self.linear.named_parameters()}
        tensors |= {f"layer {name}": t for name, t in self.layer.state_dict(keep_vars=True).items()}
        files = {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        settings = {k: v for k, v in vars(self.layer).items() if not k.startswith("_")}
        return {
            name: (t.detach().numpy().tobytes(), t.requires_grad) for name, t in tensors.items()
        } | {"settings": repr(settings), "scaling": self.layer.scaling, "files": files}  # fmt: skip

    def arguments(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        names = ("x", "weight", "bias", "A", "B", "partition", "ranks", "scaling")
        return {name: getattr(self.problem, name) for name in names} | dict(changed)


Call = Callable[[World], object]
Row = tuple[Call, type[Exception], str]
# A row with changes to the arguments of a good call.
Change = tuple[dict[str, Any], type[Exception], str]


def check(world: World, call: Call, error: type[Exception], words: str) -> None:
    """The call raises exactly `error`, not a subclass; its message holds `words`, and no bit of the world changed."""
    before = world.bits()
    with pytest.raises(error, match=words) as caught:
        call(world)
    assert type(caught.value) is error
    assert world.bits() == before


def rows(name: str, table: Sequence[tuple[Any, type[Exception], str]]) -> pytest.MarkDecorator:
    """One test per row, named after its words; the row's first part is the test's argument `name`."""
    return pytest.mark.parametrize((name, "error", "words"), table, ids=[words for *_, words in table])


def one(*values: int) -> Tensor:
    """A vector of int64."""
    return torch.tensor(values)


# Settings that `FusedSMoALinear` and `SMoAConfig` both have.
SETTINGS: list[Change] = [
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
    ({"block_ranks": 5}, TypeError, "block_ranks must be a list of ints, got 5"),
    ({"block_order": "sorted"}, ValueError, "block_order must be one of spectral, .*, got 'sorted'"),
    ({"granule": 0}, ValueError, "granule must be at least 1, got 0"),
    ({"granule": (2, 2)}, TypeError, r"granule must be an int, got \(2, 2\)"),
    ({"block_seed": -1}, ValueError, "block_seed must be at least 0, got -1"),
    ({"algorithm": "fast"}, ValueError, "algorithm must be one of auto, merged, .* got 'fast'"),
    ({"backend": ["eager"]}, ValueError, "backend must be one of .* got .'eager'"),
]

# Rare kinds of tensors, and a number too large for a float.
NESTED = torch.nested.nested_tensor([torch.randn(2, 57), torch.randn(3, 57)])
FLOAT8 = torch.ones(4, 57).to(torch.float8_e4m3fn)
HUGE = 10**400
