"""What training needs: criterion.py, and of models.py the denoising queries, losses and gradients. Against the official
implementations' vectors where ../shared is at hand, and by hand-worked numbers, oracles and invariants everywhere."""
import itertools
import json
import math

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import criterion
import models
from official import VECTORS, close, needs_vectors, under, vectors
from test_models import (OFFICIAL, VARIANTS, every, fresh, official, official_layers, random_batch, random_extra, total,
                         toy)

DRAWS = ("0.rand_like", "1.randint_like", "2.randint_like", "3.rand_like")      # of denoising, in official order


# ------------------------------------------------------------------------------------------------- the official vectors

def official_targets(tensors, prefix="targets."):
    return [{"labels": tensors[f"{prefix}{i}.labels"], "boxes": tensors[f"{prefix}{i}.boxes"]} for i in range(2)]


def official_noise(draws, targets, groups, ratio=0.5):
    """The four draws in the official flat order (repeat, image, object) -> ours (B, 2 groups, K)."""
    flip, label, sign, shift = draws
    flat_label = torch.zeros(len(flip), dtype=torch.long)
    flat_label[flip < ratio / 2] = label                     # officially drawn for the chosen ones only
    where = [(b, k) for b, t in enumerate(targets) for k in range(len(t["labels"]))]
    image, slot = torch.tensor(where).T
    noise = models.denoising_noise(len(targets), groups, max(len(t["labels"]) for t in targets), 91, "cpu")
    for name, flat in (("flip", flip), ("label", flat_label), ("sign", sign.long() * 2 - 1), ("shift", shift)):
        noise[name][image, :, slot] = flat.unflatten(0, (2 * groups, len(where))).transpose(0, 1)
    return noise


@needs_vectors
@pytest.mark.parametrize("case", ["a", "b_onezero", "c_small_dn_number", "d_many", "e_nonoise", "f_allzero",
                                  "g_more_than_100"])
def test_denoising_queries_equal_official(case):
    info = json.loads((VECTORS / "prims_dino.json").read_text())["cdn"][case]
    stored = vectors("prims_dino")
    tensors, embedding = under(stored, f"cdn.{case}."), stored["cdn.label_enc"]
    targets = official_targets(tensors)
    padded = criterion.pad_targets(targets)
    objects = padded.labels.shape[1]
    groups = models.denoising_groups(info["dn_number"], objects)
    mask = models.attention_groups(10, None, "cpu", groups, objects)
    if case == "f_allzero":
        assert groups == 0 and mask is None and not tensors["attn_mask"].any()
        return
    assert groups == info["dn_meta"]["num_dn_group"]
    if case == "e_nonoise":
        noise = models.denoising_noise(2, groups, objects, 91, "cpu")
    else:
        noise = official_noise([tensors[f"draw.{name}"] for name in DRAWS], targets, groups)
    scales = info["label_noise_ratio"], info["box_noise_scale"]
    content, boxes = models.denoising_queries(padded, embedding, noise, *scales, 1e-3)
    assert torch.equal(content, tensors["input_query_label"])
    close(boxes, tensors["input_query_bbox"].sigmoid(), 1e-6)
    assert torch.equal(~mask, tensors["attn_mask"])


LOSS_CASES = [(detector, case) for detector in ("dab_detr", "deformable_detr", "dino")
              for case in ("a", "b_onezero", "c_allzero")] + [("dino", "d_eval_no_dn")]


@needs_vectors
@pytest.mark.parametrize("detector, case", LOSS_CASES)
def test_losses_equal_official(detector, case):
    """On fixed outputs: 3 + 5, 0 + 4 and 0 + 0 targets, and no denoising; values, assignment, total, and the gradient
    of every input."""
    info = json.loads((VECTORS / f"loss_{detector}.json").read_text())["cases"][case]
    tensors = under(vectors(f"loss_{detector}"), f"{case}.")
    targets = official_targets(tensors)
    leaves = {key: value.requires_grad_() for key, value in tensors.items() if key.startswith("out.")}

    def detections(prefix):
        return [official_layers(leaves, prefix, f"pred_{name}") for name in ("logits", "boxes")]

    model = toy({"dab_detr": "dab", "deformable_detr": "two_stage", "dino": "dino"}[detector], decoder_layers=3)
    found, padded, noised = detections("out."), criterion.pad_targets(targets), None
    assigned = dict(zip(("aux0", "aux1", "last"), criterion.match(*found, padded, eps=model.eps)[0]))
    proposals = None
    if detector == "deformable_detr":
        proposals = models.Detections(*detections("out.enc_outputs."))
        objects = padded._replace(labels=0 * padded.labels)
        assigned["enc"] = criterion.match(proposals.logits, proposals.boxes, objects, eps=model.eps)[0][0]
    if detector == "dino":
        # These fixed proposals are more than the queries, which no model makes: their losses are taken apart.
        proposals = models.Detections(*(x[-1:].detach() for x in found))
        if info.get("dn_meta", {}).get("pad_size"):
            groups = info["dn_meta"]["num_dn_group"]
            noised = models.Denoising(*detections("out.dn_meta.output_known_lbs_bboxes."), groups,
                                      info["dn_meta"]["pad_size"] // (2 * groups))
    losses = model.loss(models.Output(None, models.Detections(*found), proposals, noised, None), targets)
    if detector == "dino":
        own = detections("out.interm_outputs.")
        pairs = criterion.match(*own, padded, eps=model.eps)
        apart = criterion.set_losses(*own, padded, *pairs, criterion.normaliser(padded.counts, "cpu"), model.eps)
        losses |= {f"loss_{name}_interm": x[0] for name, x in zip(("ce", "bbox", "giou"), apart)}
        assigned["interm"] = pairs[0][0]

    assert set(losses) == {name for name in info["losses"] if name.startswith(("loss_ce", "loss_bbox", "loss_giou"))}
    assert model.loss_weights == json.loads((VECTORS / f"loss_{detector}.json").read_text())["weight_dict"]
    for name, value in losses.items():
        assert value.item() == pytest.approx(info["losses"][name], rel=1e-5, abs=1e-6), name
    for name, query in assigned.items():
        for image, count in enumerate(padded.counts):
            source, target = tensors[f"match.{name}.{image}.src"], tensors[f"match.{name}.{image}.tgt"]
            assert torch.equal(query[image, :count][target], source)
    loss = total(model, losses)
    torch.testing.assert_close(loss, tensors["total"], rtol=1e-5, atol=1e-4)
    loss.backward()
    for key, leaf in leaves.items():
        theirs = tensors.get(f"grad.{key[4:]}", torch.zeros_like(leaf))
        close(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), theirs, 1e-5)


@needs_vectors
@pytest.mark.parametrize("detector, key, eps", [("dab_detr", "giou_eps1e-6", 1e-6), ("deformable_detr", "giou", 0.)])
def test_giou_equals_official(detector, key, eps):
    """Also of a box without extent; the eps are those of the models."""
    tensors = under(vectors(f"prims_{detector}"), "giou.")
    close(criterion.giou(tensors["b1_cxcywh"][:, None], tensors["b2_cxcywh"], eps), tensors[key], 5e-7)
    assert models.CLASSES[detector].eps == eps and models.Dino.eps == 1e-6


@needs_vectors
@pytest.mark.parametrize("case", [case for case in OFFICIAL if case != "dab_detr_3pat"])
def test_training_step_equals_official(official, case):
    """Losses, assignment, and the gradient of every parameter (only gradients can see a wrong detach); DINO with the
    official random draws, so its denoising outputs too."""
    model, weights, names = official(case)
    dino = case == "dino_4scale_eval"
    grads = vectors("dino_4scale_train_grads" if dino else f"{case}_grads")
    tensors = vectors("dino_4scale_train") if dino else grads
    info = json.loads((VECTORS / ("dino_4scale_train.json" if dino else f"{case}_grads.json")).read_text())
    targets = official_targets(tensors)
    noise = {"noise": official_noise([tensors[f"dn.draw.{x}"] for x in DRAWS], targets, 20)} if dino else {}
    out = model.train()(weights["images"], weights["mask"], targets, **noise)
    if dino:
        close(out.denoising.logits, official_layers(tensors, "out.dn.", "pred_logits"), 2e-5)
        close(out.denoising.boxes, official_layers(tensors, "out.dn.", "pred_boxes"), 2e-6)

    losses = model.loss(out, targets)
    # The official Deformable DETR also weighs the encoder's losses when it has none.
    assert model.loss_weights == {name: weight for name, weight in info["weight_dict"].items()
                                  if not name.endswith("_enc") or out.proposals is not None}
    assert set(losses) == set(model.loss_weights)
    for name, value in losses.items():
        torch.testing.assert_close(value, tensors[f"loss.{name}"], rtol=1e-5, atol=1e-5)
    loss = total(model, losses)
    torch.testing.assert_close(loss, tensors["total_loss"], rtol=1e-5, atol=1e-4)

    loss.backward()
    grads = {names[key]: value for key, value in under(grads, "grad.").items()}
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(grads) == set(trained)                                    # not the frozen stem and first stage
    for name, theirs in grads.items():
        size = theirs.norm()
        # Key biases, and DAB-DETR's first self-attention, whose values are all equal, have none but for rounding.
        assert (trained[name] - theirs).norm() < (1e-4 * size if size > 1e-4 else 2e-5), name

    wanted = criterion.pad_targets(targets)
    layers = {"aux0": (out.detections, 0), "last": (out.detections, -1), "interm": (out.proposals, 0)}
    if case == "deformable_detr_refine_two_stage":
        layers["enc"] = out.proposals, 0
    for name in {key.split(".")[1] for key in tensors if key.startswith("match.")}:
        found, layer = layers[name]
        objects = wanted._replace(labels=0 * wanted.labels) if name == "enc" else wanted
        query, _ = criterion.match(found.logits[[layer]], found.boxes[[layer]], objects, eps=model.eps)
        for image, count in enumerate(wanted.counts):
            source, target = tensors[f"match.{name}.{image}.src"], tensors[f"match.{name}.{image}.tgt"]
            assert torch.equal(query[0, image, :count][target], source)


# ------------------------------------------------------------------------------------------------------------ denoising

@pytest.mark.parametrize("number, objects, groups", [(100, 5, 20), (100, 60, 1), (100, 101, 1), (50, 5, 10),
                                                     (49, 5, 98), (1, 7, 2), (5, 0, 0)])
def test_denoising_group_counts(number, objects, groups):
    assert models.denoising_groups(number, objects) == groups


def test_denoising_by_hand():
    """Box (.5, .5, .2, .4), scale .4: corners move by (.04, .08) * 1/2 for the positive, * 3/2 for the negative."""
    targets = criterion.pad_targets([{"labels": torch.tensor([1]), "boxes": torch.tensor([[.5, .5, .2, .4]])}])
    noise = {"flip": torch.tensor([[[.3], [.2]]]), "label": torch.tensor([[[2], [2]]]),
             "sign": torch.tensor([-1, -1, 1, 1]).expand(1, 2, 1, 4), "shift": torch.full((1, 2, 1, 4), .5)}
    content, boxes = models.denoising_queries(targets, torch.eye(4), noise, 0.5, 0.4, 1e-3)
    torch.testing.assert_close(boxes, torch.tensor([[[.5, .5, .24, .48], [.5, .5, .32, .64]]]))
    assert content.argmax(-1).tolist() == [[1, 2]]                        # .3 keeps the label, .2 < .5 / 2 flips it


# --------------------------------------------------------------------------------------------------------------- losses

def test_giou_by_hand():
    """Two unit squares shifted by half: 0.5 / 1.5 - 0; apart by one: 0 - 1/3; equal: 1."""
    a = torch.tensor([.5, .5, 1., 1.])
    b = torch.tensor([[1., .5, 1., 1.], [2.5, .5, 1., 1.], [.5, .5, 1., 1.]])
    torch.testing.assert_close(criterion.giou(a, b), torch.tensor([1 / 3, -1 / 3, 1.]))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(7, 4, generator=generator), torch.rand(5, 4, generator=generator)
    corners = [torchvision.ops.box_convert(x, "cxcywh", "xyxy") for x in (a, b)]
    torch.testing.assert_close(criterion.giou(a[:, None], b), torchvision.ops.generalized_box_iou(*corners))


def test_losses_by_hand():
    """One object, two queries at logit 0. Focal: .25 * .5^2 * ln 2 for a positive, .75 * .5^2 * ln 2 for a negative."""
    logits = torch.zeros(1, 1, 2, 2)
    boxes = torch.tensor([[[[.5, .5, .4, .4], [.5, .5, .2, .2]]]])
    targets = criterion.pad_targets([{"labels": torch.tensor([1]), "boxes": torch.tensor([[.5, .5, .2, .2]])}])
    query, matched = criterion.match(logits, boxes, targets)
    assert query.tolist() == [[[1]]] and matched.all()
    focal, distance, overlap = criterion.set_losses(logits, boxes, targets, query, matched, 1.)
    ln2 = 0.6931472
    assert focal.item() == pytest.approx((0.0625 + 3 * 0.1875) * ln2)
    assert distance.item() == 0 and overlap.item() == pytest.approx(0, abs=1e-6)
    _, distance, overlap = criterion.set_losses(logits, boxes, targets, 0 * query, matched, 2.)
    assert distance.item() == pytest.approx(0.4 / 2)
    assert overlap.item() == pytest.approx(0.75 / 2)                      # IoU .04 / .16


def test_matching_costs_by_hand():
    """One query at logit 0 and one object: (.25 - .75) * .5^2 * ln 2 for the class, sides .2 apart, IoU .04 / .16."""
    targets = criterion.pad_targets([{"labels": torch.tensor([0]), "boxes": torch.tensor([[.5, .5, .2, .2]])}])
    boxes = torch.tensor([[[[.5, .5, .4, .4]]]])
    for weights in ((2., 5., 2.), (1., 0., 0.), (0., 1., 0.), (0., 0., 1.)):
        cost = criterion.matching_costs(torch.zeros(1, 1, 1, 1), boxes, targets, weights)
        assert cost.item() == pytest.approx(weights[0] * -0.125 * math.log(2) + weights[1] * 0.4 - weights[2] * 0.25)


def test_assignment_is_the_cheapest_of_all():
    """Against trying out every way to give 3 of 5 queries to the objects; a padded column does not count."""
    costs = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    costs[:, 1, :, 2] = -100.                                             # the second image has two objects only
    query, matched = criterion.assign(costs, [3, 2])
    assert matched.tolist() == [[[True] * 3, [True, True, False]]] * 2
    for layer in range(2):
        for image, count in enumerate([3, 2]):
            def price(queries):
                return sum(costs[layer, image, q, k].item() for k, q in enumerate(queries))
            found = query[layer, image, :count].tolist()
            assert len(set(found)) == count
            assert price(found) == min(map(price, itertools.permutations(range(5), count)))


def test_unmatched_pairs_cost_nothing_exactly():
    """Also not the 1e-6 that eps makes of two equal boxes."""
    logits, boxes = torch.zeros(1, 1, 2, 2), torch.rand(1, 1, 2, 4)
    targets = criterion.pad_targets([{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}])
    query, matched = criterion.match(logits, boxes, targets)
    _, distance, overlap = criterion.set_losses(logits, boxes, targets, query, matched & False, 1., eps=1e-6)
    assert distance.item() == 0 and overlap.item() == 0


def test_more_objects_than_queries():
    model = toy("dab", num_queries=2)
    images, padding, targets = random_batch(objects=(5, 0))
    out = model(images, padding, targets)
    _, matched = criterion.match(out.detections.logits, out.detections.boxes, criterion.pad_targets(targets))
    assert matched.sum((1, 2)).tolist() == [2, 2]
    assert total(model, model.loss(out, targets)).isfinite()


def test_padding_of_targets_does_not_enter_the_losses():
    """The same image beside one with many objects and beside an empty one: its part of the losses is the same."""
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 1, 6, 3, generator=generator), torch.rand(2, 1, 6, 4, generator=generator)
    _, _, (first, _) = random_batch(objects=(2, 0))
    _, _, (many, _) = random_batch(objects=(5, 0), seed=3)

    def losses(*targets):
        padded = criterion.pad_targets(targets)
        both = [x.repeat(1, len(targets), 1, 1) for x in (logits, boxes)]
        return torch.stack(criterion.set_losses(*both, padded, *criterion.match(*both, padded), 1.))
    torch.testing.assert_close(losses(first, many) - losses(many), losses(first))


def test_two_stages_train_every_token_as_an_object_of_class_0():
    """Whatever the labels: a proposal only says whether there is an object; other losses depend on the labels."""
    model = toy("two_stage")
    images, padding, targets = random_batch()
    out = model(images, padding, targets)
    assert out.proposals.logits.shape == (1, 2, 81, 3) and out.detections.logits.shape == (2, 2, 6, 3)
    relabelled = [t | {"labels": (t["labels"] + 1) % 3} for t in targets]
    first, second = model.loss(out, targets), model.loss(out, relabelled)
    assert all(torch.equal(first[f"loss_{kind}_enc"], second[f"loss_{kind}_enc"]) for kind in ("ce", "bbox", "giou"))
    assert first["loss_ce"] != second["loss_ce"]
    out.proposals.logits.data[..., 1:] += 1.                              # any other class is a wrong answer
    assert model.loss(out, targets)["loss_ce_enc"] > first["loss_ce_enc"]


def test_costs_and_losses_of_half_precision_predictions_are_float32():
    """Costs that bfloat16 would tie: the boxes differ by less than its steps at 0.5."""
    boxes = torch.tensor([[[[.5, .5, .2, .2], [.5001, .5, .2, .2]]]])
    targets = criterion.pad_targets([{"labels": torch.tensor([0]), "boxes": torch.tensor([[.5001, .5, .2, .2]])}])
    with torch.autocast("cpu", torch.bfloat16):
        costs = criterion.matching_costs(torch.zeros(1, 1, 2, 1), boxes, targets)
        pair = torch.ones(1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.bool)
        losses = criterion.set_losses(torch.zeros(1, 1, 2, 1).bfloat16(), boxes.bfloat16(), targets, *pair, 1.)
    assert costs.dtype == torch.float32 and costs[0, 0, 1, 0] < costs[0, 0, 0, 0]
    assert {x.dtype for x in losses} == {torch.float32}


@pytest.mark.parametrize("what", ["logits", "boxes", "target boxes"])
def test_non_finite_values_are_named(what):
    model = toy("dino").eval()
    images, padding, targets = random_batch()
    out = model(images, padding)
    if what == "target boxes":
        targets[1]["boxes"][0, 2] = float("nan")
    else:
        getattr(out.detections, what).data[1, 1] = float("nan")
    with pytest.raises(ValueError, match=f"image 1 .*not finite.*{what}") as error:
        model.loss(out, targets)
    assert "\n" not in str(error.value)


def test_normaliser_is_the_mean_over_processes(monkeypatch):
    """Two processes with 3 and 4 objects: both divide by 3.5; without objects anywhere by 1."""
    assert criterion.normaliser([3, 2], "cpu") == 5 and criterion.normaliser([0, 0], "cpu") == 1
    monkeypatch.setattr(criterion.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(criterion.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(criterion.dist, "all_reduce", lambda x: x.add_(4))
    assert criterion.normaliser([3], "cpu") == 3.5
    count = torch.tensor(-4.)                                             # a caller's own tensor stays as it is
    assert criterion.mean_over_processes(count, 0.25) == 0.25 and count == -4


# ------------------------------------------------------------------------------------------------------ every detector

@pytest.mark.parametrize("objects", [(0, 0), (0, 2)])
@pytest.mark.parametrize("variant, overrides", [*((variant, {}) for variant in VARIANTS), ("dino", dict(denoising=0)),
                                                ("dab", dict(feature_stride=8)), ("dab", dict(feature_stride=16))])
def test_every_parameter_stays_in_the_graph(variant, overrides, objects):
    """Without objects, without denoising, with a map that is not the last: distributed training would wait for a
    missing gradient."""
    model = toy(variant, **overrides).train()
    images, padding, targets = random_batch(objects=objects)
    losses = model.loss(model(images, padding, targets), targets)
    assert set(losses) == set(model.loss_weights)
    if objects == (0, 0):
        assert all(losses[name] == 0 for name in losses if "_dn" in name or "ce" not in name)
    total(model, losses).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@every
@pytest.mark.parametrize("layers", [dict(encoder_layers=0), dict(decoder_layers=1)])
def test_what_no_layer_reads_is_not_trained(variant, layers):
    """DDP stops at a parameter without a gradient."""
    model = toy(variant, **layers).train()
    images, padding, targets = random_batch()
    total(model, model.loss(model(images, padding, targets), targets)).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("variant", ["dab", "patterns", "plain", "refine"])
def test_bfloat16_autocast_moves_no_learned_query(variant):
    """In bfloat16's three digits, a reference point would move by pixels."""
    model = toy(variant).eval()
    images, padding, _ = random_batch()
    memory = model.encode(images, padding)
    queries, _ = model.learned_queries(memory)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = model.learned_queries(memory)
    assert torch.equal(again.boxes, queries.boxes)


@every
def test_bfloat16_autocast_keeps_places_boxes_and_losses_in_float32(variant):
    model = toy(variant).train()
    images, padding, targets = random_batch()
    noise = {"noise": models.denoising_noise(2, 4, 3, 3, "cpu")} if variant == "dino" else {}
    extra = random_extra()
    full = model.loss(model(images, padding, targets, extra, **noise), targets)
    with torch.autocast("cpu", torch.bfloat16), models.record(model) as seen:
        out = model(images, padding, targets, extra, **noise)
        losses = model.loss(out, targets)
    assert {x.dtype for r in seen.values() for x in (r.weights, r.points) if x is not None} == {torch.float32}
    found = out.detections.boxes, out.detections.logits, out.extra.boxes, *losses.values()
    assert {x.dtype for x in found} == {torch.float32}
    total(model, losses).backward()
    assert total(model, losses).item() == pytest.approx(total(model, full).item(), rel=0.1)


def to_fake_cuda(model, mode):
    """What model.to("cuda") does to parameters and buffers, which neither .to nor deepcopy does with fake tensors."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(mode.from_tensor(p).detach().to("cuda"), p.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, mode.from_tensor(buffer).to("cuda"))
    return model


@every
def test_on_fake_cuda_tensors(variant):
    """Device mistakes show without a GPU: model with denoising and extra queries, matching costs, losses."""
    model = fresh(variant).train()
    with FakeTensorMode() as mode:
        to_fake_cuda(model, mode)
        with torch.device("cuda"):
            images, padding = torch.randn(2, 3, 48, 80), torch.zeros(2, 48, 80, dtype=torch.bool)
            targets = [{"labels": torch.ones(n, dtype=torch.long), "boxes": torch.rand(n, 4)} for n in (3, 1)]
            extra = torch.randn(2, 5, 32), torch.rand(2, 5, 4), torch.ones(2, 5, 5, dtype=torch.bool), torch.ones(2, 5)
        out = model(images, padding, targets, extra)
        padded = criterion.pad_targets(targets)
        costs = criterion.matching_costs(out.detections.logits, out.detections.boxes, padded)
        query, matched = torch.zeros(2, 2, 3, dtype=torch.long, device="cuda"), padded.valid.expand(2, -1, -1)
        count = criterion.normaliser(padded.counts, images.device)
        losses = criterion.set_losses(out.detections.logits, out.detections.boxes, padded, query, matched, count)
        everything = [costs, *losses, out.detections.boxes, out.extra.boxes, out.memory.tokens]
        if variant == "dino":
            everything += [out.denoising.logits, *model.denoising_losses(out.denoising, padded, count)]
        everything.append(models.postprocess(out.detections, torch.ones(2, 2, device="cuda"), 5)[0]["boxes"])
        assert {x.device.type for x in everything} == {"cuda"} and costs.shape[-1] == 3


def test_dropout_acts_in_training_only():
    model = toy("plain", dropout=0.5).eval()
    images, padding, _ = random_batch()
    with torch.no_grad():
        first, second = (model(images, padding).detections.logits for _ in range(2))
        model.train()
        third, fourth = (model(images, padding).detections.logits for _ in range(2))
    assert torch.equal(first, second) and not torch.allclose(third, fourth)


@every
def test_parameter_groups_cover_every_trained_parameter_once(variant):
    """Deformable DETR moves its sampling offsets and reference points at a tenth of the rate, the others do not."""
    model = fresh(variant, frozen_backbone=True)
    rest, backbone, *slow = model.parameter_groups(1e-4, 3e-5)
    assert (rest["lr"], backbone["lr"]) == (1e-4, 3e-5)
    ids = [id(p) for group in (rest, backbone, *slow) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in backbone["params"]} <= {id(p) for p in model.backbone.parameters()}
    if model.detector == "deformable_detr":
        assert [group["lr"] for group in slow] == [pytest.approx(1e-5)]
        assert {id(p) for p in slow[0]["params"]} == \
            {id(p) for n, p in model.named_parameters() if "sampling_offsets" in n or n.startswith("reference.")}
    else:
        assert not slow
