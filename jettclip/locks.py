"""A lock file with a heartbeat, for steps on machines that share nothing but a file system.

flock is not enough: some cluster file systems lack it, and others keep it for each machine alone.
"""
import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path

import psutil

BEAT, STALE, SETTLE = 15.0, 120.0, 2.0  # seconds: between heartbeats; without one, until a lock is free; to see a rival


class Lock:
    """Held inside `with Lock(path, waiting, lost):`; the file is there as long as the lock is held.

    A lock is taken over at once if its holder was a process of this machine and has ended, and otherwise when its heartbeat
    has not changed for STALE seconds *while we watched*: clocks of two machines are never compared. waiting() is called once
    if the lock is held by another; lost() in another thread if it was taken from us, as when this machine stood still.
    """

    def __init__(self, path, waiting=lambda: None, lost=lambda: None):
        self.path, self.waiting, self.lost, self.ended = Path(path), waiting, lost, threading.Event()
        self.holder = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time(), "id": uuid.uuid4().hex}

    def __enter__(self):
        own = self.path.with_name(f"{self.path.name}.{self.holder['id']}")
        own.write_text(json.dumps(self.holder))
        try:
            watched, since, waited = None, time.monotonic(), False
            while True:
                with contextlib.suppress(FileExistsError):
                    os.link(own, self.path)  # fails if it exists, on NFS too
                    break
                seen = self._seen()
                if seen is not None and (self._ended_here(seen[0]) or seen == watched and time.monotonic() - since > STALE):
                    os.replace(own, self.path)
                    time.sleep(SETTLE)  # of two that take over at once, the last one has it
                    if self.is_ours():
                        break
                    own.write_text(json.dumps(self.holder))
                    continue
                if seen != watched:
                    watched, since = seen, time.monotonic()
                if seen is not None and not waited:
                    self.waiting()
                    waited = True
                time.sleep(min(1.0, BEAT))
        finally:
            own.unlink(missing_ok=True)
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            if self.is_ours():
                self.path.unlink()

    def is_ours(self):
        seen = self._seen()
        return seen is not None and seen[0] == self.holder

    def _seen(self):
        """(holder, time of its last heartbeat), or None where there is no lock."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.path) as file:
                text, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(text), beat
            return {}, beat
        return None

    def _ended_here(self, holder):
        if holder.get("host") != platform.node():
            return False
        try:
            return psutil.Process(holder["pid"]).create_time() != holder["started"]
        except psutil.NoSuchProcess:
            return True

    def _beat(self):
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a file system that is slow or full: the next one may do
                if not self.is_ours():
                    return self.lost()
                os.utime(self.path)  # needs no space
