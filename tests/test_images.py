"""Images: what is found, what is decoded, the array that is kept, the batches that come out."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from program import all_end, children, start

import utils

CPU = torch.device("cpu")
LANCZOS = Image.Resampling.LANCZOS


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of which no two parts look the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    """Writes an image, and the folders above it. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def photos(root: Path, n: int = 6, width: int = 20, height: int = 24) -> Path:
    """Makes a folder of n images; BMP files of a size are all as long. Returns it."""
    for i in range(n):
        save(root / "faces" / f"{i:06d}.bmp", noise(width, height, i))
    return root


def square(path: Path, size: int = 16, mode: str = "RGB") -> np.ndarray:
    """The largest central square of an image, in plain Pillow."""
    image = Image.open(path).convert(mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), LANCZOS))


def load(root: Path, **options: object) -> np.ndarray:
    """The array of a folder, decoded in this process unless `workers` says else."""
    return utils.load_images(root, size=16, **options)[0]


def check(array: np.ndarray, root: Path, without: str = "") -> None:
    """Compares rows with the files, in order of their paths."""
    paths = sorted((p for p in root.glob("*/*.*") if p.name != without), key=str)
    assert np.array_equal(array, np.stack([square(path) for path in paths]))


def arrays(folder: Path) -> list[Path]:
    """The arrays that are kept in a folder, in which nothing half-written may be."""
    assert not list(folder.glob(".*.tmp"))
    return list(folder.glob(".wae_*.u8"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded from here on."""
    names, decode = [], utils.Decoded.__getitem__
    record = lambda self, i: names.append(self.paths[i].name) or decode(self, i)  # noqa: E731
    monkeypatch.setattr(utils.Decoded, "__getitem__", record)
    return names


def test_find_images(tmp_path, capfd):
    root = tmp_path / ".hidden" / "data"  # the data set itself may lie in a hidden folder
    names = ["B/1.jpg", "a b/1.JPG", "a/1.webp", "a/sub.jpg", "a/sub/1.png", "a/z.Png", "b/1.jpg"]
    names += ["b/10.tiff", "b/2.bmp", "b/\u00e9\u4e16.jpeg", "c.jpg/5.jpg"]
    names += [f"d/1.{ending}" for ending in ("gif", "jfif", "jp2", "jpe", "ppm", "tga", "tif")]
    hidden = ["1.jpg", ".part/2.jpg", "a/.thumbnails/3.jpg", "a/._1.jpg", "a/b/.4.jpg"]
    for name in [*names, *hidden]:
        save(root / name, noise(8, 8))
    for name in ("a/1.txt", "b/2.TXT", "a/3.txt", "b/half.jpg.part", "a/4.part", "a/none", "x.txt"):
        (root / name).write_text("no image")
    (root / "linked").symlink_to(save(tmp_path / "elsewhere" / "1.jpg", noise(8, 8)).parent)
    found = utils.find_images(root)
    assert [name for name, _, _ in found] == [*names, "linked/1.jpg"]
    status = os.stat(root / "B/1.jpg")
    assert found[0] == ("B/1.jpg", status.st_size, status.st_mtime_ns)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("are left out: .txt (3), .part (2), none (1)")
    assert len(load(root)) == len(found)  # all of them can be read
    (root / "a" / "again").symlink_to("../d")
    words = f"^--dataroot={root}: {root}/(a/again|d) is .* again, by a link;"
    with pytest.raises(utils.UserError, match=words):
        load(root)


@pytest.mark.parametrize("name", [None, "1.jpg", "faces/list.txt", ".faces/1.jpg"])
def test_find_images_without_any(name, tmp_path):
    root = tmp_path / "data"
    if name is not None:
        save(root / name, noise(8, 8), format="png")
    what = "no such folder" if name is None else "no image in a folder inside it"
    where = f"images must lie in a folder inside it, as in {root}/sub_directory/XXX.jpg"
    others = "; files with other .* left out: .txt .1." if name == "faces/list.txt" else ""
    with pytest.raises(utils.UserError, match=f"^--dataroot={root}: {what}; {where}{others}$"):
        load(root)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.dstack([RAMP, RAMP.T, 255 - RAMP])
DEEP = RAMP.astype(np.uint16) * 257  # 0 to 65535, whose upper bytes are RAMP
PALETTE = Image.frombytes("P", (16, 16), RAMP.tobytes())
PALETTE.putpalette(COLOUR.tobytes())
INK = np.dstack([255 - COLOUR, 0 * RAMP])  # that absorbs what is missing to COLOUR
CUT_OUT = COLOUR.copy()  # with one transparent pixel
CUT_OUT[0, 7] = 255
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned clockwise
HALF = np.full_like(RAMP, 128)
VEILED, GREY_VEILED = (np.round(pixels * (128 / 255) + 127) for pixels in (COLOUR, RAMP))
KINDS = {
    "turned.png": (Image.fromarray(COLOUR), np.rot90(COLOUR, -1), {"exif": EXIF}),
    "grey.png": (Image.fromarray(RAMP), RAMP, {}),
    "palette.gif": (PALETTE, COLOUR, {}),
    "cmyk.tiff": (Image.frombytes("CMYK", (16, 16), INK.tobytes()), COLOUR, {}),
    "deep.png": (Image.fromarray(DEEP), RAMP, {}),
    "deep.pgm": (Image.fromarray(DEEP), RAMP, {}),
    "deep.tiff": (Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), RAMP, {}),
    "bits.pbm": (Image.fromarray(RAMP > 99), 255 * (RAMP > 99), {}),
    "rgba.png": (Image.fromarray(np.dstack([COLOUR, HALF])), VEILED, {}),
    "la.png": (Image.fromarray(np.dstack([RAMP, HALF])), GREY_VEILED, {}),
    "palette.png": (PALETTE, CUT_OUT, {"transparency": 7}),
    "key.png": (Image.fromarray(COLOUR), CUT_OUT, {"transparency": (7, 112, 248)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_open_image(name, tmp_path):
    image, expected, options = KINDS[name]
    path = save(tmp_path / name, image, **options)
    with Image.open(path) as read, open(path, "rb") as file:
        assert name == "deep.pgm" or read.mode == image.mode  # else this tests another kind
        pixels = np.asarray(utils.open_image(file, 3)).astype(int)
    rgb = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - rgb).max() <= (1 if image.mode in ("RGBA", "LA") else 0)


def test_load_images_rows(tmp_path):
    """In order of their paths, from workers; in grey, too."""
    for i in range(150):  # more than two batches of the workers
        save(tmp_path / f"{i % 3}" / f"{i * 7 % 150}.png", noise(9 + i % 5, 11, i))
    array, names, _ = utils.load_images(tmp_path, size=16, workers=2)
    check(array, tmp_path)
    assert names == sorted(f"{i % 3}/{i * 7 % 150}.png" for i in range(150))
    assert isinstance(array, np.memmap) and array.dtype == np.uint8 and not array.flags.writeable
    grey = load(tmp_path, channels=1)
    assert grey.shape == (150, 16, 16, 1)
    assert np.array_equal(grey[-1, ..., 0], square(tmp_path / names[-1], mode="L"))


CROPS = {("celebA", None): (19, 39, 159, 179), ("folder", None): (0, 20, 178, 198)}
CROPS[("celebA", 70)] = (54, 74, 124, 144)  # less than half of the image


@pytest.mark.parametrize(("dataset", "crop"), CROPS)
def test_load_images_crop(dataset, crop, tmp_path, capfd):
    path = save(tmp_path / "faces" / "1.jpg", noise(178, 218))
    expected = Image.open(path).crop(CROPS[dataset, crop]).resize((64, 64), LANCZOS)
    assert np.array_equal(utils.load_images(tmp_path, dataset, 64, crop)[0][0], expected)
    assert ("--dataset=folder" in capfd.readouterr().err) == (crop == 70)
    small = save(tmp_path / "faces" / "2.png", noise(200, 60))
    if dataset == "celebA":
        words = f"^{small}: 200 x 60 pixels, less than the crop of .* --dataset=folder$"
        with pytest.raises(utils.UserError, match=words):
            utils.load_images(tmp_path, dataset, 32, crop)
        assert len(arrays(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["cut", "page", "lost link", "pipe", "bomb", "F", "I"])
def test_load_images_skips(kind, tmp_path, capfd, decoded):
    """What cannot be read is named at every start, and tried again when it has changed."""
    bad = photos(tmp_path) / "faces" / "000002.bmp"
    content = {"cut": bad.read_bytes()[:600], "page": b"<html>404</html>"}
    content["bomb"] = b"P6 40000 40000 255\n" + bytes(100)  # 4.8 GB, if anybody believed it
    bad.unlink()
    if kind == "pipe":
        os.mkfifo(bad)
    elif kind in ("F", "I"):
        save(bad, Image.new(kind, (20, 20)), format="tiff")
    elif kind in content:
        bad.write_bytes(content[kind])
    else:
        bad.symlink_to("nowhere.bmp")
    reason = "32-bit pixels, whose range is unknown" if kind in ("F", "I") else ".+"
    told = rf"main.py: skipped 1 of 6 images that cannot be read: faces/000002.bmp \({reason}\)"
    for _ in range(2):
        check(load(tmp_path), tmp_path, without=bad.name)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
        assert re.fullmatch(told, line)
    assert len(decoded) == 6
    bad.unlink()
    save(bad, noise(20, 24))
    check(load(tmp_path), tmp_path)
    assert "skipped" not in capfd.readouterr().err


def test_load_images_skips_many(tmp_path, capfd):
    paths = sorted((photos(tmp_path, 14) / "faces").iterdir())
    strange = paths[0].with_name(os.fsdecode(b"a new\nline, not \xff utf-8, %s {}.bmp"))
    shutil.copy(paths[0], strange)
    for path in paths[1:13]:
        path.write_text("no image")
    _, names, _ = utils.load_images(tmp_path, size=16)
    assert names == ["faces/000000.bmp", "faces/000013.bmp", f"faces/{strange.name}"]
    listed = ", ".join(f"faces/{path.name}" for path in paths[1:11])
    assert f"skipped 12 of 15 images that cannot be read: {listed}, ... (" in capfd.readouterr().err
    for path in (paths[0], paths[13], strange):
        path.write_text("no image")
    with pytest.raises(
        utils.UserError, match="none of the 15 images can be read: faces/000000.bmp"
    ):
        load(tmp_path)


def test_load_images_without_rights(monkeypatch, tmp_path, capfd):
    """The array of a folder that cannot be written is in the user's cache."""
    root, home = photos(tmp_path / "data"), utils.make_folder(tmp_path / "home")
    secret, scandir = utils.make_folder(root / "secret"), os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scandir(path if path != str(secret) else "/-"))
    for name, value in (("HOME", str(home)), ("XDG_CACHE_HOME", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (root, os.W_OK))
    check(load(root), root)
    assert f"main.py: skipped the folder {secret}: No such file" in capfd.readouterr().err
    assert len(arrays(home / ".cache" / "wae")) == 1 and not arrays(root)
    (home / ".cache" / "wae").rename(home / "mine")
    (home / ".cache" / "wae").write_text("a file is in the way")
    with pytest.raises(utils.UserError, match="cannot be written: name a --cache_dir"):
        load(root)


def test_load_images_again(tmp_path, decoded):
    """An array is built once, moves with its folder, and takes no other one's place."""
    load(photos(tmp_path / "here"))
    there, two = (tmp_path / "here").rename(tmp_path / "there"), photos(tmp_path / "two", 3)
    check(load(there), there)
    for options in ({"crop": 10}, {"channels": 1}, {}):
        load(there, **options)
    assert len(arrays(there)) == 3 and len(decoded) == 3 * 6
    cache = tmp_path / "a" / "cache"
    for root in (there, two, there, two):
        check(load(root, cache_dir=cache), root)
        if root == two:
            save(there / "faces" / "7.bmp", noise(20, 24))
    assert len(decoded) == 3 * 6 + 6 + 3 + 7
    assert len(arrays(cache)) == 2 and not arrays(two)


CHANGES = {
    "add": lambda path: save(path.with_name("000001b.bmp"), noise(9, 9)),
    "remove": lambda path: path.unlink(),
    "rename": lambda path: path.rename(path.with_name("000009.bmp")),
    "overwrite": lambda path: save(path, noise(20, 24, 99)),
    "copy": lambda path: os.utime(path, (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_images_changed(change, tmp_path):
    """They are decoded anew, and the outdated array goes; the digest is of names and contents."""
    outdated, _, digest = utils.load_images(photos(tmp_path), size=16)
    before, (path,) = np.array(outdated), arrays(tmp_path)
    CHANGES[change](tmp_path / "faces" / "000001.bmp")
    array, _, new_digest = utils.load_images(tmp_path, size=16)
    check(array, tmp_path)
    assert len(arrays(tmp_path)) == 1 and arrays(tmp_path) != [path]
    assert (new_digest == digest) == (change == "copy")
    assert np.array_equal(outdated, before)  # a run that still reads it is not disturbed


DAMAGES = {
    "cut": lambda path: os.truncate(path, 5 * 768),
    "longer": lambda path: os.truncate(path, 6 * 768 + 1),
    "no notes": lambda path: path.with_suffix(".json").unlink(),
    "empty notes": lambda path: path.with_suffix(".json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_images_damaged_array(damage, tmp_path, capfd):
    load(photos(tmp_path))
    (path,) = arrays(tmp_path)
    whole = path.read_bytes()
    DAMAGES[damage](path)
    check(load(tmp_path), tmp_path)
    word = f"main.py: {path} is damaged or out of date: the images are decoded again\n"
    assert word in capfd.readouterr().err and path.read_bytes() == whole


def start_to_build(root: Path, n: int = 400) -> multiprocessing.process.BaseProcess:
    """A process that decodes n images, and has written the first of them."""
    first = photos(root, 1, 178, 218) / "faces" / "000000.bmp"
    for i in range(1, n):
        os.link(first, first.with_name(f"{i:06d}.bmp"))
    builder = start(utils.load_images, root, "folder", 64, None, 2)
    while not any(path.stat().st_size > 10**5 for path in root.glob(".*.tmp")):
        assert builder.is_alive()
        time.sleep(0.001)
    return builder


def test_load_images_in_two_processes(tmp_path, capfd, decoded):
    """One builds, the other waits and removes nothing."""
    builder = start_to_build(tmp_path)
    array, _, _ = utils.load_images(tmp_path)
    word = f"main.py: {tmp_path} is in use by process {builder.pid}: waiting for it\n"
    assert word in capfd.readouterr().err and decoded == []
    assert len(array) == 400 and np.array_equal(
        array[-1], square(tmp_path / "faces/000000.bmp", 64)
    )


def test_load_images_after_a_kill(tmp_path):
    """Neither processes nor files are left for good."""
    builder = start_to_build(tmp_path)
    workers = children(builder.pid)
    builder.kill()
    assert len(workers) == 2 and all_end(workers) and not list(tmp_path.glob(".*.u8"))
    (tmp_path / "faces" / "000000.bmp").unlink()  # so that the array has another name
    assert len(utils.load_images(tmp_path)[0]) == 399
    assert len(arrays(tmp_path)) == 1


def end_worker(self: utils.Decoded, i: int) -> None:
    """What the kernel does to a process where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def refused(*_: object, **options: object) -> None:
    """What the kernel answers where there are too many processes, or no memory, or no space."""
    raise BlockingIOError(11, "Resource temporarily unavailable")


FAILURES = {
    "space": (shutil, "disk_usage", lambda _: SimpleNamespace(free=9), "name another --cache_dir"),
    "disk": (os, "fsync", refused, "^cannot write {root}/.wae_16_3_None_here_"),
    "worker": (utils.Decoded, "__getitem__", end_worker, "use fewer --workers, or --workers=0"),
    "process": (os, "fork", refused, "(.*unavailable.*); use fewer --workers"),
    "map": (np, "memmap", refused, "^cannot map {root}/.wae_.*: name another --cache_dir"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_load_images_failures(name, monkeypatch, tmp_path, capfd):
    place, attribute, value, words = FAILURES[name]
    root = photos(tmp_path)
    monkeypatch.setattr(place, attribute, value)
    with pytest.raises(utils.UserError, match=words.format(root=root)):
        load(root, workers=1)
    assert "main.py:" not in capfd.readouterr().err
    monkeypatch.undo()
    check(load(root), root)
    assert len(arrays(root)) == 1


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    """Maps 50 images from disk."""
    path = tmp_path_factory.mktemp("mapped") / "array.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8))
    return np.load(path, mmap_mode="r")


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", ["mapped", "tensor"])
def test_batches(kind, device, array):
    device = torch.device(device)
    images = array if kind == "mapped" else torch.from_numpy(np.array(array)).to(device)
    for order in ([], [[7, 7, 0], [49]], utils.epoch_order(50, 1, 2).reshape(10, 5)):
        got = list(utils.batches(images, map(np.array, order), device))
        for batch, index in zip(got, order, strict=True):
            assert batch.device.type == device.type and batch.dtype == torch.uint8
            assert np.array_equal(batch.cpu(), array[index])
    got[1].zero_()  # a batch is the consumer's own
    assert np.array_equal(got[2].cpu(), array[order[2]])


def test_batches_thread(array):
    """It reads few batches ahead, and ends with its consumer."""
    asked, before = [], threading.active_count()
    indices = (asked.append(index) or index for index in np.arange(50).reshape(25, 2))
    for taken, _ in enumerate(utils.batches(array, indices, CPU, ahead=3), 1):
        assert len(asked) <= taken + 3
    assert taken == 25
    with contextlib.closing(utils.batches(array, np.arange(50).reshape(25, 2), CPU)) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(IndexError):  # an error of the thread reaches the consumer
        list(utils.batches(array, [np.array([1]), np.array([50])], CPU))


def test_from_uint8_and_to_uint8():
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    batch[1], batch[..., 1] = batch[1].flip(0), 51
    plain, pixels = utils.from_uint8(batch, False), batch.numpy().transpose(0, 3, 1, 2)
    np.testing.assert_allclose(plain, pixels / 255, rtol=0, atol=1e-7)
    np.testing.assert_allclose(utils.from_uint8(batch, True), pixels / 127.5 - 1, atol=2e-7)
    assert plain.dtype == torch.float32 and plain.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(utils.to_uint8(plain + 0.4 / 255), batch)  # rounds
    assert utils.to_uint8(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1)).ravel().tolist() == [0, 255]


def test_epoch_order():
    """A permutation, a function of seed and epoch alone."""
    keys = [(seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 54)]
    orders = [tuple(utils.epoch_order(1000, *key)) for key in keys]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len(set(orders)) == len(orders) and tuple(utils.epoch_order(1000, 0, 0)) == orders[0]
