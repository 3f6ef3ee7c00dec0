"""The pages on other libraries and on logging: each section is a program of its own."""

import re
import struct
import warnings
from pathlib import Path

import pytest
from support import documents
from support.selection import some

SECTIONS = {
    name: (page, program)
    for page in ("libraries.md", "logging.md")
    for name, program in documents.sections(documents.ROOT / "docs" / page).items()
}
SLOW = (
    "Graphs with jraph",
    "Training loops",
    "A physics-informed network",
    "Differential equations with diffrax",
    "Weights & Biases",
)
# Not in the extra "test": a program of 20 MB that runs beside Python.
NOT_REQUIRED = ("wandb",)


def test_every_section_has_a_program():
    assert len(SECTIONS) == 9
    assert set(SLOW) < set(SECTIONS)


def run(name):
    """What the program of a section has defined."""
    page, program = SECTIONS[name]
    for library in re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE):
        with warnings.catch_warnings():  # those of importing it are not ours
            warnings.simplefilter("ignore")
            if library in NOT_REQUIRED:
                reason = f"{library} is not installed: pip install {library}"
                pytest.importorskip(library, reason=reason)
            else:
                __import__(library)
    namespace = {"__name__": "section"}
    exec(compile(program, f"{page}: {name}", "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb")
@pytest.mark.parametrize(
    "name", some(list(SECTIONS), default=[x for x in SECTIONS if x not in SLOW])
)
def test_the_program_of_a_section_runs(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = run(name)
    if name == "TensorBoard":
        _check_events(tmp_path, namespace["metrics"])
    if name == "Weights & Biases":
        (run_folder,) = Path("wandb").glob("offline-run-*")
        (record,) = run_folder.glob("*.wandb")
        for key in ("learning_rate/hidden", "predicted_decrease", "train_loss"):
            assert key.encode() in record.read_bytes()
    if name == "Figures":
        assert Path("newton.png").read_bytes().startswith(b"\x89PNG")


def _check_events(folder, metrics):
    """The file of TensorBoard contains each metric at each logged step."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("runs/newton/events*")
    content, place, found = path.read_bytes(), 0, {}
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        place += 16 + length  # the length and the data, each with a checksum
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert found.keys() == metrics.keys()
    for points in found.values():
        assert [i for i, _ in points] == [0, 10, 20, 30, 40]
    losses = [value for _, value in found["train_loss"]]
    assert losses[-1] < losses[0]
