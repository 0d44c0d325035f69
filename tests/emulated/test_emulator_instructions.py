"""Instructions of single threads and of warps, each class against numpy, torch or plain Python."""

import numpy as np
import pytest
import torch
from hand_written import STORE, computed, run

RNG = np.random.default_rng(0)
EDGES = np.array([0, 1, -1, 2, -2, 5, -7, 31, 32, 33, 2**31 - 1, -(2**31)], np.int32)
A, B = (np.ravel(part).astype(np.int32) for part in np.meshgrid(EDGES, EDGES))
C = RNG.integers(-(2**31), 2**31, A.size).astype(np.int32)
WIDE = {"s32": np.int64, "u32": np.uint64}
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.25, 1e-40, -1e38, 7e4, 1e-7, np.inf, -np.inf, np.nan], np.float32
)
F, G = (np.ravel(part).astype(np.float32) for part in np.meshgrid(FLOATS, FLOATS))
H = RNG.standard_normal(F.size).astype(np.float32)


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def low(values):
    """The lower 32 bits of Python integers or int64."""
    return (np.asarray(values, dtype=object) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def unsigned(values):
    return [int(value) & 0xFFFFFFFF for value in values]


def each(function, *lists):
    return low([function(*numbers) for numbers in zip(*lists, strict=True)])


def ints(values):
    return [int(value) for value in values]


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("add.s32 %r9, %r10, %r11;", lambda a, b, c: a + b),
        ("sub.s32 %r9, %r10, %r11;", lambda a, b, c: a - b),
        ("mul.lo.s32 %r9, %r10, %r11;", lambda a, b, c: a * b),
        ("mul.hi.s32 %r9, %r10, %r11;", lambda a, b, c: a * b >> 32),
        ("mad.lo.s32 %r9, %r10, %r11, %r12;", lambda a, b, c: a * b + c),
        ("mul.wide.s32 %rd4, %r10, %r11; shr.u64 %rd5, %rd4, 32; cvt.u32.u64 %r9, %rd5;",
         lambda a, b, c: a * b >> 32),
        ("cvt.s64.s32 %rd4, %r10; mul.lo.s64 %rd5, %rd4, 3; shr.s64 %rd6, %rd5, 2;"
         "cvt.u32.u64 %r9, %rd6;", lambda a, b, c: a * 3 >> 2),
        ("min.s32 %r9, %r10, %r11;", lambda a, b, c: min(a, b)),
        ("max.s32 %r9, %r10, %r11;", lambda a, b, c: max(a, b)),
        ("and.b32 %r9, %r10, %r11;", lambda a, b, c: a & b),
        ("or.b32 %r9, %r10, %r11;", lambda a, b, c: a | b),
        ("xor.b32 %r9, %r10, %r11;", lambda a, b, c: a ^ b),
        ("not.b32 %r9, %r10;", lambda a, b, c: ~a),
        ("neg.s32 %r9, %r10;", lambda a, b, c: -a),
        ("abs.s32 %r9, %r10;", lambda a, b, c: abs(a)),
        ("shr.s32 %r9, %r10, 3;", lambda a, b, c: a >> 3),
        ("bfe.s32 %r9, %r10, 4, 8;", lambda a, b, c: (a >> 4 & 255 ^ 128) - 128),
        ("setp.lt.s32 %p1, %r10, %r11; selp.b32 %r9, %r12, 7, %p1;",
         lambda a, b, c: c if a < b else 7),
        ("setp.ge.s32 %p1, %r10, 0; setp.eq.and.s32 %p2, %r10, %r11, %p1; selp.b32 %r9, 1, 0, %p2;",
         lambda a, b, c: a >= 0 and a == b),
        ("cvt.s16.s32 %rs1, %r10; cvt.s32.s16 %r9, %rs1;",
         lambda a, b, c: (a & 0xFFFF ^ 0x8000) - 0x8000),
        ("cvt.u16.u32 %rs1, %r10; cvt.u32.u16 %r9, %rs1;", lambda a, b, c: a & 0xFFFF),
        ("mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r9, {%rs2, %rs1};",
         lambda a, b, c: a >> 16 & 0xFFFF | (a & 0xFFFF) << 16),
    ],
)  # fmt: skip
def test_signed_integers(text, function):
    found = computed(text, A, B, C)
    assert (found == each(function, ints(A), ints(B), ints(C))).all()


def _permuted(a, b, c):
    both, result = a | b << 32, 0
    for i in range(4):
        nibble = c >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        byte = (255 if byte & 128 else 0) if nibble & 8 else byte
        result |= byte << 8 * i
    return result


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("mul.hi.u32 %r9, %r10, %r11;", lambda a, b, c: a * b >> 32),
        ("min.u32 %r9, %r10, %r11;", lambda a, b, c: min(a, b)),
        ("shl.b32 %r9, %r10, %r11;", lambda a, b, c: a << min(b, 32)),
        ("shr.u32 %r9, %r10, %r11;", lambda a, b, c: a >> min(b, 32)),
        ("bfe.u32 %r9, %r10, 4, 8;", lambda a, b, c: a >> 4 & 255),
        ("bfi.b32 %r9, %r10, %r11, 4, 8;", lambda a, b, c: b & ~0xFF0 | (a & 255) << 4),
        ("shf.l.wrap.b32 %r9, %r10, %r11, %r12;",
         lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
        ("shf.r.clamp.b32 %r9, %r10, %r11, %r12;", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
        ("prmt.b32 %r9, %r10, %r11, %r12;", _permuted),
        ("prmt.b32 %r9, %r10, %r11, 0x5410U;", lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16),
        ("lop3.b32 %r9, %r10, %r11, %r12, 0xCA;", lambda a, b, c: a & b | ~a & c),
        ("popc.b32 %r9, %r10;", lambda a, b, c: a.bit_count()),
        ("setp.lo.u32 %p1, %r10, %r11; selp.b32 %r9, 1, 0, %p1;", lambda a, b, c: a < b),
        ("cvt.u64.u32 %rd4, %r10; cvt.rn.f32.u64 %r13, %rd4; cvt.rzi.u32.f32 %r9, %r13;",
         lambda a, b, c: min(int(np.float32(a)), 2**32 - 1)),
    ],
)  # fmt: skip
def test_unsigned_integers(text, function):
    found = computed(text, A, B, C)
    assert (found == each(function, unsigned(A), unsigned(B), unsigned(C))).all()


def test_division_of_integers_goes_towards_zero():
    chosen = (B != 0) & ~((A == -(2**31)) & (B == -1))
    a, b = A[chosen], B[chosen]
    quotients = [int(x / y) if abs(x) < 2**50 else 0 for x, y in zip(ints(a), ints(b), strict=True)]
    assert (computed("div.s32 %r9, %r10, %r11;", a, b) == low(quotients)).all()
    rests = [x - y * q for x, y, q in zip(ints(a), ints(b), quotients, strict=True)]
    assert (computed("rem.s32 %r9, %r10, %r11;", a, b) == low(rests)).all()
    assert (
        computed("div.u32 %r9, %r10, %r11;", a, b)
        == each(lambda x, y: x // y, unsigned(a), unsigned(b))
    ).all()
    assert (
        computed("rem.u32 %r9, %r10, %r11;", a, b)
        == each(lambda x, y: x % y, unsigned(a), unsigned(b))
    ).all()


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("add.f32 %r9, %r10, %r11;", lambda: F + G),
        ("sub.f32 %r9, %r10, %r11;", lambda: F - G),
        ("mul.f32 %r9, %r10, %r11;", lambda: F * G),
        ("div.full.f32 %r9, %r10, %r11;", lambda: F / G),
        (
            "fma.rn.f32 %r9, %r10, %r11, %r12;",
            lambda: (F * G.astype(np.float64) + H).astype(np.float32),
        ),
        ("max.f32 %r9, %r10, %r11;", lambda: np.fmax(F, G)),
        ("min.NaN.f32 %r9, %r10, %r11;", lambda: np.minimum(F, G)),
        ("neg.f32 %r9, %r10;", lambda: -F),
        ("abs.f32 %r9, %r10;", lambda: np.abs(F)),
        ("ex2.approx.f32 %r9, %r12;", lambda: np.exp2(H)),
        ("ex2.approx.ftz.f32 %r9, %r10;", lambda: np.exp2(np.where(np.float32(1e-40) == F, 0, F))),
        ("lg2.approx.f32 %r9, %r12;", lambda: np.log2(H)),
        ("sqrt.rn.f32 %r9, %r12;", lambda: np.sqrt(H)),
        ("rcp.rn.f32 %r9, %r10;", lambda: 1 / F),
        ("rsqrt.approx.f32 %r9, %r12;", lambda: 1 / np.sqrt(H)),
        ("add.ftz.f32 %r9, %r10, 0f00000000;", lambda: np.where(np.float32(1e-40) == F, 0, F)),
        ("mov.b32 %r9, 0f3F800000;", lambda: np.ones_like(F)),
    ],
)
def test_floats(text, function):
    found = computed(text, F, G, H, dtype=np.float32)
    np.testing.assert_array_max_ulp(found, function().astype(np.float32), 1)


@pytest.mark.parametrize(
    ("how", "function"),
    [
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: (a < b) | (a > b)),
        ("lt", lambda a, b: a < b),
        ("ge", lambda a, b: a >= b),
        ("neu", lambda a, b: a != b),
        ("equ", lambda a, b: (a == b) | np.isnan(a) | np.isnan(b)),
        ("ltu", lambda a, b: (a < b) | np.isnan(a) | np.isnan(b)),
        ("geu", lambda a, b: (a >= b) | np.isnan(a) | np.isnan(b)),
        ("num", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
        ("nan", lambda a, b: np.isnan(a) | np.isnan(b)),
    ],
)
def test_comparisons_of_floats_where_some_are_nan(how, function):
    found = computed(f"setp.{how}.f32 %p1, %r10, %r11; selp.b32 %r9, 1, 0, %p1;", F, G)
    assert (found == function(F, G)).all()


def bits(tensor):
    return tensor.view(torch.int16).numpy().astype(np.int32) & 0xFFFF


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bit_floats(name, dtype):
    a, b = np.concatenate([F, H])[:200], np.concatenate([G, H[::-1]])[:200]
    a, b = (np.where(np.isnan(x), np.float32(1), x) for x in (a, b))
    half, other = (torch.from_numpy(x).to(dtype) for x in (a, b))
    both = bits(half) | bits(other) << 16
    rounded = computed(f"cvt.rn.{name}.f32 %rs1, %r10; cvt.u32.u16 %r9, %rs1;", a)
    assert (rounded == bits(half)).all()
    packed = computed(f"cvt.rn.{name}x2.f32 %r9, %r11, %r10;", a, b)
    assert (packed == both).all()
    text = f"mov.b32 {{%rs1, %rs2}}, %r10; cvt.f32.{name} %r9, %rs2;"
    assert (computed(text, both, dtype=np.float32) == other.float().numpy()).all()
    clear = np.isfinite(half.float().numpy()) & np.isfinite(other.float().numpy())
    one, two = half[clear], other[clear]
    x, y = bits(one) | bits(two) << 16, bits(two) | bits(one) << 16
    wide, wider = one.double(), two.double()
    for text, expected in (
        (f"fma.rn.{name}x2 %r9, %r10, %r11, %r10;", (wide * wider + wide, wide * wider + wider)),
        (f"mul.{name}x2 %r9, %r10, %r11;", (wide * wider, wide * wider)),
        (f"add.{name}x2 %r9, %r10, %r11;", (wide + wider, wide + wider)),
    ):
        found = computed(text, x, y)
        halves = torch.from_numpy(np.stack([found & 0xFFFF, found >> 16 & 0xFFFF]))
        halves = halves.to(torch.int16).view(dtype)
        assert torch.equal(halves, torch.stack([e.float().to(dtype) for e in expected])), text


def test_conversions_between_floats_and_integers():
    small = np.array([0.5, 1.5, -0.5, -2.7, 3e9, -3e9, np.nan, 7], np.float32)
    for how, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        expected = np.nan_to_num(function(small.astype(np.float64)), nan=0)
        expected = np.clip(expected, -(2.0**31), 2.0**31 - 1).astype(np.int32)
        assert (computed(f"cvt.{how}.s32.f32 %r9, %r10;", small) == expected).all(), how
    found = computed("cvt.rn.f32.s32 %r9, %r10;", A, dtype=np.float32)
    assert (found == A.astype(np.float32)).all()


def test_registers_of_inline_assembly_have_a_scope_of_their_own():
    text = "mov.b32 %r8, 7; { .reg .b32 %r8; mov.b32 %r8, 9; } mov.b32 %r9, %r8;"
    assert (computed(text, A) == 7).all()


def test_threads_of_a_divergent_loop_meet_again():
    # Every thread loops its number of times, then the warp shuffles.
    text = """
mov.b32 %r9, 0;
mov.b32 %r10, 0;
$L1:
setp.ge.s32 %p1, %r10, %r1;
@%p1 bra $L2;
add.s32 %r9, %r9, 3;
add.s32 %r10, %r10, 1;
bra.uni $L1;
$L2:
shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
"""
    assert run(text + STORE).tolist() == [3 * (i ^ 1) for i in range(64)]


def test_every_cta_knows_its_place():
    body = "mov.u32 %r10, %ctaid.x; mov.u32 %r11, %nctaid.x; mul.lo.s32 %r12, %r10, 128;"
    body += "cvt.u64.u32 %rd4, %r12; add.s64 %rd5, %rd3, %rd4; mad.lo.s32 %r9, %r11, 100, %r10;"
    out = torch.zeros(96, dtype=torch.int32)
    run(body + "st.global.b32 [%rd5], %r9;", out, threads=32, grid=3)
    assert out.tolist() == [300] * 32 + [301] * 32 + [302] * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shfl.sync.up.b32 %r9, %r1, 2, 0, -1;", lambda i: i if i % 32 < 2 else i - 2),
        ("shfl.sync.down.b32 %r9, %r1, 2, 31, -1;", lambda i: i if i % 32 > 29 else i + 2),
        ("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1;", lambda i: i ^ 3),
        ("shfl.sync.idx.b32 %r9, %r1, 5, 31, -1;", lambda i: i // 32 * 32 + 5),
        # Segments of 8 threads.
        ("shfl.sync.idx.b32 %r9, %r1, 5, 6175, -1;", lambda i: i // 8 * 8 + 5),
        # Each thread names its own source.
        ("xor.b32 %r10, %r1, 9; shfl.sync.idx.b32 %r9, %r1, %r10, 31, -1;", lambda i: i ^ 9),
        ("redux.sync.add.u32 %r9, %r1, -1;", lambda i: sum(range(i // 32 * 32, i // 32 * 32 + 32))),
        ("redux.sync.max.s32 %r9, %r1, -1;", lambda i: i // 32 * 32 + 31),
        ("setp.lt.s32 %p1, %r1, 5; vote.sync.ballot.b32 %r9, %p1, -1;", lambda i: 31 * (i < 32)),
        ("setp.lt.s32 %p1, %r1, 5; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;",
         lambda i: i < 32),
    ],
)  # fmt: skip
def test_warps(text, expected):
    assert run(text + STORE).tolist() == [expected(i) for i in range(64)]
