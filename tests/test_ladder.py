"""The ladder: its data, its plan of runs, its tables, and a very small run."""

import functools
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1]))  # at the end: it hides nothing

from benchmarks import reporting
from benchmarks.ladder import (
    bpe,
    command_line,
    images,
    networks_images,
    optimizers,
    plan,
    report,
    results,
    rungs,
    text,
)
from benchmarks.ladder.run import Job
from benchmarks.training_loop import batches

SMALLEST = "mlp_digits"
RUNS_SCALE = 8


def make(name, scale=1):
    if rungs.needs_fashion(name) and images.find() is None:
        pytest.skip("needs the files of Fashion-MNIST, which are not installed")
    return rungs.make(name, scale)


# --- Data ---------------------------------------------------------------------------

TEXT = b"a cat, a hat\n\n  and \xff\x00 caf\xc3\xa9s: 1234 cats_and_hats " * 3


def test_decoding_inverts_encoding():
    merges = bpe.learn(TEXT, 300)
    assert len(merges) > 20
    for part in (TEXT, TEXT[7:55], b"", bytes(range(256)), b"never seen \n\t x1y2"):
        assert bpe.decode(bpe.encode(part, merges), merges) == part


def test_each_merge_is_the_most_frequent_pair():
    """Compared with a count of all pairs inside of words after each merge."""
    words = [list(word) for word in bpe.WORDS.findall(TEXT)]
    for n, merge in enumerate(bpe.learn(TEXT, 280)):
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        assert counts[merge] == max(counts.values())
        words = [bpe._merged(word, merge, 256 + n) for word in words]


def test_tokens_are_shorter_than_their_text_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "corpus", lambda: (TEXT, TEXT[:60]))
    monkeypatch.setattr(text, "checksum", lambda: "0")
    monkeypatch.setenv(text.VARIABLE, str(tmp_path))
    text._tokens.cache_clear()
    first = text.windows(5, 280)
    text._tokens.cache_clear()
    monkeypatch.setattr(bpe, "learn", None)  # not called again
    second = text.windows(5, 280)
    text._tokens.cache_clear()
    jax.tree.map(np.testing.assert_array_equal, first, second)
    (x, y), _, bytes_per_token = first
    assert bytes_per_token > 1.2
    np.testing.assert_array_equal(x.ravel()[1:], y.ravel()[:-1])


@pytest.mark.slow
def test_training_and_test_text_have_no_file_in_common():
    train, test = text.corpus()
    assert 5e6 < len(train) < 5e7
    assert 0.05 < len(test) / len(train) < 0.2
    assert test[:2000] not in train


def test_the_order_of_the_data_depends_on_the_seed_alone():
    rung = make(SMALLEST)
    orders = [batches(rung, seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert np.any(orders[0] != orders[2])
    longer = batches(rung._replace(steps=2 * rung.steps), 0)
    np.testing.assert_array_equal(longer[: rung.steps], orders[0])


def test_shifts_and_flips_are_of_whole_images():
    """Of an image with one bright pixel, that pixel moves by two at most."""
    image = np.zeros((200, 9, 9, 1), np.float32)
    image[:, 3, 4] = 1
    labels = jnp.arange(200)
    found, same = images.shifted_and_flipped(jax.random.key(0), (image, labels))
    places = {tuple(np.argwhere(x[..., 0])[0]) for x in np.asarray(found)}
    assert places == {(3 + i, 4 + j) for i in range(-2, 3) for j in range(-2, 3)}
    np.testing.assert_array_equal(found.sum((1, 2, 3)), 1)
    np.testing.assert_array_equal(same, labels)


# --- Networks -----------------------------------------------------------------------


def test_running_statistics_become_those_of_the_batch():
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 3)) * 3 + 2
    layer = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    in_training, _ = networks_images.batch_norm(layer, stats, x, True)
    np.testing.assert_allclose(in_training.std((0, 1, 2)), 1, rtol=1e-4)
    for _ in range(200):
        _, stats = networks_images.batch_norm(layer, stats, x, True)
    in_test, same = networks_images.batch_norm(layer, stats, x, False)
    np.testing.assert_allclose(in_test, in_training, atol=1e-4)
    assert same is stats


# gpt_gpu is gpt_scan_gpu without the scan, and larger.
DIFFERENT = [name for name in rungs.RUNGS if name != "gpt_gpu"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_the_gradient_of_a_rung_is_that_of_its_loss(name, monkeypatch):
    """In float64, by differences along a random direction; then a step of SGD."""
    # Learning the tokens takes longer than all the rest.
    monkeypatch.setattr(text, "_tokens", lambda n: (np.arange(20_000) % n,) * 2)
    is_wide = name in rungs.GPU  # these compute in bfloat16
    with jax.enable_x64(not is_wide):
        rung = make(name, RUNS_SCALE if is_wide else 4)
        params, stats = rung.init(jax.random.key(0))
        batch = tuple(jnp.asarray(x[:4]) for x in rung.train)
        if rung.augment is not None:
            batch = rung.augment(jax.random.key(1), batch)
        if not is_wide:
            params, stats, batch = _as_float64((params, stats, batch))

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def grad(params):
            return rung.loss(params, stats, batch, True)

        (value, _), gradient = grad(params)
        assert np.isfinite(value)
        # With numpy, since each operation of jax would be compiled for each shape.
        start, slopes = (jax.tree.map(np.asarray, x) for x in (params, gradient))
        rng = np.random.default_rng(2)

        def moved(step, direction):
            return jax.tree.map(
                lambda x, d: x + d.dtype.type(step) * d, start, direction
            )

        def inner(x, y):
            return sum(map(np.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))

        random = jax.tree.map(
            lambda g: (g * (1 + rng.normal(size=g.shape))).astype(g.dtype), slopes
        )
        size = np.sqrt(inner(random, random))
        if not is_wide:
            # The softmax of attention is in float32; relu has kinks.
            h = 3e-4 if name.startswith(("gpt", "vit")) else 1e-7

            after, before = (grad(moved(x / size, random))[0][0] for x in (h, -h))
            found = (after - before) / (2 * h)
            np.testing.assert_allclose(found, inner(slopes, random) / size, rtol=1e-4)
        step = -1e-3 / np.sqrt(inner(slopes, slopes))
        (next_value, new_stats), _ = grad(moved(step, slopes))
        assert next_value < value
        assert jax.tree.structure(new_stats) == jax.tree.structure(stats)
        assert np.isfinite(jax.jit(rung.metric)(params, stats, batch))


def _as_float64(tree):
    def wide(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(wide, tree)


# --- Optimizers and the plan --------------------------------------------------------


@pytest.mark.parametrize("schedule", [optimizers.cosine, optimizers.linear])
def test_schedules_warm_up_and_end_at_zero(schedule):
    found = np.array([schedule(2.0, 200)(n) for n in range(201)])
    assert found.argmax() in (10, 11)
    np.testing.assert_allclose(found.max(), 2.0, rtol=0.01)
    assert np.all(np.diff(found[:10]) > 0)
    assert np.all(np.diff(found[11:]) < 0)
    np.testing.assert_allclose(found[200], 0, atol=1e-6)
    assert found[199] < 0.03


def record(job, loss, *, step=1.0, compiling=0.0, gradient=0.5, name="error rate"):
    """A step takes `step` gradients; the loss decreases geometrically from 1."""
    at = np.linspace(0, job.steps, 5)
    curve = (loss ** (at / job.steps)).tolist()
    return {
        "rung": SMALLEST,
        **job._asdict(),
        "parameters": 10,
        "tensors": 2,
        "at": at.tolist(),
        "seconds": (at * step * gradient).tolist(),
        "compile_seconds": compiling,
        "gradient_seconds": gradient,
        "train": curve,
        "test": curve,
        "metric": curve,
        "metric_name": name,
    }


def simulated(settings, of):
    """All runs that a plan asks for, in its order."""
    records = {}
    while jobs := plan.missing(records, settings):
        for job in jobs:
            assert job not in records
            records[job] = of(job)
    return records


def test_horizons_fill_the_time_of_the_reference():
    """Ours takes 2 gradients and 10 s more to compile, a gradient 0.25 s: 40 more."""
    entries = ("partition_newton", "adamw_cosine")
    settings = plan.Settings(100, entries, seeds=2)

    def of(job):
        if job.entry == "adamw_cosine":
            loss = 0.1 if job.rate == 1e-3 else 0.2 + job.rate
            # On a machine that is twice as slow at that time.
            return record(job, loss, step=1.0, compiling=5.0, gradient=1.0)
        return record(job, 0.05, step=2.0, compiling=15.0, gradient=0.25)

    records = simulated(settings, of)
    horizons = [
        plan.horizon(records, settings, "adamw_cosine", axis) for axis in plan.AXES
    ]
    assert horizons == [100, 200, 240]
    ours = [j for j in records if j.entry == "partition_newton"]
    assert ours == [Job("partition_newton", 1.0, seed, 100) for seed in (0, 1)]
    theirs = [j for j in records if j.entry == "adamw_cosine"]
    assert len(theirs) == len(set(theirs)) == 5 + 2 * 2 + 3
    assert {j.rate for j in theirs if j.seed == 1} == {1e-3}
    assert {j.rate for j in theirs if j.steps == 200} == {1e-3, 3.16e-4}


def test_long_runs_have_one_seed():
    settings = plan.Settings(100, ("partition_newton",), seeds=3)
    for gradient, seeds in ((0.5, 3), (1.0, 1)):
        records = simulated(
            settings, lambda job, g=gradient: record(job, 0.1, gradient=g)
        )
        assert len(records) == seeds


def test_times_to_a_loss_are_interpolated():
    """The loss is 0.01^(n / 100); 0.1 is reached after half of the steps."""
    job = Job("partition_newton", 1.0, 0, 100)
    found = results.Result("partition_newton", 1.0, 100, [record(job, 0.01)], False)
    assert results.time_to(found, 0.1) == pytest.approx(50)
    assert results.time_to(found, 10 ** (-0.9)) == pytest.approx(45)
    assert results.time_to(found, 0.001) is None


def test_the_tables_tell_losses_ratios_and_failures():
    entries = ("partition_newton", "total_steps", "adamw_cosine", "adamw_linear")
    settings = plan.Settings(100, (*entries, "prodigy", "momo_adam"), 1, rates=3)

    def of(job):
        if job.entry == "prodigy":
            return {**job._asdict(), "failure": "ValueError: no"}
        losses = {
            "adamw_linear": 0.1 if job.steps == 100 else 0.05,
            "total_steps": 0.02,
        }
        far = 1e-6 * abs(np.log10(job.rate) + 2.5) if job.rate < 1 else 0.0
        step = 2.0 if job.entry in optimizers.OURS else 1.0
        found = record(job, losses.get(job.entry, 0.2) + far, step=step)
        if job.entry == "momo_adam":
            found["train"][-1] = None  # it diverged
        return found

    records = simulated(settings, of)
    assert results.best_rival(records, settings, "seconds") == "adamw"
    summary = report.summary({SMALLEST: (records, settings)}).splitlines()
    cells = [x.strip() for x in summary[4].split("|")]
    assert cells[1:7] == [SMALLEST, "10", "2", "100", "100", "1"]
    assert cells[7:13] == ["adamw 0.1", "2", "0.2", "adamw 0.05", "4", "0.4"]
    assert cells[-3:-1] == ["-", "0.77"]  # log(0.05) / log(0.02)
    details = report.details(SMALLEST, records, settings)
    assert "adamw_linear, 0.00316 |" in details
    rows = {x.split(" | ")[0]: x for x in details.splitlines()}
    assert "ValueError: no" in rows["| prodigy"]
    assert " | inf / inf (200) | " in rows["| momo_adam"]
    cells = rows["| adamw"].split(" | ")
    assert cells[2:5] == ["0.1 / 0.1 (100)", "0.05 / 0.05 (200)", "0.05 / 0.05 (200)"]
    assert cells[5] == "100 (1.00)"  # seconds
    assert rows["| optimizer"].split(" | ")[5] == "seconds to 0.05 (part of all)"


def test_unfinished_plans_have_tables(tmp_path):
    """After each number of runs, ours last."""
    entries = ("adamw_cosine", "partition_newton", "total_steps")
    settings = plan.Settings(100, entries, 2, rates=2)

    def of(job):
        step = 1.0 if job.entry == "adamw_cosine" else 2.0
        return record(job, 0.1, step=step)

    records = simulated(settings, of)
    names = sorted(records, key=lambda job: job.entry)
    for count in range(1, len(names) + 1):
        shown = {job: records[job] for job in names[:count]}
        assert "| adamw_cosine, " in report.details(SMALLEST, shown, settings)
        assert "geometric" in report.summary({SMALLEST: (shown, settings)}) or not any(
            job.entry == plan.REFERENCE for job in shown
        )
    report.picture(SMALLEST, shown, settings, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_fewer_rates_are_carried_over_to_equal_seconds():
    settings = plan.Settings(100, ("partition_newton", "sgdm_cosine"), 1, carried=1)

    def of(job):
        return record(job, job.rate / 2, step=1.0 if job.rate < 1 else 2.0)

    records = simulated(settings, of)
    assert [j.rate for j in records if j.steps == 200] == [3.16e-3]


def test_no_rate_is_carried_over_if_only_steps_are_compared():
    settings = plan.Settings(100, ("partition_newton", "sgdm_cosine"), 2, carried=0)
    records = simulated(settings, lambda job: record(job, job.rate / 2))
    assert {j.steps for j in records} == {100}
    assert {j.seed for j in records} == {0, 1}


@pytest.mark.slow
def test_a_small_run_is_stored_resumed_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reporting, "executor", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(reporting, "use_one_thread", lambda: None)
    arguments = ["--rungs", SMALLEST, "--optimizers", "sgdm_linear", "schedule_free"]
    arguments += ["--rates", "2", "--seeds", "1", "--divide", "75", "--scale", "8"]
    arguments += ["--output", str(tmp_path)]
    monkeypatch.setattr(plan, "REFERENCE", "schedule_free")
    monkeypatch.setattr(plan.Settings, "__new__", _settings_with_another_reference)
    assert command_line.main(arguments) == 0
    stored = {x: x.read_bytes() for x in tmp_path.glob("runs_*/*.json")}
    assert len(stored) >= 5
    for content in stored.values():
        found = json.loads(content)
        assert "failure" not in found
        assert found["at"][-1] == found["steps"]
        assert np.isfinite(found["train"][-1])
    table = (tmp_path / "ladder.md").read_text("utf-8")
    assert "| sgdm | sgdm_linear, " in table
    assert (tmp_path / f"{SMALLEST}.png").stat().st_size > 0
    lost = max(x for x in stored if ".20.json" not in x.name)  # of another horizon
    lost.unlink()
    assert command_line.main(arguments) == 0
    again = {x: x.read_bytes() for x in tmp_path.glob("runs_*/*.json")}
    assert set(again) == set(stored)
    assert all(again[x] == stored[x] for x in stored if x != lost)
    before, after = json.loads(stored[lost]), json.loads(again[lost])
    assert after["train"] == before["train"]
    runs = json.loads((tmp_path / "ladder.json").read_text("utf-8"))["rows"]
    assert len(runs) == len(stored)


def _settings_with_another_reference(cls, *args):
    return tuple.__new__(cls, (*args, plan.REFERENCE))


def _simulated_benchmark(monkeypatch, tmp_path, steps, made):
    """A function that runs it and appends runs to `made`; the fifth is interrupted."""
    monkeypatch.setattr(reporting, "executor", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(reporting, "use_one_thread", lambda: None)
    monkeypatch.setattr(command_line, "_steps", lambda name, scale: steps)

    def run(name, job, **options):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(job)
        return record(job, 0.1)

    monkeypatch.setattr(command_line, "run", run)
    arguments = ["--rungs", SMALLEST, "--output", str(tmp_path), "--seeds", "1"]
    return lambda *more: command_line.main(
        [*arguments, "--optimizers", "adamw_cosine", "total_steps", *more]
    )


def test_an_interrupted_benchmark_goes_on(tmp_path, monkeypatch, capsys):
    made = []
    start = _simulated_benchmark(monkeypatch, tmp_path, 100, made)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert start("--report") == 0  # of what there is
    first = set(made)
    # Killed while it wrote a file.
    (tmp_path / "runs_cpu" / f"{SMALLEST}.broken.unfinished").write_text("{")
    made.clear()
    assert start() == 0
    assert (len(first), len(made)) == (4, 3)
    assert not first & set(made)


def test_the_tables_are_of_the_latest_number_of_steps(tmp_path, monkeypatch, capsys):
    """Runs are those of a rung that was shortened; one length is in both plans."""
    for steps in (200, 100):
        made = []
        start = _simulated_benchmark(monkeypatch, tmp_path, steps, made)
        monkeypatch.setattr(plan, "rates", lambda entry, settings: (1.0,))
        assert start() == 0
    found = (tmp_path / "ladder.md").read_text("utf-8")
    assert "(100)" in found
    assert "(200)" not in found


def test_options_that_are_given_are_not_replaced():
    parser = command_line._parser()
    for given, seeds, rates in (([], 1, 2), (["--seeds", "2", "--rates", "4"], 2, 4)):
        options = parser.parse_args(["--quick", *given])
        command_line._shorten(options)
        assert (options.seeds, options.rates) == (seeds, rates)


def test_without_images_the_other_rungs_are_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "FOLDERS", (str(tmp_path / "nowhere"),))
    parser = command_line._parser()
    names = command_line._names(parser.parse_args([]), parser)
    assert SMALLEST in names
    assert "gpt_bytes" in names
    assert not any(map(rungs.needs_fashion, names))
    assert "dataset-fashion-mnist" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command_line.main(["--rungs", "mlp_fashion", "--output", str(tmp_path)])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "--data-dir" in message
