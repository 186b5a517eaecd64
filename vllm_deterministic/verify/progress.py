"""Tell a waiting user how far a run is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars
from rich.text import Text


class Progress(Protocol):
    """What a run reports while it runs."""

    def start(self, arm: str, total: int) -> None:
        """An arm begins; it will send ``total`` requests."""

    def advance(self) -> None:
        """A request of the arm was answered."""

    def finish(self) -> None:
        """The arm ended, or the run did."""


class SilentProgress:
    """Report nothing."""

    def start(self, arm: str, total: int) -> None: ...

    def advance(self) -> None: ...

    def finish(self) -> None: ...


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s")


class BarProgress:
    """A rich bar an arm, with rate and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bar: RichBars | None = None

    def start(self, arm: str, total: int) -> None:
        self._bar = RichBars(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
        )
        self._bar.add_task(arm, total=total)
        self._bar.start()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class PlainProgress:
    """A line when an arm begins and ends, and every ``interval_s`` between."""

    def __init__(self, stream: TextIO, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._arm: str | None = None
        self._total = self._done = 0
        self._started = self._told = 0.0

    def start(self, arm: str, total: int) -> None:
        self._arm, self._total, self._done = arm, total, 0
        self._started = self._told = self._clock()
        self._say(f"{arm}: {total} requests")

    def advance(self) -> None:
        self._done += 1
        now = self._clock()
        if now - self._told >= self._interval_s and self._done < self._total:
            self._told = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            self._say(f"{self._arm}: {self._done} of {self._total}, {rate:.1f} requests/s, {left:.0f} s left")

    def finish(self) -> None:
        if self._arm is not None:
            self._say(f"{self._arm}: {self._done} of {self._total} in {self._clock() - self._started:.1f} s")
            self._arm = None

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def choose_progress(stream: TextIO | None = None) -> Progress:
    """A bar where the stream (standard error by default) is a terminal, plain lines where not."""
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else PlainProgress(stream)
