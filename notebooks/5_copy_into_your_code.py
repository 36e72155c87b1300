# %% [markdown]
# # 5 Copy it into your code
#
# [clockdistill.py](../clockdistill.py) needs torch and torchvision only, and takes tensors of any
# DETR whose decoder can be asked about a place. Here it distils three detectors that are not ours:
# a dense DETR of `nn.MultiheadAttention` with a softmax head, and from `transformers`
# [Deformable DETR](https://arxiv.org/abs/2010.04159) and
# [RT-DETR v2](https://arxiv.org/abs/2407.17140), with sigmoids.
#
# What you copy:
#
# 1. `clockdistill.py`;
# 2. from this page `step`, `variant`, `together`, `hooked`, and the adapter nearest to your
#    detector, 20 to 40 lines that you change;
# 3. the checklist, to test your adapter;
# 4. the option for your class head, and `weigh`, which sets the weights of the losses;
# 5. for several processes, `Learner`.
#
# DETR, Conditional DETR, MMDetection: see [other codebases](#Other-codebases), too.
#
# The models are tiny, start from random weights and see six images: this shows that the wiring is
# right, not how much distillation gains. Nothing is downloaded. You need
# `pip install transformers` (written for version 5).

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "notebooks":        # the modules are a folder of files
    os.chdir("..")
sys.path.insert(0, os.getcwd())
os.environ["HF_HUB_OFFLINE"] = "1"                      # nothing is downloaded: it would fail

# %%
import copy
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import train
from clockdistill import CLoCKDistill, logit_loss
from experiments import plots
from notebooks.three_detectors import DenseDetr, deformable_detr, rt_detr

# %matplotlib inline
torch.set_num_threads(1)                                # the same numbers on any number of cores
plots.wiring_drawing()

# %% [markdown]
# *All that the method needs of a detector passes through **one call, the decoder's**. Its arguments
# hold the memory, the shapes of the levels and the padding. A hook before the call appends our
# queries, the target-aware ones; a hook after it cuts their answers off again.* No code of the
# detector changes; its own heads, matching and loss notice nothing. So our queries are decoded **in
# the same pass** as the detector's own.
#
# ## A step of training
#
# This is all of it. The teacher runs as `teacher.model`, without the heads of its own queries, and
# decodes ours alone. The student decodes ours in addition to its own, and returns its own loss as
# before: minimise `output.loss + sum(terms.values())`. A step costs about one of the student and a
# forward pass of the teacher ([measured](../results/bench.md#speed) for our detectors). After
# training the student is the plain detector: save it alone. What the names mean:
#
# - `case`: a pair and a batch. The pair is `teacher`, `student`, `distill` (a `CLoCKDistill`),
#   `ask` (the adapter) and `embedding`, what the queries ask with: a table of labels or of learned
#   queries. The batch is `images`, `mask` (1 in an image), `labels` and `boxes` (a tensor for each
#   image; boxes are (cx, cy, w, h), fractions of the image's *own* size), `targets` (the same, as
#   the detector's loss wants them) and `extent`, the part of the padded batch image that an image
#   covers;
# - `content`, `reference`: the queries made of the embedding, and the true boxes;
# - `attend`: which of ours see one another; `valid`: False for padding rows, of images with fewer
#   objects.

# %%
def step(case):
    """-> the student's output with its own loss, terms {"memory", "cls", "l1", "giou"}, answers."""
    distill = case.distill
    with torch.no_grad():
        content, reference, attend, valid = distill.queries(case.labels, case.boxes, case.embedding)
        with case.ask(case.teacher, content, reference, attend, alone=True) as taught:
            case.teacher.model(case.images, case.mask)
    with case.ask(case.student, distill.student_content(content), reference, attend) as learned:
        output = case.student(case.images, case.mask, labels=case.targets)
    terms = distill(learned.memory, taught.memory, learned.logits, learned.boxes, taught.logits,
                    taught.boxes, case.labels, case.boxes, learned.shapes, learned.padding, valid,
                    case.extent)
    return SimpleNamespace(output=output, terms=terms, taught=taught, learned=learned, valid=valid,
                           queries=(content, reference, attend))

# %% [markdown]
# `case.ask` is the adapter, the only part that differs from detector to detector. Two small
# functions serve all adapters. One is the mask: self-attention must keep ours and the detector's
# own queries apart. Ours hold the true boxes, and a detector that sees them in training learns to
# rely on what it will not have later.

# %%
def together(own, attend, theirs=None):
    """Which query may attend to which, of `own` queries and, after them, ours.

    attend (B, Q, Q) bool, among ours. theirs (own, own) bool, among its own; None: all see all.
    Returns (B, own + Q, own + Q) bool.
    """
    among = attend.new_ones(own, own) if theirs is None else theirs
    may = F.pad(among.expand(len(attend), -1, -1), (0, attend.shape[1], 0, attend.shape[1]))
    may[:, own:, own:] = attend                                   # elsewhere F.pad has put False
    return may


@contextmanager
def hooked(modules, before, after=None):
    """While open, before(module, args, call) runs ahead of the modules, after(...) behind them."""
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules if after]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

# %% [markdown]
# ## Three adapters
#
# **What must agree.** Teacher and student need the same levels with the same tokens, and the same
# classes in the same order. Widths and numbers of layers may differ. Where strides differ, resize
# the teacher's memory first, level by level (not tried here). Under autocast the losses are still
# computed in float32.
#
# **What to look for.** Each line of the table is a question to your decoder's call. References are
# fractions of each image's own size in all four; `~` turns a mask round.
#
# | | dense DETR | Deformable DETR | RT-DETR v2 | MMDetection's DINO |
# |---|---|---|---|---|
# | memory | `memory` | `encoder_hidden_states` | `encoder_hidden_states` | `value` |
# | shapes | `shapes` | `spatial_shapes_list` | `spatial_shapes_list` | `spatial_shapes` |
# | padding | `padding` | `~encoder_attention_mask` | none | `key_padding_mask` |
# | content | `content`, zeros | `inputs_embeds` | `inputs_embeds` | `query` |
# | position | `position` | `object_queries_...` | made inside | made inside |
# | reference | `points` | `reference_points` | the same, as **logits** | `reference_points` |
# | mask | `attn_mask` | `attention_mask` | `encoder_attention_mask` | `self_attn_mask` |
# | ... of the form | True: may **not** | additive | additive | True: may **not** |
# | heads | outside | outside, one per layer | inside | outside, `bbox_head` |
#
# ### The dense DETR
#
# It is in [three_detectors.py](three_detectors.py). One map of stride 16; a query is a learned
# position, from which a reference *point* is computed.
#
# - **Content and position.** Contents start as zeros here; what is learned is the *position*. So
#   `content="own"` asks with the teacher's learned positions, and they go where positions go.
# - **Reference.** The centre of the true box: a point cannot be told width and height.
# - **Mask.** `nn.MultiheadAttention` wants it once per head: `(~may).repeat_interleave(heads, 0)`.
# - **Heads.** Softmax over the classes and "no object": `classes="softmax"`.

# %%
@contextmanager
def ask_dense(detector, content, boxes, attend, alone=False):
    """While open, a DenseDetr decodes our queries in addition to its own (alone: only ours).

    content (B, Q, D), boxes (B, Q, 4), attend (B, Q, Q): see clockdistill.target_queries. Once the
    detector has run, the answer holds memory (B, S, D), shapes, padding (B, S), logits
    (L, B, Q, C), boxes (L, B, Q, 4), and for the checklist `own`: contents (here positions) and
    references of the detector's own queries.
    """
    answer, points = SimpleNamespace(), boxes[..., :2]

    def before(decoder, args, call):
        answer.memory, answer.shapes = call["memory"], call["shapes"]
        answer.padding = call["padding"]
        answer.own = call["position"], call["points"]
        kept = answer.kept = 0 if alone else call["points"].shape[1]
        ours = {"content": torch.zeros_like(content), "position": content, "points": points}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        heads = decoder.layers[0].self_attn.num_heads
        return args, call | {"attn_mask": (~together(kept, attend)).repeat_interleave(heads, 0)}

    def after(decoder, args, states):
        answer.logits, answer.boxes = detector.heads(states[:, :, answer.kept:], points)
        return states if alone else states[:, :, :answer.kept]

    with hooked([detector.model.decoder], before, after):
        yield answer

# %% [markdown]
# ### Deformable DETR
#
# - **Content.** It has no label embedding. The queries ask with frozen random numbers, one row per
#   class: `content="random_label"`.
# - **Position.** The two-stage model makes it from a box (`pos_trans`), and so do we. A one-stage
#   model learned a position for each query and none for boxes: it gets a fixed random map of the
#   box's sine encoding, and looks from the centre, as its first layer was trained to.
# - **Mask.** The decoder hands arguments that it does not know down to self-attention:
#   `attention_mask`. `transformers` wants it **additive**, 0 or minus infinity (a boolean one only
#   works with some of its attention kernels).
# - **Heads.** One per layer; each corrects the references that the layer before left.

# %%
def additive(may):
    """(B, Q, Q) bool -> (B, 1, Q, Q), 0 where a row may attend; the 1 is for the heads."""
    return torch.zeros(may.shape, device=may.device).masked_fill(~may, -torch.inf)[:, None]


@contextmanager
def ask_deformable_detr(detector, content, boxes, attend, alone=False):
    """The same for a DeformableDetrForObjectDetection."""
    model, answer = detector.model, SimpleNamespace()

    def logit(places):                                            # points become (x, y, 0, 0)
        return F.pad(places.logit(1e-5), (0, 4 - places.shape[-1]))

    def before(decoder, args, call):
        answer.memory, answer.shapes = call["encoder_hidden_states"], call["spatial_shapes_list"]
        answer.padding = ~call["encoder_attention_mask"]          # theirs is True at real tokens
        answer.own = call["inputs_embeds"], call["reference_points"]
        kept = answer.kept = 0 if alone else call["inputs_embeds"].shape[1]
        encoded = model.get_proposal_pos_embed(logit(boxes))      # (B, Q, 2 D)
        if model.config.two_stage:
            position = model.pos_trans_norm(model.pos_trans(encoded)).chunk(2, -1)[0]   # (B, Q, D)
            answer.start = boxes
        else:
            D, fixed = content.shape[-1], torch.Generator().manual_seed(0)
            position = encoded @ torch.randn(2 * D, D, generator=fixed).to(encoded) / D ** 0.5
            answer.start = boxes[..., :2]
        ours = {"inputs_embeds": content, "reference_points": answer.start,
                "object_queries_position_embeddings": position}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        return args, call | {"attention_mask": additive(together(kept, attend))}

    def after(decoder, args, output):
        kept = answer.kept
        states = output.intermediate_hidden_states                # (B, L, all, D)
        places = output.intermediate_reference_points             # (B, L, all, 4)
        mine = states[:, :, kept:].unbind(1)
        starts = [answer.start, *places[:, :-1, kept:].unbind(1)]
        # In two stages the heads are one more than the layers: zip leaves out the encoder's.
        answer.logits = torch.stack([head(x) for head, x in zip(detector.class_embed, mine)])
        answer.boxes = torch.stack([(head(x) + logit(start)).sigmoid() for head, x, start
                                    in zip(detector.bbox_embed, mine, starts)])
        if not alone:
            output.last_hidden_state = output.last_hidden_state[:, :kept]
            output.intermediate_hidden_states = states[:, :, :kept]
            output.intermediate_reference_points = places[:, :, :kept]
        return output

    with hooked([model.decoder], before, after):
        yield answer

# %% [markdown]
# ### RT-DETR v2
#
# - **Memory.** What the decoder reads: all levels after `decoder_input_proj`, one after the other,
#   without padding.
# - **Content.** Trained with denoising queries, it has a label embedding,
#   `denoising_class_embed`; its last row is no class.
# - **Mask.** `encoder_attention_mask` goes to self-attention, in spite of its name. In training it
#   keeps the denoising groups apart, so ours goes around theirs.

# %%
@contextmanager
def ask_rt_detr(detector, content, boxes, attend, alone=False):
    """The same for an RTDetrV2ForObjectDetection; padding is None."""
    answer = SimpleNamespace(padding=None)

    def before(decoder, args, call):
        answer.memory, answer.shapes = call["encoder_hidden_states"], call["spatial_shapes_list"]
        answer.own = call["inputs_embeds"], call["reference_points"].sigmoid()
        kept = answer.kept = 0 if alone else call["inputs_embeds"].shape[1]
        ours = {"inputs_embeds": content, "reference_points": boxes.logit(1e-5)}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        theirs = call["encoder_attention_mask"] if kept else None
        theirs = None if theirs is None else theirs == 0
        return args, call | {"encoder_attention_mask": additive(together(kept, attend, theirs))}

    def after(decoder, args, output):
        kept = answer.kept
        answer.logits = output.intermediate_logits[:, :, kept:].transpose(0, 1)   # (L, B, Q, C)
        answer.boxes = output.intermediate_reference_points[:, :, kept:].transpose(0, 1)
        if not alone:
            output.last_hidden_state = output.last_hidden_state[:, :kept]
            for key in ("hidden_states", "logits", "reference_points"):
                output[f"intermediate_{key}"] = output[f"intermediate_{key}"][:, :, :kept]
        return output

    with hooked([detector.model.decoder], before, after):
        yield answer

# %% [markdown]
# ### Other codebases
#
# Three more detectors were distilled once, with the changes below: DETR and Conditional DETR of
# `transformers` 5.24, and DINO of MMDetection 3.3 (on a CPU, without its compiled operators). Their
# own answers moved by less than 1e-6; their own queries, asked through the adapter, got the same
# answers. Conditional DETR passed the whole checklist. Where the decoder's call lacks something:
#
# - **No mask** (Conditional DETR). Set it in a hook on each self-attention, see `at_self_attention`
#   below. A second call of the decoder with ours alone is not enough: among ours, a row would see
#   padding rows and other groups.
# - **No shapes** (DETR, Conditional DETR). The input of `model.input_projection` has height and
#   width.
# - **References made inside**, from positions (Conditional DETR). A hook behind
#   `decoder.ref_point_head` puts the logits of our points in our rows. The decoder returns
#   `reference_points` as (all, B, 2): cut the first axis.
# - **No references** (DETR). Then a true box cannot be asked for. In `step`, ask with the teacher's
#   learned positions in place of `distill.queries`: `content = embedding.expand(B, -1, -1)`,
#   `reference = None`, `attend` and `valid` all True, (B, N, N) and (B, N).
# - **No states of the first layers** (DETR, Conditional DETR). Configure `auxiliary_loss=True`.
# - **Arguments without names.** They are in the hook's `args`, not in `call`.
#
# **Boxes, too.** When a DETR processor of `transformers` pads, its boxes are fractions of the
# *padded* image. Leave `targets` so, and give the method `boxes[i] / extent[i].repeat(2)`. In
# MMDetection they are corners in pixels: `box_convert(bboxes, "xyxy", "cxcywh")`, divided by
# (w, h, w, h) of the image's `img_shape`.
#
# <details><summary>The adapter for MMDetection's DINO</summary>
#
# ```python
# @contextmanager
# def ask_mmdet_dino(detector, content, boxes, attend, alone=False):
#     answer = SimpleNamespace()
#
#     def before(decoder, args, call):
#         answer.memory, answer.padding = call["value"], call["key_padding_mask"]
#         answer.shapes = call["spatial_shapes"].tolist()
#         answer.own = call["query"], call["reference_points"]
#         kept = answer.kept = 0 if alone else call["query"].shape[1]
#         ours = {"query": content, "reference_points": boxes}
#         call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
#         theirs = call["self_attn_mask"] if kept else None         # of denoising, in training
#         may = together(kept, attend, None if theirs is None else ~theirs)
#         heads = decoder.layers[0].self_attn.num_heads
#         return args, call | {"self_attn_mask": (~may).repeat_interleave(heads, 0)}
#
#     def after(decoder, args, output):
#         states, places = output                                   # (L, B, all, D), (L + 1, ...)
#         kept = answer.kept
#         answer.logits, answer.boxes = detector.bbox_head(states[:, :, kept:], places[:, :, kept:])
#         return output if alone else (states[:, :, :kept], places[:, :, :kept])
#
#     with hooked([detector.decoder], before, after):
#         yield answer
# ```
# In `step` the teacher runs as `teacher.forward_transformer(teacher.extract_feat(images), samples)`
# and the student as `student.loss(images, samples)`: a dictionary, whose sum is the own loss. Ask
# with `content="label"` and `teacher.dn_query_generator.label_embedding.weight`.
# </details>
#
# ## Something to run it on
#
# A teacher is 64 wide with three decoder layers, a student 32 wide with two. Two things surprise in
# fresh models of `transformers` 5. Deformable DETR's ResNet is **frozen as a whole**, so a
# student's backbone would never learn. And RT-DETR v2's batch norms behind the backbone start with
# scales around **0**, not 1: the memory is nearly silent. (Weights from the hub bring their own.)

# %%
torch.manual_seed(0)
pairs = {"dense DETR": [DenseDetr(64, 3), DenseDetr(32, 2)],
         "Deformable DETR": [deformable_detr(64, 3), deformable_detr(32, 2)],
         "RT-DETR v2": [rt_detr(64, 3), rt_detr(32, 2)]}

frozen = [not p.requires_grad for model in pairs["Deformable DETR"]
          for p in model.model.backbone.parameters()]
batch_norms = [module for model in pairs["RT-DETR v2"] for path, module in model.named_modules()
               if isinstance(module, nn.BatchNorm2d) and "backbone" not in path]
scales = torch.cat([norm.weight.detach() for norm in batch_norms])
print(f"Deformable DETR: {sum(frozen)} of {len(frozen)} tensors of the backbones are frozen")
print(f"RT-DETR v2: batch norm scales behind the backbone {scales.mean():.4f} ± {scales.std():.4f}")
assert all(frozen) and scales.abs().max() < 0.1

for model in pairs["Deformable DETR"]:
    model.model.unfreeze_backbone()
for norm in batch_norms:
    nn.init.ones_(norm.weight)

# %% [markdown]
# The dense DETR and Deformable DETR pad: images of two sizes share a batch. RT-DETR cannot be told
# of padding (it takes a mask and ignores it), so all images are stretched to one size.

# %%
data.make_toy("datasets/toy")
sets = [data.build("toy", "datasets/toy", "val", size=size, limit=6) for size in (None, (32, 112))]
items = [sets[i % 2][i] for i in range(6)]
labels, boxes = [[target[key] for _, target in items] for key in ("labels", "boxes")]
targets = [{"class_labels": l, "boxes": b} for l, b in zip(labels, boxes)]   # transformers' words

padded = data.collate(items)
real = ~padded.padding                                            # (B, H, W), True in an image
extent = torch.stack([real[:, 0].float().mean(1), real[:, :, 0].float().mean(1)], 1)  # w/W, h/H
stretched = torch.stack([F.interpolate(image[None], (64, 192), mode="bilinear")[0]
                         for image, _ in items])
batches = {"dense DETR": (padded.images, real.long()),
           "Deformable DETR": (padded.images, real.long()), "RT-DETR v2": (stretched, None)}
print(f"padded {tuple(padded.images.shape)}, stretched {tuple(stretched.shape)}, "
      f"objects {[len(l) for l in labels]}")

# %% [markdown]
# Teachers get forty steps of their own loss. (Fresh ones would not do: RT-DETR's box heads start at
# zero, so teacher and student would give the same boxes.)

# %%
def fit(parameters, losses, steps):
    """Plain training. losses() -> {name: weighted scalar}. -> {name: (steps,)}"""
    parameters, history = [*parameters], []
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        terms = losses()
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append([value.item() for value in terms.values()])
    return dict(zip(terms, torch.tensor(history).T))


def fit_alone(model, images, mask, steps):
    """Training with the detector's own loss. -> its values, (steps,)"""
    model.train()
    return fit(model.parameters(), lambda: {"own": model(images, mask, labels=targets).loss},
               steps)["own"]


for name, (teacher, _) in pairs.items():
    values = fit_alone(teacher, *batches[name], steps=40)
    teacher.eval().requires_grad_(False)                          # from here on it only answers
    print(f"{name}: the teacher's loss {values[0]:.1f} -> {values[-1]:.1f}")
    assert values[-1] < 0.8 * values[0]

# %% [markdown]
# What a step needs of each. The optimizer has the parameters of `distill` too: two linear maps
# between the widths. `at_least=1` makes one padding row for a batch without objects:
# `nn.MultiheadAttention` fails on 0 queries. All other switches of `CLoCKDistill` have their
# defaults. Think of two: the scale mask is on (off: `scale=False`; on the toy it costs AP), and true
# boxes are asked for exactly (in the recipes of the toy and of small KITTI: `box_noise=0.4`).

# %%
def variant(case, **changes):
    return SimpleNamespace(**vars(case) | changes)


asks = {"dense DETR": ask_dense, "Deformable DETR": ask_deformable_detr, "RT-DETR v2": ask_rt_detr}
asked_with = {"dense DETR": pairs["dense DETR"][0].model.queries.weight, "Deformable DETR": None,
              "RT-DETR v2": pairs["RT-DETR v2"][0].model.denoising_class_embed.weight[:-1]}
options = {"dense DETR": dict(content="own", classes="softmax"),
           "Deformable DETR": dict(content="random_label", num_classes=3),
           "RT-DETR v2": dict(content="label")}
cases = {}
for name, (teacher, student) in pairs.items():
    images, mask = batches[name]
    distill = CLoCKDistill(32, 64, at_least=1, **options[name])
    cases[name] = SimpleNamespace(
        teacher=teacher, student=student.train(), distill=distill, ask=asks[name],
        learned=[*student.parameters(), *distill.parameters()], embedding=asked_with[name],
        images=images, mask=mask, labels=labels, boxes=boxes, targets=targets,
        extent=None if mask is None else extent)

for name, case in cases.items():
    done = step(case)
    print(f"{name}: own loss {done.output.loss:.1f}, "
          + ", ".join(f"{key} {x:.3f}" for key, x in done.terms.items()))
    assert all(x.isfinite() and x > 0 for x in (done.output.loss, *done.terms.values()))

# %% [markdown]
# ## Which class head?
#
# The memory part and the boxes do not know how your detector scores classes. Its own loss, focal
# loss or cross entropy, stays as it is. Two things depend on the head: how class answers are
# compared (`cls`), and the weight $w$ of an answer, the teacher's confidence. With $z$ for the
# teacher's logits and $T$ for the temperature:
#
# | head | `classes=` | answers that are compared | weight $w$ |
# |---|---|---|---|
# | sigmoids: Conditional, Deformable DETR, DINO, RT-DETR | `"bernoulli"` | a yes or no for each class, of $z / T$ | largest sigmoid of $z$ |
# | softmax with "no object": DETR | `"softmax"` | one distribution, of $z / T$ | largest probability of a real class |
# | sigmoids, as one distribution | `"softmax_of_sigmoid"` | a softmax of $z / T$ | largest sigmoid of $z$ |
#
# **Claim.** A softmax head under the wrong name turns the weight round, without an error message.
# Where the teacher says "no object", its answer should weigh next to nothing. Read as sigmoids, "no
# object" is one more class, of which the teacher is sure, and its box is copied with full weight.

# %%
no_object = torch.tensor([0.0, 0, 0, 4]).view(1, 1, 1, 4)          # three classes, then "no object"
place = torch.tensor([0.5, 0.5, 0.2, 0.2]).view(1, 1, 1, 4)
real_query = torch.ones(1, 1, dtype=torch.bool)
weight = {}
for classes in ("softmax", "bernoulli"):
    # The boxes differ by 4 x 0.1, and l1 is w times that.
    terms = logit_loss(no_object, place + 0.1, no_object, place, real_query, classes=classes)
    weight[classes] = terms["l1"].item() / 0.4
    print(f"{classes:<10} w = {weight[classes]:.3f}")
assert weight["softmax"] < 0.02 and weight["bernoulli"] > 0.98

# %% [markdown]
# ## How heavy?
#
# A term's size does not say how heavy it is. The rule of [notebook 1, part 3](1_the_method.ipynb),
# compares gradients instead (in `train.py` it is `--balance memory=50 cls+l1+giou=1`).
#
# In your own code it is ten lines around six pieces of [train.py](../train.py). Copy
# `is_detection`, `gradients_of`, `length`, `gradient_ratio`, `process_count` and `Balance`; they
# need torch and `math`. Name your own losses `loss_...`: that is how they are told from the
# method's.

# %%
def ratios(case, done):
    """Memory's ratio and the answers', of one step."""
    losses = done.terms | {"loss_own": done.output.loss}
    return [train.gradient_ratio(losses, part, [*case.student.parameters()])
            for part in (["memory"], ["cls", "l1", "giou"])]


def weigh(case, optimizer):
    """In its first 8 steps the student trains alone; their ratios set both lambdas."""
    balance = train.Balance({"memory": 50.0, "cls+l1+giou": 1.0})
    for index in range(8):
        done = step(case)
        losses = done.terms | {"loss_own": done.output.loss}
        balance.measure(losses, index, [*case.student.parameters()])
        optimizer.zero_grad()
        done.output.loss.backward()
        optimizer.step()
    case.distill.lambda_mem, case.distill.lambda_log = balance.factors(8).values()


for name, case in cases.items():
    before = ratios(case, step(case))
    weigh(case, torch.optim.AdamW(case.learned, lr=1e-5))         # yours, in its warm-up
    now = ratios(case, step(case))
    print(f"{name:15} lambdas of 1 give memory {before[0]:6.3f}, answers {before[1]:.3f}; "
          f"lambda_mem {case.distill.lambda_mem:.0f}, lambda_log {case.distill.lambda_log:.2f} "
          f"give {now[0]:.0f}, {now[1]:.2f}")
    assert 25 < now[0] < 100 and 0.5 < now[1] < 2

# %% [markdown]
# `lambda_mem` differs by a factor of over 20 between the three detectors, at equal widths: a lambda
# tuned for one is no guide for another. The last two numbers are those of the next step; they move
# on from there, the weights stay.
#
# ## The student learns
#
# Sixty steps with the weights from above, and sixty of a copy of the student without the method.
# **Look at** the detector's own loss: which student is ahead?

# %%
own, left = {}, {}
for name, case in cases.items():
    def losses():
        done = step(case)
        return {"own": done.output.loss, **done.terms}

    torch.manual_seed(1)
    alone = fit_alone(copy.deepcopy(case.student), case.images, case.mask, steps=60)
    torch.manual_seed(1)
    history = fit(case.learned, losses, steps=60)
    own[name] = {"the student alone": 100 * alone / alone[0],
                 "distilled": 100 * history["own"] / alone[0]}
    left[name] = {"alone": alone[-1] / alone[0]} | {
        term: values[-1] / values[0] for term, values in history.items()}
    assert max(left[name].values()) < 0.9

print("after sixty steps, % of the first value: the lone student's own loss; the distilled one's")
print(f"{'':15}" + "".join(f"{term:>8}" for term in left[name]))
for name, row in left.items():
    print(f"{name:15}" + "".join(f"{100 * share:8.0f}" for share in row.values()))
plots.lines(own, "step", "own loss, % of the first", "Six images, sixty steps: the own loss")

# %% [markdown]
# In two detectors the lone student is ahead, in Deformable DETR they end together. That is no bad
# sign: the lone one has nothing else to learn. Success is that all four terms of the method fall,
# as here, and that the checklist below says yes.
#
# **A gain shows only in AP on other images**: six images are learned by heart. So train both for a
# third of your steps, and compare. With this rule DINO came to AP .195 on the toy, the lone student
# to .107 (one seed each, [notebook 1](1_the_method.ipynb)). Is your distilled student below? Take a
# quarter of both ratios (not tested as a rule). Do not begin above 50 and 1: 200 and 4 gave .128 in
# place of .194 on KITTI (one seed each). If memory's loss does not fall at all, see the checklist.
#
# ## The detector does not notice
#
# **Claim.** A detector's own queries give the same answers when ours are decoded in the same pass,
# in one-stage models too. With the mask taken away from self-attention they move: the test can
# fail.

# %%
def at_self_attention(detector, hook):
    """hook(module, args, call) before each self-attention of the decoder."""
    return hooked([layer.self_attn for layer in detector.model.decoder.layers], hook)


def without_mask(module, args, call):
    return args, call | {key: None for key in ("attention_mask", "attn_mask") if key in call}


@torch.no_grad()
def noticed(case, detector):
    """The largest change of the detector's own logits by our queries: (with the mask, without)."""
    queries = CLoCKDistill(64, 64, content="random").queries(labels, boxes)[:3]
    before = detector(case.images, case.mask).logits
    with case.ask(detector, *queries):
        after = detector(case.images, case.mask).logits
        with at_self_attention(detector, without_mask):
            unmasked = detector(case.images, case.mask).logits
    return (before - after).abs().max().item(), (before - unmasked).abs().max().item()


detectors = {name: (case, case.teacher) for name, case in cases.items()}
for refine in (False, True):
    one_stage = deformable_detr(64, 3, two_stage=False, with_box_refine=refine).eval()
    name = "Deformable DETR, one stage" + ", refined" * refine
    detectors[name] = cases["Deformable DETR"], one_stage
for name, (case, detector) in detectors.items():
    masked, unmasked = noticed(case, detector)
    print(f"{name:37} own logits move by {masked:.0e}, without the mask by {unmasked:.0e}")
    assert masked < 1e-5 and unmasked > 100 * masked

# %% [markdown]
# The mask that arrives in self-attention, for an image with two objects in a batch with up to
# seven: "own" are the detector's queries, "ours" the target-aware ones. **Look for** grey where own
# and ours cross: neither sees the other.

# %%
def mask_that_arrives(case):
    """-> (all, all) bool of image 0, and the number of own queries."""
    seen = []
    with at_self_attention(case.student, lambda module, args, call: seen.append(call)):
        own = step(case).learned.own[0].shape[1]
    if "attn_mask" in seen[0]:
        return ~seen[0]["attn_mask"][0], own
    return seen[0]["attention_mask"][0, 0] == 0, own


masks, groups = {}, {}
for name in ("dense DETR", "RT-DETR v2"):
    may, own = mask_that_arrives(cases[name])
    assert not may[:own, own:].any() and not may[own:, :own].any() and may.diagonal().all()
    masks[name] = may
    groups[name] = {"denoising": own - 30, "own": 30, "ours": len(may) - own}
plots.self_attention(masks, groups=groups, title="Which query may attend to which")

# %% [markdown]
# The five padding rows of image 0 attend only to themselves (the small squares). In training
# RT-DETR has two denoising groups, apart from each other and from ours. They see its own queries,
# which never see them.
#
# ## Several processes
#
# Three rules; most errors against them are silent.
#
# 1. **One module.** Wrap student and method together, as `Learner` below. When `distill` stands
#    outside of `DistributedDataParallel`, each process trains two linear maps of its own.
# 2. **A process may have no objects.** Its logit loss is 0 but still attached to the student's
#    graph: every parameter gets a gradient (of zeros), and DDP's all-reduce finds its partner. So
#    nothing hangs.
# 3. **Every process calls `distill` at every step.** The logit loss divides by the number of valid
#    queries of *all* processes, so that the averaged gradient is the whole batch's. `if objects:
#    distill(...)` leaves the others waiting for ever.
#
# Call `weigh` in every process, before you wrap: `Balance` averages the ratios over the processes,
# so their lambdas agree, and DDP then hands out the first process's student.
#
# **Claim.** Two processes, one of them with images without objects, get the gradients that one
# process gets from the whole batch. (They are forked here, which needs Linux; `torchrun` starts
# yours.)

# %%
class Learner(nn.Module):
    """Student and method in one module, so that DDP sees all that learns in one forward."""

    def __init__(self, case):
        super().__init__()
        self.student, self.distill = case.student, case.distill

    def forward(self, case):
        done = step(variant(case, student=self.student, distill=self.distill))
        return done.output.loss + sum(done.terms.values())


def part_of(case, images):
    """The same step with some of the images."""
    pick = {key: [getattr(case, key)[i] for i in images] for key in ("labels", "boxes", "targets")}
    return variant(case, images=case.images[images], mask=case.mask[images],
                   extent=case.extent[images], **pick)


def one_of_two(rank, case, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    learner = DistributedDataParallel(Learner(case))
    learner(part_of(case, [0, 2, 4] if rank == 0 else [1, 3, 5])).backward()
    torch.save({n: p.grad for n, p in learner.module.named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# Images 1, 3, 5 lose their objects. Batch norms stay as they are: they would see half a batch.
none = [1, 3, 5]
emptied = variant(
    cases["dense DETR"], student=copy.deepcopy(cases["dense DETR"].student).eval(),
    labels=[x[:0] if i in none else x for i, x in enumerate(labels)],
    boxes=[x[:0] if i in none else x for i, x in enumerate(boxes)],
    targets=[{k: v[:0] for k, v in t.items()} if i in none else t for i, t in enumerate(targets)])
whole = Learner(emptied)
whole.zero_grad()
whole(emptied).backward()
expected = {name: p.grad for name, p in whole.named_parameters()}
whole.zero_grad()                                        # or the processes would add to them
with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(one_of_two, (emptied, folder), nprocs=2, start_method="fork")
    first, second = (torch.load(f"{folder}/{rank}.pt") for rank in (0, 1))
apart = max((first[n] - grad).norm() / grad.norm().clamp(min=1e-3) for n, grad in expected.items())
print(f"{len(first)} gradients, those of the two maps included, differ from one process's by at "
      f"most {apart:.0e} of their norm")
assert apart < 1e-3 and all(torch.equal(first[n], second[n]) for n in first)

# %% [markdown]
# ## Checklist for any other DETR
#
# Each check is a way in which such code is wrong, mostly without an error message. What you would
# see instead stands below its name (reasoned, not measured). The names are those of `transformers`:
# put yours for `config.id2label`, `config.decoder_layers`, `logits`, `pred_boxes`, and for the
# parts `backbone.` and `decoder.`. Set your student's dropout to 0 first: it draws other numbers
# when there are more queries, and a right adapter would look wrong.

# %%
def largest(difference):
    return difference.abs().max().item()


def ours(case):
    """-> content, reference, attend, valid"""
    return case.distill.queries(case.labels, case.boxes, case.embedding)


@torch.no_grad()
def ask_teacher(case, content, reference, attend, alone=True):
    """-> the answer to these queries, and the teacher's own output."""
    with case.ask(case.teacher, content, reference, attend, alone=alone) as answer:
        output = (case.teacher.model if alone else case.teacher)(case.images, case.mask)
    return answer, output


@torch.no_grad()
def moved(case, factor=1.0):
    """How far the teacher's boxes move, at most, when image 1 is taken out of the padded batch."""
    content, reference, attend, valid = ours(case)
    padded, _ = ask_teacher(case, content, reference * factor, attend)
    real = case.mask[1].bool()                            # (H, W): the image fills a rectangle
    image = case.images[1][:, real.any(1)][:, :, real.any(0)][None]
    single = variant(case, images=image, mask=torch.ones_like(image[:, 0]).long())
    single, _ = ask_teacher(single, content[1:2], reference[1:2], attend[1:2])
    return largest((padded.boxes[-1, 1] - single.boxes[-1, 0])[valid[1]])


def gradient(case, loss, module):
    """The norm of a loss's gradient on a part of the student."""
    parameters = [p for name, p in case.student.named_parameters()
                  if module in name and p.requires_grad]
    if not parameters:
        return 0.0
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in grads if g is not None) ** 0.5


def parts(case):
    """-> the memory part, the logit part"""
    terms = step(case).terms
    return terms["memory"], terms["cls"] + terms["l1"] + terms["giou"]


def against_itself(case):
    """The same step with the teacher as its own student."""
    width = ours(case)[0].shape[-1]                       # the teacher's
    distill = CLoCKDistill(width, width, num_classes=len(case.teacher.config.id2label), at_least=1,
                           content=case.distill.content,
                           classes=case.distill.logit_options["classes"])
    return variant(case, student=case.teacher, distill=distill)

# %% [markdown]
# ### Teacher, student, optimizer

# %%
def teacher_is_frozen_and_in_eval_mode(case):
    """Its answers to the same image change from step to step."""
    frozen = not any(p.requires_grad for p in case.teacher.parameters())
    return frozen and not case.teacher.training


def student_learns_as_a_whole(case):
    """Memory's loss stops falling early (or you froze a part of the backbone on purpose)."""
    return all(p.requires_grad for p in case.student.parameters())


def optimizer_has_the_two_maps(case):
    """Memory's loss falls, but stays higher than it need be: the maps are random for ever."""
    return set(case.learned) >= set(case.distill.parameters())


def levels_agree(case):
    """With as many tokens by luck: the student copies other places, memory's loss stays high."""
    done = step(case)
    return done.taught.shapes == done.learned.shapes


def classes_agree(case):
    """`cls` and the own loss pull apart, and AP is lowest for the classes that are swapped."""
    return case.teacher.config.id2label == case.student.config.id2label


def every_layer_answers(case):
    """No sign: all student layers learn from the one layer that the teacher shows in eval mode."""
    done = step(case)
    return (len(done.taught.logits) == case.teacher.config.decoder_layers
            and len(done.learned.logits) == case.student.config.decoder_layers)


def columns_fit_the_class_head(case):
    """False boxes: the teacher's boxes of nothing are copied with full weight."""
    no_object = case.distill.logit_options["classes"] == "softmax"
    return step(case).learned.logits.shape[-1] == len(case.student.config.id2label) + no_object

# %% [markdown]
# ### Our queries ask right, and keep to themselves

# %%
def references_are_of_the_own_size(case):
    """Answers beside the objects, in padded images only."""
    if case.extent is None:                               # no padding
        return True
    own_size, padded_size = moved(case), moved(case, case.extent.repeat(1, 2)[:, None])
    return 2 * own_size < padded_size


def our_queries_leave_its_answers_alone(case):
    """The own loss falls faster than without the method, and AP is far lower."""
    torch.manual_seed(2)                                  # RT-DETR draws its denoising queries
    with_ours = step(case).output.logits
    torch.manual_seed(2)
    without = case.student(case.images, case.mask, labels=case.targets).logits
    return largest(with_ours - without) < 1e-4


def its_queries_leave_our_answers_alone(case):
    """The logit part falls slowly: teacher and student answer in different company."""
    *queries, valid = ours(case)
    alone, _ = ask_teacher(case, *queries)
    both, _ = ask_teacher(case, *queries, alone=False)
    return largest((both.logits - alone.logits)[:, valid]) < 1e-4


def padding_rows_change_nothing(case):
    """An image's answers depend on how many objects the others in its batch have."""
    content, reference, attend, _ = ours(case)
    few = len(case.labels[0])                             # image 0 then has no padding rows
    with_rows, _ = ask_teacher(case, content, reference, attend)
    without, _ = ask_teacher(case, content[:, :few], reference[:, :few], attend[:, :few, :few])
    return largest(with_rows.logits[:, 0, :few] - without.logits[:, 0]) < 1e-4


def its_own_queries_get_its_own_answers(case):
    """`l1` and `giou` stay high: contents, references or heads are not those of the detector."""
    answer, output = ask_teacher(case, *ours(case)[:3], alone=False)
    everyone = torch.ones(len(case.images), *[answer.own[0].shape[1]] * 2, dtype=torch.bool)
    echo, _ = ask_teacher(case, *answer.own, everyone)
    return max(largest(echo.logits[-1] - output.logits),
               largest(echo.boxes[-1] - output.pred_boxes)) < 1e-4

# %% [markdown]
# ### Losses and gradients

# %%
@torch.no_grad()
def a_copy_of_the_teacher_has_no_loss(case):
    """Losses that never reach 0, whatever is learned."""
    return sum(step(against_itself(case)).terms.values()).abs() < 1e-5


@torch.no_grad()
def images_without_objects_add_nothing(case):
    """NaN, or a crash, at the first such batch."""
    empty = variant(against_itself(case), labels=[x[:0] for x in case.labels],
                    boxes=[x[:0] for x in case.boxes], targets=None)
    terms = step(empty).terms
    return all(terms[key] == 0 for key in ("cls", "l1", "giou"))


def both_parts_reach_the_backbone(case):
    """AP stays the student's alone: a `detach`, or a `no_grad`, cuts the method off."""
    return all(gradient(case, part, "backbone.") > 0 for part in parts(case))


def memory_does_not_reach_the_decoder(case):
    """Detection suffers: what was hooked is not the encoder's memory."""
    memory, _ = parts(case)
    return gradient(case, memory, "decoder.") == 0

# %% [markdown]
# ### All of them
#
# The last column is the dense DETR with a forgotten `~`, so that the mask says the opposite. There
# is no error message.

# %%
CHECKS = [
    teacher_is_frozen_and_in_eval_mode, student_learns_as_a_whole, optimizer_has_the_two_maps,
    levels_agree, classes_agree, every_layer_answers, columns_fit_the_class_head,
    references_are_of_the_own_size, our_queries_leave_its_answers_alone,
    its_queries_leave_our_answers_alone, padding_rows_change_nothing,
    its_own_queries_get_its_own_answers, a_copy_of_the_teacher_has_no_loss,
    images_without_objects_add_nothing, both_parts_reach_the_backbone,
    memory_does_not_reach_the_decoder]


def inverted(module, args, call):
    mask = call["attn_mask"]                              # None while ours are not there
    return args, call | {"attn_mask": None if mask is None else ~mask}


results = {name: [bool(check(case)) for check in CHECKS] for name, case in cases.items()}
assert all(all(column) for column in results.values())
dense = cases["dense DETR"]
with at_self_attention(dense.teacher, inverted), at_self_attention(dense.student, inverted):
    results["dense, mask inverted"] = [bool(check(dense)) for check in CHECKS]

print(f"{'':36}" + "  ".join(results))
for check, row in zip(CHECKS, zip(*results.values())):
    words = [f"{'yes' if holds else 'NO':{len(name)}}" for name, holds in zip(results, row)]
    print(f"{check.__name__.replace('_', ' '):36}" + "  ".join(words).rstrip())
    if not all(row):
        print(f"    you would see: {check.__doc__}")
assert results["dense, mask inverted"].count(False) == 6

# %% [markdown]
# Six checks find it: in the image with the most objects, the teacher's rows now have nothing to
# attend to, and it answers NaN. With `groups=3` they would see the other groups, and training would
# run: the detector would learn to rely on the true boxes.
#
# No error of shapes would betray a missing layer: only the check `every layer answers` does. Here
# the teacher has three decoder layers and the student two. `logit_loss` pairs student layer $i$
# with teacher layer $\mathrm{round}(i L_t / L_s)$, so that the last learns from the last: 1 from 2
# and 2 from 3.
#
# ## Exercises
#
# **1.** With `confidence=False` every answer has the weight 1 in place of the teacher's confidence,
# which is a third on average for the dense DETR. *Predict before you run it*: which of `memory`,
# `cls`, `l1`, `giou` grow, which shrink, which stay, and by about which factor?
#
# <details><summary>Answer</summary>
#
# ```python
# case = cases["dense DETR"]
# equal = CLoCKDistill(32, 64, at_least=1, confidence=False, **options["dense DETR"])
# weighted = CLoCKDistill(32, 64, at_least=1, **options["dense DETR"])
# a, b = (step(variant(case, distill=distill)).terms for distill in (equal, weighted))
# factors = {key: (a[key] / b[key]).item() for key in a}
# print(factors)
# assert factors.pop("memory") == 1 and all(2 < factor < 5 for factor in factors.values())
# ```
# `memory` stays: the confidence is not in it. The others grow about threefold, by one over a mean
# confidence, a different mean for each term. So $\lambda_{log}$ has to be set anew, which is what
# the rule is for.
# </details>
#
# **2.** Forget `unfreeze_backbone()` for the student of Deformable DETR. Which checks find it? Does
# anything crash?
#
# <details><summary>Answer</summary>
#
# ```python
# case = cases["Deformable DETR"]
# case.student.model.freeze_backbone()
# print([check.__name__ for check in CHECKS if not check(case)])
# case.student.model.unfreeze_backbone()
# ```
# `student_learns_as_a_whole` and `both_parts_reach_the_backbone`. Nothing crashes: encoder and
# decoder learn on what a random backbone gives them.
# </details>
#
# **3.** Your student has six decoder layers, the teacher three. From which teacher layer does each
# student layer learn? What would `layers="last"` change?
#
# <details><summary>Answer</summary>
#
# ```python
# print([max(round(i * 3 / 6), 1) for i in range(1, 7)])
# ```
# 1, 1, 2, 2, 2, 3 (Python rounds halves to the even number: layer 3 goes to 2, layer 5 to 2). With
# `layers="last"` only the last student layer learns, from the last of the teacher: a sixth of the
# summed terms, so $\lambda_{log}$ has to be set anew.
# </details>
