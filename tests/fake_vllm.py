"""A stand-in for the command `vllm`: `serve BEHAVIOUR --port N`.

Behaviours: `dies` at once, `hangs` before it answers, `breaks` at the twentieth completion, `slow` (a second each),
`varies` (every third completion differs), `as-flagged` (varies without --enable-deterministic). Anything else serves,
always the same. A child that ignores SIGTERM stands for the engine's processes; the ids of
both are written to the file that FAKE_VLLM_PIDS names.
"""

import http.server
import itertools
import json
import os
import subprocess
import sys
import time

CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
NAMES = ("VLLM_NO_USAGE_STATS", "VLLM_DETERMINISTIC", "A", "B")


def completion(number: int, varies: bool) -> dict[str, object]:
    logprob = -0.5 if varies and number % 3 == 0 else -0.25
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [logprob] * 2, "top_logprobs": [{"a": logprob}] * 2}
    return {"choices": [{"text": "ab", "token_ids": [1, 2], "finish_reason": "length", "logprobs": logprobs}]}


def main() -> None:
    print("args", json.dumps(sys.argv[1:]), flush=True)
    print("env", json.dumps({name: os.environ.get(name) for name in NAMES}), flush=True)
    behaviour = os.environ.get("FAKE_VLLM_BEHAVIOUR", sys.argv[2])
    if behaviour == "dies":
        sys.exit("ValueError: no such model")
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with open(os.environ["FAKE_VLLM_PIDS"], "a") as pids:
        pids.write(f"{os.getpid()} {child.pid}\n")
    if behaviour == "hangs":
        time.sleep(600)
    numbers = itertools.count()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "tiny", "max_model_len": 4096}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            number = next(numbers)
            if behaviour == "slow":
                time.sleep(1)
            broken = behaviour == "breaks" and number == 20
            varies = behaviour == "varies" or (behaviour == "as-flagged" and "--enable-deterministic" not in sys.argv)
            self.answer(500 if broken else 200, completion(number, varies))

        def answer(self, status: int, content: object) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
