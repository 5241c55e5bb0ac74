"""What the library costs beside its peers: `make bench` measures, `report.py` writes tables and figures."""
