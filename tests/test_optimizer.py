"""Muon's updates are torch's own, of the right matrices; a skipped one leaves no trace."""

import copy
import io
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from runs import same
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import optimizer
from pipeline.optimizer import Muon, muon, orthogonalized
from pipeline.sections import OptimizerSection

RATE, DECAY, BETAS, EPSILON = 0.02, 0.1, (0.8, 0.95), 1e-7


def small_model(**config) -> GPT2LMHeadModel:
    """A GPT-2 of 2 layers x 32, the same each time."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    dropout = {f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")}
    return GPT2LMHeadModel(GPT2Config(**sizes | ends | dropout | config))


def made(model: GPT2LMHeadModel, **section) -> Muon:
    arguments = SimpleNamespace(
        learning_rate=RATE, weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
    )  # fmt: skip
    return muon(model, OptimizerSection(name="muon", **section), arguments)


def gradients(model: GPT2LMHeadModel, seed: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=source) for p in model.parameters()]


def step(model, chosen, seed: int | float, scale: float = 1.0) -> None:
    """Make an update with random gradients, or with gradients that are all NaN."""
    found = gradients(model, 0 if math.isnan(seed) else seed)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        parameter.grad = gradient * (seed if math.isnan(seed) else scale)
    chosen.step()


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def everything(model, chosen) -> list:
    return copy.deepcopy([weights(model), chosen.state_dict()])


def kind(name: str) -> str:
    """Say by its name alone what a parameter of GPT-2 is."""
    if name.endswith("attn.c_attn.weight"):
        return "qkv"
    if name.endswith(("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")):
        return "matrix"
    return "embedding" if name.split(".")[1] in ("wte", "wpe") else "vector"


@pytest.fixture
def in_bf16(monkeypatch):
    """As on a device that multiplies it; a CPU without can do so too, slowly."""
    monkeypatch.setattr("pipeline.machine.has_bf16", lambda device: True)


@pytest.fixture
def in_fp32(monkeypatch):
    monkeypatch.setattr("pipeline.machine.has_bf16", lambda device: False)


# -- the update -----------------------------------------------------------------------------------


class Oracle:
    """torch's Muon on each matrix, of which `c_attn` holds three, and its AdamW on the rest."""

    def __init__(self, model, *, matrix_rate=1.0, momentum=0.95, newton_schulz_steps=5):
        self.parts = {}
        for name, weight in model.named_parameters():
            pieces = weight.detach().clone().chunk(3, 1) if kind(name) == "qkv" else [weight]
            self.parts[name] = [torch.nn.Parameter(p.detach().clone()) for p in pieces]
        of = {k: [] for k in ("qkv", "matrix", "embedding", "vector")}
        for name, pieces in self.parts.items():
            of[kind(name)] += pieces
        plain = [
            {"params": of["embedding"], "weight_decay": DECAY},
            {"params": of["vector"], "weight_decay": 0.0},
        ]
        self.optimizers = [
            torch.optim.AdamW(plain, lr=RATE, betas=BETAS, eps=EPSILON, fused=True),
            torch.optim.Muon(
                of["qkv"] + of["matrix"], lr=RATE * matrix_rate, weight_decay=DECAY,
                momentum=momentum, ns_steps=newton_schulz_steps, adjust_lr_fn="match_rms_adamw",
            ),
        ]  # fmt: skip

    def step(self, found: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make an update, and return all weights by name."""
        for (name, pieces), gradient in zip(self.parts.items(), found, strict=True):
            cut = gradient.chunk(3, 1) if kind(name) == "qkv" else [gradient]
            for piece, its in zip(pieces, cut, strict=True):
                piece.grad = its.contiguous()
        for one in self.optimizers:
            one.step()
        return {name: torch.cat([*pieces], -1).detach() for name, pieces in self.parts.items()}


@pytest.mark.parametrize(
    "section", [{}, {"matrix_rate": 3.0, "momentum": 0.8, "newton_schulz_steps": 3}]
)
def test_several_updates_are_those_of_torch(in_bf16, section):
    model = small_model()
    chosen, oracle = made(model, **section), Oracle(model, **section)
    rate = RATE * section.get("matrix_rate", 1.0)
    for seed in range(4):
        step(model, chosen, seed)
        expected = oracle.step(gradients(model, seed))
        for name, weight in model.named_parameters():
            # bf16 has 8 bits; an element of an orthogonal matrix is at most 1.2.
            moved = rate * 0.2 * math.sqrt(max(weight.shape)) * 1.2 * (seed + 1)
            exact = kind(name) in ("embedding", "vector")
            torch.testing.assert_close(
                weight, expected[name], rtol=0, atol=0 if exact else moved / 64
            )  # fmt: skip
            if not exact:
                far = (weight - expected[name]).norm() / (rate * 0.2 * weight.numel() ** 0.5)
                assert far < 0.02 * (seed + 1), name


def test_an_update_has_the_root_mean_square_of_adamws(in_fp32):
    model = small_model()
    before = weights(model)
    step(model, made(model), 1)
    for (name, after), old in zip(model.named_parameters(), before, strict=True):
        if kind(name) in ("qkv", "matrix"):
            moved = (after - old * (1 - RATE * DECAY)).square().mean().sqrt().item()
            assert moved == pytest.approx(0.2 * RATE, rel=0.25), name


def singular(matrices: torch.Tensor, steps: int = 5):
    """Return, in fp64, what the polynomial makes of the singular values, and what was made."""
    found = orthogonalized(matrices, steps=steps)
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True).clamp(min=1e-7)
    expected = values
    for _ in range(steps):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    return values, expected, found.double(), left @ torch.diag_embed(expected) @ right


@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize("shape", [(3, 1, 7), (2, 16, 16), (1, 64, 64), (4, 32, 96), (2, 8, 200)])
def test_singular_values_go_through_the_polynomial(in_fp32, shape, steps):
    torch.manual_seed(1)
    _, _, found, expected = singular(torch.randn(shape) * 10, steps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["in_bf16", "in_fp32"])
@pytest.mark.parametrize("shape", [(1, 7), (16, 16), (64, 64), (32, 96), (64, 256), (5, 500)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_singular_values_end_near_one(request, precision, shape, size):
    """All but those that were a hundredth of the whole and less, as squares have them."""
    request.getfixturevalue(precision)
    torch.manual_seed(2)
    matrices = torch.randn(3, *shape) * size
    values, _, found, _ = singular(matrices)
    ended = torch.linalg.svdvals(found)
    large = (values > 0.01).sum(1)
    assert found.isfinite().all() and ended.max() < 1.3 and large.min() >= min(shape) * 0.8
    for row, count in zip(ended, large, strict=True):
        assert ((row > 0.6).sum() >= count).item()
    if shape[0] < shape[1]:
        assert ended.min() > 0.6


@pytest.mark.parametrize("precision", ["in_bf16", "in_fp32"])
def test_a_matrix_that_lacks_directions_gains_none(request, precision):
    request.getfixturevalue(precision)
    torch.manual_seed(3)
    for rows, columns in [(24, 24), (24, 60)]:
        low = torch.randn(2, rows, 4) @ torch.randn(2, 4, columns)
        found = orthogonalized(low, steps=5).double()
        values = torch.linalg.svdvals(found)
        assert found.isfinite().all()
        assert values[:, :4].min() > 0.6 and values.max() < 1.3
        left = torch.linalg.svd(low.double()).U[:, :, :4]
        assert (found - left @ (left.mT @ found)).norm() / found.norm() < 0.5
    zero = torch.zeros(2, 8, 20)
    assert torch.equal(orthogonalized(zero, steps=5).float(), zero)
    mixed = orthogonalized(torch.stack([zero[0], torch.randn(8, 20)]), steps=5)
    assert mixed[0].norm() == 0 and torch.linalg.svdvals(mixed[1].float()).min() > 0.6


@pytest.mark.parametrize("at_once", [1, 3])
def test_batches_of_matrices_change_nothing(in_fp32, monkeypatch, at_once):
    """`BATCH_BYTES` bounds memory; a matrix goes its own way in any batch."""
    ends, counts = [], []
    iterate = orthogonalized

    def counted(matrices, *, steps):
        counts.append(len(matrices))
        return iterate(matrices, steps=steps)

    monkeypatch.setattr(optimizer, "orthogonalized", counted)
    for size in (2**28, at_once * 32 * 32 * 4):
        monkeypatch.setattr(optimizer, "BATCH_BYTES", size)
        model = small_model()
        chosen = made(model)
        for seed in range(2):
            step(model, chosen, seed)
        ends.append(everything(model, chosen))
    # 2 layers, each q, k, v and a projection of 32 x 32, and two of 32 x 128.
    assert counts[:4] == [8, 4, 8, 4]
    assert max(counts[4:]) == at_once and sum(counts[4:]) == 2 * (8 + 4)
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_q_k_and_v_do_not_know_of_each_other(in_fp32):
    """Orthogonalised together, a large gradient of one would leave the others no room."""
    ends = []
    for scale in (1.0, 1000.0):
        model = small_model()
        chosen = made(model)
        for parameter, gradient in zip(model.parameters(), gradients(model, 5), strict=True):
            parameter.grad = gradient
        fused = model.transformer.h[0].attn.c_attn.weight
        fused.grad[:, 32:64] *= scale
        chosen.step()
        ends.append(fused.detach().chunk(3, 1))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# -- which parameter where ------------------------------------------------------------------------


def named_groups(model, chosen) -> list[tuple[dict, list[str]]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        ({k: v for k, v in group.items() if k != "params"}, [names[id(p)] for p in group["params"]])
        for group in chosen.param_groups
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_and_in_the_right_one(tied):
    model = small_model(tie_word_embeddings=tied)
    groups = named_groups(model, made(model, matrix_rate=2.5, momentum=0.9, newton_schulz_steps=4))
    held = sorted(itertools.chain(*(names for _, names in groups)))
    assert held == sorted(name for name, _ in model.named_parameters())
    assert "lm_head.weight" in held or tied
    for (settings, names), expected in zip(
        groups, ["embedding", "vector", "qkv", "matrix"], strict=True
    ):
        assert {kind(n) for n in names if n != "lm_head.weight"} == {expected}
        assert "lm_head.weight" not in names or expected == "embedding"
        is_matrix = expected in ("qkv", "matrix")
        assert settings["parts"] == {"qkv": 3, "matrix": 1}.get(expected, 0)
        assert settings["lr"] == (RATE * 2.5 if is_matrix else RATE)
        assert settings["weight_decay"] == (0.0 if expected == "vector" else DECAY)
        assert settings["betas"] == BETAS and settings["eps"] == EPSILON
        if is_matrix:
            assert settings["momentum"] == 0.9 and settings["newton_schulz_steps"] == 4
    assert len(groups[2][1]) == 2 and len(groups[3][1]) == 6


@pytest.mark.parametrize(
    "frozen", [("embedding",), ("embedding", "vector"), ("qkv", "matrix"), ("matrix", "vector")]
)
def test_what_is_frozen_is_left_out_and_stays(in_fp32, frozen):
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind(name) not in frozen)
    chosen, before = made(model), weights(model)
    held = list(itertools.chain(*(names for _, names in named_groups(model, chosen))))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained) and all(kind(name) not in frozen for name in held)
    for parameter, gradient in zip(model.parameters(), gradients(model, 1), strict=True):
        parameter.grad = gradient if parameter.requires_grad else None
    chosen.step()
    for (name, after), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(after, old) == (kind(name) in frozen), name


def test_a_parameter_without_a_gradient_is_left_alone(in_fp32):
    model, other = small_model(), small_model()
    chosen, whole = made(model), made(other)
    step(other, whole, 1)
    before = weights(model)
    without = ("transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight")
    without += ("transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias")
    found = zip(model.named_parameters(), gradients(model, 1), strict=True)
    for (name, parameter), gradient in found:
        parameter.grad = None if name in without else gradient
    chosen.step()
    for (name, after), old, with_all in zip(
        model.named_parameters(), before, weights(other), strict=True
    ):
        if name in without:
            assert torch.equal(after, old) and not chosen.state.get(after)
        else:
            torch.testing.assert_close(after, with_all, rtol=0, atol=1e-6)


# -- updates that are not made --------------------------------------------------------------------


@pytest.mark.parametrize("seed", [math.nan, 7])
def test_a_device_that_is_told_so_makes_no_update(in_fp32, seed):
    """No weight and no moment of it changes, also not by decay, whatever the gradient."""
    model = small_model()
    chosen = made(model)
    assert chosen._step_supports_amp_scaling
    for number in range(2):
        step(model, chosen, number)
    before = everything(model, chosen)
    chosen.found_inf = torch.tensor(1.0)
    step(model, chosen, seed)
    assert same(weights(model), before[0])
    assert same(chosen.state_dict(), before[1])


def test_a_first_update_that_is_not_made_leaves_nothing(in_fp32):
    model = small_model()
    chosen, before = made(model), weights(model)
    chosen.found_inf = torch.tensor(1.0)
    step(model, chosen, math.nan)
    assert same(weights(model), before)
    moments = [state[name] for state in chosen.state.values() for name in state]
    assert not any(moment.any() for moment in moments)


def test_a_device_that_is_told_nothing_is_wrong_updates_as_always(in_fp32):
    ends = []
    for flag in (None, torch.tensor(0.0)):
        model = small_model()
        chosen = made(model)
        if flag is not None:
            chosen.found_inf = flag
        for number in range(3):
            step(model, chosen, number)
        ends.append(everything(model, chosen))
    assert same(ends[0][1]["state"], ends[1][1]["state"])
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_scale_of_gradients_is_divided_out(in_fp32):
    """A power of two: nothing is rounded."""
    ends = []
    for scale in (None, 1024.0):
        model = small_model()
        chosen = made(model)
        if scale is not None:
            chosen.grad_scale = torch.tensor(scale)
        for number in range(3):
            step(model, chosen, number, scale or 1.0)
        ends.append(everything(model, chosen))
    assert same(*ends)


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_a_gradient_scaler_works_with_it(in_fp32, unscaled_before):
    """As fp16 has it: what overflows is skipped, with and without clipping."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    model, plain = small_model(), small_model()
    chosen, without = made(model), made(plain)

    def scaled(number, size):
        scaler.scale(torch.ones(()))
        found = gradients(model, number)
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient * size
        if unscaled_before:
            scaler.unscale_(chosen)
        scaler.step(chosen)
        scaler.update()

    scaled(0, 256.0)
    step(plain, without, 0)
    for one, other in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    before = everything(model, chosen)
    scaled(1, math.inf)
    assert same(everything(model, chosen), before) and scaler.get_scale() == 128.0
    scaled(2, 128.0)
    step(plain, without, 2)
    for one, other in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_skips_an_update_without_the_host_waiting_for_it():
    model = small_model().cuda()
    chosen = made(model)

    def update(flag, value):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        chosen.found_inf = flag
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            chosen.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    made_flag, skipped = torch.tensor(0.0).cuda(), torch.tensor(1.0).cuda()
    update(made_flag, 1.0)
    before = everything(model, chosen)
    update(skipped, math.nan)
    assert same(everything(model, chosen), before)
    update(made_flag, 1.0)
    assert not any(itertools.starmap(torch.equal, zip(weights(model), before[0], strict=True)))


# -- its state ------------------------------------------------------------------------------------


def test_a_state_put_back_goes_on_to_the_last_bit(in_fp32):
    model = small_model()
    chosen = made(model, matrix_rate=2.0)
    for number in range(3):
        step(model, chosen, number)
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "optimizer": chosen.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    again = small_model()
    again.load_state_dict(saved["weights"])
    other = made(again, matrix_rate=2.0)
    other.load_state_dict(saved["optimizer"])
    assert same(other.state_dict(), chosen.state_dict())
    for number in range(3, 6):
        step(model, chosen, number)
        step(again, other, number)
    assert same(everything(model, chosen), everything(again, other))


def test_the_state_is_a_moment_per_matrix_and_two_per_other_weight(in_fp32):
    model = small_model()
    chosen = made(model)
    step(model, chosen, 1)
    for name, parameter in model.named_parameters():
        state = chosen.state[parameter]
        shaped = [key for key, value in state.items() if value.shape == parameter.shape]
        expected = ["exp_avg", "exp_avg_sq"]
        expected = ["momentum_buffer"] if kind(name) in ("qkv", "matrix") else expected
        assert shaped == expected, name


def test_a_schedule_scales_all_groups(in_fp32):
    model = small_model()
    chosen = made(model, matrix_rate=4.0)
    scheduler = LambdaLR(chosen, lambda number: 1 / (number + 1))
    peaks = [RATE, RATE, RATE * 4, RATE * 4]
    for number in range(3):
        rates = [group["lr"] for group in chosen.param_groups]
        assert rates == pytest.approx([peak / (number + 1) for peak in peaks])
        before = weights(model)
        step(model, chosen, number)
        fused = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"]
        old = before[[n for n, _ in model.named_parameters()].index(
            "transformer.h.0.attn.c_attn.weight"
        )]  # fmt: skip
        moved = (fused - old * (1 - rates[2] * DECAY)).square().mean().sqrt().item()
        assert moved == pytest.approx(0.2 * rates[2], rel=0.25)
        scheduler.step()


def test_the_groups_are_there_again_when_an_update_fails(in_fp32, monkeypatch):
    model = small_model()
    chosen = made(model)
    groups = chosen.param_groups

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(model, chosen, 1)
    assert chosen.param_groups is groups and len(groups) == 4


@pytest.mark.parametrize("precision", ["in_bf16", "in_fp32"])
def test_training_learns_a_text_by_heart(request, precision):
    request.getfixturevalue(precision)
    model = small_model()
    chosen = made(model)
    ids = torch.arange(64).reshape(4, 16) * 7 % 61
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        chosen.zero_grad()
        loss.backward()
        chosen.step()
    assert losses[0] == pytest.approx(math.log(61), rel=0.1) and losses[-1] < 0.3
