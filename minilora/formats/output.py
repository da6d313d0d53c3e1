"""A folder whose files belong together: one process writes there, and all files stay or none.

While a process holds a folder, a locked file notes which files are being replaced and where the old
ones are. If the process ends in whatever way before the new ones are to stay, the note is left, and
the next to write or read there puts the old ones back.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minilora.errors import MiniloraError
from minilora.formats.files import (
    HIDDEN,
    Content,
    errors_naming,
    file_checksum,
    flush_folder,
    hidden_name,
    make_folder,
    read_file,
    remove_temporaries,
    written_beside,
)

LOCK = ".minilora-lock"
# What the file managers of macOS and Windows leave in a folder that somebody looked at.
CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
DONE = b"\ndone"  # added to the notes once the new files are to stay
FAR = 1 << 30  # the byte that Windows locks, beyond any that is read


def entries(folder: Path) -> list[str]:
    """The names of what a folder holds, without our own lock and hidden files."""
    names = sorted(path.name for path in folder.iterdir())
    return [n for n in names if n not in {LOCK, *CLUTTER} and not HIDDEN.fullmatch(n)]


# --- writing -----------------------------------------------------------------------------------


def write_folder(folder: str | Path, files: Mapping[str, Content]) -> None:
    """Replace files of a folder, made where it is missing, all or none; other files stay.

    The last should be the one without which no reader opens the folder: its configuration. Raises
    MiniloraError where another process writes to the folder, and where the system refuses.
    """
    with held(Path(folder)) as hold:
        hold.write(files)


@contextmanager
def new_folder(folder: Path) -> Iterator[Callable[[Mapping[str, Content]], None]]:
    """Hold a folder that is new or empty; yields what writes its files, once, all to stay or none.

    If the block fails or is killed, they are removed. Raises MiniloraError as `held` does, and
    where the folder holds anything.
    """
    with held(folder) as hold, ExitStack() as until_the_end:
        if there := entries(folder):
            raise MiniloraError(
                f"{folder} already holds {there[0]}; expected a new or an empty output folder"
            )
        yield lambda files: until_the_end.enter_context(hold.replaced(files))


@contextmanager
def held(folder: Path, *, only_locked: bool = False) -> Iterator[Hold]:
    """Hold a folder, made where it is missing; a second process is refused at once.

    The lock is the system's, on a file in the folder, so that it ends with its process in whatever
    way that ends. First, what a killed process left half done is undone. Should the block fail and
    leave the folder empty, it is removed, with the parents that were made for it. Raises
    Busy where another process holds it, `only_locked` also where the system knows no locks;
    MiniloraError where the system refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise MiniloraError(f"{folder} is a file; expected a folder to write to")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        hold = Hold(folder, _locked(folder / LOCK, only_locked))
        try:
            hold.undo()
            remove_temporaries(folder)
            yield hold
        finally:
            hold.close()
    except BaseException:
        with suppress(OSError):  # it holds a checkpoint
            for path in made:
                path.rmdir()
        raise


class Replaced(NamedTuple):
    """A file that is being replaced."""

    path: Path
    old: str | None  # what the old file is called, beside it, while it is set aside
    new: int  # the new file's checksum

    @property
    def target(self) -> Path:
        """The file itself, where the path is a link."""
        return Path(os.path.realpath(self.path))

    @property
    def aside(self) -> Path | None:
        """Where the old file is, or will be."""
        return None if self.old is None else self.target.with_name(self.old)

    def is_new(self) -> bool:
        """Whether the new file is in its place, as a whole."""
        with suppress(OSError):  # another process may just be replacing it
            return self.target.is_file() and file_checksum(self.target) == self.new
        return False


class Hold:
    """A folder that this process holds; the lock's file notes what is being replaced."""

    def __init__(self, folder: Path, lock: BinaryIO) -> None:
        self.folder, self.lock = folder, lock
        self.files, self.is_done = _noted(folder)

    def write(self, files: Mapping[str, Content]) -> None:
        """Replace files of the folder, all or none; from then on they stay."""
        with self.replaced(files):
            self._mark_done()

    @contextmanager
    def replaced(self, files: Mapping[str, Content]) -> Iterator[None]:
        """Within, files are replaced; if the block fails or is killed, the old ones come back.

        Else the new ones stay, and the hold must end. All are written and flushed before the first
        is renamed. The old are set aside before, the last first, so that at no moment a reader
        finds the last beside others than its own. A link stays and its target is replaced.
        """
        self._note([_replaced(self.folder / name, content) for name, content in files.items()])
        noted = self.lock.tell()
        try:
            with ExitStack() as temporaries:
                written = []
                for file, content in zip(self.files, files.values(), strict=True):
                    with errors_naming(file.path):
                        file.target.parent.mkdir(exist_ok=True)
                        beside = written_beside(file.target, content)
                        written.append(temporaries.enter_context(beside))
                for file in reversed(self.files):
                    with errors_naming(file.path):
                        if file.aside is not None:
                            os.replace(file.target, file.aside)
                for file, temporary in zip(self.files, written, strict=True):
                    with errors_naming(file.path):
                        os.replace(temporary, file.target)
            for folder in {file.target.parent for file in self.files}:
                flush_folder(folder)
            yield
            if not self.is_done:
                self._mark_done(at_the_end=True)
        except BaseException:
            with suppress(OSError):
                self.lock.truncate(noted)  # a mark that failed may be there nevertheless
            self.undo()
            raise
        self._forget()

    def undo(self) -> None:
        """Bring back the old files: the last new one goes first, and the last old one comes last.

        A file that is neither the old nor the new one is somebody else's, and stays.
        """
        for file in [] if self.is_done else reversed(self.files):
            with errors_naming(file.path):
                if (file.aside is None or file.aside.exists()) and file.is_new():
                    file.target.unlink()
        for file in [] if self.is_done else self.files:
            with errors_naming(file.path):
                if file.aside is not None and file.aside.exists() and not file.target.exists():
                    os.replace(file.aside, file.target)
                remove_temporaries(file.path.parent)
                if len(file.path.relative_to(self.folder).parts) > 1:
                    with suppress(OSError):  # it holds more
                        file.path.parent.rmdir()
        self._forget()

    def close(self) -> None:
        """Let go; the lock's file stays where something is left to undo."""
        path, windows = self.folder / LOCK, sys.platform == "win32"
        with self.lock, suppress(OSError):
            if not (self.files or windows) and _is_at(path, self.lock):
                path.unlink()
        with suppress(OSError):
            if not self.files and windows:  # which removes no open file: neither ours nor another's
                path.unlink()

    def _note(self, files: Sequence[Replaced]) -> None:
        names = [file.path.relative_to(self.folder).as_posix() for file in files]
        notes = [[name, file.old, file.new] for name, file in zip(names, files, strict=True)]
        with errors_naming(self.folder / LOCK):
            self.lock.truncate(0)
            self._append(json.dumps(notes).encode())
        self.files, self.is_done = list(files), False

    def _mark_done(self, *, at_the_end: bool = False) -> None:
        """From here on the new files stay; at the hold's end, the lock's file may go instead."""
        with errors_naming(self.folder / LOCK):
            if at_the_end and sys.platform != "win32" and not any(file.old for file in self.files):
                (self.folder / LOCK).unlink()
            else:
                self._append(DONE)
        self.is_done = True

    def _append(self, data: bytes) -> None:
        self.lock.write(data)
        self.lock.flush()
        os.fsync(self.lock.fileno())

    def _forget(self) -> None:
        """Remove old files that are still aside; what is left then is for the next to remove."""
        left = []
        for file in self.files:
            try:
                if file.aside is not None:
                    file.aside.unlink(missing_ok=True)
            except OSError:
                left.append(file)
        self.files = left


def _replaced(path: Path, content: Content) -> Replaced:
    new = 0
    for part in content:
        new = zlib.crc32(part, new)
    return Replaced(path, hidden_name("old") if path.exists() else None, new)


def _noted(folder: Path) -> tuple[list[Replaced], bool]:
    """What the lock's file in a folder notes, and whether it is done; none where it is damaged."""
    try:
        notes, *done = read_file(folder / LOCK).split(b"\n")
        found = [Replaced(folder / name, old, new) for name, old, new in json.loads(notes)]
        if not all(_is_ours(file.path.relative_to(folder), file.old, file.new) for file in found):
            raise ValueError("another program's")
    except (MiniloraError, ValueError, TypeError, RecursionError):
        return [], False
    return found, done == [DONE[1:]]


def _is_ours(path: Path, old: Any, new: Any) -> bool:
    """Whether a note can be ours: of a path within its folder, and an old file as we name them."""
    within = path.parts != () and ".." not in path.parts and "\0" not in path.name
    hidden = old is None or (isinstance(old, str) and HIDDEN.fullmatch(old) is not None)
    return within and hidden and type(new) is int


# --- reading -----------------------------------------------------------------------------------


@contextmanager
def steady(folder: Path, last: str) -> Iterator[None]:
    """Read files of a folder that belong together, of which `last` is written last.

    Old files that a killed process left aside are put back before, unless the new ones are whole.
    Raises MiniloraError where the files are replaced meanwhile, and where there is something to
    undo and the system refuses.
    """
    _settle(folder)
    before = _version(folder / last)
    yield
    if _version(folder / last) != before:
        raise MiniloraError(f"{folder} was written to while it was read; read it again")


def _settle(folder: Path) -> None:
    files, _ = _noted(folder)
    asides = [file.aside for file in files if file.aside is not None]
    if not any(aside.exists() for aside in asides) or all(file.is_new() for file in files):
        return
    try:
        for file in files:
            if Path(os.path.realpath(folder)) not in file.target.parents:
                raise MiniloraError(f"{file.path} is a link that leads elsewhere")
        with held(folder, only_locked=True):
            pass
    except Busy:  # its writer lives
        pass
    except MiniloraError as error:
        raise MiniloraError(
            f"{folder} was left half-written by a process that was killed, and only writing it "
            f"anew can mend it: {error}"
        ) from None


def _version(path: Path) -> tuple[int, ...] | None:
    """What is another when a file was replaced; None where there is none."""
    with suppress(OSError, ValueError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


# --- the lock ----------------------------------------------------------------------------------


class Busy(MiniloraError):
    """Another process holds the folder."""


def _locked(path: Path, only_locked: bool) -> BinaryIO:
    """The open file at a path, made where it is missing, and locked."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise MiniloraError(f"cannot write {path}: it is not a plain file")
    with errors_naming(path):
        while True:
            lock = path.open("a+b")
            _take(lock, only_locked)
            if _is_at(path, lock):
                return lock
            lock.close()  # its owner was just removing it


def _take(lock: BinaryIO, only_locked: bool = False) -> None:
    """Lock a file without waiting; Busy, the file being closed, where another has it.

    Nothing is locked where the system knows no locks: in WebAssembly, which has no second process,
    and on some network drives. With `only_locked` that is Busy, too.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            lock.seek(FAR)
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if only_locked or isinstance(error, (BlockingIOError, PermissionError)):
            lock.close()
            folder = Path(lock.name).parent
            raise Busy(
                f"another run is writing to {folder}; wait for its end or choose another folder"
            ) from None


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
