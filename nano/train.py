"""Train nano from scratch on the CPU.

    python -m ppllava_edge.nano.train --out DIR [--seed S] [--unguided]

One schedule with four stages (docs/nano.md): the towers on single frames (contrastive); clips with the
temporal branch (contrastive); everything jointly (answers and contrastive); and the same with another mix of
questions. Data parallel over --processes processes of one thread. Batches depend only on seed, process and
step, so a run that was stopped continues with --resume as if nothing had happened.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would starve the other processes

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from ppllava_edge.nano.checkpoint import write_checkpoint
from ppllava_edge.nano.data import LATE_QUESTIONS, QUESTIONS, make_batch
from ppllava_edge.nano.losses import TEXT_ENDS, TEXT_IDS, answer_loss, contrastive_loss
from ppllava_edge.nano.model import NanoPPLLaVA, Shape
from ppllava_edge.nano.optimizer import FlatMuon
from ppllava_edge.nano.world import KINDS

STAGES = ("frames", "clips", "joint", "late")
QUESTIONS_OF_STAGE = {"joint": QUESTIONS, "late": LATE_QUESTIONS}
VALIDATION_CLIPS = 64


def learning_rate(step: int, total: int, peak: float, warmup: int = 60, decay_share: float = 0.5) -> float:
    """Linear warm-up, constant, then linear to zero over the last share of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (total - step) / (decay_share * total))


def step_loss(
    model: NanoPPLLaVA, args: argparse.Namespace, stage: str, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one process's batch.

    Args:
        model: The model.
        args: Arguments of the command line: clips and processes.
        stage: One of STAGES.
        rng: Draws the batch.

    Returns:
        The loss, and figures for the log.
    """
    single = stage == "frames"
    clips = args.clips // args.processes * (8 if single else 1)
    questions = QUESTIONS_OF_STAGE.get(stage, [])
    batch = make_batch(rng, clips, model.shape.patch, single=single, questions=questions)
    texts = model.questions(TEXT_IDS, TEXT_ENDS)
    features = model.features(batch.pixels, branch=not single)
    patches = model.patch_embeddings(features)
    logits = torch.einsum("bvd,kd->bkv", patches, texts) * model.logit_scale.float().exp()
    loss, figures = contrastive_loss(logits, batch, single=single)
    if questions:
        answers, right, _ = answer_loss(model, features, patches, texts, batch)
        figures |= {"answer loss": float(answers.detach()), "exact": float(right.float().mean())}
        loss = answers + 0.5 * loss
    return loss, figures


@torch.no_grad()
def validate(model: NanoPPLLaVA, clips: int, seed: int) -> dict[str, float]:
    """Share of exact answers by kind on fresh scenes; teacher forcing gives the same as greedy answers."""
    rng = np.random.default_rng([seed, 10**6])
    all_right: list[torch.Tensor] = []
    all_kinds: list[torch.Tensor] = []
    texts = model.questions(TEXT_IDS, TEXT_ENDS)
    for _ in range(clips // 16):
        batch = make_batch(rng, 16, model.shape.patch)
        features = model.features(batch.pixels)
        _, right, kinds = answer_loss(model, features, model.patch_embeddings(features), texts, batch)
        all_right.append(right)
        all_kinds.append(kinds)
    right = torch.cat(all_right).float()
    kinds = torch.cat(all_kinds)
    by_kind = {kind: round(float(right[kinds == i].mean()), 4) for i, kind in enumerate(KINDS)}
    return {"all": round(float(right.mean()), 4), **by_kind}


def worker(rank: int, args: argparse.Namespace, shared: torch.Tensor, barrier: Any, started: float) -> None:
    """Run one process of the data-parallel training; rank 0 logs and saves.

    Args:
        rank: Number of the process.
        args: Arguments of the command line.
        shared: (2, processes, parameters) bfloat16, gradients of all processes for even and odd steps.
        barrier: Waits until every process has written its gradient.
        started: When training started, seconds since the epoch.
    """
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = NanoPPLLaVA(Shape(), guided=not args.unguided)
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True)["weights"])
    optimizer = FlatMuon(model)
    run = _Run(args, model, optimizer, started)
    for step in range(run.first, run.total):
        stage = run.stage(step)
        loss, figures = step_loss(model, args, stage, np.random.default_rng([args.seed, rank, step]))
        loss.backward()
        shared[step % 2, rank].copy_(optimizer.gradient)
        barrier.wait()
        optimizer.step(learning_rate(step, run.total, args.rate), shared[step % 2].float().mean(0))
        if rank == 0:
            run.finished(step + 1, stage, {"loss": float(loss.detach()), **figures})
    if rank == 0:
        folder = Path(args.out) / "checkpoint"
        write_checkpoint(optimizer.weights(), model.shape, folder, guided=not args.unguided)


class _Run:
    """Schedule, log and resumable state of a training run."""

    def __init__(self, args: argparse.Namespace, model: NanoPPLLaVA, optimizer: FlatMuon, started: float):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.started = started
        self.out = Path(args.out)
        self.ends = np.cumsum([args.frame_steps, args.clip_steps, args.joint_steps, args.late_steps])
        self.total = int(self.ends[-1])
        self.first = 0
        self.earlier_seconds = 0.0  # seconds of the runs that this one continues
        self.recent: dict[str, list[float]] = {}
        if args.resume and (self.out / "state.pt").exists():
            state = torch.load(self.out / "state.pt", weights_only=True)
            optimizer.restore(state["optimizer"])
            self.first = state["step"]
            self.earlier_seconds = state["seconds"]

    def stage(self, step: int) -> str:
        """The stage that a step belongs to."""
        return STAGES[int(np.searchsorted(self.ends, step, side="right"))]

    def finished(self, done: int, stage: str, figures: dict[str, float]) -> None:
        """Record a finished step; log and save when it is time."""
        for name, value in figures.items():
            self.recent.setdefault(name, []).append(value)
        last = done == self.total
        if done % self.args.report == 0 or last:
            self._log(done, stage)
        if done % self.args.save == 0 or last:
            self._save(done)

    def _seconds(self) -> float:
        return self.earlier_seconds + time.time() - self.started

    def _log(self, done: int, stage: str) -> None:
        """Append means since the last line to log.jsonl, and print them with the time left."""
        seconds = self._seconds()
        line: dict[str, Any] = {
            "step": done,
            "stage": stage,
            "seconds": round(seconds),
            "scale": round(float(self.model.logit_scale.detach().exp()), 1),
        }
        line |= {name: round(float(np.mean(values)), 3) for name, values in self.recent.items()}
        self.recent = {}
        due = done % (4 * self.args.report) == 0 or done == self.total
        if stage in QUESTIONS_OF_STAGE and due:
            line["validation"] = validate(self.model, VALIDATION_CLIPS, self.args.seed)
        with open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        left = seconds / done * (self.total - done)
        text = f"{done}/{self.total} {stage} {seconds:.0f}s, about {left:.0f}s left: {json.dumps(line)}"
        print(text, file=sys.stderr, flush=True)

    def _save(self, done: int) -> None:
        """Write state.pt atomically."""
        state = {
            "step": done,
            "seconds": self._seconds(),
            "optimizer": self.optimizer.state(),
            "weights": self.optimizer.weights(),
        }
        part = self.out / "state.pt.part"
        torch.save(state, part)
        os.replace(part, self.out / "state.pt")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, help="folder for log.jsonl, state.pt and the finished checkpoint/")
    add("--seed", type=int, default=1)
    add("--clips", type=int, default=32, help="clips per step, over all processes")
    add("--processes", type=int, default=2)
    add("--rate", type=float, default=1e-3, help="AdamW's peak learning rate; Muon's is 20 times that")
    add("--frame-steps", type=int, default=200, help="steps on single frames")
    add("--clip-steps", type=int, default=550, help="steps on clips, without questions")
    add("--joint-steps", type=int, default=450, help="steps on clips with questions")
    add("--late-steps", type=int, default=700, help="steps like the joint ones, with the final question mix")
    add("--report", type=int, default=25, help="steps between lines of the log")
    add("--save", type=int, default=100, help="steps between saved states")
    add("--unguided", action="store_true", help="uniform window weights, for comparison")
    add("--init", help="start from the weights in another run's state.pt")
    add("--resume", action="store_true", help="continue from state.pt in --out, if it exists")
    return parser.parse_args()


def main() -> None:
    """Start the processes and wait for them."""
    args = parse_arguments()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in NanoPPLLaVA().parameters())
    shared = torch.zeros(2, args.processes, size, dtype=torch.bfloat16).share_memory_()
    context = mp.get_context("spawn")
    barrier = context.Barrier(args.processes)
    started = time.time()
    workers = [
        context.Process(target=worker, args=(rank, args, shared, barrier, started))
        for rank in range(args.processes)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        sys.exit("training stopped: a process failed (its traceback is above)")


if __name__ == "__main__":
    main()
