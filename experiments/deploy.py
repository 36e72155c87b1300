"""What a detector costs where it is used: `python train.py deploy [toy|kitti|coco]`.

For teacher, student alone and distilled student: AP, latency of one image, size of the file and
peak memory, as PyTorch runs them, and as ONNX programs with 32-bit floats and with 8-bit integers.
The weights are WEIGHTS/DATA_ROLE_DETECTOR.safetensors; figures go to OUT/DATA.json, with a table
and a picture made of them. What is not measured in a call keeps its earlier figure.

    python train.py deploy --only AP size          may run beside other work
    python train.py deploy --only latency memory   needs the machine for itself

`export` and `quantise` write the programs; `train.py export --out FILE.onnx` calls the first.
"""
import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import checkpoints
import data
import models
import train
from experiments import plots

INPUT = "images: uint8 RGB, (B, H, W, 3), resized to `size`, not normalised"
PADDING = "padding: bool, (B, H, W), True right and below of a smaller picture"
OUTPUT = ("boxes (B, k, 4): x0 y0 x1 y1 in pixels of the picture as given; scores (B, k), best "
          "first; labels (B, k): positions in `classes`")
TOLERANCE = 1e-4                       # of scores, and of boxes as fractions of the picture
ROLES = ("teacher", "student", "distilled")
FORMATS = ("PyTorch", "ONNX fp32", "ONNX int8")
PARTS = ("AP", "size", "memory", "latency")
# What has weights, which is nearly all of the work. The others stay in 32 bits, MatMul among them,
# attention's products of two activations: in 8 bits they cost the toy's DAB-DETR teacher 0.03 AP.
QUANTISED = ("Conv", "Gemm")
THREADS = (1, 2)


# ----------------------------------------------------------------------------------------------
# Programs
# ----------------------------------------------------------------------------------------------

class Program(nn.Module):
    """A detector from pixels to boxes: normalisation before it, post-processing behind it.

    k: detections per picture, at most the number of (query, class) pairs; COCO's AP counts 100.
    """
    def __init__(self, model, k=data.MAX_DETECTIONS):
        super().__init__()
        self.model = model.eval()
        self.k = k
        self.register_buffer("mean", 255 * torch.tensor(data.IMAGENET_MEAN))
        self.register_buffer("std", 255 * torch.tensor(data.IMAGENET_STD))

    def forward(self, images, padding=None):
        """See INPUT, PADDING and OUTPUT. -> boxes, scores, labels."""
        if padding is None:
            padding = torch.zeros(images.shape[:3], dtype=torch.bool)        # (B, H, W)
        pixels = (images.float() - self.mean) / self.std
        # Padding has the mean colour, as in training.
        pixels = pixels.masked_fill(padding[..., None], 0.).permute(0, 3, 1, 2)      # (B, 3, H, W)
        output = self.model(pixels, padding)
        sides = (~padding[:, :, 0]).sum(1), (~padding[:, 0]).sum(1)          # heights, widths
        sizes = torch.stack(sides, 1)                                        # (B, 2)
        scores, labels, boxes = models.best_pairs(output.detections, sizes, self.k)
        return boxes, scores, labels


def needed():
    """Raises ValueError, naming what to install, without the packages of the extra `deploy`."""
    try:
        import onnx, onnxruntime, onnxscript                                 # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX programs need {error.name}: pip install onnx onnxscript "
                         "onnxruntime") from None


@contextlib.contextmanager
def silent():
    """Without the exporters' notes on their own passes; errors stay."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(checkpoint, out, size=None, batch="1", padding=False, image=None):
    """Write a checkpoint as an ONNX program, after comparing it with PyTorch on a picture.

    size: "H,W" of its input; by default that of the picture as the checkpoint reads it.
    batch: pictures per call, or "dynamic".  padding: with a mask as a second input.
    image: the picture; by default one of the toy's.
    Raises ValueError, and writes nothing, when the answers differ by more than TOLERANCE.
    """
    needed()
    if batch != "dynamic" and not (batch.isdigit() and int(batch)):
        raise ValueError(f"--batch {batch}: want a number of pictures, or dynamic")
    model, payload = train.load_model(checkpoint)
    picture = choose_picture(payload, image, size)                           # (H, W, 3) uint8
    count = 2 if batch == "dynamic" else int(batch)
    # Every second picture is mirrored, so that no two neighbours are equal.
    images = torch.from_numpy(np.stack([picture[:, ::(-1) ** i] for i in range(count)]))
    inputs = [images]
    if padding:
        mask = torch.zeros(images.shape[:3], dtype=torch.bool)
        mask[-1, :, -(picture.shape[1] // 4):] = True
        inputs.append(mask)

    program = Program(model)
    proto = to_onnx(program, inputs, batch == "dynamic")
    facts = {"detector": payload["detector"], "data": payload["data"], "input": INPUT,
             "output": OUTPUT, "size": list(picture.shape[:2]), "classes": payload["classes"],
             "category_ids": payload.get("category_ids")}
    if padding:
        facts["padding"] = PADDING
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        proto.metadata_props.add(key=key, value=text)

    batches = [inputs]
    # One picture alone too, where any number may come.
    if batch == "dynamic":
        batches.append([x[-1:] for x in inputs])
    content = proto.SerializeToString()
    difference = 0.
    for some in batches:
        with torch.no_grad():
            wanted = [x.numpy() for x in program(*some)]
        answer = open_session(content).run(None, named(some))
        difference = np.maximum(difference, disagreement(answer, wanted, picture.shape[:2]))
    if not difference <= TOLERANCE:
        raise ValueError(f"{out} not written: on {image or 'a picture of the toy'} its answers "
                         f"differ from PyTorch's by {difference:.1e}, more than {TOLERANCE:.0e}: "
                         "try another --image, or --size")
    checkpoints.write_file(out, lambda temporary: Path(temporary).write_bytes(content))
    print(f"{out}: {len(content) / 1e6:.2f} MB; {batch} x {facts['size'][0]} x {facts['size'][1]} "
          f"uint8 RGB in; differs from PyTorch by {difference:.1e}")
    return difference


def choose_picture(payload, image, size):
    """The picture that a program is checked on, at the size of the program -> (H, W, 3) uint8."""
    sides = train.parse_sides(size, "H,W")
    if image is None and size is None and payload["data"] != "toy":
        raise ValueError(f"{payload['path']} was trained on {payload['data']}, whose pictures are "
                         "of several sizes: give --size H,W, or one of them as --image FILE")
    if image is None:
        picture = data.build("toy", train.Config.root, "val", limit=1).pixels(0)
    else:
        picture = data.read_image(image)                                     # (3, H, W) uint8
    if sides is None:
        sides = data.prepare(picture, train.input_size(payload)).shape[1:]
    return resized(Image.fromarray(picture.permute(1, 2, 0).numpy()), sides)


def resized(picture, size):
    """A PIL image at (height, width) -> (H, W, 3) uint8, as a program without torch has it."""
    return np.array(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def to_onnx(program, inputs, dynamic):
    """-> onnx.ModelProto. inputs: tensors, with at least two pictures for a dynamic batch."""
    axes = ({0: torch.export.Dim("batch")},) * len(inputs) if dynamic else None
    with silent(), torch.no_grad():
        exported = torch.export.export(program, tuple(inputs), dynamic_shapes=axes, strict=False)
        names = ["images", "padding"][:len(inputs)]
        written = torch.onnx.export(exported, input_names=names, dynamo=True, verbose=False,
                                    output_names=["boxes", "scores", "labels"])
    # The exporter's optimiser loses a constant when it merges two clamps of one value (onnxscript
    # 0.7.2; DINO's boxes): the file would not load.
    graph = written.model.graph
    for value in {value for node in graph for value in node.inputs if value is not None}:
        if value.const_value is not None and value.producer() is None:
            graph.initializers.setdefault(value.name, value)
    return written.model_proto


def open_session(program, threads=1):
    """An onnxruntime session of a file, or of its bytes."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def named(inputs):
    """[images, padding] -> what a session is fed."""
    return {name: np.asarray(value) for name, value in zip(("images", "padding"), inputs)}


def disagreement(ours, theirs, size):
    """The largest difference between two answers (boxes, scores, labels) to the same pictures.

    Scores are compared by rank. Each detection is compared with the nearest one of its class in the
    other answer, by score and by box, as a fraction of size (H, W): almost equal scores may change
    places. For the same reason the last ranks, within TOLERANCE of the cut, need no counterpart.
    """
    worst = np.abs(ours[1] - theirs[1]).max()
    scale = np.array([*size[::-1]] * 2)
    for one, other in ((ours, theirs), (theirs, ours)):
        for boxes, scores, labels, boxes2, scores2, labels2 in zip(*one, *other):
            far = np.abs((boxes[:, None] - boxes2) / scale).max(-1)          # (k, k)
            far = np.maximum(far, np.abs(scores[:, None] - scores2))
            far = np.where(labels[:, None] == labels2, far, np.inf).min(1)   # (k,)
            worst = np.maximum(worst, far[scores > scores[-1] + TOLERANCE].max(initial=0))
    return float(worst)


def quantise(source, out, pictures):
    """An ONNX program with 8-bit QUANTISED operators, by onnxruntime's own static quantisation.

    source: of one picture per call.  pictures: (H, W, 3) uint8 training images, which give the
    ranges of what is computed.
    Returns {operator: how many are quantised}.
    """
    needed()
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        feeds = iter(named([picture[None]]) for picture in pictures)

        def get_next(self):
            return next(self.feeds, None)

    prepared = Path(out).with_suffix(".prepared.onnx")
    with silent():
        # Its symbolic shapes fail on DINO's choice of tokens; shapes are fixed, so none is needed.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        # What leaves an operator keeps 32 bits until the next of QUANTISED reads it. Otherwise the
        # 256 steps would cover all that a ReLU6 then cuts, 8 times the range 0 to 6 in the median.
        # KITTI's distilled DINO, 90 tuning images: .300 AP with rounded outputs, .353 so, .356 in
        # 32 bits.
        quantization.quantize_static(
            str(prepared), str(out), Reader(), op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            extra_options={"OpTypesToExcludeOutputQuantization": list(QUANTISED)})
    prepared.unlink()
    # An operator is quantised when what it reads comes from 8 bits.
    nodes = onnx.load(out).graph.node
    short = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return dict(Counter(node.op_type for node in nodes
                        if node.op_type in QUANTISED and node.input[0] in short))


# ----------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------

def open_program(kind, checkpoint, file, threads=1):
    """(H, W, 3) uint8 -> [boxes, scores, labels] of one picture, as arrays.

    kind: one of FORMATS.  checkpoint: of PyTorch.  file: of the other two.
    """
    if kind == "PyTorch":
        torch.set_num_threads(threads)
        program = Program(train.load_model(checkpoint)[0])

        @torch.no_grad()
        def run(picture):
            return [x[0].numpy() for x in program(torch.from_numpy(picture[None]))]
    else:
        session = open_session(str(file), threads)

        def run(picture):
            return [x[0] for x in session.run(None, named([picture[None]]))]
    return run


def average_precision(run, dataset, size):
    """data.evaluate of a program on every image of a data set."""
    results = []
    for index in tqdm(range(len(dataset)), "AP", leave=False,
                      mininterval=train.quiet_interval()):
        picture, truth = dataset.raw(index)
        boxes, scores, labels = map(torch.from_numpy, run(resized(picture, size)))
        # From the program's pixels to the file's.
        scale = torch.tensor([picture.width / size[1], picture.height / size[0]]).repeat(2)
        results.append({"image_id": truth["image_id"], "boxes": boxes * scale, "scores": scores,
                        "labels": labels})
    return data.evaluate(results, dataset)


def latencies(makers, pictures, threads, rounds=5):
    """{name: function of threads -> program} -> {name: {"median", "p95"}} in ms for one picture.

    Programs take turns, so that a machine that gets slower does so for all; one is open at a time.
    """
    times = {name: [] for name in makers}
    for _ in tqdm(range(rounds), f"latency, {threads} threads", leave=False):
        for name, make in makers.items():
            run = make(threads)
            for picture in pictures[:3]:                     # the first calls allocate
                run(picture)
            for picture in pictures:
                start = time.perf_counter()
                run(picture)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"median": float(np.median(each)), "p95": float(np.percentile(each, 95))}
            for name, each in times.items()}


# A process that does nothing but answer ten pictures; the second one never imports torch.
ALONE = {"PyTorch": """
import sys, numpy
from experiments import deploy
run = deploy.open_program("PyTorch", sys.argv[1], None)
shape = tuple(map(int, sys.argv[2:]))
for _ in range(10):
    run(numpy.zeros(shape, numpy.uint8))
""", "ONNX": """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
shape = tuple(map(int, sys.argv[2:]))
for _ in range(10):
    session.run(None, {"images": numpy.zeros((1, *shape), numpy.uint8)})
"""}
PEAK = """
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(line.split()[1]) / 1e3)
"""


def peak_memory_mb(kind, file, size):
    """The most memory of a process that answers pictures, libraries included; NaN without /proc."""
    if not Path("/proc/self/status").exists():
        return math.nan
    code = ALONE[kind.split()[0]] + PEAK
    command = [sys.executable, "-c", code, str(Path(file).resolve()), *map(str, size), "3"]
    return float(subprocess.check_output(command, cwd=train.HERE, text=True).split()[-1])


# ----------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------

def add_options(parser):
    """The options of `train.py deploy`."""
    parser.add_argument("data", nargs="?", default="toy", choices=data.DEFAULT_SIZE,
                        help="which images and weights (default: toy)")
    train.add_options(parser, train.Config,
                      only=("root", "train_split", "val_split", "class_map", "limit"))
    parser.add_argument("--detectors", nargs="+", choices=models.DETECTORS,
                        default=models.DETECTORS, help="(default: all)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--weights", default="weights",
                        help="folder of DATA_ROLE_DETECTOR.safetensors (default: %(default)s)")
    parser.add_argument("--out", default="results/deploy", help="(default: %(default)s)")
    parser.add_argument("--work", default="runs/deploy",
                        help="folder of programs, used again if there (default: %(default)s)")
    parser.add_argument("--calibrate", type=train.at_least_1, default=100,
                        help="training images that give the 8-bit ranges (default: %(default)s)")


def run(data, detectors, only, weights, out, work, calibrate, **given):
    """The command `deploy`."""
    needed()
    files = {(detector, role): Path(weights) / f"{data}_{role}_{detector}.safetensors"
             for detector in detectors for role in ROLES}
    absent = [str(file) for file in files.values() if not file.exists()]
    if len(absent) == len(files):
        raise FileNotFoundError(f"no {absent[0]}, nor other weights of {data}: give --weights")
    if absent:
        print(f"left out, for there is no {', '.join(absent)}")

    # Model by model; what is not asked for keeps its earlier figure.
    page = Path(out) / f"{data}.json"
    figures = checkpoints.read_json(page) if page.exists() else {"rows": {}}
    makers = {}
    pictures = common = None
    for (detector, role), checkpoint in files.items():
        if not checkpoint.exists():
            continue
        dataset, train_set = open_data(checkpoint, data, given)
        size = tuple(dataset[0][0].shape[1:])
        if size != (common := common or size):
            raise ValueError(f"{checkpoint} reads images of {size}, those before it of {common}: "
                             "latencies are compared at one size, so deploy them apart")
        pictures = pictures or views(dataset, size, range(min(40, len(dataset))))
        programs = make_programs(checkpoint, Path(work), dataset, train_set, size, calibrate)
        origin = [digest(checkpoint), dataset.fingerprint]
        for kind, (file, facts) in programs.items():
            name = f"{detector}, {role}, {kind}"
            ranges = [calibrate, train_set.fingerprint] if kind == "ONNX int8" else []
            row = {"detector": detector, "role": role, "format": kind, "of": origin + ranges} | facts
            earlier = figures["rows"].get(name, {})
            # Figures of other weights, or of other images, are not this program's.
            if earlier.get("of") != row["of"]:
                earlier = {}
            row |= measure(kind, checkpoint, file, dataset, size, only)
            figures["rows"][name] = earlier | row
            makers[name] = functools.partial(open_program, kind, checkpoint, file)
        checkpoints.write_json(page, figures)
        print(f"{detector}, {role}: done")

    # All programs take turns, so latency comes last.
    if "latency" in only:
        for threads in THREADS:
            for name, times in latencies(makers, pictures, threads).items():
                figures["rows"][name][f"ms_{threads}"] = times
        figures["latency"] = {"machine": train.machine(torch.device("cpu")), "size": size,
                              "pictures": len(pictures)}
    figures["commit"] = train.commit()
    checkpoints.write_json(page, figures)
    checkpoints.write_text(page.with_suffix(".md"), markdown(figures, data))
    rows = list(figures["rows"].values())
    if all("ms_1" in row and row.get("AP") is not None for row in rows):
        plots.latency(rows).savefig(page.with_suffix(".png"), dpi=120)
    print(f"{len(rows)} rows: {page.with_suffix('.md')}, and beside it the JSON and the picture")


def open_data(checkpoint, name, given):
    """The images that AP is measured on, and the training images, as the checkpoint reads them."""
    payload = train.load_payload(checkpoint)
    stored = {key: value for key, value in payload["settings"].items()
              if key in ("class_map", "size")}
    cfg, _ = train.configure("fit", data=name, **stored | given)
    dataset = train.build_data(cfg, cfg.val_split)
    train.same_classes(payload, dataset, checkpoint)
    return dataset, train.build_data(cfg, cfg.train_split)


def views(dataset, size, indices):
    """Some images of a data set as a program gets them."""
    return [resized(dataset.raw(index)[0], size) for index in indices]


def digest(checkpoint):
    """A short name for what a file holds."""
    return hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]


def make_programs(checkpoint, work, dataset, train_set, size, calibrate):
    """-> {format: (its file, what the table says of it)}; programs there are used again."""
    whole, short, facts = (work / f"{checkpoint.stem}{end}" for end in (
        ".onnx", ".int8.onnx", ".json"))
    # Other weights under the same name make new programs. So does what was asked for.
    asked = [list(size), calibrate, train_set.fingerprint, digest(checkpoint)]
    known = checkpoints.read_json(facts) if facts.exists() else {}
    if known.pop("asked", None) != asked or not (whole.exists() and short.exists()):
        facts.unlink(missing_ok=True)          # a kill must not leave it beside new programs
        difference = export(checkpoint, whole, ",".join(map(str, size)), image=dataset.paths[0])
        step = max(1, len(train_set) // calibrate)
        spread = range(0, len(train_set), step)[:calibrate]
        operators = quantise(whole, short, views(train_set, size, spread))
        known = {"difference": difference, "int8": operators, "calibrated_on": len(spread)}
        checkpoints.write_json(facts, known | {"asked": asked})
    else:
        print(f"used again: {whole} and {short.name}, which were made of {checkpoint}")
    return {"PyTorch": (checkpoint, {}),
            "ONNX fp32": (whole, {"difference": known.pop("difference")}),
            "ONNX int8": (short, known)}


def measure(kind, checkpoint, file, dataset, size, only):
    """What is asked for of one program, but for its latency."""
    row = {}
    if "size" in only:
        row["file_mb"] = file.stat().st_size / 1e6
    if "AP" in only:
        run = open_program(kind, checkpoint, file)
        scores = average_precision(run, dataset, size)
        row |= {"AP": scores["AP"], "AP50": scores["AP50"], "images": len(dataset)}
    if "memory" in only:
        row["peak_mb"] = peak_memory_mb(kind, file, size)
    return row


def markdown(figures, name):
    """The table as a page."""
    text = [f"# {name}: what deployment costs, and what it keeps\n\nMade by `python train.py "
            f"deploy {name}` from {name}.json. PyTorch's file is the fp16 safetensors; ONNX "
            "programs have pre- and post-processing inside. Memory is the peak of a process that "
            "answers ten pictures, libraries included. Latency is of one picture, median (95th "
            "percentile) in ms."]
    if "latency" in figures:
        height, width = figures["latency"]["size"]
        machine = re.sub(r", \d+ threads", "", figures["latency"]["machine"])   # columns say theirs
        text[0] += f" Timed at {width} x {height} on {machine}."
    columns = ("detector", "model", "format", "AP", "AP50", "images", "file", "peak memory",
               *(f"ms, {n} thread{'s' * (n > 1)}" for n in THREADS))
    text += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in figures["rows"].values():
        cells = [row["detector"], row["role"], row["format"]]
        cells += [written(row.get(key), form) for key, form in (
            ("AP", "{:.3f}"), ("AP50", "{:.3f}"), ("images", "{}"), ("file_mb", "{:.2f} MB"),
            ("peak_mb", "{:.0f} MB"))]
        cells += [written(row.get(f"ms_{n}"), "{0[median]:.1f} ({0[p95]:.1f})") for n in THREADS]
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "Operators in 8 bits (all others have 32), ranges read from training images:", ""]
    for row in figures["rows"].values():
        if "int8" in row:
            listed = ", ".join(f"{count} {name}" for name, count in row["int8"].items())
            text.append(f"- {row['detector']}, {row['role']}: {listed}; {row['calibrated_on']} "
                        "images")
    return "\n".join(text) + "\n"


def written(value, form):
    """A cell of the table; empty where nothing was measured."""
    return "" if value is None else form.format(value)
