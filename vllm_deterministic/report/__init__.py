"""Reports made from a run record: one writer a file."""
