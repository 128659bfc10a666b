"""Downloads or draws a data set for main.py.

    python3 download_datasets.py celebA             # -> data/celebA/img_align_celeba/000001.jpg ...
    python3 download_datasets.py celebA --zip FILE  # the same, from a zip that is here already
    python3 download_datasets.py mnist              # -> data/mnist/digits/00000.png ...
    python3 download_datasets.py toy                # -> data/toy/img_align_toy/000001.jpg ...

The same command resumes an interrupted download. A data set that is complete is left alone.
"""

import signal

if __name__ == "__main__":
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import fcntl
import functools
import hashlib
import html
import http.client
import io
import itertools
import multiprocessing
import os
import re
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import numpy as np
import requests
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

CELEBA_URL = "https://drive.google.com/uc?export=download&id=0B7EVK8r0v71pZjFTYXZWM3FlRnM"
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
CELEBA_SIZE = 1_443_490_838  # bytes
CELEBA_IMAGES = 202_599
MNIST_IMAGES = 70_000
BY_HAND = "get the zip by hand from http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and use --zip"

TIMEOUT_S = (15, 60)  # to connect, and between two reads
MAX_STALLED = 7  # attempts in a row without a new byte, with pauses of 2, 4, 8 ... seconds


class DownloadError(Exception):
    """A final error, shown as one line. What may pass is a requests.ConnectionError instead."""


# CelebA. torchvision's downloader cannot resume, and Google Drive often breaks off 1.4 GB.


def read_at_least(chunks: Iterator[bytes], size: int) -> bytes:
    """Returns the next `size` bytes or a few more, or what there is until the end."""
    data = b""
    while len(data) < size and (chunk := next(chunks, b"")):
        data += chunk
    return data


def open_zip(url: str, start: int) -> tuple[requests.Response, Iterator[bytes]]:
    """Returns the response with the zip, from byte `start` on if the host can, and its chunks.

    Google Drive first sends a page with a form that confirms the download. Its pages have status
    200, too, so the first bytes tell what a response is.
    """
    # Some hosts compress the response and then ignore Range. The pages should be in English.
    headers = {"Accept-Encoding": "identity", "Accept-Language": "en"}
    if start:
        headers["Range"] = f"bytes={start}-"
    fields = {}
    for _ in range(4):
        response = requests.get(url, fields, headers=headers, stream=True, timeout=TIMEOUT_S)
        status, host = response.status_code, urlsplit(response.url).netloc
        # Small chunks, because a broken connection loses the last, incomplete one.
        chunks = response.iter_content(1 << 12)
        first = read_at_least(chunks, 16)
        if status == 200 and not first:
            raise requests.ConnectionError(f"{host} sends an empty response")
        is_page = re.match(rb"\s*<(!doctype|html)", first, re.I)
        is_rest = start and status in (206, 416) and not is_page
        if is_rest or (status == 200 and first[:2] == b"PK"):
            return response, itertools.chain([first], chunks)
        page = (first + read_at_least(chunks, 1 << 16)).decode("utf-8", "replace")
        if re.search(r"quota exceeded|too many users have (viewed|downloaded)", page, re.I):
            raise DownloadError(f"{host}: the download quota is used up; wait a day, or {BY_HAND}")
        if status == 429 or status >= 500:
            raise requests.ConnectionError(f"{host} answers {status} {response.reason}")
        if status >= 400:
            raise DownloadError(f"{host} answers {status} {response.reason}; {BY_HAND}")
        form = re.search(r"<form[^>]*download.*?</form>", page, re.S)
        if not form:
            break
        tags = [
            {name: html.unescape(value) for name, value in re.findall(r'([\w-]+)="([^"]*)"', tag)}
            for tag in re.findall(r"<(?:form|input)[^>]*>", form[0])
        ]
        url = urljoin(response.url, tags[0].get("action", ""))
        fields = {tag.get("name"): tag.get("value") for tag in tags if tag.get("type") == "hidden"}
    title = re.search(r"<title>([^<]{0,80})", page)
    title = title[1].strip() if title else ""
    raise DownloadError(f"{host} sends a web page ('{title}') in place of the zip; {BY_HAND}")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(url: str, part: Path) -> int | None:
    """Appends to `part` what one response brings. Returns the announced size of the whole file.

    If the response begins at byte 0, the bytes that `part` has are skipped: it never shrinks.
    """
    have = size_of(part)
    response, chunks = open_zip(url, have)
    skip = have if response.status_code == 200 else 0
    span = response.headers.get("Content-Range", "")
    if response.status_code == 206 and not span.startswith(f"bytes {have}-"):
        raise requests.ConnectionError(f"asked for bytes {have}-, the host sends '{span}'")
    total = span.rpartition("/")[2] or response.headers.get("Content-Length", "")
    # A compressed response has another length than the file.
    known = total.isdecimal() and "Content-Encoding" not in response.headers
    # A body without end must not fill the disk.
    limit = 2 * CELEBA_SIZE
    size = min(int(total), limit) if known else None
    if response.status_code == 416:
        chunks = ()
    bar = tqdm(initial=have, total=size, unit="B", unit_scale=True, disable=None)
    with response, bar, part.open("ab") as file:
        for chunk in chunks:
            new = chunk[skip:][: max(0, (size or limit) - file.tell())]
            skip = max(0, skip - len(chunk))
            file.write(new)
            file.flush()
            bar.update(len(new))
            if file.tell() >= (size or limit):
                break
    if size and size_of(part) < size:
        raise requests.ConnectionError(f"the connection ended after {size_of(part):,} bytes")
    return size


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path) -> None:
    """Downloads CelebA's zip to `path`, by way of `path`.part, which the next call continues."""
    part = path.with_name(f"{path.name}.part")
    print(f"downloading {url}, {size_of(part):,} bytes are here")
    stalled = 0
    while True:
        before = size_of(part)
        try:
            total = receive(url, part)
            size, md5 = size_of(part), md5_of(part)
            if md5 == CELEBA_MD5:
                part.rename(path)
                return
            if size == total or size >= CELEBA_SIZE:
                part.unlink()
                raise DownloadError(f"{url} sent another file (MD5 {md5}), now deleted; {BY_HAND}")
            fault = f"the host ended at {size:,} bytes"
        except ValueError as error:
            # An address or a header that cannot be parsed.
            raise DownloadError(f"cannot read {url}: {error}; {BY_HAND}") from error
        except requests.RequestException as error:
            while error.__context__:
                error = error.__context__
            fault = str(error) or type(error).__name__
        stalled = 0 if size_of(part) > before else stalled + 1
        if stalled == MAX_STALLED:
            raise DownloadError(f"no progress ({fault}): run this again later, or {BY_HAND}")
        tqdm.write(f"{fault}; trying again in {2**stalled} s")
        time.sleep(2**stalled)


def get_celeba(data_dir: Path, url: str, zip_path: Path | None) -> None:
    """Writes CelebA's images to `data_dir`/celebA, from the web or from the zip `zip_path`."""
    final = data_dir / "celebA" / "img_align_celeba"
    if already_done(final, CELEBA_IMAGES):
        return
    if zip_path and not zip_path.is_file():
        raise DownloadError(f"--zip {zip_path}: there is no such file")
    if zip_path and (md5 := md5_of(zip_path)) != CELEBA_MD5:
        raise DownloadError(f"--zip {zip_path} is damaged or another file (MD5 {md5}); {BY_HAND}")
    with staging_folder(final) as folder:
        downloaded = folder.with_suffix(".zip")
        # It exists if an earlier run was stopped while it extracted the images.
        if not zip_path and not downloaded.exists():
            download(url, downloaded)
        with zipfile.ZipFile(zip_path or downloaded) as archive:
            pattern = re.compile(r"img_align_celeba/\d{6}\.jpg")
            images = [name for name in archive.namelist() if pattern.fullmatch(name)]
            for name in tqdm(images, "extracting", disable=None):
                (folder / Path(name).name).write_bytes(archive.read(name))


def get_mnist(data_dir: Path, mirror: str | None) -> None:
    """Writes MNIST's images to `data_dir`/mnist: 60,000 for training, then 10,000 for testing."""
    final = data_dir / "mnist" / "digits"
    if already_done(final, MNIST_IMAGES):
        return
    # Imported here, because the other data sets need no PyTorch.
    from torchvision.datasets import MNIST

    if mirror:
        MNIST.mirrors = [f"{mirror.rstrip('/')}/"]
    socket.setdefaulttimeout(TIMEOUT_S[1])
    print(f"downloading MNIST from {MNIST.mirrors[0]}")
    with staging_folder(final) as folder:
        raw, log = folder / "raw", io.StringIO()
        try:
            # torchvision prints several lines for each attempt.
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                parts = [MNIST(raw, train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            advice = "try again later, or another mirror with --url"
            raise DownloadError(f"cannot download MNIST; {advice}: {error}") from error
        shutil.rmtree(raw)
        images = np.concatenate([part.data for part in parts])
        for i, image in enumerate(tqdm(images, "writing", disable=None)):
            Image.fromarray(image).save(folder / f"{i:05d}.png")


SKIN = np.array([(250, 218, 195), (236, 190, 158), (214, 160, 120), (178, 118, 80), (120, 74, 50)])
HAIR = np.array([(30, 25, 26), (70, 45, 32), (128, 82, 46), (214, 176, 110), (180, 176, 174)])


def draw_face(seed: int, index: int) -> Image.Image:
    """Returns face `index` of the set `seed`: 178 x 218 pixels, the eyes where CelebA's are."""
    rng = np.random.default_rng([seed, index])
    uniform = rng.uniform

    def blend(colours):
        i = rng.integers(len(colours) - 1)
        return colours[i] + uniform() * (colours[i + 1] - colours[i])

    skin, hair = blend(SKIN), blend(HAIR)
    x, y = np.linspace(-1, 1, 178)[:, None], np.linspace(-1, 1, 218)[:, None, None]
    wall = uniform(60, 200) + rng.normal(0, 22, 3) + uniform(-40, 40, 3) * y + uniform(-20, 20) * x
    light = uniform(0.8, 1.05) + uniform(-0.25, 0.25) * x - uniform(0, 0.15) * y
    # Colours at twice the size. Soft shadows (below 128) and highlights are a layer of their own.
    page = Image.fromarray(wall.clip(0, 255).astype(np.uint8)).resize((356, 436))
    shade = Image.new("L", (89, 109), 128)
    tilt, middle = rng.normal(0, 0.06), (89, 111) + rng.normal(0, 1.5, 2)
    spin = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))])

    def oval(x, y, rx, ry, colour, start=0, stop=360, on=page):
        """Fills an ellipse or a part of it. Positions count from the middle between the eyes."""
        angle = np.radians(np.linspace(start, stop, 40))
        points = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1) @ spin + middle
        fill = colour if on is shade else tuple(np.clip(colour, 0, 255).astype(int).tolist())
        ImageDraw.Draw(on).polygon((points * on.width / 178).ravel().tolist(), fill)

    wide, chin, turn, mane = uniform(42, 48), uniform(62, 70), rng.normal(0, 3.5), uniform(30, 100)
    # Long hair, shoulders and neck.
    if mane > 65:
        oval(0, mane - 66, wide + uniform(5, 13), mane, 0.65 * hair)
    oval(0, 150, uniform(80, 105), uniform(58, 68), uniform(40, 220, 3))
    oval(0, 70, uniform(24, 30), 38, 0.85 * skin)
    oval(0, 72, 22, 15, 98, on=shade)
    # Ears, chin, and a beard that leaves the cheeks free.
    for side in (-wide, wide):
        oval(side - 0.5 * turn, 8, 7, 12, 0.92 * skin)
    oval(0, 0, wide, chin, skin, 0, 180)
    if mane < 42:
        oval(0, 0, wide, chin + 1, skin + uniform(0.3, 0.9) * (hair - skin), 5, 175)
        for side in (-17, 17):
            oval(turn + side, 12, 20, 22, skin)
    # Hair and forehead.
    oval(0, -6, wide + uniform(1, 5), uniform(52, 60), hair, 175, 365)
    forehead = rng.choice([uniform(20, 28), uniform(34, 43)], p=[0.25, 0.75])
    oval(0.6 * turn + uniform(-6, 6), 0, wide - 3, forehead, skin, 178, 362)
    oval(0, -48, 22, 7, 148, on=shade)
    # Glasses, eyes and brows.
    look, lid, brow = rng.normal(0, 1), uniform(3.6, 5.6), uniform(-12, -8)
    iris, glasses = uniform(30, 110, 3), uniform() < 0.2
    for x in (turn - 20, turn + 20):
        if glasses:
            oval(x, 1, 16, 13, 0.4 * hair)
            oval(x, 1, 14, 11, skin)
        oval(x, 0, 14, 9, 112, on=shade)
        oval(x, 0, 10, lid + 1.5, 0.45 * skin, 180, 360)
        oval(x, 0, 9.5, lid, (238, 234, 230))
        oval(x + look, 0, 4.6, min(4.6, lid), iris)
        oval(x + look, 0, 2.2, 2.4, (14, 12, 14))
        oval(x, brow, 12, uniform(4.5, 6.5), 0.6 * hair, 190, 350)
        oval(x, brow + 2.5, 12, 4.5, skin, 180, 360)
    # Nose and mouth. What is nearer to the viewer moves more when the head turns.
    nose = 1.8 * turn
    oval(nose + 4 * np.sign(turn), 12, 5, 14, 112, on=shade)
    oval(nose, 12, 3, 8, 150, on=shade)
    oval(nose, 19, uniform(7, 10), 6, 0.78 * skin, 10, 170)
    oval(nose, 17.5, 6.5, 5.5, skin)
    smile, lips = uniform(-0.3, 1), uniform(0.45, 0.75) * skin * (1.3, 0.9, 0.9)
    x, y, mouth = 1.3 * turn, 41 - 4 * smile, uniform(13, 18) + 3 * smile
    curve = max(0.5, 4 * smile)
    teeth = max(0, uniform(-4, 9)) if smile > 0.2 else 0
    oval(x, y, mouth, 4 + curve + teeth, lips, 0, 180)
    oval(x, y + 1, mouth, 4, lips, 180, 360)
    oval(x, y + 0.5, 0.85 * mouth, curve + teeth, (244, 240, 234) if teeth else 0.6 * lips, 0, 180)
    oval(x, y - 0.8, 0.85 * mouth, curve, lips, 0, 180)
    shade = np.asarray(shade.filter(ImageFilter.GaussianBlur(2)).resize((178, 218)))[..., None]
    pixels = np.asarray(page.reduce(2)) * light * (shade / 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_face(folder: Path, seed: int, index: int) -> None:
    draw_face(seed, index).save(folder / f"{index:06d}.jpg", quality=92)


def get_toy(data_dir: Path, seed: int, n_images: int) -> None:
    """Writes `n_images` toy faces to `data_dir`/toy. The seed alone decides what they look like."""
    final = data_dir / "toy" / "img_align_toy"
    if already_done(final, n_images, str(seed)):
        return
    with staging_folder(final) as folder:
        # The workers inherit the blocked signal: Ctrl-C is for this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with multiprocessing.Pool() as pool:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            save = functools.partial(save_face, folder, seed)
            saved = pool.imap_unordered(save, range(1, n_images + 1), chunksize=8)
            for _ in tqdm(saved, "drawing", n_images, disable=None):
                pass
        (folder / ".seed").write_text(str(seed))


def already_done(final: Path, n_images: int, seed: str = "") -> bool:
    """Returns whether the folder `final` is there. Raises DownloadError if it has other images."""
    if not final.exists():
        return False
    count = sum(name.endswith((".jpg", ".png")) for name in os.listdir(final))
    note = final / ".seed"
    if count != n_images or (note.read_bytes() if note.exists() else b"") != seed.encode():
        raise DownloadError(f"{final} is another set ({count} images): remove it or set --data_dir")
    print(f"{final} has its {count} images already")
    return True


@contextlib.contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `final` when the body has succeeded.

    A lock keeps other processes out. main.py ignores the hidden folder around it.
    """
    hidden = final.parent / ".partial"
    folder = hidden / final.name
    hidden.mkdir(parents=True, exist_ok=True)
    with (hidden / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = f"process {lock.read()} is at work in {final.parent}"
            raise DownloadError(f"{holder}: wait for it, or set --data_dir") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        # A killed run leaves its folder.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            folder.rename(final)
            shutil.rmtree(hidden)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{final} has its images: python3 main.py --dataroot={final.parent}")


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"download_datasets.py: error: {message} (see --help)\n")


def parse_args() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    sets = parser.add_subparsers(dest="dataset", required=True, metavar="{celebA,mnist,toy}")
    celeba = sets.add_parser("celebA", help="202,599 photographs of faces, 1.4 GB")
    source = celeba.add_mutually_exclusive_group()
    source.add_argument("--url", default=CELEBA_URL, help="another address of the zip")
    source.add_argument("--zip", type=Path, metavar="FILE", help="a copy of img_align_celeba.zip")
    mnist = sets.add_parser("mnist", help="70,000 handwritten digits, 11 MB")
    mnist.add_argument("--url", help="a mirror: the folder that has the four .gz files")
    toy = sets.add_parser("toy", help="drawn faces of CelebA's size, without a network")
    toy.add_argument("--seed", type=int, default=0, help="which faces, 0 or more (default: 0)")
    toy.add_argument("--n_images", type=int, default=4000, help="1 to 999999 (default: 4000)")
    for one in (celeba, mnist, toy):
        one.add_argument("--data_dir", type=Path, default="data", help="(default: data)")
    args = parser.parse_args()
    if args.dataset == "toy" and (args.seed < 0 or not 1 <= args.n_images <= 999_999):
        parser.error("--seed must be 0 or more, and --n_images 1 to 999999")
    return args


def interrupt(*_: object) -> None:
    """Ends the program at once. A run may be stopped at any moment, and the next one continues."""
    signal.signal(signal.SIGINT, lambda *_: None)
    for worker in multiprocessing.active_children():
        worker.kill()
    os.write(2, b"\ninterrupted: run the same command again to continue\n")
    os._exit(130)


def main() -> int:
    """Runs the command line. Returns the exit status."""
    args = parse_args()
    try:
        if args.dataset == "celebA":
            get_celeba(args.data_dir, args.url, args.zip)
        elif args.dataset == "mnist":
            get_mnist(args.data_dir, args.url)
        else:
            get_toy(args.data_dir, args.seed, args.n_images)
        return 0
    except DownloadError as error:
        message = str(error)
    except OSError as error:
        fault = f"{error.filename or args.data_dir}: {error.strerror or error}"
        message = f"{fault}; make room, or set --data_dir to a folder that you may write to"
    print(f"download_datasets.py: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    # Either is None if the shell has closed it.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGINT, interrupt)
    sys.exit(main())
