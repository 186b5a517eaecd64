"""Read the few numbers that matter here from vLLM's Prometheus page."""

import math
import re
from dataclasses import dataclass

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the server started, over all its engines; tokens for the prefix cache, events for preemptions."""

    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(
            self.prefix_cache_queries + other.prefix_cache_queries,
            self.prefix_cache_hits + other.prefix_cache_hits,
            self.preemptions + other.preemptions,
        )

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            self.prefix_cache_queries - earlier.prefix_cache_queries,
            self.prefix_cache_hits - earlier.prefix_cache_hits,
            self.preemptions - earlier.preemptions,
        )


def read_counters(page: str) -> Counters | None:
    """The counters of a metrics page, or None where it has none of vLLM's."""
    totals: dict[str, float] = {}
    for sample in _SAMPLE.finditer(page):
        name = sample["name"]
        totals[name] = totals.get(name, 0.0) + _number(sample["value"])
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total")
    if names[0] not in totals:
        return None
    return Counters(*(int(totals.get(name, 0.0)) for name in names))


def read_block_size(page: str) -> int | None:
    """The size of a KV block in tokens, or None where the page does not tell."""
    for sample in _SAMPLE.finditer(page):
        if sample["name"] == "vllm:cache_config_info":
            size = dict(_LABEL.findall(sample["labels"] or "")).get("block_size", "")
            return int(size) if size.isdecimal() and int(size) > 0 else None
    return None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
