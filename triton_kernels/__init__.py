"""Batch-invariant operations: one order of additions per output element, whatever the batch.

Imported as ``vllm_deterministic.triton_kernels``. Needs torch (and, for the kernels, triton); knows nothing of vLLM.
"""

if __name__ == "triton_kernels":
    # From a checkout's root this folder would shadow the unrelated package of the same name that Triton ships.
    raise ImportError("this folder is imported as vllm_deterministic.triton_kernels", name=__name__)
