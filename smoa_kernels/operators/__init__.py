"""The operators that torch sees: their arguments, registration and derivatives."""
