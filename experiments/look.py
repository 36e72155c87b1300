"""Draw what detectors look at in images, and measure how far two of them agree.

    watch(model, ...)        one image through a detector, recorded -> dict, see there
    pictures(...)            the attention of one detector -> {name of the picture: figure}
    compare, beside          several detectors on the same objects -> agreement, figure
    listed, summary          the same in numbers -> for JSON, lines of text
    reading                  does a teacher's answer come from the image? -> accuracies
    add_options, run         the command `train.py look`
    memories, gaze, answers  of labelled images: what notebooks/2_attention_maps measures
    interval, ratio          a statistic of images -> its value, half of its 95 % interval

plots.py draws and models.record records; a notebook may use both alone.
"""
import dataclasses
import math
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Subset
from torchvision.ops import box_convert, box_iou, nms

import checkpoints
import data
import models
import train
from clockdistill import location_mask
from experiments import plots
from experiments.predict import add_image_options, image_files, numbered, read_images

FILES = """writes for each image and checkpoint, named after the file or the folder of its run:
  000_NAME_MODEL_layers.png   attention of the best detections' queries, by decoder layer
  000_NAME_MODEL_heads.png    attention of the best detection's query, by head
  000_NAME_MODEL_tokens.png   attention of the encoder's tokens in the middle of the detections
  000_NAME_MODEL_self.png     which queries listen to which
  000_NAME_beside.png         several checkpoints, each with the query that finds the same object
  look.json                   the detections shown, and how far the attention of each further
                              checkpoint agrees with that of the first: 1 is the same, 0 is nothing
                              in common. Its baselines: `even`, uniform attention over the box;
                              `elsewhere`, the agreement on different objects
example:
  python train.py look --checkpoint runs/teacher --checkpoint runs/student street.png"""


@torch.no_grad()
def watch(model, image, picture, best=4, layer=None, wanted=None, what="look"):
    """What a detector finds in one image, and where its best queries looked for it.

    image: (1, 3, h, w), prepared. picture: the same image as it is drawn, (3, H, W). Shown are the
    queries of the `best` best detections, one per object (boxes with an IoU over 0.5 are the same
    object). Or, when `wanted` is what this function returned of another detector, for each of its
    detections the query that fits best. layer: the decoder layer of "look" and of the heads; None:
    the last. what: begins the message when predictions are not finite.

    Returns a dict, q detections being shown:
      queries, labels, scores (q,), boxes (q, 4) xyxy in pixels of the picture, iou (q,) with the
               wanted boxes
      layers   list, a plots.look of each decoder layer; look: that of `layer`
      tokens   list, a plots.look of each encoder layer: of the finest level's tokens nearest to the
               boxes' middles
      listen   list, self-attention (heads, Q, Q) of each decoder layer
      order    (20,) the best of all queries, or all; ranks: their (label, score)
      grid     (H, W) of the finest level; side: (W, H) of the picture
    """
    side = torch.tensor(picture.shape[:0:-1])                             # W, H

    def pixels(fractions):                                                # (.., 4) or (.., 2)
        if fractions.shape[-1] == 4:
            fractions = box_convert(fractions, "cxcywh", "xyxy")
        return fractions.cpu() * side.repeat(fractions.shape[-1] // 2)

    padding = torch.zeros_like(image[:, 0], dtype=torch.bool)             # nothing is padded
    memory = model.encode(image, padding)
    learned, _ = model.learned_queries(memory)
    with models.record(model) as recorded:
        detections = model.decode_together(memory, [learned], None)[0]
    boxes, start = pixels(detections.boxes[:, 0]), pixels(learned.boxes[0])   # (L, Q, 4), (Q, 4|2)
    chances = detections.logits[-1, 0].sigmoid().cpu()                    # (Q, C)
    data.check_finite({"scores": chances, "boxes": boxes}, what)
    scores, labels = chances.max(1)                                       # (Q,) each
    if wanted is None:
        queries = nms(boxes[-1], scores, 0.5)[:best]
        wanted = {"labels": labels[queries], "boxes": boxes[-1, queries]}
    else:
        queries = best_fitting(wanted["labels"], wanted["boxes"], chances, boxes[-1])
    shown = boxes[-1, queries]                                            # (q, 4)
    order = scores.argsort(descending=True)[:20]
    layers, listen = [], []
    for i in range(model.decoder_layers):
        cross = recorded[f"decoder.{i}.cross"]
        layers.append(plots.look(cross, memory.shapes, queries, boxes[i], start))
        listen.append(recorded[f"decoder.{i}.self"].weights[0])

    # The image is encoded once more, to record these tokens only: a large image has 17,000.
    centres = pixels(models.token_centres(memory.shapes, memory.valid_ratios)[0])         # (S, 2)
    finest = math.prod(memory.shapes[0])
    middles = (shown[:, :2] + shown[:, 2:]) / 2                           # (q, 2)
    tokens = torch.cdist(middles, centres[:finest]).argmin(1)             # (q,)
    with models.record(model, tokens) as by_tokens:
        model.encode(image, padding)
    spots = {"boxes": shown, "references": centres[tokens]}
    return {"queries": queries, "labels": wanted["labels"], "boxes": shown,
            "scores": chances[queries, wanted["labels"]],
            "iou": box_iou(wanted["boxes"], shown).diagonal(),
            "layers": layers, "look": layers[-1 if layer is None else layer],
            "tokens": [plots.look(r, memory.shapes) | spots for r in by_tokens.values()],
            "listen": listen, "order": order, "ranks": list(zip(labels[order], scores[order])),
            "grid": memory.shapes[0], "side": tuple(side.tolist())}


def best_fitting(labels, boxes, chances, answered):
    """For each of K objects the query whose answer fits it best: by IoU times the class's chance.

    labels (K,), boxes (K, 4); chances (Q, C), answered (Q, 4); boxes xyxy. Returns (K,).
    """
    fit = box_iou(boxes, answered) * chances[:, labels].T                 # (K, Q)
    return fit.argmax(1)


def row_names(watched, classes):
    rows = zip(watched["labels"], watched["scores"], watched["queries"])
    return [f"{classes[label]} {score:.2f}\nquery {query}" for label, score, query in rows]


def pictures(name, picture, watched, classes):
    """{picture: figure} of one detector, called `name`; watched: what `watch` returned."""
    rows = row_names(watched, classes)
    best = rows[0].split("\n")[0]                                         # without "query 7"
    layers, listen = ({f"layer {i}": of_layer for i, of_layer in enumerate(watched[kind])}
                      for kind in ("layers", "listen"))
    # The encoder's pictures are whole images: no more than three fit beside each other.
    depth = len(watched["tokens"])
    depths = sorted({0, depth // 2, depth - 1}) if depth else []
    tokens = {f"encoder layer {i}": watched["tokens"][i] for i in depths}
    ranks = [f"{classes[label]} {score:.2f}" for label, score in watched["ranks"]]
    queries = watched["listen"][0].shape[-1]
    return {
        "layers": plots.query_attention(
            picture, layers, rows,
            title=f"{name}: where each detection's query looks, decoder layer by layer"),
        "heads": plots.query_attention(
            picture, plots.heads_apart(watched["look"], 0),
            title=f"{name}: where the query of its best detection looks ({best}), head by head"),
        "tokens": plots.query_attention(
            picture, tokens, rows, context=None,
            title=f"{name}: where the encoder's token in the middle (+) of each detection looks"),
        "self": plots.self_attention(
            listen, watched["order"], ranks,
            title=f"{name}: which queries listen to which, the {len(ranks)} best of {queries}")}


def compare(detectors):
    """How far detectors agree with the first of them.

    detectors: dict name -> what `watch` returned, of the same objects. Returns the same, in which
    the first has even (q,), the agreement of its attention with uniform attention over its box; the
    others have agreement (q,), with the first on the same object, and elsewhere (q,), the mean over
    the other objects, NaN when there are none. All are measured on the grid of the coarsest memory,
    which becomes everyone's "grid". See plots.agreement.
    """
    grid = min((watched["grid"] for watched in detectors.values()), key=math.prod)
    mass = {name: plots.attention_mass(watched["look"]["places"], watched["look"]["weights"],
                                       *grid)                             # (q, H, W)
            for name, watched in detectors.items()}
    (name, first), *others = detectors.items()
    even = plots.even_mass(first["boxes"], first["side"], *grid)
    compared = {name: first | {"grid": grid, "even": plots.agreement(mass[name], even)}}
    for other, watched in others:
        pairs = plots.agreement(mass[name][:, None], mass[other])         # (q, q)
        same = pairs.diagonal()
        elsewhere = (pairs.sum(1) - same) / (len(pairs) - 1)
        compared[other] = watched | {"grid": grid, "agreement": same, "elsewhere": elsewhere}
    return compared


def beside(picture, detectors, classes):
    """The figure of what `compare` returned."""
    first = next(iter(detectors.values()))
    # Of a row's lines the first: the others are of one detector only.
    rows = [row.split("\n")[0] for row in row_names(first, classes)]
    looks = {name: watched["look"] for name, watched in detectors.items()}
    return plots.query_attention(
        picture, looks, rows, first["grid"],
        title="Where each detector's queries look for the same objects, and how far they agree")


def listed(detectors, classes):
    """Plain values for JSON: each object's class, and by detector the numbers of its detection."""
    numbers = {"score": "scores", "box": "boxes", "iou": "iou", "even": "even",
               "agreement": "agreement", "elsewhere": "elsewhere"}
    objects = []
    for i, label in enumerate(next(iter(detectors.values()))["labels"]):
        objects.append({"class": classes[label]})
        for name, watched in detectors.items():
            objects[i][name] = {"query": int(watched["queries"][i])} | {
                key: watched[column][i].double().round(decimals=3).tolist()
                for key, column in numbers.items() if column in watched}
    return objects


def summary(objects, first, others):
    """Lines of text: how far the other detectors agree with the first on all images' objects.

    objects: as `listed` gives them. The agreement on the same object counts where both boxes have
    an IoU of at least 0.5.
    """
    def mean(values):
        values = [value for value in values if not math.isnan(value)]
        return f"{sum(values) / len(values):.2f}" if values else "-"

    lines = []
    for name in others:
        ours = [found[name] for found in objects]
        same = [detection["agreement"] for detection in ours if detection["iou"] >= 0.5]
        lines += [f"{name} has a box with an IoU of 0.5 or more at {len(same)} of the {len(objects)} "
                  f"objects shown of {first}, whatever its score; "
                  "agreement of their attention, from 0 (apart) to 1 (alike):",
                  f"  {mean(same)} on the same object",
                  f"  {mean(detection['elsewhere'] for detection in ours)} on different objects",
                  f"  {mean(found[first]['even'] for found in objects)} with uniform attention "
                  "over the box"]
    return lines


@torch.no_grad()
def reading(teacher, method, embedding, batches):
    """Does the logit part read the image? A teacher's accuracy on target-aware queries.

    Right is the object's true class (also where label noise asks for another), when the memory is
    the image's own, another image's of the batch, or noise of the same mean and spread in each
    channel. An answer that is as good from noise was in the question. And how much would an answer
    count? w of L_log is the largest score.

    method: CLoCKDistill with groups=1 and nothing but target-aware queries. embedding: what its
    queries ask with. batches: data.Batch of several images. Returns {"own", "another's", "noise":
    accuracy; "w": mean of each decoder layer, from its own memory, "w beside learned": the same
    when the queries see the teacher's learned ones}.
    """
    generator = torch.Generator().manual_seed(0)
    right, asked = {"own": 0, "another's": 0, "noise": 0}, 0
    weight = {name: torch.zeros(teacher.decoder_layers) for name in ("w", "w beside learned")}
    for batch in batches:
        queries = models.Queries(*method.queries(batch.labels, batch.boxes, embedding,
                                                 generator=generator))
        content, boxes, attend, valid = queries[:4]
        own = teacher.encode(batch.images, batch.padding)
        tokens = own.tokens                                               # (B, S, D)
        noise = torch.randn(tokens.shape, generator=generator).to(tokens)
        noise = tokens.mean((0, 1)) + tokens.std((0, 1)) * noise
        wanted = pad_sequence(batch.labels, batch_first=True)             # (B, K)
        asked += int(valid.sum())
        memories = {"own": tokens, "another's": tokens.roll(1, 0), "noise": noise}
        answers = {name: teacher.decode(dataclasses.replace(own, tokens=tokens), content, boxes,
                                        attend).logits                    # (L, B, K, C)
                   for name, tokens in memories.items()}
        for name, logits in answers.items():
            right[name] += int((logits[-1].argmax(-1) == wanted)[valid].sum())
        beside = teacher.answer(own, *teacher.learned_queries(own),
                                queries._replace(sees_learned=True)).extra
        for name, logits in zip(weight, (answers["own"], beside.logits)):
            w = logits.sigmoid().amax(3)                                  # (L, B, K)
            weight[name] += w[:, valid].sum(1).cpu()                      # (L,)
    parts = {name: count / max(asked, 1) for name, count in right.items()}
    return parts | {name: (total / max(asked, 1)).tolist() for name, total in weight.items()}


def add_options(parser):
    """The options of `train.py look`."""
    parser.description, parser.epilog = __doc__.split("\n\n")[0], FILES
    parser.add_argument("--checkpoint", required=True, action="append", metavar="FILE",
                        help=f"{train.CHECKPOINT_HELP}; given several times, the first one (the "
                             "teacher) says which objects are shown")
    add_image_options(parser, "runs/look")
    parser.add_argument("--best", type=int, default=4,
                        help="how many of the best detections (default: %(default)s)")
    parser.add_argument("--layer", type=int,
                        help="decoder layer of the heads and of the comparison; default: the last")


def open_detectors(paths, layer, size, device):
    """Checkpoints that know the same classes -> ({name: (model, size of its images)}, classes).

    They are called after their file, or their run's folder.
    """
    detectors, classes = {}, None
    for path in paths:
        model, payload = train.load_model(path)
        file = payload["path"].resolve()
        name = file.parent.name if file.stem in ("best", "last") else file.stem
        if name in detectors:
            raise ValueError(f"--checkpoint {path}: another one is called {name} too, rename its "
                             "file or folder")
        if layer is not None and not 0 <= layer < model.decoder_layers:
            raise ValueError(f"--layer {layer}: the decoder layers of {name} are 0 to "
                             f"{model.decoder_layers - 1}")
        classes = classes or payload["classes"]
        if payload["classes"] != classes:
            raise ValueError(f"{path} knows other classes than {paths[0]}: compare detectors of "
                             "the same classes")
        detectors[name] = model.to(device), train.input_size(payload, size)
    return detectors, classes


def run(checkpoint, images, out, best, layer, size=None, device="auto", precision="fp32"):
    """Write OUT/000_NAME_MODEL_layers.png and so on: `look --help` names all files.

    Raises ValueError after the last image when some could not be read; those are left out.
    """
    if best < 1:
        raise ValueError(f"--best {best}: want at least 1")
    device, out, files = train.pick_device(device), Path(out), image_files(images)
    detectors, classes = open_detectors(checkpoint, layer, size, device)
    first, *others = detectors
    written = plots.readable(classes)
    out.mkdir(parents=True, exist_ok=True)
    entries, broken = [], []
    unresized = any(sides is None for _, sides in detectors.values())
    try:
        for index, file, picture in read_images(files, "look", broken, unresized):
            watched, figures = {}, {}
            for name, (model, sides) in detectors.items():
                image = data.prepare(picture, sides)[None].to(device)         # (1, 3, h, w)
                with train.autocast(device, precision):
                    watched[name] = watch(model, image, picture, best, layer, watched.get(first),
                                          f"{file}, {name}")
                for kind, figure in pictures(name, picture, watched[name], written).items():
                    figures[f"{name}_{kind}"] = figure
            if others:
                watched = compare(watched)
                figures["beside"] = beside(picture, watched, written)
            for name, figure in figures.items():
                figure.savefig(out / f"{numbered(index, file)}_{name}.png", dpi=150)
            entries.append({"image": str(file), "detections": listed(watched, classes)})
    finally:                                   # what was found is kept, also by Ctrl-C
        if entries:
            checkpoints.write_json(out / "look.json", entries)
    if entries:
        objects = [detection for entry in entries for detection in entry["detections"]]
        for line in summary(objects, first, others):
            print(line)
        print(f"{len(entries)} images: pictures, and look.json with their detections, in {out}/")
    if broken:
        raise ValueError(f"left out {len(broken)} of {len(files)} files: {'; '.join(broken)}")


# ----------------------------------------------------------------------------------------------
# Labelled images: what notebooks/2_attention_maps measures
# ----------------------------------------------------------------------------------------------

@torch.no_grad()
def memories(model, dataset, count):
    """Memory of the first `count` images, all of one size -> tokens (count, S, D), and which of
    them lie on an object (count, S)."""
    tokens, inside = [], []
    for batch in data.eval_loader(Subset(dataset, range(count)), 20):
        memory = model.encode(batch.images, batch.padding)
        tokens.append(memory.tokens)
        for boxes in batch.boxes:
            masks = [location_mask(boxes, *shape)[0].flatten() for shape in memory.shapes]
            inside.append(torch.cat(masks))                               # (S,) bool
    return torch.cat(tokens), torch.stack(inside)


@torch.no_grad()
def gaze(model, image, target, asked=None):
    """What a decoder looks at for each of the K true objects of one image, and what it answers.

    image: (3, h, w), prepared. target: its labels and boxes, K of them, at least 1. asked: the
    target-aware queries of these objects, as CLoCKDistill.queries returns them; None: for each
    object, the learned query whose answer fits it best.

    Returns a dict:
      looks    list, a plots.look of each decoder layer, of K queries
      chances  (K, C); boxes (K, 4): what the last layer answers, xyxy in pixels of the image
      labels   (K,); truth (K, 4): what is right
    """
    count, size = len(target["labels"]), torch.tensor(image.shape[:0:-1]).repeat(2)   # W, H, W, H
    padding = torch.zeros_like(image[None, 0], dtype=torch.bool)          # nothing is padded
    # In a joint pass the target-aware queries are the last ones.
    with models.record(model, None if asked is None else slice(-count, None)) as recorded:
        output = model(image[None], padding, extra=asked)
    answer = output.detections if asked is None else output.extra
    truth, boxes = (box_convert(boxes, "cxcywh", "xyxy") * size
                    for boxes in (target["boxes"], answer.boxes[-1, 0]))  # (K, 4), (Q, 4)
    chances = answer.logits[-1, 0].sigmoid()                              # (Q, C)
    if asked is None:
        queries = best_fitting(target["labels"], truth, chances, boxes)
    else:
        queries = torch.arange(count)
    looks = [plots.look(recorded[f"decoder.{layer}.cross"], output.memory.shapes, queries)
             for layer in range(model.decoder_layers)]
    return {"looks": looks, "chances": chances[queries], "boxes": boxes[queries],
            "labels": target["labels"], "truth": truth}


def answers(gazes):
    """A detector's answers about all objects: columns of N answers, from what `gaze` returned.

    gazes: list, one per image. Returns a dict: image (N,), its place in the list; label, said (N,),
    the class asked about and the answer's; w (N,), the answer's chance; box, truth (N, 4); iou (N,)
    of the two; wrong (N,), 1 where the class is another or the IoU is below 0.5, else 0.
    """
    image = [torch.full_like(gazed["labels"], index) for index, gazed in enumerate(gazes)]
    label, chances, box, truth = (torch.cat([gazed[key] for gazed in gazes])
                                  for key in ("labels", "chances", "boxes", "truth"))
    w, said = chances.max(1)                                              # (N,) each
    iou = torch.cat([box_iou(gazed["truth"], gazed["boxes"]).diagonal() for gazed in gazes])
    wrong = ((said != label) | (iou < 0.5)).float()
    return {"image": torch.cat(image), "label": label, "said": said, "w": w, "box": box,
            "truth": truth, "iou": iou, "wrong": wrong}


def interval(statistic, *columns):
    """A statistic of N images -> its value, half of its 95 % interval, as floats.

    columns: numbers (N,) of the images, of whose sums the statistic is a function. The interval is
    1.96 deviations of the statistic when N images are drawn with replacement, 1000 times; the same
    ones in every call.
    """
    count = len(columns[0])
    draws = torch.randint(count, (1000, count), generator=torch.Generator().manual_seed(0))
    value = statistic(*(column.sum() for column in columns))
    drawn = statistic(*(column[draws].sum(1) for column in columns))      # (1000,)
    return value.item(), 1.96 * drawn.std().item()


def ratio(above, below=None):
    """Numbers (N,) of images -> sum of above / sum of below (or N), half of its 95 % interval."""
    above = torch.as_tensor(above, dtype=torch.float)
    below = torch.ones_like(above) if below is None else below
    return interval(torch.div, above, below)
