"""Counts of every kernel's shipped default at a layer's sizes: instructions, sectors, bank conflicts.

PTX_EMULATOR=sm_90 PYTHONPATH=tests python -m ptx_emulator --kernel block_grad --dtype bf16 --tokens 256
"""

from __future__ import annotations

import argparse

import torch

from smoa_kernels.kernels.sizes import GRANULE, padding_multiple

from . import ARCH, emulator
from .counts import describe
from .gpu import pretend

FEW_TOKENS = 16
FOR_FEW_TOKENS = ("fused_linear", "sum_partials")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx_emulator", description=__doc__)
    parser.add_argument("--kernel", action="append", help="all, where none is named")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "tf32", "fp32"])
    parser.add_argument("--tokens", type=int, default=256, help=f"of {FOR_FEW_TOKENS} at most {FEW_TOKENS}")
    parser.add_argument("--shape", default="512x512", help="out_features x in_features")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of each block")
    args = parser.parse_args()
    gpu = pretend(ARCH)
    from smoa_kernels.kernels import KERNELS
    from smoa_kernels.kernels.spec import Key, Operands

    for name in args.kernel or KERNELS:
        kernel = KERNELS[name]
        tokens = min(args.tokens, FEW_TOKENS) if name in FOR_FEW_TOKENS else args.tokens
        for form in kernel.forms:
            transposed = "transposed" in form
            rows, cols = map(int, args.shape.split("x"))
            if transposed:
                rows, cols = cols, rows
            padded = [_padded(-(-size // args.blocks)) for size in (rows, cols)]
            sizes = args.rank, args.blocks, rows, cols, tokens, *padded, transposed
            key = Key(name, args.dtype, *sizes, GRANULE if "granules" in form else 1)
            config = kernel.default(key, gpu.arch, gpu.multiprocessors)
            run, _ = kernel.workload(Operands(key, form, torch.device("cpu")))
            emulator.launches.clear()
            run(config)
            own = [launch for launch in emulator.launches if launch.kernel.name == kernel.fn.__name__]
            print(
                f"{name}, {form}, {args.dtype}, sm_{ARCH}, T={tokens}, {args.shape}, K={args.blocks}, {config}"
            )
            print(describe(own), flush=True)


def _padded(width: int) -> int:
    multiple = padding_multiple((width,))
    return -(-width // multiple) * multiple


if __name__ == "__main__":
    main()
