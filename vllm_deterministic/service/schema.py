"""The bodies of the service's requests and answers."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_deterministic.verify.settings import ARMS, ArmName

Status = Literal["queued", "running", "identical", "diverged", "error", "interrupted", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "running")
Trigger = Literal["request", "schedule"]
Concurrency = Annotated[int, Field(ge=1, le=100_000, strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VerificationRequest(_Body):
    """What to verify. Every field has a default; the service's own limits are lower than those given here."""

    targets: list[str] | None = Field(
        default=None, min_length=1, max_length=100, description="names of targets; null: all, compared with each other"
    )
    arms: list[ArmName] = Field(default=list(ARMS), min_length=1, max_length=len(ARMS))
    seed: int = Field(default=0, ge=0, le=2**31 - 1, strict=True, description="prompts and seeds follow from it")
    num_prompts: int = Field(default=100, ge=2, le=100_000, strict=True, description="requests of the arm identical")
    mixed_prompts: int = Field(
        default=20, ge=2, le=10_000, strict=True, description="times the arm mixed sends its target, beside neighbours"
    )
    prefix_rounds: int = Field(default=1, ge=1, le=100, strict=True, description="about 100 requests each")
    sampled_prompts: int = Field(default=48, ge=4, le=100_000, strict=True, description="requests of the arm sampled")
    max_concurrency: Concurrency = Field(default=32, description="most requests at a time on one target")
    request_rate: float | None = Field(
        default=None, gt=0, le=1e6, strict=True, description="requests per second; null: as fast as answers come"
    )
    max_tokens: int = Field(default=16, ge=4, le=100_000, strict=True, description="tokens of each compared answer")
    logprobs: int = Field(default=5, ge=0, le=20, strict=True, description="top logprobs to compare; 0: tokens alone")
    ignore_eos: bool = Field(default=False, strict=True, description="let no answer end early (a field of vLLM's)")
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = "/v1/completions"
    timeout: float = Field(default=120, gt=0, le=600, strict=True, description="seconds that one answer may take")
    keep_prompts: bool = Field(default=False, strict=True, description="keep prompts themselves, not only their hashes")

    @model_validator(mode="after")
    def _no_repeats(self) -> "VerificationRequest":
        if self.targets is not None and len(set(self.targets)) < len(self.targets):
            raise ValueError("targets names one target twice")
        return self


class ArmProgress(_Body):
    """How far the current arm of a target is."""

    target: str
    arm: str
    done: int
    total: int


class ArmResult(_Body):
    """What one arm found on one target; the run record holds the rest."""

    arm: str
    status: Literal["identical", "diverged", "incomplete"]
    planned: int
    answered: int
    compared: int
    unique_outputs: int
    unique_logprobs: int
    divergent: int
    failures: list[str]
    output_tokens: int
    duration_s: float
    p50_s: float | None
    p99_s: float | None


class TargetResult(_Body):
    """What a verification found on one target."""

    target: str
    status: Literal["identical", "diverged", "error", "interrupted"]
    message: str
    model: str | None
    version: str | None
    fingerprints: list[str]
    notes: list[str]
    duration_s: float
    arms: list[ArmResult]


class ReplicaDifference(_Body):
    """A request that one target answered otherwise than most do."""

    target: str
    reference: str = Field(description="a target that gave the answer most gave")
    request: str = Field(description="identity of the request body, as in the run record")
    choice: int
    position: int | None = Field(description="first differing token; null where the tokens agree")
    logprob_position: int | None
    gap: float | None
    logprob_delta: float | None


class ReplicaResult(_Body):
    """The targets of a verification, held against each other."""

    status: Literal["identical", "diverged", "incomplete"]
    message: str
    fingerprints_agree: bool
    compared_requests: int = Field(description="distinct requests that all targets answered")
    differing: int = Field(description="answers to them that are not the one most targets gave")
    differences: list[ReplicaDifference] = Field(description="the first of these")


class Verification(_Body):
    """A verification, from the moment it was asked for."""

    id: str
    status: Status
    message: str
    trigger: Trigger
    request: VerificationRequest
    targets: list[str]
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: list[ArmProgress] = []
    results: list[TargetResult] = []
    replicas: ReplicaResult | None = Field(default=None, description="null where only one target was verified")

    @property
    def finished(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status not in UNFINISHED


class VerificationPage(_Body):
    """Verifications, the newest first."""

    items: list[Verification]
    next: int | None = Field(description="give it as `before` for the next page; null on the last")


class TargetState(_Body):
    """What a target answers now."""

    name: str
    url: str
    ready: bool
    model: str | None
    detail: str = Field(description="why it is not ready")


class TargetPage(_Body):
    """All targets, and how they are verified by themselves."""

    items: list[TargetState]
    every_s: float | None = Field(description="seconds between scheduled verifications; null: no schedule")
    next_scheduled_at: datetime | None
    scheduled_concurrency: int = Field(description="most requests that the schedule has in flight on a target")


class Health(_Body):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Ready(_Body):
    """Whether the targets answer, by name."""

    status: Literal["ready", "not ready"]
    targets: dict[str, bool]


class Version(_Body):
    """What runs."""

    version: str
    python: str


class FieldError(BaseModel):
    """What is wrong with one field of a request."""

    field: str
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []
