"""Hashes of local files, remembered so that an unchanged corpus is not read again to know that it is unchanged."""

import hashlib
import json
import os
import time
from pathlib import Path

INDEX_NAME = "file_hashes.json"
# A file written again within its time stamp's granularity looks unchanged: a hash is remembered only when the file had
# been at rest for this long (git guards its index likewise).
REST_NS = 2_000_000_000


class FileHashes:
    """SHA-256 of files by path, size, inode and the times of the last change of content and of state.

    The fingerprint of prepared data is made of content alone, so that the same files elsewhere, or touched, or copied
    anew, are the same data. What is remembered here only saves reading them: any write moves the change time (ctime),
    which, unlike the modification time, no ordinary tool can set back.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._file = cache_dir / INDEX_NAME
        try:
            self._index = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Without the index, or with a damaged one, the files are hashed again.
            self._index = {}
        self._changed = False

    def hash(self, path: Path) -> str:
        """The hash of the file's content, read only if the file is not known as it is now."""
        resolved = path.resolve()
        stat = resolved.stat()
        key = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self._index.get(str(resolved))
        if known is not None and known[:-1] == key:
            return str(known[-1])
        with resolved.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > REST_NS:
            self._index[str(resolved)] = [*key, value]
            self._changed = True
        return value

    def save(self) -> None:
        """Writes what is newly known; of two processes that do so at once the later one's index stays."""
        if not self._changed:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_name(f".{INDEX_NAME}.part{os.getpid()}")
        part.write_text(json.dumps(self._index), encoding="utf-8")
        part.replace(self._file)
        self._changed = False
