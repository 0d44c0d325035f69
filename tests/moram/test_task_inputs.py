"""What `moram.task` measures of its batches, and what it refuses of them."""

import copy
import re
import warnings

import pytest
import torch
from task_support import PROTECT, batches_of, learn, llama, seeded, tensors
from tiny_models import (
    Mlp,
    fill_values,
    hf_clip,
    images,
    open_clip_model,
    small_config,
    token_ids,
)
from torch import nn

import moram
from moram import adapters
from moram import inputs as inputs_module
from moram import sketch as sketches

FORMS = {
    "dicts": lambda model, found: found,
    "tuples": lambda model, found: [(b["input_ids"], b["attention_mask"]) for b in found],
    "tensors": lambda model, found: [b["input_ids"] for b in found],
    "function": lambda model, found: lambda: [model(**b) for b in found],
    "loader": lambda model, found: torch.utils.data.DataLoader(found, batch_size=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_come_in_many_forms(form):
    model, found = llama(**PROTECT), batches_of(0)
    masked = form in ("dicts", "function", "loader")
    batches = FORMS[form](model, found)
    with moram.task(model, batches):
        pass
    adapter = next(iter(adapters(model).values()))
    embedded = (
        model.model.layers[0]
        .input_layernorm(model.model.embed_tokens(torch.cat([b["input_ids"] for b in found])))
        .detach()
    )
    keep = torch.cat([b["attention_mask"] for b in found]).bool()
    rows = embedded[keep] if masked else embedded.flatten(0, 1)
    moment = rows.T @ rows / len(rows)
    values = torch.linalg.eigvalsh(moment).flip(0)[:6]
    found_values = adapter.bank.sketch.rows.square().sum(1)
    torch.testing.assert_close(found_values, values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(adapter.bank.sketch.total, moment.trace(), rtol=1e-4, atol=0)


def test_a_mask_function_says_which_places_count():
    model, found = llama(**PROTECT), batches_of(0)
    plain = [{"input_ids": b["input_ids"]} for b in found]
    masks = {id(b["input_ids"]): b["attention_mask"].bool() for b in found}
    with moram.task(model, plain, mask=lambda batch: masks[id(batch["input_ids"])]):
        pass
    other = llama(**PROTECT)
    with moram.task(other, found):
        pass
    first, second = (next(iter(adapters(m).values())).bank.sketch for m in (model, other))
    torch.testing.assert_close(first.total, second.total)


def generator_of(found):
    yield from found


REFUSED = {
    "none": (lambda: None, TypeError, "batches must be given with protect, got None"),
    "consumed": (
        lambda: generator_of(batches_of(0)),
        TypeError,
        "batches must be passed over more than once, got a generator, which the first pass "
        "consumes; give a list, a DataLoader or a function that runs the model",
    ),
    "number": (
        lambda: 3,
        TypeError,
        "batches must be iterable or a function that runs the model, got int",
    ),
    "empty": (list, ValueError, "batches must hold at least one batch, got none"),
    "padding": (
        lambda: [b | {"attention_mask": torch.zeros(2, 6)} for b in batches_of(0)],
        ValueError,
        "batches must hold more than padding, got no place for model.layers.0.self_attn.q_proj",
    ),
    "unreached": (
        lambda: lambda: None,
        ValueError,
        "batches must reach every adapter, got none to "
        + ", ".join(f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo")
        + "; leave what they do not reach out with exclude",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_cannot_be_measured_are_refused_before_training(case):
    build, error, message = REFUSED[case]
    model = llama(**PROTECT)
    entered = []
    with pytest.raises(error, match=f"^{re.escape(message)}$"), moram.task(model, build()):
        entered.append(True)
    assert not entered and not any(a.bank.learned for a in adapters(model).values())


@pytest.mark.parametrize("between", ["unprotected task", "own loop"])
def test_inputs_that_nobody_noted_end_the_protection(between):
    model = llama(**PROTECT)
    learn(model, 0)
    if between == "own loop":
        moram.grow(model)
        fill_values(model)
        moram.grow(model)
    else:
        learn(model, 1, protect=False)
    with pytest.raises(ValueError, match="protect must know the inputs of all earlier tasks"):
        learn(model, 2)
    learn(model, 2, protect=False)


def test_a_layer_without_room_is_named_with_what_is_left():
    model = llama(**PROTECT | {"protect": 0.999999, "protect_size": 31})
    learn(model, 0)
    with pytest.warns(
        UserWarning, match=r"next to nothing to learn in; .* \(\d+ directions, 0\.\d\d%\)"
    ):
        learn(model, 0)


def test_measuring_leaves_modes_and_the_random_state_alone():
    model = llama(**PROTECT).train()
    model.model.norm.eval()
    modes = {path: m.training for path, m in model.named_modules()}
    state = torch.get_rng_state()
    with moram.task(model, batches_of(0)):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: m.training for path, m in model.named_modules()} == modes


def test_bounded_passes_give_the_same_sketches(monkeypatch):
    calls, found = [], []
    for size in (inputs_module.PASS_BYTES, 4 * 32 * 32, 1):
        monkeypatch.setattr(inputs_module, "PASS_BYTES", size)
        model = llama(**PROTECT)
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        before = len(calls)
        with moram.task(model, batches_of(0)):
            pass
        found.append(tensors(model))
        calls[before:] = [len(calls) - before]
    # Three batches, on entering once, on leaving for all four moments or for one at a time.
    assert calls == [3 + 3, 3 + 4 * 3, 3 + 4 * 3]
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


def test_leading_directions_of_wide_moments_are_those_of_the_full_decomposition(monkeypatch):
    rows = torch.randn(300, 200, generator=seeded(), dtype=torch.float64)
    moment = (rows * torch.logspace(0, -2, 200, dtype=torch.float64)).T
    moment = moment @ moment.T
    full_values, full_vectors = sketches.leading(moment, 20)
    monkeypatch.setattr(sketches, "MAX_FULL", 100)
    values, vectors = sketches.leading(moment, 20)
    torch.testing.assert_close(values, full_values, rtol=1e-5, atol=0)
    apart = vectors @ vectors.T - full_vectors @ full_vectors.T
    assert apart.norm() < 1e-2 * full_vectors.shape[1] ** 0.5


def test_examples_bound_the_pass():
    model, calls = llama(**PROTECT | {"protect_examples": 3}), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with moram.task(model, batches_of(0, count=9)):
        calls.clear()
    assert len(calls) == 2


def clip_batches(kind):
    ids = [token_ids(2, 8, seed=seed) for seed in range(2)]
    ids = [t.clamp(max=62) for t in ids]
    if kind == "hf":
        return [{"input_ids": t, "pixel_values": images()} for t in ids]
    return [(images(), t) for t in ids]


@pytest.mark.parametrize("kind", ["hf", "open_clip"])
def test_both_encoders_of_a_clip_are_protected(kind):
    model = hf_clip() if kind == "hf" else open_clip_model()
    moram.inject(model, small_config(**PROTECT))
    for _ in range(2):
        with moram.task(model, clip_batches(kind)):
            fill_values(model)
    banks = [adapter.bank for adapter in adapters(model).values()]
    assert all(bank.sketch is not None and bank.num_frozen == 4 for bank in banks)
    assert len({id(bank.sketch) for bank in banks}) < len(banks)


def checkpointed(model):
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


WRAPS = {
    "checkpointing": checkpointed,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_is_measured_like_the_plain_one(wrap):
    model, plain = llama(**PROTECT), llama(**PROTECT)
    wrapped = WRAPS[wrap](copy.deepcopy(model))
    for each in (plain, wrapped):
        with moram.task(each, batches_of(0)):
            pass
        with moram.task(each, batches_of(1), generator=seeded(3)):
            pass
    for one, other in zip(adapters(plain).values(), adapters(wrapped).values(), strict=True):
        assert torch.equal(one.bank.sketch.rows, other.bank.sketch.rows)
        assert torch.equal(one.bank.current_keys, other.bank.current_keys)


def test_autocast_measures_in_float32():
    model = llama(**PROTECT)
    with torch.autocast("cpu", dtype=torch.bfloat16), moram.task(model, batches_of(0)):
        pass
    assert {a.bank.sketch.rows.dtype for a in adapters(model).values()} == {torch.float32}


def test_a_model_of_any_kind_learns_with_tensors_alone():
    model = Mlp()
    moram.inject(model, small_config(targets=("up", "down"), **PROTECT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            x = [torch.randn(8, 8, generator=seeded(seed)) for _ in range(2)]
            with moram.task(model, x) as atoms:
                optimizer = torch.optim.SGD(atoms, lr=0.1)
                for batch in x:
                    model(batch).square().mean().backward()
                    optimizer.step()
    assert {a.bank.num_frozen for a in adapters(model).values()} == {4}


def test_only_false_turns_protection_off():
    with (
        pytest.raises(ValueError, match=r"protect must be None or False, got 0\.5; set it in"),
        moram.task(llama(), protect=0.5),
    ):
        pass
    with pytest.raises(ValueError, match="model has no MoRAM adapters"), moram.task(Mlp()):
        pass
