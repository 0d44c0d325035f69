"""`moram.task`: five lines around any loop, with and without protection."""

import copy
import re
import warnings

import pytest
import torch
from tiny_models import (
    Mlp,
    fill_values,
    hf_clip,
    images,
    language_model,
    open_clip_model,
    small_config,
    token_ids,
)
from torch import nn

import moram
from moram import adapters
from moram import sketch as sketches
from moram.task import begin_task

PROTECT = {"protect": 0.9, "protect_size": 6, "top_k": 4, "value_scale": 8.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batches_of(task, count=3):
    """Batches of a task whose tokens come from its own part of the vocabulary; some are padding."""
    found = []
    for number in range(count):
        generator = seeded(100 * task + number)
        ids = torch.randint(1 + 20 * task, 20 + 20 * task, (2, 6), generator=generator)
        mask = torch.ones(2, 6, dtype=torch.int64)
        mask[1, 4:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return found


def learn(model, task, batches=None, steps=None, generator=None, **more):
    """Learn a task the way a user does."""
    batches = batches_of(task) if batches is None else batches
    with moram.task(model, batches, generator=generator, **more) as atoms:
        optimizer = torch.optim.AdamW(atoms, lr=0.02)
        for batch in batches[:steps]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def llama(**settings):
    model = language_model()
    moram.inject(model, small_config(**settings), generator=seeded())
    return model


def tensors(model):
    found = {}
    for path, adapter in adapters(model).items():
        bank = adapter.bank
        parts = {**bank.state_dict(), "learned": torch.tensor(bank.learned)}
        if bank.sketch is not None:
            parts |= {"rows": bank.sketch.rows, "total": bank.sketch.total}
        if bank.guard is not None:
            parts |= {"basis": bank.guard[0], "gain": torch.tensor(bank.guard[1])}
        found |= {f"{path}.{name}": tensor.detach().clone() for name, tensor in parts.items()}
    return found


def assert_same(model, other):
    first, second = tensors(model), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_without_protect_it_is_inject_train_grow_train():
    model, plain = llama(), llama()
    for task in range(3):
        learn(model, task, generator=seeded(task))
        atoms = moram.grow(plain, generator=seeded(task)) if task else moram.parameters(plain)
        optimizer = torch.optim.AdamW(atoms, lr=0.02)
        for batch in batches_of(task):
            plain(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for path, adapter in adapters(model).items():
        bank, other = adapter.bank, adapters(plain)[path].bank
        assert bank.num_frozen == 8 and bank.sketch is None and bank.guard is None
        for name, tensor in other.state_dict().items():
            assert torch.equal(bank.state_dict()[name], tensor), name


def test_without_protect_no_batches_are_needed():
    model = llama()
    for _ in range(2):
        with moram.task(model) as atoms:
            assert [id(p) for p in atoms] == [id(p) for p in moram.parameters(model)]
    assert {a.bank.num_frozen for a in adapters(model).values()} == {4}


@pytest.mark.parametrize("protect", [None, 0.9])
def test_an_exception_leaves_the_task_open_and_entering_again_goes_on(protect):
    model = llama(**PROTECT | {"protect": protect})
    learn(model, 0)
    with pytest.raises(KeyboardInterrupt), moram.task(model, batches_of(1)) as atoms:
        fill_values(model)
        raise KeyboardInterrupt
    before = tensors(model)
    with moram.task(model, batches_of(1)) as again:
        assert [id(p) for p in again] == [id(p) for p in atoms]
        assert tensors(model).keys() == before.keys()
        for name, tensor in tensors(model).items():
            assert torch.equal(tensor, before[name]), name
    assert {a.bank.num_frozen for a in adapters(model).values()} == {4}
    assert all(a.bank.learned and a.bank.guard is None for a in adapters(model).values())


def test_protected_keys_are_blind_to_what_earlier_tasks_filled():
    model = llama(**PROTECT)
    learn(model, 0)
    with moram.task(model, batches_of(1)):
        for adapter in adapters(model).values():
            basis = adapter.bank.sketch.basis(0.9)
            keys = adapter.bank.acting_keys().detach()
            torch.testing.assert_close(
                keys @ basis.T, torch.zeros(4, len(basis)), atol=1e-5, rtol=0
            )
            assert keys.abs().max() > 0


@pytest.mark.parametrize("protect", [None, 0.9])
@pytest.mark.parametrize("when", ["between", "inside"])
def test_a_saved_model_goes_on_like_an_unbroken_one(tmp_path, protect, when):
    settings = PROTECT | {"protect": protect}
    unbroken, broken = llama(**settings), llama(**settings)
    for model in (unbroken, broken):
        learn(model, 0, generator=seeded(1))
        learn(model, 1, generator=seeded(2))
    if when == "inside":
        for model in (unbroken, broken):
            begin_task(model, batches_of(2), generator=seeded(3))
            fill_values(model, 4)
    moram.save(broken, tmp_path)
    broken = language_model()
    moram.load(broken, tmp_path)
    assert_same(broken, unbroken)
    for model in (unbroken, broken):
        learn(model, 2, generator=seeded(3))
    assert_same(broken, unbroken)


def test_sketches_take_half_in_bfloat16_and_nothing_where_they_are_left_out(tmp_path):
    model = llama(**PROTECT)
    learn(model, 0)
    full = moram.save(model, tmp_path)
    half = moram.save(model, tmp_path, sketches="bfloat16")
    # Two blocks, each with one input of q, k and v and one of o: four sketches of 6 x 32.
    assert (full.sketches, half.sketches) == (4 * 6 * 32 * 4, 4 * 6 * 32 * 2)
    fresh = language_model()
    moram.load(fresh, tmp_path)
    learn(fresh, 1)
    none = moram.save(model, tmp_path, sketches=False)
    assert none.sketches == 0 and none.atoms == full.atoms
    assert str(none).endswith("; without their sketches the next task cannot be protected")
    fresh = language_model()
    moram.load(fresh, tmp_path)
    message = (
        "protect must know the inputs of all earlier tasks, got none for "
        "model.layers.0.self_attn.q_proj: they were learned without protect, or saved with "
        "sketches=False; to go on without protection, use moram.task(model, batches, protect=False)"
    )
    before = tensors(fresh)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        learn(fresh, 1)
    assert before.keys() == tensors(fresh).keys()
    learn(fresh, 1, protect=False)
    assert {a.bank.num_frozen for a in adapters(fresh).values()} == {4}
    with pytest.raises(ValueError, match="sketches must be float32, bfloat16 or False, got 'no'"):
        moram.save(model, tmp_path, sketches="no")


def test_a_checkpoint_of_trained_atoms_that_does_not_say_so_is_a_finished_task(tmp_path):
    model = llama()
    fill_values(model)
    moram.save(model, tmp_path)
    state = model.state_dict()
    other = llama()
    other.load_state_dict(state)
    with moram.task(other):
        assert {a.bank.num_frozen for a in adapters(other).values()} == {4}
    fresh = llama()
    fresh.load_state_dict(llama().state_dict())
    with moram.task(fresh):
        assert {a.bank.num_frozen for a in adapters(fresh).values()} == {0}


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
    for size in (sketches.PASS_BYTES, 4 * 32 * 32, 1):
        monkeypatch.setattr(sketches, "PASS_BYTES", size)
        model = llama(**PROTECT)
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        before = len(calls)
        with moram.task(model, batches_of(0)):
            pass
        found.append(tensors(model))
        calls[before:] = [len(calls) - before]
    # Three batches, on entering and on leaving, for one moment or for all four of them at a time.
    assert calls == [2 * 3, 4 * 2 * 3, 4 * 2 * 3]
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
