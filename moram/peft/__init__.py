"""MoRAM as a PEFT method. Importing this registers it; PEFT cannot load an adapter without.

    import moram.peft
    model = get_peft_model(model, moram.peft.MoRAMPeftConfig(atoms_per_task=8, protect=0.95))

`moram.task`, `moram.grow`, `moram.save`, `moram.load` and the inspection take PEFT's models as any
other: a layer of theirs is a `MoRAMLinear`.
"""

try:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "peft":
        raise
    raise ModuleNotFoundError(
        "moram.peft needs PEFT, which is not installed: pip install 'moram[peft]'", name="peft"
    ) from error

from .config import MoRAMPeftConfig
from .layer import MoRAMTunerLinear
from .names import peft_type
from .tuner import MoRAMTuner

__all__ = ["MoRAMPeftConfig", "MoRAMTuner", "MoRAMTunerLinear"]

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name="moram", config_cls=MoRAMPeftConfig, model_cls=MoRAMTuner, prefix="moram_"
    )
