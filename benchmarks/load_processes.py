"""Processes that send load, each with its share of CPU, so that a result shows whether they or the server were busy."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Self

import psutil

_TELL_S = 10.0
_GRACE_S = 60.0  # for the answers on their way, and for what comes of them

Task = tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]


class Control:
    """What a process that sends load shares with the one that started it."""

    def __init__(self, limit_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.deadline = time.monotonic() + limit_s  # one clock for all processes of a machine
        self._stop = context.Event()
        self._answered = context.Value("q", 0)

    def add(self, answers: int = 1) -> None:
        """Count answers, for the progress."""
        with self._answered.get_lock():
            self._answered.value += answers

    def stop(self) -> None:
        """Send nothing more."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be sent."""
        return time.monotonic() > self.deadline or self._stop.is_set()

    @property
    def answered(self) -> int:
        """Answers so far, of all processes."""
        return int(self._answered.value)


class Load:
    """Tasks, each in a process of its own, while the context lasts.

    A task is a function of this control and of its own arguments. It returns a dictionary; what it raises ends its
    process alone.
    """

    def __init__(self, name: str, tasks: Sequence[Task], total: int, limit_s: float) -> None:
        self.name, self.total = name, total
        self.control = Control(limit_s)
        self._begin = time.monotonic()
        context = multiprocessing.get_context("spawn")
        self._processes = []
        for function, arguments in tasks:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(there, self.control, function, arguments), daemon=True)
            process.start()
            there.close()  # else its end would not be seen here
            self._processes.append((process, here))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _connection in self._processes:
            process.kill()
            process.join()

    @property
    def running(self) -> bool:
        """Whether any of the processes is."""
        return any(process.is_alive() for process, _ in self._processes)

    def results(self) -> list[dict[str, Any]]:
        """What the tasks returned, with ``seconds`` and ``cpu_s``; an ``error`` of those that did not."""
        told = time.monotonic()
        results = []
        for process, connection in self._processes:
            while not connection.poll(0.5):
                if time.monotonic() - told > _TELL_S:
                    told = time.monotonic()
                    print(self.progress(), flush=True)
                if time.monotonic() > self.control.deadline + _GRACE_S:
                    process.kill()
            try:
                results.append(connection.recv())
            except EOFError:
                process.join()
                results.append({"error": f"a process that sent load ended with status {process.exitcode}"})
        print(self.progress(), flush=True)
        return results

    def progress(self) -> str:
        """A line."""
        seconds = time.monotonic() - self._begin
        answered = self.control.answered
        return f"{self.name}: {answered} of {self.total}, {answered / seconds:.0f}/s, {seconds:.0f} s"


def _run(connection: Connection, control: Control, function: Callable[..., dict[str, Any]], arguments: Any) -> None:
    begin, cpu = time.monotonic(), time.process_time()
    result = function(control, *arguments)
    connection.send(result | {"seconds": time.monotonic() - begin, "cpu_s": time.process_time() - cpu})


def cpu_shares(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of how many cores the processes that sent load made use; 1.0 is all that one of them could."""
    shares = [result["cpu_s"] / result["seconds"] for result in results if "cpu_s" in result]
    return {"processes": len(results), "busiest": max(shares, default=None), "sum": sum(shares)}


class ServerShares:
    """Of how many cores each process of a server makes use from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begin, self._before = time.monotonic(), self._cpu_s()

    def _cpu_s(self) -> dict[tuple[int, str], float]:
        server = psutil.Process(self._pid)
        found = {}
        for process in (server, *server.children(recursive=True)):
            times = process.cpu_times()
            found[process.pid, process.name()] = times.user + times.system
        return found

    def shares(self) -> dict[str, float]:
        """By name and number of the process; those that do next to nothing are left out."""
        seconds = time.monotonic() - self._begin
        shares = {key: (cpu - self._before.get(key, 0.0)) / seconds for key, cpu in self._cpu_s().items()}
        busy = {key: share for key, share in sorted(shares.items()) if share > 0.01}
        return {f"{number} {name}": share for number, ((_pid, name), share) in enumerate(busy.items(), 1)}
