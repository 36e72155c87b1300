"""tables.py: the plan, what is tuned, the statistics, and a whole table of runs of two steps."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import data
import models
import train
from experiments import bench, tables
from train import PRESETS

PUBLISHED = tables.HERE / "results" / "toy"


def study(folder, scale="toy", chosen=None, shipped=None, **rest):
    """A Study in an empty folder. chosen: what its chosen.json says."""
    folder = Path(folder)
    if chosen is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "chosen.json").write_text(json.dumps(chosen))
    return tables.Study(scale, "ROOT", folder / "work", folder, shipped or {}, **rest)


@pytest.fixture(scope="module")
def published():
    """The toy's committed results."""
    return tables.Study("toy", "ROOT", Path("work"), PUBLISHED, train.SHIPPED_TEACHERS,
                        done=tables.read_results(PUBLISHED / "runs"))


def made_up(job):
    """A result: AP is the seed's base plus what distillation adds."""
    ap = 0.3 + 0.01 * (job.cfg.seed % 100) + (0.1 if job.cfg.method else 0)
    return {"name": job.name, "role": job.role, "AP": ap, "AP50": ap, "AP75": ap, "APs": ap,
            "APm": None, "APl": ap, "minutes": 1.0, "params": 1, "gflops": 1.0, "weights": "w",
            "settings": train.plain(job.cfg), "history": [{"step": 1, "AP": ap}]}


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs are made up; the names of those that were asked for are in the list."""
    ran = []

    def run(runs, at_once, threads, ended):
        for name, (folder, words, _) in runs.items():
            ran.append(name)
            given = train.parse(words[:words.index("--out")])
            command, _ = given.pop("command"), given.pop("debug")
            cfg, _ = train.configure(command, **given)
            if cfg.detector == "deformable_detr" and cfg.seed == 0:
                ended(name, f"{name}: it broke")
                continue
            folder.mkdir(parents=True)
            result = made_up(SimpleNamespace(name=name, role="student", cfg=cfg))
            (folder / "result.json").write_text(json.dumps(result))
            ended(name, None)
    monkeypatch.setattr(tables.demo, "side_by_side", run)
    return ran


# ----------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------

def test_gain_by_hand():
    """Differences .1, .2, .3: mean .2, deviation .1, t(0.975, 2) = 4.3027.

    So half of the interval is 4.3027 * .1 / sqrt(3).
    """
    gained = tables.gain({0: 0.4, 1: 0.6, 2: 0.8}, {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.1})
    assert gained["mean"] == pytest.approx(0.2)
    assert gained["high"] - gained["mean"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert gained["mean"] - gained["low"] == pytest.approx(gained["high"] - gained["mean"])


def test_gain_of_one_seed_has_no_interval_and_of_none_is_none():
    mean = pytest.approx(0.1)
    assert tables.gain({0: 0.4}, {0: 0.3}) == {"mean": mean, "low": None, "high": None}
    assert tables.gain({0: 0.4}, {1: 0.3}) is None


def test_rows_hold_scores_in_the_order_of_the_seeds_and_gains_against_their_student(tmp_path):
    lines = [line for line in tables.plan(study(tmp_path), ("main",))
             if line.detector == "dab_detr"]
    done = {job.name: made_up(job) for line in lines for job in (*line.jobs, *line.alone)}
    teacher, student, distilled = tables.summarise(lines, done)["main"]
    assert teacher["gain"] is None and student["gain"] is None
    assert distilled["seeds"] == [0, 1, 2, 3, 4]
    assert distilled["AP"] == pytest.approx([0.4, 0.41, 0.42, 0.43, 0.44])
    assert distilled["gain"]["mean"] == pytest.approx(0.1)
    rows = {"main": [teacher, student, distilled]}
    page = tables.markdown(rows, {"machine": "an abacus", "dab_detr": {"student": 50.0}}, "toy")
    assert "| dab_detr | clockdistill | 0.420 ± 0.016 | 0.420" in page
    assert "+0.100 (+0.100 to +0.100)" in page and "an abacus" in page and "| 50 |" in page
    page = tables.markdown(rows, {"machine": ""}, "kitti")
    assert "| AP in the paper |" in page and "| clockdistill | 0.420 ± 0.016 |  | 0.420" in page


def test_without_any_result_there_is_nothing_to_tell(tmp_path):
    assert tables.summarise(tables.plan(study(tmp_path)), {}) == {}


def test_the_schedule_is_drawn_by_where_its_runs_end():
    line = lambda run, scores: {"runs": [run], "AP": scores}
    runs = {"long": {"settings": {"method": None}, "steps": 20},
            "short": {"settings": {"method": None}, "steps": 5},
            "taught": {"settings": {"method": "clockdistill"}, "steps": 5}}
    lines = [line("long", [.3]), line("short", [.1, .2]), line("taught", [.4])]
    ends = tables.final_scores(lines, runs)
    assert ends == {"student alone": [(5, [.1, .2]), (20, [.3])], "distilled": [(5, [.4])]}


# ----------------------------------------------------------------------------------------------
# The plan
# ----------------------------------------------------------------------------------------------

def test_the_plan_compares_every_method_on_the_seeds_of_its_students(published):
    lines = tables.plan(published)
    assert {line.table for line in lines} == set(tables.TABLES) - {"masks"}        # of real images alone
    main = [line for line in lines if line.table == "main"]
    assert [(line.detector, line.label) for line in main if "mask" not in line.label] == [
        (detector, label) for detector in models.DETECTORS
        for label in ("teacher", "student", "clockdistill")]
    assert {line.detector for line in main if "mask" in line.label} == {"deformable_detr", "dino"}
    assert {job.steps for line in main for job in line.jobs} == {1}
    for line in lines:
        seeds = [job.cfg.seed for job in line.jobs]
        assert [job.cfg.seed for job in line.alone] in (seeds, [])
        searched = line.table == "search"
        assert all((job.cfg.val_split == "tune") == searched == (job.cfg.seed >= 100)
                   for job in line.jobs)
        for job, alone in zip(line.jobs, line.alone):        # the same run, but for the teacher
            given = dict(teacher=None, method=None, method_options={})
            assert dataclasses.replace(job.cfg, **given) == alone.cfg


def test_a_row_shows_the_half_that_was_not_chosen(tmp_path):
    halves = {"with_scale": {"lambda_mem": 1.0},
              "without_scale": {"lambda_mem": 2.0, "scale": False}}
    for best, other in (("with_scale", "without"), ("without_scale", "with")):
        chosen = {"deformable_detr": halves | {"clockdistill": halves[best]}}
        labels = [line.label for line in tables.plan(study(tmp_path, chosen=chosen), ("rivals",))]
        assert labels == ["student", *tables.RIVALS, "clockdistill",
                          f"clockdistill {other} the scale mask"]


def test_the_search_is_the_same_whatever_it_found(tmp_path):
    """It changes the recipe, so it must not depend on it."""
    other = {"dino": {"clockdistill": {"lambda_mem": 1.0, "content": "zero"}}}
    assert tables.plan(study(tmp_path), ("search",)) == tables.plan(study(tmp_path, chosen=other),
                                                                    ("search",))


@pytest.mark.parametrize("scale, detector", [("toy", "deformable_detr"), ("kitti", "dino")])
def test_an_ablation_does_not_repeat_what_was_chosen(scale, detector, tmp_path):
    chosen = {detector: {"clockdistill": PRESETS[detector] | {"scale": False}}}
    lines = [line for line in tables.plan(study(tmp_path, scale, chosen), ("ablation",))
             if line.detector == detector]
    logits = [line for line in lines if line.label.startswith(("logits", "the logit part", "..."))]
    assert len({line.jobs for line in logits}) == len(logits) > 5
    labels = {line.label for line in lines}
    assert ("... 1 group" in labels) == (detector == "dino")            # which has chosen 3
    assert ("... 3 groups" in labels) == (detector != "dino")
    whole = next(line.jobs[0].cfg.method_options for line in lines if "both parts:" in line.label)
    part = next(line.jobs[0].cfg.method_options for line in logits if "as chosen" in line.label)
    assert whole["scale"] is False and part["lambda_mem"] == 0 and "scale" not in part


def test_the_ablation_of_a_second_detector_has_the_parts_alone(published):
    lines = tables.plan(published, ("ablation",))
    labels = [line.label for line in lines if line.detector == "dino"]
    assert labels == ["none", "the memory part, as chosen", "the logit part, as chosen",
                      "both parts: clockdistill"]


def test_a_change_may_be_a_factor_of_what_was_chosen(tmp_path):
    chosen = {"deformable_detr": {"clockdistill": {"lambda_mem": 20.0, "lambda_log": 0.5}}}
    lines = tables.plan(study(tmp_path, chosen=chosen), ("sensitivity",))
    options = {line.label: line.jobs[0].cfg.method_options for line in lines}
    assert options["lambda_mem / 4"] == {"lambda_mem": 5.0, "lambda_log": 0.5}
    assert options["lambda_log x 4"] == {"lambda_mem": 20.0, "lambda_log": 2.0}
    assert options["temperature 10.0"] == options["lambda_mem chosen"]
    headings = {label.rsplit(" ", 1)[0] for label in options}
    assert all(any(heading.startswith(panel) for panel in tables.PANELS) or heading == "student"
               for heading in headings)


@pytest.mark.parametrize("scale", list(tables.SCALES))
def test_every_detector_and_method_of_the_plan_is_a_command_that_train_reads(scale, tmp_path):
    here = study(tmp_path, scale)
    lines = tables.plan(here) + tables.trials(here)
    jobs = tables.jobs_of(lines)
    rivals = {"fitnets", "fgd", "mgd", "kd_detr"} if scale == "kitti-small" else tables.RIVALS
    assert {job.cfg.method for job in jobs} == {None, "clockdistill", *rivals}
    for job in {(job.cfg.method, job.steps, job.cfg.val_split): job for job in jobs}.values():
        given = train.parse(list(job.arguments))
        command, _ = given.pop("command"), given.pop("debug")
        assert train.configure(command, **given)[0] == job.cfg
        if job.cfg.method:
            model = models.build(job.cfg.detector, 3, backbone="resnet18", backbone_width=8,
                                 pretrained_backbone=False, hidden_dim=16, heads=4, ffn_dim=16,
                                 encoder_layers=1, decoder_layers=1, num_queries=4)
            train.open_method(job.cfg, model, model)


# ----------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------

def test_a_name_holds_the_settings_and_the_teacher_s_weights(tmp_path, monkeypatch):
    here = study(tmp_path)
    name = lambda where=here, **job: tables.make_job(where, "dino", "student", **job).name
    assert name() == name(seed=0) and name(seed=1).rsplit("-", 1)[0] == name().rsplit("-", 1)[0]
    fgd = dict(method="fgd", options={"alpha": 1.0})
    different = {name(), name(steps=2), name(split="tune"), name(**fgd), name(method="fgd"),
                 name(study(tmp_path, changes={"lr": 1.0})), name(method="mgd")}
    assert len(different) == 7
    # Only the runs with a teacher know its weights.
    teacher = tables.make_job(here, "dino", "teacher")
    taught, alone = name(**fgd), name()
    here.done[teacher.name] = made_up(teacher) | {"weights": "others"}
    assert name() == alone and name(**fgd) != taught
    # Places do not count: another folder of data, of teachers, of results.
    there = dataclasses.replace(here, root="/elsewhere", work=tmp_path / "elsewhere")
    assert name(there) == alone and name(there, **fgd) == name(**fgd)
    # A teacher that comes with the repository is its weights.
    monkeypatch.setattr(tables, "shipped_weights", lambda file: "0123456789abcdef")
    shipped = study(tmp_path, shipped={"dino": tmp_path / "file"})
    assert tables.make_job(shipped, "dino", "teacher").name == "dino-teacher-01234567"


def test_another_kind_of_data_is_one_entry(tmp_path, monkeypatch):
    split = "splits/kitti_cyclists_{}.txt".format
    farm = tables.Scale("small", {"D": "dino"}, seeds=(0,), seeds_of={"main": (0, 1)}, steps=1, images=703,
                        image_size=(128, 424), options={"train_split": split("train")}, download="nothing",
                        trials=tables.BALANCED_TRIALS, tune_seeds=(100,), tune_steps={"dino": 1 / 2},
                        splits={"val": split("val"), "tune": split("tune")})
    monkeypatch.setitem(tables.SCALES, "farm", farm)
    here = study(tmp_path, "farm")
    main = tables.plan(here, ("main",))
    assert [(line.label, len(line.jobs)) for line in main] == [("teacher", 1), ("student", 2),
                                                               ("clockdistill", 2)]
    cfg = main[2].jobs[1].cfg
    assert (cfg.val_split, cfg.train_split, cfg.steps) == (split("val"), split("train"), 2400)
    assert {line.jobs[0].cfg.val_split for line in tables.trials(here)} == {split("tune")}


@pytest.mark.parametrize("scale", list(tables.SCALES))
def test_names_tell_runs_apart(scale, tmp_path):
    here = study(tmp_path, scale)
    lines = tables.plan(here) + tables.trials(here)
    runs = {job.name: job.cfg for line in lines for job in (*line.jobs, *line.alone)}
    for line in lines:
        assert all(runs[job.name] == job.cfg for job in (*line.jobs, *line.alone))


def test_the_published_runs_are_those_of_the_plan(published):
    """No run is missing, and each file's settings are the planned ones."""
    lines = tables.plan(published) + tables.trials(published)
    jobs = tables.jobs_of(lines)
    assert len(jobs) > 250 and not [job.name for job in jobs if job.name not in published.done]
    for job in jobs:
        # An option that came later has its default in the older runs.
        stored = train.Config(**published.done[job.name]["settings"])
        for name, value in train.plain(job.cfg).items():
            assert name in train.PLACES or train.plain(stored)[name] == value, (job.name, name)
    for name, result in published.done.items():             # also those that no table shows
        assert result["name"] == name
        if result["role"] == "student":
            cfg = train.Config(**result["settings"] | {"seed": 0})
            assert name.split("-")[-2] == train.digest(cfg, result["taught_by"])


# ----------------------------------------------------------------------------------------------
# Tuning
# ----------------------------------------------------------------------------------------------

def test_every_method_has_the_same_budget_of_trials_on_the_tuning_split(published):
    lines = tables.trials(published)
    assert all((job.cfg.val_split, job.cfg.seed) == ("tune", 100)
               for line in lines for job in line.jobs)
    budgets = {}
    for line in lines:
        budgets.setdefault((line.detector, line.label), []).append(line)
    assert {len(budget) for budget in budgets.values()} == {4}
    whole = {detector for detector, what in budgets if what in tables.HALVES}
    assert whole == set(models.DETECTORS)


def test_a_table_is_tuned_for_what_it_shows(tmp_path):
    tuned = lambda *only: {line.label for line in tables.trials(study(tmp_path), only)}
    assert tuned("search") == set()
    assert tuned("main") == tuned("sensitivity") == set(tables.HALVES)
    assert tuned("rivals") == {*tables.HALVES, *tables.RIVALS}
    assert tables.trials(study(tmp_path, "kitti")) == []


def test_the_best_trial_is_chosen_by_the_mean_of_its_seeds(tmp_path, monkeypatch):
    two = dataclasses.replace(tables.SCALES["toy"], tune_seeds=(100, 101))
    monkeypatch.setitem(tables.SCALES, "toy", two)
    lines = [line for line in tables.trials(study(tmp_path), ("rivals",)) if line.label == "fgd"]
    scores = iter((.1, .1, .2, .5, .4, .4, .1, .1))         # means .1, .35, .4, .1; best single .5
    done = {job.name: {"AP": next(scores)} for line in lines for job in line.jobs}
    assert [job.cfg.seed for job in lines[0].jobs] == [100, 101]
    assert tables.choose(done, lines) == {
        "deformable_detr": {"fgd": lines[2].jobs[0].cfg.method_options}}


def test_clockdistill_is_the_better_half(tmp_path):
    lines = [line for line in tables.trials(study(tmp_path), ("main",))
             if line.detector == "dab_detr"]
    done = {line.jobs[0].name: {"AP": score}
            for line, score in zip(lines, (.1, .2, .1, .1, .1, .1, .3, .1))}
    chosen = tables.choose(done, lines)["dab_detr"]
    assert chosen["with_scale"] == lines[1].jobs[0].cfg.method_options
    assert chosen["clockdistill"] == chosen["without_scale"] == lines[6].jobs[0].cfg.method_options
    assert chosen["clockdistill"]["scale"] is False


def test_presets_recipes_and_chosen_json_are_what_won(published):
    """On the split "tune", by the committed results."""
    won = tables.choose(published.done, tables.trials(published))
    assert won == json.loads((PUBLISHED / "chosen.json").read_text())
    for detector in models.DETECTORS:
        recipe = train.RECIPES["toy-student"][detector]["method_options"]
        assert won[detector]["clockdistill"] == recipe
    lines = [line for line in tables.plan(published, ("search",)) if line.alone]
    for detector in ("dino", "deformable_detr"):
        jobs = [line.jobs[0] for line in lines if line.detector == detector]
        best = max(jobs, key=lambda job: published.done[job.name]["AP"]).cfg.method_options
        assert PRESETS[detector] == {k: v for k, v in best.items() if "lambda" not in k}


# ----------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------

def students(here, detector="dino", count=3):
    return [tables.make_job(here, detector, "student", seed=seed) for seed in range(count)]


def test_shards_share_all_runs_and_none_twice(tmp_path, fake_runs):
    for index in range(3):
        here = study(tmp_path / str(index))
        tables.run_all(here, students(here, count=7), 1, (index, 3))
    assert sorted(fake_runs) == sorted(job.name for job in students(here, count=7))


def test_a_run_that_fails_stops_no_other_and_finished_ones_are_not_repeated(tmp_path, fake_runs,
                                                                            capsys):
    here = study(tmp_path)
    jobs = students(here, "deformable_detr")
    for _ in range(2):
        assert tables.run_all(here, jobs, 2) == jobs[:1]
    assert "it broke" in capsys.readouterr().out
    assert fake_runs.count(jobs[0].name) == 2 and fake_runs.count(jobs[1].name) == 1


def test_a_run_that_ended_in_an_earlier_sitting_is_filed_and_not_begun(tmp_path, monkeypatch):
    here = study(tmp_path)
    job, = students(here, count=1)
    (here.work / job.name).mkdir(parents=True)
    (here.work / job.name / "result.json").write_text(json.dumps(made_up(job)))
    monkeypatch.setattr(tables.demo, "start", lambda *_: pytest.fail("it was begun again"))
    assert tables.run_all(here, [job], 1) == []
    assert tables.read_results(here.results / "runs")[job.name]["AP"] == made_up(job)["AP"]


def test_a_result_that_cannot_be_used_is_left_out_named_and_counted(tmp_path, fake_runs, capsys):
    here = study(tmp_path)
    jobs = students(here, count=4)
    tables.run_all(here, jobs, 1)
    files = [here.results / "runs" / f"{job.name}.json" for job in jobs]
    assert tables.read_results(files[0].parent).keys() == here.done.keys()
    files[0].write_text(files[0].read_text()[:50])
    files[1].write_text(json.dumps(made_up(jobs[1]) | {"AP": None}))
    files[2].write_text("null")
    assert tables.read_results(files[0].parent).keys() == {jobs[3].name}
    said = capsys.readouterr().out
    assert "3 results are left out" in said and all(str(file) in said for file in files[:3])


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    here = study(tmp_path, chosen={})
    (tmp_path / "chosen.json").write_text('{"dino": ')
    with pytest.raises(ValueError, match="chosen.json cannot be read as JSON .*delete it"):
        tables.plan(here, ("main",))


# Stands for train.py: works for long.
SLEEPER = """
import os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "pid").write_text(str(os.getpid()))
time.sleep(900)
"""
PARENT = """
import signal, sys
from pathlib import Path
import train
from experiments import tables
signal.signal(signal.SIGHUP, signal.SIG_DFL)              # the tests may run under nohup
train.HERE = Path(sys.argv[2])
here = tables.Study("toy", "ROOT", Path(sys.argv[1]), Path(sys.argv[1]), {})
tables.run_all(here, [tables.make_job(here, "dino", "student")], 1)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("stop", ["SIGTERM", "SIGHUP"])
def test_a_child_ends_with_its_parent(stop, tmp_path):
    (tmp_path / "train.py").write_text(SLEEPER)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), str(tmp_path)],
                              cwd=tables.HERE, stderr=subprocess.DEVNULL)
    until = time.time() + 300
    while not (pids := [file.read_text() for file in tmp_path.glob("*/pid")]) or not pids[0]:
        assert time.time() < until and parent.poll() is None
        time.sleep(0.1)
    os.kill(int(pids[0]), 0)                                  # the child is there
    parent.send_signal(getattr(signal, stop))
    assert parent.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids[0]), 0)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_a_job_in_hand_is_not_begun_twice(tmp_path, monkeypatch, capsys, jobs_in_this_process):
    monkeypatch.setattr(checkpoints, "PATIENCE", 0)
    here = study(tmp_path, "kitti-small")
    job, = students(here, count=1)
    folder = here.work / job.name
    folder.mkdir(parents=True)
    with checkpoints.locked(folder):
        assert tables.run_all(here, [job], 1) == [job]
    assert f"{folder} is in the hands of another run" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_shards_that_do_not_exist_are_refused(text):
    with pytest.raises(Exception, match="I/N"):
        tables.shard(text)


@pytest.mark.parametrize("scale", ["kitti", "coco"])
def test_a_dry_run_tells_each_run_of_the_paper_s_scales(scale, capsys, monkeypatch):
    # Real models would take a while.
    monkeypatch.setattr(bench, "training_bytes", lambda *_: 1e9)
    monkeypatch.setattr(models, "gflops", lambda *_: 100.0)
    a_gigabyte = SimpleNamespace(parameters=lambda: [torch.empty(250_000_000, device="meta")])
    monkeypatch.setattr(models, "build", lambda *_, **__: a_gigabyte)
    assert train.main(["table", scale, "--dry-run"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.endswith(" GB")]
    memory = {line.split(":")[0].rsplit("-", 2)[0]: line.split(", ")[-1] for line in lines}
    assert memory["dino-student"] == "1.0 GB" and memory["dino-teacher"] == "1.0 GB"
    assert memory["dino-clockdistill"] == "2.0 GB"                    # with the frozen teacher
    assert "To download" in said and len(lines) == {"kitti": 48, "coco": 36}[scale]
    for name in ("dab_detr-teacher", "dino-fgd", "deformable_detr-clockdistill", "dino-student-x2"):
        assert name in memory
    twice = next(line for line in said.splitlines() if "dino" in line and "--epochs 24" in line)
    assert f"--recipe {scale}-student" in twice


def test_a_dry_run_counts_the_images_of_the_folder_it_is_given(toy, capsys, monkeypatch):
    """KITTI's layout with 16 images of 160 x 48 pixels: 12 epochs of 1 GFLOP forward, three times."""
    sizes = []
    monkeypatch.setattr(tables.bench, "training_bytes", lambda *_: 1e9)
    monkeypatch.setattr(models, "gflops", lambda _, *size: sizes.append(size) or 1e6)
    monkeypatch.setattr(models, "build", lambda *_, **__: SimpleNamespace(parameters=lambda: []))
    changes = ["--", "--train-split", "all", "--size", "24,80"]
    assert train.main(["table", "kitti", "--dry-run", "--root", str(toy), *changes]) == 0
    said = capsys.readouterr().out
    assert "kitti all: 16 images" in said and "To download" not in said and set(sizes) == {(24, 80)}
    hours = 12 * 16 * 3 * 1e6 * 2e9 / 20e12 / 3600                 # a GPU's 20 TFLOP/s
    line = next(line for line in said.splitlines() if line.startswith("dino-student") and "-x" not in line)
    assert f"about {hours:.2f} GPU-hours" in line


@pytest.mark.parametrize("results, waiting", [
    (None, ""), ("empty", "memory, memory_location, memory_plain, with_scale, without_scale")])
def test_a_dry_run_counts_what_has_to_run_and_tells_what_waits_for_tuning(
        results, waiting, tmp_path, capsys, monkeypatch):
    """The toy's teachers are shipped. Its committed tuning chose, an empty folder's did not."""
    monkeypatch.setattr(bench, "untrained", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(bench, "training_bytes", lambda *_: 1e9)
    monkeypatch.setattr(models, "gflops", lambda *_: 1.0)
    where = ["--results", str(tmp_path / results)] if results else []
    assert train.main(["table", "toy", "--dry-run", *where]) == 0
    said = capsys.readouterr().out
    here = tables.open_study("toy", results=tmp_path / results if results else None)
    jobs = tables.jobs_of(tables.trials(here) + tables.plan(here))
    assert said.count(" core-hours, 1.0 GB") == len(jobs) and f"\n{len(jobs)} runs, " in said
    told = said.partition("Rows that wait for tuning come on top: ")[2]
    assert "-teacher-" not in said and told == (f"{waiting}.\n" if waiting else "")
    made = sum(job.name in here.done for job in [*tables.teachers_of(here, tables.plan(here)), *jobs])
    assert (f"{made} of these have their result in {here.results}/runs" in said) == (results is None) == (made > 0)


def test_a_table_starts_from_any_folder(tmp_path, monkeypatch):
    """Given paths are the caller's; splits, weights and published results are the repository's."""
    monkeypatch.chdir(tmp_path)
    here = tables.open_study("kitti-small", root="frames", work="runs")
    assert (here.root, here.work) == (str(tmp_path / "frames"), tmp_path / "runs")
    assert here.results == tables.HERE / "results/kitti" and here.done
    assert Path(tables.make_job(here, "dino", "student").cfg.train_split).is_file()


def test_speed_is_measured_at_the_size_of_the_runs(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(bench, "untrained", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(bench, "images_per_second", lambda networks, image: sizes.append(image.shape[2:]) or {})
    sized, unsized = ({"gflops_at": [160, 540], "settings": {"size": size}} for size in ("160,540", None))
    for done in ({}, {"a": {}, "b": sized}, {"c": unsized}):
        tables.images_per_second(study(tmp_path, "kitti", done=done))
    assert [tuple(size) for size in sizes] == [(402, 1333), (160, 540), (402, 1333)]


@pytest.mark.parametrize("word, value", [("--detector", "dino"), ("--seed", "7"), ("--recipe", "toy-teacher"),
                                         ("--root", "x"), ("--out", "x")])
def test_a_change_of_what_the_table_sets_itself_is_refused(word, value, tmp_path, capsys):
    assert train.main(["table", "toy", "--dry-run", "--results", str(tmp_path), "--", word, value]) == 2
    assert f"error: {word} after --: the table sets it itself" in capsys.readouterr().err


def test_a_change_of_the_images_leaves_tuning_on_its_own(tmp_path):
    changed = study(tmp_path, changes={"val_split": "all"})
    assert tables.make_job(changed, "dino", "student").cfg.val_split == "all"
    assert tables.make_job(changed, "dino", "student", split="tune").cfg.val_split == "tune"


def test_tables_are_made_again_without_the_images(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(tables, "write", written.append)
    assert train.main(["table", "kitti-small", "--rebuild", "--results", str(tmp_path)]) == 2
    assert f"{tmp_path}/reading.json is missing: give --root" in capsys.readouterr().err
    (tmp_path / "reading.json").write_text("{}")
    assert train.main(["table", "kitti-small", "--rebuild", "--results", str(tmp_path)]) == 0
    assert written[0].root == "ROOT"


def test_teachers_are_asked_about_the_same_images_each_encoded_once(toy, tmp_path, monkeypatch):
    opened, encoded, build = [], [], data.build
    monkeypatch.setattr(data, "build", lambda *words, **given: (
        opened.append(words), build(*words, **given))[1])
    class Counting(tables.EncodeOnce):
        def __init__(self, encode, room):
            super().__init__(lambda *one: (encoded.append(len(one[0])), encode(*one))[1], room)
    monkeypatch.setattr(tables, "EncodeOnce", Counting)
    shipped = {name: train.SHIPPED_TEACHERS[name] for name in ("dab_detr", "dino")}
    here = dataclasses.replace(study(tmp_path, shipped=shipped), root=str(toy))
    reading = tables.what_is_read(here)
    assert len(opened) == 1 and encoded == [1] * 4 * len(shipped)
    images = build("toy", toy, "tune")
    kind, part = reading["always"]
    labels = images.labels[images.labels >= 0]
    assert part == pytest.approx((labels == images.classes.index(kind)).double().mean().item())
    assert list(reading["dab_detr"]) == ["random_label", "own", "random", "zero"]
    # The same numbers as without keeping memories.
    teacher, _ = train.load_model(shipped["dino"])
    method = tables.CLoCKDistill(64, 64, content="label", box_noise=0.4)
    batches = list(data.eval_loader(images, 20))
    alone = tables.look.reading(teacher, method, teacher.label_embedding, batches)
    assert reading["dino"]["label"] == {name: pytest.approx(value, abs=1e-5)
                                        for name, value in alone.items()}
    assert tables.what_is_read(study(tmp_path)) == {}               # no teacher, nothing to open


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    data.make_toy(root, counts=dict(train=8, val=4, tune=4))
    return root


def test_a_table_end_to_end_goes_on_where_it_was_and_is_rebuilt_from_its_json(
        toy, tmp_path, monkeypatch, capsys, jobs_in_this_process):
    """One detector, one seed, runs of two steps: `table toy` from the teacher to the page."""
    monkeypatch.setitem(tables.SCALES, "toy", dataclasses.replace(
        tables.SCALES["toy"], seeds_of={"main": (0,)}, detectors={"C": "dino"}, tune_steps={"dino": 1}))
    monkeypatch.setitem(tables.TRIALS, "with_scale", ({}, [{"lambda_mem": 100}]))
    monkeypatch.setitem(tables.TRIALS, "without_scale", ({}, []))
    command = ["table", "toy", "--root", str(toy), "--work", str(tmp_path / "work"),
               "--results", str(tmp_path / "results"), "--jobs", "2", "--only", "main",
               "--teacher-floor", "0"]
    changes = ["--", "--steps", "2", "--warmup", "1", "--batch-size", "2", "--workers", "0"]
    assert train.main([*command, *changes]) == 0, capsys.readouterr().err
    results = tmp_path / "results"
    page = json.loads((results / "tables.json").read_text())
    assert [(row["method"], row["seeds"]) for row in page["main"]] == [
        (method, [0]) for method in ("teacher", "student", "clockdistill")]
    assert (results / "tables.md").exists() and (results / "gains_main.png").exists()
    chosen = json.loads((results / "chosen.json").read_text())["dino"]
    assert chosen["clockdistill"] == chosen["with_scale"] == PRESETS["dino"] | {"lambda_mem": 100.0}
    runs = [json.loads(path.read_text()) for path in (results / "runs").iterdir()]
    assert len(runs) == 4                              # teacher, trial, student, distilled
    for run in runs:
        assert {"name", "role", "commit", "machine", "seed", "settings", "command"} <= run.keys()
        assert run["settings"]["steps"] == 2 and "--root ROOT" in run["command"]
    again = lambda *_: pytest.fail("a finished run was started again")
    monkeypatch.setattr(tables.demo, "start", again)
    assert train.main([*command, *changes]) == 0
    (results / "tables.json").unlink()
    assert train.main([*command, "--rebuild", *changes]) == 0
    assert json.loads((results / "tables.json").read_text()) == page


def test_on_real_images_every_method_is_tuned_by_the_ratio_of_its_gradients(tmp_path):
    tuned = tables.trials(study(tmp_path, "kitti-small"))
    assert len(tuned) == 4 * (5 + 1 + 1)                   # DINO's methods, Deformable DETR's, DAB-DETR's
    both = [line.jobs[0].cfg for line in tuned if (line.detector, line.label) == ("dino", "clockdistill")]
    assert [cfg.balance for cfg in both] == [
        {"memory": 3.125, "cls+l1+giou": 1 / 16}, {"memory": 12.5, "cls+l1+giou": 1 / 4},
        {"memory": 50.0, "cls+l1+giou": 1.0}, {"memory": 200.0, "cls+l1+giou": 4.0}]
    assert all(cfg.steps == train.RECIPES["small-student"]["dino"]["steps"] // 4
               and cfg.val_split.endswith("tune.txt") and cfg.method_options["groups"] == 3 for cfg in both)
    # Every part that is weighed is one that its method has.
    for line in tuned:
        cfg = line.jobs[0].cfg
        method = train.methods()[cfg.method](**cfg.method_options)
        assert train.open_balance(cfg, method, cfg.steps) is not None


def test_a_table_without_rows_is_refused_in_one_line(capsys):
    """Else a command that makes nothing would end as if all were done."""
    assert train.main(["table", "kitti", "--dry-run", "--only", "masks"]) == 2
    assert "error: table kitti has no rows in masks" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["kitti", "coco"])
def test_untuned_tables_weigh_every_method_by_its_gradients(scale, tmp_path):
    """A loss weight tuned on other pictures, or on none, would make the table one of weights."""
    jobs = [job for line in tables.plan(study(tmp_path, scale)) for job in line.jobs if job.cfg.method]
    assert {job.cfg.method for job in jobs} == {"clockdistill", *tables.RIVALS}
    for job in jobs:
        cfg = job.cfg
        train.check_balance(cfg.method, cfg.balance)
        # Each loss is weighed, so none keeps a default that was made for other pictures.
        assert {name for part in cfg.balance for name in part.split("+")} == set(train.methods()[cfg.method].terms)
    varied = {line.label: line.jobs[0].cfg.balance for line in tables.plan(study(tmp_path, scale), ("sensitivity",))}
    assert varied["lambda_mem / 4"] == {"memory": 12.5, "cls+l1+giou": 1.0}
    assert varied["lambda_log x 4"] == {"memory": 50.0, "cls+l1+giou": 4.0}


def test_what_tuning_chose_on_real_images_reaches_the_rows(tmp_path):
    small = study(tmp_path, "kitti-small")
    lines = tables.trials(small)
    best = {(line.detector, line.label): line for line in lines}        # the last of four: the heaviest
    scores = {line.jobs[0].name: {"AP": .2 if line is best[line.detector, line.label] else .1} for line in lines}
    chosen = tables.choose(scores, lines)
    rows = {line.label: line.jobs for line in tables.plan(study(tmp_path, "kitti-small", chosen)) if line.detector == "dino"
            and line.table in ("ablation", "masks", "rivals")}
    # One piece is taken away, and the ratios stay: what is off is not weighed (train.open_balance).
    whole = rows["clockdistill"][0].cfg
    assert whole.balance == {"memory": 200.0, "cls+l1+giou": 4.0}
    for label, off in (("the memory part, as chosen", {"lambda_log": 0.0}),
                       ("the logit part, as chosen", {"lambda_mem": 0.0}),
                       ("+ location mask", {"scale": False}),
                       ("every token alike", {"location": False, "scale": False})):
        assert [job.cfg.seed for job in rows[label]] == [0, 1, 2, 3, 4]
        assert rows[label][0].cfg.method_options == whole.method_options | off
        assert rows[label][0].cfg.balance == whole.balance
    assert rows["fgd"][0].cfg.balance == {"objects+background+attention+relation": 200.0}
    assert len(rows["fgd"]) == 3 and "hinton" not in rows


def test_some_detectors_first(tmp_path):
    """`--detectors` leaves out the runs of the others, and their names stay."""
    small = tables.open_study("kitti-small", results=tmp_path)
    every, dino = (tables.plan(small, **only) + tables.trials(small, **only)
                   for only in ({}, {"detectors": ["dino"]}))
    names = [{job.name for job in tables.jobs_of(lines)} for lines in (every, dino)]
    assert names[1] == {name for name in names[0] if name.startswith("dino-")} != names[0]
    assert [job.cfg.detector for job in tables.teachers_of(small, dino)] == ["dino"]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_backbone_of_any_model_is_said_once_before_any_run(
        role, toy, tmp_path, monkeypatch, capsys):
    """The last detector's alone is missing: the others were looked at too."""
    pytest.importorskip("timm", reason="timm is an extra: pip install timm")
    monkeypatch.setattr(tables.demo, "start", lambda *_: pytest.fail("a run was started"))
    recipes = train.RECIPES
    for name in ("small-student", "small-teacher"):
        by_detector = {detector: recipe | dict(pretrained_backbone="none")
                       for detector, recipe in recipes[name].items()}
        if name.endswith(role):
            by_detector["dab_detr"]["pretrained_backbone"] = "nowhere.pth"
        monkeypatch.setitem(recipes, name, by_detector)
    assert train.main(["table", "kitti-small", "--root", str(toy), "--work", str(tmp_path),
                       "--results", str(tmp_path / "results"), "--only", "main", "--",
                       "--train-split", "all", "--val-split", "all"]) == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint at nowhere.pth")


def test_columns_of_a_row():
    def line(method, ap, **more):
        return {"detector": "dino", "method": method, "seeds": [0, 1], "AP": ap, "AP50": [.5, .5],
                "AP75": [.75, .75], "APs": [.1, .1], "APm": [.2, .2], "APl": [.3, .3], "gain": None,
                "minutes": [1., 2.], "params": 2e6, "gflops": 1.5, **more}
    lines = [line("fgd", [.3, .4]), line("clockdistill", [.4, .5])]
    row = tables.cells(lines[0], lines, {"student": 50., "teacher": 9.})
    assert row["AP"] == "0.350 ± 0.071" and row["AP50"] == "0.500 ± 0.000" and row["AP75"] == "0.750 ± 0.000"
    assert row["AP small / medium / large"] == "0.10 ± 0.00 / 0.20 ± 0.00 / 0.30 ± 0.00"
    assert row["clockdistill - this"] == "+0.100 (+0.100 to +0.100)"
    assert (row["minutes"], row["images/s"]) == ("1.5", "50")
    assert tables.cells(lines[1], lines, {})["clockdistill - this"] == ""
