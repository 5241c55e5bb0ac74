# mypy: allow-untyped-calls
"""`Launch`: the grid and the arguments of a kernel, remembered so that launching it again is cheap.

A kernel's arguments are named once, in its signature: pointers (`*_ptr`), then numbers, then constants in capitals. A
:class:`Launch` binds by these names: sizes and strides of an adapter come from its :class:`Layout`, tiles from the
fields of the configuration, and all other numbers from the kernel's host function.

Triton launches on the current device, even if its arguments are on another one; :func:`on_device` sets it. To find the
compiled kernel Triton specialises each argument at every launch, 25 µs of Python for 20 arguments. A `Launch` remembers
the kernel and calls it directly.

The direct call uses parts of Triton that are not public. If one is missing or raises, :func:`use_tritons_launcher`
turns the direct call off for this process, and Triton launches.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..checks import first_line
from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS, gemm_is_ieee, precision_of
from .common import input_precision
from .spec import Config, Key, bucket, granule_of
from .table import select

_STAY: AbstractContextManager[None] = nullcontext()
_runtime: Any = knobs.runtime  # holds the hooks on launches


class _Listener(threading.local):
    hear: Callable[[Launch, Pointers], object] | None = None
    hear_new: Callable[[Launch, Pointers], object] | None = None


_listener = _Listener()


@contextmanager
def heard_by(hear: Callable[[Launch, Pointers], object] | None, *, new: bool = False) -> Iterator[None]:
    """Call `hear` with each launch of this thread and its pointers before it happens. Triton itself launches meanwhile.

    If `hear` returns something true or raises an exception, the launch does not happen. None: nobody hears meanwhile.
    With `new`, it hears only of compiled kernels that a `Launch` launches for the first time.
    """
    kind = "hear_new" if new else "hear"
    before = getattr(_listener, kind)
    setattr(_listener, kind, hear)
    try:
        yield
    finally:
        setattr(_listener, kind, before)


@dataclass
class _ShortWay:
    obstacle: str = ""  # why Triton launches in this process, not the direct call


short_way = _ShortWay()


def use_tritons_launcher(reason: str) -> None:
    """Let Triton launch everything in this process from now on. Warns once."""
    if not short_way.obstacle:
        warnings.warn(
            f"kernels are launched by Triton's own launcher, which is slower: {reason}", stacklevel=3
        )
    short_way.obstacle = reason


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one within a block. Does nothing if it is the current one, or no CUDA device.

    Torch's own operators set their device themselves. The backend calls this at the start of a pass, the tuner around
    its measurements.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


# Strides of W0 (N, C), A (ρ, C) and B (N, ρ), and of experts' (E, …), in this order.
_STRIDES = ("wn", "wc", "ar", "ac", "bn", "br")
_EXPERTS_STRIDES = ("we", "wn", "wc", "ae", "ar", "ac", "be", "bn", "br")
_BLOCKS = ("row_index", "col_index", "row_offsets", "col_offsets")


class Layout(NamedTuple):
    """The properties of an adapter that a launch depends on, as plain values, which can be remembered.

    Attributes:
        device: of all its tensors.
        precision: name of W0's and the activations' in `PRECISIONS`; torch's setting decides between TF32 and IEEE.
        experts: E; 0 for the adapter of one weight.
        features: N and C.
        rank: ρ.
        num_blocks: K.
        granule: adjacent coordinates that kernels may take as one, from `spec.granule_of`.
        indexed: whether blocks are read through an index, because they are not slices.
        factors: dtype of A and B, by its name in `Key`.
        strides: of W0, A and B; then how far one expert's block indices and offsets lie from the next one's.
    """

    device: torch.device
    precision: str
    experts: int
    features: tuple[int, int]
    rank: int
    num_blocks: int
    granule: int
    indexed: bool
    factors: str
    strides: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether W0 is read across its rows: its stride along C is not 1."""
        return self.strides[2 if self.experts else 1] != 1

    @property
    def dtype(self) -> torch.dtype:
        """W0's, and the activations'."""
        return PRECISIONS[self.precision].dtype

    @property
    def input_precision(self) -> str:
        """How float32 products round, "tf32" or "ieee"."""
        return input_precision(self.dtype, allow_tf32=self.precision == "tf32")

    def choose(self, kernel: str, tokens: int | None = None, **sizes: Any) -> Config:
        """Return the launch parameters by :func:`table.select`.

        Args:
            kernel: one of `KERNELS`.
            tokens: T, if the choice depends on it.
            sizes: further fields of `spec.Key`.
        """
        precision = precision_of(self.dtype, ieee=self.input_precision == "ieee").name
        seen = 0 if tokens is None else bucket(tokens)
        return select(
            Key(kernel, precision, self.rank, self.num_blocks, *self.features, seen, **sizes), self.device
        )

    def experts_sizes(self, pairs: int) -> dict[str, Any]:
        """Fields of `spec.Key` for an adapter of experts. `tokens` is the average number of pairs of an expert."""
        tokens = -(-pairs // max(self.experts, 1))
        sides = {"granule": self.granule, "transposed": self.transposed}
        return {"tokens": tokens, "factors": self.factors, **sides}

    def numbers(self) -> dict[str, Any]:
        """Sizes, strides and constants as kernels name them."""
        N, C = self.features
        numbers = {"N": N, "C": C, "rank": self.rank, "num_blocks": self.num_blocks}
        constants: dict[str, Any] = {"GRANULE": self.granule, "INPUT_PRECISION": self.input_precision}
        constants |= {"INDEXED": self.indexed, "W_TRANSPOSED": self.transposed}
        names = (*_EXPERTS_STRIDES, *_BLOCKS) if self.experts else _STRIDES
        strides = zip(names, self.strides, strict=True)
        return numbers | constants | {f"stride_{name}": stride for name, stride in strides}


Pointers: TypeAlias = Mapping[str, Tensor | None]


def described(adapter: PackedAdapter | ExpertsAdapter) -> tuple[Layout, Pointers]:
    """An adapter's layout, and its tensors as kernels name them. A packed adapter keeps both for its other launches.

    It keeps them until torch's setting of TF32 changes. Kernels over experts read A along C, so the A of a transposed
    adapter is copied; it is small.
    """
    w, a, b = adapter.weight, adapter.A, adapter.B
    precision = precision_of(w.dtype, ieee=gemm_is_ieee(w.dtype, "cuda")).name
    pointers: dict[str, Tensor | None] = {}
    blocks: BlockPartition | ExpertBlocks
    if isinstance(adapter, PackedAdapter):
        known = adapter.layout
        strides = (*w.stride(), *a.stride(), *b.stride())  # `weight.data = …` may have changed them
        if isinstance(known, tuple) and (known[0].precision, known[0].strides) == (precision, strides):
            found: tuple[Layout, Pointers] = known
            return found
        blocks, granularity, apart = adapter.partition, adapter.partition.granularity, []
        pointers |= {"row_block_ptr": blocks.row_block, "col_block_ptr": blocks.col_block}
    else:
        blocks, granularity = adapter.blocks, adapter.blocks.granule
        tensors = [getattr(blocks, name) for name in _BLOCKS]
        apart = [0 if tensor is None or len(tensor) == 1 else tensor.stride(0) for tensor in tensors]
        a = a if a.stride(2) == 1 else a.contiguous()
    *experts, N, C = w.shape
    layout = Layout(
        w.device,
        precision,
        experts[0] if experts else 0,
        (N, C),
        a.shape[-2],
        blocks.num_blocks,
        granule_of(granularity, (N, C)),
        not blocks.is_contiguous,
        precision_of(a.dtype, ieee=True).name,
        (*w.stride(), *a.stride(), *b.stride(), *apart),
    )
    pointers |= {
        "w_ptr": w,
        "a_ptr": a,
        "b_ptr": b,
        "ranks_ptr": adapter.ranks,
        "scaling_ptr": adapter.scaling,
    }
    pointers |= {f"{name}_ptr": getattr(blocks, name) for name in _BLOCKS}
    if isinstance(adapter, PackedAdapter):
        adapter.layout = layout, pointers  # whole, because another thread may read it at once
    return layout, pointers


class Launch:
    """A launch of a kernel, complete except for its pointers, and the compiled forms that it used so far.

    It depends only on the sizes, strides, dtypes and device of a problem, so functions under :func:`table.remembered`
    make it once for a problem. It runs on the problem's device, which must be the current one.

    A form depends on the launch, on the dtypes of the pointers, and on whether 16 divides each address. Triton launches
    a form the first time, and while a profiler has hooks on launches. We rely on two properties of Triton: a launch
    returns the compiled kernel, which stays loaded while something refers to it, and the kernel's `run` launches it, as
    in PyTorch's compiler. If a launch returns anything else, nothing is remembered.

    Args:
        kernel: a function under `@triton.jit`, whose pointers come first.
        grid: numbers of programs.
        config: the compiler's options and the tiles. Its fields in capitals are constants of the kernel.
        layout: of the adapter whose sizes and strides the kernel takes.
        numbers: the kernel's other arguments; they come before those of `layout` and `config`.
    """

    __slots__ = ("_forms", "_grid", "_numbers", "_pointers", "config", "kernel")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], config: Config, layout: Layout | None = None, **numbers: Any
    ) -> None:
        known = {name.upper(): value for name, value in vars(config).items()}
        known |= (layout.numbers() if layout else {}) | numbers
        names = kernel.arg_names
        self._pointers = tuple(name for name in names if name.endswith("_ptr"))
        self._numbers = tuple(known[name] for name in names[len(self._pointers) :])
        self.kernel, self._grid, self.config = kernel, (*grid, 1, 1)[:3], config
        self._forms: dict[tuple[object, ...], CompiledKernel] = {}

    def __call__(self, **pointers: Tensor | None) -> None:
        """Launch on the current device.

        Args:
            pointers: the kernel's pointers by name; others are ignored.
        """
        address = 0
        dtypes: list[torch.dtype | bool | None] = []
        tensors = [pointers[name] for name in self._pointers]
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                address |= tensor.data_ptr()
                dtypes.append(tensor.dtype)
        if address & 15:
            dtypes += (tensor is None or not tensor.data_ptr() & 15 for tensor in tensors)
        form = self._forms.get(tuple(dtypes))
        # A profiler listens if Triton's chain of hooks has calls, or if another hook has replaced the chain.
        enter, leave, hear = _runtime.launch_enter_hook, _runtime.launch_exit_hook, _listener.hear
        unheard = hear is None and not getattr(enter, "calls", enter) and not getattr(leave, "calls", leave)
        if form is not None and unheard and not short_way.obstacle:
            try:
                stream = driver.active.get_current_stream(driver.active.get_current_device())
                form.run(
                    *self._grid,
                    stream,
                    form.function,
                    form.packed_metadata,
                    None,
                    None,
                    None,
                    *tensors,
                    *self._numbers,
                )
                return
            except Exception as error:  # Triton launches instead, and raises if it cannot
                use_tritons_launcher(f"{type(error).__name__}: {first_line(error)}")
        hears = hear, None if form is not None else _listener.hear_new
        if any(hear is not None and hear(self, pointers) for hear in hears):
            return
        compiled = self.kernel[self._grid](*tensors, *self._numbers, **self.config.options)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._forms[tuple(dtypes)] = compiled

    def compiled(self, pointers: Pointers) -> Any:
        """What Triton compiles for these pointers, a `CompiledKernel`; nothing is launched."""
        arguments = *(pointers[name] for name in self._pointers), *self._numbers
        return self.kernel.warmup(*arguments, grid=self._grid, **self.config.options)
