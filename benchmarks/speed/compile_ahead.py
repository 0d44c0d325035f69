"""Kernels compiled ahead by as many processes as there are cores, while the GPU already works.

`Ahead` starts the workers (`compile_worker.py`), which fill Triton's cache on disk in the order of
the items, and says when the kernels of an item are there. Nothing depends on them but time: what
they did not compile, the launch does. A worker sends one JSON object a line:

    {"worker": 0, "ready": seconds since it was started}
    {"kernel": label, "name": .., "seconds": .., "cpu_seconds": .., "new": whether compiled anew}
    {"item": index, "needs": [labels of the kernels that others compile or compiled]}
    {"problem": sentence}
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from compile_worker import Machine, Order

WORKER = Path(__file__).with_name("compile_worker.py")
# Longer is not waited for one item; its kernels are compiled by the launch then.
PATIENCE = 90


class Ahead:
    """Workers that compile the kernels of items, and what is known of their progress.

    Args:
        items: `gpu_parity.Check`s and (`gpu_cases.Case`, contender)s, first needed first.
        machine: `Machine`. workers: number of processes; 0 compiles nothing ahead.
        environment: variables of the workers besides this process's own.
        known: messages of kernels that need not be compiled.
    """

    def __init__(self, items, machine, workers, environment=None, known=()):
        self.index = {item: i for i, item in enumerate(items)}
        self.kernels = {kernel["kernel"]: kernel for kernel in known}
        self.needs, self.problems, self.starts = {}, [], []
        self.changed, self.finished = threading.Condition(), workers == 0
        self.processes, self.claims = [], None
        if not workers:
            return
        self.claims = tempfile.TemporaryDirectory()
        for label in self.kernels:
            Path(self.claims.name, label).touch()
        source, channel = os.pipe()
        # They must never reach the GPU, and one thread each is enough.
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        } | (environment or {})  # fmt: skip
        for worker in range(workers):
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(channel)],
                stdin=subprocess.PIPE, pass_fds=(channel,), env=environment,
                start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            order = Order(machine, list(items), Path(self.claims.name), worker, time.time())
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(pickle.dumps(order))
        os.close(channel)
        self.reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self.reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self, source):
        with os.fdopen(source, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                with self.changed:
                    self._note(message)
                    self.changed.notify_all()
        # The last worker has closed its end.
        with self.changed:
            self.finished = True
            self.changed.notify_all()

    def _note(self, message):
        if "kernel" in message:
            self.kernels[message["kernel"]] = message
        elif "item" in message:
            self.needs.setdefault(message["item"], set(message["needs"]))
        elif "problem" in message:
            self.problems.append(message["problem"])
        else:
            self.starts.append(message["ready"])

    def is_ready(self, item):
        """Whether the kernels of an item are in the cache, as far as workers put them there."""
        needs = self.needs.get(self.index.get(item))
        return self.finished or (needs is not None and needs <= self.kernels.keys())

    def wait(self, item, left=PATIENCE):
        """Wait until an item is ready, at most the seconds that are left; whether it is."""
        with self.changed:
            return self.changed.wait_for(lambda: self.is_ready(item), min(left, PATIENCE))

    def wait_all(self, patience=None):
        """Wait until the workers have ended."""
        with self.changed:
            return self.changed.wait_for(lambda: self.finished, patience)

    @contextlib.contextmanager
    def quiet(self):
        """The workers stand still meanwhile, so that they disturb no clock."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number):
        for process in self.processes:
            if process.poll() is None:
                # The assembler that a worker has started, too.
                os.killpg(process.pid, number)

    def close(self):
        """End the workers; what they have compiled stays in the cache."""
        self._signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        if self.claims:
            self.claims.cleanup()


def this_machine(device=0):
    """The `Machine` of the GPU here, read from the driver; the workers must not ask it."""
    import gpu_cases
    import torch
    import triton

    driver, device = triton.runtime.driver.active, torch.device("cuda", device)
    target, kind = driver.get_current_target(), driver.launcher_cls
    return Machine(
        gpu_cases.gpu_name(device),
        (target.backend, target.arch, target.warp_size),
        dict(driver.utils.get_device_properties(device.index)),
        (kind.__module__, kind.__name__),
    )
