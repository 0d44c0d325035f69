"""Bases of four and eight bits under a Trainer, and what bitsandbytes does to them on some CPUs."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel, get_peft_model
from peft_support import config
from task_support import batches_of
from tiny_models import assert_equal, language_model, small_config
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from trainer_support import TWO, make_trainer, score
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import moram
from moram import adapters
from moram.trainer import train_tasks

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
QUANTISED = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "4 bits twice": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "torchao": TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    language_model(**WIDTHS).save_pretrained(folder)
    return folder


def quantised(base, kind="4 bits"):
    options = {"quantization_config": QUANTISED[kind], "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(base, **options).eval()


def four_bits(model):
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def weight_of(linear):
    """What quantisation leaves of a weight."""
    weight = linear.weight
    if isinstance(linear, bnb.nn.Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(linear, bnb.nn.Linear8bitLt):
        # The first call moves the scales.
        scales = linear.state.SCB if weight.SCB is None else weight.SCB
        return weight.data * scales[:, None] / 127
    # Of a plain tensor this is itself.
    return weight.dequantize().clone()


@torch.no_grad()
def weights(model):
    """Of the Linears, adapted or not, in the model's order."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {path.replace(".base_layer", ""): weight_of(m) for path, m in found}


def by_inject(model, folder):
    moram.inject(model, small_config())


def by_load(model, folder):
    other = quantised(folder)
    moram.inject(other, small_config())
    moram.save(other, folder / "adapters")
    moram.load(model, folder / "adapters")


def by_peft(model, folder):
    get_peft_model(model, config())


def by_transformers(model, folder):
    model.add_adapter(config())


# Scales of blocks are in bfloat16 while a weight is repacked, and may be in 8 bits afterwards.
@pytest.mark.parametrize(("kind", "error"), [("4 bits", 2**-8), ("4 bits twice", 2**-6)])
@pytest.mark.parametrize("enter", [by_inject, by_load, by_peft, by_transformers])
def test_no_entry_leaves_four_bits_repacked_and_gradients_pass(base, enter, kind, error):
    model = quantised(base, kind)
    before = weights(model)
    for linear in four_bits(model):
        # What a first score does on CPUs with AVX512-BF16.
        linear.support_avx512bf16_for_cpu = True
        linear.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(
            linear.weight.data, linear.weight.quant_state
        )
    enter(model, base)
    assert not any(linear.support_avx512bf16_for_cpu for linear in four_bits(model))
    for found, expected in zip(weights(model).values(), before.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=error, atol=0)
    batch = batches_of(0)[0]
    with torch.no_grad():
        model.eval()(**batch)
    assert not any(
        getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
        for linear in four_bits(model)
    )
    model(**batch).loss.backward()
    # Fresh keys get none while the values are zero.
    assert all(a.bank.current_values.grad.any() for a in adapters(model).values())


def trained(model, tmp_path):
    """The adapter of a base after two tasks by `Trainer`, and the scores."""
    torch.manual_seed(0)
    before = weights(model)
    model = get_peft_model(model, config())
    found = train_tasks(model, TWO, make_trainer, score, tmp_path)
    assert_equal(list(weights(model).values()), list(before.values()))
    return model, found.matrix


def dequantised(base, kind):
    """A float32 model with the weights that quantisation leaves."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for path, weight in weights(quantised(base, kind)).items():
        model.get_submodule(path).weight.data = weight
    return model.eval()


# bitsandbytes' eight bits quantise the inputs, too.
ERRORS = {"4 bits": 1e-3, "4 bits twice": 1e-3, "8 bits": 2e-2, "torchao": 1e-3}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_trainer_teaches_a_quantised_base_what_it_teaches_its_dequantised_weights(
    base, tmp_path, kind
):
    model, matrix = trained(quantised(base, kind), tmp_path / "coarse")
    _, expected = trained(dequantised(base, kind), tmp_path / "fine")
    for row, wanted in zip(matrix, expected, strict=True):
        assert row == pytest.approx(wanted, rel=ERRORS[kind])
    loaded = PeftModel.from_pretrained(quantised(base, kind), tmp_path / "coarse" / "adapters")
    ids = batches_of(0)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
