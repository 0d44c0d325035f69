"""What is known of a GPU: the tiles it takes, its rates, and which GPUs the kernels refuse."""

import re
from types import SimpleNamespace

import pytest
import torch

from moram_kernels import SelfActivation, api, explain
from moram_kernels.aliases import Bank
from moram_kernels.triton_backend import available, devices, launcher
from moram_kernels.triton_backend.plan import plan
from moram_kernels.triton_backend.tiles import resident_tile

# What torch says of real cards, in its units: bytes, kHz, bits.
H100_SXM = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "L2_cache_size": 52428800,
    "shared_memory_per_block_optin": 232448,
    "clock_rate": 1980000,
    "memory_clock_rate": 2619000,
    "memory_bus_width": 5120,
}
H100_PCIE = H100_SXM | {
    "name": "NVIDIA H100 PCIe",
    "multi_processor_count": 114,
    "clock_rate": 1755000,
    "memory_clock_rate": 1593000,
}
A10G = H100_SXM | {
    "name": "NVIDIA A10G",
    "major": 8,
    "minor": 6,
    "multi_processor_count": 80,
    "L2_cache_size": 6291456,
    "shared_memory_per_block_optin": 101376,
    "clock_rate": 1710000,
    "memory_clock_rate": 6251000,
    "memory_bus_width": 384,
}
T4 = A10G | {"name": "Tesla T4", "major": 7, "minor": 5, "multi_processor_count": 40}
MI300X = {
    "name": "AMD Instinct MI300X",
    "major": 9,
    "minor": 4,
    "gcnArchName": "gfx942:sramecc+:xnack-",
    "multi_processor_count": 304,
    "L2_cache_size": 4194304,
    "clock_rate": 2100000,
    "memory_clock_rate": 1300000,
    "memory_bus_width": 8192,
}
RX_7900 = MI300X | {"name": "AMD Radeon RX 7900 XTX", "gcnArchName": "gfx1100"}
REFUSED = {
    "T4": (
        T4,
        "the kernels need compute capability 8.0 or higher, got 7.5 (Tesla T4), where they spill "
        'registers; use backend="torch", which "auto" takes there',
    ),
    "RX 7900": (
        RX_7900,
        "the kernels need matrix cores of gfx90a, gfx942, gfx950, got gfx1100 (AMD Radeon RX 7900 "
        'XTX), where they spill registers; use backend="torch", which "auto" takes there',
    ),
}


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the GPUs of this machine have these properties."""

    def pretend(*cards):
        found = [SimpleNamespace(**card) for card in cards]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)
        monkeypatch.setattr(torch.version, "hip", "7" if "gcnArchName" in cards[0] else None)
        monkeypatch.setattr(available, "interpreting", lambda: False)
        available._gpu.cache_clear()
        return [torch.device("cuda", index) for index in range(len(found))]

    yield pretend
    available._gpu.cache_clear()


@pytest.mark.parametrize(
    "arch, target",
    [
        *((80, "sm_80"), (86, "sm_89"), (87, "sm_89"), (89, "sm_89"), (90, "sm_90")),
        *((100, "sm_100"), (103, "sm_100"), (110, "sm_100"), (120, "sm_120"), (121, "sm_120")),
        *((130, "sm_120"), (75, None), (70, None), ("gfx90a", "gfx942"), ("gfx942", "gfx942")),
        *(("gfx950", "gfx942"), ("gfx1100", None), ("gfx1201", None), ("gfx906", None)),
    ],
)
def test_a_capability_takes_the_tiles_of_one_target(arch, target):
    assert devices.target_of(arch) == target


def test_the_card_of_every_target_takes_its_own_tiles():
    for target, (card, _) in devices.REFERENCES.items():
        assert card.target == target


def test_a_name_in_the_middle_of_another_decides_nothing(machine):
    """An A100's name on a card of another capability, as a virtual GPU may have it."""
    (gpu,) = machine(A10G | {"name": "GRID A100-like H100"})
    assert available.device_of(gpu).target == "sm_89"


def test_rates_follow_units_clock_and_memory(machine):
    sxm, pcie = (available.device_of(gpu) for gpu in machine(H100_SXM, H100_PCIE))
    assert (sxm.name, sxm.arch, sxm.units, sxm.shared) == (H100_SXM["name"], 90, 132, 232448)
    # The reference card's own figures, but for what this card says itself.
    assert (sxm.half, sxm.single, sxm.cache, sxm.clock) == (989e12, 67e12, 5.5e12, 1.7e9)
    # 2619 MHz, 2 transfers, 640 bytes; three quarters of 50 MiB.
    assert sxm.memory == pytest.approx(3.35232e12)
    assert sxm.cache_bytes == pytest.approx(39321600)
    # 114 of 132 units at 1755 of 1980 MHz.
    assert pcie.half == pytest.approx(989e12 * 0.86364 * 0.88636, rel=1e-4)
    assert pcie.memory == pytest.approx(2.03904e12)
    assert pcie.clock == pytest.approx(1.7e9 * 0.88636, rel=1e-4)


def test_what_an_older_torch_does_not_tell_is_the_reference_cards(machine):
    bare = ("name", "major", "minor", "multi_processor_count")
    gpus = machine(*({name: card[name] for name in bare} for card in (H100_SXM, H100_PCIE)))
    sxm, pcie = map(available.device_of, gpus)
    for name in ("shared", "memory", "cache", "half", "single", "clock", "cache_bytes"):
        assert getattr(sxm, name) == getattr(devices.H100, name), name
    assert pcie.memory == pytest.approx(3.35e12 * 114 / 132)


def test_amds_cache_and_memory_are_the_reference_cards(machine):
    """Its memory's clock counts other transfers, and a cache behind L2 is not in its size."""
    (gpu,) = machine(MI300X)
    found = available.device_of(gpu)
    assert (found.arch, found.memory, found.cache_bytes) == ("gfx942", 5.3e12, 200e6)
    assert launcher.target(gpu) == "gfx942"


def test_a_gpu_is_looked_up_once(machine, monkeypatch):
    first, second = machine(H100_SXM, A10G)
    found = available.device_of(first), available.device_of(second)
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    assert available.device_of(first) is found[0] is available.device_of(torch.device("cuda"))
    assert available.device_of(second) is found[1]
    assert available.device_of(torch.device("cpu")) is devices.INTERPRETER


@pytest.mark.parametrize("card", REFUSED)
def test_auto_takes_torch_where_kernels_would_spill_and_triton_says_why(card, machine):
    properties, message = REFUSED[card]
    (gpu,) = machine(properties)
    assert available.why_not(gpu) == available.why_not() == message
    x = SimpleNamespace(is_meta=False, is_cuda=True, device=gpu, dtype=torch.float32)
    bank = Bank(*(torch.zeros(8, 4),) * 4)
    assert api.pick_backend("auto", x, bank, 4) == "torch"
    with pytest.raises(RuntimeError, match=re.escape(f'backend="triton" cannot run: {message}')):
        api.pick_backend("triton", x, bank, 4)


@pytest.mark.parametrize("card", REFUSED)
def test_explain_says_why_a_gpu_takes_torch(card, machine, capsys):
    properties, message = REFUSED[card]
    machine(properties)
    chosen = explain(4096, 768, 768, 64, SelfActivation(top_k=8))
    assert (chosen.path, chosen.reason) == ("torch", message)
    said = capsys.readouterr().out
    assert f"path: torch\nwhy: {message}\nhere: {message}\n" in said
    assert said.startswith("4096 tokens, 768 -> 768, 64 atoms, top_k 8, torch.bfloat16, inference")


def test_auto_takes_triton_where_kernels_compile_cleanly(machine):
    for card in (H100_SXM, A10G):
        (gpu,) = machine(card)
        assert available.why_not(gpu) is None
        x = SimpleNamespace(is_meta=False, is_cuda=True, device=gpu, dtype=torch.float32)
        assert api.pick_backend("auto", x, Bank(*(torch.zeros(8, 4),) * 4), 4) == "triton"


def test_a_compiled_graph_asks_a_gpu_nothing(machine, monkeypatch, recwarn):
    """What was found out about a GPU is a constant of the graph, with no warning of a cache."""
    machine(T4)
    # Or torch.compile would ask for its state.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x):
        return x * 2 if available._why_not_gpu(0) is None else x * 3

    assert scaled(torch.ones(1)).item() == 3
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_explain_knows_cards_and_capabilities_by_name(capsys):
    for name, target in (("RTX 4090", "sm_89"), ("sm_86", "sm_89"), ("gfx90a", "gfx942")):
        assert devices.device_model(name).target == target
        assert explain(4096, 768, 768, 64, device=name).path != "torch"
        assert f"inference, {name}\n" in capsys.readouterr().out
    assert explain(4096, 768, 768, 64, device="sm_75").path == "torch"
    assert "compute capability 8.0 or higher, got 7.5 (sm_75)" in capsys.readouterr().out


def test_a_device_that_nobody_knows_is_refused():
    message = (
        "device must be one of B200, H200, H100, A100, MI300, L40S, RTX 4090, RTX PRO 6000, RTX "
        '5090, a capability such as "sm_86" or "gfx90a", or a torch device of this machine, got '
        "'Voodoo 2'"
    )
    for ask in (explain, plan):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ask(4096, 768, 768, 64, device="Voodoo 2", **({"top_k": 8} if ask is plan else {}))


def test_a_device_is_planned_as_its_target_and_units(machine):
    """The same tiles as the target's card; of splits as many as its units need."""
    (gpu,) = machine(A10G)
    found, card = available.device_of(gpu), devices.device_model("L40S")
    for atoms in range(1, 200):
        expected = resident_tile(atoms, 8, "bfloat16", card)
        assert resident_tile(atoms, 8, "bfloat16", found) == expected
    ours, theirs = (
        plan(1024, 4096, 4096, 16, 8, training=True, device=device, current=16, path="split-dense")
        for device in (found, card)
    )
    assert ours.tiles["scores"] == theirs.tiles["scores"]
    # Twice the units over 16 tiles of 64 tokens.
    assert (ours.tiles["splits"], theirs.tiles["splits"]) == (160 // 16, 16)
