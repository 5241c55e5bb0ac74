"""Bad arguments of functions: partitions, packing, the reference, sketches, spectra, the cost model."""

from typing import Any

import torch

from smoa_kernels import BlockPartition
from smoa_kernels.backends import load_backend
from smoa_kernels.cost import Problem, estimate
from smoa_kernels.gpus import GPUS
from smoa_kernels.packed import pack_factors, split_rank, trainable_parameters, unpack_factors
from smoa_kernels.reference import reference_delta_weight
from smoa_kernels.sketch import sketch_distance, sketch_weight
from smoa_kernels.spectrum import layer_spectrum

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
    (packed(1, 2), TypeError, "A_blocks and B_blocks must hold matrices"),
    (packed(torch.tensor(1.0), torch.tensor(1.0)), TypeError, "A_blocks and B_blocks must hold matrices"),
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
    (lambda _: split_rank(0, 3), ValueError, "r must be at least 1, got 0"),
    (lambda _: split_rank(8, 10**9), ValueError, "num_blocks must be at most 65536"),
    (lambda w: trainable_parameters(w.problem.partition, [1]), ValueError, "ranks must be 3, .* got 1"),
    (delta(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (delta(A=torch.ones(3, 4)), ValueError, r"A must have shape \(ρ, 57\)"),
    (delta(ranks=[3, 0, 2]), TypeError, "ranks must be a tensor"),
    (delta(ranks=one(9, 9, 9)), ValueError, r"ranks must lie in \[0, 3\]"),
    (delta(scaling="a"), TypeError, "scaling must be a number"),
]


@rows("call", PACKING)
def test_packing_and_the_reference(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


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
    (lambda _: load_backend("cuda"), ValueError, "name must be one of eager, triton, reference, got 'cuda'"),
    (lambda _: Problem("1", 4, 4, 1, 1), TypeError, "tokens must be an int, got '1'"),  # type: ignore[arg-type]
    (lambda _: Problem(1, 4, 4, 1.5, 1), TypeError, "num_blocks must be an int, got 1.5"),  # type: ignore[arg-type]
    (lambda _: Problem(1, 4, 4, 1, 1, "bf16"), TypeError, "dtype must be a torch.dtype, got 'bf16'"),  # type: ignore[arg-type]
    (lambda _: Problem(1, 4, 4, 1, 1, dropout=None), TypeError, "dropout must be a number"),  # type: ignore[arg-type]
    (lambda _: estimate(None, GPUS["h100"], "split"), TypeError, "problem must be a Problem"),  # type: ignore[arg-type]
    (lambda _: estimate(Problem(1, 4, 4, 1, 1), None, "split"), TypeError, "gpu must be a Gpu"),  # type: ignore[arg-type]
    (
        lambda _: estimate(Problem(1, 4, 4, 1, 1), GPUS["h100"], "split").seconds("up"),  # type: ignore[arg-type]
        ValueError,
        "stage must be forward, backward or both, got 'up'",
    ),
]


@rows("call", MODELS)
def test_sketches_spectra_and_costs(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)
