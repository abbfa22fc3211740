"""Where results go: checked before the work, put in place by a rename, so no path ever holds half a model.

And where files go that nobody is to see: whatever ends the work, they are removed.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from normtool.errors import OutputError


def check_destination(destination: Path, force: bool) -> None:
    """Refuse early what would be refused after all the work."""
    with as_output_error(destination):
        if destination.is_dir():
            raise OutputError(f"{destination}: is a folder; give a file name")
        if not destination.parent.is_dir():
            raise OutputError(f"{destination}: the folder {destination.parent} does not exist")
        if destination.exists() and not destination.is_file():
            raise OutputError(f"{destination}: is no regular file; give the name of a new one")
        if destination.exists() and not force:
            raise OutputError(f"{destination}: exists; --force replaces it")


@contextlib.contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """What the system says of a path, as an OutputError."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OutputError(f"{path}: {reason}; nothing there was changed") from None


@contextlib.contextmanager
def afterwards(clean_up: Callable[..., None], *arguments: Path) -> Iterator[None]:
    """Run the block, then `clean_up(*arguments)` to its end, whatever ends the block.

    Ctrl-C can strike behind any call: the one that makes a file, before a line could note it, and those that
    clean up. So this is entered before there is a file, and `clean_up`, which gets along with whatever it
    finds, begins again where it is interrupted.
    """
    try:
        try:
            yield
        finally:
            clean_up(*arguments)
    except BaseException:  # from the block; or from its clean-up
        clean_up(*arguments)
        raise


def remove(*paths: Path) -> None:
    """Files, and folders with what is in them; none of them has to exist."""
    for path in paths:
        try:
            path.lstat()
        except OSError:  # with this name nothing can be there, say where it is too long
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def scratch_path() -> Path:
    """A name for a temporary folder, which nothing has yet.

    Python's own `TemporaryDirectory` makes the folder first, and Ctrl-C can come before it is noted.
    """
    return Path(tempfile.gettempdir()) / f"normtool-{secrets.token_hex(8)}"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder of our own. Raises OutputError where none can be made."""
    folder = scratch_path()
    with afterwards(remove, folder):
        with as_output_error(folder):
            folder.mkdir(mode=0o700)
        yield folder


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(eq=False)
class StagedFile:
    """One file, written in a folder beside its destination and not yet in place."""

    destination: Path
    model_path: Path
    sha256: Callable[[], str]

    def commit(self) -> list[dict[str, str]]:
        """Rename into place; the path and hash of what was written."""
        digest = self.sha256()
        with as_output_error(self.destination):
            self.model_path.replace(self.destination)
            sync_folder(self.destination.parent)
        return [{"path": str(self.destination), "sha256": digest}]


@contextlib.contextmanager
def staged_file(
    destination: Path, force: bool, write: Callable[[Path], None], digest: Callable[[Path], str]
) -> Iterator[StagedFile]:
    """Let `write` fill a file of the same name beside `destination`; what is not committed is removed.

    The name stays the same because writers put it into the file. Raises OutputError: the path exists (without
    `force`), the disk is full, a permission is missing.
    """
    check_destination(destination, force)
    folder = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
    path = folder / destination.name
    with afterwards(remove, folder):
        with as_output_error(destination):
            folder.mkdir()
            write(path)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        yield StagedFile(destination, path, lambda: digest(path))
