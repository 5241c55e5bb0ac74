"""Saving, loading, exchanging and converting adapters with PEFT.

What an adapter's folder holds, and what is read without PEFT: `smoa_kernels.adapter_folder`.
"""
