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
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageDraw
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
    os.setpgrp()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# The toy KITTI: writing it
# ---------------------------------------------------------------------------------------------------------------------

TOY_COUNTS = {"train": 4000, "val": 500, "tune": 500}
TOY_FIRST = {"train": 0, "val": 100_000, "tune": 200_000}          # first image number of each split
TOY_VERSION = 1                                                     # of the drawing: another one, another data set


def make_toy(root, seed=0, counts=None, workers=2):
    """Draw the toy into `root`, in KITTI's layout, unless it is there; go on where an interrupted run stopped.

    counts: {split: images}; None: what is there, or TOY_COUNTS. Image n of a split depends on (seed, split, n) only, so
        a smaller toy holds the first images of a larger one. workers: processes; they change no byte.
    root/toy.json, written last, says what the folder holds. Raises ValueError where that is not what is asked for.
    """
    root = Path(root)
    done, begun = root / "toy.json", root / "toy.json.part"
    marker = done if done.exists() else begun
    found = json.loads(marker.read_text()) if marker.exists() else None
    facts = {"version": TOY_VERSION, "seed": seed, "counts": dict(counts or (found or {}).get("counts") or TOY_COUNTS)}
    if found not in (None, facts):
        raise ValueError(f"{marker}: the folder holds a toy of {found}, not {facts}; delete it or choose another root")
    if done.exists():
        return
    if found is None and root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root}: not empty and not a toy; give an empty or new folder as the toy's root")
    for folder in ("training/image_2", "training/label_2", "ImageSets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(facts))
    numbers = {split: range(TOY_FIRST[split], TOY_FIRST[split] + count) for split, count in facts["counts"].items()}
    missing = [n for split in numbers.values() for n in split if not (root / f"training/image_2/{n:06d}.png").exists()]
    chunks = [missing[first:first + 25] for first in range(0, len(missing), 25)]
    with tqdm(total=len(missing), desc="drawing the toy KITTI", unit="image", disable=len(missing) < 100) as bar:
        if workers > 1 and len(chunks) > 1:
            # Ctrl-C is for the parent alone: the workers end their chunk in silence, and the next call goes on there.
            deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
            with ProcessPoolExecutor(workers, **deaf) as pool:
                for written in pool.map(partial(write_toy, root, seed), chunks):
                    bar.update(written)
        else:
            for chunk in chunks:
                bar.update(write_toy(root, seed, chunk))
    for split, members in numbers.items():
        (root / "ImageSets" / f"{split}.txt").write_text("".join(f"{n:06d}\n" for n in members))
    os.replace(begun, done)


def write_toy(root, seed, numbers):
    """Draw some images. The PNG appears last and at once, so that a PNG means a finished image."""
    for number in numbers:
        image, lines = toy_image(seed, number)
        (root / "training" / "label_2" / f"{number:06d}.txt").write_text("".join(line + "\n" for line in lines))
        final = root / "training" / "image_2" / f"{number:06d}.png"
        half = final.with_suffix(f".{os.getpid()}.part")
        image.save(half, format="PNG", compress_level=1)
        os.replace(half, final)
    return len(numbers)


# ---------------------------------------------------------------------------------------------------------------------
# The toy KITTI: drawing it
# ---------------------------------------------------------------------------------------------------------------------

TOY_WIDTH, TOY_HEIGHT = 160, 48                                     # pixels
FOCAL, CAMERA = 93.0, 1.65                                          # pixels (KITTI: 721 of 1242), metres above the road
MOODS = {                                                           # light, colours of far air and sky, metres of sight
    "day": ((1.08, 1.05, 1.0), (196, 212, 228), (92, 148, 214), 140),
    "grey": ((.82, .86, .9), (176, 182, 188), (150, 158, 168), 90),
    "dusk": ((.9, .76, .68), (208, 166, 142), (96, 104, 158), 120),
    "night": ((.42, .46, .6), (44, 50, 76), (14, 18, 40), 80),
    "fog": ((.82, .85, .87), (190, 196, 200), (178, 186, 192), 26)}
OFTEN = ["day"] * 9 + ["grey"] * 4 + ["dusk"] * 3 + ["night"] * 2 + ["fog"] * 2
SKINS = [(228, 188, 160), (205, 160, 128), (160, 112, 82), (108, 74, 56)]
HAIR = [(40, 30, 24), (84, 56, 34), (176, 142, 84), (120, 116, 112), (24, 22, 22)]
CLOTHES = [(178, 42, 40), (38, 62, 128), (40, 40, 44), (222, 220, 214), (52, 104, 66), (206, 160, 54), (120, 84, 60),
           (118, 128, 140), (138, 62, 110), (224, 118, 46), (84, 140, 176)]
PAINTS = [(196, 30, 34), (28, 56, 120), (34, 35, 38), (232, 232, 230), (150, 154, 160), (96, 100, 106), (44, 86, 70),
          (188, 168, 132), (214, 150, 40), (94, 30, 44), (104, 150, 190)]
WALLS = [(172, 120, 96), (190, 174, 146), (146, 142, 140), (204, 196, 184), (128, 92, 78), (150, 160, 168),
         (196, 160, 110)]
LEAVES = [(58, 98, 50), (80, 108, 52), (120, 104, 48), (48, 82, 58)]
GLASS, TYRE = (58, 70, 84), (22, 22, 24)


def shade(rgb, factor):
    return tuple(channel * factor for channel in rgb)


class Scene:
    """What the camera sees, on two canvases of twice the final size: `picture`, and `owner`, the number of the object
    that each pixel shows, from which boxes and occlusion are read."""

    def __init__(self, rng):
        self.rng = rng
        self.width, self.height = 2 * TOY_WIDTH, 2 * TOY_HEIGHT
        self.picture, self.owner = (Image.new(mode, (self.width, self.height)) for mode in ("RGB", "L"))
        self.pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.owner)
        self.vanish = 2 * self.between(62, 98), 2 * self.between(14.5, 18.5)         # where the road meets the horizon
        self.mood = self.pick(OFTEN)
        light, self.air, self.sky, sight = MOODS[self.mood]
        self.light, self.sight = shade(light, self.between(.88, 1.12)), sight * self.between(.8, 1.25)
        self.road = self.pick([(96, 97, 100), (84, 85, 90), (112, 108, 104)])

    def between(self, low, high):
        return low + (high - low) * self.rng.random()

    def pick(self, choices):
        return choices[int(self.rng.random() * len(choices))]

    def colour(self, rgb, z, glow=False):
        """What is left of a colour in this light, z metres away; what glows needs no light."""
        clear = math.exp(-z / self.sight)
        (r, g, b), (lr, lg, lb), (ar, ag, ab) = rgb, (1, 1, 1) if glow else self.light, self.air
        haze = 1 - clear
        return (min(255, int(r * lr * clear + ar * haze)), min(255, int(g * lg * clear + ag * haze)),
                min(255, int(b * lb * clear + ab * haze)))


class Thing:
    """Draws around a foot on the road, x metres right of the camera, z ahead. Points: (right, up[, further]) in metres.

    number: the object's in `scene.owner`; 0 for clutter, which hides objects too; None for the backdrop.
    """

    def __init__(self, scene, x=0.0, z=0.0, number=None, flip=1):
        self.s, self.x, self.z, self.number, self.flip = scene, x, z, number, flip
        self.corners = []                                           # canvas points drawn, also beyond the border

    def at(self, u, v, d=0.0):
        scale = 2 * FOCAL / (self.z + d)                            # canvas pixels a metre
        return self.s.vanish[0] + scale * (self.x + self.flip * u), self.s.vanish[1] + scale * (CAMERA - v)

    def draw(self, shape, points, rgb, d=0.0, glow=False, ink="fill", **how):
        self.corners += points
        getattr(self.s.pens[0], shape)(points, **{ink: self.s.colour(rgb, self.z + d, glow)}, **how)
        if self.number is not None:
            getattr(self.s.pens[1], shape)(points, **{ink: self.number}, **how)

    def poly(self, points, rgb, glow=False):
        self.draw("polygon", [self.at(*p) for p in points], rgb, points[0][2] if len(points[0]) > 2 else 0, glow)

    def box(self, u0, v0, u1, v1, rgb, glow=False):
        self.poly([(u0, v0), (u1, v0), (u1, v1), (u0, v1)], rgb, glow)

    def oval(self, u, v, ru, rv, rgb, **how):
        (x0, y0), (x1, y1) = self.at(u - ru, v + rv), self.at(u + ru, v - rv)
        self.draw("ellipse", [(min(x0, x1), y0), (max(x0, x1), y1)], rgb, **how)

    def line(self, points, thick, rgb):
        self.draw("line", [self.at(*p) for p in points], rgb, width=self.pixels(thick))

    def pixels(self, metres):
        return max(1, round(metres * 2 * FOCAL / self.z))

    def shadow(self, ru):
        (x0, y0), (x1, y1) = self.at(-ru, 0, .35), self.at(ru, 0, -.25)
        dark = self.s.colour(shade(self.s.road, .8 if self.s.mood in ("grey", "fog") else .62), self.z)
        self.s.pens[0].ellipse([(min(x0, x1), y0), (max(x0, x1), y1)], fill=dark)


def car_along(t, s):
    """A car along the road, going away (red lights) or coming (white); solid, so one flank shows in perspective."""
    away, paint = s.rng.random() < .55, s.pick(PAINTS)
    wide, roof, long = s.pick([(.86, 1.44, 4.1), (.84, 1.5, 3.7), (.94, 1.74, 4.4), (.88, 1.48, 4.5)])
    waist, top, slim = .62 * roof, roof - .03, wide * .82
    # Metres from the near end to where the glass starts and meets the roof: hatchback, boot, bonnet.
    first, last = s.pick([(.12, .7), (.55, 1.15)]) if away else (.95, 1.75)
    side = -math.copysign(1, t.x * t.flip)                          # the flank that the camera sees
    t.shadow(wide * 1.15)
    t.poly([(side * u, v, d) for u, v, d in (
        (wide, .22, 0), (wide, waist, 0), (wide, waist, first), (slim, top, last), (slim, top, long * .66),
        (wide, waist, long * .86), (wide, waist * .95, long), (wide, .22, long))], shade(paint, .72))
    t.poly([(side * u * wide, v, d) for u, v, d in (
        (.97, waist + .05, first + .35), (.86, top - .1, last + .15), (.86, top - .1, long * .62),
        (.97, waist + .05, long * .78))], GLASS)
    for d in (.75, long - .8):
        (x, y), (_, ground) = t.at(side * wide, .31, d), t.at(side * wide, 0, d)
        r = ground - y
        t.draw("ellipse", [(x - r * .32, y - r), (x + r * .32, y + r)], TYRE)
    t.poly([(-wide, waist, 0), (wide, waist, 0), (wide, waist, first), (-wide, waist, first)], shade(paint, 1.15))
    t.poly([(-wide, waist, first), (wide, waist, first), (slim, roof, last), (-slim, roof, last)], shade(paint, .95))
    t.poly([(-wide * .88, waist + .05, first), (wide * .88, waist + .05, first), (wide * .75, roof - .09, last),
            (-wide * .75, roof - .09, last)], s.pick([GLASS, GLASS, (120, 138, 154)]))
    for u in (-1, 1):
        t.box(u * wide * .92, 0, u * wide * .62, .32, TYRE)
    t.box(-wide, .24, wide, waist, paint)
    t.box(-wide, .22, wide, .4, shade(paint, .55))
    for u in (-1, 1):
        t.box(u * wide * .97, waist - .26, u * wide * .61, waist - .07, (214, 24, 24) if away else (250, 246, 216),
              glow=s.mood in ("night", "dusk"))
    t.box(-.26, .46, .26, .58, (226, 226, 206))
    if not away:
        t.box(-wide * .5, waist - .24, wide * .5, waist - .1, (26, 26, 28))


def car_across(t, s):
    """A crossing car's side, its nose towards u > 0."""
    paint, (long, roof) = s.pick(PAINTS), s.pick([(4.2, 1.44), (3.6, 1.5), (4.4, 1.7), (4.0, 1.46)])
    h, back, waist = long / 2, s.pick([.62, .9, .97]), .6 * roof    # saloon, hatchback, estate
    t.shadow(h * 1.04)
    t.poly([(-h, .3), (-h * .99, waist), (-h * back, waist + .05), (-h * (back - .2), roof), (h * .18, roof),
            (h * .5, waist + .04), (h * .92, waist - .06), (h, waist - .3), (h, .3), (h * .9, .2), (-h * .95, .2)],
           paint)
    t.poly([(-h, .3), (-h, .48), (h, .48), (h, .3), (h * .9, .2), (-h * .95, .2)], shade(paint, .68))
    t.poly([(-h * (back - .06), waist + .06), (-h * (back - .22), roof - .1), (-h * .14, roof - .1),
            (-h * .14, waist + .06)], GLASS)
    t.poly([(-h * .08, waist + .06), (-h * .08, roof - .1), (h * .15, roof - .1), (h * .42, waist + .06)], GLASS)
    for u in (-.6 * h, .62 * h):
        t.oval(u, .32, .33, .32, TYRE)
        t.oval(u, .32, .16, .16, (150, 152, 156))
    t.box(h * .9, waist - .26, h, waist - .1, (250, 244, 205), glow=s.mood == "night")
    t.box(-h, waist - .22, -h * .93, waist - .04, (200, 26, 26), glow=s.mood == "night")


def car(t, s):
    (car_across if s.rng.random() < .36 else car_along)(t, s)


def head(t, s, u, v, hats):
    t.oval(u, v, .115, .14, s.pick(SKINS))
    t.poly([(u - .125, v + .01), (u - .1, v + .13), (u, v + .17), (u + .1, v + .13), (u + .125, v + .03)], s.pick(hats))


def pedestrian(t, s):
    k, legs, coat = s.between(.89, 1.08), s.pick(CLOTHES), s.pick(CLOTHES)       # k: size beside 1.75 m
    stride, wide, hem = s.between(-.3, .3), s.between(.19, .25), s.pick([.8, .8, .55]) * k
    t.shadow(.34)
    if s.rng.random() < .25:
        t.poly([(-.14, .9 * k), (-.34, .95 * k), (-.34, 1.38 * k), (-.12, 1.42 * k)], s.pick(CLOTHES))      # rucksack
    for u, tone in ((stride, .8), (-stride, 1)):
        t.line([(.1 * u, .82 * k), (.45 * u, .44 * k), (u, .05)], .15, shade(legs, tone))
        t.box(u - .07, 0, u + .13, .08, (30, 28, 28))
    t.line([(wide - .03, 1.38 * k), (wide + .05, 1.1 * k), (wide - stride * .5, .85 * k)], .09, shade(coat, .75))
    t.poly([(-wide, 1.4 * k), (-wide * .6, 1.47 * k), (wide * .6, 1.47 * k), (wide, 1.4 * k), (wide * .95, hem),
            (-wide * .95, hem)], coat)
    t.line([(-wide + .03, 1.38 * k), (-wide - .04, 1.1 * k), (-wide + stride * .5, .85 * k)], .1, shade(coat, .85))
    head(t, s, .02, 1.58 * k, HAIR)


def bike_across(t, s):
    frame = s.pick(CLOTHES)
    for u in (-.53, .53):
        (x0, y0), (x1, y1) = t.at(u - .34, .68), t.at(u + .34, 0)
        t.draw("ellipse", [(min(x0, x1), y0), (max(x0, x1), y1)], TYRE, ink="outline", width=t.pixels(.07))
    t.line([(-.53, .34), (-.12, .34), (.4, .86), (-.2, .82), (-.53, .34)], .06, frame)
    t.line([(-.12, .34), (-.22, .92)], .06, frame)
    t.line([(.53, .34), (.38, 1.02), (.52, 1.06)], .06, shade(frame, .7))
    t.box(-.34, .9, -.1, .97, (28, 26, 26))


def bike_along(t, s):
    t.oval(0, .35, .06, .35, TYRE)
    t.line([(0, .4), (0, 1.0)], .07, s.pick(CLOTHES))
    t.line([(-.3, 1.02), (.3, 1.02)], .06, (60, 60, 62))


def cyclist_across(t, s):
    coat, legs, lean, turn = s.pick(CLOTHES), s.pick(CLOTHES), s.between(.1, .3), s.between(0, 2 * math.pi)
    pedal = .17 * math.cos(turn), .17 * math.sin(turn)
    t.shadow(.8)
    for sign, tone in ((-1, .72), (1, 1)):                          # far leg, bike, near leg
        u, v = sign * pedal[0], sign * pedal[1]
        t.line([(-.2, .95), (.2 + u * .6, .68 + v * .5), (-.1 + u, .34 + v)], .145, shade(legs, tone))
        if sign < 0:
            bike_across(t, s)
    t.poly([(-.34, .92), (-.06, .9), (lean + .16, 1.36), (lean + .02, 1.5), (lean - .14, 1.46), (-.32, 1.12)], coat)
    t.line([(lean, 1.36), (lean + .16, 1.12), (.46, 1.05)], .1, shade(coat, .8))
    head(t, s, lean + .1, 1.62, s.pick([HAIR, CLOTHES]))            # a helmet has any colour


def cyclist_along(t, s):
    coat, legs, turn = s.pick(CLOTHES), s.pick(CLOTHES), s.between(-.14, .14)
    t.shadow(.4)
    bike_along(t, s)
    for u, lift in ((-.13, turn), (.13, -turn)):
        t.line([(u * .8, .95), (u * 1.25, .62 + lift), (u, .28 + lift)], .14, legs)
        t.box(u - .06, .2 + lift, u + .06, .3 + lift, (28, 28, 28))
    t.poly([(-.2, .86), (.2, .86), (.25, 1.38), (.13, 1.48), (-.13, 1.48), (-.25, 1.38)], coat)
    for u in (-1, 1):
        t.line([(u * .22, 1.36), (u * .33, 1.16), (u * .29, 1.02)], .1, shade(coat, .8))
    head(t, s, 0, 1.6, s.pick([HAIR, CLOTHES]))


def cyclist(t, s):
    (cyclist_across if s.rng.random() < .55 else cyclist_along)(t, s)


def round_sign(t, s):                                               # a head on a thin body
    top, face = s.between(1.6, 2.2), s.pick([(200, 30, 34), (34, 74, 160), (236, 190, 50)])
    t.box(-.05, 0, .05, top, (128, 130, 132))
    t.oval(0, top, .3, .3, face)
    t.oval(0, top, .19, .19, s.pick([(236, 236, 232), face]))


def bin_(t, s):                                                     # a coat without a head
    body = s.pick([(52, 84, 58), (70, 74, 80), (150, 96, 40), (40, 60, 104)])
    t.shadow(.36)
    t.poly([(-.24, 0), (.24, 0), (.3, .95), (-.3, .95)], body)
    t.box(-.33, .93, .33, 1.05, shade(body, .7))


def kiosk(t, s):                                                    # a car without wheels
    wall, top, h = s.pick(PAINTS), s.between(1.6, 2.3), s.between(.8, 1.5)
    t.shadow(h * 1.1)
    t.box(-h, 0, h, top, wall)
    t.box(-h, 0, h, .3, shade(wall, .5))
    for u in (-.5 * h, .5 * h):
        t.box(u - .36 * h, .55 * top, u + .36 * h, .85 * top, GLASS)
    t.box(-h * 1.08, top, h * 1.08, top + .15, s.pick(CLOTHES))


def hydrant(t, s):
    body = s.pick([(186, 36, 32), (214, 170, 40), (110, 112, 114)])
    t.box(-.15, 0, .15, .7, body)
    t.oval(0, .7, .16, .16, body)
    t.box(-.26, .4, .26, .55, shade(body, .8))


def bush(t, s):
    for _ in range(5):
        t.oval(s.between(-.7, .7), s.between(.3, .8), s.between(.3, .6), s.between(.25, .45),
               shade(LEAVES[0], s.between(.75, 1.2)))


# Usual height and width in metres, to find room; the drawing decides the box.
OBJECTS = {"Car": (car, 1.5, 2.6), "Pedestrian": (pedestrian, 1.74, .6), "Cyclist": (cyclist, 1.76, 1.0)}
CLUTTER = [round_sign, round_sign, bin_, kiosk, hydrant, bike_across, bike_across, bike_along, bush]


def backdrop(s):
    """Sky, clouds, hills, ground, the road with its marks, and a street on either side."""
    pen, horizon, world = s.pens[0], s.vanish[1], Thing(s)
    for y in range(0, int(horizon) + 2, 2):
        f = y / horizon
        pen.rectangle([0, y, s.width, y + 1], fill=tuple(int(a * (1 - f) + b * f) for a, b in zip(s.sky, s.air)))
    for _ in range(0 if s.mood in ("night", "fog") else int(s.between(0, 5))):
        x, y = s.between(0, s.width), s.between(0, horizon * .7)
        for _ in range(4):
            u, r = x + s.between(-18, 18), s.between(2, 5)
            white = tuple(int(146 * min(1, s.light[1]) + .4 * a) for a in s.air)
            pen.ellipse([u - 2 * r, y - r, u + 2 * r, y + r * .8], fill=white)
    pen.polygon([(0, horizon + 2), *((x, horizon - s.between(1, 12)) for x in range(0, s.width + 1, 32)),
                 (s.width, horizon + 2)], fill=s.colour((84, 108, 92), 90))
    grass = s.pick([(96, 122, 66), (110, 112, 70), (128, 122, 112)])
    left, right, walk = -s.between(3.2, 6.5), s.between(3.2, 6.5), s.between(1.6, 3.2)

    def strip(x0, x1, z0, z1, rgb):
        world.poly([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], rgb)

    for near, far in ((2.5, 5), (5, 9), (9, 16), (16, 30), (30, 60), (60, 300)):      # in bands, each with its own haze
        strip(-400, 400, near, far, grass)
        strip(left - walk, right + walk, near, far, (154, 150, 144))
        strip(left - .2, right + .2, near, far, (190, 188, 182))
        strip(left, right, near, far, s.road)
    middle, phase = (left + right) / 2 + s.between(-.5, .5), s.between(3.2, 9.2)
    for i in range(9):
        strip(middle - .08, middle + .08, phase + 6 * i, phase + 6 * i + 3, (226, 226, 220))
    if s.rng.random() < .2:                                         # a zebra crossing
        z = s.between(7, 16)
        for i in range(int(right - left)):
            strip(left + .3 + i, left + .8 + i, z, z + 2.2, (224, 224, 220))
    for side, edge in ((-1, left), (1, right)):
        street(s, world, side, edge + side * (walk + s.between(.3, 3)), s.between(.2, 1))


def street(s, world, side, x, built):
    """Houses (about a share `built`) and trees along x, from far to near."""
    slots, z = [], s.between(3, 8)
    while z < 70:
        slots.append((z, s.between(6, 14)))
        z += slots[-1][1] + s.between(0, 5)
    for z, length in reversed(slots):
        if s.rng.random() < built:
            wall, top, far, deep = s.pick(WALLS), s.between(4, 10), z + length, x + side * 10
            world.poly([(x, 0, z), (x, top, z), (deep, top, z), (deep, 0, z)], shade(wall, .8))
            world.poly([(x, 0, z), (x, top, z), (x, top, far), (x, 0, far)], wall)
            world.poly([(x, 0, z), (x, .8, z), (x, .8, far), (x, 0, far)], shade(wall, .75))
            for v in range(1, int(min(top - 1, 6)), 2) if z < 30 else ():
                for d in range(1, int(length - 1), 3):
                    lit = s.mood == "night" and s.rng.random() < .4
                    world.poly([(x, v + a, z + d + b) for a, b in ((.3, 0), (1.5, 0), (1.5, 1.3), (.3, 1.3))],
                               (236, 196, 110) if lit else (74, 84, 96), lit)
        else:
            for d in (length * .75, length * .25):
                tree, high = Thing(s, x + side * s.between(0, 1.5), z + d), s.between(2.2, 3.6)
                green = shade(s.pick(LEAVES), s.between(.85, 1.2))
                tree.box(-.14, 0, .14, high, (84, 66, 52))
                for i in range(7):
                    tree.oval(s.between(-1, 1), high + s.between(-.4, 1.9), s.between(.6, 1.1), s.between(.5, .9),
                              shade(green, .75 + .08 * i))


def toy_image(seed, number):
    """Scene `number` of a seed: a PIL image of 160x48 and its label lines. Depends on these two numbers only."""
    s = Scene(np.random.Generator(np.random.PCG64([seed, number])))
    backdrop(s)
    plan, taken = [], []                                            # what to draw; rough boxes (x0, y0, x1, y1, z)

    def place(kind, draw, tall, wide, pixels, beside=False):
        """Find room where `tall` metres are `pixels` high; give up after six places that hide too much."""
        z = FOCAL * tall / pixels
        for _ in range(6):
            column = s.between(3, TOY_WIDTH - 3)
            x = (column - s.vanish[0] / 2) * z / FOCAL
            half, foot = wide * pixels / tall / 2, s.vanish[1] / 2 + CAMERA * pixels / tall
            mine = (column - half, foot - pixels, column + half, foot, z)
            if (not beside or abs(x) > 2.5) and all(rough_cover(mine, other) < .38 for other in taken):
                taken.append(mine)
                plan.append((z, x, kind, draw, 1 if s.rng.random() < .5 else -1))
                return

    for _ in range(s.pick([1, 2, 3, 4, 5, 5, 6, 6, 7, 7])):
        kind = s.pick(["Car"] * 47 + ["Pedestrian"] * 29 + ["Cyclist"] * 24)
        place(kind, *OBJECTS[kind], 10.4 * (OBJECTS[kind][1] * 17.5 / 10.4) ** (s.rng.random() ** 1.35))
    for _ in range(s.pick([0, 0, 1, 1, 2, 3])):                     # too far to label
        kind = s.pick(["Car", "Car", "Pedestrian", "Cyclist"])
        place(kind, *OBJECTS[kind], s.between(4, 8.5))
    for _ in range(s.pick([1, 2, 3, 4, 5])):
        place(None, s.pick(CLUTTER), 1.6, .8, 9 * 2.8 ** s.rng.random(), beside=s.rng.random() < .8)
    drawn = []
    for count, (z, x, kind, draw, flip) in enumerate(sorted(plan, key=lambda item: -item[0]), 1):
        thing = Thing(s, x, z, count if kind else 0, flip)
        draw(thing, s)
        if kind:
            drawn.append((kind, thing.corners, np.asarray(s.owner) == count, count))         # before nearer things
    owner = np.asarray(s.owner)
    return develop(s), [label_line(kind, corners, mask, owner == n) for kind, corners, mask, n in drawn if mask.any()]


def rough_cover(a, b):
    """Share of the farther of two rough boxes that the nearer covers."""
    far, w, h = a if a[4] > b[4] else b, min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / ((far[2] - far[0]) * (far[3] - far[1]))


def label_line(kind, corners, mask, visible):
    """A line of KITTI's format, 3D columns unknown; what is too low, hidden or cut off to ask for is DontCare.

    mask: the object's pixels on the canvas, as if nothing stood in front; visible: those that the final picture shows.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = columns[0] / 2, rows[0] / 2, (columns[-1] + 1) / 2, (rows[-1] + 1) / 2
    xs, ys = zip(*corners)
    cut = max(0.0, 1 - (x1 - x0) * (y1 - y0) * 4 / ((max(xs) - min(xs)) * (max(ys) - min(ys))))
    hidden = 1 - visible.sum() / mask.sum()
    level = 0 if hidden < .05 else 1 if hidden < .25 else 2
    head = f"{kind} {cut:.2f} {level}" if y1 - y0 >= 10 and hidden <= .45 and cut <= .4 else "DontCare -1 -1"
    return f"{head} -10 {x0:.2f} {y0:.2f} {x1:.2f} {y1:.2f} -1 -1 -1 -1000 -1000 -1000 -10"


def develop(s):
    """Rain, then the canvas at half its size with the camera's contrast, brightness and noise."""
    if s.mood in ("grey", "fog") and s.rng.random() < .5:
        for _ in range(40):
            x, y, fall = s.between(0, s.width), s.between(0, s.height), s.between(4, 12)
            s.pens[0].line([x, y, x + fall * .2, y + fall], fill=s.air)
    pixels = np.asarray(s.picture.reduce(2), dtype=np.float32)      # (H, W, 3)
    pixels = (pixels - 110) * s.between(.85, 1.12) + 110 + s.between(-10, 12)
    pixels += s.rng.standard_normal(pixels.shape, dtype=np.float32) * s.between(1, 9 if s.mood == "night" else 6)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
