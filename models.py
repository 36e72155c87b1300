"""Detection transformers in plain PyTorch, exact to the official implementations.

Read it from top to bottom: backbone, encoders, decoders, denoising, what detectors share, DAB-DETR,
Deformable DETR, DINO; then build, postprocess, record, gflops. Attention and position encodings are
in attention.py, matching and losses in criterion.py.

B batch, S tokens (all levels concatenated, finest first), D width, Q queries, L decoder layers,
C classes, K objects. Boxes are (cx, cy, w, h) as fractions of each image's own, unpadded size;
padding masks are True where padded.
"""
import copy
import inspect
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d, box_convert

import criterion
from attention import (
    MLP, ConditionalCrossAttention, ConditionalSelfAttention, DeformableAttention, FeedForward,
    SelfAttention, box_positions, full_precision, image_positions, inverse_sigmoid, token_centres,
    xavier_)

# A fourth detector is a subclass of Detector in CLASSES, in this order. train.py has its official
# schedule (SCHEDULES) and its part of each recipe (PRESETS, RECIPES), experiments/tables.py its
# letter of each table (TOY, PAPER, SMALL).
DETECTORS = ("dab_detr", "deformable_detr", "dino")


@dataclass
class Memory:
    """What the encoder hands to any decoder."""
    tokens: Tensor                     # (B, S, D)
    padding: Tensor                    # (B, S) bool; padded tokens are not zero, but masked
    shapes: list[tuple[int, int]]      # (H_l, W_l) of each level; S = sum H_l * W_l
    valid_ratios: Tensor               # (B, levels, 2): unpadded part of each level's width, height
    position: Tensor                   # (B, S, D) encoding of each token's place, for DAB-DETR


@dataclass
class Detections:
    logits: Tensor                     # (L, B, Q, C) before the sigmoid
    boxes: Tensor                      # (L, B, Q, 4)


@dataclass
class Denoising(Detections):
    """Predictions of the denoising queries; along Q each group: K positives, then K negatives."""
    groups: int
    objects: int                       # K, of the image with most; spare slots are background


@dataclass
class Output:
    memory: Memory
    detections: Detections             # of the learned queries
    proposals: Detections | None       # L = 1, the encoder's own detections of a two-stage model
    denoising: Denoising | None        # None in eval mode, and without targets or objects
    extra: Detections | None           # of the caller's queries


# ---------------------------------------------------------------------------------------- backbone

def normed(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(convolution(x)). A frozen norm is a scale and a shift, which go into weight and bias."""
    weight, bias, stride = convolution.weight, convolution.bias, convolution.stride
    if weight.shape[2:] == (1, 1) and weight.shape[1] < 16:
        # torch's CPU kernel for the weight gradient of a strided 1x1 convolution with 2 to 15 input
        # channels in channels_last writes past its memory (2.14 and 2.15, large maps of even
        # sides). Without stride it is sound.
        x = x[..., ::stride[0], ::stride[1]]
        stride = 1
    frozen = isinstance(norm, FrozenBatchNorm2d)
    if frozen:                         # one pass over the map instead of three
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()       # (outputs,)
        weight = weight * scale[:, None, None, None]
        bias = norm.bias - norm.running_mean * scale
    x = F.conv2d(x, weight, bias, stride, convolution.padding)
    return x if frozen else norm(x)


class BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        residual = normed(self.conv1, self.bn1, x).relu_()
        residual = normed(self.conv2, self.bn2, residual)
        return residual.add_(normed(*self.downsample, x) if self.downsample else x).relu_()


class Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        residual = normed(self.conv1, self.bn1, x).relu_()
        residual = normed(self.conv2, self.bn2, residual).relu_()
        residual = normed(self.conv3, self.bn3, residual)
        return residual.add_(normed(*self.downsample, x) if self.downsample else x).relu_()


# What to do instead, in errors about pretrained weights.
OTHER_WEIGHTS = ("use pretrained_backbone=checkpoints.load_backbone(FILE), or "
                 "pretrained_backbone=False (from scratch)")
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3))}


class ResNet(nn.Module):
    """torchvision's ResNet, with the same parameter names, that returns the maps C3, C4 and C5.

    width: planes of the stages are width * (1, 2, 4, 8). stages: 4, or 3 or 2 where nobody reads C5
    or C4.
    frozen: every BatchNorm has fixed statistics and scale, and the stem and first stage get no
    gradient, as in the official detectors. That only makes sense with pretrained weights.
    """

    def __init__(self, name: str, width: int = 64, frozen: bool = False, stages: int = 4):
        super().__init__()
        block, depths = RESNETS[name]
        self.stages = stages
        norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        self.channels = [width * scale * block.expansion for scale in (2, 4, 8)[:stages - 1]]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        inputs = width
        for stage, depth in enumerate(depths[:stages]):
            planes = width * 2 ** stage
            blocks = []
            outputs = planes * block.expansion
            for index in range(depth):
                stride = 2 if stage and not index else 1
                shortcut = None
                if stride > 1 or inputs != outputs:
                    resized = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                    shortcut = nn.Sequential(resized, norm(outputs))
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
        x = images.contiguous(memory_format=torch.channels_last)       # a quarter faster on a CPU
        x = F.max_pool2d(normed(self.conv1, self.bn1, x).relu_(), 3, stride=2, padding=1)
        maps = []
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return maps[1:]

    def load_pretrained(self, name: str, weights: bool | dict) -> None:
        """weights: True downloads torchvision's ImageNet weights; else a state_dict of its names."""
        if weights is True:
            try:
                weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
                weights = weights.get_state_dict(check_hash=True)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"cannot download ImageNet weights of {name} ({error}): "
                                 f"{OTHER_WEIGHTS}") from None
        # The classifier is not used, and this network may lack the last stages.
        unused = ("fc.", *(f"layer{stage}." for stage in range(self.stages + 1, 5)))
        weights = {key: value for key, value in weights.items() if not key.startswith(unused)}
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"pretrained_backbone: not the weights of this {name} ({reason}): "
                             f"{OTHER_WEIGHTS}") from None


class TimmBackbone(nn.Module):
    """A convolutional feature extractor of timm: maps of strides 8, 16, 32, or those it has.

    name: timm's.  coarsest: the largest stride that is read.
    frozen: as in `ResNet`, BatchNorms are fixed and nothing before stride 8 gets a gradient. What
    lies behind `coarsest` never does.
    weights: False, True (timm's own, downloaded) or a state_dict, see `timm_state`.
    Raises ValueError without timm, for names it lacks, models of a fixed image size, and weights
    that cannot be had.
    """
    def __init__(self, name: str, frozen: bool = False, coarsest: int = 32,
                 weights: bool | dict = False):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"backbone timm:{name} needs timm: pip install timm, or choose a "
                             "ResNet") from None
        # timm warns of a classifier in the file, which a feature extractor does not want.
        logging.getLogger("timm.models").setLevel(logging.ERROR)
        try:
            own = timm.get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError:                                     # also of a tag behind a known name
            raise ValueError(f"timm has no backbone {name!r}: choose a convolutional model of "
                             "timm.list_models()") from None
        with torch.device("meta"):                               # names and shapes only
            whole = timm.create_model(name).state_dict()
        given = isinstance(weights, dict) and {"state_dict": timm_state(whole, weights)}
        try:
            self.body = timm.create_model(name, features_only=True, pretrained=bool(weights),
                                          pretrained_cfg_overlay=given or None).eval()
            with torch.enable_grad():
                maps = self.body(torch.zeros(1, 3, 64, 96))
        except Exception as error:           # of a hub, a network, or an assertion on the size
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"cannot make backbone timm:{name} ({reason}): choose another model, "
                             f"or {OTHER_WEIGHTS}") from None
        self.body.pretrained_cfg = self.body.default_cfg = None  # hold the given tensors again
        strides = [64 // x.shape[2] for x in maps]
        self.chosen = [i for i, stride in enumerate(strides) if 8 <= stride <= coarsest]
        if not self.chosen or coarsest < 32 and strides[self.chosen[-1]] != coarsest:
            raise ValueError(f"backbone timm:{name} has maps of strides {strides}, none of "
                             f"{coarsest}: choose another")
        self.channels = [maps[i].shape[1] for i in self.chosen]
        self.frozen = frozen
        self.train()                             # the body was in eval mode for the trial pass
        parameters = list(self.body.parameters())

        def gradients(maps):
            """Of each weight; None where these maps do not depend on it."""
            return torch.autograd.grad([x.sum() for x in maps], parameters,
                                       allow_unused=True, retain_graph=True)

        # Nobody reads maps that are coarser. DDP would wait for the gradients of what makes them.
        read = gradients([maps[i] for i in self.chosen])
        fixed = [p for p, gradient in zip(parameters, read) if gradient is None]
        if frozen:
            early = [x for x, stride in zip(maps, strides) if stride < 8]
            used = zip(parameters, early and gradients(early))
            fixed += [p for p, gradient in used if gradient is not None]
            batch_norm = nn.modules.batchnorm._BatchNorm
            fixed += [m for m in self.body.modules() if isinstance(m, batch_norm)]
        for part in fixed:
            part.requires_grad_(False)
        # Images come normalised for torchvision's models; timm's were trained with their own
        # mean and deviation.
        values = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], own.mean, own.std)
        mean, std, own_mean, own_std = (torch.tensor(v).view(3, 1, 1) for v in values)
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def train(self, mode: bool = True):
        """Fixed BatchNorms stay in eval mode."""
        super().train(mode)
        self.body.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the chosen maps, finest first."""
        images = images * self.scale + self.shift
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        return [maps[i] for i in self.chosen]


def timm_state(whole: dict, given: dict) -> dict[str, Tensor]:
    """Given tensors under timm's names.

    whole: timm.create_model(name).state_dict(). Given are the same names, or other names for tensors
    of the same kinds (weight, bias, ..) and shapes in the same order. Raises ValueError in one line.
    """
    def shapes(tensors):
        return {key: value.shape for key, value in tensors.items()}

    def kinds(tensors):
        return [(key.rpartition(".")[2], value.shape) for key, value in tensors.items()]

    if shapes(given) == shapes(whole):
        return given
    if kinds(given) != kinds(whole):
        raise ValueError(f"pretrained_backbone: not the weights of this timm model: {OTHER_WEIGHTS}")
    print(f"backbone   loaded by position: {len(given)} tensors of the same kinds and shapes as "
          "timm's")
    return dict(zip(whole, given.values()))


# ---------------------------------------------------------------------------------------- encoders

def level_padding(padding: Tensor, shapes: list) -> tuple[list[Tensor], Tensor]:
    """Padding of images (B, H, W) -> of each level [(B, H_l, W_l)]; valid ratios (B, levels, 2)."""
    # Every level takes the nearest pixel of the image's own mask, also those made by convolutions.
    pixels = padding[:, None].float()
    masks = [F.interpolate(pixels, size=shape)[:, 0].bool() for shape in shapes]
    ratios = []
    for mask in masks:
        width, height = (~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)
        ratios.append(torch.stack([width, height], -1))                  # (B, 2)
    return masks, torch.stack(ratios, 1)


def cell_sizes(shapes: list, device) -> Tensor:
    """(1, 1, levels, 2): width and height of a cell of each level, fractions of the padded map."""
    sizes = torch.tensor([[[(w, h) for h, w in shapes]]], dtype=torch.float32)
    return 1 / sizes.to(device, non_blocking=True)


class DeformableEncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn_dim, levels, points, dropout):
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, tokens, position, centre, unit, padding, shapes):
        """tokens, position (B, S, D) -> (B, S, D); the others as in DeformableAttention, Q = S."""
        attended = self.attention(tokens + position, centre, unit, tokens, padding, shapes)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class GroupNorm(nn.GroupNorm):
    """Also where a group has a single value, which nn.GroupNorm refuses: one channel, one cell."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class DeformableEncoder(nn.Module):
    """Feature maps -> Memory: project to one width, mark the levels, let tokens attend."""

    def __init__(self, channels, dim, heads, ffn_dim, layers, levels, points, dropout,
                 temperature, offset):
        super().__init__()
        self.dim, self.temperature, self.offset = dim, temperature, offset
        # It reads the coarsest maps of the backbone. The first further level is made from the last
        # of them, the next from that level.
        self.inputs = min(levels, len(channels))
        convolutions = [nn.Conv2d(c, dim, 1) for c in channels[-self.inputs:]]
        widths = [channels[-1], *[dim] * levels]
        for width in widths[:levels - self.inputs]:
            convolutions.append(nn.Conv2d(width, dim, 3, stride=2, padding=1))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        groups = math.gcd(32, dim)                       # 32 in every official model
        self.project = nn.ModuleList(
            nn.Sequential(convolution, GroupNorm(groups, dim)) for convolution in convolutions)
        # Only layers read it, and DDP stops at a parameter that nothing reads.
        self.level_embed = nn.Parameter(torch.randn(levels, dim), requires_grad=layers > 0)
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(dim, heads, ffn_dim, levels, points, dropout)
            for _ in range(layers))

    def forward(self, maps: list[Tensor], padding: Tensor) -> Memory:
        """maps: (B, channels, H_l, W_l), finest first; padding (B, H, W) of the images."""
        maps = maps[-self.inputs:]
        projected = [project(x) for project, x in zip(self.project, maps)]
        source = maps[-1]
        for project in self.project[self.inputs:]:
            source = project(source)
            projected.append(source)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in projected], 1)      # (B, S, D)
        shapes = [tuple(x.shape[-2:]) for x in projected]
        masks, valid_ratios = level_padding(padding, shapes)
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)         # (B, S)
        positions = []
        for level_mask, level in zip(masks, self.level_embed):
            place = image_positions(level_mask, self.dim, self.temperature, self.offset)
            positions.append((place + level).flatten(1, 2))              # (B, H * W, D)
        position = torch.cat(positions, 1)                               # (B, S, D)
        # A centre in its own image -> the same place on every level's padded map.
        centre = token_centres(shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        cell = cell_sizes(shapes, tokens.device)                         # centre (B, S, levels, 2)
        for layer in self.layers:
            tokens = layer(tokens, position, centre, cell, mask, shapes)
        return Memory(tokens, mask, shapes, valid_ratios, position)


class DenseEncoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn_dim, dropout):
        super().__init__()
        self.attention = SelfAttention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout, nn.PReLU)

    def forward(self, tokens, position, attend):
        """tokens, position (B, S, D), attend (B, 1, 1, S) -> (B, S, D)."""
        attended = self.attention(tokens, position, attend)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class DenseEncoder(nn.Module):
    """One feature map -> Memory: every token attends to every other (DAB-DETR)."""

    def __init__(self, channels, dim, heads, ffn_dim, layers, stride, dropout, temperature, offset):
        super().__init__()
        self.dim, self.temperature, self.offset = dim, temperature, offset
        self.level = {8: 0, 16: 1, 32: -1}[stride]
        if stride == 16 and len(channels) < 2:
            raise ValueError("feature_stride 16 needs a backbone with maps of strides 8 and 16, "
                             "it has one map")
        self.project = nn.Conv2d(channels[self.level], dim, 1)
        self.position_scale = xavier_(MLP(dim, dim, dim))
        self.position_scale.requires_grad_(layers > 0)           # only layers read it
        self.layers = nn.ModuleList(
            DenseEncoderLayer(dim, heads, ffn_dim, dropout) for _ in range(layers))

    def forward(self, maps: list[Tensor], padding: Tensor) -> Memory:
        """maps: (B, channels, H_l, W_l), finest first; padding (B, H, W) of the images."""
        projected = self.project(maps[self.level])
        shapes = [tuple(projected.shape[-2:])]
        (mask,), valid_ratios = level_padding(padding, shapes)
        position = image_positions(mask, self.dim, self.temperature, self.offset)
        position = position.flatten(1, 2)                                # (B, S, D)
        mask = mask.flatten(1)                                           # (B, S)
        tokens = projected.flatten(2).transpose(1, 2)                    # (B, S, D)
        for layer in self.layers:
            # A token's content stretches its position, channel by channel.
            scaled = position * self.position_scale(tokens)
            tokens = layer(tokens, scaled, ~mask[:, None, None])
        return Memory(tokens, mask, shapes, valid_ratios, position)


# ---------------------------------------------------------------------------------------- decoders

def box_head(dim: int) -> MLP:
    """Offsets of a box in logit space, none at the start."""
    head = MLP(dim, dim, dim, 4)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


def class_head(dim: int, classes: int) -> nn.Linear:
    """One sigmoid per class, 0.01 at the start: the many background queries cost little then."""
    head = nn.Linear(dim, classes)
    nn.init.constant_(head.bias, -math.log(99))
    return head


class Heads(nn.ModuleList):
    """One head per decoder layer, or one for all; the copies start equal."""

    def __init__(self, head: nn.Module, copies: int):
        super().__init__([head] + [copy.deepcopy(head) for _ in range(copies - 1)])

    def of(self, layer: int) -> nn.Module:
        return self[layer if len(self) > 1 else 0]


def refined(head: nn.Module, content: Tensor, boxes: Tensor, eps: float) -> Tensor:
    """sigmoid(head(content) + logit(boxes)): boxes (.., 4) moved by what the content says.

    A point (.., 2) has no size to refine, so the head gives its width and height outright.
    """
    known = F.pad(inverse_sigmoid(boxes, eps), (0, 4 - boxes.shape[-1]))
    return (full_precision(head(content)) + known).sigmoid()


def for_heads(attend: Tensor | None) -> Tensor | None:
    """A mask (Q, Q), (B, Q, Q) or None as attention takes it: (B, 1, Q, Q), alike for all heads."""
    return attend[:, None] if attend is not None and attend.ndim == 3 else attend


class Decoder(nn.Module):
    """Heads that every decoder has, and the loop of those that refine boxes layer by layer."""
    detach_first = True                # does the first layer look from detached boxes?

    def add_heads(self, dim: int, classes: int, copies: int):
        self.class_heads = Heads(class_head(dim, classes), copies)
        self.box_heads = Heads(box_head(dim), copies)

    def look(self, index: int, content, boxes, memory: Memory, attend) -> Tensor:
        """Layer `index` of queries at these boxes -> their new content (B, Q, D)."""
        raise NotImplementedError

    def forward(self, memory: Memory, content: Tensor, boxes: Tensor,
                attend: Tensor | None) -> Detections:
        """content (B, Q, D), boxes (B, Q, 4); attend (Q, Q), (B, Q, Q) or None: all see all."""
        attend = for_heads(attend)
        undetached = full_precision(boxes)
        outputs, predicted = [], []
        boxes = undetached.detach() if self.detach_first else undetached
        for index, layer in enumerate(self.layers):
            content = self.look(index, content, boxes, memory, attend)
            outputs.append(self.norm(content))
            # Look forward twice: a prediction refines the *undetached* box of the layer before, so
            # its loss trains the box offsets of two layers. The next layer looks from a detached
            # box, made from the raw output; the prediction is made from the normed one.
            head = self.box_heads.of(index)
            predicted.append(refined(head, outputs[-1], undetached, self.eps))
            if layer is not self.layers[-1]:
                undetached = refined(head, content, boxes, self.eps)
                boxes = undetached.detach()
        return self.detections(outputs, predicted)

    def detections(self, outputs: list[Tensor], boxes: list[Tensor]) -> Detections:
        logits = [self.class_heads.of(index)(x) for index, x in enumerate(outputs)]
        return Detections(full_precision(torch.stack(logits)), torch.stack(boxes))


class DabDecoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn_dim, dropout, first):
        super().__init__()
        self.self_attention = ConditionalSelfAttention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = ConditionalCrossAttention(dim, heads, dropout, first)
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout, nn.PReLU)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, sine, memory: Memory, attend):
        """x, position, sine (B, Q, D), attend as in SelfAttention -> (B, Q, D)."""
        x = self.self_norm(x + self.dropout(self.self_attention(x, position, attend)))
        visible = ~memory.padding[:, None, None]                         # (B, 1, 1, S)
        attended = self.cross_attention(
            x, position, sine, memory.tokens, memory.position, visible)
        return self.ffn(self.cross_norm(x + self.dropout(attended)))


class DabDecoder(Decoder):
    """Refines anchors: an anchor says where a query looks, and how wide and high."""
    detach_first = False               # so the first layer trains the learned anchors

    def __init__(self, classes, dim, heads, ffn_dim, layers, dropout, eps):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.layers = nn.ModuleList(
            DabDecoderLayer(dim, heads, ffn_dim, dropout, i == 0) for i in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.position = xavier_(MLP(2 * dim, dim, dim))
        self.position_scale = xavier_(MLP(dim, dim, dim))
        self.position_scale.requires_grad_(layers > 1)           # the first layer does not read it
        self.anchor_size = xavier_(MLP(dim, dim, 2))
        self.add_heads(dim, classes, 1)

    def look(self, index, content, boxes, memory, attend):
        half = self.dim // 2
        encoded = box_positions(boxes, half)                             # (B, Q, 2 D): y, x, w, h
        position, sine = self.position(encoded), encoded[..., :self.dim]
        if index:
            sine = sine * self.position_scale(content)
        # Stretch attention around the anchor by (wanted size) / (its size), in y and x apart.
        wanted = full_precision(self.anchor_size(content)).sigmoid()     # (B, Q, 2)
        # A side of 0 would make NaN of every query, and 1 over a sliver overflows half precision.
        width, height = (wanted / boxes[..., 2:].clamp(min=2e-5)).split(1, -1)
        sine = torch.cat([sine[..., :half] * height, sine[..., half:] * width], -1)
        return self.layers[index](content, position, sine, memory, attend)


class DeformableDecoderLayer(nn.Module):
    def __init__(self, dim, heads, ffn_dim, levels, points, dropout):
        super().__init__()
        self.self_attention = SelfAttention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, levels, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position, centre, unit, memory: Memory, attend):
        """x, position (B, Q, D) -> (B, Q, D); centre and unit as in DeformableAttention."""
        x = self.self_norm(x + self.dropout(self.self_attention(x, position, attend)))
        attended = self.cross_attention(
            x + position, centre, unit, memory.tokens, memory.padding, memory.shapes)
        return self.ffn(self.cross_norm(x + self.dropout(attended)))


class DeformableDecoder(Decoder):
    """Deformable DETR's: fixed positional queries; references stay, or each layer refines them."""

    def __init__(self, classes, dim, heads, ffn_dim, layers, levels, points, dropout, eps, refine):
        super().__init__()
        self.points, self.eps, self.refine = points, eps, refine
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(dim, heads, ffn_dim, levels, points, dropout)
            for _ in range(layers))
        self.add_heads(dim, classes, layers if refine else 1)

    def forward(self, memory: Memory, content: Tensor, position: Tensor, references: Tensor,
                attend: Tensor | None) -> Detections:
        """content, position (B, Q, D); references (B, Q, 2) points or (B, Q, 4) boxes."""
        attend, references = for_heads(attend), full_precision(references)
        outputs, predicted = [], []
        ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None]            # (B, 1, levels, 4)
        for index, layer in enumerate(self.layers):
            size = references.shape[-1]
            placed = references[:, :, None] * ratios[..., :size]         # (B, Q, levels, 2 or 4)
            centre, side = placed.split([2, size - 2], -1)
            cell = cell_sizes(memory.shapes, side.device)
            unit = side * (0.5 / self.points) if size == 4 else cell
            content = layer(content, position, centre, unit, memory, attend)
            outputs.append(content)
            predicted.append(refined(self.box_heads.of(index), content, references, self.eps))
            if self.refine:
                references = predicted[-1].detach()
        return self.detections(outputs, predicted)


class DinoDecoder(Decoder):
    """Refines reference boxes; in each layer a query's position is made anew from its box."""

    def __init__(self, classes, dim, heads, ffn_dim, layers, levels, points, dropout, eps,
                 shared_heads):
        super().__init__()
        self.dim, self.points, self.eps = dim, points, eps
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(dim, heads, ffn_dim, levels, points, dropout)
            for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.position = xavier_(MLP(2 * dim, dim, dim))
        self.add_heads(dim, classes, 1 if shared_heads else layers)

    def look(self, index, content, boxes, memory, attend):
        ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None]            # (B, 1, levels, 4)
        placed = boxes[:, :, None] * ratios                              # (B, Q, levels, 4)
        # The position is encoded on level 0 alone, as in the official code.
        position = self.position(box_positions(placed[:, :, 0], self.dim // 2))
        centre, side = placed.split(2, -1)                               # (B, Q, levels, 2)
        unit = side * (0.5 / self.points)
        return self.layers[index](content, position, centre, unit, memory, attend)


class Proposals(nn.Module):
    """The encoder's own detections: every token proposes a box, the best are kept (two-stage).

    binary: Deformable DETR's. Class 0 means "object", whatever its class, and every token is
    trained. Otherwise (DINO) a token is as good as its best class, and only kept ones are trained.
    """

    def __init__(self, class_head: nn.Module, box_head: nn.Module, dim: int, binary: bool):
        super().__init__()
        self.binary = binary
        self.project = xavier_(nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)
        # As in the official code, these heads start as copies of the decoder's.
        self.class_head, self.box_head = copy.deepcopy(class_head), copy.deepcopy(box_head)

    def forward(self, memory: Memory, count: int) -> tuple[Detections, Tensor]:
        """-> detections to train (L = 1), and the boxes (B, Q, 4) of the best tokens, detached.

        Q is `count`, or the number of tokens if there are fewer; best first.
        """
        centres = token_centres(memory.shapes, memory.valid_ratios)      # (B, S, 2)
        sides = [centres.new_full((height * width, 2), 0.05 * 2 ** level)        # 0.05, 0.1, ...
                 for level, (height, width) in enumerate(memory.shapes)]
        sides = torch.cat(sides).expand_as(centres)                      # (B, S, 2)
        anchors = torch.cat([centres, sides], -1)                        # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding
        unusable = ~usable[..., None]                                    # (B, S, 1)
        # Unusable tokens are zeroed, not excluded. If one is kept, +inf makes it the box
        # (1, 1, 1, 1), as in the official code.
        anchors = (anchors / (1 - anchors)).log().masked_fill(unusable, math.inf)
        tokens = self.norm(self.project(memory.tokens.masked_fill(unusable, 0.)))
        logits = full_precision(self.class_head(tokens))                 # (B, S, C)
        scores = logits[..., 0] if self.binary else logits.amax(-1)
        best = scores.topk(min(count, scores.shape[1]), 1).indices[..., None]         # (B, Q, 1)

        def kept(x):                                                     # (B, S, .) -> (B, Q, .)
            return x.gather(1, best.expand(-1, -1, x.shape[-1]))

        if not self.binary:            # spare the box head, three wide layers, the other tokens
            logits, tokens, anchors = map(kept, (logits, tokens, anchors))
        boxes = (full_precision(self.box_head(tokens)) + anchors).sigmoid()
        detections = Detections(logits[None], boxes[None])
        return detections, (kept(boxes) if self.binary else boxes).detach()


# --------------------------------------------------------------------------------------- denoising

def denoising_groups(number: int, objects: int) -> int:
    """Groups of (positives, negatives) that the official code makes; objects: the most of an image.

    max(number // objects, 1), but below number = 50 it is 2 * number, whatever the objects.
    """
    if objects == 0:
        return 0
    return max(number // objects, 1) if number >= 50 else 2 * number


def denoising_noise(batch: int, groups: int, objects: int, classes: int,
                    device) -> dict[str, Tensor]:
    """The random draws of `denoising_queries`, apart from it so that a test can bring its own."""
    shape = (batch, 2 * groups, objects)
    return {
        "flip": torch.rand(shape, device=device),                # below label_noise / 2: the label
        "label": torch.randint(classes, shape, device=device),   # changes to this one
        "sign": torch.randint(2, (*shape, 4), device=device) * 2 - 1,    # corners move in or out
        "shift": torch.rand((*shape, 4), device=device)}         # by this part of half the side


def denoising_queries(targets: criterion.Targets, embedding: Tensor, noise: dict[str, Tensor],
                      label_noise: float, box_noise: float, eps: float) -> tuple[Tensor, Tensor]:
    """Noised copies of the objects: in each group a positive of each, and a farther negative.

    embedding (C or more, D), noise from `denoising_noise`. Returns content (B, 2 * groups * K, D)
    and boxes (.., 4). Slots of images with fewer than K objects are not masked out, as in the
    official code: content 0, box (.5, .5, .5, .5).
    """
    repeats = noise["flip"].shape[1]                                     # 2 * groups
    valid = targets.valid[:, None].expand(-1, repeats, -1)               # (B, 2 G, K)
    # As the official code halves it: the chance of a random class, which may be the true one.
    flipped = noise["flip"] < label_noise * 0.5
    labels = torch.where(flipped, noise["label"], targets.labels[:, None])
    content = F.embedding(labels, embedding) * valid[..., None]          # (B, 2 G, K, D)
    boxes = targets.boxes[:, None].expand(-1, repeats, -1, -1)           # (B, 2 G, K, 4)
    if box_noise > 0:
        negative = torch.arange(repeats, device=boxes.device) % 2        # 0, 1, 0, 1, ...
        shift = noise["sign"] * (noise["shift"] + negative[:, None, None])
        move = shift * boxes[..., [2, 3, 2, 3]] / 2 * box_noise
        corners = (box_convert(boxes, "cxcywh", "xyxy") + move).clamp(0, 1)
        boxes = box_convert(corners, "xyxy", "cxcywh")
    boxes = torch.where(valid[..., None], inverse_sigmoid(boxes, eps), 0.).sigmoid()
    return content.flatten(1, 2), boxes.flatten(1, 2)


# ---------------------------------------------------------------------------- what detectors share

class Queries(NamedTuple):
    """A group of decoder queries, whoever made them."""
    content: Tensor                    # (B, Q, D)
    boxes: Tensor                      # (B, Q, 4), or points (B, Q, 2) in one-stage Deformable DETR
    attend: Tensor | None = None       # (B, Q, Q) bool, True where the row may attend; None: all
    valid: Tensor | None = None        # (B, Q) bool, False in padding rows; for the caller's loss
    position: Tensor | None = None     # (B, Q, D), where the detector does not make it from boxes
    sees_learned: bool = False         # in a joint pass: they attend to the learned ones too


def attention_groups(learned: int, extra: Queries | None, device, groups: int = 0,
                     objects: int = 0) -> Tensor | None:
    """Mask (Q, Q) or (B, Q, Q) of a joint pass, True where the row may attend to the column.

    Queries come in the order [denoising, learned, extra]. A denoising group, of 2 * objects
    queries, attends to itself and the learned queries; learned queries attend to learned ones only,
    because a noised object would give the answer away. Extra queries attend as their own `attend`
    says and, if `sees_learned`, to the learned ones. None: all attend to all.
    """
    if not groups and extra is None:
        return None
    noised = torch.arange(2 * groups * objects, device=device) // (2 * max(objects, 1))
    group = torch.cat([noised, torch.full((learned,), groups, device=device)])
    attend = (group[:, None] == group) | (group == groups)               # (Q, Q)
    if extra is None:
        return attend
    batch, count = extra.content.shape[:2]
    attend = F.pad(attend.expand(batch, -1, -1), (0, count, 0, count))   # (B, Q + E, Q + E), False
    attend[:, len(group):, len(group):] = True if extra.attend is None else extra.attend
    attend[:, len(group):, len(noised):len(group)] = extra.sees_learned
    return attend


class Detector(nn.Module):
    """What the three detectors share: encode, decode, losses by their official names.

    A detector adds encoder and decoder, and says what its learned queries are and how any others
    are decoded.
    """
    matcher_weights = criterion.MATCHER_WEIGHTS
    loss_scales = {"ce": 1., "bbox": 5., "giou": 2.}
    eps = 1e-6                         # of the GIoU
    label_embedding = None             # (C, D) content of a query that is told its class, if any
    learned_content = None             # (N, D) or (D,) contents of the learned queries, if any
    slow = ()                          # parts of the names of parameters with a tenth of the rate

    def __init__(self, num_classes: int, backbone: nn.Module, num_queries: int,
                 decoder_layers: int):
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.decoder_layers = decoder_layers
        self.backbone = backbone

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """images (B, 3, H, W), normalised; padding (B, H, W) bool."""
        return self.encoder(self.backbone(images), padding)

    def decode(self, memory: Memory, content: Tensor, boxes: Tensor, attend: Tensor | None = None,
               position: Tensor | None = None) -> Detections:
        """Decode any queries: content (B, Q, D), reference boxes (B, Q, 4). Q = 0 is fine.

        attend: (B, Q, Q), or None: all attend to all. position: (B, Q, D), only for a detector that
        does not make it from boxes (Deformable DETR).
        """
        queries = self.placed(Queries(content, boxes, position=position))
        return self.decoder(memory, queries.content, queries.boxes, attend)

    def learned_queries(self, memory: Memory) -> tuple[Queries, Detections | None]:
        """The detector's own queries, and the encoder's detections that they come from, if any."""
        raise NotImplementedError

    def placed(self, queries: Queries) -> Queries:
        """The queries with all that the decoder reads; here their boxes say where they are."""
        if queries.position is not None:
            raise ValueError(f"{type(self).__name__} makes its positional queries from boxes: "
                             "pass position=None")
        return queries

    def with_learned(self, queries: Queries, memory: Memory) -> Queries:
        """The queries, then this detector's learned ones for this memory as a group of their own.

        Another detector of the same kind can read them too: every position is written out.
        """
        groups = self.placed(queries), self.placed(self.learned_queries(memory)[0])
        asked, count = (group.content.shape[1] for group in groups)
        attend = F.pad(queries.attend, (0, count, 0, count))             # (B, Q + N, Q + N), False
        attend[:, asked:, asked:] = True
        valid = F.pad(queries.valid, (0, count), value=True)             # (B, Q + N)
        content, boxes, position = joined(groups)
        return Queries(content, boxes, attend, valid, position)

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None,
                extra: tuple | None = None) -> Output:
        """Decode the learned queries and the caller's in one pass; learned ones see no other.

        targets: per image "labels" (K_b,) and "boxes" (K_b, 4); only DINO reads them, for denoising
        queries. extra: `Queries`, or a tuple in their order (content, boxes, attend, valid).
        """
        memory = self.encode(images, padding)
        learned, proposals = self.learned_queries(memory)
        return self.answer(memory, learned, proposals, extra)

    def answer(self, memory: Memory, learned: Queries, proposals: Detections | None,
               extra: tuple | None, noised: Queries | None = None, groups: int = 0,
               objects: int = 0) -> Output:
        """One decoder pass over [denoising, learned, extra], each group's detections by name."""
        extra = None if extra is None else Queries(*extra)
        count = learned.content.shape[1]
        device = learned.content.device
        attend = attention_groups(count, extra, device, groups, objects)
        queries = [group for group in (noised, learned, extra) if group is not None]
        answers = self.decode_together(memory, queries, attend)
        denoising = None
        if noised:
            known = answers.pop(0)
            denoising = Denoising(known.logits, known.boxes, groups, objects)
        return Output(memory, answers[0], proposals, denoising, answers[1] if extra else None)

    def decode_together(self, memory: Memory, groups: list[Queries],
                        attend: Tensor | None) -> list[Detections]:
        """One pass for several groups, then each group's own detections."""
        content, boxes, position = joined([self.placed(group) for group in groups])
        together = self.decode(memory, content, boxes, attend, position)
        sizes = [group.content.shape[1] for group in groups]
        parts = together.logits.split(sizes, 2), together.boxes.split(sizes, 2)
        return [Detections(logits, boxes) for logits, boxes in zip(*parts)]

    @property
    def suffixes(self) -> list[str]:
        """Of the losses' names, in the order of `layer_losses`: the last decoder layer has none."""
        return [f"_{i}" for i in range(self.decoder_layers - 1)] + [""]

    @property
    def loss_weights(self) -> dict[str, float]:
        """Official, the same for every layer: class 1 (Deformable DETR 2), L1 5, GIoU 2."""
        return {f"loss_{kind}{suffix}": weight for suffix in self.suffixes
                for kind, weight in self.loss_scales.items()}

    def weighted_losses(self, output: Output, targets: list[dict]) -> dict[str, Tensor]:
        """`loss`, each times its official weight: their sum is what plain training minimises."""
        weights, losses = self.loss_weights, self.loss(output, targets)
        return {name: weights[name] * value for name, value in losses.items()}

    def loss(self, output: Output, targets: list[dict]) -> dict[str, Tensor]:
        """Unweighted losses by their official names: loss_ce, loss_bbox, loss_giou.

        Suffixes: none for the last layer, _0, _1, .. for the others; _enc (Deformable DETR) or
        _interm (DINO) for the encoder's detections; _dn, _dn_0, .. for DINO's denoising queries (0
        if there are none). Raises ValueError on predictions or targets that are not finite.
        """
        wanted = criterion.pad_targets(targets)
        count = criterion.normaliser(wanted.counts, output.detections.logits.device)
        parts = zip(*self.layer_losses(output, wanted, count))           # of ce, of bbox, of giou
        losses = {}
        for kind, layers in zip(self.loss_scales, parts):
            for suffix, value in zip(self.suffixes, torch.cat(layers).unbind(), strict=True):
                losses[f"loss_{kind}{suffix}"] = value
        return losses

    def layer_losses(self, output: Output, wanted: criterion.Targets, count: Tensor) -> list[tuple]:
        """[(ce, bbox, giou)], tensors of one number per layer, which `suffixes` names in order."""
        return [self.matched_losses(output.detections, wanted, count)]

    def matched_losses(self, predicted: Detections, wanted: criterion.Targets,
                       count: Tensor) -> tuple:
        """(ce, bbox, giou), each (L,), after matching the predictions to the objects."""
        pair = predicted.logits, predicted.boxes
        query, matched = criterion.match(*pair, wanted, self.matcher_weights, self.eps)
        return criterion.set_losses(*pair, wanted, query, matched, count, self.eps)

    def parameter_groups(self, lr: float, backbone_lr: float) -> list[dict]:
        """For AdamW, as official: the backbone slower, weight decay on everything, nothing frozen.

        In Deformable DETR the reference points and the sampling offsets are slower too.
        """
        fast, backbone, slow = ([] for _ in range(3))
        for name, parameter in self.named_parameters():
            group = slow if any(part in name for part in self.slow) else fast
            if parameter.requires_grad:
                (backbone if name.startswith("backbone.") else group).append(parameter)
        rates = (fast, lr), (backbone, backbone_lr), (slow, 0.1 * lr)
        return [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]


def joined(groups: list[Queries]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Content, boxes and position of several groups of queries, one after the other along Q."""
    columns = ([getattr(group, name) for group in groups]
               for name in ("content", "boxes", "position"))
    return tuple(None if column[0] is None else torch.cat(column, 1) for column in columns)


# ---------------------------------------------------------------------------------------- DAB-DETR

class DabDetr(Detector):
    """DAB-DETR (Liu et al. 2022): dense attention on one feature map, queries are learned anchors.

    The defaults of __init__ are the official R50 recipe. See OPTIONS for the arguments.
    """

    def __init__(self, num_classes, backbone, *, hidden_dim=256, heads=8, ffn_dim=2048,
                 encoder_layers=6, decoder_layers=6, num_queries=300, num_patterns=0,
                 feature_stride=32, dropout=0., position_temperature=20., position_offset=0.,
                 logit_eps=1e-3):
        super().__init__(num_classes, backbone, num_queries, decoder_layers)
        self.encoder = DenseEncoder(
            backbone.channels, hidden_dim, heads, ffn_dim, encoder_layers, feature_stride, dropout,
            position_temperature, position_offset)
        self.decoder = DabDecoder(
            num_classes, hidden_dim, heads, ffn_dim, decoder_layers, dropout, logit_eps)
        self.anchors = nn.Embedding(num_queries, 4)      # before the sigmoid
        self.patterns = nn.Embedding(num_patterns, hidden_dim) if num_patterns else None

    @property
    def learned_content(self) -> Tensor:
        """(num_patterns, D): each anchor is asked with each pattern; (1, D) zeros without any."""
        if self.patterns is None:
            return self.anchors.weight.new_zeros(1, self.decoder.dim)
        return self.patterns.weight

    def learned_queries(self, memory: Memory) -> tuple[Queries, None]:
        """Every anchor with the first pattern, then every anchor with the second, ..."""
        batch = memory.tokens.shape[0]
        content = self.learned_content
        boxes = self.anchors.weight.sigmoid().repeat(len(content), 1)    # (P * Q, 4)
        content = content.repeat_interleave(self.num_queries, 0)         # (P * Q, D)
        return Queries(content.expand(batch, -1, -1), boxes.expand(batch, -1, -1)), None


# --------------------------------------------------------------------------------- Deformable DETR

class DeformableDetr(Detector):
    """Deformable DETR (Zhu et al. 2021): plain, with box refinement, or with that and two stages.

    The defaults of __init__ are the official R50 recipe without refinement. See OPTIONS for the
    arguments.
    """
    eps = 0.
    loss_scales = {"ce": 2., "bbox": 5., "giou": 2.}
    slow = ("reference.", "sampling_offsets.")

    def __init__(self, num_classes, backbone, *, hidden_dim=256, heads=8, ffn_dim=1024,
                 encoder_layers=6, decoder_layers=6, num_queries=300, feature_levels=4, points=4,
                 dropout=0.1, box_refine=False, two_stage=False, position_temperature=10000.,
                 position_offset=-0.5, logit_eps=1e-5):
        super().__init__(num_classes, backbone, num_queries, decoder_layers)
        if two_stage and not box_refine:
            raise ValueError("two_stage needs box_refine: the decoder refines the encoder's boxes")
        self.encoder = DeformableEncoder(
            backbone.channels, hidden_dim, heads, ffn_dim, encoder_layers, feature_levels, points,
            dropout, position_temperature, position_offset)
        self.decoder = DeformableDecoder(
            num_classes, hidden_dim, heads, ffn_dim, decoder_layers, feature_levels, points,
            dropout, logit_eps, box_refine)
        class_head, box_head = self.decoder.class_heads[0], self.decoder.box_heads[0]
        self.two_stage = two_stage
        if two_stage:
            self.proposals = Proposals(class_head, box_head, hidden_dim, binary=True)
            self.position = BoxQueries(hidden_dim)
            return
        self.queries = nn.Embedding(num_queries, 2 * hidden_dim)         # position, then content
        self.reference = xavier_(nn.Linear(hidden_dim, 2))
        nn.init.zeros_(self.reference.bias)
        # The first box head starts with small boxes; later layers refine boxes that have a size.
        nn.init.constant_(box_head.layers[-1].bias[2:], -2.)
        # Not learned, and the same in every model of this width, so that teacher and student give a
        # caller's query the same position.
        generator = torch.Generator().manual_seed(0)
        fixed = torch.randn(2 * hidden_dim, hidden_dim, generator=generator, device="cpu")
        fixed = (fixed / hidden_dim ** 0.5).to(self.queries.weight)
        self.register_buffer("box_map", fixed, persistent=False)

    @property
    def learned_content(self) -> Tensor | None:
        """(Q, D) content of the learned queries; None in two stages: it is made from the boxes."""
        return None if self.two_stage else self.queries.weight.chunk(2, 1)[1]

    def learned_queries(self, memory: Memory) -> tuple[Queries, Detections | None]:
        if self.two_stage:
            proposals, boxes = self.proposals(memory, self.num_queries)
            position, content = self.position(boxes)
            return Queries(content, boxes, position=position), proposals
        queries = self.queries.weight.expand(memory.tokens.shape[0], -1, -1)
        position, content = queries.chunk(2, -1)                         # (B, Q, D)
        # Places need full precision: bfloat16 would move the points by pixels.
        with torch.autocast(position.device.type, enabled=False):
            points = self.reference(full_precision(position)).sigmoid()  # (B, Q, 2)
        return Queries(content, points, position=position), None

    def placed(self, queries: Queries) -> Queries:
        """The queries with a position, made from their boxes where the caller gives none.

        A one-stage model looks from the boxes' centres, as its first layer was trained to. Raises
        ValueError on points where boxes are needed.
        """
        boxes, position = queries.boxes, queries.position
        points = boxes.shape[-1] != 4
        if position is None and points:
            raise ValueError("points have no extent to make a position from: pass boxes (B, Q, 4), "
                             "or a position")
        if self.two_stage and points:
            raise ValueError("the first layer of two stages was trained on boxes: pass (B, Q, 4), "
                             "not points")
        if position is None:
            position = self.box_position(boxes)
        boxes = boxes if self.two_stage else boxes[..., :2]
        return queries._replace(boxes=boxes, position=position)

    def box_position(self, boxes: Tensor) -> Tensor:
        """(B, Q, 4) -> (B, Q, D): the two-stage model's own, or a fixed random map of the encoding.

        One-stage models learned a position for each query and none for boxes. The random map has
        the spread of learned positions at the start (1), and lets queries tell their boxes apart.
        """
        if self.two_stage:
            return self.position(boxes)[0]
        return encoded_boxes(boxes, self.box_map.shape[1]) @ self.box_map

    def decode(self, memory: Memory, content: Tensor, boxes: Tensor, attend: Tensor | None = None,
               position: Tensor | None = None) -> Detections:
        """Decode any queries, see Detector.decode.

        boxes: (B, Q, 4), or points (B, Q, 2) with a position of your own. position: None makes it
        from the boxes, by `box_position`.
        """
        queries = self.placed(Queries(content, boxes, position=position))
        return self.decoder(memory, content, queries.position, queries.boxes, attend)

    @property
    def suffixes(self) -> list[str]:
        return super().suffixes + ["_enc"] * self.two_stage

    def layer_losses(self, output: Output, wanted: criterion.Targets, count: Tensor) -> list[tuple]:
        losses = super().layer_losses(output, wanted, count)
        if self.two_stage:             # all tokens, matched to objects of one class
            objects = wanted._replace(labels=torch.zeros_like(wanted.labels))
            losses.append(self.matched_losses(output.proposals, objects, count))
        return losses


class BoxQueries(nn.Module):
    """Boxes -> positional and content queries of two-stage Deformable DETR."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = xavier_(nn.Linear(2 * dim, 2 * dim))
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, 4) -> position, content (B, Q, D)."""
        encoded = encoded_boxes(boxes, self.project.in_features // 2)    # (B, Q, 2 D)
        return self.norm(self.project(encoded)).chunk(2, -1)


def encoded_boxes(boxes: Tensor, dim: int) -> Tensor:
    """(B, Q, 4) -> (B, Q, 2 * dim): sine encoding in Deformable DETR's order x, y, w, h."""
    return box_positions(full_precision(boxes), dim // 2, order=(0, 1, 2, 3))


# -------------------------------------------------------------------------------------------- DINO

class Dino(Detector):
    """DINO (Zhang et al. 2022): deformable attention, mixed query selection, denoising queries.

    The defaults of __init__ are the official 4-scale R50 recipe. See OPTIONS for the arguments.
    """

    def __init__(self, num_classes, backbone, *, hidden_dim=256, heads=8, ffn_dim=2048,
                 encoder_layers=6, decoder_layers=6, num_queries=900, feature_levels=4, points=4,
                 dropout=0., shared_heads=True, denoising=100, denoising_box_noise=0.4,
                 denoising_label_noise=0.5, position_temperature=20., position_offset=0.,
                 logit_eps=1e-3):
        super().__init__(num_classes, backbone, num_queries, decoder_layers)
        self.denoising = denoising
        self.label_noise, self.box_noise = denoising_label_noise, denoising_box_noise
        self.encoder = DeformableEncoder(
            backbone.channels, hidden_dim, heads, ffn_dim, encoder_layers, feature_levels, points,
            dropout, position_temperature, position_offset)
        self.decoder = DinoDecoder(
            num_classes, hidden_dim, heads, ffn_dim, decoder_layers, feature_levels, points,
            dropout, logit_eps, shared_heads)
        class_head, box_head = self.decoder.class_heads[0], self.decoder.box_heads[0]
        self.proposals = Proposals(class_head, box_head, hidden_dim, binary=False)
        self.content = xavier_(nn.Embedding(num_queries, hidden_dim))
        # The last row is never drawn; the official model has it.
        self.label_embed = nn.Embedding(num_classes + 1, hidden_dim)

    @property
    def label_embedding(self) -> Tensor:
        """(C, D) content of a query that is told its class."""
        return self.label_embed.weight[:self.num_classes]

    @property
    def learned_content(self) -> Tensor:
        """(Q, D) content of the learned queries, by rank of the proposal."""
        return self.content.weight

    def learned_queries(self, memory: Memory) -> tuple[Queries, Detections]:
        """Mixed query selection: boxes from the encoder (detached), content learned, by rank."""
        proposals, boxes = self.proposals(memory, self.num_queries)
        content = self.content.weight[:boxes.shape[1]]                   # (Q, D)
        return Queries(content.expand(boxes.shape[0], -1, -1), boxes), proposals

    def forward(self, images: Tensor, padding: Tensor, targets: list[dict] | None = None,
                extra: tuple | None = None, noise: dict[str, Tensor] | None = None) -> Output:
        """See Detector.forward. In training, targets with objects make denoising queries too.

        noise: fixed draws for the denoising queries, see `denoising_noise`.
        """
        if not self.training or targets is None:
            return super().forward(images, padding, targets, extra)
        memory = self.encode(images, padding)
        learned, proposals = self.learned_queries(memory)
        # label_embed has to stay in the graph without denoising queries too: distributed training
        # waits for every gradient.
        unchanged = learned.content + 0. * self.label_embed.weight[0, 0]
        learned = learned._replace(content=unchanged)
        padded = criterion.pad_targets(targets)
        batch, objects = padded.labels.shape
        groups = denoising_groups(self.denoising, objects) if self.denoising > 0 else 0
        noised = None
        if groups:
            noise = noise or denoising_noise(
                batch, groups, objects, self.num_classes, images.device)
            noised = Queries(*denoising_queries(
                padded, self.label_embed.weight, noise, self.label_noise, self.box_noise,
                self.decoder.eps))
        return self.answer(memory, learned, proposals, extra, noised, groups, objects)

    @property
    def suffixes(self) -> list[str]:
        layers = super().suffixes
        return layers + ["_interm"] + [f"_dn{suffix}" for suffix in layers if self.denoising > 0]

    def layer_losses(self, output: Output, wanted: criterion.Targets, count: Tensor) -> list[tuple]:
        decoder, proposals = output.detections, output.proposals
        # There are as many proposals as learned queries: one more layer to match, in the same call.
        every_layer = Detections(torch.cat([decoder.logits, proposals.logits]),
                                 torch.cat([decoder.boxes, proposals.boxes]))
        losses = [self.matched_losses(every_layer, wanted, count)]
        if self.denoising > 0:
            losses.append(self.denoising_losses(output.denoising, wanted, count))
        return losses

    def denoising_losses(self, noised: Denoising | None, wanted: criterion.Targets,
                         count: Tensor) -> tuple:
        """(ce, bbox, giou), each (L,). Nothing to match: slot k of a group's positives is object k.

        All other slots are background.
        """
        if noised is None:
            return (count.new_zeros(self.decoder_layers),) * 3
        groups, objects, layers = noised.groups, noised.objects, len(noised.logits)
        first = torch.arange(groups, device=count.device)[:, None] * 2 * objects      # (G, 1)
        query = (first + torch.arange(objects, device=count.device)).flatten()        # (G * K,)
        query = query.expand(layers, len(wanted.labels), -1)             # (L, B, G * K)
        repeated = criterion.Targets(
            wanted.labels.repeat(1, groups), wanted.boxes.repeat(1, groups, 1),
            wanted.valid.repeat(1, groups), wanted.counts)
        matched = repeated.valid.expand(layers, -1, -1)
        return criterion.set_losses(
            noised.logits, noised.boxes, repeated, query, matched, count * groups, self.eps)


# -------------------------------------------------------------- build, postprocess, record, gflops

CLASSES = dict(zip(DETECTORS, (DabDetr, DeformableDetr, Dino)))
# Names of options in older checkpoints.
RENAMED = {"box_noise": "denoising_box_noise", "label_noise": "denoising_label_noise"}


# What `build` takes in addition to a detector's name and number of classes, a line for each. Types
# and official values stand in the signatures; the command line's flags are made of both.
OPTIONS = {
    "backbone": "resnet18 | resnet34 | resnet50 | resnet101 | timm:NAME (pip install timm)",
    "backbone_width": "channels of the ResNet's first stage; 64 is the standard one",
    "pretrained_backbone":
        "imagenet (downloads) | none | a file of torchvision's weights, or timm's",
    "hidden_dim": "width of the transformer",
    "heads": "attention heads",
    "ffn_dim": "hidden width of the feed-forward blocks",
    "encoder_layers": "transformer encoder layers",
    "decoder_layers": "transformer decoder layers",
    "num_queries": "object queries, the most objects an image can be given",
    "feature_levels":
        "feature maps the encoder reads, the coarsest of the backbone (3: strides 8, 16, 32) and, "
        "beyond them, maps made by strided convolutions; not DAB-DETR",
    "points": "sampling points per head and level; not DAB-DETR",
    "dropout": "dropout in the transformer",
    "num_patterns": "DAB-DETR: contents that each anchor is asked with, 0 = none",
    "feature_stride":
        "DAB-DETR: 8 | 16 | 32, the one feature map it reads (first, second or last of your own "
        "module)",
    "box_refine": "Deformable DETR: each decoder layer refines the boxes",
    "two_stage": "Deformable DETR: start from the encoder's own boxes (with box_refine)",
    "denoising":
        "DINO: denoising queries, 0 = none; below 50 official DINO makes more, see "
        "denoising_groups",
    "denoising_box_noise": "DINO: part of half the box that a corner of a denoising query may move",
    "denoising_label_noise": "DINO: twice the chance that a denoising query has a random class",
    "shared_heads": "DINO: one head for all layers (detrex, MMDetection: one each)",
    "position_temperature":
        "of the image position encoding; other programs' models want other values "
        "(checkpoints.py)",
    "position_offset": "of the image position encoding, in cells",
    "logit_eps": "of the inverse sigmoid of a box",
}


def options_of(name: str) -> dict:
    """{option: official value} that detector `name` takes in addition to the backbone's."""
    parameters = inspect.signature(CLASSES[name].__init__).parameters
    return {key: p.default for key, p in parameters.items() if p.kind == p.KEYWORD_ONLY}


def described_options() -> dict[str, tuple[type, str]]:
    """{option: (type, what it is)} of all detectors, for a command line.

    pretrained_backbone is a word there.
    """
    defaults = {"backbone": "", "backbone_width": 64, "pretrained_backbone": ""}
    for name in DETECTORS:
        defaults |= options_of(name)
    return {name: (type(defaults[name]), text) for name, text in OPTIONS.items()}


def build(name: str, num_classes: int, *, backbone: str | nn.Module = "resnet50",
          backbone_width: int = 64, pretrained_backbone: bool | dict = True,
          frozen_backbone: bool | None = None, **overrides) -> nn.Module:
    """A detector; without overrides the official R50 recipe of `name`, one of DETECTORS.

    backbone: "resnet18|34|50|101", "timm:NAME" (see `TimmBackbone`), or your own module:
    images -> list of maps, finest first, with .channels.
    backbone_width: 64 is the standard ResNet; of ResNets only.
    pretrained_backbone: True (ImageNet weights of torchvision or timm, downloaded), False, or a
    state_dict of theirs (checkpoints.load_backbone reads a file).
    frozen_backbone: see `ResNet`; by default True exactly with pretrained weights. Your own module
    ignores both.
    overrides: OPTIONS says what they are, `options_of(name)` which of them a detector takes, with
    the official values.

    model.config holds the resolved overrides as plain values: build(name, num_classes,
    **model.config) gives the same architecture, without downloading pretrained weights again. (Your
    own backbone module is not in it: pass it again.)
    Raises ValueError on unknown names and values.
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}: choose one of {', '.join(DETECTORS)}")
    options = options_of(name)
    overrides = {RENAMED.get(key, key): value for key, value in overrides.items()}
    if unknown := sorted(overrides.keys() - options):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it has {', '.join(options)}")
    options |= overrides
    width, heads = options["hidden_dim"], options["heads"]
    stride = options.get("feature_stride", 32)
    if width % 4 or width % heads:
        raise ValueError(f"hidden_dim {width} must be a multiple of 4 and of heads {heads}")
    if options["decoder_layers"] < 1 or options.get("feature_levels", 1) < 1:
        raise ValueError("feature_levels and decoder_layers must be at least 1")
    if stride not in (8, 16, 32):
        raise ValueError(f"feature_stride {stride}: choose 8, 16 or 32")

    if not isinstance(pretrained_backbone, (bool, dict)):
        raise ValueError(f"pretrained_backbone={pretrained_backbone!r}: {OTHER_WEIGHTS}")
    custom = isinstance(backbone, nn.Module)
    frozen = bool(pretrained_backbone) if frozen_backbone is None else frozen_backbone
    if custom:
        body = backbone
    elif backbone.startswith("timm:"):
        body = TimmBackbone(backbone[5:], frozen, stride, pretrained_backbone)
    elif backbone not in RESNETS:
        raise ValueError(f"unknown backbone {backbone!r}: choose one of {', '.join(RESNETS)} or "
                         "timm:NAME, or pass your own module")
    elif backbone_width < 1:
        raise ValueError(f"backbone_width {backbone_width}: want at least 1")
    elif pretrained_backbone is True and backbone_width != 64:
        raise ValueError(f"no ImageNet weights exist for backbone_width {backbone_width}: "
                         f"use 64, or {OTHER_WEIGHTS}")
    else:
        body = ResNet(backbone, backbone_width, frozen, {32: 4, 16: 3, 8: 2}[stride])
        if pretrained_backbone:
            body.load_pretrained(backbone, pretrained_backbone)

    model = CLASSES[name](num_classes, body, **options)
    model.detector = name
    model.config = {"backbone": "custom" if custom else backbone, "backbone_width": backbone_width,
                    "pretrained_backbone": False, "frozen_backbone": frozen, **options}
    return model


def postprocess(detections: Detections, sizes, k: int = 300) -> list[dict]:
    """The last layer's k best (query, class) pairs of each image, best first.

    A query may appear with several classes. sizes: (B, 2) original (height, width), tensor or list.
    k: 300 officially for DINO, at most Q * C.
    Returns per image scores (k,), labels (k,), boxes (k, 4) xyxy in pixels.
    """
    images = zip(*best_pairs(detections, sizes, k))
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in images]


def best_pairs(detections: Detections, sizes, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`postprocess` of a batch as tensors: scores (B, k), labels (B, k), boxes (B, k, 4)."""
    logits = detections.logits[-1]                                       # (B, Q, C)
    classes, available = logits.shape[2], logits[0].numel()
    scores, index = logits.sigmoid().flatten(1).topk(min(k, available))  # (B, k)
    query, labels = index // classes, index % classes
    boxes = box_convert(detections.boxes[-1], "cxcywh", "xyxy")          # (B, Q, 4)
    boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))          # (B, k, 4)
    sizes = torch.as_tensor(sizes, device=boxes.device)
    return scores, labels, boxes * sizes[:, None, [1, 0, 1, 0]]


@dataclass
class Recorded:
    """What one attention looked at, see `record`."""
    weights: Tensor                    # dense (B, heads, Q, K); else (B, Q, heads, levels, points)
    points: Tensor | None = None       # deformable: (.., points, 2), (x, y) of the padded image


@contextmanager
def record(model: nn.Module, queries=None, graph: bool = False):
    """Collect what every attention looks at: `with record(model) as seen: model(...)`.

    seen[name] is a `Recorded` of the last pass through that layer. "encoder.0", ..: tokens attend
    to tokens; "decoder.0.self", ..: queries to queries; "decoder.0.cross", ..: queries to the
    memory. Queries of a joint pass come in the order denoising, learned, extra.
    queries: which rows to keep, a slice or a list of indices (a large image has 17,000 tokens): of
        every attention, so they number tokens in the encoder and queries in the decoder.
    graph: keep gradients too, for losses on attention.
    Outputs are the same with and without recording, and not recording costs nothing.
    """
    seen = {}
    keep = slice(None) if queries is None else queries
    kept = (lambda x: x) if graph else Tensor.detach
    modules = {f"encoder.{i}": layer.attention for i, layer in enumerate(model.encoder.layers)}
    for i, layer in enumerate(model.decoder.layers):
        modules[f"decoder.{i}.self"] = layer.self_attention
        modules[f"decoder.{i}.cross"] = layer.cross_attention

    def remember(key):
        def sampled(points, weights):
            seen[key] = Recorded(kept(weights)[:, keep], kept(points)[:, keep])

        def dense(weights):
            seen[key] = Recorded(kept(weights)[:, :, keep])
        return sampled if isinstance(modules[key], DeformableAttention) else dense

    before = {key: module.recorder for key, module in modules.items()}   # of a `record` around this
    for key, module in modules.items():
        module.recorder = remember(key)
    try:
        yield seen
    finally:
        for key, module in modules.items():
            module.recorder = before[key]


def gflops(model: nn.Module, height: int, width: int) -> float:
    """Multiply-adds / 1e9 of one image in eval mode, the convention of published tables.

    Counted: convolutions, matrix products, dense attention, and deformable sampling with 5
    multiply-adds for each sampled channel (4 corners, 1 attention weight). Not counted: norms,
    activations, softmax. Computes shapes only.
    """
    # Each returns 2 for each multiply-add, as torch's counter does.
    def sampling(value_shape, grid_shape, *args, out_shape=None, **kwargs):
        return 2 * 5 * math.prod(value_shape[:2]) * math.prod(grid_shape[1:3])

    def bags(table_shape, rows_shape, *args, out_shape=None, **kwargs):  # one of four corners
        return 2 * 5 * rows_shape[0] * table_shape[1] // 4

    def dense(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
        return 2 * math.prod(query_shape[:3]) * key_shape[2] * (query_shape[3] + value_shape[3])

    aten = torch.ops.aten
    counted = {
        aten.grid_sampler_2d: sampling, aten._embedding_bag_forward_only: bags,
        aten._scaled_dot_product_flash_attention_for_cpu: dense}         # torch counts CUDA's only
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True), counter, torch.no_grad():
        image = torch.zeros(1, 3, height, width, device=device)
        twin(image, torch.zeros_like(image[:, 0], dtype=torch.bool))
    return counter.get_total_flops() / 2e9
