"""What is built on first use is built once, also by many threads at once."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType
from typing import Any

import pytest

from ppllava_edge.engines.errors import EngineError
from ppllava_edge.runtime import lazy
from ppllava_edge.runtime.lazy import LazyTable, locked_cached_property
from ppllava_edge.runtime.pipeline.factory import Pipeline


class Owner:
    """Counts how often its value is built."""

    def __init__(self) -> None:
        self.built = 0
        self.fails = False
        self.entered, self.go_on = threading.Event(), threading.Event()

    @locked_cached_property
    def value(self) -> int:
        self.entered.set()
        self.go_on.wait(10)
        if self.fails:
            raise EngineError("no")
        self.built += 1
        return self.built


def in_threads(count: int, work: Any) -> list[Any]:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_ask_at_once_get_one_value() -> None:
    owner = Owner()
    threading.Timer(0.1, owner.go_on.set).start()
    assert in_threads(8, lambda: owner.value) == [1] * 8 and owner.built == 1


def test_building_one_objects_value_does_not_delay_anothers() -> None:
    slow, quick = Owner(), Owner()
    quick.go_on.set()
    thread = threading.Thread(target=lambda: slow.value)
    thread.start()
    assert slow.entered.wait(10) and quick.value == 1 and not slow.built
    slow.go_on.set()
    thread.join()


def test_a_value_that_could_not_be_built_is_tried_again() -> None:
    owner = Owner()
    owner.go_on.set()
    owner.fails = True
    with pytest.raises(EngineError):
        _ = owner.value
    owner.fails = False
    assert owner.value == 1


def test_names_of_a_table_are_built_apart() -> None:
    table: LazyTable[str] = LazyTable()
    building, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        building.set()
        assert go_on.wait(10)
        return "slow"

    thread = threading.Thread(target=lambda: table.get("a", slow))
    thread.start()
    assert building.wait(10) and table.get("b", lambda: "quick") == "quick"
    assert table.built() == {"b": "quick"}
    go_on.set()
    thread.join()
    assert table.built() == {"a": "slow", "b": "quick"}
    assert table.get("a", lambda: "again") == "slow"


def test_a_value_may_be_removed_while_it_is_asked_for() -> None:
    """As close() does, at any step of another thread."""
    table, owner = LazyTable[str](), Owner()
    owner.go_on.set()

    def remove(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != lazy.__file__:
            return None
        if frame.f_code.co_name in ("get", "__get__"):
            table._values.clear()
            owner.__dict__.pop("value", None)
        return remove

    table.get("a", lambda: "first")
    assert owner.value == 1
    before = sys.gettrace()
    sys.settrace(remove)
    try:
        values = table.get("a", lambda: "second"), Owner.value.__get__(owner)
    finally:
        sys.settrace(before)
    assert values == ("second", 2)


def test_the_decoder_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppllava_edge.engines.bundle.packed import find_bundle
    from ppllava_edge.runtime.pipeline import cpu

    built: list[Any] = []

    class Slow(cpu.OnnxRuntimeDecoder):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            built.append(self)
            time.sleep(0.2)  # long enough for the other threads to ask too

    monkeypatch.setattr(cpu, "OnnxRuntimeDecoder", Slow)
    pipeline = Pipeline.open(find_bundle(None))
    decoders = in_threads(4, lambda: pipeline.decoder)
    assert len(built) == 1 and all(decoder is built[0] for decoder in decoders)
