"""PEFT's own HiRA layers, computed by SMoA's operator (docs/hira.md)."""
