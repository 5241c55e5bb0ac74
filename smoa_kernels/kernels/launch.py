# mypy: allow-untyped-calls
"""`Launch`: what a kernel is launched with, bound once, so that launching it again is cheap.

A kernel's arguments are named once, in its signature: pointers (`*_ptr`), then the sizes that change from call to call
(the number of tokens, or of tiles of them), then other numbers, then constants in capitals. A :class:`Launch` binds by
these names: sizes and strides of an adapter come from its :class:`Layout`, tiles from the fields of the configuration,
and all other numbers from the kernel's host function. A plan is cached by the bucket of the number of tokens.

Triton launches on the current device, even if its arguments are on another one; :func:`on_device` sets it. To find the
compiled kernel Triton specialises each argument at every launch, 25 µs of Python for 20 arguments. A `Launch` keeps the
compiled kernel and launches it directly, `compiled[grid](*arguments)`, as in Triton's tutorials.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS, gemm_is_ieee, precision_of
from .common import input_precision
from .spec import Config, Kernel, Key, granule_of
from .table import select

_STAY: AbstractContextManager[None] = nullcontext()

Pointers: TypeAlias = Mapping[str, Tensor | None]
Grid: TypeAlias = tuple[int, int, int]


class Arguments(NamedTuple):
    """The arguments of one launch: `launch(*arguments)` repeats it.

    Attributes:
        grid: numbers of programs.
        pointers: the kernel's tensors by name; others are ignored.
        sizes: the kernel's first numbers, which change from call to call.
    """

    grid: Grid
    pointers: Pointers
    sizes: tuple[int, ...] = ()


class _Hooks(threading.local):
    def __init__(self) -> None:
        self.of_this_thread: list[tuple[Callable[[Launch, Arguments], object], bool]] = []


_hooks = _Hooks()


@contextmanager
def launch_hook(hook: Callable[[Launch, Arguments], object], *, new: bool = False) -> Iterator[None]:
    """Call `hook` with each launch of this thread and its arguments before it happens.

    `launch.compiled(arguments)` is the compiled kernel. If the hook returns something true or raises an exception, the
    launch does not happen. A hook's own launches call no hooks.

    Args:
        hook: called after those that were added before it.
        new: call it only for compiled kernels that a `Launch` launches for the first time.
    """
    _hooks.of_this_thread.append((hook, new))
    try:
        yield
    finally:
        _hooks.of_this_thread.pop()


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
    """The properties of an adapter that a launch depends on, as plain values, by which plans are cached.

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

    def choose(self, kernel: Kernel, **sizes: Any) -> Config:
        """A kernel's launch parameters by :func:`table.select`; `sizes` are further fields of `spec.Key`."""
        precision = precision_of(self.dtype, ieee=self.input_precision == "ieee").name
        key = Key(kernel.name, precision, self.rank, self.num_blocks, *self.features, **sizes)
        return select(kernel, key._replace(factors=self.factors), self.device)

    def numbers(self) -> dict[str, Any]:
        """Sizes, strides and constants as kernels name them."""
        N, C = self.features
        numbers = {"N": N, "C": C, "rank": self.rank, "num_blocks": self.num_blocks}
        constants: dict[str, Any] = {"GRANULE": self.granule, "INPUT_PRECISION": self.input_precision}
        constants |= {"INDEXED": self.indexed, "W_TRANSPOSED": self.transposed}
        names = (*_EXPERTS_STRIDES, *_BLOCKS) if self.experts else _STRIDES
        strides = zip(names, self.strides, strict=True)
        return numbers | constants | {f"stride_{name}": stride for name, stride in strides}


def launch_arguments(adapter: PackedAdapter | ExpertsAdapter) -> tuple[Layout, Pointers]:
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
            cached: tuple[Layout, Pointers] = known
            return cached
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
        adapter.layout = layout, pointers  # in one step, because another thread may read it at once
    return layout, pointers


class Launch:
    """A launch of a kernel, complete except for its :class:`Arguments`, and the compiled kernels that it used so far.

    It depends only on the sizes, strides, dtypes and device of a problem, so functions under :func:`table.cached` make
    it once for a problem. It runs on the problem's device, which must be the current one.

    Which compiled kernel it is depends on the launch, on the dtypes of the pointers, and on whether 16 divides each
    address. Triton launches the first time and returns the compiled kernel; the interpreter returns none.

    Args:
        kernel: a function under `@triton.jit`, whose pointers come first.
        config: the compiler's options and the tiles. Its fields in capitals are constants of the kernel.
        layout: of the adapter whose sizes and strides the kernel takes.
        numbers: the kernel's other arguments; they come before those of `layout` and `config`.
    """

    __slots__ = ("_compiled", "_numbers", "_pointers", "config", "kernel")

    def __init__(self, kernel: Any, config: Config, layout: Layout | None = None, **numbers: Any) -> None:
        known = {name.upper(): value for name, value in vars(config).items()}
        known |= (layout.numbers() if layout else {}) | numbers
        self._pointers = tuple(name for name in kernel.arg_names if name.endswith("_ptr"))
        sizes_end = next(i for i, name in enumerate(kernel.arg_names) if name in known)
        self._numbers = tuple(known[name] for name in kernel.arg_names[sizes_end:])
        self.kernel, self.config = kernel, config
        self._compiled: dict[tuple[object, ...], CompiledKernel] = {}

    def __call__(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> None:
        """Launch on the current device; see :class:`Arguments`."""
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
        form = tuple(dtypes)
        compiled = self._compiled.get(form)
        if _hooks.of_this_thread and self._is_stopped(compiled is None, Arguments(grid, pointers, sizes)):
            return
        if compiled is not None:
            compiled[grid](*tensors, *sizes, *self._numbers)
            return
        compiled = self.by_triton(grid, pointers, sizes)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[form] = compiled

    def by_triton(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> Any:
        """Let Triton find or compile the kernel, and launch it; returns what it compiled."""
        tensors = (pointers[name] for name in self._pointers)
        return self.kernel[grid](*tensors, *sizes, *self._numbers, **self.config.options)

    def compiled(self, arguments: Arguments) -> Any:
        """What Triton compiles for these arguments, a `CompiledKernel`; nothing is launched."""
        tensors = (arguments.pointers[name] for name in self._pointers)
        values = *tensors, *arguments.sizes, *self._numbers
        return self.kernel.warmup(*values, grid=arguments.grid, **self.config.options)

    def _is_stopped(self, new: bool, arguments: Arguments) -> bool:
        hooks, _hooks.of_this_thread = _hooks.of_this_thread, []
        try:
            return any(hook(self, arguments) for hook, only_new in hooks if new or not only_new)
        finally:
            _hooks.of_this_thread = hooks
