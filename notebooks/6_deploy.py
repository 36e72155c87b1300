# %% [markdown]
# # 6 From a checkpoint to a program without torch
#
# A small student is trained for a small machine, which has no PyTorch. This notebook takes the
# shipped distilled student, writes it as **one ONNX file**, and reads that file with a program of
# thirty lines that knows only numpy, Pillow and ONNX Runtime. You need `pip install onnx onnxscript
# onnxruntime`.

# %%
import os
import sys
if os.path.basename(os.getcwd()) == "notebooks":        # the modules are files, not a package
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %%
import json
import subprocess
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image as Shown

import data
import train
from experiments import deploy

checkpoint, folder = "weights/toy_distilled_dino.safetensors", Path("runs/deploy-notebook")
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## One file
#
# The same as `python train.py export --checkpoint weights/toy_distilled_dino.safetensors --out
# student.onnx`. The file is written only after ONNX Runtime and PyTorch have answered a picture
# alike, to 1e-4.
#
# It holds everything from pixels to boxes: the normalisation before the detector and the
# post-processing behind it. What it reads and what its labels mean is written in its metadata.

# %%
difference = deploy.export(checkpoint, folder / "student.onnx")
facts = deploy.open_session(str(folder / "student.onnx")).get_modelmeta().custom_metadata_map
for key, value in facts.items():
    print(f"{key:<14}{value}")
assert difference < 1e-5 and json.loads(facts["size"]) == [48, 160]

# %% [markdown]
# ## Thirty lines without torch

# %%
PROGRAM = """
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

program, photo, out = sys.argv[1:]

# The file says what it reads and what its labels mean.
session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
height, width = json.loads(facts["size"])
classes = json.loads(facts["classes"])

# Resize, ask, and go back to the pixels of the photo.
image = Image.open(photo).convert("RGB")
small = image.resize((width, height), Image.Resampling.BILINEAR)
boxes, scores, labels = session.run(None, {"images": np.array(small)[None]})
boxes = boxes[0] * np.tile([image.width / width, image.height / height], 2)

# Draw what is sure enough, five times as large.
drawn = image.resize((5 * image.width, 5 * image.height))
pen = ImageDraw.Draw(drawn)
for box, score, label in zip(5 * boxes, scores[0], labels[0]):
    if score >= 0.4:
        pen.rectangle(box.tolist(), outline="yellow", width=2)
        pen.text(box[:2] + 3, f"{classes[label]} {score:.2f}", fill="yellow")
drawn.save(out)
np.savez(out + ".npz", boxes=boxes, scores=scores[0], labels=labels[0])
""".lstrip()
(folder / "detect.py").write_text(PROGRAM)
lines = [line for line in PROGRAM.splitlines() if line and not line.startswith("#")]
print(len(lines), "lines of code")
assert len(lines) <= 30

# %% [markdown]
# It runs in a process of its own in which importing torch is an error. The picture is the first
# validation scene with four or more objects.

# %%
scenes = data.build("toy", "datasets/toy", "val")
index = next(i for i in range(len(scenes)) if len(scenes[i][1]["labels"]) >= 4)


def detect(program, out):
    """Run the thirty lines without torch -> their detections."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1))"
    words = [folder / "detect.py", folder / program, scenes.paths[index], folder / out]
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)
    return dict(np.load(folder / f"{out}.npz"))


found = detect("student.onnx", "student.png")
Shown(folder / "student.png")

# %% [markdown]
# **Claim.** These are PyTorch's detections: the same classes, scores and boxes.

# %%
model, _ = train.load_model(checkpoint)
result, = train.answer(model, data.collate([scenes[index]]))
keys = "boxes", "scores", "labels"
pair = [[np.asarray(side[key])[None] for key in keys] for side in (found, result)]
apart = deploy.disagreement(*pair, scenes.sizes[index])
sure = found["scores"] >= 0.4
print(f"{sure.sum()} sure detections; scores and boxes (as fractions) differ by {apart:.1e}")
assert apart < 1e-4 and sure.any()

# %% [markdown]
# ## Eight bits
#
# ONNX Runtime's own quantisation stores the weights of convolutions and linear layers as 8-bit
# integers. It reads the range of their inputs from training images; all other operators keep 32
# bits.
#
# **Claim.** The file is less than half as large, and the thirty lines read it as they are. On all 500
# validation images this student has AP .422 in 32 bits and .418 in 8 (one run;
# [results/deploy/toy.md](../results/deploy/toy.md)).

# %%
training = data.build("toy", "datasets/toy", "train")
views = deploy.views(training, (48, 160), range(0, len(training), len(training) // 50))
operators = deploy.quantise(folder / "student.onnx", folder / "student.int8.onnx", views)
sizes = [(folder / name).stat().st_size / 1e6 for name in ("student.onnx", "student.int8.onnx")]
print(f"in 8 bits: {operators}; {sizes[0]:.2f} MB -> {sizes[1]:.2f} MB")
assert sizes[1] < sizes[0] / 2

found = detect("student.int8.onnx", "int8.png")
Shown(folder / "int8.png")
