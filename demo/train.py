"""Train the demo model: ``python -m demo.train --minutes 102``.

Seeded, and resumable: run the same command again and it goes on from ``demo/runs/last.pt``. The
length is a wall-clock budget; learning rate and loss weights follow the share of it that is used.
Each of the workers is one process with one thread and takes its part of every batch; gradients are
averaged. On two cores that is faster than one process with two threads, which waits at every
operation for the slower core.
Every few minutes the averaged weights are scored on held-out questions, a line is added to
``demo/runs/log.jsonl``, and ``demo/model/`` is written anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from transformers import LlavaProcessor

from demo.batches import BatchSampler, prompt_start
from demo.data import RUNS, PictureSet, cached_scenes, easy_vqa
from demo.evaluate import exact_match, held_out_pictures
from demo.forward import visual_tokens
from demo.losses import WordClasses, answer_loss, patch_loss
from demo.model import Size, build_model, save_model
from demo.vocabulary import build_processor, load_processor

MODEL = Path(__file__).parent / "model"

# The types that learn last are asked more often.
EMPHASIS = {"position": 2.0, "relation": 2.5, "count": 1.4, "easy-vqa negated": 2.0}


@dataclass(frozen=True)
class Plan:
    """The training's numbers; shares are of the wall-clock budget."""

    minutes: float
    seed: int = 0
    scenes: int = 48_000
    questions_per_scene: int = 32
    workers: int = 2
    pictures: int = 32  # a step, all workers together
    unasked: int = 16  # more pictures a step, for the auxiliary loss alone
    questions: int = 12
    easy_share: float = 0.19
    learning_rate: float = 1e-3
    decay_from: float = 0.8  # of the budget
    weight_decay: float = 0.05
    patches_only: float = 0.07  # the first share trains vision tower and projector alone
    chat_share: float = 0.08  # of the steps, once `chat_from` of the budget is used
    chat_from: float = 0.4
    average: float = 0.998
    report_minutes: float = 6.0
    emphasis: Mapping[str, float] = field(default_factory=lambda: EMPHASIS)


def learning_rate(plan: Plan, used: float, step: int) -> float:
    """Return a constant rate that falls linearly at the end, after a warm-up of 200 steps."""
    left = min(1.0, max(0.02, (1.0 - used) / (1.0 - plan.decay_from)))
    return plan.learning_rate * left * min(1.0, (step + 1) / 200)


def patch_weight(plan: Plan, used: float) -> float:
    """Return the auxiliary loss's weight: 1 at first, then linearly down to 0.3."""
    return max(0.3, 1.0 - 1.3 * max(0.0, used - plan.patches_only))


class Trainer:
    """The state of a run: weights, their running average, optimiser, clock and generators."""

    def __init__(self, plan: Plan, processor: LlavaProcessor, rank: int) -> None:
        """Start afresh from ``plan.seed``, as worker ``rank``."""
        self.plan, self.processor, self.rank = plan, processor, rank
        self.model = build_model(Size(), processor, plan.seed)
        self.averaged = copy.deepcopy(self.model)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": plan.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=plan.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.classes = WordClasses(processor)
        self.start = prompt_start(processor)
        self.step = 0
        self.seconds = self.agreed = 0.0  # this worker's clock; the workers' mean at the last step
        self.sums: dict[str, list[float]] = {}

    def save(self, path: Path) -> None:
        """Write everything that a resumed run needs."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a file written by :meth:`save`."""
        state = torch.load(path, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        self.seconds = self.agreed = state["seconds"]

    def train_step(self, sampler: BatchSampler) -> None:
        """Draw a batch and take one step."""
        plan = self.plan
        used = self.agreed / (60 * plan.minutes)
        rate = learning_rate(plan, used, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        warming = used < plan.patches_only
        # What kind of batch it is, the workers draw alike; what is in it, each for itself.
        kind = np.random.default_rng([plan.seed, self.step])
        chat = bool(used > plan.chat_from and kind.random() < plan.chat_share)
        batch = sampler.draw(
            np.random.default_rng([plan.seed, self.step, self.rank]),
            plan.pictures // plan.workers,
            plan.questions // 2 if chat else plan.questions,
            unasked=plan.unasked // plan.workers,
            short=bool(kind.random() < sampler.short_share),
            chat=chat,
        )
        with torch.autocast("cpu", torch.bfloat16):
            visual = visual_tokens(self.model, batch.pixel_values)
            answers = None
            if not warming:
                asked = visual[: len(batch.questions)]
                answers = answer_loss(self.model, self.start, asked, batch)
        embedding = cast(Tensor, self.model.get_input_embeddings().weight)
        patches, accuracy = patch_loss(visual, embedding, self.classes, batch.owner, batch.attributes)
        loss = patch_weight(plan, used) * patches
        if answers is not None:
            loss = loss + answers
            self._note("answers", answers.item())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        keep = min(plan.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - keep)
        self.step += 1
        self._note("patches", patches.item())
        self._note("norm", float(norm))
        self._note("visual_std", visual.float().std().item())
        for name, value in accuracy.items():
            self._note(f"patch_{name}", value)

    def _average_gradients(self) -> None:
        """Replace every gradient, and the clock, by the mean over the workers."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([self.seconds])])
        torch.distributed.all_reduce(flat)
        flat /= self.plan.workers
        self.seconds = self.agreed = float(flat[-1])
        place = 0
        for gradient in gradients:
            gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
            place += gradient.numel()

    def _note(self, name: str, value: float) -> None:
        self.sums.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Return the means of what was noted since the last call."""
        means = {name: round(float(np.mean(values)), 4) for name, values in self.sums.items()}
        self.sums.clear()
        return means


def run(rank: int, plan: Plan) -> None:
    """Train as worker ``rank`` until the budget is used; worker 0 reports and saves."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{RUNS / 'rendezvous'}", rank=rank, world_size=plan.workers
    )
    processor = load_processor(RUNS / "processor")
    trainer = Trainer(plan, processor, rank)
    last = RUNS / "last.pt"
    if last.exists():
        trainer.load(last)
    scenes = cached_scenes(plan.scenes, "train", questions=plan.questions_per_scene)
    sampler = BatchSampler(processor, scenes, easy_vqa("train"), plan.easy_share, plan.emphasis)
    held_out = held_out_pictures(scenes=200, questions=12, easy_pictures=120)
    if rank == 0:
        weights = sum(p.numel() for p in trainer.model.parameters())
        print(f"{weights:,} weights, from step {trainer.step}", flush=True)
    torch.distributed.barrier()
    clock = time.monotonic()
    reported = printed = trainer.seconds
    while trainer.agreed < 60 * plan.minutes:
        trainer.train_step(sampler)
        now = time.monotonic()
        trainer.seconds += now - clock
        clock = now
        if rank == 0 and trainer.step % 100 == 0:
            recent = {name: round(values[-1], 3) for name, values in trainer.sums.items()}
            each = (trainer.seconds - printed) / 100
            print(
                f"{trainer.seconds / 60:6.1f} min  step {trainer.step}  {each:.2f} s/step  {recent}",
                flush=True,
            )
            printed = trainer.seconds
        if rank == 0 and trainer.seconds - reported > 60 * plan.report_minutes:
            report(trainer, held_out)
            reported = trainer.seconds
    if rank == 0:
        report(trainer, held_out)
    torch.distributed.destroy_process_group()


def report(trainer: Trainer, held_out: list[PictureSet]) -> None:
    """Score the averaged weights, add a line to the log, save the run and the model."""
    line = {
        "minutes": round(trainer.seconds / 60, 2),
        "step": trainer.step,
        **trainer.means(),
        "exact_match": exact_match(trainer.averaged, trainer.processor, held_out),
    }
    with (RUNS / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    trainer.save(RUNS / "last.pt")
    save_model(trainer.averaged, trainer.processor, MODEL)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=102.0, help="wall-clock budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    plan = Plan(minutes=arguments.minutes, seed=arguments.seed, workers=arguments.workers)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "rendezvous").unlink(missing_ok=True)
    if not (RUNS / "processor").exists():
        build_processor().save_pretrained(RUNS / "processor")
    cached_scenes(plan.scenes, "train", questions=plan.questions_per_scene)
    torch.multiprocessing.spawn(run, args=(plan,), nprocs=plan.workers)


if __name__ == "__main__":
    main()
