"""Measure csp.py beside another csp.py, ckanserviceprovider 1.2.0, and the least Python that does the same work.

``python .ci/bench.py [--old FILE] [--peer PYTHON] [--rounds 3] [--seconds 3] [--only NAME,...] [--quick] [--json
FILE]``. ``--old`` is another csp.py, such as the first edition's (``git show 5fd2a83:csp.py``). The column "new:old"
has to be at least 0.9: of rates new divided by old, of seconds, ms and MB old divided by new. ``--peer`` is the Python
of a virtual environment with ckanserviceprovider==1.2.0 and, if there, gunicorn and waitress. Requests are made by
``wrk`` (Debian's package), else by processes of this file. Only ratios mean anything: it runs the programs in turns,
in random order, several times, and prints medians. The floors are the least Python that does the work, with no check
and no feature: a threaded socket loop that parses each head into a dictionary and answers always the same
(``constant``); that loop with JSON in and out, ids, times, and for each submission the row that csp.py stores, with
csp.py's indexes, in a commit for all that wait (``durable``; an asynchronous job is run and updated in turn, as it is
by csp.py meanwhile); and http.server with sqlite3 for the start (``stdlib``). It is no test: nothing fails because it
is slow."""

import argparse
import datetime
import functools
import http.client
import itertools
import json
import math
import os
import platform
import py_compile
import queue
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

LOCAL = "127.0.0.1"
KEY = "the secure key of the benchmark"
PEERS = ("own", "waitress", "gunicorn")
FLOORS = ("constant", "durable", "stdlib")
TROUBLE = (OSError, http.client.HTTPException, ValueError, KeyError, subprocess.SubprocessError, sqlite3.Error)
JOBS = '''
import logging, time
import ckanserviceprovider.job as job
import ckanserviceprovider.util as util

@job.synchronous
def echo(task_id, input):
    return ">" + input["data"]

@job.asynchronous
def async_echo(task_id, input):
    return ">" + input["data"]

@job.synchronous
def lines(task_id, input):
    logger = logging.getLogger(task_id)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(util.StoringHandler(task_id, input))
    for number in range(input["data"]):
        logger.info("line %d of the job", number)
    return "done"

@job.asynchronous
def nap(task_id, input):
    time.sleep(input["data"])

@job.asynchronous
def compute(task_id, input):
    for _ in range(input["data"]):
        sum(range(100_000))

@job.asynchronous
def burn(task_id, input):
    end = time.monotonic() + input["data"]
    while time.monotonic() < end:
        sum(range(500))
'''
PEER_MAIN = '''
import ckanserviceprovider.web as web
import bench_jobs
web.init()
app = web.app
if app.config.get("WORKERS"):
    from apscheduler.executors.pool import ThreadPoolExecutor
    web.scheduler.add_executor(ThreadPoolExecutor(app.config["WORKERS"]))
if __name__ == "__main__":
    app.run(app.config["HOST"], app.config["PORT"])
'''
STDLIB_MAIN = '''
import http.server, sqlite3, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
sqlite3.connect("jobs.db").execute("CREATE TABLE IF NOT EXISTS jobs (job_id TEXT)")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
'''
SLOW_DISK = '''
#include <sys/syscall.h>
#include <unistd.h>
int fsync(int fd) { usleep(5000); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { usleep(5000); return syscall(SYS_fdatasync, fd); }
'''
WRK = '''
wrk.method = "%s"
wrk.body = [==[%s]==]
%s
done = function(summary, latency)
  local e = summary.errors
  print(string.format("bench %%d %%d %%d %%d %%f %%f", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
end
'''


# -- The floors

class Asked(NamedTuple):
    """A request to a floor: fields by lower-case name."""

    method: str
    target: str
    fields: Dict[str, str]
    body: bytes


Respond = Callable[[Asked], bytes]


def answer(body: bytes) -> bytes:
    """Return a whole response with ``body``."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _parse_head(head: bytes) -> Tuple[str, str, Dict[str, str]]:
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = request_line.split(" ")
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
    return method, target, fields


def _read_request(connection: socket.socket, data: bytes) -> Tuple[Optional[Asked], bytes]:
    """Return a request and what came after it; None at the end of the connection."""
    while (end := data.find(b"\r\n\r\n")) < 0:
        more = connection.recv(65_536)
        if not more:
            return None, b""
        data += more
    method, target, fields = _parse_head(data[:end])
    begin, length = end + 4, int(fields.get("content-length", "0"))
    parts, missing = [data[begin:begin + length]], begin + length - len(data)
    while missing > 0:
        parts.append(connection.recv(min(missing, 1 << 20)))
        if not parts[-1]:
            return None, b""
        missing -= len(parts[-1])
    return Asked(method, target, fields, b"".join(parts)), data[begin + length:]


def _accept_for_ever(listener: socket.socket, respond: Respond) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                rest, is_open = b"", True
                while is_open:
                    asked, rest = _read_request(connection, rest)
                    is_open = asked is not None and asked.fields.get("connection", "").lower() != "close"
                    if asked is not None:
                        connection.sendall(respond(asked))
            except OSError:
                pass


def serve(port: int, respond: Respond, threads: int) -> Tuple[socket.socket, int]:
    """Serve in that many threads, which accept and then serve one connection each; return listener and port."""
    listener = socket.create_server((LOCAL, port), backlog=1024)
    for _ in range(threads):
        threading.Thread(target=_accept_for_ever, args=(listener, respond), daemon=True).start()
    return listener, listener.getsockname()[1]


class DurableFloor:
    """The least Python that stores echo jobs: the row that csp.py stores, with its indexes, and a commit for a group.

    A synchronous job is one row, finished; an asynchronous one a queued row and, from a worker, an update when it has
    run. Nothing is checked, claimed, counted, recovered, called back, limited or logged.
    """

    def __init__(self, path: str) -> None:
        make_database(Path(path), CSP.parent)
        self._path = path
        self._waiting: "queue.SimpleQueue[Tuple[bool, Any, Callable[[], Any]]]" = queue.SimpleQueue()
        self._queued: "queue.SimpleQueue[Dict[str, Any]]" = queue.SimpleQueue()
        self._seqs = itertools.count(1)
        for target in (self._write, self._work):
            threading.Thread(target=target, daemon=True).start()

    def respond(self, asked: Asked) -> bytes:
        """Answer a request: a submission when it is on the disk."""
        if asked.method != "POST":
            return answer(b'{"stats": {"pending": 0}}')
        body = json.loads(asked.body)
        is_done = body["job_type"] == "echo"
        now = _now()
        job: Dict[str, Any] = dict(
            seq=next(self._seqs), job_id=str(uuid.uuid4()), job_key=secrets.token_hex(16), job_type=body["job_type"],
            status="pending", sent_data=json.dumps(body["data"]), data=None, requested_timestamp=now,
            started_timestamp=None, finished_timestamp=None, run_at=time.time(), api_key=body["api_key"], attempts=0,
            synchronous=int(is_done))
        if is_done:
            job.update(status="complete", data=json.dumps(">" + body["data"]), started_timestamp=now, run_at=None,
                       finished_timestamp=_now(), attempts=1, api_key=None)
        lock = threading.Lock()
        lock.acquire()
        self._waiting.put((True, job, lock.release))
        lock.acquire()
        if not is_done:
            self._queued.put(job)
        shown = {name: value for name, value in job.items() if name not in ("seq", "api_key", "run_at")}
        return answer(json.dumps({**shown, "sent_data": body["data"]}).encode())

    def _work(self) -> None:
        while True:
            job = self._queued.get()
            data = json.dumps(">" + json.loads(job["sent_data"]))
            self._waiting.put((False, ("complete", data, _now(), job["seq"]), int))

    def _write(self) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")  # the file is in WAL mode
        insert = """INSERT INTO jobs (seq, job_id, job_key, job_type, status, sent_data, data, requested_timestamp,
            started_timestamp, finished_timestamp, run_at, api_key, attempts, synchronous) VALUES (:seq, :job_id,
            :job_key, :job_type, :status, :sent_data, :data, :requested_timestamp, :started_timestamp,
            :finished_timestamp, :run_at, :api_key, :attempts, :synchronous)"""
        update = """UPDATE jobs SET status = ?, data = ?, finished_timestamp = ?, run_at = NULL, api_key = NULL
            WHERE seq = ?"""
        while True:
            batch = [self._waiting.get()]
            while len(batch) < 500 and not self._waiting.empty():
                batch.append(self._waiting.get())
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(insert, [row for is_new, row, _ in batch if is_new])
            connection.executemany(update, [row for is_new, row, _ in batch if not is_new])
            connection.execute("COMMIT")
            for _, _, then in batch:
                then()


def _now(ago_seconds: int = 0) -> str:
    then = datetime.datetime.now() - datetime.timedelta(seconds=ago_seconds)  # noqa: DTZ005 - local time, as csp.py's
    return then.isoformat(timespec="microseconds")


# -- Load

class Load(NamedTuple):
    """What a load has come to: answers that were no error in a second, percentiles in ms, answers, errors."""

    rate: float
    p50: float
    p99: float
    done: int
    errors: int


class Request(NamedTuple):
    """What is sent over and over."""

    method: str
    path: str
    body: str = ""
    headers: Tuple[Tuple[str, str], ...] = ()


def submission(job_type: str, data: Any, **more: Any) -> str:
    """Return the body of a submission."""
    return json.dumps({"job_type": job_type, "api_key": "any", "data": data, **more})


def post(job_type: str, *headers: Tuple[str, str]) -> Request:
    """Return a submission with a text as data."""
    return Request("POST", "/job", submission(job_type, "hello"), (("Content-Type", "application/json"), *headers))


CLOSE = ("Connection", "close")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that no less than that share of the values reaches (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)] if values else float("nan")


def load(port: int, request: Request, connections: int, seconds: float, place: Path) -> Load:
    """Keep that many connections busy for that time."""
    if not shutil.which("wrk"):
        return _own_load(port, request, connections, seconds)
    script = place / "request.lua"
    headers = "\n".join(f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in request.headers)
    script.write_text(WRK % (request.method, request.body, headers), encoding="utf-8")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(script),
               f"http://{LOCAL}:{port}{request.path}"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True).stdout
    found = re.search(r"^bench (.*)$", output, re.MULTILINE)
    if found is None:
        raise ValueError(f"wrk: {output}")
    requests, microseconds, refused, broken, p50, p99 = map(float, found[1].split())
    done = int(requests - refused)
    return Load(done / microseconds * 1e6, p50 / 1e3, p99 / 1e3, done, int(refused + broken))


def _own_load(port: int, request: Request, connections: int, seconds: float) -> Load:
    parts = min(connections, os.cpu_count() or 1, 4)
    shares = [connections // parts + (number < connections % parts) for number in range(parts)]
    processes = [
        subprocess.Popen([sys.executable, __file__, "--generate", json.dumps([port, request, share, seconds])],
                         stdout=subprocess.PIPE) for share in shares]
    try:
        results = [json.loads(process.communicate(timeout=seconds + 60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    taken = [value for latencies, _ in results for value in latencies]
    return Load(len(taken) / seconds, percentile(taken, 0.5), percentile(taken, 0.99), len(taken),
                sum(errors for _, errors in results))


def _complete(data: bytes) -> bool:
    end = data.find(b"\r\n\r\n")
    return end >= 0 and len(data) >= end + 4 + int(_parse_head(data[:end])[2].get("content-length", sys.maxsize))


def generate(port: int, request: Request, connections: int, seconds: float) -> None:
    """Print the latencies in ms, and the number of errors, as JSON; this runs in a process of its own."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in (*request.headers, ("Host", f"{LOCAL}:{port}")))
    length = f"Content-Length: {len(request.body)}\r\n" if request.body else ""
    message = f"{request.method} {request.path} HTTP/1.1\r\n{fields}{length}\r\n{request.body}".encode()
    selector, taken, errors = selectors.DefaultSelector(), [], 0
    end = time.perf_counter() + seconds

    def send(kept: Optional[socket.socket]) -> None:
        connection = kept or socket.create_connection((LOCAL, port), 30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(message)
        selector.register(connection, selectors.EVENT_READ, [time.perf_counter(), b""])

    for _ in range(connections):
        send(None)
    while time.perf_counter() < end:
        for key, _ in selector.select(0.1):
            connection, state = key.fileobj, key.data
            try:
                more = connection.recv(65_536)
                state[1] += more
                if more and not _complete(state[1]):
                    continue
                good = state[1][9:10] in (b"2", b"3")
            except OSError:
                more, good = b"", False
            errors += not good
            if good:
                taken.append((time.perf_counter() - state[0]) * 1e3)
            selector.unregister(connection)
            head = state[1].partition(b"\r\n\r\n")[0].lower()
            kept = bool(more) and b"connection: close" not in head and not head.startswith(b"http/1.0")
            if not kept:
                connection.close()
            send(connection if kept else None)
    print(json.dumps([taken, errors]))


# -- Programs

CSP = Path(__file__).resolve().parent.parent / "csp.py"
DIRECTORIES = {"csp": CSP.parent}  # of each program that is a csp.py; main adds "old"
TYPES = "application/json"
JSON = ("Content-Type", TYPES)


def make_database(path: Path, directory: Path) -> None:
    """Make an empty database as the csp.py in that directory does."""
    subprocess.run([sys.executable, "-c", "import csp, sys; csp.Store(sys.argv[1]).close()", str(path)], check=True,
                   env={**os.environ, "PYTHONPATH": str(directory)}, cwd=str(path.resolve().parent))


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server((LOCAL, 0)) as listener:
        return int(listener.getsockname()[1])


def command_of(name: str, port: int, peer: str, as_file: bool) -> List[str]:
    """Return the command that runs a program."""
    address = f"{LOCAL}:{port}"
    if name in DIRECTORIES:
        program = [str(DIRECTORIES[name] / "csp.py")] if as_file else ["-m", "csp"]
        return [sys.executable, *program, "--jobs", "bench_jobs", "--port", str(port), "--db", "jobs.db"]
    return {
        "constant": [sys.executable, __file__, "--floor", f"constant {port}"],
        "durable": [sys.executable, __file__, "--floor", f"durable {port}"],
        "stdlib": [sys.executable, "stdlib_main.py", str(port)],
        "own": [peer, "peer_main.py"],
        "waitress": [peer, "-m", "waitress", f"--listen={address}", "--threads=16", "peer_main:app"],
        "gunicorn": [peer, "-m", "gunicorn", "--threads", "16", "-b", address, "peer_main:app"],
    }[name]


class Program(NamedTuple):
    """A running program: how long its start took until the first answer, in seconds."""

    name: str
    port: int
    pid: int
    place: Path
    start_seconds: float

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Tuple[int, bytes]:
        """Return status and body of an answer."""
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=120)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def submit(self, job_type: str, data: Any, **more: Any) -> Dict[str, Any]:
        """Submit a job; return it."""
        status, body = self.ask("POST", "/job", submission(job_type, data, **more), **{"Content-Type": TYPES})
        if status != 200:
            raise ValueError(f"{self.name}: {body[:200]!r}")
        job: Dict[str, Any] = json.loads(body)
        return job

    def pending(self) -> int:
        """Return how many jobs have not ended."""
        return int(json.loads(self.ask("GET", "/status")[1])["stats"]["pending"])

    def wait_until_done(self, seconds: float) -> int:
        """Wait until no job is pending; return how many are left after that time."""
        end = time.monotonic() + seconds
        while self.pending() and time.monotonic() < end:
            time.sleep(0.02)
        return self.pending()

    def memory(self, name: str = "VmRSS") -> float:
        """Return the resident memory of the program and its children in MB."""
        total = 0
        for pid in (self.pid, *_children(self.pid)):
            text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            total += int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]
        return total / 1024


def _children(pid: int) -> List[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text(encoding="ascii").split()] if found.exists() else []


def build_slow_disk(place: Path) -> str:
    """Return a library that makes each sync of a file take 5 ms longer; raise ValueError without a compiler."""
    source, library = place / "slow.c", place / "slow.so"
    source.write_text(SLOW_DISK, encoding="ascii")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ValueError("there is no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, capture_output=True)
    return str(library)


@contextmanager
def running(name: str, peer: str = "", database: Optional[Path] = None, slow_disk: bool = False,
            as_file: bool = False, **settings: Any) -> Iterator[Program]:
    """Run a program in a directory of its own, with a database on disk; ``as_file``: python3 csp.py, not -m csp."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        place, port = Path(temporary), free_port()
        (place / "bench_jobs.py").write_text(JOBS, encoding="utf-8")
        (place / "peer_main.py").write_text(PEER_MAIN, encoding="utf-8")
        (place / "stdlib_main.py").write_text(STDLIB_MAIN, encoding="utf-8")
        values = {"SECRET_KEY": KEY, "PASSWORD": "a password of the benchmark", "USERNAME": "admin", "NAME": "bench",
                  "STDERR": False, "HOST": LOCAL, "PORT": port, "LOG_FILE": None, "KEEP_JOBS_AGE": 60,
                  "SQLALCHEMY_DATABASE_URI": f"sqlite:///{place / 'jobs.db'}", "MAX_BODY_BYTES": 2**27,
                  "FROM_EMAIL": "a@example.org", "ADMINS": [], "DEBUG": False, "TESTING": False, **settings}
        (place / "settings.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
        if database is not None:
            os.link(str(database), str(place / "jobs.db"))
        directory = DIRECTORIES.get(name, CSP.parent)
        environ = {**os.environ, "JOB_CONFIG": str(place / "settings.py"), "PYTHONPATH": str(directory)}
        environ.update({"LD_PRELOAD": build_slow_disk(place)} if slow_disk else {})
        begun = time.perf_counter()
        process = subprocess.Popen(command_of(name, port, peer, as_file), cwd=temporary, env=environ,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            program = Program(name, port, process.pid, place, 0.0)
            while True:
                try:
                    program.ask("GET", "/status")
                    break
                except OSError:
                    if process.poll() is not None or time.perf_counter() - begun > 30:
                        raise ValueError(f"{name} does not start") from None
                    time.sleep(0.002)
            yield program._replace(start_seconds=time.perf_counter() - begun)
        finally:
            for pid in (*_children(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


# -- What is measured: each function takes a program and returns values by row

Values = Dict[str, float]


def measure_rates(program: Program, seconds: float) -> Values:
    """Requests per second."""
    run = functools.partial(load, program.port, place=program.place, seconds=seconds)
    echo, status = post("echo"), Request("GET", "/status")
    values = {
        "GET /status": run(status, connections=16).rate,
        "POST echo": run(echo, connections=16).rate,
        "GET /status, 1 connection": run(status, connections=1).rate,
        "POST echo, 1 connection": run(echo, connections=1).rate,
        "GET /status, a connection each": run(status._replace(headers=(CLOSE,)), connections=16).rate,
        "POST echo, a connection each": run(post("echo", CLOSE), connections=16).rate,
    }
    crowd = run(echo, connections=256)
    values.update({"POST echo, 256 connections": crowd.rate, "256 connections: errors": crowd.errors})
    if program.name not in FLOORS:
        job = program.submit("echo", "hello")
        key = ("Authorization", job["job_key"])
        values["GET /job/<id>"] = run(Request("GET", f"/job/{job['job_id']}", headers=(key,)), connections=16).rate
        values["GET /job"] = run(Request("GET", "/job"), connections=16).rate
    begun = time.perf_counter()
    accepted = run(post("async_echo"), connections=16)
    values["POST async_echo"] = accepted.rate
    if program.name not in FLOORS:
        left = program.wait_until_done(10 + 4 * seconds)
        values["POST async_echo until all are finished"] = (accepted.done - left) / (time.perf_counter() - begun)
        values["async jobs never finished"] = left
    return values


def measure_callbacks(program: Program, seconds: float) -> Values:
    """From a submission to its callback, one after the other, in ms."""
    received: "queue.SimpleQueue[float]" = queue.SimpleQueue()

    def respond(_: Asked) -> bytes:
        received.put(time.perf_counter())
        return answer(b"{}")

    listener, port = serve(0, respond, 8)
    taken, lost = [], 0
    with listener:
        for number in range(101):
            begun = time.perf_counter()
            program.submit("async_echo", "hello", result_url=f"http://{LOCAL}:{port}/")
            try:
                at = received.get(timeout=5)
            except queue.Empty:
                lost += 1
                continue
            if number:  # the first warms up
                taken.append((at - begun) * 1e3)
    return {"callback, p50 ms": percentile(taken, 0.5), "callback, p99 ms": percentile(taken, 0.99),
            "callbacks lost": lost}


def measure_jobs(program: Program, seconds: float) -> Values:
    """A long log, and requests beside a job that computes."""
    program.submit("lines", 100)  # warms up
    values: Values = {}
    times = []
    for _ in range(3):
        body = _timed(values, "taken", program, "POST", "/job", submission("lines", 10_000), **{"Content-Type": TYPES})
        times.append(values["taken"])
    job = json.loads(body)
    shown = json.loads(program.ask("GET", f"/job/{job['job_id']}", Authorization=job["job_key"])[1])
    program.submit("burn", 4 * seconds)
    status = load(program.port, Request("GET", "/status"), 1, seconds, program.place)
    echo = load(program.port, post("echo"), 1, seconds, program.place)
    return {"log lines of one job": 10_000 / statistics.median(times), "log lines lost": 10_000 - len(shown["logs"]),
            "beside a computing job: GET /status, p50 ms": status.p50,
            "beside a computing job: POST echo": echo.rate}


def measure_executor(executor: str, program: Program, seconds: float) -> Values:
    """Eight jobs that compute, and short ones, on an executor."""
    begun = time.perf_counter()
    for _ in range(8):
        program.submit("compute", 300)
    program.wait_until_done(60)
    taken = time.perf_counter() - begun
    begun = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: program.submit("async_echo", "hello"), range(1000)))
    left = program.wait_until_done(60)
    return {f"{executor}: 8 jobs that compute, s": taken,
            f"{executor}: short jobs finished per second": (1000 - left) / (time.perf_counter() - begun)}


def measure_naps(program: Program, seconds: float) -> Values:
    """Sixty jobs of three seconds at once, with sixty workers."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(60) as pool:
        list(pool.map(lambda _: program.submit("nap", 3), range(60)))
    left = program.wait_until_done(30)
    return {"60 jobs of 3 s, seconds": time.perf_counter() - begun, "naps left": left}


def measure_memory(program: Program, seconds: float) -> Values:
    """Resident memory, and a payload of 50 MB."""
    time.sleep(1.0)  # the start goes on in the background
    idle = program.memory()
    run = load(program.port, post("async_echo"), 16, seconds, program.place)
    program.wait_until_done(60)
    while run.done < 10_000 and program.name in DIRECTORIES:
        run = run._replace(done=run.done + load(program.port, post("async_echo"), 16, 1, program.place).done)
        program.wait_until_done(60)
    values = {"memory idle, MB": idle, "memory after the jobs, MB more": program.memory() - idle,
              "jobs done": run.done}
    before = program.memory("VmHWM")
    timed = functools.partial(_timed, values)
    body = timed("50 MB: POST echo, s", program, "POST", "/job", submission("echo", "x" * 50_000_000),
                 **{"Content-Type": TYPES})
    job = json.loads(body)
    timed("50 MB: GET the job, s", program, "GET", f"/job/{job['job_id']}", Authorization=job["job_key"])
    timed("50 MB: GET /data, s", program, "GET", f"/job/{job['job_id']}/data", Authorization=job["job_key"])
    values["50 MB: memory at the peak, MB more"] = program.memory("VmHWM") - before
    return values


def _timed(values: Values, name: str, program: Program, method: str, path: str, body: Any = None,
           **headers: str) -> bytes:
    begun = time.perf_counter()
    _, content = program.ask(method, path, body, **headers)
    values[name] = time.perf_counter() - begun
    return content


def measure_disk(program: Program, seconds: float) -> Values:
    """Durable requests from 64 connections."""
    return {"a sync takes 5 ms: POST echo, 64 connections":
            load(program.port, post("echo"), 64, seconds, program.place).rate}


def measure_start(program: Program, seconds: float) -> Values:
    """From the command to the first answer, with what Python keeps of modules it has compiled before; an import."""
    python = Path(f"/proc/{program.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    modules = {"csp": "csp", "old": "csp", "stdlib": "http.server, sqlite3"}.get(
        program.name, "ckanserviceprovider.web")
    environ = {**os.environ, "PYTHONPATH": str(DIRECTORIES.get(program.name, CSP.parent))}
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([python, "-c", f"import {modules}"], cwd=program.place, env=environ, check=True)
        times.append(time.perf_counter() - begun)
    return {"start to the first answer, s": program.start_seconds, "import, s": statistics.median(times)}


def measure_file(program: Program, seconds: float) -> Values:
    """From ``python3 csp.py`` to the first answer: Python compiles the file each time."""
    return {"start of python3 csp.py, s": program.start_seconds}


MEASURES: Dict[str, Tuple[Callable[[Program, float], Values], Tuple[str, ...], Dict[str, Any]]] = {
    "rates": (measure_rates, ("csp", "constant", "durable", *PEERS), {}),
    "callbacks": (measure_callbacks, ("csp", *PEERS), {"CALLBACK_DELAY_SECONDS": 0}),
    "jobs": (measure_jobs, ("csp", *PEERS), {}),
    "naps": (measure_naps, ("csp", "own"), {"WORKERS": 60}),
    "threads": (functools.partial(measure_executor, "thread"), ("csp",), {}),
    "processes": (functools.partial(measure_executor, "process"), ("csp",), {"EXECUTOR": "process"}),
    "memory": (measure_memory, ("csp", *PEERS), {}),
    "disk": (measure_disk, ("csp", "durable", *PEERS), {"slow_disk": True}),
    "start": (measure_start, ("csp", "stdlib", *PEERS) * 5, {}),
    "file": (measure_file, ("csp",) * 5, {"as_file": True}),
}


# -- Sizes: the same questions with more and more jobs

QUESTIONS = {
    "newest 100": "/job", "page at 90 %, by Link": "/job?_before={tenth}", "page at 90 %, by _offset":
    "/job?_offset={most}", "metadata value of 5 %": "/job?twentieth=5", "metadata value of one": "/job?own=77",
    "status": "/job?_status=error", "type": "/job?_type=echo", "/status": "/status", "/metrics": "/metrics",
    "one job": "/job/job-500", "page of jobs (HTML)": "/job#html", "overview (HTML)": "/#html"}


KINDS = (*["complete"] * 8, "error", "pending")


def seed(path: Path, count: int, kinds: Sequence[str] = KINDS, name: str = "csp") -> None:
    """Write so many jobs, with two metadata rows and two log rows each, into a new database; what is pending waits."""
    make_database(path, DIRECTORIES[name])
    now = time.time()

    def job(number: int) -> Tuple[Any, ...]:
        status, then = kinds[number % len(kinds)], _now(number % 86_000)
        return (number, f"job-{number}", "echo", status, '"hello"', None if status == "pending" else '">hello"',
                '{"a": "b"}', "key", then, then, None if status == "pending" else then,
                now + 400 if status == "pending" else None, 1)

    connection = sqlite3.connect(str(path), isolation_level=None)
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("BEGIN")
    connection.executemany(
        """INSERT INTO jobs (seq, job_id, job_type, status, sent_data, data, metadata, job_key, requested_timestamp,
        started_timestamp, finished_timestamp, run_at, attempts) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        map(job, range(1, count + 1)))
    connection.executemany(
        "INSERT INTO metadata (seq, job_id, key, value, type) VALUES (?, ?, ?, ?, 'string')",
        ((number, f"job-{number}", key, value) for number in range(1, count + 1)
         for key, value in (("own", str(number)), ("twentieth", str(number % 20)))))
    connection.executemany(
        """INSERT INTO logs (seq, job_id, timestamp, message, level, module, funcName, lineno)
        VALUES (?, ?, '2026-01-01T00:00:00.000000', 'a line of a common length', 'INFO', 'module', 'function', 1)""",
        ((number, f"job-{number}") for number in range(1, count + 1) for _ in range(2)))
    connection.execute("DELETE FROM counts")
    connection.execute("INSERT INTO counts SELECT job_type, status, count(*) FROM jobs GROUP BY 1, 2")
    connection.execute("COMMIT")
    connection.close()


def measure_size(count: int, repeats: int, name: str = "csp") -> Values:
    """Return medians in ms of the questions, a submission, the start and the memory, with so many jobs."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        path = Path(temporary) / "seed.db"
        seed(path, count, name=name)
        with running(name, database=path, MAX_PENDING=None) as program:
            values = {"start": program.start_seconds * 1e3, "memory, MB": program.memory()}
            for row, question in QUESTIONS.items():
                target, _, kind = question.format(most=count * 9 // 10, tenth=count // 10).partition("#")
                headers = {"Authorization": KEY, **({"Accept": "text/html"} if kind else {})}
                values[row] = _median_ms(program, repeats, "GET", target, None, headers)
            body = submission("echo", "hello")
            values["POST echo"] = _median_ms(program, repeats, "POST", "/job", body, dict([JSON]))
            return values


def measure_queue(count: int, name: str = "csp") -> float:
    """Return the resident memory in MB with so many jobs queued, which wait for their next attempt."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        path = Path(temporary) / "seed.db"
        seed(path, count, ("pending",), name)
        with running(name, database=path, MAX_PENDING=None) as program:
            time.sleep(1.0)  # the start goes on in the background
            return program.memory()


def _median_ms(program: Program, repeats: int, method: str, path: str, body: Any, headers: Dict[str, str]) -> float:
    connection, taken = http.client.HTTPConnection(LOCAL, program.port, timeout=60), []
    for _ in range(repeats):
        begun = time.perf_counter()
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        taken.append((time.perf_counter() - begun) * 1e3)
        if response.status != 200:
            raise ValueError(f"{path}: {response.status}")
    connection.close()
    return statistics.median(taken)


def measure_clearing(seconds: float, name: str = "csp") -> Values:
    """Clear 100,000 old jobs while submissions go on: their p99 in ms, before and meanwhile."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        path = Path(temporary) / "seed.db"
        seed(path, 111_000, name=name)
        connection = sqlite3.connect(str(path))
        connection.execute("UPDATE jobs SET finished_timestamp = '2020-01-01T00:00:00.000000' "
                           "WHERE finished_timestamp IS NOT NULL")
        connection.commit()
        connection.close()
        with running(name, database=path) as program:
            before = load(program.port, post("echo"), 4, seconds, program.place)
            deleted: List[int] = []
            clearing = threading.Thread(target=lambda: deleted.append(json.loads(
                program.ask("DELETE", "/job?days=1", Authorization=KEY)[1])["deleted"]))
            clearing.start()
            meanwhile = load(program.port, post("echo"), 4, seconds, program.place)
            clearing.join()
            return {"cleared": sum(deleted), "POST echo p99 before, ms": before.p99, "meanwhile, ms": meanwhile.p99}


# -- The report

LOW = (" ms", " s", "MB", "more", "seconds", "errors", "left", "lost", "never finished")


def best(name: str, values: Sequence[float]) -> float:
    """Return the best of several values of a row: rates want to be high, everything else low."""
    return min(values) if name.endswith(LOW) else max(values)


def goodness(name: str, new: float, old: float) -> Optional[float]:
    """Return how the new value stands to the old: more than 1 is better; None if one of them is 0."""
    if not new or not old:
        return None
    return old / new if name.endswith(LOW) else new / old


def cells(values: Sequence[Optional[float]], width: int, digits: int) -> str:
    """Return numbers as cells of a table."""
    return "".join(f"{'':>{width}}" if value is None else f"{value:>{width},.{digits}g}" for value in values)


def print_rows(results: Dict[str, Dict[str, List[float]]]) -> None:
    """Print a row for each figure: csp.py, the old one, the best of the peers, the floor, and the ratios to them."""
    print(f"\n{'':46}{'csp.py':>10}{'old':>10}{'new:old':>9}{'peer':>10}{'floor':>10}{'× peer':>9}{'× floor':>9}")
    for name, by_program in results.items():
        medians = {program: statistics.median(values) for program, values in by_program.items()}
        own, old = medians.get("csp"), medians.get("old")
        if own is None:
            continue
        peers = [medians[program] for program in PEERS if program in medians]
        floors = [medians[program] for program in FLOORS if program in medians]
        is_write = "POST" in name and "durable" in medians
        floor = medians["durable"] if is_write else floors[0] if floors else None
        peer = best(name, peers) if peers else None
        ratio = None if old is None else goodness(name, own, old)
        ratios = [own / value if value else None for value in (peer, floor)]
        print(f"{name:46}{cells((own, old), 10, 4)}{cells([ratio], 9, 3)}{cells((peer, floor), 10, 4)}"
              f"{cells(ratios, 9, 3)}")


def print_sizes(sizes: Dict[str, Dict[int, Values]]) -> None:
    """Print the questions' medians for each number of jobs, the ratio of the last to the first, and new:old."""
    counts = list(sizes["csp"])
    print(f"\n{'ms, with so many jobs':30}" + "".join(f"{count:>11,}" for count in counts) + f"{'ratio':>8}"
          + "".join(f"{f'new:old, {count:,}':>20}" for count in counts if "old" in sizes))
    for name in sizes["csp"][counts[0]]:
        values = [sizes["csp"][count][name] for count in counts]
        ratios = [sizes["old"][count][name] / sizes["csp"][count][name] for count in counts if "old" in sizes]
        print(f"{name:30}{cells(values, 11, 4)}{cells([values[-1] / values[0]], 8, 3)}{cells(ratios, 20, 3)}")


def measure_all(options: argparse.Namespace) -> Dict[str, Dict[str, List[float]]]:
    """Run the programs in turns; return the values by row and program."""
    results: Dict[str, Dict[str, List[float]]] = {}
    for _ in range(options.rounds):
        for title, (measure, programs, settings) in MEASURES.items():
            if title not in options.only:
                continue
            mine = (*programs, *("old" for name in programs if name == "csp" and "old" in DIRECTORIES))
            for name in random.sample(mine, len(mine)):  # who comes after the heaviest starts slower
                if name in PEERS and not options.peer:
                    continue
                try:
                    with running(name, options.peer, **settings) as program:
                        values = measure(program, options.seconds)
                except TROUBLE as error:
                    print(f"{title}, {name}: {type(error).__name__}: {error}", file=sys.stderr)
                    continue
                for row, value in values.items():
                    results.setdefault(row, {}).setdefault(name, []).append(value)
            print(f"{title}: measured", file=sys.stderr)
            if options.json:  # a long run may be ended early
                Path(options.json).write_text(json.dumps({"rows": results}), encoding="utf-8")
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", metavar="FILE", help="another csp.py, measured in turns with this one")
    parser.add_argument("--peer", default="", metavar="PYTHON", help="a Python that has ckanserviceprovider 1.2.0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default=",".join((*MEASURES, "sizes", "clearing")), metavar="NAME,…")
    parser.add_argument("--quick", action="store_true", help="one round of a second each, 100,000 jobs at most")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    parser.add_argument("--floor", help=argparse.SUPPRESS)
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        port, request, connections, seconds = json.loads(options.generate)
        generate(port, Request(*request), connections, seconds)
        return
    if options.floor:
        kind, port = options.floor.split()
        serve(int(port), DurableFloor("floor.db").respond if kind == "durable" else lambda _: answer(b"{}"), 320)
        threading.Event().wait()
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    options.only = options.only.split(",")
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="bench-old-") as temporary:
        if options.old:
            DIRECTORIES["old"] = Path(temporary)
            shutil.copy(options.old, str(DIRECTORIES["old"] / "csp.py"))
        for directory in DIRECTORIES.values():
            py_compile.compile(str(directory / "csp.py"))
        report(options)


def report(options: argparse.Namespace) -> None:
    """Measure what is asked for, and print it."""
    results = measure_all(options)
    print_rows(results)
    names = list(DIRECTORIES)
    for name in names if "clearing" in options.only else []:
        cleared = measure_clearing(options.seconds, name)
        print(f"\nClearing old jobs, {name}:", {row: round(value, 2) for row, value in cleared.items()})
    sizes: Dict[str, Dict[int, Values]] = {}
    if "sizes" in options.only:
        for count in (1_000, 100_000, *([] if options.quick else [1_000_000])):
            for name in random.sample(names, len(names)):
                sizes.setdefault(name, {})[count] = measure_size(count, 50, name)
        print_sizes(sizes)
        for name in names:
            most = max(sizes[name])
            print(f"\nmemory with {most:,} jobs queued, MB, {name}: {measure_queue(most, name):.1f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": results, "sizes": sizes}), encoding="utf-8")


if __name__ == "__main__":
    main()
