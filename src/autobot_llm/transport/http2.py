"""One HTTP/2 connection to a provider, which carries many exchanges at once. Knows frames and windows; knows no pool.

The h2 library frames, compresses headers and holds both sides to the protocol. This adds what it leaves to its user:
sending as the windows open, back-pressure for each stream alone, deadlines, the end that GOAWAY announces, and a ping
where the server has been silent. Specification: RFC 9113. Imported when a server has chosen HTTP/2, not before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import DenialOfServiceError, H2Error
from h2.settings import SettingCodes, Settings

from autobot_llm.transport.exchange import MAX_HEAD_BYTES, BrokenConnection, Request
from autobot_llm.transport.goaway import GoAway, GoAwayCutter, OversizedFrame
from autobot_llm.transport.http2_stream import STREAM_WINDOW, Stream, head_of

PING_SECONDS = 20.0  # of silence after which a server that owes an answer is asked whether it is there
PING_PATIENCE = 10.0  # seconds it may take to say so

_LARGEST_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65535
_CREDIT = 2**29  # bytes of all streams after which the connection's window is opened again
_EXPECTED_STREAMS = 100  # at once, until the server has said how many it takes; RFC 9113 advises against fewer
_MOST_STREAMS_BELIEVED = 1000
_MOST_STREAMS_EVER = 2**29  # stream numbers are finite
_WRITE_BYTES = 64 * 1024


class Connection(asyncio.Protocol):
    """A connection that carries many exchanges at once: `open` makes one while `has_room`.

    `on_change` is called when an exchange ends or the server takes more or fewer of them, and when the connection
    takes no more (`accepts` is False then); `on_lost` when it ends, whoever ends it. `close` gives up all of them.
    """

    def __init__(
        self,
        on_change: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
        *,
        ping_seconds: float = PING_SECONDS,
        ping_patience: float = PING_PATIENCE,
    ) -> None:
        self._ping_seconds = ping_seconds
        self._ping_patience = ping_patience
        self._loop = asyncio.get_running_loop()
        self._on_change = on_change
        self._on_lost = on_lost
        self._h2 = H2Connection(
            H2Configuration(client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        self._cutter = GoAwayCutter()
        self._transport: asyncio.Transport | None = None
        self._streams: set[Stream] = set()  # those that were opened and have not ended
        self._by_id: dict[int, Stream] = {}
        self._sending: dict[Stream, None] = {}  # whose body is not all sent, in the order they began
        self._is_writing_paused = False
        self._flush_handle: asyncio.Handle | None = None
        self._expected_streams = _EXPECTED_STREAMS
        self._num_uncredited = 0
        self._num_opened = 0
        self._watch: asyncio.TimerHandle | None = None
        self._pinged_at: float | None = None
        self._is_going_away = False
        self._last_word = ""
        self.accepts = True
        self.needs_http1 = False  # the server has asked for the older version
        self.is_lost = False
        self.is_kept = False  # it was there before the next exchange was asked for
        self.made_at = self._heard_at = self._idle_since = self._loop.time()
        self.expires_at = float("inf")  # by the loop's clock; the pool's to set

    @property
    def num_open(self) -> int:
        return len(self._streams)

    @property
    def has_room(self) -> bool:
        """Whether one more exchange may begin now."""
        return self.accepts and not self.is_lost and len(self._streams) < self.most_streams

    @property
    def most_streams(self) -> int:
        """How many exchanges the server takes at once, or is taken to."""
        said = self._h2.remote_settings.get(SettingCodes.MAX_CONCURRENT_STREAMS, self._expected_streams)
        return int(min(said, _MOST_STREAMS_BELIEVED))

    def expect(self, num_streams: int | None) -> None:
        """What `most_streams` is until the server says so; None leaves it at a guess."""
        if num_streams is not None:
            self._expected_streams = num_streams

    @property
    def idle_seconds(self) -> float:
        """How long ago the last exchange ended, or the connection was made; 0 while there is one."""
        return 0.0 if self._streams else self._loop.time() - self._idle_since

    def open(self) -> Stream:
        """An exchange to be sent; `leave` must be called on it."""
        assert self.has_room, "asked for a stream where there is no room"
        stream = Stream(self)
        stream.is_reused = self.is_kept
        self.is_kept = True
        self._streams.add(stream)
        self._num_opened += 1
        if self._num_opened >= _MOST_STREAMS_EVER:
            self.retire()
        return stream

    def retire(self) -> None:
        """Take no more exchanges, and close when those under way have ended."""
        self.accepts = False
        if not self._streams:
            self.close()

    def close(self) -> None:
        """Close at once."""
        self.accepts = False
        if self._transport is not None:
            self._transport.abort()

    # For Stream

    def begin(self, stream: Stream, request: Request) -> None:
        """Send the head of `request`, and as much of a body of bytes as the server lets us. Raises BrokenConnection."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise BrokenConnection("the connection was closed while it was idle", is_stale=True, is_unprocessed=True)
        if self._is_going_away:
            raise BrokenConnection("the server takes no more requests", is_stale=True, is_unprocessed=True)
        body = request.body
        try:
            stream.id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream.id, head_of(request), end_stream=not body)
        except H2Error as exc:
            raise BrokenConnection(f"the request cannot be sent: {exc}", is_stale=True, is_unprocessed=True) from exc
        self._by_id[stream.id] = stream
        stream.is_sent = not body
        if body and isinstance(body, bytes):
            self.send_body(stream, body, is_last=True)
        self._flush_soon()
        if self._watch is None:
            self._heard_at = self._loop.time()
            self._watch = self._loop.call_later(self._ping_seconds, self._look_after)

    def send_body(self, stream: Stream, data: bytes, *, is_last: bool) -> None:
        """Send `data` as the server lets us: `stream.sent` is called when the last of it has gone out."""
        stream.unsent, stream.is_last_piece = memoryview(data), is_last
        self._sending[stream] = None
        self._pump()
        self._flush_soon()

    def end_body(self, stream: Stream) -> None:
        """Say that a body is complete that was sent in pieces, when the last of them has gone out."""
        if stream.unsent is not None:
            stream.is_last_piece = True
        elif stream.id in self._by_id:
            self._h2.end_stream(stream.id)
            stream.is_sent = True
            self._flush_soon()

    def credit(self, stream: Stream, num_bytes: int) -> None:
        """Let the server send `num_bytes` more of a stream."""
        if not self.is_lost and stream.id in self._by_id and not stream.is_ended:
            self._h2.increment_flow_control_window(num_bytes, stream.id)
            self._flush_soon()

    def reset(self, stream: Stream) -> None:
        """Tell the server to stop; the connection goes on."""
        self._sending.pop(stream, None)
        if self._by_id.pop(stream.id, None) is None or self.is_lost:
            return
        if stream.is_ended and stream.is_sent:
            return
        try:
            self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
        except H2Error:
            return  # it has ended meanwhile, or the protocol has
        self._flush_soon()

    def leave(self, stream: Stream) -> None:
        self.reset(stream)
        self._streams.discard(stream)
        if not self._streams:
            self._idle_since = self._loop.time()
            if not self.accepts:
                self.close()
        self._on_change(self)

    # Sending

    def _pump(self) -> None:
        """Send what the windows, and the socket, let us of every body: a frame of each in turn."""
        while self._sending and not self._is_writing_paused:
            if not max([self._send_piece(stream) for stream in tuple(self._sending)]):  # all of them, then ask
                return

    def _send_piece(self, stream: Stream) -> bool:
        unsent = stream.unsent
        if unsent is None:
            return False
        room = min(self._h2.local_flow_control_window(stream.id), self._h2.max_outbound_frame_size, _WRITE_BYTES)
        if room <= 0 or self._is_writing_paused:
            return False
        is_last = room >= len(unsent)
        is_end = is_last and stream.is_last_piece
        self._h2.send_data(stream.id, unsent[:room], end_stream=is_end)
        stream.unsent = None if is_last else unsent[room:]
        if is_last:
            del self._sending[stream]
            stream.sent()
        else:
            self._flush()
        return True

    def _flush_soon(self) -> None:
        """What is said in one turn of the event loop goes out together."""
        if self._flush_handle is None:
            self._flush_handle = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        data = self._h2.data_to_send()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # a socket's: it reads and writes
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD_BYTES,
            },
        )
        self._h2.decoder.max_header_list_size = MAX_HEAD_BYTES
        self._h2.initiate_connection()
        # The connection's own window never holds the server back: each stream's does, so a slow reader harms no other.
        self._h2.increment_flow_control_window(_LARGEST_WINDOW - _DEFAULT_WINDOW)
        self._flush()

    def pause_writing(self) -> None:
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        self._loop.call_soon(self._go_on_sending)  # not now: this may be called within a write

    def _go_on_sending(self) -> None:
        if not self.is_lost:
            self._pump()
            self._flush()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._pinged_at = None
        try:
            data, goaways = self._cutter.feed(data)
            for event in self._h2.receive_data(data):
                self._take(event)
        except DenialOfServiceError:
            self._break(f"the answer's head is larger than {MAX_HEAD_BYTES} bytes")
            return
        except (H2Error, OversizedFrame) as exc:
            self._break(f"no valid HTTP: {exc or type(exc).__name__}")
            return
        for goaway in goaways:
            self._take_goaway(goaway)
        if self._sending:  # only now: h2 knows of everything that came, and so does every stream
            self._pump()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.accepts = False
        for handle in (self._watch, self._flush_handle):
            if handle is not None:
                handle.cancel()
        reason = f"the connection was lost: {exc or 'closed by the server'}{self._last_word}"
        for stream in tuple(self._by_id.values()):
            if not stream.is_ended:
                stream.fail(BrokenConnection(reason, is_stale=not stream.has_begun))
        self._by_id.clear()
        self._sending.clear()
        self._on_lost(self)

    # What the server says

    def _take(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._credit_connection(event.flow_controlled_length)
            if (stream := self._by_id.get(event.stream_id)) is not None:
                stream.take_data(event.data, event.flow_controlled_length, self._heard_at)
        elif isinstance(event, ResponseReceived):
            if (stream := self._by_id.get(event.stream_id)) is not None:
                stream.take_head(event.headers, self._heard_at)
        elif isinstance(event, StreamEnded):
            if (stream := self._by_id.get(event.stream_id)) is not None:
                stream.take_end()
        elif isinstance(event, StreamReset):
            self._take_reset(event)
        elif isinstance(event, WindowUpdated):
            if (stream := self._by_id.get(event.stream_id)) is not None:
                stream.hear(self._heard_at)
        elif isinstance(event, RemoteSettingsChanged):
            self._on_change(self)
        # Announcements (1xx), trailers, pings that h2 has answered, priorities, unknown frames: nothing that is needed.

    def _credit_connection(self, num_bytes: int) -> None:
        self._num_uncredited += num_bytes
        if self._num_uncredited >= _CREDIT:
            self._h2.increment_flow_control_window(self._num_uncredited)
            self._num_uncredited = 0

    def _take_reset(self, event: StreamReset) -> None:
        stream = self._by_id.pop(event.stream_id, None)
        if stream is None:
            return
        self._sending.pop(stream, None)
        stream.unsent = None
        if stream.is_ended:  # the answer is complete, and the rest of the request not wanted
            return
        code = event.error_code
        self.needs_http1 |= code == ErrorCodes.HTTP_1_1_REQUIRED
        is_unprocessed = code in (ErrorCodes.REFUSED_STREAM, ErrorCodes.HTTP_1_1_REQUIRED)
        stream.fail(BrokenConnection(f"the server gave it up: {_name_of(code)}", is_unprocessed=is_unprocessed))

    def _take_goaway(self, goaway: GoAway) -> None:
        self.accepts = False
        self._is_going_away = True
        if goaway.error_code:
            self._last_word = f" ({_name_of(goaway.error_code)}{': ' if goaway.reason else ''}{goaway.reason})"
            self.needs_http1 |= goaway.error_code == ErrorCodes.HTTP_1_1_REQUIRED
        for stream in tuple(self._by_id.values()):
            if stream.id > goaway.last_stream_id and not stream.is_ended:
                del self._by_id[stream.id]
                self._sending.pop(stream, None)
                reason = f"the server takes no more requests{self._last_word}"
                stream.fail(BrokenConnection(reason, is_unprocessed=True))
        self._on_change(self)
        if not self._streams:
            self.close()

    def _break(self, reason: str) -> None:
        """What came is no HTTP/2: nothing on this connection can be believed any more."""
        self.accepts = False
        for stream in tuple(self._by_id.values()):
            if not stream.is_ended:
                stream.fail(BrokenConnection(reason))
        self._flush()
        self.close()

    def _look_after(self) -> None:
        """Ask a silent server whether it is there, and give it up when it does not say so."""
        self._watch = None
        if not self._by_id or self.is_lost:
            return
        now = self._loop.time()
        if self._pinged_at is not None and now - self._pinged_at >= self._ping_patience:
            reason = f"the connection was lost: no sign of the server for {now - self._heard_at:.0f} s"
            for stream in tuple(self._by_id.values()):
                stream.fail(BrokenConnection(reason, is_stale=not stream.has_begun))
            self.close()
            return
        if self._pinged_at is None and now - self._heard_at >= self._ping_seconds:
            self._h2.ping(b"autobot1")
            self._pinged_at = now
            self._flush()
        waited = now - self._heard_at
        pause = self._ping_patience if self._pinged_at is not None else self._ping_seconds - waited
        self._watch = self._loop.call_later(pause, self._look_after)


def _name_of(code: int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"error {code}"
