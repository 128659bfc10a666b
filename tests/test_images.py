"""Images: what is found, what is held out, what is decoded and kept, the batches that come out."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
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

CPU = utils.World(0, 1, torch.device("cpu"))
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


def photos(root: Path, n: int = 6, folders: tuple[str, ...] = ("faces",)) -> Path:
    """Makes folders of n images each, all different; the files are all as long. Returns root."""
    for k, folder in enumerate(folders):
        for i in range(n):
            save(root / folder / f"{i:03d}.bmp", noise(20, 24, 1000 * k + i))
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
    how = {"size": 16, "crop": None, "channels": 3} | options
    return utils.load_images(root, testroot, **how)


def check(data: utils.Data, root: Path, without: str = "") -> None:
    """Compares rows with the files, in order of their paths."""
    paths = sorted((path for path in root.glob("*/*.*") if path.name != without), key=str)
    assert np.array_equal(data.images, np.stack([square(path) for path in paths]))
    assert data.names == [str(path.relative_to(root)) for path in paths]


def arrays(folder: Path) -> list[Path]:
    """The arrays that are kept in a folder, in which nothing half-written may be."""
    assert not list(folder.glob(".*.tmp"))
    return list(folder.glob(".wae_*.u8"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded from here on."""
    names = []
    decode = utils.read_image

    def record(path: Path, **how: object) -> np.ndarray:
        names.append(path.name)
        return decode(path, **how)

    monkeypatch.setattr(utils, "read_image", record)
    return names


@pytest.fixture
def break_reading(monkeypatch):
    """A function that makes reading one image raise an error of that number."""

    def break_one(broken: Path, number: int) -> None:
        def read(path: Path, **how: object) -> np.ndarray:
            if path == broken:
                raise OSError(number, os.strerror(number), str(path))
            return np.zeros((how["size"], how["size"], how["channels"]), np.uint8)

        monkeypatch.setattr(utils, "read_image", read)

    return break_one


# --------------------------------------------------------------------------------------------------
# What is found


def test_find_images(tmp_path, capfd):
    root = tmp_path / ".hidden" / "data"  # the data set itself may lie in a hidden folder
    names = ["0.jpg", "B/1.jpg", "a b/1.JPG", "a/1.webp", "a/sub.jpg", "a/sub/1.png", "a/z.Png"]
    names += ["b/1.jpg", "b/10.tiff", "b/2.bmp", "b/\u00e9\u4e16.jpeg", "c.jpg/5.jpg"]
    names += [f"d/1.{ending}" for ending in ("gif", "jfif", "jp2", "jpe", "ppm", "tga", "tif")]
    hidden = [".1.jpg", ".part/2.jpg", "a/.thumbnails/3.jpg", "a/@eaDir/z.Png/S_M.jpg"]
    hidden += ["$RECYCLE.BIN/S-1/$R0.png", "@Recycle/1.jpg", "a/._1.jpg", "Thumbs.db"]
    for name in [*names, *hidden]:
        save(root / name, noise(8, 8), **{"format": "png"} if name == "Thumbs.db" else {})
    for name in ("a/1.txt", "b/2.TXT", "a/3.txt", "b/half.jpg.part", "a/4.part", "a/none"):
        (root / name).write_text("no image")
    (root / "linked").symlink_to(save(tmp_path / "elsewhere" / "1.jpg", noise(8, 8)).parent)
    (root / "linked again").symlink_to(tmp_path / "elsewhere")
    (root / "d" / "loop").symlink_to(root)
    (root / "d" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "d" / "pipe.jpg")
    found = utils.find_images(root)
    assert len(found) == len(names) + 1  # one of the two links
    assert [name for name in found if "linked" not in name] == names
    status = os.stat(root / "B" / "1.jpg")
    assert found["B/1.jpg"] == (status.st_size, status.st_ctime_ns)
    (line,) = capfd.readouterr().err.splitlines()
    assert "left out, by their endings: .txt (3), .part (2), none (1); images end in .jpg" in line
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
        save(root / name, noise(8, 8), format="png")
    with pytest.raises(utils.UserError, match=f"^{root}: {words}$"):
        load(root)


# --------------------------------------------------------------------------------------------------
# What is held out


@pytest.mark.parametrize(
    ("counts", "n_test", "held_out"),
    [
        ({"faces": 50}, 5, {"faces": 5}),
        ({str(digit): 10 for digit in range(10)}, 10, {str(digit): 1 for digit in range(10)}),
        ({"cats": 70, "dogs": 30}, 10, {"cats": 7, "dogs": 3}),
        ({"": 30, "more": 10}, 20, {"": 15, "more": 5}),
        ({str(i): 1 for i in range(10)}, 2, {"4": 1, "9": 1}),
    ],
)
def test_hold_out(counts, n_test, held_out):
    names = [os.path.join(folder, f"{i:02d}.jpg") for folder, n in counts.items() for i in range(n)]
    rows = utils.hold_out(names, n_test)
    assert Counter(os.path.dirname(names[row]) for row in rows) == held_out
    for folder, n in held_out.items():  # the last ones by path
        own = [name for name in names if os.path.dirname(name) == folder]
        assert [names[row] for row in rows if names[row] in own] == own[-n:]


@pytest.mark.parametrize("n_test", [1, 7, 100, 999])
def test_hold_out_adds_up(n_test):
    """Each folder gives its share to within one image, and all of them n_test together."""
    counts = [1, 2, 3, 50, 144, 800]
    names = [f"{folder}/{i:03d}.jpg" for folder, n in enumerate(counts) for i in range(n)]
    rows = utils.hold_out(names, n_test)
    assert len(set(rows)) == n_test
    of_folder = Counter(names[row].split("/")[0] for row in rows)
    for folder, n in enumerate(counts):
        assert abs(of_folder[str(folder)] - n * n_test / 1000) < 1


def split(root: Path, *flags: str) -> tuple[list[str], list[str]]:
    """The names of the images that a run trains on, and of those that it holds out."""
    argv = [f"--dataroot={root}", "--image_size=32", "--dataset=folder", "--batch_size=2", *flags]
    data = main.load_data(main.parse([*argv, f"--outf={root}_out"])[1], None, CPU)
    return tuple([data.names[row] for row in rows] for rows in (data.train, data.test))


def test_split_of_a_run(tmp_path, capfd):
    """The last tenth of each folder, and one line that says so."""
    train, test = split(photos(tmp_path / "one", 30))
    assert test == ["faces/027.bmp", "faces/028.bmp", "faces/029.bmp"]
    assert len(train) == 27 and not set(train) & set(test)
    line = "main.py: 27 images to train on + 3 held out, by folder: faces 27 + 3\n"
    assert capfd.readouterr().err == line
    train, test = split(photos(tmp_path / "classes", 10, tuple("abcdefg")))
    assert test == [f"{name}/009.bmp" for name in "abcdefg"]
    shown = "a 9 + 1, b 9 + 1, c 9 + 1, d 9 + 1, e 9 + 1, 2 more\n"
    assert capfd.readouterr().err.endswith(f" + 7 held out, by folder: {shown}")
    assert len(split(tmp_path / "classes", "--n_test=20")[1]) == 20


def test_split_by_testroot(tmp_path):
    """All images of the other folder are held out, also where it is inside of the first."""
    root = photos(tmp_path / "data", 4, ("test/a", "train/a", "train/b"))
    for dataroot, trained in ((root / "train", ("a", "b")), (root, ("train/a", "train/b"))):
        train, test = split(dataroot, f"--testroot={root / 'test'}")
        assert train == [f"{folder}/{i:03d}.bmp" for folder in trained for i in range(4)]
        assert test == [f"a/{i:03d}.bmp" for i in range(4)]


def test_split_of_copies(tmp_path, capfd):
    """Held-out images whose pixels are trained on, too, are counted."""
    root = photos(tmp_path / "data", 20)
    for copied, to in (("000.bmp", "019.bmp"), ("001.bmp", "002.bmp")):
        shutil.copy(root / "faces" / copied, root / "faces" / to)
    for _ in range(2):  # when they are decoded, and ever after
        split(root)
        line = "main.py: 1 of the held-out images have the pixels of images that are trained on"
        assert capfd.readouterr().err.splitlines()[1:] == [line]


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        (("test", "train"), "--dataroot={0}/train --testroot={0}/test keeps them apart"),
        (("x/val/a", "x/Train/a"), "--dataroot={0}/x/Train --testroot={0}/x/val keeps them apart"),
        (("images", "masks"), "--dataroot={0}/images leaves them out"),
        (("train/good", "ground_truth/bad"), "--dataroot={0}/train leaves them out"),
        (("cats", "test"), None),
        (("masks",), None),
    ],
)
def test_describe_split_names_what_to_type(folders, hint, tmp_path, capfd):
    names = sorted(f"{folder}/{i}.png" for folder in folders for i in range(4))
    rows = np.arange(len(names))
    utils.describe_split(tmp_path, utils.Data(None, names, rows, rows[::2], rows[1::2], ""))
    hints = capfd.readouterr().err.splitlines()[1:]
    assert len(hints) == (hint is not None)
    assert all(line.endswith(f"; {hint}") or line.endswith(f"? {hint}") for line in hints) or hint


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
FRAMES = {"save_all": True, "append_images": [Image.fromarray(255 - RAMP)]}
TEXT = PngInfo()
TEXT.add_text("Photoshop", "x" * 2_000_000, zip=True)
KINDS = {
    "turned.png": (Image.fromarray(COLOUR), np.rot90(COLOUR, -1), {"exif": EXIF}),
    "grey.png": (Image.fromarray(RAMP), RAMP, {}),
    "palette.gif": (PALETTE, COLOUR, {}),
    "frames.gif": (Image.fromarray(RAMP), RAMP, FRAMES),
    "pages.tiff": (Image.fromarray(RAMP), RAMP, FRAMES),
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
    with Image.open(path) as read:
        # Else this tests another kind.
        assert name == "deep.pgm" or read.mode == image.mode
        assert getattr(read, "n_frames", 1) == (2 if options is FRAMES else 1)
    pixels = utils.read_image(path, 16, None, 3).astype(int)
    rgb = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - rgb).max() <= (1 if image.mode in ("RGBA", "LA") else 0)


def test_scans_of_any_size_are_read():
    """Pillow has no limit on pixels: a scan of 200 megapixels is no attack."""
    assert Image.MAX_IMAGE_PIXELS is None


def test_load_images_rows(tmp_path):
    """In order of their paths, whichever thread is done first; in grey, too."""
    for i in range(150):
        save(tmp_path / f"{i % 3}" / f"{i * 7 % 150}.png", noise(9 + i % 5, 11 + 99 * (i < 5), i))
    data = load(tmp_path)
    check(data, tmp_path)
    assert isinstance(data.images, np.memmap) and not data.images.flags.writeable
    assert data.train.tolist() == list(range(150)) == data.firsts.tolist()
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
        assert len(arrays(tmp_path)) == 1


def test_load_images_skips(tmp_path, capfd, decoded):
    """What is no image is counted by its reason, and three are named, at every start."""
    pages = [f"faces/a{i}.jpg" for i in range(5)]
    content = dict.fromkeys(pages, b"<!DOCTYPE html><HTML><p>404</p></html>")
    content["faces/b.png"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    content["faces/c\n.png"] = b"hello"  # a strange name stays in the line
    photos(tmp_path)
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    whole = save(tmp_path / "faces" / "d.png", noise(20, 24)).read_bytes()
    (tmp_path / "faces" / "d.png").write_bytes(whole[:600])
    for kind in "FI":
        save(tmp_path / "faces" / f"{kind}.tiff", Image.new(kind, (20, 20)))
    words = [r"5 x a web page (faces/a0.jpg, faces/a1.jpg, faces/a2.jpg, ...)"]
    words += [r"1 x a pointer of Git LFS; `git lfs pull` brings the images (faces/b.png)"]
    words += [r"1 x not an image (faces/c\n.png)", "2 x its pixels are signed, of 32 bits"]
    words += ["(faces/F.tiff, faces/I.tiff)", "truncated (faces/d.png)"]
    for _ in range(2):
        data = load(tmp_path)
        assert data.names == [f"faces/{i:03d}.bmp" for i in range(6)]
        assert np.array_equal(data.images[5], square(tmp_path / "faces" / "005.bmp"))
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("main.py: skipped 10 of 16 images: ")
        assert all(word in line for word in words)
    assert len(decoded) == 16
    save(tmp_path / "faces" / "b.png", noise(20, 24))
    assert "faces/b.png" in load(tmp_path).names


def test_load_images_skips_all(tmp_path):
    for path in (photos(tmp_path) / "faces").iterdir():
        path.write_text("no image")
    words = "none of the 6 images can be read: 6 x not an image (faces/000.bmp, faces/001.bmp, "
    with pytest.raises(utils.UserError, match=re.escape(words)):
        load(tmp_path)


def test_load_images_after_chmod(tmp_path, capfd, break_reading, monkeypatch):
    """A file that this user may not read is skipped, and is back when its rights are."""
    path = photos(tmp_path) / "faces" / "002.bmp"
    break_reading(path, errno.EACCES)
    assert len(load(tmp_path).images) == 5
    assert "skipped 1 of 6 images: 1 x Permission denied" in capfd.readouterr().err
    monkeypatch.undo()
    assert len(load(tmp_path).images) == 5
    path.chmod(0o600)
    check(load(tmp_path), tmp_path)


def test_load_images_from_a_failing_disk(tmp_path, break_reading, monkeypatch):
    """A disk that fails says nothing about the image: decoding ends, and leaves no array."""
    path = photos(tmp_path) / "faces" / "002.bmp"
    break_reading(path, errno.EIO)
    with pytest.raises(utils.UserError, match=f"^{path}: Input/output error$"):
        load(tmp_path)
    assert not arrays(tmp_path)
    monkeypatch.undo()
    check(load(tmp_path), tmp_path)


# --------------------------------------------------------------------------------------------------
# What is kept


def test_load_images_again(tmp_path, decoded):
    """An array is built once, moves with its folder, and takes no other one's place."""
    load(photos(tmp_path / "here"))
    there = (tmp_path / "here").rename(tmp_path / "there")
    two = photos(tmp_path / "two", 3)
    check(load(there), there)
    for options in ({"crop": 10}, {"channels": 1}, {"testroot": two}, {}):
        load(there, **options)
    assert len(arrays(there)) == 4 and len(decoded) == 3 * 6 + 9
    cache = tmp_path / "a" / "cache"
    for root in (there, two, there, two):
        check(load(root, cache_dir=cache), root)
        if root == two:
            save(there / "faces" / "7.bmp", noise(20, 24))
    assert len(decoded) == 3 * 6 + 9 + 6 + 3 + 7
    assert len(arrays(cache)) == 2 and not arrays(two)


CHANGES = {
    "add": lambda path: save(path.with_name("001b.bmp"), noise(9, 9)),
    "remove": lambda path: path.unlink(),
    "rename": lambda path: path.rename(path.with_name("009.bmp")),
    "overwrite": lambda path: save(path, noise(20, 24, 99)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_images_changed(change, tmp_path):
    """They are decoded anew, and the outdated array goes; the digest is of names and sizes."""
    outdated = load(photos(tmp_path))
    before = np.array(outdated.images)
    (path,) = arrays(tmp_path)
    CHANGES[change](tmp_path / "faces" / "001.bmp")
    data = load(tmp_path)
    check(data, tmp_path)
    assert len(arrays(tmp_path)) == 1 and not path.exists()
    assert (data.digest == outdated.digest) == (change == "overwrite")
    assert np.array_equal(outdated.images, before)  # a run that still reads it is not disturbed
    assert len(list(tmp_path.glob(".wae_*.json"))) == 1


def refused(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["rights", "space"])
def test_load_images_that_cannot_be_kept(what, tmp_path, monkeypatch):
    """One line names the flag that helps."""
    folder = tmp_path / "cache"
    if what == "rights":
        folder.write_text("a file is in the way")
    else:
        monkeypatch.setattr(os, "fsync", refused)
    words = f"^cannot write {folder}/.*: .*; --cache_dir names a place for decoded images$"
    with pytest.raises(utils.UserError, match=words):
        load(photos(tmp_path / "data"), cache_dir=folder)
    monkeypatch.undo()
    assert not arrays(folder) if what == "space" else folder.is_file()


def slow_builder(root: Path, monkeypatch) -> tuple[multiprocessing.Process, Path]:
    """A process that is decoding, and the file to which each image that anybody decodes adds."""
    seen = root / ".decoded"
    decode = utils.read_image

    def slowly(path: Path, **how: object) -> np.ndarray:
        with open(seen, "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.05)
        return decode(path, **how)

    monkeypatch.setattr(utils, "read_image", slowly)
    builder = multiprocessing.get_context("fork").Process(target=load, args=(root,))
    builder.start()
    while not seen.exists():
        assert builder.is_alive()
        time.sleep(0.001)
    return builder, seen


def test_load_images_in_two_processes(tmp_path, capfd, monkeypatch):
    """One decodes, the other waits for it."""
    builder, seen = slow_builder(photos(tmp_path, 20), monkeypatch)
    check(load(tmp_path), tmp_path)
    builder.join()
    assert f"main.py: {tmp_path}/.wae is in use by another process: waiting for it\n" in (
        capfd.readouterr().err
    )
    assert builder.exitcode == 0 and len(seen.read_text().split()) == 20


def test_load_images_after_a_kill(tmp_path, monkeypatch):
    """Nothing that is left is taken for an array, and nothing is left for good."""
    builder, _ = slow_builder(photos(tmp_path, 20), monkeypatch)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert not list(tmp_path.glob(".wae_*.u8")) and list(tmp_path.glob(".*.tmp"))
    monkeypatch.undo()
    (tmp_path / "faces" / "000.bmp").unlink()  # so that the array has another name
    check(load(tmp_path), tmp_path)
    assert len(arrays(tmp_path)) == 1


# --------------------------------------------------------------------------------------------------
# Batches


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
    asked = []
    before = threading.active_count()
    indices = (asked.append(index) or index for index in np.arange(50).reshape(25, 2))
    for taken, _ in enumerate(utils.batches(array, indices, CPU.device, ahead=3), 1):
        assert len(asked) <= taken + 3
    assert taken == 25
    order = np.arange(50).reshape(25, 2)
    with contextlib.closing(utils.batches(array, order, CPU.device)) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(IndexError):  # an error of the thread reaches the consumer
        list(utils.batches(array, [np.array([1]), np.array([50])], CPU.device))


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
