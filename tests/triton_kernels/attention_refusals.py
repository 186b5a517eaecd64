"""Arguments that every road of attention refuses: how each is made of good ones, and what the message says.

The good ones are those of one request of 5 tokens with 3 heads of 64 in blocks of 16.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

Change = dict[str, Callable[[dict[str, Any]], Any]]

REFUSED: list[tuple[Change, str]] = [
    ({"q": lambda a: a["q"].double()}, "q is torch.float64"),
    ({"k_cache": lambda a: a["k_cache"].half()}, "k_cache is torch.float16"),
    ({"v_cache": lambda a: a["v_cache"][:1]}, "v_cache is"),
    ({"block_table": lambda a: a["block_table"].long()}, "block_table is torch.int64"),
    ({"query_start_loc": lambda a: a["query_start_loc"][:1]}, "query_start_loc is"),
    ({"seq_lens": lambda a: a["seq_lens"].float()}, "seq_lens is torch.float32"),
    ({"max_seq_len": lambda a: 17}, "max_seq_len 17"),
    ({"max_query_len": lambda a: 0}, "max_query_len is 0"),
    ({"scale": lambda a: 0.0}, "scale is 0.0"),
    ({"window": lambda a: 0}, "window is 0"),
    ({"softcap": lambda a: math.inf}, "softcap is inf"),
    ({"sinks": lambda a: torch.zeros(4)}, r"sinks is \(4,\)"),
    ({"alibi_slopes": lambda a: torch.zeros(3, 1)}, r"alibi_slopes is \(3, 1\)"),
    ({"out": lambda a: a["q"].half()}, "out is torch.float16"),
]
