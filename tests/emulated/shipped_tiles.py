"""Every tile and flag that the library ships for a target, as calls small enough to emulate.

The compile gate's calls are planned at their own sizes. Each plan, with its tiles, is then followed
on few tokens and features, which fill no tile, and on as many atoms as the call has.
"""

import itertools
from dataclasses import dataclass, replace

import configurations

# Numbers of tokens to try in place of a call's.
TOKENS = (3, 21, 67, 131, 203)


@dataclass(frozen=True)
class SmallCall:
    """A call to emulate.

    call: `configurations.Call` of small sizes. plan: of the same call at its own sizes.
    wanted: {form: `configurations.Launch`} that no other call of the target has.
    """

    call: configurations.Call
    plan: object
    wanted: dict

    @property
    def name(self):
        """What tells it from the others of a target."""
        c = self.call
        sizes = f"{c.atoms} atoms {c.tokens}x{c.width}x{c.out} top {c.top_k} current {c.current}"
        kinds = [c.path, c.dtype, "training" if c.training else "inference"]
        kinds += [] if c.precision == "ieee" else [c.precision]
        kinds += [f"onto {c.result}"] if c.result else []
        kinds += [f"with {c.bank} atoms"] if c.bank else []
        return f"{' '.join(kinds)} {sizes}"


def small_calls(target):
    """`SmallCall`s that together have every shipped form of a target.

    Args:
        target: "sm_80" or "sm_90".
    Raises:
        LookupError: no small sizes give a form of the shipped ones.
    """
    found = []
    for call in configurations.calls():
        forms = {launch.form: launch for launch in configurations.record(call, target)}
        found.append((call, forms))
    missing = set().union(*(forms for _, forms in found))
    while missing:
        call, forms = max(found, key=lambda one: len(one[1].keys() & missing))
        wanted = {form: forms[form] for form in sorted(forms.keys() & missing)}
        missing -= wanted.keys()
        yield _shrunk(call, target, wanted)


def _shrunk(call, target, wanted):
    plan = configurations.planned(call, target)
    # As many as give a gradient's sum its splits, of 32 or 64 tokens each.
    splits = max(launch.meta.get("SPLITS", 1) for launch in wanted.values())
    tokens = {*TOKENS, 32 * splits - 5, 64 * splits - 5, call.tokens}
    tokens = [size for size in tokens if 0 < size <= call.tokens]
    sizes = itertools.product(tokens, _widths(call.width), _widths(call.out))
    for tokens, width, out in sorted(sizes, key=lambda size: size[0] * (size[1] + size[2])):
        small = replace(call, tokens=tokens, width=width, out=out)
        forms = {launch.form for launch in configurations.record(small, target, plan)}
        # One token and one tile are too few to find a fault.
        if wanted.keys() <= forms and tokens > min(call.tokens - 1, _most_rows(wanted) // 2):
            return SmallCall(small, plan, wanted)
    raise LookupError(f"no small call of {target} has {', '.join(wanted)}")


def _most_rows(wanted):
    return max(launch.meta.get("BLOCK_M", 1) for launch in wanted.values())


def _widths(width):
    """Widths that leave as much over from a tile as this one, of several steps of a loop each."""
    return sorted({min(width, width % step + 3 * step) for step in (64, 128, 256)} | {width})
