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
        sha256("clockdistill-kitti-ID"), the first 1,496 are val (`split_ids`; python -c "import
        data; data.write_splits()" rebuilds the files). A folder with other ids is split by the same
        rule over its own.
        splits/kitti_cyclists_{train,tune,val}.txt divide 991 of the ids, images with a cyclist,
        into 703, 90 and 198 (`tune_ids`): for experiments that choose settings before they look at
        val.
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

AP here and KITTI's own
-----------------------
`evaluate` is COCO's protocol: AP averaged over IoU .50:.05:.95, and AP50, over all labelled objects
of any size. KITTI's benchmark asks for IoU .7 for Car and .5 for Pedestrian and Cyclist; reports
easy / moderate / hard by box height (40/25/25 px), occlusion and truncation, leaving harder objects
out; counts Van as neutral for Car and Person_sitting for Pedestrian; forgives detections below the
height limit or on DontCare; and averages precision at 40 recalls (11 before 2019; COCO: 101). So
numbers of the two kinds cannot be compared: AP50 is not "KITTI moderate", it also asks for the tiny
and the hidden, and is content with looser boxes for Car. The VOC-style AP at IoU .5 of the authors'
earlier code is closest to AP50.

Bad input, found before a model is built
----------------------------------------
What is wrong stops with one line that names the file, the place and the remedy; what can be handled
is counted in `summary`.
    stops    missing root, folder, image or label file; no image left; an image that is cut off,
             thinner than 1:100, larger than MAX_PIXELS, or not of 8 bits a channel; a picture whose
             EXIF tag turns it (unless the JSON states the turned size: then it is turned); a label
             line with a wrong column count, a word for a number, a NaN, or truncation and occlusion
             out of range; text that is not UTF-8 or UTF-16; an unknown class; JSON that does not
             parse or lacks a list; a field of another kind than COCO's (numbers written as text and
             `iscrowd` null, true or false are read as meant); two images or categories of one id,
             two categories of one name; an annotation of an unlisted image or category; an image
             size unlike the JSON's; boxes that are fractions instead of pixels; more than MAX_BOXES
             in an image. An image that only fails to decode stops the run when it is read, also in
             a worker.
    counted  boxes without area or inverted: dropped; beyond the border: clipped (counted from 1 px
             on), dropped if entirely outside; boxes under a pixel; images with more objects than
             the 100 detections that AP counts; classes without objects; COCO boxes that look like
             corners; listed ids that the folder lacks; label files without image: left out
Images without objects are kept; `summary` says when a split has no objects at all. Padding: images
of one batch are padded with zeros (the mean colour) at the right and bottom. Convolutions at the
border do see them, so a detector's scores move a little with its batch mates: make tables at batch
size 1.
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
    "kitti3": {"Car": "Car", "Pedestrian": "Pedestrian", "Cyclist": "Cyclist"},
    "kitti3_merged": {"Car": "Car", "Van": "Car", "Pedestrian": "Pedestrian",
                      "Person_sitting": "Pedestrian", "Cyclist": "Cyclist"},
    "kitti8": {name: name for name in KITTI_TYPES},
}
# Resize, in pixels: (short side, longest side at most).
DEFAULT_SIZE = {"coco": (800, 1333), "kitti": (800, 1333), "toy": None}

# Limits of what is read, and of what COCO's AP counts.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS                 # 89 million: Pillow's own
MAX_ASPECT = 100                                    # long side over short side
MAX_BOXES = 10_000                                  # in one image
MAX_DETECTIONS = 100                                # per image: COCO's AP counts the best
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
        """The batch cut into `count` smaller ones (fewer, when it has fewer images)."""
        size = math.ceil(len(self.targets) / count)
        parts = [slice(i, i + size) for i in range(0, len(self.targets), size)]
        return [Batch(self.images[p], self.padding[p], self.targets[p]) for p in parts]

    def _map(self, move):
        def moved(target):
            return {k: move(v) if torch.is_tensor(v) else v for k, v in target.items()}

        return Batch(move(self.images), move(self.padding), [moved(t) for t in self.targets])

    def to(self, device):
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        return self._map(torch.Tensor.pin_memory)


def collate(items):
    """[(image, target), ...] -> Batch, padded with zeros at the bottom and right."""
    images, targets = zip(*items)
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    batch = torch.zeros(len(images), 3, height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, image in enumerate(images):
        _, h, w = image.shape
        batch[row, :, :h, :w] = image
        padding[row, :h, :w] = False
    return Batch(batch, padding, list(targets))


# ----------------------------------------------------------------------------------------------
# Image files
# ----------------------------------------------------------------------------------------------

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


def one_line(error):
    return " ".join(str(error).split())[:160]


def shown(path):
    """A path as it stands in a message: one that holds a line break or the like is quoted."""
    return str(path) if str(path).isprintable() else repr(str(path))


# Pillow's modes of 8 bits (or 1) a channel, which convert to RGB without a choice.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
END_MARKERS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
ORIENTATION = 0x0112                                # EXIF's tag; 1 is upright


def check_picture(path, image):
    """Raise BrokenImage for an opened Pillow image that would be misread, or is out of bounds."""
    width, height = image.size
    # Pillow cuts 16-bit colours to their upper 8 bits; only the decoder's arguments tell.
    deep = ", 16 bits" if any(";16" in str(tile[3]) for tile in image.tile) else ""
    problem = None
    if image.mode not in MODES or deep:
        problem = (f"pixels of mode {image.mode}{deep}; convert it to 8 bits a channel, after "
                   "choosing which values are black and white")
    elif width * height > MAX_PIXELS:
        problem = (f"{width}x{height} pixels, more than {MAX_PIXELS}; make it smaller, or cut it "
                   "into tiles")
    elif max(width, height) > MAX_ASPECT * min(width, height):
        problem = f"{width}x{height} pixels, thinner than 1:{MAX_ASPECT}; crop it, or leave it out"
    if problem:
        raise BrokenImage(f"{shown(path)}: {problem}")


def open_picture(path, use, failure):
    """Open an image file, check it, and return use(image). Raises BrokenImage, naming the file."""
    try:
        with Image.open(path) as image:
            check_picture(path, image)
            return use(image)
    except BrokenImage:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{shown(path)}: no such image; complete the data set, or list the ids that you have "
            "in a file and give its path as the split") from None
    except Image.DecompressionBombError:
        raise BrokenImage(f"{shown(path)}: more than {2 * MAX_PIXELS} pixels (the limit is "
                          f"{MAX_PIXELS}); make it smaller, or cut it into tiles") from None
    except Exception as error:
        raise BrokenImage(f"{shown(path)}: {failure.format(one_line(error))}") from error


def read_image(path):
    """An image file as (3, H, W) uint8 RGB, turned upright as its EXIF tag says.

    Raises BrokenImage, naming the file, when it does not decode.
    """
    def pixels(image):
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()   # (3, H, W)

    return open_picture(path, pixels, "does not decode ({}); replace the file, or leave it out")


def image_header(path, whole=True):
    """((height, width) of the upright picture, EXIF orientation 1..8) without decoding.

    whole: also look for the end of the file. Raises BrokenImage.
    """
    def header(image):
        turned = 1
        # Pillow would decode a whole PNG to look for a tag behind its pixels; it stands before.
        if image.format != "PNG" or "exif" in image.info:
            turned = image.getexif().get(ORIENTATION, 1)
        turned = turned if turned in range(1, 9) else 1
        width, height = image.size
        if turned >= 5 and image.format != "TIFF":                # TIFF's size is upright already
            width, height = height, width
        if whole:
            check_end(path, image)
        return (height, width), turned

    return open_picture(path, header, "not a readable image ({}); copy or download it again")


def check_end(path, image):
    """Raise BrokenImage for a PNG or JPEG file that is cut off.

    Phones and cameras write more bytes behind the end marker. So where the file's tail lacks the
    marker, decoding decides.
    """
    marker = END_MARKERS.get(image.format)
    if marker is None:
        return
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 2048))
        if marker in file.read():
            return
    try:
        # A PNG may lack its end and yet hold all pixels: `verify` reads its blocks to the last.
        image.verify() if image.format == "PNG" else image.load()
    except Exception as error:
        raise BrokenImage(
            f"{shown(path)}: the {image.format} end marker is missing and decoding stops "
            f"({one_line(error)}); copy or download the file again") from error


def image_headers(paths, whole):
    with ThreadPoolExecutor(8) as pool:
        headers = pool.map(partial(image_header, whole=whole), paths)
        quiet = len(paths) < 5000
        return list(tqdm(headers, "checking images", len(paths), leave=False, disable=quiet))


def turned_error(path, turned):
    return BrokenImage(
        f"{shown(path)}: its EXIF tag (orientation {turned}) turns the picture, so its boxes may "
        "be drawn on either form; turn the pixels (mogrify -auto-orient) or remove the tag "
        "(mogrify -strip), whichever the boxes were drawn on")


def prepare(image, size=None):
    """An image as read -> what a detector reads in evaluation: resized to `size`, normalised."""
    nothing = BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=tuple(image.shape[1:]))
    return normalise(transform(image, nothing, "eval", size, None)[0])


# ----------------------------------------------------------------------------------------------
# The dataset
# ----------------------------------------------------------------------------------------------

@dataclass
class Records:
    """What a reader read: one entry per image in the first lists, one row per box in `rows`."""
    classes: list
    category_ids: list                              # label -> official id
    paths: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    sizes: list = field(default_factory=list)       # (height, width)
    rows: list = field(default_factory=list)        # (boxes, 7) arrays: x0 y0 x1 y1 in pixels, ...
    problems: Counter = field(default_factory=Counter)

    def add(self, path, image_id, size, rows):
        """rows: (x0, y0, x1, y1, label, ignored, area) each.

        label -1: ignored for every class.  area NaN: the box's.  Boxes are clipped to the image.
        """
        rows = np.array(rows, dtype=np.float64).reshape(-1, 7)
        if len(rows) > MAX_BOXES:
            raise ValueError(f"{shown(path)}: {len(rows)} boxes on one image, more than "
                             f"{MAX_BOXES}; cut the image into tiles, or leave it out")
        height, width = size
        inside = rows[:, :4].clip(0, [width, height, width, height])
        sides = inside[:, 2:] - inside[:, :2]                            # (boxes, 2)
        flat = (rows[:, 2:4] <= rows[:, :2]).any(1)
        outside = ~flat & (sides <= 0).any(1)
        moved = np.abs(inside - rows[:, :4]).max(1, initial=0) >= 1
        kept = ~(flat | outside)
        tiny = kept & (rows[:, 5] == 0) & (sides < 1).any(1)
        self.problems["boxes without area dropped"] += int(flat.sum())
        self.problems["boxes outside their image dropped"] += int(outside.sum())
        self.problems["boxes clipped to their image"] += int((kept & moved).sum())
        self.problems["boxes under a pixel wide or high"] += int(tiny.sum())
        rows[:, :4] = inside
        rows[:, 6] = np.where(np.isnan(rows[:, 6]), sides.prod(1), rows[:, 6])
        self.paths.append(str(path))
        self.ids.append(image_id)
        self.sizes.append((height, width))
        self.rows.append(rows[kept])


class Dataset(torch.utils.data.Dataset):
    """Images with boxes. `dataset[index]`, or `dataset[epoch, index]` to augment by epoch.

    Augmentation draws from (seed, epoch, index) alone, so an item does not depend on workers,
    order, or a resumed run.
    Attributes: name, classes, category_ids, ids, paths, sizes, summary (what a user must know, one
    line), most_objects (of one image); `coco` is the ground truth for pycocotools; `fingerprint` is
    a digest of ids, classes, boxes and sizes, for a run to tell whether its data changed.
    """

    def __init__(self, name, records, split, augment, size, seed, cache):
        self.name, self.classes = name, records.classes
        self.category_ids = records.category_ids
        self.paths, self.ids, self.sizes = records.paths, records.ids, records.sizes
        # All boxes in one array, not one small array per image: forked workers share it.
        self.rows = np.concatenate([np.zeros((0, 7)), *records.rows])
        self.starts = np.cumsum([0] + [len(rows) for rows in records.rows])
        self.augment, self.size, self.seed = augment, size, seed
        self.cache = {} if cache else None
        self._coco = None
        real = self.rows[:, 5] == 0                                      # the others are ignored
        before = np.concatenate([[0], real.cumsum()])                    # objects before each row
        per_image = np.diff(before[self.starts])                         # (images,)
        self.most_objects = int(per_image.max(initial=0))
        crowded = f"images with more than the {MAX_DETECTIONS} detections that AP counts"
        records.problems[crowded] = int((per_image > MAX_DETECTIONS).sum())
        self.summary = f"{name} {split}: {len(self.ids)} images, {self._describe(real)}"
        for problem, count in sorted(records.problems.items()):
            self.summary += f"; {count} {problem}" if count else ""

    def _describe(self, real):
        """Objects per class, and what to know of them before hours of training."""
        ignored = int((~real).sum())
        labels = self.rows[real, 4].astype(int)
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        if not len(labels):
            return f"NO OBJECTS, nothing to learn or to find, {ignored} ignored regions"
        most = sorted(zip(counts, self.classes), key=lambda pair: -pair[0])
        listed = [f"{name} {count}" for count, name in most if count]
        absent = [name for count, name in most if not count]
        text = (f"{len(labels)} objects ({first_few(listed)}), at most {self.most_objects} an "
                f"image, {ignored} ignored regions")
        if absent:
            text += f"; {len(absent)} classes without objects ({first_few(absent)})"
        return text

    @property
    def fingerprint(self):
        digest = hashlib.sha256(json.dumps([self.ids, self.classes, self.sizes]).encode())
        digest.update(self.rows.tobytes())
        digest.update(self.starts.tobytes())
        return digest.hexdigest()[:12]

    def __len__(self):
        return len(self.ids)

    def pixels(self, index):
        """The stored image as (3, H, W) uint8."""
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        image = read_image(self.paths[index])
        # The boxes belong to a size; an image that was exchanged meanwhile would be misread.
        (height, width), (h, w) = self.sizes[index], image.shape[1:]
        if (h, w) != (height, width):
            raise BrokenImage(f"{shown(self.paths[index])}: the file is {w}x{h} pixels, its boxes "
                              f"are for {width}x{height}; restore the image or its annotation")
        if self.cache is not None:
            self.cache[index] = image
        return image

    def _rows(self, index):
        rows = self.rows[self.starts[index]:self.starts[index + 1]]      # (boxes, 7)
        objects, ignored = rows[rows[:, 5] == 0], rows[rows[:, 5] != 0]
        boxes, ignore = (torch.from_numpy(r[:, :4]).float() for r in (objects, ignored))
        return boxes, torch.from_numpy(objects[:, 4]).long(), ignore

    def raw(self, index):
        """(PIL image, target) as stored, for pictures: boxes are (x0, y0, x1, y1) in pixels."""
        boxes, labels, ignore = self._rows(index)
        image = Image.fromarray(self.pixels(index).permute(1, 2, 0).numpy())
        return image, {"boxes": boxes, "labels": labels, "ignore": ignore,
                       "image_id": self.ids[index]}

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        image, (boxes, labels, ignore) = self.pixels(index), self._rows(index)
        stored = torch.tensor(image.shape[1:])
        canvas = tuple(image.shape[1:])
        both = BoundingBoxes(torch.cat([boxes, ignore]), format="XYXY", canvas_size=canvas)

        # Objects and ignored regions move together with the pixels.
        rng = random.Random(f"{self.seed}, {epoch}, {index}")
        recipe = self.name if self.augment == "train" else "eval"
        image, both = transform(image, both, recipe, self.size, rng)
        height, width = image.shape[1:]
        centred = box_convert(both.as_subclass(torch.Tensor), "xyxy", "cxcywh")
        fractions = centred / torch.tensor([width, height] * 2)

        # A crop leaves boxes beyond its border without area.
        keep = (both[:, 2:] > both[:, :2]).all(1)
        of_object = torch.arange(len(both)) < len(boxes)
        target = {"boxes": fractions[keep & of_object], "labels": labels[keep[:len(boxes)]],
                  "ignore": fractions[keep & ~of_object], "image_id": self.ids[index],
                  "size": torch.tensor([height, width]), "orig_size": stored}
        return normalise(image), target

    @property
    def coco(self):
        """Ground truth in original pixels as a pycocotools COCO object, made on first use.

        A region ignored for every class (KITTI's) is one crowd annotation per class, since COCOeval
        matches class by class; COCO's own crowds keep their class, as in the official evaluation.
        """
        if self._coco is None:
            annotations = []
            for index, image_id in enumerate(self.ids):
                for row in self.rows[self.starts[index]:self.starts[index + 1]]:
                    x0, y0, x1, y1, label, ignored, area = row.tolist()
                    facts = {"image_id": image_id, "bbox": [x0, y0, x1 - x0, y1 - y0],
                             "area": area, "iscrowd": int(ignored)}
                    wanted = self.category_ids if label < 0 else [self.category_ids[int(label)]]
                    annotations += [facts | {"category_id": category} for category in wanted]
            self._coco = coco_object(self, annotations)
        return self._coco


def first_few(words, count=8):
    return ", ".join(words[:count]) + (", ..." if len(words) > count else "")


def build(name, root, split, *, augment="eval", size=None, limit=None, class_map=None,
          others="ignore", seed=0, check=True, cache=None, counts=None, toy_seed=0):
    """Open a data set, and check it: all that training and evaluation will need.

    name: "toy" | "kitti" | "coco", the layout.  root: its folder.
    split: "train" | "val" | "all" (toy also "tune", COCO also "test"), or the path of a text file
        with one image id a line (KITTI: stems; COCO: image ids), or, for COCO, of an annotation
        file, *.json.
    augment: "train" for that data set's training augmentation (`transform`), "eval" for none.
    size: (short side, longest side at most) of the resize in pixels; None: DEFAULT_SIZE.
    limit: use only the first so many images, in the order of their ids.
    class_map, others: KITTI's types, see the top of this file.
    seed: of the augmentation.  check: False reads no image end markers (for COCO, no headers).
    cache: keep decoded images in memory, in each worker; None: the toy only.
    counts, toy_seed: what to draw when the toy's folder is empty (`make_toy`).
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
    root = Path(root)
    if name == "toy":
        make_toy(root, toy_seed, counts)
        if split in ("train", "val", "tune"):
            split = root / "ImageSets" / f"{split}.txt"
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the {name} "
                                "data set as its root")
    if name == "coco":
        if class_map is not None or others != "ignore":
            raise ValueError("class_map and others are for KITTI's layout: with COCO's, edit the "
                             "annotation file")
        records = read_coco(root, split, limit, check)
    else:
        records = read_kitti(root, split, limit, class_map, others, check)
    corners = [rows[:, 2:4].max() for rows in records.rows if len(rows)]
    if corners and max(corners) <= 1:
        raise ValueError(f"{root}: all boxes lie in the first pixel of their images, as fractions "
                         "of the image would; write them in pixels")
    split = Path(split).stem if isinstance(split, Path) else split
    cache = name == "toy" if cache is None else cache
    return Dataset(name, records, split, augment, size, seed, cache)


# ----------------------------------------------------------------------------------------------
# Reading KITTI's layout
# ----------------------------------------------------------------------------------------------

def read_lines(path):
    """The lines of a UTF-8 or UTF-16 text file, with or without a byte-order mark."""
    content = Path(path).read_bytes()
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(path)}: not UTF-8 text ({one_line(error)}); save it as "
                         "UTF-8") from None


def listed_ids(path):
    """The ids of a split file, in its order: one a line; blank lines and # lines do not count."""
    try:
        lines = read_lines(path)
    except OSError:
        raise FileNotFoundError(f"split {str(path)!r} is neither train, val nor all, nor a text "
                                "file with one image id a line") from None
    ids = [line.split()[0] for line in lines if line.split() and not line.startswith("#")]
    return list(dict.fromkeys(ids))


def ranked(ids):
    """The ids in the order of their sha256: no random generator, so it holds for ever."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"clockdistill-kitti-{i}".encode()).digest())


def split_ids(ids):
    """(train, val): the first fifth of the `ranked` ids is val."""
    count = max(1, round(len(ids) / 5)) if len(ids) > 1 else 0
    held_out = set(ranked(ids)[:count])
    return sorted(set(ids) - held_out), sorted(held_out)


def tune_ids(ids, count=90):
    """(train, tune, val): as `split_ids`, and the next `count` of the `ranked` ids are tune."""
    rest, val = split_ids(ids)
    return sorted(ranked(rest)[count:]), sorted(ranked(rest)[:count]), val


def write_splits(folder=Path(__file__).resolve().parent / "splits"):
    """Write KITTI's 80/20 split, 5,985 and 1,496 ids, to the files that other tools can read."""
    for name, ids in zip(("train", "val"), split_ids(KITTI_IDS)):
        (folder / f"kitti_{name}.txt").write_text("\n".join(ids) + "\n")


def class_mapping(class_map):
    """-> ({type: label, or -1 to ignore it}, classes), for the forms listed at the top."""
    if class_map is None or class_map in list(CLASS_MAPS):
        class_map = CLASS_MAPS[class_map or "kitti3"]
    elif not isinstance(class_map, dict):
        names = class_map.split(",") if isinstance(class_map, str) else class_map
        class_map = {name.strip(): name.strip() for name in names if name.strip()}
    classes = list(dict.fromkeys(name for name in class_map.values() if name is not None))
    if not classes:
        raise ValueError(f"class_map names no class: use {', '.join(CLASS_MAPS)}, or your own as "
                         "Car,Dog")
    labels = dict.fromkeys(KITTI_TYPES, -1)
    for name, target in class_map.items():
        labels[name] = -1 if target is None else classes.index(target)
    return labels | {"DontCare": -1}, classes


def read_kitti(root, split, limit, class_map, others, check):
    """KITTI's layout -> Records. The arguments are those of `build`."""
    images, labels = root / "training" / "image_2", root / "training" / "label_2"
    for folder in (images, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; KITTI's layout is "
                                    "ROOT/training/image_2 and label_2")
    # macOS leaves "._NAME" beside a file when it copies.
    files = {p.stem: p for p in sorted(images.iterdir())
             if p.suffix.lower() in (".png", ".jpg", ".jpeg") and not p.name.startswith("._")}
    if not files:
        raise FileNotFoundError(f"{images}: no .png or .jpg image in it; unpack the data set's "
                                "images here")
    if split == "all":
        wanted = list(files)
    elif split in ("train", "val"):
        official = set(files) <= set(KITTI_IDS)
        wanted = split_ids(KITTI_IDS if official else files)[split == "val"]
    else:
        wanted = listed_ids(split)
    mapping, classes = class_mapping(class_map)
    records = Records(classes, list(range(1, len(classes) + 1)))
    stems = sorted(stem for stem in wanted if stem in files)
    records.problems["listed ids not in the folder"] = len(wanted) - len(stems)
    if split == "all":
        stray = [p for p in labels.glob("*.txt") if p.stem not in files and p.name[:2] != "._"]
        records.problems["label files without image"] = len(stray)
    if not stems:
        raise ValueError(f"{images}: none of the {len(wanted)} ids of split {str(split)!r} is in "
                         "it; use split all, or the path of a file that lists ids of this folder")

    # Ids are the files' own numbers, where all have a number, and a different one.
    numbers = [int(stem) if stem.isdecimal() else -1 for stem in files]
    numbered = len(set(numbers)) == len(numbers) and 0 <= min(numbers) and max(numbers) < 2 ** 63
    ids = dict(zip(files, numbers if numbered else range(len(files))))
    stems = stems[:limit]
    headers = image_headers([files[stem] for stem in stems], check)
    for stem, (size, turned) in zip(stems, headers):
        if turned != 1:
            raise turned_error(files[stem], turned)
        rows = read_kitti_label(labels / f"{stem}.txt", mapping, others)
        records.add(files[stem], ids[stem], size, rows)
    return records


def read_kitti_label(path, mapping, others):
    """A label file -> rows for Records.add.

    Columns: type, truncated, occluded, alpha, x0 y0 x1 y1, seven of 3D, and perhaps a score.
    """
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{shown(path)}: no label file for this image; add it (empty means no objects), or "
            "list the ids that have one in a file and give its path as the split") from None
    rows = []
    for number, line in enumerate(lines, 1):
        columns = line.split()
        if not columns:
            continue
        kind, *words = columns
        where = f"{shown(path)}, line {number}"
        if len(columns) not in (15, 16):
            raise ValueError(f"{where}: {len(columns)} columns instead of KITTI's 15; correct or "
                             "remove the line")
        try:
            values = [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}; correct or remove the line") from None
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{where}: a number is NaN or infinite; correct or remove the line")
        if shifted(words, values):
            raise ValueError(f"{where}: truncation {words[0]} or occlusion {words[1]} is out of "
                             "KITTI's range, 0..1 and 0..3, or -1; if the class has two "
                             "words, join them")
        if kind not in mapping:
            raise ValueError(f"{where}: unknown class {kind!r}; name all your classes in "
                             f"class_map, as in Car,{kind}")
        label = mapping[kind]
        if label >= 0 or others == "ignore" or kind == "DontCare":
            rows.append((*values[3:7], label, label < 0, math.nan))
    return rows


def shifted(words, values):
    """Are a line's columns out of place, as after a class of two words, `Truck 2 0.00 0 ..`?"""
    truncated, occluded = values[:2]
    if not (truncated == -1 or 0 <= truncated <= 1) or occluded not in (-1, 0, 1, 2, 3):
        return True
    # Beside a score, occlusion must be written as KITTI does, a whole number; truncation never is.
    return len(words) == 15 and "." in words[1]


# ----------------------------------------------------------------------------------------------
# Reading COCO's layout
# ----------------------------------------------------------------------------------------------

SPLIT_NAMES = {"train": ("train", "Train"), "val": ("val", "valid", "Val", "Valid"),
               "test": ("test", "Test")}
ANNOTATION_FILES = ("annotations/instances_{}2017.json", "annotations/instances_{}.json",
                    "annotations/{}.json", "{}.json", "{}/_annotations.coco.json")
IMAGE_FOLDERS = ("{}2017", "{}", "images/{}2017", "images/{}", "images", ".")


def coco_files(root, split):
    """The annotation files of a split, each with the folders that may hold its images."""
    def candidates(path, name):
        beside = [path.parent, path.parent / "images"]
        return path, [root / folder.format(name) for folder in IMAGE_FOLDERS] + beside

    present = sorted(p for pattern in ("*.json", "*/*.json") for p in root.glob(pattern)
                     if not p.name.startswith("._"))
    if str(split).endswith(".json"):
        path = Path(split) if Path(split).is_file() else root / split
        if path.is_file():
            return [candidates(path, path.stem.removeprefix("instances_").removesuffix("2017"))]
        tried = [str(split)]
    else:
        files = []
        parts = [split] if split in SPLIT_NAMES else ["train", "val"]
        for part in parts:
            names = [(root / file.format(name), name) for name in SPLIT_NAMES[part]
                     for file in ANNOTATION_FILES]
            files += [candidates(path, name) for path, name in names if path.is_file()][:1]
        if files:
            return files
        tried = [file.format(parts[0]) for file in ANNOTATION_FILES]
    there = first_few([str(p.relative_to(root)) for p in present]) or "none"
    raise FileNotFoundError(f"{root}: no annotation file {' nor '.join(tried)}; JSON files "
                            f"that are there: {there}; give the path of one as the split")


def read_coco(root, split, limit, check):
    """COCO's layout -> Records. The arguments are those of `build`."""
    wanted = None
    if split not in ("all", *SPLIT_NAMES) and not str(split).endswith(".json"):
        wanted = {int(i) if i.isdecimal() else i for i in listed_ids(split)}
    files = coco_files(root, split)
    records, used = None, set()
    for path, folders in files:
        content = load_coco_json(path)
        names = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        if records is None:
            records = Records(list(names.values()), list(names))
            expected = names
        elif names != expected:
            differ = [f"{i} {name}" for i, name in sorted(names.items() ^ expected.items())]
            raise ValueError(f"{path}: its categories differ from those of {files[0][0]} "
                             f"({first_few(differ)}); use one split at a time")
        images = sorted(content["images"], key=lambda image: image["id"])
        if wanted is not None:
            images = [image for image in images if image["id"] in wanted]
        folder = image_folder(path, folders, images)
        if wanted is not None:
            images = [image for image in images if (folder / image["file_name"]).is_file()]
        if clash := used & {image["id"] for image in images}:
            raise ValueError(f"{path}: image id {min(clash)} is also in {files[0][0]}; use one "
                             "split at a time")
        used |= {image["id"] for image in images}
        rows = coco_rows(path, content, {c: label for label, c in enumerate(names)})
        note_corners(content, records.problems)
        images = images[:None if limit is None else limit - len(records.ids)]
        paths = [folder / image["file_name"] for image in images]
        headers = image_headers(paths, True) if check else [None] * len(images)
        for file, image, header in zip(paths, images, headers):
            stated = image["height"], image["width"]
            if header and check_stated(path, file, stated, *header):
                records.problems["pictures turned upright by their EXIF tag"] += 1
            records.add(file, image["id"], stated, rows.get(image["id"], []))
    if wanted is not None:
        records.problems["listed ids not in the folder"] = len(wanted) - len(used)
    if not records.ids:
        raise ValueError(f"{root}: no image of split {str(split)!r} in it; use another split, or "
                         "complete the folder")
    return records


def image_folder(path, folders, images):
    """The first of the folders that holds one of an annotation file's images."""
    for folder in folders:
        if any((folder / image["file_name"]).is_file() for image in images[:50]):
            return folder
    if images:
        first, others = folders[0] / images[0]["file_name"], map(str, folders[1:])
        raise FileNotFoundError(
            f"{shown(first)}: no such image, nor in {', '.join(dict.fromkeys(others))}; put the "
            f"images of {path} there, or list the ids that you have in a file and give its path as "
            "the split")
    return folders[0]


def check_stated(path, file, stated, size, turned):
    """Compare the JSON's (height, width) with the file's. -> whether the picture gets turned."""
    upright = turned == 1
    swapped = turned >= 5 and size[0] != size[1]
    # Only the turned size proves that boxes were drawn on the upright picture.
    if not upright and not (swapped and size == stated):
        raise turned_error(file, turned)
    if size != stated:
        raise ValueError(f"{shown(file)}: the file is {size[1]}x{size[0]} pixels but {path} says "
                         f"{stated[1]}x{stated[0]}; its boxes would be wrong: restore the image or "
                         "the JSON")
    return not upright


# What a field's value is turned into; each raises ValueError with what is wanted.

def whole(value):
    """A whole number of 64 bits, also one that is written as text or as 5.0."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = int(value)
        as_meant = isinstance(value, str) or number == value
        if as_meant and not isinstance(value, bool) and -2 ** 63 <= number < 2 ** 63:
            return number
    raise ValueError("a whole number of at most 63 bits")


def pixels(value):
    number = whole(value)
    if number < 1:
        raise ValueError("a whole number of pixels, at least 1")
    return number


def file_name(value):
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("the image's path as text")
    return value.replace("\\", "/")                          # written on Windows


def class_name(value):
    name = str(value).strip()
    if type(value) not in (str, int, float) or not name:
        raise ValueError("a name as text")
    return name


def crowd(value):
    if value in (None, "", "0", "1", 0, 1):                  # False and True among them
        return int(value or 0)
    raise ValueError("0 or 1")


def area(value):
    number = math.nan if value is None else to_float(value)
    if number < 0 or math.isinf(number):
        raise ValueError("a number of pixels, at least 0")
    return number


def bbox(value):
    box = [to_float(number) for number in value] if isinstance(value, list) else []
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError("four numbers [x, y, width, height], without NaN or infinity")
    return box


def to_float(value):
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number") from None


# The lists of a COCO file: fields that it must have, and fields that it may have.
FIELDS = {
    "images": ({"id": whole, "file_name": file_name, "height": pixels, "width": pixels}, {}),
    "categories": ({"id": whole, "name": class_name}, {}),
    "annotations": ({"image_id": whole, "category_id": whole, "bbox": bbox},
                    {"iscrowd": crowd, "area": area}),
}


def load_coco_json(path):
    """{"images", "categories", "annotations"}: lists of dicts with the fields of FIELDS.

    All that training and evaluation need is checked here. Raises ValueError with one line.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a COCO annotation file ({one_line(error)}); correct or "
                         "replace it") from None
    lists = {}
    for kind, (needed, optional) in FIELDS.items():
        entries = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list '{kind}' in it; want a COCO detection file with "
                             "images, annotations and categories")
        lists[kind] = [check_entry(f"{path}: {kind}[{place}]", entry, needed, optional)
                       for place, entry in enumerate(entries)]
    for kind in ("images", "categories"):
        if twice := repeated(entry["id"] for entry in lists[kind]):
            raise ValueError(f"{path}: {kind} id {twice[0]} is there twice; make the ids unique")
    if not lists["categories"]:
        raise ValueError(f"{path}: its list 'categories' is empty; name the classes there")
    # Per-class results, and the rows of a head that are copied, go by the name.
    if twice := repeated(category["name"] for category in lists["categories"]):
        same = [str(c["id"]) for c in lists["categories"] if c["name"] == twice[0]]
        used = {a["category_id"] for a in lists["annotations"]}
        idle = [i for i in same if int(i) not in used]
        remedy = f", or remove {idle[0]}, which has no annotation" if idle else ""
        raise ValueError(f"{path}: categories {' and '.join(same)} have one name, {twice[0]!r}; "
                         f"rename one{remedy}")
    return lists


def check_entry(where, entry, needed, optional):
    """The known fields of one entry of a COCO list, as FIELDS wants them."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {repr(entry)[:80]}; want an object {{...}}")
    if missing := [key for key in needed if key not in entry]:
        raise ValueError(f"{where} has no {missing[0]!r}; not a COCO annotation file, or "
                         "incomplete: correct or replace it")
    result = {"id": entry.get("id")}
    for key, convert in (needed | optional).items():
        value = entry.get(key)
        try:
            result[key] = convert(value)
        except ValueError as wanted:
            named = f" (annotation {entry.get('id')})" if "bbox" in needed else ""
            raise ValueError(f"{where}{named} has {key} {repr(value)[:80]}; want {wanted}; correct "
                             "or remove it") from None
    return result


def repeated(values):
    return [value for value, count in Counter(values).items() if count > 1]


def coco_rows(path, content, labels):
    """{image id: rows for Records.add}; labels: {category id: label}."""
    images, rows = {image["id"] for image in content["images"]}, {}
    for note in content["annotations"]:
        image_id, category = note["image_id"], note["category_id"]
        where = f"{path}: annotation {note['id']}"
        if image_id not in images:
            raise ValueError(f"{where} is of image {image_id}, not in 'images'; add or remove it")
        if category not in labels:
            raise ValueError(f"{where} is of category {category}, not in 'categories'; add or "
                             "remove it")
        x, y, w, h = note["bbox"]
        row = x, y, x + w, y + h, labels[category], note["iscrowd"], note["area"]
        rows.setdefault(image_id, []).append(row)
    return rows


def note_corners(content, problems):
    """Count boxes that pass the border, where all boxes would fit as corners (x0, y0, x1, y1)."""
    sides = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes = np.array([note["bbox"] for note in content["annotations"]]).reshape(-1, 4)
    border = np.array([sides[note["image_id"]] for note in content["annotations"]]).reshape(-1, 2)
    start, second = boxes[:, :2], boxes[:, 2:]
    beyond = (start + second > border + 1).any(1)
    if ((start >= 0) & (second > start) & (second <= border)).all():
        problems["boxes pass the border, but all would fit as corners: COCO's boxes are "
                 "[x, y, width, height], not [x0, y0, x1, y1]"] += int(beyond.sum())


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
            image, boxes = resize(image, boxes, round(rng.choice((400, 500, 600)) * unit))
            image, boxes = random_crop(image, boxes, round(384 * unit), round(600 * unit), rng)
        short = round(rng.choice(range(480, 801, 32)) * unit)
    return resize(image, boxes, short, longest)


def random_crop(image, boxes, least, most, rng):
    """Crop to least..most pixels a side; a smaller image stays whole.

    The side lengths are drawn first, then the corner, as in DETR.
    """
    full_height, full_width = image.shape[1:]
    height, width = (min(side, rng.randint(min(least, side), min(most, side)))
                     for side in (full_height, full_width))
    top, left = rng.randint(0, full_height - height), rng.randint(0, full_width - width)
    image, boxes = (F.crop(either, top, left, height, width) for either in (image, boxes))
    return image, F.clamp_bounding_boxes(boxes)


def resize(image, boxes, short, longest=None):
    """Scale to a short side of `short`, or less if the long side would pass `longest`.

    Rounded as in DETR, but never to less than one pixel.
    """
    height, width = image.shape[1:]
    low, high = min(height, width), max(height, width)
    if longest is not None and high / low * short > longest:
        short = round(longest * low / high)
    short = max(1, short)
    if short == low:
        return image, boxes
    long = int(short * high / low)
    size = [short, long] if height <= width else [long, short]
    return F.resize(image, size, antialias=True), F.resize(boxes, size)


def normalise(image):
    """(3, H, W) uint8 -> float, so that ImageNet has mean 0 and deviation 1 in each channel."""
    mean = 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return image.float().sub_(mean).div_(std)


# ----------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------

class Steps:
    """Which items make up each step: a function of (seed, step), wherever a run starts.

    One endless row of epochs, each a permutation of the data set, is cut into global batches of
    batch_size * world; of each, this rank takes every world-th item. A batch may straddle epochs,
    or hold several of a tiny data set.
    """

    def __init__(self, length, batch_size, steps, start, seed, rank, world):
        self.length, self.batch_size = length, batch_size
        self.steps, self.start, self.seed = steps, start, seed
        self.rank, self.world = rank, world

    def __len__(self):
        return max(0, self.steps - self.start)

    def __iter__(self):
        @lru_cache(maxsize=2)
        def order(epoch):
            # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
            digest = hashlib.sha256(f"{self.seed}, {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return torch.randperm(self.length, generator=generator).tolist()

        together = self.batch_size * self.world
        for step in range(self.start, self.steps):
            first = step * together
            mine = range(first + self.rank, first + together, self.world)
            places = [divmod(number, self.length) for number in mine]
            yield [(epoch, order(epoch)[place]) for epoch, place in places]


def loader(dataset, batch_size, *, steps, start=0, seed=0, workers=0, rank=0, world=1):
    """Batches of training steps start..steps-1 (see Steps).

    batch_size is this rank's; workers are processes.
    """
    batches = Steps(len(dataset), batch_size, steps, start, seed, rank, world)
    return serve(dataset, batches, workers)


def eval_loader(dataset, batch_size, workers=0, rank=0, world=1):
    """Each image once, in order; rank r of `world` takes every world-th, from the r-th on."""
    mine = range(rank, len(dataset), world)
    batches = [list(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]
    return serve(dataset, batches, workers)


def serve(dataset, batches, workers):
    # A generator of its own: otherwise each pass draws from the global one, and a resumed run
    # would differ.
    return Loader(dataset, batch_sampler=batches, collate_fn=collate_shared, num_workers=workers,
                  worker_init_fn=apart, pin_memory=torch.cuda.is_available(),
                  generator=torch.Generator(), timeout=PATIENCE if workers else 0)


class Loader(DataLoader):
    """A DataLoader that never waits for ever: workers that hang or die end the run in one line."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            # An error inside a worker begins with "Caught" instead, and keeps its traceback.
            if not str(error).startswith("DataLoader "):
                raise
            reason = one_line(error.__cause__ or error)                  # the signal, if known
            raise OSError(f"loading images: {reason}; use fewer --workers, or 0") from error


class SharedMemoryFull(OneLine):
    """No room to hand a batch from a worker to the training process."""


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
        raise SharedMemoryFull(
            f"no shared memory for a batch of {shape} ({one_line(error)}); give /dev/shm "
            "more (docker run --shm-size), or use fewer --workers, or 0") from error


def apart(worker):
    """Ctrl-C, `timeout` and torchrun signal a whole process group: that is for the parent alone."""
    if hasattr(os, "setpgrp"):                                       # not on Windows
        os.setpgrp()


# ----------------------------------------------------------------------------------------------
# The toy KITTI, and evaluation
# ----------------------------------------------------------------------------------------------

def make_toy(root, seed=0, counts=None, workers=2):
    """Draw the procedural toy KITTI into `root`, unless it is there: see experiments/toy.py."""
    from experiments import toy
    toy.make(root, seed, counts, workers)


def coco_object(dataset, annotations):
    """A pycocotools COCO with the data set's images and categories.

    Annotation ids count from 1: COCOeval reads 0 as no match.
    """
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id, "height": height, "width": width}
                   for image_id, (height, width) in zip(dataset.ids, dataset.sizes)],
        "categories": [{"id": i, "name": name}
                       for i, name in zip(dataset.category_ids, dataset.classes)],
        "annotations": [note | {"id": number} for number, note in enumerate(annotations, 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_finite(detections, what):
    """Raise FloatingPointError when detections, {"scores", "boxes"}, are not finite.

    what: "image 7", for its line.
    """
    if not all(detections[key].isfinite().all() for key in ("scores", "boxes")):
        raise FloatingPointError(f"{what}: the model's detections are not finite: its weights are "
                                 "broken, or the precision is too low for it")


def evaluate(predictions, dataset):
    """COCO's box AP, by pycocotools, silently.

    predictions: one dict per image: image_id (int), scores (N,), labels (N,) 0..C-1, boxes (N, 4)
        as (x0, y0, x1, y1) in original pixels. An image without a dict counts as without
        detections. The best 100 per image count, as in COCO.
    Returns AP, AP50, AP75; APs, APm, APl (areas below 32^2, to 96^2, above, in original pixels);
    per_class {name: {AP, AP50}}: fractions 0..1, NaN where there is no object to find. Detections
    on ignored regions count neither way.
    Raises ValueError for an image twice or not in the data set, and for a label that is no class;
    FloatingPointError for scores or boxes that are not finite: pycocotools takes a box of NaN for a
    perfect hit.
    """
    judge = coco_eval(predictions, dataset)
    with contextlib.redirect_stdout(io.StringIO()):
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
    annotations, done, known = [], set(), set(dataset.ids)
    last = len(dataset.classes) - 1
    for answer in predictions:
        image_id = int(answer["image_id"])
        if image_id in done or image_id not in known:
            why = "there twice" if image_id in done else "not in the data set"
            raise ValueError(f"predictions: image {image_id} is {why}; give each image of the data "
                             "set once")
        done.add(image_id)
        check_finite(answer, f"image {image_id}")
        scores, labels = answer["scores"].tolist(), answer["labels"].tolist()
        if not all(0 <= label <= last for label in labels):
            raise ValueError(f"predictions: image {image_id} has a label outside 0..{last}")
        boxes = answer["boxes"].double().tolist()
        for score, label, (x0, y0, x1, y1) in zip(scores, labels, boxes):
            w, h = x1 - x0, y1 - y0
            annotations.append({
                "image_id": image_id, "category_id": dataset.category_ids[label], "score": score,
                "bbox": [x0, y0, w, h], "area": w * h, "iscrowd": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(dataset.coco, coco_object(dataset, annotations), "bbox")
    judge.params.maxDets = [MAX_DETECTIONS]
    return judge
