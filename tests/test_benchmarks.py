"""The networks of the benchmark, and a very small run of it."""

import doctest
import functools
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import quick_jit
from support.selection import some

import partnewton as pn
from partnewton._refresh import default_refreshes

sys.path.append(str(Path(__file__).parents[1]))  # at the end: it hides nothing

from benchmarks import (
    cost,
    cost_cases,
    cost_report,
    cost_training,
    models,
    problems,
    reporting,
    state,
    training_optimizers,
    training_report,
    training_seconds,
)
from benchmarks.summary import command_line, measure, report
from benchmarks.summary.measure import Measurement
from benchmarks.training_loop import TrainingCurves

NETWORKS = models.NETWORKS | models.MORE
SMALL = ["--scale", "16", "--batch", "2", "--repeats", "2"]


def run(folder, *arguments):
    """The JSON of a very small run."""
    assert command_line.main([*arguments, *SMALL, "--output", str(folder)]) == 0
    return json.loads((folder / "summary.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark") / "made by the run"


@pytest.fixture(scope="module")
def record(folder):
    return run(folder, "--model", "mlp")


@pytest.mark.slow
def test_several_networks_have_a_process_each(tmp_path):
    rows = run(tmp_path, "--model", "mlp", "lstm", "--engine", "adjoint")["rows"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == ["mlp", "lstm"]
    assert all(len(row["seconds"]) == 2 for row in rows)


# --- The networks ----------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_documented_number_of_tensors(name):
    params = jax.eval_shape(lambda: models.make(name).params)
    assert len(jax.tree.leaves(params)) == NETWORKS[name].tensors


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # weights and biases of each layer, by hand
        ("mlp_deep", 3072 * 1024 + 19 * 1024**2 + 20 * 1024 + 1024 * 10 + 10),
        ("mlp", 784 * 1024 + 1024 * 200 + 200 * 100 + 100 * 10 + 1334),
        ("vgg11", 9 * (192 + 8192 + 98304 + 131072 + 3 * 262144) + 2752 + 5130),
        # the stem, 4 stages, their norms, the output: the usual ResNet-18 for CIFAR-10
        ("resnet18", 11_173_962),
        ("transformer", 256 * 128 + 64 * 128 + 2 * (12 * 128**2 + 10 * 128) + 256),
        ("transformer_6", 256 * 128 + 64 * 128 + 6 * (12 * 128**2 + 10 * 128) + 256),
        ("digits_cnn", 9 * 16 + 16 + 144 * 32 + 32 + (128 + 1) * 64 + (64 + 1) * 10),
        ("lstm", (64 + 128 + 1) * 4 * 128 + 128 * 10 + 10),
        ("cnn", 27 * 16 + 144 * 32 + 288 * 64 + 16 + 32 + 64 + 1024 * 10 + 10),
    ],
)
def test_a_network_has_the_parameters_of_its_description(name, count):
    params = jax.eval_shape(lambda: models.make(name).params)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    "name",
    some((*models.NETWORKS, "digits_cnn", "transformer_2_scan"), default=["mlp"]),
)
def test_every_tensor_matters_to_the_loss(name):
    model = models.make(name, 2, scale=16)
    compute = quick_jit(jax.value_and_grad(model.loss))
    value, gradient = compute(model.params, model.batch)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.any(leaf != 0)


@pytest.mark.parametrize("name", models.NETWORKS)
def test_the_batch_has_the_size_asked_for(name):
    batch = jax.eval_shape(lambda: models.make(name, 3, scale=16).batch)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {3}


@pytest.mark.slow
def test_a_scan_over_layers_is_the_loop_over_layers():
    loop = models.make("transformer", 2, scale=16)
    scan = models.make("transformer_2_scan", 2, scale=16)
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *loop.params["blocks"])
    stacked = loop.params | {"blocks": blocks}
    jax.tree.map(np.testing.assert_array_equal, scan.params, stacked)
    expected, gradient = jax.jit(jax.value_and_grad(loop.loss))(*loop[2:])
    found, of_scan = jax.jit(jax.value_and_grad(scan.loss))(*scan[2:])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *gradient["blocks"])
    for x, y in zip(*map(jax.tree.leaves, (of_scan, gradient)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


# --- The measurement -------------------------------------------------------------


def check_completeness(record, model, quantities):
    engines = (*command_line.ENGINES, measure.HESSIAN_OF_PHI)
    assert [(row["engine"], row["quantity"]) for row in record["rows"]] == [
        ("", "forward"),
        ("", "gradient"),
        *[(x, y) for x in engines for y in quantities],
    ]
    for row in record["rows"]:
        assert row["skipped"] is None
        assert (row["model"], row["batch"]) == (model, 2)
        assert row["subsets"] == models.NETWORKS[model].tensors
        assert len(row["seconds"]) == 2
        assert row["compile_seconds"] > row["trace_seconds"] > 0
        assert row["temp_bytes"] >= 0
        assert row["flops"] > 0
        # Engines and their rival compute the same.
        assert (row["difference"] is None) == (row["engine"] == "")
        assert (row["difference"] or 0) < 1e-4


@pytest.mark.slow
def test_everything_asked_for_is_measured(record):
    check_completeness(record, "mlp", ("hessian", "third"))


@pytest.mark.slow
def test_everything_asked_for_is_measured_of_the_whole_third_order(tmp_path):
    record = run(tmp_path, "--model", "lstm", "--tensor")
    check_completeness(record, "lstm", ("hessian", "third", "tensor"))


@pytest.mark.slow
def test_the_table_is_written(record, folder):
    lines = (folder / "summary.md").read_text("utf-8").splitlines()
    assert record["machine"]["cpu"] in lines[0]
    starts = [f"| mlp | 8 | {row['engine']} | " for row in record["rows"][2:]]
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 2


@pytest.mark.slow
def test_costs_are_multiples_of_a_gradient(record):
    forward, gradient = (row["median"] for row in record["rows"][:2])
    for row in record["rows"][2:]:
        np.testing.assert_allclose(row["gradients"], row["median"] / gradient)
        np.testing.assert_allclose(row["floor"], 1 + 8 / 2 * forward / gradient)


def test_a_different_result_is_seen():
    right = [np.array([1.0, 4.0]), np.zeros(2)]
    assert measure._difference(right, right) == 0
    wrong = [np.array([1.0, 3.0]), np.zeros(2)]
    assert measure._difference(wrong, right) == 0.25
    assert measure._difference([right[0], np.array([0, 0.5])], right) == 0.5
    assert np.isnan(measure._difference([right[0], np.array([0, np.nan])], right))


@pytest.mark.slow
def test_what_is_too_large_or_too_slow_is_skipped_with_a_reason():
    model = models.make("mlp", 2, scale=16)
    options = {"repeats": 1, "engines": ["jvp_of_grad"]}
    *_, large = measure.measure(model, max_gib=1e-9, **options)
    assert "GiB (--max-gib)" in large.skipped
    assert large.temp_bytes > 0
    *_, slow = measure.measure(model, max_seconds=1e-9, **options)
    assert "(--max-seconds)" in slow.skipped
    for row in (large, slow):
        assert row.seconds == []
        assert row.skipped in report.table([row_of_gradient(), row])


def row_of_gradient():
    return Measurement("mlp", 2, 8, "", "gradient", compile_seconds=1.0, seconds=[1.0])


@pytest.mark.slow
def test_without_an_engine_the_gradient_alone_is_measured(tmp_path):
    record = run(tmp_path, "--model", "mlp", "--engine")
    assert [row["quantity"] for row in record["rows"]] == ["forward", "gradient"]


def test_a_median_in_gradients():
    rows = [
        Measurement("mlp", 2, 8, "", "forward", seconds=[1.0, 1.5, 9.0]),
        Measurement("mlp", 2, 8, "", "gradient", seconds=[3.0, 1.0, 9.0]),
        Measurement("mlp", 2, 8, "jvp_of_grad", "hessian", seconds=[30.0, 9.0, 12.0]),
    ]
    measure._in_gradients(rows)
    assert rows[2].gradients == 4
    assert rows[2].floor == 1 + 4 * 0.5


@pytest.mark.parametrize("name", ["summary.report", "cost_report"])
def test_examples(name):
    results = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "alexnet"], "alexnet"),
        (["--engine", "guess"], "guess"),
        (["--batch", "0"], "must be an integer from 1"),
        (["--repeats", "two"], "must be an integer from 1"),
        (["--max-gib", "-1"], "--max-gib"),
        (["--max-seconds", "nan"], "must be a positive number"),
        (["--output", __file__], "--output"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, word, capsys):
    with pytest.raises(SystemExit) as error:
        command_line.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert word in message


# --- The cost of a training step -----------------------------------------------------


def test_a_training_step_is_measured():
    training = cost_training.CompiledStep("spirals", "adamw")
    row = training.row
    assert (row.subsets, row.parameters) == (6, 2 * 32 + 32 * 32 + 32 * 2 + 66)
    assert row.state_bytes == 2 * 4 * row.parameters + 4  # two moments and a count
    assert row.compile_seconds > row.trace_seconds > 0
    assert training.steps(1e-9) == cost_training.LEAST_STEPS
    for _ in range(2):  # from the same place, which is not donated
        *both, refreshes = training.turn(3)
        for times in both:
            assert len(times) == 3
            assert min(times) > 0
        assert refreshes == []


@pytest.mark.slow
def test_the_refreshes_that_are_measured_are_those_that_are_made():
    training = cost_training.CompiledStep("diabetes", "partition_newton")
    assert training.row.long_run_refreshes > 0
    assert training.turn(21)[2] == [0, 20]


def test_the_persistent_cache_is_not_used_and_then_as_it_was(monkeypatch):
    seen = []
    step_of = cost_training.training_step

    def spy(*args):
        seen.append(jax.config.jax_enable_compilation_cache)
        return step_of(*args)

    monkeypatch.setattr(cost_training, "training_step", spy)
    before = jax.config.jax_enable_compilation_cache
    cost_training.CompiledStep("diabetes", "sgd")
    assert seen == [False]
    assert jax.config.jax_enable_compilation_cache == before


@pytest.mark.parametrize("S", [1, 20, 26, 99, 268])
def test_the_shortest_timing_has_two_refreshes(S):
    steps = cost_training.LEAST_STEPS
    for name in ("partition_newton", "direction+rates"):
        refreshes = cost_cases.optimizer(name).refreshes(steps, S)
        assert refreshes == default_refreshes(steps, S) == [0, 20]
    assert cost_cases.optimizer("direction+lookback").refreshes(steps, S) == []


def test_the_average_step_is_that_of_a_thousand():
    """Steps of 1 s, refreshes of 11 s, fifty of them in a thousand steps."""
    times = [11.0, 1.0, 1.0, 11.0, 1.0]
    row = row_of("ours", turns=[times], refreshes=[0, 3], long_run_refreshes=50)
    assert row.without_refresh == pytest.approx(1.0)
    assert row.average == pytest.approx(1.5)


def test_the_transformations_together_are_the_preset():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    chain = cost_cases.optimizer("+".join(cost_cases.TRANSFORMATIONS)).make()
    found, expected = chain.init(params), pn.partition_newton().init(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


# The others are these with more layers.
DIFFERENT = [
    x
    for x in cost_cases.NETWORKS
    if not x.startswith(("transformer_12", "transformer_24"))
]


@pytest.mark.parametrize("network", some(DIFFERENT, default=["diabetes"]))
def test_each_network_of_the_cost_takes_a_step_in_small(network):
    training = cost_training.CompiledStep(network, "sgd", scale=16)
    seconds, *_ = training.turn(1)
    assert seconds[0] > 0
    assert training.row.compile_seconds > 0


def test_the_state_of_the_preset_is_that_of_its_parts():
    """One copy of the parameters and a few S x S numbers beside the direction's."""
    names = ["partition_newton", *cost_cases.TRANSFORMATIONS]
    whole, direction, rates, lookback = state.bytes_per_parameter("digits_cnn", names)
    assert whole == pytest.approx(direction + rates + lookback)
    assert lookback == pytest.approx(4.0, abs=0.01)
    assert rates < 0.1


def row_of(optimizer, **fields):
    sizes = {"subsets": 8, "parameters": 100, "state_bytes": 800, "init_seconds": 0.1}
    times = {"trace_seconds": 1.0, "compile_seconds": 2.0}
    return cost_report.Row("cnn", optimizer, **(sizes | times | fields))


def test_costs_are_multiples_of_those_of_muon():
    """Medians over the turns, then means over the steps."""
    turns = [[9.0, 1.0, 1.0, 1.0], [5.0, 9.0, 1.0, 1.0], [5.0, 1.0, 1.0, 7.0]]
    rows = [
        row_of("muon", turns=[[1.0]], cpu_turns=[[0.5]]),
        row_of(
            "ours",
            compile_seconds=5.0,
            turns=turns,
            cpu_turns=[[2.0, 1.0, 1.0, 1.0]],
            refreshes=[0],
            long_run_refreshes=250,
        ),
        row_of("compiled"),
    ]
    assert rows[1].as_json()["step_seconds"] == [5, 1, 1, 1]
    cells = [line.split(" | ") for line in cost_report.table(rows).splitlines()[2:]]
    assert cells[0][3:8] == ["1.00"] * 5
    assert cells[1][3:8] == ["2.50", "2.00", "1.00", "2.50", "2.00"]
    assert cells[1][8:11] == ["5.00", "2000.000", "1000.000"]
    assert cells[1][15] == "8.0"  # bytes a parameter
    assert cells[2][3:8] == ["1.00", *4 * ["-"]]
    (alone,) = cost_report.table(rows[1:2]).splitlines()[2:]
    assert alone.split(" | ")[3:8] == 5 * ["-"]


@pytest.mark.slow
def test_costs_are_written_after_each_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "executor", lambda: ThreadPoolExecutor(1))
    names = ["--networks", "spirals", "--optimizers", "sgd", "lookback"]
    rest = ["--turns", "1", "--seconds", "0.01", "--output", str(tmp_path)]
    written = []

    def write(*args, rows, **kwargs):
        written.append([row["number_of_turns"] for row in rows])
        real_write(*args, rows=rows, **kwargs)

    real_write = reporting.write
    monkeypatch.setattr(reporting, "write", write)
    assert cost.main([*names, *rest]) == 0
    assert written == [[0], [0, 0], [1, 0], [1, 1]]
    record = json.loads((tmp_path / "cost.json").read_text("utf-8"))
    assert [row["optimizer"] for row in record["rows"]] == ["sgd", "lookback"]
    assert all(row["average"] > 0 for row in record["rows"])
    lines = (tmp_path / "cost.md").read_text("utf-8").splitlines()
    assert record["machine"]["cpu"] in lines[0]
    assert sum(line.startswith("| spirals | 6 | ") for line in lines) == 2


@pytest.mark.slow
def test_each_optimizer_has_a_process_of_its_own(tmp_path):
    names = ["--networks", "spirals", "--optimizers", "sgd", "adamw"]
    assert cost.main([*names, "--quick", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cost.json").read_text("utf-8"))["rows"]
    assert [row["number_of_turns"] for row in rows] == [1, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--networks", "alexnet"],
        ["--optimizers", "muon+rates"],
        ["--turns", "0"],
        ["--output", __file__],
    ],
)
def test_a_wrong_argument_of_the_cost_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cost.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert arguments[1] in message


# --- Training ------------------------------------------------------------------------


def test_losses_at_equal_gradients_are_read_off_the_curves():
    """Ours costs 2 gradients a step, so it has gone half as far as Adam."""

    def entry(*losses: float) -> dict:
        curves = [[list(losses)]]
        return {"rates": [1.0], "train": curves, "metric": curves}

    row = {
        "partition_newton": entry(1.0, 1e-2, 1e-4),
        "adam_c": entry(1.0, 1e-1, 1e-3),
        "seconds": {
            "gradient": 2.0,
            "adam_c": 2.5,
            "muon_c": 5.0,
            "partition_newton": 7.0,
        },
    }
    assert training_report._equivalents(row) == 2
    found = training_report._ratio_at_equal_gradients(row, "partition_newton")
    np.testing.assert_allclose(found, 10, rtol=1e-6)
    np.testing.assert_allclose(
        training_report._ratio_at_equal_gradients(row, "adam"), 1
    )
    text = training_report.markdown({"curve": row})
    assert "| curve | 2.00 |" in text


def test_at_equal_seconds_the_faster_optimizer_makes_more_steps(monkeypatch):
    """Losses are 1 / steps here, and a step of Adam takes a quarter of the time."""
    problem = problems.make("diabetes")
    adam = training_optimizers.OPTIMIZERS["adam_s"].make

    def timed_run(problem, make, rates):
        return lambda: 0.5 if make is adam else 2.0

    def train(problem, make, rates, seeds):
        shape = len(rates), seeds, 26
        best = np.arange(len(rates)) == 1  # the others are worse
        loss = np.broadcast_to(np.where(best, 1, 2)[:, None, None], shape)
        return TrainingCurves(*[loss / problem.steps] * 3)

    monkeypatch.setattr(training_seconds, "timed_run", timed_run)
    monkeypatch.setattr(training_seconds, "train", train)
    row = training_seconds._measured("diabetes", 2)
    assert row["adam_s"]["steps"] == 4 * problem.steps
    assert row["muon_s"]["steps"] == row["total_steps"]["steps"] == problem.steps
    line = training_seconds.table({"diabetes": row})[2]
    assert line.endswith("| 8.00 | 8.00 |")  # ours has one rate, the worse one here
    assert f"({4 * problem.steps})" in line


def test_the_conclusion_counts_problems_at_equal_seconds():
    def entry(loss, *metrics):
        return {
            "steps": 100,
            "train": [[[loss]] * 2],
            "metric": [[[x] for x in metrics]],
        }

    rivals = {"adam_s": entry(3.0, 9.0, 9.0), "muon_s": entry(1.0, 0.4, 0.6)}
    ours = {
        "level": entry(1.005, 0.5, 0.8),  # 0.15 above a mean of 0.5, whose range is 0.2
        "near": entry(1.15, 0.1, 0.1),
        "far": entry(2.0, 0.6, 0.9),
        "broken": entry(2.0, 0.6, np.nan),
    }
    rows = {x: {"total_steps": found, **rivals} for x, found in ours.items()}
    text = training_seconds.conclusion(rows, "total_steps")
    assert "within 1 %, on 1 of 4 problems; within 20 % on 2;" in text
    assert text.endswith("range of its seeds on 2: `far`, `broken`.")


@pytest.mark.parametrize("name", some(problems.UNSEEN, default=["denoising"]))
def test_an_unseen_problem_can_be_trained_and_tested_on(name):
    problem = problems.make(name)
    params = problem.init(jax.random.key(0))
    batch = [x[: problem.batch] for x in problem.train]
    loss, gradient = quick_jit(jax.value_and_grad(problem.loss))(params, *batch)
    assert np.isfinite(loss)
    assert np.isfinite(problem.metric(params, *problem.test))
    # Of a difference of scores, the last bias is no part.
    still = sum(not np.any(x) for x in jax.tree.leaves(gradient))
    assert still == (name == "ranking")
    assert all(len(x) > 100 for x in (*problem.train, *problem.test))


@pytest.mark.slow
def test_a_variant_without_a_change_is_the_preset():
    """What the table of variants compares with is what users call."""
    problem = problems.make("diabetes")
    batch = [x[:32] for x in problem.train]

    def run(tx):
        def step(carry, _):
            params, state = carry
            value_fn = functools.partial(problem.loss, x=batch[0], y=batch[1])
            grads = jax.grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        params = problem.init(jax.random.key(0))
        return jax.lax.scan(step, (params, tx.init(params)), length=45)[0][0]

    expected = jax.jit(lambda: run(pn.partition_newton()))()
    found = jax.jit(lambda: run(training_optimizers._variant()))()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_variants_are_compared_with_adam_and_with_the_defaults():
    def entry(loss: float) -> dict:
        return {"rates": [1.0], "train": [[[1.0, loss]]], "metric": [[[1.0, loss]]]}

    results = {
        "a": {"adam_c": entry(0.1), "partition_newton": entry(0.01)},
        "b": {"adam_c": entry(0.1), "partition_newton": entry(0.2)},
    }
    results["a"]["shrinkage=0"] = entry(0.4)
    results["b"]["shrinkage=0"] = entry(0.1)
    text = training_report.markdown(results)
    assert "| partition_newton | 0.447 | 1 of 2 | 1 (a) | 1 (a) |" in text
    assert "| shrinkage=0 | 2 | 1 of 2 | 40 (a) | 0.5 (b) |" in text
