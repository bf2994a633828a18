"""The engine on CUDA, on vLLM's V2 runner.

A token's way: `scheduler` plans a step ahead, `state` prepares it, `step` runs its passes, each one
a `block` whose graph is replayed, `sampler` reads tokens out on the device, and `output` brings
them to the host.
"""
