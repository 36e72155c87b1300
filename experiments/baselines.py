"""The rivals: eight other ways to distil a detection transformer, all with one signature.

    FitNets, FGD, MGD, GKD            the student's memory copies the teacher's memory
    Hinton                            class scores of queries that are matched to the same object
    KDDETR, DETRDistill, D3ETR        made for DETRs: the decoder's predictions are copied too

    method = BASELINES["fgd"](student_dim, teacher_dim, levels=4)  # its parameters train too
    losses = method(student, teacher, targets, extras)  # {name: weighted scalar}, to be added to
                                                        # the detection losses
`student` and `teacher` are Views of a forward pass. What a method needs in addition to a View's
required fields is listed in its `needs`. To copy a method into other code, take its class,
`Baseline`, `View` and the helpers that it calls. A ninth method is a subclass of `Baseline` with its
name in `BASELINES`; a row of a table also wants its trials (`TRIALS` in experiments/tables.py).

B images, S memory tokens, D channels, L decoder layers, Q queries, C classes (labels 0..C-1),
K objects. Boxes are (cx, cy, w, h) as fractions of each image's own size. F_T and F_S are the
memories of teacher and student. f is a learned linear map, used where their widths differ and
shared by all levels. Layer i = 1..L_s of the student is compared with layer round(i * L_t / L_s)
of the teacher, at least 1. Everything is computed in float32 (or float64), also under autocast.
Gradients never reach the teacher. Padding tokens do not count, whatever they hold. Counts of
tokens, pairs and objects are means over all processes, which have to call the method together;
every process must have the same number of images and queries.

Sources of each choice: [C] the method's public code, [A] its abstract, [O] our own adaptation or
reading. The default weights are for 256 channels and 800 x 1333 pixels; other scales need their
own.
"""
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

import models
from criterion import match, mean_over_processes, pad_targets, set_losses


class View(NamedTuple):
    """One model's pass over a batch. Optional fields are filled for the methods that need them."""
    memory: Tensor      # (B, S, D) encoder output, the levels one after the other, each row by row
    padding: Tensor                    # (B, S) bool, True where padded
    shapes: list                       # [(H_l, W_l)], sum H_l W_l = S
    extent: Tensor      # (B, 2) fractions of the padded width and height that each image fills
    # The student's predictions answer its learned queries, the teacher's answer `Baseline.queries`.
    logits: Tensor | None = None       # (L, B, Q, C) before the sigmoid
    boxes: Tensor | None = None        # (L, B, Q, 4)
    matches: tuple | None = None       # query of each object (L, B, K), matched (L, B, K) bool
    states: Tensor | None = None       # (L, B, Q, D) output of each decoder layer
    # L pairs. The first is the attention among queries (B, heads, Q, Q). The second is the
    # attention to the memory: (B, heads, Q, S) or, if deformable, (points, weights):
    # points (B, Q, heads, levels, P, 2) are (x, y) as fractions of the padded image,
    # weights (B, Q, heads, levels, P).
    attention: list | None = None
    gradient: Tensor | None = None     # (B, S, D) of the model's own detection loss by its memory


class Baseline(nn.Module):
    """What all rivals share: the call, the queries, and the linear maps where widths differ.

    needs: what the caller has to prepare in addition to a student's View with logits and boxes and
    a teacher's View without them:
        "detections"  teacher.logits and .boxes, its predictions for `queries`
        "matches"     .matches of both: their own detections, assigned to the ground truth
        "states"      teacher.states
        "gradient"    teacher.gradient
        "queries"     extras["queries"]: the View of the student's predictions for `queries`, whose
                      contents pass through `student_content`. They are decoded in the same pass as
                      its own queries; neither group attends to the other
        "attention"   .attention of teacher, student and, where given, extras["queries"]; the
                      student's with graph
    terms: the names of the losses, in order.
    copies_memory: whether the method needs the linear map f, `adapter`.
    """
    needs = ()
    terms = ()
    copies_memory = False

    def __init__(self, student_dim, teacher_dim, seed):
        super().__init__()
        self.adapter = self.student_reads = nn.Identity()
        if student_dim != teacher_dim:
            with _own_random_numbers(seed):
                if self.copies_memory:
                    self.adapter = nn.Linear(student_dim, teacher_dim)
                if "queries" in self.needs:
                    self.student_reads = nn.Linear(teacher_dim, student_dim)

    @torch.no_grad()
    def queries(self, learned, generator=None):
        """The queries that the teacher decodes: here its own learned ones.

        With "queries" in `needs`, the student decodes them too.
        learned: the teacher's, with .content (B, Q, D), .boxes (B, Q, 4) or points (B, Q, 2), and
        .position (B, Q, D) or None. Returns content, boxes, attend (B, Q, Q) bool or None (every
        query attends to all), valid (B, Q), position. A position is only handed over with points;
        from boxes, each model computes its own.
        """
        boxes = learned.boxes
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        position = None if boxes.shape[-1] == 4 else learned.position
        return learned.content, boxes, None, valid, position

    def student_content(self, content):
        """Contents (or positions) of the same queries, in the student's width.

        (B, Q, teacher_dim) -> (B, Q, student_dim), unchanged if widths agree. None stays None.
        """
        return None if content is None else self.student_reads(content)

    def forward(self, student, teacher, targets, extras=None):
        """-> {name: weighted scalar}, named as `terms`; terms about objects are 0, with a graph, when
        there is none.

        student, teacher: View.
        targets: "labels" (K_b,) and "boxes" (K_b, 4) of each image; any image may have no object.
        extras: dict of "queries", see `needs`, and "generator", of random numbers (None: torch's).
        Raises ValueError when a need is missing, or the memories do not have the same tokens.
        """
        extras = dict(extras or {})
        self.check(student, teacher, targets, extras)
        with torch.autocast(student.memory.device.type, enabled=False):
            student = _prepared(student)
            teacher = _prepared(teacher, detach=True)
            if "queries" in self.needs:
                extras["queries"] = _prepared(extras["queries"])
            return self.losses(student, teacher, targets, extras)

    def check(self, student, teacher, targets, extras):
        """Raise ValueError unless everything in `needs` is there and the memories correspond."""
        asked = extras.get("queries")
        given = {"detections": teacher.logits,
                 "states": teacher.states,
                 "gradient": teacher.gradient,
                 "matches": student.matches and teacher.matches,
                 "queries": asked,
                 "attention": student.attention and teacher.attention
                 and (asked is None or asked.attention)}
        missing = [name for name in self.needs if given[name] is None]
        _want(not missing, f"{type(self).__name__} needs {', '.join(missing)}: prepare it as "
                           "Baseline.needs says")
        tokens_s, tokens_t = student.memory.shape, teacher.memory.shape
        _want(tokens_s[:2] == tokens_t[:2] and len(targets) == len(student.memory),
              f"memories {tuple(tokens_s)}, {tuple(tokens_t)} and {len(targets)} targets: student "
              "and teacher must read the same images at the same strides")

    def losses(self, student, teacher, targets, extras):
        """The losses of complete inputs: full precision, zeros in padding, the teacher detached."""
        raise NotImplementedError

    def weighted(self, values):
        """Unweighted losses, in the order of `terms` -> {name: weighted scalar}."""
        return {name: weight * x for name, weight, x in zip(self.terms, self.weights, values)}

    def levels(self, student, teacher, expected=None):
        """The memories level by level, N = H W: the student's after f, and the teacher's.

        [(student (B, N, D), teacher (B, N, D), valid (B, N), (H, W)), ...]; valid is False where
        padded. expected: the number of levels that the method was made for.
        """
        adapted = self.adapter(student.memory)                                        # (B, S, D)
        memory = teacher.memory
        shapes = [tuple(shape) for shape in student.shapes]
        sizes = [height * width for height, width in shapes]
        _want(expected in (None, len(sizes)),
              f"levels={expected}, but the memory has {len(sizes)}")
        _want(sum(sizes) == adapted.shape[1],
              f"levels {student.shapes} for a memory of {adapted.shape[1]} tokens")
        _want(adapted.shape == memory.shape,
              f"memories of {adapted.shape[2]} and {memory.shape[2]} channels: pass the method "
              "both models' widths")
        valid = ~student.padding
        return list(zip(adapted.split(sizes, 1), memory.split(sizes, 1), valid.split(sizes, 1),
                        shapes))


# ----------------------------------------------------------------------------------------------
# Rivals that copy the memory
# ----------------------------------------------------------------------------------------------

class FitNets(Baseline):
    """FitNets (Romero et al. 2015) on the memory [O].

    The mean of (F_T - f(F_S))^2 over real tokens and channels.
    """
    terms = ("memory",)
    copies_memory = True

    def __init__(self, student_dim=256, teacher_dim=256, *, weight=1.0, seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        self.weight = weight

    def losses(self, student, teacher, targets, extras):
        total = 0
        for s, t, valid, _ in self.levels(student, teacher):
            error = (t - s).square().mean(2)                                             # (B, N)
            total = total + (error * valid).sum()
        tokens = mean_over_processes((~student.padding).sum().float())
        return {"memory": self.weight * total / tokens}


class ContextBlock(nn.Module):
    """The GCNet block of FGD: R(F) = F + W2 ReLU(LN(W1 sum_j softmax(W_k F)_j F_j)).

    W2 starts at 0, so that R(F) = F at first.
    """
    def __init__(self, dim):
        super().__init__()
        self.look = nn.Linear(dim, 1)
        half = dim // 2
        self.add = nn.Sequential(nn.Linear(dim, half), nn.LayerNorm(half), nn.ReLU(),
                                 nn.Linear(half, dim))
        last = self.add[3]
        nn.init.kaiming_normal_(self.look.weight)
        for start in (self.look.bias, last.weight, last.bias):
            nn.init.zeros_(start)

    def forward(self, tokens, valid):
        """tokens (B, N, D), valid (B, N) -> (B, N, D)."""
        share = _softmax(self.look(tokens)[..., 0], valid)                               # (B, N)
        context = (share[..., None] * tokens).sum(1, keepdim=True)                    # (B, 1, D)
        return tokens + self.add(context)


class FGD(Baseline):
    """Focal and Global Distillation (Yang et al. 2022), from its code [C], on each level [O].

        A^sp = N softmax_p(mean_c |F| / t),   A^ch = D softmax_c(mean_p |F| / t)
        objects      alpha * sum M A_T^sp A_T^ch (F_T - f(F_S))^2
        background   beta * the same with M^bg
        attention    gamma * (sum |A_S^sp - A_T^sp| + sum |A_S^ch - A_T^ch|)
        relation     lambda_global * sum (R_T(F_T) - R_S(f(F_S)))^2
    N counts the real tokens of a level. All terms are summed over levels and divided by B.
    M = 1 / cells in every cell of the box, whose last row and column lie one cell beyond its
    edge, as in the code; where boxes overlap, the larger value counts. M^bg = 1 / cells of the
    background. Each level has its own context blocks R. Boxes are placed on the padded map; in
    the code they drift when a batch is padded [O].
    """
    terms = ("objects", "background", "attention", "relation")
    copies_memory = True

    def __init__(self, student_dim=256, teacher_dim=256, *, levels=1, temperature=0.5, alpha=1e-3,
                 beta=5e-4, gamma=1e-3, lambda_global=5e-6, seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        _want_temperature(temperature)
        self.temperature = temperature
        self.weights = alpha, beta, gamma, lambda_global
        with _own_random_numbers(seed + 1):
            self.relate_student = _repeat(levels, lambda: ContextBlock(teacher_dim))
            self.relate_teacher = _repeat(levels, lambda: ContextBlock(teacher_dim))

    def losses(self, student, teacher, targets, extras):
        _, boxes, real, _ = pad_targets(targets)                  # (B, K, 4), (B, K)
        parts = self.levels(student, teacher, len(self.relate_student))
        total = 0
        for part, relate_s, relate_t in zip(parts, self.relate_student, self.relate_teacher):
            s, t, valid, shape = part
            on_map = valid.unflatten(1, shape)                                        # (B, H, W)
            objects, background = self.masks(boxes, real, student.extent, on_map)

            # Errors count more where the teacher's features are large, in position and channel.
            spatial_s, channel_s = self.attention(s, valid)
            spatial_t, channel_t = self.attention(t, valid)
            difference = (t - s).square()                                             # (B, N, D)
            error = spatial_t * (difference * channel_t[:, None]).sum(2)                 # (B, N)
            attention = _distance(spatial_s, spatial_t) + _distance(channel_s, channel_t)

            related = (relate_t(t, valid) - relate_s(s, valid)).square().sum(2)          # (B, N)
            values = [(objects * error).sum(), (background * error).sum(), attention,
                      (related * valid).sum()]
            total = total + torch.stack(values)                                            # (4,)
        return {name: x / len(targets) for name, x in self.weighted(total).items()}

    @staticmethod
    def masks(boxes, real, extent, valid):
        """M and M^bg, (B, N) each. boxes (B, K, 4), real (B, K), extent (B, 2), valid (B, H, W)."""
        x0, y0, x1, y1, row, column = _cells(boxes, extent, valid)                # (B, K, 1) each
        in_y = (row >= y0) & (row <= y1)                                              # (B, K, H)
        in_x = (column >= x0) & (column <= x1)                                        # (B, K, W)
        cells = (y1 - y0 + 1) * (x1 - x0 + 1)                                         # (B, K, 1)
        share = real[..., None] / cells
        inside = in_y[..., None] * in_x[:, :, None]                                # (B, K, H, W)
        objects = _largest(inside * share[..., None], valid)                             # (B, N)
        background = (objects == 0) & valid.flatten(1)
        background = background.to(objects)
        return objects, background / background.sum(1, keepdim=True).clamp(min=1)

    def attention(self, tokens, valid):
        """A^sp (B, N) and A^ch (B, D) of tokens (B, N, D)."""
        size = tokens.abs() * valid[..., None]                                        # (B, N, D)
        count = valid.sum(1, keepdim=True)                                               # (B, 1)
        return _weights(size.mean(2), size.sum(1) / count, valid, self.temperature)


class MGD(Baseline):
    """Masked Generative Distillation (Yang et al. 2022), from its code [C], on each level [O].

        alpha * sum (F_T - G(mask * f(F_S)))^2 / B,    G = conv3x3 - ReLU - conv3x3 per level
    The mask is 0 in a random share `ratio` of the cells, the same in all channels, and 1 elsewhere.
    Padding cells are 0 before each convolution, like cells beyond the border [O].
    """
    terms = ("memory",)
    copies_memory = True

    def __init__(self, student_dim=256, teacher_dim=256, *, levels=1, alpha=2e-5, ratio=0.65,
                 seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        _want(0 <= ratio <= 1, f"ratio={ratio}: want 0 to 1")
        self.alpha, self.ratio = alpha, ratio

        def convolution():
            return nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1)

        with _own_random_numbers(seed + 1):
            self.first = _repeat(levels, convolution)
            self.second = _repeat(levels, convolution)

    def losses(self, student, teacher, targets, extras):
        generator = extras.get("generator")
        parts = self.levels(student, teacher, len(self.first))
        total = 0
        for (s, t, valid, shape), first, second in zip(parts, self.first, self.second):
            # Random numbers are drawn where their generator lives, and moved.
            device = generator.device if generator else valid.device
            draw = torch.rand(valid.shape, generator=generator, device=device)           # (B, N)
            keep = valid & (draw.to(valid.device) >= self.ratio)

            masked = (s * keep[..., None]).transpose(1, 2).unflatten(2, shape)     # (B, D, H, W)
            hidden = first(masked).relu()
            on_map = valid.unflatten(1, shape)[:, None]                            # (B, 1, H, W)
            made = second(hidden * on_map).flatten(2).transpose(1, 2)                 # (B, N, D)
            error = (t - made).square().sum(2)                                           # (B, N)
            total = total + (error * valid).sum()
        return {"memory": self.alpha * total / len(targets)}


class GKD(Baseline):
    """Gradient-guided Knowledge Distillation (Lan & Tian 2024), each level: our reading [O] of [A].

        I = |F_T * dL/dF_T|, L the teacher's detection loss: how much each token and channel
            changes the loss, to first order
        i = sum_c I, scaled to 0..1 in each image
        W^sp = N softmax_p(i / t);    W^ch = D softmax_c(sum_p I, scaled, / t)
        memory    alpha * sum G W^sp W^ch (F_T - f(F_S))^2 / B
        maps      beta * the mean over tokens of |i_S - i_T|
    i_S is made of f(F_S) and the teacher's gradient. Both terms are summed over levels.
    G is 1 / (4 w h) inside a box of w x h cells. Around it, up to twice its size, G is that times
    exp(-r^2 / 2), with r the distance from its centre over (w, h). Where boxes overlap, the larger
    value counts. boxes=False: G = 1 / N.

    [A]: gradients give weight to the features that change the detection loss; boxes refine this.
    The released code differs: its feature loss uses FGD's attention; its masks are displaced
    unless a box is in the image's middle; and the maps of both models pass through NumPy, so that
    their loss, the only one in its recipes, has no gradient. Taken from the code [C]: G's shape,
    the scaling to 0..1, t, the L1 of maps, the weights, and L, which is there computed against the
    model's own detections, here against the ground truth.
    """
    needs = ("gradient",)
    terms = ("memory", "maps")
    copies_memory = True

    def __init__(self, student_dim=256, teacher_dim=256, *, temperature=0.5, alpha=1e-3, beta=0.5,
                 boxes=True, seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        _want_temperature(temperature)
        self.temperature = temperature
        self.boxes = boxes
        self.weights = alpha, beta

    def losses(self, student, teacher, targets, extras):
        _, boxes, real, _ = pad_targets(targets)                  # (B, K, 4), (B, K)
        parts = self.levels(student, teacher)
        gradients = teacher.gradient.split([valid.shape[1] for _, _, valid, _ in parts], 1)
        memory = maps = 0
        for (s, t, valid, shape), gradient in zip(parts, gradients):
            importance = (t * gradient).abs()                   # I (B, N, D), 0 in padding
            map_t = _scaled(importance.sum(2), valid)                                    # (B, N)
            map_s = _scaled((s * gradient).abs().sum(2), valid)                          # (B, N)

            # Tokens and channels count by how much they change the teacher's loss.
            channels = importance.sum(1)                                                 # (B, D)
            channels = _scaled(channels, torch.ones_like(channels, dtype=torch.bool))
            spatial, channel = _weights(map_t, channels, valid, self.temperature)
            if self.boxes:
                on_map = valid.unflatten(1, shape)                                    # (B, H, W)
                mask = self.masks(boxes, real, student.extent, on_map)                   # (B, N)
            else:
                mask = valid / valid.sum(1, keepdim=True)

            difference = (t - s).square()                                             # (B, N, D)
            error = (difference * channel[:, None]).sum(2)                               # (B, N)
            memory = memory + (mask * spatial * error).sum() / len(targets)
            tokens = mean_over_processes(valid.sum().float())
            maps = maps + _distance(map_s, map_t) / tokens
        return self.weighted([memory, maps])

    @staticmethod
    def masks(boxes, real, extent, valid):
        """G (B, N). boxes (B, K, 4), real (B, K), extent (B, 2), valid (B, H, W)."""
        x0, y0, x1, y1, row, column = _cells(boxes, extent, valid)                # (B, K, 1) each
        w = (x1 - x0).clamp(min=1)
        h = (y1 - y0).clamp(min=1)
        # Distances of each cell's centre from the box's, in widths and heights of the box.
        y = ((row + 0.5 - y0) / h - 0.5)[..., None]                                # (B, K, H, 1)
        x = ((column + 0.5 - x0) / w - 0.5)[:, :, None]                            # (B, K, 1, W)
        farther = torch.maximum(x.abs(), y.abs())                                  # (B, K, H, W)
        skirt = (-(x ** 2 + y ** 2) / 2).exp()
        bump = skirt.where(farther >= 0.5, 1.)
        reached = (farther < 1) & real[..., None, None]
        area = (4 * w * h)[..., None]                                              # (B, K, 1, 1)
        return _largest(bump * reached / area, valid)


# ----------------------------------------------------------------------------------------------
# Rivals that copy the decoder's predictions
# ----------------------------------------------------------------------------------------------

class Hinton(Baseline):
    """Hinton et al. (2015) for sets [O]: pairs are queries that are matched to the same object.

        cls   weight * t^2 KL(teacher || student), summed over classes: the mean over pairs,
              summed over layers
    classes: "bernoulli", one yes-or-no distribution per class, for sigmoid detectors; or
    "softmax", as in the paper (0 with one class).
    """
    needs = ("detections", "matches")
    terms = ("cls",)

    def __init__(self, student_dim=256, teacher_dim=256, *, weight=1.0, temperature=4.0,
                 classes="bernoulli", seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        _want_temperature(temperature)
        _want(classes in ("bernoulli", "softmax"),
              f"classes={classes!r}: choose from 'bernoulli', 'softmax'")
        self.weight = weight
        self.temperature = temperature
        self.classes = classes

    def losses(self, student, teacher, targets, extras):
        layers = _twins(student.logits, teacher.logits)
        query_s, matched_s = student.matches
        query_t, matched_t = (x[layers] for x in teacher.matches)
        both = matched_s & matched_t                                                  # (L, B, K)
        logits_s = _take(student.logits, query_s)                                  # (L, B, K, C)
        logits_t = _take(teacher.logits[layers], query_t)
        kl = _divergence(logits_s, logits_t, self.temperature, self.classes).sum(3)   # (L, B, K)
        pairs = mean_over_processes(both.sum((1, 2)).float())                              # (L,)
        per_layer = (kl * both).sum((1, 2)) / pairs
        return {"cls": self.weight * per_layer.sum()}


class KDDETR(Baseline):
    """KD-DETR (Wang et al. 2024), from its code [C]: both decoders decode the same queries.

        cls     sum_q w_q t^2 KL_q(teacher || student) / B,   of softmaxes, mean over classes (one: 0)
        l1      sum_q w_q |difference| / sum_q w_q,           mean over the 4 coordinates
        giou    sum_q w_q (1 - GIoU) / sum_q w_q
        w_q = max_c sigmoid(the teacher's last logits)
    Summed over the student's layers and over two groups of queries, which do not attend to each
    other: "specific", the teacher's own, and `general` random boxes, the sigmoid of normal numbers,
    drawn anew at every step. A general query has the content (and, with points, the position) of a
    random one of the teacher's own [O]; in DAB-DETR, the only model in the code, that content is 0.
    The code sums cls over the batch; dividing by B makes its weight fit every batch size [O].
    teacher_layers: "last", all layers of the student learn from the teacher's last, as in the code;
    "twin", each learns from its counterpart, which the code holds too, switched off.
    """
    needs = ("detections", "queries")
    terms = ("cls", "l1", "giou")

    def __init__(self, student_dim=256, teacher_dim=256, *, cls_weight=1.0, l1_weight=5.0,
                 giou_weight=2.0, temperature=10.0, general=300, specific=True,
                 teacher_layers="last", seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        _want_temperature(temperature)
        _want(general > 0 or general == 0 and specific, f"general={general}, specific={specific}: "
                                                        "want some queries")
        _want(teacher_layers in ("last", "twin"),
              f"teacher_layers={teacher_layers!r}: choose from 'last', 'twin'")
        self.weights = cls_weight, l1_weight, giou_weight
        self.temperature = temperature
        self.general = general
        self.specific = specific
        self.teacher_layers = teacher_layers

    @torch.no_grad()
    def queries(self, learned, generator=None):
        content, boxes, _, valid, position = super().queries(learned, generator)
        B, Q = valid.shape
        # Random numbers are drawn where their generator lives, and moved.
        device = generator.device if generator else boxes.device
        random = torch.randn(self.general, 4, generator=generator, device=device)        # (G, 4)
        random = random.sigmoid().to(boxes)[:, :boxes.shape[2]].expand(B, -1, -1)     # (B, G, 4)
        drawn = torch.randint(Q, (self.general,), generator=generator, device=device)      # (G,)
        drawn = drawn.to(boxes.device)

        def groups(own, general):                                     # specific queries first
            return torch.cat([own, general], 1) if self.specific else general

        def with_drawn(x):
            return groups(x, x[:, drawn])

        # Queries attend to their own group alone.
        specific = groups(torch.ones_like(valid), valid.new_zeros(B, self.general))      # (B, Q')
        attend = specific[:, :, None] == specific[:, None]                           # (B, Q', Q')
        position = None if position is None else with_drawn(position)
        return with_drawn(content), groups(boxes, random), attend, with_drawn(valid), position

    def losses(self, student, teacher, targets, extras):
        asked = extras["queries"]
        twins = self.teacher_layers == "twin"
        layers = _twins(asked.logits, teacher.logits) if twins else [-1] * len(asked.logits)
        logits, boxes = teacher.logits[layers], teacher.boxes[layers]            # (L, B, Q, .) each
        kl = _divergence(asked.logits, logits, self.temperature, "softmax")
        kl = kl.mean(3)                                                               # (L, B, Q)
        l1 = (asked.boxes - boxes).abs().mean(3)
        giou = giou_distance(asked.boxes, boxes)
        confidence = teacher.logits[-1].sigmoid().amax(2)                                   # (B, Q)
        first = confidence.shape[1] - self.general
        total = 0
        # Each group has its own normaliser. All sums of a group without queries are 0.
        for group in (slice(first), slice(first, None)):
            w = confidence[:, group]                                                     # (B, Q')
            parts = [w * x[:, :, group] for x in (kl, l1, giou)]                     # (L, B, Q')
            sums = torch.stack([part.sum() for part in parts])                             # (3,)
            weight = mean_over_processes(w.sum(), 1e-6)
            cls, box = sums[:1] / len(targets), sums[1:] / weight
            total = total + torch.cat([cls, box])                                          # (3,)
        return self.weighted(total)


class DETRDistill(Baseline):
    """DETRDistill (Chang et al. 2023), three parts, from its code for Deformable DETR [C].

    (a) cls, l1, giou: in each layer all of the teacher's predictions, positive and negative, are
        matched to the student's by cls_weight (cross entropy) + l1_weight L1 - giou_weight GIoU,
        the weights of the losses too. The losses are means over the pairs: the cross entropy with
        the teacher's scores summed over classes, L1, 1 - GIoU. We subtract the teacher's entropy (it
        has no gradient), and do not clamp its boxes to the image [O]. top: match only this many of
        its most confident predictions [O]; 0 = all.
    (b) memory: for every layer of the teacher and every level, the mean of (m (F_T - f(F_S)))^2,
            m_p = max(sum_q score_q IoU_q cos(state_q, F_T,p), 0.01), over its maximum in the image
        with the IoU to the nearest object (1 in images without objects), as in the code. The
        paper's score^g IoU^(1-g) is known to us at second hand only. The code takes the 100 best
        (query, class) pairs and the encoder's input; we take all queries, each with its best
        class, and the encoder's output [O].
    (c) prior_cls, _l1, _giou: the student also decodes the teacher's queries. It gets the detection
        losses (focal, L1, GIoU, over the number of objects) with the teacher's assignment to the
        ground truth, layer by layer [A]. The code prepares this assignment but never uses it: it
        matches anew.
    A contrastive loss between queries, also in the code, is left out. logits, memory, prior: weights
    of the parts (a), (b), (c); the named weights multiply within a part.
    """
    needs = ("detections", "matches", "states", "queries")
    terms = ("cls", "l1", "giou", "memory", "prior_cls", "prior_l1", "prior_giou")
    copies_memory = True

    def __init__(self, student_dim=256, teacher_dim=256, *, logits=1.0, cls_weight=1.0,
                 l1_weight=5.0, giou_weight=2.0, top=0, memory=1.0, prior=1.0, prior_cls=2.0,
                 prior_l1=5.0, prior_giou=2.0, seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        _want(top >= 0, f"top={top}: want 0, all of the teacher's predictions, or more")
        self.top = top
        self.cost = cls_weight, l1_weight, giou_weight
        self.weights = (*(logits * w for w in self.cost), memory,
                        prior * prior_cls, prior * prior_l1, prior * prior_giou)

    def losses(self, student, teacher, targets, extras):
        layers = _twins(student.logits, teacher.logits)
        logits, boxes = teacher.logits[layers], teacher.boxes[layers]
        if self.top:
            best = logits.amax(3).topk(min(self.top, logits.shape[2]), 2).indices      # (L, B, top)
            logits, boxes = _take(logits, best), _take(boxes, best)
        pairs = match_predictions(student.logits, student.boxes, logits, boxes, self.cost)
        values = [*answer_losses(student.logits, student.boxes, logits, boxes, *pairs),
                  self.features(student, teacher, targets),
                  *self.prior(extras["queries"], *(x[layers] for x in teacher.matches), targets)]
        return self.weighted(values)

    def features(self, student, teacher, targets):
        # A query counts by its best score and its IoU with the nearest object. The boxes that
        # fill up an image's list have size 0 and overlap with nothing.
        _, truth, real, _ = pad_targets(targets)                  # (B, K, 4), (B, K)
        overlap, union, _ = _areas(teacher.boxes[..., None, :], truth[:, None])       # (L, B, Q, K)
        iou = F.pad(_ratio(overlap, union), (1, 0)).amax(3)                              # (L, B, Q)
        iou = iou.where(real.any(1)[:, None], 1)
        score = teacher.logits.sigmoid().amax(3)                                         # (L, B, Q)
        quality = score * iou
        wanted = (quality[..., None] * F.normalize(teacher.states, dim=3)).sum(2)        # (L, B, D)
        total = 0
        for s, t, valid, _ in self.levels(student, teacher):
            alike = torch.einsum("lbd,bnd->lbn", wanted, F.normalize(t, dim=2))         # (L, B, N)
            mask = alike.clamp(min=0.01) * valid
            mask = mask / mask.amax(2, keepdim=True)
            count = mean_over_processes(valid.sum().float())
            error = (t - s).square().mean(2)                                             # (B, N)
            total = total + (mask.square() * error).sum() / count
        return total

    @staticmethod
    def prior(asked, query, found, targets):
        """Focal, L1 and GIoU loss, summed over layers.

        query, found (L, B, K): the query of each object, and whether it has one.
        """
        truth = pad_targets(targets)
        count = mean_over_processes(truth.valid.sum().float())
        parts = set_losses(asked.logits, asked.boxes, truth, query, found, count)  # (L,) each
        return [part.sum() for part in parts]


class D3ETR(Baseline):
    """D3ETR (Chen et al. 2024): two matchings of teacher and student queries [A].

    On each, in every layer, predictions, self-attention and cross-attention are copied [A]. We
    found no public code: formulas and weights are our reading [O].

        adaptive * (bipartite matching of the two models' predictions, as in DETRDistill (a))
        + fixed * (the student also decodes the teacher's queries; pairs have the same index)
    each of
        cls, l1, giou    as in DETRDistill (a)
        self, cross      sum_keys (A_S - A_T)^2, mean over pairs; heads averaged first
    Self-attention has rows and columns in the order of the pairs. Deformable cross-attention
    becomes a map over tokens: each sampling point gives its weight to the four tokens around it, in
    the shares of bilinear interpolation.
    """
    needs = ("detections", "attention", "queries")
    terms = ("cls", "l1", "giou", "self", "cross")

    def __init__(self, student_dim=256, teacher_dim=256, *, adaptive=1.0, fixed=1.0,
                 cls_weight=1.0, l1_weight=5.0, giou_weight=2.0, self_weight=1.0, cross_weight=1.0,
                 seed=0):
        super().__init__(student_dim, teacher_dim, seed)
        self.adaptive = adaptive
        self.fixed = fixed
        self.cost = cls_weight, l1_weight, giou_weight
        self.weights = *self.cost, self_weight, cross_weight

    def losses(self, student, teacher, targets, extras):
        layers = _twins(student.logits, teacher.logits)
        teacher = teacher._replace(logits=teacher.logits[layers], boxes=teacher.boxes[layers],
                                   attention=[teacher.attention[i] for i in layers])
        logits, boxes = teacher.logits, teacher.boxes
        pairs = match_predictions(student.logits, student.boxes, logits, boxes, self.cost)
        adaptive = self.compare(student, teacher, *pairs)

        # The student's answers to the teacher's own queries need no matching.
        same = torch.arange(logits.shape[2], device=logits.device).expand(logits.shape[:3])
        fixed = self.compare(extras["queries"], teacher, same, same)
        values = self.adaptive * adaptive + self.fixed * fixed                             # (5,)
        return self.weighted(values)

    @staticmethod
    def compare(student, teacher, mine, theirs):
        """The five losses (5,), unweighted.

        mine, theirs (L, B, P): the two queries of each pair.
        """
        among = across = 0
        layers = zip(student.attention, teacher.attention, mine, theirs)
        for (self_s, cross_s), (self_t, cross_t), i, j in layers:
            a, b = _among_pairs(self_s, i), _among_pairs(self_t, j)                     # (B, P, P)
            among = among + (a - b).square().sum(1).mean()
            a = _take(attention_map(cross_s, student.shapes), i)                        # (B, P, S)
            b = _take(attention_map(cross_t, student.shapes), j)
            error = (a - b).square() * ~student.padding[:, None]
            across = across + error.sum(2).mean()
        answers = answer_losses(student.logits, student.boxes, teacher.logits, teacher.boxes,
                                mine, theirs)
        return torch.stack([*answers, among, across])


# ----------------------------------------------------------------------------------------------
# One step of a rival
# ----------------------------------------------------------------------------------------------

def rival_step(student, teacher, batch, method, generator=None):
    """The losses of one step of a rival -> {name: weighted scalar}.

    The counterpart of train.clockdistill_step.
    student: a detector in training mode.
    teacher: a frozen one in eval mode.
    method: a `Baseline`.
    batch: data.Batch on their device.
    generator: draws the method's random numbers; None = torch's own.
    """
    needs = method.needs

    # 1. The frozen teacher's view of the images. If the method needs its decoder, the decoder
    # answers the method's queries and no others.
    with torch.no_grad():
        memory = teacher.encode(batch.images, batch.padding)
    t = view_of(memory, batch)
    queries = None
    if needs:
        memory.tokens.requires_grad_("gradient" in needs)
        with torch.set_grad_enabled("gradient" in needs), \
                looking(teacher, "attention" in needs) as seen, \
                decoder_states(teacher, "states" in needs) as states:
            learned, proposals = teacher.learned_queries(memory)
            queries = models.Queries(*method.queries(learned, generator))
            answers = teacher.decode(memory, queries.content, queries.boxes, queries.attend,
                                     queries.position)
        t = t._replace(logits=answers.logits, boxes=answers.boxes)
        if states:
            t = t._replace(states=torch.stack(states))
        if seen:
            t = t._replace(attention=attention_of(teacher, seen, slice(None)))
        if "matches" in needs:
            t = t._replace(matches=matches_of(teacher, answers, batch.targets))
        if "gradient" in needs:
            output = models.Output(memory, answers, proposals, None, None)
            loss = sum(teacher.weighted_losses(output, batch.targets).values())
            t = t._replace(gradient=torch.autograd.grad(loss, memory.tokens)[0])

    # 2. The student decodes its own queries and, if the method needs it, the teacher's too,
    # in one pass.
    extra = None
    if "queries" in needs:
        extra = queries._replace(content=method.student_content(queries.content),
                                 position=method.student_content(queries.position))
    with looking(student, "attention" in needs, graph=True) as seen:
        output = student(batch.images, batch.padding, batch.targets, extra)
    own = output.detections
    s = view_of(output.memory, batch)._replace(logits=own.logits, boxes=own.boxes)
    if "matches" in needs:
        s = s._replace(matches=matches_of(student, own, batch.targets))
    asked = None if extra is None else s._replace(logits=output.extra.logits,
                                                  boxes=output.extra.boxes)
    if seen:                                   # queries come in the order denoising, learned, extra
        first = 0 if output.denoising is None else output.denoising.logits.shape[2]
        last = first + own.logits.shape[2]
        s = s._replace(attention=attention_of(student, seen, slice(first, last)))
        if asked is not None:
            asked = asked._replace(attention=attention_of(student, seen, slice(last, None)))

    # 3. Detection losses of the student, and the method's.
    losses = student.weighted_losses(output, batch.targets)
    return losses | method(s, t, batch.targets, {"queries": asked, "generator": generator})


def view_of(memory, batch):
    return View(memory.tokens, memory.padding, memory.shapes, batch.extent)


def matches_of(model, answers, targets):
    """Which query the detector's own matching gives to each object, layer by layer."""
    truth = pad_targets(targets)
    return match(answers.logits, answers.boxes, truth, model.matcher_weights, model.eps)


def looking(model, wanted, graph=False):
    """models.record where attention is wanted; else a context that records nothing."""
    return models.record(model, graph=graph) if wanted else nullcontext()


@contextmanager
def decoder_states(model, wanted):
    """A list that fills up with what each decoder layer hands to the next, where that is wanted."""
    states = []
    hooks = [layer.register_forward_hook(lambda layer, inputs, state: states.append(state))
             for layer in model.decoder.layers if wanted]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def attention_of(model, seen, part):
    """Attention of a part of the queries as a View holds it, layer by layer."""
    pairs = []
    for i in range(model.decoder_layers):
        among = seen[f"decoder.{i}.self"].weights[:, :, part, part]
        across = seen[f"decoder.{i}.cross"]
        if across.points is None:
            to_memory = across.weights[:, :, part]
        else:
            to_memory = across.points[:, part], across.weights[:, part]
        pairs.append((among, to_memory))
    return pairs


BASELINES = {"fitnets": FitNets, "hinton": Hinton, "fgd": FGD, "mgd": MGD, "gkd": GKD,
             "kd_detr": KDDETR, "detrdistill": DETRDistill, "d3etr": D3ETR}


# ----------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------

def _twins(student, teacher):
    """Index of the teacher's layer for each of the student's.

    Counted from 1, it is round(i * L_t / L_s), at least 1.
    """
    ours, theirs = len(student), len(teacher)
    layers = [round(i * theirs / ours) for i in range(1, ours + 1)]
    return [max(layer, 1) - 1 for layer in layers]


def _take(x, index):
    """Rows `index` (..., P) of x (..., Q, D) -> (..., P, D)."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def _divergence(student, teacher, temperature, classes):
    """t^2 KL(teacher || student) of logits (..., C), each class's part: (..., C)."""
    s, t = student / temperature, teacher / temperature
    if classes == "softmax":
        return temperature ** 2 * F.kl_div(s.log_softmax(-1), t.log_softmax(-1),
                                             reduction="none", log_target=True)
    p = t.sigmoid()                                 # KL = cross entropy - the teacher's own entropy
    return temperature ** 2 * (F.binary_cross_entropy_with_logits(s, p, reduction="none")
                               - F.binary_cross_entropy_with_logits(t, p, reduction="none"))


def _among_pairs(attention, index):
    """Self-attention (B, heads, Q, Q) among the queries `index` (B, P) -> (B, P, P), keys first."""
    rows = _take(attention.mean(1), index)                                            # (B, P, Q)
    return _take(rows.transpose(1, 2), index)


def answer_losses(s_logits, s_boxes, t_logits, t_boxes, mine, theirs):
    """Bernoulli KL summed over classes, L1 summed over coordinates, and 1 - GIoU.

    Each is the mean over a layer's pairs, summed over layers. Logits (L, B, Q, C), boxes
    (L, B, Q, 4); mine, theirs (L, B, P): the two queries of each pair.
    """
    a, b = _take(s_boxes, mine), _take(t_boxes, theirs)
    kl = _divergence(_take(s_logits, mine), _take(t_logits, theirs), 1., "bernoulli")
    each = kl.sum(3), (a - b).abs().sum(3), giou_distance(a, b)                    # (L, B, P) each
    return [x.mean((1, 2)).sum() for x in each]


@torch.no_grad()
def match_predictions(s_logits, s_boxes, t_logits, t_boxes, weights):
    """The cheapest one-to-one pairs of student and teacher queries.

    Returns their indices (2, L, B, P), P = min(Q_s, Q_t). Logits (L, B, Q, C), boxes (L, B, Q, 4).
    Cost: weights (class, L1, GIoU) times the cross entropy with the teacher's scores summed over
    classes, the L1 distance, and 1 - GIoU. Raises ValueError when a cost is not finite.
    """
    cls, l1, giou = weights
    pairs = []
    for s, s_box, t, t_box in zip(s_logits, s_boxes, t_logits, t_boxes):            # (B, Q, .) each
        scores = t.sigmoid().transpose(1, 2)                                        # (B, C, Q_t)
        entropy = F.softplus(s).sum(2)[..., None] - s @ scores                    # (B, Q_s, Q_t)
        distance = torch.cdist(s_box, t_box, p=1)
        overlap = giou_distance(s_box[:, :, None], t_box[:, None])
        cost = (cls * entropy + l1 * distance + giou * overlap).cpu()
        _want(cost.isfinite().all(), "the predictions of student or teacher are not finite and "
                                     "cannot be matched")
        for image in cost:
            chosen = map(torch.from_numpy, linear_sum_assignment(image))
            pairs.append(torch.stack([*chosen]))                                           # (2, P)
    return torch.stack(pairs, 1).view(2, *s_logits.shape[:2], -1).to(s_logits.device)


def _areas(a, b):
    """Overlap, union and hull of boxes (..., 4) cxcywh, which broadcast; (...) each."""
    a_low, a_high = box_convert(a, "cxcywh", "xyxy").split(2, -1)              # (..., 2) each
    b_low, b_high = box_convert(b, "cxcywh", "xyxy").split(2, -1)

    def area(low, high):                                              # corners (..., 2)
        return (high - low).clamp(min=0).prod(-1)

    overlap = area(torch.maximum(a_low, b_low), torch.minimum(a_high, b_high))
    hull = area(torch.minimum(a_low, b_low), torch.maximum(a_high, b_high))
    union = area(a_low, a_high) + area(b_low, b_high) - overlap
    return overlap, union, hull


def giou_distance(a, b):
    """1 - GIoU, from 0 to 2. The distance of a box without area from itself is 0.

    There is no eps in the denominators, because it would change the values of tiny boxes.
    """
    overlap, union, hull = _areas(a, b)
    distance = 2 - _ratio(overlap, union) - _ratio(union, hull)
    return distance.where(hull > 1e-30, 0)


def _ratio(part, whole):
    """part / whole, and `part` itself where the whole has no area."""
    return part / whole.where(whole > 1e-30, 1)


def attention_map(attention, shapes):
    """Attention to the memory, as in View -> (B, Q, S), mean over heads.

    Deformable attention counts only where it falls on the map.
    """
    if isinstance(attention, Tensor):
        return attention.mean(1)
    maps = []
    for (height, width), point, weight in zip(shapes, *(x.unbind(3) for x in attention)):
        # Cell centres lie at whole numbers of x and y.
        x = point[..., 0] * width - 0.5                                          # (B, Q, heads, P)
        y = point[..., 1] * height - 0.5
        level = weight.new_zeros(*weight.shape[:2], height * width)                  # (B, Q, H W)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            column, row = x.floor() + i, y.floor() + j
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inner_column = column.clamp(0, width - 1)
            inner_row = row.clamp(0, height - 1)
            on_map = (inner_column == column) & (inner_row == row)
            index = (inner_row * width + inner_column).long()
            share = weight * share * on_map                                      # (B, Q, heads, P)
            level = level.scatter_add(2, index.flatten(2), share.flatten(2))
        maps.append(level / weight.shape[2])
    return torch.cat(maps, 2)


def _cells(boxes, extent, valid):
    """x0, y0, x1, y1 (B, K, 1), the cells of a map that a box touches, and the map's own cells.

    They reach from x0 up to before x1. valid (B, H, W). The last two results are the numbers of
    the map's rows (H,) and columns (W,).
    """
    height, width = valid.shape[1:]
    filled = extent.to(boxes).repeat(1, 2)[:, None]                                   # (B, 1, 4)
    corners = box_convert(boxes, "cxcywh", "xyxy") * filled                      # (B, K, 4)
    low, high = (corners * boxes.new_tensor([width, height] * 2)).split(2, -1)  # (B, K, 2) each
    # 1e-4 of a cell: rounding must not push a box that is aligned with the cells into one more.
    low = (low + 1e-4).floor()
    high = (high - 1e-4).ceil()
    row, column = (torch.arange(n, device=low.device) for n in (height, width))    # (H,), (W,)
    return *low.split(1, -1), *high.split(1, -1), row, column


def _largest(maps, valid):
    """(B, K, H, W) -> (B, N): the largest of an image's maps in each valid cell.

    0 elsewhere, and when K = 0.
    """
    return F.pad(maps, (0, 0, 0, 0, 1, 0)).amax(1).flatten(1) * valid.flatten(1)


def _softmax(x, valid):
    """Softmax of (B, N) over the valid entries, 0 at the others."""
    return x.masked_fill(~valid, -torch.inf).softmax(1)


def _weights(spatial, channel, valid, temperature):
    """N softmax(spatial / t) (B, N) and D softmax(channel / t) (B, D): weights of mean 1.

    N counts the valid tokens (B, N).
    """
    count = valid.sum(1, keepdim=True)                                                   # (B, 1)
    spatial = count * _softmax(spatial / temperature, valid)                             # (B, N)
    channel = channel.shape[1] * (channel / temperature).softmax(1)                      # (B, D)
    return spatial, channel


def _distance(a, b):
    """The sum of |a - b|."""
    return (a - b).abs().sum()


def _scaled(x, valid):
    """x (B, N), shifted and scaled so that each row's valid entries lie between 0 and 1.

    0 at the others.
    """
    low = x.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-30) * valid


def _prepared(view, detach=False):
    """The view in full precision, detached if it is the teacher's.

    Padding tokens become 0, because 0 * NaN would be NaN.
    """
    def each(x):
        if isinstance(x, (list, tuple)):
            return tuple(map(each, x))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return (x.detach() if detach else x).to(torch.promote_types(x.dtype, torch.float32))

    view, hole = View(*map(each, view)), view.padding[..., None]
    gradient = None if view.gradient is None else view.gradient.masked_fill(hole, 0)
    return view._replace(memory=view.memory.masked_fill(hole, 0), gradient=gradient)


@contextmanager
def _own_random_numbers(seed):
    """A student's first weights and its data order are the same with and without the method."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)        # torch.manual_seed would seed GPUs too
        yield


def _want(condition, text):
    if not condition:
        raise ValueError(text)


def _want_temperature(temperature):
    _want(temperature > 0, f"temperature={temperature}: want more than 0")


def _repeat(count, make):
    """A list of `count` modules, each made anew."""
    return nn.ModuleList(make() for _ in range(count))
