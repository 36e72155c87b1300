"""What baselines.py promises: for each rival a hand-worked number or a slow twin, and what holds for all of them."""
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import attention
from experiments import baselines
import criterion
import data
import models
from experiments.baselines import BASELINES, D3ETR, FGD, GKD, MGD, DETRDistill, FitNets, Hinton, KDDETR, View
from clockdistill import memory_loss

SHAPES = [(6, 8), (3, 4)]                                             # 48 + 12 = 60 tokens
NAMES = sorted(BASELINES)
OPTIONS = {"fgd": dict(levels=2), "mgd": dict(levels=2, ratio=0.), "kd_detr": dict(general=2)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def random_boxes(*shape, g, dtype=torch.float32):
    """Boxes inside the image, of 5 to 50 % of its sides."""
    size = 0.05 + 0.45 * torch.rand(*shape, 2, generator=g, dtype=dtype)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, generator=g, dtype=dtype), size], -1)


def padded_tokens(B):
    """Image 1 fills the left three quarters and the upper two thirds of the batch's size, the others all of it."""
    padding, extent = [], torch.ones(B, 2)
    for height, width in SHAPES:
        mask = torch.zeros(B, height, width, dtype=torch.bool)
        mask[1, height * 2 // 3:], mask[1, :, width * 3 // 4:] = True, True
        padding.append(mask.flatten(1))
    extent[1] = torch.tensor([.75, 2 / 3])
    return torch.cat(padding, 1), extent


def some_view(dim, layers, queries, counts, g, dense, dtype):
    """A View with every field; matches are random but one-to-one."""
    B, heads, points = len(counts), 2, 3
    padding, extent = padded_tokens(B)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    def to_memory():
        if dense:
            scores = randn(B, heads, queries, padding.shape[1]).masked_fill(padding[:, None, None], -math.inf)
            return scores.softmax(3)
        weights = randn(B, queries, heads, len(SHAPES) * points).softmax(3).unflatten(3, (len(SHAPES), points))
        return torch.rand(*weights.shape, 2, generator=g, dtype=dtype), weights

    K = max(counts)
    query = torch.stack([torch.stack([torch.randperm(queries, generator=g)[:K] for _ in counts])
                         for _ in range(layers)])                     # (L, B, K)
    found = (torch.arange(K) < torch.tensor(counts)[:, None]).expand(layers, B, K)
    among = [randn(B, heads, queries, queries).softmax(3) for _ in range(layers)]
    return View(randn(B, padding.shape[1], dim), padding, SHAPES, extent, 2 * randn(layers, B, queries, 3),
                random_boxes(layers, B, queries, g=g, dtype=dtype), (query, found), randn(layers, B, queries, dim),
                [(a, to_memory()) for a in among], randn(B, padding.shape[1], dim))


def scene(dims=(8, 8), layers=(2, 2), queries=(5, 6), counts=(2, 3, 0), extra=0, dense=False, dtype=torch.float32,
          seed=0):
    """student, teacher, targets, extras, complete. extra: queries that the teacher answers beside its own."""
    g = gen(seed)
    student = some_view(dims[0], layers[0], queries[0], counts, g, dense, dtype)
    teacher = some_view(dims[1], layers[1], queries[1] + extra, counts, g, dense, dtype)
    asked = some_view(dims[0], layers[0], queries[1] + extra, counts, g, dense, dtype)
    targets = [{"labels": torch.randint(3, (k,), generator=g), "boxes": random_boxes(k, g=g)} for k in counts]
    return student, teacher, targets, {"queries": asked._replace(memory=student.memory)}


def scene_for(name, **changes):
    return scene(**({"extra": 2} if name == "kd_detr" else {}) | changes)


def build(name, *dims, **options):
    return BASELINES[name](*(dims or (8, 8)), **OPTIONS.get(name, {}) | options)


def each_tensor(view):
    """All floating point tensors of a view."""
    for x in view if isinstance(view, (tuple, list)) else [view]:
        if isinstance(x, torch.Tensor):
            if x.is_floating_point():
                yield x
        elif isinstance(x, (tuple, list)):
            yield from each_tensor(x)


def total(losses):
    return sum(losses.values())


def alike(a, b):
    """Close by proportion alone: many default weights make a loss smaller than assert_close's tolerance."""
    assert_close(a, b, rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------------------------------------- all of them

@pytest.mark.parametrize("dims, layers", [((8, 8), (2, 2)), ((8, 12), (2, 3)), ((12, 8), (3, 2))], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["deformable", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_every_term_teaches_the_student_and_never_the_teacher(name, dims, layers, dense):
    """Two public codes have terms without a gradient: swapped arguments, and maps that pass through NumPy."""
    student, teacher, targets, extras = scene_for(name, dims=dims, layers=layers, dense=dense)
    mine = [*each_tensor(student), *each_tensor(extras["queries"])]
    mine = [x.requires_grad_() for x in {id(x): x for x in mine}.values()]
    for x in each_tensor(teacher):
        x.requires_grad_()
    method = build(name, *dims)
    losses = method(student, teacher, targets, extras)
    assert tuple(losses) == method.terms
    for term, value in losses.items():
        assert value.shape == () and value.dtype == torch.float32 and value > 0, term
        grads = torch.autograd.grad(value, mine, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads), term
    total(losses).backward()
    assert all(x.grad is None for x in each_tensor(teacher))
    if "queries" in method.needs:
        read = method.student_content(torch.randn(3, 4, dims[1], requires_grad=True))
        assert read.shape == (3, 4, dims[0])
        read.sum().backward()
    assert all(p.grad is not None for p in method.parameters())       # distributed training waits for every gradient
    assert bool(list(method.adapter.parameters())) == (dims[0] != dims[1] and method.copies_memory)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"mgd"}))        # MGD regenerates, so it never starts at 0
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    _, teacher, targets, _ = scene_for(name)
    options = {"kd_detr": dict(teacher_layers="twin")}.get(name, {})
    losses = build(name, **options)(teacher, teacher, targets, {"queries": teacher})
    for term, value in losses.items():
        assert value.abs() < 1e-6 or term.startswith("prior"), term   # detection losses have no such zero


@pytest.mark.parametrize("dense", [False, True], ids=["deformable", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_tokens_count_for_nothing_whatever_they_hold(name, dense):
    student, teacher, targets, extras = scene_for(name, dims=(8, 12), dense=dense)
    method = build(name, 8, 12)
    expected = method(student, teacher, targets, extras)

    def spoiled(view):
        hole = view.padding[..., None]
        return view._replace(memory=view.memory.masked_fill(hole, math.nan).requires_grad_(),
                             gradient=view.gradient.masked_fill(hole, math.nan))

    student, teacher = spoiled(student), spoiled(teacher)
    losses = method(student, teacher, targets, {"queries": spoiled(extras["queries"])})
    for term in expected:
        alike(losses[term], expected[term])
    if method.copies_memory:
        total(losses).backward()
        assert (student.memory.grad[student.padding] == 0).all() and student.memory.grad.isfinite().all()


@pytest.mark.parametrize("name", ["fitnets", "fgd", "mgd", "gkd"])
def test_an_image_in_a_padded_batch_is_the_image_alone(name):
    """FGD's and GKD's public masks drift in a padded batch, MGD's convolutions would see what is in the padding."""
    student, teacher, targets, _ = scene(counts=(2, 3), dims=(8, 12))
    method = build(name, 8, 12)
    with torch.no_grad():                                             # so that FGD's relation is more than the identity
        [p.normal_(generator=gen()) for p in method.parameters()]

    def alone(view, image):
        real = ~view.padding[image]
        shapes = SHAPES if image == 0 else [(height * 2 // 3, width * 3 // 4) for height, width in SHAPES]
        return View(view.memory[image][real][None], torch.zeros(1, real.sum(), dtype=torch.bool), shapes,
                    torch.ones(1, 2), gradient=view.gradient[image][real][None])

    both = method(student, teacher, targets)
    parts = [method(alone(student, i), alone(teacher, i), targets[i:i + 1]) for i in (0, 1)]
    share = (~student.padding).sum(1) / (~student.padding).sum() if name == "fitnets" else torch.tensor([.5, .5])
    for term in both:
        if term != "maps":                                            # a mean over each level's tokens
            alike(both[term], share[0] * parts[0][term] + share[1] * parts[1][term])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_images_twice_cost_what_they_cost_once(name):
    student, teacher, targets, extras = scene_for(name, counts=(2, 3, 1))

    def twice(x, dim=0):
        if isinstance(x, torch.Tensor):
            return torch.cat([x, x], dim)
        return type(x)(twice(y, dim) for y in x)

    def doubled(view):
        layers_first = ("logits", "boxes", "matches", "states")
        images_first = ("memory", "padding", "extent", "attention", "gradient")
        return view._replace(**{field: twice(getattr(view, field), 1) for field in layers_first},
                             **{field: twice(getattr(view, field)) for field in images_first})

    method = build(name)
    once = method(student, teacher, targets, extras)
    again = method(doubled(student), doubled(teacher), targets * 2, {"queries": doubled(extras["queries"])})
    for term in once:
        alike(again[term], once[term])


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 2, 0)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_without_objects_losses_are_finite_and_the_graph_intact(name, counts):
    student, teacher, targets, extras = scene_for(name, dims=(8, 12), counts=counts)
    mine = [x.requires_grad_() for view in (student, extras["queries"]) for x in (view.logits, view.boxes, view.memory)]
    method = build(name, 8, 12)
    losses = method(student, teacher, targets, extras)
    assert all(value.isfinite() and value.requires_grad for value in losses.values())
    total(losses).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in mine)
    assert all(p.grad is not None for part, p in method.named_parameters() if not part.startswith("student_reads"))
    if sum(counts) == 0 and name in ("hinton", "fgd", "gkd"):
        nothing = {"hinton": "cls", "fgd": "objects", "gkd": "memory"}[name]
        assert losses[nothing] == 0


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_the_float32_loss_of_the_rounded_values_also_under_autocast(name):
    student, teacher, targets, extras = scene_for(name, dims=(8, 12))
    method = build(name, 8, 12)

    def cast(x, f):
        if isinstance(x, torch.Tensor):
            return f(x) if x.is_floating_point() and x.ndim > 2 else x                         # not `extent`
        return type(x)(*(cast(y, f) for y in x)) if isinstance(x, View) else \
            type(x)(cast(y, f) for y in x) if isinstance(x, (tuple, list)) else x

    def losses(f):
        return method(cast(student, f), cast(teacher, f), targets, {"queries": cast(extras["queries"], f)})

    expected = losses(lambda x: x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        got = losses(lambda x: x.bfloat16())
    assert all(torch.equal(got[k], expected[k]) and got[k].dtype == torch.float32 for k in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_scales_its_term_and_no_other(name):
    args = scene_for(name)
    plain = build(name)(*args)
    options = {"fitnets": {"weight": "memory"}, "hinton": {"weight": "cls"}, "mgd": {"alpha": "memory"},
               "fgd": {"alpha": "objects", "beta": "background", "gamma": "attention", "lambda_global": "relation"},
               "gkd": {"alpha": "memory", "beta": "maps"},
               "kd_detr": {"cls_weight": "cls", "l1_weight": "l1", "giou_weight": "giou"},
               "detrdistill": {"memory": "memory", "prior_cls": "prior_cls", "prior_l1": "prior_l1",
                               "prior_giou": "prior_giou"},
               "d3etr": {"self_weight": "self", "cross_weight": "cross"}}[name]
    for option, term in options.items():
        default = BASELINES[name].__init__.__kwdefaults__[option]
        heavy = build(name, **{option: 3 * default})(*args)
        alike(heavy.pop(term), 3 * plain[term])
        assert all(torch.equal(value, plain[k]) for k, value in heavy.items())


def test_whole_parts_have_weights_of_their_own():
    args = scene()
    plain, logits, prior = (DETRDistill(8, 8, **o)(*args) for o in ({}, dict(logits=2.), dict(prior=2.)))
    for term in plain:
        assert_close(logits[term], plain[term] * (2 if term in ("cls", "l1", "giou") else 1))
        assert_close(prior[term], plain[term] * (2 if term.startswith("prior") else 1))
    both, adaptive, fixed = (D3ETR(8, 8, **o)(*args) for o in ({}, dict(fixed=0.), dict(adaptive=0.)))
    for term in both:
        assert adaptive[term] > 0 and fixed[term] > 0
        assert_close(adaptive[term] + fixed[term], both[term])


def test_making_a_method_draws_nothing_and_gives_the_same_one_again(monkeypatch):
    before = torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    for name in NAMES:
        first, second = build(name, 8, 12), build(name, 8, 12)
        other = build(name, 8, 12, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
        assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters())) == (name != "hinton")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named(name):
    student, teacher, targets, extras = scene_for(name)
    method = build(name)
    fields = {"detections": "logits", "matches": "matches", "states": "states", "attention": "attention",
              "gradient": "gradient"}
    for need in method.needs:
        without = (student, teacher, targets, {}) if need == "queries" else \
            (student, teacher._replace(**{fields[need]: None}), targets, extras)
        with pytest.raises(ValueError, match=f"{type(method).__name__} needs {need}:"):
            method(*without)
    bare = teacher._replace(**{field: None for need, field in fields.items() if need not in method.needs})
    plain = student._replace(states=None, gradient=None)
    plain = plain if "matches" in method.needs else plain._replace(matches=None)
    plain = plain if "attention" in method.needs else plain._replace(attention=None)
    with_less, with_all = (method(*x, targets, extras) for x in ((plain, bare), (student, teacher)))
    assert all(torch.equal(with_less[k], with_all[k]) for k in with_all)          # what is not declared is not used


@pytest.mark.parametrize("name, bad", [
    ("hinton", dict(temperature=0.)), ("hinton", dict(classes="sigmoid")), ("fgd", dict(temperature=-1.)),
    ("mgd", dict(ratio=1.1)), ("gkd", dict(temperature=0.)), ("kd_detr", dict(temperature=0.)),
    ("kd_detr", dict(general=0, specific=False)), ("kd_detr", dict(general=-1)),
    ("kd_detr", dict(teacher_layers="first")), ("detrdistill", dict(top=-1))], ids=str)
def test_options_out_of_range_are_refused_in_one_line(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))) as error:
        build(name, **bad)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_explained():
    student, teacher, targets, _ = scene(dims=(8, 12))
    with pytest.raises(ValueError, match="same images at the same strides"):
        FitNets(8, 12)(student._replace(memory=student.memory[:, 1:], padding=student.padding[:, 1:]), teacher, targets)
    with pytest.raises(ValueError, match="and 2 targets"):
        FitNets(8, 12)(student, teacher, targets[:2])
    with pytest.raises(ValueError, match="of 8 and 12 channels"):
        FitNets(8, 8)(student, teacher, targets)
    with pytest.raises(ValueError, match="levels=1, but the memory has 2"):
        FGD(8, 12)(student, teacher, targets)
    with pytest.raises(ValueError, match="memory of 60 tokens"):
        FitNets(8, 12)(student._replace(shapes=[(6, 8)]), teacher, targets)
    student, teacher, targets, extras = scene()
    with pytest.raises(ValueError, match="not finite"):
        D3ETR(8, 8)(student._replace(logits=student.logits * math.nan), teacher, targets, extras)


def test_the_last_student_layer_learns_from_the_last_teacher_layer():
    for L_s, L_t, expected in ((6, 6, [1, 2, 3, 4, 5, 6]), (3, 6, [2, 4, 6]), (2, 3, [2, 3]), (1, 6, [6]),
                               (6, 3, [1, 1, 2, 2, 2, 3]), (6, 1, [1, 1, 1, 1, 1, 1])):
        assert baselines._twins(range(L_s), range(L_t)) == [i - 1 for i in expected]


def test_all_but_the_matching_runs_on_a_gpu_without_a_gpu():
    """Fake CUDA tensors find host constants on the wrong device, boolean indexing and .item()."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    for name in sorted(set(NAMES) - {"detrdistill", "d3etr"}):        # they go to the host to match
        with FakeTensorMode(allow_non_fake_inputs=True):
            student, teacher, targets, extras = scene_for(name, dims=(8, 12))

            def to_cuda(x):
                if isinstance(x, torch.Tensor):
                    return x.cuda()
                return type(x)(*map(to_cuda, x)) if isinstance(x, View) else \
                    type(x)(map(to_cuda, x)) if isinstance(x, (tuple, list)) else x

            with torch.device("cuda"):
                method = build(name, 8, 12)
            targets = [{k: v.cuda() for k, v in t.items()} for t in targets]
            losses = method(to_cuda(student), to_cuda(teacher), targets, {"queries": to_cuda(extras["queries"])})
            assert all(v.device.type == "cuda" and v.shape == () for v in losses.values())
            learned = models.Queries(torch.randn(3, 6, 12, device="cuda"), torch.rand(3, 6, 4, device="cuda"))
            assert all(x is None or x.device.type == "cuda" for x in method.queries(learned))


# ------------------------------------------------------------------------------------------------------- of the memory

def one_map(student, teacher, height, width, gradient=None):
    """Views of one image of one level from lists of numbers, one channel or more a token."""
    make = lambda x: View(torch.tensor(x).view(1, height * width, -1), torch.zeros(1, height * width, dtype=torch.bool),
                          [(height, width)], torch.ones(1, 2))
    return make(student), make(teacher)._replace(gradient=None if gradient is None else make(gradient).memory)


def test_fitnets_by_hand():
    student, teacher = one_map([1., 2., 3., 9.], [2., 2., 1., 0.], 2, 2)
    student.padding[0, 3] = True                                      # squared errors 1, 0, 4
    assert_close(FitNets(1, 1, weight=3.)(student, teacher, [{"boxes": torch.zeros(0, 4)}])["memory"], torch.tensor(5.))


def test_fitnets_is_the_memory_loss_without_its_masks():
    """By the real tokens T and the channels D: weight / (T D) of one is alpha lambda_mem / B of the other."""
    student, teacher, targets, _ = scene()
    tokens, channels, images = int((~student.padding).sum()), student.memory.shape[2], len(targets)
    plain = memory_loss(student.memory, teacher.memory, [t["boxes"] for t in targets], SHAPES, student.padding,
                        alpha=images / (tokens * channels), location=False, scale=False)
    assert_close(FitNets(8, 8, weight=3.)(student, teacher, targets)["memory"], 3 * plain)


def loops(view, other):
    """(image, level, height, width, [token index of each real cell])."""
    for b in range(len(view.memory)):
        start = 0
        for level, (height, width) in enumerate(view.shapes):
            cells = [(y, x) for y in range(height) for x in range(width) if not view.padding[b, start + y * width + x]]
            yield b, level, height, width, start, cells
            start += height * width


def softmax(values):
    top = max(values)
    total = sum(math.exp(v - top) for v in values)
    return [math.exp(v - top) / total for v in values]


def corners_of(target, extent):
    """Corners of an image's boxes, in fractions of the padded image."""
    (ew, eh) = extent.tolist()
    return [((cx - w / 2) * ew, (cy - h / 2) * eh, (cx + w / 2) * ew, (cy + h / 2) * eh)
            for cx, cy, w, h in target["boxes"].tolist()]


def slow_fgd(student, teacher, targets, t=.5, alpha=1e-3, beta=5e-4, gamma=1e-3):
    """Objects, background and attention as loops in Python floats."""
    sums = dict(objects=0., background=0., attention=0.)
    for b, _, H, W, start, cells in loops(student, teacher):
        s, u = ([m[b, start + y * W + x].tolist() for y, x in cells] for m in (student.memory, teacher.memory))
        D, N = len(s[0]), len(cells)

        def attention(tokens):
            near = softmax([sum(map(abs, row)) / D / t for row in tokens])
            along = softmax([sum(abs(row[c]) for row in tokens) / N / t for c in range(D)])
            return [N * v for v in near], [D * v for v in along]

        (near_s, along_s), (near_t, along_t) = attention(s), attention(u)
        M = [0.] * N
        for x0, y0, x1, y1 in corners_of(targets[b], student.extent[b]):
            left, top, right, down = math.floor(x0 * W), math.floor(y0 * H), math.ceil(x1 * W), math.ceil(y1 * H)
            for i, (y, x) in enumerate(cells):
                if left <= x <= right and top <= y <= down:
                    M[i] = max(M[i], 1 / (right - left + 1) / (down - top + 1))
        empty = M.count(0)
        for i in range(N):
            error = near_t[i] * sum(along_t[c] * (s[i][c] - u[i][c]) ** 2 for c in range(D))
            sums["objects"] += M[i] * error
            sums["background"] += (1 / empty if M[i] == 0 else 0) * error
            sums["attention"] += abs(near_s[i] - near_t[i])
        sums["attention"] += sum(abs(a - c) for a, c in zip(along_s, along_t))
    B = len(targets)
    return dict(objects=alpha * sums["objects"] / B, background=beta * sums["background"] / B,
                attention=gamma * sums["attention"] / B)


def test_fgd_equals_its_slow_twin():
    student, teacher, targets, _ = scene()
    losses = FGD(8, 8, levels=2)(student, teacher, targets)
    for term, expected in slow_fgd(student, teacher, targets).items():
        assert losses[term].item() == pytest.approx(expected, rel=1e-4), term


def test_fgd_boxes_include_the_cell_behind_their_last_and_the_smaller_wins():
    boxes = torch.tensor([[[2.5, 1.5, 3, 1], [2, 1.5, .2, .2]]]) / torch.tensor([8, 4, 8, 4])    # x 1..4, y 1..2
    objects, background = FGD.masks(boxes, torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2),
                                    torch.ones(1, 4, 8, dtype=torch.bool))
    expected = torch.zeros(4, 8)
    expected[1:3, 1:5] = 1 / 8
    expected[1:3, 1:4] = 1 / 6                                        # 1.9..2.1 touches cells 1 and 2, and takes 3
    assert_close(objects.view(4, 8), expected)
    assert_close(background.view(4, 8), (expected == 0) / 24)


def test_float32_does_not_push_an_aligned_box_out_of_its_cells():
    for n in (7, 13, 42):
        edges = torch.tensor([(first, end) for first in range(n) for end in range(first + 1, n + 1)])
        x0, x1 = (edges.T / n)[:, None]                               # (1, K) each
        boxes = torch.stack([(x0 + x1) / 2, (x0 + x1) / 2, x1 - x0, x1 - x0], 2)
        cells = baselines._cells(boxes, torch.ones(1, 2), torch.ones(1, n, n))
        assert all(torch.equal(x[0, :, 0].long(), edges[:, i]) for x, i in zip(cells, (0, 0, 1, 1)))


def test_fgd_relation_equals_convolutions_and_starts_as_a_plain_difference():
    student, teacher, targets, _ = scene(counts=(0, 0))
    student, teacher = (x._replace(memory=x.memory[:1, :48], padding=x.padding[:1, :48], shapes=SHAPES[:1],
                                   extent=x.extent[:1], gradient=None) for x in (student, teacher))
    method = FGD(8, 8, lambda_global=1.)
    plain = (student.memory - teacher.memory).square().sum()
    assert_close(method(student, teacher, targets[:1])["relation"], plain)
    with torch.no_grad():
        [p.normal_(generator=gen()) for p in method.parameters()]

    def related(block, tokens):                                       # as its authors write it, on a map
        look, add = nn.Conv2d(8, 1, 1), nn.Sequential(nn.Conv2d(8, 4, 1), nn.LayerNorm([4, 1, 1]), nn.ReLU(),
                                                      nn.Conv2d(4, 8, 1))
        for layer, own in ((look, block.look), (add[0], block.add[0]), (add[1], block.add[1]), (add[3], block.add[3])):
            layer.weight.data, layer.bias.data = own.weight.view_as(layer.weight), own.bias.view_as(layer.bias)
        x = tokens.transpose(1, 2).unflatten(2, SHAPES[0])            # (1, 8, 6, 8)
        share = look(x).flatten(2).softmax(2)                         # (1, 1, 48)
        return x + add((x.flatten(2) * share).sum(2)[..., None, None])

    expected = (related(method.relate_teacher[0], teacher.memory) - related(method.relate_student[0], student.memory))
    assert_close(method(student, teacher, targets[:1])["relation"], expected.square().sum())


def test_mgd_equals_convolutions_of_the_masked_map():
    student, teacher, targets, _ = scene(counts=(1, 1), dims=(8, 12))
    student, teacher = (x._replace(memory=x.memory[:, :48], padding=x.padding[:, :48] & False, shapes=SHAPES[:1],
                                   gradient=None) for x in (student, teacher))
    method = MGD(8, 12, alpha=1., ratio=.65)
    maps = method.adapter(student.memory).transpose(1, 2).unflatten(2, (6, 8))
    mask = (torch.rand(2, 48, generator=gen(3)) >= .65).view(2, 1, 6, 8)
    generate = nn.Sequential(method.first[0], nn.ReLU(), method.second[0])
    expected = (generate(maps * mask) - teacher.memory.transpose(1, 2).unflatten(2, (6, 8))).square().sum() / 2
    before = torch.random.get_rng_state()
    assert_close(method(student, teacher, targets, {"generator": gen(3)})["memory"], expected)
    assert torch.equal(before, torch.random.get_rng_state())          # a student's denoising noise stays as it was


def test_mgd_with_everything_masked_cannot_see_the_student():
    student, teacher, targets, _ = scene()
    method = build("mgd", ratio=1.)
    other = student._replace(memory=-student.memory)
    assert torch.equal(method(student, teacher, targets)["memory"], method(other, teacher, targets)["memory"])


def slow_gkd(student, teacher, targets, t=.5, alpha=1e-3, beta=.5, boxes=True):
    memory = maps = 0.
    per_level = {}
    for b, level, H, W, start, cells in loops(student, teacher):
        s, u, g = ([m[b, start + y * W + x].tolist() for y, x in cells]
                   for m in (student.memory, teacher.memory, teacher.gradient))
        D, N = len(s[0]), len(cells)

        def scaled(values):
            return [(v - min(values)) / (max(values) - min(values)) for v in values]

        i_s, i_t = (scaled([sum(abs(a * c) for a, c in zip(row, grad)) for row, grad in zip(f, g)]) for f in (s, u))
        channels = scaled([sum(abs(u[i][c] * g[i][c]) for i in range(N)) for c in range(D)])
        near, along = softmax([v / t for v in i_t]), softmax([v / t for v in channels])
        G = [0. if boxes else 1 / N] * N
        for x0, y0, x1, y1 in corners_of(targets[b], student.extent[b]) if boxes else []:
            x0, y0, x1, y1 = math.floor(x0 * W), math.floor(y0 * H), math.ceil(x1 * W), math.ceil(y1 * H)
            w, h = x1 - x0, y1 - y0
            for i, (y, x) in enumerate(cells):
                rx, ry = (x + .5 - (x0 + x1) / 2) / w, (y + .5 - (y0 + y1) / 2) / h
                if abs(rx) < 1 and abs(ry) < 1:
                    inside = x0 <= x < x1 and y0 <= y < y1
                    G[i] = max(G[i], (1 if inside else math.exp(-(rx ** 2 + ry ** 2) / 2)) / (4 * w * h))
        for i in range(N):
            memory += G[i] * N * near[i] * sum(D * along[c] * (s[i][c] - u[i][c]) ** 2 for c in range(D))
            per_level.setdefault(level, []).append(abs(i_s[i] - i_t[i]))
    maps = sum(sum(values) / len(values) for values in per_level.values())
    return {"memory": alpha * memory / len(targets), "maps": beta * maps}


@pytest.mark.parametrize("boxes", [True, False])
def test_gkd_equals_its_slow_twin(boxes):
    student, teacher, targets, _ = scene()
    losses = GKD(8, 8, boxes=boxes)(student, teacher, targets)
    for term, expected in slow_gkd(student, teacher, targets, boxes=boxes).items():
        assert losses[term].item() == pytest.approx(expected, rel=1e-4), term


def test_gkd_looks_where_the_gradient_is_however_small():
    # Two tokens, one wrong in each. The gradient is at the second: i = 0, 1; softmax(0, 2) = 0.119, 0.881, times 2.
    car = torch.zeros(1, dtype=torch.long)
    for size in (1., 1e-12):
        args = one_map([1., 1.], [2., 2.], 1, 2, [0., size])
        whole = torch.tensor([[.5, .5, 1, 1]])                        # a box of 2 x 1 cells: G = 1 / 8 in both
        loss = GKD(1, 1, alpha=1.)(*args, [{"labels": car, "boxes": whole}])
        assert_close(loss["memory"], torch.tensor(2 * 1 / 8))
        half = torch.tensor([[.75, .5, .5, 1]])                       # the second cell, its skirt reaches no centre
        loss = GKD(1, 1, alpha=1.)(*args, [{"labels": car, "boxes": half}])
        assert_close(loss["memory"], torch.tensor(2 * math.exp(2) / (1 + math.exp(2)) / 4))
        assert loss["maps"] == 0                                      # both models' maps are 0, 1


def test_gkd_boxes_are_soft_around_and_stay_where_the_box_is():
    boxes = torch.tensor([[[6, 1, 2, 2]]]) / torch.tensor([8, 4, 8, 4])                      # cells x 5..6, y 0..1
    mask = GKD.masks(boxes, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2), torch.ones(1, 4, 8, dtype=torch.bool))
    mask = 16 * mask.view(4, 8)
    assert (mask[:2, 5:7] == 1).all() and (mask[:, :4] == 0).all() and (mask[3] == 0).all()
    assert_close(mask[0, 4], torch.tensor(math.exp(-(.75 ** 2 + .25 ** 2) / 2)))             # 1.5 and 0.5 of 2 cells
    assert_close(mask[2, 7], torch.tensor(math.exp(-(.75 ** 2 + .75 ** 2) / 2)))


# ------------------------------------------------------------------------------------------------------ of the decoder

def answers(logits, boxes=None, **fields):
    """A View of one image, one layer, from (Q, C) logits and (Q, 4) boxes; the memory has one token."""
    logits = torch.as_tensor(logits)
    boxes = torch.tensor([.5, .5, .2, .2]).expand(len(logits), 4) if boxes is None else torch.as_tensor(boxes)
    return View(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.bool), [(1, 1)], torch.ones(1, 2),
                logits[None, None].float(), boxes[None, None].float(), **fields)


def found(*queries):
    return torch.tensor([[queries]]), torch.ones(1, 1, len(queries), dtype=torch.bool)


def test_hinton_by_hand():
    # Object 0 is query 1 of the student (p = 3/4 at t = 1, logit ln 3) and query 0 of the teacher (p = 1/2); object 1
    # agrees. Bernoulli KL = ln(2/3)/2 + ln(2)/2 = ln(4/3)/2, mean over two pairs. t = 4, logits x 4: 16 times that.
    student = answers([[5.], [math.log(3)], [-9.]], matches=found(1, 0))
    teacher = answers([[0.], [5.]], matches=found(0, 1))
    targets = [{"boxes": torch.rand(2, 4), "labels": torch.zeros(2).long()}]
    assert_close(Hinton(2, 2, temperature=1.)(student, teacher, targets)["cls"], torch.tensor(math.log(4 / 3) / 4))
    warm = student._replace(logits=4 * student.logits), teacher._replace(logits=4 * teacher.logits)
    assert_close(Hinton(2, 2, weight=2.)(*warm, targets)["cls"], torch.tensor(2 * 16 * math.log(4 / 3) / 4))
    # As one distribution: logits (ln 3, 0) = (3/4, 1/4) and (0, 0) = (1/2, 1/2) give the same number.
    student = answers([[math.log(3), 0.]], matches=found(0))
    teacher = answers([[0., 0.]], matches=found(0))
    soft = Hinton(2, 2, temperature=1., classes="softmax")(student, teacher, targets[:1])["cls"]
    assert_close(soft, torch.tensor(math.log(4 / 3) / 2))


def test_hinton_ignores_objects_that_only_one_of_them_found():
    student, teacher, targets, _ = scene()
    lost = teacher.matches[1].clone()
    lost[:, 1, 2] = False                                             # object 2 of image 1
    query = teacher.matches[0].clone()
    query[:, 1, 2] = 0
    method = Hinton(8, 8)
    a = method(student, teacher._replace(matches=(teacher.matches[0], lost)), targets)["cls"]
    b = method(student, teacher._replace(matches=(query, lost)), targets)["cls"]
    assert torch.equal(a, b) and not torch.equal(a, method(student, teacher, targets)["cls"])


def slow_giou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_kd_detr(asked, teacher, general, twins, T=10.):
    L, B, Q, C = asked.logits.shape
    total = [0., 0., 0.]
    for i in range(L):
        j = (max(round((i + 1) * len(teacher.logits) / L), 1) if twins else len(teacher.logits)) - 1
        for group in (range(Q - general), range(Q - general, Q)):
            cls = l1 = giou = weights = 0.
            for b, q in itertools.product(range(B), group):
                w = max(map(sigmoid, teacher.logits[-1, b, q].tolist()))
                p, r = (softmax([v / T for v in x[b, q].tolist()]) for x in (teacher.logits[j], asked.logits[i]))
                cls += w * T ** 2 * sum(u * math.log(u / v) for u, v in zip(p, r)) / C
                s, t = asked.boxes[i, b, q].tolist(), teacher.boxes[j, b, q].tolist()
                l1 += w * sum(abs(u - v) for u, v in zip(s, t)) / 4
                giou += w * (1 - slow_giou(s, t))
                weights += w
            total = [a + b for a, b in zip(total, (cls / B, l1 / max(weights, 1e-6), giou / max(weights, 1e-6)))]
    return dict(cls=total[0], l1=5 * total[1], giou=2 * total[2])


@pytest.mark.parametrize("layers", [(2, 2), (2, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("general, twins", [(2, False), (2, True), (0, False), (8, True)])
def test_kd_detr_equals_its_slow_twin(layers, general, twins):
    student, teacher, targets, extras = scene(layers=layers, extra=2, dtype=torch.float64)
    method = KDDETR(8, 8, general=general, specific=general < 8, teacher_layers="twin" if twins else "last")
    losses = method(student, teacher, targets, extras)
    for term, expected in slow_kd_detr(extras["queries"], teacher, general, twins).items():
        assert losses[term].item() == pytest.approx(expected, rel=1e-9), term


def test_kd_detr_asks_the_teachers_queries_and_random_ones_that_do_not_see_one_another():
    learned = models.Queries(torch.randn(2, 5, 8, generator=gen()), random_boxes(2, 5, g=gen()))
    content, boxes, attend, valid, position = KDDETR(8, 8, general=4000).queries(learned, gen(1))
    assert torch.equal(content[:, :5], learned[0]) and torch.equal(boxes[:, :5], learned[1]) and position is None
    assert valid.shape == (2, 4005) and valid.all()
    assert attend[:, :5, :5].all() and attend[:, 5:, 5:].all() and not attend[:, :5, 5:].any()
    assert not attend[:, 5:, :5].any()
    assert all((row == learned[0][0]).all(1).any() for row in content[0, 5:50])              # contents of its own
    assert torch.equal(boxes[0, 5:], boxes[1, 5:])                                           # the same for all images
    normal = (boxes[0, 5:] / (1 - boxes[0, 5:])).log()                                       # sigmoid of normal numbers
    assert normal.mean().abs() < .05 and (normal.std() - 1).abs() < .05
    again, other = (KDDETR(8, 8, general=4).queries(learned, gen(seed))[1] for seed in (1, 2))
    assert torch.equal(again, KDDETR(8, 8, general=4).queries(learned, gen(1))[1]) and not torch.equal(again, other)
    alone = KDDETR(8, 8, general=4, specific=False).queries(learned, gen(1))
    assert alone[0].shape == (2, 4, 8) and alone[2].all()
    points = learned._replace(boxes=learned.boxes[..., :2], position=learned.content + 1)    # one-stage Deformable DETR
    content, boxes, *_, position = KDDETR(8, 8, general=4).queries(points, gen(1))
    assert boxes.shape == (2, 9, 2) and torch.equal(position, content + 1)
    from_boxes = learned._replace(position=learned.content + 1)       # two stages: each model makes its own positions
    assert all(method.queries(from_boxes)[4] is None for method in (Hinton(8, 8), KDDETR(8, 8)))


DETECTORS = [("dab_detr", dict(num_patterns=2)), ("deformable_detr", dict(feature_levels=2, points=2)),
             ("deformable_detr", dict(feature_levels=2, points=2, box_refine=True, two_stage=True)),
             ("dino", dict(feature_levels=2, points=2))]


@pytest.mark.parametrize("name, options", DETECTORS, ids=["dab", "deformable", "two stages", "dino"])
def test_every_detector_answers_its_own_queries_as_it_detects(name, options):
    """So the teacher's answers to `queries` are its detections, which DETRDistill, D3ETR and Hinton rely on."""
    torch.manual_seed(0)
    model = models.build(name, 3, backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=16,
                         heads=2, ffn_dim=16, encoder_layers=1, decoder_layers=2, num_queries=5, dropout=0., **options)
    model.eval()
    images, padding = torch.randn(2, 3, 64, 96, generator=gen()), torch.zeros(2, 64, 96, dtype=torch.bool)
    with torch.no_grad():
        expected = model(images, padding).detections
        memory = model.encode(images, padding)
        learned = model.learned_queries(memory)[0]
        for method in (Hinton(16, 16), KDDETR(16, 16, general=4)):
            content, boxes, attend, _, position = method.queries(learned, gen())
            found = model.decode(memory, content, boxes, attend, position)
            own = expected.logits.shape[2]
            assert_close((found.logits[:, :, :own], found.boxes[:, :, :own]), (expected.logits, expected.boxes))


def brute_force(cost):
    """The cheapest way to give each of the fewer (rows or columns) one of the others."""
    Q_s, Q_t = cost.shape
    few, many = sorted((Q_s, Q_t))
    get = (lambda i, j: cost[i, j]) if Q_s <= Q_t else (lambda i, j: cost[j, i])
    return min(sum(get(i, j) for i, j in enumerate(order)).item() for order in itertools.permutations(range(many), few))


@pytest.mark.parametrize("queries", [(4, 4), (3, 5), (5, 3)], ids=str)
def test_predictions_are_matched_at_the_least_cost(queries):
    student, teacher, *_ = scene(queries=queries, counts=(1, 1), dtype=torch.float64)
    mine, theirs = baselines.match_predictions(student.logits, student.boxes, teacher.logits, teacher.boxes, (1, 5, 2))
    for l, b in itertools.product(range(2), range(2)):
        cost = torch.zeros(queries, dtype=torch.float64)
        for i, j in itertools.product(*map(range, queries)):
            entropy = -sum(sigmoid(t) * math.log(sigmoid(s)) + (1 - sigmoid(t)) * math.log(1 - sigmoid(s)) for s, t in
                           zip(student.logits[l, b, i].tolist(), teacher.logits[l, b, j].tolist()))
            s, t = student.boxes[l, b, i].tolist(), teacher.boxes[l, b, j].tolist()
            cost[i, j] = entropy + 5 * sum(abs(u - v) for u, v in zip(s, t)) + 2 * (1 - slow_giou(s, t))
        pairs = list(zip(mine[l, b].tolist(), theirs[l, b].tolist()))
        assert len(pairs) == min(queries) and all(len(set(x)) == len(x) for x in zip(*pairs))
        assert sum(cost[i, j] for i, j in pairs).item() == pytest.approx(brute_force(cost))


def slow_answers(s_logits, s_boxes, t_logits, t_boxes, pairs):
    """KL, L1, 1 - GIoU: the mean over all pairs (image, mine, theirs) of one layer."""
    sums = [0., 0., 0.]
    for b, i, j in pairs:
        for s, t in zip(s_logits[b, i].tolist(), t_logits[b, j].tolist()):
            for sign in (1, -1):
                sums[0] += sigmoid(sign * t) * math.log(sigmoid(sign * t) / sigmoid(sign * s))
        s, t = s_boxes[b, i].tolist(), t_boxes[b, j].tolist()
        sums[1] += sum(abs(u - v) for u, v in zip(s, t))
        sums[2] += 1 - slow_giou(s, t)
    return [x / len(pairs) for x in sums]


@pytest.mark.parametrize("top", [0, 2])
def test_detrdistill_compares_matched_answers(top):
    student, teacher, targets, extras = scene(layers=(2, 3), dtype=torch.float64)
    losses = DETRDistill(8, 8, top=top)(student, teacher, targets, extras)
    expected = [0., 0., 0.]
    for i, j in ((0, 1), (1, 2)):                                     # layers
        logits, boxes = teacher.logits[j], teacher.boxes[j]
        if top:
            keep = logits.amax(2).argsort(1, descending=True)[:, :top]
            logits, boxes = (torch.stack([x[b, keep[b]] for b in range(3)]) for x in (logits, boxes))
        args = student.logits[i], student.boxes[i], logits, boxes
        mine, theirs = baselines.match_predictions(*(x[None] for x in args), (1., 5., 2.))
        assert mine.shape == (1, 3, top or 5)
        pairs = [(b, *p) for b in range(3) for p in zip(mine[0, b].tolist(), theirs[0, b].tolist())]
        expected = [x + y for x, y in zip(expected, slow_answers(*args, pairs))]
    for term, weight, value in zip(("cls", "l1", "giou"), (1, 5, 2), expected):
        assert losses[term].item() == pytest.approx(weight * value, rel=1e-9)


def slow_iou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def slow_target_aware(student, teacher, targets):
    total = 0.
    counts = {}
    for b, level, H, W, start, cells in loops(student, teacher):
        counts[level] = counts.get(level, 0) + len(cells)
    for b, level, H, W, start, cells in loops(student, teacher):
        norm = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]
        for l in range(len(teacher.logits)):
            mask = []
            for y, x in cells:
                token = norm(teacher.memory[b, start + y * W + x].tolist())
                value = 0.
                for q in range(teacher.logits.shape[2]):
                    quality = max(map(sigmoid, teacher.logits[l, b, q].tolist()))
                    truth = targets[b]["boxes"].tolist()
                    if truth:
                        quality *= max(slow_iou(teacher.boxes[l, b, q].tolist(), box) for box in truth)
                    value += quality * sum(u * v for u, v in zip(norm(teacher.states[l, b, q].tolist()), token))
                mask.append(max(value, .01))
            for m, (y, x) in zip(mask, cells):
                s, t = (v.memory[b, start + y * W + x].tolist() for v in (student, teacher))
                error = sum((u - v) ** 2 for u, v in zip(s, t)) / len(s)
                total += (m / max(mask)) ** 2 * error / counts[level]
    return total


def test_detrdistill_features_equal_their_slow_twin():
    student, teacher, targets, extras = scene(layers=(2, 3), dtype=torch.float64)
    loss = DETRDistill(8, 8)(student, teacher, targets, extras)["memory"]
    assert loss.item() == pytest.approx(slow_target_aware(student, teacher, targets), rel=1e-6)


def test_detrdistill_prior_is_the_detection_loss_with_the_teachers_assignment():
    """Against the losses that the detectors are trained with; the public code forgets to hand the assignment over."""
    student, teacher, targets, extras = scene(layers=(2, 3))
    losses = DETRDistill(8, 8)(student, teacher, targets, extras)
    asked, wanted = extras["queries"], criterion.pad_targets(targets)
    query, matched = (x[[1, 2]] for x in teacher.matches)
    expected = criterion.set_losses(asked.logits, asked.boxes, wanted, query, matched, 5.)
    for term, weight, value in zip(("prior_cls", "prior_l1", "prior_giou"), (2, 5, 2), expected):
        assert_close(losses[term], weight * value.sum())
    other = teacher._replace(matches=(teacher.matches[0].flip(2), teacher.matches[1]))       # costs something else
    assert not torch.equal(DETRDistill(8, 8)(student, other, targets, extras)["prior_l1"], losses["prior_l1"])


@pytest.mark.parametrize("queries, dense", [((5, 6), True), ((6, 5), True), ((5, 6), False)], ids=str)
def test_d3etr_compares_attention_in_the_order_of_the_pairs(queries, dense):
    student, teacher, targets, extras = scene(layers=(2, 3), queries=queries, dense=dense, dtype=torch.float64)
    losses = D3ETR(8, 8)(student, teacher, targets, extras)
    mine, theirs = baselines.match_predictions(student.logits, student.boxes, teacher.logits[[1, 2]],
                                               teacher.boxes[[1, 2]], (1., 5., 2.))
    expected = {term: 0. for term in losses}
    for view, adaptive in ((student, True), (extras["queries"], False)):
        for i, j in ((0, 1), (1, 2)):                                 # layers
            pairs = [list(zip(mine[i, b].tolist(), theirs[i, b].tolist())) if adaptive else
                     [(q, q) for q in range(queries[1])] for b in range(3)]
            flat = [(b, *p) for b in range(3) for p in pairs[b]]
            for term, value in zip(("cls", "l1", "giou"), slow_answers(view.logits[i], view.boxes[i], teacher.logits[j],
                                                                       teacher.boxes[j], flat)):
                expected[term] += {"cls": 1, "l1": 5, "giou": 2}[term] * value
            (among_s, across_s), (among_t, across_t) = (
                (among.mean(1), baselines.attention_map(across, SHAPES)) for among, across in
                (view.attention[i], teacher.attention[j]))
            for b, q, p in flat:
                square = sum((among_s[b, q, k] - among_t[b, p, m]) ** 2 for k, m in pairs[b])
                expected["self"] += square.item() / len(flat)
                real = ~student.padding[b]                            # sampling points may fall into padding
                expected["cross"] += (across_s[b, q] - across_t[b, p])[real].square().sum().item() / len(flat)
    for term in losses:
        assert losses[term].item() == pytest.approx(expected[term], rel=1e-9), term


def test_deformable_attention_as_a_map_gives_the_sampled_mean():
    """What deformable attention computes is the map's weighted sum of values; beyond the map there is nothing."""
    g = gen()
    points = 1.4 * torch.rand(2, 5, 4, 2, 3, 2, generator=g, dtype=torch.float64) - .2
    weights = torch.rand(2, 5, 4, 2, 3, generator=g, dtype=torch.float64)
    value = torch.randn(2, 60, 1, 7, generator=g, dtype=torch.float64).expand(-1, -1, 4, -1)         # in every head
    sampled = attention.deformable_sample(value, SHAPES, points, weights).unflatten(2, (4, 7)).mean(2)     # (2, 5, 7)
    attended = baselines.attention_map((points, weights), SHAPES)
    assert_close(attended @ value[:, :, 0], sampled)
    dense = torch.rand(2, 4, 5, 60, generator=g)
    assert torch.equal(baselines.attention_map(dense, SHAPES), dense.mean(1))


def test_the_map_of_deformable_attention_moves_with_points_and_weights():
    g = gen()
    points = torch.rand(1, 2, 2, 2, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    weights = torch.rand(1, 2, 2, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    look = torch.randn(60, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: baselines.attention_map(x, SHAPES) @ look, (points, weights))


def test_giou_distance_of_tiny_and_empty_boxes():
    tiny = torch.tensor([.5, .5, 1e-3, 1e-3])
    moved = tiny + torch.tensor([5e-4, 0, 0, 0])                      # half over the other: IoU 1/3, hull = union
    point, line = torch.tensor([[.5, .5, 0, 0], [.2, .5, 0, .3]])
    pairs = [(tiny, moved, 2 / 3), (point, point, 0), (line, line, 0), (tiny, tiny, 0), (tiny, point, 1)]
    for a, b, expected in pairs:
        a = a.clone().requires_grad_()
        distance = baselines.giou_distance(a, b)
        assert distance.item() == pytest.approx(expected, abs=2e-4)
        distance.backward()
        assert a.grad.isfinite().all()


def test_a_decode_that_fails_leaves_no_hook():
    model = models.build("dino", 3, backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=32,
                         heads=4, ffn_dim=48, encoder_layers=1, decoder_layers=2, num_queries=6)
    with pytest.raises(KeyError), baselines.decoder_states(model, True):
        raise KeyError
    assert not any(layer._forward_hooks for layer in model.decoder.layers)


@pytest.mark.parametrize("name, terms", [("fitnets", ["memory"]), ("hinton", ["cls"]), ("gkd", ["maps"]),
                                         ("kd_detr", ["l1", "giou"]), ("detrdistill", ["memory", "prior_cls", "prior_l1", "prior_giou"])])
def test_counts_are_those_of_all_processes(name, terms, monkeypatch):
    """Where the mean over processes is three times this one's count, a mean is a third, and what is over B stays."""
    args = scene_for(name)
    alone = build(name)(*args)
    monkeypatch.setattr(baselines, "mean_over_processes", lambda count, least=1.: (3 * count).clamp(min=least))
    for term, value in build(name)(*args).items():
        alike(value, alone[term] / (3 if term in terms else 1))


class Attentive(baselines.Baseline):
    """A method that wants attention of both, and asks no queries."""
    needs, terms = ("attention",), ("seen",)

    def losses(self, student, teacher, targets, extras):
        assert extras["queries"] is None
        return {"seen": sum(among.sum() for among, _ in student.attention)}


def test_a_method_that_needs_attention_and_no_queries():
    torch.manual_seed(0)
    models_ = [models.build("dino", 3, backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=32,
                            heads=4, ffn_dim=32, encoder_layers=1, decoder_layers=1, num_queries=6, feature_levels=2)
               for _ in range(2)]
    teacher, student = models_[0].eval().requires_grad_(False), models_[1].train()
    batch = data.collate([(torch.rand(3, 64, 64), {"labels": torch.tensor([0]), "boxes": torch.full((1, 4), .5)})])
    losses = baselines.rival_step(student, teacher, batch, Attentive(32, 32, seed=0))
    assert losses["seen"] > 0 and losses["loss_ce"] > 0


def test_queries_without_their_attention_are_one_line():
    student, teacher, targets, extras = scene()
    D3ETR(8, 8)(student, teacher, targets, extras)
    with pytest.raises(ValueError, match="D3ETR needs attention: prepare it"):
        D3ETR(8, 8)(student, teacher, targets, {"queries": extras["queries"]._replace(attention=None)})
