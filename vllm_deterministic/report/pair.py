"""Two runs side by side: what both measured, where they were set up differently, whether their answers agree."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_deterministic.report.numbers import number
from vllm_deterministic.report.view import ArmView, RunView
from vllm_deterministic.verify.record import ArmRecord, RunRecord

_APART = {"run", "server", "--base-url"}  # of the environment: other in any two runs


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of one arm in both runs, and how the second relates to the first where that says something."""

    measure: str
    left: str
    right: str
    ratio: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the requests that both runs sent, how many have references equal in tokens, and in logprobs too."""

    requests: int
    same_tokens: int
    same_bytes: int

    @property
    def sentence(self) -> str:
        """All of it in words."""
        if not self.requests:
            return (
                "The runs have no request in common, so their answers cannot be compared; "
                "model name, --seed and --max-tokens are part of a request."
            )
        return (
            f"Both runs sent {_requests(self.requests)} in common; {self.same_bytes} got the same bytes in both, "
            f"{self.same_tokens} the same tokens."
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs and what a reader calls them."""

    left: RunRecord
    right: RunRecord
    names: tuple[str, str]

    @property
    def arm_names(self) -> list[str]:
        """The arms of either run, in the order of the first."""
        return list(dict.fromkeys(arm.name for run in (self.left, self.right) for arm in run.arms))

    def arms(self, name: str) -> tuple[ArmRecord | None, ArmRecord | None]:
        """The arm of that name in each run, None where it did not run."""
        left, right = ({arm.name: arm for arm in run.arms}.get(name) for run in (self.left, self.right))
        return left, right

    def rows(self, name: str) -> list[Row]:
        """What an arm measured in each run."""
        left, right = (None if arm is None else ArmView(arm) for arm in self.arms(name))
        return [_row(measure, of, ratio, left, right) for measure, (of, ratio) in _MEASURES.items()]

    @property
    def agreement(self) -> Agreement:
        """Whether the runs give the same request the same answer."""
        left, right = _references(self.left), _references(self.right)
        common = left.keys() & right.keys()
        return Agreement(
            requests=len(common),
            same_tokens=sum(left[key][0] == right[key][0] for key in common),
            same_bytes=sum(left[key] == right[key] for key in common),
        )

    @property
    def one_fingerprint(self) -> bool:
        """Whether all answers of both runs carry one system fingerprint: only then equal bytes are promised."""
        told = {*self.left.server.system_fingerprints, *self.right.server.system_fingerprints}
        return len(told) == 1 and all(run.server.system_fingerprints for run in (self.left, self.right))

    @property
    def set_apart(self) -> list[tuple[str, str, str]]:
        """What environment and settings have in which the runs differ, as (name, first, second)."""
        left, right = (dict(RunView(run).environment + RunView(run).settings) for run in (self.left, self.right))
        names = [name for name in left | right if name not in _APART]
        return [
            (name, left.get(name, "–"), right.get(name, "–")) for name in names if left.get(name) != right.get(name)
        ]


def names_of(left: Path, right: Path) -> tuple[str, str]:
    """What to call two records: their file names without the ending, and with their folders where these are equal."""
    if left.stem != right.stem:
        return left.stem, right.stem
    return (str(left), str(right)) if left != right else (f"{left} (1)", f"{right} (2)")


_Of = Callable[[ArmView], float | str | None]
_MEASURES: dict[str, tuple[_Of, bool]] = {
    "result": (lambda arm: arm.result, False),
    "unique outputs": (lambda arm: arm.record.unique_outputs, False),
    "unique logprobs": (lambda arm: arm.record.unique_logprobs, False),
    "differing answers": (lambda arm: f"{arm.record.divergent} of {arm.record.compared}", False),
    "requests/s": (lambda arm: arm.requests_per_s, True),
    "tokens/s": (lambda arm: arm.tokens_per_s, True),
    "latency p50, s": (lambda arm: arm.record.latency.p50 if arm.record.latency else None, True),
    "latency p99, s": (lambda arm: arm.record.latency.p99 if arm.record.latency else None, True),
}


def _row(measure: str, of: _Of, ratio: bool, left: ArmView | None, right: ArmView | None) -> Row:
    values = [None if arm is None else of(arm) for arm in (left, right)]
    first, second = values
    related = (
        f"{second / first:.2f}" if ratio and isinstance(first, float) and isinstance(second, float) and first else ""
    )
    texts = [value if isinstance(value, str) else number(value) for value in values]
    return Row(measure, texts[0], texts[1], related)


def _references(run: RunRecord) -> dict[str, tuple[str, str]]:
    """The digests of the reference of each request, by key."""
    return {
        group.key: (group.variants[0].output_digest, group.variants[0].logprob_digest)
        for arm in run.arms
        for group in arm.groups
    }


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"
