"""Downloads or draws a data set for main.py.

    python3 download_datasets.py celebA             # -> data/celebA/img_align_celeba/
    python3 download_datasets.py celebA --zip FILE  # the same, from a copy of the zip
    python3 download_datasets.py mnist              # -> data/mnist/digits/
    python3 download_datasets.py toy                # -> data/toy/img_align_toy/

The same command resumes an interrupted download. A complete data set is left alone.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import numpy as np
import requests
import urllib3
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm, trange

try:
    import fcntl
except ImportError:
    sys.exit("download_datasets.py needs Linux, macOS or WSL")

CELEBA_URL = "https://drive.google.com/uc?export=download&id=0B7EVK8r0v71pZjFTYXZWM3FlRnM"
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
CELEBA_SIZE = 1_443_490_838  # bytes
CELEBA_IMAGES = 202_599
MNIST_IMAGES = 70_000
BY_HAND = "get the zip from http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and use --zip"
UNPACKED = "images unpacked into FOLDER/images/ need no zip: main.py --dataroot=FOLDER"

TIMEOUT_S = (15, 60)  # to connect, and between two reads
MAX_STALLED = 7  # attempts without a new byte, with pauses of 2, 4, 8 ... seconds

SKIN = np.array([(250, 218, 195), (236, 190, 158), (214, 160, 120), (178, 118, 80), (120, 74, 50)])
HAIR = np.array([(30, 25, 26), (70, 45, 32), (104, 60, 34), (214, 176, 110), (180, 176, 174)])


def open_zip(url: str, start: int) -> requests.Response:
    """Returns the response with the zip, from byte `start` on if the host can.

    Google Drive first sends a page whose form confirms the download. Raises an error of
    requests or urllib3 if another attempt may succeed, and OSError or ValueError if not.
    """
    # Some hosts ignore Range where they compress. Pages should be in English.
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity", "Accept-Language": "en"}
    fields = {}
    for _ in range(4):
        response = requests.get(url, fields, headers=headers, stream=True, timeout=TIMEOUT_S)
        host, status = urlsplit(response.url).netloc, response.status_code
        answer = f"{status} {response.reason}, {response.headers.get('Content-Type')}"
        # Google Drive's pages have status 200, too.
        if status < 400 and "text/html" not in answer:
            return response
        # At most a megabyte, because a page may have no end.
        page = response.raw.read(1 << 20, decode_content=True).decode(errors="replace")
        page = page.replace("&amp;", "&")
        if re.search("quota exceeded|too many users have", page, re.I):
            raise OSError(f"{host}: the download quota is used up; wait a day, or {BY_HAND}")
        if status == 429 or status >= 500:
            raise requests.ConnectionError(f"{host} answers {answer}")
        # One search for all of a form takes minutes on a page that opens many and closes none.
        form = page.partition("</form>")[0].rpartition("<form")[2]
        action = re.search(' action="([^"]*)"', form)
        if not action or "download" not in action[1]:
            break
        url = urljoin(response.url, action[1])
        fields = dict(re.findall('name="([^"]*)" value="([^"]*)"', form))
    raise OSError(f"{host} sends no zip ({answer}); {BY_HAND}")


def receive(url: str, file: io.BufferedRandom) -> None:
    """Appends to the file what one response brings. Raises what open_zip does."""
    have = file.tell()
    response = open_zip(url, have)
    resumes, span = response.status_code == 206, response.headers.get("Content-Range", "")
    if resumes and not span.startswith(f"bytes {have}-"):
        raise requests.ConnectionError(f"asked for bytes {have}-, the host sends '{span}'")
    size = span.rpartition("/")[2] or response.headers.get("Content-Length", "")
    if size.isdecimal() and int(size) != CELEBA_SIZE:
        raise OSError(f"{url} is another file, of {int(size):,} bytes; {BY_HAND}")
    # A host that cannot resume begins with the bytes that are here.
    skip = 0 if resumes else have
    # Small chunks, because a broken connection loses the last one.
    chunks = response.iter_content(1 << 12)
    bar = tqdm(initial=have, total=CELEBA_SIZE, unit="B", unit_scale=True, disable=None)
    with response, bar:
        while file.tell() < CELEBA_SIZE and (chunk := next(chunks, b"")):
            if file.tell() == skip and not b"PK".startswith(chunk[:2]):  # byte 0
                raise OSError(f"{url} is not a zip; {BY_HAND}")
            new = chunk[skip:][: CELEBA_SIZE - file.tell()]
            skip -= len(chunk) - len(new)
            file.write(new)
            file.flush()
            bar.update(len(new))
    if file.tell() < CELEBA_SIZE:
        raise requests.ConnectionError(f"the connection ended after {file.tell():,} bytes")


def download(url: str, path: Path) -> None:
    """Downloads CelebA's zip to `path`, after the bytes that an earlier call left there.

    torchvision's downloader cannot resume, and Google Drive often breaks off 1.4 GB. Raises
    OSError if the host has no such zip, or sends nothing new for two minutes.
    """
    stalled, digest = 0, hashlib.md5(usedforsecurity=False)
    with path.open("a+b") as file:
        print(f"downloading {url}, {file.tell():,} bytes are here")
        while (have := file.tell()) < CELEBA_SIZE:
            try:
                receive(url, file)
            except ValueError as error:  # an address or a header that cannot be parsed
                raise OSError(f"cannot read {url}: {error}; {BY_HAND}") from error
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                while error.__context__:
                    error = error.__context__
                stalled = 0 if file.tell() > have else stalled + 1
                if stalled == MAX_STALLED:
                    raise OSError(f"no progress ({error}); wait, or {BY_HAND}") from error
                print(f"{error}; trying again in {2**stalled} s")
                time.sleep(2**stalled)
        file.seek(0)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != CELEBA_MD5:
        path.unlink()
        raise OSError(f"{url} is not CelebA's zip (MD5 {digest.hexdigest()}); {BY_HAND}")


def extract(path: Path, folder: Path) -> None:
    """Writes a zip's images to the folder. Raises OSError unless they are CelebA's."""
    names = [f"{i:06d}.jpg" for i in range(1, CELEBA_IMAGES + 1)]
    try:
        with zipfile.ZipFile(path) as archive:
            images = [name for name in archive.namelist() if re.search(r"(^|/)\d{6}\.jpg$", name)]
            fault = f"has {len(images):,} images like 000001.jpg and not CelebA's {CELEBA_IMAGES:,}"
            if sorted(image[-10:] for image in images) == names:
                for image in tqdm(images, "extracting", disable=None):
                    (folder / image[-10:]).write_bytes(archive.read(image))
                return
    except OSError:
        raise
    except Exception as error:  # zipfile raises many kinds
        fault = f"is no zip, or a damaged one ({error}); 7z archives must be unpacked by hand"
    raise OSError(f"{path} {fault}; {UNPACKED}")


def get_celeba(data_dir: Path, url: str, file: Path | None) -> None:
    """Writes CelebA's images to `data_dir`/celebA, from the web or from the zip `file`."""
    final = data_dir / "celebA" / "img_align_celeba"
    if already_done(final, CELEBA_IMAGES):
        return
    with staging_folder(final) as folder:
        if not file:
            file = folder.with_suffix(".zip.part")
            download(url, file)
        extract(file, folder)


def get_mnist(data_dir: Path, url: str | None) -> None:
    """Writes MNIST's images to `data_dir`/mnist. The last 10,000 are those for testing."""
    final = data_dir / "mnist" / "digits"
    if already_done(final, MNIST_IMAGES):
        return
    with staging_folder(final) as folder:
        # Imported here, because the other data sets need no PyTorch.
        from torchvision.datasets import MNIST

        if url:
            MNIST.mirrors = [f"{url.rstrip('/')}/"]
        socket.setdefaulttimeout(TIMEOUT_S[1])
        print(f"downloading MNIST from {MNIST.mirrors[0]}")
        raw, log = folder / "raw", io.StringIO()
        try:
            # torchvision prints several lines for each attempt, and raises what it meets.
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                parts = [MNIST(raw, train, download=True) for train in (True, False)]
        except Exception as error:
            raise OSError(f"no MNIST: {error}; try later, or another --url") from error
        shutil.rmtree(raw)
        images = np.concatenate([part.data for part in parts])
        for i, image in enumerate(tqdm(images, "writing", disable=None)):
            Image.fromarray(image).save(folder / f"{i:05d}.png")


def draw_face(index: int) -> Image.Image:
    """Returns a face, 178 x 218, the eyes where CelebA's are. It depends on the index alone."""
    rng = np.random.default_rng([0, index])
    uniform = rng.uniform
    skin, hair = (rng.choice(tones) * uniform(0.85, 1.05) for tones in (SKIN, HAIR))
    wall = uniform(60, 200) + rng.normal(0, 22, 3) + rng.normal(0, 16, (2, 2, 3))
    light = uniform(0.8, 1.05) + uniform(-0.25, 0.25) * np.linspace(-1, 1, 178)[:, None]
    # Colours, at twice the size; then soft shadows (below 128) and highlights.
    page = Image.fromarray(wall.clip(0, 255).astype(np.uint8)).resize((356, 436))
    shade = Image.new("L", (89, 109), 128)
    tilt, middle = rng.normal(0, 0.06), (89, 111) + rng.normal(0, 1.5, 2)
    spin = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))])

    def oval(x, y, rx, ry, colour, start=0, stop=360, on=page):
        """Fills an ellipse or a part of it. The origin is between the eyes."""
        angle = np.radians(np.linspace(start, stop, 40))
        points = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1) @ spin + middle
        points *= on.width / 178
        ImageDraw.Draw(on).polygon(points.ravel().tolist(), tuple(map(int, np.ravel(colour))))

    wide, turn, mane = uniform(42, 48), rng.normal(0, 3.5), uniform(30, 100)
    # Long hair, shoulders and neck.
    if mane > 65:
        oval(0, mane - 66, wide + uniform(5, 13), mane, 0.65 * hair)
    oval(0, 150, uniform(80, 105), 63, uniform(40, 220, 3))
    oval(0, 70, 27, 38, 0.85 * skin)
    oval(0, 72, 22, 15, 98, on=shade)
    # Ears, chin, and a beard that leaves the cheeks free.
    beard = skin + uniform(0.3, 0.9) * (hair - skin) if mane < 42 else skin
    for side in (-wide, wide):
        oval(side - 0.5 * turn, 8, 7, 12, 0.92 * skin)
    oval(0, 0, wide, uniform(62, 70), beard, 0, 180)
    for side in (-17, 17):
        oval(turn + side, 12, 20, 22, skin)
    # Hair and forehead.
    oval(0, -6, wide + uniform(1, 5), uniform(52, 60), hair, 175, 365)
    oval(0.6 * turn + uniform(-6, 6), 0, wide - 3, uniform(22, 43), skin, 178, 362)
    oval(0, -48, 22, 7, 148, on=shade)
    # Eyes, glasses and brows.
    look, lid, brow = rng.normal(0, 1), uniform(3.6, 5.6), uniform(-12, -8)
    white, iris = (240, 237, 232), uniform(30, 110, 3)
    frame = 0.4 * hair if uniform() < 0.2 else skin
    for x in (turn - 20, turn + 20):
        oval(x, 1, 16, 13, frame)
        oval(x, 1, 14, 11, skin)
        oval(x, 0, 14, 9, 112, on=shade)
        oval(x, 0, 10, lid + 1.5, 0.45 * skin, 180, 360)
        oval(x, 0, 9.5, lid, white)
        oval(x + look, 0, 4.6, min(4.6, lid), iris)
        oval(x + look, 0, 2.2, 2.4, (14, 12, 14))
        oval(x, brow, 12, uniform(4.5, 6.5), 0.6 * hair, 190, 350)
        oval(x, brow + 2.5, 12, 4.5, skin, 180, 360)
    # Nose and mouth: what is nearer moves more when the head turns.
    nose, x, y = 1.8 * turn, 1.3 * turn, 41 - 4 * (smile := uniform(-0.3, 1))
    oval(nose + 4 * np.sign(turn), 12, 5, 14, 112, on=shade)
    oval(nose, 12, 3, 8, 150, on=shade)
    oval(nose, 19, uniform(7, 10), 6, 0.78 * skin, 10, 170)
    oval(nose, 17.5, 6.5, 5.5, skin)
    lips, mouth = uniform(0.45, 0.75) * skin * (1.3, 0.9, 0.9), uniform(13, 18) + 3 * smile
    curve, teeth = max(0.5, 4 * smile), max(0, uniform(-4, 9)) if smile > 0.2 else 0
    oval(x, y, mouth, 4 + curve + teeth, lips, 0, 180)
    oval(x, y + 1, mouth, 4, lips, 180, 360)
    oval(x, y + 0.5, 0.85 * mouth, curve + teeth, white if teeth else 0.6 * lips, 0, 180)
    oval(x, y - 0.8, 0.85 * mouth, curve, lips, 0, 180)
    shade = shade.filter(ImageFilter.GaussianBlur(2)).resize((178, 218))
    pixels = np.asarray(page.reduce(2)) * light * (np.asarray(shade)[..., None] / 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def get_toy(data_dir: Path, n_images: int) -> None:
    """Writes `n_images` toy faces to `data_dir`/toy, always the same ones."""
    final = data_dir / "toy" / "img_align_toy"
    if already_done(final, n_images):
        return
    with staging_folder(final) as folder:
        for index in trange(1, n_images + 1, desc="drawing", disable=None):
            draw_face(index).save(folder / f"{index:06d}.jpg", quality=92)


def already_done(final: Path, n_images: int) -> bool:
    """Returns whether `final` is there. Raises OSError if it has other images."""
    if not final.exists():
        return False
    count = sum(name.endswith((".jpg", ".png")) for name in os.listdir(final))
    if count != n_images:
        raise OSError(f"{final} has other images ({count}): remove it or set --data_dir")
    print(f"{final} has its {count} images already")
    return True


@contextlib.contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `final` when the body has succeeded.

    Raises OSError if another process is at it. main.py ignores hidden folders.
    """
    hidden = final.parent / ".partial"
    folder = hidden / final.name
    hidden.mkdir(parents=True, exist_ok=True)
    with (hidden / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise OSError(f"another process works in {hidden}: wait for it") from None
        # A run that ended early leaves its folder.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        folder.rename(final)
        shutil.rmtree(hidden)
    print(f"{final} has its images: python3 main.py --dataroot={final.parent}")


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"download_datasets.py: error: {message} (see --help)\n")


def parse_args() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = OneLineParser(description="Downloads or draws a data set for main.py.")
    sets = parser.add_subparsers(dest="dataset", required=True, metavar="{celebA,mnist,toy}")
    celeba = sets.add_parser("celebA", help="202,599 photographs of faces, 1.4 GB")
    source = celeba.add_mutually_exclusive_group()
    source.add_argument("--url", default=CELEBA_URL, help="another address of the zip")
    source.add_argument("--zip", type=Path, dest="file", help="a copy of the zip, or Kaggle's")
    mnist = sets.add_parser("mnist", help="70,000 handwritten digits, 11 MB")
    mnist.add_argument("--url", help="a mirror: the folder of the four .gz files")
    toy = sets.add_parser("toy", help="drawn faces of CelebA's size, without a network")
    toy.add_argument("--n_images", type=int, default=4000, help="1 to 999999 (default: 4000)")
    for one in (celeba, mnist, toy):
        one.add_argument("--data_dir", type=Path, default="data", help="(default: data)")
    options = parser.parse_args()
    if options.dataset == "toy" and not 0 < options.n_images < 10**6:
        parser.error("--n_images must be 1 to 999999")
    return options


def interrupt(*_: object) -> None:
    """Ends the program at once: the next run continues from any moment."""
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted: run the same command again to continue\n")
    os._exit(130)


def main() -> None:
    """Runs the command line."""
    options = vars(parse_args())
    get = {"celebA": get_celeba, "mnist": get_mnist, "toy": get_toy}[options.pop("dataset")]
    try:
        get(**options)
    except OSError as error:
        message = str(error)
        if error.errno:  # the system's; those of this file and of requests have none
            message = f"{error.filename or options['data_dir']}: {error.strerror}"
        sys.exit(f"download_datasets.py: error: {' '.join(message.split())}")


if __name__ == "__main__":
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (the shell has closed it)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGINT, interrupt)
    main()
