"""Loads what `linear.c` was compiled to, or says why it cannot: SMoA's GEMMs and other passes on x86 processors.

Compiled when the package is built (`hatch_build.py`), never when it runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from pathlib import Path

import torch

__all__ = ["library", "obstacle"]

_FOLDER = Path(__file__).parent
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
# What each function takes: p a pointer, i an int64; l a pointer to what layer.py writes.
_SIGNATURES = {
    "smoa_linear": "lipiipipi",
    "smoa_update": "lipiippppi",
    "smoa_gradient": "lipipiippppi",
    "smoa_contract": "lpipppi",
    "smoa_few": "lipipipi",
    "smoa_order": "ipiippippipi",
    "smoa_deltas": "lppi",
    "smoa_modulate": "liiiipipi",
    "smoa_mask": "iiiiiipp",
    "smoa_experts_linear_fit": "ppippi",
    "smoa_experts_few_fit": "piiipippi",
    "smoa_experts_update_fit": "piiipippi",
    "smoa_experts_gradient_fit": "ppipipppi",
    "smoa_few_fit": "ii",
    "smoa_linear_fit": "i",
    "smoa_labels_fit": "l",
    "smoa_indices_fit": "l",
    "smoa_linear_workspace": "lii",
    "smoa_few_workspace": "li",
    "smoa_update_workspace": "lii",
    "smoa_gradient_workspace": "lii",
    "smoa_contract_workspace": "li",
    "smoa_deltas_workspace": "li",
    "smoa_modulate_workspace": "li",
    "smoa_experts_workspace": "piii",
    "smoa_order_workspace": "ii",
    "smoa_bf16_fit": "",
    "smoa_amx_fit": "",
}
# Those that are there where the compiler knows the instructions, and are called where the processor has them.
_BF16_SIGNATURES = {
    "smoa_bf16_forward": "lipippppi",
    "smoa_bf16_gradient": "lipipippppi",
    "smoa_bf16_input": "lipipppi",
    "smoa_bf16_forward_workspace": "liii",
    "smoa_bf16_gradient_workspace": "lii",
    "smoa_bf16_input_workspace": "liii",
}
_TYPES = {"l": _POINTER, "p": _POINTER, "i": _INT}


def obstacle() -> str | None:
    """Why the compiled code cannot run here, or None where it can. ``SMOA_NATIVE=0`` in the environment forbids it."""
    if os.environ.get("SMOA_NATIVE", "1") == "0":
        return "SMOA_NATIVE=0 forbids it"
    found = _load()
    if isinstance(found, str):
        return found
    if torch.get_num_threads() > 1 and not found.smoa_has_threads():
        return f"no OpenMP runtime of torch's was found for its {torch.get_num_threads()} threads"
    return None


def library() -> ctypes.CDLL:
    """The loaded library, its functions declared.

    Raises:
        RuntimeError: there is an :func:`obstacle`.
    """
    found = _load()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    capability = torch.backends.cpu.get_cpu_capability()
    path = _FOLDER / f"linear_{capability.lower()}.so"
    if not path.is_file():
        built = sorted(one.stem.removeprefix("linear_").upper() for one in _FOLDER.glob("linear_*.so"))
        return (
            f"it was compiled for {' and '.join(built)}, this processor is {capability}" if built
            else "it was not compiled: the wheel is for another machine, or was built without a C compiler"
        )  # fmt: skip
    try:
        sources = sorted(_FOLDER.glob("*.[ch]"))
        source = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
        found = ctypes.CDLL(str(path))
        found.smoa_source.restype = ctypes.c_char_p
        if found.smoa_source() != source.encode():
            return f"{path} was compiled from other sources: install the package again"
        found.smoa_bf16_fit.restype = _INT
        found.smoa_amx_fit()  # asks the system for AMX, once, before threads run
        for name, arguments in (_SIGNATURES | (_BF16_SIGNATURES if found.smoa_bf16_fit() else {})).items():
            function = getattr(found, name)
            function.argtypes = [_TYPES[argument] for argument in arguments]
            function.restype = _INT if name.endswith(("workspace", "fit")) else None
    except (AttributeError, OSError) as error:  # another library, or none for this system
        return f"{path} cannot be loaded: {error}"
    return found
