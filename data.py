"""Images in, batches out, average precision back: KITTI, COCO, and a toy KITTI that draws itself.

    dataset = build("kitti", root, "train", augment="train")    # or "coco", "toy"
    for batch in loader(dataset, 16, steps=1000):               # Batch(images, padding, targets)
        ...
    evaluate(predictions, build("kitti", root, "val"))          # {"AP": .., "per_class": {..}, ..}

An item is (image, target): image (3, H, W) float, ImageNet-normalised; target a dict of
    boxes      (K, 4) float, (cx, cy, w, h) as fractions of this image's own, unpadded size
    labels     (K,) long, 0..C-1, positions in `dataset.classes`
    ignore     (M, 4) float, as boxes: regions that are neither object nor background (DontCare,
               crowds)
    size, orig_size   (2,) long, (height, width) of the image as given and as stored
    image_id   int

Folders
-------
KITTI   root/training/image_2/*.png|jpg and root/training/label_2/*.txt, with the object benchmark's
        15 columns (a 16th, a score, is allowed and not read). image_id is int(stem), or the
        position in the folder if a stem is no number.
        "train" and "val" are 80 % and 20 % of the 7,481 ids, in splits/: of the ids sorted by
        sha256("clockdistill-kitti-ID"), the first 1,496 are val (`split_ids`). A folder with other
        ids is split by the same rule over its own. (Six digits up to 007480 are taken for KITTI's
        ids: give other names to pictures of your own.)
        splits/kitti_cyclists_{train,tune,val}.txt divide 991 of the ids, images with a cyclist,
        into 703, 90 and 198; tune holds the 90 that come next in that order. They are for
        experiments that choose settings before they look at val.
        Any other split is a text file with one id a line, given by its path. The 3,712/3,769 split
        that is common in 3D work is used this way: its ids follow no rule, but most KITTI toolkits
        hold them as ImageSets/train.txt and val.txt.
COCO    root/annotations/instances_{train,val}2017.json with images in root/{train,val}2017/.
        Your own, for split S (train, val or valid, test): annotations/instances_S.json,
        annotations/S.json, S.json or S/_annotations.coco.json; images in S2017/, S/, images/S2017/,
        images/S/, images/, root, or beside the JSON. These are the layouts of CVAT, Label Studio
        and Roboflow. An annotation file of any other name is used by giving its path as the split.
        Labels are the ranks of the file's category ids: COCO's official 1..90 with gaps become
        0..79; `dataset.category_ids` leads back.
toy     drawn on first use into KITTI's layout (`make_toy`), then read by the KITTI reader; splits
        train, val, tune.
"all" is everything in the folder (COCO: train and val together). VOC's and YOLO's files are not
read: export or convert them to COCO's layout first (CVAT, FiftyOne, Datumaro and Roboflow do that).

KITTI's types and `class_map`
-----------------------------
    kitti3          Car, Pedestrian, Cyclist; every other type ignored (default; the authors'
                    earlier code)
    kitti3_merged   the same three, Van -> Car, Person_sitting -> Pedestrian; every other ignored
    kitti8          all eight types
    "Car,Dog"       your own names, from a string or a list; KITTI's other types ignored, unknown
                    names refused
    {type: class}   full control; class None is ignored. Classes are numbered as they first appear.
DontCare is always ignored. "Ignored" means: an ignore region, where evaluation forgives detections
of every class. Converters of KITTI often mean "not written" by it, that is, background:
others="background" does that.

Bad input stops before a model is built, with one line that names the file and the remedy; what can
be handled is counted in `dataset.summary`. How AP here differs from KITTI's own: see `evaluate`.
"""
import contextlib
import hashlib
import json
import math
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, get_worker_info
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
KITTI_IDS = [f"{number:06d}" for number in range(7481)]
CLASS_MAPS = {
    "kitti3": ("Car", "Pedestrian", "Cyclist"),
    "kitti3_merged": {"Car": "Car", "Van": "Car", "Pedestrian": "Pedestrian",
                      "Person_sitting": "Pedestrian", "Cyclist": "Cyclist"},
    "kitti8": KITTI_TYPES,
}
# The layouts, each with its resize in pixels: (short side, longest side at most). A fourth has a
# line here, a reader like `read_kitti`, and a branch in `build`.
DEFAULT_SIZE = {"coco": (800, 1333), "kitti": (800, 1333), "toy": None}

# Limits of what is read, and of what COCO's AP counts.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS                 # 89 million: Pillow's own
MAX_ASPECT = 100                                    # long side over short side
MAX_BOXES = 10_000                                  # in one image
MAX_DETECTIONS = 100                                # per image and class: AP counts the best
PATIENCE = 600                                      # seconds to wait for a worker's batch


# ----------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """images (B, 3, H, W) float, normalised; padding (B, H, W) bool, True where padded; targets,
    one dict per image."""
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
        """The batch cut into `count` smaller ones, which differ by one image at most (fewer, when it
        has fewer images)."""
        total = len(self.targets)
        count = min(count, total)
        ends = [total * i // count for i in range(count + 1)]
        parts = [slice(start, end) for start, end in zip(ends, ends[1:])]
        return [Batch(self.images[p], self.padding[p], self.targets[p]) for p in parts]

    def _map(self, move):
        targets = [{key: move(value) if torch.is_tensor(value) else value
                    for key, value in target.items()} for target in self.targets]
        return Batch(move(self.images), move(self.padding), targets)

    def to(self, device):
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        return self._map(torch.Tensor.pin_memory)


def collate(items):
    """[(image, target), ...] -> Batch, padded with zeros (the mean colour) at the bottom and right.

    Convolutions at the border do see the padding, so a detector's scores move a little with its
    batch mates: make tables at batch size 1.
    """
    images, targets = zip(*items)
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    batch = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, image in enumerate(images):
        h, w = image.shape[1:]
        batch[row, :, :h, :w] = image
        padding[row, :h, :w] = False
    return Batch(batch, padding, list(targets))


# ----------------------------------------------------------------------------------------------
# The data set
# ----------------------------------------------------------------------------------------------

def build(name, root, split, *, augment="eval", size=None, limit=None, class_map=None,
          others="ignore", seed=0, check=True):
    """Open a data set, and check it: all that training and evaluation will need.

    name: "toy" | "kitti" | "coco", the layout.  root: its folder.
    split: "train" | "val" | "all" (toy also "tune", COCO also "test"), or the path of a text file
        with one image id a line (KITTI: stems; COCO: image ids), or, for COCO, of an annotation
        file, *.json.
    augment: "train" for that data set's training augmentation (`transform`), "eval" for none.
    size: (short side, longest side at most) of the resize in pixels; None: DEFAULT_SIZE.
    limit: use only the first so many images: of KITTI in the order of their names as text, of COCO
        in that of their ids.
    class_map, others: KITTI's types, see the top of this file.
    seed: of the augmentation.  check: False opens no image of COCO's layout.
    Raises FileNotFoundError or ValueError with one line that names the file and the remedy.
    """
    if name not in DEFAULT_SIZE:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DEFAULT_SIZE)} (files "
                         "of VOC or YOLO: convert them to COCO's layout)")
    if augment not in ("eval", "train") or others not in ("ignore", "background"):
        raise ValueError('augment is "eval" or "train", others "ignore" or "background"; not '
                         f"{augment!r}, {others!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the number of images to use, at least 1; not {limit}")
    size = DEFAULT_SIZE[name] if size is None else tuple(size)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size is (short side, longest side), at least 1 pixel each; not {size}")
    if name == "coco" and (class_map is not None or others != "ignore"):
        raise ValueError("class_map and others are for KITTI's layout: with COCO's, edit the "
                         "annotation file")
    root, ids = Path(root), split
    if name == "toy":
        make_toy(root)
        if split in ("train", "val", "tune"):
            ids = root / "ImageSets" / f"{split}.txt"
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the {name} "
                                "data set as its root")
    if name == "coco":
        records = read_coco(root, ids, limit, check)
    else:
        records = read_kitti(root, ids, limit, class_map, others)
    dataset = Dataset(name, split, *records, augment, size, seed)
    if len(dataset.boxes) and dataset.boxes[:, 2:].max() <= 1:
        raise ValueError(f"{root}: all boxes lie in the first pixel of their images, as fractions "
                         "of the image would; write them in pixels")
    return dataset


def make_toy(root, seed=0, counts=None, workers=2):
    """Draw the procedural toy KITTI into `root`, unless it is there: see experiments/toy.py."""
    from experiments import toy
    toy.make(root, seed, counts, workers)


class Dataset(torch.utils.data.Dataset):
    """Images with boxes. `dataset[index]`, or `dataset[epoch, index]` to augment by epoch.

    Augmentation draws from (seed, epoch, index) alone, so an item does not depend on workers,
    order, or a resumed run.
    images: one (path, id, (height, width), rows) each; rows: see `checked_boxes`.
    problems: Counter of what `summary` tells.
    Attributes
        name, classes, category_ids   of labels 0..C-1; category_ids are the official ones
        paths, ids, sizes             of the images; sizes are (height, width)
        boxes, labels, ignored, areas, metres
                                      of all N boxes, image after image; boxes (N, 4) are
                                      x0 y0 x1 y1 in pixels, label -1 is ignored for every class,
                                      metres are KITTI's distance
        starts                        image i has the boxes starts[i]:starts[i + 1]
        summary                       what a user must know, one line
        most_objects                  of one image
    """

    def __init__(self, name, split, classes, category_ids, images, problems, augment, size, seed):
        self.name, self.classes, self.category_ids = name, classes, category_ids
        self.augment, self.size, self.seed = augment, size, seed
        self.paths, self.ids, self.sizes, rows = map(list, zip(*images))
        self.cache = {}

        # All boxes in one tensor, not one small tensor per image: forked workers share it.
        table, owner = checked_boxes(name, self.paths, self.sizes, rows, problems)
        self.boxes, self.labels, self.ignored = table[:, :4], table[:, 4].long(), table[:, 5] > 0
        self.areas, self.metres = table[:, 6], table[:, 7]
        self.starts = torch.searchsorted(owner, torch.arange(len(images) + 1))

        objects = owner[~self.ignored].bincount(minlength=1)             # per image
        self.most_objects = int(objects.max())
        of_class = torch.stack([owner, self.labels])[:, ~self.ignored]   # (2, objects)
        (image, _), count = of_class.unique(dim=1, return_counts=True)
        crowded = f"images with more than the {MAX_DETECTIONS} objects of a class that AP counts"
        problems[crowded] = len(image[count > MAX_DETECTIONS].unique())
        facts = [f"{name} {split}: {len(images)} images, {self._describe()}"]
        facts += [f"{count} {problem}" for problem, count in sorted(problems.items()) if count]
        self.summary = "; ".join(facts)

    def _describe(self):
        """Objects per class, and what to know of them before hours of training."""
        ignored = int(self.ignored.sum())
        labels = self.labels[~self.ignored]
        if not len(labels):
            return f"NO OBJECTS, nothing to learn or to find, {ignored} ignored regions"
        counts = labels.bincount(minlength=len(self.classes)).tolist()
        most = Counter(dict(zip(self.classes, counts))).most_common()
        listed = [f"{name} {count}" for name, count in most if count]
        absent = [name for name, count in most if not count]
        text = (f"{len(labels)} objects ({first_few(listed)}), at most {self.most_objects} an "
                f"image, {ignored} ignored regions")
        if absent:
            text += f"; {len(absent)} classes without objects ({first_few(absent)})"
        return text

    @property
    def fingerprint(self):
        """A digest of ids, classes, sizes and boxes, for a run to tell whether its data changed."""
        content = json.dumps([self.ids, self.classes, self.sizes]).encode()
        table = torch.column_stack([self.boxes, self.labels, self.ignored, self.areas])
        for tensor in (table, self.starts):
            content += tensor.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    def __len__(self):
        return len(self.ids)

    def pixels(self, index):
        """The stored image as (3, H, W) uint8."""
        if index in self.cache:
            return self.cache[index]
        image = read_image(self.paths[index])
        # An image that was exchanged meanwhile would be misread.
        check_size(self.paths[index], tuple(image.shape[1:]), self.sizes[index])
        if self.name == "toy":                      # small enough to stay in each worker's memory
            self.cache[index] = image
        return image

    def _boxes(self, index):
        """An image's boxes (K, 4), labels (K,), and which of them are ignored (K,)."""
        own = slice(self.starts[index], self.starts[index + 1])
        return self.boxes[own].float(), self.labels[own], self.ignored[own]

    def raw(self, index):
        """(PIL image, target) as stored, for pictures: boxes are (x0, y0, x1, y1) in pixels."""
        index = range(len(self))[index]             # from the end when negative, or IndexError
        boxes, labels, ignored = self._boxes(index)
        target = {"boxes": boxes[~ignored], "labels": labels[~ignored], "ignore": boxes[ignored],
                  "image_id": self.ids[index]}
        return F.to_pil_image(self.pixels(index)), target

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]             # from the end when negative, or IndexError
        image, (boxes, labels, ignored) = self.pixels(index), self._boxes(index)
        stored = torch.tensor(image.shape[1:])

        # Objects and ignored regions move together with the pixels.
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[1:]))
        rng = random.Random(f"{self.seed}, {epoch}, {index}")
        recipe = self.name if self.augment == "train" else "eval"
        image, boxes = transform(image, boxes, recipe, self.size, rng)
        height, width = image.shape[1:]
        centred = box_convert(boxes.as_subclass(torch.Tensor), "xyxy", "cxcywh")
        fractions = centred / torch.tensor([width, height] * 2)

        # A crop leaves boxes beyond its border without area.
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = {"boxes": fractions[kept & ~ignored], "labels": labels[kept & ~ignored],
                  "ignore": fractions[kept & ignored], "image_id": self.ids[index],
                  "size": torch.tensor([height, width]), "orig_size": stored}
        return normalise(image), target

    @property
    def coco(self):
        """Ground truth in original pixels as a pycocotools COCO object.

        A region ignored for every class (KITTI's) is one crowd annotation per class, since COCOeval
        matches class by class; COCO's own crowds keep their class, as in the official evaluation.
        """
        annotations = []
        image_ids = torch.tensor(self.ids).repeat_interleave(self.starts.diff())     # (N,)
        boxes = box_convert(self.boxes, "xyxy", "xywh")
        columns = (image_ids, boxes, self.labels, self.ignored, self.areas)
        for image_id, box, label, ignored, area in zip(*(column.tolist() for column in columns)):
            categories = self.category_ids if label < 0 else [self.category_ids[label]]
            annotations += [
                {"image_id": image_id, "category_id": category, "bbox": box, "area": area,
                 "iscrowd": int(ignored)} for category in categories]
        return coco_object(self, annotations)


def checked_boxes(name, paths, sizes, rows, problems):
    """Clip all boxes to their images, drop those that hold nothing, and count both in `problems`.

    rows: per image a list of (x0, y0, x1, y1, label, ignored, area, metres).  label -1: ignored
        for every class.  area NaN: the box's.
    Returns the boxes that are left, (N, 8), and the position of each one's image, (N,).
    """
    lengths = [len(of_image) for of_image in rows]
    for path, length in zip(paths, lengths):
        if length > MAX_BOXES:
            raise ValueError(f"{shown(path)}: {length} boxes on one image, more than {MAX_BOXES}; "
                             "cut the image into tiles, or leave it out")
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))         # (N,)
    table = torch.tensor([row for of_image in rows for row in of_image], dtype=torch.float64)
    table = table.view(len(owner), 8)
    border = torch.tensor(sizes)[owner].flip(1)                          # (N, 2): width, height
    start, end = table[:, :2], table[:, 2:4]                             # (N, 2) each: x, y
    inside = table[:, :4].clamp(min=0).minimum(border.repeat(1, 2))      # (N, 4)
    left = inside[:, 2:] - inside[:, :2]                                 # (N, 2): width, height

    flat = (end <= start).any(1)
    kept = ~flat & (left > 0).all(1)
    moved = (inside - table[:, :4]).abs().amax(1) >= 1
    tiny = (left < 1).any(1) & (table[:, 5] == 0)
    counted = {"boxes without area dropped": flat,
               "boxes outside their image dropped": ~flat & ~kept,
               "boxes clipped to their image": kept & moved,
               "boxes under a pixel wide or high": kept & tiny}
    as_corners = (start >= 0) & (end - start > start) & (end - start <= border + 1)
    if name == "coco" and as_corners.all():
        counted["boxes pass the border, but all would fit as corners: COCO's boxes are "
                "[x, y, width, height], not [x0, y0, x1, y1]"] = (end > border + 1).any(1)
    problems.update({problem: int(boxes.sum()) for problem, boxes in counted.items()})

    table[:, :4] = inside
    table[:, 6] = torch.where(table[:, 6].isnan(), left.prod(1), table[:, 6])
    return table[kept], owner[kept]


def first_few(words):
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")


# ----------------------------------------------------------------------------------------------
# Reading KITTI's layout
# ----------------------------------------------------------------------------------------------

def read_kitti(root, split, limit, class_map, others):
    """KITTI's layout -> classes, category ids, images, problems, for Dataset.

    The arguments are those of `build`.
    """
    images, labels = root / "training" / "image_2", root / "training" / "label_2"
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; KITTI's layout is "
                                    "ROOT/training/image_2 and label_2")
    files = files_in(images, *IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{images}: no image in it; unpack the data set's images here")

    # The images of the split.
    problems = Counter()
    if split == "all":
        wanted = files
        problems["label files without image"] = len(files_in(labels, ".txt").keys() - files.keys())
    elif split in ("train", "val"):
        official = files.keys() <= set(KITTI_IDS)
        wanted = split_ids(KITTI_IDS if official else files)[split == "val"]
    else:
        wanted = listed_ids(split)
    stems = sorted(stem for stem in wanted if stem in files)
    problems["ids of the split not in the folder"] = len(wanted) - len(stems)
    if not stems:
        raise ValueError(f"{images}: none of the {len(wanted)} ids of split {str(split)!r} is in "
                         "it; use split all, or the path of a file that lists ids of this folder")

    # Ids are the files' own numbers, where all have a number, and a different one.
    numbers = {int(stem) for stem in files if stem.isdecimal()}
    numbered = len(numbers) == len(files) and max(numbers) < 2 ** 63
    ids = {stem: int(stem) if numbered else place for place, stem in enumerate(files)}

    mapping, classes = class_mapping(class_map, others)
    stems, records = stems[:limit], []
    headers = image_headers([files[stem] for stem in stems])
    for stem, (size, turned) in zip(stems, headers):
        check_size(files[stem], size, None, turned)
        rows = read_kitti_label(labels / f"{stem}.txt", mapping)
        records.append((str(files[stem]), ids[stem], size, rows))
    return classes, list(range(1, len(classes) + 1)), records, problems


def files_in(folder, *suffixes):
    """{stem: file}. Raises ValueError where two files have one stem."""
    files = {}
    for path in sorted(folder.iterdir()):
        # macOS leaves "._NAME" beside a file when it copies.
        if path.suffix.lower() not in suffixes or path.name.startswith("._"):
            continue
        if path.stem in files:
            raise ValueError(f"{path}: {files[path.stem].name} has the same id; keep one of them")
        files[path.stem] = path
    return files


def listed_ids(path):
    """The ids of a split file, in its order: one a line; blank lines and # lines do not count."""
    try:
        lines = read_lines(path)
    except OSError:
        raise FileNotFoundError(f"split {str(path)!r} is neither train, val nor all, nor a text "
                                "file with one image id a line") from None
    ids = [line.split()[0] for line in lines if line.split() and not line.startswith("#")]
    return list(dict.fromkeys(ids))


def split_ids(ids):
    """(train, val): the first fifth of the ids, in the order of their sha256, is val.

    No random generator, so it holds for ever.
    """
    ranked = sorted(ids, key=lambda i: hashlib.sha256(f"clockdistill-kitti-{i}".encode()).digest())
    count = max(1, round(len(ranked) / 5)) if len(ranked) > 1 else 0
    return sorted(ranked[count:]), sorted(ranked[:count])


def class_mapping(class_map, others):
    """-> ({type: label; -1: ignored; None: background}, classes), for the forms at the top."""
    if class_map is None:
        class_map = "kitti3"
    if isinstance(class_map, str):
        class_map = CLASS_MAPS.get(class_map, class_map.split(","))
    if not isinstance(class_map, dict):
        class_map = {name.strip(): name.strip() for name in class_map if name.strip()}
    classes = list(dict.fromkeys(name for name in class_map.values() if name is not None))
    if not classes:
        raise ValueError(f"class_map names no class: use {', '.join(CLASS_MAPS)}, or your own as "
                         "Car,Dog")
    rest = -1 if others == "ignore" else None
    labels = {kind: rest if name is None else classes.index(name)
              for kind, name in class_map.items()}
    return dict.fromkeys(KITTI_TYPES, rest) | labels | {"DontCare": -1}, classes


def read_kitti_label(path, mapping):
    """A label file -> rows for `checked_boxes`."""
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{shown(path)}: no label file for this image; add it (empty means no objects), or "
            "list the ids that have one in a file and give its path as the split") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = read_kitti_line(line.split(), mapping) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{shown(path)}, line {number}: {one_line(error)}; correct or remove "
                             "the line, join a class of two words") from None
        if row:
            rows.append(row)
    return rows


def read_kitti_line(columns, mapping):
    """The row of a label line, None for background.

    Columns: type, truncated, occluded, alpha, x0 y0 x1 y1, height width length and x y z in metres,
    rotation, and perhaps a score.
    """
    if len(columns) not in (15, 16):
        raise ValueError(f"{len(columns)} columns instead of KITTI's 15")
    kind, *words = columns
    values = [float(word) for word in words]
    if not all(map(math.isfinite, values)):
        raise ValueError("a number is NaN or infinite")

    # Columns are out of place after a class of two words, as in `Truck 2 0.00 0 ..`. Beside a
    # score, occlusion must be written as KITTI does, a whole number; truncation never is.
    truncated, occluded = values[:2]
    in_range = (truncated == -1 or 0 <= truncated <= 1) and occluded in (-1, 0, 1, 2, 3)
    if not in_range or len(columns) == 16 and "." in words[1]:
        raise ValueError(f"truncation {words[0]} or occlusion {words[1]} is out of KITTI's range, "
                         "0..1 and 0..3, or -1")
    if kind not in mapping:
        raise ValueError(f"unknown class {kind!r}; name all your classes in class_map, as in "
                         f"Car,{kind}")
    label = mapping[kind]
    return None if label is None else (*values[3:7], label, label < 0, math.nan, values[12])


# ----------------------------------------------------------------------------------------------
# Reading COCO's layout
# ----------------------------------------------------------------------------------------------

SPLIT_NAMES = {"train": ("train", "Train"), "val": ("val", "valid", "Val", "Valid"),
               "test": ("test", "Test")}
ANNOTATION_FILES = ("annotations/instances_{}2017.json", "annotations/instances_{}.json",
                    "annotations/{}.json", "{}.json", "{}/_annotations.coco.json")
IMAGE_FOLDERS = ("{}2017", "{}", "images/{}2017", "images/{}", "images", ".")


def read_coco(root, split, limit, check):
    """COCO's layout -> classes, category ids, images, problems, for Dataset.

    The arguments are those of `build`.
    """
    listed = expected = None
    if split not in ("all", *SPLIT_NAMES) and not str(split).endswith(".json"):
        listed = listed_ids(split)
        wanted = {int(word) for word in listed if word.isdecimal()}
    images, problems, files = {}, Counter(), coco_files(root, split)
    # Two files become one data set, so they must have the same classes and no image id in common.
    for path in files:
        content = read_coco_file(path)
        names = {category["id"]: category["name"] for category in content["categories"]}
        expected = expected or names
        if names != expected:
            differ = [f"{i} {name}" for i, name in sorted(names.items() ^ expected.items())]
            raise ValueError(f"{path}: its categories differ from those of {files[0]} "
                             f"({first_few(differ)}); use one split at a time")

        rows, chosen = coco_rows(path, content), content["images"]
        if listed is not None:
            chosen = [image for image in chosen if image["id"] in wanted]
        folder = image_folder(root, path, chosen, needed=listed is None)
        for image in chosen:
            file, image_id = folder / image["file_name"], image["id"]
            if listed is not None and not file.is_file():
                continue
            if image_id in images:
                raise ValueError(f"{path}: image id {image_id} is also in {files[0]}; use one "
                                 "split at a time")
            size = image["height"], image["width"]
            images[image_id] = str(file), image_id, size, rows[image_id]
    if listed is not None:
        problems["ids of the split not in the folder"] = len(listed) - len(images)
    if not images:
        raise ValueError(f"{root}: no image of split {str(split)!r} in it; use another split, or "
                         "complete the folder")

    images = list(images.values())[:limit]
    if check:
        headers = image_headers([file for file, *_ in images])
        for (file, _, stated, _), (size, turned) in zip(images, headers):
            check_size(file, size, stated, turned)
            problems["pictures turned upright by their EXIF tag"] += turned != 1
    return list(expected.values()), list(expected), images, problems


def coco_files(root, split):
    """The annotation files of a split: one, or those of train and val."""
    if str(split).endswith(".json"):
        parts = [[Path(split).absolute() if Path(split).is_file() else split]]
    else:
        parts = [[file.format(name) for name in SPLIT_NAMES[part] for file in ANNOTATION_FILES]
                 for part in ([split] if split in SPLIT_NAMES else ["train", "val"])]
    files = []
    for names in parts:                             # the first of each that is there
        files += [root / name for name in names if (root / name).is_file()][:1]
    if not files:
        tried = " nor ".join(map(str, parts[0][:len(ANNOTATION_FILES)]))
        present = sorted(str(path.relative_to(root)) for pattern in ("*.json", "*/*.json")
                         for path in root.glob(pattern) if not path.name.startswith("._"))
        raise FileNotFoundError(f"{root}: no annotation file {tried}; JSON files that are there: "
                                f"{first_few(present) or 'none'}; give the path of one as the "
                                "split")
    return files


def image_folder(root, path, images, needed):
    """The first folder that holds one of an annotation file's images; the root if there is none.

    Raises FileNotFoundError instead where images are needed.
    """
    name = path.stem.removeprefix("instances_").removesuffix("2017")
    folders = [root / folder.format(name) for folder in IMAGE_FOLDERS]
    folders += [path.parent, path.parent / "images"]
    for folder in folders:
        if folder.is_dir() and any((folder / image["file_name"]).is_file() for image in images):
            return folder
    if images and needed:
        raise FileNotFoundError(
            f"{path}: its images, as {images[0]['file_name']!r}, are in none of "
            f"{', '.join(map(str, dict.fromkeys(folders)))}; put the images there, or list the ids "
            "that you have in a file and give its path as the split")
    return root


def coco_rows(path, content):
    """{image id: rows for `checked_boxes`}; a category's label is its rank."""
    rows = {image["id"]: [] for image in content["images"]}
    labels = {category["id"]: label for label, category in enumerate(content["categories"])}
    for note in content["annotations"]:
        for key, known in (("image_id", rows), ("category_id", labels)):
            if note[key] not in known:
                raise ValueError(f"{path}: annotation {note['id']} has {key} {note[key]}, which "
                                 "the file does not list; add or remove it")
        x, y, w, h = note["bbox"]
        rows[note["image_id"]].append((x, y, x + w, y + h, labels[note["category_id"]],
                                       note["iscrowd"], note["area"], math.nan))
    return rows


# ----------------------------------------------------------------------------------------------
# Augmentation: torchvision's functions on a uint8 image (3, H, W) and its boxes, the item's own rng
# ----------------------------------------------------------------------------------------------

def transform(image, boxes, recipe, size, rng):
    """recipe "eval": resize.  "kitti": flip, resize (the authors' earlier set-up).  "toy": flip,
    colours, any resize.

    "coco" is DETR's: flip; then, half the time each, a resize of the short side to one of 480, 512,
    .., 800, or a resize to 400, 500 or 600, a random crop of 384..600 pixels a side, and such a
    resize. When `size` is (short, longest), all of these numbers are times short/800. Boxes stay
    glued to their pixels; one that a crop cuts away entirely comes back without area.
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
            smaller = round(rng.choice((400, 500, 600)) * unit)
            image, boxes = resize(image, smaller), resize(boxes, smaller)
            image, boxes = random_crop(image, boxes, round(384 * unit), round(600 * unit), rng)
        short = round(rng.choice(range(480, 801, 32)) * unit)
    return resize(image, short, longest), resize(boxes, short, longest)


def random_crop(image, boxes, least, most, rng):
    """Crop to least..most pixels a side; a smaller image stays whole.

    The side lengths are drawn first, then the corner, as in DETR.
    """
    sides = image.shape[1:]                                              # height, width
    height, width = (rng.randint(min(least, side), min(most, side)) for side in sides)
    top, left = rng.randint(0, sides[0] - height), rng.randint(0, sides[1] - width)
    return [F.crop(either, top, left, height, width) for either in (image, boxes)]


def resize(image, short, longest=math.inf):
    """Scale an image or its boxes to a short side of `short`, or less where the long side would
    pass `longest`.

    Rounded as in DETR, but never to less than one pixel.
    """
    sides = F.get_size(image)                                            # height, width
    low, high = sorted(sides)
    if high / low * short > longest:
        short = round(longest * low / high)
    short = max(1, short)
    long = int(short * high / low)
    return F.resize(image, [short if side == low else long for side in sides])


def normalise(image):
    """(3, H, W) uint8 -> float, so that ImageNet has mean 0 and deviation 1 in each channel."""
    mean = 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return image.float().sub_(mean).div_(std)


def prepare(image, size):
    """An image as read -> what a detector reads in evaluation: resized to `size`, normalised.

    size: (short side, longest side at most), or None.
    """
    return normalise(resize(image, *size) if size else image)


# ----------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------

def loader(dataset, batch_size, *, steps, start=0, seed=0, workers=0, rank=0, world=1):
    """Batches of training steps start..steps-1, whatever step a run starts from.

    One endless row of epochs, each a permutation of the data set, is cut into global batches of
    batch_size * world; of each, this rank takes every world-th item. A batch may straddle epochs,
    or hold several of a tiny data set.
    batch_size: this rank's.  workers: processes.
    """
    together = batch_size * world
    numbers = range(start * together + rank, steps * together, world)
    return Loader(dataset, Shuffled(numbers, len(dataset), seed), batch_size, workers)


def eval_loader(dataset, batch_size, workers=0, rank=0, world=1):
    """Each image once, in order; rank r of `world` takes every world-th, from the r-th on."""
    return Loader(dataset, range(rank, len(dataset), world), batch_size, workers)


class Shuffled:
    """(epoch, index) of the items with these numbers in the endless row of epochs of `seed`."""

    def __init__(self, numbers, length, seed):
        self.numbers, self.length, self.seed = numbers, length, seed

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        for epoch, numbers in groupby(self.numbers, lambda number: number // self.length):
            # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
            digest = hashlib.sha256(f"{self.seed}, {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            order = torch.randperm(self.length, generator=generator).tolist()
            for number in numbers:
                yield epoch, order[number % self.length]


class Loader(DataLoader):
    """A DataLoader that never waits for ever: workers that hang or die end the run in one line."""

    def __init__(self, dataset, sampler, batch_size, workers):
        # A generator of its own: otherwise each pass draws from the global one, and a resumed run
        # would differ.
        super().__init__(dataset, batch_size, sampler=sampler, num_workers=workers,
                         collate_fn=collate_shared, worker_init_fn=apart,
                         pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
                         timeout=PATIENCE if workers else 0)

    def __iter__(self):
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            # An error inside a worker begins with "Caught" instead, and keeps its traceback.
            if not str(error).startswith("DataLoader "):
                raise
            reason = one_line(error.__cause__ or error)                  # the signal, if known
            raise OSError(f"loading images: {reason}; use fewer --workers, or 0") from error


def collate_shared(items):
    """`collate`; in a worker the batch goes to shared memory here.

    Otherwise a thread behind torch's queue does it, and where memory is full (containers often have
    64 MB of it) loses the batch without a word to the process that waits for it.
    """
    batch = collate(items)
    if get_worker_info() is None:
        return batch
    try:
        return batch._map(torch.Tensor.share_memory_)
    except RuntimeError as error:
        shape = tuple(batch.images.shape)
        raise OneLine(f"no shared memory for a batch of {shape} ({one_line(error)}); give /dev/shm "
                      "more (docker run --shm-size), or use fewer --workers, or 0") from error


def apart(worker):
    """Ctrl-C, `timeout` and torchrun signal a whole process group: that is for the parent alone."""
    if hasattr(os, "setpgrp"):                                       # not on Windows
        os.setpgrp()


# ----------------------------------------------------------------------------------------------
# Average precision
#
# `evaluate` is COCO's protocol: AP averaged over IoU .50:.05:.95, and AP50, over all labelled
# objects of any size. KITTI's benchmark asks for IoU .7 for Car and .5 for Pedestrian and Cyclist;
# reports easy / moderate / hard by box height (40/25/25 px), occlusion and truncation, leaving
# harder objects out; counts Van as neutral for Car and Person_sitting for Pedestrian; forgives
# detections below the height limit or on DontCare; and averages precision at 40 recalls (11 before
# 2019; COCO: 101). So numbers of the two kinds cannot be compared: AP50 is not "KITTI moderate", it
# also asks for the tiny and the hidden, and is content with looser boxes for Car. The VOC-style AP
# at IoU .5 of the authors' earlier code is closest to AP50.
# ----------------------------------------------------------------------------------------------

def evaluate(predictions, dataset):
    """COCO's box AP, by pycocotools, silently.

    Objects are the data set's boxes: clipped, and without those that its `summary` counts as dropped
    (pycocotools on the raw file counts these as missed).
    predictions: one dict per image: image_id (int), scores (N,), labels (N,) 0..C-1, boxes (N, 4)
        as (x0, y0, x1, y1) in original pixels. An image without a dict counts as without
        detections. The best 100 per image and class count, as in COCO.
    Returns AP, AP50, AP75; APs, APm, APl (areas below 32^2, to 96^2, above, in original pixels);
    per_class {name: {AP, AP50}}: fractions 0..1, NaN where there is no object to find. Detections
    on ignored regions count neither way.
    Raises ValueError for an image twice or not in the data set, and for a label that is no class;
    FloatingPointError for scores or boxes that are not finite: pycocotools takes a box of NaN for a
    perfect hit.
    """
    judge = coco_eval(predictions, dataset)
    with contextlib.redirect_stdout(None):                               # pycocotools prints
        judge.evaluate()
        judge.accumulate()

    # (10 IoUs, 101 recalls, C classes, 4 areas); -1 where there is no object.
    precision = judge.eval["precision"][..., 0]

    def mean(values):
        values = values[values > -1]
        return float(values.mean()) if values.size else math.nan

    every = precision[..., 0]                                            # (10, 101, C), all areas
    result = {"AP": mean(every), "AP50": mean(every[0]), "AP75": mean(every[5])}
    for area, name in enumerate(("APs", "APm", "APl"), 1):
        result[name] = mean(precision[..., area])
    result["per_class"] = {
        name: {"AP": mean(every[..., c]), "AP50": mean(every[0, :, c])}
        for c, name in enumerate(dataset.classes)}
    return result


def coco_eval(predictions, dataset):
    """A COCOeval of these detections, not yet run. Arguments and what is raised: see `evaluate`."""
    annotations, expected = [], set(dataset.ids)
    last = len(dataset.classes) - 1
    for answer in predictions:
        image_id = int(answer["image_id"])
        if image_id not in expected:
            why = "there twice" if image_id in dataset.ids else "not in the data set"
            raise ValueError(f"predictions: image {image_id} is {why}; give each image of the data "
                             "set once")
        expected.remove(image_id)
        check_finite(answer, f"image {image_id}")
        scores, labels = answer["scores"].tolist(), answer["labels"].tolist()
        if not all(0 <= label <= last for label in labels):
            raise ValueError(f"predictions: image {image_id} has a label outside 0..{last}")
        boxes = box_convert(answer["boxes"].double(), "xyxy", "xywh").tolist()
        annotations += [
            {"image_id": image_id, "category_id": dataset.category_ids[label], "score": score,
             "bbox": box, "area": box[2] * box[3]}
            for score, label, box in zip(scores, labels, boxes)]
    judge = COCOeval(dataset.coco, coco_object(dataset, annotations), "bbox")
    judge.params.maxDets = [MAX_DETECTIONS]
    return judge


def check_finite(detections, what):
    """Raise FloatingPointError when detections, {"scores", "boxes"}, are not finite.

    what: "image 7", for its line.
    """
    if not all(detections[key].isfinite().all() for key in ("scores", "boxes")):
        raise FloatingPointError(f"{what}: the model's detections are not finite: its weights are "
                                 "broken, or the precision is too low for it")


def coco_object(dataset, annotations):
    """A pycocotools COCO with the data set's image ids and categories: what AP of boxes needs.

    Annotation ids count from 1: COCOeval reads 0 as no match.
    """
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in dataset.ids],
        "categories": [{"id": i, "name": name}
                       for i, name in zip(dataset.category_ids, dataset.classes)],
        "annotations": [note | {"id": number} for number, note in enumerate(annotations, 1)]}
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


# ----------------------------------------------------------------------------------------------
# Odd cases
#
# What is wrong stops before a model is built, with one line that names the file, the place and the
# remedy. An image that only fails to decode stops the run when it is read, also in a worker.
# What can be handled is read as it is meant, and counted in `summary`: boxes without area, beyond
# the border or under a pixel, COCO boxes that look like corners, images with more objects than AP
# counts, classes without objects, ids of the split that the folder lacks, label files without
# image, pictures turned by their EXIF tag. Images without objects are kept.
# ----------------------------------------------------------------------------------------------

# Image files

class OneLine(ValueError):
    """An error of one line, also when a DataLoader worker wrapped it in a traceback.

    The traceback stays in `details`.
    """

    def __init__(self, message):
        self.details = message
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"data.{type(self).__name__}: "))


class BrokenImage(OneLine):
    """An image file that cannot be used."""


class MissingImage(OneLine, FileNotFoundError):
    """An image file that is not there."""


def one_line(error):
    return " ".join(str(error).split())[:160]


def shown(path):
    """A path as it stands in a message: one that holds a line break or the like is quoted."""
    return str(path) if str(path).isprintable() else repr(str(path))


# Pillow's modes of 8 bits (or 1) a channel, which convert to RGB without a choice.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
ORIENTATION = 0x0112                                # EXIF's tag; 1 is upright
TAGGED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}    # where a PNG may hold it


@contextlib.contextmanager
def opened(path):
    """An image file, opened by Pillow and checked.

    Whatever is wrong, also inside the `with`, is a BrokenImage that names the file.
    """
    try:
        with Image.open(path) as image:
            if problem := unusable(image):
                raise BrokenImage(f"{shown(path)}: {problem}")
            yield image
    except BrokenImage:
        raise
    except FileNotFoundError:
        raise MissingImage(
            f"{shown(path)}: no such image; complete the data set, or list the ids that you have "
            "in a file and give its path as the split") from None
    except Image.DecompressionBombError:
        raise BrokenImage(f"{shown(path)}: more than {2 * MAX_PIXELS} pixels (the limit is "
                          f"{MAX_PIXELS}); make it smaller, or cut it into tiles") from None
    except Exception as error:
        raise BrokenImage(f"{shown(path)}: does not decode ({one_line(error)}); copy or download "
                          "it again, replace it, or leave it out") from error


def unusable(image):
    """Why an opened Pillow image would be misread, or is out of bounds; None when all is well."""
    width, height = image.size
    # Pillow cuts 16-bit colours to their upper 8 bits; only the decoder's arguments tell.
    deep = ", 16 bits" if any(";16" in str(tile[3]) for tile in image.tile) else ""
    if image.mode not in MODES or deep:
        return (f"pixels of mode {image.mode}{deep}; convert it to 8 bits a channel, after "
                "choosing which values are black and white")
    if width * height > MAX_PIXELS:
        return (f"{width}x{height} pixels, more than {MAX_PIXELS}; make it smaller, or cut it into "
                "tiles")
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width}x{height} pixels, thinner than 1:{MAX_ASPECT}; crop it, or leave it out"
    return None


def read_image(path):
    """An image file as (3, H, W) uint8 RGB, turned upright as its EXIF tag says.

    Raises BrokenImage, naming the file, when it does not decode.
    """
    with opened(path) as image:
        upright = ImageOps.exif_transpose(image) if orientation(image) > 1 else image
        return F.pil_to_tensor(upright.convert("RGB")).contiguous()      # (3, H, W)


def orientation(image):
    """EXIF's, 1..8. Of a PNG only a tag before the pixels counts: Pillow would decode it all to look
    for one behind them."""
    tagged = image.format != "PNG" or TAGGED & image.info.keys()
    turned = image.getexif().get(ORIENTATION) if tagged else 1
    return turned if turned in range(1, 9) else 1


def image_headers(paths):
    """`image_header` of each."""
    with ThreadPoolExecutor(8) as pool:
        return list(tqdm(pool.map(image_header, paths), "checking images", len(paths), leave=False,
                         disable=len(paths) < 5000))


def image_header(path):
    """((height, width) of the upright picture, EXIF orientation 1..8), mostly without decoding.

    Raises BrokenImage, also for a JPEG, PNG or WebP that is cut off.
    """
    with opened(path) as image:
        turned = orientation(image)
        size = image.size[::-1]                                   # height, width
        if turned >= 5 and image.format != "TIFF":                # TIFF's size is upright already
            size = image.size

        # Phones and cameras write more bytes behind the end marker: where it is not in the file's
        # tail, decoding decides. A PNG may lack its end and yet hold all pixels: `verify` reads its
        # blocks to the last.
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 2048))
            ends = END_MARKERS.get(image.format, b"") in file.read()
        if not ends:
            image.verify() if image.format == "PNG" else image.load()
        return size, turned


def check_size(path, size, wanted, turned=1):
    """Raise BrokenImage where boxes may not belong to the upright picture.

    size, turned: see `image_header`.  wanted: the (height, width) that the boxes are for, where
    something besides the image file says so, else None.
    """
    # Only the turned size proves that boxes were drawn on the upright picture.
    proven = turned >= 5 and size[0] != size[1] and size == wanted
    if turned != 1 and not proven:
        raise BrokenImage(
            f"{shown(path)}: its EXIF tag (orientation {turned}) turns the picture, so its boxes "
            "may be drawn on either form; turn the pixels (mogrify -auto-orient) or remove the tag "
            "(mogrify -strip), whichever the boxes were drawn on")
    if wanted not in (None, size):
        raise BrokenImage(f"{shown(path)}: the file is {size[1]}x{size[0]} pixels, its boxes are "
                          f"for {wanted[1]}x{wanted[0]}; restore the image or its annotation")


# Text files, and the fields of a COCO file

def read_lines(path):
    """The lines of a UTF-8 or UTF-16 text file, with or without a byte-order mark."""
    content = Path(path).read_bytes()
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: not UTF-8 text ({one_line(error)}); save it as "
                         "UTF-8") from None


def read_coco_file(path):
    """{"images", "categories", "annotations"}: lists of dicts with the fields of FIELDS.

    Images and categories in the order of their ids. Raises ValueError with one line.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a COCO annotation file ({one_line(error)}); correct or "
                         "replace it") from None
    lists = {}
    for kind in FIELDS:
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list '{kind}' in it; want a COCO detection file with "
                             "images, annotations and categories")
        try:
            lists[kind] = [read_entry(kind, place, entry) for place, entry in enumerate(entries)]
        except ValueError as error:
            raise ValueError(f"{path}: {error}; correct or remove it") from None
    if not lists["categories"]:
        raise ValueError(f"{path}: its list 'categories' is empty; name the classes there")

    # A name as well: per-class results, and the rows of a head that are copied, go by it.
    for kind, key in (("images", "id"), ("categories", "id"), ("categories", "name")):
        counts = Counter(entry[key] for entry in lists[kind])
        for value, count in counts.items():
            if count > 1:
                raise ValueError(f"{path}: {kind} {key} {value!r} is there {count} times; change "
                                 "one, or remove one that no annotation uses")
        lists[kind].sort(key=lambda entry: entry["id"])
    return lists


def read_entry(kind, place, entry):
    """The known fields of one entry of a COCO list, as FIELDS wants them."""
    if not isinstance(entry, dict):
        raise ValueError(f"{kind}[{place}] is {entry!r:.80}; want an object {{...}}")
    result = {"id": entry.get("id")}
    for key, (convert, wanted) in FIELDS[kind].items():
        given, value = entry.get(key), None
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            value = convert(given)
        if value is None:
            raise ValueError(f"{kind}[{place}], id {result['id']!r:.80}, has {key} {given!r:.80}; "
                             f"want {wanted}")
        result[key] = value
    return result


# What a field's value is turned into: None, or an error, where it cannot be meant.

def whole(value):
    """Also one that is written as text or as 5.0."""
    number = int(value)
    as_meant = isinstance(value, str) or number == value
    if as_meant and not isinstance(value, bool) and -2 ** 63 <= number < 2 ** 63:
        return number


def file_name(value):
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return value.replace("\\", "/")                          # written on Windows


def class_name(value):
    if type(value) in (str, int, float):
        return str(value).strip() or None


def crowd(value):
    if value in (None, "", "0", "1", 0, 1):                  # False and True among them
        return int(value or 0)


def area(value):
    number = math.nan if value is None else float(value)
    if not (number < 0 or math.isinf(number)):
        return number


def bbox(value):
    box = [float(number) for number in value]
    if isinstance(value, list) and len(box) == 4 and all(map(math.isfinite, box)):
        return box


WHOLE = whole, "a whole number of at most 63 bits"
FIELDS = {
    "images": {"id": WHOLE, "file_name": (file_name, "the image's path as text"),
               "height": WHOLE, "width": WHOLE},
    "categories": {"id": WHOLE, "name": (class_name, "a name as text")},
    "annotations": {"image_id": WHOLE, "category_id": WHOLE,
                    "bbox": (bbox, "four numbers [x, y, width, height], without NaN or infinity"),
                    "iscrowd": (crowd, "0 or 1"), "area": (area, "a number of pixels, at least 0")},
}
