# %% [markdown]
# # 3 The toy's tables, drawn and explained
#
# What does distillation gain, how sure is it, and which part does it? This notebook trains nothing. It reads
# [results/toy](../results/toy), which `python train.py table toy` makes, and computes everything it says from there.
# A claim that the data settle is asserted. What they do not settle is printed as *undecided*. A table that was not run
# yet has its section all the same; it fills when the runs are there.
#
# The toy is small generated street scenes, 160 x 48 pixels, and models of less than 2 M parameters. It shows what the
# terms do, not what the paper's tables say.

# %%
import os
import sys

if os.path.basename(os.getcwd()) == "notebooks":        # the modules are a folder of files, not a package
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import collections
import json
import math
from pathlib import Path

import numpy as np

from experiments import plots
from experiments import tables

# %matplotlib inline

# %%
RESULTS = Path("results/toy")
TABLES, TUNING, READING = (json.loads((RESULTS / f"{name}.json").read_text())
                           for name in ("tables", "tuning", "reading"))
RUNS = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / "runs").glob("*.json"))}
DETECTORS = {"dino": "DINO", "deformable_detr": "Deformable DETR", "dab_detr": "DAB-DETR"}


def rows(table, detector):
    """{label: row} of one detector in one table; empty when it was not run."""
    return {row["method"]: row for row in TABLES.get(table, []) if row["detector"] == detector}


def gain(row, base, metric="AP"):
    """Of one row over another, paired by seed: {"mean", "low", "high"}."""
    return tables.gain(*(dict(zip(one["seeds"], one[metric])) for one in (row, base)))


def verdict(found):
    """A gain in words. Undecided: the interval holds 0, or there is none, with one seed."""
    if found is None or found["low"] is None:
        return "undecided, too few seeds" if found is None else f"{found['mean']:+.3f}: undecided, one seed"
    side = "more" if found["low"] > 0 else "less" if found["high"] < 0 else "undecided"
    return f"{tables.interval(found)}: {side}"


MAIN = {detector: rows("main", detector) for detector in DETECTORS}
print({name: f"{len(found)} rows" for name, found in TABLES.items()}, f"{len(RUNS)} runs")

# %% [markdown]
# ## How the tables were made
# **Claims.**
# - Every rival, and every piece of the memory part, is tuned by four trials, on images (`tune`) and with a seed that no
#   table uses. The tables are measured on `val`, 500 images that no choice about distillation was made on.
# - What stands in the main table is what tuning chose.
# - All students of a detector have the same teacher. So an interval is about seeds of the student, and not about
#   another teacher or another set of images.
#
# Not equal: before its tuning, CLoCKDistill had a search over 15 settings of its logit part (below), and it was tuned
# twice, with the scale mask S and without; the better one is "clockdistill". No rival had that.

# %%
tried = {detector: [trial for trial in TUNING if (trial["detector"], trial["what"]) in
                    ((detector, "with_scale"), (detector, "without_scale"))] for detector in DETECTORS}
for detector, trials in tried.items():
    student, distilled = MAIN[detector]["student"], MAIN[detector]["clockdistill"]
    best = max(trials, key=lambda one: one["AP"])
    print(f"{DETECTORS[detector]}: {RUNS[distilled['runs'][0]]['steps']} steps; seeds, student {student['seeds']}, "
          f"distilled {distilled['seeds']}; chosen {distilled['options']}")
    assert best["options"] == distilled["options"] and len(trials) == 8
    teacher = RUNS[MAIN[detector]["teacher"]["runs"][0]]
    assert {RUNS[name]["taught_by"] for name in distilled["runs"]} == {teacher["weights"]}
    assert all(RUNS[name]["settings"]["val_split"] == "val" for row in (student, distilled) for name in row["runs"])

tables_seeds = {seed for name, lines in TABLES.items() if name != "search" for row in lines for seed in row["seeds"]}
assert not tables_seeds & {one["seed"] for one in TUNING}
assert {len(trials) for _, trials in tables.TRIALS.values()} == {4}
for kind in ("commit", "machine"):
    for which in ("teacher", "student"):
        count = collections.Counter(run[kind] for run in RUNS.values() if run["role"] == which)
        print(f"{kind}, {which} runs:", "; ".join(f"{name} ({n})" for name, n in count.most_common()))

# %% [markdown]
# A `+` after a commit: a file was changed, if only a table, and not yet committed. DINO's teacher was trained
# elsewhere, before the runs wrote their commit down ("unknown").
#
# ## How to read a gain
# Seed 0 with a teacher is compared with seed 0 without: same initial student, same order of images. The gain of a
# table is the mean of these differences. Its 95 % interval is the mean, plus and minus *t s / sqrt(n)*, where *s* is
# the standard deviation of the n differences and *t* is Student's, because *s* itself is known badly from few seeds.
#
# **By hand.** Gains of .08, .10 and .12: mean .10, *s* = .02, *s* / sqrt(3) = .0115, *t* = 4.30, so .10 ± .05. From a
# normal distribution the factor would be 1.96 and the interval less than half as wide: too bold with three seeds.
#
# An interval without 0 says that the sign is settled, for this teacher and these images. An interval with 0 says
# *undecided*, not *no effect*. And of twenty such intervals one misses, however honest each of them is.

# %%
found = tables.gain({0: .38, 1: .40, 2: .42}, {0: .30, 1: .30, 2: .30})
print("by hand .10 ± .05; computed", tables.interval(found))
assert math.isclose(found["mean"], .10) and math.isclose(found["high"], .10 + 4.303 * .02 / math.sqrt(3), abs_tol=1e-4)
for n in (2, 3, 5, 10):
    spread = np.linspace(-1, 1, n)
    wide = tables.gain(dict(enumerate(spread / spread.std(ddof=1))), dict.fromkeys(range(n), 0.))
    print(f"{n:2} seeds: t = {wide['high'] * math.sqrt(n):5.2f}, interval ± {wide['high']:.2f} standard deviations")

# %% [markdown]
# ## The main gain
# **Claim.** Each of the three detectors gains. Every seed does, and the interval is clear of 0 for all three. DINO and
# Deformable DETR also gain with the scale mask, as the method is described, only less (with Deformable DETR that is
# just undecided). The student stays clearly below its teacher: distillation closes between a quarter and a half of the
# gap.

# %%
panels = {}
for detector, name in DETECTORS.items():
    teacher, student, distilled = (MAIN[detector][role] for role in ("teacher", "student", "clockdistill"))
    panels[name] = {"student": dict(zip(student["seeds"], student["AP"])), "teacher": teacher["AP"][0],
                    "distilled": dict(zip(distilled["seeds"], distilled["AP"]))}
    found, base = gain(distilled, student), panels[name]["student"]
    each = [score - base[seed] for seed, score in panels[name]["distilled"].items() if seed in base]
    closed = found["mean"] / (teacher["AP"][0] - np.mean(student["AP"]))
    masked = MAIN[detector].get("clockdistill with the scale mask")
    if masked:
        print(f"{name} without the scale mask - with it: {verdict(gain(distilled, masked))}")
        assert masked["gain"]["low"] > 0.01 and gain(distilled, masked)["mean"] > 0.01
    print(f"{name}: {verdict(found)}; seed by seed {', '.join(f'{one:+.3f}' for one in each)}; closes {closed:.0%} of "
          f"the gap to the teacher")
    assert found["low"] > 0.01 and min(each) > 0.01 and 0.2 < closed < 0.5
    assert max(distilled["AP"]) < teacher["AP"][0] - 0.05
plots.paired(panels, "AP on val", "Every seed gains (a grey line: the same seed, without and with a teacher)")

# %% [markdown]
# ## Sizes of objects, and how exact the boxes are
# COCO calls an object small below 32² pixels and large above 96². **A large one does not fit into the toy**: its whole
# image has fewer than 96² pixels. So APl does not exist, here or in any table of the toy. Most objects are small: AP
# follows APs closely.
#
# **Claim.** Small objects gain, with all three detectors. AP50 and AP75 rise too: the students find more, and place
# boxes better. APm comes from few objects and is noisy; look at its bars before believing its dots.

# %%
METRICS = {"AP": "AP", "APs": "APs: small objects", "APm": "APm: medium objects", "AP50": "AP50: IoU of .5 suffices",
           "AP75": "AP75: IoU of .75 needed"}
height, width = tables.SCALES["toy"].image_size
print(f"an image has {height * width} pixels; a large object, more than {96**2}")
assert height * width < 96**2 and all(one is None for row in TABLES["main"] for one in row["APl"])
found = {(name, metric): gain(MAIN[detector]["clockdistill"], MAIN[detector]["student"], metric)
         for detector, name in DETECTORS.items() for metric in METRICS}
for detector, name in DETECTORS.items():
    print(f"{name}: APm {verdict(found[name, 'APm'])}")
    student = MAIN[detector]["student"]
    assert abs(np.mean(student["AP"]) - np.mean(student["APs"])) < 0.03
    assert all(found[name, metric]["low"] > 0 for metric in ("APs", "AP50", "AP75"))
plots.gains([(name, METRICS[metric], one) for (name, metric), one in found.items()],
            "Small objects gain; so do AP50 and AP75")

# %% [markdown]
# **Is it AP75 that gains more, then?** The yardstick decides, so nothing is claimed. Relative to the student, AP75
# grows more, but it also starts lower. Relative to the gap to the teacher the two are closer, or it is the other way
# round.

# %%
for detector, name in DETECTORS.items():
    teacher, student = MAIN[detector]["teacher"], MAIN[detector]["student"]
    for metric in ("AP50", "AP75"):
        mean, base = found[name, metric]["mean"], np.mean(student[metric])
        print(f"{name} {metric}: {base:.3f} {mean:+.3f}, that is {mean / base:+.0%} of the student's and "
              f"{mean / (teacher[metric][0] - base):.0%} of the gap")

# %% [markdown]
# ## Does the logit part read the image?
# A target-aware query holds a content and the true box. The teacher's decoder is asked for the class: from the image's
# own memory, from another image's, and from noise. An answer that is as good from noise was in the question, and
# teaches nothing about the image. (200 images of `tune`, last decoder layer; teachers only, no student is involved.)
# The contents: `own`, the teacher's learned ones; `label`, its embedding of the true label, with or without wrong ones
# mixed in; `random_label`, a frozen random row for each class; `random`, the same random row for all; `zero`.
#
# **Claims.** DINO's label content (the embedding its denoising queries are trained with) holds the answer: it is right
# from noise far more often than any other content. The other contents need the image: from noise they are right about
# as often as a guess among three classes. (From another image's memory DINO is above a guess: perhaps sizes and usual
# places tell something.) DAB-DETR's teacher answers wrongly more often than not, even from the right memory: there the
# classes of the logit part have little to teach.

# %%
noise = {content: found["noise"] for content, found in READING["dino"].items()}
print("DINO, right from noise:", ", ".join(f"{content} {part:.2f}" for content, part in noise.items()))
labels = [content for content in noise if content.startswith("label")]
assert min(noise[one] for one in labels) > max(part for one, part in noise.items() if one not in labels) + 0.15
for detector, contents in READING.items():
    assert all(found["own"] > found["noise"] + 0.04 for found in contents.values()), detector
    assert all(found["noise"] < 0.45 for one, found in contents.items() if not one.startswith("label")), detector
assert max(found["own"] for found in READING["dab_detr"].values()) < 0.5
plots.reading({name: READING[detector] for detector, name in DETECTORS.items()},
              "Label content is right even from noise; the others need the image")

# %% [markdown]
# ## The search for the logit part's setting
# On a third of the steps, on `tune`, **with one seed**, 15 settings of the logit part were tried without the memory
# part. The best of each detector became its preset. These are choices, not results: a best of 15 is in part the
# luckiest of 15, and its lead shrinks when it is run again (the winner's curse).
#
# How much is luck? Take the seeds' standard deviation *s* from the main table's students. If all settings were equally
# good, the best of 15 would still lead their mean by 1.74 *s*, and two runs would differ by some 1.4 *s*.
#
# **Claim.** The settings spread by less than three times what seeds do, and for both detectors at least three others
# cannot be told from the winner (they are within two standard deviations of a difference). The ends of the picture may
# mean something; its order does not. Nor do the 15 agree independently that logits help: all are compared with one
# and the same run of the student, whose bad luck would lift them all. (*s* comes from longer runs on `val`. For a third
# of the steps it is a guess.)

# %%
search = {detector: rows("search", detector) for detector in DETECTORS if rows("search", detector)}
luck = np.random.default_rng(0).standard_normal((200_000, 15)).max(1).mean()
seeds_sd = {detector: math.sqrt(np.mean([np.var(MAIN[detector][role]["AP"], ddof=1)
                                         for role in ("student", "clockdistill")])) for detector in DETECTORS}
alone, panels = {}, {}
for detector, found in search.items():
    scores = {label: row["AP"][0] for label, row in found.items()}
    student, s = scores.pop("student"), seeds_sd[detector]
    alone[detector], best = scores, max(scores, key=scores.get)
    values = np.array(list(scores.values()))
    near = sum(values > scores[best] - 2 * math.sqrt(2) * s) - 1
    print(f"{DETECTORS[detector]}: '{best}' leads the mean of {len(values)} by {scores[best] - values.mean():.3f}, "
          f"luck alone gives {luck * s:.3f}; settings spread by {values.std(ddof=1):.3f}, seeds by {s:.3f}; {near} "
          f"others cannot be told from it; {sum(values > student)} are above the student, on average by "
          f"{values.mean() - student:.3f}")
    assert near >= 3 and values.std(ddof=1) < 3 * s
    panels[f"AP of {DETECTORS[detector]} on tune, one seed"] = {
        "": {label: {"student alone": student, "distilled": score} for label, score in scores.items()}}
pair = np.argsort(np.argsort([list(scores.values()) for scores in alone.values()], axis=1), axis=1)
print(f"do the two detectors agree? rank correlation of the {len(pair[0])} settings: {np.corrcoef(pair)[0, 1]:.2f} "
      "(above about .5 it is more than chance)")
plots.dots(panels, "15 settings of the logit part, alone: many cannot be told from the best")

# %% [markdown]
# ## The tuning of the scale mask and the two lambdas
# Four pairs of lambdas were tried for each detector with the scale mask S, and four without, again with one seed, on a
# third of the steps (DAB-DETR half; after a third its AP is still near 0). The logit part has the preset's
# setting.
#
# **Claims.** The best pair without S is above the best with it, for all three detectors: so all go without. Only with
# Deformable DETR is that plain to see: every pair without S is above every pair with it. With the other two the pairs
# overlap, and what decides may be luck. DINO's memory weight matters, a quarter of the best is too little; Deformable
# DETR's hardly does. Both have their best pair far above the best logit part alone.

# %%
blocks = {}
for detector, trials in tried.items():
    found = rows("search", detector)
    lines = {"student alone": {"student alone": found["student"]["AP"][0]},
             "logit part alone, best of 15": {"the logit part": max(alone[detector].values())}} if found else {}
    scores = {"with S": [], "without S": []}
    for one in trials:
        label = "lambda_mem = {lambda_mem:g}, lambda_log = {lambda_log:g}".format(**one["options"])
        mask = "without S" if one["options"].get("scale") is False else "with S"
        lines[label] = {mask: one["AP"]}
        scores[mask].append(one["AP"])
    blocks[DETECTORS[detector]] = lines
    for mask, some in scores.items():
        print(f"{DETECTORS[detector]} {mask}: {min(some):.3f} to {max(some):.3f}; seeds of the main table spread by "
              f"{seeds_sd[detector]:.3f}")
    assert max(scores["without S"]) > max(scores["with S"])
    apart = min(scores["without S"]) > max(scores["with S"])
    assert apart == (detector == "deformable_detr")
    assert detector == "dab_detr" or max(scores["without S"]) > max(alone[detector].values()) + 0.03
plots.dots({"AP on tune, one seed": blocks},
           "The scale mask S and the lambdas: Deformable DETR is better without S, the others perhaps")


# %% [markdown]
# ## Rivals
# Eight other ways to distil, each tuned by four trials, on half the steps with Deformable DETR. Drawn is each one's
# gain over the student. Printed is CLoCKDistill's AP minus the rival's, paired by seed: *more* is in CLoCKDistill's
# favour, *less* in the rival's. Remember that one interval in twenty misses. Two things are not equal here.
# CLoCKDistill had the search, and its scale mask was tuned away. And most rivals were made for other students and
# larger scales: this table is about the toy.
#
# **Claims.** CLoCKDistill has the highest AP of all rows. It beats the five rivals that teach the decoder (Hinton, GKD,
# KD-DETR, DETRDistill, D3ETR). **Of two that copy the memory in another way this is not settled**: FitNets, a plain
# squared error, and FGD are behind on average, but their intervals hold 0. **With the scale mask** as the method is
# described, tuned by as many trials, CLoCKDistill is clearly worse, and behind FitNets, FGD and MGD on average.

# %%
def history(row):
    """{step: {seed: AP}} of a row's runs."""
    points = {}
    for seed, name in zip(row["seeds"], row["runs"]):
        for one in RUNS[name]["history"]:
            points.setdefault(one["step"], {})[seed] = one["AP"]
    return points


def missing(table, lengths=1):
    """Is a table not there yet? Says how to make it. lengths: of the schedule, how many it needs."""
    absent = len({row["steps"] for row in TABLES.get(table, [])}) < lengths
    if absent:
        print(f"not run yet: python train.py table toy --only {table}")
    return absent


def against(found, pairs):
    """Print the paired gain of one row over another, for each (row, base) of labels that were both run."""
    for label, base in pairs:
        if label in found and base in found:
            print(f"  {label} - {base}: {verdict(gain(found[label], found[base]))}")


def drawn(table):
    found = [(DETECTORS[row["detector"]], row["method"], row["gain"]) for row in TABLES[table] if row["gain"]]
    return plots.gains(found, f"{tables.TITLES[table]} (half the steps)")


# %%
figure = None
if not missing("rivals"):
    for detector in filter(lambda one: rows("rivals", one), DETECTORS):
        found = rows("rivals", detector)
        print(DETECTORS[detector])
        others = [*tables.RIVALS, *(label for label in found if label.startswith("clockdistill "))]
        against(found, [("clockdistill", other) for other in others])
        ahead = {other: gain(found["clockdistill"], found[other]) for other in others}
        assert all(found[name]["gain"]["low"] > 0 for name in ("clockdistill", "fitnets", "fgd", "mgd"))
        assert all(ahead[name]["low"] > 0 for name in ("hinton", "gkd", "kd_detr", "detrdistill", "d3etr"))
        assert all(ahead[name]["mean"] > 0 > ahead[name]["low"] for name in ("fitnets", "fgd"))
        assert ahead["clockdistill with the scale mask"]["low"] > 0
        assert all(np.mean(found["clockdistill with the scale mask"]["AP"]) < np.mean(found[name]["AP"])
                   for name in ("fitnets", "fgd", "mgd"))
    figure = drawn("rivals")
figure

# %% [markdown]
# ## Ablation
# The memory part is put together mask by mask; each piece is tuned by itself, since a mask changes the size of the
# sum. The logit part is taken apart without the memory part: which queries, which content, how many groups. The
# printed pairs are the questions that the method's two ideas pose: do the masks earn their place, do target-aware
# queries beat others, does each part add to the other? (Of DINO only the two parts, with the weights chosen for both.)
#
# **Claims.**
# - **The memory part does it.** Alone it gains with both detectors, as much as both parts together: what the logit part
#   adds to it is undecided, on average next to nothing.
# - The logit part alone gains with Deformable DETR; with DINO, which has denoising queries, this is undecided.
# - With Deformable DETR **the scale mask S costs AP**: both parts together are better without it (the memory part alone
#   too, but there it is undecided). What the location mask is worth against a plain copy is not decided here: of the
#   toy's cells more than a third lie on objects.
# - With Deformable DETR target-aware queries alone teach less than random ones do: its teacher was never trained to
#   answer them (notebook 2).

# %%
CHOSEN, MEMORY, BOTH = "the logit part, as chosen", "+ location mask", "both parts: clockdistill"
PART, MASKED, BOTH_MASKED = "the memory part, as chosen", "+ scale mask", "both parts: clockdistill with the scale mask"
figure = None
if not missing("ablation"):
    for detector in filter(lambda one: rows("ablation", one), DETECTORS):
        found = rows("ablation", detector)
        target = "logits on target-aware queries alone"          # where that is the chosen setting, it has no own row
        target = target if target in found else CHOSEN
        print(DETECTORS[detector])
        against(found, [(MEMORY, "memory, every token alike"), (MASKED, MEMORY), (MASKED, "memory, every token alike"),
                        (target, "logits on random fixed queries"), (target, "logits on the teacher's learned queries"),
                        (CHOSEN, "none"), (MEMORY, CHOSEN), (PART, CHOSEN), (BOTH, MEMORY), (BOTH, PART),
                        (BOTH, CHOSEN), (BOTH_MASKED, BOTH)])
        memory = found.get(PART, found.get(MEMORY))
        assert memory["gain"]["low"] > 0 and abs(gain(found[BOTH], memory)["mean"]) < 0.015
        assert gain(found[BOTH], memory)["low"] < 0 < gain(found[BOTH], memory)["high"]
        assert (found[CHOSEN]["gain"]["low"] > 0) == (detector != "dino")
    found = rows("ablation", "deformable_detr")
    assert gain(found[MASKED], found[MEMORY])["mean"] < -0.01 and gain(found[BOTH_MASKED], found[BOTH])["high"] < 0
    assert gain(found["logits on target-aware queries alone"], found["logits on random fixed queries"])["high"] < 0
    figure = drawn("ablation")
figure

# %% [markdown]
# ## Sensitivity
# One setting of Deformable DETR's is changed at a time, the rest stays as chosen. A flat line means that the setting
# needs no care here. Printed is each value's AP minus the chosen one's, paired by seed.
#
# **Claim.** Within a factor of four, nothing changes much. Nor does the background's weight, from nothing (1 : 0) to
# that of the objects (1 : 1), which is a plain copy.

# %%
figure = None
if not missing("sensitivity"):
    for detector in filter(lambda one: rows("sensitivity", one), DETECTORS):
        found = rows("sensitivity", detector)
        panels = tables.panels(found.values())
        chosen = found.get("lambda_mem chosen", {}).get("options")
        against(found, [(label, "lambda_mem chosen") for label, row in found.items()
                        if label != "student" and row["options"] != chosen])
        level = np.mean(found["lambda_mem chosen"]["AP"])
        assert all(abs(np.mean(row["AP"]) - level) < 0.03 for label, row in found.items() if label != "student")
        figure = plots.sensitivity(panels, found["student"]["AP"],
                                   f"{DETECTORS[detector]}: AP of the distilled student, one setting at a time")
figure


# %% [markdown]
# ## Learning curves: the ceiling, or only the speed?
# **Claims.** With DINO and Deformable DETR the gain is there, clear of 0, at every evaluation. With DAB-DETR it is
# there in the second half; before that both have an AP near 0. The distilled student reaches the student's last AP
# after about half of the steps. In minutes less is saved, or nothing: a step with a teacher costs more.
#
# What the curves cannot say: that the gain would last in a longer training. The learning rate falls to 0 along a
# cosine, so every curve flattens at its end, whatever its ceiling. And a point halfway is not what a run of half the
# length ends with. That is what the table below this one is for.

# %%
panels = {}
for detector, name in DETECTORS.items():
    student, distilled = MAIN[detector]["student"], MAIN[detector]["clockdistill"]
    plain, taught = history(student), history(distilled)
    last = max(taught)
    at = {step: tables.gain(seeds, plain[step]) for step, seeds in taught.items()}
    panels[name] = {role: {step: list(seeds.values()) for step, seeds in found.items()}
                    for role, found in (("student", plain), ("distilled", taught))}
    panels[name] |= {"teacher": MAIN[detector]["teacher"]["AP"][0], "gain": at}
    print(f"{name}:", "; ".join(f"step {step}, {verdict(found)}" for step, found in at.items()))
    from_step = 1 if detector != "dab_detr" else last / 2 + 1
    assert all(found["low"] > 0 for step, found in at.items() if step >= from_step)

    goal = np.mean(panels[name]["student"][last])
    steps, scores = [0, *taught], [0, *map(np.mean, panels[name]["distilled"].values())]
    needed = np.interp(goal, scores, steps) / last              # between two evaluations, along a straight line
    dearer = np.median(distilled["minutes"]) / np.median(student["minutes"])
    print(f"  reaches the student's last AP at {needed:.0%} of the steps; a run takes {dearer:.2f} times as long "
          f"(medians, on a shared machine), so that is {needed * dearer:.0%} of the student's minutes")
    assert needed < 0.6
plots.curves_and_gains(panels, "AP on val",
                       "The gain comes early with DINO and Deformable DETR, in the second half with DAB-DETR")

# %% [markdown]
# ## A longer schedule
# Runs of half, once and twice the recipe's steps, each with its own cosine. If distillation only made learning faster,
# the gain would shrink towards 0 with more steps, and a student alone with twice the steps would catch up with the
# distilled one. *More* in the lines with a minus says that it did not.
#
# **Claims.** Distilled is better at each length, on average by about as much (at twice the steps three seeds do not
# settle it). But the student alone with twice the steps is on average above the distilled one with the single, and
# costs about the same time. All are far from converged: whether distillation raises the ceiling is not shown.

# %%
figure = None
if not missing("schedule", lengths=2):
    found = rows("schedule", "deformable_detr")
    for label, row in found.items():
        if row["gain"]:
            print(f"{label}: {verdict(row['gain'])}")
    names = "distilled, {} x the steps", "student, {} x the steps"
    against(found, [(names[0].format(a), names[1].format(b)) for a, b in (("0.5", 1), (1, 2))])
    mean = {label: np.mean(row["AP"]) for label, row in found.items()}
    assert all(mean[names[0].format(x)] > mean[names[1].format(x)] for x in ("0.5", 1, 2))
    assert mean["student, 2 x the steps"] > mean["distilled, 1 x the steps"] + 0.01
    figure = plots.curves(tables.final_scores(TABLES["schedule"], RUNS), "AP on val",
                          "Deformable DETR: each point a finished run")
figure

# %% [markdown]
# ## What does not work, or is not known
# - **Below the teacher.** More than half of the gap stays open. And the toy's students are trained from nothing, for
#   minutes: one that starts from pretrained weights may have less to gain.
# - **Not free.** The same number of steps takes longer with a teacher, see above. Where minutes are what is scarce,
#   compare at equal minutes.
# - **DAB-DETR** gains, but weakly founded: it was tuned where its AP is some .05, its teacher barely reads the
#   target-aware queries, its student is far from converged. Its gain may be speed more than ceiling.
# - **The scale mask** of the memory part costs AP, on the toy with Deformable DETR and DINO. It gives each of the three
#   levels the same weight; at the coarsest, of 10 cells, all objects are neighbours. On large images that may be
#   different.
# - **The logit part** adds nothing that can be seen to the memory part, neither with Deformable DETR, whose teacher was
#   not trained to answer about true boxes, nor with DINO, whose teacher was.
# - **Against rivals**: that CLoCKDistill beats a plain copy of the memory is not settled.
# - **Training twice as long** gains about as much as distillation does: what is more is undecided.
# - **Medium objects** are few. Where the printed verdict on APm says *undecided*, a gain there must not be claimed.
# - **One teacher for each detector, one set of images.** Intervals are over seeds of the student alone.

# %%
for detector, name in DETECTORS.items():
    teacher, student, distilled = (MAIN[detector][role] for role in ("teacher", "student", "clockdistill"))
    gap = teacher["AP"][0] - np.mean(student["AP"])
    print(f"{name}: {1 - gain(distilled, student)['mean'] / gap:.0%} of the gap to the teacher stays open; APm "
          f"{verdict(gain(distilled, student, 'APm'))}")
    assert gain(distilled, student)["mean"] < gap / 2
print("no rows yet:", ", ".join(name for name in tables.TABLES if name not in TABLES) or "(every table has some)")
