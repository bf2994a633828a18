"""Training of LoopLMs: the paper's two stages, and the recipe of the shipped `ouro-mini`.

Nothing here imports vLLM; torch, numpy, tokenizers, safetensors and transformers are enough.
"""
