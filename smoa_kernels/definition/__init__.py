"""The definition of SMoA: the partition, the packed adapter, the reference."""
