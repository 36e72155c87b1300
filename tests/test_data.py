"""data.py: readers, the toy, augmentation, loaders and AP, on folders made here by hand."""
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.tv_tensors import BoundingBoxes

import data
from experiments import toy as toy_scenes
from official import SHARED

SPLITS = Path(data.__file__).parent / "splits"
COUNTS = {"train": 6, "val": 4, "tune": 2}
REST = "-1 -1 -1 -1000 -1000 -1000 -10"                             # KITTI's columns for an unknown 3D box


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "toy"
    data.make_toy(root, counts=COUNTS, workers=1)
    return root


def kitti_folder(root, labels, size=(120, 40)):
    """labels: {stem: text of the label file, or None for no file}; images of width x height `size`."""
    for folder in ("image_2", "label_2"):
        (root / "training" / folder).mkdir(parents=True)
    for stem, text in labels.items():
        Image.new("RGB", size, (90, 90, 90)).save(root / f"training/image_2/{stem}.png")
        if text is not None:
            (root / f"training/label_2/{stem}.txt").write_text(text)
    return root


def line(kind, *box):
    return f"{kind} 0.00 0 -10 {' '.join(map(str, box))} {REST}\n"


def coco_folder(root, annotations, categories=((7, "cat"), (3, "dog")),
                images=((11, 60, 40), (5, 60, 40)), **replace):
    """images: (id, width, height), written as JPEG. replace: whole lists of the JSON."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for number, width, height in images:
        Image.new("RGB", (width, height), (90, 90, 90)).save(root / f"val2017/{number}.jpg")
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, w, h in images],
               "categories": [{"id": i, "name": name} for i, name in categories], "annotations": annotations} | replace
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return root


def change_json(root, **lists):
    path = root / "annotations/instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lists))


def note(number, image_id=5, category_id=3, bbox=(10, 10, 20, 10), **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), "iscrowd": 0} | more


def picture(number, **more):
    return {"id": number, "file_name": "5.jpg", "width": 60, "height": 40} | more


@contextlib.contextmanager
def one_line_error(kind, *words):
    """The message is one line and holds all the words: the file, the place and the remedy."""
    with pytest.raises(kind) as info:
        yield info
    message = str(info.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def found(image_id, scores, labels, boxes):
    return {"image_id": image_id, "scores": torch.tensor(scores), "labels": torch.tensor(labels, dtype=torch.long),
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4)}


def truth(dataset):
    """The ground truth as perfect detections."""
    raws = [dataset.raw(index)[1] for index in range(len(dataset))]
    return [found(t["image_id"], [1.0] * len(t["labels"]), t["labels"].tolist(), t["boxes"].tolist()) for t in raws]


# --- readers ---------------------------------------------------------------------------------------------------------

def test_a_kitti_label_by_hand(tmp_path):
    text = line("Pedestrian", 30, 10, 50, 30) + line("Van", 0, 0, 60, 40) + line("DontCare", 60, 0, 120, 20)
    text += line("Car", 0, 20, 24, 40)[:-1] + " 0.9\n"               # a 16th column, a score, is allowed
    root = kitti_folder(tmp_path, {"000007": text})
    image, target = data.build("kitti", root, "all", size=(40, 1000))[0]
    assert image.shape == (3, 40, 120) and target["image_id"] == 7
    # Order of the file, fractions of 120 x 40; Van is no class of kitti3, so it is ignored like DontCare.
    torch.testing.assert_close(target["boxes"], torch.tensor([[1 / 3, .5, 1 / 6, .5], [.1, .75, .2, .5]]))
    assert target["labels"].tolist() == [1, 0]
    torch.testing.assert_close(target["ignore"], torch.tensor([[.25, .5, .5, 1], [.75, .25, .5, .5]]))
    assert target["size"].tolist() == target["orig_size"].tolist() == [40, 120]
    torch.testing.assert_close(image[:, 0, 0], (torch.tensor([90 / 255] * 3) - torch.tensor(data.IMAGENET_MEAN))
                               / torch.tensor(data.IMAGENET_STD))


@pytest.mark.parametrize("class_map, others, classes, labels, ignored", [
    (None, "ignore", ["Car", "Pedestrian", "Cyclist"], [0, 1], 4),
    ("kitti3", "background", ["Car", "Pedestrian", "Cyclist"], [0, 1], 1),
    ("kitti3_merged", "ignore", ["Car", "Pedestrian", "Cyclist"], [0, 0, 1, 1], 2),
    ("kitti8", "ignore", list(data.KITTI_TYPES), [0, 1, 3, 4, 6], 1),
    ("Tram,Car", "ignore", ["Tram", "Car"], [1, 0], 4),
    ({"Van": "vehicle", "Car": "vehicle", "Tram": None}, "ignore", ["vehicle"], [0, 0], 4)])
def test_class_maps(tmp_path, class_map, others, classes, labels, ignored):
    types = ("Car", "Van", "Pedestrian", "Person_sitting", "Tram", "DontCare")
    root = kitti_folder(tmp_path, {"000001": "".join(line(kind, 0, 0, 20, 20) for kind in types)})
    dataset = data.build("kitti", root, "all", class_map=class_map, others=others)
    target = dataset[0][1]
    assert (dataset.classes, target["labels"].tolist(), len(target["ignore"])) == (classes, labels, ignored)


def test_the_most_objects_of_an_image_do_not_count_what_is_ignored(tmp_path):
    car, van = line("Car", 10, 10, 30, 30), line("Van", 40, 10, 60, 30)
    labels = {"000000": car + car + van, "000001": "", "000002": van + van + van + car}
    dataset = data.build("kitti", kitti_folder(tmp_path, labels), "all")
    assert dataset.most_objects == 2 and data.build("kitti", tmp_path, "all", class_map="Tram").most_objects == 0


def test_the_committed_kitti_split_is_its_rule():
    train, val = committed = [data.listed_ids(SPLITS / f"kitti_{part}.txt") for part in ("train", "val")]
    assert committed == list(data.split_ids(data.KITTI_IDS)) and (len(train), len(val)) == (5985, 1496)
    assert sorted(train + val) == [f"{n:06d}" for n in range(7481)]


def test_the_committed_split_with_tune_is_its_rule_and_keeps_clear_of_kittis_training_images():
    """Of the ids in the order of their sha256 the first fifth, 198, is val; the next 90 are tune."""
    train, tune, val = [data.listed_ids(SPLITS / f"kitti_cyclists_{part}.txt") for part in ("train", "tune", "val")]
    ranked = sorted(train + tune + val, key=lambda i: hashlib.sha256(f"clockdistill-kitti-{i}".encode()).digest())
    assert len(set(ranked)) == 991
    assert [val, tune, train] == [sorted(ranked[:198]), sorted(ranked[198:288]), sorted(ranked[288:])]
    assert set(val) <= set(data.listed_ids(SPLITS / "kitti_val.txt"))


def test_kitti_splits_of_a_part_of_the_folder_of_ones_own_and_from_a_file(tmp_path):
    kitti = kitti_folder(tmp_path / "kitti", {f"{n:06d}": "" for n in range(10)})
    val = [n for n in range(10) if f"{n:06d}" in (SPLITS / "kitti_val.txt").read_text()]
    assert data.build("kitti", kitti, "val").ids == val
    own = kitti_folder(tmp_path / "own", {f"frame_{n}": "" for n in range(10)})
    parts = [data.build("kitti", own, part).ids for part in ("train", "val")]
    assert sorted(sum(parts, [])) == list(range(10)) and len(parts[1]) == 2
    (tmp_path / "ids.txt").write_text("# mine\n000003\n\n000001\n999999\n")
    listed = data.build("kitti", kitti, str(tmp_path / "ids.txt"))
    assert listed.ids == [1, 3] and "1 ids of the split not in the folder" in listed.summary
    assert data.build("kitti", kitti, "all", limit=4).ids == [0, 1, 2, 3]


def test_coco_labels_are_contiguous_crowds_apart_and_empty_images_kept(tmp_path):
    root = coco_folder(tmp_path, [note(1, area=150), note(2, category_id=7, iscrowd=1), note(3, category_id=7)])
    dataset = data.build("coco", root, "val", size=(40, 100))
    assert dataset.ids == [5, 11] and dataset.classes == ["dog", "cat"] and dataset.category_ids == [3, 7]
    (_, full), (_, empty) = dataset[0], dataset[1]
    torch.testing.assert_close(full["boxes"], torch.tensor([[1 / 3, 3 / 8, 1 / 3, 1 / 4]]).repeat(2, 1))
    assert full["labels"].tolist() == [0, 1] and len(full["ignore"]) == 1
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["ignore"].shape == (0, 4)
    assert [a["iscrowd"] for a in dataset.coco.anns.values()] == [0, 1, 0]        # a crowd stays with its own category
    assert dataset.coco.anns[1]["area"] == 150
    (tmp_path / "ids.txt").write_text("11\n12\n")
    listed = data.build("coco", root, str(tmp_path / "ids.txt"))
    assert listed.ids == [11] and "1 ids of the split not in the folder" in listed.summary


def test_a_coco_format_folder_in_another_common_layout(tmp_path):
    root = coco_folder(tmp_path, [note(1)])
    (root / "annotations/instances_val2017.json").rename(root / "val2017/_annotations.coco.json")
    (root / "val2017").rename(root / "valid")
    assert data.build("coco", root, "val").ids == data.build("coco", root, "all").ids == [5, 11]


# --- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, kind, words", [
    ("Car 0 0 -10 1 2 3\n", ValueError, ("000002.txt, line 2", "7 columns", "15")),
    (line("Car", 1, "two", 30, 40), ValueError, ("000002.txt, line 2", "two")),
    (line("Car", 1, "nan", 30, 40), ValueError, ("000002.txt, line 2", "NaN")),
    (line("Dog", 1, 2, 30, 40), ValueError, ("000002.txt, line 2", "'Dog'", "class_map")),
])
def test_a_bad_label_line_is_named(tmp_path, text, kind, words):
    root = kitti_folder(tmp_path, {"000001": "", "000002": line("Car", 1, 2, 30, 40) + text})
    with one_line_error(kind, *words):
        data.build("kitti", root, "all")


def test_bad_boxes_are_dropped_or_clipped_and_counted(tmp_path):
    boxes = ((10, 10, 10, 30), (30, 10, 20, 30), (200, 10, 220, 30), (-5, 10, 20, 45), (10, 10, 120.4, 30))
    root = kitti_folder(tmp_path, {"000001": "".join(line("Car", *box) for box in boxes)})
    dataset = data.build("kitti", root, "all")
    assert dataset.raw(0)[1]["boxes"].tolist() == [[0, 10, 20, 40], [10, 10, 120, 30]]      # the last is only rounding
    for count in ("2 boxes without area", "1 boxes outside", "1 boxes clipped"):
        assert count in dataset.summary


def test_missing_folders_images_and_labels(tmp_path):
    with one_line_error(FileNotFoundError, tmp_path / "none", "root"):
        data.build("kitti", tmp_path / "none", "all")
    with one_line_error(FileNotFoundError, "image_2", "layout"):
        data.build("kitti", tmp_path, "all")
    with one_line_error(FileNotFoundError, "instances_val2017.json"):
        data.build("coco", tmp_path, "val")
    with one_line_error(FileNotFoundError, "image_2", "unpack"):
        data.build("kitti", kitti_folder(tmp_path / "empty", {}), "all")
    root = kitti_folder(tmp_path / "nolabel", {"000001": None})
    with one_line_error(FileNotFoundError, "label_2/000001.txt", "empty means no objects"):
        data.build("kitti", root, "all")
    (tmp_path / "ids.txt").write_text("000009\n")
    with one_line_error(ValueError, "none of the 1 ids", "ids.txt"):
        data.build("kitti", root, str(tmp_path / "ids.txt"))
    with one_line_error(FileNotFoundError, "'vall'", "train, val"):
        data.build("kitti", root, "vall")
    root = coco_folder(tmp_path / "coco", [])
    (root / "val2017/11.jpg").unlink()
    with one_line_error(FileNotFoundError, "11.jpg", "split"):
        data.build("coco", root, "val")
    with one_line_error(ValueError, "voc", "kitti"):
        data.build("voc", root, "all")


def test_negative_numbers_count_from_the_end_in_pictures_too(tmp_path):
    dataset = data.build("kitti", kitti_folder(tmp_path, {"000001": line("Car", 10, 10, 50, 30), "000002": line("Car", 10, 10, 50, 30) * 3}), "all")
    assert [len(dataset.raw(index)[1]["boxes"]) for index in (0, 1, -1, -2)] == [1, 3, 3, 1]
    with pytest.raises(IndexError):
        dataset.raw(2)


@pytest.mark.parametrize("images, count, sizes", [(8, 5, [1, 2, 1, 2, 2]), (10, 4, [2, 3, 2, 3]), (16, 4, [4] * 4),
                                                  (2, 5, [1, 1])])
def test_parts_of_a_batch_differ_by_one_image_at_most(images, count, sizes):
    batch = data.Batch(torch.arange(images), torch.arange(images), list(range(images)))
    parts = batch.split(count)
    assert [len(part.targets) for part in parts] == sizes
    assert torch.cat([part.images for part in parts]).tolist() == [x for part in parts for x in part.targets] == list(range(images))


def test_an_image_that_vanishes_is_one_line_also_from_a_worker(tmp_path):
    root = coco_folder(tmp_path, [note(1)])
    dataset = data.build("coco", root, "val")
    for image in (root / "val2017").iterdir():
        image.unlink()
    with one_line_error(FileNotFoundError, "5.jpg", "no such image"):
        list(data.eval_loader(dataset, 1, workers=1))


def test_two_pictures_of_one_id_are_refused(tmp_path):
    root = kitti_folder(tmp_path, {"000001": ""})
    (root / "training/image_2/000001.jpg").touch()
    with one_line_error(ValueError, "000001.png: 000001.jpg has the same id"):
        data.build("kitti", root, "all")


def test_a_listed_split_is_sought_among_all_its_images(tmp_path):
    """Ids that the folder lacks are counted, however many come first."""
    root = coco_folder(tmp_path, [], images=[(i, 8, 8) for i in range(1, 61)])
    for i in range(1, 61):
        if i not in (55, 56):
            (root / f"val2017/{i}.jpg").unlink()
    (root / "ids.txt").write_text("\n".join(map(str, range(1, 62))))
    assert data.build("coco", root, str(root / "ids.txt")).ids == [55, 56]
    # Of train's images not one is there.
    listed = json.loads((root / "annotations/instances_val2017.json").read_text())
    train = listed | {"images": [listed["images"][0] | {"id": 61, "file_name": "61.jpg"}]}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(train))
    dataset = data.build("coco", root, str(root / "ids.txt"))
    assert dataset.ids == [55, 56] and "59 ids of the split not in the folder" in dataset.summary


def test_a_truncated_image_is_found_before_training(tmp_path):
    root = kitti_folder(tmp_path / "kitti", {"000001": ""})
    png = root / "training/image_2/000001.png"
    png.write_bytes(png.read_bytes()[:-7])
    with one_line_error(ValueError, png, "does not decode", "again"):
        data.build("kitti", root, "all")
    png.write_bytes(b"no image at all")
    with one_line_error(ValueError, png, "does not decode"):
        data.build("kitti", root, "all", check=False)               # the size is needed anyway
    root = coco_folder(tmp_path / "coco", [])
    jpg = root / "val2017/5.jpg"
    whole = jpg.read_bytes()
    for tail in (b"trailing bytes of some camera", bytes(5000)):    # phones append a film, however long
        jpg.write_bytes(whole + tail)
        assert len(data.build("coco", root, "val")) == 2
    jpg.write_bytes(whole[:-2])
    with one_line_error(ValueError, jpg, "does not decode"):
        data.build("coco", root, "val")
    assert len(data.build("coco", root, "val", check=False)) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_only_fails_to_decode_is_named_also_from_a_worker(tmp_path, workers):
    root = kitti_folder(tmp_path, {"000001": ""}, size=(400, 400))
    png = root / "training/image_2/000001.png"
    noise = np.random.default_rng(0).integers(0, 255, (100, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(png)
    bad = bytearray(png.read_bytes())
    bad[2000:90000] = bytes(88000)                                  # header and end marker stay
    png.write_bytes(bad)
    dataset = data.build("kitti", root, "all")
    with one_line_error(data.BrokenImage, "does not decode", "replace") as info:
        next(iter(data.loader(dataset, 1, steps=1, workers=workers)))
    assert str(info.value).startswith(str(png)) and (workers == 0 or "Traceback" in info.value.details)


@pytest.mark.parametrize("change, words", [
    (dict(annotations=[note(1, category_id=4)]), ("annotation 1", "category_id 4")),
    (dict(annotations=[note(1, image_id=9)]), ("annotation 1", "image_id 9")),
    (dict(annotations=[], images=[picture(5)] * 2), ("images id 5", "2 times")),
    (dict(annotations=[], categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), ("categories id 1", "2 times")),
    (dict(annotations=[note(1, bbox=(1, 2, 3, math.nan))]), ("annotations[0], id 1", "NaN")),
    (dict(annotations=[note(1, bbox=(1, 2, 3))]), ("annotations[0], id 1", "four numbers")),
    (dict(annotations=[{"id": 1}]), ("annotations[0]", "image_id")),
    (dict(annotations=[note(1) | {"bbox": "1234"}]), ("annotations[0], id 1", "bbox", "four numbers")),
    (dict(annotations=[note(1, iscrowd="yes")]), ("annotations[0], id 1", "iscrowd", "'yes'", "0 or 1")),
    (dict(annotations=[note(1, iscrowd=2)]), ("annotations[0], id 1", "iscrowd", "0 or 1")),
    (dict(annotations=[note(1, area="large")]), ("annotations[0], id 1", "area", "'large'")),
    (dict(annotations=[note(1, area=-4)]), ("annotations[0], id 1", "area", "at least 0")),
    (dict(annotations=[note(1, image_id=None)]), ("annotations[0], id 1", "image_id", "whole")),
    (dict(annotations=[note(1, category_id=1.5)]), ("annotations[0], id 1", "category_id", "whole")),
    (dict(annotations=[7]), ("annotations[0]", "7", "object")),
    (dict(annotations={}), ("no list 'annotations'",)),
    (dict(categories=[]), ("'categories' is empty",)),
    (dict(categories=[{"id": 1, "name": None}]), ("categories[0]", "name", "text")),
    (dict(annotations=[], categories=[{"id": 0, "name": "owl"}, {"id": 1, "name": "owl "}]),
     ("categories name 'owl'", "2 times", "remove one that no annotation uses")),
    (dict(images=[picture(5, file_name=5)]), ("images[0]", "file_name", "text")),
    (dict(images=[picture(5, height=None)]), ("images[0]", "height", "whole number")),
    (dict(images=[picture(5, width=0)]), ("5.jpg", "60x40", "0x40")),
    (dict(images=[picture(2 ** 63)]), ("images[0]", "id", "63 bits")),
    (dict(annotations=[note(1, bbox=(.1, .1, .5, .8))]), ("coco", "fractions", "pixels")),
    (dict(annotations=[note(1)] * 10_001), ("5.jpg", "10001 boxes", "10000")),
    (dict(annotations=[], images=[picture("a")]), ("images[0]", "whole")),
    (dict(annotations=[], images=[picture(5, width=40, height=60)]), ("5.jpg", "60x40", "40x60")),
])
def test_a_bad_coco_file_is_named(tmp_path, change, words):
    root = coco_folder(tmp_path / "coco", [])
    change_json(root, **change)
    with one_line_error(ValueError, *words):
        data.build("coco", root, "val")


@pytest.mark.parametrize("change, boxes", [
    (dict(annotations=[note(1), note(1)]), 2),                      # nothing uses their ids
    (dict(annotations=[note("a1b2"), note(None, id=[])]), 2),
    (dict(annotations=[note(1, iscrowd=None), note(2, iscrowd=False)]), 2),
    (dict(annotations=[note(1, iscrowd=True), note(2, iscrowd="1"), note(3, iscrowd="0")]), 1),
    (dict(annotations=[note(1, area=None), note(2, area="200.0")]), 2),
    (dict(annotations=[note(1, image_id="5", category_id="3", bbox=("10", 10, 20.0, "10"))]), 1),
    (dict(images=[picture("5", width="60", height=40.0)], annotations=[note(1)]), 1),
    (dict(images=[picture(5, file_name=".\\5.jpg")], annotations=[note(1)]), 1),
    (dict(categories=[{"id": "3", "name": 8}], annotations=[note(1)]), 1),
])
def test_odd_but_clear_values_of_a_coco_file_are_read_as_meant(tmp_path, change, boxes):
    root = coco_folder(tmp_path, [])
    change_json(root, **change)
    dataset = data.build("coco", root, "val")
    objects = dataset.raw(0)[1]["boxes"].tolist()
    assert dataset.ids[0] == 5 and objects == [[10, 10, 30, 20]] * boxes
    assert {a["area"] for a in dataset.coco.anns.values()} == {200}
    assert data.evaluate(truth(dataset), dataset)["AP"] == pytest.approx(1)


def test_a_json_nested_too_deep_and_one_in_another_encoding(tmp_path):
    path = coco_folder(tmp_path, [note(1)]) / "annotations/instances_val2017.json"
    text = path.read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(text.replace("dog", "Käfer"), encoding=encoding)
        assert data.build("coco", tmp_path, "val").classes == ["Käfer", "cat"]
    for broken in (text[:100], "[" * 100_000, "[]", "null", "", '{"images": []}'):
        path.write_text(broken)
        with one_line_error(ValueError, path, "COCO"):
            data.build("coco", tmp_path, "val")


def test_coco_folders_as_other_tools_write_them(tmp_path):
    tools = {"cvat": ("annotations/instances_default.json", "images/default"),
             "label-studio": ("result.json", "images"),
             "roboflow": ("test/_annotations.coco.json", "test"),
             "nested": ("labels/mine.json", "labels")}
    for tool, (json_path, images) in tools.items():
        root = coco_folder(tmp_path / tool, [note(1)])
        for old, new in (("annotations/instances_val2017.json", json_path), ("val2017", images)):
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            if (root / new).is_dir():                               # the JSON made it
                for image in (root / old).iterdir():
                    image.rename(root / new / image.name)
            else:
                (root / old).rename(root / new)
        (root / "._junk.json").write_bytes(b"macOS")
        for split in (json_path, str(root / json_path)):
            assert data.build("coco", root, split).ids == [5, 11]
        with one_line_error(FileNotFoundError, "instances_train2017.json", json_path, "as the split"):
            data.build("coco", root, "train")
    assert len(data.build("coco", tmp_path / "roboflow", "test")) == 2
    for image in (tmp_path / "cvat/images/default").iterdir():
        image.unlink()
    with one_line_error(FileNotFoundError, "5.jpg", "images/default", "put the images"):
        data.build("coco", tmp_path / "cvat", "annotations/instances_default.json")


def test_two_splits_of_other_categories_are_told_apart(tmp_path):
    path = coco_folder(tmp_path, [note(1)]) / "annotations/instances_val2017.json"
    other = json.loads(path.read_text()) | {"images": [], "annotations": []}
    other["categories"][1]["name"] = "wolf"
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(other))
    with one_line_error(ValueError, "instances_val2017.json", "3 dog", "3 wolf"):
        data.build("coco", tmp_path, "all")


def test_the_summary_tells_what_a_user_must_know(tmp_path):
    crowd = [note(n) for n in range(101)] + [note(200, bbox=(1, 1, .5, 8)), note(201, iscrowd=1)]
    text = data.build("coco", coco_folder(tmp_path / "many", crowd), "val").summary
    for words in ("102 objects (dog 102), at most 102 an image", "1 classes without objects (cat)",
                  "1 images with more than the 100 objects of a class", "1 boxes under a pixel",
                  "1 ignored"):
        assert words in text, text
    for name, notes in (("none", []), ("crowd", [note(1, iscrowd=1)])):
        dataset = data.build("coco", coco_folder(tmp_path / name, notes), "val")
        assert "NO OBJECTS" in dataset.summary and dataset.most_objects == 0
    corners = [note(1, bbox=(30, 20, 50, 30)), note(2, bbox=(2, 3, 58, 40))]
    assert "2 boxes pass the border, but all would fit as corners" in data.build(
        "coco", coco_folder(tmp_path / "corners", corners), "val").summary
    whole = [note(1, bbox=(0, 0, 60, 40)), note(2, bbox=(30, 20, 10, 10))]
    assert "corners" not in data.build("coco", coco_folder(tmp_path / "ok", whole), "val").summary


def test_the_fingerprint_is_that_of_ids_classes_boxes_and_sizes(tmp_path):
    def of(name, notes=(note(1),), **options):
        return data.build("coco", coco_folder(tmp_path / name, list(notes), **options), "val").fingerprint

    same = of("a")
    assert len(same) == 12 and of("b") == same
    others = [of("box", [note(1, bbox=(10, 10, 20, 11))]), of("class", [note(1, category_id=7)]),
              of("name", categories=((7, "cat"), (3, "wolf"))), of("image", [note(1, image_id=11)]),
              of("fewer", images=((5, 60, 40),)), of("size", images=((11, 60, 41), (5, 60, 40)))]
    assert len({same, *others}) == 7


@pytest.mark.parametrize("options, words", [
    (dict(limit=0), "at least 1"), (dict(limit=-1), "at least 1"), (dict(size=(0, 0)), "size is"),
    (dict(size=(-1, 9)), "size is"), (dict(size=(800,)), "size is")])
def test_options_out_of_range_are_refused(tmp_path, options, words):
    with one_line_error(ValueError, words):
        data.build("kitti", kitti_folder(tmp_path, {"000001": ""}), "all", **options)


# --- image files -----------------------------------------------------------------------------------------------------

def rotated(path, orientation, size=(60, 40), **options):
    """A picture whose left half is white as stored, with an EXIF tag."""
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][data.ORIENTATION] = orientation
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1]))
    image.save(path, **options)


@pytest.mark.parametrize("where", ["Raw profile type exif", "XML:com.adobe.xmp"])
def test_a_tag_in_a_text_of_a_png_turns_too(tmp_path, where):
    """As ImageMagick and Adobe write it: what turns the pixels is known before the boxes are read."""
    exif, text = Image.Exif(), PngInfo()
    exif[data.ORIENTATION] = 3
    block = exif.tobytes()
    text.add_text(where, f"\nexif\n{len(block):8}\n{block.hex()}\n" if "Raw" in where
                  else '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    rotated(tmp_path / "a.png", None, pnginfo=text)
    assert data.image_header(tmp_path / "a.png") == ((40, 60), 3)
    assert data.read_image(tmp_path / "a.png")[0, 0].tolist() == [0] * 30 + [255] * 30


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_picture_that_exif_turns_is_turned_or_refused(tmp_path, orientation, suffix):
    root = coco_folder(tmp_path, [note(1)])
    file = tmp_path / f"val2017/5.{suffix}"
    rotated(file, orientation)
    change_json(root, images=[picture(5, file_name=file.name)])
    with one_line_error(ValueError, file, f"orientation {orientation}", "auto-orient"):
        data.build("coco", root, "val")                             # the JSON tells the stored size
    change_json(root, images=[picture(5, file_name=file.name, width=40, height=60)])
    if orientation < 5:
        with one_line_error(ValueError, file, f"orientation {orientation}"):
            data.build("coco", root, "val")
        return
    dataset = data.build("coco", root, "val")                       # it tells the upright one
    assert "1 pictures turned upright" in dataset.summary
    light = dataset.pixels(0).float().mean(0).mean(1) > 128         # (60,): left becomes top, or bottom
    assert light.tolist() == [orientation == 6] * 30 + [orientation == 8] * 30


def test_a_kitti_picture_that_exif_turns_is_refused_and_a_senseless_tag_is_not(tmp_path):
    root = kitti_folder(tmp_path, {"000001": line("Car", 1, 2, 30, 40)})
    file = root / "training/image_2/000001.png"
    rotated(file, 0, (120, 40))
    assert len(data.build("kitti", root, "all")) == 1
    rotated(file, 3, (120, 40))
    with one_line_error(ValueError, file, "orientation 3", "strip"):
        data.build("kitti", root, "all")


def deep_png(path):
    """RGB in 16 bits, which Pillow opens as 8 bits and does not write."""
    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(4 * (b"\0" + 24 * b"\x0f"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
                     + chunk(b"IEND", b""))


@pytest.mark.parametrize("dtype, suffix, mode", [
    ("uint16", "png", "I;16"), ("uint16", "tif", "I;16"), ("int32", "tif", "mode I"),
    ("float32", "tif", "mode F"), ("RGB", "png", "RGB, 16 bits")])
def test_pixels_of_more_than_8_bits_are_refused_by_mode(tmp_path, dtype, suffix, mode):
    file = tmp_path / f"deep.{suffix}"
    if dtype == "RGB":
        deep_png(file)
    else:
        Image.fromarray(np.arange(16, dtype=dtype).reshape(4, 4) * 100).save(file)
    for read in (data.read_image, data.image_header):
        with one_line_error(data.BrokenImage, file, mode, "8 bits"):
            read(file)


@pytest.mark.parametrize("mode, value", [("1", 255), ("L", 77), ("P", 77), ("RGBA", (77, 77, 77, 9)),
                                         ("LA", (77, 9)), ("RGB", (77, 77, 77))])
def test_pixels_of_8_bits_are_read_as_they_are(tmp_path, mode, value):
    image = Image.new(mode, (4, 3), value)
    if mode == "P":
        image.putpalette([255 - channel for channel in range(256) for _ in range(3)])
    image.save(tmp_path / "a.png")
    assert set(data.read_image(tmp_path / "a.png").flatten().tolist()) == {{"1": 255, "P": 178}.get(mode, 77)}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size, words", [
    ((4000, 1), "4000x1 pixels, thinner than 1:100"), ((3, 301), "thinner than 1:100"),
    ((950, 950), "950x950 pixels, more than 894784"), ((1400, 1400), "more than 1789568 pixels")])
def test_images_out_of_bounds_are_refused_with_their_true_cause(tmp_path, monkeypatch, size, words):
    monkeypatch.setattr(data, "MAX_PIXELS", 894784)                 # a hundredth
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 894784)
    root = kitti_folder(tmp_path, {"000001": ""}, size=size)
    with one_line_error(data.BrokenImage, "000001.png", words):
        data.build("kitti", root, "all")


def test_a_thin_image_keeps_a_pixel():
    image = torch.zeros(3, 1, 100, dtype=torch.uint8)
    box = BoundingBoxes(torch.tensor([[10., 0, 20, 1]]), format="XYXY", canvas_size=(1, 100))
    assert data.resize(image, 40, 45).shape == (3, 1, 100) and data.resize(box, 40, 45).tolist() == [[10, 0, 20, 1]]


def test_an_image_that_changed_since_its_check_is_an_error(tmp_path):
    root = kitti_folder(tmp_path, {"000001": ""})
    dataset = data.build("kitti", root, "all")
    file = root / "training/image_2/000001.png"
    Image.new("RGB", (40, 120)).save(file)
    with one_line_error(data.BrokenImage, file, "40x120", "120x40"):
        dataset[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_name_with_a_line_break_is_shown_whole(tmp_path, workers):
    root = kitti_folder(tmp_path, {"a\nb": ""})
    dataset = data.build("kitti", root, "all")
    (root / "training/image_2/a\nb.png").write_bytes(b"no image")
    with one_line_error(data.BrokenImage, r"image_2/a\nb.png'"):
        next(iter(data.loader(dataset, 1, steps=1, workers=workers)))


# --- label files -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "Truck 2 0.00 0 -10 10 10 50 30 " + REST,                       # a class of two words
    "Truck 1 0.00 0 -10 10 10 50 30 " + REST,
    "Truck 0 0.00 1 0 10 10 50 30 0 0 0 0 0 0 0",
    "Truck 2 0 -10 10 10 50 30 " + REST, "Truck 0 7 -10 10 10 50 30 " + REST,
    "Red Truck 0 0 -10 10 10 50 30 " + REST])
def test_shifted_columns_are_refused(tmp_path, text):
    root = kitti_folder(tmp_path, {"000001": text})
    with one_line_error(ValueError, "000001.txt, line 1", "two words",
                        "out of KITTI's range" if text.startswith("Truck") else "float: 'Truck'"):
        data.build("kitti", root, "all", class_map="Truck")


def test_truncation_and_occlusion_in_range_are_read(tmp_path):
    heads = ("Car 0.00 0", "Car 1 3", "Car 0.5 2.0", "DontCare -1 -1", "Car -1 -1")
    text = "".join(f"{head} -10 10 10 50 30 {REST}\n" for head in heads)
    dataset = data.build("kitti", kitti_folder(tmp_path, {"000001": text}), "all")
    assert dataset.raw(0)[1]["boxes"].tolist() == [[10, 10, 50, 30]] * 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_label_and_split_files_in_common_encodings(tmp_path, encoding):
    root = kitti_folder(tmp_path, {"000001": "", "000002": ""})
    for name, text in (("training/label_2/000001.txt", line("Fußgänger", 1, 2, 30, 40)),
                       ("ids.txt", "000001\r\n000002\r\n")):
        (root / name).write_text(text, encoding=encoding)
    dataset = data.build("kitti", root, str(root / "ids.txt"), class_map="Fußgänger")
    assert dataset.ids == [1, 2] and dataset.raw(0)[1]["labels"].tolist() == [0]


def test_another_encoding_is_named(tmp_path):
    root = kitti_folder(tmp_path, {"000001": ""})
    for name, split in (("ids.txt", str(root / "ids.txt")), ("training/label_2/000001.txt", "all")):
        (root / name).write_bytes("Fußgänger".encode("latin-1"))
        with one_line_error(ValueError, root / name, "UTF-8"):
            data.build("kitti", root, split)


def test_files_of_macos_and_huge_numbers_as_names(tmp_path):
    root = kitti_folder(tmp_path, {"1": "", str(2 ** 63): ""})
    (root / "training/image_2/._1.png").write_bytes(b"macOS")
    (root / "training/label_2/._1.txt").write_bytes(b"macOS")
    dataset = data.build("kitti", root, "all")
    assert dataset.ids == [0, 1] and "without image" not in dataset.summary


# --- the toy ---------------------------------------------------------------------------------------------------------

def test_the_toy_is_the_same_byte_for_byte_with_workers_and_after_an_interruption(toy, tmp_path):
    again = tmp_path / "toy"
    shutil.copytree(toy, again)
    (again / "toy.json").rename(again / "toy.json.part")            # as a run leaves it that was killed
    for name in ("000002", "100001"):
        (again / f"training/image_2/{name}.png").unlink()
    kept = (again / "training/image_2/000003.png").stat().st_mtime_ns
    data.make_toy(again, counts=COUNTS, workers=2)
    assert (again / "training/image_2/000003.png").stat().st_mtime_ns == kept     # not drawn again
    files = sorted(p.relative_to(toy) for p in toy.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((toy / file).read_bytes() == (again / file).read_bytes() for file in files)
    parallel = tmp_path / "parallel"
    data.make_toy(parallel, counts={"train": 30}, workers=2)
    assert (parallel / "training/image_2/000005.png").read_bytes() == (toy / "training/image_2/000005.png").read_bytes()


def test_another_toy_or_a_strangers_folder_is_not_touched(toy, tmp_path):
    for wrong in (dict(seed=1), dict(counts={"train": 7})):
        with one_line_error(ValueError, "toy.json", "delete"):
            data.make_toy(toy, **{"counts": COUNTS} | wrong)
    data.make_toy(toy)                                              # no counts asked for: what is there will do
    (tmp_path / "thesis.tex").write_text("important")
    with one_line_error(ValueError, tmp_path, "empty"):
        data.make_toy(tmp_path, counts=COUNTS)


def test_the_toy_is_a_kitti_folder_with_objects_of_the_promised_kind(toy):
    parts = {split: data.build("toy", toy, split) for split in ("train", "val", "tune", "all")}
    assert {split: len(part) for split, part in parts.items()} == COUNTS | {"all": 12}
    as_kitti = data.build("kitti", toy, str(toy / "ImageSets/val.txt"))
    assert as_kitti.ids == parts["val"].ids == [100000, 100001, 100002, 100003]
    boxes = torch.cat([parts["all"].raw(index)[1]["boxes"] for index in range(12)])
    heights = boxes[:, 3] - boxes[:, 1]
    assert len(boxes) > 20 and heights.min() >= 10 and heights.max() < 40
    assert parts["train"][0][0].shape == (3, 48, 160)


def test_toy_boxes_and_occlusion_are_those_of_the_pixels():
    """A pole in front hides a known share of an object; past 45 % the object becomes DontCare."""
    mask = np.zeros((96, 320), bool)
    mask[20:60, 100:140] = True                                     # 40 x 40 canvas pixels: 20 x 20 in the image
    corners = [(100, 20), (140, 60)]
    for hidden, expected in ((0, "Car 0.00 0"), (8, "Car 0.00 1"), (18, "Car 0.00 2"), (19, "DontCare -1 -1")):
        visible = mask.copy()
        visible[:, 100:100 + hidden] = False                        # 0, 20, 45, 47.5 %
        assert toy_scenes.label_line("Car", corners, mask, visible) == f"{expected} -10 50.00 10.00 70.00 30.00 {REST}"
    assert toy_scenes.label_line("Car", [(80, 20), (140, 60)], mask, mask).startswith("Car 0.33 0")       # a third is cut off


# --- augmentation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, size", [("eval", (70, 100)), ("kitti", (133, 1000)), ("toy", None), ("toy", (30, 90)),
                                          ("coco", (800, 1333)), ("coco", (96, 160))])
def test_boxes_stay_on_their_pixels_under_every_augmentation(recipe, size):
    """A picture of two coloured rectangles: after the transform each colour's extent is its box."""
    picture = torch.full((3, 123, 201), 110, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 30, 80, 111], [120, 9, 180, 60]])
    colours = ((0, 1, 2), (255, 0, 0)), ((2, 0, 1), (255, 0, 0))    # red alone, blue alone
    for (x0, y0, x1, y1), (channels, values) in zip(boxes.int().tolist(), colours):
        for channel, value in zip(channels, values):
            picture[channel, y0:y1, x0:x1] = value
    cropped = 0
    for trial in range(12):
        both = BoundingBoxes(boxes.clone(), format="XYXY", canvas_size=(123, 201))
        image, after = data.transform(picture, both, recipe, size, random.Random(trial))
        height, width = image.shape[1:]
        for box, (channels, _) in zip(after.as_subclass(torch.Tensor), colours):
            strongest = image[channels[0]].float() - image[list(channels[1:])].float().amax(0)
            here = strongest > 100                                  # about half of what any jitter leaves of the colour
            rows, columns = here.any(1).nonzero(), here.any(0).nonzero()
            if not (box[2:] > box[:2]).all():
                cropped += 1
                assert not here.any()
                continue
            if (box[2:] - box[:2]).min() < 4:                       # a sliver may blur away
                continue
            extent = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            assert (box - extent).abs().max() <= 1.5, (trial, box, extent)      # up to 6.5-fold blur
        assert after.canvas_size == (height, width)
        if size and recipe != "coco":
            assert min(height, width) <= size[0] and max(height, width) <= size[1]
    assert recipe != "coco" or cropped                              # the crop did happen


def test_sizes_are_detrs_by_hand():
    for (height, width), expected in (((480, 640), (800, 1066)), ((640, 480), (1066, 800)), ((375, 1242), (402, 1331)),
                                      ((800, 900), (800, 900))):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        assert data.resize(image, 800, 1333).shape[1:] == expected


def test_a_crop_drops_the_objects_it_cuts_away_with_their_labels(tmp_path):
    cars = "".join(line("Car", 100 * i, 50, 100 * i + 40, 90) for i in range(6))       # square, at the left
    cyclists = "".join(line("Cyclist", 100 * i, 50, 100 * i + 10, 90) for i in range(6, 12))        # four times as high
    root = kitti_folder(tmp_path, {"000001": cars + cyclists + line("DontCare", 0, 0, 30, 300)}, size=(1200, 400))
    dataset = data.build("kitti", root, "all", augment="train")
    dataset.name, kept = "coco", []                                 # DETR's crops, of a KITTI folder
    for epoch in range(20):
        target = dataset[epoch, 0][1]
        (cx, cy, w, h), labels = target["boxes"].unbind(1), target["labels"]
        assert len(cx) == len(labels) and (w > 0).all() and (h > 0).all() and (target["ignore"][:, 2:] > 0).all()
        whole = (cx - w / 2 > .001) & (cx + w / 2 < .999) & (cy - h / 2 > .001) & (cy + h / 2 < .999)
        slender = w * target["size"][1] < h * target["size"][0] / 2
        assert torch.equal(labels[whole] == 2, slender[whole])
        kept.append(labels.tolist())
    assert max(map(len, kept)) == 12 and any(len(labels) < 12 and 2 in labels for labels in kept)


def test_ignored_regions_move_with_the_image(tmp_path):
    root = kitti_folder(tmp_path, {"000001": line("DontCare", 0, 0, 30, 20)})
    dataset = data.build("kitti", root, "all", augment="train")
    seen = {round(dataset[epoch, 0][1]["ignore"][0, 0].item(), 3) for epoch in range(12)}
    assert seen == {.125, .875}                                     # as it is, and flipped


# --- batches and loaders ---------------------------------------------------------------------------------------------

def test_collate_pads_at_the_right_and_bottom():
    batch = data.collate([(torch.ones(3, 2, 5), {"image_id": 1}), (torch.ones(3, 4, 3), {"image_id": 2})])
    assert batch.images.shape == (2, 3, 4, 5) and batch.images.sum() == 3 * (10 + 12)
    assert batch.padding[0].tolist() == [[False] * 5] * 2 + [[True] * 5] * 2
    assert batch.padding[1].tolist() == [[False] * 3 + [True] * 2] * 4
    assert batch.to("cpu").targets == [{"image_id": 1}, {"image_id": 2}]
    torch.testing.assert_close(batch.extent, torch.tensor([[1, 0.5], [0.6, 1]]))         # of width and height


def steps_of(dataset, *args, **options):
    return [(batch.images, batch.image_ids) for batch in data.loader(dataset, *args, **options)]


def test_a_training_step_depends_on_seed_and_number_only(toy):
    dataset = data.build("toy", toy, "train", augment="train")
    before = torch.get_rng_state()
    batches = data.loader(dataset, 4, steps=7)                      # 28 items of 6 images: more than four epochs
    whole, again = ([(batch.images, batch.image_ids) for batch in batches] for _ in range(2))
    assert len(batches) == 7 and [ids for _, ids in whole] == [ids for _, ids in again]
    late = steps_of(data.build("toy", toy, "train", augment="train"), 4, steps=7, start=5, workers=2)
    assert len(late) == 2
    for (image, ids), (image_late, ids_late) in zip(whole[5:], late):
        assert ids == ids_late and torch.equal(image, image_late)
    order = sum((ids for _, ids in whole), [])
    assert all(sorted(order[epoch:epoch + 6]) == [0, 1, 2, 3, 4, 5] for epoch in (0, 6, 12, 18))
    assert order[:6] != order[6:12] and order != sum((ids for _, ids in steps_of(dataset, 4, steps=7, seed=1)), [])
    assert not torch.equal(dataset[0, 0][0], dataset[1, 0][0])      # another epoch, another augmentation
    assert torch.equal(before, torch.get_rng_state())               # nothing of it drawn from the global generator


def test_ranks_share_the_global_batch_and_small_sets_fill_large_batches(toy):
    dataset = data.build("toy", toy, "train", augment="train")
    one = steps_of(dataset, 8, steps=2)                             # larger than the set
    two = [steps_of(dataset, 4, steps=2, rank=rank, world=2) for rank in (0, 1)]
    for step, (images, ids) in enumerate(one):
        for rank in (0, 1):
            assert two[rank][step][1] == ids[rank::2] and torch.equal(two[rank][step][0], images[rank::2])
    ranks = [sum((batch.image_ids for batch in data.eval_loader(dataset, 2, rank=rank, world=4)), [])
             for rank in range(4)]
    assert ranks == [[0, 4], [1, 5], [2], [3]]


class Odd(torch.utils.data.Dataset):
    """Items whose reading goes wrong in a worker."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, key):
        self.act()
        return torch.zeros(3, 4, 4), {"image_id": key[1]}


@pytest.mark.parametrize("act, words", [
    (lambda: time.sleep(60), "timed out after 1 seconds"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal"),
    (lambda: os._exit(3), "exited unexpectedly")])
def test_workers_that_hang_or_die_end_the_run_in_one_line(monkeypatch, act, words):
    monkeypatch.setattr(data, "PATIENCE", 1)
    with one_line_error(OSError, "loading images", words, "--workers"):
        next(iter(data.loader(Odd(act), 2, steps=1, workers=1)))


def test_shared_memory_that_is_full_is_named(monkeypatch):
    """A container gives 64 MB: without this the batch is lost in a thread, and the run waits for ever."""
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)        # also in forked workers
    with one_line_error(data.OneLine, "(2, 3, 4, 4)", "No space left", "--shm-size"):
        next(iter(data.loader(Odd(lambda: None), 2, steps=1, workers=1)))
    assert len(list(data.loader(Odd(lambda: None), 2, steps=3))) == 3


def test_an_error_inside_a_worker_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="Traceback"):
        next(iter(data.loader(Odd(lambda: 1 / 0), 2, steps=1, workers=1)))


# --- evaluation ------------------------------------------------------------------------------------------------------

def test_ap_by_hand(tmp_path, capsys):
    """Two cars, one found exactly, one false alarm ranked above it: precision 1/2 up to recall 1/2, then nothing."""
    root = kitti_folder(tmp_path, {"000001": line("Car", 0, 0, 20, 20), "000002": line("Car", 40, 0, 80, 40)})
    dataset = data.build("kitti", root, "all")
    result = data.evaluate([found(1, [.9, .8], [0, 0], [[90, 0, 110, 20], [0, 0, 20, 20]])], dataset)
    half = 51 / 101 * .5                                            # recalls 0, .01, .., .5 of the 101
    assert result["AP"] == pytest.approx(half) and result["AP50"] == pytest.approx(half)
    assert result["per_class"]["Car"]["AP"] == pytest.approx(half)
    assert math.isnan(result["per_class"]["Cyclist"]["AP"]) and math.isnan(result["APl"])
    assert result["APs"] == pytest.approx(.5) and result["APm"] == 0              # 400 px^2 found, 1600 px^2 missed
    loose = found(2, [.9], [0], [[40, 0, 80, 29]])                  # IoU .725: right at .5, .55, .6, .65, .7
    result = data.evaluate([loose], data.build("kitti", root, "all"))
    assert result["AP50"] == pytest.approx(51 / 101) and result["AP75"] == 0
    assert result["AP"] == pytest.approx(.5 * 51 / 101)
    assert data.evaluate([], dataset)["AP"] == 0
    assert capsys.readouterr().out == ""


def test_detections_on_ignored_regions_are_no_false_alarms(tmp_path):
    text = line("Car", 0, 0, 20, 20) + line("DontCare", 60, 0, 120, 40) + line("Van", 25, 0, 45, 20)
    text += line("Pedestrian", 0, 20, 10, 40)
    dataset = data.build("kitti", kitti_folder(tmp_path, {"000001": text}), "all")
    wrong = [[70, 5, 90, 25], [95, 5, 115, 25], [25, 0, 45, 20]]    # two in DontCare, one on the Van, all sure
    right = [[0, 0, 20, 20], [0, 20, 10, 40]]                       # the car, the pedestrian

    def ap(dataset, boxes, labels):
        scores = [.9] * len(boxes) + [.5] * 2
        return data.evaluate([found(1, scores, labels + [0, 1], boxes + right)], dataset)["AP"]

    assert ap(dataset, wrong, [0, 0, 0]) == ap(dataset, wrong, [1, 1, 1]) == pytest.approx(1)       # for every class
    assert ap(dataset, [[30, 22, 50, 40]], [1]) == pytest.approx((1 + .5) / 2)                      # a real false alarm
    strict = data.build("kitti", tmp_path, "all", others="background")
    assert ap(strict, wrong[:2], [0, 0]) == pytest.approx(1)        # DontCare stays ignored ..
    assert ap(strict, wrong[2:], [0]) == pytest.approx((1 + .5) / 2)              # .. and the Van is background


def test_predictions_that_cannot_be_meant_are_refused(toy):
    dataset = data.build("toy", toy, "val")
    for wrong in ([found(0, [], [], [])], [found(100000, [], [], [])] * 2, [found(100000, [1.0], [3], [[0, 0, 9, 9]])]):
        with one_line_error(ValueError, "predictions", "image"):
            data.evaluate(wrong, dataset)


@pytest.mark.parametrize("what, where", [("boxes", (0, 0)), ("boxes", slice(None)), ("scores", 0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_an_error_that_names_the_image(toy, what, where, value):
    """pycocotools takes a box of NaN for a perfect hit: AP 1.000 of a model that is broken."""
    dataset = data.build("toy", toy, "val")
    perfect = truth(dataset)
    assert data.evaluate(perfect, dataset)["AP"] == pytest.approx(1)
    broken = next(one for one in perfect if len(one["labels"]))
    broken[what][where] = value
    with pytest.raises(FloatingPointError, match=f"image {broken['image_id']}: .*not finite"):
        data.evaluate(perfect, dataset)


def test_the_toys_ground_truth_has_ap_1(toy):
    dataset = data.build("toy", toy, "all")
    assert data.evaluate(truth(dataset), dataset)["AP"] == pytest.approx(1)


# --- real images -----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not (SHARED / "real").exists(), reason="no real images here")
def test_real_kitti_and_coco():
    kitti = data.build("kitti", SHARED / "real/kitti", "all")
    assert [len(t["labels"]) for _, t in kitti] == [1, 2] and [len(t["ignore"]) for _, t in kitti] == [0, 5]
    assert kitti[0][0].shape == (3, 403, 1333)
    coco = data.build("coco", SHARED / "real/coco", "val")
    assert len(coco) == 128 and len(coco.classes) == 80 and coco.category_ids[-1] == 90
    assert data.evaluate(truth(coco), coco)["AP"] == pytest.approx(1)
    batch = next(iter(data.eval_loader(coco, 2)))
    assert batch.images.shape[0] == 2 and batch.images.shape[2:].numel() <= 1333 * 1333
