"""Hold replicas against each other: the same fingerprint and, for the same request, the same bytes are expected."""

from collections import Counter
from collections.abc import Mapping

from vllm_deterministic.service.schema import ReplicaDifference, ReplicaResult
from vllm_deterministic.verify.compare import compare
from vllm_deterministic.verify.completion import Choice, Completion, TokenLogprob
from vllm_deterministic.verify.record import ChoiceRecord, RunRecord, VariantRecord

_SHOWN = 20  # differences spelled out


def compare_replicas(records: Mapping[str, RunRecord]) -> ReplicaResult:
    """Compare the run records of two targets or more, by target.

    Each target speaks with the answer it gave most often to a request. Where targets disagree, the answer of most of
    them is the reference, of equally many the one of the first target.
    """
    answers = {target: _answers(record) for target, record in records.items()}
    shared = [key for key in next(iter(answers.values())) if all(key in told for told in answers.values())]
    differences = [found for key in shared for found in _differences(key, answers)]
    fingerprints = {target: record.server.system_fingerprints for target, record in records.items()}
    agree = len({tuple(told) for told in fingerprints.values()}) == 1
    if differences:
        status = "diverged"
        differing = len({difference.request for difference in differences})
        message = (
            f"{_targets(differences)} answered {differing} of {_requests(shared)} otherwise than the other targets."
        )
    elif not shared:
        status, message = "incomplete", "No request was answered by all targets, so they cannot be compared."
    else:
        status, message = "identical", f"The targets agree on the usual answer to each of {_requests(shared)}."
    if not agree:
        told = "; ".join(f"{target} has {', '.join(names) or 'none'}" for target, names in fingerprints.items())
        message += f" Their fingerprints differ, and equal bytes are promised within one alone: {told}."
    return ReplicaResult.model_validate(
        {
            "status": status,
            "message": message,
            "fingerprints_agree": agree,
            "compared_requests": len(shared),
            "differing": len(differences),
            "differences": differences[:_SHOWN],
        }
    )


def _answers(record: RunRecord) -> dict[str, VariantRecord]:
    """The reference answer to each request, by the key of the request."""
    answers: dict[str, VariantRecord] = {}
    for arm in record.arms:
        for group in arm.groups:
            answers.setdefault(group.key, group.variants[0])
    return answers


def _differences(key: str, answers: Mapping[str, Mapping[str, VariantRecord]]) -> list[ReplicaDifference]:
    digests = {target: told[key].logprob_digest for target, told in answers.items()}
    usual = Counter(digests.values()).most_common(1)[0][0]
    reference = next(target for target, digest in digests.items() if digest == usual)
    expected = _completion(answers[reference][key])
    found = []
    for target, digest in digests.items():
        difference = compare(expected, _completion(answers[target][key])) if digest != usual else None
        if difference is not None:
            found.append(
                ReplicaDifference(
                    target=target,
                    reference=reference,
                    request=key,
                    choice=difference.choice,
                    position=difference.position,
                    logprob_position=difference.logprob_position,
                    gap=difference.gap,
                    logprob_delta=difference.logprob_delta,
                )
            )
    return found


def _requests(keys: list[str]) -> str:
    return "1 distinct request" if len(keys) == 1 else f"{len(keys)} distinct requests"


def _targets(differences: list[ReplicaDifference]) -> str:
    return ", ".join(dict.fromkeys(difference.target for difference in differences))


def _completion(variant: VariantRecord) -> Completion:
    return Completion(choices=tuple(_choice(choice) for choice in variant.choices))


def _choice(choice: ChoiceRecord) -> Choice:
    return Choice(
        text=choice.text,
        token_ids=tuple(choice.token_ids) if choice.token_ids is not None else None,
        finish_reason=choice.finish_reason,
        logprobs=tuple(TokenLogprob(entry.token, entry.logprob, tuple(entry.top)) for entry in choice.logprobs)
        if choice.logprobs is not None
        else None,
    )
