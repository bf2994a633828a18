"""The HTTP server: vLLM's OpenAI app with depth on every request and every answer."""

import logging

# vLLM attaches SageMaker's routes, whose package lets the root logger say nothing but errors.
logging.getLogger(__name__).setLevel(logging.WARNING)
