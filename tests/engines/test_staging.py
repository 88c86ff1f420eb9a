"""Staging folders: cleaned up after killed commands, and only after those."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import run_command
from ppllava_edge.engines import staging
from ppllava_edge.engines.staging import staging_folder, sweep

HOLD = """
import sys, time
from pathlib import Path
from ppllava_edge.engines.staging import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"half")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def start_holder(target: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that holds a staging folder of a target, and the folder's name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: subprocess.Popen[str], how: signal.Signals = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_finished_folder_is_renamed_and_nothing_stays(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staging_folder(target) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".bundle.") and folder.suffix == ".part"
        (folder / "file").write_text("whole")
        folder.rename(target)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (target / "file").read_text() == "whole"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"), staging_folder(tmp_path / "bundle") as folder:
        (folder / "file").write_text("half")
        raise ValueError("half")
    assert not list(tmp_path.iterdir())


def test_folders_of_killed_commands_are_removed_with_one_note(tmp_path: Path) -> None:
    first, first_name = start_holder(tmp_path / "a")
    second, second_name = start_holder(tmp_path / "b")
    kill(first)
    kill(second)
    assert (tmp_path / first_name / "weights").is_file()
    notes: list[str] = []
    with staging_folder(tmp_path / "c", notes.append) as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert len(notes) == 1
    assert all(name in notes[0] for name in (first_name, second_name, str(tmp_path)))


def test_the_note_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, name = start_holder(tmp_path / "a")
    kill(process)
    with staging_folder(tmp_path / "b"):
        pass
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"note: removed unfinished folders of killed commands from {tmp_path}: {name}"
    ]


def test_folders_of_running_commands_stay(tmp_path: Path) -> None:
    process, name = start_holder(tmp_path / "bundle")
    try:
        with staging_folder(tmp_path / "bundle") as mine:
            assert sweep(tmp_path) == []
            assert mine.is_dir() and (tmp_path / name).is_dir()
    finally:
        kill(process)
    assert sweep(tmp_path) == [name]


def test_folders_of_other_hosts_and_other_programs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, name = start_holder(tmp_path / "bundle")
    kill(process)
    for other in (".bundle.part", ".bundle.abcd1234.part", "bundle.part", ".bundle.calibration"):
        (tmp_path / other).mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / name.replace(".bundle.", ".link.")).symlink_to(tmp_path / "real")
    there = {path.name for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(staging.platform, "node", lambda: "another-host")
        assert sweep(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == there
    assert sweep(tmp_path) == [name]
    assert {path.name for path in tmp_path.iterdir()} == there - {name}


def test_a_folder_that_cant_be_removed_is_left_without_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, name = start_holder(tmp_path / "a")
    kill(process)
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", lambda path, ignore_errors: None)
        assert sweep(tmp_path) == []
        with staging_folder(tmp_path / "b", notes.append):
            pass
    assert (tmp_path / name).is_dir() and not notes


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(9, os.strerror(9))

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    with staging_folder(tmp_path / "a") as folder, staging_folder(tmp_path / "b") as other:
        assert folder.is_dir() and other.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_missing_parent_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_folder(tmp_path / "no" / "bundle"):
        pass


def test_export_and_build_clean_up_after_killed_commands(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    process, name = start_holder(output)
    kill(process)
    run = run_command("ppllava-export", tiny_checkpoint, "-o", output, "--no-engine")
    assert run.returncode == 0, run.stderr
    assert f"note: removed unfinished folders of killed commands from {tmp_path}: {name}\n" in run.stderr
    assert not list(tmp_path.glob(".*"))

    (output / "engines").mkdir()
    process, name = start_holder(output / "engines" / "cpu")
    kill(process)
    run = run_command("ppllava-build", output, "--target", "cpu")
    assert run.returncode == 0, run.stderr
    assert name in run.stderr
    assert [path.name for path in (output / "engines").iterdir()] == ["cpu"]


def test_a_long_name_and_a_system_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / ("x" * 240)
    with staging.staging_folder(target) as folder:
        folder.rename(target)
    assert target.is_dir()
    monkeypatch.setattr(staging, "fcntl", None)
    with staging.staging_folder(tmp_path / "y") as folder:
        assert folder.is_dir()
    assert staging.sweep(tmp_path) == [] and not folder.exists()


def test_an_old_folder_is_exchanged_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never is the target missing or mixed; without the system's exchange, it is missing for a moment."""
    target, exchanges, synced = tmp_path / "bundle", staging._exchange, []
    monkeypatch.setattr(staging, "_sync", synced.append)
    for exchange in (exchanges, lambda one, other: False):
        monkeypatch.setattr(staging, "_exchange", exchange)
        target.mkdir(exist_ok=True)
        (target / "old").write_text("old")
        with staging_folder(target) as folder:
            (folder / "part").mkdir()
            (folder / "part" / "new").write_text("new")
            staging.publish(folder, target)
            assert (folder / "old").exists() == (exchange is exchanges)
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        assert [path.name for path in target.iterdir()] == ["part"]
        assert [path.name for path in synced[:-2]] == ["part", "new"] and synced[-1] == tmp_path
        synced.clear()


def test_a_link_in_the_place_of_a_folder_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    (tmp_path / "engine").symlink_to(tmp_path / "elsewhere")
    with staging_folder(tmp_path / "engine") as folder:
        staging.publish(folder, tmp_path / "engine")
    assert not (tmp_path / "engine").is_symlink() and (tmp_path / "elsewhere" / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "engine"]


def test_an_exchange_that_the_system_refuses_is_its_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        staging._exchange(tmp_path / "one", tmp_path / "nothing")


REPLACE = """
import os, sys
from pathlib import Path
from ppllava_edge.engines import staging
target, how, real = Path(sys.argv[1]), sys.argv[2], Path.rename
def rename(self, to):
    if not (self / "new").exists():
        return real(self, to)
    if how == "fails":
        raise OSError(5, "I/O error")
    if how == "interrupted":
        raise KeyboardInterrupt
    os.kill(os.getpid(), 9)
staging._exchange = lambda one, other: False
Path.rename = rename
with staging.staging_folder(target) as folder:
    (folder / "new").write_text("new")
    staging.publish(folder, target)
"""


@pytest.mark.parametrize("how", ["fails", "interrupted", "killed"])
def test_without_an_exchange_the_old_folder_is_never_lost(tmp_path: Path, how: str) -> None:
    """Whatever happens between the two renames."""
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").write_text("old")
    run = subprocess.run([sys.executable, "-c", REPLACE, str(target), how], capture_output=True)
    assert run.returncode and target.exists() == (how != "killed")
    assert len(staging.sweep(tmp_path)) == (2 if how == "killed" else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and (target / "old").exists()


@pytest.mark.parametrize("put", [Path.touch, os.mkfifo])
def test_a_file_in_the_place_of_a_folder_stays(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "engine")
    with pytest.raises(NotADirectoryError), staging_folder(tmp_path / "engine") as folder:
        staging.publish(folder, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
