"""Every picture of the README, the demo and the notebooks: tensors and dicts in, a Figure out.

All functions share one vocabulary:
  image    (3, H, W) or (H, W, 3), tensor or array, uint8 or floats in 0..1; or an RGB PIL image
  boxes    (K, 4), x0 y0 x1 y1 in pixels of that image; K = 0 is fine everywhere
  truth    dict(labels (K,), boxes (K, 4)), and optionally ignore (N, 4), regions where a detection
           is neither right nor wrong, and references, where queries start: (R, 4) or (R, 2)
  result   dict(scores (N,), labels (N,), boxes (N, 4)): models.postprocess of one image
  look     dict(places, weights, boxes, references): what queries look at, made by `look`
  classes  list of names, indexed by label
A model's name tells its role: teacher, student, distilled, or a rival (`model_style`). A role has
one colour, line and marker in all pictures. Classes differ by marker or by written name, never by
colour alone; `readable` says how names are written. Boxes are drawn as far as the image reaches.

Inputs are only read. Nothing here touches pyplot, so no figure stays in memory and no display is
needed. Save with `figure.savefig(path)`, or name the figure last in a notebook's cell (after
`%matplotlib inline`). Pages are 9 inches wide: 8 pt type is legible at 900 pixels.
"""
import functools
import itertools
import math
import os
import re
import warnings

import numpy as np
import torch
from matplotlib import font_manager, patheffects
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox, ScaledTranslation
from torchvision.ops import box_iou

# Okabe and Ito's colours can be told apart with any colour vision (jfly.uni-koeln.de/color).
TEACHER, STUDENT, DISTILLED, TRUTH = "#0072B2", "#E69F00", "#009E73", "#FFFFFF"
OTHERS = ("#CC79A7", "#56B4E9", "#D55E00", "#882255", "#999999", "#000000")
# Markers of classes and of levels.
MARKERS = ("s", "o", "^", "D", "v", "P")
# Colours of predicted classes.
BRIGHT = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", "#009E73", "#D55E00")
# Colours of sampling points by level: no model's colour.
LEVELS = ("#56B4E9", "#F0E442", "#CC79A7", "#D55E00", "#FFFFFF", "#999999")
# Dashes of false alarms, of missed objects, and of the boxes that queries start from.
FALSE = 0, (3, 1.5)
MISSED = REFERENCE = 0, (1, 1)
# The lightness of this colour map rises evenly: it also reads in grey print.
WEIGHT_MAP = "viridis"
PAGE_INCHES = 9
INK = "#222222"
# A detection finds an object of its class from this IoU on.
MIN_IOU = 0.5
# Longer class names are cut.
MAX_LETTERS = 20
ROLES = {
    r"(clock)?distill": {"color": DISTILLED, "linestyle": "-", "marker": "o"},
    "teacher": {"color": TEACHER, "linestyle": "--", "marker": "s"},
    "student": {"color": STUDENT, "linestyle": "-", "marker": "^"},
}


# ----------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------

def model_style(name, index=0):
    """dict(color, linestyle, marker) of a model, by the role in its name.

    A word that begins with "distill" (or is "clockdistill") makes it a distilled student; else
    "teacher" and "student" decide. Any other name, a rival's ("detrdistill"), takes the index-th of
    the remaining colours.
    """
    for word, style in ROLES.items():
        if re.search(rf"(?<![^\W_])(?<!-){word}", name.lower()):
            return dict(style)
    return {"color": OTHERS[index % len(OTHERS)], "linestyle": ("-", "--", "-.", ":")[index % 4],
            "marker": "DvPXs"[index % 5]}


def readable(classes):
    """Class names as pictures write them: on one line, cut after 20 letters, in fonts that exist.

    A cut name ends with its label. An empty name is its label, "class 7"; so is a name for which no
    installed font has the letters, and a warning says so once.
    """
    names, unwritten = [], []
    for label, name in enumerate(classes):
        short = " ".join(str(name).split())
        if len(short) > MAX_LETTERS:
            number = f"… ({label})"
            short = short[:MAX_LETTERS - len(number)] + number
        _, lacking = _fonts(short)
        if lacking:
            unwritten.append(label)
            short = ""
        names.append(short or f"class {label}")
    if unwritten:
        warnings.warn(f"no installed font has the letters of the classes {unwritten}: pictures "
                      "call them by number; install a font of their script, such as Noto Sans CJK")
    return names


def _lacking(file, characters):
    """The characters that a font file lacks."""
    font = font_manager.get_font(file)
    return {c for c in characters if not font.get_char_index(ord(c))}


@functools.cache
def _fonts(text):
    """-> families that have what the default font lacks of a text; the characters none has."""
    default = font_manager.findfont(font_manager.FontProperties())
    families = []
    lacking = _lacking(default, set(text) - {"\n"})
    for font in font_manager.fontManager.ttflist:
        if not lacking:
            break
        # "Last Resort" draws every character as the same kind of square.
        if font.name.startswith("Last Resort") or not os.path.exists(font.fname):
            continue
        still = _lacking(font.fname, lacking)
        if still != lacking:
            families.append(font.name)
        lacking = still
    return families, lacking


def _legible(figure):
    """Write all texts as they are: `$` starts no formula, each script has a font -> the figure."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        families, _ = _fonts(text.get_text())
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])
    return figure


# ----------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------

# Where the parts of the drawing stand, in inches, and what is written in them.
PARTS = {
    "image": (0.45, 2.3, "image"),
    "truth": (5.25, 2.3, "ground\ntruth"),
    "mask": (3.9, 2.3, r"$L_{\mathrm{mem}}$: compare" "\nwhere $M, S$ say"),
    "queries": (6.65, 2.3, "target-aware\nqueries"),
    "logits": (8.25, 2.3, r"$L_{\mathrm{log}}$: compare" "\nthese answers"),
    "own": (5.6, 0.4, "own queries: their boxes are the\nmemory's best proposals (DINO)"),
    "detection": (8.15, 0.4, r"$L_{\mathrm{detection}}$: own queries'" "\nanswers, ground truth")}
# Each model is a row of parts; its name stands at the left.
ROW = {"backbone": 1.5, "encoder": 2.6, "memory": 3.9, "decoder": 6.65, "answers": 8.25}
MODELS = (("teacher", 3.5, TEACHER, "teacher: large, frozen", 3.8),
          ("student", 1.3, STUDENT, "student: small, trained", 0.8))
# Arrows that both models have; those into a row come from parts that the models share.
BOTH = [*itertools.pairwise(ROW), ("image", "backbone"), ("queries", "decoder"),
        ("mask", "memory"), ("logits", "answers")]


def method_drawing():
    """The student, a DETR; its teacher above; and what is compared where: figures/method.png.

    Green is what the method adds to plain training. Arrows with two heads compare.
    """
    parts, headings = {}, []
    arrows = [("truth", "mask"), ("truth", "queries"), ("student memory", "own"),
              ("own", "student decoder"), ("student answers", "detection")]
    for name, part in PARTS.items():
        parts[name] = *part, DISTILLED if name in ("mask", "queries", "logits") else INK
    for model, y, color, heading, top in MODELS:
        headings.append((top, heading, INK))
        for name, x in ROW.items():
            parts[f"{model} {name}"] = x, y, name, color
        arrows += [(start if start in PARTS else f"{model} {start}", f"{model} {end}")
                   for start, end in BOTH]
    return _drawing(4, headings, parts, arrows, compared=("mask", "logits"))


def wiring_drawing():
    """How a detector is given queries that it does not know of: at its decoder's call.

    Green is what is added. Hooks run before and after the decoder; the rest is the detector's own.
    """
    headings = [(2.35, "your detector, unchanged", INK), (0.95, "added by two hooks", DISTILLED)]
    parts = {"encoder": (0.75, 1.75, "backbone,\nencoder", INK),
             "call": (2.2, 1.75, "memory, shapes,\npadding, N queries", INK),
             "before": (3.85, 1.75, "before: append\nour Q queries", DISTILLED),
             "decoder": (5.3, 1.75, "decoder:\nN + Q queries", INK),
             "after": (6.75, 1.75, "after: cut off\nthe last Q", DISTILLED),
             "own": (8.2, 1.75, "N queries: heads,\nmatching, loss", INK),
             "queries": (3.85, 0.45, "contents, true boxes,\nmask", DISTILLED),
             "answer": (6.75, 0.45, "answer: memory,\nlogits, boxes", DISTILLED),
             "method": (8.35, 0.45, "CLoCKDistill", DISTILLED)}
    arrows = [*itertools.pairwise(("encoder", "call", "before", "decoder", "after", "own")),
              ("queries", "before"), ("before", "answer"), ("after", "answer"),
              ("answer", "method")]
    return _drawing(2.5, headings, parts, arrows)


def deployment_drawing():
    """From a checkpoint to a program without torch: one file is all that two machines share."""
    headings = [(2.45, "once, with PyTorch", TEACHER), (1.05, "on the small machine", DISTILLED)]
    parts = {"checkpoint": (1.0, 1.85, "checkpoint\nfp16 weights", TEACHER),
             "export": (3.3, 1.85, "torch.export\n+ ONNX exporter", TEACHER),
             "file": (6.0, 1.85, "student.onnx\nwritten if it answers\nas PyTorch does", INK),
             "photo": (1.0, 0.45, "photo", DISTILLED),
             "resize": (3.3, 0.45, "resize to 48 x 160\nuint8 RGB", DISTILLED),
             "run": (6.0, 0.45, "ONNX Runtime\nnormalise, detect,\nchoose the best", DISTILLED),
             "answer": (8.3, 0.45, "boxes, scores,\nlabels", DISTILLED)}
    arrows = [("checkpoint", "export"), ("export", "file"), ("file", "run"), ("photo", "resize"),
              ("resize", "run"), ("run", "answer")]
    return _drawing(2.6, headings, parts, arrows)


def _drawing(height, headings, parts, arrows, compared=()):
    """Framed texts, and arrows between them; those of what is added are green.

    headings: list of (y, text, color), at the left. parts: dict name -> (x, y, text, color). All
    places are in inches. arrows: pairs of names; those from the parts in `compared` have two heads.
    """
    figure = _figure(height)
    axes = figure.subplots()
    axes.set(xlim=(0, PAGE_INCHES), ylim=(0, height))
    axes.set_axis_off()
    for y, text, color in headings:
        axes.text(0, y, text, fontsize=10, color=color, weight="bold")
    drawn = {}
    for name, (x, y, text, color) in parts.items():
        frame = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": color}
        drawn[name] = axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK,
                                bbox=frame)
    for start, end in arrows:
        tail, head = drawn[start], drawn[end]
        added = DISTILLED in (parts[start][-1], parts[end][-1])
        arrow = {"arrowstyle": "<|-|>" if start in compared else "-|>",
                 "color": DISTILLED if added else INK,
                 "patchA": tail.get_bbox_patch(), "patchB": head.get_bbox_patch()}
        axes.annotate("", head.get_position(), tail.get_position(), arrowprops=arrow)
    return figure


# ----------------------------------------------------------------------------------------------
# Detections
# ----------------------------------------------------------------------------------------------

def detections(images, truths, results, classes, min_score=0.4):
    """Scenes in rows; the ground truth and each model in columns; titles count the detections.

    Of a single scene two panels stand in a row.

    images: list of N. truths: list of N truths. results: dict name -> list of N results; {} draws
    the ground truth alone, with its references dotted. min_score: weaker detections are not drawn.
    A detection is right when it overlaps an object of its class that no stronger one has found with
    IoU >= 0.5. Others are dashed, or left out where half of the box lies in an ignored region.
    Objects not found are dotted in white.
    """
    pixels = [_pixels(image) for image in images]
    panels = columns = 1 + len(results)
    titled = 1                                                            # rows with titles
    if len(images) == 1 and panels > 2:                                   # two panels a row
        columns = 2
        titled = math.ceil(panels / 2)
    ratios = [_ratio(p) for p in pixels] * titled                         # of each row
    images_inches = PAGE_INCHES / columns * sum(ratios)
    figure = _figure(images_inches + 0.04 * len(ratios) + 0.35 + 0.4 * titled)
    grid = _grid(figure, len(ratios), columns, len(images) * panels, height_ratios=ratios)
    grid = grid.reshape(len(images), -1)
    classes = readable(classes)

    for axes, image, truth in zip(grid[:, 0], pixels, truths):
        _scene(axes, image, truth, classes)
        for place in _array(truth.get("references", ())):
            _reference(axes, place)
    objects = sum(len(truth["labels"]) for truth in truths)
    _title(grid[0, 0], f"ground truth\n{_objects(objects)}", 8.5)

    for index, (name, answers) in enumerate(results.items()):
        column = grid[:, index + 1]
        color = model_style(name, index)["color"]
        count = np.zeros(3, int)
        for axes, image, truth, result in zip(column, pixels, truths, answers):
            _show(axes, image, truth.get("ignore", ()))
            count += _judged(axes, result, truth, color, min_score, classes)
        _title(column[0], f"{name}\n{_counted(count)}", 8.5)
    rule = f"found means score ≥ {min_score:g} and IoU ≥ {MIN_IOU:g}"
    _legend(figure, classes, truths, rule if results else None)
    return _legible(figure)


def first(image, truth, mask, student, distilled, classes, min_score=0.4):
    """The README's first picture: a scene, where to copy the teacher, what that changes.

    truth: of the scene. mask: (inside, weight) of the cells of ONE level, over the whole image.
    student, distilled: results of the student trained alone and of the distilled one, judged as in
    `detections`.
    """
    pixels = _pixels(image)
    figure = _figure(PAGE_INCHES * _ratio(pixels) + 0.8)
    (scene, copy), below = figure.subplots(2, 2)
    classes = readable(classes)
    _scene(scene, pixels, truth, classes)
    _title(scene, f"a street scene with {_objects(len(truth['labels']))}")

    inside, weight = map(_array, mask)                                    # (H, W) each
    inside = inside > 0
    _cells(_show(copy, pixels, gray=True), weight, _log_norm([weight]))
    _boxes(copy, truth["boxes"], TRUTH, width=0.7)
    share = weight[inside].sum() / (weight.sum() or 1)
    _title(copy, f"where to copy the teacher: {share:.0%} of the weight on {inside.mean():.1%} of "
                 "the cells")

    answers = {"student trained alone": student, "the same student, distilled": distilled}
    for axes, (name, result) in zip(below, answers.items()):
        color = model_style(name)["color"]
        count = _judged(_show(axes, pixels), result, truth, color, min_score, classes)
        _title(axes, f"{name}: {_counted(count)}")
    _legend(figure, classes, [truth])
    return _legible(figure)


def predictions(image, result, classes, min_score=0.4, truth=None):
    """One image with its detections; saved as PNG it has the image's own pixels.

    An image narrower than 900 pixels is enlarged by a whole factor, so that the text can be read.
    Each box carries its class and score. A class keeps its colour from image to image. Strong
    detections are drawn over weak ones. Of two names in one place the weaker stands higher. A truth
    is dashed in black and white, 3 of 900 pixels outside of its boxes: a detection hides none.
    """
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    zoom = max(1, math.ceil(900 / width))
    # 128 dots per inch divide without rounding: the picture has exactly zoom times the pixels.
    figure = Figure((width * zoom / 128, height * zoom / 128), dpi=128)
    axes = _show(figure.add_axes((0, 0, 1, 1)), pixels)
    axes.set_axis_off()
    type_pt = min(max(width * zoom / 140, 6), 18)
    line_pt = type_pt / 5
    highest = type_pt * 2.3 / zoom                                        # no text stands above
    names = readable(classes)
    if truth is not None:
        outside = _corners(truth["boxes"]) + width / 300 * np.array([-1, -1, 1, 1])
        _boxes(axes, outside, "black", width=line_pt)
        _boxes(axes, outside, TRUTH, linestyle=FALSE, width=line_pt)
        keys = [_key("true box", color=TRUTH, gapcolor="black", linestyle=FALSE),
                _patch("detection: class and score", facecolor="none", edgecolor=BRIGHT[0])]
        axes.legend(handles=keys, loc="lower right", fontsize=type_pt)
    for score, label, box in reversed(_strong(result, min_score)):
        color = BRIGHT[label % len(BRIGHT)]
        _boxes(axes, box, color, width=line_pt)
        # The text stands on the middle of its box, inside the image.
        x = box[[0, 2]].clip(0, width).mean()
        frame = {"facecolor": color, "edgecolor": "none", "pad": type_pt / 8, "alpha": 0.85}
        axes.text(x, max(box[1], highest), f"{names[label]} {score:.2f}", fontsize=type_pt,
                  color="black", ha="center", va="bottom", clip_on=True, bbox=frame)
    _legible(figure)

    placed = []
    for text in reversed(axes.texts):
        # A name that is too long for its place moves to the side.
        x, y = text.get_position()
        half = text.get_window_extent().width / zoom / 2
        text.set_x(max(min(x, width - half), half))
        # A name that would stand on that of a stronger detection moves above it.
        extent = text.get_window_extent().padded(type_pt / 2)
        rise = max((other.y1 - extent.y0 for other in placed if extent.overlaps(other)), default=0)
        text.set_y(max(y - rise / zoom, highest))
        placed.append(text.get_window_extent().padded(type_pt / 2))
    return figure


# ----------------------------------------------------------------------------------------------
# Maps over a scene
# ----------------------------------------------------------------------------------------------

def location_masks(image, boxes, masks):
    """The location masks over a scene, level by level.

    image: the padded batch image, because the masks cover the padding too. masks: one (inside
    (H, W) bool, scale (H, W)) per level, as clockdistill.location_mask returns them; cells of scale
    0 (padding) stay bare. The colour is the scale S, logarithmic and the same for all levels. The
    titles say what share of cells and of weight the objects have.
    """
    maps = {}
    for level, (inside, scale) in enumerate(masks):
        scale = _array(scale)                                             # (H, W)
        inside = _array(inside) > 0
        rows, columns = scale.shape
        cells = inside.sum() / ((scale > 0).sum() or 1)
        weight = scale[inside].sum() / (scale.sum() or 1)
        title = (f"level {level}, {columns} x {rows} cells; objects: {cells:.1%} of the cells, "
                 f"{weight:.0%} of S")
        maps[title] = scale
    return _over_scene(image, boxes, maps, "The scale mask S, level by level",
                       "weight S of a cell (log scale)", _log_norm(maps.values()))


def memory_colours(image, boxes, memories, shape, title):
    """One level of some memories over a scene, in colours: alike colours are alike tokens.

    memories: dict name -> (H * W, D) tokens of the level of shape (H, W). Red, green and blue mix
    the first three principal components of the first memory: light, blue against yellow, red
    against green. Most is in the first two, which red-green colour blindness leaves alone.
    """
    memories = {name: _array(tokens) for name, tokens in memories.items()}
    first = next(iter(memories.values()))
    mean = first.mean(0)
    _, spread, axes = np.linalg.svd(first - mean, full_matrices=False)
    largest = np.abs(axes).argmax(1)[:, None]
    axes *= np.sign(np.take_along_axis(axes, largest, 1))                 # one sign on all machines
    mix = np.array([[0.3, 0.3, 0.3], [0.2, 0.2, -0.4], [0.2, -0.2, 0]])
    mix /= 2 * spread[:3, None] / math.sqrt(len(first))
    maps = {}
    for name, tokens in memories.items():
        colours = 0.5 + (tokens - mean) @ axes[:3].T @ mix                # (H * W, 3)
        maps[name] = colours.clip(0, 1).reshape(*shape, 3)
    return _over_scene(image, boxes, maps, title)


def joined_boxes(image, panels, title):
    """Two models' boxes over the image; a line joins the centres of boxes of the same number.

    panels: dict heading -> dict model -> (K, 4); both models of a panel have K boxes.
    """
    pixels = _pixels(image)
    figure = _figure(PAGE_INCHES / len(panels) * _ratio(pixels) + 0.7)
    grid = _grid(figure, 1, len(panels), len(panels))
    for axes, (heading, models) in zip(grid.flat, panels.items()):
        _show(axes, pixels, gray=True)
        for index, (name, boxes) in enumerate(models.items()):
            _boxes(axes, boxes, model_style(name, index)["color"], width=1.4)
        for number, pair in enumerate(zip(*map(_corners, models.values()))):
            pair = np.array(pair)                                         # (2, 4)
            x, y = (pair[:, :2] + pair[:, 2:]).T / 2                      # (2,) each: the centres
            axes.plot(x, y, color=TRUTH, linewidth=1.6, path_effects=_halo(3.2, TRUTH))
            # The number stands above the first model's box, where it hides no object.
            axes.text(x[0], pair[0, 1] - 3, number, fontsize=8, color=INK, ha="center", va="bottom",
                      bbox={"boxstyle": "circle,pad=0.15", "facecolor": TRUTH, "linewidth": 0.5})
        _title(axes, heading)
    _keys(figure, [_key(name, color=model_style(name, index)["color"])
                   for index, name in enumerate(models)])
    _heading(figure, title)
    return _legible(figure)


# ----------------------------------------------------------------------------------------------
# What queries look at: the numbers
# ----------------------------------------------------------------------------------------------

def look(recorded, shapes, queries=slice(None), boxes=None, references=None, image=0):
    """What queries of one image look at, from what models.record collected.

    recorded: has `weights`, and `points` or None, of a batch. shapes: the memory's levels [(H, W)].
    queries: which of the recorded ones, a slice or indices. boxes: (Q, 4) that the recorded queries
    predict. references: (Q, 4) or (Q, 2) that they start from. Both are in pixels.

    Returns dict(places, weights, boxes, references) of q queries, on the CPU in 32 bits; boxes and
    references are None where not given; a head's weights sum to 1:
      sampled  places (q, heads, levels, P, 2), x and y as fractions of the padded image;
               weights (q, heads, levels, P)
      dense    places (H, W), of the map whose cells the weights (q, heads, H * W) belong to
    Raises ValueError on weights of anything but the memory's cells.
    """
    weights = recorded.weights[image]
    places = recorded.points
    if places is None:
        places = tuple(shapes[0])
        weights = weights.transpose(0, 1)                                 # (Q, heads, H * W)
        if len(shapes) > 1 or weights.shape[-1] != math.prod(places):
            raise ValueError(f"dense weights over {weights.shape[-1]} keys do not lie on a memory "
                             f"of {list(shapes)}: for attention among queries use self_attention")
    else:
        places = places[image][queries]
    found = {"places": places, "weights": weights[queries],
             "boxes": None if boxes is None else boxes[queries],
             "references": None if references is None else references[queries]}
    return {name: value.detach().cpu().float() if isinstance(value, torch.Tensor) else value
            for name, value in found.items()}


def heads_apart(look, query):
    """One query of a look -> dict name -> look of one head, as `query_attention` takes them."""
    # The (H, W) of a dense map and what is None have no queries.
    one = look | {name: value[query:query + 1] for name, value in look.items()
                  if isinstance(value, torch.Tensor)}
    heads = {}
    for h, weights in enumerate(one["weights"].split(1, 1)):              # (1, 1, ..) each
        head = one | {"weights": weights}
        if weights.ndim == 4:                                             # sampled
            head["places"] = one["places"][:, h:h + 1]
        heads[f"head {h}"] = head
    return heads


def attention_mass(places, weights, height, width):
    """Attention on a grid over the image, mean over heads, so that any two looks compare.

    places, weights: tensors as in `look`. A sampling point gives its weight to the cells whose
    centres surround it, bilinearly (near the image's edge, to those there are), and loses it
    outside the image. A dense weight spreads evenly over its cell. Returns (q, height, width); a
    map sums to the share of attention that falls on the image.
    """
    if weights.ndim == 3:
        rows = torch.arange(height + 1) / height
        columns = torch.arange(width + 1) / width
        down = _covered(rows[:-1], rows[1:], places[0]).to(weights)       # (height, H)
        across = _covered(columns[:-1], columns[1:], places[1]).to(weights)    # (width, W)
        return down @ weights.mean(1).unflatten(-1, places) @ across.T
    inside = ((places >= 0) & (places <= 1)).all(-1)                      # (q, heads, levels, P)
    weights = (weights * inside).flatten(1) / weights.shape[1]            # (q, N)
    x, y = places.flatten(1, 3).unbind(-1)                                # (q, N) each
    down = _near(y, height) * weights[..., None]                          # (q, N, height)
    return down.transpose(1, 2) @ _near(x, width)                         # (q, height, width)


def _near(places, cells):
    """How much of a point at places (..), fractions, each of `cells` in a row gets -> (.., cells).

    1 at the cell's centre, 0 from the next centre on.
    """
    centres = torch.arange(cells).to(places)
    # 0 is the centre of the first cell.
    places = (places * cells - 0.5).clamp(0, cells - 1)
    return (1 - (places[..., None] - centres).abs()).clamp(min=0)


def agreement(a, b):
    """Overlap of maps (.., H, W), each scaled to sum 1: the sum of min(a, b), from 0 to 1.

    0 is nothing in common, 1 is the same map. On coarse cells any two maps on the same object
    agree: read the number against that of `even_mass`. A map without mass agrees with nothing: 0.
    Leading axes broadcast. Raises ValueError on two different grids.
    """
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(f"maps of {tuple(a.shape[-2:])} and {tuple(b.shape[-2:])} cells: make "
                         "both on one grid")
    a, b = (m / m.sum((-2, -1), keepdim=True).clamp(min=1e-12) for m in (a, b))
    return torch.minimum(a, b).sum((-2, -1))


def even_mass(boxes, size, height, width):
    """Maps (q, height, width) of uniform attention over boxes (q, 4), of an image of size (W, H).

    A map sums to the part of the box that is inside the image.
    """
    boxes = (boxes / boxes.new_tensor(size).repeat(2)).cpu()              # fractions of the image
    cells = (boxes[:, 2:] - boxes[:, :2]).prod(1) * (height * width)      # (q,)
    return _cover(boxes, height, width) / cells.clamp(min=1e-12)[:, None, None]


def _cover(boxes, height, width):
    """How much of each cell boxes (q, 4) cover, fractions of the image -> (q, height, width)."""
    x0, y0, x1, y1 = boxes.unbind(1)                                      # (q,) each
    down = _covered(y0, y1, height)                                       # (q, height)
    across = _covered(x0, x1, width)                                      # (q, width)
    return down[:, :, None] * across[:, None]


def _covered(low, high, cells):
    """How much of each of `cells` equal parts of 0..1 lies between low and high.

    low, high: (N,). Returns (N, cells), from 0 to 1.
    """
    edges = torch.arange(cells + 1) / cells
    low = torch.maximum(low[:, None], edges[:-1])                         # (N, cells)
    high = torch.minimum(high[:, None], edges[1:])                        # (N, cells)
    return ((high - low) * cells).clamp(min=0)


def _share_inside(places, weights, box):
    """Share of one query's attention inside a box (4,), in fractions of the image."""
    if weights.ndim == 3:
        inside = ((places >= box[:2]) & (places <= box[2:])).all(-1)      # (heads, levels, P)
        return (weights * inside).sum() / len(weights)
    return (weights.mean(0).view(places) * _cover(box[None], *places)).sum()


# ----------------------------------------------------------------------------------------------
# What queries look at: the pictures
# ----------------------------------------------------------------------------------------------

# The colour bar of attention over an image.
HEAT_LABEL = "attention of a cell; 1 is uniform attention over the image, less stays bare"


def query_attention(image, looks, rows=(), grid=None, context=2.0, title="Where queries look"):
    """What queries look at, over the image: queries in rows; models, layers or heads in columns.

    image: the padded batch image. looks: dict name -> look (see `look`), of the same targets in the
    same order. rows: their names. A sampling point is a ring, its area the weight, its colour and
    marker the level. Dense attention is a map, mean over heads. `boxes` are solid, white or in the
    model's colour; `references` are dotted, or a cross. The titles say what share of the attention
    falls inside the box. A row's window is `context` times its boxes, or with None the whole image.
    A single row of many columns is folded.

    grid: (height, width). With it the titles say how far the map that `attention_mass` makes on
    this grid agrees with that of the first column, and the IoU of the two boxes when it is below
    0.5. Below `title` stands how far uniform attention over the first column's boxes would agree.
    """
    pixels = _pixels(image)
    size = pixels.shape[1::-1]                                            # W, H
    leftmost = next(iter(looks), None)
    first = looks.get(leftmost, {"weights": (), "boxes": None})
    count = len(first["weights"])
    # Maps on one grid can be compared. Those of dense attention are drawn; 1 is uniform.
    maps = {name: attention_mass(look["places"], look["weights"], *(grid or look["places"]))
            for name, look in looks.items() if grid or look["weights"].ndim == 3}    # (q, H, W)
    heat = {name: mass.numpy() * mass.shape[1:].numel() for name, mass in maps.items()
            if count and looks[name]["weights"].ndim == 3}
    norm = LogNorm(1, _highest(heat, 2))
    target = next(iter(maps.values()), None)                              # of the first column

    columns = max(len(looks), 1)
    lines = max(count, 1)
    if count == 1 and columns > 3:                                        # folded
        columns = 2 if columns == 4 else 3
        lines = math.ceil(len(looks) / columns)
    shape = _ratio(pixels)                                                # of every window
    if context is not None:
        shape = min(max(shape, 0.6), 0.8)
    # One or two windows are large enough on a smaller page.
    page = PAGE_INCHES if columns > 2 or context is None or len(looks) > columns else 6
    named = len(rows) > 0
    inches = (page - 0.4 * named) / columns
    tall = max(inches * shape, 0.9 * named)                               # room for a row's name
    folded = bool(grid) and inches < 2.5                                  # facts on two lines
    tall += 0.2 + 0.13 * folded                                           # the titles
    figure = _figure(tall * lines + 0.75 + 0.45 * bool(heat), page)
    panels = _grid(figure, lines, columns, len(looks) * count)

    every = itertools.product(range(count), looks.items())
    for axes, (row, (name, look)) in zip(panels.flat, every):
        weights, box, start = (None if look[key] is None else look[key][row]
                               for key in ("weights", "boxes", "references"))
        # Where the query looks,
        _show(axes, pixels, gray=name in heat)
        facts = []
        places = look["places"]
        if name in heat:
            drawn = _heat(axes, heat[name][row], norm)
        else:
            places = places[row]
            _dots(axes, places, weights, size, 70 * min(inches, 3))
        # what it starts from and what it answers,
        if start is not None:
            _reference(axes, start.numpy())
        if box is not None:
            color = model_style(name)["color"]
            _boxes(axes, box, TRUTH if color in OTHERS else color, width=1.4)
            share = _share_inside(places, weights, box / torch.tensor(size * 2))
            facts.append(f"{share:.0%} in the box")
        # and how far it agrees with the first column.
        if grid and name != leftmost:
            facts.append(f"agrees {agreement(target[row], maps[name][row]):.2f}")
            if box is not None and first["boxes"] is not None:
                iou = box_iou(first["boxes"][row, None], box[None]).item()
                facts[-1] += f" (IoU {iou:.2f})" * (iou < MIN_IOU)
        facts = ("\n" if folded else ", ").join(facts)
        _title(axes, "\n".join(filter(None, [name * (row == 0), facts])), 8, pad=3)
        if named and name == leftmost:
            axes.set_ylabel(rows[row], fontsize=8, color=INK)
        if context is not None:
            of_row = ([look[key][row] for look in looks.values() if look[key] is not None]
                      for key in ("boxes", "references"))
            _zoom(axes, *of_row, shape, context)
    if heat:
        _bar(figure, panels, drawn, HEAT_LABEL)
    _keys(figure, _attention_keys(looks.values()))
    if grid and count and first["boxes"] is not None:
        even = agreement(target, even_mass(first["boxes"], size, *grid)).mean()
        title += f"\n(uniform attention over the boxes of the first would agree {even:.2f})"
    _heading(figure, title)
    return _legible(figure)


def around_object(panels, title):
    """What lies around one object in each panel, and where a model looks or what it answers there.

    panels: dict name -> dict(image, truth (4,)): the true box is dotted. Optional entries:
      heat     (H, W), attention on cells over the whole image. The colour is the attention of a
               cell over that of uniform attention, logarithmic, one scale; below 1 is bare
      answer   (4,), the box that a model answers, in the colour of the role in the panel's name
    """
    heat = {}
    for name, panel in panels.items():
        if "heat" in panel:
            mass = _array(panel["heat"])
            heat[name] = mass * mass.size
    norm = LogNorm(1, _highest(heat, 2))
    columns = 2 if len(panels) in (2, 4) else 3
    lines = max(math.ceil(len(panels) / columns), 1)
    shape = 0.6                                                           # height / width
    written = 1 + max(name.count("\n") for name in ["", *panels])         # lines of a title
    row_inches = PAGE_INCHES / columns * shape + 0.1 + 0.15 * written
    figure = _figure(row_inches * lines + 0.55 + 0.5 * bool(heat))
    grid = _grid(figure, lines, columns, len(panels))
    for axes, (name, panel) in zip(grid.flat, panels.items()):
        truth = panel["truth"]
        _show(axes, _pixels(panel["image"]), gray=name in heat)
        if name in heat:
            drawn = _heat(axes, heat[name], norm)
        if "answer" in panel:
            _boxes(axes, panel["answer"], model_style(name)["color"], width=1.8)
        _boxes(axes, truth, TRUTH, REFERENCE, 1.4)
        answer = [panel["answer"]] if "answer" in panel else []
        _zoom(axes, [truth], answer, shape, 1.8)
        _title(axes, name, 8.5, pad=3)
    if heat:
        _bar(figure, grid, drawn, HEAT_LABEL)
    answered = any("answer" in panel for panel in panels.values())
    keys = [_key("true box", linestyle=REFERENCE)] + [_key("answered box")] * answered
    _keys(figure, keys)
    _heading(figure, title)
    return _legible(figure)


def _attention_keys(looks):
    """The legend of `query_attention`: levels, boxes and references, as far as there are any."""
    levels = max((look["weights"].shape[2] for look in looks if look["weights"].ndim == 4),
                 default=0)
    keys = [_key(f"level {level}", color=color, marker=marker, linestyle="none",
                 markeredgewidth=0.4, markeredgecolor="black")
            for level, color, marker in zip(range(levels), LEVELS, MARKERS)]
    starts = {look["references"].shape[1] for look in looks if look["references"] is not None}
    if any(look["boxes"] is not None for look in looks):
        keys.append(_key("box"))
    if 4 in starts:
        keys.append(_key("reference box", linestyle=REFERENCE))
    if 2 in starts:
        keys.append(_key("reference point", linestyle="none", marker="+", markersize=9))
    return keys


def _zoom(axes, boxes, starts, shape, context):
    """Show the part of the image around some boxes, of height / width = shape.

    It is `context` times all the boxes, and reaches to the starts; where the image is too low for
    such a window, the boxes stay in it. boxes, starts: lists of boxes (4,) or points (2,) in pixels.
    Without any, the whole image stays.
    """
    # A point is a box without an extent.
    boxes, starts = ([Bbox.from_extents(*place[:2], *place[-2:]) for place in places]
                     for places in (boxes, starts))
    if not boxes and not starts:
        return
    inner = Bbox.union(boxes or starts)
    box = Bbox.union([inner.expanded(context, context), *starts])
    _, width, height, _ = axes.images[0].get_extent()
    tall = max(box.height, box.width * shape)
    tall = np.clip(tall, 4 / shape, min(height, width * shape))
    part = np.array([tall / shape, tall])
    corner = np.clip((box.min + box.max - part) / 2, inner.max - part, inner.min)
    left, top = np.clip(corner, 0, [width, height] - part)
    axes.set(xlim=(left, left + part[0]), ylim=(top + tall, top))


def self_attention(weights, shown=None, names=(), groups=None,
                   title="Which queries listen to which"):
    """Queries looking at one another, a square matrix per layer or model: rows look at columns.

    weights: dict name -> (heads, Q, Q), 0 where masked; drawn is the mean over heads. Or a mask
    alone, (Q, Q) bool, True where a row may look. shown: indices of the queries to draw, in this
    order; None: all. names: of the shown, "" for none. groups: dict name -> how many of the shown,
    in order (denoising, learned, extra), or such a dict for each matrix, by the matrix's name. They
    draw borders, and their names where `names` has none. The colour is the weight times the number
    of queries that the row may look at, so 1 is uniform attention. Raises ValueError when the
    groups are not all the shown.
    """
    groups = groups or {}
    heat = {}
    masks = {name for name, w in weights.items() if w.ndim == 2}
    for name, w in weights.items():
        w = _array(w)
        # A mask is drawn as even attention to all that a row may look at.
        if name not in masks:
            w = w.mean(0)                                                 # (Q, Q)
            w = w * (w > 0).sum(-1, keepdims=True)
        heat[name] = w if shown is None else w[np.ix_(shown, shown)]
    norm = LogNorm(0.1, _highest(heat, 10))

    columns = min(max(len(heat), 1), 3)
    lines = math.ceil(len(heat) / columns) or 1
    inches = min((PAGE_INCHES - 1) / columns, 3.4)
    # A few queries need no square: a row is as high as a name.
    tall = min(inches, 0.22 * max([4, *map(len, heat.values())]))
    aspect = "auto" if tall < inches else "equal"
    weighted = len(masks) < len(heat)                                     # wants a colour bar
    below = 0.25 + 0.5 * weighted
    figure = _figure((tall + 0.3) * lines + below, inches * columns + 1)
    panels = _grid(figure, lines, columns, len(heat))
    for index, (axes, (name, values)) in enumerate(zip(panels.flat, heat.items())):
        leftmost = index % columns == 0
        count = len(values)
        side = max(count, 1)
        drawn = axes.imshow(np.ma.masked_less_equal(values, 0), extent=(0, side, side, 0),
                            norm=norm, cmap=WEIGHT_MAP, interpolation="nearest", aspect=aspect)
        axes.set_facecolor("#DDDDDD")
        parts = groups.get(name, groups)
        borders = np.cumsum([0, *parts.values()])
        if parts and borders[-1] != count:
            raise ValueError(f"{name}: the groups are {borders[-1]} queries together, the matrix "
                             f"shows {count}")
        for border in (axes.hlines, axes.vlines):
            border(borders[1:-1], 0, count, colors="white", linewidths=1.5)
        middles = (borders[1:] + borders[:-1]) / 2
        rows = {middle: word for middle, word in zip(middles, parts) if parts[word]}
        if any(names):
            rows = {row + 0.5: word for row, word in enumerate(names) if word}
        axes.set_xticks([])
        axes.set_yticks([*rows], rows.values(), fontsize=8)
        # Groups of its own are named at every matrix, names that hold for all at the left.
        own = name in groups and not any(names)
        axes.tick_params(length=2, labelleft=leftmost or own)
        may = " (grey: may not)" * (name in masks)
        axes.set_xlabel(f"looked at, in the same order{may}", fontsize=8, color=INK)
        axes.set_ylabel("query that looks" * leftmost, fontsize=8, color=INK)
        _title(axes, name, 8.5, pad=3)
    if weighted:
        _bar(figure, panels, drawn, "attention; 1 is uniform over all it may see (grey: may not)")
    _heading(figure, title)
    return _legible(figure)


# ----------------------------------------------------------------------------------------------
# Charts
# ----------------------------------------------------------------------------------------------

def curves(histories, ylabel="AP", title=None):
    """A score against training steps, one line per model; bands over seeds when there are several.

    histories: dict name -> list of (step, value), or of (step, [value of each seed]), drawn as the
    mean in a band of one standard deviation each way; or one number, drawn as a level line (a
    teacher trained elsewhere). NaN (AP undefined) is left out. The legend has each last value.
    """
    figure = _figure(3.4, 7)
    axes = figure.subplots()
    most_seeds = 1
    for index, (name, history) in enumerate(histories.items()):
        style = model_style(name, index) | {"linewidth": 1.6}
        if isinstance(history, (int, float)):
            axes.axhline(history, **style | {"label": f"{name}: {history:.3f}", "marker": None})
            continue
        scores = {}
        for step, value in history:
            seeds = np.array(value, float).ravel()
            seeds = seeds[~np.isnan(seeds)]
            if len(seeds):
                scores[step] = seeds
        if scores:
            name += f": {scores[max(scores)].mean():.3f}"
        mean, spread = _statistics(scores.values())
        axes.plot([*scores], mean, markersize=4, label=name, **style)
        if spread.any():
            axes.fill_between([*scores], mean - spread, mean + spread, color=style["color"],
                              alpha=0.2, linewidth=0)
        most_seeds = max([most_seeds, *map(len, scores.values())])
    plain(axes, "training step", ylabel)
    axes.set_ylim(bottom=0)
    if histories:
        axes.legend(fontsize=9, frameon=False, title="last value", title_fontsize=8,
                    alignment="left")
    band = f" (bands: ±1 standard deviation over {most_seeds} seeds)" if most_seeds > 1 else ""
    _title(axes, (title or f"{ylabel} against training steps") + band, 10, loc="left")
    return figure


# Of a difference, by its interval: colour, and what the legend says.
VERDICTS = {"more": (DISTILLED, "more: the interval lies above 0"),
            "less": ("#D55E00", "less: it lies below 0"),
            "undecided": ("#777777", "undecided: it holds 0"),
            "one seed": ("#777777", "one seed: no interval")}


def verdict(gain):
    """What an interval says of the sign: "more", "less", or "undecided" where it holds 0.

    One seed (low and high are None) decides nothing.
    """
    if gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        return "undecided"
    return "more" if gain["mean"] > 0 else "less"


def gains(rows, title, xlabel="gain in AP over the student alone (bar: 95 % interval)",
          zero="no difference", chosen=()):
    """Paired gains with their 95 % intervals, in blocks of rows; the colour is the verdict.

    rows: list of (block, label, {"mean", "low", "high"}), a label once in a block; low and high are
    None of one seed: a hollow dot, no interval. The mean stands at the right. zero: what the line
    at 0 is called. chosen: labels that stand out.
    """
    blocks = {}
    for block, label, gain in rows:
        blocks.setdefault(block, {})[label] = gain
    figure = _figure(1 + 0.24 * (len(rows) + len(blocks)), 7)
    axes = figure.subplots()
    plain(axes, xlabel, "")
    axes.margins(x=0.03)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.annotate(zero, (0, 1), (0, 2), xycoords=axes.get_xaxis_transform(),
                  textcoords="offset points", ha="center", fontsize=8, color=INK)
    lines = [line for block in blocks.values() for line in block.items()]
    places = _rows(axes, blocks)
    keys = {}
    for place, (label, gain), name in zip(places, lines, axes.get_yticklabels()):
        mean, low, high = (gain[key] for key in ("mean", "low", "high"))
        color, meaning = VERDICTS[verdict(gain)]
        face, capsize = color, 3
        if low is None:
            color, meaning = VERDICTS["one seed"]
            face, capsize = "white", 0
            low = high = mean
        keys[meaning] = _key(meaning, color=color, marker="o", markerfacecolor=face)
        if label in chosen:
            axes.axhspan(place - 0.5, place + 0.5, color="#EEEEEE", zorder=0)
            name.set_fontweight("bold")
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], linewidth=1.3, color=color,
                      fmt="o", markersize=4, markerfacecolor=face, capsize=capsize)
        axes.text(1.01, place, f"{mean:+.3f}", transform=axes.get_yaxis_transform(),
                  fontsize=8, va="center", color=color, weight=name.get_fontweight())
    _title(axes, title, 10, loc="left", pad=16)
    _keys(figure, [keys[meaning] for _, meaning in VERDICTS.values() if meaning in keys])
    return figure


def paired(panels, ylabel, title):
    """The same seeds without and with a teacher, joined by lines; a panel per heading.

    panels: dict heading -> {"student": {seed: score}, "distilled": {seed: score}, "teacher":
    score}. A seed that only one of the two has is left out. The teacher is a level line.
    """
    figure, grid = _panels(title, 3.3, [""] * len(panels), ylabel, sharey=True)
    for axes, (heading, panel) in zip(grid, panels.items()):
        student, distilled, teacher = (panel[k] for k in ("student", "distilled", "teacher"))
        both = [(student[seed], distilled[seed]) for seed in distilled if seed in student]
        for pair in both:
            axes.plot([0, 1], pair, color="#BBBBBB", linewidth=1)
        for place, (name, scores) in enumerate(zip(("student", "distilled"), zip(*both))):
            axes.plot([place] * len(both), scores, markersize=6,
                      **model_style(name) | {"linestyle": "none"})
        axes.axhline(teacher, color=TEACHER, linestyle="--", linewidth=1.4)
        _note(axes, f"teacher {teacher:.2f}", -0.35, teacher, TEACHER)
        _title(axes, f"{heading}, {len(both)} seeds")
        axes.set_xticks([0, 1], ["student alone", "distilled"], fontsize=9)
        axes.set_xlim(-0.4, 1.4)
    grid[0].set_ylim(bottom=0)
    return figure


def sensitivity(switches, student, title):
    """AP against the values of some settings, each changed alone: a panel per setting, one scale.

    switches: dict setting -> list of (value as text, [AP of each seed]), in their order. student:
    [AP of each seed] of the student alone, drawn as a level line. Bars: one standard deviation over
    seeds each way.
    """
    figure, panels = _panels(title, 2.5, switches, "AP", sharey=True)
    alone = np.mean(student)
    for axes, points in zip(panels, switches.values()):
        mean, deviation = _statistics([seeds for _, seeds in points])
        axes.errorbar(range(len(points)), mean, deviation, capsize=3, markersize=5, linewidth=1.6,
                      **model_style("distilled"))
        axes.set_xticks(range(len(points)), [value for value, _ in points])
        axes.margins(x=0.15)
        axes.axhline(alone, linewidth=1.6, color=STUDENT, linestyle="--")
    _note(panels[0], "student alone", 0, alone, INK)
    return figure


def dots(panels, title, marks=None, one_scale=False):
    """Numbers that stand for the same thing, compared: a row per thing, a dot per name.

    panels: dict xlabel -> dict block -> dict row -> dict name -> number, or (number, half of its
    interval), drawn as a bar; then the dots of a row lie one beneath the other. Blocks and rows are
    those of the first panel. A block is a bold line over its rows; "" has none. The scale has 0 on
    it. marks: dict name -> what differs from `model_style`, as matplotlib's keywords.
    one_scale: of all panels. Where numbers are negative, a bold line stands at 0.
    """
    blocks = next(iter(panels.values()), {})
    # Of every panel the rows, dict name -> (number, half of its interval, 0 where there is none).
    rows_of = []
    for panel in panels.values():
        rows = [panel[block][row] for block, names in blocks.items() for row in names]
        rows_of.append([{name: np.append(number, 0.)[:2] for name, number in row.items()}
                        for row in rows])
    every = [*itertools.chain(*rows_of)]
    values, halves = np.reshape([pair for row in every for pair in row.values()], (-1, 2)).T
    bars = halves.any()
    apart = 0.7 / max(map(len, every)) if bars else 0                    # between dots of a row
    lines = sum(len(rows) + bool(block) for block, rows in blocks.items())
    height = 1 + (0.75 if bars else 0.22) * lines
    figure, grid = _panels(title, height, panels, sharey=True, sharex=one_scale)
    styles = _styles(itertools.chain(*every))
    for name, style in styles.items():
        style |= {"markersize": 5.5, "linestyle": "none"} | (marks or {}).get(name, {})

    for axes, rows in zip(grid, rows_of):
        for place, row in zip(_rows(axes, blocks), rows):
            if not bars:
                axes.plot([number for number, _ in row.values()], [place] * len(row),
                          color="#CCCCCC", linewidth=1.2, zorder=1)
            for index, (name, (number, half)) in enumerate(row.items()):
                level = place + apart * (index - (len(row) - 1) / 2)
                if half:
                    axes.plot([number - half, number + half], [level] * 2, linewidth=1.4,
                              color=styles[name]["color"])
                axes.plot(number, level, **styles[name])
        axes.margins(x=0.04)
        axes.update_datalim([(0, 0)])
        if (values < 0).any():
            axes.axvline(0, color=INK, linewidth=1.8, zorder=1)
    _style_keys(figure, styles)
    return figure


def reading(answers, title="How often the teacher names the right class, "
                           "by the query's content and by what the decoder reads", always=()):
    """A teacher's accuracy on target-aware queries from three memories: does it read the image?

    answers: dict detector -> dict content of the query -> {"own", "another's", "noise": accuracy},
    the image's own memory, another image's, and noise, of what experiments.look.reading measures.
    always: dict detector -> (class, accuracy) of naming this class for every query, a line.
    """
    memories = {"own": "the image's own memory", "another's": "another image's memory",
                "noise": "noise"}
    rows = {}
    for detector, contents in answers.items():
        rows[detector] = {content: {name: parts[memory] for memory, name in memories.items()}
                          for content, parts in contents.items()}
    figure = dots({"part of the queries whose class the teacher names right": rows}, title)
    axes = figure.axes[0]
    axes.set_xlim(0, 1.02)
    top = 0                                                              # where a heading stands
    for detector, contents in answers.items():
        bottom = top + len(contents) + 1
        if detector in always:
            name, part = always[detector]
            axes.vlines(part, top - 0.5, bottom - 0.5, INK, "--", linewidth=1.2, zorder=1)
            axes.text(part, top, f" always {name}: {part:.2f}", va="center", fontsize=8, color=INK,
                      parse_math=False)
        top = bottom
    return figure


def stacked(table, label, title, written="{:.0%}".format):
    """What parts add up to: a bar per row, its parts end to end, with the numbers that have room.

    table: dict row -> dict part -> number, not negative; rows need not have the same parts. label:
    of the axis, with the unit. written: a function that writes a number.
    """
    styles = _styles(part for row in table.values() for part in row)
    longest = max((sum(row.values()) for row in table.values()), default=0)
    height = 0.8 + 0.36 * len(table) + 0.2 * (len(styles) > 1)
    figure, (axes,) = _panels(title, height, [label])
    for place, row in zip(_rows(axes, {"": table}), table.values()):
        left = 0
        for part, number in row.items():
            color = styles[part]["color"]
            axes.barh(place, number, 0.75, left, color=color, edgecolor="white")
            if number > 0.035 * longest:
                _number(axes, left + number / 2, place, written(number), color)
            left += number
    axes.grid(visible=False, axis="y")
    if len(styles) > 1:
        _keys(figure, [_patch(part, color=style["color"]) for part, style in styles.items()])
    return figure


def lines(panels, xlabel, ylabel, title):
    """Any quantity against another, in panels that share their y axis; 0 is on it.

    panels: dict heading -> dict line -> (N,) numbers of steps 0, 1, .., or a tuple (x (N,),
    y (N,)). A line has one style in all panels.
    """
    styles = _styles(name for panel in panels.values() for name in panel)
    for style in styles.values():
        style["marker"] = None
    figure, grid = _panels(title, 2.8, [xlabel] * len(panels), ylabel, panels, sharey=True)
    for axes, panel in zip(grid, panels.values()):
        for name, line in panel.items():
            x, y = line if isinstance(line, tuple) else (range(len(line)), line)
            axes.plot(_array(x), _array(y), linewidth=1.6, **styles[name])
    grid[0].set_ylim(bottom=min(0, grid[0].get_ylim()[0]))
    _style_keys(figure, styles)
    return figure


def latency(rows):
    """AP against latency: a panel per detector, a marker per program.

    rows: list of {"detector", "role", "format", "AP", "ms_1": {"median"}}, as experiments.deploy
    measures them. How much of a marker is filled says the format; colour and shape say the model.
    """
    roles, detectors, formats = (dict.fromkeys(row[key] for row in rows)
                                 for key in ("role", "detector", "format"))
    formats = dict(zip(formats, ("full", "none", "bottom")))
    figure, panels = _panels(
        "AP against latency: a distilled student is as fast as the student alone", 3.2,
        ["ms per picture, one thread (median)"] * len(detectors), "AP", detectors, sharey=True)
    for (axes, detector), role in itertools.product(zip(panels, detectors), roles):
        style = model_style(role) | {"linestyle": ":", "linewidth": 1, "markersize": 7}
        programs = [row for row in rows if (row["detector"], row["role"]) == (detector, role)]
        ms = [row["ms_1"]["median"] for row in programs]
        # A line joins the programs of one model.
        axes.plot(ms, [row["AP"] for row in programs], **style | {"marker": None})
        for x, row in zip(ms, programs):
            axes.plot(x, row["AP"], fillstyle=formats[row["format"]], **style)
    # Last: a limit that is set no longer follows what is drawn.
    highest = max((row["AP"] for row in rows), default=0) or 1
    for axes in panels:
        axes.margins(0.08)
        axes.set(xlim=(0, None), ylim=(0, 1.1 * highest))
    styles = {role: model_style(role) | {"linestyle": ""} for role in roles}
    styles |= {name: {"linestyle": "", "marker": "o", "fillstyle": fill}
               for name, fill in formats.items()}
    _style_keys(figure, styles)
    return figure


def numbers(maps, title):
    """Small maps side by side with the number of every cell written in it, each in its colours.

    maps: dict name -> (values (H, W), a function that writes a value, as "{:.2f}".format).
    """
    tall = max((_ratio(values) for values, _ in maps.values()), default=0)
    height = 0.6 + PAGE_INCHES * tall / max(len(maps), 1)
    figure, grid = _panels(title, height, [""] * len(maps), headings=maps)
    for axes, (values, written) in zip(grid, maps.values()):
        values = _array(values)
        drawn = axes.imshow(values, cmap=WEIGHT_MAP)
        for (row, column), value in np.ndenumerate(values):
            _number(axes, column, row, written(value), drawn.cmap(drawn.norm(value)))
        axes.set_axis_off()
    return figure


def losses(steps, terms):
    """Left, loss terms against steps, smoothed, logarithmic; right, each one's share of the total.

    steps: (N,). terms: dict name -> (N,) WEIGHTED values, 0 where absent, so that their sum is what
    is minimised. Drawn by name are the terms of distillation, however small (is it on at all?), and
    the 4 largest of the others, by sum over the run. What remains is "the rest". A value that is
    not finite counts 0.
    """
    ours = {"memory": DISTILLED, "cls": TEACHER, "l1": STUDENT, "giou": INK}
    terms = {name: np.nan_to_num(values, posinf=0, neginf=0) for name, values in terms.items()}
    others = sorted((name for name in terms if name not in ours),
                    key=lambda name: -terms[name].sum())
    rest = others[4:]
    colors = dict(zip(others[:4], OTHERS)) | ours
    drawn = {name: terms[name] for name in colors if name in terms}
    if rest:
        name = f"the rest ({len(rest)} terms)"
        drawn = {name: sum(terms[small] for small in rest)} | drawn
        colors[name] = "#BBBBBB"
    window = max(1, len(steps) // 40)
    smooth = {name: _running_mean(values, window) for name, values in drawn.items()}
    total = np.maximum(sum(smooth.values()), 1e-12)
    share = [100 * values / total for values in smooth.values()]

    figure = _figure(3.2)
    figure.get_layout_engine().set(w_pad=0.08)
    left, right = figure.subplots(1, 2)
    for name, values in smooth.items():
        left.plot(steps, values, color=colors[name], linewidth=1.4,
                  linestyle="-" if name in ours else (0, (5, 1)))
    if smooth:
        left.set_yscale("log", nonpositive="mask")
        left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}",
                       minor_formatter=NullFormatter())
        labels = [f"{name}  {part[-1]:.1f}%" for name, part in zip(smooth, share)]
        layers = right.stackplot(steps, share, edgecolor="white", linewidth=0.4, labels=labels,
                                 colors=[colors[name] for name in smooth])
        figure.legend(handles=layers[::-1], loc="outside right center", fontsize=8, frameon=False,
                      title="term, share at the end", title_fontsize=8, alignment="left")
    mean = f", mean of {window} steps" * (window > 1)
    plain(left, "training step", f"weighted loss{mean}")
    plain(right, "training step", "share of the total, %")
    right.set_ylim(0, 100)
    _title(left, "Which terms fall", 10, loc="left")
    _title(right, "Which terms drive the step", 10, loc="left")
    return figure


def _rows(axes, blocks):
    """Name the rows of a chart, from top to bottom -> where they stand, one number per row.

    blocks: dict heading -> names of rows. A heading is a bold line of its own; "" has none.
    """
    place, places, names = 0, [], []
    frame = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for heading, rows in blocks.items():
        if heading:
            axes.text(0.01, place, heading, transform=axes.get_yaxis_transform(), fontsize=9,
                      va="center", color=INK, weight="bold", bbox=frame, zorder=2.3)
            place += 1
        names += rows
        places += range(place, place + len(rows))
        place += len(rows)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(max(place, 1) - 0.5, -0.7)
    return places


def _note(axes, text, x, y, color):
    """A word on a level line."""
    axes.annotate(text, (x, y), (0, 3), textcoords="offset points", fontsize=9, color=color)


def _number(axes, x, y, text, color):
    """A number in the middle of a coloured cell, in black or white: what can be read on it."""
    ink = "black" if _light(color) else "white"
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)


def _styles(names):
    """-> dict name -> model_style, each name once."""
    return {name: model_style(name, index) for index, name in enumerate(dict.fromkeys(names))}


def _statistics(scores):
    """Mean and standard deviation over seeds (0 of one) of each list of scores -> two arrays."""
    mean = [np.mean(seeds) for seeds in scores]
    deviation = [np.std(seeds, ddof=1) if len(seeds) > 1 else 0. for seeds in scores]
    return np.array(mean), np.array(deviation)


def _running_mean(values, window):
    """Means over the last `window` values, over fewer at the start: nothing looks ahead."""
    sums = np.convolve(values, np.ones(window))[:len(values)]
    return sums / np.minimum(np.arange(len(values)) + 1, window)


# ----------------------------------------------------------------------------------------------
# Pages, legends, titles
# ----------------------------------------------------------------------------------------------

def plain(axes, xlabel, ylabel):
    """Axes as all charts have them: light grid, small ticks, no frame at the top and right."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _figure(height, width=PAGE_INCHES):
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.03, w_pad=0.03, hspace=0.01, wspace=0.01)
    return figure


def _panels(title, height, xlabels, ylabel="", headings=(), **how):
    """-> a figure with a title; its panels side by side, one per xlabel, but at least one."""
    figure = _figure(height)
    _heading(figure, title)
    panels = figure.subplots(1, max(len(xlabels), 1), squeeze=False, **how)[0]
    for axes, xlabel in zip(panels, xlabels):
        plain(axes, xlabel, ylabel * (axes is panels[0]))
    for axes, heading in zip(panels, headings):
        _title(axes, heading)
    return figure, panels


def _grid(figure, rows, columns, used, **how):
    """(rows, columns) axes, of which those after the first `used` stay blank."""
    grid = figure.subplots(rows, columns, squeeze=False, **how)
    for axes in grid.flat[used:]:
        axes.set_axis_off()
    return grid


def _heading(figure, text):
    figure.suptitle(text, fontsize=10, color=INK)


def _title(axes, text, size=9, **how):
    axes.set_title(text, fontsize=size, color=INK, **how)


def _objects(count):
    return f"{count} object{'s' * (count != 1)}"


def _counted(count):
    """(found, missed, false) in words."""
    return "{} found, {} missed, {} false".format(*count)


def _keys(figure, keys, **how):
    """A legend under the picture: in one row, or in columns when its names need more room."""
    lengths = [len(key.get_label()) + 9 for key in keys]                  # 9: mark and space
    room = 16 * figure.get_figwidth()                                     # in letters of 8 pt
    columns = len(keys) if sum(lengths) <= room else int(room / max(lengths))
    figure.legend(handles=keys, loc="outside lower center", ncols=max(columns, 1), fontsize=8,
                  frameon=False, **how)


def _key(label, **how):
    """A line or a marker in a legend."""
    return Line2D([], [], label=label, **{"color": INK} | how)


def _style_keys(figure, styles):
    """A legend of dict name -> style."""
    _keys(figure, [_key(name, **style) for name, style in styles.items()])


def _patch(label, **how):
    """A rectangle in a legend."""
    return Rectangle((0, 0), 1, 1, label=label, **how)


def _legend(figure, classes, truths, rule=""):
    """What markers and dashes mean; of many classes the names stand on the boxes.

    rule: what counts as found, written above; None where no detections are drawn.
    """
    keys = []
    if len(classes) <= len(MARKERS):
        for marker, name in zip(MARKERS, classes):
            keys.append(_key(name, linestyle="none", marker=marker, markersize=4.5))
    if rule is not None:
        keys += [_key("found"), _key("false alarm", linestyle=FALSE),
                 _key("missed (in white)", linestyle=MISSED)]
    if any(len(truth.get("references", ())) for truth in truths):
        keys.append(_key("reference", linestyle=REFERENCE))
    if any(len(truth.get("ignore", ())) for truth in truths):
        keys.append(_patch("ignored", facecolor="none", edgecolor="#777777", hatch="/////"))
    _keys(figure, keys, title=rule, title_fontsize=8)


def _bar(figure, panels, drawn, label):
    """One horizontal colour bar for all panels."""
    ticks = LogLocator(subs=(1, 2, 5)) if isinstance(drawn.norm, LogNorm) else None
    bar = figure.colorbar(drawn, ax=panels, location="bottom", aspect=70, pad=0.02,
                          format="{x:g}", ticks=ticks)
    bar.minorticks_off()
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


# ----------------------------------------------------------------------------------------------
# Images, boxes, maps
# ----------------------------------------------------------------------------------------------

def _array(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()               # numpy has no bfloat16
    return np.array(values, dtype=np.float32)


def _corners(boxes):
    return _array(boxes).reshape(-1, 4)


def _pixels(image):
    """An image of any of the forms above -> (H, W, 3) float in 0..1, a copy."""
    if not isinstance(image, torch.Tensor):
        image = torch.from_numpy(np.array(image))
    pixels = _array(image)
    if pixels.ndim != 3 or 3 not in pixels.shape[::2]:
        raise ValueError(f"want one image, (3, H, W) or (H, W, 3), got {pixels.shape}")
    if pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)                                # (3, H, W) -> (H, W, 3)
    return (pixels if image.is_floating_point() else pixels / 255).clip(0, 1)


def _ratio(pixels):
    height, width = pixels.shape[:2]
    return height / width


def _show(axes, pixels, ignored=(), gray=False):
    """The image, and ignored regions hatched -> the axes.

    gray: without its colours, so that colour is a map's alone.
    """
    height, width = pixels.shape[:2]
    if gray:
        pixels = pixels.mean(2, keepdims=True).repeat(3, 2)
    axes.imshow(pixels, extent=(0, width, height, 0),
                interpolation="bilinear" if width < 400 else "auto")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    for box in _corners(ignored):
        _rectangle(axes, box, facecolor="none", edgecolor="#BBBBBB", hatch="/////", linewidth=0.4)
    return axes


def _scene(axes, pixels, truth, names):
    """The image with its objects."""
    _show(axes, pixels, truth.get("ignore", ()))
    _boxes(axes, truth["boxes"], TRUTH, labels=truth["labels"], names=names)


def _light(color):
    """Whether a colour is nearer to white than to black, as eyes weigh red, green and blue."""
    return np.dot(to_rgb(color), (0.3, 0.6, 0.1)) >= 0.45


def _halo(width, color):
    """An edge that keeps a line visible: light around dark colours, dark around light ones."""
    edge = "black" if _light(color) else "white"
    return [patheffects.withStroke(linewidth=width, foreground=edge, alpha=0.75)]


def _rectangle(axes, box, **how):
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **how))


def _boxes(axes, boxes, color, linestyle="-", width=1.1, labels=(), names=()):
    """Rectangles, as far as the image reaches; with labels, the marker of each class.

    Of more classes than there are markers the names are written.
    """
    _, right, bottom, _ = axes.images[0].get_extent()
    boxes = _corners(boxes).clip(0, [right, bottom] * 2)
    for box in boxes:
        _rectangle(axes, box, fill=False, edgecolor=color, linestyle=linestyle, linewidth=width,
                   path_effects=_halo(width + 1, color))
    for label, (x0, y0, x1, _) in zip(_array(labels).astype(int), boxes):
        if len(names) <= len(MARKERS):
            # A marker above the box hides no part of the object.
            above = ScaledTranslation(0, 2.6 / 72, axes.figure.dpi_scale_trans)
            axes.plot((x0 + x1) / 2, y0, MARKERS[label % len(MARKERS)], color=color, markersize=3.6,
                      transform=axes.transData + above, markeredgecolor="black",
                      markeredgewidth=0.5, scalex=False, scaley=False)
        else:
            axes.text(x0, y0, " " + names[label], fontsize=8, color=color, va="top", clip_on=True,
                      path_effects=_halo(2, color))


def _reference(axes, place):
    """Where a query starts from: a dotted box, or a cross for a point."""
    if len(place) == 4:
        _boxes(axes, place, TRUTH, linestyle=REFERENCE)
    else:
        axes.plot(*place, "+", color=TRUTH, markersize=9, markeredgewidth=1.6,
                  path_effects=_halo(3, TRUTH))


def _strong(result, min_score):
    """Detections of at least min_score, best first -> list of (score, label, box)."""
    scores, labels, boxes = (_array(result[key]) for key in ("scores", "labels", "boxes"))
    return [(scores[i], int(labels[i]), boxes[i])
            for i in np.argsort(-scores, kind="stable") if scores[i] >= min_score]


def _judged(axes, result, truth, color, min_score, names):
    """Draw one model's detections -> how many are found, missed, false.

    Right ones are solid, false ones dashed, missed objects dotted.
    """
    true_labels = _array(truth["labels"])
    true_boxes = _corners(truth["boxes"])
    regions = _corners(truth.get("ignore", ()))
    free = np.ones(len(true_boxes), bool)
    false, found = 0, []
    for _, label, box in _strong(result, min_score):
        iou = _iou(box, true_boxes) * (free & (true_labels == label))     # (K,)
        # The IoU with the box's own part in a region is the share that lies there.
        part = box.clip(regions[:, [0, 1] * 2], regions[:, [2, 3] * 2])
        ignored = _iou(box, part)                                         # (N,)
        line = "-"
        if iou.max(initial=0) >= MIN_IOU:
            free[iou.argmax()] = False
        elif ignored.max(initial=0) >= 0.5:
            continue
        else:
            false += 1
            line = FALSE
        found.append((box, line, label))
    # Detections over missed objects: a false one often has the right box.
    _boxes(axes, true_boxes[free], TRUTH, linestyle=MISSED, width=0.9)
    for box, line, label in found:
        _boxes(axes, box, color, line, labels=[label], names=names)
    return np.array([(~free).sum(), free.sum(), false])


def _iou(box, boxes):
    """(4,), (K, 4) arrays -> (K,)."""
    return box_iou(torch.from_numpy(box)[None], torch.from_numpy(boxes))[0].numpy()


def _highest(maps, least):
    """The largest number in all maps (dict), and at least `least`."""
    return max([least, *(values.max(initial=0) for values in maps.values())])


def _log_norm(maps):
    """Logarithmic colours from the least to the largest positive value."""
    positive = np.concatenate([[], *(values[values > 0] for values in maps)])
    low, high = min(positive, default=0.1), max(positive, default=1)
    return LogNorm(low, high if high > low else 10 * low)


def _cells(axes, values, norm):
    """A map of cells over the whole image, with its grid while that is coarse; 0 stays bare.

    values: (H, W), or colours (H, W, 3), which hide the image.
    """
    rows, columns = values.shape[:2]
    extent = _, width, height, _ = axes.images[0].get_extent()
    if values.ndim == 3:
        return axes.imshow(values, extent=extent, interpolation="nearest")
    drawn = axes.imshow(np.ma.masked_less_equal(values, 0), extent=extent, norm=norm,
                        cmap=WEIGHT_MAP, alpha=0.72, interpolation="nearest")
    if columns <= 48:
        thin = {"colors": "white", "linewidths": 0.3, "alpha": 0.6}
        axes.vlines(np.linspace(0, width, columns + 1), 0, height, **thin)
        axes.hlines(np.linspace(0, height, rows + 1), 0, width, **thin)
    return drawn


def _heat(axes, values, norm):
    """A map over the grey image, bare below uniform attention; colour and opacity grow with it."""
    # The root keeps attention visible that is spread over many cells.
    alpha = 0.9 * np.ma.filled(norm(values), 0).clip(0, 1) ** 0.5
    return axes.imshow(values, extent=axes.images[0].get_extent(), norm=norm, cmap=WEIGHT_MAP,
                       interpolation="bilinear", alpha=alpha)


def _dots(axes, places, weights, size, scale):
    """Sampling points of one query, (heads, levels, P, 2): area scale * weight (points squared).

    They are rings, through which the object is seen.
    """
    for level in range(places.shape[1]):
        pixels = places[:, level] * torch.tensor(size)                    # (heads, P, 2)
        color = LEVELS[level % 6]
        axes.scatter(*pixels.reshape(-1, 2).T, s=scale * weights[:, level].ravel(),
                     facecolors="none", edgecolors=color, linewidths=1.3, marker=MARKERS[level % 6],
                     path_effects=_halo(2.2, color))


def _over_scene(image, boxes, maps, heading, label="", norm=None):
    """The scene, then maps over it, dict title -> cells (H, W), two in a row, with one colour bar.

    norm: of the colours. Without label the maps are colours (H, W, 3), and there is no bar. The
    scene has a row of its own where that fills the rows.
    """
    pixels = _pixels(image)
    titles = [f"the scene, {_objects(len(boxes))}"] * (2 - len(maps) % 2) + [*maps]
    below = 0.75 if label else 0.3                                        # a colour bar
    row_inches = PAGE_INCHES / 2 * _ratio(pixels) + 0.2
    figure = _figure(row_inches * len(titles) / 2 + below)
    panels = figure.subplot_mosaic(np.reshape(titles, (-1, 2)))
    for title, axes in panels.items():
        _show(axes, pixels, gray=title in maps)
        _boxes(axes, boxes, TRUTH, width=0.7 if title in maps else 1.1)
        _title(axes, title, 8.5, pad=3)
    for title, values in maps.items():
        drawn = _cells(panels[title], values, norm)
    if label:
        _bar(figure, [*panels.values()], drawn, label)
    _heading(figure, heading)
    return _legible(figure)
