"""What `moram.grow` does to all adapters of a model."""

import pytest
import torch
from test_inject import assert_only_atoms_train
from tiny_models import fill_values, language_model, small_config

import moram
from moram import adapters


def test_grow_freezes_and_appends_in_every_adapter():
    model = language_model()
    moram.inject(model, small_config())
    fill_values(model)
    current = {p: a.bank.current_keys.detach().clone() for p, a in adapters(model).items()}
    moram.grow(model)
    for path, adapter in adapters(model).items():
        assert (adapter.bank.num_frozen, adapter.bank.num_current) == (4, 4)
        assert torch.equal(adapter.bank.frozen_keys[:4], current[path])
        assert not torch.equal(adapter.bank.current_keys, current[path])
    moram.grow(model, 7)
    sizes = {(a.bank.num_frozen, a.bank.num_current) for a in adapters(model).values()}
    assert sizes == {(8, 7)}
    assert_only_atoms_train(model, adapters(model))


def test_grow_without_adapters_is_refused():
    message = r"model has no MoRAM adapters; call moram\.inject\(model, config\) first"
    with pytest.raises(ValueError, match=message):
        moram.grow(language_model())
