"""Saving, loading, exchanging and converting adapters with PEFT.

The format of an adapter's folder, and reading it without PEFT, is in `smoa_kernels.adapter_folder`.
"""
