"""Receipts: what a deterministic server answered, kept as hashes, and held against another answer later."""
