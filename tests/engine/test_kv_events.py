"""Events of the KV cache: what other programs are told of its blocks is what vLLM tells of its own backend's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Prompts of several blocks, one on the other's prefix, one token forced so that generated blocks are equal too, and a
# cache so small that blocks are removed from it.
_LISTEN = """
import json, os, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import msgspec, zmq
from vllm import LLM, SamplingParams
model, endpoint = sys.argv[1:]
socket = zmq.Context().socket(zmq.SUB)
socket.setsockopt(zmq.RCVTIMEO, 20_000)
socket.subscribe("")
socket.connect(endpoint)
llm = LLM(
    model, enforce_eager=True, dtype="float32", max_model_len=512, max_num_batched_tokens=512,
    num_gpu_blocks_override=11, kv_cache_memory_bytes=1 << 27,
    kv_events_config={"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint},
)
time.sleep(1)  # for the subscription to arrive
forced = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, allowed_token_ids=[77])
def ask(*prompts):
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], forced, use_tqdm=False)
long = [50 + i * 13 % 3000 for i in range(380)]
ask(long)
ask(long[:280], long[100:230], long[:100])
for first in range(4):
    ask([first] + long)
assert llm.reset_prefix_cache()
last = [9] * 200
ask(last)
events = []
while not any(event["type"] == "BlockStored" and event["token_ids"][0] == 9 for event in events):
    _, _, payload = socket.recv_multipart()
    events += msgspec.msgpack.decode(payload)[1]
print("RESULT" + json.dumps(events, default=bytes.hex))
"""


def events(model: Path, folder: Path, flag: bool) -> list[dict[str, Any]]:
    # vLLM's hashes start from a random number unless Python's do not.
    env = {**os.environ, "VLLM_DETERMINISTIC": str(int(flag)), "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", _LISTEN, str(model), f"ipc://{folder}/events-{flag}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    result: list[dict[str, Any]] = json.loads(done.stdout.rpartition("RESULT")[2])
    return result


def test_events_are_those_of_the_default_engine(qwen3: Path, tmp_path: Path) -> None:
    found = events(qwen3, tmp_path, True)
    assert {event["type"] for event in found} == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    assert {event["block_size"] for event in found if event["type"] == "BlockStored"} == {128}
    assert found == events(qwen3, tmp_path, False)
