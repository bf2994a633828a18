"""The HTTP server: vLLM's OpenAI app with depth on every request and every answer."""
