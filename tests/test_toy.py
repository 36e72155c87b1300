"""experiments/toy.py: writing the toy, whatever happens to the process that draws it."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data
from experiments import toy
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


def test_workers_draw_under_any_start_method(tmp_path):
    """Python 3.14 starts workers by a server of its own, which is then their parent."""
    program = f"import multiprocessing; multiprocessing.set_start_method('forkserver'); {DRAW}"
    program = program.format(counts=COUNTS, workers=2)
    words = [sys.executable, "-c", program, str(tmp_path / "toy")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    data.make_toy(tmp_path / "alone", counts=COUNTS, workers=1)
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


@pytest.mark.parametrize("number, parts", [
    (".3", (.3, "", 0)), ("-.5", (-.5, "", 0)), ("wide", (1, "wide", 0)), ("-u-.1", (-1, "u", -.1)),
    ("-.62wide+.05", (-.62, "wide", .05))])
def test_a_number_of_a_table_is_a_size_with_a_factor_and_an_offset(number, parts):
    assert toy.parts(number) == parts


def test_a_table_is_drawn_in_metres_around_the_foot():
    """18.6 m ahead 10 canvas pixels are a metre: the foot is 16.5 below the horizon, 20 right."""
    scene = toy.Scene(np.random.default_rng(0))
    scene.vanish = 100, 40.5
    thing = toy.Thing(scene, x=2, z=18.6, number=7)
    thing.draw("box  ff0000*.5  -.5half,0  half,top+.5", half=1, top=1.)
    expected = [(115, 57), (130, 57), (130, 42), (115, 42)]
    np.testing.assert_allclose(thing.corners, expected)
    rows, columns = np.nonzero(np.asarray(scene.owner) == 7)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (42, 57, 115, 130)
    assert scene.picture.getpixel((120, 50)) == scene.colour((127.5, 0, 0), 18.6)
