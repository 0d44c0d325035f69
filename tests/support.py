"""Helpers that tests share: the error budget, operator cases, and how to run one. No tests here."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from moram_kernels import SelfActivation, retrieve, torch_backend

ROOT = Path(__file__).resolve().parents[1]
DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
LEAVES = ("x", "current_keys", "current_values", "residual")


def assert_within_budget(actual, low, high):
    """The error of `actual` is at most twice that of `low` plus one rounding step.

    For both the largest and the root mean square of the elements, called |.| here:

        |actual - high| <= 2 |low - high| + eps(dtype of actual) |high|

    Args:
        actual: the result under test.
        low: the plain low-precision run, dtype and shape of actual.
        high: the float64 run on the same inputs.
    """
    assert actual.dtype == low.dtype and high.dtype == torch.float64, (actual.dtype, low.dtype)
    assert actual.shape == low.shape == high.shape, (actual.shape, low.shape, high.shape)
    if not high.numel():
        return
    for name, size in (
        ("max", lambda t: t.abs().max()),
        ("rms", lambda t: t.square().mean() ** 0.5),
    ):
        error, plain = size(actual.double() - high).item(), size(low.double() - high).item()
        budget = 2 * plain + torch.finfo(actual.dtype).eps * size(high).item()
        # Written so that a NaN on either side fails.
        assert error <= budget, f"{name} error {error:.3e} > {budget:.3e}, plain {plain:.3e}"


@dataclass(frozen=True)
class Case:
    """One call of the operator; grad is the output's gradient, None that of a sum (stride 0)."""

    x: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    current_keys: torch.Tensor | None
    current_values: torch.Tensor | None
    residual: torch.Tensor | None
    grad: torch.Tensor | None
    activation: SelfActivation
    training: bool
    num_frozen: torch.Tensor | None = None

    def to(self, dtype):
        """The same numbers in another dtype."""
        return self._map(lambda t: t.to(dtype))

    def without_spare_rows(self):
        """The same bank with exactly its live rows."""
        if self.num_frozen is None:
            return self
        count = int(self.num_frozen)
        return replace(self, keys=self.keys[:count], values=self.values[:count], num_frozen=None)

    def _map(self, change):
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{
                name: change(t)
                for name, t in tensors.items()
                if isinstance(t, torch.Tensor) and t.is_floating_point()
            },
        )


def make_case(
    seed,
    lead,
    frozen,
    current,
    width,
    out,
    *,
    top_k=8,
    temperature=0.3,
    threshold=0.2,
    eps=1e-12,
    training=True,
    residual=True,
    integers=False,
    dtype=torch.float64,
):
    """A random case; x is [*lead, width]. Small integers make scores exact, hence ties exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return Case(
        x=draw(*lead, width),
        keys=draw(frozen, width, scale=width**-0.5),
        values=draw(frozen, out),
        current_keys=draw(current, width, scale=width**-0.5) if current else None,
        current_values=draw(current, out) if current else None,
        residual=draw(*lead, out) if residual else None,
        grad=draw(*lead, out),
        activation=SelfActivation(top_k, temperature, threshold, eps),
        training=training,
    )


def keep_separated(case, tokens, margin=1e-3):
    """The first `tokens` rows of a case [M, ..] whose selection no rounding can change.

    In units of the norm, the scores on both sides of the top_k border differ by at least `margin`,
    and at inference no score is closer than that to the threshold.
    """
    bank = [t for t in (case.keys, case.current_keys) if t is not None]
    scores = case.x.double() @ torch.cat(bank).double().T
    norm_scores = scores / scores.norm(dim=-1, keepdim=True)
    top_k, threshold = case.activation.top_k, case.activation.threshold
    clear = torch.ones(len(scores), dtype=torch.bool)
    if not case.training and threshold > 0:
        clear &= ((norm_scores - threshold).abs() > margin).all(-1)
    if top_k < scores.shape[1]:
        ordered = norm_scores.sort(dim=-1, descending=True).values
        clear &= ordered[:, top_k - 1] - ordered[:, top_k] > margin
    rows = clear.nonzero().squeeze(-1)[:tokens]
    assert len(rows) == tokens, f"only {len(rows)} of {tokens} rows are separated; draw more"
    picked = {n: getattr(case, n) for n in ("x", "residual", "grad")}
    return replace(case, **{n: None if t is None else t[rows] for n, t in picked.items()})


def take_large_routes(monkeypatch):
    """Make the torch backend treat small problems as it treats large ones."""
    for name, value in (("FEW_SCORES", 0), ("DENSE_MACS", 0), ("GATHER_RATIO", 4)):
        monkeypatch.setattr(torch_backend, name, value)


def laid_out(tensor, layout):
    """The same numbers (for "expanded": the first row's) in another memory layout."""
    if layout == "rows" or tensor.dim() < 2 or not tensor.numel():
        return tensor
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "strided":
        gaps = torch.full_like(tensor, float("nan"))
        return torch.stack([tensor, gaps], dim=-1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return tensor[..., :1, :].expand_as(tensor)
    raise ValueError(f"layout must be rows, transposed, strided or expanded, got {layout!r}")


def far_rows(tensor, step=2**27 + 64):
    """The same numbers with `step` numbers from row to row; memory that nobody touches is free."""
    rows, columns = tensor.shape
    buffer = torch.empty((rows - 1) * step + columns, dtype=tensor.dtype)
    return buffer.as_strided((rows, columns), (step, 1)).copy_(tensor)


def with_spare_rows(case, spare):
    """Rows of NaN after the live frozen atoms, which nothing may read."""

    def pad(table):
        return torch.cat([table, table.new_full((spare, table.shape[1]), float("nan"))])

    count = torch.tensor(case.keys.shape[0])
    return replace(case, keys=pad(case.keys), values=pad(case.values), num_frozen=count)


def run(case, backend, wanted=LEAVES):
    """The output and the gradients of the wanted leaves, by name; inputs must stay untouched."""
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    activation, training, grad = (tensors.pop(n) for n in ("activation", "training", "grad"))
    before = {n: t._version for n, t in tensors.items() if t is not None}
    # A detached view keeps the strides, so the backend meets the layout that the case has.
    leaves = {n: tensors[n].detach() for n in wanted if tensors[n] is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = retrieve(
        **{**tensors, **leaves}, activation=activation, training=training, backend=backend
    )
    results = {"output": output.detach()}
    if leaves:
        if grad is None:
            output.sum().backward()
        else:
            output.backward(grad)
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        results[name] = leaf.grad
    after = {n: t._version for n, t in tensors.items() if t is not None}
    assert after == before, f"an input was written to: {before} -> {after}"
    return results


def assert_parity(case, tolerance=1e-10, wanted=LEAVES):
    """The torch backend agrees with the reference, which sees the bank without spare rows."""
    actual = run(case, "torch", wanted)
    expected = run(case.without_spare_rows(), "reference", wanted)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
