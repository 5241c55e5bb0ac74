"""Predictions of time, memory and traffic on GPUs that we do not have: nothing in the package decides by them."""
