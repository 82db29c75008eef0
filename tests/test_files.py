"""Files are whole or not there, whatever happens to the disk, and a folder belongs to one process."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from engine.errors import Failed, Refused
from engine.files import append_json, locked, read_json, write_atomically, write_json

ROOT = Path(__file__).resolve().parents[1]
needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")


def write(path: Path, content: bytes, **options) -> None:
    write_atomically(path, lambda file: file.write(content), **options)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run(code: str, *arguments: Path | str) -> subprocess.Popen:
    """A process of its own with ``code``; its words are in ``sys.argv``."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- writing


def test_a_file_is_written_and_nothing_else(tmp_path):
    write(tmp_path / "a.bin", b"content")
    assert (tmp_path / "a.bin").read_bytes() == b"content"
    assert names_in(tmp_path) == {"a.bin"}


def test_a_file_is_replaced(tmp_path):
    write(tmp_path / "a.bin", b"a long first content")
    write(tmp_path / "a.bin", b"second")
    assert (tmp_path / "a.bin").read_bytes() == b"second"
    assert names_in(tmp_path) == {"a.bin"}


def test_the_old_content_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    write(path, b"first")
    seen = []
    write_atomically(path, lambda file: (file.write(b"sec"), file.flush(), seen.append(path.read_bytes())))
    assert seen == [b"first"]


def test_the_previous_content_is_kept_under_its_name(tmp_path):
    path, previous = tmp_path / "a.bin", tmp_path / "a.previous.bin"
    for content in (b"first", b"second", b"third"):
        write(path, content, keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"third", b"second")


def test_there_is_no_previous_content_the_first_time(tmp_path):
    write(tmp_path / "a.bin", b"first", keep_previous=tmp_path / "b.bin")
    assert names_in(tmp_path) == {"a.bin"}


def test_lines_are_appended(tmp_path):
    for number in (1, 2):
        append_json(tmp_path / "log", {"epoch": number})
    assert (tmp_path / "log").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"name": "größe", "numbers": [1, 0.1, None], "deep": {"flag": True}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content == json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text("\N{BYTE ORDER MARK}" + (tmp_path / "a.json").read_text())
    assert read_json(tmp_path / "b.json") == content


@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe\x00"])
def test_json_that_is_none_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Refused, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")


# --- a disk that is full or refuses


@needs_full_device
def test_what_was_there_survives_a_full_disk(tmp_path):
    """The temporary file is a link to the device that is always full."""
    path, previous = tmp_path / "a.bin", tmp_path / "b.bin"
    write(path, b"first")
    write(path, b"second", keep_previous=previous)
    (tmp_path / ".a.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(Failed, match=rf"cannot write {path}: No space left on device; what was saved before is intact"):
        write(path, b"third", keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"second", b"first")
    assert names_in(tmp_path) == {"a.bin", "b.bin"}


@needs_full_device
def test_a_line_that_does_not_fit_is_one_sentence():
    with pytest.raises(Failed, match="cannot write /dev/full: No space left on device"):
        append_json(Path("/dev/full"), {})


def test_what_was_there_survives_when_the_disk_fills_while_writing(tmp_path):
    """A process that may write files of at most 64 KiB saves 1 MiB over 4 bytes."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"good")
    code = """
        import resource, sys
        from pathlib import Path
        from engine.errors import Failed
        from engine.files import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        try:
            write_atomically(Path(sys.argv[1]), lambda file: [file.write(bytes(2**14)) for _ in range(64)])
        except Failed as error:
            print(error)
    """
    assert f"cannot write {path}: File too large" in run(code, path).communicate()[0]
    assert path.read_bytes() == b"good"
    assert names_in(tmp_path) == {"a.bin"}


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"good")
    code = """
        import os, signal, sys
        from pathlib import Path
        from engine.files import write_atomically
        def write(file):
            file.write(b"bad")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(Path(sys.argv[1]), write)
    """
    process = run(code, path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"good"
    write(path, b"new")
    assert names_in(tmp_path) == {"a.bin"}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "missing" / "a.bin"
    with pytest.raises(Failed, match=f"cannot write {path}: No such file or directory"):
        write(path, b"content")


OVERWRITE = """
    import sys
    from pathlib import Path
    from engine.files import write_atomically
    for _ in range(200):
        write_atomically(Path(sys.argv[1]), lambda file: [file.write(sys.argv[2].encode()) for _ in range(100)])
"""


def test_two_writers_of_a_file_do_not_mix(tmp_path):
    path = tmp_path / "a.bin"
    write(path, b"a" * 100)
    writers = [run(OVERWRITE, path, letter) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert path.read_bytes() in (b"a" * 100, b"b" * 100)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


# --- locks


HOLD = """
    import sys
    from pathlib import Path
    from engine.files import locked
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def assert_held(folder: Path) -> None:
    with pytest.raises(Failed, match=f"another process is at work in {folder}"), locked(folder):
        pass


def assert_free(folder: Path) -> None:
    with locked(folder):
        pass


def test_a_lock_makes_its_folder_and_can_be_taken_again(tmp_path):
    folder = tmp_path / "deep" / "run"
    for _ in range(2):
        with locked(folder):
            assert folder.is_dir()


def test_a_folder_held_by_another_process_is_refused_until_it_lets_go(tmp_path):
    process = run(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    assert_held(tmp_path)
    process.communicate()  # closes its standard input, at which it ends
    assert_free(tmp_path)


def test_a_folder_held_by_another_process_can_be_waited_for(tmp_path):
    process = run(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    threading.Timer(0.2, process.stdin.close).start()
    with locked(tmp_path, wait=True):
        assert process.wait() == 0


def test_a_lock_dies_with_its_process(tmp_path):
    process = run(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.communicate()
    assert_free(tmp_path)


def test_a_lock_is_let_go_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="inside"), locked(tmp_path):
        raise ValueError("inside")
    assert_free(tmp_path)


def test_locks_of_two_folders_have_nothing_to_do_with_each_other(tmp_path):
    process = run(HOLD, tmp_path / "a")
    assert process.stdout.readline() == "held\n"
    assert_free(tmp_path / "b")
    process.communicate()


FORK = """
    import os, sys, time
    from pathlib import Path
    from engine.files import locked
    with locked(Path(sys.argv[1])):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
        print(worker, flush=True)
        sys.stdin.read()
"""


def test_a_worker_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    process = run(FORK, tmp_path)
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert_free(tmp_path)
    os.kill(worker, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_folder_with_a_file_in_its_way_is_refused(name, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Refused, match=f"{tmp_path / name} cannot be a folder"), locked(tmp_path / name):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Failed, match="Permission denied"):
        write(tmp_path / "a.bin", b"content")
    with pytest.raises(Failed, match="Permission denied"):
        append_json(tmp_path / "log", {})
    tmp_path.chmod(0o700)
