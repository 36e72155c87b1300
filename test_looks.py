"""What detectors look at: all three of them through `watch`, the comparison of two, and the command."""
import json

import pytest
import torch
from torchvision.utils import save_image

import checkpoints
import looks
import models
import train

TINY = dict(backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=16, heads=2, ffn_dim=16,
            encoder_layers=2, decoder_layers=2, num_queries=12)
OWN = {"dab_detr": dict(feature_stride=8), "dino": dict(feature_levels=3, points=2),
       "deformable_detr": dict(feature_levels=2, points=2, box_refine=True)}
CLASSES = ["Car", "Pedestrian", "Cyclist"]


def tiny(detector, seed=0):
    torch.manual_seed(seed)
    return models.build(detector, 3, **TINY, **OWN[detector]).eval()


def picture(seed=0):
    """(3, 48, 160) in 0..1, which also serves as the prepared image."""
    return torch.rand(3, 48, 160, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_watch_shows_the_best_detections_that_are_different_objects(detector):
    model = tiny(detector)
    one = looks.watch(model, picture()[None], picture(), best=3)
    found = model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool)).detections
    scores, labels = found.logits[-1, 0].sigmoid().max(1)
    assert one["queries"][0] == scores.argmax() and 1 <= len(one["queries"]) <= 3
    assert torch.equal(one["scores"], scores[one["queries"]]) and torch.equal(one["labels"], labels[one["queries"]])
    overlap = looks.box_iou(one["boxes"], one["boxes"])
    assert (overlap - torch.eye(len(overlap))).max() <= 0.5
    (cx, cy, w, h), box = found.boxes[-1, 0, one["queries"][0]], one["boxes"][0]
    torch.testing.assert_close(box, torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                               * torch.tensor([160, 48, 160, 48]))


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_watch_records_the_queries_shown_and_the_tokens_in_their_middle(detector):
    model = tiny(detector)
    one = looks.watch(model, picture()[None], picture(), best=3, layer=0)
    with torch.no_grad(), models.record(model) as seen:
        model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool))
    cross, encoder, queries = seen["decoder.0.cross"].weights[0], seen["encoder.1"].weights[0], one["queries"]
    if detector == "dab_detr":
        cross, encoder = cross.transpose(0, 1), encoder.transpose(0, 1)    # (heads, queries, keys): queries first
    torch.testing.assert_close(one["look"]["weights"], cross[queries])
    torch.testing.assert_close(one["listen"][1], seen["decoder.1.self"].weights[0])
    middle = (one["boxes"][:, :2] + one["boxes"][:, 2:]) / 2
    height, width = one["grid"]
    column = (middle[:, 0] / 160 * width).long().clamp(0, width - 1)
    row = (middle[:, 1] / 48 * height).long().clamp(0, height - 1)
    torch.testing.assert_close(one["tokens"][1]["weights"], encoder[row * width + column])
    marked = torch.stack([(column + 0.5) / width * 160, (row + 0.5) / height * 48], 1)
    torch.testing.assert_close(one["tokens"][1]["references"], marked)


def test_a_detector_beside_itself_agrees_and_finds_the_same():
    model = tiny("dino")
    first = looks.watch(model, picture()[None], picture())
    again = looks.watch(model, picture()[None], picture(), wanted=first)
    assert torch.equal(first["queries"], again["queries"]) and torch.equal(first["boxes"], again["boxes"])
    figure, agreed, even = looks.beside(picture(), {"teacher": first, "student": again}, CLASSES)
    torch.testing.assert_close(agreed["student"].diagonal(), torch.ones(len(first["queries"])))
    assert torch.equal(agreed["student"] > 0.999, torch.eye(len(even)) > 0) and (even < 1).all()
    assert "agrees 1.00" in figure.axes[1].get_title()


def save(path, detector, seed=0, classes=CLASSES):
    model = tiny(detector, seed)
    checkpoints.save(path, {"model": model.state_dict(), "detector": detector, "config": model.config, "data": "toy",
                            "classes": classes, "settings": {"size": None}, "metrics": {}})
    return str(path)


def test_look_from_the_command_line(tmp_path, capsys):
    image = tmp_path / "0.png"
    save_image(picture(), image)
    teacher = save(tmp_path / "teacher" / "last.pt", "dino")
    student = save(tmp_path / "student.pt", "dab_detr", 1)
    assert train.main(["look", "--checkpoint", teacher, "--checkpoint", student, "--best", "2",
                       "--out", str(tmp_path / "seen"), str(image)]) == 0
    pictures = {f"000_0_{name}_{what}.png" for name in ("teacher", "student")
                for what in ("layers", "heads", "tokens", "self")} | {"000_0_beside.png"}
    assert {path.name for path in (tmp_path / "seen").iterdir()} == pictures | {"look.json"}
    (listed,) = json.loads((tmp_path / "seen" / "look.json").read_text())
    assert listed["image"] == str(image) and 1 <= len(listed["detections"]) <= 2
    for found in listed["detections"]:
        assert 0 <= found["student"]["agreement"] <= 1 and found["teacher"]["iou"] == 1
    assert "student agrees with teacher by" in capsys.readouterr().out


def test_look_says_in_one_line_what_is_wrong(tmp_path, capsys):
    image = tmp_path / "0.png"
    save_image(picture(), image)
    one = save(tmp_path / "one" / "last.pt", "dino")
    save(tmp_path / "deeper" / "one" / "last.pt", "dino")
    save(tmp_path / "other.pt", "dino", classes=["Cat", "Dog", "Cow"])
    for more, message in ((["--best", "0"], "want at least 1"),
                          (["--layer", "2"], "the decoder layers of one are 0 to 1"),
                          (["--checkpoint", str(tmp_path / "deeper" / "one")], "another one is called one too"),
                          (["--checkpoint", str(tmp_path / "other.pt")], "knows other classes")):
        assert train.main(["look", "--checkpoint", one, "--out", str(tmp_path / "x"), *more, str(image)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
