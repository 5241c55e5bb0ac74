"""Compiled code of processors that are not here: plugin.py runs tests over it, README.md says how."""
