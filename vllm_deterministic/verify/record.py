"""The run record: the one document a verification leaves, and what every report is made from.

The schema is versioned by ``schema_version``: the major number grows when a reader of the old form could misread the
new one, the minor when fields are added. docs/run-record.md describes it; the JSON schema ships beside the reports.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.1"

Status = Literal["identical", "diverged", "error", "interrupted"]
EXIT_CODES: dict[Status, int] = {"identical": 0, "diverged": 1, "error": 2, "interrupted": 2}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class TokenRecord(_Part):
    """The logprob of one output token and of the top candidates at its place, in the server's order."""

    token: str
    logprob: float | None
    top: list[tuple[str, float]]


class ChoiceRecord(_Part):
    """One of the n choices of an answer."""

    text: str
    token_ids: list[int] | None = Field(description="null where the server tells no token ids")
    finish_reason: str | None
    logprobs: list[TokenRecord] | None


class DifferenceRecord(_Part):
    """Where an answer parts from the reference; positions count output tokens from 0."""

    choice: int
    position: int | None = Field(description="first differing token; null where the tokens agree")
    logprob_position: int | None = Field(description="first differing logprob record; null where they agree")
    reference_token: str | None
    token: str | None
    gap: float | None = Field(
        description="logprob gap between the two candidates at position, where the server sent it"
    )
    logprob_delta: float | None = Field(description="largest change of one candidate's logprob at logprob_position")


class DivergentRequest(_Part):
    """A request that did not get the reference answer, and the ids of those in flight while it was."""

    id: str
    beside: list[str]


class VariantRecord(_Part):
    """One of the distinct answers a request got.

    The reference is the one it got most often in the first arm that sent it.
    """

    output_digest: str = Field(description="SHA-256 of token ids (or text) and finish reasons")
    logprob_digest: str = Field(description="SHA-256 of the same and of the bits of all logprobs")
    count: int = Field(description="answers of this arm; 0 for a reference that only an earlier arm saw")
    choices: list[ChoiceRecord] = Field(description="empty beyond the 100 most frequent variants of a request")
    difference: DifferenceRecord | None = Field(description="null for the reference")
    requests: list[DivergentRequest] = Field(description="empty for the reference")


class RequestGroup(_Part):
    """All times one request was sent in an arm: the same body, hence the same answer."""

    key: str = Field(description="identity of the request body, the cache salt left out")
    prompt: str = Field(description="the start of the prompt")
    prompt_tokens: int | None
    sampling: dict[str, Any]
    count: int
    variants: list[VariantRecord] = Field(description="the reference first, then by falling count")


class Failure(_Part):
    """A broken promise, in words."""

    kind: Literal["outputs_differ", "logprobs_differ", "seeds_have_no_effect", "choices_are_equal"]
    message: str


class RequestRecord(_Part):
    """One answered request, compared or a neighbour. Times are seconds since the run began."""

    id: str
    key: str
    compared: bool
    sent_s: float
    finished_s: float
    output_tokens: int
    cached_tokens: int | None


class PhaseRecord(_Part):
    """One phase of an arm. Counters are the server's own, null where it has none; other clients of it count in as
    well.
    """

    name: str
    requests: int
    prefix_cache_queries: int | None = Field(description="prompt tokens looked up in the prefix cache")
    prefix_cache_hits: int | None = Field(description="of these, found there")
    cached_tokens: int | None = Field(description="sum of usage.prompt_tokens_details.cached_tokens, where told")
    preemptions: int | None


class Latency(_Part):
    """Seconds from sending a request to its whole answer."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class ArmRecord(_Part):
    """One arm: what it sent, what came back, what it found."""

    name: str
    status: Literal["identical", "diverged", "incomplete"]
    planned: int
    answered: int
    compared: int = Field(description="answers that were compared; the rest were neighbours")
    refused: int = Field(description="neighbours that the server refused with 400 or 422")
    distinct_requests: int
    unique_outputs: int = Field(
        description="most distinct outputs any one request got, an earlier arm's reference included; 1 is the promise"
    )
    unique_logprobs: int = Field(description="the same for outputs together with their logprobs")
    divergent: int = Field(description="answers that are not the reference")
    failures: list[Failure]
    duration_s: float
    output_tokens: int
    latency: Latency | None
    phases: list[PhaseRecord]
    groups: list[RequestGroup]
    requests: list[RequestRecord]


class ServerRecord(_Part):
    """What the server told of itself."""

    base_url: str
    endpoint: str
    model: str | None
    version: str | None
    max_model_len: int | None
    block_size: int | None
    system_fingerprints: list[str]
    vllm_request_fields: bool | None
    tells_token_ids: bool | None


class ClientRecord(_Part):
    """What sent the requests."""

    version: str
    python: str
    platform: str


class RunRecord(_Part):
    """A whole verification."""

    schema_version: Annotated[str, Field(pattern=r"^1\.\d+$")] = SCHEMA_VERSION
    run_id: str
    status: Status
    message: str = Field(description="the verdict in a sentence, or why there is none")
    started_at: datetime
    duration_s: float
    command: str = Field(description="how to repeat the run")
    settings: dict[str, Any]
    metadata: dict[str, str]
    server: ServerRecord
    client: ClientRecord
    notes: list[str] = Field(description="what a reader must know to judge the verdict")
    arms: list[ArmRecord]

    @property
    def exit_code(self) -> int:
        """0 identical, 1 diverged, 2 could not run to the end."""
        return EXIT_CODES[self.status]

    def arm(self, name: str) -> ArmRecord:
        """The arm of that name. Raises KeyError where it did not run."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)
