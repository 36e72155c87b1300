"""CLoCKDistill: a small detection transformer learns from a big one what to remember, and how to read it.

Lan & Tian, "CLoCKDistill: Consistent Location-and-Context-aware Knowledge Distillation for DETRs"
(arXiv 2502.10683), the whole method in one file, in the paper's order, from plain tensors of any DETR:

    1. location_mask, memory_loss      the student's encoder output ("memory") copies the teacher's
    2. target_queries, logit_loss      both decoders answer the same queries, made from the ground truth
    3. CLoCKDistill                    their weighted sum, every switch named, and a step to copy
    4. Balance                         the weights of the two parts, from how hard each one pulls

How this repository's own detectors take that step: `clockdistill_step` in train.py.

Notation: B images, S memory tokens, D channels, L decoder layers, Q queries, C classes (labels
0..C-1), K objects. Boxes are (cx, cy, w, h). The functions of part 1 want them as fractions of
the PADDED batch image; everything else as fractions of each image's own size. `padding` is True where
padded, `valid` and `attend` True where real. Everything is computed in float32 (or the inputs'
float64), also under autocast; no loss sends a gradient to the teacher.

Where a choice comes from: [A] the paper's abstract, [T] a third party's restatement of the paper,
[P] the authors' earlier public code for a DETR distiller, [O] our own. Only [A] is certain; nearly all
the others are switches.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert


# ----------------------------------------------------------------------------------------------
# 1. Location-and-context-aware memory distillation
# ----------------------------------------------------------------------------------------------

def location_mask(boxes, height, width, valid=None):
    """M and S [T]: which cells of one memory map lie on an object, and how much each cell counts.

        M_p = 1 inside a ground-truth box, else 0
        S_p = 1 / (H_k W_k) inside box k,  1 / N_bg outside;   the smaller of overlapping boxes wins
    so that in S each object, near or far, adds up to as much as any other, and as all the background
    together.

    boxes: (K, 4) of ONE image, (cx, cy, w, h) as fractions of the padded image; K = 0 is fine.
    height, width: cells of the map.  valid: (height, width) bool, False at padded cells; None = all.
    Returns inside (height, width) bool = M, and scale (height, width) = S.

    A box covers every cell that it touches; an object smaller than a cell owns one. H_k W_k counts
    only the cells of the box that are on the map and not padded [O], N_bg those outside all boxes. A
    box beyond the border or wholly in padding owns nothing. Padded cells are neither object nor
    background: outside M, and S = 0.
    Raises ValueError on boxes or `valid` of another shape.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"location_mask wants one image's boxes, (K, 4), not {tuple(boxes.shape)}")
    if valid is None:
        valid = torch.ones(height, width, dtype=torch.bool, device=boxes.device)
    if valid.shape != (height, width):
        raise ValueError(f"valid is {tuple(valid.shape)}, the map (height, width) ({height}, {width})")
    inside, scale = _location_masks(boxes[None], valid[None])
    return inside[0], scale[0]


def _location_masks(boxes, valid):
    """location_mask of a batch: boxes (B, K, 4), valid (B, H, W) -> inside, scale (B, H, W)."""
    _, H, W = valid.shape
    cx, cy, w, h = _full(boxes).unbind(-1)                              # each (B, K)
    in_y = _touches(cy, h, H)                                           # (B, K, H)
    in_x = _touches(cx, w, W)                                           # (B, K, W)
    # (B, K, H, 1) and (B, K, 1, W) and (B, 1, H, W) -> (B, K, H, W)
    cells = in_y[..., None] & in_x[..., None, :] & valid[:, None]
    inside = cells.any(1)                                               # (B, H, W)
    background = (valid & ~inside)[:, None]                             # (B, 1, H, W)
    regions = torch.cat([background, cells], 1).to(cx)                  # (B, 1 + K, H, W)
    # The fewer cells a box has, the larger its 1 / cells: of overlapping boxes the smallest wins.
    sizes = regions.sum((2, 3), keepdim=True).clamp(min=1)              # (B, 1 + K, 1, 1)
    return inside, (regions / sizes).amax(1)                            # (B, H, W) both


def _touches(centre, size, cells):
    """Which of `cells` equal parts of an axis a box touches: (B, K) fractions -> (B, K, cells)."""
    # 1e-4 of a cell: in float32 a box aligned with the cells would often spill into one more.
    first = ((centre - size / 2) * cells + 1e-4).floor()
    end = ((centre + size / 2) * cells - 1e-4).ceil()
    # A thinner box on the edge between two cells is left with none: its centre's cell is its own.
    own = torch.where(centre == 1, cells - 1, (centre * cells).floor())
    first, end = torch.minimum(first, own), torch.maximum(end, own + 1)
    index = torch.arange(cells, device=centre.device)                   # (cells,)
    return (index >= first[..., None]) & (index < end[..., None])


def memory_loss(student, teacher, boxes, shapes, padding=None, alpha=5e-5, beta=1e-7, adapter=None,
                location=True, scale=True):
    """L_mem [T]: the student's memory imitates the teacher's, objects apart from background.

        alpha * sum_p M_p S_p |A^T_p - f(A^S_p)|^2  +  beta * sum_p (1 - M_p) S_p |A^T_p - f(A^S_p)|^2
    over B. |.|^2 sums over channels, as in FGD [O]; M and S are made level by level, levels are
    summed [O].

    student: (B, S, D), teacher: (B, S, D') encoder outputs, level after level, each row by row.
    boxes: list of B tensors (K_b, 4), fractions of the PADDED image.
    shapes: list of (H_l, W_l), sum H_l W_l = S.
    padding: (B, S) bool, True at padded tokens: they do not count, whatever they hold, NaN included.
    alpha, beta: belong to 256 channels and 800 x 1333 pixels; another scale needs its own.
    adapter: f, a module or function (B, S, D) -> (B, S, D'); None = identity.
    location: False = M is ignored, every token gets alpha.
    scale: False = S is 1 at every token that is not padded, so that big objects and the background
        outweigh small ones (and alpha, beta should be chosen anew).
    Returns a scalar. An image without objects is all background.
    Raises ValueError when shapes do not fit.
    """
    B, tokens, _ = student.shape
    if teacher.shape[:2] != (B, tokens):
        raise ValueError("student and teacher memory differ in images or tokens: "
                         f"{tuple(student.shape)}, {tuple(teacher.shape)}; both must read the same "
                         "images at the same strides")
    sizes = _sizes_of(shapes, tokens, "memory")
    if len(boxes) != B:
        raise ValueError(f"boxes of {len(boxes)} images for a memory of {B}")
    student, teacher = _full(student), _full(teacher.detach())
    if padding is not None:                                     # filled first: 0 * NaN would be NaN
        hole = padding[..., None]                                                 # (B, S, 1)
        student, teacher = student.masked_fill(hole, 0), teacher.masked_fill(hole, 0)
    if adapter is not None:
        with torch.autocast(student.device.type, enabled=False):
            student = adapter(student)                                            # (B, S, D')
    if student.shape != teacher.shape:
        raise ValueError(f"student memory has {student.shape[2]} channels, teacher memory "
                         f"{teacher.shape[2]}: pass an adapter that maps the first to the second")

    valid = torch.ones_like(student[..., 0], dtype=torch.bool)                    # (B, S)
    if padding is not None:
        valid = ~padding
    weight = memory_weights(boxes, shapes, valid, alpha, beta, location, scale)   # (B, S)
    error = (teacher - student).square().sum(2)                                   # (B, S)
    return (weight * error).sum() / B


def memory_weights(boxes, shapes, valid, alpha=5e-5, beta=1e-7, location=True, scale=True):
    """What L_mem multiplies each token's squared error by -> (B, S).

    alpha S on objects, beta S on the background.
    valid: (B, S) bool, False at padded tokens, which weigh 0; all else as in memory_loss.
    """
    # Rows that pad an image with fewer boxes lie far outside of it and own no cell.
    boxes = [b.reshape(-1, 4) for b in boxes]
    boxes = pad_sequence(boxes, batch_first=True, padding_value=-1.0)             # (B, K, 4)
    levels = valid.split([height * width for height, width in shapes], 1)
    masks = []
    for shape, level in zip(shapes, levels):
        inside, share = _location_masks(boxes, level.unflatten(1, tuple(shape)))  # (B, H_l, W_l)
        masks.append((inside.flatten(1), share.flatten(1)))                       # (B, H_l W_l)
    M, S = (torch.cat(kind, 1) for kind in zip(*masks))                           # (B, S) each
    if not scale:
        S = valid.to(S)
    return torch.where(M, alpha * S, beta * S) if location else alpha * S


# ----------------------------------------------------------------------------------------------
# 2. Target-aware consistent logit distillation
# ----------------------------------------------------------------------------------------------

def target_queries(labels, boxes, embedding, groups=1, box_noise=0.0, label_noise=0.0, rows="label",
                   random_queries=0, random_seed=None, at_least=0, generator=None):
    """Decoder queries made from the ground truth [A]: both models look where the objects are.

        q_k = embedding[class_k] as content,  box_k as reference box                 [T, P; the box: O]

    labels: list of B tensors (K_b,), numbered from 0; a negative one makes a padding row.
    boxes: list of B tensors (K_b, 4), fractions of each image's own size.
    embedding: (N, D), the contents that can be asked with, or (D,), one for every query.
    rows: "label" = query k reads row class_k (with a single row: that one). Such a query contains its
        answer: a decoder can name the class without looking at the memory.
        "slot" = the j-th query of an image reads row j mod N whatever its class: a model's own
        learned contents.
    groups: each object is asked for that often, in groups that do not see one another [P]; query j
        asks for object j // groups in group j % groups. Without noise or slots all groups are alike.
    box_noise: 0..1, each corner moves by up to box_noise * half the box's width and height, as in
        DN-DETR, and is then clamped to the image.
    label_noise: chance that "label" reads a random row instead.
    random_queries: so many more queries with random boxes and random rows as contents, the same for
        all images of the batch, after the others and as a group of their own: KD-DETR's "general"
        points.
    random_seed: a number draws the same random queries at every call (the precursor's fixed queries
        [P]), None new ones from `generator`.
    at_least: slots for so many objects, also when no image has them: nn.MultiheadAttention fails on
        0 queries, which would leave the other processes of a distributed run waiting.
    generator: torch.Generator of all random numbers, on any device; None = torch's global one.
        Nothing is drawn when both noises and random_queries are 0.

    Returns, with Q = groups * max(max_b K_b, at_least) + random_queries, 0 without anything to ask:
        content (B, Q, D), boxes (B, Q, 4)
        attend (B, Q, Q) bool, True where the row may attend to the column: within a group, and every
            row to itself (nn.MultiheadAttention wants ~attend, once per head)
        valid (B, Q) bool, False in padding rows, which attend only to themselves and whose outputs
            must be ignored
    Raises ValueError on noise outside 0..1, groups below 1, an unknown value of `rows`, other numbers
    of labels than of boxes, and, on the CPU, a label without a row in the embedding.
    """
    _check_counts(labels, boxes)
    _check_choice("rows", rows, ("label", "slot"))
    if not (0 <= box_noise <= 1 and 0 <= label_noise <= 1 and groups >= 1):
        raise ValueError(f"want noise in 0..1 and groups >= 1, got box_noise={box_noise}, "
                         f"label_noise={label_noise}, groups={groups}")

    def uniform(*shape, generator=generator):                     # numbers in 0..1
        device = embedding.device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=device).to(embedding.device)

    # Stack the images' objects; rows that pad an image have the label -1.
    embedding = embedding.reshape(-1, embedding.shape[-1])                        # (N, D)
    N, B = len(embedding), len(labels)
    labels = [l.reshape(-1).long() for l in labels]
    boxes = [_full(b).reshape(-1, 4) for b in boxes]
    labels = pad_sequence(labels, batch_first=True, padding_value=-1)             # (B, K)
    boxes = pad_sequence(boxes, batch_first=True, padding_value=0.5)              # (B, K, 4)
    short = max(at_least - labels.shape[1], 0)
    labels = F.pad(labels, (0, short), value=-1).repeat_interleave(groups, 1)     # K -> K * groups
    boxes = F.pad(boxes, (0, 0, 0, short), value=0.5).repeat_interleave(groups, 1)
    valid = labels >= 0
    index = torch.arange(labels.shape[1], device=labels.device)                   # (K * groups,)
    group = index % groups

    # Which content each query asks with, and from which box.
    if rows == "slot" or N == 1:
        row = (index % N).expand_as(labels)
    else:
        row = labels.clamp(min=0)
        if label_noise:
            replaced = uniform(*row.shape) < label_noise
            row = torch.where(replaced, (uniform(*row.shape) * N).long(), row)
    if box_noise:
        half = boxes[..., 2:].repeat(1, 1, 2) / 2                                # of x0, y0, x1, y1
        move = (2 * uniform(*boxes.shape) - 1) * box_noise * half
        corners = (box_convert(boxes, "cxcywh", "xyxy") + move).clamp(0, 1)
        boxes = box_convert(corners, "xyxy", "cxcywh")

    # Append the random queries, a group of their own.
    if random_queries:
        fixed = generator if random_seed is None else torch.Generator().manual_seed(random_seed)
        random = uniform(random_queries, 5, generator=fixed).expand(B, -1, -1)    # (B, R, 4 + 1)
        row = torch.cat([row, (random[..., 4] * N).long()], 1)                    # (B, Q)
        boxes = torch.cat([boxes, random[..., :4].to(boxes)], 1)                  # (B, Q, 4)
        valid = F.pad(valid, (0, random_queries), value=True)                     # (B, Q)
        group = F.pad(group, (0, random_queries), value=groups)                   # (Q,)

    # A query sees the real queries of its group, and itself.
    alike = group[:, None] == group                                               # (Q, Q)
    itself = torch.eye(len(group), dtype=torch.bool, device=group.device)
    attend = alike & valid[:, :, None] & valid[:, None, :] | itself               # (B, Q, Q)
    try:
        content = embedding[row]                                                  # (B, Q, D)
    except IndexError:                          # of the CPU; looking at labels would stop a GPU
        raise ValueError(f"label {int(row.max())} has no row in the embedding of {N}: number the "
                         "classes from 0, and give an embedding with a row for each") from None
    return content, boxes, attend, valid


def logit_loss(student_logits, student_boxes, teacher_logits, teacher_boxes, valid,
               temperature=10.0, classes="bernoulli", confidence=True, normalise="queries",
               layers="all"):
    """L_log [T, P], term by term: the student answers the target-aware queries as the teacher does.

        sum over layers and queries of  w_k * cls,  w_k * l1,  w_k * giou,  over the number of valid
        queries;    w_k = max_c sigmoid(teacher logit)
        cls = T^2 KL(teacher || student),  l1 = sum |cxcywh - cxcywh|,  giou = 1 - GIoU

    student_logits: (L_s, B, Q, C), student_boxes: (L_s, B, Q, 4), a decoder layer each; teacher_*:
        with L_t layers. Layer i = 1..L_s learns from layer round(i * L_t / L_s), at least 1, so that
        the last learns from the last [O]. (Python's round: a half goes to the even number.) Some
        detectors return one layer in eval mode: from such a teacher all layers of the student learn
        the same.
    valid: (B, Q) bool; the other queries have no loss and no gradient, whatever they hold, NaN
        included.
    temperature: T; both logits are divided by it. Not used in w.
    classes: "bernoulli" = a yes or no for each class, summed over classes, for sigmoid detectors [O];
        "softmax" = one distribution, for detectors whose last column is "no object": w_k is then the
        largest softmax probability of the other columns;
        "softmax_of_sigmoid" = one distribution over the classes of a sigmoid detector, always 0 with
        a single class.
    confidence: False = w is 1.
    normalise: divide by "queries", the number of valid ones [O], "confidence", each layer's summed
        w, or "batch", this process's B. The first two are means over all processes, so that the
        mean of the processes' gradients is the gradient of the whole batch: every process has to
        call this. With "batch" it is, where all processes have the same B.
    layers: "all" or "last".
    Returns {"cls", "l1", "giou"}, unweighted scalars; without valid queries 0, still attached to the
    student's graph.
    Raises ValueError when student and teacher answer different queries, when boxes are not of the
    logits' layers and queries, or on an unknown choice.
    """
    _check_choice("classes", classes, ("bernoulli", "softmax", "softmax_of_sigmoid"))
    _check_choice("normalise", normalise, ("queries", "batch", "confidence"))
    _check_choice("layers", layers, ("all", "last"))
    shapes = [tuple(x.shape) for x in (student_logits, teacher_logits, valid)]
    if not (shapes[0][1:] == shapes[1][1:] and shapes[0][1:3] == shapes[2]):
        raise ValueError("student and teacher must answer the same queries about the same classes, "
                         f"but their logits (L, B, Q, C) are {shapes[0]} and {shapes[1]}, valid "
                         f"(B, Q) is {shapes[2]}")

    for logits, boxes in ((student_logits, student_boxes), (teacher_logits, teacher_boxes)):
        if boxes.shape != (*logits.shape[:3], 4):
            raise ValueError(f"beside logits (L, B, Q, C) of {tuple(logits.shape)}, boxes must be "
                             f"(L, B, Q, 4), not {tuple(boxes.shape)}")

    # Pair the layers.
    L_s, L_t = len(student_logits), len(teacher_logits)
    s_layers = list(range(L_s))
    t_layers = [max(round(i * L_t / L_s), 1) - 1 for i in range(1, L_s + 1)]
    if layers == "last":
        s_layers, t_layers = s_layers[-1:], t_layers[-1:]

    def take(x, layers, fill):                                  # filled first: 0 * NaN would be NaN
        return _full(x[layers]).masked_fill(~valid[..., None], fill)

    s, s_boxes = take(student_logits, s_layers, 0), take(student_boxes, s_layers, 0.5)
    t = take(teacher_logits.detach(), t_layers, 0)                                # (L, B, Q, C)
    t_boxes = take(teacher_boxes.detach(), t_layers, 0.5)                         # (L, B, Q, 4)

    # w, the weight of each query.
    w = torch.ones_like(t[..., 0])                                                # (L, B, Q)
    if confidence:
        w = t.softmax(3)[..., :-1].amax(3) if classes == "softmax" else t.sigmoid().amax(3)
    w = w * valid
    if normalise == "queries":
        w = w / _mean_over_processes(valid.sum().float()).clamp(min=1)
    elif normalise == "batch":
        w = w / valid.shape[0]
    else:
        w = w / _mean_over_processes(w.sum((1, 2), keepdim=True)).clamp(min=1e-6)

    # KL of Bernoullis: the cross entropy with the teacher minus the teacher's own entropy.
    if classes == "bernoulli":
        p = (t / temperature).sigmoid()
        kl = (F.binary_cross_entropy_with_logits(s / temperature, p, reduction="none")
              - F.binary_cross_entropy_with_logits(t / temperature, p, reduction="none"))
    else:
        log_s, log_t = (s / temperature).log_softmax(3), (t / temperature).log_softmax(3)
        kl = F.kl_div(log_s, log_t, reduction="none", log_target=True)            # (L, B, Q, C)
    return {"cls": (w * kl.sum(3)).sum() * temperature ** 2,
            "l1": (w * (s_boxes - t_boxes).abs().sum(3)).sum(),
            "giou": (w * _giou_distance(s_boxes, t_boxes)).sum()}


def _giou_distance(a, b):
    """1 - GIoU of boxes (..., 4) cxcywh, pair by pair -> (...), in 0..2.

    torchvision's adds an eps to both divisors, which tiny boxes feel (and without it makes NaN of
    boxes without area). Here two such boxes are 2 apart, or 0 when not even their hull has an area.
    """
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")

    def area(low, high):                                          # corners (..., 2)
        w, h = (high - low).clamp(min=0).unbind(-1)
        return w * h

    low_a, high_a, low_b, high_b = a[..., :2], a[..., 2:], b[..., :2], b[..., 2:]
    overlap = area(torch.maximum(low_a, low_b), torch.minimum(high_a, high_b))
    hull = area(torch.minimum(low_a, low_b), torch.maximum(high_a, high_b))
    union = area(low_a, high_a) + area(low_b, high_b) - overlap
    # 1 - (overlap / union - (hull - union) / hull). A 1 in place of a 0 keeps 0 / 0 out of value and
    # gradient; so does 1e-30, where 1 / area would soon overflow.
    distance = 2 - overlap / union.where(union > 1e-30, 1) - union / hull.where(hull > 1e-30, 1)
    return distance.where(hull > 1e-30, 0)


# ----------------------------------------------------------------------------------------------
# 3. Both parts
# ----------------------------------------------------------------------------------------------

class CLoCKDistill(nn.Module):
    """The method: what to add to the student's detection loss.

        lambda_mem * L_mem + lambda_log * (cls_weight * cls + l1_weight * l1 + giou_weight * giou)
    Two linear maps, where the models' widths differ, are learned with the student: give them to its
    optimizer, and with several processes wrap student and method as one module in DDP, or the maps
    drift apart between the processes.

        with torch.no_grad():                   # the teacher, in eval mode: its encoder once, and its
            t_memory = ...encode(images)        # decoder on these queries alone
            content, reference, attend, valid = distill.queries(labels, boxes, teacher_embedding)
            t_logits, t_boxes = ...decode(t_memory, content, reference, attend)
        content = distill.student_content(content)
        s_memory, s_logits, s_boxes = ...       # the student: in one pass with its own queries, which
                                                # must not see these: they hold the true boxes
        losses = distill(s_memory, t_memory, s_logits, s_boxes, t_logits, t_boxes,
                         labels, boxes, shapes, padding, valid)

    A part whose weight is 0 is not computed and needs no parameters. Without the memory part,
    memories, shapes and padding may be None.
    """
    terms = ("memory", "cls", "l1", "giou")

    def __init__(
            self, student_dim=256, teacher_dim=256, *,
            lambda_mem=1.0,         # [O] set both for your models; a start: memory's gradient 50 times
            lambda_log=1.0,         # [O] as long as detection's, the logit part's as long
            # --- memory part
            alpha=5e-5,             # [T] objects
            beta=1e-7,              # [T] background
            location=True,          # [A] objects apart from background; off for ablation
            scale=True,             # [T] small objects count as much as big ones; the toy's recipes
                                    # go without: there it costs DINO AP
            # --- queries
            content="label",        # [T, P] what a query asks with: "label", the teacher's label
                                    # embedding | "own", its learned contents | frozen random numbers,
                                    # "random_label" [P] (a row per class) or "random" (one row) |
                                    # "zero". The labels' contain the class that is asked for; with
                                    # the others, decoders must look at the memory.
            num_classes=None,       # needed by content="random_label"
            target=True,            # [A] the target-aware queries; off for ablation
            groups=1,               # [O] 3 in [P]: without noise the same loss at 3 times the cost
            box_noise=0.0,          # [P] 0..1; above 0 the decoders have something to correct
            label_noise=0.0,        # [P] 0..1; of contents by label, the others have none
            random_queries=0,       # [O] 300 in [P]; they look away from the objects
            random_fixed=True,      # [P] the same ones at every step; False: new ones (KD-DETR)
            learned=False,          # [O] on in [P]: the teacher's own queries too; the caller appends
                                    # them
            sees_learned=False,     # [O] queries attend to each model's learned ones, as DINO's
                                    # denoising ones do; the caller's mask lets them
            at_least=0,             # [O] slots for so many objects, see target_queries
            # --- logit part
            cls_weight=1.0,         # [T, P]
            l1_weight=5.0,          # [T, P]
            giou_weight=2.0,        # [T, P]
            temperature=10.0,       # [P]
            classes="bernoulli",    # [O] for detectors trained with sigmoids; others: "softmax"
            confidence=True,        # [T, P] w = the teacher's confidence
            normalise="queries",    # [O] "batch" | "confidence"
            layers="all",           # [T, P] "last"
            seed=0):                # of frozen random contents, fixed random queries, linear maps
        super().__init__()
        _check_choice("content", content, ("label", "own", "random_label", "random", "zero"))
        if content == "random_label" and num_classes is None:
            raise ValueError('content="random_label" needs num_classes')
        if lambda_log and not (target or random_queries or learned):
            raise ValueError("the logit part has no queries: target=False needs random_queries or "
                             "learned=True, or lambda_log=0")
        self.lambda_mem, self.lambda_log = lambda_mem, lambda_log
        self.logit_weights = {"cls": cls_weight, "l1": l1_weight, "giou": giou_weight}
        self.memory_options = dict(alpha=alpha, beta=beta, location=location, scale=scale)
        self.query_options = dict(
            groups=groups, box_noise=box_noise, label_noise=label_noise,
            random_queries=random_queries, random_seed=seed if random_fixed else None,
            at_least=at_least, rows="label" if content in ("label", "random_label") else "slot")
        self.logit_options = dict(temperature=temperature, classes=classes, confidence=confidence,
                                  normalise=normalise, layers=layers)
        self.content, self.target = content, target
        self.learned, self.sees_learned = learned, sees_learned
        self.checked = False                            # whether a batch with objects was looked at

        # Drawn from their own seed: a student's first weights and its data order are the same with
        # and without the method. torch.manual_seed would seed the GPUs too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            rows = num_classes if content == "random_label" else 1
            frozen = torch.zeros(1, teacher_dim)
            if content != "zero":
                frozen = torch.randn(rows, teacher_dim)
            self.adapter = self.student_reads = None
            if student_dim != teacher_dim and lambda_mem:
                self.adapter = nn.Linear(student_dim, teacher_dim)                # f [O]
            if student_dim != teacher_dim and lambda_log:
                self.student_reads = nn.Linear(teacher_dim, student_dim)          # [O]
        # A buffer, saved with the module: what the student learned to read must not change with
        # torch's version.
        self.register_buffer("frozen_content", None if content in ("label", "own") else frozen)

    @torch.no_grad()
    def queries(self, labels, boxes, embedding=None, generator=None, **changes):
        """target_queries with this module's switches -> content (B, Q, teacher_dim), boxes, attend,
        valid.

        With target=False as if there were no objects: only the random queries, if any.
        embedding: the teacher's, for content="label" (C, D) its label embedding, for "own" (N, D) or
            (D,) its learned contents; the others need none.
        changes: of target_queries' arguments, for a picture without noise.
        All else: see target_queries.
        """
        embedding = embedding if self.frozen_content is None else self.frozen_content
        if embedding is None:
            others = [f'"{name}"' for name in ("own", "random_label", "random", "zero")
                      if name != self.content]
            raise ValueError(f'content="{self.content}" needs the teacher\'s embedding; a teacher '
                             f'without one can be asked with content={", ".join(others)}')
        if not self.target:
            labels, boxes = [l[:0] for l in labels], [b[:0] for b in boxes]
        options = self.query_options | changes
        return target_queries(labels, boxes, embedding, generator=generator, **options)

    def student_content(self, content):
        """The same contents (or positions, which are added to contents) for the student.

        (B, Q, teacher_dim) -> (B, Q, student_dim), unchanged if widths agree. None stays None.
        """
        if content is None or self.student_reads is None:
            return content
        return self.student_reads(content)

    def forward(self, student_memory, teacher_memory, student_logits, student_boxes, teacher_logits,
                teacher_boxes, labels, boxes, shapes, padding, valid, extent=None):
        """-> {term: weighted scalar}, of all `terms`; their sum is the distillation loss.

        student_memory (B, S, D), teacher_memory (B, S, D'), shapes, padding (B, S) or None: see
            memory_loss.
        *_logits (L, B, Q, C), *_boxes (L, B, Q, 4), valid (B, Q): answers to `queries` and to no
            others, see logit_loss.
        labels, boxes: lists of B tensors (K_b,), (K_b, 4), fractions of each image's OWN size.
        extent: (B, 2), (w_i / W, h_i / H), the part of the padded W x H batch image that image i
            fills. None reads it off `padding`, which knows it to a cell of the first level: exact
            when images end where cells do.
        Raises ValueError, with the remedy, when a part is on whose inputs are None, and when the first
        batch with objects gives itself away as boxes or extent in pixels, corners, an inverted
        padding, shapes as (W, H).
        """
        _check_counts(labels, boxes)
        if not (self.checked or torch.compiler.is_compiling()):
            # Once: a look at values makes a GPU wait.
            _check_conventions(boxes, padding, shapes, extent)
            self.checked = any(map(len, boxes))

        # Parts that are off are 0, on the device of what is given.
        given = student_logits if student_memory is None else student_memory
        zero = torch.zeros(())
        if given is not None:
            zero = given.new_zeros((), dtype=torch.float32)
        losses = dict.fromkeys(self.terms, zero)

        if self.lambda_mem:
            _check_given("lambda_mem", student_memory, teacher_memory, shapes)
            if extent is None and padding is not None:
                extent = _extent(padding, shapes[0])
            elif extent is None:
                extent = student_memory.new_ones(len(boxes), 2)
            # Fractions of each image's own size -> of the padded batch image.
            padded = [b.reshape(-1, 4) * e.to(b).repeat(2) for b, e in zip(boxes, extent)]
            loss = memory_loss(student_memory, teacher_memory, padded, shapes, padding,
                               adapter=self.adapter, **self.memory_options)
            losses["memory"] = self.lambda_mem * loss
        if self.lambda_log:
            _check_given("lambda_log", student_logits, student_boxes, teacher_logits, teacher_boxes,
                         valid)
            terms = logit_loss(student_logits, student_boxes, teacher_logits, teacher_boxes, valid,
                               **self.logit_options)
            for name, weight in self.logit_weights.items():
                if weight:
                    losses[name] = self.lambda_log * weight * terms[name]
        return losses


# ----------------------------------------------------------------------------------------------
# 4. The weights of the parts
# ----------------------------------------------------------------------------------------------

def is_detection(name):
    """Whether a loss is the student's own (loss_ce, ..); the others come from the teacher."""
    return name.startswith("loss_")


def gradients_of(loss, parameters):
    """One gradient per parameter; None where it is frozen, where the loss does not reach it, or where
    the loss is off (a constant)."""
    parameters = list(parameters)                            # a generator can be read only once
    learning = [p for p in parameters if p.requires_grad]
    if not loss.requires_grad or not learning:
        return [None] * len(parameters)
    found = iter(torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parameters]


def gradient_norm(gradients):
    """The norm of all gradients together, None among them counting as 0."""
    return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))


def gradient_ratio(losses, names, parameters):
    """How long the gradient of some losses is: |g of the part| / |g of detection|.

    losses: {name: weighted scalar} of one step; those whose names begin with "loss_" are detection's.
    names: the losses that make up the part.
    parameters: the student's; those count that both reach (memory does not reach the decoder).
    NaN where the part has no gradient. Raises ValueError without a detection loss.
    """
    if not any(map(is_detection, losses)):
        raise ValueError(f'no loss of {", ".join(losses)} is detection\'s: those begin with "loss_"')
    parameters = list(parameters)
    part = gradients_of(sum(losses[name] for name in names), parameters)
    detection = gradients_of(
        sum(value for name, value in losses.items() if is_detection(name)), parameters)
    both = [pair for pair in zip(part, detection) if all(g is not None for g in pair)]
    part, detection = map(gradient_norm, zip(*both)) if both else (0, 0)
    return part / detection if part and detection else math.nan


class Balance(nn.Module):
    """[O] Weights that carry over from one set of pictures to another (`--balance` of train.py).

    How large a loss is depends on teacher, images and widths, so a lambda tuned on one set says
    little about another. Here the *ratio* of gradients is chosen, and the weight follows from it:
    the first 8 steps measure each part's `gradient_ratio` without using the part; from then on the
    part is multiplied with (wanted ratio) / (geometric mean of the 8).

    ratios: {"memory": 50.0, "cls+l1+giou": 1.0}: a part is named by its losses.
    Detection's losses are those whose names begin with "loss_".
    What was measured is a buffer: a resumed run goes on with the same factors.
    """
    def __init__(self, ratios, steps=8):
        super().__init__()
        self.ratios = ratios
        self.register_buffer("measured", torch.full((steps, len(ratios)), math.nan))

    def measure(self, losses, step, parameters):
        """Remember the ratios of this step, if it is one of the first."""
        if step < len(self.measured):
            parameters = list(parameters)
            row = [gradient_ratio(losses, part.split("+"), parameters) for part in self.ratios]
            # On the losses' device, since NCCL knows no CPU; what was measured stays on the CPU.
            row = torch.tensor(row, device=next(iter(losses.values())).device)          # (parts,)
            # The same factors in all processes. One without objects (NaN) leaves it to the others.
            known = torch.stack([row.nan_to_num(), row.isfinite().float()])             # (2, parts)
            total, count = _mean_over_processes(known)
            self.measured[step] = total / count                  # NaN where no process knows

    def factors(self, step):
        """{part: its factor at this step}. Raises ValueError when a part never had a gradient."""
        if step < len(self.measured):
            return dict.fromkeys(self.ratios, 0.0)
        usual = self.measured.log().nanmean(0).exp().tolist()    # NaN: a batch without objects
        factors = {}
        for (part, wanted), value in zip(self.ratios.items(), usual):
            if not math.isfinite(value):
                raise ValueError(f"balance of {part}: this part of the method has no gradient: "
                                 "leave it out")
            factors[part] = wanted / value
        return factors

    def forward(self, losses, step):
        """The losses with the factors of this step."""
        losses = dict(losses)
        for part, factor in self.factors(step).items():
            for name in part.split("+"):
                losses[name] = losses[name] * factor
        return losses


# ----------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------

def _extent(padding, shape):
    """(B, 2): the part of a map's width and height that is not padding, from the first level of
    padding (B, S)."""
    height, width = shape
    valid = ~padding[:, :height * width].reshape(-1, height, width)               # (B, H, W)
    return torch.stack([valid.any(1).sum(1) / width, valid.any(2).sum(1) / height], 1)


def _mean_over_processes(values):
    """The mean of a tensor over all processes; the tensor itself without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def _full(x):
    """x in float32, or in float64 as it is: half precision is for networks, not losses and masks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_conventions(boxes, padding, shapes, extent):
    """Raises ValueError on inputs whose numbers show that they follow other conventions."""
    boxes = torch.cat([b.reshape(-1, 4) for b in boxes])          # (K, 4) of all images
    if (boxes.abs() > 2).any():
        raise ValueError("boxes must be fractions of their images, these hold numbers over 2: "
                         "divide pixels by (w, h, w, h)")
    corners = box_convert(boxes, "cxcywh", "xyxy")
    if ((corners < -0.1) | (corners > 1.1)).any():
        raise ValueError("boxes reach far beyond their images: give (cx, cy, w, h), not corners, "
                         "and clip them")
    if extent is not None and any((part > 1.001).any() for part in extent):
        raise ValueError("extent must be (w_i / W, h_i / H), the image's part of the padded batch "
                         "image: divide pixels by (W, H)")
    if padding is None or shapes is None:
        return
    if padding[:, 0].any():
        raise ValueError("the first token of an image is padded: padding must be True where "
                         "padded, ~ turns it round")
    sizes = _sizes_of(shapes, padding.shape[1], "padding")
    for level, (height, width) in zip(padding.split(sizes, 1), shapes):
        real = ~level.view(-1, height, width)                     # (B, H, W)
        # An image fills the upper left part of its map, so it is its rows times its columns.
        if (real != real.any(2)[:, :, None] & real.any(1)[:, None]).any():
            raise ValueError("padding is no margin on the right and below: give shapes as "
                             "(height, width)")


def _sizes_of(shapes, tokens, name):
    """The number of tokens of each level. Raises ValueError unless they add up to those of `name`."""
    sizes = [height * width for height, width in shapes]
    if sum(sizes) != tokens:
        raise ValueError(f"levels {list(map(tuple, shapes))} have {sum(sizes)} tokens, the {name} has "
                         f"{tokens}")
    return sizes


def _check_counts(labels, boxes):
    """Raises ValueError unless each image has a box for each label."""
    counts = [[len(x) for x in given] for given in (labels, boxes)]
    if counts[0] != counts[1]:
        raise ValueError(f"labels of {counts[0]} objects, boxes of {counts[1]}")


def _check_given(weight, *inputs):
    """Raises ValueError unless all inputs of a part are there."""
    if any(given is None for given in inputs):
        raise ValueError(f"{weight} is not 0, and an input of its part is None: give it, or "
                         f"{weight}=0")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose from {', '.join(map(repr, choices))}")
