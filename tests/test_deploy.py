"""Programs for ONNX Runtime: their answers, their metadata, and when they are refused."""
import functools
import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import checkpoints
import data
import models
import train
from experiments import deploy

TINY = dict(backbone="resnet18", backbone_width=8, pretrained_backbone=False, hidden_dim=32,
            heads=4, ffn_dim=32, encoder_layers=1, decoder_layers=2, num_queries=7)
DEFORMABLE = TINY | dict(feature_levels=2, points=2)
# Fewer operators to write down, and a backbone that is not ours.
TIMM = DEFORMABLE | dict(backbone="timm:resnet10t")
# The toy's own size, so that a program exported once also serves the command `deploy`.
SIZE = 48, 160
# name: (detector, options, batch, padding)
VARIANTS = {
    "dab_detr": ("dab_detr", TINY | dict(feature_stride=8), "1", True),
    "one stage": ("deformable_detr", TIMM | dict(decoder_layers=1), "2", False),
    "two stages": ("deformable_detr", DEFORMABLE | dict(box_refine=True, two_stage=True), "1",
                   False),
    "dino": ("dino", TIMM, "dynamic", True),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(variant, seed=0):
    """A detector of random weights; those that start at zero would hide half of it."""
    detector, options, *_ = VARIANTS[variant]
    torch.manual_seed(seed)
    model = models.build(detector, 3, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def save(model, path, name="toy"):
    checkpoints.save(path, {
        "model": model.state_dict(), "detector": model.detector, "config": model.config,
        "classes": ["Car", "Pedestrian", "Cyclist"], "category_ids": [1, 2, 3], "data": name,
        "settings": {"data": name}, "metrics": {}, "step": 0, "minutes": 0., "seed": 0,
        "commit": "", "machine": ""})
    return str(path)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of noise, larger than what the programs read."""
    pixels = np.random.default_rng(0).integers(0, 256, (75, 225, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory, photo):
    """-> function of a variant -> (model, ONNX file, what torch.export made), made only once.

    The file is written through the command line, which compares it with PyTorch.
    """
    @functools.cache
    def export(variant):
        *_, batch, padding = VARIANTS[variant]
        folder = tmp_path_factory.mktemp("program")
        model, out = make(variant), folder / "out.onnx"
        words = ["export", "--checkpoint", save(model, folder / "last.pt"), "--out", str(out),
                 "--size", "48,160", "--image", photo, "--batch", batch,
                 *["--padding"] * padding]
        graphs, trace = [], torch.export.export

        def remember(*args, **options):
            graphs.append(trace(*args, **options))
            return graphs[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.export, "export", remember)
            assert train.main(words) == 0
        return model, out, graphs[0]
    return export


def pictures(variant):
    """Other images than those a program was checked on, and a mask if the variant takes one."""
    *_, batch, padding = VARIANTS[variant]
    count = 3 if batch == "dynamic" else int(batch)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)
    mask = np.zeros((count, *SIZE), dtype=bool)
    # The last picture is narrower.
    mask[-1, :, 100:] = padding
    return images, mask


@every_variant
def test_a_program_answers_as_pytorch_and_says_what_it_takes(variant, written):
    """Through the command line; the command itself compares, and so does this test, elsewhere."""
    *_, padding = VARIANTS[variant]
    model, out, _ = written(variant)
    session = deploy.open_session(str(out))
    images, mask = pictures(variant)
    feed = {"images": images} | ({"padding": mask} if padding else {})
    boxes, scores, labels = session.run(None, feed)
    mean, std = (255 * torch.tensor(v) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    pixels = ((torch.from_numpy(images) - mean) / std).permute(0, 3, 1, 2)
    pixels = pixels.masked_fill(torch.from_numpy(mask)[:, None], 0.)
    with torch.no_grad():
        output = model(pixels, torch.from_numpy(mask))
    sizes = [SIZE] * len(images)
    sizes[-1] = 48, 100 if padding else 160
    wanted = models.postprocess(output.detections, sizes, 100)
    stacked = [np.stack([w[k].numpy() for w in wanted]) for k in ("boxes", "scores", "labels")]
    assert deploy.disagreement([boxes, scores, labels], stacked, SIZE) < 1e-4
    assert scores.shape == (len(images), 7 * 3) and boxes.dtype == np.float32

    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["Car", "Pedestrian", "Cyclist"]
    assert json.loads(facts["size"]) == [48, 160] and json.loads(facts["category_ids"]) == [1, 2, 3]
    assert "uint8 RGB" in facts["input"] and "pixels" in facts["output"]
    samples = sum(node.op_type == "GridSample" for node in onnx.load(out).graph.node)
    levels, layers = model.config.get("feature_levels", 0), model.config["decoder_layers"] + 1
    assert samples == levels * layers


@pytest.mark.parametrize("variant, way", [
    *((variant, "export") for variant in VARIANTS),
    # The one stage is part of the two.
    *((variant, "compile") for variant in VARIANTS if variant != "one stage")])
def test_whole_detectors_can_be_written_down(variant, way, written):
    """By torch.export, and by torch.compile in one graph; both sample with grid_sample."""
    model, _, exported = written(variant)
    program, graphs = deploy.Program(model), []
    *_, padding = VARIANTS[variant]
    inputs = [torch.from_numpy(x) for x in pictures(variant)[:1 + padding]]

    def remember(graph, _):
        graphs.append(graph.code)
        return graph
    with torch.no_grad():
        wanted = program(*inputs)
        if way == "export":
            # What autocast surrounds is a graph of its own.
            parts = exported.graph_module.modules()
            again, graphs = exported.module(), [g.code for g in parts if hasattr(g, "code")]
        else:
            torch.compiler.reset()
            again = torch.compile(program, fullgraph=True, backend=remember)
        answer = again(*inputs)
    pair = [[x.numpy() for x in side] for side in (answer, wanted)]
    assert deploy.disagreement(*pair, SIZE) < 1e-4
    code = "".join(graphs)
    assert ("grid_sampl" in code) == (program.model.detector != "dab_detr")
    assert not any(name in code for name in ("embedding_bag", "autograd_function"))


def test_the_program_without_torch_answers_in_pixels_of_the_photo(written, photo, tmp_path):
    _, file, _ = written("two stages")
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv.pop(1))"

    def detect(picture):
        words = [train.HERE / "experiments" / "detect.py", file, picture]
        return subprocess.check_output([sys.executable, "-c", code, *map(str, words)], text=True)

    lines = detect(photo)
    # A camera held upright stores the same photo turned, and says so.
    turned, exif = tmp_path / "turned.png", Image.Exif()
    exif[274] = 6
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert detect(turned) == lines
    # Of 16 bits Pillow would cut the values off.
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 999, dtype=np.uint16)).save(deep)
    with pytest.raises(subprocess.CalledProcessError):
        detect(deep)
    found = [json.loads(line) for line in lines.splitlines()]

    picture = deploy.resized(Image.open(photo), SIZE)
    boxes, scores, labels = deploy.open_program("ONNX fp32", None, file)(picture)
    # The photo has 225 x 75 pixels, the program reads 160 x 48.
    wanted = boxes * np.array([225 / 160, 75 / 48] * 2)
    np.testing.assert_allclose([each["box"] for each in found], wanted, atol=1e-3)
    np.testing.assert_allclose([each["score"] for each in found], scores, atol=1e-6)
    assert [each["class"] for each in found] == [
        ("Car", "Pedestrian", "Cyclist")[label] for label in labels]


def unnamed(file):
    """A program as `to_onnx` returns it: without the facts that `export` adds."""
    program = onnx.load(file)
    del program.metadata_props[:]
    return program


def test_a_program_that_differs_is_refused(written, tmp_path, photo, monkeypatch, capsys):
    """That of other weights, here; nothing is written, and one line says why."""
    _, file, _ = written("two stages")
    monkeypatch.setattr(deploy, "to_onnx", lambda *args: unnamed(file))
    checkpoint = save(make("two stages", seed=1), tmp_path / "last.pt")
    out = tmp_path / "out.onnx"
    words = ["export", "--checkpoint", checkpoint, "--out", str(out), "--size", "48,160",
             "--image", photo]
    assert train.main(words) == 2 and not out.exists()
    assert "differ from PyTorch's by" in capsys.readouterr().err


ANSWER = [np.array([[[0, 0, 10, 10], [50, 0, 60, 10], [0, 0, 5, 5]]], np.float32),
          np.array([[.9, .8, .1]], np.float32), np.array([[0, 1, 0]])]


@pytest.mark.parametrize("change, expected", [
    (lambda b, s, c: None, 0.),
    (lambda b, s, c: b.__setitem__((0, 1, 2), 63), .03),             # 3 of 100 pixels
    (lambda b, s, c: b.__setitem__((0, 0, 3), 11), .02),             # 1 of 50
    (lambda b, s, c: s.__setitem__((0, 1), .85), .05),
    (lambda b, s, c: c.__setitem__((0, 0), 2), np.inf),              # another class
    (lambda b, s, c: b.__setitem__((0, 2), 40), 0.),                 # the last, at the cut
    (lambda b, s, c: b.__setitem__((0, 0, 0), np.nan), np.nan),
])
def test_how_far_answers_are_apart(change, expected):
    theirs = [x.copy() for x in ANSWER]
    change(*theirs)
    assert deploy.disagreement(ANSWER, theirs, (50, 100)) == pytest.approx(expected, nan_ok=True)


def test_equal_scores_may_change_places():
    theirs = [x[:, [1, 0, 2]] for x in ANSWER]
    ours = [ANSWER[0], np.array([[.9, .9, .1]]), ANSWER[2]]
    theirs[1] = ours[1]
    assert deploy.disagreement(ours, theirs, (50, 100)) == 0


@pytest.mark.parametrize("words, expected", [
    (["--batch", "two", "--size", "32,64"], "--batch two: want a number of pictures, or dynamic"),
    (["--batch", "0", "--size", "32,64"], "--batch 0"),
    ([], "of several sizes: give --size H,W, or one of them as --image FILE"),
    (["--size", "32"], "--size 32: want"),
])
def test_what_a_user_can_mend_is_one_line(words, expected, tmp_path, capsys, monkeypatch):
    """And it is said before the toy is drawn."""
    monkeypatch.setattr(data, "build", None)
    checkpoint = save(make("dab_detr"), tmp_path / "last.pt", "kitti")
    words = ["export", "--checkpoint", checkpoint, "--out", str(tmp_path / "out.onnx"), *words]
    assert train.main(words) == 2 and expected in capsys.readouterr().err


def test_options_of_a_program_are_not_those_of_weights(tmp_path, capsys):
    words = ["export", "--checkpoint", "x", "--out", "x.safetensors", "--batch", "2"]
    assert train.main(words) == 2
    assert "--batch is an option of .onnx, not of x.safetensors" in capsys.readouterr().err


def test_without_onnxruntime_the_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert train.main(["export", "--checkpoint", "x", "--out", "x.onnx"]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


CUT = """<ir_version: 10, opset_import: ["": 20]>
net (uint8[1, 4, 16, 3] images) => (float[1, 1, 4, 16] answer)
<float[1, 3, 1, 1] half = {0.5, -0.5, 0}, float[1, 1, 1, 1] one = {1}, float low = {0},
 float high = {6}> {
    pixels = Cast <to = 1> (images)
    planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
    wide = Conv (planes, half)
    cut = Clip (wide, low, high)
    answer = Conv (cut, one)
}"""


def test_what_a_relu6_cuts_takes_no_steps_of_8_bits(tmp_path):
    """Half of red minus green, -127 to 127, cut to 0 to 6: a step is 6 / 255, and not 1."""
    picture = np.zeros((4, 16, 3), np.uint8)
    picture[..., 0] = np.arange(64).reshape(4, 16)
    picture[-1, -2:] = [0, 255, 0], [255, 0, 0]
    source, out = tmp_path / "whole.onnx", tmp_path / "short.onnx"
    onnx.save(onnx.parser.parse_model(CUT), source)
    assert deploy.quantise(source, out, [picture]) == {"Conv": 2}
    answer, = deploy.open_session(str(out)).run(None, {"images": picture[None]})
    red, green = picture[..., 0].astype(float), picture[..., 1]
    assert np.abs(answer[0, 0] - (0.5 * (red - green)).clip(0, 6)).max() < 6 / 255


def test_the_command_measures_all_formats_and_keeps_earlier_figures(written, tmp_path,
                                                                    monkeypatch, capsys):
    # The same weights at the same size: the program of the other tests serves.
    model, file, _ = written("two stages")
    monkeypatch.setattr(deploy, "to_onnx", lambda *args: unnamed(file))
    monkeypatch.setattr(deploy, "latencies", functools.partial(deploy.latencies, rounds=1))
    weights, out, root = (tmp_path / name for name in ("weights", "out", "toy"))
    weights.mkdir()
    data.make_toy(root, counts=dict(train=4, val=3, tune=1))
    save(model, weights / "toy_student_deformable_detr.safetensors")
    words = ["deploy", "--root", str(root), "--weights", str(weights), "--out", str(out),
             "--work", str(tmp_path), "--detectors", "deformable_detr", "--calibrate",
             "2"]
    # Without AP there is no picture. A process without torch needs far less memory.
    assert train.main([*words, "--only", "memory", "latency"]) == 0
    first = json.loads((out / "toy.json").read_text())["rows"]
    assert [row["format"] for row in first.values()] == list(deploy.FORMATS)
    assert all(row["ms_2"]["p95"] >= row["ms_2"]["median"] > 0 for row in first.values())
    peaks = [row["peak_mb"] for row in first.values()]
    assert peaks[1] < 0.6 * peaks[0] and not (out / "toy.png").exists()
    assert "used again" not in capsys.readouterr().out

    # What is measured later is added; the rest stays as it was, the programs too.
    assert train.main([*words, "--only", "AP", "size"]) == 0
    assert f"used again: {tmp_path}/toy_student_deformable_detr.onnx" in capsys.readouterr().out
    again = json.loads((out / "toy.json").read_text())["rows"]
    assert all(again[name].items() >= row.items() for name, row in first.items())
    exact, whole, short = again.values()
    assert exact["AP"] == pytest.approx(whole["AP"], abs=1e-4) and exact["images"] == 3
    assert short["file_mb"] < whole["file_mb"] and short["calibrated_on"] == 2
    assert short["int8"]["Conv"] == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert (out / "toy.png").exists()

    # An 8-bit program with other ranges has none of the figures of the one before.
    assert train.main([*words, "--only", "size", "--calibrate", "1"]) == 0
    exact, _, short = json.loads((out / "toy.json").read_text())["rows"].values()
    assert "AP" in exact and "AP" not in short and short["calibrated_on"] == 1

    # Figures of another file, trained a step more, do not stay in its row.
    changed = weights / "toy_student_deformable_detr.safetensors"
    checkpoints.save(changed, checkpoints.load(changed) | {"step": 1})
    assert train.main([*words, "--only", "size"]) == 0
    rows = json.loads((out / "toy.json").read_text())["rows"].values()
    assert all("AP" not in row and "peak_mb" not in row and row["file_mb"] > 0 for row in rows)


@pytest.mark.parametrize("change", ["nothing", "size", "calibrate", "images", "weights"])
def test_programs_of_another_size_or_calibration_are_not_used_again(tmp_path, monkeypatch, change):
    checkpoint, made = tmp_path / "toy_student_dino.safetensors", []
    checkpoint.write_bytes(b"")
    def export(checkpoint, out, size, **options):
        made.append(out.write_bytes(b""))
        return 0.

    def quantise(whole, out, views):
        out.write_bytes(b"")
        return {"Conv": 1}
    monkeypatch.setattr(deploy, "export", export)
    monkeypatch.setattr(deploy, "quantise", quantise)
    monkeypatch.setattr(deploy, "views", lambda *args: None)
    images = mock.MagicMock(fingerprint="a", paths=["x"], __len__=lambda self: 3)
    given = dict(checkpoint=checkpoint, work=tmp_path, dataset=images, train_set=images,
                 size=SIZE, calibrate=2)
    first = deploy.make_programs(**given)
    later = mock.MagicMock(fingerprint="b", paths=["x"], __len__=lambda self: 3)
    other = {"size": {"size": (64, 160)}, "calibrate": {"calibrate": 1}, "images": {"train_set": later}}
    if change == "weights":                                  # as `cp -p` brings them, of an older date
        checkpoint.write_bytes(b"others")
        os.utime(checkpoint, (1, 1))
    again = deploy.make_programs(**given | other.get(change, {}))
    assert len(made) == 1 + (change != "nothing")
    assert first.keys() == again.keys() and again["ONNX int8"][1].keys() == {"int8", "calibrated_on"}


def test_programs_that_were_half_made_are_not_used(tmp_path, monkeypatch):
    checkpoint, made = tmp_path / "toy_student_dino.safetensors", []
    checkpoint.write_bytes(b"")

    def export(checkpoint, out, *rest, **options):
        out.write_bytes(b"")
        return 0.

    def quantise(whole, out, views):
        out.write_bytes(b"")
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"Conv": 1}
    monkeypatch.setattr(deploy, "export", export)
    monkeypatch.setattr(deploy, "quantise", quantise)
    monkeypatch.setattr(deploy, "views", lambda *args: None)
    images = mock.MagicMock(fingerprint="a", paths=["x"], __len__=lambda self: 3)
    given = dict(checkpoint=checkpoint, work=tmp_path, dataset=images, train_set=images, size=SIZE)
    deploy.make_programs(**given, calibrate=2)
    with pytest.raises(KeyboardInterrupt):
        deploy.make_programs(**given, calibrate=1)
    deploy.make_programs(**given, calibrate=2)               # the files there are of 1 image
    deploy.make_programs(**given, calibrate=2)
    assert len(made) == 3


def test_the_committed_table_is_made_of_its_figures():
    folder = train.HERE / "results" / "deploy"
    told = checkpoints.read_json(folder / "toy.json")
    assert (folder / "toy.md").read_text() == deploy.markdown(told, "toy")
    assert len(told["rows"]) == 3 * 3 * 3
