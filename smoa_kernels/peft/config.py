"""`SMoAConfig`, which PEFT saves as `adapter_config.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from ..adapter_folder.format import CONFIG_NAME, METHOD
from ..adapter_folder.reading import read_weights
from ..adapter_folder.settings import FORMAT_VERSION, AdapterSettings, full_name
from ..adapter_folder.writing import replacing
from ..checks import check_kind, check_path, naming


@dataclass
class SMoAConfig(AdapterSettings, PeftConfig):  # type: ignore[misc]  # PEFT's types are not followed
    """Configuration of SMoA adapters; its fields have the names of PEFT's other configurations.

    An adapter adds `ΔW = s · mask ∘ (B A) ∘ W0` to a layer's weight W0 (SMoA, arXiv 2605.21147; equation (2) of
    docs/definition.md). The mask is 1 inside K blocks of W0's rows and columns and 0 elsewhere.

    Args:
        r: rank budget of a layer, the sum of its blocks' ranks; at least 1. LoRA's r is the rank of its whole update.
        target_modules: names (suffixes) of the modules to adapt, a regular expression, or "all-linear"; chosen by
            the model's architecture when None.
        target_parameters: paths (suffixes) of fused expert weights to adapt, such as "mlp.experts.down_proj"
            (docs/experts.md). r, K and the order then hold for each expert. If it is given, only the modules that
            `target_modules` names are adapted beside them.
        num_blocks: K, the number of blocks, from 1 (which is HiRA) to the smaller dimension of every adapted weight.
        block_ranks: rank of each block, K numbers that sum to r; shared evenly when None. Layers to which
            `rank_pattern` or `num_blocks_pattern` give another r or K share theirs evenly.
        smoa_alpha: the update is scaled by s = alpha / r. If None, alpha is r, and the scale is 1.
        smoa_dropout: probability in [0, 1) of dropping an element of the adapter's input in training.
        use_rslora: scale by alpha / √r instead.
        use_lora_rate: multiply the scale of each layer by 3 K / rms(W0), so that the learning rate and the alpha of a
            LoRA run fit (docs/choosing.md). It is computed once, when the adapter is put into a model, whose
            configuration then holds the numbers as `alpha_pattern`; this object stays as it is.
        init_weights: True makes the adapter start as an identity (B zero), False gives a random one, for tests.
        fan_in_fan_out: the weights are stored (in, out), as those of GPT-2's `Conv1D`.
        bias: "none", "all" or "smoa_only": which biases train with the adapter.
        modules_to_save: further modules that are trained and saved in full.
        exclude_modules: modules not to adapt, or fused weights, as `target_modules` names them.
        layers_to_transform: indices of the layers to adapt, where `target_modules` is a list; of experts too.
        layers_pattern: name of the module list that these indices count in.
        rank_pattern: r by layer: keys are matched with the layers' names.
        alpha_pattern: alpha by layer.
        num_blocks_pattern: K by layer.
        block_order: how the rows and columns of W0 are sorted before they are cut into blocks. "spectral" is the
            paper's order; "contiguous" is W0's own, so that each block is a slice; "random" is drawn; "shared" is one
            spectral order for all experts of a fused weight. "contiguous" and "random" need no spectrum.
        granule: how many adjacent rows or columns stay together; 1 is the paper's.
        block_seed: seed of the order if `block_order` is "random".
        block_order_pattern: block_order by layer.
        granule_pattern: granule by layer.
        group_size: adjacent columns of W0 that share a column of A. The adapter then merges into a base that is
            quantised in such groups without quantising anew (docs/four_bits.md); "base" takes the base's, in
            act-order from its layers. 1 is the paper's.
        algorithm: how a layer is computed: "auto", or a name of :func:`smoa_kernels.smoa_linear`.
        backend: what computes it: "auto", or a name of :func:`smoa_kernels.smoa_linear`.
        strict_base: refuse, rather than warn about, an adapter that was trained on another base weight.
        not_linear: paths of adapted layers that are not linear; filled in when the adapter is put into a model.
        format_version: format version of the file that the configuration was read from; None for a new one.
        weights_sha256: SHA-256 of the weights that the file was saved with; None for a new configuration, and where any
            weights will do.

    Raises:
        TypeError, ValueError: a field has a value that is not allowed; the message names both.

    Example:
        >>> config = SMoAConfig(r=8, num_blocks=2, target_modules=["q_proj", "v_proj"])
        >>> config.peft_type.value, sorted(config.target_modules)
        ('SMOA', ['q_proj', 'v_proj'])
    """

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType(METHOD)
        AdapterSettings.__post_init__(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields to save, with this release's format version; saving the weights fills in their SHA-256."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION, "weights_sha256": None}

    def with_alphas_of(self, layers: Mapping[str, AdapterSettings]) -> SMoAConfig:
        """Return a copy that holds each layer's alpha as a number; a ValueError names a layer that has none yet."""
        for name, settings in layers.items():
            if settings.use_lora_rate:
                raise ValueError(
                    f"{name}: use_lora_rate reads W0 when an adapter is added: the base weight must not be on the meta "
                    "device, and low_cpu_mem_usage and inference_mode must be False"
                )
        config = copy(self)
        config.use_lora_rate = False
        config.alpha_pattern = {full_name(name): settings.alpha for name, settings in layers.items()}
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; an interrupted save leaves the old one.

        Args:
            save_directory: a folder, made where there is none.

        Raises:
            TypeError, ValueError: `save_directory` is not a path, or is a file.
        """
        check_path("save_directory", save_directory)
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory must be a folder, got the file {save_directory}")
        with replacing(save_directory) as scratch:
            super().save_pretrained(str(scratch), **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SMoAConfig:
        """Read `adapter_config.json` of a folder (or hub repository).

        Args:
            pretrained_model_name_or_path: the folder, or the repository's name.
            subfolder: the folder inside it that holds the adapter.
            kwargs: PEFT's. `strict_base`, where given (to `PeftModel.from_pretrained` too), wins over the file's.

        Raises:
            TypeError: an argument, or a value of the file, has another type; or the file has no `peft_type`.
            ValueError: the file is missing, is too large or has values or a format version that are not
                allowed; or the weights beside it are a pickle, truncated, corrupt, of other ranks, or left by a save
                that was killed. PEFT reads the configuration before it touches the model, so nothing has changed.
        """
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        if subfolder is not None:
            check_path("subfolder", subfolder)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        file = folder / CONFIG_NAME
        strict_base = kwargs.pop("strict_base", None)
        if strict_base is not None:
            check_kind("strict_base", strict_base, bool)
        # A str, not a Path, so that a TypeError stays one: PEFT's callers catch it.
        with naming(str(file)) if file.is_file() else nullcontext():
            try:
                config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            except KeyError as error:  # an unknown method
                raise ValueError(str(error)) from error
        if isinstance(config, cls):
            read_weights(folder, config)
            if strict_base is not None:
                config.strict_base = strict_base
        return cast(SMoAConfig, config)
