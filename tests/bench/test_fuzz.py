"""The fuzzer notices what it is for, its inputs are what they should be, and earlier findings stay mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from helpers.commands import ROOT
from ppllava_edge.bench.fuzz.campaign import Campaign
from ppllava_edge.bench.fuzz.corpus import Corpus
from ppllava_edge.bench.fuzz.inputs.json_mutations import mutate_json
from ppllava_edge.bench.fuzz.inputs.mutate import mutate
from ppllava_edge.bench.fuzz.inputs.mutations import MAX_SIZE
from ppllava_edge.bench.fuzz.inputs.seeds import seeds
from ppllava_edge.bench.fuzz.inputs.tree_mutations import GRAMMARS
from ppllava_edge.bench.fuzz.known import known_reason
from ppllava_edge.bench.fuzz.minimise import minimise
from ppllava_edge.bench.fuzz.outcome import Outcome
from ppllava_edge.bench.fuzz.process.client import FuzzServer
from ppllava_edge.bench.fuzz.targets.misbehaviour import MISBEHAVIOUR
from ppllava_edge.bench.fuzz.targets.registry import TARGETS

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="fuzzing needs Linux")
COMMAND = [sys.executable, "-m", "ppllava_edge.bench.fuzz"]
FINDINGS = ROOT / "tests" / "fuzz_findings"  # a folder per target
KEPT = sorted(path for path in FINDINGS.rglob("*") if path.is_file())
REFUSED_SEEDS = {"playlist": 14, "batch": 2}  # texts that name other files, and outputs of other programs
ALMOST_ALL = [name for name in TARGETS if name != "isolated"]


def run_fuzz(*flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, flags)], capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def server() -> Iterator[FuzzServer]:
    with FuzzServer() as server:
        yield server


@pytest.mark.parametrize(
    "behaviour, expected",
    {
        "good": "ok",
        "refuse": "refused",
        "crash": "signal SIGSEGV",
        "crash in a thread": "signal SIGSEGV",
        "allocate": "memory",
        "use memory": "memory resident",
        "several lines": "message several lines",
        "long": "message more than 300 characters",
        "control characters": "message control characters",
        "exception": "exception KeyError",
        "surrogates": "exception ValueError",
        "base exception": "exception SystemExit",
        "wrong result": "unexpected frames",
        "print": "stdout",
        "open": "opened",
        "connect": "connected",
    }.items(),
)
def test_the_server_notices_misbehaviour(server: FuzzServer, behaviour: str, expected: str) -> None:
    outcome = server.run("misbehaviour", ".txt", behaviour.encode())
    assert f"{outcome.kind} {outcome.place}".startswith(expected)
    assert outcome.is_finding == (behaviour not in ("good", "refuse"))
    assert server.run("misbehaviour", ".txt", b"good").kind == "ok"


def test_an_input_that_computes_for_ever_is_ended() -> None:
    with FuzzServer(cpu_seconds=0.3) as server:
        outcome = server.run("misbehaviour", ".txt", b"compute for ever")
        assert outcome.signature == "misbehaviour-timeout-outside"


@pytest.mark.parametrize("name", ALMOST_ALL)
def test_seeds_are_valid_files(server: FuzzServer, name: str) -> None:
    outcomes = [server.run(name, TARGETS[name].suffix, data) for data in seeds(name)]
    assert not [outcome.signature for outcome in outcomes if outcome.is_finding]
    assert sum(outcome.kind == "refused" for outcome in outcomes) <= REFUSED_SEEDS.get(name, 0)


@pytest.mark.slow
def test_seeds_are_read_in_isolation(server: FuzzServer) -> None:
    assert {server.run("isolated", ".mp4", data).kind for data in seeds("isolated")} == {"ok"}


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.grammar in GRAMMARS])
def test_trees_are_written_as_they_were_read(name: str) -> None:
    grammar = TARGETS[name].grammar
    parse, write = GRAMMARS[grammar]
    for data in seeds(name):
        written = write(parse(data))
        if grammar == "ebml":  # sizes take more bytes, and live streams have no sizes
            written, data = write(parse(written)), written
        if grammar in ("boxes", "riff", "png", "jpeg") and len(parse(data)) < 2:
            continue  # a seed in another container
        assert written == data


def test_mutations_change_inputs_in_the_same_way_for_the_same_seed() -> None:
    for name in ("manifest", "png", "mkv", "cache", "onnx"):
        first, second = seeds(name)[0], seeds(name)[-1]
        random, again = Random(3), Random(3)
        mutated = [mutate(first, second, TARGETS[name].grammar, random) for _ in range(100)]
        assert mutated == [mutate(first, second, TARGETS[name].grammar, again) for _ in range(100)]
        assert len(set(mutated)) > 60
        assert max(map(len, mutated)) <= MAX_SIZE


def test_mutated_json_can_mostly_be_parsed() -> None:
    data, random, parsed = seeds("manifest")[0], Random(4), 0
    for _ in range(200):
        try:
            json.loads(mutate_json(data, data, random, 2))
            parsed += 1
        except (ValueError, RecursionError):
            pass
    assert parsed > 150


def test_findings_are_kept_small_once_per_signature(tmp_path: Path) -> None:
    corpus, lines = Corpus(tmp_path, []), list[str]()
    corpus.kept["misbehaviour"] = [b"wrong result", b"wrong result", b"good", b"surrogates"]
    corpus.accepted["misbehaviour"] = corpus.refused["misbehaviour"] = []
    campaign = Campaign([MISBEHAVIOUR], corpus, 0, lambda outcome, line: lines.append(line))
    campaign.run(1, 60, 4, lambda what, done, total: None)
    tally = campaign.tallies["misbehaviour"]
    assert tally.inputs == 4 and len(lines) == 2
    signature, other = tally.findings
    assert (tally.findings[signature], tally.findings[other]) == (2, 1)
    kept = [path for path in (tmp_path / "findings" / signature).iterdir() if path.suffix == ".txt"]
    assert b"wrong result" in [path.read_bytes() for path in kept]


def test_minimising_keeps_the_finding(server: FuzzServer) -> None:
    data = b'{"video": "a", "question": 1}\n' + 50 * b"[" + b"\n"
    outcome = Outcome("batch", "refused", server.run("batch", ".jsonl", data).place)
    small, repeats = minimise(server, TARGETS["batch"], data, outcome)
    assert repeats and len(small) < len(data)
    assert server.run("batch", ".jsonl", small).place == outcome.place


def test_the_command_counts_and_keeps_inputs(tmp_path: Path) -> None:
    flags = ("--targets", "ppm,questions", "--inputs", 60, "--jobs", 1, "--corpus", tmp_path / "corpus")
    run = run_fuzz(*flags, "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["ppm"]["inputs"] + report["questions"]["inputs"] == 60
    kept = [path for path in (tmp_path / "corpus" / "ppm").iterdir() if path.is_file()]
    assert 0 < len(kept) <= report["ppm"]["kept"]
    wrong = run_fuzz("--targets", "mp5")
    assert wrong.returncode == 2 and "mp5: choose among mp4" in wrong.stderr


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_earlier_findings_stay_mended(server: FuzzServer, path: Path) -> None:
    target = TARGETS[path.relative_to(FINDINGS).parts[0]]
    outcome = server.run(target.name, target.suffix, path.read_bytes())
    assert not outcome.is_finding or known_reason(outcome.signature), outcome.detail


@pytest.mark.slow
def test_a_few_thousand_inputs_find_nothing_new(tmp_path: Path) -> None:
    run = run_fuzz("--inputs", 4000, "--minutes", 15, "--corpus", tmp_path)
    assert run.returncode == 0, run.stderr
