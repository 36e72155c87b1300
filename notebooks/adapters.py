"""What to copy beside clockdistill.py, to distil a detector of your own (notebook 5 explains it).

    Pair, Batch                  what a step of training needs
    batch_of                     a Batch from what a processor of transformers returns
    memory_step, step, Learner   a step: the memory alone; the answers too; as one module
    weigh                        chooses the weights of the losses
    hooked, at_self_attention, together, additive
                                 hooks and masks, for all adapters
    memory_of                    the adapter of the memory alone: put your names there
    ask_dense, ask_deformable_detr, ask_conditional_detr, ask_rt_detr
                                 an adapter each: change the nearest one, delete the others
"""
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clockdistill import Balance, CLoCKDistill

# ----------------------------------------------------------------------------------------------
# A step of training
# ----------------------------------------------------------------------------------------------

@dataclass
class Pair:
    """A teacher, a student, and what lets the one teach the other."""
    teacher: nn.Module           # frozen, in eval mode
    student: nn.Module
    ask: Callable                # the adapter: open around a forward pass, it keeps the answers
    distill: CLoCKDistill        # on the student's device
    embedding: Tensor = None     # contents to ask with, the teacher's; None: random ones, or none


@dataclass
class Batch:
    """B images and their objects."""
    images: Tensor               # (B, 3, H, W), padded at the right and bottom
    mask: Tensor                 # (B, H, W), 1 where an image is; None: everywhere
    labels: list                 # B tensors (K,)
    boxes: list                  # B tensors (K, 4), (cx, cy, w, h), fractions of its OWN size
    targets: list                # the same objects, as the detector's own loss wants them

    @property
    def extent(self):
        """How much of width and height each image covers: (B, 2), or None without a mask."""
        return None if self.mask is None else covered(self.mask)


def covered(mask):
    """How much of width and height the images cover: (B, H, W), 1 where one is -> (B, 2)."""
    if mask.ndim != 3 or not mask[:, 0, 0].all():
        raise ValueError("mask must be (B, H, W), 1 where an image is: a mask of padding is turned "
                         "round by ~")
    return torch.stack([mask[:, 0].float().mean(1), mask[:, :, 0].float().mean(1)], 1)


def batch_of(found):
    """A Batch from what a processor of transformers returns for images with annotations, padded and
    with return_tensors="pt".

    The fractions of its boxes are of the padded image. found.to(device) leaves them on the CPU.
    """
    mask = found["pixel_mask"]
    targets = [{key: value.to(mask.device) if isinstance(value, Tensor) else value
                for key, value in one.items()} for one in found["labels"]]
    boxes = [one["boxes"] / size.repeat(2) for one, size in zip(targets, covered(mask))]
    return Batch(found["pixel_values"], mask, [one["class_labels"] for one in targets], boxes,
                 targets)


def memory_step(pair, batch):
    """The memory part alone -> losses {"loss_own", "memory", and zeros}, output, what was learned.

    pair.ask: a context manager of a detector alone; it keeps memory (B, S, D), shapes, padding.
    """
    with torch.no_grad(), pair.ask(pair.teacher) as taught:
        pair.teacher.model(batch.images, batch.mask)
    with pair.ask(pair.student) as learned:
        output = pair.student(batch.images, batch.mask, labels=batch.targets)
    terms = pair.distill(learned.memory, taught.memory, None, None, None, None, batch.labels,
                         batch.boxes, learned.shapes, learned.padding, None, batch.extent)
    return SimpleNamespace(losses={"loss_own": output.loss, **terms}, output=output,
                           learned=learned)


def step(pair, batch):
    """Memory and answers -> losses {"loss_own", "memory", "cls", "l1", "giou"}, output, answers."""
    distill = pair.distill
    with torch.no_grad():
        content, reference, attend, valid = our_queries(pair, batch)
        with pair.ask(pair.teacher, content, reference, attend, alone=True) as taught:
            pair.teacher.model(batch.images, batch.mask)
    with pair.ask(pair.student, distill.student_content(content), reference, attend) as learned:
        output = pair.student(batch.images, batch.mask, labels=batch.targets)
    terms = distill(learned.memory, taught.memory, learned.logits, learned.boxes, taught.logits,
                    taught.boxes, batch.labels, batch.boxes, learned.shapes, learned.padding,
                    valid, batch.extent)
    return SimpleNamespace(losses={"loss_own": output.loss, **terms}, output=output,
                           taught=taught, learned=learned)


def our_queries(pair, batch):
    """-> content (B, Q, D), reference (B, Q, 4), attend (B, Q, Q): which of them see one another,
    valid (B, Q): False in the padding rows of images with fewer objects than others."""
    return pair.distill.queries(batch.labels, batch.boxes, pair.embedding)


class Learner(nn.Module):
    """Student and method in one module: its parameters are what the optimizer needs, and DDP sees
    all that learns in one forward."""

    def __init__(self, pair, step=step):
        super().__init__()
        self.student, self.distill = pair.student, pair.distill
        self.pair, self.step = pair, step

    def forward(self, batch):
        """-> the loss to minimise."""
        return sum(self.step(self.pair, batch).losses.values())


def weigh(pair, step, batches, optimizer, memory=50.0, answers=1.0):
    """Choose pair.distill's lambdas from the first 8 batches; a lambda of 0 stays 0.

    The student takes 8 steps of its own loss. memory, answers: how long each part's gradient shall
    be then, beside that of the own loss. The rule: clockdistill.Balance. The lambdas are in no
    state_dict: a resumed run gives them to CLoCKDistill.
    """
    distill, batches = pair.distill, list(itertools.islice(batches, 8))
    if len(batches) < 8:
        raise ValueError(f"weigh wants 8 batches, got {len(batches)}: repeat them")
    before = distill.lambda_mem, distill.lambda_log
    on = tuple(float(weight > 0) for weight in before)
    ratios = {"memory": memory * on[0], "cls+l1+giou": answers * on[1]}
    balance = Balance({part: ratio for part, ratio in ratios.items() if ratio})
    try:
        distill.lambda_mem, distill.lambda_log = on
        for index, batch in enumerate(batches):
            losses = step(pair, batch).losses
            balance.measure(losses, index, pair.student.parameters())
            optimizer.zero_grad()
            losses["loss_own"].backward()
            optimizer.step()
        factors = balance.factors(8)
    except BaseException:
        distill.lambda_mem, distill.lambda_log = before
        raise
    distill.lambda_mem, distill.lambda_log = (factors.get(part, 0.0) for part in ratios)


# ----------------------------------------------------------------------------------------------
# Hooks and masks
# ----------------------------------------------------------------------------------------------

@contextmanager
def hooked(modules, before=None, after=None):
    """While open, before(module, args, call) runs ahead of the modules, after(module, args, output)
    behind them."""
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules
             if before]
    hooks += [module.register_forward_hook(after) for module in modules if after]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def at_self_attention(decoder, hook):
    """hook(module, args, call) before each self-attention of a decoder that takes no mask."""
    if any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers):
        raise ValueError("gradient checkpointing runs the decoder's layers once more when the hook "
                         "is gone, without the mask: switch it off")
    return hooked([layer.self_attn for layer in decoder.layers], hook)


def together(own, attend, theirs=None):
    """Which query may attend to which, of `own` queries and, after them, ours.

    attend (B, Q, Q) bool, among ours. theirs (own, own) bool, among its own; None: all see all.
    Returns (B, own + Q, own + Q) bool.
    """
    among = attend.new_ones(own, own) if theirs is None else theirs
    may = F.pad(among.expand(len(attend), -1, -1), (0, attend.shape[1], 0, attend.shape[1]))
    may[:, own:, own:] = attend                                   # elsewhere F.pad has put False
    return may


def additive(may):
    """(B, Q, Q) bool -> (B, 1, Q, Q), 0 where a row may attend; the 1 is for the heads."""
    return torch.zeros(may.shape, device=may.device).masked_fill(~may, -torch.inf)[:, None]


# ----------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------

@contextmanager
def memory_of(detector):
    """While open, what the detector gives its decoder: memory (B, S, D), shapes, padding (B, S)."""
    kept = SimpleNamespace()

    def before(decoder, args, call):
        kept.memory, kept.shapes, kept.padding = call["memory"], call["shapes"], call["padding"]

    with hooked([detector.model.decoder], before):
        yield kept


@contextmanager
def ask_dense(detector, content, boxes, attend, alone=False):
    """While open, a DenseDetr decodes our queries in addition to its own (alone: only ours).

    content (B, Q, D), boxes (B, Q, 4), attend (B, Q, Q): see clockdistill.target_queries. Once the
    detector has run, the answer holds memory (B, S, D), shapes, padding (B, S), logits
    (L, B, Q, C), boxes (L, B, Q, 4), and for the checklist `own`: contents (here positions) and
    references of the detector's own queries.
    """
    answer, points = SimpleNamespace(), boxes[..., :2]

    def before(decoder, args, call):
        answer.memory, answer.shapes = call["memory"], call["shapes"]
        answer.padding = call["padding"]
        answer.own = call["position"], call["points"]
        kept = answer.kept = 0 if alone else call["points"].shape[1]
        ours = {"content": torch.zeros_like(content), "position": content, "points": points}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        heads = decoder.layers[0].self_attn.num_heads
        return args, call | {"attn_mask": (~together(kept, attend)).repeat_interleave(heads, 0)}

    def after(decoder, args, states):
        answer.logits, answer.boxes = detector.heads(states[:, :, answer.kept:], points)
        return states if alone else states[:, :, :answer.kept]

    with hooked([detector.model.decoder], before, after):
        yield answer


@contextmanager
def ask_deformable_detr(detector, content, boxes, attend, alone=False):
    """The same for a DeformableDetrForObjectDetection."""
    model, answer = detector.model, SimpleNamespace()

    def logit(places):                                            # points become (x, y, 0, 0)
        return F.pad(places.logit(1e-5), (0, 4 - places.shape[-1]))

    def before(decoder, args, call):
        answer.memory, answer.shapes = call["encoder_hidden_states"], call["spatial_shapes_list"]
        answer.padding = ~call["encoder_attention_mask"]          # theirs is True at real tokens
        answer.own = call["inputs_embeds"], call["reference_points"]
        kept = answer.kept = 0 if alone else call["inputs_embeds"].shape[1]
        encoded = model.get_proposal_pos_embed(logit(boxes))      # (B, Q, 2 D)
        if model.config.two_stage:
            position = model.pos_trans_norm(model.pos_trans(encoded)).chunk(2, -1)[0]   # (B, Q, D)
            answer.start = boxes
        else:
            D, fixed = content.shape[-1], torch.Generator().manual_seed(0)
            position = encoded @ torch.randn(2 * D, D, generator=fixed).to(encoded) / D ** 0.5
            answer.start = boxes[..., :2]
        ours = {"inputs_embeds": content, "reference_points": answer.start,
                "object_queries_position_embeddings": position}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        return args, call | {"attention_mask": additive(together(kept, attend))}

    def after(decoder, args, output):
        kept = answer.kept
        states = output.intermediate_hidden_states                # (B, L, all, D)
        places = output.intermediate_reference_points             # (B, L, all, 4)
        mine = states[:, :, kept:].unbind(1)
        starts = [answer.start, *places[:, :-1, kept:].unbind(1)]
        # A two-stage model has one more head, the encoder's, at the end: zip leaves it out.
        answer.logits = torch.stack([head(x) for head, x in zip(detector.class_embed, mine)])
        answer.boxes = torch.stack([(head(x) + logit(start)).sigmoid() for head, x, start
                                    in zip(detector.bbox_embed, mine, starts)])
        if not alone:
            output.last_hidden_state = output.last_hidden_state[:, :kept]
            output.intermediate_hidden_states = states[:, :, :kept]
            output.intermediate_reference_points = places[:, :, :kept]
        return output

    with hooked([model.decoder], before, after):
        yield answer


@contextmanager
def ask_conditional_detr(detector, content, boxes, attend, alone=False):
    """The same for a ConditionalDetrForObjectDetection with auxiliary_loss=True, without gradient
    checkpointing.

    Its contents start as zeros: our contents are positions, as for the dense DETR.
    """
    if not detector.config.auxiliary_loss:
        raise ValueError("set detector.config.auxiliary_loss = True: otherwise its decoder returns "
                         "the last layer only")
    decoder, answer = detector.model.decoder, SimpleNamespace()
    start = boxes[..., :2].logit(1e-5)                            # (B, Q, 2)

    def project(module, args, output):                            # the decoder is told no shapes
        answer.shapes = [output.shape[2:]]

    def before(decoder, args, call):
        answer.memory = call["encoder_hidden_states"]
        answer.padding = ~call["encoder_attention_mask"]
        own = call["object_queries_position_embeddings"]          # (B, own, D)
        kept = answer.kept = 0 if alone else own.shape[1]
        ours = {"inputs_embeds": torch.zeros_like(content),
                "object_queries_position_embeddings": content}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        return args, call

    def point(head, args, output):                                # it makes points from positions
        position, points = args[0][:, :answer.kept], output[:, :answer.kept]
        answer.own = position, points.sigmoid()
        return torch.cat([points, start], 1)                      # ours: the true centres

    def apart(attention, args, call):
        return args, call | {"attention_mask": additive(together(answer.kept, attend))}

    def after(decoder, args, output):
        kept = answer.kept
        states = output.intermediate_hidden_states.clone()        # (L, B, all, D)
        states[-1] = output.last_hidden_state                     # the answer is made from this
        mine = states[:, :, kept:]
        answer.logits = detector.class_labels_classifier(mine)
        answer.boxes = (detector.bbox_predictor(mine) + F.pad(start, (0, 2))).sigmoid()
        if not alone:
            output.last_hidden_state = output.last_hidden_state[:, :kept]
            output.intermediate_hidden_states = output.intermediate_hidden_states[:, :, :kept]
            output.reference_points = output.reference_points[:kept]          # (all, B, 2)
        return output

    with (hooked([detector.model.input_projection], after=project),
          hooked([decoder], before, after), hooked([decoder.ref_point_head], after=point),
          at_self_attention(decoder, apart)):
        yield answer


@contextmanager
def ask_rt_detr(detector, content, boxes, attend, alone=False):
    """The same for an RTDetrV2ForObjectDetection; padding is None."""
    answer = SimpleNamespace(padding=None)

    def before(decoder, args, call):
        answer.memory, answer.shapes = call["encoder_hidden_states"], call["spatial_shapes_list"]
        answer.own = call["inputs_embeds"], call["reference_points"].sigmoid()
        kept = answer.kept = 0 if alone else call["inputs_embeds"].shape[1]
        ours = {"inputs_embeds": content, "reference_points": boxes.logit(1e-5)}
        call |= {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}
        theirs = call["encoder_attention_mask"] if kept else None
        theirs = None if theirs is None else theirs == 0
        return args, call | {"encoder_attention_mask": additive(together(kept, attend, theirs))}

    def after(decoder, args, output):
        kept = answer.kept
        answer.logits = output.intermediate_logits[:, :, kept:].transpose(0, 1)   # (L, B, Q, C)
        answer.boxes = output.intermediate_reference_points[:, :, kept:].transpose(0, 1)
        if not alone:
            output.last_hidden_state = output.last_hidden_state[:, :kept]
            for key in ("hidden_states", "logits", "reference_points"):
                output[f"intermediate_{key}"] = output[f"intermediate_{key}"][:, :, :kept]
        return output

    with hooked([detector.model.decoder], before, after):
        yield answer
