"""An error that comes in place of the rest of an answer. Knows that there is one; what it means, the transport says."""

from __future__ import annotations


class ErrorInStream(Exception):
    """`body` is the error's JSON, as a reply would have had it, and `status` the HTTP status of such a reply."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(body.decode("utf-8", "replace"))
        self.status = status
        self.body = body
