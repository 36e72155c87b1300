"""train.py: the loop, the commands and what they promise: resumption, provenance, readable errors.

One tiny data set and one tiny model serve all: 12 toy scenes, a ResNet-18 of width 8, two threads' worth of seconds.
"""
import copy
import dataclasses
import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import checkpoints
import clockdistill
import data
import models
import train
from experiments import tables
from experiments.baselines import BASELINES
from experiments.cache import EncodeOnce
from train import Config, Learner, Run

HERE = Path(__file__).resolve().parent.parent
TINY = dict(data="toy", backbone="resnet18", backbone_width=8, pretrained_backbone="none", hidden_dim=16, heads=2,
            ffn_dim=16, encoder_layers=1, decoder_layers=2, num_queries=10, feature_levels=3, points=2, denoising=6,
            steps=3, batch_size=2, lr=1e-3, backbone_lr=1e-3, warmup=1, schedule="cosine", ema=0.9)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    data.make_toy(root, counts=dict(train=6, val=4, tune=2), workers=1)
    return str(root)


@pytest.fixture(scope="session")
def teacher(toy, tmp_path_factory):
    """A run that serves as teacher: two decoder layers, untrained but for three steps."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train.fit(Config(root=toy, **TINY), Run(out=str(out), workers=0))
    return out


def distilling(toy, teacher, **changes):
    return Config(**{**TINY, "root": toy, "teacher": str(teacher), "method": "clockdistill", "teacher_floor": 0.0,
                     "method_options": dict(lambda_mem=100., box_noise=0.4), **changes})


def flags(settings):
    """Settings as command line words."""
    words = []
    for name, value in settings.items():
        if isinstance(value, dict):
            value = tuple(f"{key}={x}" for key, x in value.items())
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else (str(value),))]
    return words


def one_learner(toy, teacher=None, **changes):
    """(learner, teacher, batches) for the loop itself, without files."""
    cfg = distilling(toy, teacher, **changes) if teacher else Config(**{**TINY, "root": toy, **changes})
    dataset = train.build_data(cfg, "train")
    torch.manual_seed(0)
    student = train.build_model(cfg, len(dataset.classes))
    network = train.load_model(teacher)[0].requires_grad_(False) if teacher else None
    learner = Learner(student, train.open_method(cfg, network, student) if teacher else None).train()
    batches = list(data.loader(dataset, cfg.batch_size, steps=cfg.steps))
    return cfg, learner, network, batches


def optimizer_of(learner, lr=0.0):
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return optimizer


# --- the loop ---------------------------------------------------------------------------------------------------------

def test_lr_warms_up_then_drops_or_follows_a_cosine_by_hand():
    drop = Config(warmup=4, schedule="drop", drop_at=0.5)
    assert [train.lr_factor(drop, s, 10) for s in (0, 1, 3, 4, 5, 9)] == [0.25, 0.5, 1.0, 1.0, 0.1, 0.1]
    cosine = Config(warmup=0, schedule="cosine")
    assert train.lr_factor(cosine, 0, 100) == 1.0
    assert train.lr_factor(cosine, 50, 100) == pytest.approx(0.02 + 0.98 / 2)       # cos(pi/2) = 0
    assert train.lr_factor(cosine, 100, 100) == pytest.approx(0.02)


def test_two_identical_batches_give_equal_gradients(toy):
    """DAB-DETR issue 58: without zero_grad the second gradient holds the first. lr 0, so nothing else changes."""
    cfg, learner, _, batches = one_learner(toy, denoising=0)
    for module in learner.modules():                    # BatchNorm's running statistics are not used in training mode
        assert not isinstance(module, torch.nn.Dropout) or module.p == 0
    logs = [log for _, log in train.train_steps(learner, None, optimizer_of(learner), [batches[0]] * 2, cfg, 2)]
    assert logs[0]["grad_norm"] == logs[1]["grad_norm"] > 0


def test_the_log_holds_every_weighted_loss_by_name_and_their_sum(toy):
    cfg, learner, _, batches = one_learner(toy)
    (_, log), = train.train_steps(learner, None, optimizer_of(learner), batches[:1], cfg, 1)
    names = [name for name in log if name.startswith("loss_")]
    assert {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_ce_interm", "loss_giou_dn_0"} <= set(names)
    assert log["loss"] == pytest.approx(sum(log[name] for name in names))
    assert log["images"] == batches[0].image_ids


def test_accumulated_parts_are_the_mean_of_their_own_losses(toy):
    cfg, learner, _, batches = one_learner(toy, denoising=0, accumulate=2)
    (_, whole), = train.train_steps(learner, None, optimizer_of(learner), batches[:1], cfg, 1)
    undivided = dataclasses.replace(cfg, accumulate=1)
    alone = [next(train.train_steps(learner, None, optimizer_of(learner), [part], undivided, 1))[1]
             for part in batches[0].split(2)]
    # BatchNorm sees each part alone in both cases.
    assert whole["loss"] == pytest.approx(sum(log["loss"] for log in alone) / 2, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_name_and_images(toy, monkeypatch):
    cfg, learner, _, batches = one_learner(toy)
    before = {k: v.clone() for k, v in learner.student.named_parameters()}
    weights = {**learner.student.loss_weights, "loss_giou": float("nan")}
    monkeypatch.setattr(type(learner.student), "loss_weights", weights)
    first = batches[0].targets[0]["image_id"]
    with pytest.raises(FloatingPointError, match=rf"step 0: loss_giou is not finite, on images \[{first}, "):
        next(train.train_steps(learner, None, optimizer_of(learner, 1.0), batches, cfg, 3))
    assert all(torch.equal(before[k], v) for k, v in learner.student.named_parameters())


def test_predictions_that_are_not_finite_stop_with_step_and_images(toy):
    cfg, learner, _, batches = one_learner(toy)
    with torch.no_grad():
        learner.student.decoder.class_heads[0].bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 0, images \[\d+, \d+\]: .*predicted logits"):
        next(train.train_steps(learner, None, optimizer_of(learner), batches, cfg, 3))


def test_fp16_leaves_out_a_step_whose_gradient_overflows(toy):
    """Simulated: a scale beyond float32 makes every gradient infinite. The scaler halves itself, no weight moves."""
    cfg, learner, _, batches = one_learner(toy, precision="fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 127)
    before = {k: v.clone() for k, v in learner.student.named_parameters()}
    (_, log), = train.train_steps(learner, None, optimizer_of(learner, 1.0), batches[:1], cfg, 1, scaler=scaler)
    assert all(torch.equal(before[k], v) for k, v in learner.student.named_parameters())
    assert scaler.get_scale() == 2.0 ** 126 and log["loss"] > 0


def test_autocast_losses_agree_with_fp32(toy, teacher):
    """But for the boxes of learned queries: an untrained encoder's proposals are near ties, rounding chooses others."""
    cfg, learner, network, batches = one_learner(toy, teacher)
    logs = []
    for precision in ("fp32", "bf16"):
        (_, log), = train.train_steps(learner, network, optimizer_of(learner), batches[:1],
                                      dataclasses.replace(cfg, precision=precision), 1)
        logs.append(log)
    terms = [name for name in logs[0] if name.startswith("loss_ce") or "_dn" in name
             or name in ("memory", "cls", "l1", "giou")]
    assert len(terms) == 5 + 4 + 4
    for name in terms:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05, abs=1e-3), name


def test_answers_in_bf16_are_near_those_in_fp32_and_not_the_same():
    """The shipped teachers compute with bf16's three digits: scores move, by less than 0.05."""
    for detector, path in train.SHIPPED_TEACHERS.items():
        model, _ = train.load_model(path)
        image = torch.rand(1, 3, 48, 160, generator=torch.Generator().manual_seed(0))
        target = {"image_id": 0, "orig_size": torch.tensor([48, 160])}
        batch = data.collate([(image[0], target)])
        (exact,), (half,) = (train.answer(model, batch, kind) for kind in ("fp32", "bf16"))
        apart = (exact["scores"][:10] - half["scores"][:10]).abs().max()
        assert half["scores"].dtype == torch.float32 and 0 < apart < 0.05, detector


def test_detections_of_a_batch_are_those_of_its_images_alone_on_the_same_padded_inputs(toy, teacher):
    """DINO issue 231: batch size changed AP. Here only the padding can, so equal padding means equal detections."""
    model, _ = train.load_model(teacher)
    dataset = data.build("toy", toy, "train")
    items = [dataset[i] for i in range(4)]
    items[1] = (items[1][0][:, :32, :96], items[1][1])
    batch = data.collate(items)
    sizes = torch.tensor([[48, 160]] * 4)
    with torch.no_grad():
        together = models.postprocess(model(batch.images, batch.padding).detections, sizes, 20)
        for i, found in enumerate(together):
            alone, = models.postprocess(model(batch.images[i:i + 1], batch.padding[i:i + 1]).detections, sizes[:1], 20)
            for key in ("scores", "boxes"):
                torch.testing.assert_close(found[key], alone[key], atol=1e-4, rtol=1e-4)


# --- distillation in the loop -----------------------------------------------------------------------------------------

def test_the_teacher_is_frozen_and_every_term_reaches_the_student(toy, teacher):
    cfg, learner, network, batches = one_learner(toy, teacher, lr=1e-2)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    steps = list(train.train_steps(learner, network, optimizer_of(learner, 1e-2), batches, cfg, 3, probe_every=1))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())     # BatchNorm statistics included
    assert not network.training
    report = steps[0][1]["report"]
    assert list(report) == ["detection", "memory", "cls", "l1", "giou"]
    assert all(norm > 0 for _, norm in report.values())                                # the precursor's cls had none
    assert sum(share for share, _ in report.values()) == pytest.approx(1)


LEVELS = dict(feature_levels=3, points=2)


every_detector = pytest.mark.parametrize("detector, own", [
    ("dino", LEVELS | dict(denoising=6)), ("deformable_detr", LEVELS | dict(box_refine=True)),
    ("dab_detr", dict(feature_stride=8, num_patterns=2))])


@every_detector
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_a_rival(toy, detector, own):
    """What is compared is the same of both: queries, states, attention, matches. So every loss is 0, but for those that
    generate, or sharpen, what they compare."""
    common = {name: value for name, value in TINY.items() if name not in ("denoising", *LEVELS)}
    dataset = data.build("toy", toy, "train")
    batch = next(iter(data.loader(dataset, 2, steps=1)))
    for name in sorted(BASELINES):
        layers = {"kd_detr": 1}.get(name, 2)              # there all of the student's learn from the teacher's last
        cfg = Config(**common | {"decoder_layers": layers}, **own, root=toy, detector=detector)
        torch.manual_seed(0)
        teacher = train.build_model(cfg, len(dataset.classes)).eval().requires_grad_(False)
        student = copy.deepcopy(teacher).requires_grad_(True)
        student.training = True                           # of the outermost module alone: DINO's denoising queries
        method = train.open_method(Config(method=name), teacher, student)
        generator = torch.Generator().manual_seed(0)
        losses = Learner(student, method)(teacher, batch, generator)
        assert set(method.terms) <= set(losses), name
        for term in method.terms:
            if name == "mgd" or term.startswith("prior"):
                assert losses[term] > 0
            else:
                assert losses[term].abs() < 1e-4, (name, term)


@every_detector
def test_target_aware_queries_see_the_learned_ones_where_asked(toy, detector, own):
    """A student that is its teacher answers alike. Once its own learned contents differ, only what sees them does not."""
    dataset = data.build("toy", toy, "train")
    batch = next(iter(data.loader(dataset, 2, steps=1)))
    common = {name: value for name, value in TINY.items() if name not in ("denoising", *LEVELS)}
    torch.manual_seed(0)
    teacher = train.build_model(Config(**common, **own, detector=detector), len(dataset.classes)).eval()
    student = copy.deepcopy(teacher.requires_grad_(False))
    student.training = True                               # of the outermost module alone: DINO's denoising queries
    for changed in (False, True):
        if changed:
            student.learned_content.normal_()
        for sees in (False, True):
            method = train.CLoCKDistill(16, 16, content="own", sees_learned=sees, confidence=False)
            losses = Learner(student, method)(teacher, batch)
            differs = sum(losses[term].item() for term in ("cls", "l1", "giou")) > 1e-5
            assert differs == (changed and sees), (changed, sees, losses)


def test_distillation_off_is_plain_training_to_the_last_bit(toy, teacher, tmp_path):
    plain = train.fit(Config(root=toy, **TINY), Run(out=str(tmp_path / "plain"), workers=0))
    off = train.fit(distilling(toy, teacher, method_options=dict(lambda_mem=0., lambda_log=0.)),
                    Run(out=str(tmp_path / "off"), workers=0))
    a, b = (checkpoints.load(tmp_path / name / "last.pt")["model"] for name in ("plain", "off"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    on = train.fit(distilling(toy, teacher), Run(out=str(tmp_path / "on"), workers=0))
    c = checkpoints.load(tmp_path / "on" / "last.pt")["model"]
    assert not all(torch.equal(a[k], c[k]) for k in a)
    assert plain["steps"] == off["steps"] == on["steps"]


def test_distillation_leaves_the_denoising_noise_as_it_was(toy, teacher):
    """Student alone and distilled student must differ by the method, not by other random numbers."""
    noise = {}
    choices = {"off": dict(lambda_mem=0., lambda_log=0.),
               "on": dict(box_noise=0.4, random_queries=5, random_fixed=False)}
    for name, options in choices.items():
        cfg, learner, network, batches = one_learner(toy, teacher, method_options=options)
        (_, log), = train.train_steps(learner, network, optimizer_of(learner), batches[:1], cfg, 1)
        noise[name] = {k: v for k, v in log.items() if k.startswith("loss_")}
    assert noise["on"] == pytest.approx(noise["off"], rel=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(teacher_floor=1.1), "under the floor"),
    (dict(feature_levels=2), "do not fit"),
    (dict(class_map="Car,Cyclist"), "knows 3 classes (Car, Pedestrian, Cyclist), toy has 2 (Car, Cyclist):"),
    (dict(method_options=("lamda_mem=1",)), "there is no option 'lamda_mem'"),
    (dict(method_options=("groups=many",)), "want a int"),
    (dict(method_options=("preset=mine",)), "preset=mine: choose from paper"),
    (dict(teacher="nowhere"), "nowhere"),
    (dict(balance={"maps": 1}), "clockdistill has no loss maps, only memory, cls, l1, giou"),
    (dict(balance={"memory": 0}), "ratios above 0"),
    (dict(balance={"memory": "much"}), "want a float"),
    (dict(balance={"memory": 1, "memory+cls": 1}), "each loss once"),
    (dict(balance={"memory": 1}), "this run has 3 in all"),
    (dict(balance={"memory": 1}, method_options=("lambda_mem=10",)), "lambda_mem has no effect beside --balance"),
    (dict(method_options=("groups=1", "groups=2")), "groups is given twice"),
])
def test_a_pair_that_cannot_work_is_refused_in_one_line(toy, teacher, tmp_path, change, message, capsys):
    settings = {**TINY, "root": toy, "teacher": str(teacher), "teacher_floor": 0.0, **change}
    assert train.main(["distill", "--out", str(tmp_path / "run"), "--workers", "0", *flags(settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_teacher_without_what_it_is_asked_with_is_refused_before_the_run():
    """Deformable DETR has no label embedding. Without a logit part nobody asks."""
    common = {name: value for name, value in TINY.items() if name != "denoising"}
    teacher = student = train.build_model(Config(**common, detector="deformable_detr"), 3)
    with pytest.raises(ValueError, match='content="label" needs the teacher'):
        train.open_method(Config(method="clockdistill"), teacher, student)
    train.open_method(Config(method="clockdistill", method_options=dict(lambda_log=0.)), teacher, student)
    # With what it has, on the models' device ("meta" stands for a GPU), and without a random number drawn.
    before = torch.get_rng_state()
    options = train.PRESETS["deformable_detr"] | dict(random_fixed=False)
    train.open_method(Config(method="clockdistill", method_options=options), teacher.to("meta"), student)
    assert torch.get_rng_state().equal(before)


# --- recipes for a few hundred pictures -------------------------------------------------------------------------------

@pytest.mark.parametrize("detector", models.DETECTORS)
def test_the_small_recipes_make_a_pair_of_one_memory_with_the_larger_teacher(detector):
    pytest.importorskip("timm", reason="timm is an extra: pip install timm")
    sizes = []
    for role, command in (("teacher", "fit"), ("student", "distill")):
        cfg, _ = train.configure(command, f"small-{role}", detector=detector, pretrained_backbone="none", teacher="-")
        model = train.build_model(cfg, 3).eval()
        image = torch.zeros(1, 3, *train.parse_size(cfg.size))
        with torch.no_grad():
            memory = model.encode(image, torch.zeros_like(image[:, 0], dtype=torch.bool))
        sizes.append((train.count_parameters(model), memory.shapes))
    assert sizes[0][0] > 1.5 * sizes[1][0] and sizes[0][1] == sizes[1][1]
    assert sizes[0][1][0] == ((16, 53) if detector != "dab_detr" else (8, 27))            # strides 8 and 16
    train.open_balance(cfg, train.CLoCKDistill(96, 128), cfg.steps)


def test_without_its_backbone_file_a_small_recipe_says_how_to_get_it():
    pytest.importorskip("timm", reason="timm is an extra: pip install timm")
    with pytest.raises(FileNotFoundError, match="make kitti-backbones"):
        train.build_model(train.configure("fit", "small-student", pretrained_backbone="nowhere.pth")[0], 3)


# --- weights that carry over ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("detector", models.DETECTORS)
def test_a_teacher_that_encodes_each_image_once_has_the_same_memories(toy, detector):
    torch.manual_seed(0)
    settings = {k: v for k, v in TINY.items() if detector == "dino" or k not in ("denoising", "feature_levels", "points")}
    teacher = train.build_model(Config(**{**settings, "root": toy, "detector": detector}), 3).eval()
    images = torch.rand(3, 3, 128, 192)
    padding = torch.zeros(3, 128, 192, dtype=torch.bool)
    padding[2, :, 128:] = True
    calls, encode = [], teacher.encode

    def counted(*inputs):
        calls.append(len(inputs[0]))
        return encode(*inputs)
    once = EncodeOnce(counted, room=1e6)
    with torch.no_grad():
        wanted = encode(images, padding)
        for _ in range(2):
            memory = once(images, padding)
            for name in ("tokens", "position"):        # what padded tokens hold means nothing
                mine, theirs = (getattr(m, name)[~wanted.padding] for m in (memory, wanted))
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            assert memory.padding.equal(wanted.padding) and memory.valid_ratios.equal(wanted.valid_ratios)
            assert memory.shapes == wanted.shapes
        assert calls == [1, 1, 1]                     # the second time all three were known
        padded = padding.clone()
        padded[0, 64:] = True                         # the same pixels, padded otherwise
        assert not torch.equal(once(images, padded).tokens[0], memory.tokens[0]) and len(calls) == 4
        with torch.autocast("cpu", torch.bfloat16):       # other numbers than those kept
            assert once(images, padding).tokens[0].ne(memory.tokens[0]).any() and len(calls) == 7
        calls[4:] = []
        full = EncodeOnce(counted, room=0)
        assert full(images, padding).tokens.equal(memory.tokens)
        full(images, padding)
        assert len(calls) == 10                       # no room: six more


def test_a_run_with_a_cached_teacher_has_the_losses_of_one_without(toy, teacher, tmp_path):
    logs = []
    for cache in (0.0, 0.1):
        out = tmp_path / str(cache)
        cfg = distilling(toy, teacher, steps=4, augment=False)
        train.fit(cfg, Run(out=str(out), workers=0, teacher_cache=cache))
        logs.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    with pytest.raises(ValueError, match="--data toy every image is augmented anew"):      # no memory met twice
        train.fit(distilling(toy, teacher), Run(out=str(tmp_path / "anew"), workers=0, teacher_cache=0.1))


def test_a_process_without_objects_leaves_the_ratio_to_the_others(monkeypatch):
    """This process measures (2, NaN), another one (NaN, 6); of the last part neither knows."""
    ratios = {"memory": 2., "cls": math.nan, "l1": math.nan}
    monkeypatch.setattr(clockdistill, "gradient_ratio", lambda losses, names, parameters: ratios[names[0]])
    other = torch.tensor([[0., 6., 0.], [0., 1., 0.]])                       # its ratios, and whether it knows them
    monkeypatch.setattr(clockdistill, "_mean_over_processes", lambda mine: (mine + other) / 2)
    balance = clockdistill.Balance(dict.fromkeys(ratios, 1.0), steps=1)
    balance.measure({"loss_ce": torch.zeros(())}, 0, [])
    assert balance.measured[0, :2].tolist() == [2., 6.] and balance.measured[0, 2].isnan()


def test_a_number_may_be_a_fraction():
    known = {"memory": 1.0}
    assert train.read_options(["memory=1/16"], known, "--balance") == {"memory": 0.0625}
    for bad in ("1/0", "1/", "/2", "1/2/3", "inf", "1/1e999", "x"):
        with pytest.raises(ValueError, match="want a float"):
            train.read_options([f"memory={bad}"], known, "--balance")


def test_the_ratio_of_two_gradients_by_hand():
    """Detection's gradient is (3, 4) in what both reach, 5 long, and 12 in the decoder, which memory does not reach."""
    shared, decoder = torch.tensor([1., 2.], requires_grad=True), torch.tensor([1.], requires_grad=True)
    losses = {"loss_ce": 3 * shared[0] + 12 * decoder[0], "loss_bbox": 4 * shared[1], "memory": 0.5 * shared[0],
              "cls": 5 * decoder[0], "l1": 12 * shared[0]}
    assert clockdistill.gradient_ratio(losses, ["memory"], [shared, decoder]) == pytest.approx(0.5 / 5)
    assert clockdistill.gradient_ratio(losses, ["cls", "l1"], [shared, decoder]) == pytest.approx(1.0)    # (12, 0, 5) to 13
    frozen = torch.tensor([7.])
    assert clockdistill.gradient_ratio(losses, ["memory"], [frozen, shared, decoder]) == pytest.approx(0.5 / 5)
    assert math.isnan(clockdistill.gradient_ratio(losses, ["memory"], [frozen]))
    assert clockdistill.gradient_ratio(losses, ["memory"], iter([shared, decoder])) == pytest.approx(0.5 / 5)
    assert math.isnan(clockdistill.gradient_ratio(losses | {"memory": torch.zeros(())}, ["memory"], [shared]))
    with pytest.raises(ValueError, match='begin with "loss_"'):
        clockdistill.gradient_ratio({"memory": losses["memory"]}, ["memory"], [shared])


def test_balance_by_hand():
    """Ratios of 0.1 and 0.4 are 0.2 in geometric mean; so a wanted ratio of 1 multiplies with 5, of 0.5 with 2.5."""
    balance = clockdistill.Balance({"memory": 1.0, "cls+l1": 0.5}, steps=2)
    shared = torch.tensor([1.], requires_grad=True)
    for step, ratio in enumerate((0.1, 0.4, 9)):
        losses = {"loss_ce": 2 * shared[0], "memory": 2 * ratio * shared[0], "cls": ratio * shared[0],
                  "l1": ratio * shared[0], "giou": shared[0]}
        balance.measure(losses, step, [shared])
        factors = {"memory": 0.0, "cls+l1": 0.0} if step < 2 else pytest.approx({"memory": 5.0, "cls+l1": 2.5})
        assert balance.factors(step) == factors
    weighted = balance(losses, 2)
    assert weighted["memory"].item() == pytest.approx(90) and weighted["giou"].item() == 1
    assert weighted["l1"].item() == pytest.approx(22.5)
    resumed = clockdistill.Balance(balance.ratios, steps=2)
    resumed.load_state_dict(balance.state_dict())
    assert resumed.factors(3) == balance.factors(3)
    with pytest.raises(ValueError, match="no gradient"):
        clockdistill.Balance({"memory": 1.0}).factors(8)


def test_a_weight_beside_the_balance_of_another_part_is_read():
    cfg, _ = train.configure("distill", "small-student", teacher="x", balance=["memory=50"],
                             method_options=["lambda_log=0.5"])
    assert cfg.balance == {"memory": 50} and cfg.method_options["lambda_log"] == 0.5


def test_a_part_that_is_off_is_not_balanced():
    method = train.CLoCKDistill(8, 8, lambda_log=0.)
    words = dict(teacher="t", method="clockdistill", balance={"memory": 50., "cls+l1+giou": 1.})
    assert train.open_balance(Config(**TINY | words), method, 20).ratios == {"memory": 50.}
    method.lambda_mem = 0.
    assert train.open_balance(Config(**TINY | words), method, 20) is None
    cfg, _ = train.configure("distill", "small-student", teacher="t", balance=["none"], method_options=["lambda_mem=3"])
    assert cfg.balance == {} and cfg.method_options["lambda_mem"] == 3


def test_ratios_are_averaged_over_processes_where_the_losses_are(monkeypatch):
    """NCCL takes tensors of a GPU alone, and between models of one width a method has no parameter that lies there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    told = []
    monkeypatch.setattr(clockdistill, "gradient_ratio", lambda *args: 4.)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda row: told.append(row.device.type))
    cfg = Config(**TINY, teacher="t", method="clockdistill", balance={"memory": 50.})
    with FakeTensorMode():                                              # a GPU without a GPU
        balance = train.open_balance(cfg, train.CLoCKDistill(8, 8).to("cuda"), 20)
        balance.measure({"memory": torch.zeros((), device="cuda")}, 0, [])
    assert told == ["cuda"]


def test_a_balanced_part_has_the_wanted_gradient(toy, teacher):
    """The same batch again and again, with a learning rate of 0: from the ninth step on the ratios are those asked for,
    whatever lambda is, and until then the student trains alone."""
    wanted = {"memory": 2., "cls+l1+giou": 0.25}
    cfg, learner, network, batches = one_learner(
        toy, teacher, balance=wanted,
        method_options=dict(lambda_mem=123., content="own"), denoising=0)
    balance = train.open_balance(cfg, learner.method, 20)
    logs = [log for _, log in train.train_steps(learner, network, optimizer_of(learner), batches[:1] * 9, cfg, 9,
                                                probe_every=8, balance=balance)]
    assert logs[0]["memory"] == logs[7]["memory"] == 0 and logs[8]["memory"] > 0
    assert logs[8]["loss"] == pytest.approx(sum(v for k, v in logs[8].items() if k.startswith("loss_"))
                                            + sum(logs[8][name] for name in ("memory", "cls", "l1", "giou")))
    assert logs[8]["balance"].keys() == {"memory", "cls+l1+giou"} and not any("balance" in log for log in logs[:8])
    student = [p for p in learner.student.parameters() if p.requires_grad]
    losses = balance(learner(network, batches[0]), 8)
    assert clockdistill.gradient_ratio(losses, ["memory"], student) == pytest.approx(2, rel=1e-3)
    assert clockdistill.gradient_ratio(losses, ["cls", "l1", "giou"], student) == pytest.approx(0.25, rel=1e-3)


# --- resumption -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_killed_goes_on_bit_for_bit(toy, teacher, tmp_path, how):
    """The same distillation twice: left alone, and killed in the middle and resumed. Weights and log must agree."""
    settings = {**TINY, "root": toy, "steps": 24, "teacher": str(teacher), "teacher_floor": 0.0,
                "method_options": dict(lambda_mem=100., box_noise=0.4)}
    if how == signal.SIGKILL:                            # in the middle of measuring, steps 0 to 7
        settings |= {"method_options": dict(box_noise=0.4), "balance": {"memory": 1., "cls+l1+giou": 0.1}}

    def words(out):
        return ["distill", "--out", str(tmp_path / out), "--workers", "1", "--save-minutes", "0",
                "--eval-every", "10", "--resume", *flags(settings)]

    assert train.main(words("whole")) == 0
    run = subprocess.Popen([sys.executable, str(HERE / "train.py"), *words("cut")],
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    log = tmp_path / "cut" / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 5):
        assert run.poll() is None, run.stderr.read().decode()
        time.sleep(0.02)
    os.killpg(run.pid, how)                              # as Ctrl-C, `timeout` and torchrun do: the whole group
    run.communicate()
    assert run.returncode in (130, -signal.SIGKILL)
    reached = len(log.read_text().splitlines())
    assert reached < 24
    assert train.main(words("cut")) == 0

    a, b = (checkpoints.load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(torch.equal(a["resume"]["student"][k], b["resume"]["student"][k]) for k in a["model"])
    logs = [[json.loads(line) | {"seconds": 0} for line in (tmp_path / name / "log.jsonl").open()]
            for name in ("whole", "cut")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(24))
    assert [p["step"] for p in a["history"]] == [p["step"] for p in b["history"]] == [10, 20, 24]


def test_resume_refuses_other_settings_and_a_fresh_run_refuses_an_old_folder(toy, tmp_path, capsys):
    train.fit(Config(root=toy, **TINY), Run(out=str(tmp_path / "run"), workers=0))
    words = ["fit", "--out", str(tmp_path / "run"), "--workers", "0", *flags({**TINY, "root": toy})]
    assert train.main(words) == 2
    assert "add --resume" in capsys.readouterr().err
    for changes, difference, remedy in (
            (["--lr", "0.5"], "(lr)", "or choose another --out\n"),
            (["--steps", "9", "--ema", "0.5"], "(steps, ema)", "or choose another --out, and go on from its weights")):
        assert train.main([*words, "--resume", *changes]) == 2
        error = capsys.readouterr().err
        assert f"other settings {difference}" in error and remedy in error


def test_only_a_run_s_own_leftovers_are_removed(toy, tmp_path):
    others = [tmp_path / name for name in (".env.production.local", ".eslintrc.base.json")]
    left = tmp_path / ".last.pt.a1b2c3d4"                # of a kill in the middle of a save
    for file in (*others, left):
        file.write_text("")
    train.fit(Config(root=toy, **TINY), Run(out=str(tmp_path), workers=0))
    assert all(file.exists() for file in others) and not left.exists()


def test_a_full_disk_at_the_log_is_one_line_with_a_remedy(toy, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(train, "train_steps", full)
    with pytest.raises(OSError, match=f"{tmp_path}/run/log.jsonl cannot be written, .* full: make room; --resume"):
        train.fit(Config(root=toy, **TINY), Run(out=str(tmp_path / "run"), workers=0))


@pytest.mark.parametrize("command, told", [
    (["eval", "--checkpoint", "x"], "stopped at once\n"),
    (["fit"], "stopped at once; the same command with --resume goes on from the last checkpoint\n"),
    (["table", "toy"], "stopped at once; the same command goes on from the last checkpoint\n")])
def test_a_stop_promises_only_what_is_true(monkeypatch, capsys, command, told):
    def stop(*given, **rest):
        raise KeyboardInterrupt
    for module, name in ((train, "fit"), (train, "evaluate_checkpoint"), (tables, "run")):
        monkeypatch.setattr(module, name, stop)
    assert train.main(command) == 130 and capsys.readouterr().err == told


# --- several processes ------------------------------------------------------------------------------------------------

class TinyBackbone(torch.nn.Module):
    """Three maps at strides 8, 16, 32 without BatchNorm, whose statistics would differ between one process and two."""

    channels = [8, 8, 8]

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 8, stride=8)
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, images):
        maps = [self.stem(images)]
        for conv in self.down:
            maps.append(conv(maps[-1].relu()))
        return maps


# Methods without random numbers, which each process draws for itself.
SPREAD = {"clockdistill": dict(lambda_mem=100.), "fitnets": {}, "hinton": {}, "fgd": dict(levels=3), "gkd": {},
          "kd_detr": dict(general=0), "detrdistill": {}, "d3etr": {}}


def gradients(toy, indices, empty=()):
    """One distillation step by each method on these images of the toy (without objects where `empty` says so) ->
    {method: {parameter of the student: gradient}}."""
    dataset, found = data.build("toy", toy, "train"), {}
    items = [dataset[i] for i in indices]
    for i, (_, target) in zip(indices, items):
        if i in empty:
            target["boxes"], target["labels"] = target["boxes"][:0], target["labels"][:0]
    batch = data.collate(items)
    make = lambda: models.build("dino", 3, backbone=TinyBackbone(), hidden_dim=16, heads=2, ffn_dim=16, points=2,
                                encoder_layers=1, decoder_layers=2, num_queries=8, feature_levels=3, denoising=0)
    for name, options in SPREAD.items():
        torch.manual_seed(0)
        student, teacher = make(), make().eval().requires_grad_(False)
        learner = Learner(student, train.methods()[name](16, 16, **options))
        if dist.is_initialized():
            learner = torch.nn.parallel.DistributedDataParallel(learner)
        sum(learner(teacher, batch).values()).backward()
        found[name] = {key: p.grad for key, p in student.named_parameters() if p.grad is not None}
    return found


# Which of the four images have no objects: none, or both images of the second process.
EMPTY = [(), (1, 3)]


def worker(rank, port, toy, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with train.processes(torch.device("cpu")):
        for case, empty in enumerate(EMPTY):
            found = gradients(toy, [0, 2] if rank == 0 else [1, 3], empty)
            if rank == 0:
                torch.save(found, folder / f"{case}.pt")


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(toy, tmp_path):
    port = 20000 + os.getpid() % 20000
    mp.start_processes(worker, (port, toy, tmp_path), nprocs=2, start_method="spawn")
    for case, empty in enumerate(EMPTY):
        two, one = torch.load(tmp_path / f"{case}.pt"), gradients(toy, [0, 1, 2, 3], empty)
        for method in SPREAD:
            assert two[method].keys() == one[method].keys()
            for name, whole in one[method].items():
                torch.testing.assert_close(
                    two[method][name], whole, atol=1e-5, rtol=1e-3,
                    msg=lambda text: f"{method}, {name}, without {empty}: {text}")


def test_torchrun_trains_with_two_processes(toy, tmp_path):
    port = str(41000 + os.getpid() % 10000)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port,
             str(HERE / "train.py"), "fit", "--out", str(tmp_path / "run"), "--workers", "0",
             *flags({**TINY, "root": toy, "steps": 2})]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=one_thread, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["world"] == 2 and result["steps"] == 2
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2

    # Two machines without a common disk: the second has no checkpoint.
    (tmp_path / "0").symlink_to(tmp_path / "run")
    place = words.index(str(HERE / "train.py"))
    apart = shlex.join([sys.executable, *words[place:]]).replace(str(tmp_path / "run"), f"{tmp_path}/$RANK")
    launch = [*words[:place], "--no-python", "bash", "-c", apart + " --resume"]
    done = subprocess.run(launch, capture_output=True, text=True, env=one_thread, timeout=300)
    assert done.returncode and "the processes would begin at steps [2, 0]: copy" in done.stderr, done.stderr[-2000:]


# --- commands ---------------------------------------------------------------------------------------------------------

def test_fit_distill_eval_predict_export_from_the_command_line(toy, tmp_path, capsys):
    out = str(tmp_path / "teacher")
    common = ["--workers", "0", *flags({**TINY, "root": toy})]
    assert train.main(["fit", "--out", out, *common]) == 0
    assert {p.name for p in Path(out).iterdir()} == {"config.json", "log.jsonl", "last.pt", "best.pt", "result.json"}
    result = json.loads(Path(out, "result.json").read_text())
    told = {"AP", "AP50", "AP75", "params", "gflops", "minutes", "steps", "seed", "commit", "machine", "settings"}
    assert told <= result.keys()

    assert train.main(["export", "--checkpoint", out, "--out", str(tmp_path / "weights.safetensors")]) == 0
    assert train.main(["distill", "--teacher", str(tmp_path / "weights.safetensors"), "--teacher-floor", "0",
                       "--out", str(tmp_path / "student"), *common]) == 0
    scores = tmp_path / "scores.json"
    assert train.main(["eval", "--checkpoint", str(tmp_path / "student"), "--root", toy, "--workers", "0",
                       "--out", str(scores)]) == 0
    told = json.loads(scores.read_text())
    again = json.loads((tmp_path / "student" / "result.json").read_text())
    assert told["AP"] == again["AP"]
    picture = str(next(Path(toy, "training/image_2").iterdir()))
    assert train.main(["predict", "--checkpoint", str(tmp_path / "student"), "--out", str(tmp_path / "seen"),
                       "--min-score", "0", picture]) == 0
    listed = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert listed[0]["image"] == picture and listed[0]["detections"][0].keys() == {"class", "score", "box"}
    assert (tmp_path / "seen" / listed[0]["drawn"]).exists()


@pytest.mark.parametrize("every", [1, 0])
def test_a_run_whose_answers_are_not_finite_keeps_its_last_good_checkpoint(toy, tmp_path, monkeypatch, every):
    out = tmp_path / "run"
    cfg = Config(root=toy, **{**TINY, "steps": 2})
    train.fit(dataclasses.replace(cfg, steps=1), Run(out=str(out), workers=0))
    good = {name: (out / name).read_bytes() for name in ("last.pt", "best.pt")}
    after_two = models.postprocess

    def broken(detections, *rest):
        detections.boxes[..., 0, 2] = float("nan")
        return after_two(detections, *rest)
    monkeypatch.setattr(models, "postprocess", broken)
    for name in ("config.json", "result.json"):
        (out / name).unlink()
    monkeypatch.setattr(train, "restore", lambda path, *rest: checkpoints.load(path))
    with pytest.raises(FloatingPointError, match="image .*not finite"):
        train.fit(cfg, Run(out=str(out), workers=0, resume=True, eval_every=every))
    assert good == {name: (out / name).read_bytes() for name in good}


def test_a_learning_rate_that_breaks_the_model_is_no_good_result(toy, tmp_path, capsys):
    out = tmp_path / "run"
    common = ["--workers", "0", "--eval-every", "1", *flags({**TINY, "root": toy, "steps": 6, "lr": 1e6})]
    assert train.main(["fit", "--out", str(out), *common]) == 2
    assert "finite" in capsys.readouterr().err
    assert not (out / "result.json").exists()
    for kept in out.glob("*.pt"):
        train.load_model(kept)


def test_a_teacher_s_stored_ap_counts_for_its_own_images_only(toy, teacher, capsys):
    for split, source in ("val", "stored in its checkpoint"), ("tune", "measured now"):
        train.open_teacher(distilling(toy, teacher), Run(workers=0), data.build("toy", toy, split), torch.device("cpu"))
        assert source in capsys.readouterr().out
    with pytest.raises(ValueError, match="size None, unlike this run"):
        train.open_teacher(distilling(toy, teacher, size="48,160", teacher_floor=1.), Run(workers=0),
                           data.build("toy", toy, "val", size=(48, 160)), torch.device("cpu"))
    train.open_teacher(distilling(toy, teacher, size="48,160"), Run(workers=0),
                       data.build("toy", toy, "val", size=(48, 160)), torch.device("cpu"))
    assert "it was trained with --size None, unlike this run" in capsys.readouterr().out


def test_validation_images_that_are_trained_on_are_counted(toy, tmp_path, capsys):
    train.fit(Config(root=toy, **{**TINY, "train_split": "all"}), Run(out=str(tmp_path / "run"), workers=0))
    assert "4 of 4 validation images are trained on too" in capsys.readouterr().out


def test_a_teacher_that_is_broken_does_not_pass_the_floor(toy, teacher, tmp_path):
    payload = checkpoints.load(teacher / "last.pt")
    payload["model"]["decoder.norm.bias"][0] = float("nan")
    torch.save(payload, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="decoder.norm.bias is not finite"):
        train.fit(Config(root=toy, **TINY, teacher=str(tmp_path / "broken.pt"), method="clockdistill", teacher_floor=0),
                  Run(out=str(tmp_path / "run"), workers=0))


def test_a_checkpoint_names_no_file_to_open(toy, teacher, tmp_path, capsys):
    payload = checkpoints.load(teacher / "last.pt")
    payload["settings"]["root"] = str(tmp_path / "elsewhere")
    checkpoints.save(tmp_path / "forged.pt", payload)
    train.load_model(tmp_path / "forged.pt")
    assert train.main(["eval", "--checkpoint", str(tmp_path / "forged.pt")]) == 2
    assert f"eval needs --root, the folder of the toy images; {tmp_path}/forged.pt was trained on" in (
        capsys.readouterr().err)


def test_queries_and_average_can_follow_the_data_and_the_length(toy, tmp_path, capsys):
    settings = {k: v for k, v in TINY.items() if k not in ("num_queries", "ema", "steps")}
    most = train.build_data(Config(root=toy), "train").most_objects
    result = train.fit(Config(**settings, root=toy, steps=25, fit_to_data=True), Run(out=str(tmp_path / "a"), workers=0))
    assert result["settings"]["num_queries"] == max(30, 3 * most) and result["settings"]["ema"] == .2
    assert f"30 queries, for at most {most} objects" in capsys.readouterr().out
    given = train.fit_to_data(Config(**settings, fit_to_data=True, num_queries=7, ema=.5), train.build_data(Config(root=toy), "train"), 25)
    assert (given.num_queries, given.ema) == (7, .5)                     # what is given stays


def test_too_few_queries_are_noted(toy, tmp_path, capsys):
    for queries in (1, 10):
        cfg = Config(root=toy, **TINY | dict(num_queries=queries, steps=0))
        train.fit(cfg, Run(out=str(tmp_path / str(queries)), workers=0))
        assert ("more than the model's 1 queries" in capsys.readouterr().out) == (queries == 1)


def test_a_folder_in_the_hands_of_another_run_is_refused(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "PATIENCE", 0)
    with checkpoints.locked(tmp_path):
        assert train.main(["fit", "--out", str(tmp_path), "--workers", "0", *flags({**TINY, "root": toy})]) == 2
    assert f"{tmp_path} is in the hands of another run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_last_evaluation_loses_no_step(toy, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    cfg = Config(**TINY | {"root": toy, "steps": 2})
    run = Run(out=str(tmp_path), workers=0, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(train, "detect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.fit(cfg, run)
    assert checkpoints.load(tmp_path / "last.pt")["step"] == 2
    monkeypatch.setattr(train, "losses_of", lambda *_: pytest.fail("a step was made again"))
    assert train.fit(cfg, dataclasses.replace(run, resume=True))["steps"] == 2


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "result.json"])
def test_nothing_of_an_earlier_run_is_overwritten_unasked(toy, tmp_path, name, capsys):
    (tmp_path / name).write_text("mine")
    assert train.main(["fit", "--out", str(tmp_path), "--workers", "0", *flags({**TINY, "root": toy})]) == 2
    assert f"already holds a run ({name})" in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("option, value", [
    ("ema", "nan"), ("ema", "1"), ("clip", "nan"), ("clip", "0"), ("lr", "-1"), ("lr", "inf"), ("limit", "0"), ("limit", "-1"),
    ("num-queries", "0"), ("batch-size", "0"), ("eval-batch", "0"), ("size", "0,0"), ("size", "1,2,3"),
    ("size", "-4,5"), ("size", "200,100"), ("accumulate", "99"), ("position-offset", "nan"), ("feature-stride", "0"), ("decoder-layers", "0"), ("steps", "-1"), ("warmup", "-1"), ("seed", "-1")])
def test_every_option_is_checked_before_data_is_read(tmp_path, option, value, capsys):
    assert train.main(["fit", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"),
                       f"--{option}={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --{option} ") and "want" in error and not list(tmp_path.iterdir())


def test_every_number_on_the_command_line_has_a_range():
    """From LIMITS, or from 0 on; a name in LIMITS that is no option would check nothing."""
    numbers = set()
    for field in [*dataclasses.fields(Config), *dataclasses.fields(Run)]:
        if {int, float} & set(getattr(field.type, "__args__", (field.type,))):
            numbers.add(field.name)
            least, end = train.LIMITS.get(field.name, (0, math.inf))
            assert not train.out_of_range(field.name, least)
            for wrong in (math.nan, math.inf, least - 1, end):
                assert "want at least" in train.out_of_range(field.name, wrong), (field.name, wrong)
    assert train.LIMITS.keys() <= numbers and len(numbers) > 30


@pytest.mark.parametrize("change, words", [
    ({"config.backbone": "resnet20"}, "unknown backbone"), ({"config.hidden_dim": 24}, "size mismatch"),
    ({"config.heads": 3}, "multiple of 4 and of heads 3"), ({"config.speed": 3}, "no option speed"),
    ({"config.num_classes": 3}, "multiple values"),
    ({"classes": ["a"], "category_ids": [1]}, "size mismatch"), ({"config.feature_stride": 16}, "no option")])
def test_a_checkpoint_whose_parts_do_not_fit_is_named(teacher, tmp_path, change, words):
    payload = checkpoints.load(teacher / "last.pt")
    for place, value in change.items():
        part, _, key = place.partition(".")
        payload[part] = payload[part] | {key: value} if key else value
    torch.save(payload, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.pt: weights and configuration do not fit .*{words}") as error:
        train.load_model(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_training_in_a_thread_that_may_not_listen_to_signals(toy, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train.fit(
        Config(root=toy, **TINY), Run(out=str(tmp_path / "run"), workers=0))))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 3


def test_without_unix_the_commands_still_load():
    """On Windows there is no resource, no fcntl and no os.setpgrp."""
    program = ("import os, sys; sys.modules['resource'] = sys.modules['fcntl'] = None; del os.setpgrp; import train, "
               "torch, data, math; assert math.isnan(train.peak_memory_gb(torch.device('cpu'))); data.apart(0)")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]


def test_predict_takes_folders_and_leaves_out_what_it_cannot_read(toy, teacher, tmp_path, capsys, monkeypatch):
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted(Path(toy, "training/image_2").iterdir())[:2]:
        (images / file.name).write_bytes(file.read_bytes())
    (images / "broken.png").write_bytes(b"not an image")
    (images / "notes.txt").write_text("no image")
    assert train.main(["predict", "--checkpoint", str(teacher), "--out", str(tmp_path / "out"), str(images)]) == 2
    told = capsys.readouterr()
    listed = json.loads((tmp_path / "out" / "predictions.json").read_text())
    count = sum(len(entry["detections"]) for entry in listed)
    assert f"{count} detections of score 0.4 or more in 2 images" in told.out and "left out 1 of 3 files" in told.err
    assert [Path(entry["image"]).name for entry in listed] == sorted(p.name for p in images.glob("[01]*.png"))
    for entry in listed:
        for found in entry["detections"]:
            x0, y0, x1, y1 = found["box"]
            assert 0 <= x0 <= x1 <= 160 and 0 <= y0 <= y1 <= 48
    # A link to nowhere is left out too, and a stop keeps what was found.
    (images / "a_link.png").symlink_to(tmp_path / "nowhere")
    words = ["predict", "--checkpoint", str(teacher), "--out", str(tmp_path / "stopped"), str(images)]
    assert train.main(words) == 2 and "left out 2 of 4 files" in capsys.readouterr().err
    answer, calls = train.answer, []

    def stopped(*given):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return answer(*given)
    with monkeypatch.context() as patch:
        patch.setattr(train, "answer", stopped)
        assert train.main(words) == 130
    assert json.loads((tmp_path / "stopped" / "predictions.json").read_text()) == listed[:1]
    # Where nothing can be read, what an earlier call found is left alone.
    again = ["predict", "--checkpoint", str(teacher), "--out", str(tmp_path / "out"), str(images / "broken.png")]
    assert train.main(again) == 2
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == listed


def test_resuming_notices_images_that_are_gone(toy, tmp_path, capsys):
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    command = ["fit", "--out", str(tmp_path / "run"), "--workers", "0", *flags({**TINY, "root": str(root)})]
    assert train.main(command) == 0
    (root / "training/image_2/000003.png").unlink()
    assert train.main([*command, "--resume"]) == 2
    assert "other settings (images, classes or boxes)" in capsys.readouterr().err


def test_resuming_from_what_is_no_run_is_one_line(toy, teacher, tmp_path, capsys):
    command = ["fit", "--out", str(tmp_path), "--workers", "0", "--resume", *flags({**TINY, "root": toy})]
    exported = {k: v for k, v in checkpoints.load(teacher / "last.pt").items() if k not in ("resume", "world", "taught_by")}
    for content, words in (({"a.b": torch.zeros(1)}, "is not a checkpoint of this project"), (exported, "last.pt ")):
        torch.save(content, tmp_path / "last.pt")
        assert train.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and words in error and str(tmp_path) in error


def test_images_without_any_object_are_no_training_set(toy, tmp_path, capsys):
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    for label in (root / "training/label_2").iterdir():
        label.write_text("")
    assert train.main(["fit", "--out", str(tmp_path / "run"), "--workers", "0",
                       *flags({**TINY, "root": str(root)})]) == 2
    assert "has an object to learn from" in capsys.readouterr().err


def test_a_damaged_log_is_trimmed_and_told(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 0}\n\n\0\0\n{"step": 2}\n{"step": 3}\n{"st')
    train.trim_log(log, 3)
    assert log.read_text() == '{"step": 0}\n{"step": 2}\n'
    assert "could not be read in 3 lines; it holds 2 of 3 steps" in capsys.readouterr().out


ABSURD = [("config", "deep"), ("config", None), ("classes", "Car"), ("classes", [1, 2, 3]), ("classes", None),
          ("classes", []), ("settings", []), ("detector", "yolo"), ("data", "voc"), ("metrics", None), ("model", [1]),
          ("model", {1: torch.zeros(1)}), ("model", {"a.b": [1.0]}), ("category_ids", [1]), ("category_ids", "123"),
          ("category_ids", [True, True, True]), ("metrics.AP", "high"), ("metrics.AP", [0.5]), ("config", {3: 4}),
          ("config.hidden_dim", 2 ** 20), ("config.decoder_layers", 10 ** 7), ("config.heads", -2),
          ("config.num_queries", "many"), ("config.ffn_dim", float("nan")), ("config.encoder_layers", True),
          ("config.hidden_dim", 16.0), ("config.backbone", 18), ("config.backbone", None),
          ("config.frozen_backbone", "no"), ("config.dropout", float("nan")), ("config.position_offset", float("inf")),
          ("config.shared_heads", 1), ("config.pretrained_backbone", "FILE"), ("settings.size", 48),
          ("settings.size", "1e5,1e5"), ("settings.size", [48, 160]), ("settings.class_map", {"Car": 1})]


@pytest.mark.parametrize("field, value", ABSURD, ids=[f"{field}={value}" for field, value in ABSURD])
def test_a_checkpoint_that_is_safe_but_absurd_is_refused(teacher, tmp_path, field, value):
    payload = checkpoints.load(teacher / "last.pt")
    part, _, key = field.partition(".")
    if key:
        payload[part][key] = value
    else:
        payload[part] = value
    torch.save(payload, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: its '{field}' is not what a checkpoint") as error:
        train.load_model(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_teacher_from_bare_weights_keeps_its_head_and_a_fresh_one_is_refused(toy, teacher, tmp_path, capsys):
    """`fit --init-from FILE --steps 0` is the README's way to a teacher."""
    model, _ = train.load_model(teacher)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    common = ["--workers", "0", *flags({**TINY, "root": toy, "steps": 0})]
    assert train.main(["fit", "--init-from", str(tmp_path / "bare.pth"), "--out", str(tmp_path / "a"), *common]) == 0
    assert "copied row by row" in capsys.readouterr().out
    again, _ = train.load_model(tmp_path / "a")
    assert torch.equal(again.decoder.class_heads[0].weight, model.decoder.class_heads[0].weight)
    assert train.main(["fit", "--init-from", str(tmp_path / "bare.pth"), "--init-classes", "Dog,Cat,Cow", "--out",
                       str(tmp_path / "b"), *common]) == 2
    assert "re-initialised and --steps 0 trains nothing" in capsys.readouterr().err
    assert train.main(["fit", "--init-from", str(teacher), "--out", str(tmp_path / "c"), *common]) == 0     # a folder


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see how far a process has come")
def test_ctrl_c_while_the_libraries_load_is_one_line():
    run = subprocess.Popen([sys.executable, str(HERE / "train.py"), "fit", "--help"], stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():          # torch is about to be imported
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == "stopped before anything began\n" and run.returncode == 130


@pytest.mark.parametrize("content, words", [
    (None, "no checkpoint at"), (b"", "it is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<html>", "a web page"), ({"conv1.weight": torch.zeros(1)}, "not the weights of this resnet18")])
def test_backbone_errors_speak_the_command_lines_words(toy, tmp_path, content, words, capsys):
    path = tmp_path / "none.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    assert train.main(["fit", "--out", str(tmp_path / "run"), "--workers", "0", *flags(
        {**TINY, "root": toy, "pretrained_backbone": str(path)})]) == 2
    error = capsys.readouterr().err
    assert words in error and str(path) in error and len(error.splitlines()) == 1
    assert "--pretrained-backbone FILE" in error and "--pretrained-backbone none" in error and "=False" not in error


@pytest.mark.parametrize("words, message", [
    (["--device", "cud"], "want auto | cpu | cuda | mps"), (["--method-options", "lambda_mem=nan"], "want a float"),
    (["--method-options", "lambda_mem=-5"], "want at least 0"), (["--method-options", "groups=1.5"], "want a int"),
    (["--method-options", "cls_weight=-1"], "want at least 0"), (["--method-options", "temperature=-1"], "want at least 0")])
def test_devices_and_method_options_are_checked_first(toy, teacher, tmp_path, words, message, capsys):
    assert train.main(["distill", "--teacher", str(teacher), "--out", str(tmp_path / "run"), "--workers", "0",
                       *flags({**TINY, "root": toy}), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and message in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [
    ["table", "toy", "--jobs", "0"], ["deploy", "--calibrate", "0"], ["bench", "--repeats", "0"],
    ["evidence", "kitti", "--root", "x", "--draws", "-1"]], ids=" ".join)
def test_counts_of_other_commands_begin_at_1(words, capsys):
    with pytest.raises(SystemExit) as end:
        train.parse(words)
    assert end.value.code == 2 and f"{words[-2]}: want a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("device, module", [("cuda", "cuda"), ("mps", "backends.mps")])
def test_a_gpu_that_is_not_there_is_one_line(teacher, tmp_path, capsys, monkeypatch, device, module):
    monkeypatch.setattr(f"torch.{module}.is_available", lambda: False)
    assert train.main(["predict", "--checkpoint", str(teacher), "--device", device, str(tmp_path)]) == 2
    assert f"--device {device}: torch finds none here" in capsys.readouterr().err


def test_a_run_is_named_by_what_it_depends_on():
    base = Config(**TINY)
    name = train.digest(base, None)
    places = dataclasses.replace(base, root="elsewhere", init_from=None)
    assert train.digest(places, None) == name
    changed = [dataclasses.replace(base, **change) for change in (
        dict(init_from="a.pth"), dict(init_from="b.pth"), dict(seed=1), dict(lr=2e-3), dict(hidden_dim=32),
        dict(val_split="train"),
        dict(method="clockdistill", method_options=dict(lambda_mem=2.)))]
    names = {name, train.digest(base, "abc"), *(train.digest(cfg, None) for cfg in changed)}
    assert len(names) == 2 + len(changed)


@pytest.mark.parametrize("recipe", [None, "small-student"])
def test_epochs_that_are_given_replace_the_recipes_steps(recipe):
    cfg, _ = train.configure("fit", recipe, epochs=5.0)
    assert (cfg.epochs, cfg.steps) == (5.0, None)
    assert train.configure("fit", recipe, epochs=5.0, steps=7)[0].steps == 7


def test_a_detector_of_the_toy_is_not_measured_at_kittis_size(toy, tmp_path, monkeypatch):
    """Read as KITTI the same images would be eight times as large, and AP 0."""
    sizes = []
    monkeypatch.setattr(train, "build_data", lambda cfg, *rest: sizes.append((cfg.data, cfg.size, cfg.class_map)) or 1 / 0)
    toys = train.SHIPPED_TEACHERS["dino"]
    with pytest.raises(ValueError, match="was trained on images as they are: give --size, for the toy's 48,160"):
        train.evaluate_checkpoint(toys, data="kitti", root=toy)
    for given in (dict(data="kitti", root=toy, size="48,160"), {}):
        with pytest.raises(ZeroDivisionError):
            train.evaluate_checkpoint(toys, **given)
    assert [size for _, size, _ in sizes] == ["48,160", None]


def test_a_detector_of_kitti_is_measured_on_cocos_layout_at_its_own_size(tmp_path, monkeypatch):
    seen = []
    payload = checkpoints.load(train.SHIPPED_TEACHERS["dino"])
    payload |= {"data": "kitti"}
    payload["settings"] |= {"data": "kitti", "size": None, "class_map": "kitti3"}
    monkeypatch.setattr(train, "load_payload", lambda path: payload)
    monkeypatch.setattr(train, "build_data", lambda cfg, *rest: seen.append((cfg.size, cfg.class_map)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.evaluate_checkpoint("kitti.pt", data="coco", root="x")
    assert seen == [("{},{}".format(*data.DEFAULT_SIZE["kitti"]), None)]


def test_zero_steps_write_the_untrained_checkpoint(toy, tmp_path):
    result = train.fit(Config(root=toy, **{**TINY, "steps": 0}), Run(out=str(tmp_path / "run"), workers=0))
    assert result["steps"] == 0 and checkpoints.load(tmp_path / "run" / "last.pt")["step"] == 0


@pytest.mark.parametrize("command", ["demo", "fit", "distill", "eval", "predict", "look", "export", "table"])
def test_help_tells_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if command in ("fit", "distill"):
        for field in dataclasses.fields(Config):
            if command == "distill" or field.name not in train.DISTILLATION:
                assert "--" + field.name.replace("_", "-") in text
        assert "(default: 0.0001)" in text and "toy-student" in text
    if command == "distill":
        assert "temperature=10.0" in text


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_bad_input_is_one_line_and_exit_code_2(toy, teacher, tmp_path, capsys):
    bomb = tmp_path / "bomb.pt"
    torch.save({"model": Bomb()}, bomb)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a checkpoint")
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(1)}, foreign)
    cases = [
        (["fit", "--data", "kitti", "--out", str(tmp_path / "r")],
         "give --root, the folder of the kitti images; datasets/toy, the default, holds the toy"),
        (["fit", "--root", str(tmp_path / "missing"), "--data", "kitti", "--out", str(tmp_path / "a")], "missing"),
        (["eval", "--checkpoint", str(tmp_path / "none.pt"), "--root", toy], "none.pt"),
        (["eval", "--checkpoint", str(bomb), "--root", toy], "bomb.pt"),
        (["eval", "--checkpoint", str(garbage), "--root", toy], "garbage.pt"),
        (["eval", "--checkpoint", str(foreign), "--root", toy], "foreign.pt"),
        (["eval", "--checkpoint", str(teacher), "--root", toy, "--class-map", "Car,Van"], "classes"),
        (["predict", "--checkpoint", str(teacher), "--out", str(tmp_path), str(broken)], "broken.png"),
        (["predict", "--checkpoint", str(teacher), "--out", str(tmp_path), str(tmp_path / "no.png")], "no.png"),
        (["distill", "--root", toy, "--out", str(tmp_path / "b")], "--teacher"),
        (["fit", "--root", toy, "--out", str(tmp_path / "c"), "--backbone", "resnet7"], "resnet"),
        (["fit", "--root", toy, "--out", str(tmp_path / "d"), "--size", "big"], "--size"),
        (["fit", "--root", toy, "--out", str(tmp_path / "e"), "--accumulate", "0"], "--accumulate"),
    ]
    for words, hint in cases:
        assert train.main(words) == 2, words
        out, err = capsys.readouterr()
        assert err.strip().splitlines()[-1].startswith("error: ") and hint in err, (words, err)
        assert "Traceback" not in err and "executed" not in out
    assert not (tmp_path / "c" / "last.pt").exists()


def moved(learner, batch, cfg):
    """What one step of plain gradient descent does to the weights, which are put back."""
    weights = train.trainable(learner)
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.SGD(weights, lr=1.)
    optimizer.param_groups[0]["initial_lr"] = 1.
    next(train.train_steps(learner, None, optimizer, [batch], cfg, 10))
    change = torch.cat([(p.detach() - b).flatten() for p, b in zip(weights, before)])
    with torch.no_grad():
        for p, b in zip(weights, before):
            p.copy_(b)
    return change


def test_a_step_is_the_clipped_mean_gradient_times_the_rate(toy):
    cfg, learner, _, batches = one_learner(toy, denoising=0, clip=1e9)
    whole = moved(learner, batches[0], dataclasses.replace(cfg, accumulate=2))
    alone = [moved(learner, part, cfg) for part in batches[0].split(2)]
    torch.testing.assert_close(whole, sum(alone) / 2, rtol=1e-3, atol=1e-4)
    plain = moved(learner, batches[0], cfg)
    assert plain.norm() > 1
    assert moved(learner, batches[0], dataclasses.replace(cfg, clip=.1)).norm().item() == pytest.approx(.1, rel=1e-3)
    slow = moved(learner, batches[0], dataclasses.replace(cfg, warmup=4))
    torch.testing.assert_close(slow, plain / 4, rtol=1e-3, atol=1e-4)


def test_every_step_and_process_has_noise_of_its_own(toy, teacher, monkeypatch):
    cfg, learner, network, batches = one_learner(toy, teacher)
    def run():
        steps = train.train_steps(learner, network, optimizer_of(learner), [batches[0]] * 2, cfg, 2)
        return [log for _, log in steps]
    first, second = run()
    monkeypatch.setattr(train, "process_rank", lambda: 1)
    other, _ = run()
    for name in ("loss_ce_dn", "l1"):
        assert len({first[name], second[name], other[name]}) == 3


def test_the_optimizer_has_every_weight_that_learns_once(toy):
    cfg = Config(**TINY, weight_decay=.5)
    student, method = train.build_model(cfg, 3), train.CLoCKDistill(16, 24)
    groups = train.make_optimizer(cfg, student, method).param_groups
    held = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert held.keys() == {id(p) for part in (student, method) for p in train.trainable(part)}
    assert {held[id(p)] for p in method.parameters()} == {cfg.lr} and {g["weight_decay"] for g in groups} == {.5}


def test_what_is_saved_and_evaluated_is_the_moving_average(toy, tmp_path):
    """After two steps with decay .75: .75 of the first step's weights, .25 of the second's."""
    saved = []
    for steps in (1, 2):
        cfg = Config(**TINY | dict(root=toy, steps=steps, schedule="drop", drop_at=1., warmup=0, ema=.75))
        train.fit(cfg, Run(out=str(tmp_path / str(steps)), workers=0))
        saved.append(checkpoints.load(tmp_path / str(steps) / "last.pt"))
    first, second = (one["resume"]["student"] for one in saved)
    for name, value in saved[1]["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, .75 * first[name] + .25 * second[name])
    assert not torch.equal(first["content.weight"], second["content.weight"])


def test_best_is_the_best(toy, tmp_path, monkeypatch):
    scores = iter((.2, .5, .3))
    others = dict(AP50=0., AP75=0., APs=0., APm=0., APl=0., per_class={})
    monkeypatch.setattr(data, "evaluate", lambda *_: {"AP": next(scores), **others})
    train.fit(Config(**TINY, root=toy), Run(out=str(tmp_path), workers=0, eval_every=1))
    assert checkpoints.load(tmp_path / "best.pt")["step"] == 2


def test_cosine_begins_after_the_warm_up():
    cosine = Config(warmup=20, schedule="cosine")
    assert [train.lr_factor(cosine, s, 100) for s in (20, 60, 100)] == pytest.approx([1., .51, .02])


def test_the_step_hands_over_padding_extent_and_the_learned_queries(toy, teacher):
    _, learner, network, batches = one_learner(toy, teacher, method_options=dict(learned=True))
    dataset = data.build("toy", toy, "train")
    items = [dataset[0], dataset[1]]
    items[1] = (items[1][0][:, :32, :92], items[1][1])                    # ends within a cell
    batch, seen = data.collate(items), []
    learner.method.forward = lambda *given: seen.extend(given) or {}
    learner(network, batch)
    padding, valid, extent = seen[9], seen[10], seen[11]
    assert padding.equal(network.encode(batch.images, batch.padding).padding) and padding.any()
    assert torch.equal(extent, batch.extent)
    asked = max(map(len, batch.labels))
    assert valid.shape == (2, asked + 10) and valid[:, asked:].all()          # and the teacher's 10 own
    assert seen[4].shape[2] == seen[2].shape[2] == asked + 10


def test_a_rivals_step_hands_over_the_teachers_gradient_and_states(toy, teacher):
    network, _ = train.load_model(teacher)
    network.requires_grad_(False)
    student = copy.deepcopy(network).train()
    batch = next(iter(data.loader(data.build("toy", toy, "train"), 2, steps=1)))
    for name in ("gkd", "detrdistill"):
        method, seen = BASELINES[name](16, 16), []
        method.forward = lambda *given: seen.extend(given) or {}
        Learner(student, method)(network, batch)
        view = seen[1]
        if name == "gkd":
            memory = network.encode(batch.images, batch.padding)
            memory.tokens.requires_grad_()
            output = network.answer(memory, *network.learned_queries(memory), None)
            loss = sum(network.weighted_losses(output, batch.targets).values())
            torch.testing.assert_close(view.gradient, torch.autograd.grad(loss, memory.tokens)[0])
            assert view.gradient.any()
        else:                                             # a head reads the normed state of its layer
            decoder = network.decoder
            logits = [decoder.class_heads.of(i)(decoder.norm(state)) for i, state in enumerate(view.states)]
            torch.testing.assert_close(torch.stack(logits), view.logits)
