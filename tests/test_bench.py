"""bench.py: it compares what it says it compares, and the command ends with every figure."""
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import bench
import models
import train

CPU = torch.device("cpu")
QUICK = bench.Options(height=64, width=96, repeats=1, quick=True)


@pytest.mark.parametrize("detector", ["dab_detr", "deformable_detr"])
def test_both_implementations_hold_the_same_weights_and_train_the_same_parameters(detector):
    both, batch = bench.pair(detector, QUICK, CPU), bench.batch_of(QUICK, CPU)
    ours, theirs = both["ours"].eval(), both["transformers"].eval()
    with torch.no_grad():
        answers = [bench.forward_of(model, batch)() for model in (ours, theirs)]
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad)
              for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_dino_has_nothing_to_be_compared_with():
    assert list(bench.pair("dino", QUICK, CPU)) == ["ours"]


def test_a_training_step_trains():
    model, batch = bench.build("dino", QUICK).train(), bench.batch_of(QUICK, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench.training_step(model, bench.loss_of(model, batch))()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("decoder.") for name in changed)
    assert "backbone.conv1.weight" not in changed


def test_operations_by_hand():
    """Two for a multiply-add: a linear layer of 3 rows, 4 -> 5, and attention of 2 heads.

    Backward: a product each for the gradient of the layer's input and weight; five products of the
    queries' and keys' size for attention's, which computes its weights once more.
    """
    layer, x = nn.Linear(4, 5), torch.zeros(3, 4, requires_grad=True)
    assert bench.operations(lambda: layer(x)) == 2 * 3 * 4 * 5
    assert bench.operations(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 4 * 5
    q = torch.zeros(1, 2, 6, 8, requires_grad=True)
    product, attend = 2 * 2 * 6 * 6 * 8, nn.functional.scaled_dot_product_attention
    assert bench.operations(lambda: attend(q, q, q)) == 2 * product
    assert bench.operations(lambda: attend(q, q, q).sum().backward()) == (2 + 5) * product


def test_operations_of_dab_detr_are_its_gflops():
    """GFLOPs are multiply-adds of one image; this detector samples nothing."""
    model = bench.build("dab_detr", QUICK).eval()
    image, nothing = torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool)
    counted = bench.operations(torch.no_grad()(lambda: model(image, nothing)))
    assert counted / 2e9 == pytest.approx(models.gflops(model, 64, 96))


def test_share_of_the_product_is_of_the_same_precision(monkeypatch):
    """100 operations each. The product takes 1 s, in bf16 half of it; the detector 2 s in both."""
    seconds = {"ours": 2., "ours, bf16": 2., "matrix product": 1., "matrix product, bf16": .5}
    monkeypatch.setattr(bench, "seconds_of", lambda run, device: run())
    monkeypatch.setattr(bench, "operations", lambda run: 100)
    runs = {name: (lambda value=value: value) for name, value in seconds.items()}
    rows = bench.interleaved(runs, 1, CPU, "")
    assert [row["of_product"] for row in rows.values()] == [.5, .25, 1, 1]


def test_repeats_are_interleaved_and_the_median_is_told():
    order = []
    runs = {name: functools.partial(order.append, name) for name in "ab"}
    rows = bench.interleaved(runs, 3, CPU, "order")
    assert order[2:8] == ["a", "b"] * 3                      # after a first run of each
    assert rows["a"]["seconds"] == sorted(rows["a"]["all"])[1]


def test_images_a_second_are_of_interleaved_detectors_in_evaluation_mode():
    order, networks = [], {}
    for name in ("a", "b"):
        networks[name] = bench.build("deformable_detr", QUICK, 3)
        networks[name].register_forward_pre_hook(
            lambda network, _, name=name: order.append((name, network.training)))
    networks["a"].eval()
    rates = bench.images_per_second(networks, torch.zeros(1, 3, 64, 128), seconds=0)
    assert order == [("a", False), ("b", False)] * 3
    assert all(0 < rate < math.inf for rate in rates.values()) and rates.keys() == networks.keys()
    assert not networks["a"].training and networks["b"].training         # as they were


def test_peak_memory_is_what_a_run_takes_at_its_highest():
    """64 MB filled and given back; nothing else."""
    peak = bench.peak_of(lambda: torch.ones(16_000_000), CPU)
    if peak is None:
        pytest.skip("this system tells nobody's peak")
    assert 0.06 < peak < 0.09


def test_parameters_are_the_published_ones():
    for detector, (millions, _) in bench.PUBLISHED.items():
        with torch.device("meta"):
            model = models.build(detector, 91, pretrained_backbone=False, frozen_backbone=True)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.5


def test_a_run_s_model_without_its_weights_freezes_what_they_would_freeze():
    """No weights of this width exist: none are asked for."""
    tiny = dict(backbone="resnet18", backbone_width=8, hidden_dim=16, heads=2, ffn_dim=16,
                encoder_layers=1, decoder_layers=1, num_queries=4)
    for word, trains in (("imagenet", False), ("none", True)):
        model = bench.untrained(train.Config(pretrained_backbone=word, **tiny), None)
        assert model.backbone.conv1.weight.requires_grad == trains


def test_a_run_s_model_has_the_queries_that_the_run_fits_to_its_images():
    """Three for each of 22 objects."""
    tiny = dict(backbone="resnet18", backbone_width=8, hidden_dim=16, heads=2, ffn_dim=16,
                encoder_layers=1, decoder_layers=1, fit_to_data=True, steps=100)
    assert bench.untrained(train.Config(**tiny), SimpleNamespace(most_objects=22)).num_queries == 66


def test_costs_are_hours_of_the_machine_that_a_recipe_is_for(monkeypatch, capsys):
    """100 steps of 8 images, 3 GFLOPs each: 4.8e12 operations, 240 s of a core's 0.02 TFLOP/s."""
    monkeypatch.setattr(bench, "untrained", lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(bench, "training_bytes", lambda *_: 1e9)
    monkeypatch.setattr(models, "gflops", lambda *_: 1.)
    job = SimpleNamespace(name="a", role="student", arguments=("fit",),
                          cfg=train.Config(steps=100, batch_size=8))
    for machine, tflops in (("core", None), ("GPU", 0.002)):
        scope = SimpleNamespace(images=0, image_size=(48, 160), machine=machine)
        bench.print_costs([job], scope, tflops)
    said = capsys.readouterr().out
    assert "a: about 0.07 core-hours, 1.0 GB" in said and "a: about 0.67 GPU-hours" in said


def test_saved_bytes_by_hand():
    """A linear layer keeps its input for the weight's gradient, a sigmoid its output.

    That is 3 x 4 and 3 x 5 floats; the weight itself is a parameter and not counted.
    """
    layer = nn.Linear(4, 5)
    saved = bench.SavedBytes(layer.parameters())
    with saved:
        layer(torch.zeros(3, 4)).sigmoid()
    assert saved.bytes == 4 * (3 * 4 + 3 * 5)


def test_the_command_tells_everything(tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", "--quick", "--repeats", "1", "--detectors", "deformable_detr"]
    assert train.main([*command, "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert {"machine", "commit", "options", *bench.PARTS} <= told.keys()
    for part in ("inference", "training"):
        rows = told[part]["deformable_detr"]
        assert rows["ours"]["seconds"] > 0 and rows["transformers"]["seconds"] > 0
        assert rows["logits_differ_by"] < 1e-4
        # Where the processor has no bf16, torch's product of it is slower than fp32's, and no bound.
        fp32, bf16 = (rows[bench.named(bench.PRODUCT, kind)]["gflops_per_second"] for kind in ("fp32", "bf16"))
        assert 0 < rows["ours"]["of_product"] < 1 and 0 < rows["ours, bf16"]["of_product"]
        assert rows["ours, bf16"]["of_product"] < 1 or bf16 < fp32
    distilled = told["distill"]["deformable_detr"]
    names = ("student step", "teacher encode", "teacher target-query decode")
    parts = sum(distilled[name]["seconds"] for name in names)
    whole = distilled["distillation step"]["seconds"]
    assert distilled["whole_over_parts"] == pytest.approx(whole / parts)
    assert "images/s" in capsys.readouterr().out
