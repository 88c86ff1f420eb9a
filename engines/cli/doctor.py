"""ppllava-doctor: what this machine has, which engines it can build and run, and what the others need."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from ppllava_edge.engines.cli.verdicts import Installation, Verdict, installations, judge
from ppllava_edge.engines.machine.gpu_facts import Gpu
from ppllava_edge.engines.machine.inventory import Machine, inspect_machine
from ppllava_edge.engines.terminal import Command, human_bytes, table


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(as_json: bool) -> None:
    """Show what this machine has, and which targets of ppllava-build can be built and run on it.

    Commands that install what the other targets need follow the table.

    Exit status 1 if no target can run.
    """
    machine = inspect_machine()
    verdicts = judge(machine)
    missing = installations(machine, verdicts)
    if as_json:
        _print_json(machine, verdicts, missing)
    else:
        table("this machine", ("what", "value"), _rows(machine))
        _print_targets(verdicts)
        _print_commands(missing)
    sys.exit(0 if any(verdict.runs for verdict in verdicts) else 1)


def _print_json(machine: Machine, verdicts: Sequence[Verdict], missing: Sequence[Installation]) -> None:
    targets = [
        {"target": v.target, "builds": v.builds, "runs": v.runs, "missing": v.missing} for v in verdicts
    ]
    commands = [asdict(installation) for installation in missing]
    click.echo(json.dumps({"machine": asdict(machine), "targets": targets, "install": commands}))


def _print_targets(verdicts: Sequence[Verdict]) -> None:
    rows = [
        (
            verdict.target,
            "yes" if verdict.builds else "no",
            "yes" if verdict.runs else "no",
            ", ".join(need.name for need in verdict.needs) or "nothing",
        )
        for verdict in verdicts
    ]
    table("targets of ppllava-build", ("target", "builds here", "runs here", "missing"), rows)


def _print_commands(missing: Sequence[Installation]) -> None:
    for installation in missing:
        first = f", once there is {installation.after}" if installation.after else ""
        click.echo(f"\nto install what is missing for {', '.join(installation.targets)}{first}:\n")
        for command in installation.commands:
            click.echo(f"    {command}")


def _rows(m: Machine) -> list[tuple[str, str]]:
    rows = [("system", m.system), ("Python", m.python), ("cores", str(m.cores))]
    if m.memory:
        rows.append(("memory", f"{human_bytes(m.memory)}, {human_bytes(m.available or 0)} available"))
    if m.free_blocks:
        count, size = m.free_blocks
        rows.append(("largest free blocks", f"{count} of {human_bytes(size)}"))
    if m.jetpack:
        rows.append(("JetPack", m.jetpack))
    if m.power_mode:
        rows.append(("power mode", m.power_mode))
    rows += [("GPU", _gpu_text(gpu)) for gpu in m.gpus] or [("GPU", "none")]
    driver = m.driver or ("here" if m.cuda else "none")
    rows.append(("NVIDIA driver", f"{driver}, CUDA up to {m.cuda}" if m.cuda else driver))
    return rows + list(m.packages.items())


def _gpu_text(gpu: Gpu) -> str:
    facts = [
        gpu.name,
        f"compute capability {gpu.capability}",
        f"{gpu.processors} processors",
        human_bytes(gpu.memory),
    ]
    if gpu.free is not None:
        facts.append(f"{human_bytes(gpu.free)} free")
    if gpu.integrated:
        facts.append("shared with the system")
    return ", ".join(facts)


if __name__ == "__main__":
    main()
