"""Three detectors for notebook 5 that know nothing of distillation, small and with random weights.

DenseDetr    of nn.MultiheadAttention, as you may have written it: Conditional DETR
             (arXiv 2108.06152), small, with the head of DETR (arXiv 2005.12872)
deformable_detr, rt_detr    of `transformers`
examples     a trained teacher, a student and a batch of each
fit          plain training
"""
import math
from types import SimpleNamespace

import torch
import transformers
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

import data
from adapters import Batch

# ----------------------------------------------------------------------------------------------
# A dense DETR
# ----------------------------------------------------------------------------------------------

def sine(points, width):
    """Fractions (..., 2) -> their encoding (..., width)."""
    scale = 2 * math.pi * 2 ** torch.arange(width // 4).to(points) / 2            # (width / 4,)
    angles = (points[..., None] * scale).flatten(-2)                              # (..., width / 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


class DecoderLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self_attn, self.cross_attn = (
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(),
                                 nn.Linear(2 * width, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])

    def forward(self, x, position, place, memory, where, padding, attn_mask):
        q = x + position                                                          # (B, Q, D)
        x = self.norms[0](x + self.self_attn(q, q, x, attn_mask=attn_mask)[0])
        looked = self.cross_attn(x + place, memory + where, memory, key_padding_mask=padding)[0]
        x = self.norms[1](x + looked)
        return self.norms[2](x + self.ffn(x))


class Decoder(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(width) for _ in range(layers)])

    def forward(self, content, position, points, memory, where, padding, shapes, attn_mask=None):
        """content, position (B, Q, D), points (B, Q, 2) -> states of all layers (L, B, Q, D)."""
        states, place = [content], sine(points, content.shape[-1])
        for layer in self.layers:
            states.append(layer(states[-1], position, place, memory, where, padding, attn_mask))
        return torch.stack(states[1:])


class DenseModel(nn.Module):
    def __init__(self, width, layers, queries=30):
        super().__init__()
        channels = (3, width // 4, width // 2, width, width)
        self.backbone = nn.Sequential(*[nn.Sequential(
            nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(channels, channels[1:])])                             # stride 16
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.queries = nn.Embedding(queries, width)
        self.point = nn.Linear(width, 2)
        nn.init.normal_(self.point.weight, std=1 / math.sqrt(width))
        self.decoder = Decoder(width, layers)

    def forward(self, images, mask):
        """mask (B, H, W): 1 where an image is. -> states (L, B, Q, D), points (B, Q, 2)."""
        features = self.backbone(images)                                          # (B, D, h, w)
        real = mask[:, ::16, ::16].bool()                                         # (B, h, w)
        y, x = real.cumsum(1) - 0.5, real.cumsum(2) - 0.5                         # in cells, from 0
        size = torch.stack([real[:, 0].sum(1), real[:, :, 0].sum(1)], 1)          # (B, 2): w_i, h_i
        centres = torch.stack([x, y], -1).flatten(1, 2) / size[:, None]           # (B, h w, 2)
        tokens, padding = features.flatten(2).mT, ~real.flatten(1)
        where = sine(centres, tokens.shape[-1])
        memory = self.encoder(tokens + where, src_key_padding_mask=padding)       # (B, h w, D)
        position = self.queries.weight.expand(len(images), -1, -1)                # (B, Q, D)
        points = self.point(position).sigmoid()
        states = self.decoder(content=torch.zeros_like(position), position=position, points=points,
                              memory=memory, where=where, padding=padding,
                              shapes=[features.shape[2:]])
        return states, points


class DenseDetr(nn.Module):
    def __init__(self, width, layers, classes=("Car", "Pedestrian", "Cyclist")):
        super().__init__()
        self.config = SimpleNamespace(decoder_layers=layers, id2label=dict(enumerate(classes)))
        self.model = DenseModel(width, layers)
        self.class_head = nn.Linear(width, len(classes) + 1)                      # last: no object
        self.box_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

    def heads(self, states, points):
        """(L, B, Q, D), (B, Q, 2) -> logits (L, B, Q, C + 1), boxes (L, B, Q, 4)."""
        start = F.pad(points.logit(1e-5), (0, 2))                                 # width, height: 0
        return self.class_head(states), (self.box_head(states) + start).sigmoid()

    def forward(self, images, mask, labels=None):
        logits, boxes = self.heads(*self.model(images, mask))
        loss = sum(map(self.loss, logits, boxes, [labels] * len(logits))) if labels else None
        return SimpleNamespace(logits=logits[-1], pred_boxes=boxes[-1], loss=loss)

    def loss(self, logits, boxes, targets):
        """DETR's set loss of one layer: match, then cross entropy, L1 and GIoU."""
        total = 0
        for scores, places, target in zip(logits, boxes, targets):                # image by image
            labels, truths = target["class_labels"], target["boxes"]
            overlap = generalized_box_iou(*(box_convert(x, "cxcywh", "xyxy")
                                            for x in (places, truths)))           # (Q, K)
            cost = 5 * torch.cdist(places, truths, 1) - 2 * overlap - scores.softmax(1)[:, labels]
            rows, columns = map(torch.as_tensor, linear_sum_assignment(cost.detach()))
            wanted = torch.full((len(scores),), scores.shape[1] - 1)              # no object
            wanted[rows] = labels[columns]
            weight = scores.new_ones(scores.shape[1])
            weight[-1] = 0.1
            total += F.cross_entropy(scores, wanted, weight)
            total += 5 * (places[rows] - truths[columns]).abs().sum() / max(len(rows), 1)
            total += 2 * (1 - overlap[rows, columns]).sum() / max(len(rows), 1)
        return total / len(targets)


# ----------------------------------------------------------------------------------------------
# Two detectors of a library
# ----------------------------------------------------------------------------------------------

def resnet(kind, width):
    return kind(embedding_size=width // 2, hidden_sizes=[width // 2, width, 2 * width, 4 * width],
                depths=[1] * 4, layer_type="basic", out_features=["stage2", "stage3", "stage4"])


def deformable_detr(width, layers, **options):
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(transformers.ResNetConfig, width), d_model=width,
        encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width, encoder_attention_heads=4, decoder_attention_heads=4,
        num_queries=30, two_stage_num_proposals=30, num_labels=3, dropout=0.0, auxiliary_loss=True,
        **{"two_stage": True, "with_box_refine": True} | options)
    detector = transformers.DeformableDetrForObjectDetection(config)
    detector.model.unfreeze_backbone()       # a fresh one's ResNet would never learn
    return detector


def rt_detr(width, layers):
    config = transformers.RTDetrV2Config(
        backbone_config=resnet(transformers.RTDetrResNetConfig, width),
        encoder_in_channels=[width, 2 * width, 4 * width], encoder_hidden_dim=width,
        decoder_in_channels=[width] * 3, d_model=width, decoder_layers=layers,
        encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, encoder_attention_heads=4,
        decoder_attention_heads=4, num_queries=30, num_denoising=20, num_labels=3,
        freeze_backbone_batch_norms=False)
    detector = transformers.RTDetrV2ForObjectDetection(config)
    # Behind the backbone, fresh norms have scales around 0: the memory would be nearly silent.
    # (Weights from the hub bring their own.)
    for path, module in detector.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "backbone" not in path:
            nn.init.ones_(module.weight)
    return detector


# ----------------------------------------------------------------------------------------------
# Something to run on
# ----------------------------------------------------------------------------------------------

def fit(parameters, losses_of, steps):
    """Plain training. losses_of() -> {name: scalar}; their sum falls. -> [{name: float} a step]"""
    parameters, history = [*parameters], []
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(steps):
        losses = losses_of()
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    return history


def examples():
    """-> {name: (teacher, student, Batch)}: teachers 64 wide with three decoder layers, frozen
    after forty steps of their own loss; students 32 wide with two; six images of the toy.

    The dense DETR and Deformable DETR pad: images of two sizes share a batch. RT-DETR cannot be
    told of padding, so its images are stretched to one size.
    """
    torch.manual_seed(0)
    pairs = {"dense DETR": (DenseDetr(64, 3), DenseDetr(32, 2)),
             "Deformable DETR": (deformable_detr(64, 3), deformable_detr(32, 2)),
             "RT-DETR v2": (rt_detr(64, 3), rt_detr(32, 2))}
    data.make_toy("datasets/toy")
    sets = [data.build("toy", "datasets/toy", "val", size=size, limit=6)
            for size in (None, (32, 112))]
    items = [sets[i % 2][i] for i in range(6)]
    drawn = data.collate(items)
    targets = [{"class_labels": labels, "boxes": boxes}               # transformers' words
               for labels, boxes in zip(drawn.labels, drawn.boxes)]
    padded = Batch(drawn.images, (~drawn.padding).long(), drawn.labels, drawn.boxes, targets)
    images = torch.cat([F.interpolate(x[None], (64, 192), mode="bilinear") for x, _ in items])
    stretched = Batch(images, None, drawn.labels, drawn.boxes, targets)
    found = {}
    for name, (teacher, student) in pairs.items():
        batch = stretched if name == "RT-DETR v2" else padded
        fit(teacher.parameters(), steps=40, losses_of=lambda: {
            "own": teacher(batch.images, batch.mask, labels=targets).loss})
        found[name] = teacher.eval().requires_grad_(False), student, batch
    return found
