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
def test_remembered_plans_launch_like_new_ones() -> None:
    """A cached plan launches the same compiled form, grid, sizes and strides, on the same device.

    The cases are sizes of 1, odd sizes and strides, pointers not divisible by 16, two factor dtypes, a
    transposed W0, factors that are slices of others, another rank, and another device.
    """
    found = launches("remembered")
    assert len(set(found["remembered"])) > 50
    assert found["remembered"] == found["new"]


@pytest.mark.slow
def test_hooks_on_launches_are_called_while_there_are_any() -> None:
    """Cached plans call a profiler's launch hooks, with Triton's metadata. Without hooks no metadata is made."""
    found = launches("hooks")
    half = len(found) // 2
    assert found == [[False] * 3] * half + [[True] * 3] * half


@pytest.mark.slow
def test_a_compiled_kernel_is_heard_of_before_it_is_first_launched() -> None:
    """Also where Triton alone specialises it, by the address of x. `backends/verified.py` counts on it."""
    aligned, same, odd, same_odd, again, _ = launches("new_forms")
    for heard, launched in (aligned, odd):
        assert set(launched) - set(aligned[1]) <= set(heard) <= set(launched)
    assert set(aligned[0]) == set(aligned[1])
    assert set(odd[1]) - set(aligned[1]) != set()
    assert [one[0] for one in (same, same_odd, again)] == [[], [], []]


@pytest.mark.slow
def test_without_the_short_way_triton_launches() -> None:
    """If the short way raises, or Triton lacks a private name, Triton launches the same kernels after one warning."""
    found = launches("without_short_way")
    kernels = found["short"][0][0]
    words = {
        "short": "",
        "refused": "wrong numbers",
        "raises": "TypeError: another signature",
        "missing": "has no attribute 'no_function'",
    }
    for case, rounds in found.items():
        assert [launched for launched, _ in rounds] == [kernels] * 3
        told = [message for _, said in rounds for message in said]
        assert [words[case] in message for message in told] == [True] * (case != "short"), told


@pytest.mark.slow
def test_the_first_step_compiles_few_forms() -> None:
    """The layers of Llama-3-8B. Other batch lengths compile no more forms."""
    for counts in launches("first_step").values():
        assert 4 <= counts["forms"] <= 24
        assert counts["more for other lengths"] == 0
