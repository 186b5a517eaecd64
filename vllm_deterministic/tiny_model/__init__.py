"""The embedded model: a small Qwen3 with random weights, written from nothing but installed packages."""
