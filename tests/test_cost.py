"""The cost model (smoa_kernels/tuning/estimate.py): totals known beforehand, hand counts, and the choice of `auto`."""

import itertools
from dataclasses import replace

import pytest
import torch
from smoa_kernels.tuning.sectors import GATHER_TILE, STEP, WARP, overfetch, touched

from smoa_kernels.backends.algorithms import admissible, choose_algorithm
from smoa_kernels.definition.precision import KERNEL_PRECISIONS
from smoa_kernels.kernels.architectures import ARCHITECTURES, facts
from smoa_kernels.tuning.counts import WAYS, Pass, Problem, parts
from smoa_kernels.tuning.gpus import GPUS, Gpu, match_gpu
from smoa_kernels.tuning.roofline import LAUNCH_SECONDS, estimate

H100 = GPUS["h100"]
DIRECTIONS = ("forward", "input_gradient")
SQUARE = Problem(tokens=8192, out_features=4096, in_features=4096, num_blocks=4, rank=16)
DOWN = replace(SQUARE, in_features=14336)
CONTIGUOUS = replace(SQUARE, granule=1024)
EIGHT = replace(SQUARE, granule=8)


def device(problem: Problem, algorithm: str, gpu: Gpu = H100) -> float:
    return estimate(problem, gpu, algorithm).device_seconds()


def over_frozen(problem: Problem, algorithm: str) -> float:
    return estimate(problem, H100, algorithm).seconds() / estimate(problem, H100, "frozen").seconds()


def part(problem: Problem, algorithm: str, name: str, stage: str = "forward"):
    (found,) = (p for p in parts(problem, algorithm, H100) if p.name == name and p.stage == stage)
    return found


def test_totals_by_hand():
    """T=8192, 4096², K=4, r=16, bf16 on an H100, in µs; what moves less than 1 % of a pass's bytes is left out."""
    unit, start = 2 * 8192 * 4096**2 / 700e6, 2.3  # a GEMM, a launch
    frozen = 2 * (unit + start)
    x, w = 64 * 2**20 / 2.9e6, 32 * 2**20 / 2.9e6  # a pass over x, or y, and over W0, at a copy's rate
    build, gather, add = 2 * w, 2 * x, x
    # Passes of forward: x·Aᵀ and h·Bᵀ one each, scaling 2, the sum 3; of backward: scaling 2, four products, the sum 3.
    lora = (1 + 1 + 2 + 3) * x + (2 + 4 + 3) * x
    assert over_frozen(SQUARE, "lora") == pytest.approx(1 + (lora + 10 * start) / frozen, rel=2e-3)
    # A block product, of a quarter of a GEMM's flops, moves 2 bytes for each 128 of them through the cache at 9.7 TB/s.
    # At the end a tile of G reads W0 by 8.67 sectors for each 64 bytes, twice; y is stored so.
    product, sectors = unit * 700e6 / 4 / 128 * 2 / 9.7e6, 8.67 * 32 / 64
    grads = product + 2 * sectors * 8 * 2**20 / 9.7e6 + 2 * gather
    grads += (2 * 2 + 1) * start  # two parts of one launch that gathers both and a product; one sums both
    merged = build + grads + build + 2 * start
    assert over_frozen(SQUARE, "merged") == pytest.approx(1 + merged / frozen, rel=2e-3)
    # ΔW's blocks: 98.998 % of W0 in, a quarter out; y is read again by the base GEMM.
    # The block product of 256 tokens by 128 rows reads ΔW half as often.
    forward = (0.98998 + 0.25) * w + gather + 0.75 * product + sectors * 64 * 2**20 / 9.7e6 + add + 3 * start
    split = forward + grads + build + start
    assert over_frozen(SQUARE, "split") == pytest.approx(1 + split / frozen, rel=2e-3)


def test_totals_in_place_by_hand():
    """As above: contiguous blocks gather nothing and waste no sector; of granules of 8, tiles touch more sectors."""
    unit, start, mib = 2 * 8192 * 4096**2 / 700e6, 2.3, 2**20
    frozen = 2 * (unit + start)
    build, add = 64 * mib / 2.9e6, 64 * mib / 2.9e6
    # Rows of 64, 128 and 32 coordinates: 8, 16 and 4 granules, each in another sector than the last with probability
    # 7/8, where 4, 8 and 2 sectors would hold them.
    halves = [(1 + (n - 1) * 7 / 8) * 2 / n for n in (8, 16, 4)]
    for problem, (step, tile, warp) in ((CONTIGUOUS, (1, 1, 1)), (EIGHT, halves)):
        # An operand of a block product is read by 256 of its flops a time; H's blocks of W0 are 8 MiB.
        operand = unit * 700e6 / 4 / 256 * 2 / 9.7e6
        grads = 2 * operand * tile + 8 * mib * warp / 9.7e6 + 2 * start
        merged = build + grads + build + 2 * start
        assert over_frozen(problem, "merged") == pytest.approx(1 + merged / frozen, rel=2e-3)
        blocks = 32 * mib * (0.25 if step == 1 else 0.4375) + 8 * mib
        # ΔW is read once for 256 tokens. Where x's sectors are used whole, the product takes longer than the cache.
        matmul = max(unit / 4, operand * (step + 1 / 2) + 64 * mib * tile / 9.7e6)
        forward = blocks / 2.9e6 + matmul + add + 2 * start
        split = forward + grads + build + start
        assert over_frozen(problem, "split") == pytest.approx(1 + split / frozen, rel=2e-3)


@pytest.mark.parametrize(
    ("problem", "merged", "split", "lora"),
    [
        (SQUARE, 1.35, 1.57, 1.50),
        (replace(SQUARE, num_blocks=8), 1.31, 1.52, 1.50),
        (DOWN, 1.28, 1.47, 1.27),
        (CONTIGUOUS, 1.21, 1.35, 1.50),
        (replace(SQUARE, num_blocks=8, granule=512), 1.14, 1.21, 1.50),
        (replace(DOWN, granule=512), 1.20, 1.32, 1.27),
        (EIGHT, 1.32, 1.51, 1.50),
        (replace(SQUARE, num_blocks=8, granule=8), 1.20, 1.31, 1.50),
        (replace(DOWN, granule=8), 1.31, 1.47, 1.27),
        (replace(SQUARE, granule=16), 1.21, 1.35, 1.50),
    ],
)
def test_published_totals(problem, merged, split, lora):
    """As docs/gpu.md and benchmarks/results/README.md have them."""
    found = [round(over_frozen(problem, way), 2) for way in ("merged", "split", "lora")]
    assert found == [merged, split, lora]


@pytest.mark.parametrize(("blocks", "row", "tile", "warp"), [(4, 0.989, 4.04, 8.7), (8, 0.883, 7.02, 14.6)])
def test_sectors_are_those_that_were_counted(blocks, row, tile, warp):
    """By drawing labels; beside it what was counted of a spectral partition's accesses at 4096², bf16."""
    labels = torch.randint(blocks, (128, 4096), generator=torch.Generator().manual_seed(0)) == 0
    members = [r.nonzero()[:, 0] // 16 for r in labels]  # the sector of each coordinate of block 0

    def distinct(together: int) -> float:
        groups = [m[i : i + together] for m in members for i in range(0, len(m) - together, together)]
        return sum(len(g.unique()) for g in groups) / len(groups)

    drawn = sum(len(m.unique()) for m in members) / len(members) / (4096 / 16)
    assert touched(blocks, 2) == pytest.approx(drawn, rel=5e-3) == pytest.approx(row, rel=5e-3)
    drawn = distinct(GATHER_TILE) * 16 / GATHER_TILE
    assert (
        overfetch(GATHER_TILE, blocks, 2) == pytest.approx(drawn, rel=0.01) == pytest.approx(tile, rel=0.02)
    )
    assert overfetch(WARP, blocks, 2) * WARP / 16 == pytest.approx(distinct(WARP), rel=0.01)
    assert distinct(WARP) == pytest.approx(warp, rel=0.01)


@pytest.mark.parametrize("granule", [2, 8, 16, 24, 40, 1024])
@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_sectors_of_granules(blocks, granule):
    """By drawing the blocks of granules, in 16 bits."""
    count = max(64, 8192 // granule)
    generator = torch.Generator().manual_seed(0)
    mine = torch.randint(blocks, (64, count), generator=generator).repeat_interleave(granule, 1) == 0
    members = [row.nonzero()[:, 0] // 16 for row in mine]
    sectors = sum(len(m.unique()) for m in members)
    assert touched(blocks, 2, granule) == pytest.approx(sectors / (mine.numel() / 16), rel=0.03)
    for whole in (STEP, GATHER_TILE):
        groups = [m[i : i + whole] for m in members for i in range(0, len(m) - whole, whole)]
        drawn = sum(len(group.unique()) for group in groups) / len(groups) * 16 / whole
        assert overfetch(whole, blocks, 2, granule) == pytest.approx(drawn, rel=0.03)


def test_whole_sectors_are_not_wasted():
    """8 coordinates of float32 and 16 of a half type are 32 bytes."""
    for blocks, (itemsize, granule) in itertools.product((2, 4, 8), ((4, 8), (2, 16), (2, 1024), (4, 1024))):
        assert touched(blocks, itemsize, granule) == pytest.approx(1 / blocks)
        for together in (WARP, STEP, GATHER_TILE):
            assert overfetch(together, blocks, itemsize, granule) == pytest.approx(1)
    assert overfetch(GATHER_TILE, 1 << 16, 2, 8) == pytest.approx(2, rel=1e-3)  # alone, each is half a sector


def test_one_block_scatters_nothing():
    for together, itemsize in itertools.product((1, WARP, GATHER_TILE), (2, 4, 8)):
        assert overfetch(together, 1, itemsize) == 1 == touched(1, itemsize)


def test_flop_floors():
    """Without memory traffic: 1 + 1/(2K) merged, 1 + 1/K split."""
    infinite = replace(H100, memory_tbps=1e9, cache_tbps=1e9)
    for blocks in (1, 2, 4, 8):
        p = replace(SQUARE, tokens=1 << 20, num_blocks=blocks)
        frozen = device(p, "frozen", infinite)
        assert device(p, "merged", infinite) / frozen == pytest.approx(1 + 1 / (2 * blocks), rel=1e-3)
        assert device(p, "split", infinite) / frozen == pytest.approx(1 + 1 / blocks, rel=1e-3)
        assert device(p, "hira", infinite) / frozen == pytest.approx(2.5, rel=1e-3)


def test_launches():
    """Those that a profiler counts at T=256; a bias costs split a pass of its own, and the others nothing."""
    ways = ("frozen", "lora", "merged", "split", "fused")
    p, q = (replace(found, tokens=256) for found in (SQUARE, CONTIGUOUS))
    stages: tuple[Pass, ...] = ("forward", "backward")
    found, in_place = (
        [[estimate(of, H100, way).launches(s) for s in stages] for way in ways] for of in (p, q)
    )
    assert found == [[1, 1], [5, 7], [2, 5], [4, 5], [1, 4]]
    assert in_place == [[1, 1], [5, 7], [2, 4], [3, 4], [1, 3]]
    for way in WAYS:
        plain, biased = (estimate(replace(p, bias=bias), H100, way) for bias in (False, True))
        extra = (1, 2 * 2 * 256 * 4096) if way == "split" else (0, 0)
        assert (biased.launches() - plain.launches(), biased.bytes() - plain.bytes()) == extra


def test_a_pass_takes_the_longer_of_host_and_device():
    few, many = estimate(replace(SQUARE, tokens=64), H100, "lora"), estimate(SQUARE, H100, "lora")
    assert few.seconds() == few.host_seconds() == pytest.approx(12 * LAUNCH_SECONDS)
    assert many.seconds() == pytest.approx(many.device_seconds())
    assert many.device_seconds() > many.host_seconds()
    # The forward of HiRA keeps the device busy at fewer tokens than its backward.
    hira = estimate(replace(SQUARE, tokens=256), H100, "hira")
    assert hira.seconds("forward") == hira.device_seconds("forward")
    assert hira.seconds("backward") == hira.host_seconds("backward")
    assert hira.seconds() == hira.seconds("forward") + hira.seconds("backward")


def test_frozen_is_two_units():
    e = estimate(SQUARE, H100, "frozen")
    assert e.flops("forward") == 2 * 8192 * 4096 * 4096 == e.flops("backward")
    assert e.seconds() == pytest.approx(2 * (2 * 8192 * 4096 * 4096 / 700e12 + 2.3e-6))


def test_bytes_counted_by_hand():
    """T=8, N=6, C=4, K=1, r=2 in float32, each pass written out."""
    p = Problem(8, 6, 4, 1, 2, torch.float32)
    size, x, y, w = 4, 8 * 4, 8 * 6, 6 * 4
    assert part(p, "frozen", "base GEMM").bytes == size * (x + w + y)
    assert part(p, "merged", "build W_eff").bytes == size * (2 * w + 2 * (6 + 4))
    assert part(p, "lora", "h = x·Aᵀ").bytes == size * (x + 2 * 4 + 8 * 2)
    assert part(p, "lora", "scale").bytes == size * 2 * y
    assert part(p, "lora", "add to y").bytes == size * 3 * y
    assert part(p, "lora", "add to dX", "backward").bytes == size * 3 * x
    assert part(p, "hira", "W0 ∘ BA").bytes == size * 3 * w
    assert part(p, "split", "y, read to accumulate").bytes == size * y
    # gathers read what is there and write the padded layout: one block of 4 columns padded to 64
    assert part(p, "split", "gather x").bytes == size * (x + 8 * 64)


def test_bytes_in_place_by_hand():
    """T=8, N=32, C=16, K=2, ρ=1: blocks of 16 rows and 8 columns, which are padded to 64 where they are copied."""
    p = Problem(8, 32, 16, 2, 2, torch.float32, granule=8)
    size, x, y, blocks, factors = 4, 8 * 16, 8 * 32, 2 * 16 * 8, 32 + 16
    copied = replace(p, granule=1)
    assert part(copied, "split", "gather x").bytes == size * (x + 8 * 2 * 64)
    assert part(copied, "split", "block matmul").bytes == size * (8 * 2 * 64 + blocks + y)
    assert [q.name for q in parts(p, "split", H100) if q.stage == "forward"] == [
        "build ΔW blocks",
        "block matmul",
        "base GEMM",
        "y, read to accumulate",
    ]
    assert part(p, "split", "build ΔW blocks").bytes == size * (2 * blocks + factors)
    assert part(p, "split", "block matmul").bytes == size * (x + blocks + y)
    assert part(p, "split", "block matmul").cache_bytes == size * (x + blocks + y)  # one tile, not full
    # Two products of 2·8·16·8 operations, one operand for each 256 of them; then W0's blocks.
    operands = 2 * (2 * 2 * 8 * 16 * 8 // 256)
    partials = 4 * 4 * (32 + 16)  # float32, 4 ranks of padding, one tile on each side
    found = part(p, "split", "block gradients", "backward")
    assert found.bytes == size * (x + y + blocks + factors) + partials
    assert found.cache_bytes == size * (operands + blocks) + partials
    # In 16 bits 8 coordinates are half a sector. One block's hold 1 - (1/2)² of all sectors, one and a half times
    # what it needs, and x and dY move so for each block.
    half = replace(p, dtype=torch.bfloat16)
    found = part(half, "split", "block gradients", "backward")
    assert found.bytes == 2 * 1.5 * (x + y + blocks) + 2 * factors + partials
    assert part(half, "split", "block matmul").bytes == 2 * (x + blocks + y)


def test_what_contiguous_blocks_save_of_a_split():
    """Forward: x is not read and written again, W0's blocks are a quarter of it. Backward: the same of x and dY."""
    x = SQUARE.tokens * SQUARE.in_features
    scattered, whole = (estimate(p, H100, "split") for p in (SQUARE, CONTIGUOUS))
    w = SQUARE.weight_elements
    moved = w * (touched(4, 2) - 1 / 4)
    assert scattered.bytes("forward") - whole.bytes("forward") == pytest.approx(2 * (2 * x + moved), rel=1e-6)
    factors, partials = 4 * 2 * 4096, 4 * 4 * 2 * 4096 * 8
    parts_again = touched(4, 2) * w + factors  # W0 and the factors, for the tokens came in two parts
    saved = 2 * (4 * x + moved + parts_again) + 2 * partials
    assert scattered.bytes("backward") - whole.bytes("backward") == pytest.approx(saved, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "in_place"),
    [
        ({"granule": 8}, True),
        ({"granule": 24}, True),
        ({"granule": 4}, False),
        ({"granule": 12}, False),
        ({"granule": 8, "out_features": 4100}, False),
        ({"granule": 8, "in_features": 4100}, False),
        ({"num_blocks": 1, "in_features": 4000}, True),
        ({"num_blocks": 1, "in_features": 4004}, False),
    ],
    ids=str,
)
def test_what_is_read_in_place(change, in_place):
    p = replace(SQUARE, **change)
    assert p.in_place == in_place
    for way in ("merged", "split"):
        assert in_place != any(q.name.startswith("gather") for q in parts(p, way, H100))


def test_dropout_copies_x_whatever_the_blocks_are():
    """And dX goes by block order; dY is not copied."""
    names = [q.name for q in parts(replace(CONTIGUOUS, dropout=0.1), "split", H100)]
    assert names == [
        "build ΔW blocks",
        "gather x",
        "block matmul",
        "base GEMM",
        "y, read to accumulate",
        "gather x",
        "block gradients",
        "sum partials",
        "build ΔW blocks",
        "block matmul of dX",
        "scatter dX, dropout",
        "dX = dY·W",
        "dX, read to accumulate",
    ]
    dry, wet = (part(replace(EIGHT, dropout=d), "split", "block matmul") for d in (0.0, 0.1))
    assert wet.cache_bytes < dry.cache_bytes  # which reads the copy


def test_peers_pay_for_dropout_and_ours_for_a_split_dx():
    for algorithm, stage in itertools.product(("lora", "hira", "paper_dense"), ("forward", "backward")):
        dry, wet = (estimate(replace(SQUARE, dropout=d), H100, algorithm) for d in (0.0, 0.05))
        x = SQUARE.tokens * SQUARE.in_features
        assert wet.bytes(stage) - dry.bytes(stage) == x * (2 + 2 + 1)  # bf16 in and out, a byte of mask
    dry, wet = (estimate(replace(SQUARE, dropout=d), H100, "split") for d in (0.0, 0.05))
    assert wet.seconds("forward") == dry.seconds("forward")
    assert wet.seconds("backward") > dry.seconds("backward")


def test_cost_grows_with_tokens_and_rank():
    for algorithm in WAYS:
        costs = [device(replace(SQUARE, tokens=t), algorithm) for t in (0, 1, 64, 1024, 8192)]
        assert costs == sorted(costs)
        assert costs[0] < costs[-1]
    for algorithm in ("lora", "hira", "paper_dense", "merged", "split", "fused", "expanded"):
        low, high = (estimate(replace(SQUARE, rank=r), H100, algorithm).bytes() for r in (16, 64))
        assert low < high, algorithm


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_999"])
@pytest.mark.parametrize("dtype", KERNEL_PRECISIONS)
def test_auto_never_rounds_the_forwards_weight(arch, dtype):
    for tokens, rank in itertools.product((0, 1, 16, 100, 8192, 1 << 17), (1, 16, 256)):
        for stage in DIRECTIONS:
            assert choose_algorithm(stage, tokens, rank, dtype, arch) in admissible(stage, dtype)
    many = [choose_algorithm(stage, 8192, 4, dtype, arch) for stage in DIRECTIONS]
    assert many == ["merged" if dtype == "fp32" else "split", "merged"]


@pytest.mark.parametrize(
    ("dtype", "limits", "rank"), [("bf16", (64, 128), 64), ("tf32", (32, 64), 64), ("fp32", (16, 32), 16)]
)
def test_few_tokens_are_fused(dtype, limits, rank):
    """On an A100 and an RTX 4090; a rank that would read W0 twice is not."""
    for arch, limit in zip(("sm_80", "sm_89"), limits, strict=True):
        for stage in DIRECTIONS:
            assert choose_algorithm(stage, limit, rank, dtype, arch) == "fused"
            assert choose_algorithm(stage, limit + 1, rank, dtype, arch) != "fused"
            assert choose_algorithm(stage, 1, rank + 1, dtype, arch) != "fused"


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_the_roofline_justifies_fused(gpu):
    """Up to the limit it is predicted to take at most a fifth longer than what else would run, in 4096² and bf16."""
    limit = facts(gpu.arch).fused_tokens
    for tokens in {1, 16, limit}:
        p = replace(SQUARE, tokens=tokens)
        for stage, other in (("forward", "split"), ("backward", "merged")):
            fused, many = (estimate(p, gpu, way).device_seconds(stage) for way in ("fused", other))
            assert fused <= 1.2 * many, (tokens, stage)


def test_one_block_that_fills_its_tiles_is_not_gathered():
    p = Problem(8192, 4096, 4096, 1, 16)
    assert not [q for q in parts(p, "split", H100) if q.name.startswith("gather")]
    wet = [q.name for q in parts(replace(p, dropout=0.1), "split", H100) if q.name.startswith("gather")]
    assert wet == ["gather x", "gather x"]  # the mask makes it a copy
    assert [q for q in parts(replace(p, in_features=4004), "split", H100) if q.name == "gather x"]


def test_match_gpu():
    assert match_gpu("NVIDIA H100 80GB HBM3", (9, 0), 132) is GPUS["h100"]
    assert match_gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108) is GPUS["a100"]
    assert match_gpu("NVIDIA GeForce RTX 4090", (8, 9), 128) is GPUS["rtx4090"]
    assert match_gpu("AMD Instinct MI300X", None, 304) is GPUS["mi300x"]
    small = match_gpu("NVIDIA RTX A4000", (8, 6), 42)
    assert small.arch == "sm_86"
    assert small.memory_tbps == pytest.approx(GPUS["a40"].memory_tbps / 2)
    unseen = match_gpu("NVIDIA X999", (13, 0), 200)
    assert unseen.arch == "sm_120"
    slice_ = match_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 16)
    assert slice_.matmul_tflops["bf16"] < 100


def test_no_tokens():
    empty = replace(SQUARE, tokens=0)
    assert estimate(empty, H100, "frozen").flops() == 0
