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
import errno
import hashlib
import importlib
import inspect
import json
import math
import platform
import re
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
from tqdm import tqdm

import checkpoints
import data
import models
from checkpoints import write_json, write_text
from clockdistill import Balance, CLoCKDistill, gradient_norm, gradients_of, is_detection

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
            queries = method.queries(batch.labels, batch.boxes, asked_with(teacher, method.content),
                                     generator)
            queries = models.Queries(*queries)              # content, boxes, attend, valid
            if method.learned:                              # [P]: the teacher's own queries too
                queries = teacher.with_learned(queries, t_memory)
            if method.sees_learned:                         # [O]: beside its learned queries
                queries = queries._replace(sees_learned=True)
                t = teacher.answer(t_memory, *teacher.learned_queries(t_memory), queries).extra
            else:
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


def asked_with(teacher, content):
    """What queries of this `content` ask with: the teacher's label embedding or learned contents.

    None where the teacher has none, or the method asks with frozen contents.
    """
    return {"label": teacher.label_embedding, "own": teacher.learned_content}.get(content)


def plain_step(student, teacher, batch, method, generator=None):
    """The losses of one step without a teacher: `teacher` and `method` are None."""
    output = student(batch.images, batch.padding, batch.targets)
    return student.weighted_losses(output, batch.targets)


class Learner(nn.Module):
    """Student and method as one module: DDP wraps one forward and averages the gradients of both.

    The teacher is an argument of each step: it has no gradients, so it is no part of what learns.
    """
    def __init__(self, student, method=None):
        super().__init__()
        self.student, self.method = student, method
        if method is None:
            self.step = plain_step
        elif isinstance(method, CLoCKDistill):
            self.step = clockdistill_step
        else:
            from experiments.baselines import rival_step
            self.step = rival_step

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
    everything, of_student = trainable(inner), trainable(inner.student)
    device = everything[0].device
    generator = torch.Generator(device)
    # A disabled scaler leaves everything as it is, so that one backward path serves all precisions.
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    for step, batch in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(cfg, step, steps)
        # Noise is a function of (seed, step, process), so that a resumed run draws the same. The
        # queries' noise has its own generator: a student draws the same denoising noise with and
        # without a teacher.
        noise = (cfg.seed * 1_000_003 + step) * 4096 + process_rank()
        torch.manual_seed(noise)
        generator.manual_seed(noise + 2 ** 40)

        # Forward and backward, part by part; only the last part's backward has to talk to the
        # other processes.
        sums, rare, parts = {}, {}, batch.split(cfg.accumulate)
        for part in parts:
            first = part is parts[0]
            talks = learner is inner or part is parts[-1]
            with contextlib.nullcontext() if talks else learner.no_sync():
                with autocast(device, cfg.precision):
                    losses = losses_of(learner, teacher, part, generator, step)
                if balance is not None:
                    if first:
                        balance.measure(losses, step, of_student)
                    losses = balance(losses, step)
                values = numbers(losses, step, part)
                if probe_every and step % probe_every == 0 and teacher and first:
                    rare["report"] = gradient_report(losses, of_student)
                scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value / len(parts)

        # Clip and update. With fp16 the scaler itself skips a step that overflows.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(everything, cfg.clip)
        if not scaler.is_enabled() and not norm.isfinite():
            raise FloatingPointError(f"step {step}: the gradient is not finite, images "
                                     f"{batch.image_ids}: lower --lr")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # One line per step: the sum first, then every loss by name.
        if balance is not None and step == len(balance.measured):
            rare["balance"] = balance.factors(step)
        yield step, {"loss": sum(sums.values()), **sums,
                     "grad_norm": norm.item() if norm.isfinite() else None,
                     "lr": optimizer.param_groups[0]["lr"], "images": batch.image_ids, **rare}


def trainable(module):
    """The parameters that have a gradient."""
    return [p for p in module.parameters() if p.requires_grad]


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    stacked = torch.stack([value.detach().float() for value in losses.values()])
    values = dict(zip(losses, stacked.tolist()))
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"step {step}: {name} is not finite, on images "
                                     f"{batch.image_ids}: lower --lr, use --precision fp32, or "
                                     "look at these images and their labels")
    return values


def gradient_report(losses, parameters):
    """How much each part of the loss asks of the student: {part: (share of the total, gradient norm)}.

    It answers at once whether distillation is active, and how strong. A part without gradient is off.
    A part far above detection dominates what it reaches: memory dominates backbone and encoder, and
    never reaches the decoder.  parameters: the student's.
    """
    # Detection counts as one part, each of the method's losses as another.
    parts = {"detection": 0}
    for name, value in losses.items():
        part = "detection" if is_detection(name) else name
        parts[part] = parts.get(part, 0) + value
    total = max(sum(value.item() for value in parts.values()), 1e-12)
    return {name: (value.item() / total, gradient_norm(gradients_of(value, parameters)))
            for name, value in parts.items()}


# CLoCKDistill's parts: the weight of each, and its losses.
PARTS = {"lambda_mem": {"memory"}, "lambda_log": {"cls", "l1", "giou"}}


def open_balance(cfg, method, steps):
    """The Balance of `--balance`, or None. Raises ValueError when the run is too short to measure."""
    # A part of CLoCKDistill whose weight is 0 is off, and nothing to balance.
    off = set()
    for weight, losses in PARTS.items():
        if getattr(method, weight, 1) == 0:
            off |= losses
    ratios = {part: ratio for part, ratio in cfg.balance.items() if not set(part.split("+")) <= off}
    if method is None or not ratios:
        return None
    balance = Balance(ratios)
    if steps <= len(balance.measured):
        raise ValueError(f"--balance measures in the first {len(balance.measured)} steps, and this "
                         f"run has {steps} in all: more --steps, or weights in --method-options")
    return balance


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
    with processes(device):
        Path(run.out).mkdir(parents=True, exist_ok=True)
        # Of two runs into one folder, one would be lost. The first process keeps others out.
        lock = checkpoints.locked(run.out) if process_rank() == 0 else contextlib.nullcontext()
        with lock:
            return TrainingRun(cfg, run, device).finish()


class TrainingRun:
    """`fit` in one process: what a run is made of, and what it does with it. Rank 0 writes.

    Built with everything that can fail before the first step; `finish` trains to the end.
    """
    def __init__(self, cfg, run, device):
        self.run, self.device, self.out = run, device, Path(run.out)
        self.rank, self.world = process_rank(), process_count()
        self.last = self.out / "last.pt"
        kept = [name for name in ("last.pt", "best.pt", "result.json")
                if (self.out / name).exists()]
        if kept and not run.resume:
            raise ValueError(f"{run.out} already holds a run ({kept[0]}): add --resume to continue "
                             "it, or choose another --out")

        # Data first: whatever is wrong with it is said before a model is built.
        self.train_set, self.val_set = open_data(cfg)
        self.steps = cfg.steps
        if self.steps is None:
            images = cfg.epochs * len(self.train_set)
            self.steps = math.ceil(images / (cfg.batch_size * self.world))
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
        self.average, self.evaluated = None, self.student
        if cfg.ema:
            self.average = AveragedModel(
                self.student, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
            self.evaluated = self.average.module

        # All that the next step depends on, in addition to its number: a checkpoint has to hold it.
        stateful = {"student": self.student, "optimizer": self.optimizer, "scaler": self.scaler,
                    "average": self.average, "method": method, "balance": self.balance}
        self.stateful = {name: part for name, part in stateful.items() if part is not None}
        self.provenance = {
            "settings": plain(cfg), "seed": cfg.seed, "commit": commit(),
            "machine": machine(device), "world": self.world, "taught_by": taught_by,
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
        if self.world > 1:
            # Machines without a common disk may not all have the checkpoint.
            starts = [None] * self.world
            dist.all_gather_object(starts, self.start)
            if len(set(starts)) > 1:
                raise ValueError(f"the processes would begin at steps {starts}: copy {self.last} to "
                                 "every machine")
            self.learner = DistributedDataParallel(self.learner)

    def minutes(self):
        """Time spent on this run, earlier sittings included."""
        return self.earlier + (time.monotonic() - self.began) / 60

    def finish(self):
        """Train the steps that are left -> the result, which is also written."""
        cfg, out = self.cfg, self.out
        # Write down what made the run before it runs.
        if self.rank == 0:
            for name in ("last.pt", "best.pt", "config.json", "log.jsonl", "result.json"):
                for leftover in out.glob(f".{name}.????????"):    # of a kill in the middle of a save
                    leftover.unlink()
            write_json(out / "config.json",
                       {**self.provenance, "command": " ".join(sys.argv), "steps": self.steps})
            trim_log(out / "log.jsonl", self.start)
        self.announce()
        try:
            self.train()
        except OSError as error:
            if error.errno != errno.ENOSPC or error.filename:
                raise
            raise OSError(f"{out}/log.jsonl cannot be written, the disk is full: make room; --resume "
                          "goes on from the last checkpoint") from None

        # Save before evaluating, so that a Ctrl-C meanwhile loses no step, and after it, with the
        # scores. A model that answers with NaN is never saved: its last good checkpoint is kept.
        self.save(self.steps, self.last)
        scores = self.evaluate(self.steps)
        self.save(self.steps, self.last)
        # GFLOPs are counted where the run has its images, on real data by default at 800 x 1333.
        size = 800, 1333
        if cfg.data == "toy" or cfg.size:
            size = self.val_set[0][0].shape[1:]
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

    def announce(self):
        """Say what is about to run, before the progress bar: data, model, length, rates, and whatever
        a user would rather know now than after hours."""
        cfg, student, train_set, steps = self.cfg, self.student, self.train_set, self.steps
        if self.start:
            say(f"resume     at step {self.start} of {steps}")
        say(f"data       {train_set.summary}\n           {self.val_set.summary}")
        height, width = train_set[0][0].shape[1:]
        say(f"model      {cfg.detector}, {count_parameters(student) / 1e6:.2f} M parameters; "
            f"{steps} steps of {cfg.batch_size} x {self.world} images, the first of {height} x "
            f"{width} pixels, lr {cfg.lr:g} (a total batch of {cfg.batch_size * self.world}), on "
            f"{self.device}")

        # What would be noticed only after hours: (whether it is so, what to say).
        from_scratch = cfg.pretrained_backbone == "none" and not cfg.init_from
        notes = [
            (shared := len({*train_set.paths} & {*self.val_set.paths}),
             f"{shared} of {len(self.val_set)} validation images are trained on too: of these AP "
             "says what was remembered"),
            (student.num_queries < train_set.most_objects,
             f"an image has {train_set.most_objects} objects, more than the model's "
             f"{student.num_queries} queries: the rest cannot be found; --num-queries, some three "
             "times as many as objects"),
            (cfg.method not in (None, "clockdistill") and not (cfg.balance or cfg.method_options),
             f"{cfg.method} has its default weights, which are tuned for no data: --balance sets "
             "them by gradients"),
            (cfg.ema and steps and steps * (1 - cfg.ema) < 3,
             f"--ema {cfg.ema} averages over some {1 / (1 - cfg.ema):.0f} steps, the run has "
             f"{steps}: the average that is evaluated lags behind"),
            (cfg.data != "toy" and from_scratch and len(train_set) < 10_000,
             f"{len(train_set)} images and no pretrained weights: to do well on images it has not "
             "seen, a DETR needs some 10,000, or --init-from"),
        ]
        for holds, text in notes:
            if holds:
                say(f"note       {text}")

    def train(self):
        """The loop: after each step the average, the log, the bar; now and then a checkpoint."""
        cfg, run, steps = self.cfg, self.run, self.steps
        batches = data.loader(self.train_set, cfg.batch_size, steps=steps, start=self.start,
                              seed=cfg.seed, workers=run.workers, rank=self.rank, world=self.world)
        on_device = (batch.to(self.device) for batch in batches)
        # The first process alone writes and draws.
        bar = tqdm(total=steps, initial=self.start, desc=self.out.name, disable=self.rank > 0,
                   mininterval=quiet_interval(), dynamic_ncols=True)
        log_path = os.devnull if self.rank > 0 else self.out / "log.jsonl"
        with open(log_path, "a") as log_file, bar, finish_step_on_signal() as asked_to_stop:
            clock = saved_at = time.monotonic()
            for step, log in train_steps(
                    self.learner, self.teacher, self.optimizer, on_device, cfg, steps,
                    self.start, self.scaler, run.probe_every, self.balance):
                if self.average is not None:
                    self.average.update_parameters(self.student)
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

    def remark(self, step, log):
        """Print the rare entries of a step's log: the balance, and the gradients of the parts."""
        if "balance" in log:
            factors = (f"{part} {factor:.4g}" for part, factor in log["balance"].items())
            say(f"step {step:6d}  balance: from now on the method's losses times "
                + ", ".join(factors))
        measuring = self.balance is not None and step < len(self.balance.measured)
        if "report" in log and step % (5 * self.run.probe_every) == 0 and not measuring:
            parts = (f"{name} {share:.0%} {norm:.2g}"
                     for name, (share, norm) in log["report"].items())
            say(f"step {step:6d}  share of the loss, gradient norm: " + ", ".join(parts))

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
    if (queries, ema) != (cfg.num_queries, cfg.ema):
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
    saved = load_payload(path)
    # The teacher is known by its weights, wherever their file lies now.
    facts = {"teacher": "taught_by", "number of processes": "world",
             "images, classes or boxes": "images"}
    then, now = (side["settings"] | {name: side.get(key) for name, key in facts.items()}
                 for side in (saved, provenance))
    differ = [name for name, value in now.items() if then.get(name, value) != value]
    if differ:
        longer = set(differ) <= {"steps", "epochs", "ema"}     # --fit-to-data sets ema by the steps
        raise ValueError(f"{path} was made with other settings ({', '.join(differ)}): repeat its "
                         f"command, which {path.parent}/config.json holds, or choose another --out"
                         + ", and go on from its weights there with --init-from" * longer)
    # best.pt and exported weights hold no optimizer.
    if not stateful.keys() <= saved.get("resume", {}).keys():
        raise ValueError(f"{path} holds weights alone, nothing to resume from: start a new run "
                         "with --init-from")
    for name, part in stateful.items():
        part.load_state_dict(saved["resume"][name])
    return saved


def trim_log(path, steps):
    """Forget what was logged after the last checkpoint: those steps are about to be made again.

    steps: how many steps the checkpoint holds. Lines that cannot be read are left out, and their
    number is said: a log is no reason to stop a run.
    """
    if not path.exists():
        return
    kept, lost = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < steps:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            lost += 1
    write_text(path, "".join(kept))
    if lost > 1 or len(kept) < steps:                     # one line may be cut off by a kill
        say(f"note       {path} could not be read in {lost} lines; it holds {len(kept)} of {steps} "
            "steps")


def open_teacher(cfg, run, dataset, device):
    """The frozen teacher, in eval mode.

    dataset: the validation images. Raises ValueError when it knows other classes, or when its AP says
    that it was hardly loaded: users of other repositories trained for days with such a teacher.
    """
    if run.teacher_cache and cfg.data != "kitti" and cfg.augment:
        raise ValueError(f"--teacher-cache: with --data {cfg.data} every image is augmented anew, so "
                         "none is met twice: leave it out, or train with --no-augment")
    teacher, payload = load_model(cfg.teacher)
    same_classes(payload, dataset, cfg.teacher)
    teacher = teacher.to(device).requires_grad_(False)
    # Its stored AP counts when it was measured on the same images; otherwise it is measured now.
    theirs, its_images = payload["settings"], payload.get("images") or [None]
    differ = [f"{flag(name)} {theirs.get(name)}" for name in ("data", "class_map", "limit", "size")
              if theirs.get(name) != getattr(cfg, name)]
    ap, source = payload["metrics"].get("AP"), "stored in its checkpoint"
    if differ or ap is None or its_images[-1] != dataset.fingerprint:
        found = detect(teacher, dataset, run, run.eval_batch)
        ap, source = data.evaluate(found, dataset)["AP"], "measured now"
    other = f"; it was trained with {', '.join(differ)}, unlike this run" if differ else ""
    if cfg.teacher_floor > 0 and not ap >= cfg.teacher_floor:
        raise ValueError(f"the teacher {cfg.teacher} has AP {ap:.3f} ({source}), under the floor "
                         f"of {cfg.teacher_floor}{other}: was it trained, on this data? "
                         "--teacher-floor 0 uses it all the same")
    say(f"teacher    {cfg.teacher}: AP {ap:.3f} ({source}){other}")
    if run.teacher_cache:
        from experiments.cache import EncodeOnce
        teacher.encode = EncodeOnce(teacher.encode, run.teacher_cache * 1e9)
    return teacher


def open_method(cfg, teacher, student):
    """The distillation method of `--method`, with its `--method-options`, on the student's device."""
    # The models say their widths, levels and classes, as far as the method asks for them.
    kind = methods()[cfg.method]
    given = {"student_dim": student.config["hidden_dim"],
             "teacher_dim": teacher.config["hidden_dim"], "num_classes": student.num_classes,
             "levels": student.config.get("feature_levels", 1)}
    wanted = inspect.signature(kind).parameters.keys() & given.keys()
    device = next(student.parameters()).device
    method = kind(**{name: given[name] for name in wanted}, **cfg.method_options).to(device)
    if kind is CLoCKDistill and method.lambda_log:
        # A teacher without what it is to be asked with is refused now, not at the first step. An
        # image without objects asks, and nothing is drawn.
        nothing = torch.zeros(0, device=device)
        method.queries([nothing], [nothing], asked_with(teacher, method.content), random_queries=0)
    return method


def check_pair(teacher, student, dataset):
    """One image through both encoders: their memories must have the same tokens."""
    image = dataset[0][0][None].to(next(student.parameters()).device)      # (1, 3, H, W)
    nothing = torch.zeros_like(image[:, 0], dtype=torch.bool)              # no padding
    student.eval()                                                         # until it is trained
    with torch.no_grad():
        theirs, ours = (model.encode(image, nothing).shapes for model in (teacher, student))
    if theirs != ours:
        advice = "give both the same --feature-levels and strides"
        if teacher.detector != student.detector:
            advice = f"a {teacher.detector} teaches a {student.detector} only where they are alike"
        raise ValueError("teacher and student do not fit: their memories have levels of "
                         f"{theirs} and {ours} cells; {advice}")


class Interrupted(Exception):
    """Ctrl-C or a polite kill: the step in hand was finished and saved."""


@contextlib.contextmanager
def finish_step_on_signal():
    """Yield a list that fills up when the user asks to stop. A second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    # Only a process's main thread may listen to signals; elsewhere nobody asks.
    numbers = []
    if threading.current_thread() is threading.main_thread():
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
    if process_rank() == 0:
        tqdm.write(text)


# ----------------------------------------------------------------------------------------------
# The world around a run: devices, processes, provenance
# ----------------------------------------------------------------------------------------------

def pick_device(name="auto"):
    """The torch.device of a name; auto: CUDA, else Apple's MPS, else the CPU. With torchrun, each
    process has the GPU of its local rank. Raises ValueError for a name or a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name not in ("auto", *there):
        raise ValueError(f"--device {name}: want auto | cpu | cuda | mps")
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        raise ValueError(f"--device {name}: torch finds none here; take auto or cpu")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def processes(device):
    """Join the other processes when started by torchrun; otherwise do nothing."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def process_rank():
    """The number of this process: 0 is the first, the one that writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def machine(device):
    """What a time was measured on: processor, cores, threads, torch; it stands beside every figure."""
    # platform knows no more than "x86_64" of many CPUs; Linux tells their model.
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu" and Path("/proc/cpuinfo").exists():
        stated = re.search(r"^model name\s*: (.*\S)", Path("/proc/cpuinfo").read_text(), re.M)
        name = stated[1] if stated else name
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
    data and teacher lie, and the weights that teach it (their `fingerprint`, or None).

    So an option that is added later leaves the names of earlier runs as they are.
    """
    defaults = plain(Config(detector=cfg.detector))
    settings = {name: value for name, value in plain(cfg).items()
                if name not in ("root", "teacher") and value != defaults[name]}
    text = json.dumps([cfg.detector, settings, taught_by], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def count_parameters(model):
    """The number of a model's parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


def speed_of(model, dataset):
    """Images per second, one by one, on the device where the model is; see bench.images_per_second."""
    from experiments import bench
    image = dataset[0][0][None].to(next(model.parameters()).device)
    return bench.images_per_second({"": model}, image)[""]


def plain(cfg):
    """The settings as JSON has them (no tuples), so that saved and given ones compare."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


# ----------------------------------------------------------------------------------------------
# Evaluation: of a run, and of a finished checkpoint
# ----------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model, batch, precision="fp32"):
    """A batch through the model in eval mode -> per image {"image_id", "scores", "labels", "boxes"}.

    On the CPU, boxes xyxy in original pixels, best first. The 100 best of all classes, as Deformable
    DETR's program keeps; those of DAB-DETR and DINO keep 300 (on toy and KITTI .0002 AP more).
    Raises FloatingPointError, naming the image, when a detection is not finite.
    """
    training = model.training
    with autocast(batch.images.device, precision):
        output = model.eval()(batch.images, batch.padding)
    model.train(training)
    sizes = torch.stack([torch.as_tensor(t["orig_size"]) for t in batch.targets])     # (B, 2): h, w
    best = models.postprocess(output.detections, sizes, data.MAX_DETECTIONS)
    results = []
    for image_id, found in zip(batch.image_ids, best):
        results.append({"image_id": image_id, **{k: v.cpu() for k, v in found.items()}})
        data.check_finite(results[-1], f"image {image_id}")
    return results


def detect(model, dataset, run, batch_size=1, progress=True, precision="fp32"):
    """Every image of the data set through the model -> list of what `answer` returns.

    Each of several processes does its share and gets everybody's.
    """
    device, rank, world = next(model.parameters()).device, process_rank(), process_count()
    batches = data.eval_loader(dataset, batch_size, workers=run.workers, rank=rank, world=world)
    results = []
    for batch in tqdm(batches, "evaluate", leave=False, disable=not progress or rank > 0,
                      mininterval=quiet_interval()):
        results += answer(model, batch.to(device), precision)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = sum(shares, [])
    return results


def evaluate_checkpoint(checkpoint, out=None, **given):
    """Print AP of a checkpoint on a split, seconds per image and peak memory; also to the JSON `out`.

    Data, class map and size are those that the checkpoint was trained with, where not given; which
    files are opened (root, val_split), a checkpoint never says.
    """
    payload = load_payload(checkpoint)
    settings = payload["settings"]
    stored = {name: settings.get(name) for name in ("data", "class_map", "size")}
    if given.get("data") == "coco":
        del stored["class_map"]                          # only KITTI's layout has one
    given = stored | given
    # No size means the reader's default, and another reader has another.
    if given["size"] is None and given["data"] != stored["data"]:
        sides = input_size(payload)
        if sides is None:
            raise ValueError(f"{checkpoint} was trained on images as they are: give --size, for "
                             "the toy's 48,160")
        given["size"] = "{},{}".format(*sides)
    there = settings.get("root")                         # published weights do not tell
    if "root" not in given and (given["data"], there or Config.root) != ("toy", Config.root):
        raise ValueError(f"eval needs --root, the folder of the {given['data']} images"
                         + (f"; {checkpoint} was trained on {there}" if there else ""))
    cfg, run = configure("fit", **given)
    device = pick_device(run.device)
    with processes(device):
        dataset = build_data(cfg, cfg.val_split)
        same_classes(payload, dataset, checkpoint)
        model = rebuild(payload).to(device)
        start = time.monotonic()
        results = detect(model, dataset, run, run.eval_batch, precision=cfg.precision)
        seconds = (time.monotonic() - start) / max(1, len(dataset))
        scores, memory = data.evaluate(results, dataset), peak_memory_gb(device)
        say(dataset.summary)
        for name, values in {"all classes": scores, **scores["per_class"]}.items():
            columns = (f"{k} {v:.4f}" for k, v in values.items() if k != "per_class")
            say(f"  {name:<20} " + "  ".join(columns))
        say(f"{seconds:.3f} s per image with loading, peak memory {memory:.2f} GB, "
            f"{cfg.precision}, {machine(device)}")
        if out and process_rank() == 0:
            write_json(out, scores | {
                "seconds_per_image": seconds, "peak_memory_gb": memory, "images": len(dataset),
                "checkpoint": str(checkpoint), "precision": cfg.precision,
                "machine": machine(device)})


PLACES = ("root", "teacher", "init_from")       # settings that hold a path: never published


def load_payload(path):
    """A checkpoint of ours, or a run's folder -> what it holds, checked for what a model needs."""
    path = Path(path)
    if path.is_dir():                                    # a run's folder
        path = path / "last.pt"
    payload = checkpoints.load(path)
    if not isinstance(payload, dict) or not CHECKPOINT.keys() <= payload.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: give a last.pt or best.pt "
                         "that `fit` or `distill` wrote, or an exported .safetensors")
    for place, right in entries_of(payload):
        if not right:
            raise ValueError(f"{path}: its {place!r} is not what a checkpoint of this project "
                             "holds: make it again")
    return payload | {"path": path}


# What a model and its evaluation need of a checkpoint; what was written beside it is for people.
CHECKPOINT = {"model": dict, "detector": str, "config": dict, "classes": list,
              "category_ids": list, "data": str, "settings": dict, "metrics": dict}


def entries_of(payload):
    """Yield (place in a checkpoint, whether its value is one that a checkpoint may hold).

    A file may be safe to read and still absurd: options have the types and ranges that they have on
    the command line. Later lines rely on what earlier ones say.
    """
    for part, kind in CHECKPOINT.items():
        yield part, isinstance(payload[part], kind)
        if kind is dict:
            yield part, all(isinstance(key, str) for key in payload[part])
    config, settings = payload["config"], payload["settings"]
    classes, ids = payload["classes"], payload["category_ids"]
    yield "model", all(isinstance(value, torch.Tensor) for value in payload["model"].values())
    yield "classes", classes and all(isinstance(name, str) for name in classes)
    yield "category_ids", len(ids) == len(classes) and all(type(number) is int for number in ids)
    yield "detector", payload["detector"] in models.DETECTORS
    yield "metrics.AP", type(payload["metrics"].get("AP")) in (float, int, type(None))
    # The settings that evaluation reads, and the model's options.
    yield "data", payload["data"] == settings.get("data") in data.DEFAULT_SIZE
    yield "settings.class_map", fits("class_map", settings.get("class_map"), str | None)
    yield "settings.size", fits("size", settings.get("size"), str | None)
    kinds = {name: kind for name, (kind, _) in models.described_options().items()}
    kinds |= {"frozen_backbone": bool, "pretrained_backbone": bool}
    for name in kinds.keys() & config.keys():
        yield f"config.{name}", fits(name, config[name], kinds[name])


def rebuild(payload):
    """The detector of what `load_payload` returned, in eval mode, on the CPU.

    Raises ValueError when its weights are not those of its configuration, or when its backbone was
    a module of one's own.
    """
    # A checkpoint never names a file to open.
    path, config = payload["path"], payload["config"] | {"pretrained_backbone": False}
    if config.get("backbone") == "custom":
        raise ValueError(f"{path} was made with a backbone module of your own: build the model "
                         "with it (models.build), then checkpoints.load_weights")
    try:
        model = models.build(payload["detector"], len(payload["classes"]), **config)
        model.load_state_dict(payload["model"])
    except (ValueError, RuntimeError, TypeError) as error:
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
        raise ValueError(f"{path} knows {len(theirs)} classes ({data.first_few(theirs)}), "
                         f"{dataset.name} has {len(ours)} ({data.first_few(ours)}): choose the "
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


def methods():
    """{name on the command line: class} of all distillation methods, the rivals among them."""
    from experiments.baselines import BASELINES
    return {"clockdistill": CLoCKDistill} | BASELINES


def option(default, text, choices=None):
    """A field of a configuration, documented by what `--help` says of it."""
    start = {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(metadata={"help": text, "choices": choices}, **start)


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes, but for the model's options, which `Config` adds.
    It is written beside the results, and `--resume` insists on the same.
    """
    # --- data
    data: str = option("toy", "which reader; toy: road scenes, drawn on first use",
                       choices=("toy", "kitti", "coco"))
    root: str = option("datasets/toy", "folder of the data set, in KITTI's or COCO's own layout")
    train_split: str = option("train", "train | val | all | a file with one image id per line (toy "
                              "also: tune; COCO also: test, an annotation file)")
    val_split: str = option("val", "the images that AP is reported on, in the same words")
    class_map: str | None = option(None, "KITTI layout: kitti3 | kitti8 | kitti3_merged | your own "
                                   "names, Car,Dog,...")
    limit: int | None = option(None, "use only the first N images of each split")
    size: str | None = option(None, "resize to SHORT,MAX pixels, keeping the ratio; default: a "
                              "checkpoint's own, otherwise the reader's")
    augment: bool = option(True, "flips, resizes, crops in training (off: to overfit a few images)")
    # --- the detector, whose options `Config` adds
    detector: str = option("dino", "which detection transformer", choices=models.DETECTORS)
    # --- optimisation
    steps: int | None = option(None, "optimizer steps; default: from --epochs. 0 writes the "
                               "untrained checkpoint")
    epochs: float | None = option(None, "passes over the images, where --steps is not given")
    batch_size: int | None = option(None, "images per step and process, whatever --accumulate is")
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
    ema: float = option(0.0, "decay of the weights' moving average, which is evaluated; 0 = off")
    fit_to_data: bool = option(False, "where --num-queries and --ema are not given or 0: three "
                               "queries for each object of the fullest training image, and an "
                               "average over the last twentieth of the steps")
    precision: str = option("fp32", "autocast; losses, matcher, masks and sampling locations stay "
                            "fp32. Where the CPU has bf16, it detects in 0.6 of fp32's time on "
                            "large images, and is slower on the toy's", choices=tuple(PRECISIONS))
    seed: int = option(0, "initial weights, order of the images, augmentation, noise")
    # --- distillation (`distill` only)
    teacher: str | None = option(None, "teacher's checkpoint, or the folder of its run")
    method: str | None = option(None, "distillation method; `distill` takes clockdistill",
                                choices=methods)
    method_options: dict = option({}, "options of the method, listed below; they replace all of "
                                  "the recipe's")
    balance: dict = option({}, "weigh the parts of the method by their gradients in the first 8 "
                           "steps: memory=50 cls+l1+giou=1 wants memory's 50 times as long as "
                           "detection's; none: the weights of --method-options")
    teacher_floor: float = option(0.05, "refuse a teacher of lower AP (hardly loaded); 0 = never")
    # --- where the first weights come from
    init_from: str | None = option(None, "start from the weights of any known program, of hf:"
                                   "ORGANISATION/MODEL, or of a run (to continue it: --resume)")
    init_classes: str | None = option(None, "classes of --init-from in the order of its rows, "
                                      "Car,Dog,..., where its file does not name them")
    made_with: dict = option({}, "model options of --init-from where checkpoints.py assumes others")

    def __post_init__(self):
        for name, value in SCHEDULES[self.detector].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)      # a frozen record may still finish itself
        check_limits(self)
        parse_size(self.size)
        if self.accumulate > self.batch_size:
            raise ValueError(f"--accumulate {self.accumulate}: it splits each batch, want at most "
                             f"--batch-size {self.batch_size}")
        if self.method:
            check_balance(self.method, self.balance)


# The model's options as further fields, from the signatures of models.py. None is the detector's
# official value.
Config = dataclasses.make_dataclass(
    "Config", [(name, kind | None, option(None, text))
               for name, (kind, text) in models.described_options().items()],
    bases=(Settings,), frozen=True)
Config.__doc__ = Settings.__doc__


@dataclass(frozen=True)
class Run:
    """Where and how a run happens; it changes nothing that is learned, but for rounding (on another
    device, by the teacher's cache)."""
    out: str = option("runs/fit", "folder for the log, checkpoints, config.json and result.json")
    resume: bool = option(False, "go on from the last checkpoint in --out, on a CPU bit for bit")
    device: str = option("auto", "auto | cpu | cuda | mps")
    workers: int = option(2, "processes that load images")
    eval_every: int = option(1000, "steps between evaluations, 0 = none but the one at the end")
    eval_batch: int = option(1, "images per batch in evaluation; 1 is exact, padding moves boxes a "
                             "little")
    teacher_cache: float = option(0.0, "GB to keep the teacher's memories of images: faster by a "
                                  "third with a few hundred images that are only flipped; 0 = none")
    probe_every: int = option(200, "steps between reports of losses' shares and gradients; 0: none")
    save_minutes: float = option(2.0, "minutes between checkpoints")

    def __post_init__(self):
        check_limits(self)


# The ranges of numbers: (least, first that is too large). All others begin at 0 and have no end.
# Upper ends keep a forged checkpoint from asking for more memory than there is.
LIMITS = {
    "limit": (1, math.inf), "batch_size": (1, math.inf), "accumulate": (1, math.inf),
    "eval_batch": (1, math.inf), "clip": (1e-6, math.inf), "ema": (0, 1), "seed": (0, 2 ** 31),
    "workers": (0, 1024),
    "backbone_width": (1, 2 ** 10), "hidden_dim": (1, 2 ** 13), "heads": (1, 2 ** 10),
    "ffn_dim": (1, 2 ** 16), "encoder_layers": (0, 100), "decoder_layers": (1, 100),
    "num_queries": (1, 2 ** 16), "feature_levels": (1, 10), "points": (1, 100), "dropout": (0, 1),
    "num_patterns": (0, 2 ** 10), "denoising": (0, 2 ** 16), "position_offset": (-100, 100),
    "feature_stride": (8, 33), "logit_eps": (0, 1),
}


def out_of_range(name, value):
    """What an option's number should be instead, "" where it is right. NaN is in no range."""
    least, end = LIMITS.get(name, (0, math.inf))
    if not isinstance(value, (int, float)) or least <= value < end:
        return ""
    less = f" and less than {end}" if end < math.inf else ", a finite number"
    return f"want at least {least}{less}"


def check_limits(settings):
    """Raises ValueError for a number of a Config or a Run that is out of its range."""
    for name, value in vars(settings).items():
        if wrong := out_of_range(name, value):
            raise ValueError(f"{flag(name)} {value}: {wrong}")


def flag(name):
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def fits(name, value, kind):
    """Whether a value from a file is one of an option: of its type, in its range."""
    kinds = getattr(kind, "__args__", (kind,))           # of str | None: both
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        return False
    if name == "size":
        with contextlib.suppress(ValueError):
            return parse_size(value) or True
        return False
    return not out_of_range(name, value)


def parse_size(text):
    """'800,1333' -> (800, 1333); None stays None."""
    sides = parse_sides(text, "SHORT,MAX")
    if sides and sides[0] > sides[1]:
        raise ValueError(f"--size {text}: want the short side first, SHORT,MAX")
    return sides


def input_size(payload, size=None):
    """The size of images for a checkpoint: `size`, its own, or its reader's -> (short, longest).

    payload: of `load_payload`.  size: SHORT,MAX as text.  None, as the toy's: images as they are.
    """
    stored = parse_size(size or payload["settings"].get("size"))
    return stored or data.DEFAULT_SIZE[payload["data"]]


def parse_sides(text, form):
    """Two numbers of pixels, as `form` names them -> (first, second); None stays None."""
    if text is None:
        return None
    # No sign and no point, so what matches is a whole number.
    if not re.fullmatch(r"\s*\d{1,5}\s*,\s*\d{1,5}\s*", text, re.ASCII):
        raise ValueError(f"--size {text}: want {form} in pixels, e.g. 800,1333")
    first, second = map(int, text.split(","))
    if not (8 <= first <= 16384 and 8 <= second <= 16384):
        raise ValueError(f"--size {text}: want 8 to 16384 pixels")
    return first, second


def build_data(cfg, split, augment=False):
    """The images of a split, as cfg says -> data.Dataset.

    augment: the training augmentation of that kind of data; without, as in evaluation.
    """
    # Otherwise the toy, in KITTI's layout too, would be trained on for hours.
    if cfg.data != "toy" and Path(cfg.root) == Path(Config.root):
        raise ValueError(f"give --root, the folder of the {cfg.data} images; {cfg.root}, the "
                         "default, holds the toy (--data toy)")
    # The other processes wait for the first one, which may have to draw the toy.
    if process_rank() > 0:
        dist.barrier()
    dataset = data.build(cfg.data, cfg.root, split, augment="train" if augment else "eval",
                         size=parse_size(cfg.size), limit=cfg.limit, class_map=cfg.class_map,
                         seed=cfg.seed)
    if process_rank() == 0 and process_count() > 1:
        dist.barrier()
    return dataset


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


def method_defaults(name):
    """{option: default} of a method's --method-options."""
    parameters = inspect.signature(methods()[name]).parameters
    of_models = ("student_dim", "teacher_dim", "num_classes", "levels")     # they say these
    return {key: p.default for key, p in parameters.items() if key not in of_models}


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
            elif kind is float:
                over, slash, under = text.partition("/")     # 1/16 is a number too
                over, under = float(over), float(under) if slash else 1.0
                options[name] = over / under
                if not all(map(math.isfinite, (over, under, options[name]))):
                    raise ValueError
            else:
                options[name] = kind(text)
        except (KeyError, ValueError, ZeroDivisionError):
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
    # A negative weight would push the student away from its teacher; no other number is negative.
    for name, value in options.items():
        if not isinstance(value, str) and value < 0:
            raise ValueError(f"--method-options {name}={value}: want at least 0")
    preset = options.pop("preset", "paper")
    if preset not in PRESETS:
        raise ValueError(f"--method-options preset={preset}: choose from {', '.join(PRESETS)}")
    return PRESETS[preset] | options


def check_balance(method, ratios):
    """Raises ValueError for a loss that the method lacks, one named twice, a ratio that is none."""
    known = methods()[method].terms
    named = [name for part in ratios for name in part.split("+")]
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(f"--balance: {method} has no loss {', '.join(unknown)}, only "
                         f"{', '.join(known)}")
    if len(named) > len(set(named)) or not all(0 < x < math.inf for x in ratios.values()):
        raise ValueError(f"--balance {ratios}: want each loss once, and ratios above 0")


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
    if given.get("epochs") is not None:                  # the length is given: the recipe's falls
        settings.pop("steps", None)
    method = given.setdefault("method", settings.get("method", "clockdistill"))
    if method != settings.get("method"):
        settings |= dict(method_options={}, balance={})  # the recipe's belong to its own method

    # Words NAME=VALUE become values.
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

    # `fit` knows no teacher, whatever the recipe says; `distill` cannot do without one.
    if command == "fit":
        settings |= dict(teacher=None, method=None, method_options={}, balance={})
    elif not settings.get("teacher"):
        raise ValueError("distill needs --teacher: the folder or checkpoint of a trained run")
    weighed = set("+".join(settings.get("balance", {})).split("+"))
    for name, losses in PARTS.items():
        if weighed & losses and given.get("method_options", {}).get(name):
            raise ValueError(f"--method-options {name} has no effect beside --balance, which sets "
                             "the weights: give the ratio there, or add --balance none")
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
# both models [P].
PAPER = {name: dict(content="label" if name == "dino" else "random_label")
         for name in models.DETECTORS}

# The paper's lambdas are not known. What carries over to other pictures is not a lambda but a ratio of
# gradients (`Balance`). On the small KITTI 3 to 50 for memory tie and 200 is too much; on the toy DINO's
# best trial is 56, and 14 costs AP. So 50 does well on both (one seed each: results/kitti).
RATIOS = {"memory": 50., "cls+l1+giou": 1.}

# A few hundred pictures in KITTI's or COCO's layout, and two CPU cores. Backbones with ImageNet
# weights, whose norms and first stages stay fixed, and images small enough for 1 s per step. `make
# kitti-backbones` fetches the two files; --pretrained-backbone imagenet lets timm download instead.
# Teacher and student read images of one size: their memories must have the same tokens. Sizes and
# rates are first choices on KITTI's split "tune"; results/kitti/PLAN.md says how far they were tried.
# 2,400 steps keep a distilled student below 40 minutes of one core (with --teacher-cache 2).
SMALL = dict(data="kitti", size="128,424", heads=8, batch_size=8, warmup=100, schedule="cosine",
             fit_to_data=True)
SMALL_STUDENT = SMALL | dict(
    backbone="timm:tf_efficientnet_lite0", hidden_dim=96, ffn_dim=256, encoder_layers=1,
    pretrained_backbone="datasets/backbones/tf_efficientnet_lite0.pth", decoder_layers=2,
    steps=2400, lr=2e-3, backbone_lr=4e-4, method="clockdistill", balance=RATIOS)
SMALL_TEACHER = SMALL | dict(
    backbone="timm:tf_efficientnet_lite2", hidden_dim=128, ffn_dim=512, encoder_layers=2,
    pretrained_backbone="datasets/backbones/tf_efficientnet_lite2.pth", decoder_layers=3,
    steps=3200, lr=1e-3, backbone_lr=2e-4)

# What toy and small models have of their own, by detector: three feature maps, or DAB-DETR's one.
DINO = dict(feature_levels=3, points=2, denoising=50)
DEFORMABLE = dict(feature_levels=3, points=2, box_refine=True, dropout=0.)
TOY_DAB = dict(feature_stride=8, num_queries=60, lr=1e-3, backbone_lr=1e-3)

# A recipe is a named change to the defaults, by detector. Students' recipes name their method, so that
# `fit` with one trains the student alone and `distill` the same student with a teacher.
RECIPES = {
    "small-student": {
        "dino": SMALL_STUDENT | DINO | dict(method_options=PRESETS["dino"]),
        "deformable_detr":
            SMALL_STUDENT | DEFORMABLE | dict(method_options=PRESETS["deformable_detr"]),
        # Slow: AP50 .11 on KITTI's "tune", where DINO has .59 after fewer steps (results/kitti/PLAN.md).
        "dab_detr": SMALL_STUDENT | dict(
            feature_stride=16, lr=1e-3, backbone_lr=2e-4, method_options=PRESETS["dab_detr"]),
    },
    "small-teacher": {
        "dino": SMALL_TEACHER | DINO | dict(points=4),
        "deformable_detr": SMALL_TEACHER | DEFORMABLE | dict(points=4),
        "dab_detr": SMALL_TEACHER | dict(feature_stride=16),
    },
    "toy-student": {
        "dino": TOY_STUDENT | DINO | dict(method_options=toy_weights("dino", 960.)),
        "deformable_detr":
            TOY_STUDENT | DEFORMABLE | dict(method_options=toy_weights("deformable_detr", 240.)),
        "dab_detr": TOY_STUDENT | TOY_DAB | dict(
            steps=2000, method_options=toy_weights("dab_detr", 960.)),
    },
    "toy-teacher": {
        "dino": TOY_TEACHER | DINO | dict(points=4),
        "deformable_detr": TOY_TEACHER | DEFORMABLE | dict(points=4),
        "dab_detr": TOY_TEACHER | TOY_DAB | dict(
            backbone="resnet34", backbone_width=32, steps=6000),
    },
    # The paper's data. Length, rates and batch are each detector's official ones (SCHEDULES), on
    # KITTI with the batch of the authors' earlier code [P], for which rates meant for 16 or 32 images
    # may be high: --lr, --accumulate. R50 teaches R18 by our choice: --backbone. So are the weights,
    # RATIOS; --balance none leaves the lambdas at 1.
    "kitti-teacher": {name: dict(data="kitti", backbone="resnet50", batch_size=8)
                      for name in models.DETECTORS},
    "kitti-student": {name: dict(data="kitti", backbone="resnet18", batch_size=8,
                                 method="clockdistill", method_options=PAPER[name],
                                 balance=RATIOS) for name in models.DETECTORS},
    "coco-teacher": {name: dict(data="coco", backbone="resnet50") for name in models.DETECTORS},
    "coco-student": {name: dict(data="coco", backbone="resnet18", method="clockdistill",
                                method_options=PAPER[name], balance=RATIOS)
                     for name in models.DETECTORS},
}
for by_detector in RECIPES.values():
    for detector, recipe in by_detector.items():
        recipe["detector"] = detector
SHIPPED_TEACHERS = {name: HERE / "weights" / f"toy_teacher_{name}.safetensors"
                    for name in models.DETECTORS}


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------

CHECKPOINT_HELP = "a run's folder (its last.pt), last.pt, best.pt (chosen on val), or safetensors"
DISTILLATION = ("teacher", "method", "method_options", "balance", "teacher_floor")
# All commands, in the order of `--help`. From "predict" on each has a file in experiments/.
COMMANDS = {
    "fit": "train a detector",
    "distill": "train a student with a teacher",
    "eval": "COCO AP of a checkpoint on a split",
    "predict": "draw and list the detections of image files",
    "export": "weights alone as fp16 safetensors, or a program for ONNX Runtime",
    "demo": "teacher, student, distilled student on the toy KITTI",
    "table": "many runs, one table",
    "evidence": "of a table's finished students: other images, near and far, per class",
    "look": "draw what the queries and tokens of detectors look at",
    "bench": "speed, memory, parameters and GFLOPs of the detectors",
    "deploy": "AP, latency, size and memory of teacher and students, in PyTorch and as ONNX",
}
EXAMPLES = """
examples:
  python train.py demo                                     all of it, on generated images, in minutes
  python train.py fit --recipe kitti-teacher --root DIR --out runs/teacher
  python train.py distill --recipe kitti-student --root DIR --out runs/student --teacher runs/teacher
  python train.py eval --checkpoint runs/student --data kitti --root DIR
  torchrun --nproc_per_node 4 train.py fit ...             several GPUs: --batch-size is of each process
AP values are fractions 0..1. Give --debug for the whole traceback of an error."""


def official(name):
    """The official value of a setting, for `--help`, of each detector where they differ; or None.

    It stands in the signatures of models.py, or in SCHEDULES, and nowhere else.
    """
    parameters = inspect.signature(models.build).parameters
    backbone = {key: p.default for key, p in parameters.items()}
    backbone["pretrained_backbone"] = "imagenet"         # the command line's word for True
    values = {}
    for detector in models.DETECTORS:
        options = backbone | models.options_of(detector) | SCHEDULES[detector]
        if name in options:
            values[detector] = options[name]
    if len(set(values.values())) > 1:
        return ", ".join(f"{detector} {value:.4g}" for detector, value in values.items())
    return next(iter(values.values()), None)


def add_options(parser, cls, only=()):
    """One option for each field of a configuration, or for those of `only`.

    What the user does not give is left out of the result.
    """
    for field in dataclasses.fields(cls):
        if only and field.name not in only:
            continue
        text, choices = field.metadata["help"], field.metadata["choices"]
        if callable(choices):
            choices = choices()
        if (value := official(field.name)) is not None:
            text += f" (official: {value})"
        elif field.default not in (None, dataclasses.MISSING):
            text += f" (default: {field.default})"
        # int | None stands for an int that may be missing.
        kind = getattr(field.type, "__args__", (field.type,))[0]
        if kind is bool:
            form = {"action": argparse.BooleanOptionalAction}
        elif kind is dict:
            form = {"nargs": "+", "metavar": "NAME=VALUE"}
        else:
            form = {"type": kind, "choices": choices,
                    "metavar": None if choices else kind.__name__.upper()}
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **form)


def at_least_1(text):
    """'3' -> 3, for argparse."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"want a whole number from 1 on, not {text}")
    return int(text)


def describe_recipes():
    """Every recipe, option by option, for `fit --help`."""
    lines = ["recipes (given options override them; --data toy takes toy-student by default):"]
    for name, by_detector in RECIPES.items():
        for detector, recipe in by_detector.items():
            settings = " ".join(f"{k}={v}" for k, v in recipe.items())
            lines.append(f"  {name}, {detector}: {settings}")
    return "\n".join(lines)


def describe_methods():
    """The options of each distillation method, for `distill --help`."""
    lines = ["--method-options, explained in clockdistill.py and experiments/baselines.py;\n"
             f"clockdistill also takes preset={'|'.join(PRESETS)}, named sets of options:"]
    for name in methods():
        options = " ".join(f"{k}={v}" for k, v in method_defaults(name).items())
        lines.append(f"  {name}: {options}")
    return "\n".join(lines)


def command_line(asked):
    """The parser of all commands. `asked`, the one that is given, alone has its options.

    So `fit` does not load what draws pictures.
    """
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n\n")[0],
                                     epilog=EXAMPLES, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, **layout)
        command.add_argument("--debug", action="store_true",
                             help="show the traceback of an error instead of one line")
        if name != asked:
            continue
        if name in ("fit", "distill"):
            add_training_options(command, name)
        elif name == "eval":
            command.epilog = ("--data, --class-map and --size are as in training when not given; "
                              "--root has to be given, except for the toy")
            command.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
            command.add_argument("--out", help="also write the figures to this JSON file")
            add_options(command, Config, only=(
                "data", "root", "val_split", "class_map", "limit", "size", "precision"))
            add_options(command, Run, only=("device", "workers", "eval_batch"))
        else:
            room = open_experiment(name)
            command.description = room.__doc__
            room.add_options(command)
    return parser


def add_training_options(parser, command):
    """The options of `fit` and `distill`; only `distill` has those about a teacher."""
    names = [field.name for field in dataclasses.fields(Config) if field.name not in DISTILLATION]
    parser.epilog = describe_recipes()
    if command == "distill":
        names += DISTILLATION
        parser.epilog += "\n\n" + describe_methods()
    parser.add_argument("--recipe", choices=RECIPES, default=argparse.SUPPRESS,
                        help="a named set of options, listed below")
    add_options(parser, Config, names)
    add_options(parser, Run)


def open_experiment(name):
    """The module of a command that lives in experiments/."""
    return importlib.import_module("experiments." + ("tables" if name == "table" else name))


def parse(arguments):
    """The words of a command line -> {option: value}, "command" and "debug" among them."""
    asked = arguments[0] if arguments else None
    # What follows -- is for the runs of a table.
    end = arguments.index("--") if asked == "table" and "--" in arguments else len(arguments)
    given = vars(command_line(asked).parse_args(arguments[:end]))
    return given | ({"changes": arguments[end + 1:]} if asked == "table" else {})


def main(arguments=None):
    """The command line -> its exit status: 0, 2 for what a user can mend, 130 when stopped."""
    given = parse(list(sys.argv[1:] if arguments is None else arguments))
    command, debug = given.pop("command"), given.pop("debug")
    # From here on Ctrl-C is an exception, and a run in progress finishes its step.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if command in ("fit", "distill"):
            fit(*configure(command, **given))
        elif command == "eval":
            evaluate_checkpoint(**given)
        else:
            return open_experiment(command).run(**given) or 0
        return 0
    except (Interrupted, KeyboardInterrupt) as stop:
        again = {"fit": "with --resume ", "distill": "with --resume ", "demo": "", "table": ""}
        onward = ""
        if command in again:
            onward = f"; the same command {again[command]}goes on from the last checkpoint"
        print((str(stop) or "stopped at once") + onward, file=sys.stderr)
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
