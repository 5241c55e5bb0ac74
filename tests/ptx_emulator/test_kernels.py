"""Every kernel at every configuration that ships for the architecture, in all of its forms and precisions."""

from collections.abc import Callable, Iterator

import pytest
import torch
from problems import relative_error

from smoa_kernels.cost.architectures import facts
from smoa_kernels.definition.precision import KERNEL_PRECISIONS, PRECISIONS
from smoa_kernels.kernels import KERNELS
from smoa_kernels.kernels.spec import Config, Key, Operands

from . import ARCH
from .plugin import SHARE

SIZES = {
    # Several whole tiles along each side; and nothing whole, 3 blocks of 44 rows and 66 columns.
    "aligned": {"blocks": 2, "out_features": 384, "in_features": 512, "tokens": 128},
    "odd": {"blocks": 3, "out_features": 131, "in_features": 197, "tokens": 37},
}
RANKS = {"aligned": 16, "odd": 20}
TILE = 128  # which every shipped tile divides


def key_of(kernel: str, dtype: str, size: str, form: str) -> Key:
    sizes = dict(SIZES[size])
    if transposed := "transposed" in form:
        sizes["out_features"], sizes["in_features"] = sizes["in_features"], sizes["out_features"]

    def padded(side: str) -> int:
        width = -(-sizes[side] // sizes["blocks"])
        return -(-width // TILE) * TILE

    rank = 64 if "r64" in form else RANKS[size]
    widths = {"padded_out": padded("out_features"), "padded_in": padded("in_features")}
    return Key(kernel, dtype, rank, **sizes, **widths, transposed=transposed)


def launches() -> Iterator[object]:
    for kernel in KERNELS.values():
        for dtype in KERNEL_PRECISIONS:
            precision = PRECISIONS[dtype]
            for config in kernel.shipped(facts(f"sm_{ARCH}"), precision):
                for form in kernel.forms:
                    for size in SIZES:
                        numbers = "-".join(str(value) for value in vars(config).values())
                        name = f"{kernel.name}-{dtype}-{numbers}-{form}-{size}".replace(" ", "_")
                        yield pytest.param(kernel.name, dtype, config, form, size, id=name)


def is_defined(kernel: str, form: str) -> bool:
    """Whether a workload says what the result must be: the tuner compares the first form of these."""
    return form == KERNELS[kernel].forms[0] or kernel not in ("permute", "sum_parts")


@pytest.mark.parametrize(("kernel", "dtype", "config", "form", "size"), list(launches()))
def test_shipped(
    kernel: str,
    dtype: str,
    config: Config,
    form: str,
    size: str,
    record_property: Callable[[str, object], None],
) -> None:
    key = key_of(kernel, dtype, size, form)
    if not KERNELS[kernel].fits(config, key):
        pytest.skip("the tile does not divide the padded blocks")
    run, defined = KERNELS[kernel].workload(Operands(key, form, torch.device("cpu")))
    found = run(config)
    if not is_defined(kernel, form):
        return  # the checks of memory are what is left; tests/kernels compare its numbers
    precision = PRECISIONS[dtype]
    for ours, same, truth in zip(found, defined(precision.dtype), defined(torch.float64), strict=True):
        allowed = 2 * relative_error(same, truth) + precision.floor
        share = relative_error(ours, truth) / allowed
        record_property(SHARE, (f"{kernel}, {dtype}", share))
        assert share <= 1
