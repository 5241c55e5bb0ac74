"""Writes the test vectors of other block orders into `data/vectors/`: `python tests/write_vectors.py`.

Outputs and gradients are the reference's, in float64. The spectral vectors of single coordinates came from elsewhere.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.packed import pack_factors, unpack_factors
from smoa_kernels.definition.reference import reference_delta_weight, reference_linear
from smoa_kernels.definition.spectral_order import spectral_centroids

CASES = {
    "contiguous_33x57_k3": (33, 57, (3, 0, 2), {"block_order": "contiguous"}),
    "granule8_37x61_k2": (37, 61, (2, 3), {"granule": 8}),
    "random_granule4_42x30_k3": (42, 30, (2, 1, 2), {"block_order": "random", "granule": 4, "block_seed": 5}),
}


def write(folder: Path) -> None:
    """Write every case to a file."""
    for seed, (name, (out_features, in_features, ranks, settings)) in enumerate(CASES.items()):
        draw = np.random.default_rng(seed)

        def drawn(*shape: int, draw: np.random.Generator = draw) -> torch.Tensor:
            return torch.from_numpy(draw.standard_normal(shape))

        tokens, alpha = 9, 7.0
        weight, bias = drawn(out_features, in_features), drawn(out_features)
        rule = BlockRule(len(ranks), **settings)  # type: ignore[arg-type]
        partition = rule.build(weight)
        A_blocks = [drawn(r, size) for r, size in zip(ranks, partition.col_sizes, strict=True)]
        B_blocks = [drawn(size, r) for r, size in zip(ranks, partition.row_sizes, strict=True)]
        A, B, packed_ranks = pack_factors(A_blocks, B_blocks, partition)
        x, dy = drawn(tokens, in_features), drawn(tokens, out_features)
        leaves = [leaf.requires_grad_() for leaf in (x, A, B)]
        adapter = (A, B, partition, packed_ranks)
        y = reference_linear(x, weight, bias, *adapter, scaling=alpha / sum(ranks))
        dx, dA, dB = torch.autograd.grad(y, leaves, dy)
        dA_blocks, dB_blocks = unpack_factors(dA, dB, partition, packed_ranks)
        row_score, col_score = spectral_centroids(weight)
        found = {
            **{"weight": weight, "bias": bias, "row_score": row_score, "col_score": col_score},
            **{"row_order": partition.row_order, "col_order": partition.col_order},
            **{"row_block": partition.row_block.long(), "col_block": partition.col_block.long()},
            **{"x": x, "dy": dy, "y": y, "dx": dx},
            "delta_weight": reference_delta_weight(weight, *adapter, scaling=alpha / sum(ranks)),
        }
        for k in range(len(ranks)):
            found |= {f"A{k}": A_blocks[k], f"B{k}": B_blocks[k]}
            found |= {f"dA{k}": dA_blocks[k], f"dB{k}": dB_blocks[k]}
        arrays = {key: value.detach().numpy() for key, value in found.items()}
        numbers = {"ranks": ranks, "alpha": alpha, **rule._asdict()}
        np.savez_compressed(folder / f"{name}.npz", **arrays, **numbers)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data" / "vectors")
