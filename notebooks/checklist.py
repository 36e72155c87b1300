"""Checks of an adapter: each finds a mistake that mostly gives no error message (notebook 5).

    run(pair, batch)                prints each check's answer
    missed(pair, batch)             -> {the checks that say no: why}
    memory_is_right(pair, batch)    of the memory alone
    quiet(pair)                     the pair with a copy of the student that has no dropout

What stands after "if not" is what you would see in training instead (reasoned, not measured).
A detector with other names than those below is wrapped, as the notebook shows. Before you run them:

- take quiet(pair): dropout draws other numbers when there are more queries;
- ask in one group, without noise (groups=1, box_noise=0);
- take a batch whose images all have objects, image 0 fewer than another; image 1 is padded. The
  padded images are not square.
"""
import copy
from dataclasses import replace

import torch
from torch.nn import functional as F

from adapters import memory_step, our_queries, step
from clockdistill import CLoCKDistill, gradient_norm, gradients_of


def run(pair, batch):
    """Print each check's name, its answer, and what a mistake would look like -> missed."""
    no = missed(pair, batch)
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        print(f"{name}: {no.get(check, 'yes')}\n    if not: {check.__doc__}")
    return no


def missed(pair, batch):
    """The checks that say no, or end with an error -> {check: why}."""
    no = {}
    for check in CHECKS:
        try:
            if not check(pair, batch):
                no[check] = "NO"
        except Exception as error:
            no[check] = f"NO, {type(error).__name__}: {error}"
    return no


def quiet(pair):
    """The pair with a copy of the student that has no dropout, neither modules nor numbers."""
    student = copy.deepcopy(pair.student)
    for module in student.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return replace(pair, student=student)


def memory_is_right(pair, batch):
    """The checks of memory_step; prints each mistake."""
    done = memory_step(pair, batch)
    memory = done.losses["memory"]
    mistakes = {
        "the teacher is not frozen, or not in eval mode":
            lambda: not the_teacher_is_frozen_and_in_eval_mode(pair, batch),
        "shapes are (width, height)": lambda: not upright(done.learned, batch),
        "padding is forgotten": lambda: not knows_padding(done.learned, batch),
        "the loss does not reach the backbone: it is frozen, or cut off":
            lambda: gradient(pair, memory, "backbone.") == 0,
        "the loss does not reach the encoder: it is frozen, or the hook lies before it":
            lambda: gradient(pair, memory, "encoder.") == 0,
        "the loss reaches the decoder: what is kept comes out of it":
            lambda: gradient(pair, memory, "decoder.layers.") > 0}
    right = True
    for what, made in mistakes.items():
        if made():
            print(f"NO: {what}")
            right = False
    return right


# ----------------------------------------------------------------------------------------------
# What the checks share
# ----------------------------------------------------------------------------------------------

def largest(difference):
    return difference.abs().max().item()


@torch.no_grad()
def ask_teacher(pair, batch, content, reference, attend, alone=True):
    """-> the answer to these queries, and the teacher's own output."""
    with pair.ask(pair.teacher, content, reference, attend, alone=alone) as answer:
        output = (pair.teacher.model if alone else pair.teacher)(batch.images, batch.mask)
    return answer, output


@torch.no_grad()
def moved(pair, batch, factor=1.0):
    """How far the teacher's boxes move, at most, when image 1 is taken out of the padded batch.

    factor: of the references in the padded batch.
    """
    content, reference, attend, valid = our_queries(pair, batch)
    padded, _ = ask_teacher(pair, batch, content, reference * factor, attend)
    real = batch.mask[1].bool()                           # (H, W): the image fills a rectangle
    image = batch.images[1][:, real.any(1)][:, :, real.any(0)][None]
    single = replace(batch, images=image, mask=torch.ones_like(image[:, 0]).long())
    single, _ = ask_teacher(pair, single, content[1:2], reference[1:2], attend[1:2])
    return largest((padded.boxes[-1, 1] - single.boxes[-1, 0])[valid[1]])


def unpadded(batch):
    return batch.mask is None or batch.mask.bool().all().item()


def upright(answer, batch):
    """Whether the levels are as upright as the images: a square batch cannot tell."""
    (rows, columns), (height, width) = answer.shapes[0], batch.images.shape[2:]
    return (rows - columns) * (height - width) >= 0


def knows_padding(answer, batch):
    """Whether the adapter kept the tokens that are padding, where there are any."""
    if unpadded(batch):
        return True
    # Padding thinner than a token leaves every token real.
    real = F.interpolate(batch.mask[:, None].float(), tuple(answer.shapes[0])).bool()
    return real.all().item() or (answer.padding is not None and answer.padding.any().item())


def gradient(pair, loss, module):
    """The norm of a loss's gradient on a part of the student, 0 if it is frozen."""
    # A ResNet of transformers holds an "encoder." of its own.
    part = [p for name, p in pair.student.named_parameters()
            if module in name and ("backbone." in name) == (module == "backbone.")]
    if not part:
        raise ValueError(f"no parameter of the student is named {module!r}: put your name here")
    return gradient_norm(gradients_of(loss, part))


def against_itself(pair, batch):
    """The pair with the teacher as its own student."""
    width = our_queries(pair, batch)[0].shape[-1]         # the teacher's
    distill = CLoCKDistill(width, width, num_classes=len(pair.teacher.config.id2label), at_least=1,
                           content=pair.distill.content,
                           classes=pair.distill.logit_options["classes"])
    return replace(pair, student=pair.teacher, distill=distill.to(batch.images.device))


def answers(losses):
    return losses["cls"] + losses["l1"] + losses["giou"]


# ----------------------------------------------------------------------------------------------
# Teacher and student
# ----------------------------------------------------------------------------------------------

def the_teacher_is_frozen_and_in_eval_mode(pair, batch):
    """Its answers to the same image change from step to step."""
    frozen = not any(p.requires_grad for p in pair.teacher.parameters())
    return frozen and not pair.teacher.training


def classes_agree(pair, batch):
    """`cls` and the own loss pull apart, and AP is lowest for the classes that are swapped."""
    return pair.teacher.config.id2label == pair.student.config.id2label


def every_layer_answers(pair, batch):
    """No sign: all student layers learn from the one layer that the teacher shows in eval mode."""
    done = step(pair, batch)
    return (len(done.taught.logits) == pair.teacher.config.decoder_layers
            and len(done.learned.logits) == pair.student.config.decoder_layers)


def columns_fit_the_class_head(pair, batch):
    """False boxes: where the teacher sees nothing, its boxes are copied with full weight."""
    no_object = pair.distill.logit_options["classes"] == "softmax"
    columns = step(pair, batch).learned.logits.shape[-1]
    return columns == len(pair.student.config.id2label) + no_object


# ----------------------------------------------------------------------------------------------
# Our queries ask right, and keep to themselves
# ----------------------------------------------------------------------------------------------

def references_are_of_the_own_size(pair, batch):
    """Answers beside the objects, in padded images only. (That the batch's boxes are: draw one.)"""
    if unpadded(batch):
        return True
    own_size, padded_size = (moved(pair, batch, factor)
                             for factor in (1.0, batch.extent.repeat(1, 2)[:, None]))
    return 2 * own_size < padded_size


def our_queries_leave_its_answers_alone(pair, batch):
    """The own loss falls faster than without the method, and AP is far lower."""
    torch.manual_seed(2)                                  # RT-DETR draws its denoising queries
    with_ours = step(pair, batch).output.logits
    torch.manual_seed(2)
    without = pair.student(batch.images, batch.mask, labels=batch.targets).logits
    return largest(with_ours - without) < 1e-4


def its_queries_leave_our_answers_alone(pair, batch):
    """The logit part falls slowly: teacher and student answer in different company."""
    *queries, valid = our_queries(pair, batch)
    alone, _ = ask_teacher(pair, batch, *queries)
    both, _ = ask_teacher(pair, batch, *queries, alone=False)
    return largest((both.logits - alone.logits)[:, valid]) < 1e-4


def padding_rows_change_nothing(pair, batch):
    """An image's answers depend on how many objects the others in its batch have."""
    content, reference, attend, _ = our_queries(pair, batch)
    few = len(batch.labels[0])                            # image 0 then has no padding rows
    with_rows, _ = ask_teacher(pair, batch, content, reference, attend)
    without, _ = ask_teacher(pair, batch, content[:, :few], reference[:, :few],
                             attend[:, :few, :few])
    return largest(with_rows.logits[:, 0, :few] - without.logits[:, 0]) < 1e-4


def its_own_queries_get_its_own_answers(pair, batch):
    """`l1` and `giou` stay high: contents, references or heads are not those of the detector."""
    answer, output = ask_teacher(pair, batch, *our_queries(pair, batch)[:3], alone=False)
    content, reference = answer.own
    count = content.shape[1]
    everyone = torch.ones(len(content), count, count, dtype=torch.bool, device=content.device)
    echo, _ = ask_teacher(pair, batch, content, reference, everyone)
    return max(largest(echo.logits[-1] - output.logits),
               largest(echo.boxes[-1] - output.pred_boxes)) < 1e-4


# ----------------------------------------------------------------------------------------------
# Losses and gradients
# ----------------------------------------------------------------------------------------------

@torch.no_grad()
def a_copy_of_the_teacher_has_no_loss(pair, batch):
    """Losses that never reach 0, whatever is learned."""
    losses = step(against_itself(pair, batch), batch).losses
    return abs(losses["memory"] + answers(losses)) < 1e-5


@torch.no_grad()
def images_without_objects_add_nothing(pair, batch):
    """NaN, or a crash, at the first such batch."""
    empty = replace(batch, labels=[x[:0] for x in batch.labels],
                    boxes=[x[:0] for x in batch.boxes])
    return answers(step(pair, empty).losses) == 0


def both_parts_reach_the_backbone(pair, batch):
    """The backbone learns nothing from a part: a `detach`, a `no_grad`, or it is frozen."""
    losses = step(pair, batch).losses
    parts = losses["memory"], answers(losses)
    return all(gradient(pair, part, "backbone.") > 0 for part in parts)


def memory_is_of_the_encoder(pair, batch):
    """Little is taught, or detection suffers: what is kept is not what the decoder is given."""
    memory = step(pair, batch).losses["memory"]
    return gradient(pair, memory, "encoder.") > 0 and gradient(pair, memory, "decoder.layers.") == 0


def shapes_are_height_and_width(pair, batch):
    """The memory's weights lie beside the objects."""
    return upright(step(pair, batch).learned, batch)


def padding_is_known(pair, batch):
    """An image's memory loss depends on how much it is padded."""
    return knows_padding(step(pair, batch).learned, batch)


CHECKS = [
    the_teacher_is_frozen_and_in_eval_mode, classes_agree, every_layer_answers,
    columns_fit_the_class_head, references_are_of_the_own_size,
    our_queries_leave_its_answers_alone, its_queries_leave_our_answers_alone,
    padding_rows_change_nothing, its_own_queries_get_its_own_answers,
    a_copy_of_the_teacher_has_no_loss, images_without_objects_add_nothing,
    both_parts_reach_the_backbone, memory_is_of_the_encoder, shapes_are_height_and_width,
    padding_is_known]
