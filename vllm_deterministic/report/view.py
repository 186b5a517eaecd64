"""What both HTML reports and the Markdown one say of a run, worked out from its record."""

import json
from dataclasses import dataclass
from functools import cached_property

from vllm_deterministic.report.partings import Parting, different, has_reference_output, parting
from vllm_deterministic.verify.record import ArmRecord, RunRecord

_PURPOSE = {
    "identical": "One request again and again, as many at once as allowed.",
    "mixed": "The same request among strangers of random length, sampling and arrival.",
    "prefix": "Prompts around block, split and chunk boundaries, from a cold and a warm prefix cache; conversations.",
    "sampled": "Random sampling: the same seed, the same bytes; other seeds, other outputs.",
}


@dataclass(frozen=True, slots=True)
class Shares:
    """How many compared answers have the reference's bytes, its tokens alone, or other tokens."""

    same: int
    logprobs: int
    tokens: int

    @property
    def sentence(self) -> str:
        """All of it in words."""
        compared = self.same + self.logprobs + self.tokens
        if not compared:
            return "nothing was compared"
        if self.same == compared:
            return f"all {compared} answers agree"
        parts = [f"{self.same} of {compared} answers agree"]
        parts += [f"{self.logprobs} differ in logprobs alone"] if self.logprobs else []
        parts += [f"{self.tokens} differ in their output"] if self.tokens else []
        return ", ".join(parts)


@dataclass(frozen=True)
class ArmView:
    """An arm and what follows from it."""

    record: ArmRecord

    @property
    def purpose(self) -> str:
        """What the arm does, in a sentence."""
        return _PURPOSE.get(self.record.name, "")

    @property
    def result(self) -> str:
        """The status, and how far an unfinished arm came."""
        record = self.record
        unfinished = record.answered + record.refused < record.planned
        return f"{record.status}, {record.answered} of {record.planned}" if unfinished else record.status

    @cached_property
    def shares(self) -> Shares:
        """The compared answers by how they differ."""
        counts = {True: 0, False: 0}
        for group, variant in different(self.record):
            counts[has_reference_output(group, variant)] += variant.count
        return Shares(self.record.compared - counts[True] - counts[False], counts[True], counts[False])

    @property
    def variants(self) -> int:
        """How many distinct answers are not the reference."""
        return len(different(self.record))

    def partings(self, most: int) -> list[Parting]:
        """The first ``most`` of them, side by side with their references."""
        return [parting(group, variant) for group, variant in different(self.record)[:most]]

    @property
    def requests_per_s(self) -> float | None:
        """Answers a second, neighbours included; None of an arm that took no time."""
        return self.record.answered / self.record.duration_s if self.record.duration_s else None

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens a second, neighbours included."""
        return self.record.output_tokens / self.record.duration_s if self.record.duration_s else None


@dataclass(frozen=True)
class RunView:
    """A run and what follows from it."""

    record: RunRecord

    @cached_property
    def arms(self) -> list[ArmView]:
        """The arms that ran."""
        return [ArmView(arm) for arm in self.record.arms]

    @property
    def timed(self) -> list[ArmView]:
        """The arms that have a latency."""
        return [arm for arm in self.arms if arm.record.latency is not None]

    @property
    def tiles(self) -> list[tuple[str, int, int]]:
        """The run in five numbers, as (name, value, highest value that breaks no promise)."""
        arms = self.record.arms
        compared = sum(arm.compared for arm in arms)
        neighbours = sum(arm.answered for arm in arms) - compared
        return [
            ("answers compared", compared, compared),
            ("answers that differ", sum(arm.divergent for arm in arms), 0),
            ("unique outputs", max((arm.unique_outputs for arm in arms), default=0), 1),
            ("unique logprobs", max((arm.unique_logprobs for arm in arms), default=0), 1),
            ("neighbours", neighbours, neighbours),
        ]

    @property
    def environment(self) -> list[tuple[str, str]]:
        """Server, model, fingerprint and client, as (name, value)."""
        server, client, untold = self.record.server, self.record.client, "not told"
        return [
            ("system fingerprint", ", ".join(server.system_fingerprints) or untold),
            ("server", server.base_url + server.endpoint),
            ("model", server.model or "unknown"),
            ("server version", server.version or untold),
            ("context", f"{server.max_model_len:,} tokens" if server.max_model_len else untold),
            ("KV block size", f"{server.block_size} tokens" if server.block_size else untold),
            ("compared by", {True: "token ids", False: "texts", None: "nothing"}[server.tells_token_ids]),
            ("client", f"vllm-deterministic {client.version}, Python {client.python}, {client.platform}"),
            *self.record.metadata.items(),
            ("run", self.record.run_id),
        ]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """The settings as the command line names them."""
        return [
            ("--" + name.replace("_", "-"), value if isinstance(value, str) else json.dumps(value))
            for name, value in self.record.settings.items()
        ]
