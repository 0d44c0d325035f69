"""Layers that own their base or share their input give the numbers of those that do not."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

import moram
from moram import MoRAMConfig, MoRAMLinear
from moram_kernels import SelfActivation, fused_ops, retrieve, retrieve_linear, sharing
from moram_kernels.triton_backend import launcher

ROWS, WIDTH, OUT = 70, 48, 40
ACTIVATION = SelfActivation(4, 0.3, 0.2)


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


def bank(frozen, current, seed, out=OUT):
    sizes = ((frozen, WIDTH), (frozen, out), (current, WIDTH), (current, out))
    return tuple(draw(*size, seed=seed + i, scale=0.3) for i, size in enumerate(sizes))


class Block(nn.Module):
    """q, k and v of different sizes that read one tensor; k can be made to read another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, out) for out in (40, 24, 24))
        self.shift = 0.0

    def forward(self, x):
        k = self.k_proj(x + self.shift if self.shift else x)
        return torch.cat([self.q_proj(x), k, self.v_proj(x)], dim=-1)


def adapted(share_inputs, backend="triton", **settings):
    block = Block()
    names = ("q_proj", "k_proj", "v_proj")
    config = MoRAMConfig(
        atoms_per_task=3, top_k=4, temperature=0.3, targets=names, backend=backend, **settings
    )
    generator = torch.Generator().manual_seed(1)
    moram.inject(block, config, share_inputs=share_inputs, generator=generator)
    for seed in range(2):
        for i, layer in enumerate(moram.adapters(block).values()):
            values = layer.bank.current_values
            values.data.copy_(draw(*values.shape, seed=10 * seed + i))
        if not seed:
            moram.grow(block, generator=generator)
    return block


def outcome(block, x):
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    output = block(x)
    output.backward(draw(*output.shape, seed=7))
    grads = [p.grad for p in block.parameters() if p.requires_grad]
    for p in block.parameters():
        p.grad = None
    return [output.detach(), x.grad, *grads]


@pytest.fixture
def launches(monkeypatch):
    """Names of the shared launches, in order."""
    seen, start = [], launcher.start

    def record(kernel, *args, **meta):
        if kernel.fn.__name__ == "_shared_score_kernel":
            seen.append(kernel.fn.__name__)
        return start(kernel, *args, **meta)

    monkeypatch.setattr(launcher, "start", record)
    return seen


@pytest.fixture
def split(monkeypatch):
    """Every plan is a split one, as for a large bank."""
    plan = functools.partial(fused_ops.plan, path="split-dense")
    monkeypatch.setattr(fused_ops, "plan", plan)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sharing_gives_the_same_bits_in_one_launch(training, split, launches):
    x = draw(2, ROWS // 2, WIDTH)
    alone = outcome(adapted(False).train(training), x)
    assert launches == []
    together = outcome(adapted(True).train(training), x)
    assert len(launches) == 1
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_sharing_waits_for_the_plan(launches):
    # At this size a bank's own path is the resident or decode kernel.
    with torch.no_grad():
        adapted(True).eval()(draw(3, WIDTH))
    assert launches == []


def test_layers_that_read_different_tensors_stop_sharing(split, launches):
    block, alone = adapted(True), adapted(False)
    block.shift = alone.shift = 0.5
    for seed in range(3):
        x = draw(ROWS, WIDTH, seed=seed)
        assert torch.equal(block(x), alone(x))
    assert len(launches) == 1
    assert not block.q_proj.shared.enabled


def test_a_changed_input_is_scored_again(split, launches):
    block, alone = adapted(True), adapted(False)
    x = draw(ROWS, WIDTH)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(block(x), alone(x))
            x.mul_(1.5)
    assert len(launches) == 2


def test_inference_mode_shares(split, launches):
    block, alone = adapted(True).eval(), adapted(False).eval()
    with torch.inference_mode():
        for seed in range(2):
            x = draw(ROWS, WIDTH, seed=seed)
            assert torch.equal(block(x), alone(x))
    assert len(launches) == 2


def update_keys(block):
    block.k_proj.bank.current_keys.data.add_(0)
    with torch.no_grad():
        block.k_proj.bank.current_keys.mul_(2)


def grow(block):
    moram.grow(block, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("change", [update_keys, grow])
def test_a_changed_bank_is_scored_again(change, split):
    block, alone = adapted(True), adapted(False)
    x = draw(ROWS, WIDTH)
    with torch.no_grad():
        assert torch.equal(block.q_proj(x), alone.q_proj(x))
        change(block)
        change(alone)
        assert torch.equal(block.k_proj(x), alone.k_proj(x))
        assert torch.equal(block.v_proj(x), alone.v_proj(x))


def test_a_bank_without_atoms_shares_nothing(split, launches):
    x, empty = draw(ROWS, WIDTH), tuple(t[:0] for t in bank(4, 4, seed=1))
    banks = [bank(20, 5, seed=0), empty]
    assert sharing.shared_scores(x, banks, ACTIVATION, training=True, backend="triton") is None
    assert launches == []


def test_dropout_and_the_torch_backend_share_nothing(split, launches):
    x = draw(ROWS, WIDTH)
    adapted(True, dropout=0.5)(x)
    shared, alone = adapted(True, "torch"), adapted(False, "torch")
    assert torch.equal(shared(x), alone(x))
    assert launches == []


def test_a_sharing_model_can_be_copied_and_saved(split):
    block, x = adapted(True), draw(ROWS, WIDTH)
    expected = block(x)
    twin = copy.deepcopy(block)
    assert twin.q_proj.shared.layers == (twin.q_proj, twin.k_proj, twin.v_proj)
    assert torch.equal(twin(x), expected)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_shared_scores_are_the_products(count, split):
    banks = [bank(20 + 13 * i, 5 - 2 * i, seed=4 * i) for i in range(count)]
    x = draw(ROWS, WIDTH, seed=99)
    found = sharing.shared_scores(x, banks, ACTIVATION, training=True, backend="triton")
    assert len(found) == count
    for (keys, _, current, _), scores in zip(banks, found, strict=True):
        expected = x.double() @ torch.cat([keys, current]).double().T
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_one_bank_or_four_are_not_shared():
    x, banks = draw(ROWS, WIDTH), [bank(9, 3, seed=i) for i in range(4)]
    for some in (banks[:1], banks):
        assert sharing.shared_scores(x, some, ACTIVATION, training=True, backend="triton") is None


@pytest.mark.parametrize("path", ["resident", "split-dense", "split-gather"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_retrieve_linear_is_retrieve_onto_the_linear(path, bias, monkeypatch):
    monkeypatch.setattr(fused_ops, "plan", functools.partial(fused_ops.plan, path=path))
    width, out = 64, 32
    weight, shift = draw(out, width, seed=1, scale=0.1), draw(out, seed=2) if bias else None
    sizes = ((9, width), (9, out), (5, width), (5, out))
    tables = [draw(*size, seed=3 + i, scale=0.3) for i, size in enumerate(sizes)]
    grad, results = draw(2, 20, out, seed=8), []
    for owns in (True, False):
        x = draw(2, 20, width).requires_grad_()
        keys, values, *current = (t.clone() for t in tables)
        for tensor in current:
            tensor.requires_grad_()
        call = {"current_keys": current[0], "current_values": current[1], "training": True}
        call["backend"] = "triton"
        if owns:
            output = retrieve_linear(x, weight, shift, keys, values, ACTIVATION, **call)
        else:
            base = nn.functional.linear(x, weight, shift)
            output = retrieve(x, keys, values, ACTIVATION, residual=base, **call)
        output.backward(grad)
        results.append([output.detach(), x.grad, *(t.grad for t in current)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # A bias is added to the update here, and to the base there.
    assert bias or torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("path", ["resident", "split-dense", "split-gather", "decode"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_retrieve_linear_rounds_update_and_sum_once_each(path, bias, monkeypatch):
    """In 16 bits: half a step of every weighted score, of update and bias, and of the sum."""
    monkeypatch.setattr(fused_ops, "plan", functools.partial(fused_ops.plan, path=path))
    sizes = ((20, 64), (32, 64), (32,), (14, 64), (14, 32))
    drawn = [draw(*size, seed=i, scale=0.3).bfloat16() for i, size in enumerate(sizes)]
    x, weight, shift, keys, values = drawn
    call = {"activation": ACTIVATION, "training": path != "decode", "backend": "triton"}
    found = retrieve_linear(x, weight, shift if bias else None, keys, values, **call)
    x, weight, shift, keys, values = (t.double() for t in drawn)
    call |= {"backend": "reference"}
    update = retrieve(x, keys, values, **call) + (shift if bias else 0)
    written = retrieve(x, keys, torch.eye(14, dtype=torch.float64), **call)
    exact = x @ weight.T + update
    half = torch.finfo(torch.bfloat16).eps / 2
    allowed = half * (exact.abs() + update.abs() + written.abs() @ values.abs())
    allowed = 1.02 * allowed + 1e-4
    error = (found.double() - exact).abs()
    assert (error <= allowed).all(), (error / allowed).max()
    assert error.max() > 0.1 * allowed.max()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 2),
        torch.zeros(ROWS, 9, dtype=torch.float64),
        torch.zeros(9, ROWS).t(),
        "scores",
    ],
    ids=["shape", "dtype", "layout", "kind"],
)
def test_scores_that_cannot_be_are_refused(wrong):
    keys, values, *current = bank(6, 3, seed=0)
    call = {"current_keys": current[0], "current_values": current[1], "scores": wrong}
    with pytest.raises((TypeError, ValueError), match=r"^scores must be"):
        retrieve(draw(ROWS, WIDTH), keys, values, ACTIVATION, backend="triton", **call)


@pytest.mark.parametrize("rows", [8, 40])
def test_a_weight_of_another_height_is_refused(rows):
    keys, values, *_ = bank(6, 3, seed=0)
    weight = torch.zeros(rows + 1, WIDTH)
    with pytest.raises(ValueError, match=r"^residual must be"):
        retrieve_linear(draw(ROWS, WIDTH), weight, None, keys, values, ACTIVATION, backend="triton")


def test_a_layer_owns_a_plain_base_only(monkeypatch):
    owned = []
    monkeypatch.setattr(
        "moram.layers.moram.retrieve_linear", lambda x, *a, **k: owned.append(1) or x
    )
    config = MoRAMConfig(atoms_per_task=3, backend="triton")
    x = draw(5, WIDTH)

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(WIDTH, OUT)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    watched = nn.Linear(WIDTH, OUT)
    watched.register_full_backward_pre_hook(lambda module, grads: None)
    for base in (Scaled(WIDTH, OUT), hooked, watched):
        layer = MoRAMLinear.from_linear(base, config)
        assert torch.equal(layer(x), base(x))
    assert owned == []
    MoRAMLinear.from_linear(nn.Linear(WIDTH, OUT), config)(x)
    assert owned == [1]
