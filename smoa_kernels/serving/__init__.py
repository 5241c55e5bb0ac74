"""Serving adapters without merging them: vLLM's plugin (docs/serving.md)."""
