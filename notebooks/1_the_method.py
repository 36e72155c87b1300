# %% [markdown]
# # 1 The method
#
# One street scene, followed through the whole of CLoCKDistill. The detector is DINO. Teacher and student are the small
# ones in `weights/`, trained on the toy KITTI. Every equation stands beside the lines that compute it, and every claim
# is asserted: if it became false, this notebook would stop there.
#
#     image         ->  memory of the teacher and of the student  ->  location mask  ->  L_mem
#     ground truth  ->  target-aware queries  ->  both decoders   ->  their answers  ->  L_log
#     L = L_detection + lambda_mem * L_mem + lambda_log * L_log
#
# How sure is it that the paper does so? **[A]** the paper's abstract says it · **[T]** a third party's account, not
# checked against the paper · **[P]** the authors' earlier public code for a DETR distiller · **[O]** our own choice.
# Only [A] is certain. Nearly all the rest are switches of [clockdistill.py](../clockdistill.py); the list is at the
# end.
#
# The words: a DETR's *encoder* turns the image into tokens, the **memory**. Its *decoder* holds **queries**, each a
# content vector with a *reference box*. Layer by layer a query reads the memory near its reference, and corrects its
# class and its box. *Learned* queries do the detecting. DINO trains with *denoising* queries beside them: true boxes
# and labels with noise on them, to be restored. *GIoU* is the overlap of two boxes, made to count also for boxes apart.

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "notebooks":        # the modules are a folder of files, not a package
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import copy

import torch
from torch.testing import assert_close
from torchvision.ops import box_convert, box_iou

import data
import models
from experiments import plots
import train
from clockdistill import CLoCKDistill, location_mask, logit_loss, memory_loss, target_queries

# %matplotlib inline

# %% [markdown]
# ## The scene
# **Claim.** Two classes, four objects; the largest has some twenty times the pixels of the smallest. On the 500 images
# of `val` the teacher is much better than the student, which was trained alone. This student will be taught.

# %%
data.make_toy("datasets/toy")                           # drawn on first use
val = data.build("toy", "datasets/toy", "val")
teacher, of_teacher = train.load_model("weights/toy_teacher_dino.safetensors")
alone, of_alone = train.load_model("weights/toy_student_dino.safetensors")
teacher.requires_grad_(False)                           # frozen; load_model has set eval mode

NUMBER = 93
picture, truth = val.raw(NUMBER)                        # its boxes are in pixels, x0 y0 x1 y1
batch = data.collate([val[NUMBER]])                     # images (1, 3, 48, 160), padding (1, 48, 160), targets
labels, boxes = [batch.targets[0]["labels"]], [batch.targets[0]["boxes"]]     # (4,), (4, 4) cxcywh as fractions

sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]   # (4, 2)
areas = sides.prod(1)
names = [f"{val.classes[label].lower()} {w:.0f} x {h:.0f} px" for label, (w, h) in zip(labels[0], sides)]
print(*names, sep="; ")
print(f"AP on val: teacher {of_teacher['metrics']['AP']:.2f}, student alone {of_alone['metrics']['AP']:.2f}")
assert len(names) == 4 and len(set(labels[0].tolist())) == 2 and areas.max() > 15 * areas.min()
assert of_teacher["metrics"]["AP"] > of_alone["metrics"]["AP"] + 0.1

with torch.no_grad():
    results = {name: models.postprocess(model(batch.images, batch.padding).detections, [picture.size[::-1]])
               for name, model in {"teacher": teacher, "student alone": alone}.items()}
plots.detections([picture], [truth], results, val.classes)

# %% [markdown]
# # Part 1: memory
# ## Image → memory
# The encoder turns the image into **memory**: a token for each cell of three grids (strides 8, 16, 32). CLoCKDistill
# distils this, not the backbone's features [A]: a token knows its surroundings, and the decoder reads nothing else.
#
# DINO's proposal head shows what a token knows. It reads one token and says how likely an object is there.
#
# **Claim.** Each model's head finds the objects in its *own* memory. The teacher's head cannot read the student's:
# models trained apart know similar things, but write them down in unrelated directions (their mean cosine is near 0).

# %%
with torch.no_grad():
    t_memory, s_memory = (model.encode(batch.images, batch.padding) for model in (teacher, alone))
shapes = t_memory.shapes                                # [(6, 20), (3, 10), (2, 5)]
print("memory (B, S, D):", *map(tuple, (t_memory.tokens.shape, s_memory.tokens.shape)), "levels (H, W):", shapes)


@torch.no_grad()
def found_by(reader, tokens):
    """How likely the reader's proposal head finds an object at each token: (1, S, D) -> (S,) in 0..1."""
    head = reader.proposals
    return head.class_head(head.norm(head.project(tokens))).sigmoid().amax(2)[0]


def by_level(values):
    """(S,) -> [(H, W)], a level each."""
    return [part.view(shape) for part, shape in zip(values.split([h * w for h, w in shapes]), shapes)]


reading = {"teacher's memory, teacher's head": found_by(teacher, t_memory.tokens),
           "student's memory, student's head": found_by(alone, s_memory.tokens),
           "student's memory, teacher's head": found_by(teacher, s_memory.tokens)}
on_object = torch.cat([location_mask(boxes[0], *shape)[0].flatten() for shape in shapes])      # (160,) bool
by_teacher, by_student, _ = reading.values()
_, own, foreign = torch.corrcoef(torch.stack(list(reading.values())))[0].tolist()
cosine = torch.cosine_similarity(t_memory.tokens, s_memory.tokens, dim=2).mean()
print(f"correlation with the teacher's reading: {own:.2f} (student's head), {foreign:.2f} (teacher's head); "
      f"mean cosine of the two memories: {cosine:.2f}")
assert all(chance[on_object].mean() > 1.5 * chance[~on_object].mean() for chance in (by_teacher, by_student))
assert own > foreign + 0.2 and abs(cosine) < 0.3
plots.maps_over_scene(picture, truth["boxes"], {name: by_level(chance)[:2] for name, chance in reading.items()},
                      "chance of an object", "What a head finds in each token of a memory", high=0.6)

# %% [markdown]
# ## Where does the student's memory differ from the teacher's?
# **Claim.** Everywhere alike, on the objects as on the background. The squared error of a token is about the sum of the
# two squared lengths, as for vectors that have nothing to do with each other. So the error does not say what matters;
# the location mask will. (The colours end at twice that sum, here and in the same picture after training.)

# %%
error = (t_memory.tokens - s_memory.tokens).square().sum(2)[0]                       # (160,), summed over channels
lengths = (t_memory.tokens.square() + s_memory.tokens.square()).sum(2).mean()
print(f"mean error of a token: {error[on_object].mean():.0f} on objects, {error[~on_object].mean():.0f} on background; "
      f"the two squared lengths: {lengths:.0f}")
assert 0.75 < error[on_object].mean() / error[~on_object].mean() < 1.33
assert 0.7 < error.mean() / lengths < 1.3 and error.max() < 3 * error.min()
SCALE = dict(low=lengths.item() / 100, high=2 * lengths.item())                      # of the colours
plots.memory_error(picture, s_memory.tokens[0], t_memory.tokens[0], shapes, truth["boxes"], **SCALE)

# %% [markdown]
# ## The memory loss by hand
#
#     M_p = 1 if token p lies inside a ground-truth box, else 0                             [A: by location; T: this M]
#     S_p = 1 / (H_k W_k) inside box k, 1 / N_bg outside; where boxes overlap, the smaller box wins                 [T]
#     L_mem = alpha sum_p M_p S_p |A^T_p - f(A^S_p)|^2 + beta sum_p (1 - M_p) S_p |A^T_p - f(A^S_p)|^2              [T]
#     alpha = 5e-5, beta = 1e-7                                                                                     [T]
#
# A^T and A^S are the memories. The square sums over channels; levels are summed; the sum is divided by the number of
# images [O]. f is a linear map where the widths differ, else the identity [O]. A box owns every cell it touches [O].
#
# **Claim.** On a map of 4 x 6 cells with a box of 2 x 3, the functions give what we get by hand. Because S is one over
# the number of cells, a sum over a region is its *mean*: at each level L_mem is alpha times the mean error of every
# object (that no smaller box covers in part), plus beta times the mean error of the background.

# %%
H, W = 4, 6
box = torch.tensor([[2.5 / W, 2 / H, 3 / W, 2 / H]])    # columns 1..3, rows 1..2, as (cx, cy, w, h) in fractions
M, S = location_mask(box, H, W)
in_box = torch.zeros(H, W, dtype=torch.bool)
in_box[1:3, 1:4] = True
assert torch.equal(M, in_box)
assert_close(S, torch.where(in_box, 1 / 6, 1 / 18))     # 6 cells inside, 24 - 6 outside

A_S, A_T = torch.zeros(H, W, 2), torch.ones(H, W, 2)    # two channels; background: 1^2 + 1^2 = 2
A_T[1:3, 1:4] = torch.tensor([1., 2.])                  # the object: 1^2 + 2^2 = 5 in five cells ..
A_T[2, 3] = torch.tensor([3., 0.])                      # .. and 3^2 + 0^2 = 9 in one
loss = memory_loss(A_S.view(1, H * W, 2), A_T.view(1, H * W, 2), [box], [(H, W)]).item()
by_hand = 5e-5 * (5 * 5 + 9) / 6 + 1e-7 * (18 * 2) / 18
assert_close(loss, by_hand)
print(f"L_mem = {loss:.4e}; by hand 5e-5 * (5 * 5 + 9) / 6 + 1e-7 * (18 * 2) / 18 = {by_hand:.4e}")

# A second box, one cell inside the first: the smaller wins there, the larger keeps 1/6 in its other five.
both = torch.cat([box, torch.tensor([[1.5 / W, 1.5 / H, 1 / W, 1 / H]])])
_, S_both = location_mask(both, H, W)
assert S_both[1, 1] == 1
assert_close(S_both[in_box].sum().item(), 1 + 5 / 6)

# The odd cases: a box smaller than a cell owns one; padded cells are neither object nor background, and a box shares
# its weight among its real cells; without objects all is background; f maps the student's channels to the teacher's.
assert location_mask(torch.tensor([[2.5 / W, 2.5 / H, 0.1 / W, 0.1 / H]]), H, W)[0].nonzero().tolist() == [[2, 2]]
real = torch.arange(W).expand(H, W) < 3                 # the right half is padding
_, S_real = location_mask(box, H, W, real)
assert_close(S_real, torch.where(in_box, 1 / 4, 1 / 8) * real)          # columns 1, 2 of the box; 12 - 4 of the rest
none = torch.zeros(0, 4)
assert not location_mask(none, H, W)[0].any()
no_object = memory_loss(A_S.view(1, H * W, 2), A_T.view(1, H * W, 2), [none], [(H, W)]).item()
assert_close(no_object, 1e-7 * (18 * 2 + 5 * 5 + 9) / 24)
wide = memory_loss(A_S.view(1, H * W, 2)[..., :1], A_T.view(1, H * W, 2), [box], [(H, W)],
                   adapter=lambda tokens: tokens.expand(-1, -1, 2)).item()
assert_close(wide, loss)

squared = (A_T - A_S).square().sum(2)
part = torch.where(M, 5e-5, 1e-7) * S * squared
plots.numbers({"M": (M, "{:.0f}".format), "S": (S, lambda v: f"1/{1 / v:.0f}"),
               "squared error": (squared, "{:.0f}".format),
               "its part of L_mem": (part, lambda v: f"{v:.0e}".replace("-0", "-"))},
              "A box of 2 x 3 cells: what each cell counts")

# %% [markdown]
# ## The same on the scene
# **Claim.** At every level each object has a weight of 1 to spread over its cells (less what a smaller box in front of
# it takes away), and so has the background. With these masks the loss is one line, and it is what `memory_loss` gives.
# (At level 2 the boxes touch every cell: there is no background.)

# %%
masks = [location_mask(boxes[0], height, width) for height, width in shapes]         # (M, S) of each level
M, S = (torch.cat([mask[kind].flatten() for mask in masks]) for kind in (0, 1))      # (160,) each
alpha, beta = 5e-5, 1e-7
L_mem = (alpha * M * S * error).sum() + (beta * ~M * S * error).sum()
assert_close(L_mem, memory_loss(s_memory.tokens, t_memory.tokens, boxes, shapes))

finest_M, finest_S = masks[0]
print(f"L_mem = {L_mem:.4f}; at level 0 S sums to {finest_S[finest_M].sum():.2f} on the four objects, "
      f"to {finest_S[~finest_M].sum():.2f} on the background")
assert 3 < finest_S[finest_M].sum() <= 4.0001 and abs(finest_S[~finest_M].sum() - 1) < 1e-4
plots.location_masks(picture, truth["boxes"], masks)

# %% [markdown]
# ## What goes wrong without the pieces
# Four losses of the same two memories; `scale=False` leaves out S, `location=False` leaves out M. Who gets how much?
#
# **Claim.** With both, the objects count about the same and the background next to nothing. *Without S* the object of
# the most cells outweighs that of the fewest several times. *Without M* the background is one more object. *Without
# either*, a plain squared error, the background outweighs all objects together. (The toy's cars are large. In a KITTI
# image there is much more background.)

# %%
owner = torch.full((sum(h * w for h, w in shapes),), -1)               # of each token: an object, or -1
for k in areas.argsort(descending=True).tolist():                      # the smaller boxes last, so that they win
    owner[torch.cat([location_mask(boxes[0][k:k + 1], *shape)[0].flatten() for shape in shapes])] = k
regions = {name: owner == k for k, name in enumerate(names)} | {"background": owner == -1}
fewest, most = min(names, key=lambda n: regions[n].sum()), max(names, key=lambda n: regions[n].sum())

METHOD, NO_S, NO_M, PLAIN = "M and S (the method)", "without S", "without M", "neither (plain MSE)"
switches = {METHOD: {}, NO_S: dict(scale=False), NO_M: dict(location=False), PLAIN: dict(scale=False, location=False)}
weight = {METHOD: torch.where(M, alpha, beta) * S, NO_S: torch.where(M, alpha, beta),
          NO_M: alpha * S, PLAIN: torch.full_like(S, alpha)}

share, lines = {}, []
for name, left_out in switches.items():
    parts = weight[name] * error                                                     # (160,)
    assert_close(parts.sum(), memory_loss(s_memory.tokens, t_memory.tokens, boxes, shapes, **left_out))
    share[name] = {region: (parts[cells].sum() / parts.sum()).item() for region, cells in regions.items()}
    lines.append(f"{name:20}: {most} weighs {share[name][most] / share[name][fewest]:.1f} times {fewest}; "
                 f"background {share[name]['background']:.2%}")
print(*lines, sep="\n")
assert 0.5 < share[METHOD][most] / share[METHOD][fewest] < 2 and share[METHOD]["background"] < 0.01
assert share[NO_S][most] > 3 * share[NO_S][fewest]
assert share[NO_M]["background"] > 0.1
assert share[PLAIN]["background"] > 0.5
plots.stacked(share, "part of the loss", "Who gets how much of the memory loss, all levels together")

# %% [markdown]
# ## ... and what the student learns of it
# Forty steps on this scene, from the same student, with nothing but each of the four losses.
#
# **Claim.** With M and S the small pedestrian is learned first, and the background hardly. Without S the cars are
# learned better and the pedestrian worse. With the plain squared error the background goes ahead of every object.

# %%
def teach_memory(left_out, steps=40):
    """-> the memory of a student taught by memory_loss alone, and the mean error at level 0 by region and step."""
    student = copy.deepcopy(alone)                      # in eval mode: batch normalisation keeps its statistics
    optimizer = torch.optim.Adam([*student.backbone.parameters(), *student.encoder.parameters()], lr=1e-3)
    finest, history = shapes[0][0] * shapes[0][1], {region: [] for region in regions}
    for step in range(steps + 1):
        tokens = student.encode(batch.images, batch.padding).tokens
        now = (t_memory.tokens - tokens.detach()).square().sum(2)[0, :finest]
        for region, cells in regions.items():
            history[region].append(now[cells[:finest]].mean().item())
        loss = memory_loss(tokens, t_memory.tokens, boxes, shapes, **left_out)
        optimizer.zero_grad()
        (1e4 * loss).backward()                         # Adam ignores this factor, unless gradients are near its eps
        optimizer.step()
    return tokens.detach(), history


taught = {name: teach_memory(left_out) for name, left_out in switches.items()}
last = {name: {region: line[-1] for region, line in history.items()} for name, (_, history) in taught.items()}
assert last[METHOD][fewest] < 0.5 * last[METHOD][most] and last[METHOD]["background"] > 0.6 * error.mean()
assert last[NO_S][most] < last[METHOD][most] and last[NO_S][fewest] > 1.3 * last[METHOD][fewest]
assert last[PLAIN]["background"] < min(last[PLAIN][name] for name in names)
plots.lines({name: history for name, (_, history) in taught.items()}, "training step",
            "mean squared error of a token", "The mask decides what is learned first (tokens of level 0)")

# %% [markdown]
# **Claim.** With the method's loss the error is now small just where the objects are. In the same picture before, with
# the same colours, it was alike everywhere. (At level 2 every cell belongs to an object.)

# %%
tokens = taught[METHOD][0]
error_now = (t_memory.tokens - tokens).square().sum(2)[0]
print(f"mean error of a token: {error_now[on_object].mean():.0f} on objects, "
      f"{error_now[~on_object].mean():.0f} on background")
assert error_now[on_object].mean() < 0.6 * error_now[~on_object].mean()
plots.memory_error(picture, tokens[0], t_memory.tokens[0], shapes, truth["boxes"], **SCALE)

# %% [markdown]
# # Part 2: logits
# ## Ground truth → target-aware queries
#
#     q_k = Embed(class_k) as content, MLP(box_k) as position            [A: from the ground truth; T, P: this form]
#
# The embedding is the teacher's, frozen. The true box is the reference box; DINO's own MLP makes the position of it
# [O]. These queries are not learned [T, P].
#
# **Claim.** `target_queries` makes them for a batch. Here an image with two objects joins the scene. Each object is
# asked for in two groups that do not see each other (1 is our default, 3 are in [P]), and corners move a little (0 in
# [P]) so that the groups differ. The second image has rows that only fill up: they see themselves, nobody sees them.

# %%
pair = data.collate([val[NUMBER], next(item for item in val if len(item[1]["labels"]) == 2)])
content, reference, attend, valid = target_queries(
    [t["labels"] for t in pair.targets], [t["boxes"] for t in pair.targets], teacher.label_embedding,
    groups=2, box_noise=0.3, generator=torch.Generator().manual_seed(0))
print(*(f"{name} {tuple(x.shape)}" for name, x in dict(content=content, boxes=reference, attend=attend,
                                                       valid=valid).items()), sep=", ")

query = torch.arange(8)                                 # asks for object query // 2, in group query % 2
assert torch.equal(content[0], teacher.label_embedding[labels[0][query // 2]])
assert torch.equal(attend[0], query[:, None] % 2 == query % 2)
assert valid.tolist() == [[True] * 8, [True] * 4 + [False] * 4]
assert torch.equal(attend[1, 4:], torch.eye(8, dtype=torch.bool)[4:]) and not attend[1, :4, 4:].any()


def pixels(fractions):
    """cxcywh as fractions -> xyxy in pixels of a toy image, all of which have the same size."""
    return box_convert(fractions, "cxcywh", "xyxy") * torch.tensor([*picture.size] * 2)


plots.detections([picture], [truth | {"references": pixels(reference[0])}], {}, val.classes)    # dotted: the references

# %%
plots.self_attention({"attend, the scene": attend[0], "attend, the other image": attend[1]},
                     names=[f"object {k // 2}, group {k % 2}" for k in query.tolist()],
                     title="Target-aware queries: whom they may see")

# %% [markdown]
# ## Both decoders read them
# The teacher's decoder runs on these queries alone. The student decodes everything in one pass: its denoising queries
# (DINO's own), its learned queries, and the target-aware ones.
#
# **Claim.** The target-aware queries see no others and are seen by no others. They have to be apart: their reference
# boxes are the answers that the detector is asked for. So its detections are the same with and without them. (The
# denoising queries hear the learned ones, never the reverse. A number such as "6% to itself" over the picture is the
# part of a query's attention that goes to itself, on average.)

# %%
queries = target_queries(labels, boxes, teacher.label_embedding, groups=2)
with torch.no_grad():
    joint, without = (alone(batch.images, batch.padding, extra=extra) for extra in (queries, None))
    apart = alone.decode(joint.memory, *queries[:3])
assert_close(joint.detections.logits, without.detections.logits, rtol=1e-3, atol=1e-4)
assert_close(joint.extra.boxes, apart.boxes, rtol=1e-3, atol=1e-4)

student = copy.deepcopy(alone).train()                  # in training only there are denoising queries
torch.manual_seed(0)                                    # of their noise
with torch.no_grad(), models.record(student) as seen:
    output = student(batch.images, batch.padding, batch.targets, extra=queries)
among = {f"decoder layer {i}": seen[f"decoder.{i}.self"].weights[0] for i in range(student.decoder_layers)}
noised, learned, aware = (x.logits.shape[2] for x in (output.denoising, output.detections, output.extra))
first = noised + learned                                # they come in the order denoising, learned, target-aware
print(f"{noised} denoising queries in {output.denoising.groups} groups, {learned} learned, {aware} target-aware")
for weights in among.values():                          # (heads, looking, looked at)
    assert not weights[:, first:, :first].any() and not weights[:, :first, first:].any()
    assert not weights[:, noised:first, :noised].any() and weights[:, :noised, noised:first].any()

group = 2 * output.denoising.objects                    # a denoising group: a positive and a negative of each object
plots.self_attention(among, [*range(2 * group), *range(noised, first + aware)],
                     groups={"2 groups of\ndenoising": 2 * group, "learned": learned, "target-\naware": aware},
                     title="One pass of the student: three kinds of queries, and who listens to whom")

# %% [markdown]
# ## One question, two answers
# Query 3 of the teacher and query 3 of the student are *learned*: they look for different things, and to compare their
# answers one has to match them first. Target-aware queries are matched by construction, and both decoders look at the
# same, right places. This is the "consistent" of the paper's title [A].
#
# **Claim.** Asked by the same target-aware query, the two models look at the same place and answer nearly the same
# box. Learned queries of the same number do neither. (Means over 17 images, as many learned queries as objects, DINO's
# most confident first. The picture is the scene's. A dot is a place that the query reads, its area the weight.
# *Agreement* is the overlap of two such maps, 0 to 1. Much of it is built in, since both start at the same box:
# notebook 2 measures how much.)

# %%
@torch.no_grad()
def looked(model, batch, queries, count):
    """The first `count` queries in the last decoder layer: a look (see plots.look) with their boxes in pixels."""
    memory = model.encode(batch.images, batch.padding)
    content, reference, attend = queries[:3] if queries else (*model.learned_queries(memory)[0][:2], None)
    with models.record(model) as seen:
        found = model.decode(memory, content, reference, attend)
    return plots.look(seen[f"decoder.{model.decoder_layers - 1}.cross"], shapes, slice(count),
                      pixels(found.boxes[-1, 0]), pixels(reference[0]))


iou, agree = ({"learned": [], "target-aware": []} for _ in range(2))
for index in [*range(16), NUMBER]:
    one = data.collate([val[index]])
    asked = target_queries([one.targets[0]["labels"]], [one.targets[0]["boxes"]], teacher.label_embedding)
    looks = {}
    for kind, queries in {"learned": None, "target-aware": asked}.items():
        of_t, of_s = (looked(model, one, queries, asked[0].shape[1]) for model in (teacher, alone))
        looks |= {f"teacher, {kind}": of_t, f"student, {kind}": of_s}
        iou[kind].append(box_iou(of_t["boxes"], of_s["boxes"]).diagonal())
        agree[kind].append(plots.agreement(*(plots.attention_mass(look["places"], look["weights"], *shapes[0])
                                             for look in (of_t, of_s))))
iou, agree = ({kind: torch.cat(values).mean().item() for kind, values in of.items()} for of in (iou, agree))
for kind in iou:
    print(f"{kind:12} queries: IoU of the two answers {iou[kind]:.2f}, agreement of the two looks {agree[kind]:.2f}")
assert iou["target-aware"] > max(0.6, iou["learned"] + 0.2) and agree["target-aware"] > agree["learned"] + 0.1
plots.query_attention(picture, looks, [f"query {k}" for k in range(len(names))], context=None,
                      title="The same query number of both models: learned ones differ, target-aware ones agree")

# %% [markdown]
# ## The logit loss by hand
#
#     L_log = sum over decoder layers and queries of  w_k (1 KL + 5 L1 + 2 GIoU)                   [T, P]
#     w_k = max_c sigmoid(teacher's logit of class c), without gradient                            [T, P]
#     KL = T^2 sum_c KL(Bernoulli(sigmoid(t_c / T)) || Bernoulli(sigmoid(s_c / T)))                [O: Bernoulli]
#     T = 10                                                                                       [P]
#     L1 and GIoU (1 - GIoU) to the teacher's boxes; the sum divided by the number of valid queries  [P; number: O]
#
# DETRs are trained with a sigmoid a class. Their answer is a yes or no to each class, hence Bernoulli.
#
# **Claim.** One query with one class, worked by hand, gives what `logit_loss` gives. The class term is 0 just where the
# student agrees. At T = 10 it is nearly $(t - s)^2 / 8$: it pulls on logits, where T = 1 flattens out. The gradient
# reaches the student and not the teacher. (In the precursor's code the two were swapped: its class term had none.)

# %%
T, t, s = 10., 2., -1.                                  # temperature, the teacher's logit, the student's
p, q = torch.tensor([t, s]).double().div(T).sigmoid().tolist()                       # 0.550, 0.475
kl = p * torch.tensor(p / q).log().item() + (1 - p) * torch.tensor((1 - p) / (1 - q)).log().item()
w = torch.tensor(t).sigmoid().item()                    # T is not in it

s_logits, t_logits = (torch.full((1, 1, 1, 1), x, requires_grad=True) for x in (s, t))            # (L, B, Q, C)
s_box = torch.tensor([0.6, 0.5, 0.4, 0.4]).view(1, 1, 1, 4)                          # 0.1 right of the teacher's
t_box = torch.tensor([0.5, 0.5, 0.4, 0.4]).view(1, 1, 1, 4)
yes = torch.ones(1, 1, dtype=torch.bool)
terms = logit_loss(s_logits, s_box, t_logits, t_box, yes, temperature=T)
assert_close(terms["cls"].item(), w * T ** 2 * kl, rtol=1e-3, atol=0)
assert_close(terms["l1"].item(), w * 0.1)
# Overlap 0.3 x 0.4 = 0.12, union 2 x 0.16 - 0.12 = 0.20, hull 0.5 x 0.4 = 0.20: GIoU = 0.12 / 0.20 - 0 / 0.20 = 0.6.
assert_close(terms["giou"].item(), w * (1 - 0.6))
print(f"p = {p:.3f}, q = {q:.3f}, KL = {kl:.5f}, w = {w:.3f}\nby hand w T^2 KL = {w * T ** 2 * kl:.4f}, logit_loss "
      f"{terms['cls'].item():.4f}, w (t - s)^2 / 8 = {w * (t - s) ** 2 / 8:.4f}")

terms["cls"].backward()
assert s_logits.grad.item() < 0 and t_logits.grad is None        # a higher logit of the student lowers the loss
assert abs(T ** 2 * kl / ((t - s) ** 2 / 8) - 1) < 0.02

# %%
logits = torch.linspace(-8, 8, 161)
curves = {f"T = {T:.0f}": [logit_loss(x.view(1, 1, 1, 1), t_box, t_logits, t_box, yes, T, confidence=False)["cls"]
                           .item() for x in logits] for T in (10., 3., 1.)}
assert all(abs(logits[torch.tensor(line).argmin()] - t) < 0.06 for line in curves.values())
curves["(t - s)² / 8"] = (t - logits) ** 2 / 8
plots.lines({f"the teacher's logit t is {t:.0f}": {name: (logits, line) for name, line in curves.items()}},
            "the student's logit s", "T² KL", "The class term of one answer: 0 where the student agrees, nowhere else")

# %% [markdown]
# ## The same on the scene
# **Claim.** The loss of the scene is the sum over its four queries. Each weighs as much as the teacher is sure of its
# answer: w is the teacher's largest probability. The teacher has three decoder layers, the student two: layer i learns
# from layer round(3 i / 2), the first from the second and the last from the last [O].
#
# The student was trained alone and has never read the teacher's embedding: its classes are off. That is what L_log will
# teach it.

# %%
content, reference, attend, valid = target_queries(labels, boxes, teacher.label_embedding)
with torch.no_grad():
    T_out, S_out = (model.decode(memory, content, reference, attend)
                    for model, memory in ((teacher, t_memory), (alone, s_memory)))
print("logits (L, B, Q, C): teacher", tuple(T_out.logits.shape), "student", tuple(S_out.logits.shape))

FACTOR = {"cls": 1, "l1": 5, "giou": 2}
all_four = logit_loss(S_out.logits, S_out.boxes, T_out.logits, T_out.boxes, valid)
by_query = []                                                           # of each query alone, its part of the mean
for k in range(4):
    one = logit_loss(S_out.logits, S_out.boxes, T_out.logits, T_out.boxes, torch.arange(4)[None] == k)
    by_query.append({term: value / 4 for term, value in one.items()})
for term in FACTOR:
    assert_close(sum(one[term] for one in by_query), all_four[term], rtol=1e-3, atol=1e-5)
from_layers = logit_loss(S_out.logits, S_out.boxes, T_out.logits[[1, 2]], T_out.boxes[[1, 2]], valid)
assert all(torch.equal(from_layers[term], all_four[term]) for term in FACTOR)      # of 0, 1, 2: the second and the last
L_log = sum(factor * all_four[term] for term, factor in FACTOR.items())
print(f"L_log = {L_log:.3f} =", " + ".join(f"{factor} x {all_four[k]:.3f} ({k})" for k, factor in FACTOR.items()))

# %%
chances = {"teacher": T_out.logits[-1, 0].sigmoid(), "student": S_out.logits[-1, 0].sigmoid()}       # (4, 3) each
rows = [f"{name}, w = {sure:.2f}" for name, sure in zip(names, chances["teacher"].amax(1))]
plots.dots({"probability of the class, last layer":
            {rows[k]: {name: {model: chance[k, c].item() for model, chance in chances.items()}
                        for c, name in enumerate(val.classes)} for k in range(4)}},
           "What the two answer to the four queries ...")

# %%
parts = {rows[k]: {f"{factor} x {term}": factor * by_query[k][term].item() for term, factor in FACTOR.items()}
         for k in range(4)}
assert_close(sum(sum(part.values()) for part in parts.values()), L_log.item(), rtol=1e-3, atol=1e-5)
plots.stacked(parts, "part of L_log, all layers", "... and what it costs the student", "{:.2f}".format)

# %% [markdown]
# A caution: a query whose content is the label contains its answer, so a decoder could name the class without looking
# at the memory. `content="own"` asks with the teacher's learned contents instead, `box_noise` leaves something to
# correct. Notebook 3 measures what a decoder reads.
#
# # Both parts
# ## The total, and a training step in ten lines
#
#     L = L_detection(student) + lambda_mem L_mem + lambda_log L_log              lambda_mem, lambda_log: [O]
#
# **Claim.** What `CLoCKDistill` adds to the detection loss is just the functions above, weighted.

# %%
labels, boxes = pair.labels, pair.boxes
plain = CLoCKDistill(student_dim=64, teacher_dim=64)                    # the defaults: alpha, beta of [T], lambdas 1
with torch.no_grad():
    content, reference, attend, valid = queries = plain.queries(labels, boxes, teacher.label_embedding)
    t_memory = teacher.encode(pair.images, pair.padding)
    t = teacher.decode(t_memory, content, reference, attend)
    output = alone(pair.images, pair.padding, extra=queries)
memories = output.memory.tokens, t_memory.tokens
replies = output.extra.logits, output.extra.boxes, t.logits, t.boxes
added = plain(*memories, *replies, labels, boxes, shapes, None, valid)
terms = logit_loss(*replies, valid)
assert_close(sum(added.values()), memory_loss(*memories, boxes, shapes) + sum(FACTOR[k] * terms[k] for k in FACTOR))

# %% [markdown]
# `train.clockdistill_step` is these lines for any of the three detectors: the teacher encodes and answers, the student
# decodes everything in one pass, the losses come back by name.
#
# **Claim.** The nine lines from `student =` to `optimizer.step()` are a whole training (`train.train_steps` adds the
# schedule, mixed precision, several processes and the log). Thirty steps on two images lower L_mem, and leave the
# teacher as it was.

# %%
before = train.fingerprint(teacher)
recipe = train.Config(**train.RECIPES["toy-student"]["dino"])
toy = train.open_method(recipe, teacher, alone)                         # CLoCKDistill with the options of the toy
torch.manual_seed(0)
history = []

student = copy.deepcopy(alone).train()
learned = [*student.parameters(), *toy.parameters()]
optimizer = torch.optim.AdamW(learned, lr=1e-3)
for step in range(30):
    losses = train.clockdistill_step(student, teacher, pair, toy)       # {name: weighted scalar}, detection's too
    optimizer.zero_grad()
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(learned, 0.1)
    optimizer.step()
    history.append(losses["memory"].item())                             # for the claim

print(f"lambda_mem L_mem: {history[0]:.0f} in the first step, {history[-1]:.0f} in the last\n"
      "of the toy recipe", *(f"{name}={value}" for name, value in recipe.method_options.items()))
assert history[-1] < 0.8 * history[0]
assert train.fingerprint(teacher) == before and all(p.grad is None for p in teacher.parameters())

# %% [markdown]
# ## Is it on, and how heavy?
# `gradient_report` gives each term's share of the total, and the norm of its gradient on the student. A run logs it
# every 200 steps. A term without gradient is off; one with by far the largest drives the step alone.
#
# **Claim.** With the default lambdas of 1 every term is on, but the memory's hardly moves the toy's student: the value
# alpha = 5e-5 belongs to 256 channels and images of 800 x 1333. The toy's recipe raises it (and leaves S out:
# [notebook 3](3_ablations.ipynb) says why). As the student learns, its share falls.

# %%
reports, lines = {}, ["gradient norm of each term (and its share of the total)"]
for name, (model, method) in {"default lambdas": (alone, plain), "toy recipe": (alone, toy),
                              "toy recipe, 30 steps later": (student, toy)}.items():
    torch.manual_seed(0)
    model = copy.deepcopy(model).train()
    losses = train.clockdistill_step(model, teacher, pair, method)
    reports[name] = train.gradient_report(losses, model)               # {term: (share, gradient norm)}
    lines.append(f"{name:26} " + ", ".join(f"{term} {norm:.3g} ({part:.2%})"
                                           for term, (part, norm) in reports[name].items()))
print(*lines, sep="\n")
default, first, later = reports.values()
assert all(norm > 0 for _, norm in default.values()) and default["memory"][1] < 0.01 * default["detection"][1]
assert first["memory"][1] > 10 * default["memory"][1] and later["memory"][0] < first["memory"][0]
plots.gradients(reports, "Share and gradient of each term: the weights belong to a scale")

# %% [markdown]
# ## Every choice, and how sure it is
#
# | choice | certainty | switch of `CLoCKDistill` |
# |---|---|---|
# | distil the encoder's memory, weighted by the objects' locations | [A] | `lambda_mem`, `location` |
# | M, S; alpha = 5e-5, beta = 1e-7 | [T] | `scale`, `alpha`, `beta` |
# | cells of a box, sums over channels and levels, division by images, linear map between widths | [O] | none |
# | queries from the ground truth, the same for both decoders | [A] | `lambda_log`, `target` |
# | not learned; content from the label | [T, P] | `content` |
# | the teacher's embedding, frozen; the true box as reference | [O] | none |
# | no noise on boxes and labels | [P] | `box_noise`, `label_noise` |
# | one group, no random queries, not the learned ones ([P]: 3, 300, on) | [O] | `groups`, `random_queries`, `learned` |
# | 1 KL + 5 L1 + 2 GIoU | [T, P] | `cls_weight`, `l1_weight`, `giou_weight` |
# | times the teacher's confidence, summed over layers | [T, P] | `confidence`, `layers` |
# | temperature 10, times T² | [P] | `temperature` |
# | KL of Bernoullis, over the number of valid queries | [O] | `classes`, `normalise` |
# | which layer learns from which | [O] | none |
# | both lambdas | [O] | `lambda_mem`, `lambda_log` |
#
# ## Next
# - [2_attention_maps](2_attention_maps.ipynb): where detectors look.
# - [3_ablations](3_ablations.ipynb): what each piece is worth, and whether target-aware queries read the image.
# - [4_kitti_and_coco](4_kitti_and_coco.ipynb): real data, in KITTI's and COCO's layouts.
# - [5_copy_into_your_code](5_copy_into_your_code.ipynb): these functions in a detector of your own.
