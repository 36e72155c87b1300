"""Every picture of the README, the demo and the notebooks: tensors, arrays and plain dicts in, a matplotlib Figure out.

One vocabulary for all functions:
  image    (3, H, W) or (H, W, 3), tensor or array, floats in 0..1 (not normalised) or uint8; or an RGB PIL image
  boxes    (K, 4), x0 y0 x1 y1 in pixels of the image handed in; K = 0 is fine everywhere
  truth    dict(labels (K,), boxes (K, 4), optionally ignore (N, 4): there a detection is neither right nor wrong)
  result   dict(scores (N,), labels (N,), boxes (N, 4)), as models.postprocess returns it for one image
  classes  list of names, indexed by label
Models are known by name, and keep one colour, line and marker in every picture (`model_style`). Classes are told apart
by marker or by their written name, never by colour alone. Inputs are only read. Nothing here touches pyplot, so nothing
piles up in memory and no display is needed: the caller saves with `figure.savefig(path)`, or in a notebook (after
`%matplotlib inline`) names the figure last in a cell. Pages are 9 inches wide: 8 pt type is legible at 900 pixels.
"""
import math

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

# Okabe and Ito's colours, made to be told apart with any colour vision (jfly.uni-koeln.de/color).
TEACHER, STUDENT, DISTILLED, TRUTH = "#0072B2", "#E69F00", "#009E73", "#FFFFFF"
OTHERS = ("#CC79A7", "#56B4E9", "#D55E00", "#882255", "#999999", "#000000")
MARKERS = ("s", "o", "^", "D", "v", "P")                     # of classes, and of levels
BRIGHT = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", "#009E73", "#D55E00")   # of levels, and of predicted classes
FALSE, MISSED = (0, (3, 1.5)), (0, (1, 1))                   # dashes of false alarms, and of missed truths
WEIGHT_MAP = "viridis"          # its lightness rises evenly, for colour-blind eyes and in grey print too
PAGE_INCHES = 9
INK = "#222222"


def model_style(name, index=0):
    """The look of a model or an arm by its name: dict(color, linestyle, marker), the same in every picture.

    A name that contains "distill" is a distilled student, else "teacher" and "student" decide; any other name (a rival
    in a table) takes the index-th of the remaining colours.
    """
    known = {"distill": (DISTILLED, "-", "o"), "teacher": (TEACHER, "--", "s"), "student": (STUDENT, "-", "^")}
    for word, (color, line, marker) in known.items():
        if word in name.lower():
            return {"color": color, "linestyle": line, "marker": marker}
    return {"color": OTHERS[index % len(OTHERS)], "linestyle": ("-.", ":")[index % 2], "marker": "DvPXs"[index % 5]}


def detections(images, truths, results, classes, min_score=0.4, min_iou=0.5):
    """Scenes in rows, ground truth and each model in columns; the titles count found, missed and false.

    images: list of N. truths: list of N truths. results: dict name -> list of N results. min_score: weaker detections
    are not drawn. A detection is right when it overlaps a free truth of its class with IoU >= min_iou, strongest first;
    others are dashed, or not drawn when half of one lies in an ignored region; truths not found are dotted in white.
    """
    names = ["ground truth", *results]
    rows = max(len(images), 1)
    pixels = [_pixels(image) for image in images]
    ratios = [p.shape[0] / p.shape[1] for p in pixels] or [0.3]          # height / width of each row
    figure = _figure(PAGE_INCHES / len(names) * sum(ratios) + 0.04 * rows + 0.75)
    grid = figure.subplots(rows, len(names), squeeze=False, height_ratios=ratios)
    written = classes if len(classes) > len(MARKERS) else None           # too many for markers: write names instead
    counts = {name: np.zeros(3, int) for name in results}
    for row, (image, truth) in enumerate(zip(pixels, truths)):
        for column, name in enumerate(names):
            axes = _show(grid[row, column], image)
            _ignored(axes, truth)
            if column == 0:
                _boxes(axes, truth["boxes"], TRUTH, labels=truth["labels"], names=written)
            else:
                counts[name] += _judged(axes, results[name][row], truth, model_style(name, column - 1)["color"],
                                        min_score, min_iou, written)
    for axes in grid[len(images):].flat:
        axes.set_axis_off()
    for axes, name in zip(grid[0], names):
        title = f"{name}\n{sum(len(t['labels']) for t in truths)} objects"
        if name in counts:
            found, missed, false = counts[name]
            title = f"{name}\n{found} found, {missed} missed, {false} false"
        axes.set_title(title, fontsize=8.5, color=INK)
    _legend(figure, classes, any(len(truth.get("ignore", ())) for truth in truths),
            f"found means score ≥ {min_score:g} and IoU ≥ {min_iou:g}")
    return figure


def location_masks(image, boxes, masks):
    """The location masks over a scene, level by level: every object weighs as much as the whole background.

    image: the padded batch image, because the masks cover the padding too. masks: one (inside (H, W) bool, scale
    (H, W)) a level, as clockdistill.location_mask returns them; cells of scale 0 (padding) stay bare. The colour is S,
    logarithmic and the same for all levels; the titles say what share of cells and of weight the objects have.
    """
    masks = [(_array(inside) > 0, _array(scale)) for inside, scale in masks]

    def title(level):
        inside, scale = masks[level]
        rows, columns = scale.shape
        total, cells = scale.sum() or 1.0, (scale > 0).sum() or 1
        return (f"level {level}, {columns} x {rows} cells; objects: {inside.sum() / cells:.1%} of the cells, "
                f"{scale[inside].sum() / total:.0%} of S")

    scales = [scale for _, scale in masks]
    return _over_scene(image, boxes, scales, title, "weight S of a cell (the cells of an object, or of the background, "
                       "add up to 1)", "Location masks: each object weighs as much as the whole background")


def memory_error(image, student, teacher, shapes, boxes=(), padding=None):
    """Where the student's memory is not yet the teacher's: squared error of every token, level by level.

    image: the padded batch image. student, teacher: (S, D) memory tokens of this ONE image, of equal width. shapes:
    list of (H_l, W_l), finest first, with S = sum of H_l W_l. padding: (S,), True where padded: left bare. The colour
    is the sum over channels of (teacher - student)^2, logarithmic. Raises ValueError when the sizes disagree.
    """
    student, teacher = _array(student), _array(teacher)
    if student.shape != teacher.shape or len(student) != sum(h * w for h, w in shapes):
        raise ValueError(f"want student and teacher memory (S, D) with S = cells of {list(shapes)}, "
                         f"got {student.shape} and {teacher.shape}")
    error = ((teacher - student) ** 2).sum(1)                            # (S,)
    if padding is not None:
        error = np.where(_array(padding) > 0, 0, error)
    parts = np.split(error, np.cumsum([h * w for h, w in shapes])[:-1])
    levels = [part.reshape(h, w) for part, (h, w) in zip(parts, shapes)]  # each (H_l, W_l)

    def title(level):
        kept = levels[level][levels[level] > 0]
        return (f"level {level}, {shapes[level][1]} x {shapes[level][0]} cells: "
                f"{kept.mean() if len(kept) else 0:.3g} a cell on average")
    return _over_scene(image, boxes, levels, title, "squared error of a cell, summed over channels",
                       "Memory error: where the student does not yet remember what the teacher does")


def query_attention(image, boxes, attention, k=3, which=None, context=3.0):
    """What target-aware queries look at: objects in rows, models in columns, every sampling point a dot.

    image: the padded batch image. boxes: (Q, 4), the queries' ground-truth boxes in its pixels. attention: dict name ->
    (points (Q, heads, levels, points, 2), x and y as fractions of the padded image; weights (Q, heads, levels, points),
    which sum to 1 over a head's levels and points), as models.record gives them for one image. Shows the queries in
    `which`, by default the k largest boxes, in a window of `context` times the box. The area of a dot is its weight,
    its colour and marker the level; the titles say what share of the attention falls inside the box.
    """
    pixels, boxes = _pixels(image), _array(boxes).reshape(-1, 4)
    height, width = pixels.shape[:2]
    if which is None:
        which = np.argsort(-(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), kind="stable")[:k]
    columns, rows = max(len(attention), 1), max(len(which), 1)
    shape = min(max(height / width, 0.45), 0.75)                         # of every window: height / width
    figure = _figure((PAGE_INCHES / columns * shape + 0.2) * rows + 0.55)
    grid = figure.subplots(rows, columns, squeeze=False)
    levels = 1
    for column, (name, (points, weights)) in enumerate(attention.items()):
        points, weights = _array(points), _array(weights)
        levels = max(levels, points.shape[2] if points.ndim == 5 else 1)
        for row, query in enumerate(which):
            x0, y0, x1, y1 = boxes[query]
            axes = _show(grid[row, column], pixels)
            xy = points[query] * (width, height)                         # (heads, levels, points, 2)
            for level in range(xy.shape[1]):
                axes.scatter(*xy[:, level].reshape(-1, 2).T, s=220 * weights[query][:, level].ravel(), alpha=0.7,
                             linewidths=0.4, edgecolors="black", facecolors=BRIGHT[level % 6],
                             marker=MARKERS[level % 6])
            _boxes(axes, boxes[query][None], TRUTH, width=1.4)
            inside = ((xy >= (x0, y0)) & (xy <= (x1, y1))).all(-1)       # (heads, levels, points)
            share = weights[query][inside].sum() / max(weights[query].sum(), 1e-12)
            axes.set_title(f"{name}: {share:.0%} inside the box", fontsize=8.5, color=INK, pad=3)
            h = min(context * max(y1 - y0, (x1 - x0) * shape), height, width * shape)      # the window stays inside
            w = h / shape                                                                  # the image
            left = np.clip((x0 + x1 - w) / 2, 0, width - w)
            top = np.clip((y0 + y1 - h) / 2, 0, height - h)
            axes.set(xlim=(left, left + w), ylim=(top + h, top))
    for axes in grid.flat:
        if not axes.images:
            axes.set_axis_off()
    keys = [Line2D([], [], linestyle="none", marker=MARKERS[level % 6], color=BRIGHT[level % 6], markeredgewidth=0.4,
                   markeredgecolor="black", label=f"level {level}") for level in range(levels)]
    figure.legend(handles=keys, loc="outside lower center", ncols=levels + 1, fontsize=8, frameon=False)
    figure.suptitle("Where target-aware queries look: area of a dot = attention weight", fontsize=10, color=INK)
    return figure


def curves(histories, ylabel="AP", title=None):
    """A score against training steps, one line a model; bands over seeds when there are several.

    histories: dict name -> list of (step, value), or of (step, [value of each seed]): then the line is their mean and
    the band one standard deviation each way; or one number, drawn as a level line (a teacher trained elsewhere). NaN
    (AP undefined) is left out. The legend carries each last value.
    """
    figure = _figure(3.4, width=7)
    axes = figure.subplots()
    others, most_seeds = 0, 1
    for name, history in histories.items():
        style = model_style(name, others)
        others += style["color"] in OTHERS
        if isinstance(history, (int, float)):
            axes.axhline(history, label=f"{name}: {history:.3f}", linewidth=1.6, color=style["color"],
                         linestyle=style["linestyle"])
            continue
        seeds = [np.array(value, float).ravel() for _, value in history]
        seeds = [(step, values[~np.isnan(values)]) for (step, _), values in zip(history, seeds)]
        seeds = [(step, values) for step, values in seeds if len(values)]
        steps, mean = [step for step, _ in seeds], np.array([values.mean() for _, values in seeds])
        label = name if not len(mean) else f"{name}: {mean[-1]:.3f}"
        axes.plot(steps, mean, label=label, markersize=4, linewidth=1.6, **style)
        count = max((len(values) for _, values in seeds), default=1)
        if count > 1:
            spread = np.array([values.std(ddof=1) if len(values) > 1 else 0 for _, values in seeds])
            axes.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
        most_seeds = max(most_seeds, count)
    _plain(axes, "training step", ylabel)
    axes.set_ylim(bottom=0)
    if histories:
        axes.legend(fontsize=8.5, frameon=False, title="last value", title_fontsize=8, alignment="left")
    band = f" (bands: ±1 standard deviation over {most_seeds} seeds)" if most_seeds > 1 else ""
    axes.set_title((title or f"{ylabel} against training steps") + band, fontsize=10, loc="left", color=INK)
    return figure


def losses(history, top=4, always=("memory", "cls", "l1", "giou")):
    """Left: the loss terms by name against steps, smoothed, logarithmic. Right: each term's share of the total.

    history: dict name -> list of (step, value), of WEIGHTED terms, so that their sum is what is minimised. Drawn by
    name are the terms in `always` (distillation, however small: is it on at all?) and the `top` largest of the others,
    by sum over the run; what remains is "the rest". A term absent or not finite at a step counts 0.
    """
    steps = sorted({step for pairs in history.values() for step, _ in pairs})
    place = {step: i for i, step in enumerate(steps)}
    table = {name: np.zeros(len(steps)) for name in history}
    for name, pairs in history.items():
        for step, value in pairs:
            table[name][place[step]] = value if math.isfinite(value) else 0
    largest = sorted((name for name in table if name not in always), key=lambda name: -table[name].sum())
    lines = {name: table[name] for name in [*largest[:top], *(name for name in always if name in table)]}
    if largest[top:]:
        lines = {f"the rest ({len(largest) - top} terms)": sum(table[name] for name in largest[top:]), **lines}
    window = max(1, len(steps) // 40)
    smooth = {name: _running_mean(line, window) for name, line in lines.items()}
    share = {name: 100 * line / np.maximum(sum(smooth.values()), 1e-12) for name, line in smooth.items()}
    colors = dict(zip(largest[:top], OTHERS)) | dict(zip(always, (DISTILLED, TEACHER, STUDENT, INK)))
    figure = _figure(3.2)
    figure.get_layout_engine().set(w_pad=0.08)
    left, right = figure.subplots(1, 2)
    for name, line in smooth.items():
        left.plot(steps, np.where(line > 0, line, np.nan), color=colors.get(name, "#BBBBBB"), linewidth=1.4,
                  linestyle="-" if name in always else (0, (5, 1)))
    if len(steps):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter(NullFormatter())
        layers = right.stackplot(steps, *share.values(), edgecolor="white", linewidth=0.4,
                                 labels=[f"{name}  {line[-1]:.1f}%" for name, line in share.items()],
                                 colors=[colors.get(name, "#BBBBBB") for name in share])
        figure.legend(handles=layers[::-1], loc="outside right center", fontsize=8, frameon=False,
                      title="term, share at the end", title_fontsize=8, alignment="left")
    _plain(left, "training step", f"weighted loss, mean of {window} steps" if window > 1 else "weighted loss")
    _plain(right, "training step", "share of the total, %")
    right.set_ylim(0, 100)
    left.set_title("Which terms fall", fontsize=10, loc="left", color=INK)
    right.set_title("Which terms drive the step", fontsize=10, loc="left", color=INK)
    return figure


def first(image, truth, mask, student, distilled, classes, min_score=0.4, min_iou=0.5):
    """The README's first picture: one scene, where the student must copy its teacher, and what that changes.

    truth: of the scene. mask: (inside, scale) of ONE level, over the whole image. student, distilled: results of the
    student trained alone and of the distilled one, judged as in `detections`.
    """
    pixels = _pixels(image)
    figure = _figure(PAGE_INCHES * pixels.shape[0] / pixels.shape[1] + 0.8)
    (scene, copy), (alone, taught) = figure.subplots(2, 2)
    _ignored(_show(scene, pixels), truth)
    written = classes if len(classes) > len(MARKERS) else None
    _boxes(scene, truth["boxes"], TRUTH, labels=truth["labels"], names=written)
    scene.set_title(f"a street scene with {len(truth['labels'])} objects", fontsize=9, color=INK)
    inside, scale = _array(mask[0]) > 0, _array(mask[1])
    _cells(_show(copy, pixels), scale, pixels, _log_norm([scale]))
    _boxes(copy, truth["boxes"], TRUTH, width=0.7)
    copy.set_title(f"where to copy the teacher: {scale[inside].sum() / (scale.sum() or 1):.0%} of the weight "
                   f"on {inside.mean():.1%} of the cells", fontsize=9, color=INK)
    for axes, name, result, color in ((alone, "student trained alone", student, STUDENT),
                                      (taught, "the same student, distilled", distilled, DISTILLED)):
        found, missed, false = _judged(_show(axes, pixels), result, truth, color, min_score, min_iou, written)
        axes.set_title(f"{name}: {found} found, {missed} missed, {false} false", fontsize=9, color=INK)
    _legend(figure, classes, len(truth.get("ignore", ())))
    return figure


def predictions(image, result, classes, min_score=0.4):
    """One image with its detections, at full resolution: saved as PNG it has the image's own pixels.

    Images narrower than 900 pixels are enlarged by a whole factor, so that the text can be read. Each box carries its
    class and score; a class keeps its colour from image to image. Strong detections are drawn over weak ones.
    """
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    zoom = max(1, math.ceil(900 / width))
    figure = Figure(figsize=(width * zoom / 128, height * zoom / 128), dpi=128)      # 128: no rounding of pixels
    axes = _show(figure.add_axes((0, 0, 1, 1)), pixels)
    axes.set_axis_off()
    type_pt = min(max(width * zoom / 165, 6), 18)
    scores, labels, boxes = (_array(result[key]) for key in ("scores", "labels", "boxes"))
    for i in np.argsort(scores, kind="stable"):
        if scores[i] < min_score:
            continue
        color = BRIGHT[int(labels[i]) % len(BRIGHT)]
        _boxes(axes, boxes[i][None], color, width=type_pt / 5)
        axes.text(min(max(boxes[i][0], 0), width), max(boxes[i][1], type_pt * 2.3 / zoom),
                  f"{classes[int(labels[i])]} {scores[i]:.2f}", fontsize=type_pt, color="black", va="bottom",
                  clip_on=True, bbox={"facecolor": color, "edgecolor": "none", "pad": type_pt / 8, "alpha": 0.85})
    return figure


def _figure(height, width=PAGE_INCHES):
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.03, w_pad=0.03, hspace=0.01, wspace=0.01)
    return figure


def _legend(figure, classes, ignored, title=None):
    """What markers and dashes mean, in one row under the picture; of many classes the names stand on the boxes."""
    keys = [Line2D([], [], color=INK, linestyle="none", marker=marker, markersize=4.5, label=name)
            for marker, name in zip(MARKERS, classes)] if len(classes) <= len(MARKERS) else []
    keys += [Line2D([], [], color=INK, label="found"), Line2D([], [], color=INK, linestyle=FALSE, label="false alarm"),
             Rectangle((0, 0), 1, 1, facecolor="#777777", edgecolor=TRUTH, linestyle=MISSED, label="missed")]
    if ignored:
        keys.append(Rectangle((0, 0), 1, 1, facecolor="none", edgecolor="#777777", hatch="/////", label="ignored"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False, title=title,
                  title_fontsize=8)


def _array(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()                   # float: bfloat16 has no numpy twin
    return np.array(values, dtype=np.float32)


def _pixels(image):
    """An image of any of the forms above -> (H, W, 3) float in 0..1, a copy."""
    pixels = _array(image)
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise ValueError(f"want one image, (3, H, W) or (H, W, 3), got {pixels.shape}")
    if pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)                               # (3, H, W) -> (H, W, 3)
    floats = image.is_floating_point() if isinstance(image, torch.Tensor) else np.asarray(image).dtype.kind == "f"
    return (pixels if floats else pixels / 255).clip(0, 1)


def _show(axes, pixels):
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0), interpolation="bilinear" if width < 400 else "auto")
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    return axes


def _halo(width, color):
    """An edge that keeps a line visible on any image: light around dark colours, dark around light ones."""
    return [patheffects.withStroke(linewidth=width, foreground="white" if color in (TEACHER, DISTILLED) else "black",
                                   alpha=0.75)]


def _boxes(axes, boxes, color, linestyle="-", width=1.1, labels=None, names=None):
    """Rectangles; on each, when `labels` are given, the marker of its class, or its name when `names` are given."""
    for i, (x0, y0, x1, y1) in enumerate(_array(boxes).reshape(-1, 4)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linestyle=linestyle,
                                 linewidth=width, path_effects=_halo(width + 1, color)))
        if labels is None:
            continue
        label = int(labels[i])
        if names is None:
            above = axes.transData + ScaledTranslation(0, 2.6 / 72, axes.figure.dpi_scale_trans)   # hides no object
            axes.plot((x0 + x1) / 2, y0, MARKERS[label % len(MARKERS)], color=color, markersize=3.6, transform=above,
                      markeredgecolor="black", markeredgewidth=0.5, scalex=False, scaley=False)
        else:
            axes.text(x0, y0, " " + names[label], fontsize=8, color=color, va="top", clip_on=True,
                      path_effects=_halo(2, color))


def _ignored(axes, truth):
    for x0, y0, x1, y1 in _array(truth.get("ignore", ())).reshape(-1, 4):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="none", edgecolor="#BBBBBB", hatch="/////",
                                 linewidth=0.4))


def _judged(axes, result, truth, color, min_score, min_iou, names=None):
    """Draw one model's detections: right ones solid, false ones dashed, missed truths dotted. Returns the counts."""
    scores, labels, boxes = _array(result["scores"]), _array(result["labels"]), _array(result["boxes"]).reshape(-1, 4)
    true_labels, true_boxes = _array(truth["labels"]), _array(truth["boxes"]).reshape(-1, 4)
    free = np.ones(len(true_boxes), bool)
    found = false = 0
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] < min_score:
            break
        overlap, area = _overlap(boxes[i], true_boxes), _area(boxes[i])
        iou = overlap / np.maximum(area + _area(true_boxes) - overlap, 1e-9) * (free & (true_labels == labels[i]))
        if len(iou) and iou.max() >= min_iou:
            free[iou.argmax()] = False
            found += 1
            _boxes(axes, boxes[i], color, labels=labels[i:i + 1], names=names)
            continue
        ignored = _overlap(boxes[i], _array(truth.get("ignore", ())).reshape(-1, 4)) / max(area, 1e-9)
        if len(ignored) and ignored.max() >= 0.5:
            continue
        false += 1
        _boxes(axes, boxes[i], color, linestyle=FALSE, labels=labels[i:i + 1], names=names)
    _boxes(axes, true_boxes[free], TRUTH, linestyle=MISSED, width=0.9)
    return np.array([found, free.sum(), false])


def _area(boxes):
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), -1)


def _overlap(box, boxes):
    """(4,), (K, 4) -> (K,) areas of intersection in square pixels."""
    return _area(np.concatenate([np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])], 1))


def _log_norm(maps):
    values = np.concatenate([m[np.isfinite(m) & (m > 0)] for m in maps] or [np.ones(1)])
    low, high = (values.min(), values.max()) if len(values) else (0.1, 1)
    return LogNorm(low, high if high > low else low * 10)


def _cells(axes, values, pixels, norm):
    """A map of cells over the whole image, its grid drawn while it is coarse enough to be seen; zeros stay bare."""
    (rows, columns), (height, width) = values.shape, pixels.shape[:2]
    axes.imshow(pixels.mean(2), extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1)   # colour is the map's alone
    drawn = axes.imshow(np.ma.masked_less_equal(values, 0), extent=(0, width, height, 0), norm=norm, cmap=WEIGHT_MAP,
                        alpha=0.72, interpolation="nearest")
    if columns <= 48:
        axes.vlines(np.linspace(0, width, columns + 1), 0, height, colors="white", linewidths=0.3, alpha=0.6)
        axes.hlines(np.linspace(0, height, rows + 1), 0, width, colors="white", linewidths=0.3, alpha=0.6)
    return drawn


def _over_scene(image, boxes, levels, title, colour_label, heading):
    """The scene with its boxes, then one map a level over it, two panels a row, one logarithmic colour bar."""
    pixels, norm = _pixels(image), _log_norm(levels)
    rows = 1 + len(levels) // 2
    figure = _figure((PAGE_INCHES / 2 * pixels.shape[0] / pixels.shape[1] + 0.2) * rows + 0.75)
    grid = figure.add_gridspec(rows, 2)
    spots = [grid[i // 2, i % 2] for i in range(2 * rows)]
    if len(levels) % 2 == 0:
        spots = [grid[0, :], *spots[2:]]                                 # an odd panel out: the scene, centred on top
    panels = [_show(figure.add_subplot(spot), pixels) for spot in spots]
    panels[0].set_title(f"the scene, {len(boxes)} objects", fontsize=8.5, color=INK, pad=3)
    _boxes(panels[0], boxes, TRUTH)
    for level, (values, axes) in enumerate(zip(levels, panels[1:])):
        drawn = _cells(axes, values, pixels, norm)
        _boxes(axes, boxes, TRUTH, width=0.7)
        axes.set_title(title(level), fontsize=8.5, color=INK, pad=3)
    if levels:
        bar = figure.colorbar(drawn, ax=panels, location="bottom", aspect=70, pad=0.02, format="{x:g}",
                              ticks=LogLocator(subs=(1, 2, 5)))
        bar.minorticks_off()
        bar.set_label(colour_label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(heading, fontsize=10, color=INK)
    return figure


def _plain(axes, xlabel, ylabel):
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _running_mean(values, window):
    """Over the last `window` values, fewer at the start, so that nothing looks ahead."""
    sums = np.convolve(values, np.ones(window))[:len(values)] if len(values) else values
    return sums / np.minimum(np.arange(len(values)) + 1, window)
