"""Files: save and load without ever executing code, and read published weights into models.py.

A payload is a nested dict / list of tensors, numbers, strings and None. A model's payload is
{"model": state_dict, "detector": name, "config": model.config, "classes": [...],
"category_ids": [...]} and whatever else the caller adds.

`load_weights` knows other programs' models by two kinds of tables: what they call our parameters
(FORMATS), and how they compute differently with equally named weights (PUBLISHED).
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

try:
    import fcntl
except ImportError:                                              # Windows
    fcntl = None


# -------------------------------------------------------------------------------------------- files

class Ignored:
    """Placeholder for pickled objects that are not needed: takes any arguments and does nothing."""
    def __init__(self, *args):
        pass


class Refused(ValueError):
    """A file holds something that is not read, although the file is whole."""


class Dtype:
    """Stands for numpy.dtype in a file: only numbers, and only the byte order as its state.

    numpy's own class also accepts types that hold Python objects, and would take the objects'
    addresses from the file.
    """
    def __init__(self, code, *flags):
        if not re.fullmatch(r"[?bB]|[biuf][1248]|c8|c16", code if isinstance(code, str) else ""):
            raise Refused(f"holds a numpy array or number of type {code!r}; only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        plain = (None, None, None, -1, -1, 0)
        if not (isinstance(state, tuple) and state[2:] == plain and state[1] in ("<", ">", "|")):
            raise Refused("holds a numpy type with a state of its own")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray):
    """Stands for numpy.ndarray in a file.

    It begins empty (see `empty_array`) and is filled once, from exactly as many bytes as it holds.
    """
    def __new__(cls, *args):
        raise Refused("calls numpy.ndarray, which takes any memory for an array")

    def __setstate__(self, state):
        if hasattr(self, "filled"):            # a second time would free memory that others look at
            raise Refused("holds a numpy array that changes while it is read")
        version, shape, kind, fortran, content = state
        whole = (isinstance(shape, tuple) and len(shape) <= 32
                 and all(type(n) is int and n >= 0 for n in shape))
        if not (whole and isinstance(kind, Dtype) and isinstance(content, bytes)
                and math.prod(shape) * kind.dtype.itemsize == len(content)):
            raise Refused("holds a numpy array whose bytes do not fit its shape")
        super().__setstate__((1, shape, kind.dtype, bool(fortran), content))
        self.filled = True


def empty_array(*args):
    """Stands for numpy's `_reconstruct`, which makes an array without elements."""
    return np.ndarray.__new__(Array, (0,), np.uint8)


def numpy_number(kind, content):
    """Stands for numpy's `scalar`, which makes one number from its bytes."""
    if not (isinstance(kind, Dtype) and isinstance(content, bytes)
            and len(content) == kind.dtype.itemsize):
        raise Refused("holds a numpy number whose bytes do not fit its type")
    return np.frombuffer(content, kind.dtype)[0]


def stands_for(name, stand_in):
    """The class, or a copy of the function, under the name by which torch finds it in a file."""
    if not isinstance(stand_in, type):
        stand_in = functools.partial(stand_in)
    stand_in.__module__, _, stand_in.__qualname__ = name.rpartition(".")
    stand_in.__name__ = stand_in.__qualname__                        # torch 2.4 reads this one
    return stand_in


# What published .pth files hold in addition to tensors, and what cannot execute anything when it is
# unpickled: the arguments of official programs, numpy's numbers and arrays (numpy 1 says core,
# numpy 2 _core), MMEngine's log of the training.
INERT = [argparse.Namespace, stands_for("numpy.dtype", Dtype), stands_for("numpy.ndarray", Array),
         *[stands_for(f"numpy.{core}.multiarray.{name}", stand_in) for core in ("core", "_core")
           for name, stand_in in (("scalar", numpy_number), ("_reconstruct", empty_array))],
         stands_for("_codecs.encode", str.encode),                 # bytes; from torch 2.5 on its own
         stands_for("builtins.bytes", lambda: b""),                # of an array without elements
         # torch's unpickler fills no defaultdict, but fills a dictionary.
         stands_for("collections.defaultdict", lambda *factory: {}),
         list, dict, set, int, float,                              # the factories of a defaultdict
         stands_for("mmengine.logging.history_buffer.HistoryBuffer", Ignored),
         stands_for("builtins.getattr", lambda *names: Ignored())]


@contextlib.contextmanager
def inert_allowed():
    """Let torch's unpickler meet INERT, for as long as one file is read."""
    others = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(INERT)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def save(path: str | Path, payload: dict, half: bool = False) -> None:
    """Write atomically: a crash at any moment leaves the old file or the new one, never a mix.

    A file named *.safetensors holds payload["model"] as tensors and the rest, which must be plain
    values, as JSON in its metadata. Any other name: torch.save of the whole payload.
    half: write floating-point weights as float16.
    Raises ValueError, and leaves the old file, when weights are not finite.
    """
    path = Path(path)
    if half:
        payload = payload | {"model": {key: value.half() if value.is_floating_point() else value
                                       for key, value in payload["model"].items()}}
    check_finite(weights_of(payload), path)

    def write(temporary):
        if path.suffix == ".safetensors":
            # Cloned, since safetensors refuses tied weights.
            weights = {key: value.clone(memory_format=torch.contiguous_format)
                       for key, value in payload["model"].items()}
            rest = {key: value for key, value in payload.items() if key != "model"}
            save_file(weights, temporary, metadata={"payload": json.dumps(rest)})
        else:
            torch.save(payload, temporary)

    write_file(path, write)


def write_file(path: str | Path, write) -> None:
    """Let `write(temporary path)` make a file, and put it in place at once when it is whole.

    A crash at any moment leaves the old file or the new one. Raises OSError, in one line that names
    the file, when it cannot be written; the old file is then intact.
    """
    path, temporary = Path(os.path.realpath(path)), None     # a link stays one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):                   # mkstemp makes private files; some
            os.chmod(temporary, 0o644)                       # mounts know no rights at all
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # On a full disk torch and safetensors raise errors of their own, which do not say so.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        free = ""
        with contextlib.suppress(OSError):
            free = f"; {shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free on its disk"
        raise OSError(f"{path} was not written ({reason}{free}): what stood there before is as it "
                      "was; if the disk is full make room, or choose another folder") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def load(path: str | Path) -> dict:
    """Read what `save` wrote, or any .pth / .safetensors file, to the CPU, without executing code.

    float16 weights stay float16. Raises FileNotFoundError or ValueError with one line: a missing or
    damaged file, a pickle that holds more than data, weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: check the path")
    with open(path, "rb") as file:
        start = file.read(200)
    # A safetensors file is known by what it holds: the length of a JSON header, then the header.
    if start[8:9] == b"{":
        try:
            with safe_open(path, "pt") as file:
                payload = json.loads((file.metadata() or {}).get("payload", "{}"))
                if not isinstance(payload, dict):
                    raise TypeError(f"its metadata is a {type(payload).__name__}, no dictionary")
                payload["model"] = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, TypeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(what_it_is(path, start, error)) from None
        check_finite(payload["model"], path)
        return payload
    try:
        # By its name alone torch would take a file for safetensors: it gets the opened one.
        with inert_allowed(), open(path, "rb") as file:
            # torch itself does not notice bytes that a copy or a disk has changed.
            if zipfile.is_zipfile(file) and (part := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"{part} has changed, or was saved without checksums")
            file.seek(0)
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except Refused as error:
        raise ValueError(f"{path} {error}: refused; save tensors where it was made") from None
    except Exception as error:                          # torch raises many kinds for a damaged file
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path} holds a {refused[1]}, which could execute code when loaded: "
                             "refused; save tensors where it was made, "
                             "torch.save({'model': model.state_dict()}, FILE)") from None
        raise ValueError(what_it_is(path, start, error)) from None
    check_finite(weights_of(payload), path)
    return payload


def what_it_is(path, start, error):
    """What an unreadable file is, where its first bytes `start` tell; otherwise the error."""
    # torch's own pickles of old begin with a number by which they are known.
    pickled = start[:1] == b"\x80" and start[2:13] != b"\x8a\nl\xfc\x9cF\xf9 j\xa8P"
    if not start.strip(b"\0"):
        what = "it is empty (no bytes, or zeros); copy or download it again"
    elif start.startswith(b"version https://git-lfs"):
        what = "it is a Git LFS pointer, not the file itself; run `git lfs pull` at its source"
    elif start.lstrip()[:1] == b"<":
        what = "it is a web page; download the file that the page leads to"
    elif re.fullmatch(rb"[\t\n\r -~]*", start):
        what = f"it is a text file, {start[:40].decode()!r}...; give a .pth, .pt or .safetensors"
    elif pickled:
        what = ("it is a plain pickle, not a file of torch.save; open it where it was made and "
                "write torch.save({'model': its tensors or arrays}, FILE)")
    elif b"NUMPY" in start or re.match(rb"PK.{28}[^\0]*\.npy", start, re.S):
        what = ("it is numpy's, not a file of torch.save; write "
                "torch.save({'model': dict(numpy.load(IT))}, FILE)")
    else:
        reason = " ".join(str(error).split()).partition(". ")[0]
        what = ("it is damaged or of another kind; copy it again, or give a .pth, .pt or "
                f".safetensors ({textwrap.shorten(reason, 120)})")
    return f"{path} is not a readable checkpoint: {what}"


def weights_of(payload):
    """The state_dict in a payload, see `find_weights`."""
    return find_weights(payload)[0]


def find_weights(payload):
    """-> (the state_dict, its place in the payload: "net.weights"; "" is the payload itself).

    Programs wrap their weights in dictionaries of many names, at most three deep. Averaged weights
    are preferred to raw ones, because their programs evaluate them. Arrays become tensors.
    """
    if not isinstance(payload, dict):
        return {}, ""
    states = {place: state for place, state in parts_of(payload)
              if any("." in key for key in state)}
    ours = isinstance(payload.get("detector"), str)          # "model" is what was evaluated
    # MMEngine swaps the two when it saves: its "state_dict" is averaged, "ema_state_dict" raw.
    mmengine = "steps" in states.get("ema_state_dict", {})
    averaged = [place for place in states if AVERAGED.search(place)] * (not ours and not mmengine)
    usual = [place for place in ("model", "state_dict", "") if place in states]
    largest = max(states, key=lambda place: len(states[place]), default="")
    place = [*averaged, *usual, largest][0]
    return states.get(place) or tensors_of(payload), place


def parts_of(payload, place="", depth=0):
    """Yield (place, tensors) of a dictionary and of those in it that may hold a model."""
    yield place, tensors_of(payload)
    for key, value in payload.items():
        if isinstance(value, dict) and depth < 3 and not ASIDE.search(str(key)):
            yield from parts_of(value, f"{place}.{key}".lstrip("."), depth + 1)


# Averaged weights, and what is no model, by the names that programs give them.
AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa)([._]|$)", re.I)
ASIDE = re.compile("optim|sched|resume|scaler|criterion|(^|_)(loss|matcher|metric)", re.I)


def tensors_of(part):
    """The tensors and arrays of a dictionary -> {name: tensor}."""
    tensors = {}
    for key, value in part.items():
        if isinstance(value, np.ndarray):                    # torch takes no foreign byte order
            value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        if isinstance(key, str) and isinstance(value, Tensor):
            tensors[key] = value
    return tensors


def inner(state):
    """The state without the first part of its names, if all share it; otherwise {}.

    Losses beside a model (Lightning's "criterion." beside "model.") and names without parts do not
    count; they are dropped.
    """
    groups = {}                                              # {first part: state}
    for key, value in state.items():
        first, dot, rest = key.partition(".")
        if dot and not ASIDE.search(first):
            groups.setdefault(first, {})[rest] = value
    return groups.popitem()[1] if len(groups) == 1 else {}


def unwrapped(state):
    """The state without a wrapper's prefix: "module." of DDP, "_orig_mod." of torch.compile.

    Prefixes are stripped until the names are of a known format; if they never are, the state stays
    as it was.
    """
    bare = state
    while bare:
        if any(contains(bare, mark) for mark, _ in FORMATS.values()):
            return bare
        bare = inner(bare)
    return state


def check_finite(state, origin):
    """Raises ValueError that names the first tensor with NaN or infinity, or of an odd kind.

    origin: the file, or what stands for it in the message.
    """
    for name, value in state.items():
        quantized = value.is_quantized or value.is_floating_point() and value.itemsize == 1  # float8
        if value.layout != torch.strided or quantized or value.is_meta:
            raise ValueError(f"{origin}: {name} is a sparse, quantized or meta tensor: save it as "
                             "a plain one where it was made")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{origin}: {name} is not finite: weights of a run that blew up, or "
                             "too large for their precision; take an earlier checkpoint")


def load_backbone(path: str | Path) -> dict[str, Tensor]:
    """The weights of a backbone's file (torchvision, timm, or wrapped by a program) by name.

    A prefix that all names share is stripped; of a whole detector the part "backbone." is taken.
    Raises FileNotFoundError or ValueError with one line.
    """
    state = weights_of(load(path))
    if not state:
        raise ValueError(f"{path} holds no weights: give the state_dict of a backbone")
    part = {key: value for key, value in state.items() if "backbone." in key}
    state = part or state
    while bare := inner(state):
        state = bare
    return state


def load_from_hub(name: str) -> dict:
    """'organisation/model' on the Hugging Face hub -> payload; "config" is its config.json."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError
    except ImportError:
        raise ValueError(f"hf:{name} needs another package: pip install huggingface_hub") from None

    def fetch(file):
        try:
            return hf_hub_download(name, file)
        except Exception as error:                          # names, rights, connections: many kinds
            # Without a connection a missing entry is a FileNotFoundError too.
            if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
                return None
            reason = textwrap.shorten(str(error), 120)
        raise ValueError(f"cannot fetch hf:{name} ({reason}): check the name and the connection, "
                         "or download its model.safetensors and give that file")

    path = fetch("model.safetensors") or fetch("pytorch_model.bin")
    if path is None:
        raise ValueError(f"hf:{name} has neither model.safetensors nor pytorch_model.bin: is it a "
                         "PyTorch model?")
    payload, config = load(path), fetch("config.json")
    said = {"config": read_json(config)} if config else {}
    return said | (payload if "model" in payload else {"model": payload})


# ------------------------------------------------------------------------------------------- tables
# Rows (theirs, ours), replaced one after the other. They are regular expressions in which a dot is
# a dot, # is a number, the same on both sides, E is encoder.layers.# and D is decoder.layers.#. A
# program's rows lead to the names of the official repositories or directly to ours; the rows
# OFFICIAL lead from the official names to ours; the rows of a detector do what depends on it.

OFFICIAL = [   # IDEA-Research/DAB-DETR and DINO, fundamentalvision/Deformable-DETR
    ("^backbone.0.body.", "backbone."), ("^transformer.", ""), ("^input_proj.", "encoder.project."),
    ("^level_embeds?$", "encoder.level_embed"),
    ("^E.self_attn.", "E.attention."), ("^E.norm1.", "E.norm."), ("^E.norm2.", "E.ffn.norm."),
    ("^D.self_attn.", "D.self_attention."), ("^D.cross_attn.", "D.cross_attention."),
    ("^D.norm3.", "D.ffn.norm."),
    (".(linear1|linear2|activation).", r".ffn.\1."),
    ("^decoder.ref_point_head.", "decoder.position."),
    ("^(?:decoder.)?class_embed.", "decoder.class_heads."),
    ("^(?:decoder.)?bbox_embed.", "decoder.box_heads."),
    ("^enc_output.", "proposals.project."), ("^enc_output_norm.", "proposals.norm."),
]
DEFORMABLE_NORMS = [("^D.norm2.", "D.self_norm."), ("^D.norm1.", "D.cross_norm.")]
OF_DETECTOR = {
    "dab_detr": [
        # The other way round than Deformable DETR.
        ("^D.norm1.", "D.self_norm."), ("^D.norm2.", "D.cross_norm."),
        ("^D.sa_", "D.self_attention."), ("^D.ca_", "D.cross_attention."),
        ("_attention.(?:q|query_)content_proj.", "_attention.query_content."),
        ("_attention.(?:q|query_)pos_proj.", "_attention.query_position."),
        ("_attention.(?:q|query_)pos_sine_proj.", "_attention.query_sine."),
        ("_attention.(?:k|key_)content_proj.", "_attention.key_content."),
        ("_attention.(?:k|key_)pos_proj.", "_attention.key_position."),
        ("_attention.(?:v|value)_proj.", "_attention.value."),
        ("coder.query_scale.", "coder.position_scale."),
        ("^decoder.ref_anchor_head.", "decoder.anchor_size."),
        ("^decoder.(class_heads|box_heads).(?=[a-z])", r"decoder.\1.0."),   # one head, no number
        ("^encoder.project.0.0.", "encoder.project."),                # in MMDetection a list of one
        ("^(?:refpoint_embed|anchor_box_embed|query_embedding).", "anchors."),
    ],
    "deformable_detr": DEFORMABLE_NORMS + [
        ("^query_embed(?:ding)?.", "queries."), ("^reference_points.", "reference."),
        ("^pos_trans.", "position.project."), ("^pos_trans_norm.", "position.norm."),
    ],
    "dino": DEFORMABLE_NORMS + [
        ("^enc_out_class_embed.", "proposals.class_head."),
        ("^enc_out_bbox_embed.", "proposals.box_head."),
        ("^(?:tgt_embed|query_embedding).", "content."), ("^label_enc.", "label_embed."),
    ],
    None: [],
}
MMCV_LAYERS = [   # mmcv's transformer, of which MMDetection is made and, after it, detrex
    (".attentions.0.", ".self_attn."), (".attentions.1.", ".cross_attn."),
    ("_attn.attn.", "_attn."),
    (".ffns.0.", ".ffn."), (".ffn.layers.0.0.", ".linear1."), (".ffn.layers.1.", ".linear2."),
    (".ffn.(?:layers.0.1|activation).", ".activation."),
    ("E.norms.0.", "E.norm1."), ("E.norms.1.", "E.norm2."),
    ("D.norms.0.", "D.self_norm."), ("D.norms.1.", "D.cross_norm."), ("D.norms.2.", "D.norm3."),
    (".post_norm(?:_layer)?.", ".norm."),
    ("^neck.convs.#.conv.", "input_proj.#.0."), ("^neck.convs.#.(?:norm|gn).", "input_proj.#.1."),
    ("^neck.extra_convs.#.conv.", "input_proj.+#.0."),          # + counts on from the last of convs
    ("^neck.extra_convs.#.(?:norm|gn).", "input_proj.+#.1."),
]
DETREX = MMCV_LAYERS + [
    ("^backbone.stem.", "backbone."),                                         # of detectron2
    *[(f"^backbone.res{stage + 1}.", f"backbone.layer{stage}.") for stage in (1, 2, 3, 4)],
    (".conv#.norm.", ".bn#."), (".shortcut.norm.", ".downsample.1."),
    (".shortcut.", ".downsample.0."),
]
MMDETECTION = MMCV_LAYERS + [   # 2.x and 3.x; the backbone has torchvision's names
    ("^bbox_head.", ""), ("^(?:cls_branches|fc_cls).", "class_embed."),
    ("^(?:reg_branches|fc_reg).", "bbox_embed."),
    *[(f"^bbox_embed.#.{2 * layer}.", f"bbox_embed.#.layers.{layer}.") for layer in (0, 1, 2)],
    ("^memory_trans_fc.", "enc_output."), ("^memory_trans_norm.", "enc_output_norm."),
    ("^(pos_trans|reference_points)_fc.", r"\1."),
    ("^dn_query_generator.label_embedding.", "label_enc."),
]
# transformers 4 and the hub's files; transformers 5 has .mlp. and o_proj, and no conv_encoder.
HUGGING_FACE = [
    # timm has torchvision's names.
    ("^model.backbone.(?:conv_encoder.)?model.(?:_backbone.)?", "backbone."),
    ("^backbone.embedder.embedder.convolution.", "backbone.conv1."),
    ("^backbone.embedder.embedder.normalization.", "backbone.bn1."),
    *[(f"^backbone.encoder.stages.{stage - 1}.layers.", f"backbone.layer{stage}.")
      for stage in (1, 2, 3, 4)],
    *[(f".layer.{part - 1}.convolution.", f".conv{part}.") for part in (1, 2, 3)],
    *[(f".layer.{part - 1}.normalization.", f".bn{part}.") for part in (1, 2, 3)],
    (".shortcut.convolution.", ".downsample.0."), (".shortcut.normalization.", ".downsample.1."),
    ("^model.", ""), ("^input_projection.", "input_proj."),
    ("^query_position_embeddings.", "query_embed."),
    ("^query_refpoint_embeddings.", "refpoint_embed."),
    ("^bbox_predictor.", "bbox_embed."), ("^decoder.layernorm.", "decoder.norm."),
    ("^E.self_attn_layer_norm.", "E.norm1."), ("^E.final_layer_norm.", "E.norm2."),
    ("^D.(?:self_attn.)?self_attn_layer_norm.", "D.self_norm."),
    ("^D.(?:encoder_attn|cross_attn.cross_attn)_layer_norm.", "D.cross_norm."),
    ("^D.(?:mlp.)?final_layer_norm.", "D.norm3."),
    (".(?:mlp.)?fc#.", ".linear#."), (".(?:mlp.)?activation_fn.", ".activation."),
    (".encoder_attn.", ".cross_attn."), ("_attn.(?:self|cross)_attn_", "_attn."),
    ("_attn.(?:self|cross)_attn.output_proj.", "_attn.out_proj."),
    (".self_attn.o_proj.", ".self_attn.out_proj."),
]
FORMATS = {   # program: (by which name its files are known, rows), tried in this order
    "ours": ("^encoder.project.|^decoder.class_heads.", []),
    "mmdetection": ("^bbox_head.", MMDETECTION + OFFICIAL),
    "detrex": ("^transformer.(?:en|de)coder.layers.#.attentions.", DETREX + OFFICIAL),
    "official": ("^transformer.(?:en|de)coder.layers.", OFFICIAL),
    "hugging_face": ("^model.(?:en|de)coder.layers.#.self_attn", HUGGING_FACE + OFFICIAL),
    "torchvision": ("^layer1.0.conv1.weight$", [("^", "backbone.")]),
}
DETECTORS = {"dab_detr": "ref_anchor_head|anchor_size", "dino": "label_enc|label_embed",
             "deformable_detr": "sampling_offsets"}                  # in this order
FUSED = ("q_proj", "k_proj", "v_proj")                # three matrices that are one in ours, in_proj
# Nothing depends on the first; the second are ImageNet's classes.
IGNORED = re.compile(r"num_batches_tracked$|^backbone\.fc\.")
PER_CLASS = re.compile(r"class_heads?\.|label_embed\.")          # a row for each class
PER_QUERY = re.compile(r"(content|anchors|queries)\.")           # a row for each query

# (position_temperature, position_offset, logit_eps) of models.build with which a program's model
# was made. Neither names nor shapes tell them, and with other values the same weights compute other
# numbers. They were read in the sources named.
PUBLISHED = {
    # util/misc.py, models/**/position_encoding.py, config/; DAB-DETR by what it computes
    # (tests/test_golden.py).
    ("official", "dab_detr"): (20., 0., 1e-3),
    ("official", "deformable_detr"): (10000., -0.5, 1e-5),
    ("official", "dino"): (20., 0., 1e-3),
    # detrex/utils/misc.py, projects/*/configs/models/*_r50.py; not run. DINO: of 12 epochs; the
    # configs of 24 and 36 epochs have (20, 0).
    ("detrex", "dab_detr"): (20., 0., 1e-3),
    ("detrex", "deformable_detr"): (10000., -0.5, 1e-3),       # also with the official weights
    ("detrex", "dino"): (10000., -0.5, 1e-3),
    # 3.3 by running it, 2.28 in mmdet/models/utils/transformer.py. Two eps in one model: DINO moves
    # references with 1e-3 and predicts with 1e-5, DAB-DETR the other way round. Ours has one eps
    # for both, so a box whose reference is within 1e-3 of 0 or 1 differs; everything else is equal.
    ("mmdetection", "dab_detr"): (20., 0., 1e-3),
    ("mmdetection", "deformable_detr"): (10000., -0.5, 1e-5),
    ("mmdetection", "dino"): (20., 0., 1e-3),
    # transformers 5.24 by running it. Which eps the hub's DAB-DETR was trained with is not verified
    # (official: 1e-3).
    ("hugging_face", "dab_detr"): (20., 0., 1e-5),
    ("hugging_face", "deformable_detr"): (10000., -0.5, 1e-5),
}
HEADS = 8                                                        # of attention, in all of them
# What a file says of itself (our config, official args, the hub's config.json) -> option.
SAID = {name: name for name in
        ("position_temperature", "position_offset", "logit_eps", "heads", "two_stage")} | {
    "pe_temperatureH": "position_temperature", "temperature_height": "position_temperature",
    "nheads": "heads",
    "encoder_attention_heads": "heads", "with_box_refine": "box_refine"}
# {(blocks of layer3, whether they are bottlenecks): name}
RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50",
           (23, True): "resnet101"}
# The class of each row of a head. 91 rows: COCO's official ids, as torchvision lists them; 80 rows:
# the ids that exist.
COCO_91 = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO = {91: COCO_91, 80: [name for name in COCO_91 if name not in ("__background__", "N/A")]}


# ------------------------------------------------------------------------------------------ loading

def read_json(path: str | Path):
    """What a JSON file holds. Raises ValueError with file and remedy when it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({str(error)[:80]}): delete it and repeat "
                         "the command that made it") from None


def write_json(path: str | Path, content) -> None:
    """JSON that any reader takes: an AP that is not defined (NaN) becomes null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_text(path, json.dumps(strict, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Atomic, so that a kill never leaves half a file."""
    write_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


PATIENCE = 10                                                    # seconds


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = False):
    """Lock a folder or a file against a second process; yields the lock, a file descriptor.

    The system unlocks it when the last process that holds it ends: this one, or a child that
    inherits it (`pass_fds`) and outlives its parent.
    wait: wait for as long as another process holds the lock. Otherwise wait PATIENCE seconds, in
    which the workers of a killed run end, and then raise ValueError. On Windows, and where a mount
    has no locks, nothing is locked.
    """
    if fcntl is None:
        yield None
        return
    lock, patience = os.open(path, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait and time.monotonic() > patience:
                    raise ValueError(f"{path} is in the hands of another run: wait for its end, "
                                     "or choose another folder") from None
                time.sleep(0.2)
                continue
            except OSError:                                  # some network mounts
                pass
            break
        yield lock
    finally:
        os.close(lock)


@dataclass
class Report:
    """What `load_weights` did, by our names; skipped are names of the source."""
    source: str
    loaded: dict[str, str] = field(default_factory=dict)      # our name -> source name
    resized: dict[str, str] = field(default_factory=dict)     # our name -> what was done
    skipped: list[str] = field(default_factory=list)          # of parts that the model lacks
    missing: list[str] = field(default_factory=list)          # not in the source: left as they were
    note: str = ""                                            # ends the printed line

    def __str__(self):
        groups = {}                                           # {what was done: our names}
        for name, change in self.resized.items():
            groups.setdefault(change, []).append(name)
        changes = [f"{', '.join(names)} {change}" for change, names in groups.items()]
        resized = "; ".join(changes) or "none"
        return (f"{self.source}: loaded {len(self.loaded)} tensors, skipped {len(self.skipped)}, "
                f"missing {len(self.missing)}, resized: {resized}{self.note}")

    @property
    def fresh_heads(self) -> list[str]:
        """Rows of classes that were left as the model's own initialisation."""
        return [name for name, change in self.resized.items() if "re-initialised" in change]


def load_weights(model: nn.Module, source_weights: str | Path | dict, source: str = "auto",
                 classes: list[str] | None = None, made_with: dict | None = None,
                 source_classes: list[str] | None = None) -> Report:
    """Copy weights into the model, whichever known program made them, and print one line about it.

    source_weights: a file, "hf:organisation/model", a payload, or a state_dict.
    source: one of FORMATS, or "auto" to recognise it by its names.
    classes: names of the model's classes. Rows of class heads and label embeddings go to the rows
    of the same name; rows without one keep the model's own initialisation. The source's names come
    with it (ours, MMDetection's, the hub's). Without names 80 and 91 classes are COCO's, on either
    side; otherwise equal numbers of classes are copied row by row, which the printed line says.
    source_classes: names of the source's classes, where the source does not hold them; read only
        beside `classes`.
    made_with: options of models.build for the source, where you know better than PUBLISHED.
    When the numbers of queries differ, the first queries are used. A part of the model (backbone,
    encoder, ...) is loaded whole or not at all.
    Raises ValueError, and leaves the model as it was, when the source was made with other options
    than the model (naming them), when nothing fits, when a part fits only partly, or when any other
    shape differs.
    """
    # Read the file, and find the model in it.
    if source not in ("auto", *FORMATS):
        raise ValueError(f"source={source!r}: choose from auto, {', '.join(FORMATS)}")
    if not isinstance(source_weights, (dict, str, os.PathLike)):
        raise ValueError(f"load_weights wants a file or a state_dict, not a "
                         f"{type(source_weights).__name__}: give model.state_dict()")
    origin, payload = "state_dict", source_weights
    if not isinstance(payload, dict):
        origin = str(source_weights)
        hub = origin.startswith("hf:")
        payload = load_from_hub(origin.removeprefix("hf:")) if hub else load(origin)
    state, where = find_weights(payload)
    check_finite(state, origin)
    held = len(state)

    # Which program made it, and which detector it is, is known by the names of its tensors.
    if source == "auto":
        state = unwrapped(state)
        source = next((name for name, (mark, _) in FORMATS.items() if contains(state, mark)), None)
    if source not in FORMATS:
        first = f"the first is {next(iter(state))!r}" if state else "it holds no tensors"
        raise ValueError(f"{origin}: names of no known format ({', '.join(FORMATS)}; {first}): is "
                         "it a detector's checkpoint?")
    known = next((name for name, mark in DETECTORS.items() if contains(state, mark)), None)
    said = payload.get("detector")
    detector = said if isinstance(said, str) else known
    if detector not in (None, wanted := getattr(model, "detector", detector)):
        raise ValueError(f"{origin} holds a {detector}, the model is a {wanted}: build that "
                         "detector instead")

    if known == "dab_detr" and contains(state, "label_enc"):
        raise ValueError(f"{origin} holds a DN-DETR, whose queries begin as its label_enc and not as "
                         "zeros: choose a DAB-DETR's weights")

    # What was done is written down in the report; `rows` are those of heads that are copied in part.
    own, report, rows = model.state_dict(), Report(f"{origin} ({source})"), {}
    if where not in ("", "model", "state_dict"):
        report.note = f"; of its weights those under {where!r} were taken"
    if held > len(state):
        report.note += f"; {held - len(state)} tensors beside the model were dropped"

    # Its names become ours. Then its names, shapes and program tell the options it was made with.
    found = translate(state, source, detector, origin)           # {our name: (source name, value)}
    options = options_of(found, state, source, detector) | said_by(payload, origin)
    options |= made_with or {}
    check_options(model, options, report.source)

    # Heads go to the model's layers, and their rows to the classes of the same name.
    found = share_heads(found, own, origin)
    if source_classes:
        rows_there = len(found.get("decoder.class_heads.0.bias", ("", source_classes))[1])
        if rows_there != len(source_classes):
            raise ValueError(f"source_classes names {len(source_classes)}, but {origin} has "
                             f"{rows_there}: give a name for each, in its order")
        payload = payload | {"classes": source_classes}
    names = class_names(payload, found, own, classes)
    if classes is not None and names[0] and not isinstance(names[0][0], str):
        report.note += ("; it names no classes, as many as the model has: heads were copied row by "
                        "row")

    # Decide about each tensor: skipped, copied by rows, or copied whole.
    extra = [name for name in found if name not in own and not IGNORED.search(name)]
    report.skipped = [found[name][0] for name in extra]
    for name, (key, value) in found.items():
        if name not in own:
            continue
        if own[name].is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{origin}: {key} is {value.dtype}, quantized by its program: save it in "
                             "float where it was made")
        if (fitted := fit_rows(name, value, own[name], names, detector)) is not None:
            rows[name], report.resized[name] = fitted
        elif value.shape == own[name].shape:
            report.loaded[name] = key
        else:
            raise ValueError(f"{origin}: {key} is {tuple(value.shape)}, the model's {name} "
                             f"{tuple(own[name].shape)}: another architecture; build the model "
                             "with the checkpoint's sizes")

    # A part of the model is loaded whole or not at all.
    done = report.loaded | report.resized
    report.missing = [name for name in own if name not in done and not IGNORED.search(name)]
    if not report.loaded:
        raise ValueError(f"{origin}: none of its {len(state)} tensors fits this model: is it "
                         "another architecture's?")
    parts = {name.split(".")[0] for name in report.loaded}
    strays = [name for name in report.missing + extra if name.split(".")[0] in parts]
    if strays:
        raise ValueError(f"{origin}: another architecture, {strays[0]} and {len(strays) - 1} more "
                         "have no counterpart; build the model with the checkpoint's depths and "
                         "options")

    # Only now is the model changed.
    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(found[name][1])                 # state_dict() shares the model's memory
        for name, (ours, theirs) in rows.items():
            own[name][ours] = found[name][1][theirs].to(own[name])
    print(report)
    return report


def full(row):
    return row.replace("E.", "encoder.layers.#.").replace("D.", "decoder.layers.#.")


def regex(row):
    return re.compile(full(row).replace(".", r"\.").replace("#", r"(\d+)"))


def contains(state, mark):
    return any(map(regex(mark).search, state))


def count(names, mark):
    """How many layers or levels there are whose names begin like this."""
    return len({name.split(".")[2] for name in names if re.match(mark, name)})


def translate(state, source, detector, origin):
    """-> {our name: (source name, value)}, heads numbered by layer; unknown names stay."""
    rows = [(regex(theirs), full(ours).replace("#", r"\1"))
            for theirs, ours in FORMATS[source][1] + OF_DETECTOR.get(detector, [])]
    # Rename, row by row.
    found = {}
    for key, value in state.items():
        name = key
        for theirs, ours in rows:
            name = theirs.sub(ours, name, count=1)
        # Some programs store a module twice.
        if name in found and not torch.equal(value, found[name][1]):
            raise ValueError(f"{origin}: {key} differs from {found[name][0]}, but one should be "
                             "the other")
        found.setdefault(name, (key, value))

    # Join the three matrices of attention.
    for name in [name for name in found if f".{FUSED[0]}." in name]:
        three = [name.replace(FUSED[0], matrix) for matrix in FUSED]
        if all(matrix in found for matrix in three):
            keys, values = zip(*map(found.pop, three))
            found[name.replace(f"{FUSED[0]}.", "in_proj_")] = ", ".join(keys), torch.cat(values)

    # Number what depends on how many levels and layers there are.
    levels, layers = count(found, r"encoder\.project\.\d"), count(found, "decoder.layers.")

    def settle(name):         # one head more than decoder layers: the last is that of the proposals
        name = re.sub(r"^encoder\.project\.\+(\d+)",
                      lambda m: f"encoder.project.{levels + int(m[1])}", name)
        return re.sub(rf"^decoder\.(class|box)_heads\.{layers}\.", r"proposals.\1_head.", name)
    found = {settle(name): entry for name, entry in found.items()}
    for name in [name for name in found if re.fullmatch(r"encoder\.project\.\d+\.0\.weight", name)]:
        # mmcv's convolutions have no bias before a norm.
        bias = found[name][1].new_zeros(len(found[name][1]))
        found.setdefault(name.replace("weight", "bias"), ("no bias", bias))
    return found


def options_of(found, state, source, detector):
    """Options of models.build that a source was made with, by names, shapes and program.

    None where the source does not tell.
    """
    def size(name):
        return len(found[name][1]) if name in found else None

    first = {name: re.sub(r"_heads\.\d+\.", "_heads.0.", name)
             for name in found if "_heads." in name}
    differ = any(not torch.equal(found[name][1], found[zero][1])
                 for name, zero in first.items() if zero in found)
    bottlenecks = "backbone.layer1.0.conv3.weight" in found
    options = {"encoder_layers": count(found, "encoder.layers.") or None,
               "feature_levels": size("encoder.level_embed"),
               "backbone": RESNETS.get((count(found, "backbone.layer3."), bottlenecks)),
               "backbone_width": size("backbone.conv1.weight")}
    if count(found, "decoder.layers."):
        # A plain Deformable DETR has one head for all layers; its program may store it for each.
        several = (contains(state, "decoder.bbox_embed.")
                   or source == "ours" and count(found, "decoder.box_heads.") > 1)
        options |= {"decoder_layers": count(found, "decoder.layers."),
                    "hidden_dim": size("decoder.layers.0.self_norm.weight"),
                    "ffn_dim": size("decoder.layers.0.ffn.linear1.bias"),
                    "num_patterns": size("patterns.weight") or 0,
                    "two_stage": "proposals.project.weight" in found,
                    "box_refine": differ or several,
                    "shared_heads": False if differ else None}
    if known := PUBLISHED.get((source, detector)):
        names = ("position_temperature", "position_offset", "logit_eps", "heads")
        options |= dict(zip(names, (*known, HEADS)))
    return options


def dict_of(payload, key):
    return payload[key] if isinstance(payload.get(key), dict) else {}


def said_by(payload, origin):
    """Options of models.build by what the file says of itself."""
    args = payload.get("args")
    said = dict_of(payload, "config") | (vars(args) if isinstance(args, argparse.Namespace) else {})
    if said.get("dilation"):
        raise ValueError(f"{origin} was made with dilation (DC5), which these models do not have: "
                         "choose another file")
    return {SAID[name]: value for name, value in said.items()
            if name in SAID and isinstance(value, (bool, int, float))}


def check_options(model, options, origin):
    """Refuse a source made with other options than the model; a model without .config passes."""
    config = {name: value for name, value in getattr(model, "config", {}).items()
              if not (name.startswith("backbone") and model.config["backbone"] == "custom")}
    wrong = {name: value for name, value in options.items()
             if value is not None and config.get(name, value) != value}
    if wrong:
        theirs = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        ours = ", ".join(f"{name}={config[name]!r}" for name in wrong)
        raise ValueError(f"{origin} was made with {theirs}, the model with {ours}: build it with "
                         f"models.build({model.detector!r}, ..., {theirs}), or give "
                         f"made_with={{...}} if you know better")


def share_heads(found, own, origin):
    """One head of the source for every layer of the model, or equal heads for the model's one."""
    def numbered(name, layer):
        return re.sub(r"_heads\.\d+\.", f"_heads.{layer}.", name)

    fitting = {}
    for name, entry in found.items():
        first = numbered(name, 0)
        if name in own or first not in own or first not in found:
            fitting[name] = entry
        elif not torch.equal(entry[1], found[first][1]):
            raise ValueError(f"{origin}: {entry[0]} differs from {found[first][0]}, this model has "
                             "one for both")
    return fitting | {name: found[numbered(name, 0)] for name in own if name not in found
                      and numbered(name, 0) in found and numbered(name, 1) not in found}


def class_names(payload, found, own, classes):
    """The source's classes and the model's: names, or [] where unknown.

    Numbers stand for names where rows are copied as they are.
    """
    head = "decoder.class_heads.0.bias"
    if head not in found or head not in own:
        return [], []
    theirs, ours = len(found[head][1]), len(own[head])
    if classes is None and theirs == ours:
        return list(range(theirs)), list(range(ours))
    if classes is not None and len(classes) != ours:
        raise ValueError(f"classes names {len(classes)}, but the model has {ours}: give a name for "
                         "each")
    meta = dict_of(payload, "meta")                            # of MMDetection 2, dataset_meta of 3
    dataset, labels = dict_of(meta, "dataset_meta"), dict_of(dict_of(payload, "config"), "id2label")
    # By number, since JSON sorts "10" before "2".
    in_order = [labels.get(str(i), labels.get(i)) for i in range(theirs)]
    said = [payload.get("classes"), meta.get("CLASSES"), dataset.get("CLASSES"),
            dataset.get("classes"), in_order, COCO.get(theirs)]
    lists = [names for names in said if isinstance(names, (list, tuple)) and len(names) == theirs]
    named = next((names for names in lists if all(isinstance(x, str) for x in names)), [])
    if not named and theirs == ours:                      # nothing says otherwise: the same classes
        return list(range(theirs)), list(range(ours))
    known = classes or COCO.get(ours, [])
    return [name.lower() for name in named], [name.lower() for name in known]


def fit_rows(name, value, own, names, detector):
    """-> ((our rows, the source's rows), the words for the report).

    None for a tensor that is copied whole, or not at all.
    """
    if value.shape[1:] != own.shape[1:] or not (PER_QUERY.match(name) or PER_CLASS.search(name)):
        return None
    # In Deformable DETR class 0 of a proposal means any object, whatever the classes are.
    if PER_QUERY.match(name) or name.startswith("proposals.") and detector == "deformable_detr":
        pairs, change = [(i, i) for i in range(min(len(value), len(own)))], "the first kept"
    else:
        theirs, ours = names
        pairs = [(i, theirs.index(label)) for i, label in enumerate(ours) if label in theirs]
        named = f"{len(pairs)} classes"
        if len(pairs) < 6:
            named = ", ".join(str(ours[i]) for i, _ in pairs)
        change = f"{named} by name, the others re-initialised"
        if len(pairs) == len(ours):
            change = "by class"
        if not pairs:
            change = "re-initialised"
        # In some programs label_embed has one more row, of no class.
        elif len(value) > len(theirs) and len(own) > len(ours):
            pairs.append((len(ours), len(theirs)))
    if len(value) == len(own) and pairs == [(i, i) for i in range(len(own))]:
        return None
    return tuple(map(list, zip(*pairs))) or ([], []), f"({len(value)} to {len(own)} rows: {change})"
