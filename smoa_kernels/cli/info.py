"""`smoa-kernels info`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table as Rows

from .._version import __version__
from ..backends import miscompiled_on, native_unsupported_reason, triton_unsupported_reason
from ..backends.algorithms import FUSED_MAX_RANK, FUSED_MAX_RANK_IEEE, fused_tokens
from ..backends.native.library import has, instruction_set
from ..definition.precision import KERNEL_PRECISIONS, dtype_names, has_gemm
from ..files import cache_folder
from ..kernels.architectures import architecture, assembler, gpu_name, identity
from ..kernels.spec import ALGORITHM_KEYS
from ..kernels.table import Table, read, user_table
from .output import console, write_json

_PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "typer", "rich")
_HAS_TRITON, _NO_TRITON = importlib.util.find_spec("triton") is not None, "triton is not installed"
_OURS = ("SMOA_CACHE", "SMOA_VERIFY")
_VARIABLES = ("SMOA_", "TRITON_", "PYTORCH_", "CUDA_", "HIP_", "HSA_", "ROCR_", "NVIDIA_TF32_", "XDG_CACHE_")
# A report is public, so variables with such a word in their names are not shown.
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
# Files with the driver's version; a driver that is part of Linux has only Linux's version.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def backends() -> dict[str, str | None]:
    """Return for each backend why it does not work here; None if it does."""
    here = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    triton = triton_unsupported_reason(torch.device(here))
    if triton is not None and triton.startswith("x is on the CPU"):
        triton = "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    native = native_unsupported_reason(torch.device("cpu"))
    return {"eager": None, "native": native, "reference": None, "triton": triton}


def info(json: Annotated[Path | None, typer.Option(help="Write the same as JSON.")] = None) -> None:
    """What a bug report needs: versions, devices, backends, tuning tables, folders, environment."""
    sections = _collect()
    rows = Rows(show_header=False)
    for section, entries in sections.items():
        for name, value in entries.items():
            rows.add_row(section, escape(name), escape(value))
    console().print(rows)
    if json is not None:
        write_json(json, sections)


def _collect() -> dict[str, dict[str, str]]:
    return {
        "versions": {
            "smoa-kernels": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
            "torch is built for": _runtime(),
            **{f"ptxas for {arch}": assembler(arch) for arch in ("sm_80", "sm_90", "sm_100")},
            "GPU driver": _driver(),
        },
        "devices": _devices(),
        "backends": {name: f"no: {why}" if why else "works" for name, why in backends().items()},
        "tuning tables": _tables() if _HAS_TRITON else {"none": _NO_TRITON},
        "kernels": _kernels() if _HAS_TRITON else {"none": _NO_TRITON},
        "folders": {"cache": str(cache_folder())},
        "environment": dict.fromkeys(_OURS, "not set") | _environment(),
    }


def _environment() -> dict[str, str]:
    shown = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)}
    secret = {name: "set, not shown" for name in shown if any(word in name for word in _SECRET)}
    return shown | secret


def _runtime() -> str:
    """The GPU runtime that torch was compiled against; the installed runtime may differ."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"


def _driver() -> str:
    """The driver's version: from the kernel module's file, else from the driver's command."""
    versions = {}
    for path in _DRIVERS:
        with suppress(OSError):
            versions[path.parent.name] = path.read_text(errors="replace")
    command = None if versions else shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
            versions["nvidia"] = done.stdout
    lines = (f"{name}: {text.splitlines()[0]}" for name, text in versions.items() if text.strip())
    return "; ".join(lines) or "not found"


def _tables() -> dict[str, str]:
    """Every tuning table on disk."""
    # GPUs of the same name may differ, as slices of a GPU do, so each identity is judged.
    here = {identity(gpu): user_table(gpu_name(gpu)).name for gpu in _gpus()}
    rows: dict[str, str] = {}
    for path in sorted(user_table("").parent.glob("*.json")):
        judged = [_in_force(read(path), machine) for machine, name in here.items() if name == path.name]
        written = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
        rows[str(path)] = f"{written}; {'; '.join(judged) or 'for a GPU that is not here'}"
    for path in sorted(user_table("").parent.glob("*.broken")):
        rows[str(path)] = "set aside, not used"
    for gpu in sorted({gpu_name(gpu) for gpu in _gpus()}):
        if user_table(gpu).name not in {Path(path).name for path in rows}:
            rows[gpu] = "no table: the heuristic chooses; smoa-kernels tune measures"
    return rows or {"none": "no GPU here, and no table on disk"}


def _in_force(table: Table, machine: str) -> str:
    others = sum(len(table.part(other, "choices")) for other in table.machines if other != machine)
    counts = f"{len(table.part(machine, 'choices'))} keys in force, {others} measured with other versions"
    return f"{counts}; {problem}" if (problem := table.problem(machine)) else counts


def _kernels() -> dict[str, str]:
    """What runs on each GPU here and why, the verdicts on its compiled kernels, and which did not run there yet."""
    from ..backends.verified import verdicts
    from ..kernels.registry import KERNELS

    rows: dict[str, str] = {}
    for known, gpu in {gpu_name(gpu): (verdicts(gpu), gpu) for gpu in _gpus()}.values():
        forms = known.kernels
        sound = Counter(form.partition(" ")[0] for form, reason in forms.items() if not reason)
        ran = {form.partition(" ")[0] for form in forms}
        names = dict.fromkeys(kernel.fn.__name__ for kernel in KERNELS.values())
        few = ", ".join(f"{fused_tokens(dtype, architecture(gpu))} ({dtype})" for dtype in KERNEL_PRECISIONS)
        table = read(user_table(gpu_name(gpu))).part(known.identity, "choices")
        measured = (
            f"{key}: {entry['choice']}"
            for key, entry in table.items()
            if key.startswith(ALGORITHM_KEYS) and isinstance(entry, dict) and entry.get("choice")
        )
        words = {
            "identity": known.identity,
            "algorithm by rule": f"fused up to {few} tokens (ρ up to {FUSED_MAX_RANK}, in fp32 {FUSED_MAX_RANK_IEEE}), "
            "where reading W0 takes the time; merged above, where products do; split under dropout",
            "algorithm by its table": "; ".join(measured),
            "verified": ", ".join(f"{name} ({n} forms)" for name, n in sound.items()),
            "refused": "; ".join(f"{form}: {reason}" for form, reason in forms.items() if reason),
            "untried": ", ".join(name for name in names if name not in ran),
        }
        rows |= {f"{gpu_name(gpu)}, {name}": text or "none" for name, text in words.items()}
    return rows or {"none": "no GPU here"}


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    instructions = instruction_set()
    instructions += ", AMX" if has("amx") else ", BF16" if has("bf16") else ""
    slow = [dtype for dtype in (torch.bfloat16, torch.float16) if not has_gemm(dtype)]
    if slow:
        instructions += f"; torch lacks a GEMM in {dtype_names(slow)}: layers without adapters are slow"
    threads = torch.get_num_threads()
    devices = {"cpu": f"{os.cpu_count()} cores, threads of torch: {threads}, instructions: {instructions}"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties: Any = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
        # In TF32, because what is known of all precisions holds there too.
        if _HAS_TRITON and (why := miscompiled_on(torch.device("cuda", index), "tf32")):
            devices[f"cuda:{index}"] += f"; {why}"
    other = torch.accelerator.current_accelerator()  # of this torch; the machine may have none
    if other is not None and other.type != "cuda" and (count := torch.accelerator.device_count()):
        devices[other.type] = f"{count} devices, on which torch's operators run"
    return devices
