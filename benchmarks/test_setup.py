"""What an adapter costs before and after training: the spectral partition, injection, saving and loading."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smoa_kernels import BlockPartition

from .cases import ONE_BILLION
from .conftest import Measure
from .gate import RedGateError
from .models import RANK, adapter_configs, base_model, model_name
from .protocol import DEVICE, Run, laps, timed
from .providers import LORA
from .tables import EIGH

BLOCKS = 4
SHAPES = [(256, 256), (512, 512), (1024, 1024), *ONE_BILLION, (4096, 4096), (4096, 11008)]
FLOAT64_UP_TO = 1024  # a float64 SVD of a larger weight takes longer than all that is timed here


def row_centroids(U: Tensor, sigma: Tensor) -> Tensor:
    """Spectral centroid of each row by the definition's own words: energies and their mean position."""
    energy = (U * sigma).double().square()
    position = torch.arange(sigma.shape[0], dtype=torch.float64, device=U.device)
    centroids: Tensor = energy @ position / energy.sum(1)
    return centroids


def check(partition: BlockPartition, centroids: Tensor) -> None:
    """The gate: a row may stand in another block than an SVD puts it only within rounding of the boundary.

    Neighbours of nearly equal centroid swap with the last bit, and nothing depends on it. Rounding moved a float32
    SVD's own centroids by up to 3e-5 of their spread (512×2048); 2⁻¹² of it, 2.4e-4, is allowed.
    """
    order = torch.argsort(centroids, stable=True)
    expected = torch.empty_like(order)
    distance = torch.full_like(centroids, float("inf"))
    sizes = [len(rows) for rows in order.tensor_split(partition.num_blocks)]
    for block, rows in enumerate(order.split(sizes)):
        expected[rows] = block
    for end in torch.tensor(sizes).cumsum(0)[:-1].tolist():
        boundary = centroids[order[end - 1 : end + 1]].mean()
        distance = torch.minimum(distance, (centroids - boundary).abs())
    moved = partition.row_block != expected
    tolerance = float(centroids.std()) * 2**-12
    if bool((distance[moved] > tolerance).any()):
        worst = float(distance[moved].max())
        raise RedGateError(
            f"{partition.shape}: {int(moved.sum())} rows stand in another block than the SVD's, one of them "
            f"{worst:.1e} from the boundary, {tolerance:.1e} allowed"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_partition_over_svd(shape: tuple[int, int], smoke: bool, measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn([64, 96] if smoke else shape, generator=generator).to(DEVICE)
    kept: dict[str, Any] = {}

    def svd() -> None:
        kept["SVD"] = torch.linalg.svd(weight, full_matrices=False)[:2]

    def partition() -> None:
        kept["partition"] = BlockPartition.from_weight(weight, BLOCKS)

    def verify() -> None:
        small = min(weight.shape) <= FLOAT64_UP_TO
        U, sigma = torch.linalg.svd(weight.double(), full_matrices=False)[:2] if small else kept["SVD"]
        check(kept["partition"], row_centroids(U, sigma))

    runs = {"SVD": timed("partition", svd), "partition": timed("partition", partition)}
    if shape[0] == shape[1]:  # how much of the partition is LAPACK's: nothing exact does without it
        gram = weight @ weight.T
        runs[EIGH] = timed("partition", lambda: torch.linalg.eigh(gram))
    large = min(shape) == 4096
    measure(
        "partition",
        f"setup: partition of {shape[0]}x{shape[1]}, float32, K={BLOCKS}",
        {"out_features": shape[0], "in_features": shape[1]},
        runs,
        baseline="SVD",
        budget=5,
        least=(1 if shape[1] > 4096 else 2) if large else 3,
        warmup=0 if min(shape) >= 2048 else 1,  # there a cold start is no part of seconds
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
        check_reloaded(models[0], folder)
        models.pop().unload()
        return {"inject": inject, "save": save, "load": load}

    return run


def check_reloaded(model: peft.PeftModel, folder: Path) -> None:
    """The gate: what was loaded is what the file holds, bit for bit."""
    held = peft.get_peft_model_state_dict(model)
    for key, stored in load_file(folder / "adapter_model.safetensors").items():
        if not torch.equal(held[key].cpu(), stored):
            raise RedGateError(f"{key} came back with other values than were saved")


def test_life_cycle(smoke: bool, measure: Measure) -> None:
    configs = adapter_configs(BLOCKS)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(configs)}
        runs = {name: life_cycle(configs[name], base_model(smoke), folders[name]) for name in configs}
        for run in runs.values():
            run()  # the files are there, and their sizes known
        sizes = {name: sum(f.stat().st_size for f in folders[name].iterdir()) for name in configs}
        measure(
            "adapter",
            f"setup: an adapter for {model_name(smoke)}, r={RANK}, K={BLOCKS}",
            {"model": model_name(smoke), "rank": RANK, "num_blocks": BLOCKS},
            runs,
            baseline=LORA,
            budget=20,
            least=3,
            warmup=0,
            bytes={name: {"files": size} for name, size in sizes.items()},
        )
