"""The demo: what it leaves behind, and its two students side by side."""
import json
import os
import signal
import threading

import pytest

import data
import train
from experiments import demo

# Stands for train.py. Its words are its own name, the other's, what it does, and its folder.
CHILD = """
import json, os, pathlib, signal, sys, time
name, other, deed, folder = sys.argv[1:]
folder = pathlib.Path(folder)

def save(number, frame):
    with open(folder / f"{name}.saved", "a") as file:
        file.write("once ")
    sys.exit(130)

signal.signal(signal.SIGTERM, save)
assert os.getsid(0) == os.getpid()              # a session of its own: no Ctrl-C from the terminal
(folder / name / "begun").touch(exist_ok=False)
(folder / name / "log.jsonl").write_text("the one step\\n")
print("threads", os.environ["OMP_NUM_THREADS"])
alone = deed == "alone"
until = time.monotonic() + (0.5 if alone else 30)
while time.monotonic() < until and (alone or not (folder / other / "log.jsonl").exists()):
    begun, ended = (folder / other).exists(), (folder / other / "result.json").exists()
    assert not alone or begun == ended
    time.sleep(0.05)
if deed == "fail":
    print("step 0", end="\\r", file=sys.stderr)
    sys.exit("error: no image at x.png: check the path")
if deed == "wait":
    time.sleep(30)
(folder / name / "result.json").write_text(json.dumps({"AP": 0.25}))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    data.make_toy(root, counts=dict(train=6, val=4, tune=2), workers=1)
    return str(root)


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """(what a does, what b does) -> two jobs of CHILD."""
    (tmp_path / "train.py").write_text(CHILD)
    monkeypatch.setattr(train, "HERE", tmp_path)

    def make(*deeds):
        names = ("a", "b")
        return {name: demo.Job(tmp_path / name, [name, other, deed, str(tmp_path)], 1)
                for name, other, deed in zip(names, names[::-1], deeds)}
    return make


@pytest.mark.parametrize("threads, device, deed, each", [
    (2, "cpu", "meet", 1), (4, "cpu", "meet", 2), (1, "cpu", "alone", 1), (4, "cuda", "alone", 4)])
def test_students_share_the_threads_or_take_turns(
        threads, device, deed, each, jobs, monkeypatch, capsys):
    """"meet" waits for the other one to run, "alone" fails beside another one."""
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: threads)
    both = jobs(deed, deed)
    device = demo.torch.device(device)
    assert demo.train_all(both, device) == {"a": {"AP": 0.25}, "b": {"AP": 0.25}}
    said, bars = capsys.readouterr()
    assert f"a          threads {each}\n" in said and f"b          threads {each}\n" in said
    assert "1/1" in bars and "b: AP 0.250" in said
    demo.train_all(both, device)                       # a second run of CHILD would find its file
    assert "b: done before, AP 0.250" in capsys.readouterr().out


def test_one_that_fails_stops_the_other_and_is_named_in_one_line(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: 2)
    said = r"^b \(exit code 1, .*/b/errors.txt\): no image at x.png: check the path$"
    with pytest.raises(ValueError, match=said):
        demo.train_all(jobs("wait", "fail"), demo.torch.device("cpu"))
    assert (tmp_path / "a.saved").read_text() == "once "
    assert not (tmp_path / "b.saved").exists()


def test_ctrl_c_lets_both_save_once(jobs, tmp_path):
    def when_both_run():
        while not all((tmp_path / name / "log.jsonl").exists() for name in "ab"):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=when_both_run, daemon=True).start()
    with pytest.raises(train.Interrupted):
        demo.side_by_side(jobs("wait", "wait"), 2, 1, lambda *_: pytest.fail("one ended"))
    assert [(tmp_path / f"{name}.saved").read_text() for name in "ab"] == ["once ", "once "]


def test_the_demo_ends_with_summary_table_and_pictures_and_is_not_repeated(
        toy, tmp_path, monkeypatch, capsys, request):
    small = dict(steps=2, warmup=1, batch_size=2, backbone_width=8, hidden_dim=16, heads=2,
                 ffn_dim=16, encoder_layers=1, num_queries=10, denoising=6)
    plan = dict(out=str(tmp_path / "demo"), root=toy, counts=dict(train=6, val=4, tune=2),
                length=small, eval_every=1)
    monkeypatch.setitem(demo.SCALES, "quick", plan)
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: 2)      # the students have one each
    assert train.main(["demo", "--scale", "quick", "--teacher", "scratch"]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert list(summary)[:3] == ["teacher", "student", "distilled"]
    assert {"machine", "commit"} <= summary.keys()
    expected = {"AP", "AP50", "AP75", "params", "gflops", "minutes", "steps", "seed"}
    for name in ("teacher", "student", "distilled"):
        assert expected <= summary[name].keys()
    assert len(list((tmp_path / "demo").glob("*.png"))) >= 4
    assert "mean nothing" in capsys.readouterr().out
    student, = (tmp_path / "demo").glob("student-*")
    distilled, = (tmp_path / "demo").glob("distilled-*")
    before = (distilled / "last.pt").stat().st_mtime
    with monkeypatch.context() as patch:
        patch.setattr(demo, "draw", lambda *_: None)                   # the same pictures again
        assert train.main(["demo", "--scale", "quick", "--teacher", "scratch"]) == 0
    assert (distilled / "last.pt").stat().st_mtime == before
    # A run is named by what it depends on: another teacher, another distilled student, the same
    # student alone.
    shipped = tmp_path / "x.safetensors"
    assert train.main(["export", "--checkpoint", str(student), "--out", str(shipped)]) == 0
    monkeypatch.setattr(train, "SHIPPED_TEACHERS", {"dino": shipped})
    request.getfixturevalue("jobs_in_this_process")
    assert train.main(["demo", "--scale", "quick"]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["teacher"]["minutes"] == 0
    assert summary["teacher"]["weights"] == train.fingerprint(train.load_model(shipped)[0])
    assert len(list((tmp_path / "demo").glob("distilled-*"))) == 2
    assert len(list((tmp_path / "demo").glob("student-*"))) == 1
