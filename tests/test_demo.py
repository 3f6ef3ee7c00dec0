"""The demonstration, end to end, and what its command line says when it cannot run."""

import contextlib
import io
import json
import math
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from support.selection import some

import partnewton
from partnewton import demo
from partnewton.__main__ import main
from partnewton.demo import files, models, pinn, tables, text, training
from partnewton.demo.curves import Curves
from partnewton.demo.evaluation import evaluation
from partnewton.demo.experiment import BATCH, batch_indices
from partnewton.demo.pinn import problem as equation

PICTURES = ("losses.png", "partition.png")


@pytest.fixture(scope="module")
def no_network():
    def refuse(*_):
        pytest.fail("a connection was attempted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield


def loads_strictly(path):
    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


class ShortRun(NamedTuple):
    """The folder of a very short run, and what it printed."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, no_network):
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the run"
    arguments = ["--model", "mlp", "--steps", "4", "--seed", "7"]
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        assert main([*arguments, "--output", str(folder)]) == 0
    return ShortRun(folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def record(short_run):
    return loads_strictly(short_run.folder / "curves.json")


# --- End to end ------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_figures_are_written(short_run, name):
    content = (short_run.folder / name).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert len(content) > 20_000


def test_nothing_else_is_written(short_run):
    written = {path.name for path in short_run.folder.iterdir()}
    assert written == {*PICTURES, "curves.json"}


def test_all_optimizers_start_from_the_same_weights(record):
    curves = record["optimizers"]
    assert list(curves) == ["partition_newton", "adam", "sgd"]
    starts = {(c["train_loss"][0], c["test_accuracy"][0]) for c in curves.values()}
    assert len(starts) == 1
    ends = {c["train_loss"][-1] for c in curves.values()}
    assert len(ends) == 3


def test_the_json_is_complete(record):
    curves = record["optimizers"]
    for curve in curves.values():
        assert curve["steps"] == [0, 4]
        assert len(curve["train_loss"]) == len(curve["test_accuracy"]) == 2
        assert curve["seconds"][0] == 0
        assert curve["compile_seconds"] > 0
    tensors = ("hidden1", "hidden2", "output")
    names = [f"{tensor}/{x}" for tensor in tensors for x in ("bias", "kernel")]
    assert record["subsets"] == names
    logged = curves["partition_newton"]["logged"]
    assert {f"learning_rate/{name}" for name in names} < set(logged)
    assert {len(values) for values in logged.values()} == {1}
    assert curves["adam"]["logged"] == {}
    assert np.shape(record["summary"]["hessian"]) == (6, 6)
    np.testing.assert_allclose(np.abs(np.diagonal(record["correlation"])), 1)


@pytest.mark.slow
def test_what_is_logged_is_of_the_batch_of_the_refresh(tmp_path):
    """The second refresh and the step with it, by hand."""
    experiment = demo.prepare(config(tmp_path, model="mlp", steps=21))
    curves = demo.run(experiment).curves["partition_newton"]
    logged = curves.logged
    assert logged["step"] == [0, 20]
    assert logged["count"] == [1, 21]
    assert logged["next_refresh"] == [20, 40]
    assert curves.settings.endswith("2 refreshes")
    images, labels = (x[experiment.batches[0]] for x in experiment.dataset[:2])
    before = experiment.value_fn(experiment.params, images, labels)
    np.testing.assert_allclose(logged["loss"][0], before, rtol=1e-5)
    # A fifth of the way that is solved for is well within the reach of the model.
    np.testing.assert_allclose(logged["actual"], logged["predicted"], rtol=0.3)


@pytest.mark.parametrize(
    ("steps", "evaluated"),
    [(4, [0, 4]), (25, [0, 10, 20, 25]), (2500, list(range(0, 2501, 100)))],
)
def test_evaluations_are_ten_steps_apart_or_more(steps, evaluated):
    assert training._evaluated_steps(steps) == evaluated


@pytest.mark.parametrize("name", ["partition_newton", "adam", "sgd"])
def test_a_step_donates_the_buffers_of_its_state(tmp_path, name):
    experiment = demo.prepare(config(tmp_path, model="mlp", partition="whole"))
    optimizer = training.optimizers(experiment)[name]
    state = training.initial_params_and_state(experiment, optimizer)
    step = training._step(experiment, optimizer.tx)
    arguments = 0, state, experiment.dataset[:2], experiment.batches
    text = jax.jit(step, donate_argnums=1).lower(*arguments).as_text()
    aliased = text.count("tf.aliasing_output")
    assert aliased == len(jax.tree.leaves(state))


def test_gradient_equivalents_count_refreshes_at_their_measured_cost(record):
    ratio = record["refresh_seconds"] / record["gradient_seconds"]
    curves = record["optimizers"]
    assert curves["adam"]["gradient_equivalents"] == [0, 4]
    np.testing.assert_allclose(
        curves["partition_newton"]["gradient_equivalents"], [0, 4 + ratio]
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_curves(record, tmp_path):
    arguments = ["--model", "mlp", "--steps", "4", "--seed", "7"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    again = loads_strictly(tmp_path / "curves.json")
    for name, curve in record["optimizers"].items():
        for key in ("train_loss", "test_accuracy", "logged"):
            assert again["optimizers"][name][key] == curve[key]


def test_what_is_printed(short_run):
    folder, out, err = short_run
    for word in ("train loss", "test accuracy", "seconds", "gradient-equivalent"):
        assert word in out
    for word in (
        "learning rate 0.001",
        "learning rate 0.01, momentum 0.9",
        "no argument",
    ):
        assert word in out
    assert re.search("first step +median", out)
    assert str(folder / "losses.png") in out
    assert max(map(len, out.split("Wrote")[0].splitlines())) <= 100
    assert "seconds to Adam's loss" in out
    lines = err.splitlines()  # no bar, as it is not a terminal
    names = ("partition_newton", "adam", "sgd")
    phases = [[x, "4", "steps"] for x in names] + [
        ["measuring", "partition", "Hessian"]
    ]
    assert [line.split()[:3] for line in lines] == phases


def write_idx(folder):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("t10k", 5)):
        for kind, shape in (("images-idx3", (count, 6, 5)), ("labels-idx1", (count,))):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            entries = rng.integers(0, 10, shape, dtype=np.uint8).tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + entries)


@pytest.mark.slow
def test_training_on_the_files_of_a_folder(no_network, tmp_path):
    write_idx(tmp_path)
    output = tmp_path / "output"
    arguments = ["--model", "mlp", "--steps", "1", "--partition", "whole"]
    folders = ["--data-dir", str(tmp_path), "--output", str(output)]
    assert main([*arguments, *folders]) == 0
    assert loads_strictly(output / "curves.json")["dataset"] == tmp_path.name


@pytest.mark.slow
def test_training_on_text(no_network, tmp_path, capsys):
    arguments = ["--problem", "text", "--steps", "20", "--partition", "whole"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "transformer: 19710 parameters" in capsys.readouterr().out
    record = loads_strictly(tmp_path / "curves.json")
    assert (record["problem"], record["model"]) == ("text", "transformer")
    for curve in record["optimizers"].values():
        assert curve["train_loss"][-1] < curve["train_loss"][0]
    assert len(record["subsets"]) == 1


@pytest.fixture(scope="module")
def pinn_run(tmp_path_factory, no_network):
    """The folder of a short run of the differential equation, and its report."""
    folder = tmp_path_factory.mktemp("pinn")
    options = demo.Config("cnn", 40, 3, "per_tensor", None, folder, "pinn")
    results = pinn.run(pinn.prepare(options))
    pinn.write(results)
    return folder, pinn.report(results)


@pytest.mark.slow
def test_the_files_of_the_pinn(pinn_run):
    folder, _ = pinn_run
    assert {path.name for path in folder.iterdir()} == {*PICTURES, "curves.json"}
    for name in PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    record = loads_strictly(folder / "curves.json")
    assert (record["problem"], record["model"]) == ("pinn", "mlp")
    assert len(record["subsets"]) == 6
    assert np.shape(record["summary"]["hessian"]) == (6, 6)
    curves = record["optimizers"]
    assert list(curves) == ["subspace_newton", "lbfgs", "adam"]
    starts = {(c["train_loss"][0], c["error"][0]) for c in curves.values()}
    assert len(starts) == 1
    ours = curves["subspace_newton"]
    assert ours["steps"] == [0, 10, 20, 30, 40]
    assert np.all(np.diff(ours["train_loss"]) < 0)
    assert ours["logged"]["count"] == [10, 20, 30, 40]
    for curve in curves.values():
        lengths = {len(curve[x]) for x in ("steps", "train_loss", "error", "seconds")}
        assert len(lengths) == 1
        # The others are stopped at the first evaluation after as many seconds.
        if curve is not ours:
            assert curve["seconds"][-2] < ours["seconds"][-1] <= curve["seconds"][-1]


@pytest.mark.slow
def test_the_report_of_the_pinn(pinn_run):
    _, report = pinn_run
    for word in (
        "673 parameters",
        "seconds to L-BFGS's loss",
        "learning rate 0.03",
        "Of the 40",
    ):
        assert word in report
    assert max(map(len, report.splitlines())) <= 100


@pytest.mark.slow
def test_the_command_line_of_the_pinn(no_network, tmp_path, capsys):
    arguments = ["--problem", "pinn", "--steps", "5", "--partition", "whole"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "partition whole with 1 subsets" in out
    assert str(tmp_path / "losses.png") in out
    names = [line.split()[0] for line in err.splitlines()]
    assert names == ["subspace_newton", "lbfgs", "adam"]
    assert not jax.config.jax_enable_x64


# --- Its parts -------------------------------------------------------------------


def config(tmp_path, **changes):
    asked = demo.Config("cnn", 3, 0, "per_tensor", None, tmp_path)
    return asked._replace(**changes)


@pytest.mark.parametrize("model", some(models.MODELS, default=["mlp"]))
def test_an_evaluation_is_the_loss_and_the_accuracy_of_all_images(tmp_path, model):
    experiment = demo.prepare(config(tmp_path, model=model))
    train_images, train_labels, test_images, test_labels, _ = experiment.dataset
    loss, accuracy = evaluation(experiment)(experiment.params)
    expected = experiment.value_fn(experiment.params, train_images, train_labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    predicted = experiment.logits_fn(experiment.params, test_images).argmax(axis=1)
    np.testing.assert_allclose(accuracy, np.mean(predicted == test_labels), rtol=1e-5)


@pytest.mark.parametrize(
    "shape", some([(8, 8, 1), (28, 28, 1), (32, 32, 3), (5, 6, 1)], default=[(5, 6, 1)])
)
@pytest.mark.parametrize("model", models.MODELS)
def test_networks_take_images_of_any_size(model, shape):
    network = models.MODELS[model](shape, nnx.Rngs(0))
    assert network(np.zeros((2, *shape), np.float32)).shape == (2, 10)


def test_the_seconds_to_a_loss_are_those_of_the_first_evaluation_below_it():
    curves = Curves("", train_loss=[3.0, 1.0, 2.0], seconds=[0.0, 1.5, 2.5])
    assert tables.seconds_to(curves, 2.0) == "1.50"
    assert tables.seconds_to(curves, 0.5) == "never"


def test_the_labels_of_text_are_the_next_characters_and_no_test_window_is_trained_on():
    train, following, test, _, _ = text.standard_library(seed=3)
    np.testing.assert_array_equal(train[:, 1:], following[:, :-1])
    assert train.shape[1] == text.LENGTH
    again = text.standard_library(seed=4)
    np.testing.assert_array_equal(test, again.test_images)
    assert sorted(map(bytes, train)) == sorted(map(bytes, again.train_images))
    assert not np.array_equal(train, again.train_images)


@pytest.mark.slow
def test_the_transformer_does_not_see_later_characters():
    network = text.Transformer(11, nnx.Rngs(0))
    one = np.arange(text.LENGTH)[None] % 11
    other = one.copy()
    other[0, 20:] = 0
    logits = [np.asarray(network(x)) for x in (one, other)]
    assert logits[0].shape == (1, text.LENGTH, 11)
    np.testing.assert_allclose(logits[0][0, :20], logits[1][0, :20], rtol=1e-5)
    assert not np.allclose(logits[0][0, 20:], logits[1][0, 20:])


def test_the_loss_of_the_pinn_is_zero_for_the_solution_and_one_for_zero(tmp_path):
    problem = pinn.prepare(config(tmp_path, problem="pinn", partition="whole"))
    with jax.enable_x64(True):
        zero = jax.tree.map(np.zeros_like, problem.params)
        np.testing.assert_allclose(problem.value_fn(zero), 1, rtol=1e-12)
        x = np.linspace(0, 1, 7)
        # By hand: the second derivative of sin(a x) is -a^2 sin(a x).
        a, b = 2 * np.pi, 10 * np.pi
        expected = -(a**2) * np.sin(a * x) - 0.1 * b**2 * np.sin(b * x)
        found = equation._second_derivative(equation.true, jax.numpy.asarray(x))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        ends = problem.solution(problem.params, jax.numpy.array([0.0, 1.0]))
        np.testing.assert_array_equal(ends, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(problem.params)} == {
        np.dtype("float64")
    }


def test_the_seed_decides_the_initial_weights(tmp_path):
    one, same, other = (
        jax.tree.leaves(demo.prepare(config(tmp_path, seed=seed)).params)
        for seed in (1, 1, 2)
    )
    for x, y in zip(one, same, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(one[1], other[1])


def test_an_epoch_sees_each_image_once():
    batches = batch_indices(count=640, steps=25, seed=0)
    assert batches.shape == (25, BATCH)
    for epoch in (batches[:10], batches[10:20]):
        assert sorted(epoch.ravel()) == list(range(640))
    assert not np.array_equal(batches[0], batches[10])


def test_a_small_set_is_one_batch():
    assert batch_indices(count=5, steps=3, seed=0).shape == (3, 5)


def test_json_has_null_for_what_is_not_finite():
    value = {"a": [1.0, math.nan, (math.inf, 2)], "b": None, "c": "text"}
    assert files.finite(value) == {"a": [1.0, None, [None, 2]], "b": None, "c": "text"}


# --- The command line ------------------------------------------------------------


def error_of(arguments, capsys):
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(x) for x in arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("partnewton: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "--stepz"),
        (["--step", "3"], "--step"),
        (["--steps"], "--steps: expected one argument"),
        (["--steps", "0"], "--steps: must be an integer from 1, got '0'"),
        (["--steps", "-5"], "--steps: must be an integer from 1, got '-5'"),
        (["--steps", "many"], "--steps: must be an integer from 1, got 'many'"),
        (["--steps", "1.5"], "--steps: must be an integer from 1, got '1.5'"),
        (["--seed", "-1"], "--seed: must be an integer from 0 to 4294967295, got '-1'"),
        (["--seed", "4294967296"], "--seed: must be an integer from 0 to 4294967295"),
        (["--model", "vit"], "--model: invalid choice: 'vit'"),
        (["--partition", "half"], "--partition: must be one of per_tensor, whole"),
        (["--partition", "blocks:0"], "blocks:N or alternate:N with N at least 1"),
        (["--partition", "blocks"], "got 'blocks'"),
        (["--partition", "FROZEN"], "got 'FROZEN'"),
        (["--data-dir", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["--problem", "sound"], "--problem: invalid choice: 'sound'"),
        (["--problem", "text", "--data-dir", "x"], "--data-dir: the text is that of"),
        (["--problem", "pinn", "--data-dir", "x"], "--data-dir: the problem is an"),
        (["--problem", "pinn", "--partition", "blocks:9"], "--partition blocks:9: "),
        (["spare"], "unrecognized arguments: spare"),
    ],
)
def test_a_wrong_argument_gives_one_line(arguments, message, capsys):
    assert message in error_of(arguments, capsys)


def test_more_blocks_than_tensors_give_one_line(tmp_path, capsys):
    arguments = ["--partition", "alternate:99", "--output", tmp_path]
    error = error_of(arguments, capsys)
    assert "--partition alternate:99: " in error
    assert "only 8 subsets" in error


def test_a_broken_file_gives_one_line(tmp_path, capsys):
    write_idx(tmp_path)
    broken = tmp_path / "t10k-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:-1])
    error = error_of(["--data-dir", tmp_path, "--output", tmp_path], capsys)
    assert f"{broken}: truncated" in error


def test_a_missing_file_gives_one_line(tmp_path, capsys):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    error = error_of(["--data-dir", tmp_path], capsys)
    assert "train-labels-idx1-ubyte: missing" in error


def test_an_output_that_is_a_file_gives_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    error = error_of(["--output", tmp_path / "file"], capsys)
    assert f"--output {tmp_path / 'file'}: " in error


def test_an_output_below_a_file_gives_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    error = error_of(["--output", tmp_path / "file" / "folder"], capsys)
    assert f"--output {tmp_path / 'file' / 'folder'}: " in error


def test_figures_that_cannot_be_written_give_one_line(tmp_path, capsys, monkeypatch):
    def write(results):
        raise OSError(28, "No space left on device", "losses.png")

    monkeypatch.setattr(demo, "run", lambda experiment: SimpleNamespace())
    monkeypatch.setattr(demo, "report", lambda results: "a table")
    monkeypatch.setattr(demo, "write", write)
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path)])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "a table" in out
    assert err.count("\n") == 1
    assert "No space left on device" in err


@pytest.mark.parametrize("module", ["flax", "matplotlib.figure", "tqdm"])
def test_a_missing_extra_gives_one_line(module, capsys, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("partnewton.demo"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(partnewton, "demo")
    monkeypatch.setitem(sys.modules, module, None)
    error = error_of(["--steps", "1"], capsys)
    assert module in error
    assert 'pip install "partnewton[demo]"' in error


def test_missing_scikit_learn_gives_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    error = error_of(["--output", tmp_path], capsys)
    assert 'pip install "partnewton[demo]"' in error


def test_a_keyboard_interrupt_gives_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(experiment):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["--output", str(tmp_path)]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_module_exits_with_code_2_and_no_traceback():
    command = [sys.executable, "-m", "partnewton", "--steps", "zero"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "partnewton: error: argument --steps: must be an integer from 1, got 'zero'\n"
    )


def test_help_explains_every_flag_and_imports_nothing_for_it():
    code = (
        "import sys; from partnewton.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "heavy = {'flax', 'matplotlib', 'sklearn', 'tqdm', 'partnewton.demo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for flag in demo.Config._fields:
        assert f"--{flag.replace('_', '-')} " in result.stdout
