"""Images in, batches out, average precision back: KITTI, COCO, and a toy KITTI that draws itself.

    dataset = build("kitti", root, "train", augment="train")    # or "coco", "toy"; yours, if it has either's layout
    for batch in loader(dataset, 16, steps=1000):               # Batch(images, padding, targets)
        ...
    evaluate(predictions, build("kitti", root, "val"))          # {"AP": .., "AP50": .., "per_class": {..}, ..}

An item is (image, target): image (3, H, W) float, ImageNet-normalised; target a dict of
    boxes      (K, 4) float, (cx, cy, w, h) as fractions of this image's own, unpadded size
    labels     (K,) long, 0..C-1, positions in `dataset.classes`
    ignore     (M, 4) float, as boxes: regions that are neither object nor background (DontCare, crowds)
    size, orig_size   (2,) long, (height, width) of the image as given and as stored
    image_id   int

Folders
-------
KITTI   root/training/image_2/*.png|jpg and root/training/label_2/*.txt, with the object benchmark's 15 columns (a 16th,
        a score, is allowed and not read).  image_id is int(stem), or the position in the folder if a stem is no number.
        "train" and "val" are 80 % and 20 % of the 7,481 ids, in splits/: of the ids sorted by
        sha256("clockdistill-kitti-ID"), the first 1,496 are val (`split_ids`; python -c "import data;
        data.write_splits()" rebuilds the files).  A folder with other ids is split by the same rule over its own.
        splits/kitti_cyclists_{train,tune,val}.txt divide 991 of the ids, images with a cyclist, into 703, 90 and 198
        (`tune_ids`): for experiments that must choose settings before they look at val.
        Any other split is a text file with one id a line, given by its path.  So is the 3,712/3,769 split that is
        common in 3D work: its ids follow no rule from which they could be rebuilt here; most KITTI toolkits hold them
        as ImageSets/train.txt and val.txt.
COCO    root/annotations/instances_{train,val}2017.json with images in root/{train,val}2017/.  Your own: for split S
        also annotations/instances_S.json, annotations/S.json, S.json or S/_annotations.coco.json (for val, S may be
        "valid"); images in S2017/, S/, images/S2017/, images/S/, images/, or root.  Labels are the ranks of the file's
        category ids: COCO's official 1..90 with gaps become 0..79; `dataset.category_ids` leads back.
toy     drawn on first use into KITTI's layout (`make_toy`), then read by the KITTI reader; splits train, val, tune.
"all" is everything in the folder (COCO: train and val together).

KITTI's types and `class_map`
-----------------------------
    kitti3          Car, Pedestrian, Cyclist; every other type ignored           (default; the authors' earlier code)
    kitti3_merged   the same three, Van -> Car, Person_sitting -> Pedestrian; every other type ignored
    kitti8          all eight types
    "Car,Dog"       your own names, from a string or a list; KITTI's other types ignored, unknown names refused
    {type: class}   full control; class None is ignored.  Classes are numbered as they first appear.
DontCare is always ignored.  "Ignored" means: an ignore region, where evaluation forgives detections of every class.
Converters of KITTI often mean "not written" by it, that is, background: others="background" does that.

AP here and KITTI's own
-----------------------
`evaluate` is COCO's protocol: AP averaged over IoU .50:.05:.95, and AP50, over all labelled objects of any size.
KITTI's benchmark asks for IoU .7 for Car and .5 for Pedestrian and Cyclist; reports easy / moderate / hard by box
height (40/25/25 px), occlusion and truncation, leaving harder objects out; counts Van as neutral for Car and
Person_sitting for Pedestrian; forgives detections below the height limit or on DontCare; and averages precision at 40
recalls (11 before 2019; COCO: 101).  So numbers of the two kinds cannot be compared: AP50 is not "KITTI moderate", it
also asks for the tiny and the hidden, and is content with looser boxes for Car.  The VOC-style AP at IoU .5 of the
authors' earlier code is closest to AP50.

Bad input, found before a model is built: what stops with one line, what is handled and counted in `summary`
-----------------------------------------------------------------------------------------------------------
    stops    missing root or folder; no image left; image without label file; truncated or unreadable image; unknown
             class; label line with a wrong column count, a word for a number, a NaN; JSON that does not parse or lacks
             a list; duplicate image, category or annotation id; annotation of an unlisted image or category; image
             file missing (COCO); image size unlike the JSON's.  An image that only fails to decode stops the run when
             it is read, with its path, also from a worker
    counted  box of no area or inverted: dropped; beyond the border: clipped (counted from 1 px on), dropped if
             entirely outside; listed ids that the folder lacks; label files without image: left out
Images without objects are kept.  Padding: images of one batch are padded with zeros (the mean colour) at the right and
bottom.  Borders of convolutions do see them, so a detector's scores move a little with its batch mates: make tables at
batch size 1.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
KITTI_IDS = [f"{number:06d}" for number in range(7481)]
CLASS_MAPS = {
    "kitti3": {"Car": "Car", "Pedestrian": "Pedestrian", "Cyclist": "Cyclist"},
    "kitti3_merged": {"Car": "Car", "Van": "Car", "Pedestrian": "Pedestrian", "Person_sitting": "Pedestrian",
                      "Cyclist": "Cyclist"},
    "kitti8": {name: name for name in KITTI_TYPES},
}
DEFAULT_SIZE = {"coco": (800, 1333), "kitti": (800, 1333), "toy": None}     # (short side, longest side at most), pixels


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """images (B, 3, H, W) float, normalised; padding (B, H, W) bool, True where padded; targets, one dict an image."""
    images: torch.Tensor
    padding: torch.Tensor
    targets: list

    @property
    def labels(self):
        """B tensors (K_b,)."""
        return [target["labels"] for target in self.targets]

    @property
    def boxes(self):
        """B tensors (K_b, 4), (cx, cy, w, h) as fractions of each image's own size."""
        return [target["boxes"] for target in self.targets]

    @property
    def image_ids(self):
        return [int(target["image_id"]) for target in self.targets]

    @property
    def extent(self):
        """(B, 2), (w_i / W, h_i / H): the part of the padded batch that each image fills, exact."""
        real = (~self.padding).float()                                   # (B, H, W)
        return torch.stack([real[:, 0].mean(1), real[:, :, 0].mean(1)], 1)

    def split(self, count):
        """The batch cut into `count` smaller ones (fewer, when it has fewer images)."""
        size = math.ceil(len(self.targets) / count)
        return [Batch(self.images[i:i + size], self.padding[i:i + size], self.targets[i:i + size])
                for i in range(0, len(self.targets), size)]

    def _map(self, move):
        targets = [{k: move(v) if torch.is_tensor(v) else v for k, v in t.items()} for t in self.targets]
        return Batch(move(self.images), move(self.padding), targets)

    def to(self, device):
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        return self._map(torch.Tensor.pin_memory)


def collate(items):
    """[(image, target), ...] -> Batch, padded with zeros at the bottom and right to the largest height and width."""
    images, targets = zip(*items)
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, image in enumerate(images):
        batch[row, :, :image.shape[1], :image.shape[2]] = image
        padding[row, :image.shape[1], :image.shape[2]] = False
    return Batch(batch, padding, list(targets))


# ---------------------------------------------------------------------------------------------------------------------
# The dataset
# ---------------------------------------------------------------------------------------------------------------------

class BrokenImage(ValueError):
    """One line that names the file, also when a DataLoader worker wrapped it in a traceback (which `details` keeps)."""

    def __init__(self, message):
        self.details = message
        super().__init__(message.strip().splitlines()[-1].removeprefix("data.BrokenImage: "))


def read_image(path):
    """An image file as (3, H, W) uint8 RGB. Raises BrokenImage, naming the file, when it does not decode."""
    try:
        with Image.open(path) as file:
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as error:
        raise BrokenImage(f"{path}: does not decode ({one_line(error)}); replace the file, or leave it out") from error


def prepare(image, size=None):
    """An image as read -> what a detector reads in evaluation: resized to `size` (short, longest), normalised."""
    nothing = BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(image.shape[1:]))
    return normalise(transform(image, nothing, "eval", size, None)[0])


@dataclass
class Records:
    """What a reader found: one entry an image in the first lists, one row a box in `rows`."""
    classes: list
    category_ids: list                              # label -> official id
    paths: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    sizes: list = field(default_factory=list)       # (height, width)
    rows: list = field(default_factory=list)        # (boxes, 7) arrays: x0 y0 x1 y1 in pixels, label, ignored, area
    problems: Counter = field(default_factory=Counter)

    def add(self, path, image_id, size, rows):
        """rows: (x0, y0, x1, y1, label, ignored, area) each; label -1: ignored for every class; area NaN: the box's."""
        rows = np.array(rows, dtype=np.float64).reshape(-1, 7)
        height, width = size
        flat = (rows[:, 2] <= rows[:, 0]) | (rows[:, 3] <= rows[:, 1])
        inside = rows[:, :4].clip(0, [width, height, width, height])
        outside = ~flat & ((inside[:, 2] <= inside[:, 0]) | (inside[:, 3] <= inside[:, 1]))
        clipped = ~flat & ~outside & (np.abs(inside - rows[:, :4]).max(1, initial=0) >= 1)
        for name, which in (("boxes without area dropped", flat), ("boxes outside their image dropped", outside),
                            ("boxes clipped to their image", clipped)):
            self.problems[name] += int(which.sum())
        rows[:, :4] = inside
        box_area = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
        rows[:, 6] = np.where(np.isnan(rows[:, 6]), box_area, rows[:, 6])
        self.paths.append(str(path)), self.ids.append(image_id), self.sizes.append((height, width))
        self.rows.append(rows[~(flat | outside)])


class Dataset(torch.utils.data.Dataset):
    """Images with boxes. `dataset[index]`, or `dataset[epoch, index]` where augmentation should differ by epoch.

    Augmentation draws from (seed, epoch, index) alone, so an item does not depend on workers, order, or a resumed run.
    Attributes: name, classes, category_ids, ids, paths, sizes, summary, most_objects (of one image); `coco` is the
    ground truth for pycocotools.
    """

    def __init__(self, name, records, split, augment, size, seed, cache):
        self.name, self.classes, self.category_ids = name, records.classes, records.category_ids
        self.paths, self.ids, self.sizes = records.paths, records.ids, records.sizes
        # All boxes in one array and not one small one an image: forked workers share it without copying.
        self.rows = np.concatenate([np.zeros((0, 7)), *records.rows])
        self.starts = np.cumsum([0] + [len(rows) for rows in records.rows])
        self.augment, self.size, self.seed = augment, size, seed
        self.cache = {} if cache else None
        self._coco = None
        labels, ignored = self.rows[:, 4], self.rows[:, 5] > 0
        counts = [int(((labels == c) & ~ignored).sum()) for c in range(len(self.classes))]
        real = np.concatenate([[0], (~ignored).cumsum()])                 # objects before each row
        self.most_objects = int(np.diff(real[self.starts]).max(initial=0))
        most = sorted(zip(counts, self.classes), key=lambda pair: -pair[0])
        listed = ", ".join(f"{name} {count}" for count, name in most[:8]) + (", ..." if len(most) > 8 else "")
        counted = "".join(f"; {n} {what}" for what, n in sorted(records.problems.items()) if n)
        self.summary = (f"{name} {split}: {len(self.ids)} images, {sum(counts)} objects ({listed}), "
                        f"{ignored.sum()} ignored regions{counted}")

    def __len__(self):
        return len(self.ids)

    def pixels(self, index):
        """The stored image as (3, H, W) uint8."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image = read_image(self.paths[index])
        if self.cache is not None:
            self.cache[index] = image
        return image

    def _rows(self, index):
        rows = torch.from_numpy(self.rows[self.starts[index]:self.starts[index + 1]])      # (boxes, 7)
        ignored = rows[:, 5] > 0
        return rows[~ignored, :4].float(), rows[~ignored, 4].long(), rows[ignored, :4].float()

    def raw(self, index):
        """(PIL image, target) as stored, for pictures: boxes and ignore are (x0, y0, x1, y1) in pixels."""
        boxes, labels, ignore = self._rows(index)
        image = Image.fromarray(self.pixels(index).permute(1, 2, 0).numpy())
        return image, {"boxes": boxes, "labels": labels, "ignore": ignore, "image_id": self.ids[index]}

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        image, (boxes, labels, ignore) = self.pixels(index), self._rows(index)
        stored = torch.tensor(image.shape[1:])
        both = BoundingBoxes(torch.cat([boxes, ignore]), format="XYXY", canvas_size=tuple(image.shape[1:]))
        rng = random.Random(f"{self.seed}, {epoch}, {index}")
        image, both = transform(image, both, self.name if self.augment == "train" else "eval", self.size, rng)
        height, width = image.shape[1:]
        keep = (both[:, 2:] > both[:, :2]).all(1)                   # a crop leaves boxes beyond its border without area
        fractions = box_convert(both.as_subclass(torch.Tensor), "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
        of_object = torch.arange(len(both)) < len(boxes)
        target = {"boxes": fractions[keep & of_object], "labels": labels[keep[:len(boxes)]],
                  "ignore": fractions[keep & ~of_object], "image_id": self.ids[index],
                  "size": torch.tensor([height, width]), "orig_size": stored}
        return normalise(image), target

    @property
    def coco(self):
        """Ground truth in original pixels as a pycocotools COCO object, made on first use.

        A region ignored for every class (KITTI's) is one crowd annotation a class, since COCOeval matches class by
        class; COCO's own crowds keep their class, as in the official evaluation.
        """
        if self._coco is None:
            annotations = []
            for index, image_id in enumerate(self.ids):
                for x0, y0, x1, y1, label, ignored, area in self.rows[self.starts[index]:self.starts[index + 1]]:
                    for one in range(len(self.classes)) if label < 0 else (int(label),):
                        annotations.append({"image_id": image_id, "category_id": self.category_ids[one], "area": area,
                                            "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(ignored)})
            self._coco = coco_object(self, annotations)
        return self._coco


def build(name, root, split, *, augment="eval", size=None, limit=None, class_map=None, others="ignore", seed=0,
          check=True, cache=None, counts=None, toy_seed=0):
    """Open a data set, and check it.

    name: "toy" | "kitti" | "coco", the layout.  root: its folder.
    split: "train" | "val" | "all" (toy also "tune"), or the path of a text file with one image id a line (KITTI: stems;
        COCO: image ids).
    augment: "train" for that data set's training augmentation (`transform`), "eval" for none.
    size: (short side, longest side at most) of the resize in pixels; None: DEFAULT_SIZE.
    limit: use only the first so many images, in the order of their ids.
    class_map, others: KITTI's types, see the top of this file.
    seed: of the augmentation.  check: False reads no image end markers (and, for COCO, no image headers).
    cache: keep decoded images in memory, in each worker; None: the toy only.
    counts, toy_seed: what to draw when the toy's folder is empty (`make_toy`).
    Raises FileNotFoundError or ValueError with one line that names the file and the remedy.
    """
    if name not in DEFAULT_SIZE:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DEFAULT_SIZE)}")
    if augment not in ("eval", "train") or others not in ("ignore", "background"):
        raise ValueError(f'augment is "eval" or "train", others "ignore" or "background"; not {augment!r}, {others!r}')
    root = Path(root)
    if name == "toy":
        make_toy(root, toy_seed, counts)
        if split in ("train", "val", "tune"):
            split = root / "ImageSets" / f"{split}.txt"
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the {name} data set as its root")
    if name == "coco":
        if class_map is not None or others != "ignore":
            raise ValueError("class_map and others are for KITTI's layout: with COCO's, edit the annotation file")
        records = read_coco(root, split, limit, check)
    else:
        records = read_kitti(root, split, limit, class_map, others, check)
    split = Path(split).stem if isinstance(split, Path) else split
    return Dataset(name, records, split, augment, DEFAULT_SIZE[name] if size is None else tuple(size), seed,
                   name == "toy" if cache is None else cache)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------

def one_line(error):
    return " ".join(str(error).split())[:160]


def image_size(path, whole=True):
    """(height, width) from the header, without decoding; `whole` also looks for the end marker. Raises BrokenImage."""
    try:
        with Image.open(path) as image:
            width, height, kind = *image.size, image.format
        if whole and kind in ("PNG", "JPEG"):
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - 2048))     # some writers add bytes behind the end marker
                if (b"IEND\xaeB`\x82" if kind == "PNG" else b"\xff\xd9") not in file.read():
                    raise ValueError(f"the {kind} end marker is missing, so the file is cut off")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; complete the data set, or list the ids that you have in a "
                                "file and give its path as the split") from None
    except Exception as error:
        raise BrokenImage(f"{path}: not a whole image ({one_line(error)}); copy or download it again") from error
    return height, width


def image_sizes(paths, whole):
    with ThreadPoolExecutor(8) as pool:
        sizes = pool.map(partial(image_size, whole=whole), paths)
        return list(tqdm(sizes, "checking images", len(paths), leave=False, disable=len(paths) < 5000))


def listed_ids(path):
    """The ids of a split file, in its order: one a line; blank lines and lines that start with # do not count."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        raise FileNotFoundError(f"split {str(path)!r} is neither train, val nor all, nor a text file with one image id "
                                "a line") from None
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split() and not line.startswith("#")))


def ranked(ids):
    """The ids in the order of their sha256: no random generator, so it holds for ever."""
    return sorted(ids, key=lambda one: hashlib.sha256(f"clockdistill-kitti-{one}".encode()).digest())


def split_ids(ids):
    """(train, val): the first fifth of the `ranked` ids is val."""
    held_out = set(ranked(ids)[:max(1, round(len(ids) / 5)) if len(ids) > 1 else 0])
    return sorted(set(ids) - held_out), sorted(held_out)


def tune_ids(ids, count=90):
    """(train, tune, val): as `split_ids`, and the next `count` of the `ranked` ids are tune."""
    rest, val = split_ids(ids)
    return sorted(ranked(rest)[count:]), sorted(ranked(rest)[:count]), val


def write_splits(folder=Path(__file__).resolve().parent / "splits"):
    """Write KITTI's 80/20 split, 5,985 and 1,496 ids, to the files that other tools can read (and a test compares)."""
    for name, ids in zip(("train", "val"), split_ids(KITTI_IDS)):
        (folder / f"kitti_{name}.txt").write_text("\n".join(ids) + "\n")


def class_mapping(class_map):
    """-> ({type: label, or -1 to ignore it}, classes), for the forms that the top of this file lists."""
    if class_map is None or class_map in list(CLASS_MAPS):
        class_map = CLASS_MAPS[class_map or "kitti3"]
    elif not isinstance(class_map, dict):
        names = class_map.split(",") if isinstance(class_map, str) else class_map
        class_map = {name.strip(): name.strip() for name in names if name.strip()}
    classes = list(dict.fromkeys(name for name in class_map.values() if name is not None))
    if not classes:
        raise ValueError(f"class_map names no class: use {', '.join(CLASS_MAPS)}, or your own as Car,Dog")
    labels = {name: -1 for name in KITTI_TYPES}
    labels.update({name: -1 if to is None else classes.index(to) for name, to in class_map.items()})
    return labels | {"DontCare": -1}, classes


def read_kitti(root, split, limit, class_map, others, check):
    """KITTI's layout -> Records. The arguments are those of `build`."""
    images, labels = root / "training" / "image_2", root / "training" / "label_2"
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; KITTI's layout is ROOT/training/image_2 and label_2")
    found = {p.stem: p for p in sorted(images.iterdir()) if p.suffix.lower() in (".png", ".jpg", ".jpeg")}
    if not found:
        raise FileNotFoundError(f"{images}: no .png or .jpg image in it; unpack the data set's images here")
    if split == "all":
        wanted = list(found)
    elif split in ("train", "val"):
        wanted = split_ids(KITTI_IDS if set(found) <= set(KITTI_IDS) else found)[split == "val"]
    else:
        wanted = listed_ids(split)
    mapping, classes = class_mapping(class_map)
    records = Records(classes, list(range(1, len(classes) + 1)))
    stems = sorted(stem for stem in wanted if stem in found)
    records.problems["listed ids not in the folder"] = len(wanted) - len(stems)
    if split == "all":
        records.problems["label files without image"] = sum(p.stem not in found for p in labels.glob("*.txt"))
    if not stems:
        raise ValueError(f"{images}: none of the {len(wanted)} ids of split {str(split)!r} is in it; use split all, or "
                         "the path of a file that lists ids of this folder")
    numbers = [int(stem) if stem.isdecimal() else -1 for stem in found]
    numbered = len(set(numbers)) == len(numbers) and min(numbers) >= 0
    ids = {stem: number if numbered else place for place, (stem, number) in enumerate(zip(found, numbers))}
    stems = stems[:limit]
    for stem, size in zip(stems, image_sizes([found[stem] for stem in stems], check)):
        rows = read_kitti_label(labels / f"{stem}.txt", mapping, others)
        records.add(found[stem], ids[stem], size, rows)
    return records


def read_kitti_label(path, mapping, others):
    """A label file -> rows for Records.add. Columns: type, truncated, occluded, alpha, x0 y0 x1 y1, 3D (7)[, score]."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no label file for this image; add it (empty means no objects), or list the "
                                "ids that have one in a file and give its path as the split") from None
    rows = []
    for number, line in enumerate(lines, 1):
        columns = line.split()
        if not columns:
            continue
        where = f"{path}, line {number}"
        if len(columns) not in (15, 16):
            raise ValueError(f"{where}: {len(columns)} columns instead of KITTI's 15; correct or remove the line")
        try:
            values = [float(word) for word in columns[1:]]
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}; correct or remove the line") from None
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{where}: a number is NaN or infinite; correct or remove the line")
        if columns[0] not in mapping:
            raise ValueError(f"{where}: unknown class {columns[0]!r}; name all your classes in class_map, as in "
                             f"Car,{columns[0]}")
        label = mapping[columns[0]]
        x0, y0, x1, y1 = values[3:7]
        if label >= 0 or others == "ignore" or columns[0] == "DontCare":
            rows.append((x0, y0, x1, y1, label, label < 0, math.nan))
    return rows


def coco_files(root, split):
    """The annotation file of "train" or "val" and the folders that may hold its images; None where there is none."""
    for name in {"train": ("train",), "val": ("val", "valid")}[split]:
        for file in (f"annotations/instances_{name}2017.json", f"annotations/instances_{name}.json",
                     f"annotations/{name}.json", f"{name}.json", f"{name}/_annotations.coco.json"):
            if (root / file).is_file():
                folders = (f"{name}2017", name, f"images/{name}2017", f"images/{name}", "images", ".")
                return root / file, [root / folder for folder in folders]
    return None


def read_coco(root, split, limit, check):
    """COCO's layout -> Records. The arguments are those of `build`."""
    parts = (split,) if split in ("train", "val") else ("train", "val")
    files = [file for part in parts if (file := coco_files(root, part))]
    if not files:
        raise FileNotFoundError(f"{root}: no annotations/instances_{parts[0]}2017.json nor {parts[0]}.json in it; put "
                                "the COCO-format annotation file there")
    wanted = None
    if split not in ("train", "val", "all"):
        wanted = {int(one) if one.isdecimal() else one for one in listed_ids(split)}
    records, seen = None, set()
    for path, folders in files:
        data = load_coco_json(path)
        names = {one["id"]: one["name"] for one in sorted(data["categories"], key=lambda one: one["id"])}
        if records is None:
            records = Records(list(names.values()), list(names))
        elif list(names) != records.category_ids:
            raise ValueError(f"{path}: its categories differ from those of {files[0][0]}; use one split at a time")
        rows = coco_rows(path, data, {one: label for label, one in enumerate(names)})
        images = sorted(data["images"], key=lambda one: one["id"])
        if wanted is not None:
            images = [one for one in images if one["id"] in wanted]
        folder = next((f for f in folders if any((f / one["file_name"]).is_file() for one in images[:50])), folders[0])
        if wanted is not None:
            images = [one for one in images if (folder / one["file_name"]).is_file()]
        if clash := seen & {one["id"] for one in images}:
            raise ValueError(f"{path}: image id {min(clash)} is also in {files[0][0]}; use one split at a time")
        seen |= {one["id"] for one in images}
        images = images[:None if limit is None else limit - len(records.ids)]
        sizes = image_sizes([folder / one["file_name"] for one in images], True) if check else [None] * len(images)
        for one, size in zip(images, sizes):
            stated = (one["height"], one["width"])
            if size not in (None, stated):
                raise ValueError(f"{folder / one['file_name']}: the file is {size[1]}x{size[0]} pixels but {path} says "
                                 f"{stated[1]}x{stated[0]}; its boxes would be wrong: restore the image or the JSON")
            records.add(folder / one["file_name"], one["id"], stated, rows.get(one["id"], []))
    if wanted is not None:
        records.problems["listed ids not in the folder"] = len(wanted) - len(seen)
    if not records.ids:
        raise ValueError(f"{root}: no image of split {str(split)!r} in it; use another split, or complete the folder")
    return records


def load_coco_json(path):
    """Parse and check the lists of a COCO annotation file. Raises ValueError with one line."""
    try:
        data = json.loads(Path(path).read_bytes())
        for kind, keys in {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"),
                           "annotations": ("id", "image_id", "category_id", "bbox")}.items():
            for place, one in enumerate(data[kind]):
                if missing := [key for key in keys if key not in one]:
                    raise ValueError(f"{kind}[{place}] has no {missing[0]!r}")
                if not isinstance(one["id"], int):
                    raise ValueError(f"the id of {kind}[{place}] is no whole number")
    except KeyError as error:
        raise ValueError(f"{path}: no list {error} in it; want a COCO detection file with images, annotations and "
                         "categories") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a COCO annotation file ({one_line(error)}); correct or replace it") from error
    for kind in ("images", "categories", "annotations"):
        twice = [one for one, n in Counter(one["id"] for one in data[kind]).items() if n > 1]
        if twice:
            raise ValueError(f"{path}: {kind} id {twice[0]} is there twice; make the ids unique")
    return data


def coco_rows(path, data, labels):
    """{image id: rows for Records.add}; labels: {category id: label}. Raises ValueError naming the annotation."""
    images, rows = {one["id"] for one in data["images"]}, {}
    for one in data["annotations"]:
        where = f"{path}: annotation {one['id']}"
        if one["image_id"] not in images:
            raise ValueError(f"{where} is of image {one['image_id']}, not in 'images'; add or remove it")
        if one["category_id"] not in labels:
            raise ValueError(f"{where} is of category {one['category_id']}, not in 'categories'; add or remove it")
        try:
            x, y, w, h = map(float, one["bbox"])
        except (TypeError, ValueError):
            raise ValueError(f"{where} has the box {one['bbox']}; want four numbers [x, y, width, height]") from None
        if not all(map(math.isfinite, (x, y, w, h))):
            raise ValueError(f"{where} has the box {one['bbox']}, with a NaN or infinity; correct or remove it")
        label, area = labels[one["category_id"]], one.get("area", math.nan)
        row = (x, y, x + w, y + h, label, one.get("iscrowd", 0), area)
        rows.setdefault(one["image_id"], []).append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: torchvision's v2 functions on a uint8 image (3, H, W) and its BoundingBoxes, with the item's own rng
# ---------------------------------------------------------------------------------------------------------------------

def transform(image, boxes, recipe, size, rng):
    """recipe "eval": resize.  "kitti": flip, resize (the authors' earlier set-up).  "toy": flip, colours, any resize.

    "coco" is DETR's: flip; then, half the time each, a resize of the short side to one of 480, 512, .., 800, or a
    resize to 400, 500 or 600, a random crop of 384..600 pixels a side, and such a resize.  When `size` is (short,
    longest), all of these numbers are times short/800.  Boxes stay glued to their pixels; one that a crop cuts away
    entirely comes back without area.
    """
    if recipe != "eval" and rng.random() < 0.5:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    if recipe == "toy":
        for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
            image = adjust(image, rng.uniform(0.7, 1.3))
    if size is None:
        return image, boxes
    short, longest = size
    if recipe == "coco":
        unit = short / 800
        if rng.random() < 0.5:
            image, boxes = resize(image, boxes, round(rng.choice((400, 500, 600)) * unit))
            # Side lengths first, then the corner, as in DETR; an image smaller than the least crop stays whole.
            height, width = (min(side, rng.randint(min(round(384 * unit), side), min(round(600 * unit), side)))
                             for side in image.shape[1:])
            top, left = rng.randint(0, image.shape[1] - height), rng.randint(0, image.shape[2] - width)
            image, boxes = F.crop(image, top, left, height, width), F.crop(boxes, top, left, height, width)
            boxes = F.clamp_bounding_boxes(boxes)
        short = round(rng.choice(range(480, 801, 32)) * unit)
    return resize(image, boxes, short, longest)


def resize(image, boxes, short, longest=None):
    """Scale so that the short side is `short`, or less if the long side would pass `longest`; rounded as in DETR."""
    height, width = image.shape[1:]
    low, high = min(height, width), max(height, width)
    if longest is not None and high / low * short > longest:
        short = round(longest * low / high)
    if short == low:
        return image, boxes
    size = [short, int(short * width / height)] if height <= width else [int(short * height / width), short]
    return F.resize(image, size, antialias=True), F.resize(boxes, size)


def normalise(image):
    """(3, H, W) uint8 -> float, so that ImageNet has mean 0 and deviation 1 in each channel."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return image.float().sub_(mean).div_(std)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------------------

class Steps:
    """Which items make up each step: a function of (seed, step), whatever the workers and wherever a run starts.

    One endless row of epochs, each a permutation of the data set, is cut into global batches of batch_size * world; of
    each, this rank takes every world-th item. A batch may straddle epochs, or hold several of a tiny data set.
    """

    def __init__(self, length, batch_size, steps, start, seed, rank, world):
        self.length, self.batch_size, self.steps, self.start = length, batch_size, steps, start
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self):
        return max(0, self.steps - self.start)

    def __iter__(self):
        @lru_cache(maxsize=2)
        def order(epoch):
            # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
            number = int.from_bytes(hashlib.sha256(f"{self.seed}, {epoch}".encode()).digest()[:7], "big")
            return torch.randperm(self.length, generator=torch.Generator().manual_seed(number))

        for step in range(self.start, self.steps):
            first = step * self.batch_size * self.world
            places = range(first + self.rank, first + self.batch_size * self.world, self.world)
            yield [(epoch, int(order(epoch)[place])) for epoch, place in (divmod(p, self.length) for p in places)]


def loader(dataset, batch_size, *, steps, start=0, seed=0, workers=0, rank=0, world=1):
    """Batches of training steps start..steps-1 (see Steps). batch_size is this rank's; workers are processes."""
    return serve(dataset, Steps(len(dataset), batch_size, steps, start, seed, rank, world), workers)


def eval_loader(dataset, batch_size, workers=0, rank=0, world=1):
    """Each image once, in order; rank r of `world` takes every world-th, from the r-th on."""
    mine = range(rank, len(dataset), world)
    return serve(dataset, [list(mine[first:first + batch_size]) for first in range(0, len(mine), batch_size)], workers)


def serve(dataset, batches, workers):
    # A generator of its own: otherwise each pass draws from the global one, and a resumed run would differ.
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, worker_init_fn=apart,
                      pin_memory=torch.cuda.is_available(), generator=torch.Generator())


def apart(worker):
    """Ctrl-C, `timeout` and torchrun signal a whole process group: that is for the parent, which ends us."""
    if hasattr(os, "setpgrp"):                                       # not on Windows
        os.setpgrp()


# ---------------------------------------------------------------------------------------------------------------------
# The toy KITTI, and evaluation
# ---------------------------------------------------------------------------------------------------------------------

def make_toy(root, seed=0, counts=None, workers=2):
    """Draw the procedural toy KITTI into `root`, unless it is there: see experiments/toy.py."""
    from experiments import toy
    toy.make(root, seed, counts, workers)


def coco_object(dataset, annotations):
    """A pycocotools COCO with the data set's images and categories. Ids from 1: COCOeval reads 0 as no match."""
    coco = COCO()
    coco.dataset = {"images": [{"id": one, "height": h, "width": w} for one, (h, w) in zip(dataset.ids, dataset.sizes)],
                    "categories": [{"id": i, "name": n} for i, n in zip(dataset.category_ids, dataset.classes)],
                    "annotations": [one | {"id": number} for number, one in enumerate(annotations, 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_finite(found, what):
    """Raises FloatingPointError when detections, {"scores", "boxes"}, are not finite. what: "image 7", for its line."""
    if not (found["scores"].isfinite().all() and found["boxes"].isfinite().all()):
        raise FloatingPointError(f"{what}: the model's detections are not finite: its weights are broken, or the "
                                 "precision is too low for it")


def evaluate(predictions, dataset):
    """COCO's box AP, by pycocotools, silently.

    predictions: one dict an image: image_id (int), scores (N,), labels (N,) 0..C-1, boxes (N, 4) as (x0, y0, x1, y1) in
        original pixels. An image without one counts as without detections. The best 100 an image count, as in COCO.
    Returns AP, AP50, AP75; APs, APm, APl (areas below 32^2, to 96^2, above, in original pixels); per_class {name: {AP,
        AP50}}: fractions 0..1, NaN where there is no object to find. Detections on ignored regions count neither way.
    Raises ValueError for an image twice or not in the data set, and for a label that is no class; FloatingPointError
    for scores or boxes that are not finite: pycocotools takes a box of NaN for a perfect hit.
    """
    annotations, seen, known = [], set(), set(dataset.ids)
    for one in predictions:
        image_id = int(one["image_id"])
        if image_id in seen or image_id not in known:
            why = "there twice" if image_id in seen else "not in the data set"
            raise ValueError(f"predictions: image {image_id} is {why}; give each image of the data set once")
        seen.add(image_id)
        check_finite(one, f"image {image_id}")
        scores, labels = one["scores"].tolist(), one["labels"].tolist()
        if labels and not 0 <= min(labels) <= max(labels) < len(dataset.classes):
            raise ValueError(f"predictions: image {image_id} has a label outside 0..{len(dataset.classes) - 1}")
        for score, label, (x0, y0, x1, y1) in zip(scores, labels, one["boxes"].double().tolist()):
            annotations.append({"image_id": image_id, "category_id": dataset.category_ids[label], "score": score,
                                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(dataset.coco, coco_object(dataset, annotations), "bbox")
        judge.params.maxDets = [100]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][..., 0]                     # (10 IoUs, 101 recalls, C, 4 areas), -1: no object

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else math.nan

    result = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    result |= {name: mean(precision[..., area]) for area, name in enumerate(("APs", "APm", "APl"), 1)}
    result["per_class"] = {name: {"AP": mean(precision[:, :, c, 0]), "AP50": mean(precision[0, :, c, 0])}
                           for c, name in enumerate(dataset.classes)}
    return result
