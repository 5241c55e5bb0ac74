"""Bad arguments of functions: partitions, packing, the reference, sketches, spectra, the cost model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from smoa_kernels import BlockPartition
from smoa_kernels.backends import (
    algorithms_of,
    load_backend,
    native_obstacle,
    resolve_backend,
    triton_obstacle,
)
from smoa_kernels.cost.estimate import (
    Problem,
    choose_algorithm,
    estimate,
    fused_token_limit,
    parts,
)
from smoa_kernels.cost.gpus import (
    GPUS,
    Gpu,
    device_gpu,
    match_gpu,
)
from smoa_kernels.cost.grad_share import block_grad_share
from smoa_kernels.cost.grad_tiling import (
    grad_tiles,
    gradient_parts,
    partial_bytes,
    partial_width,
    token_splits,
)
from smoa_kernels.cost.scaling import Scale, predict, tensor_parallel_size
from smoa_kernels.cost.workspace import backward_workspace, backward_workspace_bytes, peak_bytes
from smoa_kernels.definition.dropout import Dropout, draw_seed
from smoa_kernels.definition.packed import pack_factors, unpack_factors
from smoa_kernels.definition.precision import gemm_is_ieee, without_autocast
from smoa_kernels.definition.ranks import resolve_ranks, split_rank, trainable_parameters
from smoa_kernels.definition.reference import reference_delta_weight
from smoa_kernels.definition.sketch import sketch_distance, sketch_weight
from smoa_kernels.definition.spectral_order import spectral_centroids, spectral_orders
from smoa_kernels.distributed import (
    agree_on_buffers,
    average_gradients,
    ignore_buffers,
    shared_spectra,
    smoa_buffers,
)
from smoa_kernels.files import replace_file
from smoa_kernels.spectrum.layer import cumulated, effective_number, layer_spectrum

from .harness import NESTED, Call, Row, World, check, one, rows


def labels(rows: Any, cols: Any, num_blocks: Any) -> Call:
    return lambda _: BlockPartition.from_labels(rows, cols, num_blocks)


def spectrum(weight: Any, num_blocks: Any = 1) -> Call:
    return lambda _: BlockPartition.from_weight(weight, num_blocks)


PARTITIONS: list[Row] = [
    (spectrum([[1.0]]), TypeError, "weight must be a tensor, got list"),
    (
        spectrum(torch.ones(3, 3, dtype=torch.int64)),
        TypeError,
        "weight must be floating point, got torch.int64",
    ),
    (spectrum(torch.ones(3, 3, dtype=torch.complex64)), TypeError, "weight must be floating point"),
    (
        spectrum(torch.ones(3, 3).to(torch.float8_e4m3fn)),
        TypeError,
        "weight must be dense, of 16 bits or more",
    ),
    (spectrum(torch.ones(3, 3).to_sparse()), TypeError, "weight must be dense"),
    (spectrum(torch.ones(3, 3, device="meta")), ValueError, "weight must hold numbers .* got a meta tensor"),
    (spectrum(torch.ones(3)), ValueError, r"weight must be a matrix .* got shape \(3,\)"),
    (spectrum(torch.tensor([[1.0, float("nan")]])), ValueError, "weight must be finite"),
    (spectrum(torch.tensor([[1.0, float("inf")]])), ValueError, "weight must be finite"),
    (spectrum(torch.ones(3, 4), 0), ValueError, "num_blocks must be at least 1, got 0"),
    (spectrum(torch.ones(3, 4), 4), ValueError, "num_blocks must be at most .* = 3 .* got 4"),
    (spectrum(torch.ones(3, 4), 2.0), TypeError, "num_blocks must be an int, got 2.0"),
    (spectrum(torch.ones(0, 4)), ValueError, "num_blocks must be at most .* = 0"),
    (lambda _: spectral_orders([[1.0]]), TypeError, "weight must be a tensor, got list"),  # type: ignore[arg-type]
    (
        lambda _: spectral_centroids(torch.ones(3, dtype=torch.int64)),
        TypeError,
        "weight must be floating point",
    ),
    (lambda _: spectral_centroids(torch.ones(3)), ValueError, r"weight must be a matrix .* got shape \(3,\)"),
    (
        lambda _: spectral_centroids(torch.ones(0, 4)),
        ValueError,
        r"weight must have rows and columns, got shape \(0, 4\)",
    ),
    (labels(one(0, 2), one(0), 2), ValueError, r"row_block must lie in \[0, 2\).* 0 to 2"),
    (labels(one(0), one(-1), 2), ValueError, r"col_block must lie in \[0, 2\)"),
    (labels(torch.tensor([[0]]), one(0), 1), ValueError, "row_block must have one dimension"),
    (labels(torch.tensor([0.0]), one(0), 1), TypeError, "row_block must be an integer tensor"),
    (
        labels(torch.tensor([0j]), one(0), 1),
        TypeError,
        "row_block must be an integer tensor, got torch.complex",
    ),
    (labels(one(0).to("meta"), one(0), 1), ValueError, "row_block must hold numbers, got a meta tensor"),
    (labels([0], one(0), 1), TypeError, "row_block must be an integer tensor, got list"),
    (labels(one(0), one(0), 0), ValueError, "num_blocks must be at least 1"),
    (lambda w: w.problem.partition.rows(3), ValueError, r"block must lie in \[0, 3\), got 3"),
    (lambda w: w.problem.partition.cols(-1), ValueError, r"block must lie in \[0, 3\), got -1"),
    (lambda w: w.problem.partition.rows("a"), TypeError, "block must be an int, got 'a'"),  # type: ignore[arg-type]
    (lambda w: w.problem.partition.shard(3), TypeError, "row_slice must be a slice, got 3"),  # type: ignore[arg-type]
    (spectrum(NESTED), TypeError, "weight must be dense, .* got torch.nested"),
    (spectrum(torch.ones(3, 4), True), TypeError, "num_blocks must be an int, got True"),
    (spectrum(torch.ones(3, 4), torch.tensor(1)), TypeError, r"num_blocks must be an int, got tensor\(1\)"),
    (labels(one(0), one(0), 10**9), ValueError, "num_blocks must be at most 65536, got 1000000000"),
    (labels(one(0), one(0), 2**70), ValueError, "num_blocks must be at most 65536"),
    (labels(one(0).to_sparse(), one(0), 1), TypeError, "row_block must be a dense tensor, got .*sparse_coo"),
    (labels(one(0), torch.nested.nested_tensor([one(0)]), 1), TypeError, "col_block must be a dense tensor"),
    (labels(torch.ones(2, dtype=torch.bool), one(0), 2), TypeError, "row_block must be an integer tensor"),
    (labels(one(2**40).to(torch.uint64), one(0), 2), ValueError, r"row_block must lie in \[0, 2\)"),
    (lambda w: w.problem.partition.to("nodev"), ValueError, "device must be one that this .* got 'nodev'"),
    (lambda w: w.problem.partition.to(None), ValueError, "device must be .* got None"),  # type: ignore[arg-type]
    (lambda w: w.problem.partition.shard(slice("a")), TypeError, "row_slice must be a slice of ints"),
    (
        lambda w: w.problem.partition.shard(col_slice=slice(None, None, -1)),
        ValueError,
        "col_slice must have a step of at least 1",
    ),
    (lambda _: BlockPartition.from_tensors([], []), ValueError, "tensors and sizes must be .* got 0 and 0"),
    (
        lambda _: BlockPartition.from_tensors(None, None),
        TypeError,
        "tensors must be the list that .* got None",
    ),  # type: ignore[arg-type]
    (
        lambda w: BlockPartition.from_tensors(w.problem.partition.tensors(), 6),
        TypeError,
        "sizes must be the list",
    ),  # type: ignore[arg-type]
    (lambda w: w.problem.partition.to(10**30), ValueError, "device must be one that this machine has"),  # type: ignore[arg-type]
]


@rows("call", PARTITIONS)
def test_partitions(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


def delta(**changed: Any) -> Call:
    def call(world: World) -> object:
        arguments = world.arguments(changed)
        return reference_delta_weight(**{k: v for k, v in arguments.items() if k not in ("x", "bias")})

    return call


def unpacked(**changed: Any) -> Call:
    def call(world: World) -> object:
        arguments = world.arguments(changed)
        return unpack_factors(*(arguments[name] for name in ("A", "B", "partition", "ranks")))

    return call


def packed(A: Any, B: Any) -> Call:
    return lambda w: pack_factors([A] * 3, [B] * 3, w.problem.partition)


PACKING: list[Row] = [
    (
        lambda w: pack_factors([], [], w.problem.partition),
        ValueError,
        "one factor for each of 3 blocks, got 0 and 0",
    ),
    (
        lambda w: pack_factors([torch.ones(1, 2)] * 3, [torch.ones(2, 1)] * 3, w.problem.partition),
        ValueError,
        r"block 0 takes factors of shapes \(r, 19\) and \(11, r\), got \(1, 2\) and \(2, 1\)",
    ),
    (lambda w: w.problem.run_reference(dropout_p=0.1), ValueError, "dropout_seed must be given"),
    (packed(1, 2), TypeError, "A_blocks and B_blocks must hold dense matrices"),
    (
        packed(torch.tensor(1.0), torch.tensor(1.0)),
        TypeError,
        "A_blocks and B_blocks must hold dense matrices",
    ),
    (packed(torch.ones(1, 19), torch.ones(11, 1).double()), TypeError, "must have one dtype"),
    (lambda _: pack_factors([], [], None), TypeError, "partition must be a BlockPartition"),  # type: ignore[arg-type]
    (unpacked(A=None), TypeError, "A must be a tensor, got NoneType"),
    (
        unpacked(A=torch.ones(3, 5)),
        ValueError,
        r"A and B must have shapes \(ρ, 57\) and \(33, ρ\), got \(3, 5\)",
    ),
    (unpacked(B=torch.ones(33, 2)), ValueError, "A and B must have shapes"),
    (unpacked(ranks=[3, 0, 2]), TypeError, "ranks must be a tensor, got list"),
    (unpacked(ranks=one(1, 1)), ValueError, r"ranks must be 3 numbers in \[0, 3\], A's rows, got \[1, 1\]"),
    (unpacked(ranks=one(4, 0, 0)), ValueError, "ranks must be 3 numbers"),
    (unpacked(ranks=torch.ones(3)), TypeError, "ranks must be an integer tensor .* got torch.float32"),
    (unpacked(ranks=one(3, 0, 2).to("meta")), TypeError, "ranks must be an integer .* got a meta tensor"),
    (unpacked(A=torch.ones(3, 57).to_sparse()), TypeError, "A must be dense, got torch.sparse_coo"),
    (unpacked(B=torch.tensor(1.0)), ValueError, r"A and B must have shapes .* and \(\)"),
    (lambda w: pack_factors(None, [], w.problem.partition), TypeError, "A_blocks must be a list"),  # type: ignore[arg-type]
    (packed(NESTED, NESTED), TypeError, "A_blocks and B_blocks must hold dense matrices"),
    (lambda w: trainable_parameters(w.problem.partition, None), TypeError, "ranks must be a list of ints"),  # type: ignore[arg-type]
    (
        lambda w: trainable_parameters(w.problem.partition, [1, -1, 2]),
        ValueError,
        r"ranks\[1\] must be at least 0, got -1",
    ),
    (lambda _: split_rank(0, 3), ValueError, "r must be at least 1, got 0"),
    (lambda _: split_rank(8, 10**9), ValueError, "num_blocks must be at most 65536"),
    (lambda _: resolve_ranks(8, 3, 5), TypeError, "block_ranks must be a list of ints, got 5"),  # type: ignore[arg-type]
    (lambda _: resolve_ranks(8, 2, [9, -1]), ValueError, r"block_ranks must not be negative, got \[9, -1\]"),
    (lambda _: resolve_ranks("8", 2), TypeError, "r must be an int, got '8'"),  # type: ignore[arg-type]
    (lambda w: trainable_parameters(w.problem.partition, [1]), ValueError, "ranks must be 3, .* got 1"),
    (delta(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (delta(A=torch.ones(3, 4)), ValueError, r"A must have shape \(ρ, 57\)"),
    (delta(ranks=[3, 0, 2]), TypeError, "ranks must be a tensor"),
    (delta(ranks=one(9, 9, 9)), ValueError, r"ranks must lie in \[0, 3\]"),
    (delta(scaling="a"), TypeError, "scaling must be a number"),
    (
        delta(weight=torch.ones(33, 57, dtype=torch.int64)),
        TypeError,
        "weight must be floating point, got torch.int64",
    ),
    (delta(weight=NESTED), TypeError, "weight must be a dense tensor, got layout torch.nested"),
    (delta(scaling=2**70), ValueError, "scaling must be a float, or an int of at most 63 bits, got 71 bits"),
]


@rows("call", PACKING)
def test_packing_and_the_reference(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


CPU = torch.device("cpu")
NOWHERE = torch.device("cuda", 99)
PROBLEM = Problem(16, 64, 64, 2, 8)


def equal(function: Callable[..., object], *arguments: Any) -> object:
    """The good call, then one whose last argument only equals the good one's: 1 for True, True for 1."""
    *others, last = arguments
    function(*arguments)
    return function(*others, int(last) if isinstance(last, bool) else bool(last))


SCALE = Scale("llama-3-8b", 8, "fsdp")

MODELS: list[Row] = [
    (lambda _: Problem(-1, 4, 4, 1, 1), ValueError, "tokens must be at least 0, got -1"),
    (lambda _: Problem(1, 4, 4, 1, 1, dropout=2.0), ValueError, r"dropout must be in \[0, 1\), got 2.0"),
    (
        lambda _: Problem(1, 4, 4, 1, 1, torch.int8),
        ValueError,
        "dtype must be floating point, got torch.int8",
    ),
    (
        lambda _: estimate(Problem(1, 4, 4, 1, 1), GPUS["h100"], "nope"),
        ValueError,
        "algorithm must be one of",
    ),
    (
        lambda w: layer_spectrum(w.problem.weight, w.problem.partition, {"ours": w.problem.x}),
        ValueError,
        r"ours must have the partition's shape \(33, 57\), got \(11, 57\)",
    ),
    (
        lambda w: layer_spectrum(w.problem.weight, w.problem.partition, {"ours": w.problem.weight / 0}),
        ValueError,
        "ours must be finite to have a spectrum",
    ),
    (
        lambda w: layer_spectrum(w.problem.weight.int(), w.problem.partition, {}),
        TypeError,
        "weight must be floating point, got torch.int32",
    ),
    (
        lambda _: sketch_weight(torch.ones(3)),
        TypeError,
        r"weight must be a matrix .* got torch.float32 \(3,\)",
    ),
    (lambda w: sketch_distance(w.layer.smoa_sketch, torch.ones(3)), TypeError, "second must be a sketch"),
    (lambda _: native_obstacle("cpu"), TypeError, "device must be a torch.device, got str"),  # type: ignore[arg-type]
    (
        lambda _: load_backend("cuda"),
        ValueError,
        "name must be one of eager, native, triton, reference, got 'cuda'",
    ),
    (lambda _: Problem("1", 4, 4, 1, 1), TypeError, "tokens must be an int, got '1'"),  # type: ignore[arg-type]
    (lambda _: Problem(1, 4, 4, 1.5, 1), TypeError, "num_blocks must be an int, got 1.5"),  # type: ignore[arg-type]
    (lambda _: Problem(1, 4, 4, 1, 1, "bf16"), TypeError, "dtype must be a torch.dtype, got 'bf16'"),  # type: ignore[arg-type]
    (lambda _: Problem(1, 4, 4, 1, 1, dropout=None), TypeError, "dropout must be a number"),  # type: ignore[arg-type]
    (lambda _: estimate(None, GPUS["h100"], "split"), TypeError, "problem must be a Problem"),  # type: ignore[arg-type]
    (lambda _: estimate(Problem(1, 4, 4, 1, 1), None, "split"), TypeError, "gpu must be a Gpu"),  # type: ignore[arg-type]
    (
        lambda _: estimate(Problem(1, 4, 4, 1, 1), GPUS["h100"], "split").seconds("up"),  # type: ignore[arg-type]
        ValueError,
        "stage must be one of forward, backward, both, got 'up'",
    ),
    (lambda w: layer_spectrum(w.problem.weight, None, {}), TypeError, "partition must be a BlockPartition"),  # type: ignore[arg-type]
    (
        lambda w: layer_spectrum(w.problem.weight, w.problem.partition, [w.problem.weight]),  # type: ignore[arg-type]
        TypeError,
        "updates must be a mapping from names to tensors, got list",
    ),
    (lambda _: effective_number([0.5]), TypeError, "energies must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    (lambda _: effective_number(torch.ones(2, 2)), TypeError, "energies must be a vector of floating-point"),
    (lambda _: cumulated(torch.ones(3).to_sparse()), TypeError, "shares must be a vector of floating-point"),
    (lambda _: cumulated(one(1, 2)), TypeError, "shares must be a vector .* got torch.int64"),
    (lambda _: cumulated(torch.ones(3), -1), ValueError, "points must be at least 0, got -1"),
    (lambda _: cumulated(torch.ones(3), 10**400), ValueError, "points must be at most 1000000"),
    (lambda _: sketch_weight(torch.eye(3).to_sparse_csr()), TypeError, "weight must be a dense tensor"),
    (lambda _: sketch_weight(NESTED), TypeError, "weight must be a dense tensor, got layout torch.nested"),
    (lambda w: sketch_distance(NESTED, w.layer.smoa_sketch), TypeError, "first must be a sketch, 33 numbers"),
    (lambda _: load_backend(None), ValueError, "name must be one of eager, .* got None"),  # type: ignore[arg-type]
    (
        lambda _: resolve_backend("auto", "cpu", torch.float32, 1),  # type: ignore[arg-type]
        TypeError,
        "device must be a torch.device, got str",
    ),
    (
        lambda _: resolve_backend(np.ones(3), torch.device("cpu"), torch.float32, 1),  # type: ignore[arg-type]
        ValueError,
        "backend must be one of auto, eager",
    ),
    (lambda _: triton_obstacle(None), TypeError, "device must be a torch.device, got NoneType"),  # type: ignore[arg-type]
    (lambda _: triton_obstacle(CPU, torch.float32, "8"), TypeError, "rank must be an int, got '8'"),  # type: ignore[arg-type]
    (lambda _: gemm_is_ieee("float32", "cpu"), TypeError, "dtype must be a torch.dtype, got str"),  # type: ignore[arg-type]
    (lambda _: without_autocast("cpu"), TypeError, "tensor must be a torch.Tensor, got str"),  # type: ignore[arg-type]
    (lambda _: gemm_is_ieee(torch.float32, ["cpu"]), TypeError, "device_type must be a str, got list"),  # type: ignore[arg-type]
    (lambda _: draw_seed("nodev"), TypeError, "device must be a torch.device, got str"),  # type: ignore[arg-type]
    (lambda _: Dropout(None, 0.5), TypeError, "seed must be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
    (lambda _: Dropout(torch.tensor(1.0), 0.5), TypeError, "seed must be an int64 tensor with one element"),
    (lambda _: Dropout(one(7), float("nan")), ValueError, r"p must lie in \[0, 1\), got nan"),
    (
        lambda _: Dropout(one(7), 0.5, column_offset=-1),
        ValueError,
        "column_offset must be at least 0, got -1",
    ),
    (lambda _: Dropout(one(7), 0.5, width=2**40), ValueError, "width must be at most 2147483647"),
    (lambda _: Dropout(one(7), 0.5).multiplier(one(1)), TypeError, "like must be a matrix of floating-point"),
    (
        lambda _: Dropout(one(7), 0.5).multiplier(torch.ones(2, 2), -1),
        ValueError,
        "columns must be at least 0, got -1",
    ),
    (
        lambda _: Dropout(one(7), 0.5).multiplier(torch.ones(2, 2, device="meta")),
        ValueError,
        "like must be on the seed's device cpu, got meta",
    ),
    (
        lambda _: Dropout(one(7), 0.5, 3, 4).multiplier(torch.ones(2, 2)),
        ValueError,
        "columns must lie in the width 4, got 3 to 5",
    ),
    (
        lambda _: Dropout(one(7), 0.5, 3).multiplier(torch.ones(2, 2)),
        ValueError,
        "columns must lie in the width 2, got 3 to 5",
    ),
    (lambda _: Dropout(one(7), 0.5, 3).stream(2), ValueError, "columns must lie in the width 2, got 3 to 5"),
    (lambda _: Dropout(one(7), 0.5).stream(2.0), TypeError, "columns must be an int, got 2.0"),  # type: ignore[arg-type]
    (
        lambda _: draw_seed(torch.device("xpu")),
        ValueError,
        "device must be one that this machine has, got .*xpu",
    ),
    (lambda _: replace_file("a", b""), TypeError, "path must be a Path, got str"),  # type: ignore[arg-type]
    (lambda w: replace_file(w.folder / "a", "text"), TypeError, "data must be a bytes, got str"),  # type: ignore[arg-type]
    (lambda _: smoa_buffers(None), TypeError, "model must be a Module, got NoneType"),  # type: ignore[arg-type]
    (lambda _: ignore_buffers("layer"), TypeError, "model must be a Module, got str"),  # type: ignore[arg-type]
    # Before its hooks are registered, which would raise in the middle of a backward.
    (
        lambda w: average_gradients([w.layer.smoa_A], "gloo"),
        TypeError,
        "process_group must be a ProcessGroup, got str",
    ),  # type: ignore[arg-type]
    (lambda w: ignore_buffers(w.layer, []), TypeError, "process_group must be a ProcessGroup, got list"),  # type: ignore[arg-type]
    (lambda w: agree_on_buffers(w.layer, 0), TypeError, "process_group must be a ProcessGroup, got int"),  # type: ignore[arg-type]
    (lambda _: shared_spectra({}).__enter__(), TypeError, "process_group must be a ProcessGroup, got dict"),  # type: ignore[arg-type]
    (lambda _: average_gradients(np.array(3)), TypeError, "parameters must be parameters, got array"),  # type: ignore[arg-type]
    (lambda w: average_gradients(w.layer.smoa_A), TypeError, "parameters must be parameters"),
    (lambda _: average_gradients([None]), TypeError, r"parameters must be parameters, got \[None\]"),  # type: ignore[list-item]
    # What it would cost.
    (lambda _: PROBLEM.padded(2.5), TypeError, "features must be an int, got 2.5"),  # type: ignore[arg-type]
    (lambda _: PROBLEM.padded(0), ValueError, "features must be at least 1, got 0"),
    (lambda _: parts(None, "split"), TypeError, "problem must be a Problem, got NoneType"),  # type: ignore[arg-type]
    (lambda _: parts(PROBLEM, ["split"]), ValueError, "algorithm must be one of frozen, lora"),  # type: ignore[arg-type]
    (lambda _: estimate(PROBLEM, GPUS["h100"], "split", ieee=one(1, 1)), TypeError, "ieee must be a bool"),  # type: ignore[arg-type]
    (lambda _: choose_algorithm(None, GPUS["h100"], True), TypeError, "problem must be a Problem, got None"),  # type: ignore[arg-type]
    (lambda _: choose_algorithm(PROBLEM, "h100", True), TypeError, "gpu must be a Gpu, got str"),  # type: ignore[arg-type]
    (lambda _: fused_token_limit(PROBLEM, GPUS["h100"], 1), TypeError, "ieee must be a bool, got int"),  # type: ignore[arg-type]
    (lambda _: gradient_parts(None), TypeError, "p must be a Problem, got NoneType"),  # type: ignore[arg-type]
    (lambda _: grad_tiles(8192), TypeError, "p must be a Problem, got int"),  # type: ignore[arg-type]
    (lambda _: partial_width("4"), TypeError, "rank must be an int, got '4'"),  # type: ignore[arg-type]
    (lambda _: partial_width(-1), ValueError, "rank must be at least 0, got -1"),
    (lambda _: token_splits(1, 0, 1, 1), ValueError, "programs must be at least 1, got 0"),
    (lambda _: token_splits(-1, 1, 1, 1), ValueError, "tokens must be at least 0, got -1"),
    (lambda _: token_splits(1, 1, None, 1), TypeError, "processors must be an int, got None"),  # type: ignore[arg-type]
    (lambda _: token_splits(1, 1, 1, 0), ValueError, "block_t must be at least 1, got 0"),
    (lambda _: partial_bytes("4"), TypeError, "p must be a Problem, got str"),  # type: ignore[arg-type]
    (lambda _: block_grad_share(None, GPUS["h100"]), TypeError, "problem must be a Problem, got NoneType"),  # type: ignore[arg-type]
    (lambda _: block_grad_share(PROBLEM, "h100"), TypeError, "gpu must be a Gpu, got str"),  # type: ignore[arg-type]
    (lambda _: block_grad_share(PROBLEM, GPUS["h100"], ieee=1), TypeError, "ieee must be a bool, got int"),
    (
        lambda _: block_grad_share(replace(PROBLEM, tokens=0), GPUS["h100"]),
        ValueError,
        "tokens must be at least 1, got 0",
    ),
    (lambda _: Problem(10**400, 4, 4, 1, 1), ValueError, "tokens must be at most 1000000000000"),
    (lambda _: PROBLEM.padded(10**400), ValueError, "features must be at most 1000000000000"),
    (lambda _: backward_workspace_bytes([]), TypeError, "problem must be a Problem, got list"),  # type: ignore[arg-type]
    (lambda _: backward_workspace(None), TypeError, "problem must be a Problem, got NoneType"),  # type: ignore[arg-type]
    (
        lambda _: peak_bytes(PROBLEM, "fused"),
        ValueError,
        "algorithm must be one of frozen, lora, merged, split",
    ),
    # What is kept for the next call cannot be a list, nor what only equals an argument.
    (lambda _: choose_algorithm([], GPUS["h100"], True), TypeError, "problem must be a Problem, got list"),  # type: ignore[arg-type]
    (lambda _: choose_algorithm(PROBLEM, [], True), TypeError, "gpu must be a Gpu, got list"),  # type: ignore[arg-type]
    (lambda _: choose_algorithm(PROBLEM, GPUS["h100"], []), TypeError, "ieee must be a bool, got list"),  # type: ignore[arg-type]
    (
        lambda _: equal(choose_algorithm, PROBLEM, GPUS["h100"], True),
        TypeError,
        "ieee must be a bool, got int",
    ),
    (lambda _: fused_token_limit([], GPUS["h100"], True), TypeError, "problem must be a Problem, got list"),  # type: ignore[arg-type]
    (lambda _: fused_token_limit(PROBLEM, {}, True), TypeError, "gpu must be a Gpu, got dict"),  # type: ignore[arg-type]
    (
        lambda _: equal(fused_token_limit, PROBLEM, GPUS["h100"], True),
        TypeError,
        "ieee must be a bool, got int",
    ),
    (
        lambda _: load_backend([]),
        ValueError,
        r"name must be one of eager, native, triton, reference, got \[\]",
    ),  # type: ignore[arg-type]
    (
        lambda _: algorithms_of([]),
        ValueError,
        r"name must be one of eager, native, triton, reference, got \[\]",
    ),  # type: ignore[arg-type]
    (lambda _: device_gpu([]), TypeError, "device must be a torch.device, got list"),  # type: ignore[arg-type]
    (lambda _: match_gpu([], None), TypeError, "device_name must be a str, got list"),  # type: ignore[arg-type]
    (lambda _: match_gpu("x", [9, 0]), TypeError, "capability must be a tuple, got list"),  # type: ignore[arg-type]
    (lambda _: match_gpu("x", None, []), TypeError, r"multiprocessors must be an int, got \[\]"),  # type: ignore[arg-type]
    (lambda _: equal(match_gpu, "x", (9, 0), 1), TypeError, "multiprocessors must be an int, got True"),
    (lambda _: device_gpu(None), TypeError, "device must be a torch.device, got NoneType"),  # type: ignore[arg-type]
    (lambda _: match_gpu(None, None), TypeError, "device_name must be a str, got NoneType"),  # type: ignore[arg-type]
    (lambda _: match_gpu("x", 9), TypeError, "capability must be a tuple, got int"),  # type: ignore[arg-type]
    (lambda _: match_gpu("x", (9,)), ValueError, r"capability must be two ints, as \(9, 0\), got \(9,\)"),  # type: ignore[arg-type]
    (lambda _: match_gpu("x", (9, 0), 0), ValueError, "multiprocessors must be at least 1, got 0"),
    (
        lambda _: device_gpu(NOWHERE),
        ValueError,
        "device must be a CUDA or ROCm GPU that this machine has, got 'cuda:99'",
    ),
    (lambda _: Gpu(None, {}, 1.0, 1, None, "sm_90"), TypeError, "name must be a str, got NoneType"),  # type: ignore[arg-type]
    (lambda _: replace(GPUS["h100"], name=1), TypeError, "name must be a str, got int"),
    (
        lambda _: replace(GPUS["h100"], matmul_tflops={}),
        TypeError,
        "matmul_tflops must be a mapping of bf16, .* got {}",
    ),
    (
        lambda _: replace(GPUS["h100"], matmul_tflops=dict.fromkeys(GPUS["h100"].matmul_tflops, 0)),
        ValueError,
        r"matmul_tflops\['bf16'\] must be above 0, got 0",
    ),
    (
        lambda _: replace(GPUS["h100"], memory_tbps=float("nan")),
        ValueError,
        "memory_tbps must be finite, got nan",
    ),
    (lambda _: replace(GPUS["h100"], memory_tbps="3"), TypeError, "memory_tbps must be a number, got '3'"),
    (
        lambda _: replace(GPUS["h100"], multiprocessors=0),
        ValueError,
        "multiprocessors must be at least 1, got 0",
    ),
    (lambda _: replace(GPUS["h100"], capability=[9, 0]), TypeError, "capability must be a tuple, got list"),
    (lambda _: Scale("gpt-5", 8, "fsdp"), ValueError, "model must be one of llama-3-8b, .* got 'gpt-5'"),
    (lambda _: Scale([], 8, "fsdp"), ValueError, r"model must be one of .* got \[\]"),  # type: ignore[arg-type]
    (lambda _: Scale("llama-3-8b", "a", "fsdp"), TypeError, "gpus must be an int, got 'a'"),  # type: ignore[arg-type]
    (lambda _: Scale("llama-3-8b", 10**400, "fsdp"), ValueError, "gpus must be at most 1000000000000"),
    (lambda _: Scale("llama-3-8b", True, "fsdp"), TypeError, "gpus must be an int, got True"),
    (lambda _: Scale("llama-3-8b", 8, "fsdp", tokens=2.0), TypeError, "tokens must be an int, got 2.0"),  # type: ignore[arg-type]
    (
        lambda _: predict(SCALE, "dora", GPUS["h100"]),
        ValueError,
        "method must be one of full, lora, smoa, got 'dora'",
    ),  # type: ignore[arg-type]
    (lambda _: predict(None, "smoa", GPUS["h100"]), TypeError, "scale must be a Scale, got NoneType"),  # type: ignore[arg-type]
    (lambda _: predict(SCALE, "full", None), TypeError, "gpu must be a Gpu, got NoneType"),  # type: ignore[arg-type]
    (lambda _: tensor_parallel_size(None), TypeError, "scale must be a Scale, got NoneType"),  # type: ignore[arg-type]
]


@rows("call", MODELS)
def test_sketches_spectra_and_costs(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


def test_what_the_callers_own_generator_raised_is_told() -> None:
    with pytest.raises(TypeError, match="parameters must be parameters, got <map") as caught:
        average_gradients(map(len, [3]))  # type: ignore[arg-type]
    assert str(caught.value.__cause__) == "object of type 'int' has no len()"
