"""An output folder: held by one process at a time, and rid of what a killed one left in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minilora.errors import MiniloraError
from minilora.formats.files import TEMPORARY, Content, errors_naming, make_folder, write_folder

LOCK = ".minilora-lock"
# What the file managers of macOS and Windows leave in a folder that somebody looked at.
CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
FAR = 1 << 30  # the byte that Windows locks, beyond any that is read


def entries(folder: Path) -> list[str]:
    """The names of what a folder holds, without our own lock and temporary files."""
    names = sorted(path.name for path in folder.iterdir())
    return [n for n in names if n not in {LOCK, *CLUTTER} and not TEMPORARY.fullmatch(n)]


@contextmanager
def held(folder: Path) -> Iterator[BinaryIO]:
    """Hold a folder, made where it is missing; a second process is refused at once.

    The lock is the system's, on a file in the folder, so that it ends with its process in whatever
    way that ends. First, what a killed process left half done is removed. Should the block fail and
    leave the folder empty, the folder goes again, with the parents that were made for it. Raises
    MiniloraError where another process holds it and where the system refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise MiniloraError(f"{folder} is a file; expected a folder to write to")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        with _locked(folder / LOCK) as lock:
            _clear(folder, lock)
            yield lock
    except BaseException:
        with suppress(OSError):  # it holds a checkpoint
            for path in made:
                path.rmdir()
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Callable[[Mapping[str, Content]], None]]:
    """Hold a folder that is new or empty; yields what writes its files, once, all to stay or none.

    If the block fails they are removed; after a kill, the next command into the folder does it: the
    lock's file names them until the block has succeeded. Raises MiniloraError as `held` does, and
    where the folder holds anything.
    """
    with held(folder) as lock:
        if there := entries(folder):
            raise MiniloraError(
                f"{folder} already holds {there[0]}; expected a new or an empty output folder"
            )

        def write(files: Mapping[str, Content]) -> None:
            with errors_naming(folder / LOCK):
                lock.write(json.dumps(list(files)).encode())
                lock.flush()
                os.fsync(lock.fileno())
            write_folder(folder, files)

        try:
            yield write
            with errors_naming(folder / LOCK):
                lock.truncate(0)  # from here on they stay
        except BaseException:
            _clear(folder, lock)
            raise


def _clear(folder: Path, lock: BinaryIO) -> None:
    """Remove temporary files, and what the lock's file names as not finished."""
    lock.seek(0)
    try:
        noted = json.loads(lock.read())
    except (ValueError, RecursionError):  # it is new, or was being written
        noted = []
    unfinished = {n for n in noted if isinstance(n, str)} if isinstance(noted, list) else set()
    for path in list(folder.iterdir()):
        if path.name in unfinished or TEMPORARY.fullmatch(path.name):
            with errors_naming(path):
                path.unlink()


# --- the lock ----------------------------------------------------------------------------------


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The open file at a path, locked; it is removed at the end."""
    with errors_naming(path):
        lock = path.open("a+b")
        _take(lock)
        while not _is_at(path, lock):  # its owner was just removing it
            lock.close()
            lock = path.open("a+b")
            _take(lock)
    try:
        yield lock
    finally:
        windows = sys.platform == "win32"  # which removes no open file: neither ours nor another's
        with lock, suppress(OSError):
            if not windows:
                path.unlink()
        with suppress(OSError):
            if windows:
                path.unlink()


def _take(lock: BinaryIO) -> None:
    """Lock a file without waiting; MiniloraError, the file being closed, where another has it.

    Nothing is locked where the system knows no locks: in WebAssembly, which has no second process,
    and on some network drives.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            lock.seek(FAR)
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        folder = Path(lock.name).parent
        raise MiniloraError(
            f"another run is writing to {folder}; wait for its end or choose another folder"
        ) from None
    except (ImportError, OSError):
        pass


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
