"""The loop: mutate an input, run it, keep it if it did something new."""

from __future__ import annotations

import selectors
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random

from ppllava_edge.bench.fuzz.corpus import Corpus
from ppllava_edge.bench.fuzz.inputs.mutate import mutate
from ppllava_edge.bench.fuzz.minimise import minimise
from ppllava_edge.bench.fuzz.outcome import Outcome
from ppllava_edge.bench.fuzz.process.client import FuzzServer
from ppllava_edge.bench.fuzz.targets.target import Target

RECENT = 0.4  # of the parents are among the newest inputs
REFUSED = 0.1  # of the parents are refused ones: most of what they give is refused for the same reason
NEWEST = 20


@dataclass
class Tally:
    """Counts of one target.

    Attributes:
        inputs: Inputs that ran.
        refused: Those that were refused in one line.
        kept: Those that were kept because they did something new.
        findings: How often each signature was found.
        seconds: Time of all inputs together.
        memory: The largest amount of memory that one used, in bytes.
    """

    inputs: int = 0
    refused: int = 0
    kept: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0

    def count(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.inputs += 1
        self.refused += outcome.kind == "refused"
        self.seconds += outcome.seconds
        self.memory = max(self.memory, outcome.memory)
        if outcome.is_finding:
            self.findings[outcome.signature] += 1


class Campaign:
    """Fuzzes targets until the time or the number of inputs is used up.

    Args:
        targets: What to fuzz.
        corpus: Their inputs.
        seed: Of the random choices. Seed files differ a little between runs, as encoders' output does.
        on_finding: Called with the outcome and a line about it, for every signature's first input.

    Attributes:
        tallies: Counts by target.
    """

    def __init__(
        self,
        targets: list[Target],
        corpus: Corpus,
        seed: int,
        on_finding: Callable[[Outcome, str], None],
    ):
        self.targets = targets
        self.corpus = corpus
        self.tallies = {target.name: Tally() for target in targets}
        self._random = Random(seed)
        self._on_finding = on_finding
        self._features: set[int] = set()
        self._outcomes: set[str] = set()
        self._running: dict[FuzzServer, tuple[Target, bytes]] = {}
        # every target's seeds and kept inputs run first, unchanged
        self._first = [(t, data) for t in reversed(targets) for data in reversed(corpus.kept[t.name])]

    @property
    def done(self) -> int:
        """Inputs that have run."""
        return sum(tally.inputs for tally in self.tallies.values())

    def run(
        self, jobs: int, seconds: float, most: int | None, progress: Callable[[str, int, int], None]
    ) -> None:
        """Fuzz.

        Args:
            jobs: Servers to run at once.
            seconds: How long, at most.
            most: How many inputs, at most; None: no limit.
            progress: Called with (target, inputs done, inputs in all) after every input.
        """
        started = time.monotonic()

        def is_over() -> bool:
            enough = most is not None and self.done + len(self._running) >= most
            return enough or time.monotonic() - started > seconds

        with ExitStack() as stack, selectors.DefaultSelector() as selector:
            for _ in range(jobs):
                server = stack.enter_context(FuzzServer())
                selector.register(server.answers, selectors.EVENT_READ, server)
                if not is_over():
                    self._send(server)
            while self._running:
                for key, _ in selector.select():
                    server = key.data
                    target = self._receive(server)
                    progress(target.name, self.done, most or 0)
                    if not is_over():
                        self._send(server)

    def _send(self, server: FuzzServer) -> None:
        target, data = self._first.pop() if self._first else self._next()
        self._running[server] = (target, data)
        server.send(target.name, target.suffix, data)

    def _next(self) -> tuple[Target, bytes]:
        """A mutated input of a random target."""
        target = self._random.choices(self.targets, [t.weight for t in self.targets])[0]
        known, refused = self.corpus.accepted[target.name], self.corpus.refused[target.name]
        if refused and self._random.random() < REFUSED:
            known = refused
        newest = known[-NEWEST:] if self._random.random() < RECENT else known
        other = self._random.choice(known)
        return target, mutate(self._random.choice(newest), other, target.grammar, self._random)

    def _receive(self, server: FuzzServer) -> Target:
        target, data = self._running.pop(server)
        outcome = server.receive()
        tally = self.tallies[target.name]
        tally.count(outcome)
        if outcome.is_finding:
            if tally.findings[outcome.signature] == 1:
                self._keep_finding(server, target, data, outcome)
        elif self._is_new(outcome):
            tally.kept += 1
            self.corpus.add(outcome, data)
        return target

    def _is_new(self, outcome: Outcome) -> bool:
        """Whether an outcome has a line, a log message or an error message that none had before."""
        kind = f"{outcome.target} {outcome.kind} {outcome.place}"
        new = kind not in self._outcomes or not self._features.issuperset(outcome.features)
        self._outcomes.add(kind)
        self._features.update(outcome.features)
        return new

    def _keep_finding(self, server: FuzzServer, target: Target, data: bytes, outcome: Outcome) -> None:
        small, repeats = minimise(server, target, data, outcome)
        path = self.corpus.keep_finding(outcome, target.suffix, small)
        line = outcome.signature if repeats else f"{outcome.signature} (once; it could not be repeated)"
        self._on_finding(outcome, f"{line}: {path}")
