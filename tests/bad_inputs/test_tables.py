"""Bad tables of launch parameters, and models whose shapes cannot be read."""

from dataclasses import replace

import pytest
import torch

from .harness import Call, Row, World, check, rows

pytest.importorskip("triton", reason="tables are of its kernels")

from smoa_kernels.cost.architectures import ARCHITECTURES, occupancy
from smoa_kernels.cost.models import read_config
from smoa_kernels.kernels import store
from smoa_kernels.kernels.entries import Entry, Trial, merged
from smoa_kernels.kernels.heuristic import Key
from smoa_kernels.kernels.identity import (
    Identity,
    identity,
    slug,
    source_hash,
    staleness,
)
from smoa_kernels.kernels.launch import PermuteConfig, architecture, multiprocessors
from smoa_kernels.kernels.lookup import (
    keep,
    known,
    tuned_algorithm,
    tuned_config,
)


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
    (world.folder / "config.json").write_text(text)
    check(world, lambda w: read_config(w.folder), ValueError, words)


CPU = torch.device("cpu")
KEY = Key("forward", "bf16")
GOOD = Entry(KEY, identity(CPU, "forward"), "split")
SM_90 = ARCHITECTURES["sm_90"]

TABLES: list[Row] = [
    (lambda _: read_config("config.json"), TypeError, "path must be a Path, got str"),  # type: ignore[arg-type]
    (lambda w: read_config(w.folder / "list.json"), ValueError, "must give a positive num_attention_heads"),
    (lambda _: store.read(None), TypeError, "path must be a Path, got NoneType"),  # type: ignore[arg-type]
    (
        lambda w: store.read(w.folder / "list.json", set_aside="no"),
        TypeError,
        "set_aside must be a bool, got str",
    ),  # type: ignore[arg-type]
    (lambda _: store.update("table.json", []), TypeError, "path must be a Path, got str"),  # type: ignore[arg-type]
    (
        lambda w: store.update(w.folder / "t.json", None),
        TypeError,
        "entries must be entries of a table, got None",
    ),  # type: ignore[arg-type]
    (lambda w: store.update(w.folder / "t.json", [1.5]), TypeError, "entries must be an Entry, got float"),  # type: ignore[list-item]
    (lambda _: store.shipped_table(None), TypeError, "gpu must be a str, got NoneType"),  # type: ignore[arg-type]
    (lambda _: slug(5), TypeError, "gpu must be a str, got int"),  # type: ignore[arg-type]
    (lambda _: Entry(KEY, None, "split"), TypeError, "identity must be an Identity, got NoneType"),  # type: ignore[arg-type]
    (
        lambda _: Identity("H100", "sm_90", 132.0, "2.13", "3.9", "0"),  # type: ignore[arg-type]
        TypeError,
        "multiprocessors must be an int, got 132.0",
    ),
    (lambda _: store.user_table(None), TypeError, "gpu must be a str, got NoneType"),  # type: ignore[arg-type]
    (lambda _: identity("cpu", "forward"), TypeError, "device must be a torch.device, got str"),  # type: ignore[arg-type]
    (lambda _: identity([], "forward"), TypeError, "device must be a torch.device, got list"),  # type: ignore[arg-type]
    (lambda _: identity(CPU, []), ValueError, r"kernel must be one of modulated_weight, .* got \[\]"),  # type: ignore[arg-type]
    (lambda _: source_hash({}), ValueError, r"kernel must be one of modulated_weight, .* got {}"),  # type: ignore[arg-type]
    (lambda _: source_hash("matmul"), ValueError, "kernel must be one of .* got 'matmul'"),
    (lambda _: staleness([], identity(CPU, "forward")), TypeError, "then must be an Identity, got list"),  # type: ignore[arg-type]
    (
        lambda _: identity(torch.device("meta"), "forward"),
        ValueError,
        "device must be a CUDA or ROCm GPU that this machine has, got 'meta'",
    ),
    (
        lambda _: architecture(torch.device("cuda", 99)),
        ValueError,
        "device must be a CUDA or ROCm GPU .* got 'cuda:99'",
    ),
    (lambda _: architecture([]), TypeError, "device must be a torch.device, got list"),  # type: ignore[arg-type]
    (lambda _: multiprocessors("cpu"), TypeError, "device must be a torch.device, got str"),  # type: ignore[arg-type]
    (lambda _: tuned_algorithm([], CPU, ()), TypeError, "key must be a Key, got list"),  # type: ignore[arg-type]
    (lambda _: tuned_algorithm(KEY, [], ()), TypeError, "device must be a torch.device, got list"),  # type: ignore[arg-type]
    (
        lambda _: tuned_algorithm(KEY._replace(kernel=[]), CPU, ()),
        ValueError,
        r"kernel must be one of .* got \[\]",
    ),
    (lambda _: tuned_algorithm(KEY, CPU, "split"), TypeError, "allowed must be a list of names, got 'split'"),
    (lambda _: tuned_config("permute", CPU), TypeError, "key must be a Key, got str"),  # type: ignore[arg-type]
    (lambda _: tuned_config(KEY._replace(rank=-1), CPU), ValueError, "rank must be at least 0, got -1"),
    (lambda _: tuned_config(KEY._replace(dtype={}), CPU), ValueError, "dtype must be one of bf16, .* got {}"),
    (lambda _: known(KEY._replace(kernel="nope"), CPU), ValueError, "kernel must be one of .* got 'nope'"),
    (lambda _: known(KEY, "cpu"), TypeError, "device must be a torch.device, got str"),  # type: ignore[arg-type]
    (lambda _: keep(None), TypeError, "entry must be an Entry, got NoneType"),  # type: ignore[arg-type]
    (lambda _: replace(identity(CPU, "forward"), torch=2.13), TypeError, "torch must be a str, got float"),
    (
        lambda _: replace(identity(CPU, "forward"), multiprocessors=0),
        ValueError,
        "multiprocessors must be at least 1",
    ),
    (lambda _: replace(GOOD, key=None), TypeError, "key must be a Key, got NoneType"),
    (lambda _: replace(GOOD, identity={}), TypeError, "identity must be an Identity, got dict"),
    (lambda _: replace(GOOD, trials=[]), TypeError, "trials must be a tuple, got list"),
    (lambda _: replace(GOOD, complete=1), TypeError, "complete must be a bool, got int"),
    (lambda _: GOOD.with_trial("split"), TypeError, "trial must be a Trial, got str"),  # type: ignore[arg-type]
    (
        lambda _: merged(GOOD, replace(GOOD, key=Key("forward", "fp16"))),
        ValueError,
        "newer must have the key of older, .*'bf16'.*, got .*'fp16'",
    ),
    (
        lambda _: merged(GOOD, replace(GOOD, identity=replace(GOOD.identity, torch="1.0"))),
        ValueError,
        "newer must have the identity of older, .* got .*torch='1.0'",
    ),
    (lambda _: merged(GOOD, None), TypeError, "newer must be an Entry, got NoneType"),  # type: ignore[arg-type]
    # Such a table would be set aside, with all that it holds, by whoever reads it next.
    (
        lambda w: store.update(w.folder / "t.json", [replace(GOOD, default="fast")]),
        ValueError,
        "default must be one of merged, split, fused, got 'fast'",
    ),
    (
        lambda w: store.update(w.folder / "t.json", [GOOD.with_trial(Trial("split", float("nan")))]),
        ValueError,
        "seconds must be positive and finite, got nan",
    ),
    (lambda _: Trial("split", 10**400), ValueError, "seconds must be positive and finite, got 1000"),
    (lambda _: Trial("split", "1"), ValueError, "seconds must be positive and finite, got '1'"),  # type: ignore[arg-type]
    (lambda _: Trial("split", reason=3), ValueError, "reason must be text, got 3"),  # type: ignore[arg-type]
    (
        lambda w: store.update(w.folder / "t.json", [GOOD.with_trial(Trial(object(), 1.0))]),  # type: ignore[arg-type]
        ValueError,
        "choice must be one of merged, split, fused, got <object",
    ),
    (
        lambda w: store.update(w.folder / "t.json", [replace(GOOD, trials=("split",))]),
        TypeError,
        "trials must be a Trial, got str",
    ),
    (
        lambda _: replace(GOOD, key=Key("permute", "bf16")),
        TypeError,
        "default must be a PermuteConfig, got str",
    ),
    (
        lambda _: replace(GOOD, key=Key("permute", "bf16"), default=PermuteConfig(64, 128, num_warps=3)),
        ValueError,
        "default: num_warps = 3 is no launch parameter of permute",
    ),
    (
        lambda _: occupancy("sm_90", registers=8, shared=8, warps=8),
        TypeError,
        "arch must be an Architecture, got str",
    ),  # type: ignore[arg-type]
    (
        lambda _: occupancy(SM_90, registers=8, shared=None, warps=8),
        TypeError,
        "shared must be an int, got None",
    ),  # type: ignore[arg-type]
    (
        lambda _: occupancy(SM_90, registers=8, shared=8, warps=0),
        ValueError,
        "warps must be at least 1, got 0",
    ),
]


@rows("call", TABLES)
def test_tables(call: Call, error: type[Exception], words: str, world: World) -> None:
    check(world, call, error, words)
