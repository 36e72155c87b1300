"""Set prediction losses: a one-to-one matching of queries to objects, then focal, L1 and GIoU losses of the pairs.

Everything is batched over decoder layers (L), images (B), queries (Q) and objects (K, padded to the largest image), so
that a step needs one assignment call and one device-to-host copy, however many layers. All of it runs in float32,
also under autocast: in half precision areas overflow and costs tie.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss


class NotFinite(ValueError):
    """A prediction or target is NaN or infinite."""


class Targets(NamedTuple):
    """The ground truth of a batch, padded to the image with the most objects (K may be 0)."""
    labels: Tensor        # (B, K) contiguous classes, 0 where padded
    boxes: Tensor         # (B, K, 4) cxcywh as fractions of each image's own size, 0 where padded
    valid: Tensor         # (B, K) bool, False where padded
    counts: list[int]     # objects of each image, on the host


def pad_targets(targets: list[dict]) -> Targets:
    """Stack per-image dicts with "labels" (K_b,) and "boxes" (K_b, 4); any image, or all, may be without objects."""
    counts = [len(t["labels"]) for t in targets]
    labels = pad_sequence([t["labels"] for t in targets], batch_first=True)                           # (B, K)
    boxes = pad_sequence([t["boxes"].float().reshape(-1, 4) for t in targets], batch_first=True)      # (B, K, 4)
    valid = torch.arange(labels.shape[1]) < torch.tensor(counts)[:, None]                              # (B, K)
    return Targets(labels, boxes, valid.to(labels.device, non_blocking=True), counts)


def mean_over_processes(count: Tensor, least: float = 1.) -> Tensor:
    """A count of this process summed over all processes, over their number, at least `least`.

    With it as divisor, the mean of the processes' gradients is the gradient of the whole batch. Every
    process has to call this. Without torch.distributed: the count itself.
    """
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=least)


def normaliser(counts: list[int], device) -> Tensor:
    """Objects in the batch, at least 1; with several processes their mean, as in the official code."""
    return mean_over_processes(torch.tensor(float(sum(counts)), device=device))


def giou(a: Tensor, b: Tensor, eps: float = 0.) -> Tensor:
    """Generalised IoU of cxcywh boxes (..., 4); leading dimensions broadcast, so a[:, None], b[None] gives all pairs.

    eps is added to both denominators: 1e-6 in DAB-DETR and DINO, none in Deformable DETR.
    """
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - overlap
    return overlap / (union + eps) - (hull - union) / (hull + eps)


@torch.no_grad()
def matching_costs(logits: Tensor, boxes: Tensor, targets: Targets, weights: tuple = (2., 5., 2.),
                   eps: float = 0.) -> Tensor:
    """Cost of giving object k to query q: weights (class, L1, GIoU), the official 2 / 5 / 2 by default.

    logits (L, B, Q, C), boxes (L, B, Q, 4) cxcywh. Returns (L, B, Q, K) float32; padded objects hold arbitrary costs.
    The class cost is the focal loss of a positive minus that of a negative, for the object's class alone.
    """
    labels = targets.labels[None, :, None].expand(*logits.shape[:3], -1)      # (L, B, Q, K)
    p = logits.float().gather(-1, labels).sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    boxes, wanted = boxes.float(), targets.boxes.expand(len(boxes), -1, -1, -1)
    distance = torch.cdist(boxes, wanted, p=1)                                # (L, B, Q, K)
    overlap = giou(boxes[:, :, :, None], wanted[:, :, None], eps)             # (L, B, Q, 1) with (L, B, 1, K)
    return weights[0] * (positive - negative) + weights[1] * distance - weights[2] * overlap


def assign(costs: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of each layer and image (Hungarian algorithm, on the host).

    costs (L, B, Q, K), counts: the first counts[b] columns of image b are objects.
    Returns query (L, B, K), the query of each object, and matched (L, B, K) bool, False where there is no object, or
    no query left (more objects than queries). Raises NotFinite on a cost that is not finite.
    """
    costs = costs.cpu()                                                       # the step's one device-to-host copy
    layers, batch, _, objects = costs.shape
    query = torch.zeros(layers, batch, objects, dtype=torch.long)
    matched = torch.zeros(layers, batch, objects, dtype=torch.bool)
    for layer in range(layers):
        for image, count in enumerate(counts):
            cost = costs[layer, image, :, :count]
            if not cost.isfinite().all():
                raise NotFinite(f"matching cost of prediction layer {layer}, image {image} of the batch is not finite")
            rows, columns = linear_sum_assignment(cost.numpy())
            query[layer, image, columns] = torch.from_numpy(rows)
            matched[layer, image, columns] = True
    return query, matched


def match(logits: Tensor, boxes: Tensor, targets: Targets, weights: tuple = (2., 5., 2.),
          eps: float = 0.) -> tuple[Tensor, Tensor]:
    """`assign` of `matching_costs`, on the device of the predictions. Raises NotFinite, which names the bad input."""
    try:
        query, matched = assign(matching_costs(logits, boxes, targets, weights, eps), targets.counts)
    except NotFinite as error:
        inputs = {"predicted logits": logits, "predicted boxes": boxes, "target boxes": targets.boxes}
        broken = " and ".join(name for name, x in inputs.items() if not x.isfinite().all())
        raise NotFinite(f"{error}: NaN or infinity in {broken or 'none of its inputs, they overflow'}") from None
    return query.to(logits.device, non_blocking=True), matched.to(logits.device, non_blocking=True)


def set_losses(logits: Tensor, boxes: Tensor, targets: Targets, query: Tensor, matched: Tensor, count: Tensor | float,
               eps: float = 0.) -> tuple[Tensor, Tensor, Tensor]:
    """Focal (alpha 0.25, gamma 2), L1 and GIoU loss of every layer, unweighted, each (L,).

    logits (L, B, Q, C), boxes (L, B, Q, 4) cxcywh, query and matched (L, B, K) as from `match`, count: the normaliser.
    The focal loss sums over all queries and classes (an unmatched query is background), the others over matched pairs.
    """
    logits, boxes = logits.float(), boxes.float()
    layers, batch, _, classes = logits.shape
    # One-hot by scatter_add on the flat (query, class) axis: padded objects add 0 wherever their index points.
    slot = query * classes + targets.labels                                   # (L, B, K)
    wanted = torch.zeros_like(logits).flatten(2).scatter_add_(2, slot, matched.to(logits)).view_as(logits)
    focal = sigmoid_focal_loss(logits, wanted).sum((1, 2, 3))                 # (L,)
    mine = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))            # (L, B, K, 4)
    # Padded pairs become two equal unit boxes before the division, so that no 0/0 reaches the gradient.
    mine, theirs = (torch.where(matched[..., None], x, 1.) for x in (mine, targets.boxes))
    distance = (mine - theirs).abs().sum((1, 2, 3))
    overlap = ((1 - giou(mine, theirs, eps)) * matched).sum((1, 2))
    return focal / count, distance / count, overlap / count
