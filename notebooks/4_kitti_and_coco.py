# %% [markdown]
# # 4 From the toy to KITTI and COCO
#
# Right boxes, given in the pixels of the resized image, can get an AP of 0.06, and no error is
# raised. So before you train on your own folder of [KITTI](https://www.cvlibs.net/datasets/kitti)
# or [COCO](https://arxiv.org/abs/1405.0312):
#
# - know five ways to a wrong number (1);
# - let a detector overfit two images, the first test of any new data (2);
# - look at your boxes (3);
# - read what small runs on real KITTI taught (4), what the paper's size would cost (5), and how a
#   published teacher is read (6).
#
# **Nothing of full size has been trained with this code**, and no published teacher was at hand:
# sections 5 and 6 are prepared, not tried. No image of KITTI or COCO is needed here: the toy is
# written in KITTI's layout and read by KITTI's reader.

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "notebooks":        # the modules are a folder of files
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %%
import contextlib
import io
import json
import re
import shutil
import tempfile
import textwrap
from pathlib import Path

import torch
from PIL import Image
from torchvision.ops import box_convert, box_iou

import checkpoints
import data
import models
import train
from experiments import plots

# %matplotlib inline
data.make_toy("datasets/toy")                            # draws it on first use
SCRATCH = Path("runs/notebook_4")                        # what this notebook writes
shutil.rmtree(SCRATCH, ignore_errors=True)

# %% [markdown]
# ## 1. Five ways to a wrong number
#
# They are shown on 100 images of the toy's `val`, with the shipped teacher, or with a *perfect
# detector*, which answers with the ground truth.

# %%
teacher, _ = train.load_model("weights/toy_teacher_dino.safetensors")
val = data.build("toy", "datasets/toy", "val", limit=100)
truths = [val.raw(index)[1] for index in range(len(val))]
perfect = [{"image_id": t["image_id"], "scores": torch.ones(len(t["labels"])),
            "labels": t["labels"], "boxes": t["boxes"]} for t in truths]
quiet = train.Run(workers=0)
detected = train.detect(teacher, val, quiet, batch_size=1, progress=False)
scores, of_perfect = data.evaluate(detected, val), data.evaluate(perfect, val)["AP"]
print(val.summary)
print(f"AP of the teacher {scores['AP']:.3f}, of the perfect detector {of_perfect:.3f}")

# %% [markdown]
# ### 1.1 KITTI's protocol is not COCO's
#
# `data.evaluate` is COCO's: AP over IoU 0.50 to 0.95, and AP50, of all labelled objects. KITTI's
# server wants IoU 0.7 for cars and 0.5 for the others, and reports *easy*, *moderate* and *hard*,
# where harder objects count neither way. (*Easy* wants an object that is fully visible, at most
# 15 % beyond the border and at least 40 pixels high.) So AP50 here is not "KITTI moderate".
#
# **Claim.** The same detections get numbers from .58 to .84. How closely a box must fit its object
# makes most of the difference. **Look at** the last two bars: there only the labels were changed.
# None of the five is KITTI's number.

# %%
def rewritten(name, rule=lambda columns: columns, width=160):
    """val as another KITTI folder. Each line of its label files is as rule(columns) says; None
    leaves it out. Of every second image only the left `width` columns stay (for 1.2)."""
    folder = SCRATCH / name / "training"
    for kind in ("image_2", "label_2"):
        os.makedirs(folder / kind, exist_ok=True)
    for index, image in enumerate(map(Path, val.paths)):
        lines = (image.parents[1] / "label_2" / f"{image.stem}.txt").read_text().splitlines()
        lines = [" ".join(rule(line.split()) or []) for line in lines]
        (folder / "label_2" / f"{image.stem}.txt").write_text("\n".join(lines))
        with Image.open(image) as picture:
            right = width if index % 2 else 160
            picture.crop((0, 0, right, 48)).save(folder / "image_2" / image.name)
    return data.build("kitti", SCRATCH / name, "all", size=(48, 160))


def easy(columns):                                       # unhidden, at most 15 % over the border
    hard = columns[0] != "DontCare" and (float(columns[1]) > 0.15 or int(columns[2]) > 0)
    return ["DontCare", *columns[1:]] if hard else columns


no_ignored = rewritten("no_ignored", lambda c: None if c[0] == "DontCare" else c)
easy_only = rewritten("easy", easy)
bars = {"AP, IoU .50 to .95": scores["AP"], "AP75": scores["AP75"], "AP50": scores["AP50"],
        "AP50, ignored regions\nread as background": data.evaluate(detected, no_ignored)["AP50"],
        "AP50, only unhidden objects\n(KITTI's easy, but for its 40 px)":
            data.evaluate(detected, easy_only)["AP50"]}
ap, ap75, ap50, background, unhidden = bars.values()
assert ap < ap75 < background < ap50 < unhidden and unhidden - background < 0.05 < ap50 - ap
plots.stacked({name: {"teacher": value} for name, value in bars.items()}, "average precision",
              "One set of detections, five numbers", "{:.3f}".format)

# %% [markdown]
# A number without its protocol says nothing. For KITTI's own, write what `predict --min-score 0`
# (its default of 0.4 would cut AP) finds in the images of `val` as KITTI's result files (type, -1,
# -1, -10, the box, seven unknowns, score) and give them to its devkit; this repository does not.
#
# ### 1.2 Padding moves boxes and scores
#
# **Claim.** Images of one batch are padded to the same size. Convolutions see the border that this
# makes, and GroupNorm averages over the padding, so boxes, scores and AP depend on how much padding
# there is. Make tables with `--eval-batch 1`, the default.
#
# Here every second image is cut to 128 or 96 of its 160 columns, as in a data set of many sizes.
#
# **Look at** 1 on the lower axis: how many per cent of the boxes move by at most one pixel?

# %%
def movement(alone, batched):
    """Of the narrow images' detections -> score alone, in the batch, pixels that a side moved."""
    moved = []
    for one, two in list(zip(alone, batched))[1::2]:
        alike = one["labels"][:, None] == two["labels"]                             # (k, k)
        best = (box_iou(one["boxes"], two["boxes"]) * alike).argmax(1)
        pixels = (one["boxes"] - two["boxes"][best]).abs().amax(1)
        rows = torch.stack([one["scores"], two["scores"][best], pixels])
        moved.append(rows[:, one["scores"] > 0.3])
    return torch.cat(moved, 1)


medians, sides = [], {}
for width in (128, 96):
    mixed = rewritten(f"wide{width}", width=width)
    alone, batched = (train.detect(teacher, mixed, quiet, batch_size=size, progress=False)
                      for size in (1, 4))
    aps = [data.evaluate(results, mixed)["AP"] for results in (alone, batched)]
    score, score_batched, pixels = movement(alone, batched)
    change, percent = (score - score_batched).abs(), torch.linspace(0, 100, len(pixels))
    name = f"{1 - width / 160:.0%} padding"
    print(f"{name}: AP alone {aps[0]:.3f}, in batches of 4 {aps[1]:.3f}; median of {len(pixels)} "
          f"detections: a side moves {pixels.median():.2f} pixels, a score {change.median():.3f}")
    sides[name] = pixels.sort().values, percent
    medians.append(pixels.median())
assert 0.01 < medians[0] < medians[1] < 3

figure = plots.lines({"": sides}, "a side of the box moves by at most so many pixels (of 160 x 48)",
                     "% of detections", "Boxes move with the padding")
figure.axes[0].set_xlim(0, 5)
figure

# %% [markdown]
# About two thirds with 20 % padding, fewer than half with 40 %. Batches even score
# higher here, probably because padding makes an image as wide as those the teacher was trained on:
# another number, not a better detector. The toy exaggerates, since at 20 x 6 cells the border is
# never far. At real size a user of the official DINO gives 49.3 AP with batches of 1 and 49.0 with
# 4 as an example ([issue 231](https://github.com/IDEA-Research/DINO/issues/231)).
#
# ### 1.3 Category ids are not labels
#
# COCO numbers its 80 categories 1 to 90, with gaps. In this code classes are 0 to 79, in the order
# of these ids; a data set's `category_ids` maps them back.
#
# **Claim.** A perfect detector whose labels are one off has AP 0. One that takes *id - 1* for the
# label is right before the first gap, 11 classes, and wrong after it: its AP looks like a weak
# detector, not like a bug. **Look at** the AP of each class: all or nothing.

# %%
def coco_folder(name, images, boxes, ids, names):
    """A COCO folder of toy images. boxes: per image rows (category id, four numbers of bbox)."""
    root = SCRATCH / name
    for folder in ("val2017", "annotations"):
        os.makedirs(root / folder, exist_ok=True)
    listed, notes = [], []
    for number, (image, rows) in enumerate(zip(images, boxes), 1):
        shutil.copy(image, root / "val2017" / f"{number}.png")
        listed.append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 48})
        notes += [{"image_id": number, "category_id": c, "bbox": bbox, "iscrowd": 0}
                  for c, bbox in rows]
    content = {"images": listed,
               "annotations": [note | {"id": n} for n, note in enumerate(notes, 1)],
               "categories": [{"id": i, "name": n} for i, n in zip(ids, names)]}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return data.build("coco", root, "val")

# %%
ids = [number for number, name in enumerate(checkpoints.COCO_91)
       if name not in ("__background__", "N/A")]
rows = [[(ids[(8 * image + k) % 80], [20 * k + 1, 10, 15, 30]) for k in range(8)]
        for image in range(40)]
coco = coco_folder("ids", val.paths[:40], rows, ids, [checkpoints.COCO_91[i] for i in ids])


def perfect_with(relabel):
    """What data.evaluate says of the perfect detector with other labels (those under 80)."""
    answers = []
    for index in range(len(coco)):
        _, truth = coco.raw(index)
        labels = relabel(truth["labels"])
        keep = labels < 80
        answers.append({"image_id": truth["image_id"], "scores": torch.ones(int(keep.sum())),
                        "labels": labels[keep], "boxes": truth["boxes"][keep]})
    return data.evaluate(answers, coco)


of_label = torch.tensor(coco.category_ids)               # label -> official id
answered = {"label": perfect_with(lambda labels: labels),
            "label + 1": perfect_with(lambda labels: labels + 1),
            "id - 1": perfect_with(lambda labels: of_label[labels] - 1)}
aps = {name: scores["AP"] for name, scores in answered.items()}
print("AP of a perfect detector that answers with  "
      + ",  ".join(f"{name}: {ap:.3f}" for name, ap in aps.items()))
assert aps["label"] > 0.999 and aps["label + 1"] < 0.01 and abs(aps["id - 1"] - 11 / 80) < 0.01

of_classes = {name: scores["AP"] for name, scores in answered["id - 1"]["per_class"].items()}
found = [name for name, ap in of_classes.items() if ap > 0.999]
print(f"id - 1: AP 1 in {len(found)} classes, {found[0]} to {found[-1]}; "
      f"AP 0 in {sum(ap == 0 for ap in of_classes.values())}")
assert found == list(of_classes)[:11]

# %% [markdown]
# ### 1.4 xywh or xyxy
#
# **Claim.** `data.evaluate` takes (x0, y0, x1, y1). A perfect detector that gives COCO's (x, y,
# width, height) instead has next to no AP. The other way round, a COCO *file* with corners in
# `bbox` cannot be refused, since any four numbers are a box. But its boxes reach beyond the image:
# the summary of a data set counts those, and says what it suspects.

# %%
as_xywh = [one | {"boxes": box_convert(one["boxes"], "xyxy", "xywh")} for one in perfect]
print(f"AP of xywh: {data.evaluate(as_xywh, val)['AP']:.3f}")
assert data.evaluate(as_xywh, val)["AP"] < 0.05

corners, proper = ([[(int(c) + 1, box) for c, box in zip(
    t["labels"], box_convert(t["boxes"], "xyxy", form).tolist())] for t in truths[:40]]
    for form in ("xyxy", "xywh"))
wrong = coco_folder("corners", val.paths[:40], corners, [1, 2, 3], val.classes)
right = coco_folder("proper", val.paths[:40], proper, [1, 2, 3], val.classes)
for name, dataset in {"corners": wrong, "COCO's": right}.items():
    print(textwrap.fill(f"{name}: {dataset.summary}", 98, subsequent_indent="    "))
assert "clipped" in wrong.summary and "clipped" not in right.summary

# %% [markdown]
# ### 1.5 The pixels of which image?
#
# **Claim.** Predictions are in pixels of the *stored* image. A perfect detector that gives the
# pixels of the resized image loses most of its AP, already when 1,242 columns become 1,331, as the
# full-size recipes resize KITTI: a factor of 1.07. **Look at** how far each box is from its object
# (dashed): only the car's IoU is above 0.5.

# %%
resized = [one | {"boxes": one["boxes"] * 1331 / 1242} for one in perfect]
moved = data.evaluate(resized, val)
print(f"pixels of the resized image: AP {moved['AP']:.3f}, AP50 {moved['AP50']:.3f}")
assert moved["AP"] < 0.5


def shares(index):
    """IoU of each object of an image with its own box in pixels of the resized image."""
    return box_iou(truths[index]["boxes"], resized[index]["boxes"]).diag()


# A scene with three objects and no ignored regions; one object is still found.
chosen = next(i for i in range(len(val)) if len(truths[i]["labels"]) == 3
              and len(truths[i]["ignore"]) == 0 and (shares(i) > 0.5).sum() == 1)
print("IoU: " + ", ".join(f"{val.classes[label]} {iou:.3f}" for label, iou
                          in zip(truths[chosen]["labels"], shares(chosen))))
plots.predictions(val.raw(chosen)[0], resized[chosen], val.classes, truth=truths[chosen])

# %% [markdown]
# A box is moved by 7 % of its distance from the top left corner. Near it, and for large objects,
# that matters little; elsewhere the number looks like bad localisation, and only the picture shows
# the bug.
#
# ## 2. First debugging step: overfit a few images
#
# A detector that never learns a handful of images by heart has a bug, or a wrong learning rate.
# Train and evaluate on the *same* two images, without augmentation. On frames of real KITTI
# (layouts: section 3), some 6 CPU minutes (own classes: `--class-map Car,Dog`; COCO's layout:
# `--data coco`, and `val` for both `all`):
#
#     . .venv/bin/activate
#     python train.py fit --recipe toy-student --data kitti --root DIR --limit 2 \
#         --train-split all --val-split all --size 160,600 --no-augment --steps 1800 \
#         --batch-size 2 --warmup 30 --ema 0.95 --eval-every 200 --out runs/overfit
#
# Two frames with 11 objects (of section 4's folder of cyclists, with its labels; yours will differ)
# had AP50 1.00 from step 600 on, and AP 1.00 at the end. With `--steps 900` the learning rate falls
# sooner, and AP50 ended at .50: cars found, cyclists not (one run each). So where AP50 is not near
# 1, double the steps before you look for the bug.
#
# **Claim.** It can fail although nothing is broken. What is evaluated is a moving average of the
# weights, which must reach back over a small part of the run only (`--ema`). Here is the same run
# twice, on the toy: the training is the same, only the average differs.

# %%
def overfit(ema):
    """-> [(step, AP50)] of a student that is trained and evaluated on the same two images."""
    cfg, run = train.configure(
        "fit", recipe="toy-student", train_split="val", val_split="val", limit=2, augment=False,
        steps=150, batch_size=2, warmup=30, ema=ema, eval_every=25, workers=0,
        out=tempfile.mkdtemp())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = train.fit(cfg, run)
    return [(point["step"], point["AP50"]) for point in result["history"]]


remembered = {f"--ema {ema}: over some {round(1 / (1 - ema))} steps": overfit(ema)
              for ema in (0.95, 0.99)}
(_, quick), (_, slow) = (history[-1] for history in remembered.values())
assert quick > 0.9 and slow < 0.1
figure = plots.curves(remembered, "AP50 on the same two images", "Two images learned by heart")
figure.axes[0].set_ylim(-0.05, 1.05)
figure

# %% [markdown]
# AP50 near 1 says that images, boxes, labels and AP agree *with each other*. A mistake that
# training and evaluation share, such as boxes that are all shifted, is learned by heart too: for
# that, look at the boxes on the images.
#
# ## 3. The folders
#
# **KITTI** (object benchmark): left colour images and training labels,
#
#     ROOT/training/image_2/000000.png ...  007480.png
#     ROOT/training/label_2/000000.txt ...  007480.txt     a line per object: type, truncated, ...
#
# **COCO**: train2017, val2017 and the instance annotations,
#
#     ROOT/train2017/*.jpg    ROOT/annotations/instances_train2017.json
#     ROOT/val2017/*.jpg      ROOT/annotations/instances_val2017.json
#
# Your own data may come in either layout; files of YOLO or VOC have to be converted to COCO's. A
# detector gets the classes of a COCO file; in KITTI's layout name yours, `--class-map Car,Dog`. The
# file names that are understood stand at the top of [data.py](../data.py).
#
# **Of KITTI's types none is lost silently.** The class map decides which are objects. All others
# are *ignored*: detections there count neither way. `kitti3` is the default, the three classes of
# the authors' earlier public code. Converters often make background of the ignored types: so does
# `data.build(..., others="background")`.
#
# | class map | Car | Van | Truck | Pedestrian | Person_sitting | Cyclist | Tram, Misc | DontCare |
# |---|---|---|---|---|---|---|---|---|
# | `kitti3` | Car | ignored | ignored | Pedestrian | ignored | Cyclist | ignored | ignored |
# | `kitti3_merged` | Car | Car | ignored | Pedestrian | Pedestrian | Cyclist | ignored | ignored |
# | `kitti8` | own | own | own | own | own | own | own | ignored |
# | `kitti3`, `others="background"` | Car | background | background | Pedestrian | background | Cyclist | background | ignored |
#
# **The split is a rule, not a draw**: of the 7,481 ids, sorted by the SHA-256 of
# `clockdistill-kitti-ID`, the first fifth is `val`. Any program can rebuild it, and any folder is
# split by it. Another split is a text file of ids: `--train-split`, `--val-split`.
#
# Put your folder into the next cell, and it shows your images; keep such outputs to yourself where
# the images have their own licence. The marker over a box says its class; hatched regions count
# neither way. **Look for** a box that does not hug its object, and for an object without a box. (On
# the toy the red kiosk and the parked bicycle are clutter: background, not lost labels.)

# %%
# COCO's layout: "coco" and "val". Own classes in KITTI's layout: add class_map="Car,Dog".
mine = dict(name="kitti", root="datasets/toy", split="all")
train_ids, val_ids = data.split_ids(data.KITTI_IDS)
print(f"{len(train_ids)} train + {len(val_ids)} val = {len(train_ids) + len(val_ids)}; "
      f"val begins {val_ids[:6]}")
frames = data.build(**mine, limit=2)
print(frames.summary)
pictures, shown = zip(*(frames.raw(index) for index in range(2)))
figure = plots.detections(pictures, shown, {}, frames.classes)
for axes in figure.axes:
    for marker in axes.lines:                            # large, as the picture fills the page
        marker.set(markersize=8, markeredgewidth=1)
figure

# %% [markdown]
# ## 4. Small real runs, and what they taught
#
# `small-teacher` and `small-student` are made for a few hundred real frames and two CPU cores. The
# three runs take some 100, 32 and 38 CPU minutes, up to three times that by the clock; `--teacher
# weights/kitti_teacher_dino.safetensors` spares the first:
#
#     make kitti-backbones; . .venv/bin/activate          # two ImageNet backbones, by pip
#     C=splits/kitti_cyclists; SPLITS=(--train-split ${C}_train.txt --val-split ${C}_tune.txt)
#     python train.py fit     --recipe small-teacher --root DIR ${SPLITS[@]} --out runs/teacher
#     python train.py fit     --recipe small-student --root DIR ${SPLITS[@]} --out runs/alone
#     python train.py distill --recipe small-student --root DIR ${SPLITS[@]} --out runs/both \
#         --teacher runs/teacher --teacher-cache 2
#
# They train on 703 frames and measure on the 90 for tuning; without the splits a run trains on all
# 5,985. On 198 others distilling gains +.042 AP (+.020 to +.064, five seeds; [notebook
# 3](3_ablations.ipynb)). [One command](../results/kitti/README.md#make-it) makes those runs; their
# `distill` adds `--balance memory=3.125 cls+l1+giou=0.0625` (the default is sixteen times both).
# Their labels are not KITTI's official ones ([how they
# differ](../results/kitti/README.md#what-this-does-not-say)), which give other numbers.
#
# **Your own folder:** the same three commands, each with another `--out`, and with `--data coco`,
# or with `--class-map Car,Dog` in KITTI's layout, and without `${SPLITS[@]}`. In COCO's layout
# leave out `--teacher-cache`. Images shrink to at most 424 x 128 (640 x 480 to 170 x 128); for
# another size give all three the same `--size SHORT,LONGEST`.
#
# Five lessons. 1 to 4 are of DINO on the 90 frames, which no table uses, with **one run of each
# setting**, hence no intervals ([the plan](../results/kitti/PLAN.md)):
#
# 1. **Length before anything else.** The student alone has AP .270 after 1,600 steps, and .339
#    after twice as many. The recipe's 2,400 are too few as well (on `val` twice as many give +.043,
#    one run): a gain may be speed alone.
# 2. **A curve that flattens may still be far from its best.** It can flatten as the learning rate
#    falls (picture below).
# 3. **Check that the teacher is better, and that it reads the image.** `small-teacher` ends .058
#    above the student with as many steps. Asked with its learned contents at the true boxes, moved
#    by noise, it names 98 % of the classes right from an image's own memory, and 48 % from another
#    image's (always *Car*: 64 %; `reading` in [look.py](../experiments/look.py) measures it).
# 4. **A larger image costs time; what it gains was not tried.** At 424 x 128 half of the objects
#    are less than 20 pixels high, and after 1,600 steps AP is .122 for small objects, .379 for
#    large ones. At 530 x 160 a step takes 1.6 times as long.
# 5. **The teacher need not encode an image twice.** Images are only flipped: with `--teacher-cache
#    2` (GB) a distilled step takes 0.9 CPU seconds in place of 1.3 to 1.5.
#
# **Look at** step 1,600: the same student, once at the end of its schedule and once in the middle
# of a longer one.

# %%
figure = plots.curves({                                  # (step, AP), of results/kitti/PLAN.md
    "schedule of 1,600 steps": [(400, .110), (800, .193), (1200, .253), (1600, .270)],
    "schedule of 3,200 steps": [(800, .190), (1600, .285), (2000, .316), (2400, .332),
                                (2800, .340), (3200, .339)]},
    "AP", "DINO student alone, real KITTI: one student, two schedules")
figure.axes[0].set_xticks(range(400, 3201, 400))
figure.axes[0].axvline(1600, color="black", linewidth=1, linestyle=":")
figure

# %% [markdown]
# At step 1,600 the student whose learning rate is still high is no worse than the one whose
# schedule has ended (.285 and .270, one run each), and it goes on to .339.
#
# ## 5. The paper's size: decisions, and the cost
#
#     python train.py fit     --recipe kitti-teacher --root DIR --out runs/r50
#     python train.py fit     --recipe kitti-student --root DIR --out runs/r18
#     python train.py distill --recipe kitti-student --root DIR --out runs/r18-distilled \
#         --teacher runs/r50
#
# `coco-*` likewise; `--detector` chooses one of three. A ResNet-50 teaches a ResNet-18, our choice.
# Learning rates and epochs are the detectors' official ones for COCO; on KITTI as many epochs see a
# twentieth of the images (untried). Only the paper's abstract was read: no setting is confirmed to
# be the paper's.

# %%
for recipe in ("kitti-student", "coco-student"):
    for detector, settings in train.RECIPES[recipe].items():
        cfg = train.Config(**settings)
        print(f"{recipe:13} {detector:15} lr {cfg.lr:g}, backbone {cfg.backbone_lr:g}; "
              f"{cfg.batch_size:2} images per step and process; {cfg.epochs:g} epochs")
        assert cfg.balance == train.RATIOS == {"memory": 50, "cls+l1+giou": 1}

# %% [markdown]
# Four things need your decision.
#
# - **The learning rate belongs to a total batch**: 16 images, Deformable DETR 32. The KITTI
#   commands above and `table kitti` have 8 per process, as in the authors' earlier public code. On
#   one GPU add `--batch-size 16` (or 32), with `--accumulate` if it does not fit, or lower `--lr`
#   and `--backbone-lr` (untried).
# - **The weights are ratios of gradients**, 50 for the memory part and 1 for the logit part
#   (`cls+l1+giou`), chosen on the toy. On small KITTI a sixteenth of both tied and four times both
#   was worse; on digits all is undecided (one run each). At full size nothing tunes them.
# - **Contents and S** are as the method is described: DINO's queries ask with labels (the others'
#   with a random row per class), and the scale mask is on. `--method-options preset=DETECTOR` takes
#   the small recipes' options, with the teacher's own contents (untried at full size). What is
#   shown of both: [notebook 3](3_ablations.ipynb).
# - **The start** is an ImageNet backbone. 5,985 images are few for a DETR: a detector trained on
#   COCO (section 6) should be the better start, above all for the teacher.
#
# **What it costs.** `python train.py table kitti --dry-run` prints every run with its command, its
# GPU-hours and its memory, and trains nothing. **An estimate**, at 20 TFLOP/s of useful work
# (`--tflops`): with the recipes' 8 images every KITTI run fits on one 24 GB card in fp32, and the
# tables take it days. With 16 (add `-- --batch-size 16`) DINO and Deformable DETR need 25 to 34 GB;
# what `--accumulate` saves is not counted. Its first lines and its last:

# %%
said = io.StringIO()
with contextlib.redirect_stdout(said):
    train.main(["table", "kitti", "--dry-run"])
costs = [line for line in said.getvalue().splitlines() if "GPU-hours" in line]
short = [re.sub(r"-\w{8}-0:", ":", line) for line in costs[:9]]     # without the runs' digests
print(*short, textwrap.fill(costs[-1], 98), sep="\n")
memory = max(float(line.split()[-2]) for line in costs[:-1])
hours = float(costs[-1].split()[2])
assert 24 < hours < 24 * 7 and memory < 24

# %% [markdown]
# COCO has 20 times the images, of up to twice the pixels: months on one card, not days. `--only
# main` makes the table of the three detectors alone. Where a batch does not fit, `--accumulate N`
# splits it into N parts; the gradient is then not quite the whole batch's.
#
# <details><summary>Published scores to check your runs by (COCO val2017, box AP)</summary>
#
# | detector | teacher R50 | student R18 alone |
# |---|---|---|
# | DAB-DETR, 50 epochs | 42.2 (its README) | 36.2 ([KD-DETR](https://arxiv.org/abs/2211.08071)) |
# | Deformable DETR, 50 epochs | 44.5; with refinement 46.2 (its README) | 40.0, named "25e" (DETRDistill's README) |
# | DINO 4-scale, 12 epochs | 49.0 (its README) | none known |
#
# On KITTI we know of no number that is comparable. The paper's abstract says gains of 2.2 to 6.4 %
# over three detectors and both data sets, not whether relative or in points.
# </details>
#
# ## 6. A published teacher
#
# For COCO a teacher need not be trained:
#
#     python train.py fit --recipe coco-teacher --root DIR --init-from FILE --steps 0 \
#         --out runs/coco
#
# loads it, evaluates it and writes what `distill --teacher` reads. One line reports what was
# loaded, resized, skipped and missing.
#
# **For KITTI, train it further:** `kitti-teacher`, and no `--steps 0`, which is refused. Rows of
# the class head go to their namesakes, COCO's *car* to KITTI's *Car*; but a *Pedestrian* starts
# anew, since COCO says *person*.
#
# Detectors differ in what no tensor shows: how many heads attention has, the temperature of the
# position encoding. **Claim.** What a file says of itself, or what its program usually has, is
# compared with your model; a difference is refused in one line with the remedy (of `fit`: `--heads
# 8`). Here the toy's teacher is the file.

# %%
FILE = "weights/toy_teacher_dino.safetensors"
checkpoints.load_weights(models.build("dino", 3, **teacher.config), FILE)
other = models.build("dino", 3, **teacher.config | {"heads": 4})        # the same shapes
try:
    checkpoints.load_weights(other, FILE)
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(textwrap.fill(refusal, 98, subsequent_indent="    "))
assert "heads=8" in refusal and "\n" not in refusal

# %% [markdown]
# <details><summary>What is read, by the names in the file</summary>
#
# *Yes*: [tested](../tests/test_checkpoints.py) against the program's names or a live model. No
# published file was loaded.
#
# | program | DAB-DETR | Deformable DETR (plain, refine, two-stage) | DINO |
# |---|---|---|---|
# | the official repositories | yes | yes | yes |
# | MMDetection 3.x | yes, but for one eps | yes (2.x too) | yes, but for one eps |
# | Hugging Face, files and `hf:ORGANISATION/MODEL` | yes | yes | (has none) |
# | detrex | yes | yes | yes |
# | torchvision (backbones) | yes | yes | yes |
#
# MMDetection's DINO and DAB-DETR use two eps of the inverse sigmoid, ours one: boxes differ where a
# reference lies within 0.001 of the image's edge. Of detrex's DINO the file of 12 epochs is
# assumed; those of 24 and 36 have another position encoding: add `--made-with
# position_temperature=20 position_offset=0`.
# </details>
#
# `distill` refuses a teacher below `--teacher-floor` AP (.05): it was hardly loaded.
#
# ## Before you pay for a table
#
# 1. `data.build(...).summary`: counts of images, objects, ignored, clipped and dropped boxes are
#    what you expect.
# 2. Overfit two images (section 2).
# 3. On KITTI: `--init-from` a detector trained on COCO, where you have one (untried here).
# 4. `train.py eval` of the teacher on your `val`, with `--eval-batch 1`: near its published AP, or
#    it was not loaded. And clearly above the student alone.
# 5. The student alone at two lengths: if twice the steps still raise its AP, train longer first.
# 6. `train.py table kitti --dry-run`, then one short run of each kind; read `report` of step 200 in
#    its `log.jsonl` ([notebook 1](1_the_method.ipynb) says what to look for; at step 0 all parts
#    are off).
#
# ## Exercises
#
# **1.** Give each of the perfect detector's images 50 random boxes more. *Predict before you run
# it*: what is AP when all of them score below the right boxes, and what when all score above?
#
# <details><summary>Answer</summary>
#
# ```python
# def with_false_alarms(score):
#     torch.manual_seed(0)
#     answers = []
#     for one in perfect:
#         corner, size = torch.rand(50, 2) * 40, torch.rand(50, 2) * 8 + 1
#         boxes = torch.cat([one["boxes"], torch.cat([corner, corner + size], 1)])
#         labels = torch.cat([one["labels"], torch.randint(3, (50,))])
#         scores = torch.cat([torch.full((len(one["boxes"]),), 0.5), torch.full((50,), score)])
#         answers.append(one | {"boxes": boxes, "labels": labels, "scores": scores})
#     return data.evaluate(answers, val)["AP"]
# below, above = with_false_alarms(0.1), with_false_alarms(0.9)
# print(f"{below:.3f} {above:.3f}")
# assert below > 0.999 and above < 0.2
# ```
# 1.000 and 0.080. AP asks only for the *order* of scores: false alarms that rank below
# every right box cost nothing, however many there are. So a detector that draws hundreds of boxes
# may have a good AP, and a threshold for a picture has to be chosen on other grounds.
# </details>
#
# **2.** You train `kitti-student` for DINO on four GPUs with the recipe's 8 images per process.
# Which total batch is the recipe's learning rate meant for, which do you have, and what does the
# code do about it?
#
# <details><summary>Answer</summary>
#
# 1e-4 is DINO's official rate for 16 images. You have 32. The code does nothing: no rate is scaled
# silently. Give `--batch-size 4`, or choose `--lr` yourself, and say so beside the table. Which is
# better on KITTI has not been measured.
# </details>
#
# **3.** `kitti3` reads *Van* as ignored. Read it as background instead, and evaluate a detector
# that is perfect, but calls each van a car. *Predict before you run it*: which AP falls, Car's
# alone or all three?
#
# <details><summary>Answer</summary>
#
# ```python
# def as_van(columns):                                 # the toy has no vans: its ignored regions
#     return ["Van", *columns[1:]] if columns[0] == "DontCare" else columns
#
# ignored = rewritten("vans", as_van)
# background = data.build("kitti", SCRATCH / "vans", "all", size=(48, 160), others="background")
# answers = []
# for one, truth in zip(perfect, truths):
#     vans = truth["ignore"]
#     cars = torch.zeros(len(vans), dtype=torch.long)
#     answers.append({"image_id": one["image_id"], "boxes": torch.cat([one["boxes"], vans]),
#                     "labels": torch.cat([one["labels"], cars]),
#                     "scores": torch.ones(len(one["labels"]) + len(vans))})
# for dataset in (ignored, background):
#     scores = data.evaluate(answers, dataset)
#     print(scores["AP"], {name: one["AP"] for name, one in scores["per_class"].items()})
# assert scores["per_class"]["Car"]["AP"] < 0.7 and scores["per_class"]["Cyclist"]["AP"] > 0.999
# ```
# Car's alone, from 1.000 to .636, since a class's false alarms count against that class. AP, the
# mean, falls to .879: the same detections, another number.
# </details>
#
# **4.** In a frame of 424 x 128 pixels a far pedestrian has a box of 4 x 9 pixels, a near car one
# of 120 x 60. *Predict before you run it*: how many times the pedestrian's is the car's weight in
# the memory loss without $S$ (`scale=False`), and how many times with it?
#
# <details><summary>Answer</summary>
#
# ```python
# from clockdistill import memory_weights
#
# shapes = [(16, 53), (8, 27), (4, 14)]                       # strides 8, 16 and 32
# size = torch.tensor([424., 128., 424., 128.])
# pedestrian = torch.tensor([[84., 60., 4., 9.]]) / size      # cx, cy, w, h
# car = torch.tensor([[300., 70., 120., 60.]]) / size
# valid = torch.ones(1, 1120, dtype=torch.bool)
# for options in dict(scale=False), {}:
#     small, large = (memory_weights([box], shapes, valid, beta=0, **options).sum()
#                     for box in (pedestrian, car))
#     print(options, f"{large / small:.1f}")
# ```
# 25 times, not the 200 times of the areas: the smallest box owns a cell on each level. With $S$
# they weigh the same. Whether that gains AP on real KITTI is undecided.
# </details>
