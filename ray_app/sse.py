"""Server-sent events: the data of each event, from bytes as they come from the network.

Lines may end with LF, CRLF or CR and be cut anywhere; comments and fields other than `data` are left out
(https://html.spec.whatwg.org/multipage/server-sent-events.html). An event's data may have several lines.
"""

from __future__ import annotations

# One event of a chat stream is a token or two; a whole reply that a server sends as one stays far below.
MAX_HELD_BYTES = 32 << 20


class EventParser:
    """Holds what has come of an event that is not complete. One for each stream."""

    def __init__(self) -> None:
        self._held: list[bytes] = []  # of a line without an end; joined once, however many packets it takes
        self._held_bytes = 0
        self._data: list[bytes] = []
        self._is_first = True

    def feed(self, packet: bytes) -> list[bytes]:
        """The data of the events that are complete now. Raises ValueError for one without an end."""
        if b"\n" not in packet and b"\r" not in packet:
            self._hold(packet)
            return []
        text = b"".join((*self._held, packet)) if self._held else packet
        self._held, self._held_bytes = [], 0
        if self._is_first:
            self._is_first = False
            text = text.removeprefix(b"\xef\xbb\xbf")
        if b"\r" in text:
            text = self._with_line_feeds(text)
        *lines, rest = text.split(b"\n")
        if rest:
            self._held.insert(0, rest)
            self._held_bytes += len(rest)
        return self._events(lines)

    def close(self) -> list[bytes]:
        """At the end of the stream: the last event, where its blank line is missing."""
        rest, self._held = b"".join(self._held).rstrip(b"\r"), []
        return self._events([rest, b""])

    def _hold(self, packet: bytes) -> None:
        self._held.append(packet)
        self._held_bytes += len(packet)
        if self._held_bytes > MAX_HELD_BYTES:
            raise ValueError(f"one line of more than {MAX_HELD_BYTES >> 20} MiB")

    def _with_line_feeds(self, text: bytes) -> bytes:
        if text.endswith(b"\r"):  # half of a CRLF, perhaps
            text = text[:-1]
            self._hold(b"\r")
        return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _events(self, lines: list[bytes]) -> list[bytes]:
        events, data = [], self._data
        for line in lines:
            if not line:
                if data:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data.clear()
            elif line.startswith(b"data:"):
                data.append(line[6:] if line[5:6] == b" " else line[5:])
        return events
