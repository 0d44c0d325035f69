"""However a Trainer computes a step, tasks are those of its plain way."""

import pytest
import torch
from peft_support import banks, by_peft, peft_model, save_base
from trainer_support import TWO, make_trainer, score

import moram
from moram.trainer import train_tasks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def learned(base, out, **changes):
    """A model after two tasks in a run, and the scores."""

    def make(model, data, folder):
        settings = {"per_device_train_batch_size": 4, "save_strategy": "no"} | changes
        return make_trainer(model, data, folder, **settings)

    model = peft_model(base)
    if "gradient_checkpointing" in changes:
        # Before transformers 5, a Trainer forgets it, and the reentrant kind needs it.
        model.enable_input_require_grads()
    return model, train_tasks(model, TWO, make, score, out).matrix


@pytest.fixture(scope="module")
def plainly(base, tmp_path_factory):
    return learned(base, tmp_path_factory.mktemp("plain"))


WAYS = {
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("way", WAYS)
def test_tasks_learned_another_way_are_those_learned_plainly(base, plainly, tmp_path, way):
    model, matrix = learned(base, tmp_path, **WAYS[way])
    expected, wanted = plainly
    for row, other in zip(matrix, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    found = banks(model)
    torch.testing.assert_close(found, banks(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(banks(by_peft(base, tmp_path / "adapters")), found, rtol=0, atol=0)


def test_bfloat16_computes_and_leaves_the_atoms_in_float32(base, plainly, tmp_path):
    model, matrix = learned(base, tmp_path, bf16=True)
    assert {p.dtype for p in moram.parameters(model)} == {torch.float32}
    for row, other in zip(matrix, plainly[1], strict=True):
        # A few steps' rounding to eight bits, and not none.
        assert row == pytest.approx(other, rel=2e-3) and row != other
