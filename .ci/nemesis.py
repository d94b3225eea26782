"""Crashes with an enemy beside: ``python .ci/nemesis.py [--jobs 10000] [--seconds 240] [--seed N]``, with pytest.

A service is killed again and again while clients submit jobs. Meanwhile it is stopped and continued, its disk is full
for a while, its clock steps (where libfaketime is installed), jobs of its own copy and read the files of its database,
and sqlite3 programs open, back up and close it. Afterwards every acknowledged job has ended with its result and its
callback, and nothing that had ended has changed."""

import argparse
import contextlib
import glob
import http.client
import itertools
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_csp  # noqa: E402 - from the repository, wherever this is run

FAKETIME = next(iter(glob.glob("/usr/lib/*/faketime/libfaketime.so.1")), None)
INFINITE = resource.RLIM_INFINITY


class Clients:
    """Submit until there are enough: ``acknowledged`` holds key and data by id, ``ended`` what was seen complete."""

    def __init__(self, port, wanted, callback_url):
        self.client = test_csp.Client(f"http://127.0.0.1:{port}/")
        self.wanted, self.callback_url = wanted, callback_url
        self.acknowledged, self.ended, self.called = {}, {}, set()
        self.refusals = 0
        self.threads = [threading.Thread(target=self._submit, args=(part,)) for part in range(8)]
        for thread in self.threads:
            thread.start()

    def _submit(self, part):
        for number in itertools.count():
            if len(self.acknowledged) >= self.wanted:
                return
            body = {"job_type": "echo" if number % 4 == 3 else "work", "api_key": "k", "data": [part, number]}
            if number % 50 == 0:
                body["result_url"] = self.callback_url
            try:
                answer = self.client.post("/job", body)
                if answer.status != 200:
                    assert answer.status == 503, answer.body
                    self.refusals += 1
                    time.sleep(0.02)
                    continue
                job = answer.json
                self.acknowledged[job["job_id"]] = job["job_key"], body["data"]
                self.called.update([job["job_id"]] if "result_url" in body else [])
                if number % 20 == 0:
                    job = self.client.get("/job/" + job["job_id"], key=job["job_key"]).json
                    if job["status"] != "pending":
                        self.ended[job["job_id"]] = job["status"], job["data"], job["finished_timestamp"]
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)


def annoy(server, place, chance, fake):
    """Do one evil thing to a running server."""
    path, pid = place / "jobs.db", server.process.pid
    deed = chance.choice(("stop", "full", "touch", "touch", "outsider", "outsider", "clock"))
    if deed == "stop":
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(chance.random() / 4)
        server.process.send_signal(signal.SIGCONT)
    elif deed == "full":
        largest = max(file.stat().st_size for file in place.glob("jobs.db*"))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest + 8192, INFINITE))
        time.sleep(chance.random() / 4)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (INFINITE, INFINITE))
    elif deed == "touch":
        with contextlib.suppress(OSError, http.client.HTTPException):
            how = chance.choice(("copy", "read", "sqlite"))
            server.client.post("/job", {"job_type": "touch", "api_key": "k", "data": [how, str(path)]})
    elif deed == "outsider":
        subprocess.run([sys.executable, "-c", test_csp.OUTSIDER, str(path)], timeout=60, stderr=subprocess.DEVNULL)
    elif fake.exists():
        fake.write_text(f"{chance.randint(-4000, 4000):+d}")
    return deed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    options = parser.parse_args()
    chance, deeds, rounds = random.Random(options.seed), {}, 0
    print("seed", options.seed, "with" if FAKETIME else "without", "steps of the clock")
    with tempfile.TemporaryDirectory() as temporary:
        place, environ = Path(temporary), {}
        fake = place / "clock"
        if FAKETIME:
            fake.write_text("+0")
            environ = {"LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(fake), "FAKETIME_NO_CACHE": "1",
                       "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
        (place / "my_jobs.py").write_text(textwrap.dedent(test_csp.KEPT_MODULE) + textwrap.dedent("""
            @job.synchronous
            def echo(task_id, input):
                return input.get("data")
            """), encoding="utf-8")
        receiver, port = test_csp.Receiver(), test_csp.free_port()

        def launch():
            return test_csp.Process(place, "--jobs", "my_jobs", "--db", place / "jobs.db", "--port", port,
                                    environ=environ)

        server = launch()
        clients = Clients(port, options.jobs, receiver.url)
        deadline = time.monotonic() + options.seconds
        try:
            while any(thread.is_alive() for thread in clients.threads):
                assert time.monotonic() < deadline, f"only {len(clients.acknowledged)} jobs were acknowledged in time"
                for _ in range(chance.randint(3, 12)):
                    deed = annoy(server, place, chance, fake)
                    deeds[deed] = deeds.get(deed, 0) + 1
                    time.sleep(chance.random() / 10)
                if chance.random() < 0.7:
                    server.kill()
                else:
                    server.process.send_signal(signal.SIGTERM)
                    server.process.wait(60)
                rounds += 1
                server = launch()
            test_csp.eventually(lambda: server.client.get("/status").json["stats"]["pending"] == 0, 120)
            test_csp.eventually(lambda: clients.called <= {body["job_id"] for _, body in list(receiver.received)}, 120)
            for job_id, (key, data) in clients.acknowledged.items():
                job = server.client.get("/job/" + job_id, key=key).json
                if job["status"] == "complete":
                    assert job["data"] == data, job
                else:  # only a synchronous job, or one that was running in three crashes, may end otherwise
                    assert "not of a kind that is run again" in job["error"]["message"] or "attempt 3" in str(job), job
                if job_id in clients.ended:
                    found = job["status"], job["data"], job["finished_timestamp"]
                    assert found == clients.ended[job_id], (found, clients.ended[job_id])
            assert server.terminate() == 0
            assert test_csp.rows_of(place / "jobs.db", "PRAGMA integrity_check") == [("ok",)]
        finally:
            server.kill()
            receiver.stop()
            clients.wanted = 0
        log = (place / "log").read_text(encoding="utf-8")
        assert "Traceback" not in log, log[log.index("Traceback") - 300:][:2500]
        print(f"{len(clients.acknowledged)} acknowledged jobs, {clients.refusals} refused, {rounds} deaths, "
              f"{deeds}: nothing lost, nothing changed")


if __name__ == "__main__":
    main()
