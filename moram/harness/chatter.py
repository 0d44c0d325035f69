"""What libraries say of themselves while they are imported, kept out of a command's output."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Logger: how a message of it begins, its arguments aside. About the library's own code and
# optional kernels, which no command uses; whatever else these loggers say is passed on.
MESSAGES = {
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    "torchao": "Skipping import of cpp extensions",
}
# Modules whose warnings at import speak to their developers.
MODULES = r"torchao\."


@contextmanager
def without_chatter() -> Iterator[None]:
    """Within it, libraries that a command imports do not speak of themselves."""
    filters = {name: _without(start) for name, start in MESSAGES.items()}
    for name, drop in filters.items():
        logging.getLogger(name).addFilter(drop)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=MODULES)
            yield
    finally:
        for name, drop in filters.items():
            logging.getLogger(name).removeFilter(drop)


def _without(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(start)
