"""Pictures are checked by eye; here: each Figure saves, counts right, leaves its inputs alone."""
import copy
import io
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

import attention
from experiments import plots

CLASSES = ["Car", "Pedestrian", "Cyclist"]
SHAPES = [(6, 20), (3, 10), (2, 5)]                                      # of a 48 x 160 image


def scene(objects=3):
    """Image, truth and a result: object 0 found, the rest missed, false alarms of three kinds."""
    image = torch.rand(3, 48, 160, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10., 20, 30, 40], [60, 10, 70, 40], [100, 20, 120, 44]])[:objects]
    truth = {"labels": torch.arange(objects), "boxes": boxes,
             "ignore": torch.tensor([[130., 0, 160, 48]])}
    result = {"scores": torch.tensor([.9, .8, .7, .6, .3]), "labels": torch.tensor([0, 0, 2, 1, 1]),
              # The first is right, the second the same object once more.
              "boxes": torch.tensor([[11., 20, 30, 41], [10, 20, 31, 40],
                                     # The place is right, the class wrong.
                                     [60, 10, 70, 40],
                                     # In the ignored region nothing is judged.
                                     [140, 10, 150, 30],
                                     # This one is right, but too weak to be drawn.
                                     [60, 10, 70, 40]])}
    return image, truth, result


def nothing():
    return {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long),
            "boxes": torch.zeros(0, 4)}


def masks(boxes):
    made = []
    for height, width in SHAPES:
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[1, :len(boxes)] = True
        made.append((inside, torch.where(inside, 1.0, 1 / (~inside).sum())))
    return made


def sampled(queries, boxes=None, references=None):
    """A look of 4 heads at 3 levels, 2 points each."""
    weights = torch.rand(queries, 4, 3, 2).flatten(2).softmax(-1).view(queries, 4, 3, 2)
    return {"places": torch.rand(queries, 4, 3, 2, 2), "weights": weights, "boxes": boxes,
            "references": references}


def dense(queries, boxes=None):
    """A look of 4 heads at 6 x 20 cells, without references."""
    return {"places": SHAPES[0], "weights": torch.rand(queries, 4, 120).softmax(-1), "boxes": boxes,
            "references": None}


def pictures(objects, found):
    """name of a function -> (number of axes it should draw, its arguments)."""
    image, truth, result = scene(objects)
    result = result if found else nothing()
    memory = torch.randn(120, 8), torch.randn(120, 8).bfloat16().requires_grad_()
    history = {"teacher": 0.5, "student alone": [(0, .1), (9, float("nan"))],
               "rival": [(0, [.1, .2]), (9, [.2, .4])]}
    steps = list(range(90)) if found else []
    terms = {f"loss_{i}": [1 / (1 + step) for step in steps] for i in range(9)}
    terms["memory"] = [.1 * (step == 3) for step in steps]
    boxes = truth["boxes"]
    looks = {"teacher": sampled(objects, boxes, boxes[:, :2]),
             "distilled student": dense(objects, boxes + 1)}
    among = {f"layer {i}": torch.rand(4, objects, objects).softmax(-1) for i in range(4)}
    models = {"teacher": [result] * 2, "student": [result] * 2}
    off = {"AP": {"toy": {"a": {"teacher": 0.}}}, "x": {"toy": {"a": {}}}}
    answers = {"DINO": {"label": dict.fromkeys(["own", "another's", "noise"], .5)}}
    pair = {"student": {0: .1}, "distilled": {0: .2}, "teacher": .5}
    return {"detections": (2 * 3, ([image] * 2, [truth] * 2, models, CLASSES)),
            "location_masks": (4 + 1, (image, truth["boxes"], masks(truth["boxes"]))),
            "joined_boxes": (1, (image, {"a": {"teacher": boxes, "student": boxes + 5}}, "Title")),
            "query_attention": (2 * max(objects, 1) + (objects > 0),
                                (image, looks, ["a", "b", "c"], (6, 20))),
            "around_object": (3 + (objects > 0), (
                {f"student {i}": {"image": image, "truth": box, "answer": box + 1,
                                  "heat": torch.rand(6, 20)} for i, box in enumerate(boxes)},
                "Title")),
            "self_attention": (6 + 1, (among, None, ["a", "", "c"][:objects] if found else ())),
            "curves": (1, (history if found else {},)),
            "losses": (2, (steps, terms if found else {})),
            "paired": (1, ({"DINO": pair} if found else {}, "AP", "Title")),
            "reading": (1, (answers if found else {},)),
            "dots": (2 if found else 1, (off if found else {}, "Title")),
            "stacked": (1, ({"a": {"memory": 1.}, "b": {}} if found else {}, "part", "Title")),
            "lines": (2 if found else 1, ({"a": {"memory": [1., .5]},
                                           "b": {"cls": (boxes[:, 0], boxes[:, 1])}}
                                          if found else {}, "step", "loss", "Title")),
            "latency": (1, ([{"detector": "dino", "role": "teacher", "format": "PyTorch",
                              "AP": 0., "ms_1": {"median": 1.}}] if found else [],)),
            "numbers": (2 if found else 1, ({"a": (torch.rand(2, 3), "{:.2f}".format),
                                             "b": (torch.zeros(1, 1), str)}
                                            if found else {}, "Title")),
            "first": (4, (image, truth, masks(truth["boxes"])[0], result, nothing(), CLASSES)),
            "method_drawing": (1, ()),
            "wiring_drawing": (1, ()),
            "deployment_drawing": (1, ()),
            "memory_colours": (3, (image, boxes, {"teacher": memory[1].detach(),
                                                  "student": memory[0]}, (6, 20), "Title")),
            "predictions": (1, (image, result, CLASSES))}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def dots(axes):
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines
            if line.get_marker() != "None"]


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
    figure.savefig(file := io.BytesIO(), format="png", dpi=50)
    assert time.process_time() - start < 3
    assert isinstance(figure, Figure) and len(figure.axes) == axes
    assert file.getvalue().startswith(b"\x89PNG")
    assert equal(before, [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments])


def test_found_missed_and_false_by_hand():
    """One of three found; its double and the wrong class are false; ignored, weak: not counted."""
    image, truth, result = scene()
    figure = plots.detections([image], [truth], {"student": [result], "teacher": [nothing()]},
                              CLASSES)
    # One scene: two panels a row, the last is blank.
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]
    assert [axes.get_title().split("\n")[1] for axes in figure.axes[:3]] == [
        "3 objects", "1 found, 2 missed, 2 false", "0 found, 3 missed, 0 false"]


def test_location_masks_name_the_share_of_the_objects():
    """3 objects of weight 1 beside a background of weight 1: 75 % on 3 of 120 cells."""
    image, truth, _ = scene()
    figure = plots.location_masks(image, truth["boxes"], masks(truth["boxes"]))
    title = figure.axes[1].get_title()
    assert title == "level 0, 20 x 6 cells; objects: 2.5% of the cells, 75% of S"


def test_ground_truth_alone_has_no_legend_of_judgements():
    image, truth, _ = scene(1)
    truth["references"] = torch.tensor([[12., 20, 30, 38]])
    figure = plots.detections([image], [truth], {}, CLASSES)
    assert figure.axes[0].get_title() == "ground truth\n1 object" and len(figure.axes) == 1
    assert legend(figure) == [*CLASSES, "reference", "ignored"]
    assert [patch.get_bbox().extents.tolist() for patch in figure.axes[0].patches] == [
        [130, 0, 160, 48], [10, 20, 30, 40], [12, 20, 30, 38]]


def test_joined_boxes_have_a_numbered_line_from_model_to_model():
    image, truth, _ = scene(1)                                             # x 10..30, y 20..40
    moved = truth["boxes"] + torch.tensor([40., 0, 40, 0])
    (axes,) = plots.joined_boxes(image, {"asked": {"teacher": truth["boxes"], "student": moved}},
                                 "Title").axes
    (line,), (number,) = axes.lines, axes.texts
    assert line.get_xydata().tolist() == [[20, 30], [60, 30]]              # centre to centre
    assert number.get_text() == "0" and number.get_position() == (20, 17)   # above the first box


def one_point(*points, weights=None):
    """A look of one query with one head at one level, at these points of equal weight."""
    places = torch.tensor(points).view(1, 1, 1, -1, 2)
    return places, torch.tensor(weights or [1 / len(points)] * len(points)).view(1, 1, 1, -1)


def test_attention_mass_of_a_point_goes_to_the_cells_whose_centres_surround_it():
    """Of 2 x 4 cells, x centres are 1/8, 3/8, 5/8, 7/8 and y centres 1/4, 3/4."""
    expected = torch.zeros(2, 4)
    expected[1, 2] = 1                                                     # in the centre of a cell
    torch.testing.assert_close(plots.attention_mass(*one_point((.625, .75)), 2, 4)[0], expected)
    expected[1, 2], expected[1, 3] = .5, .5                                # between two
    torch.testing.assert_close(plots.attention_mass(*one_point((.75, .75)), 2, 4)[0], expected)
    # A quarter of the way, on both axes.
    expected = torch.zeros(2, 4)
    expected[0, 0], expected[0, 1], expected[1, 0], expected[1, 1] = 9 / 16, 3 / 16, 3 / 16, 1 / 16
    torch.testing.assert_close(plots.attention_mass(*one_point((.1875, .375)), 2, 4)[0], expected)


def test_attention_mass_outside_the_image_is_lost_and_at_its_edge_it_is_not():
    places, weights = one_point((-.01, .5), (.5, 1.01), (0., 0.), (1., 1.),
                                weights=[.5, .2, .1, .2])
    expected = torch.zeros(2, 4)
    # The sum, .3, is what falls on the image.
    expected[0, 0], expected[1, 3] = .1, .2
    torch.testing.assert_close(plots.attention_mass(places, weights, 2, 4)[0], expected)


def test_attention_mass_is_what_deformable_attention_takes_from_each_token():
    """Oracle: with unit vectors as values attention.py returns each token's share."""
    # All places are at least half a cell inside.
    places = torch.rand(1, 5, 2, 1, 3, 2, generator=torch.Generator().manual_seed(0)) * .8 + .1
    weights = torch.rand(1, 5, 2, 1, 3).flatten(3).softmax(-1).view(1, 5, 2, 1, 3)
    # There are 5 x 10 tokens, for 2 heads.
    tokens = torch.eye(50)[None, :, None].expand(1, 50, 2, 50)
    taken = attention.deformable_sample(tokens, [(5, 10)], places, weights)
    taken = taken.view(5, 2, 5, 10).mean(1)
    torch.testing.assert_close(plots.attention_mass(places[0], weights[0], 5, 10), taken)


def test_dense_attention_mass_is_spread_over_the_cells():
    # One query, two heads, 1 x 2 cells: .25, .75.
    weights = torch.tensor([[[.5, .5], [0., 1.]]])
    for grid, expected in (((1, 4), [[.125, .125, .375, .375]]), ((1, 1), [[1.]]),
                           ((1, 3), [[1 / 6, 1 / 3, 1 / 2]]),
                           ((2, 2), [[.125, .375], [.125, .375]])):
        torch.testing.assert_close(plots.attention_mass((1, 2), weights, *grid)[0],
                                   torch.tensor(expected))


def test_attention_mass_in_a_padded_batch_is_that_of_the_image_alone():
    """Padding doubles the width: places, fractions of the padded image, halve; the right half is
    empty."""
    one = sampled(3)
    # At least half a cell from the edges.
    places = one["places"] * .8 + .1
    padded = plots.attention_mass(places * torch.tensor([.5, 1.]), one["weights"], 4, 16)
    torch.testing.assert_close(padded[..., :8], plots.attention_mass(places, one["weights"], 4, 8))
    assert padded[..., 8:].abs().max() == 0


def test_no_queries_give_no_maps():
    none = sampled(0)
    assert plots.attention_mass(none["places"], none["weights"], 4, 8).shape == (0, 4, 8)
    assert plots.attention_mass((6, 20), dense(0)["weights"], 4, 8).shape == (0, 4, 8)
    assert plots.agreement(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8)).shape == (0,)
    assert plots.even_mass(torch.zeros(0, 4), (160, 48), 4, 8).shape == (0, 4, 8)


def test_agreement_of_the_same_of_apart_and_by_hand():
    a, b = torch.tensor([[.5, .5, 0, 0]]), torch.tensor([[0, 0, .5, .5]])
    c = torch.tensor([[.25, .25, .25, .25]])
    # The scale of a map does not matter.
    assert plots.agreement(a, a / 4) == 1 and plots.agreement(a, b) == 0
    assert plots.agreement(a, c) == .5
    assert plots.agreement(a, torch.zeros(1, 4)) == 0                      # all of it fell outside
    pairs = plots.agreement(torch.stack([a, b, c])[:, None], torch.stack([a, b, c]))
    torch.testing.assert_close(pairs, torch.tensor([[1, 0, .5], [0, 1, .5], [.5, .5, 1]]))
    with pytest.raises(ValueError, match="one grid"):
        plots.agreement(a, torch.zeros(2, 4))


def test_an_even_look_over_a_box_by_hand():
    """A box of 1 1/2 by 1 cells, and one that is half outside the image."""
    maps = plots.even_mass(torch.tensor([[4., 0, 16, 8], [-8, 0, 8, 8]]), (32, 8), 1, 4)
    torch.testing.assert_close(maps, torch.tensor([[[1 / 3, 2 / 3, 0, 0]], [[.5, 0, 0, 0]]]))


def test_a_look_has_the_queries_first_and_those_asked_for():
    points, weights = torch.rand(2, 5, 4, 3, 2, 2), torch.rand(2, 5, 4, 3, 2)
    boxes = torch.rand(5, 4)
    found = plots.look(SimpleNamespace(points=points, weights=weights), SHAPES, [3, 1], boxes,
                       image=1)
    assert torch.equal(found["places"], points[1, [3, 1]])
    assert torch.equal(found["weights"], weights[1, [3, 1]])
    assert torch.equal(found["boxes"], boxes[[3, 1]]) and found["references"] is None
    # Dense: (batch, heads, queries, keys).
    weights = torch.rand(2, 4, 5, 120)
    found = plots.look(SimpleNamespace(points=None, weights=weights), SHAPES[:1],
                       torch.tensor([3, 1]))
    assert found["places"] == (6, 20)
    assert torch.equal(found["weights"], weights[0, :, [3, 1]].transpose(0, 1))
    with pytest.raises(ValueError, match="self_attention"):
        plots.look(SimpleNamespace(points=None, weights=torch.rand(1, 4, 5, 5)), SHAPES[:1])


def test_the_head_of_a_look_is_that_of_one_query():
    for one in (sampled(3, torch.rand(3, 4)), dense(3, torch.rand(3, 4))):
        heads = plots.heads_apart(one, 1)
        assert list(heads) == ["head 0", "head 1", "head 2", "head 3"]
        assert torch.equal(heads["head 2"]["weights"], one["weights"][1:2, 2:3])
        assert torch.equal(heads["head 2"]["boxes"], one["boxes"][1:2])
    one = sampled(3)
    assert torch.equal(plots.heads_apart(one, 1)["head 2"]["places"], one["places"][1:2, 2:3])


def test_query_attention_counts_the_weight_inside_the_box():
    """One point of weight 3/4 in the middle of the box, the others in corners of the image."""
    # The box is x 10..30, y 20..40 of 160 x 48.
    image, truth, _ = scene(1)
    places, weights = one_point((20 / 160, 30 / 48), (0., 0.), (1., 1.), weights=[.75, .15, .1])
    one = {"places": places, "weights": weights, "boxes": truth["boxes"], "references": None}
    figure = plots.query_attention(image, {"teacher": one})
    assert figure.axes[0].get_title() == "teacher\n75% in the box"
    assert sum(len(dots.get_offsets()) for dots in figure.axes[0].collections) == 3
    weights = torch.zeros(1, 1, 120)
    # Cells x, y 24..32: 6/8 inside; 16..24: half.
    weights[0, 0, 3 * 20 + 3] = weights[0, 0, 2 * 20 + 2] = .5
    one |= {"places": (6, 20), "weights": weights}
    figure = plots.query_attention(image, {"student": one})
    assert figure.axes[0].get_title() == "student\n62% in the box"        # (6/8 + 4/8) / 2


def test_query_attention_says_how_far_the_columns_agree():
    image, truth, _ = scene(1)
    one = {"places": one_point((.1, .6))[0], "weights": one_point((.1, .6))[1],
           "boxes": truth["boxes"], "references": None}
    # IoU 10 * 10 / 700
    far = one | {"places": one["places"] + .3, "boxes": truth["boxes"] + 10}
    figure = plots.query_attention(image, {"teacher": one, "student": one, "far": far}, ["Car"],
                                   (6, 20))
    assert [axes.get_title().split("\n")[-1] for axes in figure.axes[:3]] == [
        "100% in the box", "100% in the box, agrees 1.00", "0% in the box, agrees 0.00 (IoU 0.14)"]
    assert figure.axes[0].get_ylabel() == "Car" and "uniform attention" in figure.get_suptitle()


def test_heat_around_an_object_is_bare_where_attention_is_even():
    """Of 2 x 4 cells one has half of the attention, 4 times an even spread, the others 4/7."""
    image, truth, _ = scene(1)
    box = truth["boxes"][0]
    heat = torch.full((2, 4), .5 / 7)
    heat[1, 2] = .5
    figure = plots.around_object({"the scene": {"image": image, "truth": box},
                                  "student": {"image": image, "truth": box, "heat": heat,
                                              "answer": box}}, "Title")
    scene_, student = figure.axes[:2]
    drawn = student.images[1]
    assert drawn.get_array()[1, 2] == 4 and drawn.get_alpha()[1, 2] == pytest.approx(0.9)
    assert (drawn.get_alpha() > 0).sum() == 1
    assert len(scene_.images) == 1 and len(student.patches) == 2           # true and answered box
    assert to_hex(student.patches[0].get_edgecolor()).upper() == plots.STUDENT
    (left, right), (bottom, top) = student.get_xlim(), student.get_ylim()
    assert left <= box[0] and box[2] <= right and top <= box[1] and box[3] <= bottom


def test_windows_lie_in_the_image_and_show_boxes_and_references():
    image, truth, _ = scene(3)
    one = sampled(3, truth["boxes"], torch.tensor([[0., 0], [65., 25], [150., 47]]))
    axes = plots.query_attention(image, {"teacher": one}).axes[:3]
    for panel, box, point in zip(axes, truth["boxes"], one["references"]):
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        assert 0 <= left <= min(box[0], point[0]) and max(box[2], point[0]) <= right <= 160
        assert 0 <= top <= min(box[1], point[1]) and max(box[3], point[1]) <= bottom <= 48
    whole = plots.query_attention(image, {"teacher": one}, context=None).axes[0]
    assert whole.get_xlim() == (0, 160) and whole.get_ylim() == (48, 0)
    # Nothing to look for.
    assert plots.query_attention(image, {"teacher": sampled(1)}).axes[0].get_xlim() == (0, 160)


@pytest.mark.parametrize("heads, lines, axes", [(8, 3, 9), (4, 2, 4), (3, 1, 3)])
def test_heads_of_one_query_are_folded(heads, lines, axes):
    image, truth, _ = scene(1)
    figure = plots.query_attention(image, plots.heads_apart(dense(1, truth["boxes"]) | {
        "weights": torch.rand(1, heads, 120).softmax(-1)}, 0))
    rows = {round(axes.get_position().y0, 3) for axes in figure.axes[:heads]}
    assert [len(rows), len(figure.axes)] == [lines, axes + 1]


def test_self_attention_by_hand():
    """Queries 0 and 1 see each other, query 2 itself: weights times 2, 2 and 1."""
    weights = torch.tensor([[[.75, .25, 0], [.5, .5, 0], [0, 0, 1]]])
    figure = plots.self_attention({"layer 0": weights}, groups={"learned": 2, "extra": 1})
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.filled(-1).tolist() == [[1.5, .5, -1], [1, 1, -1], [-1, -1, 1]]
    assert figure.axes[0].get_title() == "layer 0"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["learned", "extra"]
    figure = plots.self_attention({"layer 0": weights}, shown=torch.tensor([2, 0]),
                                  names=["last", ""])
    assert figure.axes[0].images[0].get_array().filled(-1).tolist() == [[1, -1], [-1, 1.5]]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["last"]
    with pytest.raises(ValueError, match="3"):
        plots.self_attention({"layer 0": weights}, groups={"learned": 2})


# Read as TeX, the first would stop the picture.
TEX = ["$\\frac$", "US$ and $", r"C:\car_x^2", "a\\$b"]
# No font has a code point that is no character: it stands for the scripts that a machine lacks.
HARD = [*TEX, "", "two\nlines", "vehicle.construction.with_arm", "Машина", "\U0001FFFE",
        "car \U0001FFFE"]


def test_class_names_that_pictures_write():
    with pytest.warns(UserWarning, match=r"the classes \[8, 9\]: .* install a font"):
        assert plots.readable(HARD) == [*TEX, "class 4", "two lines", "vehicle.constru… (6)",
                                        "Машина", "class 8", "class 9"]


@pytest.mark.filterwarnings("ignore:no installed font")
def test_class_names_are_never_read_as_tex():
    image, truth, result = scene()
    one = sampled(3, truth["boxes"])
    for figure in (plots.predictions(image, result, TEX),
                   plots.first(image, truth, masks([0])[0], result, result, TEX),
                   plots.detections([image], [truth], {"$x": [result]}, TEX),
                   # Of many classes the names stand on the boxes.
                   plots.detections([image], [truth], {TEX[0]: [result]}, HARD),
                   plots.query_attention(image, {TEX[0]: one}, TEX, title=TEX[0]),
                   plots.self_attention({TEX[0]: torch.eye(3)[None]}, names=TEX[:3], title=TEX[0])):
        figure.savefig(io.BytesIO(), format="png", dpi=50)
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        assert not any(text.get_parse_math() for text in texts)
        assert any("$" in text.get_text() for text in texts)


def test_a_script_is_written_in_a_font_that_has_it():
    """DejaVu Sans, the default, lacks the circled A; STIX, also part of matplotlib, has it."""
    image, _, result = scene()
    text = plots.predictions(image, result, ["Ⓐ", "B", "C"]).axes[0].texts[-1]
    default, family = text.get_fontfamily()
    has = []
    for name in (default, family):
        file = font_manager.findfont(font_manager.FontProperties(family=[name]))
        has.append(font_manager.get_font(file).get_char_index(ord("Ⓐ")) > 0)
    assert text.get_text() == "Ⓐ 0.90" and has == [False, True]
    assert plots.predictions(image, result, CLASSES).axes[0].texts[-1].get_fontfamily() == [default]


def test_long_names_stay_in_the_picture_and_a_legend_of_them_on_the_page():
    image, truth, result = scene()
    names = [f"{letter} long name of one class" for letter in "abcdef"]
    result["boxes"][0] += torch.tensor([139., 0, 125, 0])                  # x 150..155 of 160
    figure = plots.predictions(image, result, names)
    text = figure.axes[0].texts[-1]
    assert text.get_text() == "a long name of … (0) 0.90"
    # Centred on its box it would reach beyond the image.
    assert 0 < text.get_position()[0] < 152.5 and text.get_window_extent().x1 <= 160 * 6 + .5
    figure = plots.detections([image], [truth], {"student": [result]}, names)
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert 0 <= extent.x0 and extent.x1 <= figure.bbox.x1 and len(legend(figure)) == 6 + 3 + 1


def test_a_truth_is_dashed_around_the_detections_whose_names_stand_in_the_middle():
    image, truth, result = scene(1)
    axes = plots.predictions(image, result, CLASSES, min_score=0.85, truth=truth).axes[0]
    black, white, box = axes.patches[:3]
    for around in (black, white):
        assert around.get_bbox().extents == pytest.approx(np.array([10, 20, 30, 40])
                                                          + 160 / 300 * np.array([-1, -1, 1, 1]))
    styles = [patch.get_linestyle() for patch in (black, white, box)]
    assert styles == ["-", plots.FALSE, "-"]
    assert [text.get_text() for text in axes.get_legend().get_texts()][0] == "true box"
    # The detection reaches from 11 to 30.
    assert [text.get_text() for text in axes.texts] == ["Car 0.90"]
    assert axes.texts[0].get_position()[0] == 20.5


def test_of_two_names_in_one_place_the_weaker_stands_higher():
    image, _, result = scene(1)
    two = {key: torch.cat([value[:1]] * 2) for key, value in result.items()}
    weak, strong = plots.predictions(image, two, CLASSES).axes[0].texts
    assert weak.get_window_extent().y0 > strong.get_window_extent().y1


def test_boxes_end_where_the_image_does():
    image, truth, _ = scene(1)
    beyond = {"scores": torch.tensor([.9]), "labels": torch.tensor([0]),
              "boxes": torch.tensor([[-9., 20, 200, 99]])}
    for axes in (plots.predictions(image, beyond, CLASSES).axes[0],
                 plots.detections([image], [nothing()], {"student": [beyond]}, CLASSES).axes[1]):
        assert axes.patches[0].get_bbox().extents.tolist() == [0, 20, 160, 48]


@pytest.mark.parametrize("width, height, zoom", [(1242, 375, 1), (1241, 374, 1), (160, 48, 6)])
def test_predictions_keep_the_image_s_own_pixels(width, height, zoom):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3),
                                                              dtype=np.uint8))
    plots.predictions(image, nothing(), CLASSES).savefig(file := io.BytesIO(), format="png")
    saved = Image.open(file).convert("RGB")
    assert saved.size == (width * zoom, height * zoom)
    if zoom == 1:
        assert np.abs(np.asarray(saved).astype(int) - np.asarray(image)).max() <= 1


def test_a_model_has_one_colour():
    assert plots.model_style("distilled student")["color"] == plots.DISTILLED
    assert plots.model_style("Student alone")["color"] == plots.STUDENT
    assert plots.model_style("FGD", 1) != plots.model_style("MGD", 2)
    assert plots.model_style("toy_teacher_dino")["color"] == plots.TEACHER
    assert plots.model_style("kitti_distilled_dino")["color"] == plots.DISTILLED
    roles = {plots.DISTILLED: ["clockdistill with the scale mask", "both parts: clockdistill",
                               "distilled, 2 x the steps",
                               "the same student, distilled"],
             plots.TEACHER: ["teacher, trained for longer", "the teacher's own"],
             plots.STUDENT: ["student", "student, 2 x the steps"],
             # Rivals have none of our colours.
             plots.OTHERS[0]: ["detrdistill", "DETR-Distill", "kd_detr", "own queries"]}
    for color, names in roles.items():
        assert {plots.model_style(name)["color"] for name in names} == {color}


def test_gains_have_the_colour_of_their_verdict():
    """The sign is known where the interval lies on one side of 0; that of one seed never is."""
    gain = {"mean": .1, "low": .05, "high": .15}
    under = {"mean": -.1, "low": -.15, "high": -.05}
    holds = {"mean": .1, "low": -.1, "high": .3}
    one_seed = {"mean": .1, "low": None, "high": None}
    assert [plots.verdict(each) for each in (gain, under, holds, one_seed)] == [
        "more", "less", "undecided", "undecided"]
    figure = plots.gains([("DINO", "a", gain), ("DINO", "b", under), ("DAB", "a", holds),
                          ("DAB", "b", one_seed)], "Title", zero="student alone", chosen=("a",))
    axes = figure.axes[0]
    bars = [container[2][0] for container in axes.containers]
    assert [to_hex(bar.get_color()[0]) for bar in bars] == [
        color.lower() for color in (plots.DISTILLED, "#D55E00", "#777777", "#777777")]
    assert bars[0].get_segments()[0][:, 0] == pytest.approx([.05, .15])
    assert bars[3].get_segments()[0][:, 0].tolist() == [.1, .1]
    assert [text.get_text() for text in axes.texts] == [
        "student alone", "DINO", "DAB", "+0.100", "-0.100", "+0.100", "+0.100"]
    assert [name.get_fontweight() for name in axes.get_yticklabels()] == ["bold", "normal"] * 2
    assert [text.split(":")[0] for text in legend(figure)] == [
        "more", "less", "undecided", "one seed"]
    # A legend has what is drawn, no more; no interval is drawn of one seed: a hollow dot.
    assert legend(plots.gains([("", "a", one_seed)], "Title")) == ["one seed: no interval"]
    assert axes.containers[3][0].get_markerfacecolor() == "white"


def test_sensitivity_shows_mean_and_deviation_of_each_value_and_the_student():
    """.1, .2, .3: mean .2, deviation .1."""
    figure = plots.sensitivity({"temperature": [("1", [.1, .2, .3]), ("10", [.4])],
                                "lambda_mem": []}, [.1, .3], "Title")
    axes = figure.axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([.2, .4])
    bars = axes.containers[0].lines[2][0].get_segments()
    assert bars[0][:, 1] == pytest.approx([.1, .3]) and bars[1][:, 1] == pytest.approx([.4, .4])
    assert axes.lines[-1].get_ydata() == pytest.approx([.2, .2])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10"]


def test_a_mask_shows_who_may_look_and_each_its_own_groups():
    may = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    groups = {"a": {"denoising": 0, "learned": 2, "extra": 1}, "b": {"extra": 3}}
    figure = plots.self_attention({"a": may, "b": may}, groups=groups)
    # No colour bar: there are no weights.
    assert len(figure.axes) == 2
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.filled(-1).tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes] == [
        ["learned", "extra"], ["extra"]]


def test_dots_stand_at_their_numbers_in_the_row_of_their_thing():
    panels = {"AP": {"DINO": {"toy": {"teacher": .5, "student": .2}},
                     "DAB": {"toy": {"student": .1}, "kitti": {}}}}
    axes = (figure := plots.dots(panels, "Title")).axes[0]
    # Rows 0 and 2 are the headings.
    assert dots(axes) == [(.5, 1), (.2, 1), (.1, 3)]
    assert [line.get_color() for line in axes.lines if line.get_marker() != "None"] == [
        plots.TEACHER, plots.STUDENT, plots.STUDENT]
    # 0 is in view, and no dot is cut
    assert axes.get_xlim()[0] < 0 < .5 < axes.get_xlim()[1]
    assert [text.get_text() for text in axes.texts] == ["DINO", "DAB"]
    assert legend(figure) == ["teacher", "student"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["toy", "toy", "kitti"]


def test_dots_with_intervals_lie_one_beneath_the_other():
    figure = plots.dots({"AP": {"": {"a": {"student": (.2, .1), "floor": .1},
                                     "b": {"student": .3}}}}, "Title",
                        marks={"floor": {"marker": "|"}})
    axes = figure.axes[0]
    assert dots(axes) == [(.2, -.175), (.1, .175), (.3, 1)]
    bars = [line.get_xdata() for line in axes.lines if line.get_marker() == "None"]
    assert len(bars) == 1 and np.allclose(bars[0], [.1, .3])
    assert {line.get_marker() for line in axes.lines} == {"None", "^", "|"}
    assert legend(figure) == ["student", "floor"]


def test_dots_on_one_scale_with_a_line_at_zero_as_one_is_negative():
    panels = {name: {"": {"a": {"x": (number, .1)}}} for name, number in (("b", .5), ("c", -.2))}
    left, right = plots.dots(panels, "Title", one_scale=True).axes
    assert left.get_xlim() == right.get_xlim()
    for axes in (left, right):
        assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)
    (alone,) = plots.dots({"b": panels["b"]}, "Title").axes
    assert not any(list(line.get_xdata()) == [0, 0] for line in alone.lines)


def test_pairs_are_those_of_the_seeds_that_both_have():
    figure = plots.paired({"DINO": {"student": {0: .1, 1: .2, 2: .3}, "distilled": {2: .5, 0: .4},
                                    "teacher": .6}},
                          "AP", "Title")
    axes = figure.axes[0]
    assert axes.get_title() == "DINO, 2 seeds" and axes.texts[0].get_text() == "teacher 0.60"
    joined = sorted(tuple(line.get_ydata()) for line in axes.lines if line.get_color() == "#BBBBBB")
    assert joined == [(.1, .4), (.3, .5)]


def test_false_alarms_are_drawn_over_missed_objects():
    """The commonest has the right box and the wrong class: under the missed object it could not be seen."""
    image, truth, result = scene()
    figure = plots.detections([image], [truth], {"student": [result]}, CLASSES)
    lines = [patch.get_linestyle() for axes in figure.axes for patch in axes.patches]
    assert plots.FALSE in lines and lines.index(plots.FALSE) > len(lines) - 1 - lines[::-1].index(plots.MISSED)


def test_dark_lines_have_light_edges():
    edges = {color: plots._halo(3, color)[0]._gc["foreground"] for color in
             (plots.TEACHER, plots.DISTILLED, plots.STUDENT, plots.TRUTH, *plots.OTHERS)}
    assert {edges[color] for color in (plots.TEACHER, plots.DISTILLED, "#882255", "#000000")} == {"white"}
    assert edges[plots.TRUTH] == edges[plots.STUDENT] == "black"


def test_a_window_around_an_object_shows_the_answer_too():
    panel = {"image": torch.rand(3, 48, 160), "truth": torch.tensor([20., 10, 40, 30]),
             "answer": torch.tensor([60., 10, 90, 30])}
    low, high = plots.around_object({"student": panel}, "").axes[0].get_xlim()
    assert low <= 20 and high >= 90
    # Where both do not fit, the object stays.
    panel["answer"] = torch.tensor([120., 10, 150, 30])
    low, high = plots.around_object({"student": panel}, "").axes[0].get_xlim()
    assert low <= 20 and high >= 40


def test_a_class_name_is_no_formula():
    answers = {"DINO": {"label": {"own": 1., "another's": .75, "noise": .5}}}
    plots.reading(answers, "", {"DINO": ("US$x^$", 0.5)}).savefig(io.BytesIO())


def test_reading_names_the_memories():
    figure = plots.reading({"DINO": {"label": {"own": 1., "another's": .75, "noise": .5}}},
                           always={"DINO": ("Car", .45)})
    assert legend(figure) == ["the image's own memory", "another image's memory", "noise"]
    assert dots(figure.axes[0]) == [(1, 1), (.75, 1), (.5, 1)]
    (line,) = figure.axes[0].collections                 # through the rows of this detector
    assert line.get_segments()[0].tolist() == [[.45, -.5], [.45, 1.5]]
    assert figure.axes[0].texts[-1].get_text() == " always Car: 0.45"


def test_stacked_parts_start_where_the_last_ended():
    figure = plots.stacked({"both": {"memory": 16, "cls": 47, "l1": 1}, "one": {"cls": 32}}, "GB",
                           "Title", str)
    bars = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2)
            for bar in figure.axes[0].patches]
    assert bars == [(0, 16, 0), (16, 47, 0), (63, 1, 0), (0, 32, 1)]
    # No room for the 1.
    assert [text.get_text() for text in figure.axes[0].texts] == ["16", "47", "32"]
    assert legend(figure) == ["memory", "cls", "l1"]
    only = plots.stacked({"a": {"memory": .25}}, "part", "Title")
    assert not only.legends and only.axes[0].texts[0].get_text() == "25%"


def test_lines_keep_their_look_from_panel_to_panel():
    figure = plots.lines({"a": {"one": torch.tensor([3., 2, 1]), "two": [1]},
                          "b": {"two": ([5., 6], [7., 8])}},
                         "step", "loss", "Title")
    (one, two), (again,) = (axes.lines for axes in figure.axes)
    assert one.get_xdata().tolist() == [0, 1, 2] and one.get_ydata().tolist() == [3, 2, 1]
    assert again.get_xdata().tolist() == [5, 6] and again.get_ydata().tolist() == [7, 8]
    assert two.get_color() == again.get_color() != one.get_color()
    assert legend(figure) == ["one", "two"]


def test_latency_has_a_marker_per_program_and_a_line_per_model():
    measured = [("dino", "teacher", "PyTorch", 30, .5), ("dino", "student", "PyTorch", 10, .3),
                ("dino", "teacher", "ONNX fp32", 20, .5), ("dab_detr", "student", "PyTorch", 9, .8)]
    figure = plots.latency([
        {"detector": detector, "role": role, "format": kind, "AP": ap, "ms_1": {"median": ms}}
        for detector, role, kind, ms, ap in measured])
    dino, dab = figure.axes
    assert [dino.get_title(), dab.get_title()] == ["dino", "dab_detr"]
    assert dots(dino) == [(30, .5), (20, .5), (10, .3)] and dots(dab) == [(9, .8)]
    # The scale that all panels share reaches from 0 beyond the highest AP of any: no marker is cut.
    assert dino.get_ylim() == pytest.approx((0, .88))
    line, pytorch, onnx = dino.lines[:3]
    assert [*line.get_xdata()] == [30, 20] and line.get_color() == plots.TEACHER
    assert [pytorch.get_fillstyle(), onnx.get_fillstyle()] == ["full", "none"]
    assert legend(figure) == ["teacher", "student", "PyTorch", "ONNX fp32"]


def test_numbers_stand_in_their_cells():
    values = torch.tensor([[1., 2, 3], [4, 5, 6]])
    axes = plots.numbers({"M": (values, "{:.0f}".format), "S": (values, lambda v: f"1/{v:.0f}")},
                         "Title").axes
    assert [(*text.get_position(), text.get_text()) for text in axes[0].texts] == [
        (column, row, f"{3 * row + column + 1}") for row in range(2) for column in range(3)]
    assert axes[1].texts[5].get_text() == "1/6" and axes[1].get_title() == "S"
    # Black and white stand on the ends of viridis.
    assert (axes[0].texts[0].get_color(), axes[0].texts[5].get_color()) == ("white", "black")


def test_memory_colours_are_alike_where_tokens_are():
    """The first memory's own colours spread around grey; a copy has them, its mean is grey."""
    image, _, _ = scene()
    tokens = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    figure = plots.memory_colours(image, [], {
        "teacher": tokens, "copy": tokens.clone(),
        "mean": tokens.mean(0).expand(120, 8)}, (6, 20), "")
    teacher, copy_, mean = (np.array(axes.images[-1].get_array()) for axes in figure.axes[1:])
    assert teacher.shape == (6, 20, 3) and teacher.std() > 0.1 and np.array_equal(teacher, copy_)
    assert np.allclose(mean, 0.5, atol=1e-6)


def test_what_is_added_to_a_detector_is_green():
    figure = plots.wiring_drawing()
    arrows = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    colors = [arrow.arrowprops["color"] for arrow in arrows]
    # Only the detector's way from its encoder to its decoder's call is as it was.
    assert colors == [plots.INK] + [plots.DISTILLED] * 8


def test_the_drawing_compares_memories_and_answers_and_nothing_else():
    figure = plots.method_drawing()
    arrows = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    comparing = [arrow for arrow in arrows if arrow.arrowprops["arrowstyle"] == "<|-|>"]
    # Two comparisons, each with both models.
    assert len(comparing) == 4
    assert {arrow.arrowprops["color"] for arrow in comparing} == {plots.DISTILLED}
