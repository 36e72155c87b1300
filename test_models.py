"""models.py, criterion.py and checkpoints.py: against the official implementation's vectors where ../shared is at hand,
and by hand-worked numbers, oracles and invariants everywhere."""
import argparse
import json
import os
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

import checkpoints
import criterion
import models

VECTORS = Path(os.environ.get("SHARED", Path(__file__).parent.parent / "shared")) / "vectors"
needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="the official vectors are not here")
TINY = dict(hidden_dim=64, heads=8, ffn_dim=96, encoder_layers=2, decoder_layers=2, num_queries=30)
DRAWS = ("0.rand_like", "1.randint_like", "2.randint_like", "3.rand_like")      # of denoising, in official order
TOY = dict(backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=32, heads=4, ffn_dim=48,
           encoder_layers=1, decoder_layers=2, num_queries=6, feature_levels=3, points=2, denoising=2)


def vectors(name):
    from safetensors.torch import load_file
    return load_file(VECTORS / f"{name}.safetensors")


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def under(tensors, prefix):
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def official_dino(monkeypatch, **overrides):
    """The tiny official model, its backbone (a reduced ResNet) included."""
    monkeypatch.setitem(models.RESNETS, "tiny", (Bottleneck, (2, 1, 1, 1)))
    tensors = vectors("dino_4scale_eval")
    model = models.build("dino", 91, backbone=models.ResNet("tiny", 4, frozen=True), **TINY, **overrides)
    report = checkpoints.load_weights(model, under(tensors, "state_dict."))
    assert not report.missing and not report.skipped and not report.resized
    return model, tensors


def official_targets(tensors, prefix="targets."):
    return [{"labels": tensors[f"{prefix}{i}.labels"], "boxes": tensors[f"{prefix}{i}.boxes"]} for i in range(2)]


def official_layers(tensors, prefix, name):
    count = sum(key.startswith(f"{prefix}aux_outputs.") and key.endswith(name) for key in tensors)
    return torch.stack([tensors[f"{prefix}aux_outputs.{i}.{name}"] for i in range(count)] + [tensors[prefix + name]])


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


def random_batch(batch=2, objects=(3, 1), classes=3, height=48, width=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, height, width, generator=generator)
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    padding[-1, :, width - 16:] = True
    targets = [{"labels": torch.randint(classes, (n,), generator=generator),
                "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.2} for n in objects]
    return images, padding, targets


def toy(seed=0, classes=3, **overrides):
    """A small model in which no output is constant: fresh heads and offsets are zero."""
    torch.manual_seed(seed)
    model = models.build("dino", classes, **{**TOY, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def random_extra(model, batch=2, queries=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(batch, queries, model.label_embedding.shape[1], generator=generator)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.2
    attend = (torch.rand(batch, queries, queries, generator=generator) < 0.5) | torch.eye(queries, dtype=torch.bool)
    return content, boxes, attend, torch.ones(batch, queries, dtype=torch.bool)


def total(model, losses):
    return sum(model.loss_weights[name] * value for name, value in losses.items())


# ------------------------------------------------------------------------------------------------- the official vectors

@needs_vectors
@pytest.mark.parametrize("case", ["eval", "invalid"])
def test_forward_equals_official(monkeypatch, case):
    """Every layer; in the second case padded tokens win the selection and the eps of inverse_sigmoid matters."""
    model, tensors = official_dino(monkeypatch)
    images, mask = tensors["images"], tensors["mask"]
    if case == "invalid":
        tensors = vectors("dino_4scale_invalid")
        model.proposals.class_head.weight.data = tensors["changed.transformer.enc_out_class_embed.weight"]
    with torch.no_grad():
        out = model.eval()(images, mask)
    if case == "eval":
        close(out.memory.tokens, tensors["inter.memory"], 1e-5)
        close(out.memory.valid_ratios, tensors["inter.dec_in.valid_ratios"], 1e-6)
        detections = models.postprocess(out.detections, tensors["post.target_sizes"], 40)
        for i, found in enumerate(detections):
            close(found["scores"], tensors[f"post.{i}.scores"], 1e-5)
            assert torch.equal(found["labels"], tensors[f"post.{i}.labels"])
            close(found["boxes"], tensors[f"post.{i}.boxes"], 5e-4)      # pixels
    close(out.detections.logits, official_layers(tensors, "out.", "pred_logits"), 2e-5)
    close(out.detections.boxes, official_layers(tensors, "out.", "pred_boxes"), 2e-6)
    close(out.proposals.logits[0], tensors["out.interm_outputs.pred_logits"], 2e-5)
    close(out.proposals.boxes[0], tensors["out.interm_outputs.pred_boxes"], 2e-6)


@needs_vectors
def test_full_size_forward_equals_official():
    """R50, 256 wide, 6 + 6 layers; the weights are a function of their official names (VECTORS.md)."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("helpers", VECTORS / "helpers.py")
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    tensors = vectors("full_dino_4scale_r50")
    model = models.build("dino", 91, pretrained_backbone=False, num_queries=30).eval()
    report = checkpoints.load_weights(model, helpers.full_state_dict(VECTORS / "full_dino_4scale_r50.json"))
    assert not report.missing and not report.skipped
    with torch.no_grad():
        out = model(tensors["images"], tensors["mask"])
    close(out.memory.tokens, tensors["inter.memory"], 2e-5)
    close(out.detections.logits, official_layers(tensors, "out.", "pred_logits"), 2e-5)
    close(out.detections.boxes, official_layers(tensors, "out.", "pred_boxes"), 2e-6)


@needs_vectors
def test_training_step_equals_official(monkeypatch):
    """With the official random draws: denoising outputs, losses, assignment, and the gradient of every parameter (only
    gradients can see a wrong detach)."""
    model, weights = official_dino(monkeypatch)
    tensors = vectors("dino_4scale_train")
    grads = {checkpoints.rename(key[5:], checkpoints.OFFICIAL_DINO): value
             for key, value in vectors("dino_4scale_train_grads").items() if key.startswith("grad.")}
    targets = official_targets(tensors)
    draws = [tensors[f"dn.draw.{name}"] for name in DRAWS]
    out = model.train()(weights["images"], weights["mask"], targets, noise=official_noise(draws, targets, 20))
    close(out.denoising.logits, official_layers(tensors, "out.dn.", "pred_logits"), 2e-5)
    close(out.denoising.boxes, official_layers(tensors, "out.dn.", "pred_boxes"), 2e-6)
    close(out.detections.logits, official_layers(tensors, "out.", "pred_logits"), 2e-5)
    losses = model.loss(out, targets)
    assert model.loss_weights == json.loads((VECTORS / "dino_4scale_train.json").read_text())["weight_dict"]
    assert set(losses) == set(model.loss_weights)
    for name, value in losses.items():
        torch.testing.assert_close(value, tensors[f"loss.{name}"], rtol=1e-5, atol=1e-5)
    loss = total(model, losses)
    torch.testing.assert_close(loss, tensors["total_loss"], rtol=1e-5, atol=1e-4)
    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        theirs = grads.get(name)
        if theirs is None:
            assert not parameter.requires_grad, name                     # the frozen stem and first stage
        elif theirs.norm() > 1e-4:
            compared += 1
            assert (parameter.grad - theirs).norm() / theirs.norm() < 1e-4, name
    assert compared > 90

    wanted = criterion.pad_targets(targets)
    logits = torch.cat([out.detections.logits, out.proposals.logits])
    boxes = torch.cat([out.detections.boxes, out.proposals.boxes])
    query, _ = criterion.match(logits, boxes, wanted, eps=1e-6)
    for layer, name in enumerate(("aux0", "last", "interm")):
        for image, count in enumerate(wanted.counts):
            source, target = tensors[f"match.{name}.{image}.src"], tensors[f"match.{name}.{image}.tgt"]
            assert torch.equal(query[layer, image, :count][target], source)


@needs_vectors
@pytest.mark.parametrize("case", ["a", "b_onezero", "c_allzero", "d_eval_no_dn"])
def test_losses_equal_official(case):
    """3 + 5, 0 + 4 and 0 + 0 targets, and no denoising; values, total, and the gradient of every input."""
    info = json.loads((VECTORS / "loss_dino.json").read_text())["cases"][case]
    tensors = under(vectors("loss_dino"), f"{case}.")
    targets = official_targets(tensors)
    leaves = {key: value.requires_grad_() for key, value in tensors.items() if key.startswith("out.")}

    def detections(prefix):
        return official_layers(leaves, prefix, "pred_logits"), official_layers(leaves, prefix, "pred_boxes")

    noised, meta = None, info["dn_meta"]
    if meta.get("pad_size"):
        groups = meta["num_dn_group"]
        known = detections("out.dn_meta.output_known_lbs_bboxes.")
        noised = models.Denoising(*known, groups, meta["pad_size"] // (2 * groups))
    found, proposals = detections("out."), detections("out.interm_outputs.")
    # These fixed proposals are more than the queries, which no model makes: their losses are taken apart.
    placeholder = models.Detections(*(x[-1:].detach() for x in found))
    out = models.Output(None, models.Detections(*found), placeholder, noised, None)
    model = toy(decoder_layers=3)
    losses, padded = model.loss(out, targets), criterion.pad_targets(targets)
    pairs = criterion.match(*proposals, padded, eps=model.eps)
    interm = criterion.set_losses(*proposals, padded, *pairs, criterion.normaliser(padded.counts, "cpu"), model.eps)
    losses |= {f"loss_{name}_interm": x[0] for name, x in zip(("ce", "bbox", "giou"), interm)}
    assert set(losses) == {name for name in info["losses"] if name.startswith(("loss_ce", "loss_bbox", "loss_giou"))}
    for name, value in losses.items():
        assert value.item() == pytest.approx(info["losses"][name], rel=1e-5, abs=1e-6), name
    loss = total(model, losses)
    torch.testing.assert_close(loss, tensors["total"], rtol=1e-5, atol=1e-4)
    loss.backward()
    for key, leaf in leaves.items():
        theirs = tensors["grad." + key[4:]] if "grad." + key[4:] in tensors else torch.zeros_like(leaf)
        close(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), theirs, 1e-5)


@needs_vectors
@pytest.mark.parametrize("case", ["a", "b_onezero", "c_small_dn_number", "d_many", "e_nonoise", "f_allzero",
                                  "g_more_than_100"])
def test_denoising_queries_equal_official(case):
    info = json.loads((VECTORS / "prims_dino.json").read_text())["cdn"][case]
    every = vectors("prims_dino")
    tensors, embedding = under(every, f"cdn.{case}."), every["cdn.label_enc"]
    targets = official_targets(tensors)
    padded = criterion.pad_targets(targets)
    objects = padded.labels.shape[1]
    groups = models.denoising_groups(info["dn_number"], objects)
    mask = models.Dino.attention_groups(10, groups, objects, None, "cpu")
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


@needs_vectors
def test_primitives_equal_official():
    t, deformable = vectors("prims_dino"), vectors("prims_deformable_detr")
    for width in (8, 32):
        for temperature, offset, theirs in ((20., 0., t[f"pe.sineHW_T20_n{width}"]),
                                            (10000., -0.5, deformable[f"pe.sine_T10000_half_n{width}"])):
            ours = models.image_positions(t["pe.mask"], 2 * width, temperature, offset)
            close(ours.permute(0, 3, 1, 2), theirs, 2e-6)
    close(models.inverse_sigmoid(t["inverse_sigmoid.x"], 1e-3), t["inverse_sigmoid.y_eps1e-3"], 1e-6)
    close(models.inverse_sigmoid(t["inverse_sigmoid.x"], 1e-5), deformable["inverse_sigmoid.y_eps1e-5"], 1e-5)
    close(models.box_positions(t["sineembed.pos"], 128), t["sineembed.d256_4"], 1e-5)
    close(models.box_positions(t["sineembed.pos"], 32), t["sineembed.d64_4"], 1e-5)
    shapes = [tuple(t[f"vr.mask.{i}"].shape[1:]) for i in range(4)]
    ours = models.token_centres(shapes, t["vr.valid_ratios"])[:, :, None] * t["vr.valid_ratios"][:, None]
    close(ours, t["vr.encoder_reference_points"], 1e-6)
    dab = vectors("prims_dab_detr")
    for tensors, key, eps in ((dab, "giou.giou_eps1e-6", 1e-6), (deformable, "giou.giou", 0.)):
        ours = criterion.giou(tensors["giou.b1_cxcywh"][:, None], tensors["giou.b2_cxcywh"], eps)
        close(ours, tensors[key], 2e-6)


@needs_vectors
def test_deformable_attention_equals_official():
    t = under(vectors("prims_deformable_detr"), "msda.")
    attention = models.DeformableAttention(32, 4, 3, 2)
    attention.load_state_dict(under(t, "state_dict."))
    shapes = [tuple(s) for s in t["spatial_shapes"].tolist()]
    seen = {}
    attention.recorder = lambda points, weights: seen.update(points=points, weights=weights)
    point, box = t["ref2.reference_points"], t["ref4.reference_points"]
    cell = 1 / t["spatial_shapes"].flip(1)[None, None]
    for name, centre, unit in (("ref2", point, cell), ("ref4", box[..., :2], box[..., 2:] * 0.5 / 2)):
        out = attention(t["query"], centre, unit, t["input_flatten"], t["padding_mask"], shapes)
        close(out, t[f"{name}.out"], 1e-5)
        close(seen["points"], t[f"{name}.sampling_locations"], 1e-5)
        close(seen["weights"], t[f"{name}.attention_weights"], 1e-6)


@needs_vectors
def test_initialisation_has_the_official_distribution():
    """Tensor by tensor: mean, spread and range of the official initialisation at full size, and constants exactly."""
    stats = json.loads((VECTORS / "init_stats_dino_4scale_r50.json").read_text())
    torch.manual_seed(0)
    state = models.build("dino", 91, pretrained_backbone=False).state_dict()
    checked = set()
    for key, want in stats.items():
        if ".body." in key:
            continue
        ours = state[checkpoints.rename(key, checkpoints.OFFICIAL_DINO)]
        checked.add(checkpoints.rename(key, checkpoints.OFFICIAL_DINO))
        assert list(ours.shape) == want["shape"], key
        if want["std"] == 0 or "sampling_offsets" in key:
            assert (ours.min().item(), ours.max().item()) == pytest.approx((want["min"], want["max"]), abs=1e-4), key
            assert ours.std().item() == pytest.approx(want["std"], abs=1e-4), key
        else:
            n = ours.numel()
            assert abs(ours.mean().item() - want["mean"]) < 7 * want["std"] / n ** 0.5 + 1e-5, key
            assert abs(ours.std().item() / want["std"] - 1) < 0.02 + 6 / n ** 0.5, key
            normal = want["max"] > 3 * want["std"]                       # a uniform one reaches sqrt(3) spreads
            assert (ours.max() > 2.4 * ours.std()).item() == normal, key
    assert checked == {name for name in state if not name.startswith("backbone.")}
    assert torch.equal(state["decoder.class_head.weight"], state["proposals.class_head.weight"])


# --------------------------------------------------------------------------------------- attention, positions, backbone

def test_sampling_by_hand():
    """A 2x3 map of 0..5: between four cells is their mean; outside is zero, so the edge is half the border cell."""
    value = torch.arange(6.).view(1, 6, 1, 1)
    # The corner of cells 0, 1, 3 and 4; the centre of cell 0; its left edge; far outside.
    places = torch.tensor([[1 / 3, 1 / 2], [1 / 6, 1 / 4], [0., 1 / 4], [-1., 0.5]])
    points = places.view(1, 4, 1, 1, 1, 2)
    out = models.deformable_sample(value, [(2, 3)], points, torch.ones(1, 4, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([2., 0., 0., 0.]))
    out = models.deformable_sample(value + 1, [(2, 3)], points, torch.full((1, 4, 1, 1, 1), 0.5))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5, 0.5, 0.25, 0.]))


def test_sampling_against_a_plain_loop():
    torch.manual_seed(0)
    shapes, heads, count = [(3, 5), (2, 2)], 2, 3
    value = torch.randn(2, 19, heads, 4, dtype=torch.double)
    points = torch.rand(2, 4, heads, 2, count, 2, dtype=torch.double) * 1.4 - 0.2
    weights = torch.rand(2, 4, heads, 2, count, dtype=torch.double)
    expected = torch.zeros(2, 4, heads, 4, dtype=torch.double)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, (2, 4, heads, 2, count))).tolist():
        height, width = shapes[level]
        grid = value[b, 15 * level:15 * level + height * width, h].view(height, width, 4)
        x, y = points[b, q, h, level, p].tolist()
        for row in range(height):
            for column in range(width):          # bilinear = product of two hat functions
                hat = max(0, 1 - abs(x * width - 0.5 - column)) * max(0, 1 - abs(y * height - 0.5 - row))
                expected[b, q, h] += weights[b, q, h, level, p] * hat * grid[row, column]
    torch.testing.assert_close(models.deformable_sample(value, shapes, points, weights), expected.flatten(2))


def test_sampling_gradients():
    torch.manual_seed(0)
    value = torch.randn(1, 6, 2, 3, dtype=torch.double, requires_grad=True)
    points = (torch.rand(1, 2, 2, 1, 2, 2, dtype=torch.double) * 0.8 + 0.1).requires_grad_()
    weights = torch.rand(1, 2, 2, 1, 2, dtype=torch.double, requires_grad=True)
    def sample(value, points, weights):
        return models.deformable_sample(value, [(2, 3)], points, weights)
    assert torch.autograd.gradcheck(sample, (value, points, weights))


def test_padded_pixels_and_batch_mates_change_nothing():
    """What lies under the padding mask is never seen, except through the backbone's own receptive field."""
    model = toy().eval()
    torch.manual_seed(0)
    maps = [torch.randn(2, c, 48 // s, 80 // s) for c, s in zip(model.backbone.channels, (8, 16, 32))]
    padding = torch.zeros(2, 48, 80, dtype=torch.bool)
    padding[1, :, 48:] = True
    with torch.no_grad():
        both = model.encoder(maps, padding)
        alone = model.encoder([m[1:] for m in maps], padding[1:])
        close(both.tokens[1:], alone.tokens, 1e-5)
        queries = torch.randn(1, 3, 32), torch.rand(1, 3, 4) * 0.5 + 0.2
        before = model.decode(alone, *queries)
        alone.tokens[alone.padding] = 1e3
        close(model.decode(alone, *queries).boxes, before.boxes, 0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("frozen", [False, True])
def test_backbone_equals_torchvision(name, frozen):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval().double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    ours = models.ResNet(name, frozen=frozen).eval().double()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    if frozen:
        assert [n for n, p in ours.named_parameters() if not p.requires_grad] == \
            [n for n, _ in ours.named_parameters() if n.startswith(("conv1", "layer1"))]
    ours.load_state_dict(state)
    images = torch.randn(1, 3, 64, 96, dtype=torch.double)
    x = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))
    with torch.no_grad():
        for mine, stage, channels in zip(ours(images), (theirs.layer2, theirs.layer3, theirs.layer4), ours.channels):
            x = stage(x)
            assert mine.shape == x.shape and mine.shape[1] == channels
            torch.testing.assert_close(mine, x)


def test_pretrained_backbone_from_a_file_freezes_stem_and_norms(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "r18.pth")
    model = models.build("dino", 3, **{**TOY, "backbone_width": 64, "pretrained_backbone": str(tmp_path / "r18.pth")})
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert not model.backbone.conv1.weight.requires_grad and model.backbone.layer2[0].conv1.weight.requires_grad
    assert model.config["frozen_backbone"] and model.config["pretrained_backbone"] is False
    scratch = models.build("dino", 3, **TOY)
    assert all(p.requires_grad for p in scratch.parameters())


@pytest.mark.parametrize("overrides, message", [
    ({"pretrained_backbone": True}, "backbone_width 8"),
    ({"pretrained_backbone": "missing.pth"}, "pretrained_backbone=False"),
    ({"backbone": "resnet20"}, "resnet18"),
    ({"num_querys": 3}, "num_queries"),
    ({"heads": 5}, "heads"),
    ({"feature_levels": 0}, "feature_levels"),
])
def test_wrong_options_are_one_line_errors(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        models.build("dino", 3, **{**TOY, **overrides})
    assert "\n" not in str(error.value)


def test_no_network_is_an_error_that_names_both_remedies(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("unreachable")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match="pretrained_backbone=FILE.*pretrained_backbone=False") as error:
        models.build("dino", 3, **{**TOY, "backbone_width": 64, "pretrained_backbone": True})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["dab_detr", "deformable_detr", "detr"])
def test_other_detectors_are_refused(name):
    with pytest.raises(ValueError, match="dino"):
        models.build(name, 3)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_any_number_of_levels(levels):
    model = toy(feature_levels=levels)
    images, padding, targets = random_batch()
    out = model(images, padding, targets)
    sizes = [(6, 10), (3, 5), (2, 3), (1, 2), (1, 1)]                    # strides 8, 16, 32, then halved
    assert out.memory.shapes == (sizes[3 - levels:3] if levels <= 3 else sizes[:levels])
    total(model, model.loss(out, targets)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


# ------------------------------------------------------------------------------------------------ one pass, many groups

def test_config_rebuilds_the_architecture():
    model = toy()
    assert json.loads(json.dumps(model.config)) == model.config
    again = models.build(model.detector, model.num_classes, **model.config)
    again.load_state_dict(model.state_dict())


def test_extra_and_denoising_queries_change_nothing_for_the_learned_ones():
    model = toy().eval()
    images, padding, targets = random_batch()
    extra = random_extra(model)
    with torch.no_grad():
        plain = model(images, padding)
        with_extra = model(images, padding, extra=extra)
        model.training = True                                             # denoising on, BatchNorm still in eval mode
        joint = model(images, padding, targets, extra=extra)
        alone = model.decode(plain.memory, *extra[:3])
    assert plain.extra is None and plain.denoising is None
    assert joint.denoising.boxes.shape[2] == 2 * joint.denoising.groups * 3
    for out in (with_extra, joint):
        close(out.detections.logits, plain.detections.logits, 1e-5)
        close(out.detections.boxes, plain.detections.boxes, 1e-6)
        close(out.extra.logits, alone.logits, 1e-5)
        close(out.extra.boxes, alone.boxes, 1e-6)


def test_attend_is_obeyed_and_padded_extra_rows_reach_no_other_row():
    model = toy().eval()
    images, padding, _ = random_batch()
    content, boxes, _, valid = random_extra(model)
    attend = torch.eye(5, dtype=torch.bool).expand(2, -1, -1).clone()
    attend[:, :4, :4] = True                                              # the last row is padding, alone with itself
    with torch.no_grad():
        memory = model.encode(images, padding)
        before = model.decode(memory, content, boxes, attend)
        content[:, 4], boxes[:, 4] = 9., 0.9
        after = model.decode(memory, content, boxes, attend)
        free = model.decode(memory, content, boxes)
    assert torch.equal(before.logits[:, :, :4], after.logits[:, :, :4])
    assert not torch.allclose(before.logits[:, :, 4], after.logits[:, :, 4])
    assert not torch.allclose(free.logits[:, :, :4], after.logits[:, :, :4])


def test_groups_by_hand():
    """2 groups of 2 * 1 slots, 2 learned, 1 extra: who may look at whom."""
    extra = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), None, None
    attend = models.Dino.attention_groups(2, 2, 1, extra, "cpu")[0].int().tolist()
    assert attend == [[1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0],
                      [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]]


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


@pytest.mark.parametrize("objects, denoising", [((0, 0), 2), ((0, 2), 2), ((1, 2), 0)])
def test_every_parameter_stays_in_the_graph(objects, denoising):
    """Without objects, without denoising: distributed training would wait for a missing gradient."""
    model = toy(denoising=denoising).train()
    images, padding, targets = random_batch(objects=objects)
    losses = model.loss(model(images, padding, targets), targets)
    assert set(losses) == set(model.loss_weights)
    if objects == (0, 0):
        assert all(losses[name] == 0 for name in losses if "_dn" in name or "ce" not in name)
    total(model, losses).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_no_queries_keep_the_graph():
    model = toy()
    images, padding, _ = random_batch()
    memory = model.encode(images, padding)
    content = torch.zeros(2, 0, 32, requires_grad=True)
    none = model.decode(memory, content, torch.zeros(2, 0, 4), torch.zeros(2, 0, 0, dtype=torch.bool))
    assert none.logits.shape == (2, 2, 0, 3) and none.boxes.shape == (2, 2, 0, 4)
    (none.logits.sum() + none.boxes.sum()).backward()
    assert model.decoder.class_head.weight.grad is not None and model.backbone.conv1.weight.grad is not None
    extra = content, torch.zeros(2, 0, 4), torch.zeros(2, 0, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool)
    assert model(images, padding, extra=extra).extra.boxes.shape == (2, 2, 0, 4)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_and_more_queries_than_tokens(classes):
    model = toy(classes=classes, num_queries=500)
    images, padding, targets = random_batch(classes=classes)
    out = model(images, padding, targets)
    assert out.detections.logits.shape == (2, 2, 81, classes)             # 6 * 10 + 3 * 5 + 2 * 3 tokens
    total(model, model.loss(out, targets)).backward()
    found = models.postprocess(out.detections, [(100, 200), (50, 50)], 10000)
    assert all(len(f["scores"]) == 81 * classes for f in found)


def test_positions_are_refused():
    model = toy()
    with pytest.raises(ValueError, match="position=None"):
        model.decode(None, None, None, position=torch.zeros(1))


def test_a_reference_gets_gradient_from_its_own_layer_only():
    """What is predicted depends on the reference box, where the layer looks and all later layers start is detached."""
    model = toy(decoder_layers=2)
    images, padding, _ = random_batch()
    memory = model.encode(images, padding)
    boxes = (torch.rand(2, 4, 4) * 0.4 + 0.3).requires_grad_()
    content = torch.randn(2, 4, 32)
    out = model.decode(memory, content, boxes)
    through_first, = torch.autograd.grad(out.boxes[0].sum(), boxes, retain_graph=True)
    through_second, = torch.autograd.grad(out.boxes[1].sum(), boxes)
    assert through_first.abs().min() > 0 and through_second.abs().max() == 0


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


def test_unmatched_pairs_cost_nothing_exactly():
    """Also not the 1e-6 that eps makes of two equal boxes."""
    logits, boxes = torch.zeros(1, 1, 2, 2), torch.rand(1, 1, 2, 4)
    targets = criterion.pad_targets([{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}])
    query, matched = criterion.match(logits, boxes, targets)
    _, distance, overlap = criterion.set_losses(logits, boxes, targets, query, matched & False, 1., eps=1e-6)
    assert distance.item() == 0 and overlap.item() == 0


def test_more_objects_than_queries():
    model = toy(num_queries=2, denoising=0)
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


@pytest.mark.parametrize("what", ["logits", "boxes", "target boxes"])
def test_non_finite_values_are_named(what):
    model = toy().eval()
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


def test_bfloat16_autocast_keeps_places_boxes_and_losses_in_float32():
    model = toy().train()
    images, padding, targets = random_batch()
    noise = models.denoising_noise(2, 4, 3, 3, "cpu")
    extra = random_extra(model)
    full = model.loss(model(images, padding, targets, extra, noise), targets)
    with torch.autocast("cpu", torch.bfloat16), models.record(model) as seen:
        out = model(images, padding, targets, extra, noise)
        losses = model.loss(out, targets)
    assert {seen[key].points.dtype for key in seen} == {torch.float32}
    found = out.detections.boxes, out.detections.logits, out.extra.boxes, *losses.values()
    assert {x.dtype for x in found} == {torch.float32}
    total(model, losses).backward()
    assert total(model, losses).item() == pytest.approx(total(model, full).item(), rel=0.1)


def test_sampling_places_are_the_same_under_autocast():
    """Offsets too, not only the sum: bfloat16 would move a point by up to 1/256 of its offset."""
    torch.manual_seed(0)
    attention, seen = models.DeformableAttention(32, 4, 2, 2), []
    nn.init.normal_(attention.sampling_offsets.weight)
    attention.recorder = lambda points, weights: seen.append((points, weights))
    tokens, centre = torch.randn(1, 10, 32), torch.rand(1, 10, 2, 2)
    unit, padding = torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 10, dtype=torch.bool)
    inputs = tokens, centre, unit, tokens, padding, [(2, 4), (1, 2)]
    attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*inputs).dtype == torch.bfloat16
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


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


def test_on_fake_cuda_tensors():
    """Device mistakes show without a GPU: model with denoising and extra queries, matching costs, losses."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = models.build("dino", 3, **TOY).train()
            images, padding = torch.randn(2, 3, 48, 80), torch.zeros(2, 48, 80, dtype=torch.bool)
            targets = [{"labels": torch.ones(n, dtype=torch.long), "boxes": torch.rand(n, 4)} for n in (3, 1)]
            extra = torch.randn(2, 5, 32), torch.rand(2, 5, 4), torch.ones(2, 5, 5, dtype=torch.bool), torch.ones(2, 5)
        out = model(images, padding, targets, extra)
        padded = criterion.pad_targets(targets)
        costs = criterion.matching_costs(out.detections.logits, out.detections.boxes, padded)
        query, matched = torch.zeros(2, 2, 3, dtype=torch.long, device="cuda"), padded.valid.expand(2, -1, -1)
        count = criterion.normaliser(padded.counts, images.device)
        losses = criterion.set_losses(out.detections.logits, out.detections.boxes, padded, query, matched, count)
        losses += model.denoising_losses(out.denoising, padded, count)
        found = models.postprocess(out.detections, torch.ones(2, 2, device="cuda"), 5)
        everything = [costs, *losses, out.detections.boxes, out.denoising.logits, out.extra.boxes, out.memory.tokens,
                      found[0]["boxes"]]
        assert {x.device.type for x in everything} == {"cuda"} and costs.shape == (2, 2, 6, 3)


def test_parameter_groups_cover_every_trained_parameter_once():
    model = models.build("dino", 3, **{**TOY, "frozen_backbone": True})
    rest, backbone = model.parameter_groups(1e-4, 1e-5)
    assert (rest["lr"], backbone["lr"]) == (1e-4, 1e-5)
    ids = [id(p) for p in rest["params"] + backbone["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in backbone["params"]} <= {id(p) for p in model.backbone.parameters()}


# --------------------------------------------------------------------------------------- postprocess, record and gflops

def test_postprocess_by_hand():
    """Two queries, two classes; the best pairs are (query 1, class 0), then (query 0, class 1); height 10, width 20."""
    logits = torch.tensor([[[[-2., 1.], [2., -3.]]]])
    boxes = torch.tensor([[[[.5, .5, 1., 1.], [.25, .5, .5, .2]]]])
    found, = models.postprocess(models.Detections(logits, boxes), torch.tensor([[10, 20]]), 2)
    torch.testing.assert_close(found["scores"], torch.tensor([2., 1.]).sigmoid())
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["boxes"], torch.tensor([[0., 4., 10., 6.], [0., 0., 20., 10.]]))


def test_record_collects_points_and_weights_and_then_stops():
    model = toy().eval()
    images, padding, _ = random_batch()
    with models.record(model) as seen:
        out = model(images, padding)
    assert set(seen) == {"encoder.0", "decoder.0", "decoder.1"}
    assert seen["encoder.0"].points.shape == (2, out.memory.tokens.shape[1], 4, 3, 2, 2)
    assert seen["decoder.1"].weights.shape == (2, 6, 4, 3, 2)
    torch.testing.assert_close(seen["decoder.0"].weights.sum((-1, -2)), torch.ones(2, 6, 4))
    assert all(m.recorder is None for m in model.modules() if isinstance(m, models.DeformableAttention))
    model(images, padding)
    assert len(seen) == 3 and not seen["encoder.0"].points.requires_grad


def test_recorded_points_are_where_a_fresh_model_looks():
    """Untrained, head 0 looks to the right of a token's own centre, point p at p + 1 cells of each level."""
    model = models.build("dino", 3, **TOY).eval()
    images, padding, _ = random_batch()
    with models.record(model) as seen, torch.no_grad():
        model(images, padding)
    points = seen["encoder.0"].points[0, 12, 0]                           # row 1, column 2 of the 6x10 level
    expected = torch.tensor([[[2.5 / 10 + (p + 1) / w, 1.5 / 6] for p in range(2)] for w in (10, 5, 3)])
    torch.testing.assert_close(points, expected)


def test_gflops_by_hand():
    """What the layers of a tiny model must cost in multiply-adds, added up from their shapes."""
    model = models.build("dino", 3, backbone=Maps(), hidden_dim=8, heads=2, ffn_dim=16, encoder_layers=1,
                         decoder_layers=1, num_queries=3, feature_levels=1, points=2, denoising=0)
    s, q, d, f, c, points = 4, 3, 8, 16, 3, 2 * 2                         # 2x2 tokens; heads * points

    def deformable(queries):       # value, offsets and weights, samples (d / heads channels a point), output
        return s * d * d + queries * d * 3 * points + queries * points * (d // 2) * 5 + queries * d * d
    box = 2 * d * d + 4 * d
    encoder = s * 5 * d + deformable(s) + s * 2 * d * f
    proposals = s * d * d + s * d * c + q * box
    self_attention = 4 * q * d * d + 2 * q * q * d
    decoder = q * (2 * d * d + d * d) + self_attention + deformable(q) + q * 2 * d * f + q * box + q * d * c
    assert models.gflops(model, 64, 64) * 1e9 == encoder + proposals + decoder


class Maps(nn.Module):
    """A user's own backbone: one map of 5 channels at stride 32."""
    channels = [5]

    def forward(self, images):
        return [F.avg_pool2d(images[:, :1], 32).expand(-1, 5, -1, -1)]


# ---------------------------------------------------------------------------------------------------------- checkpoints

def payload(model, **more):
    return {"model": model.state_dict(), "detector": "dino", "config": model.config, "classes": ["a", "b", "c"], **more}


@pytest.mark.parametrize("name", ["last.pth", "weights.safetensors"])
def test_save_and_load_round_trip(tmp_path, name):
    model, other = toy(seed=0), toy(seed=1)
    checkpoints.save(tmp_path / "deep" / name, payload(model, step=7))
    loaded = checkpoints.load(tmp_path / "deep" / name)
    assert loaded["config"] == model.config and loaded["step"] == 7 and loaded["classes"] == ["a", "b", "c"]
    report = checkpoints.load_weights(other, tmp_path / "deep" / name)
    assert not report.missing and not report.skipped and not report.resized
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert [f.name for f in (tmp_path / "deep").iterdir()] == [name]      # no temporary file left


def test_half_precision_weights(tmp_path):
    model, other = toy(seed=0), toy(seed=1)
    checkpoints.save(tmp_path / "half.safetensors", payload(model), half=True)
    checkpoints.load_weights(other, tmp_path / "half.safetensors")
    assert other.content.weight.dtype == torch.float32
    close(other.content.weight, model.content.weight, 1e-3)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    checkpoints.save(path, {"step": 1})
    with pytest.raises(Exception):
        checkpoints.save(path, {"step": 2, "bad": lambda: None})
    assert checkpoints.load(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("kind, message", [("missing", "check the path"), ("cut", "damaged"), ("text", "damaged"),
                                           ("evil", "system"), ("cut.safetensors", "damaged")])
def test_unreadable_files_are_one_line_errors(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / (kind if kind.endswith(".safetensors") else f"{kind}.pth")
    if kind == "evil":
        torch.save({"model": {}, "hook": Evil()}, path)
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind != "missing":
        checkpoints.save(path, {"model": {"x": torch.zeros(1000)}})
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        checkpoints.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_namespaces_of_official_files_are_read(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    assert checkpoints.load(tmp_path / "official.pth")["args"].lr == 1e-4


def test_another_class_count_keeps_the_rest(capsys):
    source, model = toy(seed=0, classes=91), toy(seed=1, classes=3)
    before = model.decoder.class_head.weight.clone()
    report = checkpoints.load_weights(model, source.state_dict())
    assert set(report.resized) == {"decoder.class_head.weight", "decoder.class_head.bias", "label_embed.weight",
                                   "proposals.class_head.weight", "proposals.class_head.bias"}
    assert torch.equal(model.decoder.class_head.weight, before)
    assert torch.equal(model.decoder.box_head.layers[0].weight, source.decoder.box_head.layers[0].weight)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "class_head" in printed and "92 to 4" in printed


def test_another_query_count_keeps_the_first():
    source, model = toy(seed=0, num_queries=9), toy(seed=1)
    report = checkpoints.load_weights(model, source.state_dict())
    assert torch.equal(model.content.weight, source.content.weight[:6]) and "content.weight" in report.resized


def test_a_replaced_backbone_is_skipped():
    source = toy()
    model = toy(seed=1, backbone=OwnBackbone())
    report = checkpoints.load_weights(model, source.state_dict())
    assert report.missing == ["backbone.scale"] and all(key.startswith("backbone.") for key in report.skipped)


class OwnBackbone(nn.Module):
    channels = [16, 32, 64]                                               # as resnet18 of width 8

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        grey = images.mean(1, keepdim=True) * self.scale
        return [F.avg_pool2d(grey, s).expand(-1, c, -1, -1) for s, c in zip((8, 16, 32), self.channels)]


@pytest.mark.parametrize("change, message", [({"hidden_dim": 16}, "another architecture"),
                                             ({"encoder_layers": 2}, "encoder.layers.1"),
                                             ({"decoder_layers": 1}, "decoder.layers.1"),
                                             ({"backbone": "resnet34"}, "backbone.layer1.2")])
def test_another_architecture_is_a_one_line_error_and_changes_nothing(change, message):
    source, model = toy(seed=0), toy(seed=1, **change)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.load_weights(model, source.state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("state, message", [({"fc.weight": torch.zeros(1)}, "no known format"),
                                            ({"model": {}, "detector": "x"}, "no known format")])
def test_foreign_files_are_one_line_errors(state, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.load_weights(toy(), state)


def test_another_detector_is_refused():
    model = toy()
    with pytest.raises(ValueError, match="holds a dab_detr"):
        checkpoints.load_weights(model, {"model": model.state_dict(), "detector": "dab_detr"})


@needs_vectors
def test_the_complete_official_key_list_pairs_with_ours():
    """At real size: nothing missing, nothing left over."""
    info = json.loads((VECTORS / "full_dino_4scale_r50.json").read_text())
    keys = set(info["keys"]) | {"backbone.0.body." + k for k in torchvision.models.resnet50(weights=None).state_dict()
                                if not k.startswith("fc.") and "num_batches" not in k}
    with torch.device("meta"):
        own = {k for k in models.build("dino", 91, pretrained_backbone=False).state_dict() if "num_batches" not in k}
    assert {checkpoints.rename(key, checkpoints.OFFICIAL_DINO) for key in keys} == own
