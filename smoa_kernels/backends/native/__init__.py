"""Compiled CPU code and the Python that calls it."""
