"""Every notebook runs from top to bottom, is its .py twin word for word, and holds the pictures that running it makes.

    make test-notebooks
"""
import contextlib
import copy
import os
from dataclasses import replace
from types import SimpleNamespace

import adapters
import checklist
import jupytext
import nbformat
import pytest
import torch
import transformers
from build import HERE, run
from clockdistill import CLoCKDistill
from three_detectors import deformable_detr, examples, fit, resnet

TWINS = sorted(HERE.glob("[0-9]_*.py"))
LONGEST = 2 * 180                                # CPU seconds of each: three minutes of two cores, if they are free


def spent():
    """CPU seconds of the processes that were started and have ended: the notebooks' kernels."""
    times = os.times()
    return times.children_user + times.children_system


def written(twin):
    return nbformat.read(twin.with_suffix(".ipynb"), as_version=4)


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def pictures(notebook):
    return [sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
            for cell in notebook.cells]


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_twin_and_notebook_agree(twin):
    assert sources(written(twin)) == sources(jupytext.read(twin)), f"{twin.stem}.ipynb is not its .py: make notebooks"
    assert all(cell.execution_count for cell in written(twin).cells if cell.cell_type == "code"), "make notebooks"


def shown_code(notebook):
    """The parts of other files that the page shows."""
    return [output["data"]["text/markdown"] for cell in notebook.cells for output in cell.get("outputs", [])
            if "text/markdown" in output.get("data", {})]


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_notebook_runs_and_draws_what_is_committed(twin):
    """What is claimed is asserted in the notebooks themselves."""
    start = spent()
    made, committed = run(twin), written(twin)
    assert pictures(made) == pictures(committed)
    assert shown_code(made) == shown_code(committed), f"{twin.stem} shows code as it was: make notebooks"
    assert 0 < spent() - start < LONGEST


@pytest.fixture(scope="module")
def trained():
    return examples()


@pytest.fixture
def detectors(trained):
    """{name: (teacher, student, batch)}, a copy that a test may change."""
    return copy.deepcopy(trained)


@pytest.mark.parametrize("name, ask", [("dense DETR", adapters.ask_dense), ("RT-DETR v2", adapters.ask_rt_detr),
                                       ("Deformable DETR", adapters.ask_deformable_detr)])
def test_the_checks_want_a_quiet_copy(name, ask, detectors):
    """Dropout, as modules or as numbers, is off in the copy that the checks see, and on in training."""
    teacher, student, batch = detectors[name]
    rates = [(module, key) for module in student.modules() for key in ("p", "dropout") if hasattr(module, key)
             and isinstance(getattr(module, key), (int, float))]
    for module, key in rates:
        setattr(module, key, 0.1)
    classes = "softmax" if name == "dense DETR" else "bernoulli"
    pair = adapters.Pair(teacher, student, ask, CLoCKDistill(
        32, 64, content="random_label", num_classes=3, classes=classes, at_least=1))
    check = checklist.our_queries_leave_its_answers_alone
    assert rates and not check(pair, batch) and check(checklist.quiet(pair), batch)
    assert all(getattr(module, key) == 0.1 for module, key in rates)


@pytest.mark.parametrize("wrong, said, printed", [
    ("padding", checklist.padding_is_known, "padding is forgotten"),
    ("encoder", checklist.memory_is_of_the_encoder,
     "the loss does not reach the encoder: it is frozen, or the hook lies before it"),
    ("shapes", checklist.shapes_are_height_and_width, "shapes are (width, height)")])
def test_the_checks_see_forgotten_padding_turned_shapes_and_a_hook_before_the_encoder(wrong, said, printed, detectors, capsys):
    teacher, student, batch = detectors["dense DETR"]
    if wrong == "shapes":                                # with padding these are an error, and seen by all checks
        batch = replace(batch, mask=torch.ones_like(batch.mask))

    def mistaken(ask):
        @contextlib.contextmanager
        def asked(detector, *queries, **given):
            seen = []

            def before_encoder(module, args, call):
                seen.append(args[0])

            with adapters.hooked([detector.model.encoder], before_encoder), ask(detector, *queries, **given) as answer:
                yield answer
            if wrong == "padding":
                answer.padding = None
            elif wrong == "encoder":
                answer.memory = seen[0]
            else:
                answer.shapes, answer.padding = [shape[::-1] for shape in answer.shapes], None
        return asked

    def pair(ask, lambda_log=1.0):
        method = CLoCKDistill(32, 64, lambda_log=lambda_log, content="own", classes="softmax", at_least=1)
        return adapters.Pair(teacher, student, ask, method, teacher.model.queries.weight)

    assert [*checklist.missed(pair(mistaken(adapters.ask_dense)), batch)] == [said]
    assert checklist.memory_is_right(pair(adapters.memory_of, 0), batch) and not capsys.readouterr().out
    assert not checklist.memory_is_right(pair(mistaken(adapters.memory_of), 0), batch)
    assert capsys.readouterr().out == f"NO: {printed}\n"


def test_padding_thinner_than_a_token_is_no_mistake(detectors):
    teacher, student, batch = detectors["dense DETR"]
    mask = torch.ones_like(batch.mask)
    mask[1, :, -4:] = 0
    thin = replace(batch, mask=mask)
    pair = adapters.Pair(teacher, student, adapters.memory_of, CLoCKDistill(32, 64, lambda_log=0))
    assert checklist.memory_is_right(pair, thin)


def test_weigh_takes_a_student_with_a_frozen_stem(detectors):
    teacher, student, batch = detectors["dense DETR"]
    student.model.backbone[0].requires_grad_(False)
    pair = adapters.Pair(teacher, student, adapters.memory_of, CLoCKDistill(32, 64, lambda_log=0))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
    adapters.weigh(pair, adapters.memory_step, [batch] * 8, optimizer)
    assert pair.distill.lambda_mem > 1 and pair.distill.lambda_log == 0
    found = pair.distill.lambda_mem
    for part in (student.model.backbone, student.model.encoder):
        part.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient"):
        adapters.weigh(pair, adapters.memory_step, [batch] * 8, optimizer)
    assert pair.distill.lambda_mem == found


def test_a_batch_reads_its_extent_off_its_mask():
    mask = torch.zeros(2, 4, 10)
    mask[0], mask[1, :3, :5] = 1, 1
    batch = adapters.Batch(torch.zeros(2, 3, 4, 10), mask, [], [], [])
    torch.testing.assert_close(batch.extent, torch.tensor([[1., 1.], [0.5, 0.75]]))
    torch.testing.assert_close(replace(batch, mask=mask[1:, :, :5]).extent, torch.tensor([[1., 0.75]]))
    assert replace(batch, mask=None).extent is None
    for wrong in (1 - mask, mask[:, None]):              # 1 where padding is; an axis too many
        with pytest.raises(ValueError, match="1 where an image is"):
            replace(batch, mask=wrong).extent


def test_weigh_wants_eight_batches():
    pair = adapters.Pair(None, None, None, CLoCKDistill(8, 8, lambda_mem=3.0))
    with pytest.raises(ValueError, match="wants 8 batches, got 2"):
        adapters.weigh(pair, None, iter([1, 2]), None)
    assert pair.distill.lambda_mem == 3.0


@pytest.mark.parametrize("refine", [False, True])
def test_a_one_stage_deformable_detr_can_be_asked(refine, detectors):
    """Its position for a box is a fixed random map; its own answers stay what they are."""
    teacher, _, batch = detectors["Deformable DETR"]
    student = deformable_detr(32, 2, two_stage=False, with_box_refine=refine)
    method = CLoCKDistill(32, 64, content="random_label", num_classes=3, at_least=1)
    pair = adapters.Pair(teacher, student, adapters.ask_deformable_detr, method)
    assert checklist.our_queries_leave_its_answers_alone(pair, batch)


# What the page tells of DETR and Conditional DETR of transformers, in its fold.

def trained_pair(kind, batch):
    """Teacher and student of a detector of transformers whose memory has one level."""
    torch.manual_seed(0)

    def small(width, layers):
        config = getattr(transformers, kind + "Config")(
            backbone_config=resnet(transformers.ResNetConfig, width), d_model=width, encoder_layers=layers,
            decoder_layers=layers, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, encoder_attention_heads=4,
            decoder_attention_heads=4, num_queries=30, num_labels=3, dropout=0.0, auxiliary_loss=True)
        detector = getattr(transformers, kind + "ForObjectDetection")(config)
        detector.model.unfreeze_backbone()
        return detector

    teacher, student = small(64, 3), small(32, 2)
    fit(teacher.parameters(), steps=10, losses_of=lambda: {
        "own": teacher(batch.images, batch.mask, labels=batch.targets).loss})
    return teacher.eval().requires_grad_(False), student


def test_conditional_detr_passes_all_checks(detectors):
    *_, batch = detectors["Deformable DETR"]
    teacher, student = trained_pair("ConditionalDetr", batch)
    method = CLoCKDistill(32, 64, content="own", at_least=1)
    pair = adapters.Pair(teacher, student, adapters.ask_conditional_detr, method,
                         teacher.model.query_position_embeddings.weight)
    assert not checklist.missed(pair, batch)

    student.config.auxiliary_loss = False
    with pytest.raises(ValueError, match="auxiliary_loss = True"):
        adapters.step(pair, batch)
    student.config.auxiliary_loss = True
    student.model.decoder.layers[0].gradient_checkpointing = True        # its second run would have no mask
    with pytest.raises(ValueError, match="switch it off"):
        adapters.step(pair, batch)


@contextlib.contextmanager
def memory_of_detr(detector):
    """memory_of with DETR's names; its decoder is told no shapes."""
    kept = SimpleNamespace()

    def project(module, args, output):
        kept.shapes = [output.shape[2:]]

    def before(decoder, args, call):
        kept.memory, kept.padding = call["encoder_hidden_states"], ~call["encoder_attention_mask"]

    with adapters.hooked([detector.model.input_projection], after=project), \
            adapters.hooked([detector.model.decoder], before):
        yield kept


@contextlib.contextmanager
def ask_detr(detector, content, boxes, attend, alone=False):
    """DETR's queries have no reference: content (B, Q, D) are learned positions."""
    decoder, answer = detector.model.decoder, SimpleNamespace()

    def before(decoder, args, call):
        own = call["object_queries_position_embeddings"]
        kept = answer.kept = 0 if alone else own.shape[1]
        answer.own = own, None
        ours = {"inputs_embeds": torch.zeros_like(content), "object_queries_position_embeddings": content}
        return args, call | {key: torch.cat([call[key][:, :kept], rows], 1) for key, rows in ours.items()}

    def apart(attention, args, call):
        return args, call | {"attention_mask": adapters.additive(adapters.together(answer.kept, attend))}

    def after(decoder, args, output):
        states = output.intermediate_hidden_states.clone()
        states[-1] = output.last_hidden_state
        mine = states[:, :, answer.kept:]
        answer.logits, answer.boxes = detector.class_labels_classifier(mine), detector.bbox_predictor(mine).sigmoid()
        if not alone:
            output.last_hidden_state = output.last_hidden_state[:, :answer.kept]
            output.intermediate_hidden_states = output.intermediate_hidden_states[:, :, :answer.kept]
        return output

    with memory_of_detr(detector) as kept, adapters.hooked([decoder], before, after), \
            adapters.at_self_attention(decoder, apart):
        yield answer
        vars(answer).update(vars(kept))


def test_detr_has_a_memory_and_three_checks_do_not_apply_to_its_answers(detectors, monkeypatch):
    *_, batch = detectors["Deformable DETR"]
    teacher, student = trained_pair("Detr", batch)
    memory_alone = adapters.Pair(teacher, student, memory_of_detr, CLoCKDistill(32, 64, lambda_log=0))
    assert checklist.memory_is_right(memory_alone, batch)

    def learned_positions(pair, batch):
        B, N = len(batch.labels), len(pair.embedding)
        yes = torch.ones(B, N, N, dtype=torch.bool, device=pair.embedding.device)
        return pair.embedding.expand(B, -1, -1), None, yes, yes[:, 0]

    for module in (adapters, checklist):
        monkeypatch.setattr(module, "our_queries", learned_positions)
    method = CLoCKDistill(32, 64, content="own", classes="softmax")
    pair = adapters.Pair(teacher, student, ask_detr, method, teacher.model.query_position_embeddings.weight)
    assert set(checklist.missed(pair, batch)) == {
        checklist.references_are_of_the_own_size, checklist.padding_rows_change_nothing,
        checklist.images_without_objects_add_nothing}
