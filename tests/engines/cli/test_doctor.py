"""ppllava-doctor, on this machine and on invented ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import run_command
from ppllava_edge.engines.cli import verdicts as verdicts_module
from ppllava_edge.engines.cli.verdicts import Installation, Verdict, installations, judge
from ppllava_edge.engines.machine.gpu_facts import Gpu, driver_version, gpus
from ppllava_edge.engines.machine.inventory import Machine, inspect_machine

DESKTOP = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 20 << 30, 128, False)
ORIN = Gpu("Orin", "8.7", 8 << 30, 4 << 30, 8, True)
BARE = Machine(
    "Linux",
    "3.11",
    8,
    16 << 30,
    8 << 30,
    (10, 4 << 20),
    [],
    None,
    None,
    None,
    None,
    {"onnx": "1.23.2", "onnxruntime": "1.31.1"},
)


GPU_TARGETS = ("cuda", "rtx", "orin", "orin-jp6")


def verdicts(machine: Machine, monkeypatch: pytest.MonkeyPatch, **libraries: str) -> dict[str, Verdict]:
    monkeypatch.setattr(verdicts_module, "installed_version", lambda library: libraries.get(library, ""))
    return {verdict.target: verdict for verdict in judge(machine)}


def install(machine: Machine, monkeypatch: pytest.MonkeyPatch, **libraries: str) -> list[Installation]:
    """The installations that the doctor suggests."""
    return installations(machine, list(verdicts(machine, monkeypatch, **libraries).values()))


def test_this_machine() -> None:
    run = run_command("ppllava-doctor")
    assert run.returncode == 0 and "cpu" in run.stdout, run.stderr
    report = json.loads(run_command("ppllava-doctor", "--json").stdout)
    by_target = {target["target"]: target for target in report["targets"]}
    assert by_target["cpu"]["runs"] and report["machine"]["memory"] > 1 << 30
    if not report["machine"]["gpus"]:
        for target in GPU_TARGETS:
            missing = by_target[target]["missing"]
            assert not by_target[target]["runs"]
            assert "driver" in missing or "GPU" in missing
        assert "'ppllava-edge[cuda]'" in by_target["cuda"]["missing"]
        assert "[cuda" in run.stdout, "extras are not taken for markup"
    for installation in report["install"]:
        for command in installation["commands"]:
            assert f"    {command}\n" in run.stdout, "each command on a line of its own, to paste"


def test_nothing_but_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(BARE, monkeypatch, tensorrt_rtx="1.7.1")
    assert found["cpu"].runs and found["lowered"].runs
    assert found["rtx"].builds and not found["rtx"].runs
    assert not found["orin"].builds
    assert "no NVIDIA driver" in found["orin"].missing and "JetPack" in found["orin"].missing


def test_an_old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    old = verdicts(replace(BARE, packages={"onnxruntime": "1.20.1"}), monkeypatch)
    assert not old["cpu"].runs and "lowered" in old["cpu"].missing
    assert old["lowered"].runs and not old["lowered"].builds


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    none = verdicts(replace(BARE, packages={}), monkeypatch)
    assert not any(v.runs for v in none.values()) and "ppllava-edge[cpu]" in none["cpu"].missing


def test_doctor_on_a_desktop_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"onnx": "1.23", "onnxruntime-gpu": "1.31.1", "cuda-core": "1.2"}
    machine = replace(BARE, gpus=[DESKTOP], cuda="13.0", packages=packages)
    found = verdicts(machine, monkeypatch, tensorrt_rtx="1.7.1")
    assert found["cuda"].runs and found["rtx"].runs and not found["rtx"].missing and not found["orin"].runs
    cpu_build = replace(machine, packages={"onnx": "1.23", "onnxruntime": "1.31.1"})
    without = verdicts(cpu_build, monkeypatch, tensorrt_rtx="1.7.1")
    assert not without["rtx"].runs and "cuda-core" in without["rtx"].missing
    assert "pip uninstall onnxruntime" in without["cuda"].missing
    gtx = replace(machine, gpus=[replace(DESKTOP, name="GTX 1080", capability="6.1")])
    old = verdicts(gtx, monkeypatch, tensorrt_rtx="1.7.1")
    assert not old["rtx"].runs and "6.1; the minimum is 7.5" in old["rtx"].missing


def test_jetsons(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"onnx": "1.23", "cuda-core": "1.2"}
    machine = replace(BARE, gpus=[ORIN], cuda="12.6", jetpack="6.2 (L4T 36.4.3)", packages=packages)
    six = verdicts(machine, monkeypatch, tensorrt="10.3.0")
    assert six["orin-jp6"].runs and not six["orin"].runs and "use orin-jp6" in six["orin"].missing
    bare = verdicts(replace(machine, packages={"onnx": "1.23"}), monkeypatch, tensorrt="10.3.0")
    assert not bare["orin-jp6"].runs and "'ppllava-edge[jetson]' (cuda-core)" in bare["orin-jp6"].missing
    seven = verdicts(machine, monkeypatch, tensorrt="10.16.1")
    assert seven["orin"].runs and seven["orin"].builds
    assert "for desktop cards" in verdicts(machine, monkeypatch, tensorrt_rtx="1.7.1")["rtx"].missing


def test_one_command_installs_what_several_targets_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(BARE, packages={})
    now, later = install(bare, monkeypatch)
    assert now == Installation(
        ("cpu", "cuda", "lowered", "rtx", "orin", "orin-jp6"),
        "",
        ("pip install 'ppllava-edge[cpu,export,rtx]'",),
    )
    assert later == Installation(
        ("cuda", "orin", "orin-jp6"),
        "an NVIDIA driver",
        ("pip uninstall -y onnxruntime", "pip install 'ppllava-edge[cuda,tensorrt]'"),
    )


def test_doctor_suggests_one_onnxruntime_for_a_gpu_with_nothing_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = replace(BARE, gpus=[DESKTOP], cuda="13.0", packages={})
    (only,) = install(machine, monkeypatch)
    assert only.after == "" and only.commands == ("pip install 'ppllava-edge[cuda,export,rtx,tensorrt]'",)
    machine = replace(machine, packages={"onnx": "1.23", "onnxruntime": "1.31.1"})
    (only,) = install(machine, monkeypatch, tensorrt_rtx="1.7.1", tensorrt="10.16")
    assert only.commands[0] == "pip uninstall -y onnxruntime", "two builds of it break each other"


def test_nothing_is_suggested_for_targets_that_cant_work(monkeypatch: pytest.MonkeyPatch) -> None:
    jetson = replace(BARE, gpus=[ORIN], cuda="12.6", jetpack="6.2 (L4T 36.4.3)", packages={"onnx": "1.23"})
    suggested = install(jetson, monkeypatch, tensorrt="10.3.0")
    assert not {"rtx", "orin"} & {target for one in suggested for target in one.targets}
    assert any("jetson" in command for one in suggested for command in one.commands)
    packages = {"onnx": "1.23", "onnxruntime": "1.31", "onnxruntime-gpu": "1.31", "cuda-core": "1.2"}
    complete = replace(BARE, gpus=[DESKTOP], cuda="13.0", packages=packages)
    assert install(complete, monkeypatch, tensorrt="10.16", tensorrt_rtx="1.7.1") == []


def test_the_facts_of_a_jetson(tmp_path: Path) -> None:
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, "
        "EABI: aarch64\n",
        "var/lib/dpkg/status": "Package: nano\nVersion: 7.2\n\nPackage: nvidia-jetpack\n"
        "Status: install ok installed\nVersion: 6.2+b77\n\n",
        "proc/meminfo": "MemTotal:        7620620 kB\nMemAvailable:    3000000 kB\n",
        "proc/buddyinfo": "Node 0, zone      DMA      5     12      0      3\n"
        "Node 0, zone   Normal    100      7      1      2\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  "
        "Release Build\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = inspect_machine(tmp_path)
    assert machine.jetpack == "6.2 (L4T 36.4.3)" and machine.driver == "540.4.0"
    assert machine.memory == 7620620 * 1024 and machine.free_blocks == (5, 4096 << 3)
    empty = inspect_machine(tmp_path / "nothing")
    assert empty.jetpack is None and empty.driver is None
    assert empty.memory is None and empty.free_blocks is None


class Driver:
    """A double of libcuda with two GPUs. refuses: the function that fails."""

    def __init__(self, refuses: str = ""):
        self.refuses = refuses

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.refuses:
                return 2
            target = getattr(arguments[0], "_obj", None) if arguments else None
            values = {
                "cuDriverGetVersion": 13000,
                "cuDeviceGetCount": 2,
                "cuDeviceTotalMem_v2": 8 << 30,
                "cuDevicePrimaryCtxRetain": 1,
            }
            if name == "cuDeviceGet":
                target.value = arguments[1]
            elif name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif name == "cuDeviceGetAttribute":
                target.value = {75: 8, 76: 7, 18: 1, 16: 16}[arguments[1]]
            elif name == "cuMemGetInfo_v2":
                target.value, arguments[1]._obj.value = 3 << 30, 8 << 30
            elif name in values:
                target.value = values[name]
            return 0

        return call


def test_gpu_facts_come_from_the_driver() -> None:
    assert driver_version(Driver()) == "13.0"
    want = Gpu("Orin", "8.7", 8 << 30, 3 << 30, 16, True)
    assert gpus(Driver()) == [want, want]
    assert gpus(Driver(refuses="cuDevicePrimaryCtxRetain"))[0].free is None
    assert gpus(Driver(refuses="cuDeviceGetCount")) == []
