"""What detectors look at: all three through `watch`, the comparison of two, the command."""
import json

import pytest
import torch
from torchvision.utils import save_image

import checkpoints
import data
from experiments import look, predict
import models
import train
from clockdistill import CLoCKDistill, location_mask

TINY = dict(backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=16,
            heads=2, ffn_dim=16,
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
    one = look.watch(model, picture()[None], picture(), best=3)
    found = model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool)).detections
    scores, labels = found.logits[-1, 0].sigmoid().max(1)
    assert one["queries"][0] == scores.argmax() and 1 <= len(one["queries"]) <= 3
    assert torch.equal(one["scores"], scores[one["queries"]])
    assert torch.equal(one["labels"], labels[one["queries"]])
    overlap = look.box_iou(one["boxes"], one["boxes"])
    assert (overlap - torch.eye(len(overlap))).max() <= 0.5
    (cx, cy, w, h), box = found.boxes[-1, 0, one["queries"][0]], one["boxes"][0]
    torch.testing.assert_close(box, torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                               * torch.tensor([160, 48, 160, 48]))


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_watch_records_the_queries_shown_and_the_tokens_in_their_middle(detector):
    model = tiny(detector)
    one = look.watch(model, picture()[None], picture(), best=3, layer=0)
    with torch.no_grad(), models.record(model) as seen:
        model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool))
    cross, encoder = seen["decoder.0.cross"].weights[0], seen["encoder.1"].weights[0]
    queries = one["queries"]
    if detector == "dab_detr":
        # (heads, queries, keys): queries first
        cross, encoder = cross.transpose(0, 1), encoder.transpose(0, 1)
    torch.testing.assert_close(one["look"]["weights"], cross[queries])
    torch.testing.assert_close(one["listen"][1], seen["decoder.1.self"].weights[0])
    middle = (one["boxes"][:, :2] + one["boxes"][:, 2:]) / 2
    height, width = one["grid"]
    column = (middle[:, 0] / 160 * width).long().clamp(0, width - 1)
    row = (middle[:, 1] / 48 * height).long().clamp(0, height - 1)
    torch.testing.assert_close(one["tokens"][1]["weights"], encoder[row * width + column])
    marked = torch.stack([(column + 0.5) / width * 160, (row + 0.5) / height * 48], 1)
    torch.testing.assert_close(one["tokens"][1]["references"], marked)


def test_of_queries_with_one_box_the_best_is_shown_and_the_one_of_the_wanted_class_compared():
    """DAB-DETR before training, with one anchor for all: 12 queries with different contents."""
    torch.manual_seed(0)
    model = models.build("dab_detr", 3, **TINY | dict(num_queries=3), num_patterns=4,
                         feature_stride=8).eval()
    with torch.no_grad():
        model.anchors.weight.zero_()
        output = model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool))
        logits = output.detections.logits[-1, 0]                          # (12, 3)
    best = look.watch(model, picture()[None], picture())
    assert best["queries"].tolist() == [logits.amax(1).argmax()]
    wanted = {"boxes": best["boxes"].expand(3, 4), "labels": torch.arange(3)}
    assert torch.equal(look.watch(model, picture()[None], picture(), wanted=wanted)["queries"],
                       logits.argmax(0))


def test_a_detector_beside_itself_agrees_and_finds_the_same():
    model = tiny("dino")
    first = look.watch(model, picture()[None], picture())
    again = look.watch(model, picture()[None], picture(), wanted=first)
    assert torch.equal(first["queries"], again["queries"])
    assert torch.equal(first["boxes"], again["boxes"])
    seen = look.compare({"teacher": first, "student": again})
    torch.testing.assert_close(seen["student"]["agreement"], torch.ones(len(first["queries"])))
    assert (seen["student"]["elsewhere"] < 0.999).all() and (seen["teacher"]["even"] < 0.999).all()
    figure = look.beside(picture(), seen, CLASSES)
    assert "agrees 1.00" in figure.axes[1].get_title()
    # Which query it is differs from detector to detector.
    assert not [text for axes in figure.axes for text in axes.texts + [axes.yaxis.label] if "query" in text.get_text()]


def test_what_is_compared_by_hand():
    """Two objects side by side on 1 x 2 cells; the second detector looks at the first cell only."""
    def seen(*weights):
        # There is one head.
        look = {"places": (1, 2), "weights": torch.tensor(weights)[:, None]}
        return {"queries": torch.tensor([0, 1]), "labels": torch.tensor([0, 1]),
                "scores": torch.tensor([.5, .25]),
                "boxes": torch.tensor([[0., 0, 80, 48], [80, 0, 160, 48]]),
                "iou": torch.tensor([1, .25]),
                "look": look, "grid": (1, 2), "side": (160, 48)}
    found = look.compare({"teacher": seen([.75, .25], [0., 1.]),
                          "student": seen([1., 0.], [1., 0.])})
    assert found["teacher"]["even"].tolist() == [.75, 1]
    assert found["student"]["agreement"].tolist() == [.75, 0]
    assert found["student"]["elsewhere"].tolist() == [.75, 0]
    objects = look.listed(found, CLASSES)
    assert objects[1] == {"class": "Pedestrian", "teacher": {
        "query": 1, "score": .25, "box": [80, 0, 160, 48], "iou": .25, "even": 1}, "student": {
        "query": 1, "score": .25, "box": [80, 0, 160, 48], "iou": .25, "agreement": 0,
        "elsewhere": 0}}
    text = " ".join(look.summary(objects, "teacher", ["student"]))
    # The object whose boxes differ does not count.
    assert "has a box with an IoU of 0.5 or more at 1 of the 2 objects" in text and "0.75 on the same" in text
    assert "0.38 on different" in text and "0.88 with uniform attention" in text


def save(path, detector, seed=0, classes=CLASSES):
    model = tiny(detector, seed)
    checkpoints.save(path, {"model": model.state_dict(), "detector": detector,
                            "config": model.config, "data": "toy",
                            "classes": classes, "category_ids": list(range(len(classes))),
                            "settings": {"size": None, "data": "toy"}, "metrics": {}})
    return str(path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_look_from_the_command_line(precision, tmp_path, capsys, monkeypatch):
    half, watch = [], look.watch
    monkeypatch.setattr(look, "watch", lambda *words: (
        half.append(torch.is_autocast_enabled("cpu")), watch(*words))[1])
    image = tmp_path / "0.png"
    save_image(picture(), image)
    teacher = save(tmp_path / "teacher" / "last.pt", "dino")
    student = save(tmp_path / "student.pt", "dab_detr", 1)
    assert train.main(["look", "--checkpoint", teacher, "--checkpoint", student, "--best", "2",
                       "--precision", precision, "--out", str(tmp_path / "seen"), str(image)]) == 0
    assert half == [precision == "bf16"] * 2
    pictures = {f"000_0_{name}_{what}.png" for name in ("teacher", "student")
                for what in ("layers", "heads", "tokens", "self")} | {"000_0_beside.png"}
    assert {path.name for path in (tmp_path / "seen").iterdir()} == pictures | {"look.json"}
    (listed,) = json.loads((tmp_path / "seen" / "look.json").read_text())
    assert listed["image"] == str(image) and 1 <= len(listed["detections"]) <= 2
    for found in listed["detections"]:
        assert 0 <= found["student"]["agreement"] <= 1 and found["teacher"]["iou"] == 1
    assert "objects shown of teacher" in capsys.readouterr().out


def test_look_says_in_one_line_what_is_wrong(tmp_path, capsys):
    image = tmp_path / "0.png"
    save_image(picture(), image)
    one = save(tmp_path / "one" / "last.pt", "dino")
    save(tmp_path / "deeper" / "one" / "last.pt", "dino")
    save(tmp_path / "other.pt", "dino", classes=["Cat", "Dog", "Cow"])
    for more, message in ((["--best", "0"], "want at least 1"),
                          (["--layer", "2"], "the decoder layers of one are 0 to 1"),
                          (["--checkpoint", str(tmp_path / "deeper" / "one")],
                           "another one is called one too"),
                          (["--checkpoint", str(tmp_path / "other.pt")], "knows other classes")):
        assert train.main(["look", "--checkpoint", one, "--out", str(tmp_path / "x"), *more,
                           str(image)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_pictures_far_larger_than_the_toy_s_are_told(tmp_path, capsys):
    """Where they are not resized: a detector of the toy knows objects of some 10 pixels."""
    for height in (96, 97):
        save_image(torch.zeros(3, height, 200), tmp_path / f"{height}.png")
    files = sorted(tmp_path.iterdir())
    for unresized in (True, False):
        assert len(list(predict.read_images(files, "look", [], unresized))) == 2
        said = capsys.readouterr().out
        assert said.startswith("note: 1 of 2 pictures far larger than the toy's") if unresized else not said


def test_look_takes_folders_and_leaves_out_what_it_cannot_read(tmp_path, capsys):
    """Class names are as they are: "$\\frac$", read as TeX, would stop the pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    save_image(picture(), folder / "b.png")
    (folder / "a.png").write_bytes(b"no image")
    model = save(tmp_path / "one.pt", "dab_detr", classes=["$\\frac$"] * 3)
    assert train.main(["look", "--checkpoint", model, "--best", "1", "--out", str(tmp_path / "x"),
                       str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "left out 1 of 2 files" in error and "a.png" in error
    (listed,) = json.loads((tmp_path / "x" / "look.json").read_text())
    assert listed["image"].endswith("b.png") and listed["detections"][0]["class"] == "$\\frac$"
    assert (tmp_path / "x" / "001_b_one_layers.png").exists()
    # Where nothing can be read, what an earlier run found stays.
    assert train.main(["look", "--checkpoint", model, "--out", str(tmp_path / "x"),
                       str(folder / "a.png")]) == 2
    assert "look.json" not in capsys.readouterr().out
    assert json.loads((tmp_path / "x" / "look.json").read_text()) == [listed]


def test_look_names_image_and_detector_of_predictions_that_are_not_finite(tmp_path, capsys):
    image = tmp_path / "0.png"
    save_image(picture(), image)
    broken = checkpoints.load(save(tmp_path / "bad.pt", "dab_detr"))
    for name, values in broken["model"].items():
        if "class_heads" in name or name == "decoder.norm.weight":
            # These weights are finite, but the last norm's outputs are not, and the class is
            # infinity - infinity.
            values.fill_(3e38)
    checkpoints.save(tmp_path / "bad.pt", broken)
    assert train.main(["look", "--checkpoint", str(tmp_path / "bad.pt"), "--out",
                       str(tmp_path / "x"), str(image)]) == 2
    assert f"{image}, bad: the model's detections are not finite" in capsys.readouterr().err


def test_a_query_that_holds_its_answer_is_answered_without_the_image(tmp_path):
    """The shipped teacher, asked with its label embeddings, names most classes from a memory of
    noise. Asked with its learned contents it cannot (0.7 against 0.36 on 100 images), so only these
    make the logit part look at the image."""
    teacher, _ = train.load_model(train.SHIPPED_TEACHERS["dino"])
    data.make_toy(tmp_path, counts=dict(train=1, val=60, tune=1))
    batches = list(data.eval_loader(data.build("toy", tmp_path, "val"), 20))
    found = {}
    for content in ("label", "own"):
        method = CLoCKDistill(64, 64, content=content, box_noise=0.4)
        embedding = teacher.label_embedding if content == "label" else teacher.learned_content
        found[content] = look.reading(teacher, method, embedding, batches)
        assert found[content]["own"] > 0.8
        assert found[content]["own"] > found[content]["another's"] + 0.1
    # Denoising queries hold labels and see the learned queries: asked like them it is surer.
    alone, beside = (torch.tensor(found["label"][name]) for name in ("w", "w beside learned"))
    assert alone.shape == (3,) and (beside > alone).all() and beside[1] > alone[1] + 0.2
    assert found["label"]["noise"] > 0.55 > 0.45 > found["own"]["noise"]
    assert look.reading(teacher, method, embedding, [])["w"] == [0, 0, 0]         # nobody was asked


LABELLED = {"labels": torch.tensor([2, 0]),
            "boxes": torch.tensor([[.5, .5, .25, .5], [.25, .5, .125, .25]])}


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_gaze_of_target_aware_queries_is_that_of_the_last_ones(detector):
    model = tiny(detector)
    method = CLoCKDistill(16, 16, content="own")
    asked = method.queries([LABELLED["labels"]], [LABELLED["boxes"]], model.learned_content)
    with torch.no_grad(), models.record(model) as recorded:
        output = model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool), extra=asked)
    gaze = look.gaze(model, picture(), LABELLED, asked)
    assert torch.equal(gaze["chances"], output.extra.logits[-1, 0].sigmoid())
    weights = recorded["decoder.1.cross"].weights[0]
    if detector == "dab_detr":
        # (heads, queries, keys): queries first
        weights = weights.transpose(0, 1)
    assert len(weights) == 12 + 2 and len(gaze["looks"]) == 2
    assert torch.equal(gaze["looks"][1]["weights"], weights[-2:])
    # The middle half of the height, a quarter of the width: x 60..100, y 12..36 of 160 x 48.
    assert gaze["truth"][0].tolist() == [60, 12, 100, 36]


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_gaze_without_queries_is_that_of_the_learned_ones_that_fit(detector):
    """Asked for what queries 7 and 3 answer, with the class that each is surest of."""
    model = tiny(detector)
    with torch.no_grad(), models.record(model) as recorded:
        found = model(picture()[None], torch.zeros(1, 48, 160, dtype=torch.bool)).detections
    labels = found.logits[-1, 0].argmax(1)                                # (12,)
    gaze = look.gaze(model, picture(), {"labels": labels, "boxes": found.boxes[-1, 0]})
    fit = look.box_iou(gaze["truth"], gaze["truth"]) * (
        found.logits[-1, 0].sigmoid()[:, labels].T)                       # (12, 12)
    best = fit.argmax(1)
    torch.testing.assert_close(gaze["boxes"], gaze["truth"][best])
    weights = recorded["decoder.0.cross"].weights[0]
    if detector == "dab_detr":
        weights = weights.transpose(0, 1)
    torch.testing.assert_close(gaze["looks"][0]["weights"], weights[best])


def test_answers_are_wrong_by_class_or_by_box():
    """Of three answers one is right, one names another class, one has an IoU of 1/4."""
    box = torch.tensor([[0., 0, 8, 8]])
    first = {"labels": torch.tensor([0, 1]), "chances": torch.tensor([[.75, .5], [.25, .125]]),
             "boxes": box.expand(2, 4), "truth": box.expand(2, 4)}
    second = {"labels": torch.tensor([1]), "chances": torch.tensor([[0., .5]]),
              "boxes": torch.tensor([[0., 0, 4, 4]]), "truth": box}
    found = look.answers([first, second])
    assert found["image"].tolist() == [0, 0, 1] and found["said"].tolist() == [0, 0, 1]
    assert found["w"].tolist() == [.75, .25, .5] and found["iou"].tolist() == [1, 1, .25]
    assert found["wrong"].tolist() == [0, 1, 1]


def test_intervals_by_hand():
    """1000 numbers of deviation 1 have a mean within 1.96 / sqrt(1000). A ratio that is the same in
    every image has no interval."""
    values = torch.tensor([2., 4.]).repeat(500)                           # mean 3, deviation 1
    mean, half = look.ratio(values)
    assert mean == 3 and half == pytest.approx(1.96 / 1000 ** .5, rel=0.1)
    assert look.ratio(values, 2 * values) == (0.5, 0)
    assert look.interval(lambda a, b: a - b, values, values) == (0, 0)


def test_memories_are_those_of_the_first_images(tmp_path):
    data.make_toy(tmp_path, counts=dict(train=1, val=3, tune=1))
    dataset, model = data.build("toy", tmp_path, "val"), tiny("dino")
    tokens, inside = look.memories(model, dataset, 2)
    image, target = dataset[1]
    with torch.no_grad():
        memory = model.encode(image[None], torch.zeros(1, 48, 160, dtype=torch.bool))
    torch.testing.assert_close(tokens[1], memory.tokens[0])
    finest, _ = location_mask(target["boxes"], *memory.shapes[0])
    assert torch.equal(inside[1, :finest.numel()], finest.flatten())
