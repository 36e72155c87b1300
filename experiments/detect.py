"""All detections of one photo, weak ones too; needs numpy, Pillow and onnxruntime, and nothing else.

    python detect.py student.onnx PHOTO.jpg

The program is made by `train.py export`, without --padding and for one image. A photo of another
shape than the program's is stretched to it.
"""
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) != 3:
    sys.exit(__doc__)
program, photo = sys.argv[1:]

# The file says what it reads and what its labels mean.
session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
height, width = json.loads(facts["size"])
classes = json.loads(facts["classes"])

# Turn as the camera says, resize, ask, and go back to the pixels of the photo.
image = ImageOps.exif_transpose(Image.open(photo))
if image.mode[:1] in "IF":                         # whose values Pillow would cut off
    sys.exit(f"{photo}: pixels of mode {image.mode}; convert it to 8 bits a channel")
small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
boxes, scores, labels = session.run(None, {"images": np.array(small)[None]})
boxes = boxes[0] * np.tile([image.width / width, image.height / height], 2)

# Write the detections, best first.
for box, score, label in zip(boxes, scores[0], labels[0]):
    print(json.dumps({"class": classes[label], "score": float(score), "box": box.tolist()}))
