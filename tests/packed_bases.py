"""Quantised bases written from their formats' descriptions, and adapters whose A has a column for each group.

A packer takes W0 (N, C) and a group size, and gives the layer's tensors by the ends of their names, and what they mean:
the codes (N, C), the scales (N, G) and the group of each column. Its code shares nothing with the package's.
"""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_llama

from smoa_kernels.adapter_folder.settings import FORMAT_VERSION
from smoa_kernels.definition.partition import BlockPartition
from smoa_kernels.definition.sketch import sketch_weight

GROUP = 32


class Packed(NamedTuple):
    tensors: dict
    codes: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    zeros: torch.Tensor | None = None  # signed

    @property
    def weight(self):
        return self.codes * self.scales.float()[:, self.groups]


def integers(weight, groups, bits, *, zeros=False, dtype=torch.float16):
    """Codes 0 ... 2^bits - 1, zero points and scales, nearest to a weight."""
    count, top = int(groups.max()) + 1, 2**bits - 1
    parts = [weight[:, groups == group] for group in range(count)]
    high = torch.stack([part.amax(1) if zeros else part.abs().amax(1) for part in parts], 1)
    low = torch.stack([part.amin(1) for part in parts], 1) if zeros else -high
    scales = ((high - low) / top).clamp_min(1e-4).to(dtype)
    zero = (-low / scales.float()).round().clamp(1, top) if zeros else torch.full_like(low, 2 ** (bits - 1))
    codes = (weight / scales.float()[:, groups] + zero[:, groups]).round().clamp(0, top)
    return codes, zero, scales


def words(numbers, bits):
    """Rows of integers as int32: a stream of bits, the lowest of each first, filled up with zeros."""
    stream = numbers.numpy().astype(np.int64)[..., None] >> np.arange(bits) & 1
    stream = stream.astype(np.uint8).reshape(len(numbers), -1)
    stream = np.pad(stream, [(0, 0), (0, -stream.shape[1] % 32)])
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32))


def adjacent(weight, size):
    return torch.arange(weight.shape[1]) // (size or weight.shape[1])


def in_order(weight, size, seed=3):
    """Groups as act-order makes them: each of `size` columns, which may be anywhere."""
    groups = adjacent(weight, size)
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]


def compressed(bits, zeros=False, order=False):
    def pack(weight, size):
        groups = (in_order if order else adjacent)(weight, size)
        codes, zero, scales = integers(weight, groups, bits, zeros=zeros, dtype=torch.bfloat16)
        shape = torch.tensor(weight.shape)
        tensors = {"weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": shape}
        if order:
            tensors["weight_g_idx"] = groups.int()
        if zeros:
            tensors["weight_zero_point"] = words(zero.T, bits).T.contiguous()
        signed = zero - 2 ** (bits - 1) if zeros else None
        return Packed(tensors, codes - zero[:, groups], scales, groups, signed)

    weights = {"num_bits": bits, "symmetric": not zeros, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights}
    config = {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": ["lm_head"]}
    return pack, {"quant_method": "compressed-tensors", "quantization_status": "compressed", **config}


def gptq(bits, layout, order=False, zeros=False):
    def pack(weight, size):
        groups = (in_order if order else adjacent)(weight, size)
        codes, zero, scales = integers(weight, groups, bits, zeros=zeros)
        stored = zero - 1 if layout == "gptq" else zero
        tensors = {"qweight": words(codes, bits).T.contiguous(), "qzeros": words(stored.T, bits)}
        tensors |= {"scales": scales.T.contiguous(), "g_idx": groups.int()}
        return Packed(tensors, codes - zero[:, groups], scales, groups)

    return pack, {"quant_method": "gptq", "bits": bits, "checkpoint_format": layout, "desc_act": order}


def awq():
    def pack(weight, size):
        groups = adjacent(weight, size)
        codes, zero, scales = integers(weight, groups, 4, zeros=True)

        def mixed(numbers):
            eights = numbers.unflatten(1, (-1, 8))
            return words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

        tensors = {"qweight": mixed(codes.T), "qzeros": mixed(zero.T), "scales": scales.T.contiguous()}
        return Packed(tensors, codes - zero[:, groups], scales, groups)

    return pack, {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}


class GptqLinear(torch.nn.Module):
    """A linear layer as gptqmodel's `TorchLinear` holds it."""

    QUANT_TYPE = "torch"

    def __init__(self, packed):
        super().__init__()
        self.out_features, self.in_features = packed.weight.shape
        self.bias, self.wanted = None, packed.weight
        for end, tensor in packed.tensors.items():
            self.register_buffer(end, tensor.clone())

    def dequantize_weight(self):
        return self.wanted.T

    def forward(self, x):
        return x @ self.dequantize_weight()


def real_gptq_linear(packed):
    """gptqmodel's own, over a packed weight of version 2."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    rows, cols = packed.weight.shape
    size = cols // packed.scales.shape[1]
    layer = TorchLinear(4, size, False, True, cols, rows, register_buffers=True)
    layer.load_state_dict(packed.tensors)
    layer.qzero_format(2)
    layer.post_init()
    return layer


# From QLoRA's paper (2305.14314, appendix E), and from the bits of 1 + 2 + 1: sign, exponent, fraction.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
TABLES = {"nf4": NF4, "fp4": [*FP4, *(-number for number in FP4)]}


def bitsandbytes(kind, nested=False):
    def pack(weight, size):
        groups, table = adjacent(weight, size), torch.tensor(TABLES[kind])
        scales = weight.unflatten(1, (-1, size)).abs().amax(2)
        state = {"quant_type": kind, "blocksize": size, "dtype": "float16", "shape": list(weight.shape)}
        tensors = {"weight.quant_map": table, "weight.absmax": scales.flatten()}
        if nested:
            offset, grid = scales.mean(), torch.linspace(-1, 1, 256)
            outer = torch.stack([(run - offset).abs().amax() for run in scales.flatten().split(256)])
            each = outer.repeat_interleave(256)[: scales.numel()]
            numbers = (((scales.flatten() - offset) / each + 1) * 127.5).round().to(torch.uint8)
            scales = (grid[numbers.long()] * each + offset.item()).view_as(scales)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
            tensors |= {"weight.absmax": numbers, "weight.nested_absmax": outer}
            tensors["weight.nested_quant_map"] = grid
        codes = (weight[..., None] / scales[:, groups, None] - table).abs().argmin(-1).to(torch.uint8)
        pairs = codes.view(-1, 2)
        tensors["weight"] = (pairs[:, :1] << 4) | pairs[:, 1:]
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text
        return Packed(tensors, table[codes.long()], scales, groups)

    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    return pack, {"quant_method": "bitsandbytes", **settings}


# A packer and its `quantization_config`.
FORMATS = {
    "compressed-tensors int4": compressed(4),
    "compressed-tensors int4, zero points": compressed(4, zeros=True),
    "compressed-tensors int8": compressed(8),
    "GPTQ": gptq(4, "gptq"),
    "GPTQ, 8 bits": gptq(8, "gptq", zeros=True),
    "GPTQ version 2": gptq(4, "gptq_v2", zeros=True),
    "GPTQ, act-order": gptq(4, "gptq", order=True),
    "act-order of compressed-tensors": compressed(4, order=True),
    "AWQ": awq(),
    "NF4": bitsandbytes("nf4"),
    "NF4, nested": bitsandbytes("nf4", nested=True),
    "FP4": bitsandbytes("fp4"),
}
LAYERS = [name for name, _ in tiny_llama().named_modules() if name.endswith("_proj")]


def small_llama(seed=0):
    return tiny_llama(seed, hidden_size=64, intermediate_size=128)


def write_base(folder, kind, size=GROUP, seed=0, model=None):
    """A base of three files, all its linear layers but the head quantised. Returns their weights."""
    pack, settings = FORMATS[kind]
    model, state, packed = model or small_llama(seed), {}, {}
    model.save_pretrained(folder)
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS:
            packed[layer] = pack(value, size)
            state |= {f"{layer}.{end}": tensor for end, tensor in packed[layer].tensors.items()}
        else:
            state[name] = value
    (folder / "model.safetensors").unlink()
    # The quantised layers' tensors in turn, so that those of one layer are in two files.
    split = [name for name in sorted(state) if any(name.startswith(f"{layer}.") for layer in LAYERS)]
    files = {"a": split[::2], "b": split[1::2], "c": sorted(state.keys() - set(split))}
    for file, names in files.items():
        part = {name: state[name] for name in names}
        save_file(part, folder / f"{file}.safetensors", metadata={"format": "pt", "by": "packed_bases"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}}
    index["weight_map"] = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_json(folder / "config.json", quantization_config=settings)
    return packed


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_gguf(path, kind="Q4_0"):
    """The small model as llama.cpp's converter writes it. Returns the quantised weights of its linear layers."""
    gguf = pytest.importorskip("gguf", reason="not installed")
    model, found, kind = small_llama(), {}, gguf.GGMLQuantizationType[kind]
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, weight in model.state_dict().items():
        stored, layer = names.get_name(name, try_suffixes=(".weight",)), name.removesuffix(".weight")
        if layer not in LAYERS:
            writer.add_tensor(stored, weight.numpy())
            continue
        # Of each head, row i of the second half follows row i of the first.
        order = torch.arange(len(weight))
        if count := heads.get(layer.rpartition(".")[2]):
            order = order.view(count, 2, -1).mT.flatten()
        data = gguf.quants.quantize(weight[order].numpy(), kind)
        writer.add_tensor(stored, data, raw_dtype=kind)
        found[layer] = torch.empty_like(weight)
        found[layer][order] = torch.from_numpy(gguf.quants.dequantize(data, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def write_adapter(folder, weights, size=GROUP, scale=0.05):
    """An adapter over these W0, packed or not, with a column of A for each group. Returns the multipliers (N, G)."""
    folder.mkdir()
    maps = {name: each.groups for name, each in weights.items() if isinstance(each, Packed)}
    weights = {name: each.weight if isinstance(each, Packed) else each for name, each in weights.items()}
    blocks = min(2, *(each.shape[1] // size for each in weights.values()))
    state, multipliers, generator = {}, {}, torch.Generator().manual_seed(4)
    for name, weight in weights.items():
        rows, cols, groups = weight.shape[0], weight.shape[1] // size, maps.get(name, adjacent(weight, size))
        partition = BlockPartition.contiguous((rows, cols), blocks)
        A, B = (torch.randn(shape, generator=generator) for shape in ((2, cols), (rows, 2)))
        ranks = torch.full([blocks], 2, dtype=torch.int32)
        layer = {"A": A, "B": B, "row_block": partition.row_block, "ranks": ranks}
        layer |= {"col_block": partition.col_block[groups], "sketch": sketch_weight(weight)}
        if not torch.equal(groups, adjacent(weight, size)):
            layer["col_group"] = groups.int()
        layer["scaling"] = torch.tensor(scale, dtype=torch.float64)
        state |= {f"{name}.smoa.{key}": tensor for key, tensor in layer.items()}
        inside = partition.row_block[:, None] == partition.col_block
        multipliers[name] = 1 + scale * inside * (B @ A)
    state = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "SMOA",
        "format_version": FORMAT_VERSION,
        "r": 2 * blocks,
        "smoa_alpha": 2 * blocks * scale,
    }
    config |= {"num_blocks": blocks, "block_order": "contiguous", "group_size": size}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in weights})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return multipliers
