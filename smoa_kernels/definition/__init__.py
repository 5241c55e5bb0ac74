"""What SMoA is: the partition, the packed adapter, the reference."""
