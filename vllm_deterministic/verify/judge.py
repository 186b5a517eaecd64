"""From what was sent and came back to what it means: one `ArmRecord` an arm."""

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import attrgetter

from vllm_deterministic.verify.compare import compare, output_digest
from vllm_deterministic.verify.completion import Choice, Completion
from vllm_deterministic.verify.journal import ArmJournal, Exchange, Journal
from vllm_deterministic.verify.record import (
    ArmRecord,
    ChoiceRecord,
    DifferenceRecord,
    DivergentRequest,
    Failure,
    Latency,
    PhaseRecord,
    RequestGroup,
    RequestRecord,
    TokenRecord,
    VariantRecord,
)

_PROMPT_SHOWN = 120  # characters
_IN_FULL = 100  # variants of a request


def judge(journal: Journal) -> list[ArmRecord]:
    """Judge every arm, finished or not. Equal requests are held against each other over all arms."""
    references = journal.references()
    return [_judge_arm(arm, references) for arm in journal.arms]


def _judge_arm(arm: ArmJournal, references: Mapping[str, Exchange]) -> ArmRecord:
    compared = [exchange for exchange in arm.exchanges if exchange.planned.compared]
    by_key: dict[str, list[Exchange]] = {}
    for exchange in sorted(compared, key=attrgetter("sent_s")):
        by_key.setdefault(exchange.key, []).append(exchange)
    timeline = _Timeline(arm.exchanges)
    groups = [_group(exchanges, references[key], timeline) for key, exchanges in by_key.items()]
    unique_outputs = max((_distinct(group, "output_digest") for group in groups), default=0)
    unique_logprobs = max((_distinct(group, "logprob_digest") for group in groups), default=0)
    divergent = sum(len(variant.requests) for group in groups for variant in group.variants)
    failures = [*_differing(groups), *_seeds_without_effect(compared), *_equal_choices(compared)]
    latencies = [exchange.finished_s - exchange.sent_s for exchange in compared]
    return ArmRecord(
        name=arm.name,
        status="diverged" if failures else "identical" if arm.complete else "incomplete",
        planned=arm.planned,
        answered=len(arm.exchanges),
        compared=len(compared),
        refused=arm.refused,
        distinct_requests=len(groups),
        unique_outputs=unique_outputs,
        unique_logprobs=unique_logprobs,
        divergent=divergent,
        failures=failures,
        duration_s=arm.finished_s - arm.started_s,
        output_tokens=sum(exchange.output_tokens for exchange in arm.exchanges),
        latency=_latency(latencies),
        phases=_phases(arm),
        groups=groups,
        requests=[_request(exchange) for exchange in sorted(arm.exchanges, key=attrgetter("sent_s"))],
    )


class _Timeline:
    """Find the requests that were in flight at the same time as another."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self._exchanges = sorted(exchanges, key=attrgetter("sent_s"))
        self._sent = [exchange.sent_s for exchange in self._exchanges]
        self._longest = max((exchange.finished_s - exchange.sent_s for exchange in exchanges), default=0.0)

    def beside(self, exchange: Exchange) -> list[str]:
        """Ids in the order of sending."""
        first = bisect_left(self._sent, exchange.sent_s - self._longest)
        last = bisect_left(self._sent, exchange.finished_s)
        return [
            other.planned.id
            for other in self._exchanges[first:last]
            if other is not exchange and other.finished_s > exchange.sent_s
        ]


def _group(exchanges: Sequence[Exchange], reference: Exchange, timeline: _Timeline) -> RequestGroup:
    by_digest: dict[str, list[Exchange]] = {reference.logprob_digest: []}
    for exchange in exchanges:
        by_digest.setdefault(exchange.logprob_digest, []).append(exchange)
    first, *others = by_digest.values()
    ordered = [first, *sorted(others, key=lambda members: -len(members))]
    answer = reference.whole()
    variants = [
        _variant(members, reference, answer, timeline, in_full=place < _IN_FULL)
        for place, members in enumerate(ordered)
    ]
    ask = exchanges[0].planned.ask
    prompt = ask.prompt if isinstance(ask.prompt, str) else str(list(ask.prompt[: _PROMPT_SHOWN // 4]))
    return RequestGroup(
        key=exchanges[0].key,
        prompt=prompt[:_PROMPT_SHOWN],
        prompt_tokens=reference.completion.prompt_tokens,
        sampling=dict(ask.sampling),
        count=len(exchanges),
        variants=variants,
    )


def _variant(
    members: Sequence[Exchange], reference: Exchange, answer: Completion, timeline: _Timeline, *, in_full: bool
) -> VariantRecord:
    """``answer`` is that of the reference."""
    first = members[0] if members else reference
    other = first.whole()
    difference = compare(answer, other)
    return VariantRecord(
        output_digest=first.output_digest,
        logprob_digest=first.logprob_digest,
        count=len(members),
        choices=[_choice(choice) for choice in other.choices] if in_full else [],
        difference=DifferenceRecord.model_validate(difference, from_attributes=True) if difference else None,
        requests=[DivergentRequest(id=member.planned.id, beside=timeline.beside(member)) for member in members]
        if difference
        else [],
    )


def _distinct(group: RequestGroup, digest: str) -> int:
    return len({getattr(variant, digest) for variant in group.variants})


def _differing(groups: Sequence[RequestGroup]) -> list[Failure]:
    failures = []
    outputs = [group for group in groups if _distinct(group, "output_digest") > 1]
    logprobs = [group for group in groups if group not in outputs and len(group.variants) > 1]
    if outputs:
        failures.append(Failure(kind="outputs_differ", message=_summary("outputs", outputs, len(groups))))
    if logprobs:
        message = _summary("logprobs (the tokens agree)", logprobs, len(groups))
        failures.append(Failure(kind="logprobs_differ", message=message))
    return failures


def _summary(what: str, differing: Sequence[RequestGroup], total: int) -> str:
    answers = sum(len(variant.requests) for group in differing for variant in group.variants)
    requests = "the request" if total == 1 else f"{len(differing)} of {total} requests"
    return f"{requests} got different {what}: {answers} of {sum(group.count for group in differing)} answers differ"


def _seeds_without_effect(compared: Sequence[Exchange]) -> list[Failure]:
    families: dict[str, dict[str, str]] = {}
    for exchange in compared:
        if exchange.planned.family is not None:
            families.setdefault(exchange.planned.family, {})[exchange.key] = exchange.output_digest
    return [
        Failure(
            kind="seeds_have_no_effect",
            message=f"seeds have no effect: {len(outputs)} different seeds gave the same output at {family}",
        )
        for family, outputs in families.items()
        if len(outputs) > 1 and len(set(outputs.values())) == 1
    ]


def _equal_choices(compared: Sequence[Exchange]) -> list[Failure]:
    equal = {
        exchange.key: exchange.planned
        for exchange in compared
        if exchange.planned.family is not None and _choices_are_equal(exchange.whole())
    }
    return [
        Failure(
            kind="choices_are_equal",
            message=f"all {planned.ask.sampling['n']} choices of a request are equal "
            f"(first in {planned.id}, {planned.family})",
        )
        for planned in list(equal.values())[:1]
    ]


def _choices_are_equal(completion: Completion) -> bool:
    single = {output_digest(Completion(choices=(choice,))) for choice in completion.choices}
    return len(completion.choices) > 1 and len(single) == 1


def _latency(seconds: Sequence[float]) -> Latency | None:
    if not seconds:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else list(seconds) * 99
    return Latency(mean=statistics.fmean(seconds), p50=cuts[49], p90=cuts[89], p99=cuts[98], max=max(seconds))


def _phases(arm: ArmJournal) -> list[PhaseRecord]:
    phases: dict[str, list[Exchange]] = {}
    for exchange in arm.exchanges:
        phases.setdefault(exchange.phase, []).append(exchange)
    records = []
    for name, exchanges in phases.items():
        counters = arm.counters.get(name)
        told = [e.completion.cached_tokens for e in exchanges if e.completion.cached_tokens is not None]
        records.append(
            PhaseRecord(
                name=name,
                requests=len(exchanges),
                prefix_cache_queries=counters.prefix_cache_queries if counters else None,
                prefix_cache_hits=counters.prefix_cache_hits if counters else None,
                cached_tokens=sum(told) if told else None,
                preemptions=counters.preemptions if counters else None,
            )
        )
    return records


def _choice(choice: Choice) -> ChoiceRecord:
    logprobs = [TokenRecord(token=e.token, logprob=e.logprob, top=list(e.top)) for e in choice.logprobs or ()]
    return ChoiceRecord(
        text=choice.text,
        token_ids=list(choice.token_ids) if choice.token_ids is not None else None,
        finish_reason=choice.finish_reason,
        logprobs=logprobs if choice.logprobs is not None else None,
    )


def _request(exchange: Exchange) -> RequestRecord:
    return RequestRecord(
        id=exchange.planned.id,
        key=exchange.key,
        compared=exchange.planned.compared,
        sent_s=round(exchange.sent_s, 6),
        finished_s=round(exchange.finished_s, 6),
        output_tokens=exchange.output_tokens,
        cached_tokens=exchange.completion.cached_tokens,
    )
