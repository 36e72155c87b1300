"""Pictures are checked by eye; here: each function returns a Figure that saves, counts right, leaves its inputs be."""
import copy
import io
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import plots

CLASSES = ["Car", "Pedestrian", "Cyclist"]
SHAPES = [(6, 20), (3, 10), (2, 5)]                                      # of a 48 x 160 image


def scene(objects=3):
    """Image, truth and a result that finds object 0, misses the rest, and has false alarms of three kinds."""
    image = torch.rand(3, 48, 160, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10., 20, 30, 40], [60, 10, 70, 40], [100, 20, 120, 44]])[:objects]
    truth = {"labels": torch.arange(objects), "boxes": boxes, "ignore": torch.tensor([[130., 0, 160, 48]])}
    result = {"scores": torch.tensor([.9, .8, .7, .6, .3]), "labels": torch.tensor([0, 0, 2, 1, 1]),
              "boxes": torch.tensor([[11., 20, 30, 41], [10, 20, 31, 40],     # right; the same object once more
                                     [60, 10, 70, 40],                        # right place, wrong class
                                     [140, 10, 150, 30],                      # in the ignored region: not judged
                                     [60, 10, 70, 40]])}                      # right, but too weak to be drawn
    return image, truth, result


def nothing():
    return {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}


def masks(boxes):
    made = []
    for height, width in SHAPES:
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[1, :len(boxes)] = True
        made.append((inside, torch.where(inside, 1.0, 1 / (~inside).sum())))
    return made


def attention(queries):
    return torch.rand(queries, 4, 3, 2, 2), torch.rand(queries, 4, 3, 2).flatten(2).softmax(-1).view(queries, 4, 3, 2)


def pictures(objects, found):
    """name of a function -> (number of axes it should draw, its arguments)."""
    image, truth, result = scene(objects)
    result = result if found else nothing()
    cells = sum(h * w for h, w in SHAPES)
    memory = torch.randn(cells, 8), torch.randn(cells, 8).bfloat16().requires_grad_()
    history = {"teacher": 0.5, "student alone": [(0, .1), (9, float("nan"))], "rival": [(0, [.1, .2]), (9, [.2, .4])]}
    terms = {f"loss_{i}": [(step, 1 / (1 + step)) for step in range(90)] for i in range(9)} | {"memory": [(3, .1)]}
    both = {"teacher": attention(objects), "distilled student": attention(objects)}
    models = {"teacher": [result] * 2, "student": [result] * 2}
    return {"detections": (2 * 3, ([image] * 2, [truth] * 2, models, CLASSES)),
            "location_masks": (4 + 1, (image, truth["boxes"], masks(truth["boxes"]))),
            "memory_error": (4 + 1, (image, *memory, SHAPES, truth["boxes"], torch.arange(cells) % 5 == 0)),
            "query_attention": (max(2 * min(objects, 3), 2), (image, truth["boxes"], both)),
            "curves": (1, (history if found else {},)),
            "losses": (2, (terms if found else {},)),
            "first": (4, (image, truth, masks(truth["boxes"])[0], result, nothing(), CLASSES)),
            "predictions": (1, (image, result, CLASSES))}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a


@pytest.mark.parametrize("objects, found", [(3, True), (3, False), (0, True), (0, False)])
@pytest.mark.parametrize("name", list(pictures(0, False)))
def test_a_figure_with_the_expected_axes_saves_and_leaves_inputs_alone(name, objects, found):
    axes, arguments = pictures(objects, found)[name]
    before = copy.deepcopy([a.detach() if isinstance(a, torch.Tensor) else a for a in arguments])
    start = time.process_time()
    figure = getattr(plots, name)(*arguments)
    figure.savefig(file := io.BytesIO(), format="png")
    assert time.process_time() - start < 3
    assert isinstance(figure, Figure) and len(figure.axes) == axes
    assert file.getvalue().startswith(b"\x89PNG")
    assert equal(before, [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments])


def test_found_missed_and_false_by_hand():
    """One of three found; its double and the wrong class are false; ignored and weak ones do not count."""
    image, truth, result = scene()
    figure = plots.detections([image], [truth], {"student": [result], "teacher": [nothing()]}, CLASSES)
    assert [axes.get_title().split("\n")[1] for axes in figure.axes] == [
        "3 objects", "1 found, 2 missed, 2 false", "0 found, 3 missed, 0 false"]


def test_location_masks_name_the_share_of_the_objects():
    """3 objects of weight 1 beside a background of weight 1: 75 % on 3 of 120 cells."""
    image, truth, _ = scene()
    figure = plots.location_masks(image, truth["boxes"], masks(truth["boxes"]))
    assert figure.axes[1].get_title() == "level 0, 20 x 6 cells; objects: 2.5% of the cells, 75% of S"


def test_query_attention_counts_the_weight_inside_the_box():
    """One point of weight 3/4 in the middle of the box, the others in opposite corners of the image."""
    points = torch.tensor([[20 / 160, 30 / 48], [0., 0.], [1., 1.]]).view(1, 1, 1, 3, 2)
    image, truth, _ = scene(1)
    weights = torch.tensor([.75, .15, .1]).view(1, 1, 1, 3)
    figure = plots.query_attention(image, truth["boxes"], {"teacher": (points, weights)})
    assert figure.axes[0].get_title() == "teacher: 75% inside the box"


@pytest.mark.parametrize("width, height, zoom", [(1242, 375, 1), (1241, 374, 1), (160, 48, 6)])
def test_predictions_keep_the_image_s_own_pixels(width, height, zoom):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    plots.predictions(image, nothing(), CLASSES).savefig(file := io.BytesIO(), format="png")
    saved = Image.open(file).convert("RGB")
    assert saved.size == (width * zoom, height * zoom)
    if zoom == 1:
        assert np.abs(np.asarray(saved).astype(int) - np.asarray(image)).max() <= 1


def test_a_model_has_one_colour_and_memory_sizes_must_agree():
    assert plots.model_style("distilled student")["color"] == plots.DISTILLED
    assert plots.model_style("Student alone")["color"] == plots.STUDENT
    assert plots.model_style("FGD", 1) != plots.model_style("MGD", 2)
    with pytest.raises(ValueError, match="memory"):
        plots.memory_error(torch.rand(3, 48, 160), torch.rand(5, 8), torch.rand(5, 8), SHAPES)
