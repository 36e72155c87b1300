"""A teacher, a student alone, and the same student distilled, on the toy KITTI.

Ends with a table, and with pictures in runs/demo. Every stage goes on where it was cut off, and is not
repeated once it is done.
"""
import json
import os
from pathlib import Path

import torch

import checkpoints
import data
import models
import train
from checkpoints import write_json
from clockdistill import location_mask, memory_weights
from experiments import plots
from train import say

SCALES = {
    "full": dict(out="runs/demo", root="datasets/toy", counts=dict(train=4000, val=500, tune=500),
                 student={}, teacher={}, eval_every=400),
    "quick": dict(out="runs/demo-quick", root="datasets/toy-quick",
                  counts=dict(train=80, val=20, tune=4),
                  student=dict(steps=20, warmup=5, teacher_floor=0.0),
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
    """From nothing to a distilled student: data, three stages, table, pictures."""
    plan, device = SCALES[scale], train.pick_device(device)
    out = Path(plan["out"])
    if scale == "quick":
        say("SCALE=quick shows that everything runs. Its figures mean nothing: far too few images "
            "and steps.")
    data.make_toy(plan["root"], counts=plan["counts"])
    folders, results = {}, {}

    def stage(name, recipe, taught_by=None, **changes):
        role = plan["teacher" if name == "teacher" else "student"]
        settings = train.RECIPES[recipe]["dino"] | role | changes
        cfg = train.Config(**settings | dict(root=plan["root"], seed=seed))
        folders[name] = out / f"{name}-{train.digest(cfg, taught_by)}"
        if (folders[name] / "result.json").exists():
            results[name] = json.loads((folders[name] / "result.json").read_text())
            say(f"{name}: done before, AP {results[name]['AP']:.3f}")
            return
        say(f"\n=== {name} ===")
        results[name] = train.fit(cfg, train.Run(
            out=str(folders[name]), resume=True, device=device.type, workers=1,
            eval_every=plan["eval_every"], eval_batch=20, save_minutes=0.5))

    alone = dict(teacher=None, method=None, method_options={})
    if teacher == "scratch":
        stage("teacher", "toy-teacher", **alone)
    else:
        shipped = train.SHIPPED_TEACHERS["dino"]
        say(f"\n=== teacher: shipped weights, weights/{shipped.name}; "
            "make demo TEACHER=scratch trains it ===")
        dataset = data.build("toy", plan["root"], "val")
        results["teacher"] = shipped_teacher(shipped, dataset, device)
        folders["teacher"] = Path(os.path.relpath(shipped))
    taught_by = train.fingerprint(train.load_model(folders["teacher"])[0])
    stage("student", "toy-student", **alone)
    stage("distilled", "toy-student", taught_by, teacher=str(folders["teacher"]))
    for result in results.values():
        result.setdefault("trained_minutes", result["minutes"])
    where = train.machine(device)
    write_json(out / "summary.json",
               results | {"machine": where, "commit": train.commit(), "scale": scale})
    draw(out, folders, results, plan, device)
    print_table(results, scale, where)


def shipped_teacher(path, dataset, device):
    """A teacher that comes with the repository, measured here and now -> what `fit` returns of a run.

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

def draw(out, folders, results, plan, device):
    """The demo's pictures, OUT/*.png."""
    # The first validation scenes with four or more objects: chosen before looking.
    dataset = data.build("toy", plan["root"], "val")
    shown = [i for i in range(len(dataset)) if len(dataset[i][1]["labels"]) >= 4][:4] or [0]
    batch = data.collate([dataset[i] for i in shown]).to(device)
    images, truths = zip(*(dataset.raw(i) for i in shown))
    networks = {name: train.load_model(folder)[0].to(device) for name, folder in folders.items()}
    answers = {name: train.answer(network, batch) for name, network in networks.items()}

    # What the memory loss weighs in the first scene, as this student had it.
    one, nothing, boxes = batch.images[:1], torch.zeros_like(batch.padding[:1]), batch.boxes[0]
    with torch.no_grad():
        memory = networks["teacher"].encode(one, nothing)
    masks = [location_mask(boxes, height, width) for height, width in memory.shapes]
    saved = checkpoints.load(folders["distilled"] / "last.pt")
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
        "losses": losses(folders["distilled"] / "log.jsonl"),
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
