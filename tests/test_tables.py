"""tables.py: the plan, what is tuned, the statistics, and a whole table of runs of two steps."""
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import checkpoints
import data
import models
from experiments import tables
import train
from train import PRESETS
from experiments.tables import Job


def no_tuning(detector, what):
    return {"lambda_mem": 5.0, "lambda_log": 0.1}


class Shelf:
    """A Site whose runs are made up: AP is the seed's base plus what the options add."""
    def __init__(self, folder, fails=()):
        self.results, self.fails, self.ran, self.made = Path(folder), fails, [], {}
        self.scope, self.scale = tables.SCALES["toy"], "toy"

    def defaults(self, detector):
        return {"lambda_mem": 5000, "lambda_log": 0.1}

    def result(self, job):
        return self.made.get(job)

    def run(self, job, threads):
        self.ran.append(job)
        if job in self.fails:
            raise RuntimeError(f"{job.name}: it broke")
        ap = 0.3 + 0.01 * (job.seed % 100) + (0.1 + 1e-5 * dict(job.options).get("lambda_mem", 0) if job.method else 0)
        self.made[job] = {"name": job.name, "detector": job.detector, "role": job.role, "AP": ap, "minutes": 1.0,
                          "AP50": ap, "AP75": ap, "APs": ap, "APm": None, "APl": ap, "params": 1, "gflops": 1.0,
                          "options": dict(job.options), "history": [{"step": 1, "AP": ap}]}


def test_gain_by_hand():
    """Differences .1, .2, .3: mean .2, deviation .1, t(0.975, 2) = 4.3027, so half = 4.3027 * .1 / sqrt(3)."""
    found = tables.gain({0: 0.4, 1: 0.6, 2: 0.8}, {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.1})
    assert found["mean"] == pytest.approx(0.2)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert found["mean"] - found["low"] == pytest.approx(found["high"] - found["mean"])


def test_gain_of_one_seed_has_no_interval_and_of_none_is_none():
    assert tables.gain({0: 0.4}, {0: 0.3}) == {"mean": pytest.approx(0.1), "low": None, "high": None}
    assert tables.gain({0: 0.4}, {1: 0.3}) is None


def test_the_plan_compares_every_method_on_the_seeds_of_its_students():
    rows = tables.plan("toy", no_tuning)
    assert {row.table for row in rows} == set(tables.TABLES)
    main = [row for row in rows if row.table == "main"]
    assert [(row.detector, row.label) for row in main if "mask" not in row.label] == [
        (detector, label) for detector in models.DETECTORS for label in ("teacher", "student", "clockdistill")]
    assert {row.detector for row in main if "mask" in row.label} == {"deformable_detr", "dino"}
    assert all([job.seed for job in row.jobs] == [0, 1, 2, 3, 4] for row in main if row.label != "teacher")
    rivals = [row.label for row in rows if row.table == "rivals" and row.detector == "deformable_detr"]
    assert rivals == ["student", *tables.RIVALS, "clockdistill", "clockdistill without the scale mask"]
    tuned = lambda detector, what: no_tuning(detector, what) | ({"scale": False} if what == "clockdistill" else {})
    assert "clockdistill with the scale mask" in {row.label for row in tables.plan("toy", tuned, ("rivals",))}
    tuned = lambda detector, what: no_tuning(detector, what) | ({"preset": detector} if what == "clockdistill" else {})
    assert "clockdistill without random queries" in {row.label for row in tables.plan("toy", tuned, ("rivals",))}
    assert all(job.split == "tune" and job.seed >= 100 for row in rows if row.table == "search" for job in row.jobs)
    assert all(job.split == "val" and job.seed < 100 for row in rows if row.table != "search" for job in row.jobs)
    shown = {job for row in rows for job in row.jobs}
    assert all(student in shown for row in rows for student in tables.plain_students(row))
    assert {job.steps for row in main for job in row.jobs} == {1}


def test_the_search_is_the_same_whatever_it_found():
    """It changes the recipe, so it must not depend on it."""
    other = lambda detector, what: {"lambda_mem": 1.0, "lambda_log": 1.0, "content": "zero"}
    assert tables.plan("toy", no_tuning, ("search",)) == tables.plan("toy", other, ("search",))


def test_an_ablation_does_not_repeat_what_was_chosen():
    tuned = lambda detector, what: {"lambda_mem": 5.0, "lambda_log": 0.1, "preset": detector}
    labels = {}
    for scale, detector in (("toy", "deformable_detr"), ("kitti", "dino")):
        rows = [row for row in tables.plan(scale, tuned, ("ablation",)) if row.detector == detector]
        logits = [row.jobs for row in rows if row.label.startswith(("logits", "the logit part", "..."))]
        assert len(set(logits)) == len(logits) > 5
        labels[detector] = {row.label for row in rows}
    assert "... 1 group" in labels["dino"]                # 3 were chosen
    assert "... 3 groups" in labels["deformable_detr"]    # 1 was
    assert tables.changed({"preset": "dino"}, {"groups": 3, "content": "own"}) == {}
    assert tables.changed({"preset": "dino", "groups": 1}, {"groups": 3}) == {"groups": 3}


def test_the_ablation_of_a_second_detector_has_the_parts_alone():
    labels = [row.label for row in tables.plan("toy", no_tuning, ("ablation",)) if row.detector == "dino"]
    assert labels == ["none", "the memory part, as chosen", "the logit part, as chosen", "both parts: clockdistill"]


def test_the_schedule_is_drawn_by_where_its_runs_end():
    line = lambda run, scores: {"runs": [run], "AP": scores}
    runs = {"long": {"method": None, "steps": 20}, "short": {"method": None, "steps": 5},
            "taught": {"method": "clockdistill", "steps": 5}}
    found = tables.final_scores([line("long", [.3]), line("short", [.1, .2]), line("taught", [.4])], runs)
    assert found == {"student alone": [(5, [.1, .2]), (20, [.3])], "distilled": [(5, [.4])]}


def test_names_tell_runs_apart():
    jobs = {job for scale in tables.SCALES for row in tables.plan(scale, no_tuning) for job in row.jobs}
    assert len({(job.scale, job.name) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("scale", list(tables.SCALES))
def test_every_detector_and_method_of_the_plan_is_a_command_that_train_reads(scale, tmp_path):
    site = tables.Site(scale, tmp_path, tmp_path, tmp_path, train.settings_of, build=None)
    jobs = {job for row in tables.plan(scale, tables.tuning(site)[1]) for job in row.jobs}
    assert {job.method for job in jobs} == {None, "clockdistill", *tables.RIVALS}
    for job in jobs:
        settings = site.parse(site.arguments(job))
        assert settings["seed"] == job.seed and settings["val_split"] == job.split
        if job.method:
            pairs = [pair.split("=") for pair in settings["method_options"]]
            model = models.build(job.detector, 3, backbone="resnet18", backbone_width=8, pretrained_backbone=False,
                                 hidden_dim=16, heads=4, ffn_dim=16, encoder_layers=1, decoder_layers=1, num_queries=4)
            train.open_method(train.Config(method=job.method, method_options=tuple("=".join(p) for p in pairs)),
                              model, model)


def test_tuning_chooses_by_the_tuning_split_alone(tmp_path):
    site = Shelf(tmp_path)
    trials, chosen, done = tables.tuning(site)
    assert all(job.split == "tune" and job.seed in site.scope.tune_seeds for job in trials)
    first = chosen("deformable_detr", "fgd")
    assert first == tables.TRIALS["fgd"][0]                           # nothing has run yet
    jobs = [job for job in trials if (job.detector, job.method) == ("deformable_detr", "fgd")]
    assert len(jobs) == 4
    done.update({job: {"AP": score} for job, score in zip(jobs, (0.1, 0.2, 0.4, 0.3))})
    assert chosen("deformable_detr", "fgd") == dict(jobs[2].options)
    ours = [job for job in trials if (job.detector, job.method) == ("dab_detr", "clockdistill")]
    assert [dict(job.options).get("scale", True) for job in ours] == [True] * 4 + [False] * 4
    done.update({job: {"AP": score} for job, score in zip(ours, (.1, .2, .1, .1, .1, .1, .3, .1))})
    assert chosen("dab_detr", "clockdistill") == chosen("dab_detr", "without_scale") == dict(ours[6].options)
    assert chosen("dab_detr", "with_scale") == dict(ours[1].options)
    budgets = {job.method for job in trials}
    assert all(sum(job.method == method and job.detector == "deformable_detr" for job in trials) == 4
               for method in budgets - {"clockdistill"})              # the same budget for each row of the tables
    assert {len(trials) for trials in tables.TRIALS.values()} == {4}


def test_of_several_tuning_seeds_the_mean_counts(tmp_path):
    site = Shelf(tmp_path)
    site.scope = dataclasses.replace(site.scope, tune_seeds=(100, 101))
    trials, chosen, done = tables.tuning(site, ("rivals",))
    jobs = [job for job in trials if job.method == "fgd"]
    done.update({job: {"AP": score} for job, score in zip(jobs, (.1, .1, .2, .5, .4, .4, .1, .1))})
    assert [job.seed for job in jobs[:2]] == [100, 101]
    assert chosen("deformable_detr", "fgd") == dict(jobs[4].options)      # means .1, .35, .4, .1; the best single is .5


def test_presets_and_recipes_are_what_won():
    """On the split "tune", by the committed results."""
    site = tables.Site("toy", "ROOT", "WORK", Path(tables.HERE) / "results" / "toy", train.settings_of, build=None)
    rows = tables.plan("toy", no_tuning, ("search",))
    for detector in site.scope.others["search"]:
        jobs = [row.jobs[0] for row in rows if row.detector == detector]
        won = dict(max(jobs, key=lambda job: site.result(job)["AP"]).options)
        assert PRESETS[detector] == {name: value for name, value in won.items() if "lambda" not in name}
    trials, chosen, done = tables.tuning(site, ("main",))
    done.update({job: site.result(job) for job in trials})
    assert all(done.values())
    for detector in models.DETECTORS:
        assert chosen(detector, "clockdistill") == site.defaults(detector)


def test_a_table_is_tuned_for_what_it_shows(tmp_path):
    site, trials = Shelf(tmp_path), lambda *only: {job.method for job in tables.tuning(site, only)[0]}
    assert trials("search") == set()
    assert trials("main") == trials("sensitivity") == {"clockdistill"}
    assert trials("rivals") == {"clockdistill", *tables.RIVALS}


def test_a_shipped_teacher_that_was_replaced_is_measured_again(tmp_path, capsys):
    weights = ["a"]
    site = tables.Site("toy", tmp_path, tmp_path, tmp_path, train.settings_of, build=None, teachers={"dino": "file"},
                       measure=lambda file: {"weights": weights[0], "settings": {}, "AP": .5},
                       identify=lambda file: weights[0])
    job, student = Job("toy", "dino", "teacher"), Job("toy", "dino", "student", "fgd")
    site.run(job, 1)
    site.file({"name": student.name, "settings": site.parse(site.arguments(student)), "taught_by": "a"})
    assert site.result(job)["AP"] == .5 and site.result(student)
    weights[0] = "b"
    site.identify.cache_clear()                                          # as the next command finds it
    assert site.result(job) is None and site.result(student) is None
    assert "(weights)" in (told := capsys.readouterr().out) and "(teacher)" in told


def test_a_stale_run_begins_anew_in_an_empty_folder(tmp_path):
    site = tables.Site("toy", tmp_path, tmp_path / "work", tmp_path, train.settings_of, build=None)
    job = Job("toy", "dino", "student")
    folder, settings, said = tmp_path / "work" / job.name, site.parse(site.arguments(job)), []
    checkpoints.set_aside(folder, settings, None, said.append)           # nothing there: nothing to do
    folder.mkdir(parents=True)
    checkpoints.write_json(folder / "config.json", {"settings": settings | {"teacher": "moved"}, "taught_by": None})
    checkpoints.set_aside(folder, settings, None, said.append)           # the same run
    assert folder.exists() and not said
    checkpoints.set_aside(folder, settings, "another", said.append)
    assert not folder.exists() and f"{folder}-until-" in said[0]


@pytest.mark.parametrize("change, stale", [({}, False), ({"settings": {"lr": 1.0}}, True), ({"taught_by": "b"}, True)])
def test_a_result_of_other_settings_or_of_another_teacher_does_not_count(tmp_path, capsys, change, stale):
    site = tables.Site("toy", tmp_path, tmp_path, tmp_path, train.settings_of, build=None)
    job, teacher = Job("toy", "dino", "student", "fgd"), Job("toy", "dino", "teacher")
    settings = site.parse(site.arguments(job))
    site.file({"name": teacher.name, "settings": site.parse(site.arguments(teacher)), "weights": "a"})
    site.file({"name": job.name, "settings": settings, "taught_by": "a"} | change)
    assert (site.result(job) is None) == stale
    assert ("does not count" in capsys.readouterr().out) == stale


def test_shards_share_all_runs_and_none_twice(tmp_path):
    jobs = [Job("toy", "dino", "student", seed=seed) for seed in range(7)]
    ran = []
    for index in range(3):
        site = Shelf(tmp_path)
        tables.run_all(site, jobs, 1, (index, 3), rebuild=False)
        ran += site.ran
    assert sorted(job.seed for job in ran) == list(range(7))


def test_a_run_that_fails_stops_no_other_and_finished_ones_are_not_repeated(tmp_path, capsys):
    jobs = [Job("toy", "dino", "student", seed=seed) for seed in range(3)]
    site = Shelf(tmp_path, fails=jobs[:1])
    done = tables.run_all(site, jobs, 2, (0, 1), rebuild=False)
    assert [done[job] is not None for job in jobs] == [False, True, True]
    assert "it broke" in capsys.readouterr().out
    tables.run_all(site, jobs, 2, (0, 1), rebuild=False)
    assert site.ran.count(jobs[0]) == 2 and site.ran.count(jobs[1]) == 1


def test_rows_hold_the_scores_in_the_order_of_the_seeds_and_gains_against_their_own_student(tmp_path):
    site = Shelf(tmp_path)
    rows = [row for row in tables.plan("toy", no_tuning, ("main",)) if row.detector == "dab_detr"]
    jobs = [job for row in rows for job in row.jobs]
    done = tables.run_all(site, jobs, 1, (0, 1), rebuild=False)
    teacher, student, distilled = tables.summarise(rows, done)["main"]
    assert teacher["gain"] is None and student["gain"] is None
    assert distilled["seeds"] == [0, 1, 2, 3, 4]
    assert distilled["AP"] == pytest.approx([0.4, 0.41, 0.42, 0.43, 0.44], abs=1e-3)
    assert distilled["gain"]["mean"] == pytest.approx(0.1 + 5e-5)
    page = tables.markdown({"main": [teacher, student, distilled]},
                           {"machine": "an abacus", "dab_detr": {"student": 50.0}}, "toy")
    assert "| dab_detr | clockdistill | 0.420 ± 0.016 | 0.420" in page and "+0.100 (+0.100 to +0.100)" in page
    assert "an abacus" in page and "| 50 |" in page
    page = tables.markdown({"main": [teacher, student, distilled]}, {"machine": ""}, "kitti")
    assert "| AP in the paper |" in page and "| dab_detr | clockdistill | 0.420 ± 0.016 |  | 0.420" in page


def test_without_any_result_there_is_nothing_to_tell(tmp_path):
    rows = tables.plan("toy", no_tuning)
    assert tables.summarise(rows, {}) == {}


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_shards_that_do_not_exist_are_refused(text):
    with pytest.raises(Exception, match="I/N"):
        tables.shard(text)


def test_saved_bytes_by_hand():
    """A linear layer keeps its input for the weight's gradient, a sigmoid its output: 3 x 4 and 3 x 5 floats; the
    weight itself is a parameter and not counted."""
    layer = nn.Linear(4, 5)
    saved = tables.SavedBytes(layer.parameters())
    with saved:
        layer(torch.zeros(3, 4)).sigmoid()
    assert saved.bytes == 4 * (3 * 4 + 3 * 5)


@pytest.mark.parametrize("scale", ["kitti", "coco"])
def test_a_dry_run_tells_each_run_of_the_paper_s_scales(scale, capsys, monkeypatch):
    monkeypatch.setattr(tables, "training_bytes", lambda *_: 1e9)              # of real models: that takes a while
    monkeypatch.setattr(models, "gflops", lambda *_: 100.0)
    a_gigabyte = SimpleNamespace(parameters=lambda: [torch.empty(250_000_000, device="meta")])
    monkeypatch.setattr(models, "build", lambda *_, **__: a_gigabyte)
    assert train.main(["table", scale, "--dry-run"]) == 0
    told = capsys.readouterr().out
    memory = {line.split(":")[0]: line.split(", ")[-1] for line in told.splitlines() if line.endswith(" GB")}
    assert memory["dino-student-0"] == "1.0 GB" and memory["dino-teacher"] == "1.0 GB"
    assert {found for name, found in memory.items() if "clockdistill" in name} == {"2.0 GB"}    # and the frozen teacher
    assert "To download" in told
    for name in ("dab_detr-teacher", "dino-fgd", "deformable_detr-clockdistill", "dino-student-x2"):
        assert name in told
    twice = next(line for line in told.splitlines() if "dino" in line and "--epochs 24" in line)
    assert f"--recipe {scale}-student" in twice


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    data.make_toy(root, counts=dict(train=8, val=4, tune=4))
    return root


def test_a_table_end_to_end_goes_on_where_it_was_and_is_rebuilt_from_its_json(toy, tmp_path, monkeypatch, capsys):
    """One detector, one seed, runs of two steps: the command of `table toy`, from teacher to tables.json."""
    small = tables.SCALES["toy"]
    monkeypatch.setitem(tables.SCALES, "toy", dataclasses.replace(
        small, main_seeds=(0,), seeds=(0,), others=dict.fromkeys(small.others, ())))
    monkeypatch.setattr(models, "DETECTORS", ("dino",))
    monkeypatch.setattr(train.data, "make_toy", lambda root: None)
    monkeypatch.setitem(tables.TRIALS, "with_scale", [{"lambda_mem": 100}])
    monkeypatch.setitem(tables.TRIALS, "without_scale", [])
    command = ["table", "toy", "--root", str(toy), "--work", str(tmp_path / "work"),
               "--results", str(tmp_path / "results"), "--jobs", "1", "--only", "main", "--teacher-floor", "0"]
    changes = ["--", "--steps", "2", "--warmup", "1", "--batch-size", "2", "--workers", "0"]
    assert train.main([*command, *changes]) == 0, capsys.readouterr().err
    page = json.loads((tmp_path / "results" / "tables.json").read_text())
    assert [(row["method"], row["seeds"]) for row in page["main"]] == [
        (method, [0]) for method in ("teacher", "student", "clockdistill")]
    assert (tmp_path / "results" / "tables.md").exists() and (tmp_path / "results" / "curves_dino.png").exists()
    runs = sorted(path.name for path in (tmp_path / "results" / "runs").iterdir())
    assert len(runs) == 4                                                          # teacher, trial, student, distilled
    run = json.loads((tmp_path / "results" / "runs" / runs[0]).read_text())
    assert {"commit", "machine", "seed", "settings", "command"} <= run.keys()
    monkeypatch.setattr(tables.Site, "run", lambda *_: pytest.fail("a finished run was started again"))
    assert train.main([*command, *changes]) == 0
    (tmp_path / "results" / "tables.json").unlink()
    assert train.main([*command, "--rebuild", *changes]) == 0
    assert json.loads((tmp_path / "results" / "tables.json").read_text()) == page
