"""Files, and weights of other programs: complete lists of names, what they mean, and transformers as a live oracle.

The lists of names are written down here, module by module. The official ones are compared with those in golden/ and
(all variants) in ../shared; Hugging Face's and torchvision's with the installed classes; the others are derived from
    detrex         projects/{dab_detr,deformable_detr,dino}/modeling/*.py, detrex/layers/{transformer,attention,mlp}.py,
                   detrex/modeling/neck/channel_mapper.py; detectron2's ResNet by .../deformable_detr/converter.py
    MMDetection 2  mmdet/models/utils/transformer.py, mmdet/models/dense_heads/deformable_detr_head.py
    MMDetection 3  mmdet/models/detectors/*.py, mmdet/models/layers/transformer/*_layers.py,
                   mmdet/models/dense_heads/*_head.py; they are those of all five models of its release 3.3.0
"""
import argparse
import collections
import copy
import io
import json
import os
import pickle
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

import checkpoints
import models
from official import VECTORS, needs_vectors
from test_golden import golden

REFINE, TWO_STAGE = {"box_refine": True}, {"box_refine": True, "two_stage": True}


def toy(seed=0, detector="dino", classes=3, **overrides):
    torch.manual_seed(seed)
    options = {"backbone": "resnet18", "backbone_width": 8, "pretrained_backbone": False, "hidden_dim": 32, "heads": 8,
               "ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6} | overrides
    return models.build(detector, classes, **options)


# --------------------------------------------------------------------------------------------------------------- files

def payload(model, **more):
    return {"model": model.state_dict(), "detector": "dino", "config": model.config, "classes": ["a", "b", "c"], **more}


@pytest.mark.parametrize("name", ["last.pth", "weights.safetensors"])
def test_save_and_load_round_trip(tmp_path, name):
    model, other = toy(seed=0), toy(seed=1)
    checkpoints.save(tmp_path / "deep" / name, payload(model, step=7))
    loaded = checkpoints.load(tmp_path / "deep" / name)
    assert loaded["config"] == model.config and loaded["step"] == 7 and loaded["classes"] == ["a", "b", "c"]
    report = checkpoints.load_weights(other, tmp_path / "deep" / name)
    assert not report.missing and not report.skipped and not report.resized
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert [f.name for f in (tmp_path / "deep").iterdir()] == [name]      # no temporary file left


def test_a_file_is_read_by_what_it_holds_whatever_its_name(tmp_path):
    for name, other in (("a.safetensors", "a.bin"), ("b.pth", "b.safetensors")):
        checkpoints.save(tmp_path / name, {"model": {"a.b": torch.ones(2)}})
        (tmp_path / name).rename(tmp_path / other)
        assert torch.equal(checkpoints.load(tmp_path / other)["model"]["a.b"], torch.ones(2))


def test_half_precision_weights(tmp_path):
    model, other = toy(seed=0), toy(seed=1)
    checkpoints.save(tmp_path / "half.safetensors", payload(model), half=True)
    checkpoints.load_weights(other, tmp_path / "half.safetensors")
    assert other.content.weight.dtype == torch.float32
    torch.testing.assert_close(other.content.weight, model.content.weight, atol=1e-3, rtol=0)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    checkpoints.save(path, {"step": 1})
    with pytest.raises(Exception):
        checkpoints.save(path, {"step": 2, "bad": lambda: None})
    assert checkpoints.load(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


class Calls:
    """When unpickled in the usual way, calls the function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind, message", [("missing", "check the path"), ("cut", "damaged"), ("flipped", "data/0 has changed"), ("text", "a text file, 'not a checkpoint'"),
                                           ("system", "system"), ("eval", "eval"), ("cut.safetensors", "damaged")])
def test_unreadable_files_are_one_line_errors(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / (kind if kind.endswith(".safetensors") else f"{kind}.pth")
    calls = {"system": Calls(os.system, "touch executed"), "eval": Calls(eval, "open('executed', 'w')")}
    if kind in calls:
        torch.save({"model": {}, "hook": calls[kind]}, path)
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind != "missing":
        checkpoints.save(path, {"model": {"x": torch.zeros(1000)}})
        whole = path.read_bytes()
        middle = len(whole) // 2                                                        # a number of the tensor
        path.write_bytes(whole[:middle] + b"\1" + whole[middle + 1:] if kind == "flipped" else whole[:900])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        checkpoints.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "executed").exists()


class HistoryBuffer:
    """Pickled as MMEngine's of that name is: with numpy arrays, and its own functions by getattr."""
    def minimum(self):
        return 0

    def __getstate__(self):
        return {"_log_history": np.arange(3.), "statistics_methods": {"min": Calls(getattr, HistoryBuffer, "minimum")}}


@pytest.mark.parametrize("zipped", [True, False])                         # some are older than torch's zips
def test_what_published_files_hold_beside_tensors_is_read(tmp_path, monkeypatch, zipped):
    packages = ["mmengine", "mmengine.logging", "mmengine.logging.history_buffer"]
    for package in packages:
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[packages[-1]].HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", packages[-1])
    schedule = {"milestones": collections.Counter([33, 45]), "groups": collections.defaultdict(list, {"a": [1]})}
    torch.save({"model": {"x": torch.zeros(1)}, "args": argparse.Namespace(lr=1e-4), "lr_scheduler": schedule,
                "meta": {"seed": np.int64(3), "loss": np.float32(2.), "CLASSES": ("person", "bicycle")},
                "message_hub": {"log_scalars": collections.OrderedDict(loss=HistoryBuffer())}},
               tmp_path / "published.pth", _use_new_zipfile_serialization=zipped)
    for package in packages:
        monkeypatch.delitem(sys.modules, package)
    loaded = checkpoints.load(tmp_path / "published.pth")
    assert loaded["args"].lr == 1e-4 and loaded["lr_scheduler"] == schedule
    assert loaded["meta"] == {"seed": 3, "loss": 2., "CLASSES": ("person", "bicycle")}
    assert isinstance(loaded["message_hub"]["log_scalars"]["loss"], checkpoints.Ignored)


def test_stand_ins_have_the_names_that_torch_2_4_looks_for(tmp_path):
    """It knows no tuples of a stand-in and its name. What others allowed stays as it was."""
    assert {f"{each.__module__}.{each.__name__}" for each in checkpoints.INERT} >= {
        "numpy.ndarray", "numpy._core.multiarray.scalar", "collections.defaultdict", "builtins.getattr"}
    before = set(torch.serialization.get_safe_globals())
    checkpoints.save(tmp_path / "x.pt", {"model": {"weight": torch.zeros(1)}})
    checkpoints.load(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_numbers_of_numpy_1_are_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"best": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)
    assert checkpoints.load(path) == {"best": 0.5}


@pytest.mark.parametrize("kind", ["?", "b", "u1", "<i2", ">i4", "<u8", "e", "<f4", ">f8", "c8", "c16"])
def test_numbers_and_arrays_of_numpy_are_read(tmp_path, kind):
    array = np.arange(6).astype(kind).reshape(2, 3)
    torch.save({"array": array, "fortran": np.asfortranarray(array), "number": array[1, 0], "none": array[:, :0]},
               tmp_path / "x.pth")
    loaded = checkpoints.load(tmp_path / "x.pth")
    for name, wanted in (("array", array), ("fortran", array), ("number", array[1, 0]), ("none", array[:, :0])):
        assert loaded[name].dtype.type == np.dtype(kind).type and np.array_equal(loaded[name], wanted), name


class Array:
    """Pickled as numpy's arrays are, with any state."""
    def __init__(self, kind, *state):
        self.kind, self.state = kind, state

    def __reduce__(self):
        make, arguments, _ = np.zeros(0).__reduce__()
        return make, arguments, (1, self.state[0], self.kind, False, *self.state[1:])


class Dtype:
    """Pickled as numpy's types are, with any code and state."""
    def __init__(self, code, *state):
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state or (3, "<", None, None, None, -1, -1, 0)


POINTER = (1 << 40).to_bytes(8, "little")
OBJECT_FIELD = (3, "|", None, ("f0",), {"f0": (np.dtype("O"), 1 << 40)}, 8, 1, 63)
FORGED = {
    "an array of pointers": Calls(np.ndarray, (1,), "O", POINTER),
    "a type of objects": Calls(np.dtype, "O"),
    "a number of objects": Calls(np.float64(0).__reduce__()[0], Dtype("O8"), POINTER),
    "objects by their state": Array(Dtype("O8"), (1,), POINTER),
    "a type with a field of objects": Array(Dtype("f8", *OBJECT_FIELD), (1,), POINTER),
    "a type of bytes with fields": Array(Dtype("V8", *OBJECT_FIELD), (1,), POINTER),
    "fewer bytes than elements": Array(Dtype("f8"), (1 << 30,), POINTER),
    "a negative shape": Array(Dtype("f8"), (-1, -1), POINTER),
    "no bytes": Array(Dtype("f8"), (1,), [POINTER]),
    "a foreign type": Array("O", (1,), POINTER),
    "words": np.array(["word"]),
    "objects": np.array([{}, {}], dtype=object),
}


READ_ALL = """
import checkpoints, pathlib
for path in sorted(pathlib.Path(FOLDER).iterdir()):
    print(path.stem, end=": ", flush=True)
    try:
        print(repr(checkpoints.load(path)["classes"]))
    except ValueError as error:
        print(str(error).removeprefix(f"{path} "))
"""


def test_forged_arrays_are_refused_and_nothing_crashes(tmp_path):
    """numpy's own array and type, called as a file says, take any bytes for addresses of objects: a way to run code.

    A child process reads the files, so that a crash is seen as what it is."""
    for name, classes in FORGED.items():
        torch.save({"model": {"x": torch.zeros(1)}, "classes": classes}, tmp_path / f"{name}.pth")
    program = READ_ALL.replace("FOLDER", repr(str(tmp_path)))
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           cwd=Path(checkpoints.__file__).parent)
    assert child.returncode == 0, (child.stdout, child.stderr[-300:])
    said = dict(line.split(": ", 1) for line in child.stdout.splitlines())
    assert said.keys() == FORGED.keys()
    assert not [name for name, line in said.items() if not re.match("(holds|calls) .*numpy.*refused", line)], said


def test_an_array_is_filled_once(tmp_path):
    """A second filling would free memory that a tensor made of the array still looks at."""
    array = checkpoints.empty_array()
    array.__setstate__((1, (1,), checkpoints.Dtype("f8"), False, bytes(8)))
    with pytest.raises(checkpoints.Refused, match="changes"):
        array.__setstate__((1, (1,), checkpoints.Dtype("f8"), False, bytes(8)))


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_read(tmp_path, name, value):
    model = toy(seed=0)
    checkpoints.save(tmp_path / name, payload(model))
    good = (tmp_path / name).read_bytes()
    with torch.no_grad():
        model.decoder.norm.bias[1] = value
    with pytest.raises(ValueError, match="decoder.norm.bias is not finite"):
        checkpoints.save(tmp_path / name, payload(model))
    assert (tmp_path / name).read_bytes() == good and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="decoder.norm.bias is not finite"):
        checkpoints.load_weights(toy(seed=1), model.state_dict())
    if name == "x.pth":
        torch.save(payload(model), tmp_path / name)
    else:
        save_file(model.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: decoder.norm.bias is not finite"):
        checkpoints.load(tmp_path / name)


@pytest.mark.parametrize("odd", [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"),
                                 torch.quantize_per_tensor(torch.zeros(3), 1., 0, torch.qint8),
                                 torch.zeros(3).to(torch.float8_e4m3fn)])
def test_tensors_of_an_odd_kind_are_refused(tmp_path, odd):
    torch.save({"model": {"a.b": odd}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: a.b is a sparse, quantized or meta tensor"):
        checkpoints.load(tmp_path / "x.pth")


@pytest.mark.parametrize("classes", [7, "abc", [1, 2, 3], {"a": 1}, torch.zeros(3), ["Car", None, "Dog"]])
def test_class_names_that_are_none_count_as_no_names(classes):
    source, model = payload(toy(seed=0)) | {"classes": classes, "config": {"heads": "many"}}, toy(seed=1)
    report = checkpoints.load_weights(model, source, classes=["Car", "Pedestrian", "Cyclist"])
    assert "copied row by row" in str(report)


def test_half_precision_that_overflows_is_not_written(tmp_path):
    model = toy(seed=0)
    with torch.no_grad():
        model.decoder.norm.bias[1] = 1e6
    with pytest.raises(ValueError, match="decoder.norm.bias is not finite"):
        checkpoints.save(tmp_path / "x.safetensors", payload(model), half=True)
    assert not list(tmp_path.iterdir())


def test_getattr_in_a_file_gets_nothing(tmp_path):
    torch.save({"method": Calls(getattr, "abc", "upper")}, tmp_path / "x.pth")
    assert isinstance(checkpoints.load(tmp_path / "x.pth")["method"], checkpoints.Ignored)


# ------------------------------------------------------------------------------------------------------------ wrappings

WRAPPED = {
    "DDP": lambda raw, averaged: ({f"module.{k}": v for k, v in raw.items()}, ""),
    "compiled in DDP": lambda raw, averaged: ({"state_dict": {f"module._orig_mod.{k}": v for k, v in raw.items()}}, ""),
    "a key of its own": lambda raw, averaged: ({"net": raw, "optimizer": {"a.b": torch.zeros(9)}}, "'net'"),
    "two deep": lambda raw, averaged: ({"ckpt": {"weights": raw}}, "'ckpt.weights'"),
    "RT-DETR": lambda raw, averaged: ({"model": raw, "ema": {"module": averaged, "updates": 3}}, "'ema.module'"),
    "official DINO": lambda raw, averaged: ({"model": raw, "ema_model": averaged}, "'ema_model'"),
    "ema_state_dict": lambda raw, averaged: ({"state_dict": raw, "ema_state_dict": averaged}, "'ema_state_dict'"),
    "MMEngine": lambda raw, averaged: ({"state_dict": raw, "ema_state_dict": {     # swapped at saving: "raw" is averaged
        f"module.{k}": v for k, v in averaged.items()} | {"steps": torch.tensor(7)}}, ""),
    "capitals": lambda raw, averaged: ({"net": raw, "EMA": averaged}, "'EMA'"),
    "arrays": lambda raw, averaged: ({"model": {k: v.numpy() for k, v in raw.items()}}, ""),
    "arrays of another byte order": lambda raw, averaged: ({"weights": {
        k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in raw.items()}}, "'weights'"),
    "Lightning": lambda raw, averaged: ({"state_dict": {f"model.{k}": v for k, v in raw.items()} | {
        "criterion.empty_weight": torch.ones(4), "train_loss.weight": torch.ones(1)},
        "loops": {"fit_loop": {}}}, ""),
    "timm": lambda raw, averaged: ({"state_dict": raw, "state_dict_ema": averaged}, "'state_dict_ema'"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_weights_are_unwrapped_and_averaged_ones_preferred(how):
    raw, averaged, model = toy(seed=0).state_dict(), toy(seed=1).state_dict(), toy(seed=2)
    payload, where = WRAPPED[how](raw, averaged)
    report = checkpoints.load_weights(model, payload)
    wanted = averaged if "ema" in where.lower() else raw
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert not report.missing and where in str(report) and ("were taken" in str(report)) == bool(where)
    assert ("2 tensors beside the model were dropped" in str(report)) == (how == "Lightning")


def test_our_own_checkpoint_is_read_where_it_keeps_what_was_evaluated():
    evaluated, raw = toy(seed=0), toy(seed=1)
    average = {f"module.{key}": value for key, value in raw.state_dict().items()}
    held = payload(evaluated) | {"resume": {"student": raw.state_dict(), "average": average}}
    model = toy(seed=2)
    checkpoints.load_weights(model, held)
    assert torch.equal(model.content.weight, evaluated.content.weight)


def test_names_of_no_known_format_are_told_by_the_first():
    with pytest.raises(ValueError, match="the first is 'stem.0.weight'"):
        checkpoints.load_weights(toy(), {"stem.0.weight": torch.zeros(1), "head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="the first is 'module.stem.weight'"):      # as it stands in the file
        checkpoints.load_weights(toy(), {"module.stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="it holds no tensors"):
        checkpoints.load_weights(toy(), {3: torch.zeros(1), "names": ["a.b"]})


def test_arrays_in_a_file_are_weights(tmp_path):
    source, model = toy(seed=0), toy(seed=1)
    torch.save({"model": {key: value.numpy() for key, value in source.state_dict().items()}}, tmp_path / "x.pth")
    checkpoints.load_weights(model, tmp_path / "x.pth")
    assert torch.equal(model.content.weight, source.content.weight)


def test_a_fine_tuned_head_without_class_names_is_copied_and_told():
    """As many classes as the data has, and no names: the README's way to a teacher threw the head away."""
    source, model = toy(seed=0), toy(seed=1)
    report = checkpoints.load_weights(model, source.state_dict(), classes=["Car", "Pedestrian", "Cyclist"])
    assert not report.resized and not report.fresh_heads and "copied row by row" in str(report)
    assert torch.equal(model.decoder.class_heads[0].weight, source.decoder.class_heads[0].weight)
    assert torch.equal(model.label_embed.weight, source.label_embed.weight)


def test_the_classes_of_a_source_can_be_named():
    source, model = toy(seed=0), toy(seed=1)
    report = checkpoints.load_weights(model, source.state_dict(), classes=["Car", "Pedestrian", "Cyclist"],
                                      source_classes=["cyclist", "Car", "Dog"])
    own, theirs = model.decoder.class_heads[0].weight, source.decoder.class_heads[0].weight
    assert torch.equal(own[0], theirs[1]) and torch.equal(own[2], theirs[0]) and not torch.equal(own[1], theirs[2])
    assert "decoder.class_heads.0.weight" in report.fresh_heads


# --------------------------------------------------------------------------------------------------- damage and full disks

def npz():
    file = io.BytesIO()
    np.savez(file, **{"a.b": np.zeros(3)})
    return file.getvalue()


def legacy():
    """As torch wrote before its zips."""
    file = io.BytesIO()
    torch.save({"a.b": torch.zeros(1000)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("content, words", [
    (b"", "it is empty"), (bytes(5000), "it is empty"), (b'{"error": "Entry not found"}', "a text file, .*Entry not found"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    (b"\n<!DOCTYPE html><html>", "a web page"), (b"PK\x03\x04 cut", "damaged or of another kind"),
    (pickle.dumps({"model": 1}), "plain pickle"), (pickle.dumps([2], 2), "plain pickle"),
    (b"\x93NUMPY\x01\x00", "numpy's"), (npz(), "numpy's"),
    (legacy()[:900], "damaged or of another kind")])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_file_that_is_no_checkpoint_is_told_for_what_it_is(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        checkpoints.load(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "Weights only load" not in str(error.value)


@pytest.mark.parametrize("wrap", [
    dict, lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {"net": {f"module.backbone.{key}": value for key, value in state.items()}},
    lambda state: {"model": {key: value * 0 for key, value in state.items()}, "model_ema": state},
    lambda state: {f"backbone.{key}": value for key, value in state.items()} | {"head.bias": torch.zeros(1)},
    lambda state: {"state_dict": {f"model.backbone.0.body.{key}": value for key, value in state.items()}
                   | {"model.encoder.bias": torch.zeros(1), "criterion.weight": torch.zeros(1)}}])
def test_a_backbones_file_is_unwrapped(tmp_path, wrap):
    state = {"conv1.weight": torch.ones(2), "layer1.0.conv1.weight": torch.ones(3), "fc.bias": torch.ones(4)}
    torch.save(wrap(state), tmp_path / "x.pth")
    loaded = checkpoints.load_backbone(tmp_path / "x.pth")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("content, words", [
    (None, "no checkpoint at"), (b"", "it is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<html>", "a web page"), (legacy()[:900], "damaged"), ({"epoch": 3}, "holds no weights")])
def test_a_damaged_backbone_file_is_told_for_what_it_is(tmp_path, content, words):
    path = tmp_path / "x.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        checkpoints.load_backbone(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("metadata", ["[1]", "null", "3", "[" * 100_000])
def test_metadata_that_is_no_dictionary_is_refused(tmp_path, metadata):
    save_file({"a.b": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"payload": metadata})
    with pytest.raises(ValueError, match="x.safetensors is not a readable checkpoint"):
        checkpoints.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
@pytest.mark.parametrize("write", [
    lambda path: checkpoints.save(path, {"model": {"a.b": torch.zeros(2)}}),
    lambda path: checkpoints.write_json(path, {"AP": 0.5}), lambda path: checkpoints.write_text(path, "text")])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, write, error):
    path = tmp_path / "kept.pt"
    path.write_text("old")
    real = checkpoints.write_file

    def full(path, make):
        def fail(temporary):
            make(temporary)
            raise error
        real(path, fail)
    monkeypatch.setattr(checkpoints, "write_file", full)
    with pytest.raises(OSError, match="kept.pt was not written .* MB are free") as told:
        write(path)
    assert "\n" not in str(told.value) and path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_mount_without_rights_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    checkpoints.save(tmp_path / "x.pt", {"step": 1})
    assert checkpoints.load(tmp_path / "x.pt") == {"step": 1}


@pytest.mark.parametrize("content", ["", "{", '{"a": ', "\0\0"])
def test_a_damaged_json_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "speed.json").write_text(content)
    with pytest.raises(ValueError, match="speed.json cannot be read as JSON .*delete it"):
        checkpoints.read_json(tmp_path / "speed.json")


HOLDER = """
import checkpoints, time
with checkpoints.locked(FOLDER):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(checkpoints.fcntl is None, reason="no flock")
def test_a_lock_is_refused_in_one_line_and_ends_with_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PATIENCE", 0)
    program = HOLDER.replace("FOLDER", repr(str(tmp_path)))
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                              cwd=Path(checkpoints.__file__).parent)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in the hands of another run: wait") as error:
            with checkpoints.locked(tmp_path):
                pass
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    finally:
        holder.kill()
        holder.communicate()
    with checkpoints.locked(tmp_path):
        assert not list(tmp_path.iterdir())                     # nothing is left to be removed


def no_locks(*_):
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("fcntl", [None, types.SimpleNamespace(flock=no_locks, LOCK_EX=2, LOCK_NB=4)],
                         ids=["Windows", "a mount without locks"])
def test_without_flock_a_folder_is_written_to_all_the_same(tmp_path, monkeypatch, fcntl):
    monkeypatch.setattr(checkpoints, "fcntl", fcntl)
    with checkpoints.locked(tmp_path), checkpoints.locked(tmp_path):
        checkpoints.write_text(tmp_path / "x", "text ±")
    assert (tmp_path / "x").read_bytes() == "text ±".encode()


# --------------------------------------------------------------------------------------------------------- what fits

def test_another_class_count_without_names_keeps_the_rest(capsys):
    source, model = toy(seed=0, classes=91), toy(seed=1, classes=3)
    before = model.decoder.class_heads[0].weight.clone()
    report = checkpoints.load_weights(model, source.state_dict())
    assert set(report.resized) == {"decoder.class_heads.0.weight", "decoder.class_heads.0.bias", "label_embed.weight",
                                   "proposals.class_head.weight", "proposals.class_head.bias"}
    assert torch.equal(model.decoder.class_heads[0].weight, before)
    assert torch.equal(model.decoder.box_heads[0].layers[0].weight, source.decoder.box_heads[0].layers[0].weight)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "class_head" in printed and "92 to 4 rows: re-initialised" in printed


@pytest.mark.parametrize("detector, name", [("dino", "content"), ("dab_detr", "anchors"),
                                            ("deformable_detr", "queries")])
def test_another_query_count_keeps_the_first(detector, name):
    source, model = toy(seed=0, detector=detector, num_queries=9), toy(seed=1, detector=detector)
    report = checkpoints.load_weights(model, source.state_dict())
    first = getattr(source, name).weight[:6]
    assert torch.equal(getattr(model, name).weight, first) and list(report.resized) == [f"{name}.weight"]


def test_a_replaced_backbone_is_skipped():
    source = toy()
    model = toy(seed=1, backbone=OwnBackbone())
    report = checkpoints.load_weights(model, payload(source))
    assert report.missing == ["backbone.scale"] and all(key.startswith("backbone.") for key in report.skipped)


class OwnBackbone(nn.Module):
    channels = [16, 32, 64]                                               # as resnet18 of width 8

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        grey = images.mean(1, keepdim=True) * self.scale
        return [F.avg_pool2d(grey, s).expand(-1, c, -1, -1) for s, c in zip((8, 16, 32), self.channels)]


@pytest.mark.parametrize("detector, change, remedy", [
    ("dino", {"hidden_dim": 16}, r"models.build\('dino', ..., hidden_dim=32\)"),
    ("dino", {"encoder_layers": 2}, "encoder_layers=1"), ("dino", {"decoder_layers": 1}, "decoder_layers=2"),
    ("dino", {"ffn_dim": 40, "feature_levels": 3}, "feature_levels=4, ffn_dim=48"),
    ("dino", {"backbone": "resnet34"}, "backbone='resnet18'"), ("dino", {"backbone_width": 16}, "backbone_width=8"),
    ("dab_detr", {"num_patterns": 2}, "num_patterns=0"), ("deformable_detr", REFINE, "box_refine=False"),
    ("deformable_detr", TWO_STAGE, "two_stage=False"), ("dino", {"points": 2}, "another architecture"),
    ("dab_detr", {"feature_stride": 16}, "another architecture")])
def test_another_architecture_is_a_one_line_error_with_the_remedy_and_changes_nothing(detector, change, remedy):
    source, model = toy(seed=0, detector=detector), toy(seed=1, detector=detector, **change)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=remedy) as error:
        checkpoints.load_weights(model, source.state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("options", [{"heads": 4}, {"logit_eps": 1e-5},
                                     {"position_temperature": 1e4, "position_offset": -.5}])
def test_our_own_checkpoints_of_other_meaning_are_refused_by_their_config(options):
    source, model = toy(seed=0, detector="dab_detr"), toy(seed=1, detector="dab_detr", **options)
    checkpoints.load_weights(model, source.state_dict())                  # bare weights do not tell
    with pytest.raises(ValueError, match=", ".join(f"{name}={source.config[name]}" for name in options)):
        checkpoints.load_weights(model, payload(source, detector="dab_detr"))


@pytest.mark.parametrize("state, message", [({"fc.weight": torch.zeros(1)}, "no known format"),
                                            ({"model": {}, "detector": "x"}, "no known format")])
def test_foreign_files_are_one_line_errors(state, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.load_weights(toy(), state)


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_another_detector_is_refused_also_by_its_names_alone(detector):
    for other in set(models.DETECTORS) - {detector}:
        with pytest.raises(ValueError, match=f"holds a {other}, the model is a {detector}"):
            checkpoints.load_weights(toy(detector=detector), toy(detector=other).state_dict())


def test_a_model_of_your_own_without_config_is_taken_as_it_is():
    source, model = toy(seed=0), toy(seed=1)
    del model.config, model.detector
    assert not checkpoints.load_weights(model, source.state_dict()).missing


# ------------------------------------------------------------------------------------------------------- lists of names
# (official, detrex and MMDetection 2, MMDetection 3, Hugging Face) for ours, below what is written over the tables.

PROGRAMS = ("official", "detrex", "mmdetection3", "hugging_face")
ENCODER_LAYER = {     # transformer.encoder.layers.N, the same, encoder.layers.N, model.encoder.layers.N
    "attention": ("self_attn", "attentions.0", "self_attn", "self_attn"),
    "norm": ("norm1", "norms.0", "norms.0", "self_attn_layer_norm"),
    "ffn.linear1": ("linear1", "ffns.0.layers.0.0", "ffn.layers.0.0", "mlp.fc1"),
    "ffn.linear2": ("linear2", "ffns.0.layers.1", "ffn.layers.1", "mlp.fc2"),
    "ffn.norm": ("norm2", "norms.1", "norms.1", "final_layer_norm"),
}
DENSE_ENCODER_LAYER = ENCODER_LAYER | {
    "attention": ("self_attn", "attentions.0.attn", "self_attn.attn", "self_attn"),
    "ffn.linear1": ("linear1", "ffns.0.layers.0.0", "ffn.layers.0.0", "fc1"),
    "ffn.linear2": ("linear2", "ffns.0.layers.1", "ffn.layers.1", "fc2"),
    "ffn.activation": ("activation", "ffns.0.activation", "ffn.layers.0.1", "activation_fn"),
}
DECODER_LAYER = {
    "self_attention": ("self_attn", "attentions.0.attn", "self_attn.attn", "self_attn"),
    "self_norm": ("norm2", "norms.0", "norms.0", "self_attn_layer_norm"),
    "cross_attention": ("cross_attn", "attentions.1", "cross_attn", "encoder_attn"),
    "cross_norm": ("norm1", "norms.1", "norms.1", "encoder_attn_layer_norm"),
    "ffn.linear1": ("linear1", "ffns.0.layers.0.0", "ffn.layers.0.0", "mlp.fc1"),
    "ffn.linear2": ("linear2", "ffns.0.layers.1", "ffn.layers.1", "mlp.fc2"),
    "ffn.norm": ("norm3", "norms.2", "norms.2", "final_layer_norm"),
}
CONDITIONAL = {"query_content": ("qcontent", "query_content"), "query_position": ("qpos", "query_pos"),
               "query_sine": ("qpos_sine", "query_pos_sine"), "key_content": ("kcontent", "key_content"),
               "key_position": ("kpos", "key_pos"), "value": ("v", "value")}
DAB_DECODER_LAYER = {
    "self_attention.out_proj": ("self_attn.out_proj", "attentions.0.out_proj", "self_attn.out_proj",
                                "self_attn.self_attn.output_proj"),
    "self_norm": ("norm1", "norms.0", "norms.0", "self_attn.self_attn_layer_norm"),
    "cross_attention.out_proj": ("cross_attn.out_proj", "attentions.1.out_proj", "cross_attn.out_proj",
                                 "cross_attn.cross_attn.output_proj"),
    "cross_norm": ("norm2", "norms.1", "norms.1", "cross_attn.cross_attn_layer_norm"),
    "ffn.linear1": DECODER_LAYER["ffn.linear1"], "ffn.linear2": DECODER_LAYER["ffn.linear2"],
    "ffn.norm": ("norm3", "norms.2", "norms.2", "mlp.final_layer_norm"),
    "ffn.activation": ("activation", "ffns.0.activation", "ffn.layers.0.1", "mlp.activation_fn"),
} | {f"{kind}_attention.{ours}": (f"{kind[0]}a_{short}_proj", f"attentions.{number}.{long}_proj",
                                  f"{kind}_attn.{short}_proj", f"{kind}_attn.{kind}_attn_{long}_proj")
     for number, kind in enumerate(("self", "cross")) for ours, (short, long) in CONDITIONAL.items()}
REST = {
    "dab_detr": {
        "encoder.project": ("input_proj", "input_proj", "neck.convs.0.conv", "model.input_projection"),
        "encoder.position_scale": ("transformer.encoder.query_scale",) * 2 + ("encoder.query_scale",
                                                                              "model.encoder.query_scale"),
        "decoder.position_scale": ("transformer.decoder.query_scale",) * 2 + ("decoder.query_scale",
                                                                              "model.decoder.query_scale"),
        "decoder.position": ("transformer.decoder.ref_point_head",) * 2 + ("decoder.ref_point_head",
                                                                           "model.decoder.ref_point_head"),
        "decoder.anchor_size": ("transformer.decoder.ref_anchor_head",) * 2 + ("decoder.ref_anchor_head",
                                                                               "model.decoder.ref_anchor_head"),
        "decoder.norm": ("transformer.decoder.norm", "transformer.decoder.post_norm_layer", "decoder.post_norm",
                         "model.decoder.layernorm"),
        "decoder.class_heads.0": ("class_embed", "class_embed", "bbox_head.fc_cls", "class_embed"),
        "decoder.box_heads.0": ("bbox_embed", "bbox_embed", "bbox_head.fc_reg", "bbox_predictor"),
        "anchors": ("refpoint_embed", "anchor_box_embed", "query_embedding", "model.query_refpoint_embeddings"),
        "patterns": ("transformer.patterns", "transformer.patterns", "patterns", "model.patterns"),
    },
    "deformable_detr": {
        "encoder.level_embed": ("transformer.level_embed", "transformer.level_embeds", "level_embed",
                                "model.level_embed"),
        "queries": ("query_embed", "query_embedding", "query_embedding", "model.query_position_embeddings"),
        "reference": ("transformer.reference_points",) * 2 + ("reference_points_fc", "model.reference_points"),
        "position.project": ("transformer.pos_trans",) * 2 + ("pos_trans_fc", "model.pos_trans"),
        "position.norm": ("transformer.pos_trans_norm",) * 2 + ("pos_trans_norm", "model.pos_trans_norm"),
        "proposals.project": ("transformer.enc_output",) * 2 + ("memory_trans_fc", "model.enc_output"),
        "proposals.norm": ("transformer.enc_output_norm",) * 2 + ("memory_trans_norm", "model.enc_output_norm"),
    },
    "dino": {
        "encoder.level_embed": ("transformer.level_embed", "transformer.level_embeds", "level_embed"),
        "decoder.norm": ("transformer.decoder.norm",) * 2 + ("decoder.norm",),
        "decoder.position": ("transformer.decoder.ref_point_head",) * 2 + ("decoder.ref_point_head",),
        "proposals.project": ("transformer.enc_output",) * 2 + ("memory_trans_fc",),
        "proposals.norm": ("transformer.enc_output_norm",) * 2 + ("memory_trans_norm",),
        "content": ("transformer.tgt_embed", "transformer.tgt_embed", "query_embedding"),
        "label_embed": ("label_enc", "label_enc", "dn_query_generator.label_embedding"),
    },
}


def residual_network(program, detector, name):
    """Their name of a tensor of torchvision's ResNet."""
    if program == "detrex":
        name = re.sub(r"^(conv1|bn1)", r"stem.\1", name)
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        return "backbone." + re.sub(r"bn(\d)", r"conv\1.norm", name)
    if program == "hugging_face":
        name = re.sub(r"^conv1", "embedder.embedder.convolution", name)
        name = re.sub(r"^bn1", "embedder.embedder.normalization", name)
        name = re.sub(r"^layer(\d)\.(\d+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}", name)
        name = re.sub(r"(conv|bn)(\d)\.", lambda m: f"layer.{int(m[2]) - 1}.{m[1]}.", name)
        for ours, theirs in (("downsample.0", "shortcut.convolution"), ("downsample.1", "shortcut.normalization"),
                             (".conv.", ".convolution."), (".bn.", ".normalization.")):
            name = name.replace(ours, theirs)
        return f"model.backbone.{'conv_encoder.' if detector == 'dab_detr' else ''}model.{name}"
    return {"official": "backbone.0.body."}.get(program, "backbone.") + name


def modules(program, detector, model):
    """{our module: [their names of it; it may be stored several times]}, but for the backbone."""
    column = PROGRAMS.index("detrex" if program == "mmdetection2" else program)
    mmdetection, dab = program.startswith("mmdetection"), detector == "dab_detr"
    outer = {"mmdetection2": "bbox_head.transformer.", "mmdetection3": "", "hugging_face": "model."}
    outer = outer.get(program, "transformer.")
    table = {ours: [("bbox_head." if program == "mmdetection2" else "") + theirs[column]]
             for ours, theirs in REST[detector].items() if column < len(theirs)}
    parts = {"encoder": DENSE_ENCODER_LAYER if dab else ENCODER_LAYER,
             "decoder": DAB_DECODER_LAYER if dab else DECODER_LAYER}
    for coder, rows in parts.items():
        for layer in range(6):
            for ours, theirs in rows.items():
                table[f"{coder}.layers.{layer}.{ours}"] = [f"{outer}{coder}.layers.{layer}.{theirs[column]}"]
    if program == "detrex":                                               # FFN has its activation as an attribute too
        for theirs in table.values():
            theirs += [name.replace("activation", "layers.0.1") for name in theirs if "ffns.0.activation" in name]
    if dab:
        if program != "mmdetection3":
            table["decoder.box_heads.0"].append(f"{outer}decoder.bbox_embed")
        return table

    for level in range(4):
        convolution = f"neck.convs.{level}" if level < 3 else f"neck.extra_convs.{level - 3}"
        for part, name in enumerate(("conv", "gn" if mmdetection else "norm")):
            prefix = {"official": "", "hugging_face": "model."}.get(program)
            table[f"encoder.project.{level}.{part}"] = [f"{convolution}.{name}" if prefix is None else
                                                        f"{prefix}input_proj.{level}.{part}"]
    shared, proposals = len(model.decoder.box_heads) == 1, hasattr(model, "proposals")
    for layer in range(6 + proposals):
        ours = "proposals.{}_head" if layer == 6 else f"decoder.{{}}_heads.{0 if shared else layer}"
        for part in range(3) if mmdetection else ():
            table.setdefault(ours.format("box") + f".layers.{part}", []).append(
                f"bbox_head.reg_branches.{layer}.{2 * part}")
        for kind, embed, branches in (("class", "class_embed", "cls"), ("box", "bbox_embed", None)):
            theirs = table.setdefault(ours.format(kind), [])
            if mmdetection:
                theirs += [f"bbox_head.{branches}_branches.{layer}"] if branches else []
            elif program == "official" and detector == "dino" and layer == 6:
                theirs.append(f"transformer.enc_out_{embed}")
            else:
                theirs.append(f"{embed}.{layer}")
                if proposals or kind == "box" and not shared:             # the decoder refers to them: stored twice
                    theirs.append(f"{outer}decoder.{embed}.{layer}")
    return table


def names(program, detector, model):
    """{our name: [their names of the same tensor]}; a tuple of names: fused in ours; none: they have no such tensor."""
    table, found = modules(program, detector, model), {}
    for name in model.state_dict():
        if name.startswith("backbone."):
            found[name] = [residual_network(program, detector, name.removeprefix("backbone."))]
            continue
        module = max((module for module in table if (name + ".").startswith(module + ".")), key=len)
        found[name] = [theirs + name.removeprefix(module) for theirs in table[module]]
        if program.startswith("mmdetection") and re.match(r"encoder\.project\.\d\.0\.bias", name):
            found[name] = []                                              # mmcv: no bias before a norm
        if program == "hugging_face":
            if "in_proj_" in name:
                found[name] = [tuple(theirs.replace("in_proj_", f"{matrix}_proj.") for matrix in "qkv")
                               for theirs in found[name]]
            elif detector == "deformable_detr":
                found[name] = [theirs.replace("out_proj", "o_proj") for theirs in found[name]]
    return found


def number(name):
    return zlib.crc32(name.encode()) / 2 ** 32


def state_of(found, model):
    """Each of their tensors filled with the number of the first of its names; the shapes are those of ours."""
    state, own = {}, model.state_dict()
    for ours, theirs in found.items():
        shape = own[ours].shape
        for copies in zip(*[name if isinstance(name, tuple) else (name,) for name in theirs]):
            rows = shape[0] // len(theirs[0]) if isinstance(theirs[0], tuple) else shape[0] if shape else None
            state |= {name: torch.tensor(number(copies[0])).expand(rows, *shape[1:]) for name in copies}
    return state


def real_size(program, detector, **options):
    """R50, 256 wide, 6 + 6 layers, made quickly, its tensors full of NaN."""
    known = checkpoints.PUBLISHED.get((re.sub(r"\d", "", program), detector), (10000., -0.5, 1e-5))
    options |= dict(zip(("position_temperature", "position_offset", "logit_eps"), known))
    if detector == "dino" and program != "official":
        options["shared_heads"] = False
    with torch.device("meta"):
        model = models.build(detector, 91 if program in ("official", "hugging_face") else 80, pretrained_backbone=False,
                             frozen_backbone=True, **options)
    model = model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(torch.nan)
    return model


def lands(model, found, label_rows=None):
    """Whether each tensor of the model holds the number of its name."""
    own = model.state_dict()
    for ours, theirs in found.items():
        value = own[ours]
        if ours == "label_embed.weight":
            value = value[:label_rows]
        parts = theirs[0] if theirs and isinstance(theirs[0], tuple) else theirs[:1]
        for block, name in zip(value.chunk(len(parts) or 1) if value.ndim else [value], parts or [None]):
            want = torch.tensor(number(name) if name else 0.)
            assert (block == want).all(), (ours, name)


VARIANTS = [("dab_detr", {}), ("dab_detr", {"num_patterns": 3}), ("deformable_detr", {}), ("deformable_detr", REFINE),
            ("deformable_detr", TWO_STAGE), ("dino", {})]
EVERY = [(program, detector, options) for program in (*PROGRAMS, "mmdetection2") for detector, options in VARIANTS
         if not (program == "hugging_face" and detector == "dino" or
                 program == "mmdetection2" and detector != "deformable_detr")]


@pytest.mark.parametrize("program, detector, options", EVERY)
def test_every_tensor_of_a_complete_file_lands_at_its_place(program, detector, options):
    model = real_size(program, detector, **options)
    found = names(program, detector, model)
    state = state_of(found, model)
    rows = None
    if detector == "dino" and program != "official":
        rows = 80                                                         # one for each class, ours has one more
        label = found["label_embed.weight"][0]
        state[label] = state[label][:rows]
    report = checkpoints.load_weights(model, state)
    assert report.source == f"state_dict ({re.sub(r'[23]', '', program)})"
    assert not report.missing and not report.skipped
    assert list(report.resized) == ([] if rows is None else ["label_embed.weight"])
    lands(model, found, rows)


@pytest.mark.parametrize("detector, options", VARIANTS)
def test_the_official_lists_are_these(detector, options):
    """Names and shapes, but for the backbone: the vectors of all variants, or what golden/ has of the plain ones."""
    model = real_size("official", detector, **options)
    state = state_of(names("official", detector, model), model)
    variant = "_refine" * ("box_refine" in options) + "_two_stage" * ("two_stage" in options)
    file = VECTORS / f"init_stats_{detector}{'_4scale' if detector == 'dino' else variant}_r50.json"
    if file.exists():
        want = {name: tuple(facts["shape"]) for name, facts in json.loads(file.read_text()).items()}
    elif variant:
        pytest.skip("golden/ has the plain model only")
    else:
        want = {name: tuple(shape) for name, shape in golden(detector)[1]["keys"].items()}
    if "num_patterns" in options:
        want["transformer.patterns.weight"] = (3, 256)
    got = {name: tuple(value.shape) for name, value in state.items() if not name.startswith("backbone.")}
    queries = ("refpoint_embed.weight", "query_embed.weight", "transformer.tgt_embed.weight")
    assert {name: shape[1:] if name in queries else shape for name, shape in got.items()} == {
        name: shape[1:] if name in queries else shape for name, shape in want.items()}


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def hugging_face(detector, **options):
    """transformers' model of the installed version, its configuration by its own words."""
    transformers = pytest.importorskip("transformers")
    options = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None} | options
    name = {"dab_detr": "DabDetr", "deformable_detr": "DeformableDetr"}[detector]
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForObjectDetection")(config).eval()


def resnet_config(**options):
    return pytest.importorskip("transformers").ResNetConfig(out_features=["stage2", "stage3", "stage4"], **options)


def in_their_words(options):
    return {{"box_refine": "with_box_refine"}.get(name, name): value for name, value in options.items()}


def as_on_the_hub(name):
    """Deformable DETR's names in transformers 4 and in the hub's files, for those of transformers 5."""
    for new, old in (("backbone.model.", "backbone.conv_encoder.model."), ("self_attn.o_proj", "self_attn.out_proj"),
                     (".mlp.fc", ".fc")):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("detector, options", VARIANTS[:-1])
def test_the_lists_of_hugging_face_are_these(detector, options):
    with torch.device("meta"):
        theirs = hugging_face(detector, num_labels=91, backbone_config=resnet_config(), **in_their_words(options))
    model = real_size("hugging_face", detector, **options)
    want = shapes(state_of(names("hugging_face", detector, model), model))
    got = {name: shape for name, shape in shapes(theirs.state_dict()).items() if "num_batches" not in name}
    if detector == "deformable_detr" and any("conv_encoder" in name for name in got):
        want = {as_on_the_hub(name): shape for name, shape in want.items()}
    assert got == want


@pytest.mark.parametrize("prefix", ["model.backbone.conv_encoder.model.", "model.backbone.model._backbone."])
@pytest.mark.parametrize("detector, options", [("dab_detr", {}), ("deformable_detr", TWO_STAGE)])
def test_files_on_the_hub_have_older_names_and_a_backbone_of_timm(detector, options, prefix):
    model = real_size("hugging_face", detector, **options)
    found = names("hugging_face", detector, model)
    for ours in found:
        if ours.startswith("backbone."):
            found[ours] = [prefix + ours.removeprefix("backbone.")]
        elif detector == "deformable_detr":
            found[ours] = [tuple(map(as_on_the_hub, name)) if isinstance(name, tuple) else as_on_the_hub(name)
                           for name in found[ours]]
    report = checkpoints.load_weights(model, state_of(found, model))
    assert not report.missing and not report.skipped and not report.resized
    lands(model, found)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_a_torchvision_backbone_fills_the_backbone_alone(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().state_dict()
    state = {key: torch.tensor(number(key)).expand(value.shape) for key, value in theirs.items()}
    model = toy(backbone=name, backbone_width=64, frozen_backbone=False)
    before = model.content.weight.clone()
    report = checkpoints.load_weights(model, state)
    own = model.backbone.state_dict()
    assert {f"backbone.{key}": key for key in own} == report.loaded
    assert all((own[key] == torch.tensor(number(key))).all() for key in own if "num_batches" not in key)
    assert torch.equal(model.content.weight, before) and not report.skipped
    assert report.missing == [key for key in model.state_dict() if not key.startswith("backbone.")]


@pytest.mark.parametrize("detector, options", VARIANTS)
def test_ours_is_a_format_too(detector, options):
    source, model = toy(0, detector, **options), toy(1, detector, **options)
    report = checkpoints.load_weights(model, source.state_dict())
    assert report.source.endswith("(ours)") and not report.missing and not report.skipped and not report.resized
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------------- heads

def six_layers(program, detector, classes=3, seed=0, **options):
    """A small model of six layers, their state_dict of it with random numbers, and their names."""
    known = checkpoints.PUBLISHED[re.sub(r"\d", "", program), detector]
    program = "mmdetection3" if program == "mmdetection" else program
    options = dict(zip(("position_temperature", "position_offset", "logit_eps"), known)) | options
    model = toy(seed, detector, classes, backbone=OwnBackbone(), encoder_layers=6, decoder_layers=6, **options)
    found = names(program, detector, model)
    found = {ours: theirs for ours, theirs in found.items() if not ours.startswith("backbone.")}
    generator = torch.Generator().manual_seed(seed + 1)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in state_of(found, model).items()}
    for theirs in found.values():
        state |= {copied: state[theirs[0]] for copied in theirs[1:] if isinstance(copied, str)}
    return model, state, found


@pytest.mark.parametrize("program, detector, remedy", [
    ("official", "deformable_detr", "box_refine=True"), ("detrex", "deformable_detr", "box_refine=True"),
    ("mmdetection2", "deformable_detr", "box_refine=True"), ("mmdetection3", "deformable_detr", "box_refine=True"),
    ("hugging_face", "deformable_detr", "box_refine=True"), ("official", "dino", "shared_heads=False"),
    ("detrex", "dino", "shared_heads=False"), ("mmdetection3", "dino", "shared_heads=False")])
def test_heads_that_differ_need_a_model_with_one_for_each_layer(program, detector, remedy):
    """Equal ones are taken by a model that has one for all."""
    model, state, found = six_layers(program, detector)
    checkpoints.load_weights(model, state)
    key = found["decoder.class_heads.0.bias"][-1]
    assert torch.equal(model.decoder.class_heads[0].bias, state[key])
    last = [name for name in state if re.search(r"(class_embed|cls_branches)\.5\.bias$", name)]
    state |= dict.fromkeys(last, state[key] + 1)
    with pytest.raises(ValueError, match=remedy) as error:
        checkpoints.load_weights(model, state)
    assert "\n" not in str(error.value) and len(model.decoder.class_heads) == 1
    del model.config
    with pytest.raises(ValueError, match=f"{re.escape(last[0])} differs from .*, this model has one for both"):
        checkpoints.load_weights(model, state)


@pytest.mark.parametrize("program", ["official", "detrex", "hugging_face"])
def test_refinement_is_known_by_the_boxes_that_the_decoder_refers_to_even_when_all_heads_are_equal(program):
    refine, state, found = six_layers(program, "deformable_detr", **REFINE)
    for kind in (r"class_embed", r"bbox_embed"):
        state |= {name: state[re.sub(kind + r"\.\d", kind + ".0", name)] for name in state if kind in name}
    assert not checkpoints.load_weights(refine, state).skipped
    plain, _, _ = six_layers(program, "deformable_detr")
    with pytest.raises(ValueError, match="made with box_refine=True"):
        checkpoints.load_weights(plain, state)


def test_a_module_that_is_stored_twice_must_be_one():
    model, state, _ = six_layers("official", "dab_detr")
    state["transformer.decoder.bbox_embed.layers.0.bias"] = state["bbox_embed.layers.0.bias"] + 1
    with pytest.raises(ValueError, match="bbox_embed.layers.0.bias differs from"):
        checkpoints.load_weights(model, state)


@pytest.mark.parametrize("program", ["detrex", "mmdetection3"])
def test_more_levels_than_maps_count_on(program):
    """extra_convs.0 is the level after the last of convs: of one map of the backbone, the second."""
    class One(OwnBackbone):
        channels = [16]

    model = toy(detector="deformable_detr", backbone=One(), feature_levels=3,
                logit_eps=checkpoints.PUBLISHED[re.sub(r"\d", "", program), "deformable_detr"][2])
    kinds = ("conv", "norm" if program == "detrex" else "gn")
    state, own = {}, model.state_dict()
    for level, module in enumerate(("neck.convs.0", "neck.extra_convs.0", "neck.extra_convs.1")):
        for part, kind in enumerate(kinds):
            for tensor in ("weight", "bias"):
                value = own[f"encoder.project.{level}.{part}.{tensor}"]
                state[f"{module}.{kind}.{tensor}"] = torch.full_like(value, level + part / 2)
    found = checkpoints.translate(state, re.sub(r"\d", "", program), "deformable_detr", "x")
    assert {name: value.flatten()[0].item() for name, (_, value) in found.items()} == {
        f"encoder.project.{level}.{part}.{tensor}": level + part / 2
        for level in range(3) for part in range(2) for tensor in ("weight", "bias")}


# ------------------------------------------------------------------------------------------------------------- meanings

OFFICIAL = {"dab_detr": {"position_temperature": 20., "position_offset": 0., "logit_eps": 1e-3},
            "deformable_detr": {"position_temperature": 10000., "position_offset": -0.5, "logit_eps": 1e-5},
            "dino": {"position_temperature": 20., "position_offset": 0., "logit_eps": 1e-3}}
OTHERWISE = {("detrex", "deformable_detr"): {"logit_eps": 1e-3}, ("hugging_face", "dab_detr"): {"logit_eps": 1e-5},
             ("detrex", "dino"): {"position_temperature": 10000., "position_offset": -0.5}}


@pytest.mark.parametrize("program, detector", checkpoints.PUBLISHED)
def test_what_a_default_model_lacks_for_each_program(program, detector):
    """Ours are the official values; three programs' models differ, as read in their sources."""
    different = OTHERWISE.get((program, detector), {})
    model, state, _ = six_layers(program, detector, **OFFICIAL[detector])
    assert {name: model.config[name] for name in OFFICIAL[detector]} == OFFICIAL[detector] == {
        name: models.options_of(detector)[name] for name in OFFICIAL[detector]}
    if different:
        named = ", ".join(f"{name}={value!r}" for name, value in different.items())
        with pytest.raises(ValueError, match=f"made with {named}, the model"):
            checkpoints.load_weights(model, state)
    else:
        checkpoints.load_weights(model, state)


@pytest.mark.parametrize("program, detector, wrong", [
    ("detrex", "dino", {"position_temperature": 20., "position_offset": 0.}),
    ("detrex", "dino", {"heads": 4, "points": 8}), ("detrex", "deformable_detr", {"logit_eps": 1e-5}),
    ("hugging_face", "dab_detr", {"logit_eps": 1e-3}), ("mmdetection3", "dab_detr", {"logit_eps": 1e-5}),
    ("official", "dino", {"position_temperature": 1e4, "position_offset": -0.5}),
    ("mmdetection2", "deformable_detr", {"position_offset": 0.}), ("official", "dab_detr", {"heads": 4})])
def test_equal_shapes_of_another_meaning_are_refused_unless_you_know_better(program, detector, wrong):
    model, state, _ = six_layers(program, detector, **wrong)
    right = dict(zip(("position_temperature", "position_offset", "logit_eps", "heads"),
                     (*checkpoints.PUBLISHED[re.sub(r"\d", "", program), detector], 8)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        checkpoints.load_weights(model, state)
    named = ", ".join(f"{name}={right[name]!r}" for name in right if name in wrong)
    assert f"was made with {named}, the model with" in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not checkpoints.load_weights(model, state, made_with={k: v for k, v in wrong.items() if k in right}).skipped


@pytest.mark.parametrize("said, message", [({"pe_temperatureH": 10000}, "position_temperature=10000"),
                                           ({"nheads": 4}, "heads=4"), ({"dilation": True}, "dilation")])
def test_the_arguments_in_an_official_file_count(said, message):
    model, state, _ = six_layers("official", "dino")
    good = argparse.Namespace(pe_temperatureH=20, nheads=8, dilation=False, two_stage=None)
    assert not checkpoints.load_weights(model, {"model": state, "args": good}).skipped
    with pytest.raises(ValueError, match=message):
        checkpoints.load_weights(model, {"model": state, "args": argparse.Namespace(**vars(good) | said)})


# -------------------------------------------------------------------------------------------------------------- classes

def rows_of(model, name):
    return model.state_dict()[name].flatten(1)[:, 0] if "weight" in name else model.state_dict()[name]


def numbered_rows(state, found, classes, label=None):
    """The class rows of their state_dict hold their own number."""
    for ours, theirs in found.items():
        if re.search(r"class_head|label_embed", ours):
            rows = torch.arange(float((label or classes) if ours.startswith("label") else classes))
            for name in theirs:
                state[name] = rows[:, None].expand(-1, 32) if "weight" in ours else rows


COCO_IDS = [i for i in range(91) if i not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]     # the official 80


def test_91_official_rows_are_the_80_classes_of_coco():
    model, state, found = six_layers("official", "dino", classes=80)
    numbered_rows(state, found, 91, label=92)
    report = checkpoints.load_weights(model, {"model": state})
    for name in ("decoder.class_heads.0.weight", "decoder.class_heads.0.bias", "proposals.class_head.bias"):
        assert rows_of(model, name).tolist() == COCO_IDS and report.resized[name] == "(91 to 80 rows: by class)"
    # stop sign, the 12th of COCO's classes, is number 13 of the official ids.
    assert checkpoints.COCO[80][11] == checkpoints.COCO[91][13] == "stop sign"
    assert rows_of(model, "label_embed.weight").tolist() == COCO_IDS + [91]


@pytest.mark.parametrize("program", ["detrex", "mmdetection3"])
def test_80_rows_go_to_their_official_ids(program):
    model, state, found = six_layers(program, "dino", classes=91, shared_heads=False)
    numbered_rows(state, found, 80)
    before = rows_of(model, "decoder.class_heads.3.weight").clone()
    report = checkpoints.load_weights(model, state)
    after = rows_of(model, "decoder.class_heads.3.weight")
    assert after[COCO_IDS].tolist() == list(range(80))
    assert after[0] == before[0] and after[83] == before[83]              # no classes
    change = report.resized["decoder.class_heads.3.weight"]
    assert change == "(80 to 91 rows: 80 classes by name, the others re-initialised)"


def test_an_object_is_row_0_of_a_two_stage_deformable_detr_whatever_the_classes():
    """Its proposals have one class, stored as the first of as many rows as there are classes."""
    model, state, found = six_layers("official", "deformable_detr", classes=80, **TWO_STAGE)
    numbered_rows(state, found, 91)
    report = checkpoints.load_weights(model, state)
    assert rows_of(model, "proposals.class_head.weight").tolist() == list(range(80))
    assert rows_of(model, "decoder.class_heads.5.weight").tolist() == COCO_IDS
    assert report.resized["proposals.class_head.bias"] == "(91 to 80 rows: the first kept)"


def test_kitti_takes_over_what_has_the_same_name():
    model, state, found = six_layers("official", "dab_detr", classes=3)
    numbered_rows(state, found, 91)
    before = rows_of(model, "decoder.class_heads.0.bias").clone()
    report = checkpoints.load_weights(model, state, classes=["Car", "Pedestrian", "Cyclist"])
    assert rows_of(model, "decoder.class_heads.0.bias").tolist() == [3., before[1], before[2]]      # COCO's car is 3
    assert report.resized["decoder.class_heads.0.bias"] == "(91 to 3 rows: car by name, the others re-initialised)"


def test_names_in_the_file_count_more_than_numbers_of_classes():
    """MMDetection's meta, our own classes, the hub's id2label: also for as many classes in another order."""
    model, state, found = six_layers("mmdetection3", "dab_detr", classes=3)
    numbered_rows(state, found, 3)
    order = ("b", "c", "a")
    for meta in {"CLASSES": order}, {"dataset_meta": {"CLASSES": order}}, {"dataset_meta": {"classes": list(order)}}:
        report = checkpoints.load_weights(model, {"state_dict": state, "meta": meta}, classes=["a", "b", "c"])
        assert rows_of(model, "decoder.class_heads.0.bias").tolist() == [2, 0, 1]
        assert report.resized["decoder.class_heads.0.bias"] == "(3 to 3 rows: by class)"
    checkpoints.load_weights(model, {"state_dict": state, "meta": meta})                  # nothing known of the model's
    assert rows_of(model, "decoder.class_heads.0.bias").tolist() == [0, 1, 2]
    ours = toy(seed=1, classes=3)
    ours.decoder.class_heads[0].bias.data = torch.arange(3.)
    target = toy(seed=2, classes=2)
    checkpoints.load_weights(target, payload(ours), classes=["C", "A"])
    assert target.decoder.class_heads[0].bias.tolist() == [2, 0]
    checkpoints.load_weights(target, payload(ours, classes=None, config=ours.config | {
        "id2label": {"2": "c", "0": "x", "1": "a"}}), classes=["C", "A"])        # not in their order
    assert target.decoder.class_heads[0].bias.tolist() == [2, 1]


def test_80_classes_that_are_not_cocos_are_copied_as_they_are():
    source, model = toy(seed=0, classes=80), toy(seed=1, classes=80)
    report = checkpoints.load_weights(model, payload(source, classes=[f"class {i}" for i in range(80)]))
    assert not report.resized and torch.equal(model.decoder.class_heads[0].weight, source.decoder.class_heads[0].weight)


def test_a_wrong_number_of_class_names_is_an_error():
    with pytest.raises(ValueError, match="names 2, but the model has 3"):
        checkpoints.load_weights(toy(), toy(classes=4).state_dict(), classes=["a", "b"])
    with pytest.raises(ValueError, match="source_classes names 2, but state_dict has 4: give a name for each"):
        checkpoints.load_weights(toy(), toy(classes=4).state_dict(), classes=["a", "b", "c"], source_classes=["a", "b"])


def test_what_is_no_file_and_no_state_dict_is_named():
    with pytest.raises(ValueError, match="not a Linear: give model.state_dict"):
        checkpoints.load_weights(toy(), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="source='nonsense': choose from auto, ours"):
        checkpoints.load_weights(toy(), {}, source="nonsense")


def test_a_dn_detr_is_no_dab_detr():
    """Its names are DAB-DETR's and one more, but its queries do not begin as zeros."""
    source = toy(detector="dab_detr").state_dict() | {"label_enc.weight": torch.zeros(4, 31)}
    with pytest.raises(ValueError, match="holds a DN-DETR"):
        checkpoints.load_weights(toy(detector="dab_detr"), source)


def test_quantized_weights_are_refused():
    source = toy().state_dict()
    key = next(key for key in source if ".ffn." in key and key.endswith("weight"))
    source[key] = (100 * source[key]).to(torch.int8)
    with pytest.raises(ValueError, match=f"{key} is torch.int8, quantized by its program"):
        checkpoints.load_weights(toy(seed=1), source)


def test_a_foreign_payload_under_our_key_is_told_in_a_line():
    with pytest.raises(ValueError) as error:
        checkpoints.load_weights(toy(detector="dab_detr"), {"detector": toy(detector="dino").state_dict()})
    assert "holds a dino, the model is a dab_detr" in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tied_weights_are_saved_and_a_link_stays_one(tmp_path, suffix):
    tied = torch.arange(3.)
    real, link = tmp_path / f"disk{suffix}", tmp_path / f"last{suffix}"
    link.symlink_to(real)
    checkpoints.save(link, {"model": {"a": tied, "b": tied}})
    assert link.is_symlink() and checkpoints.load(real)["model"]["b"].tolist() == [0, 1, 2]


# -------------------------------------------------------------------------------------------------------------- the hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one model; files: {name: content}."""
    def publish(files, error=None):
        library = types.ModuleType("huggingface_hub")
        library.utils = types.ModuleType("huggingface_hub.utils")
        library.utils.EntryNotFoundError = type("EntryNotFoundError", (Exception,), {})
        if isinstance(error, Offline):
            error = type("LocalEntryNotFoundError", (library.utils.EntryNotFoundError, FileNotFoundError), {})(error)

        def hf_hub_download(repository, file):
            if error:
                raise error
            if (repository, file) not in {("org/name", name) for name in files}:
                raise library.utils.EntryNotFoundError(file)
            return str(tmp_path / file)
        library.hf_hub_download = hf_hub_download
        for name, content in files.items():
            if name.endswith(".json"):
                (tmp_path / name).write_text(json.dumps(content))
            elif name.endswith(".safetensors"):
                save_file({key: value.clone() for key, value in content.items()}, tmp_path / name, {"format": "pt"})
            else:
                torch.save(content, tmp_path / name)
        monkeypatch.setitem(sys.modules, "huggingface_hub", library)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", library.utils)
    return publish


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_on_the_hub_is_a_source(hub, file, capsys):
    model, state, found = six_layers("hugging_face", "deformable_detr")
    hub({file: state, "config.json": {"encoder_attention_heads": 8, "two_stage": False, "with_box_refine": False,
                                      "dilation": False, "id2label": {"0": "x", "1": "y", "2": "z"}}})
    report = checkpoints.load_weights(model, "hf:org/name")
    assert not report.missing[1:] and not report.skipped and report.source == "hf:org/name (hugging_face)"
    assert torch.equal(model.queries.weight, state["model.query_position_embeddings.weight"])
    assert "hf:org/name" in capsys.readouterr().out


def test_the_hubs_configuration_counts(hub):
    model, state, _ = six_layers("hugging_face", "deformable_detr")
    hub({"model.safetensors": state, "config.json": {"encoder_attention_heads": 4}})
    with pytest.raises(ValueError, match="heads=4"):
        checkpoints.load_weights(model, "hf:org/name")
    hub({"model.safetensors": state, "config.json": {"dilation": True}})
    with pytest.raises(ValueError, match="dilation"):
        checkpoints.load_weights(model, "hf:org/name")
    hub({"model.safetensors": state})                                     # without config.json, too
    assert not checkpoints.load_weights(model, "hf:org/name").skipped


class Offline(FileNotFoundError):
    """huggingface_hub's own kind is an EntryNotFoundError, too."""


@pytest.mark.parametrize("error, message", [(None, "neither model.safetensors nor pytorch_model.bin"),
                                            (OSError("no\nrights"), "cannot fetch hf:org/name .no rights"),
                                            (Offline("no\nconnection"), "cannot fetch hf:org/name .no connection")])
def test_a_hub_without_the_model_is_a_one_line_error(hub, error, message):
    hub({}, error)
    with pytest.raises(ValueError, match=message) as raised:
        checkpoints.load_weights(toy(), "hf:org/name")
    assert "\n" not in str(raised.value)


def test_the_hub_needs_its_package_only_when_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        checkpoints.load_weights(toy(), "hf:org/name")
    checkpoints.load_weights(toy(), toy().state_dict())


# ---------------------------------------------------------------------------------------------------------- live oracle

@pytest.fixture
def pair(monkeypatch):
    """(detector, options) -> transformers' tiny model with everything random, and ours of the same weights."""
    monkeypatch.setitem(models.RESNETS, "tiny", (Bottleneck, (2, 1, 1, 1)))
    monkeypatch.setitem(checkpoints.RESNETS, (1, True), "tiny")

    def build(detector, state=None, made_with=None, **options):
        backbone = resnet_config(embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[2, 1, 1, 1])
        width = {"dab_detr": "hidden_size", "deformable_detr": "d_model"}[detector]
        options_of_theirs = in_their_words({k: v for k, v in options.items() if k != "logit_eps"})
        torch.manual_seed(0)
        theirs = hugging_face(detector, backbone_config=backbone, num_labels=5, encoder_layers=2, decoder_layers=2,
                              encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=12, two_stage_num_proposals=12,
                              auxiliary_loss=True, **{width: 64}, **options_of_theirs)
        with torch.no_grad():
            for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
                wide = any(part in name for part in ("refpoint", "query_position", "patterns", "reference_points"))
                value.add_(torch.randn_like(value) * (0.2 if value.ndim == 1 else 1. if wide else 0.1))
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
            if detector == "dab_detr":                                    # some anchors where eps decides
                theirs.model.query_refpoint_embeddings.weight[:4] *= 6
        ours = models.build(detector, 5, backbone="tiny", backbone_width=8, pretrained_backbone=False,
                            frozen_backbone=True, hidden_dim=64, ffn_dim=48, encoder_layers=2, decoder_layers=2,
                            num_queries=12, **options).eval()
        report = checkpoints.load_weights(ours, (state or dict)(theirs.state_dict()), made_with=made_with)
        assert not report.missing and not report.skipped and not report.resized
        return theirs, ours
    return build


def batch():
    torch.manual_seed(1)
    images, padding = torch.randn(2, 3, 100, 131), torch.ones(2, 100, 131, dtype=torch.bool)
    padding[0, :74, :131], padding[1, :100, :77] = False, False
    return images.masked_fill(padding[:, None], 0.), padding


def compare(theirs, ours):
    """-> largest differences (memory, logits of all layers, boxes of all layers), and transformers' losses."""
    images, padding = batch()
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.2} for _ in images]
    memory = []
    theirs.model.encoder.register_forward_hook(lambda module, inputs, output: memory.append(output.last_hidden_state))
    with torch.no_grad():
        want = theirs(pixel_values=images, pixel_mask=(~padding).long(), labels=labels)
        got = ours(images, padding)
    logits = torch.stack([layer["logits"] for layer in want.auxiliary_outputs] + [want.logits])
    boxes = torch.stack([layer["pred_boxes"] for layer in want.auxiliary_outputs] + [want.pred_boxes])
    assert logits.shape == got.detections.logits.shape and logits.std() > 0.1 and boxes.std() > 0.05
    return ((memory[0] - got.memory.tokens).abs().max().item(),
            (logits - got.detections.logits).abs().max().item(), (boxes - got.detections.boxes).abs().max().item(),
            want.loss_dict)


@pytest.mark.parametrize("detector, options", VARIANTS[:-1])
def test_transformers_computes_the_same_with_the_same_weights(pair, detector, options):
    theirs, ours = pair(detector, **options, **({"logit_eps": 1e-5} if detector == "dab_detr" else {}))
    memory, logits, boxes, losses = compare(theirs, ours)
    assert memory < 1e-4 and logits < 1e-4 and boxes < 2e-5
    assert "loss_ce_enc" in ours.loss_weights or "two_stage" not in options
    assert not any("enc" in name for name in losses)                      # it never trains two-stage proposals


def test_transformers_dab_detr_has_another_eps_than_the_official(pair):
    """1e-5: with the official 1e-3 boxes differ, which `load_weights` refuses to overlook."""
    with pytest.raises(ValueError, match="made with logit_eps=1e-05, the model with logit_eps=0.001"):
        pair("dab_detr")
    _, _, boxes, _ = compare(*pair("dab_detr", made_with={"logit_eps": 1e-3}))
    assert boxes > 1e-3


def test_transformers_ties_the_class_heads_of_a_refining_model(pair):
    """A new one has one class head, though refined boxes; its file may store it once, ours has it for each layer."""
    def stored_once(state):
        return {name: value for name, value in state.items() if not re.match(r"class_embed\.[1-9]", name)}

    theirs, ours = pair("deformable_detr", stored_once, **REFINE)
    assert theirs.class_embed[0].weight is theirs.class_embed[1].weight
    assert torch.equal(ours.decoder.class_heads[1].weight, theirs.class_embed[0].weight)
    assert compare(theirs, ours)[1] < 1e-4


@needs_vectors
@pytest.mark.parametrize("case, detector, options", [
    ("dab_detr", "dab_detr", {}), ("dab_detr_3pat", "dab_detr", {"num_patterns": 3}),
    ("deformable_detr", "deformable_detr", {}), ("deformable_detr_refine", "deformable_detr", REFINE),
    ("deformable_detr_refine_two_stage", "deformable_detr", TWO_STAGE)])
def test_official_state_dicts_say_with_which_options_they_were_made(case, detector, options):
    """Every wrong variant of a detector is refused with the right options in the error."""
    tensors = load_file(VECTORS / f"{case}.safetensors")
    state = {name.removeprefix("state_dict."): value for name, value in tensors.items() if "state_dict." in name}
    for _, other in [variant for variant in VARIANTS if variant[0] == detector]:
        model = toy(0, detector, 91, backbone=OwnBackbone(), hidden_dim=64, ffn_dim=96, encoder_layers=2, **other)
        wrong = {name for name in options.keys() | other if options.get(name, 0) != other.get(name, 0)}
        if wrong:
            with pytest.raises(ValueError) as error:
                checkpoints.load_weights(model, state)
            assert all(f"{name}={options.get(name, name == 'num_patterns' and 0)}" in str(error.value)
                       for name in wrong)
