"""Receipts of a server, taken by the command line while it does nothing else and replayed while it does."""

import collections
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import serving_many
from load_processes import Load

# The console script of an install, also where there is none.
_COMMAND = [sys.executable, "-P", "-c", "from vllm_deterministic.cli import main; main()"]
_TIMEOUT_S = 600


def measure_receipts(
    base_url: str, model: str, plan: serving_many.Plan, *, receipts: int, tokens: int, load: dict[str, int]
) -> dict[str, Any]:
    """Take receipts of so many targets of ``plan``, and replay them beside completions of it.

    ``load``: ``processes`` and ``in_flight`` of those, and ``limit_s``, which ends them should the replay take longer.
    """
    made = serving_many.kinds(plan)
    chosen = [made[number % len(made)] for number in range(receipts)]
    requests = [
        kind.asked | {"prompt": kind.prompts[number // len(made) % len(kind.prompts)], "max_tokens": tokens}
        for number, kind in enumerate(chosen)
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, taken = Path(folder, "requests.jsonl"), Path(folder, "receipts.jsonl")
        asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
        take = _run("receipt", "--requests", str(asked), "--output", str(taken), "--base-url", base_url)
        if take.returncode:
            return {"receipts": 0, "error": take.stderr.strip()[-500:]}
        tasks = serving_many.many_tasks(base_url, model, plan, load["processes"], load["in_flight"])
        with Load("beside receipts", tasks, plan.completions, load["limit_s"]) as beside:
            while beside.running and not beside.control.answered:
                time.sleep(0.1)
            before = beside.control.answered
            replay = _run("replay", str(taken), "--json", "--base-url", base_url)
            during = beside.control.answered - before
            beside.control.stop()
            found = serving_many.summarize(plan, beside.results())
    verdicts = [json.loads(line) for line in replay.stdout.splitlines()]
    return {
        "receipts": len(requests),
        "verdicts": collections.Counter(verdict["status"] for verdict in verdicts),
        "messages": [verdict["message"] for verdict in verdicts if verdict["status"] != "identical"][:5],
        "exit_status": replay.returncode,
        **({"error": replay.stderr.strip()[-500:]} if replay.returncode else {}),
        "completions_meanwhile": during,
        "of_these_differing": found["differing"],
    }


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S)
