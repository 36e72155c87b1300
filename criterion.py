"""Set prediction losses: match queries to objects one to one, then focal, L1 and GIoU losses.

L decoder layers, B images, Q queries, C classes, K objects (padded to the image with the most).
Every function takes all layers and images at once, so that a training step needs one assignment
call and one device-to-host copy (two-stage Deformable DETR: two of each). All of it runs in
float32, also under autocast: in half precision areas overflow and costs tie.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

MATCHER_WEIGHTS = 2., 5., 2.        # of class, L1 and GIoU, as in every official detector


class NotFinite(ValueError):
    """A prediction or target is NaN or infinite."""


class Targets(NamedTuple):
    """The ground truth of a batch, padded to the image with the most objects (K may be 0)."""
    labels: Tensor                  # (B, K) contiguous classes, 0 where padded
    boxes: Tensor                   # (B, K, 4) cxcywh as fractions of each image's own size, or 0
    valid: Tensor                   # (B, K) bool, False where padded
    counts: list[int]               # objects of each image, on the host


def pad_targets(targets: list[dict]) -> Targets:
    """Stack per-image dicts of "labels" (K_b,) and "boxes" (K_b, 4). Any image may be empty."""
    counts = [len(t["labels"]) for t in targets]
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)           # (B, K)
    boxes = [t["boxes"].float().reshape(-1, 4) for t in targets]
    boxes = pad_sequence(boxes, batch_first=True)                                     # (B, K, 4)
    valid = torch.arange(labels.shape[1]) < torch.tensor(counts)[:, None]             # (B, K)
    return Targets(labels, boxes, valid.to(labels.device, non_blocking=True), counts)


def mean_over_processes(count: Tensor, least: float = 1.) -> Tensor:
    """A count of this process -> its mean over all processes, at least `least`.

    A loss divided by it needs no correction: when torch averages the gradients of the processes,
    the result is the gradient of the whole batch. Every process has to call this. Without
    torch.distributed it is the count itself, at least `least`.
    """
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=least)


def normaliser(counts: list[int], device) -> Tensor:
    """Objects per process, at least 1, by which the official code divides its losses."""
    return mean_over_processes(torch.tensor(float(sum(counts)), device=device))


def giou(a: Tensor, b: Tensor, eps: float = 0.) -> Tensor:
    """Generalised IoU of cxcywh boxes:  overlap / union - (hull - union) / hull.

    a, b (..., 4) broadcast, so a[:, None], b[None] gives all pairs. eps is added to both
    denominators: 1e-6 in DAB-DETR and DINO, none in Deformable DETR.
    """
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    (top_a, low_a), (top_b, low_b) = a.split(2, -1), b.split(2, -1)                   # (..., 2)
    areas = (low_a - top_a).prod(-1) + (low_b - top_b).prod(-1)
    overlap = (torch.minimum(low_a, low_b) - torch.maximum(top_a, top_b)).clamp(min=0).prod(-1)
    hull = (torch.maximum(low_a, low_b) - torch.minimum(top_a, top_b)).clamp(min=0).prod(-1)
    union = areas - overlap
    return overlap / (union + eps) - (hull - union) / (hull + eps)


@torch.no_grad()
def matching_costs(logits: Tensor, boxes: Tensor, targets: Targets, weights=MATCHER_WEIGHTS,
                   eps: float = 0.) -> Tensor:
    """Cost of giving object k to query q, summed with these weights (class, L1, GIoU).

    logits (L, B, Q, C), boxes (L, B, Q, 4) cxcywh. The class cost is the focal loss of a positive
    minus that of a negative, for the object's class alone. Returns (L, B, Q, K) float32; the costs
    of padded objects mean nothing.
    """
    labels = targets.labels[None, :, None].expand(*logits.shape[:3], -1)              # (L, B, Q, K)
    p = logits.float().gather(-1, labels).sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    boxes, objects = boxes.float(), targets.boxes.expand(len(boxes), -1, -1, -1)
    distance = torch.cdist(boxes, objects, p=1)                                       # (L, B, Q, K)
    overlap = giou(boxes[..., None, :], objects[:, :, None], eps)                     # (L, B, Q, K)
    return weights[0] * (positive - negative) + weights[1] * distance - weights[2] * overlap


def assign(costs: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of each layer and image (Hungarian algorithm on the host).

    costs (L, B, Q, K), counts: the first counts[b] columns of image b are objects.
    Returns query (L, B, K), the query of each object, and matched (L, B, K) bool: False where there
    is no object, or no query left (more objects than queries).
    Raises NotFinite on a cost that is not finite.
    """
    costs = costs.cpu()                                  # the one device-to-host copy
    layers, batch, _, objects = costs.shape
    query = torch.zeros(layers, batch, objects, dtype=torch.long)
    matched = torch.zeros_like(query, dtype=torch.bool)
    for layer in range(layers):
        for image, count in enumerate(counts):
            cost = costs[layer, image, :, :count]
            if not cost.isfinite().all():
                raise NotFinite(f"matching cost of prediction layer {layer}, image {image} "
                                "of the batch is not finite")
            rows, columns = linear_sum_assignment(cost.numpy())
            query[layer, image, columns] = torch.from_numpy(rows)
            matched[layer, image, columns] = True
    return query, matched


def match(logits: Tensor, boxes: Tensor, targets: Targets, weights=MATCHER_WEIGHTS,
          eps: float = 0.) -> tuple[Tensor, Tensor]:
    """`assign` of `matching_costs`, on the predictions' device. NotFinite names the bad input."""
    try:
        costs = matching_costs(logits, boxes, targets, weights, eps)
        query, matched = assign(costs, targets.counts)
    except NotFinite as error:
        inputs = {"predicted logits": logits, "predicted boxes": boxes}
        inputs["target boxes"] = targets.boxes
        bad = " and ".join(name for name, x in inputs.items() if not x.isfinite().all())
        bad = bad or "none of its inputs, they overflow"
        raise NotFinite(f"{error}: NaN or infinity in {bad}") from None
    device = logits.device
    return query.to(device, non_blocking=True), matched.to(device, non_blocking=True)


def set_losses(logits: Tensor, boxes: Tensor, targets: Targets, query: Tensor, matched: Tensor,
               count: Tensor | float, eps: float = 0.) -> tuple[Tensor, Tensor, Tensor]:
    """Focal (alpha 0.25, gamma 2), L1 and GIoU loss of every layer, unweighted, each (L,).

    logits (L, B, Q, C), boxes (L, B, Q, 4) cxcywh, query and matched (L, B, K) from `match`; count:
    the normaliser. The focal loss is summed over all queries and classes, an unmatched query being
    background; the other two over matched pairs.
    """
    logits, boxes = logits.float(), boxes.float()
    # One-hot targets on the flat (query, class) axis. Padded objects add 0 wherever they point.
    slot = query * logits.shape[-1] + targets.labels                                  # (L, B, K)
    wanted = torch.zeros_like(logits).flatten(2)
    wanted = wanted.scatter_add_(2, slot, matched.to(logits)).view_as(logits)
    focal = sigmoid_focal_loss(logits, wanted).sum((1, 2, 3))                         # (L,)
    # Padded pairs become two equal unit boxes first, so that no 0/0 reaches the gradient.
    predicted = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))               # (L, B, K, 4)
    predicted = predicted.where(matched[..., None], 1.)
    objects = targets.boxes.where(matched[..., None], 1.)
    distance = (predicted - objects).abs().sum((1, 2, 3))
    overlap = ((1 - giou(predicted, objects, eps)) * matched).sum((1, 2))
    return focal / count, distance / count, overlap / count
