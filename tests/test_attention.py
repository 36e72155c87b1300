"""attention.py: against the official implementations' primitives where ../shared is at hand, and by hand-worked
numbers, slow twins and invariants everywhere."""
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import attention
from attention import ConditionalCrossAttention, ConditionalSelfAttention, DeformableAttention, SelfAttention
from official import close, needs_vectors, under, vectors


# --------------------------------------------------------------------------------------------------- position encodings

@needs_vectors
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("detector, name, temperature, offset", [
    ("detr", "sine_T10000", 10000., 0.), ("deformable_detr", "sine_T10000_half", 10000., -0.5),
    ("dab_detr", "sineHW_T20", 20., 0.), ("dino", "sineHW_T20", 20., 0.)])
def test_image_positions_equal_official(detector, name, temperature, offset, width):
    tensors = vectors(f"prims_{detector}")
    ours = attention.image_positions(tensors["pe.mask"], 2 * width, temperature, offset)
    close(ours.permute(0, 3, 1, 2), tensors[f"pe.{name}_n{width}"], 2e-6)


@needs_vectors
@pytest.mark.parametrize("detector, eps", [("dab_detr", "1e-3"), ("deformable_detr", "1e-5"), ("dino", "1e-3")])
def test_inverse_sigmoid_equals_official(detector, eps):
    tensors = under(vectors(f"prims_{detector}"), "inverse_sigmoid.")
    close(attention.inverse_sigmoid(tensors["x"], float(eps)), tensors[f"y_eps{eps}"], 2e-6)


@needs_vectors
def test_box_positions_equal_official():
    """y, x, w, h in DAB-DETR and DINO (y, x of a point alone), but x, y, w, h in two-stage Deformable DETR."""
    for tensors in (vectors("prims_dab_detr"), vectors("prims_dino")):
        boxes = tensors["sineembed.pos"]
        for key, theirs in under(tensors, "sineembed.d").items():             # "256_4": widths of two, numbers of a box
            dim, numbers = map(int, key.split("_"))
            order = {} if numbers == 4 else {"order": (1, 0)}
            close(attention.box_positions(boxes[..., :numbers], dim // 2, **order), theirs, 2e-6)
    tensors = under(vectors("prims_deformable_detr"), "ppe.")
    for dim in (64, 256):                                                     # the last box is infinite: (1, 1, 1, 1)
        ours = attention.box_positions(tensors["raw_unsigmoid"].sigmoid(), dim // 2, order=(0, 1, 2, 3))
        close(ours, tensors[f"pos_d{dim}"], 2e-6)


@needs_vectors
@pytest.mark.parametrize("detector", ["deformable_detr", "dino"])
def test_token_centres_equal_official(detector):
    tensors = under(vectors(f"prims_{detector}"), "vr.")
    shapes, ratios = [tuple(tensors[f"mask.{i}"].shape[1:]) for i in range(4)], tensors["valid_ratios"]
    ours = attention.token_centres(shapes, ratios)[:, :, None] * ratios[:, None]
    close(ours, tensors["encoder_reference_points"], 1e-6)


def test_inverse_sigmoid_by_hand():
    """eps bounds each side on its own: log(1e-3) - log(1) at 0, not log(1e-3) - log(1 - 1e-3)."""
    x = torch.tensor([-3., 0., 5e-4, .25, 1., 7.])
    expected = torch.tensor([math.log(1e-3), math.log(1e-3), math.log(1e-3) - math.log(1 - 5e-4), -math.log(3),
                             -math.log(1e-3), -math.log(1e-3)])
    torch.testing.assert_close(attention.inverse_sigmoid(x, 1e-3), expected)


def test_sine_embedding_by_hand():
    """Angle pi / 2, four channels, temperature 100: wavelengths 2 pi and 20 pi, sine and cosine interleaved."""
    angle = math.pi / 2
    expected = torch.tensor([1., 0., math.sin(angle / 10), math.cos(angle / 10)])
    torch.testing.assert_close(attention.sine_embedding(torch.tensor(angle), 4, 100.), expected)


def test_image_positions_by_hand():
    """Two of three columns are the image's: 1/2 and 2/2 of a turn, or with the offset 1/4 and 3/4; y comes first."""
    padding = torch.tensor([[[False, False, True]]])
    plain = attention.image_positions(padding, 4, 20.)[0, 0, :2]              # channels sin y, cos y, sin x, cos x
    torch.testing.assert_close(plain, torch.tensor([[0., 1., 0., -1.], [0., 1., 0., 1.]]), atol=1e-5, rtol=0)
    shifted = attention.image_positions(padding, 4, 20., -0.5)[0, 0, :2]
    torch.testing.assert_close(shifted, torch.tensor([[0., -1., 1., 0.], [0., -1., -1., 0.]]), atol=1e-5, rtol=0)


def test_token_centres_by_hand():
    """A 2x4 level of which the image fills half the width: its two columns are at 1/4 and 3/4 of its own width."""
    centres = attention.token_centres([(2, 4)], torch.tensor([[[0.5, 1.]]]))
    expected = [[.25, .25], [.75, .25], [1.25, .25], [1.75, .25], [.25, .75], [.75, .75], [1.25, .75], [1.75, .75]]
    torch.testing.assert_close(centres, torch.tensor([expected]))


# ------------------------------------------------------------------------------------------------- deformable attention

@needs_vectors
def test_deformable_attention_equals_official():
    """References that are points, and boxes; also without any padding."""
    tensors = under(vectors("prims_deformable_detr"), "msda.")
    module = DeformableAttention(32, 4, 3, 2)
    module.load_state_dict(under(tensors, "state_dict."))
    shapes = [tuple(shape) for shape in tensors["spatial_shapes"].tolist()]
    seen = {}
    module.recorder = lambda points, weights: seen.update(points=points, weights=weights)
    query, tokens, padding = tensors["query"], tensors["input_flatten"], tensors["padding_mask"]
    point, box = tensors["ref2.reference_points"], tensors["ref4.reference_points"]
    cell = 1 / tensors["spatial_shapes"].flip(1)[None, None]
    for name, centre, unit in (("ref2", point, cell), ("ref4", box[..., :2], box[..., 2:] * 0.5 / 2)):
        out = module(query, centre, unit, tokens, padding, shapes)
        close(out, tensors[f"{name}.out"], 2e-6)
        close(seen["points"], tensors[f"{name}.sampling_locations"], 2e-6)
        close(seen["weights"], tensors[f"{name}.attention_weights"], 1e-6)
    out = module(query, point, cell, tokens, torch.zeros_like(padding), shapes)
    close(out, tensors["out_no_mask_ref2"], 2e-6)


def test_deformable_attention_starts_on_a_square_of_directions():
    """Eight heads look right, down-right, down, ... (y grows downwards), their second point twice as far, on each level
    alike and whatever the query; all points weigh the same."""
    module = DeformableAttention(16, 8, 2, 2)
    directions = torch.tensor([[1., 0.], [1., 1.], [0., 1.], [-1., 1.], [-1., 0.], [-1., -1.], [0., -1.], [1., -1.]])
    bias = module.sampling_offsets.bias.detach().view(8, 2, 2, 2)             # heads, levels, points, (x, y)
    close(bias[:, :, 0], directions[:, None].expand(-1, 2, -1), 1e-6)
    close(bias[:, :, 1], 2 * bias[:, :, 0], 0)
    for constant in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
        assert not constant.any()


def test_sampling_by_hand():
    """A 2x3 map of 0..5: between four cells is their mean; outside is zero, so the edge is half the border cell."""
    value = torch.arange(6.).view(1, 6, 1, 1)
    # The corner of cells 0, 1, 3 and 4; the centre of cell 0; its left edge; far outside.
    places = torch.tensor([[1 / 3, 1 / 2], [1 / 6, 1 / 4], [0., 1 / 4], [-1., 0.5]])
    points = places.view(1, 4, 1, 1, 1, 2)
    out = attention.deformable_sample(value, [(2, 3)], points, torch.ones(1, 4, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([2., 0., 0., 0.]))
    out = attention.deformable_sample(value + 1, [(2, 3)], points, torch.full((1, 4, 1, 1, 1), 0.5))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5, 0.5, 0.25, 0.]))


def test_sampling_against_a_plain_loop():
    torch.manual_seed(0)
    shapes, heads, count = [(3, 5), (2, 2)], 2, 3
    value = torch.randn(2, 19, heads, 4, dtype=torch.double)
    points = torch.rand(2, 4, heads, 2, count, 2, dtype=torch.double) * 1.4 - 0.2
    weights = torch.rand(2, 4, heads, 2, count, dtype=torch.double)
    expected = torch.zeros(2, 4, heads, 4, dtype=torch.double)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, (2, 4, heads, 2, count))).tolist():
        height, width = shapes[level]
        grid = value[b, 15 * level:15 * level + height * width, h].view(height, width, 4)
        x, y = points[b, q, h, level, p].tolist()
        for row in range(height):
            for column in range(width):          # bilinear = product of two hat functions
                hat = max(0, 1 - abs(x * width - 0.5 - column)) * max(0, 1 - abs(y * height - 0.5 - row))
                expected[b, q, h] += weights[b, q, h, level, p] * hat * grid[row, column]
    torch.testing.assert_close(attention.deformable_sample(value, shapes, points, weights), expected.flatten(2))


def test_sampling_gradients():
    torch.manual_seed(0)
    value = torch.randn(1, 6, 2, 3, dtype=torch.double, requires_grad=True)
    points = (torch.rand(1, 2, 2, 1, 2, 2, dtype=torch.double) * 0.8 + 0.1).requires_grad_()
    weights = torch.rand(1, 2, 2, 1, 2, dtype=torch.double, requires_grad=True)

    def sample(value, points, weights):
        return attention.deformable_sample(value, [(2, 3)], points, weights)
    assert torch.autograd.gradcheck(sample, (value, points, weights))


class Sampled(nn.Module):
    """Deformable attention of fixed shapes, as a program that takes tensors only."""
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs, [(4, 6), (2, 3)])


def traced(program, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")        # torch.jit.trace is deprecated, but ONNX's older exporter uses it
        trace = torch.jit.trace(program, inputs)
    return trace, str(trace.inlined_graph)


def exported(program, inputs):
    program = torch.export.export(program, inputs).module()
    return program, [graph.code for graph in program.modules() if isinstance(graph, torch.fx.GraphModule)]


def compiled(program, inputs):
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph
    return torch.compile(program, fullgraph=True, backend=backend), graphs


@pytest.mark.parametrize("write_down", [exported, traced, compiled])
def test_a_program_for_another_machine_samples_with_grid_sample(write_down):
    """Not with the CPU's sparse product: an ONNX file of DINO with it did not load."""
    torch.manual_seed(0)
    program = Sampled(DeformableAttention(8, 2, 2, 2).eval())
    centre, unit, tokens = torch.rand(1, 5, 2, 2), torch.full((1, 1, 2, 2), 0.1), torch.randn(1, 30, 8)
    inputs = torch.randn(1, 5, 8), centre, unit, tokens, torch.zeros(1, 30, dtype=torch.bool)
    again, graph = write_down(program, inputs)
    torch.testing.assert_close(again(*inputs), program(*inputs))
    graph = str(graph)
    assert "grid_sample" in graph
    assert not any(name in graph for name in ("embedding_bag", "PythonOp", "autograd_function"))


def test_torch_is_not_heard_about_sparse_matrices_and_warnings_stay_as_they_are():
    """In a process in which every warning is an error: after two trained samplings its filters are the same."""
    program = """
import warnings, torch
before = list(warnings.filters)
import attention
for _ in range(2):
    value = torch.rand(1, 4, 1, 2, requires_grad=True)
    points = torch.rand(1, 3, 1, 1, 2, 2, requires_grad=True)
    weights = torch.rand(1, 3, 1, 1, 2, requires_grad=True)
    attention.deformable_sample(value, [(2, 2)], points, weights).sum().backward()
assert warnings.filters == before
"""
    child = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program],
                           capture_output=True, text=True, cwd=Path(attention.__file__).parent)
    assert child.returncode == 0 and not child.stderr, child.stderr


def test_padded_tokens_are_as_if_outside_the_map():
    """Their values count as zero after the projection, so its bias does not leak in: a border of padding and the
    border of the map are the same."""
    torch.manual_seed(0)
    module = DeformableAttention(8, 2, 1, 2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, tokens, place = torch.randn(1, 4, 8), torch.randn(1, 2, 3, 8), torch.rand(1, 4, 1, 2)
    wide = torch.cat([tokens, torch.randn(1, 2, 3, 8)], 2)                    # 2x3 tokens, then 2x3 of padding
    padding = torch.zeros(1, 2, 6, dtype=torch.bool)
    padding[..., 3:] = True
    half = torch.tensor([0.5, 1.])                                            # from the narrow map to the wide one
    unit, none = torch.full((1, 1, 1, 2), 0.25), torch.zeros(1, 6, dtype=torch.bool)
    narrow = module(query, place, unit, tokens.flatten(1, 2), none, [(2, 3)])
    padded = module(query, place * half, unit * half, wide.flatten(1, 2), padding.flatten(1), [(2, 6)])
    torch.testing.assert_close(narrow, padded)


def test_sampling_places_are_the_same_under_autocast():
    """Offsets too, not only the sum: bfloat16 would move a point by up to 1/256 of its offset."""
    torch.manual_seed(0)
    module, seen = DeformableAttention(32, 4, 2, 2), []
    nn.init.normal_(module.sampling_offsets.weight)
    module.recorder = lambda points, weights: seen.append((points, weights))
    tokens, centre = torch.randn(1, 10, 32), torch.rand(1, 10, 2, 2)
    unit, padding = torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 10, dtype=torch.bool)
    inputs = tokens, centre, unit, tokens, padding, [(2, 4), (1, 2)]
    module(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(*inputs).dtype == torch.bfloat16
        module(tokens.bfloat16(), *inputs[1:])                                # a query that comes rounded
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert seen[2][0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ dense attention

def picking(layer, *blocks):
    """A linear layer that adds up chosen parts of its input: blocks of (first channel, factor)."""
    layer.bias.data.zero_()
    layer.weight = nn.Parameter(torch.zeros(len(layer.bias), max(start for start, _ in blocks) + len(layer.bias)))
    for start, factor in blocks:
        layer.weight.data[:, start:start + len(layer.bias)] += factor * torch.eye(len(layer.bias))


@needs_vectors
def test_conditional_self_attention_equals_official():
    """The official attention has no projections of its own: ours pick its query, key and value from one input, a
    quarter by way of the content and three quarters by way of the position."""
    tensors = under(vectors("prims_dab_detr"), "mha.self.")
    query, key, value = (tensors[name].transpose(0, 1) for name in "qkv")     # (2, 5, 32), (2, 7, 32), (2, 7, 32)
    x = torch.cat([nn.functional.pad(query, (0, 0, 0, 2)), key, value], -1)   # (2, 7, 96)
    module = ConditionalSelfAttention(32, 4, 0.)
    module.out_proj.load_state_dict(under(tensors, "state_dict.out_proj."))
    for name, start in (("query", 0), ("key", 32)):
        picking(getattr(module, f"{name}_content"), (start, 0.25), (64, 0.))
        picking(getattr(module, f"{name}_position"), (start, 0.75), (64, 0.))
    picking(module.value, (64, 1.))
    out = module(x, x, ~tensors["key_padding_mask"][:, None, None])
    close(out[:, :5], tensors["out"].transpose(0, 1), 2e-6)


@needs_vectors
@pytest.mark.parametrize("first", [False, True])
def test_conditional_cross_attention_equals_official(first):
    """Officially each head gets (content, place) side by side. In the first layer half of the content comes by way of
    the position, for a key by way of its place, which the official code adds before."""
    tensors = under(vectors("prims_dab_detr"), "mha.cross.")
    query, key, value = (tensors[name].transpose(0, 1) for name in "qkv")     # (2, 5, 64), (2, 7, 64), (2, 7, 32)
    content, sine = (x.flatten(2) for x in query.unflatten(-1, (4, 2, 8)).unbind(-2))        # (2, 5, 32) each
    key, place = (x.flatten(2) for x in key.unflatten(-1, (4, 2, 8)).unbind(-2))             # (2, 7, 32) each
    module = ConditionalCrossAttention(32, 4, 0., first)
    module.out_proj.load_state_dict(under(tensors, "state_dict.out_proj."))
    picking(module.query_content, (0, 0.5 if first else 1.))
    picking(module.query_sine, (0, 1.))
    picking(module.key_content, (0, 1.), (32, 0.))
    picking(module.key_position, (0, 1.))
    picking(module.value, (32, 1.))
    if first:
        picking(module.query_position, (0, 0.5))
        key = key - place
    tokens = torch.cat([key, value], -1)                                      # (2, 7, 64)
    out = module(content, content, sine, tokens, place, ~tensors["key_padding_mask"][:, None, None])
    close(out, tensors["out"].transpose(0, 1), 2e-6)


@torch.no_grad()
def slowly(query, key, value, heads, attend):
    """Dense attention as its definition says, number by number: (B, Q, D') and the weights (B, heads, Q, K)."""
    batch, queries, keys, dim = len(query), query.shape[1], key.shape[1], query.shape[2] // heads
    weights, out = query.new_zeros(batch, heads, queries, keys), query.new_zeros(batch, queries, value.shape[2])
    wide = value.shape[2] // heads
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                powers = [torch.exp(query[b, q, h * dim:(h + 1) * dim] @ key[b, k, h * dim:(h + 1) * dim] / dim ** 0.5)
                          if attend[b, q, k] else 0. for k in range(keys)]
                for k in range(keys):
                    weights[b, h, q, k] = powers[k] / sum(powers)
                    out[b, q, h * wide:(h + 1) * wide] += weights[b, h, q, k] * value[b, k, h * wide:(h + 1) * wide]
    return out, weights


MASKS = {"none": None, "for all": (1, 1, 5, 5), "by image": (2, 1, 5, 5), "padding": (2, 1, 1, 5)}


def random_attend(mask, seed=0):
    if MASKS[mask] is None:
        return None
    attend = torch.rand(MASKS[mask], generator=torch.Generator().manual_seed(seed)) < 0.5
    attend[..., 0] = True                                                     # something for every row
    return attend[0, 0] if mask == "for all" else attend                      # (5, 5), as a decoder passes it


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", [SelfAttention, ConditionalSelfAttention])
def test_self_attention_against_a_plain_loop(kind, mask):
    torch.manual_seed(0)
    module, seen = kind(8, 2, 0.).double(), []
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, position = torch.randn(2, 2, 5, 8, dtype=torch.double)                 # two (2, 5, 8)
    attend = random_attend(mask)
    module.recorder = seen.append
    out = module(x, position, attend)
    if kind is SelfAttention:
        (q, k, v), bias = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        query, key, value = (x + position) @ q.T + bias[0], (x + position) @ k.T + bias[1], x @ v.T + bias[2]
    else:
        query = module.query_content(x) + module.query_position(position)
        key, value = module.key_content(x) + module.key_position(position), module.value(x)
    everything = torch.ones(2, 5, 5, dtype=torch.bool)
    allowed = everything if attend is None else everything & (attend if mask == "for all" else attend[:, 0])
    expected, weights = slowly(query, key, value, 2, allowed)
    torch.testing.assert_close(out, module.out_proj(expected))
    torch.testing.assert_close(seen[0], weights.float())
    assert (seen[0].transpose(0, 1)[:, ~allowed] == 0).all()


@pytest.mark.parametrize("first", [False, True])
def test_conditional_cross_attention_against_a_plain_loop(first):
    """With the scale of twice the width: a head compares content and place together."""
    torch.manual_seed(0)
    module, seen = ConditionalCrossAttention(8, 2, 0., first).double(), []
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, position, sine = torch.randn(3, 2, 5, 8, dtype=torch.double)
    tokens, place = torch.randn(2, 2, 6, 8, dtype=torch.double)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    module.recorder = seen.append
    out = module(x, position, sine, tokens, place, ~padding[:, None, None])
    contents, keys, places = module.query_content(x), module.key_content(tokens), module.key_position(place)
    if first:
        contents, keys = contents + module.query_position(position), keys + places

    def side_by_side(content, place):                                         # head 0 has channels 0..3 of both
        return torch.cat([content[..., :4], place[..., :4], content[..., 4:], place[..., 4:]], -1)
    query, key = side_by_side(contents, module.query_sine(sine)), side_by_side(keys, places)
    expected, weights = slowly(query, key, module.value(tokens), 2, ~padding[:, None].expand(-1, 5, -1))
    torch.testing.assert_close(out, module.out_proj(expected))
    torch.testing.assert_close(seen[0], weights.float())
    assert (seen[0][1, :, :, 4:] == 0).all()


def test_self_attention_equals_that_of_torch():
    """Same parameter names and start, so official weights fit; our masks say True where one may look."""
    torch.manual_seed(3)
    ours = SelfAttention(32, 4, 0.)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, position = torch.randn(2, 2, 5, 32)
    attend = random_attend("for all")
    expected, _ = theirs(x + position, x + position, x, attn_mask=~attend)
    torch.testing.assert_close(ours(x, position, attend), expected)


@pytest.mark.parametrize("kind", [SelfAttention, ConditionalSelfAttention])
def test_dropout_is_on_the_weights_and_only_in_training(kind):
    """Officially of the attention weights: if all are dropped, only the output's bias is left."""
    torch.manual_seed(0)
    all_dropped, none = kind(8, 2, 1.), kind(8, 2, 0.)
    for parameter in all_dropped.parameters():
        nn.init.normal_(parameter)
    none.load_state_dict(all_dropped.state_dict())
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(all_dropped(x, x, None), all_dropped.out_proj.bias.expand(1, 3, -1))
    assert torch.equal(all_dropped.eval()(x, x, None), none.eval()(x, x, None))
    assert torch.equal(none.train()(x, x, None), none.eval()(x, x, None))


def test_recording_changes_no_output():
    torch.manual_seed(0)
    module, x = SelfAttention(8, 2, 0.), torch.randn(2, 5, 8)
    before = module(x, x, None)
    module.recorder = lambda weights: None
    assert torch.equal(module(x, x, None), before)


# --------------------------------------------------------------------------------------------------------- small blocks

def test_feed_forward_by_hand():
    """Hidden -2: ReLU makes it 0, PReLU -0.5, with one slope for the layer; the residual joins before the norm."""
    outputs = []
    for activation in (nn.ReLU, nn.PReLU):
        block = attention.FeedForward(2, 1, 0., activation)
        block.linear1.weight.data, block.linear1.bias.data = torch.tensor([[-1., 0.]]), torch.zeros(1)
        block.linear2.weight.data, block.linear2.bias.data = torch.tensor([[0.], [2.]]), torch.zeros(2)
        block.norm = nn.Identity()
        outputs.append(block(torch.tensor([[2., 5.]])).tolist())
    assert outputs == [[[2., 5.]], [[2., 4.]]] and block.activation.weight.tolist() == [0.25]


def test_mlp_by_hand():
    """ReLU between the layers, none after the last: 3 -> -3 -> 0 -> -1."""
    block = attention.MLP(1, 1, 1)
    for layer, weight, bias in zip(block.layers, (-1., 2.), (0., -1.)):
        layer.weight.data.fill_(weight), layer.bias.data.fill_(bias)
    assert block(torch.tensor([[3.]])).item() == -1
