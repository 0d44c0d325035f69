"""The choice of path and tiles, and what `explain` says about it; no kernel runs here."""

import random
import subprocess
import sys

import pytest
import torch
from support import ROOT

from moram_kernels import SelfActivation, explain
from moram_kernels.triton_backend.devices import device_model
from moram_kernels.triton_backend.plan import LIST_TOP_K, ROW_ATOMS, plan
from moram_kernels.triton_backend.tiles import resident_tile

CLIP = (12608, 768, 768, 160, 16)
PREFILL = (4096, 4096, 4096, 64, 8)
GPUS = ("H100", "A100", "B200", "interpreter")


def bucket_of(tokens):
    """The smallest number with four leading bits, then zeros, that is at least tokens."""
    step = 1
    while step * 16 <= tokens:
        step *= 2
    return -(-tokens // step) * step


@pytest.mark.parametrize("atoms", [1, 64, 512])
@pytest.mark.parametrize("tokens", [1, 2, 17, 61, 64])
def test_few_tokens_decode_at_inference(tokens, atoms):
    chosen = plan(tokens, 4096, 4096, atoms, 8)
    assert (chosen.path, chosen.backward) == ("decode", None)


@pytest.mark.parametrize(
    "shape, training",
    [
        ((65, 4096, 4096, 64, 8), False),
        ((64, 4096, 4096, 8193, 8), False),
        ((1, 4096, 4096, 64, 8), True),
    ],
    ids=["65 tokens", "8193 atoms", "training"],
)
def test_decode_covers_few_tokens_and_rows_at_inference_only(shape, training):
    assert "decode" not in plan(*shape, training=training, current=8).seconds


def test_a_clip_layer_is_resident():
    chosen = plan(*CLIP)
    assert (chosen.path, chosen.backward) == ("resident", None)
    tile = chosen.tiles["resident"]
    assert (tile["BLOCK_N"], tile["BLOCK_N2"]) == (128, 32)


def test_a_clip_layer_is_resident_in_training():
    chosen = plan(12608, 768, 768, 80, 16, training=True, current=16)
    assert (chosen.path, chosen.backward) == ("resident", "dense")
    tile = chosen.tiles["resident"]
    assert (tile["BLOCK_N"], tile["BLOCK_N2"]) == (64, 32)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_prefill_of_a_language_model_is_split(training):
    chosen = plan(*PREFILL, training=training, current=8)
    assert (chosen.path, chosen.backward) == ("split-dense", "dense" if training else None)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "shape",
    [(8192, 2048, 2048, 4096, 16), (12608, 768, 768, 16384, 16), (8192, 4096, 4096, 65536, 16)],
    ids=str,
)
def test_large_banks_gather(shape, training):
    chosen = plan(*shape, training=training, current=16)
    assert (chosen.path, chosen.backward) == ("split-gather", "lists" if training else None)


REFUSED = {
    "D is no multiple of 32": {"width": 1000},
    "O is no multiple of 32": {"out": 780},
    "no network for this top_k": {"top_k": 10},
    "no tile for these atoms": {"atoms": 193},
    "two float32 tiles": {"dtype": "float32"},
    "a wide float32 tile": {"dtype": "float32", "atoms": 128},
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("reason", REFUSED)
def test_resident_is_refused_where_it_does_not_fit(reason, training):
    names = ("tokens", "width", "out", "atoms", "top_k")
    call = dict(zip(names, CLIP, strict=True))
    call |= {"atoms": 96, "training": training, "current": 16}
    assert "resident" in plan(**call).seconds
    call |= REFUSED[reason]
    assert "resident" not in plan(**call).seconds
    with pytest.raises(ValueError, match="path 'resident' does not cover this call; split-dense"):
        plan(**call, path="resident")


def test_resident_takes_every_atom_whatever_the_top_k():
    assert "resident" in plan(12608, 768, 768, 10, 10).seconds
    assert "resident" not in plan(12608, 768, 768, 11, 10).seconds


NOT_COVERED = {
    "float64": ((64, 64, 64, 64, 8, "float64"), "cover float32, bfloat16, float16, not float64"),
    "wide rows, long lists": (
        (64, 64, 64, 8193, 200),
        r"more than 8192 atoms the kernels cover top_k <= 128 .* got top_k 200 with 8193 atoms",
    ),
    "too many atoms": (
        (64, 64, 64, 300_000, 16),
        r"at most 262144 atoms, got top_k 16 with 300000 atoms",
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_no_kernel_covers_goes_to_torch_and_says_why(name, training):
    call, reason = NOT_COVERED[name]
    chosen = plan(*call, training=training)
    assert (chosen.path, chosen.backward) == ("torch", None)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(chosen.reason)


def test_the_limits_themselves_are_covered():
    for atoms, top_k in ((ROW_ATOMS, 5000), (ROW_ATOMS + 1, LIST_TOP_K), (262144, LIST_TOP_K)):
        assert plan(4096, 64, 64, atoms, top_k, training=True).path != "torch"


def test_an_unknown_precision_goes_to_torch():
    assert "precision must be one of ieee, bf16x6" in plan(*CLIP, precision="tf32").reason


@pytest.mark.parametrize("path", ["decode", "split", "torch", ""])
def test_a_path_that_does_not_cover_a_call_is_refused(path):
    message = f"path {path!r} does not cover this call; resident, split-dense, split-gather do"
    with pytest.raises(ValueError, match=message):
        plan(*CLIP, path=path)


@pytest.mark.parametrize("path", ["resident", "decode", "split-dense", "split-gather"])
def test_a_path_can_be_asked_for(path):
    chosen = plan(32, 64, 64, 64, 8, path=path)
    assert (chosen.path, chosen.reason) == (path, "asked for")


@pytest.mark.parametrize("keep", ["dense", "lists"])
@pytest.mark.parametrize("shape", [CLIP, PREFILL, (8192, 2048, 2048, 4096, 16)], ids=str)
def test_what_is_kept_can_be_asked_for(shape, keep):
    chosen = plan(*shape, training=True, current=8, keep=keep)
    assert chosen.backward == keep
    assert (chosen.path == "split-gather") == (keep == "lists")


def test_every_atom_selected_can_still_be_kept_as_lists():
    assert plan(4096, 64, 64, 8, 8, training=True, keep="lists").path == "split-gather"


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_neighbouring_token_counts_share_a_plan(training):
    """Four leading bits name a bucket: at most an eighth more tokens, and never past 64."""
    seen = {}
    for tokens in [*range(1, 200), *range(4000, 4400, 7)]:
        rounded = bucket_of(tokens)
        assert tokens <= rounded <= tokens * 9 / 8 and (tokens <= 64) == (rounded <= 64)
        chosen = plan(tokens, 768, 768, 64, 8, training=training, current=8)
        assert seen.setdefault(rounded, chosen) == chosen, tokens
    assert len(seen) < 60


def random_shapes(count):
    r = random.Random(0)
    for _ in range(count):
        width, out = r.choice((r.randint(1, 999), 32 * r.randint(1, 99))), 32 * r.randint(1, 99)
        yield {
            "tokens": r.choice((r.randint(1, 80), r.randint(65, 20000))),
            "width": width,
            "out": out if r.random() < 0.8 else out + r.randint(0, 31),
            "atoms": r.choice((r.randint(1, 200), r.randint(1, 9000))),
            "top_k": r.choice((1, 4, 8, 16, 100)),
            "dtype": r.choice(("float32", "bfloat16", "float16")),
            "training": r.random() < 0.5,
            "device": r.choice(GPUS),
        }


# What a device might measure: fine where the widths are multiples of 128, and not elsewhere.
LARGE_TILES = {"BLOCK_D": 128, "BLOCK_O": 128, "num_warps": 8}


@pytest.mark.parametrize("tuned", [{}, {"resident": LARGE_TILES}], ids=["modelled", "tuned"])
def test_no_resident_tile_overruns_a_row(tuned):
    """The kernel has no masks along D and O: its tiles must divide them, and hold all atoms."""
    table = {name: {"tiles": tuned} for name in GPUS}
    tiled = 0
    for shape in random_shapes(2000):
        chosen = plan(**shape, current=1, table=table)
        if "resident" not in chosen.seconds:
            continue
        chosen = plan(**shape, current=1, table=table, path="resident")
        tile = chosen.tiles["resident"]
        tiled += 1
        assert shape["width"] % tile["BLOCK_D"] == 0 and shape["out"] % tile["BLOCK_O"] == 0, shape
        assert tile["BLOCK_N"] + tile["BLOCK_N2"] >= shape["atoms"], shape
        assert tile["BLOCK_D"] >= 16 and tile["BLOCK_O"] >= 16, shape
    assert tiled > 100


def test_tiles_are_powers_of_two_that_a_product_takes():
    for shape in random_shapes(500):
        chosen = plan(**shape, current=1)
        for name, tile in chosen.tiles.items():
            if isinstance(tile, int):
                assert tile >= 1, (shape, name)
                continue
            blocks = {k: v for k, v in tile.items() if k.startswith("BLOCK_") and v}
            assert all(v >= 16 and v & (v - 1) == 0 for v in blocks.values()), (shape, name, tile)


def test_a_table_overrides_the_path():
    key = "13312x768x768x160x16xbfloat16"
    table = {"H100": {"paths": {f"{key}xinference": "split-dense"}}}
    chosen = plan(*CLIP, table=table)
    assert (chosen.path, chosen.reason) == ("split-dense", "measured on this device")
    # Not on another device, nor where something was asked for, nor in training.
    assert plan(*CLIP, path="resident", table=table).reason == "asked for"
    for other in ({"device": "A100"}, {"training": True}):
        assert plan(*CLIP, **other, table=table) == plan(*CLIP, **other)


def test_a_path_measured_at_inference_leaves_training_alone():
    """Decode is measured for few tokens, and keeps nothing for a backward."""
    key = "64x768x768x160x16xbfloat16"
    table = {"H100": {"paths": {f"{key}xinference": "decode", f"{key}xtraining": "split-dense"}}}
    call = (64, 768, 768, 160, 16)
    assert plan(*call, table=table).path == "decode"
    chosen = plan(*call, training=True, current=16, table=table)
    assert (chosen.path, chosen.reason) == ("split-dense", "measured on this device")


def test_a_table_overrides_tiles_by_kernel_and_by_its_columns():
    plain = plan(*CLIP)
    tiles = {"resident/128": {"BLOCK_M": 64}, "resident/64": {"BLOCK_M": 16}, "unknown": {"A": 1}}
    tuned = plan(*CLIP, table={"H100": {"tiles": {**tiles, "aggregate": {"num_warps": 8}}}})
    assert tuned.path == plain.path == "resident"
    assert tuned.tiles == {
        **plain.tiles,
        "resident": {**plain.tiles["resident"], "BLOCK_M": 64},
        "aggregate": {**plain.tiles["aggregate"], "num_warps": 8},
    }
    # The cached plan is not the one that was changed.
    assert plan(*CLIP) == plain


def test_the_shipped_table_is_in_the_package():
    code = (
        "from setuptools import Distribution; import runpy, setuptools\n"
        "seen = {}\n"
        "setuptools.setup = lambda **k: seen.update(k)\n"
        "runpy.run_path('setup.py')\n"
        "print(seen['package_data'].get('moram_kernels.triton_backend'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "json" in result.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["H100", "A100", "B200", "MI300", "interpreter"])
def test_the_resident_tile_is_the_narrowest_that_holds_a_bank(device, dtype):
    found = {atoms: resident_tile(atoms, 4, dtype, device_model(device)) for atoms in range(1, 300)}
    columns = sorted({sum(tile) for tile in found.values() if tile})
    # What compiles without spills: 64 for float32, and at least 96 otherwise.
    assert columns[:3] == [16, 32, 64]
    assert (columns[-1] == 64) if dtype == "float32" else (columns[-1] >= 96)
    for atoms, tile in found.items():
        expected = next((c for c in columns if c >= atoms), None)
        assert expected == (sum(tile) if tile else None), atoms


def test_explain_says_path_reason_and_tiles(capsys):
    chosen = explain(*CLIP[:4], SelfActivation(top_k=16), device="H100")
    said = capsys.readouterr().out
    assert chosen == plan(*CLIP, joined=True)
    assert "12608 tokens, 768 -> 768, 160 atoms, top_k 16, torch.bfloat16, inference, H100" in said
    assert "path: resident\n" in said
    assert f"why: {chosen.reason}\n" in said and "resident 2" in said and "split-dense" in said
    assert f"tiles of resident: {chosen.tiles['resident']}" in said
    assert "'BLOCK_N': 128, 'BLOCK_N2': 32" in said


def test_explain_names_the_backward_and_its_tiles(capsys):
    chosen = explain(
        *PREFILL[:4], SelfActivation(top_k=8), device="H100", training=True, num_current=8
    )
    said = capsys.readouterr().out
    assert "path: split-dense, backward from dense\n" in said and "training" in said
    for kernel in ("scores", "aggregate"):
        assert f"tiles of {kernel}: {chosen.tiles[kernel]}" in said


def test_explain_gives_the_limits_where_no_kernel_covers(capsys):
    chosen = explain(64, 64, 64, 9000, SelfActivation(top_k=200), device="H100")
    said = capsys.readouterr().out
    assert chosen.path == "torch" and "path: torch\n" in said
    assert "top_k <= 128" in said and "got top_k 200 with 9000 atoms" in said
    assert "tiles" not in said
    assert explain(64, 64, 64, 64, device="H100", dtype=torch.float64).path == "torch"


@pytest.mark.parametrize("name", ["tokens", "in_features", "num_atoms"])
def test_explain_refuses_sizes_below_one(name):
    sizes = {"tokens": 1, "in_features": 1, "out_features": 1, "num_atoms": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        explain(**sizes)
