"""The seams to vLLM 0.32, one file each. Everything here may break when vLLM moves."""
