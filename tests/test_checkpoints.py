"""A run that is saved and restored in another process goes on bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as ocp
import partnewton as pn

command, optimizer = sys.argv[1:3]
folder = Path(sys.argv[3]) / "checkpoint"
# Saved after 7 steps: the rates in force are those of the sixth, due again at the 11th.
SAVED, END, INTERVAL = 7, 17, 5


def loss(params, x):
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean((hidden @ params["output"] - x.sum(axis=1)) ** 2)


def batch(i):
    key = jax.random.key(0 if optimizer == "subspace_newton" else i)
    return jax.random.normal(key, (16, 3))


OPTIMIZERS = {
    "adam_with_rates": lambda: optax.chain(
        optax.scale_by_adam(),
        pn.scale_by_partition_newton(
            update_interval=INTERVAL, average=pn.averaging.exponential(0.8)
        ),
        optax.scale_by_learning_rate(optax.exponential_decay(0.3, 5, 0.9)),
    ),
    "subspace_newton": pn.subspace_newton,
}
tx = OPTIMIZERS[optimizer]()


@jax.jit
def step(params, state, x):
    grads = jax.grad(loss)(params, x)
    updates, state = tx.update(grads, state, params, value_fn=loss, x=x)
    return optax.apply_updates(params, updates), state


rng = np.random.default_rng(0)
params = {
    "kernel": jnp.asarray(rng.normal(size=(3, 8)), jnp.float32),
    "bias": jnp.zeros(8),
    "output": jnp.asarray(rng.normal(size=8), jnp.float32),
}
state, start = tx.init(params), 0
if command == "restore":
    with ocp.StandardCheckpointer() as checkpointer:
        params, state = checkpointer.restore(folder, (params, state))
    start = SAVED
for i in range(start, END):
    if i == SAVED and command == "save":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, (params, state))
    params, state = step(params, state, batch(i))
leaves = [np.asarray(x) for x in jax.tree.leaves((params, state))]
print(json.dumps([x.tobytes().hex() for x in leaves]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam_with_rates", "subspace_newton"])
def test_a_restored_run_continues_bit_for_bit(tmp_path, optimizer):
    def run(command):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        arguments = [sys.executable, "-c", SCRIPT, command, optimizer, str(tmp_path)]
        done = subprocess.run(
            arguments, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    whole = run("save")
    assert run("restore") == whole
