"""Put a data set where main.py finds it: CelebA from its host, or toy faces that are drawn here and need no network.

    python3 download_datasets.py celebA                           # -> data/celebA/img_align_celeba/000001.jpg ...
    python3 download_datasets.py celebA --zip img_align_celeba.zip  # the same from a zip that you fetched by hand
    python3 download_datasets.py toy                              # -> data/toy/img_align_toy/000001.jpg ...

Run the same command again to resume a download that was interrupted. A set that is there already is left alone.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import stat
import sys
import time
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import numpy as np
import requests
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two downloads into one folder at a time are then up to the user
    fcntl = None

# Why not torchvision's downloader: it gives the work to gdown and starts from zero each time, which hurts with 1.4 GB
# from a host that cuts connections, and for years it saved the host's web page under the name of the zip.

CELEBA_FOLDER = "img_align_celeba"  # the one folder of the zip
CELEBA_URL = "https://drive.google.com/uc?export=download&id=0B7EVK8r0v71pZjFTYXZWM3FlRnM"
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
CELEBA_SIZE = 1_443_490_838  # bytes; only a guide, to look for room on the disk
CELEBA_IMAGES = 202_599
BY_HAND = (
    "fetch img_align_celeba.zip by hand (http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html) and run: "
    "python3 download_datasets.py celebA --zip path/to/img_align_celeba.zip"
)

TIMEOUT_S = (15, 60)  # to connect, and between two reads
MAX_STALLED = 8  # tries in a row that bring nothing, with pauses of 1, 2, 4 ... s: two minutes


class Failure(Exception):
    """What went wrong and what to do about it, in one line for the user; faults that may pass are ConnectionErrors."""


# ----------------------------------------------------------------------------------------------------------------------
# CelebA


class DownloadForm(HTMLParser):
    """The form of a web page that leads on to the file: where to, and its hidden fields."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.action, self.fields = "", {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        if tag == "form" and "download" in found.get("id", "") + found.get("action", ""):
            self.action = found.get("action", "")
        elif tag == "input" and self.action and found.get("type") == "hidden" and "name" in found:
            self.fields[found["name"]] = found.get("value", "")


def open_zip(session: requests.Session, url: str, start: int) -> tuple[requests.Response, Iterator[bytes]]:
    """Return the answer that brings the zip, from byte `start` on if the host can do that, and the chunks of its body.

    Google Drive cannot scan a big file for viruses and says so on a page, with a form that leads on (or, in older days,
    a cookie whose value confirms). Its "quota exceeded" is a page too, and both come with status 200: what the answer
    begins with decides, not what its header says.
    """
    fields: dict[str, str] = {}
    for _ in range(4):
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = session.get(url, params=fields, headers=headers, stream=True, timeout=TIMEOUT_S)
        status, host = response.status_code, urlsplit(response.url).netloc
        chunks = response.iter_content(1 << 16)  # bytes; the most that a broken connection loses of what came
        first = next(chunks, b"")
        if (status == 200 and first[:2] in (b"PK", b"")) or (start and status in (206, 416)):
            return response, itertools.chain([first], chunks)
        page = b"".join([first, *itertools.islice(chunks, 15)]).decode("utf-8", "replace")  # no more than 1 MB
        if re.search(r"quota exceeded|too many users have (viewed|downloaded)", page, re.I):
            raise Failure(f"{host} says that the file's download quota is used up; try tomorrow, or {BY_HAND}")
        if status == 429 or status >= 500:
            raise requests.ConnectionError(f"{host} answers {status} {response.reason}")
        if status >= 400:
            raise Failure(f"{host} answers {status} {response.reason}; {BY_HAND}")
        form = DownloadForm(page)
        tokens = [cookie.value for cookie in session.cookies if cookie.name.startswith("download_warning")]
        if form.action:
            url, fields = urljoin(response.url, form.action), form.fields
        elif tokens:
            fields = {"confirm": tokens[-1]}
        else:
            break
    title = re.search(r"<title>\s*([^<]{0,60})", page)
    raise Failure(f"{host} sends a web page ('{title[1] if title else ''}') in place of the zip; {BY_HAND}")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(session: requests.Session, url: str, part: Path) -> None:
    """Go on with `part` until it is whole, in one answer of the host; whatever fails, what came stays in it."""
    have = size_of(part)
    response, chunks = open_zip(session, url, have)
    with response:
        if response.status_code == 416:  # nothing is left to send; the MD5 will tell whether that is so
            return
        if response.status_code == 200:
            have = 0  # the host cannot resume: this is the file from its beginning
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise requests.ConnectionError("the host does not go on from what is here, so it starts from zero")
        length = response.headers.get("Content-Length")
        whole = have + int(length) if length else None
        bar = tqdm(total=whole, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab" if have else "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                bar.update(len(chunk))
    if whole not in (None, size_of(part)):
        raise requests.ConnectionError(f"the connection ended at {size_of(part):,} of {whole:,} bytes")


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path) -> None:
    """Fetch CelebA's zip into the file `path`, through `path`.part, which a next call resumes."""
    part = path.with_name(f"{path.name}.part")
    best, stalled = size_of(part), 0
    need = 2.3 * CELEBA_SIZE - best  # the zip, and its images in whole blocks of the disk
    if (free := shutil.disk_usage(path.parent).free) < need:
        raise Failure(f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free: make room or choose another --data_dir")
    print(f"downloading {url}, {best:,} bytes are here", flush=True)
    with requests.Session() as session:
        # without "identity" some hosts compress the answer and then ignore Range; the pages are read in English
        session.headers.update({"Accept-Encoding": "identity", "Accept-Language": "en"})
        while True:
            try:
                receive(session, url, part)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                fault = re.split("[\"']", str(error).rsplit(": ", 1)[-1])[0]  # the innermost of a nest of messages
            except requests.RequestException as error:
                raise Failure(f"cannot read {url}: {error}; {BY_HAND}") from error
            # a host without ranges starts from zero each time: only more than ever before counts as progress
            stalled = 0 if size_of(part) > best else stalled + 1
            best = max(best, size_of(part))
            if stalled == MAX_STALLED:
                raise Failure(f"no headway ({fault}): run the same command later to resume, or {BY_HAND}")
            pause = 2 ** max(0, stalled - 1)
            tqdm.write(f"{fault}; trying again in {pause} s")
            time.sleep(pause)
    if (found := md5_of(part)) != CELEBA_MD5:
        part.unlink()
        raise Failure(f"{url} sent a wrong file, now deleted (MD5 {found}): run this once more, or {BY_HAND}")
    part.rename(path)


def extract(zip_path: Path, folder: Path) -> None:
    """Write the images of CelebA's zip into `folder`, and nothing else of it."""
    try:
        with zipfile.ZipFile(zip_path) as archive:
            members = archive.infolist()
            for member in members:
                is_link = stat.S_ISLNK(member.external_attr >> 16)
                if is_link or re.search(r"^/|^[A-Za-z]:|\\|(^|/)\.\.(/|$)", member.filename):
                    raise Failure(f"{zip_path} has a member that would leave its folder: {member.filename}")
            images = [m for m in members if re.fullmatch(rf"{CELEBA_FOLDER}/[^/]+\.jpg", m.filename)]
            if len(images) != CELEBA_IMAGES:
                raise Failure(f"{zip_path} has {len(images)} images in {CELEBA_FOLDER}, not {CELEBA_IMAGES}")
            for member in tqdm(images, desc="extracting", unit="", disable=None):
                (folder / Path(member.filename).name).write_bytes(archive.read(member))
    except zipfile.BadZipFile as error:
        raise Failure(f"{zip_path} is not a sound zip ({error})") from error


def get_celeba(data_dir: Path, url: str, zip_path: Path | None) -> None:
    """Leave CelebA's images in `data_dir`/celebA, from the web or from the zip at `zip_path`, which stays."""
    final = data_dir / "celebA" / CELEBA_FOLDER
    if is_there(final, CELEBA_IMAGES):
        return
    if zip_path and not zip_path.is_file():
        raise Failure(f"--zip {zip_path}: there is no such file")
    if zip_path and (found := md5_of(zip_path)) != CELEBA_MD5:
        raise Failure(f"--zip {zip_path} is damaged or another file (its MD5 is {found}): {BY_HAND}")
    with written_aside(final) as folder:
        own = folder.with_suffix(".zip")
        if not zip_path and not own.exists():  # it exists if a run was stopped while it extracted
            download(url, own)
        extract(zip_path or own, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def is_there(final: Path, n_images: int, seed: str = "") -> bool:
    """Return whether the folder `final` is there with its images; raise Failure if it has other ones."""
    if not final.exists():
        return False
    count, note = sum(name.endswith(".jpg") for name in os.listdir(final)), final / ".seed"
    if count != n_images or (note.read_text() if note.exists() else "") != seed:
        raise Failure(f"{final} has another set, of {count} images: remove it, or choose another --data_dir")
    print(f"{final} has its {count} images already")
    return True


@contextlib.contextmanager
def written_aside(final: Path) -> Iterator[Path]:
    """Yield an empty folder, for this process alone, that becomes `final` if the body ends well.

    If not, it goes, and what lies beside it (a download) waits for the next call.
    """
    work = final.parent / ".partial"  # main.py passes over hidden folders
    folder, lock = work / final.name, work / "lock"
    work.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"another run is at work in {work}: wait for it, or choose another --data_dir") from None
        except OSError:
            pass  # some network file systems have no locks
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            yield folder
            folder.rename(final)
            shutil.rmtree(work, ignore_errors=True)
            print(f"{final} has its images: python3 main.py --dataroot={final.parent}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # a folder stays that is not empty
                lock.unlink()
                work.rmdir()
                final.parent.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Toy faces

WIDTH, HEIGHT, FINE = 178, 218, 2  # CelebA's pixels; the drawing is FINE times as big and then reduced
EYES = (89.0, 111.0)  # where CelebA has the middle between the eyes
SKIN = np.array([(255, 224, 200), (241, 194, 160), (224, 172, 128), (198, 134, 90), (141, 85, 54), (96, 58, 40)])
HAIR = np.array([(34, 28, 30), (66, 42, 30), (120, 76, 42), (168, 92, 48), (222, 184, 112), (186, 180, 176)])
IRIS = np.array([(74, 48, 30), (110, 78, 40), (76, 120, 84), (70, 124, 178), (110, 124, 134)])
SPAN = np.linspace(-1, 1, 21)  # along a mouth, an eye, a brow


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> np.ndarray:
    """Return points (n, 2) on an ellipse or an arc of it; the angles are in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, stop, 32))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def points(x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    """Return the coordinates, one of which may be a single number, as points (n, 2)."""
    return np.stack(np.broadcast_arrays(x, y), 1)


class Face:
    """One face, drawn from its random numbers alone.

    Lengths are in pixels of the final picture, from the middle between the eyes, y downwards. The head is taken for an
    ellipsoid with the features painted on it, so a turn moves and narrows them as it does on a real head.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.uniform = rng, rng.uniform
        self.half, self.middle = np.array([rng.uniform(44, 51), rng.uniform(57, 62)]), np.array([0, 2])
        self.turn = np.clip(rng.normal(0, (0.22, 0.06)), (-0.5, -0.12), (0.5, 0.12))  # radians: aside, up and down
        tilt, size = np.clip(rng.normal(0, 0.07), -0.18, 0.18), rng.uniform(0.94, 1.05)
        self.spin = size * np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        self.place = EYES + rng.normal(0, 1.5, 2)
        self.pivot = 0.8 * self.turned(np.zeros((1, 2)))  # the eyes about stay and the head goes round them
        self.skin, self.hair, self.iris = self.colour_of(SKIN), self.colour_of(HAIR), self.colour_of(IRIS)
        self.bald, self.long, self.volume = self.chance(0.06), self.chance(0.45), rng.uniform(1.05, 1.2)
        self.smile, self.jaw = rng.uniform(-0.25, 1), rng.uniform(0.06, 0.24)
        wall = rng.uniform(50, 225, 3)
        wall = 0.6 * wall + 0.4 * wall.mean() + np.linspace(-1, 1, 5)[:, None, None] * rng.uniform(-40, 40, 3)
        wall = np.clip(wall + rng.normal(0, 12, (5, 4, 3)), 0, 255).astype(np.uint8)
        self.page = Image.fromarray(wall).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        self.page = self.page.resize((WIDTH * FINE, HEIGHT * FINE), Image.Resampling.NEAREST)
        self.light = Image.new("RGB", (WIDTH // 2, HEIGHT // 2), (128, 128, 128))  # multiplies the page, once blurred
        self.pen, self.brush = ImageDraw.Draw(self.page), ImageDraw.Draw(self.light)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def colour_of(self, palette: np.ndarray) -> np.ndarray:
        """Return a colour between two neighbours of a palette."""
        at = self.uniform(0, len(palette) - 1)
        mix = palette[int(at)] + (at % 1) * (palette[int(at) + 1] - palette[int(at)])
        return mix * self.uniform(0.93, 1.07) + self.rng.normal(0, 2, 3)

    def turned(self, shape: np.ndarray) -> np.ndarray:
        """Return where points on the front of the head are once it has turned."""
        at = np.arcsin(np.minimum(np.maximum((shape - self.middle) / self.half, -1), 1)) + self.turn
        return np.sin(np.minimum(np.maximum(at, -1.5), 1.5)) * self.half + self.middle  # np.clip is twice as slow

    def on_page(self, shape: np.ndarray, front: bool, scale: float = FINE) -> list[float]:
        moved = ((self.turned(shape) if front else shape) - self.pivot) @ self.spin + self.place
        return (moved * scale).ravel().tolist()

    def fill(self, shape: np.ndarray, colour: np.ndarray | tuple, front: bool = True) -> None:
        self.pen.polygon(self.on_page(shape, front), tuple(int(c) for c in np.clip(colour, 0, 255)))

    def line(self, shape: np.ndarray, colour: np.ndarray, width: float, front: bool = True) -> None:
        ink = tuple(int(c) for c in np.clip(colour, 0, 255))
        self.pen.line(self.on_page(shape, front), ink, max(1, round(width * FINE)), "curve")

    def glow(self, shape: np.ndarray, colour: tuple[int, int, int], front: bool = True) -> None:
        """Make a soft light (colour above 128) or shadow (below)."""
        self.brush.polygon(self.on_page(shape, front, 0.5), colour)

    def outline(self, grow: float, start: float = 0, stop: float = 360) -> np.ndarray:
        """Return the edge of the head, `grow` times as big, which narrows to the chin."""
        shape = ellipse(0, 0, *self.half, start, stop)
        shape[:, 0] *= 1 - self.jaw * np.clip(shape[:, 1] / self.half[1], 0, 1) ** 1.5
        return shape * grow + self.middle

    def draw_hair_behind(self) -> None:
        self.fill(self.outline(self.volume - 0.03, 165, 375), self.hair * 0.7, front=False)
        if self.long:
            down, length, wave = np.linspace(0, 1, 30), self.uniform(25, 105), self.uniform(0, 3)
            aside = self.half[0] * self.volume + self.uniform(-4, 12) * down + wave * np.sin(down * length / 7)
            side = points(aside, down * length)
            mane = np.concatenate([self.outline(self.volume, 180, 360), side, side[::-1] * (-1, 1)])
            self.fill(mane, self.hair * 0.72, front=False)
        if self.chance(0.18):  # curls
            for x, y in self.outline(1.06, 160, 380)[::2]:
                self.fill(ellipse(x, y, *self.uniform(8, 13, 2)), self.hair * self.uniform(0.75, 1), front=False)

    def draw_body(self) -> None:
        neck, shirt = self.uniform(22, 29), self.uniform(40, 230, 3)
        self.fill(ellipse(0, 150, self.uniform(82, 105), self.uniform(62, 70)), shirt, front=False)
        throat = np.array([(-neck, 30), (neck, 30), (neck + 3, 92), (0, 104), (-neck - 3, 92)])
        self.fill(throat, self.skin * 0.88, front=False)
        self.glow(ellipse(0, 68, neck + 4, 14), (88, 82, 82), front=False)
        if self.chance(0.5):
            collar = ellipse(0, 88, neck + 5, self.uniform(12, 24), 0, 180)
            self.line(collar, shirt * self.uniform(0.6, 1.3), 5, front=False)

    def draw_head(self) -> None:
        earrings, blush = self.long and self.chance(0.3), 130 - int(self.uniform(2, 14))
        self.glow(self.outline(1), (134, 134, 134), front=False)
        for side in (-1, 1):
            ear = self.half[0] * (side * np.cos(self.turn[0]) - 0.3 * np.sin(self.turn[0]))
            self.fill(ellipse(ear, 10, 8, 13), self.skin * 0.93, front=False)
            if earrings:
                self.fill(ellipse(ear, 26, 3, 3), (235, 205, 120), front=False)
            self.glow(ellipse(side * 20, -1, 13, 8), (118, 114, 114))
            self.glow(ellipse(side * 28, 26 - 3 * self.smile, 12, 9), (136, blush, blush))
        self.fill(self.outline(1), self.skin, front=False)
        self.glow(ellipse(0, -30, 24, 12), (142, 142, 140))
        self.glow(ellipse(0, 55, 12, 6), (140, 139, 138))
        if not self.long and self.chance(0.4):  # a beard, from stubble to full
            height = 31 - self.uniform(14, 30) * np.abs(SPAN) ** self.uniform(3, 8)
            cheek, full = self.turned(points(0.97 * self.half[0] * SPAN, height)), self.uniform(0.2, 1)
            beard = np.concatenate([cheek, self.outline(1.02, 10, 170)])
            self.fill(beard, self.hair * full + self.skin * (1 - full), front=False)

    def draw_mouth(self) -> None:
        painted = np.array((self.uniform(150, 205), self.uniform(40, 80), self.uniform(60, 90)))
        lips = painted if self.chance(0.4) else self.skin * (0.86, 0.62, 0.62)
        wide, full = self.uniform(13, 19) + 3 * self.smile, self.uniform(2.5, 5)
        opening = max(0.0, self.uniform(-7, 9) * (0.4 + self.smile))
        curve, belly = 40 - 7 * self.smile * (SPAN**2 - 0.4), 1 - SPAN**2
        upper = points(wide * SPAN, curve - full * belly * (1 - 0.35 * np.exp(-((SPAN / 0.22) ** 2))))
        lower = points(wide * SPAN, curve + (opening + 1.4 * full) * belly)
        self.fill(np.concatenate([upper, lower[::-1]]), lips)
        inside = points(wide * 0.86 * SPAN, curve)
        if opening > 1.5:
            for part, colour in ((1, (92, 28, 36)), (0.55, (246, 243, 236))):  # the open mouth, then the teeth
                self.fill(np.concatenate([inside, (inside + points(0, part * opening * belly))[::-1]]), colour)
        else:
            self.line(inside, lips * 0.6, 0.9)
        self.glow(ellipse(0, 51, 10, 3), (116, 114, 114))

    def draw_nose(self) -> None:
        wing, tip = self.uniform(6, 10), self.uniform(21, 26)
        shadow = np.array([(0, 0), (5, tip - 4), (wing + 3, tip + 1), (0, tip + 3)])
        self.glow(shadow * (np.sign(self.turn[0]) or 1, 1), (108, 104, 104))
        self.glow(ellipse(0, tip - 5, 3.5, 5), (156, 154, 152))
        self.line(ellipse(0, tip - 1, wing * 0.8, 3.5, 20, 160), self.skin * 0.66, 1.3)
        for side in (-1, 1):
            nostril = ellipse(side * wing * 0.8, tip - 3, 3.2, 4, 90 - side * 100, 90 + side * 10)
            self.line(nostril, self.skin * 0.74, 1)

    def draw_eyes(self) -> None:
        apart, wide, slant = self.uniform(18.5, 20.5), self.uniform(8, 10.2), self.rng.normal(0, 1)
        tall, look = self.uniform(4, 6.8) - 0.8 * max(0, self.smile), np.clip(self.rng.normal(0, 1.1, 2), -2, 2)
        lift, arch, thick = self.uniform(-15.5, -12), self.uniform(1, 4.5), self.uniform(1.4, 3.6)
        frown, brow = self.rng.normal(0, 1.2), self.hair * self.uniform(0.5, 0.75)
        for side in (-1, 1):
            x, middle = side * (apart + wide * SPAN), (side * apart + look[0], look[1] - 0.4)
            top = points(x, -slant * SPAN - tall * (1 - np.abs(SPAN) ** 2.2))
            bottom = points(x, -slant * SPAN + 0.7 * tall * (1 - SPAN**2))
            self.fill(np.concatenate([top, bottom[::-1]]), (244, 241, 238))
            for radius, colour in ((4.9, self.iris * 0.6), (4.2, self.iris), (2.2, (16, 14, 16))):
                disc = ellipse(*middle, radius, radius)
                lids = [np.interp(disc[:, 0], lid[::side, 0], lid[::side, 1]) for lid in (top, bottom)]
                self.fill(points(disc[:, 0], np.clip(disc[:, 1], *lids)), colour)
            self.fill(ellipse(middle[0] - 1.5, middle[1] - 1.7, 1.2, 1.2), (255, 255, 255))
            self.line(top, self.skin * 0.22, 1.7 if self.long else 1.1)
            self.line(bottom, self.skin * 0.7, 0.7)
            self.line(top - (0, 2.6), self.skin * 0.72, 0.8)
            under = points(side * (apart + 0.5 + 11.5 * SPAN), lift - arch * (1 - SPAN**2) + frown * SPAN)
            over = under - points(0, thick * (1.15 - SPAN) / 2)
            self.fill(np.concatenate([over, under[::-1] + (0, thick / 3)]), brow)

    def draw_hair(self) -> None:
        """Draw the hair over the forehead: from the skull's outline to a hair line that is highest at the parting."""
        part = self.uniform(-0.6, 0.6)
        high, drop, power = self.uniform(-45, -35), self.uniform(22, 46), self.uniform(1.2, 3)
        if self.chance(0.3):  # a fringe
            high, drop, power = self.uniform(-24, -19), self.uniform(2, 8), 2
        u = np.linspace(-0.999, 0.999, 40)
        border = high + drop * (np.abs(u - part) / (1 + abs(part))) ** power
        border = points(self.half[0] * u, np.minimum(border, 8 if self.long else -2))
        crown = self.outline(max(1.04, self.volume - 0.04), 178, 362)
        self.fill(np.concatenate([crown, self.turned(border[::-1])]), self.hair, front=False)
        root, t = self.half * (0.8 * part, -0.86), np.linspace(0, 1, 7)[:, None]
        for spot in border[2:-2:2]:  # strands
            bend = (root + spot) / 2 + (0.25 * (spot[0] - root[0]), -6)
            strand = (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * (spot - (0, 1))
            self.line(strand, self.hair * self.uniform(0.7, 1.35), self.uniform(0.4, 1))
        self.glow(ellipse(-8, -46, 26, 7), (158, 156, 152))

    def draw_glasses(self) -> None:
        rim, radius, thick = self.uniform(15, 120, 3), self.uniform(12, 15), self.uniform(1.2, 2.6)
        ring = ellipse(0, 0, 1, 1)
        ring = np.sign(ring) * np.abs(ring) ** (0.5 if self.chance(0.5) else 1) * (radius, 0.82 * radius)
        for side in (-1, 1):
            self.line(ring + (side * 20, 1), rim, thick)
            self.line(np.array([(side * (20 + radius), -2), (side * self.half[0] * 0.99, -4)]), rim, thick)
            self.glow(ring * 0.8 + (side * 20, 1), (136, 138, 142))
        self.line(ellipse(0, 0, 20 - radius, 3, 180, 360), rim, thick)

    def lit(self) -> Image.Image:
        """Return the picture in its light, which comes from one side and above, is warm or cold, and fades outwards."""
        light = self.light.filter(ImageFilter.GaussianBlur(1.5)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        x = (np.arange(WIDTH, dtype=np.float32) - EYES[0]) / 75
        y = (np.arange(HEIGHT, dtype=np.float32)[:, None] - EYES[1]) / 95
        angle, strength = self.uniform(-np.pi, 0), self.uniform(0.08, 0.3)
        level = 1 + strength * np.clip(x * float(np.cos(angle)) + y * float(np.sin(angle)), -1, 1)
        level -= 0.1 * np.clip(x**2 + y**2 - 0.35, 0, 1)
        tint = self.uniform(0.9, 1.08) * (1 + self.uniform(-0.05, 0.05) * np.array([1, 0.1, -1])) / 128
        page = np.asarray(self.page.reduce(FINE), np.float32) * np.asarray(light, np.float32)
        return Image.fromarray(np.clip(page * level[..., None] * tint.astype(np.float32), 0, 255).astype(np.uint8))


def draw_face(seed: int, index: int) -> Image.Image:
    """Return face `index` of the set `seed`: a 178 x 218 RGB picture, laid out like CelebA's."""
    face = Face(np.random.default_rng([seed, index]))
    if not face.bald:
        face.draw_hair_behind()
    for draw in (face.draw_body, face.draw_head, face.draw_mouth, face.draw_nose, face.draw_eyes):
        draw()
    if not face.bald:
        face.draw_hair()
    if face.chance(0.22):
        face.draw_glasses()
    return face.lit()


def save_face(folder: Path, seed: int, index: int) -> None:
    draw_face(seed, index).save(folder / f"{index:06d}.jpg", quality=92)


def get_toy(data_dir: Path, seed: int, n_images: int) -> None:
    """Leave `n_images` toy faces in `data_dir`/toy; the files depend on `seed` alone (and on Pillow's version)."""
    final = data_dir / "toy" / "img_align_toy"
    if is_there(final, n_images, str(seed)):
        return
    with written_aside(final) as folder:
        ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the workers inherit: Ctrl-C is for this process
        with multiprocessing.Pool() as pool:
            signal.signal(signal.SIGINT, ours)
            draw = functools.partial(save_face, folder, seed)
            drawn = pool.imap_unordered(draw, range(1, n_images + 1), chunksize=32)
            for _ in tqdm(drawn, total=n_images, desc="drawing", unit="", disable=None):
                pass
        (folder / ".seed").write_text(str(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, without the usage before it."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help tells more)\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2 and one line if they make no sense."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    sets = parser.add_subparsers(dest="set", required=True, metavar="{celebA,toy}")
    celeba = sets.add_parser("celebA", help="202,599 photographs, 1.4 GB to fetch")
    source = celeba.add_mutually_exclusive_group()
    source.add_argument("--url", default=CELEBA_URL, help="another address of the same zip, a mirror's for instance")
    source.add_argument("--zip", type=Path, metavar="FILE", help="img_align_celeba.zip if you have it; it is kept")
    toy = sets.add_parser("toy", help="drawn faces of the same size; no network")
    toy.add_argument("--seed", type=int, default=0, help="0 or more: which faces (default: 0)")
    toy.add_argument("--n_images", type=int, default=4000, help="1..999999 (default: 4000)")
    for one in (celeba, toy):
        one.add_argument("--data_dir", type=Path, default="data", help="the set goes to a folder in it (default: data)")
    args = parser.parse_args(argv)
    if args.set == "toy" and not (args.seed >= 0 and 1 <= args.n_images <= 999_999):
        toy.error("--seed is 0 or more and --n_images in 1..999999")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status (0 done, 1 failed, 130 interrupted)."""
    args = parse_args(argv)
    try:
        if args.set == "celebA":
            get_celeba(args.data_dir, args.url, args.zip)
        else:
            get_toy(args.data_dir, args.seed, args.n_images)
        return 0
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from here", file=sys.stderr)
        return 130
    except Failure as error:
        message = str(error)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room and run the same command again" if full else "is it yours to read and write?"
        message = f"{error.filename or 'disk'}: {error.strerror or error}; {advice} (--data_dir {args.data_dir})"
    print(f"download_datasets.py: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
