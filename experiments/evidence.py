"""What a table's mean APs leave open: would other images have said so, and which objects gain?

    python train.py evidence kitti-small --root DIR

Runs after `train.py table kitti-small`. It opens the finished students in --work, detects on "val"
once more, and writes evidence.json and evidence.md into the folder of the results:

    other images   the gain when the images of "val" are drawn anew, with repetition: 95 % of the
                   draws lie within the interval. Seeds answer "would another training say so?",
                   draws of images "would another val say so?"
    near, far      the gain on each class's nearer and farther half, by the distance that KITTI's
                   labels hold
    per class      the gain in each class's AP
"""
import contextlib
import copy

import numpy as np
import torch
from tqdm import tqdm

import data
import train
from checkpoints import write_json, write_text
from experiments import tables

HALVES = ("near", "far")
IGNORED = 1e12                     # an area that COCOeval leaves out, found or not


def judged(predictions, dataset):
    """A COCOeval that has compared every image, for `ap_of`; areas of all sizes together."""
    judge = data.coco_eval(predictions, dataset)
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    with contextlib.redirect_stdout(None):                               # pycocotools prints
        judge.evaluate()
    # One row per class, one column per image: a draw of images is a draw of columns.
    judge.evalImgs = np.array(judge.evalImgs, dtype=object).reshape(-1, len(judge.params.imgIds))
    return judge


def ap_of(judge, sample=slice(None)):
    """AP per class (C,), NaN without objects.

    sample: (images,) positions of the images that count, repeated as often as they do.
    """
    drawn = copy.copy(judge)
    drawn.evalImgs = judge.evalImgs[:, sample].ravel().tolist()
    with contextlib.redirect_stdout(None):
        drawn.accumulate()
    precision = drawn.eval["precision"][..., 0, 0]                       # (10 IoUs, 101, C)
    return np.where(precision > -1, precision, np.nan).mean((0, 1))


def drawn_gains(ours, base, draws=1000, seed=0):
    """The mean gain in AP over pairs of runs, for each draw of images -> (draws,).

    ours, base: lists of `judged`, pair by pair.
    """
    rng, gains = np.random.default_rng(seed), []
    count = len(base[0].params.imgIds)
    for _ in tqdm(range(draws), "draws of images", leave=False,
                  mininterval=train.quiet_interval()):
        sample = rng.integers(0, count, count)
        pairs = [np.nanmean(ap_of(a, sample)) - np.nanmean(ap_of(b, sample))
                 for a, b in zip(ours, base)]
        gains.append(np.mean(pairs))
    return np.array(gains)


def halves(dataset):
    """{"near", "far": a data set that asks for this half of each class, and ignores the other}.

    Halves of the objects by their distance from the camera, as KITTI's labels hold it.
    """
    labels, metres, parts = dataset.labels, dataset.metres, {}
    # quantile, since torch's median of an even number is the lower one of two.
    middle = torch.stack([metres[labels == label].quantile(0.5) for label in labels])
    for name, wanted in zip(HALVES, (metres <= middle, metres > middle)):
        parts[name] = part = copy.copy(dataset)
        part.areas = torch.where(wanted, dataset.areas, IGNORED)
    return parts


def evidence_of(line, judges, scores, draws):
    """One row's dict, or None where no seed has both of its runs.

    line: tables.Line.  judges: {name of a run: `judged`}.  scores: {name of a run: {"near", "far",
    "per class": {class: AP}}}.
    """
    ours, base = ({job.cfg.seed: job.name for job in jobs if job.name in judges}
                  for jobs in (line.jobs, line.alone))
    seeds = [seed for seed in ours if seed in base]
    if not seeds:
        return None

    def gain_of(read):
        """tables.gain of one of a run's scores."""
        return tables.gain(*({seed: read(scores[runs[seed]]) for seed in seeds}
                             for runs in (ours, base)))

    pairs = ([judges[runs[seed]] for seed in seeds] for runs in (ours, base))
    gains = drawn_gains(*pairs, draws)
    low, high = np.quantile(gains, [0.025, 0.975])
    other = {"mean": float(gains.mean()), "low": float(low), "high": float(high)}
    classes = scores[ours[seeds[0]]]["per class"]
    return {"detector": line.detector, "method": line.label, "seeds": seeds, "draws": draws,
            "images": judges[ours[seeds[0]]].evalImgs.shape[1], "other images": other,
            **{name: gain_of(lambda of_run: of_run[name]) for name in HALVES},
            "per class": {name: gain_of(lambda of_run: of_run["per class"][name])
                          for name in classes}}


def markdown(rows, scale):
    """evidence.md."""
    classes = list(rows[0]["per class"])
    head = ["detector", "run", "seeds", "gain, other images", *HALVES, *classes]
    draws, images = rows[0]["draws"], rows[0]["images"]
    text = [f"# {scale}: other images, and where\n",
            f"Made by `python train.py evidence {scale}`. Gains in AP over the student alone, "
            "paired by seed.",
            f"Other images: 95 % of {draws} draws of the {images} images, seeds as they are. All "
            "else: 95 % over seeds (Student's t), images as they are. Near and far are the halves "
            "of each class by distance, the other half ignored.\n",
            f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        gains = [row["other images"], *(row[name] for name in HALVES), *row["per class"].values()]
        cells = [row["detector"], row["method"], str(len(row["seeds"])),
                 *map(tables.interval, gains)]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def add_options(parser):
    """The options of `train.py evidence`."""
    parser.add_argument("scale", choices=("kitti-small", "kitti"), help="as of train.py table")
    parser.add_argument("--root", required=True, help="folder of the data")
    parser.add_argument("--work", help="folder of the runs' folders (default: as the table's)")
    parser.add_argument("--results", help="folder of the results (default: as the table's)")
    parser.add_argument("--draws", type=train.at_least_1, default=1000,
                        help="of images (default: %(default)s)")


def run(scale, root, work, results, draws):
    """The command `evidence`: open what is finished, detect, compare, write."""
    study = tables.open_study(scale, root, work, results)
    lines = [line for line in tables.plan(study, ("main", "ablation", "masks")) if line.alone]
    jobs = [job for job in tables.jobs_of(lines)
            if job.name in study.done and (study.work / job.name / "last.pt").exists()]
    if not jobs:
        raise ValueError(f"{study.work} holds no finished student: first train.py table {scale}")
    dataset = train.build_data(jobs[0].cfg, jobs[0].cfg.val_split)
    parts = halves(dataset)

    judges, scores = {}, {}
    for job in jobs:
        checkpoint = study.work / job.name / "last.pt"
        model, _ = train.load_model(checkpoint)
        # The very weights of the result, or the page would be about other runs.
        if train.fingerprint(model) != study.done[job.name]["weights"]:
            raise ValueError(f"{checkpoint} has other weights than {job.name} in {study.results}: "
                             "give the --work and --results of one table")
        batch = study.scope.options.get("eval_batch", train.Run.eval_batch)
        found = train.detect(model.to(train.pick_device()), dataset, train.Run(workers=1), batch)
        every = data.evaluate(found, dataset)
        judges[job.name] = judged(found, dataset)
        scores[job.name] = {name: data.evaluate(found, part)["AP"] for name, part in parts.items()}
        scores[job.name]["per class"] = {
            name: values["AP"] for name, values in every["per_class"].items()}

    # Two tables may hold the same runs: they are told once, by the first one's name.
    unlike = {line.jobs: line for line in reversed(lines)}
    rows = [evidence_of(line, judges, scores, draws) for line in reversed(unlike.values())]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"{study.work} holds no distilled student and the same seed alone: first "
                         f"train.py table {scale}")
    write_json(study.results / "evidence.json", rows)
    write_text(study.results / "evidence.md", markdown(rows, scale))
    print(f"{len(rows)} rows: {study.results}/evidence.md, evidence.json")
