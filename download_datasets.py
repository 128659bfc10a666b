"""Downloads or draws a data set for main.py.

    python3 download_datasets.py celebA             # -> data/celebA/img_align_celeba/
    python3 download_datasets.py celebA --zip FILE  # the same, from a copy of the zip
    python3 download_datasets.py mnist              # -> data/mnist/digits/
    python3 download_datasets.py toy                # -> data/toy/img_align_toy/

The same command resumes an interrupted download of CelebA. A complete data set is left alone.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import requests
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm, trange

# Google Drive sends a page in place of a large file unless the address has `confirm`.
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
CELEBA_URL = f"{DRIVE}0B7EVK8r0v71pZjFTYXZWM3FlRnM"
CELEBA_BYTES = 1_443_490_838
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
CELEBA_IMAGES = 202_599

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
MNIST_FILES = [
    ("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    ("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
]
MNIST_IMAGES = 70_000

TIMEOUT_S = 60
MAX_TRIES = 20
PAUSE_S = 5
WRONG = (requests.exceptions.ProxyError, requests.exceptions.InvalidSchema)
WRONG += (requests.exceptions.InvalidURL,)  # the address, or that of a proxy
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

SKIN = np.array([(250, 218, 195), (236, 190, 158), (214, 160, 120), (178, 118, 80), (120, 74, 50)])
HAIR = np.array([(30, 25, 26), (70, 45, 32), (104, 60, 34), (214, 176, 110), (180, 176, 174)])


def cause(error: BaseException) -> BaseException:
    """Returns the innermost error: requests wraps it in others, which say less."""
    while error.__context__:
        error = error.__context__
    return error


def receive(url: str, n_bytes: int, path: Path) -> None:
    """Appends to `path` what one response brings.

    Raises one of BROKEN if another try may succeed, and another OSError if not.
    """
    start = path.stat().st_size
    # Some hosts ignore Range where they compress.
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except requests.exceptions.SSLError as error:
        hint = "if your network has certificates of its own, set REQUESTS_CA_BUNDLE to their file"
        raise OSError(f"{url}: {cause(error)}; {hint}") from error
    except WRONG as error:
        hint = "check the address, and the proxy in HTTPS_PROXY or ALL_PROXY"
        raise OSError(f"{url}: {cause(error)}; {hint}") from error
    answer = f"{response.status_code} {response.reason}, {response.headers.get('Content-Type')}"
    # Google Drive says by a page, with status 200, that a quota is used up.
    if response.status_code >= 400 or "text/html" in answer:
        raise OSError(f"{url} sends no file but '{answer}'; a quota of the day may be used up")
    if response.status_code != 206:  # a host that cannot resume sends the whole file
        start = 0
    total = start + int(response.headers.get("Content-Length", n_bytes - start))
    if total != n_bytes:
        raise OSError(f"{url} is another file, of {total:,} bytes")
    bar = tqdm(initial=start, total=n_bytes, unit="B", unit_scale=True, disable=None)
    with response, bar, path.open("ab" if start else "wb") as file:
        for chunk in response.iter_content(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))
        if file.tell() < n_bytes:
            raise requests.ConnectionError(f"the connection ended after {file.tell():,} bytes")


def download(url: str, n_bytes: int, md5: str, path: Path) -> None:
    """Downloads a file to `path`, after the bytes that an earlier call left there.

    Raises OSError if the host has no such file, or if the connection breaks MAX_TRIES times.
    """
    print(f"downloading {url}", flush=True)
    path.touch()
    tries = 0
    # Its size tells whether a file is complete, since a broken connection may look like its end.
    while path.stat().st_size < n_bytes:
        try:
            receive(url, n_bytes, path)
        except BROKEN as error:
            tries += 1
            if tries == MAX_TRIES or isinstance(cause(error), socket.gaierror):
                raise OSError(f"{url}: {cause(error)}; try again later") from error
            print(f"{cause(error)}; trying again in {PAUSE_S} s", flush=True)
            time.sleep(PAUSE_S)
    # The file is mapped, because it may not fit into memory.
    found = hashlib.md5(np.memmap(path, mode="r"), usedforsecurity=False).hexdigest()
    if found != md5:
        path.unlink()
        raise OSError(f"{url} is another file, of MD5 {found}")


def extract(path: Path, folder: Path) -> None:
    """Writes CelebA's images in a zip to the folder. Raises OSError unless all are there."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.rpartition("/")[2]: member for member in archive.namelist()}
            for i in trange(1, CELEBA_IMAGES + 1, desc="extracting", disable=None):
                name = f"{i:06d}.jpg"
                if name not in members:
                    raise OSError(f"{path} has no {name}: it is not CelebA's img_align_celeba.zip")
                (folder / name).write_bytes(archive.read(members[name]))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{path}: {error}; unpack a 7z archive by hand") from error


def get_celeba(data_dir: Path, url: str, file: Path | None) -> None:
    """Writes CelebA's images, of `file` or the web, to `data_dir`. Raises OSError if it fails."""
    final = data_dir / "celebA" / "img_align_celeba"
    if is_complete(final, CELEBA_IMAGES):
        return
    part = final.with_suffix(".zip.part")
    if not file:
        print("if this fails, get the zip from mmlab.ie.cuhk.edu.hk/projects/CelebA.html for --zip")
        part.parent.mkdir(parents=True, exist_ok=True)
        download(url, CELEBA_BYTES, CELEBA_MD5, part)
    with staging_folder(final) as folder:
        extract(file or part, folder)
    part.unlink(missing_ok=True)


def get_mnist(data_dir: Path) -> None:
    """Writes MNIST's images, the 10,000 for testing last. Raises OSError if it fails."""
    final = data_dir / "mnist" / "digits"
    if is_complete(final, MNIST_IMAGES):
        return
    with staging_folder(final) as folder:
        pixels = b""
        for name, n_bytes, md5 in MNIST_FILES:
            path = folder.parent / name
            download(f"{MNIST_URL}/{name}", n_bytes, md5, path)
            pixels += gzip.decompress(path.read_bytes())[16:]  # the header tells the shape
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        for i, image in enumerate(tqdm(images, "writing", disable=None)):
            Image.fromarray(image).save(folder / f"{i:05d}.png")


def draw_face(index: int) -> Image.Image:
    """Returns a face, 178 x 218, the eyes where CelebA's are. It depends on the index alone."""
    rng = np.random.default_rng([0, index])
    uniform = rng.uniform
    skin, hair = (rng.choice(tones) * uniform(0.85, 1.05) for tones in (SKIN, HAIR))
    wall = uniform(60, 200) + rng.normal(0, 22, 3) + rng.normal(0, 16, (2, 2, 3))
    light = uniform(0.8, 1.05) + uniform(-0.25, 0.25) * np.linspace(-1, 1, 178)[:, None]
    # Edges are smooth because shapes are drawn at twice the size. Shadows (below 128) and
    # highlights are drawn apart, because they are blurred.
    page = Image.fromarray(wall.clip(0, 255).astype(np.uint8)).resize((356, 436))
    shade = Image.new("L", (89, 109), 128)
    tilt = rng.normal(0, 0.06)
    middle = (89, 111) + rng.normal(0, 1.5, 2)
    spin = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))])

    def oval(x, y, rx, ry, colour, start=0, stop=360, on=page):
        """Fills an ellipse or a part of it. The origin is between the eyes."""
        angle = np.radians(np.linspace(start, stop, 40))
        points = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1) @ spin + middle
        points *= on.width / 178
        ImageDraw.Draw(on).polygon(points.ravel().tolist(), tuple(map(int, np.ravel(colour))))

    wide = uniform(42, 48)
    turn = rng.normal(0, 3.5)
    mane = uniform(30, 100)
    # Long hair comes first, since it lies behind shoulders and neck.
    if mane > 65:
        oval(0, mane - 66, wide + uniform(5, 13), mane, 0.65 * hair)
    oval(0, 150, uniform(80, 105), 63, uniform(40, 220, 3))
    oval(0, 70, 27, 38, 0.85 * skin)
    oval(0, 72, 22, 15, 98, on=shade)
    # The cheeks are drawn over the chin, so a beard leaves them free.
    beard = skin + uniform(0.3, 0.9) * (hair - skin) if mane < 42 else skin
    for side in (-wide, wide):
        oval(side - 0.5 * turn, 8, 7, 12, 0.92 * skin)
    oval(0, 0, wide, uniform(62, 70), beard, 0, 180)
    for side in (-17, 17):
        oval(turn + side, 12, 20, 22, skin)
    # The forehead covers the hair, so their border is the hairline.
    oval(0, -6, wide + uniform(1, 5), uniform(52, 60), hair, 175, 365)
    oval(0.6 * turn + uniform(-6, 6), 0, wide - 3, uniform(22, 43), skin, 178, 362)
    oval(0, -48, 22, 7, 148, on=shade)
    # Skin covers the lower half of each brow, which leaves an arc.
    look = rng.normal(0, 1)
    lid = uniform(3.6, 5.6)
    brow = uniform(-12, -8)
    iris = uniform(30, 110, 3)
    white = (240, 237, 232)
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
    # The nose moves more than the mouth when the head turns, because it is nearer.
    smile = uniform(-0.3, 1)
    nose = 1.8 * turn
    x, y = 1.3 * turn, 41 - 4 * smile
    oval(nose + 4 * np.sign(turn), 12, 5, 14, 112, on=shade)
    oval(nose, 12, 3, 8, 150, on=shade)
    oval(nose, 19, uniform(7, 10), 6, 0.78 * skin, 10, 170)
    oval(nose, 17.5, 6.5, 5.5, skin)
    lips = uniform(0.45, 0.75) * skin * (1.3, 0.9, 0.9)
    mouth = uniform(13, 18) + 3 * smile
    curve = max(0.5, 4 * smile)
    teeth = max(0, uniform(-4, 9)) if smile > 0.2 else 0
    oval(x, y, mouth, 4 + curve + teeth, lips, 0, 180)
    oval(x, y + 1, mouth, 4, lips, 180, 360)
    oval(x, y + 0.5, 0.85 * mouth, curve + teeth, white if teeth else 0.6 * lips, 0, 180)
    oval(x, y - 0.8, 0.85 * mouth, curve, lips, 0, 180)
    shade = shade.filter(ImageFilter.GaussianBlur(2)).resize((178, 218))
    pixels = np.asarray(page.reduce(2)) * light * (np.asarray(shade)[..., None] / 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def get_toy(data_dir: Path, n_images: int) -> None:
    """Writes toy faces, always the same ones. Raises OSError if it fails."""
    final = data_dir / "toy" / "img_align_toy"
    if is_complete(final, n_images):
        return
    with staging_folder(final) as folder:
        for index in trange(1, n_images + 1, desc="drawing", disable=None):
            draw_face(index).save(folder / f"{index:06d}.jpg", quality=92)


def is_complete(final: Path, n_images: int) -> bool:
    """Returns whether `final` is there. Raises OSError if it has another number of images."""
    if not final.exists():
        return False
    count = sum(name.endswith((".jpg", ".png")) for name in os.listdir(final))
    if count != n_images:
        raise OSError(f"{final} has {count} images already: remove it or set --data_dir")
    print(f"{final} has its {count} images already")
    return True


@contextlib.contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `final` if the body succeeds, and goes if not."""
    final.parent.mkdir(parents=True, exist_ok=True)
    # The name is hidden, because main.py ignores hidden folders.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=final.parent) as temporary:
        folder = Path(temporary, final.name)
        folder.mkdir()
        yield folder
        folder.rename(final)
    print(f"{final} has its images: python3 main.py --dataroot={final.parent}")


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"download_datasets.py: error: {message} (see --help)\n")


def parse_args() -> argparse.Namespace:
    """Returns the options of the command line. A mistake in them ends the program, status 2."""
    parser = OneLineParser(description="Downloads or draws a data set for main.py.")
    sets = parser.add_subparsers(dest="dataset", required=True, metavar="{celebA,mnist,toy}")
    celeba = sets.add_parser("celebA", help="202,599 photographs of faces, 1.4 GB")
    source = celeba.add_mutually_exclusive_group()
    source.add_argument("--url", default=CELEBA_URL, help="another address of the zip")
    source.add_argument("--zip", type=Path, dest="file", help="a copy of the zip, or Kaggle's")
    mnist = sets.add_parser("mnist", help="70,000 handwritten digits, 11 MB")
    toy = sets.add_parser("toy", help="drawn faces of CelebA's size, without a network")
    toy.add_argument("--n_images", type=int, default=4000, help="(default: 4000)")
    for one in (celeba, mnist, toy):
        one.add_argument("--data_dir", type=Path, default="data", help="(default: data)")
    options = parser.parse_args()
    if options.dataset == "toy" and options.n_images < 1:
        parser.error("--n_images must be 1 or more")
    return options


def main() -> None:
    """Runs the command line. An error ends the program with one line, status 1."""
    options = vars(parse_args())
    get = {"celebA": get_celeba, "mnist": get_mnist, "toy": get_toy}[options.pop("dataset")]
    try:
        get(**options)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: run the same command again to continue")
    except OSError as error:
        sys.exit(f"download_datasets.py: error: {error}")


if __name__ == "__main__":
    main()
