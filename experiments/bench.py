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
    width, depths = c["backbone_width"], models.RESNETS[c["backbone"]][1]
    stages = [f"stage{i}" for i in ((4,) if model.detector == "dab_detr" else (2, 3, 4))]
    backbone = transformers.ResNetConfig(
        embedding_size=width, hidden_sizes=[width * 4 * 2 ** i for i in range(4)],
        depths=list(depths), layer_type="bottleneck", out_features=stages)
    common = dict(backbone_config=backbone, num_labels=model.num_classes,
                  num_queries=c["num_queries"], dropout=0., encoder_layers=c["encoder_layers"],
                  decoder_layers=c["decoder_layers"], auxiliary_loss=True,
                  encoder_ffn_dim=c["ffn_dim"], decoder_ffn_dim=c["ffn_dim"], attention_dropout=0.,
                  activation_dropout=0., encoder_attention_heads=c["heads"],
                  decoder_attention_heads=c["heads"])
    if model.detector == "dab_detr":
        config, kind = transformers.DabDetrConfig, transformers.DabDetrForObjectDetection
        common["hidden_size"] = c["hidden_dim"]
    else:
        config = transformers.DeformableDetrConfig
        kind = transformers.DeformableDetrForObjectDetection
        common["d_model"] = c["hidden_dim"]
    other = kind(config(**common))
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
    model = build(detector, options, **({"logit_eps": 1e-5} if detector == "dab_detr" else {}))
    with contextlib.redirect_stdout(io.StringIO()):
        weights = {name: value.clone() for name, value in other.state_dict().items()}
        checkpoints.load_weights(model, weights,
                                 made_with={"heads": model.config["heads"]})
    return {"ours": model.to(device), "transformers": other.to(device)}


def batch_of(options, device, objects=10, classes=91):
    """Random images, the last one padded at the right, with `objects` objects each."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.height, options.width, generator=g)
    padding = torch.zeros(options.batch, options.height, options.width, dtype=torch.bool)
    padding[-1, :, int(0.85 * options.width):] = options.batch > 1
    targets = []
    for image in range(options.batch):
        size = 0.05 + 0.3 * torch.rand(objects, 2, generator=g)
        boxes = torch.cat([size / 2 + (1 - size) * torch.rand(objects, 2, generator=g), size], 1)
        targets.append({"labels": torch.randint(classes, (objects,), generator=g), "boxes": boxes,
                        "image_id": torch.tensor(image)})
    return data.Batch(images.masked_fill_(padding[:, None], 0.), padding, targets).to(device)


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
    side, runs = 256 if options.quick else 2048, {}
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
    rows = {name: {"seconds": statistics.median(each), "all": each,
                   "peak_gb": peak_of(runs[name], device)}
            for name, each in times.items()}
    for name in runs if count else ():
        rows[name]["gflops_per_second"] = operations(runs[name]) / 1e9 / rows[name]["seconds"]
    for name, row in rows.items():
        _, _, precision = name.partition(", ")
        if most := rows.get(named(PRODUCT, precision or "fp32"), {}).get("gflops_per_second"):
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

    def __torch_dispatch__(self, function, types, words=(), options=None):
        result = function(*words, **options or {})
        if count := self.counted.get(function.overloadpacket):
            self.total += count(*words, **options or {}, out_val=result)
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
    nothing, size = torch.zeros_like(image[:, 0], dtype=torch.bool), tuple(image.shape[2:])
    modes = {name: network.training for name, network in networks.items()}
    times = {name: [] for name in networks}
    for network in networks.values():
        network.eval()
    with torch.no_grad():
        # Three rounds at least, and as many as the time allows.
        while (min(map(len, times.values()), default=3) < 3
               or sum(map(sum, times.values())) < seconds * len(times)):
            for name, network in networks.items():
                detect = lambda: models.postprocess(network(image, nothing).detections, [size], 100)
                times[name].append(seconds_of(detect, image.device))
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
    libc = None
    if device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK):
        libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(key))
        return int(line.split()[1]) / 1e6                    # kB

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
        peak = "" if row["peak_gb"] is None else f"  peak {row['peak_gb']:.2f} GB"
        images = f"  {batch / row['seconds']:7.2f} images/s"
        if name.startswith(PRODUCT):
            images = peak = ""
        close = ratio = ""
        if "of_product" in row:
            close = f"  {row['gflops_per_second']:7.1f} GFLOP/s, {row['of_product']:4.0%}"
        if against in rows and name != against and images:
            ratio = f"  x{row['seconds'] / rows[against]['seconds']:.2f}"
        print(f"  {name:<28} {row['seconds'] * 1e3:8.1f} ms{images}{close}{peak}{ratio}")


def sizes(options):
    """Parameters and GFLOPs at 800 x 1333 beside the published ones, from shapes alone."""
    rows = {}
    print("size: R50, 91 classes, 800 x 1333; GFLOPs count multiply-adds, dense attention and "
          "sampling included")
    for detector in options.detectors:
        model = models.build(detector, 91, pretrained_backbone=False, frozen_backbone=True)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        flops = models.gflops(model, 800, 1333)
        rows[detector] = {"parameters_m": parameters, "gflops": flops,
                          "published": PUBLISHED[detector]}
        print(f"  {detector:<16} {parameters:6.2f} M parameters (published "
              f"{PUBLISHED[detector][0]})  {flops:6.1f} GFLOPs (published "
              f"{PUBLISHED[detector][1]})")
    return rows


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

    memory = torch.no_grad()(lambda: teacher.encode(batch.images, batch.padding))()
    asked = method.queries(batch.labels, batch.boxes, teacher.label_embedding)
    # The whole step first, then what it is made of, each of its own.
    runs = {
        "distillation step": training_step(taught, lambda: sum(taught(teacher, batch).values())),
        "student step": training_step(alone, lambda: sum(alone(None, batch).values())),
        "teacher encode": torch.no_grad()(lambda: teacher.encode(batch.images, batch.padding)),
        "teacher target-query decode": torch.no_grad()(lambda: teacher.decode(memory, *asked[:3])),
    }
    rows = interleaved(runs | products(options, device), options.repeats, device,
                       f"{detector}, distillation")
    whole, *parts = (rows[name]["seconds"] for name in runs)
    ratio = whole / sum(parts)
    show(f"distill: {detector}, R50 teaches R18; the step is {ratio:.3f} x its "
         "parts", rows, options.batch)
    return rows | {"whole_over_parts": ratio}


def measure(options, device):
    """All that options.only asks for, printed as it comes -> the same as a dict."""
    figures = {"size": sizes(options)} if "size" in options.only else {}
    batch = batch_of(options, device)
    for detector in options.detectors:
        for part in ("inference", "training"):
            if part not in options.only:
                continue
            both = pair(detector, options, device)
            with torch.no_grad():
                answers = [forward_of(model.eval(), batch)() for model in both.values()]
            agree = max((answers[0] - answer).abs().max().item() for answer in answers)
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
            same = f"; the same weights, logits differ by {agree:.1e}" if len(both) > 1 else ""
            show(f"{part}: {detector}, {options.batch} x {options.height} x "
                 f"{options.width}{same}", rows, options.batch,
                 "ours")
            figures.setdefault(part, {})[detector] = rows | {"logits_differ_by": agree}
        if "distill" in options.only:
            figures.setdefault("distill", {})[detector] = distillation(detector, options, device)
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
    parameters = list(model.parameters())
    hooks = SavedBytes([*parameters, *model.buffers()])
    with FakeTensorMode(allow_non_fake_inputs=True), hooks:
        images = torch.zeros(batch, 3, height, width)
        model.train()(images, torch.zeros_like(images[:, 0], dtype=torch.bool))
    return 16 * sum(p.numel() for p in parameters) + hooks.bytes


def untrained(cfg):
    """The model of a run, without weights to download."""
    given = {name: getattr(cfg, name) for name in models.described_options()}
    given = {name: value for name, value in given.items() if value is not None}
    given |= dict(pretrained_backbone=False, frozen_backbone=cfg.pretrained_backbone != "none")
    return models.build(cfg.detector, 80 if cfg.data == "coco" else 3, **given)


def print_costs(jobs, images, image_size, tflops):
    """Print every run with its command, and what it would take.

    jobs: tables.Job, teachers before students.  images: of the training split.
    image_size: (height, width).  tflops: useful work per second.
    """
    costs, total, (height, width) = {}, 0., image_size
    for job in jobs:
        cfg, key = job.cfg, (job.cfg.detector, job.role)
        # Models of one role are alike: they are counted once.
        if key not in costs:
            model = untrained(cfg)
            costs[key] = (models.gflops(model, height, width),
                          training_bytes(model, cfg.batch_size, height, width),
                          4 * sum(p.numel() for p in model.parameters()))
        forward, memory, _ = costs[key]

        # Images times multiply-adds, two floating-point operations each.
        count = cfg.epochs * images if cfg.steps is None else cfg.steps * cfg.batch_size
        gflops = 3 * forward                           # backward costs two forward passes
        if cfg.method:
            teacher, _, frozen = costs[cfg.detector, "teacher"]
            gflops, memory = gflops + teacher, memory + frozen
        hours = count * gflops * 2e9 / (tflops * 1e12) / 3600
        total += hours
        print(f"{job.name}: about {hours:.1f} GPU-hours, {memory / 1e9:.1f} GB\n"
              f"  python {shlex.join(['train.py', *job.arguments])}")
    print(f"\n{len(jobs)} runs, {total:.0f} GPU-hours at {tflops:g} TFLOP/s of useful work "
          "(--tflops: the peak times what training reaches of it, a fifth to a third), a step "
          "being three forward passes and one of the teacher. Memory: weights (also the "
          f"teacher's), gradients, Adam and saved activations in fp32 at {height} x {width}.")


# ----------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------

def add_options(parser):
    """The options of `train.py bench`."""
    numbers = {"height": (640, "of the images"), "width": (640, "of the images"),
               "batch": (2, "images at once"), "repeats": (5, "of everything, interleaved")}
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS,
                            help=f"{text} (default: {default})")
    parser.add_argument("--detectors", nargs="+", choices=models.DETECTORS,
                        default=models.DETECTORS, help="(default: all)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--precision", nargs="+", choices=train.PRECISIONS,
                        default=Options.precision, help="of ours (default: fp32 bf16)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--quick", action="store_true",
                        help="tiny models and images: that everything runs, not how fast")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
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
