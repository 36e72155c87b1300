"""What clockdistill.py promises: each test is a claim, checked by a hand-worked number, a slow twin or an invariant."""
import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_convert

import clockdistill
from clockdistill import CLoCKDistill, location_mask, logit_loss, memory_loss, target_queries

SHAPES = [(6, 8), (3, 4)]                                             # 48 + 12 = 60 tokens
NO_BOXES, NO_LABELS = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def cells(x0, y0, x1, y1, height, width):
    """A box by its corners in cells, as location_mask wants it."""
    return torch.tensor([[(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]])


def random_boxes(*shape, generator, dtype=torch.float32):
    """Boxes inside the image, of 5 to 50 % of its sides."""
    size = 0.05 + 0.45 * torch.rand(*shape, 2, generator=generator, dtype=dtype)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator, dtype=dtype), size], -1)


def answers(L_s=2, L_t=2, B=2, Q=5, C=3, dtype=torch.float32, seed=0):
    g = gen(seed)
    logits = [3 * torch.randn(L, B, Q, C, generator=g, dtype=dtype) for L in (L_s, L_t)]
    boxes = [random_boxes(L, B, Q, generator=g, dtype=dtype) for L in (L_s, L_t)]
    valid = torch.ones(B, Q, dtype=torch.bool)
    valid[1, Q // 2:] = False
    return logits[0].requires_grad_(), boxes[0].requires_grad_(), logits[1], boxes[1], valid


def scene(B=2, D=8, dtype=torch.float32, seed=0):
    g = gen(seed)
    student, teacher = (torch.randn(B, 60, D, generator=g, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher, [random_boxes(k % 4, generator=g) for k in range(3, 3 + B)]


# ---------------------------------------------------------------------------------------------------------------------
# Location masks
# ---------------------------------------------------------------------------------------------------------------------

def test_by_hand_a_car_before_a_truck_before_the_background():
    boxes = torch.tensor([[.25, .25, .5, .5], [.25, .25, .125, .25]])     # 4 x 8 cells and 2 x 2 cells of 8 x 16
    inside, scale = location_mask(boxes, 8, 16)
    M, S = torch.zeros(8, 16, dtype=torch.bool), torch.full((8, 16), 1 / 96)               # 96 = 128 - 32
    M[0:4, 0:8], S[0:4, 0:8] = True, 1 / 32
    S[1:3, 3:5] = 1 / 4                                                   # the smaller box wins
    assert_close(inside, M)
    assert_close(scale, S)
    assert_close(location_mask(boxes.flip(0), 8, 16), (inside, scale))   # whatever the order of the boxes


def test_every_touched_cell_belongs_to_the_box():
    inside, scale = location_mask(cells(1.9, 0.5, 4.1, 2.5, 4, 6), 4, 6)
    assert inside.nonzero().tolist() == [[y, x] for y in range(3) for x in range(1, 5)]
    assert_close(scale[inside], torch.full((12,), 1 / 12))


def test_an_object_smaller_than_a_cell_owns_one():
    for box in ([2.3, 1.4, 2.5, 1.6], [2, 1, 2.001, 1.001]):
        inside, scale = location_mask(cells(*box, 4, 6), 4, 6)
        assert inside.nonzero().tolist() == [[1, 2]] and scale[1, 2] == 1


@pytest.mark.parametrize("x, column", [(0, 0), (2, 2), (2.999999, 2), (3, 3), (6, 5)])
def test_an_object_without_width_on_an_edge_between_cells_owns_one(x, column):
    inside, scale = location_mask(cells(x, 1, x, 1, 4, 6), 4, 6)
    assert inside.nonzero().tolist() == [[1, column]] and scale[1, column] == 1


def test_a_box_over_the_border_counts_only_what_is_on_the_map():
    inside, scale = location_mask(cells(-3, -1, 2, 1, 4, 6), 4, 6)
    assert inside.nonzero().tolist() == [[0, 0], [0, 1]]
    assert_close(scale[inside], torch.full((2,), 1 / 2))
    assert_close(scale[~inside], torch.full((22,), 1 / 22))


@pytest.mark.parametrize("box", [(6, 1, 8, 2), (-2, 1, 0, 2), (1, 4, 2, 5), (6.5, 1, 6.5, 2), (1, -9, 2, -8)])
def test_a_box_beyond_the_border_owns_nothing(box):
    inside, scale = location_mask(cells(*box, 4, 6), 4, 6)
    assert not inside.any()
    assert_close(scale, torch.full((4, 6), 1 / 24))


def test_padding_is_neither_object_nor_background():
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[:, 4:] = False
    boxes = torch.cat([cells(3, 1, 6, 3, 4, 6), cells(5, 0, 6, 4, 4, 6)])       # half in padding; wholly in padding
    inside, scale = location_mask(boxes, 4, 6, valid)
    assert inside.nonzero().tolist() == [[1, 3], [2, 3]]
    assert_close(scale[inside], torch.full((2,), 1 / 2))
    assert (scale[~valid] == 0).all()
    assert_close(scale[valid & ~inside], torch.full((14,), 1 / 14))


def test_without_objects_all_is_background_and_with_a_full_box_nothing_is():
    inside, scale = location_mask(NO_BOXES, 4, 6)
    assert not inside.any()
    assert_close(scale, torch.full((4, 6), 1 / 24))
    inside, scale = location_mask(torch.tensor([[.5, .5, 1, 1]]), 4, 6)
    assert inside.all()
    assert_close(scale, torch.full((4, 6), 1 / 24))


def test_float32_does_not_push_an_aligned_box_out_of_its_cells():
    for n in (7, 13, 42):
        for first in range(n):
            for end in range(first + 1, n + 1):
                inside, _ = location_mask(cells(first, 0, end, 1, 1, n), 1, n)
                assert inside.sum() == end - first and inside[0, first] and inside[0, end - 1]


def test_every_object_and_the_background_weigh_one():
    boxes = torch.cat([cells(0, 0, 1, 1, 20, 30), cells(3, 3, 9, 19, 20, 30), cells(12, 0, 29.5, 8, 20, 30)])
    inside, scale = location_mask(boxes, 20, 30)
    assert_close(scale.sum(), torch.tensor(4.0))
    assert_close(scale[~inside].sum(), torch.tensor(1.0))


def test_masks_refuse_a_batch_of_boxes_and_a_map_of_another_size():
    with pytest.raises(ValueError, match="one image"):
        location_mask(torch.zeros(2, 3, 4), 4, 6)
    with pytest.raises(ValueError, match=r"valid is \(6, 4\), the map .* \(4, 6\)"):           # (width, height)
        location_mask(torch.zeros(3, 4), 4, 6, valid=torch.ones(6, 4, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------------
# Memory loss
# ---------------------------------------------------------------------------------------------------------------------

def slow_memory_loss(student, teacher, boxes, shapes, padding=None, alpha=5e-5, beta=1e-7, location=True, scale=True):
    """The sums of the equation as loops over images, levels, cells, objects: an independent twin."""
    total, start = 0.0, 0
    for H, W in shapes:
        for b in range(len(student)):
            real = {(y, x) for y in range(H) for x in range(W) if padding is None or not padding[b, start + y * W + x]}
            owners = []
            for cx, cy, w, h in boxes[b].tolist():
                x0, x1 = math.floor((cx - w / 2) * W + 1e-4), math.ceil((cx + w / 2) * W - 1e-4)
                y0, y1 = math.floor((cy - h / 2) * H + 1e-4), math.ceil((cy + h / 2) * H - 1e-4)
                owners.append({(y, x) for y, x in real if y0 <= y < y1 and x0 <= x < x1})
            background = real - set().union(*owners)
            for y, x in real:
                p = start + y * W + x
                error = sum((t - s) ** 2 for t, s in zip(teacher[b, p].tolist(), student[b, p].tolist()))
                S = 1 / min(len(o) for o in [*owners, background] if (y, x) in o) if scale else 1.0
                total += (alpha if not location or (y, x) not in background else beta) * S * error
        start += H * W
    return total / len(student)


@pytest.mark.parametrize("location", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_memory_loss_equals_its_slow_twin(location, scale):
    student, teacher, boxes = scene(B=4)
    fine, coarse = torch.zeros(4, 6, 8, dtype=torch.bool), torch.zeros(4, 3, 4, dtype=torch.bool)
    fine[1, :, 6:], coarse[1, :, 3:] = True, True                        # image 1 fills three quarters of the width
    padding = torch.cat([fine.flatten(1), coarse.flatten(1)], 1)         # (4, 60)
    options = dict(alpha=.7, beta=.3, location=location, scale=scale)
    expected = slow_memory_loss(student.detach(), teacher, boxes, SHAPES, padding, **options)
    assert memory_loss(student, teacher, boxes, SHAPES, padding, **options).item() == pytest.approx(expected, rel=1e-5)


def test_memory_loss_by_hand():
    # Map 2 x 2, one object in the first cell; the squared errors are 1 + 4 = 5, 0, 9 and 9.
    student = torch.tensor([[[1., 2.], [0., 0.], [3., 0.], [0., 3.]]])
    box = torch.tensor([[.25, .25, .5, .5]])
    loss = memory_loss(student, torch.zeros_like(student), [box], [(2, 2)], alpha=.5, beta=.1)
    assert loss.item() == pytest.approx(.5 * 5 / 1 + .1 * (0 + 9 + 9) / 3)
    twice = memory_loss(student.repeat(1, 2, 1), torch.zeros(1, 8, 2), [box], [(2, 2)] * 2, alpha=.5, beta=.1)
    assert twice.item() == pytest.approx(2 * loss.item())                # levels are summed
    batch = memory_loss(student.repeat(3, 1, 1), torch.zeros(3, 4, 2), [box] * 3, [(2, 2)], alpha=.5, beta=.1)
    assert batch.item() == pytest.approx(loss.item())                    # images are averaged
    assert memory_loss(student, torch.zeros_like(student), [box], [(2, 2)]).item() == pytest.approx(5 * 5e-5 + 6 * 1e-7)


def test_memory_loss_is_zero_when_the_student_is_the_teacher():
    _, teacher, boxes = scene()
    assert memory_loss(teacher, teacher, boxes, SHAPES) == 0


def test_memory_loss_teaches_the_student_and_never_the_teacher():
    student, teacher, boxes = scene()
    teacher.requires_grad_()
    memory_loss(student, teacher, boxes, SHAPES).backward()
    assert (student.grad.abs().sum(2) > 0).all() and teacher.grad is None


@pytest.mark.parametrize("empty", [False, True])
def test_memory_loss_gradient_by_finite_differences(empty):
    student, teacher, boxes = scene(D=2, dtype=torch.float64)
    boxes = [NO_BOXES] * 2 if empty else boxes
    assert torch.autograd.gradcheck(lambda s: memory_loss(s, teacher, boxes, SHAPES, alpha=1., beta=.5), student)


def test_padding_and_batch_mates_change_nothing():
    """An image of 4 x 6 cells alone, and in a batch padded to 6 x 8 with another: also when padding holds NaN."""
    g = gen()
    student, teacher = torch.randn(2, 1, 4, 6, 8, generator=g)           # (1, H, W, D) each
    box = random_boxes(3, generator=g)
    alone = memory_loss(student.flatten(1, 2), teacher.flatten(1, 2), [box], [(4, 6)])

    padding = torch.ones(2, 6, 8, dtype=torch.bool)
    padding[0, :4, :6], padding[1] = False, False
    wide_s, wide_t = torch.full((2, 6, 8, 8), math.nan), torch.full((2, 6, 8, 8), math.nan)
    wide_s[0, :4, :6], wide_t[0, :4, :6] = student[0], teacher[0]
    wide_s[1], wide_t[1] = torch.randn(2, 6, 8, 8, generator=g)
    mate = random_boxes(5, generator=g)
    padded = [box * torch.tensor([6 / 8, 4 / 6, 6 / 8, 4 / 6]), mate]
    wide_s = wide_s.flatten(1, 2).requires_grad_()
    both = memory_loss(wide_s, wide_t.flatten(1, 2), padded, [(6, 8)], padding.flatten(1))
    other = memory_loss(wide_s[1:], wide_t[1:].flatten(1, 2), [mate], [(6, 8)])
    assert_close(2 * both, alone + other)
    both.backward()
    assert (wide_s.grad[padding.flatten(1)] == 0).all() and wide_s.grad.isfinite().all()


def test_the_scale_mask_lets_a_small_object_weigh_as_much_as_a_large_one():
    boxes = torch.cat([cells(0, 0, 1, 1, 6, 8), cells(2, 2, 8, 6, 6, 8)])
    small, large = torch.zeros(2, 1, 6, 8, 1)
    small[:, 0, 0], large[:, 2:6, 2:8] = 1, 1                            # an error of 1 a cell in one of the objects
    for scale, ratio in ((True, 1), (False, 24)):
        one, other = (memory_loss(student.flatten(1, 2), torch.zeros(1, 48, 1), [boxes], [(6, 8)], scale=scale)
                      for student in (small, large))
        assert_close(other / one, torch.tensor(float(ratio)))


def test_memory_loss_explains_shapes_that_do_not_fit():
    student, teacher, boxes = scene()
    with pytest.raises(ValueError, match="tokens"):
        memory_loss(student[:, :-1], teacher, boxes, SHAPES)
    with pytest.raises(ValueError, match="have 48 tokens, the memory has 60"):
        memory_loss(student, teacher, boxes, SHAPES[:1])
    with pytest.raises(ValueError, match="adapter"):
        memory_loss(student, teacher[..., :4], boxes, SHAPES)
    with pytest.raises(ValueError, match="boxes of 1 images"):
        memory_loss(student, teacher, boxes[:1], SHAPES)


# ---------------------------------------------------------------------------------------------------------------------
# Target-aware queries
# ---------------------------------------------------------------------------------------------------------------------

LABELS = [torch.tensor([2, 0]), NO_LABELS, torch.tensor([1, 1, 2])]
BOXES = [random_boxes(len(l), generator=gen(len(l))) for l in LABELS]
EMBEDDING = torch.arange(12.).reshape(3, 4)


def test_a_query_asks_for_each_object_by_class_and_place():
    content, boxes, attend, valid = target_queries(LABELS, BOXES, EMBEDDING)
    assert valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    for b, (label, box) in enumerate(zip(LABELS, BOXES)):
        assert torch.equal(content[b, valid[b]], EMBEDDING[label]) and torch.equal(boxes[b, valid[b]], box)
    assert content.shape == (3, 3, 4) and boxes.shape == (3, 3, 4) and attend.shape == (3, 3, 3)


def test_groups_do_not_see_one_another_and_padded_rows_see_only_themselves():
    content, boxes, attend, valid = target_queries(LABELS, BOXES, EMBEDDING, groups=3, random_queries=2)
    Q = 3 * 3 + 2
    assert content.shape == (3, Q, 4) and valid.sum(1).tolist() == [2 * 3 + 2, 2, 3 * 3 + 2]
    for b, label in enumerate(LABELS):
        for i in range(Q):
            group = [j for j in range(Q) if (j % 3 == i % 3 if i < 9 and j < 9 else i >= 9 and j >= 9)]
            sees = [j for j in group if valid[b, j]] if valid[b, i] else [i]
            assert attend[b, i].nonzero().flatten().tolist() == sees
        for k in range(len(label)):                                      # object k is asked for by 3k, 3k + 1, 3k + 2
            assert (content[b, 3 * k:3 * k + 3] == EMBEDDING[label[k]]).all()
            assert (boxes[b, 3 * k:3 * k + 3] == BOXES[b][k]).all()


def test_attention_with_the_mask_keeps_groups_and_padding_apart():
    content, _, attend, valid = target_queries(LABELS, BOXES, EMBEDDING, groups=2)
    x = torch.randn(content.shape, generator=gen()).requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=attend)
    assert out.isfinite().all()                                          # each row sees something
    out[2, 0].sum().backward()                                           # object 0 in group 0 of the third image
    assert x.grad.abs().sum(2).nonzero().tolist() == [[2, 0], [2, 2], [2, 4]]


@pytest.mark.parametrize("rows", ["label", "slot"])
def test_batch_mates_do_not_change_an_images_queries(rows):
    embedding = torch.randn(3 if rows == "label" else 5, 4, generator=gen())
    batch = target_queries(LABELS, BOXES, embedding, groups=2, rows=rows)
    alone = target_queries(LABELS[:1], BOXES[:1], embedding, groups=2, rows=rows)
    assert torch.equal(batch[0][0, :4], alone[0][0]) and torch.equal(batch[1][0, :4], alone[1][0])
    assert torch.equal(batch[2][0, :4, :4], alone[2][0]) and not batch[2][0, :4, 4:].any()


def test_slots_read_the_contents_one_after_the_other_and_one_row_serves_all():
    content, *_ = target_queries(LABELS, BOXES, torch.arange(5.)[:, None], groups=2, rows="slot")
    assert content[2, :, 0].tolist() == [0, 1, 2, 3, 4, 0]
    for one in (torch.tensor([7., 8.]), torch.tensor([[7., 8.]])):
        assert (target_queries(LABELS, BOXES, one)[0] == torch.tensor([7., 8.])).all()


def test_without_objects_there_is_nothing_to_ask():
    content, boxes, attend, valid = target_queries([NO_LABELS] * 2, [torch.zeros(0)] * 2, EMBEDDING, groups=3)
    assert (content.shape, boxes.shape, attend.shape, valid.shape) == ((2, 0, 4), (2, 0, 4), (2, 0, 0), (2, 0))


def test_box_noise_moves_corners_by_at_most_its_share_of_half_the_box_and_stays_on_the_image():
    box = torch.tensor([[.5, .5, .2, .4]])
    noisy = target_queries([torch.zeros(1).long()], [box], EMBEDDING, groups=4000, box_noise=.5, generator=gen())[1][0]
    for axis, half in ((0, .1), (1, .2)):
        for sign in (-1, 1):
            moved = noisy[:, axis] + sign * noisy[:, axis + 2] / 2 - (.5 + sign * half)
            assert .49 * half < moved.abs().max() <= .5 * half + 1e-6 and moved.mean().abs() < .003
    corner = torch.tensor([[.05, .95, .1, .1]])
    noisy = target_queries([torch.zeros(1).long()], [corner], EMBEDDING, groups=500, box_noise=1, generator=gen())[1][0]
    assert (noisy[:, 0] - noisy[:, 2] / 2).min() >= -1e-6 and (noisy[:, 1] + noisy[:, 3] / 2).max() <= 1 + 1e-6
    assert noisy[:, 2:].min() >= 0


def test_label_noise_asks_with_a_random_class_that_often():
    content, *_ = target_queries([torch.zeros(1).long()], [BOXES[0][:1]], torch.arange(3.)[:, None], groups=6000,
                                 label_noise=.6, generator=gen())
    share = torch.bincount(content[0, :, 0].long(), minlength=3) / 6000
    assert_close(share, torch.tensor([.4 + .2, .2, .2]), atol=.02, rtol=0)


def test_noise_comes_from_the_generator_and_without_noise_nothing_is_drawn():
    noisy = dict(box_noise=.4, label_noise=.5, random_queries=3)
    before = torch.random.get_rng_state()
    first, second = (target_queries(LABELS, BOXES, EMBEDDING, generator=gen(7), **noisy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[1], target_queries(LABELS, BOXES, EMBEDDING, generator=gen(8), **noisy)[1])
    target_queries(LABELS, BOXES, EMBEDDING, groups=3)
    assert torch.equal(before, torch.random.get_rng_state())
    g = gen()
    state = g.get_state()
    target_queries(LABELS, BOXES, EMBEDDING, random_queries=3, random_seed=0, generator=g)
    assert torch.equal(state, g.get_state())                             # fixed random queries have a seed of their own


def test_random_queries_are_shared_by_all_images_and_fixed_by_a_seed():
    content, boxes, _, valid = target_queries(LABELS, BOXES, EMBEDDING, random_queries=4, random_seed=3)
    assert valid[:, 3:].all() and (boxes[:, 3:] == boxes[:1, 3:]).all() and (content[:, 3:] == content[:1, 3:]).all()
    other = target_queries(LABELS[:1], BOXES[:1], EMBEDDING, groups=2, random_queries=4, random_seed=3)
    assert torch.equal(other[1][0, -4:], boxes[0, -4:]) and torch.equal(other[0][0, -4:], content[0, -4:])


@pytest.mark.parametrize("bad", [dict(box_noise=1.5), dict(label_noise=-.1), dict(groups=0), dict(rows="labels")])
def test_target_queries_refuse(bad):
    with pytest.raises(ValueError):
        target_queries(LABELS, BOXES, EMBEDDING, **bad)


def test_each_image_needs_a_box_for_each_label():
    """Also where another image is as long, so that the stacked shapes would fit."""
    with pytest.raises(ValueError, match=r"labels of \[3, 1\] objects, boxes of \[1, 3\]"):
        target_queries([torch.zeros(3), torch.zeros(1)], [torch.rand(1, 4), torch.rand(3, 4)], EMBEDDING)


def test_a_label_without_a_row_is_refused_and_the_refusal_stops_no_compiler():
    """Classes numbered from 1, say. The check costs nothing: it is the look-up itself that fails."""
    ask = lambda labels: target_queries(labels, BOXES, EMBEDDING)[0]
    with pytest.raises(ValueError, match="label 3 has no row in the embedding of 3: number the classes from 0"):
        ask([labels + 1 for labels in LABELS])
    compiled = torch.compile(ask, fullgraph=True, backend="eager")
    assert torch.equal(compiled(LABELS), ask(LABELS))


# ---------------------------------------------------------------------------------------------------------------------
# Logit loss
# ---------------------------------------------------------------------------------------------------------------------

def slow_logit_loss(s, s_boxes, t, t_boxes, valid, T=10.0, classes="bernoulli", confidence=True, normalise="queries",
                    layers="all"):
    """The sums of the equation as loops, in Python floats: an independent twin."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    total = dict(cls=0.0, l1=0.0, giou=0.0)
    L, B, Q, C = s.shape
    for i in range(L) if layers == "all" else [L - 1]:
        j = max(round((i + 1) * len(t) / L), 1) - 1
        layer, weights = dict(cls=0.0, l1=0.0, giou=0.0), 0.0
        for b, q in valid.nonzero().tolist():
            z, y = s[i, b, q].tolist(), t[j, b, q].tolist()
            w = 1.0
            if confidence and classes == "softmax":                      # the last column is "no object"
                w = max(math.exp(a) for a in y[:-1]) / sum(map(math.exp, y))
            elif confidence:
                w = max(map(sigmoid, y))
            if classes == "bernoulli":
                pairs = [(sigmoid(u * a / T), sigmoid(u * c / T)) for a, c in zip(y, z) for u in (1, -1)]
            else:
                p, r = ([math.exp(a / T) / sum(math.exp(c / T) for c in x) for a in x] for x in (y, z))
                pairs = list(zip(p, r))
            layer["cls"] += w * T ** 2 * sum(p * math.log(p / r) for p, r in pairs)
            a, c = s_boxes[i, b, q].tolist(), t_boxes[j, b, q].tolist()
            layer["l1"] += w * sum(abs(u - v) for u, v in zip(a, c))
            (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
                (x - w_ / 2, y_ - h / 2, x + w_ / 2, y_ + h / 2) for x, y_, w_, h in (a, c))
            overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
            union = a[2] * a[3] + c[2] * c[3] - overlap
            hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
            layer["giou"] += w * (1 - (overlap / union - (hull - union) / hull))
            weights += w
        divisor = dict(queries=int(valid.sum()), batch=B, confidence=weights)[normalise]
        total = {name: total[name] + layer[name] / divisor for name in total}
    return total


@pytest.mark.parametrize("options", [
    {}, dict(classes="softmax"), dict(classes="softmax_of_sigmoid"), dict(confidence=False), dict(normalise="batch"),
    dict(normalise="confidence"), dict(layers="last"), dict(confidence=False, normalise="confidence", classes="softmax")], ids=str)
@pytest.mark.parametrize("L_s, L_t", [(2, 2), (2, 3), (3, 6), (4, 3)])
def test_logit_loss_equals_its_slow_twin(options, L_s, L_t):
    args = answers(L_s, L_t, dtype=torch.float64)
    got, expected = logit_loss(*args, **options), slow_logit_loss(*args, **options)
    assert list(got) == ["cls", "l1", "giou"]
    for name in got:
        assert got[name].item() == pytest.approx(expected[name], rel=1e-9)


def test_logit_loss_by_hand():
    # One query. Teacher 0 (p = 1/2), student ln 3 (q = 3/4), T = 1: KL = ln(2/3)/2 + ln(2)/2 = ln(4/3)/2, w = 1/2.
    # Boxes of 0.2 x 0.2, one beside the other: L1 = 0.2, hull = union, GIoU = 0, distance 1.
    teacher, student = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), math.log(3))
    t_box, s_box = torch.tensor([.3, .5, .2, .2]).expand(1, 1, 1, 4), torch.tensor([.5, .5, .2, .2]).expand(1, 1, 1, 4)
    valid = torch.ones(1, 1, dtype=torch.bool)
    loss = logit_loss(student, s_box, teacher, t_box, valid, temperature=1.)
    assert loss["cls"].item() == pytest.approx(.5 * math.log(4 / 3) / 2)
    assert loss["l1"].item() == pytest.approx(.5 * .2) and loss["giou"].item() == pytest.approx(.5)
    warm = logit_loss(10 * student, s_box, teacher, t_box, valid, temperature=10.)
    assert_close(warm["cls"], 100 * loss["cls"])                         # T^2 of the same probabilities


def test_logit_loss_is_exactly_zero_when_the_student_is_the_teacher():
    for options in ({}, dict(classes="softmax")):
        _, _, logits, boxes, valid = answers()
        boxes[0, 0, :2, 2:] = torch.tensor([[0., 0.], [0., .3]])         # a point and a line are no exception
        assert all(v == 0 for v in logit_loss(logits, boxes, logits, boxes, valid, **options).values())


@pytest.mark.parametrize("classes", ["bernoulli", "softmax"])
@pytest.mark.parametrize("name", ["cls", "l1", "giou"])
def test_every_term_teaches_the_student_and_never_the_teacher(name, classes):
    """The precursor's class term had teacher and student the wrong way round: no gradient at all."""
    s, s_boxes, t, t_boxes, valid = answers()
    t.requires_grad_(), t_boxes.requires_grad_()
    logit_loss(s, s_boxes, t, t_boxes, valid, classes=classes)[name].backward()
    taught = (s if name == "cls" else s_boxes).grad
    assert (taught.abs().sum(3) > 0).equal(valid.expand(2, -1, -1))      # every valid query, no other
    assert t.grad is None and t_boxes.grad is None


def test_the_class_gradient_pulls_the_student_towards_the_teacher():
    s, s_boxes, t, t_boxes, valid = answers()
    logit_loss(s, s_boxes, t, t_boxes, valid, confidence=False)["cls"].backward()
    T, n = 10, valid.sum()
    expected = T * ((s / T).sigmoid() - (t / T).sigmoid()) * valid[..., None] / n          # d/ds of T^2 KL
    assert_close(s.grad, expected.detach())


@pytest.mark.parametrize("options", [{}, dict(classes="softmax", normalise="confidence"), dict(layers="last")], ids=str)
def test_logit_loss_gradient_by_finite_differences(options):
    s, s_boxes, t, t_boxes, valid = answers(L_s=2, L_t=3, Q=3, dtype=torch.float64)
    total = lambda a, b: sum(logit_loss(a, b, t, t_boxes, valid, **options).values())
    assert torch.autograd.gradcheck(total, (s, s_boxes))


def test_the_last_student_layer_learns_from_the_last_teacher_layer():
    valid = torch.ones(1, 1, dtype=torch.bool)
    box = torch.full((1, 1, 1, 4), .5)
    for L_s, L_t, expected in ((6, 6, [1, 2, 3, 4, 5, 6]), (3, 6, [2, 4, 6]), (2, 3, [2, 3]), (1, 6, [6]),
                               (6, 3, [1, 1, 2, 2, 2, 3]), (6, 1, [1, 1, 1, 1, 1, 1])):
        teacher = torch.arange(1., L_t + 1).reshape(L_t, 1, 1, 1)        # the logit is the layer's number
        for i, layer in enumerate(expected):
            student = torch.zeros(L_s, 1, 1, 1, requires_grad=True)
            with torch.no_grad():
                student[i] = layer
            loss = logit_loss(student, box.expand(L_s, 1, 1, 4), teacher, box.expand(L_t, 1, 1, 4), valid)["cls"]
            assert torch.autograd.grad(loss, student)[0][i] == 0         # nothing left to learn for layer i


def test_filled_up_queries_count_for_nothing_whatever_they_hold():
    s, s_boxes, t, t_boxes, valid = answers()
    reference = logit_loss(s, s_boxes, t, t_boxes, valid)
    hole = ~valid[None, ..., None]
    nan = [x.detach().masked_fill(hole, math.nan).requires_grad_() for x in (s, s_boxes, t, t_boxes)]
    loss = logit_loss(*nan, valid)
    assert all(torch.equal(loss[k], reference[k]) for k in loss)
    sum(loss.values()).backward()
    assert all(x.grad.isfinite().all() and (x.grad.masked_select(hole) == 0).all() for x in nan[:2])


def test_batch_mates_add_up():
    args = answers()
    both = logit_loss(*args, normalise="batch")
    alone = [logit_loss(*(x[:, b:b + 1] for x in args[:4]), args[4][b:b + 1], normalise="batch") for b in range(2)]
    for name in both:
        assert_close(both[name] * 2, alone[0][name] + alone[1][name])
        assert_close(both[name] * 2 / args[4].sum(), logit_loss(*args)[name])


def test_a_softmax_teacher_that_is_sure_of_no_object_weighs_little():
    """By hand: probabilities .1, .2 and .7 of "no object"; w = .2. Boxes differ by .2, so l1 = .2 * .2."""
    teacher = torch.tensor([.1, .2, .7]).log().view(1, 1, 1, 3)
    t_box, s_box = torch.tensor([.3, .5, .2, .2]).view(1, 1, 1, 4), torch.tensor([.5, .5, .2, .2]).view(1, 1, 1, 4)
    loss = logit_loss(teacher, s_box, teacher, t_box, torch.ones(1, 1, dtype=torch.bool), classes="softmax")
    assert loss["l1"].item() == pytest.approx(.04)


def test_slots_can_be_asked_for_where_there_are_no_objects():
    """nn.MultiheadAttention fails on 0 queries. The slots are padding rows and count for nothing."""
    content, boxes, attend, valid = target_queries([NO_LABELS], [NO_BOXES], EMBEDDING, groups=2, at_least=1)
    assert content.shape == (1, 2, 4) and not valid.any() and torch.equal(attend[0], torch.eye(2, dtype=torch.bool))
    attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
    attention(content, content, content, attn_mask=(~attend).repeat_interleave(2, 0))
    more, none = (target_queries(LABELS, BOXES, EMBEDDING, at_least=n) for n in (9, 1))
    assert more[3].shape == (3, 9) and more[3].sum() == sum(map(len, LABELS)) and none[3].shape == (3, 3)


@pytest.mark.parametrize("wrong, message", [
    (dict(boxes=[torch.tensor([[40., 30., 10., 5.]])]), "pixels"),
    (dict(boxes=[torch.tensor([[.1, .5, .9, .9]])]), "not corners"),
    (dict(padding=torch.ones(1, 60, dtype=torch.bool)), "~ turns it round"),
    (dict(shapes=[(8, 6), (4, 3)]), "height, width")])
def test_inputs_meant_otherwise_are_told_with_the_remedy(wrong, message):
    padding = torch.cat([torch.arange(w).ge(w - 2).expand(h, w).flatten() for h, w in SHAPES])[None]
    given = dict(boxes=[torch.tensor([[.5, .5, .2, .2]])], padding=padding, shapes=SHAPES)
    distill = CLoCKDistill(8, 8, lambda_log=0)

    def losses(boxes, padding, shapes):
        memory = torch.zeros(1, 60, 8)
        return distill(memory, memory, None, None, None, None, [torch.zeros(1).long()], boxes, shapes, padding, None)

    with pytest.raises(ValueError, match=message):
        losses(**given | wrong)
    losses(**given)


@pytest.mark.parametrize("Q", [0, 3])
@pytest.mark.parametrize("normalise", ["queries", "batch", "confidence"])
def test_without_valid_queries_the_loss_is_zero_and_its_graph_intact(Q, normalise):
    s, s_boxes, t, t_boxes, _ = answers(Q=Q)
    loss = logit_loss(s, s_boxes, t, t_boxes, torch.zeros(2, Q, dtype=torch.bool), normalise=normalise)
    assert all(v == 0 for v in loss.values())
    sum(loss.values()).backward()
    assert (s.grad == 0).all() and (s_boxes.grad == 0).all()


def test_extreme_logits_and_boxes_without_area_stay_finite():
    s, s_boxes, t, t_boxes, valid = answers()
    with torch.no_grad():
        s.mul_(1e4), t.mul_(-1e4)
        s_boxes[0, 0, 0, 2:], t_boxes[0, 0, 0, 2:] = 0, 0                # two points
        s_boxes[0, 0, 1, 2], t_boxes[0, 0, 1] = 0, s_boxes[0, 0, 1]      # the same line twice
        s_boxes[0, 0, 2, 2:], t_boxes[0, 0, 2, 2:] = 1e-20, 1e-20
        s_boxes[0, 0, 3], t_boxes[0, 0, 3] = 1e-20, torch.tensor([1e-20, .5, 1e-20, 0])   # 1 / area overflows float32
    loss = logit_loss(s, s_boxes, t, t_boxes, valid, confidence=False)
    assert all(v.isfinite() for v in loss.values())
    sum(loss.values()).backward()
    assert s.grad.isfinite().all() and s_boxes.grad.isfinite().all()


def test_giou_of_small_boxes_has_no_eps():
    box = torch.tensor([.5, .5, 2e-4, 2e-4])                             # a quarter of a pixel of COCO, area 4e-8
    moved = box + torch.tensor([1e-4, 0, 0, 0])                          # half over the other: IoU = hull share = 1/3
    one, valid = torch.ones(1, 1, 1, 1), torch.ones(1, 1, dtype=torch.bool)
    args = [one, moved.expand(1, 1, 1, 4), one, box.expand(1, 1, 1, 4)]
    loss = logit_loss(*(x.double() for x in args), valid, confidence=False)
    assert loss["giou"].item() == pytest.approx(2 / 3, rel=1e-3)


def test_logit_loss_explains_answers_that_do_not_fit():
    s, s_boxes, t, t_boxes, valid = answers()
    for bad in ((s[..., :2], s_boxes, t, t_boxes, valid), (s[:, :, :2], s_boxes, t, t_boxes, valid),
                (s, s_boxes, t, t_boxes, valid[:, :2])):
        with pytest.raises(ValueError, match="same queries about the same classes"):
            logit_loss(*bad)
    for bad in ((s, s_boxes[:1], t, t_boxes, valid), (s, s_boxes, t, t_boxes[:, :, :1], valid)):
        with pytest.raises(ValueError, match="boxes must be"):              # other layers; one box for all queries
            logit_loss(*bad)
    for bad in (dict(classes="sigmoid"), dict(normalise="mean"), dict(layers="first")):
        with pytest.raises(ValueError, match="choose from"):
            logit_loss(s, s_boxes, t, t_boxes, valid, **bad)


# ---------------------------------------------------------------------------------------------------------------------
# Both parts
# ---------------------------------------------------------------------------------------------------------------------

def both_parts(distill, student_dim=8, teacher_dim=8, labels=LABELS[:2], boxes=BOXES[:2]):
    """A step with toy "decoders" of two layers that only look at their queries -> losses, and forward's arguments."""
    g = gen()
    s_memory = torch.randn(len(labels), 60, student_dim, generator=g, requires_grad=True)
    t_memory = torch.randn(len(labels), 60, teacher_dim, generator=g, requires_grad=True)
    content, reference, attend, valid = distill.queries(labels, boxes, torch.randn(3, teacher_dim, generator=g), g)
    t_logits, t_boxes = content[..., :3].expand(2, -1, -1, -1), reference.expand(2, -1, -1, -1)
    s_logits, s_boxes = distill.student_content(content)[..., :3].expand_as(t_logits) * .5, t_boxes * .9
    args = [s_memory, t_memory, s_logits, s_boxes, t_logits, t_boxes, labels, boxes, SHAPES, None, valid]
    return distill(*args), args


def test_the_module_is_the_weighted_sum_of_the_functions():
    distill = CLoCKDistill(8, 8, lambda_mem=3., lambda_log=.5, alpha=.2, beta=.1, groups=2, temperature=4.)
    losses, (s_memory, t_memory, *answers, labels, boxes, shapes, padding, valid) = both_parts(distill)
    assert list(losses) == ["memory", "cls", "l1", "giou"]
    assert_close(losses["memory"], 3 * memory_loss(s_memory, t_memory, boxes, shapes, alpha=.2, beta=.1))
    terms = logit_loss(*answers, valid, temperature=4.)
    for name, weight in (("cls", 1), ("l1", 5), ("giou", 2)):
        assert terms[name] > 0
        assert_close(losses[name], .5 * weight * terms[name])


def test_models_of_other_widths_are_joined_by_two_linear_maps_that_learn():
    distill = CLoCKDistill(8, 12)
    losses, (s_memory, t_memory, *_) = both_parts(distill, 8, 12)
    sum(losses.values()).backward()
    assert distill.adapter.weight.shape == (12, 8) and distill.student_reads.weight.shape == (8, 12)
    assert all(p.grad.abs().sum() > 0 for p in distill.parameters()) and s_memory.grad.abs().sum() > 0
    assert t_memory.grad is None
    assert not list(CLoCKDistill(8, 8).parameters())


def test_images_without_objects_give_every_parameter_a_gradient_so_that_ddp_does_not_hang():
    distill = CLoCKDistill(8, 12)
    losses, _ = both_parts(distill, 8, 12, [NO_LABELS] * 2, [NO_BOXES] * 2)
    assert losses["cls"] == losses["l1"] == losses["giou"] == 0
    sum(losses.values()).backward()
    assert (distill.student_reads.weight.grad == 0).all() and distill.adapter.weight.grad.isfinite().all()


def test_switched_off_it_computes_nothing_holds_nothing_and_draws_nothing():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    off = CLoCKDistill(8, 12, lambda_mem=0, lambda_log=0)
    assert not list(off.parameters())
    nan = torch.full((2, 60, 8), math.nan)
    losses = off(nan, None, None, None, None, None, LABELS[:2], BOXES[:2], SHAPES, None, None)
    assert list(losses) == ["memory", "cls", "l1", "giou"]
    assert all(v == 0 and not v.requires_grad for v in losses.values())
    CLoCKDistill(8, 12, content="random", random_queries=5).queries(LABELS, BOXES)
    assert torch.equal(before, torch.random.get_rng_state())             # so the student trains bit for bit as without


def test_a_gpus_random_numbers_stay_as_they_were(monkeypatch):
    """torch.manual_seed seeds every GPU as well: all processes would go on with the same dropout."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    first, second = (CLoCKDistill(8, 12, content="random") for _ in range(2))
    assert torch.equal(first.adapter.weight, second.adapter.weight)


def test_boxes_of_an_image_are_moved_to_its_part_of_the_padded_batch():
    """Image 0 fills the left 6 of 8 columns and the upper 4 of 6 rows."""
    _, teacher, _ = scene()
    own = torch.tensor([[.5, .5, 1 / 3, .5]])                            # columns 2-4 of 6, rows 1-3 of 4
    padding = torch.ones(2, 6, 8, dtype=torch.bool)
    padding[0, :4, :6], padding[1] = False, False
    padding = padding.flatten(1)
    extent = torch.tensor([[6 / 8, 4 / 6], [1, 1]])
    distill = CLoCKDistill(8, 8, lambda_log=0)
    shift = torch.zeros(2, 48, 8)
    shift[0].view(6, 8, 8)[1:3, 2:4] = 1                                 # the student is wrong inside the object only
    teacher = teacher[:, :48]
    labels = [torch.zeros(1).long(), NO_LABELS]
    args = (teacher + shift, teacher, None, None, None, None, labels, [own, NO_BOXES], [(6, 8)])
    for loss in (distill(*args, padding, None, extent=extent), distill(*args, padding, None)):
        assert_close(loss["memory"], torch.tensor(5e-5 * 8 / 2))         # 4 cells / 4 cells * 8 channels / 2 images


@pytest.mark.parametrize("content", ["own", "random_label", "random", "zero"])
def test_contents_that_do_not_tell_the_class(content):
    distill = CLoCKDistill(8, 8, content=content, num_classes=3, groups=2)
    own = torch.randn(5, 8, generator=gen())
    rows = distill.queries(LABELS, BOXES, own if content == "own" else None)[0][2]         # (6, 8), objects 1, 1, 2
    if content == "own":
        assert torch.equal(rows, own[[0, 1, 2, 3, 4, 0]])
    elif content == "random_label":
        assert torch.equal(rows, distill.frozen_content[[1, 1, 1, 1, 2, 2]])
    else:
        assert (rows == rows[0]).all() and (rows[0] == 0).all() == (content == "zero")


def test_queries_are_not_learned():
    embedding = torch.randn(3, 8, requires_grad=True)
    assert not CLoCKDistill(8, 8).queries(LABELS, BOXES, embedding)[0].requires_grad


def test_frozen_contents_are_saved_with_the_module():
    first, second = CLoCKDistill(8, 8, content="random", seed=1), CLoCKDistill(8, 8, content="random", seed=2)
    assert not torch.equal(first.frozen_content, second.frozen_content)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.frozen_content, second.frozen_content) and not first.frozen_content.requires_grad


def test_the_module_says_what_is_missing():
    with pytest.raises(ValueError, match="choose from"):
        CLoCKDistill(content="labels")
    with pytest.raises(ValueError, match="num_classes"):
        CLoCKDistill(content="random_label")
    with pytest.raises(ValueError, match='teacher\'s embedding.*content="own", "random_label"'):
        CLoCKDistill().queries(LABELS, BOXES)
    with pytest.raises(ValueError, match='teacher\'s embedding.*content="random_label"'):
        CLoCKDistill(content="own").queries(LABELS, BOXES)
    with pytest.raises(ValueError, match="the logit part has no queries"):
        CLoCKDistill(target=False)
    CLoCKDistill(target=False, lambda_log=0)                              # needs none
    with pytest.raises(ValueError, match="labels of"):
        CLoCKDistill(8, 8)(None, None, None, None, None, None, LABELS, BOXES[::-1], SHAPES, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and devices
# ---------------------------------------------------------------------------------------------------------------------

def test_half_precision_inputs_give_the_float32_loss_of_the_rounded_values_also_under_autocast():
    student, teacher, boxes = scene()
    s, s_boxes, t, t_boxes, valid = answers()
    adapter = CLoCKDistill(8, 9).adapter                                 # a linear map: autocast would run it in bf16
    wide = torch.randn(2, 60, 9, generator=gen())

    def losses(cast):
        a = [cast(x.detach()) for x in (student, teacher, wide, s, s_boxes, t, t_boxes)]
        return [memory_loss(a[0], a[1], boxes, SHAPES), memory_loss(a[0], a[2], boxes, SHAPES, adapter=adapter),
                *logit_loss(*a[3:], valid).values()]

    expected = losses(lambda x: x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        for got in (losses(lambda x: x.bfloat16()), losses(lambda x: x.bfloat16().float())):
            assert all(torch.equal(g, e) and g.dtype == torch.float32 for g, e in zip(got, expected))


def test_everything_runs_on_a_gpu_without_a_gpu():
    """Fake CUDA tensors find host constants on the wrong device, boolean indexing and .item()."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        device = "cuda"
        labels = [torch.zeros(k, dtype=torch.long, device=device) for k in (2, 0, 3)]
        boxes = [torch.rand(k, 4, device=device) for k in (2, 0, 3)]
        memory = [torch.randn(3, 60, d, device=device) for d in (8, 12)]
        padding = torch.zeros(3, 60, dtype=torch.bool, device=device)
        inside, scale = location_mask(boxes[0], 6, 8, padding[0, :48].view(6, 8))
        assert inside.device.type == scale.device.type == device
        for options in ({}, dict(location=False), dict(scale=False, normalise="confidence", classes="softmax")):
            with torch.device(device):
                distill = CLoCKDistill(8, 12, groups=2, box_noise=.4, label_noise=.2, random_queries=5, **options)
            distill.checked = True                                       # the one look at values, of the first batch
            content, reference, attend, valid = distill.queries(labels, boxes, torch.randn(3, 12, device=device))
            assert distill.student_content(content).shape == (3, 11, 8) and attend.device.type == device
            logits = [torch.randn(L, 3, 11, 3, device=device) for L in (2, 3)]
            found = [torch.rand(L, 3, 11, 4, device=device) for L in (2, 3)]
            losses = distill(*memory, logits[0], found[0], logits[1], found[1], labels, boxes, SHAPES, padding, valid)
            assert all(v.device.type == device and v.shape == () for v in losses.values())


# ---------------------------------------------------------------------------------------------------------------------
# Beside a detector's own queries, and in several processes (notebooks/5_copy_into_your_code)
# ---------------------------------------------------------------------------------------------------------------------

def test_own_queries_of_nn_multihead_attention_do_not_notice_the_target_aware_ones():
    """It wants True where a row may NOT attend, once for each image and head."""
    content, _, attend, _ = target_queries(LABELS, BOXES, EMBEDDING)
    own = torch.randn(3, 5, 4, generator=gen())
    may = torch.block_diag(torch.ones(5, 5), torch.zeros(attend.shape[1:])).bool().repeat(3, 1, 1)
    may[:, 5:, 5:] = attend
    attention, x = torch.nn.MultiheadAttention(4, 2, batch_first=True), torch.cat([own, content], 1)
    together = attention(x, x, x, attn_mask=(~may).repeat_interleave(2, 0))[0]
    assert_close(together[:, :5], attention(own, own, own)[0])
    for image, count in ((0, 2), (2, 3)):                              # ours, without the padding rows
        alone = content[image:image + 1, :count]
        assert_close(together[image, 5:5 + count], attention(alone, alone, alone)[0][0])


@pytest.mark.parametrize("normalise", ["queries", "batch", "confidence"])
def test_the_losses_of_two_processes_average_to_that_of_the_whole_batch(monkeypatch, normalise):
    """Also when one of them has no objects: what divides is summed over both."""
    *given, valid = answers()
    valid[1] = False
    whole = logit_loss(*given, valid, normalise=normalise)
    first, second = (([x[:, i:i + 1] for x in given], valid[i:i + 1]) for i in (0, 1))
    divisors = []                                                      # the first process's, the second has none
    monkeypatch.setattr(clockdistill.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(clockdistill.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(clockdistill.dist, "all_reduce",
                        lambda values: (divisors.append(values.clone()), values.copy_(divisors[0])))
    first, second = (logit_loss(*answered, asked, normalise=normalise) for answered, asked in (first, second))
    for name, loss in whole.items():
        assert second[name] == 0 and second[name].requires_grad            # a gradient of zeros: DDP does not wait
        assert_close((first[name] + second[name]) / 2, loss)


MEMORY = dict(alpha=.3, beta=.3, location=False, scale=False)
ANSWERS = dict(temperature=2., classes="softmax", confidence=False, normalise="confidence", layers="last")


@pytest.mark.parametrize("option", [*MEMORY, *ANSWERS])
def test_every_switch_reaches_its_loss(option):
    value = (MEMORY | ANSWERS)[option]
    losses, (s, t, *answers, labels, boxes, shapes, _, valid) = both_parts(CLoCKDistill(8, 8, **{option: value}))
    of_memory, of_answers = ({option: value} if option in part else {} for part in (MEMORY, ANSWERS))
    expected = {"memory": memory_loss(s, t, boxes, shapes, **of_memory)} | logit_loss(*answers, valid, **of_answers)
    for name, weight in (("memory", 1), ("cls", 1), ("l1", 5), ("giou", 2)):
        assert_close(losses[name], weight * expected[name], rtol=1e-5, atol=0)
    plain, _ = both_parts(CLoCKDistill(8, 8))
    assert plain != losses


@pytest.mark.parametrize("option, value", [
    ("groups", 2), ("box_noise", .4), ("label_noise", .9), ("random_queries", 3), ("at_least", 9)])
def test_every_switch_reaches_the_queries(option, value):
    got = CLoCKDistill(4, 4, **{option: value}).queries(LABELS, BOXES, EMBEDDING, gen())
    expected = target_queries(LABELS, BOXES, EMBEDDING, generator=gen(), random_seed=0, **{option: value})
    assert all(map(torch.equal, got, expected))
    plain = CLoCKDistill(4, 4).queries(LABELS, BOXES, EMBEDDING, gen())
    assert not all(map(torch.equal, got, plain))


def test_without_targets_only_random_queries_ask():
    _, boxes, _, valid = CLoCKDistill(4, 4, target=False, random_queries=3).queries(LABELS, BOXES, EMBEDDING)
    assert valid.shape == (3, 3) and valid.all() and (boxes == boxes[:1]).all()


def test_the_four_corners_move_apart():
    label, box = [torch.zeros(1).long()], [torch.tensor([[.5, .5, .2, .4]])]
    noisy = target_queries(label, box, EMBEDDING, groups=4000, box_noise=.5, generator=gen())[1][0]
    corners = box_convert(noisy, "cxcywh", "xyxy")
    assert (torch.corrcoef(corners.T) - torch.eye(4)).abs().max() < .06


def test_random_queries_are_all_over_the_image_with_contents_of_every_class():
    content, boxes, *_ = target_queries([NO_LABELS], [NO_BOXES], EMBEDDING, random_queries=6000, generator=gen())
    share = (content[0, :, 0] / 4).long().bincount(minlength=3) / 6000
    assert_close(share, torch.full((3,), 1 / 3), atol=.02, rtol=0)
    assert_close(boxes[0].mean(0), torch.full((4,), .5), atol=.02, rtol=0)
    assert_close(boxes[0].std(0), torch.full((4,), 12 ** -.5), atol=.02, rtol=0)


def test_a_given_extent_counts_where_padding_knows_it_to_a_cell_only():
    _, teacher, _ = scene()
    teacher, padding = teacher[:1, :48], torch.ones(1, 6, 8, dtype=torch.bool)
    padding[0, :4, :6] = False
    own, extent = torch.tensor([[.93, .5, .14, .5]]), torch.tensor([[.7, .65]])    # columns 4.8..5.6; by padding 5.2..6
    args = (teacher + 1, teacher, *[None] * 4, [torch.zeros(1).long()], [own], [(6, 8)], padding.flatten(1), None)
    distill = CLoCKDistill(8, 8, lambda_log=0)
    expected = memory_loss(teacher + 1, teacher, [own * extent.repeat(1, 2)], [(6, 8)], padding.flatten(1))
    assert_close(distill(*args, extent=extent)["memory"], expected, rtol=1e-6, atol=0)
    # By hand.
    student = teacher.clone()
    student[0].view(6, 8, 8)[1, 4] += 1                                            # only with the given extent inside
    assert_close(distill(student, *args[1:], extent=extent)["memory"].item() > 1e-6, True)
    assert distill(student, *args[1:])["memory"].item() < 1e-6


@pytest.mark.parametrize("part, missing", [("lambda_mem", 1), ("lambda_log", 2)])
def test_a_part_that_is_on_wants_its_tensors(part, missing):
    """Named in one line; with the other part off, and its tensors None, the same call is right."""
    other = {"lambda_mem": "lambda_log", "lambda_log": "lambda_mem"}[part]
    memory, logits, places = torch.rand(1, 4, 8), torch.rand(1, 1, 1, 3), torch.rand(1, 1, 1, 4)
    given = [memory, memory, None, None, None, None] if part == "lambda_mem" else [
        None, None, logits, places, logits, places]
    valid = None if part == "lambda_mem" else torch.ones(1, 1, dtype=torch.bool)
    rest = [[torch.tensor([0])], [torch.tensor([[0.5, 0.5, 0.5, 0.5]])], [(2, 2)], None, valid]
    distill = CLoCKDistill(8, 8, **{other: 0})
    distill(*given, *rest)
    given[missing] = None
    with pytest.raises(ValueError, match=f"{part} is not 0, and an input of its part is None"):
        distill(*given, *rest)


@pytest.mark.parametrize("change, message", [
    (dict(extent=torch.tensor([[640., 480.]])), r"extent must be \(w_i / W, h_i / H\).*divide pixels"),
    (dict(shapes=[(3, 3)]), r"levels \[\(3, 3\)\] have 9 tokens, the padding has 12"),
    (dict(shapes=None), "lambda_mem is not 0, and an input of its part is None")])
def test_an_extent_in_pixels_and_levels_of_other_tokens_are_one_line(change, message):
    memory, padding = torch.rand(1, 12, 8), torch.zeros(1, 12, dtype=torch.bool)
    given = dict(shapes=[(3, 4)], padding=padding, valid=None, extent=None)
    rest = [[torch.tensor([0])], [torch.tensor([[0.5, 0.5, 0.5, 0.5]])]]
    for extent in (None, [torch.ones(2)]):                                         # one per image is as good
        CLoCKDistill(8, 8, lambda_log=0)(memory, memory, *[None] * 4, *rest, **given | dict(extent=extent))
    with pytest.raises(ValueError, match=message):
        CLoCKDistill(8, 8, lambda_log=0)(memory, memory, *[None] * 4, *rest, **given | change)
