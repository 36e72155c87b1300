"""Does a change leave what is computed alone? Three steps of every toy recipe, bit for bit.

    python tests/fingerprints.py            compare with tests/golden/fingerprints.json
    python tests/fingerprints.py --write    store what is computed now

For each detector x {plain training, CLoCKDistill with its recipe, every rival}: the losses of three steps, and a digest of
the student's and the method's weights after them. Seed 0, one thread. Another machine or torch rounds differently: the
file says on which it was made, so compare a change with its parent on one machine.
"""
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import checkpoints  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

STORED = HERE / "golden" / "fingerprints.json"
RIVALS = ("fitnets", "hinton", "fgd", "mgd", "gkd", "kd_detr", "detrdistill", "d3etr")
NOT_LOSSES = ("step", "lr", "images", "seconds", "report")


def digest(state):
    """A short name for all tensors of a state_dict."""
    sha = hashlib.sha256()
    for name, value in state.items():
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def three_steps(detector, method, root, out):
    """-> {"losses": [{name: value} a step], "student": digest, "method": digest} of a run of three steps."""
    settings = train.RECIPES["toy-student"][detector] | dict(detector=detector, root=root, steps=3, seed=0)
    if method == "plain":
        settings |= dict(method=None, method_options={})
    else:
        settings |= dict(teacher=str(train.SHIPPED_TEACHERS[detector]), teacher_floor=0.0)
        if method != "clockdistill":
            settings |= dict(method=method, method_options={})
    train.fit(train.Config(**settings), train.Run(out=out, workers=0, device="cpu"))
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    saved = checkpoints.load(Path(out, "last.pt"))["resume"]
    return {"losses": [{k: v for k, v in line.items() if k not in NOT_LOSSES} for line in lines],
            "student": digest(saved["student"]), "method": digest(saved.get("method", {}))}


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(folder, "toy"))
        data.make_toy(root, counts=dict(train=48, val=2, tune=2), workers=1)
        now = {f"{detector} {method}": three_steps(detector, method, root, str(Path(folder, detector, method)))
               for detector in models.DETECTORS for method in ("plain", "clockdistill", *RIVALS)}
    machine = train.machine(torch.device("cpu"))
    if "--write" in sys.argv:
        checkpoints.write_json(STORED, {"machine": machine, "runs": now})
        return 0
    stored = json.loads(STORED.read_text())
    if stored["machine"] != machine:
        print(f"made on {stored['machine']}, this is {machine}: rounding may differ")
    differ = [name for name in now if now[name] != stored["runs"].get(name)]
    print(f"{len(now) - len(differ)} of {len(now)} runs are bit-equal" + "".join(f"\ndiffers: {n}" for n in differ))
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
