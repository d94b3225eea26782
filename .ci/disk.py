"""Power cuts, deaths and faulty disks: ``python .ci/disk.py [--images 1000] [--deaths 300] [--seed N]``.

It needs pytest and gcc. A power cut is simulated: disk.c, which stands between a service and its disk, records each
write and sync of database and write-ahead log while jobs are submitted, and the answers that clients got are marked in
that record. Then images are made that a disk may hold at a moment of it: what was synced is there, of what came later
any part, torn at 512 bytes. Each has to be whole (PRAGMA integrity_check), with every acknowledged job, no finished job
undone and every callback due or delivered. With ``synchronous = OFF`` that has to fail, or the test sees nothing.

Dying everywhere: a service that makes a database, takes the predecessor's over or takes up what a killed one has left,
and runs ten jobs, is killed at each operation on its files, or gets EIO, ENOSPC or ENFILE there. Afterwards a start
without faults has to bring every acknowledged job to its end."""

import argparse
import concurrent.futures
import errno
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_csp  # noqa: E402 - from the repository, wherever this is run

SECTOR = 512
RECORD = struct.Struct("=cB2xIQ")
ENDS = ("", "-wal", "-journal")
DIRECTORY = 4  # in disk.c
JOBS = """
    import csp.job as job

    @job.asynchronous
    def work(task_id, input):
        return input["data"][:20]

    @job.synchronous
    def echo(task_id, input):
        return input["data"][:20]
"""
WORKER = """
import json, sys, time
import csp
sys.path.insert(0, sys.argv[3])
import my_jobs
service = csp.Service(csp.Settings({"SQLALCHEMY_DATABASE_URI": sys.argv[1], "PASSWORD": "x" * 20,
                                    "SECRET_KEY": "k" * 20, "STDERR": True}))
def call(method, path, body=None):
    headers = {"authorization": "k" * 20, "content-type": "application/json"}
    answer = service.handle(csp.Request(method, path, headers, json.dumps(body).encode() if body else b""))
    return answer.status, json.loads(answer.body)
acknowledged = open(sys.argv[2], "a")
for number in range(int(sys.argv[4])):
    status, job = call("POST", "/job", {"job_type": "echo" if number % 4 == 3 else "work", "api_key": "k",
                                        "data": f"{number} " + "x" * 2000})
    assert status in (200, 503), (status, job)
    if status == 200:
        print(job["job_id"], file=acknowledged, flush=True)
deadline = time.monotonic() + 20
while time.monotonic() < deadline and call("GET", "/status")[1]["stats"]["pending"]:
    time.sleep(0.02)
assert sys.argv[4] != "0" or not call("GET", "/status")[1]["stats"]["pending"]
service.close(5)
"""


def build(place):
    library = place / "disk.so"
    source = Path(__file__).with_name("disk.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"],
                   check=True)
    return library


# -- a power cut


class Recording:
    """What a service did to its disk while clients talked to it: ``log``; ``marks``: (place in it, what, job id, …)."""

    def __init__(self, place, library, program):
        self.log_path, self.marks, database = place / "log of the disk", [], place / "jobs.db"
        test_csp.PROGRAM = program
        (place / "my_jobs.py").write_text(test_csp.textwrap.dedent(JOBS), encoding="utf-8")
        receiver = test_csp.Receiver()
        process = test_csp.Process(place, "--jobs", "my_jobs", "--db", database, environ={
            "LD_PRELOAD": str(library), "CSP_DISK_FILE": str(database), "CSP_DISK_LOG": str(self.log_path)})
        try:
            def submit(part):
                for number in range(60):
                    text = f"{part}/{number} " + "x" * random.choice((10, 3000, 30_000))
                    more = {"result_url": receiver.url} if number % 3 == 0 else {}
                    job = process.client.submit("echo" if number % 5 == 4 else "work", text, **more)
                    self._mark("accepted", job["job_id"], bool(more))
                    if number % 4 == 0:
                        ended = process.client.finish(job)
                        self._mark("finished", job["job_id"], bool(more))
                        assert ended["data"] == text[:20]

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                list(pool.map(submit, range(4)))
            test_csp.eventually(lambda: process.client.get("/status").json["stats"]["pending"] == 0)
        finally:
            process.kill()
            receiver.stop()
        self.log = self.log_path.read_bytes()
        self.received = {body["job_id"] for _, body in receiver.received}

    def _mark(self, what, job_id, has_callback):
        self.marks.append((self.log_path.stat().st_size, what, job_id, has_callback))


class Disk:
    """The files as the log goes on: of each what is ``durable``, and the operations ``pending`` since its last sync."""

    def __init__(self):
        self.durable = [None] * len(ENDS)
        self.pending = [[] for _ in ENDS]

    def do(self, kind, file, offset, data):
        if file == DIRECTORY:  # what was created and deleted is durable, too
            for number, pending in enumerate(self.pending):
                deleted = max([0, *(index + 1 for index, operation in enumerate(pending) if operation[0] == b"U")])
                if deleted:
                    self.durable[number] = None
                    del pending[:deleted]
                if pending and pending[0][0] == b"C":
                    self.durable[number] = apply(self.durable[number], *pending.pop(0))
        elif kind == b"S":
            for operation in self.pending[file]:
                self.durable[file] = apply(self.durable[file], *operation)
            self.pending[file] = []
        else:
            self.pending[file].append((kind, offset, data))

    def image(self, directory, chance):
        """Write what the disk may hold if the power goes now."""
        for end, durable, pending in zip(ENDS, self.durable, self.pending):
            content = None if durable is None else bytearray(durable)
            how = chance.choice(("all", "none", "some", "some"))
            for kind, offset, data in pending if how != "none" else ():
                if how == "all":
                    content = apply(content, kind, offset, data)
                elif kind != b"W" and chance.random() < 0.5:
                    content = apply(content, kind, offset, data)
                else:
                    for start in range(0, len(data), SECTOR) if chance.random() < 0.7 else ():
                        if chance.random() < 0.7:
                            content = apply(content, kind, offset + start, data[start:start + SECTOR])
            if content is not None:
                (directory / ("jobs.db" + end)).write_bytes(content)


def apply(content, kind, offset, data):
    if kind == b"U":
        return None
    content = bytearray() if content is None else content
    size = {b"W": offset + len(data), b"T": offset, b"C": 0}[kind]
    if kind == b"T":
        del content[size:]
    content.extend(bytes(max(0, size - len(content))))
    if kind == b"W":
        content[offset:offset + len(data)] = data
    return content


def check_image(directory, marks, received):
    """Return what is wrong with an image, given the answers that clients had got; nothing if all is well."""
    if not marks and not (directory / "jobs.db").exists():
        return []
    connection = sqlite3.connect(str(directory / "jobs.db"))
    try:
        if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            return ["not whole"]
        if not marks and not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone():
            return []
        rows = {row[0]: row[1:] for row in connection.execute(
            "SELECT job_id, status, data IS NOT NULL, callback_status, callback_at FROM jobs")}
    except sqlite3.Error as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        connection.close()
    wrong = []
    for _, what, job_id, has_callback in marks:
        status, has_data, callback_status, callback_at = rows.get(job_id, ("missing", 0, None, None))
        if status == "missing" or (what == "finished" and (status, has_data) != ("complete", 1)):
            wrong.append(f"{what}, and now {status}")
        is_sent = callback_status == "delivered" and job_id in received
        if has_callback and status == "complete" and callback_at is None and not is_sent:
            wrong.append("its callback is forgotten")
    return wrong


def cut_power(place, library, program, images, seed):
    """Return what is wrong in so many images, and how many there were."""
    recording, chance, disk, wrong, made = Recording(place, library, program), random.Random(seed), Disk(), [], 0
    starts, position = [], 0
    while position < len(recording.log):
        starts.append(position)
        position += RECORD.size + RECORD.unpack_from(recording.log, position)[2]
    wanted = {chance.choice(starts) for _ in range(images)} | {
        min(mark[0], starts[-1]) for mark in chance.sample(recording.marks, min(len(recording.marks), images // 5))}
    for position in starts:
        if position in wanted:
            made += 1
            directory = place / f"image {made}"
            directory.mkdir()
            disk.image(directory, chance)
            marks = [mark for mark in recording.marks if mark[0] <= position]
            wrong += [f"at {position}: {sentence}" for sentence in check_image(directory, marks, recording.received)]
            if made % 100 == 1 and not wrong:
                start_from(directory, marks)
            shutil.rmtree(str(directory))
        kind, file, length, offset = RECORD.unpack_from(recording.log, position)
        data = recording.log[position + RECORD.size:position + RECORD.size + length]
        disk.do(kind, file, offset, data)
    return wrong, made, len(starts), len(recording.marks)


def start_from(directory, marks):
    """Start a service on an image; it has to bring every job to its end."""
    (directory / "my_jobs.py").write_text(test_csp.textwrap.dedent(JOBS), encoding="utf-8")
    process = test_csp.Process(directory, "--jobs", "my_jobs", "--db", directory / "jobs.db")
    try:
        test_csp.eventually(lambda: process.client.get("/status").json["stats"]["pending"] == 0)
        for _, _, job_id, _ in marks:
            assert process.client.get("/job/" + job_id, key=test_csp.SECURE_KEY).json["status"] == "complete"
        assert process.terminate() == 0
    finally:
        process.kill()


# -- dying everywhere


def prepare(path, scenario):
    """Make the database that a scenario begins with; return the ids of its jobs."""
    if scenario == "taking over":
        test_csp.make_predecessor(path)
    elif scenario == "recovery":
        store = test_csp.csp.Store(str(path))
        for number in range(5):
            test_csp.add_job(store, f"running-{number}", job_type="work", sent_data='"left"')
        test_csp.claim_all(store)
        store.close()
    return {row[0] for row in test_csp.rows_of(path, "SELECT job_id FROM jobs")} if path.exists() else set()


def run_worker(place, path, jobs, **environ):
    return subprocess.run(
        [sys.executable, "-c", WORKER, str(path), str(place / "acknowledged"), str(place), str(jobs)], cwd=str(place),
        env={**os.environ, "PYTHONPATH": str(test_csp.HERE), **environ}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, universal_newlines=True, timeout=120)


def count_operations(base, library, scenario):
    place = Path(tempfile.mkdtemp(dir=str(base)))
    (place / "my_jobs.py").write_text(test_csp.textwrap.dedent(JOBS), encoding="utf-8")
    path = place / "jobs.db"
    prepare(path, scenario)
    run_worker(place, path, 10, LD_PRELOAD=str(library), CSP_DISK_FILE=str(path), CSP_DISK_COUNT=str(place / "count"))
    return int((place / "count").read_text())


def die_at(base, library, scenario, fault, operation):
    """Run ten jobs with one fault, then without; return whether it killed. Fail if anything is lost."""
    place = Path(tempfile.mkdtemp(dir=str(base)))
    path = place / "jobs.db"
    (place / "my_jobs.py").write_text(test_csp.textwrap.dedent(JOBS), encoding="utf-8")
    known = prepare(path, scenario)
    faulty = {"LD_PRELOAD": str(library), "CSP_DISK_FILE": str(path), "CSP_DISK_AT": str(operation)}
    if fault != "KILL":
        faulty["CSP_DISK_ERRNO"] = str(getattr(errno, fault))
        faulty["CSP_DISK_READS"] = "1"
    what = f"{scenario}, {fault} at operation {operation}"
    first = run_worker(place, path, 10, **faulty)
    if fault == "KILL":
        assert first.returncode in (0, -9), f"{what}: {first.stderr}"
    else:
        is_refusal = first.returncode == 1 and "StartError" in first.stderr.splitlines()[-1]
        assert first.returncode == 0 or is_refusal, f"{what}: {first.stderr}"
    second = run_worker(place, path, 0)
    assert second.returncode == 0, f"{what}, then: {second.stderr}"
    ids = (place / "acknowledged").read_text().split() if (place / "acknowledged").exists() else []
    ids += [f"running-{number}" for number in range(5) if scenario == "recovery"]
    rows = dict(test_csp.rows_of(path, "SELECT job_id, status FROM jobs"))
    assert {rows.get(job_id) for job_id in ids} <= {"complete"}, f"{what}: {rows}"
    assert known <= set(rows), f"{what}: {known - set(rows)} are gone"
    assert test_csp.rows_of(path, "PRAGMA integrity_check") == [("ok",)], what
    shutil.rmtree(str(place))
    return first.returncode == -9


def die_everywhere(base, library, deaths):
    """Return how many runs were killed, and how many there were."""
    runs = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for scenario in ("a first start", "taking over", "recovery"):
            total = count_operations(base, library, scenario)
            print(f"{scenario}: {total} operations")
            for fault, share in (("KILL", 0.5), ("EIO", 0.2), ("ENOSPC", 0.2), ("ENFILE", 0.1)):
                wanted = max(1, int(deaths * share / 3))
                step = max(1, total // wanted)
                runs += [pool.submit(die_at, base, library, scenario, fault, operation)
                         for operation in range(1 + len(runs) % step, total, step)]
        return sum(run.result() for run in runs), len(runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--deaths", type=int, default=300)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    options = parser.parse_args()
    print("seed", options.seed)
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        library, program = build(base), test_csp.PROGRAM
        for name in ("safe", "unsafe"):
            (base / name).mkdir()
        wrong, made, operations, marks = cut_power(base / "safe", library, program, options.images, options.seed)
        print(f"power cuts: {made} images of {operations} operations, {marks} answers: {len(wrong)} faults")
        assert not wrong, wrong[:10]
        unsafe = base / "unsafe" / "csp.py"
        text = program.read_text(encoding="utf-8")
        assert '"synchronous = FULL"' in text
        unsafe.write_text(text.replace('"synchronous = FULL"', '"synchronous = OFF"'), encoding="utf-8")
        wrong, made, _, _ = cut_power(base / "unsafe", library, unsafe, max(50, options.images // 10), options.seed)
        print(f"the same with synchronous = OFF: {made} images, {len(wrong)} faults")
        assert wrong, "no fault was found where there must be some"
        killed, runs = die_everywhere(base, library, options.deaths)
        print(f"dying everywhere: {runs} runs, {killed} of them killed: every acknowledged job has ended")


if __name__ == "__main__":
    main()
