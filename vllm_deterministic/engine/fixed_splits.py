"""What the attention backends of both kinds of device have in common: fixed splits of vLLM's paged cache."""

from collections.abc import Mapping
from typing import Any, ClassVar

from vllm.v1.attention.backend import AttentionType, MultipleOf

from .config import RefusalError


class FixedSplitBackend:
    """Stands before vLLM's class among the bases of a backend."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any power of two up to the KV split works; ``coverage`` refuses the others before the engine starts."""
        return [MultipleOf(16)]

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


def refuse_features(
    where: str,
    kv_sharing_target_layer_name: str | None,
    attn_type: str,
    kv_cache_dtype: str,
    others: Mapping[str, bool] | None = None,
) -> None:
    """Refuse a layer that uses what no backend covers, or one of the ``others``: by name, whether it does.

    Raises:
        RefusalError: names the feature and the device.
    """
    uncovered = {
        **(others or {}),
        "KV sharing between layers": kv_sharing_target_layer_name is not None,
        f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
        f"KV cache dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
    }
    for feature, used in uncovered.items():
        if used:
            raise RefusalError(f"{feature} is not covered on {where}: serve this model without the flag")
