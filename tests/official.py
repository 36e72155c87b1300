"""The official implementations' outputs, found in one place, and what tests against them share.

SHARED names the folder that holds vectors/ (and real/, a few real images); without it, `shared` beside the checkout.
torch is imported where it is needed, because conftest.py imports this module in pytest's first
process too, which only hands out the tests.
"""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared"))
VECTORS = SHARED / "vectors"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="the official vectors are not here")


def vectors(name):
    from safetensors.torch import load_file
    return load_file(VECTORS / f"{name}.safetensors")


def close(ours, theirs, atol):
    import torch
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def under(tensors, prefix):
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
