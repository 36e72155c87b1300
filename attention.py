"""Attention, written out: dense, deformable, position encodings, and the small blocks around them.

Nothing here knows of a detector. B batch, S memory tokens (all levels concatenated, finest first,
each row by row), D width, Q queries, K keys, d = D / heads. Boxes are (cx, cy, w, h) as fractions.
`padding` masks are True where padded, `attend` masks True where the row (a query) may attend to the
column (a key).

Every attention has a `recorder`, None unless models.record sets it: a function that is called with
the attention weights (and, in deformable attention, the sampled points).
"""
import functools
import math
import warnings

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


# ---------------------------------------------------------------------------------- dense attention

class DenseAttention(nn.Module):
    """In each head  softmax(query @ key^T / sqrt(d)) @ value,  then one output projection.

    The dense attentions below inherit this; they differ in how they make query, key and value.
    """
    recorder = None
    projections = ()                   # names of a subclass's linear layers, D -> D

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.out_proj = xavier_(nn.Linear(dim, dim))
        nn.init.zeros_(self.out_proj.bias)
        for name in self.projections:
            self.add_module(name, xavier_(nn.Linear(dim, dim)))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None) -> Tensor:
        """query (B, heads, Q, d), key (B, heads, K, d), value (B, heads, K, d') -> (B, Q, D).

        attend: bool, broadcast to (B, heads, Q, K), with at least one True in each row.
        None: every query attends to every key.
        """
        if self.recorder:              # in addition to the computation below, which stays the same
            scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
            scores = scores if attend is None else scores.masked_fill(~attend, -math.inf)
            self.recorder(scores.softmax(-1))
        dropout = self.dropout if self.training else 0.
        mixed = F.scaled_dot_product_attention(query, key, value, attend, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))       # (B, Q, D)


class SelfAttention(DenseAttention):
    """The usual self-attention; positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__(dim, heads, dropout)
        # One matrix for query, key and value, initialised as one, as in nn.MultiheadAttention.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x, position (B, Q, D); attend (Q, Q), (B, 1, Q, Q), (B, 1, 1, Q) or None -> (B, Q, D)."""
        sizes = 2 * x.shape[-1], x.shape[-1]
        weight, weight_value = self.in_proj_weight.split(sizes)
        bias, bias_value = self.in_proj_bias.split(sizes)
        query, key = F.linear(x + position, weight, bias).chunk(2, -1)
        heads = map(self.split, (query, key, F.linear(x, weight_value, bias_value)))
        return self.mix(*heads, attend)


class ConditionalSelfAttention(DenseAttention):
    """Self-attention of DAB-DETR's queries: content and position are projected apart and added."""
    projections = "query_content", "query_position", "key_content", "key_position", "value"

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x, position (B, Q, D); attend as in SelfAttention -> (B, Q, D)."""
        query = self.query_content(x) + self.query_position(position)
        key = self.key_content(x) + self.key_position(position)
        return self.mix(*map(self.split, (query, key, self.value(x))), attend)


class ConditionalCrossAttention(DenseAttention):
    """DAB-DETR's queries attend to the memory by content and by place, side by side in each head.

    A head's score is  content . content + sine . place,  over sqrt(2 d). The decoder makes `sine`,
    and so can stretch attention to the shape of the anchor.
    """
    projections = "query_content", "query_sine", "key_content", "key_position", "value"

    def __init__(self, dim: int, heads: int, dropout: float, first: bool):
        super().__init__(dim, heads, dropout)
        # The first layer's content says nothing yet, so there the position is added to the content.
        self.query_position = xavier_(nn.Linear(dim, dim)) if first else None

    def forward(self, x, position, sine, tokens, token_position, attend) -> Tensor:
        """x, position, sine (B, Q, D), tokens, token_position (B, S, D), attend (B, 1, 1, S)."""
        query, key = self.query_content(x), self.key_content(tokens)
        place = self.key_position(token_position)
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + place
        query = torch.cat([self.split(query), self.split(self.query_sine(sine))], -1)
        key = torch.cat([self.split(key), self.split(place)], -1)    # (B, heads, S, 2 d)
        return self.mix(query, key, self.split(self.value(tokens)), attend)


# ----------------------------------------------------------------------------- deformable attention

class DeformableAttention(nn.Module):
    """Each query samples a few learned points around its centre, on every level. In head h

        sum over levels l, points p of  weight[h, l, p] * value_l(centre_l + offset[h, l, p] * unit)

    where weights and offsets are linear in the query and the weights of a head add up to 1
    (Deformable DETR, Eq. 3); then one output projection.
    """
    recorder = None

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        """Head i looks in direction i of a square, its point p at p + 1 units; equal weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)      # (heads, 2), on a circle
        direction = direction / direction.abs().amax(-1, keepdim=True)           # on a square
        steps = torch.arange(1, self.points + 1)[:, None]            # (points, 1)
        start = direction[:, None, None] * steps                     # (heads, 1, points, 2)
        start = start.expand(-1, self.levels, -1, -1)                # (heads, levels, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.data.copy_(start.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, query, centre, unit, tokens, padding, shapes) -> Tensor:
        """query (B, Q, D) samples tokens (B, S, D) -> (B, Q, D).

        centre, unit: (B or 1, Q or 1, levels, 2), (x, y) as fractions of the padded map. The unit
        of an offset is one cell of the level if the reference is a point, (w, h) / (2 * points) if
        it is a box. padding (B, S): padded tokens count as zero. shapes: [(H_l, W_l)].
        """
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.)
        value = value.unflatten(-1, (self.heads, -1))                # (B, S, heads, d)
        points_of_head = self.levels, self.points
        # Under autocast too: half precision would move the points.
        with torch.autocast(query.device.type, enabled=False):
            query = full_precision(query)
            offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, *points_of_head, 2))
            weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
            weights = weights.unflatten(-1, points_of_head)          # (B, Q, heads, levels, P)
            centre, unit = centre[:, :, None, :, None], unit[:, :, None, :, None]
            points = centre + offsets * unit                         # (B, Q, heads, levels, P, 2)
            if self.recorder:
                self.recorder(points, weights)
            mixed = deformable_sample(full_precision(value), shapes, points, weights)
        return self.output_proj(mixed)


def deformable_sample(value: Tensor, shapes: list, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, without projections: for each query q and head h

        sum over levels l and points p of  weights[q, h, l, p] * value_l(points[q, h, l, p])

    value (B, S, heads, d), shapes [(H_l, W_l)], points (B, Q, heads, levels, P, 2) as (x, y)
    fractions of the padded map, weights (B, Q, heads, levels, P). Returns (B, Q, heads * d).
    Outside the map values are zero, so a sample on its edge is half the border cell.
    """
    # A sparse product computes the same faster on a CPU. A program that is exported, traced or
    # compiled may run elsewhere, so it takes grid_sample, which every machine has.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if value.device.type == "cpu" and not traced:
        return SparseSampling.apply(value, shapes, points, weights)
    return grid_sampling(value, shapes, points, weights)


def grid_sampling(value: Tensor, shapes: list, points: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sample` by grid_sample, with the heads as part of the batch."""
    batch, _, heads, dim = value.shape
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)                   # (B * heads, d, S)
    grids = (2 * points - 1).permute(3, 0, 2, 1, 4, 5)               # (levels, B, heads, Q, P, 2)
    grids = grids.flatten(1, 2)                                      # (levels, B * heads, Q, P, 2)
    samples = [
        F.grid_sample(level.unflatten(2, shape), grid, padding_mode="zeros", align_corners=False)
        for level, shape, grid in zip(maps.split(areas(shapes), 2), shapes, grids)]
    samples = torch.cat(samples, -1)                                 # (B * heads, d, Q, levels * P)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)       # (B * heads, Q, levels * P)
    mixed = (samples * weights[:, None]).sum(-1)                     # (B * heads, d, Q)
    return mixed.view(batch, heads * dim, -1).transpose(1, 2)


def areas(shapes: list) -> list[int]:
    """Number of cells of each level."""
    return [height * width for height, width in shapes]


# ------------------------------------------------------------------------------- position encodings

def full_precision(x: Tensor) -> Tensor:
    """At least float32: places and boxes need more than bfloat16's three digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of x clamped to [0, 1]; x and 1 - x are each at least eps, which keeps it finite.

    eps: 1e-3 in DAB-DETR and DINO, 1e-5 in Deformable DETR.
    """
    x = x.clamp(0, 1)
    return x.clamp(min=eps).log() - (1 - x).clamp(min=eps).log()


def sine_embedding(x: Tensor, dim: int, temperature: float) -> Tensor:
    """(...) angles -> (..., dim): sin and cos interleaved, of x / temperature^(2i / dim)."""
    exponents = torch.arange(0, dim, 2, device=x.device) / dim       # (dim / 2,)
    angle = x[..., None] / temperature ** exponents                  # (..., dim / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def image_positions(padding: Tensor, dim: int, temperature: float, offset: float = 0.) -> Tensor:
    """(B, H, W) padding -> (B, H, W, dim): each cell's place in its own unpadded image, y then x.

    offset: -0.5 in Deformable DETR (cell centres), none in DAB-DETR and DINO.
    """
    inside = (~padding).float()
    y, x = inside.cumsum(1), inside.cumsum(2)                        # (B, H, W), first cells are 1
    y = (y + offset) / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return sine_embedding(torch.stack([y, x], -1), dim // 2, temperature).flatten(-2)


def box_positions(boxes: Tensor, dim: int, order: tuple = (1, 0, 2, 3)) -> Tensor:
    """(..., 4) boxes -> (..., 4 * dim) sine encoding of the coordinates in this order.

    order: y, x, w, h in DAB-DETR and DINO, x, y, w, h in Deformable DETR.
    """
    return sine_embedding(boxes[..., list(order)] * 2 * math.pi, dim, 10000.).flatten(-2)


def token_centres(shapes: list, valid_ratios: Tensor) -> Tensor:
    """(B, S, 2): centre (x, y) of every token as fractions of its own unpadded image.

    valid_ratios (B, levels, 2): unpadded part of width and height. In the padding: beyond 1.
    """
    centres = []
    for (height, width), ratio in zip(shapes, valid_ratios.unbind(1)):           # ratio (B, 2)
        y = (torch.arange(height, device=ratio.device) + 0.5) / (ratio[:, 1:] * height)     # (B, H)
        x = (torch.arange(width, device=ratio.device) + 0.5) / (ratio[:, :1] * width)       # (B, W)
        x, y = x[:, None].expand(-1, height, -1), y[..., None].expand(-1, -1, width)
        centres.append(torch.stack([x, y], -1).flatten(1, 2))        # (B, H * W, 2)
    return torch.cat(centres, 1)


# ------------------------------------------------------------------------------------- small blocks

def xavier_(module: nn.Module) -> nn.Module:
    """Make every weight matrix Xavier-uniform, as in the official transformers; keep vectors."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return module


class MLP(nn.Module):
    """Linear layers with ReLU between them; MLP(4, 8, 2) has two."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The two linear layers of a transformer layer, with residual and norm.

    activation: nn.PReLU in DAB-DETR, with one learned slope per layer.
    """

    def __init__(self, dim: int, hidden: int, dropout: float, activation=nn.ReLU):
        super().__init__()
        self.linear1 = xavier_(nn.Linear(dim, hidden))
        self.linear2 = xavier_(nn.Linear(hidden, dim))
        self.norm, self.activation = nn.LayerNorm(dim), activation()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


# -------------------------------------------- deformable sampling on a CPU: skip on a first reading

class SparseSampling(torch.autograd.Function):
    """`deformable_sample` as a product with a sparse matrix: several times as fast on a CPU.

    A bilinear sample is a weighted sum of the four cells around its point. So each head of each
    query adds up 4 * levels * P rows of one table of all cells, each times its share, which is what
    embedding_bag does. No sample is stored for the backward pass.
    """

    @staticmethod
    def forward(ctx, value, shapes, points, weights):
        batch, _, heads, dim = value.shape
        table = value.new_zeros(batch, sum(areas(framed(shapes))), heads * dim)
        levels = value.flatten(2).split(areas(shapes), 1)            # (B, H * W, heads * d) each
        for inside, level in zip(inside_frame(table, shapes), levels):
            inside.copy_(level.view_as(inside))
        table = table.view(-1, dim)                                  # (B * cells * heads, d)
        ctx.save_for_backward(table, points, weights)
        ctx.shapes = shapes
        rows, shares, _ = corners(points, weights, shapes)
        mixed = sum(F.embedding_bag(row, table, mode="sum", per_sample_weights=share)
                    for row, share in zip(rows, shares))             # (B * Q * heads, d)
        return mixed.view(batch, -1, heads * dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        table, points, weights = ctx.saved_tensors
        batch, _, heads, levels, count = weights.shape
        bag_size = levels * count
        grad = grad.reshape(-1, table.shape[1])                      # (B * Q * heads, d)
        rows, shares, (x, y) = corners(points, weights, ctx.shapes)

        # The matrix transposed: for each cell, the bags that add it up. The other three corners of
        # a point are at fixed steps from its first, so one sort serves all four.
        first = rows[0].flatten()
        order = first.argsort()
        bag = order // bag_size
        per_cell = first.bincount(minlength=len(table))
        start = per_cell.cumsum(0) - per_cell
        ends = torch.arange(0, len(first) + 1, bag_size, dtype=torch.int32)
        of_shares, of_cells = [], []
        for row, share, corner in zip(rows, shares, CORNERS):
            matrix = sparse_matrix(ends, row.flatten(), share.flatten(), (len(grad), len(table)))
            product = torch.sparse.sampled_addmm(matrix, grad, table.t(), beta=0.)
            of_shares.append(product.values().view_as(x))
            share = share.flatten().gather(0, order)
            cells = F.embedding_bag(bag, grad, start, mode="sum", per_sample_weights=share)
            cells = cells.view(batch, -1, heads * table.shape[1])
            of_cells.append(inside_frame(cells, ctx.shapes, *corner))
        of_value = torch.cat([sum(quarter).flatten(1, 2) for quarter in zip(*of_cells)], 1)

        # Bilinear interpolation again, now of the four products: along x, then y.
        a, b, c, d = of_shares
        upper, lower = a.lerp(b, x), c.lerp(d, x)
        of_weights = upper.lerp(lower, y).view_as(weights)
        # A point moves in fractions of the map, and by one cell in a height-th or width-th of it.
        height, width = torch.tensor(ctx.shapes).T[..., None].expand(-1, levels, count).to(points)
        changes = ((b - a).lerp(d - c, y), width), (lower - upper, height)
        of_points = [change.mul_(weights.view_as(x)).view_as(weights).mul_(side)
                     for change, side in changes]
        return of_value.unflatten(2, (heads, -1)), None, torch.stack(of_points, -1), of_weights


def sparse_matrix(ends: Tensor, columns: Tensor, values: Tensor, size: tuple) -> Tensor:
    """The CSR matrix whose row i ends before entry ends[i + 1]."""
    hide_beta_warning()
    return torch.sparse_csr_tensor(ends, columns, values, size, check_invariants=False)


@functools.cache
def hide_beta_warning():
    """Make a first CSR matrix, for which alone torch warns that they are in beta.

    Done once: to change the filters at every call would not be safe with several threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


CORNERS = (0, 0), (0, 1), (1, 0), (1, 1)       # of a point, (down, right) from the first
FRAME = 2                                      # zeros around each level, where far points are moved


def framed(shapes: list) -> list:
    """Sizes of the levels in SparseSampling's table, with a frame of zeros around each."""
    return [(height + 2 * FRAME, width + 2 * FRAME) for height, width in shapes]


def inside_frame(table: Tensor, shapes: list, down: int = 0, right: int = 0) -> list[Tensor]:
    """(B, cells, D) -> [(B, H_l, W_l, D)], views of the levels without their frames.

    down, right: of the cells that are so far up and left of them instead.
    """
    top, left = FRAME - down, FRAME - right
    levels = zip(table.split(areas(framed(shapes)), 1), framed(shapes), shapes)
    return [level.unflatten(1, size)[:, top:top + height, left:left + width]
            for level, size, (height, width) in levels]


def corners(points: Tensor, weights: Tensor, shapes: list) -> tuple:
    """The four cells around each point -> rows, shares, (x, y).

    rows: int32, where CORNERS of each point are in SparseSampling's table; shares: how much each
    counts; both four tensors (B * Q * heads, levels * P). x, y (B, Q, heads * levels * P): how far
    the point is between its cells, 0 to 1.
    """
    batch, _, heads, levels, count = weights.shape

    def spread(x):                             # (levels,) or (heads, levels) -> one per point
        return x[..., None].expand(heads, levels, count).flatten().to(points.device)

    def cell_of(places, size):                 # the cell before each place, at most FRAME outside
        return places.floor().int().clamp_(min=-FRAME).clamp_(max=spread(size))

    height, width = torch.tensor(shapes, dtype=torch.int32).T        # (levels,) each
    wide = width + 2 * FRAME
    area = (height + 2 * FRAME) * wide
    # Where the first cell inside each frame has its rows: of image b, level l and head h.
    origin = area.cumsum(0) - area + FRAME * wide + FRAME
    image = torch.arange(batch)[:, None, None] * area.sum()
    head = torch.arange(heads)[:, None]
    first = (spread(origin * heads + head) + image * heads).int()    # (B, 1, heads * levels * P)

    x = (points[..., 0].flatten(2) * spread(width)).sub_(0.5)        # (B, Q, heads * levels * P)
    y = (points[..., 1].flatten(2) * spread(height)).sub_(0.5)
    row = cell_of(y, height).mul_(spread(wide)).add_(cell_of(x, width)).mul_(heads).add_(first)
    rows = [row + spread((down * wide + right) * heads) for down, right in CORNERS]

    x, y = x.sub_(x.floor()), y.sub_(y.floor())
    lower = weights.view_as(y) * y
    upper = weights.view_as(y) - lower
    upper_right, lower_right = upper * x, lower * x
    shares = upper - upper_right, upper_right, lower - lower_right, lower_right
    of_bags = [[part.view(-1, levels * count) for part in corner] for corner in (rows, shares)]
    return *of_bags, (x, y)
