"""What detectors look at in an image: the pictures and figures of `python train.py look`.

    watch(model, ...)  one image through a detector, recorded   -> dict, see there
    pictures(...)      the attention of one detector            -> {name: figure}
    beside(...)        several detectors on the same objects    -> figure, how far each agrees with the first

The drawing itself is in plots.py, the recording in models.record; a notebook may use both alone.
"""
import math

import torch
from torchvision.ops import box_convert, box_iou, nms

import models
import plots


@torch.no_grad()
def watch(model, image, picture, best=4, layer=None, wanted=None):
    """What a detector finds in one image, and where its best queries looked for it.

    image: (1, 3, h, w), prepared; picture: the same image as it is drawn, (3, H, W). Shown are the queries of the
    `best` best detections, one an object (boxes with an IoU over 0.5 are the same object); or, when `wanted` is what
    this function returned of another detector, for each of its detections the query that fits best.
    layer: the decoder layer of "look" and of the heads, None: the last.

    Returns a dict, q detections being shown:
      queries, labels, scores (q,), boxes (q, 4) xyxy in pixels of the picture, iou (q,) with the wanted boxes
      layers   list, a plots.look of each decoder layer; look, that of `layer`
      tokens   list, a plots.look of each encoder layer: of the finest level's tokens nearest to the boxes' middles
      listen   list, self-attention (heads, Q, Q) of each decoder layer
      order    (Q,) all queries, best first; ranks, their (label, score)
      grid     (H, W) of the finest level
    """
    side = torch.tensor(picture.shape[:0:-1])                              # W, H

    def pixels(fractions):                                                 # (.., 4) cxcywh -> xyxy, or (.., 2)
        corners = box_convert(fractions, "cxcywh", "xyxy") if fractions.shape[-1] == 4 else fractions
        return corners.cpu() * side.repeat(fractions.shape[-1] // 2)

    nothing = torch.zeros_like(image[:, 0], dtype=torch.bool)
    memory = model.encode(image, nothing)
    learned, _ = model.learned_queries(memory)
    with models.record(model) as seen:
        found = model.decode_together(memory, [learned], None)[0]
    boxes, start = pixels(found.boxes[:, 0]), pixels(learned.boxes[0])     # (L, Q, 4), (Q, 4) or (Q, 2)
    chances = found.logits[-1, 0].sigmoid().cpu()                          # (Q, C)
    scores, labels = chances.max(1)
    if wanted is None:
        queries = nms(boxes[-1], scores, 0.5)[:best]
        wanted = {"labels": labels[queries], "boxes": boxes[-1, queries]}
    else:
        queries = (box_iou(wanted["boxes"], boxes[-1]) * chances[:, wanted["labels"]].T).argmax(1)      # (q, Q)
    shown, order = boxes[-1, queries], scores.argsort(descending=True)
    layers = [plots.look(seen[f"decoder.{i}.cross"], memory.shapes, queries, boxes[i], start)
              for i in range(model.decoder_layers)]

    centres = pixels(models.token_centres(memory.shapes, memory.valid_ratios)[0])         # (S, 2)
    middles = (shown[:, :2] + shown[:, 2:]) / 2
    tokens = torch.cdist(middles, centres[:math.prod(memory.shapes[0])]).argmin(1)        # (q,)
    with models.record(model, tokens) as by_tokens:                        # once more: of the encoder only these tokens
        model.encode(image, nothing)                                       # are kept, a large image has 17,000
    spots = {"boxes": shown, "references": centres[tokens]}
    return {"queries": queries, "labels": wanted["labels"], "scores": chances[queries, wanted["labels"]],
            "boxes": shown, "iou": box_iou(wanted["boxes"], shown).diagonal(),
            "layers": layers, "look": layers[-1 if layer is None else layer],
            "tokens": [plots.look(recorded, memory.shapes) | spots for recorded in by_tokens.values()],
            "listen": [seen[f"decoder.{i}.self"].weights[0] for i in range(model.decoder_layers)],
            "order": order, "ranks": list(zip(labels[order], scores[order])), "grid": memory.shapes[0]}


def row_names(one, classes):
    return [f"{classes[label]} {score:.2f}\nquery {query}"
            for label, score, query in zip(one["labels"], one["scores"], one["queries"])]


def pictures(name, picture, one, classes):
    """{picture: figure} of one detector, called `name`; one: what `watch` returned."""
    rows, best = row_names(one, classes), f"{classes[one['labels'][0]]} {one['scores'][0]:.2f}"
    ranks = one["ranks"][:20]
    return {
        "layers": plots.query_attention(
            picture, {f"layer {i}": look for i, look in enumerate(one["layers"])}, rows,
            title=f"{name}: where each detection's query looks, decoder layer by layer"),
        "heads": plots.query_attention(
            picture, plots.heads_apart(one["look"], 0),
            title=f"{name}: where the query of its best detection looks ({best}), head by head"),
        "tokens": plots.query_attention(
            picture, {f"encoder layer {i}": look for i, look in enumerate(one["tokens"])}, rows, context=None,
            title=f"{name}: where the encoder's token in the middle (+) of each detection looks"),
        "self": plots.self_attention(
            {f"layer {i}": weights for i, weights in enumerate(one["listen"])}, one["order"][:20],
            [f"{classes[label]} {score:.2f}" for label, score in ranks],
            title=f"{name}: which queries listen to which, the {len(ranks)} best of {len(one['order'])}")}


def beside(picture, seen, classes):
    """seen: dict name -> what `watch` returned, of the same objects -> figure, {name: agreement (q, q)}, even (q,).

    agreement[i, j]: of the first detector's attention on object i with the other's on object j (see plots.agreement),
    on the grid of the coarsest memory; its diagonal is written in the picture. even: of the first detector's attention
    with a look spread evenly over its box.
    """
    grid = min((one["grid"] for one in seen.values()), key=math.prod)
    mass = {name: plots.attention_mass(one["look"]["places"], one["look"]["weights"], *grid).cpu()
            for name, one in seen.items()}
    first, *others = seen
    figure = plots.query_attention(picture, {name: one["look"] for name, one in seen.items()},
                                   row_names(seen[first], classes), grid,
                                   title="Where the queries look that find the same object, and how far they agree")
    even = plots.even_mass(seen[first]["boxes"], picture.shape[:0:-1], *grid)
    return (figure, {name: plots.agreement(mass[first][:, None], mass[name]) for name in others},
            plots.agreement(mass[first], even))
