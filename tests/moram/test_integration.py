"""MoRAM inside what users train with: checkpointing, autocast, torch.compile, DDP, quantisation."""

import subprocess
import sys

import ddp_worker
import pytest
import torch
from tiny_models import fill_values, language_model, small_config, token_ids
from torch import nn

import moram
from moram import MoRAMLinear, adapters


def adapted_llama(tasks=2, **changes):
    model = language_model("Llama", **changes)
    generator = torch.Generator().manual_seed(0)
    moram.inject(model, small_config(), generator=generator)
    for task in range(tasks):
        if task:
            moram.grow(model, generator=generator)
        fill_values(model, task)
    return model


def language_loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_gradient_checkpointing_gives_the_same_gradients():
    model = adapted_llama().train()
    ids = token_ids()
    language_loss(model, ids).backward()
    expected = gradients(model)
    assert len(expected) == 16
    calls = []
    q_proj = model.model.layers[1].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    language_loss(model, ids).backward()
    assert len(calls) == 2, "the layer must have been computed again"
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        assert torch.equal(actual[name], grad), name


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@LOW
def test_autocast_runs_the_base_low_and_the_atoms_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    layer = MoRAMLinear(16, 8, config=small_config(), generator=generator)
    with torch.no_grad():
        layer.bank.current_values.normal_(generator=generator)
    x = torch.randn(5, 16, generator=generator)
    grad = torch.randn(5, 8, generator=generator).to(dtype)
    plain = layer(x)
    plain.backward(grad.float())
    expected = gradients(layer)
    with torch.autocast("cpu", dtype=dtype):
        base = nn.functional.linear(x, layer.weight, layer.bias)
        output = layer(x)
    output.backward(grad)
    assert output.dtype == base.dtype == dtype
    update = plain - nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(output, (base.float() + update).to(dtype))
    actual = gradients(layer)
    assert actual.keys() == expected.keys() and len(expected) == 2
    for name, found in actual.items():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-6)


@LOW
def test_autocast_trains_a_language_model(dtype):
    model = adapted_llama().train()
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=dtype):
        loss = language_loss(model, token_ids())
    loss.backward()
    assert seen == [dtype]
    found = gradients(model)
    assert len(found) == 16
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found.values())


@LOW
def test_half_precision_base_trains_float32_atoms(dtype):
    model = language_model().to(dtype)
    moram.inject(model, small_config())
    fill_values(model)
    output = model(input_ids=token_ids(), use_cache=False).logits
    assert output.dtype == dtype
    language_loss(model.train(), token_ids()).backward()
    grads = gradients(model)
    assert len(grads) == 16
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in grads.values())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_growing_compiles_no_new_graph_and_keeps_eager_outputs(training):
    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    graphs = []

    def counting(module, example_inputs):
        graphs.append(module)
        return aot_eager(module, example_inputs)

    model = adapted_llama(tasks=1).train(training)
    ids = token_ids()
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for task in range(7):
        if task:
            moram.grow(model)
            fill_values(model, task)
        with torch.set_grad_enabled(training):
            logits = compiled(input_ids=ids, use_cache=False).logits
            eager = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, eager, rtol=1e-5, atol=1e-5)
        if training:
            logits.square().sum().backward()
            actual = gradients(model)
            eager.square().sum().backward()
            expected = gradients(model)
            assert actual.keys() == expected.keys() and len(expected) == 16
            for name, grad in expected.items():
                torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1, f"task {task} compiled again"


def test_ddp_gradients_are_those_of_the_joint_batch(tmp_path):
    """Two processes, a task boundary between two wraps, frozen atoms equal at the end."""
    torch.multiprocessing.spawn(ddp_worker.run, args=(2, str(tmp_path)), nprocs=2)
    expected = ddp_worker.learn(ddp_worker.build(), lambda model: model, slice(None))
    # 4 tensors in each of 4 steps, then frozen keys and values of two adapters.
    assert len(expected) == 4 * 4 + 4
    for rank in range(2):
        actual = torch.load(tmp_path / f"rank{rank}.pt")
        assert len(actual) == len(expected)
        for tensor, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-6)
    # The values of the first step of a task get the only gradient: keys see zero values then.
    assert all(expected[i].abs().max() > 0 for i in (1, 3, 4, 5, 6, 7))


def check_wrapped_quantised(linear):
    """A quantised Linear is wrapped as it is; its atoms add, learn and eject."""
    weight = linear.weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    base = linear(x).detach()
    layer = MoRAMLinear.from_linear(linear, small_config())
    assert layer.base_layer is linear and layer.weight is weight
    assert torch.equal(layer(x), base)
    bank = layer.bank
    assert bank.current_keys.dtype == torch.float32 and bank.current_keys.device.type == "cpu"
    with torch.no_grad():
        bank.current_values.fill_(0.5)
    output = layer(x)
    weights = layer.mixture_weights(x)
    scores = x @ bank.current_keys.T
    # All values are 0.5 times value_scale 2, so every output gets sum_i w_i s_i.
    expected = base + (weights * scores).sum(-1, keepdim=True)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert x.grad.abs().max() > 0
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
        "bank.current_keys",
        "bank.current_values",
    }
    assert bank.current_keys.grad.abs().max() > 0


def quantised_by_torchao(seed=0):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48))
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model[0].weight) not in (torch.Tensor, nn.Parameter)
    return model


def test_torchao_int8_linear_is_wrapped_and_not_copied():
    check_wrapped_quantised(quantised_by_torchao()[0])


def test_torchao_model_is_injected_saved_and_loaded(tmp_path):
    model = quantised_by_torchao()
    report = moram.inject(model, small_config(targets=("0",)))
    assert report.num_trainable == 4 * (64 + 48)
    fill_values(model)
    moram.save(model, tmp_path)
    fresh = quantised_by_torchao()
    moram.load(fresh, tmp_path)
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes_linear_is_wrapped_and_not_copied(kind):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    settings = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    linear = getattr(bnb.nn, kind)(64, 48, **settings)
    linear.load_state_dict(plain.state_dict())
    check_wrapped_quantised(linear.to("cpu"))


def test_injection_on_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        model = language_model()
    report = moram.inject(model, small_config())
    assert report.num_trainable == 2 * 4 * (4 * 32 + 32 + 16 + 16 + 32)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {t.device.type for n, t in tensors if ".bank." in n} == {"meta"}
    moram.grow(model)
    assert {a.bank.num_frozen for a in adapters(model).values()} == {4}


def test_a_state_dict_can_be_assigned_to_a_layer_on_the_meta_device():
    layer = MoRAMLinear(8, 6, config=small_config())
    layer.bank.grow(4)
    with torch.no_grad():
        layer.bank.current_values.normal_()
    other = MoRAMLinear(8, 6, config=small_config(), device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert {t.device.type for t in (*other.parameters(), *other.buffers())} == {"cpu"}
    x = torch.randn(3, 8)
    assert torch.equal(other(x), layer(x))


def test_a_layer_on_the_meta_device_knows_its_count_and_the_shape_of_its_output():
    layer = MoRAMLinear(8, 6, config=small_config())
    layer.bank.grow(4)
    layer.to("meta")
    assert {t.device.type for t in layer.bank.buffers()} == {"meta"}
    assert layer.bank.num_frozen == 4
    output = layer(torch.empty(2, 3, 8, device="meta"))
    assert (output.shape, output.dtype, output.device.type) == ((2, 3, 6), torch.float32, "meta")


def modules_after(statement):
    code = f"import sys\n{statement}\nprint(chr(10).join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_moram_imports_no_optional_package():
    heavy = {"triton", "transformers", "open_clip", "peft", "torchvision", "matplotlib"}
    heavy |= {"accelerate", "bitsandbytes", "torchao", "numpy.testing", "tqdm"}
    after_torch = modules_after("import torch")
    after_moram = modules_after("from moram import *")
    assert "moram.inject" in after_moram
    assert (after_moram - after_torch) & heavy == set()
