"""experiments/toy.py: writing the toy, whatever happens to the process that draws it."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import data
from official import ROOT

COUNTS = {"train": 60, "val": 4, "tune": 2}
DRAW = "import sys, data; data.make_toy(sys.argv[1], counts={counts}, workers={workers})"


def drawing(root, counts=COUNTS, workers=1):
    program = DRAW.format(counts=counts, workers=workers)
    return subprocess.Popen([sys.executable, "-c", program, str(root)], cwd=ROOT, start_new_session=True,
                            stderr=subprocess.PIPE)


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_of_two_processes_that_draw_one_toy_the_second_waits(tmp_path):
    data.make_toy(tmp_path / "alone", counts=COUNTS, workers=1)
    both = [drawing(tmp_path / "toy") for _ in range(2)]
    assert [run.wait() for run in both] == [0, 0], [run.stderr.read() for run in both]
    assert content(tmp_path / "toy") == content(tmp_path / "alone")


@pytest.mark.parametrize("name", ["toy.json", "toy.json.part"])
def test_an_empty_marker_is_unfinished_work(tmp_path, name):
    """A full disk leaves it empty."""
    (tmp_path / name).touch()
    data.make_toy(tmp_path, counts=dict(train=1, val=1, tune=1), workers=1)
    assert json.loads((tmp_path / "toy.json").read_text())["counts"] == dict(train=1, val=1, tune=1)
    assert len(data.build("toy", tmp_path, "train")) == 1


def test_the_workers_of_a_killed_parent_end(tmp_path):
    run = drawing(tmp_path / "toy", counts=dict(train=4000, val=1, tune=1), workers=2)
    images = tmp_path / "toy" / "training" / "image_2"
    while not (images.is_dir() and len(list(images.iterdir())) > 4):
        time.sleep(0.05)
    group = os.getpgid(run.pid)
    run.kill()
    run.wait()
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(group, signal.SIGKILL)
        pytest.fail("a worker still draws")
