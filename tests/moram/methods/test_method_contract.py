"""What every method that trains must keep to; each one's own equations are in test_baselines."""

from dataclasses import replace

import pytest
import torch
from test_methods import SETTINGS, TRAINED
from tiny_models import assert_equal, language_model
from toy_language import accuracy, learn_stages, stages_of

from moram import adapters
from moram.layers import AdapterLinear
from moram.methods import METHODS, make_method
from moram.methods.train import Stage, TaskTrainer
from moram.processes import Processes

MORAM = {"temperature": 0.3, "threshold": 0.1, "value_scale": 8.0}
CASES = {
    "moram": ("moram", MORAM),
    "lora": ("lora", {}),
    "o-lora": ("o-lora", {"lambda2": 0.01}),
    "inf-lora": ("inf-lora", {"epsilon": 0.7, "end": 0.8}),
    "lora-stack": ("lora-stack", {}),
    "lora-stack-protected": ("lora-stack", {"protect": 0.9, "protect_size": 6}),
    "tree-lora": ("tree-lora", {}),
    "hide-lora": ("hide-lora", {}),
    "ewc": ("ewc", {"gamma": 0.9}),
    "moe-lora": ("moe-lora", {"experts": 2, "top_k": 3}),
    "moe-lora-frozen-router": ("moe-lora", {"freeze_router": True}),
    "codyra": ("codyra", {"max_kappa": 0.15}),
    "task-lora": ("task-lora", {}),
    "joint": ("joint", {}),
}
RANK = 4
STACKS = ("o-lora", "inf-lora", "lora-stack", "lora-stack-protected", "task-lora")
SHORT = replace(SETTINGS, epochs=2)
every_case = pytest.mark.parametrize("case", CASES)
# 2 layers of q, k, v and o: 8 modules, 32 inputs each, A has 4 rows.
MODULES, A_NUMBERS = 8, 8 * RANK * 32


def build(case, seed=0, **more):
    name, settings = CASES[case]
    return make_method(name, **({"rank": RANK, "seed": seed} | settings | more))


class Stop(Exception):
    """Training was interrupted."""


def learn(method, model, data, settings=SHORT, **more):
    return learn_stages(method, model, data, settings, **more)


def states(model):
    """Copies of all tensors of all adapters."""
    return {
        path: {name: t.clone() for name, t in adapter.adapter_state().items()}
        for path, adapter in adapters(model, AdapterLinear).items()
    }


def test_every_method_that_trains_is_under_the_contract():
    # Those for CLIP alone keep to it in test_xtail_runs and test_xtail_resume.
    language = {name for name, method in METHODS.items() if method.needs != "clip"}
    assert {name for name, _ in CASES.values()} == language - {"zero-shot", "in-context"}


@every_case
def test_the_base_model_is_bitwise_unchanged(case):
    model, method = language_model(), build(case)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learn(method, model, stages_of(method))
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert before.keys() <= after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    assert not any("base_layer" in n for n, p in model.named_parameters() if p.requires_grad)


@every_case
def test_losses_fall_and_the_task_just_trained_is_learned(case):
    # A head that starts at 0.02 is too weak to tell the words apart, and it stays frozen.
    # Six times as many steps shrink gates six times as often.
    more = {"max_kappa": 0.02} if case == "codyra" else {}
    model, method, seen = language_model(initializer_range=0.15), build(case, **more), []
    data = stages_of(method)

    def note(index, trainer, losses):
        assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
        seen.append(accuracy(model, data[index][1]))

    learn(method, model, data, replace(SETTINGS, epochs=12), note=note)
    assert seen == [100.0] * len(method.stages(2))


def kept_rows(case, state, scale):
    """The rows of an adapter that no later task may change, once its task has ended."""
    if case == "moram":
        new = state["bank.current_keys"], scale * state["bank.current_values"]
        old = state["bank.frozen_keys"], state["bank.frozen_values"]
    elif case == "codyra":
        assert len(state["gate"]) == 0
        return [state["frozen_A"], state["frozen_B"].T]
    else:
        new, old = [state["lora_A"], state["lora_B"]], [state["frozen_A"], state["frozen_B"]]
        if case in STACKS:
            new = [t.unsqueeze(0) for t in new]
        if case == "moe-lora-frozen-router":
            new, old = [*new, state["router"]], [*old, state["frozen_router"]]
    return [torch.cat(pair) for pair in zip(old, new, strict=True)]


@pytest.mark.parametrize("case", ["moram", *STACKS, "moe-lora", "moe-lora-frozen-router", "codyra"])
def test_what_a_task_left_frozen_is_bitwise_unchanged_by_later_tasks(case):
    model, method, ends = language_model(), build(case), []

    def note(*_):
        ends.append({p: kept_rows(case, s, 8.0) for p, s in states(model).items()})

    learn(method, model, stages_of(method, 3), note=note)
    counts = [[len(next(iter(end[p]))) for p in ends[0]] for end in ends]
    assert all(a < b for a, b in zip(counts[0], counts[2], strict=True))
    for earlier in ends[:2]:
        for path, tensors in earlier.items():
            assert len(ends[-1]) == MODULES
            for tensor, last in zip(tensors, ends[-1][path], strict=True):
                assert torch.equal(last[: len(tensor)], tensor), path
            assert tensors[1].abs().max() > 0, "the task must have trained something"


@every_case
def test_equal_seeds_give_equal_runs(case):
    ends = []
    for seed in (1, 1, 2):
        method = build(case, seed, dropout=0.1)
        ends.append(states(learn(method, language_model(), stages_of(method))))
    assert_equal(ends[0], ends[1])
    path = next(iter(ends[0]))
    if case == "inf-lora":
        # It draws nothing: its A is computed, its B starts at zero.
        return
    assert any(not torch.equal(ends[2][path][n], t) for n, t in ends[0][path].items())


@every_case
def test_a_run_that_was_saved_within_a_task_goes_on_bit_for_bit(case, tmp_path):
    data = stages_of(build(case), 3)
    method = build(case, dropout=0.1)
    whole = learn(method, language_model(), data)
    expected = states(whole), method.state_dict()

    # Within the second task, or the only stage.
    index = len(data) // 2
    train = data[index][0]
    method, model = build(case, dropout=0.1), language_model()
    learn(method, model, data[:index])
    method.begin_task(model, index, Stage(model, train, SHORT))
    trainer = TaskTrainer(model, method, train, SHORT, index)

    def interrupt(trainer, loss):
        # Within the last epoch.
        if trainer.done == trainer.total - 2:
            raise Stop

    with pytest.raises(Stop):
        trainer.run(interrupt)
    saved = {
        "method": method.state_dict(),
        "adapters": states(model),
        "trainer": trainer.state_dict(),
    }
    torch.save(saved, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    # Another seed: all that was drawn must come from the file.
    method, model = build(case, seed=7, dropout=0.1), language_model()
    method.setup(model)
    for path, adapter in adapters(model, AdapterLinear).items():
        adapter.load_adapter_state(saved["adapters"][path])
    method.load_state_dict(saved["method"])
    trainer = TaskTrainer(model, method, train, SHORT, index)
    trainer.load_state_dict(saved["trainer"])
    trainer.run()
    method.end_task(model, index, Stage(model, train, SHORT))
    learn(method, model, data[index + 1 :], start=index + 1)
    assert_equal((states(model), method.state_dict()), expected)


@every_case
def test_a_model_scored_twice_gives_the_same_logits(case):
    method = build(case, dropout=0.5)
    data = stages_of(method)
    model = learn(method, language_model(), data, replace(SHORT, epochs=1))
    ids, mask, _ = data[0][1].batch(torch.arange(4))
    with torch.no_grad():
        first, second = (model(input_ids=ids, attention_mask=mask).logits for _ in range(2))
    assert not model.training
    assert torch.equal(first, second)


def expected_bytes(case, model, method, tasks):
    """By hand: what is stored after some tasks, each number in 4 bytes."""
    if case == "codyra":
        numbers = sum(
            len(a.frozen_A) * (a.in_features + a.out_features)
            for a in adapters(model, AdapterLinear).values()
        )
        assert numbers < tasks * TRAINED, "some ranks must have been dropped"
        return 4 * numbers
    one = 4 * TRAINED
    if case == "ewc":
        return 3 * one
    if case == "tree-lora":
        # One A a finished task; visits and distances of this task's bandit, 8 bytes each.
        return one + 4 * A_NUMBERS * tasks + 2 * 8 * MODULES * (tasks - 1)
    if case == "lora-stack-protected":
        # In each of 2 layers one sketch for q, k and v and one for o: 6 rows of 32 and a number.
        return tasks * one + 4 * 4 * (6 * 32 + 1)
    if case == "inf-lora":
        rows = [len(memory.rows) for memory in method.memories.values()]
        assert len(rows) == 4 and all(0 < count <= 16 for count in rows)
        return tasks * one + 4 * 32 * sum(rows)
    grown = {"moram": 0, "o-lora": 0, "lora-stack": 0, "task-lora": 0}
    # A row of 32 per expert and module.
    grown |= {"moe-lora": 2 * 32 * MODULES * 4, "moe-lora-frozen-router": 32 * MODULES * 4}
    return tasks * (one + grown[case]) if case in grown else one


@every_case
def test_stored_bytes_grow_as_stated(case):
    model, method, seen = language_model(), build(case), []

    def note(index, *_):
        seen.append((method.stored_bytes(model), expected_bytes(case, model, method, index + 1)))

    learn(method, model, stages_of(method, 3), note=note)
    assert len(seen) == len(method.stages(3))
    assert [found for found, _ in seen] == [expected for _, expected in seen]


@every_case
def test_each_task_trains_as_many_parameters_as_lora_plus_what_is_stated(case):
    more = {
        # 2 experts a task, all their rows of the router trained: 2, 4, then 6.
        "moe-lora": [2 * n * 32 * MODULES for n in (1, 2, 3)],
        "moe-lora-frozen-router": [32 * MODULES] * 3,
        "codyra": [RANK * MODULES] * 3,
        # A is computed.
        "inf-lora": [-A_NUMBERS] * 3,
    }
    model, method, seen = language_model(), build(case), []
    data = stages_of(method, 3)

    def note(index, trainer, losses):
        seen.append(sum(p.numel() for p in trainer.parameters))

    learn(method, model, data, replace(SHORT, epochs=1), note=note)
    expected = [TRAINED + extra for extra in more.get(case, [0] * 3)]
    assert seen == expected[: len(data)]


@every_case
def test_micro_batches_change_nothing_but_rounding(case):
    ends = []
    for micro in (None, 1, 3):
        method, model = build(case), language_model().double()
        method.setup(model)
        model.double()
        data = stages_of(method)
        settings = replace(SHORT, micro_batch=micro, lr=1e-3)
        learn(method, model, data, settings, start=0)
        ends.append(states(model))
    for other in ends[1:]:
        for path, state in ends[0].items():
            for name, tensor in state.items():
                # The loss itself is float32, and Adam turns its rounding into a part of the rate.
                torch.testing.assert_close(other[path][name], tensor, rtol=1e-4, atol=2e-5)


@every_case
def test_only_a_lora_per_task_needs_the_task_id(case):
    assert build(case).needs_task_id == (case == "task-lora")


def run_process(rank, world, folder):
    """One of the processes that train together: every case, one after the other."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world
    )
    ends = {}
    for case in CASES:
        method = build(case)
        settings = replace(SHORT, lr=1e-3, epochs=1)
        model = learn(method, language_model(), stages_of(method), settings, processes=Processes())
        ends[case] = states(model)
    torch.save(ends, f"{folder}/rank{rank}.pt")
    # Who leaves first closes connections that the other may still read.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_learn_the_same_as_one(tmp_path):
    torch.multiprocessing.spawn(run_process, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert_equal(first, second)
    for case in CASES:
        method = build(case)
        alone = states(
            learn(method, language_model(), stages_of(method), replace(SHORT, lr=1e-3, epochs=1))
        )
        for path, state in alone.items():
            for name, tensor in state.items():
                torch.testing.assert_close(
                    first[case][path][name], tensor, rtol=1e-3, atol=1e-4, msg=f"{case} {path}"
                )
