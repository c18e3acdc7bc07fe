"""A lock has one holder at a time; a live one is waited for, and one that is dead, or silent elsewhere, is not."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from jettclip import locks
from jettclip.locks import Lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.1, "STALE": 1.0, "SETTLE": 0.1}.items():
        monkeypatch.setattr(locks, name, seconds)


def held_by(path, **holder):
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0, "id": "x", **holder}))


def test_held_and_given_back(tmp_path):
    path, said = tmp_path / "lock", []
    with Lock(path, lambda: said.append("waits")):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        time.sleep(0.3)
    assert list(tmp_path.iterdir()) == [] and not said
    with pytest.raises(ZeroDivisionError), Lock(path):
        1 / 0
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time(tmp_path):
    inside, most, waits = [], [], []

    def work():
        with Lock(tmp_path / "lock", lambda: waits.append(1)):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.2)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1] and len(waits) >= 3


def test_a_killed_process_frees_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "STALE", 1e9)
    code = f"import time; from jettclip.locks import Lock\nwith Lock({str(tmp_path / 'lock')!r}): print('in', flush=True); time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock").exists()
    with Lock(tmp_path / "lock", waiting=lambda: pytest.fail("waited")):
        pass
    # its number was given to another process since
    held_by(tmp_path / "lock", host=locks.platform.node(), pid=os.getpid(), started=psutil.Process().create_time() - 9)
    with Lock(tmp_path / "lock", waiting=lambda: pytest.fail("waited")):
        pass


@pytest.mark.parametrize("holder", ['{"host": "elsewhere", "pid": 1}', ""])  # empty: its machine stopped in writing
def test_elsewhere_heartbeats_count(tmp_path, holder):
    """A slow heartbeat is waited for as long as it comes; the clock of the other machine does not matter."""
    path, ahead, waits = tmp_path / "lock", time.time() + 3600, []
    path.write_text(holder)
    beats = 4

    def beat():
        for number in range(beats):
            os.utime(path, (ahead + number, ahead + number))
            time.sleep(0.6)

    thread, start = threading.Thread(target=beat), time.monotonic()
    thread.start()
    with Lock(path, lambda: waits.append(1)):
        assert time.monotonic() - start > beats * 0.6 and waits == [1]
    thread.join()


def test_two_take_over_and_one_gets_it(tmp_path):
    held_by(tmp_path / "lock")
    test_one_at_a_time(tmp_path)


def test_a_lost_lock_is_told_and_left_alone(tmp_path):
    path, lost = tmp_path / "lock", threading.Event()
    with Lock(path, lost=lost.set):
        held_by(path)  # another took it while this process stood still
        assert lost.wait(5)
    assert json.loads(path.read_text())["host"] == "elsewhere"
