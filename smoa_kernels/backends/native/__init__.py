"""Compiled CPU code, and what calls it."""
