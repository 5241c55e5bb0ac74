"""Launch configurations: what is shipped, what it compiles to, and which rules it must meet."""
