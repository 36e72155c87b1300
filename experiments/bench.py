"""How fast and how large the detectors are: `python train.py bench`.

Every figure is a median of interleaved repeats: in each round all variants run once, one after the
other, so that a machine that gets slower gets slower for all of them. The variants: ours in fp32
and bf16; Hugging Face transformers' implementation, where it has one, with the same weights, the
same parameters trainable, no dropout and its own loss; a distillation step and its parts. A large
matrix product runs in each round too: the share of its operations per second that a detector
reaches says how close to the machine it is. Weights are random: they change nothing about speed.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import io
import os
import re
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import checkpoints
import data
import models
import train
from clockdistill import CLoCKDistill

# Million parameters and GFLOPs as published (READMEs of the official repositories), R50, 91
# classes.
PUBLISHED = {"dab_detr": (44, 94), "deformable_detr": (40, 173), "dino": (47, 279)}
PARTS = ("size", "inference", "training", "distill")


@dataclass(frozen=True)
class Options:
    height: int = 640
    width: int = 640
    batch: int = 2
    repeats: int = 5
    detectors: tuple = models.DETECTORS
    only: tuple = PARTS
    precision: tuple = ("fp32", "bf16")
    compile: bool = False
    quick: bool = False                # tiny models: that everything runs, not how fast

    @property
    def architecture(self):
        """Changes to the official defaults; the two implementations place dropout differently."""
        if not self.quick:
            return dict(backbone="resnet50", dropout=0.)
        return dict(backbone="resnet50", backbone_width=8, hidden_dim=32, heads=4, ffn_dim=48,
                    encoder_layers=1, decoder_layers=2, num_queries=12, dropout=0.)


def build(detector, options, classes=91, **overrides):
    """Ours, as it is with pretrained weights: norms, stem and first stage frozen."""
    torch.manual_seed(0)
    return models.build(detector, classes, pretrained_backbone=False, frozen_backbone=True,
                        **options.architecture | overrides)


def build_transformers(model):
    """transformers' model of the same size; None where it has none (DINO) or is not installed."""
    if model.detector == "dino" or importlib.util.find_spec("transformers") is None:
        return None
    import transformers
    c = model.config
    width = c["backbone_width"]
    depths = models.RESNETS[c["backbone"]][1]
    if model.detector == "dab_detr":
        config, kind = transformers.DabDetrConfig, transformers.DabDetrForObjectDetection
        own, stages = {"hidden_size": c["hidden_dim"]}, ["stage4"]
    else:
        config = transformers.DeformableDetrConfig
        kind = transformers.DeformableDetrForObjectDetection
        own, stages = {"d_model": c["hidden_dim"]}, ["stage2", "stage3", "stage4"]
    backbone = transformers.ResNetConfig(
        embedding_size=width, hidden_sizes=[width * 4, width * 8, width * 16, width * 32],
        depths=list(depths), layer_type="bottleneck", out_features=stages)
    other = kind(config(
        backbone_config=backbone, num_labels=model.num_classes, num_queries=c["num_queries"],
        encoder_layers=c["encoder_layers"], decoder_layers=c["decoder_layers"],
        encoder_ffn_dim=c["ffn_dim"], decoder_ffn_dim=c["ffn_dim"],
        encoder_attention_heads=c["heads"], decoder_attention_heads=c["heads"],
        dropout=0., attention_dropout=0., activation_dropout=0., auxiliary_loss=True, **own))
    # The same parameters train as in ours: transformers freezes no part of DAB-DETR's ResNet, and
    # all of Deformable DETR's.
    for name, parameter in other.named_parameters():
        if "backbone" in name:
            parameter.requires_grad_("embedder" not in name and "stages.0." not in name)
    return other


def pair(detector, options, device):
    """-> {"ours": model, "transformers": model, if there is one}, with the same weights."""
    model = build(detector, options)
    other = build_transformers(model)
    if other is None:
        return {"ours": model.to(device)}
    # transformers' DAB-DETR clamps its inverse sigmoid at 1e-5, which changes values near 0 and 1,
    # and no speed.
    if detector == "dab_detr":
        model = build(detector, options, logit_eps=1e-5)
    with contextlib.redirect_stdout(io.StringIO()):
        weights = {name: value.clone() for name, value in other.state_dict().items()}
        checkpoints.load_weights(model, weights, made_with={"heads": model.config["heads"]})
    return {"ours": model.to(device), "transformers": other.to(device)}


def batch_of(options, device, objects=10, classes=91):
    """Random images with `objects` objects each, the last one narrower, so that it is padded."""
    g = torch.Generator().manual_seed(0)
    items = []
    widths = [options.width] * options.batch
    if options.batch > 1:
        widths[-1] = int(0.85 * options.width)
    for image, width in enumerate(widths):
        pixels = torch.randn(3, options.height, width, generator=g)
        size = 0.05 + 0.3 * torch.rand(objects, 2, generator=g)
        centre = size / 2 + (1 - size) * torch.rand(objects, 2, generator=g)
        labels = torch.randint(classes, (objects,), generator=g)
        items.append((pixels, {"labels": labels, "boxes": torch.cat([centre, size], 1),
                               "image_id": torch.tensor(image)}))
    return data.collate(items).to(device)


def forward_of(model, batch):
    """() -> last layer's logits."""
    if hasattr(model, "detector"):
        return lambda: model(batch.images, batch.padding).detections.logits[-1]
    mask = (~batch.padding).long()
    return lambda: model(pixel_values=batch.images, pixel_mask=mask).logits


def loss_of(model, batch):
    """() -> the weighted loss."""
    if hasattr(model, "detector"):
        def ours():
            output = model(batch.images, batch.padding, batch.targets)
            return sum(model.weighted_losses(output, batch.targets).values())
        return ours
    mask = (~batch.padding).long()
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in batch.targets]
    return lambda: model(pixel_values=batch.images, pixel_mask=mask, labels=labels).loss


def training_step(module, loss):
    """() -> None: forward, backward, clip, AdamW."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=1e-4)

    def step():
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


PRODUCT = "matrix product"


def products(options, device):
    """{name: () -> product}: a large one in each precision, the most that the machine reaches."""
    side = 256 if options.quick else 2048
    runs = {}
    for precision in options.precision:
        matrix = torch.rand(side, side, device=device).to(train.PRECISIONS[precision])
        runs[named(PRODUCT, precision)] = functools.partial(torch.mm, matrix, matrix)
    return runs


def named(what, precision):
    """The row of a variant: "ours" in fp32, "ours, bf16"."""
    return what if precision == "fp32" else f"{what}, {precision}"


def interleaved(runs, repeats, device, title, count=True):
    """{name: () -> anything} -> {name: row}.

    A row is {"seconds": median, "all": [..], "peak_gb": .. or None} and, with `count`,
    {"gflops_per_second", "of_product": the share of what the matrix product of that precision
    reaches, where it is one of the runs}.
    """
    times = {name: [] for name in runs}
    for run in runs.values():
        run()                                                # allocates, compiles, fills caches
    for _ in tqdm(range(repeats), title, leave=False):
        for name, run in runs.items():
            times[name].append(seconds_of(run, device))
    rows = {}
    for name, run in runs.items():
        seconds = statistics.median(times[name])
        rows[name] = {"seconds": seconds, "all": times[name], "peak_gb": peak_of(run, device)}
        if count:
            rows[name]["gflops_per_second"] = operations(run) / 1e9 / seconds
    for name, row in rows.items():
        _, _, precision = name.partition(", ")
        product = rows.get(named(PRODUCT, precision or "fp32"), {})
        if most := product.get("gflops_per_second"):
            row["of_product"] = row["gflops_per_second"] / most
    return rows


class Operations(TorchDispatchMode):
    """Counts floating-point operations: convolutions, matrix products, dense attention.

    Two for a multiply-add, in the backward pass too. Sampling, norms and activations take time and
    count nothing.
    """
    # torch's counter knows the dense attention of CUDA alone; the CPU's takes the same shapes.
    aten = torch.ops.aten
    counted = flop_registry | {
        aten._scaled_dot_product_flash_attention_for_cpu:
            flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            flop_registry[aten._scaled_dot_product_flash_attention_backward]}
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if count := self.counted.get(function.overloadpacket):
            self.total += count(*args, **kwargs, out_val=result)
        return result


def operations(run):
    """Floating-point operations of run()."""
    with Operations() as counter:
        run()
    return counter.total


def images_per_second(networks, image, seconds=2.0):
    """{name: detector} -> {name: images per second}, from image (1, 3, H, W) to detections.

    Pre-processing is not counted. Median of interleaved repeats, as many as take `seconds` for each
    detector, three at least. All on the image's device; training or evaluation mode is left as it
    was.
    """
    size = tuple(image.shape[2:])
    padding = torch.zeros_like(image[:, 0], dtype=torch.bool)            # nothing is padded
    modes = {name: network.training for name, network in networks.items()}
    times = {name: [] for name in networks}

    def detect(network):
        models.postprocess(network(image, padding).detections, [size], 100)

    spent = rounds = 0
    while rounds < 3 or spent < seconds * len(networks):
        for name, network in networks.items():
            with torch.no_grad():
                took = seconds_of(functools.partial(detect, network.eval()), image.device)
            times[name].append(took)
            spent += took
        rounds += 1
    for name, network in networks.items():
        network.train(modes[name])
    return {name: 1 / statistics.median(each) for name, each in times.items()}


def seconds_of(run, device):
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_of(run, device):
    """GB that a run takes at its highest, in addition to what was taken before it.

    None where it cannot be known: without CUDA, without glibc.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e9
    if device.type != "cpu" or not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None

    def status(key):
        kilobytes, = re.findall(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(kilobytes) / 1e6

    gc.collect()
    libc.malloc_trim(0)                   # what earlier runs left in the heap would hide this one's
    Path("/proc/self/clear_refs").write_text("5")            # the highest so far is forgotten
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def show(title, rows, batch, against=None):
    """Print the rows of `interleaved`: the % are of the matrix product, x of the row `against`."""
    print(title)
    for name, row in rows.items():
        text = f"  {name:<28} {row['seconds'] * 1e3:8.1f} ms"
        product = name.startswith(PRODUCT)
        if not product:
            text += f"  {batch / row['seconds']:7.2f} images/s"
        if "of_product" in row:
            text += f"  {row['gflops_per_second']:7.1f} GFLOP/s, {row['of_product']:4.0%}"
        if not product and row["peak_gb"] is not None:
            text += f"  peak {row['peak_gb']:.2f} GB"
        if not product and against in rows and name != against:
            text += f"  x{row['seconds'] / rows[against]['seconds']:.2f}"
        print(text)


def size(detector):
    """Parameters and GFLOPs beside the published ones, from shapes alone."""
    model = models.build(detector, 91, pretrained_backbone=False, frozen_backbone=True)
    parameters, flops = train.count_parameters(model) / 1e6, models.gflops(model, 800, 1333)
    published = PUBLISHED[detector]
    print(f"size: {detector}, R50, 91 classes, 800 x 1333\n"
          f"  {parameters:6.2f} M parameters (published {published[0]})  {flops:6.1f} GFLOPs: "
          f"multiply-adds, dense attention and sampling included (published {published[1]})")
    return {"parameters_m": parameters, "gflops": flops, "published": published}


def compare(part, detector, options, device):
    """Our "inference" or "training" in each precision, beside transformers' in fp32."""
    batch = batch_of(options, device)
    both = pair(detector, options, device)
    with torch.no_grad():
        answers = [forward_of(model.eval(), batch)() for model in both.values()]
    differ = (answers[0] - answers[-1]).abs().max().item()
    runs = {}
    for name, model in both.items():
        model.train(part == "training")
        model = torch.compile(model) if options.compile else model
        for precision in options.precision if name == "ours" else ("fp32",):
            cast = train.autocast(device, precision)
            if part == "inference":
                run = torch.no_grad()(cast(forward_of(model, batch)))
            else:
                run = training_step(model, cast(loss_of(model, batch)))
            runs[named(name, precision)] = run
    rows = interleaved(runs | products(options, device), options.repeats, device,
                       f"{detector}, {part}", count=not options.compile)
    same = f"; the same weights, logits differ by {differ:.1e}" if len(both) > 1 else ""
    show(f"{part}: {detector}, {options.batch} x {options.height} x {options.width}{same}", rows,
         options.batch, "ours")
    return rows | {"logits_differ_by": differ}


def distillation(detector, options, device):
    """A distillation step and its parts: an R50 teaches an R18 of the same detector."""
    teacher = build(detector, options).to(device).eval().requires_grad_(False)
    student = build(detector, options, backbone="resnet18").to(device).train()
    twin = copy.deepcopy(student)
    batch = batch_of(options, device)
    width = teacher.config["hidden_dim"]
    content = "label" if detector == "dino" else "random"
    method = CLoCKDistill(width, width, content=content).to(device)
    taught, alone = train.Learner(student, method), train.Learner(twin)

    no_grad = torch.no_grad()
    encode = no_grad(functools.partial(teacher.encode, batch.images, batch.padding))
    content, boxes, attend, _ = method.queries(batch.labels, batch.boxes, teacher.label_embedding)
    # The whole step first, then what it is made of, each of its own.
    runs = {
        "distillation step": training_step(taught, lambda: sum(taught(teacher, batch).values())),
        "student step": training_step(alone, lambda: sum(alone(None, batch).values())),
        "teacher encode": encode,
        "teacher target-query decode": no_grad(
            functools.partial(teacher.decode, encode(), content, boxes, attend)),
    }
    rows = interleaved(runs | products(options, device), options.repeats, device,
                       f"{detector}, distillation")
    whole, *parts = (rows[name]["seconds"] for name in runs)
    ratio = whole / sum(parts)
    show(f"distill: {detector}, R50 teaches R18; the step is {ratio:.3f} x its parts", rows,
         options.batch)
    return rows | {"whole_over_parts": ratio}


def measure(options, device):
    """All that options.only asks for, printed as it comes -> {part: {detector: figures}}."""
    figures = {part: {} for part in options.only}
    for part, by_detector in figures.items():
        for detector in options.detectors:
            if part == "size":
                by_detector[detector] = size(detector)
            elif part == "distill":
                by_detector[detector] = distillation(detector, options, device)
            else:
                by_detector[detector] = compare(part, detector, options, device)
    return figures


# ----------------------------------------------------------------------------------------------
# What runs would cost: `train.py table --dry-run`
# ----------------------------------------------------------------------------------------------

class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass, each storage once, parameters apart.

    Works on fake tensors.
    """
    def __init__(self, parameters):
        self.counted = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.kept, self.bytes = [], 0
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.counted:
            self.counted.add(storage._cdata)
            self.kept.append(storage)                  # alive: no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


def training_bytes(model, batch, height, width):
    """Estimated peak of a step: weights, gradients, Adam's two averages, and what forward keeps."""
    hooks = SavedBytes([*model.parameters(), *model.buffers()])
    with FakeTensorMode(allow_non_fake_inputs=True), hooks:
        images = torch.zeros(batch, 3, height, width)
        model.train()(images, torch.zeros_like(images[:, 0], dtype=torch.bool))
    return 16 * train.count_parameters(model) + hooks.bytes


def untrained(cfg, images):
    """The model of a run on these images, without weights to download.

    images: what has .most_objects, to which a recipe may fit its queries (train.fit_to_data).
    """
    cfg = train.fit_to_data(cfg, images, cfg.steps or 0)
    return train.build_model(cfg, 80 if cfg.data == "coco" else 3, pretrained_backbone="none",
                             frozen_backbone=cfg.pretrained_backbone != "none")


# Useful work per second: a GPU's, a fifth to a third of its peak; a CPU core's, of which the runs
# of results/ reached 0.012 to 0.036.
TFLOPS = {"GPU": 20., "core": 0.02}


def print_costs(jobs, scope, tflops=None):
    """Print every run with its command, and what it would take.

    jobs: tables.Job, teachers before students.  scope: tables.Scale, its images and its machine.
    tflops: useful work per second of that machine, by default as in TFLOPS.
    """
    tflops = tflops or TFLOPS[scope.machine]
    costs = {}
    hours = []
    for job in jobs:
        cfg = job.cfg
        key = cfg.detector, job.role
        # Models of one role are alike: they are counted once.
        if key not in costs:
            model = untrained(cfg, scope)
            costs[key] = (models.gflops(model, *scope.image_size),
                          training_bytes(model, cfg.batch_size, *scope.image_size),
                          4 * train.count_parameters(model))
        if not job.arguments:                          # a teacher that is trained already
            continue
        forward, memory, _ = costs[key]
        gflops = 3 * forward                           # backward costs two forward passes
        if cfg.method:
            teacher, _, frozen = costs[cfg.detector, "teacher"]
            gflops += teacher
            memory += frozen

        # Images times multiply-adds, two floating-point operations each.
        count = cfg.epochs * scope.images if cfg.steps is None else cfg.steps * cfg.batch_size
        hours.append(count * gflops * 2e9 / (tflops * 1e12) / 3600)
        print(f"{job.name}: about {hours[-1]:.2f} {scope.machine}-hours, {memory / 1e9:.1f} GB\n"
              f"  python {shlex.join(['train.py', *job.arguments])}")
    height, width = scope.image_size
    print(f"\n{len(hours)} runs, {sum(hours):.0f} {scope.machine}-hours at {tflops:g} TFLOP/s of "
          "useful work (--tflops: of a GPU the peak times what training reaches of it, a fifth to a "
          "third), a step being three forward passes and one of the teacher. Memory: weights (also "
          f"the teacher's), gradients, Adam and saved activations in fp32 at {height} x {width}.")


# ----------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------

def add_options(parser):
    """The options of `train.py bench`."""
    numbers = {"height": "of the images", "width": "of the images", "batch": "images at once",
               "repeats": "of everything, interleaved"}
    for name, text in numbers.items():
        parser.add_argument(f"--{name}", type=train.at_least_1, default=argparse.SUPPRESS,
                            help=f"{text} (default: {getattr(Options, name)})")
    parser.add_argument("--detectors", nargs="+", choices=models.DETECTORS,
                        default=models.DETECTORS, help="(default: all)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--precision", nargs="+", choices=train.PRECISIONS,
                        default=Options.precision, help="of inference and training (default: fp32 bf16); distill is fp32")
    parser.add_argument("--compile", action="store_true", help="inference and training through torch.compile")
    parser.add_argument("--quick", action="store_true",
                        help="tiny models and images: that everything runs, not how fast")
    parser.add_argument("--threads", type=train.at_least_1, help="of the CPU (default: torch's)")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    parser.add_argument("--out", help="also write all figures to this JSON file")


def run(device, threads, out, **given):
    """The command `bench`."""
    device = train.pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    if given["quick"]:
        given = dict(height=64, width=96, repeats=2) | given
    options = Options(**given)
    print(train.machine(device))
    figures = measure(options, device)
    if out:
        checkpoints.write_json(out, {"machine": train.machine(device), "commit": train.commit(),
                                     "options": dataclasses.asdict(options)} | figures)
