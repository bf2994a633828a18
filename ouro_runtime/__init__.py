"""The runtime of Ouro Serve: looped language models on vLLM.

Importing this package imports neither torch nor vLLM.
"""

__version__ = "0.1.0"
