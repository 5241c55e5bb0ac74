"""`parallelize_module` with SMoA's styles: sharded layers give the results of one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import (
    DOUBLE,
    HIDDEN,
    Traffic,
    assert_as_one_process,
    batch,
    blocks,
    build,
    each_kind,
    in_groups,
    in_two,
    layers,
    step,
    whole,
)
from peft import get_peft_model
from problems import relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from smoa_kernels import FusedSMoAConv2d, FusedSMoALinear
from smoa_kernels.definition import spectral_order
from smoa_kernels.distributed import ColwiseSMoAParallel, RowwiseSMoAParallel, shared_spectra
from smoa_kernels.peft import SMoAConfig


def parallelize(model: nn.Module, mesh: object = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    plan = {"*.up": ColwiseSMoAParallel(), "*.down": RowwiseSMoAParallel()}
    parallelize_module(blocks(model), mesh, plan)
    return model


def smoa(**settings: Any) -> SMoAConfig:
    return SMoAConfig(**{"r": 4, "num_blocks": 2, "target_modules": ["up", "down"], **settings})


@contextmanager
def counted_spectra() -> Iterator[list[torch.Tensor]]:
    """Collects the weights whose spectra this process computes."""
    computed, original = [], spectral_order.spectral_centroids

    def counting(weight: torch.Tensor, granule: int) -> object:
        computed.append(weight)
        return original(weight, granule)

    spectral_order.spectral_centroids = counting
    try:
        yield computed
    finally:
        spectral_order.spectral_centroids = original


@in_groups
@pytest.mark.parametrize("kind", ["fused", "peft", "two"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("spectral", [True, False])
def test_equals_one_process(kind: str, dropout: float, spectral: bool) -> None:
    """Gradients are placed like their parameters; replicated factors have the same bits on all processes.

    Contiguous blocks need no spectrum. Each process's part of them is contiguous too, and misses a block.
    """
    with counted_spectra() as computed:
        model = assert_as_one_process(kind, parallelize, dropout=dropout, spectral=spectral)
    assert bool(computed) == spectral
    partitions = [cut.partition if kind == "fused" else cut.partition("default") for cut in layers(model)]
    assert [partition.is_contiguous for partition in partitions] == [not spectral] * 2
    if kind == "fused" and not spectral:
        up, down = layers(model)
        assert dist.get_world_size() == 2 or 0 in (*up.partition.row_sizes, *down.partition.col_sizes)
        assert len(up.smoa.row_block) == HIDDEN  # the state dict has all labels
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert isinstance(parameter.grad, DTensor), name
        assert parameter.grad.placements == parameter.placements, name
        if ("up" in name) == name.endswith(".A"):
            assert parameter.placements == (Replicate(),)
            local = parameter.grad.to_local()
            parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, local.contiguous())
            assert all(torch.equal(part, parts[0]) for part in parts), name


@in_groups
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged_weights(kind: str, dtype: torch.dtype) -> None:
    """The thresholds of an entry depend on its place in the whole weight, also in a part of it."""
    x, _ = batch(dtype)
    rounding = DOUBLE if dtype == torch.float64 else 0.0
    single, model = build(kind, dtype).eval(), parallelize(build(kind, dtype)).eval()
    before = model(x)
    for one, cut in zip(layers(single), layers(model), strict=True):
        base = one if kind == "fused" else one.base_layer
        shards = cut if kind == "fused" else cut.base_layer
        original = shards.weight.to_local().clone()
        one.merge()
        cut.merge()
        assert relative_error(whole(shards.weight), base.weight) <= rounding
        assert not torch.equal(shards.weight.to_local(), original)
    assert relative_error(model(x), before) <= (rounding or 2**-7)
    for cut in layers(model):
        cut.unmerge()
    assert torch.equal(shards.weight.to_local(), original)
    assert relative_error(model(x), before) == 0
    if kind == "peft":
        for one, cut in zip(layers(single.merge_and_unload()), layers(model.merge_and_unload()), strict=True):
            assert type(cut) is nn.Linear
            assert relative_error(cut.weight.full_tensor(), one.weight) <= rounding
            assert relative_error(cut.bias.full_tensor(), one.bias) == 0


@in_groups
def test_sequence_parallel_layouts() -> None:
    expected = step(build("fused", torch.float64, dropout=0.4), *batch(torch.float64))
    model = build("fused", torch.float64, dropout=0.4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    up, down = ColwiseSMoAParallel(input_layouts=Shard(0)), RowwiseSMoAParallel(output_layouts=Shard(0))
    parallelize_module(model, mesh, {"0.up": up, "0.down": down})
    x, target = (t.chunk(mesh.size())[mesh.get_local_rank()] for t in batch(torch.float64))
    ours = step(model, x, target)
    y = [torch.empty_like(ours["y"]) for _ in range(mesh.size())]
    dist.all_gather(y, ours["y"])
    assert relative_error(torch.cat(y), expected["y"]) < DOUBLE
    for name in ("0.up.smoa.A", "0.up.smoa.B", "0.down.smoa.A", "0.down.smoa.B"):
        # each process's loss is the mean over its own part of the sequence
        assert relative_error(whole(ours[name]) / mesh.size(), expected[name]) < DOUBLE, name


@in_groups
def test_the_order_is_computed_once() -> None:
    """By the first process of the group, of all processes or of half of them.

    Contiguous blocks need neither a spectrum nor communication.
    """
    half, _ = dist.new_subgroups(dist.get_world_size() // 2)
    for group in (None, half):
        with counted_spectra() as computed, shared_spectra(group):
            fused, peft = build("fused", torch.float64), build("peft", torch.float64)
        assert len(computed) == (4 if dist.get_rank(group) == 0 else 0)
    for layer, other in zip(layers(fused), layers(peft), strict=True):
        assert layer.partition == other.partition("default")
    labels = [torch.empty_like(layers(fused)[0].smoa.row_block) for _ in range(dist.get_world_size())]
    dist.all_gather(labels, layers(fused)[0].smoa.row_block)
    assert all(torch.equal(part, labels[0]) for part in labels)
    with counted_spectra() as none, shared_spectra(), Traffic() as traffic:
        for kind in ("fused", "peft"):
            build(kind, torch.float64, spectral=False)
    assert not none
    assert not traffic.calls


@in_two
def test_refused() -> None:
    merged, dropping = build("fused", torch.float64), build("fused", torch.float64, dropout=0.1)
    layers(merged)[0].merge()
    late, cut = build("peft", torch.float64), parallelize(build("fused", torch.float64))
    late.add_adapter("late", smoa(inference_mode=True))
    torch.manual_seed(dist.get_rank())
    for model, message in (
        (merged, "merged: unmerge it"),
        (dropping, "dropout needs the random generators"),
        (late, r"adapters \['late'\] await their block labels: load them before"),
        (cut, "parallelized already"),
    ):
        before = [type(parameter) for parameter in model.parameters()]
        with pytest.raises(ValueError, match=message):
            parallelize(model)
        assert [type(parameter) for parameter in model.parameters()] == before
    layer, mesh = layers(build("fused", torch.float64))[0], init_device_mesh("cpu", (2,))
    grouped = FusedSMoALinear(12, 6, group_size=4, num_blocks=1)
    with pytest.raises(ValueError, match="12 columns must be cut between groups, got group_size=4 and 2"):
        parallelize_module(grouped, mesh, RowwiseSMoAParallel())
    torch.manual_seed(0)
    mapped = FusedSMoALinear(16, 6, group_size=4, num_blocks=1)
    mapped.smoa.set_groups(torch.arange(16) % 4)
    mapped.smoa.set_blocks(mapped.partition)
    with pytest.raises(ValueError, match=r"in groups that a cut divides \(col_group\): cut its rows"):
        parallelize_module(mapped, mesh, RowwiseSMoAParallel())
    torch.nn.init.ones_(mapped.smoa.B)
    x = torch.randn(3, 16)
    expected = mapped(x)
    style = ColwiseSMoAParallel(output_layouts=Replicate())
    torch.testing.assert_close(parallelize_module(mapped, mesh, style)(x), expected)
    with pytest.raises(TypeError, match="output_layouts must be a Placement, got str"):
        parallelize_module(layer, mesh, ColwiseSMoAParallel(output_layouts="x"))
    assert not isinstance(layer.weight, DTensor)
    conv = FusedSMoAConv2d(4, 6, 3, r=4)
    attention = get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), smoa(target_modules=["0"]))
    for other in (conv, blocks(attention)[0]):
        with pytest.raises(TypeError, match="of layers with adapters only linear ones can be cut, got"):
            parallelize_module(other, mesh, ColwiseSMoAParallel())
    for reset in ("reset_adapter", "reset_parameters"):
        with pytest.raises(RuntimeError, match=rf"the layer is sharded: call {reset}\(\) before"):
            getattr(layers(cut)[0], reset)()
    with pytest.raises(ValueError, match="add adapters before"):
        parallelize(build("peft", torch.float64)).add_adapter("late", smoa())


@in_two
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the quantized extra")
def test_a_quantized_base_is_refused() -> None:
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    assert model[0].weight.quant_state is not None
    model = get_peft_model(model, smoa(target_modules=["0"]))
    with pytest.raises(
        TypeError, match=r"over a plain nn.Linear or Conv1D to be cut, got one over Linear4bit"
    ):
        parallelize_module(blocks(model), init_device_mesh("cpu", (2,)), {"0": ColwiseSMoAParallel()})
    assert not isinstance(blocks(model)[0].smoa["default"].A, DTensor)
    model(torch.randn(3, 64))


@in_two
def test_several_dropouts() -> None:
    model = build("peft", torch.float64, dropout=0.1)
    model.add_adapter("other", smoa(smoa_dropout=0.2))
    model.base_model.set_adapter(["default", "other"])
    torch.manual_seed(0)
    parallelize(model)
    with pytest.raises(RuntimeError, match="'other' drops out with another probability"):
        model(batch(torch.float64)[0])


@pytest.mark.slow
@in_two
def test_compiled() -> None:
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    assert_as_one_process("fused", lambda model: compiled(parallelize(model)), dropout=0.4)
