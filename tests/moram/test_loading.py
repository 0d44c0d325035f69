"""What a load or a save must not do, and in which modes it works."""

import re

import pytest
import torch
from tiny_models import (
    CONFIG,
    WEIGHTS,
    Mlp,
    fill_values,
    language_model,
    small_config,
    trained_mlp,
)
from torch import nn

import moram
from moram import MoRAMLinear, adapters


def test_a_models_own_folder_is_refused(tmp_path):
    model = language_model()
    model.save_pretrained(tmp_path)
    moram.inject(model, small_config())
    message = (
        f"directory must not be a model's own, got {tmp_path}, which holds config.json: with an "
        "adapter's files beside it the model could not be loaded; save into another folder"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.save(model, tmp_path)
    assert not (tmp_path / CONFIG).exists() and not (tmp_path / WEIGHTS).exists()


def test_adapters_of_two_injections_are_saved_together(tmp_path):
    model, x = Mlp().eval(), torch.randn(4, 8)
    moram.inject(model, small_config(targets=("up",), exclude=("down",)))
    moram.inject(model, small_config(targets=("down",)))
    fill_values(model)
    moram.save(model, tmp_path)
    fresh = Mlp().eval()
    about = moram.load(fresh, tmp_path)
    assert (about["settings"]["targets"], about["settings"]["exclude"]) == (["up", "down"], [])
    assert torch.equal(fresh(x), model(x))
    moram.save(fresh, tmp_path)


def test_a_bare_layer_is_loaded_into_a_bare_layer_alone(tmp_path):
    torch.manual_seed(0)
    layer = MoRAMLinear(8, 6, config=small_config())
    fill_values(layer)
    moram.save(layer, tmp_path)
    linear = nn.Linear(8, 6)
    linear.load_state_dict(layer.base_layer.state_dict())
    message = (
        "model must hold the adapted Linear, got a Linear itself; load into "
        "MoRAMLinear.from_linear(model)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        moram.load(linear, tmp_path)
    assert repr(linear) == "Linear(in_features=8, out_features=6, bias=True)"
    twin = MoRAMLinear.from_linear(linear, small_config())
    moram.load(twin, tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), layer(x))
    with pytest.raises(ValueError, match="model must hold adapters, got a MoRAMLinear itself"):
        moram.eject(twin)


def test_a_base_full_of_nan_is_another_base(tmp_path):
    moram.save(trained_mlp(), tmp_path)
    model = Mlp()
    with torch.no_grad():
        model.up.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer up holds other weights than the model"):
        moram.load(model, tmp_path)


def test_loading_draws_nothing_from_the_global_state(tmp_path):
    moram.save(trained_mlp(), tmp_path)
    before = torch.get_rng_state()
    moram.load(Mlp(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("act", ["inject", "load", "grow"])
def test_what_is_made_in_inference_mode_can_be_trained(tmp_path, act):
    moram.save(trained_mlp(), tmp_path)
    model = trained_mlp() if act == "grow" else Mlp()
    with torch.inference_mode():
        if act == "inject":
            moram.inject(model, small_config(targets=("up", "down")))
        elif act == "load":
            moram.load(model, tmp_path)
        else:
            moram.grow(model)
            moram.grow(model, 3)
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for p in moram.parameters(model))
    moram.grow(model)
    assert not any(t.is_inference() for a in adapters(model).values() for t in a.bank.buffers())


def test_under_vmap_the_torch_backend_says_what_to_do_and_auto_does_it():
    model, x = trained_mlp(), torch.randn(3, 4, 8)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    for adapter in adapters(model).values():
        adapter.backend = "torch"
    message = (
        "backend='torch' cannot run under the transforms of torch.func (vmap, grad, jvp); use "
        'backend="reference", or "auto", which takes it there'
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.func.vmap(model)(x)


def test_torch_func_differentiates_through_auto():
    model, x = trained_mlp(), torch.randn(4, 8)
    values = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(values)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)
