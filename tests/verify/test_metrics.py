from vllm_deterministic.verify.metrics import Counters, read_block_size, read_counters

PAGE = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1200.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 1.0e+02
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 640.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 9.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:cache_config_info{_block_size_resolved="True",block_size="128",cache_dtype="a\\"b}",engine="0"} 1.0
process_open_fds NaN
"""


def test_sums_counters_over_engines() -> None:
    assert read_counters(PAGE) == Counters(prefix_cache_queries=1300, prefix_cache_hits=640, preemptions=3)


def test_reads_the_block_size() -> None:
    assert read_block_size(PAGE) == 128


def test_a_page_of_another_server_tells_nothing() -> None:
    assert read_counters("go_goroutines 7\n") is None
    assert read_block_size("go_goroutines 7\n") is None
    assert read_block_size('vllm:cache_config_info{block_size="None"} 1.0\n') is None
    assert read_counters("<html>not found</html>") is None


def test_counters_add_and_subtract() -> None:
    assert Counters(5, 3, 1) - Counters(2, 1, 1) + Counters(1, 1, 1) == Counters(4, 3, 1)
