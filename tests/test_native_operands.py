"""Operands of compiled code: every layout and kind, and invalid ones, which it refuses."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compiled import FORMS, each_dtype, each_form, needs_library, on_cpu
from expert_problems import make_problem as make_experts
from problems import HALF, Case, LinearProblem, assert_within_budget
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from smoa_kernels import BlockPartition
from smoa_kernels.backends import load_backend

# Strides of a W0 with shared memory.
SHARING = ((0, 1), (1, 0), (0, 0), (1, 1))


@needs_library
@pytest.mark.parametrize(
    ("dtype", "strides", "form"),
    [
        (dtype, strides, form)  # a subset of the combinations, none repeated
        for turn, dtype in enumerate((torch.float32, *HALF))
        for strides, form in zip(SHARING, [*FORMS, *FORMS][turn : turn + 4], strict=True)
    ],
)
def test_weights_whose_elements_share_memory(
    dtype: torch.dtype, strides: tuple[int, int], form: str, in_float32: None
) -> None:
    """When torch copies a broadcast matrix or overlapping windows, it chooses the layout of the copy.

    The form for few tokens follows that layout, not the original's.
    """
    for tokens, case in ((1, Case("native", "auto", dtype)), (40, replace(FORMS[form], dtype=dtype))):
        p = on_cpu(dtype, tokens=tokens, ranks=(2, 3))
        p = replace(p, weight=p.weight.as_strided(p.weight.shape, strides))
        assert_within_budget(p.run(**case.options), case, p)


@needs_library
@each_form
def test_factors_of_a_dtype_that_it_does_not_read(form: str) -> None:
    """Under autocast factors may have any dtype: torch's operators take over."""
    p, case = on_cpu(tokens=40), FORMS[form]
    cast = p.to(torch.bfloat16)
    wide = replace(p.to(torch.float32, torch.float64), dy=cast.dy)
    found = wide.run(autocast=torch.bfloat16, **case.options)
    assert [one.dtype for one in found[2:4]] == [torch.float64] * 2
    rounded = tuple(one.to(torch.bfloat16) for one in found)
    assert_within_budget(rounded, replace(case, dtype=torch.bfloat16), cast)


@needs_library
@each_dtype
@pytest.mark.parametrize("columns", [64, 2048])
def test_an_x_whose_strides_are_both_one(columns: int, dtype: torch.dtype) -> None:
    """Windows of a vector. Its strides do not say which way it lies, and under dropout a mask goes along its rows."""
    case = replace(FORMS["dropout"], dtype=dtype)
    p = on_cpu(dtype, tokens=33, out_features=40, in_features=columns, ranks=(2, 3), block_order="contiguous")
    p = replace(p, x=torch.randn(columns + 32).to(dtype).unfold(0, columns, 1))
    assert p.x.stride() == (1, 1)
    assert_within_budget(p.run(**case.options), case, p)


@needs_library
@pytest.mark.parametrize("name", ["x", "weight", "A", "B", "bias", "dy"])
def test_an_operand_whose_memory_was_freed(name: str) -> None:
    """As FSDP frees a weight between its uses. Views of it have addresses all the same."""
    p = on_cpu(tokens=40)
    operand = getattr(p, name)
    leaves = replace(p.leaves("x", "A", "B"), **{name: torch.cat([operand] * 2)[len(operand) :]})
    getattr(leaves, name).untyped_storage().resize_(0)
    adapter, module = leaves.adapter(), load_backend("native")
    call = {"dy": lambda: module.backward(leaves.dy, p.x, adapter, None, needs_x=True)}.get(
        name, lambda: module.forward(leaves.x, leaves.bias, adapter, "auto", None)
    )
    with pytest.raises(RuntimeError, match=rf"^{name} \(.*\) has no memory: its storage was freed$"):
        call()


def in_backend(name: str, p: LinearProblem, form: str) -> list[tuple[Tensor, ...] | type]:
    """The results of a backend's `forward` and `backward`, or the types of their errors."""
    dropout = FORMS[form].dropout
    adapter = p.adapter()
    module = load_backend(name)
    calls = (
        lambda: (module.forward(p.x, None, adapter, "split" if dropout else form, dropout),),
        lambda: module.backward(p.dy, p.x, adapter, dropout, needs_x=True),
    )
    found: list[tuple[Tensor, ...] | type] = []
    for call in calls:
        try:
            found.append(call())
        except (RuntimeError, IndexError) as error:
            found.append(type(error))
    return found


def another(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 else torch.bfloat16


CHANGES: dict[str, Callable[[LinearProblem], LinearProblem]] = {
    "float64": lambda p: p.to(torch.float64),
    "x": lambda p: replace(p, x=p.x[:, :-9]),
    "A": lambda p: replace(p, A=p.A[:, :-9]),
    "B": lambda p: replace(p, B=p.B[:-9]),
    "dy": lambda p: replace(p, dy=p.dy[:, :-9]),
    "fewer dy": lambda p: replace(p, dy=p.dy[:-9]),
    "dtype of x": lambda p: replace(p, x=p.x.to(another(p.x.dtype))),
    "dtype of B": lambda p: replace(p, B=p.B.to(another(p.B.dtype))),
}


@needs_library
@each_dtype
@each_form
@pytest.mark.parametrize("change", CHANGES)
def test_eager_takes_the_other_operands(change: str, form: str, dtype: torch.dtype) -> None:
    """An exported program fixes its backend for any input, and compiled code would read past the end of these."""
    p = CHANGES[change](on_cpu(dtype, tokens=50))
    found, expected = in_backend("native", p, form), in_backend("eager", p, form)
    first = 1 if change.endswith("dy") else 0  # the forward does not take dy
    for ours, reference in zip(found[first:], expected[first:], strict=True):
        assert ours is reference if isinstance(reference, type) else all(map(torch.equal, ours, reference))
    assert any(isinstance(one, type) for one in found) or change.startswith(("float64", "dtype"))


@needs_library
@each_dtype
@each_form
def test_indices_of_any_kind(form: str, dtype: torch.dtype) -> None:
    """The kernels need contiguous indices, as a partition makes them; compiled code copies others."""
    p = on_cpu(dtype, tokens=50, random_labels=True)
    labels, indices = p.partition.tensors()[:2], p.partition.tensors()[2:]
    strided = [torch.stack([index, index], 1)[:, 0] for index in indices]
    other = BlockPartition.from_tensors([*(one.long() for one in labels), *strided], p.partition.sizes())
    options = FORMS[form].options
    assert all(map(torch.equal, replace(p, partition=other).run(**options), p.run(**options)))


@needs_library
@each_dtype
@each_form
def test_sizes_that_the_blocks_do_not_have(
    form: str, dtype: torch.dtype, guarded_memory: None, in_float32: None
) -> None:
    """`from_tensors` does not check the sizes; compiled code uses the offsets, and its callers must too."""
    p = on_cpu(dtype, tokens=40, out_features=300, in_features=600, ranks=(2, 3))
    sizes, options = [100, 200, 350, 250, *p.partition.sizes()[4:]], FORMS[form].options
    other = BlockPartition.from_tensors(p.partition.tensors(), sizes)
    assert all(map(torch.equal, replace(p, partition=other).run(**options), p.run(**options)))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_form
@pytest.mark.parametrize("value", [-1, 90, 2**31])
@pytest.mark.parametrize("which", range(2, 6), ids=["row_index", "col_index", "row_offsets", "col_offsets"])
def test_a_partition_that_is_broken(
    which: int, value: int, form: str, dtype: torch.dtype, in_float32: None
) -> None:
    """`from_tensors` checks very little, and compiled code would follow bad indices anywhere."""
    p = on_cpu(dtype, tokens=50)
    ways = [lambda t: t.long().index_fill(0, torch.tensor([2]), value), lambda t: t[:-1]]
    if which in (2, 3):  # one index twice, another missing
        ways.append(lambda t: t.index_copy(0, torch.tensor([5]), t[6:7]))
    for broken in ways:
        tensors = p.partition.tensors()
        tensors[which] = broken(tensors[which])
        if len(tensors[-1]) == len(p.ranks):
            with pytest.raises(ValueError, match="a partition is 6 tensors and 2K"):
                BlockPartition.from_tensors(tensors, p.partition.sizes())
            continue
        broken_one = replace(p, partition=BlockPartition.from_tensors(tensors, p.partition.sizes()))
        for call in (broken_one.run, broken_one.forward):
            with pytest.raises(ValueError, match="partition must"):
                call(**FORMS[form].options)


@needs_library
def test_saved_tensors_that_hooks_give_back_otherwise() -> None:
    """Hooks return a tensor subclass without memory, which compiled code cannot read; torch's dispatcher handles it."""
    p = on_cpu(torch.bfloat16, tokens=50)
    leaves, expected = p.leaves("x", "A", "B"), p.run(backend="native")

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return TwoTensor(tensor, tensor) if tensor.shape == p.x.shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
        y = leaves.forward(backend="native")
    y.backward(p.dy)
    for name, gradient in zip(("x", "A", "B"), expected[1:], strict=False):
        found = getattr(leaves, name).grad
        torch.testing.assert_close(found.a if isinstance(found, TwoTensor) else found, gradient)


@needs_library
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("blocks", ["shared", "own"])
def test_indices_of_experts_may_have_any_width(blocks: str, dtype: torch.dtype) -> None:
    """They are int16 up to 32,768 rows or columns; compiled code widens those of one expert at a time."""
    p = make_experts(pairs=(3, 0, 20, 1), blocks=blocks, dtype=torch.float32)
    old = p.adapter.blocks
    assert old.row_index is not None
    assert old.col_index is not None
    wide = replace(old, row_index=old.row_index.to(dtype), col_index=old.col_index.to(dtype))
    found = replace(p, adapter=replace(p.adapter, blocks=wide)).operator("native")
    assert all(map(torch.equal, p.operator("native"), found))
