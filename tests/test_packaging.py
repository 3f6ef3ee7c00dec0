"""What is built: a wheel and an sdist that work where nothing else is installed."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import partnewton

ROOT = Path(__file__).parent.parent

IMPORT = """
import sys, time
import jax.numpy, optax
start = time.perf_counter()
import partnewton
seconds = time.perf_counter() - start
others = {"matplotlib", "flax", "sklearn", "tqdm", "orbax"} & set(sys.modules)
assert not others, others
assert "site-packages" in partnewton.__file__, partnewton.__file__
print(seconds)
"""

TRAIN = """
import jax, jax.numpy as jnp, optax, partnewton
loss = lambda params: (1 - params["x"]) ** 2 + 2 * (params["y"] + 3) ** 2
params = {"x": jnp.array(5.0), "y": jnp.array(5.0)}
tx = optax.chain(partnewton.scale_by_partition_newton(), optax.scale(-1.0))
updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
assert abs(optax.apply_updates(params, updates)["x"] - 1) < 1e-5
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and an sdist, made from the files that are here."""
    folder = tmp_path_factory.mktemp("dist")
    code = (
        "import hatchling.build as build, sys\n"
        "build.build_sdist(sys.argv[1]); build.build_wheel(sys.argv[1])"
    )
    run(sys.executable, "-c", code, str(folder), cwd=ROOT)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "partnewton").rglob("*.py")}
    assert sources <= set(files)
    assert {f.split("/")[0] for f in files if ".dist-info/" not in f} == {"partnewton"}
    assert any(f.endswith("licenses/LICENSE") for f in files)


@pytest.mark.slow
def test_sdist_holds_tests_documentation_and_notebooks(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("tests/test_packaging.py", "docs/index.md", "mkdocs.yml"):
        assert path in files
    assert "notebooks/quickstart.ipynb" in files
    assert not any(f.endswith((".pyc", ".png~")) for f in files)


@pytest.mark.slow
def test_wheel_works_with_nothing_but_its_dependencies(built, tmp_path):
    """jax, numpy and optax are taken from here, by path; all else is out of reach."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    target = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target.strip())
    _link_dependencies(Path(target.strip()))
    seconds = [float(run(python, "-I", "-c", IMPORT)) for _ in range(3)]
    assert min(seconds) < 1.0
    run(python, "-I", "-c", TRAIN)
    version = run(
        python,
        "-I",
        "-c",
        "import importlib.metadata as m; print(m.version('partnewton'))",
    )
    assert version.strip() == partnewton.__version__


def _link_dependencies(target: Path) -> None:
    """Links what the metadata of jax, numpy and optax ask for, and of those in turn."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    wanted, seen = ["jax", "numpy", "optax"], set()
    while wanted:
        name = wanted.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            found = distribution(name)
        except PackageNotFoundError:  # asked for by another platform or version
            continue
        for file in found.files or ():
            top = target / file.parts[0]
            source = Path(found.locate_file(file.parts[0]))
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(source)
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
