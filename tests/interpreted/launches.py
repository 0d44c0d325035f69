"""Intercepting launches: every kernel of the Triton backend, every product by a library."""

import sys
from contextlib import contextmanager

# Every module of the backend that launches something.
from moram_kernels.triton_backend import backward, forward, launcher  # noqa: F401

PACKAGE = "moram_kernels.triton_backend"


@contextmanager
def intercepted(wrapper):
    """Within the block wrapper(launch, kernel, grid, *args, **meta) stands for every launch."""
    real = launcher.launch

    def launch(kernel, grid, *args, **meta):
        return wrapper(real, kernel, grid, *args, **meta)

    names = [name for name in sys.modules if name.startswith(PACKAGE)]
    users = [m for m in map(sys.modules.get, names) if getattr(m, "launch", None) is real]
    assert len(users) > 5, users
    for module in users:
        module.launch = launch
    try:
        yield
    finally:
        for module in users:
            module.launch = real


@contextmanager
def counted():
    """Within the block the list that it yields grows by the name of every kernel and product."""
    names = []

    def note(launch, kernel, grid, *args, **meta):
        names.append(kernel.__name__)
        return launch(kernel, grid, *args, **meta)

    def noting(name, function):
        def call(*args):
            names.append(name)
            return function(*args)

        return call

    products = {name: getattr(launcher, name) for name in ("multiply", "multiply_add")}
    for name, function in products.items():
        setattr(launcher, name, noting(name, function))
    try:
        with intercepted(note):
            yield names
    finally:
        for name, function in products.items():
            setattr(launcher, name, function)
