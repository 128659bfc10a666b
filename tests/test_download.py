"""download_datasets.py against a local server that does what the real host does, and the toy faces.

Most tests call the program's `main`; what needs a process (Ctrl-C, two at once, memory) has one of its own. Only the
MD5, size and number of images of the zip (a small one) and the pauses are replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_drive import BLOCK, QUOTA_PAGE, FakeDrive, Pattern, Reply
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
import download_datasets as dd  # noqa: E402

N_IMAGES = 6
HEAD = "img_align_celeba"


def make_zip(members: dict[str, bytes] | None = None) -> bytes:
    """Return a zip like CelebA's: one folder entry and N_IMAGES files of 100 kB that do not compress."""
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{HEAD}/", "")
        for i in range(1, N_IMAGES + 1):
            archive.writestr(f"{HEAD}/{i:06d}.jpg", rng.bytes(100_000))
        for name, content in (members or {}).items():
            archive.writestr(name, content)
    return out.getvalue()


ZIP = make_zip()


def small_zip(content: bytes) -> dict[str, object]:
    """Return what the program has to know of a zip, by the names of its constants."""
    md5 = hashlib.md5(content).hexdigest()
    return {"CELEBA_MD5": md5, "CELEBA_SIZE": len(content), "CELEBA_IMAGES": N_IMAGES}


def here(*arguments: object, **constants: object) -> subprocess.CompletedProcess:
    """Run the command line in this process, with `constants` in place of the program's own and without its pauses."""
    out, err, slept = io.StringIO(), io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(dd, "time", SimpleNamespace(sleep=slept.append))
        for name, value in constants.items():
            patch.setattr(dd, name, value)
        try:
            status = dd.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            status = stop.code
    return subprocess.CompletedProcess(slept, status, out.getvalue(), err.getvalue())


def celeba(tmp_path: Path, *options: object, content: bytes = ZIP, **constants) -> subprocess.CompletedProcess:
    return here("celebA", "--data_dir", tmp_path / "data", *options, **(small_zip(content) | constants))


def start_celeba(tmp_path: Path, url: str) -> subprocess.Popen:
    """Start the download of ZIP in a process of its own."""
    arguments = ["celebA", "--data_dir", str(tmp_path / "data"), "--url", url]
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r}); import download_datasets as dd; "
        f"vars(dd).update({small_zip(ZIP)!r}); sys.exit(dd.main({arguments!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)


def fetch(tmp_path: Path, *replies: Reply, front: str = "form", **constants):
    """Run the download from a server with `replies`; return (process, server)."""
    with FakeDrive(ZIP, replies or (Reply(),), front) as drive:
        return celeba(tmp_path, "--url", drive.url, **constants), drive


def partial(tmp_path: Path) -> Path:
    """Return the path of a partial download, in a folder that is there."""
    path = tmp_path / "data" / "celebA" / ".partial" / f"{HEAD}.zip.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def assert_complete(tmp_path: Path, run: subprocess.CompletedProcess) -> None:
    """The images are there byte for byte, with nothing beside them, and there was no complaint."""
    assert (run.returncode, run.stderr) == (0, ""), run
    with zipfile.ZipFile(io.BytesIO(ZIP)) as archive:
        for i in range(1, N_IMAGES + 1):
            name = f"{HEAD}/{i:06d}.jpg"
            assert (tmp_path / "data" / "celebA" / name).read_bytes() == archive.read(name)
    assert tree(tmp_path / "data") == [f"celebA/{HEAD}/{i:06d}.jpg" for i in range(1, N_IMAGES + 1)]
    assert [path.name for path in (tmp_path / "data" / "celebA").iterdir()] == [HEAD]


def assert_failed(run: subprocess.CompletedProcess, *words: str, status: int = 1) -> None:
    """It ends with `status` and exactly one line on stderr that has all `words`."""
    assert run.returncode == status, run
    assert len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr, (word, run.stderr)


# what comes before the file


@pytest.mark.parametrize("front", ["form", "cookie", "none"])
def test_way_to_the_file(tmp_path, front):
    run, drive = fetch(tmp_path, front=front)
    assert_complete(tmp_path, run)
    assert len(drive.asked) == (1 if front == "none" else 2)


def test_quota_page_says_what_to_do_and_saves_nothing(tmp_path):
    run, drive = fetch(tmp_path, Reply(page=QUOTA_PAGE))
    assert_failed(run, "quota", "mmlab.ie.cuhk.edu.hk", "download_datasets.py celebA --zip")
    assert len(drive.ranges()) == 1, "a spent quota is not tried again"
    assert tree(tmp_path) == []


def test_quota_page_in_the_middle_keeps_the_partial_file(tmp_path):
    run, _ = fetch(tmp_path, Reply(cut=3 * BLOCK), Reply(page=QUOTA_PAGE))
    assert_failed(run, "quota")
    assert partial(tmp_path).read_bytes() == ZIP[: 3 * BLOCK]


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream"])
def test_web_page_is_never_the_zip(tmp_path, kind):
    run, _ = fetch(tmp_path, Reply(page="<html><title>Sign in</title></html>", page_type=kind))
    assert_failed(run, "web page ('Sign in')", "--zip")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream"])
def test_web_page_does_not_replace_the_partial_file(tmp_path, kind):
    partial(tmp_path).write_bytes(ZIP[:300_000])
    run, _ = fetch(tmp_path, Reply(page="<html>Sign in</html>", page_type=kind))
    assert_failed(run, "--zip")
    assert partial(tmp_path).read_bytes() == ZIP[:300_000]


def test_page_that_leads_to_itself_ends(tmp_path):
    with FakeDrive(ZIP, front="form") as drive:
        drive.server.RequestHandlerClass.confirmed = lambda *_: False
        assert_failed(celeba(tmp_path, "--url", drive.url), "web page")
        assert len(drive.asked) < 10


# broken connections


def test_cut_connections_are_resumed_in_the_same_run(tmp_path):
    run, drive = fetch(tmp_path, Reply(cut=2 * BLOCK), Reply(cut=0), Reply(cut=4 * BLOCK), Reply())
    assert_complete(tmp_path, run)
    assert drive.ranges() == [None, f"bytes={2 * BLOCK}-", f"bytes={2 * BLOCK}-", f"bytes={6 * BLOCK}-"]


def test_file_without_a_length_is_judged_by_its_md5(tmp_path):
    run, _ = fetch(tmp_path, Reply(no_length=True, cut=2 * BLOCK))
    assert_failed(run, "MD5")
    assert tree(tmp_path) == []
    assert_complete(tmp_path, fetch(tmp_path, Reply(no_length=True))[0])


def test_partial_file_is_resumed_by_the_next_call(tmp_path):
    partial(tmp_path).write_bytes(ZIP[:300_000])
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.ranges() == ["bytes=300000-"]


def test_host_without_ranges_starts_from_zero(tmp_path):
    run, drive = fetch(tmp_path, Reply(cut=2 * BLOCK), Reply(ranges=False))
    assert_complete(tmp_path, run)
    assert drive.ranges() == [None, f"bytes={2 * BLOCK}-"]


def test_host_without_ranges_that_cuts_at_the_same_place_is_given_up(tmp_path):
    run, drive = fetch(tmp_path, Reply(ranges=False, cut=2 * BLOCK))
    assert_failed(run, "no headway", "--zip")
    assert len(drive.ranges()) == 1 + dd.MAX_STALLED


def test_answer_from_the_wrong_place_is_not_appended(tmp_path):
    run, drive = fetch(tmp_path, Reply(cut=2 * BLOCK), Reply(shift=-7), Reply())
    assert_complete(tmp_path, run)
    assert drive.ranges() == [None, f"bytes={2 * BLOCK}-", None]


@pytest.mark.parametrize("bare", [False, True])
def test_416_for_a_whole_file(tmp_path, bare):
    partial(tmp_path).write_bytes(ZIP)
    run, drive = fetch(tmp_path, Reply(bare_416=bare))
    assert_complete(tmp_path, run)
    assert len(drive.ranges()) == 1


def test_416_for_a_partial_file_that_is_too_long(tmp_path):
    partial(tmp_path).write_bytes(ZIP + b"more")
    assert_failed(fetch(tmp_path)[0], "wrong file", "once more")
    assert_complete(tmp_path, fetch(tmp_path)[0])


# a host that is busy, refuses, or is not there


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_host_is_tried_again(tmp_path, status):
    run, drive = fetch(tmp_path, Reply(status=status), Reply(status=status), Reply())
    assert_complete(tmp_path, run)
    assert len(drive.ranges()) == 3


def test_tries_are_bounded_and_pauses_grow(tmp_path):
    run, drive = fetch(tmp_path, Reply(status=503))
    assert_failed(run, "503")
    assert len(drive.ranges()) == dd.MAX_STALLED
    assert run.args == [2**i for i in range(dd.MAX_STALLED - 1)], "seconds"


def test_tries_that_bring_something_are_not_counted(tmp_path):
    run, drive = fetch(tmp_path, Reply(cut=BLOCK), MAX_STALLED=1)
    assert_complete(tmp_path, run)
    assert len(drive.ranges()) == 1 + len(ZIP) // BLOCK


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_is_final(tmp_path, status):
    run, drive = fetch(tmp_path, Reply(status=status))
    assert_failed(run, str(status), "--zip")
    assert len(drive.ranges()) == 1


def test_no_network(tmp_path):
    with FakeDrive(ZIP) as drive:
        url = drive.url
    assert_failed(celeba(tmp_path, "--url", url), "refused", "--zip")
    assert not (tmp_path / "data" / "celebA").exists()


def test_silent_host_times_out(tmp_path):
    run, _ = fetch(tmp_path, Reply(block_s=5), TIMEOUT_S=(0.2, 0.2), MAX_STALLED=2)
    assert_failed(run, "timed out")


def test_address_that_is_none(tmp_path):
    assert_failed(celeba(tmp_path, "--url", "ftp://host/file"), "cannot read ftp://host/file", "--zip")


# is it the right file


@pytest.mark.parametrize("replies", [[Reply(flip=True)], [Reply(cut=2 * BLOCK, flip=True), Reply()]])
def test_wrong_file_is_deleted_and_reported(tmp_path, replies):
    run, drive = fetch(tmp_path, *replies)
    assert_failed(run, "MD5", "once more", "--zip")
    assert len(drive.ranges()) == len(replies)
    assert tree(tmp_path) == []


# interrupted, twice at once, killed


def wait_for(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def test_interrupt_keeps_what_came(tmp_path):
    with FakeDrive(ZIP, (Reply(block_s=0.1),)) as drive:
        process = start_celeba(tmp_path, drive.url)
        wait_for(lambda: has_bytes(partial(tmp_path)))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=15)
    assert process.returncode == 130
    assert len(stderr.strip().splitlines()) == 1 and "again" in stderr
    had = partial(tmp_path).stat().st_size
    assert partial(tmp_path).read_bytes() == ZIP[:had] and had > 0
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.ranges() == [f"bytes={had}-"]


def test_second_download_into_the_same_folder_stands_back(tmp_path):
    with FakeDrive(ZIP, (Reply(block_s=0.1),)) as drive:
        first = start_celeba(tmp_path, drive.url)
        wait_for(lambda: has_bytes(partial(tmp_path)))
        assert_failed(celeba(tmp_path, "--url", drive.url), "another run", "--data_dir")
        stdout, stderr = first.communicate(timeout=30)
    assert_complete(tmp_path, subprocess.CompletedProcess([], first.returncode, stdout, stderr))


def test_killed_extraction_is_not_taken_for_a_whole_one(tmp_path):
    work = partial(tmp_path).parent
    (work / HEAD).mkdir(parents=True)  # what a kill -9 in the middle leaves
    (work / HEAD / "000001.jpg").write_bytes(b"half")
    (work / HEAD / "999999.jpg").write_bytes(b"of another day")
    (work / f"{HEAD}.zip").write_bytes(ZIP)
    (work / "lock").touch()
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.asked == [], "the zip was here"


def test_second_call_needs_no_network(tmp_path):
    assert_complete(tmp_path, fetch(tmp_path)[0])
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert "already" in run.stdout and drive.asked == []


def test_incomplete_folder_is_reported_and_left(tmp_path):
    folder = tmp_path / "data" / "celebA" / HEAD
    folder.mkdir(parents=True)
    (folder / "000001.jpg").write_bytes(b"mine")
    run, drive = fetch(tmp_path)
    assert_failed(run, str(folder), "1 images", "remove", "--data_dir")
    assert (folder / "000001.jpg").read_bytes() == b"mine" and drive.asked == []


# a zip fetched by hand


def test_zip_by_hand_is_extracted_and_kept(tmp_path):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(ZIP)
    assert_complete(tmp_path, celeba(tmp_path, "--zip", str(mine)))
    assert mine.read_bytes() == ZIP


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["no such file"]), (b"<html>", ["MD5", "mmlab"]), (make_zip({"extra": b""}), ["MD5"])],
)
def test_zip_by_hand_that_will_not_do(tmp_path, content, words):
    mine = tmp_path / "mine.zip"
    if content is not None:
        mine.write_bytes(content)
    assert_failed(celeba(tmp_path, "--zip", str(mine)), "--zip", str(mine), *words)
    assert tree(tmp_path) == (["mine.zip"] if content is not None else [])


def linked() -> bytes:
    link = zipfile.ZipInfo(f"{HEAD}/000007.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return make_zip({link: b"/etc/passwd"})


@pytest.mark.parametrize(
    "content",
    [
        *(make_zip({name: b"x"}) for name in ("../out.jpg", f"{HEAD}/../../out.jpg", "/tmp/out.jpg", "C:/out.jpg")),
        make_zip({f"{HEAD}/..\\out.jpg": b"x"}),
        linked(),
    ],
)
def test_members_that_leave_the_folder_are_refused(tmp_path, content):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(content)
    assert_failed(celeba(tmp_path, "--zip", str(mine), content=content), "leave its folder")
    assert tree(tmp_path) == ["mine.zip"]


def test_other_members_are_left_out_and_missing_images_are_noticed(tmp_path):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(make_zip({"notes.txt": b"x"}))
    run = celeba(tmp_path, "--zip", str(mine), content=mine.read_bytes())
    assert_complete(tmp_path, run)
    mine.write_bytes(make_zip({f"{HEAD}/000007.jpg": b"x"}))
    run = celeba(tmp_path, "--zip", str(mine), "--data_dir", str(tmp_path / "b"), content=mine.read_bytes())
    assert_failed(run, "7 images", "not 6")


def test_damaged_zip_with_the_right_md5(tmp_path):
    damaged = bytearray(ZIP)
    damaged[250_000] ^= 1
    mine = tmp_path / "mine.zip"
    mine.write_bytes(damaged)
    assert_failed(celeba(tmp_path, "--zip", str(mine), content=bytes(damaged)), "not a sound zip")
    assert tree(tmp_path) == ["mine.zip"]


# the disk


def test_too_small_a_disk_is_noticed_up_front(tmp_path):
    run, drive = fetch(tmp_path, CELEBA_SIZE=10**18)
    assert_failed(run, "GB free", "--data_dir")
    assert drive.asked == [] and tree(tmp_path) == []


def test_disk_that_fills_up_during_the_download(tmp_path):
    partial(tmp_path).symlink_to("/dev/full")  # each write to it fails as on a full disk
    assert_failed(fetch(tmp_path)[0], "No space left", "make room")
    assert not (tmp_path / "data" / "celebA" / HEAD).exists()


def test_disk_that_fills_up_during_the_extraction(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda _, data: os.write(os.open("/dev/full", os.O_WRONLY), data))
        assert_failed(fetch(tmp_path)[0], "No space left", "make room")
    assert tree(tmp_path) == [f"data/celebA/.partial/{HEAD}.zip"], "the zip is kept, no image is"
    run, drive = fetch(tmp_path)
    assert_complete(tmp_path, run)
    assert drive.asked == []


@pytest.mark.parametrize("kind", ["file", "missing", "readonly"])
def test_data_dir_that_cannot_be_written(tmp_path, kind):
    folder = {"file": tmp_path / "file", "missing": Path("/proc/nothing/here"), "readonly": tmp_path / "ro"}[kind]
    (tmp_path / "file").touch()
    (tmp_path / "ro").mkdir(mode=0o500)
    if kind == "readonly" and os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    for arguments in (["celebA", "--url", "http://127.0.0.1:1/"], ["toy", "--n_images", "2"]):
        assert_failed(here(*arguments, "--data_dir", folder), f"--data_dir {folder}")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["toy", "--n_images", "0"], "--n_images"),
        (["toy", "--n_images", "1000000"], "1..999999"),
        (["toy", "--seed", "-1"], "--seed"),
        (["toy", "--seed", "1.5"], "--seed"),
        (["celebA", "--url", "http://host/f", "--zip", "f"], "--zip"),
        (["celebA", "--n_images", "3"], "--n_images"),
        (["celeba"], "celebA"),
        ([], "celebA"),
    ],
)
def test_bad_options(arguments, word):
    assert_failed(here(*arguments), word, status=2)


def test_it_starts_without_torch():
    code = "import sys, download_datasets; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert run.stdout.strip() == "False", run


# memory


def peak_memory_mb(tmp_path: Path, length: int) -> float:
    """Return the peak of resident memory, in MB, of a process that downloads `length` bytes."""
    content = Pattern(length)
    with FakeDrive(content, (Reply(cut=length // 2), Reply())) as drive:
        code = (
            f"import sys; sys.path.insert(0, {str(REPO)!r}); import pathlib, re, download_datasets as dd; "
            f"dd.CELEBA_MD5, dd.time.sleep = {content.md5()!r}, print; "
            f"dd.download({drive.url!r}, pathlib.Path({str(tmp_path / 'zip')!r})); "
            # not ru_maxrss, which a process starts with from the one that started it
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (tmp_path / "zip").stat().st_size == length
    (tmp_path / "zip").unlink()
    return int(run.stdout.split()[-1]) / 1024


def test_memory_does_not_grow_with_the_file(tmp_path):
    small, large = peak_memory_mb(tmp_path, 3_000_000), peak_memory_mb(tmp_path, 100_000_000)
    print(f"peak memory: {small:.0f} MB for a file of 3 MB, {large:.0f} MB for one of 100 MB")
    assert large < small + 35


# toy faces


TOY = [sys.executable, str(REPO / "download_datasets.py"), "toy", "--data_dir"]


def test_toy_set(tmp_path):
    command = [*TOY, str(tmp_path), "--n_images", "40", "--seed", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, ""), run
    folder = tmp_path / "toy" / "img_align_toy"
    names = sorted(path.name for path in folder.glob("*.jpg"))
    assert names == [f"{i:06d}.jpg" for i in range(1, 41)]
    assert list((tmp_path / "toy").iterdir()) == [folder], "nothing is left beside it"
    for name in names:
        with Image.open(folder / name) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (178, 218))
    # one process, another order, fewer images: the same bytes
    for i in (40, 7):
        dd.save_face(tmp_path, 3, i)
        assert (tmp_path / f"{i:06d}.jpg").read_bytes() == (folder / f"{i:06d}.jpg").read_bytes()
    same = ["toy", "--data_dir", tmp_path, "--n_images", 40, "--seed", 3]
    before = (folder / "000001.jpg").stat().st_mtime_ns
    again = here(*same)
    assert again.returncode == 0 and "already" in again.stdout
    assert (folder / "000001.jpg").stat().st_mtime_ns == before
    for other in (["--n_images", 41], ["--seed", 0]):
        assert_failed(here(*same, *other), "another set", str(folder), "--data_dir")
    (folder / "000002.jpg").unlink()
    assert_failed(here(*same), "another set")


def test_toy_run_stands_back_while_another_draws(tmp_path):
    work = tmp_path / "toy" / ".partial"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_failed(here("toy", "--data_dir", tmp_path, "--n_images", 2), "another run")
    assert (work / "lock").exists()


def test_toy_interrupt_leaves_nothing(tmp_path):
    process = subprocess.Popen([*TOY, str(tmp_path)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob("toy/.partial/*/*.jpg")))
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to the parent and to all workers
    _, stderr = process.communicate(timeout=15)
    assert process.returncode == 130 and len(stderr.strip().splitlines()) == 1, stderr
    assert list(tmp_path.iterdir()) == []


def test_toy_faces_vary_and_sit_where_celeba_has_them():
    faces = np.stack([np.asarray(dd.draw_face(0, i), np.float32) for i in range(1, 65)])
    middle = faces[:, 39:179, 19:159].mean(-1)
    assert middle.std(0).mean() > 25, "from face to face"
    assert middle.std((1, 2)).min() > 15, "within each"
    assert not np.array_equal(dd.draw_face(0, 1), dd.draw_face(1, 1))
    # on average an eye is darker than the cheek below it and the forehead above
    mean = middle.mean(0)
    for x in (50, 90):
        eye, cheek, forehead = (mean[y - 3 : y + 4, x - 4 : x + 5].mean() for y in (72, 92, 45))
        assert eye < cheek - 5 and eye < forehead + 20
