"""Images: what is found, what is decoded from it, the array that is kept of it, and the batches that come out."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

import utils
from utils import UserError

CPU = torch.device("cpu")
NOBODY = 65534
FORK = multiprocessing.get_context("fork")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, or mounts, which only root can")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of which no two parts look the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    """Writes an image, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def photos(root: Path, n: int = 6, width: int = 178, height: int = 218) -> Path:
    """A folder of the shape of CelebA."""
    for i in range(n):
        save(root / "faces" / f"{i:06d}.jpg", noise(width, height, i))
    return root


def names_of(images: list[tuple[str, int, int]], root: Path) -> list[str]:
    """Paths within the root, of what `find_images` returns."""
    return [os.path.relpath(path, root) for path, _, _ in images]


def hidden(folder: Path) -> list[str]:
    """What a build has left in a folder."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def load(root: Path, size: int = 16, dataset: str = "folder", **options: object) -> np.ndarray:
    """The array, built by two workers."""
    return utils.load_images(root, dataset, size, 2, **options)


def square(path: Path, size: int) -> np.ndarray:
    """The largest central square of an RGB image, in plain Pillow."""
    image = Image.open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), Image.BILINEAR))


def forked(target: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A process, started, that calls the function in a session of its own, and is silent."""

    def child() -> None:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        utils.tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the test, and what is killed never frees it
        target()

    process = FORK.Process(target=child)
    process.start()
    return process


# ----------------------------------------------------------------------------------------------------------------------
# Finding


def test_finds_what_image_folder_finds(tmp_path: Path) -> None:
    image = noise(8, 8)
    for name in (
        "a/1.jpg",
        "a/UPPER.JPG",
        "a/2.Png",
        "b/deep/er/3.jpeg",
        "b/4.tiff",
        "c.jpg/5.webp",
        "b/\u00e9\u4e16.bmp",
    ):
        save(tmp_path / name, image)
    for name in ("a/list.txt", "a/no_extension", "a/half.jpg.part", "a/jpg", "readme.md"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "b")

    found = utils.find_images(tmp_path)

    assert sorted(path for path, _ in ImageFolder(str(tmp_path), allow_empty=True).samples) == [
        path for path, _, _ in found
    ]
    assert len(found) == 10
    for path, n_bytes, time_ns in found:
        assert (n_bytes, time_ns) == (os.stat(path).st_size, os.stat(path).st_mtime_ns)


def test_order_is_that_of_the_sorted_paths(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "b/10.jpg", "b/2.jpg", "a/z.jpg", "a/sub/1.jpg", "a/sub.jpg", "a b/1.jpg", "B/1.jpg"):
        save(tmp_path / name, noise(8, 8))
    paths = [path for path, _, _ in utils.find_images(tmp_path)]
    assert paths == sorted(paths) and len(paths) == 8


def test_hidden_folders_and_files_are_none_of_ours(tmp_path: Path) -> None:
    for name in ("a/1.jpg", ".partial/2.jpg", "a/.thumbnails/3.jpg", "a/._1.jpg", "a/b/.4.jpg"):
        save(tmp_path / name, noise(8, 8))
    assert names_of(utils.find_images(tmp_path), tmp_path) == ["a/1.jpg"]


def test_the_data_set_itself_may_lie_in_a_hidden_folder(tmp_path: Path) -> None:
    root = tmp_path / ".local" / ".data"
    save(root / "a" / "1.jpg", noise(8, 8))
    assert names_of(utils.find_images(root), root) == ["a/1.jpg"]


def test_images_beside_the_folders_do_not_count(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "2.jpg"):
        save(tmp_path / name, noise(8, 8))
    assert names_of(utils.find_images(tmp_path), tmp_path) == ["a/1.jpg"]


def no_folder(root: Path) -> None:
    root.rmdir()


def a_file(root: Path) -> None:
    root.rmdir()
    root.write_text("")


def nothing(root: Path) -> None:
    pass


def images_only_in_the_root(root: Path) -> None:
    save(root / "1.jpg", noise(8, 8))


def an_empty_sub_folder(root: Path) -> None:
    (root / "faces").mkdir()


def no_image_files(root: Path) -> None:
    (root / "faces").mkdir()
    (root / "faces" / "list.txt").write_text("1.jpg")


def only_hidden(root: Path) -> None:
    save(root / ".faces" / "1.jpg", noise(8, 8))


@pytest.mark.parametrize(
    "make", [no_folder, a_file, nothing, images_only_in_the_root, an_empty_sub_folder, no_image_files, only_hidden]
)
def test_nothing_found_says_where_images_must_lie(tmp_path: Path, make: Callable[[Path], None]) -> None:
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(UserError) as error:
        load(root, cache_dir=tmp_path / "cache")
    message = str(error.value)
    assert message.startswith(f"--dataroot={root}: ") and f"as in {root}/sub_directory/XXX.jpg" in message
    assert ("no such folder" if make in (no_folder, a_file) else "no image in a folder inside it") in message
    assert "\n" not in message and error.value.status == 1


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_celeba_is_the_central_140_pixels_and_nothing_of_what_lies_around(tmp_path: Path, size: int) -> None:
    path = save(tmp_path / "1.png", noise(178, 218))
    expected = noise(178, 218).crop((19, 39, 159, 179)).resize((size, size), Image.BILINEAR)
    assert np.array_equal(utils.decode_image(str(path), size, 140), np.asarray(expected))


def test_a_jpeg_is_decoded_at_full_resolution(tmp_path: Path) -> None:
    path = save(tmp_path / "1.jpg", noise(356, 436))
    expected = Image.open(path).crop((108, 148, 248, 288)).resize((64, 64), Image.BILINEAR)
    assert np.array_equal(utils.decode_image(str(path), 64, 140), np.asarray(expected))


@pytest.mark.parametrize("width, height", [(101, 64), (64, 101), (33, 33), (7, 300), (32, 32), (1, 1)])
def test_folder_is_the_largest_central_square(tmp_path: Path, width: int, height: int) -> None:
    path = save(tmp_path / "1.png", noise(width, height))
    assert np.array_equal(utils.decode_image(str(path), 32, None), square(path, 32))


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.dstack([RAMP] * 3)
COLOUR = np.dstack([RAMP, RAMP.T, 255 - RAMP])


def palette() -> Image.Image:
    """An image of 256 colours of its own, in palette order."""
    image = Image.frombytes("P", (16, 16), RAMP.tobytes())
    image.putpalette(COLOUR.reshape(-1).tobytes())
    return image


def with_alpha(pixels: np.ndarray) -> Image.Image:
    """Pixels, and a coverage that is different everywhere."""
    return Image.fromarray(np.dstack([pixels, RAMP[::-1]]))


def cmyk() -> Image.Image:
    """Ink that absorbs what is missing to `COLOUR`; no black."""
    ink = np.dstack([255 - COLOUR, np.zeros_like(RAMP)])
    return Image.frombytes("CMYK", (16, 16), ink.tobytes())


CHECKS = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
DEEP = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)  # 0 to 65535, whose upper bytes are RAMP


@pytest.mark.parametrize(
    "name, image, expected",
    [
        ("grey.png", Image.fromarray(RAMP), GREY),
        ("rgb.png", Image.fromarray(COLOUR), COLOUR),
        ("palette.png", palette(), COLOUR),
        ("rgba.png", with_alpha(COLOUR), COLOUR),
        ("la.png", with_alpha(RAMP), GREY),
        ("cmyk.tiff", cmyk(), COLOUR),
        ("bits.png", Image.fromarray(CHECKS).convert("1"), np.dstack([CHECKS] * 3)),
        ("bits.tiff", Image.fromarray(CHECKS).convert("1"), np.dstack([CHECKS] * 3)),
        ("deep.png", Image.fromarray(DEEP), GREY),
        ("deep.tiff", Image.fromarray(DEEP), GREY),
        ("deep_big_endian.tiff", Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), GREY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_pixel_becomes_its_rgb(
    tmp_path: Path, name: str, image: Image.Image, expected: np.ndarray
) -> None:
    path = save(tmp_path / name, image)
    assert Image.open(path).mode == image.mode  # else this would test another kind
    assert np.array_equal(utils.decode_image(str(path), 16, None), expected)


@pytest.mark.filterwarnings("ignore:Palette images")
def test_a_transparent_palette_keeps_its_colours(tmp_path: Path) -> None:
    path = save(tmp_path / "1.png", palette(), transparency=bytes(range(256)))
    assert np.array_equal(utils.decode_image(str(path), 16, None), COLOUR)


def test_deep_portable_grey_map(tmp_path: Path) -> None:
    (tmp_path / "1.pgm").write_bytes(b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes())
    assert np.array_equal(utils.decode_image(str(tmp_path / "1.pgm"), 16, None), GREY)


@pytest.mark.parametrize(
    "orientation, turn",
    [
        (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90),
    ],
)  # fmt: skip
def test_exif_orientation_is_followed(
    tmp_path: Path, orientation: int, turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "1.png", Image.fromarray(COLOUR), exif=exif)
    assert np.array_equal(utils.decode_image(str(path), 16, None), turn(COLOUR))


def test_orientation_comes_before_the_crop(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    path = save(tmp_path / "1.png", noise(219, 178), exif=exif)
    upright = noise(219, 178).transpose(Image.Transpose.ROTATE_270)
    expected = upright.crop((19, 39, 159, 179)).resize((64, 64), Image.BILINEAR)
    assert np.array_equal(utils.decode_image(str(path), 64, 140), np.asarray(expected))


def test_the_first_of_several_frames_counts(tmp_path: Path) -> None:
    first, *others = (Image.fromarray(np.roll(COLOUR, 40 * i, 2)) for i in range(3))
    for name in ("1.tiff", "1.png"):
        path = save(tmp_path / name, first, save_all=True, append_images=others)
        assert Image.open(path).n_frames == 3
        assert np.array_equal(utils.decode_image(str(path), 16, None), COLOUR)


# ----------------------------------------------------------------------------------------------------------------------
# The array


def test_rows_are_the_images_in_order_of_their_paths(tmp_path: Path) -> None:
    for i in range(150):  # more than two chunks
        save(tmp_path / f"{i % 3}" / f"{i * 7 % 150}.png", noise(9 + i % 5, 11, i))
    array = load(tmp_path)
    assert array.shape == (150, 16, 16, 3) and array.dtype == np.uint8
    for row, path in zip(array, sorted(tmp_path.glob("*/*.png"), key=str), strict=True):
        assert np.array_equal(row, square(path, 16))


def test_the_array_is_mapped_and_cannot_be_written(tmp_path: Path) -> None:
    array = load(photos(tmp_path, 2))
    assert isinstance(array, np.memmap) and not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_dataset_chooses_the_crop(tmp_path: Path) -> None:
    path = photos(tmp_path, 1) / "faces" / "000000.jpg"
    expected = Image.open(path).crop((19, 39, 159, 179)).resize((64, 64), Image.BILINEAR)
    assert np.array_equal(load(tmp_path, 64, "celebA")[0], np.asarray(expected))
    assert np.array_equal(load(tmp_path, 64, "folder")[0], square(path, 64))
    assert len(hidden(tmp_path)) == 2  # neither took the other's place


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The arrays that are built from here on."""
    targets = []
    build = utils._build_array

    def counting(target: Path, *args: object) -> None:
        targets.append(target)
        build(target, *args)

    monkeypatch.setattr(utils, "_build_array", counting)
    return targets


def test_the_second_run_decodes_nothing(tmp_path: Path, built: list[Path]) -> None:
    first = load(photos(tmp_path))
    again = load(tmp_path)
    assert len(built) == 1 and np.array_equal(first, again)
    assert hidden(tmp_path) == [built[0].name]


def test_a_folder_that_moves_keeps_its_array(tmp_path: Path, built: list[Path]) -> None:
    load(photos(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    load(tmp_path / "there")
    assert len(built) == 1


def add(root: Path) -> None:
    save(root / "faces" / "000001b.jpg", noise(40, 40))


def remove(root: Path) -> None:
    (root / "faces" / "000001.jpg").unlink()


def rename(root: Path) -> None:
    (root / "faces" / "000001.jpg").rename(root / "faces" / "000009.jpg")


def replace(root: Path) -> None:
    other = save(root / "faces" / "other.jpg", noise(178, 218, 99))
    other.replace(root / "faces" / "000001.jpg")


def overwrite_with_as_many_bytes(root: Path) -> None:
    path = root / "faces" / "000001.jpg"
    before = path.stat()
    save(path, noise(178, 218, 98), quality=30)
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


def change_bytes_within_the_same_instant(root: Path) -> None:
    path = root / "faces" / "000001.jpg"
    before = path.stat()
    save(path, noise(178, 218, 98), quality=50)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [add, remove, rename, replace, overwrite_with_as_many_bytes, change_bytes_within_the_same_instant]
)
def test_changed_files_are_decoded_anew_and_the_outdated_array_goes(
    tmp_path: Path, change: Callable[[Path], None], built: list[Path]
) -> None:
    outdated = load(photos(tmp_path))
    before = np.array(outdated)
    change(tmp_path)
    array = load(tmp_path)
    assert len(built) == 2 and hidden(tmp_path) == [built[1].name]
    for row, path in zip(array, sorted(tmp_path.glob("faces/*.jpg")), strict=True):
        assert np.array_equal(row, square(path, 16))
    assert np.array_equal(outdated, before)  # a run that still reads it is not disturbed


def test_cache_dir_is_made_and_serves_several_data_sets(tmp_path: Path, built: list[Path]) -> None:
    cache = tmp_path / "some" / "cache"
    one, two = photos(tmp_path / "one", 2), photos(tmp_path / "two", 3)
    for _ in range(2):
        assert [len(load(root, cache_dir=cache)) for root in (one, two)] == [2, 3]
    add(one)
    assert len(load(one, cache_dir=cache)) == 3
    assert len(built) == 3 and len(hidden(cache)) == 2 and hidden(one) == hidden(two) == []
    load(two, cache_dir=cache)
    assert len(built) == 3  # it was not the outdated one


def test_the_waiting_process_takes_what_the_other_builds(tmp_path: Path) -> None:
    photos(tmp_path)
    result: list[np.ndarray] = []
    waiting = threading.Thread(target=lambda: result.append(load(tmp_path, build=False)), daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and hidden(tmp_path) == []
    array = load(tmp_path)
    waiting.join(30)
    assert np.array_equal(result[0], array)


# ----------------------------------------------------------------------------------------------------------------------
# What may be wrong with files


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def no_image(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.jpg")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def bomb(path: Path) -> None:
    header = b"P6 40000 40000 255\n"  # 4.8 GB, if anybody believed it
    path.write_bytes(header + b"\0" * 100)


@pytest.mark.parametrize("damage", [truncated, no_image, no_bytes, link_to_nowhere, link_to_itself, pipe, bomb])
def test_what_cannot_be_read_is_skipped_counted_and_named(
    tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path)
    bad = tmp_path / "faces" / "000002.jpg"
    damage(bad)
    array = load(tmp_path)
    assert f"main.py: skipped 1 of 6 images that cannot be read: {bad}\n" in capfd.readouterr().err
    good = [path for path in sorted(tmp_path.glob("faces/*.jpg")) if path != bad]
    for row, path in zip(array, good, strict=True):
        assert np.array_equal(row, square(path, 16))


def test_the_first_ten_unreadable_files_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path, 30, 20, 20)
    bad = [tmp_path / "faces" / f"{i:06d}.jpg" for i in range(2, 26, 2)]
    for path in bad:
        no_image(path)
    assert len(load(tmp_path)) == 18
    names = ", ".join(map(str, bad[:10]))
    assert f"skipped 12 of 30 images that cannot be read: {names}, ...\n" in capfd.readouterr().err


def test_no_readable_image_at_all_is_an_error(tmp_path: Path) -> None:
    photos(tmp_path, 3, 20, 20)
    for path in tmp_path.glob("faces/*"):
        no_image(path)
    with pytest.raises(UserError, match="none of the 3 images can be read, the first being .*/faces/000000.jpg$"):
        load(tmp_path)
    assert hidden(tmp_path) == []


def test_an_image_smaller_than_the_crop_is_named(tmp_path: Path) -> None:
    photos(tmp_path, 70)
    small = save(tmp_path / "faces" / "000066.jpg", noise(200, 139))
    with pytest.raises(UserError) as error:
        load(tmp_path, dataset="celebA")
    assert f"{small}: 200 x 139 pixels" in str(error.value) and "--dataset=folder" in str(error.value)
    assert hidden(tmp_path) == []
    assert len(load(tmp_path, dataset="folder")) == 70


def test_odd_file_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [
        b"new\nline.jpg",
        "\u00e9\u4e16\u754c \U0001f600.jpg".encode(),
        b"not \xff\xfe utf-8.jpg",
        b"%s {} 'quoted\".jpg",
    ]
    source = photos(tmp_path / "source", 1) / "faces" / "000000.jpg"
    folder = tmp_path / "data" / "faces"
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(source, os.path.join(os.fsencode(folder), name))
    bad = folder / "caf\u00e9\nbroken.jpg"
    no_image(bad)
    array = load(tmp_path / "data")
    assert len(array) == 4 and np.array_equal(array, np.broadcast_to(square(source, 16), array.shape))
    assert "skipped 1 of 5" in capfd.readouterr().err


def test_a_decoder_that_dies_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path)
    monkeypatch.setattr(utils, "decode_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a process that decoded images was killed"):
        load(tmp_path)
    assert hidden(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# What may be wrong with disks, and with other processes


def test_two_processes_may_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, 130, 20, 20)
    both = FORK.Barrier(2)
    replace_file, ends = os.replace, FORK.Queue()

    def together(*args: object) -> None:
        both.wait(60)  # neither ends before the other has written all of its own
        replace_file(*args)

    monkeypatch.setattr(os, "replace", together)
    builders = [forked(lambda: ends.put(np.array(load(tmp_path)))) for _ in range(2)]
    arrays = [ends.get(timeout=60) for _ in builders]
    for builder in builders:
        builder.join(60)
    expected = np.stack([square(path, 16) for path in sorted(tmp_path.glob("faces/*.jpg"))])
    assert all(np.array_equal(array, expected) for array in arrays)
    assert len(hidden(tmp_path)) == 1


@pytest.mark.parametrize("change", [nothing, add])
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    photos(tmp_path, 300, 20, 20)
    with monkeypatch.context() as slow:
        decode = utils.decode_image
        slow.setattr(utils, "decode_image", lambda *args: time.sleep(0.01) or decode(*args))
        builder = forked(lambda: load(tmp_path))
        while not any(p.stat().st_size for p in tmp_path.glob(".*.tmp")):  # some is written, not all
            assert builder.is_alive()
            time.sleep(0.01)
    builder.kill()
    builder.join()
    (left_over,) = hidden(tmp_path)
    assert left_over.endswith(".tmp")
    for _ in range(500):  # its decoders end as well
        try:
            os.killpg(builder.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        os.killpg(builder.pid, signal.SIGKILL)
        pytest.fail("the decoders outlived the process that they worked for")

    change(tmp_path)
    array = load(tmp_path)
    (whole,) = hidden(tmp_path)
    assert whole.endswith(".u8")
    for row, path in zip(array, sorted(tmp_path.glob("faces/*.jpg")), strict=True):
        assert np.array_equal(row, square(path, 16))


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, 200, 20, 20)

    class Interrupted(utils.tqdm):
        def update(self, n: int = 1) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert hidden(tmp_path) == []


def test_the_bar_counts_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(photos(tmp_path, 130, 20, 20))
    assert "130/130" in (err := capfd.readouterr().err) and "img/s" in err


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="wae_test_"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@needs_root
@pytest.mark.parametrize("how", ["XDG_CACHE_HOME", "HOME", "--cache_dir"])
def test_a_read_only_data_set_is_kept_in_the_users_cache(open_folder: Path, how: str) -> None:
    root = photos(open_folder / "data", 3)
    home = open_folder / "home"
    home.mkdir()
    shutil.chown(home, NOBODY)

    def build() -> None:
        os.setuid(NOBODY)
        os.environ.pop("XDG_CACHE_HOME", None)
        os.environ["HOME"] = str(home)
        if how == "XDG_CACHE_HOME":
            os.environ[how] = str(home / "xdg")
        assert len(load(root, cache_dir=home / "chosen" if how == "--cache_dir" else None)) == 3

    builder = forked(build)
    builder.join()
    assert builder.exitcode == 0 and hidden(root) == []
    where = {"XDG_CACHE_HOME": "xdg/wae", "HOME": ".cache/wae", "--cache_dir": "chosen"}[how]
    assert len(hidden(home / where)) == 1


@needs_root
def test_what_the_user_may_not_read(open_folder: Path) -> None:
    root = photos(open_folder / "data", 3)
    (root / "faces" / "000001.jpg").chmod(0)

    cache = open_folder / "cache"
    cache.mkdir()
    shutil.chown(cache, NOBODY)

    def without_an_image() -> None:
        os.setuid(NOBODY)
        assert len(load(root, cache_dir=cache)) == 2

    looker = forked(without_an_image)
    looker.join()
    assert looker.exitcode == 0


@needs_root
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    root = photos(tmp_path / "data", 40, 20, 20)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(UserError, match=f"^cannot write {disk}/.*: No space left on device$"):
            load(root, 32, cache_dir=disk)
        assert list(disk.iterdir()) == []
        assert len(load(root, 16, cache_dir=disk)) == 40  # 30 of the 64 kB
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_no_space_on_the_command_line(tmp_path: Path) -> None:
    root = photos(tmp_path / "data", 40)
    ended = program.run(
        tmp_path / "std", f"--dataroot={root}", f"--outf={tmp_path / 'out'}", "--batch_size=8", max_bytes=100_000
    )
    assert ended.wait() == 1
    (message,) = ended.messages
    assert message.startswith(f"main.py: error: cannot write {root}/.wae_celebA_64_") and "too large" in message
    assert "Traceback" not in ended.err and hidden(root) == []


def test_a_small_image_on_the_command_line(tmp_path: Path) -> None:
    root = photos(tmp_path / "data", 5, 100, 100)
    ended = program.run(tmp_path / "std", f"--dataroot={root}", f"--outf={tmp_path / 'out'}", "--batch_size=2")
    assert ended.wait() == 1
    (message,) = ended.messages
    assert message.startswith(f"main.py: error: {root}/faces/000000.jpg: 100 x 100 pixels, less than the 140 x 140")
    assert "--dataset=folder" in message and "Traceback" not in ended.err


def test_a_missing_folder_on_the_command_line(tmp_path: Path) -> None:
    ended = program.run(tmp_path / "std", f"--dataroot={tmp_path}/no", f"--outf={tmp_path / 'out'}")
    assert ended.wait() == 1
    (message,) = ended.messages
    assert message.startswith(f"main.py: error: --dataroot={tmp_path}/no: no such folder")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_decoding_on_the_command_line(tmp_path: Path, number: int, status: int) -> None:
    root = photos(tmp_path / "data", 1)
    for i in range(1, 5000):  # takes seconds to decode
        os.link(root / "faces" / "000000.jpg", root / "faces" / f"{i:06d}.jpg")
    started = program.Program(tmp_path / "std", f"--dataroot={root}", f"--outf={tmp_path / 'out'}", "--dataset=folder")
    assert started.wait_until(lambda: any(p.stat().st_size for p in root.glob(".*.tmp")))
    started.kill(number)
    assert started.wait() == status
    assert "Traceback" not in started.err and hidden(root) == []


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """50 images, mapped from disk."""
    root = tmp_path_factory.mktemp("mapped")
    np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8).tofile(root / "array")
    return np.memmap(root / "array", np.uint8, "r").reshape(50, 4, 4, 3)


ORDERS = {
    "no batch": [],
    "one": [[3]],
    "fewer than ahead": [[3, 1], [4, 2]],
    "repeated": [[7, 7, 0], [0, 49, 7]],
    "different lengths": [[1, 2, 3], [4], [5, 6], [7], [8, 9, 10, 11], [12]],
    "all of an epoch": utils.epoch_order(50, 1, 2).reshape(10, 5),
    "a share of every batch": utils.epoch_order(50, 1, 2)[:48].reshape(6, 2, 4)[2:, 1],
}


@pytest.mark.parametrize("kind", ["mapped", "tensor"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_batches_are_the_images_of_the_indices(array: np.ndarray, order: list[list[int]], kind: str) -> None:
    images = array if kind == "mapped" else torch.from_numpy(np.array(array))
    indices = [np.array(index) for index in order]
    got = list(utils.batches(images, indices, CPU))
    assert len(got) == len(indices)
    for batch, index in zip(got, indices, strict=True):
        assert batch.dtype == torch.uint8 and np.array_equal(batch.numpy(), array[index])


def test_a_batch_stays_what_it_is(array: np.ndarray) -> None:
    got = list(utils.batches(array, [np.array([0, 1]), np.array([2, 3])], CPU))
    got[1].zero_()
    assert np.array_equal(got[0].numpy(), array[:2]) and array[2:4].any()


class Counting:
    """An array that notes what it is asked for."""

    def __init__(self, images: np.ndarray):
        self.images, self.asked = images, []

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.asked.append(index)
        return self.images[index]


def test_each_batch_is_read_at_once_and_few_ahead_of_time(array: np.ndarray) -> None:
    images, indices = Counting(array), list(utils.epoch_order(50, 0, 0).reshape(25, 2))
    stream = utils.batches(images, indices, CPU, ahead=3)
    for taken in range(1, 26):
        next(stream)
        assert len(images.asked) <= taken + 3
    assert len(images.asked) == 25 and all(map(np.array_equal, images.asked, indices))


def test_a_consumer_may_stop_early(array: np.ndarray) -> None:
    before = threading.active_count()
    images = Counting(array)
    stream = utils.batches(images, list(utils.epoch_order(50, 0, 0).reshape(25, 2)), CPU)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before and len(images.asked) < 10


def test_an_error_while_reading_reaches_the_consumer(array: np.ndarray) -> None:
    before = threading.active_count()
    with pytest.raises(IndexError):
        list(utils.batches(array, [np.array([1]), np.array([50]), np.array([2])], CPU))
    assert threading.active_count() == before


def test_on_the_cpu_the_array_stays_where_it_is(array: np.ndarray) -> None:
    assert utils.put_on_device(array, CPU) is array


def test_an_array_of_more_than_half_of_the_free_memory_stays_on_disk(
    array: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = []

    def place(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        placed.append(device)
        return torch.zeros(shape, dtype=dtype)

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "empty", place)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * array.nbytes - 1, 10**12))
    assert utils.put_on_device(array, gpu) is array and not placed
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * array.nbytes, 10**12))
    assert np.array_equal(utils.put_on_device(array, gpu), array) and placed == [gpu]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(array: np.ndarray) -> None:
    gpu = torch.device("cuda", 0)
    resident = utils.put_on_device(array, gpu)
    assert isinstance(resident, Tensor) and resident.is_cuda and np.array_equal(resident.cpu(), array)
    indices = list(utils.epoch_order(50, 0, 0).reshape(25, 2))
    for images in (array, resident):
        for batch, index in zip(utils.batches(images, indices, gpu), indices, strict=True):
            assert batch.is_cuda and np.array_equal(batch.cpu(), array[index])


def test_pixels_to_the_range_of_the_networks() -> None:
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    batch[1] = 255 - batch[1]
    batch[..., 1] = 51
    plain, symmetric = (utils.from_uint8(batch, s) for s in (False, True))
    for x in (plain, symmetric):
        assert x.shape == (2, 3, 16, 16) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
    pixels = batch.numpy().transpose(0, 3, 1, 2)
    np.testing.assert_allclose(plain, pixels / 255, rtol=0, atol=1e-7)
    np.testing.assert_allclose(symmetric, pixels / 255 * 2 - 1, rtol=0, atol=2e-7)
    assert plain.min() == 0 and plain.max() == 1 and symmetric.min() == -1 and symmetric.max() == 1
    for x, s in ((plain, False), (symmetric, True)):
        np.testing.assert_allclose(utils.to_unit(x, s), plain, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    "n_images, n_test", [(202_599, 19_962), (1_000_000, 19_962), (11_712, 1_171), (199_620, 19_962), (25, 2), (3, 2)]
)
def test_held_out_images_by_default(n_images: int, n_test: int) -> None:
    assert utils.default_n_test(n_images) == n_test


def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): utils.epoch_order(1000, seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 54)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    np.random.seed(5)
    torch.manual_seed(5)
    for (seed, epoch), order in reversed(orders.items()):
        assert np.array_equal(utils.epoch_order(1000, seed, epoch), order)
