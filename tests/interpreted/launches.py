"""Intercepting launches: every kernel of the Triton backend, every product by a library."""

from contextlib import contextmanager
from unittest import mock

from moram_kernels.triton_backend import launcher


@contextmanager
def intercepted(wrapper):
    """Within the block wrapper(launch, kernel, grid, *args, **meta) stands for every launch."""
    real = launcher.start

    def start(kernel, grid, *args, **meta):
        return wrapper(real, kernel, grid, *args, **meta)

    with mock.patch.object(launcher, "start", start):
        yield


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
