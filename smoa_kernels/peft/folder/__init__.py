"""Saving, loading, exchanging, converting and sending adapters with PEFT.

The format of an adapter's folder, and reading it without PEFT, is in `smoa_kernels.adapter_folder`.
"""
