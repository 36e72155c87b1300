"""A teacher, a student alone, and the same student distilled, on the toy KITTI.

Ends with a table, and with pictures in runs/demo. The two students train side by side, each with
half of the threads. Every run goes on where it was cut off, and is not repeated once it is done.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import checkpoints
import data
import models
import train
from checkpoints import write_json
from clockdistill import location_mask, memory_weights
from experiments import bench, plots
from train import say

SCALES = {
    "full": dict(out="runs/demo", root="datasets/toy", counts=dict(train=4000, val=500, tune=500),
                 length={}, eval_every=400),
    "quick": dict(out="runs/demo-quick", root="datasets/toy-quick",
                  counts=dict(train=80, val=20, tune=4), length=dict(steps=20, warmup=5),
                  eval_every=10),
}


def add_options(parser):
    """The options of `train.py demo`."""
    parser.add_argument("--scale", choices=SCALES, default="full",
                        help="quick: under 3 minutes, figures without meaning")
    parser.add_argument("--teacher", choices=("shipped", "scratch"), default="shipped",
                        help="its weights, or train it here")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")


def run(scale, teacher, device, seed=0):
    """From nothing to a distilled student: data, three models, table, pictures."""
    plan = SCALES[scale]
    device = train.pick_device(device)
    out = Path(plan["out"])
    if scale == "quick":
        say("SCALE=quick shows that everything runs. Its figures mean nothing: far too few images "
            "and steps.")
    data.make_toy(plan["root"], counts=plan["counts"])
    dataset = data.build("toy", plan["root"], "val")

    # The teacher first: the distilled student's folder is named after its weights.
    if teacher == "scratch":
        job = make_job("teacher", plan, seed, device)
        results = train_all({"teacher": job}, device)
        source = job.folder
    else:
        source = Path(os.path.relpath(train.SHIPPED_TEACHERS["dino"]))
        say(f"\n=== teacher: shipped weights, weights/{source.name}; "
            "make demo TEACHER=scratch trains it ===")
        results = {"teacher": shipped_teacher(source, dataset, device)}

    # The students need nothing from each other.
    taught = {"teacher": str(source), "taught_by": results["teacher"]["weights"]}
    if scale == "quick":
        taught["teacher_floor"] = 0.0
    students = {"student": make_job("student", plan, seed, device),
                "distilled": make_job("distilled", plan, seed, device, **taught)}
    results |= train_all(students, device)

    # Speed is measured when nothing else runs, all three in turn.
    folders = {"teacher": source} | {name: job.folder for name, job in students.items()}
    networks = {name: train.load_model(folder)[0].to(device) for name, folder in folders.items()}
    rates = bench.images_per_second(networks, dataset[0][0][None].to(device))
    for name, result in results.items():
        result["images_per_second"] = rates[name]
        result.setdefault("trained_minutes", result["minutes"])
    where = train.machine(device)
    write_json(out / "summary.json",
               results | {"machine": where, "commit": train.commit(), "scale": scale})
    draw(out, folders["distilled"], networks, results, dataset, device)
    print_table(results, scale, where)


# ----------------------------------------------------------------------------------------------
# Runs, each in a process of its own
# ----------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """A command of train.py."""
    folder: Path                       # where it writes
    words: list
    steps: int = 0


def make_job(name, plan, seed, device, taught_by=None, **given):
    """The run `name`: "teacher", "student", or "distilled" by a teacher of this fingerprint."""
    command = "distill" if name == "distilled" else "fit"
    recipe = "toy-teacher" if name == "teacher" else "toy-student"
    given |= plan["length"] | dict(recipe=recipe, detector="dino", root=plan["root"], seed=seed)
    cfg, _ = train.configure(command, **given)
    folder = Path(plan["out"], f"{name}-{train.digest(cfg, taught_by)}")
    given |= dict(out=folder, device=device.type, workers=1, eval_every=plan["eval_every"],
                  eval_batch=20, save_minutes=0.5)
    # Where nothing was begun, there is nothing to resume.
    given["resume"] = folder.exists()
    return Job(folder, [command, *as_words(given)], cfg.steps)


def as_words(given):
    """{option: value} -> words of a command line."""
    words = []
    for name, value in given.items():
        word = train.flag(name)
        if value is True or value is False:
            words.append(word if value else word.replace("--", "--no-"))
        else:
            words += [word, *map(str, value if isinstance(value, list) else [value])]
    return words


def train_all(jobs, device):
    """Run the jobs that are not done -> {name: result}.

    Side by side with a share of the threads each; one after the other on one thread or a GPU.
    The first job that fails stops the others.
    """
    missing = {name: job for name, job in jobs.items() if not (job.folder / "result.json").exists()}
    threads = torch.get_num_threads()
    at_once = 1 if threads == 1 or device.type != "cpu" else max(1, len(missing))
    if missing:
        say(f"\n=== {' | '.join(missing)} ===")
    views = [View(name, job) for name, job in missing.items()]

    def ended(name, error):
        if error:
            raise ValueError(error)

    try:
        side_by_side(missing, at_once, threads // at_once, ended, views)
    finally:
        for view in views:
            view.close()
    results = {}
    for name, job in jobs.items():
        results[name] = json.loads((job.folder / "result.json").read_text())
        before = "" if name in missing else "done before, "
        say(f"{name}: {before}AP {results[name]['AP']:.3f}")
    return results


class View:
    """A job on the screen: what it says is printed after its name, its steps are a bar."""
    def __init__(self, name, job):
        self.name = f"{name:<10} "
        self.said = 0
        self.output = job.folder / "output.txt"
        self.log = job.folder / "log.jsonl"
        self.output.unlink(missing_ok=True)                  # of an earlier sitting
        self.bar = tqdm(total=job.steps, desc=self.name, dynamic_ncols=True,
                        mininterval=train.quiet_interval())

    def update(self):
        """Print what was said, and move the bar to the last step logged, since the last look."""
        if self.log.exists():
            self.bar.update(self.log.read_text().count("\n") - self.bar.n)
        if self.output.exists():
            lines = self.output.read_text().splitlines()
            for line in lines[self.said:]:
                say(self.name + line)
            self.said = len(lines)

    def close(self):
        self.update()
        self.bar.close()


def side_by_side(jobs, at_once, threads, ended, views=()):
    """Run jobs, `at_once` at a time with `threads` threads each.

    jobs: {name: Job}.  ended(name, error): called after each; error is None, or one line.
    views: kept up to date meanwhile.
    Ctrl-C, or an exception of `ended`, stops all: each saves the step in hand and ends.
    Raises train.Interrupted.
    """
    waiting = list(jobs)
    running = {}
    with train.finish_step_on_signal() as asked_to_stop:
        try:
            while (waiting or running) and not asked_to_stop:
                while waiting and len(running) < at_once:
                    name = waiting.pop(0)
                    # It may have ended in an earlier sitting, or in another process meanwhile.
                    if (jobs[name].folder / "result.json").exists():
                        ended(name, None)
                    else:
                        say(f"{time.strftime('%H:%M')}  {jobs[name].folder}")
                        running[name] = start(jobs[name], threads)
                time.sleep(0.2)
                for view in views:
                    view.update()
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        ended(name, error_of(name, jobs[name], process.returncode))
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    if asked_to_stop:
        raise train.Interrupted("stopped, after a finished step")


def start(job, threads):
    """Start a job: what it says goes to FOLDER/output.txt, its bar and errors to errors.txt.

    A session of its own keeps Ctrl-C from it: it is asked to stop once, by terminate(), since being
    asked twice would stop it within a step.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (open(job.folder / "output.txt", "w") as output,
          open(job.folder / "errors.txt", "w") as errors):
        return subprocess.Popen([sys.executable, str(train.HERE / "train.py"), *job.words],
                                env=environment, stdout=output, stderr=errors,
                                start_new_session=True)


def error_of(name, job, code):
    """The last line of a job's errors, or None where its exit code is 0."""
    if code == 0:
        return None
    file = job.folder / "errors.txt"
    lines = ["no message", *filter(str.strip, file.read_text().splitlines())]
    return f"{name} (exit code {code}, {file}): {lines[-1].removeprefix('error: ')}"


def shipped_teacher(path, dataset, device):
    """A teacher that comes with the repository, measured now -> what `fit` returns of a run.

    dataset: the images that it is measured on.
    """
    model, payload = train.load_model(path)
    model = model.to(device)
    train.same_classes(payload, dataset, path)
    scores = data.evaluate(train.detect(model, dataset, train.Run(), 20), dataset)
    say(f"AP {scores['AP']:.3f}")
    kept = {key: payload[key] for key in ("seed", "machine", "commit", "settings")}
    return {**scores, **kept, "params": train.count_parameters(model),
            "gflops": models.gflops(model, *dataset[0][0].shape[1:]), "minutes": 0.0,
            "trained_minutes": payload["minutes"], "steps": payload["step"], "history": [],
            "images_per_second": train.speed_of(model, dataset),
            "weights": train.fingerprint(model)}


def print_table(results, scale, where):
    """The three models' figures, a line each, and the gain."""
    head = "{:12}" + "{:>16}" * 7
    row = ("{name:12}{AP:16.3f}{AP50:16.3f}{AP75:16.3f}{millions:16.2f}{gflops:16.3f}"
           "{trained_minutes:16.1f}{images_per_second:16.0f}")
    print("\n" + head.format("", "AP", "AP50", "AP75", "params (M)", "GFLOPs", "training (min)",
                             "images/s"))
    for name, result in results.items():
        print(row.format(name=name, millions=result["params"] / 1e6, **result))
    gain = results["distilled"]["AP"] - results["student"]["AP"]
    caution = "figures of SCALE=quick mean nothing." if scale == "quick" else "one seed."
    print(f"\nCLoCKDistill: {gain:+.3f} AP for the same student, seed and number of steps; "
          f"{caution}\nimages/s: one image at a time, {where}; training minutes include evaluation")


# ----------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------

def draw(out, distilled, networks, results, dataset, device):
    """The demo's pictures, OUT/*.png.

    distilled: folder of that run.  networks: {name: detector} of all.  dataset: the split "val".
    """
    # The first validation scenes with four or more objects: chosen before looking.
    shown = [i for i in range(len(dataset)) if len(dataset[i][1]["labels"]) >= 4][:4] or [0]
    batch = data.collate([dataset[i] for i in shown]).to(device)
    images, truths = zip(*(dataset.raw(i) for i in shown))
    answers = {name: train.answer(network, batch) for name, network in networks.items()}

    # The method as this student had it.
    saved = checkpoints.load(distilled / "last.pt")
    cfg = train.Config(**saved["settings"])
    method = train.open_method(cfg, networks["teacher"], networks["distilled"])
    method.load_state_dict(saved["resume"]["method"])

    # What its memory loss weighs in the first scene.
    scene = data.collate([dataset[shown[0]]]).to(device)
    with torch.no_grad():
        memory = networks["teacher"].encode(scene.images, scene.padding)
    masks = [location_mask(scene.boxes[0], height, width) for height, width in memory.shapes]
    inside, _ = masks[0]                                                    # of the finest level
    weight = memory_weights(scene.boxes, memory.shapes, ~memory.padding, **method.memory_options)
    weight = weight[0, :inside.numel()].view_as(inside)

    pictures = {
        "detections": plots.detections(images, truths, answers, dataset.classes),
        "location_masks": plots.location_masks(images[0], truths[0]["boxes"], masks),
        "query_attention": query_attention(scene, images[0], truths[0], networks, method,
                                           dataset.classes),
        "ap_curves": plots.curves(
            {name: [(point["step"], point["AP"]) for point in result["history"]] or result["AP"]
             for name, result in results.items()}, "AP on the toy's val split"),
        "losses": losses(distilled / "log.jsonl"),
        "first": plots.first(images[0], truths[0], (inside, weight), answers["student"][0],
                             answers["distilled"][0], dataset.classes),
    }
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    say(f"pictures   {', '.join(f'{name}.png' for name in pictures)} in {out}/")


def query_attention(scene, picture, truth, networks, method, classes):
    """Where the three largest objects' target-aware queries look in each model.

    scene: the batch of one image.  picture, truth: the same image as it is drawn, its objects.
    """
    teacher = networks["teacher"]
    boxes = scene.boxes[0]
    queries = models.Queries(*method.queries(
        scene.labels, scene.boxes, train.asked_with(teacher, method.content), box_noise=0.))
    largest = boxes[:, 2:].prod(1).argsort(descending=True)[:3].cpu()
    first_group = largest * method.query_options["groups"]
    attention = {}
    for name, network in networks.items():
        content = queries.content
        if name != "teacher":
            content = method.student_content(content)
        with torch.no_grad(), models.record(network) as seen:
            memory = network.encode(scene.images, scene.padding)
            network.decode(memory, content, queries.boxes, queries.attend)
        final = seen[f"decoder.{network.decoder_layers - 1}.cross"]
        attention[name] = plots.look(final, memory.shapes, first_group)
        attention[name]["boxes"] = truth["boxes"][largest]
    return plots.query_attention(
        picture, attention, [classes[label] for label in scene.labels[0][largest]],
        memory.shapes[0], title="Where the same target-aware queries look in each model, and how "
        "far they agree with the teacher")


def losses(log):
    """The curves of each loss of a run's log.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    other = ("step", "loss", "grad_norm", "lr", "images", "seconds", "report")
    return plots.losses([line["step"] for line in lines],
                        {name: [line.get(name, 0.) for line in lines]
                         for name in lines[-1] if name not in other})
