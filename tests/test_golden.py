"""The three detectors at full width and depth (R50, 256 wide, 6 + 6 layers) give the official implementations' numbers.

No weights are stored: each is a function of its official name, by a rule that the official code was filled with too.
golden/golden.safetensors holds the padded input batch, every layer's logits and boxes, every eighth memory token as the
official repositories computed them on a CPU, and in its metadata the official names and shapes. It was packed by
    python tests/test_golden.py FOLDER_OF_THE_FULL_VECTORS
"""
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import models

GOLDEN = Path(__file__).parent / "golden" / "golden.safetensors"
SOURCES = {"dab_detr": "full_dab_detr_r50", "deformable_detr": "full_deformable_detr_r50",
           "dino": "full_dino_4scale_r50"}


def weights_from_names(keys, shared, salt):
    """{official name: tensor}: standard normal numbers, seeded by the name, scaled so that a deep model keeps its head.

    keys: {name: shape}; shared: {name: the name whose tensor it is}; salt: another set of weights for each number.
    """
    return {key: weight_from_name(shared.get(key, key), shape, salt) for key, shape in keys.items()}


def weight_from_name(key, shape, salt):
    random = np.random.RandomState(zlib.crc32(f"{salt}:{key}".encode()))
    normal = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    kind, norm = key.split(".")[-1], ".bn" in key or "downsample.1" in key
    if kind == "running_var":
        return 0.75 + 0.5 * torch.from_numpy(random.random_sample(shape).astype(np.float32))
    if norm and kind == "weight":
        return (1 + 0.1 * normal) * (0.3 if ".bn3." in key else 1.)
    if len(shape) == 4:                                      # convolutions, as He et al. start them
        return normal * (2 / np.prod(shape[1:])) ** 0.5
    if len(shape) == 1:
        if kind == "weight":                                 # of a norm, or the slope of a PReLU
            return 0.25 + 0.05 * normal if shape[0] == 1 else 1 + 0.1 * normal
        return -2 + 0.5 * normal if "class_embed" in key else 0.1 * normal
    if any(name in key for name in ("refpoint_embed", "query_embed", "tgt_embed", "label_enc", "level_embed")):
        return normal
    if "sampling_offsets" in key:
        return 0.05 * normal
    # Larger where queries or tokens would otherwise become alike, smaller where the encoder mixes them.
    apart = any(name in key for name in ("sa_qpos", "sa_kpos", "ca_qpos", "ca_kpos", "cross_attn.out_proj"))
    mixing = "encoder.layers" in key and "self_attn.out_proj" in key
    return normal * ((9. if apart else 0.04 if mixing else 1.) / shape[1]) ** 0.5


def golden(detector):
    """-> (tensors of one detector and the shared input, its official names)."""
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        names = json.loads(file.metadata()[detector])
    own = {key.removeprefix(f"{detector}."): value for key, value in tensors.items() if key.startswith(f"{detector}.")}
    return own | {"images": tensors["images"], "padding": tensors["padding"].bool()}, names


@pytest.mark.parametrize("detector", models.DETECTORS)
def test_full_size_forward_equals_official(detector):
    want, names = golden(detector)
    keys = {key: tuple(shape) for key, shape in names["keys"].items()}
    with torch.device("meta"):
        resnet = torchvision.models.resnet50().state_dict()
    keys |= {f"backbone.0.body.{key}": tuple(value.shape) for key, value in resnet.items()
             if not key.startswith("fc.") and "num_batches" not in key}
    model = models.build(detector, 91, pretrained_backbone=False, num_queries=30, frozen_backbone=True).eval()
    report = checkpoints.load_weights(model, weights_from_names(keys, names["shared"], names["salt"]))
    assert not report.missing and not report.skipped and not report.resized
    with torch.no_grad():
        out = model(want["images"], want["padding"])
    torch.testing.assert_close(out.memory.tokens[:, ::8], want["memory"], atol=2e-5, rtol=0)
    torch.testing.assert_close(out.detections.logits, want["logits"], atol=3e-5, rtol=0)
    torch.testing.assert_close(out.detections.boxes, want["boxes"], atol=2e-6, rtol=0)
    if detector == "dino":
        torch.testing.assert_close(out.proposals.logits[0], want["proposal_logits"], atol=3e-5, rtol=0)


def pack(folder):
    tensors, metadata = {}, {}
    for detector, source in SOURCES.items():
        full = load_file(Path(folder) / f"{source}.safetensors")
        info = json.loads((Path(folder) / f"{source}.json").read_text())
        names = [f"out.aux_outputs.{layer}." for layer in range(5)] + ["out."]
        tensors[f"{detector}.logits"] = torch.stack([full[f"{name}pred_logits"] for name in names])   # (6, 2, 30, 91)
        tensors[f"{detector}.boxes"] = torch.stack([full[f"{name}pred_boxes"] for name in names])     # (6, 2, 30, 4)
        tensors[f"{detector}.memory"] = full["inter.memory"][:, ::8].float().contiguous()
        if detector == "dino":
            tensors["dino.proposal_logits"] = full["out.interm_outputs.pred_logits"]
        tensors |= {"images": full["images"], "padding": full["mask"].to(torch.uint8)}     # the same for all
        keys = {key: shape for key, shape in info["keys"].items() if not key.startswith("backbone.")}
        metadata[detector] = json.dumps({"keys": keys, "shared": info["shared"], "salt": info["salt"]})
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(tensors, GOLDEN, metadata)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    pack(sys.argv[1])
