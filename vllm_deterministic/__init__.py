"""Deterministic serving for vLLM, and the tools that verify it."""

__version__ = "0.1.0"
