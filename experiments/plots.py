"""Every picture of the README, the demo and the notebooks: tensors, arrays and plain dicts in, a matplotlib Figure out.

One vocabulary for all functions:
  image    (3, H, W) or (H, W, 3), tensor or array, floats in 0..1 (not normalised) or uint8; or an RGB PIL image
  boxes    (K, 4), x0 y0 x1 y1 in pixels of the image handed in; K = 0 is fine everywhere
  truth    dict(labels (K,), boxes (K, 4), optionally ignore (N, 4): there a detection is neither right nor wrong, and
           references that queries start from, boxes (R, 4) or points (R, 2))
  result   dict(scores (N,), labels (N,), boxes (N, 4)), as models.postprocess returns it for one image
  look     dict(places, weights, boxes, references), what queries look at, as the function `look` makes it
  classes  list of names, indexed by label
Models are known by name, and keep one colour, line and marker in every picture (`model_style`). Classes are told apart
by marker or by their written name, never by colour alone. Inputs are only read. Nothing here touches pyplot, so nothing
piles up in memory and no display is needed: the caller saves with `figure.savefig(path)`, or in a notebook (after
`%matplotlib inline`) names the figure last in a cell. Pages are 9 inches wide: 8 pt type is legible at 900 pixels.
"""
import itertools
import math

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.colors import LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

# Okabe and Ito's colours, made to be told apart with any colour vision (jfly.uni-koeln.de/color).
TEACHER, STUDENT, DISTILLED, TRUTH = "#0072B2", "#E69F00", "#009E73", "#FFFFFF"
OTHERS = ("#CC79A7", "#56B4E9", "#D55E00", "#882255", "#999999", "#000000")
MARKERS = ("s", "o", "^", "D", "v", "P")                     # of classes, and of levels
BRIGHT = ("#56B4E9", "#E69F00", "#CC79A7", "#F0E442", "#009E73", "#D55E00")   # of predicted classes
LEVELS = ("#56B4E9", "#F0E442", "#CC79A7", "#D55E00", "#FFFFFF", "#999999")   # of sampling points: no model's colour
FALSE, MISSED = (0, (3, 1.5)), (0, (1, 1))                   # dashes of false alarms, and of missed truths
REFERENCE = (0, (1, 1))                                      # dots of where a query starts from
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
    No results, {}: the ground truth alone, with its references dotted.
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
                for place in _array(truth.get("references", ())):
                    _reference(axes, place)
            else:
                counts[name] += _judged(axes, results[name][row], truth, model_style(name, column - 1)["color"],
                                        min_score, min_iou, written)
    for axes in grid[len(images):].flat:
        axes.set_axis_off()
    for axes, name in zip(grid[0], names):
        title = f"{name}\n{_objects(sum(len(t['labels']) for t in truths))}"
        if name in counts:
            found, missed, false = counts[name]
            title = f"{name}\n{found} found, {missed} missed, {false} false"
        axes.set_title(title, fontsize=8.5, color=INK)
    _legend(figure, classes, truths, f"found means score ≥ {min_score:g} and IoU ≥ {min_iou:g}", len(results) > 0)
    return figure


def location_masks(image, boxes, masks):
    """The location masks over a scene, level by level: in S every object adds up to as much as the whole background.

    image: the padded batch image, because the masks cover the padding too. masks: one (inside (H, W) bool, scale
    (H, W)) a level, as clockdistill.location_mask returns them; cells of scale 0 (padding) stay bare. The colour is S,
    logarithmic and the same for all levels; the titles say what share of cells and of weight the objects have.
    """
    masks = [(_array(inside) > 0, _array(scale)) for inside, scale in masks]

    panels = [(f"the scene, {_objects(len(boxes))}", None)]
    for level, (inside, scale) in enumerate(masks):
        rows, columns = scale.shape
        total, cells = scale.sum() or 1.0, (scale > 0).sum() or 1
        panels.append((f"level {level}, {columns} x {rows} cells; objects: {inside.sum() / cells:.1%} of the cells, "
                       f"{scale[inside].sum() / total:.0%} of S", scale))
    return _over_scene(image, boxes, panels, _log_norm([scale for _, scale in masks]),
                       "weight S of a cell (the cells of an object, or of the background, add up to 1)",
                       "Location masks: in S each object adds up to 1, and so does the background")


def memory_error(image, student, teacher, shapes, boxes=(), padding=None, low=None, high=None):
    """Where the student's memory is not yet the teacher's: squared error of every token, level by level.

    image: the padded batch image. student, teacher: (S, D) memory tokens of this ONE image, of equal width. shapes:
    list of (H_l, W_l), finest first, with S = sum of H_l W_l. padding: (S,), True where padded: left bare. The colour
    is the sum over channels of (teacher - student)^2, logarithmic, from low to high: give them to compare two pictures;
    None: the least and the largest error. Raises ValueError when the sizes disagree.
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
    panels = [(f"the scene, {_objects(len(boxes))}", None)]
    for level, ((h, w), values) in enumerate(zip(shapes, levels)):
        mean = values[values > 0].mean() if (values > 0).any() else 0
        panels.append((f"level {level}, {w} x {h} cells: {mean:.3g} a cell on average", values))
    return _over_scene(image, boxes, panels, _log_norm(levels, low, high),
                       "squared error of a cell, summed over channels",
                       "Memory error: where the student does not yet remember what the teacher does")


def maps_over_scene(image, boxes, maps, label, title, high=None):
    """Any maps over one scene: a name in each column, a level in each row, one colour scale from 0 to high.

    image: the padded batch image. maps: dict name -> list of (H_l, W_l), the same number of levels for each name; cells
    of 0 or less stay bare. label: of the colours, with the unit. high: None takes the largest value there is.
    """
    levels = zip(*([_array(values) for values in of] for of in maps.values()))
    panels = [(f"{name}, level {level}", values)
              for level, row in enumerate(levels) for name, values in zip(maps, row)]
    largest = max([values.max(initial=0) for _, values in panels] + [1e-12])
    return _over_scene(image, boxes, panels, Normalize(0, high or largest), label, title, columns=len(maps))


def look(recorded, shapes, queries=slice(None), boxes=None, references=None, image=0):
    """What queries of one image look at, out of what models.record collected: dict(places, weights, boxes, references).

    recorded: has `weights`, and `points` or None, of a batch. shapes: the memory's levels [(H, W)]. queries: which of
    the recorded ones, a slice or indices. boxes: (Q, 4) that the recorded queries predict; references: (Q, 4) or
    (Q, 2) that they start from; both in pixels. In the look, queries come first everywhere, then heads:
      sampled  places (q, heads, levels, P, 2), x and y as fractions of the padded image; weights (q, heads, levels, P)
      dense    places (H, W), of the map whose cells the weights (q, heads, H * W) belong to
    A head's weights sum to 1. Raises ValueError on weights of something else than the memory's cells.
    """
    weights, places = recorded.weights[image], recorded.points
    if places is not None:
        places = places[image][queries]
    else:
        places, weights = tuple(shapes[0]), weights.transpose(0, 1)      # (Q, heads, H * W)
        if len(shapes) > 1 or weights.shape[-1] != places[0] * places[1]:
            raise ValueError(f"dense weights over {weights.shape[-1]} keys do not lie on a memory of {list(shapes)}: "
                             "attention among queries is a picture of its own, self_attention")
    found = {"places": places, "weights": weights[queries]}
    return found | {name: None if of is None else of[queries]
                    for name, of in (("boxes", boxes), ("references", references))}


def heads_apart(one, query):
    """One query of a look -> dict name -> look, of each head alone, as `query_attention` takes them."""
    def only(h):
        alone = {name: None if of is None else of[query:query + 1] for name, of in one.items() if name != "places"}
        sampled = one["weights"].ndim == 4
        return alone | {"weights": alone["weights"][:, h:h + 1],
                        "places": one["places"][query:query + 1, h:h + 1] if sampled else one["places"]}
    return {f"head {h}": only(h) for h in range(one["weights"].shape[1])}


def attention_mass(places, weights, height, width):
    """Where attention goes on a grid over the image, so that any two compare: sampled or dense, mean over heads.

    places, weights: tensors as in `look`. A sampling point gives its weight to the cells whose centres surround it,
    bilinearly (near the image's edge, to those there are), and loses it outside the image; a dense weight spreads
    evenly over its cell. Returns (q, height, width); a map sums to the share of attention that falls on the image.
    """
    if weights.ndim == 3:
        down, across = (_covered(torch.arange(new) / new, torch.arange(1, new + 1) / new, old).to(weights)
                        for new, old in zip((height, width), places))                     # (height, H), (width, W)
        return down @ weights.mean(1).unflatten(-1, places) @ across.T
    inside = ((places >= 0) & (places <= 1)).all(-1)                                      # (q, heads, levels, P)
    weights = (weights * inside).flatten(1) / weights.shape[1]                            # (q, N)
    x, y = (places * places.new_tensor([width, height]) - 0.5).flatten(1, 3).unbind(-1)   # 0 is the first cell's centre
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    mass = weights.new_zeros(len(weights), height * width)
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = x.floor() + right, y.floor() + below
        part = (1 - (x - column).abs()) * (1 - (y - row).abs())          # 0 for a column or row beyond the last
        cell = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
        mass.scatter_add_(1, cell.long(), weights * part)
    return mass.unflatten(1, (height, width))


def agreement(a, b):
    """How far maps (.., H, W) overlap when each is scaled to sum 1: the sum of min(a, b), from 0 (apart) to 1 (alike).

    On coarse cells anything on the same object agrees: what a number is worth shows against `even_mass`. A map without
    mass agrees with nothing: 0. Leading axes broadcast. Raises ValueError on two different grids.
    """
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(f"maps of {tuple(a.shape[-2:])} and {tuple(b.shape[-2:])} cells: make both on one grid")
    a, b = (m / m.sum((-2, -1), keepdim=True).clamp(min=1e-12) for m in (a, b))
    return torch.minimum(a, b).sum((-2, -1))


def even_mass(boxes, size, height, width):
    """Maps (q, height, width) of attention spread evenly over boxes (q, 4), in pixels of an image of size (W, H).

    A map sums to the part of the box that is inside the image.
    """
    x0, y0, x1, y1 = (boxes / boxes.new_tensor(size).repeat(2)).cpu().unbind(1)           # (q,) each
    down, across = _covered(y0, y1, height), _covered(x0, x1, width)                      # (q, height), (q, width)
    return down[:, :, None] * across[:, None] / ((x1 - x0) * width * (y1 - y0) * height).clamp(min=1e-12)[:, None, None]


def query_attention(image, looks, rows=(), grid=None, context=2.0, title="Where queries look"):
    """What queries look at, over the image: queries in rows; models, decoder layers or heads in columns.

    image: the padded batch image. looks: dict name -> look (see `look`), of the same targets in the same order.
    rows: their names. A sampling point is a dot, its area the weight, its colour and marker the level; dense attention
    is a map, mean over heads. `boxes` are solid, white or in the model's colour, `references` dotted, or a cross; the
    titles say what share of the attention falls inside the box. A row's window is `context` times its boxes, or with
    None the whole image. A single row of many columns is folded.
    grid: (height, width). With it every panel also has the map that `attention_mass` makes on this grid, and the titles
    say how far it agrees with that of the first column, with the boxes' IoU where they hardly are the same (below 0.5);
    below `title` stands how far a look spread evenly over the first column's boxes would agree.
    """
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    looks = {name: {key: _tensor(one.get(key)) for key in ("places", "weights", "boxes", "references")}
             for name, one in looks.items()}
    first = next(iter(looks.values()), None)
    count = len(first["weights"]) if looks else 0
    maps = {name: attention_mass(one["places"], one["weights"], *(grid or one["places"]))       # each (q, H, W)
            for name, one in looks.items() if count and (grid or one["weights"].ndim == 3)}
    heat = {name: m.numpy() * m[0].numel() for name, m in maps.items()}                         # 1: an even spread
    norm = LogNorm(1, max([m.max() for m in heat.values()] + [2]))

    columns, lines = max(len(looks), 1), max(count, 1)
    if count == 1 and columns > 4:
        columns, lines = 4, math.ceil(columns / 4)
    shape = height / width if context is None else min(max(height / width, 0.6), 0.8)           # of every window
    page = PAGE_INCHES if columns > 2 or context is None else 6                                 # 1 or 2 windows: large
    inches = (page - 0.4 * bool(len(rows))) / columns                                           # enough on less
    tall = max(inches * shape, 0.9 * bool(len(rows)))                                           # room for a row's name
    between = "\n" if grid and inches < 2.5 else ", "                                            # of facts in a title
    figure = _figure((tall + 0.2 + 0.13 * (between == "\n")) * lines + 0.75 + 0.45 * bool(heat), page)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(looks) * count:]:
        axes.set_axis_off()
    for (row, (name, one)), axes in zip(itertools.product(range(count), looks.items()), panels):
        places, weights, facts = one["places"], one["weights"][row], []
        _show(axes, pixels)
        if name in heat:
            drawn = _heat(axes, heat[name][row], pixels, norm)
        if weights.ndim == 3:
            places = places[row]
            _dots(axes, places, weights, (width, height), (35 if grid else 70) * min(inches, 3))
        if one["references"] is not None:
            _reference(axes, one["references"][row].numpy())
        if one["boxes"] is not None:
            box, color = one["boxes"][row], model_style(name)["color"]
            _boxes(axes, box[None], TRUTH if color in OTHERS else color, width=1.4)
            facts.append(f"{_share_inside(places, weights, box / torch.tensor([width, height] * 2)):.0%} in the box")
        if grid and one is not first:
            facts.append(f"agrees {agreement(maps[next(iter(maps))][row], maps[name][row]):.2f}")
            if one["boxes"] is not None and first["boxes"] is not None:
                iou = _iou(first["boxes"][row].numpy(), box.numpy()[None])[0]
                facts[-1] += f" (IoU {iou:.2f})" * bool(iou < 0.5)
        heading = [name] * (row == 0) + [between.join(facts)] * bool(facts)
        axes.set_title("\n".join(heading), fontsize=8, color=INK, pad=3)
        if one is first and len(rows):
            axes.set_ylabel(rows[row], fontsize=8, color=INK)
        if context is not None:
            left, top, right, bottom = _window(looks.values(), row, (width, height), shape, context)
            axes.set(xlim=(left, right), ylim=(bottom, top))
    if heat:
        _bar(figure, panels, drawn, "attention of a cell, times an even spread over the image")

    levels = max([one["weights"].shape[2] for one in looks.values() if one["weights"].ndim == 4] + [0])
    keys = [Line2D([], [], linestyle="none", marker=MARKERS[level % 6], color=LEVELS[level % 6], markeredgewidth=0.4,
                   markeredgecolor="black", label=f"level {level}") for level in range(levels)]
    starts = {one["references"].shape[1] for one in looks.values() if one["references"] is not None}
    if any(one["boxes"] is not None for one in looks.values()):
        keys.append(Line2D([], [], color=INK, label="box"))
    if 4 in starts:
        keys.append(Line2D([], [], color=INK, linestyle=REFERENCE, label="reference box"))
    if 2 in starts:
        keys.append(Line2D([], [], color=INK, linestyle="none", marker="+", markersize=9, label="reference point"))
    _keys(figure, keys)
    if grid and count and first["boxes"] is not None:
        even = agreement(maps[next(iter(maps))], even_mass(first["boxes"], (width, height), *grid)).mean()
        title += f"\n(for comparison, an even look over the box that the first answers agrees {even:.2f})"
    figure.suptitle(title, fontsize=10, color=INK)
    return figure


def self_attention(weights, shown=None, names=(), groups=None, title="Which queries listen to which"):
    """Queries looking at one another, a square matrix for each layer (or model): rows look at columns.

    weights: dict name -> (heads, Q, Q), 0 where masked; drawn is the mean over heads. Or a mask alone, (Q, Q) bool,
    True where a row may look. shown: indices of the queries to draw, in this order; None: all. names: of the shown, ""
    for none. groups: dict name -> how many of the shown, in order (denoising, learned, extra), or such a dict for each
    matrix, by its name: draws borders, and their names where `names` has none. The colour is the weight times the
    number of queries that the row may look at, so 1 is an even spread; the titles say what a query keeps to itself,
    mean over the shown. Raises ValueError when the groups are not all the shown together.
    """
    masks = [name for name, w in weights.items() if w.ndim == 2]
    maps = {name: _array(w) for name, w in weights.items()}
    maps = {name: w / w.sum(-1, keepdims=True).clip(1) if w.ndim == 2 else w.mean(0)      # (Q, Q) each
            for name, w in maps.items()}
    order = {name: np.arange(len(m)) if shown is None else _array(shown).astype(int) for name, m in maps.items()}
    heat = {name: (m * (m > 0).sum(-1, keepdims=True))[np.ix_(order[name], order[name])] for name, m in maps.items()}
    norm = LogNorm(0.1, max([m.max(initial=0) for m in heat.values()] + [10]))
    columns = min(max(len(maps), 1), 3)
    lines = math.ceil(max(len(maps), 1) / columns)
    side = min((PAGE_INCHES - 1) / columns, 3.4)
    figure = _figure((side + 0.3) * lines + (0.75 if len(masks) < len(maps) else 0.25), width=side * columns + 1)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(maps):]:
        axes.set_axis_off()
    own_groups = groups and isinstance(next(iter(groups.values())), dict)                 # of each matrix, not of all
    for panel, (axes, name) in enumerate(zip(panels, maps)):
        of = groups[name] if own_groups else groups or {}
        borders, count = np.cumsum([0, *of.values()]), len(order[name])
        if of and borders[-1] != count:
            raise ValueError(f"{name}: the groups are {borders[-1]} queries together, the matrix shows {count}")
        side = max(count, 1)
        drawn = axes.imshow(np.ma.masked_less_equal(heat[name], 0), extent=(0, side, side, 0), norm=norm,
                            cmap=WEIGHT_MAP, interpolation="nearest")
        axes.set_facecolor("#DDDDDD")
        axes.hlines(borders[1:-1], 0, count, colors="white", linewidths=1.5)
        axes.vlines(borders[1:-1], 0, count, colors="white", linewidths=1.5)
        rows = [((start + end) / 2, word) for start, end, word in zip(borders, borders[1:], of) if end > start]
        if any(names):
            rows = [(row + 0.5, word) for row, word in enumerate(names) if word]
        written = panel % columns == 0 or own_groups and not any(names)
        axes.set_xticks([])
        axes.set_yticks([place for place, _ in rows], [word if written else "" for _, word in rows], fontsize=8)
        axes.tick_params(length=2)
        axes.set_xlabel("looked at, in the same order" + " (grey: may not)" * (name in masks), fontsize=8, color=INK)
        axes.set_ylabel("query that looks" if panel % columns == 0 else "", fontsize=8, color=INK)
        own = np.diagonal(maps[name])[order[name]]
        axes.set_title(name if name in masks else f"{name}: {own.mean() if count else 0:.0%} to itself", fontsize=8.5,
                       color=INK, pad=3)
    if len(masks) < len(maps):
        _bar(figure, panels, drawn, "attention, times an even spread (grey: may not look)")
    figure.suptitle(title, fontsize=10, color=INK)
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
            spread = np.array([_deviation(values) for _, values in seeds])
            axes.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
        most_seeds = max(most_seeds, count)
    plain(axes, "training step", ylabel)
    axes.set_ylim(bottom=0)
    if histories:
        axes.legend(fontsize=8.5, frameon=False, title="last value", title_fontsize=8, alignment="left")
    band = f" (bands: ±1 standard deviation over {most_seeds} seeds)" if most_seeds > 1 else ""
    axes.set_title((title or f"{ylabel} against training steps") + band, fontsize=10, loc="left", color=INK)
    return figure


def gains(rows, title=None):
    """Paired gains over the student alone, in AP or another score, with their 95 % intervals, a block a detector.

    rows: list of (detector, label, {"mean", "low", "high"}); low and high None (one seed): no interval is drawn.
    """
    blocks = {}
    for detector, label, gain in rows:
        blocks.setdefault(detector, []).append((label, gain))
    figure = _figure(0.6 + 0.24 * (len(rows) + len(blocks)), width=7)
    axes = figure.subplots()
    place, ticks, names = 0, [], []
    for detector, lines in blocks.items():
        axes.text(0.01, place, detector, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center", color=INK,
                  weight="bold", zorder=2.3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        for label, gain in lines:
            place -= 1
            ours = label.startswith(("clockdistill", "both parts"))
            low, high = (gain[side] if gain[side] is not None else gain["mean"] for side in ("low", "high"))
            axes.errorbar(gain["mean"], place, xerr=[[gain["mean"] - low], [high - gain["mean"]]], fmt="o", capsize=2.5,
                          color=DISTILLED if ours else INK, markersize=4, linewidth=1.3)
            ticks.append(place)
            names.append(label)
        place -= 1
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(place + 0.5, 0.7)
    plain(axes, "gain over the student alone (bar: 95 % interval)", "")
    axes.margins(x=0.03)
    axes.set_title(title or "What distillation adds", fontsize=10, loc="left", color=INK)
    return figure


def paired(panels, ylabel, title):
    """The same seeds without and with a teacher, joined by lines, beside the teacher's level: a panel a heading.

    panels: dict heading -> {"student": {seed: score}, "distilled": {seed: score}, "teacher": score}. A seed that only
    one of the two has is left out.
    """
    figure, grid = _panels(title, len(panels), 3.3, sharey=True)
    for axes, (heading, found) in zip(grid, panels.items()):
        both = np.array([[found[name][seed] for name in ("student", "distilled")]
                         for seed in found["distilled"] if seed in found["student"]]).reshape(-1, 2)
        axes.plot([0, 1], both.T, color="#BBBBBB", linewidth=1)
        for place, name in enumerate(("student", "distilled")):
            axes.plot([place] * len(both), both[:, place], markersize=6,
                      **model_style(name) | {"linestyle": "none"})
        axes.axhline(found["teacher"], color=TEACHER, linestyle="--", linewidth=1.4)
        axes.annotate(f"teacher {found['teacher']:.2f}", (-0.35, found["teacher"]), (0, 3), fontsize=8, color=TEACHER,
                      textcoords="offset points")
        plain(axes, "", ylabel if axes is grid[0] else "")
        axes.set_title(f"{heading}, {len(both)} seeds", fontsize=9, color=INK)
        axes.set_xticks([0, 1], ["student alone", "distilled"])
        axes.set_xlim(-0.4, 1.4)
    grid[0].set_ylim(bottom=0)
    return figure


def curves_and_gains(panels, ylabel, title):
    """Above, a score against steps with bands of one standard deviation; below, the paired gain and its 95 % interval.

    panels: dict heading -> {"student": {step: [score of each seed]}, "distilled": the same, "teacher": its last score,
    "gain": {step: {"mean", "low", "high"}}}.
    """
    figure = _figure(4.8)
    grid = figure.subplots(2, max(len(panels), 1), sharex="col", sharey="row", height_ratios=(1.7, 1), squeeze=False)
    for (above, below), (heading, found) in zip(grid.T, panels.items()):
        above.axhline(found["teacher"], linestyle="--", color=TEACHER, label="teacher, trained for longer")
        for name, label in (("student", "student alone"), ("distilled", "distilled")):
            style, scores = model_style(name), [np.array(values) for values in found[name].values()]
            mean, spread = (np.array([read(values) for values in scores]) for read in (np.mean, _deviation))
            above.plot(list(found[name]), mean, markersize=4, label=label, **style)
            above.fill_between(list(found[name]), mean - spread, mean + spread, color=style["color"], alpha=0.25,
                               linewidth=0)
        mean, low, high = (np.array([gain[key] for gain in found["gain"].values()]) for key in ("mean", "low", "high"))
        below.errorbar(list(found["gain"]), mean, [mean - low, high - mean], fmt="o", capsize=3, markersize=4,
                       color=DISTILLED)
        below.axhline(0, color=INK, linewidth=0.8)
        above.set_title(heading, fontsize=9, color=INK)
        plain(above, "", ylabel if above is grid[0, 0] else "")
        plain(below, "training step", "gain, 95 % interval" if above is grid[0, 0] else "")
        below.margins(x=0.05)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK)
    return figure


def sensitivity(switches, student=(), title=None):
    """AP against the values of some settings, each changed alone: a panel a setting, the same scale in all.

    switches: dict setting -> list of (value as text, [AP of each seed]), in their order.  student: [AP of each seed] of
    the student alone, drawn as a level line. Bars: one standard deviation over seeds each way.
    """
    figure = _figure(2.5)
    panels = figure.subplots(1, max(1, len(switches)), sharey=True, squeeze=False)[0]
    for axes, (name, points) in zip(panels, switches.items()):
        mean = [np.mean(values) for _, values in points]
        spread = [_deviation(values) for _, values in points]
        axes.errorbar(range(len(points)), mean, spread, capsize=3, markersize=5, linewidth=1.6,
                      **model_style("distilled"))
        if len(student):
            axes.axhline(np.mean(student), linewidth=1.6, color=STUDENT, linestyle="--")
        plain(axes, name, "AP" if axes is panels[0] else "")
        axes.set_xticks(range(len(points)), [value for value, _ in points])
        axes.margins(x=0.15)
    if len(student) and switches:
        panels[0].annotate("student alone", (0, np.mean(student)), (0, 3), textcoords="offset points", fontsize=8)
    figure.suptitle(title or "AP of the distilled student, one setting changed at a time", fontsize=10, x=0.01,
                    ha="left", color=INK)
    return figure


def reading(answers, title=None):
    """Does a teacher's answer to a target-aware query come from the image? Its accuracy from three memories, as dots.

    answers: dict detector -> dict content of the query -> dict memory -> accuracy 0..1, the memories being those of
    looks.reading: the image's own, another image's, noise.
    """
    memories = {"own": "the image's own memory", "another's": "another image's memory", "noise": "noise"}
    rows = {detector: {content: {memories[memory]: part for memory, part in found.items()}
                       for content, found in contents.items()} for detector, contents in answers.items()}
    figure = dots({"part of the queries whose class the teacher names right": rows},
                  title or "What a query with its answer inside teaches: right even on noise")
    figure.axes[0].set_xlim(0, 1.02)
    return figure


def dots(panels, title, log=False, marks=None):
    """Numbers that stand for the same thing, compared: a row for each thing, a dot for each name.

    panels: dict xlabel -> dict block -> dict row -> dict name -> number, or (number, half of its interval), drawn as a
    bar; then the dots of a row lie one beneath the other. Blocks and rows are those of the first panel. A block is a
    bold line over its rows; "" has none. The scale has 0 on it; log: it is logarithmic, and 0 has no dot. marks: dict
    name -> what differs from `model_style`, as matplotlib's keywords.
    """
    blocks = next(iter(panels.values()), {})
    lines = [(block, row) for block, rows in blocks.items() for row in [None] * bool(block) + list(rows)]
    every = [row for blocks in panels.values() for rows in blocks.values() for row in rows.values()]
    apart = 0.7 / max(map(len, every)) if any(isinstance(n, tuple) for row in every for n in row.values()) else 0
    figure, grid = _panels(title, len(panels), 1 + (0.75 if apart else 0.22) * len(lines), sharey=True)
    styles = {name: style | {"markersize": 5.5, "linestyle": "none"} | (marks or {}).get(name, {})
              for name, style in _styles(name for row in every for name in row).items()}
    for axes, (xlabel, blocks) in zip(grid, panels.items()):
        for place, (block, row) in enumerate(lines):
            if row is None:
                axes.text(0.01, place, block, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center",
                          color=INK, weight="bold")
                continue
            numbers = {name: number if isinstance(number, tuple) else (number, 0.)
                       for name, number in blocks[block][row].items()}
            found = {name: both for name, both in numbers.items() if both[0] > 0 or not log}
            if not apart:
                axes.plot([number for number, _ in found.values()], [place] * len(found), color="#CCCCCC",
                          linewidth=1.2, zorder=1)
            for index, (name, (number, half)) in enumerate(found.items()):
                level = place + apart * (index - (len(found) - 1) / 2)
                if half:
                    axes.plot([number - half, number + half], [level] * 2, color=styles[name]["color"], linewidth=1.4)
                axes.plot(number, level, **styles[name])
        plain(axes, xlabel, "")
        axes.margins(x=0.04)
        if log:
            axes.set_xscale("log")
        else:
            axes.update_datalim([(0, 0)])
    if lines:
        grid[0].set_yticks(*zip(*((place, row) for place, (_, row) in enumerate(lines) if row is not None)))
        grid[0].set_ylim(len(lines) - 0.5, -0.7)
    _keys(figure, [Line2D([], [], label=name, **style) for name, style in styles.items()])
    return figure


def gradients(reports, title="How heavy each term is"):
    """Each loss term's share of the total and the norm of its gradient on the student, logarithmic, as dots.

    reports: dict name (of a setting, a step, a run) -> {term: (share, norm)}, as train.gradient_report returns it. A
    term that is off, or absent from a report, has no dot there.
    """
    terms = dict.fromkeys(term for report in reports.values() for term in report)
    panels = {xlabel: {"": {term: {name: report[term][which] for name, report in reports.items() if term in report}
                            for term in terms}}
              for which, xlabel in enumerate(("share of the total loss", "norm of its gradient on the student"))}
    return dots(panels, title, log=True)


def stacked(table, label, title, written="{:.0%}".format):
    """What parts add up to: a bar a row, its parts end to end, with the number of each that has room for it.

    table: dict row -> dict part -> number, not negative; rows need not have the same parts. label: of the axis, with
    the unit. written: a function that writes a number.
    """
    styles = _styles(part for row in table.values() for part in row)
    longest = max([sum(row.values()) for row in table.values()] + [1e-12])
    figure, (axes,) = _panels(title, 1, 0.8 + 0.36 * len(table) + 0.2 * (len(styles) > 1))
    for place, row in enumerate(table.values()):
        left = 0
        for part, number in row.items():
            color = styles[part]["color"]
            axes.barh(place, number, 0.75, left, color=color, edgecolor="white")
            if number > 0.035 * longest:
                axes.text(left + number / 2, place, written(number), ha="center", va="center", fontsize=8,
                          color=_on(color))
            left += number
    plain(axes, label, "")
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(table)), table)
    axes.set_ylim(max(len(table), 1) - 0.5, -0.5)
    if len(styles) > 1:
        _keys(figure, [Rectangle((0, 0), 1, 1, color=style["color"], label=part) for part, style in styles.items()])
    return figure


def lines(panels, xlabel, ylabel, title):
    """Any quantity against another, in panels side by side that share their y axis, with 0; a line is the same in all.

    panels: dict heading -> dict line -> (N,) numbers of steps 0, 1, .., or a tuple (x (N,), y (N,)).
    """
    styles = _styles(name for found in panels.values() for name in found)
    figure, grid = _panels(title, len(panels), 2.8, sharey=True)
    for axes, (heading, found) in zip(grid, panels.items()):
        for name, line in found.items():
            x, y = line if isinstance(line, tuple) else (range(len(line)), line)
            axes.plot(_array(x), _array(y), linewidth=1.6, **styles[name] | {"marker": None})
        plain(axes, xlabel, ylabel if axes is grid[0] else "")
        axes.set_title(heading, fontsize=9, color=INK)
    grid[0].set_ylim(bottom=min(0, grid[0].get_ylim()[0]))
    _keys(figure, [Line2D([], [], label=name, **style | {"marker": None}) for name, style in styles.items()])
    return figure


def numbers(maps, title):
    """Small maps side by side with the number of every cell written in it; each has its own colours.

    maps: dict name -> (values (H, W), a function that writes a value, as "{:.2f}".format).
    """
    maps = {name: (_array(values), written) for name, (values, written) in maps.items()}
    tall = max([values.shape[0] / values.shape[1] for values, _ in maps.values()] + [0]) * PAGE_INCHES
    figure, grid = _panels(title, len(maps), 0.6 + tall / max(len(maps), 1))
    for axes, (name, (values, written)) in zip(grid, maps.items()):
        drawn = axes.imshow(values, cmap=WEIGHT_MAP)
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, written(value), ha="center", va="center", fontsize=8,
                      color=_on(drawn.cmap(drawn.norm(value))))
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9, color=INK)
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
    plain(left, "training step", f"weighted loss, mean of {window} steps" if window > 1 else "weighted loss")
    plain(right, "training step", "share of the total, %")
    right.set_ylim(0, 100)
    left.set_title("Which terms fall", fontsize=10, loc="left", color=INK)
    right.set_title("Which terms drive the step", fontsize=10, loc="left", color=INK)
    return figure


def first(image, truth, mask, student, distilled, classes, min_score=0.4, min_iou=0.5):
    """The README's first picture: one scene, where the student must copy its teacher, and what that changes.

    truth: of the scene. mask: (inside, weight) of the cells of ONE level, over the whole image. student, distilled:
    results of the student trained alone and of the distilled one, judged as in `detections`.
    """
    pixels = _pixels(image)
    figure = _figure(PAGE_INCHES * pixels.shape[0] / pixels.shape[1] + 0.8)
    (scene, copy), (alone, taught) = figure.subplots(2, 2)
    _ignored(_show(scene, pixels), truth)
    written = classes if len(classes) > len(MARKERS) else None
    _boxes(scene, truth["boxes"], TRUTH, labels=truth["labels"], names=written)
    scene.set_title(f"a street scene with {_objects(len(truth['labels']))}", fontsize=9, color=INK)
    inside, weight = _array(mask[0]) > 0, _array(mask[1])
    _cells(_show(copy, pixels), weight, pixels, _log_norm([weight]))
    _boxes(copy, truth["boxes"], TRUTH, width=0.7)
    copy.set_title(f"where to copy the teacher: {weight[inside].sum() / (weight.sum() or 1):.0%} of the weight "
                   f"on {inside.mean():.1%} of the cells", fontsize=9, color=INK)
    for axes, name, result, color in ((alone, "student trained alone", student, STUDENT),
                                      (taught, "the same student, distilled", distilled, DISTILLED)):
        found, missed, false = _judged(_show(axes, pixels), result, truth, color, min_score, min_iou, written)
        axes.set_title(f"{name}: {found} found, {missed} missed, {false} false", fontsize=9, color=INK)
    _legend(figure, classes, [truth])
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


def _panels(title, count, height, **how):
    """-> a figure with a title, its panels side by side (one if there is nothing to draw)."""
    figure = _figure(height)
    figure.suptitle(title, fontsize=10, color=INK)
    return figure, figure.subplots(1, max(count, 1), squeeze=False, **how)[0]


def _objects(count):
    return f"{count} object{'s' * (count != 1)}"


def _keys(figure, keys, **how):
    """A legend in one row under the picture."""
    figure.legend(handles=keys, loc="outside lower center", ncols=max(len(keys), 1), fontsize=8, frameon=False, **how)


def _legend(figure, classes, truths, title=None, judged=True):
    """What markers and dashes mean, in one row under the picture; of many classes the names stand on the boxes."""
    keys = [Line2D([], [], color=INK, linestyle="none", marker=marker, markersize=4.5, label=name)
            for marker, name in zip(MARKERS, classes)] if len(classes) <= len(MARKERS) else []
    if judged:
        keys += [Line2D([], [], color=INK, label="found"),
                 Line2D([], [], color=INK, linestyle=FALSE, label="false alarm"),
                 Rectangle((0, 0), 1, 1, facecolor="#777777", edgecolor=TRUTH, linestyle=MISSED, label="missed")]
    if any(len(truth.get("references", ())) for truth in truths):
        keys.append(Line2D([], [], color=INK, linestyle=REFERENCE, label="reference"))
    if any(len(truth.get("ignore", ())) for truth in truths):
        keys.append(Rectangle((0, 0), 1, 1, facecolor="none", edgecolor="#777777", hatch="/////", label="ignored"))
    _keys(figure, keys, title=title if judged else None, title_fontsize=8)


def _styles(names):
    """-> dict name -> model_style, each name once; of those that are no model's the first has the plainest line."""
    styles = {name: model_style(name, index) for index, name in enumerate(dict.fromkeys(names))}
    return {name: style | {"linestyle": ("-", "--", "-.", ":")[index % 4]} if style["color"] in OTHERS else style
            for index, (name, style) in enumerate(styles.items())}


def _on(color):
    """Of black and white, what can be read on a colour."""
    return "white" if np.dot(to_rgb(color), (0.3, 0.6, 0.1)) < 0.45 else "black"


def _array(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()                   # float: bfloat16 has no numpy twin
    return np.array(values, dtype=np.float32)


def _tensor(values):
    """A part of a look as a float tensor on the CPU; None, and the (H, W) of a dense map, stay."""
    return values if values is None or isinstance(values, tuple) else torch.from_numpy(_array(values))


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
        iou = _iou(boxes[i], true_boxes) * (free & (true_labels == labels[i]))
        if len(iou) and iou.max() >= min_iou:
            free[iou.argmax()] = False
            found += 1
            _boxes(axes, boxes[i], color, labels=labels[i:i + 1], names=names)
            continue
        ignored = _overlap(boxes[i], _array(truth.get("ignore", ())).reshape(-1, 4)) / max(_area(boxes[i]), 1e-9)
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


def _iou(box, boxes):
    """(4,), (K, 4) -> (K,)."""
    overlap = _overlap(box, boxes)
    return overlap / np.maximum(_area(box) + _area(boxes) - overlap, 1e-9)


def _log_norm(maps, low=None, high=None):
    values = np.concatenate([m[np.isfinite(m) & (m > 0)] for m in maps] or [np.ones(1)])
    least, largest = (values.min(), values.max()) if len(values) else (0.1, 1)
    low, high = low or least, high or largest
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


def _over_scene(image, boxes, panels, norm, label, heading, columns=2):
    """Panels (title, map of cells, or None: the scene itself) over the scene, row by row, and one colour bar.

    Where they do not fill the rows, the first has the top row for itself."""
    pixels, columns = _pixels(image), max(columns, 1)
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = _figure((PAGE_INCHES / columns * pixels.shape[0] / pixels.shape[1] + 0.2) * rows + 0.75)
    grid = figure.add_gridspec(rows, columns)
    spots = [grid[i // columns, i % columns] for i in range(columns * rows)]
    if len(panels) < len(spots):
        spots = [grid[0, :], *spots[columns:]]
    drawn, panels = None, [(_show(figure.add_subplot(spot), pixels), *panel) for spot, panel in zip(spots, panels)]
    for axes, title, values in panels:
        if values is not None:
            drawn = _cells(axes, values, pixels, norm)
        _boxes(axes, boxes, TRUTH, width=1.1 if values is None else 0.7)
        axes.set_title(title, fontsize=8.5, color=INK, pad=3)
    if drawn:
        _bar(figure, [axes for axes, *_ in panels], drawn, label)
    figure.suptitle(heading, fontsize=10, color=INK)
    return figure


def _bar(figure, panels, drawn, label):
    """One horizontal colour bar for all panels."""
    bar = figure.colorbar(drawn, ax=panels, location="bottom", aspect=70, pad=0.02, format="{x:g}",
                          ticks=LogLocator(subs=(1, 2, 5)) if isinstance(drawn.norm, LogNorm) else None)
    bar.minorticks_off()
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _covered(low, high, cells):
    """How much of each of `cells` equal parts of 0..1 lies between low and high: (N,), (N,) -> (N, cells) in 0..1."""
    edges = torch.arange(cells + 1) / cells
    return ((torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])) * cells).clamp(min=0)


def _share_inside(places, weights, box):
    """Share of one query's attention inside a box (4,), fractions of the image: of points, or of parts of cells."""
    if weights.ndim == 3:
        inside = ((places >= box[:2]) & (places <= box[2:])).all(-1)                      # (heads, levels, P)
        return (weights * inside).sum() / weights.sum().clamp(min=1e-12)
    x0, y0, x1, y1 = box[:, None]                                                         # (1,) each
    down, across = _covered(y0, y1, places[0]), _covered(x0, x1, places[1])               # (1, H), (1, W)
    return (down @ weights.mean(0).view(places) @ across.T).squeeze()


def _dots(axes, places, weights, size, scale):
    """Sampling points of one query, (heads, levels, P, 2): area scale * weight (points squared)."""
    for level in range(places.shape[1]):
        axes.scatter(*(places[:, level] * torch.tensor(size)).reshape(-1, 2).T, s=scale * weights[:, level].ravel(),
                     alpha=0.75, linewidths=0.4, edgecolors="black", facecolors=LEVELS[level % 6],
                     marker=MARKERS[level % 6])


def _heat(axes, values, pixels, norm):
    """A map over the grey image: its colour and its strength say how much; below an even spread nothing is drawn."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(2), extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1)
    return axes.imshow(values, extent=(0, width, height, 0), norm=norm, cmap=WEIGHT_MAP, interpolation="bilinear",
                       alpha=np.ma.filled(norm(values), 0).clip(0, 1) * 0.9)


def _window(looks, row, size, shape, context):
    """x0 y0 x1 y1 of a part of the image, of height / width = shape: `context` times the row's boxes, and where the
    references are; the whole image when there is neither."""
    width, height = size
    boxes, references = ([one[key][row].numpy() for one in looks if one[key] is not None]
                         for key in ("boxes", "references"))
    corners = np.array([np.r_[at[:2], at[-2:]] for at in boxes or references]).reshape(-1, 4)   # a point is a box too
    if not len(corners):
        return 0, 0, width, height
    low, high = corners[:, :2].min(0), corners[:, 2:].max(0)
    low, high = (low + high) / 2 - context * (high - low) / 2, (low + high) / 2 + context * (high - low) / 2
    low, high = np.min([low, *(at[:2] for at in references)], 0), np.max([high, *(at[-2:] for at in references)], 0)
    h = np.clip(max(high[1] - low[1], (high[0] - low[0]) * shape), 4 / shape, min(height, width * shape))
    part = np.array([h / shape, h])
    low = np.clip((low + high - part) / 2, 0, size - part)
    return *low, *(low + part)


def _reference(axes, place):
    """Where a query starts from: a dotted box, or a cross for a point."""
    if len(place) == 4:
        _boxes(axes, place[None], TRUTH, linestyle=REFERENCE, width=1.1)
    else:
        axes.plot(*place, "+", color=TRUTH, markersize=9, markeredgewidth=1.6, path_effects=_halo(3, TRUTH))


def plain(axes, xlabel, ylabel):
    """Axes as all charts have them: light grid, small ticks, no frame at the top and right."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _deviation(values):
    """Standard deviation over seeds; 0 of one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def _running_mean(values, window):
    """Over the last `window` values, fewer at the start, so that nothing looks ahead."""
    sums = np.convolve(values, np.ones(window))[:len(values)] if len(values) else values
    return sums / np.minimum(np.arange(len(values)) + 1, window)
