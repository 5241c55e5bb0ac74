"""Loads the library compiled from `calls.c`, or says why it cannot, and fills the struct that its functions take.

`hatch_build.py` compiles it when the package is built, never when it runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ...definition.dropout import Dropout
from ...definition.experts import ExpertBlocks, ExpertsAdapter
from ...definition.packed import PackedAdapter
from ...definition.partition import BlockPartition
from ...definition.thresholds import ORIGIN
from ..pages import workspace

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that compiled code takes, and their numbers in `operand.h`."""

FUNCTIONS = ("smoa_forward", "smoa_input", "smoa_gradient")
"""The functions that compute; a profile shows these names."""

_FOLDER = pathlib.Path(__file__).parent


def _integers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(name: str, tokens: Tensor) -> Tensor:
    present(name, tokens)
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class Path(IntEnum):
    """The code that computes a call, as `operand.h` numbers it."""

    FEW = 0
    """`few_tokens.h`: reads W0 once, makes W_eff in registers and packs nothing."""
    FLOAT = 1
    """`product.h` and `gradient.h` in float32; half types are widened when they are packed."""
    TILES = 2
    """`product.h` and `gradient.h` in bfloat16, by AMX or AVX512-BF16; W_eff is rounded by thresholds."""


class Algorithm(IntEnum):
    """How a layer is computed, as `operand.h` numbers it."""

    MERGED = 0
    SPLIT = 1


class Layer(ctypes.Structure):
    """`layer` of `operand.h`: a frozen weight W0 and its adapter."""

    _fields_ = [
        *_integers("rows cols dtype row_stride col_stride place row_step col_step"),
        *_pointers("weight"),
        *_integers("rank factor_dtype A_rank A_col B_row B_rank"),
        *_pointers("A B"),
        *_integers("blocks contiguous"),
        *_pointers("ranks row_index col_index row_offsets col_offsets"),
        ("scaling", ctypes.c_double),
    ]


class Call(ctypes.Structure):
    """`call` of `operand.h`: the arguments of a function. It keeps the tensors that it points to alive."""

    _fields_ = [
        ("layer", Layer),
        *_integers("path algorithm tokens dtype"),
        *_pointers("x dy"),
        *_integers("x_stride dy_stride y_stride"),
        *_pointers("keep bias y dA dB workspace"),
        *_integers("threads seed threshold column_offset experts"),
        *_pointers("ends"),
        *_integers("few"),
        *_pointers("row_index col_index"),
        *_integers("row_bytes col_bytes row_step col_step row_offsets_step col_offsets_step"),
        *_integers("weight_step A_step B_step"),
    ]

    mask: Mask | None
    """Whose memory `keep` points to."""
    read: object
    """The addresses, dtypes and strides that the struct was filled with; a call is kept while they hold."""
    lasts: bool
    """Whether the struct points to W0 itself. A copy of W0 would miss later changes, so such a call is not kept."""
    routes: dict[str, tuple[int, Path]]
    """By algorithm: up to how many tokens `Path.FEW` computes, and the path for more."""

    @classmethod
    def of(cls, adapter: PackedAdapter) -> Call:
        """A call for a layer.

        Raises:
            ValueError: indices or offsets of the blocks do not fit the weight.
        """
        p, call = adapter.partition, cls()
        call.routes = {}
        index = [dense(name, getattr(p, name), torch.int64) for name in ("row_index", "col_index")]
        weight, offsets = call.describe(adapter, p, index)
        sizes = [*weight.shape, p.num_blocks + 1, p.num_blocks + 1, p.num_blocks]
        room = workspace(weight, 64 + max(weight.shape))
        call.workspace = room.data_ptr()
        fits = [tensor.numel() for tensor in (*index, *offsets, adapter.ranks)] == sizes
        if not fits or library().smoa_check(ctypes.byref(call)):
            raise ValueError(
                f"partition must have all rows and columns of weight {tuple(weight.shape)} in its {p.num_blocks} "
                "blocks, got indices or offsets that do not"
            )
        return call

    def describe(
        self,
        adapter: PackedAdapter | ExpertsAdapter,
        blocks: BlockPartition | ExpertBlocks,
        index: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Set the layer, or the first expert's; returns W0 and the blocks' offsets as compiled code reads them."""
        weight = present("weight", adapter.weight)
        weight = weight if lies_along_memory(weight) else weight.contiguous()
        A, B = present("A", adapter.A), present("B", adapter.B)
        offsets = [dense(name, getattr(blocks, name), torch.int32) for name in ("row_offsets", "col_offsets")]
        ranks = dense("ranks", adapter.ranks, torch.int32)
        place = adapter.place if isinstance(adapter, PackedAdapter) else ORIGIN
        self.layer = Layer(
            *weight.shape[-2:], KINDS[weight.dtype], *weight.stride()[-2:], *place, weight.data_ptr(),
            A.shape[-2], KINDS[A.dtype], *A.stride()[-2:], *B.stride()[-2:], A.data_ptr(), B.data_ptr(),
            ranks.shape[0], blocks.is_contiguous, *map(_address, (ranks, *index, *offsets)), adapter.scaling.item(),
        )  # fmt: skip
        self._kept = [weight, A, B, ranks, index, offsets]
        return weight, offsets

    def scaled(self, s: float, mask: Mask | None) -> Call:
        """Set the scaling, s times the mask's, and the mask; returns itself."""
        self.layer.scaling = s if mask is None else s * mask.scale
        self.keep, self.mask = None if mask is None else mask.kept.data_ptr(), mask
        return self

    def run(
        self,
        name: str,
        *,
        x: Tensor | None = None,
        dy: Tensor | None = None,
        bias: Tensor | None = None,
        y: Tensor | None = None,
        dA: Tensor | None = None,
        dB: Tensor | None = None,
    ) -> int:
        """Call one of `FUNCTIONS`, under its name in a profile, with the workspace that it asks for.

        Rows of x, dY and y need not be adjacent; dA and dB are contiguous.
        For experts it returns -1 if their pairs or the indices of their blocks do not fit; results are invalid then.
        Else it returns how many experts a forward has skipped, because their ΔW is zero.
        """
        if x is not None:
            x = _rows("x", x)
            self.x, self.x_stride = x.data_ptr(), x.stride(0)
        if dy is not None:
            dy = _rows("dy", dy)
            self.dy, self.dy_stride = dy.data_ptr(), dy.stride(0)
        if y is not None:
            self.y, self.y_stride = y.data_ptr(), y.stride(0)
        if bias is not None:
            bias = present("bias", bias).contiguous()
        self.bias = _address(bias)
        if dA is not None and dB is not None:
            self.dA, self.dB = dA.data_ptr(), dB.data_ptr()
        tokens = x if dy is None else dy
        assert tokens is not None
        self.tokens, self.dtype, self.threads = tokens.shape[0], KINDS[tokens.dtype], torch.get_num_threads()
        self.workspace = 0
        function = getattr(library(), name)
        floats: int = function(ctypes.byref(self))
        if floats < 0:
            return -1
        room = workspace(tokens, floats)
        self.workspace = room.data_ptr()
        if not torch._C._autograd._profiler_enabled():
            return int(function(ctypes.byref(self)))
        with record_function(name):  # a running profiler by itself sees operators only
            return int(function(ctypes.byref(self)))


class _About(ctypes.Structure):
    """`about` of `calls.c`."""

    _fields_ = [
        ("source", ctypes.c_char_p),
        *_integers("has_threads bf16 amx"),
        ("format", ctypes.c_int64 * 13),
        ("further", ctypes.c_int64 * 16),  # a library of other sources may write more fields
    ]


def unsupported_reason() -> str | None:
    """Why the compiled code cannot run here, or None where it can."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if torch.get_num_threads() > 1 and not loaded[1].has_threads:
        return f"no OpenMP runtime of torch's was found for its {torch.get_num_threads()} threads"
    return None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: there is an :func:`unsupported_reason`.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded[0]


def has(feature: str) -> bool:
    """Whether compiled code multiplies bfloat16 itself ("bf16"), uses "amx", or has vectors of 512 bits ("avx512").

    For the first two the compiler that built the library must have known them, and :func:`allowed` must say so.
    """
    loaded = _load()
    if unsupported_reason() is not None or isinstance(loaded, str):
        return False
    if feature == "avx512":
        return instruction_set() == "AVX512"
    return bool(getattr(loaded[1], feature))


def instruction_set() -> str:
    """The variant of the library for this processor: "NEON" on 64-bit ARM under Linux, else torch's name."""
    return "NEON" if platform.machine() == "aarch64" else torch.backends.cpu.get_cpu_capability()


def allowed() -> tuple[bool, bool]:
    """Whether to use AVX512-BF16, and AMX. Processor, system and torch's limit, `ONEDNN_MAX_CPU_ISA`, must allow it.

    Intel's processors multiply half as fast by AVX512-BF16 as by FMA. Without AMX it is used there only if the limit
    names it.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    try:
        processor = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False, False

    def offers(flag: str, *names: str) -> bool:
        return flag in processor and (limit in ("", "ALL", "DEFAULT") or any(name in limit for name in names))

    bf16 = offers("avx512_bf16", "BF16", "FP16", "AMX", "AVX10")
    # Linux grants AMX on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    amx = bf16 and offers("amx_bf16", "AMX") and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0
    return bf16 and (amx or "BF16" in limit or "GenuineIntel" not in processor), amx


@functools.cache
def _load() -> tuple[ctypes.CDLL, _About] | str:
    """The library and what it says of itself, or why there is none. `SMOA_NATIVE` is read once, not in each call."""
    if os.environ.get("SMOA_NATIVE", "1") == "0":
        return "SMOA_NATIVE=0 forbids it"
    capability = instruction_set()
    path = _FOLDER / f"linear_{capability.lower()}.so"
    if not path.is_file():
        built = sorted(path.stem.removeprefix("linear_").upper() for path in _FOLDER.glob("linear_*.so"))
        return (
            f"it was compiled for {' and '.join(built)}, this processor is {capability}" if built
            else "it was not compiled: the wheel is for another machine, or was built without a C compiler"
        )  # fmt: skip
    try:
        sources = sorted(_FOLDER.glob("*.[ch]"))
        source = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
        bf16, amx = allowed() if capability == "AVX512" else (False, False)
        with suppress(OSError):  # torch's CUDA build for ARM loads its OpenMP runtime for itself alone
            ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
        loaded, about = ctypes.CDLL(str(path)), _About(bf16=bf16, amx=amx)
        loaded.smoa_about(ctypes.byref(about))
        if about.source != source.encode():
            return f"{path} was compiled from other sources: install the package again"
        numbers = [{"AVX512": 64, "AVX2": 32, "NEON": 16}[capability], *KINDS.values(), *Path, *Algorithm]
        offsets = [getattr(Call, field).offset for field in ("path", "workspace", "ends")]
        if [*about.format] != [*numbers, *offsets, ctypes.sizeof(Call)]:
            return f"{path} has other numbers or structs than {pathlib.Path(__file__).name}"
        for name in (*FUNCTIONS, "smoa_check", "smoa_mask"):
            getattr(loaded, name).restype = ctypes.c_int64
    except (AttributeError, OSError) as error:  # another library, or none for this system
        return f"{path} cannot be loaded: {error}"
    return loaded, about


class Mask(NamedTuple):
    """A drawn dropout mask.

    Attributes:
        kept: int16 (T, ⌈C / 16⌉), a bit for each element of x that is not dropped.
        scale: factor of a kept element.
    """

    kept: Tensor
    scale: float


def drawn(dropout: Dropout, tokens: Tensor, columns: int) -> Mask:
    """The mask of x, which has the rows of `tokens`: `Dropout.multiplier`'s, but drawn faster."""
    shape = tokens.shape[0], -(-columns // 16)
    # Compiled code reads two words at once, so one more must follow the last.
    kept = tokens.new_empty(shape[0] * shape[1] + 1, dtype=torch.int16)[:-1].view(shape)
    call = Call(
        tokens=shape[0], threads=torch.get_num_threads(), y=kept.data_ptr(),
        seed=int(dropout.seed), threshold=dropout.threshold, column_offset=dropout.column_offset,
    )  # fmt: skip
    call.layer.cols = columns
    library().smoa_mask(ctypes.byref(call))
    return Mask(kept, dropout.scale)


def lies_along_memory(matrix: Tensor) -> bool:
    """Whether rows or columns of a matrix, or of each of a stack, are contiguous and share no memory."""
    (rows, cols), (down, along) = matrix.shape[-2:], matrix.stride()[-2:]
    return (along == 1 and down >= cols) or (down == 1 and along >= rows)


def present(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a RuntimeError if its memory was freed, as FSDP frees a weight's between uses."""
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise RuntimeError(f"{name} {tuple(tensor.shape)} has no memory: its storage was freed")
    return tensor


def dense(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`present`, contiguous and in `dtype`; mostly it is already, and asking first saves torch's conversions."""
    present(name, tensor)
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
