"""An adapter's cost before and after training: the partition, injection, saving and loading, `accelerate_hira`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smoa_kernels import BlockPartition
from smoa_kernels.peft import SMoAConfig, accelerate_hira, decelerate_hira
from smoa_kernels.peft.sorting import MAX_AT_ONCE

from .conftest import Measure
from .gate import RedGateError
from .models import RANK, TARGETS, adapter_configs, base_model, model_name
from .protocol import DEVICE, Run, laps, timed
from .providers import ACCELERATED, CONTIGUOUS, HIRA, SMOA

BLOCKS = 4
# Squares, the shapes of Llama-3.2-1B, and a large one.
SHAPES = [(n, n) for n in (256, 512, 1024, 2048, 4096)] + [(512, 2048), (8192, 2048), (4096, 11008)]
# A round takes 6 to 80 seconds, and `make bench` must end within 15 minutes. 4096² has a goal, so it has more rounds.
LEAST_ROUNDS = {(8192, 2048): 3, (4096, 4096): 5, (4096, 11008): 1}
FLOAT64_UP_TO = 1024  # a float64 SVD of a larger weight takes longer than all timings here


def centroids(vectors: Tensor, sigma: Tensor) -> Tensor:
    """Spectral centroid of each row (of U) or column (of V), by the definition: the mean position of its energy."""
    energy = (vectors * sigma).double().square()
    position = torch.arange(sigma.shape[0], dtype=torch.float64, device=vectors.device)
    found: Tensor = energy @ position / energy.sum(1)
    return found


def check(partition: BlockPartition, U: Tensor, sigma: Tensor, Vh: Tensor) -> None:
    """The gate: only a row or column within rounding of a boundary may be in another block than an SVD's.

    Neighbours with nearly equal centroids swap with the last bit, and nothing depends on it. Rounding moved a float32
    SVD's own centroids by up to 3e-5 of their spread (512×2048); 2⁻¹² of it, 2.4e-4, is allowed.
    """
    for side, labels, vectors in (("rows", partition.row_block, U), ("columns", partition.col_block, Vh.T)):
        score = centroids(vectors, sigma)
        order = torch.argsort(score, stable=True)
        blocks = order.tensor_split(partition.num_blocks)
        expected = torch.empty_like(order)
        expected[order] = torch.cat([torch.full_like(members, k) for k, members in enumerate(blocks)])
        boundaries = [(score[one[-1]] + score[next_one[0]]) / 2 for one, next_one in pairwise(blocks)]
        distance = torch.stack([(score - boundary).abs() for boundary in boundaries]).amin(0)
        moved = labels != expected
        tolerance = float(score.std()) * 2**-12
        if bool((distance[moved] > tolerance).any()):
            raise RedGateError(
                f"{partition.shape}: {int(moved.sum())} {side} are in another block than the SVD's, one of them "
                f"{float(distance[moved].max()):.1e} from the boundary, {tolerance:.1e} allowed"
            )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_partition_over_svd(shape: tuple[int, int], smoke: bool, measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn([64, 96] if smoke else shape, generator=generator).to(DEVICE)
    kept: dict[str, Any] = {}

    def svd() -> None:
        kept["SVD"] = torch.linalg.svd(weight, full_matrices=False)

    def partition() -> None:
        kept["partition"] = BlockPartition.from_weight(weight, BLOCKS)

    def verify() -> None:
        small = min(weight.shape) <= FLOAT64_UP_TO
        exact = torch.linalg.svd(weight.double(), full_matrices=False) if small else kept["SVD"]
        check(kept["partition"], *exact)

    measure(
        "partition",
        f"setup: partition of {shape[0]}x{shape[1]}, float32, K={BLOCKS}",
        {"out_features": shape[0], "in_features": shape[1]},
        {"SVD": timed("partition", svd), "partition": timed("partition", partition)},
        baseline="SVD",
        budget=5,
        least=LEAST_ROUNDS.get(shape, 3),
        warmup=0 if min(shape) >= 2048 else 1,  # at large sizes a cold start does not matter
        verify=verify,
    )


def life_cycle(config: peft.PeftConfig, base: nn.Module, folder: Path) -> Run:
    """Seconds to inject an adapter into a model, to save it and to load it again."""

    def run() -> dict[str, float]:
        models: list[peft.PeftModel] = []
        inject, save = laps(
            lambda: models.append(peft.get_peft_model(base, config)),
            lambda: models[0].save_pretrained(str(folder)),
        )
        bare = models.pop().unload()
        (load,) = laps(lambda: models.append(peft.PeftModel.from_pretrained(bare, str(folder))))
        # The gate: the loaded tensors equal the file's, bit for bit.
        held = peft.get_peft_model_state_dict(models[0])
        for key, stored in load_file(folder / "adapter_model.safetensors").items():
            if not torch.equal(held[key].cpu(), stored):
                raise RedGateError(f"{key} came back with other values than were saved")
        models.pop().unload()
        return {"inject": inject, "save": save, "load": load}

    return run


def on_threads(count: int, run: Run) -> Run:
    """`run` with another number of intra-op threads than the suite is pinned to."""

    def threaded() -> Mapping[str, float]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return threaded


def test_life_cycle(smoke: bool, measure: Measure) -> None:
    configs = adapter_configs(BLOCKS)
    configs[CONTIGUOUS] = SMoAConfig(
        r=RANK, target_modules=TARGETS, num_blocks=BLOCKS, block_order="contiguous"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(configs)}
        runs = {name: life_cycle(configs[name], base_model(smoke), folders[name]) for name in configs}
        threads = min(os.cpu_count() or 1, MAX_AT_ONCE)
        if DEVICE.type == "cpu" and threads > torch.get_num_threads():  # as many weights are sorted at once
            threaded = f"{SMOA}, {threads} threads"
            runs[threaded], folders[threaded] = on_threads(threads, runs[SMOA]), folders[SMOA]
        for run in runs.values():
            run()  # the files are there, and their sizes known
        sizes = {name: sum(f.stat().st_size for f in folders[name].iterdir()) for name in runs}
        measure(
            "adapter",
            f"setup: an adapter for {model_name(smoke)}, r={RANK}, K={BLOCKS}",
            {"model": model_name(smoke), "rank": RANK, "num_blocks": BLOCKS},
            runs,
            baseline=SMOA,  # LoRA's tenths of a second vary so much that every figure would be noisy
            budget=40,
            least=5,
            warmup=0,
            bytes={name: {"files": size} for name, size in sizes.items()},
        )


def test_accelerate_hira(smoke: bool, measure: Measure) -> None:
    model = peft.get_peft_model(base_model(smoke), adapter_configs(BLOCKS)[HIRA])
    call = timed("call", lambda: accelerate_hira(model))

    def run() -> Mapping[str, float]:
        seconds = call()
        decelerate_hira(model)
        return seconds

    measure(
        "accelerate",
        f"setup: accelerate_hira of {model_name(smoke)}",
        {"model": model_name(smoke)},
        {ACCELERATED: run},
        baseline=ACCELERATED,
        budget=1,
    )
