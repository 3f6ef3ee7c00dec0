"""The readers, on small files in exactly the formats of the real ones."""

import gzip
import pickle
import struct

import numpy as np
import pytest

from partnewton.demo import data

IDX_FILES = {
    "train-images-idx3-ubyte": (7, 5, 4),
    "train-labels-idx1-ubyte": (7,),
    "t10k-images-idx3-ubyte": (3, 5, 4),
    "t10k-labels-idx1-ubyte": (3,),
}


def idx_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
        for name, shape in IDX_FILES.items()
    }


def idx_bytes(array):
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + sizes + array.tobytes()


def write_idx(folder, arrays, *, dotted=False, zipped=False):
    for name, array in arrays.items():
        name = name.replace("-idx", ".idx") if dotted else name
        content = idx_bytes(array)
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


def write_cifar(folder, count=2, seed=0):
    """Five batches and a test batch; returns the records, (6, count, 3073)."""
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, (6, count, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    for i, batch in enumerate(records):
        name = "test_batch.bin" if i == 5 else f"data_batch_{i + 1}.bin"
        (folder / name).write_bytes(batch.tobytes())
    return records


def assert_well_formed(dataset):
    for images, labels in (dataset[:2], dataset[2:4]):
        assert images.ndim == 4
        assert images.dtype == np.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.shape == images.shape[:1]
        assert labels.dtype == np.int32


# --- The digits ------------------------------------------------------------------


def test_digits_are_the_real_ones_split_by_class():
    dataset = data.digits(seed=3)
    assert_well_formed(dataset)
    assert len(dataset.train_images) + len(dataset.test_images) == 1797
    assert dataset.train_images.shape[1:] == (8, 8, 1)
    assert dataset.train_images.max() == 1
    shares = [np.bincount(x) / len(x) for x in (dataset[1], dataset[3])]
    np.testing.assert_allclose(*shares, atol=2e-3)


def test_the_seed_decides_the_split_of_the_digits():
    one, same, other = (data.digits(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.test_images, same.test_images)
    np.testing.assert_array_equal(one.train_labels, same.train_labels)
    assert not np.array_equal(one.test_images, other.test_images)


# --- IDX files -------------------------------------------------------------------


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_under_all_their_names(tmp_path, dotted, zipped):
    arrays = idx_arrays()
    write_idx(tmp_path, arrays, dotted=dotted, zipped=zipped)
    dataset = data.from_folder(tmp_path)
    assert_well_formed(dataset)
    assert dataset.name == tmp_path.name
    for values, array in zip(dataset[:4], arrays.values(), strict=True):
        if array.ndim == 3:
            np.testing.assert_array_equal(np.rint(values[..., 0] * 255), array)
        else:
            np.testing.assert_array_equal(values, array)


def test_idx_styles_may_be_mixed(tmp_path):
    arrays = idx_arrays()
    names = list(arrays)
    write_idx(tmp_path, {name: arrays[name] for name in names[:2]}, zipped=True)
    write_idx(tmp_path, {name: arrays[name] for name in names[2:]}, dotted=True)
    np.testing.assert_array_equal(
        data.from_folder(str(tmp_path)).test_labels, arrays[names[3]]
    )


def test_a_known_idx_file_byte_by_byte(tmp_path):
    write_idx(tmp_path, idx_arrays())
    content = bytes.fromhex("00000803 00000001 00000002 00000003 0033 6699 ccff")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(
        bytes.fromhex("00000801 00000001 09")
    )
    train = np.zeros((7, 2, 3), np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(train))
    dataset = data.from_folder(tmp_path)
    expected = [[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]]
    np.testing.assert_allclose(dataset.test_images[..., 0], expected, rtol=1e-6)
    assert dataset.test_labels.tolist() == [9]


def broken_idx(name, change):
    def write(folder):
        write_idx(folder, idx_arrays())
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return write


def replaced(name, array):
    return broken_idx(name, lambda _: idx_bytes(array))


def zipped_badly(change):
    def write(folder):
        write_idx(folder, idx_arrays(), zipped=True)
        path = folder / "t10k-images-idx3-ubyte.gz"
        path.write_bytes(change(path.read_bytes()))

    return write


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BROKEN_IDX = {
    "shorter than its header": (
        broken_idx(IMAGES, lambda x: x[:9]),
        f"{IMAGES}: truncated, 9 bytes are less than the 16",
    ),
    "no bytes at all": (broken_idx(LABELS, lambda x: b""), f"{LABELS}: truncated"),
    "truncated": (
        broken_idx(IMAGES, lambda x: x[:-1]),
        r"truncated, 139 bytes follow the header, expected 7 x 5 x 4 = 140",
    ),
    "too long": (broken_idx(IMAGES, lambda x: x + b"\0"), "too long, 141 bytes"),
    "bad magic": (
        broken_idx(IMAGES, lambda x: b"\x7fELF" + x[4:]),
        r"bad magic number 0x7f454c46, expected 0x00000803 \(IDX.*3 dimensions\)",
    ),
    "labels where images should be": (
        replaced(IMAGES, np.zeros(99, np.uint8)),
        "bad magic number 0x00000801, expected 0x00000803",
    ),
    "images where labels should be": (
        replaced(LABELS, np.zeros((7, 5, 4), np.uint8)),
        "bad magic number 0x00000803, expected 0x00000801",
    ),
    "floats instead of bytes": (
        broken_idx(IMAGES, lambda x: b"\0\0\x0d\3" + x[4:]),
        "bad magic number 0x00000d03",
    ),
    "more labels than images": (
        replaced(LABELS, np.zeros(8, np.uint8)),
        f"{LABELS}: 8 labels, but {IMAGES} has 7 images",
    ),
    "a label out of range": (
        replaced(LABELS, np.array([0, 1, 2, 10, 3, 4, 5], np.uint8)),
        "the label 10 at position 3 is out of range, expected 0 to 9",
    ),
    "an empty set": (
        replaced(IMAGES, np.zeros((0, 5, 4), np.uint8)),
        "an empty data set, its header contains 0 x 5 x 4",
    ),
    "images without pixels": (
        replaced(IMAGES, np.zeros((7, 0, 4), np.uint8)),
        "an empty data set, its header contains 7 x 0 x 4",
    ),
    "test images of another size": (
        replaced("t10k-images-idx3-ubyte", np.zeros((3, 6, 4), np.uint8)),
        "images of 6 x 4 pixels, but those of train-images-idx3-ubyte have 5 x 4",
    ),
    "sizes beyond all files": (
        broken_idx(IMAGES, lambda x: x[:4] + b"\xff" * 12 + x[16:]),
        "truncated, 140 bytes follow the header",
    ),
    "no gzip file": (zipped_badly(lambda x: b"plain text"), "not a valid gzip file"),
    "a truncated gzip file": (zipped_badly(lambda x: x[:-9]), "not a valid gzip file"),
    "a damaged gzip file": (
        zipped_badly(lambda x: x[:12] + bytes(255 - b for b in x[12:30]) + x[30:]),
        "not a valid gzip file",
    ),
}


@pytest.mark.parametrize("what", BROKEN_IDX)
def test_a_broken_idx_file_is_named_with_what_is_wrong(tmp_path, what):
    write, message = BROKEN_IDX[what]
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        data.from_folder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


# --- CIFAR-10 --------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_is_read_channel_by_channel(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-bin" if inside else tmp_path
    folder.mkdir(exist_ok=True)
    records = write_cifar(folder)
    dataset = data.from_folder(tmp_path)
    assert_well_formed(dataset)
    assert dataset.train_images.shape == (10, 32, 32, 3)
    assert dataset.test_labels.tolist() == records[5, :, 0].tolist()
    assert dataset.train_labels.tolist() == records[:5, :, 0].ravel().tolist()
    row, column, channel = 3, 17, 2
    byte = records[2, 1, 1 + channel * 1024 + row * 32 + column]
    pixel = dataset.train_images[2 * 2 + 1, row, column, channel]
    np.testing.assert_allclose(pixel, byte / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data_batch_3.bin",
            b"\1" * 3074,
            "truncated, 3074 bytes are not a multiple of",
        ),
        ("test_batch.bin", b"", "an empty data set"),
        ("test_batch.bin", b"\x0b" + b"\0" * 3072, "label 11 at position 0 is out"),
    ],
)
def test_a_broken_cifar_file_is_named_with_what_is_wrong(
    tmp_path, name, content, message
):
    write_cifar(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        data.from_folder(tmp_path)


# --- What is not there, and what must not be loaded ------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        data.from_folder(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file: there is no such folder"):
        data.from_folder(tmp_path / "file")


def test_a_folder_without_a_data_set_says_what_was_looked_for(tmp_path):
    (tmp_path / "train-images.npy").touch()
    with pytest.raises(FileNotFoundError, match=r"no data set found.*idx3.*data_"):
        data.from_folder(tmp_path)


@pytest.mark.parametrize("name", IDX_FILES)
def test_a_missing_idx_file_is_named(tmp_path, name):
    write_idx(tmp_path, idx_arrays())
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: missing \(or {name}\.gz"):
        data.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_5.bin", "test_batch.bin"])
def test_a_missing_cifar_file_is_named(tmp_path, name):
    write_cifar(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: missing"):
        data.from_folder(tmp_path)


class Explosive:
    """Whoever unpickles this notices."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_a_pickle_is_never_loaded(tmp_path):
    # The names of the other version of CIFAR-10, and then a pickle under a good name.
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(FileNotFoundError, match="no data set found"):
        data.from_folder(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(ValueError, match="not a multiple"):
        data.from_folder(tmp_path)
