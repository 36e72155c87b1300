"""The pages: their tables hold the figures of the JSON files, their code runs, their links lead somewhere."""
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from clockdistill import CLoCKDistill
from experiments import tables

ROOT = Path(__file__).resolve().parent.parent
TABLES = json.loads((ROOT / "results/toy/tables.json").read_text())
PAGES = ["README.md", "results/README.md", "results/kitti/README.md", "results/deploy/README.md", "results/bench.md",
         "weights/README.md", "figures/README.md",
         *(f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("[0-9]_*.py")))]
NAMES = {"DAB-DETR": "dab_detr", "Deformable DETR": "deformable_detr", "DINO": "dino"}


def lines_of(table):
    """{(detector, label): the row} of a table of tables.json."""
    return {(line["detector"], line["method"]): line for line in TABLES[table]}


def rows_of(file, start):
    """The cells of the Markdown table whose head begins with `start`, bold marks left out."""
    text = (ROOT / file).read_text()
    rows = text[text.index(start):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("**", "") for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize("folder, first", [("toy", 0), ("kitti", 3)])
def test_the_first_table_of_the_readme(folder, first):
    lines = json.loads((ROOT / f"results/{folder}/tables.json").read_text())["main"]
    main = {line["method"]: line for line in lines if line["detector"] == "dino"}
    rows = rows_of("README.md", "| DINO on")[first:first + 3]
    seeds = len(main["student"]["seeds"])
    assert [row[1] for row in rows] == ["teacher", f"student alone, {seeds} seeds", "the same student, distilled"]
    for role, (_, _, ap, ap50, gain, parameters, gflops, _) in zip(("teacher", "student", "clockdistill"), rows):
        line = main[role]
        assert [ap, ap50] == [f"{np.mean(line[key]):.3f}" for key in ("AP", "AP50")]
        assert parameters == f"{line['params'] / 1e6:.2f} M" and gflops == f"{line['gflops']:.3f}"
        wanted = tables.interval(line["gain"]) if role == "clockdistill" else ""
        assert gain == wanted


def test_the_gains_of_all_detectors():
    main, rows = lines_of("main"), rows_of("results/README.md", "| detector | teacher | student alone")
    assert [row[0] for row in rows] == list(NAMES)
    for name, teacher, alone, distilled, gain, seeds in rows:
        lines = [main[NAMES[name], label] for label in ("teacher", "student", "clockdistill")]
        assert teacher == f"{lines[0]['AP'][0]:.3f}" and int(seeds) == len(lines[2]["seeds"])
        for cell, line in zip((alone, distilled), lines[1:]):
            assert cell == f"{np.mean(line['AP']):.3f} ± {np.std(line['AP'], ddof=1):.3f}"
        assert gain == tables.interval(lines[2]["gain"])


@pytest.mark.parametrize("table, start, detector", [("rivals", "| method | AP | gain", "deformable_detr"),
                                                    ("ablation", "| detector | run | AP", None)])
def test_the_other_tables_of_the_results(table, start, detector):
    lines = lines_of(table)
    for row in rows_of("results/README.md", start):
        key = (detector, row[0]) if detector else (NAMES[row[0]], row[1])
        ap, gain = row[1:3] if detector else row[2:4]
        line = lines[key]
        assert ap == f"{np.mean(line['AP']):.3f} ± {np.std(line['AP'], ddof=1):.3f}", row
        assert gain == tables.interval(line["gain"]), row


def test_what_was_chosen_was_chosen_on_other_images_with_another_seed():
    """What notebooks/3_ablations says of the choices behind the tables."""
    tuning = json.loads((ROOT / "results/toy/tuning.json").read_text())
    runs = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results/toy/runs").glob("*.json")}
    reported = [line for table, lines in TABLES.items() if table != "search" for line in lines]
    assert not {seed for line in reported for seed in line["seeds"]} & {trial["seed"] for trial in tuning}
    assert {runs[name]["settings"]["val_split"] for line in reported for name in line["runs"]
            if line["method"] != "teacher"} == {"val"}
    assert {len(trials) for _, trials in tables.TRIALS.values()} == {4}
    main = lines_of("main")
    for detector in NAMES.values():
        trials = [trial for trial in tuning if trial["detector"] == detector
                  and trial["what"] in ("with_scale", "without_scale")]
        distilled, (teacher,) = main[detector, "clockdistill"], main[detector, "teacher"]["runs"]
        assert len(trials) == 8 and max(trials, key=lambda one: one["AP"])["options"] == distilled["options"]
        assert {runs[name]["taught_by"] for name in distilled["runs"]} == {runs[teacher]["weights"]}


def test_rows_called_label_of_a_detector_without_label_embedding_are_random():
    """Deformable DETR has none: notebooks/3_ablations and results/README.md say so of these rows."""
    for table in ("ablation", "search"):
        contents = {line["options"]["content"] for (detector, label), line in lines_of(table).items()
                    if detector == "deformable_detr" and "content: label" in label}
        assert contents == {"random_label"}


def test_the_masks_on_real_kitti():
    """The scores, gains and differences of question 3 in results/kitti/README.md."""
    alone, *lines = json.loads((ROOT / "results/kitti/tables.json").read_text())["masks"]
    scores = [dict(zip(line["seeds"], line["AP"])) for line in lines]
    rows = rows_of("results/kitti/README.md", "| AP of seed | 0 | 1 | 2 | 3 | 4 | gain")
    for line, seeds, (name, *cells) in zip(lines, scores, rows, strict=True):
        assert line["method"].split(":")[0] in name
        gain = tables.gain(seeds, dict(zip(alone["seeds"], alone["AP"])))
        assert cells == [*(f"{seeds[seed]:.3f}" for seed in range(5)), tables.interval(gain)]
    rows = rows_of("results/kitti/README.md", "| AP, five seeds | difference")
    for (more, less), (_, cell) in zip(((1, 0), (2, 1), (2, 0)), rows, strict=True):
        gain = tables.gain(scores[more], scores[less])
        assert cell == tables.interval(gain) + ", undecided" and gain["low"] < 0 < gain["high"]


def test_the_speed_of_the_detectors():
    """The seconds, ratios, peaks and shares of results/bench.md are those of bench.json."""
    told = json.loads((ROOT / "results/bench.json").read_text())
    seconds, peaks, shares = (rows_of("results/bench.md", start) for start in (
        "| | inference | transformers | faster", "| peak memory in GB", "| share of the product's"))
    for times, memory, share in zip(seconds, peaks, shares, strict=True):
        name = NAMES[times[0]]
        parts = [told[part][name] for part in ("inference", "training")]
        for part, cells, peak, of in zip(parts, (times[1:4], times[4:7]), (memory[1:3], memory[3:5]), share[1:]):
            ours, theirs = part["ours"], part.get("transformers")
            assert cells[0] == f"{ours['seconds']:.2f}" and peak[0] == f"{ours['peak_gb']:.2f}"
            assert of == f"{ours['of_product']:.0%}".replace("%", " %")
            if theirs:
                ratio = theirs["seconds"] / ours["seconds"]
                assert cells[1:] == [f"{theirs['seconds']:.2f}", f"{ratio:.2f} x"] and peak[1] == f"{theirs['peak_gb']:.2f}"
        assert times[7] == f"{told['distill'][name]['whole_over_parts']:.2f}"
    assert NAMES.keys() == {row[0] for row in seconds} == {row[0] for row in peaks} == {row[0] for row in shares}


def test_training_in_bf16():
    """The scores and the difference on results/bench.md, from results/bf16.json."""
    scores = {(run["data"], run["precision"], run["seed"]): run["AP"]
              for run in json.loads((ROOT / "results/bf16.json").read_text())}
    toy, kitti = rows_of("results/bench.md", "| | seed 100 | 101 | 102")
    for seed, cell in zip((100, 101, 102), toy[1:]):
        assert cell == ", ".join(f"{scores['toy', name, seed]:.3f}"[1:] for name in ("fp32", "bf16"))
    gain = tables.gain(*({seed: scores["toy", name, seed] for seed in (100, 101, 102)} for name in ("bf16", "fp32")))
    assert toy[4] == tables.interval(gain).replace("0.", ".") + ", undecided"
    assert kitti[1].endswith(f"{scores['kitti', 'bf16', 100]:.3f}"[1:])


def test_where_real_kitti_gains():
    """The gains by threshold, size and class in results/kitti/README.md, from its runs."""
    lines = {line["method"]: line for line in json.loads((ROOT / "results/kitti/tables.json").read_text())["main"]}
    runs = [[json.loads((ROOT / f"results/kitti/runs/{name}.json").read_text()) for name in lines[role]["runs"]]
            for role in ("student", "clockdistill")]
    keys = {"small": "APs", "medium": "APm", "large": "APl"}
    for row in rows_of("results/kitti/README.md", "| | gain in AP, five seeds"):
        for name, cell in (row[:2], row[2:]):
            key = keys.get(name, name)
            alone, distilled = (dict(enumerate(run[key] if key in run else run["per_class"][key]["AP"]
                                               for run in each)) for each in runs)
            gain = tables.gain(distilled, alone)
            assert cell.startswith(tables.interval(gain)), (name, gain)
            assert cell.endswith("undecided") == (gain["low"] < 0 < gain["high"]), name


def test_the_step_that_the_readme_gives_to_copy_runs():
    """Two images, three classes, two decoder layers, a memory of 6 x 20 and 3 x 10 cells."""
    def ask(width, images, content, reference, attend):
        queries = content.shape[1]
        assert content.shape == (2, queries, width) and reference.shape == (2, queries, 4)
        assert attend.shape == (2, queries, queries)
        return (torch.randn(2, 150, width, requires_grad=True), torch.randn(2, 2, queries, 3),
                torch.rand(2, 2, queries, 4))

    code = re.search(r"( {4}distill = .*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {"CLoCKDistill": CLoCKDistill, "torch": torch, "ask": ask, "student": 96, "teacher": 128,
             "images": None, "teacher_contents": torch.randn(24, 128), "padding": None,
             "labels": [torch.tensor([0, 1]), torch.tensor([2])], "shapes": [(6, 20), (3, 10)],
             "boxes": [torch.full((2, 4), .3), torch.full((1, 4), .3)]}
    exec(textwrap.dedent(code), names)
    assert set(names["losses"]) == {"memory", "cls", "l1", "giou"}
    assert names["losses"]["memory"].requires_grad


def test_the_shipped_detectors():
    """AP and size in weights/README.md are those that deployment measured."""
    rows = rows_of("weights/README.md", "| NAME; AP on `val`")
    assert len(rows) == 4
    for name, *scores, sizes in rows:
        data, detector = re.fullmatch(r"(?:real )?(\w+): `(\w+)`", name).groups()
        measured = json.loads((ROOT / f"results/deploy/{data.lower()}.json").read_text())["rows"]
        files = [measured[f"{detector}, {role}, PyTorch"] for role in ("teacher", "student", "distilled")]
        assert scores == [f"{file['AP']:.3f}".lstrip("0") for file in files]
        assert sizes == ", ".join(f"{file['file_mb']:.1f}" for file in files)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    if page.endswith(".py"):                             # a notebook's text is comments
        text = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for link in re.findall(r"\]\(([^)\s]*[./#][^)\s]*)\)", text):           # x[0](y) is no link
        path, _, anchor = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not link.startswith("http"):
            assert file.exists(), link
            headings = re.findall(r"^(?:# )?#+ (.*)$", file.read_text(), re.M) if anchor else []
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor.lower() in anchors, link


def test_the_trials_of_the_weights():
    """The page's figures of digits are those of the runs."""
    runs = json.loads((ROOT / "results/kitti/digits.json").read_text())
    of = {run["balance"]["memory"]: f"{run['AP']:.3f}"[1:] for run in runs if run["run"] == "distilled"}
    rows = {row[0]: row[1:] for row in rows_of("results/kitti/README.md", "| wanted ratio of gradients")}
    assert rows["AP on digits"] == [of[ratio] for ratio in (3.125, 12.5, 50, 200)]


def test_the_rivals_trials():
    """The page's figures are those of the trials."""
    found = {}
    for trial in json.loads((ROOT / "results/kitti/tuning.json").read_text()):
        part, ratio = next(iter(sorted(trial["options"]["balance"].items(), reverse=True)))
        found.setdefault(trial["what"], {})[ratio * (50 if part.startswith("cls") else 1)] = trial["AP"]
    rows = {row[0]: row[1:] for row in rows_of("results/kitti/README.md", "| ratio of gradients")}
    assert len(rows) == len(found) == 5
    for name, told in rows.items():
        of = found[name.lower().replace("-", "_")]
        assert told == [f"{of[ratio]:.3f}"[1:] for ratio in (3.125, 12.5, 50, 200)]


def test_the_rivals_on_real_kitti():
    """The page's scores are those of seeds 0 and 1, its intervals those of the pairs."""
    lines = json.loads((ROOT / "results/kitti/tables.json").read_text())["rivals"]
    of = {line["method"]: dict(zip(line["seeds"], line["AP"])) for line in lines}
    page = (ROOT / "results/kitti/README.md").read_text()
    methods = {"student alone": "student", "CLoCKDistill": "clockdistill", "FGD": "fgd", "FitNets": "fitnets", "MGD": "mgd",
               "KD-DETR": "kd_detr"}
    rows = {row[0]: row[1:] for row in rows_of("results/kitti/README.md", "| AP of seed | 0 | 1 | CLoCKDistill minus it |")}
    assert rows.keys() == methods.keys() and of.keys() == set(methods.values())
    for name, (first, second, minus) in rows.items():
        seeds = of[methods[name]]
        assert [first, second] == [f"{seeds[0]:.3f}", f"{seeds[1]:.3f}"]
        told = "" if name in ("student alone", "CLoCKDistill") else tables.interval(tables.gain(of["clockdistill"], seeds))
        assert minus == told
        if name != "student alone":
            assert f"{name} {first} and {second}" in page


def test_twice_the_steps_on_real_kitti():
    """The page's four scores and two gains are those of seed 0."""
    lines = json.loads((ROOT / "results/kitti/tables.json").read_text())["schedule"]
    of = {line["method"]: dict(zip(line["seeds"], line["AP"]))[0] for line in lines}
    for times, row in zip((1, 2), rows_of("results/kitti/README.md", "| AP of seed 0")):
        alone, distilled = of[f"student, {times} x the steps"], of[f"distilled, {times} x the steps"]
        assert row[1:] == [f"{alone:.3f}", f"{distilled:.3f}", f"{distilled - alone:+.3f}"]


def test_dab_detr_misses_its_bar():
    """The plan's curve is that of the run."""
    alone, _, finer = json.loads((ROOT / "results/kitti/dab_detr.json").read_text())
    rows = {row[0]: row[1:] for row in rows_of("results/kitti/PLAN.md", "| step | 400")}
    for name, metric in (("AP50 of the student alone", "AP50"), ("AP of it", "AP")):
        assert rows[name] == [f"{point[metric]:.3f}"[1:] for point in alone["history"]]
    assert alone["history"][-1]["AP50"] < .2
    losses = [f"{run['mean_loss_of_steps_300_to_366']:.2f}" for run in (finer, alone)]
    assert "a loss of {} in steps 300 to 366, the recipe's {} there".format(*losses) in (ROOT / "results/kitti/PLAN.md").read_text()


def test_the_remedy_for_the_logit_part():
    """The page's interval is that of the runs, paired by seed."""
    runs = [run for run in json.loads((ROOT / "results/toy/sees_learned.json").read_text())
            if run["run"] == "logit part" and "changed" not in run]
    with_it, without = ({run["seed"]: run["AP"] for run in runs if run["sees_learned"] is seen} for seen in (True, False))
    gain = tables.interval(tables.gain(with_it, without))
    assert len(without) == 5 and f"has {gain} with it" in (ROOT / "results/kitti/README.md").read_text()
