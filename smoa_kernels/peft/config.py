"""`SMoAConfig`: what PEFT saves as `adapter_config.json`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from ..backends import ALGORITHMS, BACKENDS
from ..checks import MOST_RANKS, check_choice, check_finite, check_path, shown
from ..definition.ranks import resolve_ranks
from .folders import MOST_BYTES, check_weights, excess, read_json
from .peft_type import PEFT_TYPE
from .saving import check_seal, replacing
from .settings import layer_settings

__all__ = ["FORMAT_VERSION", "SMoAConfig"]

# Of the adapter folder. Raised when an older release could not read what a newer one writes. Version 1 was never
# released.
FORMAT_VERSION = 2

# Of a file's bytes, what is left to a save, which names the weights, and to PEFT, which fills in names in training.
_SAVING, _TRAINING = 2**10, 2**16

_BIASES = ("none", "all", "smoa_only")


@dataclass
class SMoAConfig(PeftConfig):  # type: ignore[misc]  # PEFT's types are not followed
    """Configuration of SMoA adapters, named as PEFT's other configurations name things.

    Args:
        r: rank budget of a layer over all its blocks, at least 1.
        target_modules: names (suffixes) of the modules to adapt, a regular expression, or "all-linear"; chosen by
            the model's architecture when None.
        num_blocks: K, from 1 (which is HiRA) to the smaller dimension of every adapted weight.
        block_ranks: rank of each block, K numbers that sum to r; shared evenly when None. Layers to which
            `rank_pattern` or `num_blocks_pattern` give another r or K share theirs evenly.
        smoa_alpha: the update is scaled by alpha / r; r when None.
        smoa_dropout: probability in [0, 1) of dropping an element of the adapter's input in training.
        use_rslora: scale by alpha / √r instead.
        init_weights: True makes the adapter start as an identity (B zero), False gives a random one, for tests.
        fan_in_fan_out: the weights are stored (in, out), as those of GPT-2's `Conv1D`.
        bias: "none", "all" or "smoa_only": which biases train with the adapter.
        modules_to_save: further modules that are trained and saved in full.
        exclude_modules: modules not to adapt, as `target_modules` names them.
        layers_to_transform: indices of the layers to adapt, where `target_modules` is a list.
        layers_pattern: name of the module list that these indices count in.
        rank_pattern: r of the layers whose names match a key.
        alpha_pattern: likewise alpha.
        num_blocks_pattern: likewise K.
        algorithm: see :func:`smoa_kernels.smoa_linear`.
        backend: likewise.
        strict_base: refuse, rather than warn about, an adapter that was trained over another base weight.
        format_version: of the file that the configuration was read from; None for a new one.
        weights_sha256: of the weights that the file was saved with; None for a new configuration, or where any will do.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.

    Example:
        >>> config = SMoAConfig(r=8, num_blocks=2, target_modules=["q_proj", "v_proj"])
        >>> config.peft_type.value, sorted(config.target_modules)
        ('SMOA', ['q_proj', 'v_proj'])
    """

    r: int = field(default=8, metadata={"help": "Rank budget of a layer over all its blocks"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the modules to adapt, a regular expression, or 'all-linear'"},
    )
    num_blocks: int = field(default=2, metadata={"help": "Number of aligned blocks; 1 is HiRA"})
    block_ranks: list[int] | None = field(
        default=None, metadata={"help": "Rank of each block (num_blocks numbers that sum to r)"}
    )
    smoa_alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r; r when None"}
    )
    smoa_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input"})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)"})
    init_weights: bool = field(
        default=True, metadata={"help": "True: start as an identity; False: random weights, for tests"}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Weights are stored (in, out)"})
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'smoa_only'"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved in full"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt, named as in target_modules"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "r of the layers whose names match a key"}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alpha of the layers whose names match a key"}
    )
    num_blocks_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "num_blocks of the layers whose names match a key"}
    )
    algorithm: str = field(default="auto", metadata={"help": f"One of {', '.join(ALGORITHMS)}"})
    backend: str = field(default="auto", metadata={"help": f"One of {', '.join(BACKENDS)}"})
    strict_base: bool = field(
        default=False, metadata={"help": "Refuse an adapter that was trained over another base weight"}
    )
    format_version: int | None = field(
        default=None, metadata={"help": "Of the file that this was read from; None for a new configuration"}
    )
    weights_sha256: str | None = field(
        default=None, metadata={"help": "Of the weights that the file was saved with; None where any will do"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._check_format()
        if self.block_ranks is not None and not isinstance(self.block_ranks, (list, tuple)):
            raise TypeError(f"block_ranks must be a list of ints, got {shown(self.block_ranks)}")
        resolve_ranks(self.r, self.num_blocks, self.block_ranks)
        for pattern, names in (("rank_pattern", "r"), ("num_blocks_pattern", "num_blocks")):
            for key, value in _mapping(pattern, getattr(self, pattern)).items():
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_RANKS:
                    raise ValueError(
                        f"{pattern}[{shown(key)}] must be an int of at least 1 ({names}) and at most {MOST_RANKS}, got "
                        f"{shown(value)}"
                    )
        if self.smoa_alpha is not None:
            check_finite("smoa_alpha", self.smoa_alpha)
        for key, value in _mapping("alpha_pattern", self.alpha_pattern).items():
            check_finite(f"alpha_pattern[{shown(key)}]", value)
        check_finite("smoa_dropout", self.smoa_dropout)
        if not 0.0 <= self.smoa_dropout < 1.0:
            raise ValueError(f"smoa_dropout must lie in [0, 1), got {self.smoa_dropout}")
        for name in ("use_rslora", "init_weights", "fan_in_fan_out", "strict_base", "inference_mode"):
            _check_bool(name, getattr(self, name))
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            # Of a str PEFT would look for the letters, where it expects a list.
            _check_items(name, getattr(self, name), str, alone=name != "modules_to_save")
        _check_items("layers_to_transform", self.layers_to_transform, int, alone=True)
        for name, allowed in (("bias", _BIASES), ("algorithm", ALGORITHMS), ("backend", BACKENDS)):
            check_choice(name, getattr(self, name), allowed)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                _check_regex(name, value)
        for name in self.modules_to_save or ():  # PEFT looks for it as an expression and as the end of a name
            _check_regex("modules_to_save", name)
            if not name:
                raise ValueError("modules_to_save must hold names of modules, got ''")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        self.check_size()

    @property
    def is_from_file(self) -> bool:
        """Whether an adapter's weights, labels among them, are about to be loaded for this configuration."""
        return self.format_version is not None

    def to_dict(self) -> dict[str, Any]:
        """As it is saved: with the format version of this release, and not yet of any weights."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION, "weights_sha256": None}

    def check_size(self, *, saving: bool = False) -> None:
        """Whether the file that this is saved as would be read; asked before anything is trained with it.

        Args:
            saving: nothing will be added by training, or has been for a configuration that was read from a file.

        Raises:
            TypeError: a field holds what JSON cannot.
            ValueError: it would be longer, or hold more values, than is read.
        """
        fields = {name: _json(name, value) for name, value in self.to_dict().items()}
        room = _SAVING if saving or self.is_from_file else _TRAINING
        words = excess(",".join(f"{name}:{text}" for name, text in fields.items()), MOST_BYTES - room)
        if words:
            longest = max(fields, key=lambda name: len(fields[name]))
            raise ValueError(
                f"{longest} is too long: {CONFIG_NAME} would have {words}. Name layers by regular expressions that "
                "match many"
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; an interrupted save leaves the old one.

        Args:
            save_directory: a folder, made where there is none.

        Raises:
            TypeError, ValueError: `save_directory` is no path, or a file; or the file would be too long to be read.
        """
        check_path("save_directory", save_directory)
        self.check_size(saving=True)
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
            subfolder: of it, that holds the adapter.
            kwargs: PEFT's. `strict_base`, where given (to `PeftModel.from_pretrained` too), wins over the file's.

        Raises:
            TypeError, ValueError: there is none, its values or format version are not allowed, or the weights beside it
                are a pickle, truncated or corrupt, of other ranks, or a killed save's. PEFT asks for the configuration
                before it touches the model, so nothing has changed.
        """
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        if subfolder is not None:
            check_path("subfolder", subfolder)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        file = os.path.join(folder, CONFIG_NAME)
        strict_base = kwargs.pop("strict_base", None)
        if strict_base is not None:
            _check_bool("strict_base", strict_base)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            if not os.path.isfile(file) or file in str(error):
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{file}: {error}") from error
        if isinstance(config, cls):
            check_weights(folder, lambda name: layer_settings(config, name).r)
            check_seal(folder, config.weights_sha256)
            if strict_base is not None:
                config.strict_base = strict_base
        return cast(SMoAConfig, config)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The object in the JSON file at `path_json_file`; ValueError, naming it, where it holds something else."""
        read_json(path_json_file)
        return cast("dict[str, Any]", super().from_json_file(path_json_file, **kwargs))

    def _check_format(self) -> None:
        if not isinstance(self.weights_sha256, (str, type(None))):
            raise ValueError(f"weights_sha256 must be a str, got {shown(self.weights_sha256)}")
        version = self.format_version
        if version is None:
            return
        if isinstance(version, bool) or not isinstance(version, int):
            raise ValueError(f"format_version must be an int, got {shown(version)}")
        if version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            raise ValueError(
                f"format_version {version} of the adapter is {'newer' if newer else 'older'} than what this release "
                f"reads ({FORMAT_VERSION}): {'update smoa-kernels' if newer else 'train the adapter anew'}"
            )


def _json(name: str, value: Any) -> str:
    """As PEFT writes it, a level deeper."""
    try:
        text = json.dumps(
            [value], indent=2, default=lambda odd: list(odd) if isinstance(odd, set) else str(odd)
        )
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be what JSON can hold, got {shown(value)}: {error}") from error
    return text


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def _check_items(name: str, value: Any, kind: type, *, alone: bool) -> None:
    """Whether `value` is None or a list (set, tuple) of `kind`, or, where that may stand `alone`, one of it."""
    if value is None or (alone and type(value) is kind):
        return
    if not isinstance(value, (list, set, tuple)) or any(type(item) is not kind for item in value):
        what = {str: "names", int: "indices"}[kind]
        raise TypeError(f"{name} must be a list of {what}{', or one' if alone else ''}, got {shown(value)}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict from layer names to values, got {shown(value)}")
    for key in value:
        _check_regex(f"a key of {name}", key)
    return dict(value)


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (TypeError, re.error) as error:
        raise ValueError(f"{name} must be a regular expression, got {shown(pattern)}: {error}") from error
