"""A training step compiled and timed, each optimizer in a process of its own."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
import optax

import partnewton as pn
from benchmarks import cost_cases, reporting
from benchmarks.cost_report import LONG_RUN, Row
from benchmarks.training_step import training_step
from partnewton._refresh import size_for_intervals

__all__ = ["CompiledStep", "measure"]

PyTree = Any
LEAST_STEPS, MOST_STEPS = 30, 200  # of a turn: two refreshes and two look backs
WARM = 0.2  # seconds; a shorter step is timed after one that warms the caches again


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


class CompiledStep:
    """A compiled training step, and the parameters and the state that it starts from.

    Args:
      network: a key of `cost_cases.NETWORKS`.
      name: of the optimizer.
      scale: by which the widths of the network are divided.

    Attributes:
      row: what was measured so far.
    """

    @_without_persistent_cache()
    def __init__(self, network: str, name: str, scale: int = 1):
        model = cost_cases.NETWORKS[network](scale=scale)
        chosen = cost_cases.optimizer(name)
        tx = optax.with_extra_args_support(chosen.make())
        self._is_brief = True
        partition = pn.partitions.partition_of(model.params, pn.partitions.auto)
        size = size_for_intervals(partition)
        self._batch = model.batch
        begin = time.process_time()
        state = jax.block_until_ready(tx.init(model.params))
        init_seconds = time.process_time() - begin
        # Copies: a state may hold the parameters themselves, which are donated once.
        self._start = _copy((model.params, state))
        jax.clear_caches()
        # A call of it finds what `compile` has made.
        self._step = jax.jit(training_step(model.loss, tx), donate_argnums=(0, 1))
        begin = time.process_time()
        lowered = self._step.lower(*self._start, self._batch)
        trace_seconds = time.process_time() - begin
        compiled = lowered.compile()
        compile_seconds = time.process_time() - begin
        self.row = Row(
            network,
            name,
            partition.size,
            optax.tree.size(model.params),
            init_seconds,
            trace_seconds,
            compile_seconds,
            sum(x.nbytes for x in jax.tree.leaves(state)),
            reporting.temp_bytes(compiled),
            long_run_refreshes=len(chosen.refreshes(LONG_RUN, size)),
        )

    def steps(self, seconds: float) -> int:
        """How many steps make a turn, of so many seconds if they can."""
        times, *_ = self._run(4)  # the first may have a refresh
        self._is_brief = min(times) < WARM
        return int(min(max(seconds / min(times), LEAST_STEPS), MOST_STEPS))

    def turn(self, steps: int) -> tuple[list[float], list[float], list[int]]:
        """Seconds and CPU seconds of the first steps, and which of them refresh."""
        if self._is_brief:
            self._run(1)
        return self._run(steps)

    def _run(self, steps: int) -> tuple[list[float], list[float], list[int]]:
        params, state = jax.block_until_ready(_copy(self._start))
        seconds, cpu_seconds, refreshes = [], [], []
        due = _next_refresh(state)
        for n in range(steps):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            params, state, _ = jax.block_until_ready(
                self._step(params, state, self._batch)
            )
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
            if n == due:
                refreshes.append(n)
                due = _next_refresh(state)
        return seconds, cpu_seconds, refreshes


def _next_refresh(state: PyTree) -> int | None:
    """The number of steps before the next refresh; None for other optimizers."""
    count = optax.tree.get(state, "next_refresh")
    return None if count is None else int(count)


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


_here: CompiledStep | None = None  # that of this process


def _prepare(network: str, name: str, scale: int) -> Row:
    global _here
    # Several processes share an accelerator.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    _here = CompiledStep(network, name, scale)
    return _here.row


def _steps(seconds: float) -> int:
    return _here.steps(seconds)


def _turn(steps: int) -> tuple[list[float], list[float], list[int]]:
    return _here.turn(steps)


def measure(
    network: str,
    names: Sequence[str],
    *,
    scale: int = 1,
    turns: int,
    seconds: float,
    max_seconds: float,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Compiles all optimizers on a network, then lets them take turns.

    Args:
      network: a key of `cost_cases.NETWORKS`.
      names: of optimizers.
      scale: by which the widths of the network are divided.
      turns: of each optimizer; 0 to compile and nothing else.
      seconds: of a turn, or 30 steps where these take longer.
      max_seconds: an optimizer has no further turn when its turns took so long in all.
      log: what takes a line about each step.

    Yields:
      A row whenever something was added to it, the same object each time.
    """
    with contextlib.ExitStack() as stack:
        rows: dict[str, Row] = {}
        processes: dict[str, Executor] = {}
        for name in names:
            processes[name] = stack.enter_context(reporting.executor())
            rows[name] = processes[name].submit(_prepare, network, name, scale).result()
            compiling = rows[name].compile_seconds
            log(f"{network} {name}: compiled in {compiling:.2f} CPU s")
            yield rows[name]
        counts: dict[str, int] = {}
        for _ in range(turns):
            for name, process in processes.items():
                if name not in counts:
                    counts[name] = process.submit(_steps, seconds).result()
                row = rows[name]
                if sum(map(sum, row.turns)) < max_seconds:
                    turn = process.submit(_turn, counts[name]).result()
                    times, cpu_times, row.refreshes = turn
                    row.turns.append(times)
                    row.cpu_turns.append(cpu_times)
                    log(f"{network} {name}: {1e3 * row.average:.3f} ms a step")
                    yield row
