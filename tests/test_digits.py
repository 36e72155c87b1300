"""experiments/digits.py: the third set of pictures."""
import numpy as np

import data
from experiments import digits


def test_digits_are_read_as_drawn_and_no_split_has_those_of_another(tmp_path):
    """Two classes. The first two samples of each, for `train`, are tall bars; the last two, for `val`, lie flat."""
    samples = np.zeros((2, 4, 28, 28))
    samples[:, :2, 3:25, 11:17] = 255
    samples[:, 2:, 11:17, 3:25] = 255
    splits = {"train": (3, 0, 2), "val": (2, 2, 4)}
    for copy in "ab":
        digits.make(tmp_path / copy, samples.reshape(2, 4, 784), splits)
    for split, tall in (("train", True), ("val", False)):
        dataset = data.build("coco", tmp_path / "a", split)
        assert len(dataset) == splits[split][0] and list(dataset.classes) == ["0", "1"]
        boxes = np.concatenate([target["boxes"] for _, target in dataset])          # cx, cy, w, h
        assert len(boxes) and ((boxes[:, 3] > boxes[:, 2]) == tall).all()
        assert (boxes[:, :2] - boxes[:, 2:] / 2 >= -1e-6).all() and (boxes[:, :2] + boxes[:, 2:] / 2 <= 1 + 1e-6).all()
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7                                                           # 5 pictures, 2 lists
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
