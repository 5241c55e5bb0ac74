"""Measuring on a GPU which launch parameters and algorithms are fastest."""
