"""A teacher, a student alone, and the same student distilled, on the toy KITTI.

Ends with a table, and with pictures in runs/demo. The two students train side by side, each with
half of the threads. Every run goes on where it was cut off, and is not repeated once it is done.
"""
import json
import os
import subprocess
import sys
import tempfile
import threading
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
                 student={}, teacher={}, eval_every=400),
    "quick": dict(out="runs/demo-quick", root="datasets/toy-quick",
                  counts=dict(train=80, val=20, tune=4), student=dict(steps=20, warmup=5),
                  teacher=dict(steps=20, warmup=5), eval_every=10),
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
    plan, device = SCALES[scale], train.pick_device(device)
    out = Path(plan["out"])
    if scale == "quick":
        say("SCALE=quick shows that everything runs. Its figures mean nothing: far too few images "
            "and steps.")
    data.make_toy(plan["root"], counts=plan["counts"])
    dataset = data.build("toy", plan["root"], "val")

    # The teacher first: the distilled student's folder is named after its weights.
    if teacher == "scratch":
        job = make_job("teacher", plan, seed, device)
        results, source = train_all({"teacher": job}, device), job.folder
    else:
        source = Path(os.path.relpath(train.SHIPPED_TEACHERS["dino"]))
        say(f"\n=== teacher: shipped weights, weights/{source.name}; "
            "make demo TEACHER=scratch trains it ===")
        results = {"teacher": shipped_teacher(source, dataset, device)}
    taught_by = train.fingerprint(train.load_model(source)[0])
    # The students need nothing from each other.
    floor = {"teacher_floor": 0.0} if scale == "quick" else {}
    students = {"student": make_job("student", plan, seed, device),
                "distilled": make_job("distilled", plan, seed, device, taught_by,
                                      teacher=str(source), **floor)}
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
    steps: int
    words: list


def make_job(name, plan, seed, device, taught_by=None, **given):
    """The run `name`: "teacher", "student", or "distilled" by a teacher of this fingerprint."""
    role = "teacher" if name == "teacher" else "student"
    command = "distill" if name == "distilled" else "fit"
    given |= plan[role] | dict(recipe=f"toy-{role}", detector="dino", root=plan["root"], seed=seed)
    cfg, _ = train.configure(command, **given)
    folder = Path(plan["out"], f"{name}-{train.digest(cfg, taught_by)}")
    given |= dict(out=folder, device=device.type, workers=1, eval_every=plan["eval_every"],
                  eval_batch=20, save_minutes=0.5)
    words = [f"--{option.replace('_', '-')}={value}" for option, value in given.items()]
    # Where nothing was begun, there is nothing to resume.
    return Job(folder, cfg.steps, [command, *["--resume"] * folder.exists(), *words])


def train_all(jobs, device):
    """Run the jobs that are not done -> {name: result}.

    Side by side with a share of the threads each; one after the other on one thread or a GPU.
    """
    missing = {name: job for name, job in jobs.items() if not (job.folder / "result.json").exists()}
    together, threads = [missing], torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        together = [{name: job} for name, job in missing.items()]
    for group in filter(None, together):
        say(f"\n=== {' | '.join(group)} ===")
        side_by_side(group, max(1, threads // len(group)))
    results = {}
    for name, job in jobs.items():
        results[name] = json.loads((job.folder / "result.json").read_text())
        before = "" if name in missing else "done before, "
        say(f"{name}: {before}AP {results[name]['AP']:.3f}")
    return results


def side_by_side(jobs, threads):
    """Run all jobs at once, `threads` threads each.

    The first job that fails stops the others, as Ctrl-C does: each saves the step in hand and ends.
    Raises ValueError with the last line of the job that failed, or train.Interrupted.
    """
    with train.finish_step_on_signal() as asked_to_stop:
        children = [Child(name, job, threads, row) for row, (name, job) in enumerate(jobs.items())]
        codes = [None]
        while None in codes and not any(codes) and not asked_to_stop:
            time.sleep(0.2)
            codes = [child.poll() for child in children]
        for child in children:
            child.process.terminate()                    # does nothing to a process that has ended
        lines = [child.end() for child in children]
    for name, code, line in zip(jobs, codes, lines):
        if code:
            raise ValueError(f"{name} (exit code {code}): {line.removeprefix('error: ')}")
    if asked_to_stop:
        raise train.Interrupted("stopped, after a finished step")


class Child:
    """A job in a process of its own: what it says is printed after its name, its steps are a bar.

    A session of its own keeps Ctrl-C from it: it is asked to stop once, by terminate(), since being
    asked twice would stop it within a step.
    """
    def __init__(self, name, job, threads, row):
        self.name, self.log = f"{name:<10} ", job.folder / "log.jsonl"
        self.bar = tqdm(total=job.steps, desc=self.name, position=row, dynamic_ncols=True,
                        mininterval=train.quiet_interval())
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(train.HERE / "train.py"), *job.words], start_new_session=True,
            stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"})
        self.printer = threading.Thread(target=self.print_lines, daemon=True)
        self.printer.start()

    def print_lines(self):
        for line in self.process.stdout:
            say(self.name + line.rstrip())

    def poll(self):
        """Move the bar to the last step logged -> exit code, or None while the process runs."""
        if self.log.exists():
            self.bar.update(self.log.read_text().count("\n") - self.bar.n)
        return self.process.poll()

    def end(self):
        """Wait for the end of the process -> the last line of its errors."""
        self.process.wait()
        self.printer.join()
        self.bar.close()
        self.errors.seek(0)
        return ["no message", *filter(str.strip, self.errors.read().splitlines())][-1]


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
    columns = (("AP", "AP", "{:.3f}"), ("AP50", "AP50", "{:.3f}"), ("AP75", "AP75", "{:.3f}"),
               ("params", "params (M)", "{:.2f}"), ("gflops", "GFLOPs", "{:.3f}"),
               ("trained_minutes", "training (min)", "{:.1f}"),
               ("images_per_second", "images/s", "{:.0f}"))
    print("\n" + f"{'':12}" + "".join(f"{title:>16}" for _, title, _ in columns))
    for name, result in results.items():
        cells = [form.format(result[key] / (1e6 if key == "params" else 1))
                 for key, _, form in columns]
        print(f"{name:12}" + "".join(f"{cell:>16}" for cell in cells))
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

    # What the memory loss weighs in the first scene, as this student had it.
    one, nothing, boxes = batch.images[:1], torch.zeros_like(batch.padding[:1]), batch.boxes[0]
    with torch.no_grad():
        memory = networks["teacher"].encode(one, nothing)
    masks = [location_mask(boxes, height, width) for height, width in memory.shapes]
    saved = checkpoints.load(distilled / "last.pt")
    cfg = train.Config(**saved["settings"])
    method = train.open_method(cfg, networks["teacher"], networks["distilled"])
    method.load_state_dict(saved["resume"]["method"])
    inside, _ = masks[0]                                                    # of the finest level
    everywhere = torch.ones_like(memory.tokens[..., 0], dtype=torch.bool)   # nothing is padded
    weight = memory_weights([boxes], memory.shapes, everywhere, **method.memory_options)
    weight = weight[0, :inside.numel()].view_as(inside)

    pictures = {
        "detections": plots.detections(images, truths, answers, dataset.classes, min_score=0.3),
        "location_masks": plots.location_masks(images[0], truths[0]["boxes"], masks),
        "query_attention": query_attention(one, nothing, batch, images, truths, networks, method,
                                           dataset),
        "ap_curves": plots.curves(
            {name: [(point["step"], point["AP"]) for point in result["history"]] or result["AP"]
             for name, result in results.items()}, "AP on the toy's val split"),
        "losses": losses(distilled / "log.jsonl"),
        "first": plots.first(images[0], truths[0], (inside, weight), answers["student"][0],
                             answers["distilled"][0], dataset.classes, min_score=0.3),
    }
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    say(f"pictures   {', '.join(f'{name}.png' for name in pictures)} in {out}/")


def query_attention(one, nothing, batch, images, truths, networks, method, dataset):
    """Where the three largest objects' target-aware queries look in each model."""
    labels, boxes, teacher = batch.labels[0], batch.boxes[0], networks["teacher"]
    contents = {"label": teacher.label_embedding, "own": teacher.learned_content}
    embedding = contents.get(method.content)
    queries = models.Queries(*method.queries([labels], [boxes], embedding, box_noise=0.))
    largest = boxes[:, 2:].prod(1).argsort(descending=True)[:3].cpu()
    first_group = largest * method.query_options["groups"]
    attention = {}
    for name, network in networks.items():
        content = queries.content
        if name != "teacher":
            content = method.student_content(content)
        with torch.no_grad(), models.record(network) as seen:
            memory = network.encode(one, nothing)
            network.decode(memory, content, queries.boxes, queries.attend)
        final = seen[f"decoder.{network.decoder_layers - 1}.cross"]
        attention[name] = plots.look(final, memory.shapes, first_group)
        attention[name]["boxes"] = truths[0]["boxes"][largest]
    return plots.query_attention(
        images[0], attention, [dataset.classes[label] for label in labels[largest]],
        memory.shapes[0], title="Where the same target-aware queries look in each model, and how "
        "far they agree with the teacher")


def losses(log):
    """The curves of each loss of a run's log.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    other = ("step", "loss", "grad_norm", "lr", "images", "seconds", "report")
    return plots.losses({name: [(line["step"], line[name]) for line in lines if name in line]
                         for name in lines[-1] if name not in other})
