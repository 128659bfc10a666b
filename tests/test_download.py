"""download_datasets.py against a local server that misbehaves, and the toy faces."""

import gzip
import hashlib
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fake_drive import FakeDrive, Reply
from PIL import Image

import download_datasets as dd

FOLDER = Path("data/celebA/img_align_celeba")  # in the working directory of a test
PART = Path("data/celebA/.partial/img_align_celeba.zip.part")
NAMES = [f"{i:06d}.jpg" for i in range(1, 7)]
IMAGES = {name: np.random.default_rng(int(name[:6])).bytes(100_000) for name in NAMES}


def pack(*names: str) -> bytes:
    """Returns a zip with images under these names, and with what else there may be in one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, IMAGES[name[-10:]])
        archive.writestr(f"__MACOSX/._{NAMES[0]}", "")
        archive.writestr("list_eval_partition.csv", "")
    return file.getvalue()


ZIP = pack(*[f"img_align_celeba/{name}" for name in NAMES])
MD5 = hashlib.md5(ZIP).hexdigest()
CONSTANTS = {"CELEBA_MD5": MD5, "CELEBA_SIZE": len(ZIP), "CELEBA_IMAGES": 6, "MNIST_IMAGES": 7}
HALF = ZIP[:300_000]


@pytest.fixture(autouse=True)
def small_celeba(tmp_path, monkeypatch):
    """An empty folder to work in, the values of ZIP in place of CelebA's, and no pauses."""
    monkeypatch.chdir(tmp_path)
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(dd, name, value)
    monkeypatch.setattr(dd, "time", mock.Mock())


def run(*options: str) -> str:
    """Runs `main`. Returns its error, of one line, or nothing."""
    with mock.patch.object(sys, "argv", ["download_datasets.py", *options]):
        try:
            dd.main()
        except SystemExit as stop:
            assert stop.code.startswith("download_datasets.py: error: ") and "\n" not in stop.code
            return stop.code
    return ""


def fetch(*replies: Reply) -> tuple[str, list[str]]:
    """Downloads from a host that answers with `replies`. Returns the error, and the requests."""
    with FakeDrive(ZIP, *replies) as drive:
        return run("celebA", "--url", drive.url), drive.ranges


def leave(part: bytes) -> None:
    """Leaves what a run does that was killed: a partial file, and images."""
    (PART.parent / FOLDER.name).mkdir(parents=True)
    (PART.parent / FOLDER.name / "999999.jpg").touch()
    PART.write_bytes(part)


def assert_complete() -> None:
    """The images are there byte for byte, and nothing is beside them."""
    assert os.listdir(FOLDER.parent) == [FOLDER.name]
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == IMAGES


def test_get_celeba_downloads_once():
    assert fetch() == ("", ["bytes=0-"])
    assert_complete()
    assert fetch() == ("", [])


@pytest.mark.parametrize("layout", ["", "img_align_celeba/img_align_celeba/", "../../", "/"])
def test_get_celeba_takes_a_zip_of_any_layout(layout):
    Path("mine").write_bytes(pack(*[layout + name for name in reversed(NAMES)]))
    assert run("celebA", "--zip", "mine") == ""
    assert_complete()
    assert os.path.exists("mine")


def test_get_celeba_refuses_a_zip():
    leave(HALF)
    assert "mine: No such file" in run("celebA", "--zip", "mine")
    for content, words in (
        (pack("a/000001.jpg", "b/000002.jpg"), "has 2 images like 000001.jpg and not CelebA's 6"),
        (pack(*NAMES[:5], "twice/000001.jpg"), "has 6 images like 000001.jpg and not CelebA's 6"),
        (b"7z\xbc\xaf\x27\x1c", "7z archives must be unpacked by hand"),
        (ZIP.replace(IMAGES[NAMES[3]], bytes(100_000)), "CRC"),
    ):
        Path("mine").write_bytes(content)
        error = run("celebA", "--zip", "mine")
        assert words in error and "--dataroot" in error
        assert not FOLDER.exists() and PART.read_bytes() == HALF


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(503), "503"),
        (Reply(404, b"<html>"), "404"),
        (Reply(200, b"<html>"), "text/html"),
        (Reply(200, b"<html>", cut=3), "IncompleteRead"),
        (Reply(200, b"<p>Too many users have viewed this file."), "quota is used up"),
        (Reply(200, b"<form " * 5_000_000), "sends no zip"),
        (Reply(200, b'<form action="http://[x/download"></form>'), "cannot read"),
        (Reply(200, ZIP[:1000]), "another file, of 1,000 bytes"),
        (Reply(200, b"Sorry. " * 90_000, sized=False), "not a zip"),
        (Reply(200, b"", sized=False), "ended after 300,000"),
        (Reply(cut=0), "IncompleteRead"),
    ],
)
def test_open_zip_fails_and_nothing_is_lost(reply, words):
    leave(HALF)
    start = time.monotonic()
    error, _ = fetch(reply)
    assert words in error and "--zip" in error
    assert time.monotonic() - start < 10, "however long a page is"
    assert PART.read_bytes() == HALF
    assert fetch() == ("", ["bytes=300000-"])
    assert_complete()


def test_open_zip_needs_an_address_and_certificates(monkeypatch):
    for url in ("ftp://host/file", "http://[bad]/x", "", "http://a:b/"):
        assert "cannot read" in run("celebA", "--url", url)
    assert "refused" in run("celebA", "--url", "http://127.0.0.1:1/")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent")
    assert "TLS CA certificate" in run("celebA", "--url", "https://127.0.0.1:1/")


def test_receive_from_a_host_without_ranges():
    assert fetch(Reply(ranges=False, cut=200_000), Reply(ranges=False))[0] == ""
    assert_complete()


def test_download_tries_again_as_long_as_bytes_come(monkeypatch):
    assert len(fetch(Reply(503))[1]) == dd.MAX_STALLED
    monkeypatch.setattr(dd, "MAX_STALLED", 1)
    assert fetch(Reply(cut=1 << 16))[0] == ""
    assert_complete()


def test_download_deletes_a_file_of_another_md5():
    leave(HALF.replace(b"PK", b"??"))
    assert "MD5" in fetch()[0]
    assert not PART.exists()


def test_download_to_a_full_disk():
    PART.parent.mkdir(parents=True)
    PART.symlink_to("/dev/full")
    assert fetch()[0].endswith("data: No space left on device")


def test_download_interrupted_and_another_process_at_work():
    code = f"import download_datasets as dd, signal; vars(dd).update({CONSTANTS})\n"
    code += "signal.signal(signal.SIGINT, dd.interrupt); dd.main()"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(dd.__file__)}
    with FakeDrive(ZIP, Reply(pause=0.1)) as drive:
        command = [sys.executable, "-c", code, "celebA", "--url", drive.url]
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (PART.exists() and PART.stat().st_size):
            time.sleep(0.01)
        assert "another process works in data/celebA" in fetch()[0]
        process.send_signal(signal.SIGINT)
        assert "again to continue" in process.communicate(timeout=15)[1]
    assert process.returncode == 130
    had = PART.stat().st_size
    assert fetch() == ("", [f"bytes={had}-"])
    assert_complete()


def test_already_done_refuses_other_images():
    FOLDER.mkdir(parents=True)
    assert "other images (0)" in run("celebA")


def test_parse_args_refuses(monkeypatch, capsys):
    for options in ("toy --n_images 0", "mnist --zip f", "celebA --url u --zip f"):
        monkeypatch.setattr(sys, "argv", ["", *options.split()])
        with pytest.raises(SystemExit, match="2"):
            dd.parse_args()
        assert capsys.readouterr().err.count("\n") == 1


def test_get_mnist_from_a_mirror(monkeypatch):
    mnist = pytest.importorskip("torchvision.datasets").MNIST
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    files = []
    for part in (images[:5], images[5:]):
        for array in (part, part[:, 0, 0]):  # the images, and something as labels
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            files.append(gzip.compress(head + array.tobytes()))
    md5s = [hashlib.md5(file).hexdigest() for file in files]
    names = [name for name, _ in mnist.resources]
    monkeypatch.setattr(mnist, "resources", list(zip(names, md5s, strict=True)))
    monkeypatch.setattr(mnist, "mirrors", [])
    with FakeDrive(b"", Reply(404)) as drive:
        assert "no MNIST" in run("mnist", "--url", drive.host)
    # Each file is asked for twice: torchvision first looks for redirects.
    with FakeDrive(b"", *[Reply(body=file) for file in files for _ in range(2)]) as drive:
        assert run("mnist", "--url", drive.host) == ""
    written = [np.asarray(Image.open(path)) for path in sorted(Path("data/mnist/digits").iterdir())]
    assert np.array_equal(written, images)


def test_get_toy_without_docstrings():
    command = [sys.executable, "-OO", dd.__file__, "toy", "--n_images=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert sorted(os.listdir("data/toy/img_align_toy")) == NAMES[:3]
    assert run("toy", "--n_images=3") == ""
    assert "other images" in run("toy", "--n_images=4")


def test_draw_face_depends_on_the_index_alone():
    face, again, other = (np.asarray(dd.draw_face(index)) for index in (1, 1, 2))
    assert np.array_equal(face, again) and np.std([face, other], axis=0).mean() > 20
