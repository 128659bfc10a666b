"""What any training run needs: images, batches, seeds, devices and processes, checkpoints, the log, pictures, metrics.

Nothing here knows what a WAE is. `main.py` assembles these functions with `model.py`.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.utils import make_grid
from tqdm import tqdm

CELEBA_CROP = 140  # side in pixels of the central square that the paper's experiments keep of an aligned CelebA image
CELEBA_TEST_IMAGES = 19_962  # the official test partition of CelebA, which its file names end with


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit status 1."""

    status = 1


class UsageError(UserError):
    """A flag that cannot be honoured: shown as one line, exit status 2."""

    status = 2


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, whole and on disk, or not at all.

    Raises:
        UserError: the disk is full, the folder cannot be written, ...; `path` is then what it was before.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        _remove_left_overs(path.parent, path.name)
        with open(aside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _remove_left_overs(folder: Path, names: str) -> None:
    """Removes what processes that were killed had written aside, of files whose names match the pattern."""
    for left_over in folder.glob(f".{names}.{socket.gethostname()}.*.tmp"):
        if not _process_lives(int(left_over.name.split(".")[-2])):
            left_over.unlink(missing_ok=True)


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def make_folder(path: Path) -> Path:
    """Creates the folder, and its parents, where missing. Raises UserError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}") from error
    return path


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` by the content as indented JSON."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


# ----------------------------------------------------------------------------------------------------------------------
# Images: found by ImageFolder, decoded once into one uint8 array on disk, memory-mapped ever after


def find_images(dataroot: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each image that `ImageFolder` finds in `dataroot`, in order of their paths.

    Raises:
        UserError: no such folder, or no image in a folder inside it.
    """
    layout = f"images must lie in a folder inside it, as in {dataroot}/sub_directory/XXX.jpg"
    if not dataroot.is_dir():
        raise UserError(f"--dataroot={dataroot}: no such folder; {layout}")
    try:
        paths = [path for path, _ in ImageFolder(str(dataroot), allow_empty=True).samples]
    except FileNotFoundError:  # what ImageFolder raises where there is no folder inside
        paths = []
    except OSError as error:
        raise UserError(f"--dataroot={dataroot}: cannot be read: {error.strerror}") from error
    start = len(str(dataroot))
    # A hidden file or folder is another program's, a half-extracted download's for instance.
    paths = sorted(path for path in paths if "/." not in path[start:])
    if not paths:
        raise UserError(f"--dataroot={dataroot}: no image in a folder inside it; {layout}")
    status = [_status(path) for path in paths]
    return [(path, s.st_size, s.st_mtime_ns) for path, s in zip(paths, status, strict=True)]


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:  # a link that leads nowhere: to be named later, among what cannot be read
        return os.lstat(path)


def decode_image(path: str, size: int, crop: int | None) -> np.ndarray:
    """The central square of an image file, `crop` pixels wide (None: as wide as it goes), as (size, size, 3) uint8 RGB.

    Raises:
        UserError: the image is smaller than the crop.
        Exception: whatever Pillow makes of a file that is not a whole image.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise OSError(f"{path} is not a file")
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip them to 8, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    side = crop or min(image.size)
    if min(image.size) < side:
        width, height = image.size
        raise UserError(
            f"{path}: {width} x {height} pixels, less than the {side} x {side} that --dataset=celebA cuts out; "
            "for images of other sizes use --dataset=folder"
        )
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))  # resize's own `box` would let in what lies around it
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


def _start_decoding() -> None:
    """Prepares a worker, which ends when the parent ends, even if killed; Ctrl-C, which both get, is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's, of oddities in files, would tear the progress bar
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _decode_images(start: int, paths: Sequence[str], size: int, crop: int | None, descriptor: int) -> list[bool]:
    """One worker's share: writes the pixels of images `start` and on to their place in the file. Which can be read?"""
    readable, n_bytes = [], size * size * 3
    pixels = bytearray(len(paths) * n_bytes)
    for i, path in enumerate(paths):
        try:
            pixels[i * n_bytes : (i + 1) * n_bytes] = decode_image(path, size, crop).tobytes()
            readable.append(True)
        except UserError:
            raise
        except Exception:  # Pillow's decoders fail on broken files in many ways: OSError, SyntaxError, ValueError ...
            readable.append(False)
    written = 0
    while written < len(pixels):
        written += os.pwrite(descriptor, pixels[written:], start * n_bytes + written)
    return readable


def _keep_images(descriptor: int, readable: list[bool], n_bytes: int) -> None:
    """Closes the gaps that unreadable images left in the file."""
    kept = [i for i, could_be_read in enumerate(readable) if could_be_read]
    for place, i in enumerate(kept):
        if place != i:
            os.pwrite(descriptor, os.pread(descriptor, n_bytes, i * n_bytes), place * n_bytes)
    os.ftruncate(descriptor, len(kept) * n_bytes)


def _build_array(target: Path, paths: list[str], size: int, crop: int | None, workers: int) -> None:
    """Decodes the images with `workers` processes, which write their pixels, one after the other, to `target`."""
    starts = range(0, len(paths), 64)
    chunks = [paths[start : start + 64] for start in starts]
    readable: list[bool] = []
    # Forked workers start in milliseconds, and inherit the imports and the open file. They write to it themselves: the
    # pixels would otherwise wait for the parent in a narrow pipe, and the workers with them.
    pool = ProcessPoolExecutor(min(workers, len(chunks)), get_context("fork"), _start_decoding)
    try:
        with replacing(target) as file, tqdm(total=len(paths), unit="img", desc="decoding images once") as bar:
            decode = partial(_decode_images, size=size, crop=crop, descriptor=file.fileno())
            with signals_held():  # one between fork and bookkeeping would be lost, or leave a worker that nobody ends
                results = pool.map(decode, starts, chunks)
            for result in results:
                readable += result
                bar.update(len(result))
            if not any(readable):
                raise UserError(f"none of the {len(paths)} images can be read, the first being {paths[0]}")
            if not all(readable):
                _keep_images(file.fileno(), readable, size * size * 3)
    except BrokenProcessPool:
        raise UserError("a process that decoded images was killed (out of memory?); try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
    unreadable = [path for path, could_be_read in zip(paths, readable, strict=True) if not could_be_read]
    if unreadable:
        names = ", ".join(unreadable[:10]) + (", ..." if len(unreadable) > 10 else "")
        warn(f"skipped {len(unreadable)} of {len(paths)} images that cannot be read: {names}")


def load_images(
    dataroot: Path, dataset: str, size: int, workers: int, cache_dir: Path | None = None, build: bool = True
) -> np.ndarray:
    """All images of a folder as a read-only, memory-mapped uint8 array (N, size, size, 3), in order of their paths.

    The array is built on first use and kept as a hidden file in `dataroot`, or in `cache_dir`, or, where neither is
    given nor writable, in the user's cache folder. Its name has a digest of all that made it: names, sizes and times of
    the files, crop and size. Any number of processes may ask for it at once.

    Args:
        dataset: `celebA` cuts out the central 140 pixels; `folder` the largest central square.
        workers: processes that decode.
        build: whether to build the array where it is missing, or to wait until another process has.

    Raises:
        UserError: no images, none readable, one smaller than the crop, no space.
    """
    images = find_images(dataroot)
    crop = CELEBA_CROP if dataset == "celebA" else None
    prefix = f".wae_{dataset}_{size}_"
    if cache_dir is None and not os.access(dataroot, os.W_OK):
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wae"
    if cache_dir is not None:  # may serve several data sets
        prefix += hashlib.sha256(str(dataroot.resolve()).encode()).hexdigest()[:12] + "_"
    folder = make_folder(cache_dir) if cache_dir else dataroot

    start = len(f"{dataroot}/")  # the paths inside it count: a folder that is moved keeps its array
    listing = "".join([f"{path[start:]}\0{n_bytes}\0{time_ns}\n" for path, n_bytes, time_ns in images])
    digest = hashlib.sha256(os.fsencode(f"bilinear {size} {crop}\n{listing}"))
    target = folder / f"{prefix}{digest.hexdigest()[:16]}.u8"
    while not target.exists() and not build:
        time.sleep(0.1)
    if not target.exists():
        _build_array(target, [path for path, _, _ in images], size, crop, workers)
        _remove_left_overs(folder, f"{prefix}*.u8")
        for outdated in folder.glob(f"{prefix}*.u8"):
            if outdated != target:
                outdated.unlink(missing_ok=True)
    return np.memmap(target, np.uint8, "r").reshape(-1, size, size, 3)


def default_n_test(n_images: int) -> int:
    """Held-out images by default: a tenth, at most 19,962, which on CelebA is the official test partition."""
    return max(2, min(n_images // 10, CELEBA_TEST_IMAGES))


def epoch_order(n_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation in which an epoch visits the images: a function of seed and epoch, whatever happened before."""
    return np.random.default_rng([seed, epoch]).permutation(n_images)


def put_on_device(images: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """The array on the GPU if it fits in half of the free memory there; otherwise, and on the CPU, as it is."""
    if device.type != "cuda" or images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for i in range(0, len(images), 4096):  # piece by piece: the array may be larger than this machine's memory
        resident[i : i + 4096] = torch.from_numpy(np.array(images[i : i + 4096]))
    return resident


def batches(
    images: np.ndarray | Tensor, indices: Iterable[np.ndarray], device: torch.device, ahead: int = 3
) -> Iterator[Tensor]:
    """Batches images[i] for each array of indices i, as uint8 (n, S, S, 3) on the device.

    From memory-mapped images a thread gathers `ahead` batches in advance, into pinned memory when they go to a GPU.
    """
    if isinstance(images, Tensor):
        for index in indices:
            yield images[torch.from_numpy(index).to(device, non_blocking=True)]
        return

    def gather(index: np.ndarray) -> Tensor:
        batch = torch.from_numpy(images[index])
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as thread:
        queue: list[Future[Tensor]] = []
        try:
            for index in indices:
                queue.append(thread.submit(gather, index))
                if len(queue) > ahead:
                    yield queue.pop(0).result().to(device, non_blocking=True)
            while queue:
                yield queue.pop(0).result().to(device, non_blocking=True)
        finally:
            thread.shutdown(cancel_futures=True)


def from_uint8(batch: Tensor, symmetric: bool) -> Tensor:
    """Pixels (n, S, S, 3) of 0 to 255 as float32 (n, 3, S, S) in [0, 1] or, `symmetric`, in [-1, 1]; channels last."""
    x = batch.permute(0, 3, 1, 2).float()
    return x.div_(127.5).sub_(1) if symmetric else x.div_(255)


def to_unit(images: Tensor, symmetric: bool) -> Tensor:
    """Images of a network, in [-1, 1] if `symmetric`, as float32 in [0, 1]."""
    return images.float() / 2 + 0.5 if symmetric else images.float()


# ----------------------------------------------------------------------------------------------------------------------
# Seeds, devices, processes, signals


def set_seed(*key: int | str) -> None:
    """Seeds PyTorch's generators, on every device, by a purpose and a place in the run: (seed, "noise", epoch, step).

    The randomness of a step is thus a function of its place: a resumed run needs no stored generator state, and what
    happens in between, such as an evaluation, does not change it.
    """
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_seed() -> int:
    """A seed for a run that was given none."""
    return random.SystemRandom().randrange(2**31)


@dataclass(frozen=True)
class World:
    """This process among those that train together, and its device."""

    rank: int
    size: int
    local_rank: int  # among those of this machine
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


def join_world(cuda: bool, gpu_id: int) -> World:
    """Picks the device, and joins the other processes if torchrun started this one (NCCL on GPUs, gloo elsewhere).

    Raises:
        UsageError: no GPU, or not the one asked for.
    """
    if "LOCAL_RANK" not in os.environ:
        return World(0, 1, 0, pick_device(cuda, gpu_id))
    local_rank = int(os.environ["LOCAL_RANK"])
    device = pick_device(cuda, local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def leave_world() -> None:
    """Parts from the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(cuda: bool, gpu_id: int) -> torch.device:
    """The CPU, or the GPU of that number. Raises UsageError, saying what there is, when it is not there."""
    if not cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError("--cuda: PyTorch finds no CUDA GPU here; without the flag, training runs on the CPU")
    if gpu_id >= count:
        raise UsageError(f"--gpu_id={gpu_id}: there are {count} GPUs here, numbered from 0 to {count - 1}")
    device = torch.device("cuda", gpu_id)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode for a while."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def from_main(value: int, world: World) -> int:
    """The main process's value, in every process."""
    shared = torch.tensor(value, device=world.device)
    if world.size > 1:
        dist.broadcast(shared, 0)
    return int(shared)


def wait_for_all(world: World) -> None:
    """Holds each process until all have come here."""
    if world.size > 1:
        dist.barrier()


def gather_with_gradient(x: Tensor, world: World) -> Tensor:
    """The rows of all processes, in rank order: (n, ...) to (size n, ...), differentiable."""
    return torch.cat(torch.distributed.nn.functional.all_gather(x)) if world.size > 1 else x


def average(values: Tensor, world: World) -> Tensor:
    """The mean over processes, for reporting."""
    values = values / world.size
    if world.size > 1:
        dist.all_reduce(values)  # in place, and so not on the caller's own
    return values


def let_others_speak(unless_main: bool = False) -> None:
    """To call in a process that has failed: time for torchrun to end it, if another failed before and said why."""
    if int(os.environ.get("RANK", 0)) > 0 or ("RANK" in os.environ and not unless_main):
        time.sleep(10)  # an interpreter that has loaded PyTorch may take seconds to end


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the block ends."""
    held: list[int] = []
    before = {s: signal.signal(s, lambda number, _: held.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        for number in held[:1]:
            signal.raise_signal(number)


class StopRequest:
    """Within this context the first SIGINT or SIGTERM is only noted, and a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        if self.signal is not None and dist.is_initialized() and error and issubclass(error, RuntimeError):
            signal.raise_signal(self.signal)  # this step cannot end: another process is gone, hence the signal

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if "RANK" not in os.environ:
            warn("stopping after this step; Ctrl-C again stops at once")
        elif os.environ["RANK"] == "0":
            warn("stopping soon")

    def agreed(self, world: World) -> int | None:
        """The signal that any of the processes got, known to all of them; to be called by all at the same step."""
        if world.size == 1:
            return self.signal
        number = torch.tensor(self.signal or 0, device=world.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number) or None


def warn(message: str) -> None:
    """A line on standard error, clear of any progress bar."""
    tqdm.write(f"main.py: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by the state, whole or not at all. Raises UserError if it cannot be written."""
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError | KeyboardInterrupt | SystemExit):
                raise error.__context__ from None  # a full disk or a signal, which torch.save covers with its own words
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; tensors and plain values only, so that nothing in the file is ever executed.

    Raises:
        UserError: no such file, or not a checkpoint.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a strange file makes torch.load wonder about
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--checkpoint={path}: no such file") from None
    except OSError as error:
        raise UserError(f"--checkpoint={path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a broken or hostile file makes torch.load and pickle fail in many ways
        raise UserError(
            f"--checkpoint={path}: not a whole checkpoint of this program ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("flags"), dict):
        raise UserError(f"--checkpoint={path}: not a checkpoint of this program")
    return state


def load_adam(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over the moments in an Adam's state; its settings stay. Raises ValueError if they are of other weights."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
    for weight, moments in optimizer.state.items():
        expected = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        if {name: value.shape for name, value in moments.items()} != expected:
            raise ValueError("moments of other weights")


# ----------------------------------------------------------------------------------------------------------------------
# The log


def log_rows(text: str) -> list[dict[str, str]]:
    """The rows of a log, by column; a column without a value has an empty string."""
    return list(csv.DictReader(io.StringIO(text)))


class Log:
    """`log.csv`, a row at a time, and the same numbers in TensorBoard if asked for.

    `text`, all that was logged so far, goes into each checkpoint, and a resumed run starts from it: rows that an
    interrupted run wrote after its last checkpoint are replaced, not repeated.
    """

    def __init__(self, folder: Path, columns: Sequence[str], text: str = "", tensorboard: bool = False):
        self.path = folder / "log.csv"
        self.columns = columns
        self.text = text or ",".join(columns) + "\r\n"
        with replacing(self.path) as file:
            file.write(self.text.encode())
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            steps = [int(row["step"]) for row in self.rows()]
            self._board = SummaryWriter(str(folder), purge_step=steps[-1] + 1 if steps else None)

    def add(self, **values: float) -> None:
        """Appends a row; columns without a value stay empty."""
        line = io.StringIO()
        csv.DictWriter(line, self.columns).writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        )
        self.text += line.getvalue()
        try:
            with open(self.path, "a", newline="") as file:
                file.write(line.getvalue())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        for name, value in values.items():
            if self._board and name not in ("epoch", "step"):
                self._board.add_scalar(name, value, values["step"])

    def add_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Shows a picture in TensorBoard."""
        if self._board:
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def rows(self) -> list[dict[str, str]]:
        """All rows so far."""
        return log_rows(self.text)

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._board:
            self._board.close()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def grid(images: Tensor, columns: int) -> Image.Image:
    """A picture of images (N, 3, S, S) in [0, 1], row by row."""
    canvas = make_grid(images.cpu().clamp(0, 1), nrow=columns, padding=2, pad_value=1)
    return Image.fromarray((canvas * 255 + 0.5).byte().permute(1, 2, 0).numpy())


def alternate_rows(above: Tensor, below: Tensor, columns: int) -> Tensor:
    """Images (N, ...) and (N, ...) ordered such that a grid of so many columns has each `above` over its `below`."""
    pairs = zip(above.split(columns), below.split(columns), strict=True)
    return torch.cat([row for pair in pairs for row in pair])


def save_picture(path: Path, picture: Image.Image) -> None:
    """Replaces `path` by the picture as PNG."""
    with replacing(path) as file:
        picture.save(file, "PNG")


def save_each(folder: Path, images: Iterator[Tensor]) -> None:
    """Replaces the folder by one of a file an image, `00000.png` and on, of batches (n, 3, S, S) in [0, 1]."""
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        number = 0
        for batch in images:
            for pixels in (batch.clamp(0, 1) * 255 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy():
                Image.fromarray(pixels).save(aside / f"{number:05d}.png")
                number += 1
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the images of {folder}: {error.strerror or error}") from error


INK, BLUE, ORANGE, PALE = (40, 40, 40), (31, 119, 180), (255, 127, 14), (225, 225, 225)


def scatter(first: np.ndarray, second: np.ndarray, names: tuple[str, str], axes: tuple[str, str]) -> Image.Image:
    """A square picture of two clouds of points in the plane, (N, 2) and (M, 2); the second is drawn on top."""
    side, margin, scale = 600, 40, 2  # drawn twice as large and reduced, for smooth edges
    picture = Image.new("RGB", (side * scale, side * scale), "white")
    draw = ImageDraw.Draw(picture)
    reach = max(float(np.quantile(np.abs(np.concatenate([first, second])), 0.999)) * 1.1, 1e-6)

    def place(points: np.ndarray) -> np.ndarray:
        return (side / 2 + points * [1, -1] / reach * (side / 2 - margin)) * scale

    x0, y0 = place(np.zeros(2))
    draw.line([(0, y0), (side * scale, y0)], PALE, scale)
    draw.line([(x0, 0), (x0, side * scale)], PALE, scale)
    for points, colour in ((first, ORANGE), (second, BLUE)):
        for x, y in place(points):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), names[0], ORANGE)
    draw.text((10, 24), names[1], BLUE)
    draw.text((side - 10, side / 2 + 4), axes[0], INK, anchor="ra")
    draw.text((side / 2 + 6, 8), f"{axes[1]}   (edge: {reach:.2g})", INK)
    return picture


def curves(panels: dict[str, tuple[list[float], list[float]]]) -> Image.Image:
    """A picture of one curve a panel, one below the other: name to (steps, values)."""
    width, height, left, scale = 800, 180, 90, 2
    picture = Image.new("RGB", (width * scale, height * len(panels) * scale), "white")
    labels = []
    for row, (name, (steps, values)) in enumerate(panels.items()):
        top, bottom = row * height + 30, (row + 1) * height - 20
        low, high = min(values), max(values)
        across = np.interp(steps, [steps[0], max(steps[-1], steps[0] + 1)], [left, width - 15])
        down = np.interp(values, [low, max(high, low + 1e-12)], [bottom, top])
        points = [(x * scale, y * scale) for x, y in zip(across, down, strict=True)]
        draw = ImageDraw.Draw(picture)
        draw.rectangle([left * scale, top * scale, (width - 15) * scale, bottom * scale], outline=PALE, width=scale)
        draw.line(points, BLUE, 2 * scale, joint="curve")
        labels += [((left, top - 18), name, "la"), ((left - 8, top), f"{high:.3g}", "ra")]
        labels += [
            ((left - 8, bottom - 10), f"{low:.3g}", "ra"),
            ((width - 15, bottom + 4), f"step {steps[-1]:g}", "ra"),
        ]
    picture = picture.resize((width, height * len(panels)), Image.Resampling.LANCZOS)
    for place, text, anchor in labels:
        ImageDraw.Draw(picture).text(place, text, INK, anchor=anchor)
    return picture


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def sharpness(images: Tensor) -> Tensor:
    """Variance of each image after a Laplace filter on its grey values, for images (N, 3, S, S) in [0, 1], as (N,).

    The paper's measure of blur (section 5): a blurred image has weak edges, and so a small variance.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device).view(1, 1, 3, 3)
    return F.conv2d((images * weights).sum(1, keepdim=True), laplace).flatten(1).var(1, correction=0)
