"""A decoding process that misbehaves is a MediaError in one line, whatever it sends."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ppllava_edge.engines.errors import MediaError
from ppllava_edge.runtime.media.isolation import process, protocol, reader
from ppllava_edge.runtime.media.isolation.reader import IsolatedReader
from ppllava_edge.runtime.media.limits import DEFAULT_LIMITS, MediaLimits


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that misbehave, see hostile_worker.py."""
    monkeypatch.setattr(reader, "WORKER", "hostile_worker")


def misbehaviour(name: str, limits: MediaLimits = DEFAULT_LIMITS) -> str:
    """What the parent says about a process that misbehaves in this way."""
    with pytest.raises(MediaError) as error:
        list(IsolatedReader(f"/somewhere/{name}", limits).frames(lambda r: [0, 1]))
    text = str(error.value)
    assert "\n" not in text and text.isprintable() and len(text) < 1500
    return text


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    "name, words",
    [
        ("crash", "crashed (SIGSEGV)"),
        ("killed", "ran out of memory"),
        ("leave", "exit status 7"),
        ("large header", "a header of 4294967295 bytes"),
        ("no json", "isn't JSON"),
        ("deep json", "can't be right"),
        ("no object", "isn't an object"),
        ("unasked frame", "wasn't asked for"),
        ("large frame", "height = 1000000000"),
        ("long frame", "too large"),
        ("no seconds", "seconds = nan"),
        ("many notes", "notes"),
        ("frame twice", "wasn't asked for"),
        ("no frame", "no frame of"),
        ("choose for ever", "too many requests"),
    ],
)
def test_what_a_hostile_process_does_is_an_error(name: str, words: str) -> None:
    assert words in misbehaviour(name)


OPENED = {"type": "opened", "kind": "video", "count": 10, "fps": 5.0, "duration": 2.0}


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize(
    "changes",
    [
        {"type": "done"},
        {"type": None},
        {"type": ["opened"]},
        {"kind": "sound"},
        {"kind": "image"},
        {"count": 0},
        {"count": -1},
        {"count": 10**30},
        {"count": 2.5},
        {"count": True},
        {"count": None},
        {"fps": 0},
        {"fps": float("inf")},
        {"fps": "5"},
        {"fps": "\x1b[2J"},
        {"duration": -1},
        {"duration": float("nan")},
        {"duration": [1]},
        {"type": "error", "text": 5},
    ],
)
def test_every_field_is_checked(changes: dict[str, object]) -> None:
    message = json.dumps({**OPENED, **changes})
    assert "/" not in message
    assert "can't be right" in misbehaviour(message)


@pytest.mark.usefixtures("hostile")
def test_errors_and_notes_are_short_and_printable() -> None:
    text = misbehaviour("long error")
    assert text.startswith("a b [2J c") and len(text) < 700
    source = IsolatedReader("/somewhere/notes", DEFAULT_LIMITS)
    assert len(list(source.frames(lambda r: [0, 1]))) == 1
    assert source.indices == [0]
    assert all(note.isprintable() and len(note) < 700 for note in source.notes) and len(source.notes) == 2


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("name", ["hang", "spin", "trickle", "half a frame"])
def test_decode_seconds_bounds_the_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE", 0.5)
    text = misbehaviour(name, dataclasses.replace(DEFAULT_LIMITS, decode_seconds=0.5))
    assert "decode_seconds" in text or "can't be right" in text


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("name, words", [("hang", "hangs"), ("half a frame", "hangs")])
def test_without_a_time_limit_a_process_that_does_nothing_hangs(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(process, "LOOK_SECONDS", 0.3)
    assert words in misbehaviour(name)


@pytest.mark.usefixtures("hostile")
def test_a_process_that_hangs_up_and_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "END_SECONDS", 0.5)
    assert "closed its connection" in misbehaviour("disconnect")


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(4, "big") + header


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.binary(max_size=300) | JSON.map(lambda value: framed(json.dumps(value).encode())))
@example((60_000).to_bytes(4, "big") + b"[" * 60_000)
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        channel = protocol.Channel(ours, protocol.MAX_HEADER)
        try:
            while True:
                assert isinstance(channel.receive(), dict)
        except (protocol.Disconnected, protocol.ProtocolError):
            pass


@given(JSON)
def test_any_field_is_a_number_or_a_text_or_an_error(value: object) -> None:
    fields = {"field": value}
    for read, kind in (
        (lambda: protocol.integer(fields, "field", 1, 9), int),
        (lambda: protocol.number(fields, "field", -1, 9), float),
        (lambda: protocol.text(value, 20), str),
    ):
        try:
            found = read()  # type: ignore[no-untyped-call]
        except protocol.ProtocolError:
            continue
        assert type(found) is kind
        assert len(found) <= 20 and found.isprintable() if kind is str else -1 <= found <= 9
