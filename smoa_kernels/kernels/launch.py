# mypy: allow-untyped-calls
"""`Launch`: what a kernel is launched with, bound once, so that later launches are cheap.

A kernel's arguments are named once, in its signature: pointers (`*_ptr`), then the sizes that change from call to call
(the number of tokens, or of tiles of them), then other numbers, then constants in capitals. A :class:`Launch` binds by
these names: sizes and strides of an adapter come from its :class:`Layout`, tiles from the fields of the configuration,
and all other numbers from the kernel's host function. A plan is cached by the bucket of the number of tokens.

Triton launches on the current device, even if its arguments are on another; :func:`on_device` sets it. To find the
compiled kernel Triton specialises each argument at every launch, 25 µs of Python for 20 arguments. A `Launch` keeps the
compiled kernel and launches it directly, `compiled[grid](*arguments)`, as in Triton's tutorials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from operator import itemgetter
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

Pointers: TypeAlias = Mapping[str, Tensor | None]
Grid: TypeAlias = tuple[int, int, int]


_hooks: ContextVar[tuple[tuple[Callable[..., object], bool], ...]] = ContextVar("launch hooks", default=())


@contextmanager
def launch_hook(hook: Callable[..., object], *, new: bool = False) -> Iterator[None]:
    """Call `hook(launch, *arguments)` before each launch of this thread, `launch(*arguments)`.

    `launch.compiled(*arguments)` is the compiled kernel. If the hook returns something true or raises an exception, the
    launch does not happen. A hook's own launches call no hooks.

    Args:
        hook: called after those that were added before it.
        new: call it only for compiled kernels that a `Launch` launches for the first time.
    """
    token = _hooks.set((*_hooks.get(), (hook, new)))
    try:
        yield
    finally:
        _hooks.reset(token)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one within a block, if it is a CUDA device; torch's own operators do so themselves."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


_STAY = nullcontext()
# Strides of W0 (N, C), A (ρ, C) and B (N, ρ), and of experts' (E, …), in this order.
_STRIDES = ("wn", "wc", "ar", "ac", "bn", "br")
_EXPERTS_STRIDES = ("we", "wn", "wc", "ae", "ar", "ac", "be", "bn", "br")
_LABELS = ("row_block", "col_block")
_BLOCKS = ("row_index", "col_index", "row_offsets", "col_offsets")


class Layout(NamedTuple):
    """The properties of an adapter that a launch depends on, as plain values, by which plans are cached."""

    device: torch.device  # of all its tensors
    precision: str  # W0's and the activations' in `PRECISIONS`; torch's setting decides between TF32 and IEEE
    experts: int  # E; 0 for the adapter of one weight
    features: tuple[int, int]  # N and C
    rank: int  # ρ
    num_blocks: int  # K
    granule: int  # adjacent coordinates that kernels may take as one, from `spec.granule_of`
    indexed: bool  # whether blocks are read through an index, because they are not slices
    factors: str  # dtype of A and B, by its name in `Key`
    strides: tuple[int, ...]  # of W0, A, B; then from expert to expert those of block indices and offsets

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

    It keeps them until torch's setting of TF32 or a stride changes (`weight.data = …`). Kernels over experts read A
    along C, so the A of a transposed adapter is copied; it is small.
    """
    w, a, b = adapter.weight, adapter.A, adapter.B
    precision = precision_of(w.dtype, ieee=gemm_is_ieee(w.dtype, "cuda")).name
    strides = (*w.stride(), *a.stride(), *b.stride())
    blocks: BlockPartition | ExpertBlocks
    names: tuple[str, ...]
    if isinstance(adapter, PackedAdapter):
        cached = adapter.layout
        if isinstance(cached, tuple) and (cached[0].precision, cached[0].strides) == (precision, strides):
            return cached
        blocks, granularity, names = adapter.partition, adapter.partition.granularity, (*_BLOCKS, *_LABELS)
    else:
        blocks, granularity, names = adapter.blocks, adapter.blocks.granule, _BLOCKS
        a = a if a.stride(2) == 1 else a.contiguous()
        tensors = [getattr(blocks, name) for name in names]
        apart = (0 if tensor is None or len(tensor) == 1 else tensor.stride(0) for tensor in tensors)
        strides = *w.stride(), *a.stride(), *b.stride(), *apart
    *experts, N, C = w.shape
    layout = Layout(
        w.device,
        precision,
        sum(experts),
        (N, C),
        a.shape[-2],
        blocks.num_blocks,
        granule_of(granularity, (N, C)),
        not blocks.is_contiguous,
        precision_of(a.dtype, ieee=True).name,
        strides,
    )
    pointers = {
        "w_ptr": w,
        "a_ptr": a,
        "b_ptr": b,
        "ranks_ptr": adapter.ranks,
        "scaling_ptr": adapter.scaling,
    }
    pointers |= {f"{name}_ptr": getattr(blocks, name) for name in names}
    if isinstance(adapter, PackedAdapter):
        adapter.layout = layout, pointers  # in one step, because another thread may read it at once
    return layout, pointers


class Launch:
    """A launch of a kernel, complete except for what changes from call to call, and the compiled kernels that it used.

    It depends only on the sizes, strides, dtypes and device of a problem, so functions under :func:`table.cached` make
    it once for a problem. It runs on the problem's device, which must be the current one. Which compiled kernel it is
    depends on the launch, on the dtypes of the pointers, and on whether 16 divides each address.

    Args:
        kernel: a function under `@triton.jit`, whose pointers come first.
        config: the compiler's options and the tiles. Its fields in capitals are constants of the kernel.
        layout: of the adapter whose sizes and strides the kernel takes.
        numbers: the kernel's other arguments; they come before those of `layout` and `config`.
    """

    def __init__(self, kernel: Any, config: Config, layout: Layout | None = None, **numbers: Any) -> None:
        values = {name.upper(): value for name, value in vars(config).items()}
        values |= (layout.numbers() if layout else {}) | numbers
        self._tensors = itemgetter(*(name for name in kernel.arg_names if name.endswith("_ptr")))
        sizes_end = next(i for i, name in enumerate(kernel.arg_names) if name in values)
        self._numbers = tuple(values[name] for name in kernel.arg_names[sizes_end:])
        self.kernel, self.config = kernel, config
        self._compiled: dict[tuple[object, ...], CompiledKernel] = {}

    def __call__(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> None:
        """Launch on the current device.

        Args:
            grid: numbers of programs.
            pointers: the kernel's tensors by name; others are ignored.
            sizes: the kernel's first numbers, which change from call to call.
        """
        tensors = self._tensors(pointers)
        address = 0
        dtypes: list[torch.dtype | bool | None] = []
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
        if (hooks := _hooks.get()) and self._is_stopped(hooks, compiled is None, grid, pointers, sizes):
            return
        if compiled is not None:
            compiled[grid](*tensors, *sizes, *self._numbers)
            return
        compiled = self.by_triton(grid, pointers, sizes)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[form] = compiled

    def by_triton(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> Any:
        """Let Triton find or compile the kernel, and launch it; returns what it compiled, a `CompiledKernel`."""
        return self.kernel[grid](*self._tensors(pointers), *sizes, *self._numbers, **self.config.options)

    def compiled(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> Any:
        """Like :meth:`by_triton`, but nothing is launched."""
        values = *self._tensors(pointers), *sizes, *self._numbers
        return self.kernel.warmup(*values, grid=grid, **self.config.options)

    def _is_stopped(self, hooks: tuple[Any, ...], new: bool, *arguments: Any) -> bool:
        token = _hooks.set(())
        try:
            return any(hook(self, *arguments) for hook, only_new in hooks if new or not only_new)
        finally:
            _hooks.reset(token)
