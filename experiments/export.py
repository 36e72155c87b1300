"""A checkpoint's weights alone as fp16 safetensors, or a program for ONNX Runtime.

    python train.py export --checkpoint runs/student --out student.safetensors
    python train.py export --checkpoint runs/student --out student.onnx

.safetensors: half the bytes, safe to publish; classes and figures are in its metadata.
.onnx: pictures in (uint8 RGB, B x H x W x 3, resized but not normalised), detections out (boxes
x0 y0 x1 y1 in pixels of that picture, scores, labels), post-processing inside; class names and size
are in its metadata. Written only if it agrees with PyTorch within 1e-4 on a picture.
experiments/detect.py runs it without torch.
"""
import argparse
import math
from pathlib import Path

import checkpoints
import train

# What is published of a checkpoint, in addition to its weights.
KEPT = ("detector", "config", "classes", "category_ids", "data", "metrics", "minutes", "step",
        "seed", "commit", "machine", "settings", "images")


def add_options(parser):
    """The options of `train.py export`."""
    parser.add_argument("--checkpoint", required=True, help=train.CHECKPOINT_HELP)
    parser.add_argument("--out", required=True, help="file ending in .safetensors or .onnx")
    for name, text in (
            ("size", "H,W in pixels of its pictures (default: what --image is resized to)"),
            ("batch", "pictures per call, or dynamic (default: 1)"),
            ("image", "the picture to check it on (default: the toy's)")):
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"of .onnx: {text}")
    parser.add_argument("--padding", action="store_true", default=argparse.SUPPRESS,
                        help="of .onnx: a second input, B x H x W, True outside of smaller "
                             "pictures")


def run(checkpoint, out, **of_program):
    """The command `export`.  of_program: options of deploy.export, which writes .onnx."""
    out = Path(out)
    if out.suffix == ".onnx":
        from experiments import deploy
        deploy.export(checkpoint, out, **of_program)
        return
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: want a name ending in .safetensors or .onnx")
    if of_program:
        raise ValueError(f"--{next(iter(of_program))} is an option of .onnx, not of {out}")
    model, payload = train.load_model(checkpoint)
    kept = {name: payload[name] for name in KEPT if name in payload}
    # Published weights do not tell where files lay on the machine that made them.
    kept["settings"] = {name: value for name, value in payload["settings"].items()
                        if name not in train.PLACES}
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(out, {"model": model.state_dict(), **kept}, half=True)
    ap = payload["metrics"].get("AP")
    ap = math.nan if ap is None else ap
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, AP {ap:.3f} before rounding to fp16")
