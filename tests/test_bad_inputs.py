"""Bad inputs, all in one table: what is called, the exception, the words in its message, and that nothing changed.

A row's call gets a `World`: a problem, a layer and a folder, whose every bit is compared afterwards. The PEFT tuner's
rows stand in tests/test_bad_adapters.py, damaged adapter files in tests/peft/test_refused.py and test_fuzzed_files.py,
damaged tuning tables in tests/tuning/test_store.py.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import LinearProblem, make_problem
from torch import Tensor, nn
from torch.nn.utils import prune

from smoa_kernels import BlockPartition, FusedSMoALinear, smoa_linear
from smoa_kernels.backends import load_backend
from smoa_kernels.cost import Problem, estimate
from smoa_kernels.gpus import GPUS
from smoa_kernels.packed import pack_factors, unpack_factors
from smoa_kernels.ranks import split_rank, trainable_parameters
from smoa_kernels.reference import reference_delta_weight, reference_linear
from smoa_kernels.sketch import sketch_distance, sketch_weight
from smoa_kernels.spectrum import layer_spectrum

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the peft extra"
)
needs_cli = pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="needs the cli extra")


@dataclass
class World:
    """What a bad call must leave as it is."""

    problem: LinearProblem
    linear: nn.Linear
    layer: FusedSMoALinear
    folder: Path

    def bits(self) -> dict[str, object]:
        """Every tensor's bytes and requires_grad, every file's bytes."""
        p = self.problem
        tensors = {name: value for name, value in vars(p).items() if isinstance(value, Tensor)}
        tensors |= {f"partition {i}": t for i, t in enumerate(p.partition.tensors())}
        tensors |= {f"linear {name}": t for name, t in self.linear.named_parameters()}
        tensors |= {f"layer {name}": t for name, t in self.layer.state_dict(keep_vars=True).items()}
        files = {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        settings = {k: v for k, v in vars(self.layer).items() if not k.startswith("_")}
        return {
            name: (t.detach().numpy().tobytes(), t.requires_grad) for name, t in tensors.items()
        } | {"settings": repr(settings), "scaling": self.layer.scaling, "files": files}  # fmt: skip

    def arguments(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        names = ("x", "weight", "bias", "A", "B", "partition", "ranks", "scaling")
        return {name: getattr(self.problem, name) for name in names} | dict(changed)


@pytest.fixture
def world(tmp_path: Path) -> World:
    torch.manual_seed(0)
    layer = FusedSMoALinear(40, 33, r=7, num_blocks=3)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "noise.json").write_bytes(b"\xff\x00\x9f")
    return World(make_problem(dtype=torch.float32), nn.Linear(40, 33), layer, tmp_path)


Call = Callable[[World], object]


def check(world: World, call: Call, error: type[Exception], words: str) -> None:
    before = world.bits()
    with pytest.raises(error, match=words) as caught:
        call(world)
    assert type(caught.value) is error
    assert world.bits() == before


INT32 = torch.int32
_meta = torch.randn(4, 57, device="meta")

OPERATOR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(4, 56)}, ValueError, r"x must have 57 features .* got shape \(4, 56\)"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have 57 features"),
    ({"x": torch.ones(4, 57, dtype=torch.int64)}, TypeError, "x must be floating point, got torch.int64"),
    (
        {"x": torch.ones(4, 57, dtype=torch.complex64)},
        TypeError,
        "x must be floating point, got torch.complex",
    ),
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    (
        {"x": torch.randn(4, 57).to_sparse()},
        TypeError,
        "x must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"x": torch.randn(4, 57).bfloat16()}, TypeError, "weight must have x's dtype torch.bfloat16"),
    ({"x": _meta}, ValueError, "weight must be on x's device meta, got cpu"),
    ({"weight": torch.randn(33, 57, requires_grad=True)}, ValueError, "weight must be frozen"),
    ({"weight": torch.randn(57)}, ValueError, "weight must have shape"),
    ({"weight": torch.randn(33, 57).to_sparse()}, TypeError, "weight must be a dense tensor"),
    ({"weight": torch.randn(33, 57).to(torch.float8_e4m3fn)}, TypeError, "weight must have x's dtype"),
    ({"bias": torch.randn(32)}, ValueError, r"bias must have shape \(33,\), got \(32,\)"),
    ({"bias": torch.tensor(1.0)}, ValueError, r"bias must have shape \(33,\), got \(\)"),
    ({"A": torch.randn(3, 56)}, ValueError, r"A must have shape \(ρ, 57\), got \(3, 56\)"),
    ({"A": torch.zeros(0, 57)}, ValueError, r"B must have shape \(33, 0\) to fit A"),
    ({"B": torch.randn(33, 2)}, ValueError, r"B must have shape \(33, 3\) to fit A, got \(33, 2\)"),
    ({"B": torch.randn(33, 3).double()}, TypeError, "A and B must have one dtype"),
    (
        {"A": torch.randn(3, 57).bfloat16(), "B": torch.randn(33, 3).bfloat16()},
        TypeError,
        "A and B must have weight's dtype torch.float32 or float32, got torch.bfloat16",
    ),
    ({"partition": None}, TypeError, "partition must be a BlockPartition, got NoneType"),
    (
        {"partition": make_problem(in_features=56).partition},
        ValueError,
        r"partition must be made for a weight of shape \(33, 57\), got one for \(33, 56\)",
    ),
    ({"ranks": [3, 0, 2]}, TypeError, "ranks must be a tensor, got list"),
    ({"ranks": torch.tensor([3, 0], dtype=INT32)}, ValueError, r"ranks must be int32 of shape \(3,\)"),
    ({"ranks": torch.tensor([3, 0, 2])}, ValueError, "ranks must be int32"),
    ({"ranks": torch.tensor([4, 0, 2], dtype=INT32)}, ValueError, r"ranks must lie in \[0, 3\]"),
    ({"ranks": torch.tensor([-1, 0, 2], dtype=INT32)}, ValueError, r"ranks must lie in \[0, 3\]"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must lie in"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got '0.1'"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got None"),
    ({"dropout_seed": 3}, TypeError, "dropout_seed must be an int64 tensor with one element, got 3"),
    ({"dropout_seed": torch.ones(2, dtype=torch.int64)}, TypeError, "dropout_seed must be an int64 tensor"),
    ({"column_offset": 1}, ValueError, "column_offset and global_in_features must hold x's 57 columns"),
    ({"column_offset": -1}, ValueError, "got columns -1 to 56 of 57"),
    ({"column_offset": 0.5}, TypeError, "column_offset must be an int, got 0.5"),
    ({"global_in_features": 50}, ValueError, "got columns 0 to 57 of 50"),
    ({"global_in_features": 57.0}, TypeError, "global_in_features must be an int, got 57.0"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling must be a number or a 0-d tensor, got shape \(2,\)"),
    ({"scaling": "1"}, TypeError, "scaling must be a number or a 0-d tensor, got str"),
    ({"scaling": torch.tensor(1j)}, TypeError, "scaling must be real, got torch.complex64"),
    ({"scaling": torch.tensor(1.0, requires_grad=True)}, ValueError, "scaling must not require grad"),
]

# What only `smoa_linear` takes.
CHOICES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"algorithm": "fast"}, ValueError, "algorithm must be one of auto, merged, split, expanded, fused"),
    ({"algorithm": None}, ValueError, "algorithm must be one of .* got None"),
    ({"algorithm": "merged", "dropout_p": 0.1}, ValueError, "'split' or 'auto' while dropout is active"),
    ({"algorithm": "fused"}, ValueError, "merged, split, expanded on backend 'eager', got 'fused'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, eager, triton, reference, got 'cuda'"),
    ({"block_ranks": 3}, ValueError, r"block_ranks must be the 3 numbers in ranks, in \[0, 3\], got 3"),
    ({"block_ranks": [3, 0]}, ValueError, r"block_ranks must be the 3 numbers in ranks.* got \[3, 0\]"),
    ({"block_ranks": [4, 0, 2]}, ValueError, r"in \[0, 3\], got \[4, 0, 2\]"),
    ({"block_ranks": [2, 0, 2]}, ValueError, r"numbers in ranks, \[3, 0, 2\], got \[2, 0, 2\]"),
]


@pytest.mark.parametrize(("changed", "error", "words"), [*OPERATOR, *CHOICES])
def test_operator(changed: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    check(world, lambda w: smoa_linear(**w.arguments(changed)), error, words)


@pytest.mark.parametrize(("changed", "error", "words"), OPERATOR)
def test_reference(changed: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    """The same checks, so that one can stand for the other."""
    check(world, lambda w: reference_linear(**w.arguments(changed)), error, words)


def labels(rows: Any, cols: Any, num_blocks: Any) -> Call:
    return lambda _: BlockPartition.from_labels(rows, cols, num_blocks)


def spectrum(weight: Any, num_blocks: Any = 1) -> Call:
    return lambda _: BlockPartition.from_weight(weight, num_blocks)


def one(*values: int) -> Tensor:
    return torch.tensor(values)


FUNCTIONS: list[tuple[Call, type[Exception], str]] = [
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
    # The layer's methods.
    (lambda w: w.layer(torch.randn(3, 41)), ValueError, "x must have 40 features"),
    (lambda w: w.layer(torch.ones(3, 40, dtype=torch.int64)), TypeError, "x must be floating point"),
    (lambda w: setattr(w.layer, "scaling", "a"), TypeError, "scaling must be a number, got 'a'"),
    (lambda _: FusedSMoALinear.from_linear(nn.Conv2d(3, 3, 3)), TypeError, "transformers Conv1D, got Conv2d"),
    (lambda _: FusedSMoALinear.from_linear(None), TypeError, "got NoneType"),  # type: ignore[arg-type]
    (lambda _: FusedSMoALinear(0, 33), ValueError, "in_features must be at least 1, got 0"),
    (lambda _: FusedSMoALinear("40", 33), TypeError, "in_features must be an int, got '40'"),  # type: ignore[arg-type]
    (lambda _: FusedSMoALinear(40, 3.0), TypeError, "out_features must be an int, got 3.0"),  # type: ignore[arg-type]
    (lambda _: FusedSMoALinear(40, 33, dtype=torch.int64), TypeError, "dtype must be floating point"),
]


@pytest.mark.parametrize(("call", "error", "words"), FUNCTIONS, ids=[words for *_, words in FUNCTIONS])
def test_functions(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"r": 2.5}, TypeError, "r must be an int, got 2.5"),
    ({"r": True}, TypeError, "r must be an int, got True"),
    ({"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
    ({"num_blocks": "2"}, TypeError, "num_blocks must be an int, got '2'"),
    ({"num_blocks": 34, "r": 40}, ValueError, "num_blocks must be at most .* = 33 .*, got 34"),
    ({"block_ranks": 5}, TypeError, "block_ranks must be a list of ints, got 5"),
    ({"block_ranks": [4, 4, 0]}, ValueError, "block_ranks must have num_blocks=2 entries, got 3"),
    ({"block_ranks": [4, 5]}, ValueError, "block_ranks must sum to r=8, got .4, 5., which sum to 9"),
    ({"block_ranks": [9, -1]}, ValueError, "block_ranks must not be negative"),
    ({"block_ranks": [4.0, 4]}, TypeError, "block_ranks must be ints"),
    ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"dropout": -0.5}, ValueError, "dropout must lie in"),
    ({"dropout": None}, TypeError, "dropout must be a number, got None"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    ({"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
    ({"algorithm": "fast"}, ValueError, "algorithm must be one of"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
]
BLOCKS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"partition": "x"}, TypeError, "partition must be a BlockPartition or None, got str"),
    (
        {"partition": make_problem().partition},
        ValueError,
        r"partition must be made for .*\(33, 40\).* 2 blocks",
    ),
]


@pytest.mark.parametrize(("settings", "error", "words"), [*SETTINGS, *BLOCKS])
def test_from_linear(settings: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    check(world, lambda w: FusedSMoALinear.from_linear(w.linear, **settings), error, words)


@pytest.mark.parametrize(("settings", "error", "words"), SETTINGS)
def test_layer(settings: dict[str, Any], error: type[Exception], words: str, world: World) -> None:
    check(world, lambda _: FusedSMoALinear(40, 33, **settings), error, words)


def test_from_linear_with_a_weight_that_has_no_spectrum(world: World) -> None:
    with torch.no_grad():
        world.linear.weight[3, 4] = float("nan")
    check(world, lambda w: FusedSMoALinear.from_linear(w.linear), ValueError, "weight must be finite")


STATE: list[tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = [
    (lambda s: s.pop("smoa_ranks"), ValueError, "lacks smoa_ranks"),
    (lambda s: s.pop("smoa_row_block"), ValueError, "lacks smoa_row_block"),
    (
        lambda s: s.update(smoa_row_block=s["smoa_row_block"] + 3),
        ValueError,
        r"row_block must lie in \[0, 3\)",
    ),
    (
        lambda s: s.update(smoa_col_block=s["smoa_col_block"][:-1]),
        ValueError,
        r"size mismatch for smoa_col_block: .*\(40,\), .*\(39,\)",
    ),
    (lambda s: s.update(smoa_ranks=torch.ones(4, dtype=INT32)), ValueError, "size mismatch for smoa_ranks"),
    (lambda s: s.update(smoa_ranks=one(9, 0, 0).int()), ValueError, "smoa_ranks must sum to r=7"),
    (lambda s: s.update(smoa_ranks=one(3, -1, 5).int()), ValueError, "got .3, -1, 5."),
    (lambda s: s.update(smoa_ranks=s["smoa_ranks"] + 0.5), TypeError, "smoa_ranks must be an integer tensor"),
    (lambda s: s.update(smoa_A=torch.zeros(3, 41)), ValueError, "size mismatch for smoa_A"),
    (lambda s: s.update(smoa_A="x"), TypeError, "smoa_A must be a tensor, got str"),
    (lambda s: s.update(weight=torch.zeros(33, 41)), ValueError, "size mismatch for weight"),
    (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("smoa_")] and s["weight"].fill_(torch.nan),
        ValueError,
        "weight must be finite to have a spectrum",
    ),
]


@pytest.mark.parametrize(("edit", "error", "words"), STATE, ids=[words for *_, words in STATE])
def test_state_dict(
    edit: Callable[[dict[str, Any]], object], error: type[Exception], words: str, world: World
) -> None:
    other = FusedSMoALinear(40, 33, r=7, num_blocks=3)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    edit(state)
    check(world, lambda w: w.layer.load_state_dict(state), error, words)


# What an attack on every public name found: kinds of tensors that torch has and nobody expects, numbers that no
# machine holds, layers that are not what they seem.

NESTED = torch.nested.nested_tensor([torch.randn(2, 57), torch.randn(3, 57)])
FLOAT8 = torch.ones(4, 57).to(torch.float8_e4m3fn)
HUGE = 10**400

TENSORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: NESTED}, TypeError, f"{name} must be a dense tensor, got layout torch.nested")
        for name in ("x", "weight", "bias", "A", "B")
    ),
    ({"ranks": NESTED}, TypeError, "ranks must be a dense tensor"),
    ({"weight": "a"}, TypeError, "weight must be a tensor, got str"),
    (
        {"x": FLOAT8, "weight": FLOAT8[:1].expand(33, 57), "bias": None},
        TypeError,
        "x must be of 16 bits or more, got torch.float8_e4m3fn",
    ),
    ({"scaling": NESTED}, TypeError, "scaling must be a dense tensor .* got layout torch.nested"),
    ({"scaling": torch.ones((), device="meta")}, TypeError, "scaling must be .* holds a number, got a meta"),
    ({"scaling": HUGE}, ValueError, "scaling must be a number that a float holds, got one of 1329 bits"),
    ({"dropout_p": HUGE}, ValueError, "dropout_p must be a number that a float holds"),
    ({"global_in_features": 2**70}, ValueError, "global_in_features must be at most 2147483647, got 1180591"),
    ({"global_in_features": True}, TypeError, "global_in_features must be an int, got True"),
]


@pytest.mark.parametrize(("changed", "error", "words"), TENSORS)
@pytest.mark.parametrize("function", [smoa_linear, reference_linear])
def test_tensors(
    function: Callable[..., Tensor],
    changed: dict[str, Any],
    error: type[Exception],
    words: str,
    world: World,
) -> None:
    check(world, lambda w: function(**w.arguments(changed)), error, words)


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


MORE_FUNCTIONS: list[tuple[Call, type[Exception], str]] = [
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
    # The layer.
    (lambda _: FusedSMoALinear(40, 33, dtype="half"), TypeError, "dtype must be .* got half"),  # type: ignore[arg-type]
    (lambda _: FusedSMoALinear(40, 33, dtype=torch.float8_e5m2), TypeError, "dtype must be .* 16 bits"),
    (lambda _: FusedSMoALinear(40, 33, device="nodev"), ValueError, "device must be one that this machine"),
    (lambda _: FusedSMoALinear(40, 33, r=10**12, num_blocks=1), ValueError, "r must be at most 65536"),
    (lambda _: FusedSMoALinear(40, 33, num_blocks=10**12), ValueError, "num_blocks must be at most 65536"),
    (lambda _: FusedSMoALinear(40, 33, alpha=HUGE), ValueError, "alpha must be a number that a float holds"),
    (lambda w: setattr(w.layer, "scaling", HUGE), ValueError, "scaling must be a number that a float holds"),
    (lambda w: setattr(w.layer, "scaling", float("nan")), ValueError, "scaling must be finite, got nan"),
    (lambda w: setattr(w.layer, "partition", None), TypeError, "partition must be a BlockPartition"),
    (lambda w: setattr(w.layer, "partition", w.problem.partition), ValueError, "partition must be made for"),
    (lambda w: w.layer(NESTED), TypeError, "x must be a dense tensor, got layout torch.nested"),
    (lambda w: w.layer.load_state_dict([]), TypeError, "state_dict to be dict-like"),  # type: ignore[arg-type]
    (lambda w: w.layer.load_state_dict({5: one(1)}), TypeError, "keys of a state dict must be strings"),  # type: ignore[dict-item]
    (lambda w: w.layer.load_state_dict({}), ValueError, "the state dict lacks bias, weight"),
    (
        lambda w: FusedSMoALinear.from_linear(w.layer),
        TypeError,
        "linear must be without an adapter, got a FusedSMoALinear",
    ),
    (lambda _: FusedSMoALinear.from_linear(nn.LazyLinear(3)), TypeError, "linear must .* got LazyLinear"),
    (
        lambda _: FusedSMoALinear.from_linear(type("Double", (nn.Linear,), {"forward": abs})(4, 4)),
        TypeError,
        "linear must compute what nn.Linear computes, got Double",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), MORE_FUNCTIONS, ids=[w for *_, w in MORE_FUNCTIONS])
def test_more_functions(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)


def without_weight(linear: nn.Linear) -> None:
    del linear.weight


LINEARS: list[tuple[Callable[[nn.Linear], object], type[Exception], str]] = [
    (without_weight, TypeError, "linear must hold its weight as an initialised parameter"),
    (lambda linear: setattr(linear, "weight", None), TypeError, "linear must hold its weight"),
    (nn.utils.parametrizations.weight_norm, TypeError, "linear must"),
    (
        lambda linear: prune.random_unstructured(linear, "weight", 0.5),
        TypeError,
        "linear must hold its weight",
    ),
    (
        lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(3))),
        ValueError,
        "weight must be a matrix",
    ),
    (
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.ones(3))),
        ValueError,
        r"bias must have shape \(33,\)",
    ),
    (lambda linear: linear.to(torch.float8_e4m3fn), TypeError, "weight must be dense, of 16 bits"),
]


@pytest.mark.parametrize(("spoil", "error", "words"), LINEARS, ids=range(len(LINEARS)))
def test_layers_to_adapt(
    spoil: Callable[[nn.Linear], object], error: type[Exception], words: str, world: World
) -> None:
    linear = nn.Linear(40, 33)
    spoil(linear)
    before = {name: (id(p), p.requires_grad) for name, p in linear.named_parameters()}
    check(world, lambda _: FusedSMoALinear.from_linear(linear), error, words)
    assert before == {name: (id(p), p.requires_grad) for name, p in linear.named_parameters()}


MERGED: list[tuple[Callable[[FusedSMoALinear], object], type[Exception], str]] = [
    (
        lambda layer: layer.reset_parameters(),
        RuntimeError,
        r"is merged: call unmerge\(\) before reset_parameters",
    ),
    (lambda layer: layer.reset_adapter(), RuntimeError, r"is merged: call unmerge\(\) before reset_adapter"),
    (
        lambda layer: setattr(layer, "scaling", 2.0),
        RuntimeError,
        r"is merged: call unmerge\(\) before assigning",
    ),
    (lambda layer: layer.load_state_dict(layer.state_dict()), RuntimeError, r"is merged: call unmerge\(\)"),
    (lambda layer: layer(None), TypeError, "x must be a tensor, got NoneType"),
    (lambda layer: layer(torch.tensor(1.0)), ValueError, "x must have 40 features"),
    (lambda layer: layer(torch.ones(2, 41)), ValueError, "x must have 40 features"),
    (lambda layer: layer(torch.ones(2, 40).half()), TypeError, "weight must have x's dtype torch.float16"),
    (lambda layer: layer(torch.ones(2, 40, device="meta")), ValueError, "weight must be on x's device meta"),
    (lambda layer: layer(torch.ones(2, 40, dtype=torch.int64)), TypeError, "x must be floating point"),
    (lambda layer: layer(NESTED), TypeError, "x must be a dense tensor"),
]


@pytest.mark.parametrize(("call", "error", "words"), MERGED, ids=[words for *_, words in MERGED])
def test_merged_layers(
    call: Callable[[FusedSMoALinear], object], error: type[Exception], words: str, world: World
) -> None:
    world.layer.smoa_B.data.normal_()
    base = world.layer.weight.clone()
    world.layer.merge()
    check(world, lambda w: call(w.layer), error, words)
    with pytest.warns(UserWarning, match="already merged"):
        world.layer.merge()
    world.layer.unmerge()
    assert torch.equal(world.layer.weight, base)
    with pytest.warns(UserWarning, match="not merged"):
        world.layer.unmerge()


ON_META: list[tuple[Callable[[FusedSMoALinear], object], str]] = [
    (lambda layer: layer.merge(), "the layer is on the meta device"),
    (lambda layer: layer.delta_weight(), "the layer is on the meta device"),
    (lambda layer: layer.reset_adapter(), "the layer is on the meta device"),
    (lambda layer: layer.reset_parameters(), "the layer is on the meta device"),
    (lambda layer: setattr(layer, "scaling", 2.0), "the layer is on the meta device"),
    (lambda layer: layer(torch.ones(2, 40)), "the layer has no blocks yet"),
    (lambda layer: layer.num_adapter_parameters, "the layer has no blocks yet"),
    (lambda layer: layer.to_empty(device="cpu")(torch.ones(2, 40)), "the layer has no blocks yet"),
    (
        lambda layer: layer.load_state_dict(FusedSMoALinear(40, 33).state_dict()),
        "meta device: load with assign=True",
    ),
]


@pytest.mark.parametrize(("call", "words"), ON_META, ids=range(len(ON_META)))
def test_layers_without_values(call: Callable[[FusedSMoALinear], object], words: str) -> None:
    layer = FusedSMoALinear(40, 33, device="meta")
    with pytest.raises(RuntimeError, match=words):
        call(layer)
    layer = FusedSMoALinear(40, 33, alpha=3.0, device="meta")
    assert layer.scaling == 3.0 / 8
    layer.load_state_dict(FusedSMoALinear(40, 33).state_dict(), assign=True)
    assert layer.scaling == 3.0 / 8
    assert layer(torch.ones(2, 40)).shape == (2, 33)


MORE_STATE: list[tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = [
    (lambda s: s.update(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (lambda s: s.update(smoa_ranks=None), TypeError, "smoa_ranks must be a tensor, got NoneType"),
    (lambda s: s.update(weight=s["weight"].to_sparse()), TypeError, "weight must be a dense tensor"),
    (
        lambda s: s.update(weight=s["weight"] + 0j),
        TypeError,
        "weight must be floating point, got .*complex64",
    ),
    (lambda s: s.update(bias=s["bias"].long()), TypeError, "bias must be floating point, got torch.int64"),
    (lambda s: s.update(smoa_B=s["smoa_B"].to("meta")), ValueError, "smoa_B must hold numbers, got a meta"),
    (
        lambda s: s.update(smoa_col_block=s["smoa_col_block"] / 1),
        TypeError,
        "smoa_col_block must be an integer",
    ),
    (lambda s: s.update(smoa_ranks=s["smoa_ranks"].to("meta")), ValueError, "smoa_ranks must hold numbers"),
    (
        lambda s: s.update(smoa_sketch=s["smoa_sketch"].long()),
        TypeError,
        "smoa_sketch must be floating point",
    ),
    (lambda s: s.pop("bias"), ValueError, "the state dict lacks bias; strict=False loads the others"),
    (lambda s: s.pop("smoa_A"), ValueError, "the state dict lacks smoa_A"),
    (lambda s: s.pop("smoa_sketch"), ValueError, "the state dict lacks smoa_sketch"),
    (lambda s: s.update(extra=one(1)), ValueError, "the state dict must not hold extra"),
]


@pytest.mark.parametrize(("edit", "error", "words"), MORE_STATE, ids=[words for *_, words in MORE_STATE])
def test_more_of_state_dict(
    edit: Callable[[dict[str, Any]], object], error: type[Exception], words: str, world: World
) -> None:
    test_state_dict(edit, error, words, world)


def test_a_sketch_of_nan_is_no_likeness(world: World) -> None:
    state = world.layer.state_dict() | {"smoa_sketch": torch.full((33,), torch.nan)}
    with pytest.warns(UserWarning, match="trained over another base weight"):
        world.layer.load_state_dict(state)
    world.layer.strict_base = True
    with pytest.raises(ValueError, match="strict_base=True refuses it"):
        world.layer.load_state_dict(state)


# The command line: one line on stderr, exit code 2. FOLDER is the world's.
COMMANDS: list[tuple[str, str]] = [
    ("tun", "No such command 'tun'"),
    ("--version", "No such option: --version"),
    ("info extra", "unexpected extra argument"),
    ("info --json", "--json"),
    ("roofline --gpu h1000", "--gpu must be one of h100"),
    ("roofline --shape 4096", "--shape must be OUTxIN"),
    ("roofline --shape 0x16", "out_features must be at least 1, got 0"),
    ("roofline --shape 99999999999x16", "up to nine digits each"),
    ("roofline --dtype int8", "--dtype must be one of"),
    ("roofline --tokens many", "--tokens"),
    ("roofline --tokens 99999999999", "--tokens"),
    ("roofline --tokens -1", "tokens must be at least 0, got -1"),
    ("roofline --rank -1", "rank must be at least 0, got -1"),
    ("roofline --blocks 0", "num_blocks must be at least 1, got 0"),
    ("roofline --shape 64x8 --blocks 9", "--blocks must be at most 8 for 64x8, got 9"),
    ("roofline --dropout 1", "dropout must be in [0, 1)"),
    ("roofline --dropout nan", "dropout must be in [0, 1)"),
    ("audit --arch sm_70", "arch must be one of sm_80"),
    ("audit --dtype int8", "dtype must be one of"),
    ("audit --jobs 0", "--jobs"),
    ("tune --model llama-9", "--model must be one of llama-3-8b"),
    ("tune --shape 4096", "--shape must be OUTxIN"),
    ("tune --shape 0x64", "out_features must be at least 1, got 0"),
    ("tune --dtype int8", "--dtype must be one of bf16"),
    ("tune --kernel gemm", "--kernel must be one of modulated_weight"),
    ("tune --tokens 0", "tokens must be at least 1, got 0"),
    ("tune --rank 0", "rank must be at least 1, got 0"),
    ("tune --shape 64x8 --blocks 9", "blocks must be at most 8 for a layer of 64x8, got 9"),
    ("tune --dry-run --gpu h1000", "--gpu must be one of h100"),
    ("tune --dry-run --gpu mi300x --dtype tf32", "--dtype tf32 is never asked for on AMD"),
    ("tune --budget -1", "--budget"),
    ("tune --from-model /nowhere", "--from-model must be a config.json or its folder, got /nowhere"),
    ("tune --from-model FOLDER", "--from-model must be a config.json or its folder"),
    ("tune --gpu h100", "goes with --dry-run only"),
    ("spectrum", "Missing argument"),
    ("spectrum FOLDER --rank 0", "--rank"),
    ("spectrum FOLDER --seed -1", "--seed"),
    ("spectrum FOLDER --adapter FOLDER --blocks 2", "--rank and --blocks are of a random SMoA"),
    ("spectrum FOLDER --figure a.pdf", "--figure must be a file .svg or .png, got a.pdf"),
    ("spectrum FOLDER --layer-figures FOLDER/config.json", "--layer-figures must be a folder, got"),
    ("spectrum FOLDER --json /nowhere/at/all.json", "cannot write /nowhere/at/all.json: /nowhere/at is not"),
    ("spectrum FOLDER --json FOLDER", "Is a directory"),
    ("tune --dry-run --gpu h100 --rank 99999999999", "rank must be at most 1024 in 4 blocks"),
    ("tune --dry-run --gpu h100 --rank 0", "rank must be at least 1, got 0"),
    ("tune --dry-run --gpu h100 --blocks 99999", "blocks must be at most"),
    ("tune --dry-run --gpu h100 --tokens -1", "tokens must be at least 1, got -1"),
    ("tune --dry-run --gpu h100 --shape 0x8", "out_features must be at least 1, got 0"),
    ("tune --dry-run --gpu h100 --from-model FOLDER/deep.json", "--from-model must be .* recursion"),
    ("tune --dry-run --gpu h100 --from-model FOLDER/list.json", "must give a positive num_attention_heads"),
    ("tune --dry-run --gpu h100 --from-model FOLDER/noise.json", "--from-model must be .* decode"),
    ("tune --dry-run --gpu h100 --from-model /dev/zero", "/dev/zero is no file"),
    ("tune --budget nan", "--budget"),
    ("tune --budget -1", "--budget"),
    ("audit --kernel matmul", "kernel must be one of modulated_weight"),
    ("audit --jobs -1", "--jobs"),
    ("roofline --rank 1e5", "--rank"),
    ("roofline --dropout inf", "dropout must be in [0, 1)"),
    ("--json", "No such option"),
]
PLANS = [
    ("plan --model gpt-5", "model must be one of llama-3-8b"),
    ("plan --model", "--model"),
    ("plan --parallel pp", "parallel must be one of ddp, fsdp, tp, got 'pp'"),
    ("plan --gpu rtx4090", "--gpu must be one of h100"),
    ("plan --gpus 0", "gpus must be at least 1, got 0"),
    ("plan --gpus many", "--gpus"),
    ("plan --gpus 12 --parallel tp", "gpus must be a multiple of 8, over which layers are cut, got 12"),
    ("plan --tokens -5", "tokens must be at least 1, got -5"),
    ("plan --rank 0", "rank must be at least 1, got 0"),
    ("plan --blocks 0", "num_blocks must be at least 1, got 0"),
    (
        "plan --blocks 1025",
        "num_blocks must be at most .* = 1024 for llama-3-8b's smallest layer .*, got 1025",
    ),
    ("plan --rank 99999999999", "--rank"),
    ("plan --gpus 99999999999", "--gpus"),
    ("plan --tokens 99999999999", "--tokens"),
    ("plan extra", "unexpected extra argument"),
]
ADAPTERS = [
    ("inspect", "Missing argument"),
    ("inspect /nowhere", "there is no adapter_config.json in /nowhere"),
    ("inspect FOLDER", "an adapter of the method LORA, not SMOA"),
    ("spectrum /nowhere", "there are no safetensors files in /nowhere"),
    ("spectrum FOLDER --adapter FOLDER", "there are no safetensors files in"),
]


def run(command: str, world: World, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What a failing command prints."""
    from smoa_kernels.cli import main

    before = world.bits()
    capsys.readouterr()
    assert main(command.replace("FOLDER", str(world.folder)).split()) == 2
    assert world.bits() == before
    captured = capsys.readouterr()
    return captured.out, captured.err


@needs_cli
@pytest.mark.parametrize(
    ("command", "words"),
    [*COMMANDS, *PLANS, *(pytest.param(*row, marks=needs_peft) for row in ADAPTERS)],
)
def test_command(command: str, words: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith(("inspect", "spectrum")) and importlib.util.find_spec("peft") is not None:
        import smoa_kernels.peft  # noqa: F401  # whose dependencies print when they are first imported
    out, err = run(command, world, capsys)
    assert out == ""
    assert err.startswith("smoa-kernels: error: ")
    assert err.count("\n") == 1
    assert words in err or re.search(words, err)
    _, debug = run(f"--debug {command}", world, capsys)
    assert debug.endswith(err)
    parsed = not command.startswith(("--", "tun "))
    assert ("Traceback" in debug) == (parsed and command != "tun")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must give a positive num_attention_heads, got None"),
        ("{", "--from-model must be a config.json or its folder"),
        ('{"num_attention_heads": 0}', "must give a positive num_attention_heads, got 0"),
        ('{"num_attention_heads": "8"}', "must give a positive num_attention_heads, got '8'"),
        ('{"num_attention_heads": 8, "hidden_size": -1}', "must give a positive hidden_size, got -1"),
        ("[" * 100_000, "--from-model must be a config.json or its folder"),
    ],
    ids=range(6),
)
def test_models_whose_shapes_are_read(text: str, words: str, world: World) -> None:
    """The file is named."""
    from smoa_kernels.tuning.models import read_config

    (world.folder / "config.json").write_text(text)
    check(world, lambda w: read_config(w.folder), ValueError, words)


@needs_cli
@pytest.mark.parametrize("place", ["/nowhere/at/all.json", "FOLDER", "/dev/full"])
@pytest.mark.parametrize("command", ["info", "roofline", "plan"])
def test_results_that_cannot_be_written(
    command: str, place: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed first; no scratch file is left, and a device is still one."""
    out, err = run(f"{command} --json {place}", world, capsys)
    assert place != "/dev/full" or Path(place).is_char_device()
    assert out
    assert err.startswith("smoa-kernels: error: cannot write ")
    assert err.count("\n") == 1


@needs_cli
def test_an_error_that_nobody_foresaw_is_one_line_too(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoa_kernels.cli.roofline.choose_algorithm", lambda *_: {}["key"])
    _, err = run("roofline", world, capsys)
    assert err == "smoa-kernels: error: KeyError: 'key' (not foreseen; smoa-kernels --debug shows where)\n"
