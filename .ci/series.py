"""Compare the answers of two csp.py files: ``python .ci/series.py OLD NEW``.

Starts each file as a process with an empty database, plays the same series of requests (routes, methods, roles, bad
input, forms, event streams, raw bytes), and compares the answers: status, headers, JSON field by field, the forms of a
page, the names of metrics. What differs from run to run is made the same first (ids, keys, times, ports). Prints the
differences and exits with 1 if there are any. May differ: error sentences outside CONTRACT.md section 3 (they are
listed, and are no failure), descriptions in openapi.json, the text of pages."""

import base64
import contextlib
import html.parser
import http.client
import http.server
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

PASSWORD, SECURE_KEY = "correct horse battery staple", "the-secure-key-of-the-series"
BASIC = "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
WRONG_BASIC = "Basic " + base64.b64encode(b"admin:wrong").decode()
PATIENCE_SECONDS = 30.0
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JOBS = '''
import logging, time
import csp.job as job
import csp.util as util

class Detailed(util.JobError):
    def as_dict(self):
        return {"message": self.message, "code": 7}

@job.synchronous
def echo(task_id, input):
    return input.get("data")

@job.synchronous
def keys(task_id, input):
    return sorted(input)

@job.synchronous
def refuse(task_id, input):
    raise util.JobError("do not start message with >")

@job.synchronous
def crash(task_id, input):
    raise ValueError("serious exception")

@job.synchronous
def detailed(task_id, input):
    raise Detailed("it is detailed")

@job.synchronous
def raw(task_id, input):
    return b"\\x00\\xff raw"

@job.synchronous
def no_json(task_id, input):
    return {1, 2}

@job.synchronous
def stream(task_id, input):
    def parts():
        yield "["
        yield "1, 2]"
    return parts

@job.asynchronous
def async_echo(task_id, input):
    return input.get("data")

@job.asynchronous
def async_refuse(task_id, input):
    raise util.JobError("no")

@job.asynchronous
def async_crash(task_id, input):
    raise KeyError("x")

@job.asynchronous(timeout=0.2)
def slow(task_id, input):
    while True:
        util.check_cancelled(task_id)
        time.sleep(0.01)

@job.asynchronous
def lines(task_id, input):
    logger = logging.getLogger(task_id)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(util.StoringHandler(task_id, input))
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "line of %s", level)
    util.set_progress(task_id, 0.5, "half")
    return "logged"

@job.asynchronous
def until_cancelled(task_id, input):
    util.set_progress(task_id, 0.25)
    while True:
        util.check_cancelled(task_id)
        time.sleep(0.01)
'''
# Sentences that clients may compare (CONTRACT.md, sections 2 to 5); all others may be worded differently.
DOCUMENTED = re.compile(
    "Malformed json|Not recognised as json, make sure content type is application/json|Too many arguments. Extra keys "
    "are .*|result_url has to start with http|Please specify a job type|Job type .* not available. Available job types "
    "are .*|Please provide your API key.|metadata has to be a json object|job_id .* already exists|not authorized|"
    "job_id not found|Process completed but unable to post to result_url|cancelled|do not start message with >|no|"
    "it is detailed|ValueError: serious exception|KeyError: 'x'")
PATTERNS = (
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<id>"),
    (r"\b[0-9a-f]{32}\b", "<key>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?", "<time>"),
    (r"(127\.0\.0\.1|localhost):\d+", "<address>"),
    (r"incident [0-9a-f]+", "incident <number>"),
    (r"=[A-Za-z0-9_-]{43}\b", "=<token>"),
    (r"'sha256-[^']+'", "<hash>"),
    (r"\.[0-9a-f]{8,}\.(css|js)|[?-][0-9a-f]{8,}(?=\.|$)", "<version>"),
    (r"_before=\d+", "_before=<seq>"),
)


def clean(value, field=""):
    """Return a JSON value without what differs from run to run."""
    if isinstance(value, dict):
        return {clean(key): clean(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    if field == "next_attempt_timestamp" and value is not None:
        return "<time>"
    if field == "traceback" and isinstance(value, str):
        return value.strip().splitlines()[-1]
    if isinstance(value, str):
        for pattern, name in PATTERNS:
            value = re.sub(pattern, name, value)
    return value


def without_descriptions(value):
    """Return openapi.json without its sentences."""
    if isinstance(value, dict):
        return {key: without_descriptions(item) for key, item in value.items()
                if not (key in ("description", "summary") and isinstance(item, str))}
    return [without_descriptions(item) for item in value] if isinstance(value, list) else value


class Forms(html.parser.HTMLParser):
    """The forms, fields and links of a page, without its text."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag in ("form", "input", "select", "textarea", "button"):
            self.found.append(clean([tag, named.get("action"), named.get("method"), named.get("name"),
                                     named.get("type")]))
        elif tag in ("script", "link"):
            self.found.append([tag, named.get("rel")])


def clean_body(path, content_type, body):
    """Return what is compared of a body."""
    kind = content_type.partition(";")[0]
    text = body.decode("utf-8", "replace")
    if kind == "text/html":
        page = Forms()
        page.feed(text)
        return page.found
    if path.startswith("/metrics") and kind == "text/plain":
        return sorted({line if line.startswith("# TYPE") else line.rpartition(" ")[0]
                       for line in text.splitlines() if not line.startswith("# HELP")})
    if kind == "application/json":
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            return without_descriptions(value) if path.startswith("/openapi.json") else clean(value)
    if kind in ("text/css", "text/javascript", "application/javascript"):
        return "<asset>"
    return clean(text)


class Answer:
    """What came of one request, and what is compared of it."""

    def __init__(self, label, path, status, headers, body):
        self.label, self.status, self.body = label, status, body
        self.headers = {}
        for name, value in headers:
            value = re.sub(r"(?<=Path=)/job/[^;]+", "<path>", clean(value))
            if name.lower() in ("date", "content-length", "etag", "last-modified"):
                value = "<any>"
            elif name.lower() == "retry-after":
                value = "<seconds>"
            self.headers.setdefault(name.lower(), []).append(value)
        self.location = next((value for name, value in headers if name.lower() == "location"), "")
        self.cookies = [value.partition(";")[0] for name, value in headers if name.lower() == "set-cookie"]
        self.content = clean_body(path, next((value for name, value in headers if name.lower() == "content-type"), ""),
                                  body)

    @property
    def json(self):
        """The body's value."""
        return json.loads(self.body)


class Receiver:
    """Receives callbacks; the path says what it answers, such as /410."""

    def __init__(self):
        self.received = received = queue.Queue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.put((self.path, list(self.headers.items()), body))
                self.send_response(int(self.path[1:4]))
                self.send_header("Content-Length", "0")
                self.send_header("Location", "/200")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


class Player:
    """Sends requests to one service and keeps the answers."""

    def __init__(self, port, place):
        self.port, self.place, self.answers, self.serial, self.stage = port, place, [], 0, ""

    def send(self, method, path, body=None, headers=None):
        """Send a request without keeping the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer("", path, response.status, response.getheaders(), response.read())
        finally:
            connection.close()

    def ask(self, method, path, body=None, headers=None, label=""):
        """Send a request and keep the answer; a dictionary is sent as JSON."""
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body), {**JSON, **(headers or {})}
        answer = self.send(method, path, body, headers)
        answer.label = clean(f"{self.stage}: {method} {path[:100]} {label or (body or '')!s:.120}")
        self.answers.append(answer)
        return answer

    def form(self, path, fields, headers=None, **more):
        """Submit a form as a browser does."""
        origin = {"Origin": f"http://127.0.0.1:{self.port}", "Sec-Fetch-Site": "same-origin"}
        return self.ask("POST", path, urlencode(fields), {**HTML, **FORM, **origin, **(headers or {})}, **more)

    def submit(self, job_type, data=None, **more):
        """Submit a job; return it."""
        return self.ask("POST", "/job", {"job_type": job_type, "api_key": "an-api-key", "data": data, **more}).json

    def finish(self, job):
        """Wait until a job has ended and its callback was tried; keep how it is then."""
        path, key = "/job/" + quote(job["job_id"], safe=""), {"Authorization": job["job_key"]}
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            now = self.send("GET", path, headers=key).json
            tried = now["callback"] is None or now["callback"]["attempts"]
            if now["status"] != "pending" and tried or time.monotonic() > end:
                return self.ask("GET", path, headers=key, label="when it has ended")
            time.sleep(0.02)

    def wait_until_running(self, job):
        """Wait until a job has reported progress."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if self.send("GET", "/job/" + job["job_id"], headers={"Authorization": job["job_key"]}).json["progress"]:
                return
            time.sleep(0.02)

    def stream(self, path, headers, last):
        """Read an event stream up to an event of that name, or its end; keep kinds and data of the events."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        events, fields = [], {}
        for line in iter(response.readline, b""):
            name, _, value = line.decode("utf-8").rstrip("\r\n").partition(": ")
            if name:
                fields[name] = value
            elif fields:
                with contextlib.suppress(ValueError):
                    fields["data"] = clean(json.loads(fields.get("data", "")))
                fields.pop("id", None)
                events.append(fields)
                if fields.get("event") == last:
                    break
                fields = {}
        answer = Answer(clean(f"{self.stage}: stream {path}"), path, response.status, response.getheaders(), b"")
        answer.content = events
        self.answers.append(answer)
        connection.close()

    def raw(self, data, label):
        """Send bytes; keep the status lines and header names of what comes back, and whether the connection closes."""
        received, closed = b"", False
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(data.replace(b"HOST", b"127.0.0.1:%d" % self.port))
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while True:
                    part = connection.recv(65_536)
                    if not part:
                        closed = True
                        break
                    received += part
        statuses = re.findall(rb"HTTP/1\.[01] (\d\d\d)", received)
        head = received.partition(b"\r\n\r\n")[0].decode("latin-1")
        names = sorted(line.partition(":")[0].lower() for line in head.split("\r\n")[1:])
        answer = Answer(f"raw: {label}", "", int(statuses[0]) if statuses else 0, [], b"")
        answer.content = {"statuses": [status.decode() for status in statuses], "headers": names, "closed": closed}
        self.answers.append(answer)

    def keep(self, label, content):
        """Keep something else to compare."""
        answer = Answer(label, "", 0, [], b"")
        answer.content = content
        self.answers.append(answer)


# -- The series

def play_submissions(player):
    """Submissions of every kind, good and bad."""
    player.stage = "submit"
    for data in ("hello", None, 0, 1.5, True, [], {}, {"a": [1, None]}, "\u00fc\u2028\U0001f600", "x" * 5000):
        player.submit("echo", data)
    for job_type in ("keys", "refuse", "crash", "detailed", "raw", "no_json", "stream"):
        player.submit(job_type, "data") if job_type != "stream" else player.ask(
            "POST", "/job", {"job_type": "stream", "api_key": "k"})
    good = {"job_type": "echo", "api_key": "k", "data": "d"}
    bad = [
        {}, [], {"job_type": "echo"}, {"job_type": "echo", "api_key": ""}, {"api_key": "k"}, {"job_type": "nope"},
        {**good, "job_type": ""}, {**good, "job_type": 5}, {**good, "job_type": "nope"}, {**good, "b": 1, "a": 2},
        {**good, "result_url": "ftp://a"}, {**good, "result_url": 5}, {**good, "result_url": "http://"},
        {**good, "result_url": "http://a b/"}, {**good, "metadata": []}, {**good, "metadata": "x"},
        {**good, "api_key": []}, {**good, "api_key": True}, {**good, "api_key": 5}, {**good, "api_key": "a\nb"},
        {**good, "api_key": "Host: x"}, {**good, "api_key": "X-Key: x"}, {**good, "api_key": "\u20ac"},
        {**good, "api_key": 2**70}, {**good, "metadata": {"a": 1, "b": "x", "c": None}}, {**good, "metadata": {}},
        {**good, "result_url": ""}, {**good, "metadata": {"mimetype": "text/csv"}}]
    for body in bad:
        player.ask("POST", "/job", body)
    for body in (b"", b"{", b"x", b'"a"', b"5", b"null", b'{"a": 1,}', b"\xff", b'{"job_type": NaN}', b"[" * 200,
                 b'{"job_type": "echo", "api_key": "k", "data": 1e999}', b'{"job_type": "echo", "job_type": "echo"}',
                 b'{"job_type": "echo", "api_key": "k", "data": "\\ud800"}'):
        player.ask("POST", "/job", body, JSON)
    for kind in ("text/plain", "application/json; charset=utf-8", "application/x-www-form-urlencoded",
                 "APPLICATION/JSON", "application/problem+json"):
        player.ask("POST", "/job", json.dumps(good), {"Content-Type": kind}, label=kind)
    for job_id in ("my-id", "my-id", "\u00fc \u20ac", "a%2Fb", "a%00b", "x" * 255, "y" * 256, "a?b", "login", "%20"):
        player.ask("POST", "/job/" + (job_id if "%" in job_id else quote(job_id, safe="")), good)
    player.stage = "put"
    for body in (good, good, {**good, "data": "other"}, {**good, "api_key": "other"}, {"job_type": "nope"}):
        player.ask("PUT", "/job/put-id", body)
    player.ask("PUT", "/job/put-raw", b"x", JSON)
    player.ask("PUT", "/job", good)
    player.stage = "prefer"
    for prefer in ("respond-async", "wait=5", "wait=0", "wait=-1", "wait=x", "respond-async, wait=5", "wait=999999"):
        player.ask("POST", "/job", {**good, "job_type": "keys"}, {"Prefer": prefer}, label="sync " + prefer) if (
            "async" not in prefer or "wait=5" in prefer) else None
        if "wait=5" in prefer or "999" in prefer:
            player.ask("POST", "/job", {**good, "job_type": "async_echo"}, {"Prefer": prefer}, label="async " + prefer)


def play_jobs(player, receiver):
    """Asynchronous jobs, their callbacks, and what every caller may do with a job."""
    player.stage = "endings"
    jobs = {}
    for job_type in ("async_echo", "async_refuse", "async_crash", "slow", "lines"):
        jobs[job_type] = player.submit(job_type, "data", metadata={"kind": job_type, "n": 1})
        player.finish(jobs[job_type])
    player.stage = "callbacks"
    for job_type in ("async_echo", "async_refuse", "echo", "raw"):
        for status in ("200", "410", "500", "302"):
            if job_type == "async_echo" or status == "200":
                job = player.submit(job_type, "data", result_url=f"{receiver.url}/{status}", metadata={"s": status})
                jobs[job_type + status] = job
                player.finish(job)
                path, headers, body = receiver.received.get(timeout=PATIENCE_SECONDS)
                names = {name.lower(): value for name, value in headers}
                names = {name: value for name, value in names.items() if name not in ("content-length", "host")}
                player.keep(f"callback of {job_type} to {path}", [clean(names), clean(json.loads(body))])
    player.submit("async_echo", "x", result_url=receiver.url + "/200", api_key="X-My-Key: secret")
    _, headers, _ = receiver.received.get(timeout=PATIENCE_SECONDS)
    player.keep("callback with a header of its own", sorted(f"{n}: {v}" for n, v in headers if n.lower() == "x-my-key"))
    player.stage = "resend"
    for name in ("async_echo410", "async_echo200", "async_echo"):
        path = f"/job/{jobs[name]['job_id']}/callback"
        key = {"Authorization": jobs[name]["job_key"]}
        player.ask("POST", path, None, key)
        answer = player.ask("POST", path, {"api_key": "again"}, key)
        if answer.status == 200:
            receiver.received.get(timeout=PATIENCE_SECONDS)
            player.finish(jobs[name])
        player.ask("POST", path, {"api_key": "again", "x": 1}, key)
    return jobs


def play_roles(player, jobs, session):
    """Every route for every kind of caller."""
    own, foreign = jobs["lines"], jobs["async_echo"]
    roles = {
        "nobody": {}, "job key": {"Authorization": own["job_key"]},
        "foreign key": {"Authorization": foreign["job_key"]},
        "secure key": {"Authorization": SECURE_KEY}, "basic": {"Authorization": BASIC},
        "session": {"Cookie": session, "Origin": f"http://127.0.0.1:{player.port}"}, "cookie only": {"Cookie": session},
        "wrong key": {"Authorization": "wrong"}, "bearer": {"Authorization": "Bearer " + own["job_key"]},
        "dead session": {"Cookie": session.partition("=")[0] + "=" + "A" * 43}}
    path = "/job/" + own["job_id"]
    for role, headers in roles.items():
        player.stage = role
        for target in (path, path + "/data", path + "?limit=2", path + "?limit=x", "/job/nope", "/job/nope/data",
                       "/user"):
            player.ask("GET", target, headers=headers)
        player.ask("POST", path + "/cancel", headers=headers)
        player.ask("POST", path + "/callback", headers=headers)
        player.ask("POST", "/job/nope/cancel", headers=headers)
        player.ask("POST", path + "/resubmit", headers=headers)
        player.ask("DELETE", "/job?days=x", headers=headers)
        player.ask("DELETE", "/job?days=30", headers=headers)
        player.ask("DELETE", "/job/nope", headers=headers)
        player.ask("POST", path + "/report", {}, headers=headers)
        if role not in ("bearer", "dead session", "cookie only"):
            for target in ("/", "/job", path, path + "/data", "/login", "/console/submit"):
                player.ask("GET", target, headers={**HTML, **headers}, label="page")
    for role in ("job key", "secure key", "session"):
        player.stage = "resubmit by " + role
        answer = player.ask("POST", path + "/resubmit", {"api_key": "again"}, roles[role])
        if answer.status == 200:
            player.finish(answer.json)
        player.ask("POST", path + "/resubmit", {"api_key": "again"}, {**roles[role], "Prefer": "wait=10"}, label="wait")
        player.ask("POST", path + "/resubmit", {"api_key": "again", "x": 1}, roles[role])
        player.ask("POST", path + "/resubmit", b"x", {**JSON, **roles[role]})
    for role in ("nobody", "foreign key", "job key", "secure key", "basic", "session"):
        player.stage = "delete by " + role
        job = player.submit("keys")
        headers = {"Authorization": job["job_key"]} if role == "job key" else roles[role]
        player.ask("DELETE", "/job/" + job["job_id"], headers=headers)
        player.ask("GET", "/job/" + job["job_id"], headers={"Authorization": SECURE_KEY})
    player.stage = "running"
    for end in ("cancel", "delete"):
        job = player.submit("until_cancelled", "x")
        player.wait_until_running(job)
        target, key = "/job/" + job["job_id"], {"Authorization": job["job_key"]}
        player.ask("GET", target, headers=key)
        player.ask("GET", target + "/data", headers=key)
        player.ask("GET", target + "/data", headers={**key, "Prefer": "wait=0"})
        player.ask("POST", target + "/resubmit", {"api_key": "k"}, key)
        player.ask("GET", target, headers={**HTML, **key}, label="page")
        if end == "cancel":
            player.send("POST", target + "/cancel", headers=key)
            player.finish(job)
            player.ask("POST", target + "/cancel", headers=key, label="again")
        else:
            player.ask("DELETE", target, headers=key)
            player.ask("GET", target, headers=key)


def play_lists(player):
    """Lists and filters, other methods, CORS."""
    player.stage = "list"
    for query in ("", "?_limit=2", "?_limit=0", "?_limit=-1", "?_limit=x", "?_limit=1e3", "?_limit=99999999",
                  "?_limit=2&_offset=1", "?_offset=-1", "?_offset=x", "?_offset=100000", "?_status=complete&_limit=3",
                  "?_status=error&_limit=3", "?_status=pending", "?_status=queued", "?_status=running",
                  "?_type=echo&_limit=3", "?_type=nope", "?_id=my", "?_id=nope", "?kind=lines", "?n=1&_limit=1",
                  "?n=1&kind=slow", "?n=2", "?_metadata=kind=slow", "?_metadata=n=1&_metadata=kind=lines", "?s=410",
                  "?_before=5", "?_before=x", "?a=%FF", "?a=%zz", "?=", "?a", "?_format=json"):
        player.ask("GET", "/job" + query)
    player.ask("GET", "/job?_status=complete&_limit=3", headers={**HTML, "Authorization": SECURE_KEY}, label="page")
    player.stage = "methods"
    paths = ("/", "/status", "/metrics", "/openapi.json", "/login", "/logout", "/user", "/job", "/job/my-id",
             "/job/my-id/data", "/job/my-id/cancel", "/job/my-id/resubmit", "/job/my-id/callback", "/events", "/nope",
             "/job/my-id/nope", "/console/clear", "/console/selection")
    for path in paths:
        for method in ("HEAD", "OPTIONS", "PATCH", "TRACE", "BREW", "PUT", "DELETE"):
            if not (path == "/events" and method == "HEAD") and not (method == "PUT" and path == "/job/my-id"):
                player.ask(method, path)
    for path in ("/status/", "/job/", "//status", "/status?x=1", "/STATUS", "/%73tatus", "/../status", "/job//data",
                 "/favicon.ico", "/robots.txt"):
        player.ask("GET", path)
    player.stage = "cors"
    for origin in ("https://example.org", "https://evil.example", "null"):
        player.ask("GET", "/status", headers={"Origin": origin}, label=origin)
        player.ask("OPTIONS", "/job", headers={"Origin": origin, "Access-Control-Request-Method": "POST",
                                              "Access-Control-Request-Headers": "content-type"}, label=origin)
        player.ask("POST", "/job", {"job_type": "keys", "api_key": "k"}, {"Origin": origin}, label=origin)
    player.stage = "simple"
    for path in ("/", "/status", "/user", "/metrics", "/openapi.json"):
        player.ask("GET", path)


def log_in(player):
    """Log in and out in all ways; return the cookie of a session."""
    player.stage = "login"
    proxied = {"X-Forwarded-For": "192.0.2.7"}
    for name, headers in (("no credentials", {}), ("wrong", {"Authorization": WRONG_BASIC}),
                          ("no base64", {"Authorization": "Basic ???"}), ("good", {"Authorization": BASIC}),
                          ("https", {"Authorization": BASIC, "X-Forwarded-Proto": "https"})):
        player.ask("GET", "/login", headers={**headers, **proxied}, label=name)
    for target in ("/job", "//evil.example/", "https://evil.example/", "/a%0d%0ab", "job"):
        player.ask("GET", "/login?next=" + quote(target, safe="%"), headers={"Authorization": BASIC})
        player.ask("GET", "/logout?next=" + quote(target, safe="%"))
    player.form("/login", {"username": "admin", "password": "wrong"}, proxied)
    player.form("/login", {"username": "admin", "password": PASSWORD, "next": "/job"}, label="good form")
    player.form("/login", {"username": "admin", "password": PASSWORD}, {"Origin": "https://evil.example",
                "Sec-Fetch-Site": "cross-site"}, label="form of another site")
    gone = player.ask("GET", "/login", headers={"Authorization": BASIC}).cookies[0]
    player.ask("GET", "/user", headers={"Cookie": gone}, label="logged in")
    player.ask("POST", "/logout", headers={"Cookie": gone}, label="log out")
    player.ask("GET", "/user", headers={"Cookie": gone}, label="with a copied cookie")
    stranger = {"Authorization": WRONG_BASIC, "X-Forwarded-For": "192.0.2.9"}
    for _ in range(12):
        player.ask("GET", "/login", headers=stranger, label="guess")
    return player.send("GET", "/login", headers={"Authorization": BASIC}).cookies[0]


def play_forms(player, jobs, session):
    """The console's forms, for the administrator, the holder of a key, nobody, and from another site."""
    for role, headers in (("session", {"Cookie": session}), ("nobody", {}),
                          ("other site", {"Cookie": session, "Origin": "https://evil.example",
                                          "Sec-Fetch-Site": "cross-site"})):
        player.stage = "forms by " + role
        job = player.submit("async_echo", "data")
        player.finish(job)
        path = "/job/" + job["job_id"]
        fields = {"job_type": "async_echo", "data": '"d"', "metadata": "", "result_url": "", "api_key": "k"}
        for changed in ({}, {"data": "{"}, {"data": ""}, {"metadata": '{"a": 1}'}, {"metadata": "[]"}, {"api_key": ""},
                        {"job_type": "nope"}, {"result_url": "ftp://a"}):
            player.form("/console/submit", {**fields, **changed}, headers)
        player.form(path + "/resubmit", {"api_key": "k"}, headers)
        player.form(path + "/resubmit", {"api_key": ""}, headers)
        player.form(path + "/callback", {"api_key": "k"}, headers)
        player.form(path + "/cancel", {}, headers)
        player.form("/job/nope/cancel", {}, headers)
        player.form(path + "/key", {"job_key": "wrong"}, headers)
        player.form(path + "/key", {"job_key": job["job_key"]}, headers)
        player.form("/job/nope/key", {"job_key": "x"}, headers)
        for days in ("30", "x", "", "-1", "36500"):
            player.form("/console/clear", {"days": days}, headers)
        for action in ("resubmit", "cancel", "nope", ""):
            player.form("/console/selection", {"job_id": job["job_id"], "action": action, "api_key": "k"}, headers)
        player.form("/console/selection", {"action": "delete", "back": "/job?_status=error"}, headers)
        player.form("/console/selection", {"job_id": job["job_id"], "action": "delete", "back": "//evil"}, headers)
        player.ask("GET", path, headers={"Authorization": SECURE_KEY}, label="after the forms")
        player.form("/job/" + jobs["async_echo200"]["job_id"] + "/callback", {"api_key": ""}, headers)
    player.stage = "cookie of a key"
    job = player.submit("keys")
    path = "/job/" + job["job_id"]
    cookie = player.form(path + "/key", {"job_key": job["job_key"]}).cookies[0]
    for target in (path, path + "/data", "/job/my-id"):
        player.ask("GET", target, headers={"Cookie": cookie})
        player.ask("GET", target, headers={**HTML, "Cookie": cookie}, label="page")
    player.form(path + "/delete", {}, {"Cookie": cookie})
    player.ask("GET", path, headers={**HTML, "Cookie": cookie}, label="deleted")


def play_data(player):
    """Raw results, with every mimetype, range and encoding."""
    player.stage = "data"
    for value in ("text", {"a": 1}, [1], 5, None, "<script>"):
        for mimetype in (None, "text/csv", "text/html", "image/svg+xml", "a\nb", "nonsense", 5):
            job = player.send("POST", "/job", json.dumps({
                "job_type": "echo", "api_key": "k", "data": value,
                "metadata": {} if mimetype is None else {"mimetype": mimetype}}), JSON).json
            key = {"Authorization": job["job_key"]}
            if mimetype in (None, "text/html") or value == "text":
                player.ask("GET", f"/job/{job['job_id']}/data", headers=key, label=f"{value} as {mimetype}")
    for job_type in ("raw", "refuse", "crash", "no_json", "detailed"):
        job = player.submit(job_type)
        key = {"Authorization": job["job_key"]}
        for method, headers in (("GET", {}), ("HEAD", {}), ("GET", {"Range": "bytes=0-1"}), ("GET", HTML),
                                ("GET", {"Prefer": "wait=1"}), ("GET", {"Accept-Encoding": "gzip"})):
            player.ask(method, f"/job/{job['job_id']}/data", headers={**key, **headers}, label=f"{job_type} {headers}")


def play_streams(player, jobs):
    """The first events of streams."""
    player.stage = "events"
    for name in ("lines", "async_crash", "slow"):
        job = jobs[name]
        player.stream(f"/job/{job['job_id']}/events", {"Authorization": job["job_key"]}, "")
        player.stream(f"/job/{job['job_id']}/events", {"Authorization": job["job_key"], "Last-Event-ID": "x"}, "")
    player.ask("GET", f"/job/{jobs['lines']['job_id']}/events")
    player.ask("GET", "/job/nope/events")
    job = player.submit("until_cancelled")
    player.wait_until_running(job)
    player.stream(f"/job/{job['job_id']}/events", {"Authorization": job["job_key"]}, "progress")
    player.send("POST", f"/job/{job['job_id']}/cancel", headers={"Authorization": job["job_key"]})
    player.finish(job)


def play_raw(player):
    """Bytes for the parser."""
    get = b"GET /status HTTP/1.1\r\nHost: HOST\r\n"
    post = b"POST /job HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\n"
    body = b'{"job_type": "keys", "api_key": "k"}'
    for data in (
        get + b"\r\n", get + b"\r\n" + get + b"\r\n", get + b"Connection: close\r\n\r\n", b"\r\n" + get + b"\r\n",
        b"GET /status HTTP/1.0\r\n\r\n", b"GET /status\r\n", b"GET /status HTTP/2.0\r\nHost: a\r\n\r\n", b"\r\n\r\n",
        b"GET /status HTTP/1.1\r\n\r\n", get + b"Host: b\r\n\r\n", b"GET /status HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET  /status HTTP/1.1\r\nHost: HOST\r\n\r\n", b"GET\t/status HTTP/1.1\r\nHost: HOST\r\n\r\n", b"junk\r\n\r\n",
        b"GET http://HOST/status HTTP/1.1\r\nHost: HOST\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"GET status HTTP/1.1\r\nHost: HOST\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: HOST\r\n\r\n", get + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
        get + b"X: y\r\n" * 101 + b"\r\n", get + b"X : y\r\n\r\n", get + b"X\r\n\r\n", get + b": y\r\n\r\n",
        get + b"X: a\r\n b\r\n\r\n", get + b"X: a\0b\r\n\r\n", get + b"X: a\rb\r\n\r\n", get + b"X: \xff\r\n\r\n",
        b"GET /status HTTP/1.1\nHost: HOST\n\n", get + b"Content-Length: 0\r\n\r\n",
        get + b"Content-Length: 3\r\n\r\nabc",
        get + b"Content-Length: +3\r\n\r\nabc", get + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        get + b"Content-Length: 3, 3\r\n\r\nabc", get + b"Content-Length: \r\n\r\n",
        get + b"Content-Length: 0x3\r\n\r\n",
        post + b"Content-Length: %d\r\n\r\n" % len(body) + body + get + b"\r\n",
        post + b"Content-Length: 99999999999\r\n\r\n", post + b"Content-Length: 100\r\n\r\n{}", post + b"\r\n",
        post + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
        post + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}",
        post + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n" + get + b"\r\n",
        post + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        post + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", post + b"Transfer-Encoding: identity\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n5\nabcde\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n", get + b"Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET /status HTTP/1.1\r\nHost: HOST",
    ):
        player.raw(data, repr(data[:150]))


def play_second(player):
    """A few requests to a service with stricter settings."""
    player.stage = "strict"
    for api_key in ("good", "bad", 5):
        player.ask("POST", "/job", {"job_type": "keys", "api_key": api_key})
        player.ask("PUT", "/job/one", {"job_type": "keys", "api_key": api_key})
    for url in ("http://127.0.0.1:9/", "http://10.0.0.1/", "http://[::1]/", "http://localhost/"):
        player.ask("POST", "/job", {"job_type": "keys", "api_key": "good", "result_url": url})
    for headers in ({}, {"Authorization": BASIC}, {"Authorization": SECURE_KEY}, HTML):
        player.ask("GET", "/job", headers=headers, label=str(sorted(headers)))
    player.ask("POST", "/job", {"job_type": "keys", "api_key": "good", "data": "x" * 3000}, label="a large body")
    job = player.submit("until_cancelled", api_key="good")
    player.wait_until_running(job)
    player.ask("POST", "/job", {"job_type": "async_echo", "api_key": "good"}, label="too many wait")
    player.send("POST", f"/job/{job['job_id']}/cancel", headers={"Authorization": BASIC})
    player.finish(job)


@contextlib.contextmanager
def running(file, **settings):
    """Run a file as a service of its own; give a Player."""
    place = Path(tempfile.mkdtemp(prefix="series-"))
    shutil.copy(str(file), str(place / "csp.py"))
    (place / "series_jobs.py").write_text(JOBS, encoding="utf-8")
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "CSP_PASSWORD": PASSWORD, "CSP_GRACE_SECONDS": "1",
               "CSP_NAME": "series", **{"CSP_" + name: value for name, value in settings.items()}}
    with open(str(place / "log"), "wb") as log:
        command = [sys.executable, "csp.py", "--jobs", "series_jobs", "--port", "0", "--db", "jobs.db"]
        process = subprocess.Popen(command, cwd=str(place), env=environ, stdout=subprocess.PIPE, stderr=log)
    try:
        for line in iter(process.stdout.readline, b""):
            found = re.search(rb"http://\S+", line)
            if found:
                break
        else:
            raise SystemExit(f"{file} does not start: {(place / 'log').read_text()}")
        yield Player(urlsplit(found[0].decode()).port, place)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        shutil.rmtree(str(place), ignore_errors=True)


def play(file):
    """Return the answers of a file to the whole series."""
    receiver = Receiver()
    settings = {"SECRET_KEY": SECURE_KEY, "CORS_ORIGINS": "https://example.org", "TRUSTED_PROXIES": "127.0.0.1"}
    with running(file, **settings) as player:
        play_submissions(player)
        jobs = play_jobs(player, receiver)
        session = log_in(player)
        play_roles(player, jobs, session)
        play_lists(player)
        play_forms(player, jobs, session)
        play_data(player)
        play_streams(player, jobs)
        play_raw(player)
        player.stage = "clear"
        for query in ("?days=0", "", "?days=36500", "?days=-1", "?days=1.5", "?days="):
            player.ask("DELETE", "/job" + query, headers={"Authorization": SECURE_KEY})
        answers = player.answers
    with running(file, API_KEYS="good", PUBLIC_JOB_LIST="0", CALLBACK_HOSTS="public", MAX_BODY_BYTES="2000",
                 MAX_PENDING="1") as player:
        play_second(player)
        answers += player.answers
    receiver.server.shutdown()
    receiver.server.server_close()
    return answers


# -- The comparison

def compare(old, new, path, notes):
    """Yield the differences between two values; append sentences that may differ to ``notes``."""
    if path.endswith("/report.post.security"):
        return  # only the token of a run opens that route; the first edition's description named logins, too
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new), key=str):
            if key not in old or key not in new:
                yield f"{path}.{key}: {'only new' if key not in old else 'only old'}"
            else:
                yield from compare(old[key], new[key], f"{path}.{key}", notes)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new)):
            yield from compare(one, other, f"{path}[{number}]", notes)
    elif old != new or type(old) is not type(new):
        is_sentence = isinstance(old, str) and isinstance(new, str) and new and re.search(r"\.(error|message)$", path)
        if is_sentence and not DOCUMENTED.fullmatch(old):
            notes.add((old, new))
        else:
            yield f"{path}: {str(old)[:300]!r} became {str(new)[:300]!r}"


def main():
    """Play the series on both files and compare."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    begun = time.monotonic()
    old, new = map(play, sys.argv[1:])
    notes, count = set(), abs(len(old) - len(new))
    for one, other in zip(old, new):
        if "limit=x" in one.label and (one.status, other.status) == (409, 403):
            continue  # access is checked before the request is read: a stranger's bad parameter is 403 now
        differences = [*compare(one.label, other.label, " label", notes),
                       *compare(one.status, other.status, " status", notes),
                       *compare(one.headers, other.headers, " headers", notes),
                       *compare(one.content, other.content, " body", notes)]
        if differences:
            count += 1
            print(one.label, *differences[:10], sep="\n   ")
    for one, other in sorted(notes):
        print(f"sentence: {one!r} became {other!r}")
    print(f"{len(old)} requests, {count} with differences, {len(notes)} sentences changed, "
          f"{time.monotonic() - begun:.0f} s")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
