"""Train nano from scratch on the CPU.

    python -m ppllava_edge.nano.train --out DIR [--seed S] [--unguided]

Stages in one schedule, as docs/nano.md tells: the towers on single frames (contrastive), clips with the temporal branch (contrastive),
everything jointly (answers + contrastive), and at the end the same with another mix of questions. Data parallel over --processes
one-thread processes. Batches depend on seed, process and step alone, so a run that was stopped goes on (--resume) as if nothing had
happened.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads would starve the other process

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from ppllava_edge.nano.checkpoint import write_checkpoint
from ppllava_edge.nano.data import LATE_QUESTIONS, QUESTIONS, make_batch
from ppllava_edge.nano.losses import TEXT_ENDS, TEXT_IDS, answer_loss, contrastive_loss
from ppllava_edge.nano.model import NanoPPLLaVA, Shape
from ppllava_edge.nano.optimizer import FlatMuon
from ppllava_edge.nano.world import KINDS


def learning_rate(step: int, total: int, peak: float, warmup: int = 60, decay_share: float = 0.5) -> float:
    """Linear warm-up, constant, then linear to zero over the last share of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (total - step) / (decay_share * total))


def step_loss(
    model: NanoPPLLaVA, args, stage: str, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one step's batch in one process."""
    clips = args.clips // args.processes * (8 if stage == "frames" else 1)
    questions = {"joint": QUESTIONS, "late": LATE_QUESTIONS}.get(stage, [])
    batch = make_batch(rng, clips, model.shape.patch, single=stage == "frames", questions=questions)
    texts = model.questions(TEXT_IDS, TEXT_ENDS)
    features = model.features(batch.pixels, branch=stage != "frames")
    patches = model.patch_embeddings(features)
    logits = torch.einsum("bvd,kd->bkv", patches, texts) * model.logit_scale.float().exp()
    loss, figures = contrastive_loss(logits, batch, single=stage == "frames")
    if questions:
        answers, right, _ = answer_loss(model, features, patches, texts, batch)
        figures |= {"answer loss": float(answers.detach()), "exact": float(right.float().mean())}
        loss = answers + 0.5 * loss
    return loss, figures


@torch.no_grad()
def validate(model: NanoPPLLaVA, clips: int, seed: int) -> dict[str, float]:
    """Exact answers by kind on fresh scenes (teacher forced, which equals greedy for exact match)."""
    rng, rights, kinds_ = np.random.default_rng([seed, 10**6]), [], []
    texts = model.questions(TEXT_IDS, TEXT_ENDS)
    for _ in range(clips // 16):
        batch = make_batch(rng, 16, model.shape.patch)
        features = model.features(batch.pixels)
        _, r, k = answer_loss(model, features, model.patch_embeddings(features), texts, batch)
        rights.append(r)
        kinds_.append(k)
    right, kinds = torch.cat(rights).float(), torch.cat(kinds_)
    table = {kind: round(float(right[kinds == i].mean()), 4) for i, kind in enumerate(KINDS)}
    return {"all": round(float(right.mean()), 4), **table}


def worker(rank: int, args, shared: torch.Tensor, barrier, started: float) -> None:
    """One process of the data-parallel run; rank 0 reports and saves."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    out = Path(args.out)
    model = NanoPPLLaVA(Shape(), guided=not args.unguided)
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True)["weights"])
    optimizer = FlatMuon(model)
    ends = np.cumsum([args.frame_steps, args.clip_steps, args.joint_steps, args.late_steps])
    total, first = int(ends[-1]), 0
    spent = 0.0
    if args.resume and (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        optimizer.restore(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    recent: dict[str, list[float]] = {}
    for step in range(first, total):
        stage = ("frames", "clips", "joint", "late")[int(np.searchsorted(ends, step, side="right"))]
        loss, figures = step_loss(model, args, stage, np.random.default_rng([args.seed, rank, step]))
        loss.backward()
        shared[step % 2, rank].copy_(optimizer.gradient)
        barrier.wait()
        optimizer.step(learning_rate(step, total, args.rate), shared[step % 2].float().mean(0))
        if rank:
            continue
        for name, value in {"loss": float(loss.detach()), **figures}.items():
            recent.setdefault(name, []).append(value)
        done = step + 1
        if done % args.report == 0 or done == total:
            seconds = spent + time.time() - started
            line = {
                "step": done,
                "stage": stage,
                "seconds": round(seconds),
                "scale": round(float(model.logit_scale.exp()), 1),
            }
            line |= {name: round(float(np.mean(values)), 3) for name, values in recent.items()}
            recent = {}
            if stage in ("joint", "late") and (done % (4 * args.report) == 0 or done == total):
                line["validation"] = validate(model, 64, args.seed)
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            eta = seconds / done * (total - done)
            print(
                f"{done}/{total} {stage} {seconds:.0f}s, about {eta:.0f}s left: {json.dumps(line)}",
                file=sys.stderr,
                flush=True,
            )
        if done % args.save == 0 or done == total:
            seconds = spent + time.time() - started
            state = {
                "step": done,
                "seconds": seconds,
                "optimizer": optimizer.state(),
                "weights": optimizer.weights(),
            }
            torch.save(state, out / "state.pt.part")
            os.replace(out / "state.pt.part", out / "state.pt")
    if rank == 0:
        write_checkpoint(optimizer.weights(), model.shape, out / "checkpoint", guided=not args.unguided)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, help="folder for the log, the resumable state and the finished checkpoint/"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clips", type=int, default=32, help="clips a step, over all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's peak rate; Muon's is 20 times that")
    parser.add_argument("--frame-steps", type=int, default=200)
    parser.add_argument("--clip-steps", type=int, default=550)
    parser.add_argument("--joint-steps", type=int, default=450)
    parser.add_argument(
        "--late-steps",
        type=int,
        default=700,
        help="steps like the joint ones, with the mix of questions for the end",
    )
    parser.add_argument("--report", type=int, default=25)
    parser.add_argument("--save", type=int, default=100)
    parser.add_argument("--unguided", action="store_true", help="uniform window weights, for comparison")
    parser.add_argument("--init", help="start from the weights in another run's state.pt")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    size = sum(p.numel() for p in NanoPPLLaVA().parameters())
    shared = torch.zeros(2, args.processes, size, dtype=torch.bfloat16).share_memory_()
    context = mp.get_context("spawn")
    barrier, started = context.Barrier(args.processes), time.time()
    workers = [
        context.Process(target=worker, args=(rank, args, shared, barrier, started))
        for rank in range(args.processes)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        sys.exit("training stopped: a process ended with an error (its traceback is above)")


if __name__ == "__main__":
    main()
