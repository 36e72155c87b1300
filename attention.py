"""Attention, written out: dense, deformable, position encodings, and the small blocks around them.

Nothing here knows of a detector. B batch, S memory tokens (all levels concatenated, finest first, each
row by row), D width, Q queries, K keys, boxes (cx, cy, w, h) as fractions, padding masks True where
padded, `attend` masks True where the row (a query) may look at the column (a key).

Every attention has a `recorder`, None unless models.record sets it: a function that receives what was
looked at.
"""
import math
import warnings

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


# ---------------------------------------------------------------------------------- dense attention

class DenseAttention(nn.Module):
    """What all dense attentions end with: every query weighs every key, in each head; then one output projection."""
    recorder = None                    # set by `record`: called with the weights

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None) -> Tensor:
        """query (B, heads, Q, d), key (B, heads, K, d), value (B, heads, K, d') -> (B, Q, D), scaled by d^-1/2.

        attend: bool, broadcast to (B, heads, Q, K), at least one True in each row; None: everything.
        """
        if self.recorder:              # beside the computation proper, which is the same with and without
            scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
            scores = scores if attend is None else scores.masked_fill(~attend, -math.inf)
            self.recorder(scores.softmax(-1))
        mixed = F.scaled_dot_product_attention(query, key, value, attend, self.dropout if self.training else 0.)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))                          # (B, heads, Q, d') -> (B, Q, D)


class SelfAttention(DenseAttention):
    """The usual one, one matrix for query, key and value; positions enter queries and keys, not values."""
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__(dim, heads, dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)     # as one (3D, D) matrix, as in nn.MultiheadAttention

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x, position (B, Q, D); attend (Q, Q), (B, 1, Q, Q) or (B, 1, 1, Q)."""
        dim = x.shape[-1]
        both = F.linear(x + position, self.in_proj_weight[:2 * dim], self.in_proj_bias[:2 * dim])
        value = F.linear(x, self.in_proj_weight[2 * dim:], self.in_proj_bias[2 * dim:])
        query, key = both.chunk(2, -1)
        return self.mix(self.split(query), self.split(key), self.split(value), attend)


class ConditionalSelfAttention(DenseAttention):
    """Among DAB-DETR's queries: content and position have projections of their own, and are added."""
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__(dim, heads, dropout)
        for name in ("query_content", "query_position", "key_content", "key_position", "value"):
            self.add_module(name, xavier_(nn.Linear(dim, dim)))

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x, position (B, Q, D)."""
        query = self.query_content(x) + self.query_position(position)
        key = self.key_content(x) + self.key_position(position)
        return self.mix(self.split(query), self.split(key), self.split(self.value(x)), attend)


class ConditionalCrossAttention(DenseAttention):
    """From DAB-DETR's queries to the memory: content and place are compared apart, concatenated in each head.

    So a head's score is content . content + place . place, of twice the usual width, and the part of the place can be
    stretched to the anchor's shape (`sine`, made by the decoder).
    """
    def __init__(self, dim: int, heads: int, dropout: float, first: bool):
        super().__init__(dim, heads, dropout)
        for name in ("query_content", "query_sine", "key_content", "key_position", "value"):
            self.add_module(name, xavier_(nn.Linear(dim, dim)))
        # In the first layer the content says nothing yet, so there the position also joins the content.
        self.query_position = xavier_(nn.Linear(dim, dim)) if first else None

    def forward(self, x, position, sine, tokens, token_position, attend) -> Tensor:
        """x, position, sine (B, Q, D), tokens, token_position (B, S, D), attend (B, 1, 1, S) -> (B, Q, D)."""
        query, key, place = self.query_content(x), self.key_content(tokens), self.key_position(token_position)
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + place
        query = torch.cat([self.split(query), self.split(self.query_sine(sine))], -1)   # (B, heads, Q, 2 D / heads)
        key = torch.cat([self.split(key), self.split(place)], -1)                       # (B, heads, S, 2 D / heads)
        return self.mix(query, key, self.split(self.value(tokens)), attend)


# ----------------------------------------------------------------------------- deformable attention

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
                self.recorder(points, weights)
            mixed = deformable_sample(full_precision(value), shapes, points, weights)
        return self.output_proj(mixed)


def deformable_sample(value: Tensor, shapes: list, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, the inner sum of multi-scale deformable attention (Eq. 3 of
    Deformable DETR): for each query q and head h

        sum over levels l and points p of  weights[q, h, l, p] * value_l(points[q, h, l, p])

    value (B, S, heads, d), points (B, Q, heads, levels, P, 2) as (x, y) fractions of the padded map,
    zero outside, weights (B, Q, heads, levels, P). Returns (B, Q, heads * d).
    """
    # The sparse product computes the same, faster on a CPU; a program that is exported or compiled for
    # another machine takes the operator that every machine has.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        return SparseSampling.apply(value, shapes, points, weights)
    return grid_sampling(value, shapes, points, weights)


def grid_sampling(value: Tensor, shapes: list, points: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sample` by grid_sample, for which the heads go into the batch: short, and fast on a GPU."""
    batch, _, heads, dim = value.shape
    queries, levels, count = points.shape[1], points.shape[3], points.shape[4]
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, -1)                      # (B*heads, d, S)
    grids = (2 * points - 1).permute(3, 0, 2, 1, 4, 5).reshape(levels, batch * heads, queries, count, 2)
    samples = [F.grid_sample(level.unflatten(2, shape), grid, padding_mode="zeros", align_corners=False)
               for level, shape, grid in zip(maps.split([h * w for h, w in shapes], 2), shapes, grids)]
    samples = torch.cat(samples, -1)                                                      # (B*heads, d, Q, levels*P)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * count)
    return (samples * weights).sum(-1).view(batch, heads * dim, queries).transpose(1, 2)


# ------------------------------------------------------------------------------- position encodings

def full_precision(x: Tensor) -> Tensor:
    """At least float32: places and boxes need more than bfloat16's three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


def box_positions(boxes: Tensor, dim: int, order: tuple = (1, 0, 2, 3)) -> Tensor:
    """(..., 4) boxes -> (..., 4 * dim) sine encoding. order: y, x, w, h in DAB-DETR and DINO, x, y, w, h in others."""
    return sine_embedding(boxes[..., list(order)] * 2 * math.pi, dim, 10000.).flatten(-2)


def token_centres(shapes: list, valid_ratios: Tensor) -> Tensor:
    """(B, S, 2) centre (x, y) of every token as fractions of its image's own size; beyond 1 in the padding."""
    centres = []
    for (height, width), ratio in zip(shapes, valid_ratios.unbind(1)):  # ratio (B, 2)
        y = (torch.arange(height, device=ratio.device) + 0.5) / (ratio[:, 1:] * height)     # (B, H)
        x = (torch.arange(width, device=ratio.device) + 0.5) / (ratio[:, :1] * width)       # (B, W)
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        centres.append(grid.flatten(1, 2))                              # (B, H, W, 2) -> (B, H * W, 2)
    return torch.cat(centres, 1)


# ------------------------------------------------------------------------------------- small blocks

def xavier_(module: nn.Module) -> nn.Module:
    """Every weight matrix Xavier-uniform, as the official transformers start; vectors keep what they have."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return module


class MLP(nn.Module):
    """Linear layers with ReLU between them."""
    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The two linear layers of a transformer layer, with residual and norm. PReLU in DAB-DETR, one slope a layer."""
    def __init__(self, dim: int, hidden: int, dropout: float, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.linear1, self.linear2 = xavier_(nn.Linear(dim, hidden)), xavier_(nn.Linear(hidden, dim))
        self.norm, self.activation, self.dropout = nn.LayerNorm(dim), activation(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


# -------------------------------------------- deformable sampling on a CPU: skip on a first reading

class SparseSampling(torch.autograd.Function):
    """`deformable_sample` as a product with a sparse matrix: on a CPU several times as fast, and no sample is stored.

    A bilinear sample is a weighted sum of the four cells around its point. So each head of each query adds up
    4 * levels * P rows, times their shares, of one table of all cells, which is what embedding_bag does.
    """
    @staticmethod
    def forward(ctx, value, shapes, points, weights):
        batch, _, heads, dim = value.shape
        table = value.new_zeros(batch, sum(h * w for h, w in framed(shapes)), heads * dim)
        for level, cells in zip(inside_frame(table, shapes), value.flatten(2).split([h * w for h, w in shapes], 1)):
            level.copy_(cells.unflatten(1, level.shape[1:3]))
        table = table.view(-1, dim)                                                       # (B * cells * heads, d)
        ctx.save_for_backward(table, points, weights)
        ctx.shapes = shapes
        rows, shares, _ = corners(points, weights, shapes)
        mixed = sum(F.embedding_bag(row, table, mode="sum", per_sample_weights=share)
                    for row, share in zip(rows, shares))
        return mixed.view(batch, -1, heads * dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table, points, weights = ctx.saved_tensors
        batch, _, heads, levels, count = weights.shape
        grad = grad.reshape(-1, table.shape[1])                                           # (B * Q * heads, d)
        rows, shares, (x, y) = corners(points, weights, ctx.shapes)
        # The matrix transposed: for each cell the bags that add it up. As the other three corners of a point are at
        # fixed steps from its first, one sort serves all four.
        first = rows[0].flatten()
        order = first.argsort()
        found = first.bincount(minlength=len(table))
        start, bag = found.cumsum(0) - found, order // (levels * count)
        ends = torch.arange(0, len(first) + 1, levels * count, dtype=torch.int32)
        of_shares, of_cells = [], []
        for row, share in zip(rows, shares):
            matrix = sparse_matrix(ends, row.flatten(), share.flatten(), (len(grad), len(table)))
            of_shares.append(torch.sparse.sampled_addmm(matrix, grad, table.t(), beta=0.).values().view_as(x))
            cells = F.embedding_bag(bag, grad, start, mode="sum", per_sample_weights=share.flatten().gather(0, order))
            of_cells.append(cells.view(batch, -1, heads * table.shape[1]))
        near = zip(*(inside_frame(cells, ctx.shapes, *step) for cells, step in zip(of_cells, CORNERS)))
        of_value = torch.cat([sum(level).flatten(1, 2) for level in near], 1).unflatten(2, (heads, -1))
        # Bilinear interpolation again, now of the four products: along x, then y.
        a, b, c, d = of_shares
        upper, lower = a.lerp(b, x), c.lerp(d, x)
        height, width = torch.tensor(ctx.shapes).T[..., None].expand(-1, levels, count).to(points).unbind()
        moved = [change.mul_(weights.view_as(x)).view_as(weights).mul_(size)
                 for change, size in (((b - a).lerp(d - c, y), width), (lower - upper, height))]
        return of_value, None, torch.stack(moved, -1), upper.lerp(lower, y).view_as(weights)


def sparse_matrix(ends: Tensor, columns: Tensor, values: Tensor, size: tuple) -> Tensor:
    """A CSR matrix. torch warns once that these are in beta; what is used of them is tested here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(ends, columns, values, size, check_invariants=False)


CORNERS = (0, 0), (0, 1), (1, 0), (1, 1)                 # of a point, (down, right) from the first
FRAME = 2                                                # a point further away is moved here, where all corners are 0


def framed(shapes: list) -> list:
    """Sizes of the levels in SparseSampling's table, with a frame of zeros around each."""
    return [(height + 2 * FRAME, width + 2 * FRAME) for height, width in shapes]


def inside_frame(table: Tensor, shapes: list, down: int = 0, right: int = 0) -> list[Tensor]:
    """(B, cells, D) -> [(B, H_l, W_l, D)], the levels without their frames, or what is that far up and left of them."""
    levels = table.split([h * w for h, w in framed(shapes)], 1)
    top, left = FRAME - down, FRAME - right
    return [level.unflatten(1, size)[:, top:top + height, left:left + width]
            for level, size, (height, width) in zip(levels, framed(shapes), shapes)]


def corners(points: Tensor, weights: Tensor, shapes: list) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """The four cells around each point -> their rows in SparseSampling's table, int32, and their shares, each
    [4 of (B * Q * heads, levels * P)]; and how far the point is between the cells in x and y (0..1)."""
    batch, queries, heads, levels, count = weights.shape

    def spread(x):                                       # of each level, or head and level -> (heads * levels * P,)
        return x[..., None].expand(heads, levels, count).flatten().to(points.device)

    height, width = torch.tensor(shapes, dtype=torch.int32).T                             # (levels,)
    wide = width + 2 * FRAME
    cells = (height + 2 * FRAME) * wide
    origin = cells.cumsum(0) - cells + FRAME * wide + FRAME                               # the first cell of each level
    row = (spread(origin * heads + torch.arange(heads)[:, None])
           + torch.arange(batch)[:, None, None] * (cells.sum() * heads)).int()            # (B, 1, heads * levels * P)
    between = []
    for axis, size, step in ((0, width, torch.full_like(wide, heads)), (1, height, wide * heads)):
        place = (points[..., axis].flatten(2) * spread(size)).sub_(0.5)                   # (B, Q, heads * levels * P)
        low = place.floor()
        between.append(place.sub_(low))
        row = low.int().clamp_(spread(torch.full_like(size, -FRAME)), spread(size)).mul_(spread(step)).add_(row)
    x, y = between
    lower = weights.view_as(y) * y
    upper = weights.view_as(y) - lower
    upper_right, lower_right = upper * x, lower * x
    rows = [row + spread((down * wide + right) * heads) for down, right in CORNERS]
    shares = [upper - upper_right, upper_right, lower - lower_right, lower_right]
    return ([x.view(-1, levels * count) for x in rows], [x.view(-1, levels * count) for x in shares], (x, y))
