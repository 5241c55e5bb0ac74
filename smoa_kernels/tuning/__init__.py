"""Launch configurations: what they compile to, which rules they must meet, and which were measured fastest."""
