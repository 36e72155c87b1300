"""Detection transformers in plain PyTorch, exact to the official implementations: read it from top to bottom.

Backbone -> position encoding -> deformable attention -> encoder -> decoder -> denoising -> DINO -> build, record, gflo
B batch, S tokens (all levels concatenated, finest first), D width, Q queries, L decoder layers, C classes, K objects.
Boxes are (cx, cy, w, h) as fractions of each image's own, unpadded size; padding masks are True where padded.
"""
import copy
import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d, box_convert

import criterion

DETECTORS = ("dab_detr", "deformable_detr", "dino")


@dataclass
class Memory:
    """What the encoder hands to any decoder."""
    tokens: Tensor                     # (B, S, D)
    padding: Tensor                    # (B, S) bool; padded tokens are not zero, attention masks them
    shapes: list[tuple[int, int]]      # (H_l, W_l) of each level; S = sum H_l * W_l
    valid_ratios: Tensor               # (B, levels, 2): unpadded part of each level's width and height


@dataclass
class Detections:
    logits: Tensor                     # (L, B, Q, C) before the sigmoid
    boxes: Tensor                      # (L, B, Q, 4)


@dataclass
class Denoising(Detections):
    """Predictions of the denoising queries: `groups` times (objects positives, then objects negatives) along Q."""
    groups: int
    objects: int                       # K, of the image with most objects; the other images' spare slots are background


@dataclass
class Output:
    memory: Memory
    detections: Detections             # of the learned queries
    proposals: Detections | None       # L = 1, the encoder's own detections of a two-stage model
    denoising: Denoising | None        # None in eval mode, without targets, and for a batch without objects
    extra: Detections | None           # of the caller's queries


# ------------------------------------------------------------------------------------------------------------- backbone

RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
           "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3))}


class ResNet(nn.Module):
    """torchvision's ResNet with the same parameter names, any width (planes w, 2w, 4w, 8w), and C3, C4, C5 as output.

    frozen: every BatchNorm has fixed statistics and scale, and the stem and first stage get no gradient, as in the
    official detectors. That only makes sense with pretrained weights: from scratch everything trains.
    """
    def __init__(self, name: str, width: int = 64, frozen: bool = False):
        super().__init__()
        block, depths = RESNETS[name]
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        self.channels = [width * scale * block.expansion for scale in (2, 4, 8)]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        inputs = width
        for stage, depth in enumerate(depths):
            planes, blocks = width * 2 ** stage, []
            for index in range(depth):
                stride, outputs = (2 if stage and not index else 1), planes * block.expansion
                shortcut = None
                if stride > 1 or inputs != outputs:
                    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
                blocks.append(block(inputs, planes, stride, shortcut, norm_layer=norm))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if frozen:
            self.conv1.requires_grad_(False)
            self.layer1.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps of strides 8, 16, 32."""
        x = images.contiguous(memory_format=torch.channels_last)       # a quarter faster on CPU
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu_(), 3, stride=2, padding=1)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps[1:]

    def load_pretrained(self, name: str, source: bool | str) -> None:
        """source: True (torchvision's ImageNet weights, downloaded) or a local .pth / .safetensors of that layout."""
        advice = "use pretrained_backbone=FILE (torchvision's weights), or pretrained_backbone=False (from scratch)"
        if source is True:
            try:
                state = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(check_hash=True)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"cannot download ImageNet weights of {name} ({error}): {advice}") from None
        elif not Path(source).is_file():
            raise FileNotFoundError(f"no backbone weights at {source}: {advice}")
        elif str(source).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(source)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{source}: not the weights of this {name} ({reason}): {advice}") from None


# ---------------------------------------------------------------------------------------------------- position encoding

def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of x clamped to [0, 1], each of x and 1 - x at least eps (DAB-DETR and DINO 1e-3, Deformable DETR 1e-5)."""
    x = x.clamp(0, 1)
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()


def sine_embedding(x: Tensor, dim: int, temperature: float) -> Tensor:
    """(...,) angles -> (..., dim): sin and cos interleaved, wavelengths from 2 pi to 2 pi * temperature."""
    angle = x[..., None] / temperature ** (torch.arange(0, dim, 2, device=x.device) / dim)      # (..., dim / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def image_positions(padding: Tensor, dim: int, temperature: float, offset: float = 0.) -> Tensor:
    """(B, H, W) padding -> (B, H, W, dim) sine encoding of each cell's place in its own unpadded image, y then x.

    offset: -0.5 in Deformable DETR (cell centres), none in DAB-DETR and DINO.
    """
    inside = (~padding).float()
    y, x = inside.cumsum(1), inside.cumsum(2)                           # (B, H, W), 1 at the first row / column
    y = (y + offset) / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine_embedding(y, dim // 2, temperature), sine_embedding(x, dim // 2, temperature)], -1)


def box_positions(boxes: Tensor, dim: int) -> Tensor:
    """(..., 4) boxes -> (..., 4 * dim) sine encoding in the order y, x, w, h that DAB-DETR and DINO use."""
    return sine_embedding(boxes[..., [1, 0, 2, 3]] * 2 * math.pi, dim, 10000.).flatten(-2)


def token_centres(shapes: list, valid_ratios: Tensor) -> Tensor:
    """(B, S, 2) centre (x, y) of every token as fractions of its image's own size; beyond 1 in the padding."""
    centres = []
    for (height, width), ratio in zip(shapes, valid_ratios.unbind(1)):  # ratio (B, 2)
        y = (torch.arange(height, device=ratio.device) + 0.5) / (ratio[:, 1:] * height)     # (B, H)
        x = (torch.arange(width, device=ratio.device) + 0.5) / (ratio[:, :1] * width)       # (B, W)
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        centres.append(grid.flatten(1, 2))                              # (B, H, W, 2) -> (B, H * W, 2)
    return torch.cat(centres, 1)


# ------------------------------------------------------------------------------------------------- deformable attention

def full_precision(x: Tensor) -> Tensor:
    """At least float32: places and boxes need more than bfloat16's three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def deformable_sample(value: Tensor, shapes: list, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples: the inner product of multi-scale deformable attention.

    value (B, S, heads, d), points (B, Q, heads, levels, P, 2) as (x, y) fractions of the padded map, zero outside,
    weights (B, Q, heads, levels, P). Returns (B, Q, heads * d). For grid_sample the heads go into the batch. It was the
    fastest way to train on CPU: gather, embedding_bag and dense attention maps took 1.3 to 4 times as long.
    """
    batch, _, heads, dim = value.shape
    queries, levels, count = points.shape[1], points.shape[3], points.shape[4]
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, -1)                      # (B*heads, d, S)
    grids = (2 * points - 1).permute(3, 0, 2, 1, 4, 5).reshape(levels, batch * heads, queries, count, 2)
    samples = [F.grid_sample(level.unflatten(2, shape), grid, padding_mode="zeros", align_corners=False)
               for level, shape, grid in zip(maps.split([h * w for h, w in shapes], 2), shapes, grids)]
    samples = torch.cat(samples, -1)                                                      # (B*heads, d, Q, levels*P)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * count)
    return (samples * weights).sum(-1).view(batch, heads * dim, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at a few learned points around its reference, on every level (Deformable DETR, Eq. 3)."""
    recorder = None                    # set by `record`: called with points and weights

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Head i looks in direction i of a circle (stretched to a square), point p at p + 1 cells; equal weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)                           # (heads, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]                                 # (points, 1)
        start = (direction[:, None, None] * steps).expand(-1, self.levels, -1, -1)        # (heads, levels, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(start.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query, centre, unit, tokens, padding, shapes) -> Tensor:
        """query (B, Q, D) looks at tokens (B, S, D), at the places centre + offset * unit -> (B, Q, D).

        centre, unit: (B or 1, Q or 1, levels, 2), (x, y) as fractions of the padded map. The unit of an offset is one
        cell of the level when the reference is a point, (w, h) / (2 * points) when it is a box. padding (B, S).
        """
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.).unflatten(-1, (self.heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            query = full_precision(query)
            offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
            weights = self.attention_weights(query).unflatten(-1, (self.heads, self.levels * self.points)).softmax(-1)
            weights = weights.unflatten(-1, (self.levels, self.points))                 # (B, Q, heads, levels, points)
            points = centre[:, :, None, :, None] + offsets * unit[:, :, None, :, None]  # (B, Q, heads, .., .., 2)
            if self.recorder:
                self.recorder(points.detach(), weights.detach())
            mixed = deformable_sample(full_precision(value), shapes, points, weights)
        return self.output_proj(mixed)


# -------------------------------------------------------------------------------------------------------------- encoder

class FeedForward(nn.Module):
    """The two linear layers of a transformer layer, with residual and norm."""
    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn_dim, levels, points, dropout):
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, tokens, position, centre, unit, padding, shapes):
        attended = self.attention(tokens + position, centre, unit, tokens, padding, shapes)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class DeformableEncoder(nn.Module):
    """Feature maps -> Memory: project to one width, tell the levels apart, let the tokens attend to one another."""
    def __init__(self, channels, dim, heads, ffn_dim, layers, levels, points, dropout, temperature, offset):
        super().__init__()
        self.dim, self.temperature, self.offset = dim, temperature, offset
        self.inputs = min(levels, len(channels))         # the coarsest maps of the backbone; more levels are made here
        convolutions = [nn.Conv2d(c, dim, 1) for c in channels[-self.inputs:]]
        for level in range(self.inputs, levels):
            convolutions.append(nn.Conv2d(channels[-1] if level == self.inputs else dim, dim, 3, stride=2, padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        groups = math.gcd(32, dim)                       # 32 in every official model
        self.project = nn.ModuleList(nn.Sequential(c, nn.GroupNorm(groups, dim)) for c in convolutions)
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, ffn_dim, levels, points, dropout) for _ in range(layers))

    def forward(self, maps: list[Tensor], padding: Tensor) -> Memory:
        """maps: (B, channels, H_l, W_l), finest first; padding (B, H, W) of the images."""
        maps = list(maps[-self.inputs:])
        projected = [project(x) for project, x in zip(self.project, maps)]
        for project in self.project[self.inputs:]:       # the first extra level is made from raw C5, the next from it
            projected.append(project(maps[-1] if len(projected) == self.inputs else projected[-1]))
        shapes = [tuple(x.shape[-2:]) for x in projected]
        # Every level, also the extra ones, takes the nearest pixel of the image's own mask.
        pixels = padding[:, None].float()
        masks = [F.interpolate(pixels, size=shape)[:, 0].bool() for shape in shapes]      # (B, H_l, W_l)
        ratios = [torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1) for m in masks]
        valid_ratios = torch.stack(ratios, 1)                                             # (B, levels, 2): w, h
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in projected], 1)          # (B, S, D)
        position = torch.cat([(image_positions(mask, self.dim, self.temperature, self.offset) + level).flatten(1, 2)
                              for mask, level in zip(masks, self.level_embed)], 1)        # (B, S, D)
        mask = torch.cat([m.flatten(1) for m in masks], 1)                                # (B, S)
        # A centre in its own image -> the same place on every level's padded map: (B, S, 1, 2) with (B, 1, levels, 2)
        centre = token_centres(shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        cell = 1 / torch.tensor([[[(w, h) for h, w in shapes]]]).to(tokens.device, non_blocking=True)    # (1, 1, .., 2)
        for layer in self.layers:
            tokens = layer(tokens, position, centre, cell, mask, shapes)
        return Memory(tokens, mask, shapes, valid_ratios)


# -------------------------------------------------------------------------------------------------------------- decoder

class MLP(nn.Module):
    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def box_head(dim: int) -> MLP:
    """Box offsets in logit space, none at the start."""
    head = MLP(dim, dim, dim, 4)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


def class_head(dim: int, classes: int) -> nn.Linear:
    """One sigmoid per class, 0.01 at the start, so that the many background queries do not swamp the first steps."""
    head = nn.Linear(dim, classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


class SelfAttention(nn.Module):
    """Dense attention among queries; positions enter queries and keys, not values."""
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)     # as one (3D, D) matrix, as in nn.MultiheadAttention
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x, position (B, Q, D); attend (Q, Q) or (B, 1, Q, Q) bool, True where the row may look at the column."""
        dim = x.shape[-1]
        both = F.linear(x + position, self.in_proj_weight[:2 * dim], self.in_proj_bias[:2 * dim])
        value = F.linear(x, self.in_proj_weight[2 * dim:], self.in_proj_bias[2 * dim:])
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (*both.chunk(2, -1), value))
        mixed = F.scaled_dot_product_attention(query, key, value, attend, self.dropout if self.training else 0.)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))                          # (B, heads, Q, d) -> (B, Q, D)


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn_dim, levels, points, dropout):
        super().__init__()
        self.self_attention, self.self_norm = SelfAttention(dim, heads, dropout), nn.LayerNorm(dim)
        self.cross_attention, self.cross_norm = DeformableAttention(dim, heads, levels, points), nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, centre, unit, memory: Memory, attend):
        x = self.self_norm(x + self.dropout(self.self_attention(x, position, attend)))
        attended = self.cross_attention(x + position, centre, unit, memory.tokens, memory.padding, memory.shapes)
        return self.ffn(self.cross_norm(x + self.dropout(attended)))


class DinoDecoder(nn.Module):
    """Refines reference boxes layer by layer; the heads are shared by all layers."""
    eps = 1e-3                                           # of every inverse_sigmoid in DINO

    def __init__(self, classes, dim, heads, ffn_dim, layers, levels, points, dropout):
        super().__init__()
        self.dim, self.points = dim, points
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn_dim, levels, points, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.position = MLP(2 * dim, dim, dim)
        for layer in self.position.layers:
            nn.init.xavier_uniform_(layer.weight)
        self.class_head, self.box_head = class_head(dim, classes), box_head(dim)

    def forward(self, memory: Memory, content: Tensor, boxes: Tensor, attend: Tensor | None) -> Detections:
        """content (B, Q, D), boxes (B, Q, 4), attend (Q, Q), (B, Q, Q) or None: every query sees every other."""
        if attend is not None and attend.ndim == 3:
            attend = attend[:, None]                                                      # (B, 1, Q, Q), for all heads
        ratios = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]       # (B, 1, levels, 4)
        boxes = full_precision(boxes)
        detached, undetached, outputs, predicted = boxes.detach(), boxes, [], []
        for layer in self.layers:
            centre, side = (detached[:, :, None] * ratios).split(2, -1)                   # (B, Q, levels, 2)
            # The position is that on level 0 alone, as official.
            position = self.position(box_positions(torch.cat([centre[:, :, 0], side[:, :, 0]], -1), self.dim // 2))
            content = layer(content, position, centre, side * (0.5 / self.points), memory, attend)
            outputs.append(self.norm(content))
            # Look forward twice: a prediction refines the *undetached* box of the layer before, so its loss trains two
            # layers' box offsets, while what the next layer looks at is detached.
            refined = full_precision(self.box_head(outputs[-1])) + inverse_sigmoid(undetached, self.eps)
            predicted.append(refined.sigmoid())
            if layer is not self.layers[-1]:
                # The next reference comes from the raw output, the prediction above from the normed one.
                undetached = (full_precision(self.box_head(content)) + inverse_sigmoid(detached, self.eps)).sigmoid()
                detached = undetached.detach()
        return Detections(full_precision(self.class_head(torch.stack(outputs))), torch.stack(predicted))


class Proposals(nn.Module):
    """The encoder's own detections: every token proposes a box, the best become reference boxes (two-stage)."""
    def __init__(self, classes, dim):
        super().__init__()
        self.project, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.project.weight)
        self.class_head, self.box_head = class_head(dim, classes), box_head(dim)

    def forward(self, memory: Memory, count: int) -> Detections:
        """The `count` tokens of highest class score, best first; all tokens if there are fewer."""
        centres = token_centres(memory.shapes, memory.valid_ratios)                       # (B, S, 2)
        sides = torch.cat([centres.new_full((h * w, 2), 0.05 * 2 ** level)                # w = h = 0.05, 0.1, ...
                           for level, (h, w) in enumerate(memory.shapes)])
        anchors = torch.cat([centres, sides.expand(len(centres), -1, -1)], -1)            # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True) & ~memory.padding[..., None]
        # Unusable tokens are zeroed, not excluded: when they win, +inf makes them the box (1, 1, 1, 1), as official.
        anchors = (anchors / (1 - anchors)).log().masked_fill(~usable, math.inf)
        tokens = self.norm(self.project(memory.tokens.masked_fill(~usable, 0.)))
        logits = full_precision(self.class_head(tokens))                                  # (B, S, C)
        best = logits.amax(-1).topk(min(count, logits.shape[1]), 1).indices[..., None]    # (B, Q, 1)
        logits, tokens, anchors = (x.gather(1, best.expand(-1, -1, x.shape[-1])) for x in (logits, tokens, anchors))
        boxes = (full_precision(self.box_head(tokens)) + anchors).sigmoid()               # of the chosen tokens only
        return Detections(logits[None], boxes[None])


# ------------------------------------------------------------------------------------------------------------ denoising

def denoising_groups(number: int, objects: int) -> int:
    """How many groups of (positives, negatives) the official code makes of `number` and the largest object count.

    2 * number // (2 * objects), at least 1; but below 2 * number = 100 the doubled number itself is the group count.
    """
    if objects == 0:
        return 0
    return max(2 * number // (2 * objects), 1) if 2 * number >= 100 else 2 * number


def denoising_noise(batch: int, groups: int, objects: int, classes: int, device) -> dict[str, Tensor]:
    """The random draws of `denoising_queries`, apart from it so that a test can bring its own."""
    shape = (batch, 2 * groups, objects)
    return {"flip": torch.rand(shape, device=device),                        # below half the ratio: the label changes
            "label": torch.randint(classes, shape, device=device),           # ... to this one
            "sign": torch.randint(2, (*shape, 4), device=device) * 2 - 1,    # a corner moves in- or outwards
            "shift": torch.rand((*shape, 4), device=device)}                 # by this part of half the side


def denoising_queries(targets: criterion.Targets, embedding: Tensor, noise: dict[str, Tensor], label_noise: float,
                      box_noise: float, eps: float) -> tuple[Tensor, Tensor]:
    """Contrastive denoising queries: noised copies of the objects, a positive and a farther negative of each per group.

    embedding (C or more, D), noise from `denoising_noise`. Returns content (B, 2 * groups * K, D) and boxes (.., 4).
    Slots of images with fewer than K objects are not masked out, as official: content 0, box (.5, .5, .5, .5).
    """
    repeats = noise["flip"].shape[1]                                     # 2 * groups: positives, negatives, ...
    valid = targets.valid[:, None].expand(-1, repeats, -1)               # (B, 2G, K)
    # A random class may be the true one again; half the ratio is the official probability.
    labels = torch.where(noise["flip"] < label_noise * 0.5, noise["label"], targets.labels[:, None])
    content = F.embedding(labels, embedding) * valid[..., None]          # (B, 2G, K, D)
    boxes = targets.boxes[:, None].expand(-1, repeats, -1, -1)           # (B, 2G, K, 4)
    if box_noise > 0:
        negative = (torch.arange(repeats, device=boxes.device) % 2)[:, None, None]      # 0, 1, 0, 1, ...
        move = noise["sign"] * (noise["shift"] + negative) * boxes[..., [2, 3, 2, 3]] / 2 * box_noise
        corners = (box_convert(boxes, "cxcywh", "xyxy") + move).clamp(0, 1)
        boxes = box_convert(corners, "xyxy", "cxcywh")
    boxes = torch.where(valid[..., None], inverse_sigmoid(boxes, eps), 0.).sigmoid()
    return content.flatten(1, 2), boxes.flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------------- DINO

class Dino(nn.Module):
    """DINO (Zhang et al. 2022): deformable encoder and decoder, two-stage mixed query selection, contrastive denoising.

    The defaults of __init__ are the official 4-scale R50 recipe. See `build` for the arguments.
    """
    eps = 1e-6                                           # of the GIoU
    matcher_weights = (2., 5., 2.)                       # class, L1, GIoU

    def __init__(self, num_classes, backbone, *, hidden_dim=256, heads=8, ffn_dim=2048, encoder_layers=6,
                 decoder_layers=6, num_queries=900, feature_levels=4, points=4, dropout=0.,
                 denoising=100, box_noise=0.4, label_noise=0.5):
        super().__init__()
        self.num_classes, self.num_queries, self.decoder_layers = num_classes, num_queries, decoder_layers
        self.denoising, self.box_noise, self.label_noise = denoising, box_noise, label_noise
        self.backbone = backbone
        self.encoder = DeformableEncoder(backbone.channels, hidden_dim, heads, ffn_dim, encoder_layers, feature_levels,
                                         points, dropout, temperature=20., offset=0.)
        self.decoder = DinoDecoder(num_classes, hidden_dim, heads, ffn_dim, decoder_layers, feature_levels,
                                   points, dropout)
        self.proposals = Proposals(num_classes, hidden_dim)
        # The official heads of the proposals start as copies of the decoder's.
        self.proposals.class_head.load_state_dict(self.decoder.class_head.state_dict())
        self.proposals.box_head.load_state_dict(self.decoder.box_head.state_dict())
        self.content = nn.Embedding(num_queries, hidden_dim)
        nn.init.xavier_uniform_(self.content.weight)
        self.label_embed = nn.Embedding(num_classes + 1, hidden_dim)     # the last row is never drawn; official has it

    @property
    def label_embedding(self) -> Tensor:
        """(C, D) content of a query that is told its class."""
        return self.label_embed.weight[:self.num_classes]

    @property
    def learned_content(self) -> Tensor:
        """(Q, D) content of the learned queries, by rank of the proposal."""
        return self.content.weight

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        return self.encoder(self.backbone(images), padding)

    def decode(self, memory: Memory, content: Tensor, boxes: Tensor, attend: Tensor | None = None,
               position: None = None) -> Detections:
        """Decode any queries: content (B, Q, D), reference boxes (B, Q, 4), attend (B, Q, Q) or None: all see all.

        Q = 0 is fine. The boxes get no gradient through where the decoder looks, only through what it predicts.
        position is part of the contract for detectors that cannot make it from boxes; DINO does and takes None only.
        """
        if position is not None:
            raise ValueError("DINO makes its positional queries from boxes: pass position=None")
        return self.decoder(memory, content, boxes, attend)

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None, extra: tuple | None = None,
                noise: dict[str, Tensor] | None = None) -> Output:
        """All queries in one decoder pass, as groups: [denoising, learned, extra].

        targets: per image "labels" (K_b,) and "boxes" (K_b, 4); denoising queries are made of them in training mode.
        extra: (content (B, E, D), boxes (B, E, 4), attend (B, E, E) or None, valid), decoded unseen by and not seeing
        the other groups; valid (B, E) only matters to the caller's loss. noise: fixed draws, see `denoising_noise`.
        """
        memory = self.encode(images, padding)
        proposals = self.proposals(memory, self.num_queries)
        # Mixed query selection: boxes from the encoder (detached), content learned, by rank.
        boxes = [proposals.boxes[0].detach()]
        content = [self.content.weight[:boxes[0].shape[1]].expand(len(images), -1, -1)]
        slots, groups, objects, learned = 0, 0, 0, boxes[0].shape[1]
        if self.training:
            # label_embed stays in the graph without denoising queries: distributed training waits for every gradient.
            content[0] = content[0] + 0. * self.label_embed.weight[0, 0]
        if self.training and self.denoising > 0 and targets is not None:
            padded = criterion.pad_targets(targets)
            objects = padded.labels.shape[1]
            groups = denoising_groups(self.denoising, objects)
            slots = 2 * groups * objects
        if slots:
            noise = noise or denoising_noise(len(images), groups, objects, self.num_classes, images.device)
            noised = denoising_queries(padded, self.label_embed.weight, noise, self.label_noise, self.box_noise,
                                       self.decoder.eps)
            content.insert(0, noised[0])
            boxes.insert(0, noised[1])
        if extra is not None:
            content.append(extra[0])
            boxes.append(extra[1])
        attend = self.attention_groups(learned, groups, objects, extra, images.device)
        decoded = self.decode(memory, torch.cat(content, 1), torch.cat(boxes, 1), attend)

        sizes = [slots, learned, decoded.boxes.shape[2] - slots - learned]
        logits, boxes = decoded.logits.split(sizes, 2), decoded.boxes.split(sizes, 2)
        return Output(memory, Detections(logits[1], boxes[1]), proposals,
                      Denoising(logits[0], boxes[0], groups, objects) if slots else None,
                      Detections(logits[2], boxes[2]) if extra is not None else None)

    @staticmethod
    def attention_groups(learned: int, groups: int, objects: int, extra: tuple | None, device) -> Tensor | None:
        """(Q, Q) or (B, Q, Q) bool mask of the joint pass, True where the row may look at the column; None: everywhere.

        Denoising groups see themselves and the learned queries, learned queries only learned ones (seeing a noised
        object would give its answer away); extra queries see what their own `attend` says and nothing else.
        """
        if not groups and extra is None:
            return None
        noised = torch.arange(2 * groups * objects, device=device) // (2 * max(objects, 1))
        group = torch.cat([noised, torch.full((learned,), groups, device=device)])
        attend = (group[:, None] == group) | (group == groups)                            # (Q, Q)
        if extra is None:
            return attend
        content, _, among, _ = extra
        batch, count = content.shape[:2]
        attend = F.pad(attend.expand(batch, -1, -1), (0, count, 0, count))                # (B, Q + E, Q + E), False
        attend[:, len(group):, len(group):] = True if among is None else among
        return attend

    def loss(self, output: Output, targets: list[dict]) -> dict[str, Tensor]:
        """Unweighted losses by their official names: loss_ce, loss_bbox, loss_giou of the last layer, _0, _1, .. of the
        others, _interm of the encoder's proposals, _dn, _dn_0, .. of the denoising queries (0 when there are none).

        Raises ValueError on predictions or targets that are not finite.
        """
        wanted = criterion.pad_targets(targets)
        found = output.detections
        count = criterion.normaliser(wanted.counts, found.logits.device)
        # The proposals are as many as the learned queries: one more layer to match, in the same call.
        logits = torch.cat([found.logits, output.proposals.logits])
        boxes = torch.cat([found.boxes, output.proposals.boxes])
        query, matched = criterion.match(logits, boxes, wanted, self.matcher_weights, self.eps)
        values = criterion.set_losses(logits, boxes, wanted, query, matched, count, self.eps)
        if self.denoising > 0:
            noised = self.denoising_losses(output.denoising, wanted, count)
            values = [torch.cat(pair) for pair in zip(values, noised)]
        return {f"loss_{kind}{suffix}": x for kind, each in zip(("ce", "bbox", "giou"), values)
                for suffix, x in zip(self.suffixes, each.unbind(), strict=True)}

    def denoising_losses(self, found: Denoising | None, wanted: criterion.Targets, count: Tensor) -> tuple:
        """(ce, bbox, giou), each (L,). Nothing to match: slot k of a group is object k, all other slots background."""
        if found is None:
            return (count.new_zeros(self.decoder_layers),) * 3
        groups, objects = found.groups, found.objects
        first = torch.arange(groups, device=count.device)[:, None] * 2 * objects          # (G, 1): where a group begins
        query = (first + torch.arange(objects, device=count.device)).flatten()            # (G * K,)
        repeated = criterion.Targets(wanted.labels.repeat(1, groups), wanted.boxes.repeat(1, groups, 1),
                                     wanted.valid.repeat(1, groups), wanted.counts)
        query, matched = query.expand(*found.logits.shape[:2], -1), repeated.valid.expand(len(found.logits), -1, -1)
        return criterion.set_losses(found.logits, found.boxes, repeated, query, matched, count * groups, self.eps)

    @property
    def suffixes(self) -> list[str]:
        """Of the losses' names, in the order in which `loss` stacks the predictions."""
        layers = [f"_{i}" for i in range(self.decoder_layers - 1)] + [""]
        return layers + ["_interm"] + [f"_dn{suffix}" for suffix in layers if self.denoising > 0]

    @property
    def loss_weights(self) -> dict[str, float]:
        """Official: class 1, L1 5, GIoU 2, the same for every layer, the proposals and the denoising queries."""
        return {f"loss_{kind}{suffix}": weight for suffix in self.suffixes
                for kind, weight in (("ce", 1.), ("bbox", 5.), ("giou", 2.))}

    def parameter_groups(self, lr: float = 1e-4, backbone_lr: float = 1e-5) -> list[dict]:
        """For AdamW, as official: the backbone slower, weight decay on everything, no frozen parameters."""
        slow = {id(p) for p in self.backbone.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in trained if id(p) not in slow], "lr": lr},
                {"params": [p for p in trained if id(p) in slow], "lr": backbone_lr}]


# ----------------------------------------------------------------------------------- build, postprocess, record, gflops

def build(name: str, num_classes: int, *, backbone: str | nn.Module = "resnet50", backbone_width: int = 64,
          pretrained_backbone: bool | str = True, frozen_backbone: bool | None = None, **overrides) -> nn.Module:
    """A detector; without overrides the official R50 recipe of `name`, one of DETECTORS.

    backbone: "resnet18|34|50|101", or your own module: images -> list of maps, finest first, with .channels.
    backbone_width: 64 is the standard ResNet. pretrained_backbone: True (torchvision's ImageNet weights, downloaded),
    False, or a local file with torchvision's names; ignored for your own module. frozen_backbone: see `ResNet`; by
    default True exactly with pretrained weights. Further overrides and their official values: the arguments of the
    detector's class (`Dino`). feature_levels: up to 3 are the coarsest maps of the backbone (3: strides 8, 16, 32),
    more are made by strided convolutions. denoising: number of queries, see `denoising_groups`; 0 for none.

    model.config holds the resolved overrides as plain values: build(name, num_classes, **model.config) gives the same
    architecture, without downloading pretrained weights again. Raises ValueError on unknown names and values.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}: choose one of {', '.join(DETECTORS)}")
    if name != "dino":
        raise ValueError(f"{name} is not part of this version yet: use dino")
    options = {k: p.default for k, p in inspect.signature(Dino.__init__).parameters.items() if p.kind == p.KEYWORD_ONLY}
    if unknown := sorted(overrides.keys() - options):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it has {', '.join(options)}")
    options |= overrides
    if options["hidden_dim"] % 4 or options["hidden_dim"] % options["heads"]:
        raise ValueError(f"hidden_dim {options['hidden_dim']} must be a multiple of 4 and of heads {options['heads']}")
    if options["feature_levels"] < 1 or options["decoder_layers"] < 1:
        raise ValueError("feature_levels and decoder_layers must be at least 1")
    custom = isinstance(backbone, nn.Module)
    frozen = bool(pretrained_backbone) if frozen_backbone is None else frozen_backbone
    if custom:
        body = backbone
    elif backbone not in RESNETS:
        raise ValueError(f"unknown backbone {backbone!r}: choose one of {', '.join(RESNETS)}, or pass your own module")
    elif backbone_width < 8:
        # Strided 1x1 convolutions of 2 to 7 channels in channels_last damage memory in torch's CPU build (2.15).
        raise ValueError(f"backbone_width {backbone_width} is too narrow: use 8 or more")
    else:
        if pretrained_backbone is True and backbone_width != 64:
            raise ValueError(f"no ImageNet weights exist for backbone_width {backbone_width}: "
                             "use 64, or pretrained_backbone=False, or a file of your own")
        body = ResNet(backbone, backbone_width, frozen)
        if pretrained_backbone:
            body.load_pretrained(backbone, pretrained_backbone)
    model = Dino(num_classes, body, **options)
    model.detector = name
    model.config = {"backbone": "custom" if custom else backbone, "backbone_width": backbone_width,
                    "pretrained_backbone": False, "frozen_backbone": frozen, **options}
    return model


def postprocess(detections: Detections, sizes, k: int = 300) -> list[dict]:
    """The last layer's k best (query, class) pairs of each image, best first; a query may appear with several classes.

    sizes: (B, 2) original (height, width), tensor or list. k: 300 officially for DINO, at most Q * C.
    Returns per image scores (k,), labels (k,), boxes (k, 4) xyxy in pixels.
    """
    logits, boxes = detections.logits[-1], box_convert(detections.boxes[-1], "cxcywh", "xyxy")    # (B, Q, C), (B, Q, 4)
    scores, index = logits.sigmoid().flatten(1).topk(min(k, logits[0].numel()))           # (B, k)
    query, labels = index // logits.shape[2], index % logits.shape[2]
    scale = torch.as_tensor(sizes, device=boxes.device)[:, None, [1, 0, 1, 0]]            # (B, 1, 4): w, h, w, h
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4)) * scale
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]


@dataclass
class Recorded:
    """What one deformable attention looked at, see `record`."""
    points: Tensor
    weights: Tensor


@contextmanager
def record(model: nn.Module):
    """Collect what deformable attention looks at: `with record(model) as seen: model(...)`.

    seen["encoder.0"], seen["decoder.0"], ... hold .points (B, Q, heads, levels, points, 2), (x, y) as fractions of the
    padded image, and .weights (B, Q, heads, levels, points), of the last pass through that layer; the queries of an
    encoder layer are the tokens, those of a joint decoder pass come in the order denoising, learned, extra.
    No cost when not recording.
    """
    seen = {}
    modules = {f"encoder.{i}": layer.attention for i, layer in enumerate(model.encoder.layers)}
    modules |= {f"decoder.{i}": layer.cross_attention for i, layer in enumerate(model.decoder.layers)}
    for key, module in modules.items():
        module.recorder = lambda points, weights, key=key: seen.update({key: Recorded(points, weights)})
    try:
        yield seen
    finally:
        for module in modules.values():
            del module.recorder                          # back to the class's None


def gflops(model: nn.Module, height: int, width: int) -> float:
    """Multiply-adds / 1e9 of one image in eval mode, the convention of published tables.

    Counted: convolutions, matrix products and dense attention, and deformable sampling with 5 multiply-adds for each
    sampled channel (4 corners, 1 attention weight). Not counted: norms, activations, softmax. Computes shapes only.
    """
    def sampling(value_shape, grid_shape, *args, out_shape=None, **kwargs):
        return 2 * 5 * value_shape[0] * value_shape[1] * grid_shape[1] * grid_shape[2]    # 2 for each multiply-add

    twin = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.grid_sampler_2d: sampling})
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.no_grad():
        image = torch.zeros(1, 3, height, width, device=device)
        twin(image, torch.zeros_like(image[:, 0], dtype=torch.bool))
    return counter.get_total_flops() / 2e9
