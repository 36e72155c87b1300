"""evidence.py: draws of images, distances, and the page, on four images whose APs can be told by hand."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from experiments import evidence, tables

# One car an image, nearer from image to image: (box, metres).
CARS = [((10, 10, 60, 40), 40.), ((20, 10, 70, 50), 30.), ((30, 5, 90, 60), 20.),
        ((5, 5, 95, 60), 10.)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitti")
    images, labels = root / "training/image_2", root / "training/label_2"
    images.mkdir(parents=True)
    labels.mkdir()
    for number, (box, metres) in enumerate(CARS):
        Image.new("RGB", (100, 64)).save(images / f"{number:06d}.png")
        (labels / f"{number:06d}.txt").write_text(
            f"Car 0.00 0 0.0 {' '.join(map(str, box))} 1.5 1.6 4.0 0.0 1.5 {metres} 0.0\n")
    return data.build("kitti", root, "all")


def answers(found, dataset):
    """Detections that hold the car of the images in `found`, and nothing else."""
    boxes = {image: torch.tensor([CARS[image][0]]).float() for image in found}
    return [{"image_id": i, "scores": torch.full((len(boxes.get(i, ())),), 0.9),
             "labels": torch.zeros(len(boxes.get(i, ())), dtype=torch.long),
             "boxes": boxes.get(i, torch.zeros(0, 4))} for i in dataset.ids]


def test_a_draw_of_images_is_the_ap_of_these_images(dataset):
    judge = evidence.judged(answers([0, 1], dataset), dataset)
    # Two of four cars are found at precision 1: recalls up to .5 are 51 of the 101 points.
    assert evidence.ap_of(judge)[0] == pytest.approx(51 / 101)
    assert evidence.ap_of(judge, [0, 0, 1, 1])[0] == 1
    assert evidence.ap_of(judge, [2, 3, 3, 3])[0] == 0
    assert evidence.ap_of(judge, [0, 2, 2, 2])[0] == pytest.approx(26 / 101)       # recall .25
    assert np.isnan(evidence.ap_of(judge)[1:]).all()                       # classes without objects


def test_the_gain_of_drawn_images(dataset):
    better, worse = (evidence.judged(answers(found, dataset), dataset)
                     for found in ([0, 1, 2, 3], []))
    assert (evidence.drawn_gains([better], [worse], draws=5) == 1).all()
    half = evidence.judged(answers([0, 1], dataset), dataset)
    drawn = evidence.drawn_gains([better, half], [worse, worse], draws=200)
    # The first pair gains 1 in every draw, the second what the draw has of images 0 and 1.
    assert 0.5 <= drawn.min() < drawn.max() <= 1 and abs(drawn.mean() - 0.75) < 0.03


def test_near_and_far(dataset):
    assert dataset.metres.tolist() == [40, 30, 20, 10]
    parts = evidence.halves(dataset)
    for found, near, far in (([2, 3], 1, 0), ([0, 1], 0, 1), ([3], 51 / 101, 0)):
        aps = [evidence.ap_of(evidence.judged(answers(found, dataset), parts[name]))[0]
               for name in ("near", "far")]
        assert aps == pytest.approx([near, far])
    assert dataset.areas.max() < 1e4                                       # the data set is as it was


class Named(str):
    """In place of a model: its name, on any device."""
    def to(self, device):
        return self


def test_the_page(dataset, tmp_path, monkeypatch):
    """Two seeds: the distilled students find all, the others the two far cars."""
    def job(name, seed):
        return tables.Job(f"{name}-{seed}", "student", 1, (), SimpleNamespace(seed=seed, val_split="all"))
    alone, ours = ([job(name, seed) for seed in (0, 1)] for name in ("alone", "ours"))
    line = tables.Line("main", "dino", "clockdistill", tuple(ours), tuple(alone))
    study = SimpleNamespace(
        work=tmp_path / "work", results=tmp_path, scope=SimpleNamespace(options={}),
        done={j.name: {"weights": f"of {j.name}"} for j in (*ours, *alone)})
    for j in (*ours, *alone):
        (study.work / j.name).mkdir(parents=True)
        (study.work / j.name / "last.pt").touch()
    monkeypatch.setattr(tables, "open_study", lambda *given: study)
    monkeypatch.setattr(tables, "plan", lambda *given: [line])
    monkeypatch.setattr(tables, "jobs_of", lambda lines: [*ours, *alone])
    monkeypatch.setattr(evidence.train, "build_data", lambda *given: dataset)
    monkeypatch.setattr(evidence.train, "load_model", lambda path: (Named(path.parent.name), {}))
    monkeypatch.setattr(evidence.train, "fingerprint", lambda name: f"of {name}")
    monkeypatch.setattr(
        evidence.train, "detect",
        lambda name, *rest: answers([0, 1, 2, 3] if "ours" in name else [0, 1], dataset))
    assert evidence.train.main(["evidence", "kitti-small", "--root", "ROOT", "--draws", "20"]) == 0
    row, = json.loads((tmp_path / "evidence.json").read_text())
    assert row["near"]["mean"] == 1 and row["far"]["mean"] == 0 and row["seeds"] == [0, 1]
    assert row["per class"]["Car"]["mean"] == pytest.approx(50 / 101)
    assert "| dino | clockdistill | 2 |" in (tmp_path / "evidence.md").read_text()

    # Weights that are not those of the results are refused.
    study.done["ours-1"]["weights"] = "of another"
    with pytest.raises(ValueError, match="ours-1/last.pt has other weights than ours-1"):
        evidence.run("kitti-small", "ROOT", None, None, 20)
