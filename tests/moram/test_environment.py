"""`moram env`: what it says is what the libraries and the operator's own rule say."""

import json
import platform
from types import SimpleNamespace

import pytest
import torch
from safetensors import __version__ as safetensors_version

import moram
from moram import environment
from moram.cli import main
from moram_kernels import available_backends
from moram_kernels.api import why_unavailable

X86 = """processor\t: 0
model name\t: Fast CPU @ 3 GHz: new
flags\t\t: fpu sse4_2 avx2 fma avx512f avx512_bf16 amx_tile

processor\t: 1
model name\t: other
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd bf16 sve
"""


@pytest.fixture
def report(capsys):
    assert main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_versions_are_those_that_the_libraries_state(report):
    versions = report["versions"]
    assert list(versions)[:2] == ["python", "moram"]
    assert versions["python"] == platform.python_version()
    assert versions["moram"] == moram.__version__
    assert versions["safetensors"] == safetensors_version
    assert torch.__version__.startswith(versions["torch"])
    assert {"transformers", "open_clip", "accelerate", "numpy"} <= set(versions)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "packages_distributions", lambda: {"torch": ["torch"]})
    assert list(environment.environment()["versions"]) == ["python", "moram", "torch"]


def test_threads_and_instruction_set_are_torchs(report):
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["cpu"]["torch_uses"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        (
            X86,
            "Fast CPU @ 3 GHz: new",
            ["sse4_2", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile"],
        ),
        (ARM, None, ["asimd", "bf16", "sve"]),
        ("", None, None),
    ],
    ids=["x86", "arm", "no_file"],
)
def test_the_processor_is_the_first_of_the_system_s_list(monkeypatch, tmp_path, text, name, flags):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "CPUINFO", file)
    if text:
        file.write_text(text)
    cpu = environment.environment()["cpu"]
    assert cpu["flags"] == flags
    assert cpu["name"] == (name or platform.processor() or platform.machine())


def test_backends_run_or_not_by_the_operator_s_own_rule(report):
    runs = {name for name, answer in report["backends"].items() if answer["runs"]}
    assert runs == set(available_backends())
    for name, answer in report["backends"].items():
        assert answer["reason"] == why_unavailable(name)


def test_a_backend_that_does_not_run_says_why_in_words(monkeypatch, capsys):
    why = "the moon is full; wait"
    monkeypatch.setattr(
        "moram_kernels.api.why_unavailable", lambda name: why if name == "triton" else None
    )
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "backends\n  reference\n    runs: yes\n" in said
    assert said.endswith(f"  triton\n    runs: no\n    reason: {why}\n")


def test_auto_takes_what_the_operator_takes_on_each_device_and_dtype(monkeypatch, report):
    asked = dict.fromkeys(("float32", "bfloat16", "float16"), "torch")
    assert report["devices"]["cpu"]["auto"] == asked

    def pick(backend, x, bank, top_k):
        return f"{backend} {x.dtype} {x.device} {top_k} of {bank[0].shape[0] + bank[2].shape[0]}"

    monkeypatch.setattr("moram_kernels.api.pick_backend", pick)
    found = environment.environment()["devices"]["cpu"]["auto"]
    assert found["bfloat16"] == "auto torch.bfloat16 cpu 1 of 1"


def test_a_device_without_kernels_beside_one_that_has_them_says_why(monkeypatch):
    monkeypatch.setattr("moram_kernels.api.why_unavailable", lambda name: None)
    monkeypatch.setattr(
        "moram_kernels.triton_backend.available.why_not", lambda *device: "wrong device"
    )
    found = environment.environment()["devices"]["cpu"]
    assert found["triton"] == 'backend="triton" cannot run: wrong device'


def test_a_gpu_is_listed_with_its_properties(monkeypatch):
    gpu = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=3 * 2**30)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
    # There is no such device to put a tensor on.
    monkeypatch.setattr(environment, "_pick", lambda backend, device, dtype: device.type)
    found = environment.environment()["devices"]
    assert list(found) == ["cpu", "cuda:0", "cuda:1"]
    assert found["cuda:1"] == {
        "name": "Some GPU",
        "capability": "9.0",
        "memory_gib": 3.0,
        "auto": dict.fromkeys(("float32", "bfloat16", "float16"), "cuda"),
        "triton": None,
    }


def test_what_fails_when_asked_is_reported_beside_the_rest(monkeypatch, capsys):
    def fail():
        raise OSError("libtorch.so is damaged")

    monkeypatch.setattr("torch.get_num_threads", fail)
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "threads\n  error: OSError: libtorch.so is damaged\n" in said
    assert "backends\n  reference\n    runs: yes\n" in said


def test_text_has_the_answers_of_the_report_one_a_line():
    found = {"a": {"on": True, "off": False, "none": None}, "b": {"c": {"list": ["x", "y"]}}}
    assert environment.to_text(found) == [
        "a",
        "  on: yes",
        "  off: no",
        "b",
        "  c",
        "    list: x y",
    ]
