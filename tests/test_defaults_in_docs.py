"""Numbers of the documentation that are defaults are those of the code."""

import inspect
import math
import re

import numpy as np
import pytest
from support import documents

import partnewton as pn
from partnewton import _refresh, directions, presets, rules
from partnewton.demo import training


def default(function, name):
    return inspect.signature(function).parameters[name].default


def text_of(page):
    """A page with line breaks as spaces."""
    return " ".join((documents.ROOT / page).read_text(encoding="utf-8").split())


NEWTON, LOOKBACK = pn.partition_newton, pn.scale_by_lookback
STATED = [
    # page, sentence with groups, the values of the groups
    (
        "docs/faq.md",
        r"default of ([\d.]+) is a good",
        [default(NEWTON, "learning_rate")],
    ),
    (
        "docs/how_to_choose.md",
        r"scale_by_lookback\(([\d.]+)\)",
        [default(LOOKBACK, "rate")],
    ),
    (
        "docs/how_to_choose.md",
        r"optax\.scale_by_learning_rate\(([\d.]+)\) +# the initial",
        [default(NEWTON, "learning_rate")],
    ),
    (
        "docs/design_notes.md",
        r"an initial factor of ([\d.]+)",
        [default(NEWTON, "learning_rate")],
    ),
    (
        "docs/faq.md",
        r"multiplied by exp\(([\d.]+)\) .* by exp\(-([\d.]+)\)",
        2 * [default(NEWTON, "lookback_rate")],
    ),
    (
        "docs/faq.md",
        r"n is max\((\d+), (\d+) sqrt\(t\)\)",
        [default(LOOKBACK, "update_interval"), default(LOOKBACK, "window_growth")],
    ),
    (
        "docs/faq.md",
        r"for example (\d+) at step 1000",
        [math.ceil(default(LOOKBACK, "window_growth") * math.sqrt(1000))],
    ),
    (
        "docs/design_notes.md",
        r"its `slope_position` of ([\d.]+)",
        [default(LOOKBACK, "slope_position")],
    ),
    (
        "docs/design_notes.md",
        r"its window of (\d+) sqrt\(t\) steps",
        [default(LOOKBACK, "window_growth")],
    ),
    (
        "docs/design_notes.md",
        r"averaged over n / (\d+) batches",
        [1 / default(LOOKBACK, "averaging_fraction")],
    ),
    (
        "docs/diagnostics.md",
        r"it stays at ([\d.]+), its minimum",
        [default(LOOKBACK, "min_scale")],
    ),
    ("docs/design_notes.md", r"(\d+) halvings \|", [default(NEWTON, "backtracking")]),
    (
        "docs/design_notes.md",
        r"a noise floor of (\d+) eps",
        [default(rules.with_noise_floor, "eps_multiple")],
    ),
    (
        "docs/design_notes.md",
        r"`max_ratio=(\d+)`",
        [default(rules.robust, "max_ratio")],
    ),
    (
        "docs/design_notes.md",
        r"a floor of (\d+) for D",
        [default(rules.robust, "floor")],
    ),
    (
        "docs/design_notes.md",
        r"equilibrated with p = 1/(\d+)",
        [1 / default(directions.equilibrated, "power")],
    ),
    (
        "docs/published_method.md",
        r"`update_interval` \| (\d+) \|",
        [default(pn.paper_newton, "update_interval")],
    ),
    (
        "docs/published_method.md",
        r"`momentum` \| ([\d.]+) \|",
        [default(pn.paper_newton, "momentum")],
    ),
    ("README.md", r"Adam, ([\de.-]+) \|", [training.ADAM_RATE]),
    ("README.md", r"SGD, ([\de.-]+), momentum", [training.SGD_RATE]),
]


@pytest.mark.parametrize(
    ("page", "pattern", "values"), STATED, ids=[f"{s[0]}: {s[1]}" for s in STATED]
)
def test_a_stated_number_is_the_default(page, pattern, values):
    (found,) = set(re.findall(pattern, text_of(page)))
    found = found if isinstance(found, tuple) else (found,)
    np.testing.assert_allclose([float(x) for x in found], values, rtol=1e-12)


INTERVAL = (
    r"quarter of the (?:steps|updates) so far,? "
    r"(?:at least|between|from) (\d+) (?:and at most|and|to) (\d+) S\b"
)


@pytest.mark.parametrize(
    "page",
    [
        "docs/faq.md",
        "docs/how_to_choose.md",
        "docs/design_notes.md",
        "partnewton/transform.py",
        "CHANGELOG.md",
    ],
)
def test_the_interval_between_refreshes_is_the_one_of_the_code(page):
    found = set(re.findall(INTERVAL, text_of(page)))
    assert len(found) == 1, found
    least, most = map(int, found.pop())
    for size in (1, 7, 40):
        for count in (0, 10, 79, 80, 100, 799, 10**6):
            expected = min(
                max(count // 4, int(least)), max(int(least), int(most) * size)
            )
            assert _refresh.refresh_interval(count, size, np) == expected
    assert default(NEWTON, "update_interval") is None


def test_the_chain_of_the_page_is_that_of_the_preset():
    page = text_of("docs/how_to_choose.md")
    source = " ".join(inspect.getsource(presets.partition_newton).split())
    for part in (
        "rules.with_noise_floor(rules.robust(shrinkage=0.5))",
        'normalize="rms"',
        "averaging.relative(averaging.exponential(0.9, absolute_third=True))",
        "directions.skip_nonfinite(direction",
    ):
        assert part in page, part
        assert part in source, part


def test_the_description_of_the_default_is_that_of_the_preset():
    # (1 - 1/2) eta + 1/2 t <= 5 t, and at least t / 2: a ratio of ten at most.
    assert default(rules.robust, "max_ratio") == 5
    source = " ".join(inspect.getsource(presets.partition_newton).split())
    assert "rules.robust(shrinkage=0.5)" in source
    for page in ("README.md", "docs/index.md"):
        text = text_of(page)
        assert "at most five times the common one" in text, page
        assert "the mean of two minimisers of a cubic model" in text, page
    assert "differ by a factor of ten at most" in text_of("README.md")


def test_no_page_contradicts_another_one_about_full_batches_and_costs():
    pages = {str(p): text_of(p) for p in documents.pages()}
    for name, page in pages.items():
        assert "one multiplication per parameter" not in page, name
        assert not re.search(r"third order,? .{0,40}up to twice", page), name
        assert "up to twice that with the third" not in page, name
    # Where a factor of 1 is recommended for a chain, so is an interval of 1.
    for name in ("README.md", "docs/how_to_choose.md", "docs/published_method.md"):
        text = text_of(name)
        assert "update_interval=1`" in text, name


def columns(page, header):
    """The columns of the first table of a page whose header contains some text."""
    titles, rows = rows_of(page, header)
    return dict(zip(titles, zip(*rows, strict=True), strict=True))


def rows_of(page, header):
    """The titles and the rows of that table."""
    lines = iter((documents.ROOT / page).read_text(encoding="utf-8").splitlines())
    titles = next(x for x in lines if header in x and x.startswith("|"))
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [cell.strip() for cell in titles.strip("|").split("|")], rows[1:]


def ratios_of(table, name):
    """The ratios of `partition_newton`; elsewhere they are 1 or another optimizer's."""
    optimizers = table.get("optimizer", ["partition_newton"] * len(table[name]))
    pairs = zip(optimizers, table[name], strict=True)
    return [float(x) for optimizer, x in pairs if optimizer == "partition_newton"]


def test_the_costs_in_the_readme_are_those_of_the_benchmarks():
    page, readme = "benchmarks/README.md", text_of("README.md")
    compiled = ratios_of(columns(page, "`muon`: CPU s"), "ratio")
    # Steps in gradients on the ladder; the columns after them are compile times.
    ladder = [row[2:6] for row in rows_of(page, "in gradients | `total_steps`")[1]]
    steps = [float(ours) / float(muon) for ours, _, _, muon in ladder if ours != "-"]
    gpu = columns(page, "compile / Muon's")
    for pattern, ratios in (
        (r"a step takes ([\d.]+) to ([\d.]+) times as long as Muon's", steps),
        (r"and compiling ([\d.]+) to ([\d.]+) times", compiled),
        (r"training step takes ([\d.]+) to ([\d.]+) times as long to comp", compiled),
        (r"H200, ([\d.]+) to ([\d.]+)", ratios_of(gpu, "average step / Muon's")),
        (r"H200, .{0,20} and ([\d.]+) to ([\d.]+)", ratios_of(gpu, "compile / Muon's")),
    ):
        (found,) = re.findall(pattern, readme)
        expected = [min(ratios), max(ratios)]
        assert [float(x) for x in found] == [round(x, 1) for x in expected], pattern


def test_the_counts_in_the_readme_are_those_of_the_benchmarks():
    page, readme = text_of("benchmarks/README.md"), text_of("README.md")
    (adam,) = re.findall(r"tuned rate on (\d+ of \d+)", readme)
    assert f"is at or below tuned Adam on {adam} problems" in page
    (muon,) = re.findall(r"tuned Muon's or below on (\d+)", readme)
    (better, equal) = re.findall(r"is better on (\d+) .*? within 1 % on (\d+)", page)[0]
    assert int(muon) == int(better) + int(equal)


def test_the_versions_in_the_readme_are_those_of_the_package():
    project = (documents.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(
        r"Python ([\d.]+) or newer, jax ([\d.]+) or newer and optax ([\d.]+) or newer "
        r".*? flax ([\d.]+) or newer",
        text_of("README.md"),
    )
    python, jax, optax, flax = found[0]
    assert f'requires-python = ">={python}"' in project
    assert f'"jax>={jax}.0"' in project
    assert f'"optax>={optax}"' in project
    assert f'"flax>={flax}"' in project
