"""One of two processes that train one network: `python FILE ADDRESS NUMBER ENGINE`.

Each has two devices and half of each batch. Prints the parameters and the learning
rates at the end as JSON, in float64.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def main(address: str, number: int, engine: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    from support import on_many_devices as case

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    tx = case.make_optimizer(engine)
    mine = [np.split(x, 2)[number] for x in case.make_data()]
    over_data = NamedSharding(mesh, P("data"))
    batch = [jax.make_array_from_process_local_data(over_data, x) for x in mine]
    # Parameters sharded over both processes.
    params = jax.tree.map(
        lambda x, spec: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: x[index]
        ),
        case.make_params(),
        case.LAYOUTS["fsdp"],
    )
    step = jax.jit(case.make_step(tx, case.network_loss))
    params, state = case.train(step, params, jax.jit(tx.init)(params), *batch)
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    found = everywhere((params, state[1].learning_rates))
    values = [np.asarray(x).tolist() for x in jax.tree.leaves(found)]
    print(json.dumps({"devices": jax.device_count(), "values": values}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
