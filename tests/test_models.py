"""models.py, all three detectors: against the official implementations' vectors where ../shared is at hand, and by
hand-worked numbers, oracles and invariants everywhere. Attention has test_attention.py, losses test_criterion.py."""
import copy
import ctypes.util
import json
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

import checkpoints
import models
from official import VECTORS, close, needs_vectors, under, vectors

TINY = dict(hidden_dim=64, heads=8, ffn_dim=96, encoder_layers=2, decoder_layers=2, num_queries=30, dropout=0.)
OFFICIAL = {"dab_detr": ("dab_detr", dict(num_queries=20)),
            "dab_detr_3pat": ("dab_detr", dict(num_queries=8, num_patterns=3)),
            "deformable_detr": ("deformable_detr", {}),
            "deformable_detr_refine": ("deformable_detr", dict(box_refine=True)),
            "deformable_detr_refine_two_stage": ("deformable_detr", dict(box_refine=True, two_stage=True)),
            "dino_4scale_eval": ("dino", {})}

VARIANTS = {"dab": ("dab_detr", {}), "patterns": ("dab_detr", dict(num_patterns=2)), "plain": ("deformable_detr", {}),
            "refine": ("deformable_detr", dict(box_refine=True)),
            "two_stage": ("deformable_detr", dict(box_refine=True, two_stage=True)), "dino": ("dino", {})}
TOY = dict(backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=32, heads=4, ffn_dim=48,
           encoder_layers=1, decoder_layers=2, num_queries=6, dropout=0.)
LEVELS = dict(feature_levels=3, points=2)
TOY_OF = {"dab_detr": TOY, "deformable_detr": TOY | LEVELS, "dino": TOY | LEVELS | dict(denoising=2)}
every = pytest.mark.parametrize("variant", VARIANTS)
deformable = pytest.mark.parametrize("variant", ["plain", "refine", "two_stage", "dino"])


def fresh(variant, classes=3, **overrides):
    """A small model as it starts."""
    name, options = VARIANTS[variant]
    torch.manual_seed(overrides.pop("seed", 0))
    return models.build(name, classes, **TOY_OF[name] | options | overrides)


def toy(variant, classes=3, **overrides):
    """A small model in which no output is constant: fresh heads and offsets are zero."""
    model = fresh(variant, classes, **overrides)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def random_batch(batch=2, objects=(3, 1), classes=3, height=48, width=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, height, width, generator=generator)
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    padding[-1, :, width - 32:] = True
    targets = [{"labels": torch.randint(classes, (n,), generator=generator),
                "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.2} for n in objects]
    return images, padding, targets


def random_extra(batch=2, queries=5, dim=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(batch, queries, dim, generator=generator)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.2
    attend = (torch.rand(batch, queries, queries, generator=generator) < 0.5) | torch.eye(queries, dtype=torch.bool)
    return content, boxes, attend, torch.ones(batch, queries, dtype=torch.bool)


def total(model, losses):
    return sum(model.loss_weights[name] * value for name, value in losses.items())


def layer_inputs(model, position):
    """The inputs number `position` of each decoder layer in the calls to come, as a list that fills itself."""
    seen = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[position]))
    return seen


# ------------------------------------------------------------------------------------------------- the official vectors

@pytest.fixture
def official(monkeypatch):
    """case -> the tiny official model, its backbone (a reduced ResNet) included, the tensors, {official name: ours}."""
    monkeypatch.setitem(models.RESNETS, "tiny", (Bottleneck, (2, 1, 1, 1)))

    def load(case):
        name, options = OFFICIAL[case]
        tensors = vectors(case)
        model = models.build(name, 91, backbone=models.ResNet("tiny", 4, frozen=True), **TINY | options)
        state = under(tensors, "state_dict.")
        report = checkpoints.load_weights(model, state)
        assert not report.missing and not report.skipped and not report.resized
        names = {source: ours for ours, source in report.loaded.items()}
        for key, value in state.items():       # a shared head is stored under several names, its gradient under one
            if key not in names:
                names[key] = next(ours for ours, source in report.loaded.items() if torch.equal(state[source], value))
        return model, tensors, names
    return load


def official_layers(tensors, prefix, name):
    count = sum(key.startswith(f"{prefix}aux_outputs.") and key.endswith(name) for key in tensors)
    return torch.stack([tensors[f"{prefix}aux_outputs.{i}.{name}"] for i in range(count)] + [tensors[prefix + name]])


@needs_vectors
@pytest.mark.parametrize("case", [*OFFICIAL, "dino_4scale_invalid"])
def test_forward_equals_official(official, case):
    """Every layer; in the last case padded tokens win the selection and the eps of inverse_sigmoid matters."""
    model, tensors, names = official("dino_4scale_eval" if case == "dino_4scale_invalid" else case)
    images, mask = tensors["images"], tensors["mask"]
    if case == "dino_4scale_invalid":
        tensors = vectors(case)
        for key, value in under(tensors, "changed.").items():
            model.get_parameter(names[key]).data = value
        # A usable token is within 1e-6 of the padded ones' score, less than rounding. Officially they won: help them.
        model.proposals.class_head.bias.data += 1e-5 * F.one_hot(torch.tensor(5), 91)
    with torch.no_grad():
        out = model.eval()(images, mask)
    close(out.detections.logits, official_layers(tensors, "out.", "pred_logits"), 2e-5)
    close(out.detections.boxes, official_layers(tensors, "out.", "pred_boxes"), 2e-6)
    theirs = next((p for p in ("out.interm_outputs.", "out.enc_outputs.") if f"{p}pred_boxes" in tensors), None)
    assert (theirs is None) == (out.proposals is None)
    if theirs:
        close(out.proposals.logits[0], tensors[f"{theirs}pred_logits"], 2e-5)
        close(out.proposals.boxes[0], tensors[f"{theirs}pred_boxes"], 2e-6)


@needs_vectors
@pytest.mark.parametrize("case", OFFICIAL)
def test_what_lies_between_equals_official(official, case):
    """Feature maps, memory, valid ratios, the queries that the decoder starts with, final detections in pixels."""
    model, tensors, _ = official(case)
    with torch.no_grad():
        maps = model.eval().backbone(tensors["images"])
        memory = model.encoder(maps, tensors["mask"])
        queries, _ = model.learned_queries(memory)
        found = model(tensors["images"], tensors["mask"]).detections
    stored = sorted(key for key in tensors if key.startswith("inter.features."))
    for ours, key in zip(maps[-len(stored):], stored):
        close(ours, tensors[key], 1e-5)
    close(memory.tokens, tensors["inter.memory"], 2e-5)
    if case.startswith("dab_detr"):
        close(queries.boxes, tensors["inter.reference_points"][0], 2e-6)
        close(memory.position, tensors["inter.pos.0"].flatten(2).transpose(1, 2), 1e-6)
    else:
        dec_in = under(tensors, "inter.dec_in.")
        close(memory.valid_ratios, dec_in["valid_ratios"], 1e-6)
        close(queries.content, dec_in["tgt"], 1e-5)
        if case == "dino_4scale_eval":
            close(queries.boxes, dec_in["refpoints_unsigmoid"].sigmoid(), 2e-6)
        else:
            close(queries.boxes, dec_in["reference_points"], 2e-6)
            close(queries.position, dec_in["query_pos"], 1e-5)
    for i, ours in enumerate(models.postprocess(found, tensors["post.target_sizes"], len(tensors["post.0.scores"]))):
        close(ours["scores"], tensors[f"post.{i}.scores"], 1e-5)
        assert torch.equal(ours["labels"], tensors[f"post.{i}.labels"])
        close(ours["boxes"], tensors[f"post.{i}.boxes"], 5e-4)


@needs_vectors
@pytest.mark.parametrize("case, option, mutation", [
    ("dab_detr", dict(logit_eps=1e-5), "inverse_sigmoid eps 1e-5"),              # as in Hugging Face's DAB-DETR
    ("dab_detr", dict(position_temperature=10000.), "PE temperature 10000 (not 20)"),
    ("dab_detr", dict(position_offset=-0.5), "PE with -0.5 offset"),
    ("deformable_detr", dict(logit_eps=1e-3), "inverse_sigmoid eps 1e-3"),
    ("deformable_detr_refine", dict(logit_eps=1e-3), "inverse_sigmoid eps 1e-3"),
    ("dino_4scale_eval", dict(position_temperature=10000.), "PE temperature 10000")])
def test_a_wrong_constant_is_as_far_off_as_in_the_official_code(official, case, option, mutation):
    """The constants that other programs' models of these names have differently: each changes the outputs by exactly
    what the same change does to the official code."""
    measured = {(where, what): change for where, what, change in
                json.loads((VECTORS / "mutation_test.json").read_text())}[case.removesuffix("_eval"), mutation]
    model, tensors, _ = official(case)
    other = models.build(model.detector, 91, backbone=model.backbone, **TINY | OFFICIAL[case][1] | option).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = other(tensors["images"], tensors["mask"]).detections
    for name, ours in (("logits", found.logits), ("boxes", found.boxes)):
        change = (ours - official_layers(tensors, "out.", f"pred_{name}")).abs().max().item()
        assert change == pytest.approx(measured[name], rel=2e-3, abs=1e-5), name


@needs_vectors
@pytest.mark.parametrize("case", [case for case in OFFICIAL if case != "dab_detr_3pat"])
def test_initialisation_has_the_official_distribution(case):
    """Tensor by tensor: mean, spread and range of the official initialisation at full size, and constants exactly."""
    name, options = OFFICIAL[case]
    stats = json.loads((VECTORS / f"init_stats_{case.removesuffix('_eval')}_r50.json").read_text())
    options = {key: value for key, value in options.items() if key != "num_queries"}
    torch.manual_seed(0)
    model = models.build(name, 91, backbone=Strides(), **options)        # otherwise the official recipe
    # Which tensor is which: loading tells. Heads that are one have one mean.
    shapes = {key: torch.tensor(want["mean"]).expand(want["shape"]) for key, want in stats.items()}
    report = checkpoints.load_weights(copy.deepcopy(model), shapes)
    assert not report.missing and not report.skipped and not report.resized
    for ours, key in report.loaded.items():
        ours, want = model.state_dict()[ours], stats[key]
        n = ours.numel()
        spread = ours.std().item() if n > 1 else 0.
        if want["std"] == 0 or "sampling_offsets" in key or key.endswith("layers.2.bias"):      # the last: of box heads
            assert (ours.min().item(), ours.max().item()) == pytest.approx((want["min"], want["max"]), abs=1e-4), key
            assert spread == pytest.approx(want["std"], abs=1e-4), key
        else:
            assert abs(ours.mean().item() - want["mean"]) < 7 * want["std"] / n ** 0.5 + 1e-5, key
            assert abs(spread / want["std"] - 1) < 0.02 + 6 / n ** 0.5, key
            if n >= 1000:                                                # normal, or uniform: up to sqrt(3) spreads
                assert (ours.max().item() > 2.4 * spread) == (want["max"] > 2.4 * want["std"]), key
    for proposals in [model.proposals] if hasattr(model, "proposals") else []:
        assert torch.equal(proposals.class_head.weight, model.decoder.class_heads[0].weight)
        assert torch.equal(proposals.box_head.layers[0].weight, model.decoder.box_heads[0].layers[0].weight)


class Strides(nn.Module):
    """A backbone without weights, with the channels of ResNet-50."""
    channels = [512, 1024, 2048]

    def forward(self, images):
        return [F.avg_pool2d(images, s).mean(1, keepdim=True).expand(-1, c, -1, -1)
                for s, c in zip((8, 16, 32), self.channels)]


@needs_vectors
@pytest.mark.parametrize("detector", ["deformable_detr", "dino"])
def test_level_masks_and_proposals_equal_official(detector):
    """Proposals with everything learned taken out: what is left of the memory, and the boxes on the grid."""
    tensors = vectors(f"prims_{detector}")
    sizes = vectors("prims_deformable_detr")
    padding = torch.ones(2, *sizes["vr.padded_hw"].tolist(), dtype=torch.bool)
    for image, (height, width) in enumerate(sizes["vr.pixel_mask_valid_hw"].tolist()):
        padding[image, :height, :width] = False
    shapes = [tuple(shape) for shape in tensors["prop.spatial_shapes"].tolist()]
    masks, ratios = models.level_padding(padding, shapes)
    assert all(torch.equal(mask, tensors[f"vr.mask.{i}"]) for i, mask in enumerate(masks))
    close(ratios, tensors["vr.valid_ratios"], 1e-6)

    mask = torch.cat([m.flatten(1) for m in masks], 1)
    assert torch.equal(mask, tensors["prop.mask_flatten"])
    proposals = models.Proposals(nn.Identity(), nn.Linear(8, 4), 8, binary=True)
    proposals.project, proposals.norm = nn.Identity(), nn.Identity()
    for parameter in proposals.box_head.parameters():
        nn.init.zeros_(parameter)
    found, _ = proposals(models.Memory(tensors["prop.memory"], mask, shapes, ratios, None), 5)
    close(found.logits[0], tensors["prop.masked_memory"], 0)
    close(found.boxes[0], tensors["prop.raw_output_proposals"].sigmoid(), 1e-6)
    unusable = ~tensors["prop.valid"].bool().view_as(mask)
    assert (found.boxes[0][unusable] == 1).all()


# --------------------------------------------------------------------------------------------- backbone and the options

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
    weights = checkpoints.load_backbone(tmp_path / "r18.pth")
    model = fresh("dab", backbone_width=64, pretrained_backbone=weights)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert not model.backbone.conv1.weight.requires_grad and model.backbone.layer2[0].conv1.weight.requires_grad
    assert model.config["frozen_backbone"] and model.config["pretrained_backbone"] is False
    assert all(p.requires_grad for p in fresh("dab").parameters())


NARROW_SHORTCUTS = """
import torch, models
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
for inputs in (1, 2, 3, 4, *range(8, 25)):
    for height, width in ((46, 46), (45, 45), (46, 45), (40, 132), (12, 40), (94, 310)):
        for norm in (nn.BatchNorm2d(24), FrozenBatchNorm2d(24)):
            convolution = nn.Conv2d(inputs, 24, 1, stride=2, bias=False)
            x = torch.randn(8, inputs, height, width).contiguous(memory_format=torch.channels_last)
            models.normed(convolution, norm, x.requires_grad_()).square().sum().backward()
for width in (3, 8, 12):
    maps = models.ResNet("resnet18", width)(torch.randn(8, 3, 184, 184))
    sum(x.sum() for x in maps).backward()
print("sound")
"""


def test_no_narrow_backbone_writes_past_its_memory():
    """torch's CPU kernel for the weight gradient of a strided 1x1 convolution of 2 to 15 channels does.

    A child process looks: with glibc's checks on, it dies where an allocation was overrun."""
    checked = {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "85", "OMP_NUM_THREADS": "1"}
    if library := ctypes.util.find_library("c_malloc_debug"):          # glibc 2.34 and newer keep the checks there
        checked["LD_PRELOAD"] = library
    child = subprocess.run([sys.executable, "-c", NARROW_SHORTCUTS], env=os.environ | checked, cwd=models.__file__[:-9],
                           capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "sound\n"), child.stderr[-500:]


@pytest.mark.parametrize("frozen", [False, True])
def test_narrow_shortcuts_compute_what_a_strided_convolution_does(frozen):
    torch.manual_seed(0)
    convolution = nn.Conv2d(12, 24, 1, stride=2, bias=False).double()
    norm = (FrozenBatchNorm2d if frozen else nn.BatchNorm2d)(24).double()
    x = torch.randn(2, 12, 7, 10, dtype=torch.double)
    torch.testing.assert_close(models.normed(convolution, norm, x), norm(convolution(x)))


@pytest.mark.parametrize("variant, overrides, message", [
    ("dab", {"pretrained_backbone": True}, "backbone_width 8"),
    ("dab", {"pretrained_backbone": "missing.pth"}, "pretrained_backbone=False"),
    ("dab", {"backbone": "resnet20"}, "resnet18"),
    ("dab", {"backbone_width": 0}, "backbone_width 0"),
    ("dino", {"num_querys": 3}, "dino has no option num_querys: it has .*num_queries"),
    ("dino", {"two_stage": True}, "dino has no option two_stage"),
    ("dab", {"feature_levels": 4}, "dab_detr has no option feature_levels"),
    ("plain", {"denoising": 4}, "deformable_detr has no option denoising"),
    ("dino", {"heads": 5}, "heads 5"),
    ("dab", {"hidden_dim": 30, "heads": 5}, "multiple of 4"),
    ("plain", {"feature_levels": 0}, "feature_levels"),
    ("dab", {"decoder_layers": 0}, "decoder_layers"),
    ("dab", {"feature_stride": 4}, "choose 8, 16 or 32"),
    ("plain", {"two_stage": True}, "two_stage needs box_refine"),
])
def test_wrong_options_are_one_line_errors(variant, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        fresh(variant, **overrides)
    assert "\n" not in str(error.value)


def test_unknown_detectors_are_refused():
    with pytest.raises(ValueError, match="dab_detr, deformable_detr, dino"):
        models.build("detr", 3)


def test_no_network_is_an_error_that_names_both_remedies(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("unreachable")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match=r"load_backbone\(FILE\).*pretrained_backbone=False") as error:
        fresh("dino", backbone_width=64, pretrained_backbone=True)
    assert "\n" not in str(error.value)


def test_defaults_are_the_official_recipes():
    """What neither shapes nor vectors show: dropout, the three constants of the positions and logits, the noise."""
    wanted = {"dab_detr": dict(dropout=0., position_temperature=20., position_offset=0., logit_eps=1e-3),
              "deformable_detr": dict(dropout=0.1, position_temperature=10000., position_offset=-0.5, logit_eps=1e-5),
              "dino": dict(dropout=0., position_temperature=20., position_offset=0., logit_eps=1e-3, denoising=100,
                           denoising_label_noise=0.5, denoising_box_noise=0.4, shared_heads=True)}
    for name, options in wanted.items():
        assert models.options_of(name).items() >= options.items()


def test_names_of_options_in_older_checkpoints_are_understood():
    model = fresh("dino", box_noise=0.3, label_noise=0.2)
    assert (model.config["denoising_box_noise"], model.config["denoising_label_noise"]) == (0.3, 0.2)
    assert "box_noise" not in model.config


@every
def test_config_rebuilds_the_architecture(variant):
    model = toy(variant)
    assert json.loads(json.dumps(model.config)) == model.config
    again = models.build(model.detector, model.num_classes, **model.config)
    again.load_state_dict(model.state_dict())
    images, padding, _ = random_batch()
    with torch.no_grad():
        first, second = (m.eval()(images, padding).detections.boxes for m in (model, again))
    assert torch.equal(first, second)


class Maps(nn.Module):
    """A user's own backbone: one map of 5 channels at stride 32."""
    channels = [5]

    def forward(self, images):
        return [F.avg_pool2d(images[:, :1], 32).expand(-1, 5, -1, -1)]


@every
def test_a_backbone_of_your_own(variant):
    model = toy(variant, backbone=Maps(), **({} if VARIANTS[variant][0] == "dab_detr" else {"feature_levels": 2}))
    images, padding, targets = random_batch(height=64, width=96)
    out = model(images, padding, targets)
    assert out.memory.shapes == [(2, 3), (1, 2)][:len(out.memory.shapes)] and model.config["backbone"] == "custom"
    assert total(model, model.loss(out, targets)).isfinite()


LITE = "timm:tf_efficientnet_lite0"


def timm_or_skip():
    return pytest.importorskip("timm", reason="timm is an extra: pip install timm")


def test_a_timm_backbone_without_timm_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm") as error:
        fresh("dino", backbone=LITE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant, overrides, channels", [
    ("dino", {}, [40, 112, 320]), ("plain", {}, [40, 112, 320]),
    ("dab", dict(feature_stride=8), [40]), ("dab", dict(feature_stride=16), [40, 112]), ("dab", {}, [40, 112, 320])])
def test_a_timm_backbone_gives_the_maps_of_timms_own_model(variant, overrides, channels):
    """The same numbers as timm's model, which reads images normalised in its own way (mean and deviation 1/2)."""
    timm = timm_or_skip()
    model = fresh(variant, backbone=LITE, **overrides).eval()
    assert model.backbone.channels == channels and model.config["backbone"] == LITE
    own = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4)).eval()
    own.load_state_dict(model.backbone.body.state_dict())
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        for mine, theirs in zip(model.backbone((pixels - mean) / std), own((pixels - 0.5) / 0.5)):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
        assert model.encode(pixels, torch.zeros(2, 64, 96, dtype=torch.bool)).tokens.isfinite().all()


def test_a_timm_backbone_from_a_file_by_name_or_by_position(tmp_path, capsys):
    timm = timm_or_skip()
    torch.manual_seed(1)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {f"_{number}.{name.rpartition('.')[2]}": value for number, (name, value) in enumerate(state.items())}
    for weights, said in ((state, ""), (renamed, "loaded by position: 296 tensors")):
        torch.save(weights, tmp_path / "x.pth")
        weights = checkpoints.load_backbone(tmp_path / "x.pth")
        model = fresh("dino", backbone=LITE, pretrained_backbone=weights)
        out = capsys.readouterr().out
        assert said in out and len(out.splitlines()) == bool(said)
        body = model.backbone.body.state_dict()
        assert len(body) == 288 and all(torch.equal(value, state[name]) for name, value in body.items())
    model.train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 48 and not any(m.training or m.weight.requires_grad for m in norms)      # fixed
    free = {name for name, p in model.backbone.body.named_parameters() if p.requires_grad}
    early = {name for name in body if name.startswith(("conv_stem", "blocks.0.", "blocks.1.")) and "conv" in name}
    assert len(early) == 9 and not early & free and "blocks.2.0.conv_pw.weight" in free          # before stride 8
    assert model.config["frozen_backbone"] and model.config["pretrained_backbone"] is False
    # The checkpoint needs the name only: nothing is loaded, nothing downloaded.
    again = models.build("dino", 3, **json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert {name for name, p in again.backbone.body.named_parameters() if p.requires_grad} == free
    # From scratch everything trains, norms too.
    assert all(p.requires_grad for p in fresh("dino", backbone=LITE).train().parameters())
    assert model.backbone.body.bn1.running_var.data_ptr() != state["bn1.running_var"].data_ptr()


def test_what_nobody_reads_of_a_timm_backbone_has_no_gradient_for_which_several_processes_would_wait():
    timm_or_skip()
    body = fresh("dab", backbone=LITE, feature_stride=16).backbone.body
    unread = {name for name, p in body.named_parameters() if not p.requires_grad}
    assert unread == {name for name, _ in body.named_parameters() if name.startswith(("blocks.5.", "blocks.6."))}
    assert "blocks.5.0.conv_pw.weight" in unread                                                 # of stride 32


@pytest.mark.parametrize("content", ["short", "swapped", "other shape"])
def test_a_state_of_other_weights_is_one_line(content):
    """Also tensors of the right shapes whose kinds are in another order: weight and bias of a norm look alike."""
    timm = timm_or_skip()
    state = {f"x.{name}": value for name, value in timm.create_model("tf_efficientnet_lite0").state_dict().items()}
    if content == "short":
        state.popitem()
    if content == "other shape":
        state["x.conv_stem.weight"] = torch.zeros(3)
    if content == "swapped":
        state = {name: state[name] for name in sorted(state, key=lambda name: "bias" in name)}
    with pytest.raises(ValueError, match=r"not the weights of this timm.*load_backbone\(FILE\)") as error:
        fresh("dino", backbone=LITE, pretrained_backbone=state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, overrides, message", [
    ("nosuch", {}, "no backbone 'nosuch'"), ("resnet18.nosuch", {}, "no backbone 'resnet18.nosuch'"),
    ("vit_tiny_patch16_224", {}, "cannot make backbone"),
    ("vit_tiny_patch16_224", {"pretrained_backbone": True}, "cannot make backbone")])
def test_what_timm_cannot_make_is_one_line(monkeypatch, name, overrides, message):
    timm = timm_or_skip()

    def fail(*args, **kwargs):
        raise OSError("unreachable")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", fail)
    with pytest.raises(ValueError, match=message) as error:
        fresh("dino", backbone=f"timm:{name}", **overrides)
    assert "\n" not in str(error.value)


def test_timm_backbones_with_other_maps():
    """Layer norms, maps from stride 4 on, and a model whose first map is the image itself."""
    timm_or_skip()
    first = fresh("dino", backbone="timm:convnext_atto").backbone
    assert first.channels == [80, 160, 320] and all(module.training for module in first.modules())
    assert fresh("dino", backbone="timm:vgg11").backbone.channels == [512, 512, 512]


# ------------------------------------------------------------------------------------------------------------- encoders

def random_maps(model, batch):
    """What a backbone makes of images of 48 x 80 pixels, or could."""
    torch.manual_seed(0)
    return [torch.randn(batch, c, *size) for c, size in zip(model.backbone.channels, ((6, 10), (3, 5), (2, 3)))]


@every
def test_padded_pixels_and_batch_mates_change_nothing(variant):
    """What lies under the padding mask is never seen, except through the backbone's own receptive field."""
    model = toy(variant).eval()
    maps, (_, padding, _) = random_maps(model, batch=2), random_batch()
    with torch.no_grad():
        both = model.encoder(maps, padding)
        alone = model.encoder([m[1:] for m in maps], padding[1:])
        close(both.tokens[1:], alone.tokens, 1e-5)
        queries = torch.randn(1, 3, 32), torch.rand(1, 3, 4) * 0.5 + 0.2
        before = model.decode(alone, *queries)
        alone.tokens[alone.padding] = 1e3
        after = model.decode(alone, *queries)
    assert torch.equal(after.boxes, before.boxes) and torch.equal(after.logits, before.logits)


@every
def test_an_image_padded_to_a_larger_batch_is_seen_as_if_alone(variant):
    """Tokens, proposals and boxes (fractions of its own size) are the same, but for two official slips, left out here:
    GroupNorm's statistics include the padding, and DINO's decoder makes positions from boxes on the padded map."""
    model = toy(variant, num_queries=4).eval()
    for project in [] if model.detector == "dab_detr" else model.encoder.project:
        project[1] = nn.Identity()
    maps, padding = random_maps(model, batch=1), torch.zeros(1, 48, 80, dtype=torch.bool)
    padding[:, :, 48:] = True
    crops = [x[..., :x.shape[2]] for x in maps]                          # 48 x 48 pixels
    with torch.no_grad():
        padded, alone = model.encoder(maps, padding), model.encoder(crops, padding[..., :48])
        ours, expected = (model.learned_queries(memory)[0] for memory in (padded, alone))
        close(padded.tokens[~padded.padding], alone.tokens[0], 1e-5)
        for x, wanted in zip(ours, expected):
            assert (x is None) == (wanted is None)
            if x is not None:
                close(x, wanted, 1e-5)
        if variant != "dino":
            found, wanted = (model.decode(memory, queries.content, queries.boxes, position=queries.position)
                             for memory, queries in ((padded, ours), (alone, expected)))
            close(found.boxes, wanted.boxes, 1e-5)
            close(found.logits, wanted.logits, 1e-4)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("variant", ["two_stage", "dino"])
def test_any_number_of_levels(variant, levels):
    model = toy(variant, feature_levels=levels)
    images, padding, targets = random_batch()
    out = model(images, padding, targets)
    sizes = [(6, 10), (3, 5), (2, 3), (1, 2), (1, 1)]                    # strides 8, 16, 32, then halved
    assert out.memory.shapes == (sizes[3 - levels:3] if levels <= 3 else sizes[:levels])
    total(model, model.loss(out, targets)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


@pytest.mark.parametrize("variant", ["plain", "dino"])
def test_a_level_of_one_cell_is_the_same_alone_and_in_a_batch(variant):
    """One channel a group and one cell: a norm of a single value, 0 before its bias; nn.GroupNorm refuses it alone."""
    model = fresh(variant, hidden_dim=32, heads=4, feature_levels=4).eval()
    norm = model.encoder.project[-1][1]
    assert norm.num_groups == norm.num_channels
    images = torch.randn(2, 3, 33, 64, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 33, 64, dtype=torch.bool)
    with torch.no_grad():
        nn.init.normal_(norm.bias)
        alone, both = model.encode(images[:1], nothing[:1]), model.encode(images, nothing)
        assert alone.shapes[-1] == (1, 1)
        torch.testing.assert_close(alone.tokens, both.tokens[:1], rtol=1e-3, atol=1e-3)
        single = norm(torch.full((1, 32, 1, 1), 3.))[0, :, 0, 0]
        torch.testing.assert_close(single, norm.bias, rtol=1e-3, atol=1e-3)


def test_level_masks_by_hand():
    """32 of 80 columns are the image's. Each level takes the image's own nearest pixel: the last level's second cell
    that of column 40, padding; the level before it (its cells: columns 0, 26, 53) would say otherwise."""
    padding = torch.zeros(1, 48, 80, dtype=torch.bool)
    padding[:, :, 32:] = True
    masks, ratios = models.level_padding(padding, [(6, 10), (3, 5), (2, 3), (1, 2)])
    assert masks[2].tolist() == [[[False, False, True]] * 2] and masks[3].tolist() == [[[False, True]]]
    torch.testing.assert_close(ratios, torch.tensor([[[.4, 1.], [.4, 1.], [2 / 3, 1.], [.5, 1.]]]))


@pytest.mark.parametrize("stride, shape, index", [(8, (6, 10), 0), (16, (3, 5), 1), (32, (2, 3), -1)])
def test_dab_detr_reads_the_map_of_the_chosen_stride(stride, shape, index):
    """Of a backbone of your own the first, second or last map."""
    images, padding, _ = random_batch()
    assert toy("dab", feature_stride=stride).encode(images, padding).shapes == [shape]
    model = toy("dab", feature_stride=stride, backbone=Strides())
    model.backbone = None                                                 # it must read this map and no other
    maps = [None] * 3
    maps[index] = torch.randn(2, Strides.channels[index], *shape)
    assert model.encoder(maps, padding).shapes == [shape]
    if stride == 16:
        with pytest.raises(ValueError, match="feature_stride 16 needs"):
            toy("dab", feature_stride=16, backbone=Maps())


# ------------------------------------------------------------------------------------------------ one pass, many groups

@every
def test_extra_and_denoising_queries_change_nothing_for_the_learned_ones(variant):
    model = toy(variant).eval()
    images, padding, targets = random_batch()
    extra = random_extra()
    with torch.no_grad():
        plain = model(images, padding)
        with_extra = model(images, padding, extra=extra)
        model.training = True                                             # denoising on, BatchNorm still in eval mode
        joint = model(images, padding, targets, extra=extra)
        alone = model.decode(plain.memory, *extra[:3])
    assert plain.extra is None and plain.denoising is None
    assert (joint.denoising is not None) == (variant == "dino")
    if variant == "dino":
        assert joint.denoising.boxes.shape[2] == 2 * joint.denoising.groups * 3
    for out in (with_extra, joint):
        close(out.detections.logits, plain.detections.logits, 1e-5)
        close(out.detections.boxes, plain.detections.boxes, 1e-6)
        close(out.extra.logits, alone.logits, 1e-5)
        close(out.extra.boxes, alone.boxes, 1e-6)


@every
def test_attend_is_obeyed_and_padded_extra_rows_reach_no_other_row(variant):
    model = toy(variant).eval()
    images, padding, _ = random_batch()
    content, boxes, _, valid = random_extra()
    attend = torch.eye(5, dtype=torch.bool).expand(2, -1, -1).clone()
    attend[:, :4, :4] = True                                              # the last row is padding, alone with itself
    with torch.no_grad():
        memory = model.encode(images, padding)
        before = model.decode(memory, content, boxes, attend)
        content[:, 4], boxes[:, 4] = 9 * torch.randn(32), 0.9
        after = model.decode(memory, content, boxes, attend)
        free = model.decode(memory, content, boxes)
    assert torch.equal(before.logits[:, :, :4], after.logits[:, :, :4])
    assert not torch.allclose(before.logits[:, :, 4], after.logits[:, :, 4])
    assert not torch.allclose(free.logits[:, :, :4], after.logits[:, :, :4])


def test_attention_groups_by_hand():
    """2 groups of 2 * 1 slots, 2 learned, 1 extra: who may look at whom."""
    extra = models.Queries(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    attend = models.attention_groups(2, extra, "cpu", 2, 1)[0].int().tolist()
    assert attend == [[1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0],
                      [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1]]
    assert models.attention_groups(2, None, "cpu") is None
    among = torch.tensor([[[True, False], [True, True]]])
    extra = models.Queries(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), among)
    assert models.attention_groups(1, extra, "cpu")[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    extra = extra._replace(sees_learned=True)                             # its rows, not the learned one's
    assert models.attention_groups(1, extra, "cpu")[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    denoising = models.attention_groups(1, extra, "cpu", 1, 1)[0].int().tolist()
    assert denoising[-1] == [0, 0, 1, 1, 1]                               # of no denoising query


@every
def test_no_queries_keep_the_graph(variant):
    model = toy(variant)
    images, padding, _ = random_batch()
    memory = model.encode(images, padding)
    content = torch.zeros(2, 0, 32, requires_grad=True)
    none = model.decode(memory, content, torch.zeros(2, 0, 4), torch.zeros(2, 0, 0, dtype=torch.bool))
    assert none.logits.shape == (2, 2, 0, 3) and none.boxes.shape == (2, 2, 0, 4)
    (none.logits.sum() + none.boxes.sum()).backward()
    assert model.decoder.class_heads[0].weight.grad is not None and model.backbone.conv1.weight.grad is not None
    extra = content, torch.zeros(2, 0, 4), torch.zeros(2, 0, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool)
    assert model(images, padding, extra=extra).extra.boxes.shape == (2, 2, 0, 4)


@every
@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_and_more_queries_than_tokens(variant, classes):
    """Two stages have at most as many queries as tokens, and postprocess takes at most all pairs."""
    model = toy(variant, classes=classes, num_queries=500)
    images, padding, targets = random_batch(classes=classes)
    out = model(images, padding, targets)
    count = {"two_stage": 81, "dino": 81, "patterns": 1000}.get(variant, 500)      # 6 * 10 + 3 * 5 + 2 * 3 tokens
    assert out.detections.logits.shape == (2, 2, count, classes)
    total(model, model.loss(out, targets)).backward()
    found = models.postprocess(out.detections, [(100, 200), (50, 50)], 10000)
    assert all(len(f["scores"]) == count * classes for f in found)


# --------------------------------------------------------------------------- what a detector does in a way of its own

REFINING = {"dab": True, "refine": False, "two_stage": False, "dino": True}      # True: looks forward twice


@pytest.mark.parametrize("variant", REFINING)
def test_a_box_trains_the_head_of_its_layer_and_looking_forward_twice_the_one_before(variant):
    """With a head for each of three layers, and nothing else trained; forward values cannot tell."""
    model = toy(variant, decoder_layers=3).requires_grad_(False)
    model.decoder.box_heads = models.Heads(model.decoder.box_heads[0], 3).requires_grad_()
    images, padding, _ = random_batch()
    boxes = model.decode(model.encode(images, padding), *random_extra()[:2]).boxes
    heads = [list(head.parameters()) for head in model.decoder.box_heads]
    for layer in range(3):
        grads = [torch.autograd.grad(boxes[layer].sum(), head, retain_graph=True, allow_unused=True) for head in heads]
        trained = {i for i, grad in enumerate(grads) if any(g is not None and g.any() for g in grad)}
        assert trained == ({layer - 1, layer} - {-1} if REFINING[variant] else {layer})


@pytest.mark.parametrize("variant, followed", [("dab", [True, False, False]), ("plain", [True, True, True]),
                                               ("refine", [True, False, False]), ("dino", [False, False, False])])
def test_where_a_layer_looks_trains_the_initial_boxes(variant, followed):
    """DAB-DETR's learned anchors through the first layer, refined references too; DINO's come from the encoder's boxes
    and are detached, and plain Deformable DETR looks from the same place in every layer."""
    model = toy(variant, decoder_layers=3).requires_grad_(False)
    images, padding, _ = random_batch()
    content, boxes, _, _ = random_extra()
    place = layer_inputs(model, 1 if variant == "dab" else 2)             # the position made of the anchor; the centre
    position = model.box_position(boxes) if model.detector == "deformable_detr" else None
    model.decode(model.encode(images, padding), content, boxes.requires_grad_(), position=position)
    assert [x.requires_grad for x in place] == followed


def test_dino_predictions_give_a_reference_gradient_in_their_own_layer_only():
    """What is predicted depends on the reference box; where the layer looks and all later layers start is detached."""
    model = toy("dino")
    images, padding, _ = random_batch()
    content, boxes, _, _ = random_extra()
    out = model.decode(model.encode(images, padding), content, boxes.requires_grad_())
    through_first, = torch.autograd.grad(out.boxes[0].sum(), boxes, retain_graph=True)
    through_second, = torch.autograd.grad(out.boxes[1].sum(), boxes)
    assert through_first.abs().min() > 0 and through_second.abs().max() == 0


@pytest.mark.parametrize("variant", ["plain", "refine", "two_stage", "dino"])
def test_references_by_layer(variant):
    """Plain: the point stays, an offset is counted in cells. Refined: the box that the layer before predicted, offsets
    counted in half its sides over the number of points. DINO: that of its raw output, while predictions are normed."""
    model = toy(variant).eval()
    images, padding, _ = random_batch()
    content, boxes, _, _ = random_extra()
    centres, units = layer_inputs(model, 2), layer_inputs(model, 3)
    with torch.no_grad():
        memory = model.encode(images, padding)
        found = model.decode(memory, content, boxes)
    ratios = memory.valid_ratios[:, None]                                 # (B, 1, levels, 2)
    torch.testing.assert_close(centres[0], boxes[:, :, None, :2] * ratios)
    if variant in ("plain", "refine"):                                    # a point at first
        cells = torch.tensor([[1 / w, 1 / h] for h, w in memory.shapes])
        torch.testing.assert_close(units[0], cells[None, None])
    else:
        torch.testing.assert_close(units[0], boxes[:, :, None, 2:] * ratios * 0.5 / 2)
    if variant == "plain":
        assert torch.equal(centres[1], centres[0]) and torch.equal(units[1], units[0])
        return
    same = torch.allclose(centres[1], found.boxes[0][:, :, None, :2] * ratios, atol=1e-6)
    assert same == (variant != "dino")
    if same:
        torch.testing.assert_close(units[1], found.boxes[0][:, :, None, 2:] * ratios * 0.5 / 2)


def test_patterns_ask_every_anchor_in_turn():
    """Queries come as all anchors with the first pattern, then all anchors with the second."""
    model = toy("patterns")
    images, padding, _ = random_batch()
    queries, proposals = model.learned_queries(model.encode(images, padding))
    assert proposals is None and queries.position is None
    for number, pattern in enumerate(model.patterns.weight):
        part = slice(6 * number, 6 * number + 6)
        assert torch.equal(queries.content[:, part], pattern.expand(2, 6, -1))
        assert torch.equal(queries.boxes[:, part], model.anchors.weight.sigmoid().expand(2, -1, -1))


def test_learned_content_of_each_detector():
    """What distillation may ask with: (any number, D), of one-stage models the trained tensor itself."""
    assert torch.equal(toy("dab").learned_content, torch.zeros(1, 32))
    model = toy("patterns")
    assert model.learned_content is model.patterns.weight
    model = toy("plain")
    assert torch.equal(model.learned_content, model.queries.weight[:, 32:])
    assert toy("two_stage").learned_content is None
    model = toy("dino")
    assert model.learned_content is model.content.weight
    assert torch.equal(model.label_embedding, model.label_embed.weight[:3])
    assert toy("dab").label_embedding is None and toy("plain").label_embedding is None


def test_one_stage_models_of_a_width_place_a_box_alike():
    """By a fixed random map, which is not trained and in no checkpoint: teacher and student understand each other."""
    teacher, student = toy("refine", seed=0), toy("plain", seed=5, heads=8, decoder_layers=1)
    boxes = random_extra()[1]
    assert torch.equal(teacher.box_position(boxes), student.box_position(boxes))
    assert "box_map" not in teacher.state_dict() and "box_map" not in dict(teacher.named_parameters())
    assert 0.7 < teacher.box_position(torch.rand(2, 500, 4)).std() < 1.3            # as learned positions start
    assert toy("plain", hidden_dim=64).box_position(boxes).shape == (2, 5, 64)


def test_points_need_a_position_and_one_stage():
    images, padding, _ = random_batch()
    content, boxes, _, _ = random_extra()
    model = toy("refine")
    memory = model.encode(images, padding)
    with pytest.raises(ValueError, match="pass boxes .*, or a position"):
        model.decode(memory, content, boxes[..., :2])
    by_point = model.decode(memory, content, boxes[..., :2], position=model.box_position(boxes))
    assert torch.equal(by_point.boxes, model.decode(memory, content, boxes).boxes)
    other = model.decode(memory, content, boxes, position=torch.zeros(2, 5, 32))
    assert not torch.allclose(by_point.boxes, other.boxes)
    with pytest.raises(ValueError, match="not points"):
        toy("two_stage").decode(memory, content, boxes[..., :2], position=torch.zeros(2, 5, 32))
    for variant in ("dab", "dino"):
        with pytest.raises(ValueError, match="position=None"):
            toy(variant).decode(memory, content, boxes, position=torch.zeros(2, 5, 32))


def test_extra_queries_may_bring_their_positions():
    """Without, they get them from their boxes; detectors that make their own refuse."""
    model = toy("plain").eval()
    images, padding, _ = random_batch()
    content, boxes, attend, valid = random_extra()
    position = torch.randn(2, 5, 32)
    with torch.no_grad():
        out = model(images, padding, extra=(content, boxes, attend, valid, position))
        close(out.extra.logits, model.decode(out.memory, content, boxes, attend, position).logits, 1e-5)
        none = model(images, padding, extra=(content, boxes, attend, valid, None)).extra
        assert torch.equal(none.logits, model(images, padding, extra=(content, boxes, attend, valid)).extra.logits)
    for variant in ("dab", "dino"):
        with pytest.raises(ValueError, match="pass position=None"):
            toy(variant)(images, padding, extra=(content, boxes, attend, valid, position))


@every
def test_learned_queries_beside_others_are_a_group_of_their_own(variant):
    """Each group is answered as if it were alone, and another model of the kind can read them all."""
    model, images, padding = toy(variant).eval(), *random_batch()[:2]
    asked = models.Queries(*random_extra())
    with torch.no_grad():
        memory = model.encode(images, padding)
        learned, _ = model.learned_queries(memory)
        both = model.with_learned(asked, memory)
        answers = model.decode(memory, both.content, both.boxes, both.attend, both.position)
        alone = model.decode(memory, *asked[:3])
        own = model.decode(memory, learned.content, learned.boxes, None, learned.position)
        close(answers.logits, torch.cat([alone.logits, own.logits], 2), 1e-5)
        close(model(images, padding, extra=both).extra.logits, answers.logits, 1e-5)
    assert both.valid.shape == both.content.shape[:2] and both.valid[:, 5:].all()
    assert both.attend[:, 5:, 5:].all() and not both.attend[:, 5:, :5].any() and not both.attend[:, :5, 5:].any()


# --------------------------------------------------------------------------------------- postprocess, record and gflops

def test_postprocess_by_hand():
    """Two queries, two classes; the best pairs are (query 1, class 0), then (query 0, class 1); height 10, width 20."""
    logits = torch.tensor([[[[-2., 1.], [2., -3.]]]])
    boxes = torch.tensor([[[[.5, .5, 1., 1.], [.25, .5, .5, .2]]]])
    found, = models.postprocess(models.Detections(logits, boxes), torch.tensor([[10, 20]]), 2)
    torch.testing.assert_close(found["scores"], torch.tensor([2., 1.]).sigmoid())
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["boxes"], torch.tensor([[0., 4., 10., 6.], [0., 0., 20., 10.]]))


@every
def test_record_collects_what_was_looked_at_and_then_stops(variant):
    """Shapes, sums and masks of every attention; outputs are bit for bit those without recording."""
    model = toy(variant).eval()
    images, padding, _ = random_batch()
    plain = model(images, padding)
    with models.record(model) as seen:
        out = model(images, padding)
    assert torch.equal(out.detections.boxes, plain.detections.boxes)
    assert list(seen) == ["encoder.0", "decoder.0.self", "decoder.0.cross", "decoder.1.self", "decoder.1.cross"]
    tokens, queries = out.memory.tokens.shape[1], out.detections.boxes.shape[2]
    for key, recorded in seen.items():
        asking, asked = (tokens, tokens) if key == "encoder.0" else (queries, queries if "self" in key else tokens)
        if recorded.points is None:
            assert recorded.weights.shape == (2, 4, asking, asked)
            if "self" not in key:
                unseen = out.memory.padding[:, None, None].expand_as(recorded.weights)
                assert unseen.any() and (recorded.weights[unseen] == 0).all()
            sums = recorded.weights.sum(-1)
        else:
            assert recorded.weights.shape == (2, asking, 4, 3, 2) and recorded.points.shape == (2, asking, 4, 3, 2, 2)
            sums = recorded.weights.sum((-1, -2))
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (recorded.points is None) == (model.detector == "dab_detr" or "self" in key)
        assert not recorded.weights.requires_grad
    weights = seen["encoder.0"].weights
    with pytest.raises(KeyError), models.record(model):                   # also when something goes wrong inside
        raise KeyError
    model(images, padding)
    assert seen["encoder.0"].weights is weights and not any(getattr(m, "recorder", None) for m in model.modules())


@every
def test_a_box_without_area_leaves_the_other_queries_alone(variant):
    """Ground truth holds slivers. DAB-DETR divides by sides: 0 made NaN of all queries, which may not look at it."""
    model = toy(variant).eval()
    images, padding, _ = random_batch()
    content, boxes, attend, valid = random_extra()
    plain = model(images, padding, extra=(content, boxes, attend, valid))
    boxes = boxes.clone()
    boxes[:, 0, 2:] = 0
    attend = attend.clone()
    attend[:, 1:, 0] = False
    found = model(images, padding, extra=(content, boxes, attend, valid))
    assert found.extra.logits.isfinite().all() and found.extra.boxes.isfinite().all()
    assert torch.equal(found.detections.logits, plain.detections.logits)


def test_a_recording_inside_another_ends_alone():
    model = toy("dab").eval()
    images, padding, _ = random_batch()
    with models.record(model) as outer:
        with models.record(model) as inner:
            model(images, padding)
        assert inner and not outer
        model(images, padding)
    assert list(outer) == list(inner)


def test_recording_costs_only_while_it_lasts():
    model = toy("dab").eval()
    images, padding, _ = random_batch()

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, padding)
        return counter.get_total_flops()

    before = flops()
    with models.record(model):
        assert flops() > before
    assert flops() == before


@every
def test_losses_on_what_was_looked_at_train_the_attention(variant):
    """With graph=True, by way of weights and of points, finite also where keys are masked."""
    model = toy(variant)
    images, padding, _ = random_batch()
    with models.record(model, graph=True) as seen:
        model(images, padding)
    sum(x.square().sum() for r in seen.values() for x in (r.weights, r.points) if x is not None).backward()
    for name, p in model.encoder.layers[0].attention.named_parameters():
        if name.startswith(("in_proj", "sampling_offsets", "attention_weights")):
            assert p.grad.isfinite().all() and p.grad.any(), name
    assert model.backbone.conv1.weight.grad.any()


@every
def test_recorded_queries_come_in_the_order_of_the_joint_pass_and_can_be_chosen(variant):
    """Denoising, learned, extra: the masks between them show in the recorded weights."""
    model = toy(variant)
    images, padding, targets = random_batch()
    extra = random_extra()
    with models.record(model) as seen:
        out = model(images, padding, targets, extra)
    noised, learned = (0 if x is None else x.boxes.shape[2] for x in (out.denoising, out.detections))
    weights = seen["decoder.1.self"].weights                              # (B, heads, Q, Q)
    mine, theirs = slice(noised, noised + learned), slice(noised + learned, None)
    assert (weights[:, :, mine, mine] > 0).all() and torch.equal(weights[:, 0, theirs, theirs] > 0, extra[2])
    assert weights[:, :, mine, :noised].sum() == 0 and weights[:, :, mine, theirs].sum() == 0
    assert weights[:, :, theirs, :noised + learned].sum() == 0

    model.eval()
    with models.record(model) as seen:
        model(images, padding)
    with models.record(model, queries=[5, 0]) as some:
        model(images, padding)
    for key, recorded in some.items():
        axis = 2 if recorded.points is None else 1
        assert torch.equal(recorded.weights, seen[key].weights.index_select(axis, torch.tensor([5, 0])))
        if recorded.points is not None:
            assert torch.equal(recorded.points, seen[key].points[:, [5, 0]])


@deformable
def test_recorded_points_are_where_a_fresh_model_looks(variant):
    """Untrained, head 0 looks to the right of a token's own centre, point p at p + 1 cells of each level."""
    model = fresh(variant).eval()
    images, padding, _ = random_batch()
    with models.record(model) as seen, torch.no_grad():
        model(images, padding)
    points = seen["encoder.0"].points[0, 12, 0]                           # row 1, column 2 of the 6x10 level
    expected = torch.tensor([[[2.5 / 10 + (p + 1) / w, 1.5 / 6] for p in range(2)] for w in (10, 5, 3)])
    torch.testing.assert_close(points, expected)


@every
def test_gflops_by_hand(variant):
    """What the layers of a tiny model must cost in multiply-adds, added up from their shapes."""
    name, options = VARIANTS[variant]
    own = {} if name == "dab_detr" else dict(feature_levels=1, points=2)
    model = models.build(name, 3, backbone=Maps(), hidden_dim=8, heads=2, ffn_dim=16, encoder_layers=1,
                         decoder_layers=2, num_queries=3, **own, **options)
    s, q, d, f, c, points = 4, 6 if variant == "patterns" else 3, 8, 16, 3, 2 * 2     # 2x2 tokens; heads * points

    def dense(queries, keys, width):     # scores of that width in all heads together, weighted sums
        return queries * keys * (width + d)

    def deformable(queries):             # value, offsets and weights, samples (d / heads channels a point), output
        return s * d * d + queries * d * 3 * points + queries * points * (d // 2) * 5 + queries * d * d
    box, self_attention = 2 * d * d + 4 * d, 4 * q * d * d + dense(q, q, d)
    if name == "dab_detr":
        scale = 2 * d * d
        encoder = s * 5 * d + s * scale + 4 * s * d * d + dense(s, s, d) + s * 2 * d * f
        layer = 2 * d * d + d * d + d * d + 2 * d + 6 * d * d                         # position, size, self-attention
        cross = 3 * q * d * d + 3 * s * d * d + dense(q, s, 2 * d)
        layers = 2 * (q * layer + dense(q, q, d) + cross + q * 2 * d * f + q * box + q * c * d)
        expected = encoder + layers + q * d * d + q * scale + q * box     # first: position; second: scale; between: box
    else:
        encoder = s * 5 * d + deformable(s) + s * 2 * d * f
        layers = 2 * (self_attention + deformable(q) + q * 2 * d * f + q * box + q * d * c)
        start = {"plain": q * d * 2, "refine": q * d * 2, "dino": s * d * d + s * d * c + q * box,
                 "two_stage": s * d * d + s * d * c + s * box + q * (2 * d) ** 2}[variant]
        between = 2 * q * 3 * d * d + q * box if variant == "dino" else 0             # positions; the next reference
        expected = encoder + layers + start + between
    assert round(models.gflops(model, 64, 64) * 1e9) == expected
    assert all(p.requires_grad for p in model.parameters()) and model.training
