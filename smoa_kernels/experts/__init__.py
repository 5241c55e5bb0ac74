"""SMoA on the fused weights of experts, whoever owns them."""
