"""Turn a request into the settings of the verifying half, within what the service allows."""

import math

from vllm_deterministic.service.schema import VerificationRequest
from vllm_deterministic.service.settings import ServiceSettings, Target
from vllm_deterministic.verify import identical, mixed, prefix, sampled
from vllm_deterministic.verify.settings import Settings
from vllm_deterministic.verify.workload import Site

_ARMS = {
    "identical": ("num_prompts", identical.count),
    "mixed": ("mixed_prompts", mixed.count),
    "prefix": ("prefix_rounds", prefix.count),
    "sampled": ("sampled_prompts", sampled.count),
}


class BeyondLimits(ValueError):  # noqa: N818 - named after what happened
    """A request asks for what the service does not allow. ``field`` is the one to change."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def choose_targets(request: VerificationRequest, settings: ServiceSettings) -> list[Target]:
    """The targets that the request names. Raises BeyondLimits for a name that is none."""
    known = {target.name: target for target in settings.target}
    names = request.targets if request.targets is not None else list(known)
    for name in names:
        if name not in known:
            raise BeyondLimits("targets", f"no target has this name; there are {', '.join(known)}")
    return [known[name] for name in names]


def check_limits(request: VerificationRequest, settings: ServiceSettings) -> None:
    """Raise BeyondLimits where the request goes beyond the service's limits."""
    for field, limit in (("max_tokens", settings.max_tokens), ("max_concurrency", settings.max_concurrency)):
        if getattr(request, field) > limit:
            raise BeyondLimits(field, f"this service allows at most {limit} (--{field.replace('_', '-')})")
    arms = plan(request, settings.target[0], settings)
    counts = {_ARMS[arm][0]: _ARMS[arm][1](arms, Site()) for arm in dict.fromkeys(request.arms)}
    if sum(counts.values()) > settings.max_requests:
        raise BeyondLimits(
            max(counts, key=lambda field: counts[field]),
            f"the verification would send up to {sum(counts.values())} requests to a target, "
            f"and this service allows {settings.max_requests} (--max-requests)",
        )


def plan(request: VerificationRequest, target: Target, settings: ServiceSettings) -> Settings:
    """What the verifying half is to do on one target."""
    given = request.model_dump(exclude={"targets", "keep_prompts", "request_rate"})
    return Settings(
        base_url=target.url,
        model=target.model,
        api_key=settings.key_of(target),
        request_rate=request.request_rate or math.inf,
        **given,
    )


def scheduled_request(settings: ServiceSettings) -> VerificationRequest:
    """The small verification that the schedule runs, within the share of the targets' capacity."""
    concurrency = settings.scheduled_concurrency
    return VerificationRequest(
        arms=["identical", "mixed", "sampled"],
        num_prompts=max(16, concurrency),
        mixed_prompts=8,
        sampled_prompts=48,
        max_concurrency=concurrency,
    )
