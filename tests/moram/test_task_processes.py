"""Protection where several processes learn together, and beside quantised bases."""

import pytest
import shard_worker
import torch
from task_support import PROTECT, batches_of, seeded
from tiny_models import language_model, small_config

import moram
from moram import adapters


@pytest.mark.parametrize("name", ["protected_ddp", "protected_shards"])
def test_two_processes_protect_what_one_with_all_batches_does(name, tmp_path):
    torch.multiprocessing.spawn(shard_worker.run, args=(name, str(tmp_path)), nprocs=2)
    expected = shard_worker.protect(shard_worker.protected_learner())
    assert all(gain is not None for gain in expected["gains"])
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found.keys() >= {"gains", "output"} and len(found) == len(expected)
        assert found.pop("gains") == pytest.approx(expected["gains"], rel=1e-4)
        for path, tensors in found.items():
            path = path.removeprefix("module.")
            torch.testing.assert_close(tensors, expected[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_a_quantised_base_learns_under_protection(kind):
    import bitsandbytes as bnb

    model = language_model()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            plain = getattr(layer.self_attn, name)
            settings = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
            linear = getattr(bnb.nn, kind)(
                plain.in_features, plain.out_features, bias=False, **settings
            )
            linear.load_state_dict(plain.state_dict())
            setattr(layer.self_attn, name, linear.to("cpu"))
    moram.inject(model, small_config(**PROTECT), generator=seeded())
    for task in range(2):
        with moram.task(model, batches_of(task), generator=seeded(task)) as atoms:
            optimizer = torch.optim.AdamW(atoms, lr=0.02)
            for batch in batches_of(task):
                model(**batch).loss.backward()
                optimizer.step()
            if task:
                banks = [a.bank for a in adapters(model).values()]
                assert all(bank.guard is not None for bank in banks)
    for adapter in adapters(model).values():
        bank = adapter.bank
        assert type(adapter.base_layer).__name__ == kind
        assert bank.sketch.rows.shape == (6, adapter.in_features)
        # What the second task's keys read of the first one's main directions is nothing.
        assert bank.num_frozen == 4 and torch.isfinite(bank.current_keys).all()
