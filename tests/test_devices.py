"""GPUs that this machine lacks: real code, with made-up answers from the driver."""

import importlib.util
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

from smoa_kernels import backends
from smoa_kernels.kernels.architectures import architecture, gpu_properties, multiprocessors

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
)
MI300X = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, multi_processor_count=304)
MI300X.gcnArchName = "gfx942:sramecc+:xnack-"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch):
    """Pretend that the machine has this GPU."""

    def put(properties: SimpleNamespace, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "hip", hip)

    return put


def test_the_architecture_as_the_compiler_spells_it(here) -> None:
    here(H100)
    assert architecture.__wrapped__(GPU) == "sm_90"
    assert multiprocessors.__wrapped__(GPU) == 132
    here(MI300X, hip="6.4")
    assert architecture.__wrapped__(GPU) == "gfx942"


def test_float32_products_on_amd_are_ieee(here) -> None:
    common = pytest.importorskip("smoa_kernels.kernels.common", reason="needs triton", exc_type=ImportError)
    here(H100)
    assert common.input_precision(torch.float32, allow_tf32=True) == "tf32"
    here(MI300X, hip="6.4")
    assert common.input_precision(torch.float32, allow_tf32=True) == "ieee"


OLD = "the GPU's compute capability is 7.5, the oldest supported is 8.0"
RDNA = "the GPU is {}, of AMD's the kernels run on gfx90a, gfx942, gfx950"  # there a kernel spills 6,880 bytes a thread


@pytest.mark.parametrize(
    ("device", "gpu", "expected"),
    [
        *(
            (name, None, f"x is on {name}, the kernels are compiled for CUDA and ROCm only")
            for name in ("mps", "xpu")
        ),
        *(
            ("cuda:0", capability, why)
            for capability, why in (((7, 5), OLD), ((8, 0), None), ((12, 0), None))
        ),
        *(("cuda:0", name, None) for name in ("gfx90a", "gfx942", "gfx950")),
        *(("cuda:0", name, RDNA.format(name)) for name in ("gfx1100", "gfx908")),
    ],
)
def test_which_devices_run_the_kernels(here, device: str, gpu: object, expected: str | None) -> None:
    pytest.importorskip("triton", reason="needs triton")
    if isinstance(gpu, str):
        here(SimpleNamespace(**vars(MI300X) | {"gcnArchName": f"{gpu}:xnack-"}), hip="6.4")
    elif gpu is not None:
        here(SimpleNamespace(major=gpu[0], minor=gpu[1]))
    why = backends._device_unsupported_reason.__wrapped__(torch.device(device))
    assert why == expected
    if gpu is None:
        assert backends.resolve_backend("auto", torch.device(device), torch.float32, 8) == "eager"


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cached of a device, and nobody was warned."""
    monkeypatch.setattr(backends, "_warned", [])
    for answers in (backends.miscompiled_on, backends._device_unsupported_reason):
        monkeypatch.setattr(backends, answers.__name__, answers.__wrapped__)


@pytest.mark.usefixtures("nothing_known")
def test_auto_warns_once_why_a_gpu_runs_no_kernels(here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a graph; not of what the kernels never take, nor of a GPU that is not here."""
    triton = pytest.importorskip("triton", reason="needs triton")
    here(SimpleNamespace(major=10, minor=0))
    monkeypatch.setattr(triton, "__version__", "3.7.0")

    def resolved(
        x: torch.Tensor, device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16, rank: int = 8
    ):
        return x + ["eager"].index(backends.resolve_backend("auto", device, dtype, rank))

    x = torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved(x, dtype=torch.float64)
        resolved(x, rank=300)
        resolved(x, torch.device("cuda", 1))
        resolved(x, torch.device("xpu"))
    # The compiler would ask for its random state.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    graph = torch.compile(resolved, backend="eager", fullgraph=True)
    with pytest.warns(
        UserWarning, match="leaves out a fence on Blackwell.*: update it to 3.7.1 or newer"
    ) as warned:
        assert [call(x) for call in (graph, graph, resolved)] == [x, x, x]
    assert len(warned) == 1


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    ("properties", "version", "words"),
    [
        (H100, None, "on cuda:0: triton is not installed: install 3.6 or newer"),
        (H100, "3.5.0", "triton 3.5.0 is older than 3.6, the oldest supported: update it"),
        (H100, "3.6.0", "compiles TF32 for Hopper wrongly .*: update it to 3.9 or newer"),
        (SimpleNamespace(major=7, minor=5), "3.9.0", "compute capability is 7.5"),
    ],
)
def test_the_warning_says_what_to_install(here, monkeypatch, properties, version, words) -> None:
    triton = pytest.importorskip("triton", reason="needs triton")
    here(properties)
    monkeypatch.setattr(backends, "gemm_is_ieee", lambda dtype, device_type: False)
    if version is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(triton, "__version__", version)
    with pytest.warns(UserWarning, match=words):
        assert backends.resolve_backend("auto", GPU, torch.float32, 8) == "eager"


def test_info_names_the_device(here, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer", reason="needs the cli extra")
    triton = pytest.importorskip("triton", reason="needs triton")
    from smoa_kernels.cli import info

    here(H100)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(info, "miscompiled_on", backends.miscompiled_on.__wrapped__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(info, "triton_unsupported_reason", lambda device: f"asked of {device}")
    said, wrong = info._devices()["cuda:0"].split("; ")
    assert said == "NVIDIA H100 80GB HBM3, capability 9.0, 132 multiprocessors, 80 GiB"
    assert wrong.startswith("triton 3.6.0 compiles TF32 for Hopper wrongly")
    assert info.backends()["triton"] == "asked of cuda:0"


def test_a_driver_that_does_not_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(device: torch.device) -> object:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "get_device_properties", silent)
    with pytest.raises(ValueError, match=r"that this machine has, got 'cuda:0': AssertionError$"):
        gpu_properties(GPU)
    pytest.importorskip("triton", reason="needs triton")
    why = backends._device_unsupported_reason.__wrapped__(GPU)
    assert why == "x is on cuda:0, which this machine does not have: AssertionError"


HOPPER, BLACKWELL, THOR, GEFORCE = (9, 0), (10, 3), (11, 0), (12, 0)
TF32, FENCE = "compiles TF32 for Hopper wrongly", "leaves out a fence on Blackwell"


@pytest.mark.parametrize(
    ("capability", "version", "in_tf32", "in_bf16"),
    [
        (HOPPER, "3.8.0", TF32 + ".*3.9 or newer", None),
        (HOPPER, "3.9.0", None, None),
        (BLACKWELL, "3.6.0", FENCE, FENCE),
        (BLACKWELL, "3.7.0+git1234567", FENCE, FENCE + ".*update it to 3.7.1 or newer"),
        (BLACKWELL, "3.7.1.dev20260401", FENCE, FENCE),
        (BLACKWELL, "3.7.1", None, None),
        (THOR, "3.6.0", FENCE, FENCE),
        (BLACKWELL, "3.10.0", None, None),
        (GEFORCE, "3.6.0", None, None),
    ],
)
def test_a_triton_that_compiles_wrong_code_for_a_gpu_is_refused(
    here, nothing_known, monkeypatch, capability, version, in_tf32, in_bf16
) -> None:
    triton = pytest.importorskip("triton", reason="needs triton")
    here(SimpleNamespace(major=capability[0], minor=capability[1]))
    monkeypatch.setattr(triton, "__version__", version)
    for ieee, dtype, expected in (
        (False, torch.float32, in_tf32),
        (False, torch.bfloat16, in_bf16),
        (True, torch.float32, in_bf16),
    ):
        monkeypatch.setattr(backends, "gemm_is_ieee", lambda dtype, device_type, ieee=ieee: ieee)
        found = backends.triton_unsupported_reason(GPU, dtype)
        assert found is None if expected is None else re.search(expected, str(found)), (ieee, dtype)


def test_amd_numbers_its_gpus_otherwise(here, monkeypatch) -> None:
    """An MI300X, with capability 9.4, in TF32."""
    pytest.importorskip("triton", reason="needs triton")
    here(MI300X, hip="6.4")
    monkeypatch.setattr(backends, "gemm_is_ieee", lambda dtype, device_type: False)
    assert backends._compiler_unsupported_reason(GPU, torch.float32) is None


def test_a_gpu_that_is_not_here_is_an_unsupported_reason() -> None:
    """A device index beyond the machine's GPUs, as a fake tensor may have, selects the eager backend."""
    pytest.importorskip("triton", reason="needs triton")
    absent = torch.device("cuda", 99)
    why = backends.triton_unsupported_reason(absent)
    assert str(why).startswith("x is on cuda:99, which this machine does not have: ")
    assert backends.resolve_backend("auto", absent, torch.float32, 8) == "eager"
