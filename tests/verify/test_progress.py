import io

from vllm_deterministic.verify.progress import BarProgress, PlainProgress, choose_progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_tell_rate_and_time_left_now_and_then() -> None:
    now = 0.0
    stream = io.StringIO()
    progress = PlainProgress(stream, interval_s=10, clock=lambda: now)
    progress.start("identical", 100)
    for _ in range(50):
        now += 0.5
        progress.advance()
    progress.finish()
    progress.finish()
    assert stream.getvalue().splitlines() == [
        "identical: 100 requests",
        "identical: 20 of 100, 2.0 requests/s, 40 s left",
        "identical: 40 of 100, 2.0 requests/s, 30 s left",
        "identical: 50 of 100 in 25.0 s",
    ]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    assert isinstance(choose_progress(_Terminal()), BarProgress)
    assert isinstance(choose_progress(io.StringIO()), PlainProgress)


def test_the_bar_shows_arm_count_and_rate() -> None:
    stream = _Terminal()
    progress = BarProgress(stream)
    for arm in ("identical", "mixed"):
        progress.start(arm, 3)
        for _ in range(3):
            progress.advance()
        progress.finish()
    assert "identical" in stream.getvalue()
    assert "mixed" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "/s" in stream.getvalue()
