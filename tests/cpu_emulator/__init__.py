"""Runs compiled code for other processors: plugin.py runs tests with it, README.md explains it."""
