"""The engine on CPU, on vLLM's V1 runner.

A token's way: `scheduler` plans a step, `runner` makes it a `step`, whose passes `loop/executor.py`
runs, `sampler` reads tokens out, and `model` gives vLLM the logits that wait for the host.
"""
