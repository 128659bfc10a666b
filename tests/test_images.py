"""Images: what is found, held out, decoded and kept, and the batches that come out."""

import contextlib
import errno
import multiprocessing
import os
import re
import shutil
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import main
import utils

CPU = torch.device("cpu")
LANCZOS = Image.Resampling.LANCZOS


def noise(width: int = 20, height: int = 24, seed: int = 0) -> Image.Image:
    """An image of which no two parts look the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    """Writes an image, and the folders above it. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def photos(root: Path, n: int = 6, folders: tuple[str, ...] = ("faces",)) -> Path:
    """Makes folders of n images each, all different; the files are all as long. Returns root."""
    for k, folder in enumerate(folders):
        for i in range(n):
            save(root / folder / f"{i:03d}.bmp", noise(seed=1000 * k + i))
    return root


def square(path: Path, size: int = 16, mode: str = "RGB") -> np.ndarray:
    """The largest central square of an image, in plain Pillow."""
    image = Image.open(path).convert(mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), LANCZOS))


def load(root: Path, testroot: Path | None = None, **options: object) -> utils.Data:
    """The images of a folder, 16 pixels a side."""
    return utils.load_images(root, testroot, **{"size": 16, "crop": None, "channels": 3} | options)


def check(data: utils.Data, root: Path) -> None:
    """Compares the rows with the files, in order of their paths."""
    paths = sorted(root.glob("[!.]*/*.*"), key=str)
    assert np.array_equal(data.images, np.stack([square(path) for path in paths]))
    assert data.names == [str(path.relative_to(root)) for path in paths]


def arrays(folder: Path) -> list[Path]:
    """The arrays that are kept in a folder, in which nothing half-written may be."""
    files = list((folder / ".wae").glob("[!.]*"))
    assert all(path.suffix in (".u8", ".json") for path in files)
    assert len(list((folder / ".wae").glob(".*"))) <= 1  # the lock
    return [path for path in files if path.suffix == ".u8"]


@pytest.fixture
def reading(monkeypatch):
    """Counts the images that are decoded; a file in its `errors` cannot be read."""
    decode = utils.read_image

    def read(path: Path, **how: object) -> np.ndarray:
        read.count += 1
        if number := read.errors.get(path):
            raise OSError(number, os.strerror(number), str(path))
        return decode(path, **how)

    read.count, read.errors = 0, {}
    monkeypatch.setattr(utils, "read_image", read)
    return read


# --------------------------------------------------------------------------------------------------
# What is found and held out


def test_find_images(tmp_path, capfd):
    root = tmp_path / ".hidden" / "data"  # the data set itself may lie in a hidden folder
    names = ["0.jpg", "B/1.jpg", "a b/1.JPG", "a/1.webp", "a/sub.jpg", "a/sub/1.png", "a/z.Png"]
    names += ["b/10.tiff", "b/2.bmp", "b/\u00e9\u4e16.jpeg", "c.jpg/5.jpg"]
    names += [f"d/1.{ending}" for ending in ("gif", "jfif", "jp2", "jpe", "ppm", "tga", "tif")]
    hidden = [".1.jpg", ".part/2.jpg", "a/.thumbnails/3.jpg", "a/._1.jpg"]
    hidden += ["a/@eaDir/z.Png/S_M.jpg", "$RECYCLE.BIN/S-1/$R0.png"]
    for name in [*names, *hidden]:
        save(root / name, noise())
    strange = ["a/1.txt", "b/2.TXT", "a/3.txt", "b/half.jpg.part", "a/4.part", "a/none"]
    for name in [*strange, "Thumbs.db", "desktop.ini"]:
        (root / name).write_text("no image")
    save(tmp_path / "elsewhere" / "1.jpg", noise())
    for name in ("linked", "linked again"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    (root / "d" / "loop").symlink_to(root)
    (root / "d" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "d" / "pipe.jpg")
    found = utils.find_images(root)
    assert [name for name in found if "linked" not in name] == names
    assert len(found) == len(names) + 1  # the linked folder, once
    status = os.stat(root / "B" / "1.jpg")
    assert found["B/1.jpg"] == (status.st_size, status.st_ctime_ns)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{root}: left out, by their endings: .txt (3), .part (2), none (1); images end" in line
    assert len(load(root).images) == len(found)  # all of them can be read


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "no such folder"),
        (".faces/1.jpg", "no image in it or in a folder inside it"),
        ("faces/1.zip", r"no image in .*; left out, by their endings: .zip \(1\)"),
    ],
)
def test_find_images_without_any(name, words, tmp_path):
    root = tmp_path / "data"
    if name is not None:
        save(root / name, noise(), format="png")
    with pytest.raises(utils.UserError, match=f"^{root}: {words}$"):
        load(root)


@pytest.mark.parametrize(
    ("counts", "n_test", "held_out"),
    [
        ({"faces": 50}, 5, {"faces": 5}),
        ({str(digit): 10 for digit in range(10)}, 10, {str(digit): 1 for digit in range(10)}),
        ({"cats": 70, "dogs": 30}, 10, {"cats": 7, "dogs": 3}),
        ({"": 30, "more": 10}, 20, {"": 15, "more": 5}),
        ({str(i): 1 for i in range(10)}, 2, {"4": 1, "9": 1}),
        ({"a": 1, "b": 2, "c": 4}, 3, {"b": 1, "c": 2}),
    ],
)
def test_hold_out(counts, n_test, held_out):
    """The last ones of each folder by path, in proportion, n_test in all."""
    names = [os.path.join(folder, f"{i:02d}.jpg") for folder, n in counts.items() for i in range(n)]
    expected = [
        os.path.join(folder, f"{i:02d}.jpg")
        for folder, n in held_out.items()
        for i in range(counts[folder] - n, counts[folder])
    ]
    data = utils.hold_out(utils.Data(None, names, None, None, None, ""), n_test)
    assert [names[row] for row in data.test] == expected
    assert sorted([*data.train, *data.test]) == list(range(len(names)))


def run_data(root: Path, *flags: str) -> utils.Data:
    """The images that a run trains on and holds out."""
    argv = [f"--dataroot={root}", "--image_size=32", "--dataset=folder", "--batch_size=2", *flags]
    flags = main.parse([*argv, f"--outf={root}_out"])[1]
    return main.load_data(flags, None, utils.World(0, 1, CPU))


def test_split_of_a_run(tmp_path):
    """The last tenth of each folder; the line that says so counts copies in both halves."""
    root = photos(tmp_path / "data", 30, ("cats", "dogs"))
    for copied, to in (("cats/000", "dogs/029"), ("cats/001", "cats/002")):
        shutil.copy(root / f"{copied}.bmp", root / f"{to}.bmp")
    for _ in range(2):  # when they are decoded, and ever after
        data = run_data(root)
        held_out = [f"{name}/{i:03d}.bmp" for name in ("cats", "dogs") for i in (27, 28, 29)]
        assert [data.names[row] for row in data.test] == held_out
        assert sorted([*data.train, *data.test]) == list(range(60))
        line = "54 images + 6 held out (cats 27 + 3, dogs 27 + 3), of which 1 are also trained on"
        assert utils.count_images(data).startswith(line)
    assert len(run_data(root, "--n_test=17").test) == 17


def test_split_by_testroot(tmp_path, capfd):
    """All images of the other folder are held out, also where it is inside of the first."""
    root = photos(tmp_path / "data", 4, ("test/a", "train/a", "train/b"))
    for dataroot, trained in ((root / "train", ("a", "b")), (root, ("train/a", "train/b"))):
        data = run_data(dataroot, f"--testroot={root / 'test'}")
        train = Counter(os.path.dirname(data.names[row]) for row in data.train)
        assert train == dict.fromkeys(trained, 4)
        assert [data.names[row] for row in data.test] == [f"a/{i:03d}.bmp" for i in range(4)]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (("test", "train"), "--dataroot={0}/train --testroot={0}/test tells them apart"),
        (("x/train/a", "x/val/a"), "--dataroot={0}/x/train --testroot={0}/x/val tells them apart"),
        (("images", "masks"), "--dataroot={0}/images leaves them out"),
        (("train/good", "ground_truth/bad"), "--dataroot={0}/train leaves them out"),
        (("cats", "test"), None),
        (("masks",), None),
    ],
)
def test_folders_that_are_no_classes(folders, hint, tmp_path, capfd):
    utils.warn_of_folders(tmp_path, [f"{folder}/1.png" for folder in folders])
    lines = capfd.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in lines] == ([hint.format(tmp_path)] if hint else [])


# --------------------------------------------------------------------------------------------------
# What is decoded

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
TWO = {"save_all": True, "append_images": [Image.fromarray(255 - RAMP)]}
TEXT = PngInfo()
TEXT.add_text("Photoshop", "x" * 2_000_000, zip=True)
KINDS = {
    "turned.png": (Image.fromarray(COLOUR), np.rot90(COLOUR, -1), {"exif": EXIF}),
    "grey.png": (Image.fromarray(RAMP), RAMP, {}),
    "palette.gif": (PALETTE, COLOUR, {}),
    "frames.gif": (Image.fromarray(RAMP), RAMP, TWO),
    "pages.tiff": (Image.fromarray(RAMP), RAMP, TWO),
    "cmyk.tiff": (Image.frombytes("CMYK", (16, 16), INK.tobytes()), COLOUR, {}),
    "deep.png": (Image.fromarray(DEEP), RAMP, {}),
    "deep.pgm": (Image.fromarray(DEEP), RAMP, {}),
    "deep.tiff": (Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), RAMP, {}),
    "bits.pbm": (Image.fromarray(RAMP > 99), 255 * (RAMP > 99), {}),
    "rgba.png": (Image.fromarray(np.dstack([COLOUR, HALF])), VEILED, {}),
    "la.png": (Image.fromarray(np.dstack([RAMP, HALF])), GREY_VEILED, {}),
    "palette.png": (PALETTE, CUT_OUT, {"transparency": 7}),
    "key.png": (Image.fromarray(COLOUR), CUT_OUT, {"transparency": (7, 112, 248)}),
    "text.png": (Image.fromarray(COLOUR), COLOUR, {"pnginfo": TEXT}),
}


@pytest.mark.parametrize("name", KINDS)
def test_read_image(name, tmp_path):
    image, expected, options = KINDS[name]
    path = save(tmp_path / name, image, **options)
    with Image.open(path) as read:  # else this tests another kind
        assert name == "deep.pgm" or read.mode == image.mode
        assert getattr(read, "n_frames", 1) == (2 if options is TWO else 1)
    pixels = utils.read_image(path, 16, None, 3).astype(int)
    rgb = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - rgb).max() <= (1 if image.mode in ("RGBA", "LA") else 0)
    assert Image.MAX_IMAGE_PIXELS is None  # a scan of 200 megapixels is read, too


def test_load_images_rows(tmp_path):
    """In order of their paths, whichever thread is done first; in grey, too."""
    for i in range(150):
        save(tmp_path / f"{i % 3}" / f"{i * 7 % 150}.png", noise(9 + i % 5, 11 + 99 * (i < 5), i))
    data = load(tmp_path)
    check(data, tmp_path)
    assert isinstance(data.images, np.memmap) and not data.images.flags.writeable
    grey = load(tmp_path, channels=1)
    assert grey.images.shape == (150, 16, 16, 1)
    assert np.array_equal(grey.images[-1, ..., 0], square(tmp_path / grey.names[-1], mode="L"))


@pytest.mark.parametrize(
    ("crop", "box"),
    [(140, (19, 39, 159, 179)), (70, (54, 74, 124, 144)), (None, (0, 20, 178, 198))],
)
def test_load_images_crop(crop, box, tmp_path):
    path = save(tmp_path / "faces" / "1.jpg", noise(178, 218))
    expected = Image.open(path).crop(box).resize((64, 64), LANCZOS)
    assert np.array_equal(load(tmp_path, size=64, crop=crop).images[0], expected)
    small = save(tmp_path / "faces" / "2.png", noise(200, 60))
    if crop:
        words = f"^{small}: 200 x 60 pixels, less than the crop of .* --dataset=folder$"
        with pytest.raises(utils.UserError, match=words):
            load(tmp_path, size=32, crop=crop)


def test_load_images_skips(tmp_path, capfd, reading):
    """What cannot be read is counted by its reason, and three are named, at every start."""
    faces = photos(tmp_path) / "faces"
    for i in range(5):
        (faces / f"a{i}.jpg").write_text("<!DOCTYPE html><HTML><p>404</p></html>")
    (faces / "b.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (faces / "c\n.png").write_text("hello")  # a strange name stays in the line
    whole = save(faces / "d.png", noise()).read_bytes()
    (faces / "d.png").write_bytes(whole[:600])
    (faces / "e.tif").write_bytes(struct.pack("<4sHHQ", b"II+\0", 8, 0, 2**62))  # begins nowhere
    for kind in "FI":
        save(faces / f"{kind}.tiff", Image.new(kind, (20, 20)))
    words = ["5 x a web page (faces/a0.jpg, faces/a1.jpg, faces/a2.jpg, ...)"]
    words += ["1 x a pointer of Git LFS; `git lfs pull` brings the images (faces/b.png)"]
    words += [r"1 x not an image (faces/c\n.png)", "2 x its pixels are signed, of 32 bits"]
    words += ["(faces/F.tiff, faces/I.tiff)", "truncated (faces/d.png)", "(faces/e.tif)"]
    for _ in range(2):
        data = load(tmp_path)
        assert data.names == [f"faces/{i:03d}.bmp" for i in range(6)]
        assert np.array_equal(data.images[5], square(faces / "005.bmp"))
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("main.py: skipped 11 of 17 images: ")
        assert [word for word in words if word not in line] == []
    assert reading.count == 17
    for path in faces.glob("0*"):
        path.unlink()
    with pytest.raises(utils.UserError, match="none of the 11 images can be read: 2 x its pixels"):
        load(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_load_images_that_cannot_be_read(number, tmp_path, capfd, reading):
    """A file without rights is skipped until it has them; a disk that fails ends the decoding."""
    path = photos(tmp_path) / "faces" / "002.bmp"
    reading.errors[path] = number
    if number == errno.EACCES:
        assert len(load(tmp_path).images) == 5
        assert "skipped 1 of 6 images: 1 x Permission denied" in capfd.readouterr().err
    else:
        with pytest.raises(utils.UserError, match=f"^{path}: Input/output error$"):
            load(tmp_path)
        assert not arrays(tmp_path)
    reading.errors.clear()
    path.chmod(0o600)
    check(load(tmp_path), tmp_path)


# --------------------------------------------------------------------------------------------------
# What is kept


def test_load_images_again(tmp_path, reading):
    """An array is built once, moves with its folder, and takes no other one's place."""
    load(photos(tmp_path / "here"))
    there = (tmp_path / "here").rename(tmp_path / "there")
    two = photos(tmp_path / "two", 3)
    check(load(there), there)
    for options in ({"crop": 10}, {"channels": 1}, {"testroot": two}, {}):
        load(there, **options)
    assert len(arrays(there)) == 4 and reading.count == 3 * 6 + 9
    cache = tmp_path / "a" / "cache"
    for root in (there, two, there, two):
        check(load(root, cache_dir=cache), root)
    assert len(arrays(cache)) == 2 and not arrays(two)
    assert reading.count == 3 * 6 + 9 + 6 + 3


CHANGES = {
    "add": lambda path: save(path.with_name("001b.bmp"), noise(9, 9)),
    "remove": lambda path: path.unlink(),
    "rename": lambda path: path.rename(path.with_name("009.bmp")),
    "overwrite": lambda path: save(path, noise(seed=99)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_images_changed(change, tmp_path):
    """They are decoded anew, and the outdated array goes; the digest is of names and sizes."""
    outdated = load(photos(tmp_path))
    before = np.array(outdated.images)
    CHANGES[change](tmp_path / "faces" / "001.bmp")
    data = load(tmp_path)
    check(data, tmp_path)
    assert len(arrays(tmp_path)) == len(list(tmp_path.glob(".wae/*.json"))) == 1
    assert (data.digest == outdated.digest) == (change == "overwrite")
    assert np.array_equal(outdated.images, before)  # a run that still reads it is not disturbed


def no_space(_: int) -> None:
    """What a full disk answers to os.fsync."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["rights", "space"])
def test_load_images_that_cannot_be_kept(what, tmp_path, monkeypatch):
    """One line names the flag that helps."""
    root = photos(tmp_path / "data")
    cache = tmp_path / "cache"
    if what == "rights":
        cache.write_text("a file is in the way")
    else:
        monkeypatch.setattr(os, "fsync", no_space)
    words = f"^cannot write {cache}/.*: .*; --cache_dir names a place for decoded images$"
    with pytest.raises(utils.UserError, match=words):
        load(root, cache_dir=cache)
    assert not arrays(cache) and not arrays(root)


@pytest.mark.parametrize("killed", [False, True])
def test_load_images_beside_another_process(killed, tmp_path, capfd, monkeypatch):
    """One decodes, and the other waits for it; what a killed one left is not left for good."""
    photos(tmp_path, 20)
    seen = tmp_path / ".decoded"  # a byte for each image that anybody decodes
    decode = utils.read_image

    def slowly(path: Path, **how: object) -> np.ndarray:
        with open(seen, "a") as file:
            file.write(".")
        time.sleep(0.05)
        return decode(path, **how)

    monkeypatch.setattr(utils, "read_image", slowly)
    builder = multiprocessing.get_context("fork").Process(target=load, args=(tmp_path,))
    builder.start()
    while not seen.exists():
        assert builder.is_alive()
        time.sleep(0.001)
    if killed:
        builder.kill()
        builder.join()
        assert list(tmp_path.glob(".wae/.*.tmp")) and not list(tmp_path.glob(".wae/*.u8"))
        (tmp_path / "faces" / "000.bmp").unlink()  # so that the array has another name
    check(load(tmp_path), tmp_path)
    builder.join()
    assert len(arrays(tmp_path)) == 1
    if not killed:
        line = re.escape(f"main.py: {tmp_path}/.wae is in use by another process: waiting for it")
        assert re.search(line, capfd.readouterr().err)
        assert builder.exitcode == 0 and seen.stat().st_size == 20


# --------------------------------------------------------------------------------------------------
# Batches

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    """Maps 50 images from disk."""
    path = tmp_path_factory.mktemp("mapped") / "array.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8))
    return np.load(path, mmap_mode="r")


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
    out = torch.empty((5, *array.shape[1:]), dtype=torch.uint8, device=device)
    for batch, index in zip(utils.batches(images, order, device, out), order, strict=True):
        assert batch is out and np.array_equal(out.cpu(), array[index])


def test_batches_thread(array):
    """It reads few batches ahead, and ends with its consumer."""
    asked = []
    before = threading.active_count()
    order = np.arange(50).reshape(25, 2)
    indices = (asked.append(index) or index for index in order)
    for taken, _ in enumerate(utils.batches(array, indices, CPU), 1):
        assert len(asked) <= taken + 3
    assert taken == 25
    with contextlib.closing(utils.batches(array, order, CPU)) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(IndexError):  # an error of the thread reaches the consumer
        list(utils.batches(array, [np.array([1]), np.array([50])], CPU))


def test_from_uint8_and_to_uint8():
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    batch[1], batch[..., 1] = batch[1].flip(0), 51
    images = utils.from_uint8(batch)
    expected = batch.numpy().transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-7)
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(utils.to_uint8(images + 0.4 / 255), batch)  # rounds
    assert utils.to_uint8(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1)).ravel().tolist() == [0, 255]


def test_epoch_order():
    """A permutation, a function of seed and epoch alone."""
    keys = [(seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 54)]
    orders = [tuple(utils.epoch_order(1000, *key)) for key in keys]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len(set(orders)) == len(orders) and tuple(utils.epoch_order(1000, 0, 0)) == orders[0]
