# %% [markdown]
# # 2 What the encoder memory holds, and where decoders look
#
# A distilled student copies two things: what the teacher's encoder **remembers** of an image, and how its decoder
# **reads** this memory when both are asked about the same objects. Here both are looked at, for DAB-DETR, Deformable
# DETR and DINO: the teacher, the student before training, trained alone, and distilled. All pictures and numbers are
# of images that nobody was trained on.
#
# Four things to take home, all measured below:
#
# 1. On objects the distilled memory is nearly the teacher's as it is; that of a student alone is not, even when the
#    best linear map may translate it. On the background it need not be any closer.
# 2. An attention map need not lie on the object, least of all a dense one.
# 3. Attention that agrees with the teacher's need not have been learned: in DINO a decoder that has seen no image
#    agrees as much, and distillation adds nothing. In the other two it does.
# 4. A teacher asked what it was never trained on misleads, and its confidence does not always tell.

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "notebooks":        # the modules are a folder of files, not a package
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import math

import torch
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch.testing import assert_close
from torch.utils.data import Subset
from torchvision.ops import box_convert, box_iou

import data
import models
from experiments import plots
import train
from clockdistill import CLoCKDistill, location_mask

# %matplotlib inline
torch.set_num_threads(1)
SIDE, GRID = (160, 48), (6, 20)               # width and height of the images in pixels; (H, W) of their stride-8 cells
ROLES = ("teacher", "student", "distilled")
NAMES = {"dab_detr": "DAB-DETR", "deformable_detr": "Deformable DETR", "dino": "DINO"}
FLOOR = {"color": plots.INK, "marker": "|", "markersize": 11, "markeredgewidth": 1.6}       # of what needs no learning

# %% [markdown]
# The drawings that only this notebook needs. Nothing of the detectors is in this cell: skip it.


# %%
def scene(axes, picture, title="", **how):
    """A picture, or a map of cells, over the whole image."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8, pad=3)
    return axes.imshow(picture, extent=(0, SIDE[0], SIDE[1], 0), **how)


def outline(axes, boxes, color="white", style="-", width=1.0):
    """Rectangles (K, 4) in pixels, with a dark edge."""
    for x0, y0, x1, y1 in boxes.tolist():
        for line in (dict(edgecolor="black", linewidth=width + 1.2, alpha=0.4),
                     dict(edgecolor=color, linewidth=width, linestyle=style)):
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **line))


def tidy(axes, title="", xlabel="", ylabel=""):
    plots.plain(axes, xlabel, ylabel)
    axes.margins(x=0.05)
    axes.set_title(title, fontsize=9, loc="left")


# Three components -> red, green, blue: light, blue against yellow, red against green. Most of the picture is in the
# first two, which a red-green weakness leaves alone.
MIX = torch.tensor([[0.30, 0.30, 0.30], [0.20, 0.20, -0.40], [0.20, -0.20, 0.0]])


def coloured(tokens, mean, components, spread):
    """Memory tokens (.., D) -> colours (.., 3) by principal components (D, 3), up to twice their spread (3,)."""
    return (0.5 + ((tokens - mean) @ components / spread / 2).clamp(-1, 1) @ MIX).clamp(0, 1)


def memory_picture(index, readings, bases, columns):
    """For each detector the teacher's memory of one image and the columns' version of it in colours; below, errors."""
    figure = Figure(figsize=(9, 0.7 + 1.75 * len(readings)), layout="constrained")
    grid, (picture, truth), cells = figure.subplots(2 * len(readings), 4), val.raw(index), math.prod(GRID)
    for detector, found, above, below in zip(readings, readings.values(), grid[::2], grid[1::2]):
        teacher, inside = found["teacher"][index, :cells], found["inside"][index, :cells]   # (120, 64), (120,)
        scene(below[0], picture)
        for name, top, bottom in zip(("teacher", *columns), above, below):
            tokens = found[name][index, :cells]
            title = f"{NAMES[detector]}: teacher" if name == "teacher" else name + ", mapped" * ("as it is" not in name)
            scene(top, coloured(tokens, *bases[detector]).unflatten(0, GRID), title)
            if name != "teacher":
                error = (tokens - teacher).square().sum(1) / found["variance"]
                drawn = scene(bottom, error.unflatten(0, GRID), vmin=0, vmax=1.5, cmap="viridis",
                              title=f"error: objects {error[inside].mean():.2f}, rest {error[~inside].mean():.2f}")
        for axes in (*above, *below):
            outline(axes, truth["boxes"], width=0.7)
    bar = figure.colorbar(drawn, ax=grid, location="bottom", aspect=70, pad=0.01)
    bar.set_label("squared error of a token / variance of the teacher's memory (1: no better than the mean)",
                  fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle("The teacher's memory in colours, what the students have of it, and what they miss", fontsize=10)
    return figure


def mistakes(told):
    """For each detector three answers (see `answers`), in pictures cut out around the object that was asked about."""
    figure = Figure(figsize=(9, 0.3 + 1.75 * len(told)), layout="constrained")
    for row, (detector, worst) in zip(figure.subplots(len(told), 3, squeeze=False), told.items()):
        row[0].set_ylabel(NAMES[detector], fontsize=9)
        for axes, one in zip(row, worst):
            scene(axes, val.raw(one["index"])[0],
                  f"asked about a {val.classes[one['label']]}, says {val.classes[one['said']]},\n"
                  f"w {one['w']:.2f}, IoU {one['iou']:.2f}")
            outline(axes, one["truth"][None], style=":", width=1.6)
            outline(axes, one["box"][None], plots.TEACHER, width=1.6)
            x, y = (one["truth"][:2] + one["truth"][2:]).tolist()                           # twice the middle
            left, top = min(max(x / 2 - 40, 0), SIDE[0] - 80), min(max(y / 2 - 20, 0), SIDE[1] - 40)
            axes.set(xlim=(left, left + 80), ylim=(top + 40, top))
    figure.suptitle("Confident and wrong: asked about the dotted box, the teacher answers with the solid one",
                    fontsize=10)
    return figure


def confidence(curves, shares):
    """curves: detector -> [(w, part wrong, answers)]; shares: detector -> part wrong (plain, weighted with w, own)."""
    figure = Figure(figsize=(9, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    marks = dict(zip(curves, (dict(marker="s", linestyle="-"), dict(marker="o", linestyle="--"),
                              dict(marker="^", linestyle=":"))))
    for row, (detector, curve) in enumerate(curves.items()):
        w, part, count = torch.tensor(curve).T
        half = 1.96 * (part * (1 - part) / count).sqrt()
        left.errorbar(w, part, torch.stack([torch.minimum(half, part), torch.minimum(half, 1 - part)]), capsize=2,
                      color=plots.TEACHER, linewidth=1.4, label=NAMES[detector], **marks[detector])
        plain, weighted, own = shares[detector]
        right.plot([plain, weighted], [-row, -row], color=plots.TEACHER, linewidth=1.4)
        right.plot(plain, -row, "o", color=plots.TEACHER, markerfacecolor="white", markersize=8)
        right.plot(weighted, -row, "o", color=plots.TEACHER, markersize=6)
        right.plot(own, -row, "x", color=plots.INK, markersize=7, markeredgewidth=1.6)
    tidy(left, "Less sure, more often wrong? (bars: 95 % interval)", "w of the answer (five groups of equal size)",
         "part that is wrong")
    left.set_ylim(0, 1.04)
    left.legend(fontsize=8.5, frameon=False)
    tidy(right, "What w takes away", "part of the weight that lies on wrong answers")
    right.set(xlim=(0, 1.04), ylim=(0.6 - len(curves), 0.5))
    right.set_yticks([-row for row in range(len(curves))], [NAMES[detector] for detector in curves])
    keys = {"each answer weighs 1": dict(marker="o", color=plots.TEACHER, markerfacecolor="white", markersize=8),
            "weighted with w": dict(marker="o", color=plots.TEACHER, markersize=6),
            "its own queries": dict(marker="x", color=plots.INK)}
    right.legend(handles=[Line2D([], [], linestyle="none", label=label, **style) for label, style in keys.items()],
                 fontsize=8.5, loc="lower right", frameon=False)
    return figure


# %% [markdown]
# ## The models
#
# The student before training is the same architecture with fresh weights. The target-aware queries have the contents
# of each detector's preset, `own`: the teacher's learned ones. With label embeddings the class would stand in the
# question.


# %%
def file(role, detector):
    return f"weights/toy_{role}_{detector}.safetensors"


def family(detector):
    """name -> model: the teacher, and the student before training, trained alone, and distilled."""
    teacher, student, distilled = (train.load_model(file(role, detector))[0] for role in ROLES)
    torch.manual_seed(0)
    fresh = models.build(detector, student.num_classes, **student.config).eval()
    return {"teacher": teacher, "untrained": fresh, "student": student, "distilled": distilled}


def questions(detector, teacher):
    """A function from a target to target-aware queries about its true boxes, without noise."""
    method = CLoCKDistill(64, 64, content=train.PRESETS[detector]["content"])
    contents = {"label": teacher.label_embedding, "own": teacher.learned_content}[method.content]
    return lambda target: method.queries([target["labels"]], [target["boxes"]], contents)


data.make_toy("datasets/toy")
val, tune = (data.build("toy", "datasets/toy", split) for split in ("val", "tune"))
families = {detector: family(detector) for detector in models.DETECTORS}
asking = {detector: questions(detector, found["teacher"]) for detector, found in families.items()}
for detector, found in families.items():
    told = {role: train.load_payload(file(role, detector)) for role in ROLES}
    sizes = {role: sum(p.numel() for p in found[role].parameters()) / 1e6 for role in ROLES}
    print(f"{NAMES[detector]:15} " + ", ".join(f"{role}: AP {one['metrics']['AP']:.3f}, {sizes[role]:.2f} M parameters"
                                            for role, one in told.items()))
    print(" " * 15, "distilled with", *told["distilled"]["settings"]["method_options"])

# %% [markdown]
# ## What the memory holds
#
# The memory is the encoder's output, a vector of 64 numbers for each cell of the feature maps. Its **length** says
# nothing: each encoder layer ends in a LayerNorm, so all tokens are about √64 = 8 long. What they hold is in the
# directions. Below are the first three principal components of the teacher's memory (finest level) as colours.
#
# A student has coordinates of its own, unless it is taught others. So a student trained alone gets help: the best
# linear map from its memory to the teacher's, by least squares on 60 images of `tune`. The distilled one is shown as
# it is.


# %%
@torch.no_grad()
def memories(model, dataset, count):
    """Memory of the first `count` images: tokens (count, S, D), and which of them lie on an object, (count, S)."""
    tokens, inside = [], []
    for batch in data.eval_loader(Subset(dataset, range(count)), 20):
        memory = model.encode(batch.images, batch.padding)
        tokens.append(memory.tokens)
        inside += [torch.cat([location_mask(target["boxes"], *shape)[0].flatten() for shape in memory.shapes])
                   for target in batch.targets]
    return torch.cat(tokens), torch.stack(inside)


def components(tokens):
    """Mean (D,), the first three principal components (D, 3) of tokens (N, D), and their spread (3,)."""
    mean = tokens.mean(0)
    variances, axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))  # ascending
    axes = axes[:, -3:].flip(1)
    return mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign(), variances[-3:].flip(0).sqrt()


def with_one(tokens):
    return torch.cat([tokens, torch.ones_like(tokens[..., :1])], -1)


IMAGES, SCENE, cells = 40, 4, math.prod(GRID)
readings, bases = {}, {}
for detector, found in families.items():
    fit = {name: memories(model, tune, 60)[0] for name, model in found.items()}             # (60, S, 64) each
    kept = {name: memories(model, val, IMAGES)[0] for name, model in found.items()}         # (40, S, 64) each
    read = {"teacher": kept["teacher"], "place alone": fit["teacher"].mean(0).expand_as(kept["teacher"])}
    for name in ("untrained", "student", "distilled"):
        linear = torch.linalg.lstsq(with_one(fit[name]).flatten(0, 1), fit["teacher"].flatten(0, 1)).solution
        read[name] = with_one(kept[name]) @ linear                                          # (40, S, 65) @ (65, 64)
        read[name + ", as it is"] = kept[name]
    fine = kept["teacher"][:, :cells].flatten(0, 1)
    bases[detector] = components(fine)
    readings[detector] = read | {"inside": memories(found["teacher"], val, IMAGES)[1],
                                 "variance": fine.var(0, unbiased=False).sum()}
    assert all(0.8 * 8 < tokens.norm(dim=-1).mean() < 1.2 * 8 for tokens in kept.values())
memory_picture(SCENE, readings, bases, ("untrained", "student", "distilled, as it is"))

# %% [markdown]
# **Claim.** The distilled memory needs no map: as it is, it explains most of the variance of the teacher's on
# objects. That of a student trained alone is unrelated as it is (below 0, worse than the mean: it is printed, and left
# of the picture), and mapped it explains less. The floor is what knowing a token's place explains. On the background,
# which weighs little in the memory loss, the distilled memory follows less closely: as it is, with DAB-DETR hardly
# better than a token's place alone.


# %%
def explained(wanted, found):
    """R^2, what part of the variance of `wanted` (N, D) is explained by `found`: 0 like the mean, 1 a copy."""
    return float(1 - (wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())


parts = {"on objects": {}, "on the background": {}}
for detector, found in readings.items():
    for heading, mask in zip(parts, (found["inside"], ~found["inside"])):
        parts[heading][detector] = {name: explained(found["teacher"][mask], found[name][mask]) for name in found
                                    if name not in ("teacher", "inside", "variance")}
    objects, background = (rows[detector] for rows in parts.values())
    for heading, rows in parts.items():
        print(f"{NAMES[detector]:15} {heading}: "
              + ", ".join(f"{name} {value:.2f}" for name, value in rows[detector].items()))
    assert objects["student, as it is"] < 0 < 0.5 < objects["distilled, as it is"]
    assert objects["distilled, as it is"] > objects["student"] + 0.05 > objects["untrained"]
    assert background["distilled, as it is"] < objects["distilled, as it is"]
    assert detector != "dab_detr" or background["distilled, as it is"] < background["place alone"] + 0.1

drawn = ("untrained", "student", "distilled", "distilled, as it is", "place alone")
figure = plots.dots(
    {f"part of the variance, {heading}":
     {"": {NAMES[detector]: {name: (numbers[name], 0.) for name in drawn} for detector, numbers in rows.items()}}
     for heading, rows in parts.items()},
    "How much of the teacher's memory is in the students': by the best linear map (full), as it is (hollow)",
    marks={"place alone": FLOOR, "distilled, as it is": {"markerfacecolor": "white"}})
for axes in figure.axes:
    axes.set_xlim(0, 1)
figure

# %% [markdown]
# ## Where three detectors look for one object
#
# In each decoder layer a query weighs places of the memory. Deformable DETR and DINO sample a few points around the
# query's reference on each level (dots, their area is the weight); DAB-DETR weighs every cell of one map. `gaze`
# below is one pass through a detector with all that its decoder looked at; in it learned queries and target-aware
# ones are decoded side by side. The picture has the learned queries that find the largest car.


# %%
def pixels(places):
    """Boxes (.., 4) cxcywh or points (.., 2), fractions of the image -> x0 y0 x1 y1 or x y, in pixels."""
    if places.shape[-1] == 4:
        places = box_convert(places, "cxcywh", "xyxy")
    return places * torch.tensor(SIDE).repeat(places.shape[-1] // 2)


@torch.no_grad()
def gaze(model, ask, index):
    """Where a model looks for the K true objects of image `index` of val.

    -> {"asked": by the target-aware queries, "own": by the learned query that fits each object best}, each with
    "layers", a plots.look of every decoder layer, and the answers "chances" (K, C) and "boxes" (K, 4) in pixels.
    """
    image, target = val[index]
    queries = ask(target)
    with models.record(model) as seen:
        output = model(image[None], torch.zeros_like(image[None, 0], dtype=torch.bool), extra=queries)
    learned, (own, extra) = model.learned_queries(output.memory)[0], (output.detections, output.extra)
    starts = pixels(torch.cat([learned.boxes, model.placed(models.Queries(*queries)).boxes], 1)[0])  # (Q + K, 4 or 2)
    boxes = pixels(torch.cat([own.boxes, extra.boxes], 2)[:, 0])                            # (L, Q + K, 4)
    chances = torch.cat([own.logits, extra.logits], 2)[-1, 0].sigmoid()                     # (Q + K, C)
    truth, count = pixels(target["boxes"]), own.logits.shape[2]
    fits = box_iou(truth, boxes[-1, :count]) * chances[:count, target["labels"]].T          # (K, Q)
    found = {}
    for kind, chosen in (("asked", count + torch.arange(len(truth))), ("own", fits.argmax(1))):
        layers = [plots.look(seen[f"decoder.{i}.cross"], output.memory.shapes, chosen, boxes[i], starts)
                  for i in range(model.decoder_layers)]
        found[kind] = {"layers": layers, "chances": chances[chosen], "boxes": boxes[-1, chosen]}
    return found


gazes = {detector: {name: [gaze(model, asking[detector], index) for index in range(IMAGES)]
                    for name, model in found.items()} for detector, found in families.items()}


def in_rows(layers, k):
    """Looks of one query in all layers -> a single look, a layer in each row."""
    one = {key: torch.stack([layer[key][k] for layer in layers]) for key in ("weights", "boxes", "references")}
    dense = isinstance(layers[0]["places"], tuple)
    return one | {"places": layers[0]["places"] if dense else torch.stack([layer["places"][k] for layer in layers])}


picture, (_, target) = val.pixels(SCENE), val[SCENE]
largest = {int(label): max((target["labels"] == label).nonzero().flatten().tolist(),        # of each class
                           key=lambda k: target["boxes"][k, 2:].prod()) for label in target["labels"].unique()}
car = largest[val.classes.index("Car")]
plots.query_attention(picture, {NAMES[detector]: in_rows(found["teacher"][SCENE]["own"]["layers"], car)
                                for detector, found in gazes.items()}, ["layer 0", "layer 1", "layer 2"],
                      title="Where the teachers' learned queries look that find one car, layer by layer")

# %% [markdown]
# **Claim.** In the last layer most of the weight of sampling points lies in the object's box. Of DAB-DETR's dense
# attention most lies elsewhere, though the box gets several times its share of the image. An attention map is not a
# segmentation.


# %%
def inside(look, boxes):
    """What part of each query's attention lies in its box: (K,)."""
    covered = plots.even_mass(boxes, SIDE, *SIDE[::-1])                                     # (K, 48, 160)
    covered = covered / covered.amax((1, 2), keepdim=True)                                  # 1 in the box
    return (plots.attention_mass(look["places"], look["weights"], *SIDE[::-1]) * covered).sum((1, 2))


def mean_inside(gazes, kind, layer):
    return float(torch.cat([inside(one[kind]["layers"][layer], boxes) for one, boxes in zip(gazes, truths)]).mean())


truths = [pixels(val[index][1]["boxes"]) for index in range(IMAGES)]
area = float(torch.cat([(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in truths]).mean()) / math.prod(SIDE)
print(f"{IMAGES} images; a box is {area:.1%} of the image; of the attention of the teachers' own queries lies in it:")
for detector, found in gazes.items():
    shares = [mean_inside(found["teacher"], "own", layer) for layer in range(3)]
    print(f"{NAMES[detector]:15} " + ", ".join(f"layer {layer}: {share:.0%}" for layer, share in enumerate(shares)))
    assert 2 * area < shares[-1] < 0.5 if detector == "dab_detr" else shares[-1] > 0.5

# %% [markdown]
# ## The same question to teacher and student, before training and after
#
# Target-aware queries are made from the ground truth so that both decoders attend to consistent and accurate parts of
# the memory; that much the paper's abstract says. Here all models are asked about the same two true boxes. Dotted is
# where a query starts (the true box; of Deformable DETR only the middle, a cross), solid what the model answers. The
# titles say how far the map agrees with the teacher's: 1 is the same, 0 nowhere in common; the IoU, written where it is
# below .5, is that of the model's answer with the teacher's.
#
# Mind the column *untrained*. Sampling points start as a star around the reference, in DINO as large as the box:
# weights that have seen no image already "look at the object". DAB-DETR's untrained attention is spread over the
# image, so nothing is drawn.

# %%
for detector, found in gazes.items():
    shown = {name: {key: of if isinstance(of, tuple) else of[list(largest.values())]
                    for key, of in ones[SCENE]["asked"]["layers"][-1].items()} for name, ones in found.items()}
    rows = [f"asked about\nthis {val.classes[label]}" for label in largest]
    display(plots.query_attention(picture, shown, rows, GRID,
                                  title=f"{NAMES[detector]}: the same target-aware queries, last decoder layer"))

# %% [markdown]
# ## How far do they agree? A number, and its floor
#
# For every object of 40 images: the overlap of a student's map with the teacher's (`plots.agreement`), in the last
# decoder layer, on the 6 x 20 cells of stride 8. On such coarse cells much agrees by itself. The **floor** is a look
# spread evenly over the true box (`plots.even_mass`), for which nothing needs to be learned. It is about 0.75 for
# DINO, and low for DAB-DETR, whose teacher does not look into the box. Finer cells lower it, and the numbers of the two
# detectors that sample points; DAB-DETR's maps are no finer than these cells.
#
# Left, target-aware queries, the same for all (a student trained alone has never read their contents, but for
# DAB-DETR's, which are zeros; the distilled one was trained on them). Right, each model's own learned query that fits
# the object best: nobody told it where to look.
#
# **Claims.** In DAB-DETR and Deformable DETR a distilled student looks more like its teacher than one trained alone,
# by both kinds of queries. In DINO it does not, though its AP gains as much: by its own queries it agrees even a little
# less (the interval is over images, of one seed, and does not hold the seed's luck). Asked the same, the untrained, the
# lone and the distilled student all agree about as much as an even look does, and on finer cells less. There the number
# says that the queries start from the right box, and nothing of what was learned.


# %%
def over_images(values):
    """A number of each image -> mean, and half of its 95 % interval."""
    values = torch.tensor(values)
    return float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)


def agreements(kind, grid=GRID):
    """detector -> name -> [agreement with the teacher, mean over the objects of each image]."""
    found = {}
    for detector, seen in gazes.items():
        last = {name: [one[kind]["layers"][-1] for one in ones] for name, ones in seen.items()}
        maps = {name: [plots.attention_mass(look["places"], look["weights"], *grid) for look in looks]
                for name, looks in last.items()}
        teacher = maps.pop("teacher")
        maps["an even look"] = [plots.even_mass(boxes, SIDE, *grid) for boxes in truths]
        found[detector] = {name: [float(plots.agreement(a, b).mean()) for a, b in zip(teacher, of)]
                           for name, of in maps.items()}
    return found


asked, own, fine = agreements("asked"), agreements("own"), agreements("asked", (24, 80))
for heading, found in {"target-aware queries": asked, "learned queries": own,
                       "target-aware queries, on cells of 2 x 2 pixels": fine}.items():
    print(heading)
    for detector, numbers in found.items():
        closer, half = over_images([d - s for d, s in zip(numbers["distilled"], numbers["student"])])
        print(f"  {NAMES[detector]:15} " + ", ".join(f"{name} {over_images(of)[0]:.2f}" for name, of in numbers.items())
              + f"; distilled - student {closer:+.3f} ± {half:.3f}")
        assert abs(closer) < 0.05 if detector == "dino" else closer > half
print("of the attention of target-aware queries lies in the true box:")
for detector, found in gazes.items():
    print(f"  {NAMES[detector]:15} "
          + ", ".join(f"{name} {mean_inside(ones, 'asked', -1):.0%}" for name, ones in found.items()))
coarse, small = ({name: over_images(of)[0] for name, of in found["dino"].items()} for found in (asked, fine))
assert all(abs(coarse[name] - coarse["an even look"]) < 0.06 for name in ("untrained", "student", "distilled"))
assert small["an even look"] < coarse["an even look"] - 0.1 and small["an even look"] == max(small.values())
assert over_images(asked["dab_detr"]["an even look"])[0] < 0.4
panels = {"target-aware queries": asked, "own learned queries": own}
figure = plots.dots(
    {f"agreement with the teacher, {heading}":
     {"": {NAMES[detector]: {name: over_images(of) for name, of in numbers.items()}
           for detector, numbers in rows.items()}} for heading, rows in panels.items()},
    "Whose attention is like the teacher's? Left, what lies beyond an even look had to be learned; right, also the box",
    marks={"an even look": FLOOR})
for axes in figure.axes:
    axes.set_xlim(0, 1)
figure

# %% [markdown]
# ## A misleading teacher, and what the confidence weight does about it
#
# The logit part copies the teacher's answers to target-aware queries, right or wrong, each with the weight
#
#     w = max_c sigmoid(teacher's logit of class c)
#
# as third parties tell it and the authors' earlier code has it. An answer is **wrong** here when it names another
# class, or when its box and the true one have an IoU below 0.5. Of the wrong answers to 100 images, these have the
# largest w, one an image:


# %%
def answers(detector, count=100):
    """What a teacher says about each object of `count` images, "asked" and "own" as in `gaze`: lists of dicts, by w."""
    found = {"asked": [], "own": []}
    for index in range(count):
        target, truth = val[index][1], pixels(val[index][1]["boxes"])
        for kind, one in gaze(families[detector]["teacher"], asking[detector], index).items():
            w, said = one["chances"].max(1)                                                 # (K,), (K,)
            iou = box_iou(truth, one["boxes"]).diagonal()                                   # (K,)
            wrong = (said != target["labels"]) | (iou < 0.5)
            columns = {"truth": truth, "box": one["boxes"], "label": target["labels"], "said": said, "w": w, "iou": iou,
                       "wrong": wrong.float(), "index": torch.full_like(said, index)}
            found[kind] += [{key: of[k] for key, of in columns.items()} for k in range(len(truth))]
    return {kind: sorted(each, key=lambda answer: answer["w"]) for kind, each in found.items()}


told = {detector: answers(detector) for detector in families}
worst = {}
for detector, found in told.items():
    of_image = {int(answer["index"]): answer for answer in found["asked"] if answer["wrong"]}    # the last, largest w
    worst[detector] = sorted(of_image.values(), key=lambda answer: -answer["w"])[:3]
mistakes(worst)

# %% [markdown]
# **Claims.** The teachers of DINO and Deformable DETR are wrong more often where they are less sure. So w takes some
# of the wrong answers' influence away, but far from all. DAB-DETR's teacher is wrong nearly every time when it starts
# from a true box, and its confidence does not tell right from wrong. Its w is low throughout: where L_log is divided
# by the number of queries, the default, all of DAB-DETR's logit part becomes light. The toy's presets divide by the
# summed w, which takes that away again: there the logit part teaches mistakes. The best of its own queries (crosses)
# find most of the same objects.
#
# A likely reason: a teacher answers well what it was trained on. DINO's denoising queries start near true boxes.
# DAB-DETR's learned anchors are several times larger than the objects. Deformable DETR's queries have learned
# positions; target-aware ones get a frozen random map of the box instead.

# %%
curves, shares = {}, {}
for detector, found in told.items():
    w, wrong = (torch.stack([answer[key] for answer in found["asked"]]) for key in ("w", "wrong"))
    curves[detector] = [(float(a.mean()), float(b.mean()), len(a)) for a, b in zip(w.chunk(5), wrong.chunk(5))]
    plain, weighted = float(wrong.mean()), float((w * wrong).sum() / w.sum())
    by_own = sum(float(answer["wrong"]) for answer in found["own"]) / len(found["own"])
    named = sum(bool(answer["said"] != answer["label"]) for answer in found["asked"]) / len(wrong)
    shares[detector] = plain, weighted, by_own
    print(f"{NAMES[detector]:15} of {len(wrong)} answers {plain:.0%} are wrong ({named:.0%} already by class), of the "
          f"weight w {weighted:.0%}; of the best of its own queries {by_own:.0%}")
    if detector == "dab_detr":
        anchors = families[detector]["teacher"].anchors.weight.detach().sigmoid()[:, 2:] * torch.tensor(SIDE)
        objects = torch.stack([answer["truth"][2:] - answer["truth"][:2] for answer in found["asked"]])
        anchor, thing = (float(sides.prod(1).median()) for sides in (anchors, objects))
        print(" " * 15, f"median area: {anchor:.0f} pixels of its learned anchors, {thing:.0f} of the objects")
        assert plain > 0.8 and by_own < 0.4 and abs(weighted - plain) < 0.05 and anchor > 3 * thing
    else:
        assert curves[detector][0][1] > curves[detector][-1][1] + 0.1 and 0.3 * plain < weighted < 0.85 * plain
confidence(curves, shares)

# %% [markdown]
# ## Who hears whom
#
# In training the student decodes all its queries in one pass: DINO's denoising queries, the learned ones, the
# target-aware ones. **Claims.** Groups that know the truth are heard by no other: denoising groups see themselves and
# the learned queries, learned queries only one another, target-aware queries only one another. So asking costs
# detection nothing: with and without target-aware queries, the learned ones answer the same.

# %%
image, target = val[SCENE]
nothing = torch.zeros_like(image[None, 0], dtype=torch.bool)                                # no padding
for detector, found in families.items():
    with torch.no_grad():
        alone, beside = (found["distilled"](image[None], nothing, extra=extra).detections
                         for extra in (None, asking[detector](target)))
    assert_close(alone.logits, beside.logits, rtol=0, atol=1e-4)
    assert_close(alone.boxes, beside.boxes, rtol=0, atol=1e-5)

student = families["dino"]["distilled"]
student.training = True                       # of the outermost module alone: denoising queries, and no other change
torch.manual_seed(0)
with torch.no_grad(), models.record(student) as seen:
    output = student(image[None], nothing, [target], asking["dino"](target))
student.training = False
counts = [part.logits.shape[2] for part in (output.denoising, output.detections, output.extra)]
hears = seen["decoder.0.self"].weights[0].mean(0) > 0                                       # (Q, Q), the row the column
groups = ("denoising", "learned", "target-aware")
heard = {name: [round(float(part.float().mean()), 3) for part in rows.split(counts, 1)]
         for name, rows in zip(groups, hears.split(counts))}
for name, of in heard.items():
    print(f"{name:12} queries hear " + ", ".join(f"{part:.0%} of the {other}" for other, part in zip(groups, of)))
assert heard == {"denoising": [round(1 / output.denoising.groups, 3), 1, 0], "learned": [0, 1, 0],
                 "target-aware": [0, 0, 1]}
plots.self_attention({f"layer {i}": seen[f"decoder.{i}.self"].weights[0] for i in range(student.decoder_layers)},
                     groups=dict(zip(groups, counts)),
                     title="A DINO student in training: which queries listen to which")
