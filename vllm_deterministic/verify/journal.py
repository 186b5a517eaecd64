"""What was sent and what came back, in the order of the answers."""

from collections import Counter
from dataclasses import dataclass, field

from vllm_deterministic.verify.compare import logprob_digest, output_digest
from vllm_deterministic.verify.completion import Completion
from vllm_deterministic.verify.metrics import Counters
from vllm_deterministic.verify.workload import Planned


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answered request. Times are seconds since the run began."""

    planned: Planned
    key: str
    phase: str
    sent_s: float
    finished_s: float
    completion: Completion
    output_digest: str
    logprob_digest: str

    @classmethod
    def of(
        cls, planned: Planned, key: str, phase: str, sent_s: float, finished_s: float, completion: Completion
    ) -> "Exchange":
        """Make one, with the digests of the answer."""
        digests = output_digest(completion), logprob_digest(completion)
        return cls(planned, key, phase, sent_s, finished_s, completion, *digests)


@dataclass(slots=True)
class ArmJournal:
    """The exchanges of one arm, and the server's counters per phase."""

    name: str
    planned: int
    started_s: float
    finished_s: float
    complete: bool = False
    refused: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    counters: dict[str, Counters] = field(default_factory=dict)

    def count(self, phase: str, change: Counters) -> None:
        """Add to a phase what the server's counters grew by."""
        earlier = self.counters.get(phase, Counters(0, 0, 0))
        self.counters[phase] = earlier + change


@dataclass(slots=True)
class Journal:
    """All arms of a run."""

    arms: list[ArmJournal] = field(default_factory=list)

    def references(self) -> dict[str, Exchange]:
        """For each request, the answer it got most often in the first arm that sent it; of equally frequent ones, the
        first.
        """
        references: dict[str, Exchange] = {}
        for arm in self.arms:
            counts: dict[str, Counter[str]] = {}
            firsts: dict[tuple[str, str], Exchange] = {}
            for exchange in arm.exchanges:
                if exchange.planned.compared and exchange.key not in references:
                    counts.setdefault(exchange.key, Counter())[exchange.logprob_digest] += 1
                    firsts.setdefault((exchange.key, exchange.logprob_digest), exchange)
            references |= {key: firsts[key, counter.most_common(1)[0][0]] for key, counter in counts.items()}
        return references
