"""The tables: a plan of runs, each a command of train.py, and the pages made from their results.

    python train.py table toy              runs what is missing, resumes what was cut off, then:
    python train.py table toy --rebuild    writes the pages, from the results there are
    python train.py table toy --shard 2/3  a third of the runs, for another machine: afterwards
                                           bring the files of results/toy/runs together

A run keeps its checkpoints in a folder under --work, and one small JSON in RESULTS/runs. Both have
the run's name, which holds a digest of its settings and of its teacher's weights: a run of other
settings has another name. Everything else in RESULTS is computed from these files:

    chosen.json                          what tuning chose; the tables read it
    tuning.json                          every trial
    tables.json, tables.md, *.png        the tables
    speed.json, reading.json             measured once; delete a file to measure it again
"""
import argparse
import dataclasses
import functools
import math
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.special
import torch
from tqdm import tqdm

import data
import models
import train
from checkpoints import read_json, write_json, write_text
from clockdistill import CLoCKDistill
from experiments import bench, demo, look, plots
from experiments.baselines import BASELINES
from experiments.cache import EncodeOnce
from train import HERE, PRESETS

RIVALS = tuple(BASELINES)
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")


# ----------------------------------------------------------------------------------------------
# The plan: every row of every table
# ----------------------------------------------------------------------------------------------

# Which detectors have a row, by letter: a row of the plan with "AK" is made for Deformable DETR on
# the toy and for DINO on small KITTI. Data of a new kind adds its own letters to the rows it wants.
TOY = {"A": "deformable_detr", "B": "dino", "C": "dab_detr"}
PAPER = {"D": "dino", "E": "deformable_detr", "F": "dab_detr"}
SMALL = {"K": "dino", "L": "deformable_detr", "M": "dab_detr"}

# A row: (detectors, label, whose options it has), and what differs from them, if anything does.
# "student" and "teacher" are trained without a teacher; a method, or a piece of ours, has the
# options that tuning chose for it. In what differs, a function changes the chosen value, "steps" is
# the length of the runs as a multiple of the recipe's, and "balance" the wanted ratios of gradients
# (`--balance`). A row whose change changes nothing is left out.
QUARTER, FOUR_TIMES = (lambda value: value / 4), (lambda value: value * 4)


def times(part, factor):
    """A change of the wanted ratios: this part's times `factor`."""
    return {"balance": lambda ratios: ratios | {part: ratios[part] * factor}}


PLAN = {
    # Where does the logit part earn its place? Alone, one change at a time. It made train.PRESETS.
    "search": [
        ("BA", "student", "student"),
        ("BA", "logit part alone", "search"),
        ("BA", "lambda_log = 0.1", "search", {"lambda_log": 0.1}),
        ("BA", "lambda_log = 2", "search", {"lambda_log": 2.0}),
        ("BA", "content: label", "search", {"content": "label"}),
        ("BA", "content: label, noise 0.25", "search", {"content": "label", "label_noise": 0.25}),
        ("BA", "content: frozen random", "search", {"content": "random"}),
        ("BA", "content: zero", "search", {"content": "zero"}),
        ("BA", "no box noise", "search", {"box_noise": 0.0}),
        ("BA", "3 groups", "search", {"groups": 3}),
        ("BA", "last layer only", "search", {"layers": "last"}),
        ("BA", "divided by the number of queries", "search", {"normalise": "queries"}),
        ("BA", "temperature 1", "search", {"temperature": 1.0}),
        ("BA", "softmax over classes", "search", {"classes": "softmax_of_sigmoid"}),
        ("BA", "and 24 random queries", "search", {"random_queries": 24}),
        ("BA", "and the teacher's own queries", "search", {"learned": True}),
    ],
    "main": [
        ("CABFEDKLM", "teacher", "teacher"),
        ("CABFEDKLM", "student", "student"),
        ("CABFEDKLM", "clockdistill", "clockdistill"),
        ("AB", "clockdistill with the scale mask", "with_scale"),
        ("AB", "clockdistill without the scale mask", "without_scale"),
    ],
    "rivals": [
        ("ADK", "student", "student"),
        *(("ADK" if method in ("fitnets", "fgd", "mgd", "kd_detr") else "AD", method, method)
          for method in RIVALS),
        ("ADK", "clockdistill", "clockdistill"),
        ("AD", "clockdistill without random queries", "clockdistill", {"random_queries": 0}),
        ("A", "clockdistill with the scale mask", "with_scale"),
        ("A", "clockdistill without the scale mask", "without_scale"),
    ],
    # The toy's second detector shows what each part adds, not what the parts are made of.
    "ablation": [
        ("ABDKL", "none", "student"),
        ("A", "memory, every token alike", "memory_plain"),
        ("A", "+ location mask", "memory_location"),
        ("A", "+ scale mask", "memory"),
        ("BDKL", "the memory part, as chosen", "memory_part"),
        ("AD", "logits on the teacher's learned queries", "logit_part",
         {"target": False, "learned": True, "random_queries": 0}),
        ("AD", "logits on random fixed queries", "logit_part",
         {"target": False, "random_queries": 24}),
        ("AD", "logits on target-aware queries alone", "logit_part", {"random_queries": 0}),
        ("ABDKL", "the logit part, as chosen", "logit_part"),
        ("AD", "... with random queries", "logit_part", {"random_queries": 24}),
        ("AD", "... content: label", "logit_part", {"content": "label"}),
        ("AD", "... content: frozen random", "logit_part", {"content": "random"}),
        ("AD", "... 1 group", "logit_part", {"groups": 1}),
        ("AD", "... 3 groups", "logit_part", {"groups": 3}),
        ("AD", "... no box noise", "logit_part", {"box_noise": 0.0}),
        ("AD", "... no confidence weight", "logit_part",
         {"confidence": False, "normalise": "queries"}),
        ("ABDKL", "both parts: clockdistill", "clockdistill"),
        ("A", "both parts: clockdistill with the scale mask", "with_scale"),
        ("A", "both parts: clockdistill without the scale mask", "without_scale"),
    ],
    # A mask taken away changes the size of the sum; `--balance` makes its first gradients as large.
    "masks": [
        ("K", "none", "student"),
        ("K", "every token alike", "clockdistill", {"location": False, "scale": False}),
        ("K", "+ location mask", "clockdistill", {"scale": False}),
        ("K", "+ scale mask: clockdistill", "clockdistill"),
    ],
    # Labels begin with one of PANELS, the settings that are drawn.
    "sensitivity": [
        ("AD", "student", "student"),
        ("A", "lambda_mem / 4", "clockdistill", {"lambda_mem": QUARTER}),
        ("D", "lambda_mem / 4", "clockdistill", times("memory", 1 / 4)),
        ("AD", "lambda_mem chosen", "clockdistill"),
        ("A", "lambda_mem x 4", "clockdistill", {"lambda_mem": FOUR_TIMES}),
        ("D", "lambda_mem x 4", "clockdistill", times("memory", 4)),
        ("A", "lambda_log / 4", "clockdistill", {"lambda_log": QUARTER}),
        ("D", "lambda_log / 4", "clockdistill", times("cls+l1+giou", 1 / 4)),
        ("AD", "lambda_log chosen", "clockdistill"),
        ("A", "lambda_log x 4", "clockdistill", {"lambda_log": FOUR_TIMES}),
        ("D", "lambda_log x 4", "clockdistill", times("cls+l1+giou", 4)),
        ("AD", "alpha : beta 1 : 0", "clockdistill", {"beta": 0.0}),
        ("AD", "alpha : beta 500 : 1", "clockdistill"),
        ("AD", "alpha : beta 5 : 1", "clockdistill", {"beta": 1e-5}),
        # Without the scale mask this is a plain copy of every token.
        ("AD", "alpha : beta 1 : 1", "clockdistill", {"beta": 5e-5}),
        ("AD", "temperature 1.0", "clockdistill", {"temperature": 1.0}),
        ("AD", "temperature 3.0", "clockdistill", {"temperature": 3.0}),
        ("AD", "temperature 10.0", "clockdistill"),
    ],
    "schedule": [
        ("A", "student, 0.5 x the steps", "student", {"steps": 0.5}),
        ("A", "distilled, 0.5 x the steps", "clockdistill", {"steps": 0.5}),
        ("ADK", "student, 1 x the steps", "student", {"steps": 1}),
        ("ADK", "distilled, 1 x the steps", "clockdistill", {"steps": 1}),
        ("ADK", "student, 2 x the steps", "student", {"steps": 2}),
        ("ADK", "distilled, 2 x the steps", "clockdistill", {"steps": 2}),
    ],
}
TABLES = tuple(PLAN)
PANELS = ("lambda_mem", "lambda_log", "alpha : beta", "temperature")

# The setting that the search changes. DAB-DETR takes what won for Deformable DETR, which has no
# denoising queries either.
SEARCHED = {"lambda_mem": 0.0, "lambda_log": 0.5, "content": "own", "box_noise": 0.4,
            "normalise": "confidence"}


def scaled(options, factors=(1, 4, 16, 64)):
    """Trials: all weights of a method together, in steps of four."""
    return [{name: value * factor for name, value in options.items()} for factor in factors]


def both_parts(light, middle, heavy):
    """CLoCKDistill's trials: three weights of the memory, the middle one with light answers too."""
    return [{"lambda_mem": memory, "lambda_log": logits} for memory, logits in
            ((light, 0.5), (middle, 0.5), (heavy, 0.5), (middle, 0.1))]


# What is tuned on the toy, with four trials for every method: how heavy it is. The lightest trials
# begin near detection's gradient (memory) or well below it (answers: heavy ones crowd detection
# out; `train.gradient_report`). {what: (options of every trial, what differs)}. CLoCKDistill's have
# the detector's preset too; the best of its eight, with or without the scale mask, is
# "clockdistill".
HALVES = ("with_scale", "without_scale")
TRIALS = {
    "with_scale": ({}, both_parts(1250, 5000, 20000)),
    "without_scale": ({"scale": False}, both_parts(240, 960, 3840)),
    "fitnets": ({}, scaled({"weight": 8})),
    "hinton": ({}, scaled({"weight": 0.05})),
    "fgd": ({}, scaled({"alpha": 4e-3, "beta": 2e-3, "gamma": 4e-3, "lambda_global": 2e-5})),
    "mgd": ({}, scaled({"alpha": 1e-3})),
    "gkd": ({}, scaled({"alpha": 0.01, "beta": 5})),
    "kd_detr": ({"general": 24}, scaled({"cls_weight": 1 / 64, "l1_weight": 5 / 64,
                                         "giou_weight": 2 / 64})),
    "detrdistill": ({}, scaled({"logits": 1 / 16, "memory": 10 / 16, "prior": 1 / 16})),
    "d3etr": ({}, scaled({"adaptive": 1 / 16, "fixed": 1 / 16})),
    # The pieces of the memory part: a mask changes the size of the sum, so each is tuned. On the
    # toy the first is just FitNets, with its very weights.
    "memory_plain": ({"lambda_log": 0.0, "location": False, "scale": False},
                     scaled({"lambda_mem": 15.625})),
    "memory_location": ({"lambda_log": 0.0, "scale": False}, scaled({"lambda_mem": 60})),
    "memory": ({"lambda_log": 0.0}, scaled({"lambda_mem": 600})),
}


# On real images every method is weighed by the ratios of its gradients (clockdistill.Balance): 50
# for what copies memory, 1 for what copies answers. These are untuned, for the tables that have no
# trials.
COPIES, ANSWERS = {"memory": 50.}, {"cls+l1+giou": 1.}
RATIOS = {
    "clockdistill": train.RATIOS, "fitnets": COPIES, "mgd": COPIES, "kd_detr": ANSWERS,
    "fgd": {"objects+background+attention+relation": 50.}, "gkd": {"memory+maps": 50.},
    "hinton": {"cls": 1.}, "d3etr": {"cls+l1+giou+self+cross": 1.},
    "detrdistill": COPIES | {"cls+l1+giou+prior_cls+prior_l1+prior_giou": 1.},
}


def balanced(method, **options):
    """(options of every trial, what differs): four weights of all parts together, by fours."""
    ratios = scaled(RATIOS[method], (1 / 16, 1 / 4, 1, 4))
    return options, [{"balance": wanted} for wanted in ratios]


BALANCED_TRIALS = {name: balanced(name) for name in ("clockdistill", "fitnets", "fgd", "mgd")}
BALANCED_TRIALS["kd_detr"] = balanced("kd_detr", general=60)


@dataclass(frozen=True)
class Scale:
    """How far the plan goes on one kind of data. Steps are multiples of the recipe's."""
    recipe: str                        # prefix of train.RECIPES
    detectors: dict                    # {letter of the plan: detector}
    seeds: tuple
    steps: float                       # of all tables but the main one, which has 1
    images: int                        # of the training split
    image_size: tuple                  # (height, width) where costs are estimated
    options: dict                      # of every run's command
    download: str
    trials: dict = field(default_factory=dict)           # what is tuned, as TRIALS; {}: nothing
    tune_seeds: tuple = ()
    tune_steps: dict = field(default_factory=dict)       # of each detector
    splits: dict = field(default_factory=dict)           # {"val" or "tune": its file}
    seeds_of: dict = field(default_factory=dict)         # {table: seeds}, where it has others
    teachers: str = ""                                   # weights/TEACHERS_DETECTOR.safetensors
    results: str = ""                                    # its folder in results/, if not its name
    machine: str = "GPU"                                 # what it is for, one of bench.TFLOPS
    most_objects: int = 0                                # of an image, for train.fit_to_data


SCALES = {
    "toy": Scale(
        "toy", TOY, seeds=(0, 1, 2), seeds_of={"main": (0, 1, 2, 3, 4)}, steps=1 / 2, images=4000,
        image_size=(48, 160), teachers="toy_teacher", machine="core",
        options={"eval_every": 400, "eval_batch": 20, "workers": 1},
        download="nothing: the images are drawn on first use", trials=TRIALS, tune_seeds=(100,),
        # After a third of the steps DAB-DETR's AP is still near 0.
        tune_steps={"dino": 1 / 3, "deformable_detr": 1 / 3, "dab_detr": 1 / 2}),
    # results/kitti/PLAN.md says why these rows, seeds and trials. Nothing is evaluated on `val`
    # before the end of a run.
    "kitti-small": Scale(
        "small", SMALL, seeds=(0, 1, 2), steps=1, images=703, image_size=(128, 424),
        seeds_of=dict.fromkeys(("main", "ablation", "masks"), (0, 1, 2, 3, 4)),
        teachers="kitti_teacher", results="kitti", machine="core", most_objects=22,
        options={"train_split": "splits/kitti_cyclists_train.txt", "eval_every": 0,
                 "eval_batch": 10, "workers": 1, "teacher_cache": 2.0},
        splits={name: f"splits/kitti_cyclists_{name}.txt" for name in ("tune", "val")},
        trials=BALANCED_TRIALS, tune_seeds=(100,),
        tune_steps={"dino": 1 / 4, "deformable_detr": 1 / 4, "dab_detr": 1 / 4},
        download="the backbones' weights (make kitti-backbones); KITTI's left colour images and "
                 "training labels as for the table kitti, of which it reads the 991 frames of "
                 "splits/kitti_cyclists_*.txt"),
    "kitti": Scale(
        "kitti", PAPER, seeds=(0,), seeds_of={"main": (0, 1, 2)}, steps=1, images=5985,
        results="kitti-full",
        image_size=(402, 1333), options={"eval_every": 5000},
        download="KITTI's left colour images (12 GB) and training labels (5 MB) from "
                 "cvlibs.net/datasets/kitti, into ROOT/training/image_2 and label_2; torchvision's "
                 "ResNet weights come by themselves"),
    "coco": Scale(
        "coco", PAPER, seeds=(0,), steps=1, images=118_287,
        image_size=(800, 1333), options={"eval_every": 20000},
        download="COCO's train2017 (18 GB), val2017 (1 GB) and annotations (241 MB) from "
                 "cocodataset.org, into ROOT/train2017, val2017 and annotations; torchvision's "
                 "ResNet weights come by themselves"),
}


# ----------------------------------------------------------------------------------------------
# From rows to runs
# ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Study:
    """One set of tables: where its files lie, what goes to every run, and the results so far."""
    scale: str
    root: str                          # folder of the data
    work: Path                         # folder of the runs' folders
    results: Path
    shipped: dict                      # {detector: file} of teachers that need no training
    changes: dict = field(default_factory=dict)          # further options of every run
    of_students: dict = field(default_factory=dict)      # and of every run with a teacher
    done: dict = field(default_factory=dict)             # {name of a run: its result}

    @property
    def scope(self):
        return SCALES[self.scale]


@dataclass(frozen=True)
class Job:
    """One run. Two jobs of one name are the same run."""
    name: str
    role: str = field(compare=False)                   # "teacher" | "student"
    steps: float = field(compare=False)                # as a multiple of the recipe's
    arguments: tuple = field(compare=False)            # of train.py; () of a shipped teacher
    cfg: train.Config = field(compare=False)


@dataclass(frozen=True)
class Line:
    """One row of a table for one detector: the same run with several seeds."""
    table: str
    detector: str
    label: str
    jobs: tuple
    alone: tuple = ()                  # the same students without a teacher, its baseline


@functools.cache
def shipped_weights(file):
    """The fingerprint of a teacher that comes with the repository."""
    return train.fingerprint(train.load_model(file)[0])


def make_job(study, detector, role, method=None, options=None, seed=0, steps=1, split="val"):
    """The run of these settings, with its name and its command."""
    scope, command, taught_by = study.scope, "fit", None
    # Later entries win, as on a command line: the recipe, then the scale, then the user.
    given = {"recipe": f"{scope.recipe}-{role}", "detector": detector, "root": study.root,
             "seed": seed, "val_split": scope.splits.get(split, split), **scope.options}
    if method:
        command = "distill"
        file, taught_by = teacher_of(study, detector)
        given |= {"teacher": file, "method": method, **study.of_students}
    given |= study.changes
    if split != "val":              # tuning never sees the images of the tables
        given["val_split"] = scope.splits.get(split, split)

    # The length is a multiple of what the changes say.
    if steps != 1:
        cfg, _ = train.configure(command, **given)
        if cfg.steps is None:
            given["epochs"] = cfg.epochs * steps
        else:
            given["steps"] = round(cfg.steps * steps)
    options = dict(options or {})
    for name, values in (("balance", options.pop("balance", {})), ("method_options", options)):
        if values:
            given[name] = [f"{option}={value}" for option, value in sorted(values.items())]
    cfg, _ = train.configure(command, **given)

    # The seeds of a row share their digest. A teacher that is not trained here is its weights, and
    # nothing has to run.
    words = (command, *demo.as_words(given))
    name = f"{detector}-{method or role}"
    if steps != 1:
        name += f"-x{steps:.2g}"
    if split != "val":
        name += f"-{split}"
    if role == "teacher" and detector in study.shipped:
        name += f"-{shipped_weights(study.shipped[detector])[:8]}"
        words = ()
    else:
        name += f"-{train.digest(dataclasses.replace(cfg, seed=0), taught_by)}-{seed}"
    return Job(name, role, steps, words, cfg)


def options_of(cfg):
    """The options of a run's method, the ratios of its gradients among them."""
    return cfg.method_options | ({"balance": cfg.balance} if cfg.balance else {})


def teacher_of(study, detector):
    """-> (file or folder of a detector's teacher, its fingerprint or None before training)."""
    if file := study.shipped.get(detector):
        return os.path.relpath(file, HERE), shipped_weights(file)
    name = make_job(study, detector, "teacher").name
    return os.path.relpath(study.work / name, HERE), study.done.get(name, {}).get("weights")


def choices(study, detector):
    """The options of every method and piece that a row can name -> {what: options}.

    What tuning chose; otherwise the recipe's CLoCKDistill, and the rivals' defaults.
    """
    recipe = train.RECIPES[f"{study.scope.recipe}-student"][detector]
    options = {"search": SEARCHED} | dict.fromkeys(RIVALS, {})
    # Where the recipe is weighed by ratios, so is everything.
    if "balance" in recipe:
        options |= {what: {"balance": ratios} for what, ratios in RATIOS.items()}
    options["clockdistill"] = recipe["method_options"] | options.get("clockdistill", {})
    options |= read_chosen(study).get(detector, {})
    best = options["clockdistill"]
    # With or without the scale mask: the half that was chosen has a row of its own already.
    for half in HALVES:
        if options.get(half) == best:
            del options[half]
    options["memory_part"] = best | {"lambda_log": 0.0}
    options["logit_part"] = best | {"lambda_mem": 0.0}
    options["logit_part"].pop("scale", None)           # of the memory part
    return options


def plan(study, only=TABLES, detectors=models.DETECTORS):
    """The rows of these tables and detectors, expanded to runs -> [Line]."""
    lines, names = [], study.scope.detectors
    for table in (name for name in TABLES if name in only):
        # A table has its detectors in the order in which its rows first name them.
        for letter in dict.fromkeys("".join(row[0] for row in PLAN[table])):
            if names.get(letter) in detectors:
                chosen = choices(study, names[letter])
                for letters, *row in PLAN[table]:
                    if letter in letters:
                        lines += expand(study, table, names[letter], chosen, *row)
    return lines


def expand(study, table, detector, chosen, label, what, change=()):
    """One row of the plan for one detector -> [Line], or [] where it has nothing to show."""
    # The main table has more seeds and full length; the search must not touch the split "val".
    scope, change = study.scope, dict(change)
    seeds, steps, split = scope.seeds_of.get(table, scope.seeds), scope.steps, "val"
    if table == "main":
        steps = 1
    if table == "search":
        seeds, steps, split = scope.tune_seeds, scope.tune_steps[detector], "tune"
    steps = change.pop("steps", steps)

    def jobs(*of_method):
        return tuple(make_job(study, detector, "student", *of_method, seed=seed, steps=steps,
                              split=split) for seed in seeds)

    # What has no teacher has no options of a method either.
    if what == "teacher":
        return [Line(table, detector, label, (make_job(study, detector, "teacher"),))]
    if what == "student":
        return [Line(table, detector, label, jobs())]
    if what not in chosen:
        return []

    # Drop entries of `change` that equal the current value, so that one run never gets two names.
    method, options = method_of(what), dict(chosen[what])
    now = train.method_defaults(method) | options
    for name, value in change.items():
        value = value(now[name]) if callable(value) else value
        # Only DINO has an embedding of labels; the others ask with a frozen random one.
        if value == "label" and detector != "dino":
            value = "random_label"
        if value != now[name]:
            options[name] = value
    if change and options == chosen[what]:
        return []
    return [Line(table, detector, label, jobs(method, options), jobs())]


def method_of(what):
    """The method whose options are tuned under this name."""
    return what if what in RIVALS else "clockdistill"


# Rows that have CLoCKDistill's options, whole or in part: tuning both halves decides on them.
WHOLE = ("clockdistill", "memory_part", "logit_part")


def trials(study, only=TABLES, detectors=models.DETECTORS):
    """The trials of all that these tables need -> [Line], labelled with what is tuned."""
    scope, lines = study.scope, []
    for what, (base, changes) in scope.trials.items():
        rows = (what, *WHOLE) if what in HALVES else (what,)
        needed = {scope.detectors.get(letter) for table in only
                  for letters, _, of, *_ in PLAN[table] if of in rows for letter in letters}
        for detector in scope.tune_steps:
            if detector not in needed or detector not in detectors:
                continue
            asks = what in (*HALVES, "clockdistill")                 # has a logit part
            preset = PRESETS[detector] if asks else {}
            for change in changes:
                options = preset | base | change
                jobs = (make_job(study, detector, "student", method_of(what), options, seed,
                                 scope.tune_steps[detector], "tune") for seed in scope.tune_seeds)
                lines.append(Line("tuning", detector, what, tuple(jobs)))
    return lines


def choose(done, lines):
    """The best of the trials, by the mean over their seeds -> {detector: {what: options}}."""
    chosen, best = {}, {}
    for line in lines:
        score = np.mean([done[job.name]["AP"] for job in line.jobs])
        options = options_of(line.jobs[0].cfg)
        for what in [line.label, "clockdistill"] if line.label in HALVES else [line.label]:
            if score > best.get((line.detector, what), -1):
                best[line.detector, what] = score
                chosen.setdefault(line.detector, {})[what] = options
    return chosen


# ----------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------

def read_result(file):
    """The JSON of a finished run. Raises ValueError when it lacks a number that tables need."""
    result = read_json(file)
    for name in ("AP", "minutes", "params", "gflops"):
        if not isinstance(result, dict) or not isinstance(result.get(name), (int, float)):
            raise ValueError(f"{file} holds no {name}")
    return result


def read_results(folder):
    """{name: result} of all runs. Files that cannot be used are left out, counted and named."""
    done, broken = {}, []
    for file in sorted(folder.glob("*.json")):
        try:
            done[file.stem] = read_result(file)
        except (OSError, ValueError) as error:
            broken.append(str(error))
    if broken:
        print(f"{len(broken)} results are left out: {'; '.join(broken)}")
    return done


def read_chosen(study):
    """What tuning chose: {detector: {what: {option: value}}}."""
    file = study.results / "chosen.json"
    return read_json(file) if file.exists() else {}


def file_result(study, job, result):
    """Keep a result under its name, without the places that only this machine has."""
    settings = {k: v for k, v in result["settings"].items() if k not in train.PLACES}
    file = study.results / "runs" / f"{job.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"name": job.name, "role": job.role} | result | {"settings": settings})
    study.done[job.name] = read_result(file)


def run_all(study, jobs, workers, shard=(0, 1)):
    """Run the jobs without a result, `workers` at a time -> those that still have none.

    A job goes on from where it was cut off, and one that fails stops no other.
    """
    index, count = shard
    missing = {job.name: job for job in jobs[index::count] if job.name not in study.done}
    runs, failed = {}, []
    for name, job in missing.items():
        folder = study.work / name
        runs[name] = demo.Job(folder, [*job.arguments, "--out", str(folder), "--resume"])

    def ended(name, error):
        bar.update()
        job = missing[name]
        words = ["ROOT" if word == study.root else word for word in ("train.py", *job.arguments)]
        try:
            if error:
                raise ValueError(error)
            result = read_json(runs[name].folder / "result.json")
            file_result(study, job, {"command": shlex.join(words)} | result)
            tqdm.write(f"{time.strftime('%H:%M')}  {name}: AP {study.done[name]['AP']:.3f}")
        except (OSError, ValueError) as problem:
            failed.append(str(problem))

    if missing:
        threads = max(1, (os.cpu_count() or 1) // workers)
        with tqdm(total=len(missing), desc="runs", unit="run") as bar:
            demo.side_by_side(runs, workers, threads, ended)
    for line in failed:
        tqdm.write(f"failed: {line}")
    return [job for job in jobs if job.name not in study.done]


# ----------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------

def gain(scores, base):
    """The mean difference, paired by seed, with its 95 % interval (Student's t).

    scores, base: {seed: AP}. Returns {"mean", "low", "high"}, None without a common seed; with one
    the interval is not known (None).
    """
    difference = np.array([scores[seed] - base[seed] for seed in scores if seed in base])
    n = len(difference)
    if not n:
        return None
    mean = float(difference.mean())
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    half = scipy.special.stdtrit(n - 1, 0.975) * difference.std(ddof=1) / math.sqrt(n)
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def summarise(lines, done):
    """{table: [one dict a row]}, of the rows that have a result. done: {name of a run: result}."""
    tables = {}
    for line in lines:
        # By seed: a gain is a difference between two runs of the same seed.
        made = {job.cfg.seed: done[job.name] for job in line.jobs if job.name in done}
        base = {job.cfg.seed: done[job.name]["AP"] for job in line.alone if job.name in done}
        if not made:
            continue
        scores = {seed: run["AP"] for seed, run in made.items()}
        runs = list(made.values())
        tables.setdefault(line.table, []).append({
            "detector": line.detector, "method": line.label, "steps": line.jobs[0].steps,
            "seeds": list(made), **{name: [run[name] for run in runs] for name in SHOWN},
            "gain": gain(scores, base) if line.alone else None,
            "options": options_of(line.jobs[0].cfg), "params": runs[0]["params"],
            "gflops": runs[0]["gflops"], "minutes": [run["minutes"] for run in runs],
            "runs": [run["name"] for run in runs]})
    return tables


# ----------------------------------------------------------------------------------------------
# Pages and pictures
# ----------------------------------------------------------------------------------------------

TITLES = {
    "main": "Student alone, and distilled",
    "rivals": "Rivals",
    "ablation": "What each part does",
    "masks": "What the masks do",
    "sensitivity": "How sensitive the gain is to the settings",
    "schedule": "A longer schedule: the ceiling or only the speed?",
    "search": "The search for each detector's settings (split `tune`, one seed: not results)",
}
# What a reader of the toy's page has to know.
NOTES = {
    "rivals": "Each rival's weights are the best of four trials on the split `tune` "
              "(`tuning.json`). Not equal: CLoCKDistill's are the best of eight, four with the "
              "scale mask and four without, and its logit part has the settings that won in the "
              "search below. Last column: CLoCKDistill's AP minus the row's, paired by seed; the "
              "intervals are not corrected for there being several.",
    "ablation": "The pieces of the memory part are tuned like a rival, each alone. A row with ... "
                "is the logit part as chosen, alone, with that one change.",
}


def spread(values, digits=3):
    """mean ± standard deviation over seeds."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def interval(gained):
    """A gain in words: +0.100 (+0.050 to +0.150)."""
    if gained is None:
        return ""
    form = "{mean:+.3f}" if gained["low"] is None else "{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return form.format(**gained)


def scores_of(line):
    """{seed: AP} of a row of tables.json."""
    return dict(zip(line["seeds"], line["AP"]))


# The columns of the page. The paper's own AP stays empty: its tables were not read.
MAIN = ("detector", "model", "AP", "AP in the paper", "AP50", "AP75", "AP small / medium / large",
        "gain in AP", "parameters", "GFLOPs", "images/s", "seeds")
OTHER = ("detector", "run", "AP", "AP50", "gain in AP", "clockdistill - this", "minutes", "seeds")


def markdown(tables, speed, scale):
    """All tables as one page."""
    text = [f"# {scale}: tables\n\nMade by `python train.py table {scale}` from the JSON files in "
            "`runs/`. AP mean ± standard deviation over seeds; gain: paired by seed against the "
            "same detector's student alone, with its 95 % interval (Student's t).\n"]
    for name, lines in tables.items():
        text.append(f"\n## {TITLES[name]}\n")
        if scale == "toy" and name in NOTES:
            text.append(f"{NOTES[name]}\n")
        if name == "main":
            text.append(f"images/s: one at a time, all interleaved; {speed['machine']}.\n")
        columns = list(MAIN if name == "main" else OTHER)
        if name == "main" and scale not in ("kitti", "coco"):
            columns.remove("AP in the paper")
        if name not in ("main", "rivals"):
            columns.remove("clockdistill - this")
        text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for line in lines:
            row = cells(line, lines, speed.get(line["detector"], {}))
            text.append(f"| {' | '.join(row[column] for column in columns)} |")
    return "\n".join(text) + "\n"


def cells(line, lines, rates):
    """{column: text} of a row. rates: {role: images/s} of its detector."""
    label = line["method"]
    rate = rates.get("teacher" if label == "teacher" else "student")
    lead = None
    for other in lines:
        ours = other["method"] == "clockdistill" and other["detector"] == line["detector"]
        if ours and other is not line:
            lead = gain(scores_of(other), scores_of(line))
    sizes = " / ".join(spread(line[name], 2) for name in ("APs", "APm", "APl"))
    return {"detector": line["detector"], "model": label, "run": label, "AP": spread(line["AP"]),
            "AP in the paper": "", "AP50": spread(line["AP50"]), "AP75": spread(line["AP75"]),
            "AP small / medium / large": sizes, "gain in AP": interval(line["gain"]),
            "clockdistill - this": interval(lead), "parameters": f"{line['params'] / 1e6:.2f} M",
            "GFLOPs": f"{line['gflops']:.3g}", "images/s": f"{rate:.0f}" if rate else "",
            "minutes": f"{np.mean(line['minutes']):.1f}", "seeds": str(len(line["seeds"]))}


def learning_curve(line, results):
    """[(step, [AP of each seed])] of a row, for plots.curves."""
    points = {}
    for name in line["runs"]:
        for point in results[name]["history"]:
            points.setdefault(point["step"], []).append(point["AP"])
    return sorted(points.items())


def final_scores(lines, results):
    """{"student alone" or "distilled": [(steps, [AP of each seed])]} of the table "schedule"."""
    ends = {}
    for line in lines:
        last = results[line["runs"][0]]
        name = "distilled" if last["settings"]["method"] else "student alone"
        ends.setdefault(name, []).append((last["steps"], line["AP"]))
    return {name: sorted(points) for name, points in ends.items()}


def panels(lines):
    """{setting: [(value, [AP of each seed])]} of the table "sensitivity"."""
    return {what: [(line["method"].removeprefix(what + " "), line["AP"]) for line in lines
                   if line["method"].startswith(what + " ")] for what in PANELS}


def draw(tables, done, reading, folder):
    """The figures, each from the same rows as its table."""
    figures = {}
    for detector in models.DETECTORS:
        main, longer, varied = ({line["method"]: line for line in tables.get(name, [])
                                 if line["detector"] == detector}
                                for name in ("main", "schedule", "sensitivity"))
        # The main table's runs as they learned. Those evaluated at the end alone have no curve.
        curves = {name: learning_curve(main[name], done) for name in ("student", "clockdistill")
                  if name in main}
        curves = {name: points for name, points in curves.items() if len(points) > 1}
        if curves and "teacher" in main:               # of another schedule: a level, not a curve
            curves["teacher"] = main["teacher"]["AP"][0]
        if len(curves) > 1:
            figures[f"curves_{detector}"] = plots.curves(
                curves, "AP", f"{detector}: with and without a teacher")
        # Where longer runs end, once all lengths have the same seeds, and what a setting changes.
        if len({tuple(line["seeds"]) for line in longer.values()}) == 1:
            figures[f"schedule_{detector}"] = plots.curves(
                final_scores(longer.values(), done), "AP", f"{detector}: each point a finished run")
        if "student" in varied:
            figures[f"sensitivity_{detector}"] = plots.sensitivity(
                panels(varied.values()), varied["student"]["AP"],
                f"{detector}: AP of the distilled student, one setting at a time")

    # Every row's gain over the student alone; rivals from the largest to the smallest.
    for name in ("main", "rivals", "ablation", "masks"):
        rows = [line for line in tables.get(name, []) if line["gain"]]
        if name == "rivals":
            rows.sort(key=lambda line: (line["detector"], -line["gain"]["mean"]))
        if rows:
            seeds = sorted({len(line["seeds"]) for line in rows})
            figures[f"gains_{name}"] = plots.gains(
                [(line["detector"], line["method"], line["gain"]) for line in rows],
                f"{TITLES[name]}: {' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])}",
                zero="student alone", chosen=("clockdistill", "both parts: clockdistill"))
    if reading:
        answers = {name: read for name, read in reading.items() if name != "always"}
        figures["reading"] = plots.reading(
            answers, always=dict.fromkeys(answers, reading["always"]))
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def write(study):
    """tables.json, tables.md and the figures of all tables, from the results that there are."""
    folder, lines, tried = study.results, plan(study), trials(study)
    folder.mkdir(parents=True, exist_ok=True)
    # What takes a minute to measure is measured once.
    for name, measure in (("speed", images_per_second), ("reading", what_is_read)):
        if not (folder / f"{name}.json").exists():
            write_json(folder / f"{name}.json", measure(study))
    speed, reading = read_json(folder / "speed.json"), read_json(folder / "reading.json")
    tables = summarise(lines, study.done)
    # A table that only repeats runs of the main one is left out, until its own are there.
    known = {run for line in tables.get("main", ()) for run in line["runs"]}
    tables = {name: rows for name, rows in tables.items()
              if name == "main" or any(set(row["runs"]) - known for row in rows)}
    write_json(folder / "tables.json", tables)
    write_json(folder / "tuning.json", [
        {"detector": line.detector, "what": line.label, "options": options_of(job.cfg),
         "seed": job.cfg.seed, "AP": study.done[job.name]["AP"]}
        for line in tried for job in line.jobs if job.name in study.done])
    write_text(folder / "tables.md", markdown(tables, speed, study.scale))
    draw(tables, study.done, reading, folder)

    # Say what the pages lack.
    absent = [job.name for job in jobs_of(lines + tried) if job.name not in study.done]
    lack = f"; {len(absent)} runs have no result ({absent[0]}, ...)" if absent else ""
    print(f"{sum(map(len, tables.values()))} rows: {folder}/tables.md, tables.json and figures"
          + lack)


def images_per_second(study):
    """{"machine": ..., detector: {role: images/s}} of the main table's models.

    Speed does not depend on the weights: the models are built anew, while no run is going on.
    """
    device, networks = train.pick_device(), {}
    for detector in study.scope.detectors.values():
        for role in ("teacher", "student"):
            model = bench.untrained(make_job(study, detector, role).cfg, study.scope)
            networks[detector, role] = model.to(device)
    # At the size of the runs, which options after -- may change.
    # Without --size a run's GFLOPs are those of 800 x 1333, whatever its images are.
    sizes = [result["gflops_at"] for result in study.done.values() if "gflops_at" in result
             and (study.scale == "toy" or result["settings"]["size"])]
    height, width = sizes[0] if sizes else study.scope.image_size
    image = torch.zeros(1, 3, height, width, device=device)
    speed = {"machine": train.machine(device)}
    for (detector, role), rate in bench.images_per_second(networks, image).items():
        speed.setdefault(detector, {})[role] = rate
    return speed


def what_is_read(study):
    """What each shipped teacher answers on "tune", and the most frequent class for comparison.

    {detector: {content of the queries: look.reading}, "always": (class, its part of the objects)}
    """
    if not study.shipped:
        return {}
    # The images are the same for every teacher, and a teacher encodes them once for all contents.
    cfg = make_job(study, "dino", "student", split="tune").cfg
    images = train.build_data(dataclasses.replace(cfg, limit=200), cfg.val_split)
    batches = list(data.eval_loader(images, 20))
    counts = torch.cat([labels for batch in batches for labels in batch.labels]).bincount()
    contents = {"label": 0., "label, noise 0.25": .25, "random_label": 0., "own": 0.,
                "random": 0., "zero": 0.}              # {name: how many of the labels are wrong}
    reading = {"always": (images.classes[counts.argmax()], (counts.max() / counts.sum()).item())}
    for detector, path in study.shipped.items():
        teacher, _ = train.load_model(path)
        teacher.encode = EncodeOnce(teacher.encode, 1e9)
        reading[detector] = {}
        for name, noise in contents.items():
            content, _, _ = name.partition(",")
            embedding = train.asked_with(teacher, content)
            if content in ("label", "own") and embedding is None:      # this detector has none
                continue
            width = teacher.config["hidden_dim"]
            method = CLoCKDistill(width, width, content=content, label_noise=noise, box_noise=0.4,
                                  num_classes=teacher.num_classes)
            reading[detector][name] = look.reading(teacher, method, embedding, batches)
    return reading


# ----------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------

def shard(text):
    """'2/3' -> (1, 3), for argparse."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"want I/N, 1/3 to 3/3, not {text}")
    return int(index) - 1, int(count)


def add_options(parser):
    """The options of `train.py table`."""
    parser.epilog = ("Options of fit after -- go to every run, and the results elsewhere:\n"
                     "  python train.py table kitti --root DIR -- --steps 100 --size 160,540")
    parser.add_argument("scale", choices=SCALES, help="which plan, on which data")
    parser.add_argument("--root", help="folder of the data (toy: datasets/toy)")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="these tables")
    parser.add_argument("--detectors", nargs="+", choices=models.DETECTORS,
                        default=models.DETECTORS, help="these detectors' runs")
    parser.add_argument("--dry-run", action="store_true",
                        help="print every run's command and cost, and what to download")
    parser.add_argument("--rebuild", action="store_true",
                        help="no runs: tables and figures from the results there are")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N",
                        help="every N-th run from the I-th")
    parser.add_argument("--jobs", type=train.at_least_1,
                        help="runs at once (default: one per CPU core, one in all on a GPU)")
    parser.add_argument("--teachers", choices=("shipped", "scratch"), default="shipped",
                        help="those in weights/, or trained anew")
    parser.add_argument("--work", help="folder of the runs' folders (default: runs/table-SCALE)")
    parser.add_argument("--results", help="folder of the results (default: in results/)")
    parser.add_argument("--tflops", type=float,
                        help="dry run: useful work per second (default: 20 of a GPU; toy and "
                             "kitti-small: 0.02 of a CPU core)")
    parser.add_argument("--teacher-floor", type=float,
                        help="as of distill; 0 for runs too short to make a teacher")


def run(scale, root, work, results, only, detectors, jobs, shard, rebuild, dry_run, tflops,
        teachers, teacher_floor, changes):
    """The command `table`: teachers, tuning, tables. -> 0 when every run has its result."""
    if root is None and scale != "toy" and not (dry_run or rebuild):
        raise ValueError(f"table {scale} needs --root, the folder of the data "
                         f"({SCALES[scale].download})")
    study = open_study(scale, root, work, results, teachers, changes, teacher_floor)
    if rebuild:
        reading = study.results / "reading.json"
        if study.root == "ROOT" and study.shipped and not reading.exists():
            raise ValueError(f"{reading} is missing: give --root, whose images are read to make it "
                             f"({study.scope.download})")
        write(study)
        return 0
    lines = trials(study, only, detectors) + plan(study, only, detectors)
    if not lines:
        raise ValueError(f"table {scale} has no rows in {' '.join(only)} for these detectors")
    if dry_run:
        needed = [*teachers_of(study, lines), *jobs_of(lines)]
        bench.print_costs(needed, measured(study), tflops)
        if made := sum(job.name in study.done for job in needed):
            print(f"{made} of these have their result in {study.results}/runs: they are not made "
                  "again.")
        # Until tuning has chosen, some rows have no options, so they are not among the runs above.
        chosen = read_chosen(study)
        untuned = {line.label for line in lines if line.table == "tuning" and line.label not in
                   choices(study, line.detector) | chosen.get(line.detector, {})}
        if untuned:
            print(f"Rows that wait for tuning come on top: {', '.join(sorted(untuned))}.")
        return 0
    if jobs is None:
        jobs = 1 if train.pick_device().type != "cpu" else os.cpu_count() or 1
    return make(study, lines, only, detectors, jobs, shard)


def open_study(scale, root=None, work=None, results=None, teachers="shipped", changes=(),
               teacher_floor=None):
    """The Study of a command's options, with the results so far.

    Runs of changed settings never mix with the published ones. The runs start where this repository
    lies, and so does this process from here on: recipes and splits name their files from there.
    """
    root, work, results = (given and Path(given).absolute() for given in (root, work, results))
    os.chdir(HERE)
    scope, shipped = SCALES[scale], {}
    folder = f"runs/table-{scale}" + ("-changed" if changes else "")
    published = f"results/{scope.results or scale}"
    results = Path(results or (f"{folder}/results" if changes else published)).resolve()
    root = root or ("datasets/toy" if scale == "toy" else None)
    # Some teachers come with the repository, for the published recipe.
    if teachers == "shipped" and not changes:
        for detector in scope.detectors.values():
            file = HERE / "weights" / f"{scope.teachers}_{detector}.safetensors"
            if file.exists():
                shipped[detector] = file
    changed = {name: value for name, value in train.parse(["fit", *changes]).items()
               if name not in ("command", "debug")}
    # What the plan sets itself would stand in a row of another name.
    if fixed := sorted(changed.keys() & {"detector", "out", "recipe", "resume", "root", "seed"}):
        raise ValueError(f"{train.flag(fixed[0])} after --: the table sets it itself (--detectors, "
                         "--root, --work and --results stand before --)")
    return Study(
        scale, str(Path(root).resolve()) if root else "ROOT", Path(work or folder).resolve(),
        results, shipped,
        changes=changed,
        of_students={} if teacher_floor is None else {"teacher_floor": teacher_floor},
        done=read_results(results / "runs"))


def measured(study):
    """The study's Scale, with number, size and objects of the images in --root, where it is given.

    Prints the summary of these images, or what has to be downloaded.
    """
    if study.scale == "toy" or study.root == "ROOT":
        print(f"To download: {study.scope.download}.\n")
        return study.scope
    cfg = make_job(study, "dino", "student").cfg       # the images are the same for all
    dataset = data.build(cfg.data, cfg.root, cfg.train_split, class_map=cfg.class_map,
                         limit=cfg.limit, size=train.parse_size(cfg.size), check=False)
    print(f"{dataset.summary}\n")
    return dataclasses.replace(study.scope, images=len(dataset), most_objects=dataset.most_objects,
                               image_size=tuple(dataset[0][0].shape[1:]))


def jobs_of(lines):
    """The students of rows, each once, by seed: cut off early, every row has some of its seeds."""
    jobs = dict.fromkeys(job for line in lines for job in (*line.jobs, *line.alone))
    return sorted((job for job in jobs if job.role == "student"), key=lambda job: job.cfg.seed)


def teachers_of(study, lines):
    """The teachers of the rows' detectors."""
    needed = {line.detector for line in lines}
    return [make_job(study, name, "teacher") for name in models.DETECTORS if name in needed]


def check_first(study, jobs):
    """Raise what is wrong with the images, or with a file of a backbone: once, before any run.

    The toy's images are drawn here, before several runs would do it at once.
    """
    models_of = {(job.cfg.detector, job.role): job.cfg for job in jobs
                 if job.name not in study.done}
    if models_of:
        images, _ = train.open_data(jobs[0].cfg)
    for cfg in models_of.values():
        train.open_student(cfg, images)


def make(study, lines, only, detectors, workers, shard):
    """Run what is missing, stage by stage, and write the pages.

    lines: the rows of all stages, as far as they can be planned now.
    A stage is planned anew when the one before it is done: a student's name holds its teacher's
    weights, and a table shows what tuning chose. What other shards still have to do stops it in
    between.
    """
    def stage(what, jobs):
        if missing := run_all(study, jobs, workers, shard):
            raise ValueError(f"{len(missing)} {what} have no result yet ({missing[0].name}, ...): "
                             "they failed, or are another shard's; bring their JSON files to "
                             f"{study.results}/runs (of teachers also their folders to "
                             f"{study.work}) and repeat the command")

    # A teacher that comes with the repository is only measured.
    teachers = teachers_of(study, lines)
    for job in teachers:
        if not job.arguments and job.name not in study.done:
            images = train.build_data(job.cfg, job.cfg.val_split)
            file = study.shipped[job.cfg.detector]
            file_result(study, job, demo.shipped_teacher(file, images, train.pick_device()))
    check_first(study, teachers + jobs_of(lines))
    stage("teachers", teachers)

    # Keep what tuning chose for the tables of other commands.
    if tried := trials(study, only, detectors):
        stage("tuning runs", jobs_of(tried))
        chosen = read_chosen(study)
        for detector, options in choose(study.done, tried).items():
            chosen.setdefault(detector, {}).update(options)
        study.results.mkdir(parents=True, exist_ok=True)
        write_json(study.results / "chosen.json", chosen)

    missing = run_all(study, jobs_of(plan(study, only, detectors)), workers, shard)
    write(study)
    return int(bool(missing))
