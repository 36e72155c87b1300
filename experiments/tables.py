"""The tables: a plan of runs, each a command of train.py, and what is read off their results.

    python train.py table toy                  runs what is missing, resumes what was cut off, rebuilds results/toy
    python train.py table toy --rebuild        only rebuilds tables and figures, from the JSON of the runs that are done
    python train.py table toy --shard 2/3      a third of the runs, for another machine: bring results/toy/runs together
                                               (and the folders of the teachers, where they do not come with the code)

A run leaves its checkpoints in a folder of its own under --work, and a small JSON, under its name, in RESULTS/runs.
Everything else in RESULTS is computed from those files. Tuning uses other images (split "tune") and other seeds than
any table; what it chose is read off its runs' JSON too (`chosen`).
"""
import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.special
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import data
import models
from experiments import bench, plots
import train
from checkpoints import set_aside, write_json, write_text
from clockdistill import CLoCKDistill
from experiments import look
from experiments.demo import shipped_teacher
from train import PRESETS

HERE = Path(__file__).resolve().parent.parent
TABLES = ("search", "main", "rivals", "ablation", "sensitivity", "schedule")
RIVALS = ("fitnets", "hinton", "fgd", "mgd", "gkd", "kd_detr", "detrdistill", "d3etr")
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")


# --------------------------------------------------------------------------------------------------------------- a plan

@dataclass(frozen=True)
class Job:
    """One run: what its command depends on."""
    scale: str                         # "toy" | "kitti" | "coco"
    detector: str
    role: str                          # "teacher" | "student"
    method: str | None = None          # of distillation
    options: tuple = ()                # its options, sorted (name, value) pairs
    seed: int = 0
    split: str = "val"                 # where AP is measured
    steps: float = 1.                  # as a multiple of the recipe's

    @property
    def name(self):
        """Folder and file name; the options as a short digest, they are spelt out in the JSON."""
        if self.role == "teacher":
            return f"{self.detector}-teacher"
        digest = hashlib.sha256(repr(self.options).encode()).hexdigest()[:6]
        what = f"{self.method}-{digest}" if self.method else "student"
        return (f"{self.detector}-{what}" + (f"-x{self.steps:.2g}" if self.steps != 1 else "")
                + (f"-{self.split}" if self.split != "val" else "") + f"-{self.seed}")


@dataclass(frozen=True)
class Row:
    """One line of a table: the same run with several seeds."""
    table: str
    detector: str
    label: str                         # in the table
    jobs: tuple


@dataclass(frozen=True)
class Scale:
    """How far a plan goes, and where its figures stand. Steps are multiples of the recipe's; the main table's are 1."""
    main_seeds: tuple
    seeds: tuple                       # of the other tables
    steps: float                       # of the other tables
    others: dict                       # the other tables' detectors
    tune_seeds: tuple                  # () = nothing is tuned: published weights
    tune_steps: dict                   # of each detector: where a third tells nothing, more
    arguments: tuple                   # of every run, which change no figure
    images: int                        # of the training split
    image_size: tuple                  # (height, width) where cost is told
    download: str


SCALES = {
    "toy": Scale((0, 1, 2, 3, 4), (0, 1, 2), 1 / 2,
                 {"search": ("dino", "deformable_detr"), "rivals": ("deformable_detr",),
                  "ablation": ("deformable_detr", "dino"), "sensitivity": ("deformable_detr",),
                  "schedule": ("deformable_detr",)}, (100,),
                 {"dino": 1 / 3, "deformable_detr": 1 / 3, "dab_detr": 1 / 2},
                 ("--eval-every", "400", "--eval-batch", "20", "--workers", "1"), 4000, (48, 160),
                 "nothing: the images are drawn on first use"),
    "kitti": Scale((0, 1, 2), (0,), 1, dict.fromkeys(TABLES[2:], ("dino",)), (), {}, ("--eval-every", "5000"), 5985,
                   (402, 1333),
                   "KITTI's left colour images (12 GB) and training labels (5 MB) from cvlibs.net/datasets/kitti, into "
                   "ROOT/training/image_2 and label_2; torchvision's ResNet weights come by themselves"),
    "coco": Scale((0,), (0,), 1, dict.fromkeys(TABLES[2:], ("dino",)), (), {}, ("--eval-every", "20000"), 118_287,
                  (800, 1333),
                  "COCO's train2017 (18 GB), val2017 (1 GB) and annotations (241 MB) from cocodataset.org, into "
                  "ROOT/train2017, val2017 and annotations; torchvision's ResNet weights come by themselves"),
}


def scaled(options, factors=(1, 4, 16, 64)):
    """Trials: all weights of a method together, in steps of four."""
    return [{name: value * factor for name, value in options.items()} for factor in factors]


def both_parts(lambda_mem, **switch):
    """CLoCKDistill's four trials: the memory's weight in steps of four, and the middle one beside lighter answers."""
    return [switch | {"lambda_mem": memory, "lambda_log": logits} for memory, logits in
            ((lambda_mem // 4, 0.5), (lambda_mem, 0.5), (lambda_mem * 4, 0.5), (lambda_mem, 0.1))]


# What is tuned, by the same budget of four trials for every method: how heavy it is. The lightest trials begin near
# detection's gradient (memory) or well below it (answers: heavy ones crowd detection out; `train.gradient_report`).
# CLoCKDistill has two such budgets, with the scale mask S and without: the better one is "clockdistill" (`tuning`).
TRIALS = {
    "with_scale": both_parts(5000),
    "without_scale": both_parts(960, scale=False),
    "fitnets": scaled({"weight": 8}),
    "hinton": scaled({"weight": 0.05}),
    "fgd": scaled({"alpha": 4e-3, "beta": 2e-3, "gamma": 4e-3, "lambda_global": 2e-5}),
    "mgd": scaled({"alpha": 1e-3}),
    "gkd": scaled({"alpha": 0.01, "beta": 5}),
    "kd_detr": [{"general": 24} | trial
                for trial in scaled({"cls_weight": 1 / 64, "l1_weight": 5 / 64, "giou_weight": 2 / 64})],
    "detrdistill": scaled({"logits": 1 / 16, "memory": 10 / 16, "prior": 1 / 16}),
    "d3etr": scaled({"adaptive": 1 / 16, "fixed": 1 / 16}),
}
# The memory part in pieces. Each piece's weight is tuned too: the masks change the size of the sum.
MEMORY = {
    "memory_plain": {"lambda_log": 0.0, "location": False, "scale": False},
    "memory_location": {"lambda_log": 0.0, "scale": False},
    "memory": {"lambda_log": 0.0},
}
TRIALS |= {
    "memory_plain": scaled({"lambda_mem": 15.625}),          # on the toy just FitNets, with its very weights
    "memory_location": scaled({"lambda_mem": 60}),
    "memory": scaled({"lambda_mem": 600}),
}
# Only DINO has label embeddings; the others are asked with a frozen random one, the same for both models.
LABEL = {"dino": "label", "deformable_detr": "random_label", "dab_detr": "random_label"}
# In which setting does the logit part earn its place? Alone, one change at a time from this one. DAB-DETR takes what
# won for Deformable DETR, which has no denoising queries either.
LOGITS = {"lambda_mem": 0.0, "lambda_log": 0.5, "content": "own", "box_noise": 0.4, "normalise": "confidence"}
SEARCH = [
    ("logit part alone", {}),
    ("lambda_log = 0.1", {"lambda_log": 0.1}),
    ("lambda_log = 2", {"lambda_log": 2.0}),
    ("content: label", {"content": LABEL}),
    ("content: label, noise 0.25", {"content": LABEL, "label_noise": 0.25}),
    ("content: frozen random", {"content": "random"}),
    ("content: zero", {"content": "zero"}),
    ("no box noise", {"box_noise": 0.0}),
    ("3 groups", {"groups": 3}),
    ("last layer only", {"layers": "last"}),
    ("divided by the number of queries", {"normalise": "queries"}),
    ("temperature 1", {"temperature": 1.0}),
    ("softmax over classes", {"classes": "softmax"}),
    ("and 24 random queries", {"random_queries": 24}),
    ("and the teacher's own queries", {"learned": True}),
]
# Around the chosen setting: {what: [(its value, change)]}; a function gets the chosen options.
SENSITIVITY = {
    "lambda_mem": [("/ 4", lambda o: {"lambda_mem": o["lambda_mem"] / 4}), ("chosen", lambda o: {}),
                   ("x 4", lambda o: {"lambda_mem": o["lambda_mem"] * 4})],
    "lambda_log": [("/ 4", lambda o: {"lambda_log": o["lambda_log"] / 4}), ("chosen", lambda o: {}),
                   ("x 4", lambda o: {"lambda_log": o["lambda_log"] * 4})],
    "alpha : beta": [("1 : 0", lambda o: {"beta": 0.0}), ("500 : 1", lambda o: {}),
                     ("5 : 1", lambda o: {"beta": 1e-5}),
                     ("1 : 1", lambda o: {"beta": 5e-5})],       # without S a plain copy of every token
    "temperature": [(f"{t}", lambda o, t=t: {"temperature": t}) for t in (1.0, 3.0, 10.0)],
}
PLACES = ("root", "teacher", "init_from")                    # settings that only say where a file lies


def pairs(options):
    return tuple(sorted(options.items()))


def changed(options, change):
    """What of a change to CLoCKDistill's options is one, so that the same run is not planned under two names."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(CLoCKDistill).parameters.items()}
    now = defaults | PRESETS[options.get("preset", "paper")] | options
    return {name: value for name, value in change.items() if now[name] != value}


def shard(text):
    """'2/3' -> (1, 3), for argparse."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"want I/N, 1/3 to 3/3, not {text}")
    return int(index) - 1, int(count)


def plan(scale, chosen, only=TABLES):
    """-> [Row] of every table of `only`. chosen(detector, what): the options that tuning found (`tuning`)."""
    scope, rows = SCALES[scale], []

    def detectors(table):
        if table not in only:
            return ()
        return models.DETECTORS if table == "main" else scope.others.get(table, ())

    def row(table, detector, label, seeds=scope.seeds, steps=scope.steps, **job):
        rows.append(Row(table, detector, label,
                        tuple(Job(scale, detector, seed=seed, steps=steps, **job) for seed in seeds)))

    def taught(table, detector, label, options, method="clockdistill", **job):
        row(table, detector, label, role="student", method=method, options=pairs(options), **job)

    def other_mask(table, detector, label, **job):
        """CLoCKDistill as tuned without S, or with S where the chosen one has none; no row where nothing is tuned."""
        if scope.tune_seeds:
            switch = "with" if chosen(detector, "clockdistill").get("scale") is False else "without"
            taught(table, detector, f"{label} {switch} the scale mask", chosen(detector, f"{switch}_scale"), **job)

    for detector in detectors("search"):
        tune = dict(seeds=scope.tune_seeds, split="tune", steps=scope.tune_steps[detector])
        row("search", detector, "student", role="student", **tune)
        for label, change in SEARCH:
            change = {key: LABEL[detector] if value is LABEL else value for key, value in change.items()}
            taught("search", detector, label, LOGITS | change, **tune)
    for detector in detectors("main"):
        main = dict(seeds=scope.main_seeds, steps=1)
        row("main", detector, "teacher", (0,), 1, role="teacher")
        row("main", detector, "student", role="student", **main)
        taught("main", detector, "clockdistill", chosen(detector, "clockdistill"), **main)
        if detector in scope.others["ablation"]:
            other_mask("main", detector, "clockdistill", **main)
    for detector in detectors("rivals"):
        row("rivals", detector, "student", role="student")
        for method in RIVALS:
            taught("rivals", detector, method, chosen(detector, method), method=method)
        best = chosen(detector, "clockdistill")
        taught("rivals", detector, "clockdistill", best)
        if fewer := changed(best, {"random_queries": 0}):            # the chosen ones have KD-DETR's beside them
            taught("rivals", detector, "clockdistill without random queries", best | fewer)
        other_mask("rivals", detector, "clockdistill")
    for index, detector in enumerate(detectors("ablation")):
        best = chosen(detector, "clockdistill")
        memory, logits = best | {"lambda_log": 0.0}, best | {"lambda_mem": 0.0}
        logits.pop("scale", None)                                    # of the memory part
        row("ablation", detector, "none", role="student")
        if index:                                  # a second detector shows what each part adds, not what it is made of
            taught("ablation", detector, "the memory part, as chosen", memory)
            taught("ablation", detector, "the logit part, as chosen", logits)
            taught("ablation", detector, "both parts: clockdistill", best)
            continue
        if scope.tune_seeds:                       # each mask changes the size of the sum: each row's weight is tuned
            for label, variant in (("memory, every token alike", "memory_plain"),
                                   ("+ location mask", "memory_location"), ("+ scale mask", "memory")):
                taught("ablation", detector, label, chosen(detector, variant))
        else:
            taught("ablation", detector, "the memory part, as chosen", memory)
        variants = {
            "logits on the teacher's learned queries": {"target": False, "learned": True, "random_queries": 0},
            "logits on random fixed queries": {"target": False, "random_queries": 24},
            "logits on target-aware queries alone": {"random_queries": 0},
            "the logit part, as chosen": {},
            "... with random queries": {"random_queries": 24},
            "... content: label": {"content": LABEL[detector]}, "... content: frozen random": {"content": "random"},
            "... 1 group": {"groups": 1}, "... 3 groups": {"groups": 3}, "... no box noise": {"box_noise": 0.0},
            "... no confidence weight": {"confidence": False, "normalise": "queries"}}
        for label, change in variants.items():
            now = changed(logits, change)
            if now or not change:                                    # else it is what was chosen, under another name
                taught("ablation", detector, label, logits | now)
        taught("ablation", detector, "both parts: clockdistill", best)
        other_mask("ablation", detector, "both parts,")
    for detector in detectors("sensitivity"):
        best = chosen(detector, "clockdistill")
        row("sensitivity", detector, "student", role="student")
        for what, changes in SENSITIVITY.items():
            for value, change in changes:
                taught("sensitivity", detector, f"{what} {value}", best | changed(best, change(best)))
    for detector in detectors("schedule"):
        for steps in dict.fromkeys((scope.steps, 1, 2)):
            row("schedule", detector, f"student, {steps:g} x the steps", role="student", steps=steps)
            taught("schedule", detector, f"distilled, {steps:g} x the steps", chosen(detector, "clockdistill"),
                   steps=steps)
    return rows


# -------------------------------------------------------------------------------------------------------------- running

class Site:
    """Where a table is made: its folders, and how its commands are read."""

    def __init__(self, scale, root, work, results, parse, build, measure=None, identify=None, reads=None, changes=(),
                 floor=None, teachers=None, device=torch.device("cpu"), machine=""):
        """parse: the arguments of train.py -> its settings, as plain values. build: settings -> the model, untrained.
        changes: further arguments of every run. floor: --teacher-floor of those with a teacher. teachers: {detector:
        file} of teachers that need no training, of which measure(file) tells the result, identify(file) the name of
        the weights, and reads(file) what `looks.reading` finds for each content of the queries. device: where images/s
        is measured, on the machine of that name."""
        self.scale, self.root, self.parse, self.build, self.changes = scale, root, parse, build, list(changes)
        self.identify = functools.cache(identify or (lambda file: None))
        self.work, self.results, self.teachers = Path(work), Path(results), teachers or {}
        self.measure, self.reads, self.measuring = measure, reads, threading.Lock()
        self.of_students = [] if floor is None else ["--teacher-floor", str(floor)]
        self.scope, self.device, self.machine = SCALES[scale], device, machine

    def model(self, job):
        return self.build(self.parse(self.arguments(job)))

    def defaults(self, detector):
        """The recipe's options of CLoCKDistill for this detector, in the form of `Job.options`."""
        command = ["distill", "--recipe", f"{self.scale}-student", "--detector", detector, "--teacher", "-"]
        return self.parse(command)["method_options"]

    def teacher(self, job):
        """The checkpoint that teaches this job's student."""
        shipped = self.teachers.get(job.detector)
        return os.path.relpath(shipped or self.work / Job(job.scale, job.detector, "teacher").name, HERE)

    def arguments(self, job):
        """Of train.py."""
        command = ["distill" if job.method else "fit", "--recipe", f"{job.scale}-{job.role}",
                   "--detector", job.detector, "--root", str(self.root), "--seed", str(job.seed),
                   "--val-split", job.split, *self.scope.arguments]
        if job.method:
            command += ["--teacher", self.teacher(job), "--method", job.method, *self.of_students]
        command += self.changes
        if job.steps != 1:
            settings = self.parse(command)
            command += (["--epochs", f"{settings['epochs'] * job.steps:g}"] if settings["steps"] is None else
                        ["--steps", str(round(settings["steps"] * job.steps))])
        if job.options:
            command += ["--method-options", *(f"{name}={value}" for name, value in job.options)]
        return command

    def result(self, job):
        """The JSON of a finished run, or None; also None, and said, when other settings or another teacher made it."""
        path = self.results / "runs" / f"{job.name}.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if job.role == "teacher" and job.detector in self.teachers:
            differ = [] if self.taught_by(job) == found["weights"] else ["weights"]
        else:
            wanted, taught_by = self.parse(self.arguments(job)), self.taught_by(job)
            differ = [key for key, value in found["settings"].items() if wanted.get(key) != value]
            differ += ["teacher"] if job.method and taught_by not in (None, found["taught_by"]) else []
        if differ:
            tqdm.write(f"{path} does not count, it was made with other settings ({', '.join(differ)})")
            return None
        return found

    def taught_by(self, job):
        """The name of the weights that teach this job's student; None when they are not there yet."""
        if job.detector in self.teachers:
            return self.identify(self.teachers[job.detector])
        teacher = self.results / "runs" / f"{Job(job.scale, job.detector, 'teacher').name}.json"
        return json.loads(teacher.read_text())["weights"] if teacher.exists() else None

    def run(self, job, threads):
        """Train, from where it was cut off, and file the result. Raises RuntimeError with the last line it said."""
        facts = {"name": job.name, "detector": job.detector, "role": job.role, "method": job.method,
                 "options": dict(job.options), "split": job.split}
        if job.role == "teacher" and job.detector in self.teachers:
            with self.measuring:                             # in this process, where FLOPs are counted by global hooks
                self.file(facts | self.measure(self.teachers[job.detector]))
            return
        folder = self.work / job.name
        set_aside(folder, self.parse(self.arguments(job)), self.taught_by(job) if job.method else None, tqdm.write)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "train.py"), *self.arguments(job), "--out", str(folder), "--resume"]
        with open(folder / "output.txt", "a") as output:
            code = subprocess.run(command, cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=output,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            lines = (folder / "output.txt").read_text().strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"{job.name}: {lines[-1]} ({folder}/output.txt; exit code {code})")
        facts["command"] = shlex.join("ROOT" if word == str(self.root) else word
                                      for word in ["train.py", *self.arguments(job)])
        self.file(facts | json.loads((folder / "result.json").read_text()))

    def file(self, result):
        """Keep a result where `result` finds it, without the places that only this machine has."""
        settings = {name: value for name, value in result["settings"].items() if name not in PLACES}
        (self.results / "runs").mkdir(parents=True, exist_ok=True)
        write_json(self.results / "runs" / f"{result['name']}.json", result | {"settings": settings})


def run_all(site, jobs, workers, shard, rebuild):
    """Run the jobs without a result, `workers` at a time -> {job: result or None}. A job that fails stops no other."""
    done = {job: site.result(job) for job in jobs}
    mine = [job for index, job in enumerate(jobs) if index % shard[1] == shard[0] and done[job] is None]
    if rebuild or not mine:
        return done
    threads, failed, spent = max(1, (os.cpu_count() or 1) // workers), [], {}
    for job, result in done.items():
        if result:
            spent.setdefault((job.detector, job.role, job.method), []).append(result["minutes"] / job.steps)

    def remaining(left):
        known = [minutes for times in spent.values() for minutes in times]
        if not known:
            return "?"
        guess = [np.mean(spent.get((job.detector, job.role, job.method), known)) * job.steps for job in left]
        return f"{sum(guess) / workers / 60:.1f} h"

    left, lock = list(mine), threading.Lock()
    with tqdm(total=len(mine), desc="runs", unit="run") as bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        bar.set_postfix_str(f"about {remaining(left)} to go")

        def one(job):
            tqdm.write(f"{time.strftime('%H:%M')}  {job.name}")
            try:
                site.run(job, threads)
            except (RuntimeError, OSError, ValueError) as error:
                failed.append(str(error))
            with lock:
                done[job] = site.result(job)
                left.remove(job)
                if done[job]:
                    spent.setdefault((job.detector, job.role, job.method), []).append(done[job]["minutes"] / job.steps)
                    tqdm.write(f"{time.strftime('%H:%M')}  {job.name}: AP {done[job]['AP']:.3f}")
                bar.update()
                bar.set_postfix_str(f"about {remaining(left)} to go")

        waiting = [pool.submit(one, job) for job in mine]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)        # the running ones were interrupted too, and saved
            raise
    for line in failed:
        tqdm.write(f"failed: {line}")
    return done


# ----------------------------------------------------------------------------------------------------- what came of it

def gain(scores, base):
    """Paired by seed: {"mean", "low", "high"} of the mean difference with its 95 % interval (Student's t).

    scores, base: {seed: AP}. Only seeds that both have count; with one the interval is not known (None).
    """
    difference = np.array([scores[seed] - base[seed] for seed in scores if seed in base])
    if not len(difference):
        return None
    mean = float(difference.mean())
    if len(difference) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = scipy.special.stdtrit(len(difference) - 1, 0.975) * difference.std(ddof=1) / math.sqrt(len(difference))
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def summarise(rows, done):
    """{table: [one dict a row]}, of the rows that have any result."""
    tables = {}
    for row in rows:
        results = {job.seed: done[job] for job in row.jobs if done.get(job)}
        if not results:
            continue
        base = {job.seed: done[job]["AP"] for job in plain_students(row) if done.get(job)}
        scores = {seed: result["AP"] for seed, result in results.items()}
        first = next(iter(results.values()))
        line = {"detector": row.detector, "method": row.label, "steps": row.jobs[0].steps,
                "seeds": list(results), "AP": list(scores.values()),
                **{name: [result[name] for result in results.values()] for name in SHOWN[1:]},
                "gain": gain(scores, base) if row.jobs[0].method else None,
                "options": first["options"], "params": first["params"], "gflops": first["gflops"],
                "minutes": [result["minutes"] for result in results.values()],
                "runs": [result["name"] for result in results.values()]}
        tables.setdefault(row.table, []).append(line)
    return tables


def plain_students(row):
    """The runs that this row's are compared with: the same, without a teacher."""
    return [dataclasses.replace(job, method=None, options=()) for job in row.jobs]


# -------------------------------------------------------------------------------------------------------------- writing

def spread(values, digits=3):
    """mean ± standard deviation over seeds."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def scores_of(line):
    """{seed: AP} of a row."""
    return dict(zip(line["seeds"], line["AP"]))


def interval(found):
    if found is None:
        return ""
    text = f"{found['mean']:+.3f}"
    return text + (f" ({found['low']:+.3f} to {found['high']:+.3f})" if found["low"] is not None else "")


TITLES = {
    "main": "Three detectors",
    "rivals": "Rivals",
    "ablation": "What each part does",
    "sensitivity": "How sensitive the gain is to the settings",
    "schedule": "A longer schedule: the ceiling or only the speed?",
    "search": "The search for each detector's settings (split `tune`, one seed: not results)",
}
# What a reader of the toy's page has to know; nothing is tuned elsewhere.
NOTES = {
    "rivals": "Each rival's weights are the best of four trials on the split `tune` (`tuning.json`). Not equal: "
              "CLoCKDistill's are the best of eight, four with the scale mask and four without, and its logit part has "
              "the settings that won in the search below. Last column: CLoCKDistill's AP minus the row's, paired by "
              "seed; the intervals are not corrected for there being several.",
    "ablation": "The pieces of the memory part are tuned like a rival, each alone. A row with ... is the logit part as "
                "chosen, alone, with that one change.",
}


def markdown(tables, speed, scale):
    """All tables as one page; the paired gain is against the same detector's student, with its 95 % interval."""
    text = [f"# {scale}: tables\n\nMade by `python train.py table {scale}` from the JSON files in `runs/`. AP mean ± "
            "standard deviation over seeds; gain: paired by seed against the same detector's student alone, with its "
            "95 % interval (Student's t).\n"]
    for name, lines in tables.items():
        text.append(f"\n## {TITLES[name]}\n" + (f"\n{NOTES[name]}\n" if scale == "toy" and name in NOTES else ""))
        if name == "main":
            text.append(f"images/s: one at a time, all interleaved; {speed['machine']}.\n")
            # The paper's own figures, for its own scales. Empty where they were not read, as yet everywhere.
            theirs = {} if scale == "toy" else {"AP in the paper": ""}
            columns = ["detector", "model", "AP", *theirs, "AP50", "AP75", "AP small / medium / large", "gain in AP",
                       "parameters", "GFLOPs", "images/s", "seeds"]
            text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for line in lines:
                sizes = " / ".join(spread(line[key], 2) for key in ("APs", "APm", "APl"))
                rate = speed.get(line["detector"], {}).get("teacher" if line["method"] == "teacher" else "student")
                cells = [line["detector"], line["method"], spread(line["AP"]), *theirs.values(), spread(line["AP50"]),
                         spread(line["AP75"]), sizes, interval(line["gain"]),
                         f"{line['params'] / 1e6:.2f} M", f"{line['gflops']:.3g}", f"{rate:.0f}" if rate else "",
                         str(len(line["seeds"]))]
                text.append(f"| {' | '.join(cells)} |")
        else:
            ours = {line["detector"]: scores_of(line) for line in lines if line["method"] == "clockdistill"}
            versus = name == "rivals"
            columns = ["detector", "run", "AP", "AP50", "gain in AP", *["clockdistill - this"] * versus, "minutes",
                       "seeds"]
            text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for line in lines:
                itself = line["method"] == "clockdistill"
                behind = None if itself else gain(ours.get(line["detector"], {}), scores_of(line))
                cells = [line["detector"], line["method"], spread(line["AP"]), spread(line["AP50"]),
                         interval(line["gain"]), *[interval(behind)] * versus, f"{np.mean(line['minutes']):.1f}",
                         str(len(line["seeds"]))]
                text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def learning_curves(lines, done_by_name):
    """{label: [(step, [AP of each seed])]} for plots.curves."""
    curves = {}
    for line in lines:
        points = {}
        for name in line["runs"]:
            for point in done_by_name[name]["history"]:
                points.setdefault(point["step"], []).append(point["AP"])
        curves[line["method"]] = sorted(points.items())
    return curves


def final_scores(lines, by_name):
    """{"student alone" or "distilled": [(steps of the run, [AP of each seed])]} of the table "schedule"."""
    ends = {}
    for line in lines:
        name = "distilled" if by_name[line["runs"][0]]["method"] else "student alone"
        ends.setdefault(name, []).append((by_name[line["runs"][0]]["steps"], line["AP"]))
    return {name: sorted(points) for name, points in ends.items()}


def draw(tables, done, read, folder):
    """The figures, each computed from the same rows as its table."""
    by_name = {result["name"]: result for result in done.values() if result}
    figures = {}
    for detector in models.DETECTORS:
        lines = [line for line in tables.get("main", []) if line["detector"] == detector]
        if len(lines) > 1:
            curves = learning_curves([line for line in lines if line["method"] in ("student", "clockdistill")], by_name)
            for line in lines:
                if line["method"] == "teacher":                  # its schedule is another: a level, not a curve
                    curves["teacher"] = line["AP"][0]
            figures[f"curves_{detector}"] = plots.curves(curves, "AP", f"{detector}: with and without a teacher")
        longer = [line for line in tables.get("schedule", []) if line["detector"] == detector]
        if longer:
            figures[f"schedule_{detector}"] = plots.curves(final_scores(longer, by_name), "AP",
                                                           f"{detector}: each point a finished run")
        varied = {line["method"]: line["AP"] for line in tables.get("sensitivity", []) if line["detector"] == detector}
        panels = {what: [(value, varied[f"{what} {value}"]) for value, _ in changes if f"{what} {value}" in varied]
                  for what, changes in SENSITIVITY.items()}
        if any(panels.values()):
            figures[f"sensitivity_{detector}"] = plots.sensitivity(panels, varied.get("student", ()), f"{detector}: AP "
                                                                   "of the distilled student, one setting at a time")
    for name in ("main", "rivals", "ablation"):
        gains = [(line["detector"], line["method"], line["gain"]) for line in tables.get(name, []) if line["gain"]]
        if gains:
            figures[f"gains_{name}"] = plots.gains(gains, TITLES[name])
    if read:
        figures["reading"] = plots.reading(read)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def images_per_second(rows, site):
    """{"machine": ..., detector: {role: images/s}} of the models of the main table.

    Speed does not depend on the weights: the models are built anew, and measured when no run is beside them.
    """
    jobs = {(row.detector, row.jobs[0].role): row.jobs[0] for row in rows if row.table == "main"}
    networks = {key: site.model(job).to(site.device) for key, job in jobs.items()}
    rates = bench.images_per_second(networks, torch.zeros(1, 3, *site.scope.image_size, device=site.device))
    speed = {"machine": site.machine}
    for (detector, role), rate in rates.items():
        speed.setdefault(detector, {})[role] = rate
    return speed


# ------------------------------------------------------------------------------------------------------------ a dry run

class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass, each storage once, parameters apart. Works on fake tensors."""

    def __init__(self, parameters):
        self.seen = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.kept, self.bytes = [], 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(storage)                        # alive, so that no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


def training_bytes(model, batch, height, width):
    """Estimated peak of a training step: weights, gradients, Adam's two averages, and what the forward pass keeps."""
    parameters = list(model.parameters())
    hooks = SavedBytes([*parameters, *model.buffers()])
    with FakeTensorMode(allow_non_fake_inputs=True), hooks:
        images = torch.zeros(batch, 3, height, width)
        model.train()(images, torch.zeros_like(images[:, 0], dtype=torch.bool))
    return 16 * sum(p.numel() for p in parameters) + hooks.bytes


def dry_run(site, jobs, tflops):
    """Print every run with its command, and what it would take."""
    sizes, total = {}, 0.
    print(f"To download: {site.scope.download}.\n")
    for job in jobs:
        settings = site.parse(site.arguments(job))
        key = job.detector, job.role
        if key not in sizes:
            model = site.model(job)
            sizes[key] = (models.gflops(model, *site.scope.image_size),
                          training_bytes(model, settings["batch_size"], *site.scope.image_size),
                          4 * sum(p.numel() for p in model.parameters()))
        forward, memory, _ = sizes[key]
        images = settings["epochs"] * site.scope.images
        if settings["steps"]:
            images = settings["steps"] * settings["batch_size"]
        teacher, _, frozen = sizes.get((job.detector, "teacher"), (0, 0, 0)) if job.method else (0, 0, 0)
        memory += frozen
        hours = images * (3 * forward + teacher) * 2e9 / (tflops * 1e12) / 3600
        total += hours
        print(f"{job.name}: about {hours:.1f} GPU-hours, {memory / 1e9:.1f} GB\n"
              f"  python {shlex.join(['train.py', *site.arguments(job)])}")
    height, width = site.scope.image_size
    print(f"\n{len(jobs)} runs, {total:.0f} GPU-hours at {tflops:g} TFLOP/s of useful work (--tflops: the peak times "
          "what training reaches of it, a fifth to a third), a step being three forward passes and one of the teacher. "
          "Memory: weights (also the teacher's), gradients, Adam and saved activations in fp32 at "
          f"{height} x {width}.")


# --------------------------------------------------------------------------------------------------------------- tuning

def tuning(site, only=TABLES):
    """-> ([Job], chosen, done): every trial that the tables of `only` need, and chosen(detector, what) -> the options
    of the best one in done {job: result}, or of the first when none has run. Where nothing is tuned, what recipe and
    methods say."""
    scope, done, asked = site.scope, {}, {}

    def trials(detector, what):
        if not scope.tune_seeds:
            return [site.defaults(detector) if what == "clockdistill" else MEMORY.get(what, {})]
        if what == "clockdistill":
            return trials(detector, "with_scale") + trials(detector, "without_scale")
        base = MEMORY.get(what, {})
        if what in ("with_scale", "without_scale"):
            base = {name: value for name, value in site.defaults(detector).items() if name != "scale"}
        return [base | trial for trial in TRIALS[what]]

    def jobs(detector, what):
        method = what if what in RIVALS else "clockdistill"
        return [Job(site.scale, detector, "student", method, pairs(options), seed, "tune",
                    scope.tune_steps[detector])
                for options in trials(detector, what) for seed in scope.tune_seeds]

    def chosen(detector, what):
        asked[detector, what] = jobs(detector, what)
        scores = [done[job]["AP"] if done.get(job) else -math.inf for job in asked[detector, what]]
        means = np.reshape(scores, (-1, max(1, len(scope.tune_seeds)))).mean(1)
        return trials(detector, what)[int(means.argmax()) if len(means) else 0]

    plan(site.scale, chosen, only)                               # to hear what it asks for
    return list(dict.fromkeys(job for some in asked.values() for job in some)), chosen, done


def make(site, only, workers, shard, rebuild, dry, tflops):
    """The command `table`: teachers, tuning, tables; what other shards still have to do stops it in between."""
    trials, chosen, tuned = tuning(site, only)
    needed = {job.detector for job in trials} | {row.detector for row in plan(site.scale, chosen, only)}
    teachers = [Job(site.scale, detector, "teacher") for detector in models.DETECTORS if detector in needed]
    if dry:
        tuned.update({job: site.result(job) for job in trials})
        rows = plan(site.scale, chosen, only)
        dry_run(site, list(dict.fromkeys([*teachers, *trials, *(job for row in rows for job in row.jobs)])), tflops)
        return 0
    for jobs, what in ((teachers, "teachers"), (trials, "tuning runs")):
        done = run_all(site, jobs, workers, shard, rebuild)
        tuned.update(done)
        missing = [job.name for job in jobs if done[job] is None]
        if missing and not rebuild:
            raise ValueError(f"{len(missing)} {what} have no result yet ({missing[0]}, ...): failed, or another "
                             f"shard's; bring their JSON files to {site.results}/runs (of teachers also their folders "
                             f"to {site.work}) and repeat the command")
    rows = plan(site.scale, chosen, only)
    jobs = dict.fromkeys(job for row in rows for job in (*row.jobs, *plain_students(row)))
    jobs = sorted(jobs, key=lambda job: job.seed)                # cut off early, every row has some of its seeds
    done = run_all(site, jobs, workers, shard, rebuild)
    write(site)
    return int(any(done[job] is None for job in jobs) and not rebuild)


def write(site):
    """tables.json, tables.md and the figures of all tables, from the results that there are."""
    site.results.mkdir(parents=True, exist_ok=True)
    trials, chosen, done = tuning(site)
    done.update({job: site.result(job) for job in trials})
    if absent := [job.name for job in trials if done[job] is None]:
        print(f"{len(absent)} of all tables' {len(trials)} tuning runs have no result ({absent[0]}, ...): their rows "
              "take the best of the others, or the first trial")
    rows = plan(site.scale, chosen)
    done.update({job: site.result(job) for row in rows for job in (*row.jobs, *plain_students(row)) if job not in done})
    tables = summarise(rows, done)
    tried = [{"detector": job.detector, "method": job.method, "options": dict(job.options), "seed": job.seed,
              "AP": done[job]["AP"]} for job in trials if done[job]]

    def kept(name, compute):
        """What takes a minute to measure is measured once: to measure it again, delete the file."""
        file = site.results / f"{name}.json"
        if not file.exists():
            write_json(file, compute())
        return json.loads(file.read_text())

    speed = kept("speed", lambda: images_per_second(rows, site))
    read = kept("reading", lambda: {name: site.reads(path) for name, path in site.teachers.items()})
    write_json(site.results / "tables.json", tables)
    write_json(site.results / "tuning.json", tried)
    write_text(site.results / "tables.md", markdown(tables, speed, site.scale))
    draw(tables, done, read, site.results)
    print(f"{sum(map(len, tables.values()))} rows: {site.results}/tables.md, tables.json, tuning.json and figures")


def settings_of(arguments):
    """The arguments of a `fit` or `distill` -> its settings, as plain values."""
    given = train.parse(arguments)
    command, _ = given.pop("command"), given.pop("debug")
    return train.plain(train.configure(command, **given)[0])


def what_is_read(path, root):
    """{content of the target-aware queries: look.reading} of a toy teacher, on 200 images of the split "tune"."""
    teacher, _ = train.load_model(path)
    batches = list(data.eval_loader(data.build("toy", root, "tune", limit=200), 20))
    found = {}
    for content, noise in (("label", 0.), ("label", .25), ("random_label", 0.), ("own", 0.), ("random", 0.),
                           ("zero", 0.)):
        method = CLoCKDistill(*[teacher.config["hidden_dim"]] * 2, content=content, label_noise=noise, box_noise=0.4,
                              num_classes=teacher.num_classes)
        embedding = {"label": teacher.label_embedding, "own": teacher.learned_content}.get(content)
        if embedding is not None or content.startswith(("random", "zero")):
            name = content + (f", noise {noise}" if noise else "")
            found[name] = look.reading(teacher, method, embedding, batches)
    return found


def add_options(parser):
    """The options of `train.py table`."""
    parser.epilog = ("Options of fit and distill after -- go to every run, and the figures elsewhere:\n"
                     "  python train.py table kitti --root DIR -- --steps 100 --size 160,540")
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--root", help="folder of the data (toy: datasets/toy)")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="these tables")
    parser.add_argument("--dry-run", action="store_true",
                        help="print every run's command and cost, and what to download")
    parser.add_argument("--rebuild", action="store_true", help="no runs: tables and figures from the results there are")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th run from the I-th")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one a CPU core, one in all on a GPU)")
    parser.add_argument("--teachers", choices=("shipped", "scratch"), default="shipped", help="of the toy")
    parser.add_argument("--work", help="folder of the runs' folders (default: runs/table-SCALE)")
    parser.add_argument("--results", help="folder of the results (default: results/SCALE)")
    parser.add_argument("--tflops", type=float, default=20., help="dry run: useful work a second (default: %(default)s)")
    parser.add_argument("--teacher-floor", type=float, help="as of distill; 0 for runs too short to make a teacher")


def run(scale, root, work, results, only, jobs, shard, rebuild, dry_run, tflops, teachers, teacher_floor, changes):
    """The command `table`."""
    def build(settings):
        classes = 80 if scale == "coco" else 3
        overrides = {name: settings[name] for name in models.described_options() if settings[name] is not None}
        frozen = overrides.pop("pretrained_backbone", "imagenet") != "none"      # the same model, nothing downloaded
        return models.build(settings["detector"], classes, pretrained_backbone=False, frozen_backbone=frozen,
                            **overrides)

    shipped = {name: path for name, path in train.SHIPPED_TEACHERS.items() if path.exists()}
    if scale != "toy" or teachers == "scratch" or changes:
        shipped = {}
    root = root or ("datasets/toy" if scale == "toy" else None)
    if root is None and not dry_run:
        raise ValueError(f"table {scale} needs --root, the folder of the data ({SCALES[scale].download})")
    results = results or (f"runs/table-{scale}-changed/results" if changes else f"results/{scale}")
    work = work or (f"runs/table-{scale}-changed" if changes else f"runs/table-{scale}")
    root, work = (path and str(Path(path).resolve()) for path in (root, work))    # the runs start where this file lies
    device = train.pick_device()
    if jobs is None:
        jobs = 1 if device.type != "cpu" else os.cpu_count() or 1
    if scale == "toy" and not (rebuild or dry_run):
        data.make_toy(root)                                  # before several runs would draw it at once
    site = Site(scale, root or "ROOT", work, results, settings_of, build, changes=changes, floor=teacher_floor,
                       teachers=shipped, measure=lambda path: shipped_teacher(path, root, device),
                       identify=lambda path: train.fingerprint(train.load_model(path)[0]),
                       reads=lambda path: what_is_read(path, root), device=device, machine=train.machine(device))
    return make(site, only, jobs, shard, rebuild, dry_run, tflops)
