"""Training: the step of distillation, the loop around it, runs, evaluation, recipes, the command line.

The other rooms know nothing of one another: data.py makes batches, models.py turns a batch into
detections, clockdistill.py compares a student's tensors with a teacher's. This file joins them:

    batch -> clockdistill_step   -> named, weighted losses        one step, on one page
          -> train_steps         -> log of each step              the loop: backward, clip, optimizer
          -> fit                 -> checkpoints, result.json      a run

Training without a teacher is the same loop with `plain_step`.
"""
import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl-C while the libraries load: there is nothing to save yet, so one line is enough.
    def stop_at_once(number, frame):
        os.write(2, b"stopped before anything began\n")
        os._exit(130)
    signal.signal(signal.SIGINT, stop_at_once)

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import platform
import subprocess
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import clip_boxes_to_image
from tqdm import tqdm

import checkpoints
import data
import models
from checkpoints import write_json, write_text
from clockdistill import CLoCKDistill

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------
# The step
# ----------------------------------------------------------------------------------------------

def clockdistill_step(student, teacher, batch, method, generator=None):
    """The losses of one step of CLoCKDistill -> {name: weighted scalar}; their sum is minimised.

    student: a detector in training mode.  teacher: a frozen one in eval mode.  method: CLoCKDistill.
    batch: data.Batch on their device.  generator: draws the queries' noise; None = torch's own.
    """
    # 1. The frozen teacher encodes the images, and answers the target-aware queries and nothing else.
    queries, t = None, models.Detections(None, None)
    with torch.no_grad():
        t_memory = teacher.encode(batch.images, batch.padding)
        if method.lambda_log:
            contents = {"label": teacher.label_embedding, "own": teacher.learned_content}
            content = contents.get(method.content)         # None: the method has frozen ones
            queries = method.queries(batch.labels, batch.boxes, content, generator)
            queries = models.Queries(*queries)              # content, boxes, attend, valid
            if method.learned:                              # [P]: the teacher's own queries too
                queries = teacher.with_learned(queries, t_memory)
            t = teacher.decode(t_memory, queries.content, queries.boxes, queries.attend,
                               queries.position)

    # 2. The student decodes its learned, its denoising and the same target-aware queries in ONE
    #    pass. An attention mask isolates the groups. Linear maps join models of unequal widths.
    extra = queries and queries._replace(content=method.student_content(queries.content),
                                         position=method.student_content(queries.position))
    output = student(batch.images, batch.padding, batch.targets, extra)
    s = output.extra or models.Detections(None, None)

    # 3. Detection losses of the student; memory against memory, answers against answers.
    losses = student.weighted_losses(output, batch.targets)
    return losses | method(
        output.memory.tokens, t_memory.tokens, s.logits, s.boxes, t.logits, t.boxes,
        batch.labels, batch.boxes, output.memory.shapes, output.memory.padding,
        queries and queries.valid, batch.extent)


def plain_step(student, teacher, batch, method, generator=None):
    """The same of training without a teacher, whose place, and the method's, is None."""
    output = student(batch.images, batch.padding, batch.targets)
    return student.weighted_losses(output, batch.targets)


def step_of(method):
    """The step that belongs to a distillation method, or to None."""
    if method is None:
        return plain_step
    if isinstance(method, CLoCKDistill):
        return clockdistill_step
    from experiments.baselines import rival_step
    return rival_step


class Learner(nn.Module):
    """Student and method as one module, so that DDP wraps one forward and averages both's gradients.

    The teacher is handed in at each step: it has no gradients, so it is no part of what learns.
    """
    def __init__(self, student, method=None):
        super().__init__()
        self.student, self.method = student, method
        self.step = step_of(method)

    def forward(self, teacher, batch, generator=None):
        """-> {name: weighted scalar}, see the steps above."""
        return self.step(self.student, teacher, batch, self.method, generator)


# ----------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------

def train_steps(learner, teacher, optimizer, batches, cfg, steps, start=0, scaler=None,
                probe_every=0, balance=None):
    """Yield (step, log) after each optimizer step: a command prints it, a notebook plots it.

    learner: Learner, or DDP around it.  teacher: a frozen model, or None.
    batches: iterable of data.Batch, one per step, on the learner's device.
    start: the step that the first batch belongs to.  scaler: GradScaler, for fp16.
    probe_every: steps between reports of `gradient_report`, 0 = none.  balance: Balance, or None.
    log: {"loss", every weighted loss by name, "grad_norm", "lr", "images"} as plain numbers; with a
    teacher now and then "report"; "balance", its factors, at the first step that uses them.
    Raises FloatingPointError, naming the first bad term and its images, when a loss is not finite;
    nothing is updated.
    """
    # `inner` holds the modules; with several processes `learner` is DDP's wrapper around it.
    inner = learner.module if isinstance(learner, DistributedDataParallel) else learner
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainable = [p for p in inner.parameters() if p.requires_grad]
    device = trainable[0].device
    # A disabled scaler leaves everything as it is, so that one backward path serves all precisions.
    generator = torch.Generator(device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    for step, batch in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(cfg, step, steps)
        # Noise is a function of (seed, step, process), so that a resumed run draws the same. The
        # queries' noise has its own generator: a student draws the same denoising noise with and
        # without a teacher.
        noise = (cfg.seed * 1_000_003 + step) * 4096 + rank
        torch.manual_seed(noise)
        generator.manual_seed(noise + 2 ** 40)

        # Forward and backward, part by part; only the last part's backward has to talk to the
        # other processes.
        log, parts = {}, batch.split(cfg.accumulate)
        for part in parts:
            silent = contextlib.nullcontext()
            if learner is not inner and part is not parts[-1]:
                silent = learner.no_sync()
            with silent:
                with autocast(device, cfg.precision):
                    losses = losses_of(learner, teacher, part, generator, step)
                if balance is not None:
                    if part is parts[0]:
                        own = [p for p in inner.student.parameters() if p.requires_grad]
                        balance.measure(losses, step, own)
                    losses = balance(losses, step)
                values = numbers(losses, step, part)
                if probe_every and step % probe_every == 0 and teacher and part is parts[0]:
                    log["report"] = gradient_report(losses, inner.student)
                scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, value in values.items():
                log[name] = log.get(name, 0) + value / len(parts)

        # Clip and update. With fp16 the scaler itself leaves out a step that overflows.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trainable, cfg.clip)
        if not scaler.is_enabled() and not norm.isfinite():
            raise FloatingPointError(f"step {step}: the gradient is not finite, images "
                                     f"{batch.image_ids}: lower --lr")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # One line per step: the sum first, then every loss by name.
        report = log.pop("report", None)
        log = {"loss": sum(log.values()), **log,
               "grad_norm": norm.item() if norm.isfinite() else None,
               "lr": optimizer.param_groups[0]["lr"], "images": batch.image_ids}
        if balance is not None and step == len(balance.measured):
            log["balance"] = balance.factors(step)
        yield step, log | ({"report": report} if report else {})


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_HELP = ("bf16 takes 0.6 of fp32's time on large images where the processor has it, and more "
                  "on the toy's (default: %(default)s)")


def autocast(device, precision):
    """The context in which networks compute in this precision: "fp32" changes nothing."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def losses_of(learner, teacher, batch, generator, step):
    """A step's losses. Predictions that cannot be matched stop the run, with step and images."""
    try:
        return learner(teacher, batch, generator)
    except models.criterion.NotFinite as error:
        raise FloatingPointError(f"step {step}, images {batch.image_ids}: {error}") from None


def numbers(losses, step, batch):
    """{name: float}, with one wait for the GPU. Raises FloatingPointError with the first bad one."""
    # One tensor, so that the GPU is waited for once and not once per loss.
    stacked = torch.stack([value.detach().float() for value in losses.values()])
    values = dict(zip(losses, stacked.tolist()))
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is not finite, on images "
                                     f"{batch.image_ids}: lower --lr, use --precision fp32, or "
                                     "look at these images and their labels")
    return values


def is_detection(name):
    """Whether a loss is the student's own; the others come from the teacher."""
    return name.startswith("loss_")


def gradient_report(losses, student):
    """How much each part of the loss asks of the student: {part: (share of the total, gradient norm)}.

    It answers at once whether distillation is active, and how strong. A part without gradient is off.
    One far above detection leads what it reaches: memory leads backbone and encoder, and never
    reaches the decoder.
    """
    # Detection counts as one part, each of the method's losses as another.
    parts = {"detection": sum(value for name, value in losses.items() if is_detection(name))}
    parts |= {name: value for name, value in losses.items() if not is_detection(name)}
    total = sum(value.item() for value in parts.values())
    parameters = [p for p in student.parameters() if p.requires_grad]
    report = {}
    for name, value in parts.items():
        gradients = ()                           # a part that is off is a constant without a graph
        if value.requires_grad:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        squares = sum(g.pow(2).sum().item() for g in gradients if g is not None)
        report[name] = (value.item() / max(total, 1e-12), math.sqrt(squares))
    return report


def gradient_ratio(losses, names, parameters):
    """How long the gradient of some losses is: |g of the part| / |g of detection|.

    losses: {name: weighted scalar} of one step.  names: the losses that make up the part.
    parameters: the student's; those count that both reach (memory does not reach the decoder).
    NaN where the part has no gradient.
    """
    part = [losses[name] for name in names]
    if not any(value.requires_grad for value in part):
        return math.nan
    detection = [value for name, value in losses.items() if is_detection(name)]
    gradients = [torch.autograd.grad(sum(side), parameters, retain_graph=True, allow_unused=True)
                 for side in (part, detection)]
    both = [pair for pair in zip(*gradients) if pair[0] is not None and pair[1] is not None]
    if not both:
        return math.nan
    lengths = [math.sqrt(sum(g.square().sum().item() for g in side)) for side in zip(*both)]
    return lengths[0] / lengths[1] if all(lengths) else math.nan


class Balance(nn.Module):
    """Weights that carry over from one set of pictures to another (`--balance`).

    How large a loss is depends on teacher, images and widths, so a lambda tuned on one set says
    little about another. Here the *ratio* of gradients is chosen, and the weight follows from it:
    the first 8 steps measure each part's `gradient_ratio` without using the part; from then on the
    part is multiplied with (wanted ratio) / (geometric mean of the 8).

    Why so early: measured there, the lambdas tuned on the toy are ratios of 56, 19 and 129 (DINO,
    Deformable DETR, DAB-DETR) for memory, and of 0.91, 0.87 and 1.17 for the answers. At the end of
    the warm-up memory's are 57, 14 and 450.

    ratios: {"memory": 50.0, "cls+l1+giou": 1.0}: a part is named by its losses.
    What was measured is a buffer: a resumed run goes on with the same factors.
    """
    def __init__(self, ratios, steps=8):
        super().__init__()
        self.ratios = ratios
        self.register_buffer("measured", torch.full((steps, len(ratios)), math.nan))

    def measure(self, losses, step, parameters):
        """Remember the ratios of this step, if it is one of the first."""
        if step < len(self.measured):
            row = [gradient_ratio(losses, part.split("+"), parameters) for part in self.ratios]
            row = torch.tensor(row, device=self.measured.device)             # (parts,)
            if dist.is_initialized():                    # the same factors in all processes
                dist.all_reduce(row)
                row /= dist.get_world_size()
            self.measured[step] = row

    def factors(self, step):
        """{part: its factor at this step}. Raises ValueError when a part never had a gradient."""
        if step < len(self.measured):
            return dict.fromkeys(self.ratios, 0.0)
        usual = self.measured.log().nanmean(0).exp().tolist()    # NaN: a batch without objects
        for part, value in zip(self.ratios, usual):
            if not math.isfinite(value):
                raise ValueError(f"--balance {part}: this part of the method has no gradient: "
                                 "leave it out")
        return {part: wanted / value for (part, wanted), value in zip(self.ratios.items(), usual)}

    def forward(self, losses, step):
        """The losses with the factors of this step."""
        factor = {name: value for part, value in self.factors(step).items()
                  for name in part.split("+")}
        return {name: value * factor.get(name, 1.0) for name, value in losses.items()}


def open_balance(cfg, method, steps):
    """The Balance of `--balance`, or None. Raises ValueError when the run is too short to measure."""
    if not cfg.balance or method is None:
        return None
    # A part of CLoCKDistill whose weight is 0 is off, and nothing to balance.
    off = set()
    if isinstance(method, CLoCKDistill):
        off |= {"memory"} if method.lambda_mem == 0 else set()
        off |= {"cls", "l1", "giou"} if method.lambda_log == 0 else set()
    balance = Balance({part: ratio for part, ratio in cfg.balance.items()
                       if not set(part.split("+")) <= off})
    if steps <= len(balance.measured):
        raise ValueError(f"--balance measures in the first {len(balance.measured)} steps, and this "
                         f"run has {steps} in all: more --steps, or weights in --method-options")
    if not balance.ratios:
        return None
    return balance.to(next(method.parameters(), torch.zeros(())).device)


def check_balance(cfg):
    """Raises ValueError for a loss that the method lacks, one named twice, a ratio that is none."""
    if not cfg.balance or cfg.method is None:
        return
    known = method_class(cfg.method).terms
    named = [name for part in cfg.balance for name in part.split("+")]
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(f"--balance: {cfg.method} has no loss {', '.join(unknown)}, only "
                         f"{', '.join(known)}")
    if len(named) > len(set(named)) or not all(0 < x < math.inf for x in cfg.balance.values()):
        raise ValueError(f"--balance {cfg.balance}: want each loss once, and ratios above 0")


def lr_factor(cfg, step, steps):
    """What the learning rates are multiplied with at this step (0-based).

    Linear warm-up, then one drop to a tenth, or a cosine down to 2 %.
    """
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    if cfg.schedule == "drop":
        return 0.1 if step >= cfg.drop_at * steps else 1.0
    progress = (step - cfg.warmup) / max(1, steps - cfg.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------
# A run: data, student, perhaps a teacher; log, checkpoints, result
# ----------------------------------------------------------------------------------------------

def fit(cfg, run):
    """Train (and, with cfg.teacher, distil) until done -> the result, also in OUT/result.json.

    OUT/ receives config.json, log.jsonl (one line per step), last.pt and best.pt (weights as
    evaluated, safe to load), result.json. With run.resume the run goes on from last.pt, with the
    numbers it would have had without the stop.
    """
    device = pick_device(run.device)
    with processes(device) as (rank, world):
        if rank > 0:
            return TrainingRun(cfg, run, device, rank, world).finish()
        Path(run.out).mkdir(parents=True, exist_ok=True)
        with checkpoints.locked(run.out):         # of two runs into one folder, one would be lost
            return TrainingRun(cfg, run, device, rank, world).finish()


class TrainingRun:
    """`fit` in one process: what a run is made of, and what it does with it. Rank 0 writes.

    Built with everything that can fail before the first step; `finish` trains to the end.
    """
    def __init__(self, cfg, run, device, rank, world):
        self.run, self.device, self.rank, self.world = run, device, rank, world
        self.out = out = Path(run.out)
        self.last = out / "last.pt"
        if not run.resume and (held := [name for name in KEPT if (out / name).exists()]):
            raise ValueError(f"{out} already holds a run ({held[0]}): add --resume to continue it, "
                             "or choose another --out")

        # Data first: whatever is wrong with it is said before a model is built.
        self.train_set, self.val_set = open_data(cfg)
        self.steps = cfg.steps
        if self.steps is None:
            images = cfg.epochs * len(self.train_set)
            self.steps = math.ceil(images / (cfg.batch_size * world))
        self.cfg = cfg = fit_to_data(cfg, self.train_set, self.steps)

        # The models, and the method between them.
        self.student = open_student(cfg, self.train_set).to(device)
        self.teacher = method = taught_by = None
        if cfg.teacher:
            self.teacher = open_teacher(cfg, run, self.val_set, device)
            check_pair(self.teacher, self.student, self.train_set)
            method = open_method(cfg, self.teacher, self.student)
            taught_by = fingerprint(self.teacher)
        self.balance = open_balance(cfg, method, self.steps)

        # What learns: student and method, their optimizer, and the moving average that is evaluated.
        self.learner = Learner(self.student, method).train()
        self.optimizer = make_optimizer(cfg, self.student, method)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        self.average = None
        if cfg.ema:
            self.average = AveragedModel(
                self.student, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
        self.evaluated = self.average.module if cfg.ema else self.student

        # All that the next step depends on, in addition to its number: a checkpoint has to hold it.
        stateful = {"student": self.student, "optimizer": self.optimizer, "scaler": self.scaler,
                    "average": self.average, "method": method, "balance": self.balance}
        self.stateful = {name: part for name, part in stateful.items() if part is not None}
        self.provenance = {
            "settings": plain(cfg), "seed": cfg.seed, "commit": commit(),
            "machine": machine(device), "world": world, "taught_by": taught_by,
            "images": [self.train_set.fingerprint, self.val_set.fingerprint]}

        # Where to begin: at step 0, or where the checkpoint stands.
        self.start, self.earlier, self.history, self.best = 0, 0.0, [], -1.0
        if run.resume and self.last.exists():
            saved = restore(self.last, self.stateful, self.provenance)
            self.start, self.earlier = saved["step"], saved["minutes"]
            self.history, self.best = saved["history"], saved["best"]
        elif run.resume:
            say(f"note       {self.last}: no checkpoint there yet, so --resume begins at step 0")
        self.began = time.monotonic()
        if world > 1:
            self.learner = DistributedDataParallel(self.learner)

    def minutes(self):
        """Time spent on this run, earlier sittings included."""
        return self.earlier + (time.monotonic() - self.began) / 60

    def finish(self):
        """Train the steps that are left -> the result, which is also written."""
        cfg, out = self.cfg, self.out
        # Write down what made the run before it runs.
        if self.rank == 0:
            for leftover in out.glob(".*.*.*"):   # of a kill in the middle of a save
                leftover.unlink()
            command = " ".join(sys.argv)
            write_json(out / "config.json",
                       {**self.provenance, "command": command, "steps": self.steps})
            trim_log(out / "log.jsonl", self.start)
        announce(cfg, self.train_set, self.val_set, self.student, self.start, self.steps,
                 self.world, self.device)
        self.train()

        # Save before evaluating, so that a Ctrl-C meanwhile loses no step, and after it, with the
        # scores. A model that answers with NaN is never saved: its last good checkpoint is kept.
        self.save(self.steps, self.last)
        scores = self.evaluate(self.steps)
        self.save(self.steps, self.last)
        size = reference_size(cfg, self.val_set)
        result = {**scores, "params": count_parameters(self.student),
                  "gflops": models.gflops(self.evaluated, *size), "gflops_at": list(size),
                  "minutes": self.minutes(), "steps": self.steps,
                  "images_per_second": speed_of(self.evaluated, self.val_set),
                  "history": self.history, "weights": fingerprint(self.evaluated),
                  **self.provenance}
        if self.rank == 0:
            write_json(out / "result.json", result)
        say(f"written    {out}/result.json, last.pt, best.pt, log.jsonl")
        return result

    def train(self):
        """The loop: after each step the average, the log, the bar; now and then a checkpoint."""
        cfg, run, steps = self.cfg, self.run, self.steps
        batches = data.loader(self.train_set, cfg.batch_size, steps=steps, start=self.start,
                              seed=cfg.seed, workers=run.workers, rank=self.rank, world=self.world)
        on_device = (batch.to(self.device) for batch in batches)
        bar = tqdm(total=steps, initial=self.start, desc=self.out.name, disable=self.rank > 0,
                   mininterval=quiet_interval(), dynamic_ncols=True)
        log_file = open(self.out / "log.jsonl", "a") if self.rank == 0 else None
        try:
            with finish_step_on_signal() as asked_to_stop:
                clock = saved_at = time.monotonic()
                for step, log in train_steps(
                        self.learner, self.teacher, self.optimizer, on_device, cfg, steps,
                        self.start, self.scaler, run.probe_every, self.balance):
                    if self.average is not None:
                        self.average.update_parameters(self.student)
                    if self.rank == 0:
                        line = {"step": step, **log, "seconds": round(time.monotonic() - clock, 4)}
                        print(json.dumps(line), file=log_file, flush=True)
                        bar.update()
                        bar.set_postfix_str(short(log), refresh=False)
                    self.remark(step, log)
                    done = step + 1
                    if run.eval_every and done % run.eval_every == 0 and done < steps:
                        self.evaluate(done)
                    if time.monotonic() - saved_at > 60 * run.save_minutes and done < steps:
                        self.save(done, self.last)
                        saved_at = time.monotonic()
                    if anyone(asked_to_stop, self.device):    # Ctrl-C: this step is done, and kept
                        self.save(done, self.last)
                        raise Interrupted(f"stopped after step {done} of {steps}")
                    clock = time.monotonic()
        finally:
            bar.close()
            if log_file:
                log_file.close()

    def remark(self, step, log):
        """Print what a step's log has now and then: the balance, and the gradients of the parts."""
        if "balance" in log:
            factors = (f"{part} {factor:.4g}" for part, factor in log["balance"].items())
            say(f"step {step:6d}  balance: from now on the method's losses times "
                + ", ".join(factors))
        measuring = self.balance is not None and step < len(self.balance.measured)
        if "report" in log and step % (5 * self.run.probe_every) == 0 and not measuring:
            say(f"step {step:6d}  share of the loss, gradient norm: " + ", ".join(
                f"{name} {share:.0%} {norm:.2g}"
                for name, (share, norm) in log["report"].items()))

    def evaluate(self, step):
        """AP of the averaged weights, into the history; the best so far are kept in best.pt."""
        history = self.history
        if history and history[-1]["step"] == step:      # resumed after it: not twice in the curve
            history.pop()
        if self.world > 1:       # BatchNorm's buffers differ; the first process's are what is saved
            for buffer in self.evaluated.buffers():
                dist.broadcast(buffer, 0)
        found = detect(self.evaluated, self.val_set, self.run, self.run.eval_batch)
        scores = data.evaluate(found, self.val_set)
        history.append({"step": step, **{k: v for k, v in scores.items() if k != "per_class"}})
        say(f"step {step:6d}  AP {scores['AP']:.3f}  AP50 {scores['AP50']:.3f}  "
            f"AP75 {scores['AP75']:.3f}")
        if not scores["AP"] <= self.best:                # also when it is not defined
            self.best = scores["AP"]
            self.save(step, self.out / "best.pt", resumable=False)
        return scores

    def save(self, step, path, resumable=True):
        """Save the weights as evaluated; with `resumable` also what `restore` needs.

        A student that blew up is never saved over a good one: its answer to one image is looked at.
        """
        if self.rank > 0:
            return
        for model in {self.student, self.evaluated}:
            answer(model, data.collate([self.val_set[0]]).to(self.device))
        payload = {"model": self.evaluated.state_dict(), "detector": self.cfg.detector,
                   "config": self.student.config, "classes": list(self.train_set.classes),
                   "category_ids": list(self.train_set.category_ids), "data": self.cfg.data,
                   "metrics": self.history[-1] if self.history else {},
                   "minutes": self.minutes(), "step": step, "history": self.history,
                   "best": self.best, **self.provenance}
        if resumable:
            payload["resume"] = {name: part.state_dict() for name, part in self.stateful.items()}
        checkpoints.save(path, payload)


def open_data(cfg):
    """The training and the validation images.

    Raises ValueError when their classes differ, naming the difference: labels are numbers, so a model
    trained on one list would be judged by another.
    """
    with first_process_first():                   # it may have to draw the toy
        train_set = build_data(cfg, cfg.train_split, augment=cfg.augment)
        val_set = build_data(cfg, cfg.val_split)
    if train_set.classes != val_set.classes:
        differ = sorted({*train_set.classes} ^ {*val_set.classes}) or "another order"
        raise ValueError(f"the training and validation splits of {cfg.root} have different classes "
                         f"({differ}): give both the same --class-map or categories")
    if not train_set.most_objects:
        raise ValueError(f"no image of {cfg.train_split} in {cfg.root} has an object to learn "
                         f"from: {train_set.summary}")
    return train_set, val_set


def fit_to_data(cfg, train_set, steps):
    """Settings that follow the data and the length of the run, where `--fit-to-data` asks for it.

    Three queries for each object of the fullest image, at least 30, leave room for several tries at
    each. An average over about the last twentieth of the run keeps up with it.
    """
    if not cfg.fit_to_data:
        return cfg
    queries = cfg.num_queries or max(30, 3 * train_set.most_objects)
    ema = cfg.ema or min(round(max(0.0, 1 - 20 / max(steps, 1)), 4), 0.9999)
    if (queries, ema) == (cfg.num_queries, cfg.ema):
        return cfg
    say(f"fitted     {queries} queries, for at most {train_set.most_objects} objects an image; "
        f"--ema {ema}, for {steps} steps")
    return dataclasses.replace(cfg, num_queries=queries, ema=ema)


def open_student(cfg, train_set):
    """The detector that is trained, on the CPU: fresh, or with the weights of `--init-from`.

    The seed is set here, so that the first weights are the same with and without a teacher. Heads of
    other classes than the source's start anew (checkpoints.load_weights says which).
    """
    torch.manual_seed(cfg.seed)
    student = build_model(cfg, len(train_set.classes))
    if cfg.init_from:
        source = Path(cfg.init_from, "last.pt") if Path(cfg.init_from).is_dir() else cfg.init_from
        named = [name.strip() for name in cfg.init_classes.split(",")] if cfg.init_classes else None
        report = checkpoints.load_weights(student, source, classes=train_set.classes,
                                          source_classes=named, made_with=cfg.made_with or None)
        if cfg.steps == 0 and report.fresh_heads:
            raise ValueError(f"{cfg.init_from}: heads of other classes were re-initialised and "
                             "--steps 0 trains nothing: name its classes in order with "
                             "--init-classes, or train")
    return student


KEPT = ("last.pt", "best.pt", "result.json")            # of a run's folder; not overwritten unasked


def make_optimizer(cfg, student, method):
    """AdamW over the student's groups of rates, and the method's own linear maps.

    The backbone learns slower, and in Deformable DETR the sampling offsets too: see
    models.Detector.parameter_groups. The method's maps have the student's rate.
    """
    groups = student.parameter_groups(cfg.lr, cfg.backbone_lr)
    if method is not None and list(method.parameters()):
        groups.append({"params": list(method.parameters()), "lr": cfg.lr})
    for group in groups:
        group["initial_lr"] = group["lr"]                 # what `lr_factor` multiplies
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)


def restore(path, stateful, provenance):
    """Put a run's checkpoint back into its parts -> the checkpoint.

    path: a last.pt.  stateful: {name: what has load_state_dict}.  provenance: what this run is.
    Raises ValueError when it was made with other settings, naming them, or holds no state to
    continue from.
    """
    def identity(facts):      # the teacher is known by its weights, wherever their file lies now
        return facts["settings"] | {"teacher": facts.get("taught_by"),
                                    "number of processes": facts.get("world"),
                                    "images, classes or boxes": facts.get("images")}
    saved = load_payload(path)
    then = identity(saved)
    differ = [name for name, value in identity(provenance).items()
              if then.get(name, value) != value]
    if differ:
        longer = ", or go on from its weights in a new run with --init-from"
        raise ValueError(f"{path} was made with other settings ({', '.join(differ)}): repeat its "
                         f"command, which {path.parent}/config.json holds, choose another --out"
                         + longer * (set(differ) <= {"steps", "epochs"}))
    # best.pt and exported weights hold no optimizer.
    if not stateful.keys() <= saved.get("resume", {}).keys():
        raise ValueError(f"{path} holds weights alone, nothing to resume from: start a new run "
                         "with --init-from")
    for name, part in stateful.items():
        part.load_state_dict(saved["resume"][name])
    return saved


def trim_log(path, steps):
    """Forget what was logged after the last checkpoint: those steps are about to be made again.

    steps: how many of them the checkpoint has behind it. Lines that cannot be read are left out, and
    their number is said: a log is no reason to stop a run.
    """
    if not path.exists():
        return
    kept, lost = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            number = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            lost += 1
            continue
        if number < steps:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
    if lost > 1 or len(kept) < steps:                     # one line may be cut off by a kill
        say(f"note       {path} could not be read in {lost} lines; it holds {len(kept)} of {steps} "
            "steps")


def open_teacher(cfg, run, dataset, device):
    """The frozen teacher, in eval mode.

    dataset: the validation images. Raises ValueError when it knows other classes, or when its AP says
    that it was hardly loaded: users of other repositories trained for days beside such a teacher.
    """
    if run.teacher_cache and cfg.data == "coco" and cfg.augment:
        raise ValueError("--teacher-cache: with --data coco every image is cropped anew, so none "
                         "is met twice: leave it out, or train with --no-augment")
    teacher, payload = load_model(cfg.teacher)
    same_classes(payload, dataset, cfg.teacher)
    teacher = teacher.to(device).requires_grad_(False)
    # Its stored AP counts when it was measured on the same data; otherwise it is measured now.
    theirs, ours = payload["settings"], plain(cfg)
    differ = [k for k in EVALUATION if k not in ("root", "val_split") and theirs.get(k) != ours[k]]
    ap, source = payload["metrics"].get("AP"), "stored in its checkpoint"
    if differ or ap is None:
        found = detect(teacher, dataset, run, run.eval_batch)
        ap, source = data.evaluate(found, dataset)["AP"], "measured now"
    if cfg.teacher_floor > 0 and not ap >= cfg.teacher_floor:
        other = "".join(f"; it was trained with --{k.replace('_', '-')} {theirs.get(k)}, this run "
                        f"has {ours[k]}" for k in differ)
        raise ValueError(f"the teacher {cfg.teacher} has AP {ap:.3f} ({source}), under the floor "
                         f"of {cfg.teacher_floor}{other}: was it trained, on this data? "
                         "--teacher-floor 0 uses it all the same")
    say(f"teacher    {cfg.teacher}: AP {ap:.3f} ({source})")
    if run.teacher_cache:
        teacher.encode = EncodeOnce(teacher.encode, run.teacher_cache * 1e9)
    return teacher


class EncodeOnce:
    """A frozen teacher's `encode` that keeps what it computes: each padded image is encoded once.

    Worth its room where images are few and augmentation only flips them. Images are encoded one by
    one, so that beyond its padding a memory does not depend on the batch, not even in rounding.

    encode: the teacher's own.  room: bytes to fill; images that come later are encoded each time.
    """
    def __init__(self, encode, room):
        self.encode, self.room = encode, room
        self.tokens, self.places = {}, {}

    def __call__(self, images, padding):
        """images (B, 3, H, W), padding (B, H, W) -> models.Memory of the batch."""
        single = [self.of_one(image, mask) for image, mask in zip(images.split(1), padding.split(1))]
        tensors = ((m.tokens, m.padding, m.valid_ratios, m.position) for m in single)
        tokens, padding, valid_ratios, position = map(torch.cat, zip(*tensors))
        return models.Memory(tokens, padding, single[0].shapes, valid_ratios, position)

    def of_one(self, image, padding):
        """The memory of one image, padded as its batch needs it."""
        # Positions follow from the padding, so images that are padded alike share them.
        place = key_of(padding)
        name = place, key_of(image)
        if name in self.tokens:
            return dataclasses.replace(self.places[place], tokens=self.tokens[name])
        memory = self.encode(image, padding)
        new = [memory.tokens] if place in self.places else [memory.tokens, memory.position]
        size = sum(x.nbytes for x in new)
        if size <= self.room:
            self.room -= size
            self.tokens[name] = memory.tokens
            self.places.setdefault(place, memory)
        return memory


def key_of(tensor):
    """A short name for a tensor's shape and numbers."""
    numbers = tensor.cpu().contiguous().numpy()
    return tuple(tensor.shape), hashlib.blake2b(numbers, digest_size=16).digest()


def open_method(cfg, teacher, student):
    """The distillation method of `--method`, with its `--method-options`, on the student's device."""
    # The models say their widths, levels and classes, as far as the method asks for them.
    cls = method_class(cfg.method)
    known = inspect.signature(cls).parameters
    given = {"student_dim": student.config["hidden_dim"],
             "teacher_dim": teacher.config["hidden_dim"], "num_classes": student.num_classes,
             "levels": student.config.get("feature_levels", 1)}
    method = cls(**{k: v for k, v in given.items() if k in known}, **cfg.method_options)
    return method.to(next(student.parameters()).device)


def check_pair(teacher, student, dataset):
    """One image through both encoders: their memories must have the same tokens."""
    image = dataset[0][0][None].to(next(student.parameters()).device)      # (1, 3, H, W)
    nothing = torch.zeros_like(image[:, 0], dtype=torch.bool)              # no padding
    training = student.training
    student.eval()
    with torch.no_grad():
        of_teacher, of_student = (list(map(tuple, model.encode(image, nothing).shapes))
                                  for model in (teacher, student))
    student.train(training)
    if of_teacher != of_student:
        advice = "give both the same --feature-levels and strides"
        if teacher.detector != student.detector:
            advice = f"a {teacher.detector} teaches a {student.detector} only where they are alike"
        raise ValueError("teacher and student do not fit: their memories have levels of "
                         f"{of_teacher} and {of_student} cells; {advice}")


def announce(cfg, train_set, val_set, student, start, steps, world, device):
    """Say what is about to run, before the progress bar: data, model, length, rates, and whatever a
    user would rather know now than after hours."""
    # What is read, and what learns from it.
    if start:
        say(f"resume     at step {start} of {steps}")
    say(f"data       {train_set.summary}\n           {val_set.summary}")
    height, width = train_set[0][0].shape[1:]
    say(f"model      {cfg.detector}, {count_parameters(student) / 1e6:.2f} M parameters; {steps} "
        f"steps of {cfg.batch_size} x {world} images, the first of {height} x {width} pixels, lr "
        f"{cfg.lr:g} (a total batch of {cfg.batch_size * world}), on {device}")
    # What would be noticed only after hours.
    if train_set.fingerprint == val_set.fingerprint:
        say("note       training and validation images are the same: AP says what was remembered")
    if student.num_queries < train_set.most_objects:
        say(f"note       an image has {train_set.most_objects} objects, more than the model's "
            f"{student.num_queries} queries: the rest cannot be found; --num-queries, some three "
            "times as many as objects")
    if cfg.method not in (None, "clockdistill") and not (cfg.balance or cfg.method_options):
        say(f"note       {cfg.method} has its default weights, which are tuned for no data: "
            "--balance sets them by gradients")
    if cfg.ema and steps and steps * (1 - cfg.ema) < 3:
        say(f"note       --ema {cfg.ema} averages over some {1 / (1 - cfg.ema):.0f} steps, the run "
            f"has {steps}: the average that is evaluated lags behind")
    from_scratch = cfg.pretrained_backbone == "none" and not cfg.init_from
    if cfg.data != "toy" and from_scratch and len(train_set) < 10_000:
        say(f"note       {len(train_set)} images and no pretrained weights: to do well on images "
            "it has not seen, a DETR needs some 10,000, or --init-from")


class Interrupted(Exception):
    """Ctrl-C or a polite kill: the step in hand was finished and saved."""


@contextlib.contextmanager
def finish_step_on_signal():
    """Yield a list that fills up when the user asks to stop. A second Ctrl-C stops at once.

    Only a process's main thread may listen to signals; elsewhere nobody asks.
    """
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
    numbers = [signal.SIGINT, signal.SIGTERM]
    # A terminal that is closed asks too, but for a run that nohup keeps alive.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def anyone(asked, device):
    """True when any process was asked to stop, so that all stop after the same step.

    A signal reaches the processes at different times; one that stopped alone would leave the others
    waiting for its gradients.
    """
    if not dist.is_initialized():
        return bool(asked)
    flag = torch.tensor(float(bool(asked)), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def short(log):
    """The losses by name for the progress bar: the layers of one name added up."""
    sums = {}
    for name, value in log.items():
        if isinstance(value, float) and name not in ("loss", "grad_norm", "lr"):
            key = name.removeprefix("loss_").split("_")[0] if is_detection(name) else "KD " + name
            sums[key] = sums.get(key, 0.0) + value
    terms = " + ".join(f"{name} {value:.2f}" for name, value in sums.items())
    return f"loss {log['loss']:.2f} = {terms}"


def quiet_interval():
    """Seconds between redraws of a progress bar: a log file need not hold a thousand of them."""
    return 1 if sys.stderr.isatty() else 30


def say(text):
    """Print a line above the progress bar, from the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text)


# ----------------------------------------------------------------------------------------------
# The world around a run: devices, processes, provenance
# ----------------------------------------------------------------------------------------------

def pick_device(name="auto"):
    """The torch.device of a name; auto: CUDA, else Apple's MPS, else the CPU. With torchrun, each
    process has the GPU of its local rank. Raises ValueError for a name or a device that is not there."""
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: want auto | cpu | cuda | mps")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA GPU here; take auto or cpu")
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def processes(device):
    """Join the other processes when started by torchrun; otherwise do nothing. Yields (rank, world)."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The other processes enter when the first one has left."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and dist.get_rank() > 0:
        dist.barrier()
    yield
    if several and dist.get_rank() == 0:
        dist.barrier()


def machine(device):
    """What a time was measured on: processor, cores, threads, torch; it stands beside every figure."""
    # platform knows no more than "x86_64" of many CPUs; Linux tells their model.
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                    name)
    return (f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}")


def commit():
    """The commit that ran, with a '+' when its code was changed since; 'unknown' outside of git.

    Results that were written since do not count as a change of the code.
    """
    def git(*words):
        command = ["git", "-C", HERE, *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    try:
        changed = git("status", "--porcelain", "-uno", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory_gb(device):
    """The most memory this process has held; NaN on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def fingerprint(model):
    """A short name for these very weights, wherever their file lies."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(cfg, taught_by):
    """A short name for all that a run depends on: the settings that are not the default, but for where
    files lie, and the weights that teach it (their `fingerprint`, or None).

    So an option that is added later leaves the names of earlier runs as they are.
    """
    defaults = plain(Config(detector=cfg.detector))
    settings = {name: value for name, value in plain(cfg).items()
                if name not in PLACES and value != defaults[name]}
    text = json.dumps([cfg.detector, settings, taught_by], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def count_parameters(model):
    """All of them, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


def reference_size(cfg, dataset):
    """Where GFLOPs are counted: where the run has its images, on real data by default at 800 x 1333."""
    if cfg.data == "toy" or cfg.size:
        return tuple(dataset[0][0].shape[1:])
    return 800, 1333


def speed_of(model, dataset):
    """Images per second, one by one, on the device where the model is; see bench.images_per_second."""
    from experiments import bench
    image = dataset[0][0][None].to(next(model.parameters()).device)
    return bench.images_per_second({"": model}, image)[""]


def plain(cfg):
    """The settings as JSON has them (no tuples), so that saved and given ones compare."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


# ----------------------------------------------------------------------------------------------
# Evaluation, prediction and export of a finished checkpoint
# ----------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model, batch, precision="fp32"):
    """A batch through the model in eval mode -> per image {"image_id", "scores", "labels", "boxes"}.

    On the CPU, boxes xyxy in original pixels, best first.
    Raises FloatingPointError, naming the image, when a detection is not finite.
    """
    training, results = model.training, []
    with autocast(batch.images.device, precision):
        output = model.eval()(batch.images, batch.padding)
    model.train(training)
    sizes = torch.stack([torch.as_tensor(t["orig_size"]) for t in batch.targets])     # (B, 2): h, w
    detections = models.postprocess(output.detections, sizes, 100)
    for image_id, found in zip(batch.image_ids, detections):
        results.append({"image_id": image_id, **{k: v.cpu() for k, v in found.items()}})
        data.check_finite(results[-1], f"image {image_id}")
    return results


def detect(model, dataset, run, batch_size=1, progress=True, precision="fp32"):
    """Every image of the data set through the model -> list of what `answer` returns.

    Each of several processes does its share and gets everybody's.
    """
    device, results = next(model.parameters()).device, []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = data.eval_loader(dataset, batch_size, workers=run.workers, rank=rank, world=world)
    for batch in tqdm(batches, "evaluate", leave=False, disable=not progress or rank > 0,
                      mininterval=quiet_interval()):
        results += answer(model, batch.to(device), precision)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = [result for share in shares for result in share]
    return results


def evaluate_checkpoint(checkpoint, out=None, **given):
    """AP of a checkpoint on a split -> dict; also says seconds per image and peak memory.

    Options that are not given are those that the checkpoint was trained with, but for the folder of
    the data: a checkpoint never says which files are opened.
    """
    # The options that the checkpoint was trained with, and over them those that are given.
    payload = load_payload(checkpoint)
    stored = {name: payload["settings"][name] for name in ("data", "class_map", "size")
              if name in payload["settings"]}
    name, there = given.get("data", stored["data"]), payload["settings"].get("root")
    if "root" not in given and (name != "toy" or there not in (None, Config.root)):
        raise ValueError(f"eval needs --root, the folder of the {name} images"
                         + (f"; {checkpoint} was trained on {there}" if there else ""))
    cfg, run = configure("fit", **stored | given)
    device = pick_device(run.device)
    with processes(device) as (rank, world):
        with first_process_first():
            dataset = build_data(cfg, cfg.val_split)
        same_classes(payload, dataset, checkpoint)
        model = rebuild(payload).to(device)
        # Detect, judge, tell.
        start = time.monotonic()
        results = detect(model, dataset, run, run.eval_batch, precision=cfg.precision)
        seconds = (time.monotonic() - start) / max(1, len(dataset))
        scores = data.evaluate(results, dataset)
        memory = peak_memory_gb(device)
        told = scores | {"seconds_per_image": seconds, "peak_memory_gb": memory,
                         "images": len(dataset), "checkpoint": str(checkpoint),
                         "precision": cfg.precision, "machine": machine(device)}
        if rank == 0:
            print(dataset.summary)
            print("  ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "per_class"))
            for name, values in scores["per_class"].items():
                print(f"  {name:<20} " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
            print(f"{seconds:.3f} s per image with loading, peak memory {memory:.2f} GB, "
                  f"{cfg.precision}, {told['machine']}")
            if out:
                write_json(out, told)
    return told


def predict(checkpoint, images, out, min_score, size, device, precision):
    """Detections of image files: drawn to OUT/000_NAME.png, 001_.., all listed in predictions.json.

    images: files, or folders of images. Raises ValueError after the last one when files could not be
    read; those are left out.
    """
    from experiments import plots
    if not 0 <= min_score <= 1:
        raise ValueError(f"--min-score {min_score}: want 0 to 1")
    model, payload = load_model(checkpoint)
    device, out = pick_device(device), Path(out)
    model = model.to(device)
    size = parse_size(size or payload["settings"].get("size")) or data.DEFAULT_SIZE[payload["data"]]
    out.mkdir(parents=True, exist_ok=True)
    files, listed, broken = image_files(images), [], []
    for index, name in enumerate(tqdm(files, "predict", mininterval=quiet_interval())):
        try:
            picture = data.read_image(name)                              # (3, H, W) uint8
        except data.BrokenImage as error:
            broken.append(str(error))
            continue
        # One image is a batch without padding.
        image, sides = data.prepare(picture, size), torch.tensor(picture.shape[1:])
        batch = data.collate([(image, {"image_id": index, "orig_size": sides})]).to(device)
        result, = answer(model, batch, precision)
        result["boxes"] = clip_boxes_to_image(result["boxes"], tuple(picture.shape[1:]))
        # Pictures are numbered: never the input itself, nor one name twice.
        drawn = out / f"{index:03d}_{Path(name).stem}.png"
        plots.predictions(picture, result, payload["classes"], min_score).savefig(drawn)
        # The JSON lists what is drawn: what is sure enough.
        keep = result["scores"] >= min_score
        columns = (result[k][keep].tolist() for k in ("labels", "scores", "boxes"))
        listed.append({"image": str(name), "drawn": drawn.name, "detections": [
            {"class": payload["classes"][label], "score": round(score, 4),
             "box": [round(x, 1) for x in box]} for label, score, box in zip(*columns)]})
    write_json(out / "predictions.json", listed)
    if listed:
        print(f"{len(listed)} images, boxes are x0 y0 x1 y1 in pixels: {out}/predictions.json and "
              "pictures beside it")
    if broken:
        raise ValueError(f"left out {len(broken)} of {len(files)} files: {'; '.join(broken)}")


def image_files(names):
    """Files as they are given, and the images of folders in the order of their names."""
    files = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(p for p in name.iterdir() if p.suffix.lower() in data.IMAGE_SUFFIXES
                            and not p.name.startswith("._"))          # macOS's shadows of files
            if not inside:
                raise ValueError(f"{name}: holds no image ({', '.join(data.IMAGE_SUFFIXES)})")
            files += inside
        elif not name.exists():
            raise FileNotFoundError(f"no image at {name}: check the path")
        else:
            files.append(name)
    return files


def export(checkpoint, out, **of_program):
    """A checkpoint's weights alone in half the bytes: fp16 safetensors, classes and figures beside.

    A name ending in .onnx makes a program instead; experiments.deploy has its options, `of_program`.
    """
    if Path(out).suffix == ".onnx":
        from experiments import deploy
        return deploy.export(checkpoint, out, **of_program)
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"--out {out}: want a name ending in .safetensors or .onnx")
    if of_program:
        raise ValueError(f"--{next(iter(of_program))} is an option of .onnx, not of {out}")
    # Published weights do not tell where files lay on the machine that made them.
    model, payload = load_model(checkpoint)
    payload["settings"] = {k: v for k, v in payload["settings"].items() if k not in PLACES}
    keep = ("detector", "config", "classes", "category_ids", "data", "metrics", "minutes", "step",
            "seed", "commit", "machine", "settings")
    kept = {name: payload[name] for name in keep if name in payload}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(out, {"model": model.state_dict(), **kept}, half=True)
    ap = payload["metrics"].get("AP")
    ap = math.nan if ap is None else ap
    print(f"{out}: {Path(out).stat().st_size / 1e6:.2f} MB, AP {ap:.3f} before rounding to fp16")


PLACES = ("root", "teacher", "init_from")       # settings that only say where a file lies


def load_payload(path):
    """A checkpoint of ours, or a run's folder -> what it holds, checked for what a model needs."""
    path = Path(path)
    if path.is_dir():                                    # a run's folder
        path = path / "last.pt"
    payload = checkpoints.load(path)
    kinds = {"model": dict, "detector": str, "config": dict, "classes": list, "category_ids": list,
             "data": str, "settings": dict, "metrics": dict}
    if not isinstance(payload, dict) or not kinds.keys() <= payload.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: give a last.pt or best.pt "
                         "that `fit` or `distill` wrote, or an exported .safetensors")
    wrong = [name for name, kind in kinds.items() if not isinstance(payload[name], kind)]
    wrong = wrong or [place for place, right in entries_of(payload) if not right]
    if wrong:
        raise ValueError(f"{path}: its {wrong[0]!r} is not what a checkpoint of this project "
                         "holds: make it again")
    return payload | {"path": path}


def entries_of(payload):
    """Yield (place in a checkpoint, whether its value is one that a checkpoint may hold).

    A file may be safe to read and still absurd: options have the types and ranges that they have on
    the command line.
    """
    config, settings, classes = payload["config"], payload["settings"], payload["classes"]
    weights, ids = payload["model"], payload["category_ids"]
    for part in ("model", "config", "settings", "metrics"):
        yield part, all(isinstance(key, str) for key in payload[part])
    yield "model", all(isinstance(value, torch.Tensor) for value in weights.values())
    yield "classes", classes and all(isinstance(name, str) for name in classes)
    yield "category_ids", len(ids) == len(classes) and all(type(number) is int for number in ids)
    yield "detector", payload["detector"] in models.DETECTORS
    yield "metrics.AP", type(payload["metrics"].get("AP")) in (float, int, type(None))
    # The model's options, and the settings that evaluation reads.
    yield "data", payload["data"] == settings.get("data") in data.DEFAULT_SIZE
    yield "settings.class_map", fits("class_map", settings.get("class_map"), str | None)
    yield "settings.size", fits("size", settings.get("size"), str | None)
    kinds = {name: kind for name, (kind, _) in models.described_options().items()}
    kinds |= {"frozen_backbone": bool, "pretrained_backbone": bool}
    for name in kinds.keys() & config.keys():
        yield f"config.{name}", fits(name, config[name], kinds[name])


def rebuild(payload):
    """The detector of a checkpoint -> in eval mode, on the CPU.

    payload: what `load_payload` returned. Raises ValueError when its weights are not those of its
    configuration, or when its backbone was a module of one's own.
    """
    # A checkpoint never names a file to open.
    path, config = payload["path"], payload["config"] | {"pretrained_backbone": False}
    if config.get("backbone") == "custom":
        raise ValueError(f"{path} was made with a backbone module of your own: build the model "
                         "with it (models.build), then checkpoints.load_weights")
    try:
        model = models.build(payload["detector"], len(payload["classes"]), **config)
        model.load_state_dict(payload["model"])
    except (ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 150)
        raise ValueError(f"{path}: weights and configuration do not fit ({reason}): make it "
                         "again") from None
    return model.eval()


def load_model(path):
    """-> (model, the other entries of its checkpoint)."""
    payload = load_payload(path)
    return rebuild(payload), payload


def same_classes(payload, dataset, path):
    """Raises ValueError when a checkpoint's classes are not the data set's."""
    theirs, ours = list(payload["classes"]), list(dataset.classes)
    if theirs != ours:
        raise ValueError(f"{path} knows {len(theirs)} classes ({', '.join(theirs[:4])}...), "
                         f"{dataset.name} has {len(ours)} ({', '.join(ours[:4])}...): choose the "
                         "data, --class-map or checkpoint that go together")


# ----------------------------------------------------------------------------------------------
# Configuration: one flat, frozen record. A recipe is a named change to it.
# ----------------------------------------------------------------------------------------------

# Official schedules, each for its own total batch. Where a setting is None, this value is taken.
SCHEDULES = {
    "dab_detr": dict(epochs=50, batch_size=16, lr=1e-4, backbone_lr=1e-5, drop_at=40 / 50),
    "deformable_detr": dict(epochs=50, batch_size=32, lr=2e-4, backbone_lr=2e-5, drop_at=40 / 50),
    "dino": dict(epochs=12, batch_size=16, lr=1e-4, backbone_lr=1e-5, drop_at=11 / 12),
}
METHODS = ("clockdistill", "fitnets", "hinton", "fgd", "mgd", "gkd", "kd_detr", "detrdistill",
           "d3etr")


# One line per option, which is its documentation too: `--help` is made of it.
def option(default, text, **extra):
    """A field of a configuration: its default, and what `--help` says of it."""
    if default == {}:
        extra["default_factory"] = dict
    else:
        extra["default"] = default
    choices = {"choices": extra.pop("choices")} if "choices" in extra else {}
    return dataclasses.field(metadata={"help": text, **choices}, **extra)


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes, but for the model's options, which `Config` adds.

    It is written beside the results, and `--resume` insists on the same.
    """
    # --- data
    data: str = option("toy", "which reader: toy (procedural road scenes, made on first use), "
                       "kitti, coco", choices=("toy", "kitti", "coco"))
    root: str = option("datasets/toy", "folder of the data set, in KITTI's or COCO's own layout")
    train_split: str = option("train", "train | val | all | a file with one image id per line (toy "
                              "also: tune; COCO also: test, an annotation file)")
    val_split: str = option("val", "the images that AP is reported on, in the same words")
    class_map: str | None = option(None, "KITTI layout: kitti3 | kitti8 | kitti3_merged | your own "
                                   "names, Car,Dog,...")
    limit: int | None = option(None, "use only the first N images of each split")
    size: str | None = option(None, "resize to SHORT,MAX pixels, keeping the ratio; default: the "
                              "reader's own")
    augment: bool = option(True, "training augmentation: flips, resizes, crops (--no-augment to "
                           "overfit a few images)")
    # --- the detector; its options are fields of `Config`
    detector: str = option("dino", "which detection transformer", choices=models.DETECTORS)
    # --- optimisation
    steps: int | None = option(None, "optimizer steps; default: from --epochs. 0 writes the "
                               "untrained checkpoint")
    epochs: float | None = option(None, "passes over the training images, when --steps is not "
                                        "given")
    batch_size: int | None = option(None, "images per step in each process, whatever --accumulate "
                                          "is")
    accumulate: int = option(1, "split each batch into N parts, one backward each: less memory, "
                             "same step size")
    lr: float | None = option(None, "AdamW learning rate; it belongs to the TOTAL batch and is "
                              "never scaled silently")
    backbone_lr: float | None = option(None, "learning rate of the backbone")
    weight_decay: float = option(1e-4, "AdamW weight decay")
    warmup: int = option(0, "steps of linear warm-up")
    schedule: str = option("drop", "drop: lr/10 once, after --drop-at of the steps; cosine: down "
                           "to 2 %%", choices=("drop", "cosine"))
    drop_at: float | None = option(None, "where the drop happens, as a fraction of all steps")
    clip: float = option(0.1, "largest gradient norm")
    ema: float = option(0.0, "decay of the moving average of the weights that is evaluated; 0 = "
                             "off")
    fit_to_data: bool = option(False, "where --num-queries and --ema are not given or 0: three "
                               "queries for each object of the fullest training image, and an average over "
                               "the last twentieth of the steps")
    precision: str = option("fp32", "autocast; losses, matcher, masks and sampling locations stay "
                            "fp32", choices=("fp32", "bf16", "fp16"))
    seed: int = option(0, "initial weights, order of the images, augmentation, noise")
    # --- distillation (`distill` only)
    teacher: str | None = option(None, "teacher's checkpoint, or the folder of its run")
    method: str | None = option(None, "distillation method; `distill` takes clockdistill",
                                choices=METHODS)
    method_options: dict = option({}, "options of the method, listed below; they replace all of "
                                  "the recipe's")
    balance: dict = option({}, "weigh the parts of the method by their gradients in the first 8 "
                           "steps: memory=50 cls+l1+giou=1 wants memory's 50 times as long as "
                           "detection's; none: the weights of --method-options")
    teacher_floor: float = option(0.05, "refuse a teacher of lower AP, it was hardly loaded; 0 = "
                                  "never refuse")
    # --- where the first weights come from
    init_from: str | None = option(None, "start from these weights, of any known program, or "
                                   "hf:ORGANISATION/MODEL, or the folder of a run (fine-tuning; "
                                   "--resume continues a run instead)")
    init_classes: str | None = option(None, "classes of --init-from in the order of its rows, "
                                      "Car,Dog,..., where its file does not name them")
    made_with: dict = option({}, "model options that --init-from was made with, where "
                             "checkpoints.py assumes others")

    def __post_init__(self):
        for name, value in SCHEDULES[self.detector].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)      # a frozen record may still finish itself
        check_limits(self)
        check_balance(self)
        parse_size(self.size)


# The model's options as further fields, from the signatures of models.py. None is the detector's
# official value.
Config = dataclasses.make_dataclass(
    "Config", [(name, kind | None, option(None, text))
               for name, (kind, text) in models.described_options().items()],
    bases=(Settings,), frozen=True)
Config.__doc__ = Settings.__doc__


@dataclass(frozen=True)
class Run:
    """Where and how a run happens; it changes no result (but for rounding, on another device)."""
    out: str = option("runs/fit", "folder for log.jsonl, last.pt, best.pt, config.json, "
                                  "result.json")
    resume: bool = option(False, "continue the run in --out from its last checkpoint, bit for bit "
                          "on CPU")
    device: str = option("auto", "auto | cpu | cuda | mps")
    workers: int = option(2, "processes that load images")
    eval_every: int = option(1000, "steps between evaluations, 0 = none; there is always one at "
                             "the end")
    eval_batch: int = option(1, "images per batch in evaluation; 1 is exact, padding moves boxes a "
                             "little")
    teacher_cache: float = option(0.0, "GB for the teacher's memories of images it has seen, which "
                                       "are then not encoded again: a third faster with a few "
                                       "hundred images that are only flipped; 0 = none")
    probe_every: int = option(200, "steps (0 = never) between reports of each loss term's share "
                                   "and gradient norm")
    save_minutes: float = option(2.0, "minutes between checkpoints")

    def __post_init__(self):
        check_limits(self)


# Every number that has a range: (least, and the first that is too much). The one place that checks
# options, and what a checkpoint says of its model: the upper ends keep a forged file from asking for
# more memory than there is.
LIMITS = {
    "limit": (1, math.inf), "steps": (0, math.inf), "epochs": (0, math.inf),
    "batch_size": (1, math.inf), "accumulate": (1, math.inf), "warmup": (0, math.inf),
    "lr": (0, math.inf), "backbone_lr": (0, math.inf), "weight_decay": (0, math.inf),
    "drop_at": (0, math.inf), "clip": (0, math.inf), "ema": (0, 1), "seed": (0, 2 ** 31),
    "teacher_floor": (-math.inf, math.inf),
    "backbone_width": (1, 2 ** 10), "hidden_dim": (1, 2 ** 13), "heads": (1, 2 ** 10),
    "ffn_dim": (1, 2 ** 16), "encoder_layers": (0, 100), "decoder_layers": (1, 100),
    "num_queries": (1, 2 ** 16), "feature_levels": (1, 10), "points": (1, 100), "dropout": (0, 1),
    "num_patterns": (0, 2 ** 10), "denoising": (0, 2 ** 16), "denoising_box_noise": (0, math.inf),
    "denoising_label_noise": (0, math.inf), "position_temperature": (0, math.inf),
    "position_offset": (-100, 100), "feature_stride": (8, 33), "logit_eps": (0, 1),
    "workers": (0, 1024), "eval_every": (0, math.inf), "eval_batch": (1, math.inf),
    "teacher_cache": (0, math.inf), "probe_every": (0, math.inf), "save_minutes": (0, math.inf),
}


def check_limits(settings):
    """Raises ValueError for a number out of its range, or none at all: NaN is in no range."""
    for name, (least, end) in LIMITS.items():
        value = getattr(settings, name, None)
        if value is not None and not least <= value < end:
            less = f" and less than {end}" if end < math.inf else ", a finite number"
            raise ValueError(f"--{name.replace('_', '-')} {value}: want at least {least}{less}")
    if getattr(settings, "accumulate", 1) > (batch := getattr(settings, "batch_size", 1)):
        raise ValueError(f"--accumulate {settings.accumulate}: it splits each batch, want at most "
                         f"--batch-size {batch}")


def fits(name, value, kind):
    """Whether a value from a file is one of an option: of its type, in its range."""
    kinds = getattr(kind, "__args__", (kind,))
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        return False
    if name == "size":
        with contextlib.suppress(ValueError):
            return parse_size(value) or True
        return False
    least, end = LIMITS.get(name, (-math.inf, math.inf))
    return not isinstance(value, (int, float)) or least <= value < end


def parse_size(text):
    """'800,1333' -> (800, 1333); None stays None."""
    sides = parse_sides(text, "SHORT,MAX")
    if sides and sides[0] > sides[1]:
        raise ValueError(f"--size {text}: want the short side first, SHORT,MAX")
    return sides


def parse_sides(text, form):
    """Two numbers of pixels, as `form` names them -> (first, second); None stays None."""
    if text is None:
        return None
    # isdigit takes no sign and no point, so what passes is a whole number above 0.
    sides = text.split(",")
    if len(sides) != 2 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise ValueError(f"--size {text}: want {form} in pixels, e.g. 800,1333")
    if max(int(side) for side in sides) > 16384:
        raise ValueError(f"--size {text}: want at most 16384 pixels")
    return int(sides[0]), int(sides[1])


def build_data(cfg, split, augment=False):
    """The images of a split, as cfg says -> data.Dataset.

    augment: the training augmentation of that kind of data; without, as in evaluation.
    """
    return data.build(cfg.data, cfg.root, split, augment="train" if augment else "eval",
                      size=parse_size(cfg.size), limit=cfg.limit, class_map=cfg.class_map,
                      seed=cfg.seed)


def build_model(cfg, num_classes, **changes):
    """The detector, with the options that cfg gives; the others have their official values.

    changes: options that differ from cfg's, and "frozen_backbone" of models.build.
    """
    # None means the official value, which only models.py knows.
    overrides = {name: getattr(cfg, name) for name in models.described_options()
                 if getattr(cfg, name) is not None} | changes
    word = overrides.pop("pretrained_backbone", "imagenet")
    weights = {"none": False, "imagenet": True}.get(word)
    advice = ("--pretrained-backbone FILE takes torchvision's or timm's weights (`make "
              "kitti-backbones` fetches the small recipes'), --pretrained-backbone none starts "
              "from scratch")
    try:
        if weights is None:
            weights = checkpoints.load_backbone(word)
    except (ValueError, OSError) as error:
        raise type(error)(f"{error}; {advice}") from None
    try:
        return models.build(cfg.detector, num_classes, pretrained_backbone=weights, **overrides)
    except ValueError as error:                           # in the words of the command line
        text = str(error).replace("pretrained_backbone:", f"{word}:")
        raise ValueError(text.replace(models.OTHER_WEIGHTS, advice)) from None


def method_class(name):
    """The class of a distillation method, by its name on the command line.

    The rivals are opened when one is asked for: who reads the method need not read them.
    """
    if name == "clockdistill":
        return CLoCKDistill
    from experiments.baselines import BASELINES
    return BASELINES[name]


GIVEN = ("student_dim", "teacher_dim", "num_classes", "levels")       # the models say these


def method_defaults(name):
    """{option: default} of a method's --method-options."""
    parameters = inspect.signature(method_class(name)).parameters
    return {key: p.default for key, p in parameters.items() if key not in GIVEN}


def read_options(pairs, known, what):
    """["NAME=VALUE", ...] -> {name: value of the type of known[name]}.

    what: the flag, for the one-line error of an unknown name or a value of another type.
    """
    options = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name in options:
            raise ValueError(f"{what} {pair}: {name} is given twice")
        # A mistyped name would otherwise be an experiment with the defaults.
        if name not in known:
            choices = ", ".join(f"{k}={v}" for k, v in known.items())
            raise ValueError(f"{what} {pair}: there is no option {name!r}, only {choices}")
        kind = type(known[name])
        try:
            if kind is bool:
                options[name] = {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            else:
                options[name] = kind(text)
            if kind is float and not math.isfinite(options[name]):
                raise ValueError
        except (KeyError, ValueError):
            raise ValueError(f"{what} {pair}: want a {kind.__name__}, like {known[name]}") from None
    return options


def read_method_options(method, pairs):
    """The words of --method-options -> {name: value}.

    CLoCKDistill also takes preset=NAME, a set of PRESETS; the other words are changes to it.
    """
    known = method_defaults(method)
    if method == "clockdistill":
        known = {"preset": "paper"} | known
    options = read_options(pairs, known, "--method-options")
    # A negative weight would push the student away from its teacher.
    for name, value in options.items():
        if name.startswith(("lambda_", "alpha", "beta", "weight")) and value < 0:
            raise ValueError(f"--method-options {name}={value}: want at least 0")
    preset = options.pop("preset", "paper")
    if preset not in PRESETS:
        raise ValueError(f"--method-options preset={preset}: choose from {', '.join(PRESETS)}")
    return PRESETS[preset] | options


def configure(command, recipe=None, **given):
    """Options given on the command line, over a recipe, over the defaults -> (Config, Run).

    command: "fit" or "distill".  given: {option: value} of what was given, and nothing else.
    Raises ValueError on unknown options of a method, and values out of their range.
    """
    # The toy has a recipe of its own: official models on 160 x 48 pixels would make no sense.
    if recipe is None and given.get("data", "toy") == "toy":
        recipe = "toy-student"
    detector = given.setdefault("detector", Config.detector)
    settings = dict(RECIPES[recipe][detector]) if recipe else {}
    method = given.get("method", settings.get("method"))
    if method != settings.get("method"):
        settings |= dict(method_options={}, balance={})  # the recipe's belong to its own method
    if "method_options" in given:
        given["method_options"] = read_method_options(method, given["method_options"])
    if given.get("balance") == ["none"]:
        given["balance"] = {}
    elif "balance" in given:
        known = dict.fromkeys((pair.partition("=")[0] for pair in given["balance"]), 1.0)
        given["balance"] = read_options(given["balance"], known, "--balance")
    if "made_with" in given:
        known = models.options_of(detector)
        given["made_with"] = read_options(given["made_with"], known, "--made-with")
    settings |= given
    told = [name for name, value in given.get("method_options", {}).items()
            if name in ("lambda_mem", "lambda_log") and value != 0]
    if settings.get("balance") and told and command == "distill":
        raise ValueError(f"--method-options {told[0]} has no effect beside --balance, which sets "
                         "the weights: give the ratio there, or add --balance none")

    # `fit` knows no teacher, whatever the recipe says; `distill` cannot do without one.
    if command == "fit":
        settings |= dict(teacher=None, method=None, method_options={}, balance={})
    if command == "distill" and not settings.get("teacher"):
        raise ValueError("distill needs --teacher: the folder or checkpoint of a trained run")
    of_run = {field.name: settings.pop(field.name) for field in dataclasses.fields(Run)
              if field.name in settings}
    return Config(**settings), Run(**of_run)


# ----------------------------------------------------------------------------------------------
# Recipes
# ----------------------------------------------------------------------------------------------

# Named options of CLoCKDistill. "paper" is the nearest reading of what is known of it: the defaults.
# A detector's are the setting of the logit part that won of 15, tried alone, one change at a time, on
# images and a seed that no other table reports (results/toy/tables.md, "search"; one seed, so the
# margins are thin):
#   groups          won on DINO: with box_noise, three different questions about each object
#   random_queries  won on Deformable DETR, which has no denoising queries to learn from
# Set beforehand, each for a reason; the search, with its one seed, decides nothing about them:
#   content         "label" holds the answer, a decoder need not look (results/toy/reading.png)
#   box_noise       leaves something to correct
#   normalise       with these contents the teacher's confidence is low: dividing by the number of
#                   queries would make the term negligible
# DAB-DETR takes Deformable DETR's, the other one without denoising queries.
LOOKING = dict(content="own", box_noise=0.4, normalise="confidence")
PRESETS = {
    "paper": {},
    "dab_detr": LOOKING | dict(random_queries=24),
    "deformable_detr": LOOKING | dict(random_queries=24),
    "dino": LOOKING | dict(groups=3),
}

# The toy: 160 x 48 pixels, so narrow models, all trained from scratch.
TOY = dict(data="toy", backbone="resnet18", pretrained_backbone="none", hidden_dim=64, heads=8,
           num_queries=24, batch_size=16, warmup=150, schedule="cosine", ema=0.99)
TOY_STUDENT = TOY | dict(backbone_width=12, ffn_dim=128, encoder_layers=1, decoder_layers=2,
                         steps=1200, lr=3e-3, backbone_lr=3e-3, method="clockdistill")
TOY_TEACHER = TOY | dict(backbone_width=24, ffn_dim=192, encoder_layers=2, decoder_layers=3,
                         steps=3000, lr=2e-3, backbone_lr=2e-3)


def toy_weights(preset, lambda_mem):
    """The toy's CLoCKDistill. The scale mask and both lambdas are the best of a detector's eight trials
    (experiments/tables.py) on the split "tune", which no table reports. All three go without the mask:
    perhaps because with it the coarsest level, of ten cells, weighs as much as the finest."""
    return PRESETS[preset] | dict(scale=False, lambda_mem=lambda_mem, lambda_log=0.5)


# Only DINO has an embedding of labels; the others' queries ask with a frozen random one, the same for
# both models [P]. The lambdas [O] are not known: look at each term's gradient norm, then set them.
PAPER = {name: dict(content="label" if name == "dino" else "random_label", lambda_mem=1.0,
                    lambda_log=1.0) for name in models.DETECTORS}

# A few hundred pictures in KITTI's or COCO's layout, and two CPU cores. Backbones with ImageNet
# weights, whose norms and first stages stay fixed, and images small enough for 1 s per step. `make
# kitti-backbones` fetches the two files; --pretrained-backbone imagenet lets timm download instead.
# Teacher and student read images of one size: their memories must have the same tokens. Sizes and
# rates are first choices on KITTI's split "tune"; results/kitti/PLAN.md says how far they were tried.
# --balance gives the weights of the parts: a lambda tuned on the toy means nothing here. 2,400 steps
# keep a distilled student below 40 minutes of one core (with --teacher-cache 2).
SMALL = dict(data="kitti", size="128,424", heads=8, batch_size=8, warmup=100, schedule="cosine",
             fit_to_data=True)
SMALL_STUDENT = SMALL | dict(
    backbone="timm:tf_efficientnet_lite0", hidden_dim=96, ffn_dim=256, encoder_layers=1,
    pretrained_backbone="datasets/backbones/tf_efficientnet_lite0.pth", decoder_layers=2,
    steps=2400, lr=2e-3, backbone_lr=4e-4, method="clockdistill",
    balance={"memory": 50., "cls+l1+giou": 1.})
SMALL_TEACHER = SMALL | dict(
    backbone="timm:tf_efficientnet_lite2", hidden_dim=128, ffn_dim=512, encoder_layers=2,
    pretrained_backbone="datasets/backbones/tf_efficientnet_lite2.pth", decoder_layers=3,
    steps=3200, lr=1e-3, backbone_lr=2e-4)

# A recipe is a named change to the defaults, by detector. Students' recipes name their method, so that
# `fit` with one trains the student alone and `distill` the same student with a teacher.
RECIPES = {
    "small-student": {
        "dino": SMALL_STUDENT | dict(
            feature_levels=3, points=2, denoising=50, method_options=PRESETS["dino"]),
        "deformable_detr": SMALL_STUDENT | dict(
            feature_levels=3, points=2, box_refine=True, dropout=0.,
            method_options=PRESETS["deformable_detr"]),
        "dab_detr": SMALL_STUDENT | dict(
            feature_stride=16, lr=1e-3, backbone_lr=2e-4, method_options=PRESETS["dab_detr"]),
    },
    "small-teacher": {
        "dino": SMALL_TEACHER | dict(feature_levels=3, points=4, denoising=50),
        "deformable_detr": SMALL_TEACHER | dict(
            feature_levels=3, points=4, box_refine=True, dropout=0.),
        "dab_detr": SMALL_TEACHER | dict(feature_stride=16),
    },
    "toy-student": {
        "dino": TOY_STUDENT | dict(
            feature_levels=3, points=2, denoising=50, method_options=toy_weights("dino", 960.)),
        "deformable_detr": TOY_STUDENT | dict(
            feature_levels=3, points=2, box_refine=True, dropout=0.,
            method_options=toy_weights("deformable_detr", 240.)),
        "dab_detr": TOY_STUDENT | dict(
            feature_stride=8, num_queries=60, steps=2000, lr=1e-3, backbone_lr=1e-3,
            method_options=toy_weights("dab_detr", 960.)),
    },
    "toy-teacher": {
        "dino": TOY_TEACHER | dict(feature_levels=3, points=4, denoising=50),
        "deformable_detr": TOY_TEACHER | dict(
            feature_levels=3, points=4, box_refine=True, dropout=0.),
        "dab_detr": TOY_TEACHER | dict(
            backbone="resnet34", backbone_width=32, feature_stride=8, num_queries=60, steps=6000,
            lr=1e-3, backbone_lr=1e-3),
    },
    # The paper's data. Length, rates and batch are each detector's official ones (SCHEDULES), on
    # KITTI with the batch of the authors' earlier code [P], for which rates meant for 16 or 32 images
    # may be high: --lr, --accumulate. R50 teaches R18 by our choice: --backbone.
    "kitti-teacher": {name: dict(data="kitti", backbone="resnet50", batch_size=8)
                      for name in models.DETECTORS},
    "kitti-student": {name: dict(data="kitti", backbone="resnet18", batch_size=8,
                                 method="clockdistill", method_options=PAPER[name])
                      for name in models.DETECTORS},
    "coco-teacher": {name: dict(data="coco", backbone="resnet50") for name in models.DETECTORS},
    "coco-student": {name: dict(data="coco", backbone="resnet18", method="clockdistill",
                                method_options=PAPER[name]) for name in models.DETECTORS},
}
for by_detector in RECIPES.values():
    for detector, recipe in by_detector.items():
        recipe["detector"] = detector
SHIPPED_TEACHERS = {name: HERE / "weights" / f"toy_teacher_{name}.safetensors"
                    for name in models.DETECTORS}


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------

DISTILLATION = ("teacher", "method", "method_options", "balance", "teacher_floor")
EVALUATION = ("data", "root", "val_split", "class_map", "limit", "size")
# Commands with a file of their own in experiments/, opened when asked for.
EXPERIMENTS = {
    "demo": "teacher, student, distilled student on the toy KITTI",
    "table": "many runs, one table",
    "evidence": "of a table's finished students: other images, near and far, per class",
    "look": "draw what the queries and tokens of detectors look at",
    "bench": "speed, memory, parameters and GFLOPs of the detectors",
    "deploy": "AP, latency, size and memory of teacher and students, in PyTorch and as ONNX",
}


def official(name):
    """The official value of a setting, for `--help`: of each detector, where they differ.

    It stands in the signatures of models.py, or in SCHEDULES, and nowhere else.
    """
    if name == "pretrained_backbone":
        return "imagenet"                                # the command line's word for True
    builder = inspect.signature(models.build).parameters
    if name in builder:
        return builder[name].default
    by_detector = {d: models.options_of(d) | SCHEDULES[d] for d in models.DETECTORS}
    values = {d: options[name] for d, options in by_detector.items() if name in options}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{detector} {value:.4g}" for detector, value in values.items())


def add_options(parser, cls, only=None, without=()):
    """One option for each field of a configuration; those not given are left out of the result."""
    with_official = (*models.described_options(), *SCHEDULES["dino"])
    for field in dataclasses.fields(cls):
        if field.name in without or only is not None and field.name not in only:
            continue
        # int | None stands for an int that may be missing.
        kind = next(kind for kind in getattr(field.type, "__args__", (field.type,))
                    if kind is not type(None))
        text = field.metadata["help"]
        if field.name in with_official:
            text += f" (official: {official(field.name)})"
        elif field.default not in (None, dataclasses.MISSING):
            text += f" (default: {field.default})"
        extra = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            extra |= {"nargs": "+", "metavar": "NAME=VALUE"}
        elif "choices" in field.metadata:
            extra |= {"type": kind, "choices": field.metadata["choices"]}
        else:
            extra |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), **extra)


def describe_recipes():
    """Every recipe, option by option, for `fit --help`."""
    lines = ["recipes (given options override them; without --recipe --data toy takes "
             "toy-student):"]
    for name, by_detector in RECIPES.items():
        for detector, recipe in by_detector.items():
            settings = " ".join(f"{k}={v}" for k, v in recipe.items())
            lines.append(f"  {name}, {detector}: {settings}")
    return "\n".join(lines)


def describe_methods():
    """The options of each distillation method, for `distill --help`."""
    lines = []
    for name in METHODS:
        where = "clockdistill.py" if name == "clockdistill" else "experiments/baselines.py"
        lines.append(f"--method-options of {name}, with their defaults; {where} says what each "
                     "does:")
        lines.append("  " + " ".join(f"{k}={v}" for k, v in method_defaults(name).items()))
    lines.append(f"clockdistill also takes preset={'|'.join(PRESETS)}, named sets of options.")
    return "\n".join(lines)


def command_line():
    """The parser of all commands.

    Those of experiments/ have only their names here; `parse` opens them when they are asked for, so
    that `fit` does not load what draws pictures.
    """
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=text, description=__doc__.split("\n\n")[0], epilog="""
examples:
  python train.py demo                                     all of it, on generated images, in minutes
  python train.py fit --data kitti --root DIR --out runs/teacher --backbone resnet50
  python train.py distill --data kitti --root DIR --out runs/student --backbone resnet18 --teacher runs/teacher
  python train.py eval --checkpoint runs/student/best.pt --data kitti --root DIR
  torchrun --nproc_per_node 4 train.py fit ...             several GPUs: --batch-size is of each process
AP values are fractions 0..1. Give --debug for the whole traceback of an error.""")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, purpose, **extra):
        """A parser of one command, with --debug."""
        sub = commands.add_parser(name, help=purpose, formatter_class=text, **extra)
        sub.add_argument("--debug", action="store_true",
                         help="show the traceback of an error instead of one line")
        return sub

    # fit and distill differ in the options about a teacher alone.
    for name, purpose, without in (("fit", "train a detector", DISTILLATION),
                                   ("distill", "train a student with a teacher", ())):
        methods = "\n\n" + describe_methods() if name == "distill" else ""
        p = command(name, purpose, epilog=describe_recipes() + methods)
        p.add_argument("--recipe", choices=RECIPES, help="a named set of options, listed below")
        add_options(p, Config, without=without)
        add_options(p, Run)
        if name == "distill":
            p.set_defaults(method="clockdistill")

    # What is done with a finished checkpoint.
    checkpoint = "last.pt, best.pt, exported safetensors, or a run's folder"
    p = command("eval", "COCO AP of a checkpoint on a split",
                epilog="--data, --class-map and --size are those of the training when not given")
    p.add_argument("--checkpoint", required=True, help=checkpoint)
    p.add_argument("--out", help="also write the figures to this JSON file")
    add_options(p, Config, only=(*EVALUATION, "precision"))
    add_options(p, Run, only=("device", "workers", "eval_batch"))

    p = command("predict", "draw and list the detections of image files")
    p.add_argument("--checkpoint", required=True, help=checkpoint)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder of images")
    p.add_argument("--out", default="runs/predict", help="folder (default: %(default)s)")
    p.add_argument("--min-score", type=float, default=0.4,
                   help="leave out detections of a lower score (default: %(default)s)")
    p.add_argument("--size", help="resize to SHORT,MAX pixels; default: as the checkpoint was "
                                  "trained")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP)

    p = command("export", "weights alone as fp16 safetensors, or a program for ONNX Runtime",
                epilog="""
.safetensors: small, safe to publish.
.onnx: pictures in (uint8 RGB, B x H x W x 3, resized but not normalised), detections out (boxes
x0 y0 x1 y1 in pixels of that picture, scores, labels), post-processing inside; class names and size
are in its metadata. Written only if it agrees with PyTorch within 1e-4 on a picture.""")
    p.add_argument("--checkpoint", required=True, help=checkpoint)
    p.add_argument("--out", required=True, help="file ending in .safetensors or .onnx")
    for name, what in (
            ("size", "H,W in pixels of its pictures (default: what --image is resized to)"),
            ("batch", "pictures per call, or dynamic (default: 1)"),
            ("image", "the picture to check it on (default: the toy's)")):
        p.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"of .onnx: {what}")
    p.add_argument("--padding", action="store_true", default=argparse.SUPPRESS,
                   help="of .onnx: a second input, B x H x W, True outside of smaller pictures")

    # Named here for the list of commands; `parse` opens them with options of their own.
    for name, purpose in EXPERIMENTS.items():
        command(name, purpose, add_help=False)
    return parser


def open_experiment(name):
    """The module of a command that lives in experiments/."""
    return importlib.import_module("experiments." + ("tables" if name == "table" else name))


def parse(arguments):
    """The words of a command line -> {option: value}, "command" and "debug" among them."""
    if arguments[:1] and arguments[0] in EXPERIMENTS:
        name = arguments[0]
        room = open_experiment(name)
        parser = argparse.ArgumentParser(prog=f"train.py {name}", description=room.__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--debug", action="store_true",
                            help="show the traceback of an error instead of one line")
        room.add_options(parser)
        # What follows -- is for the runs of a table.
        end = arguments.index("--") if "--" in arguments else len(arguments)
        given = {"command": name} | vars(parser.parse_args(arguments[1:end]))
        return given | ({"changes": arguments[end + 1:]} if name == "table" else {})
    return vars(command_line().parse_args(arguments))


def run_command(command, given):
    """Do what a command line asks -> the exit status.

    given: the options of that command, as `parse` returns them.
    """
    if command in ("fit", "distill"):
        fit(*configure(command, **given))
    elif command == "eval":
        evaluate_checkpoint(**given)
    elif command == "predict":
        predict(**given)
    elif command == "export":
        export(**given)
    else:
        return open_experiment(command).run(**given) or 0
    return 0


def main(arguments=None):
    """The command line -> its exit status: 0, 2 for what a user can mend, 130 when stopped."""
    given = parse(list(sys.argv[1:] if arguments is None else arguments))
    command, debug = given.pop("command"), given.pop("debug")
    # From here on Ctrl-C is an exception, and a run in progress finishes its step.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run_command(command, given)
    except Interrupted as stop:
        print(f"{stop}; the same command (fit and distill: with --resume) goes on", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped at once; the same command (fit and distill: with --resume) goes on from the "
              "last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        # What a user can mend is said in one line; of torch's errors only that a worker died.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        if debug:
            print(getattr(error, "details", ""), file=sys.stderr)   # a worker's own traceback
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    import train                               # one copy of this module, which experiments/ see too
    sys.exit(train.main())
