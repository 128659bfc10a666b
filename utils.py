"""What any training run needs: files, images, seeds, processes, checkpoints, a log, pictures.

Nothing here knows what an auto-encoder is. `main.py` puts these functions together with `model.py`.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import signal
import stat
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

try:
    import fcntl
except ImportError:
    sys.exit("main.py needs Linux, macOS or WSL: there are no file locks here")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

Images = np.ndarray | Tensor  # uint8, (N, S, S, C), on disk or on a GPU

CELEBA_CROP = 140  # the central square of an aligned CelebA image that the paper keeps, in pixels
CELEBA_TEST_IMAGES = 19_962  # the official test partition, the last images by name

# Endings of the image files that are read.
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ENDINGS += (".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif")
NOBODYS = ("Thumbs.db", "desktop.ini")  # files that Windows leaves in folders of images

# Folders that are half of a split, or beside the images.
SPLITS = {"train", "training", "training_set", "test", "testing", "test_set", "val", "valid"}
SPLITS |= {"validation", "validation_set"}
MASKS = {"mask", "masks", "ground_truth", "groundtruth", "labels", "annotations"}

# Pillow's limits are for files of strangers. Scans are large, and Photoshop writes long texts.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
warnings.filterwarnings("ignore", module="PIL")


class UserError(Exception):
    """An error that the user can fix: one line, exit status 1. Any function here may raise it."""

    status = 1


class WriteError(UserError):
    """A file cannot be written."""


class UsageError(UserError):
    """A flag that cannot be honoured: shown as one line, exit status 2."""

    status = 2


# --------------------------------------------------------------------------------------------------
# Files


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WriteError, which names `path`, where the block cannot write."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block ends: whole and flushed, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(folder: Path, wait: bool = False) -> TextIO:
    """Makes a folder, and locks it until the result is closed or the process ends, however it ends.

    Where another process has the lock, it waits or, without `wait`, raises UserError.
    """
    path = folder / ".lock"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = f"{folder} is in use by another process"
        if not wait:
            raise UserError(f"{owner}: wait for it, or choose another folder") from None
        warn(f"{owner}: waiting for it")
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:
        pass  # Some network file systems have no locks.
    return file


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` by the content as indented JSON."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replaces `path` by a table."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


# --------------------------------------------------------------------------------------------------
# Images: decoded once into one array on disk, which training maps into memory


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that depend on all parts, for names and comparisons."""
    text = "\n".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def find_images(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each image file in a folder and those inside it, by its path.

    Left out are hidden files, and folders that start with `.`, `@` or `$`, as thumbnails of a NAS
    and the bin of Windows do. A folder that a link leads to again is read once.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    files: dict[str, tuple[int, int]] = {}
    seen: set[tuple[int, int]] = set()
    others: Counter[str] = Counter()

    def skip(error: OSError) -> None:
        warn(f"skipped the folder {error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=skip):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if name[0] not in ".@$")
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if name[0] == "." or name in NOBODYS:
                continue
            if ending not in ENDINGS:
                others[ending or "none"] += 1
                continue
            with suppress(OSError):  # a link that leads nowhere
                path = os.path.join(folder, name)
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                    name = os.path.relpath(path, root)
                    files[name] = (status.st_size, status.st_ctime_ns)
    left_out = ", ".join(f"{ending} ({n})" for ending, n in others.most_common(5))
    if not files:
        hint = f"; left out, by their endings: {left_out}" if others else ""
        raise UserError(f"{root}: no image in it or in a folder inside it{hint}")
    if others:
        warn(f"{root}: left out, by their endings: {left_out}; images end in {' '.join(ENDINGS)}")
    return dict(sorted(files.items()))


def read_image(path: Path | str, size: int, crop: int | None, channels: int) -> np.ndarray:
    """The central `crop` pixels of an image file, or the largest square: uint8 (size, size, C).

    The image is upright, in 8 bits of RGB (3 channels) or grey (1), on white if it is transparent;
    of several pages or frames it is the first.

    Raises UserError if the crop is larger than the image, ValueError for signed, 32-bit or float
    pixels, and whatever Pillow makes of a file that is not a whole image.
    """
    with Image.open(path) as image:
        kind = image.format
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        # Pillow would clip 16 bits of grey to 8.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are signed, of 32 bits or floats, whose range is unknown")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")

    side = crop or min(image.size)
    if min(image.size) < side:
        pixels = " x ".join(map(str, image.size))
        hint = "use another --crop, or --dataset=folder"
        raise UserError(f"{path}: {pixels} pixels, less than the crop of {side} x {side}; {hint}")
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    # The official implementation resizes by Lanczos, too; sharpness and FID depend on it.
    pixels = np.array(square.resize((size, size), Image.Resampling.LANCZOS))
    return pixels.reshape(size, size, channels)


def read_or_reason(path: Path, **how: Any) -> np.ndarray | str:
    """The pixels of an image file, or why it is skipped.

    Raises UserError where a disk fails, which says nothing about the file, or for the crop.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(1000).lower()
        return read_image(path, **how)
    except UserError:
        raise
    except UnidentifiedImageError:
        if start.startswith(b"version https://git-lfs"):
            return "a pointer of Git LFS; `git lfs pull` brings the images"
        return "a web page" if b"<html" in start else "not an image"
    except (PermissionError, FileNotFoundError) as error:
        return error.strerror
    except Exception as error:  # Pillow fails on broken files in many ways
        # A broken TIFF makes Pillow seek to where no file can be: EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"{path}: {error.strerror}") from error
        return first_line(error)


def build_array(target: Path, paths: list[Path], **how: Any) -> None:
    """Decodes the images into `target`, a file of their pixels alone.

    A .json beside it has the number of each image that is skipped, with the reason, and for each
    row of the array the first row of equal pixels.
    """
    skipped: list[tuple[int, str]] = []
    firsts: list[int] = []
    seen: dict[bytes, int] = {}
    bar = progress("decoding once", len(paths), unit="img")
    # Pillow decodes outside of Python's lock, so threads use all cores.
    with bar, atomic_write(target) as file, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):
            part = paths[start : start + 1024]
            for i, pixels in enumerate(pool.map(partial(read_or_reason, **how), part), start):
                bar.update()
                if isinstance(pixels, str):
                    skipped.append((i, pixels))
                    continue
                file.write(pixels)
                key = hashlib.md5(pixels, usedforsecurity=False).digest()
                firsts.append(seen.setdefault(key, len(firsts)))
        # The notes come first: a process that finds the array reads them at once.
        write_json(target.with_suffix(".json"), {"skipped": skipped, "firsts": firsts})


def describe(skipped: dict[str, str]) -> str:
    """Why images were skipped: for each reason a count and the names of three, in one line."""
    by_reason = defaultdict(list)
    for name, reason in skipped.items():
        by_reason[reason].append(name)
    parts = []
    for reason, names in by_reason.items():
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        parts.append(f"{len(names)} x {reason} ({some})")
    return "; ".join(parts)


class Data(NamedTuple):
    """The images of a run, and which are for training and which are held out.

    `images` are uint8 (N, S, S, C). For each row of them `names` has the path and `firsts` the
    first row of equal pixels; `train` and `test` are rows. `digest` stands for the names and sizes
    of the files; a copy of the folder has the same.
    """

    images: Images
    names: list[str]
    firsts: np.ndarray
    train: np.ndarray
    test: np.ndarray
    digest: str


def load_images(
    root: Path,
    testroot: Path | None,
    size: int,
    crop: int | None,
    channels: int,
    cache_dir: Path | None = None,
) -> Data:
    """All images of one or two folders, decoded, in order of their paths; the second is held out.

    The array is built on first use and mapped into memory ever after. It is in the folder .wae of
    `root` or `cache_dir`. Its name has a digest of names, sizes and times of change of the files,
    so that it is built again when they change. Any number of processes may ask for it at once.
    """
    files = {}  # by absolute path: held out (0 or 1), path in its root, size, time of change
    for held_out, folder in enumerate(filter(None, (root, testroot))):
        for name, status in find_images(folder).items():
            files[os.path.abspath(folder / name)] = (held_out, name, *status)
    paths, keys = [Path(path) for path in files], list(files.values())
    folder = (cache_dir or root) / ".wae"
    # In a `cache_dir` the name tells the root. Beside its images it does not: all may be moved.
    home = digest(root.resolve() if cache_dir else "here", testroot and testroot.resolve())
    prefix = f"{size}_{channels}_{crop}_{home}"
    target = folder / f"{prefix}_{digest(*keys)}.u8"
    try:
        if not target.exists():
            # One lock for all versions of the array: who holds it may remove those out of date.
            with lock(folder, wait=True):
                if not target.exists():  # nor has another process built it meanwhile
                    build_array(target, paths, size=size, crop=crop, channels=channels)
                    # The first * finds what a killed process left half-written, too.
                    for old in folder.glob(f"*{prefix}_*"):
                        if old.stem != target.stem:
                            old.unlink(missing_ok=True)
    except WriteError as error:
        raise UserError(f"{error}; --cache_dir names a place for decoded images") from error
    notes = json.loads(target.with_suffix(".json").read_text())
    skipped = dict(notes["skipped"])
    reasons = {keys[i][1]: reason for i, reason in skipped.items()}
    kept = [key for i, key in enumerate(keys) if i not in skipped]
    if not kept:
        raise UserError(f"none of the {len(keys)} images can be read: {describe(reasons)}")
    if skipped:
        warn(f"skipped {len(skipped)} of {len(keys)} images: {describe(reasons)}")
    return Data(
        images=np.memmap(target, np.uint8, "r", shape=(len(kept), size, size, channels)),
        names=[name for _, name, *_ in kept],
        firsts=np.array(notes["firsts"]),
        train=np.flatnonzero([held_out == 0 for held_out, *_ in kept]),
        test=np.flatnonzero([held_out == 1 for held_out, *_ in kept]),
        digest=digest(*(key[:3] for key in kept)),
    )


def hold_out(data: Data, n_test: int | None) -> Data:
    """The data with the last images of each folder held out, by path, in proportion.

    They are `n_test` in all or, by default, a tenth, but no more than CelebA's test partition.
    """
    n = len(data.names)
    n_test = min(n, n_test or max(2, min(n // 10, CELEBA_TEST_IMAGES)))
    folders = defaultdict(list)
    for row, name in enumerate(data.names):
        folders[os.path.dirname(name)].append(row)
    held_out = np.zeros(n, bool)
    before = 0
    for rows in folders.values():
        after = before + len(rows)
        # Rounded so that the counts add up to n_test.
        count = after * n_test // n - before * n_test // n
        held_out[rows[len(rows) - count :]] = True
        before = after
    return data._replace(train=np.flatnonzero(~held_out), test=np.flatnonzero(held_out))


def count_images(data: Data) -> str:
    """How many images of which folders are trained on and held out, and how many are both."""
    train, test = (
        Counter(os.path.dirname(data.names[row]) or "." for row in rows)
        for rows in (data.train, data.test)
    )
    folders = list(train | test)
    shown = [f"{folder} {train[folder]} + {test[folder]}" for folder in folders[:5]]
    if len(folders) > 5:
        shown.append(f"and {len(folders) - 5} more folders")
    text = f"{len(data.train)} images + {len(data.test)} held out ({', '.join(shown)})"
    twice = int(np.isin(data.firsts[data.test], data.firsts[data.train]).sum())
    return text + (f", of which {twice} are also trained on, by equal pixels" if twice else "")


def warn_of_folders(root: Path, names: Sequence[str]) -> None:
    """Says what to type where folders are halves of a split, or masks beside images."""
    beside = defaultdict(set)  # the folders in each folder
    for path in {Path(name).parent for name in names}:
        for folder in (path, *path.parents[:-1]):
            beside[root / folder.parent].add(folder.name)
    for folder, inside in beside.items():
        splits = sorted(name for name in inside if name.lower() in SPLITS)
        splits.sort(key=lambda name: "train" not in name.lower())
        masks = sorted(name for name in inside if name.lower() in MASKS)
        others = sorted(inside.difference(masks, [""]))
        if len(splits) > 1:
            train, test, *_ = (folder / name for name in splits)
            hint = f"--dataroot={train} --testroot={test} tells them apart"
            warn(f"{', '.join(splits)} in {folder} are all trained on; {hint}")
        elif masks and others:
            hint = f"--dataroot={folder / others[0]} leaves them out"
            warn(f"{', '.join(masks)} in {folder} are trained on; {hint}")


def put_on_device(images: np.ndarray, device: torch.device) -> Images:
    """The array on the GPU if it fits in half of the free memory there; otherwise as it is."""
    if device.type != "cuda" or images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for i in range(0, len(images), 4096):  # in pieces: it may be larger than this machine's memory
        resident[i : i + 4096] = torch.from_numpy(np.array(images[i : i + 4096]))
    return resident


def epoch_order(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation in which an epoch visits the images, a function of seed and epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n_images)


def batches(
    images: Images, indices: Iterable[np.ndarray], device: torch.device, out: Tensor | None = None
) -> Iterator[Tensor]:
    """Batches images[i] for each array of indices i: uint8 (n, S, S, C) on the device.

    With `out`, each batch replaces the one before it in that tensor. From memory-mapped images a
    thread gathers three batches in advance, into pinned memory when they go to a GPU.
    """
    if isinstance(images, Tensor):
        for index in indices:
            rows = torch.from_numpy(index).to(device, non_blocking=True)
            yield torch.index_select(images, 0, rows, out=out)
        return

    def read(index: np.ndarray) -> Tensor:
        batch = torch.from_numpy(images[index])
        return batch.pin_memory() if device.type == "cuda" else batch

    def place(batch: Tensor) -> Tensor:
        if out is None:
            return batch.to(device, non_blocking=True)
        return out.copy_(batch, non_blocking=True)

    # A new thread uses GPU 0 unless told otherwise, and pinning would take memory there.
    prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        queue: deque = deque()
        try:
            for index in indices:
                queue.append(thread.submit(read, index))
                if len(queue) > 3:
                    yield place(queue.popleft().result())
            while queue:
                yield place(queue.popleft().result())
        finally:
            thread.shutdown(cancel_futures=True)


def from_uint8(batch: Tensor) -> Tensor:
    """Pixels (n, S, S, C) as float32 (n, C, S, S) in [0, 1]."""
    return batch.permute(0, 3, 1, 2).float().div_(255)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, C, S, S) in [0, 1] as pixels (n, S, S, C)."""
    return (images.clamp(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Seeds and processes


def set_seed(*key: int | str) -> None:
    """Seeds PyTorch's generators by a purpose and a place in the run: (seed, "noise", step).

    The randomness of a step is a function of its place, so a resumed run needs no generator state,
    and an evaluation in between changes nothing.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    # `torch.manual_seed` formats a traceback for each kind of device that is not there: 0.3 ms.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class World(NamedTuple):
    """Rank, number of processes and device of this process."""

    rank: int
    size: int
    device: torch.device


def is_main() -> bool:
    """Whether this is rank 0, which writes and speaks; also before it has joined the others."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


def join_world(cuda: bool, gpu_id: int) -> World:
    """This process's place and device, after joining the others that torchrun started, if any.

    Raises UsageError: no GPU, or not the one asked for.
    """
    if not dist.is_torchelastic_launched():
        return World(0, 1, pick_device(cuda, gpu_id))
    end_with_parent()
    device = pick_device(cuda, int(os.environ["LOCAL_RANK"]))
    # The others wait up to an hour for rank 0, which decodes images and evaluates epochs.
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(hours=1), device_id=device if cuda else None
    )
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_with_parent() -> None:
    """Ends this process when the one that launched it ends, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def pick_device(cuda: bool, gpu_id: int) -> torch.device:
    """The CPU, or the GPU of that number. Raises UsageError if it is not there."""
    if not cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError("--cuda: PyTorch finds no CUDA GPU; leave it out to use the CPU")
    if gpu_id >= count:
        raise UsageError(f"--gpu_id={gpu_id}: the {count} GPUs here are 0 to {count - 1}")
    device = torch.device("cuda", gpu_id)
    torch.cuda.set_device(device)
    return device


class Gather(torch.autograd.Function):
    """The rows of all processes in rank order, (n, ...) to (size n, ...), with gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def average(values: Tensor, world: World) -> Tensor:
    """The mean over processes, for reporting."""
    values = values / world.size
    if world.size > 1:
        dist.all_reduce(values)
    return values


class Recorded:
    """`step()`, recorded as a CUDA graph at the fourth call and replayed from then on.

    Python launches the kernels of a step one by one, and a large GPU is done sooner than Python:
    it waits most of the time. A graph launches them all at once. In the first calls, which are
    ordinary ones, cuDNN and the compiler make their choices.

    Args:
        step: never waits for the GPU, and returns a tensor; after the recording, each call returns
            the same tensor with new values. What changes between steps, such as the batch or a
            rate, must be a tensor that is changed in place.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[[], Tensor]):
        self.step = step
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.step()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.output

    def record(self) -> None:
        """Records the step, which does not run it. Raises UserError if that cannot be."""
        graph = torch.cuda.CUDAGraph()
        # On the stream of the other steps, so that memory of theirs that is free can be used.
        # Thread-local: meanwhile, the thread of `batches` may ask for pinned memory.
        how = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **how):
                self.output = self.step()
        except Exception as error:
            # The error says that the recording ended; its context says why.
            reason = first_line(error.__context__ or error)
            raise UserError(f"the step cannot be recorded, try --no-graph: {reason}") from error
        self.graph = graph


# --------------------------------------------------------------------------------------------------
# Signals and messages


class Stop:
    """Notes the signals that end a run, so that a step can end with a checkpoint.

    It is a context, in the main thread of a program, and puts back the handlers that were there.
    Only a second Ctrl-C, which a person types, ends at once: a closed terminal sends SIGHUP twice,
    and log-outs send two kinds. Slurm and submitit send SIGUSR1 and SIGUSR2. Under torchrun one
    Ctrl-C arrives twice, from the terminal and from torchrun; there a second one is like the first.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __enter__(self) -> "Stop":
        self.signum = 0
        self.interrupts = 0
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:  # nohup's choice stays
                signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, signum: int, _frame: object) -> None:
        """The handler."""
        alone = not dist.is_torchelastic_launched()
        self.interrupts += signum == signal.SIGINT
        if self.interrupts > 1 and alone:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
        hint = "; Ctrl-C again stops at once" if alone else ""
        if is_main():
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, f"\nmain.py: stopping after this step{hint}\n".encode())

    def agreed(self, world: World) -> int:
        """The signal that any process got, or 0. All processes call this at the same step."""
        if world.size == 1:
            return self.signum
        signum = torch.tensor(self.signum, device=world.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)


def progress(name: str, total: int, **options: Any) -> tqdm:
    """A progress bar, which is shown if standard error is a terminal."""
    shown = is_main() and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(desc=name, total=total, disable=not shown, leave=False, **options)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line to standard output, or to `stream`, clear of the progress bar, in rank 0.

    Where nobody can read it any more, it goes nowhere: a closed terminal must not end a training.
    """
    stream = stream or sys.stdout
    if stream is None or not is_main():
        return
    try:
        tqdm.write(printable(text), file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str) -> str:
    """The text as one line, whatever the file names in it are."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def warn(message: str) -> None:
    """Prints a line to standard error in rank 0."""
    say(f"main.py: {message}", sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by the state. Raises UserError if it cannot be written."""
    content = io.BytesIO()  # on a full disk, torch.save raises an error that does not say so
    torch.save(state, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path, *needed: str) -> dict[str, Any]:
    """A checkpoint with the keys `needed`, on the CPU. Plain values only: no code is run."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about files that it does not know
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load and pickle fail on broken files in many ways
        name = type(error).__name__
        raise UserError(f"{path}: not a whole checkpoint of this program ({name})") from error
    if missing := set(needed).difference(state if isinstance(state, dict) else ()):
        raise UserError(
            f"{path}: not a checkpoint of this program with {', '.join(sorted(missing))}"
        )
    return state


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """`log.csv`, a row at a time, and the same numbers in TensorBoard if asked for.

    `text`, all that was logged so far, goes into each checkpoint. A resumed run starts from it, so
    that rows written after the last checkpoint are replaced and not repeated.
    """

    def __init__(self, columns: Sequence[str]):
        self.columns = columns
        self.text = ",".join(columns) + "\n"
        self.board = None

    def open(self, folder: Path, step: int, tensorboard: bool) -> None:
        """Writes `text` to the folder; rows that are added after this step follow it there."""
        self.path = folder / "log.csv"
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step + 1)
        with atomic_write(self.path) as file:
            file.write(self.text.encode())

    def add(self, **values: float) -> None:
        """Appends a row; columns without a value stay empty."""
        cells = (values.get(name, "") for name in self.columns)
        line = ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in cells) + "\n"
        self.text += line
        with writing(self.path), open(self.path, "a") as file:
            file.write(line)
        for name, value in values.items():
            if self.board and name not in ("epoch", "step"):
                self.board.add_scalar(name, value, values["step"])

    def add_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Shows a picture in TensorBoard."""
        if self.board:
            self.board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        """Writes what TensorBoard has not written yet."""
        if self.board:
            self.board.flush()


# --------------------------------------------------------------------------------------------------
# Pictures


def grid(images: Tensor, columns: int) -> Image.Image:
    """A picture of images (N, C, S, S) in [0, 1], row by row."""
    canvas = make_grid(images, nrow=columns, padding=2, pad_value=1)
    return Image.fromarray(to_uint8(canvas[None])[0])


def save_picture(path: Path, picture: Image.Image) -> None:
    """Replaces `path` by the picture as PNG."""
    with atomic_write(path) as file:
        picture.save(file, "PNG")


def write_images(folder: Path, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Passes on batches of images (n, C, S, S) in [0, 1], and writes 00000.png, 00001.png, ...

    Images of that kind that an earlier call wrote beyond the last one are removed; no other file is
    touched.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for images in batches:
        for pixels in to_uint8(images):
            path = folder / f"{count:05d}.png"
            with writing(path):
                Image.fromarray(pixels.squeeze()).save(path)  # grey: (S, S)
            count += 1
        yield images
    for path in folder.iterdir():
        if re.fullmatch(r"\d{5,}\.png", path.name) and int(path.stem) >= count:
            path.unlink()


def scatter(first: np.ndarray, second: np.ndarray) -> Image.Image:
    """Two clouds of points in the plane, (N, 2) each: orange, and blue on top of it."""
    side = 300
    reach = np.abs(np.concatenate([first, second])).max() + 1e-9
    canvas = np.full((side, side, 3), 255, np.uint8)
    canvas[side // 2] = canvas[:, side // 2] = 225  # the axes
    for points, colour in ((first, (255, 127, 14)), (second, (31, 119, 180))):
        x, y = (np.round((points / reach * [1, -1] + 1) / 2 * (side - 1)).astype(int)).T
        canvas[y, x] = colour
    return Image.fromarray(canvas).resize((2 * side, 2 * side), Image.Resampling.NEAREST)
