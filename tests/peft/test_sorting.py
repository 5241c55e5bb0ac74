"""Several weights are sorted in parallel, with the same results."""

import gc
import threading
import time
import weakref

import pytest
import torch
from adapted import adapt, config, layers
from peft import get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from tiny_experts import config as expert_config
from tiny_experts import tiny_experts
from tiny_models import tiny_gpt2, tiny_llama
from torch_calls import on_threads
from transformers.pytorch_utils import Conv1D

from smoa_kernels import BlockPartition
from smoa_kernels.definition import spectral_order
from smoa_kernels.definition.block_rule import BlockRule
from smoa_kernels.definition.spectral_order import order_source, spectral_centroids, spectral_orders
from smoa_kernels.peft import Linear, sorting

LINEARS = {tiny_llama: 14, tiny_gpt2: 8}  # in two transformer layers, without lm_head
of_layers_and_experts = pytest.mark.parametrize(
    ("model", "settings"),
    [(tiny_llama, config()), (tiny_experts, expert_config(block_order="spectral"))],
    ids=["layers", "experts"],
)


@pytest.fixture(autouse=True)
def in_memory():
    """Weights in CPU memory, on whatever device the tests run: only these are sorted in parallel."""
    with torch.device("cpu"):
        yield


@pytest.fixture
def threads():
    with on_threads(3):
        yield 3


@pytest.fixture
def sorted_in(monkeypatch):
    """Records the sorting threads and the intra-op threads of each."""
    found = []

    def recording(weight, granule):
        found.append((threading.current_thread(), torch.get_num_threads()))
        return spectral_centroids(weight, granule)

    monkeypatch.setattr(spectral_order, "spectral_centroids", recording)
    return found


def adapter(make_model, **settings):
    """Tensors of an adapter for a given seed."""
    model = make_model()
    torch.manual_seed(7)
    return get_peft_model_state_dict(adapt(model, **settings))


def test_one_block_is_not_sorted(sorted_in):
    """Its labels are all 0, whatever the order: HiRA, and adapters that merge into four bits, are added at once."""
    assert adapter(tiny_llama, num_blocks=1).keys() == adapter(tiny_llama).keys()
    assert len(sorted_in) == LINEARS[tiny_llama]  # of the second adapter, with two blocks


def test_sorting_in_parallel_gives_the_same_adapter(make_model, threads, sorted_in, monkeypatch):
    several = adapter(make_model, init_weights=False)
    assert {count for _, count in sorted_in} == {1}
    assert threading.current_thread() not in {thread for thread, _ in sorted_in}
    assert len(sorted_in) == LINEARS[make_model]
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    sorted_in.clear()
    single = adapter(make_model, init_weights=False)
    assert len(sorted_in) == LINEARS[make_model]
    assert len(set(sorted_in)) == 1  # one thread, with one intra-op thread
    assert several.keys() == single.keys()
    assert all(torch.equal(value, single[key]) for key, value in several.items())


def test_sorting_threads_do_not_wait_for_their_maker(make_model, threads, monkeypatch):
    """vLLM makes `torch.set_num_threads` do nothing, so all threads keep their setting."""
    expected = adapter(make_model)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    found = {}
    adapting = threading.Thread(target=lambda: found.update(adapter(make_model)), daemon=True)
    adapting.start()
    adapting.join(timeout=120)
    assert not adapting.is_alive()
    assert found.keys() == expected.keys()


def test_a_shared_weight_is_sorted_once(llama, threads, sorted_in):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    get_peft_model(model, config(target_modules=["up_proj"]))
    assert len(sorted_in) == 1


def test_a_shared_square_weight_that_one_layer_stores_transposed(threads):
    base, transposed = torch.nn.Linear(12, 12), Conv1D(12, 12)
    transposed.weight = base.weight
    settings = config(r=4).for_layer("")
    found = [Linear(layer, "default", settings) for layer in (base, transposed)]
    sorting.initialize_all(dict(zip("ab", found, strict=True)), "default")
    assert found[0].partition("default") == BlockPartition.from_weight(base.weight, 3)
    assert found[1].partition("default") == BlockPartition.from_weight(base.weight.T, 3)


def test_a_layer_whose_weight_has_another_name(sorted_in):
    """HQQ's layer, for example, has no `weight`."""

    class Packed(torch.nn.Module):
        in_features, out_features, kept = 6, 8, torch.randn(8, 6)

    class Backend:
        def get_base_weight(self, base):
            return base.kept

    base, settings = Packed(), config(r=4).for_layer("")
    found = {name: Linear(base, "default", settings, quantization=Backend()) for name in "ab"}
    sorting.initialize_all(found, "default")
    assert len(sorted_in) == 1
    assert found["b"].partition("default") == BlockPartition.from_weight(base.kept, 3)


def test_only_adapted_weights_are_sorted(llama, threads, sorted_in):
    model = adapt(llama(), target_modules=["q_proj", "up_proj"], exclude_modules=["layers.0.mlp.up_proj"])
    assert len(sorted_in) == 3
    sorted_in.clear()
    model.add_adapter("same", config(target_modules=["q_proj"]))
    assert not sorted_in  # it reuses the first one's blocks
    model.add_adapter("other", config(target_modules=["q_proj"], num_blocks=4))
    assert len(sorted_in) == 2
    sorted_in.clear()
    model.add_adapter("elsewhere", config(target_modules=["q_proj", "k_proj", "v_proj"]))
    assert len(sorted_in) == 4
    assert threading.current_thread() not in {thread for thread, _ in sorted_in}


@pytest.mark.parametrize("order", ["contiguous", "random"])
def test_other_orders_sort_nothing_and_layers_of_one_shape_share_their_blocks(make_model, order, sorted_in):
    model = adapt(make_model(), block_order=order, granule=4, block_seed=7)
    for name, seed in (("same", 7), ("seed", 8)):
        model.add_adapter(name, config(model, block_order=order, granule=4, block_seed=seed))
    assert not sorted_in
    found = {}
    for layer in layers(model).values():
        shape = layer.out_features, layer.in_features
        partition = layer.partition("default")
        assert partition == BlockRule(3, order, 4, 7).of_shape(shape, "cpu")
        assert partition.granularity % 4 == 0
        assert found.setdefault(shape, partition) is layer.partition("same") is partition
        assert (layer.partition("seed") == partition) == (order == "contiguous")


def test_only_weights_of_a_state_dict_are_sorted(llama, threads, sorted_in):
    names = ["model.layers.1.mlp.up_proj.smoa.A"]
    inject_adapter_in_model(config(), llama(), state_dict=dict.fromkeys(names))
    assert len(sorted_in) == 1


def test_a_failed_injection_keeps_nothing_alive(llama, threads):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    kept = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
    gc.disable()
    try:
        with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: weight must be finite"):
            get_peft_model(model, config(target_modules=["up_proj"]))
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_one_after_another_where_the_orders_come_from_elsewhere(llama, threads):
    """Other processes request the weights in the same order, one at a time (`shared_spectra`)."""
    asked = []

    def elsewhere(weight, granule):
        asked.append(threading.current_thread())
        return spectral_orders(weight, granule)

    token = order_source.set(elsewhere)
    try:
        get_peft_model(llama(), config())
    finally:
        order_source.reset(token)
    assert asked
    assert set(asked) == {threading.current_thread()}


@of_layers_and_experts
@pytest.mark.parametrize("error", [ValueError("this one"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_sorting_that_nobody_asks_for_is_cancelled(model, settings, threads, monkeypatch, error):
    model = model(num_hidden_layers=8)
    begun = []

    def failing(weight, num_blocks, *, granule):
        begun.append(weight)
        if len(begun) == 1:
            raise error
        time.sleep(0.2)

    monkeypatch.setattr(BlockPartition, "from_weight", failing)
    with pytest.raises(type(error)):
        get_peft_model(model, settings)
    assert len(begun) <= 1 + 2 * threads  # of 56 layers, or of 96 experts
    assert not [thread for thread in threading.enumerate() if "smoa-sorting" in thread.name]
    assert torch.get_num_threads() == threads
    assert not hasattr(model, "peft_config")
