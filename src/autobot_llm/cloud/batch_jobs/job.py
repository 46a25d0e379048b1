"""What is known of a batch job: its parts, how far each is, and what a request came to. Knows no provider, no store.

A job of ours is one or more batches of the provider's, its parts: providers bound a batch's requests and bytes, and
want requests of one kind in it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from autobot_llm.errors import LLMError

PartState = Literal["unsent", "unconfirmed", "running", "ended", "refused", "withdrawn"]
JobState = Literal["unfinished", "running", "ended", "fetched"]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One batch of the provider's. Times are in seconds since 1970, money in US dollars.

    `intent_at` is when a step was begun whose outcome is not written down yet, and `begun_at` when it was tried first;
    where a process ended then, the provider has to be asked. `model` is empty where they are mixed. `status` is the
    provider's own word. `failure` says why it took none of the part, or why it gave the whole of it up. `is_withdrawn`:
    cancelled before it was sent. `costs` are dollars spent and saved, by model, once the results are fetched.
    """

    job: str
    number: int
    url: str
    model: str
    headers: dict[str, str]
    num_items: int
    num_bytes: int
    begun_at: float | None = None
    intent_at: float | None = None
    file_id: str | None = None
    batch_id: str | None = None
    has_ended: bool = False
    is_withdrawn: bool = False
    status: str = ""
    num_done: int = 0
    num_failed: int = 0
    result_files: tuple[str, ...] = ()
    failure: str = ""
    fetched_at: float | None = None
    costs: dict[str, tuple[float, float]] = msgspec.field(default_factory=dict)
    num_unpriced: int = 0

    @property
    def name(self) -> str:
        """What the part is called at the provider, in file names and notes."""
        return f"autobot-{self.job}-{self.number}"

    @property
    def state(self) -> PartState:
        if self.batch_id is not None:
            return "ended" if self.has_ended else "running"
        if self.failure:
            return "refused"
        if self.intent_at is not None:
            return "unconfirmed"
        return "withdrawn" if self.is_withdrawn else "unsent"

    @property
    def is_settled(self) -> bool:
        """Whether nothing more will happen to it at the provider."""
        return self.state in ("ended", "refused", "withdrawn")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job. `reserved` is what it may cost at most, as far as is known, until its results are fetched.

    It counts nothing for the models in `unpriced`, and a request without `max_tokens` by its prompt only.
    """

    id: str
    created: float
    provider: str
    address: str
    source: str
    digest: str
    num_items: int
    reserved: float
    is_cancelled: bool = False
    unpriced: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def state(self) -> JobState:
        """unfinished: not all of it is at the provider yet, or nobody knows; ended: its results can be fetched."""
        if any(part.state in ("unsent", "unconfirmed") for part in self.parts):
            return "unfinished"
        if any(part.state == "running" for part in self.parts):
            return "running"
        if all(part.fetched_at is not None for part in self.parts):
            return "fetched"
        return "ended"

    @property
    def num_done(self) -> int:
        """Requests that need no more waiting for."""
        return sum(part.num_items if part.is_settled else part.num_done for part in self.parts)

    @property
    def num_failed(self) -> int:
        """As far as the provider tells before the results are fetched."""
        return sum(part.num_items if part.state == "refused" else part.num_failed for part in self.parts)

    @property
    def costs(self) -> dict[str, tuple[float, float]]:
        """Dollars spent and saved, by model."""
        sums: dict[str, tuple[float, float]] = {}
        for part in self.parts:
            for model, (spent, saved) in part.costs.items():
                before = sums.get(model, (0.0, 0.0))
                sums[model] = before[0] + spent, before[1] + saved
        return sums

    @property
    def spent(self) -> float:
        return sum(spent for spent, _ in self.costs.values())

    @property
    def saved(self) -> float:
        return sum(saved for _, saved in self.costs.values())

    def summary(self) -> dict[str, Any]:
        """The job as one JSON object."""
        fields = msgspec.to_builtins(self)
        figures = ("state", "num_done", "num_failed", "costs", "spent", "saved")
        fields |= {name: getattr(self, name) for name in figures}
        fields["parts"] = [msgspec.to_builtins(part) | {"state": part.state} for part in self.parts]
        return fields  # type: ignore[no-any-return]


class ItemError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request has no answer; `code` is the provider's, or one of batch_expired, batch_cancelled, batch_failed,
    batch_refused and missing_result.
    """

    code: str
    message: str


class ItemResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one request came to. `body` is the answer in OpenAI's shape, or what the provider says instead of one."""

    custom_id: str
    id: str | None = None
    status_code: int | None = None
    request_id: str | None = None
    body: msgspec.Raw | None = None
    error: ItemError | None = None

    def line(self) -> bytes:
        """The result as a line of OpenAI's output files, without the line end; `error` is set wherever it failed."""
        response = None
        if self.status_code is not None:
            response = {"status_code": self.status_code, "request_id": self.request_id, "body": self.body}
        return msgspec.json.encode(
            {"id": self.id, "custom_id": self.custom_id, "response": response, "error": self.error}
        )

    @property
    def answer(self) -> dict[str, Any]:
        """The decoded body of an answer. Raises LLMError with the request's own error where there is none."""
        if self.error is not None or self.body is None:
            error = self.error or ItemError(code="missing_result", message="there is no answer")
            raise LLMError(f"{self.custom_id}: {error.message}", code=error.code)
        return msgspec.json.decode(self.body, type=dict[str, Any])


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a piece of work is: `phase` in words, and how many of how many (0: nobody knows)."""

    phase: str
    num_done: int
    num_total: int
