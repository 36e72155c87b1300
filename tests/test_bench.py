"""bench.py: that it compares what it says it compares, and that the command ends with every figure."""
import json
import math

import pytest
import torch

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
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_dino_has_nothing_to_be_compared_with():
    assert list(bench.pair("dino", QUICK, CPU)) == ["ours"]


def test_a_training_step_trains():
    model, batch = bench.build("dino", QUICK).train(), bench.batch_of(QUICK, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench.training_step(model, bench.loss_of(model, batch))()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("decoder.") for name in changed) and "backbone.conv1.weight" not in changed


def test_repeats_are_interleaved_and_the_median_is_told():
    order = []
    rows = bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU, "order")
    assert order[2:8] == ["a", "b"] * 3                      # after a first run of each
    assert rows["a"]["seconds"] == sorted(rows["a"]["all"])[1]


def test_images_a_second_are_of_interleaved_detectors_in_evaluation_mode():
    order, networks = [], {}
    for name in ("a", "b"):
        networks[name] = models.build("deformable_detr", 3, **bench.Options(quick=True).architecture,
                                      pretrained_backbone=False)
        networks[name].register_forward_pre_hook(lambda network, _, name=name: order.append((name, network.training)))
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


def test_the_command_tells_everything(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert train.main(["bench", "--quick", "--repeats", "1", "--detectors", "deformable_detr", "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert {"machine", "commit", "options", *bench.PARTS} <= told.keys()
    for part in ("inference", "training"):
        rows = told[part]["deformable_detr"]
        assert rows["ours"]["seconds"] > 0 and rows["transformers"]["seconds"] > 0 and rows["logits_differ_by"] < 1e-4
    distilled = told["distill"]["deformable_detr"]
    names = ("student step", "teacher encode", "teacher target-query decode")
    parts = sum(distilled[name]["seconds"] for name in names)
    assert distilled["whole_over_parts"] == pytest.approx(distilled["distillation step"]["seconds"] / parts)
    assert "images/s" in capsys.readouterr().out
