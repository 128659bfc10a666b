"""Images: what is found, what is decoded, the array that is kept, the batches that come out."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import Program, run, start

import utils

CPU = torch.device("cpu")
LANCZOS = Image.Resampling.LANCZOS
# Not enough images to train on: the program ends, with exit status 2, once it has the array.
LOAD_ONLY = ("--dataset=folder", "--n_test=100000", "--workers=2")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns an image of which no two parts look the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    """Writes an image, and the folders above it. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def photos(root: Path, n: int = 6, width: int = 20, height: int = 24) -> Path:
    """Makes a folder of n images. Returns it."""
    for i in range(n):
        save(root / "faces" / f"{i:06d}.png", noise(width, height, i))
    return root


def square(path: Path, size: int = 16) -> np.ndarray:
    """Returns the largest central square of an RGB image, in plain Pillow."""
    image = Image.open(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    centre = image.crop((left, top, left + side, top + side))
    return np.asarray(centre.resize((size, size), LANCZOS))


def load(root: Path, cache_dir: Path | None = None, workers: int = 0) -> np.ndarray:
    """Returns the array of a folder, decoded in this process."""
    return utils.load_images(root, "folder", 16, workers=workers, cache_dir=cache_dir)[0]


def check(array: np.ndarray, root: Path, without: str = "") -> None:
    """Compares rows with the files, in order of their paths."""
    paths = sorted((p for p in root.glob("*/*.*") if p.name != without), key=str)
    assert np.array_equal(array, np.stack([square(path) for path in paths]))


def arrays(folder: Path) -> list[Path]:
    """Returns the arrays that are kept in a folder."""
    return list(folder.glob(".wae_*.npy"))


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded from here on."""
    paths, decode = [], utils.decode_image

    def counted(path: Path, *args: object) -> np.ndarray:
        paths.append(path)
        return decode(path, *args)

    monkeypatch.setattr(utils, "decode_image", counted)
    return paths


def test_images_are_found_in_folders_in_order_of_their_paths(tmp_path):
    root = tmp_path / ".hidden" / "data"  # the data set itself may lie in a hidden folder
    names = ["B/1.jpg", "a b/1.JPG", "a/1.webp", "a/sub.jpg", "a/sub/1.png", "a/z.Png", "b/1.jpg"]
    names += ["b/10.tiff", "b/2.bmp", "b/\u00e9\u4e16.jpeg", "c.jpg/5.jpg"]
    ignored = ["1.jpg", ".part/2.jpg", "a/.thumbnails/3.jpg", "a/._1.jpg", "a/b/.4.jpg"]
    for name in [*names, *ignored]:
        save(root / name, noise(8, 8))
    for name in ("a/list.txt", "a/no_extension", "a/half.jpg.part", "a/jpg"):
        (root / name).write_text("no image")
    (root / "empty").mkdir()
    (root / "linked").symlink_to(save(tmp_path / "elsewhere" / "1.jpg", noise(8, 8)).parent)
    found = utils.find_images(root)
    assert [name for name, _, _ in found] == [*names, "linked/1.jpg"]
    for name, n_bytes, time in found:
        status = os.stat(root / name)
        assert (n_bytes, time) == (status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("name", [None, "1.jpg", "faces/list.txt", ".faces/1.jpg"])
def test_without_images_one_line_says_where_they_must_lie(tmp_path, name):
    root = tmp_path / "data"
    if name is not None:
        save(root / name, noise(8, 8), format="png")
    with pytest.raises(utils.UserError) as error:
        load(root, tmp_path / "cache")
    what = "no such folder" if name is None else "no image in a folder inside it"
    where = f"images must lie in a folder inside it, as in {root}/sub_directory/XXX.jpg"
    assert str(error.value) == f"--dataroot={root}: {what}; {where}"


@pytest.mark.parametrize("links", [{"loop": ".."}, {"a": ".", "b": "."}, {"again": "../other"}])
def test_a_folder_that_is_reached_twice_is_named(tmp_path, links):
    root = photos(tmp_path / "data")
    save(root / "other" / "1.jpg", noise(8, 8))
    for link, target in links.items():
        (root / "faces" / link).symlink_to(target)
    words = f"^--dataroot={root}: {root}/(faces/({'|'.join(links)})|other) is .* again, by a link;"
    with pytest.raises(utils.UserError, match=words):
        load(root)


def test_names_may_be_any_bytes(tmp_path):
    source, folder = save(tmp_path / "1.jpg", noise(8, 9)), tmp_path / "data" / "faces"
    folder.mkdir(parents=True)
    for name in (
        b"new\nline.jpg",
        b"not \xff\xfe utf-8.jpg",
        b"\xf0\x9f\x98\x80.jpg",
        b"%s {}.jpg",
    ):
        shutil.copy(source, os.path.join(os.fsencode(folder), name))
    (folder / os.fsdecode(b"broken \xff.jpg")).write_text("no image")
    ended = run(tmp_path, f"--dataroot={folder.parent}", f"--outf={tmp_path}/out", *LOAD_ONLY)
    assert ended.wait() == 2 and "4 images are too few" in ended.messages[-1]
    assert r"skipped 1 of 5 images that cannot be read: faces/broken \udcff.jpg" in ended.err


def test_the_digest_is_that_of_names_and_sizes(tmp_path):
    root = photos(tmp_path / "here")
    copy = shutil.copytree(root, tmp_path / "there", copy_function=shutil.copyfile)
    os.utime(copy / "faces" / "000001.png", (1, 1))
    _, digest = utils.load_images(root, "folder", 16, workers=0)
    assert utils.load_images(copy, "folder", 32, workers=0)[1] == digest
    save(copy / "faces" / "000001b.png", noise(20, 24))
    assert utils.load_images(copy, "folder", 32, workers=0)[1] != digest


@pytest.mark.parametrize(
    ("dataset", "crop", "box"),
    [
        ("celebA", None, (19, 39, 159, 179)),
        ("folder", None, (0, 20, 178, 198)),
        ("celebA", 70, (54, 74, 124, 144)),
    ],
)
def test_the_centre_is_resized_by_lanczos(tmp_path, dataset, crop, box):
    path = save(tmp_path / "faces" / "1.jpg", noise(178, 218))
    expected = Image.open(path).crop(box).resize((64, 64), LANCZOS)
    array, _ = utils.load_images(tmp_path, dataset, 64, crop, workers=0)
    assert np.array_equal(array[0], np.asarray(expected))


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.dstack([RAMP, RAMP.T, 255 - RAMP])
DEEP = RAMP.astype(np.uint16) * 257  # 0 to 65535, whose upper bytes are RAMP
PALETTE = Image.frombytes("P", (16, 16), RAMP.tobytes())
PALETTE.putpalette(COLOUR.tobytes())
INK = np.dstack([255 - COLOUR, 0 * RAMP])  # that absorbs what is missing to COLOUR


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(RAMP), RAMP),
        ("palette.png", PALETTE, COLOUR),
        ("rgba.png", Image.fromarray(np.dstack([COLOUR, RAMP])), COLOUR),
        ("cmyk.tiff", Image.frombytes("CMYK", (16, 16), INK.tobytes()), COLOUR),
        ("deep.png", Image.fromarray(DEEP), RAMP),
        ("deep.tiff", Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), RAMP),
    ],
)
def test_every_kind_of_pixel_becomes_its_rgb(tmp_path, name, image, expected):
    path = save(tmp_path / name, image)
    assert Image.open(path).mode == image.mode  # else this would test another kind
    rgb = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    assert np.array_equal(utils.decode_image(path, 16, None), rgb)


def test_exif_orientation_is_followed_before_the_crop(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    path = save(tmp_path / "1.png", noise(219, 178), exif=exif)
    upright = noise(219, 178).transpose(Image.Transpose.ROTATE_270)
    expected = upright.crop((19, 39, 159, 179)).resize((64, 64), LANCZOS)
    assert np.array_equal(utils.decode_image(path, 64, 140), np.asarray(expected))


def test_an_image_smaller_than_the_crop_is_named(tmp_path):
    root = photos(tmp_path / "data", 3, 140, 141)
    small = save(root / "faces" / "000001.png", noise(200, 139))
    ended = run(tmp_path, f"--dataroot={root}", f"--outf={tmp_path}/out")
    ended.fails(1, f"{small}: 200 x 139 pixels, less than the crop of 140", "--dataset=folder")
    assert not arrays(root)


@pytest.mark.parametrize("kind", ["cut", "page", "empty", "lost link", "pipe", "bomb"])
def test_what_cannot_be_read_is_skipped_and_named_at_every_start(tmp_path, kind, capfd, decoded):
    bad = photos(tmp_path) / "faces" / "000002.png"
    content = {"cut": bad.read_bytes()[:600], "page": b"<html>404</html>", "empty": b""}
    content["bomb"] = b"P6 40000 40000 255\n" + bytes(100)  # 4.8 GB, if anybody believed it
    bad.unlink()
    if kind in content:
        bad.write_bytes(content[kind])
    elif kind == "pipe":
        os.mkfifo(bad)
    else:
        bad.symlink_to("nowhere.png")
    for _ in range(2):
        check(load(tmp_path), tmp_path, without=bad.name)
        said = capfd.readouterr().err
        assert "main.py: skipped 1 of 6 images that cannot be read: faces/000002.png\n" in said
    assert sorted(path for path in decoded if path != bad) == sorted(set(decoded) - {bad})


def test_a_skipped_file_that_is_mended_is_noticed(tmp_path, capfd):
    bad = photos(tmp_path) / "faces" / "000002.png"
    whole, before = bad.read_bytes(), bad.stat()
    bad.write_bytes(bytes(len(whole)))
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(load(tmp_path)) == 5
    bad.write_bytes(whole)
    # As when a disk or a permission is mended: neither size nor time tell.
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    capfd.readouterr()
    check(load(tmp_path), tmp_path)
    assert "main.py: skipped" not in capfd.readouterr().err


def test_ten_of_many_unreadable_files_are_named_and_none_readable_is_an_error(tmp_path, capfd):
    paths = sorted((photos(tmp_path, 14) / "faces").iterdir())
    for path in paths[1:13]:
        path.write_text("no image")
    assert len(load(tmp_path)) == 2
    names = ", ".join(f"faces/{path.name}" for path in paths[1:11])
    assert f"skipped 12 of 14 images that cannot be read: {names}, ...\n" in capfd.readouterr().err
    for path in paths:
        path.write_text("no image")
    with pytest.raises(utils.UserError, match=f"none of the 14 images in {tmp_path} can be read"):
        load(tmp_path)


def load_as_nobody(root: Path, home: Path, variable: str) -> None:
    """Loads three images, of which one cannot be read, as a user without rights."""
    os.environ |= {"XDG_CACHE_HOME": "", variable: str(home)}
    sys.stderr = open(home / "said", "w", buffering=1)  # noqa: SIM115
    if os.geteuid() == 0:
        os.setuid(65534)
    assert len(load(root)) == 2


@pytest.mark.parametrize(("variable", "cache"), [("XDG_CACHE_HOME", "wae"), ("HOME", ".cache/wae")])
def test_a_data_set_that_cannot_be_written_or_read_in_part(variable, cache):
    with tempfile.TemporaryDirectory() as name:  # unlike tmp_path, open to others
        root, home = photos(Path(name) / "data", 3), Path(name) / "home"
        secret = save(root / "secret" / "1.png", noise(8, 8)).parent
        home.mkdir()
        modes = {Path(name): 0o755, home: 0o777, root / "faces" / "000001.png": 0, secret: 0}
        for path, mode in (modes | {root: 0o555}).items():
            path.chmod(mode)
        process = start(load_as_nobody, root, home, variable)
        process.join()
        said = (home / "said").read_text()
        assert process.exitcode == 0, said
        assert f"main.py: skipped the folder {secret}: Permission denied\n" in said
        assert "skipped 1 of 3 images that cannot be read: faces/000001.png\n" in said
        assert len(arrays(home / cache)) == 1 and not arrays(root)
        secret.chmod(0o755)
        root.chmod(0o755)


def test_rows_are_the_images_in_order_of_their_paths(tmp_path):
    for i in range(150):  # more than two batches of the workers
        save(tmp_path / f"{i % 3}" / f"{i * 7 % 150}.png", noise(9 + i % 5, 11, i))
    array = load(tmp_path, workers=2)
    check(array, tmp_path)
    assert isinstance(array, np.memmap) and array.dtype == np.uint8 and not array.flags.writeable


def test_the_array_is_built_once_and_moves_with_its_folder(tmp_path, decoded):
    load(photos(tmp_path / "here"))
    assert len(decoded) == 6
    (tmp_path / "here").rename(tmp_path / "there")
    check(load(tmp_path / "there"), tmp_path / "there")
    assert len(decoded) == 6
    utils.load_images(tmp_path / "there", "folder", 16, 10, workers=0)
    assert len(arrays(tmp_path / "there")) == 2  # neither crop takes the other's place


CHANGES = {
    "add": lambda path: save(path.with_name("000001b.png"), noise(9, 9)),
    "remove": lambda path: path.unlink(),
    "rename": lambda path: path.rename(path.with_name("000009.png")),
    "overwrite": lambda path: save(path, noise(20, 24, 99)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_decoded_anew_and_the_outdated_array_goes(tmp_path, change):
    outdated = load(photos(tmp_path))
    before, (name,) = np.array(outdated), arrays(tmp_path)
    CHANGES[change](tmp_path / "faces" / "000001.png")
    check(load(tmp_path), tmp_path)
    assert len(arrays(tmp_path)) == 1 and arrays(tmp_path) != [name]
    assert np.array_equal(outdated, before)  # a run that still reads it is not disturbed


def test_a_cache_folder_serves_several_data_sets(tmp_path, decoded):
    cache, one, two = tmp_path / "a" / "cache", photos(tmp_path / "1", 2), photos(tmp_path / "2", 3)
    for _ in range(2):
        check(load(one, cache), one)
        check(load(two, cache), two)
    save(one / "faces" / "2.png", noise(20, 24))
    check(load(one, cache), one)
    check(load(two, cache), two)
    assert len(decoded) == 2 + 3 + 3  # the change of one did not remove the other's
    assert len(arrays(cache)) == 2 and not arrays(one)


DAMAGES = {
    "empty": lambda path: os.truncate(path, 0),
    "cut after five images": lambda path: os.truncate(path, 128 + 5 * 768),
    "longer": lambda path: os.truncate(path, 128 + 6 * 768 + 1),
    "fewer images": lambda path: np.save(path, np.load(path)[:5]),
    "no array": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "no list of skipped files": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_built_anew_with_a_word(tmp_path, damage, capfd):
    load(photos(tmp_path))
    (path,) = arrays(tmp_path)
    whole = path.read_bytes()
    DAMAGES[damage](path)
    capfd.readouterr()
    check(load(tmp_path), tmp_path)
    word = f"main.py: {path} is damaged or out of date: the images are decoded again\n"
    assert word in capfd.readouterr().err
    assert path.read_bytes() == whole


def many(root: Path, n: int) -> Path:
    """Makes a folder of n images, which take a while to decode. Returns it."""
    first = photos(root, 1, 178, 218) / "faces" / "000000.png"
    for i in range(1, n):
        os.link(first, first.with_name(f"{i:06d}.png"))
    return root


def start_to_build(tmp_path: Path, root: Path, *flags: str) -> Program:
    """Starts the program. Returns it when the first images are written."""
    flags = (f"--dataroot={root}", f"--outf={tmp_path}/out", *LOAD_ONLY, *flags)
    builder = Program(tmp_path / "builder", *flags)
    assert builder.wait_until(lambda: any(p.stat().st_size > 10**5 for p in root.glob(".*.tmp")))
    return builder


def test_two_processes_build_once(tmp_path):
    root = many(tmp_path / "data", 400)
    first = start_to_build(tmp_path, root)
    second = run(tmp_path, f"--dataroot={root}", f"--outf={tmp_path}/out", *LOAD_ONLY)
    assert not second.process.is_alive() and first.wait() == second.wait() == 2
    assert first.messages == second.messages and "400 images are too few" in second.messages[0]
    assert "decoding once" in first.err and "decoding once" not in second.err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_what_ends_a_build_leaves_nothing_in_the_way_of_the_next(tmp_path, number, status):
    root = many(tmp_path / "data", 400)
    builder = start_to_build(tmp_path, root)
    builder.kill(number)
    assert builder.wait() == status
    assert not arrays(root) and "Traceback" not in builder.err
    # The same images again: workers of the first must not live on and hold its lock.
    n = 400
    if number == signal.SIGINT:  # or others: nothing half-written must stay for good
        assert builder.messages == ["main.py: interrupted"]
        n = 10
        for path in sorted(root.glob("faces/*"))[n:]:
            path.unlink()
    again = run(tmp_path, f"--dataroot={root}", f"--outf={tmp_path}/out", *LOAD_ONLY)
    again.fails(2, f"{n} images are too few")
    assert len(arrays(root)) == 1 and not list(root.glob(".*.tmp"))


def test_a_full_disk_is_one_line(tmp_path):
    root = photos(tmp_path / "data", 40)
    flags = (f"--dataroot={root}", f"--outf={tmp_path}/out", *LOAD_ONLY)
    ended = run(tmp_path, *flags, max_bytes=100_000)
    ended.fails(1, f"cannot write {root}/.wae_64_None_here_", "File too large")
    assert not arrays(root) and not list(root.glob(".*.tmp"))


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    """Maps 50 images from disk."""
    path = tmp_path_factory.mktemp("mapped") / "array.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("kind", ["mapped", "tensor"])
def test_batches_are_the_images_of_the_indices(array, kind):
    images = array if kind == "mapped" else torch.from_numpy(np.array(array))
    epoch = utils.epoch_order(50, 1, 2).reshape(10, 5)
    for order in ([], [[3]], [[7, 7, 0], [49]], [[1, 2], [4], [5, 6, 7], [8], [9]], epoch):
        indices = [np.array(index) for index in order]
        got = list(utils.batches(images, iter(indices), CPU))
        for batch, index in zip(got, indices, strict=True):
            assert batch.dtype == torch.uint8 and np.array_equal(batch, array[index])
    got[1].zero_()  # a batch is the consumer's own
    assert np.array_equal(got[0], array[epoch[0]]) and np.array_equal(got[2], array[epoch[2]])


def test_a_thread_reads_few_batches_ahead_and_ends_with_its_consumer(array):
    asked, before = [], threading.active_count()

    def indices() -> Iterator[np.ndarray]:
        for index in np.arange(50).reshape(25, 2):
            asked.append(index)
            yield index

    for taken, _ in enumerate(utils.batches(array, indices(), CPU, ahead=3), 1):
        assert len(asked) <= taken + 3
    assert taken == 25
    with contextlib.closing(utils.batches(array, indices(), CPU)) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(IndexError):  # an error of the thread reaches the consumer
        list(utils.batches(array, [np.array([1]), np.array([50])], CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(array):
    gpu = torch.device("cuda", 0)
    resident, indices = utils.put_on_device(array, gpu), list(np.arange(50).reshape(25, 2))
    assert resident.is_cuda
    for images in (array, resident):
        for batch, index in zip(utils.batches(images, indices, gpu), indices, strict=True):
            assert batch.is_cuda and np.array_equal(batch.cpu(), array[index])


def test_pixels_to_the_range_of_the_networks_and_back():
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    batch[1], batch[..., 1] = batch[1].flip(0), 51
    plain, symmetric = (utils.from_uint8(batch, s) for s in (False, True))
    pixels = batch.numpy().transpose(0, 3, 1, 2)
    np.testing.assert_allclose(plain, pixels / 255, rtol=0, atol=1e-7)
    np.testing.assert_allclose(symmetric, pixels / 255 * 2 - 1, rtol=0, atol=2e-7)
    for x in (plain, symmetric):
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(utils.to_uint8(plain), batch)
    assert np.array_equal(utils.to_uint8(plain + 0.4 / 255), batch)  # rounds
    assert utils.to_uint8(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1)).ravel().tolist() == [0, 255]


def test_held_out_images_by_default():
    sizes = (202_599, 1_000_000, 11_712, 25, 3)
    assert [utils.default_n_test(n) for n in sizes] == [19_962, 19_962, 1_171, 2, 2]


def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone():
    keys = [(seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 54)]
    orders = [utils.epoch_order(1000, *key) for key in keys]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert np.array_equal(utils.epoch_order(1000, *keys[0]), orders[0])
