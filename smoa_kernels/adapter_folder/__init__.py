"""An adapter's folder on disk: its format, reading, inspecting, and merging it into a base model's folder.

A function that reads files raises FileNotFoundError if one is missing. It raises a ValueError that names the file or
the layer if one cannot be read, belongs to another method, or holds something that is not allowed. Nothing here imports
PEFT, which takes seconds; transformers is imported only if a base model's class must be known.
"""

try:
    import numpy  # noqa: F401
    import safetensors  # noqa: F401
except ImportError as error:
    raise ImportError(
        "adapters are read with safetensors and numpy: pip install 'smoa-kernels[peft]'"
    ) from error
