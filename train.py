"""Everything that runs: recipes, the training loop, evaluation, the demo, and the command line.

The other rooms do one thing each and know nothing of one another: data.py makes batches, models.py turns a batch into
detections, clockdistill.py compares a student's tensors with a teacher's. This file feeds the one with the other:

    batch -> teach()   teacher memory, and its decoding of the target-aware queries        (no gradient)
          -> Learner   student's memory, detections and its decoding of the same queries   -> named, weighted losses
          -> one backward, one optimizer step, one line of JSON

`fit` is the same loop without a teacher, so that "distillation off" *is* plain training.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from experiments import bench
import checkpoints
import data
from experiments import look as looks
import models
from experiments import plots
from experiments import tables
from experiments.baselines import BASELINES, View
from checkpoints import write_json, write_text
from clockdistill import PRESETS, CLoCKDistill, location_mask, memory_weights

HERE = Path(__file__).resolve().parent
METHODS = {"clockdistill": CLoCKDistill} | BASELINES       # name on the command line -> class, its arguments: options
SHIPPED_TEACHERS = {name: HERE / "weights" / f"toy_teacher_{name}.safetensors" for name in models.DETECTORS}


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one flat, frozen record. Its defaults are the official DINO 4-scale recipe; a recipe is a named change.
# ---------------------------------------------------------------------------------------------------------------------

# Official schedules, each for its own total batch. Where a setting is None, the detector's value here is taken.
SCHEDULES = {
    "dab_detr": dict(epochs=50, batch_size=16, lr=1e-4, backbone_lr=1e-5, drop_at=40 / 50),
    "deformable_detr": dict(epochs=50, batch_size=32, lr=2e-4, backbone_lr=2e-5, drop_at=40 / 50),
    "dino": dict(epochs=12, batch_size=16, lr=1e-4, backbone_lr=1e-5, drop_at=11 / 12),
}


def option(default, text, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class Config:
    """All that decides what a run computes. It is written beside the results, and `--resume` insists on the same."""
    # --- data
    data: str = option("toy", "which reader: toy (procedural road scenes, made on first use), kitti, coco",
                       choices=("toy", "kitti", "coco"))
    root: str = option("datasets/toy", "folder of the data set, in KITTI's or COCO's own layout")
    train_split: str = option("train", "train | val | all | a file with one image id a line (toy also: tune)")
    val_split: str = option("val", "the images that AP is reported on, in the same words")
    class_map: str | None = option(None, "KITTI layout: kitti3 | kitti8 | kitti3_merged | your own names, Car,Dog,...")
    limit: int | None = option(None, "use only the first N images of each split")
    size: str | None = option(None, "resize to SHORT,MAX pixels, keeping the ratio; default: the reader's own")
    augment: bool = option(True, "training augmentation: flips, resizes, crops (--no-augment to overfit a few images)")
    # --- model; None means the official value for that detector
    detector: str = option("dino", "which detection transformer", choices=models.DETECTORS)
    backbone: str | None = option(None, "resnet18 | resnet34 | resnet50 | resnet101")
    backbone_width: int | None = option(None, "channels of the ResNet's first stage; 64 is the standard one")
    pretrained_backbone: str | None = option(None, "imagenet (downloads) | none | a file with torchvision's names")
    hidden_dim: int | None = option(None, "width of the transformer")
    heads: int | None = option(None, "attention heads")
    ffn_dim: int | None = option(None, "hidden width of the feed-forward blocks")
    encoder_layers: int | None = option(None, "transformer encoder layers")
    decoder_layers: int | None = option(None, "transformer decoder layers")
    num_queries: int | None = option(None, "object queries, the most objects an image can be given")
    feature_levels: int | None = option(None, "feature maps the encoder reads")
    points: int | None = option(None, "sampling points per head and level")
    dropout: float | None = option(None, "dropout in the transformer")
    num_patterns: int | None = option(None, "DAB-DETR: contents that each anchor is asked with, 0 = none")
    feature_stride: int | None = option(None, "DAB-DETR: 8 | 16 | 32, the one feature map it reads")
    box_refine: bool | None = option(None, "Deformable DETR: each decoder layer refines the boxes")
    two_stage: bool | None = option(None, "Deformable DETR: start from the encoder's own boxes (with --box-refine)")
    denoising: int | None = option(None, "DINO: denoising queries, 0 = none; below 50 official DINO makes more")
    box_noise: float | None = option(None, "DINO, denoising only: part of half the box that a corner may move")
    label_noise: float | None = option(None, "DINO, denoising only: twice the chance of a random class")
    shared_heads: bool | None = option(None, "DINO: one head for all layers (detrex, MMDetection: one each)")
    position_temperature: float | None = option(None, "of the image position encoding")
    position_offset: float | None = option(None, "of the image position encoding, in cells")
    logit_eps: float | None = option(None, "of the inverse sigmoid of a box")
    # --- optimisation
    steps: int | None = option(None, "optimizer steps; default: from --epochs. 0 writes the untrained checkpoint")
    epochs: float | None = option(None, "passes over the training images, when --steps is not given")
    batch_size: int | None = option(None, "images a step in each process, whatever --accumulate is")
    accumulate: int = option(1, "split each batch into N parts, one backward each: less memory, same step size")
    lr: float | None = option(None, "AdamW learning rate; tied to the TOTAL batch and never scaled behind your back")
    backbone_lr: float | None = option(None, "learning rate of the backbone")
    weight_decay: float = option(1e-4, "AdamW weight decay")
    warmup: int = option(0, "steps of linear warm-up")
    schedule: str = option("drop", "drop: lr/10 once, after --drop-at of the steps; cosine: down to 2 %%",
                           choices=("drop", "cosine"))
    drop_at: float | None = option(None, "where the drop happens, as a fraction of all steps")
    clip: float = option(0.1, "largest gradient norm")
    ema: float = option(0.0, "decay of the moving average of the weights that is evaluated; 0 = off")
    precision: str = option("fp32", "autocast; losses, matcher, masks and sampling locations stay fp32",
                            choices=("fp32", "bf16", "fp16"))
    seed: int = option(0, "initial weights, order of the images, augmentation, noise")
    # --- distillation (`distill` only)
    teacher: str | None = option(None, "teacher's checkpoint, or the folder of its run")
    method: str | None = option(None, "distillation method; `distill` takes clockdistill", choices=METHODS)
    method_options: tuple = option((), "options of the method, listed below; they replace all of the recipe's",
                                   nargs="+")
    teacher_floor: float = option(0.05, "refuse a teacher of lower AP, it was hardly loaded; 0 = never refuse")
    init_from: str | None = option(None, "start from these weights, of any known program, or hf:ORGANISATION/MODEL "
                                   "(fine-tuning; --resume continues a run instead)")
    made_with: tuple = option((), "model options that --init-from was made with, where checkpoints.py assumes others",
                              nargs="+")

    def __post_init__(self):
        for name, value in SCHEDULES[self.detector].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)             # a frozen record may still finish itself
        for name, least in dict(batch_size=1, accumulate=1, steps=0, epochs=0, warmup=0, clip=0, ema=0).items():
            value = getattr(self, name)
            if value is not None and value < least or name == "ema" and value >= 1:
                limit = " and less than 1" if name == "ema" else ""
                raise ValueError(f"--{name.replace('_', '-')} {value}: want at least {least}{limit}")


@dataclass(frozen=True)
class Run:
    """Where and how a run happens; none of it changes what is computed (but for rounding, on another device)."""
    out: str = option("runs/fit", "folder for log.jsonl, last.pt, best.pt, config.json, result.json")
    resume: bool = option(False, "continue the run in --out from its last checkpoint, bit for bit on CPU")
    device: str = option("auto", "auto | cpu | cuda | mps")
    workers: int = option(2, "processes that load images")
    eval_every: int = option(1000, "steps between evaluations; there is always one at the end")
    eval_batch: int = option(1, "images a batch in evaluation; 1 is exact, padding moves boxes a little")
    probe_every: int = option(200, "steps between reports of each loss term's share and gradient norm")
    save_minutes: float = option(2.0, "minutes between checkpoints")


# The toy: 160 x 48 pixels, so narrow models, all trained from scratch. One recipe for each detector and role.
# Scale mask and lambdas are each detector's best of eight trials (tables.TRIALS) on the split "tune", which no table
# reports. Perhaps the mask loses because with it the coarsest level, of ten cells, is as heavy as the finest. (With
# DAB-DETR, which has one level, it loses by less than luck makes up: notebook 3.)
TOY = dict(data="toy", backbone="resnet18", pretrained_backbone="none", hidden_dim=64, heads=8, num_queries=24,
           batch_size=16, warmup=150, schedule="cosine", ema=0.99)
TOY_STUDENT = TOY | dict(backbone_width=12, ffn_dim=128, encoder_layers=1, decoder_layers=2, steps=1200, lr=3e-3,
                         backbone_lr=3e-3, method="clockdistill")
TOY_TEACHER = TOY | dict(backbone_width=24, ffn_dim=192, encoder_layers=2, decoder_layers=3, steps=3000, lr=2e-3,
                         backbone_lr=2e-3)
# Only DINO has an embedding of labels; the others' queries ask with a frozen random one, the same for both models [P].
# The lambdas [O] are not known: look at each term's gradient norm in the log, then set them.
PAPER = {name: ("preset=paper", *(() if name == "dino" else ("content=random_label",)), "lambda_mem=1.0",
                "lambda_log=1.0") for name in models.DETECTORS}
RECIPES = {
    "toy-student": {
        "dino": TOY_STUDENT | dict(feature_levels=3, points=2, denoising=50,
                                   method_options=("preset=dino", "scale=False", "lambda_mem=960", "lambda_log=0.5")),
        "deformable_detr": TOY_STUDENT | dict(feature_levels=3, points=2, box_refine=True, dropout=0.,
                                              method_options=("preset=deformable_detr", "scale=False",
                                                              "lambda_mem=240", "lambda_log=0.5")),
        "dab_detr": TOY_STUDENT | dict(feature_stride=8, num_queries=60, steps=2000, lr=1e-3, backbone_lr=1e-3,
                                       method_options=("preset=dab_detr", "scale=False", "lambda_mem=960",
                                                       "lambda_log=0.5")),
    },
    "toy-teacher": {
        "dino": TOY_TEACHER | dict(feature_levels=3, points=4, denoising=50),
        "deformable_detr": TOY_TEACHER | dict(feature_levels=3, points=4, box_refine=True, dropout=0.),
        "dab_detr": TOY_TEACHER | dict(backbone="resnet34", backbone_width=32, feature_stride=8, num_queries=60,
                                       steps=6000, lr=1e-3, backbone_lr=1e-3),
    },
    # The paper's data. Length, rates and batch are each detector's official ones (SCHEDULES), on KITTI with the batch
    # of the authors' earlier code [P], for which rates meant for 16 or 32 images may be high: --lr, --accumulate. That
    # the teacher is an R50 and the student an R18 is our choice: --backbone.
    "kitti-teacher": {name: dict(data="kitti", backbone="resnet50", batch_size=8) for name in models.DETECTORS},
    "kitti-student": {name: dict(data="kitti", backbone="resnet18", batch_size=8, method="clockdistill",
                                 method_options=PAPER[name]) for name in models.DETECTORS},
    "coco-teacher": {name: dict(data="coco", backbone="resnet50") for name in models.DETECTORS},
    "coco-student": {name: dict(data="coco", backbone="resnet18", method="clockdistill", method_options=PAPER[name])
                     for name in models.DETECTORS},
}
MODEL_FIELDS = ("backbone", "backbone_width", "pretrained_backbone", "hidden_dim", "heads", "ffn_dim", "encoder_layers",
                "decoder_layers", "num_queries", "feature_levels", "points", "dropout", "num_patterns",
                "feature_stride", "box_refine", "two_stage", "denoising", "box_noise", "label_noise", "shared_heads",
                "position_temperature", "position_offset", "logit_eps")


# ---------------------------------------------------------------------------------------------------------------------
# The world around a run: devices, processes, provenance
# ---------------------------------------------------------------------------------------------------------------------

def pick_device(name="auto"):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def processes(device):
    """Join the other processes when started by torchrun; otherwise do nothing. Yields (rank, world)."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The other processes enter when the first one has left."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and dist.get_rank() > 0:
        dist.barrier()
    yield
    if several and dist.get_rank() == 0:
        dist.barrier()


def machine(device):
    """What a time was measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit():
    """The commit that ran, with a '+' when its code was changed since; 'unknown' outside a git checkout."""
    try:
        git = lambda *words: subprocess.check_output(["git", "-C", HERE, *words], text=True, stderr=subprocess.DEVNULL)
        changed = git("status", "--porcelain", "-uno", "--", "*.py").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------

def parse_size(text):
    """'800,1333' -> (800, 1333); None stays None."""
    if text is None:
        return None
    try:
        short, longest = (int(side) for side in text.split(","))
    except ValueError:
        raise ValueError(f"--size {text}: want SHORT,MAX in pixels, e.g. 800,1333") from None
    return short, longest


def build_data(cfg, split, augment=False):
    return data.build(cfg.data, cfg.root, split, augment="train" if augment else "eval", size=parse_size(cfg.size),
                      limit=cfg.limit, class_map=cfg.class_map, seed=cfg.seed)


def build_model(cfg, num_classes):
    overrides = {name: getattr(cfg, name) for name in MODEL_FIELDS if getattr(cfg, name) is not None}
    named = {"none": False, "imagenet": True}
    if "pretrained_backbone" in overrides:
        overrides["pretrained_backbone"] = named.get(cfg.pretrained_backbone, cfg.pretrained_backbone)
    return models.build(cfg.detector, num_classes, **overrides)


def load_payload(path):
    """A checkpoint of ours, or a run's folder -> what it holds, checked for what a model is rebuilt from."""
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    payload = checkpoints.load(path)
    needed = {"model", "detector", "config", "classes", "data", "settings", "metrics"}
    if not isinstance(payload, dict) or not needed <= payload.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: give a last.pt or best.pt that `fit` or "
                         "`distill` wrote, or an exported .safetensors")
    return payload | {"path": path}


def rebuild(payload):
    """-> the model in eval mode, on the CPU."""
    # A checkpoint never names a file to open.
    config = payload["config"] | {"pretrained_backbone": False}
    model = models.build(payload["detector"], len(payload["classes"]), **config)
    try:
        model.load_state_dict(payload["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{payload['path']}: weights and configuration do not fit ({reason}): make it again") from None
    return model.eval()


def load_model(path):
    """-> (model, the other entries of its checkpoint)."""
    payload = load_payload(path)
    return rebuild(payload), payload


def fingerprint(model):
    """A short name for these very weights, wherever their file lies."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def same_classes(payload, dataset, path):
    if list(payload["classes"]) != list(dataset.classes):
        raise ValueError(f"{path} knows {len(payload['classes'])} classes ({', '.join(payload['classes'][:4])}...), "
                         f"{dataset.name} has {len(dataset.classes)} ({', '.join(dataset.classes[:4])}...): "
                         "choose the data, --class-map or checkpoint that go together")


def lr_factor(cfg, step, steps):
    """What the learning rates are multiplied with at this step (0-based)."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    if cfg.schedule == "drop":
        return 0.1 if step >= cfg.drop_at * steps else 1.0
    progress = (step - cfg.warmup) / max(1, steps - cfg.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# One step: what the teacher says, what the student is told
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Lesson:
    """What a frozen teacher says about one batch, to a rival in a View."""
    memory: models.Memory
    detections: models.Detections | None       # its decoding of the target-aware queries; None when no term needs it
    queries: tuple | None                      # (content for the teacher, boxes, attend, valid, position or None)
    view: View | None = None
    generator: torch.Generator | None = None   # of the rival's random numbers


def content_of(teacher, method):
    """What the target-aware queries ask with, as far as it is the teacher's; None when the method has its own."""
    return {"label": teacher.label_embedding, "own": teacher.learned_content}.get(method.content)


@torch.no_grad()
def teach(teacher, method, batch, generator=None):
    """The teacher encodes the batch and decodes the method's queries alone: its own, unless wanted, are never run."""
    memory = teacher.encode(batch.images, batch.padding)
    if not isinstance(method, CLoCKDistill):
        return teach_rival(teacher, method, batch, memory, generator)
    if not method.reads_queries:
        return Lesson(memory, None, None)
    labels, boxes = [t["labels"] for t in batch.targets], [t["boxes"] for t in batch.targets]
    embedding = content_of(teacher, method)
    queries, position = method.queries(labels, boxes, embedding, generator=generator), None
    if method.learned:
        learned, _ = teacher.learned_queries(memory)
        queries = method.with_learned(queries, learned.content, learned.boxes)
        position = learned.position                                            # of these, the last ones
    queries = (*queries, position)
    asked = teacher.caller_queries(queries)
    return Lesson(memory, teacher.decode(memory, asked.content, asked.boxes, queries[2], asked.position), queries)


def teach_rival(teacher, method, batch, memory, generator):
    """The teacher's View, as far as the rival needs it. The decoder reads the rival's queries alone."""
    needs, view, queries, states = method.needs, view_of(memory, batch.padding), None, []
    if needs:
        memory = dataclasses.replace(memory, tokens=memory.tokens.detach().requires_grad_("gradient" in needs))
        with torch.set_grad_enabled("gradient" in needs):
            learned, proposals = teacher.learned_queries(memory)
            queries = method.queries(learned, generator)
            asked = teacher.caller_queries(queries)
            hooks = [layer.register_forward_hook(lambda layer, inputs, state: states.append(state))
                     for layer in teacher.decoder.layers if "states" in needs]
            with models.record(teacher) if "attention" in needs else contextlib.nullcontext() as seen:
                found = teacher.decode(memory, asked.content, asked.boxes, queries[2], asked.position)
            for hook in hooks:
                hook.remove()
            view = view._replace(logits=found.logits, boxes=found.boxes, states=torch.stack(states) if states else None,
                                 matches=matches_of(teacher, found, batch.targets) if "matches" in needs else None,
                                 attention=attention_of(teacher, seen, slice(None)) if seen else None)
            if "gradient" in needs:
                output = models.Output(memory, found, proposals, None, None)
                loss = sum(teacher.loss_weights[k] * v for k, v in teacher.loss(output, batch.targets).items())
                view = view._replace(gradient=torch.autograd.grad(loss, memory.tokens)[0])
    return Lesson(memory, None, queries if "queries" in needs else None, view, generator)


def extent_of(padding):
    """(B, 2), (w_i / W, h_i / H): the part of the padded batch that each image fills."""
    real = (~padding).float()                                                                  # (B, H, W)
    return torch.stack([real[:, 0].mean(1), real[:, :, 0].mean(1)], 1)


def view_of(memory, padding):
    return View(memory.tokens, memory.padding, memory.shapes, extent_of(padding))


def matches_of(model, found, targets):
    return models.criterion.match(found.logits, found.boxes, models.criterion.pad_targets(targets),
                                  model.matcher_weights, model.eps)


def attention_of(model, seen, part):
    """Attention of a part of the queries, among themselves and to the memory, layer by layer, as a View holds it."""
    pairs = []
    for i in range(model.decoder_layers):
        among, across = seen[f"decoder.{i}.self"], seen[f"decoder.{i}.cross"]
        dense = across.points is None
        pairs.append((among.weights[:, :, part, part],
                      across.weights[:, :, part] if dense else (across.points[:, part], across.weights[:, part])))
    return pairs


class Learner(nn.Module):
    """Student and distillation method as one module, so that there is one forward for DDP to wrap, and one backward."""

    # The losses that come from the teacher; all others are detection.
    TERMS = tuple(dict.fromkeys(("memory", "cls", "l1", "giou", *(t for m in BASELINES.values() for t in m.terms))))

    def __init__(self, student, method=None):
        super().__init__()
        self.student, self.method = student, method

    def forward(self, images, padding, targets, lesson=None):
        """-> {name: weighted scalar}. Their sum is what is minimised."""
        extra = None
        if lesson is not None and lesson.queries is not None:
            content, reference, attend, valid, position = lesson.queries
            reads = self.method.student_content
            extra = (reads(content), reference, attend, valid, None if position is None else reads(position))
        looks = lesson is not None and "attention" in getattr(self.method, "needs", ())
        with models.record(self.student, graph=True) if looks else contextlib.nullcontext() as seen:
            output = self.student(images, padding, targets, extra=extra)
        weights = self.student.loss_weights
        losses = {name: weights[name] * value for name, value in self.student.loss(output, targets).items()}
        if lesson is not None and lesson.view is not None:
            losses |= self.rival(output, lesson, targets, padding, seen)
        elif lesson is not None:
            losses |= self.distillation(output, lesson, targets, padding)
        return losses

    def rival(self, output, lesson, targets, padding, seen):
        own, needs = output.detections, self.method.needs
        view = view_of(output.memory, padding)._replace(logits=own.logits, boxes=own.boxes)
        if "matches" in needs:
            view = view._replace(matches=matches_of(self.student, own, targets))
        asked = None if output.extra is None else view._replace(logits=output.extra.logits, boxes=output.extra.boxes)
        if seen:                                         # queries come in the order denoising, learned, extra
            first = 0 if output.denoising is None else output.denoising.logits.shape[2]
            last = first + own.logits.shape[2]
            view = view._replace(attention=attention_of(self.student, seen, slice(first, last)))
            asked = asked._replace(attention=attention_of(self.student, seen, slice(last, None)))
        return self.method(view, lesson.view, targets, {"queries": asked, "generator": lesson.generator})

    def distillation(self, output, lesson, targets, padding):
        answers, valid, normaliser = (None,) * 4, None, None
        if lesson.queries is not None:
            valid = lesson.queries[3]
            answers = (output.extra.logits, output.extra.boxes, lesson.detections.logits, lesson.detections.boxes)
            # One denominator for all processes, so that the mean of their gradients is that of the whole batch.
            if dist.is_initialized() and self.method.logit_options["normalise"] == "queries":
                normaliser = valid.sum().float()
                dist.all_reduce(normaliser)
                normaliser = (normaliser / dist.get_world_size()).clamp(min=1)
        return self.method(output.memory.tokens, lesson.memory.tokens, *answers,
                           [t["labels"] for t in targets], [t["boxes"] for t in targets],
                           output.memory.shapes, output.memory.padding, valid, extent_of(padding), normaliser)


def gradient_report(losses, student):
    """How much each part of the loss asks of the student: {part: (share of the total, gradient norm)}.

    Users of other repositories could not tell whether their teacher was even loaded; a distillation term whose
    gradient is zero, or a hundred times the detection loss's, is seen here at once.
    """
    parts = {"detection": sum(value for name, value in losses.items() if name not in Learner.TERMS)}
    parts |= {name: losses[name] for name in Learner.TERMS if name in losses}
    total = sum(value.item() for value in parts.values())
    parameters = [p for p in student.parameters() if p.requires_grad]
    report = {}
    for name, value in parts.items():
        grads = ()
        if value.requires_grad:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads if g is not None))
        report[name] = (value.item() / max(total, 1e-12), norm)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

def train_steps(learner, teacher, optimizer, batches, cfg, steps, start=0, scaler=None, probe_every=0):
    """Yield (step, log) after each optimizer step: the command prints it, a notebook plots it, a test checks it.

    learner: Learner, or DDP around it.  teacher: a frozen model, or None.  batches: iterable of data.Batch, one a step,
    on the learner's device.  start: the step that the first batch belongs to.  scaler: GradScaler, for fp16.
    log: {"loss", every weighted loss by name, "grad_norm", "lr", "images"} as plain numbers; now and then "report".
    Raises FloatingPointError, with the first bad term and its images, when a loss is not finite; nothing is updated.
    """
    inner = learner.module if isinstance(learner, DistributedDataParallel) else learner
    rank = dist.get_rank() if dist.is_initialized() else 0
    trainable = [p for p in inner.parameters() if p.requires_grad]
    device = trainable[0].device
    amp = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.precision]
    generator = torch.Generator(device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    for step, batch in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(cfg, step, steps)
        # Noise is a function of (seed, step, process), so that a resumed run draws the same, and a student with a
        # teacher the same denoising noise as the student without: the queries' noise has a generator of its own.
        noise = (cfg.seed * 1_000_003 + step) * 4096 + rank
        torch.manual_seed(noise)
        generator.manual_seed(noise + 2 ** 40)
        log, parts = {}, in_parts(batch, cfg.accumulate)
        for part in parts:
            # Only the last part's backward has to talk to the other processes.
            silent = learner.no_sync() if part is not parts[-1] and learner is not inner else contextlib.nullcontext()
            with silent:
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    lesson = teach(teacher, inner.method, part, generator) if teacher is not None else None
                    try:
                        losses = learner(part.images, part.padding, part.targets, lesson)
                    except models.criterion.NotFinite as error:
                        raise FloatingPointError(f"step {step}, images {image_ids(part)}: {error}") from None
                values = numbers(losses, step, part)
                if probe_every and step % probe_every == 0 and teacher is not None and part is parts[0]:
                    log["report"] = gradient_report(losses, inner.student)
                scaler.scale(sum(losses.values()) / len(parts)).backward()
            for name, value in values.items():
                log[name] = log.get(name, 0) + value / len(parts)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trainable, cfg.clip)
        if not scaler.is_enabled() and not norm.isfinite():           # fp16: the scaler leaves out such a step itself
            raise FloatingPointError(f"step {step}: the gradient is not finite, images {image_ids(batch)}: lower --lr")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        report = log.pop("report", None)
        log = {"loss": sum(log.values()), **log, "grad_norm": norm.item() if norm.isfinite() else None,
               "lr": optimizer.param_groups[0]["lr"], "images": image_ids(batch)}
        yield step, log | ({"report": report} if report else {})


def in_parts(batch, count):
    """The batch cut into `count` smaller ones (fewer, when it has fewer images)."""
    size = math.ceil(len(batch.targets) / count)
    return [data.Batch(batch.images[i:i + size], batch.padding[i:i + size], batch.targets[i:i + size])
            for i in range(0, len(batch.targets), size)]


def numbers(losses, step, batch):
    """{name: float}, with one wait for the GPU. Raises FloatingPointError with the first that is not finite."""
    values = dict(zip(losses, torch.stack([value.detach().float() for value in losses.values()]).tolist()))
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(f"step {step}: {bad[0]} is not finite, on images {image_ids(batch)}: lower --lr, use "
                                 "--precision fp32, or look at these images and their labels")
    return values


def image_ids(batch):
    return [int(target["image_id"]) for target in batch.targets]


@torch.no_grad()
def answer(model, batch):
    """A batch through the model in eval mode -> what `detect` returns of its images. Raises FloatingPointError, naming
    the image, when a detection is not finite."""
    training, results = model.training, []
    output = model.eval()(batch.images, batch.padding)
    model.train(training)
    sizes = torch.stack([torch.as_tensor(t["orig_size"]) for t in batch.targets])      # (B, 2) h, w
    for target, found in zip(batch.targets, models.postprocess(output.detections, sizes, 100)):
        results.append({"image_id": int(target["image_id"]), **{k: v.cpu() for k, v in found.items()}})
        data.check_finite(results[-1], f"image {results[-1]['image_id']}")
    return results


def detect(model, dataset, run, batch_size=1, progress=True):
    """Every image of the data set through the model -> list of {"image_id", "scores", "labels", "boxes"} on the CPU,
    boxes xyxy in original pixels, best first. Each of several processes does its share and gets everybody's."""
    device, results = next(model.parameters()).device, []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = data.eval_loader(dataset, batch_size, workers=run.workers, rank=rank, world=world)
    for batch in tqdm(batches, "evaluate", leave=False, disable=not progress or rank > 0, mininterval=quiet_interval()):
        results += answer(model, batch.to(device))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, results)
        results = [result for share in shares for result in share]
    return results


# ---------------------------------------------------------------------------------------------------------------------
# A run: data, student, perhaps a teacher; log, checkpoints, result
# ---------------------------------------------------------------------------------------------------------------------

class Interrupted(Exception):
    """Ctrl-C or a polite kill: the step in hand was finished and saved."""


@contextlib.contextmanager
def finish_step_on_signal():
    """Yields a list that fills up when the user asks to stop. A second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_teacher(cfg, run, dataset, device):
    """The frozen teacher, refused when it is no teacher: wrong classes, or an AP that says it was never loaded."""
    teacher, payload = load_model(cfg.teacher)
    same_classes(payload, dataset, cfg.teacher)
    teacher = teacher.to(device).requires_grad_(False)
    same_data = all(payload["settings"][name] == plain(cfg)[name] for name in EVALUATION
                    if name not in ("root", "val_split"))
    ap, source = payload["metrics"].get("AP") if same_data else None, "stored in its checkpoint"
    if ap is None:
        ap, source = data.evaluate(detect(teacher, dataset, run, run.eval_batch), dataset)["AP"], "measured now"
    if cfg.teacher_floor > 0 and not ap >= cfg.teacher_floor:
        raise ValueError(f"the teacher {cfg.teacher} has AP {ap:.3f} ({source}), under the floor of "
                         f"{cfg.teacher_floor}: was it trained, on this data? --teacher-floor 0 uses it all the same")
    say(f"teacher    {cfg.teacher}: AP {ap:.3f} ({source})")
    return teacher


GIVEN = ("student_dim", "teacher_dim", "num_classes", "levels")        # a method's arguments that are no options


def method_defaults(cls):
    """{option: default} of a method's --method-options. CLoCKDistill's `preset` changes the defaults of the others."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()
                if name not in GIVEN}
    return ({"preset": "paper"} if cls is CLoCKDistill else {}) | defaults


def open_method(cfg, teacher, student):
    """The distillation method of `--method`, with its `--method-options`."""
    cls = METHODS[cfg.method]
    known, options = method_defaults(cls), {}
    for pair in cfg.method_options:
        name, _, value = pair.partition("=")
        if name not in known:
            raise ValueError(f"--method-options {pair}: {cfg.method} has no option {name!r}, only "
                             + ", ".join(f"{k}={v}" for k, v in known.items()))
        options[name] = parse_like(known[name], value, f"--method-options {pair}")
    preset = options.pop("preset", "paper")
    if preset not in PRESETS:
        raise ValueError(f"--method-options preset={preset}: choose from {', '.join(PRESETS)}")
    options = PRESETS[preset] | options
    given = {"student_dim": student.config["hidden_dim"], "teacher_dim": teacher.config["hidden_dim"],
             "num_classes": student.num_classes, "levels": student.config.get("feature_levels", 1)}
    method = cls(**{k: v for k, v in given.items() if k in inspect.signature(cls).parameters}, **options)
    return method.to(next(student.parameters()).device)


def parse_like(default, text, what):
    """`text` as a value of the default's type."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{what}: want a {type(default).__name__}, like {default}") from None


def check_pair(teacher, student, dataset):
    """One image through both encoders: their memories must have the same tokens."""
    image = dataset[0][0][None].to(next(student.parameters()).device)
    nothing = torch.zeros_like(image[:, 0], dtype=torch.bool)
    training = student.training
    student.eval()
    with torch.no_grad():
        of_teacher, of_student = (list(map(tuple, m.encode(image, nothing).shapes)) for m in (teacher, student))
    student.train(training)
    if of_teacher != of_student:
        raise ValueError(f"teacher and student do not fit: their memories have levels of {of_teacher} and {of_student} "
                         "cells; give both the same --feature-levels and strides")


def quiet_interval():
    """Seconds between redraws of a progress bar: a log file need not hold a thousand of them."""
    return 1 if sys.stderr.isatty() else 30


def say(text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text)


def fit(cfg, run):
    """Train (and, with cfg.teacher, distil) until done -> the result that is also written to OUT/result.json.

    OUT/ receives config.json, log.jsonl (one line a step), last.pt and best.pt (weights as evaluated, safe to load),
    result.json. With run.resume the run goes on from last.pt, with the numbers it would have had without the stop.
    """
    device = pick_device(run.device)
    with processes(device) as (rank, world):
        return _fit(cfg, run, device, rank, world)


def _fit(cfg, run, device, rank, world):
    out = Path(run.out)
    last = out / "last.pt"
    if last.exists() and not run.resume:
        raise ValueError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    with first_process_first():                   # it may have to draw the toy
        train_set, val_set = build_data(cfg, cfg.train_split, augment=cfg.augment), build_data(cfg, cfg.val_split)
    if train_set.classes != val_set.classes:
        raise ValueError(f"the training and validation splits of {cfg.root} have different classes")
    steps = cfg.steps if cfg.steps is not None else math.ceil(cfg.epochs * len(train_set) / (cfg.batch_size * world))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(".*.pt.*"):          # of a kill in the middle of a save
            leftover.unlink()

    torch.manual_seed(cfg.seed)                   # the same first weights with and without a teacher
    student = build_model(cfg, len(train_set.classes))
    if cfg.init_from:
        known = dict(pair.partition("=")[::2] for pair in cfg.made_with)
        checkpoints.load_weights(student, cfg.init_from, classes=train_set.classes, made_with={
            name: parse_like(student.config.get(name, ""), value, f"--made-with {name}={value}")
            for name, value in known.items()} or None)
    student = student.to(device)
    teacher = method = taught_by = None
    if cfg.teacher:
        teacher = open_teacher(cfg, run, val_set, device)
        check_pair(teacher, student, train_set)
        method, taught_by = open_method(cfg, teacher, student), fingerprint(teacher)
    inner = Learner(student, method).train()
    groups = student.parameter_groups(cfg.lr, cfg.backbone_lr)
    if method is not None and list(method.parameters()):
        groups.append({"params": list(method.parameters()), "lr": cfg.lr})
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True) if cfg.ema else None

    provenance = {"settings": plain(cfg), "seed": cfg.seed, "commit": commit(), "machine": machine(device),
                  "world": world, "taught_by": taught_by}

    # All that the next step depends on, beside its number: what a checkpoint has to hold.
    stateful = {"student": student, "optimizer": optimizer, "scaler": scaler, "average": average, "method": method}
    stateful = {name: part for name, part in stateful.items() if part is not None}
    start, earlier, history, best, began = 0, 0.0, [], -1.0, time.monotonic()
    if run.resume and last.exists():
        saved = restore(last, stateful, provenance)
        start, earlier, history, best = saved["step"], saved["minutes"], saved["history"], saved["best"]
    learner = DistributedDataParallel(inner) if world > 1 else inner
    evaluated = average.module if average is not None else student

    def minutes():
        return earlier + (time.monotonic() - began) / 60

    def save(step, path, resumable=True):
        """The weights as evaluated; with `resumable` also what `restore` needs. A student that blew up is not saved
        over a good one: what it answers to one image is looked at first."""
        if rank > 0:
            return
        for model in {student, evaluated}:
            answer(model, data.collate([val_set[0]]).to(device))
        payload = {"model": evaluated.state_dict(), "detector": cfg.detector, "config": student.config,
                   "classes": list(train_set.classes), "category_ids": list(train_set.category_ids), "data": cfg.data,
                   "metrics": history[-1] if history else {}, "minutes": minutes(), "step": step, "history": history,
                   "best": best, **provenance}
        if resumable:
            payload["resume"] = {name: part.state_dict() for name, part in stateful.items()}
        checkpoints.save(path, payload)

    def evaluate(step):
        nonlocal best
        if history and history[-1]["step"] == step:      # resumed after the evaluation: not twice in the curve
            history.pop()
        for buffer in evaluated.buffers() if world > 1 else ():      # BatchNorm's differ; the first process's are saved
            dist.broadcast(buffer, 0)
        scores = data.evaluate(detect(evaluated, val_set, run, run.eval_batch), val_set)
        history.append({"step": step, **{k: v for k, v in scores.items() if k != "per_class"}})
        say(f"step {step:6d}  AP {scores['AP']:.3f}  AP50 {scores['AP50']:.3f}  AP75 {scores['AP75']:.3f}")
        if not scores["AP"] <= best:      # also when it is not defined
            best = scores["AP"]
            save(step, out / "best.pt", resumable=False)
        return scores

    if rank == 0:
        write_json(out / "config.json", {**provenance, "command": " ".join(sys.argv), "steps": steps})
        trim_log(out / "log.jsonl", start)
    announce(cfg, train_set, val_set, student, start, steps, world, device)

    saved_at = time.monotonic()
    batches = data.loader(train_set, cfg.batch_size, steps=steps, start=start, seed=cfg.seed, workers=run.workers,
                          rank=rank, world=world)
    bar = tqdm(total=steps, initial=start, desc=out.name, disable=rank > 0, mininterval=quiet_interval(),
               dynamic_ncols=True)
    log_file = open(out / "log.jsonl", "a") if rank == 0 else None
    try:
        with finish_step_on_signal() as asked_to_stop:
            clock = time.monotonic()
            on_device = (batch.to(device) for batch in batches)
            for step, log in train_steps(learner, teacher, optimizer, on_device, cfg, steps, start, scaler,
                                         run.probe_every):
                if average is not None:
                    average.update_parameters(student)
                elapsed = time.monotonic() - clock
                if rank == 0:
                    print(json.dumps({"step": step, **log, "seconds": round(elapsed, 4)}), file=log_file, flush=True)
                    bar.update()
                    bar.set_postfix_str(short(log), refresh=False)
                if "report" in log and step % (5 * run.probe_every) == 0:
                    say(f"step {step:6d}  share of the loss, gradient norm: " + ", ".join(
                        f"{name} {share:.0%} {norm:.2g}" for name, (share, norm) in log["report"].items()))
                done = step + 1
                if run.eval_every and done % run.eval_every == 0 and done < steps:
                    evaluate(done)
                if time.monotonic() - saved_at > 60 * run.save_minutes and done < steps:
                    save(done, last)
                    saved_at = time.monotonic()
                if anyone(asked_to_stop, device):
                    save(done, last)
                    raise Interrupted(f"stopped after step {done} of {steps}")
                clock = time.monotonic()
    finally:
        bar.close()
        if log_file:
            log_file.close()
    scores = evaluate(steps)
    save(steps, last)
    result = {**scores, "params": count_parameters(student),
              "gflops": models.gflops(evaluated, *reference_size(cfg, val_set)), "minutes": minutes(), "steps": steps,
              "images_per_second": speed_of(evaluated, val_set), "history": history,
              "weights": fingerprint(evaluated), **provenance}
    if rank == 0:
        write_json(out / "result.json", result)
    say(f"written    {out}/result.json, last.pt, best.pt, log.jsonl")
    return result


def restore(path, stateful, provenance):
    """Put a run's checkpoint back into its parts -> the checkpoint. Refuses one that was made with other settings."""
    def identity(facts):      # the teacher is known by its weights, wherever their file lies now
        return facts["settings"] | {"teacher": facts["taught_by"], "number of processes": facts["world"]}
    saved = checkpoints.load(path)
    then = identity(saved)
    differ = [name for name, value in identity(provenance).items() if then.get(name, value) != value]
    if differ:
        raise ValueError(f"{path} was made with other settings ({', '.join(differ)}): repeat its command, which "
                         f"{path.parent}/config.json holds, or choose another --out")
    for name, part in stateful.items():
        part.load_state_dict(saved["resume"][name])
    return saved


def announce(cfg, train_set, val_set, student, start, steps, world, device):
    """What is about to run, before the progress bar."""
    if start:
        say(f"resume     at step {start} of {steps}")
    say(f"data       {train_set.summary}\n           {val_set.summary}")
    say(f"student    {cfg.detector}, {count_parameters(student) / 1e6:.2f} M parameters; {steps} steps of "
        f"{cfg.batch_size} x {world} images, lr {cfg.lr:g} (a total batch of {cfg.batch_size * world}), on {device}")
    from_scratch = cfg.pretrained_backbone == "none" and not cfg.init_from
    if cfg.data != "toy" and from_scratch and len(train_set) < 10_000:
        say(f"note       {len(train_set)} images and no pretrained weights: to do well on images it has not seen, a "
            "DETR needs some 10,000, or --init-from")


def anyone(asked, device):
    """True when any process was asked to stop, so that all stop after the same step."""
    if not dist.is_initialized():
        return bool(asked)
    flag = torch.tensor(float(bool(asked)), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def plain(cfg):
    """The settings as JSON has them (no tuples), so that saved and given ones compare."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def trim_log(path, steps):
    """Forget what was logged after the last checkpoint: those steps are about to be made again."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] < steps))


def short(log):
    """The losses by name for the progress bar: the layers of one name added up."""
    sums = {}
    for name, value in log.items():
        if isinstance(value, float) and name not in ("loss", "grad_norm", "lr"):
            key = "KD " + name if name in Learner.TERMS else name.removeprefix("loss_").split("_")[0]
            sums[key] = sums.get(key, 0.0) + value
    return f"loss {log['loss']:.2f} = " + " + ".join(f"{name} {value:.2f}" for name, value in sums.items())


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def reference_size(cfg, dataset):
    """Where GFLOPs are counted: 800 x 1333, as the papers do; the toy at its own size."""
    return tuple(dataset[0][0].shape[1:]) if cfg.data == "toy" else (800, 1333)


def speed_of(model, dataset):
    """Images a second, one by one."""
    image = dataset[0][0][None].to(next(model.parameters()).device)
    return bench.images_per_second({"": model}, image)[""]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction of a finished checkpoint
# ---------------------------------------------------------------------------------------------------------------------

def evaluate_checkpoint(checkpoint, given):
    """AP of a checkpoint on a split -> dict; also says seconds an image and peak memory.

    Options that are not given are those that the checkpoint was trained with.
    """
    payload, out = load_payload(checkpoint), given.pop("out")
    stored = {name: value for name, value in payload["settings"].items()
              if name in EVALUATION and name not in ("root", "limit", "val_split")}
    name, there = given.get("data", stored["data"]), payload["settings"].get("root")
    # A checkpoint never says which files are opened.
    if "root" not in given and (name != "toy" or there not in (None, Config.root)):
        raise ValueError(f"eval needs --root, the folder of the {name} images"
                         + (f"; {checkpoint} was trained on {there}" if there else ""))
    cfg, run = configure(stored | given, "fit")
    device = pick_device(run.device)
    with processes(device) as (rank, world):
        with first_process_first():
            dataset = build_data(cfg, cfg.val_split)
        same_classes(payload, dataset, checkpoint)
        model = rebuild(payload).to(device)
        start = time.monotonic()
        results = detect(model, dataset, run, run.eval_batch)
        seconds = (time.monotonic() - start) / max(1, len(dataset))
        scores = data.evaluate(results, dataset)
        told = scores | {"seconds_per_image": seconds, "peak_memory_gb": peak_memory_gb(device), "images": len(dataset),
                         "checkpoint": str(checkpoint), "machine": machine(device)}
        if rank == 0:
            print(dataset.summary)
            print("  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "per_class"))
            for name, values in scores["per_class"].items():
                print(f"  {name:<20} " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
            print(f"{seconds:.3f} s an image with loading, peak memory {told['peak_memory_gb']:.2f} GB, "
                  f"{told['machine']}")
            if out:
                write_json(out, told)
    return told


def predict(checkpoint, images, out, min_score, size, device):
    """Detections of image files: drawn to OUT/000_NAME.png, 001_.., all of them listed in OUT/predictions.json."""
    model, payload = load_model(checkpoint)
    device = pick_device(device)
    model = model.to(device)
    size = parse_size(size or payload["settings"]["size"]) or data.DEFAULT_SIZE[payload["data"]]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, name in enumerate(tqdm(images, "predict", mininterval=quiet_interval())):
        picture = data.read_image(name)                                                    # (3, H, W) uint8
        tensor = data.prepare(picture, size)[None].to(device)                              # (1, 3, h, w)
        nothing = torch.zeros_like(tensor[:, 0], dtype=torch.bool)
        with torch.no_grad():
            detections = model(tensor, nothing).detections
        result = models.postprocess(detections, torch.tensor([picture.shape[1:]], device=device), 100)[0]
        result = {k: v.cpu() for k, v in result.items()}
        data.check_finite(result, name)
        drawn = out / f"{index:03d}_{Path(name).stem}.png"      # numbered: never the input itself, or a name twice
        plots.predictions(picture, result, payload["classes"], min_score).savefig(drawn)
        keep = result["scores"] >= min_score
        listed.append({"image": str(name), "drawn": drawn.name, "detections": [
            {"class": payload["classes"][label], "score": round(score, 4), "box": [round(x, 1) for x in box]}
            for label, score, box in zip(*(result[k][keep].tolist() for k in ("labels", "scores", "boxes")))]})
    write_json(out / "predictions.json", listed)
    print(f"{len(images)} images, boxes are x0 y0 x1 y1 in pixels: {out}/predictions.json and pictures beside it")


def look(checkpoint, images, out, best, layer, size, device):
    """Pictures of what detectors look at, OUT/000_NAME_MODEL_layers.png and so on: `look --help` names them all."""
    device, out, detectors, listed = pick_device(device), Path(out), {}, []
    if best < 1:
        raise ValueError(f"--best {best}: want at least 1")
    for path in checkpoint:
        model, payload = load_model(path)
        file = payload["path"].resolve()
        name = file.parent.name if file.stem in ("best", "last") else file.stem
        if name in detectors:
            raise ValueError(f"--checkpoint {path}: another one is called {name} too, rename its file or folder")
        if layer is not None and not 0 <= layer < model.decoder_layers:
            raise ValueError(f"--layer {layer}: the decoder layers of {name} are 0 to {model.decoder_layers - 1}")
        detectors[name] = model.to(device), payload
        if payload["classes"] != (classes := next(iter(detectors.values()))[1]["classes"]):
            raise ValueError(f"{path} knows other classes than {checkpoint[0]}: compare detectors of the same classes")
    first, *others = detectors
    out.mkdir(parents=True, exist_ok=True)
    for index, file in enumerate(tqdm(images, "look", mininterval=quiet_interval())):
        picture, seen, figures = data.read_image(file), {}, {}
        for name, (model, payload) in detectors.items():
            sides = parse_size(size or payload["settings"]["size"]) or data.DEFAULT_SIZE[payload["data"]]
            image = data.prepare(picture, sides)[None].to(device)                          # (1, 3, h, w)
            seen[name] = looks.watch(model, image, picture, best, layer, seen.get(first))
            drawn = looks.pictures(name, picture, seen[name], classes)
            figures |= {f"{name}_{what}": figure for what, figure in drawn.items()}
        if others:
            seen = looks.compare(seen)
            figures["beside"] = looks.beside(picture, seen, classes)
        for what, figure in figures.items():
            figure.savefig(out / f"{index:03d}_{Path(file).stem}_{what}.png", dpi=150)
        listed.append({"image": str(file), "detections": looks.listed(seen, classes)})
    write_json(out / "look.json", listed)
    print("\n".join(looks.summary([found for one in listed for found in one["detections"]], first, others)
                    + [f"{len(images)} images: pictures, and look.json with the detections shown, in {out}/"]))


def export(checkpoint, out):
    """A checkpoint's weights alone, in half the bytes: fp16 safetensors with its classes and figures beside them."""
    model, payload = load_model(checkpoint)
    payload["settings"] = {k: v for k, v in payload["settings"].items() if k not in tables.PLACES}
    keep = {k: payload[k] for k in ("detector", "config", "classes", "category_ids", "data", "metrics", "minutes",
                                    "step", "seed", "commit", "machine", "settings")}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(out, {"model": model.state_dict(), **keep}, half=True)
    ap = payload["metrics"].get("AP", math.nan)
    print(f"{out}: {Path(out).stat().st_size / 1e6:.2f} MB, AP {ap:.3f} before rounding to fp16")


# ---------------------------------------------------------------------------------------------------------------------
# The demo: teacher, student alone, the same student distilled
# ---------------------------------------------------------------------------------------------------------------------

DEMO = {
    "full": dict(out="runs/demo", root="datasets/toy", counts=dict(train=4000, val=500, tune=500), student={},
                 teacher={}, eval_every=400),
    "quick": dict(out="runs/demo-quick", root="datasets/toy-quick", counts=dict(train=80, val=20, tune=4),
                  student=dict(steps=20, warmup=5, teacher_floor=0.0), teacher=dict(steps=20, warmup=5), eval_every=10),
}


def demo(scale, teacher, device, seed=0):
    """From nothing to a distilled student: data, teacher, student alone, student distilled, table, pictures.

    Every stage goes on where it was cut off, and is not repeated once it is done.
    """
    plan = DEMO[scale]
    out = Path(plan["out"])
    if scale == "quick":
        say("SCALE=quick shows that everything runs. Its figures mean nothing: far too few images and steps.")
    data.make_toy(plan["root"], counts=plan["counts"])
    common = dict(root=plan["root"], seed=seed)

    def stage(name, recipe, taught_by=None, **changes):
        cfg = Config(**RECIPES[recipe]["dino"] | common | plan["teacher" if name == "teacher" else "student"] | changes)
        folder = out / name
        checkpoints.set_aside(folder, plain(cfg), taught_by, say)
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text())
            say(f"{name}: done before, AP {result['AP']:.3f}")
            return result
        say(f"\n=== {name} ===")
        return fit(cfg, Run(out=str(folder), resume=True, device=device, workers=1, eval_every=plan["eval_every"],
                            eval_batch=20, save_minutes=0.5))

    alone = dict(teacher=None, method=None, method_options=())
    if teacher == "scratch":
        results, teacher_path = {"teacher": stage("teacher", "toy-teacher", **alone)}, out / "teacher"
    else:
        shipped = SHIPPED_TEACHERS["dino"]
        say(f"\n=== teacher: shipped weights, {shipped.relative_to(HERE)}; make demo TEACHER=scratch trains it ===")
        results = {"teacher": shipped_teacher(shipped, plan["root"], pick_device(device))}
        teacher_path = Path(os.path.relpath(shipped))
    taught_by = fingerprint(load_model(teacher_path)[0])
    results["student"] = stage("student", "toy-student", **alone)
    results["distilled"] = stage("distilled", "toy-student", taught_by, teacher=str(teacher_path))
    for result in results.values():
        result.setdefault("trained_minutes", result["minutes"])
    device = pick_device(device)
    write_json(out / "summary.json", results | {"machine": machine(device), "commit": commit(), "scale": scale})
    draw_demo(out, teacher_path, results, plan, device)
    print_table(results, scale, machine(device))


def shipped_teacher(path, root, device):
    """A teacher that comes with the repository, measured here and now -> what `fit` returns of a run."""
    model, payload = load_model(path)
    model = model.to(device)
    dataset = data.build("toy", root, "val")
    same_classes(payload, dataset, path)
    scores = data.evaluate(detect(model, dataset, Run(), 20), dataset)
    say(f"AP {scores['AP']:.3f}")
    return {**scores, "params": count_parameters(model), "gflops": models.gflops(model, *dataset[0][0].shape[1:]),
            "minutes": 0.0, "trained_minutes": payload["minutes"], "steps": payload["step"], "seed": payload["seed"],
            "images_per_second": speed_of(model, dataset), "history": [], "machine": payload["machine"],
            "commit": payload["commit"], "settings": payload["settings"], "weights": fingerprint(model)}


def print_table(results, scale, where):
    columns = (("AP", "AP", "{:.3f}"), ("AP50", "AP50", "{:.3f}"), ("AP75", "AP75", "{:.3f}"),
               ("params", "params (M)", "{:.2f}"), ("gflops", "GFLOPs", "{:.3f}"),
               ("trained_minutes", "training (min)", "{:.1f}"), ("images_per_second", "images/s", "{:.0f}"))
    print("\n" + f"{'':12}" + "".join(f"{title:>16}" for _, title, _ in columns))
    for name, result in results.items():
        values = [result[key] / (1e6 if key == "params" else 1) for key, _, _ in columns]
        print(f"{name:12}" + "".join(f"{form.format(value):>16}" for value, (_, _, form) in zip(values, columns)))
    gain = results["distilled"]["AP"] - results["student"]["AP"]
    print(f"\nCLoCKDistill: {gain:+.3f} AP for the same student, seed and number of steps"
          + ("; figures of SCALE=quick mean nothing." if scale == "quick" else ", one seed.")
          + f"\nimages/s: one image at a time, {where}; training minutes include evaluation")


def draw_demo(out, teacher_path, results, plan, device):
    """The demo's pictures, on the first validation scenes with four or more objects: chosen before looking."""
    dataset = data.build("toy", plan["root"], "val")
    shown = [i for i in range(len(dataset)) if len(dataset[i][1]["labels"]) >= 4][:4] or [0]
    batch = data.collate([dataset[i] for i in shown]).to(device)
    scenes = [dataset.raw(i) for i in shown]
    images = [image for image, _ in scenes]
    networks = {"teacher": load_model(teacher_path)[0].to(device)}
    networks |= {name: load_model(out / name)[0].to(device) for name in ("student", "distilled")}
    sizes = torch.stack([torch.as_tensor(t["orig_size"]) for t in batch.targets])
    with torch.no_grad():
        found = {name: models.postprocess(network(batch.images, batch.padding).detections, sizes, 100)
                 for name, network in networks.items()}
    truths = [truth for _, truth in scenes]
    pictures = {"detections": plots.detections(images, truths, found, dataset.classes, min_score=0.3)}

    one, target = batch.images[:1], batch.targets[0]
    boxes, nothing = target["boxes"], torch.zeros_like(batch.padding[:1])
    with torch.no_grad():
        memory = networks["teacher"].encode(one, nothing)
    masks = [location_mask(boxes, height, width) for height, width in memory.shapes]
    pictures["location_masks"] = plots.location_masks(images[0], truths[0]["boxes"], masks)

    saved = checkpoints.load(out / "distilled" / "last.pt")
    cfg = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved["settings"].items()})
    method = open_method(cfg, networks["teacher"], networks["distilled"])
    method.load_state_dict(saved["resume"]["method"])
    teacher, groups = networks["teacher"], method.query_options["groups"]
    method.query_options["box_noise"] = 0.0                                 # for the picture: the true boxes
    embedding = content_of(teacher, method)
    with torch.no_grad():
        content, reference, attend, _ = method.queries([target["labels"]], [boxes], embedding)
    largest = boxes[:, 2:].prod(1).argsort(descending=True)[:3].cpu()
    attention, true_boxes = {}, truths[0]["boxes"][largest]
    for name, network in networks.items():
        asked = content if name == "teacher" else method.student_content(content)
        with torch.no_grad(), models.record(network) as seen:
            memory = network.encode(one, nothing)
            network.decode(memory, asked, reference, attend)
        final = seen[f"decoder.{network.decoder_layers - 1}.cross"]
        # Of the first group, none of the random ones.
        attention[name] = plots.look(final, memory.shapes, largest * groups) | {"boxes": true_boxes}
    pictures["query_attention"] = plots.query_attention(
        images[0], attention, [dataset.classes[label] for label in target["labels"][largest]], memory.shapes[0],
        title="Where the same target-aware queries look in each model, and how far they agree with the teacher")

    histories = {name: [(point["step"], point["AP"]) for point in result["history"]] or result["AP"]
                 for name, result in results.items()}
    pictures["ap_curves"] = plots.curves(histories, "AP on the toy's val split")
    log = [json.loads(line) for line in (out / "distilled" / "log.jsonl").read_text().splitlines()]
    skip = ("step", "loss", "grad_norm", "lr", "images", "seconds", "report")
    pictures["losses"] = plots.losses({name: [(line["step"], line[name]) for line in log if name in line]
                                       for name in log[-1] if name not in skip})
    inside, _ = masks[0]                                                    # the finest level, as this student had it
    everywhere = torch.ones_like(memory.tokens[..., 0], dtype=torch.bool)   # nothing is padded
    weight = memory_weights([boxes], memory.shapes, everywhere, **method.memory_options)[0, :inside.numel()]
    pictures["first"] = plots.first(images[0], truths[0], (inside, weight.view_as(inside)), found["student"][0],
                                    found["distilled"][0], dataset.classes, min_score=0.3)
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    say(f"pictures   {', '.join(f'{name}.png' for name in pictures)} in {out}/")


# ---------------------------------------------------------------------------------------------------------------------
# Tables: many runs of the commands above
# ---------------------------------------------------------------------------------------------------------------------

def settings_of(arguments):
    """The arguments of a `fit` or `distill` -> its settings, as plain values."""
    given = vars(command_line().parse_args(arguments))
    command, _ = given.pop("command"), given.pop("debug")
    return plain(configure(given, command)[0])


def table(scale, root, work, results, only, jobs, shard, rebuild, dry_run, tflops, teachers, teacher_floor, changes):
    """See tables.py."""
    def build(settings):
        classes = 80 if scale == "coco" else 3
        overrides = {name: settings[name] for name in MODEL_FIELDS if settings[name] is not None}
        frozen = overrides.pop("pretrained_backbone", "imagenet") != "none"      # the same model, nothing downloaded
        return models.build(settings["detector"], classes, pretrained_backbone=False, frozen_backbone=frozen,
                            **overrides)

    shipped = {name: path for name, path in SHIPPED_TEACHERS.items() if path.exists()}
    if scale != "toy" or teachers == "scratch" or changes:
        shipped = {}
    root = root or ("datasets/toy" if scale == "toy" else None)
    if root is None and not dry_run:
        raise ValueError(f"table {scale} needs --root, the folder of the data ({tables.SCALES[scale].download})")
    results = results or (f"runs/table-{scale}-changed/results" if changes else f"results/{scale}")
    work = work or (f"runs/table-{scale}-changed" if changes else f"runs/table-{scale}")
    root, work = (path and str(Path(path).resolve()) for path in (root, work))    # the runs start where this file lies
    device = pick_device()
    if jobs is None:
        jobs = 1 if device.type != "cpu" else os.cpu_count() or 1
    if scale == "toy" and not (rebuild or dry_run):
        data.make_toy(root)                                  # before several runs would draw it at once
    site = tables.Site(scale, root or "ROOT", work, results, settings_of, build, changes=changes, floor=teacher_floor,
                       teachers=shipped, measure=lambda path: shipped_teacher(path, root, device),
                       identify=lambda path: fingerprint(load_model(path)[0]),
                       reads=lambda path: what_is_read(path, root), device=device, machine=machine(device))
    return tables.make(site, only, jobs, shard, rebuild, dry_run, tflops)


def measure_speed(given):
    """The command `bench`, see bench.py."""
    device, threads, out = pick_device(given.pop("device")), given.pop("threads"), given.pop("out")
    if threads:
        torch.set_num_threads(threads)
    if given["quick"]:
        given |= {name: value for name, value in dict(height=64, width=96, repeats=2).items() if name not in given}
    options = bench.Options(**given)
    print(machine(device))
    told = bench.run(options, device, Learner, teach)
    if out:
        write_json(out, {"machine": machine(device), "commit": commit(), "options": dataclasses.asdict(options)} | told)


def what_is_read(path, root):
    """{content of the target-aware queries: looks.reading} of a toy teacher, on 200 images of the split "tune"."""
    teacher, _ = load_model(path)
    batches = list(data.eval_loader(data.build("toy", root, "tune", limit=200), 20))
    found = {}
    for content, noise in (("label", 0.), ("label", .25), ("random_label", 0.), ("own", 0.), ("random", 0.),
                           ("zero", 0.)):
        method = CLoCKDistill(*[teacher.config["hidden_dim"]] * 2, content=content, label_noise=noise, box_noise=0.4,
                              num_classes=teacher.num_classes)
        embedding = content_of(teacher, method)
        if embedding is not None or content.startswith(("random", "zero")):
            name = content + (f", noise {noise}" if noise else "")
            found[name] = looks.reading(teacher, method, embedding, batches)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

DISTILLATION = ("teacher", "method", "method_options", "teacher_floor")
EVALUATION = ("data", "root", "val_split", "class_map", "limit", "size")


def official(name):
    """The official value of a setting, for `--help`: of each detector, where they differ."""
    if name == "pretrained_backbone":
        return "imagenet"                                    # the command line's word for models.build's True
    backbone = inspect.signature(models.build).parameters
    if name in backbone:
        return backbone[name].default
    values = {d: (models.options_of(d) | SCHEDULES[d])[name] for d in models.DETECTORS
              if name in models.options_of(d) | SCHEDULES[d]}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{detector} {value:.4g}" for detector, value in values.items())


def add_options(parser, cls, only=None, without=()):
    """One command line option for each field of a configuration; options not given are left out of the result."""
    for field in dataclasses.fields(cls):
        if field.name in without or only is not None and field.name not in only:
            continue
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        kind = next(t for t in getattr(kind, "__args__", (kind,)) if t is not type(None))
        text = field.metadata["help"] + ("" if field.default in (None, ()) else f" (default: {field.default})")
        if field.name in MODEL_FIELDS or field.name in SCHEDULES["dino"]:
            text += f" (official: {official(field.name)})"
        extra = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra |= {"type": kind, "metavar": kind.__name__.upper()}
            if kind is tuple:
                extra |= {"type": str, "metavar": "NAME=VALUE"}
            extra |= {k: v for k, v in field.metadata.items() if k in ("choices", "nargs")}
            if "choices" in extra:
                del extra["metavar"]
        parser.add_argument(flag, **extra)


def describe_methods():
    """The options of each distillation method, for `distill --help`."""
    lines = []
    for name, cls in METHODS.items():
        options = [f"{option}={default}" for option, default in method_defaults(cls).items()]
        lines.append(f"--method-options of {name}, with their defaults; {cls.__module__}.py says what each does:\n  "
                     + " ".join(options))
    return "\n".join(lines)


def command_line():
    text = argparse.RawDescriptionHelpFormatter
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="train.py", formatter_class=text, description=summary, epilog="""
examples:
  python train.py demo                                     all of it, on generated images, in minutes
  python train.py fit --data kitti --root DIR --out runs/teacher --backbone resnet50
  python train.py distill --data kitti --root DIR --out runs/student --backbone resnet18 --teacher runs/teacher
  python train.py eval --checkpoint runs/student/best.pt --data kitti --root DIR
  torchrun --nproc_per_node 4 train.py fit ...             several GPUs: --batch-size is of each process
AP values are fractions 0..1. Give --debug for the whole traceback of an error.""")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error instead of one line")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser("demo", parents=[debug], help="teacher, student, distilled student on the toy KITTI")
    p.add_argument("--scale", choices=DEMO, default="full", help="quick: under 3 minutes, figures without meaning")
    p.add_argument("--teacher", choices=("shipped", "scratch"), default="shipped", help="its weights, or train it here")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")

    recipes = "recipes (given options override them; without --recipe --data toy takes toy-student):\n" + "\n".join(
        f"  {name}, {detector}: " + " ".join(f"{k}={v}" for k, v in recipe.items())
        for name, recipes in RECIPES.items() for detector, recipe in recipes.items())
    for name, purpose, without in (("fit", "train a detector", DISTILLATION),
                                   ("distill", "train a student with a teacher", ())):
        p = commands.add_parser(name, parents=[debug], help=purpose, formatter_class=text,
                                epilog=recipes + ("\n\n" + describe_methods() if name == "distill" else ""))
        p.add_argument("--recipe", choices=RECIPES, help="a named set of options, listed below")
        add_options(p, Config, without=without)
        add_options(p, Run)
        if name == "distill":
            p.set_defaults(method="clockdistill")

    p = commands.add_parser("eval", parents=[debug], help="COCO AP of a checkpoint on a split",
                            epilog="--data, --class-map and --size are those of the training when not given")
    p.add_argument("--checkpoint", required=True, help="last.pt, best.pt, exported safetensors, or a run's folder")
    p.add_argument("--out", help="also write the figures to this JSON file")
    add_options(p, Config, only=EVALUATION)
    add_options(p, Run, only=("device", "workers", "eval_batch"))

    p = commands.add_parser("predict", parents=[debug], help="draw and list the detections of image files")
    p.add_argument("--checkpoint", required=True, help="last.pt, best.pt, exported safetensors, or a run's folder")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    p.add_argument("--out", default="runs/predict", help="folder of the output (default: %(default)s)")
    p.add_argument("--min-score", type=float, default=0.4, help="weaker detections are left out (default: %(default)s)")
    p.add_argument("--size", help="resize to SHORT,MAX pixels; default: as the checkpoint was trained")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")

    p = commands.add_parser("table", parents=[debug], formatter_class=text, help="many runs, one table: see tables.py",
                            epilog="Options of fit and distill after -- go to every run, and the figures elsewhere:\n"
                                   "  python train.py table kitti --root DIR -- --steps 100 --size 160,540")
    p.add_argument("scale", choices=tables.SCALES)
    p.add_argument("--root", help="folder of the data (toy: datasets/toy)")
    p.add_argument("--only", nargs="+", choices=tables.TABLES, default=tables.TABLES, help="these tables")
    p.add_argument("--dry-run", action="store_true", help="print every run's command and cost, and what to download")
    p.add_argument("--rebuild", action="store_true", help="no runs: tables and figures from the results there are")
    p.add_argument("--shard", type=tables.shard, default=(0, 1), metavar="I/N", help="every N-th run from the I-th")
    p.add_argument("--jobs", type=int, help="runs at once (default: one a CPU core, one in all on a GPU)")
    p.add_argument("--teachers", choices=("shipped", "scratch"), default="shipped", help="of the toy")
    p.add_argument("--work", help="folder of the runs' folders (default: runs/table-SCALE)")
    p.add_argument("--results", help="folder of the results (default: results/SCALE)")
    p.add_argument("--tflops", type=float, default=20., help="dry run: useful work a second (default: %(default)s)")
    p.add_argument("--teacher-floor", type=float, help="as of distill; 0 for runs too short to make a teacher")

    p = commands.add_parser("look", parents=[debug], formatter_class=text,
                            help="draw what the queries and tokens of detectors look at", epilog=looks.FILES)
    p.add_argument("--checkpoint", required=True, action="append", metavar="FILE",
                   help="last.pt, best.pt, exported safetensors, or a run's folder; given several times, the first one "
                        "(the teacher) says which objects are shown")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    p.add_argument("--out", default="runs/look", help="folder of the output (default: %(default)s)")
    p.add_argument("--best", type=int, default=4, help="how many of the best detections (default: %(default)s)")
    p.add_argument("--layer", type=int, help="decoder layer of the heads and of the comparison; default: the last")
    p.add_argument("--size", help="resize to SHORT,MAX pixels; default: as each checkpoint was trained")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")

    p = commands.add_parser("bench", parents=[debug], help="speed, memory, parameters and GFLOPs of the detectors")
    for name, default, text in (("height", 640, "of the images"), ("width", 640, "of the images"),
                                ("batch", 2, "images at once"), ("repeats", 5, "of everything, interleaved")):
        p.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    p.add_argument("--detectors", nargs="+", choices=models.DETECTORS, default=models.DETECTORS, help="(default: all)")
    p.add_argument("--only", nargs="+", choices=bench.PARTS, default=bench.PARTS, help="(default: all)")
    p.add_argument("--compile", action="store_true", help="through torch.compile")
    p.add_argument("--quick", action="store_true", help="tiny models and images: that everything runs, not how fast")
    p.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--out", help="also write all figures to this JSON file")

    p = commands.add_parser("export", parents=[debug], help="weights alone as fp16 safetensors: small, safe to publish")
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--out", required=True, help="file ending in .safetensors")
    return parser


def configure(given, command):
    """Options given on the command line, over a recipe, over the defaults -> (Config, Run)."""
    recipe = given.pop("recipe", None) or ("toy-student" if given.get("data", "toy") == "toy" else None)
    detector = given.setdefault("detector", Config.detector)
    settings = RECIPES[recipe][detector] if recipe else {}
    if given.get("method", settings.get("method")) != settings.get("method"):
        settings = settings | {"method_options": ()}               # the recipe's are options of its own method
    settings = settings | {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    if command == "fit":
        settings |= dict(teacher=None, method=None, method_options=())
    if command == "distill" and not settings.get("teacher"):
        raise ValueError("distill needs --teacher: the folder or checkpoint of a trained run")
    of_run = {field.name: settings.pop(field.name) for field in dataclasses.fields(Run) if field.name in settings}
    return Config(**settings), Run(**of_run)


def main(arguments=None):
    arguments, changes = list(sys.argv[1:] if arguments is None else arguments), []
    if arguments[:1] == ["table"] and "--" in arguments:
        index = arguments.index("--")
        arguments, changes = arguments[:index], arguments[index + 1:]
    given = vars(command_line().parse_args(arguments))
    command, debug = given.pop("command"), given.pop("debug")
    try:
        if command == "demo":
            demo(**given)
        elif command in ("fit", "distill"):
            fit(*configure(given, command))
        elif command == "eval":
            evaluate_checkpoint(given.pop("checkpoint"), given)
        elif command == "predict":
            predict(**given)
        elif command == "look":
            look(**given)
        elif command == "export":
            export(**given)
        elif command == "bench":
            measure_speed(given)
        elif command == "table":
            return table(**given, changes=changes)
    except Interrupted as stop:
        print(f"{stop}; the same command (fit and distill: with --resume) goes on", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped at once; the same command (fit and distill: with --resume) goes on from the last checkpoint",
              file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:      # what a user can mend, said in one line
        if debug:
            print(getattr(error, "details", ""), file=sys.stderr)   # a worker process's own traceback
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
