"""Ctrl-C and SIGTERM as an event, so that what was found until then is still reported."""

import asyncio
import contextlib
import signal


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set from now on in place of ending the process. Call it in a running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows' event loops take no signal handlers
            loop.add_signal_handler(number, stop.set)
    return stop
