"""Random cases of the operator, ordinary and adversarial. No tests here."""

import random
from dataclasses import replace

import torch
from support import make_case

KINDS = ("plain", "integers", "duplicates", "zero rows", "huge atom", "denormal")
SIZES = (1, 2, 3, 5, 16, 17, 31, 32, 33)
# (inputs, atoms, residual)
DTYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
)


def draw_case(seed, paths):
    """(case, path, kind, whether the scores are exact) for a seed."""
    r = random.Random(seed)
    path, kind = r.choice(paths), r.choice(KINDS)
    wide = path == "resident"
    top_k = r.choice((4, 8, 16) if wide else (1, 2, 3, 4, 7, 8, 16))
    num_atoms = r.choice((top_k, top_k + 1, 2 * top_k + 1, r.randint(1, 40), r.randint(1, 64)))
    current = r.choice((0, num_atoms, r.randint(0, num_atoms)))
    case = make_case(
        seed,
        (r.choice((1, 2, 3, 5)),),
        num_atoms - current,
        current,
        r.choice((32, 64) if wide else SIZES),
        r.choice((32, 64) if wide else SIZES),
        top_k=top_k,
        temperature=r.choice((0.03, 0.1, 0.3, 1.0)),
        threshold=r.choice((0.0, 0.1, 0.2)),
        training=path != "decode" and r.random() < 0.5,
        residual=r.random() < 0.7,
        integers=kind == "integers",
    )
    case = _spoil(case, kind, r)
    return _cast(case, r.choice(DTYPES)), path, kind, kind == "integers"


def _spoil(case, kind, r):
    if kind == "duplicates":
        # Copies of one strong key in both segments: they straddle the border of many rows.
        key = case.x[:1]
        for name in ("keys", "current_keys"):
            table = getattr(case, name)
            if table is not None and len(table):
                table[torch.arange(len(table)) % 2 == r.randint(0, 1)] = key
    if kind == "zero rows":
        case.x[:: r.choice((1, 2))] = 0
    if kind == "huge atom":
        table = case.keys if len(case.keys) else case.current_keys
        table[r.randrange(len(table))] *= 1e4
    if kind == "denormal":
        case.x[0] *= 1e-40
    return case


def _cast(case, dtypes):
    atoms = {n: getattr(case, n) for n in ("keys", "values", "current_keys", "current_values")}
    residual = None if case.residual is None else case.residual.to(dtypes[2])
    return replace(
        case,
        x=case.x.to(dtypes[0]),
        residual=residual,
        grad=case.grad.to(dtypes[0] if residual is None else dtypes[2]),
        **{n: None if t is None else t.to(dtypes[1]) for n, t in atoms.items()},
    )
