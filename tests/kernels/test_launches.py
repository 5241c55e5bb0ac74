"""The device and the compiled forms of launches, on simulated GPUs (tests/launches.py)."""

import json
from typing import Any

import pytest
from places import ran

pytest.importorskip("triton", reason="needs triton")


def launches(what: str) -> Any:
    done = ran("-m", "launches", what, TRITON_INTERPRET=None, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_launch_is_on_its_operands_device() -> None:
    """A layer on cuda:1 while cuda:0 is current, as under `device_map="auto"`."""
    found = launches("devices")
    assert {launch["kernel"] for launch in found if launch["pass"] == "tuning"} == {"modulated_weight_kernel"}
    assert len({launch["pass"] for launch in found}) == 11  # each pass has a launch
    wrong = [launch for launch in found if (launch["device"], launch["stream"]) != (1, 101)]
    assert wrong == []


@pytest.mark.slow
def test_sizes_compile_no_forms_of_their_own() -> None:
    """Two models' layers at 1 to 8192 tokens compile only the forms that the launchers choose.

    A form takes 0.7 to 3.2 s to compile. The launchers choose tiles, how each algorithm reads W0, and the like. Triton
    adds a form for each integer argument that is 1 or divisible by 16. In these models every size and stride that
    Triton may specialise is always a multiple of 16 or always 1.
    """
    for model, kernels in launches("forms").items():
        extra = {kernel: forms for kernel, forms in kernels.items() if forms[0] != forms[1]}
        assert extra == {}, model


@pytest.mark.slow
def test_cached_plans_launch_like_new_plans() -> None:
    """A cached plan launches the same compiled form, grid, sizes and strides, on the same device.

    The cases are sizes of 1, odd sizes and strides, pointers not divisible by 16, two factor dtypes, a
    transposed W0, factors that are slices of others, another rank, and another device.
    """
    found = launches("cached_plans")
    assert len(set(found["cached"])) > 50
    assert found["cached"] == found["new"]


@pytest.mark.slow
def test_memory_beyond_2_gib_is_addressed_in_64_bits_on_amd() -> None:
    """Triton compiles 32-bit offsets where a tensor's memory has less than 2 GiB, whatever the tokens and strides."""
    small, of_x, of_weight, again = map(set, launches("beyond_2_gib"))
    assert small == again
    assert [bool(large - small) for large in (of_x, of_weight)] == [True, True]


@pytest.mark.slow
def test_hooks_on_launches_are_called() -> None:
    """Launches of cached plans pass a profiler's hooks, with Triton's metadata."""
    found = launches("hooks")
    assert found == [[True] * 3] * len(found) != []


@pytest.mark.slow
def test_any_number_of_tokens_in_a_bucket_is_launched_directly() -> None:
    """Without Triton's binding of arguments, which takes longer than the rest of a launch."""
    found = launches("buckets")
    assert {name for name, asked in found.items() if asked[0]} >= {"merged", "fused", "dropout", "experts"}
    assert {name: asked[1:4] for name, asked in found.items()} == {name: [0, 0, 0] for name in found}


@pytest.mark.slow
def test_a_hook_sees_a_compiled_kernel_before_its_first_launch() -> None:
    """Also where Triton alone specialises it, by the address of x. `backends/verified.py` counts on it."""
    aligned, same, odd, same_odd, realigned, _ = launches("new_forms")
    for hooked, launched in (aligned, odd):
        assert set(launched) - set(aligned[1]) <= set(hooked) <= set(launched)
    assert set(aligned[0]) == set(aligned[1])
    assert set(odd[1]) - set(aligned[1]) != set()
    assert [hooked for hooked, _ in (same, same_odd, realigned)] == [[], [], []]


@pytest.mark.slow
def test_the_first_step_compiles_few_forms() -> None:
    """The layers of Llama-3-8B. Other batch lengths compile no more forms."""
    for forms, more in launches("first_step").values():
        assert 4 <= forms <= 24
        assert more == 0


@pytest.mark.slow
def test_the_tuner_compiles_its_candidates_ahead() -> None:
    """Two of a key, from their launches on operands without data."""
    assert launches("ahead") == [2, 1, 2]
