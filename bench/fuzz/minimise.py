"""Make the input of a finding smaller: the same fault with fewer bytes."""

from __future__ import annotations

from ppllava_edge.bench.fuzz.outcome import Outcome
from ppllava_edge.bench.fuzz.process.client import FuzzServer
from ppllava_edge.bench.fuzz.targets.target import Target

MAX_RUNS = 60
SLOW = 2.0  # seconds; findings that take longer are minimised with few runs
SLOW_RUNS = 6


def minimise(server: FuzzServer, target: Target, data: bytes, outcome: Outcome) -> tuple[bytes, bool]:
    """Cut off and cut out parts of an input as long as the finding stays.

    Args:
        server: An idle server.
        target: The target.
        data: The input.
        outcome: Its outcome.

    Returns:
        The smaller input; and whether the finding came again at all.
    """
    budget = SLOW_RUNS if outcome.seconds > SLOW else MAX_RUNS

    def is_same(candidate: bytes) -> bool:
        nonlocal budget
        budget -= 1
        return server.run(target.name, target.suffix, candidate).signature == outcome.signature

    if not is_same(data):
        return data, False
    size = len(data) // 2
    while size >= 1 and budget > 0:
        end = len(data)
        while end > 0 and budget > 0:
            start = max(end - size, 0)
            candidate = data[:start] + data[end:]
            if is_same(candidate):
                data = candidate
            end = start
        size //= 2
    return data, True
