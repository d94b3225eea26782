"""Tests of csp.py, in the order of its parts. Run with pytest; real sockets, real SQLite files, real processes.

The file under test is csp.py beside this one, or the one that the environment variable CSP_FILE names.
"""

import ast
import atexit
import base64
import calendar
import concurrent.futures
import contextlib
import dis
import email.utils
import functools
import gc
import hashlib
import hmac
import html.parser
import http
import http.client
import http.server
import importlib
import io
import itertools
import json
import logging
import logging.handlers
import os
import queue
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import weakref
import zlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent
HERE = REPOSITORY  # where the csp.py under test is
CSP_FILE = os.environ.pop("CSP_FILE", "")  # a service would ask whether a setting is meant
if CSP_FILE:
    HERE = Path(tempfile.mkdtemp(prefix="test-csp-"))
    atexit.register(shutil.rmtree, str(HERE), ignore_errors=True)
    shutil.copy(CSP_FILE, str(HERE / "csp.py"))
sys.path.insert(0, str(HERE))
csp = importlib.import_module("csp")
PROGRAM = HERE / "csp.py"
PATIENCE_SECONDS = 30.0  # how long anything may take before a test fails; nothing sleeps for it
IN_CI = bool(os.environ.get("CI"))
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def eventually(condition, timeout_seconds=PATIENCE_SECONDS):
    """Return the first truthy value of ``condition()``; fail if there is none in time. The one bounded poll."""
    deadline = time.monotonic() + timeout_seconds
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.01)


RESPONSES = []  # every answer to every Client, for test_no_secret_is_anywhere_at_the_end


class Answer:
    """An HTTP answer: ``status``, ``headers`` (case-insensitive), ``body`` (bytes), ``json``."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body.decode("utf-8"))

    @property
    def error(self):
        return self.json["error"]


class Client:
    """Talks to a service over a real socket, a connection per request; redirects are not followed."""

    def __init__(self, url):
        self.url = url
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname, parts.port

    def request(self, method, path, body=None, headers=None, timeout=PATIENCE_SECONDS):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            is_stream = response.headers["Content-Type"] == "text/event-stream"  # of which the beginning is enough
            answer = Answer(response.status, response.headers, response.read1() if is_stream else response.read())
            RESPONSES.append(str(response.headers).encode("utf-8", "replace") + answer.body)
            return answer
        finally:
            connection.close()

    def get(self, path, key=None, **headers):
        return self.request("GET", path, headers=with_key(key, headers))

    def post(self, path, value=None, key=None, **headers):
        body = None if value is None else json.dumps(value)
        return self.request("POST", path, body, with_key(key, {"Content-Type": "application/json", **headers}))

    def delete(self, path, key=None, **headers):
        return self.request("DELETE", path, headers=with_key(key, headers))

    def submit(self, job_type, data=None, job_id=None, api_key="secret-api-key", **more):
        """Submit and return the job; the answer has to be 200."""
        body = {"job_type": job_type, "api_key": api_key, **more}
        if data is not None:
            body["data"] = data
        answer = self.post("/job" if job_id is None else "/job/" + urllib.parse.quote(job_id, safe=""), body)
        assert answer.status == 200, answer.body
        return answer.json

    def show(self, job):
        """Return the job as it is now."""
        answer = self.get("/job/" + urllib.parse.quote(job["job_id"], safe=""), key=job["job_key"])
        assert answer.status == 200, answer.body
        return answer.json

    def finish(self, job, timeout_seconds=PATIENCE_SECONDS):
        """Return the job once it is complete or error."""

        def finished():
            current = self.show(job)
            return current["status"] != "pending" and current

        return eventually(finished, timeout_seconds)


def with_key(key, headers):
    return headers if key is None else {**headers, "Authorization": key}


def basic(username, password):
    """Return the value of a Basic Authorization header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode("utf-8")).decode("ascii")


ADMIN = basic("admin", "correct horse battery staple")
SECURE_KEY = "the-secure-key-of-the-tests"
SETTINGS = {
    "PORT": 0, "PASSWORD": "correct horse battery staple", "SECRET_KEY": SECURE_KEY, "STDERR": False,
    "GRACE_SECONDS": 5, "NAME": "tests",
}


def session_hash(token):
    """Return what stands in the database for a session of the administrator of SETTINGS."""
    return hmac.new(f"admin:{SETTINGS['PASSWORD']}".encode(), token.encode(), "sha256").hexdigest()


SECRETS = (b"secret-api-key", SETTINGS["PASSWORD"].encode(), SECURE_KEY.encode(), ADMIN.encode())


@pytest.fixture(scope="session", autouse=True)
def no_secret_is_anywhere_at_the_end(tmp_path_factory):
    """After all tests: no answer, log or database holds a secret, but for the api_key of what is not yet delivered."""
    yield
    assert not [answer for answer in RESPONSES if any(secret in answer for secret in SECRETS)]
    for path in tmp_path_factory.getbasetemp().rglob("*"):
        if path.is_file() and (path.name == "log" or path.suffix == ".log"):
            assert not [secret for secret in SECRETS if secret in path.read_bytes()], path
        elif path.is_file() and path.name.startswith("jobs.db"):
            assert not [secret for secret in SECRETS[1:] if secret in path.read_bytes()], path
        if path.name == "jobs.db" and path.is_file():
            left = []
            with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(str(path))) as connection:
                left = connection.execute("""SELECT job_id FROM jobs WHERE api_key IS NOT NULL
                    AND finished_timestamp IS NOT NULL AND callback_at IS NULL""").fetchall()
            assert left == [], path


class RunningService:
    """A service and its server in this process: ``service``, ``server``, ``client``, ``registry``, ``path`` (of the
    database file), ``stop()``."""

    def __init__(self, path, registry, **settings):
        self.path, self.registry = path, registry
        self.settings = csp.Settings(
            {**SETTINGS, "SQLALCHEMY_DATABASE_URI": str(path) if path else "sqlite://", **settings}
        )
        self.service = csp.Service(self.settings, registry)
        self.server = csp.Server(self.service)
        self.client = Client(self.server.url)
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()
        self._is_stopped = False

    def stop(self, grace_seconds=5.0):
        if self._is_stopped:
            return
        self._is_stopped = True
        self.server.stop(grace_seconds)
        self._thread.join()
        self.service.close(grace_seconds)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a service: ``start(registry, path=tmp_path/"jobs.db", **settings)``. A service
    still running at the end of the test is stopped."""
    running = []

    def start_service(registry=None, path=tmp_path / "jobs.db", **settings):
        running.append(RunningService(path, registry or example_registry(), **settings))
        return running[-1]

    yield start_service
    for service in running:
        service.stop()


@pytest.fixture
def service(start):
    """A running service with ``example_registry()``."""
    return start()


@pytest.fixture
def client(service):
    """A client of ``service``."""
    return service.client


def example_registry():
    """Return job types that the tests share: echo, async_echo (as documented), fail, wait (until released), log."""
    registry = csp.Registry()

    @registry.synchronous
    def echo(task_id, input):
        handler = csp.StoringHandler(task_id, input)
        logger = logging.getLogger("test_csp.echo")
        logger.addHandler(handler)
        if not isinstance(input.get("data"), str):
            return input.get("data")
        if input["data"].startswith(">"):
            raise csp.JobError("do not start message with >")
        if input["data"].startswith("#"):
            raise Exception("serious exception")
        if input["data"].startswith("&"):
            logger.warning("just a warning")
        return ">" + input["data"]

    @registry.asynchronous
    def async_echo(task_id, input):
        return echo(task_id, input)

    return registry


class Receiver:
    """A callback receiver on a real port: ``url``; ``received`` is a list of (headers, JSON body) in order; ``answers``
    may be set to a function of the number of the request (from 0) that returns status and headers."""

    def __init__(self):
        self.received = []
        self.answers = lambda number: (200, {})
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver._lock:
                    number = len(receiver.received)
                    receiver.received.append((self.headers, json.loads(body.decode("utf-8"))))
                status, headers = receiver.answers(number)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 512
            daemon_threads = True

        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/callback"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def wait(self, count=1):
        """Return what was received once there are ``count``."""
        eventually(lambda: len(self.received) >= count)
        return self.received

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver():
    """A running Receiver."""
    receiver = Receiver()
    yield receiver
    receiver.stop()


class Clock:
    """The module ``time`` with a wall clock that a test may set."""

    offset = 0.0

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return time.time() + self.offset


class Process:
    """``python csp.py`` as a process of its own: ``url``, ``client``, ``banner`` (what it printed), ``kill()``,
    ``terminate()`` (returns the exit code). Its log goes to ``directory/log``."""

    def __init__(self, directory, *arguments, environ=None, python=sys.executable, cwd=None):
        self.log = Path(directory) / "log"
        environ = {
            **os.environ, "PYTHONUNBUFFERED": "1", "CSP_PASSWORD": SETTINGS["PASSWORD"], "CSP_SECRET_KEY": SECURE_KEY,
            "CSP_GRACE_SECONDS": "5", **(environ or {}),
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [python, str(PROGRAM), "--port", "0", *map(str, arguments)], cwd=str(cwd or directory), env=environ,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )
        self.banner = []
        while not self.banner or not self.banner[-1].startswith("Try it:"):
            line = self.process.stdout.readline().decode("utf-8")
            assert line, f"it did not start: {self.log.read_text()}"
            self.banner.append(line)
        self.url = re.search(r"http://\S+", self.banner[0])[0]
        self.client = Client(self.url)

    def kill(self):
        """SIGKILL, as a crash; harmless if it has ended."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        self.process.stdout.close()

    def terminate(self):
        """SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a Process with ``--db tmp_path/jobs.db`` and a job module made of ``source``."""
    processes = []

    def launch_process(source, *arguments, **options):
        (tmp_path / "my_jobs.py").write_text(textwrap.dedent(source), encoding="utf-8")
        processes.append(Process(tmp_path, "--jobs", "my_jobs", "--db", tmp_path / "jobs.db", *arguments, **options))
        return processes[-1]

    yield launch_process
    for process in processes:
        process.kill()


def run_command(*arguments, program=(str(PROGRAM),), input=None, cwd=None, environ=None):
    """Run ``python csp.py ARGUMENTS`` to its end; return the CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], input=input, cwd=cwd and str(cwd),
        env={**os.environ, **(environ or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
        timeout=PATIENCE_SECONDS,
    )


def raw_exchange(url, data, timeout=5.0):
    """Send bytes on a new connection; return all bytes that come back until the server closes or is quiet."""
    parts = urllib.parse.urlsplit(url)
    received = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=timeout) as connection:
        connection.sendall(data)
        with contextlib.suppress(OSError):
            while True:
                part = connection.recv(65536)
                if not part:
                    break
                received += part
    return received


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Browser:
    """A session of a real Chromium, spoken to over WebDriver (w3.org/TR/webdriver2); ``driver`` is its address."""

    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
    ARGUMENTS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage
        --disable-background-networking --disable-component-update --disable-sync""".split()

    def __init__(self, driver, profile, **looks):
        self._connection = http.client.HTTPConnection(driver.rpartition("/")[2], timeout=PATIENCE_SECONDS)
        options = {"args": [*self.ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}
        answer = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = "/session/" + answer["sessionId"]
        self.cdp("Emulation.setScrollbarsHidden", hidden=True)
        self._looks = {}
        self.look(**looks)

    def look(self, javascript=True, dark=False, width=1280, height=900):
        """Show pages in this way, without JavaScript only those that are opened from now on."""
        self.width = width  # of the viewport: a window cannot be as narrow as a phone
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        wanted = {
            "DeviceMetricsOverride": {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
            "EmulatedMedia": {"features": [scheme]}, "ScriptExecutionDisabled": {"value": not javascript},
        }
        for name, values in wanted.items():
            if self._looks.get(name) != values:
                self.cdp("Emulation.set" + name, **values)
        self._looks = wanted

    def _send(self, method, path, value=None):
        body = None if value is None else json.dumps(value)
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        value = json.loads(response.read().decode("utf-8"))["value"]
        if response.status >= 400:
            raise LookupError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    def _command(self, method, path, **value):
        return self._send(method, self._session + path, value if method == "POST" else None)

    def cdp(self, command, **parameters):
        return self._command("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, url):
        self._command("POST", "/url", url=url)
        return self

    @property
    def url(self):
        return self._command("GET", "/url")

    @property
    def path(self):
        return urllib.parse.urlsplit(self.url).path

    @property
    def source(self):
        return self._command("GET", "/source")

    def refresh(self):
        self._command("POST", "/refresh")

    def script(self, code, *arguments):
        return self._command("POST", "/execute/sync", script=code, args=list(arguments))

    def elements(self, css):
        found = self._command("POST", "/elements", using="css selector", value=css)
        return [element[self.ELEMENT] for element in found]

    def texts(self, css):
        """Return the visible text of all elements that are there now."""
        try:
            return [self._command("GET", f"/element/{element}/text") for element in self.elements(css)]
        except LookupError:  # replaced in between
            return []

    def find(self, css, text=""):
        """Return the first element whose visible text contains ``text``, once there is one."""

        def found():
            try:
                for element in self.elements(css):
                    if text in self._command("GET", f"/element/{element}/text"):
                        return element
            except LookupError:  # replaced in between
                return None
            return None

        return eventually(found)

    def _act(self, method, css, action, containing="", **value):
        """Do something with an element that ``find`` finds; again if the page has replaced it in between."""

        def done():
            try:
                return (self._command(method, f"/element/{self.find(css, containing)}/{action}", **value),)
            except LookupError as error:
                if "stale element" not in str(error):
                    raise
                return None

        return eventually(done)[0]

    def read(self, css):
        return self._act("GET", css, "text")

    def get(self, css, name):
        return self._act("GET", css, "property/" + name)

    def click(self, css, text=""):
        """Click and, if that opens a page, wait until the old one is gone."""
        self._act("POST", css, "click", text)
        return self

    def fill(self, css, text):
        element = self.find(css)
        self._command("POST", f"/element/{element}/clear")
        self._command("POST", f"/element/{element}/value", text=text)
        return self

    def press(self, key):
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._command("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def cookies(self):
        return {cookie["name"]: cookie["value"] for cookie in self._command("GET", "/cookie")}

    def set_cookie(self, name, value):
        self._command("POST", "/cookie", cookie={"name": name, "value": value})
        return self

    def complaints(self):
        """Return what the console holds since the last call: errors, violations of the policy, failed loads."""
        entries = self._command("POST", "/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def loaded(self):
        """Return what the page has loaded, sorted: pairs of an address and the bytes that were transferred."""
        return self.script(
            "return performance.getEntriesByType('resource').map(entry => [entry.name, entry.transferSize]).sort()"
        )

    def screenshot(self):
        """Return the whole page as a PNG."""
        size = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        return base64.b64decode(self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def close(self):
        self._send("DELETE", self._session)


@contextlib.contextmanager
def chromedriver(log):
    """Run a chromedriver of our own; give its address."""
    program, port = shutil.which("chromedriver"), free_port()
    process = subprocess.Popen([program, f"--port={port}"], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def is_ready():
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(url + "/status", timeout=5) as response:
                return json.loads(response.read().decode("utf-8"))["value"]["ready"]

    try:
        eventually(is_ready)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


HAS_BROWSER = bool(shutil.which("chromium") and shutil.which("chromedriver"))


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The address of a chromedriver; without one tests are skipped, in CI they fail."""
    if not HAS_BROWSER:
        (pytest.fail if IN_CI else pytest.skip)("chromium and chromedriver are not installed")
    with open(str(tmp_path_factory.mktemp("driver") / "chromedriver.out"), "wb") as output:
        with chromedriver(output) as url:
            yield url


@pytest.fixture(scope="session")
def browser_of_all(driver, tmp_path_factory):
    browser = Browser(driver, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browse(browser_of_all):
    """Return a function that gives the Browser, looking as its arguments say; it keeps nothing of the tests before."""

    def open_browser(**looks):
        browser_of_all.look(**looks)
        return browser_of_all

    yield open_browser
    browser_of_all.open("about:blank")
    for command in ("Network.clearBrowserCookies", "Network.clearBrowserCache"):
        browser_of_all.cdp(command)
    browser_of_all.complaints()


# ---------------------------------------------------------------------------------------------------------------------
# The source
# ---------------------------------------------------------------------------------------------------------------------

SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# -{50,}\n# (.+)\n(?:#.*\n)*?# -{50,}$", re.MULTILINE)
PARTS = [("", 0)] + [(banner[1], SOURCE.count("\n", 0, banner.start()) + 1) for banner in BANNER.finditer(SOURCE)]
# sys.stdlib_module_names is there from Python 3.10 on; the list is for older ones and has what csp.py may use
STANDARD_LIBRARY = getattr(
    sys,
    "stdlib_module_names",
    frozenset(
        """ _operator atexit gc multiprocessing pickle resource
    __future__ argparse ast base64 binascii bisect collections concurrent contextlib contextvars copy csv datetime
    difflib email errno
    fcntl functools getpass hashlib heapq hmac html http importlib inspect io ipaddress itertools json logging math
    mimetypes operator os pathlib platform queue random re secrets select selectors shlex shutil signal smtplib socket
    socketserver sqlite3 ssl stat string struct subprocess sys tempfile textwrap threading time traceback types typing
    urllib uuid warnings weakref wsgiref zlib""".split()
    ),
)


def part_of(node):
    """Return the number of the part that a node of TREE stands in; 0 is what comes before the first banner."""
    return max(number for number, (_, line) in enumerate(PARTS) if line <= node.lineno)


def parts_called(titles):
    return {number for number, (title, _) in enumerate(PARTS) if title in titles}


@functools.lru_cache(maxsize=None)
def names_of(statement):
    """Return the module-level names that a top-level statement defines, and those it uses when it or its code runs."""
    future = ast.Module(body=[TREE.body[1], statement], type_ignores=[])
    code = compile(future, str(PROGRAM), "exec")
    defined = {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
    return defined - {"annotations", "__annotations__"}, global_loads(code) - {"__annotations__"}


def global_loads(code):
    steps = list(dis.get_instructions(code))
    own = {step.argval for step in steps if step.opname == "STORE_NAME"} if code.co_name != "<module>" else set()
    loads = {step.argval for step in steps if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")} - own
    return loads.union(*(global_loads(constant) for constant in code.co_consts if hasattr(constant, "co_code")))


def uses_outside(root, attribute, titles):
    """Return the lines where ``root`` (or ``root.attribute``) is used, annotations aside, outside the titled parts."""
    outside = [statement for statement in TREE.body
               if part_of(statement) not in parts_called(titles) | {0} and root in names_of(statement)[1]]
    if attribute is None:
        return [statement.lineno for statement in outside]
    return [node.lineno for statement in outside for node in ast.walk(statement) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and (node.value.id, node.attr) == (root, attribute)]


def is_for_checkers(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def is_function(node):
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


class TestSource:
    def test_the_first_statements_are_the_docstring_and_the_future_import(self):
        assert ast.get_docstring(TREE)
        assert isinstance(TREE.body[1], ast.ImportFrom) and TREE.body[1].module == "__future__"

    def test_it_imports_the_standard_library_only(self):
        modules = {}
        for node in ast.walk(TREE):
            if isinstance(node, ast.Import):
                modules.update((alias.name.partition(".")[0], node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"relative import in line {node.lineno}"
                modules[node.module.partition(".")[0]] = node.lineno
        assert {name: line for name, line in modules.items() if name not in STANDARD_LIBRARY} == {}

    def test_no_line_is_too_long_and_nothing_is_global_or_left_to_do(self):
        assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []
        assert [number for number, line in enumerate(SOURCE.splitlines(), 1)
                if len(line) > 120 or re.search(r"\b(TODO|FIXME|XXX)\b", line)] == []

    def test_the_docstring_lists_the_parts_in_their_order(self):
        listed = [name.strip() for name in ast.get_docstring(TREE).rpartition("\n\n")[2].split(",")]
        titles = [title for title, _ in PARTS[1:]]
        assert [name for name in listed if name in titles] == titles
        assert set(listed) - set(titles) <= {"Runs", "Opening", "Process"}

    def test_every_line_of_dashes_belongs_to_a_banner(self):
        dashes = [line for line in SOURCE.splitlines() if re.fullmatch("# -{50,}", line)]
        assert len(dashes) == 2 * (len(PARTS) - 1) > 20
        assert {len(line) for line in dashes} == {len(dashes[0])}

    def test_a_part_uses_only_what_stands_above_it(self):
        names = [(statement, part_of(statement), *names_of(statement)) for statement in TREE.body[1:]]
        first = {}
        for _, part, defined, _ in names:
            for name in defined:
                first.setdefault(name, part)
        assert len(set(first.values())) == len(PARTS), "every part defines something"
        forward = [
            f"line {statement.lineno} ({PARTS[part][0]}) uses {name} of {PARTS[first[name]][0]}"
            for statement, part, _, used in names
            for name in used
            if first.get(name, 0) > part
        ]
        assert forward == []

    def test_names_that_are_used_exist(self):
        known = set(dir(csp)) | set(dir(__import__("builtins"))) | {"__name__", "__file__"}
        statements = [node for node in TREE.body if not is_for_checkers(node)]
        assert len(statements) == len(TREE.body) - 1
        assert sorted(set().union(*(names_of(statement)[1] for statement in statements)) - known) == []

    def test_sql_stands_in_store_and_opening_only(self):
        statement = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|PRAGMA|BEGIN|COMMIT)\b")
        found = [
            (part_of(node), node.lineno, node.value)
            for node in ast.walk(TREE)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and statement.match(node.value)
        ]
        allowed = parts_called(["Store", "Opening"])
        assert len([part for part, _, _ in found if part in allowed]) > 20
        assert [row for row in found if row[0] not in allowed and row[2] != "DELETE"] == []  # DELETE is HTTP's too

    @pytest.mark.parametrize("root, attribute, titles", [
        ("sqlite3", None, ["Store", "Opening"]), ("socket", None, ["Callbacks", "Executors", "Transports", "Process"]),
        ("multiprocessing", None, ["Executors"]), ("subprocess", None, ["Executors"]),
        ("socketserver", None, ["Transports"]), ("argparse", None, ["Command line"]),
        ("os", "environ", ["Settings", "Command line"]), ("os", "getenv", ["Settings", "Command line"]),
        ("sys", "argv", ["Settings", "Command line"]),
    ], ids=lambda value: value if isinstance(value, str) else "")
    def test_some_modules_are_used_in_their_part_only(self, root, attribute, titles):
        assert uses_outside(root, attribute, titles) == []

    def test_a_broad_except_gives_its_reason_or_raises(self):
        lines, reason = SOURCE.splitlines(), re.compile(r"# noqa: BLE001 - \S+ \S+ \S+")
        broad = [node for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and (
            node.type is None or isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))]
        assert broad
        assert [node.lineno for node in broad
                if not isinstance(node.body[-1], ast.Raise) and not reason.search(lines[node.lineno - 1])] == []

    def test_no_function_is_longer_than_sixty_lines(self):
        assert [(node.name, node.lineno) for node in ast.walk(TREE)
                if is_function(node) and node.end_lineno - node.lineno >= 60] == []

    def test_what_the_module_offers_has_docstrings(self):
        offered = {*csp.__all__, "set_progress", "check_cancelled", "JobCancelled"}
        found = [node for node in TREE.body if getattr(node, "name", "") in offered]
        found += [method for node in found if isinstance(node, ast.ClassDef) for method in node.body
                  if is_function(method) and not method.name.startswith("_") and node.name not in ("Service", "Server")]
        (service,) = [node for node in TREE.body if getattr(node, "name", "") == "Service"]
        endpoints = {row.endpoint.__name__ for row in csp.ROUTES}
        found += [method for method in service.body if getattr(method, "name", "") in endpoints]
        assert len(found) > 30
        assert [(node.name, node.lineno) for node in found if not ast.get_docstring(node)] == []

    def test_every_public_name_is_there(self):
        assert [name for name in csp.__all__ if not hasattr(csp, name)] == []
        assert len(csp.__all__) == len(set(csp.__all__)) > 10

    def test_it_is_imported_without_site_packages_and_without_a_word(self, tmp_path):
        code = ("import sys, threading; sys.path.insert(0, sys.argv[1]); import csp, csp.job, csp.util, csp.web; "
                "print(threading.active_count(), csp.__version__)")
        done = run_command("-c", code, HERE, program=("-I", "-S", "-O", "-W", "error"), cwd=tmp_path)
        assert (done.stdout, done.stderr, done.returncode) == (f"1 {csp.__version__}\n", "", 0)
        assert list(tmp_path.iterdir()) == []

    def test_a_key_is_compared_without_an_import_so_that_no_shortage_locks_its_holder_out(self, launch):
        server = launch("""
            import sys
            import csp.job as job

            @job.synchronous
            def see(task_id, input):
                return sorted(sys.modules)
            """)
        first = server.client.submit("see")
        assert server.client.show(first)["status"] == "complete"
        assert {"_hashlib", "hashlib", "hmac"}.isdisjoint(server.client.submit("see")["data"])

    def test_without_ssl_everything_but_https_works(self):
        code = """if True:
            import importlib.machinery, sys
            class NoSsl:
                def find_spec(name, path=None, target=None, find=importlib.machinery.PathFinder.find_spec):
                    return None if name == "_ssl" else find(name, path, target)
            importlib.machinery.PathFinder.find_spec = NoSsl.find_spec
            sys.modules.pop("_ssl", None)
            sys.path.insert(0, sys.argv[1]); import csp, http.client, threading, urllib.request
            assert not hasattr(http.client, "HTTPSConnection")
            service = csp.Service(csp.Settings({"SQLALCHEMY_DATABASE_URI": "sqlite://"}), csp.Registry())
            server = csp.Server(service, "127.0.0.1", 0)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert urllib.request.urlopen(server.url + "status").status == 200
            assert csp._make_opener(csp.CallbackPolicy(), True, {}).open(server.url + "status").status == 200
            server.server_close(); service.close(0.0)"""
        done = run_command("-c", code, HERE, program=("-I",))
        assert (done.stderr, done.returncode) == ("", 0)

    def test_it_needs_no_file_but_itself(self, tmp_path):
        (tmp_path / "ckanserviceprovider.py").write_text(SOURCE, encoding="utf-8")
        code = ("import sys; sys.path.insert(0, '.'); import ckanserviceprovider.job as job, "
                "ckanserviceprovider.util as util; from ckanserviceprovider import web; print(util.JobError('x'))")
        done = run_command("-c", code, program=("-I", "-S"), cwd=tmp_path)
        assert (done.stdout.strip(), done.stderr) == ("x", "")


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


class TestErrors:
    @pytest.mark.parametrize("name, arguments, status, headers", [
        ("CspError", (405, "A sentence with \ud800.", [("Allow", "GET")]), 405, [("Allow", "GET")]),
        ("Forbidden", ("A sentence with \ud800.",), 403, []), ("Conflict", ("A sentence with \ud800.",), 409, []),
        ("TooManyRequests", ("A sentence with \ud800.", 7), 429, [("Retry-After", "7")]),
        ("Unavailable", ("A sentence with \ud800.",), 503, [("Retry-After", "5")]),
    ], ids=lambda value: value if value in ("CspError", "Forbidden", "Conflict") else "")
    def test_a_refusal_is_an_answer(self, name, arguments, status, headers):
        refusal = getattr(csp, name)(*arguments)
        response = csp.Response.error(refusal)
        assert (refusal.status, response.status, response.headers) == (status, status, headers)
        assert json.loads(response.body) == {"error": "A sentence with ?."}

    def test_a_job_error_is_its_message_and_no_refusal(self):
        assert csp.JobError("no").as_dict() == {"message": "no"}
        assert (str(csp.JobError("no")), csp.JobError("no").message) == ("no", "no")
        assert not issubclass(csp.JobError, csp.CspError) and not issubclass(csp.StartError, csp.CspError)

    def test_except_exception_lets_a_cancellation_through(self):
        assert not issubclass(csp.JobCancelled, Exception)


# ---------------------------------------------------------------------------------------------------------------------
# JSON and time
# ---------------------------------------------------------------------------------------------------------------------

BOUNDED_NUMBERS = pytest.mark.skipif(
    not hasattr(sys, "get_int_max_str_digits"), reason="this Python has no bound for the digits of a number"
)
GOOD_JSON = {
    "null": (b"null", None), "true": (b"true", True), "false": (b"false", False), "zero": (b"0", 0),
    "minus zero": (b"-0", 0), "integer": (b"-123", -123), "fraction": (b"1.50", 1.5), "exponent": (b"1e2", 100.0),
    "capital exponent": (b"1E+2", 100.0), "negative exponent": (b"25e-1", 2.5),
    "more than 64 bits": (b"123456789012345678901234567890", 123456789012345678901234567890),
    "4,000 digits": (b"1" + b"0" * 4000, 10**4000), "underflow": (b"1e-999", 0.0), "empty string": (b'""', ""),
    "string": (b'"a"', "a"), "utf-8": ('"\u00fc\u20ac\U0001f600"'.encode(), "ü€\U0001f600"),
    "escapes": (rb'"\"\\\/\b\f\n\r\t"', '"\\/\b\f\n\r\t'), "escaped letter": (rb'"\u00fc\u00FC"', "üü"),
    "escaped nul": (rb'"\u0000"', "\0"), "escaped pair": (rb'"\ud83d\ude00"', "\U0001f600"),
    "noncharacter": (rb'"\uffff"', "\uffff"), "delete character": (b'"\x7f"', "\x7f"),
    "line separator": ('"\u2028\u2029"'.encode(), "\u2028\u2029"), "bom in a string": ('"\ufeff"'.encode(), "\ufeff"),
    "escaped backslash before u": (rb'"\\ud800"', "\\ud800"), "empty array": (b"[]", []), "empty object": (b"{}", {}),
    "array": (b"[1, [2], {}]", [1, [2], {}]), "object": (b'{"a": {"": null}}', {"a": {"": None}}),
    "all white space": (b" \t\r\n[ \t\r\n1 \t\r\n, 2 ] \t\r\n", [1, 2]),
    "nesting of 100": (b"[" * 100 + b"]" * 100, None), "same key at two levels": (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
    "wide": (b"[" + b"[]," * 500 + b"0]", [[]] * 500 + [0]),
    "brackets in strings": (b'["' + b"[{" * 500 + rb"\"[" + b'"]', ["[{" * 500 + '"[']),
    "a string that ends with a backslash": (b'["' + b"[" * 200 + rb'\\", "]"]', ["[" * 200 + "\\", "]"]),
    "keys that differ in case": (b'{"a": 1, "A": 2}', {"a": 1, "A": 2}),
}
BAD_JSON = {
    "nothing": b"", "white space only": b" \n", "NaN": b"NaN", "-NaN": b"-NaN", "Infinity": b"Infinity",
    "-Infinity": b"-Infinity", "nan": b"nan", "inf": b"inf", "NaN inside": b'{"a": [NaN]}', "True": b"True",
    "None": b"None", "undefined": b"undefined", "word": b"abc", "cut word": b"tru", "two values": b"1 2",
    "text after the value": b"{} x", "comma after an element": b"[1,]", "comma after a member": b'{"a": 1,}',
    "comma only": b"[,]", "two commas": b"[1,,2]", "no comma": b"[1 2]", "no colon": b'{"a" 1}', "no value": b'{"a":}',
    "no key": b"{: 1}", "number as a key": b"{1: 2}", "bare key": b"{a: 1}", "single quotes": b"{'a': 1}",
    "leading zero": b"01", "leading zero below zero": b"-01", "plus": b"+1", "point first": b".5", "point last": b"1.",
    "no exponent": b"1e", "hexadecimal": b"0x10", "underscore": b"1_000", "arabic digits": "\u0663".encode(),
    "minus only": b"-", "minus and space": b"- 1", "two points": b"1.2.3", "open string": b'"a', "open array": b"[1",
    "open object": b'{"a": 1', "closed twice": b"[]]", "mixed": b"[}", "newline in a string": b'"a\nb"',
    "tab in a string": b'"a\tb"', "nul in a string": b'"a\0b"', "escape character in a string": b'"\x1b"',
    "unknown escape": rb'"\x41"', "short escape": rb'"\u12"', "escape of a sign": rb'"\u+123"',
    "backslash at the end": b'"\\', "form feed": b"\x0c1", "vertical tab": b"\x0b1",
    "no-break space": "\u00a01".encode(), "nul after": b"1\0", "comment": b"/* a */ 1", "line comment": b"1 // a",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "utf-16 without bom": '{"a": 1}'.encode("utf-16-le"), "latin-1": '"\u00fc"'.encode("latin-1"),
    "cut utf-8": b'"\xe2\x82"', "overlong utf-8": b'"\xc0\xaf"', "surrogate in utf-8": b'"\xed\xa0\x80"',
    "beyond unicode": b'"\xf4\x90\x80\x80"', "lone high surrogate": rb'"\ud800"', "lone low surrogate": rb'"\udc00"',
    "reversed pair": rb'"\ude00\ud83d"', "lone surrogate in a key": rb'{"\uD800": 1}',
    "high surrogate and letter": rb'"\ud800\u0041"', "same key twice": b'{"a": 1, "a": 2}',
    "same key twice inside": b'[{"b": {"a": 1, "a": 1}}]', "same key, once escaped": rb'{"a": 1, "\u0061": 2}',
    "nesting of 101": b"[" * 101 + b"]" * 101, "nesting of 101 objects": b'{"a":' * 101 + b"1" + b"}" * 101,
    "100,000 open brackets": b"[" * 100_000, "100,000 brackets": b"[" * 100_000 + b"]" * 100_000,
    "100,000 open objects": b'{"a":' * 100_000, "brackets after a string": rb'"\\"' + b"[" * 100_000 + b"]" * 100_000,
}


class TestJson:
    @pytest.mark.parametrize("body, value", GOOD_JSON.values(), ids=GOOD_JSON)
    def test_json_is_accepted(self, body, value):
        parsed = csp.from_json(body)
        if value is not None:
            assert (parsed, type(parsed)) == (value, type(value))
        assert csp.from_json(csp.to_json(parsed).encode("utf-8")) == parsed

    @pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
    def test_what_is_not_json_is_refused(self, body):
        with pytest.raises(ValueError):
            csp.from_json(body)

    @pytest.mark.parametrize("body", [b"x", b'{"a": 1,}', b'{"a": "\xff"}', b"\xef\xbb\xbf\xef\xbb\xbf{}"], ids=repr)
    def test_the_documented_sentence_is_exact(self, client, body):
        answer = client.request("POST", "/job", body, {"Content-Type": "application/json"})
        assert (answer.status, answer.error) == (409, "Malformed json")

    def test_a_byte_order_mark_is_ignored(self, client):
        body = b'\xef\xbb\xbf{"job_type": "echo", "api_key": "k", "data": "a"}'
        assert client.request("POST", "/job", body, {"Content-Type": "application/json"}).json["data"] == ">a"

    @pytest.mark.parametrize("data, is_good", [
        (b"[" + b"[]," * 1_200_000 + b"0]", False), (b'{"a": [' + b"1," * 1_100_000 + b"1]}", False),
        (b'"' + b"1,[2],{}\\n" * 1_200_000 + b'"', True), (b"[" + b'"a,b",' * 600_000 + b"1]", True)],
        ids=["arrays", "numbers", "a string", "strings"])
    def test_what_has_a_million_values_is_refused_before_it_is_parsed(self, client, data, is_good):
        body = b'{"job_type": "async_echo", "api_key": "k", "data": %b}' % data
        begun = time.monotonic()
        answer = client.request("POST", "/job", body, {"Content-Type": "application/json"})
        assert (answer.status, "values" in answer.body.decode()[:200]) == ((200, False) if is_good else (409, True))
        assert is_good or time.monotonic() - begun < 2.0

    @pytest.mark.parametrize("api_key", ["1e999", "-1e999", "1" + "0" * 30, "NaN"])
    def test_an_api_key_that_is_no_sensible_number_is_refused(self, client, api_key):
        body = '{"job_type": "echo", "api_key": %s}' % api_key
        assert client.request("POST", "/job", body, {"Content-Type": "application/json"}).status == 409

    def test_values_come_back_as_they_were_sent(self, client):
        for value in (0, -1, 1.5, 2**70, 10**4000, True, [], {}, [None], "\0", "\u2028", "\U0001f600", "\x7f", "\\",
                      '"', "</script>", {"": {"a": [1, [2.5, None]]}}, list(range(2000))):
            expected = ">" + value if isinstance(value, str) else value
            job = client.submit("echo", value)
            assert (job["sent_data"], job["data"], job["status"]) == (value, expected, "complete")
            assert client.show(job)["sent_data"] == value

    @pytest.mark.parametrize("value", [
        float("nan"), float("inf"), [float("-inf")], "\ud800", {"\udc00": 1}, {1, 2}, b"bytes", ..., {(1, 2): 3},
    ], ids=repr)
    def test_values_without_a_text_are_refused(self, value):
        with pytest.raises((ValueError, TypeError)):
            csp.to_json(value)

    def test_circles_and_towers_are_refused(self):
        circle, tower = [], []
        circle.append(circle)
        for _ in range(200_000):
            tower = [tower]
        for value in (circle, tower):
            with pytest.raises((ValueError, RecursionError)):
                csp.to_json(value)
        while tower:  # the interpreter would free it by recursion
            tower = tower[0]

    @pytest.mark.parametrize("body", [
        b'{"a": [' + b"[]," * 200 + b'0], "b": "' + b"\\n" * 500_000 + b'"}', b'"' + b"\\" * 1_000_000 + b"[" * 200,
        b"[{" * 250_000 + b"}]" * 250_000, b"[" + b"[[[[[[[[]]]]]]]]," * 50_000 + b"0]",
    ], ids=["escapes", "backslashes", "objects and arrays", "many small towers"])
    def test_a_body_costs_little_memory_and_time_whatever_it_is(self, body, tmp_path):
        pytest.importorskip("resource")
        code = """if True:
            import json, resource, sys, time
            sys.path.insert(0, sys.argv[1])
            import csp
            body = open("body", "rb").read()
            flat = b"[" + b"1," * (len(body) // 2) + b"1]"
            started = time.process_time()
            json.loads(flat)
            usual, before = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.process_time()
            try:
                csp.from_json(body)
            except ValueError:
                pass
            print((time.process_time() - started) / usual, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            """
        (tmp_path / "body").write_bytes(body)
        ratio, kilobytes = map(float, run_command("-c", code, HERE, program=(), cwd=tmp_path).stdout.split())
        assert ratio < 12, "times what a flat array of this length costs"
        assert kilobytes < 30 * len(body) / 1000

    @pytest.mark.parametrize("seconds, fraction", [
        (0, "000000"), (1_700_000_000.5, "500000"), (1_700_000_000.000001, "000001"), (1_700_000_000.999999, "999999"),
        (4_000_000_000.125, "125000"),
    ], ids=repr)
    def test_a_timestamp_is_what_ckan_parses(self, seconds, fraction):
        text = csp.timestamp(seconds)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", text)
        assert time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S.%f")) == int(seconds)
        assert text[-6:] == fraction

    def test_a_timestamp_is_rounded_to_the_next_second_if_need_be(self):
        assert csp.timestamp(1_700_000_000.99999999) == csp.timestamp(1_700_000_001)

    def test_a_timestamp_is_local_time(self, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "XXX-5:45")
            time.tzset()
            text = csp.timestamp(60)
        time.tzset()
        assert text == "1970-01-01T05:46:00.000000"

    def test_every_timestamp_of_a_job_has_six_digits(self, client):
        job = client.submit("echo", "&a")
        stamps = [job[name] for name in ("requested_timestamp", "started_timestamp", "finished_timestamp")]
        stamps += [line["timestamp"] for line in job["logs"]]
        assert len(stamps) == 4
        assert stamps == [stamp for stamp in stamps if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", stamp)]


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TEXTS = ([("a", "a"), (5, "5")], [])
OPTIONAL_TEXTS = ([("a", "a"), ("", None), (None, None), (5, "5")], [])
FLAGS = ([(True, True), ("False", False), ("0", False), (1, True), ("yes", True), ("OFF", False), (" true ", True),
          ("", False), (None, False)], ["maybe", "2", 2, "ja", []])
WORDS = ([("", ()), (None, ()), ("a, b", ("a", "b")), (["a", " "], ("a",))], [5])


def whole(minimum, maximum):
    """Return the good and bad values of a setting that is a whole number."""
    return ([(minimum, minimum), (str(minimum), minimum), (f" {maximum} ", maximum)],
            [minimum - 1, maximum + 1, "x", "1.5", None, "", "0x10", float("nan"), "1e9", b"1", []])


def seconds(minimum, maximum):
    """Return the good and bad values of a setting that is a number of seconds."""
    return ([(minimum, float(minimum)), (str(maximum), float(maximum)), (minimum + 0.5, minimum + 0.5)],
            [minimum - 1, maximum + 1, "x", None, "", float("nan"), float("inf"), "nan", "-inf", []])


VALUES = {  # by setting: (good value, what it becomes) …, and bad values
    **dict.fromkeys(["NAME", "HOST", "USERNAME", "FROM_EMAIL"], TEXTS),
    **dict.fromkeys(["PASSWORD", "SECRET_KEY", "LOG_FILE"], OPTIONAL_TEXTS),
    **dict.fromkeys(["AUTO_CLEAR", "PUBLIC_JOB_LIST", "SSL_VERIFY", "STDERR", "DEBUG"], FLAGS),
    **dict.fromkeys(["API_KEYS", "CALLBACK_HOSTS", "ADMINS"], WORDS),
    **dict.fromkeys(["HEADER_SECONDS", "BODY_SECONDS", "SEND_SECONDS", "IDLE_SECONDS"], seconds(1, 3600)),
    **dict.fromkeys(["SESSION_IDLE_SECONDS", "SESSION_SECONDS"], seconds(60, 10**9)),
    **dict.fromkeys(["MAX_CONNECTIONS", "MAX_CONNECTIONS_PER_ADDRESS"], whole(1, 100_000)),
    "CALLBACK_SECRET": ([*OPTIONAL_TEXTS[0], ("whsec_c2VjcmV0", "whsec_c2VjcmV0")], ["whsec_!", "whsec_abc", "whsec_"]),
    "PORT": whole(0, 65_535),
    "EXECUTOR": ([(name, name) for name in ("thread", "process", "my_jobs:cluster", "pkg.jobs:Pool", "a/b.py:make")],
                 ["", None, "threads", "my_jobs", "my_jobs:", ":make", "my_jobs:2", "a:b.c", 5]),
    "URL": ([(None, None), ("", None), ("http://a:81", "http://a:81/"), ("https://a.org/jobs/", "https://a.org/jobs/")],
            ["a.org", "ftp://a", "http://", "http://a/?b", "http://a b/", 5]),
    "WORKERS": whole(1, 10_000),
    "KEEP_JOBS_AGE": whole(0, 36_500),
    "MAX_BODY_BYTES": whole(1024, 2**31),
    "MAX_URL_BYTES": whole(100, 2**20),
    "MAX_HEADER_BYTES": whole(1000, 2**20),
    "MAX_HEADER_FIELDS": whole(10, 10_000),
    "BODY_BYTES_PER_SECOND": whole(1, 2**30),
    "MAX_WAIT_SECONDS": whole(0, 86_400),
    "MAX_PENDING": ([(None, None), ("", None), (1, 1), ("5", 5)], [0, -1, "x", "1.5", 10**13]),
    "GRACE_SECONDS": seconds(0, 86_400),
    "TRUSTED_PROXIES": ([("", ()), ("10.0.0.0/8, ::1", ("10.0.0.0/8", "::1/128")), (["127.0.0.1"], ("127.0.0.1/32",))],
                        ["x", "10.0.0.0/33", "localhost", "1.2.3", ["a"], 5]),
    "CORS_ORIGINS": ([("", ()), (None, ()), ("https://a.org,http://b:81", ("https://a.org", "http://b:81"))],
                     ["a.org", "*", "https://a.org/", "ftp://a.org", "https://", 5]),
    "SQLALCHEMY_DATABASE_URI": (
        [(uri, uri) for uri in ("sqlite://", "sqlite:///a.db", "sqlite:////tmp/a.db", "a.db", "sqlite:///:memory:")],
        ["", "postgresql://localhost/jobs", "mysql://a", "sqlite:///", "sqlite://host/a.db", "http://a"]),
}


class TestSettings:
    @pytest.mark.parametrize("row", csp.SETTINGS, ids=lambda row: row.name)
    def test_its_values(self, row):
        good, bad = VALUES[row.name]
        assert len(good) >= 2 and len(row.help) > 10
        for given, value in [*good, (row.default, row.default)]:
            parsed = csp.Settings({row.name: given})[row.name]
            assert (parsed, type(parsed)) == (value, type(value))
        for value in bad:
            with pytest.raises(csp.StartError) as refusal:
                csp.Settings({row.name: value})
            assert re.fullmatch(rf"The setting {row.name} .+\.", str(refusal.value))

    def test_the_defaults_are_the_promised_ones(self):
        settings = csp.Settings()
        assert (settings["HOST"], settings["PORT"], settings["KEEP_JOBS_AGE"]) == ("127.0.0.1", 8000, 10)
        assert settings["PASSWORD"] is None and settings["SECRET_KEY"] is None and settings["SSL_VERIFY"] is True

    def test_the_predecessors_names_are_known(self):
        assert {
            "NAME", "HOST", "PORT", "USERNAME", "PASSWORD", "SECRET_KEY", "SQLALCHEMY_DATABASE_URI", "LOG_FILE",
            "STDERR", "KEEP_JOBS_AGE", "SSL_VERIFY", "FROM_EMAIL", "ADMINS", "DEBUG",
        } <= {row.name for row in csp.SETTINGS}

    def test_a_download_limit_of_datapusher_is_not_the_limit_of_bodies(self):
        settings = csp.Settings({"MAX_CONTENT_LENGTH": 10})
        assert settings["MAX_CONTENT_LENGTH"] == 10 and settings["MAX_BODY_BYTES"] > 10**6

    @pytest.mark.parametrize("sources", [
        [], ["file"], ["file", "environ"], ["file", "override"], ["environ", "override"],
    ], ids=" ".join)
    def test_the_later_source_wins(self, tmp_path, sources):
        path = tmp_path / "settings.py"
        path.write_text("NAME = 'file'\n" if "file" in sources else "")
        settings = csp.load_settings(str(path), {"CSP_NAME": "environ"} if "environ" in sources else {},
                                     {"NAME": "override"} if "override" in sources else {})
        assert settings["NAME"] == (sources or ["csp"])[-1]

    @pytest.mark.parametrize("environ, overrides, uri", [
        ({}, {}, "file.db"), ({"DATABASE_URL": "sqlite:///url.db"}, {}, "sqlite:///url.db"),
        ({"DATABASE_URL": "sqlite:///url.db", "CSP_SQLALCHEMY_DATABASE_URI": "csp.db"}, {}, "csp.db"),
        ({"DATABASE_URL": "sqlite:///url.db"}, {"SQLALCHEMY_DATABASE_URI": "option.db"}, "option.db"),
        ({"DATABASE_URL": ""}, {}, "file.db"),
    ], ids=["file", "DATABASE_URL", "CSP_", "option", "empty DATABASE_URL"])
    def test_database_url_stands_between_file_and_own_variable(self, tmp_path, environ, overrides, uri):
        path = tmp_path / "settings.py"
        path.write_text("SQLALCHEMY_DATABASE_URI = 'file.db'\n")
        assert csp.load_settings(str(path), environ, overrides)["SQLALCHEMY_DATABASE_URI"] == uri

    def test_a_wrong_value_is_shown_with_where_it_came_from_unless_it_is_a_secret(self, tmp_path):
        path = tmp_path / "settings.py"
        path.write_text("PORT = 'x'\n")
        for arguments, words in (((str(path), {}), f"the settings file {path} says 'x'"),
                                 ((None, {"CSP_WORKERS": "many"}), "the variable CSP_WORKERS says 'many'"),
                                 ((None, {}, {"PORT": "70000"}), "the command line says '70000'"),
                                 ((None, {"CSP_CALLBACK_SECRET": "whsec_hidden!"}), "the variable CSP_CALLBACK_SECRET"),
                                 ((None, {"DATABASE_URL": "mysql://a:hidden@b"}), "the variable DATABASE_URL")):
            with pytest.raises(csp.StartError, match=re.escape(words)) as refusal:
                csp.load_settings(*arguments)
            assert "hidden" not in str(refusal.value)

    def test_what_kubernetes_sets_for_a_service_called_csp_is_not_read(self, caplog):
        settings = csp.load_settings(None, {"CSP_PORT": "tcp://10.0.0.1:8000", "CSP_SERVICE_HOST": "10.0.0.1"})
        assert settings["PORT"] == 8000 and "CSP_PORT" in str(settings.doubts)

    def test_job_config_names_the_file_unless_an_option_does(self, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).write_text(f"NAME = {name!r}\n")
        environ = {"JOB_CONFIG": str(tmp_path / "one")}
        assert csp.load_settings(None, environ)["NAME"] == "one"
        assert csp.load_settings(str(tmp_path / "two"), environ)["NAME"] == "two"

    def test_variables_are_texts(self):
        given = {"PORT": "81", "DEBUG": "True", "STDERR": "False", "SSL_VERIFY": "0", "GRACE_SECONDS": "2.5",
                 "MAX_PENDING": "", "ADMINS": "a@b.c,d@e.f"}
        settings = csp.load_settings(None, {"CSP_" + name: value for name, value in given.items()})
        assert [settings[name] for name in given] == [81, True, False, False, 2.5, None, ("a@b.c", "d@e.f")]

    def test_a_settings_file_is_python_and_its_upper_case_names_are_kept(self, tmp_path):
        path = tmp_path / "settings.py"
        path.write_text(
            "import os\nlower = 1\n_HIDDEN = 2\nMAX_CONTENT_LENGTH = 1024 * 10\n"
            "CHUNK_SIZE = [1, {'a': 2}]\nNAME = 'Größe'\nPLACE = os.path.basename(__file__)\n",
            encoding="utf-8",
        )
        settings = csp.load_settings(str(path), {})
        assert (settings["MAX_CONTENT_LENGTH"], settings["CHUNK_SIZE"]) == (10240, [1, {"a": 2}])
        assert (settings["NAME"], settings["PLACE"]) == ("Größe", "settings.py")
        assert "lower" not in settings and "os" not in settings and "CHUNK_SIZE" in list(settings)
        assert settings.get("NO_SUCH_NAME") is None and len(settings) == len(list(settings))

    @pytest.mark.parametrize("text", [
        "NAME =", "1/0", "import no_such_module_anywhere", "raise KeyError('x')", "\0", "NAME = '\udcff'", "PORT = 'x'",
        "open('/no/such/file')", "raise SystemExit(0)",
    ], ids=repr)
    def test_a_broken_settings_file_is_a_sentence(self, tmp_path, text):
        path = tmp_path / "settings.py"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(csp.StartError) as refusal:
            csp.load_settings(str(path), {})
        assert re.fullmatch(r"The setting.+\.", str(refusal.value))
        assert "PORT" in str(refusal.value) or str(path) in str(refusal.value)

    @pytest.mark.parametrize("path", ["missing.py", "."])
    def test_a_settings_file_that_cannot_be_read_is_a_sentence(self, tmp_path, path):
        with pytest.raises(csp.StartError, match=r"^The settings file .+ cannot be read: .+\.$"):
            csp.load_settings(str(tmp_path / path), {})

    def test_a_database_uri_names_a_file(self):
        assert csp.database_path("sqlite://") is csp.database_path("sqlite:///:memory:") is None
        for uri, path in [("sqlite:///jobs.db", "jobs.db"), ("sqlite:////a/b.db", "/a/b.db"), ("./a b.db", "./a b.db")]:
            assert csp.database_path(uri) == path

    def test_another_database_engine_is_refused_and_the_password_is_not_repeated(self):
        with pytest.raises(csp.StartError) as refusal:
            csp.Settings({"SQLALCHEMY_DATABASE_URI": "postgresql://me:hidden@host/jobs"})
        assert "SQLite" in str(refusal.value) and "hidden" not in str(refusal.value)

    def test_settings_show_no_secrets(self):
        assert "hidden" not in repr(csp.Settings({"PASSWORD": "hidden"}))

    def test_the_readme_documents_every_setting_and_route_and_nothing_else(self):
        routes = re.findall(r"^\| `([A-Z]+)` \| `(/\S*)` \|", README, re.MULTILINE)
        settings = re.findall(r"^\| `([A-Z_]+)` \| (?:`(--[a-z-]+)`| +)[^|]*\|", README, re.MULTILINE)
        assert routes == [(row.method, row.path) for row in csp.ROUTES]
        assert settings == [(row.name, row.option) for row in csp.SETTINGS]


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------

SHOWN_FIELDS = {
    "job_id", "job_type", "status", "sent_data", "data", "error", "metadata", "logs", "result_url",
    "requested_timestamp", "finished_timestamp", "started_timestamp", "progress", "attempts", "callback",
    "resubmitted_from",
}
LOG_FIELDS = {"timestamp", "message", "level", "module", "funcName", "lineno"}


class HTTPError(csp.JobError):
    """As DataPusher has it: ``str`` of it raises, because its __str__ returns bytes."""

    def __init__(self, message, status_code):
        super().__init__(message)
        self.status_code = status_code

    def as_dict(self):
        return {"message": self.message, "HTTP status code": self.status_code, "Response": "ü"}

    def __str__(self):
        return f"{self.message} status={self.status_code}".encode("ascii", "replace")


def job_error(**members):
    """Return a JobError of a class that has these members."""
    return type("Broken", (csp.JobError,), members)("broken")


Leaving = type("Leaving", (Exception,), {"__str__": lambda self: sys.exit(3)})
Unprintable = type("Unprintable", (Exception,), dict.fromkeys(("__str__", "__repr__"), lambda self: {}["str"]))
ENDLESS = []  # holds itself
ENDLESS.append({"again": ENDLESS})


def raising(error):
    """Return a job function that raises ``error``."""

    def function(task_id, input):
        raise error

    return function


def registry_of(function, name="work", **options):
    """Return a registry with ``function`` as an asynchronous job type."""
    function.__name__ = name
    registry = csp.Registry()
    registry.asynchronous(**options)(function)
    return registry


def messages(job):
    return [line["message"] for line in job["logs"]]


def named(name, function):
    """Give ``function`` a name and return it."""
    function.__name__ = name
    return function


class Desk(RunningService):
    """A service in memory. Its job types ``later`` and ``now`` (synchronous) call the function that the test gives."""

    def __init__(self):
        registry = csp.Registry()
        for name, register in (("later", registry.asynchronous), ("now", registry.synchronous)):
            register(named(name, lambda task_id, input: self.function(task_id, input)))
        super().__init__(None, registry)

    def run(self, function, job_type="later", **submission):
        """Return the finished job that called ``function``."""
        self.function = function
        return self.client.finish(self.client.submit(job_type, **submission), 10)


@pytest.fixture(scope="class")
def desk():
    """A Desk for all tests of a class."""
    desk = Desk()
    yield desk
    desk.stop()


def logger_of(task_id, input, name="{}"):
    """Return a logger that writes to the job's log only; its name contains the job's id."""
    logger = logging.getLogger(name.format(task_id))
    logger.propagate = False
    logger.addHandler(csp.StoringHandler(task_id, input))
    return logger


class TestJobs:
    def test_ids_are_random_uuids_and_keys_have_128_bits(self):
        made = [csp.make_ids() for _ in range(200)]
        for job_id, key in made:
            assert str(uuid.UUID(job_id)) == job_id and uuid.UUID(job_id).version == 4
            assert re.fullmatch("[0-9a-f]{32}", key) and key[:8] not in job_id
        assert len({text for pair in made for text in pair}) == 400

    def test_the_lifecycle_is_the_table(self):
        allowed = set()
        for old, new in itertools.product(["queued", "running", "complete", "error"], repeat=2):
            try:
                csp.check_transition(old, new)
                allowed.add(f"{old} {new}")
            except ValueError as error:
                assert old in str(error) and new in str(error)
        assert allowed == {"queued running", "queued error", "running queued", "running complete", "running error"}

    # -- the registry

    @pytest.mark.parametrize("spelling, is_synchronous", [
        ("synchronous", True), ("sync", True), ("asynchronous", False), ("async_", False), ("async", False)])
    def test_every_spelling_registers_and_returns_the_function(self, spelling, is_synchronous):
        decorate = getattr(importlib.import_module("csp.job"), spelling)
        for options in (None, {}, {"timeout": 5}):
            function = named(f"function_{uuid.uuid4().hex}", lambda task_id, input: input)
            assert (decorate(function) if options is None else decorate(**options)(function)) is function
            job_type = csp.registry.get(function.__name__)
            assert (job_type.function, job_type.synchronous) == (function, is_synchronous)
            assert job_type.timeout == (options or {}).get("timeout")

    def test_two_functions_of_one_name_are_an_error_that_names_both(self):
        def twin(task_id, input):
            return 1

        registry, first = csp.Registry(), twin
        registry.synchronous(first)
        registry.synchronous(first)  # its module is loaded again

        def twin(task_id, input):  # noqa: F811 - this is the point
            return 2

        with pytest.raises(ValueError, match="twin.*names_both.*names_both") as error:
            registry.asynchronous(twin)
        assert all(str(function.__code__.co_firstlineno) in str(error.value) for function in (first, twin))
        assert registry.get("twin").function is first

    def test_what_the_executor_loses_again_and_again_waits_five_minutes_at_most(self):
        job = csp.Job._make([None] * len(csp.Job._fields))._replace(
            attempts=12, crashes=12, failures=0, synchronous=0, cancelled=0)
        job_type = csp.JobType("work", print, False, None, 20, False, None)
        assert csp.decide(job, job_type, csp.Ending(csp.LOST, reason="lost"), 1000.0).run_at == 1300.0

    @pytest.mark.parametrize("kind, options", [
        *[("asynchronous", {name: value}) for name, values in {
            "timeout": (0, -1, "60", float("nan"), float("inf"), 1e300), "retries": (-1, "3"),
            "memory_limit": (0, -1, "1G"), "no_such_option": (1,)}.items() for value in values],
        ("synchronous", {"retries": 1}), ("synchronous", {"at_most_once": True}),
        ("synchronous", {"memory_limit": 2**30}),
    ], ids=str)
    def test_an_invalid_option_is_refused(self, kind, options):
        registry = csp.Registry()
        with pytest.raises((ValueError, TypeError), match=kind if kind == "synchronous" else next(iter(options))):
            getattr(registry, kind)(**options)(lambda task_id, input: None)
        assert registry.names() == []

    def test_a_function_that_cannot_be_a_job_is_refused(self):
        async def coroutine(task_id, input):
            return 1

        async def generator(task_id, input):
            yield 1

        registry = csp.Registry()
        for function in (coroutine, generator, named("parts", lambda task_id, input: (yield 1))):
            with pytest.raises(TypeError, match=f"{function.__name__}.* plain function"):
                registry.asynchronous(function)

    # -- what a job looks like

    def test_a_job_has_the_promised_fields(self, client):
        submitted = client.submit("echo", "&a", metadata={"k": 1})
        shown = client.show(submitted)
        assert set(shown) == SHOWN_FIELDS and set(submitted) == SHOWN_FIELDS | {"job_key"}
        assert set(shown["logs"][0]) == LOG_FIELDS
        expected = {"job_type": "echo", "status": "complete", "sent_data": "&a", "data": ">&a", "error": None,
                    "metadata": {"k": 1}, "result_url": None, "progress": None, "attempts": 1, "callback": None,
                    "resubmitted_from": None}
        assert {key: shown[key] for key in expected} == expected

    # -- how a job fails

    @pytest.mark.parametrize("job_type", ["now", "later"])
    @pytest.mark.parametrize("error, document", [
        (csp.JobError("no"), {"message": "no"}), (csp.JobError({"a": 1}), {"message": "{'a': 1}"}),
        (csp.JobError(None), {"message": "None"}), (csp.JobError("\ud800"), {"message": "?"}),
        (HTTPError("gone", 410), {"message": "gone", "HTTP status code": 410, "Response": "ü"}),
        (job_error(as_dict=lambda self: {"message": {}["detail"]}), {"message": "broken"}),
        (job_error(as_dict=lambda self: {"message": "broken", "detail": {1, 2}}), {"message": "broken"}),
        (job_error(as_dict=lambda self: sys.exit(3)), {"message": "broken"}),
        (job_error(message=property(lambda self: 1 / 0, lambda self, value: None)), {"message": "Broken"}),
    ], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")
    def test_a_job_error_is_shown_as_it_describes_itself(self, desk, error, document, job_type):
        job = desk.run(raising(error), job_type)
        assert (job["status"], job["error"]) == ("error", document)

    @pytest.mark.parametrize("error, message", [
        (ValueError("serious"), "ValueError: serious"), (ValueError(), "ValueError"), (KeyError("k"), "KeyError: 'k'"),
        (ValueError("\ud800"), "ValueError: ?"), (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"), (Unprintable("x"), "Unprintable"), (Leaving("x"), "Leaving"),
        (Exception(Leaving("x")), "Exception"), (csp.Conflict("x"), "Conflict: x"),
    ], ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "")
    def test_any_other_exception_is_shown_with_its_traceback(self, desk, error, message):
        job = desk.run(raising(error))
        assert job["status"] == "error" and set(job["error"]) == {"message", "traceback"}
        assert job["error"]["message"].startswith(message) and "raise error" in job["error"]["traceback"]

    def test_memory_that_ran_out_is_freed_before_the_traceback_is_made(self):
        held = []

        def fill():
            kept = threading.Event()
            held.append(weakref.ref(kept))
            raise MemoryError

        with pytest.raises(RuntimeError) as raised:
            try:
                fill()
            except MemoryError:
                raise RuntimeError("no room")  # noqa: B904 - the MemoryError is its context
        assert "in fill" in json.loads(csp.error_document(raised.value))["traceback"] and held[0]() is None

    @pytest.mark.parametrize("result", [
        {1, 2}, object(), float("nan"), "\ud800", [b"bytes"], {(1, 2): 3}, ENDLESS,
        pytest.param(10**5000, marks=BOUNDED_NUMBERS),
    ], ids=["set", "object", "nan", "lone surrogate", "bytes inside", "tuple as key", "endless", "5,000 digits"])
    def test_a_result_that_is_not_json_is_an_error_that_says_so(self, desk, result):
        job = desk.run(lambda task_id, input: result)
        assert job["status"] == "error" and "not JSON" in job["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


class TestRuns:
    # -- the log

    def test_a_line_of_the_log_is_complete(self, client):
        line = client.submit("echo", "&a")["logs"][0]
        code = [number for number, text in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), 1)
                if text.strip() == 'logger.warning("just a warning")']
        assert (line["message"], line["level"], line["funcName"]) == ("just a warning", "WARNING", "echo")
        assert (line["module"], line["lineno"]) == (Path(__file__).stem, code[0])

    def test_a_hundred_calls_leave_nothing_behind(self, start):
        client = start(path=None).client

        def left_behind():
            gc.collect()
            return (len(logging.root.manager.loggerDict), len(logging.getLogger("test_csp.echo").handlers),
                    sum(isinstance(thing, (csp.StoringHandler, csp.Run)) for thing in gc.get_objects()))

        client.submit("echo", "&a")
        before = left_behind()
        assert {len(client.submit("echo", "&a")["logs"]) for _ in range(100)} == {1}
        after = left_behind()
        assert after[:2] == before[:2] and after[2] < before[2] + 10  # threads may still hold the last few

    @pytest.mark.parametrize("name", ["{}", "{}.child", "parent.{}", "parent.{}.child.grandchild"])
    def test_a_logger_named_after_the_job_is_gone_when_the_job_has_ended(self, desk, name):
        def work(task_id, input):
            logger = logger_of(task_id, input, name)
            logger.setLevel(logging.DEBUG)
            logger.debug("first")
            logger.info("second")

        before = set(logging.root.manager.loggerDict)
        assert messages(desk.run(work)) == ["first", "second"]
        eventually(lambda: set(logging.root.manager.loggerDict) - before <= {"parent"}, 5)

    @pytest.mark.parametrize("job_id", ["test_csp", "test_csp.shared", "root"])
    def test_an_id_that_a_client_chooses_removes_no_other_logger(self, desk, job_id):
        shared = logging.getLogger("test_csp.shared")

        def work(task_id, input):
            shared.addHandler(csp.StoringHandler(task_id, input))
            shared.warning("a line")

        before = dict(logging.root.manager.loggerDict)
        for _ in range(2):
            assert messages(desk.run(work, job_id=job_id)) == ["a line"]
            assert desk.client.delete("/job/" + job_id, key=SECURE_KEY).status == 200
        eventually(lambda: shared.handlers == [], 5)
        assert [name for name in before if logging.root.manager.loggerDict.get(name) is not before[name]] == []

    @pytest.mark.parametrize("name", ["test_csp.crowd", None], ids=["shared", "root"])
    def test_jobs_that_share_a_logger_have_a_log_each(self, start, name):
        barrier, shared = threading.Barrier(4, timeout=PATIENCE_SECONDS), logging.getLogger(name)

        def work(task_id, input):
            shared.addHandler(csp.StoringHandler(task_id, input))
            barrier.wait()
            for number in range(50):
                logging.getLogger("test_csp.crowd").warning("%s says %d", input["data"], number)
            barrier.wait()

        client = start(registry_of(work), path=None, WORKERS=4).client
        jobs = [client.submit("work", f"job {number}") for number in range(4)]
        for number, job in enumerate(jobs):
            assert messages(client.finish(job)) == [f"job {number} says {line}" for line in range(50)]
        eventually(lambda: not any(isinstance(handler, csp.StoringHandler) for handler in shared.handlers))

    @pytest.mark.parametrize("name, is_kept", [
        ("{}", True), ("{}.child", True), ("parent.{}", True), ("test_csp.shared", False)])
    def test_a_thread_of_the_job_logs_to_the_jobs_own_loggers_only(self, desk, name, is_kept):
        def work(task_id, input):
            logger = logging.getLogger(name.format(task_id))
            logger.addHandler(csp.StoringHandler(task_id, input))
            in_threads(1, lambda number: logger.warning("from a thread"))

        assert messages(desk.run(work)) == ["from a thread"] * is_kept

    def test_a_thread_of_the_job_may_add_the_handler_and_set_the_progress(self, desk):
        def work(task_id, input):
            in_threads(1, lambda number: logger_of(task_id, input).warning("from a thread"))
            in_threads(1, lambda number: csp.util.set_progress(task_id, 0.5))

        job = desk.run(work)
        assert (messages(job), job["progress"]) == (["from a thread"], {"fraction": 0.5, "message": None})

    @pytest.mark.parametrize("job_id", ["somelib", "somelib.part"])
    def test_an_id_that_is_the_name_of_a_library_gets_no_lines_of_other_jobs(self, start, job_id):
        registry, begun, go = csp.Registry(), threading.Event(), threading.Event()

        @registry.asynchronous
        def listen(task_id, input):
            logger = logging.getLogger(task_id)  # as in the README
            logger.addHandler(csp.StoringHandler(task_id, input))
            logger.warning("its own line")
            begun.set()
            assert go.wait(PATIENCE_SECONDS)

        @registry.synchronous
        def talk(task_id, input):
            for name in ("somelib", "somelib.part", "somelib.part.deeper"):
                logging.getLogger(name).warning("another job")
                in_threads(1, lambda number, name=name: logging.getLogger(name).warning("a thread of another job"))

        client = start(registry, path=None).client
        job = client.submit("listen", job_id=job_id)
        assert begun.wait(PATIENCE_SECONDS)
        client.submit("talk")
        go.set()
        assert messages(client.finish(job)) == ["its own line"]

    @pytest.mark.parametrize("arguments, expected", [
        ((None,), "None"), (("",), ""), (({"a": 1},), "{'a': 1}"), (("\ud800 and more",), "? and more"),
        (("a\0b",), "a\0b"), (("%s of %s", 1, 2), "1 of 2"), (("%d", "x"), "%d"), (("%s %s", 1), "%s %s"),
        (("%s", Unprintable()), "%s"), ((Unprintable(),), ""),
    ], ids=["None", "empty", "object", "surrogate", "nul", "arguments", "wrong type", "too few", "argument without str",
            "message without str"])
    def test_whatever_is_logged_is_a_string_in_the_log(self, desk, arguments, expected):
        job = desk.run(lambda task_id, input: logger_of(task_id, input).error(*arguments) or "done")
        (message,) = messages(job)
        assert job["data"] == "done" and isinstance(message, str) and expected in message

    def test_the_traceback_of_a_logged_exception_is_in_the_log(self, desk):
        def work(task_id, input):
            try:
                raise ValueError("deep inside")
            except ValueError:
                logger_of(task_id, input).exception("it failed")

        (message,) = messages(desk.run(work))
        assert message.startswith("it failed\nTraceback") and message.endswith("ValueError: deep inside")

    @pytest.mark.parametrize("job_type", ["now", "later"])
    @pytest.mark.parametrize("count, width", [(1, 1), (101, 3), (3_000, 4), (150, 30_000)])
    def test_the_log_has_all_lines_in_order(self, desk, job_type, count, width):
        lines = [f"{number:{width}}" for number in range(count)]  # of the last case more than may be kept in memory

        def work(task_id, input):
            logger = logger_of(task_id, input)
            for line in lines:
                logger.warning(line)

        job = desk.run(work, job_type)
        assert messages(job) == lines
        newest = desk.client.get(f"/job/{job['job_id']}?limit=2", key=SECURE_KEY).json
        assert messages(newest) == lines[:-3:-1]

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="filters return records since Python 3.12")
    def test_a_record_that_a_filter_returns_is_stored_instead(self, desk):
        def work(task_id, input):
            logger, instead = logger_of(task_id, input), {"msg": "instead", "args": ()}
            logger.handlers[0].addFilter(lambda record: logging.makeLogRecord({**vars(record), **instead}))
            logger.warning("a secret")

        assert messages(desk.run(work)) == ["instead"]

    def test_what_comes_after_the_end_is_dropped(self, desk):
        kept = []
        job = desk.run(lambda task_id, input: kept.append(logger_of(task_id, input)) or kept.extend(kept[0].handlers))
        logger, handler = kept
        eventually(lambda: handler.run.is_ended)
        logger.addHandler(handler)
        logger.warning("late")
        for job_id in (job["job_id"], "no such job"):
            csp.util.set_progress(job_id, 0.5)
            csp.util.check_cancelled(job_id)
        logger_of("no such job", {}).error("into the void")
        assert show(desk.client, job["job_id"]) == job

    # -- progress and cancelling

    def test_progress_is_shown_while_the_job_runs(self, desk):
        steps = queue.Queue()

        def work(task_id, input):
            for step in iter(lambda: steps.get(timeout=PATIENCE_SECONDS), None):
                csp.util.set_progress(task_id, *step)

        desk.function = work
        job = desk.client.submit("later")
        for step, fraction, message in [((0.5, "half"), 0.5, "half"), ((7, "\ud800"), 1.0, "?"), ((-1, 5), 0.0, "5")]:
            steps.put(step)
            shown = {"fraction": fraction, "message": message}
            eventually(lambda shown=shown: desk.client.show(job)["progress"] == shown)
        steps.put((1, "done"))
        steps.put(None)
        assert desk.client.finish(job)["progress"] == {"fraction": 1.0, "message": "done"}


# ---------------------------------------------------------------------------------------------------------------------
# Console
# ---------------------------------------------------------------------------------------------------------------------

BROWSER_ACCEPT = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"
HOSTILE = """<script>document.title = 'pwned'</script>"onmouseover='x=1' </pre></li><img src=x onerror=alert(1)>&lt;"""


class Page(html.parser.HTMLParser):
    """A parsed page: ``tags`` is a list of (name, attributes); it fails for markup that is not balanced."""

    EMPTY = ("meta", "link", "input", "br", "img")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self._open, self.text = [], [], ""
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def console_registry():
    """Return job types for pages: step (logs what it is told through ``steps``, until "stop"), echo, give, hostile."""
    registry = csp.Registry()
    registry.steps = queue.Queue()

    @registry.asynchronous
    def step(task_id, input):
        """Make a step each time it is told to.

        It logs, and shows progress.
        """
        logger = logging.getLogger(task_id)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(csp.StoringHandler(task_id, input))
        for number in itertools.count(1):
            word = registry.steps.get(timeout=10 * PATIENCE_SECONDS)  # one runs as long as the whole class
            if word == "stop":
                return {"steps": number}
            logger.log(getattr(logging, word), "step %d is %s: %s", number, word, input.get("data"))
            csp.util.set_progress(task_id, number / 4, f"number {number}: {input.get('data')}")
            csp.check_cancelled(task_id)

    @registry.synchronous
    def echo(task_id, input):
        return input.get("data")

    @registry.synchronous
    def give(task_id, input):
        """Give back bytes."""
        return base64.b64decode(input["data"])

    @registry.asynchronous
    def hostile(task_id, input):
        logger = logging.getLogger(task_id)
        logger.addHandler(csp.StoringHandler(task_id, input))
        logger.error(HOSTILE)
        if input.get("data") == "fail":
            raise ValueError(HOSTILE)
        return HOSTILE

    hostile.__doc__ = HOSTILE
    return registry


def page_of(client, path, status=200, key=ADMIN, **headers):
    """Return the text of a page."""
    answer = client.get(path, key=key, Accept=BROWSER_ACCEPT, **headers)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "text/html; charset=utf-8"), answer.body
    assert "Accept" in ", ".join(answer.headers.get_all("Vary"))
    return answer.body.decode("utf-8")


def post_form(client, path, fields, key=ADMIN, **headers):
    """Submit a form as a browser does."""
    body = fields if isinstance(fields, str) else urllib.parse.urlencode(fields)
    return client.request("POST", path, body, with_key(key, {**FORM, "Accept": BROWSER_ACCEPT, **headers}))


@pytest.fixture(scope="class")
def common(tmp_path_factory):
    """A service for tests that bear with the jobs of others."""
    running = RunningService(tmp_path_factory.mktemp("console") / "jobs.db", console_registry())
    yield running
    running.stop()


@pytest.fixture(scope="class")
def filled(tmp_path_factory):
    """A service with jobs of each kind, one of them running, and the paths of all its pages."""
    running = RunningService(tmp_path_factory.mktemp("filled") / "jobs.db", console_registry())
    client, image = running.client, base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    running.registry.steps.put("WARNING")
    jobs = [
        client.submit("step", HOSTILE, job_id='"><script>&amp;', metadata={"kind": HOSTILE}), client.submit("echo"),
        client.submit("echo", {"a": [1, "ü"]}, metadata={"kind": HOSTILE, HOSTILE: 1}),
        client.submit("echo", "a,b\n1,2\n", metadata={"mimetype": "text/csv"}),
        client.submit("echo", HOSTILE, metadata={"mimetype": "text/html"}),
        client.submit("echo", "x" * 100_000, api_key="k" * 300),
        client.submit("give", image, metadata={"mimetype": "image/png"}), client.submit("give", image),
        client.submit("hostile", HOSTILE, job_id='<b>"x"&'),
        client.submit("hostile", "fail", metadata={HOSTILE: HOSTILE}, result_url="http://127.0.0.1:9/?a"),
    ]
    for job in jobs[1:]:
        client.finish(job)
    eventually(lambda: client.show(jobs[0])["logs"])
    paths = ["/", "/job", "/job?_id=nothing", "/login", "/console/submit", "/nothing"]
    yield running, paths + ["/job/" + urllib.parse.quote(job["job_id"], safe="") for job in jobs]
    running.registry.steps.put("stop")
    running.stop()


@pytest.fixture(scope="class")
def listed(tmp_path_factory):
    """The client of a service with four echoes of two colors, a failure and a running job."""
    running = RunningService(tmp_path_factory.mktemp("listed") / "jobs.db", console_registry())
    client = running.client
    for number in range(4):
        more = {"metadata": {"color": "red" if number % 2 else "blue"}}
        client.submit("echo", number, job_id=f"my-{number}" if number < 2 else None, **more)
    client.finish(client.submit("hostile", "fail"))
    job = client.submit("step")
    eventually(lambda: client.show(job)["started_timestamp"])
    yield client
    running.registry.steps.put("stop")
    running.stop()


class TestConsole:
    @pytest.fixture
    def console(self, start):
        running = start(console_registry())
        yield running
        running.registry.steps.put("stop")

    def sign_in(self, browser, client, path="/"):
        """Open a page with the cookie of a new session."""
        browser.open(client.url + "status").set_cookie(*log_in(client).split("=", 1))
        return browser.open(client.url + path[1:])

    @pytest.mark.parametrize(
        "accept, is_page",
        [
            (None, False), ("*/*", False), ("application/json", False), ("text/*", False), (BROWSER_ACCEPT, True),
            ("text/html", True), ("application/json, text/html;q=0.9", False), ("text/html, application/json", True),
        ],
    )
    def test_a_page_is_for_whoever_prefers_pages(self, common, accept, is_page):
        for path in ("/", "/job", "/login", "/job/x", "/nothing"):
            answer = common.client.get(path, **({} if accept is None else {"Accept": accept}))
            assert answer.headers["Content-Type"] == ("text/html; charset=utf-8" if is_page else "application/json")
            assert is_page == answer.body.startswith(b"<!DOCTYPE html>")
            assert answer.headers["Vary"] == "Accept"

    def test_a_browser_may_ask_for_json(self, common):
        job = common.client.submit("echo", "x")
        answer = common.client.get(f"/job/{job['job_id']}?_format=json", key=ADMIN, Accept=BROWSER_ACCEPT)
        assert answer.json["data"] == "x"
        listed = common.client.get("/job?_limit=1&_format=json", Accept=BROWSER_ACCEPT)
        assert listed.json["list"] == ["/job/" + job["job_id"]]

    def test_every_page_is_sound_and_has_nothing_inline(self, filled):
        client, paths = filled[0].client, filled[1]
        for path, key in itertools.product(paths, (ADMIN, None)):
            answer = client.get(path, key=key, Accept=BROWSER_ACCEPT)
            if answer.status == 302:
                continue
            assert len(answer.body) < 60_000, path
            page = Page(answer.body.decode("utf-8"))
            identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
            assert len(identifiers) == len(set(identifiers)), path
            assert page.named("style", "iframe", "object", "embed", "base") == []
            names = {name for _, attributes in page.tags for name in attributes}
            assert [name for name in names if name.startswith("on") or name in ("style", "srcdoc")] == []
            assert [script["src"] for script in page.named("script")] == [csp.SCRIPT_PATH]
            assert [link["href"] for link in page.named("link") if link["rel"] == "stylesheet"] == [csp.STYLE_PATH]
            addresses = [tag.get("href") or tag.get("src") for tag in page.named("a", "img", "script")]
            addresses += [form["action"] for form in page.named("form")]
            assert [address for address in addresses if not re.match("/(?!/)|#", address)] == []
            assert [form for form in page.named("form") if form["method"] not in ("get", "post")] == []
            labelled = {label["for"] for label in page.named("label") if "for" in label}
            for field in page.named("input", "select", "textarea"):
                is_inside = field.get("name") == "api_key" and "id" not in field or field.get("id") == "follow"
                is_hidden = field.get("type") == "hidden"
                assert is_hidden or "aria-label" in field or is_inside or field["id"] in labelled, (path, field)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
            assert answer.headers["Referrer-Policy"] == "same-origin"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"

    def test_style_and_script_are_kept_under_the_name_of_their_content(self, common):
        for path, kind, text in (
            (csp.STYLE_PATH, "text/css", csp.STYLE), (csp.SCRIPT_PATH, "text/javascript", csp.SCRIPT),
        ):
            answer = common.client.get(path)
            assert (answer.body.decode(), answer.headers["Content-Type"]) == (text, f"{kind}; charset=utf-8")
            assert answer.headers.get_all("Cache-Control") == ["public, max-age=31536000, immutable"]
            assert f"{zlib.crc32(text.encode()):08x}" in path
        assert common.client.get("/console/style-0.css").status == 404

    def test_ten_thousand_jobs_fit_on_pages(self, tmp_path, start):
        csp.Store(str(tmp_path / "jobs.db")).close()
        fill(tmp_path / "jobs.db", 10_000)
        client = start(console_registry()).client
        newest = [f"/job/job-{number}" for number in range(10_000, 0, -1)]
        assert client.get("/job?_limit=10000").json["list"] == newest
        page = page_of(client, "/job")
        assert len(page) < 60_000
        older = re.search(r'href="([^"]+)" rel="next"', page)[1].replace("&amp;", "&")
        for shown, expected in ((page, newest[:50]), (page_of(client, older), newest[50:100])):
            assert re.findall(r'class="id" href="([^"]+)"', shown) == expected

    @pytest.mark.parametrize(
        "query, count",
        [
            ("", 6), ("?_status=complete", 4), ("?_status=error", 1), ("?_status=running", 1), ("?_status=queued", 0),
            ("?_type=echo", 4), ("?_type=echo&_status=error", 0), ("?_type=hostile&_status=error", 1),
            ("?_metadata=color%3Dred", 2), ("?_metadata=color%3Dred&_type=echo&_status=complete", 2),
            ("?color=red", 2), ("?_metadata=color", 6), ("?_id=my-", 2), ("?_id=my-1", 1), ("?_id=%25", 0),
            ("?_status=&_type=&_metadata=&_id=", 6), ("?done=delete", 6),
        ],
    )
    def test_the_list_is_filtered(self, listed, query, count):
        page = page_of(listed, "/job" + query)
        assert len(re.findall(r'class="id" href="/job/', page)) == count
        assert ("No jobs match." in page) == (count == 0)

    def test_who_is_not_the_administrator_sees_ids_only(self, common):
        job = common.client.submit("echo", "data", metadata={"s3cret-key": "s3cret"}, job_id="known")
        for path in ("/job", "/", "/job/known"):
            page = page_of(common.client, path, 403 if path == "/job/known" else 200, key=None)
            assert "s3cret" not in page and job["job_key"] not in page and "Latest failures" not in page
            assert re.findall("/console/(?!style-|script-)", page) == []

    def test_a_selection_is_resubmitted_as_a_whole_or_not_at_all(self, console):
        client = console.client
        jobs = [client.submit("echo", number) for number in range(3)]
        jobs.insert(0, client.submit("step", "x"))  # has its api_key still

        def resubmit(**more):
            fields = [("job_id", job["job_id"]) for job in jobs] + [("action", "resubmit"), *more.items()]
            return post_form(client, "/console/selection", fields)

        answer = resubmit(api_key="")
        assert answer.status == 409 and b"Please provide your API key." in answer.body
        assert len(client.get("/job").json["list"]) == 4
        jobs.append(jobs[0])  # named twice
        assert resubmit(api_key="again").headers["Location"] == "/job?done=resubmit"
        assert len(client.get("/job").json["list"]) == 8
        console.registry.steps.put("stop")  # and the fixture the other one

    def test_what_has_been_typed_stays_when_the_api_key_may_not_submit(self, start):
        client = start(console_registry(), API_KEYS=["the only key that may"]).client
        assert b'value="console"' not in client.get("/console/submit", key=ADMIN).body
        form = {"job_type": "echo", "api_key": "another", "data": '{"typed": "with care"}'}
        answer = post_form(client, "/console/submit", form)
        assert answer.status == 403 and b"This api_key may not submit jobs." in answer.body
        assert b"with care" in answer.body and client.get("/job").json["list"] == []

    def test_a_form_that_cannot_be_is_refused(self, common):
        answer = post_form(common.client, "/console/selection", "action=delete" + "&job_id=x" * 300)
        assert answer.status == 413 and b"A form may have" in answer.body
        answer = post_form(common.client, "/console/selection", "job_id=x&action=DELETE")
        assert answer.status == 409 and b"action has to be cancel, delete or resubmit" in answer.body

    def test_signing_in_after_a_lost_session_leads_to_a_page(self, common):
        answer = post_form(common.client, "/console/selection", "action=delete", key=None)
        assert answer.status == 403 and b'href="/login?next=/job"' in answer.body

    @pytest.mark.parametrize(
        "value, metadata, shown",
        [
            ("x" * csp.LARGE_CHARACTERS, {}, "xxxxxxxxxx</pre>"),
            ("\u00e4" * csp.LARGE_CHARACTERS, {}, "2,097,152 bytes"),
            ([["y" * csp.LARGE_CHARACTERS]], {}, "[[&quot;yyyy"),
            ("a,b\n" + "1,2\n" * (csp.LARGE_CHARACTERS // 4), {"mimetype": "text/csv"}, "<td>2</td>"),
        ],
        ids=["text", "more than ASCII", "JSON", "CSV"],
    )
    def test_a_large_result_is_shown_like_a_small_one(self, common, value, metadata, shown):
        job = common.client.submit("echo", value, metadata=metadata)
        page = page_of(common.client, f"/job/{job['job_id']}")
        assert shown in page and len(page) < csp.LARGE_CHARACTERS // 2

    def test_who_holds_a_key_only_ends_up_where_they_may_be(self, start):
        client = start(console_registry(), PUBLIC_JOB_LIST=False).client
        job = client.submit("echo", "x")
        answer = post_form(client, f"/job/{job['job_id']}/delete", "", key=job["job_key"])
        page_of(client, answer.headers["Location"], key=None)
        assert 'href="/login?next=/job"' in page_of(client, "/job", 403, key=None)

    def test_results_are_shown_as_what_they_are(self, common):
        client = common.client

        def result(type_name, data, mimetype=None):
            job = client.submit(type_name, data, **({"metadata": {"mimetype": mimetype}} if mimetype else {}))
            return page_of(client, "/job/" + job["job_id"])

        image = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
        assert '<img class="result" src="/job/' in result("give", image, "image/png")
        assert '<img class="result"' not in result("give", image) and "8 bytes" in result("give", image)
        assert '<img class="result"' not in result("give", image, "image/svg+xml")
        page = result("echo", "name,size\nü,1\n", "text/csv")
        assert '<th scope="col">name</th>' in page and "<td>ü</td><td>1</td>" in page
        assert '<th scope="col">a</th>' in result("echo", 'a\n"b', "text/csv")
        assert '<pre id="data" tabindex="0">{\n  &quot;a&quot;: 1\n}</pre>' in result("echo", {"a": 1})
        assert '<pre id="data" tabindex="0">a text</pre>' in result("echo", "a text")
        page = result("echo", "x" * 100_000)
        assert "The first 6,000 of 100,000 characters" in page and "/data" in page

    def test_the_log_is_filtered_by_level(self, console):
        job = console.client.submit("step")
        for word in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "stop"):
            console.registry.steps.put(word)
        console.client.finish(job)
        for level, count in (("", 5), ("info", 4), ("warning", 3), ("error", 2), ("nonsense", 5)):
            page = page_of(console.client, f"/job/{job['job_id']}?level={level}")
            assert len(re.findall("<li class=", page)) == count

    def test_the_chart_counts_what_ended_in_each_hour_also_after_a_restart(self, start):
        running = start(console_registry())
        for _ in range(3):
            running.client.submit("echo", 1)
        running.client.finish(running.client.submit("hostile", "fail"))
        running.stop()
        page = page_of(start(console_registry()).client, "/")
        assert "3 complete and 1 failed in the last 24 hours" in page
        assert set(re.findall(r'<rect class="(\w+)"', page)) == {"complete", "error"}
        numbers = re.findall(r": (\d+) (complete|failed)</title>", page)
        assert sum(int(jobs) for jobs, word in numbers if word == "complete") == 3

    # -- signing in

    def test_a_wrong_password_is_said_in_the_form_without_a_pop_up(self, console):
        fields = {"username": "<admin>", "password": "wrong", "next": "/job?_status=error"}
        answer = post_form(console.client, "/login", fields, key=None)
        assert answer.status == 401 and "WWW-Authenticate" not in answer.headers
        page = Page(answer.body.decode())
        values = {field["name"]: field.get("value") for field in page.named("input")}
        assert values == {"username": "<admin>", "password": None, "next": "/job?_status=error"}
        assert "user name or password is wrong" in page.text
        for _ in range(csp.FREE_FAILURES):
            answer = post_form(console.client, "/login", fields, key=None)
        assert answer.status == 429 and answer.headers["Retry-After"] and b"Too many failed logins" in answer.body

    @pytest.mark.parametrize(
        "path", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"]
    )
    def test_signing_in_leads_nowhere_else(self, common, path):
        page = Page(page_of(common.client, "/login?next=" + urllib.parse.quote(path, safe=""), key=None))
        assert [field["value"] for field in page.named("input") if field["name"] == "next"] == ["/"]

    # -- the key of a job

    def test_a_job_key_typed_into_its_page_opens_that_job_and_no_other(self, common):
        client = common.client
        job, other = client.submit("echo", "mine"), client.submit("echo", "other")
        path = "/job/" + job["job_id"]
        page = page_of(client, path, 403, key=None)
        assert "This job needs a key" in page and "mine" not in page
        browser = {"key": None, "Origin": client.url.rstrip("/")}
        for wrong in ("", "x", other["job_key"], "ü"):
            answer = post_form(client, path + "/key", {"job_key": wrong}, **browser)
            assert (answer.status, answer.headers["Set-Cookie"]) == (403, None)
            assert b"That is not the key of this job." in answer.body
        answer = post_form(client, path + "/key", {"job_key": " " + job["job_key"]}, **browser)
        cookie, _, attributes = answer.headers["Set-Cookie"].partition("; ")
        assert (answer.status, answer.headers["Location"]) == (302, path)
        assert attributes == f"Path={path}; HttpOnly; SameSite=Strict"
        assert "mine" in page_of(client, path, key=None, Cookie=cookie)
        assert client.get(path + "/data", Cookie=cookie).body == b"mine"
        assert client.get("/job/" + other["job_id"], Cookie=cookie).status == 403
        browser["Cookie"] = cookie
        assert post_form(client, path + "/delete", "", **{**browser, "Origin": "null"}).status == 403
        assert post_form(client, path + "/delete", "", key=None, Cookie=cookie).status == 403
        again = post_form(client, path + "/resubmit", {"api_key": "k"}, **browser)
        new_cookie = again.headers["Set-Cookie"].partition(";")[0]
        page_of(client, again.headers["Location"].partition("?")[0], key=None, Cookie=new_cookie)
        assert post_form(client, path + "/delete", "", **browser).status == 302
        assert client.get(path, key=ADMIN).status == 404

    @pytest.mark.parametrize(
        "route", [route for route in csp.CONSOLE_ROUTES if route.access != "all"],
        ids=lambda route: f"{route.method} {route.path}")
    def test_forms_of_other_sites_do_nothing(self, common, route):
        client = common.client
        job = client.submit("echo", "x")
        before = client.get("/job").json
        fields = {"job_id": job["job_id"], "action": "delete", "days": "0", "job_type": "echo", "api_key": "k"}
        path = route.path.replace("<job_id>", job["job_id"])
        for origin in ({}, {"Origin": "null"}, {"Origin": "https://evil.example"}):
            headers = {**FORM, "Cookie": log_in(client), "Accept": BROWSER_ACCEPT, **origin}
            answer = client.request(route.method, path, urllib.parse.urlencode(fields), headers)
            assert answer.status == (200 if route.method == "GET" else 403)
            assert client.get("/job").json == before

    @pytest.mark.parametrize(
        "fields, status, sentence",
        [
            ({"job_type": "echo", "data": '{"a": 1}'}, 302, ""), ({"job_type": "echo"}, 302, ""),
            ({"job_type": "echo", "data": "{"}, 409, "data is not JSON"),
            ({"job_type": "echo", "metadata": "[1]"}, 409, "metadata has to be a json object"),
            ({"job_type": "echo", "metadata": "NaN"}, 409, "metadata is not JSON"),
            ({"job_type": "gone"}, 409, "Job type gone not available"), ({}, 409, "Please specify a job type"),
            ({"job_type": "echo", "result_url": "ftp://x"}, 409, "result_url has to start with http"),
            ({"job_type": "echo", "api_key": ""}, 409, "Please provide your API key."),
        ],
        ids=str,
    )
    def test_the_form_to_submit_says_what_is_wrong_and_keeps_what_was_typed(self, common, fields, status, sentence):
        fields = {"api_key": "<key>", **fields}
        answer = post_form(common.client, "/console/submit", fields)
        assert answer.status == status
        if status == 302:
            path = answer.headers["Location"].partition("?")[0]
            done = eventually(lambda: (job := common.client.get(path, key=ADMIN).json)["status"] == "complete" and job)
            assert done["data"] == json.loads(fields.get("data", "null"))
        else:
            page = Page(answer.body.decode())
            assert sentence in page.text
            assert fields.get("data", "").strip() in page.text
            keys = [field["value"] for field in page.named("input") if field.get("name") == "api_key"]
            assert keys == [fields["api_key"]]

    # -- a real browser

    def test_a_person_watches_and_steers_jobs(self, console, browse):
        url, browser = console.client.url, browse()
        console.client.submit("step", 7, job_id="a-step")
        console.client.submit("echo", "x", job_id="an-echo")
        browser.open(url + "job?_status=complete").click("header a", "Sign in")
        browser.fill("#username", "admin").fill("#password", "wrong").click("main button", "Sign in")
        assert "password is wrong" in browser.read("[role=alert]")
        browser.fill("#password", SETTINGS["PASSWORD"]).click("main button", "Sign in")
        browser.find("h1", "Jobs")
        assert browser.url == url + "job?_status=complete" and browser.texts("a.id") == ["an-echo"]
        complaints = browser.complaints()  # Chromium notes the 401 of the wrong password
        assert len(complaints) <= 1 and "401" in "".join(complaints)

        browser.click("#status option", "all").click("#type option", "step").click("main button", "Show")
        eventually(lambda: browser.texts("a.id") == ["a-step"])
        browser.click("a.id", "a-step").find(".badge", "running")
        mark = browser.script("return window.mark = Math.random()")
        for number, word in enumerate(("INFO", "DEBUG", "WARNING"), 1):
            console.registry.steps.put(word)
            browser.find("#log li:last-child", f"{word} step {number} is {word}")
            browser.find("#progress", f"{number * 25} % number {number}")
        assert browser.get("#progress progress", "value") == 0.75
        assert browser.script("return window.mark") == mark, "without a reload"
        browser.click("#head button", "Cancel").find("[role=status]", "Cancellation requested.")
        console.registry.steps.put("INFO")
        browser.find(".badge", "failed")
        assert "cancelled" in browser.read("#error")
        browser.fill("#head input[name=api_key]", "again").click("#head button", "Resubmit")
        browser.find("[role=status]", "Resubmitted.")
        again = browser.path
        assert again != "/job/a-step" and "a-step" in browser.read("#facts")
        console.registry.steps.put("stop")
        browser.find(".badge", "complete")
        assert '"steps": 1' in browser.read("#data")
        browser.click("#head summary", "Delete").click("#head button", "Delete permanently")
        browser.find("[role=status]", "Deleted.")
        assert console.client.get(again, key=ADMIN).status == 404
        copied = browser.cookies()["csp_session"]
        browser.click("header button", "Sign out").find("header a", "Sign in")
        browser.set_cookie("csp_session", copied)
        browser.open(url + "console/submit").find("h1", "Forbidden")
        assert [line for line in browser.complaints() if "403" not in line] == []

    def test_without_javascript_the_same_steps_are_made_by_forms(self, console, browse):
        client, browser = console.client, browse(javascript=False)
        browser.open(client.url + "login?next=/console/submit")
        assert browser.get("html", "className") == ""
        browser.fill("#username", "admin").fill("#password", SETTINGS["PASSWORD"]).click("main button", "Sign in")
        browser.click("#job_type option", "step").fill("#data", '{"n": 1}')
        browser.click("main button", "Submit").find("[role=status]", "Submitted.")
        path = browser.path
        console.registry.steps.put("WARNING")
        eventually(lambda: client.get(path, key=ADMIN).json["progress"])
        browser.refresh()
        assert "25 % number 1" in browser.read("#progress") and "step 1 is WARNING" in browser.read("#log")
        browser.click("#level option", "error and above").click("main button", "Show")
        eventually(lambda: browser.url.endswith("?level=error") and not browser.texts("#log li"))
        browser.click("#head button", "Cancel").find("[role=status]", "Cancellation requested.")
        console.registry.steps.put("INFO")
        eventually(lambda: client.get(path, key=ADMIN).json["status"] == "error")
        browser.refresh()
        browser.fill("#head input[name=api_key]", "again").click("#head button", "Resubmit")
        browser.find("[role=status]", "Resubmitted.")
        console.registry.steps.put("stop")
        browser.open(client.url + "job").click(f"input[value='{path.rpartition('/')[2]}']")
        browser.click("main button", "Delete").find("[role=status]", "Deleted.")
        again, = browser.texts("a.id")
        eventually(lambda: client.get("/job/" + again, key=ADMIN).json["status"] == "complete")
        browser.fill("#days", "0").click("main button", "Delete old jobs").find("[role=status]", "Old jobs deleted.")
        assert browser.texts("a.id") == []
        browser.click("header button", "Sign out").find("header a", "Sign in")
        assert "csp_session" not in browser.cookies()

    def test_what_jobs_hold_is_text_and_nothing_else(self, filled, browse):
        running, paths = filled
        live, good, bad = paths[-10], paths[-2], paths[-1]
        browser = self.sign_in(browse(), running.client)
        for path in ("/", "/job", "/job?_id=%3Cscript%3E&_metadata=%22%3E%3Cimg%20src=x%20onerror=alert(1)%3E", good,
                     bad, live):
            browser.open(running.client.url + path[1:])
            if path == good:
                assert browser.read("h1") == '<b>"x"&'
                assert HOSTILE in browser.read("#data") and HOSTILE in browser.read("#log")
            elif path == bad:
                assert HOSTILE in browser.read("#error") and HOSTILE in browser.read("#facts")
            elif path == live:
                assert browser.read("h1") == '"><script>&amp;' and HOSTILE in browser.read("#facts")
                running.registry.steps.put("ERROR")
                browser.find("#log li:last-child", "is ERROR: " + HOSTILE)
                browser.find("#progress", "number 2: " + HOSTILE)
            assert browser.elements("main img, main script, [onmouseover], [onerror]") == [], path
            assert "pwned" not in browser.script("return document.title"), path
        assert browser.complaints() == []

    def test_the_overview_is_live(self, console, browse):
        browser = self.sign_in(browse(), console.client)
        mark = browser.script("return window.mark = Math.random()")
        assert "0" in browser.read("#numbers .running")
        console.client.finish(console.client.submit("hostile", job_id="a"))
        console.client.finish(console.client.submit("hostile", "fail", job_id="b"))
        console.client.submit("step")
        browser.find("#numbers .running", "1")
        browser.find("#numbers .complete", "1")
        browser.find("#chart", "1 complete and 1 failed")
        browser.find("#failures a", "b")
        assert browser.script("return window.mark") == mark and browser.complaints() == []

    def test_a_key_opens_a_job_in_a_browser(self, console, browse):
        browser, job = browse(), console.client.submit("step", job_id="mine")
        browser.open(console.client.url + "job/mine").fill("#job_key", "wrong").click("main button", "Show the job")
        browser.find("[role=alert]", "not the key")
        browser.fill("#job_key", job["job_key"]).click("main button", "Show the job").find("h1", "mine")
        console.registry.steps.put("INFO")
        browser.find("#log li", "step 1")  # the stream is opened by the same cookie
        console.registry.steps.put("stop")
        browser.find(".badge", "complete")

    def test_a_page_asks_for_one_style_and_one_script_and_the_keyboard_is_enough(self, common, browse):
        url, browser = common.client.url, browse()
        self.sign_in(browser, common.client)
        for path in ("job", "console/submit", ""):
            browser.open(url + path)
            script, style = [row for row in browser.loaded() if "/console/s" in row[0] and "submit" not in row[0]]
            assert "/console/style-" in style[0] and "/console/script-" in script[0]
            assert style[1] == script[1] == 0  # from the cache, where they are since the first page
            assert [address for address, _ in browser.loaded() if not address.startswith((url, "data:"))] == []
        seen = []
        while not seen or seen[-1][0] != "BODY" and len(seen) < 40:
            browser.press("\ue004")
            seen.append(browser.script(
                """const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();
                return [e.tagName, e.textContent.trim(), s.outlineStyle, r.width > 0 && r.left >= 0]"""))
        assert seen[0][1] == "Skip to content"
        assert {"Overview", "Jobs", "Try it", "Sign out", "How to submit"} <= {text for _, text, _, _ in seen}
        assert [row for row in seen if row[0] != "BODY" and (row[2] == "none" or not row[3])] == []

    def test_nothing_is_wider_than_the_screen(self, filled, browse):
        client, paths = filled[0].client, filled[1]
        browser = self.sign_in(browse(), client)
        for path in paths:
            browser.open(client.url + path[1:])
            for width, dark in ((360, False), (1280, True)):
                browser.look(width=width, dark=dark)
                *widths, back = browser.script("""return [innerWidth, document.documentElement.scrollWidth,
                    getComputedStyle(document.body).backgroundColor]""")
                assert widths == [width, width], path
                assert (sum(map(int, re.findall(r"\d+", back))) < 200) == dark


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def make_job(store, job_id, **fields):
    """Return a queued Job that ``store`` has not got yet."""
    values = dict.fromkeys(csp.Job._fields)
    counters = ("attempts", "synchronous", "cancelled", "crashes", "failures", "callback_attempts")
    values.update(dict.fromkeys(counters, 0))
    values.update(seq=store.take_seq(), job_id=job_id, job_type="work", status="pending", job_key="key", run_at=1.0,
                  requested_timestamp=csp.timestamp(0))
    return csp.Job(**{**values, **fields})


def add_job(store, job_id, **fields):
    """Store a queued job and return it."""
    job = make_job(store, job_id, **fields)
    store.add_job(job).wait()
    return job


def claim_all(store, limit=10_000, now=None):
    """Return the queued jobs that a calm runner gets."""
    return store.claim_jobs(limit, now or time.time(), lambda: True, lambda job: None).jobs


def claim(store, job):
    """Claim all queued jobs, ``job`` among them; return it as it is then."""
    return {claimed.seq: claimed for claimed in claim_all(store)}[job.seq]


def finish(store, job, status="complete", **fields):
    return store.record_ending(job, csp.Finish(csp.Outcome(status, **fields)), None)


def requeue(store, job, run_at):
    return store.record_ending(job, csp.Requeue(run_at, job.crashes, job.failures, ""), None)


@contextlib.contextmanager
def opened(path):
    """Open another connection to a database file, as another program would."""
    connection = sqlite3.connect(str(path), isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def stored_in(path):
    """Open a Store on the file and close it."""
    store = csp.Store(str(path))
    try:
        yield store
    finally:
        store.close()


def rows_of(path, statement, *values):
    """Run the statement on a database file by SQLite itself, without csp.py; return the rows."""
    with contextlib.closing(sqlite3.connect(str(path))) as connection, connection:
        return connection.execute(statement, values).fetchall()


def fill(path, count):
    """Write ``count`` jobs into an existing database: statuses, metadata, logs and callbacks in a fixed pattern."""
    statuses = ["complete", "complete", "error", "pending", "complete"]
    jobs = [
        (number, f"job-{number}", "work", statuses[number % 5], "key",
         None if number % 5 == 3 else csp.timestamp(1_600_000_000 + number), number if number % 5 == 3 else None,
         number if number % 10 == 2 else None, f"host-{number % 50 // 10}" if number % 10 == 2 else None)
        for number in range(1, count + 1)
    ]
    with opened(path) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            """INSERT INTO jobs (seq, job_id, job_type, status, job_key, finished_timestamp, run_at,
            callback_at, callback_host) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""", jobs)
        connection.executemany(
            "INSERT INTO metadata (seq, job_id, key, value, type) VALUES (?, ?, ?, ?, 'string')",
            [(job[0], job[1], key, value) for job in jobs
             for key, value in (("all", "same"), ("third", str(job[0] % 3)), ("own", job[1]))])
        connection.executemany(
            "INSERT INTO logs (seq, job_id, timestamp, message, level) VALUES (?, ?, '', 'm', 'INFO')",
            [(job[0], job[1]) for job in jobs for _ in range(2)])
        connection.execute("DELETE FROM counts")
        connection.execute("INSERT INTO counts SELECT job_type, status, count(*) FROM jobs GROUP BY 1, 2")
        connection.execute("COMMIT")


def count_steps(store, call):
    """Call ``call(store)``; return how many steps of SQLite's machine its reading took."""
    steps = []
    connections = [store._readers.get() for _ in range(store._readers.qsize())]
    for connection in connections:
        connection.set_progress_handler(lambda: steps.append(1), 1)
        store._readers.put(connection)
    call(store)
    for connection in connections:
        connection.set_progress_handler(None, 1)
    return len(steps)


def counted(path):
    """Count the jobs of each status by looking at each."""
    found = rows_of(path, "SELECT status, count(*) FROM jobs GROUP BY status")
    return {"pending": 0, "complete": 0, "error": 0, **dict(found)}


def result_of(write):
    """Return what a Write returns, or the error that it raises."""
    try:
        return write.wait()
    except (ValueError, csp.CspError) as error:
        return error


def show(client, job_id):
    answer = client.get("/job/" + job_id, key=SECURE_KEY)
    assert answer.status == 200, answer.body
    return answer.json


def finished(client, job_id):
    job = show(client, job_id)
    return job if job["status"] != "pending" else None


@pytest.fixture
def store(tmp_path):
    """An empty store in tmp_path/jobs.db."""
    with stored_in(tmp_path / "jobs.db") as store:
        yield store


def make_database(path, *statements):
    with opened(path) as connection:
        for statement in statements:
            connection.execute(statement)


def dump(path):
    with opened(path) as connection:
        return list(connection.iterdump())


def schema_of(path):
    """Return the schema of a database, without the tables of the predecessor's scheduler."""
    rows = rows_of(path, "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2")
    return [row for row in rows if "apscheduler" not in row[2]]


# What ckanserviceprovider 1.2.0 left behind when it was killed: sqlite3's .dump of its database
PREDECESSOR = r"""
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE jobs (job_id TEXT NOT NULL, job_type TEXT, status TEXT, data TEXT, error TEXT,
    requested_timestamp DATETIME, finished_timestamp DATETIME, sent_data TEXT, aps_job_id TEXT, result_url TEXT, api_key TEXT, job_key TEXT, PRIMARY KEY (job_id));
INSERT INTO jobs VALUES('ok','echo','complete','">hi"',NULL,'2026-11-23 20:29:00.026358','2026-11-23 20:29:00.040047','"hi"',NULL,NULL,NULL,'key-ok');
INSERT INTO jobs VALUES('bad','echo','error',NULL,'{"message": "do not start message with >"}','2026-11-23 20:29:00.058037','2026-11-23 20:29:00.059858','">hi"',NULL,NULL,NULL,'09ff670b-e43d-460d-895a-d62cacd867e1');
INSERT INTO jobs VALUES('worse','echo','error',NULL,'{"message": "  File \"main.py\", line 11, in echo\n    if input[''data''].startswith(''#''): raise Exception(''serious exception'')\nException(''serious exception'')"}','2026-11-23 20:29:00.074983','2026-11-23 20:29:00.076859','"#x"',NULL,NULL,NULL,'df6f2943-c8e7-4021-b4a7-a581ef5cada4');
INSERT INTO jobs VALUES('quick','quick','complete','{"a": [1, null, "\u00e4"]}','{"message": "Process completed but unable to post to result_url"}','2026-11-23 20:29:00.096112','2026-11-23 20:29:00.106174','{"q": 1}','3bd9fdf525f946f29ca899c2969e9cef','http://127.0.0.1:9/x','k4','86263f31-4f44-4c3a-b00e-176ba56bebd8');
INSERT INTO jobs VALUES('slow','slow','pending',NULL,NULL,'2026-11-23 20:29:00.116789',NULL,'{"q": 1}','2b13724d82844edb97bc0c347dc6f307','http://127.0.0.1:8166/cb','X-Key: k5','4ce9acda-3c8a-4199-979f-243f97764f37');
INSERT INTO jobs VALUES('nodata','quick','pending',NULL,NULL,'2026-11-23 20:29:00.137526',NULL,'{}','77bf8370854f4d0aa77ae97f1ccefa6f',NULL,'k6','c45a4ad0-2a28-4469-9832-dfb1e1081f4c');
CREATE TABLE metadata (job_id TEXT NOT NULL, "key" TEXT NOT NULL, value TEXT, type TEXT, PRIMARY KEY (job_id, "key"), FOREIGN KEY(job_id) REFERENCES jobs (job_id) ON DELETE CASCADE);
INSERT INTO metadata VALUES('ok','mimetype','text/plain','string');
INSERT INTO metadata VALUES('ok','n','5','json');
INSERT INTO metadata VALUES('ok','list','[1, "x"]','json');
INSERT INTO metadata VALUES('ok','s','5','string');
INSERT INTO metadata VALUES('slow','ckan_url','http://x/','string');
CREATE TABLE logs (job_id TEXT NOT NULL, timestamp DATETIME, message TEXT, level TEXT, module TEXT, "funcName" TEXT, lineno INTEGER, FOREIGN KEY(job_id) REFERENCES jobs (job_id) ON DELETE CASCADE);
INSERT INTO logs VALUES('ok','2026-11-23 20:29:00.031276','a line','INFO','main','echo',12);
INSERT INTO logs VALUES('ok','2026-11-23 20:29:00.035805','another ä','WARNING','main','echo',12);
CREATE TABLE apscheduler_jobs (id VARCHAR(191) NOT NULL, next_run_time FLOAT, job_state BLOB NOT NULL, PRIMARY KEY (id));
CREATE INDEX ix_jobs_status ON jobs (status);
CREATE INDEX ix_metadata_value ON metadata (value);
CREATE INDEX ix_apscheduler_jobs_next_run_time ON apscheduler_jobs (next_run_time);
COMMIT;
"""  # noqa: E501 - a dump as it is
FIRST_EDITION = """
    PRAGMA journal_mode = WAL;
    BEGIN;
    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL UNIQUE, job_type TEXT NOT NULL, status TEXT NOT NULL,
        requested_timestamp TEXT, started_timestamp TEXT, finished_timestamp TEXT, run_at REAL,
        attempts INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0,
        failures INTEGER NOT NULL DEFAULT 0, synchronous INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, callback_status TEXT, callback_attempts INTEGER NOT NULL DEFAULT 0,
        callback_error TEXT, callback_at REAL, callback_host TEXT, result_url TEXT, api_key, job_key TEXT,
        submission_hash TEXT, resubmitted_from TEXT, progress TEXT, metadata TEXT, error TEXT, sent_data TEXT, data,
        aps_job_id TEXT);
    CREATE TABLE large (
    seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, name TEXT NOT NULL, value,
    PRIMARY KEY (seq, name));
    CREATE INDEX jobs_by_status ON jobs (status, seq);
    CREATE INDEX jobs_by_type ON jobs (job_type, status, seq);
    CREATE INDEX jobs_queued ON jobs (run_at, seq) WHERE run_at IS NOT NULL;
    CREATE INDEX jobs_running ON jobs (seq) WHERE status = 'pending' AND run_at IS NULL;
    CREATE INDEX jobs_by_finish ON jobs (finished_timestamp) WHERE finished_timestamp IS NOT NULL;
    CREATE INDEX jobs_by_callback ON jobs (callback_host, callback_at) WHERE callback_at IS NOT NULL;
    CREATE TABLE metadata (
        seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, key TEXT NOT NULL, job_id TEXT NOT NULL,
        value TEXT, type TEXT, PRIMARY KEY (seq, key)) WITHOUT ROWID;
    CREATE INDEX metadata_by_value ON metadata (key, value, seq);
    CREATE TABLE logs (
        log_id INTEGER PRIMARY KEY, job_id TEXT NOT NULL, timestamp TEXT, message TEXT, level TEXT, module TEXT,
        funcName TEXT, lineno INTEGER, seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE);
    CREATE INDEX logs_by_job ON logs (seq, log_id);
    CREATE TABLE counts (job_type TEXT, status TEXT, jobs INTEGER, PRIMARY KEY (job_type, status)) WITHOUT ROWID;
    CREATE TABLE hours (hour INTEGER, status TEXT, jobs INTEGER, PRIMARY KEY (hour, status)) WITHOUT ROWID;
    CREATE TABLE sessions (token_hash TEXT PRIMARY KEY, created_at REAL, used_at REAL) WITHOUT ROWID;
    PRAGMA application_id = 1129533489;
    PRAGMA user_version = 3;
    INSERT INTO jobs (seq, job_id, job_type, status, job_key, requested_timestamp, finished_timestamp, run_at, attempts,
        callback_status, callback_attempts, callback_error, callback_host, result_url, api_key, resubmitted_from,
        progress, metadata, error, sent_data, data) VALUES
        (1, 'old', 'echo', 'error', 'key-of-old', '{now}', '{now}', NULL, 1, 'failed', 17, 'refused', '127.0.0.1:9',
            'http://127.0.0.1:9/', NULL, 'x', '{"fraction": 0.5, "message": null}', NULL, '{"message": "no"}', NULL,
            NULL),
        (3, 'done', 'echo', 'complete', 'key-of-done', '{now}', '{now}', NULL, 1, NULL, 0, NULL, NULL, NULL, NULL,
            NULL, NULL, '{"kind": "text", "n": 1}', NULL, '', '{"b": "ä"}'),
        (4, 'running', 'async_echo', 'pending', 'key-of-running', '{now}', NULL, NULL, 1, NULL, 0, NULL, NULL, NULL,
            'k', NULL, NULL, NULL, NULL, '"a"', NULL),
        (5, 'queued', 'async_echo', 'pending', 'key-of-queued', '{now}', NULL, 1795470914.19, 0, NULL, 0, NULL, NULL,
            NULL, 12, NULL, NULL, NULL, NULL, '"b"', NULL);
    INSERT INTO large VALUES (3, 'sent_data', '{large}');
    INSERT INTO logs VALUES (1, 'done', '2026-01-02T03:04:05.189744', 'a line', 'WARNING', 'mk', 'echo', 6, 3),
        (9, 'done', '2026-01-02T03:04:05.189745', 'another', 'INFO', 'mk', 'echo', 7, 3);
    INSERT INTO metadata VALUES (3, 'kind', 'done', 'text', 'string'), (3, 'n', 'done', '1', 'json');
    INSERT INTO counts VALUES ('echo', 'complete', 1), ('echo', 'error', 1), ('async_echo', 'pending', 2);
    INSERT INTO hours VALUES (1, 'complete', 1);
    INSERT INTO sessions VALUES ('{session}', {epoch}, {epoch});
    COMMIT;
    """


def make_predecessor(path, *statements):
    """Make a database as the predecessor left it: six jobs, two of them pending; then execute the statements."""
    with opened(path) as connection:
        connection.executescript(PREDECESSOR)
    make_database(path, *statements)


class TestOpening:
    """Whose file it is, who may open it, and how older ones are taken over."""

    # -- the file

    @pytest.mark.parametrize("umask, existing", [(0o000, None), (0o077, None), (0o022, 0o666)], ids=str)
    def test_files_are_for_their_owner_only(self, tmp_path, umask, existing):
        if existing:
            (tmp_path / "jobs.db").touch()
            (tmp_path / "jobs.db").chmod(existing)
        before = os.umask(umask)
        try:
            with stored_in(tmp_path / "jobs.db") as store:
                add_job(store, "a")
                modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
        finally:
            os.umask(before)
        assert modes == dict.fromkeys(["jobs.db", "jobs.db-wal", "jobs.db-shm"], "0o600")

    def test_every_connection_is_durable_and_checks_references(self, tmp_path):
        database = csp.Database(str(tmp_path / "jobs.db"))
        connections = [database.connection, database.connect()]
        for connection in connections:
            names = ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
            assert [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == ["wal", 2, 1, 1]
        database.close(connections)

    def test_a_second_service_on_one_file_is_refused_and_names_the_first(self, store, tmp_path):
        with pytest.raises(csp.StartError, match=f"process {os.getpid()}") as refusal:
            csp.Store(str(tmp_path / "jobs.db"))
        assert str(tmp_path / "jobs.db") in str(refusal.value)
        add_job(store, "a")

    def test_closing_leaves_one_file_with_everything_in_it(self, tmp_path):
        with stored_in(tmp_path / "jobs.db") as store:
            jobs = [add_job(store, f"job-{number}", metadata='{"a": [1]}', api_key=1.5) for number in range(5)]
        assert {file.name for file in tmp_path.iterdir()} == {"jobs.db"}
        shutil.copy(str(tmp_path / "jobs.db"), str(tmp_path / "copy.db"))
        with stored_in(tmp_path / "copy.db") as store:
            assert [store.get_job(job.job_id) for job in jobs] == jobs
            assert store.count_jobs()["pending"] == 5 and store.take_seq() > max(job.seq for job in jobs)

    @pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
    def test_a_service_in_memory_works_and_leaves_no_file(self, start, uri, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        running = start(SQLALCHEMY_DATABASE_URI=uri)
        job = running.client.submit("async_echo", "a", metadata={"k": "v"})
        assert running.client.finish(job)["data"] == ">a"
        assert running.client.get("/job?k=v").json["list"] == [f"/job/{job['job_id']}"]
        running.stop()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["a b.db", "ü.db", "a%20b?c#d.db", "a'b.db", "file:a.db"])
    def test_the_file_may_have_any_name(self, tmp_path, name):
        with stored_in(tmp_path / name) as store:
            add_job(store, "a")
        with stored_in(tmp_path / name) as store:
            assert store.get_job("a").job_id == "a"
        assert {file.name for file in tmp_path.iterdir()} == {name}

    # -- files that are not ours

    @pytest.mark.parametrize("sentence, content", [
        ("not a database", b"This is a text, and longer than a header." * 100), ("not a database", b"A note.\n"),
        ("not a database", b"SQLite format 3\0" + b"\xff" * 4080),
        ("another program", ["CREATE TABLE songs (title)"]),
        ("another program", ["CREATE TABLE jobs (job_id, salary)", "PRAGMA user_version = 1"]),
        ("another program", ["PRAGMA journal_mode = WAL", "CREATE TABLE songs (title)"]),
        ("another program", ["PRAGMA application_id = 7", "CREATE TABLE songs (title)"]),
        *[(f"an unreleased .*schema {version}.*knows 3", version) for version in (0, 1, 2)],
        ("a newer .*schema 4.*knows 3", 4),
    ], ids=str)
    def test_a_file_that_is_not_ours_is_refused_and_left_alone(self, tmp_path, sentence, content):
        path = tmp_path / "jobs.db"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, int):
            csp.Store(str(path)).close()
            make_database(path, f"PRAGMA user_version = {content}")
        else:
            make_database(path, *content)
        before = (path.read_bytes(), path.stat().st_mode)
        with pytest.raises(csp.StartError, match=sentence) as refusal:
            csp.Store(str(path))
        assert re.fullmatch(r"The (file|database) .+\.", str(refusal.value)) and str(path) in str(refusal.value)
        assert (path.read_bytes(), path.stat().st_mode) == before

    @pytest.mark.parametrize("path", ["no/such/directory/jobs.db", "."], ids=["no directory", "a directory"])
    def test_a_path_that_can_be_no_database_is_refused(self, tmp_path, path):
        with pytest.raises(csp.StartError, match="The database .+"):
            csp.Store(str(tmp_path / path))
        assert list(tmp_path.iterdir()) == []

    def test_damaged_pages_are_a_sentence(self, tmp_path):
        path = tmp_path / "jobs.db"
        csp.Store(str(path)).close()
        fill(path, 100)
        make_database(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))
        for _ in range(2):  # the lock is free again
            with pytest.raises(csp.StartError, match=r"The (file|database) .+\."):
                csp.Store(str(path))

    # -- older files

    def test_a_database_of_the_first_edition_opens_unchanged_with_everything(self, start, tmp_path):
        path, now, cookie = tmp_path / "jobs.db", time.time() - 60, "0123456789abcdef" * 4
        large = "ä" * csp.LARGE_CHARACTERS
        text = FIRST_EDITION.replace("{now}", csp.timestamp(now)).replace("{epoch}", str(now))
        with opened(path) as connection:
            connection.executescript(text.replace("{session}", session_hash(cookie)).replace("{large}", f'"{large}"'))
        schema, content = schema_of(path), dump(path)
        with stored_in(path) as store:
            assert store.take_seq() == 6
            assert [log_id for log_id, _ in store.list_logs(3, 10, 0)] == [1, 9]  # clients know them as event ids
        csp.Store(str(tmp_path / "new.db")).close()
        assert dump(path) == content and schema == schema_of(tmp_path / "new.db")
        service = start()
        client, done, old = service.client, *(show(service.client, job_id) for job_id in ("done", "old"))
        assert (done["status"], done["sent_data"], done["data"]) == ("complete", large, {"b": "ä"})
        assert done["metadata"] == {"kind": "text", "n": 1} and messages(done) == ["a line", "another"]
        assert (old["error"], old["resubmitted_from"], old["progress"], old["callback"]) == (
            {"message": "no"}, "x", {"fraction": 0.5, "message": None},
            {"status": "failed", "attempts": 17, "error": "refused", "next_attempt_timestamp": None})
        assert client.get("/job?kind=text").json["list"] == ["/job/done"]
        assert client.get("/user", Cookie="csp_session=" + cookie).json["name"] == "Admin"
        assert [client.get("/job/done", key=key).status for key in ("key-of-done", "another")] == [200, 403]
        for name, data, attempts in (("running", ">a", 2), ("queued", ">b", 1)):
            job = eventually(lambda name=name: finished(client, name))
            assert (job["data"], job["error"], job["attempts"]) == (data, None, attempts)
        service.stop()
        assert counted(path) == {"pending": 0, "complete": 3, "error": 1} and schema_of(path) == schema
        assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]

    def test_a_migration_that_fails_changes_nothing_and_is_made_later(self, tmp_path, monkeypatch):
        path, version = tmp_path / "jobs.db", csp.SCHEMA_VERSION
        csp.Store(str(path)).close()
        fill(path, 10)
        before = dump(path)
        steps = {version: ("ALTER TABLE jobs ADD COLUMN one",),
                 version + 1: ("ALTER TABLE jobs ADD COLUMN two", "no SQL")}
        monkeypatch.setattr(csp, "SCHEMA_VERSION", version + 2)
        monkeypatch.setattr(csp, "_MIGRATIONS", steps)
        with pytest.raises(csp.StartError, match=r"The database .+ cannot be opened: .+\."):
            csp.Store(str(path))
        assert dump(path) == before and rows_of(path, "PRAGMA user_version") == [(version,)]
        steps[version + 1] = steps[version + 1][:1]
        with stored_in(path) as store:
            assert len(store.list_jobs(20)) == 10
        assert rows_of(path, "PRAGMA user_version") == [(version + 2,)]
        assert rows_of(path, "SELECT one, two FROM jobs LIMIT 1") == [(None, None)]

    def test_missing_values_and_types_in_the_predecessors_file_are_borne(self, start, tmp_path):
        make_predecessor(
            tmp_path / "jobs.db", "INSERT INTO logs (job_id, timestamp) VALUES ('ok', '2026-11-23 20:29:01')",
            """INSERT INTO jobs (job_id, job_type, status, job_key) VALUES ('no-type', NULL, 'pending', 'k'),
            ('old-type', 'push_to_datastore', 'pending', 'k'), ('bare', 'echo', 'complete', NULL)""")
        client = start().client
        for name in ("slow", "nodata", "no-type", "old-type"):
            assert "not available" in eventually(lambda name=name: finished(client, name))["error"]["message"]
        assert set(show(client, "bare")) == SHOWN_FIELDS  # its columns are NULL
        assert [show(client, "bare")[name] for name in ("sent_data", "data", "metadata")] == [{}, None, {}]
        assert messages(show(client, "ok")) == ["a line", "another ä", ""]
        assert show(client, "ok")["logs"][2]["timestamp"] == "2026-11-23T20:29:01.000000"
        assert client.get("/status").json["stats"] == {"pending": 0, "complete": 3, "error": 6}

    def test_a_database_is_taken_over_once_and_the_tables_of_others_stay(self, tmp_path):
        path = tmp_path / "jobs.db"
        make_predecessor(path, "INSERT INTO apscheduler_jobs VALUES ('id', 1.5, x'7069636b6c65')")
        csp.Store(str(path)).close()
        before = dump(path)
        csp.Store(str(path)).close()
        assert dump(path) == before
        assert rows_of(path, "SELECT * FROM apscheduler_jobs") == [("id", 1.5, b"pickle")]
        csp.Store(str(tmp_path / "new.db")).close()
        assert schema_of(path) == schema_of(tmp_path / "new.db")
        checks = [rows_of(path, f"PRAGMA {name}") for name in ("integrity_check", "foreign_key_check")]
        assert checks == [[("ok",)], []]

    @pytest.mark.parametrize("column", ["data", "error", "sent_data", "finished_timestamp", "requested_timestamp"])
    def test_an_invalid_value_in_the_predecessors_columns_is_still_shown(self, start, tmp_path, column):
        make_predecessor(tmp_path / "jobs.db")
        values = ["not json", "NaN", '{"a": NaN}', '"\\ud800"', "", "[" * 5000, '{"a": 1, "a": 2}', "1e999", "some day",
                  "2099-13-45 99:99:99.000000", None]
        names = [(status, f"bad-{status}-{number}") for status in ("complete", "pending") for number in range(11)]
        with opened(tmp_path / "jobs.db") as connection:
            connection.executemany(f"INSERT INTO jobs (job_id, job_type, status, {column}) VALUES (?, 'echo', ?, ?)", [
                (name, status, value) for (status, name), value in zip(names, values * 2)])
        client = start().client
        assert client.get("/metrics", key=SECURE_KEY).status == 200  # asks for the job that has waited longest
        for _, name in names:
            error = eventually(lambda name=name: finished(client, name))["error"]
            assert error is None or isinstance(error["message"], str)

    @pytest.mark.parametrize("obstacle", [
        "CREATE TABLE counts (x)", "CREATE TABLE old_jobs (x)", "CREATE TABLE sessions (x)",
        "CREATE INDEX metadata_by_value ON apscheduler_jobs (id)", "ALTER TABLE logs RENAME COLUMN level TO height"])
    def test_a_takeover_that_fails_leaves_everything_as_it_was(self, tmp_path, obstacle):
        path = tmp_path / "jobs.db"
        make_predecessor(path, obstacle)
        before = dump(path)
        with pytest.raises(csp.StartError, match=r"The database .+ cannot be opened: .+\."):
            csp.Store(str(path))
        values = [rows_of(path, f"PRAGMA {name}") for name in ("user_version", "application_id")]
        assert dump(path) == before and values == [[(0,)]] * 2


KEPT_MODULE = """
    import os, shutil, time
    import csp.job as job
    from csp import web

    @job.asynchronous
    def work(task_id, input):
        return input.get("data")

    @job.asynchronous
    def touch(task_id, input):
        how, path = input["data"]
        if how == "copy":
            for end in ("", "-wal", "-shm"):
                shutil.copy(path + end, path + end + ".copy")
        elif how == "read":
            for end in ("", "-wal", "-shm", ""):
                with open(path + end, "rb") as file:
                    file.read()
        elif how == "sqlite":
            import sqlite3
            connection = sqlite3.connect(path)
            connection.execute("SELECT count(*) FROM jobs").fetchone()
            connection.close()
        elif how == "second service":
            try:
                web.app.test_client().get("/status")
            except Exception as error:
                return type(error).__name__

    @job.asynchronous
    def wait(task_id, input):
        while not os.path.exists(input["data"]):
            time.sleep(0.02)
"""
# What another program does with a database that a service has open: it believes to be the last to close it.
OUTSIDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
with sqlite3.connect(sys.argv[1] + ".backup") as copy:
    connection.backup(copy)
copy.close()
connection.close()
"""


def run_outsider(path):
    subprocess.run([sys.executable, "-c", OUTSIDER, str(path)], check=True, timeout=PATIENCE_SECONDS)


class TestKept:
    """What was acknowledged stays, whatever jobs, other programs and the disk do to the file."""

    def test_a_job_may_change_the_working_directory(self, start, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        running = start(path="jobs.db")
        os.chdir(str(tmp_path / "elsewhere"))
        assert running.client.finish(running.client.submit("async_echo", "a"))["data"] == ">a"

    def test_where_a_file_cannot_be_locked_itself_one_beside_it_is(self, tmp_path, monkeypatch):
        monkeypatch.setattr(csp, "LOCK_DESCRIPTION", None)
        for _ in range(2):
            with stored_in(tmp_path / "jobs.db") as store:
                add_job(store, f"job-{time.monotonic()}")
                with pytest.raises(csp.StartError, match="in use"):
                    csp.Store(str(tmp_path / "jobs.db"))
        assert (tmp_path / "jobs.db.lock").exists()

    @linux_only
    @pytest.mark.parametrize("how", ["copy", "read", "sqlite", "second service"])
    def test_a_job_that_opens_the_database_does_not_cost_what_follows(self, launch, tmp_path, how):
        server, path = launch(KEPT_MODULE), tmp_path / "jobs.db"
        server.client.finish(server.client.submit("touch", [how, str(path)]))
        jobs = [server.client.submit("work", 0)]
        for number in range(1, 5):
            run_outsider(path)
            jobs.append(server.client.submit("work", number))
            server.client.finish(server.client.submit("touch", [how, str(path)]))
        for job in jobs:
            server.client.finish(job)
        server.kill()
        client = launch(KEPT_MODULE).client
        assert [client.finish(job)["data"] for job in jobs] == list(range(5))
        assert rows_of(path, "PRAGMA integrity_check") == [("ok",)]

    @pytest.mark.parametrize("is_torn", [False, True], ids=["", "torn first page"])
    @pytest.mark.parametrize("what", ["new", "predecessor"])
    def test_a_process_that_died_in_a_commit_of_the_first_start_keeps_nobody_from_starting(
            self, start, tmp_path, what, is_torn):
        path = tmp_path / "jobs.db"
        if what == "predecessor":
            make_predecessor(path)
        else:
            make_database(path, "PRAGMA user_version = 0", "CREATE TABLE a (x)", "DROP TABLE a")
        before = path.read_bytes()
        spoil = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 2")
connection.execute("PRAGMA cache_spill = 2")
connection.execute("BEGIN EXCLUSIVE")
for number in range(50):
    connection.execute(f"CREATE TABLE spoiled_{number} (x)")
    connection.execute(f"INSERT INTO spoiled_{number} VALUES (zeroblob(10000))")
os.kill(os.getpid(), 9)
"""
        subprocess.run([sys.executable, "-c", spoil, str(path)], timeout=PATIENCE_SECONDS)
        assert (tmp_path / "jobs.db-journal").stat().st_size > 512 and path.read_bytes() != before
        if is_torn:
            with open(path, "r+b") as file:
                file.write(b"\0" * 512)
        running = start()
        assert running.client.finish(running.client.submit("async_echo", "a"))["data"] == ">a"
        assert running.client.get("/status").json["stats"]["complete"] >= (3 if what == "predecessor" else 1)
        assert not rows_of(path, "SELECT name FROM sqlite_master WHERE name LIKE 'spoiled%'")

    @linux_only
    @pytest.mark.parametrize("how", ["renamed", "deleted", "replaced", "wal deleted"])
    def test_a_file_that_has_lost_its_name_takes_no_more_jobs(self, launch, tmp_path, how):
        server, path = launch(KEPT_MODULE), tmp_path / "jobs.db"
        server.client.finish(server.client.submit("work", 1))
        spare = tmp_path / "spare"
        lost = path.with_name("jobs.db-wal") if how == "wal deleted" else path
        lost.rename(spare)
        if how == "replaced":
            shutil.copy(str(spare), str(path))
        body = {"job_type": "work", "api_key": "k", "data": 2}
        for _ in range(3):
            answer = server.client.post("/job", body)
            assert answer.status == 503 and answer.headers["Retry-After"] and "jobs.db" in answer.error
        log = server.log.read_text()
        assert log.count("jobs.db") >= 1 and "Traceback" not in log
        spare.replace(lost)
        job = eventually(lambda: (answer := server.client.post("/job", body)).status == 200 and answer.json)
        assert server.client.finish(job)["data"] == 2

    @linux_only
    @pytest.mark.parametrize("how", ["symbolic link", "hard link", "other spelling", "lock removed"])
    def test_one_database_has_one_server_under_whatever_name(self, launch, tmp_path, how):
        server, path = launch(KEPT_MODULE), tmp_path / "jobs.db"
        job = server.client.submit("wait", str(tmp_path / "go on"))
        eventually(lambda: server.client.show(job)["started_timestamp"])
        (tmp_path / "other").mkdir()
        other = tmp_path / "other" / "name.db"
        if how == "symbolic link":
            other.symlink_to(path)
        elif how == "hard link":
            os.link(str(path), str(other))
        elif how == "other spelling":
            other = tmp_path / "other" / ".." / "jobs.db"
        else:
            other = path
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / "jobs.db.lock").unlink()
        second = run_command("--jobs", "my_jobs", "--db", other, "--port", 0, cwd=tmp_path)
        assert second.returncode == 2 and re.fullmatch(r"csp: The database .+ is in use by another .+\n", second.stderr)
        (tmp_path / "go on").touch()
        shown = server.client.finish(job)
        assert (shown["status"], shown["attempts"]) == ("complete", 1)

    @linux_only
    def test_a_refused_second_service_in_the_process_touches_nothing(self, start, tmp_path):
        running = start()
        job = running.client.submit("async_echo", "a")
        running.client.finish(job)
        for name in ("jobs.db", "link.db"):
            if name == "link.db":
                (tmp_path / name).symlink_to(tmp_path / "jobs.db")
            with pytest.raises(csp.StartError, match="in use"):
                csp.Service(csp.Settings({**SETTINGS, "SQLALCHEMY_DATABASE_URI": str(tmp_path / name)}))
        run_outsider(tmp_path / "jobs.db")
        assert (tmp_path / "jobs.db-wal").exists()
        assert running.client.submit("echo", "b")["data"] == ">b"


# ---------------------------------------------------------------------------------------------------------------------
# Store
# ---------------------------------------------------------------------------------------------------------------------

READS = {
    "list": lambda store: store.list_jobs(20), "list by status": lambda store: store.list_jobs(20, status="error"),
    "list by metadata": lambda store: store.list_jobs(20, metadata=[("third", "1")]),
    "list by common metadata": lambda store: store.list_jobs(20, metadata=[("all", "same")]),
    "list by two metadata": lambda store: store.list_jobs(20, metadata=[("third", "1"), ("all", "same")]),
    "list by unknown metadata": lambda store: store.list_jobs(20, metadata=[("no", "such")]),
    "list before": lambda store: store.list_jobs(20, before_seq=350),
    "list before by both": lambda store: store.list_jobs(20, metadata=[("third", "1")], status="error", before_seq=350),
    "list by type": lambda store: store.list_jobs(20, job_type="work"),
    "list by type and offset": lambda store: store.list_jobs(20, offset=15, job_type="work"),
    "list by type and status before": lambda store: store.list_jobs(20, 0, "error", (), 350, "work"),
    "list by unknown type": lambda store: store.list_jobs(20, job_type="no such"),
    "list by type and queued": lambda store: store.list_jobs(20, job_type="work", status="queued"),
    "list by metadata and type": lambda store: store.list_jobs(20, metadata=[("third", "1")], job_type="work"),
    "list by running and type": lambda store: store.list_jobs(20, status="running", job_type="work"),
    "list running": lambda store: store.list_running(),
    "list callback hosts": lambda store: store.list_callback_hosts(),
    "list due callbacks": lambda store: store.list_due_callbacks("host-1", 5),
    "list new logs": lambda store: store.list_logs(300, 20, 600),
    "list no new logs": lambda store: store.list_logs(300, 20, 10**9),
    "find": lambda store: store.find_jobs("job-3", 20), "find nothing": lambda store: store.find_jobs("zzz", 20),
    "light jobs": lambda store: store.get_light_jobs([300, 5, 10**9]),
    "get job": lambda store: store.get_job("job-300"), "get no job": lambda store: store.get_job("no such job"),
    "get logs": lambda store: store.get_logs(store.get_job("job-300")),
    "get newest log": lambda store: store.get_logs(store.get_job("job-300"), 1),
    "longest due": lambda store: store.get_longest_due(), "count": lambda store: store.count_jobs(),
    "count by type": lambda store: store.count_by_type(), "count by hour": lambda store: store.count_by_hour(0),
}
LISTS = [  # what is asked for, and the numbers of the jobs found, of thirty
    ({}, lambda n: True),
    ({"status": "pending"}, lambda n: n % 5 < 3),
    ({"status": "error"}, lambda n: n % 5 == 4),
    ({"metadata": [("k", "v")]}, lambda n: n % 2 == 0),
    ({"job_type": "a"}, lambda n: n % 3 == 0),
    ({"job_type": "no such"}, lambda n: False),
    ({"job_type": "a", "status": "pending"}, lambda n: n % 3 == 0 and n % 5 < 3),
    ({"status": "running"}, lambda n: n % 5 == 2),
    ({"status": "queued"}, lambda n: n % 5 < 2),
    ({"job_type": "a", "status": "running"}, lambda n: n % 3 == 0 and n % 5 == 2),
    ({"job_type": "c", "status": "queued"}, lambda n: n % 3 == 2 and n % 5 < 2),
    ({"job_type": "a", "metadata": [("k", "v")]}, lambda n: n % 3 == 0 and n % 2 == 0),
    ({"job_type": "a", "status": "queued", "metadata": [("k", "v")]}, lambda n: n % 6 == 0 and n % 5 < 2),
    ({"status": "running", "metadata": [("k", "v")]}, lambda n: n % 2 == 0 and n % 5 == 2),
]


@pytest.fixture(scope="class")
def two_sizes(tmp_path_factory):
    """A store with 400 jobs and one with 4,000."""
    with contextlib.ExitStack() as stack:
        stores = []
        for count in (400, 4000):
            path = tmp_path_factory.mktemp("stores") / "jobs.db"
            csp.Store(str(path)).close()
            fill(path, count)
            stores.append(stack.enter_context(stored_in(path)))
        yield stores


@pytest.fixture(scope="class")
def thirty():
    """A store with thirty jobs of three types in all states."""
    store = csp.Store(None)
    for number in range(1, 31):
        status = ("pending", "pending", "pending", "complete", "error")[number % 5]
        add_job(store, f"job-{number}", job_type="cab"[(number + 1) % 3], status=status,
                metadata='{"k": "v"}' if number % 2 == 0 else None, run_at=1.0 if number % 5 < 2 else None)
    yield store
    store.close()


class TestStore:
    # -- group commit

    def batch(self, store, jobs):
        """Store ``jobs`` in one batch: hold the writer until all of them wait. Return each one's result or error."""
        is_held, gate = threading.Event(), threading.Event()
        store.on_queued = lambda: is_held.set() or gate.wait(PATIENCE_SECONDS)
        store.add_job(make_job(store, f"gate-{uuid.uuid4()}"))
        assert is_held.wait(PATIENCE_SECONDS)
        writes = [store.add_job(job) for job in jobs]
        gate.set()
        return [result_of(write) for write in writes]

    def test_a_write_that_fails_does_not_spoil_its_batch(self, store):
        good = [make_job(store, f"good-{number}", metadata='{"k": "v"}') for number in range(20)]
        bad = [make_job(store, "good-0"), make_job(store, "good-1", metadata='{"k": 1}'),
               make_job(store, "bad-metadata", metadata='{"a": "b", "k": "\\ud800"}'), make_job(store, "bad-\ud800"),
               make_job(store, "bad-number", api_key=2**70)]
        results = self.batch(store, [job for pair in zip(good, bad) for job in pair] + good[len(bad):])
        assert [type(result) for result in results[1:10:2]] == [csp.Conflict] * 2 + [ValueError] * 3
        assert results[1].message == "job_id good-0 already exists"
        assert results[:10:2] + results[10:] == [None] * 20
        found = [job_id for _, job_id in store.list_jobs(1000, metadata=[("k", "v")])]
        assert sorted(found) == sorted(job.job_id for job in good)
        assert store.get_job("bad-metadata") is store.get_job("bad-number") is None
        assert store.list_jobs(1000, metadata=[("a", "b")]) == []
        assert store.count_jobs() == {"pending": 21, "complete": 0, "error": 0}

    def test_a_write_is_visible_and_on_disk_when_it_returns(self, store, tmp_path):
        def write(number):
            for index in range(10):
                job = add_job(store, f"{number}-{index}")
                assert store.get_job(job.job_id) == job
                found = rows_of(tmp_path / "jobs.db", "SELECT seq FROM jobs WHERE job_id = ?", job.job_id)
                assert found == [(job.seq,)]

        in_threads(8, write)
        assert store.count_jobs()["pending"] == 80

    def test_what_waits_when_the_store_closes_is_written_and_later_writes_are_refused(self, tmp_path):
        with stored_in(tmp_path / "jobs.db") as store:
            job = make_job(store, "late")
            writes = [store.add_job(make_job(store, f"job-{number}")) for number in range(100)]
        assert [result_of(write) for write in writes] == [None] * 100
        with pytest.raises(csp.Unavailable):
            store.add_job(job)
        assert rows_of(tmp_path / "jobs.db", "SELECT count(*) FROM jobs") == [(100,)]

    # -- reading

    @pytest.mark.parametrize("name", READS)
    def test_reading_costs_the_same_however_many_jobs_there_are(self, two_sizes, name):
        small, large = (count_steps(store, READS[name]) for store in two_sizes)
        assert large <= small * 1.3 + 100

    def test_metadata_is_compared_as_its_json_text(self, store):
        add_job(store, "1", metadata='{"list": ["ü", 1], "none": null}')
        add_job(store, "2", metadata='{"flag": true, "size": 1}')
        add_job(store, "3", metadata='{"": "", "size": "1"}')
        for key, value, found in [("list", '["ü", 1]', "1"), ("none", "null", "1"), ("flag", "true", "2"),
                                  ("flag", "True", ""), ("size", "1", "32"), ("size", "1.0", ""), ("", "", "3")]:
            assert [job_id for _, job_id in store.list_jobs(9, metadata=[(key, value)])] == list(found), (key, value)

    @pytest.mark.parametrize("wanted, matches", LISTS, ids=[str(wanted) for wanted, _ in LISTS])
    def test_lists_come_newest_first_and_in_pages(self, thirty, wanted, matches):
        expected = [number for number in range(30, 0, -1) if matches(number)]
        assert thirty.list_jobs(100, **wanted) == [(seq, f"job-{seq}") for seq in expected]
        for limit, offset, before in itertools.product((0, 1, 2, 3, 7, 30), (0, 1, 5, 29), (None, 1, 2, 15, 16, 30)):
            found = [seq for seq, _ in thirty.list_jobs(limit, offset, before_seq=before, **wanted)]
            older = [number for number in expected if before is None or number < before]
            assert found == older[offset:offset + limit], (limit, offset, before)

    def test_jobs_are_found_by_the_beginning_of_their_id(self, store):
        ids = ["b", "\U0001f600", "ab", "a", "%", "ä", "äb", "_", "a_", "A", "abc", "a%", "\uffff", "a\U0010ffff"]
        for job_id in ids:
            add_job(store, job_id)
        for prefix in [*ids, "", "abcd", "*", "'"]:
            found = [job_id for _, job_id in store.find_jobs(prefix, 100)]
            assert found == sorted(job_id for job_id in ids if job_id.startswith(prefix))
            assert [job_id for _, job_id in store.find_jobs(prefix, 2)] == found[:2]

    # -- counters, transitions, deletion

    def test_counters_are_what_counting_gives(self, tmp_path):
        chance, path, hour = random.Random(1), tmp_path / "jobs.db", int(time.time() // 3600)
        for part in range(3):
            with stored_in(path) as store:
                for number in range(100 * part, 100 * part + 100):
                    self.do_something(store, chance, number)
                    if number % 50 == 0:
                        assert store.count_jobs() == counted(path)
        assert min(counted(path).values()) > 1
        assert rows_of(path, "SELECT * FROM counts WHERE jobs <> 0 ORDER BY 1, 2") == rows_of(
            path, "SELECT job_type, status, count(*) FROM jobs GROUP BY 1, 2 ORDER BY 1, 2")
        with stored_in(path) as store:  # the hours count jobs that were deleted, too
            hours, later = store.count_by_hour(hour), int(time.time() // 3600)
        assert {key[0] for key in hours} <= {hour, later}
        assert sum(hours.values()) > sum(counted(path).values()) - counted(path)["pending"]

    def do_something(self, store, chance, number):
        """Do one step of a random history: add, claim, finish, requeue, delete or clear."""
        listed, action = store.list_jobs(1000), chance.randrange(10)
        job = store.get_job(chance.choice(listed)[1]) if listed else None
        if action < 3 or job is None:
            add_job(store, str(number), job_type=chance.choice(["one", "two"]))
        elif action == 3:
            self.batch(store, [make_job(store, job_id) for job_id in (job.job_id, f"{number}-a", f"{number}-a")])
        elif action == 4:
            claim_all(store, chance.randrange(2, 9))
        elif action in (5, 6, 7) and job.state in (csp.RUNNING, csp.QUEUED):
            status = "complete" if job.state == csp.RUNNING and action < 7 else "error"
            assert finish(store, job, status) and not finish(store, job, status)
        elif action == 8 and job.state == csp.RUNNING:
            assert requeue(store, job, 0.0) and not requeue(store, job, 0.0)
        elif action == 9 and chance.random() < 0.5:
            assert store.delete_job(job) and not store.delete_job(job)
        elif action == 9 and chance.random() < 0.1:
            store.delete_finished_jobs(csp.timestamp(time.time() + 1))

    def test_an_illegal_move_raises_and_a_late_result_changes_nothing(self, store):
        queued = add_job(store, "a")
        for move in (lambda: finish(store, queued, "complete"), lambda: requeue(store, queued, 0.0)):
            with pytest.raises(ValueError):
                move()
        job = claim(store, queued)
        assert requeue(store, job, 0.0)
        again = claim(store, job)
        assert (job.attempts, again.attempts) == (1, 2)
        assert finish(store, job, data="1") is None and store.get_job("a") == again
        assert finish(store, again, data="2") == store.get_job("a")
        assert not finish(store, again, "error", error="{}") and not store.mark_cancelled(again)
        assert (store.get_job("a").data, store.get_job("a").status) == ("2", "complete")
        with pytest.raises(ValueError):
            finish(store, store.get_job("a"), "error")

    def test_jobs_are_claimed_in_order_once_and_when_they_are_due(self, store):
        now, begun = time.time(), []
        for job_id, run_at in (("c", 3.0), ("a", 1.0), ("b", 1.0), ("later", now + 60)):
            add_job(store, job_id, run_at=run_at, attempts=int(job_id == "later"))
        for job_ids, next_at in ((["a", "b"], 3.0), (["c"], now + 60), ([], now + 60)):
            jobs, found_at, is_suspect = store.claim_jobs(2, now, lambda: True, begun.append)
            assert ([job.job_id for job in jobs], found_at, is_suspect) == (job_ids, next_at, False)
        assert [job.job_id for job in begun] == ["a", "b", "c"]
        assert [job.job_id for job in store.list_running()] == ["c", "a", "b"]
        assert [job.job_id for job in claim_all(store, 2, now + 61)] == ["later"]

    def test_the_api_key_is_erased_when_it_is_not_needed_any_more(self, store, tmp_path):
        for job_id, result_url in (("with", "http://a/"), ("without", None)):
            job = add_job(store, job_id, api_key="very-secret", result_url=result_url, callback_host="a")
            finish(store, claim(store, job))
        assert [store.get_job(job_id).api_key for job_id in ("with", "without")] == ["very-secret", None]
        for status, error, at, kept in (("pending", "no", 5.0, "very-secret"), ("delivered", None, None, None)):
            store.mark_callback(store.get_job("with"), status, error, at)
            assert store.get_job("with").api_key == kept
        store.close()
        assert b"very-secret" not in (tmp_path / "jobs.db").read_bytes()

    @pytest.mark.parametrize("sent, made, count", [
        ("small", "x" * csp.LARGE_CHARACTERS, 1), ("ä" * csp.LARGE_CHARACTERS, b"\x00" * csp.LARGE_CHARACTERS, 2),
        ("ä" * csp.LARGE_CHARACTERS, b"", 1),
    ], ids=["result", "input and bytes", "input"])
    def test_a_large_value_is_kept_apart_and_shown_as_it_was(self, start, sent, made, count):
        def work(task_id, input):
            assert input["data"] == sent
            return made

        registry = registry_of(work, "later")
        registry.synchronous(named("now", lambda task_id, input: work(task_id, input)))
        first = start(registry)
        jobs = [first.client.submit(name, sent) for name in ("now", "later")]
        shown = [first.client.finish(job) for job in jobs]
        first.stop()
        client = start(registry).client
        assert [client.show(job) for job in jobs] == shown
        data = {"base64": base64.b64encode(made).decode()} if isinstance(made, bytes) else made
        assert [(job["status"], job["sent_data"], job["data"]) for job in shown] == [("complete", sent, data)] * 2
        assert rows_of(first.path, "SELECT count(*) FROM large") == [(2 * count,)]
        assert rows_of(first.path, "SELECT count(*) FROM jobs WHERE length(data) + length(sent_data) > 20") == [(0,)]
        for job in jobs:
            assert client.delete(f"/job/{job['job_id']}", key=job["job_key"]).status == 200
        assert rows_of(first.path, "SELECT count(*) FROM large") == [(0,)]

    def test_deleting_a_job_deletes_its_log_and_metadata(self, service):
        client = service.client
        jobs = [client.submit("echo", "&a", metadata={"k": "v"}, job_id=job_id) for job_id in ("gone", "kept")]
        assert client.delete("/job/gone", key=jobs[0]["job_key"]).json == {"success": True}
        assert client.get("/job?k=v").json == {"list": ["/job/kept"]}
        for table in ("jobs", "metadata", "logs"):
            assert rows_of(service.path, f"SELECT DISTINCT job_id FROM {table}") == [("kept",)]
        assert client.submit("echo", "a", job_id="gone")["logs"] == []

    def test_old_jobs_are_cleared_but_not_while_a_callback_is_due(self, tmp_path):
        path, count = tmp_path / "jobs.db", csp.CLEAR_SLICE * 3 + 7
        csp.Store(str(path)).close()
        fill(path, count)
        left = [number for number in range(1, count + 1) if number % 10 == 2 or number % 5 == 3]
        with stored_in(path) as store:
            for before, deleted in ((1_600_000_000, 0), (1_600_000_011, 7), (time.time(), count - len(left) - 7)):
                assert store.delete_finished_jobs(csp.timestamp(before)) == deleted
            assert store.count_jobs() == counted(path)
        assert rows_of(path, "SELECT seq FROM jobs ORDER BY seq") == [(number,) for number in left]
        for table, rows in (("logs", 2), ("metadata", 3)):
            assert rows_of(path, f"SELECT count(*) FROM {table}") == [(rows * len(left),)]


JSON_BODY = b'{"job_type": "echo", "api_key": "k", "data": 1}'
SIZE = b"%d" % len(JSON_BODY)
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(JSON_BODY), JSON_BODY)
POST = b"POST /job HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def line(text):
    return text + b"\r\nHost: a\r\n\r\n"


def host(text):
    return b"GET /status HTTP/1.1\r\n" + text + b"\r\n\r\n"


def field(text):
    return line(b"GET /status HTTP/1.1\r\n" + text)


def length(value):
    return POST + b"Content-Length: " + value + b"\r\n\r\n" + JSON_BODY


def chunked(body, coding=b"chunked"):
    return POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + body


def coded(coding):
    return chunked(CHUNKS, coding)


NOW_CLOSED, GOES_ON = False, True
RAW_REQUESTS = {  # status, and whether the connection goes on
    (200, GOES_ON): [
        *map(line, [
            b"GET /status HTTP/1.1", b"\r\nGET /status HTTP/1.1", b"\r\n\r\n\r\nGET /status HTTP/1.1",
            b"GET /status HTTP/1.9", b"GET http://a/status HTTP/1.1", b"GET HTTP://a:80/status HTTP/1.1",
            b"GET http://a HTTP/1.1", b"GET http://a?x=1 HTTP/1.1", b"GET /status?x=1 HTTP/1.1",
            b"GET /status/ HTTP/1.1", b"GET /status HTTP/1.0\r\nConnection: keep-alive",
        ]),
        *map(host, [b"Host: [::1]:80", b"Host:", b"Host:a.example:8000"]),
        *map(field, [
            b"X: 1", b"X:", b"X: \t 1 \t ", b"X: \xe4\xff", b"X-!#$%&'*+.^_`|~: 1", b"X: 1\r\nX: 2",
            b"\r\n".join([b"X: 1"] * 99), b"X: " + b"a" * 60_000,
        ]),
        *map(length, [SIZE, b"0" + SIZE, b"  " + SIZE + b"  "]),
        *map(chunked, [
            CHUNKS, b"%X ; a=b\r\n%b\r\n0;x\r\n\r\n" % (len(JSON_BODY), JSON_BODY), CHUNKS[:-2] + b"X: trailer\r\n\r\n",
            b"".join(b"1\r\n%c\r\n" % byte for byte in JSON_BODY) + b"0\r\n\r\n",
        ]),
        coded(b"Chunked"),
        # a body where none is needed is no next request
        line(b"GET /status HTTP/1.1\r\nContent-Length: 5") + b"GET /",
        line(b"HEAD /status HTTP/1.1\r\nContent-Length: 5") + b"GET /",
    ],
    (200, NOW_CLOSED): [
        b"GET /status HTTP/1.0\r\n\r\n", field(b"Connection: close"), field(b"Connection: foo, CLOSE"),
        length(SIZE).replace(b"Host", b"Expect: 100-continue\r\nHost").replace(b"1.1", b"1.0"),
    ],
    (204, GOES_ON): [
        line(b"OPTIONS * HTTP/1.1"), line(b"OPTIONS /job HTTP/1.1\r\nContent-Length: 5") + b"GET /",
    ],
    (400, NOW_CLOSED): [
        b"GET /status\r\n\r\n", b"GET\r\n\r\n", b"GET /status HTTP/1.1\nHost: a\n\n", b"\x00" * 20 + b"\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: a\n\r\n", b"GET /status HTTP/1.1\rHost: a\r\r\n\r\n",
        b"\nGET /status HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        *map(line, [
            b"GET /status HTTP/1.1 ", b" GET /status HTTP/1.1", b"GET  /status HTTP/1.1", b"GET\t/status\tHTTP/1.1",
            b"GET\xa0/status HTTP/1.1", b"GET /status\x0bHTTP/1.1", b"GET /sta\x85tus HTTP/1.1",
            b"GET /sta\x00tus HTTP/1.1", b"GET /\xc3\xa4 HTTP/1.1", b"GET /status http/1.1", b"GET /status HTTP/1.1x",
            b"GET /status HTTP/11", b"GET /status HTTP/1.10", b"GET /status HTTPS/1.1", b"G\xc3\x84T /status HTTP/1.1",
            b"GE(T /status HTTP/1.1", b"A" * 33 + b" /status HTTP/1.1", b"CONNECT a:80 HTTP/1.1",
            b"GET status HTTP/1.1", b"GET * HTTP/1.1", b"GET ftp://a/status HTTP/1.1", b"GET /status#x HTTP/1.1",
        ]),
        *map(host, [
            b"X: no host", b"Host: a\r\nHost: a", b"Host: a\r\nhOST: b", b"Host: a, b", b"Host: a b", b"Host: a/b",
            b"Host: u@a", b"Host: a:b", b"Host: a:123456", b"Host: [::1", b"Host: \xe4",
        ]),
        *map(field, [
            b"X : 1", b"X\t: 1", b" X: 1", b"X: 1\r\n folded", b"X: 1\r\n\tfolded", b"X", b": 1", b"X(: 1", b"X\xe4: 1",
            b"X: a\x00b", b"X: a\rb", b"X: a\nb", b"X: a\x0bb", b"X: a\x7fb", b"X\x00: 1", b"X\r: 1",
            b"Authorization: a\r\nAuthorization: b", b"Content-Type: a\r\nContent-Type: b",
        ]),
        *map(length, [
            b"+" + SIZE, b"-" + SIZE, b"0x2f", b"4_7", b"4 7", b"47.0", b"47, 47", b"47;", b"", b"\xb2", b"abc",
            SIZE + b"\r\nContent-Length: " + SIZE, SIZE + b"\r\nContent-Length: 0", SIZE + b"\r\nContent-Length : 0",
        ]),
        *map(coded, [
            b"gzip, chunked", b"chunked, chunked", b"chunked, identity", b"identity", b"\x0bchunked", b"xchunked", b"",
            b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nContent-Length: 5",
        ]),
        chunked(CHUNKS).replace(b"HTTP/1.1", b"HTTP/1.0"),
        *map(chunked, [
            CHUNKS[:-2] + b"X : trailer\r\n\r\n", CHUNKS[:-2] + b"trailer\r\n\r\n",
            CHUNKS[:-2] + b"X: 1\r\n" * 200 + b"\r\n", b"-1\r\n\r\n", b"g\r\n\r\n", b"\r\n\r\n", b"f" * 17 + b"\r\n",
            b"1;" + b"a" * 5000 + b"\r\n", b"1;\x00\r\n", b"2f\n" + JSON_BODY + b"\n0\n\n\r\n",
            b"2f\r\n" + JSON_BODY + b"xx0\r\n\r\n",
            *(size + b"\r\n" + JSON_BODY + b"\r\n0\r\n\r\n" for size in (b"0x2f", b"+2f", b" 2f", b"2e")),
        ]),
    ],
    (403, GOES_ON): [line(b"DELETE /job HTTP/1.1\r\nContent-Length: 31") + line(b"GET /user HTTP/1.1")],
    (404, GOES_ON): [
        *map(line, [
            b"BREW /nothing HTTP/1.1", b"GET //status HTTP/1.1", b"GET //evil.example/%2f.. HTTP/1.1",
            b"GET /../status HTTP/1.1", b"GET /%73tatus HTTP/1.1", b"GET /job/%00 HTTP/1.1",
            b"GET /job/a%2fb HTTP/1.1", b"GET /job/%zz HTTP/1.1", b"GET /job/%ff HTTP/1.1",
            b"GET /job/%ed%a0%80 HTTP/1.1",
        ]),
        line(b"GET /nothing HTTP/1.1\r\nContent-Length: 5") + b"GET /",
    ],
    (405, GOES_ON): [
        *map(line, [b"get /status HTTP/1.1", b"BREW /status HTTP/1.1", b"TRACE /status HTTP/1.1"]),
        line(b"PUT /status HTTP/1.1\r\nContent-Length: 5") + b"GET /",
    ],
    (409, GOES_ON): [POST + b"\r\n"],
    (413, NOW_CLOSED): [
        *map(length, [b"99999999999", b"9" * 400]), chunked(b"fffffffffffffff\r\n"),
        length(b"99999999999").replace(b"Host", b"Expect: 100-continue\r\nHost"),
    ],
    (414, NOW_CLOSED): [line(b"GET /" + b"a" * 9000 + b" HTTP/1.1"), b"GET /" + b"a" * 9000],
    (417, NOW_CLOSED): [length(SIZE).replace(b"Host", b"Expect: 200-ok\r\nHost")],
    (431, NOW_CLOSED): [
        field(b"\r\n".join([b"X: 1"] * 100)), field(b"X: " + b"a" * 70_000),
        b"GET /status HTTP/1.1\r\nX: " + b"a" * 70_000,
    ],
    (505, NOW_CLOSED): [
        line(b"GET /status HTTP/2.0"), line(b"GET /status HTTP/0.9"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
}
RAW_CASES = [(data, *wanted) for wanted, requests in RAW_REQUESTS.items() for data in requests]


@pytest.fixture(scope="class")
def wire(tmp_path_factory):
    """A running service that a class of tests shares, with short times."""
    path = tmp_path_factory.mktemp("wire") / "jobs.db"
    running = RunningService(path, example_registry(), HEADER_SECONDS=2, BODY_SECONDS=2, IDLE_SECONDS=5)
    yield running
    running.stop()


def connect(url, data=b""):
    parts = urllib.parse.urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_SECONDS)
    connection.sendall(data)
    return connection


def read_answer(connection, buffer, has_body=True):
    """Read one answer with a Content-Length from a socket; return status and body; None at its end."""
    while b"\r\n\r\n" not in buffer:
        part = connection.recv(65536)
        if not part:
            return None
        buffer += part
    head, _, _ = bytes(buffer).partition(b"\r\n\r\n")
    del buffer[: len(head) + 4]
    found = re.search(rb"(?i)content-length: (\d+)", head)
    size = int(found[1]) if found and has_body else 0
    while len(buffer) < size:
        buffer += connection.recv(65536)
    body = bytes(buffer[:size])
    del buffer[:size]
    return int(head[9:12]), body


def read_to_end(connection):
    return b"".join(iter(lambda: connection.recv(65_536), b""))


class TestWire:
    """Raw bytes: what is answered, and whether the connection goes on."""

    @pytest.mark.parametrize("data, status, goes_on", RAW_CASES, ids=[str(case[0][:60]) for case in RAW_CASES])
    def test_a_raw_request_is_answered_as_it_should_be(self, wire, data, status, goes_on):
        buffer, has_body = bytearray(), not data.startswith(b"HEAD") and status != 204
        with connect(wire.server.url, data) as connection:
            answer = read_answer(connection, buffer, has_body)
            assert answer is not None and answer[0] == status
            assert not has_body or status < 400 or isinstance(json.loads(answer[1].decode())["error"], str)
            following = None
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /user HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                following = read_answer(connection, buffer)
            assert (following is not None) == goes_on
            assert not goes_on or json.loads(following[1].decode())["name"] == "Anonymous"

    def test_pipelined_requests_are_answered_in_order_and_each_for_itself(self, wire):
        """Although a head that is repeated is not parsed again."""
        bodies = [b'{"job_type": "%s", "api_key": "k"}' % job_type for job_type in (b"wrong1", b"wrong2")]
        posts = [POST + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
        status, unknown, long = field(b"X: 1"), line(b"GET /nothing HTTP/1.1"), field(b"X: " + b"x" * 5000)
        requests = [length(SIZE), length(SIZE), status, status, unknown, status, *posts, long, long, unknown,
                    field(b"Connection: close")]
        answers = raw_exchange(wire.server.url, b"".join(requests))
        assert [int(text) for text in re.findall(rb"HTTP/1.1 (\d+) ", answers)] == [
            200, 200, 200, 200, 404, 200, 409, 409, 200, 200, 404, 200]
        assert answers.index(b"wrong1 not") < answers.index(b"wrong2 not")

    def test_100_continue_is_sent_once_and_only_when_the_body_is_awaited(self, wire):
        head, _, body = length(SIZE).partition(b"\r\n\r\n")
        head += b"\r\nExpect: 100-continue\r\n\r\n"
        with connect(wire.server.url, head) as connection:
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert read_answer(connection, bytearray())[0] == 200
            connection.sendall(head + body)
            assert read_answer(connection, bytearray())[0] == 200

    def test_3000_mutated_requests_leave_the_service_well(self, wire):
        chance = random.Random(20261123)
        seeds = [case[0] for case in RAW_CASES if len(case[0]) < 600]
        statuses = set()

        def mutate():
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randint(1, 4)):
                place, other = chance.randrange(len(data) + 1), chance.choice(seeds)
                data[place:] = chance.choice([
                    data[place + chance.randint(1, 5) :], bytes([chance.randrange(256)]) + data[place:],
                    chance.choice([b"\r\n", b"\n", b"\x00", b":", b" ", b"\r\n\r\n", b"chunked"]) + data[place:],
                    other[chance.randrange(len(other) + 1) :]])
            return bytes(data)

        def exchange(part):
            for request in mutated[part::4]:
                with contextlib.suppress(ConnectionError), connect(wire.server.url, request) as connection:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no TIME_WAIT
                    connection.shutdown(socket.SHUT_WR)
                    statuses.update(re.findall(rb"HTTP/1.1 (\d+) ", read_to_end(connection)))

        mutated = [mutate() for _ in range(3_000)]
        in_threads(4, exchange)
        assert len(statuses) >= 8 and b"500" not in statuses
        assert wire.client.get("/status").status == 200


def memory_kilobytes(pid, line="VmRSS"):
    """Return the resident memory of a process (Linux); ``VmHWM`` is the most that it ever had."""
    return int(re.search(line + r":\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def thread_count(pid):
    return len(os.listdir(f"/proc/{pid}/task"))



ECHO_MODULE = """
    import logging, resource
    import csp
    import csp.job as job, csp.util as util

    csp.SPARE_THREAD_SECONDS = 0.5

    @job.synchronous
    def echo(task_id, input):
        return input.get("data")

    @job.synchronous
    def talk(task_id, input):
        logger = logging.getLogger(task_id)
        logger.addHandler(util.StoringHandler(task_id, input))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(1200):
            logger.warning("%d" + "x" * 30_000, number)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    """


@contextlib.contextmanager
def connections(url, *count_and_data):
    """Open connections and send data on each: ``connections(url, (50, b"GET"), (10, b""))``."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(url, data)) for count, data in count_and_data for _ in range(count)]


def lambda_named(name, function):
    """Return the function under another name, as a job type's."""
    function.__name__ = function.__qualname__ = name
    return function


class TestStrangers:
    """Clients that mean no good: none of them may cost the others more than a moment."""

    @linux_only
    def test_half_open_dripping_and_idle_connections_delay_nobody_and_are_gone_in_time(self, launch):
        # over two seconds, because no setting is shorter than one
        short = {f"CSP_{name}_SECONDS": "1" for name in ("HEADER", "BODY", "IDLE")}
        server = launch(ECHO_MODULE, environ={**short, "CSP_MAX_CONNECTIONS_PER_ADDRESS": "1000"})
        assert server.client.get("/status").status == 200
        threads, memory = thread_count(server.process.pid), memory_kilobytes(server.process.pid)
        head = POST + b"Content-Length: 1000\r\n"
        with connections(server.url, (50, head), (50, head + b"\r\n{"), (150, b"")) as (*dripping, _):
            began = time.monotonic()
            for _ in range(20):
                assert server.client.get("/status").status == 200
            assert time.monotonic() - began < 2.0

            def are_gone():
                for connection in dripping[:50]:
                    with contextlib.suppress(OSError):
                        connection.send(b"X")
                return thread_count(server.process.pid) <= threads + 2

            eventually(are_gone, 15.0)
        assert memory_kilobytes(server.process.pid) < memory + 60_000

    def test_when_all_places_are_taken_by_idle_connections_a_new_one_gets_in(self, start):
        running = start(MAX_CONNECTIONS=10)
        with connections(running.server.url, (30, b"")):
            for _ in range(5):
                assert running.client.get("/status").status == 200

    def test_one_address_cannot_take_all_places(self, start):
        running = start(MAX_CONNECTIONS=50, MAX_CONNECTIONS_PER_ADDRESS=5)
        with connections(running.server.url, (5, POST + b"Content-Length: 9\r\n\r\n")):
            answer = eventually(lambda: raw_exchange(running.server.url, line(b"GET / HTTP/1.1"), 1.0))
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in answer
        eventually(lambda: not running.server.handlers)
        assert running.client.get("/status").status == 200

    def test_clients_that_do_not_read_their_answer_or_read_it_too_slowly_are_left(self, start):
        # over a second, because SEND_SECONDS cannot be shorter; 20 MB are more than the system's buffers hold
        registry = csp.Registry()
        registry.synchronous(named("large", lambda task_id, input: "x" * 20_000_000))
        running = start(registry, SEND_SECONDS=1, BODY_BYTES_PER_SECOND=100_000_000)
        running.client.submit("large", job_id="large")
        request = b"GET /job/large HTTP/1.1\r\nHost: a\r\nAuthorization: %b\r\n\r\n" % SECURE_KEY.encode()
        with connections(running.server.url, (2, request)) as (slow, _):
            eventually(lambda: len(running.server.handlers) == 2)
            eventually(lambda: not slow.recv(1000) or not running.server.handlers, 10.0)

    @linux_only
    def test_a_body_too_large_costs_no_memory(self, launch):
        server = launch(ECHO_MODULE, environ={"CSP_MAX_BODY_BYTES": "1000000"})
        assert server.client.get("/status").status == 200
        memory = memory_kilobytes(server.process.pid)
        for framing, piece in ((b"Content-Length: 100000000", b"x" * 65536),
                               (b"Transfer-Encoding: chunked", b"10000\r\n" + b"x" * 65536 + b"\r\n")):
            sent = 0
            with contextlib.suppress(OSError), connect(server.url, POST + framing + b"\r\n\r\n") as connection:
                while sent < 100_000_000:
                    connection.sendall(piece)
                    sent += len(piece)
            assert sent < 50_000_000
        assert memory_kilobytes(server.process.pid) < memory + 10_000
        assert server.client.submit("echo", 1)["data"] == 1

    @linux_only  # over a second, because less does not stand out of what Python's allocator keeps
    def test_a_large_job_leaves_no_memory_behind_and_is_held_five_times_at_most(self, launch):
        server = launch(ECHO_MODULE, environ={"CSP_MAX_BODY_BYTES": "100000000"})
        client, pid, size = server.client, server.process.pid, 40_000
        client.submit("echo", "x")
        memory = memory_kilobytes(pid)
        job = client.submit("echo", "x" * size * 1024)
        assert client.get(f"/job/{job['job_id']}/data", key=job["job_key"]).body == b"x" * size * 1024
        assert client.show(job)["sent_data"] == "x" * size * 1024
        assert memory_kilobytes(pid, "VmHWM") - memory < 5 * size
        eventually(lambda: memory_kilobytes(pid) < memory + size // 2, 5.0)

    @linux_only
    def test_long_lines_are_not_collected_in_memory(self, launch):
        job = launch(ECHO_MODULE).client.submit("talk")
        assert job["data"] < 20_000 and [line["message"][:4] for line in job["logs"][1000:1002]] == ["1000", "1001"]


def cheap_hash(password):
    """Return a hash of the password that takes a millisecond instead of fifty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csp, "SCRYPT", {"n": 2**8, "r": 8, "p": 1})
        return csp.hash_password(password)


@pytest.fixture(scope="class")
def door(tmp_path_factory):
    """A running service with ``example_registry()`` behind a trusted proxy, for all tests of a class."""
    running = RunningService(tmp_path_factory.mktemp("door") / "jobs.db", example_registry(),
                             TRUSTED_PROXIES="127.0.0.1")
    yield running
    running.stop()


class TestGuessing:
    """Guessing the password."""

    @pytest.mark.parametrize("way, refused, number", [("form", 401, 1), ("basic", 401, 2), ("any route", 403, 3)])
    def test_guessing_is_throttled_and_another_address_still_gets_in(self, door, way, refused, number):
        client, job = door.client, door.client.submit("echo", "hi")

        def attempt(password, address):
            headers = {"X-Forwarded-For": f"192.0.{number}.{address}"}
            if way == "form":
                fields = urllib.parse.urlencode({"username": "admin", "password": password})
                return client.request("POST", "/login", fields, {**FORM, **headers}).status
            path = "/login" if way == "basic" else "/job/" + job["job_id"]
            return client.get(path, key=basic("admin", password), **headers).status

        statuses = [attempt(f"guess {number}", 1) for number in range(csp.FREE_FAILURES + 1)]
        assert statuses == [refused] * csp.FREE_FAILURES + [429]
        assert attempt(SETTINGS["PASSWORD"], 1) == 429 and attempt(SETTINGS["PASSWORD"], 2) in (200, 302)
        headers = {"X-Forwarded-For": f"192.0.{number}.1"}
        assert int(client.get("/user", key=ADMIN, **headers).headers["Retry-After"]) >= 1
        assert client.get("/job/" + job["job_id"], key=job["job_key"], **headers).status == 200

    @pytest.mark.parametrize("password", [SETTINGS["PASSWORD"], cheap_hash(SETTINGS["PASSWORD"])],
                             ids=["plain", "hash"])
    def test_guesses_sent_at_once_are_counted_and_right_passwords_at_once_are_welcome(self, password):
        auth = csp.Authenticator(None, csp.Settings({"PASSWORD": password}))

        results, barrier = [], threading.Barrier(40)

        def attempt(number):
            barrier.wait(PATIENCE_SECONDS)
            results.append(auth.is_login("admin", SETTINGS["PASSWORD"], "192.0.2.2"))
            with contextlib.suppress(csp.TooManyRequests):
                results.append(auth.is_login("admin", "guess", "192.0.2.1"))

        in_threads(40, attempt)
        assert (results.count(True), results.count(False)) == (40, csp.FREE_FAILURES)

    def throttle(self):
        """Return a function that tells how many seconds an address has to wait for its attempt, and a clock to set."""
        now = [0.0]
        throttle = csp.LoginThrottle(lambda: now[0])

        def attempt(address, is_right=False):
            try:
                assert throttle.attempt(address, lambda: is_right) == is_right
            except csp.TooManyRequests as refused:
                return int(dict(refused.headers)["Retry-After"])
            return 0

        return attempt, now

    def test_many_addresses_leave_each_one_failure_and_lock_nobody_out(self):
        attempt, now = self.throttle()
        for number in range(csp.MANY_FAILURES):
            assert not attempt(f"198.51.{number // 200}.{number % 200}")
        assert not attempt("192.0.2.1") and attempt("192.0.2.1") and not attempt("192.0.2.2", True)
        now[0] += csp.THROTTLE_SECONDS + 1
        assert not attempt("192.0.2.1")

    @pytest.mark.parametrize("address, same, other", [
        ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"), ("::ffff:10.0.0.1", "10.0.0.1", "::ffff:10.0.0.2")])
    def test_waiting_doubles_for_a_network_and_a_success_forgives(self, address, same, other):
        attempt, now = self.throttle()
        waits = []
        for _ in range(csp.FREE_FAILURES):
            assert not attempt(address)
        for _ in range(5):
            waits.append(attempt(same) - 1)
            now[0] += waits[-1] + 1
            assert not attempt(same) and not attempt(other, True)
        assert waits == [1, 2, 4, 8, 16]
        now[0] += 100
        assert not attempt(address, True) and not attempt(same) and not attempt(same)

    @pytest.mark.parametrize("form", ["10.{}.{}.1", "2001:db8:{:x}:{:x}::1"])
    def test_whoever_has_more_networks_than_are_remembered_does_not_start_anew(self, monkeypatch, form):
        monkeypatch.setattr(csp, "MAX_THROTTLED", 50)
        attempt, now = self.throttle()
        guesses = 0
        for _ in range(12):
            for number in range(200):
                guesses += not attempt(form.format(number // 50, number))
        assert guesses < 150
        now[0] += 2 * csp.THROTTLE_SECONDS
        assert not attempt(form.format(0, 0))

    @pytest.mark.parametrize("name, value, is_warned", [
        ("PASSWORD", "pass", True), ("PASSWORD", "please_replace_me", True), ("SECRET_KEY", "please_replace_me", True),
        ("SECRET_KEY", "s3cr3t", True), ("PASSWORD", "correct horse battery staple", False),
    ])
    def test_a_guessable_secret_is_warned_about_at_the_start(self, caplog, name, value, is_warned):
        logging.getLogger("csp").propagate = True
        with caplog.at_level(logging.WARNING, "csp"):
            csp.Authenticator(None, csp.Settings({**SETTINGS, name: value}))
        assert any(name in record.getMessage() for record in caplog.records) == is_warned
        assert value not in caplog.text


class TestOrigins:
    """What a page of another site can make a browser do; TestAuth has a table of all routes."""

    def test_another_site_cannot_log_a_browser_in(self, door):
        form = urllib.parse.urlencode({"username": "admin", "password": SETTINGS["PASSWORD"]})
        answer = door.client.request("POST", "/login", form, {**FORM, "Sec-Fetch-Site": "cross-site"})
        assert answer.status == 403 and "Set-Cookie" not in answer.headers

    def test_pages_of_named_origins_may_read_and_others_may_not(self, start):
        client = start(CORS_ORIGINS="https://good.example").client
        good = client.request("OPTIONS", "/job", headers={"Origin": "https://good.example"})
        assert good.status == 204 and good.headers["Access-Control-Allow-Origin"] == "https://good.example"
        assert "Authorization" in good.headers["Access-Control-Allow-Headers"]
        for answer in (client.get("/status", Origin="https://evil.example"), client.get("/status")):
            assert "Access-Control-Allow-Origin" not in answer.headers and answer.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in good.headers

    def test_without_the_setting_no_origin_is_answered(self, door):
        answer = door.client.request("OPTIONS", "/job", headers={"Origin": "https://good.example"})
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


class TestApiKeys:
    """API_KEYS: who may submit."""

    def test_only_the_listed_keys_may_submit(self, start):
        client = start(API_KEYS=["one-good-key", cheap_hash("hashed-key")]).client
        for api_key, status in (("one-good-key", 200), ("hashed-key", 200), ("another", 403), ("scrypt$", 403)):
            answer = client.post("/job", {"job_type": "echo", "api_key": api_key, "data": "x"})
            assert answer.status == status, api_key
        assert client.get("/status").json["stats"]["complete"] == 2


class TestCallbackHosts:
    """CALLBACK_HOSTS: where callbacks may go."""

    @pytest.mark.parametrize("allowed, host, addresses, reached", [
        ((), "anywhere", ["127.0.0.1"], True), (("public",), "innocent.example", ["127.0.0.1"], False),
        (("public",), "innocent.example", ["10.0.0.1", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%lo"], False),
        (("public",), "innocent.example", ["::ffff:127.0.0.1"], False),
        (("127.0.0.0/8",), "innocent.example", ["127.0.0.1"], True),
        (("innocent.example",), "INNOCENT.example", ["127.0.0.1"], True),
        (("other.example",), "innocent.example", ["127.0.0.1"], False),
        (("public", "127.0.0.1"), "innocent.example", ["127.0.0.1"], True),
    ])
    def test_the_resolved_address_decides(self, receiver, allowed, host, addresses, reached):
        port = urllib.parse.urlsplit(receiver.url).port
        policy = csp.CallbackPolicy(allowed, lambda host, port: addresses)
        if reached:
            policy.connect(host, port, 5.0).close()
        else:
            with pytest.raises(PermissionError, match="CALLBACK_HOSTS"):
                policy.connect(host, port, 5.0)

    def test_a_name_is_resolved_once_so_rebinding_gains_nothing(self, receiver):
        answers = [["127.0.0.1"], ["127.0.0.1"]]
        policy = csp.CallbackPolicy(("public",), lambda host, port: answers.pop(0))
        with pytest.raises(PermissionError):
            policy.connect("rebound.example", urllib.parse.urlsplit(receiver.url).port, 5.0)
        assert len(answers) == 1

    def test_a_forbidden_receiver_gets_nothing_and_the_job_says_why(self, start, receiver):
        client = start(CALLBACK_HOSTS="public").client
        job = client.submit("async_echo", "hi", result_url=receiver.url)
        assert "CALLBACK_HOSTS" in attempted(client, job)["callback"]["error"] and not receiver.received

    def test_a_receiver_that_drips_its_answer_is_cut_off(self, start, monkeypatch):
        monkeypatch.setattr(csp, "CALLBACK_SECONDS", 0.5)
        listener = socket.create_server(("127.0.0.1", 0))
        done = threading.Event()

        def drip():
            connection, _ = listener.accept()
            with contextlib.suppress(OSError):
                while not done.wait(0.05):
                    connection.send(b"H")
            connection.close()

        thread = threading.Thread(target=drip)
        thread.start()
        running = start()
        job = running.client.submit("async_echo", "hi", result_url="http://127.0.0.1:%d/" % listener.getsockname()[1])
        assert attempted(running.client, job)["callback"]["status"] == "pending"
        done.set()
        listener.close()
        thread.join()


class TestSecrets:
    """No secret is where it need not be."""

    def test_no_answer_log_line_or_database_byte_holds_a_secret_it_should_not(self, launch, receiver, tmp_path):
        server = launch(ECHO_MODULE + """
    @job.asynchronous
    def later(task_id, input):
        return "done"
    """)
        client, key, before = server.client, "api-key-" + uuid.uuid4().hex, len(RESPONSES)
        jobs = [client.submit("echo", "x", api_key=key, result_url=receiver.url),
                client.submit("later", "x", api_key=key, result_url=receiver.url),
                client.submit("later", "x", api_key=key)]
        receiver.wait(2)
        for job in jobs[:2]:
            eventually(lambda job=job: client.show(job)["callback"]["status"] == "delivered")
        client.finish(jobs[2])
        paths = [f"/job/{job['job_id']}{path}" for job in jobs for path in ("", "/data", "?limit=1")]
        for path in (*paths, "/", "/status", "/user", "/job", "/login", "/nothing"):
            for credentials in (jobs[0]["job_key"], ADMIN, SECURE_KEY, "wrong", None):
                client.get(path, key=credentials)
        client.post("/job", {"job_type": "nothing", "api_key": key})
        client.post("/job", {"job_type": "echo", "api_key": key, "metadata": []})
        assert server.terminate() == 0
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("jobs.db*"))
        said = server.log.read_text() + "".join(server.banner)
        for secret in (key, SETTINGS["PASSWORD"], SECURE_KEY, base64.b64encode(key.encode()).decode()):
            assert not [answer for answer in RESPONSES[before:] if secret.encode() in answer]
            assert secret not in said and secret.encode() not in stored
        assert not [job for job in jobs if job["job_key"] in said]


def controlled_registry():
    """Return job types that tests steer, with the gate that they wait for and the list that they note their data in."""
    registry, gate, seen = example_registry(), threading.Event(), []

    @registry.asynchronous
    def wait(task_id, input):
        seen.append(input.get("data"))
        assert gate.wait(PATIENCE_SECONDS)
        return input.get("data")

    @registry.asynchronous
    def until_told(task_id, input):
        seen.append(task_id)
        while not gate.wait(0.01):
            csp.check_cancelled(task_id)
        return "done"

    @registry.asynchronous
    def fail(task_id, input):
        raise csp.JobError("no")

    return registry, gate, seen


def attempted(client, job, count=1):
    """Return the job once ``count`` attempts at its callback have been made."""

    def made():
        shown = client.show(job)
        return shown["callback"] is not None and shown["callback"]["attempts"] >= count and shown

    return eventually(made)


@pytest.fixture
def impatient(monkeypatch):
    """Callbacks and retries that do not wait long."""
    monkeypatch.setattr(csp, "RETRY_SECONDS", (0.05,) * 5)
    monkeypatch.setattr(csp, "BACKOFF_SECONDS", (0.05, 0.2))


class TestCallbacks:
    """Deliveries, over real sockets."""

    @pytest.mark.parametrize("api_key, header", [
        ("abc", ("Authorization", "abc")), ("  abc ", ("Authorization", "abc")), (12, ("Authorization", "12")),
        ("X-CKAN-API-Key: abc", ("X-CKAN-API-Key", "abc")), ("a:b:c", ("a", "b:c")), ("X :  y ", ("X", "y")),
    ])
    def test_an_api_key_is_a_header(self, api_key, header):
        assert csp.callback_header(api_key) == header

    @pytest.mark.parametrize("api_key", [
        "Host: x", "content-length: 1", "Transfer-Encoding: x", "Connection: x", "a b: c", ": x", "a\r\nb",
        "X: a\r\n b", "a\x00b", "\u20ac", "X\u00e4: b", "a\x7f",
    ])
    def test_an_api_key_that_is_no_legal_header_is_refused_at_submit(self, client, api_key):
        answer = client.post("/job", {"job_type": "echo", "api_key": api_key})
        assert answer.status == 409 and "api_key cannot be sent as a header" in answer.error

    @pytest.mark.parametrize("url", ["http://a", "HTTPS://a.example:8443/x?y=z#f", "http://[::1]:80/"])
    def test_a_result_url_is_http_with_a_host(self, url):
        csp.check_result_url(url)

    @pytest.mark.parametrize("url", [
        "ftp://a", "httpx://a", "http:a", "http://", "http://:80/", "http://a:0/", "http://a:99999/", "http://a:b/",
        "http://a b/", "http://a/\n", "http://[::1/", "http://a\\b/", "http://\u00e4/", 5, ["http://a"],
    ], ids=repr)
    def test_any_other_result_url_is_refused(self, client, url):
        answer = client.post("/job", {"job_type": "echo", "api_key": "k", "result_url": url})
        assert answer.status == 409 and answer.error.startswith("result_url has to ")

    def test_the_schedule_is_the_promised_one(self):
        waits = [csp.next_callback_at(number, csp.CallbackAnswer("x"), 0.0) for number in range(1, 17)]
        promised = [1, 2, 4, 8, 15, 15, 15, 15, 15, 15, 60, 300, 1800, 7200, 18_000, 36_000]
        assert all(want <= wait <= want * 1.1 for want, wait in zip(promised, waits))
        assert csp.next_callback_at(17, csp.CallbackAnswer("x"), 0.0) is None
        assert csp.next_callback_at(1, csp.CallbackAnswer("x", is_final=True), 0.0) is None
        assert csp.next_callback_at(1, csp.CallbackAnswer("x", False, 100.0), 5.0) == 105.0
        assert csp.next_callback_at(1, csp.CallbackAnswer(), 0.0) is None

    @pytest.mark.parametrize("api_key, name, value", [("k-1", "Authorization", "k-1"), ("X-Key: v", "X-Key", "v")])
    def test_it_is_the_job_with_its_key_and_the_api_key_in_its_header(self, client, receiver, api_key, name, value):
        job = client.submit("async_echo", "&hi", api_key=api_key, result_url=receiver.url, metadata={"a": 1})
        headers, body = receiver.wait()[0]
        assert headers[name] == value and headers["Content-Type"] == "application/json"
        shown = client.finish(job)
        assert set(body) == set(shown) | {"job_key"} and "api_key" not in json.dumps(body)
        for field in ("job_id", "status", "data", "error", "logs", "metadata", "sent_data", "finished_timestamp"):
            assert body[field] == shown[field]
        assert body["job_key"] == job["job_key"] and body["logs"][0]["message"] == "just a warning"
        shown = attempted(client, job)["callback"]
        assert shown == {"status": "delivered", "attempts": 1, "error": None, "next_attempt_timestamp": None}

    def test_a_failing_delivery_is_shown_and_retried_and_leaves_no_trace(self, start, receiver, monkeypatch):
        monkeypatch.setattr(csp, "RETRY_SECONDS", (1.0,))  # time to see the failure
        receiver.answers = lambda number: (500 if number == 0 else 204, {})
        client = start().client
        job = client.submit("async_echo", "hi", api_key="still needed", result_url=receiver.url)
        failing = attempted(client, job)
        assert failing["status"] == "complete" and failing["callback"]["status"] == "pending"
        assert failing["error"] == {"message": "Process completed but unable to post to result_url"}
        assert failing["callback"]["error"] == "answered 500" and failing["callback"]["next_attempt_timestamp"]
        shown = attempted(client, job, 2)
        assert shown["error"] is None and shown["callback"]["status"] == "delivered"
        assert [(headers["Authorization"], body["error"]) for headers, body in receiver.received] == [
            ("still needed", None)] * 2

    def test_a_jobs_own_error_is_not_overwritten(self, client, receiver):
        receiver.answers = lambda number: (500, {})
        job = client.submit("async_echo", ">", result_url=receiver.url)
        assert attempted(client, job)["error"] == {"message": "do not start message with >"}

    @pytest.mark.parametrize("status, attempts", [(503, 6), (410, 1)])
    def test_it_is_given_up_after_the_last_attempt(self, start, receiver, impatient, status, attempts):
        receiver.answers = lambda number: (status, {})
        running = start()
        job = running.client.submit("async_echo", "hi", result_url=receiver.url)
        shown = attempted(running.client, job, attempts)
        assert shown["callback"]["status"] == "failed" and shown["error"]["message"].startswith("Process completed but")
        assert rows_of(running.path, "SELECT api_key FROM jobs") == [(None,)]

    def test_the_api_key_is_erased_when_it_is_no_longer_needed(self, start, receiver):
        running = start()
        jobs = [running.client.submit("async_echo", "hi", result_url=receiver.url), running.client.submit("echo", "hi")]
        attempted(running.client, jobs[0])
        assert rows_of(running.path, "SELECT DISTINCT api_key FROM jobs") == [(None,)]

    def test_what_is_due_survives_a_restart(self, start, receiver):
        receiver.answers = lambda number: (500, {})
        running = start()
        job = running.client.submit("async_echo", "hi", result_url=receiver.url)
        attempted(running.client, job)
        running.stop()
        receiver.answers = lambda number: (200, {})
        client = start(running.registry).client
        assert attempted(client, job, 2)["callback"]["status"] == "delivered"

    def test_it_can_be_sent_again(self, client, receiver):
        job = client.submit("async_echo", "hi", result_url=receiver.url)
        attempted(client, job)
        path = f"/job/{job['job_id']}/callback"
        assert client.post(path).status == 403
        assert client.post(path, {"api_key": "new"}, key=job["job_key"]).status == 200
        assert receiver.wait(2)[1][0]["Authorization"] == "new"
        assert client.post(path, {"x": 1}, key=ADMIN).status == 409
        assert client.post(path, key=ADMIN).status == 200
        assert "Authorization" not in receiver.wait(3)[2][0]
        without = client.submit("echo", "hi")
        assert client.post(f"/job/{without['job_id']}/callback", key=ADMIN).status == 409

    def test_it_is_signed_as_standard_webhooks_says(self):
        headers = csp.sign_callback("plain text", "id-1", 1700000000.9, b'{"a": 1}')
        signature = hmac.new(b"plain text", b'id-1.1700000000.{"a": 1}', hashlib.sha256).digest()
        wanted = base64.b64encode(signature).decode()
        assert headers == {"webhook-id": "id-1", "webhook-timestamp": "1700000000", "webhook-signature": "v1," + wanted}

    def test_a_synchronous_submit_waits_for_the_first_attempt(self, client, receiver):
        receiver.answers = lambda number: (500, {})
        job = client.submit("echo", "hi", result_url=receiver.url)
        assert job["status"] == "complete" and job["error"]["message"].startswith("Process completed but unable")

    def test_a_synchronous_submit_waits_two_seconds_at_most(self, start, hung_url):
        running, started = start(), time.monotonic()
        job = running.client.submit("echo", "hi", result_url=hung_url)
        assert 1.5 < time.monotonic() - started < 5.0 and job["error"] is None and job["status"] == "complete"
        running.stop(0.1)


SITUATIONS = {  # fields of the job, and options of its type (None: it is not registered any more)
    "plain": ({}, {}),
    "synchronous": ({"synchronous": 1}, {"synchronous": True}),
    "at most once": ({}, {"at_most_once": True}),
    "at most once with retries": ({}, {"at_most_once": True, "retries": 2}),
    "a retry left": ({"failures": 1}, {"retries": 2}),
    "no retry left": ({"failures": 2}, {"retries": 2}),
    "crashes at the limit": ({"crashes": 2}, {}),
    "crashes and retries left": ({"crashes": 2}, {"retries": 5}),
    "told to stop": ({"cancelled": 1}, {"retries": 2}),
    "type gone": ({}, None),
}
OUTCOMES = {"returned": csp.Outcome("complete", "1"), "JobError": csp.failure("no"),
            "raised": csp.failure("no", may_retry=True)}
DECISIONS = """
    # for each situation in that order: its own outcome, an error with the reason of the ending (once: it is not run
    # again, last: it was the last attempt) or "cancelled", or how it runs again
    returned     own      own     own   own   own    own    own    own    own        own
    JobError     own      own     own   own   own    own    own    own    own        own
    raised       own      own     own   retry retry  own    own    retry  own        own
    died         reason   reason  reason reason retry reason reason retry cancelled  reason
    timed_out    reason   reason  reason reason reason reason reason reason reason   reason
    not_started  soon     reason  soon  soon  soon   soon   soon   soon   cancelled  soon
    cancelled    cancelled cancelled cancelled cancelled cancelled cancelled cancelled cancelled cancelled cancelled
    lost         later    once    once  once  later  last   last   later  cancelled  later
    crashed      first    once    once  once  first  last   last   first  cancelled  first
    stopped      stopped  once    once  once  stopped stopped stopped stopped cancelled stopped
    """
CASES = [
    (kind, situation, answer) for kind, *answers in map(str.split, DECISIONS.strip().splitlines()) if kind != "#"
    for situation, answer in zip(SITUATIONS, answers)
]


class TestDecide:
    """What the ending of an attempt means for its job."""

    def decide(self, kind, situation, now=1000.0):
        fields, options = SITUATIONS[situation]
        types = {"name": "work", "function": None, "synchronous": False, "timeout": None, "retries": 0,
                 "at_most_once": False, "memory_limit": None}
        empty = {**dict.fromkeys(csp.Job._fields), "status": "pending", "attempts": 4,
                 **dict.fromkeys(("crashes", "failures", "cancelled", "synchronous"), 0)}
        ending = csp.Ending(getattr(csp, kind.upper(), csp.ENDED), OUTCOMES.get(kind), "Why.")
        job = csp.Job(**{**empty, **fields})
        return job, csp.decide(job, None if options is None else csp.JobType(**{**types, **options}), ending, now)

    @pytest.mark.parametrize("kind, situation, answer", CASES, ids=[f"{kind}-{where}" for kind, where, _ in CASES])
    def test_each_ending_has_its_decision(self, kind, situation, answer):
        job, decision = self.decide(kind, situation)
        crash, pause = (job.crashes + 1, job.failures), csp.BACKOFF_SECONDS[0]
        if answer in ("reason", "cancelled"):
            assert decision.outcome.error == csp.failure("Why." if answer == "reason" else "cancelled").error
        elif answer == "retry":
            assert (decision.crashes, decision.failures) == (job.crashes, job.failures + 1)
            assert re.fullmatch(r"Attempt 4 failed \((no|Why\.)\); the next is in \d+\.\d seconds\.", decision.message)
        else:
            assert decision == {
                "own": csp.Finish(OUTCOMES.get(kind)),
                "once": csp.Finish(csp.failure("Why. It is not of a kind that is run again.")),
                "last": csp.Finish(csp.failure("Why. That was attempt 3 of 3, so it is not run again.")),
                "soon": csp.Requeue(1000.0 + pause, job.crashes, job.failures, "Why."),
                "later": csp.Requeue(1000.0 + pause * 2**job.crashes, *crash, "Why."),
                "first": csp.Requeue(csp.AFTER_CRASH, *crash, "Why."),
                "stopped": csp.Requeue(csp.AFTER_STOP, job.crashes, job.failures, ""),
            }[answer]

    def test_every_ending_is_in_the_table(self):
        kinds = {kind.replace("_", " ") for kind, _, _ in CASES}
        assert len(CASES) == 100 and kinds - set(OUTCOMES) | {"ended"} == {
            csp.ENDED, csp.TIMED_OUT, csp.NOT_STARTED, csp.DIED, csp.LOST, csp.CRASHED, csp.STOPPED, csp.CANCELLED}

    @pytest.mark.parametrize("failures, seconds", [(0, 1), (1, 2), (4, 16), (9, 300), (5000, 300)])
    def test_the_pause_before_a_retry_doubles_up_to_five_minutes(self, monkeypatch, failures, seconds):
        monkeypatch.setitem(SITUATIONS, "many retries", ({"failures": failures}, {"retries": 10**6}))
        pauses = [self.decide("raised", "many retries")[1].run_at - 1000.0 for _ in range(50)]
        assert seconds <= min(pauses) < max(pauses) <= seconds * 1.5


CRASH_MODULE = """
    import os, threading
    import csp.job as job

    @job.asynchronous
    def work(task_id, input):
        threading.Event().wait(0.005)
        return input["data"]

    @job.asynchronous
    def die(task_id, input):
        os._exit(3)

    @job.asynchronous
    def linger(task_id, input):
        while not os.path.exists("go on"):
            threading.Event().wait(0.02)
        return "done"
    """


class TestCrash:
    """Real processes, killed."""

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
    def test_every_acknowledged_job_ends_once_with_its_callback_though_the_server_stops(self, launch, receiver, number):
        receiver.answers = lambda count: (500 if count < 30 and count % 3 == 0 else 200, {})
        port, stop, acknowledged, refused, ended = free_port(), threading.Event(), {}, [], {}

        def submit(part):
            client, numbers = Client(f"http://127.0.0.1:{port}/"), itertools.count()
            while not stop.is_set():
                body = {"job_type": "work", "api_key": "k", "data": [part, next(numbers)], "result_url": receiver.url}
                try:
                    answer = client.post("/job", body)
                except (OSError, http.client.HTTPException):
                    stop.wait(0.02)
                    continue
                if answer.status == 200:
                    acknowledged[answer.json["job_id"]] = (answer.json["job_key"], body["data"])
                else:
                    refused.append((answer.status, answer.body))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(submit, part) for part in range(4)]
            try:
                for _ in range(3):
                    server, before = launch(CRASH_MODULE, "--port", port), len(acknowledged)
                    eventually(lambda before=before: len(acknowledged) > before + 30)
                    for job_id in list(acknowledged)[:20]:
                        job = server.client.get("/job/" + job_id, key=acknowledged[job_id][0]).json
                        if job["status"] != "pending":
                            ended[job_id] = (job["data"], job["finished_timestamp"])
                    server.process.send_signal(number)
                    assert server.process.wait(PATIENCE_SECONDS) == (0 if number == signal.SIGTERM else -number)
            finally:
                stop.set()
        assert [future.result() for future in futures] == [None] * 4 and refused == []
        client = launch(CRASH_MODULE, "--port", port).client
        eventually(lambda: client.get("/status").json["stats"]["pending"] == 0)
        eventually(lambda: set(acknowledged) <= {body["job_id"] for _, body in list(receiver.received)})
        for job_id, (job_key, data) in acknowledged.items():
            job = client.get("/job/" + job_id, key=job_key).json
            assert (job["status"], job["data"]) == ("complete", data)
            assert ended.get(job_id, (data, job["finished_timestamp"])) == (data, job["finished_timestamp"])
        assert len(acknowledged) > 90 and ended

    def test_a_job_that_kills_the_process_is_tried_three_times_and_the_others_run(self, launch, receiver, tmp_path):
        server = launch(CRASH_MODULE, "--workers", 2)
        others = [server.client.submit("work", number) for number in range(20)]
        with contextlib.suppress(OSError, http.client.HTTPException):  # it may die before it has answered
            server.client.submit("die", job_id="fatal", result_url=receiver.url)
        assert server.process.wait(PATIENCE_SECONDS) == 3
        for _ in range(2):
            again = run_command("--jobs", "my_jobs", "--db", "jobs.db", "--port", 0, cwd=tmp_path)
            assert again.returncode == 3
        client = launch(CRASH_MODULE, "--workers", 2).client
        job = client.get("/job/fatal", key=SECURE_KEY).json
        assert (job["status"], job["attempts"]) == ("error", 3) and "attempt 3 of 3" in job["error"]["message"]
        assert [client.finish(job)["data"] for job in others] == list(range(20))
        assert receiver.wait()[0][1]["status"] == "error"

    def test_a_job_past_its_grace_is_left_for_the_next_start_and_the_exit_is_clean(self, launch, tmp_path):
        server = launch(CRASH_MODULE, environ={"CSP_GRACE_SECONDS": "0.2"})
        job = server.client.submit("linger")
        eventually(lambda: server.client.show(job)["started_timestamp"])
        assert server.terminate() == 0
        (tmp_path / "go on").touch()
        shown = launch(CRASH_MODULE).client.finish(job)
        assert (shown["status"], shown["attempts"], shown["data"]) == ("complete", 2, "done")

    def test_a_job_that_uses_up_the_descriptors_or_closes_stdout_leaves_the_service_well(self, launch):
        server = launch("""
            import os, resource, sys, threading
            import csp.job as job

            @job.asynchronous
            def leak(task_id, input):
                kept = []
                resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
                try:
                    while True:
                        kept.append(os.open(os.devnull, os.O_RDONLY))
                finally:
                    threading.Timer(0.3, lambda: [os.close(one) for one in kept]).start()

            @job.asynchronous
            def close(task_id, input):
                sys.stdout.close()
                sys.stderr.close()
            """)
        job = server.client.finish(server.client.submit("leak"))
        assert "Too many open files" in job["error"]["message"] and "in leak" in job["error"]["traceback"]
        for _ in range(3):
            assert server.client.finish(server.client.submit("close"))["attempts"] == 1
        assert server.terminate() == 0

    def test_a_second_signal_ends_at_once(self, launch):
        server = launch(CRASH_MODULE, environ={"CSP_GRACE_SECONDS": "60"})
        job = server.client.submit("linger")
        eventually(lambda: server.client.show(job)["started_timestamp"])
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in server.log.read_text())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(2.0) == 1


class TestSickDisk:
    """What cannot be stored is answered 503, nothing is lost, and the service recovers by itself."""

    @pytest.fixture(autouse=True)
    def short_waits(self, monkeypatch):
        monkeypatch.setattr(csp, "BUSY_SECONDS", 0.1)
        monkeypatch.setattr(csp, "RETRY_DISK_SECONDS", 0.1)

    def test_a_lock_of_another_program_is_answered_503_and_forgotten(self, start, caplog):
        logging.getLogger("csp").propagate = True
        registry, events = example_registry(), {"locked": threading.Event(), "later": threading.Event()}

        @registry.asynchronous
        def work(task_id, input):
            logger = logger_of(task_id, input)
            logger.warning("before")
            events["locked"].wait(PATIENCE_SECONDS)
            logger.warning("meanwhile")
            events[input["data"]].wait(PATIENCE_SECONDS)
            return "result"

        running = start(registry)
        client, jobs = running.client, [running.client.submit("work", name) for name in events]
        eventually(lambda: [messages(client.show(job)) for job in jobs] == [["before"]] * 2)
        with opened(running.path) as other:
            other.execute("BEGIN IMMEDIATE")
            events["locked"].set()
            for job_type in ("echo", "work", "echo"):
                answer = client.post("/job", {"job_type": job_type, "api_key": "k", "data": "x"})
                assert answer.status == 503 and answer.headers["Retry-After"] and "database" in answer.error
            assert client.show(jobs[0])["status"] == "pending" and client.get("/job").status == 200
            assert client.delete("/job/" + jobs[0]["job_id"], key=jobs[0]["job_key"]).status == 503
            other.execute("ROLLBACK")
        eventually(lambda: [messages(client.show(job)) for job in jobs] == [["before", "meanwhile"]] * 2)
        assert client.show(jobs[1])["status"] == "pending"
        events["later"].set()
        assert [client.finish(job)["data"] for job in jobs] == ["result"] * 2
        assert client.submit("echo", "hi")["status"] == "complete"
        records = {id(record): record for record in caplog.records if record.threadName == "csp-writer"}  # once each
        own = [record.getMessage() for record in records.values()]
        assert len([message for message in own if "cannot be written" in message]) == 1
        assert [message for message in own if "can be written again" in message]

    @pytest.mark.parametrize("method", ["list_callback_hosts", "list_running"])
    def test_a_read_error_at_the_start_is_a_sentence_and_nothing_stays_behind(self, start, monkeypatch, method):
        def fail(store):
            raise csp.Unavailable("The database cannot be read (disk I/O error); try again.")

        threads = threading.active_count()
        with monkeypatch.context() as patch:
            patch.setattr(csp.Store, method, fail)
            with pytest.raises(csp.StartError, match="disk I/O error"):
                start()
        eventually(lambda: threading.active_count() <= threads)
        assert start().client.get("/status").status == 200

    def test_an_idle_service_keeps_no_erased_key_in_its_log(self, start, monkeypatch):
        monkeypatch.setattr(csp, "QUIET_SECONDS", 0.2, raising=False)
        running = start()
        running.client.finish(running.client.submit("async_echo", "x", api_key="erased-api-key"))
        files = [running.path, running.path.with_name("jobs.db-wal")]
        eventually(lambda: not any(b"erased-api-key" in file.read_bytes() for file in files), 10)

    @linux_only
    def test_a_full_disk_is_answered_503_and_no_acknowledged_job_is_lost(self, launch, tmp_path):
        server = launch(CRASH_MODULE)
        client, jobs = server.client, []
        size = 200_000 + max(path.stat().st_size for path in tmp_path.glob("jobs.db*"))
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        body = {"job_type": "work", "api_key": "k", "data": "x" * 20_000}

        def refusal():
            answer = client.post("/job", body)
            if answer.status != 200:
                return answer
            jobs.append(answer.json)

        answer = eventually(refusal)
        assert answer.status == 503 and answer.headers["Retry-After"] and "database" in answer.error
        assert client.get("/status").status == 200 and client.get("/job").json["list"]
        assert client.show(jobs[0])["job_id"] == jobs[0]["job_id"]
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        eventually(lambda: client.post("/job", body).status == 200)
        assert all(client.finish(job)["status"] == "complete" for job in jobs)
        assert server.terminate() == 0
        assert rows_of(tmp_path / "jobs.db", "PRAGMA integrity_check") == [("ok",)]


def epoch_of(text):
    """Return a job's timestamp as epoch seconds."""
    return time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) + float(text[19:])


def in_threads(count, function):
    """Call ``function(0)`` to ``function(count - 1)`` at the same time, each in a thread; fail if one fails."""
    done = []

    def call(number):
        function(number)
        done.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(count))


class Gate:
    """Job types that the test holds: a ``wait`` job says in ``begun`` that it runs and goes on when ``open`` is set;
    ``obedient`` also ends when it is told to stop; ``order`` holds the data of those that ended by themselves."""

    def __init__(self):
        self.registry, self.begun, self.open = csp.Registry(), queue.Queue(), threading.Event()
        self.order, self.stopped = [], []

        @self.registry.asynchronous
        def wait(task_id, input):
            self.begun.put(task_id)
            assert self.open.wait(PATIENCE_SECONDS)
            self.order.append(input.get("data"))
            return input.get("data")

        @self.registry.asynchronous
        def obedient(task_id, input):
            self.begun.put(task_id)
            while not self.open.wait(0.01):
                try:
                    csp.util.check_cancelled(task_id)
                except csp.JobCancelled:
                    self.stopped.append(task_id)
                    raise
            return input.get("data")

        @self.registry.asynchronous
        def quick(task_id, input):
            self.order.append(input.get("data"))
            return input.get("data")

        @self.registry.asynchronous
        def fail(task_id, input):
            raise csp.JobError("it failed")

    def wait_for(self, job):
        """Return when the job runs."""
        while self.begun.get(timeout=PATIENCE_SECONDS) != job["job_id"]:
            pass


@pytest.fixture
def gate(start):
    """A Gate, opened at the end, before the services stop."""
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def hung_url(start):
    """The address of a receiver that accepts connections and never answers."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as listener:
        yield "http://127.0.0.1:%d/hung" % listener.getsockname()[1]


@pytest.fixture
def dead_url():
    """An address that refuses connections, and is nobody else's while the test runs."""
    with contextlib.closing(socket.socket()) as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield "http://127.0.0.1:%d/dead" % reserved.getsockname()[1]


POST_FAILED = {"message": "Process completed but unable to post to result_url"}


def callback_of(client, job, timeout_seconds=10.0, **wanted):
    """Return the job once its ``callback`` has the wanted fields."""

    def reached():
        shown = client.show(job)
        return shown["callback"] and wanted.items() <= shown["callback"].items() and shown

    return eventually(reached, timeout_seconds)


class TestCallbackTrouble:
    """CONTRACT, section 5."""

    def test_the_signature_is_the_one_that_the_specification_shows(self):
        secret, job_id = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek"
        headers = csp.sign_callback(secret, job_id, 1614265330, b'{"test": 2432232314}')
        assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="

    def test_what_is_due_at_the_start_is_sent_without_another_word(self, store, receiver):
        host = csp.callback_host(receiver.url)
        for number in range(12):
            job = add_job(store, str(number), result_url=receiver.url, callback_host=host, api_key="k")
            finish(store, claim(store, job))
        sender = csp.CallbackSender(store)
        assert len({body["job_id"] for _, body in receiver.wait(12)}) == 12
        sender.stop(0.0)

    @pytest.mark.parametrize("job_id", ["signed", "a.b", "\xfcml\xe4ut", "\u4f5c\u696d", "x y"])
    def test_what_is_sent_is_signed_whatever_the_job_is_called(self, start, receiver, impatient, job_id):
        receiver.answers = lambda number: (200 if number else 500, {})
        client = start(CALLBACK_SECRET="whsec_" + base64.b64encode(b"k" * 24).decode("ascii")).client
        job = client.submit("async_echo", "hi", job_id, result_url=receiver.url)
        callback_of(client, job, status="delivered")
        headers, again = (headers for headers, _ in receiver.received)
        assert headers["webhook-id"] and headers["webhook-id"] == again["webhook-id"]
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        assert re.fullmatch("v1,[A-Za-z0-9+/]{43}=", headers["webhook-signature"])

    @pytest.mark.parametrize("retry_after, least, most", [
        ("120", 119, 125), (lambda: email.utils.formatdate(time.time() + 300, usegmt=True), 298, 310),
        ("99999999", 30_000, 10**8), ("soon", 1, 3), ("-5", 1, 3), ("", 1, 3), ("1e9", 1, 3),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 1, 3), ("Fri, 31 Dec 99999 23:59:59 GMT", 1, 10**8),
        ("Fri, 99 Dec 2099 99:99:99 GMT", 1, 10**8), ("Fri, 31 Dec 99999999999999 23:59:59 +9999", 1, 10**8),
    ], ids=["seconds", "date", "years", "word", "negative", "empty", "float", "past", "year 99999", "no date", "huge"])
    def test_retry_after_is_honoured_where_it_makes_sense(self, client, receiver, retry_after, least, most):
        value = retry_after if isinstance(retry_after, str) else retry_after()
        receiver.answers = lambda number: (503, {"Retry-After": value})
        job = client.submit("async_echo", "hi", result_url=receiver.url)
        callback = callback_of(client, job, status="pending", attempts=1)["callback"]
        assert least - 0.5 <= epoch_of(callback["next_attempt_timestamp"]) - time.time() <= most

    def test_twenty_hung_receivers_do_not_delay_others(self, start, receiver):
        client = start().client
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=16))
                for number in range(5):
                    client.submit(
                        "async_echo", str(number), result_url="http://127.0.0.1:%d/" % listener.getsockname()[1]
                    )
            client.submit("async_echo", "hi", result_url=receiver.url)
            eventually(lambda: receiver.received, 5.0)

    @pytest.mark.parametrize("answer", [
        b"", b"garbage\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"\x00" * 100_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ], ids=["nothing", "garbage", "no status", "zeros", "many fields"])
    def test_a_receiver_that_does_not_speak_http_is_tried_again(self, client, answer):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def reply():
                connection, _ = listener.accept()
                with contextlib.closing(connection), contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(answer)

            thread = threading.Thread(target=reply)
            thread.start()
            job = client.submit("async_echo", "hi", result_url="http://127.0.0.1:%d/" % listener.getsockname()[1])
            assert callback_of(client, job, status="pending", attempts=1)["callback"]["error"]
            thread.join()

    def test_an_endless_answer_is_read_a_little_and_no_more(self, client):
        sent = []
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer():
                connection, _ = listener.accept()
                with contextlib.closing(connection), contextlib.suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    while sum(sent) < 2**30:
                        sent.append(connection.send(bytes(65536)))

            thread = threading.Thread(target=answer)
            thread.start()
            job = client.submit("async_echo", "hi", result_url="http://127.0.0.1:%d/" % listener.getsockname()[1])
            callback_of(client, job, status="delivered")
            thread.join()
        assert sum(sent) < 2**26  # what the system's buffers hold, not what was to come

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_a_redirect_is_not_followed_so_the_key_does_not_leak(self, client, receiver, status):
        elsewhere = Receiver()
        try:
            receiver.answers = lambda number: (status, {"Location": elsewhere.url})
            job = client.submit("async_echo", "hi", result_url=receiver.url)
            shown = callback_of(client, job, status="pending", attempts=1)
            assert str(status) in shown["callback"]["error"] and shown["error"] == POST_FAILED
            assert not elsewhere.received
        finally:
            elsewhere.stop()


class KeepAlive:
    """A client with one connection, for many requests of one thread."""

    def __init__(self, client):
        self._connection = http.client.HTTPConnection(client.host, client.port, timeout=PATIENCE_SECONDS)

    def submit(self, body):
        """Submit; return status and answer."""
        self._connection.request("POST", "/job", json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, json.loads(response.read().decode("utf-8"))

    def close(self):
        self._connection.close()


def pending_count(client):
    return client.get("/status").json["stats"]["pending"]


def wait_until_done(client):
    eventually(lambda: pending_count(client) == 0)


ENGINE_JOBS = """
    import ctypes, logging, os, signal, subprocess, sys, time
    import csp.job as job
    import csp.util as util
    from csp import web

    NAME = web.app.config["NAME"]  # when the module is imported
    web.init()

    def logger_of(task_id, input):
        logger = logging.getLogger(task_id)
        logger.setLevel("INFO")
        logger.propagate = False
        logger.addHandler(util.StoringHandler(task_id, input))
        return logger

    @job.asynchronous
    def succeed(task_id, input):
        input["api_key"] = input["api_key"][::-1]
        return {"task_id": task_id, "input": input, "name": NAME, "mine": web.app.config["MINE"], "pid": os.getpid()}

    @job.asynchronous
    def verdict(task_id, input):
        raise util.JobError("no")

    @job.asynchronous
    def broken(task_id, input):
        raise ValueError("serious exception")

    @job.asynchronous
    def leave(task_id, input):
        sys.exit(3)

    @job.asynchronous
    def no_json(task_id, input):
        return object()

    @job.asynchronous
    def binary(task_id, input):
        return bytes(range(256))

    @job.synchronous
    def stream(task_id, input):
        return lambda: iter(["a", "b", "c"])

    @job.asynchronous
    def lines(task_id, input):
        logger = logger_of(task_id, input)
        for number in range(input["data"]):
            logger.info("line %d", number)

    @job.asynchronous
    def progress(task_id, input):
        util.set_progress(task_id, 0.25, "a quarter")
        wait(task_id, input)
        util.set_progress(task_id, 0.75)

    @job.asynchronous(timeout=1)
    def late(task_id, input):
        wait(task_id, input)

    @job.asynchronous(retries=1)
    def flaky(task_id, input):
        if not os.path.exists(input["data"]):
            open(input["data"], "w").close()
            raise OSError("the first attempt fails")
        return "second"

    @job.asynchronous
    def wait(task_id, input):
        "Say which process this is, and go on once there is the file."
        logger_of(task_id, input).info("%d", os.getpid())
        pause = __import__("threading").Event()
        while not os.path.exists(input["data"]):
            util.check_cancelled(task_id)
            pause.wait(0.01)
        return os.getpid()

    once = job.asynchronous(at_most_once=True)(type(wait)(wait.__code__, globals(), "once"))
    once.__qualname__ = "once"

    def start_child(task_id, input, code):
        child = subprocess.Popen([sys.executable, "-c", code + "print(flush=True); time.sleep(100)"],
                                 stdout=subprocess.PIPE)
        child.stdout.readline()
        logger_of(task_id, input).info("%d", child.pid)
        child.wait()

    @job.asynchronous
    def stubborn(task_id, input):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        start_child(task_id, input, "import time; ")

    @job.asynchronous
    def polite(task_id, input):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        start_child(task_id, input, "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); ")

    @job.asynchronous
    def crash(task_id, input):
        {"segfault": lambda: ctypes.string_at(0), "exit": lambda: os._exit(3),
         "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[input["data"]]()

    @job.asynchronous(memory_limit=2.0**28)
    def hungry(task_id, input):
        return len(bytearray(input["data"]))

    @job.asynchronous(memory_limit=2**28)
    def full(task_id, input):
        kept = []
        try:
            while True:
                kept.append(bytes(1000))
        except MemoryError:
            raise MemoryError("no room")

    @job.asynchronous
    def large(task_id, input):
        return "x" * 10_000_000
"""
FACTORIES = """
    import concurrent.futures, os

    def pool(settings):
        return concurrent.futures.ProcessPoolExecutor(settings["WORKERS"])

    def threads(settings):
        return concurrent.futures.ThreadPoolExecutor(settings["WORKERS"])

    def loky(settings):
        import loky
        return loky.ProcessPoolExecutor(settings["WORKERS"])

    def dask(settings):
        from distributed import Client
        return Client(os.environ["DASK_ADDRESS"]).get_executor(pure=False)

    broken = lambda settings: 1 / 0
    not_one = lambda settings: "an executor"
"""
ENGINES = ("thread", "process", "pool", "loky", "dask")


ENGINE_SETTINGS = "MINE = 'my own'\nNAME = 'engines'\n"


class Dask:
    """A Dask cluster on loopback: a scheduler and two workers with a process each; ``address``."""

    def __init__(self, directory):
        needs_module("distributed")
        self._processes = []
        place = directory / "scheduler.json"
        self._run(directory, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", place)
        eventually(lambda: place.exists() and place.read_text().endswith("}"))
        self.address = json.loads(place.read_text())["address"]
        for _ in range(2):
            self._run(directory, "worker", "--host", "127.0.0.1", "--nthreads", "4", "--scheduler-file", place)

    def _run(self, directory, *arguments):
        command = [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], "--no-dashboard", *arguments[1:]]
        with open(directory / f"dask-{len(self._processes)}.txt", "wb") as log:
            self._processes.append(subprocess.Popen(
                list(map(str, command)), cwd=str(directory), stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def stop(self):
        """Kill all of it: a worker whose process has been killed would not come to its own end."""
        family = [pid for process in self._processes for pid in descendants(process.pid)]
        for process in self._processes:
            process.kill()
            process.wait(PATIENCE_SECONDS)
        for pid in filter(is_alive, family):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def dask(tmp_path_factory):
    """Return a function that returns the one Dask cluster of all tests of this process."""
    clusters = []

    def get():
        if not clusters:
            clusters.append(Dask(tmp_path_factory.mktemp("dask")))
        return clusters[0]

    yield get
    for cluster in clusters:
        cluster.stop()


def launch_engine(directory, engine, dask, *arguments, jobs="engine_jobs", **environ):
    """Start ``csp.py --executor ENGINE`` with ENGINE_JOBS and four workers; return the Process."""
    if engine == "loky":
        needs_module("loky")
    for name, text in (("engine_jobs", ENGINE_JOBS), ("factories", FACTORIES), ("settings", ENGINE_SETTINGS)):
        if not (directory / f"{name}.py").exists():
            (directory / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    return Process(
        directory,
        *("--executor", engine if engine in ("thread", "process") else f"factories:{engine}", "--workers", 4),
        *("--jobs", jobs, "--db", directory / "jobs.db", "--config", "settings.py", *arguments),
        environ={"DASK_ADDRESS": dask().address if engine == "dask" else "", "CSP_GRACE_SECONDS": "1", **environ},
    )


@pytest.fixture
def engage(tmp_path, dask):
    """``launch_engine`` in a directory of the test's own; what it starts ends with the test."""
    processes = []

    def start_engine(engine, *arguments, **options):
        processes.append(launch_engine(tmp_path, engine, dask, *arguments, **options))
        return processes[-1]

    yield start_engine
    for process in processes:
        process.terminate()
        process.kill()


@pytest.fixture(scope="session")
def engines(tmp_path_factory, dask):
    """Return a function that gives the one Process with that engine that all tests share which do it no harm."""
    running = {}

    def get(engine):
        if engine not in running:
            running[engine] = launch_engine(tmp_path_factory.mktemp(engine), engine, dask)
        return running[engine]

    yield get
    for process in running.values():
        process.terminate()
        process.kill()


def first_line(client, job):
    """Return the message of the job's first log line once there is one, live."""
    return eventually(lambda: client.show(job)["logs"])[0]["message"]


def cancel(client, job):
    """Cancel the job, which then ends as one that was cancelled."""
    assert client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"]).status == 200
    assert client.finish(job, timeout_seconds=5.0)["error"] == {"message": "cancelled"}


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid):
    """Return the processes that this one has started, and those that they have."""
    found = []
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for word in child.read_text().split():
                found += [int(word), *descendants(int(word))]
    return found


@pytest.fixture
def file(tmp_path):
    """The path of a file that jobs of type ``wait`` wait for; there is none yet."""
    return tmp_path / "go on"


class TestEngines:
    """The same jobs, with the same outcomes, on every executor."""

    pytestmark = pytest.mark.parametrize("engine", ENGINES)

    def test_a_result_with_what_the_function_gets_and_the_settings_it_sees(self, engines, engine):
        client = engines(engine).client
        job = client.submit("succeed", {"a": [1, None, "\u00e4"]}, metadata={"m": 1})
        data = client.finish(job)["data"]
        sent = {"job_type": "succeed", "api_key": "secret-api-key"[::-1], "data": {"a": [1, None, "\u00e4"]}}
        assert data["input"] == {**sent, "metadata": {"m": 1}}
        assert (data["task_id"], data["name"], data["mine"]) == (job["job_id"], "engines", "my own")
        assert (data["pid"] == engines(engine).process.pid) == (engine == "thread")

    def test_log_lines_come_in_order_and_once(self, engines, engine):
        client = engines(engine).client
        job = client.finish(client.submit("lines", 3_000))
        assert [line["message"] for line in job["logs"]] == [f"line {number}" for number in range(3_000)]
        assert {line["module"] for line in job["logs"]} == {"engine_jobs"}

    def test_progress_and_log_are_seen_while_the_job_runs(self, engines, engine, file):
        client = engines(engine).client
        job = client.submit("progress", str(file))
        first_line(client, job)
        eventually(lambda: client.show(job)["progress"] == {"fraction": 0.25, "message": "a quarter"})
        file.touch()
        assert client.finish(job)["progress"] == {"fraction": 0.75, "message": None}

    def test_cancel_reaches_check_cancelled(self, engines, engine, file):
        client = engines(engine).client
        job = client.submit("wait", str(file))
        first_line(client, job)
        cancel(client, job)

    def test_a_timeout_ends_the_job_and_its_late_result_is_dropped(self, engines, engine, file):
        client = engines(engine).client
        job = client.submit("late", str(file))
        pid = int(first_line(client, job)) if engine == "process" else None
        assert client.finish(job)["error"]["message"] == "The job took longer than its timeout of 1 seconds."
        assert pid is None or eventually(lambda: not is_alive(pid))
        file.touch()
        assert client.finish(client.submit("succeed"))["status"] == "complete"
        assert client.show(job)["status"] == "error"

    def test_job_modules_are_found(self, engage, engine, tmp_path):
        package, place = tmp_path / "pkg", tmp_path / "else where"
        package.mkdir()
        place.mkdir()
        source = "import csp.job as job\n{}\n@job.asynchronous\ndef {}(task_id, input):\n    return __name__, number\n"
        (place / "json.py").write_text(source.format("number = 1", "in_a_file"))  # the name of another module
        (package / "jobs.py").write_text(source.format("from .tool import number", "in_a_package"))
        (package / "tool.py").write_text("number = 2\n")
        (package / "__init__.py").write_text("")
        client = engage(engine, "--jobs", place / "json.py", jobs="pkg.jobs").client
        found = [client.finish(client.submit(job_type))["data"] for job_type in ("in_a_file", "in_a_package")]
        assert [number for _, number in found] == [1, 2]
        assert found[0][0].startswith("json_2") and found[1][0].startswith("pkg.jobs")

    def test_the_service_is_killed_and_each_job_ends_once(self, engage, engine, file, receiver):
        first = engage(engine)
        jobs = [first.client.submit("wait", str(file), result_url=receiver.url) for _ in range(6)]
        once = first.client.submit("once", str(file), result_url=receiver.url)
        eventually(lambda: sum(bool(first.client.show(job)["logs"]) for job in jobs) >= 3)
        family = descendants(first.process.pid)
        first.kill()
        file.touch()
        client = engage(engine).client
        ended = [client.finish(job) for job in jobs]
        assert {job["status"] for job in ended} == {"complete"} and {job["attempts"] for job in ended} <= {1, 2}
        if client.finish(once)["status"] == "error":
            assert client.show(once)["error"]["message"].endswith("It is not of a kind that is run again.")
        receiver.wait(7)
        eventually(lambda: all(client.show(job)["callback"]["status"] == "delivered" for job in [*jobs, once]))
        assert len({body["job_id"] for _, body in receiver.received}) == 7
        assert engine != "pool" or len(family) == 4
        if engine != "loky":  # which does not tell its processes whose they are
            eventually(lambda: not any(map(is_alive, family)))


class TestOutcomes:
    """What a function comes to, in a process of its own."""

    @pytest.mark.parametrize("job_type, message, has_traceback", [
        ("verdict", "no", False), ("broken", "ValueError: serious exception", True), ("leave", "SystemExit: 3", True),
        ("no_json", "The result of the job is not JSON: Object of type object is not JSON serializable", False)])
    def test_an_error(self, engines, job_type, message, has_traceback):
        client = engines("process").client
        job = client.finish(client.submit(job_type))
        assert (job["status"], job["error"]["message"], job["attempts"]) == ("error", message, 1)
        assert ("traceback" in job["error"]) == has_traceback

    def test_bytes_a_stream_ten_megabytes_and_a_second_attempt(self, engines, file):
        client = engines("process").client
        assert base64.b64decode(client.finish(client.submit("binary"))["data"]["base64"]) == bytes(range(256))
        job = client.post("/job", {"job_type": "stream", "api_key": "k"}, Prefer="respond-async").json
        assert client.finish(job)["status"] == "complete"
        assert client.finish(client.submit("large"))["data"] == "x" * 10_000_000
        job = client.finish(client.submit("flaky", str(file)))
        assert (job["status"], job["data"], job["attempts"]) == ("complete", "second", 2)


class TestThreadsOfAFactory:
    """An executor of MODULE:FACTORY whose workers are threads of the service itself."""

    def test_a_job_goes_on_and_is_heard(self, engage, file):
        client = engage("threads").client
        job = client.submit("progress", str(file))
        eventually(lambda: client.show(job)["progress"] == {"fraction": 0.25, "message": "a quarter"})
        second = client.submit("wait", str(file))
        first_line(client, second)
        route = {"method": "POST", "route": "/job/<job_id>/report", "status": "200"}
        eventually(lambda: (value_of(metrics_of(client), "csp_responses_total", **route) or 0) >= 3)
        assert client.show(second)["status"] == "pending"
        file.touch()
        assert [client.finish(one)["status"] for one in (job, second)] == ["complete", "complete"]


class TestProcesses:
    """A process for each job."""

    @pytest.mark.parametrize("how, message", [
        ("segfault", "The process of the job was killed by signal 11 (SIGSEGV)."),
        ("exit", "The process of the job ended with exit code 3 before the job had returned."),
        ("kill", "The process of the job was killed by signal 9 (SIGKILL)."),
    ])
    def test_whatever_ends_a_process_ends_its_job_alone_and_at_once(self, engines, file, how, message):
        client = engines("process").client
        other = client.submit("wait", str(file))
        first_line(client, other)
        assert client.finish(client.submit("crash", how), timeout_seconds=3.0)["error"] == {"message": message}
        file.touch()
        assert client.finish(other)["status"] == "complete"

    def test_cancel_ends_the_process_within_a_second(self, engines, file):
        client = engines("process").client
        job = client.submit("wait", str(file))
        pid = int(first_line(client, job))
        client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"])
        assert client.finish(job, timeout_seconds=1.0)["error"] == {"message": "cancelled"}
        assert not is_alive(pid)

    @pytest.mark.parametrize("how", ["cancel", "delete"])
    @pytest.mark.parametrize("job_type", ["stubborn", "polite"])  # which ignores SIGTERM, and which ends well
    def test_what_a_cancelled_job_has_started_is_killed_with_it(self, engines, job_type, how):
        client = engines("process").client
        job = client.submit(job_type)
        child = int(first_line(client, job))
        if how == "cancel":
            cancel(client, job)
        else:
            client.delete(f"/job/{job['job_id']}", key=job["job_key"])
        eventually(lambda: not is_alive(child))

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold the limit")
    def test_a_memory_limit_holds_for_its_job(self, engines):
        client = engines("process").client
        assert client.finish(client.submit("hungry", 2**24))["data"] == 2**24
        assert client.finish(client.submit("hungry", 2**29))["error"]["message"] == "MemoryError"
        error = client.finish(client.submit("full"))["error"]
        assert error["message"] == "MemoryError: no room" and "in full" in error["traceback"]

    def test_many_jobs_leave_nothing_behind(self, engage):
        server = engage("process")
        client, pid = server.client, server.process.pid

        def run(count):
            connection = KeepAlive(client)
            for number in range(count):
                connection.submit({"job_type": "verdict", "api_key": "k", "data": number})
            wait_until_done(client)
            eventually(lambda: len(descendants(pid)) == 1)  # the server process
            both = (pid, *descendants(pid))
            return [(memory_kilobytes(one), len(os.listdir(f"/proc/{one}/fd"))) for one in both], thread_count(pid)

        run(50)
        (own, server_process), threads = run(50)
        (own_after, server_process_after), threads_after = run(100)
        assert own_after[1] <= own[1] + 2 and server_process_after[1] == server_process[1]
        assert own_after[0] < own[0] + 8_000 and server_process_after[0] < server_process[0] + 2_000
        assert threads_after <= threads + 4

    def test_all_processes_end_when_the_service_is_killed(self, engage):
        server = engage("process")
        job = server.client.submit("stubborn")
        child = int(first_line(server.client, job))
        family = descendants(server.process.pid)
        assert child in family and len(family) == 3
        server.kill()
        eventually(lambda: not any(map(is_alive, family[:2])))

    def test_a_dead_server_process_is_replaced_and_its_jobs_run_again(self, engage, file):
        server = engage("process")
        jobs = [server.client.submit("wait", str(file)) for _ in range(3)]
        pids = [int(first_line(server.client, job)) for job in jobs]
        fork_server = [pid for pid in descendants(server.process.pid) if pid not in pids][0]
        os.kill(fork_server, signal.SIGKILL)
        file.touch()
        ended = [server.client.finish(job) for job in jobs]
        assert {(job["status"], job["attempts"]) for job in ended} <= {("complete", 1), ("complete", 2)}
        assert not any(map(is_alive, pids))

    def test_modules_are_loaded_before_the_first_job(self, engage, tmp_path):
        counter = tmp_path / "imports"
        source = "import csp.job\nopen({!r}, 'a').write('x')\n@csp.job.asynchronous\ndef work(task_id, input): pass\n"
        (tmp_path / "counted.py").write_text(source.format(str(counter)))
        client = engage("process", jobs=str(tmp_path / "counted.py")).client
        for job in [client.submit("work") for _ in range(5)]:
            assert client.finish(job)["status"] == "complete"
        assert counter.read_text() == "xx"  # in the service and in the server process

    def test_a_system_without_fork_is_told_what_to_choose(self, monkeypatch):
        monkeypatch.delattr(os, "fork")
        with pytest.raises(csp.StartError, match="EXECUTOR is process, and this system cannot fork"):
            csp.make_engine(csp.Settings({"EXECUTOR": "process"}), csp.Registry())

    def test_secrets_reach_the_jobs_own_processes_and_no_others(self):
        settings = csp.Settings({"SECRET_KEY": "s", "PASSWORD": "p", "API_KEYS": ["k"], "MINE": "m", "CODE": print})
        here, there = (csp.describe_environment(settings, is_here)["settings"] for is_here in (True, False))
        assert set(here) - set(there) == {"SECRET_KEY", "PASSWORD", "API_KEYS", "CALLBACK_SECRET"}
        assert there["MINE"] == "m" and "CODE" not in here


class TestDask:
    """Jobs on a cluster whose workers die."""

    def test_the_jobs_of_a_killed_worker_run_again_elsewhere(self, engines, file):
        client = engines("dask").client
        jobs = [client.submit("wait", str(file)) for _ in range(3)]
        once = client.submit("once", str(file))
        pids = [int(first_line(client, job)) for job in (*jobs, once)]
        for pid in {pids[0], pids[3]}:
            os.kill(pid, signal.SIGKILL)
        begun_again = [job for job, pid in zip(jobs, pids) if pid in (pids[0], pids[3])]
        for job in begun_again:
            eventually(lambda job=job: len(client.show(job)["logs"]) >= 3)
        file.touch()
        for job in jobs:
            ended = client.finish(job)
            assert ended["status"] == "complete"
            lines = [line["message"] for line in ended["logs"]]
            assert ("The executor has begun the job again." in lines) == (job in begun_again)
        assert client.finish(once)["error"]["message"].endswith("It is not of a kind that is run again.")


class HeldExecutor(concurrent.futures.Executor):
    """An executor in the hand of a test: ``calls``, of all that are ``made``, are (future, function, arguments)."""

    made, calls, refusal = [], queue.Queue(), None

    def __init__(self, settings):
        self.made.append(self)

    def submit(self, function, *arguments):
        if self.refusal is not None:
            raise self.refusal
        future = concurrent.futures.Future()
        self.calls.put((future, function, arguments))
        return future

    def shutdown(self, wait=True):
        self.is_shut_down = True


def top_level(task_id, input):
    """A job function that can be found by its name."""
    csp.set_progress(task_id, 0.5)
    return input["data"]


top_level_once = type(top_level)(top_level.__code__, globals(), "top_level_once")
top_level_once.__qualname__ = "top_level_once"


@pytest.fixture
def held_engine(start, monkeypatch):
    """A service with HeldExecutor: ``take()`` returns the next call as (future, run, task), ``complete(job)`` runs the
    next call and returns the job when it has ended."""
    monkeypatch.setattr(HeldExecutor, "made", [])
    monkeypatch.setattr(HeldExecutor, "calls", queue.Queue())
    monkeypatch.setattr(csp, "BACKOFF_SECONDS", (0.01, 0.02))
    registry = csp.Registry()
    registry.asynchronous(timeout=60)(top_level)
    registry.asynchronous(at_most_once=True)(top_level_once)
    monkeypatch.setitem(sys.modules, "held_factory", sys.modules[__name__])
    running = start(registry, EXECUTOR="held_factory:HeldExecutor")

    def take():
        future, function, arguments = HeldExecutor.calls.get(timeout=PATIENCE_SECONDS)
        return future, lambda: function(*arguments), json.loads(arguments[1]["task"])

    def complete(job):
        future, call, _ = take()
        future.set_result(call())
        return running.client.finish(job)

    running.take, running.complete = take, complete
    yield running
    running.stop(grace_seconds=0.0)


REPORT = {"execution": "one", "first": 0, "lines": [], "progress": None, "seconds": 0.5}
LINE = {"timestamp": "2026-01-01T00:00:00.000000", "message": "m", "level": "INFO", "module": "mod", "funcName": "f",
        "lineno": 3}


def report(client, task, **more):
    """Send a report as a worker does; return the answer."""
    path = urllib.parse.urlsplit(task["url"]).path
    return client.post(path, {**REPORT, **more}, key=task["token"])


def run_task(task, url):
    """Run a task as a worker does that reaches the service at ``url``; return what comes back."""
    return json.loads(csp.run_task(json.dumps({**task, "url": url}), csp.describe_environment({}, False)))


class TestTasks:
    """What is handed to an executor, what it may do, and what comes back from where it runs."""

    def test_strings_go_in_and_a_string_comes_out(self, held_engine):
        job = held_engine.client.submit("top_level", {"a": 1})
        future, call, task = held_engine.take()
        assert task["function"] == {"module": "test_csp", "file": str(Path(__file__).resolve()), "name": "top_level"}
        assert task["url"] == f"{held_engine.server.url}job/{job['job_id']}/report"
        assert SETTINGS["PASSWORD"] not in json.dumps(task) and SECURE_KEY not in json.dumps(task)
        result = call()
        assert isinstance(result, str)
        future.set_result(result)
        ended = held_engine.client.finish(job)
        assert (ended["status"], ended["data"], ended["progress"]["fraction"]) == ("complete", {"a": 1}, 0.5)

    def test_lines_count_once_however_often_they_are_sent(self, held_engine):
        client, job = held_engine.client, held_engine.client.submit("top_level")
        future, call, task = held_engine.take()
        lines = [{**LINE, "message": str(number)} for number in range(6)]
        assert report(client, task, lines=lines[:3]).json == {"cancelled": False}
        assert report(client, task, lines=lines[:3]).json == {"cancelled": False}
        assert report(client, task, first=2, lines=lines[2:5]).json == {"cancelled": False}
        future.set_result(json.dumps({**run_task(task, None), "report": {**REPORT, "first": 4, "lines": lines[4:]}}))
        ended = client.finish(job)
        assert [line["message"] for line in ended["logs"]] == list("012345")
        assert ended["logs"][0] == {**LINE, "message": "0"}

    def test_only_the_latest_execution_counts(self, held_engine):
        client, job = held_engine.client, held_engine.client.submit("top_level")
        _, _, task = held_engine.take()
        report(client, task, lines=[{**LINE, "message": "old"}])
        assert report(client, task, execution="two", lines=[LINE]).json == {"cancelled": False}
        assert report(client, task, first=1, lines=[{**LINE, "message": "late"}]).json == {"cancelled": True}
        eventually(lambda: len(client.show(job)["logs"]) == 3)
        lines = [line["message"] for line in client.show(job)["logs"]]
        assert lines == ["old", "The executor has begun the job again.", "m"]

    def test_a_second_execution_of_what_may_run_once_is_refused(self, held_engine):
        client, job = held_engine.client, held_engine.client.submit("top_level_once", 1)
        future, call, task = held_engine.take()
        first, second = call(), call()  # each asks first
        assert json.loads(first)["status"] == "complete"
        assert json.loads(second)["error"] and json.loads(second)["data"] is None
        future.set_result(second)
        assert client.finish(job)["error"]["message"].endswith("It is not of a kind that is run again.")

    def test_without_a_way_to_the_service_everything_comes_with_the_result(self, held_engine, dead_url, monkeypatch):
        monkeypatch.setattr(csp, "REPORT_SECONDS", 0.01)
        held_engine.client.submit("top_level", 1)
        held_engine.client.submit("top_level_once", 1)
        any_task, once = (held_engine.take()[2] for _ in range(2))
        for url in (None, dead_url):
            assert run_task(any_task, url)["report"]["progress"] == {"fraction": 0.5, "message": None}
            assert "cannot reach the service" in run_task(once, url)["error"]  # what may run once is not begun

    def test_a_cancelled_or_ended_job_is_told_so(self, held_engine):
        client, job = held_engine.client, held_engine.client.submit("top_level")
        future, _, task = held_engine.take()
        assert report(client, task).json == {"cancelled": False}
        cancel(client, job)  # the engine has agreed to cancel
        assert future.cancelled()
        answers = []  # until the run is forgotten, just after its end is stored, it is told to stop
        eventually(lambda: answers.append(report(client, task)) or answers[-1].status == 403)
        assert all((one.status, one.json) == (200, {"cancelled": True}) for one in answers[:-1])
        assert answers[-1].json == {"error": "not authorized"}

    def test_a_timeout_counts_from_when_the_job_has_begun_there(self):
        run = csp.RemoteRun("id", 1, 1, lambda run, is_log: None, 60.0)
        before = run.deadline
        eventually(lambda: run.take_report({**REPORT, "execution": uuid.uuid4().hex, "seconds": 0}) and
                   run.deadline > before)

    def test_only_the_token_of_the_run_opens_the_route(self, held_engine):
        client, job = held_engine.client, held_engine.client.submit("top_level")
        task = held_engine.take()[2]
        client.submit("top_level")
        other = held_engine.take()[2]
        for key in (job["job_key"], other["token"], "", "x", SECURE_KEY, ADMIN):
            assert report(client, {**task, "token": key}).status == 403
        assert client.get(f"/job/{job['job_id']}", key=task["token"]).status == 403
        assert client.post("/job/unknown/report", REPORT, key=task["token"]).status == 403
        assert report(client, task).status == 200

    def test_a_wrong_report_is_refused_with_a_sentence(self, held_engine):
        held_engine.client.submit("top_level")
        task = held_engine.take()[2]
        for more in (
            {"execution": ""}, {"execution": 5}, {"execution": "x" * 101}, {"first": -1}, {"first": True},
            {"lines": None}, {"lines": [{}]}, {"lines": [{**LINE, "lineno": "3"}]}, {"lines": [{**LINE, "message": 5}]},
            {"lines": [{**LINE, "timestamp": "yesterday"}]}, {"lines": [{**LINE, "more": 1}]}, {"progress": 0.5},
            {"progress": {"fraction": "x", "message": None}}, {"seconds": None}, {"x": 1},
        ):
            answer = report(held_engine.client, task, **more)
            assert (answer.status, answer.error) == (409, "This is no report as openapi.json describes it"), more

    def test_a_broken_pool_is_made_anew_and_each_job_counts_an_attempt(self, held_engine):
        job = held_engine.client.submit("top_level", 7)
        for attempt in (1, 2):
            held_engine.take()[0].set_exception(concurrent.futures.BrokenExecutor("it broke"))
            eventually(lambda attempt=attempt: len(HeldExecutor.made) == attempt + 1)
            assert HeldExecutor.made[attempt - 1].is_shut_down
        ended = held_engine.complete(job)
        assert (ended["status"], ended["data"], ended["attempts"]) == ("complete", 7, 3)
        assert [line["message"] for line in ended["logs"]] == ["The executor has failed: BrokenExecutor: it broke"] * 2

    def test_a_job_that_is_lost_three_times_is_an_error(self, held_engine):
        client, job = held_engine.client, held_engine.client.submit("top_level")
        for error in (concurrent.futures.CancelledError(), ValueError("lost"), KeyError("lost")):
            held_engine.take()[0].set_exception(error)
        ended = client.finish(job)
        assert (ended["status"], ended["attempts"]) == ("error", 3)
        assert "attempt 3 of 3" in ended["error"]["message"] and len(HeldExecutor.made) == 1

    @pytest.mark.parametrize("result", [
        "", "[]", None, '{"status": "complete"}', concurrent.futures.BrokenExecutor()], ids=repr)
    def test_what_may_run_once_is_an_error_when_it_or_its_result_is_lost(self, held_engine, result):
        job = held_engine.client.submit("top_level_once")
        future, _, task = held_engine.take()
        report(held_engine.client, task)
        (future.set_exception if isinstance(result, Exception) else future.set_result)(result)
        message = held_engine.client.finish(job)["error"]["message"]
        assert re.fullmatch("The executor has failed: .* It is not of a kind that is run again.", message)

    def test_an_executor_that_takes_nothing_is_tried_again_and_made_anew(self, held_engine, monkeypatch):
        monkeypatch.setattr(HeldExecutor, "refusal", RuntimeError("cannot schedule new futures"))
        job = held_engine.client.submit("top_level", 1)
        eventually(lambda: len(HeldExecutor.made) >= 4)
        monkeypatch.setattr(HeldExecutor, "refusal", None)
        assert held_engine.complete(job)["data"] == 1

    def test_a_job_that_is_refused_takes_no_other_along(self, held_engine, monkeypatch):
        client, other = held_engine.client, held_engine.client.submit("top_level_once", 1)
        future, call, _ = held_engine.take()
        monkeypatch.setattr(HeldExecutor, "refusal", ValueError("too large"))
        job = client.submit("top_level", 2)
        eventually(lambda: client.show(job)["logs"])
        monkeypatch.setattr(HeldExecutor, "refusal", None)
        future.set_result(call())
        assert client.finish(other)["data"] == 1 and len(HeldExecutor.made) == 1
        assert held_engine.complete(job)["data"] == 2

    def test_what_may_run_once_and_has_not_begun_is_begun_later(self, held_engine):
        job = held_engine.client.submit("top_level_once", 1)
        held_engine.take()[0].set_exception(concurrent.futures.BrokenExecutor())
        assert held_engine.complete(job)["data"] == 1

    def test_a_module_that_serves_when_a_worker_imports_it_is_an_error_of_the_job(self, tmp_path):
        source = "import csp.job\nfrom csp import web\n@csp.job.asynchronous\ndef work(task_id, input):\n    pass\n"
        (tmp_path / "unguarded.py").write_text(source + "web.app.run()\n")
        environ = {"CSP_EXECUTOR": "process", "CSP_SQLALCHEMY_DATABASE_URI": "sqlite://", "PYTHONPATH": str(HERE),
                   "CSP_PORT": "0", "CSP_GRACE_SECONDS": "0"}
        with subprocess.Popen([sys.executable, "-u", "unguarded.py"], cwd=str(tmp_path), env={**os.environ, **environ},
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                client = Client(re.search(r"http://\S+", process.stdout.readline().decode())[0])
                message = client.finish(client.submit("work"))["error"]["message"]
            finally:
                process.terminate()
        assert "A worker imports the job module" in message

    def test_a_function_that_cannot_be_found_elsewhere_stops_the_start(self, tmp_path):
        registry = csp.Registry()
        registry.asynchronous(lambda_named("inner", lambda task_id, input: None))
        for executor in ("process", "test_csp:HeldExecutor"):
            settings = csp.Settings({"SQLALCHEMY_DATABASE_URI": str(tmp_path / "jobs.db"), "EXECUTOR": executor})
            with pytest.raises(csp.StartError, match="at the top level of a module"):
                csp.Service(settings, registry)

    @pytest.mark.parametrize("executor, words", [
        ("factories:broken", "cannot be made: ZeroDivisionError: division by zero."),
        ("factories:not_one", "it has returned str, which is no concurrent.futures.Executor."),
        ("factories:missing", "cannot be made: AttributeError: module 'factories' has no attribute 'missing'."),
        ("no_such_module:x", "The module no_such_module cannot be imported"),
        ("threads", "EXECUTOR has to be thread, process, or MODULE:FACTORY; the command line says 'threads'."),
    ])
    def test_an_executor_that_cannot_be_had_is_one_sentence(self, tmp_path, executor, words):
        (tmp_path / "factories.py").write_text(textwrap.dedent(FACTORIES))
        (tmp_path / "engine_jobs.py").write_text("")
        done = run_command("--jobs", "engine_jobs", "--executor", executor, "--port", "0", cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr

    def test_a_signal_to_a_forked_pool_does_not_stop_the_service(self, engage, file):
        server = engage("pool")
        for _ in range(2):  # the pool ends all of its workers with SIGTERM when one has died
            assert server.client.finish(server.client.submit("crash", "kill"))["attempts"] == 3
        assert server.client.finish(server.client.submit("succeed"))["status"] == "complete"

    def test_workers_use_the_address_of_the_settings(self, held_engine, start):
        other = start(held_engine.registry, None, EXECUTOR="held_factory:HeldExecutor", URL="http://jobs.example/x")
        other.client.post("/job/a%20b", {"job_type": "top_level", "api_key": "k"})
        assert held_engine.take()[2]["url"] == "http://jobs.example/x/job/a%20b/report"
        other.stop(grace_seconds=0.0)


class TestRunner:
    """Jobs run, each to its end, whatever they do."""

    def test_hundreds_of_jobs_from_many_threads_all_end_with_their_callbacks(self, start, receiver):
        client, wanted = start().client, {}

        def submit(number):
            for count in range(25):
                job = client.submit("async_echo", f"{number}-{count}", result_url=receiver.url)
                wanted[job["job_id"]] = f">{number}-{count}"

        in_threads(8, submit)
        wait_until_done(client)
        assert client.get("/status").json["stats"] == {"pending": 0, "complete": 200, "error": 0}
        assert {body["job_id"]: body["data"] for _, body in receiver.wait(200)} == wanted and len(wanted) == 200

    def test_an_attempt_that_begins_before_the_last_one_is_put_away_costs_no_place(self, start, monkeypatch):
        monkeypatch.setattr(csp, "BACKOFF_SECONDS", (0.01, 0.01))
        registry, begun, both = csp.Registry(), [], threading.Barrier(2, timeout=PATIENCE_SECONDS)

        @registry.asynchronous(retries=1)
        def twice(task_id, input):
            begun.append(task_id)
            if len(begun) == 1:
                raise ValueError("not yet")

        registry.asynchronous(named("meet", lambda task_id, input: both.wait() >= 0))
        running = start(registry, WORKERS=2)
        record = running.service.store.record_ending

        def record_slowly(job, decision, run):
            ended = record(job, decision, run)
            eventually(lambda: not isinstance(decision, csp.Requeue) or len(begun) == 2)
            return ended

        monkeypatch.setattr(running.service.store, "record_ending", record_slowly)
        assert running.client.finish(running.client.submit("twice"))["attempts"] == 2
        jobs = [running.client.submit("meet") for _ in range(2)]
        assert [running.client.finish(job)["status"] for job in jobs] == ["complete"] * 2

    def test_a_job_that_waits_for_its_next_attempt_shows_no_progress(self, start):
        def work(task_id, input):
            csp.util.set_progress(task_id, 0.9, "nearly")
            raise ValueError("no")

        client = start(registry_of(work, retries=1)).client
        jobs = [client.submit("work") for _ in range(20)]
        shown = [client.show(job) for job in jobs]
        waiting = [job for job in shown if job["attempts"] == 1 and messages(job)]
        assert waiting and [job["progress"] for job in waiting if job["status"] == "pending"] == [None] * len(waiting)
        assert client.finish(jobs[0])["progress"] == {"fraction": 0.9, "message": "nearly"}

    def test_a_burst_waits_on_disk_and_runs_in_order(self, start, gate):
        client = start(gate.registry, WORKERS=1).client
        gate.wait_for(client.submit("wait", -1))
        threads = threading.active_count()
        for number in range(100):
            client.submit("quick", number)
        eventually(lambda: threading.active_count() <= threads + 2)
        gate.open.set()
        wait_until_done(client)
        assert gate.order == list(range(-1, 100))
        assert client.get("/status").json["stats"] == {"pending": 0, "complete": 101, "error": 0}

    @pytest.mark.parametrize("workers, count", [(3, 30), (60, 60)])
    def test_as_many_as_there_are_workers_run_at_a_time_and_never_more(self, start, workers, count):
        barrier, lock, now, most = threading.Barrier(workers), threading.Lock(), [0], []

        def meet(task_id, input):
            with lock:
                now[0] += 1
                most.append(now[0])
            barrier.wait(PATIENCE_SECONDS)
            with lock:
                now[0] -= 1

        client = start(registry_of(meet, "meet"), WORKERS=workers).client
        for _ in range(count):
            client.submit("meet")
        wait_until_done(client)
        assert client.get("/status").json["stats"]["complete"] == count and max(most) == workers

    def test_an_exception_is_retried_with_backoff_and_a_job_error_is_not(self, start, receiver, monkeypatch):
        monkeypatch.setattr(csp, "BACKOFF_SECONDS", (0.1, 0.15))
        registry, begun = csp.Registry(), {}

        @registry.asynchronous(retries=3)
        def flaky(task_id, input):
            times = begun.setdefault(task_id, [])
            times.append(time.monotonic())
            if len(times) <= input["data"]:
                raise RuntimeError(f"failure {len(times)}")
            return len(times)

        @registry.asynchronous(retries=3)
        def verdict(task_id, input):
            begun.setdefault(task_id, []).append(time.monotonic())
            raise csp.JobError("no")

        client = start(registry).client
        jobs = [client.submit("flaky", count, result_url=receiver.url) for count in (0, 2, 3, 9)]
        jobs.append(client.submit("verdict", result_url=receiver.url))
        ended = [client.finish(job) for job in jobs]
        assert [(job["status"], job["data"], job["attempts"]) for job in ended] == [
            ("complete", 1, 1), ("complete", 3, 3), ("complete", 4, 4), ("error", None, 4), ("error", None, 1)]
        assert [len(begun[job["job_id"]]) for job in jobs] == [1, 3, 4, 4, 1]
        assert ended[3]["error"]["message"] == "RuntimeError: failure 4" and ended[4]["error"] == {"message": "no"}
        for times in begun.values():
            assert all(0.1 <= later - earlier for earlier, later in zip(times, times[1:]))
        assert "failure 1" in ended[1]["logs"][0]["message"]
        assert sorted(body["job_id"] for _, body in receiver.wait(5)) == sorted(job["job_id"] for job in jobs)

    def test_a_job_that_waits_for_its_retry_takes_no_place_and_can_be_cancelled(self, start, monkeypatch):
        monkeypatch.setattr(csp, "BACKOFF_SECONDS", (60.0, 60.0))
        registry = registry_of(raising(ValueError("no")), retries=1)
        registry.asynchronous(named("quick", lambda task_id, input: "done"))
        client = start(registry, WORKERS=1).client
        job = client.submit("work")
        eventually(lambda: "Attempt 1 failed" in str(messages(client.show(job))))
        assert client.finish(client.submit("quick"))["data"] == "done"
        assert client.show(job)["status"] == "pending"
        assert client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"]).status == 200
        assert (client.show(job)["error"], client.show(job)["attempts"]) == ({"message": "cancelled"}, 1)

    def test_a_timeout_ends_the_job_frees_its_place_and_drops_its_late_result(self, start, receiver):
        registry, release, left = csp.Registry(), threading.Event(), queue.Queue()

        @registry.asynchronous(timeout=0.2)
        def stuck(task_id, input):
            assert release.wait(PATIENCE_SECONDS)
            with pytest.raises(csp.JobCancelled):
                csp.util.check_cancelled(task_id)
            csp.util.set_progress(task_id, 1.0)
            left.put(task_id)
            return "late"

        registry.synchronous(timeout=0.2)(named("stuck_now", lambda task_id, input: release.wait(PATIENCE_SECONDS)))
        registry.asynchronous(timeout=PATIENCE_SECONDS)(named("quick", lambda task_id, input: "in time"))
        client = start(registry, WORKERS=1).client
        jobs = [client.submit("stuck", result_url=receiver.url) for _ in range(2)]
        assert client.finish(client.submit("quick"), 10.0)["data"] == "in time"
        before = [callback_of(client, job, status="delivered") for job in jobs] + [client.submit("stuck_now")]
        for job in before:
            assert (job["status"], job["data"]) == ("error", None) and "0.2 seconds" in job["error"]["message"]
            assert 0.15 < epoch_of(job["finished_timestamp"]) - epoch_of(job["started_timestamp"]) < 5.0
        release.set()
        assert {left.get(timeout=PATIENCE_SECONDS) for _ in jobs} == {job["job_id"] for job in jobs}
        assert client.finish(client.submit("quick"))["data"] == "in time"
        assert [client.show(job) for job in jobs] == before[:2] and len(receiver.received) == 2

    def submit_in(self, state, client, gate, **fields):
        """Return a job in that state of a service with one worker; "deaf": running, and it does not listen."""
        if state in ("queued", "cancelled"):
            client.submit("wait", "blocker")
        job = client.submit({"running": "obedient", "deaf": "wait", "error": "fail"}.get(state, "quick"), **fields)
        if state in ("running", "deaf"):
            gate.wait_for(job)
        elif state == "cancelled":
            assert client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"]).status == 200
        elif state != "queued":
            client.finish(job)
        return job

    @pytest.mark.parametrize("state", ["queued", "running", "deaf", "complete", "error", "cancelled"])
    def test_cancel_in_every_state(self, start, gate, receiver, state):
        client = start(gate.registry, WORKERS=1).client
        job = self.submit_in(state, client, gate, data="x", result_url=receiver.url)
        answer = client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"])
        if state in ("complete", "error", "cancelled"):
            assert answer.status == 409 and "finished" in answer.error
        else:
            assert answer.status == 200 and answer.json["job_id"] == job["job_id"]
        if state == "running":
            client.finish(job)
            assert gate.stopped == [job["job_id"]]
        gate.open.set()
        ended = client.finish(job)
        assert (ended["status"], ended["data"], ended["error"]) == (
            ("complete", "x", None) if state in ("deaf", "complete") else
            ("error", None, {"message": "it failed" if state == "error" else "cancelled"}))
        assert client.finish(client.submit("quick", "last"))["data"] == "last"
        assert gate.order.count("x") == (state in ("complete", "deaf"))
        assert [body["status"] for _, body in receiver.wait()] == [ended["status"]]

    def test_a_race_between_cancel_and_completion_has_one_winner(self, start, receiver):
        registry, ended, jobs, statuses = csp.Registry(), set(), {}, {}

        @registry.asynchronous
        def short(task_id, input):
            for _ in range(input["data"]):
                if input["data"] % 2:  # the others do not listen
                    csp.util.check_cancelled(task_id)
            ended.add(task_id)
            return "ran"

        client = start(registry, WORKERS=4).client

        def race(number):
            for turns in random.Random(number).sample(range(3000), 20):
                job = client.submit("short", turns, result_url=receiver.url)
                jobs[job["job_id"]] = job
                statuses[job["job_id"]] = client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"]).status

        in_threads(4, race)
        wait_until_done(client)
        assert set(statuses.values()) <= {200, 409}
        bodies = {body["job_id"]: body for _, body in receiver.wait(80)}
        assert len(receiver.received) == 80 and bodies.keys() == jobs.keys()
        for job_id, body in bodies.items():
            job = client.show(jobs[job_id])
            outcome = (job["status"], job["data"], job["error"])
            assert outcome in (("complete", "ran", None), ("error", None, {"message": "cancelled"}))
            assert outcome == (body["status"], body["data"], body["error"])
            assert statuses[job_id] == 200 or outcome[0] == "complete"
            assert outcome[0] == "error" or job_id in ended
            assert job["attempts"] or job_id not in ended

    @pytest.mark.parametrize("state", ["queued", "running", "deaf", "complete", "error"])
    def test_delete_in_every_state(self, start, gate, receiver, state):
        running = start(gate.registry, WORKERS=1)
        client = running.client
        job = self.submit_in(state, client, gate, data="x", result_url=receiver.url, metadata={"a": "b"})
        if state in ("complete", "error"):
            receiver.wait()
        answer = client.delete(f"/job/{job['job_id']}", key=job["job_key"])
        assert (answer.status, answer.json) == (200, {"success": True})
        assert client.delete(f"/job/{job['job_id']}", key=ADMIN).status == 404
        if state == "running":
            eventually(lambda: gate.stopped == [job["job_id"]])
        gate.open.set()
        client.finish(client.submit("quick", "last"))
        assert gate.order.count("x") == (state in ("deaf", "complete"))
        assert client.get(f"/job/{job['job_id']}", key=ADMIN).status == 404
        assert len(receiver.received) == (state in ("complete", "error"))
        assert rows_of(running.path, "SELECT count(*) FROM metadata") == [(0,)]
        assert sum(client.get("/status").json["stats"].values()) == (2 if state == "queued" else 1)

    @pytest.mark.parametrize("state, has_key", [
        ("queued", True), ("deaf", True), ("complete", False), ("error", False), ("cancelled", False)])
    def test_resubmit_in_every_state(self, start, gate, receiver, state, has_key):
        client = start(gate.registry, WORKERS=1).client
        fields = {"data": {"x": [1, None]}, "result_url": receiver.url, "metadata": {"a": "b", "n": 1}}
        job = self.submit_in(state, client, gate, **fields)
        path, key = f"/job/{job['job_id']}/resubmit", job["job_key"]
        if state not in ("queued", "deaf"):
            callback_of(client, job, status="delivered")
        assert client.post(path, {"api_key": "k"}).status == 403
        without = client.post(path, key=key)
        assert without.status == 200 if has_key else without.error == "Please provide your API key."
        for body in ({"api_key": "a\nb"}, {"api_key": "k", "data": 1}, {"api_key": ["k"]}, {"api_key": ""}):
            assert client.post(path, body, key=key).status == 409
        answer = client.post(path, {"api_key": "second-key"}, key=key)
        again = answer.json
        assert answer.status == 200 and again["resubmitted_from"] == job["job_id"]
        assert again["job_id"] != job["job_id"] and again["job_key"] != key
        for name in ("job_type", "sent_data", "metadata", "result_url"):
            assert again[name] == job[name]
        gate.open.set()
        assert client.finish(again)["status"] == ("error" if state == "error" else "complete")
        eventually(lambda: "second-key" in [headers["Authorization"] for headers, body in list(receiver.received)
                                            if body["job_id"] == again["job_id"]])
        assert client.show(job)["resubmitted_from"] is None

    def test_a_synchronous_job_is_resubmitted_like_it_was_submitted(self, client):
        job = client.submit("echo", "hi")
        again = client.post(f"/job/{job['job_id']}/resubmit", {"api_key": "k"}, key=job["job_key"]).json
        assert (again["status"], again["data"], again["resubmitted_from"]) == ("complete", ">hi", job["job_id"])
        assert client.post("/job/nobody/resubmit", {"api_key": "k"}, key=ADMIN).status == 404

    def test_a_submission_under_the_id_of_a_running_job_is_refused_and_the_job_goes_on(self, start, gate):
        @gate.registry.asynchronous
        def work(task_id, input):
            gate.begun.put(task_id)
            assert gate.open.wait(PATIENCE_SECONDS)
            thread = threading.Thread(target=csp.util.set_progress, args=(task_id, 0.5, "by a thread"))
            thread.start()
            thread.join()
            gate.begun.get(timeout=PATIENCE_SECONDS)
            return "mine"

        gate.registry.synchronous(named("now", lambda task_id, input: "other"))
        client = start(gate.registry).client
        job = client.submit("work", job_id="taken")
        gate.wait_for(job)
        answer = client.post("/job/taken", {"job_type": "now", "api_key": "k"})
        assert (answer.status, answer.error) == (409, "job_id taken already exists")
        gate.open.set()
        eventually(lambda: client.show(job)["progress"] == {"fraction": 0.5, "message": "by a thread"})
        assert client.show(job)["status"] == "pending"
        gate.begun.put("go on")
        ended = client.finish(job)
        assert (ended["status"], ended["data"], ended["attempts"]) == ("complete", "mine", 1)

    def test_a_job_type_that_is_gone_is_an_error_that_says_so(self, start, gate, receiver):
        first = start(gate.registry, WORKERS=1)
        gate.wait_for(first.client.submit("wait", "blocker"))
        job = first.client.submit("quick", "x", result_url=receiver.url)
        first.stop(0.0)
        gate.open.set()
        client = start().client
        sentence = "Job type quick not available. Available job types are async_echo, echo"
        assert client.finish(job)["error"] == {"message": sentence}
        assert receiver.wait()[0][1]["error"] == {"message": sentence}
        assert client.finish(client.submit("async_echo", "hi"))["data"] == ">hi"

    def test_stopping_lets_running_jobs_finish_begins_no_other_and_leaves_those_on_disk(self, start, gate, receiver):
        first = start(gate.registry, WORKERS=2)
        jobs = [first.client.submit("wait", number, result_url=receiver.url) for number in range(2)]
        assert {gate.begun.get(timeout=PATIENCE_SECONDS) for _ in jobs} == {job["job_id"] for job in jobs}
        jobs += [first.client.submit("quick", number, result_url=receiver.url) for number in range(2, 5)]
        first.service.release()  # what the server does first when it is told to stop
        gate.open.set()
        assert [first.client.finish(job)["data"] for job in jobs[:2]] == [0, 1]
        first.stop()
        left = rows_of(first.path, "SELECT status, attempts FROM jobs ORDER BY seq")
        assert left == [("complete", 1)] * 2 + [("pending", 0)] * 3
        client = start(gate.registry).client
        for number, job in enumerate(jobs):
            ended = client.finish(job)
            assert (ended["status"], ended["data"], ended["attempts"]) == ("complete", number, 1)
        assert gate.order[2:] == [2, 3, 4] and len(receiver.wait(5)) == 5

    @pytest.mark.parametrize("job_type", ["once", "hold"], ids=["at most once", "synchronous"])
    def test_what_may_not_run_again_ends_as_an_error_when_the_service_stops_without_it(self, start, gate, job_type):
        wait = gate.registry.get("wait").function
        gate.registry.asynchronous(named("once", lambda task_id, input: wait(task_id, input)), at_most_once=True)
        add_synchronous(gate)
        first = start(gate.registry)
        answer = Later(first.client.post, "/job/x", {"job_type": job_type, "api_key": "k"})
        gate.wait_for({"job_id": "x"})
        first.stop(0.0)
        gate.open.set()
        answer.result()
        ended = show(start(gate.registry).client, "x")
        assert ended["status"] == "error" and "not of a kind that is run again" in ended["error"]["message"]

    @pytest.mark.parametrize("crashed, suspects, alone_seconds, attempts", [
        ("seq = 2", "seq = 2", 60.0, [1, 3, 0]),
        ("seq < 3", "seq < 3", 0.3, [3, 3, 1]), ("seq < 3", "seq = 2", 0.3, [3, 3, 1]),
    ], ids=["alone", "two suspects", "behind another"])
    def test_a_suspect_of_two_crashes_runs_alone_for_a_minute(
            self, start, gate, monkeypatch, crashed, suspects, alone_seconds, attempts):
        monkeypatch.setattr(csp, "ALONE_SECONDS", alone_seconds)
        first = start(gate.registry, WORKERS=2)
        jobs = [first.client.submit("wait", number) for number in range(2)]
        for _ in jobs:
            gate.begun.get(timeout=PATIENCE_SECONDS)
        jobs.append(first.client.submit("quick", 2))
        first.stop(0.0)
        rows_of(first.path, f"UPDATE jobs SET run_at = NULL, attempts = 2 WHERE {crashed}")
        rows_of(first.path, f"UPDATE jobs SET crashes = 1 WHERE {suspects}")
        client = start(gate.registry, WORKERS=4).client
        gate.wait_for(jobs[1])
        eventually(lambda: [client.show(job)["attempts"] for job in jobs] == attempts)  # and nobody wakes the runner
        gate.open.set()
        assert [client.finish(job)["data"] for job in jobs] == [0, 1, 2]

    def test_above_max_pending_a_submission_is_answered_503(self, start, gate):
        client = start(gate.registry, WORKERS=1, MAX_PENDING=3).client
        jobs = [client.submit("wait", number) for number in range(3)]
        answer = client.post("/job", {"job_type": "quick", "api_key": "k"})
        assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0 and pending_count(client) == 3
        gate.open.set()
        for job in jobs:
            client.finish(job)
        assert client.submit("quick", "x")["job_id"]

    def test_auto_clear_deletes_old_finished_jobs_at_the_start(self, start, receiver):
        receiver.answers = lambda number: (500, {})
        first = start()
        jobs = [first.client.submit("async_echo", str(number)) for number in range(3)]
        jobs.append(first.client.submit("async_echo", "due", result_url=receiver.url))
        for job in jobs:
            first.client.finish(job)
        receiver.wait()
        first.stop()
        for seq, days in enumerate((9, 11, 400, 400), 1):
            finished = csp.timestamp(time.time() - days * 86_400)
            rows_of(first.path, "UPDATE jobs SET finished_timestamp = ? WHERE seq = ?", finished, seq)
        for settings, left in (({}, [200] * 4), ({"AUTO_CLEAR": True}, [200, 404, 404, 200])):
            running = start(**settings)

            def statuses(client=running.client):
                return [client.get(f"/job/{job['job_id']}", key=ADMIN).status for job in jobs]

            eventually(lambda statuses=statuses, left=left: statuses() == left)
            running.stop()


STUBBORN_MODULE = """
    import threading
    import csp.job as job

    @job.asynchronous(timeout=0.2)
    def stuck(task_id, input):
        threading.Event().wait(120)

    @job.asynchronous
    def threads(task_id, input):
        threading.Thread(target=threading.Event().wait, args=(120,)).start()

    @job.synchronous(timeout=0.2)
    def stuck_in_the_request(task_id, input):
        threading.Event().wait(120)

    @job.asynchronous
    def quick(task_id, input):
        return input.get("data")
    """


@contextlib.contextmanager
def locked(path):
    """Hold SQLite's write lock, as another program would."""
    with opened(path) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def count_commits(path):
    """Count the commits in the write-ahead log (sqlite.org/fileformat2.html#walformat)."""
    log = Path(str(path) + "-wal").read_bytes()
    frames = range(32, len(log), 24 + int.from_bytes(log[8:12], "big"))
    return sum(any(log[at + 4:at + 8]) and log[at + 8:at + 16] == log[16:24] for at in frames)


class TestStopping:
    """SIGTERM ends the process within the grace period and five seconds, with 0, whatever jobs have left behind."""

    @pytest.mark.parametrize("job_types", [[], ["threads"], ["stuck", "stuck_in_the_request", "quick"]],
                             ids=["at once", "thread", "stuck and hung receiver"])
    def test_what_a_job_left_behind_does_not_keep_the_process(self, launch, hung_url, job_types):
        server = launch(STUBBORN_MODULE, environ={"CSP_GRACE_SECONDS": "0.5"})
        for job_type in job_types:
            callback = {"result_url": hung_url} if job_type == "quick" else {}
            server.client.finish(server.client.submit(job_type, **callback))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5.5) == 0

    def test_idle_and_half_sent_connections_do_not_keep_the_process(self, launch):
        server = launch(STUBBORN_MODULE, environ={"CSP_GRACE_SECONDS": "0.5"})
        with connections(server.url, (1, b""), (1, b"GET / HT"), (1, POST + b"Content-Length: 10\r\n\r\n{")):
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5.5) == 0


class TestDiskTrouble:
    """The disk refuses what jobs come to, and takes it later."""

    @pytest.fixture(autouse=True)
    def short_waits(self, monkeypatch, impatient):
        monkeypatch.setattr(csp, "BUSY_SECONDS", 0.1)
        monkeypatch.setattr(csp, "RETRY_DISK_SECONDS", 0.1)

    @pytest.mark.parametrize("way, status, data, attempts", [
        ("returns", "complete", "x", 1), ("raises", "complete", "again", 2), ("takes too long", "error", None, 1)])
    def test_endings_that_the_disk_refuses_are_recorded_later(self, start, way, status, data, attempts):
        begun, ended, go = queue.Queue(), queue.Queue(), threading.Event()

        def work(task_id, input):
            if go.is_set():
                return "again"
            begun.put(task_id)
            assert go.wait(PATIENCE_SECONDS)
            ended.put(task_id)
            if way == "raises":
                raise ValueError("no")
            while way == "takes too long":
                csp.util.check_cancelled(task_id)
            return "x"

        running = start(registry_of(work, timeout=0.3 if way == "takes too long" else None, retries=1))
        client = running.client
        jobs = [client.submit("work") for _ in range(4)]
        for _ in jobs:
            begun.get(timeout=PATIENCE_SECONDS)
        with locked(running.path):
            go.set()
            for _ in jobs:
                ended.get(timeout=PATIENCE_SECONDS)
            answers = [client.post("/job", {"job_type": "work", "api_key": "k"}).status for _ in range(2)]
            assert answers == [503, 503] and client.show(jobs[0])["job_id"]
            if way == "takes too long":
                eventually(lambda: time.time() > epoch_of(client.show(jobs[-1])["started_timestamp"]) + 0.4)
        for job in jobs:
            job = client.finish(job)
            assert (job["status"], job["data"], job["attempts"]) == (status, data, attempts)
            assert status == "complete" or "timeout" in job["error"]["message"]

    @pytest.mark.parametrize("path, job_type, status", [
        ("/job", "hold", "complete"), ("/job/own", "hold", "complete"), ("/job", "stream", "error")])
    def test_a_synchronous_job_that_the_disk_refuses_is_answered_503_and_recorded_later(
            self, start, gate, monkeypatch, path, job_type, status):
        monkeypatch.setattr(csp, "HOLD_SECONDS", 60.0)
        add_synchronous(gate)
        running = start(gate.registry)
        body = {"job_type": job_type, "api_key": "k"}
        if job_type == "hold":
            answer = Later(running.client.post, path, body)
            gate.begun.get(timeout=PATIENCE_SECONDS)
        with locked(running.path):
            gate.open.set()
            assert (answer.result() if job_type == "hold" else running.client.post(path, body)).status == 503
        stats = {"pending": 0, "complete": 0, "error": 0, status: 1}
        eventually(lambda: running.client.get("/status").json["stats"] == stats)

    @pytest.mark.parametrize("is_refused", [False, True], ids=["stored", "refused at first"])
    def test_a_synchronous_job_that_takes_long_is_shown_with_its_log_while_it_runs(self, start, is_refused):
        registry, begun, go = csp.Registry(), queue.Queue(), threading.Event()

        @registry.synchronous
        def work(task_id, input):
            logger = logger_of(task_id, input)
            logger.warning("begun")
            csp.util.set_progress(task_id, 0.5)
            begun.put("/job/" + task_id)
            assert go.wait(PATIENCE_SECONDS)
            logger.warning("ended")
            return "done"

        registry.asynchronous(named("other", lambda task_id, input: None))
        running = start(registry)
        client = running.client
        with locked(running.path) if is_refused else contextlib.nullcontext():
            answer = Later(client.submit, "work")
            path = begun.get(timeout=PATIENCE_SECONDS)
            if is_refused:
                assert client.post("/job", {"job_type": "other", "api_key": "k"}).status == 503
        eventually(lambda: client.get("/job").json["list"] == [path])
        eventually(lambda: messages(client.get(path, key=ADMIN).json) == ["begun"])
        eventually(lambda: client.get(path, key=ADMIN).json["progress"] == {"fraction": 0.5, "message": None})
        go.set()
        for job in (answer.result(), client.get(path, key=ADMIN).json):
            assert (job["status"], job["data"], messages(job)) == ("complete", "done", ["begun", "ended"])

    def test_a_disk_that_was_ill_at_the_start_delays_what_was_running(self, start, gate, monkeypatch):
        first = start(gate.registry)
        job = first.client.submit("wait", "x")
        gate.wait_for(job)
        first.stop(0.0)
        rows_of(first.path, "UPDATE jobs SET run_at = NULL")
        gate.open.set()

        def refuse(*arguments):
            raise csp.Unavailable("The database cannot be written now.")

        with monkeypatch.context() as ill:
            ill.setattr(csp.Store, "record_ending", refuse)
            client = start(gate.registry).client
            assert client.submit("quick", "y")["job_id"] and client.show(job)["status"] == "pending"
        assert client.finish(job)["data"] == "x"

    def test_a_job_that_logs_at_the_root_does_not_stop_the_writer(self, start, monkeypatch):
        monkeypatch.setattr(csp, "MAX_UNSTORED_CHARACTERS", 10_000)
        monkeypatch.setattr(logging.getLogger("csp"), "propagate", True)
        begun, go = threading.Event(), threading.Event()

        def work(task_id, input):
            logging.getLogger().addHandler(csp.StoringHandler(task_id, input))
            begun.set()
            assert go.wait(PATIENCE_SECONDS)
            for number in range(1000):
                logging.getLogger("test_csp.chatty").warning("line %d", number)

        running = start(registry_of(work))
        job = running.client.submit("work")
        assert begun.wait(PATIENCE_SECONDS)
        with locked(running.path):
            go.set()
            eventually(lambda: running.client.post("/job", {"job_type": "work", "api_key": "k"}).status == 503)
        assert running.client.finish(job)["status"] == "complete"

    def fail_once(self, monkeypatch, store, name, error):
        method, errors = getattr(store, name), [error]

        def fail_or_call(*arguments):
            if errors:
                raise errors.pop()
            return method(*arguments)

        monkeypatch.setattr(store, name, fail_or_call)
        return errors

    def test_a_delivered_callback_is_not_sent_again_while_the_disk_is_ill(self, service, receiver, monkeypatch):
        errors = self.fail_once(monkeypatch, service.service.store, "mark_callback", csp.Unavailable("Not now."))
        job = service.client.submit("async_echo", "x", result_url=receiver.url)
        callback_of(service.client, job, status="delivered")
        assert len(receiver.received) == 1 and not errors

    def test_an_outcome_that_cannot_be_stored_is_an_error(self, service, monkeypatch):
        self.fail_once(monkeypatch, service.service.store, "record_ending", MemoryError())
        ended = [service.client.finish(service.client.submit("async_echo", "x")) for _ in range(2)]
        assert ended[0]["error"] == {"message": "MemoryError"} and ended[1]["data"] == ">x"


class TestTrouble:
    """What must not be lost, repeated or held up when something goes wrong at a bad moment."""

    def test_a_synchronous_job_that_ends_soon_costs_one_commit(self, start, monkeypatch):
        running, texts = start(), ("hi", "&hi", ">hi", "#hi")
        monkeypatch.setattr(csp, "HOLD_SECONDS", 60.0)
        before = count_commits(running.path)
        jobs = [running.client.submit("echo", text, metadata={"a": 1}) for text in texts]
        assert count_commits(running.path) == before + 4
        shown = [running.client.show(job) for job in jobs]
        assert [job["status"] for job in shown] == ["complete", "complete", "error", "error"]
        assert [messages(job) for job in shown] == [[], ["just a warning"], [], []]
        assert running.client.get("/job?a=1").json["list"] == [f"/job/{job['job_id']}" for job in reversed(jobs)]
        assert running.client.get("/status").json["stats"] == {"pending": 0, "complete": 2, "error": 2}

    def test_a_large_synchronous_job_is_held_longer(self, start, monkeypatch):
        monkeypatch.setattr(csp, "HOLD_SECONDS_PER_CHARACTER", 60.0 / 2**21)
        registry, never = csp.Registry(), threading.Event()

        @registry.synchronous
        def slow(task_id, input):
            never.wait(10 * csp.HOLD_SECONDS)
            return len(input["data"])

        running = start(registry)
        counts = [count_commits(running.path)]
        for size in (2**21, 1):
            assert running.client.submit("slow", "x" * size)["data"] == size
            counts.append(count_commits(running.path))
        assert counts == [counts[0], counts[0] + 1, counts[0] + 3]

    def test_threads_take_turns_more_often_while_a_job_runs_for_long(self, launch):
        client = launch("""
            import sys
            import csp.job as job, csp.util as util

            @job.synchronous
            def interval(task_id, input):
                return sys.getswitchinterval()

            @job.asynchronous
            def compute(task_id, input):
                while True:
                    util.check_cancelled(task_id)
            """).client
        usual, short = map(pytest.approx, csp.SWITCH_SECONDS)
        assert client.submit("interval")["data"] == usual
        job = client.submit("compute")
        eventually(lambda: client.submit("interval")["data"] == short)
        client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"])
        eventually(lambda: client.submit("interval")["data"] == usual)

    @pytest.mark.parametrize("field, value", [
        ("lineno", 2**70), ("lineno", "x"), ("levelname", None), ("module", "\ud800")], ids=str)
    def test_a_log_record_of_any_shape_is_stored(self, desk, field, value):
        def work(task_id, input):
            record = logging.LogRecord("x", logging.INFO, "", 7, "a message", (), None)
            setattr(record, field, value)
            csp.StoringHandler(task_id, input).emit(record)
            return "done"

        job = desk.run(work)
        assert (job["data"], messages(job)) == ("done", ["a message"])

    def test_a_stream_that_another_thread_closes_ends_its_job(self, desk):
        desk.function = lambda task_id, input: lambda: iter(["a", "b", "c"])
        body = json.dumps({"job_type": "now", "api_key": "k"}).encode()
        response = desk.service.handle(csp.Request("POST", "/job/it", {"content-type": "application/json"}, body))
        in_threads(1, lambda _: response.body.close())
        assert show(desk.client, "it")["status"] == "error"

    def test_the_lock_dies_with_the_process_though_a_job_has_forked(self, launch):
        source = """
            import os, threading
            import csp.job as job

            @job.synchronous
            def fork(task_id, input):
                return os.fork() or threading.Event().wait(60) or os._exit(0)
            """
        process = launch(source)
        child = process.client.submit("fork")["data"]
        try:
            process.kill()
            assert launch(source).client.get("/status").status == 200
        finally:
            os.kill(child, signal.SIGKILL)

    def test_a_clock_that_was_set_back_while_the_service_was_down_makes_nobody_wait(
            self, start, receiver, monkeypatch):
        clock = Clock()
        clock.offset = 5000.0
        monkeypatch.setattr(csp, "time", clock)
        monkeypatch.setattr(csp, "RETRY_SECONDS", (1, 2, 3000))
        monkeypatch.setattr(csp, "BACKOFF_SECONDS", (2.0, 2.0))
        registry, begun = example_registry(), []

        @registry.asynchronous(retries=1)
        def twice(task_id, input):
            begun.append(task_id)
            if len(begun) == 1:
                raise ValueError("not yet")

        receiver.answers = lambda number: (200 if number > 1 else 500, {"Retry-After": "2"})
        first = start(registry)
        told = first.client.submit("async_echo", "x", result_url=receiver.url)
        retried = first.client.submit("twice")
        eventually(lambda: len(begun) == 1 and len(receiver.received) == 1)
        callback_of(first.client, told, attempts=1)
        first.stop()
        clock.offset = 0.0
        second = start(registry)
        assert second.client.finish(retried, 10)["attempts"] == 2
        receiver.wait(2)

    def test_a_restart_does_not_shorten_what_a_receiver_has_asked_for(self, start, receiver):
        receiver.answers = lambda number: (503, {"Retry-After": "3600"})
        first = start()
        job = first.client.submit("async_echo", "x", result_url=receiver.url)
        before = callback_of(first.client, job, attempts=1)["callback"]["next_attempt_timestamp"]
        first.stop()
        again = start()
        assert callback_of(again.client, job, attempts=1)["callback"]["next_attempt_timestamp"] == before

    @pytest.mark.parametrize("seconds", [300, 3600, 10**6], ids=str)
    def test_a_clock_that_is_set_back_delays_neither_retries_nor_callbacks_nor_new_jobs(
            self, start, receiver, monkeypatch, seconds):
        clock = Clock()
        monkeypatch.setattr(csp, "time", clock)
        registry, begun = example_registry(), []

        @registry.asynchronous(retries=1)
        def twice(task_id, input):
            begun.append(task_id)
            if len(begun) == 1:
                raise ValueError("not yet")

        receiver.answers = lambda number: (200 if number else 500, {})
        client = start(registry).client
        told = client.submit("async_echo", "x", result_url=receiver.url)
        retried = client.submit("twice")
        eventually(lambda: len(begun) == 1 and len(receiver.received) == 1)
        queued = client.submit("async_echo", "before")
        clock.offset -= seconds
        new = client.submit("async_echo", "after")
        assert [client.finish(job, 10)["status"] for job in (queued, new, retried)] == ["complete"] * 3
        assert callback_of(client, told, status="delivered")["error"] is None

    def test_a_callback_made_due_anew_is_not_ended_by_the_attempt_under_way(self, client, receiver):
        go = threading.Event()
        receiver.answers = lambda number: (200 if number else 410 if go.wait(PATIENCE_SECONDS) else 500, {})
        job = client.submit("async_echo", "x", result_url=receiver.url)
        receiver.wait(1)
        sent = client.post(f"/job/{job['job_id']}/callback", {"api_key": "a-new-key"}, key=job["job_key"])
        assert sent.json["callback"]["status"] == "pending"
        go.set()
        assert receiver.wait(2)[1][0]["Authorization"] == "a-new-key"
        callback_of(client, job, status="delivered")

    def test_a_field_of_blanks_is_parsed_in_no_time(self):
        head = b"GET / HTTP/1.1\r\nHost: a\r\nX:" + b" " * 65_000 + b"\x01"
        begun = time.thread_time()
        with pytest.raises(csp.CspError):
            csp.parse_head(head, csp.Settings({"MAX_HEADER_BYTES": 2**20}))
        assert time.thread_time() - begun < 1.0

    def test_a_body_that_is_announced_and_does_not_come_is_not_waited_for(self, start):
        url = start(BODY_SECONDS=1, BODY_BYTES_PER_SECOND=1).client.url  # no setting makes it faster

        def post(number):
            head = b"POST /job HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\nx"
            answer = raw_exchange(url, head % (1000, 2**22)[number], timeout=20.0)
            assert answer.startswith(b"HTTP/1.1 408 ")

        in_threads(2, post)

    @pytest.mark.parametrize("method, path, status", [
        ("GET", "/job/<job_id>", 404), ("DELETE", "/job/<job_id>", 404), ("GET", "/job/<job_id>/data", 404),
        ("PUT", "/job/<job_id>", 409), ("GET", "/job?_type=echo&_offset=9223372036854775807", 409),
        ("GET", "/job?" + "&".join(f"k{number}=1" for number in range(11)), 409),
        ("GET", "/job?" + "&".join(["k=1"] * 40), 200),
    ], ids=["get", "delete", "data", "put", "large offset", "many filters", "one filter often"])
    def test_an_odd_address_has_its_answer(self, client, method, path, status):
        assert client.request(method, path).status == status

    def test_asking_for_a_login_is_no_guess_of_a_password(self, client):
        for _ in range(2 * csp.FREE_FAILURES):
            assert client.get("/login").status == 401
        assert client.get("/login", key=ADMIN).status == 302

    def test_a_form_that_is_too_large_is_refused_before_it_is_taken_apart(self, client):
        answer = client.request("POST", "/login", "username=" + "%41" * 100_000, FORM)
        assert answer.status == 413 and "form" in answer.error

    def test_a_media_type_that_no_header_can_carry_is_not_used(self, client):
        job = client.submit("echo", "x", metadata={"mimetype": 'text/plain; a="\u20ac"'})
        answer = client.get(f"/job/{job['job_id']}/data", key=job["job_key"])
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")

    def test_a_link_of_another_site_signs_nobody_out(self, client):
        cookie = log_in(client)
        for site, is_admin in (("cross-site", True), ("same-origin", False)):
            client.get("/logout", Cookie=cookie, **{"Sec-Fetch-Site": site})
            assert (client.get("/user", Cookie=cookie).json["id"] == 0) == is_admin


DOCUMENTED_MODULE = """
import logging
import ckanserviceprovider.job as job
import ckanserviceprovider.util as util

@job.sync
def echo(task_id, input):
    handler = util.StoringHandler(task_id, input)
    logger = logging.getLogger(__name__)
    logger.addHandler(handler)

    if input['data'].startswith('>'):
        raise util.JobError('do not start message with >')
    if input['data'].startswith('#'):
        raise Exception('serious exception')
    if input['data'].startswith('&'):
        logger.warn('just a warning')
    return '>' + input['data']
"""

RUN_MODULE = """
import logging
import csp.job as job
import csp.util as util

@job.asynchronous
def work(task_id, input):
    logger = logging.getLogger(task_id)
    logger.addHandler(util.StoringHandler(task_id, input))
    logger.warning("at it")
    util.set_progress(task_id, 0.5, "half")
    util.check_cancelled(task_id)
    return input.get("data")

@job.asynchronous
def verdict(task_id, input):
    raise util.JobError("no such file")

@job.asynchronous
def broken(task_id, input):
    raise ValueError("oops")

@job.asynchronous
def no_json(task_id, input):
    return {1, 2}

@job.synchronous
def stream(task_id, input):
    return lambda: iter(["one ", b"two"])
"""
MODULES = {
    "jobs": RUN_MODULE, "same_names": RUN_MODULE, "broken_settings": "NAME = ",
    "broken_module": "def f(:", "failing_module": "nothing",
    "bad_option": "import csp.job as job\n\n@job.asynchronous(retires=3)\ndef x(a, b):\n    pass\n",
}

COMMON_LOG = re.compile(
    r"(\S+) - - \[(\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "
    r'"((?:[^"\\]|\\.)*)" (\d{3}) (\d+|-)(?: .*)?'
)


def assert_one_sentence(done, *words):
    """Check that a start was refused: exit code 2 and one line on stderr that holds the words."""
    assert done.returncode == 2, done
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("csp: ") and lines[0].endswith((".", "]", "'")), lines
    assert not [word for word in words if str(word) not in lines[0]], lines


@pytest.fixture
def command(tmp_path):
    """Return a function that runs ``python -m csp`` in tmp_path, where MODULES are."""
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)

    def run(*arguments, input=None, **environ):
        environ = {"PYTHONPATH": str(HERE), "PYTHONUTF8": "1", **environ}
        return run_command(*arguments, program=("-m", "csp"), cwd=tmp_path, input=input, environ=environ)

    return run


class TestCommandLine:
    """What people type, and what they get."""

    def test_openssl_is_loaded_when_it_is_needed_and_jobs_find_complete_modules(self, launch):
        client = launch("""
            import sys
            import csp.job as job
            loaded = sorted({"ssl", "_ssl", "http.client", "http.server"} & set(sys.modules))

            @job.synchronous
            def look(task_id, input):
                import http.server
                from http import client
                server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
                server.server_close()
                return [loaded, client.HTTPSConnection.__module__, server.socket.fileno()]
            """).client
        assert client.submit("look")["data"] == [[], "http.client", -1]

    def test_the_banner_says_what_runs_where_and_its_curl_line_works(self, launch, command, tmp_path):
        server = launch(DOCUMENTED_MODULE, "--name", "my jobs")
        text = "".join(server.banner)
        for line in (rf"my jobs \(csp.py {re.escape(csp.__version__)}\) at {server.url}", r"Job types: +echo",
                     rf"Database: +{re.escape(str(tmp_path / 'jobs.db'))}$", "Log in: +user admin, with"):
            assert re.search(f"^{line}", text, re.MULTILINE), text
        assert SETTINGS["PASSWORD"] not in text and SECURE_KEY not in text
        assert_one_sentence(command("--db", tmp_path / "jobs.db", "--port", "0"), server.process.pid)
        if not shutil.which("curl"):
            assert not IN_CI
            pytest.skip("there is no curl")
        line = server.banner[-1].partition("Try it:")[2].strip()
        done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
        job = json.loads(done.stdout.decode("utf-8"))
        assert (job["status"], job["data"]) == ("complete", ">hello")

    def test_a_password_is_made_and_printed_when_none_is_set_but_no_api_key_that_may_submit(self, launch):
        server = launch(DOCUMENTED_MODULE, environ={"CSP_PASSWORD": "", "CSP_API_KEYS": "the-only-key-that-may"})
        text = "".join(server.banner)
        password = re.search(r"user admin, password (\S+)", text)[1]
        assert len(password) >= 12 and password not in server.log.read_text()
        assert server.client.get("/user", key=basic("admin", password)).json["name"] == "Admin"
        assert server.client.get("/user", key=basic("admin", "")).json.get("name") != "Admin"
        assert "one of API_KEYS" in server.banner[-1] and "the-only-key" not in text

    def test_the_whole_job_that_the_readme_shows_runs(self, launch):
        (source,) = [block for block in re.findall("```python\n(.*?)```", README, re.DOTALL) if "JobError" in block]
        client = launch(source).client
        job = client.finish(client.submit("count", 3))
        assert (job["status"], job["data"], job["progress"]["message"]) == ("complete", {"counted": 3}, "2 counted")
        assert messages(job) == ["at 0", "at 1", "at 2"]
        assert client.finish(client.submit("count", "x"))["error"] == {"message": "data has to be a number"}

    def test_the_documented_example_runs_word_for_word(self, launch):
        client = launch(DOCUMENTED_MODULE).client
        hi, refused, failed, logged = (client.submit("echo", data) for data in ("hi", ">hi", "#", "&hi"))
        assert (hi["status"], hi["data"], hi["logs"]) == ("complete", ">hi", [])
        assert (refused["status"], refused["error"]) == ("error", {"message": "do not start message with >"})
        assert (failed["status"], failed["error"]["message"]) == ("error", "Exception: serious exception")
        assert [(line["message"], line["level"]) for line in logged["logs"]] == [("just a warning", "WARNING")]
        assert logged["data"] == ">&hi"

    def test_version_and_help_that_names_every_option(self, capsys):
        for option in ("--version", "--help"):
            with pytest.raises(SystemExit, match="^0$"):
                csp.main([option])
        version, _, text = capsys.readouterr().out.partition("\n")
        assert version == f"csp.py {csp.__version__}" and set(re.findall(r"--[a-z][a-z-]+", text)) >= {
            "--jobs", "--config", "--host", "--port", "--db", "--name", "--workers", "--log-file", "--version",
            "--hash-password", "--run"}

    def test_a_hash_of_a_password_from_standard_input_opens_the_service(self, start, command):
        done = command("--hash-password", input="open \u20ac sesame\n")
        hashed = done.stdout.strip()
        assert done.returncode == 0 and hashed.startswith("scrypt$") and "sesame" not in done.stdout + done.stderr
        client = start(PASSWORD=hashed).client
        assert client.get("/user", key=basic("admin", "open \u20ac sesame")).json["name"] == "Admin"
        assert client.get("/user", key=basic("admin", "open")).json["name"] != "Admin"
        assert_one_sentence(command("--hash-password", input=""), "empty")

    @pytest.mark.parametrize("arguments, text, code, output, errors", [
        (("work", '"hi"'), None, 0, "hi\n", ["WARNING", "at it"]),
        (("work", "-"), '{"a": [1, "\xe4"]}', 0, '{"a": [1, "\xe4"]}\n', ["at it"]),
        (("stream",), None, 0, "one two\n", []),
        (("verdict", "1"), None, 1, "", ["no such file"]),
        (("broken", "1"), None, 1, "", ["ValueError: oops", "Traceback", "line "]),
        (("no_json", "1"), None, 1, "", ["not JSON"]),
    ], ids=["string", "stdin", "stream", "JobError", "exception", "a set"])
    def test_run_runs_one_job_here_and_now(self, command, tmp_path, arguments, text, code, output, errors):
        done = command("--jobs", "jobs", "--run", *arguments, input=text)
        assert (done.returncode, done.stdout) == (code, output), done
        assert not [error for error in errors if error not in done.stderr]
        assert not list(tmp_path.glob("*.db*"))

    @pytest.mark.parametrize("arguments, words", [
        (["--run", "nothing"], ["broken, no_json, stream, verdict, work"]),
        (["--run", "work", "NaN"], ["JSON"]),
        (["--run", "work", "1", "2"], ["--run"]),
        (["--port", "abc"], ["PORT", "number"]),
        (["--db", "no/such/directory/jobs.db"], ["no/such/directory"]),
        (["CSP_GRACE_SECONDS=soon"], ["GRACE_SECONDS"]),
        (["--config", "broken_settings.py"], ["broken_settings.py"]),
        (["--log-file", "no/such/directory/log"], ["no/such/directory/log"]),
        (["--jobs", "no_such_module"], ["no_such_module"]),
        (["--jobs", "no/such/file.py"], ["file"]),
        (["--jobs", "broken_module"], ["broken_module", "syntax"]),
        (["--jobs", "failing_module"], ["failing_module", "NameError"]),
        (["--jobs", "bad_option"], ["retires", "bad_option.py, line 3"]),
        (["--jobs", "same_names"], ["work", "jobs", "same_names"]),
    ], ids=lambda value: " ".join(value)[:40])
    def test_what_is_wrong_at_the_start_is_one_sentence(self, command, arguments, words):
        environ = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        options = [] if environ else arguments
        options = [*options, *(() if "--db" in options else ("--db", "mine.db")),
                   *(() if "--port" in options else ("--port", "0"))]
        assert_one_sentence(command("--jobs", "jobs", *options, input="", **environ), *words)

    def test_a_port_in_use_is_one_sentence(self, command):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            assert_one_sentence(command("--port", port, "--db", "mine.db"), port, "--port")

    def test_jobs_names_modules_and_files(self, tmp_path):
        """In a package, beside each other, of one name, with odd names, and with a name of the standard library."""
        jobs = {"package.one": "one", "two": "two", "three.py": "three", "a/four.py": "a_four", "b/four.py": "b_four",
                "my-jobs.py": "my_jobs", "my.own.py": "my_own", "./queue.py": "queue"}
        for name, job_type in jobs.items():
            path = tmp_path / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"import csp.job as job\n\n@job.asynchronous\ndef {job_type}(task_id, input):\n    pass\n")
        (tmp_path / "package/__init__.py").touch()
        options = [word for name in jobs for word in ("--jobs", name)]
        done = run_command(*options, "--run", "nothing", cwd=tmp_path)
        assert_one_sentence(done, f"There is no job type nothing; there are: {', '.join(sorted(jobs.values()))}.")

    @pytest.mark.parametrize("text, environ, doubts", [
        ("PROT = 1\nWORKER = 2\nMY_OWN = 3\nDOWNLOAD_TIMEOUT = 4", {}, ["PROT", "WORKER"]),
        ("NAME = 'x'\nlower = 1", {"CSP_WORKRES": "3", "CSP_SOMETHING": "1", "CSP_NAME": "y"}, ["CSP_WORKRES"]),
        ('{"PORT": 8020}', {}, ["sets nothing"]),
    ], ids=["file", "environment", "json"])
    def test_names_that_are_nearly_settings_are_logged(self, tmp_path, text, environ, doubts):
        (tmp_path / "settings.py").write_text(text)
        settings = csp.load_settings(str(tmp_path / "settings.py"), environ)
        csp.configure_logging(csp.Settings({"LOG_FILE": str(tmp_path / "log"), "STDERR": False}, settings.doubts))
        csp.configure_logging(csp.Settings({"STDERR": False}))
        lines = (tmp_path / "log").read_text().splitlines()
        assert len(lines) == len(doubts)
        assert all(re.search(rf"WARNING .*\b{doubt}\b", line) for doubt, line in zip(doubts, lines))

    def test_settings_come_from_file_environment_and_command_line_and_jobs_can_read_them(self, launch, tmp_path):
        (tmp_path / "settings.py").write_text(
            "NAME = 'from file'\nMY_OWN = ['x']\nWORKERS = 3\nKEEP_JOBS_AGE = 4\nlower = 1\n")
        server = launch("""
            import csp.job as job
            from csp import web
            AT_IMPORT = {name: web.app.config[name] for name in ("NAME", "MY_OWN", "WORKERS", "KEEP_JOBS_AGE")}

            @job.synchronous
            def settings(task_id, input):
                return [AT_IMPORT, web.app.config["NAME"], "lower" in web.app.config, web.app.config.get("NO", 5)]
            """, "--workers", "7", environ={"JOB_CONFIG": str(tmp_path / "settings.py"), "CSP_KEEP_JOBS_AGE": "5",
                                            "CSP_WORKERS": "6"})
        assert server.client.get("/status").json["name"] == "from file"
        assert server.client.submit("settings")["data"] == [
            {"NAME": "from file", "MY_OWN": ["x"], "WORKERS": 7, "KEEP_JOBS_AGE": 5}, "from file", False, 5]

    def test_a_full_log_file_is_rotated_and_each_is_for_its_owner_alone(self, tmp_path):
        csp.configure_logging(csp.Settings({**SETTINGS, "LOG_FILE": str(tmp_path / "a.log")}))
        (handler,) = csp.log.handlers
        assert handler.maxBytes == 64 * 2**20 and handler.backupCount == 5
        handler.maxBytes = 1000
        for number in range(200):
            csp.log.warning("line %d", number)
        csp.log.warning("one\nline")
        csp.configure_logging(csp.Settings(SETTINGS))
        files = sorted(tmp_path.glob("a.log*"))
        assert len(files) == 6 and {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert (tmp_path / "a.log").read_text().endswith("one\\nline\n")

    def test_access_lines_are_in_common_log_format_without_secrets_in_an_owner_only_file(self, launch, tmp_path):
        server = launch(DOCUMENTED_MODULE, "--log-file", tmp_path / "service.log")
        job = server.client.submit("echo", "hi", api_key="the-api-key")
        server.client.get(f"/job/{job['job_id']}?limit=5&secret=in-the-query", key=job["job_key"])
        server.client.get("/user", key=ADMIN)
        server.client.get("/job", key=SECURE_KEY, Cookie="csp_session=in-the-cookie")
        for request in (b'GET /a"b\\c HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n', b"nonsense\r\n\r\n"):
            assert raw_exchange(server.url, request)
        assert server.terminate() == 0
        text = (tmp_path / "service.log").read_text()
        assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("service.log", "jobs.db")} == {0o600}
        lines = [COMMON_LOG.fullmatch(line) for line in text.splitlines() if " - - [" in line]
        assert len(lines) == 6 and all(lines), text
        for line in lines:
            assert line[1] == "127.0.0.1" and time.strptime(line[2], "%d/%b/%Y:%H:%M:%S %z")
        assert {line[3] for line in lines} >= {  # a line may come after the next request's
            "POST /job HTTP/1.1", f"GET /job/{job['job_id']} HTTP/1.1", "GET /user HTTP/1.1", "GET /job HTTP/1.1"}
        secrets = ("the-api-key", "in-the-query", "in-the-cookie", job["job_key"], SECURE_KEY, SETTINGS["PASSWORD"],
                   ADMIN.split()[1])
        assert not [secret for secret in secrets if secret in text + server.log.read_text()]


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def log_in(client):
    """Return the Cookie header of a new session."""
    return client.get("/login", key=ADMIN).headers["Set-Cookie"].partition(";")[0]


class TestResponses:
    """Routing and raw results."""

    @pytest.mark.parametrize("method, path, allowed", [
        ("POST", "/status", "GET, HEAD, OPTIONS"),
        ("PUT", "/job", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("PATCH", "/job/x", "DELETE, GET, HEAD, OPTIONS, POST, PUT"),
        ("GET", "/job/x/cancel", "OPTIONS, POST"),
    ])
    def test_a_wrong_method_is_405_and_says_which_are_right(self, desk, method, path, allowed):
        answer, options = desk.client.request(method, path), desk.client.request("OPTIONS", path)
        assert (answer.status, answer.headers["Allow"]) == (405, allowed) and isinstance(answer.error, str)
        assert (options.status, options.headers["Allow"], options.body) == (204, allowed, b"")

    @pytest.mark.parametrize("path", ["/nothing", "/job/x/nothing", "/job/x/data/y", "/statuss", "/JOB"])
    def test_an_unknown_path_is_404_in_json(self, desk, path):
        answer = desk.client.get(path)
        assert (answer.status, answer.headers["Content-Type"]) == (404, "application/json") and answer.error

    def test_head_is_get_without_the_body_and_a_trailing_slash_is_tolerated(self, desk):
        for path in ("/", "/status", "/user", "/job"):
            got, head = desk.client.get(path), desk.client.request("HEAD", path)
            assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(got.body)))
            assert desk.client.get(path.rstrip("/") + "/").json == got.json

    @pytest.mark.parametrize("result, metadata, body, kind, is_attachment", [
        ("text \u00e4", {}, "text \u00e4".encode(), "text/plain; charset=utf-8", False),
        ({"a": [1]}, {}, b'{"a": [1]}', "application/json", False),
        (None, {}, b"null", "application/json", False),
        (b"\x00\xff", {}, b"\x00\xff", "application/octet-stream", True),
        ("a,b", {"mimetype": "text/csv"}, b"a,b", "text/csv", False),
        (b"GIF8", {"mimetype": "image/gif"}, b"GIF8", "image/gif", False),
        ("<script>", {"mimetype": "text/html"}, b"<script>", "text/html", True),
        ("<svg/>", {"mimetype": "image/svg+xml"}, b"<svg/>", "image/svg+xml", True),
        ("x", {"mimetype": "application/javascript"}, b"x", "application/javascript", True),
        ("x", {"mimetype": "text/plain\r\nX: y"}, b"x", "text/plain; charset=utf-8", False),
        ("x", {"mimetype": "nonsense"}, b"x", "text/plain; charset=utf-8", False),
        ("x", {"mimetype": ["text/html"]}, b"x", "text/plain; charset=utf-8", False),
    ])
    def test_data_is_the_raw_result_and_harmless_to_a_browser(self, desk, result, metadata, body, kind, is_attachment):
        job = desk.run(lambda task_id, input: result, "now", metadata=metadata)
        answer = desk.client.get(f"/job/{job['job_id']}/data", key=ADMIN)
        assert (answer.status, answer.body, answer.headers["Content-Type"]) == (200, body, kind)
        assert (answer.headers.get("Content-Disposition") == "attachment") == is_attachment
        assert "sandbox" in answer.headers["Content-Security-Policy"]
        if isinstance(result, bytes):
            assert job["data"] == {"base64": base64.b64encode(result).decode()}

    def test_every_answer_has_the_headers_that_protect(self, desk):
        client = desk.client
        for answer in (client.get("/"), client.get("/nothing"), client.post("/job", {}), client.get("/login"),
                       client.request("OPTIONS", "/job")):
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Referrer-Policy"] == "no-referrer"
            assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["Server"] == "csp"

    @pytest.mark.parametrize("field, address", [
        ("1.2.3.5:1001", "1.2.3.5"), ("[2001:db8::1]:80", "2001:db8::1"), ("[2001:db8::1]", "2001:db8::1"),
        ("2001:DB8:0::1", "2001:db8::1"), (" 1.2.3.5 ", "1.2.3.5"), ("unknown", "10.0.0.1"), ("1.2.3.999", "10.0.0.1"),
        ("", "10.0.0.1"), ("9.9.9.9, x, 10.0.0.2", "10.0.0.2"), ("1.2.3.5:1:2", "10.0.0.1")])
    def test_forwarded_addresses_are_parsed_and_a_wrong_one_is_the_proxys(self, field, address):
        trust = csp.ProxyTrust(["10.0.0.0/8"])
        assert trust.identify("10.0.0.1", {"x-forwarded-for": field}) == (address, "http")

    def test_forwarded_fields_are_believed_from_trusted_proxies_only(self):
        trust = csp.ProxyTrust(["10.0.0.0/8"])
        headers = {"x-forwarded-for": "6.6.6.6, 192.0.2.7, 10.0.0.2", "x-forwarded-proto": "https"}
        assert trust.identify("10.0.0.1", headers) == ("192.0.2.7", "https")
        assert trust.identify("10.0.0.1", {"x-forwarded-proto": "https, http"})[1] == "https"
        assert trust.identify("192.0.2.9", headers) == ("192.0.2.9", "http")
        assert csp.ProxyTrust([]).identify("10.0.0.1", headers) == ("10.0.0.1", "http")
        assert trust.identify("10.0.0.1", {}) == ("10.0.0.1", "http")


@pytest.fixture(scope="class")
def doors():
    """A service whose endpoints do nothing, a session's cookie, and the token of a run; there is a job, "it"."""
    run = csp.RemoteRun("it", 1, 1, lambda run, is_log: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csp, "find_run", {"it": run}.get)
        for name in ("ROUTES", "CONSOLE_ROUTES"):
            patch.setattr(csp, name, [route._replace(endpoint=lambda *_: csp.Response(204), page=None)
                                      for route in getattr(csp, name)])
        service = csp.Service(csp.Settings({**SETTINGS, "SQLALCHEMY_DATABASE_URI": "sqlite://"}), csp.Registry())
        for job_id in ("it", "other"):
            add_job(service.store, job_id, job_key="key of " + job_id, status="complete", run_at=None)
        yield service, service.auth.begin_session(csp.Request("GET", "/"))[1].partition(";")[0], run.token
    service.close(0.0)


class TestAuth:
    """Logging in and out; who may use a route."""

    def test_a_password_may_be_a_hash(self, start):
        client = start(PASSWORD=cheap_hash("s\u00e9same")).client
        assert client.get("/login", key=basic("admin", "s\u00e9same")).status == 302
        assert client.get("/login", key=basic("admin", "sesame")).status == 401

    @pytest.mark.parametrize("settings", [{"PASSWORD": "scrypt$1$2"}, {"API_KEYS": ["scrypt$nonsense"]}], ids=str)
    def test_a_malformed_hash_stops_the_start(self, start, settings):
        with pytest.raises(csp.StartError, match=next(iter(settings))):
            start(**settings)

    def test_without_a_password_one_is_made(self, start):
        running = start(PASSWORD=None)
        password = running.service.auth.generated_password
        assert len(password) >= 16 and running.client.get("/login", key=basic("admin", password)).status == 302
        assert running.client.get("/login", key=basic("admin", "")).status == 401

    @pytest.mark.parametrize("key", [
        None, basic("admin", "wrong"), basic("Admin", SETTINGS["PASSWORD"]), basic("", ""), "Basic", "Basic !",
        "Basic " + base64.b64encode(b"admin").decode(), "Bearer x",
    ])
    def test_a_wrong_login_is_401(self, door, key):
        answer = door.client.get("/login", key=key)
        assert answer.status == 401 and answer.headers["WWW-Authenticate"] == 'Basic realm="Login Required"'
        assert "Set-Cookie" not in answer.headers

    def test_the_form_logs_in_and_logging_out_ends_the_session_on_the_server(self, door):
        client = door.client
        form = urllib.parse.urlencode({"username": "admin", "password": SETTINGS["PASSWORD"], "next": "/job?_limit=1"})
        answer = client.request("POST", "/login", form, FORM)
        assert (answer.status, answer.headers["Location"]) == (302, "/job?_limit=1")
        name, _, token = answer.headers["Set-Cookie"].partition(";")[0].partition("=")
        assert name == "csp_session" and len(token) >= 40
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(answer.headers["Set-Cookie"].split("; "))
        assert "Secure" not in answer.headers["Set-Cookie"]
        cookie = f"{name}={token}"
        admin = {"id": 0, "name": "Admin", "is_active": True, "is_anonymous": False}
        assert client.get("/user", Cookie=cookie).json == admin
        assert (session_hash(token),) in rows_of(door.path, "SELECT token_hash FROM sessions")
        out = client.get("/logout?next=/status", Cookie=cookie)
        assert (out.status, out.headers["Location"]) == (302, "/status") and "Max-Age=0" in out.headers["Set-Cookie"]
        assert client.get("/user", Cookie=cookie).json["name"] == "Anonymous"

    def test_behind_tls_the_cookie_is_secure_and_bound_to_the_host(self, door):
        client, https = door.client, {"X-Forwarded-Proto": "https"}
        cookie = client.get("/login", key=ADMIN, **https).headers["Set-Cookie"]
        assert cookie.startswith("__Host-csp_session=") and "; Secure" in cookie
        value = cookie.partition(";")[0]
        assert client.get("/user", Cookie=value, **https).json["id"] == 0
        assert client.get("/user", Cookie=value.replace("__Host-", "")).json["id"] == 0
        assert client.get("/user", Cookie=value.replace("__Host-", ""), **https).json["id"] is None

    @pytest.mark.parametrize("change, is_alive", [
        ("used_at = used_at - 3500", True), ("used_at = used_at - 3700", False),
        ("created_at = created_at - 43000", True), ("created_at = created_at - 43300", False),
    ])
    def test_a_session_ends_unused_and_after_its_time(self, door, change, is_alive):
        cookie = log_in(door.client)
        rows_of(door.path, "UPDATE sessions SET " + change)
        assert (door.client.get("/user", Cookie=cookie).json["id"] == 0) == is_alive

    def test_sessions_survive_a_restart_but_not_another_password(self, start):
        running = start()
        cookie = log_in(running.client)
        for settings, user_id in (({}, 0), ({"PASSWORD": "another battery horse staple"}, None)):
            running.stop()
            running = start(**settings)
            assert running.client.get("/user", Cookie=cookie).json["id"] == user_id

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_only_a_post_logs_in_by_form_or_submits_one(self, door, method):
        client, before = door.client, door.client.get("/job").json
        login = urllib.parse.urlencode({"username": "admin", "password": SETTINGS["PASSWORD"]})
        page = client.request(method, "/login", login, {**FORM, "Accept": BROWSER_ACCEPT})
        assert page.status == 200 and "Set-Cookie" not in page.headers
        assert client.request(method, "/login", login, FORM).status == 401
        headers = {**FORM, "Accept": BROWSER_ACCEPT, "Cookie": log_in(client), "Sec-Fetch-Site": "cross-site"}
        fields = urllib.parse.urlencode({"job_type": "echo", "api_key": "k", "data": "1"})
        assert client.request(method, "/console/submit", fields, headers).status == 200
        assert client.get("/job").json == before

    def test_each_login_has_a_token_of_its_own_and_none_of_the_clients_choosing(self, door):
        client, chosen = door.client, "csp_session=" + "a" * 43
        tokens = {client.get("/login", key=ADMIN, Cookie=chosen).headers["Set-Cookie"].partition(";")[0]
                  for _ in range(3)}
        assert len(tokens) == 3 and chosen not in tokens
        assert client.get("/user", Cookie=chosen).json["id"] is None

    @pytest.mark.parametrize("target", [
        "//evil", "/\\evil", "\\\\evil", "https:evil", "https://evil", "evil", "/\t/evil", "/\x00", "/a\r\nX: y",
        "javascript:x", "", "/\u00e4", " //evil", "///evil", "/%0d\\x",
    ])
    def test_next_stays_on_this_service(self, door, target):
        for path in ("/login?next=", "/logout?next="):
            answer = door.client.get(path + urllib.parse.quote(target), key=ADMIN)
            assert (answer.status, answer.headers["Location"]) == (302, "/user")

    def test_an_unknown_user_takes_as_long_as_a_wrong_password(self):
        auth = csp.Authenticator(None, csp.Settings({"PASSWORD": csp.hash_password("x" * 12)}))
        times = {"admin": [], "nobody": []}
        for number in range(5):
            for username in times:
                began = time.thread_time()
                assert not auth.is_login(username, "wrong", f"192.0.2.{number}")
                times[username].append(time.thread_time() - began)
        assert 0.5 < min(times["admin"]) / min(times["nobody"]) < 2.0

    CALLERS = {  # what each sends, and as whom Route.access names it, if at all
        "nobody": ({}, None), "nothing": ({"authorization": ""}, None), "wrong key": ({"authorization": "x"}, None),
        "another job's key": ({"authorization": "key of other"}, None),
        "bearer of the key": ({"authorization": "Bearer key of it"}, None),
        "wrong basic": ({"authorization": basic("admin", "x")}, None),
        "tampered session": ({"cookie": "{session}x"}, None), "session": ({"cookie": "{session}"}, "admin"),
        "key": ({"authorization": "key of it"}, "job key"),
        "key in a cookie": ({"cookie": "a=b; csp_job_key=key of it"}, "job key"),
        "secure key": ({"authorization": SECURE_KEY}, "secure key"), "basic": ({"authorization": ADMIN}, "admin"),
        "token": ({"authorization": "{token}"}, "token of the run"),
    }
    ORIGINS = {  # and whether that is a page of this service; None: no browser says so
        "no browser": ({}, None), "same": ({"sec-fetch-site": "same-origin"}, True),
        "address bar": ({"sec-fetch-site": "none"}, True), "same by origin": ({"origin": "http://jobs.example"}, True),
        "other": ({"sec-fetch-site": "cross-site", "origin": "http://jobs.example"}, False),
        "same site": ({"sec-fetch-site": "same-site"}, False), "other by origin": ({"origin": "http://evil"}, False),
        "null": ({"origin": "null"}, False),
    }

    @pytest.mark.parametrize("origin", ORIGINS)
    @pytest.mark.parametrize("caller", CALLERS)
    def test_a_route_is_open_to_those_whom_its_access_names(self, doors, caller, origin):
        service, session, token = doors
        (credentials, name), (fields, is_same) = self.CALLERS[caller], self.ORIGINS[origin]
        headers = {"host": "jobs.example", **fields, **{
            field: value.format(session=session, token=token) for field, value in credentials.items()}}
        is_believed = {"session": is_same is True, "key in a cookie": is_same is True, "basic": is_same is not False}
        for route in (*csp.ROUTES, *csp.CONSOLE_ROUTES):
            address = str(uuid.uuid4())  # which has guessed no password
            answer = service.handle(csp.Request(
                route.method, route.path.replace("<job_id>", "it"), headers, b"", address))
            is_open = route.access.startswith("all") or (
                name in route.access.split(", ") and (route.method == "GET" or is_believed.get(caller, True)))
            assert answer.status == (204 if is_open else 403), (route.method, route.path)
            assert is_open or answer.body == b'{"error": "not authorized"}'

    def test_everybody_may_use_only_these_routes(self):
        routes = (*csp.ROUTES, *csp.CONSOLE_ROUTES)
        assert {f"{route.method} {route.path}" for route in routes if route.access.startswith("all")} == {
            "GET /", "GET /status", "GET /events", "GET /metrics", "GET /openapi.json", "GET /user", "GET /login",
            "POST /login", "GET /logout", "POST /logout", "GET /job", "POST /job", "POST /job/<job_id>",
            "PUT /job/<job_id>", "POST /job/<job_id>/key", f"GET {csp.STYLE_PATH}", f"GET {csp.SCRIPT_PATH}"}
        assert {route.path for route in routes if route.access == csp.ADMIN} == {
            "/job", "/console/submit", "/console/selection", "/console/clear"}


def submission(**more):
    return {"job_type": "echo", "api_key": "k", **more}


NOT_JSON = "Not recognised as json, make sure content type is application/json"
REFUSALS = [  # body or raw text, headers, sentence
    ("{", {}, "Malformed json"),
    ('{"a": 1,}', {}, "Malformed json"),
    (b"\xff", {}, "Malformed json"),
    ("{", {"Content-Type": "text/plain"}, NOT_JSON),
    (submission(), {"Content-Type": "text/plain"}, NOT_JSON),
    (submission(), {"Content-Type": ""}, NOT_JSON),
    ("", {}, NOT_JSON),
    ("[]", {}, NOT_JSON),
    ("null", {}, NOT_JSON),
    ('"x"', {}, NOT_JSON),
    ({"b": 1, "a": 1, "result_url": "x"}, {}, "Too many arguments. Extra keys are a, b"),
    ({"result_url": "ftp://a"}, {}, "result_url has to start with http"),
    (submission(result_url="example.org"), {}, "result_url has to start with http"),
    ({}, {}, "Please specify a job type"),
    ({"job_type": "", "api_key": ""}, {}, "Please specify a job type"),
    ({"job_type": "x"}, {}, "Job type x not available. Available job types are async_echo, echo"),
    (submission(job_type=["x"]), {}, "Job type ['x'] not available. Available job types are async_echo, echo"),
    ({"job_type": "echo", "metadata": []}, {}, "Please provide your API key."),
    (submission(api_key=None), {}, "Please provide your API key."),
    (submission(api_key=""), {}, "Please provide your API key."),
    (submission(metadata=[]), {}, "metadata has to be a json object"),
    (submission(metadata="x"), {}, "metadata has to be a json object"),
    (submission(api_key=["k"]), {}, "api_key has to be a string or a number of at most 64 bits"),
    (submission(api_key=2**70), {}, "api_key has to be a string or a number of at most 64 bits"),
    ('{"job_type": "echo", "api_key": "k", "data": NaN}', {}, "Malformed json: NaN is not JSON"),
    ('{"job_type": "echo", "api_key": "k", "data": 1e999}', {}, "Malformed json: a number in it is not finite"),
    ('{"job_type": "echo", "job_type": "x"}', {}, "Malformed json: an object has the same key twice"),
    ('{"job_type": "echo", "api_key": "k", "data": "\\ud800"}', {}, "Malformed json"),
    ('{"data": ' + "[" * 100_000 + "}", {}, "Malformed json: nested deeper than 100"),
]


def posted(url, head="POST /job/s HTTP/1.1\r\nHost: a\r\nConnection: close", job_type="now"):
    """Return the bytes that answer a submission, and those of its streamed result."""
    body = json.dumps({"job_type": job_type, "api_key": "k"}).encode()
    head += f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return raw_exchange(url, head.encode() + body)


@contextlib.contextmanager
def streaming(desk, job_id, parts):
    """Give the response to a submission whose result is what iterating ``parts()`` yields."""
    desk.function = lambda task_id, input: parts
    connection = http.client.HTTPConnection("127.0.0.1", desk.server.server_port, timeout=PATIENCE_SECONDS)
    with contextlib.closing(connection):
        body = json.dumps({"job_type": "now", "api_key": "k"}).encode()
        connection.request("POST", f"/job/{job_id}", body, {"Content-Type": "application/json"})
        yield connection.getresponse()


@pytest.fixture(scope="class")
def shared(tmp_path_factory):
    """A service with ``example_registry()`` for all tests of a class: whoever counts its jobs starts another."""
    service = RunningService(tmp_path_factory.mktemp("shared") / "jobs.db", example_registry())
    yield service
    service.stop()


class TestService:
    """The documented routes."""

    @pytest.fixture
    def client(self, shared):
        return shared.client

    def test_what_the_service_says_of_itself(self, start):
        client = start().client
        assert set(client.get("/").json) == {"help"}
        assert client.get("/status").json == {
            "version": 0.1, "job_types": ["async_echo", "echo"], "name": "tests",
            "stats": {"pending": 0, "complete": 0, "error": 0},
        }
        assert b'"version": 0.1' in client.get("/status").body
        assert client.get("/user").json == {"id": None, "name": "Anonymous", "is_active": False, "is_anonymous": True}

    @pytest.mark.parametrize(
        "body, headers, sentence", REFUSALS, ids=[f"{row[2][:30]} {index}" for index, row in enumerate(REFUSALS)]
    )
    def test_a_refused_submission_gets_its_sentence(self, client, body, headers, sentence):
        text, before = json.dumps(body) if isinstance(body, dict) else body, client.get("/job").json
        answer = client.request("POST", "/job", text, {"Content-Type": "application/json", **headers})
        assert (answer.status, answer.error) == (409, sentence)
        assert client.get("/job").json == before

    def test_malformed_json_says_where(self, client):
        answer = client.request("POST", "/job", '{"a":\n  x}', {"Content-Type": "application/json"})
        assert answer.json["error"] == "Malformed json" and "line 2 column 3" in answer.json["detail"]

    @pytest.mark.parametrize(
        "kind", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"]
    )
    def test_content_types_that_are_json(self, client, kind):
        answer = client.request("POST", "/job", json.dumps(submission(data="x")), {"Content-Type": kind})
        assert answer.status == 200 and answer.json["data"] == ">x"

    def test_an_id_that_cannot_be_is_refused(self, client):
        for job_id in ("a/b", "a\x00b", "\x1f", "x" * 256, "..", "."):
            for answer in (client.post("/job/" + urllib.parse.quote(job_id, safe=""), submission()),
                           put(client, job_id, submission())):
                assert answer.status == 409 and "job_id has to be" in answer.error

    @pytest.mark.parametrize(
        "job_id", ["a", "x" * 255, "with space", "\u00e4\u20ac", "a?b#c%d", "'\"<script>", "status"]
    )
    def test_an_id_may_be_chosen_once(self, client, job_id):
        job = client.submit("echo", "hi", job_id=job_id)
        assert job["job_id"] == job_id and client.show(job)["data"] == ">hi"
        answer = client.post("/job/" + urllib.parse.quote(job_id, safe=""), submission())
        assert (answer.status, answer.error) == (409, f"job_id {job_id} already exists")
        path = client.get("/job").json["list"][0]
        assert client.get(path, key=job["job_key"]).json["job_id"] == job_id

    def test_the_four_messages_of_the_documentation(self, client):
        jobs = [client.submit("echo", data) for data in ("hi", ">hi", "#", "&hi")]
        assert [(job["status"], job["data"]) for job in jobs] == [
            ("complete", ">hi"), ("error", None), ("error", None), ("complete", ">&hi"),
        ]
        assert jobs[1]["error"] == {"message": "do not start message with >"}
        assert jobs[2]["error"]["message"] == "Exception: serious exception"
        assert "Traceback" in jobs[2]["error"]["traceback"]
        assert [[line["message"] for line in job["logs"]] for job in jobs] == [[], [], [], ["just a warning"]]
        assert [client.get(f"/job/{job['job_id']}", key=job["job_key"]).status for job in jobs] == [200] * 4

    def test_what_the_function_gets(self, desk):
        seen = []
        for more in ({}, {"data": None}, {"data": {"a": 1}, "metadata": {}}, {"metadata": {"x": [1]}, "api_key": 12.5}):
            for job_type in ("later", "now"):
                desk.function = lambda task_id, input: seen.append((task_id, input))
                body = {"job_type": job_type, "api_key": "k", **more}
                job = desk.client.finish(desk.client.post("/job", body).json)
                assert seen.pop() == (job["job_id"], body)
                assert job["sent_data"] == (more.get("data") or {})

    @pytest.mark.parametrize("path, method, schemes", [
        ("/job", "post", []), ("/job/{job_id}/cancel", "post", ["key", "basic", "session"]),
        ("/job/{job_id}/report", "post", ["key"])])
    def test_the_api_description_says_what_opens_a_route(self, client, path, method, schemes):
        operation = client.get("/openapi.json").json["paths"][path][method]
        assert [name for scheme in operation.get("security", []) for name in scheme] == schemes

    def test_an_unknown_job_is_404(self, client):
        for method, path in (
            ("GET", "/job/x"), ("GET", "/job/x/data"), ("DELETE", "/job/x"), ("POST", "/job/x/cancel"),
        ):
            answer = client.request(method, path, headers={"Authorization": SECURE_KEY})
            assert (answer.status, answer.json) == (404, {"error": "job_id not found"})

    def test_a_list_that_is_not_public(self, start):
        client = start(PUBLIC_JOB_LIST=False).client
        assert [client.get("/job", key=key).status for key in (None, "x", ADMIN, SECURE_KEY)] == [403, 403, 200, 200]

    def test_listing_filters_and_pages(self, start):
        client = start().client
        jobs = [
            client.submit(
                "echo", ">" if number % 3 == 0 else "x", job_id=f"j{number}",
                metadata={"parity": number % 2, "kind": "k" if number < 5 else "l", "set": [1]},
            )
            for number in range(10)
        ]

        def listed(parameters):
            answer = client.get("/job?" + parameters)
            assert answer.status == 200
            return [path.rpartition("/j")[2] for path in answer.json["list"]]

        assert listed("") == list("9876543210") and len(jobs) == 10
        assert listed("_limit=3") == list("987") and listed("_limit=3&_offset=8") == list("10")
        assert listed("_limit=0") == []
        assert listed("_status=error") == list("9630") and listed("_status=pending") == [] == listed("_status=x")
        assert listed("parity=1") == list("97531") and listed("parity=1&kind=k") == list("31")
        assert listed("parity=1&kind=k&_status=error") == ["3"]
        assert listed("set=[1]") == listed("") and listed("set=1") == []
        assert listed("parity=1&parity=0") == [] and listed("nothing=x") == [] and listed("parity=") == []

    def test_next_leads_through_all_pages(self, start):
        client = start().client
        for _ in range(7):
            client.submit("echo", "x", metadata={"a": "1"})
        for path in ("/job?_limit=3", "/job?a=1&_limit=3&_status=complete", "/job?_limit=2&_offset=1"):
            seen, step = [], path
            while step:
                answer = client.get(step)
                seen += answer.json["list"]
                link = answer.headers["Link"]
                step = link and re.fullmatch('<(.+)>; rel="next"', link)[1]
            assert len(seen) == len(set(seen)) == (6 if "_offset" in path else 7)
            assert seen == client.get("/job").json["list"][-len(seen) :]

    def test_a_bad_number_is_409(self, client):
        for name in ("_limit", "_offset", "_before", "days"):
            for value in ("abc", "-1", "1.5", "", "+1", "1e9", "99999999999999999999", "\u0661"):
                path = f"/job?{name}={urllib.parse.quote(value)}"
                answer = client.delete(path, key=ADMIN) if name == "days" else client.get(path)
                assert answer.status == 409 and f"{name} has to be a whole number" in answer.error, path
        assert client.delete("/job?days=36501", key=ADMIN).status == 409

    def test_clearing_old_jobs(self, start):
        service = start()
        client = service.client
        jobs = [client.submit("echo", "&x", metadata={"a": 1}) for _ in range(4)]
        with contextlib.closing(sqlite3.connect(str(service.path))) as connection, connection:
            for job, days in zip(jobs, (11, 9, 3, 0)):
                moment = csp.timestamp(time.time() - days * 86_400)
                connection.execute("UPDATE jobs SET finished_timestamp = ? WHERE job_id = ?", (moment, job["job_id"]))
        for wrong in ("day=365", "days=365&keep=1", "Days=365"):
            answer = client.delete(f"/job?{wrong}", key=ADMIN)
            assert (answer.status, answer.json["error"][:28]) == (409, "Clearing jobs takes days and")
        assert client.delete("/job", key=ADMIN).json == {"success": True, "deleted": 1}
        assert client.delete("/job?days=5", key=SECURE_KEY).json == {"success": True, "deleted": 1}
        assert client.delete("/job?days=0", key=SECURE_KEY).json == {"success": True, "deleted": 2}
        assert client.get("/status").json["stats"] == {"pending": 0, "complete": 0, "error": 0}
        assert rows_of(service.path, "SELECT (SELECT count(*) FROM logs) + (SELECT count(*) FROM metadata)") == [(0,)]

    def test_the_log_of_a_job_and_its_newest_lines(self, desk):
        def talk(task_id, input):
            logger = logger_of(task_id, input)
            for number in range(5):
                logger.warning("line %d", number)

        client, job = desk.client, None
        desk.function = talk
        job = client.submit("now")
        assert [line["message"] for line in client.show(job)["logs"]] == [f"line {number}" for number in range(5)]
        for limit, expected in (
            ("2", ["line 4", "line 3"]), ("0", []), ("99", [f"line {n}" for n in range(4, -1, -1)]),
        ):
            logs = client.get(f"/job/{job['job_id']}?limit={limit}", key=job["job_key"]).json["logs"]
            assert [line["message"] for line in logs] == expected
        assert client.get(f"/job/{job['job_id']}?limit=x", key=job["job_key"]).status == 409
        for line in client.show(job)["logs"]:
            time.mktime(time.strptime(line["timestamp"], "%Y-%m-%dT%H:%M:%S.%f"))

    def test_the_data_of_a_job_that_failed_or_runs(self, start, gate):
        client = start(gate.registry).client
        failed, waiting = client.submit("fail"), client.submit("wait")
        client.finish(failed)
        answers = [client.get(f"/job/{job['job_id']}/data", key=job["job_key"]) for job in (failed, waiting)]
        assert [answer.status for answer in answers] == [409, 409]
        assert answers[0].json == {"error": {"message": "it failed"}}
        assert "not finished" in answers[1].error

    def test_a_streamed_result_arrives_as_it_is_made(self, desk):
        gate = threading.Event()

        def parts():
            yield '["first"'
            assert gate.wait(PATIENCE_SECONDS)
            yield b', "second"]'

        with streaming(desk, "made", parts) as response:
            assert response.headers["Content-Type"] == "application/json" and response.read(8) == b'["first"'
            gate.set()
            assert json.loads(b'["first"' + response.read()) == ["first", "second"]
        assert show(desk.client, "made")["status"] == "complete"
        old = posted(desk.server.url, "POST /job HTTP/1.0")
        assert old.endswith(b'\r\n\r\n["first", "second"]') and b"chunked" not in old

    def test_a_job_that_is_cancelled_while_it_streams_is_an_error_that_says_so(self, desk):
        def parts():
            yield "first"
            while True:
                csp.util.check_cancelled("told")
                yield "more"

        with streaming(desk, "told", parts) as response:
            assert response.read(5) == b"first"
            assert desk.client.post("/job/told/cancel", key=SECURE_KEY).status == 200
            with pytest.raises(http.client.IncompleteRead):
                response.read()
        assert eventually(lambda: finished(desk.client, "told"))["error"] == {"message": "cancelled"}

    @pytest.mark.parametrize("is_begun", [False, True])
    def test_a_stream_that_takes_longer_than_its_timeout_is_an_error_that_says_so(self, start, is_begun):
        gate = threading.Event()

        def stream(task_id, input):
            def parts():
                if is_begun:
                    logger_of(task_id, input).warning("first")
                    yield "first"
                gate.wait(PATIENCE_SECONDS)
                yield "last"

            return parts

        registry = csp.Registry()
        registry.synchronous(timeout=0.3)(stream)
        running = start(registry)
        answer = posted(running.server.url, job_type="stream")
        assert (b"first" in answer) == is_begun and b"last" not in answer
        job = show(running.client, "s")
        assert job["error"] == {"message": "The job took longer than its timeout of 0.3 seconds."}
        assert messages(job) == ["first"] * is_begun
        gate.set()

    @pytest.mark.parametrize(
        "parts, is_begun",
        [([ValueError("x")], False), (["a", csp.JobError("x")], True), ([5], False), (["a", SystemExit(1)], True)],
    )
    def test_a_stream_that_breaks_off_is_an_error_of_the_job(self, desk, parts, is_begun):
        def generate():
            for part in parts:
                if isinstance(part, BaseException):
                    raise part
                yield part

        desk.function = lambda task_id, input: generate
        answer = posted(desk.server.url, "POST /job HTTP/1.1\r\nHost: a\r\nConnection: close")
        assert answer.startswith(b"HTTP/1.1 200 ") and not answer.endswith(b"0\r\n\r\n")
        assert (b"chunked" in answer) == is_begun
        job = show(desk.client, desk.client.get("/job").json["list"][0].rpartition("/")[2])
        assert job["status"] == "error" and job["error"]["message"]

    def test_a_client_that_leaves_a_stream_ends_its_job(self, desk):
        with streaming(desk, "left", lambda: iter(lambda: "x" * 10_000, None)) as response:
            response.read(1000)
            response.close()
        assert "client went away" in eventually(lambda: finished(desk.client, "left"))["error"]["message"]

    def test_jobs_cannot_break_the_service(self, start, capfd):
        registry = example_registry()

        def endless_log(task_id, input):
            logger = logger_of(task_id, input)
            for _ in range(1_000):
                logger.warning("x" * 100)
            logger.warning("y" * 1_000_000)

        def starts_threads(task_id, input):
            for _ in range(20):
                threading.Thread(target=lambda: None).start()

        def changes_input(task_id, input):
            input.clear()

        def interrupted(task_id, input):
            raise KeyboardInterrupt

        def deep(task_id, input):
            return deep(task_id, input)

        misdeeds = {
            "exits": lambda task_id, input: sys.exit(), "interrupted": interrupted, "endless_log": endless_log,
            "starts_threads": starts_threads, "changes_input": changes_input, "a_set": lambda task_id, input: {1},
            "large": lambda task_id, input: "x" * 10_000_000, "deep": lambda task_id, input: deep(task_id, input),
            "prints": lambda task_id, input: print("x" * 1_000_000),
        }
        for name, function in misdeeds.items():
            registry.asynchronous(lambda_named(name, function))
            registry.synchronous(lambda_named(name + "_now", function))
        client = start(registry, WORKERS=1).client
        ended = {name: client.finish(client.submit(name)) for name in misdeeds}
        now = {name: client.submit(name + "_now") for name in misdeeds}
        for jobs in (ended, now):
            assert {name for name, job in jobs.items() if job["status"] == "complete"} == {
                "endless_log", "starts_threads", "changes_input", "large", "prints",
            }
            assert "not JSON" in jobs["a_set"]["error"]["message"]
            assert jobs["deep"]["error"]["message"].startswith("RecursionError")
            assert len(jobs["endless_log"]["logs"]) == 1_001
            assert jobs["endless_log"]["logs"][-1]["message"].endswith("(cut: 1,000,000 characters)")
        assert client.submit("echo", "hi")["data"] == ">hi"


class Later:
    """What a function returns that is called in a thread of its own: ``result()``, ``is_done``."""

    def __init__(self, function, *arguments, **options):
        self.is_done, self._answer = False, queue.Queue()

        def call():
            try:
                answer = (function(*arguments, **options), None)
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                answer = (None, error)
            self.is_done = True
            self._answer.put(answer)

        threading.Thread(target=call, daemon=True).start()

    def result(self):
        value, error = self._answer.get(timeout=PATIENCE_SECONDS)
        if error is not None:
            raise error
        return value


def watched(service, job_id, count=1):
    """Return when that many threads of the service wait for the job."""
    eventually(lambda: service.service.store.count_watchers(job_id) >= count)


def put(client, job_id, body, **headers):
    """PUT a submission, an object or a text; return the Answer."""
    text = body if isinstance(body, str) else json.dumps(body)
    path = "/job/" + urllib.parse.quote(job_id, safe="")
    return client.request("PUT", path, text, {"Content-Type": "application/json", **headers})


def add_synchronous(gate):
    """Add synchronous types to a Gate's: ``hold`` is held like its ``wait``, ``stream`` and ``raw`` stream a result."""

    @gate.registry.synchronous
    def hold(task_id, input):
        gate.begun.put(task_id)
        assert gate.open.wait(PATIENCE_SECONDS)
        return input.get("data")

    @gate.registry.synchronous
    def stream(task_id, input):
        return lambda: iter(["one ", b"two ", "\u00e4"])

    @gate.registry.synchronous
    def raw(task_id, input):
        return lambda: iter([b"\xff\x00", "a", b"\xfe"])


@pytest.fixture(scope="class")
def ended():
    """A service with a finished job "x"."""
    service = RunningService(None, example_registry(), MAX_WAIT_SECONDS=20)
    service.client.submit("echo", job_id="x")
    yield service
    service.stop()


class TestWaiting:
    """Prefer (RFC 7240), and PUT, which may be repeated."""

    @pytest.fixture
    def held(self, start, gate):
        """A service with the types of ``gate`` and the synchronous ones."""
        add_synchronous(gate)
        return start(gate.registry, MAX_WAIT_SECONDS=20)

    ASK = {  # how to ask for a job, and whether the answer is the job with its key
        "POST": (lambda client, job, body, **more: client.post("/job/" + job["job_id"], body, **more), True),
        **dict.fromkeys(("PUT", "PUT again"), (
            lambda client, job, body, **more: put(client, job["job_id"], body, **more), True)),
        "GET": (lambda client, job, body, **more: client.get("/job/" + job["job_id"], job["job_key"], **more), False),
        "data": (lambda client, job, body, **more:
                 client.get(f"/job/{job['job_id']}/data", job["job_key"], **more), None),
    }

    def begin(self, client, way, body, job_id="x", **headers):
        """Return the job to ask for: it is there already, but for the ways that submit it."""
        return {"job_id": job_id} if way in ("POST", "PUT") else put(client, job_id, body, **headers).json

    @pytest.mark.parametrize("way", ASK)
    def test_the_answer_comes_when_the_job_has_finished(self, held, gate, way):
        ask, has_key = self.ASK[way]
        body = {"job_type": "wait", "api_key": "secret-api-key", "data": ["\u00e4", 1]}
        job = self.begin(held.client, way, body)
        asked = Later(ask, held.client, job, body, Prefer="wait=20")
        watched(held, "x")
        gate.begun.get(timeout=PATIENCE_SECONDS)
        assert not asked.is_done
        gate.open.set()
        answer = asked.result()
        assert answer.status == 200 and answer.headers["Preference-Applied"] == "wait=20"
        if way == "data":
            assert answer.json == ["\u00e4", 1]
        else:
            assert (answer.json["status"], answer.json["data"], answer.json["job_id"]) == (
                "complete", ["\u00e4", 1], "x",
            )
            assert ("job_key" in answer.json) == has_key and answer.json["finished_timestamp"]
        eventually(lambda: not held.service.store.count_watchers("x"))

    def test_max_wait_seconds_is_the_longest(self, start, gate):
        client, body, began = start(gate.registry, MAX_WAIT_SECONDS=1).client, {"job_type": "wait", "api_key": "k"}, {}
        asked = {}
        for number, (way, (ask, _)) in enumerate(self.ASK.items()):
            job = self.begin(client, way, body, f"x{number}")
            began[way] = time.monotonic()
            asked[way] = Later(ask, client, job, body, Prefer="wait=999999999")
        for way, later in asked.items():
            answer = later.result()
            assert 0.95 < time.monotonic() - began[way] < 10
            assert answer.headers["Preference-Applied"] == "wait=1"
            if way == "data":
                assert (answer.status, answer.error) == (409, "job x4 has not finished yet")
            else:
                assert (answer.status, answer.json["status"], answer.json["finished_timestamp"]) == (
                    200, "pending", None)

    @pytest.mark.parametrize(
        "fields, applied",
        [
            (["wait=7"], "wait=7"), (["WAIT=7"], "wait=7"), (["wait=007"], "wait=7"), (['wait="7"'], "wait=7"),
            ([" wait = 7 "], "wait=7"), (["wait=7; a=b"], "wait=7"), (["handling=lenient, wait=7"], "wait=7"),
            (["handling=lenient", "wait=7"], "wait=7"), (["wait=7", "wait=9"], "wait=7"),
            (["wait=7, wait=9"], "wait=7"), (["return=minimal;x, , ;,=,wait=7"], "wait=7"), (["wait=0"], "wait=0"),
            (["wait=21"], "wait=20"), (["wait"], None), (["wait="], None), (["wait=-1"], None), (["wait=+1"], None),
            (["wait=1.5"], None), (["wait=1e1"], None), (["wait=0x1"], None), (["wait=\xb2"], None),
            (["wait=9999999999"], None), (["wait=soon, wait=7"], None), (["waits=7"], None), (["a;wait=7"], None),
            ([""], None), ([","], None), (['a="b, wait=7"'], None),
        ],
        ids=str,
    )
    def test_what_is_no_preference_is_ignored(self, ended, fields, applied):
        head = f"GET /job/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: {SECURE_KEY}\r\n"
        head += "".join(f"Prefer: {field}\r\n" for field in fields) + "\r\n"
        answer = raw_exchange(ended.server.url, head.encode("latin-1"))
        found = re.search(rb"\r\nPreference-Applied: ([^\r]*)\r\n", answer)
        assert answer.startswith(b"HTTP/1.1 200 ") and (found and found[1].decode()) == applied

    @pytest.mark.parametrize("prefer", ["respond-async", "Respond-Async", "wait=5, respond-async", "respond-async;a=b"])
    def test_respond_async_queues_what_is_synchronous(self, held, gate, prefer):
        asked = Later(held.client.post, "/job/x", {"job_type": "hold", "api_key": "k", "data": 1}, Prefer=prefer)
        gate.begun.get(timeout=PATIENCE_SECONDS)
        if "wait" in prefer:
            watched(held, "x")
            gate.open.set()
        answer = asked.result()
        assert "respond-async" in answer.headers["Preference-Applied"]
        assert ("wait=5" in answer.headers["Preference-Applied"]) == ("wait" in prefer)
        assert answer.json["status"] == ("complete" if "wait" in prefer else "pending")
        gate.open.set()
        done = held.client.finish(answer.json)
        assert (done["status"], done["data"], done["attempts"]) == ("complete", 1, 1)

    @pytest.mark.parametrize("prefer", ["respond-async", "wait=20"])
    def test_what_would_have_been_streamed_is_stored_in_one_piece(self, held, prefer):
        for job_type, data, body in (("stream", "one two \u00e4", "one two \u00e4".encode()),
                                     ("raw", {"base64": base64.b64encode(b"\xff\x00a\xfe").decode()},
                                      b"\xff\x00a\xfe")):
            job = held.client.post("/job", {"job_type": job_type, "api_key": "k"}, Prefer=prefer).json
            job = {**held.client.finish(job), "job_key": job["job_key"]}
            assert (job["status"], job["data"]) == ("complete", data)
            assert held.client.get(f"/job/{job['job_id']}/data", key=job["job_key"]).body == body

    @pytest.mark.parametrize("way", ASK)
    def test_a_job_that_is_deleted_meanwhile_is_not_found(self, held, gate, way):
        ask, body = self.ASK[way][0], {"job_type": "hold", "api_key": "k"}
        for follows in (False, True):
            job = self.begin(held.client, way, body, Prefer="respond-async")
            asked = Later(ask, held.client, job, body, Prefer="respond-async, wait=20")
            watched(held, "x")
            assert held.client.delete("/job/x", key=SECURE_KEY).status == 200
            if follows:
                held.client.submit("wait", job_id="x")
            answer = asked.result()
            assert (answer.status, answer.error) == (404, "job_id not found")

    def test_who_waits_is_woken_by_the_writer_and_does_not_look_meanwhile(self, held, gate):
        looks, store = [], held.service.store
        get_job = store.get_job
        store.get_job = lambda job_id: looks.append(job_id) or get_job(job_id)
        asked = Later(held.client.post, "/job/x", {"job_type": "wait", "api_key": "k"}, Prefer="wait=20")
        watched(held, "x")
        gate.begun.get(timeout=PATIENCE_SECONDS)
        for number in range(50):
            held.client.submit("quick", number)
        assert not asked.is_done
        gate.open.set()
        assert asked.result().json["status"] == "complete"
        assert looks.count("x") <= 4  # after it is stored, is claimed, and has ended; once more if these coincide

    def test_who_waits_is_answered_when_the_service_stops(self, held, gate):
        ways = [
            Later(held.client.post, "/job/x", {"job_type": "wait", "api_key": "k"}, Prefer="wait=20"),
            Later(held.client.post, "/job/y", {"job_type": "hold", "api_key": "k"}, Prefer="wait=20"),
        ]
        watched(held, "x")
        watched(held, "y")
        stopping = Later(held.stop)
        for way in ways:
            answer = way.result()
            assert (answer.status, answer.json["status"]) == (200, "pending")
        gate.open.set()
        stopping.result()

    # -- PUT

    BODY = '{"job_type": "quick", "api_key": "secret-api-key", "data": {"a": 1, "b": [{"c": 2, "d": null}]}}'
    SAME = '{"data": {"b": [{"d": null, "c": 2}], "a": 1}, "api_key": "secret-api-key", "job_type": "quick"}'

    def test_the_same_body_again_is_the_same_job_with_its_key(self, held, gate):
        same = ("job_id", "job_key", "requested_timestamp", "sent_data")
        for count, job_id in enumerate(("x", "a \u00e4%", "\U0001f600" * 255), 1):
            first = put(held.client, job_id, self.BODY)
            assert first.status == 200 and len(first.json["job_key"]) == 32
            second = put(held.client, job_id, self.SAME)
            assert second.status == 200
            assert [second.json[name] for name in same] == [first.json[name] for name in same]
            held.client.finish(first.json)
            assert set(rows_of(held.path, "SELECT api_key FROM jobs")) == {(None,)}  # it is erased, and still compared
            for body in (self.BODY, self.SAME):
                again = put(held.client, job_id, body)
                assert (again.status, again.json["job_key"], again.json["status"]) == (
                    200, first.json["job_key"], "complete")
            assert len(gate.order) == count

    def test_the_same_body_after_a_restart_is_the_same_job(self, start, gate):
        before = start(gate.registry)
        first = put(before.client, "x", self.BODY).json
        before.client.finish(first)
        before.stop()
        client = start(gate.registry).client
        again = put(client, "x", self.SAME)
        assert (again.status, again.json["job_key"], again.json["status"]) == (200, first["job_key"], "complete")
        assert put(client, "x", self.BODY.replace("1", "3")).status == 409
        assert len(gate.order) == 1

    CHANGES = [
        {"data": {"a": 2}}, {"data": {"a": "1"}}, {"data": {"a": True}}, {"data": {"a": 1.0}},
        {"data": {"a": 1, "b": None}}, {"data": [["a", 1]]}, {"data": None}, {"api_key": "another"}, {"api_key": 1},
        {"metadata": None}, {"metadata": {}}, {"metadata": {"k": "w"}}, {"result_url": None},
        {"result_url": "http://127.0.0.1:9/other"}, {"job_type": "wait"},
    ]

    @pytest.mark.parametrize("is_done", [False, True], ids=["waiting", "finished"])
    def test_another_body_is_a_conflict(self, start, gate, receiver, is_done):
        service = start(gate.registry, WORKERS=1)
        body = {
            "job_type": "quick", "api_key": "secret-api-key", "data": {"a": 1}, "metadata": {"k": "v"},
            "result_url": receiver.url,
        }
        if not is_done:
            service.client.submit("wait")
            gate.begun.get(timeout=PATIENCE_SECONDS)
        job = put(service.client, "x", body).json
        if is_done:
            service.client.finish(job)
            receiver.wait()
        for change in self.CHANGES:
            answer = put(service.client, "x", {**body, **change})
            assert (answer.status, answer.json) == (409, {"error": "job_id x already exists"}), change
            assert job["job_key"].encode() not in answer.body
        again = put(service.client, "x", body)
        assert (again.status, again.json["job_key"]) == (200, job["job_key"])

    def test_what_is_left_out_is_what_is_null(self, held):
        job = put(held.client, "x", {"job_type": "quick", "api_key": "k"}).json
        nulls = {"job_type": "quick", "api_key": "k", "data": None, "metadata": None, "result_url": ""}
        assert put(held.client, "x", nulls).json["job_key"] == job["job_key"]

    def test_a_job_of_the_predecessor_is_a_conflict(self, start, tmp_path):
        make_predecessor(tmp_path / "jobs.db")
        client = start().client
        body = {"job_type": "echo", "api_key": "api-key-1", "data": "hello"}
        for job_id in ("ok", "slow", "nodata"):
            answer = put(client, job_id, body)
            assert (answer.status, answer.error) == (409, f"job_id {job_id} already exists")

    def test_an_id_is_free_again_when_its_job_is_deleted(self, held):
        first = put(held.client, "x", self.BODY).json
        held.client.finish(first)
        held.client.delete("/job/x", key=first["job_key"])
        second = put(held.client, "x", self.BODY).json
        assert second["job_key"] != first["job_key"]
        held.client.finish(second)

    @pytest.mark.parametrize("job_type", ["wait", "hold"])
    def test_twenty_at_once_run_the_function_once(self, held, gate, job_type):
        answers = []
        body = {"job_type": job_type, "api_key": "k", "data": list(range(100))}
        asked = Later(in_threads, 20, lambda number: answers.append(put(held.client, "x", body)))
        gate.begun.get(timeout=PATIENCE_SECONDS)
        eventually(lambda: len(answers) >= 19)  # the synchronous function runs in one of the requests
        gate.open.set()
        asked.result()
        assert {answer.status for answer in answers} == {200}
        assert len({answer.json["job_key"] for answer in answers}) == 1
        assert held.client.finish(answers[0].json)["attempts"] == 1 and gate.begun.empty()

    def test_the_listed_api_keys_apply(self, start):
        client = start(API_KEYS="one,two").client
        body = {"job_type": "async_echo", "api_key": "three"}
        assert put(client, "x", body).status == 403
        job = put(client, "x", {**body, "api_key": "one"})
        assert job.status == 200
        assert put(client, "x", {**body, "api_key": "one"}).json["job_key"] == job.json["job_key"]
        assert [put(client, "x", {**body, "api_key": key}).status for key in ("two", "three")] == [409, 409]

    def test_when_no_more_may_wait_what_is_there_is_still_returned(self, start, gate):
        client = start(gate.registry, MAX_PENDING=1).client
        body = {"job_type": "wait", "api_key": "k"}
        job = put(client, "x", body).json
        refused = put(client, "y", body)
        assert refused.status == 503 and refused.headers["Retry-After"] == "30"
        again = put(client, "x", body)
        assert (again.status, again.json["job_key"]) == (200, job["job_key"])
        assert put(client, "x", {**body, "data": 1}).status == 409


class EventStream:
    """A client of Server-Sent Events (HTML standard, section 9.2) that is strict about what it gets.

    ``next()`` returns (name, id, data) of the next event, None at the end; comments are counted in ``comments``.
    """

    def __init__(self, client, path, key=None, **headers):
        self.comments = 0
        self._connection = http.client.HTTPConnection(client.host, client.port, timeout=PATIENCE_SECONDS)
        self._connection.request("GET", path, headers=with_key(key, headers))
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()
        assert self.response.headers["Content-Type"] == "text/event-stream"

    def next(self):
        fields = {}
        while True:
            line = self.response.readline()
            if not line:
                assert fields == {}, "it ended in the middle of an event"
                return None
            RESPONSES.append(line)
            assert line.endswith(b"\n") and b"\r" not in line, line
            text = line[:-1].decode("utf-8")
            if text.startswith(":"):
                self.comments += 1
            elif text:
                name, separator, value = text.partition(": ")
                assert separator and name in ("event", "id", "data") and name not in fields, line
                fields[name] = value
            elif fields:
                return fields["event"], int(fields["id"]) if "id" in fields else None, json.loads(fields["data"])

    def until(self, state):
        """Return the events up to the status with that state."""
        events = [self.next()]
        while events[-1][0] != "status" or events[-1][2]["state"] != state:
            events.append(self.next())
            assert events[-1] is not None, events[:-1]
        return events

    def rest(self):
        """Return all events to the end."""
        return list(iter(self.next, None))

    def close(self):
        """Leave, as a client that closes its window does."""
        self.response.close()
        self._connection.close()


@pytest.fixture
def events():
    """Return a function that opens an EventStream: ``events(client, job, **headers)``, closed at the end."""
    streams = []

    def open_stream(client, job=None, key=None, query="", **headers):
        path = "/events" if job is None else "/job/" + urllib.parse.quote(job["job_id"], safe="") + "/events"
        key = key if key is not None or job is None else job["job_key"]
        streams.append(EventStream(client, path + query, key, **headers))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


class Steps:
    """A job type ``work`` that does what the test tells it, step by step: ``log(message)``, ``progress(fraction)``,
    ``end()``. Each returns when it has been done."""

    def __init__(self, **options):
        self._orders, self._done = queue.Queue(), queue.Queue()

        def work(task_id, input):
            logger = logging.getLogger(task_id)
            logger.propagate = False
            logger.setLevel(logging.DEBUG)
            logger.addHandler(csp.StoringHandler(task_id, input))
            while True:
                order = self._orders.get(timeout=PATIENCE_SECONDS)
                if order is None:
                    return input.get("data")
                order(task_id, logger)
                self._done.put(None)

        self.registry = registry_of(work, **options)

    def do(self, order):
        self._orders.put(order)
        self._done.get(timeout=PATIENCE_SECONDS)

    def log(self, *texts):
        self.do(lambda task_id, logger: [logger.info("%s", text) for text in texts])

    def progress(self, fraction, message=None):
        self.do(lambda task_id, logger: csp.set_progress(task_id, fraction, message))

    def fail(self, error):
        def order(task_id, logger):
            self._done.put(None)
            raise error

        self.do(order)

    def end(self):
        self._orders.put(None)


@pytest.fixture
def steps(start):
    """Steps, ended before the services stop."""
    steps = Steps()
    yield steps
    for _ in range(100):
        steps.end()


LOG_MODULE = """
    import logging, time
    import csp.job as job, csp.util as util

    @job.asynchronous
    def work(task_id, input):
        logger = logging.getLogger(task_id)
        logger.propagate = False
        logger.addHandler(util.StoringHandler(task_id, input))
        for number in range(input["data"]):
            logger.warning("line %d", number)
            if number % 50 == 49:
                time.sleep(0.01)
    """


def lines_of(events):
    return [(event_id, data) for name, event_id, data in events if name == "log"]


def with_ids(path, job_id):
    """Return (log id, message) of a job's log, as SQLite has it."""
    return rows_of(path, "SELECT log_id, message FROM logs WHERE job_id = ? ORDER BY log_id", job_id)


class TestEvents:
    """Server-Sent Events."""

    @pytest.fixture
    def client(self, shared):
        return shared.client

    # -- what comes

    def test_everything_comes_in_its_order_as_it_happens(self, start, steps, events):
        service = start(steps.registry, WORKERS=1)
        job = service.client.submit("work", data=1)
        stream = events(service.client, job)
        first = stream.until("running")[-1]
        steps.log("one")
        logged = stream.next()
        steps.progress(0.5, "half")
        progressed = stream.next()
        steps.log("two", "three")
        more = [stream.next(), stream.next()]
        steps.end()
        ended = stream.rest()
        done = service.client.show(job)
        assert first == ("status", None, {
            "status": "pending", "state": "running", "attempts": 1, "started_timestamp": done["started_timestamp"],
            "finished_timestamp": None, "error": None})
        assert [name for name, _, _ in [logged, progressed, *more]] == ["log", "progress", "log", "log"]
        assert progressed == ("progress", None, {"fraction": 0.5, "message": "half"})
        assert [data for _, data in lines_of([logged, *more])] == done["logs"]  # a line is as in the job
        stored = with_ids(service.path, job["job_id"])
        assert [(number, data["message"]) for number, data in lines_of([logged, *more])] == stored
        finished = {"status": "complete", "state": "complete", "finished_timestamp": done["finished_timestamp"]}
        assert ended == [("status", None, {**first[2], **finished})]

    def test_a_repeated_attempt_is_seen(self, start, events, impatient):
        steps = Steps(retries=1)
        client = start(steps.registry).client
        stream = events(client, client.submit("work"))
        stream.until("running")
        steps.log("before")
        steps.fail(ValueError("first"))
        steps.log("after")
        steps.end()
        seen = stream.rest()
        states = [(data["state"], data["attempts"]) for name, _, data in seen if name == "status"]
        assert states[-1] == ("complete", 2) and set(states) <= {("queued", 1), ("running", 2), ("complete", 2)}
        texts = [data["message"] for _, data in lines_of(seen)]
        assert texts[0] == "before" and texts[1].startswith("Attempt 1 failed") and texts[2] == "after"

    def test_a_finished_job_gives_its_log_and_status_and_ends(self, start, steps, events):
        service = start(steps.registry)
        job = service.client.submit("work")
        steps.log(*map(str, range(1200)))  # more than is read at a time
        steps.progress(1, "done")
        steps.end()
        service.client.finish(job)
        for _ in range(2):
            seen = events(service.client, job).rest()
            assert [data["message"] for _, data in lines_of(seen)] == [str(number) for number in range(1200)]
            assert [name for name, _, _ in seen[1200:]] == ["progress", "status"]
            assert seen[1200][2] == {"fraction": 1.0, "message": "done"} and seen[1201][2]["state"] == "complete"

    def test_whatever_is_logged_is_one_line_of_data(self, start, steps, events):
        texts = [
            "a\nb\r\nc\rd", "data: x\n\nevent: status\ndata: {}\n\n", "\n\n", "", ": comment",
            "<script>alert(1)</script>", "\u00e4\u20ac\U0001f600", "\u2028\u2029\x85\x0b\x0c", "\x00\x1b[31m\x7f",
            "\\n\\u000a", "\ud800",
        ]
        client = start(steps.registry).client
        job = client.submit("work")
        steps.log(*texts)
        steps.progress(0.5, "".join(texts))
        steps.end()
        seen = events(client, job).rest()
        expected = [text.replace("\ud800", "?") for text in texts]
        assert [data["message"] for _, data in lines_of(seen)] == expected
        assert [data["message"] for name, _, data in seen if name == "progress"] == ["".join(expected)]

    def test_progress_set_a_thousand_times_a_second_costs_few_commits(self, start, steps, events):
        service = start(steps.registry)
        store, commits = service.service.store, []
        commit = store._commit
        job = service.client.submit("work")
        stream = events(service.client, job)
        stream.until("running")
        store._commit = lambda batch: commits.append(len(batch)) or commit(batch)
        began = time.monotonic()

        def order(task_id, logger):
            pause = threading.Event()
            for number in range(500):
                csp.set_progress(task_id, number / 500, str(number))
                pause.wait(0.001)

        steps.do(order)
        seconds = time.monotonic() - began
        steps.end()
        seen = [data["fraction"] for name, _, data in stream.rest() if name == "progress"]
        assert seen == sorted(set(seen)) and seen[-1] == 499 / 500
        assert len(commits) <= 4 * (seconds / csp.PROGRESS_SECONDS + 2)  # one, and those of the runner looking for jobs
        assert len(seen) <= seconds / csp.PROGRESS_SECONDS + 3

    # -- going on after a break

    @pytest.mark.parametrize("by", ["header", "parameter"])
    def test_a_stream_goes_on_exactly_where_it_broke_off(self, start, steps, events, by):
        service = start(steps.registry)
        job, other = service.client.submit("work"), service.client.submit("work")  # whose lines lie between
        chance, seen, last, count = random.Random(7), [], "0", 0
        while count < 300:
            for _ in range(20):
                steps.log(*(str(number) for number in range(count, count + 5)))
                count += 5
            more = {"Last-Event-ID": last} if by == "header" else {"query": f"?last_event_id={last}"}
            stream = events(service.client, job, **more)
            for _ in range(chance.randrange(1, 60)):
                found = len(with_ids(service.path, job["job_id"])) - len(seen)
                if found > 0:
                    event = stream.next()
                    seen += lines_of([event])
            stream.close()
            last = str(seen[-1][0]) if seen else "0"
        steps.end()
        steps.end()
        service.client.finish(job)
        service.client.finish(other)
        seen += lines_of(events(service.client, job, **{"Last-Event-ID": last}).rest())
        expected = with_ids(service.path, job["job_id"])
        assert [(number, data["message"]) for number, data in seen] == expected

    def test_a_stream_goes_on_over_a_crash_without_gap_or_double(self, launch, tmp_path, events):
        server = launch(LOG_MODULE)
        job = server.client.submit("work", data=600)
        seen, chance = [], random.Random(3)
        for stop_at in (40, 300):
            stream = events(server.client, job, **{"Last-Event-ID": last_of(seen)})
            while len(seen) < stop_at + chance.randrange(40):
                event = stream.next()
                if event is None:
                    break
                seen += lines_of([event])
            server.kill()
            stream.close()
            assert with_ids(tmp_path / "jobs.db", job["job_id"])[: len(seen)] == [
                (number, data["message"]) for number, data in seen
            ]  # what has been shown is on disk
            server = launch(LOG_MODULE)
        rest = events(server.client, job, **{"Last-Event-ID": last_of(seen)}).rest()
        assert rest[-1][2]["state"] == "complete"
        expected = with_ids(tmp_path / "jobs.db", job["job_id"])
        assert [(number, data["message"]) for number, data in seen + lines_of(rest)] == expected
        assert len(expected) > 600

    def test_a_last_id_that_is_none_is_refused(self, client):
        job = client.submit("echo", "a")
        path = f"/job/{job['job_id']}/events"
        for last in ("x", "-1", "1.5", "1" * 19, "1,2", "0x1", "\xb2", "1 2"):
            for answer in (client.get(f"{path}?last_event_id={urllib.parse.quote(last)}", key=job["job_key"]),
                           client.get(path, key=job["job_key"], **{"Last-Event-ID": last})):
                assert (answer.status, answer.error) == (409, "Last-Event-ID has to be an id that this stream has sent")

    # -- who may see it, and how

    def test_the_head_says_that_it_is_a_stream(self, client, events):
        job = client.submit("echo", "a")
        headers = events(client, job).response.headers
        assert headers["Content-Type"] == "text/event-stream" and headers["Cache-Control"] == "no-store"
        assert headers["X-Accel-Buffering"] == "no" and headers["Transfer-Encoding"] == "chunked"
        assert "Content-Length" not in headers

    @pytest.mark.parametrize("path", ["/job/x/events", "/events"])
    def test_head_has_no_body_and_ends_at_once(self, start, gate, path):
        service = start(gate.registry)
        service.client.submit("wait", job_id="x")
        request = f"HEAD {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {SECURE_KEY}\r\n\r\n"
        following = "GET /status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        answer = raw_exchange(service.server.url, (request + following).encode())
        first, second, rest = answer.split(b"\r\n\r\n", 2)
        assert first.startswith(b"HTTP/1.1 200 ") and b"\r\nContent-Type: text/event-stream\r\n" in first
        assert second.startswith(b"HTTP/1.1 200 ") and json.loads(rest.decode())["name"] == "tests"
        assert not service.service.store.count_watchers("x")

    def test_to_http_1_0_it_is_sent_to_the_end_of_the_connection(self, client):
        job = client.submit("echo", "a")
        head = f"GET /job/{job['job_id']}/events HTTP/1.0\r\nConnection: keep-alive\r\nAuthorization: {SECURE_KEY}\r\n"
        answer = raw_exchange(client.url, (head + "\r\n").encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in head and b"Connection: keep-alive" not in head
        assert body.startswith(b"event: status\ndata: {") and body.endswith(b"}\n\n")

    def test_a_connection_is_good_for_more_after_a_stream(self, client):
        job = client.submit("echo", "a")
        stream = EventStream(client, f"/job/{job['job_id']}/events", job["job_key"])
        assert stream.rest()[-1][2]["state"] == "complete"
        stream._connection.request("GET", "/status")
        assert json.loads(stream._connection.getresponse().read().decode())["name"] == "tests"
        stream.close()

    def test_the_wsgi_application_gives_the_iterator_and_close_ends_the_watch(self, start, steps):
        service = start(steps.registry)
        job, started = service.client.submit("work"), []
        path, watchers = f"/job/{job['job_id']}/events", service.service.store.count_watchers

        def call(path, method="GET"):
            return csp.Wsgi(service.service)({
                "REQUEST_METHOD": method, "PATH_INFO": path, "REMOTE_ADDR": "192.0.2.1", "wsgi.url_scheme": "http",
                "wsgi.input": io.BytesIO(), "HTTP_AUTHORIZATION": job["job_key"], "HTTP_LAST_EVENT_ID": "0",
            }, lambda status, headers: started.append((status, dict(headers))))

        left, read, numbers = call(path), call(path), call("/events")
        assert {status for status, _ in started} == {"200 OK"}
        assert all(headers["Content-Type"] == "text/event-stream" and "Content-Length" not in headers
                   for _, headers in started)
        assert b"event: status\n" in next(left) and next(numbers).startswith(b"event: stats\ndata: {")
        steps.log("a line")
        steps.end()
        text = b"".join(read).decode()
        assert "a line" in text and '"state": "complete"' in text
        assert (watchers(job["job_id"]), watchers("")) == (1, 1)
        left.close()
        numbers.close()
        assert (watchers(job["job_id"]), watchers("")) == (0, 0)
        assert list(call(path, "HEAD")) == []

    # -- its end

    def test_it_ends_with_a_delete(self, start, steps, events):
        client = start(steps.registry, WORKERS=1).client
        running, queued = client.submit("work"), client.submit("work")
        streams = [events(client, running), events(client, queued)]
        streams[0].until("running")
        assert streams[1].next()[2]["state"] == "queued"
        for job, stream in zip((running, queued), streams):
            assert client.delete("/job/" + job["job_id"], key=job["job_key"]).status == 200
            assert stream.rest() == [("status", None, {"status": "deleted", "state": "deleted"})]

    def test_it_ends_with_a_cancellation(self, start, gate, events):
        client = start(gate.registry).client
        job = client.submit("obedient")
        stream = events(client, job)
        stream.until("running")
        client.post(f"/job/{job['job_id']}/cancel", key=job["job_key"])
        last = stream.rest()[-1]
        assert last[2]["state"] == "error" and last[2]["error"] == {"message": "cancelled"}

    def test_it_ends_when_the_service_stops_and_what_it_has_shown_stays(self, start, gate, events):
        service = start(gate.registry)
        job = service.client.submit("wait")
        streams = [events(service.client, job), events(service.client)]
        streams[0].until("running")
        streams[1].next()
        began = time.monotonic()
        stopping = Later(service.stop)
        assert {event[2]["state"] for event in streams[0].rest()} <= {"running"}
        assert {event[0] for event in streams[1].rest()} <= {"stats"}
        assert time.monotonic() - began < 4
        gate.open.set()
        stopping.result()

    def test_a_quiet_stream_is_kept_open_by_comments(self, start, steps, events, monkeypatch):
        monkeypatch.setattr(csp, "KEEP_ALIVE_SECONDS", 0.05)
        client = start(steps.registry).client
        stream = events(client, client.submit("work"))
        stream.until("running")
        seen = Later(stream.next)
        eventually(lambda: stream.comments >= 5)
        assert not seen.is_done
        steps.log("after the silence")
        assert seen.result()[2]["message"] == "after the silence"

    def test_who_has_logged_out_sees_no_more_after_the_next_comment(self, start, steps, events, monkeypatch):
        monkeypatch.setattr(csp, "KEEP_ALIVE_SECONDS", 0.05)
        client = start(steps.registry).client
        cookie = log_in(client)
        stream = events(client, client.submit("work"), key="", Cookie=cookie)
        stream.until("running")
        seen = Later(stream.rest)
        eventually(lambda: stream.comments >= 3)
        assert not seen.is_done
        client.get("/logout", Cookie=cookie)
        assert seen.result() == []

    def test_guesses_from_the_same_address_do_not_break_a_stream(self, start, steps, events, monkeypatch, caplog):
        monkeypatch.setattr(csp, "KEEP_ALIVE_SECONDS", 0.3)  # each comment is a login, which forgives failures
        client = start(steps.registry).client
        stream = events(client, client.submit("work"), key=ADMIN)
        stream.until("running")
        eventually(lambda: client.get("/login", key=basic("admin", "wrong")).status == 429)
        rest, before = Later(stream.rest), stream.comments
        eventually(lambda: rest.is_done or stream.comments >= before + 3)
        steps.end()
        assert rest.result()[-1][2]["state"] == "complete"
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []

    # -- many

    def test_a_slow_reader_holds_nobody_up(self, start, steps, events):
        service = start(steps.registry)
        job = service.client.submit("work")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((service.client.host, service.client.port))
            slow.sendall(
                f"GET /job/{job['job_id']}/events HTTP/1.1\r\nHost: a\r\nAuthorization: {SECURE_KEY}\r\n\r\n".encode()
            )
            stream = events(service.client, job)
            watched(service, job["job_id"], 2)
            seen = Later(stream.rest)
            steps.log(*("x" * 20_000 for _ in range(500)))  # 10 MB, more than any buffer takes
            began = time.monotonic()
            assert service.client.get("/status").status == 200
            steps.log("the last")
            steps.end()
            texts = [data["message"] for _, data in lines_of(seen.result())]
            assert len(texts) == 501 and texts[-1] == "the last"
            assert service.client.finish(job)["status"] == "complete" and time.monotonic() - began < 15

    def test_those_who_have_left_are_forgotten(self, start, steps, events, monkeypatch):
        monkeypatch.setattr(csp, "KEEP_ALIVE_SECONDS", 0.05)
        monkeypatch.setattr(csp, "SPARE_THREAD_SECONDS", 0.05)
        monkeypatch.setattr(csp, "STATS_SECONDS", 0.05)
        service = start(steps.registry)
        job = service.client.submit("work")
        events(service.client, job).until("running")
        before = threading.active_count()
        streams = [events(service.client, job) for _ in range(40)] + [events(service.client) for _ in range(10)]
        watched(service, job["job_id"], 41)
        watched(service, "", 10)
        for stream in streams:
            stream.close()
        store = service.service.store
        eventually(lambda: store.count_watchers(job["job_id"]) == 1 and not store.count_watchers(""))
        eventually(lambda: threading.active_count() <= before)

    # -- the numbers

    def test_the_numbers_come_when_they_change(self, start, gate, events, monkeypatch):
        monkeypatch.setattr(csp, "STATS_SECONDS", 0.02)
        client = start(gate.registry, WORKERS=1).client
        stream = events(client)
        assert stream.next() == ("stats", None, {"queued": 0, "running": 0, "complete": 0, "error": 0})

        def until(**numbers):
            event = stream.next()
            while event[2] != numbers:
                event = stream.next()
            return event

        client.submit("wait")
        until(queued=0, running=1, complete=0, error=0)
        gate.open.set()
        until(queued=0, running=0, complete=1, error=0)
        failed = client.submit("fail")
        until(queued=0, running=0, complete=1, error=1)
        for path in ("/job/" + failed["job_id"], "/job?days=0"):
            client.delete(path, key=SECURE_KEY)
            until(queued=0, running=0, complete=int("days" not in path), error=0)


def last_of(lines):
    return str(lines[-1][0]) if lines else "0"


SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? (\S+)'
)
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(?:,|$)')


UNESCAPED = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def read_metrics(text):
    """Parse the text format of Prometheus, strictly; return {name: {frozenset of labels: value}} and {name: type}."""
    assert text.endswith("\n") and "\r" not in text
    samples, types, helps, finished, current = {}, {}, set(), set(), None
    for line in text[:-1].split("\n"):
        if line.startswith("# "):
            _, keyword, name, rest = line.split(" ", 3)
            if keyword == "HELP":
                assert name not in helps and rest
                helps.add(name)
            else:
                assert keyword == "TYPE" and rest in ("counter", "gauge", "histogram") and name not in types
                assert name in helps and name not in finished
                finished.add(current)
                types[name], current = rest, name
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        name, labels, value = match.groups()
        found = LABEL.findall(labels or "")
        assert ",".join(f'{key}="{text}"' for key, text in found) == (labels or "").rstrip(","), line
        base = re.sub("_(bucket|sum|count)$", "", name) if types.get(current) == "histogram" else name
        assert base == current, f"{line} is not where {base} is"  # lines of a metric stand together, after its TYPE
        assert len(dict(found)) == len(found)
        key = frozenset((key, re.sub(r"\\.", lambda match: UNESCAPED[match[0]], text)) for key, text in found)
        assert key not in samples.setdefault(name, {}), line
        samples[name][key] = float(value.replace("Inf", "inf"))
    check_histograms(samples, types)
    return samples, types


def check_histograms(samples, types):
    for name in [name for name, kind in types.items() if kind == "histogram"]:
        series = {}
        for labels, value in samples.get(name + "_bucket", {}).items():
            bound = dict(labels)["le"]
            rest = frozenset(pair for pair in labels if pair[0] != "le")
            series.setdefault(rest, []).append((float(bound.replace("Inf", "inf")), value))
        assert series.keys() == samples.get(name + "_count", {}).keys() == samples.get(name + "_sum", {}).keys()
        for labels, buckets in series.items():
            counts = [value for _, value in sorted(buckets)]
            assert counts == sorted(counts) and max(buckets)[0] == float("inf"), name
            assert counts[-1] == samples[name + "_count"][labels] and samples[name + "_sum"][labels] >= 0


def metrics_of(client):
    answer = client.get("/metrics")
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read_metrics(answer.body.decode("utf-8"))[0]


def value_of(samples, name, **labels):
    return samples.get(name, {}).get(frozenset(labels.items()))


class TestMetrics:
    """GET /metrics, in the text format of Prometheus."""

    NAMES = {
        "csp_build_info": "gauge", "process_start_time_seconds": "gauge", "csp_jobs": "gauge",
        "csp_jobs_running": "gauge", "csp_jobs_waiting": "gauge", "csp_jobs_longest_waiting_seconds": "gauge",
        "csp_job_duration_seconds": "histogram", "csp_request_duration_seconds": "histogram",
        "csp_responses_total": "counter", "csp_callback_attempts_total": "counter",
    }

    def test_every_metric_is_there_from_the_start_and_the_readme_names_it(self, client):
        _, types = read_metrics(client.get("/metrics").body.decode())
        assert types == self.NAMES
        assert [name for name in types if name.startswith("csp_") and f"`{name}`" not in README] == []

    def test_the_values_are_those_of_known_jobs(self, start, gate):
        service = start(gate.registry, WORKERS=2)
        client = service.client
        before = time.time()
        for number in range(5):
            client.finish(client.submit("quick", number))
        for _ in range(3):
            client.finish(client.submit("fail"))
        for number in range(4):
            client.submit("wait", number)
        for _ in range(2):
            gate.begun.get(timeout=PATIENCE_SECONDS)
        samples = metrics_of(client)
        assert {key: value for key, value in samples["csp_jobs"].items() if value} == {
            frozenset({("job_type", "quick"), ("status", "complete")}): 5,
            frozenset({("job_type", "fail"), ("status", "error")}): 3,
            frozenset({("job_type", "wait"), ("status", "pending")}): 4,
        }
        assert value_of(samples, "csp_jobs_running") == 2 and value_of(samples, "csp_jobs_waiting") == 2
        count = "csp_job_duration_seconds_count"
        assert value_of(samples, count, job_type="quick", status="complete") == 5
        assert value_of(samples, count, job_type="fail", status="error") == 3
        assert value_of(samples, count, job_type="wait", status="complete") is None
        assert abs(value_of(samples, "process_start_time_seconds") - before) < 60
        [build] = samples["csp_build_info"].items()
        assert build[1] == 1 and dict(build[0])["version"] == csp.__version__
        posted = {"method": "POST", "route": "/job"}
        assert value_of(samples, "csp_responses_total", status="200", **posted) == 12
        assert value_of(samples, "csp_request_duration_seconds_count", status="200", **posted) == 12
        gate.open.set()
        eventually(lambda: value_of(metrics_of(client), "csp_jobs", job_type="wait", status="complete") == 4)
        eventually(lambda: value_of(metrics_of(client), "csp_jobs_running") == 0)  # a moment after the job is stored
        samples = metrics_of(client)
        assert value_of(samples, count, job_type="wait", status="complete") == 4
        assert value_of(samples, "csp_jobs_waiting") == 0

    def test_a_deleted_job_is_out_of_the_numbers(self, client):
        job = client.submit("echo", "a")
        client.delete("/job/" + job["job_id"], key=job["job_key"])
        assert not value_of(metrics_of(client), "csp_jobs", job_type="echo", status="complete")

    def test_answers_are_counted_by_route_and_not_by_what_clients_make_up(self, client):
        for number in range(20):
            client.get(f"/no/such/{number}")
            client.get(f"/job/{number}")
            client.request("BREW", f"/{number}")
        client.request("HEAD", "/status")
        client.request("OPTIONS", "/status")
        client.post("/status")
        samples = metrics_of(client)
        assert value_of(samples, "csp_responses_total", method="GET", route="/job/<job_id>", status="404") == 20
        assert value_of(samples, "csp_responses_total", method="", route="", status="404") == 40
        assert value_of(samples, "csp_responses_total", method="GET", route="/status", status="200") == 1
        routes = {(route.method, route.path) for route in csp.ROUTES} | {("", "")}
        assert {(dict(labels)["method"], dict(labels)["route"]) for labels in samples["csp_responses_total"]} <= routes

    def test_callbacks_are_counted_by_what_came_of_them(self, start, impatient):
        receivers = {name: Receiver() for name in ("delivered", "retry", "given_up")}
        try:
            receivers["retry"].answers = lambda number: (500 if number < 2 else 200, {})
            receivers["given_up"].answers = lambda number: (410, {})
            client = start().client
            for receiver in receivers.values():
                client.submit("async_echo", "a", result_url=receiver.url)
            wanted = {"delivered": 2, "retry": 2, "given_up": 1}

            def counts():
                samples = metrics_of(client)
                return {name: value_of(samples, "csp_callback_attempts_total", result=name) for name in wanted}

            eventually(lambda: counts() == wanted)
        finally:
            for receiver in receivers.values():
                receiver.stop()

    def test_how_long_the_next_job_waits(self, start, gate):
        service = start(gate.registry, WORKERS=1)
        service.client.submit("wait")
        gate.begun.get(timeout=PATIENCE_SECONDS)
        name = "csp_jobs_longest_waiting_seconds"
        assert value_of(metrics_of(service.client), name) == 0
        old = service.client.submit("wait")
        service.client.submit("wait")
        age = value_of(metrics_of(service.client), name)
        assert 0 <= age < 20
        eventually(lambda: value_of(metrics_of(service.client), name) > age)
        with opened(service.path) as connection:
            connection.execute("UPDATE jobs SET run_at = run_at - 1000 WHERE job_id = ?", (old["job_id"],))
        assert 1000 <= value_of(metrics_of(service.client), name) < 1030

    @pytest.mark.parametrize("run_at", [csp.AFTER_CRASH, csp.AFTER_STOP, 1e10], ids=["crash", "stop", "later"])
    def test_what_runs_again_waits_since_it_was_submitted_and_what_runs_later_does_not(self, start, gate, run_at):
        service = start(gate.registry, WORKERS=1)
        service.client.submit("wait")
        gate.begun.get(timeout=PATIENCE_SECONDS)
        job = service.client.submit("wait")
        with opened(service.path) as connection:
            connection.execute("UPDATE jobs SET run_at = ?, requested_timestamp = ? WHERE job_id = ?",
                               (run_at, csp.timestamp(time.time() - 500), job["job_id"]))
        waiting = value_of(metrics_of(service.client), "csp_jobs_longest_waiting_seconds")
        assert waiting == 0 if run_at == 1e10 else 499 <= waiting < 530

    def test_a_job_type_may_have_any_name(self, start):
        registry, names = csp.Registry(), ['a"b', "a\\", 'a\\"', "a\nb", "a\\nb", "a b{}=,", "\u00e4\u2028\x85"]
        for name in names:
            registry.asynchronous(lambda_named(name, lambda task_id, input: 1))
        client = start(registry).client
        for name in names:
            client.finish(client.submit(name))
            samples = metrics_of(client)
            assert value_of(samples, "csp_jobs", job_type=name, status="complete") == 1
            assert value_of(samples, "csp_job_duration_seconds_count", job_type=name, status="complete") == 1

    def test_it_tells_no_secret(self, client):
        job = client.submit("async_echo", "its input", job_id="the-id", metadata={"a": "its metadata"})
        client.finish(job)
        text = client.get("/metrics").body
        for secret in (job["job_key"], "the-id", "its input", "its metadata", "secret-api-key", SECURE_KEY):
            assert secret.encode() not in text

TALK_MODULE = """
    import logging, os, time
    import csp
    import csp.job as job, csp.util as util

    csp.SPARE_THREAD_SECONDS = 0.5

    @job.asynchronous
    def wait(task_id, input):
        logger = logging.getLogger(task_id)
        logger.propagate = False
        logger.addHandler(util.StoringHandler(task_id, input))
        while not os.path.exists(input["data"]):
            logger.warning("still waiting")
            time.sleep(0.1)
    """


@linux_only
class TestManyWaiters:
    """Many clients that wait, in a process of their own, for jobs that log ten times a second."""

    def test_many_wait_and_are_answered_and_others_do_not_notice(self, launch, tmp_path):
        server = launch(TALK_MODULE, "--workers", "8")
        jobs = [server.client.submit("wait", data=str(tmp_path / "go")) for _ in range(5)]
        requests = [(20, f"GET /job/{job['job_id']}{end}Authorization: {job['job_key']}\r\n\r\n".encode())
                    for end in ("/events HTTP/1.1\r\nHost: a\r\nConnection: close\r\n",
                                " HTTP/1.1\r\nHost: a\r\nConnection: close\r\nPrefer: wait=50\r\n") for job in jobs]
        with connections(server.url, *requests) as waiting:
            streams, waiters = waiting[:100], waiting[100:]
            first = [connection.recv(65_536) for connection in streams]
            assert all(part.startswith(b"HTTP/1.1 200 ") for part in first)
            eventually(lambda: thread_count(server.process.pid) >= 200)
            times = []
            for _ in range(100):
                began = time.perf_counter()
                assert server.client.get("/status").json["stats"]["pending"] == 5
                times.append(time.perf_counter() - began)
            assert sorted(times)[98] < 0.1
            (tmp_path / "go").touch()
            for begin, connection in zip(first, streams):
                stream = begin + read_to_end(connection)
                assert stream.endswith(b"\n\n\r\n0\r\n\r\n") and re.search(rb'"state": ?"complete"', stream)
            for connection in waiters:
                head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ") and b"\r\nPreference-Applied: wait=50\r\n" in head
                assert json.loads(body.decode("utf-8"))["status"] == "complete"
        assert server.client.get("/status").json["stats"] == {"pending": 0, "complete": 5, "error": 0}
        eventually(lambda: thread_count(server.process.pid) < 100)
        assert server.terminate() == 0


@pytest.fixture(scope="module")
def site():
    """The URL of a web server with some files."""
    pages = {
        "/good.csv": b"date;name;size;code\n2020-01-02;a;1;007\n2020-01-01;b;2.5;008\n2020-01-03;;;009\n",
        "/tab.tsv": "n\u00e4me\tn\n\u00e4\t1\n".encode("utf-16"),
        "/latin.csv": "n\u00e4me,n\n\u00e4,1\n".encode("latin-1"),
        "/plain": b"1,2\n3,4\n", "/empty": b"", "/html": b"<!DOCTYPE html>", "/binary": b"a\0b", "/zip": b"PK\3\4abc",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path, b"")
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield "http://127.0.0.1:%d" % server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="class")
def example():
    """A client of a service with jobs_example."""
    importlib.import_module("jobs_example")
    service = RunningService(None, csp.registry)
    yield service.client
    service.stop()


class TestExamples:
    """jobs_example.py."""

    def test_checksum(self, example, site):
        url = site + "/plain"
        wanted = {"url": url, "sha256": hashlib.sha256(b"1,2\n3,4\n").hexdigest(), "size_bytes": 8}
        assert example.submit("checksum", {"url": url})["data"] == wanted

    def test_profile_csv_tells_what_is_in_the_columns(self, example, site, receiver):
        job = example.finish(example.submit("profile_csv", {"url": site + "/good.csv"}, result_url=receiver.url))
        data = job["data"]
        assert (data["rows"], data["delimiter"], data["encoding"], data["has_header"]) == (3, ";", "utf-8", True)
        keys = ("name", "type", "empties", "distinct", "min", "max", "mean")
        assert [tuple(column[key] for key in keys) for column in data["columns"]] == [
            ("date", "date", 0, 3, "2020-01-01", "2020-01-03", None), ("name", "text", 1, 2, "a", "b", None),
            ("size", "number", 1, 2, 1, 2.5, 1.75), ("code", "text", 0, 3, "007", "009", None)]
        assert job["progress"]["fraction"] == 1.0 and len(job["logs"]) >= 2
        assert receiver.wait()[0][0]["Authorization"] == "secret-api-key"

    @pytest.mark.parametrize("path, encoding, delimiter, has_header", [
        ("/tab.tsv", "utf-16", "\t", True), ("/latin.csv", "cp1252", ",", True), ("/plain", "utf-8", ",", False)])
    def test_profile_csv_guesses(self, example, site, path, encoding, delimiter, has_header):
        data = example.finish(example.submit("profile_csv", {"url": site + path}))["data"]
        assert (data["encoding"], data["delimiter"], data["has_header"]) == (encoding, delimiter, has_header)

    @pytest.mark.parametrize("job_types, data, sentence", [
        (["profile_csv"], "/empty", "file is empty"), (["profile_csv"], "/html", "HTML page"),
        (["profile_csv"], "/binary", "binary data"), (["profile_csv"], "/zip", "ZIP archive"),
        *((["checksum", "profile_csv"], *case) for case in [
            ("/nothing", "status 404"), (None, "data has to be an object"), ("x", "data has to be an object"),
            ({"url": 5}, "begins with http"), ({"url": "file:///etc/passwd"}, "begins with http"),
            ({"url": "http://a", "limit_bytes": 0}, "limit_bytes"), ({"url": "http://127.0.0.1:1/"}, "be reached"),
        ])])
    def test_what_is_wrong_is_a_job_error(self, example, site, job_types, data, sentence):
        data = {"url": site + data} if isinstance(data, str) and data[0] == "/" else data
        for job_type in job_types:
            job = example.finish(example.submit(job_type, data))
            assert job["status"] == "error" and sentence in job["error"]["message"] and set(job["error"]) == {"message"}


class TestPredecessor:
    """A database that the real predecessor has written."""

    @pytest.fixture
    def old_database(self, tmp_path):
        make_predecessor(tmp_path / "jobs.db")
        return tmp_path / "jobs.db"

    def test_its_finished_jobs_are_there_with_everything_and_can_be_cleared(self, old_database, start):
        client = start(WORKERS=1).client
        listed = [path.rpartition("/")[2] for path in client.get("/job?_limit=10").json["list"]]
        assert listed == ["nodata", "slow", "quick", "worse", "bad", "ok"]
        good = client.get("/job/ok", key="key-ok").json
        assert (good["status"], good["data"], good["sent_data"], good["error"]) == ("complete", ">hi", "hi", None)
        assert good["metadata"] == {"mimetype": "text/plain", "n": 5, "list": [1, "x"], "s": "5"}
        assert messages(good) == ["a line", "another \u00e4"]
        assert good["logs"][0]["timestamp"] == "2026-11-23T20:29:00.031276"
        assert good["requested_timestamp"] == "2026-11-23T20:29:00.026358"
        assert client.get("/job/ok/data", key="key-ok").body == b">hi"
        assert client.get("/job/bad", key=SECURE_KEY).json["error"] == {"message": "do not start message with >"}
        assert "serious exception" in client.get("/job/worse", key=SECURE_KEY).json["error"]["message"]
        quick = client.get("/job/quick", key=SECURE_KEY).json
        assert quick["data"] == {"a": [1, None, "\u00e4"]} and quick["error"]["message"].startswith("Process completed")
        assert client.get("/job?n=5").json == {"list": ["/job/ok"]} == client.get("/job?s=5&mimetype=text/plain").json
        rows_of(old_database, "UPDATE jobs SET finished_timestamp = '2020-01-01T00:00:00.000000' WHERE job_id = 'ok'")
        assert client.delete("/job?days=1000", key=ADMIN).json == {"success": True, "deleted": 1}
        assert rows_of(old_database, "SELECT count(*) FROM logs") == [(0,)]

    def test_its_pending_jobs_run_and_their_callbacks_go_out(self, old_database, start, receiver):
        rows_of(old_database, "UPDATE jobs SET result_url = ? WHERE job_id = 'slow'", receiver.url)
        registry, seen = csp.Registry(), []
        registry.asynchronous(named("slow", lambda task_id, input: seen.append(input) or 1))
        registry.asynchronous(named("quick", lambda task_id, input: 2))
        client = start(registry).client
        headers, body = receiver.wait()[0]
        assert headers["X-Key"] == "k5" and (body["job_id"], body["status"], body["data"]) == ("slow", "complete", 1)
        assert seen == [{"job_type": "slow", "api_key": "X-Key: k5", "data": {"q": 1}, "result_url": receiver.url,
                         "metadata": {"ckan_url": "http://x/"}}]
        eventually(lambda: client.get("/status").json["stats"] == {"pending": 0, "complete": 4, "error": 2})
        assert rows_of(old_database, "SELECT job_id FROM jobs WHERE api_key IS NOT NULL") in ([], [("slow",)])

    def test_a_result_url_that_is_none_does_not_keep_it_from_being_opened(self, old_database, start):
        rows_of(old_database, "UPDATE jobs SET result_url = 'http://[broken/'")
        client = start().client
        assert client.get("/job/ok", key="key-ok").json["result_url"] == "http://[broken/"
        job = {"job_id": "slow", "job_key": "4ce9acda-3c8a-4199-979f-243f97764f37"}
        client.finish(job)
        assert attempted(client, job)["callback"]["error"]


DEPLOYMENT = {  # as a converter for CKAN is deployed: a package, its settings, a WSGI file
    "pkg/__init__.py": "",
    "pkg/jobs.py": """
        import logging
        import ckanserviceprovider.job as job
        import ckanserviceprovider.util as util
        from ckanserviceprovider import web

        SSL_VERIFY = web.app.config.get("SSL_VERIFY") not in ("False", "FALSE", "0", False, 0)
        CHUNK_SIZE = web.app.config.get("CHUNK_SIZE") or 16384

        class HTTPError(util.JobError):
            def __init__(self, message, status_code):
                super(HTTPError, self).__init__(message)
                self.status_code = status_code

            def as_dict(self):
                return {"message": self.message, "HTTP status code": self.status_code}

            def __str__(self):
                return "bytes".encode("ascii")

        @job.asynchronous
        def push(task_id, input, dry_run=False):
            handler = util.StoringHandler(task_id, input)
            logger = logging.getLogger(task_id)
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
            if input["metadata"].get("fail"):
                raise HTTPError("no such resource", 404)
            logger.info("Fetching from: %s", input["metadata"]["ckan_url"])
            logger.info("chunks of %s, verify %s, \\u00e4", CHUNK_SIZE, SSL_VERIFY)
        """,
    "pkg/main.py": """
        import os
        import sys
        import ckanserviceprovider.web as web
        import pkg.jobs as jobs

        assert jobs.push

        def main():
            os.environ["JOB_CONFIG"] = os.path.abspath(sys.argv[1])
            web.init()
            web.app.run(web.app.config.get("HOST"), web.app.config.get("PORT"))

        if __name__ == "__main__":
            main()
        """,
    "settings.py": """
        import os
        DEBUG = False
        SECRET_KEY = str("the-secure-key-of-the-tests")
        USERNAME = str("admin")
        PASSWORD = str("correct horse battery staple")
        NAME = "pusher"
        HOST = os.environ.get("PUSHER_HOST", "127.0.0.1")
        PORT = os.environ.get("PUSHER_PORT", "8800")
        SQLALCHEMY_DATABASE_URI = os.environ.get("PUSHER_DB", "sqlite:///pusher.db")
        MAX_CONTENT_LENGTH = int(os.environ.get("PUSHER_MAX", "10485760"))
        CHUNK_SIZE = 1024
        SSL_VERIFY = os.environ.get("PUSHER_SSL_VERIFY", "False")
        KEEP_JOBS_AGE = "60"
        STDERR = bool(int(os.environ.get("PUSHER_STDERR", "1")))
        """,
    "pusher_wsgi.py": """
        import os
        os.environ["JOB_CONFIG"] = os.path.join(os.path.dirname(os.path.abspath(__file__)), "settings.py")
        import ckanserviceprovider.web as web
        web.init()
        import pkg.jobs as jobs
        application = web.app
        """,
}


def needs_module(name):
    """Return the interpreter if it has the module; skip where a user has not, fail where CI was to install it."""
    if subprocess.run([sys.executable, "-c", f"import {name}"], stderr=subprocess.DEVNULL).returncode == 0:
        return sys.executable
    assert not os.environ.get("CSP_TEST_INSTALLED"), f"{name} has to be installed for this run"
    return pytest.skip(f"{name} is not installed")


@pytest.fixture
def deploy(tmp_path):
    """Return a function that starts a command in the deployment's directory and returns a Client for its port."""
    for name, text in DEPLOYMENT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
    shutil.copy(str(PROGRAM), str(tmp_path / "ckanserviceprovider.py"))
    running = []

    def start_deployment(*command, **environ):
        port = free_port()
        environ = {**os.environ, "PUSHER_PORT": str(port), "PYTHONPATH": str(tmp_path), **environ}
        with open(tmp_path / "log", "ab") as log:
            running.append(subprocess.Popen([part.format(port=port) for part in command], cwd=str(tmp_path),
                                            env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        client = Client(f"http://127.0.0.1:{port}/")

        def is_up():
            assert running[-1].poll() is None, (tmp_path / "log").read_text()
            with contextlib.suppress(OSError, http.client.HTTPException):
                return client.get("/status").status == 200

        eventually(is_up)
        return client

    yield start_deployment
    for process in running:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def ckan_pushes(client, receiver, **metadata):
    """Do what CKAN's own extension does: submit, wait for the callback, ask for the job and read its log; return it."""
    submitted = client.submit("push", api_key="ckan-api-key", result_url=receiver.url, metadata={
        "ignore_hash": False, "ckan_url": "http://ckan.example/", "resource_id": "r-1", "set_url_type": False,
        "task_created": "2026-11-23 20:00:00.000000", "original_url": "http://ckan.example/x.csv", **metadata})
    headers, body = receiver.wait()[-1]
    assert headers["Authorization"] == "ckan-api-key" and headers["Content-Type"] == "application/json"
    assert body["metadata"]["resource_id"] == "r-1" and body["status"] in ("complete", "error")
    job = client.get("/job/" + submitted["job_id"], key=submitted["job_key"]).json
    for entry in job["logs"]:
        moment = time.strptime(entry["timestamp"].split(".")[0], "%Y-%m-%dT%H:%M:%S")
        assert time.strptime(entry["timestamp"], "%Y-%m-%dT%H:%M:%S.%f") == moment and time.mktime(moment)
        assert len(entry["timestamp"].rpartition(".")[2]) == 6 and entry["message"].splitlines()
    assert sorted(job["logs"], key=lambda entry: entry["timestamp"]) == job["logs"]
    return job


class TestDeployments:
    """A converter for CKAN, deployed in each way there is."""

    GUNICORN = ("-m", "gunicorn", "--threads", "8", "--bind", "127.0.0.1:{port}")

    @pytest.mark.parametrize("module, zone, hours, command", [
        ("", "Asia/Kolkata", 5.5, ("ckanserviceprovider.py", "--jobs", "pkg.jobs", "--config", "settings.py")),
        ("", "America/St_Johns", -3.5, ("pkg/main.py", "settings.py")),
        ("gunicorn", "UTC", 0, (*GUNICORN, "pusher_wsgi")),
        ("gunicorn", "UTC", 0, (*GUNICORN, "ckanserviceprovider:wsgi_app('pkg.jobs')")),
        ("waitress", "UTC", 0, ("-m", "waitress", "--listen", "127.0.0.1:{port}", "pusher_wsgi:application")),
    ], ids=["csp.py", "main.py", "gunicorn", "gunicorn, factory", "waitress"])
    def test_a_job_goes_through_to_its_callback(self, deploy, receiver, module, zone, hours, command):
        python = needs_module(module) if module else sys.executable
        client = deploy(python, *command, JOB_CONFIG="settings.py", TZ=zone)
        assert client.get("/status").json["name"] == "pusher"
        job = ckan_pushes(client, receiver)
        assert job["status"] == "complete" and job["data"] is None and job["error"] is None
        assert messages(job) == ["Fetching from: http://ckan.example/", "chunks of 1024, verify False, \u00e4"]
        local = time.strptime(job["finished_timestamp"], "%Y-%m-%dT%H:%M:%S.%f")
        assert abs(calendar.timegm(local) - hours * 3600 - time.time()) < 3700
        receiver.received.clear()
        error = {"message": "no such resource", "HTTP status code": 404}
        assert ckan_pushes(client, receiver, fail=True)["error"] == error
        assert client.get("/login", key=ADMIN).status == 302 and client.get("/job/x").status == 404
        assert client.request("POST", "/job", "{", {"Content-Type": "application/json"}).error == "Malformed json"


class TestWsgi:
    """The WSGI application, called as a server calls it."""

    @staticmethod
    def call(application, method="GET", path="/status", query="", body=b"", **environ):
        """Return status, headers and body."""
        answer = []
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path.encode().decode("latin-1"), "QUERY_STRING": query,
            "REMOTE_ADDR": "192.0.2.1", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "HTTP_HOST": "a",
            "CONTENT_LENGTH": str(len(body)) if body else "", "CONTENT_TYPE": "application/json", **environ,
        }
        parts = application(environ, lambda status, headers: answer.extend((status, dict(headers))))
        return int(answer[0][:3]), answer[1], b"".join(parts)

    @pytest.mark.parametrize("text", ["x", "\u00e4\u20ac\U0001f600"], ids=["ASCII", "more"])
    def test_a_large_job_is_answered_in_pieces_of_known_length(self, service, text):
        application = csp.Wsgi(service.service)
        data = text * (csp.LARGE_CHARACTERS // len(text) + 1)
        status, headers, body = self.call(application, "POST", "/job", body=submission(data=data))
        job = json.loads(body)
        assert (status, job["data"], headers["Content-Length"]) == (200, ">" + data, str(len(body)))
        path = f"/job/{job['job_id']}/data"
        _, headers, body = self.call(application, path=path, HTTP_AUTHORIZATION=job["job_key"])
        assert body == (">" + data).encode() and headers["Content-Length"] == str(len(body))
        answer = service.client.get(path, key=job["job_key"])
        assert (answer.body, answer.headers["Content-Length"]) == (body, str(len(body)))

    def test_it_answers_like_the_server(self, service):
        application = csp.Wsgi(service.service)
        status, headers, body = self.call(application)
        assert (status, json.loads(body)) == (200, service.client.get("/status").json)
        assert headers["Content-Length"] == str(len(body)) and headers["X-Content-Type-Options"] == "nosniff"
        assert self.call(application, "HEAD")[2] == b"" and self.call(application, "POST")[0] == 405
        status, _, body = self.call(application, "POST", "/job/a \u00e4", body=submission(data="x"))
        assert status == 200 and json.loads(body)["job_id"] == "a \u00e4" and json.loads(body)["data"] == ">x"
        assert self.call(application, path="/job/a \u00e4", HTTP_AUTHORIZATION=SECURE_KEY)[0] == 200
        assert self.call(application, path="/job", query="_limit=x")[0] == 409

    def test_bodies_are_read_to_their_length_or_to_the_limit(self, start):
        application = csp.Wsgi(start(MAX_BODY_BYTES=2000).service)
        for length, status in (("x", 400), ("-1", 400), ("99999999999", 413), ("5", 400), ("", 409)):
            assert self.call(application, "POST", "/job", CONTENT_LENGTH=length)[0] == status, length
        chunked = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}
        assert self.call(application, "POST", "/job", body=submission(data="x"), **chunked)[0] == 200
        assert self.call(application, "POST", "/job", body=b" " * 3000, **chunked)[0] == 413

    def test_wrong_settings_are_refused_before_the_first_request(self, tmp_path):
        program = ["-O", "-c", "import csp; csp.wsgi_app()"]
        done = run_command(program=program, cwd=tmp_path, environ={"PYTHONPATH": str(HERE), "JOB_CONFIG": "nope.py"})
        assert done.returncode == 1 and "StartError: The settings file nope.py cannot be read" in done.stderr

    def test_a_service_that_cannot_start_answers_503_until_it_can(self, tmp_path, monkeypatch):
        path = tmp_path / "jobs.db"
        other = csp.Store(str(path))
        application = csp.Application()
        application.config = csp.Config()
        application.config.load(csp.Settings({**SETTINGS, "SQLALCHEMY_DATABASE_URI": f"sqlite:///{path}"}))
        monkeypatch.setattr(csp, "configure_logging", lambda settings: None)
        errors = []
        monkeypatch.setattr(csp.log, "error", lambda *arguments: errors.append(arguments))
        for _ in range(3):
            status, headers, body = self.call(application)
            assert status == 503 and "cannot be started" in json.loads(body)["error"] and "Retry-After" in headers
        assert len(errors) == 1 and "in use" in str(errors[0][1])
        other.close()
        assert self.call(application)[0] == 200
        application.service.close(0.0)

    def test_forwarded_fields_count_from_trusted_proxies_only(self, start):
        forwarded = {"HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_FORWARDED_FOR": "198.51.100.7",
                     "HTTP_X_FORWARDED_HOST": "jobs.example", "HTTP_AUTHORIZATION": ADMIN}
        for trusted, name in (("192.0.2.1", "__Host-csp_session"), ("", "csp_session")):
            application = csp.Wsgi(start(path=None, TRUSTED_PROXIES=trusted).service)
            assert self.call(application, path="/login", **forwarded)[1]["Set-Cookie"].startswith(name + "=")
            status = self.call(application, "DELETE", "/job", HTTP_ORIGIN="https://jobs.example", **forwarded)[0]
            assert status == (200 if trusted else 403)

    def test_a_streamed_result_is_iterated(self, start):
        registry = csp.Registry()
        registry.synchronous(named("stream", lambda task_id, input: lambda: iter(["a", b"b"])))
        application = csp.Wsgi(start(registry).service)
        status, headers, body = self.call(application, "POST", "/job", body=submission(job_type="stream"))
        assert (status, body) == (200, b"ab") and "Content-Length" not in headers


class TestOldNames:
    """``web``, for projects that were written for the predecessor."""

    def test_a_projects_own_tests_have_a_client(self, tmp_path):
        code = textwrap.dedent("""
            import json, os, sys
            os.environ["JOB_CONFIG"] = "settings.py"
            import ckanserviceprovider.web as web
            import ckanserviceprovider.job as job

            @job.synchronous
            def echo(task_id, input):
                return input["data"]

            web.configure()
            app = web.app.test_client()
            answer = app.post("/job", data=json.dumps({"job_type": "echo", "api_key": "k", "data": 5}),
                              content_type="application/json")
            made = json.loads(answer.data)
            assert answer.status_code == 200 and made["data"] == 5
            assert answer.headers["Content-Type"] == "application/json"
            assert app.get("/job/" + made["job_id"]).status_code == 403
            assert app.get("/job/" + made["job_id"], headers={"Authorization": made["job_key"]}).status_code == 200
            login = app.post("/login", data={"username": "admin", "password": "correct horse battery staple"})
            assert login.status_code == 302 and app.delete("/job/x", headers={"Authorization": "x"}).status_code == 404
            assert "CHUNK" in web.app.config and web.app.config["CHUNK"] == 1 and web.app.config.get("X", 2) == 2
            print("all right")
            """)
        (tmp_path / "settings.py").write_text("PASSWORD = 'correct horse battery staple'\nCHUNK = 1\nSTDERR = False\n"
                                              "SQLALCHEMY_DATABASE_URI = 'sqlite://'\n")
        shutil.copy(str(PROGRAM), str(tmp_path / "ckanserviceprovider.py"))
        done = run_command(program=("-c", code), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "all right\n"), done.stderr

    def test_errors_are_mailed_to_the_admins(self):
        csp.configure_logging(csp.Settings({"ADMINS": "a@b.example, c@d.example", "FROM_EMAIL": "csp@b.example",
                                            "STDERR": False, "NAME": "pusher"}))
        (mail,) = logging.getLogger("csp").handlers
        assert isinstance(mail, logging.handlers.SMTPHandler) and mail.level == logging.ERROR
        assert (mail.mailhost, mail.fromaddr) == ("127.0.0.1", "csp@b.example")
        assert mail.toaddrs == ["a@b.example", "c@d.example"]
        csp.configure_logging(csp.Settings({"STDERR": False}))
