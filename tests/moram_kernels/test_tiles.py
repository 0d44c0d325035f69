"""Tiles by capability, shared memory and Triton version: what compiles cleanly, nothing else."""

import subprocess
import sys
from dataclasses import replace

import pytest
import triton

from moram_kernels.triton_backend import available, cost
from moram_kernels.triton_backend.devices import REFERENCES
from moram_kernels.triton_backend.plan import plan
from moram_kernels.triton_backend.select import tiles as select_tiles
from moram_kernels.triton_backend.tiles import resident_tile, tiles

CARDS = {target: card for target, (card, _) in REFERENCES.items()}


@pytest.fixture
def version(monkeypatch):
    """Pretend another (major, minor) of Triton."""
    return lambda *found: monkeypatch.setattr(available, "triton_version", lambda: found or None)


def shape_of(tokens, width, atoms, training=False):
    return cost.Shape(tokens, width, width, atoms, 0, 8, 2, "half", False, training)


def all_tiles(device, **sizes):
    return tiles(shape_of(**sizes), None, device, "bfloat16")


WIDEST = {"sm_80": 128, "sm_89": 128, "sm_90": 192, "sm_100": 96, "sm_120": 128, "gfx942": 128}
# The tile of 65 to 96 atoms.
MIDDLE = dict.fromkeys(WIDEST, (64, 32)) | {
    "sm_89": (128, 0),
    "sm_120": (128, 0),
    "gfx942": (128, 0),
}


@pytest.mark.parametrize("target", WIDEST)
def test_each_target_has_its_own_resident_tiles(target, version):
    version(3, 8)
    card, widest = CARDS[target], WIDEST[target]
    assert resident_tile(widest, 16, "bfloat16", card) is not None
    assert resident_tile(widest + 1, 16, "bfloat16", card) is None
    assert resident_tile(96, 16, "bfloat16", card) == MIDDLE[target]
    assert resident_tile(65, 16, "float32", card) is None


@pytest.mark.parametrize("target", WIDEST)
def test_mixed_dtypes_fill_wide_resident_tiles_on_a_hopper_alone(target, version):
    version(3, 8)
    card = CARDS[target]
    assert resident_tile(64, 16, "bfloat16+float32", card) == (64, 0)
    assert resident_tile(65, 16, "float16+float32", card) is None
    wide = resident_tile(192, 16, "bfloat16+float32", card)
    assert wide == ((128, 64) if target == "sm_90" else None)
    assert (resident_tile(65, 16, "bfloat16+float32", card) is None) == (target != "sm_90")


# Most atoms with top_k 8 and with another, before Triton 3.8.
EARLY = {"sm_80": (96, 128), "sm_89": (64, 128), "sm_90": (128, 192), "sm_120": (64, 128)}


@pytest.mark.parametrize("top_k", [4, 8, 16, 200])
@pytest.mark.parametrize("target", EARLY)
def test_before_triton_3_8_fewer_atoms_are_resident(target, top_k, version):
    version(3, 6)
    card, widest = CARDS[target], EARLY[target][0 if top_k == 8 else 1]
    assert sum(resident_tile(widest, top_k, "bfloat16", card)) == widest
    assert resident_tile(widest + 1, top_k, "bfloat16", card) is None
    assert resident_tile(65, top_k, "float32", card) is None
    version(3, 8)
    assert sum(resident_tile(WIDEST[target], top_k, "bfloat16", card)) == WIDEST[target]


def test_before_triton_3_8_nothing_is_resident_on_a_b200(version):
    version(3, 6)
    for dtype in ("float32", "bfloat16"):
        assert resident_tile(1, 4, dtype, CARDS["sm_100"]) is None
        assert resident_tile(1, 4, dtype, CARDS["sm_90"]) == (16, 0)


def test_before_triton_3_8_amds_gpus_take_torch_and_say_why(version):
    card = CARDS["gfx942"]
    version(3, 8)
    assert plan(4096, 768, 768, 64, 8, device=card).path != "torch"
    version(3, 6)
    chosen = plan(4096, 768, 768, 64, 8, device=card)
    assert (chosen.path, chosen.reason) == (
        "torch",
        "for gfx942 (MI300) the kernels need Triton 3.8 or newer, because 3.6 fails to compile "
        'them; install it, or use backend="torch", which "auto" takes there',
    )
    # Below 8.0 no Triton helps.
    assert "compute capability 8.0" in plan(4096, 768, 768, 64, 8, device="sm_75").reason


@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_before_triton_3_8_some_cards_hold_half_as_many_float32_atoms(target, version):
    for found, widest in (((3, 6), 32), ((3, 8), 64)):
        version(*found)
        card = CARDS[target]
        assert resident_tile(widest, 16, "float32", card) == (widest, 0)
        assert resident_tile(widest + 1, 16, "float32", card) is None
        assert resident_tile(64, 16, "bfloat16+float32", card) == (64, 0)


@pytest.mark.parametrize("lists", [True, False])
def test_before_triton_3_8_places_in_lists_take_half_the_elements_a_lane(lists, version):
    for num_atoms, late, early in (
        (512, (2, 1), (1, 1)),
        (1000, (1, 1), (1, 2)),
        (4096, (1, 4), (1, 4)),
    ):
        for found, wanted in (((3, 6), early if lists else late), ((3, 8), late)):
            version(*found)
            blocks, warps = select_tiles(num_atoms, lists)
            assert (blocks["BLOCK_M"], warps) == wanted, (num_atoms, found)


def test_before_triton_3_8_registers_are_unbound_where_ptxas_spills_a_little(version):
    version(3, 6)
    assert (available.unbound(True), available.unbound(False)) == ({"maxnreg": 255}, {})
    version(3, 8)
    assert available.unbound(True) == {}


@pytest.mark.parametrize("found, rows", [((3, 6), 64), ((3, 7), 64), ((3, 8), 128), ((), 128)])
def test_before_triton_3_8_160_atoms_meet_64_rows(found, rows, version):
    version(*found)
    chosen = tiles(shape_of(12608, 768, 160), (128, 32), CARDS["sm_90"], "bfloat16")
    assert chosen["resident"]["BLOCK_M"] == rows


def test_before_triton_3_8_no_scores_are_serialised(version):
    """Some size takes the tile of 128 x 128 from 3.8 on; none does before, nor on a B200's."""
    sizes = [
        {"tokens": tokens, "width": width, "atoms": atoms}
        for tokens in (512, 2048, 8192, 65536)
        for width in (768, 4096)
        for atoms in (128, 256, 4096)
    ]

    def square(device):
        found = (all_tiles(device, **size)["scores"] for size in sizes)
        return any(tile["BLOCK_M"] == tile["BLOCK_N"] == 128 for tile in found)

    version(3, 8)
    assert square(CARDS["sm_90"]) and square(CARDS["sm_100"])
    version(3, 6)
    assert not square(CARDS["sm_90"]) and square(CARDS["sm_100"])


def test_large_tiles_need_shared_memory(version):
    version(3, 8)
    size = {"tokens": 65536, "width": 4096, "atoms": 4096}
    card = CARDS["sm_90"]
    assert all_tiles(card, **size)["scores"]["BLOCK_N"] == 256
    small = replace(card, shared=99 * 1024)
    chosen = all_tiles(small, **size)
    for kernel, (rows, columns, inner) in {
        "scores": ("BLOCK_M", "BLOCK_N", "BLOCK_D"),
        "aggregate": ("BLOCK_M", "BLOCK_O", "BLOCK_N"),
    }.items():
        tile = chosen[kernel]
        staged = tile["num_stages"] * (tile[rows] + tile[columns]) * tile[inner] * 2
        assert staged <= small.shared, kernel


def test_the_version_of_triton_is_found_without_importing_it():
    code = (
        "import sys\n"
        "from moram_kernels.triton_backend import available\n"
        "print(*available.triton_version(), 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    major, minor = triton.__version__.split(".")[:2]
    assert done.stdout.split() == [major, minor, "False"]
    assert available.triton_version() == (int(major), int(minor))
