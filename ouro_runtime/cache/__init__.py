"""K/V memory of loops: pages by loop, stand-in K/V, and what may be shared."""
