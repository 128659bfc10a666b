"""download_datasets.py against a local server that misbehaves, and the toy faces.

Most tests call `main` with small values in place of CelebA's MD5, size and number of images. Tests
of signals and locks start a copy of the program with the same changes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_drive import QUOTA_PAGE, FakeDrive, Reply
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import download_datasets as dd  # noqa: E402

HEAD = "img_align_celeba"
NAMES = [f"{HEAD}/{i:06d}.jpg" for i in range(1, 7)]
HTML = b"<html><title>Sign in</title></html>"
IMAGES = [np.random.default_rng(i).bytes(100_000) for i in range(6)]
with io.BytesIO() as file:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{HEAD}/", "")
        for name, image in zip(NAMES, IMAGES, strict=True):
            archive.writestr(name, image)
    ZIP = file.getvalue()
PART = f"data/celebA/.partial/{HEAD}.zip.part"
HAVE = 300_000  # bytes of ZIP in the partial file at the start of many tests
NAMELESS = {"Content-Type": None}
WRONG = ZIP[:100] + b"?" + ZIP[101:]
MD5 = hashlib.md5(ZIP).hexdigest()
CONSTANTS = {"CELEBA_MD5": MD5, "CELEBA_SIZE": len(ZIP), "CELEBA_IMAGES": len(NAMES)}


def call(*arguments: object, **values: object) -> subprocess.CompletedProcess:
    """Runs `main` in this process, with `values` for the module's constants and without pauses."""
    out, err, pauses = io.StringIO(), io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["download_datasets.py", *map(str, arguments)])
        patch.setattr(dd, "time", SimpleNamespace(sleep=pauses.append))
        for name, value in values.items():
            patch.setattr(dd, name, value)
        try:
            status = dd.main()
        except SystemExit as stop:
            status = stop.code
    return subprocess.CompletedProcess(pauses, status, out.getvalue(), err.getvalue())


def celeba(tmp_path: Path, *options: object, **values: object) -> subprocess.CompletedProcess:
    options = ["celebA", "--data_dir", tmp_path / "data", *options]
    return call(*options, **{**CONSTANTS, **values})


def fetch(tmp_path: Path, *replies: Reply, **values: object):
    """Downloads from a host that answers with `replies`. Returns (run, host)."""
    with FakeDrive(ZIP, replies) as drive:
        return celeba(tmp_path, "--url", drive.url, **values), drive


def start(tmp_path: Path, *arguments: object, **popen: object) -> subprocess.Popen:
    """Starts a copy of the program with the constants of ZIP."""
    source = (REPO / "download_datasets.py").read_text()
    for name, value in CONSTANTS.items():
        source = re.sub(rf"^{name} = .*", f"{name} = {value!r}", source, flags=re.M)
    (tmp_path / "download_datasets.py").write_text(source)
    command = [sys.executable, tmp_path / "download_datasets.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, **popen)


def part_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / PART
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def tree(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if not path.is_dir() and path.name != "lock"]
    return sorted(str(path.relative_to(folder)) for path in files)


def assert_complete(tmp_path: Path, run: subprocess.CompletedProcess) -> None:
    """The images are there byte for byte, nothing is beside them, and nobody complained."""
    assert (run.returncode, run.stderr) == (0, ""), run
    folder = tmp_path / "data" / "celebA"
    assert tree(folder) == NAMES and os.listdir(folder) == [HEAD]
    assert [(folder / name).read_bytes() for name in NAMES] == IMAGES


def assert_failed(run: subprocess.CompletedProcess, *words: object, status: int = 1) -> None:
    """The program ended with one line that has all `words`."""
    assert run.returncode == status, run
    assert re.fullmatch(r"download_datasets\.py: error: [^\n]+\n", run.stderr), run.stderr
    for word in words:
        assert str(word) in run.stderr, (word, run.stderr)


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# What a host may answer


def test_a_download(tmp_path):
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.ranges == ["bytes=0-"]
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert "already" in run.stdout and drive.ranges == []


@pytest.mark.parametrize(
    "replies",
    [
        [Reply(ranges=False)],
        [Reply(cut=200_000, ranges=False), Reply(ranges=False)],
        [Reply(ranges=False, headers={"Content-Length": "abc"})],
        [Reply(ranges=False, body=ZIP * 2, headers={"Content-Length": None})],
        [Reply(cut=50_000), Reply(headers={"Content-Length": None})],
        [Reply(chunked=True, block=1, cut=500), Reply(chunked=True)],
    ],
)
def test_good_answers_of_many_forms(tmp_path, replies):
    with FakeDrive(ZIP, replies) as drive:
        assert_complete(tmp_path, celeba(tmp_path, "--url", drive.host))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(status=503), "503"),
        (Reply(status=429, body=HTML), "429"),
        (Reply(status=404, body=HTML), "404"),
        (Reply(status=416, body=b""), "416"),
        (Reply(status=200, body=HTML), "text/html"),
        (Reply(body=HTML), "text/html"),
        (Reply(status=200, body=HTML, headers=NAMELESS), "another file, of 35 bytes"),
        (Reply(status=200, body=HTML * 9000, chunked=True, headers=NAMELESS), "not a zip"),
        (Reply(status=200, body=QUOTA_PAGE), "quota is used up"),
        (Reply(status=200, body=ZIP[:1000]), "another file, of 1,000 bytes"),
        (Reply(status=200, body=b"", chunked=True), "ended after 300,000"),
        (Reply(body=ZIP[HAVE - 7 :], headers={"Content-Range": "bytes 9-"}), "sends 'bytes 9-'"),
        (Reply(body=ZIP[HAVE:], headers={"Content-Range": None}), "sends ''"),
        (Reply(cut=0), "IncompleteRead"),
        (Reply(cut=2 << 16, ranges=False), "IncompleteRead"),
    ],
)
def test_a_bad_answer_loses_nothing(tmp_path, reply, words):
    part = part_file(tmp_path, ZIP[:HAVE])
    run, _ = fetch(tmp_path, reply, MAX_STALLED=2)
    assert_failed(run, words, "--zip")
    assert part.read_bytes() == ZIP[:HAVE]
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.ranges == [f"bytes={HAVE}-"], "nothing is downloaded twice"


@pytest.mark.parametrize("part", [WRONG[:HAVE], ZIP + b"more"], ids=len)
def test_a_wrong_file_is_deleted(tmp_path, part):
    part_file(tmp_path, part)
    run, _ = fetch(tmp_path)
    assert_failed(run, "MD5", "--zip")
    assert tree(tmp_path) == []


def test_retries_are_bounded(tmp_path):
    run, drive = fetch(tmp_path, Reply(status=503))
    assert_failed(run, "503", "no progress")
    assert len(drive.ranges) == dd.MAX_STALLED
    assert run.args == [2**i for i in range(1, dd.MAX_STALLED)], "seconds"
    # As long as bytes come, there is no end.
    assert_complete(tmp_path, fetch(tmp_path, Reply(cut=1 << 16), MAX_STALLED=1)[0])


def test_a_silent_host(tmp_path):
    run, _ = fetch(tmp_path, Reply(pause=3), TIMEOUT_S=(0.2, 0.2), MAX_STALLED=1)
    assert_failed(run, "timed out")


def test_addresses_that_cannot_be_read(tmp_path):
    for url in ("ftp://host/file", "http://[bad]/x", "http://.x./", "", "http://a:b/"):
        assert_failed(celeba(tmp_path, "--url", url), "cannot read", "--zip")
    page = b'<form action="http://[x/download"></form>'
    assert_failed(fetch(tmp_path, Reply(status=200, body=page))[0], "cannot read", "--zip")
    with FakeDrive(ZIP) as drive:
        url = drive.url
    assert_failed(celeba(tmp_path, "--url", url, MAX_STALLED=2), "refused", "--zip")


# Ctrl-C, kills, two runs at once


def test_ctrl_c_and_a_second_run(tmp_path):
    part = tmp_path / PART
    options = ["celebA", "--data_dir", tmp_path / "data", "--url"]
    with FakeDrive(ZIP, [Reply(chunked=True, block=1, pause=0.02)]) as drive:
        process = start(tmp_path, *options, drive.url)
        wait_for(lambda: part.exists() and part.stat().st_size > 5)
        assert_failed(fetch(tmp_path)[0], "another process", tmp_path / "data" / "celebA")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=15)
    assert (process.returncode, len(err.split("\n"))) == (130, 3) and "again" in err, err
    had = part.stat().st_size
    assert ZIP.startswith(part.read_bytes()) and had
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.ranges == [f"bytes={had}-"]


def test_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / "requests.py").write_text("import os\nos.kill(os.getpid(), 2)\nos.abort()")
    process = start(tmp_path, "toy")
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_any_number_of_ctrl_c_while_faces_are_drawn(tmp_path):
    process = start(tmp_path, "toy", "--data_dir", tmp_path)
    wait_for(lambda: any(tmp_path.glob("toy/.partial/*/*.jpg")))
    for _ in range(40):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 130 and err.strip().count("\n") == 0, err
    assert os.listdir(tmp_path / "toy") == [".partial"], "nothing that looks whole"
    assert call("toy", "--data_dir", tmp_path, "--n_images", 3).returncode == 0


def test_a_killed_extraction(tmp_path):
    folder = part_file(tmp_path, ZIP).parent / HEAD
    folder.mkdir()
    (folder / "000001.jpg").write_bytes(b"half")
    (folder / "999999.jpg").touch()
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.ranges == [], "the zip was here"


# Files and folders


def test_a_zip_by_hand(tmp_path):
    mine = tmp_path / "mine.zip"
    assert_failed(celeba(tmp_path, "--zip", mine), f"--zip {mine}", "no such file")
    mine.write_bytes(WRONG)
    assert_failed(celeba(tmp_path, "--zip", mine), mine, "MD5", "mmlab")
    assert mine.read_bytes() == WRONG
    mine.write_bytes(ZIP)
    assert_complete(tmp_path, celeba(tmp_path, "--zip", mine))
    assert mine.read_bytes() == ZIP


def test_another_set_is_left_alone(tmp_path):
    folder = tmp_path / "data" / "celebA" / HEAD
    folder.mkdir(parents=True)
    (folder / "000001.jpg").write_bytes(b"mine")
    assert_failed(celeba(tmp_path), folder, "other images (1)", "--data_dir")
    assert tree(tmp_path) == [f"data/celebA/{NAMES[0]}"]


def test_a_full_disk(tmp_path):
    part = part_file(tmp_path, b"")
    part.unlink()
    part.symlink_to("/dev/full")
    assert_failed(fetch(tmp_path)[0], "No space left", "make room", "--data_dir")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "/proc/nothing"):
        for name in ("celebA", "mnist", "toy"):
            assert_failed(call(name, "--data_dir", folder), folder, "--data_dir")


def test_bad_options():
    named = {
        "toy --n_images 0": "--n_images",
        "toy --n_images 1000000": "999999",
        "toy --seed -1": "--seed",
        "mnist --zip f": "--zip",
        "celebA --url http://host/f --zip f": "--zip",
        "": "celebA",
    }
    for options, word in named.items():
        assert_failed(call(*options.split()), word, status=2)


# MNIST and the toy faces


def idx(array: np.ndarray) -> bytes:
    """Returns the array in MNIST's file format."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


def test_mnist(tmp_path, monkeypatch):
    mnist = pytest.importorskip("torchvision.datasets").MNIST
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    files = [idx(images[:5]), idx(labels[:5]), idx(images[5:]), idx(labels[5:])]
    md5s = [hashlib.md5(file).hexdigest() for file in files]
    resources = [(name, md5) for (name, _), md5 in zip(mnist.resources, md5s, strict=True)]
    monkeypatch.setattr(mnist, "resources", resources)
    monkeypatch.setattr(mnist, "mirrors", [])
    # Each file is asked for twice: torchvision first looks for redirects.
    for replies in ([Reply(status=404)], [Reply(body=file) for file in files for _ in range(2)]):
        with FakeDrive(b"", replies) as drive:
            command = ["mnist", "--data_dir", tmp_path, "--url", drive.host]
            run = call(*command, MNIST_IMAGES=7)
        if replies == [Reply(status=404)]:
            assert_failed(run, "MNIST", "--url")
            assert os.listdir(tmp_path / "mnist") == [".partial"]
    assert (run.returncode, run.stderr) == (0, ""), run
    assert "already" in call(*command, MNIST_IMAGES=7).stdout
    assert tree(tmp_path) == [f"mnist/digits/{i:05d}.png" for i in range(7)]
    written = [np.asarray(Image.open(tmp_path / name)) for name in tree(tmp_path)]
    assert np.array_equal(written, images)


def test_a_toy_set(tmp_path):
    data = tmp_path / "f\u00fcr"
    command = ["toy", "--data_dir", data, "--n_images", 5, "--seed", 3]
    process = start(tmp_path, *command, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "f\\xfcr" in out
    folder = data / "toy" / "img_align_toy"
    names = [f"{i:06d}.jpg" for i in range(1, 6)]
    assert tree(folder) == [".seed", *names]
    for name in names:
        with Image.open(folder / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (178, 218))
    assert "already" in call(*command).stdout
    for other in (["--n_images", 6], ["--seed", 0]):
        assert_failed(call(*command, *other), folder, "other images", "--data_dir")


def test_toy_faces_vary_and_sit_where_celeba_has_them():
    faces = np.stack([np.asarray(dd.draw_face(0, i), np.float32) for i in range(1, 33)])
    middle = faces[:, 39:179, 19:159].mean(-1)
    assert middle.std(0).mean() > 25, "from face to face"
    assert middle.std((1, 2)).min() > 12, "within each"
    for seed in (0, 1):
        same = np.array_equal(dd.draw_face(seed, 1), faces[0])
        assert same == (seed == 0), "the seed alone decides"
    # On average an eye is darker than the cheek below it and the forehead above.
    mean = middle.mean(0)
    for x in (50, 90):
        eye, cheek, brow = (mean[y - 3 : y + 4, x - 4 : x + 5].mean() for y in (72, 92, 45))
        assert eye < cheek - 5 and eye < brow + 20
