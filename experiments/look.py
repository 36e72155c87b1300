"""What detectors look at in an image: the pictures and figures of `python train.py look`.

    watch(model, ...)  one image through a detector, recorded   -> dict, see there
    pictures(...)      the attention of one detector            -> {name of the picture: figure}
    compare, beside    several detectors on the same objects    -> how far they agree, figure
    listed, summary    the same in figures                      -> for JSON, lines of text

The drawing itself is in plots.py, the recording in models.record; a notebook may use both alone.
"""
import dataclasses
import math
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, box_iou, nms
from tqdm import tqdm

import checkpoints
import data
import models
import train
from experiments import plots

FILES = """writes for each image and checkpoint, named after the file or the folder of its run:
  000_NAME_MODEL_layers.png   where the queries of the best detections look, decoder layer by layer
  000_NAME_MODEL_heads.png    the same of the best detection alone, head by head
  000_NAME_MODEL_tokens.png   where the encoder's tokens in the middle of these detections look
  000_NAME_MODEL_self.png     which queries listen to which
  000_NAME_beside.png         several checkpoints, each with the query that finds the same object
  look.json                   the detections shown, and how far the attention of each further checkpoint agrees with
                              that of the first: 1 is the same, 0 is nowhere in common; `even` is what a look spread
                              evenly over the box would reach, `elsewhere` the agreement on different objects
example:
  python train.py look --checkpoint runs/teacher --checkpoint runs/student street.png"""


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
      grid     (H, W) of the finest level; side, (W, H) of the picture
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
    data.check_finite({"scores": chances, "boxes": boxes}, "look")
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
            "order": order, "ranks": list(zip(labels[order], scores[order])), "grid": memory.shapes[0],
            "side": tuple(side.tolist())}


def row_names(one, classes):
    return [f"{classes[label]} {score:.2f}\nquery {query}"
            for label, score, query in zip(one["labels"], one["scores"], one["queries"])]


def pictures(name, picture, one, classes):
    """{picture: figure} of one detector, called `name`; one: what `watch` returned."""
    rows, best = row_names(one, classes), f"{classes[one['labels'][0]]} {one['scores'][0]:.2f}"
    ranks, depth = one["ranks"][:20], len(one["tokens"])
    shown = sorted({0, depth // 2, depth - 1}) if depth else []            # whole images: no more fit beside each other
    return {
        "layers": plots.query_attention(
            picture, {f"layer {i}": look for i, look in enumerate(one["layers"])}, rows,
            title=f"{name}: where each detection's query looks, decoder layer by layer"),
        "heads": plots.query_attention(
            picture, plots.heads_apart(one["look"], 0),
            title=f"{name}: where the query of its best detection looks ({best}), head by head"),
        "tokens": plots.query_attention(
            picture, {f"encoder layer {i}": one["tokens"][i] for i in shown}, rows, context=None,
            title=f"{name}: where the encoder's token in the middle (+) of each detection looks"),
        "self": plots.self_attention(
            {f"layer {i}": weights for i, weights in enumerate(one["listen"])}, one["order"][:20],
            [f"{classes[label]} {score:.2f}" for label, score in ranks],
            title=f"{name}: which queries listen to which, the {len(ranks)} best of {len(one['order'])}")}


def compare(seen):
    """seen: dict name -> what `watch` returned, of the same objects -> the same, with how far they agree.

    The first gets even (q,), the agreement of its attention with a look spread evenly over its box; the others get
    agreement (q,) with the first on the same object, and elsewhere (q,), the mean over the other objects, NaN when
    there are none. All on the grid of the coarsest memory, which becomes everyone's "grid". See plots.agreement.
    """
    grid = min((one["grid"] for one in seen.values()), key=math.prod)
    mass = [plots.attention_mass(one["look"]["places"], one["look"]["weights"], *grid).cpu() for one in seen.values()]
    (first, one), *others = seen.items()
    even = plots.even_mass(one["boxes"], one["side"], *grid)
    compared = {first: one | {"grid": grid, "even": plots.agreement(mass[0], even)}}
    for (name, one), other in zip(others, mass[1:]):
        pairs = plots.agreement(mass[0][:, None], other)                   # (q, q)
        same = pairs.diagonal()
        compared[name] = one | {"grid": grid, "agreement": same, "elsewhere": (pairs.sum(1) - same) / (len(pairs) - 1)}
    return compared


def beside(picture, seen, classes):
    """The figure of what `compare` returned."""
    first = next(iter(seen.values()))
    return plots.query_attention(picture, {name: one["look"] for name, one in seen.items()}, row_names(first, classes),
                                 first["grid"],
                                 title="Where the queries look that find the same object, and how far they agree")


def listed(seen, classes):
    """Plain values for JSON: of each object its class, and by detector what was found and how far they agree."""
    numbers = {"score": "scores", "box": "boxes", "iou": "iou", "even": "even", "agreement": "agreement",
               "elsewhere": "elsewhere"}

    def values(one, i):
        return {"query": int(one["queries"][i])} | {key: one[many][i].double().round(decimals=3).tolist()
                                                    for key, many in numbers.items() if many in one}
    return [{"class": classes[label]} | {name: values(one, i) for name, one in seen.items()}
            for i, label in enumerate(next(iter(seen.values()))["labels"])]


def summary(objects, first, others):
    """Lines about all objects of all images, as `listed` gives them: how far the others agree with the first."""
    def mean(values):
        values = [value for value in values if value == value]             # without NaN
        return f"{sum(values) / len(values):.2f}" if values else "-"

    lines = []
    for name in others:
        same = [found[name]["agreement"] for found in objects if found[name]["iou"] >= 0.5]
        lines += [f"{name} finds {len(same)} of the {len(objects)} objects shown of {first}; where they look agrees by",
                  f"  {mean(same)} on the same object, 0: apart, 1: alike",
                  f"  {mean([found[name]['elsewhere'] for found in objects])} on different objects",
                  f"  {mean([found[first]['even'] for found in objects])} with a look spread evenly over the box"]
    return lines


@torch.no_grad()
def reading(teacher, method, embedding, batches, seed=0):
    """Does the logit part read the image? How often a teacher names the class that a target-aware query asks for when
    the memory is the image's own, another image's of the batch, or noise of the same mean and spread in each channel.

    method: CLoCKDistill with groups=1 and nothing but target-aware queries; embedding: what its queries ask with.
    batches: data.Batch of several images. -> {"own", "another's", "noise": accuracy}; an answer that is as good from
    noise was in the question.
    """
    generator, right, asked = torch.Generator().manual_seed(seed), dict.fromkeys(("own", "another's", "noise"), 0), 0
    for batch in batches:
        labels, boxes = [t["labels"] for t in batch.targets], [t["boxes"] for t in batch.targets]
        queries = method.queries(labels, boxes, embedding, generator=generator)
        own = teacher.encode(batch.images, batch.padding)
        noise = torch.randn(own.tokens.shape, generator=generator).to(own.tokens)
        noise = own.tokens.mean((0, 1)) + own.tokens.std((0, 1)) * noise
        wanted, valid = pad_sequence(labels, batch_first=True), queries[3]                   # (B, K)
        asked += int(valid.sum())
        for name, tokens in {"own": own.tokens, "another's": own.tokens.roll(1, 0), "noise": noise}.items():
            found = teacher.decode(dataclasses.replace(own, tokens=tokens), *queries[:3])
            right[name] += int((found.logits[-1].argmax(-1) == wanted)[valid].sum())
    return {name: count / max(asked, 1) for name, count in right.items()}


def add_options(parser):
    """The options of `train.py look`."""
    parser.epilog = FILES
    parser.add_argument("--checkpoint", required=True, action="append", metavar="FILE",
                        help="last.pt, best.pt, exported safetensors, or a run's folder; given several times, the first "
                             "one (the teacher) says which objects are shown")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--out", default="runs/look", help="folder of the output (default: %(default)s)")
    parser.add_argument("--best", type=int, default=4, help="how many of the best detections (default: %(default)s)")
    parser.add_argument("--layer", type=int, help="decoder layer of the heads and of the comparison; default: the last")
    parser.add_argument("--size", help="resize to SHORT,MAX pixels; default: as each checkpoint was trained")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")


def run(checkpoint, images, out, best, layer, size, device):
    """Pictures of what detectors look at, OUT/000_NAME_MODEL_layers.png and so on: `look --help` names them all."""
    device, out, detectors, entries = train.pick_device(device), Path(out), {}, []
    if best < 1:
        raise ValueError(f"--best {best}: want at least 1")
    for path in checkpoint:
        model, payload = train.load_model(path)
        file = payload["path"].resolve()
        name = file.parent.name if file.stem in ("best", "last") else file.stem
        if name in detectors:
            raise ValueError(f"--checkpoint {path}: another one is called {name} too, rename its file or folder")
        if layer is not None and not 0 <= layer < model.decoder_layers:
            raise ValueError(f"--layer {layer}: the decoder layers of {name} are 0 to {model.decoder_layers - 1}")
        detectors[name] = model.to(device), payload
        if payload["classes"] != (classes := next(iter(detectors.values()))[1]["classes"]):
            raise ValueError(f"{path} knows other classes than {checkpoint[0]}: compare detectors of the same classes")
    first, *others = detectors
    out.mkdir(parents=True, exist_ok=True)
    for index, file in enumerate(tqdm(images, "look", mininterval=train.quiet_interval())):
        picture, seen, figures = data.read_image(file), {}, {}
        for name, (model, payload) in detectors.items():
            sides = train.parse_size(size or payload["settings"]["size"]) or data.DEFAULT_SIZE[payload["data"]]
            image = data.prepare(picture, sides)[None].to(device)                          # (1, 3, h, w)
            seen[name] = watch(model, image, picture, best, layer, seen.get(first))
            drawn = pictures(name, picture, seen[name], classes)
            figures |= {f"{name}_{what}": figure for what, figure in drawn.items()}
        if others:
            seen = compare(seen)
            figures["beside"] = beside(picture, seen, classes)
        for what, figure in figures.items():
            figure.savefig(out / f"{index:03d}_{Path(file).stem}_{what}.png", dpi=150)
        entries.append({"image": str(file), "detections": listed(seen, classes)})
    checkpoints.write_json(out / "look.json", entries)
    print("\n".join(summary([found for one in entries for found in one["detections"]], first, others)
                    + [f"{len(images)} images: pictures, and look.json with the detections shown, in {out}/"]))
