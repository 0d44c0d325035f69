"""PEFT's name for the method, a member of an enum that has no door for guests."""

from peft.utils import PeftType

NAME = "MORAM"


def peft_type() -> PeftType:
    """`PeftType.MORAM`, made where it is not there yet.

    A plain text in PEFT's tables would do for PEFT, but transformers asks for the member's `value`.
    """
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    vars(member)["_sort_order_"] = len(PeftType.__members__)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    return member
