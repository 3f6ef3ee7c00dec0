"""Many devices and two processes, which need processes of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import on_many_devices as case

from partnewton.engines import ENGINES

TESTS = Path(__file__).parent
PATHS = os.pathsep.join([str(TESTS.parent), str(TESTS)])
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "1",
    "PYTHONPATH": PATHS,
}


@pytest.mark.slow
def test_on_eight_devices():
    """The tests of support/on_many_devices.py, each in one process with the others."""
    checks = str(TESTS / "support" / "on_many_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", checks]
    environment = {**ENVIRONMENT, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_in_two_processes(engine):
    address = f"localhost:{_free_port()}"
    script = str(TESTS / "support" / "one_of_two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, str(number), engine],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    with jax.enable_x64(True):
        params, state = case.on_one_device(engine)
    expected = [*jax.tree.leaves(params), state[1].learning_rates]
    for printed, _ in outputs:
        found = json.loads(printed.splitlines()[-1])
        assert found["devices"] == 4
        for x, y in zip(found["values"], expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
