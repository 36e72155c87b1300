"""Draw and list the detections of image files.

    python train.py predict --checkpoint runs/student IMAGE...       files, or folders of images

Writes OUT/000_NAME.png, 001_.., one picture per image, and predictions.json, which lists what is
drawn: boxes are x0 y0 x1 y1 in pixels.
"""
import os
from pathlib import Path

import torch
from torchvision.ops import clip_boxes_to_image
from tqdm import tqdm

import data
import train
from checkpoints import write_json
from experiments import plots


def image_files(names):
    """Files as they are given, and the images of folders in the order of their names."""
    files = []
    for name in map(Path, names):
        if name.is_dir():
            inside = sorted(p for p in name.iterdir() if p.suffix.lower() in data.IMAGE_SUFFIXES
                            and not p.name.startswith("._"))          # macOS's shadows of files
            if not inside:
                raise ValueError(f"{name}: holds no image ({', '.join(data.IMAGE_SUFFIXES)})")
            files += inside
        elif not name.exists():
            raise FileNotFoundError(f"no image at {name}: check the path")
        else:
            files.append(name)
    return files


def read_images(files, title, broken, unresized):
    """Yield (position, file, picture (3, H, W) uint8). Errors of broken files join `broken`.

    unresized: whether a detector of the toy reads them as they are. A line at the end tells of
    pictures that are far larger than those it was trained on.
    """
    large = 0
    for index, file in enumerate(tqdm(files, title, mininterval=train.quiet_interval())):
        try:
            picture = data.read_image(file)
        except (data.BrokenImage, data.MissingImage) as error:          # missing: a dangling link
            broken.append(str(error))
            continue
        yield index, file, picture
        large += picture.shape[1] > 2 * 48
    if unresized and large:
        print(f"note: {large} of {len(files)} pictures far larger than the toy's 160 x 48 pixels, "
              "on which the detector was trained; --size 48,160 resizes them")


def numbered(index, file):
    """What a picture's files are called: its number, and its name as far as names may be long."""
    stem = os.fsencode(Path(file).stem)[:150].decode(errors="ignore")
    return f"{index:03d}_{stem}"


def add_options(parser):
    """The options of `train.py predict`."""
    parser.add_argument("--checkpoint", required=True, help=train.CHECKPOINT_HELP)
    add_image_options(parser, "runs/predict")
    parser.add_argument("--min-score", type=float, default=0.4,
                        help="leave out detections of a lower score (default: %(default)s)")


def add_image_options(parser, folder):
    """The options of a command that reads image files and writes into a folder."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file, or a folder of images")
    parser.add_argument("--out", default=folder, help="folder (default: %(default)s)")
    train.add_options(parser, train.Config, only=("size", "precision"))
    train.add_options(parser, train.Run, only=("device",))


def run(checkpoint, images, out, min_score, size=None, device="auto", precision="fp32"):
    """The command `predict`.

    Raises ValueError after the last image when files could not be read; those are left out.
    """
    if not 0 <= min_score <= 1:
        raise ValueError(f"--min-score {min_score}: want 0 to 1")
    model, payload = train.load_model(checkpoint)
    device, out, classes = train.pick_device(device), Path(out), payload["classes"]
    model = model.to(device)
    size = train.input_size(payload, size)
    out.mkdir(parents=True, exist_ok=True)
    files, listed, broken = image_files(images), [], []
    try:
        for index, file, picture in read_images(files, "predict", broken, size is None):
            # One image is a batch without padding.
            image, sides = data.prepare(picture, size), picture.shape[1:]
            batch = data.collate([(image, {"image_id": index, "orig_size": torch.tensor(sides)})])
            found, = train.answer(model, batch.to(device), precision)
            found["boxes"] = clip_boxes_to_image(found["boxes"], tuple(sides))
            # Pictures are numbered: never the input itself, nor one name twice.
            drawn = out / f"{numbered(index, file)}.png"
            plots.predictions(picture, found, classes, min_score).savefig(drawn)
            # The JSON lists what is drawn: what is sure enough.
            sure = found["scores"] >= min_score
            columns = (found[key][sure].tolist() for key in ("labels", "scores", "boxes"))
            listed.append({"image": str(file), "drawn": drawn.name, "detections": [
                {"class": classes[label], "score": round(score, 4), "box": [round(x, 1) for x in box]}
                for label, score, box in zip(*columns)]})
    finally:                                   # what was found is kept, also by Ctrl-C
        if listed:
            write_json(out / "predictions.json", listed)
    if listed:
        count = sum(len(entry["detections"]) for entry in listed)
        print(f"{count} detections of score {min_score:g} or more in {len(listed)} images: {out}/"
              "predictions.json (boxes x0 y0 x1 y1 in pixels) and pictures beside it")
    if broken:
        raise ValueError(f"left out {len(broken)} of {len(files)} files: {'; '.join(broken)}")
