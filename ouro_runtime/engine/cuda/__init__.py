"""The engine on CUDA, on vLLM's V2 runner.

A token's way: `scheduler` plans a step ahead, `state` prepares it, `step` plays its `pieces` as
graphs (the pass itself is a `block`), and `output` brings them to the host.
"""
