"""K/V memory of loops: loop-interleaved pages, stand-in K/V, and what may be shared."""
