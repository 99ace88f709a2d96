"""The head's loss in pieces: the plain loss and gradients, whatever the shapes, labels and dtype.

Distances are relative, in the Euclidean norm. Measured on an AVX512-BF16 CPU: fp32 4e-7 for
gradients and 1e-7 for the loss; under bf16 autocast 3.3e-3 for gradients, to whom the stock step is
as far (3.1e-3), and 1e-4 for the loss, all of it from rounding hidden, weight and logits.
"""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import linear_cross_entropy as room
from pipeline.linear_cross_entropy import chunk_rows, linear_cross_entropy

FP32 = 1e-6
BF16_GRADIENT, BF16_LOSS = 8e-3, 1e-3
SHAPES = [(1, 384), (31, 384), (32, 64), (33, 1000), (100, 1000), (129, 7)]


def tensors(rows, vocabulary, width=16, *, ignored=(), seed=0):
    """Return hidden, weight and labels, logits spread over about +-4."""
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=source)
    weight = torch.randn(vocabulary, width, generator=source) * 0.3
    labels = torch.randint(vocabulary, (rows,), generator=source)
    labels[list(ignored)] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def by_definition(hidden, weight, labels, upstream=1.0):
    """Return loss and both gradients of the plain computation in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


def in_pieces(hidden, weight, labels, upstream=1.0, *, mixed=False, device="cpu", function=None):
    """Return loss and both gradients of ours, under bf16 autocast if `mixed`."""
    hidden.grad = weight.grad = None
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        loss = (function or linear_cross_entropy)(hidden, weight, labels)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad, weight.grad


def distance(found, wanted):
    found, wanted = found.detach().double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()


def assert_close(found, wanted, *, loss=FP32, gradient=FP32):
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    assert distance(found[0], wanted[0]) < loss
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < gradient


@pytest.fixture
def short_chunks(monkeypatch):
    """The fewest rows at a time there are: 32."""
    monkeypatch.setattr(room, "CHUNK_BYTES", {"cpu": 0, "cuda": 0})


@pytest.mark.parametrize(
    "bytes_held, vocabulary, rows",
    [
        (128 * 2**20, 50257, 512),
        (128 * 2**20, 50304, 512),
        (128 * 2**20, 384, 65536),
        (2**30, 50257, 4096),
        (4 * 64 * 1000, 1000, 64),
        (4 * 64 * 1000 - 1, 1000, 32),
        (0, 50257, 32),
    ],
)
def test_a_chunk_is_a_power_of_two_of_rows(monkeypatch, bytes_held, vocabulary, rows):
    monkeypatch.setattr(room, "CHUNK_BYTES", {"cpu": bytes_held})
    assert chunk_rows(vocabulary, "cpu") == rows
    assert chunk_rows(vocabulary, "mps") == rows  # any other device as a CPU


# -- loss and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows, vocabulary", SHAPES)
def test_it_equals_the_plain_loss_in_fp32(short_chunks, rows, vocabulary):
    given = tensors(rows, vocabulary)
    assert_close(in_pieces(*given), by_definition(*given))


@pytest.mark.parametrize("rows, vocabulary", SHAPES)
def test_it_equals_the_plain_loss_under_bf16_autocast(short_chunks, rows, vocabulary):
    given = tensors(rows, vocabulary)
    found, wanted = in_pieces(*given, mixed=True), by_definition(*given)
    loss = BF16_LOSS if rows > 1 else BF16_GRADIENT  # nothing averages one row's rounding
    assert_close(found, wanted, loss=loss, gradient=BF16_GRADIENT)
    assert found[1].dtype == found[2].dtype == torch.float32


def test_bf16_gradients_are_as_near_as_those_of_the_stock_step(short_chunks):
    given = tensors(100, 1000)
    wanted = by_definition(*given, 1 / 41)

    def stock(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    ours = in_pieces(*given, 1 / 41, mixed=True)
    theirs = in_pieces(*given, 1 / 41, mixed=True, function=stock)
    for place in (1, 2):
        assert distance(ours[place], wanted[place]) < 1.5 * distance(theirs[place], wanted[place])


def test_under_bf16_the_weights_gradient_is_added_up_in_fp32(short_chunks):
    """Over 64 chunks; in bf16 the sum would be off by 8e-3."""
    hidden, weight, labels = tensors(2048, 64)
    parts = zip(hidden.detach().split(32), labels.split(32), strict=True)
    each = [in_pieces(h.requires_grad_(), weight, y, mixed=True)[2] for h, y in parts]
    wanted = sum(part.double() for part in each)
    assert distance(in_pieces(hidden, weight, labels, mixed=True)[2], wanted) < FP32


@pytest.mark.parametrize("rows", [100, 1000])
def test_the_loss_of_bf16_logits_is_rounded_as_fp32(short_chunks, rows):
    """bf16 keeps 8 bits: the sum, or its terms, in bf16 would be off by up to 4e-3."""
    hidden, weight, labels = tensors(rows, 1000, ignored=[3, 50])
    head = weight.detach().bfloat16().T
    logits = torch.cat([piece @ head for piece in hidden.detach().bfloat16().split(32)])
    wanted = F.cross_entropy(logits.double(), labels, reduction="sum")
    loss, _, _ = in_pieces(hidden, weight, labels, mixed=True)
    assert loss.dtype == torch.float32
    assert distance(loss, wanted) < FP32


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    "ignored",
    [[0], [99], [0, 31, 32, 63, 64, 99], range(32, 64), range(1, 100), range(0, 100, 2)],
    ids=["first", "last", "edges of chunks", "a whole chunk", "all but one", "every second"],
)
def test_ignored_labels_count_nowhere(short_chunks, ignored, mixed):
    given = tensors(100, 384, ignored=ignored)
    found, wanted = in_pieces(*given, mixed=mixed), by_definition(*given)
    if mixed:
        assert_close(found, wanted, loss=BF16_GRADIENT, gradient=BF16_GRADIENT)
    else:
        assert_close(found, wanted)
    assert not found[1][list(ignored)].any()


@pytest.mark.parametrize("mixed", [False, True])
def test_without_labels_loss_and_gradients_are_zero(short_chunks, mixed):
    loss, *gradients = in_pieces(*tensors(70, 384, ignored=range(70)), mixed=mixed)
    assert loss == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("label", [384, -1, -99])
def test_a_label_outside_of_the_vocabulary_is_refused(label):
    hidden, weight, labels = tensors(5, 384)
    labels[2] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, labels)


def test_chunks_change_nothing(monkeypatch):
    given = tensors(500, 384, ignored=[0, 77, 499])
    whole = in_pieces(*given)
    for rows in (32, 64, 256):
        monkeypatch.setattr(room, "CHUNK_BYTES", {"cpu": 4 * 384 * rows})
        assert chunk_rows(384, "cpu") == rows
        assert_close(in_pieces(*given), whole)


@pytest.mark.parametrize("mixed", [False, True])
def test_logits_far_out_do_not_overflow(short_chunks, mixed):
    hidden, weight, labels = tensors(70, 384)
    with torch.no_grad():
        hidden *= 1e4
    assert (hidden @ weight.T).abs().max() > 1e4
    wanted, found = by_definition(hidden, weight, labels), in_pieces(hidden, weight, labels)
    assert_close(found, wanted)
    found = in_pieces(hidden, weight, labels, mixed=True)
    # Rounding logits of 10,000 to bf16 may change which is largest: only the loss stays near.
    assert distance(found[0], wanted[0]) < BF16_LOSS
    assert found[1].isfinite().all() and found[2].isfinite().all()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("upstream", [1 / 41, 65536.0, -3.0])
def test_gradients_follow_the_scale_of_what_comes_after(short_chunks, upstream, mixed):
    given = tensors(70, 384, ignored=[5])
    limits = {"loss": BF16_LOSS, "gradient": BF16_GRADIENT} if mixed else {}
    found = in_pieces(*given, upstream, mixed=mixed)
    assert_close(found, by_definition(*given, upstream), **limits)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("of_hidden", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_weight", [torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_what_they_belong_to(of_hidden, of_weight, mixed):
    hidden, weight, labels = tensors(40, 384)
    hidden = hidden.detach().to(of_hidden).requires_grad_()
    weight = weight.detach().to(of_weight).requires_grad_()
    found = in_pieces(hidden, weight, labels, mixed=mixed)
    assert (found[1].dtype, found[2].dtype) == (of_hidden, of_weight)
    wanted = by_definition(hidden, weight, labels)
    assert_close(found, wanted, loss=BF16_LOSS, gradient=BF16_GRADIENT)


def test_a_tied_weight_gets_both_gradients(short_chunks):
    source = torch.Generator().manual_seed(0)
    table = torch.randn(384, 16, generator=source)
    ids = torch.randint(384, (70,), generator=source)
    labels = ids.roll(-1)

    def gradient(weight, loss):
        weight.requires_grad_()
        loss(F.embedding(ids, weight).tanh(), weight, labels).backward()
        return weight.grad

    def plain(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    wanted = gradient(table.double(), plain)
    assert distance(gradient(table.clone(), linear_cross_entropy), wanted) < FP32
    of_the_head = tensors(70, 384)[1].detach()  # and the embedding's part is not nothing
    assert distance(of_the_head, wanted) > 0.1


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(short_chunks, frozen):
    given = tensors(70, 384)
    wanted = by_definition(*given)
    given[frozen].requires_grad_(False)
    found = in_pieces(*given)
    assert found[1 + frozen] is None
    assert distance(found[2 - frozen], wanted[2 - frozen]) < FP32


def test_the_loss_is_the_same_without_gradients(short_chunks):
    given = tensors(70, 384)
    with torch.no_grad():
        loss = linear_cross_entropy(*given)
    assert not loss.requires_grad
    assert torch.equal(loss, in_pieces(*given)[0])


def test_gradients_add_up_over_several_calls(short_chunks):
    hidden, weight, labels = tensors(96, 384)
    wanted = by_definition(hidden, weight, labels)
    for part, part_labels in zip(hidden.split(48), labels.split(48), strict=True):
        linear_cross_entropy(part, weight, part_labels).backward()
    assert distance(weight.grad, wanted[2]) < FP32 and distance(hidden.grad, wanted[1]) < FP32


def test_the_inputs_stay_as_they_are(short_chunks):
    given = tensors(70, 384, ignored=[4])
    before = [x.detach().clone() for x in given]
    in_pieces(*given)
    for one, other in zip(given, before, strict=True):
        assert torch.equal(one.detach(), other)


def test_a_second_derivative_is_refused():
    hidden, weight, labels = tensors(5, 384)
    loss = linear_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    loss = linear_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


# -- memory and kernels ---------------------------------------------------------------------------


class _Made(TorchDispatchMode):
    """The shapes of the tensors that were made, and of the results of matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes, self.products = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.shapes.append(tuple(result.shape))
            if function is torch.ops.aten.mm.default:
                self.products.append(tuple(result.shape))
        return result

    def largest(self):
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("mixed", [False, True])
def test_never_are_all_logits_held(monkeypatch, mixed):
    monkeypatch.setattr(room, "CHUNK_BYTES", {"cpu": 4 * 1000 * 64})
    given = tensors(1024, 1000)
    with _Made() as made:
        in_pieces(*given, mixed=mixed)
    assert made.largest() == 64 * 1000  # of 1024 * 1000
    with _Made() as made:
        in_pieces(*given, mixed=mixed, function=lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    assert made.largest() == 1024 * 1000


def test_nothing_is_computed_twice(short_chunks):
    """A chunk's logits, its hidden gradients and its part of the weight's: three products."""
    given = tensors(96, 1000)
    with _Made() as made:
        in_pieces(*given)
    assert made.products == 3 * [(32, 1000), (32, 16), (1000, 16)]


@pytest.mark.parametrize("trained", ["hidden", "weight", "neither"])
def test_nothing_is_computed_that_nobody_asked_for(short_chunks, trained):
    hidden, weight, labels = tensors(96, 1000)
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    with _Made() as made:
        linear_cross_entropy(hidden, weight, labels)
    more = {"hidden": [(32, 16)], "weight": [(1000, 16)], "neither": []}[trained]
    assert made.products == 3 * [(32, 1000), *more]


class _AsIfOnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU: what is decided by device can be seen without one."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("vocabulary, padded", [(1000, 1024), (1024, 1024), (7, 64), (65, 128)])
def test_on_a_gpu_the_products_are_aligned_and_the_result_is_the_same(
    short_chunks, vocabulary, padded
):
    hidden, weight, labels = tensors(70, vocabulary, ignored=[0, 40])
    with torch.no_grad():
        weight -= 1  # logits about 16 below 0, where a padding of 0 would take all the odds
        hidden += 1
    wanted = by_definition(hidden, weight, labels)
    pretended = hidden.detach().as_subclass(_AsIfOnCuda).requires_grad_()
    with _Made() as made:
        found = in_pieces(pretended, weight, labels)
    assert (32, padded) in made.products and (padded, 16) in made.products
    # Terms of one sign, of which little is left: 10 times the usual rounding.
    assert_close([x.as_subclass(torch.Tensor) for x in found], wanted, gradient=10 * FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows, vocabulary", [(1, 384), (100, 1000), (9000, 50257)])
def test_it_equals_the_plain_loss_on_a_gpu(rows, vocabulary, mixed):
    given = [x.detach().cuda() for x in tensors(rows, vocabulary, ignored=range(1, rows, 7))]
    given = [given[0].requires_grad_(), given[1].requires_grad_(), given[2]]
    limits = {"loss": BF16_GRADIENT, "gradient": BF16_GRADIENT} if mixed else {}
    found = in_pieces(*given, mixed=mixed, device="cuda")
    assert_close(found, by_definition(*given), **limits)


@pytest.mark.gpu
def test_on_a_gpu_it_takes_less_memory_than_the_logits():
    given = [x.detach().cuda() for x in tensors(2**15, 50257)]
    given = [given[0].requires_grad_(), given[1].requires_grad_(), given[2]]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    in_pieces(*given, mixed=True, device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**15 * 50257


# -- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_as_one_graph_it_is_the_same(short_chunks, backend, mixed):
    torch._dynamo.reset()
    given = tensors(70, 1000, ignored=[0, 40])
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False, backend=backend)
    limits = {"loss": BF16_LOSS, "gradient": BF16_GRADIENT} if mixed else {}
    found = in_pieces(*given, 1 / 41, mixed=mixed, function=compiled)
    assert_close(found, by_definition(*given, 1 / 41), **limits)


def made_when_compiled(given):
    """Return the operators of the compiled graph, and the largest tensor among their results."""
    torch._dynamo.reset()
    operators, sizes = [], []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            operators.append(str(node.target))
            made = node.meta.get("val")
            each = made if isinstance(made, list) else [made]
            sizes.extend(of.numel() for of in each if isinstance(of, torch.Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False, backend=backend)
    in_pieces(*given, function=compiled)
    return operators, max(sizes)


def test_compiled_one_chunk_is_part_of_the_graph():
    operators, _ = made_when_compiled(tensors(512, 1000))
    assert operators.count("aten.mm.default") == 3
    assert "gpt2_pretraining.loss_and_gradients.default" not in operators


def test_compiled_several_chunks_are_one_operator(monkeypatch):
    """Which then keeps no part of one chunk while it is at the next."""
    monkeypatch.setattr(room, "CHUNK_BYTES", {"cpu": 4 * 1000 * 64})
    monkeypatch.setattr(room, "_compiled", lambda: (room._losses_and_error, room._add_))
    given = tensors(512, 1000)
    operators, largest = made_when_compiled(given)
    assert operators.count("gpt2_pretraining.loss_and_gradients.default") == 1
    assert "aten.mm.default" not in operators and largest == 1000 * 16
    hidden, weight, labels = (x.detach() for x in given)
    with _Made() as made:
        room._loss_and_gradients(hidden, weight, labels, 1000, (True, True), True)
    assert made.products == 8 * [(64, 1000), (64, 16), (1000, 16)]
    assert made.largest() == 64 * 1000


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("laid_out", ["by rows", "by columns"])
def test_the_operator_is_what_it_says_it_is(monkeypatch, short_chunks, trained, dtype, laid_out):
    monkeypatch.setattr(room, "_compiled", lambda: (room._losses_and_error, room._add_))
    hidden, weight, labels = (x.detach() for x in tensors(70, 384))
    if laid_out == "by columns":
        hidden = hidden.t().contiguous().t()
    given = (hidden.to(dtype), weight.to(dtype), labels, 384, trained, True)
    torch.library.opcheck(room._loss_and_gradients_apart, given)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_with_its_own_kernels_and_a_padded_head(short_chunks, dtype):
    torch._dynamo.reset()
    hidden, weight, labels = tensors(70, 1000, ignored=[0, 40])
    head = F.pad(weight.detach().to(dtype), (0, 0, 0, 24))
    given = (hidden.detach().to(dtype), head, labels, 1000, (True, True), True)
    found = room._loss_and_gradients_apart(*given)
    limits = {} if dtype == torch.float32 else {"loss": BF16_LOSS, "gradient": BF16_GRADIENT}
    assert_close(found, by_definition(hidden, weight, labels), **limits)


@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("because", ["no_grad", "both are frozen"])
def test_compiled_without_gradients_the_loss_is_the_same(monkeypatch, short_chunks, rows, because):
    torch._dynamo.reset()
    monkeypatch.setattr(room, "_compiled", lambda: (room._losses_and_error, room._add_))
    given = tensors(rows, 1000)
    wanted = by_definition(*given)[0]
    if because == "both are frozen":
        given = [x.detach() for x in given]
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    with torch.set_grad_enabled(because != "no_grad"):
        assert distance(compiled(*given), wanted) < FP32


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [20, 100])  # one chunk, and an operator for several
def test_compiled_on_a_gpu_it_is_the_same(short_chunks, rows):
    torch._dynamo.reset()
    given = [x.detach().cuda() for x in tensors(rows, 1000, ignored=[0, 14])]
    given = [given[0].requires_grad_(), given[1].requires_grad_(), given[2]]
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False)
    found = in_pieces(*given, mixed=True, device="cuda", function=compiled)
    assert_close(found, by_definition(*given), loss=BF16_LOSS, gradient=BF16_GRADIENT)
