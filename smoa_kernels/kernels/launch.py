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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from copy import copy
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from ..definition.experts import ExpertBlocks, ExpertsAdapter
from ..definition.packed import PackedAdapter
from ..definition.partition import BlockPartition
from ..definition.precision import PRECISIONS, gemm_is_ieee, matmul_precision, precision_of
from .common import input_precision
from .spec import Config, Kernel, Key, granule_of
from .table import generation, select

Pointers: TypeAlias = Mapping[str, Tensor | None]
Grid: TypeAlias = tuple[int, int, int]

MOST_KEPT = 256
"""Most launches and choices that an adapter keeps: one for each bucket of tokens and strides of x."""


_Hooks: TypeAlias = tuple[Callable[..., object], ...]
# Called before every launch, and before a compiled kernel's first.
_hooks: ContextVar[tuple[_Hooks, _Hooks]] = ContextVar("launch hooks", default=((), ()))


class launch_hook:  # used like a function; `contextmanager` takes three times as long
    """Call `hook(launch, *arguments)` before each launch of this thread, `launch(*arguments)`, within a block.

    `launch.compiled(*arguments)` is the compiled kernel. If the hook returns something true or raises an exception, the
    launch does not happen. A hook's own launches call no hooks.

    Args:
        hook: called after those of its kind that were added before it.
        new: call it only for compiled kernels that a `Launch` launches for the first time.
    """

    def __init__(self, hook: Callable[..., object], *, new: bool = False) -> None:
        self._hook, self._new = hook, new

    def __enter__(self) -> None:
        every, first = _hooks.get()
        self._token = _hooks.set(
            (every, (*first, self._hook)) if self._new else ((*every, self._hook), first)
        )

    def __exit__(self, *error: object) -> None:
        _hooks.reset(self._token)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one within a block, if it is a CUDA device; torch's own operators do so themselves."""
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _STAY
    return torch.cuda.device(device)


_STAY = nullcontext()
# Strides of W0 (N, C), A (ρ, C) and B (N, ρ), and of experts' (E, …), in this order.
_STRIDES = ("wn", "wc", "ar", "ac", "bn", "br")
_EXPERTS_STRIDES = ("we", "wn", "wc", "ae", "ar", "ac", "be", "bn", "br")
_POINTERS = ("w_ptr", "a_ptr", "b_ptr", "ranks_ptr", "scaling_ptr")
_LABELS = ("row_block", "col_block")
_BLOCKS: tuple[str, ...] = ("row_index", "col_index", "row_offsets", "col_offsets")


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


class Operands:
    """An adapter's tensors as kernels take them, with the launches and choices that were made for them.

    Attributes:
        layout: what launches depend on.
        pointers: the tensors as kernels name them.
        state: what a later call compares to know that nothing has changed.
    """

    def __init__(self, layout: Layout, pointers: Pointers, state: object) -> None:
        self.layout, self.pointers, self.state = layout, pointers, state
        self._made: dict[object, Any] = {}

    def get(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """`make(layout, *arguments)`, made once; a launch, alone or first in a tuple, is bound to the tensors."""
        key = make, arguments
        made = self._made.get(key)
        if made is None:
            made = make(self.layout, *arguments)
            if isinstance(made, Launch):
                made = made.bind(self.pointers)
            elif isinstance(made, tuple):
                made = made[0].bind(self.pointers), *made[1:]
            if len(self._made) == MOST_KEPT:
                self._made.clear()
            self._made[key] = made
        return made


def operands_of(adapter: PackedAdapter | ExpertsAdapter) -> Operands:
    """An adapter's operands. A packed adapter keeps them for its other launches.

    It keeps them until torch's setting of TF32, the tuning table or a property of a tensor changes (`weight.data = …`):
    shape, strides, dtype, alignment, device. Kernels over experts read A along C, so the A of a transposed adapter is
    copied; it is small.
    """
    w, a, b = adapter.weight, adapter.A, adapter.B
    strides: tuple[tuple[int, ...], ...] = w.stride(), a.stride(), b.stride()
    tensors = w, a, b, adapter.ranks, adapter.scaling
    state = _form(tensors), strides, w.shape, a.shape, w.device, matmul_precision("cuda"), generation()
    blocks: BlockPartition | ExpertBlocks
    if isinstance(adapter, PackedAdapter):
        kept = adapter.layout
        if isinstance(kept, Operands) and kept.state == state:
            return kept
        blocks, granularity, names = adapter.partition, adapter.partition.granularity, (*_BLOCKS, *_LABELS)
    else:
        blocks, granularity, names = adapter.blocks, adapter.blocks.granule, _BLOCKS
        if a.stride(2) != 1:
            a = a.contiguous()
            tensors = w, a, *tensors[2:]
        of_blocks = (getattr(blocks, name) for name in names)
        apart = (0 if tensor is None or len(tensor) == 1 else tensor.stride(0) for tensor in of_blocks)
        strides = w.stride(), a.stride(), b.stride(), tuple(apart)
    *experts, N, C = w.shape
    layout = Layout(
        w.device,
        precision_of(w.dtype, ieee=gemm_is_ieee(w.dtype, "cuda")).name,
        sum(experts),
        (N, C),
        a.shape[-2],
        blocks.num_blocks,
        granule_of(granularity, (N, C)),
        not blocks.is_contiguous,
        precision_of(a.dtype, ieee=True).name,
        tuple(chain.from_iterable(strides)),
    )
    pointers = dict(zip(_POINTERS, tensors, strict=True))
    operands = Operands(layout, pointers | {f"{name}_ptr": getattr(blocks, name) for name in names}, state)
    if isinstance(adapter, PackedAdapter):
        adapter.layout = operands  # in one step, because another thread may read it at once
    return operands


class Launch:
    """A launch of a kernel, complete except for what changes from call to call, and the compiled kernels that it used.

    It depends only on the sizes, strides, dtypes and device of a problem, so functions under :func:`table.cached` make
    it once for a problem. It runs on the problem's device, which must be the current one. Which compiled kernel it is
    depends on the launch and on what :func:`_form` says about the tensors.

    Args:
        kernel: a function under `@triton.jit`, whose pointers come first.
        config: the compiler's options and the tiles. Its fields in capitals are constants of the kernel.
        layout: of the adapter whose sizes and strides the kernel takes.
        numbers: the kernel's other arguments; they come before those of `layout` and `config`.
    """

    def __init__(self, kernel: Any, config: Config, layout: Layout | None = None, **numbers: Any) -> None:
        values = {name.upper(): value for name, value in vars(config).items()}
        values |= (layout.numbers() if layout else {}) | numbers
        sizes_end = next(i for i, name in enumerate(kernel.arg_names) if name in values)
        self.numbers = tuple(values[name] for name in kernel.arg_names[sizes_end:])
        self.kernel, self.config = kernel, config
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        self._tensors: list[Tensor | None] = [None] * len(pointers)
        self._given = list(enumerate(pointers))  # the places of the tensors that a call gives
        # Compiled kernels, by the form of the tensors that stay, then by that of those that a call gives.
        self._forms: dict[object, dict[object, CompiledKernel]] = {}
        self._compiled = self._forms.setdefault(None, {})

    def bind(self, tensors: Pointers) -> Launch:
        """The same launch with tensors that stay, by name; others are ignored. It shares the compiled kernels."""
        bound = copy(self)
        bound._tensors = [tensors.get(name) for _, name in self._given]
        bound._given = [(at, name) for at, name in self._given if name not in tensors]
        bound._compiled = self._forms.setdefault(_form(bound._tensors), {})
        return bound

    def __call__(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> None:
        """Launch on the current device.

        Args:
            grid: numbers of programs.
            pointers: the kernel's other tensors by name.
            sizes: the kernel's first numbers, which change from call to call.
        """
        arguments = self._arguments(pointers, sizes)
        form = _form([arguments[at] for at, _ in self._given])
        compiled, (hooks, of_new) = self._compiled.get(form), _hooks.get()
        if compiled is None:
            hooks += of_new
        if hooks and self._is_stopped(hooks, grid, pointers, sizes):
            return
        if compiled is not None:
            compiled[grid](*arguments)
            return
        compiled = self.by_triton(grid, pointers, sizes)
        if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[form] = compiled

    def by_triton(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> Any:
        """Let Triton find or compile the kernel, and launch it; returns what it compiled, a `CompiledKernel`."""
        return self.kernel[grid](*self._arguments(pointers, sizes), **self.config.options)

    def compiled(self, grid: Grid, pointers: Pointers, sizes: tuple[int, ...] = ()) -> Any:
        """Like :meth:`by_triton`, but nothing is launched."""
        return self.kernel.warmup(*self._arguments(pointers, sizes), grid=grid, **self.config.options)

    def _arguments(self, pointers: Pointers, sizes: tuple[int, ...]) -> list[Any]:
        arguments: list[Any] = [*self._tensors, *sizes, *self.numbers]
        for at, name in self._given:
            arguments[at] = pointers[name]
        return arguments

    def _is_stopped(self, hooks: Sequence[Callable[..., object]], *arguments: Any) -> bool:
        token = _hooks.set(((), ()))
        try:
            return any(hook(self, *arguments) for hook in hooks)
        finally:
            _hooks.reset(token)


def _form(tensors: Sequence[Tensor | None]) -> tuple[object, ...]:
    """What Triton compiles for: dtypes, which addresses 16 divides, and for AMD which memory has less than 2 GiB."""
    address = 0
    form: list[torch.dtype | bool | None] = []
    for tensor in tensors:
        if tensor is None:
            form.append(None)
        else:
            address |= tensor.data_ptr()
            form.append(tensor.dtype)
    if address & 15:
        form += (tensor is None or not tensor.data_ptr() & 15 for tensor in tensors)
    if torch.version.hip is not None:
        form += (tensor is None or tensor.untyped_storage().size() < 2**31 for tensor in tensors)
    return tuple(form)
