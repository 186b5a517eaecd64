"""PyTorch's own operations, made batch-invariant by the kernels of this project."""
