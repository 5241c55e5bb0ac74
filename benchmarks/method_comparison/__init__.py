"""Two files that bring SMoA and accelerated HiRA into PEFT's method comparison."""
