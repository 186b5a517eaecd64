"""What was sent and what came back, in the order of the answers."""

import pickle
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

from vllm_deterministic.verify.compare import logprob_digest, output_digest
from vllm_deterministic.verify.completion import Choice, Completion
from vllm_deterministic.verify.metrics import Counters
from vllm_deterministic.verify.workload import Planned

_AT_HAND = 100  # distinct answers of an arm; what a deterministic server gives is far fewer


@dataclass(frozen=True, slots=True)
class Held:
    """The choices of one distinct answer, packed where there are many: a server may answer each time otherwise."""

    _content: tuple[Choice, ...] | bytes

    @classmethod
    def of(cls, choices: tuple[Choice, ...], *, packed: bool) -> "Held":
        """Hold choices as they are, or in about a tenth of the memory."""
        return cls(zlib.compress(pickle.dumps(choices), 1) if packed else choices)

    def choices(self) -> tuple[Choice, ...]:
        """What is held."""
        if isinstance(self._content, tuple):
            return self._content
        choices: tuple[Choice, ...] = pickle.loads(zlib.decompress(self._content))
        return choices


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answered request. Times are seconds since the run began.

    ``completion`` is without its choices: those are ``held``, by equal answers in common, and by a neighbour, which is
    compared with none, not at all. A neighbour's digests are empty.
    """

    planned: Planned
    key: str
    phase: str
    sent_s: float
    finished_s: float
    completion: Completion
    output_tokens: int
    output_digest: str
    logprob_digest: str
    held: Held

    def whole(self) -> Completion:
        """The answer with its choices."""
        return replace(self.completion, choices=self.held.choices())


_NOTHING = Held(())


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
    _held: dict[str, Held] = field(default_factory=dict)  # by logprob digest

    def add(
        self, planned: Planned, key: str, phase: str, sent_s: float, finished_s: float, completion: Completion
    ) -> None:
        """Keep an answer."""
        digests, held = ("", ""), _NOTHING
        if planned.compared:
            digests = output_digest(completion), logprob_digest(completion)
            if digests[1] not in self._held:
                self._held[digests[1]] = Held.of(completion.choices, packed=len(self._held) >= _AT_HAND)
            held = self._held[digests[1]]
        told = replace(completion, choices=(), prompt_token_ids=None)
        tokens = completion.output_tokens
        self.exchanges.append(Exchange(planned, key, phase, sent_s, finished_s, told, tokens, *digests, held))

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
