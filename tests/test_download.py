"""download_datasets.py against a local host that misbehaves, and the toy faces."""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import download_datasets as dd

# A test works in a folder of its own.
FOLDER = Path("data/celebA/img_align_celeba")
PART = Path("data/celebA/img_align_celeba.zip.part")
NAMES = [f"{i:06d}.jpg" for i in range(1, 7)]
IMAGES = {name: np.random.default_rng(int(name[:6])).bytes(100_000) for name in NAMES}


def pack(*names: str) -> bytes:
    """Returns a zip with images under these names, and with what a Mac adds."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in [*names, f"__MACOSX/._{NAMES[0]}"]:
            archive.writestr(name, IMAGES.get(name[-10:], b""))
    return file.getvalue()


ZIP = pack(*[f"img_align_celeba/{name}" for name in NAMES])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers["Range"])
        self.answer(**server.answers[min(len(server.ranges), len(server.answers)) - 1])

    def answer(self, body=ZIP, status=206, kind="zip", sized=True, cut=None, ctrl_c=False) -> None:
        """Sends the body, all of it unless `status` is 206, or hangs up after `cut` bytes."""
        start = int(self.headers["Range"][6:-1]) if status == 206 else 0
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if sized:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:cut])
        if ctrl_c:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def do_CONNECT(self) -> None:
        """Answers as a proxy does that wants a password."""
        self.send_error(407)


@contextlib.contextmanager
def serve(*answers: dict, certificate: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields the address of a web server and a list of the ranges that it was asked for.

    It answers each request by the next keywords of `Handler.answer`; the last ones stay.
    """
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.answers = answers or [{}]
    server.ranges = []
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_port}", server.ranges
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def small_celeba(tmp_path, monkeypatch):
    """An empty folder to work in, the values of ZIP in place of CelebA's, and no proxy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(dd, "CELEBA_BYTES", len(ZIP))
    monkeypatch.setattr(dd, "CELEBA_MD5", hashlib.md5(ZIP).hexdigest())
    monkeypatch.setattr(dd, "CELEBA_IMAGES", len(NAMES))
    monkeypatch.setattr(dd, "PAUSE_S", 0)


def run(*options: str) -> str:
    """Runs the program. Returns its error, of one line, or nothing."""
    sys.argv = ["download_datasets.py", *options]
    try:
        dd.main()
    except SystemExit as stop:
        assert "\n" not in str(stop.code).strip()
        return str(stop.code)
    return ""


def fetch(*answers: dict) -> tuple[str, list[str]]:
    """Downloads from a host that gives these answers. Returns the error, and the requests."""
    with serve(*answers) as (url, ranges):
        return run("celebA", f"--url={url}"), ranges


def assert_complete() -> None:
    """The images are there byte for byte, and nothing is beside them."""
    assert os.listdir(FOLDER.parent) == [FOLDER.name]
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == IMAGES


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ([{"cut": 262_144}, {"cut": 65_536}, {}], [0, 262_144, 327_680]),
        ([{"cut": 262_144, "sized": False}, {}], [0, 262_144]),
        ([{"cut": 262_144}, {"status": 200}], [0, 262_144]),
    ],
)
def test_broken_download_is_resumed(answers, starts):
    assert fetch(*answers) == ("", [f"bytes={start}-" for start in starts])
    assert_complete()
    assert fetch() == ("", [])


@pytest.mark.parametrize(
    ("answer", "words", "n_requests"),
    [
        ({"status": 404}, "404", 1),
        ({"status": 200, "kind": "text/html"}, "quota", 1),
        ({"status": 200, "body": bytes(1000)}, "another file, of 1,000 bytes", 1),
        ({"cut": 0, "sized": False}, "ended after 300,000 bytes; try", dd.MAX_TRIES),
        ({"cut": 0, "ctrl_c": True}, "interrupted: run the same command again", 1),
    ],
)
def test_failed_download_loses_nothing(answer, words, n_requests):
    PART.parent.mkdir(parents=True)
    PART.write_bytes(ZIP[:300_000])
    error, ranges = fetch(answer)
    assert words in error and len(ranges) == n_requests
    assert fetch() == ("", ["bytes=300000-"])
    assert_complete()


def test_file_of_another_md5_is_deleted():
    assert "MD5" in fetch({"body": bytes(len(ZIP))})[0]
    assert fetch() == ("", ["bytes=0-"])


def test_zip_of_ones_own():
    assert "No such file" in run("celebA", "--zip=mine")
    for content, words in (
        (pack(*NAMES[:5]), "no 000006.jpg"),
        (b"7z\xbc\xaf\x27\x1c", "unpack a 7z archive by hand"),
        (ZIP.replace(IMAGES[NAMES[3]], bytes(100_000)), "CRC"),
    ):
        Path("mine").write_bytes(content)
        assert words in run("celebA", "--zip=mine")
        assert os.listdir(FOLDER.parent) == []
    Path("mine").write_bytes(pack(*[f"any/layout/{name}" for name in reversed(NAMES)]))
    assert run("celebA", "--zip=mine") == ""
    assert_complete()
    assert os.path.exists("mine")


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl command")
def test_certificate_that_nobody_knows_ends_at_once(monkeypatch):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout own.pem -out own.pem"
    command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), check=True, capture_output=True)
    monkeypatch.setattr(dd, "time", None)  # a pause raises an error then
    with serve(certificate="own.pem") as (url, _):
        error = run("celebA", f"--url={url}")
        assert "CERTIFICATE_VERIFY_FAILED" in error and "REQUESTS_CA_BUNDLE" in error
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "own.pem")
        assert run("celebA", f"--url={url}") == ""


def test_proxy_that_says_no_ends_at_once(monkeypatch):
    monkeypatch.setattr(dd, "time", None)  # a pause raises an error then
    with serve() as (url, _):
        monkeypatch.setenv("https_proxy", url)
        error = run("celebA")
    assert ": Tunnel connection failed: 407" in error and "HTTPS_PROXY" in error
    assert "refused" in run("mnist")
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    assert importlib.util.find_spec("socks") or "ALL_PROXY" in run("mnist")


def test_mistakes_are_told_in_one_line(capsys):
    for url in ("", "ftp://host/file", "http://[bad]/x"):
        assert url in run("celebA", f"--url={url}") != ""
    for options in ("toy --n_images=0", "mnist --zip=f", "celebA --url=u --zip=f"):
        capsys.readouterr()
        assert run(*options.split()) == "2"
        assert capsys.readouterr().err.count("\n") == 1


def test_mnist_is_written_in_order(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    file = gzip.compress(bytes(16) + images.tobytes())
    md5 = hashlib.md5(file).hexdigest()
    monkeypatch.setattr(dd, "MNIST_IMAGES", 6)
    monkeypatch.setattr(dd, "MNIST_FILES", [(name, len(file), md5) for name in ("train", "test")])
    with serve({"body": file}) as (url, _):
        monkeypatch.setattr(dd, "MNIST_URL", url)
        assert run("mnist") == run("mnist") == ""
    written = [np.asarray(Image.open(path)) for path in sorted(Path("data/mnist/digits").iterdir())]
    assert np.array_equal(written, [*images, *images])


def test_toy_faces_depend_on_their_index_alone():
    assert run("toy", "--n_images=2") == run("toy", "--n_images=2") == ""
    assert "2 images already" in run("toy", "--n_images=3")
    assert len(os.listdir("data/toy/img_align_toy")) == 2
    face, again, other = (np.asarray(dd.draw_face(index)) for index in (1, 1, 2))
    assert np.array_equal(face, again) and np.std([face, other], axis=0).mean() > 20
