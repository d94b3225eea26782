#!/usr/bin/env python3
"""Make Python functions available over HTTP as synchronous or asynchronous jobs.

One file, standard library only, Python 3.8 and newer. Write ``my_jobs.py``::

    import csp.job as job

    @job.asynchronous
    def shout(task_id, input):
        return input["data"].upper()

run ``python csp.py --jobs my_jobs`` and submit::

    curl -H 'Content-Type: application/json' \\
         -d '{"job_type": "shout", "api_key": "any", "data": "hi"}' http://127.0.0.1:8000/job

When a submission is answered, its job is on disk: it will run, its result is kept, and its callback is delivered or
retried for up to 19 hours, even if this process dies in between.

Read the file from top to bottom. Each part uses only the parts above it:

    Errors, JSON and time, Settings, Metrics, Jobs, Runs, Opening, Store, Callbacks, Executors, Runner,
    Requests and responses, Auth, API description, Console, Service, Transports, Process, Predecessor's names,
    Command line
"""

from __future__ import annotations

# Modules that few starts need and that load much are imported by the functions that use them.
import argparse
import atexit
import base64
import binascii
import bisect
import collections.abc
import contextvars
import email.utils
import functools
import html
import http
import importlib
import io
import ipaddress
import itertools
import json
import logging
import os
import queue
import re
import signal
import socket
import socketserver
import sqlite3
import string
import struct
import sys
import threading
import time
import traceback
import types
import urllib.parse
import weakref
from collections import UserDict, deque, namedtuple
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from _operator import _compare_digest as compare_digest  # hmac's, without the 3.6 MB of OpenSSL that hmac loads

# http.server imports http.client, and that imports ssl: 4 MB that few services need. As a program of its own this one
# does without; who imports one of the three later, in a job for instance, gets all of it.
_is_program = __name__ == "__main__" and not sys.modules.keys() & {"ssl", "http.client"}
if _is_program:
    sys.modules["ssl"] = None  # type: ignore[assignment]  # as if this Python had none
from http.server import ThreadingHTTPServer  # noqa: E402
if _is_program:
    del sys.modules["ssl"], sys.modules["http.client"], sys.modules["http.server"], http.client, http.server

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing and its NamedTuple would take a twentieth of the start
    import ssl
    from typing import (Any, Callable, Deque, Dict, Iterable, Iterator, List, Mapping, NamedTuple, NoReturn,
                        Optional, Sequence, Set, Tuple, TypeVar, Union)

    T = TypeVar("T")
    Function = TypeVar("Function", bound=Callable[..., Any])
    Values = UserDict[str, Any]
    Labels = Tuple[Tuple[str, str], ...]
    Schema = Dict[str, Any]
    Location = Dict[str, Optional[str]]  # of a function: its module, file and name
else:
    Values = UserDict

    class _NamedTupleType(type):
        """Makes of a class what typing.NamedTuple makes of it, without a look at its annotations."""

        def __new__(mcs, name, bases, body):
            fields = body["__annotations__"]
            made = namedtuple(name, fields, defaults=[body.pop(field) for field in fields if field in body])
            for key, value in body.items():
                setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_NamedTupleType, "NamedTuple", (), {})

__version__ = "1.0.0"
__all__ = [
    "CspError", "JobCancelled", "JobError", "Registry", "Server", "Service", "Settings", "StartError",
    "StoringHandler", "load_settings", "job", "main", "util", "web", "wsgi_app",
]

log = logging.getLogger("csp")
access_log = logging.getLogger("csp.access")


# ---------------------------------------------------------------------------------------------------------------------
# Errors
#
# A refusal is an exception with an HTTP status. Any part may raise one; only Service.handle makes an answer of it.
# A StartError ends the start: one sentence on stderr, exit code 2.
# ---------------------------------------------------------------------------------------------------------------------

class CspError(Exception):
    """A refused request: an HTTP ``status`` and a ``message``, which is a sentence for the client."""

    def __init__(self, status: int, message: str, headers: Sequence[Tuple[str, str]] = (),
                 detail: Optional[str] = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)
        self.detail = detail  # explains a documented sentence, which itself may not change


class Forbidden(CspError):
    """Missing or wrong credentials."""

    def __init__(self, message: str = "not authorized") -> None:
        super().__init__(403, message)


class Conflict(CspError):
    """The content of the request is wrong (the documentation's "an error occurred")."""

    def __init__(self, message: str, headers: Sequence[Tuple[str, str]] = (), detail: Optional[str] = None) -> None:
        super().__init__(409, message, headers, detail)


class TooManyRequests(CspError):
    """Too many failed logins from one address (RFC 6585, section 4)."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(429, message, [("Retry-After", str(retry_after_seconds))])


class Unavailable(CspError):
    """The service cannot store or accept anything at the moment."""

    def __init__(self, message: str, retry_after_seconds: int = 5) -> None:
        super().__init__(503, message, [("Retry-After", str(retry_after_seconds))])


class StreamBroken(Exception):
    """A streamed result stopped before its end; its job says why."""


class StartError(Exception):
    """The service cannot start; the message is a sentence that says why and what to do."""


class JobError(Exception):
    """An expected failure of a job; it is stored as the job's error and the job is never retried.

    ``message`` is a string. A subclass may override ``as_dict`` to return more; the result has to be JSON.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def as_dict(self) -> Dict[str, Any]:
        """Return the object that the job shows as its ``error``."""
        return {"message": self.message}


class JobCancelled(BaseException):
    """Raised inside a job by ``check_cancelled``; a BaseException, so that ``except Exception`` lets it through."""


# ---------------------------------------------------------------------------------------------------------------------
# JSON and time
#
# JSON is strict RFC 8259 in both directions. Timestamps are naive local time with six digits of microseconds, because
# CKAN parses exactly that format.
# ---------------------------------------------------------------------------------------------------------------------

MAX_JSON_DEPTH = 100  # real submissions nest less than ten deep; Python's recursion limit is 1,000
MAX_JSON_VALUES = 10**6  # parsing holds the interpreter's lock, and `[]` takes thirty times the memory of its text
LARGE_JSON_BYTES = 2**20  # larger texts are parsed one at a time
_JSON_STRING = rb'"[^"]*(?:"|\Z)'  # in a text without escapes
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE_ESCAPE = r"\\u[dD][89a-fA-F]"
_quote = json.encoder.encode_basestring  # a string as JSON text, many times faster than an encoder
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode


def to_json(value: Any) -> str:
    """Return ``value`` as JSON text that UTF-8 can encode; else raise ValueError, TypeError or RecursionError."""
    if value is None:
        return "null"
    text = _quote(value) if type(value) is str else _encode_json(value)
    if not text.isascii():
        text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return text


_large_json = threading.Lock()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


_decode_json = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant).decode


def check_structure(body: bytes) -> None:
    """Raise ValueError if the JSON text ``body`` nests deeper than MAX_JSON_DEPTH or has more than MAX_JSON_VALUES."""
    brackets = body.count(b"[") + body.count(b"{")
    if brackets <= MAX_JSON_DEPTH and brackets + body.count(b",") < MAX_JSON_VALUES:
        return
    # first the escapes: one pattern for strings with them would backtrack and need fifty times the memory of the text
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    without_strings = re.sub(_JSON_STRING, b"", without_escapes)
    if sum(map(without_strings.count, (b"[", b"{", b","))) >= MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES:,} values")
    steps = map(_STEPS.__getitem__, without_strings.translate(None, _NOT_BRACKETS))
    if max(itertools.accumulate(steps), default=0) > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")


def from_json(body: bytes) -> Any:
    """Return the value of the JSON text ``body``; raise ValueError if it breaks RFC 8259 or a limit of this service."""
    with _large_json if len(body) > LARGE_JSON_BYTES else nullcontext():
        check_structure(body)
        text = body.decode("utf-8-sig")  # a byte order mark may be ignored (section 8.1)
        value = _decode_json(text)
        if re.search(_SURROGATE_ESCAPE, text):
            to_json(value)  # raises for a lone surrogate
        return value


def sign(key: bytes, message: bytes) -> bytes:
    """Return the HMAC-SHA256 of a message (RFC 2104)."""
    import hmac
    return hmac.new(key, message, "sha256").digest()


def is_same(given: str, wanted: str) -> bool:
    """Return whether two secrets are equal, in constant time."""
    return compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))


def make_token() -> str:
    """Return 256 random bits as text for addresses and cookies."""
    return base64.urlsafe_b64encode(os.urandom(32)).decode("ascii").rstrip("=")


def jitter(most: float) -> float:
    """Return a random number from 1 to ``most``, so that what failed together is not retried together."""
    return 1.0 + (most - 1.0) * os.urandom(1)[0] / 255


def timestamp(instant: float) -> str:
    """Return an instant (epoch seconds) as naive local time, ``%Y-%m-%dT%H:%M:%S.%f`` (always six digits)."""
    whole, micros = divmod(round(instant * 1_000_000), 1_000_000)
    return "%s.%06d" % (_local_second(whole), micros)


@functools.lru_cache(maxsize=16)  # a line of a job's log costs a tenth less
def _local_second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(whole))


def epoch_seconds(text: str) -> float:
    """Return the instant of a timestamp; 0.0 for any other text, which another program may have written."""
    whole, _, fraction = text.partition(".")
    try:
        return time.mktime(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")
    except (ValueError, OverflowError):
        return 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Settings
#
# One row for each setting: name, parser, default, help, and its command-line option if it has one. README.md documents
# every row (a test compares them). A parser gets a value from a Python settings file or a text from the environment.
# ---------------------------------------------------------------------------------------------------------------------

def _matching(pattern: str, message: str) -> Callable[[Any], Any]:
    def parse(value: Any) -> str:
        if not re.fullmatch(pattern, str(value), re.DOTALL):
            raise ValueError(message)
        return str(value)
    return parse


def _flag(value: Any) -> bool:
    word = str(value).strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off", "none", ""):
        return False
    raise ValueError("has to be true or false")


def _number(minimum: float, maximum: float, kind: Callable[[Any], Any] = int) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        try:
            number = kind(str(value).strip())
        except ValueError:
            raise ValueError("has to be a number") from None
        if not minimum <= number <= maximum:
            raise ValueError(f"has to be between {minimum:,} and {maximum:,}")
        return number
    return parse


def _list_of(parse: Callable[[str], Any] = str) -> Callable[[Any], Any]:
    def parse_list(value: Any) -> Tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else () if value is None else value
        if not isinstance(items, (list, tuple, set, frozenset)):
            raise ValueError("has to be a list, or words separated by commas")
        return tuple(parse(str(item).strip()) for item in items if str(item).strip())
    return parse_list


def database_path(uri: str) -> Optional[str]:
    """Return the file of a database URI or plain path, None for a database in memory."""
    if uri in ("sqlite://", "sqlite:///:memory:", ":memory:"):
        return None
    return uri[len("sqlite:///"):] if uri.startswith("sqlite:///") else uri


OWN_SECRETS = frozenset(("PASSWORD", "SECRET_KEY", "API_KEYS", "CALLBACK_SECRET"))  # do not go to other machines


class Setting(NamedTuple):
    """A row of the settings table. A setting whose default is None may be left empty."""

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    option: str = ""


_match_address = _matching(r"https?://[^/?#\s]+(?:/[^?#\s]*)?", "has to be an address such as http://10.0.0.5:8000/")
_BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
SETTINGS = (
    Setting("NAME", str, "csp", "name of the service, shown by `/status`", "--name"),
    Setting("HOST", _matching(".+", "has to be an address; 0.0.0.0 or :: for all"), "127.0.0.1",
            "address to listen on; `0.0.0.0` or `::` for all", "--host"),
    Setting("PORT", _number(0, 65535), 8000, "port to listen on; 0 picks a free one", "--port"),
    Setting("USERNAME", str, "admin", "the administrator's name"),
    Setting("PASSWORD", str, None, "the administrator's password, or its hash from `--hash-password`; without it one "
            "is made and printed at each start"),
    Setting("SECRET_KEY", str, None, "the secure key, which opens every job; without it there is none"),
    Setting("SQLALCHEMY_DATABASE_URI", _matching(r"(?!.*://).+|sqlite://(/.+)?", "has to be sqlite:///relative/path, "
            "sqlite:////absolute/path or sqlite://, because jobs are stored in SQLite and in nothing else"),
            "sqlite:///jobs.db", "the database: `sqlite:///relative`, `sqlite:////absolute`, `sqlite://` for memory, "
            "or a path; the variable DATABASE_URL is read too", "--db"),
    Setting("WORKERS", _number(1, 10_000), 16, "asynchronous jobs that run at the same time; more than there are "
            "cores, because jobs mostly wait for the network, but each may hold a file in memory", "--workers"),
    Setting("EXECUTOR", _matching(r"thread|process|.+:[^\W\d]\w*", "has to be thread, process, or MODULE:FACTORY"),
            "thread", "what runs asynchronous jobs: `thread`; `process`, one for each job; or `MODULE:FACTORY`, a "
            "function that gets the settings and returns a `concurrent.futures.Executor`", "--executor"),
    Setting("URL", lambda value: _match_address(value).rstrip("/") + "/", None, "address at which workers on other "
            "machines reach the service; by default the one that it listens on"),
    Setting("KEEP_JOBS_AGE", _number(0, 36_500), 10, "days that finished jobs are kept when old ones are cleared"),
    Setting("AUTO_CLEAR", _flag, False, "clear jobs older than KEEP_JOBS_AGE at the start and then daily"),
    Setting("MAX_PENDING", _number(1, 10**12), None, "unfinished jobs above which a submission is answered "
            "503; no limit by default, because CKAN never repeats a refused submission"),
    Setting("GRACE_SECONDS", _number(0, 86_400, float), 30.0, "how long jobs may go on when the service is stopped"),
    Setting("MAX_BODY_BYTES", _number(1024, 2**31), 64 * 2**20, "largest request body; several copies are in memory"),
    Setting("MAX_URL_BYTES", _number(100, 2**20), 8192, "longest request line; RFC 9112 asks for at least 8,000"),
    Setting("MAX_HEADER_BYTES", _number(1000, 2**20), 65_536, "largest request head; browsers send a few kB"),
    Setting("MAX_HEADER_FIELDS", _number(10, 10_000), 100, "most header fields; browsers send about twenty"),
    Setting("HEADER_SECONDS", _number(1, 3600, float), 15.0, "how long a client may take to send a request's head"),
    Setting("BODY_SECONDS", _number(1, 3600, float), 30.0, "how long a client may take to send a small body"),
    Setting("BODY_BYTES_PER_SECOND", _number(1, 2**30), 16_384, "how fast a client has to send or read a large one"),
    Setting("SEND_SECONDS", _number(1, 3600, float), 60.0, "how long a client may stop reading a small answer"),
    Setting("IDLE_SECONDS", _number(1, 3600, float), 60.0, "how long an unused connection is kept open"),
    Setting("MAX_WAIT_SECONDS", _number(0, 86_400), 55, "the longest `Prefer: wait`; most proxies give up after 60"),
    Setting("MAX_CONNECTIONS", _number(1, 100_000), 2500, "most connections; each has a thread. Above it a new "
            "connection closes the one unused longest; if all are in use, the new one is answered 503"),
    Setting("MAX_CONNECTIONS_PER_ADDRESS", _number(1, 100_000), 1250, "most connections from one address that is not a "
            "trusted proxy; half of all, so that one client cannot take them all"),
    Setting("SESSION_IDLE_SECONDS", _number(60, 10**9, float), 3600.0, "an unused login ends after this time"),
    Setting("SESSION_SECONDS", _number(60, 10**9, float), 43_200.0, "a login ends after this time, used or not"),
    Setting("API_KEYS", _list_of(), (), "if set, only these may submit; each as it is or hashed by `--hash-password`"),
    Setting("CORS_ORIGINS",
            _list_of(_matching(r"https?://[^/?#\s]+", "has to list origins such as https://example.org")), (),
            "origins such as `https://example.org` whose pages may use the service from a browser; none by default"),
    Setting("PUBLIC_JOB_LIST", _flag, True, "anybody may list job ids (`GET /job`); off: administrators only"),
    Setting("TRUSTED_PROXIES", _list_of(lambda word: str(ipaddress.ip_network(word, strict=False))), (),
            "addresses or networks of reverse proxies whose `X-Forwarded-For`, `X-Forwarded-Proto` and "
            "`X-Forwarded-Host` are believed"),
    Setting("SSL_VERIFY", _flag, True, "verify the TLS certificates of callback receivers"),
    Setting("CALLBACK_HOSTS", _list_of(), (), "where callbacks may go: anywhere by default; `public` for all but "
            "private, loopback and link-local addresses; or host names, addresses and networks"),
    Setting("CALLBACK_SECRET", _matching(f"(?!whsec_).+|whsec_(?=.){_BASE64}", "begins with whsec_, so base64 follows"),
            None, "signs callbacks as Standard Webhooks 1.0: `whsec_` and base64, or any text"),
    Setting("LOG_FILE", str, None, "log to this file, mode 0600; rotated at 64 MiB, five are kept", "--log-file"),
    Setting("STDERR", _flag, True, "log to standard error"),
    Setting("ADMINS", _list_of(), (), "mail errors to these addresses, through the mail server on 127.0.0.1"),
    Setting("FROM_EMAIL", str, "csp@localhost", "sender of those mails"),
    Setting("DEBUG", _flag, False, "log more; never changes what a client sees"),
)


class Settings(Values):
    """The settings by upper-case name; other upper-case names of a settings file are kept too."""

    __repr__ = object.__repr__  # shows no secrets

    def __init__(self, values: Optional[Mapping[str, Any]] = None, doubts: Sequence[str] = (),
                 origins: Optional[Mapping[str, str]] = None) -> None:
        """Put ``values`` over the defaults; raise StartError for a wrong one.

        ``doubts`` are warnings for the log; ``origins`` say where a value comes from.
        """
        self.doubts = doubts
        self.data = {row.name: row.default for row in SETTINGS}
        self.data.update(values or {})
        for row in SETTINGS:
            value = self.data[row.name]
            try:
                self.data[row.name] = None if row.default is None and value in (None, "") else row.parse(value)
            except ValueError as error:
                origin = (origins or {}).get(row.name)
                is_secret = row.name in (*OWN_SECRETS, "SQLALCHEMY_DATABASE_URI")  # another engine's holds a password
                found = f"; {origin} says {'something else' if is_secret else repr(value)}" if origin else ""
                raise StartError(f"The setting {row.name} {error}{found}.") from None


def _read_settings_file(path: str) -> Dict[str, Any]:
    """Run a Python settings file and return its upper-case names."""
    names: Dict[str, Any] = {"__file__": path, "__name__": "csp_settings"}
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise StartError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    try:
        exec(compile(source, path, "exec"), names)
    except (Exception, SystemExit) as error:
        raise StartError(f"The settings file {path} fails: {type(error).__name__}: {error}.") from error
    return {name: value for name, value in names.items() if name.isupper()}


def load_settings(file: Optional[str] = None, environ: Optional[Mapping[str, str]] = None,
                  overrides: Optional[Mapping[str, Any]] = None) -> Settings:
    """Return defaults, overlaid by the settings file (else the one that JOB_CONFIG names), environment, overrides.

    ``environ`` defaults to the process's; its DATABASE_URL and CSP_<NAME> count. Raises StartError for what is wrong.
    """
    environ = os.environ if environ is None else environ
    path = file or environ.get("JOB_CONFIG")
    values = _read_settings_file(path) if path else {}
    known = {row.name for row in SETTINGS}
    given = {**{name: name for name in values},
             **{name: name[len("CSP_"):] for name in environ if name.startswith("CSP_")}}
    doubts = []
    if path and not values:
        doubts.append(f"The settings file {path} sets nothing: it is Python, with lines such as PORT = 8000.")
    for name in sorted(name for name in given if given[name] not in known):  # the others may be settings of the jobs
        import difflib
        doubts += [f"{name} is no setting; is {found} meant?"
                   for found in difflib.get_close_matches(given[name], known, 1, 0.75)]
    origins = dict.fromkeys(values, f"the settings file {path}")
    for name, variable in (("SQLALCHEMY_DATABASE_URI", "DATABASE_URL"), *((name, "CSP_" + name) for name in known)):
        if re.match("(tcp|udp|sctp)://", environ.get(variable, "")):  # Kubernetes, for a service that is called csp
            doubts.append(f"{variable} is not read: {environ[variable]} is no value for the setting {name}")
        elif variable in environ and (variable != "DATABASE_URL" or environ[variable]):
            values[name], origins[name] = environ[variable], f"the variable {variable}"
    values.update(overrides or {})
    origins.update(dict.fromkeys(overrides or {}, "the command line"))
    return Settings(values, doubts, origins)


class Config(Values):
    """The settings in use, as ``web.app.config``: those of file and environment, loaded when first read."""

    __repr__ = object.__repr__  # shows no secrets

    def __init__(self) -> None:
        self._is_fixed = False  # by the command line, whose settings web.init() in a job module must not replace

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings in use."""
        return load_settings()

    @property
    def data(self) -> Dict[str, Any]:  # type: ignore[override]
        return self.settings.data

    def load(self, settings: Optional[Settings] = None) -> None:
        """Use ``settings`` from now on, or load those of file and environment unless such settings were given."""
        if settings is not None or not self._is_fixed:
            self._is_fixed = settings is not None
            self.settings = load_settings() if settings is None else settings


config = Config()  # of this process


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
#
# Counters and histograms since the start, for Prometheus (prometheus.io/docs/instrumenting/exposition_formats). Any
# thread may add to them. Gauges are asked of the store and the runner.
# ---------------------------------------------------------------------------------------------------------------------

JOB_BUCKETS = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0)  # seconds: from an echo to a large import
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metric:
    """A counter for each set of labels, or with ``buckets`` (upper bounds in seconds) a histogram."""

    def __init__(self, name: str, help: str, buckets: Tuple[float, ...] = ()) -> None:
        self.name, self._help, self._buckets = name, help, buckets
        self._lock = threading.Lock()
        self._counts: Dict[Labels, List[int]] = {}
        self._sums: Dict[Labels, float] = {}

    def add(self, labels: Labels = (), value: float = 1.0) -> None:
        """Count one event; a histogram counts an observation of ``value`` seconds."""
        with self._lock:
            counts = self._counts.get(labels)
            if counts is None:
                counts = self._counts[labels] = [0] * (len(self._buckets) + 1)
                self._sums[labels] = 0.0
            counts[bisect.bisect_left(self._buckets, value)] += 1
            self._sums[labels] += value

    def totals(self) -> List[Tuple[Labels, float]]:
        """Return the count for each set of labels."""
        with self._lock:
            return [(labels, sum(counts)) for labels, counts in sorted(self._counts.items())]

    def lines(self) -> List[str]:
        """Return the metric in the text format."""
        if not self._buckets:
            return metric_lines(self.name, "counter", self._help, self.totals())
        lines = metric_lines(self.name, "histogram", self._help, [])
        with self._lock:
            for labels, counts in sorted(self._counts.items()):
                for bound, count in zip((*self._buckets, "+Inf"), itertools.accumulate(counts)):
                    lines.append(f"{self.name}_bucket{_label_text((*labels, ('le', str(bound))))} {count}")
                lines.append(f"{self.name}_sum{_label_text(labels)} {self._sums[labels]:.6f}")
                lines.append(f"{self.name}_count{_label_text(labels)} {sum(counts)}")
        return lines


def metric_lines(name: str, kind: str, help: str, rows: Iterable[Tuple[Labels, float]]) -> List[str]:
    """Return a metric in the text format: its description and a line for each (labels, value)."""
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}",
            *(f"{name}{_label_text(labels)} {round(value, 3):.12g}" for labels, value in rows)]


def _label_text(labels: Labels) -> str:
    escaped = [(name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels]
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if escaped else ""


class Metrics:
    """The counters and histograms of a service."""

    def __init__(self) -> None:
        self.started = time.time()
        self.jobs = Metric("csp_job_duration_seconds", "Run time of jobs, by type and outcome.", JOB_BUCKETS)
        self.requests = Metric("csp_request_duration_seconds", "Time to answer requests, without streams.",
                               REQUEST_BUCKETS)
        self.callbacks = Metric("csp_callback_attempts_total", "Attempts to deliver callbacks, by result.")

    def render(self, now: List[str]) -> str:
        """Return all metrics in the text format, after the lines ``now`` of the gauges."""
        responses = metric_lines("csp_responses_total", "counter", "Responses by route and status.",
                                 self.requests.totals())
        return "\n".join([*now, *self.jobs.lines(), *self.requests.lines(), *responses, *self.callbacks.lines(), ""])


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
#
# The record and what is known about it without a database. A job is queued, then running, then complete or error;
# TRANSITIONS is the whole lifecycle, and finished is final. Clients know three words: a job that is queued or running
# is "pending" to them. Each attempt ends in one Ending; the Runner decides whether that finishes or requeues the job.
# ---------------------------------------------------------------------------------------------------------------------

QUEUED, RUNNING, COMPLETE, ERROR = "queued", "running", "complete", "error"
PENDING = "pending"
TRANSITIONS: Dict[str, Sequence[str]] = {
    QUEUED: (RUNNING, ERROR), RUNNING: (QUEUED, COMPLETE, ERROR), COMPLETE: (), ERROR: ()}
MAX_TIMEOUT_SECONDS = 10**9  # 30 years; the system cannot wait much longer (threading.TIMEOUT_MAX)
MAX_ATTEMPTS = 3  # a job that kills the whole process must not do so forever
LARGE_CHARACTERS = 2**20  # longer texts have a row of their own and are sent in pieces of this size
BACKOFF_SECONDS = (1.0, 300.0)  # first and longest pause before an attempt is repeated; doubled each time,
BACKOFF_JITTER = 1.5  # and multiplied by up to this
AFTER_CRASH, AFTER_STOP = 0.0, 1.0  # run_at (epoch seconds) of a job to run again: before everything else that waits
CANCELLED = "cancelled"

# How an attempt can end: the function returned or raised; it took too long; it was never begun; its own worker process
# died; the executor lost it; the executor or the whole service died; the service was stopped. Or it was told to stop:
# then the kind is CANCELLED, which is the job's error message, too.
ENDED, TIMED_OUT, NOT_STARTED, DIED, LOST, CRASHED, STOPPED = (
    "ended", "timed out", "not started", "died", "lost", "crashed", "stopped")


def check_transition(old: str, new: str) -> None:
    if new not in TRANSITIONS[old]:
        raise ValueError(f"a job that is {old} cannot become {new}")


class Job(NamedTuple):
    """A job's record. ``sent_data``, ``data``, ``error``, ``metadata`` and ``progress`` are JSON texts or None.

    ``data`` is bytes if the function returned bytes. ``run_at`` (epoch seconds, the earliest start) is None unless the
    job is queued; ``callback_at`` (epoch seconds, the next delivery) is None unless one is due. Of its ``attempts``,
    ``crashes`` ended with the process and ``failures`` with an exception that was retried; an orderly stop is neither.
    """

    seq: int
    job_id: str
    job_type: str
    status: str
    sent_data: Optional[str]
    data: Union[str, bytes, None]
    error: Optional[str]
    metadata: Optional[str]
    result_url: Optional[str]
    api_key: Union[str, int, float, None]
    job_key: str
    requested_timestamp: str
    started_timestamp: Optional[str] = None
    finished_timestamp: Optional[str] = None
    run_at: Optional[float] = None
    attempts: int = 0
    synchronous: int = 0
    cancelled: int = 0
    progress: Optional[str] = None
    callback_status: Optional[str] = None
    callback_attempts: int = 0
    callback_error: Optional[str] = None
    callback_at: Optional[float] = None
    callback_host: Optional[str] = None
    resubmitted_from: Optional[str] = None
    submission_hash: Optional[str] = None
    crashes: int = 0
    failures: int = 0

    @property
    def state(self) -> str:
        """QUEUED, RUNNING, COMPLETE or ERROR."""
        if self.status != PENDING:
            return self.status
        return RUNNING if self.run_at is None else QUEUED

    @property
    def is_suspect(self) -> bool:
        """Whether one more crash would exhaust the attempts of this queued job."""
        return self.run_at == AFTER_CRASH and self.crashes >= MAX_ATTEMPTS - 1

    def read_input(self) -> Dict[str, Any]:
        value = {"job_type": self.job_type, "api_key": self.api_key}
        for key, text in (("data", self.sent_data), ("metadata", self.metadata)):
            if text is not None:
                value[key] = json.loads(text)
        if self.result_url is not None:
            value["result_url"] = self.result_url
        return value


class LogLine(NamedTuple):
    timestamp: str
    message: str
    level: str
    module: str
    funcName: str
    lineno: int


class Outcome(NamedTuple):
    """What a job's function came to: the JSON text or bytes of its result, or the JSON text of its error object."""

    status: str
    data: Union[str, bytes, None] = None
    error: Optional[str] = None
    may_retry: bool = False


def failure(message: str, may_retry: bool = False) -> Outcome:
    return Outcome(ERROR, error=to_json({"message": message}), may_retry=may_retry)


class Ending(NamedTuple):
    """How an attempt ended. ``outcome``: what the function came to (ENDED); ``reason``: a sentence (all others)."""

    kind: str
    outcome: Optional[Outcome] = None
    reason: str = ""


class Finish(NamedTuple):
    outcome: Outcome


class Requeue(NamedTuple):
    """The decision that the job runs again, from ``run_at`` on (epoch seconds); ``message`` goes to its log."""

    run_at: float
    crashes: int
    failures: int
    message: str


class Claim(NamedTuple):
    """The jobs that a runner may start; when the next one is due (epoch seconds), None if there is none; and whether
    the next one is a suspect, which has to run alone."""

    jobs: List[Job]
    next_at: Optional[float]
    is_suspect: bool


def callback_host(url: str) -> str:
    """Return the host and port of a URL, lower case: callbacks to one host wait for each other."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2].lower()


# -- what clients see

POST_FAILED = to_json({"message": "Process completed but unable to post to result_url"})


class Pieces:
    """Texts that are too large to be joined: iterating yields them in UTF-8, in pieces of LARGE_CHARACTERS."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return sum(map(len, self._texts if all(text.isascii() for text in self._texts) else self))

    def __iter__(self) -> Iterator[bytes]:
        for text in self._texts:
            for begin in range(0, len(text), LARGE_CHARACTERS):
                yield text[begin:begin + LARGE_CHARACTERS].encode("utf-8")


def _log_line_to_json(line: LogLine) -> str:
    moment, message, level, module, function, lineno = line
    try:
        return (f'{{"timestamp": {_quote(moment)}, "message": {_quote(message)}, "level": {_quote(level)}, '
                f'"module": {_quote(module)}, "funcName": {_quote(function)}, "lineno": {lineno or 0}}}')
    except TypeError:  # NULL, from another program
        return to_json(line._asdict())


def render_job(job: Job, logs: Iterable[LogLine], job_key: bool = False, callback_error: bool = True,
               ) -> Union[bytes, Pieces]:
    """Return the job as clients see it, JSON in UTF-8, a large one in pieces. Stored JSON texts are never parsed.

    ``job_key``: show it (submit, callback). ``callback_error``: show a failing delivery as the job's error.
    """
    error, callback, data = job.error, "null", job.data
    if job.callback_status is not None:
        next_at = None if job.callback_at is None else timestamp(job.callback_at)
        callback = to_json({"status": job.callback_status, "attempts": job.callback_attempts,
                            "error": job.callback_error, "next_attempt_timestamp": next_at})
        if error is None and callback_error and job.callback_attempts and job.callback_status != "delivered":
            error = POST_FAILED
    if isinstance(data, bytes):
        data = to_json({"base64": base64.b64encode(data).decode("ascii")})
    texts = [
        f'{{"job_id": {_quote(job.job_id)}, "job_type": {_quote(job.job_type)}, "status": {_quote(job.status)}, '
        '"sent_data": ', "{}" if job.sent_data in (None, "null") else job.sent_data or "", ', "data": ', data or "null",
        f', "error": {error or "null"}, "metadata": {job.metadata or "{}"}, '
        f'"logs": [{", ".join(map(_log_line_to_json, logs))}], '
        f'"result_url": {to_json(job.result_url)}, '
        f'"requested_timestamp": {to_json(job.requested_timestamp)}, '
        f'"started_timestamp": {to_json(job.started_timestamp)}, '
        f'"finished_timestamp": {to_json(job.finished_timestamp)}, "progress": {job.progress or "null"}, '
        f'"attempts": {job.attempts}, "callback": {callback}, '
        f'"resubmitted_from": {to_json(job.resubmitted_from)}',
        f', "job_key": {to_json(job.job_key)}}}' if job_key else "}"]
    return "".join(texts).encode("utf-8") if sum(map(len, texts)) < LARGE_CHARACTERS else Pieces(texts)


# -- job types

class JobType(NamedTuple):
    """A registered function and how it wants to be run; ``timeout`` in seconds, ``memory_limit`` in bytes, or None."""

    name: str
    function: Callable[[str, Dict[str, Any]], Any]
    synchronous: bool
    timeout: Optional[float] = None
    retries: int = 0
    at_most_once: bool = False
    memory_limit: Optional[float] = None


class Registry:
    """The job types of a service, by name. Its decorators return the function unchanged."""

    def __init__(self) -> None:
        self._types: Dict[str, JobType] = {}
        self.is_in_use = True  # False in a worker process, which may import the modules of several services

    def synchronous(self, function: Optional[Function] = None, *, timeout: Optional[float] = None) -> Any:
        """Register a function whose submission is answered when it has returned.

        ``timeout`` in seconds. Raises TypeError or ValueError for a wrong option or a second function of the name.
        """
        return self._register(function, synchronous=True, timeout=timeout)

    def asynchronous(self, function: Optional[Function] = None, *, timeout: Optional[float] = None, retries: int = 0,
                     at_most_once: bool = False, memory_limit: Optional[float] = None) -> Any:
        """Register a function whose jobs are queued.

        ``timeout`` in seconds; ``retries``: how often an attempt that raised anything but JobError is repeated;
        ``at_most_once``: a job that was running when the process died ends as an error instead of running again;
        ``memory_limit`` in bytes, of the job's process, where it has its own (RLIMIT_DATA). Raises TypeError or
        ValueError for a wrong option or a second function of the name.
        """
        return self._register(function, synchronous=False, timeout=timeout, retries=retries, at_most_once=at_most_once,
                              memory_limit=memory_limit)

    def get(self, name: Any) -> Optional[JobType]:
        """Return the job type of that name, or None."""
        return self._types.get(name) if isinstance(name, str) else None

    def names(self) -> List[str]:
        """Return the names, sorted."""
        return sorted(self._types)

    def _register(self, function: Optional[Function], **options: Any) -> Any:
        if function is None:
            return functools.partial(self._register, **options)
        name = function.__name__
        known, job_type = self._types.get(name), JobType(name, function, **options)
        _check_job_type(job_type)
        if job_type.memory_limit is not None:
            job_type = job_type._replace(memory_limit=int(job_type.memory_limit))
        if known is not None and self.is_in_use and _place(known.function) != _place(function):
            raise ValueError(f"two job types are called {name}: {_place(known.function)} and {_place(function)}; "
                             "rename one")
        self._types[name] = job_type
        return function


def _check_job_type(job_type: JobType) -> None:
    name, function, _, timeout, retries, _, memory_limit = job_type
    for option, number in (("timeout", timeout), ("retries", retries), ("memory_limit", memory_limit)):
        if number is not None and not isinstance(number, (int, float)):
            raise TypeError(f"{name}: {option} has to be a number")
    if timeout is not None and not 0 < timeout <= MAX_TIMEOUT_SECONDS or retries < 0:
        raise ValueError(f"{name}: timeout has to be above 0 and at most {MAX_TIMEOUT_SECONDS:,}, retries not below 0")
    if memory_limit is not None and not 0 < memory_limit < 2**63:
        raise ValueError(f"{name}: memory_limit has to be a number of bytes")
    flags = function.__code__.co_flags if isinstance(function, types.FunctionType) else 0
    if flags & (0x20 | 0x80 | 0x200):  # inspect.CO_GENERATOR, CO_COROUTINE and CO_ASYNC_GENERATOR
        raise TypeError(f"{name}: a job has to be a plain function, neither async nor a generator")


def _place(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    where = f" (line {code.co_firstlineno} of {code.co_filename})" if code else ""
    return f"{function.__module__}.{function.__qualname__}{where}"


def make_ids() -> Tuple[str, str]:
    """Return a new job's id, a random UUID (RFC 9562, version 4), and its key: 120 and 128 random bits."""
    digits = os.urandom(32).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:32]}", digits[32:]


registry = Registry()  # filled by the decorators of the module ``job``


# ---------------------------------------------------------------------------------------------------------------------
# Runs
#
# One attempt at a job is a Run, which the job's function reaches through a context variable. It keeps log lines and
# progress until somebody has stored them: whoever does so peeks, writes, and drops them after the commit, so that a
# failed commit loses nothing. A Run that has ended takes nothing more.
# ---------------------------------------------------------------------------------------------------------------------

MAX_LOG_MESSAGE = 65_536  # characters; longer texts belong into the result
MAX_UNSTORED_CHARACTERS = 2**21  # of its log: a job that is further ahead of the disk waits
LINE_CHARACTERS = 100  # what a line costs beside its message
_GENERATED_ID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # others may be the names of a library's loggers


class Output(NamedTuple):
    """What a run has to say that is not stored: log lines, and its progress (JSON text) if that has changed."""

    lines: List[LogLine]
    progress: Optional[str]


class Run:
    """One attempt at one job: its log, its progress, and whether it was told to stop.

    Any thread may call the methods. ``announce(run, is_log)`` is called, without the lock, when there is output, and
    not again before somebody has peeked at it.
    """

    def __init__(self, job_id: str, seq: int, attempt: int, announce: Callable[[Run, bool], None],
                 timeout_seconds: Optional[float] = None) -> None:
        self.job_id, self.seq, self.attempt = job_id, seq, attempt
        self.started_at = self.begun_at = time.monotonic()
        self.timeout_seconds = timeout_seconds
        self.peeked_at = 0.0  # monotonic: when somebody last took output
        self.is_cancelled = self.is_ended = self.has_logged = False
        self.progress: Optional[str] = None
        self.handlers: List[StoringHandler] = []
        self.has_generated_id = re.fullmatch(_GENERATED_ID, job_id) is not None
        self._old_loggers = set() if self.has_generated_id else _loggers_named_by(job_id)
        self._announce = announce
        self._condition = threading.Condition(threading.Lock())  # guards what follows, and how it begins and ends
        self._lines: Deque[LogLine] = deque()
        self._characters = 0
        self._max_characters: float = MAX_UNSTORED_CHARACTERS
        self._is_progress_new = self._is_begun = False
        self._announced = 0  # 1: progress, 2: log lines (and progress)

    @property
    def deadline(self) -> Optional[float]:
        """When the attempt has taken too long (monotonic seconds), None if it may take any time."""
        return None if self.timeout_seconds is None else self.begun_at + self.timeout_seconds

    @property
    def has_output(self) -> bool:
        return bool(self._lines) or self._is_progress_new

    def begin(self) -> bool:
        """Return True to the first caller only: an executor may run what it has refused."""
        with self._condition:
            is_first, self._is_begun = not self._is_begun and not self.is_ended, True
            return is_first

    def end(self, last_line: Optional[LogLine] = None) -> bool:
        """Take nothing more, after ``last_line``; return True to the first caller only: an attempt ends once."""
        with self._condition:
            if self.is_ended:
                return False
            if last_line is not None:
                self._lines.append(last_line)
            self.is_ended = True
            self._condition.notify_all()
        if _runs.get(self.job_id) is self:
            del _runs[self.job_id]
        if self.handlers or self.job_id in logging.root.manager.loggerDict:
            self._clean_loggers()
        return True

    def tell_to_stop(self) -> None:
        self.is_cancelled = True

    def add_line(self, line: LogLine) -> None:
        """Add to the job's log; wait for the disk if the job is too far ahead of it."""
        with self._condition:
            if self.is_ended:
                return
            self.has_logged = True
            self._lines.append(line)
            self._characters += len(line.message) + LINE_CHARACTERS
            must_announce, self._announced = self._announced < 2, 2
        if must_announce:
            self._announce(self, True)
        if self._characters > self._max_characters:
            with self._condition:
                self._condition.wait_for(lambda: self.is_ended or self._characters <= self._max_characters)

    def set_progress(self, fraction: float, message: Optional[str]) -> None:
        text = to_json({"fraction": min(1.0, max(0.0, float(fraction))),
                        "message": None if message is None else clean(str(message))})
        with self._condition:
            if self.is_ended:
                return
            self.progress, self._is_progress_new = text, True
            must_announce, self._announced = not self._announced, max(1, self._announced)
        if must_announce:
            self._announce(self, False)

    def peek(self, skip: int = 0) -> Output:
        """Return the output that is not stored, without its first ``skip`` lines; what follows is announced again."""
        with self._condition:
            self._announced, self.peeked_at = 0, time.monotonic()
            return Output(list(itertools.islice(self._lines, skip, None)),
                          self.progress if self._is_progress_new else None)

    def drop(self, output: Output) -> None:
        """Forget output that was stored: it has to be the oldest that there is."""
        with self._condition:
            for line in output.lines:
                self._lines.popleft()
                self._characters -= len(line.message) + LINE_CHARACTERS
            if output.progress is self.progress:
                self._is_progress_new = False
            self._condition.notify_all()

    def limit_backlog(self, is_limited: bool) -> None:
        """Let the job wait when it is far ahead of whoever takes its output, or never."""
        with self._condition:
            self._max_characters = MAX_UNSTORED_CHARACTERS if is_limited else float("inf")
            self._condition.notify_all()

    def _clean_loggers(self) -> None:
        """Remove the run's handlers from all loggers, and the loggers that were made for this job (named by its id)."""
        known = logging.root.manager.loggerDict
        own = _loggers_named_by(self.job_id) - self._old_loggers
        for logger in [logging.root, *known.values()]:
            if isinstance(logger, logging.PlaceHolder):
                for child in [child for child in logger.loggerMap if child.name in own]:
                    del logger.loggerMap[child]
            else:
                for handler in set(self.handlers).intersection(logger.handlers):
                    logger.removeHandler(handler)
        for name in own:
            known.pop(name, None)


_current_run: contextvars.ContextVar[Optional[Run]] = contextvars.ContextVar("csp_run", default=None)
_runs: Dict[str, Run] = {}  # by job id, for threads that a job starts: they do not inherit the context variable


def find_run(job_id: str) -> Optional[Run]:
    run = _current_run.get()
    return run if run is not None and run.job_id == job_id else _runs.get(job_id)


def service_line(level: str, message: str) -> LogLine:
    return LogLine(timestamp(time.time()), clean(message), level, "csp", "", 0)


def clean(text: str) -> str:
    """Return ``text`` as UTF-8 can carry it (lone surrogates become question marks), cut at MAX_LOG_MESSAGE."""
    if len(text) > MAX_LOG_MESSAGE:
        text = f"{text[:MAX_LOG_MESSAGE]}… (cut: {len(text):,} characters)"
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _loggers_named_by(job_id: str) -> Set[str]:
    return {name for name in list(logging.root.manager.loggerDict) if f".{job_id}." in f".{name}."}


class StoringHandler(logging.Handler):
    """A logging handler that writes to the log of the job ``task_id``; the service removes it when the job ends.

    It takes only what its own job logs, also on a logger that several jobs share. A record from a thread that a job
    has started itself is taken only on a logger named by the job's id: elsewhere it may be another job's.
    """

    def __init__(self, task_id: str, input: Any) -> None:
        super().__init__()
        self.task_id = task_id
        self.run = find_run(task_id)
        if self.run is not None:
            self.run.handlers.append(self)

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit the record without the handler's lock: a job that has to wait for the disk must do so alone."""
        wanted = self.filter(record)
        if wanted:
            self.emit(wanted if isinstance(wanted, logging.LogRecord) else record)  # Python 3.12: a filter's own record
        return bool(wanted)

    def emit(self, record: logging.LogRecord) -> None:
        """Store the record as a LogLine; a record that cannot be formatted is stored as it is."""
        run, current = self.run, _current_run.get()
        if run is None or run.is_ended or record.name in (log.name, access_log.name):
            return
        is_from_own_thread = current is None and run.has_generated_id and run.job_id in record.name
        if current is not run and not is_from_own_thread:
            return
        try:
            is_plain = not (self.formatter or record.exc_info or record.exc_text or record.stack_info)
            message = record.getMessage() if is_plain else self.format(record)
        except Exception as error:  # noqa: BLE001 - a job's bad log call is no reason to fail the job
            message = f"{record.msg if isinstance(record.msg, str) else ''} ({type(error).__name__} in logging)"
        lineno = record.lineno if isinstance(record.lineno, int) and 0 <= record.lineno < 2**31 else 0
        run.add_line(LogLine(timestamp(record.created), clean(message), clean(str(record.levelname)),
                             clean(str(record.module)), clean(str(record.funcName)), lineno))


def set_progress(task_id: str, fraction: float, message: Optional[str] = None) -> None:
    """Show how far the running job is: ``fraction`` from 0 to 1, and a message.

    May be called as often as you like, by any thread. Does nothing for a job that is not running.
    """
    run = find_run(task_id)
    if run is not None:
        run.set_progress(fraction, message)


def check_cancelled(task_id: str) -> None:
    """Raise JobCancelled if the running job was told to stop: cancelled, deleted or timed out. For any thread."""
    run = find_run(task_id)
    if run is not None and run.is_cancelled:
        raise JobCancelled


# ---------------------------------------------------------------------------------------------------------------------
# Opening
#
# The schema, and how a database file is opened: one server at a time (a lock that dies with its process), never a file
# of another program or of a newer csp.py, and the predecessor's file is taken over, all in one transaction.
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 3
APPLICATION_ID = 0x43535031  # "CSP1" in the file's header (sqlite.org/pragma.html#pragma_application_id)
CLOCK_STEP_SECONDS = 1.0  # smaller ones, such as those of an NTP client, delay nothing that matters
BUSY_SECONDS = 5.0  # how long a statement waits for another program's lock

_LARGE = """CREATE TABLE large (
    seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, name TEXT NOT NULL, value,
    PRIMARY KEY (seq, name))"""  # large columns of jobs: a change in a row writes all of the row again
_SCHEMA = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL UNIQUE, job_type TEXT NOT NULL, status TEXT NOT NULL,
        requested_timestamp TEXT, started_timestamp TEXT, finished_timestamp TEXT, run_at REAL,
        attempts INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0,
        failures INTEGER NOT NULL DEFAULT 0, synchronous INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, callback_status TEXT, callback_attempts INTEGER NOT NULL DEFAULT 0,
        callback_error TEXT, callback_at REAL, callback_host TEXT, result_url TEXT, api_key, job_key TEXT,
        submission_hash TEXT, resubmitted_from TEXT, progress TEXT, metadata TEXT, error TEXT, sent_data TEXT, data,
        aps_job_id TEXT)""",  # long columns stand last: SQLite reads a row no further than the last one asked for
    _LARGE,
    "CREATE INDEX jobs_by_status ON jobs (status, seq)",
    "CREATE INDEX jobs_by_type ON jobs (job_type, status, seq)",
    "CREATE INDEX jobs_queued ON jobs (run_at, seq) WHERE run_at IS NOT NULL",
    "CREATE INDEX jobs_running ON jobs (seq) WHERE status = 'pending' AND run_at IS NULL",
    "CREATE INDEX jobs_by_finish ON jobs (finished_timestamp) WHERE finished_timestamp IS NOT NULL",
    "CREATE INDEX jobs_by_callback ON jobs (callback_host, callback_at) WHERE callback_at IS NOT NULL",
    """CREATE TABLE metadata (
        seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, key TEXT NOT NULL, job_id TEXT NOT NULL,
        value TEXT, type TEXT, PRIMARY KEY (seq, key)) WITHOUT ROWID""",
    "CREATE INDEX metadata_by_value ON metadata (key, value, seq)",
    """CREATE TABLE logs (
        log_id INTEGER PRIMARY KEY, job_id TEXT NOT NULL, timestamp TEXT, message TEXT, level TEXT, module TEXT,
        funcName TEXT, lineno INTEGER, seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE)""",
    "CREATE INDEX logs_by_job ON logs (seq, log_id)",
    "CREATE TABLE counts (job_type TEXT, status TEXT, jobs INTEGER, PRIMARY KEY (job_type, status)) WITHOUT ROWID",
    "CREATE TABLE hours (hour INTEGER, status TEXT, jobs INTEGER, PRIMARY KEY (hour, status)) WITHOUT ROWID",
    "CREATE TABLE sessions (token_hash TEXT PRIMARY KEY, created_at REAL, used_at REAL) WITHOUT ROWID",
)
# What makes the next version of each older one; the first edition was the first that anybody has used.
_MIGRATIONS: Dict[int, Tuple[str, ...]] = {}
# Fills the schema from the predecessor's tables, renamed to old_*. Their values are checked, because this program
# splices JSON texts.
_FROM_PREDECESSOR = (
    """INSERT INTO jobs (job_id, job_type, status, sent_data, data, error, result_url, api_key, job_key,
        requested_timestamp, finished_timestamp, run_at, callback_host)
        SELECT job_id, coalesce(job_type, ''), coalesce(status, 'error'), as_json(sent_data), as_json(data),
        as_error(error), nullif(result_url, ''), CASE status WHEN 'pending' THEN api_key END, job_key,
        as_time(requested_timestamp), as_time(finished_timestamp), CASE status WHEN 'pending' THEN 0 END,
        as_host(nullif(result_url, '')) FROM old_jobs ORDER BY requested_timestamp, rowid""",
    """INSERT INTO metadata (job_id, key, value, type, seq) SELECT m.job_id, key, coalesce(value, ''), type, seq
        FROM old_metadata m JOIN jobs USING (job_id)""",
    """INSERT INTO logs (job_id, timestamp, message, level, module, funcName, lineno, seq)
        SELECT l.job_id, as_time(timestamp), coalesce(message, ''), level, module, funcName, lineno, seq
        FROM old_logs l JOIN jobs USING (job_id) ORDER BY l.rowid""",
    "INSERT INTO counts SELECT job_type, status, count(*) FROM jobs GROUP BY 1, 2",
)


class Database:
    """An open database: the writer's connection, and the locks that keep others out. ``path`` None: in memory.

    Raises StartError, with the file untouched, if it is not ours, not readable, or in use. The lock comes first: who
    closes a file drops all POSIX locks of its process on it, SQLite's too (sqlite.org/howtocorrupt.html, section 2.2).
    So do jobs that read the database: on Linux, SQLite's shared locks are held a second time, as locks of an open file
    description, which only their own descriptor can drop (man 2 fcntl).
    """

    def __init__(self, path: Optional[str]) -> None:
        self.path = path = path and os.path.abspath(path)  # a job may change the working directory
        self._locked: Dict[str, int] = {}  # descriptors by path
        self._identities: Dict[str, Tuple[int, int]] = {}  # device and inode by path
        try:
            if path is not None:
                self._lock(path)
                _closed_in_children.add(self)
                _check_file(path)
                with suppress(PermissionError):  # another owner's file, which we may nevertheless write
                    os.chmod(path, 0o600)  # -wal and -shm get the mode of this file
            self.connection = self.connect()
            self.connection.execute("PRAGMA journal_mode = WAL")
            version = self.connection.execute("PRAGMA user_version").fetchone()[0]
            if version < SCHEMA_VERSION:
                _migrate(self.connection)
            else:  # this fails if SQLite could open the file for reading only
                self.connection.execute(f"PRAGMA user_version = {version}")
            if path is not None:
                self._lock_again(path)
        except (OSError, sqlite3.Error) as error:
            self._unlock()
            reason = error.strerror if isinstance(error, OSError) else error
            raise StartError(f"The database {path} cannot be opened: {reason}.") from None
        except StartError:
            self._unlock()
            raise

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None,
                                     check_same_thread=False, cached_statements=200)
        for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON",
                       "journal_size_limit = 67108864", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def check_names(self) -> None:
        """Raise OSError if a path names another file now: what is written to the old one would be lost."""
        for path, identity in self._identities.items():
            try:
                found = os.stat(path)
            except FileNotFoundError:
                found = None
            if found is None or (found.st_dev, found.st_ino) != identity:
                raise OSError(f"{path} was renamed, deleted or replaced while it was in use")

    def close(self, connections: Iterable[sqlite3.Connection]) -> None:
        """Close the connections, all that there are: with the last one SQLite folds the WAL into the file."""
        for descriptor in self._locked.values() if LOCK_DESCRIPTION is not None else ():
            _lock_range(descriptor, 0, 0, is_locked=False)
        for connection in connections:
            connection.close()
        self._unlock()

    def close_in_child(self) -> None:
        """Let go in a child process of a job: it must not hold the lock when the service has died."""
        for descriptor in self._locked.values():
            os.close(descriptor)
        self._locked = {}

    def _unlock(self) -> None:
        self.close_in_child()
        _databases.difference_update(self._identities.values())

    def _lock(self, path: str) -> None:
        """Lock the file, whatever its name; or one beside it where flock gets in the way of SQLite's own locks."""
        if os.path.isdir(path):
            raise StartError(f"The database {path} is not a file that may be read and written.")
        locked = path if LOCK_DESCRIPTION is not None else path + ".lock"
        if locked != path:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with _opening:
            if os.path.exists(locked) and _identify(os.stat(locked)) in _databases:
                raise StartError(_IN_USE.format(path=path, process=os.getpid()))
            descriptor = os.open(locked, os.O_RDWR | os.O_CREAT, 0o600)
            self._identities[locked] = identity = _identify(os.fstat(descriptor))
            self._locked[locked] = descriptor
            try:
                import fcntl
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows: SQLite's own locks have to do
                pass
            except BlockingIOError:
                self._identities = {}
                raise StartError(_IN_USE.format(path=path, process=_find_owner(identity))) from None
            except OSError as error:
                raise StartError(f"The database {path} cannot be locked ({error.strerror}); put it on a local disk."
                                 ) from None
            _databases.add(identity)

    def _lock_again(self, path: str) -> None:
        self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # makes SQLite open all three files
        self._identities.update({name: _identify(os.stat(name)) for name in (path, path + "-wal")})
        if LOCK_DESCRIPTION is not None:
            self._locked[path + "-shm"] = os.open(path + "-shm", os.O_RDWR)
            _lock_range(self._locked[path], 0x40000002, 510)  # sqlite.org/src: SHARED_FIRST, SHARED_SIZE in os.h
            _lock_range(self._locked[path + "-shm"], 128, 1)  # UNIX_SHM_DMS in os_unix.c


LOCK_DESCRIPTION = 37 if sys.platform.startswith("linux") else None  # F_OFD_SETLK; in fcntl from Python 3.9 on
_IN_USE = ("The database {path} is in use by another csp server, process {process}; stop it first, or choose another "
           "file with --db.")
_opening = threading.Lock()  # guards the next: a file must not be opened twice by one process
_databases: Set[Tuple[int, int]] = set()


def _identify(status: os.stat_result) -> Tuple[int, int]:
    return status.st_dev, status.st_ino


def _find_owner(identity: Tuple[int, int]) -> str:
    """Return the id of the process that has locked the file, as far as the system tells."""
    with suppress(OSError, IndexError), open("/proc/locks", encoding="ascii") as file:
        for words in map(str.split, file):
            if words[1] == "FLOCK" and words[5].endswith(f":{identity[1]}"):
                return words[4]
    return "unknown"


def _lock_range(descriptor: int, start: int, length: int, is_locked: bool = True) -> None:
    import fcntl
    kind = fcntl.F_RDLCK if is_locked else fcntl.F_UNLCK
    fcntl.fcntl(descriptor, LOCK_DESCRIPTION or 0, struct.pack("hhqqi", kind, os.SEEK_SET, start, length, 0))


_closed_in_children: weakref.WeakSet[Any] = weakref.WeakSet()  # objects with a method ``close_in_child``


def _close_in_child() -> None:
    for owner in list(_closed_in_children):
        owner.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _check_file(path: str) -> None:
    """Raise StartError, with the file untouched, unless it is empty, ours or the predecessor's."""
    has_journal = os.path.exists(os.path.realpath(path) + "-journal")  # of a commit that SQLite has to undo first
    with open(path, "rb") as file:
        if file.read(16) not in (b"", b"SQLite format 3\0") and not has_journal:  # SQLite takes short files for empty
            raise StartError(f"The file {path} is not a database; choose another with --db.")
    mode = "rw" if has_journal else "ro"
    connection = sqlite3.connect(f"file:{urllib.parse.quote(os.path.abspath(path))}?mode={mode}", uri=True)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = {row[1] for row in connection.execute("PRAGMA table_info(jobs)")}
    finally:
        connection.close()
    if owner == APPLICATION_ID and version != SCHEMA_VERSION and version not in _MIGRATIONS:
        age = "a newer" if version > SCHEMA_VERSION else "an unreleased"
        raise StartError(f"The database {path} was written by {age} csp.py (schema {version}, this one knows "
                         f"{SCHEMA_VERSION}); use that one.")
    is_old = {"job_id", "job_type", "status", "sent_data", "job_key"} <= columns and {"metadata", "logs"} <= tables
    if owner != APPLICATION_ID and tables and not (is_old and version == 0):
        raise StartError(f"The database {path} belongs to another program; choose another file with --db.")


def _migrate(connection: sqlite3.Connection) -> None:
    """Make the schema, or bring an older version or the predecessor's tables to it, in one transaction."""
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        has_jobs = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone() is not None
        if version > 0 and connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
            for older in range(version, SCHEMA_VERSION):
                for statement in _MIGRATIONS[older]:
                    connection.execute(statement)
        elif has_jobs:
            _take_over_predecessor(connection)
        else:
            for statement in _SCHEMA:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("PRAGMA foreign_keys = ON")


def _take_over_predecessor(connection: sqlite3.Connection) -> None:
    for name, function in (("as_json", _as_json), ("as_error", _as_error), ("as_time", _as_time),
                           ("as_host", _as_host)):
        connection.create_function(
            name, 1, lambda value, function=function: None if value is None else function(value))
    for table in ("logs", "metadata", "jobs"):
        connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for statement in (*_SCHEMA, *_FROM_PREDECESSOR):
        connection.execute(statement)
    metadata: Dict[int, Dict[str, Any]] = {}
    for seq, key, value, kind in connection.execute("SELECT seq, key, value, type FROM metadata"):
        metadata.setdefault(seq, {})[key] = json.loads(_as_json(value)) if kind == "json" else value
    connection.executemany("UPDATE jobs SET metadata = ? WHERE seq = ?", [
        (to_json(values), seq) for seq, values in metadata.items()])
    for table in ("logs", "metadata", "jobs"):
        connection.execute(f"DROP TABLE old_{table}")


def _as_json(text: str) -> str:
    try:
        return to_json(json.loads(text))
    except (ValueError, RecursionError):
        return to_json(clean(text))


def _as_error(text: str) -> Optional[str]:
    value = json.loads(_as_json(text))
    if value is None:
        return None
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return to_json(value)
    return to_json({"message": value if isinstance(value, str) else to_json(value)})


def _as_time(value: Union[str, float]) -> str:
    whole, _, fraction = str(value).replace(" ", "T", 1).partition(".")
    return f"{whole}.{fraction[:6]:0<6}"


def _as_host(url: str) -> str:
    try:
        return callback_host(url)
    except ValueError:  # not an address, as the callback will find out
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Store
#
# The database is the queue. Theory of operation: every write goes to one writer thread, which takes all waiting
# writes, runs them in one transaction, commits, and only then lets the callers go on (group commit). So an answer means
# durable, and the cost of a commit is shared. WAL with synchronous=FULL syncs at each commit (sqlite.org/pragma.html
# #pragma_synchronous, sqlite.org/wal.html); a crash loses no committed transaction and nothing of an unfinished one.
# Readers never wait for the writer. Nothing outside the database changes before the commit: an operation says in its
# Transaction what to do afterwards. If a batch fails because of one write, it is rolled back and run write by write.
#
# Lock order. Innermost, so that whoever holds one takes no other lock of this file and waits for no write: the locks of
# Store, Metric and LoginThrottle, the conditions of Run, Runner, CallbackSender and Server. Before them:
# RemoteRun._intake and Reporter._lock (then Run._condition), LoginThrottle._turns (then its _lock, or _scrypt_turns).
# Held during long work: Engine._lock (a factory works), Application._lock (a service starts), _opening (a file is
# locked), _large_json (a text is parsed). The writer's open transaction asks the Runner whether it is calm, which takes
# its condition; the writer holds no lock while it publishes a commit.
# ---------------------------------------------------------------------------------------------------------------------

BATCH_WRITES = 500  # writes in one transaction: bounds the time that the last of them waits
READERS = 2  # connections for reading: each step releases the interpreter's lock, and more of them only convoy
SQLITE_VERSION = sqlite3.sqlite_version
CLEAR_SLICE = 500  # jobs deleted in one transaction, so that nobody waits behind a million rows
QUIET_SECONDS = 30.0  # without a write, before the write-ahead log is emptied
HOLD_SECONDS = 0.02  # a synchronous job that takes longer is stored before it has ended, too; a large one is held
HOLD_SECONDS_PER_CHARACTER = 2.0**-25  # longer, because writing it twice takes that long

_COLUMNS = ", ".join(Job._fields)
_IN_STATE = {QUEUED: "status = 'pending' AND run_at IS NOT NULL", RUNNING: "status = 'pending' AND run_at IS NULL"}
WHOLE, RESULT, LIGHT = "whole", "without sent_data", "without sent_data and data"  # how much of a job is read
_SELECT = {columns: f"SELECT {', '.join('NULL' if name in left_out else name for name in Job._fields)} FROM jobs "
           for columns, left_out in ((WHOLE, ()), (RESULT, ("sent_data",)), (LIGHT, ("sent_data", "data")))}
_INSERT_LARGE = "INSERT OR REPLACE INTO large (seq, name, value) VALUES (?, ?, ?)"  # another program left one
_LOG_COLUMNS = "timestamp, message, level, module, funcName, lineno"
_CALLBACK_HOSTS = """WITH RECURSIVE hosts (host) AS (
    SELECT min(callback_host) FROM jobs WHERE callback_at IS NOT NULL UNION ALL
    SELECT (SELECT min(callback_host) FROM jobs WHERE callback_at IS NOT NULL AND callback_host > host)
    FROM hosts WHERE host IS NOT NULL)
    SELECT host, (SELECT min(callback_at) FROM jobs WHERE callback_at IS NOT NULL AND callback_host = host)
    FROM hosts WHERE host IS NOT NULL"""
_DISK_ERRORS = (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.InternalError)  # these, and no subclasses


def _insert_statements(table: str, columns: str) -> Dict[int, str]:
    """Return statements for several rows, by their number: with fewer values than 999, which older ones take."""
    count = len(columns.split(", "))
    row = f"({', '.join('?' * count)})"
    return {rows: f"INSERT INTO {table} ({columns}) VALUES {', '.join([row] * rows)}"
            for rows in (120, 30, 8, 2, 1) if rows * count < 999}


_INSERT_JOBS = _insert_statements("jobs", _COLUMNS)
_INSERT_LINES = _insert_statements("logs", f"job_id, seq, {_LOG_COLUMNS}")


class Transaction:
    """What a write operation gets: a way to execute statements, and a list of what to do after the commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.execute, self.executemany = connection.execute, connection.executemany
        self.counts: Dict[Tuple[str, str], int] = collections.defaultdict(int)  # changes by job type and status
        self.hours: Dict[Tuple[int, str], int] = collections.defaultdict(int)  # jobs that finished, by hour and status
        self.touched: Set[str] = set()  # ids of jobs that have changed
        self.callbacks: List[Tuple[str, float]] = []  # hosts, and when their callbacks are due
        self.has_queued = False  # whether a job has come into the queue
        self.inserted: Set[int] = set()  # seqs of jobs that it has inserted
        self.taken: Dict[Run, int] = collections.defaultdict(int)  # how many log lines of a run it has taken
        self.plain_jobs: List[Job] = []  # rows to be inserted together, before the commit
        self.on_commit: List[Callable[[], object]] = []

    def insert_rows(self, statements: Mapping[int, str], rows: Sequence[Sequence[Any]]) -> None:
        """Insert the rows in few statements: each hands the interpreter's lock over."""
        begin = 0
        for size, statement in statements.items():
            while len(rows) - begin >= size:
                self.execute(statement, list(itertools.chain.from_iterable(rows[begin:begin + size])))
                begin += size


class Write:
    """An operation on its way through the writer. ``refused`` is called if the disk cannot take it."""

    __slots__ = ("operation", "refused", "result", "error", "done")

    def __init__(self, operation: Callable[[Transaction], Any], refused: Optional[Callable[[], None]] = None) -> None:
        self.operation, self.refused = operation, refused
        self.result: Any = None
        self.error: Optional[Exception] = None
        self.done = threading.Lock()  # until it has been committed or refused
        self.done.acquire()

    def wait(self) -> Any:
        """Return the operation's result or raise its error, after the commit."""
        with self.done:
            if self.error is not None:
                raise self.error
            return self.result


@contextmanager
def _borrowed(pool: queue.SimpleQueue[sqlite3.Connection]) -> Iterator[sqlite3.Connection]:
    try:
        connection = pool.get(timeout=BUSY_SECONDS)
    except queue.Empty:  # the store is closed, or others have been reading for long
        raise Unavailable("The database cannot be read now; try again.") from None
    try:
        yield connection
    finally:
        pool.put(connection)


class Store:
    """Jobs, logs, metadata and sessions in SQLite. Any thread may call any method.

    Methods that write return when the change is durable, and raise Unavailable when the disk cannot take it. ``path``
    None keeps everything in memory. Raises StartError for a file that is not ours, not readable or in use. The writer
    calls ``on_queued()`` and ``on_callback_due(host, epoch_seconds)`` after a commit with such a change.
    """

    def __init__(self, path: Optional[str]) -> None:
        self.on_queued: Callable[[], None] = lambda: None
        self.on_callback_due: Callable[[str, float], None] = lambda host, at: None
        self._queue: queue.SimpleQueue[Optional[Write]] = queue.SimpleQueue()  # None: close
        # Synchronous jobs that will probably end before they are due to be stored (monotonic seconds), by seq; only the
        # writer removes one.
        self._held: Dict[int, Tuple[Job, Run, float]] = {}
        self._is_idle = False  # whether the writer waits for the queue alone, and not for held jobs
        self._lock = threading.Lock()  # guards _is_closed, _watchers and _clock
        self._clock = 0.0  # epoch seconds when the monotonic clock was 0
        self._is_closed = False
        self._watchers: Dict[str, Set[threading.Event]] = {}
        self.is_released = False
        self._is_disk_ill = False
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._writers = self._readers if path is None else queue.SimpleQueue()
        self._database = Database(path)
        try:
            self._writers.put(self._database.connection)
            for _ in range(READERS if path else 0):
                self._readers.put(self._database.connect())
            self._counts = {row[:2]: row[2] for row in self._read("SELECT job_type, status, jobs FROM counts")}
            last_seq = self._read("SELECT coalesce(max(seq), 0) FROM jobs")[0][0]
            times = self._read("""SELECT max(finished_timestamp) FROM jobs UNION ALL
                SELECT requested_timestamp FROM jobs WHERE seq = ? UNION ALL
                SELECT * FROM (SELECT max(started_timestamp, requested_timestamp) FROM jobs WHERE run_at IS NOT NULL
                ORDER BY run_at DESC LIMIT 100)""", (last_seq,))
            # the latest time known, or the clock was set back while the service was down
            self._clock = max([time.time(), *(epoch_seconds(text) for (text,) in times if text)]) - time.monotonic()
            # the number of a new job: higher than all before, never used twice by one process
            self.take_seq: Callable[[], int] = itertools.count(last_seq + 1).__next__
        except (OSError, sqlite3.Error, Unavailable) as error:
            self._database.close([])
            raise StartError(f"The database {path} cannot be opened: {error}.") from None
        self._writer = threading.Thread(target=self._run_writer, name="csp-writer", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Finish the writes that are waiting, fold the WAL into the database file, and let go of it."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self.release()
        self._writer.join()
        connections = []
        for pool in (self._writers, self._readers):
            while not pool.empty():
                connections.append(pool.get())
        self._database.close(connections)

    # -- the writer

    def _enqueue(self, operation: Callable[[Transaction], Any], refused: Optional[Callable[[], None]] = None) -> Write:
        write = Write(operation, refused)
        with self._lock:
            if self._is_closed:
                raise Unavailable("The service is stopping; try again.")
            self._queue.put(write)
        return write

    def _write(self, operation: Callable[[Transaction], T]) -> T:
        result: T = self._enqueue(operation).wait()
        return result

    def _run_writer(self) -> None:
        while self._commit_waiting():
            pass

    def _commit_waiting(self) -> bool:
        """Wait for a write and commit it with all that wait behind it; return False when the store is closed.

        While jobs are held, and a little longer, wait no longer than one is held.
        """
        batch: List[Write] = []
        try:
            entry = self._queue.get(timeout=HOLD_SECONDS)
        except queue.Empty:
            self._is_idle = True  # before the look at what is held: whoever holds a job looks at this afterwards
            entry = _WAKE if self._held else self._wait_quietly()
        self._is_idle = False
        while entry is not None:
            if entry is not _WAKE:
                batch.append(entry)
            if len(batch) >= BATCH_WRITES or self._queue.empty():
                break
            entry = self._queue.get()
        now = time.monotonic()
        for seq, (job, run, due) in list(self._held.items()):
            if due <= now:
                self._held[seq] = (job, run, now + 1.0)  # if the disk refuses it now
                batch.append(Write(functools.partial(self._insert_held, seq)))
        if batch:
            self._commit(batch)
        return entry is not None

    def _wait_quietly(self) -> Optional[Write]:
        """Wait for a write; after a while fold the write-ahead log into the file, or erased keys would stay in it."""
        try:
            return self._queue.get(timeout=QUIET_SECONDS)
        except queue.Empty:
            with suppress(sqlite3.Error, Unavailable), _borrowed(self._writers) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return self._queue.get()

    def _commit(self, batch: List[Write]) -> None:
        """Run the operations in one transaction and tell each caller."""
        try:
            transaction = self._run_transaction(batch)
        except Exception as error:  # noqa: BLE001 - the writer's loop: without it nothing could be stored any more
            is_disk = type(error) in _DISK_ERRORS or isinstance(error, (Unavailable, OSError))
            if not is_disk and len(batch) > 1:  # one caller's mistake must not be the others'
                for write in batch:
                    self._commit([write])
                return
            if is_disk and not self._is_disk_ill:  # once, not for each write
                log.error("the database cannot be written: %s; submissions are answered 503 until it can", error)
            self._is_disk_ill = self._is_disk_ill or is_disk
            for write in batch:
                if is_disk:
                    write.error = Unavailable(f"The database cannot be written ({error}); try again.")
                else:
                    is_value = isinstance(error, (sqlite3.Error, OverflowError, UnicodeError))
                    write.error = ValueError(f"It cannot be stored: {error}") if is_value else error
                if write.refused is not None:
                    write.refused()
        else:
            if self._is_disk_ill:
                log.warning("the database can be written again")
            self._is_disk_ill = False
            self._publish(transaction)
        for write in batch:
            write.done.release()

    def _run_transaction(self, batch: List[Write]) -> Transaction:
        with _borrowed(self._writers) as connection:
            transaction = Transaction(connection)
            self._database.check_names()
            try:
                connection.execute("BEGIN IMMEDIATE")
                for write in batch:
                    before, write.error = connection.total_changes, None
                    try:
                        write.result = write.operation(transaction)
                    except CspError as error:  # such as a Conflict
                        if connection.total_changes != before:
                            raise  # all of the transaction has to be rolled back
                        write.error = error
                transaction.insert_rows(_INSERT_JOBS, transaction.plain_jobs)
                for table, column, changes in (("counts", "job_type", transaction.counts),
                                               ("hours", "hour", transaction.hours)):
                    connection.executemany(
                        f"INSERT INTO {table} VALUES (?, ?, ?) "
                        f"ON CONFLICT ({column}, status) DO UPDATE SET jobs = jobs + excluded.jobs",
                        [(*key, change) for key, change in changes.items() if change])
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            self._database.check_names()
            return transaction

    def _publish(self, transaction: Transaction) -> None:
        for key, change in transaction.counts.items():
            self._counts[key] = self._counts.get(key, 0) + change
        for effect in transaction.on_commit:
            try:
                effect()
            except Exception:  # noqa: BLE001 - the writer's loop: without it nothing could be stored any more
                log.exception("what follows a commit failed")
        if self._watchers and transaction.touched:
            with self._lock:
                for job_id in transaction.touched:
                    for event in self._watchers.get(job_id, ()):
                        event.set()
        if transaction.has_queued:
            self.on_queued()
        for host, at in transaction.callbacks:
            self.on_callback_due(host, at)

    # -- reading

    def _read(self, statement: str, values: Sequence[Any] = ()) -> List[Any]:
        with _borrowed(self._readers) as connection:
            try:
                return connection.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise Unavailable(f"The database cannot be read ({error}); try again.") from None

    def _read_jobs(self, condition: str, values: Sequence[Any] = (), columns: str = WHOLE) -> List[Job]:
        return _make_jobs(self._read(_SELECT[columns] + condition, values), self._read)

    def get_job(self, job_id: str, columns: str = WHOLE) -> Optional[Job]:
        """Return the job, or None. ``columns``: WHOLE, RESULT or LIGHT."""
        return next(iter(self._read_jobs("WHERE job_id = ?", (job_id,), columns)), None)

    def get_light_jobs(self, seqs: Iterable[int]) -> List[Job]:
        """Return the jobs with these numbers that are still there, without their ``sent_data`` and ``data``."""
        return [job for seq in seqs for job in self._read_jobs("WHERE seq = ?", (seq,), LIGHT)]

    def get_logs(self, job: Job, limit: Optional[int] = None) -> List[LogLine]:
        """Return the job's log, oldest first; with ``limit`` only the newest lines, newest first."""
        order, values = ("", (job.seq,)) if limit is None else ("DESC LIMIT ?", (job.seq, limit))
        rows = self._read(f"SELECT {_LOG_COLUMNS} FROM logs WHERE seq = ? ORDER BY log_id {order}", values)
        return list(map(LogLine._make, rows))

    def list_logs(self, seq: int, limit: int, after_log_id: Optional[int] = None, levels: Sequence[str] = (),
                  ) -> List[Tuple[int, LogLine]]:
        """Return (log id, line) of lines after that id, oldest first, or the newest first; all or only these levels."""
        level = f"AND level IN ({', '.join('?' * len(levels))})" if levels else ""
        order = "DESC" if after_log_id is None else ""
        rows = self._read(f"SELECT log_id, {_LOG_COLUMNS} FROM logs WHERE seq = ? {level} AND log_id > ? "
                          f"ORDER BY log_id {order} LIMIT ?", (seq, *levels, after_log_id or 0, limit))
        return [(row[0], LogLine._make(row[1:])) for row in rows]

    def list_jobs(self, limit: int, offset: int = 0, status: Optional[str] = None,
                  metadata: Sequence[Tuple[str, str]] = (), before_seq: Optional[int] = None,
                  job_type: Optional[str] = None) -> List[Tuple[int, str]]:
        """Return (seq, job id) of jobs, newest first; all of ``metadata`` (key, value) has to match.

        ``status`` may also be QUEUED or RUNNING.
        """
        if job_type is not None and status is None and not metadata:  # jobs_by_type gives each status in order
            found = [self.list_jobs(limit + offset, 0, one, (), before_seq, job_type)
                     for one in (PENDING, COMPLETE, ERROR)]
            return sorted(itertools.chain.from_iterable(found), reverse=True)[offset:offset + limit]
        table, seq = "jobs j" + (" INDEXED BY jobs_running" if status == RUNNING else ""), "j.seq"
        where: List[str] = []
        values: List[Any] = []
        if metadata:
            table, seq = "metadata m CROSS JOIN jobs j ON j.seq = m.seq", "m.seq"
            where, values = ["m.key = ? AND m.value = ?"], list(itertools.chain.from_iterable(metadata))
            where += ["EXISTS (SELECT 1 FROM metadata o WHERE o.seq = m.seq AND o.key = ? AND o.value = ?)"
                      ] * (len(metadata) - 1)
        if status in _IN_STATE:
            where.append(_IN_STATE[status])
            status = None
        for comparison, value in (("j.status = ?", status), ("j.job_type = ?", job_type), (f"{seq} < ?", before_seq)):
            if value is not None:
                where.append(comparison)
                values.append(value)
        condition = "WHERE " + " AND ".join(where) if where else ""
        return self._read(f"SELECT j.seq, j.job_id FROM {table} {condition} ORDER BY {seq} DESC LIMIT ? OFFSET ?",
                          (*values, limit, offset))

    def find_jobs(self, id_prefix: str, limit: int) -> List[Tuple[int, str]]:
        return self._read("SELECT seq, job_id FROM jobs WHERE job_id >= ? AND job_id < ? ORDER BY job_id LIMIT ?",
                          (id_prefix, id_prefix + "\U0010ffff" * 256, limit))

    def count_by_type(self) -> Dict[Tuple[str, str], int]:
        return {key: jobs for key, jobs in list(self._counts.items()) if jobs}

    def count_by_hour(self, since_hour: int) -> Dict[Tuple[int, str], int]:
        """Return how many jobs finished by (hour, status), from that hour on; hours since 1970."""
        return {row[:2]: row[2] for row in self._read(
            "SELECT hour, status, jobs FROM hours WHERE hour >= ?", (since_hour,))}

    def count_jobs(self) -> Dict[str, int]:
        """Return how many jobs are pending, complete and error, at constant cost."""
        totals = {PENDING: 0, COMPLETE: 0, ERROR: 0}
        for (_, status), jobs in list(self._counts.items()):
            totals[status] = totals.get(status, 0) + jobs
        return totals

    def get_longest_due(self) -> Optional[float]:
        """Return since when (epoch seconds) the job that runs next has been due; None if none is queued."""
        rows = self._read("SELECT run_at, requested_timestamp FROM jobs WHERE run_at IS NOT NULL "
                          "ORDER BY run_at, seq LIMIT 1")
        if not rows:
            return None
        run_at, requested = rows[0]
        return float(run_at) if run_at > AFTER_STOP else epoch_seconds(requested or "")

    def list_running(self) -> List[Job]:
        return self._read_jobs(f"INDEXED BY jobs_running WHERE {_IN_STATE[RUNNING]} ORDER BY seq")

    def list_callback_hosts(self) -> List[Tuple[str, float]]:
        """Return (host, earliest epoch seconds) for every host that a callback is due to, now or later."""
        return self._read(_CALLBACK_HOSTS)

    def list_due_callbacks(self, host: str, limit: int) -> List[Job]:
        """Return the jobs whose callback goes to ``host``, the earliest due first, due or not."""
        return self._read_jobs(
            "WHERE callback_at IS NOT NULL AND callback_host = ? ORDER BY callback_at LIMIT ?", (host, limit))

    # -- waiting

    @contextmanager
    def watch(self, job_id: str) -> Iterator[threading.Event]:
        """Give an event that is set when the job has changed; look at ``is_released`` before you wait."""
        event = threading.Event()
        with self._lock:
            self._watchers.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            with self._lock:
                self._watchers[job_id].discard(event)
                if not self._watchers[job_id]:
                    del self._watchers[job_id]

    def count_watchers(self, job_id: str) -> int:
        return len(self._watchers.get(job_id, ()))

    def release(self) -> None:
        self.is_released = True
        with self._lock:
            for event in itertools.chain.from_iterable(self._watchers.values()):
                event.set()

    def wait_for_job(self, job_id: str, is_ready: Callable[[Job], bool], timeout_seconds: float) -> Optional[Job]:
        """Return the job once ``is_ready``, after the timeout or when released; None if it is deleted."""
        deadline = time.monotonic() + timeout_seconds
        with self.watch(job_id) as changed:
            while True:
                changed.clear()
                job = self.get_job(job_id)
                is_done = job is None or is_ready(job) or self.is_released
                if is_done or not changed.wait(deadline - time.monotonic()):
                    return job

    # -- the clock

    def follow_clock(self) -> None:
        """Bring forward what waits if the clock was set back: a retry in a second must not become one in an hour."""
        clock = time.time() - time.monotonic()
        with self._lock:
            step, self._clock = self._clock - clock, clock
        if step < CLOCK_STEP_SECONDS:
            return
        log.warning("the clock was set back by %.1f seconds; what waits is brought forward", step)

        def operation(transaction: Transaction) -> None:
            transaction.execute("UPDATE jobs SET run_at = run_at - ? WHERE run_at > ?", (step, AFTER_STOP))
            transaction.execute("UPDATE jobs SET callback_at = callback_at - ? WHERE callback_at IS NOT NULL", (step,))
            transaction.has_queued = True
            transaction.callbacks += list(transaction.execute(_CALLBACK_HOSTS))
        try:
            self._write(operation)
        except Unavailable:
            with self._lock:
                self._clock += step  # later

    # -- the lifecycle

    def add_job(self, job: Job, is_new_id: bool = False, begin: Optional[Callable[[Job], Any]] = None) -> Write:
        """Store a new job, without waiting. The Write raises Conflict if its id is taken.

        ``is_new_id``: the service made the id, so that it cannot be. The writer calls ``begin`` after the commit.
        """
        def operation(transaction: Transaction) -> None:
            _insert_job(transaction, job, is_plain=is_new_id)
            if begin is not None:
                transaction.on_commit.append(functools.partial(begin, job))
        return self._enqueue(operation)

    def hold_job(self, job: Job, run: Run) -> None:
        """Store a new synchronous job if it has not ended soon, so that most are written once, when they have ended.

        Only for an id made by the service: nobody else can have it, or know it yet.
        """
        due = time.monotonic() + HOLD_SECONDS + len(job.sent_data or "") * HOLD_SECONDS_PER_CHARACTER
        self._held[job.seq] = (job, run, due)
        if self._is_idle:
            self._queue.put(_WAKE)

    def store_held_job(self, seq: int) -> None:
        if seq in self._held:
            self._write(functools.partial(self._insert_held, seq))

    def _insert_held(self, seq: int, transaction: Transaction) -> None:
        """Store a held job and its output, unless it has ended or was stored meanwhile."""
        if seq not in self._held or seq in transaction.inserted:
            return
        job, run, _ = self._held[seq]
        _insert_job(transaction, job)
        _insert_output(transaction, run)

        def stored() -> None:
            del self._held[seq]
            if run.has_output:  # announced meanwhile, and left to this write
                with suppress(Unavailable):
                    self.save_output(run)
        transaction.on_commit.append(stored)

    def save_output(self, run: Run, refused: Optional[Callable[[], None]] = None) -> None:
        """Store the run's log and progress, without waiting; ``refused`` is called if the disk cannot take them."""
        if run.seq in self._held:
            return  # it is stored with the job

        def operation(transaction: Transaction) -> None:
            row = transaction.execute("SELECT 1 FROM jobs WHERE seq = ?", (run.seq,)).fetchone()
            _insert_output(transaction, run, is_deleted=row is None)
            transaction.touched.add(run.job_id)
        self._enqueue(operation, refused)

    def claim_jobs(self, limit: int, now: float, is_calm: Callable[[], bool], begin: Callable[[Job], Any]) -> Claim:
        """Mark up to ``limit`` queued jobs as running, the longest due first, and return them.

        The writer calls ``begin`` with each after the commit, before any later write, such as a cancellation. A suspect
        is claimed alone, and only if the runner ``is_calm``.
        """
        check_transition(QUEUED, RUNNING)

        def is_due(job: Job) -> bool:
            return (job.run_at or 0.0) <= now and not job.is_suspect

        def operation(transaction: Transaction) -> Claim:
            rows = transaction.execute(
                _SELECT[WHOLE] + "WHERE run_at IS NOT NULL ORDER BY run_at, seq LIMIT ?", (limit + 1,))
            waiting = _make_jobs(rows, transaction.execute)
            is_suspect = bool(waiting) and waiting[0].is_suspect
            due = list(itertools.takewhile(is_due, waiting[:limit]))
            if is_suspect and is_calm():
                due = waiting[:1]
            claimed = [job._replace(run_at=None, attempts=job.attempts + 1, started_timestamp=timestamp(now))
                       for job in due]
            transaction.executemany(
                "UPDATE jobs SET run_at = NULL, attempts = ?, started_timestamp = ? WHERE seq = ?",
                [(job.attempts, job.started_timestamp, job.seq) for job in claimed])
            transaction.touched.update(job.job_id for job in claimed)
            transaction.on_commit += [functools.partial(begin, job) for job in claimed]
            return Claim(claimed, waiting[len(due)].run_at if len(due) < len(waiting) else None, is_suspect)
        return self._write(operation)

    def record_ending(self, job: Job, decision: Union[Finish, Requeue], run: Optional[Run]) -> Optional[Job]:
        """Store how an attempt at ``job`` ended: the finished job and its callback due, or the queued one; its log.

        Return the job as it is then; or None, with nothing changed, if it is no longer in the state and attempt of
        ``job``: it was cancelled, deleted or timed out, or it runs again.
        """
        now = time.time()
        if isinstance(decision, Requeue):
            ended = job._replace(run_at=decision.run_at, crashes=decision.crashes, failures=decision.failures,
                                 progress=None)
        else:
            outcome, has_callback = decision.outcome, job.result_url is not None
            ended = job._replace(
                status=outcome.status, data=outcome.data, error=outcome.error, finished_timestamp=timestamp(now),
                run_at=None, progress=job.progress if run is None or run.progress is None else run.progress,
                callback_status=PENDING if has_callback else None, callback_at=now if has_callback else None,
                api_key=job.api_key if has_callback else None)
        check_transition(job.state, ended.state)

        def operation(transaction: Transaction) -> Optional[Job]:
            if job.seq in self._held and job.seq not in transaction.inserted:
                _insert_job(transaction, ended, counted_as=PENDING, is_plain=run is not None and not run.has_output)
                transaction.on_commit.append(functools.partial(self._held.pop, job.seq))
            elif not _update_ended(transaction, ended, job.state):
                return None
            if run is not None:
                _insert_output(transaction, run)
            if ended.status == PENDING:
                transaction.has_queued = True
            else:
                transaction.counts[job.job_type, PENDING] -= 1
                transaction.counts[job.job_type, ended.status] += 1
                transaction.hours[int(now // 3600), ended.status] += 1
                if job.callback_host is not None:
                    transaction.callbacks.append((job.callback_host, now))
            transaction.touched.add(job.job_id)
            return ended
        return self._write(operation)

    def mark_cancelled(self, job: Job) -> bool:
        """Note on a running job that it was told to stop, so that it does not run again; False if it is not running."""
        return self._write(lambda transaction: transaction.execute(
            f"UPDATE jobs SET cancelled = 1 WHERE seq = ? AND {_IN_STATE[RUNNING]}", (job.seq,)).rowcount > 0)

    def mark_callback(self, job: Job, status: str, error: Optional[str], next_at: Optional[float]) -> bool:
        """Record an attempt at the job's callback; without ``next_at`` it was the last, and the api_key is erased.

        Return False, with nothing changed, if the job is gone or its callback was made due anew meanwhile.
        """
        def operation(transaction: Transaction) -> bool:
            transaction.touched.add(job.job_id)
            return transaction.execute(
                """UPDATE jobs SET callback_status = ?, callback_attempts = callback_attempts + 1, callback_error = ?,
                callback_at = ?, api_key = CASE WHEN ? IS NOT NULL THEN api_key END
                WHERE seq = ? AND callback_at = ?""",
                (status, error, next_at, next_at, job.seq, job.callback_at)).rowcount > 0
        return self._write(operation)

    def mark_callback_due(self, job: Job, api_key: Union[str, int, float, None]) -> None:
        """Make the finished job's callback due now, from the first attempt; ``api_key`` replaces an erased one."""
        def operation(transaction: Transaction) -> None:
            now = time.time()
            transaction.execute(
                """UPDATE jobs SET callback_status = 'pending', callback_attempts = 0, callback_error = NULL,
                callback_at = ?, api_key = coalesce(?, api_key)
                WHERE seq = ? AND finished_timestamp IS NOT NULL AND result_url IS NOT NULL""",
                (now, api_key, job.seq))
            transaction.touched.add(job.job_id)
            transaction.callbacks.append((job.callback_host or "", now))
        self._write(operation)

    def delete_job(self, job: Job) -> Optional[Job]:
        """Delete the job and all of it; return it as it was at that moment, but light, or None if it was gone."""
        def operation(transaction: Transaction) -> Optional[Job]:
            row = transaction.execute(_SELECT[LIGHT] + "WHERE seq = ?", (job.seq,)).fetchone()
            if row is None:
                return None
            transaction.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
            deleted = Job._make(row)
            transaction.counts[job.job_type, deleted.status] -= 1
            transaction.touched.add(job.job_id)
            return deleted
        return self._write(operation)

    def delete_finished_jobs(self, before: str) -> int:
        """Delete jobs that finished before the timestamp and whose callback is not due any more; return how many."""
        def operation(transaction: Transaction) -> int:
            rows = transaction.execute(
                """SELECT seq, job_type, status, job_id FROM jobs WHERE finished_timestamp < ? AND callback_at IS NULL
                ORDER BY finished_timestamp LIMIT ?""", (before, CLEAR_SLICE)).fetchall()
            transaction.executemany("DELETE FROM jobs WHERE seq = ?", [(row[0],) for row in rows])
            for _, job_type, status, job_id in rows:
                transaction.counts[job_type, status] -= 1
                transaction.touched.add(job_id)
            return len(rows)
        deleted = part = self._write(operation)
        while part == CLEAR_SLICE:
            part = self._write(operation)
            deleted += part
        return deleted

    # -- sessions

    def add_session(self, token_hash: str, now: float, idle_since: float, created_since: float) -> None:
        """Store a login, and forget those that were last used or begun before the given times."""
        def operation(transaction: Transaction) -> None:
            transaction.execute("DELETE FROM sessions WHERE used_at < ? OR created_at < ?", (idle_since, created_since))
            transaction.execute("INSERT INTO sessions VALUES (?, ?, ?)", (token_hash, now, now))
        self._write(operation)

    def get_session(self, token_hash: str) -> Optional[Tuple[float, float]]:
        rows: List[Tuple[float, float]] = self._read(
            "SELECT created_at, used_at FROM sessions WHERE token_hash = ?", (token_hash,))
        return rows[0] if rows else None

    def mark_session_used(self, token_hash: str, now: float) -> None:
        self._enqueue(lambda transaction: transaction.execute(
            "UPDATE sessions SET used_at = ? WHERE token_hash = ?", (now, token_hash)).rowcount)

    def delete_session(self, token_hash: str) -> None:
        self._write(lambda transaction: transaction.execute(
            "DELETE FROM sessions WHERE token_hash = ?", (token_hash,)).rowcount)


_WAKE = Write(lambda transaction: None)  # makes the writer look at what is held


def _insert_job(transaction: Transaction, job: Job, counted_as: str = "", is_plain: bool = False) -> None:
    """Insert the job with its metadata; raise Conflict if its id is taken.

    ``is_plain``: nobody else can have its id, and it has no log, so that its row may be inserted with others.
    """
    row, large = _set_apart(job)
    if is_plain and not large and job.metadata is None:
        transaction.plain_jobs.append(row)
    else:
        try:
            transaction.execute(_INSERT_JOBS[1], row)
        except sqlite3.IntegrityError:
            raise Conflict(f"job_id {job.job_id} already exists") from None
    _insert_large(transaction, job.seq, large)
    if job.metadata is not None:
        transaction.executemany("INSERT INTO metadata (job_id, key, value, type, seq) VALUES (?, ?, ?, ?, ?)", [
            (job.job_id, key, value, "string", job.seq) if isinstance(value, str) else
            (job.job_id, key, to_json(value), "json", job.seq) for key, value in json.loads(job.metadata).items()])
    transaction.inserted.add(job.seq)
    transaction.counts[job.job_type, counted_as or job.status] += 1
    transaction.touched.add(job.job_id)
    transaction.has_queued = transaction.has_queued or job.run_at is not None


def _update_ended(transaction: Transaction, job: Job, old_state: str) -> bool:
    """Write how an attempt ended; return False if the job was not in that state (and attempt) any more."""
    row, large = _set_apart(job)
    large.pop("sent_data", None)  # stored with the submission
    count = transaction.execute(
        f"""UPDATE jobs SET status = ?, data = ?, error = ?, finished_timestamp = ?, progress = ?, run_at = ?,
        crashes = ?, failures = ?, callback_status = ?, callback_at = ?, api_key = ?
        WHERE seq = ? AND attempts = ? AND {_IN_STATE[old_state]}""", (
            row.status, row.data, row.error, row.finished_timestamp, row.progress, row.run_at, row.crashes,
            row.failures, row.callback_status, row.callback_at, row.api_key, row.seq, row.attempts)).rowcount
    if count:
        _insert_large(transaction, job.seq, large)
    return count > 0


def _set_apart(job: Job) -> Tuple[Job, Dict[str, Union[str, bytes]]]:
    large = {name: value for name, value in (("sent_data", job.sent_data), ("data", job.data))
             if value is not None and len(value) >= LARGE_CHARACTERS}
    return job._replace(**dict.fromkeys(large, "")) if large else job, large  # type: ignore[arg-type]


def _make_jobs(rows: Iterable[Sequence[Any]],
               read: Callable[[str, Sequence[Any]], Iterable[Sequence[Any]]]) -> List[Job]:
    """Return the jobs of the rows, without those deleted meanwhile; ``read`` gives the rows of a statement.

    Large values are read one after the other, so that there is only one copy.
    """
    jobs = []
    for job in map(Job._make, rows):
        apart = [name for name in ("sent_data", "data") if getattr(job, name) == ""]  # no JSON text: in ``large``
        found: Dict[str, Any] = {name: value for name in apart for (value,) in read(
            "SELECT value FROM large WHERE seq = ? AND name = ?", (job.seq, name))}
        if len(found) == len(apart):
            jobs.append(job._replace(**found) if found else job)
    return jobs


def _insert_large(transaction: Transaction, seq: int, values: Mapping[str, Union[str, bytes]]) -> None:
    for name, value in values.items():
        try:
            transaction.execute(_INSERT_LARGE, (seq, name, value))
        finally:
            with suppress(sqlite3.IntegrityError):  # SQLite keeps a statement's values until it gets others
                transaction.execute(_INSERT_LARGE, (None, None, None))


def _insert_output(transaction: Transaction, run: Run, is_deleted: bool = False) -> None:
    """Store (or drop) the run's log lines and progress, as far as this transaction has not done so before."""
    if not run.has_output:
        return
    output = run.peek(transaction.taken[run])
    transaction.taken[run] += len(output.lines)
    transaction.on_commit.append(lambda: run.drop(output))
    if is_deleted:
        return
    transaction.insert_rows(_INSERT_LINES, [(run.job_id, run.seq, *line) for line in output.lines])
    if output.progress is not None:
        transaction.execute(f"UPDATE jobs SET progress = ? WHERE seq = ? AND attempts = ? AND {_IN_STATE[RUNNING]}",
                            (output.progress, run.seq, run.attempt))


# ---------------------------------------------------------------------------------------------------------------------
# Callbacks
#
# The transaction that ends a job with a result_url also makes its callback due. One thread finds the hosts that have
# due callbacks, and a few threads per host send them, so that a receiver that hangs delays nobody else. Every attempt
# is recorded before the next one; after a crash in between, a callback is sent twice rather than never.
# ---------------------------------------------------------------------------------------------------------------------

RETRY_SECONDS = (1, 2, 4, 8, 15, 15, 15, 15, 15, 15, 60, 300, 1800, 7200, 18_000, 36_000)
RETRY_JITTER = 1.1
CALLBACK_SECONDS = 15.0  # per attempt
CALLBACK_THREADS = 64
CALLBACK_THREADS_PER_HOST = 4  # for a host that accepted its last callback; every other host gets one
MAX_RETRY_AFTER_SECONDS = 36_000.0

_RESERVED_HEADERS = frozenset(("host", "content-length", "transfer-encoding", "connection"))


def callback_header(api_key: Union[str, int, float]) -> Tuple[str, str]:
    """Return name and value of the header that carries the api_key; raise Conflict if it is not a legal header."""
    name, colon, value = str(api_key).partition(":")
    name, value = (name.strip(), value.strip()) if colon else ("Authorization", name.strip())
    is_legal = re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) and re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value)
    if not is_legal or name.lower() in _RESERVED_HEADERS:
        raise Conflict("api_key cannot be sent as a header: it has to be a value for Authorization, "
                       "or a header's name and value with a colon between")
    return name, value


def check_result_url(url: Any) -> None:
    if not isinstance(url, str) or not url.lower().startswith(("http://", "https://")):
        raise Conflict("result_url has to start with http")
    try:
        parts = urllib.parse.urlsplit(url)
        is_sound = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        is_sound = False
    if not is_sound or not re.fullmatch(r"[\x21-\x7e]+", url) or "\\" in url:
        raise Conflict("result_url has to name a host, in ASCII, without spaces and without a user's name")


class CallbackPolicy:
    """Decides where callbacks may go, by the address that is then connected to: a name can be rebound in between.

    ``allowed`` is empty (anywhere), ("public",), or host names, addresses and networks.
    """

    def __init__(self, allowed: Sequence[str] = (), resolve: Optional[Callable[[str, int], List[str]]] = None) -> None:
        self._is_public = "public" in allowed
        self._names = {word.lower() for word in allowed if word != "public"}
        self._networks: List[Union[ipaddress.IPv4Network, ipaddress.IPv6Network]] = []
        for name in self._names:
            with suppress(ValueError):  # a host's name
                self._networks.append(ipaddress.ip_network(name, strict=False))
        self._resolve = resolve or _resolve

    def connect(self, host: str, port: int, timeout_seconds: float) -> socket.socket:
        """Return a connection to the first address of ``host`` that is allowed and answers; raise OSError if none."""
        error: OSError = PermissionError(f"CALLBACK_HOSTS does not allow {host}")
        deadline = time.monotonic() + timeout_seconds  # for all addresses together
        for address in self._resolve(host, port):
            if self._allows(host, address):
                try:
                    return socket.create_connection((address, port), max(0.1, deadline - time.monotonic()))
                except OSError as reason:
                    error = reason
        raise error

    def _allows(self, host: str, address: str) -> bool:
        if not self._is_public and not self._names:
            return True
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if host.lower() in self._names or any(ip in network for network in self._networks):
            return True
        return self._is_public and ip.is_global and not ip.is_multicast


def _resolve(host: str, port: int) -> List[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def sign_callback(secret: str, job_id: str, now: float, body: bytes) -> Dict[str, str]:
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode("utf-8")
    job_id = urllib.parse.quote(job_id)  # an id may have letters that a header cannot hold
    signed = f"{job_id}.{int(now)}.".encode("ascii") + body
    signature = base64.b64encode(sign(key, signed)).decode("ascii")
    return {"webhook-id": job_id, "webhook-timestamp": str(int(now)), "webhook-signature": "v1," + signature}


class CallbackAnswer(NamedTuple):
    """The result of one attempt: ``error`` is None if it was accepted; after ``is_final`` there is no other attempt."""

    error: Optional[str] = None
    is_final: bool = False
    retry_after_seconds: float = 0.0


def next_callback_at(attempts: int, answer: CallbackAnswer, now: float) -> Optional[float]:
    """Return when to try again after the ``attempts``-th attempt (epoch seconds), or None: never."""
    if answer.error is None or answer.is_final or attempts > len(RETRY_SECONDS):
        return None
    delay = RETRY_SECONDS[attempts - 1] * jitter(RETRY_JITTER)
    return now + max(delay, min(answer.retry_after_seconds, MAX_RETRY_AFTER_SECONDS))


def _retry_after_seconds(text: str, now: float) -> float:
    """Return the seconds that a Retry-After header asks for (RFC 9110, section 10.2.3), 0 if it is not valid."""
    if re.fullmatch("[0-9]{1,9}", text.strip()):
        return float(text)
    with suppress(ValueError, OverflowError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    return 0.0


def _make_opener(policy: CallbackPolicy, ssl_verify: bool,
                 sockets: Dict[int, Tuple[float, socket.socket]]) -> urllib.request.OpenerDirector:
    """Return an opener of http and https URLs that connects as the policy allows and follows no redirects.

    Puts into ``sockets``, by thread, when the attempt has to end (monotonic) and its connection.
    """
    import http.client
    import urllib.request

    @functools.lru_cache(maxsize=None)
    def tls_context() -> ssl.SSLContext:  # made when first needed: reading the certificates takes a while
        import ssl
        return ssl.create_default_context() if ssl_verify else ssl._create_unverified_context()

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            deadline = time.monotonic() + CALLBACK_SECONDS
            self.sock = policy.connect(self.host, self.port, CALLBACK_SECONDS)
            sockets[threading.get_ident()] = deadline, self.sock
            if isinstance(self, TLSConnection):
                self.sock = wrapped = tls_context().wrap_socket(self.sock, server_hostname=self.host,
                                                                do_handshake_on_connect=False)
                sockets[threading.get_ident()] = deadline, wrapped
                wrapped.do_handshake()

    class TLSConnection(Connection):  # not from HTTPSConnection, which a Python without ssl does not have
        default_port = http.client.HTTPS_PORT

    class Handler(urllib.request.AbstractHTTPHandler):
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(Connection, request)

        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(TLSConnection, request)

    opener = urllib.request.OpenerDirector()
    opener.add_handler(Handler())
    return opener


class CallbackSender:
    """Sends due callbacks until they are accepted or given up. ``notify`` and ``stop`` may be called by any thread."""

    def __init__(self, store: Store, ssl_verify: bool = True, secret: Optional[str] = None,
                 policy: Optional[CallbackPolicy] = None, metrics: Optional[Metrics] = None) -> None:
        self._store = store
        self._metrics = metrics or Metrics()
        self._secret = secret
        self._policy, self._ssl_verify = policy or CallbackPolicy(), ssl_verify
        self._sockets: Dict[int, Tuple[float, socket.socket]] = {}  # see _make_opener
        self._condition = threading.Condition()  # guards the fields below
        self._due: Dict[str, float] = dict(store.list_callback_hosts())
        self._sending: Dict[int, str] = {}  # the host by the job's seq
        self._healthy: Set[str] = set()  # hosts that accepted their last callback
        self._is_stopping = False
        self._pool = ThreadPoolExecutor(CALLBACK_THREADS, "csp-callback")
        self._thread = threading.Thread(target=self._run, name="csp-callbacks", daemon=True)
        self._thread.start()

    def notify(self, host: str, at: float) -> None:
        with self._condition:
            self._due[host] = min(at, self._due.get(host, at))
            self._condition.notify_all()

    def stop(self, timeout_seconds: float) -> None:
        """Start no more deliveries and wait a moment for those in progress; the others are on disk."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._sending, timeout_seconds)
        self._thread.join()
        self._pool.shutdown(wait=False)

    def _run(self) -> None:
        while True:
            self._store.follow_clock()
            with self._condition:
                now = time.time()
                due = {host: at for host, at in self._due.items() if self._has_place(host)}
                ready = [host for host, at in due.items() if at <= now]
                if not ready and not self._is_stopping:
                    self._condition.wait(min([*(at - now for at in due.values()), 1.0 if self._sending else 60.0]))
                if self._is_stopping:
                    return
                for host in ready:
                    del self._due[host]
            for deadline, connection in list(self._sockets.values()):
                if deadline < time.monotonic():  # a socket's timeout starts anew with every byte that drips
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            for host in ready:
                try:
                    self._start_due(host, now)
                except Exception as error:  # noqa: BLE001 - the sender's loop has to survive anything
                    log.warning("callbacks to %s cannot be sent now: %s: %s", host, type(error).__name__, error)
                    self.notify(host, now + 1.0)

    def _has_place(self, host: str) -> bool:
        limit = CALLBACK_THREADS_PER_HOST if host in self._healthy else 1
        return len(self._sending) < CALLBACK_THREADS and list(self._sending.values()).count(host) < limit

    def _start_due(self, host: str, now: float) -> None:
        """Start the due deliveries to ``host`` while there is place, and note when the next is due."""
        with self._condition:  # before reading: a delivery that ends meanwhile may still be read as due
            sending = {seq for seq, receiver in self._sending.items() if receiver == host}
        limit = len(sending) + CALLBACK_THREADS_PER_HOST + 1
        jobs = self._store.list_due_callbacks(host, limit)
        with self._condition:
            for job in jobs:
                at = job.callback_at or 0.0
                if job.seq in sending:
                    continue
                if at > now or not self._has_place(host) or self._is_stopping:
                    self.notify(host, at)
                    return
                self._pool.submit(self._deliver, host, job)
                self._sending[job.seq] = host
        if len(jobs) == limit:  # deliveries that ended meanwhile have made place for more than were read
            self.notify(host, now)

    def _deliver(self, host: str, job: Job) -> None:
        answer = self._send(job)
        next_at = next_callback_at(job.callback_attempts + 1, answer, time.time())
        status = "delivered" if answer.error is None else "failed" if next_at is None else PENDING
        self._metrics.callbacks.add((("result", {PENDING: "retry", "failed": "given_up"}.get(status, status)),))
        if answer.error is not None:
            log.warning("callback of job %s to %s: %s", job.job_id, host, answer.error)
        while True:  # a delivered callback must not be sent again and again while the disk is full
            try:
                if not self._store.mark_callback(job, status, answer.error, next_at):
                    next_at = time.time()  # it was made due anew, or is gone: look
                break
            except Exception as reason:  # noqa: BLE001 - the sender's loop has to survive anything
                log.warning("the callback of job %s cannot be recorded now: %s", job.job_id, reason)
                with self._condition:
                    if self._condition.wait_for(lambda: self._is_stopping, 1.0):
                        break
        with self._condition:
            del self._sending[job.seq]
            (self._healthy.add if answer.error is None else self._healthy.discard)(host)
            if next_at is not None:
                self.notify(host, next_at)
            self._condition.notify_all()

    @functools.cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        return _make_opener(self._policy, self._ssl_verify, self._sockets)

    def _send(self, job: Job) -> CallbackAnswer:
        import urllib.request
        now = time.time()
        headers = {"Content-Type": "application/json", "User-Agent": f"csp.py/{__version__}"}
        try:
            rendered = render_job(job, self._store.get_logs(job), job_key=True, callback_error=False)
            body = rendered if isinstance(rendered, bytes) else b"".join(rendered)
            if job.api_key is not None:
                headers.update([callback_header(job.api_key)])
            if self._secret:
                headers.update(sign_callback(self._secret, job.job_id, now, body))
            request = urllib.request.Request(job.result_url or "", body, headers, method="POST")
            with self._opener.open(request, timeout=CALLBACK_SECONDS) as response:
                if 200 <= response.status < 300:
                    return CallbackAnswer()
                return CallbackAnswer(f"answered {response.status}", response.status == 410,
                                      _retry_after_seconds(response.headers.get("Retry-After", ""), now))
        except Conflict as error:
            return CallbackAnswer(error.message, is_final=True)
        except Exception as error:  # noqa: BLE001 - whatever it is has to be recorded, or it repeats at once
            reason = getattr(error, "reason", error)
            return CallbackAnswer(clean(f"{type(reason).__name__}: {reason}"))
        finally:
            self._sockets.pop(threading.get_ident(), None)


# ---------------------------------------------------------------------------------------------------------------------
# Executors
#
# A job's function runs in a thread of this process, in a process of its own, or in a worker of any
# concurrent.futures.Executor. A worker gets texts: an environment (where this module is, its names, the settings) and a
# task, which ``run_task`` runs there to a text. Meanwhile a Reporter brings log and progress to the service by HTTP,
# with a token that is good for that run alone; what could not be sent comes with the result.
# ---------------------------------------------------------------------------------------------------------------------

MAX_RESULT_BYTES = 2**29  # SQLite stores at most 10^9 bytes in a value (sqlite.org/limits.html)
REPORT_SECONDS = 1.0  # how often a worker that has nothing to say, or was not answered, asks whether its run goes on
REPORT_PAUSE_SECONDS = 0.1  # between reports of a worker that has much to say
REPORT_TIMEOUT_SECONDS = 10.0
FIRST_REPORTS = 3  # how often a worker asks whether it may begin a job that may run at most once
ADDRESS_SECONDS = 1.0  # how long the first jobs wait for the server to have an address
KILL_SECONDS = 0.5  # between SIGTERM and SIGKILL: time for a job to clean up
SIGKILL: int = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process either way
NOT_AGAIN = "It is not of a kind that is run again."
_PROCESS = make_token()  # with the process id it tells a worker whether it is the service's own process
_INTEGER = struct.Struct("i")  # the fork server's messages: process ids, exit codes and file descriptors


def error_document(error: BaseException) -> str:
    """Return the JSON text of the error object for what a function raised; never raises."""
    message = type(error).__name__
    try:
        if not isinstance(error, JobError):
            message = describe_error(error)
            link: Optional[BaseException] = error
            for _ in range(10):
                if isinstance(link, MemoryError):
                    traceback.clear_frames(link.__traceback__)  # they may hold all the memory that there is
                link = link and (link.__cause__ or link.__context__)
            lines = traceback.format_exception(type(error), error, error.__traceback__)
            return to_json({"message": message, "traceback": clean("".join(lines))})
        message = safe_text(getattr(error, "message", "")) or message
        document = error.as_dict()
        if isinstance(document, dict) and isinstance(document.get("message"), str):
            text = to_json(document)
            check_structure(text.encode("utf-8"))
            return text
    except BaseException:  # noqa: BLE001 - as_dict and __str__ are the job author's code and may do anything
        log.debug("an error of type %s cannot describe itself", type(error).__name__)
    return to_json({"message": message})


def safe_text(value: Any) -> str:
    """Return ``str(value)``, or nothing if that raises or is no string."""
    try:
        return clean(str(value))
    except BaseException:  # noqa: BLE001 - part of the job run: __str__ is the job author's code
        return ""


def describe_error(error: BaseException) -> str:
    text = safe_text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@functools.lru_cache(maxsize=1)
def prepare_for_shortage() -> None:
    """Import what describing a failure needs: a job may leave no memory or file descriptors to import it later."""
    for name in ("ast", "encodings.unicode_escape", "textwrap", "tokenize"):
        with suppress(Exception):
            importlib.import_module(name)


def run_function(function: Callable[[str, Dict[str, Any]], Any], run: Run, read_input: Callable[[], Dict[str, Any]],
                 take_stream: Optional[Callable[[Callable[[], Iterable[Any]]], Any]]) -> Outcome:
    """Run the job's function to its outcome, whatever it does.

    ``take_stream``, of a job that may stream, gets a result that can be called, and what it returns is the result.
    """
    token = _current_run.set(run)
    prepare_for_shortage()
    try:
        result = function(run.job_id, read_input())
        if take_stream is not None and callable(result):
            result = take_stream(result)
        if isinstance(result, (bytes, bytearray, memoryview)):
            data: Union[str, bytes, None] = bytes(result)
        else:
            try:
                data = None if result is None else to_json(result)
            except (TypeError, ValueError, RecursionError) as error:
                return failure(f"The result of the job is not JSON: {error}")
        if data is not None and len(data) > MAX_RESULT_BYTES:
            return failure(f"The result of the job is larger than {MAX_RESULT_BYTES:,} bytes.")
        return Outcome(COMPLETE, data=data)
    except JobCancelled:
        return failure(CANCELLED)
    except BaseException as error:  # noqa: BLE001 - the job run: SystemExit and KeyboardInterrupt of a job are its own
        return Outcome(ERROR, error=error_document(error), may_retry=not isinstance(error, JobError))
    finally:
        _current_run.reset(token)


def encode_part(part: Any) -> bytes:
    """Return a part of a streamed result as bytes; raise TypeError if it is neither str nor bytes."""
    if isinstance(part, bytes):
        return part
    if not isinstance(part, str):
        raise TypeError(f"a streamed result has to yield str or bytes, not {type(part).__name__}")
    return part.encode("utf-8")


def join_stream(stream: Callable[[], Iterable[Any]]) -> Union[str, bytes]:
    """Return a streamed result in one piece, as text if it is UTF-8."""
    data = b"".join(map(encode_part, stream()))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


# -- what a worker gets

class RemoteRun(Run):
    """A run whose function runs in a worker; ``token`` lets it report, ``executor`` and ``future`` are where it is.

    An executor may begin a task again when its worker has died: only the latest execution counts then, and of a job
    that ``asks_first``, because it may run at most once, only the first. Any thread may call the methods.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.token = make_token()
        self.executor: Optional[Executor] = None
        self.future: Optional[Future[Any]] = None
        self.asks_first = False  # whether the worker asks before it begins
        self._intake = threading.Lock()  # one report at a time; guards what follows
        self.executions: List[str] = []
        self._received = 0

    def tell_to_stop(self) -> None:
        """Set the flag that the next report brings back, and cancel the future if the executor can."""
        super().tell_to_stop()
        if self.future is not None:
            with suppress(Exception):  # foreign code, and the runner's loop is what calls it
                self.future.cancel()

    def take_report(self, report: Mapping[str, Any]) -> bool:
        """Add the report's new lines and its progress; return whether that execution goes on."""
        execution, first = report["execution"], report["first"]
        with self._intake:
            if execution not in self.executions and not (self.executions and self.asks_first):
                if self.executions:
                    self.add_line(service_line("WARNING", "The executor has begun the job again."))
                self.executions.append(execution)
                self._received = 0
                self.begun_at = max(self.started_at, time.monotonic() - report["seconds"])
            if execution != self.executions[-1]:
                return False
            lines = [LogLine(**line) for line in report["lines"]]
            for line in lines[max(0, self._received - first):]:
                self.add_line(line)
            self._received = max(self._received, first + len(lines))
        if report["progress"] is not None:
            self.set_progress(**report["progress"])
        return not self.is_cancelled and not self.is_ended


def locate(function: Callable[..., Any]) -> Location:
    """Return module, file and name of the function; raise ValueError if another process cannot find it by them."""
    module = sys.modules.get(function.__module__)
    if module is None or getattr(module, function.__qualname__, None) is not function:
        raise ValueError(f"{_place(function)} cannot be found by another process: the function of a job has to stand "
                         "at the top level of a module, under its name, unless EXECUTOR is thread.")
    path, name = getattr(module, "__file__", None), module.__name__
    if name == "__main__":
        spec = getattr(module, "__spec__", None)
        name = spec.name if spec is not None else os.path.splitext(os.path.basename(path or "csp.py"))[0]
    return {"module": name, "file": path and os.path.abspath(path), "name": function.__qualname__}


def describe_environment(settings: Mapping[str, Any], is_here: bool) -> Dict[str, Any]:
    """Return what a worker needs before it can run jobs; with the secrets only if ``is_here``, on this machine."""
    this, kept = sys.modules[__name__], {}
    for name, value in settings.items():
        with suppress(TypeError, ValueError, RecursionError):  # what is not JSON stays here
            if (is_here or name not in OWN_SECRETS) and to_json(value):
                kept[name] = value
    aliases = [name for name, module in list(sys.modules.items()) if module is this and not name.startswith("__")]
    return {**locate(run_task), "path": [os.path.abspath(entry) for entry in sys.path], "aliases": aliases,
            "settings": kept, "process": [_PROCESS, os.getpid()]}


# A text, because a worker executes it to get this module. A module is found by its file, because its name may mean
# something else in the worker; on another machine, where there is no such file, by its name.
_IMPORT_FILE = '''
def import_file(path, name):
    """Import the module in that file, as ``name`` or one like it if that is taken; where there is no file, by name."""
    import importlib.util, itertools, os, sys, threading
    from importlib.machinery import SourceFileLoader
    if path is None or not os.path.isfile(path):
        return importlib.import_module(name)
    path = os.path.realpath(path)
    with vars(sys).setdefault("_csp_importing", threading.RLock()):  # several threads may want the same file
        for wanted in itertools.chain(("__main__", name), (f"{name}_{number}" for number in itertools.count(2))):
            if wanted in sys.modules:
                file = getattr(sys.modules[wanted], "__file__", None)
            else:
                try:
                    file = importlib.util.find_spec(wanted).origin
                except (ImportError, AttributeError):
                    break  # nothing has that name
            if file and os.path.realpath(file) == path:
                return importlib.import_module(wanted)
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))
        spec = importlib.util.spec_from_file_location(wanted, path, loader=SourceFileLoader(wanted, path))
        module = sys.modules[wanted] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(wanted, None)
            raise
        return module
'''
_names: Dict[str, Any] = {}
exec(_IMPORT_FILE, _names)
import_file: Callable[[Optional[str], str], types.ModuleType] = _names["import_file"]

# A worker of any executor gets these texts and ``environment`` to call with eval, and no function that it would have to
# find: a scheduler that unpickles what it hands on needs no csp.py.
_PREPARE = _IMPORT_FILE + '''
import sys
sys.path.extend(entry for entry in environment["path"] if entry not in sys.path)
csp = import_file(environment["file"], environment["module"])
'''
_CALL = "exec(prepare) or csp.run_task(task, environment)"

# The fork server reads the same from standard input, because everybody sees a process's arguments. It sets sys.path
# first: a file beside csp.py may have the name of a module that the others import.
_SERVE = """import sys
names = eval(sys.stdin.read())
sys.path[:] = names["environment"]["path"]
exec(names["prepare"], names)
names["csp"].serve_forks(names["control"], names["environment"], names["functions"])"""


def load_module(name: str) -> types.ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if not os.path.isfile(name):
            raise ImportError("there is no such file")
        path = os.path.realpath(name)
        return import_file(path, re.sub(r"\W", "_", os.path.splitext(os.path.basename(path))[0]))
    except StartError:
        raise
    except (ImportError, SyntaxError) as error:
        raise StartError(f"The module {name} cannot be imported: {describe_error(error)}.") from None
    except (Exception, SystemExit) as error:
        lines = traceback.extract_tb(error.__traceback__)
        line = next((line for line in reversed(lines) if line.filename not in (__file__, "<string>")), lines[-1])
        raise StartError(f"The module {name} fails: {describe_error(error)} "
                         f"({line.filename}, line {line.lineno}).") from error


# -- in a worker

def become(name: str) -> None:
    for part in ("", ".job", ".util", ".web"):
        sys.modules[name + part] = sys.modules[__name__ + part]


def enter_environment(environment: Mapping[str, Any]) -> None:
    """Give this worker the service's names for this module and its settings."""
    if environment["process"] != [_PROCESS, os.getpid()]:
        for alias in environment["aliases"]:
            become(alias)
        registry.is_in_use = False
        _end_with_parent()
        config.load(Settings(environment["settings"]))


@functools.lru_cache(maxsize=None)  # once in a process
def _end_with_parent() -> None:
    """End this process, if it belongs to a pool, when the pool's owner has been killed: it would wait forever."""
    import multiprocessing
    parent = multiprocessing.parent_process()
    if parent is not None:
        def end() -> None:
            parent.join()
            os._exit(1)
        threading.Thread(target=end, name="csp-parent", daemon=True).start()


class Reporter(Run):
    """A task's run in a worker: brings its log and progress to the service, which says when it is to stop.

    ``work``, in a thread of its own, sends in batches, and again what did not arrive; ``close`` returns the rest.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        super().__init__(task["job_id"], 0, task["attempt"], lambda run, is_log: self._wanted.set())
        self._url, self._token, self._execution = urllib.parse.urlsplit(task["url"] or ""), task["token"], make_token()
        self._lock = threading.Lock()  # guards the next two, so that ``close`` returns what was not sent
        self._sent = 0
        self._closing = threading.Event()
        self._wanted = threading.Event()
        self.limit_backlog(bool(task["url"]))

    def work(self) -> None:
        while not self._closing.is_set():
            self._wanted.wait(REPORT_SECONDS)
            self._wanted.clear()
            if not self._closing.is_set():
                is_answered = self.report() is not None
                self.limit_backlog(is_answered)  # no job waits for a service that cannot be reached
                self._closing.wait(REPORT_PAUSE_SECONDS if is_answered else REPORT_SECONDS)

    def report(self) -> Optional[bool]:
        """Send what is new; return whether the run goes on, None if the service has not answered."""
        import http.client
        with self._lock:
            output = self.peek()
            body = to_json(self._describe(output)).encode("utf-8")
        goes_on: Optional[bool] = None
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        with closing(kind(self._url.netloc, timeout=REPORT_TIMEOUT_SECONDS)) as connection, suppress(
                OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            headers = {"Authorization": self._token, "Content-Type": "application/json"}
            connection.request("POST", self._url.path, body, headers)
            response = connection.getresponse()
            if response.status in (200, 403, 404):  # the last two: the run is over for the service
                goes_on = response.status == 200 and not json.loads(response.read())["cancelled"]
        with self._lock:
            if goes_on is False:
                self.tell_to_stop()
            if goes_on is not None and not self._closing.is_set():
                self.drop(output)
                self._sent += len(output.lines)
            if self.has_output:
                self._wanted.set()
        return goes_on

    def close(self) -> Dict[str, Any]:
        """Send no more; return a report of what may not have arrived."""
        with self._lock:
            self._closing.set()
            self._wanted.set()
            return self._describe(self.peek())

    def _describe(self, output: Output) -> Dict[str, Any]:
        return {"execution": self._execution, "first": self._sent, "lines": [line._asdict() for line in output.lines],
                "progress": json.loads(self.progress or "null"), "seconds": time.monotonic() - self.started_at}


def run_task(text: Union[str, bytes], environment: Mapping[str, Any]) -> str:
    """Run the task's function in this process; return its outcome and the last report as a text. Raises nothing."""
    task = json.loads(text)
    run = Reporter(task)

    def call(task_id: str, input: Dict[str, Any]) -> Any:
        if task["memory_limit"] is not None:
            import resource
            most = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (task["memory_limit"], most))
        enter_environment(environment)
        place = task["function"]
        return getattr(import_file(place["file"], place["module"]), place["name"])(task_id, input)

    may_begin: Optional[bool] = None if task["asks_first"] else True
    for number in range(FIRST_REPORTS if task["url"] else 0):
        if may_begin is None:
            time.sleep(number * REPORT_SECONDS)
            may_begin = run.report()
    if may_begin:
        _runs.setdefault(run.job_id, run)  # the service's own process has its own run there
        if task["url"]:
            threading.Thread(target=run.work, name="csp-report", daemon=True).start()
        outcome = run_function(call, run, lambda: task["input"], join_stream if task["streams"] else None)
    else:
        outcome = failure(
            f"A worker has died while it ran the job. {NOT_AGAIN}" if may_begin is False else
            "The worker cannot reach the service (setting URL), and a job that may run at most once is not begun "
            "without it.")
    run.end()
    binary = base64.b64encode(outcome.data).decode("ascii") if isinstance(outcome.data, bytes) else None
    return to_json({**outcome._asdict(), "data": outcome.data if binary is None else None, "base64": binary,
                    "report": run.close()})


# -- a process for each job

class ProcessFuture(Future):  # type: ignore[type-arg]  # it is no generic class before Python 3.9
    """The future of a task in a process of its own; ``cancel`` has that process ended."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__()
        self._control, self.pid, self.is_unwanted = control, 0, False

    def cancel(self) -> bool:
        """Have the process sent SIGTERM, and SIGKILL after KILL_SECONDS; its end is the task's."""
        self.is_unwanted = True
        if self.pid and not self.done():
            with suppress(OSError):  # the server process has ended
                self._control.send(_INTEGER.pack(self.pid))
        return False


class ProcessExecutor(Executor):
    """Runs each task in a process of its own, forked from a server process that has imported the job modules already.

    (multiprocessing's own would run the main module again in each process, and preloads no module from a file.)

    The server gets the id of a process to stop, or 0 and a connection. There it answers with the id of a new process,
    which takes the task and sends its result; then the server adds the exit code and shuts the connection down,
    whoever else has inherited it. A future's result is a text, or an Ending if there is none.
    """

    def __init__(self, environment: Mapping[str, Any], functions: Sequence[Location]) -> None:
        import subprocess
        self._control, control = socket.socketpair()
        self.close_in_child = self._control.close
        _closed_in_children.add(self)
        with control:
            values = {"prepare": _PREPARE, "environment": environment, "functions": functions,
                      "control": control.fileno()}
            self._process = subprocess.Popen([sys.executable, "-c", _SERVE], stdin=subprocess.PIPE,
                                             pass_fds=[control.fileno()], start_new_session=True)
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as stream:  # if it has ended, the first task is told so
            stream.write(ascii(values).encode("ascii"))

    def submit(self, function: Callable[..., str],  # type: ignore[override]  # the class is generic in nothing
               *arguments: Any, **_: Any) -> ProcessFuture:
        """Run the task of an Engine's call; the server knows the rest of the call."""
        future = ProcessFuture(self._control)
        future.set_running_or_notify_cancel()
        call = (future, arguments[1]["task"].encode("utf-8") + b"\n", *socket.socketpair())
        threading.Thread(target=self._run, args=call, name="csp-process", daemon=True).start()
        return future

    def shutdown(self, *_: Any, **__: Any) -> None:
        import subprocess
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # the server ends, and with it all its processes
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2.0)  # it has little to do

    def _run(self, future: ProcessFuture, task: bytes, data: socket.socket, childs_data: socket.socket) -> None:
        try:
            future.set_result(self._get_result(future, task, data, childs_data))
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for the future
            if future.pid:
                _kill_group(future.pid, SIGKILL)
            future.set_exception(BrokenExecutor(f"The server process has ended ({describe_error(error)})."))

    def _get_result(self, future: ProcessFuture, task: bytes, data: socket.socket, childs_data: socket.socket,
                    ) -> Union[str, Ending]:
        """Return what comes of the task; raise something if the server process has ended."""
        from multiprocessing.connection import wait

        def receive(size: int) -> bytes:
            if self._control in wait([data, self._control]):
                raise EOFError
            return data.recv(size)

        with data:
            with childs_data:
                descriptor = _INTEGER.pack(childs_data.fileno())
                self._control.sendmsg([_INTEGER.pack(0)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)])
            pid: int = _INTEGER.unpack(receive(_INTEGER.size))[0]
            if pid < 0:
                return Ending(NOT_STARTED, reason=f"No process can be made: {os.strerror(-pid)}.")
            future.pid = pid
            if future.is_unwanted:
                future.cancel()
            with suppress(OSError):  # then its exit code says why
                data.sendall(task)
            received = b"".join(iter(lambda: receive(2**20), b""))
        result, code = received[:-_INTEGER.size], _INTEGER.unpack(received[-_INTEGER.size:])[0]
        if result and code == 0:
            return result.decode("utf-8")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        return Ending(DIED, reason=f"The process of the job was killed by signal {-code} ({name})." if code < 0 else
                      f"The process of the job ended with exit code {code} before the job had returned.")


def serve_forks(descriptor: int, environment: Mapping[str, Any], functions: Sequence[Location]) -> None:
    """Be the server process: import the job modules, then fork for each task, until the service's end closes."""
    from multiprocessing.connection import wait
    control = socket.socket(fileno=descriptor)
    children: Dict[int, socket.socket] = {}  # by pid
    told: Dict[int, float] = {}  # by pid: when it was told to stop (monotonic)
    prepare_for_shortage()
    enter_environment(environment)
    for place in functions:
        with suppress(BaseException):  # the job's own process will say it, where somebody sees it
            import_file(place["file"], str(place["module"]))
    for number in (signal.SIGTERM, signal.SIGINT):  # whoever sends one to all processes means the service
        signal.signal(number, signal.SIG_IGN)
    _flush_streams()  # or each child would write what the modules have printed
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        while True:
            ready = wait([control, reader], 0.1 if told else None)
            for pid, told_at in told.items():
                if time.monotonic() - told_at > KILL_SECONDS:
                    _kill_group(pid, SIGKILL)
            if reader in ready:
                os.read(reader, 4096)
                for pid in list(children):
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
                        if told.pop(pid, 0.0) or code < 0:
                            _kill_group(pid, SIGKILL)  # what it had started
                        with children.pop(pid) as connection, suppress(OSError):
                            connection.sendall(_INTEGER.pack(code))
                            connection.shutdown(socket.SHUT_RDWR)
            if control in ready:
                message, ancillary, _, _ = control.recvmsg(_INTEGER.size, socket.CMSG_SPACE(_INTEGER.size))
                if not message:
                    break
                pid = _INTEGER.unpack(message)[0]
                if ancillary:
                    connection = socket.socket(fileno=_INTEGER.unpack(ancillary[0][2])[0])
                    _fork(connection, environment, control, children)
                elif pid in children:
                    told.setdefault(pid, time.monotonic())
                    _kill_group(pid, signal.SIGTERM)
    finally:
        for pid in children:
            _kill_group(pid, SIGKILL)
        os._exit(0)


def _kill_group(pid: int, number: int) -> None:
    with suppress(OSError):
        os.killpg(pid, number)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _fork(connection: socket.socket, environment: Mapping[str, Any], control: socket.socket,
          children: Dict[int, socket.socket]) -> None:
    """Fork a process for the connection's task, in a session of its own: a signal reaches also what it starts."""
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or 1)
    if pid != 0:
        with suppress(OSError):
            connection.sendall(_INTEGER.pack(pid))
        if pid > 0:
            children[pid] = connection
        else:
            connection.close()
        return
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for other in (control, *children.values()):
            other.close()
        with connection.makefile("rb") as stream:
            task = stream.readline()  # JSON has no line breaks
        connection.sendall(run_task(task, environment).encode("utf-8"))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, this process has to end here
        traceback.print_exc()
    finally:
        _flush_streams()
        os._exit(code)


# -- the executor of a service

class Engine:
    """Gives jobs to the executor that ``make`` makes, and replaces it when it has broken.

    ``is_here``: its processes are the service's own, which may know the secrets. Any thread may call the methods.
    """

    def __init__(self, make: Callable[[], Executor], settings: Mapping[str, Any], is_here: bool) -> None:
        self._make, self._is_here = make, is_here
        self._lock = threading.Lock()  # while an executor is made, which may take forever
        self._executors = [make()]  # none if it has broken
        self._is_closed = False
        self._url: Optional[str] = settings["URL"]
        self._is_url_known = threading.Event()
        self._environment = describe_environment(settings, is_here)

    def reachable_at(self, url: Optional[str]) -> None:
        """Say at which address workers reach the service, unless the setting URL does; None: at none."""
        self._url = self._url or url
        self._is_url_known.set()

    def start(self, job: Job, job_type: JobType, run: RemoteRun, then: Callable[[Future[Any]], Any],
              ) -> Optional[Ending]:
        """Give a job to the executor, which calls ``then`` when it is done; return how it ended if it is not taken."""
        if not self._is_url_known.wait(ADDRESS_SECONDS):
            self.reachable_at(None)
        run.asks_first = job_type.at_most_once and not self._is_here
        url = f"{self._url}job/{urllib.parse.quote(job.job_id, safe='')}/report" if self._url else None
        try:
            task = to_json({
                "job_id": job.job_id, "attempt": job.attempts, "function": locate(job_type.function),
                "input": job.read_input(), "streams": job_type.synchronous, "url": url, "token": run.token,
                "asks_first": run.asks_first, "memory_limit": job_type.memory_limit if self._is_here else None})
        except ValueError as error:
            return Ending(ENDED, failure(safe_text(error)))
        try:
            with self._lock:
                if not self._executors:
                    self._executors.append(self._make())
                run.executor = self._executors[0]
            if self._is_closed:
                self.close()  # the service was stopped while it was made
            values = {"prepare": _PREPARE, "environment": self._environment, "task": task}
            run.future = run.executor.submit(eval, _CALL, values)
            run.future.add_done_callback(then)
        except Exception as error:  # noqa: BLE001 - an executor is foreign code and may fail in any way
            if not self._is_here and not isinstance(error, (TypeError, ValueError)):  # these are about the task
                self._discard(run.executor)
            return Ending(NOT_STARTED, reason=f"It could not be started: {describe_error(error)}")
        return None

    def read_ending(self, run: RemoteRun, future: Future[Any]) -> Ending:
        """Return how the run ended whose future is done, after taking its last report; discard a broken executor."""
        try:
            result = future.result()
            if isinstance(result, Ending):
                return result
            result = json.loads(result)
            report, binary = result.pop("report"), result.pop("base64")
            outcome = Outcome(**result) if binary is None else Outcome(**{**result, "data": base64.b64decode(binary)})
            run.take_report(report)
        except BaseException as error:  # noqa: BLE001 - an executor is foreign code and may fail in any way
            is_broken = isinstance(error, BrokenExecutor)
            if is_broken:
                self._discard(run.executor)
            is_begun = bool(run.executions) or not run.asks_first
            return Ending(NOT_STARTED if not is_begun else CRASHED if is_broken else LOST,
                          reason=f"The executor has failed: {describe_error(error)}")
        is_cancelled = outcome.status == ERROR and run.is_cancelled  # whatever it raised when it was told to stop
        return Ending(CANCELLED) if is_cancelled else Ending(ENDED, outcome)

    def close(self) -> None:
        """End the executor; what still runs in it is not waited for."""
        self._is_closed = True
        for executor in self._executors[:]:
            self._discard(executor)

    def _discard(self, executor: Optional[Executor]) -> None:
        if executor in self._executors:
            with suppress(Exception):  # it is foreign code, or another thread has discarded it just now
                self._executors.remove(executor)
                executor.shutdown(wait=False)


def make_engine(settings: Mapping[str, Any], registry: Registry) -> Optional[Engine]:
    """Return the engine that EXECUTOR asks for, None for threads; raise StartError if there can be none."""
    name: str = settings["EXECUTOR"]
    if name == "thread":
        return None
    if name == "process" and not hasattr(os, "fork"):
        raise StartError("The setting EXECUTOR is process, and this system cannot fork processes; set it to thread or "
                         "to MODULE:FACTORY.")
    types = filter(None, map(registry.get, registry.names()))
    try:
        functions = [locate(job_type.function) for job_type in types if not job_type.synchronous]
        if name == "process":
            environment = describe_environment(settings, is_here=True)
            return Engine(lambda: ProcessExecutor(environment, functions), settings, is_here=True)
        module, _, attribute = name.rpartition(":")
        factory = getattr(load_module(module), attribute)

        def make() -> Executor:
            import multiprocessing.util
            executor = factory(settings)
            if not isinstance(executor, Executor):
                raise TypeError(f"it has returned {type(executor).__name__}, which is no concurrent.futures.Executor")
            multiprocessing.util.register_after_fork(executor, lambda _: _end_with_parent())
            return executor
        return Engine(make, settings, is_here=False)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"The executor {name} cannot be made: {describe_error(error)}.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Runner
#
# Theory of operation: one thread claims as many queued jobs as there are free places and starts them; the backlog stays
# on disk, and a signal wakes the thread. A function runs in a thread of the pool, in the executor, or (synchronous) in
# the thread that asked. However an attempt ends, ``decide`` says what that means and the store records it; the first
# ending of an attempt counts, later ones are dropped. A job that was running when the process died is found at the next
# start and takes the same way. An ending that the disk cannot take is kept and recorded later.
# ---------------------------------------------------------------------------------------------------------------------

ABANDONED_THREADS = 1000  # a function past its timeout cannot be stopped in a thread: so many may linger
SWITCH_SECONDS = (0.005, 0.0005)  # sys.setswitchinterval: usually, and while a job runs longer than LONG_JOB_SECONDS
LONG_JOB_SECONDS = 0.25
PROGRESS_SECONDS = 0.2  # how often progress is written, however often it is set
NEVER = float("inf")
MAX_SLEEP_SECONDS = 3600.0  # of the runner's loop: a wait must not exceed threading.TIMEOUT_MAX
RETRY_DISK_SECONDS = 1.0  # how long to wait for a disk that could not take a write
ALONE_SECONDS = 60.0  # how long a suspect runs alone: if it kills the process again, it must not take others along
STOPPED_MESSAGE = "The service stopped while the job was running."


def _backoff(count: int) -> float:
    return min(BACKOFF_SECONDS[0] * 2.0 ** min(count, 20), BACKOFF_SECONDS[1])


def decide(job: Job, job_type: Optional[JobType], ending: Ending, now: float) -> Union[Finish, Requeue]:
    """Return what the ending of an attempt means for its job: it has finished, or it runs again. Pure.

    ``job.cancelled`` says whether it was told to stop; ``job_type`` is None if it is not registered any more.
    """
    kind, outcome, reason = ending
    retries, at_most_once = (job_type.retries, job_type.at_most_once) if job_type is not None else (0, False)
    if kind in (ENDED, DIED):
        outcome = outcome or (failure(CANCELLED) if job.cancelled else failure(reason, may_retry=not at_most_once))
        if not outcome.may_retry or job.failures >= retries or job.cancelled:
            return Finish(outcome)
        delay = _backoff(job.failures) * jitter(BACKOFF_JITTER)
        message = json.loads(outcome.error or "{}").get("message")
        return Requeue(now + delay, job.crashes, job.failures + 1,
                       f"Attempt {job.attempts} failed ({message}); the next is in {delay:.1f} seconds.")
    if kind == TIMED_OUT:
        return Finish(failure(reason))
    if kind == CANCELLED or job.cancelled:
        return Finish(failure(CANCELLED))
    if kind == NOT_STARTED:
        if job.synchronous:
            return Finish(failure(reason))
        return Requeue(now + BACKOFF_SECONDS[0], job.crashes, job.failures, reason)
    if job.synchronous or at_most_once:
        return Finish(failure(f"{reason} {NOT_AGAIN}"))
    if kind == STOPPED:  # an orderly stop counts as nothing
        return Requeue(AFTER_STOP, job.crashes, job.failures, "")
    attempts, limit = job.crashes + job.failures + 1, max(MAX_ATTEMPTS, retries + 1)
    if attempts >= limit:
        return Finish(failure(f"{reason} That was attempt {attempts} of {limit}, so it is not run again."))
    run_at = AFTER_CRASH if kind == CRASHED else now + _backoff(job.crashes)
    return Requeue(run_at, job.crashes + 1, job.failures, reason)


class Attempt(NamedTuple):
    """An attempt under way. ``job_type`` is None if it is not registered any more."""

    run: Run
    job: Job
    job_type: Optional[JobType]


class Runner:
    """Runs jobs: queued ones at most ``workers`` at a time, synchronous ones in the caller's thread.

    Queued jobs run in threads or, with an ``engine``, in its executor. Any thread may call the public methods.
    """

    def __init__(self, store: Store, registry: Registry, workers: int, engine: Optional[Engine] = None,
                 metrics: Optional[Metrics] = None) -> None:
        self._store, self._registry, self._workers, self._engine = store, registry, workers, engine
        self._metrics = metrics or Metrics()
        self._pool = ThreadPoolExecutor(workers + ABANDONED_THREADS, "csp-job")
        self.may_adjust_switching = False  # the interval is the whole process's
        self._condition = threading.Condition()  # guards what follows
        self._attempts: Dict[int, Attempt] = {}  # by seq
        self._busy = 0  # attempts at queued jobs
        self._flush_at: Dict[Run, float] = {}  # runs whose output is to be stored, and when (monotonic)
        self._unrecorded: Deque[Tuple[Job, Union[Finish, Requeue], Optional[Run]]] = deque()  # the disk was full
        self._alone_until = 0.0  # monotonic
        self._claim_at = 0.0  # when to look for queued jobs (monotonic)
        self.is_paused = self._is_stopping = False
        store.on_queued = self.wake
        for job in store.list_running():  # when the process before this one ended
            ending = Ending(CRASHED, reason=STOPPED_MESSAGE)
            decision = decide(job, registry.get(job.job_type), ending, time.time())
            try:
                self._record(job, decision, None)
            except Unavailable as error:
                log.warning("job %s is taken up when the database can be written: %s", job.job_id, error.message)
        self._thread = threading.Thread(target=self._run, name="csp-runner", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._attempts)

    def wake(self) -> None:
        with self._condition:
            self._claim_at = 0.0
            self._condition.notify()

    def stop(self, grace_seconds: float) -> bool:
        """Claim no more jobs and wait for the running ones; return whether all have ended and are recorded.

        Jobs that have not ended are left to the next start.
        """
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        self._thread.join()
        deadline = time.monotonic() + grace_seconds
        with self._condition:
            self._condition.wait_for(lambda: not self._attempts, grace_seconds)
            left = list(self._attempts.values())
        for attempt in left:
            self._end(attempt, Ending(STOPPED, reason=STOPPED_MESSAGE))
            attempt.run.tell_to_stop()
        while self._unrecorded and time.monotonic() < deadline:
            with self._condition:
                self._condition.wait(0.1)
            self._record_again()
        self._pool.shutdown(wait=False)
        if self._engine is not None:
            self._engine.close()
        return not left and not self._unrecorded

    def cancel(self, job: Job) -> None:
        """Cancel the job: a queued one ends as an error, a running one is told to stop; raise Conflict if finished."""
        current: Optional[Job] = job
        while current is not None and current.status == PENDING:
            if current.state == QUEUED and self._store.record_ending(current, Finish(failure(CANCELLED)), None):
                return
            if self._store.mark_cancelled(current):
                self.tell_to_stop(current)
                return
            current = self._store.get_job(job.job_id, LIGHT)
        raise Conflict(f"job {job.job_id} has already finished")

    def tell_to_stop(self, job: Job) -> None:
        attempt = self._attempts.get(job.seq)
        if attempt is not None:
            attempt.run.tell_to_stop()

    # -- the loop

    def _run(self) -> None:
        while True:
            with self._condition:
                wait_seconds = self._next_at() - time.monotonic()
                if wait_seconds > 0.0 and not self._is_stopping:
                    self._condition.wait(wait_seconds)
                if self._is_stopping:
                    return
                now = time.monotonic()
                may_claim = self._claim_at <= now
                if may_claim:
                    self._claim_at = NEVER
                unsaved = [run for run, at in self._flush_at.items() if at <= now]
                for run in unsaved:
                    del self._flush_at[run]
                late = [attempt for attempt in self._attempts.values()
                        if not attempt.job.synchronous and (attempt.run.deadline or NEVER) <= now]
            try:
                self._store.follow_clock()
                self._record_again()
                for run in unsaved:
                    self._announce(run, True)
                for attempt in late:  # its thread goes on, unheard
                    self._end(attempt, Ending(TIMED_OUT, reason=_timeout_message(attempt.run.timeout_seconds)))
                    attempt.run.tell_to_stop()
                claim_at = now + self._claim() if may_claim else NEVER
                self._adjust_switching()
            except Exception:  # noqa: BLE001 - the runner's loop: without it no job would ever run again
                log.exception("the runner failed; it goes on in a second")
                time.sleep(1.0)
                claim_at = 0.0
            with self._condition:
                self._claim_at = min(self._claim_at, claim_at)

    def _next_at(self) -> float:
        """Return when the loop has something to do (monotonic), if nothing wakes it. The caller holds the condition."""
        now = time.monotonic()
        times = [now + MAX_SLEEP_SECONDS, self._claim_at, *self._flush_at.values()]
        if self._unrecorded:
            times.append(now + RETRY_DISK_SECONDS)
        for run, job, _ in self._attempts.values():
            if not job.synchronous and not run.is_ended:
                times.append(run.deadline or NEVER)
                if self.may_adjust_switching and sys.getswitchinterval() > SWITCH_SECONDS[1] + 1e-6:
                    times.append(run.started_at + LONG_JOB_SECONDS)
        return min(times)

    def _claim(self) -> float:
        """Start as many jobs as there are free places; return in how many seconds to claim again.

        A suspect runs alone: it is started when no other job has started for a while, and others only a while later.
        """
        free, alone_seconds = self._workers - self._busy, self._alone_until - time.monotonic()
        if self.is_paused or free <= 0:
            return NEVER
        if self._busy and alone_seconds > 0:
            return alone_seconds
        now = time.time()
        try:
            claim = self._store.claim_jobs(free, now, self._is_calm, self._begin)
        except Unavailable:
            return RETRY_DISK_SECONDS
        self._alone_until = time.monotonic() + ALONE_SECONDS if claim.is_suspect and claim.jobs else 0.0
        for job in claim.jobs:
            self._start(self._attempts[job.seq])
        if claim.is_suspect:
            return ALONE_SECONDS if claim.jobs else 1.0
        if claim.next_at is None or len(claim.jobs) == free:
            return NEVER
        return claim.next_at - now if claim.next_at > now else 1.0  # a job that is due and was left is a suspect

    def _is_calm(self) -> bool:
        """Whether all jobs have been running for so long that they are not what kills the process."""
        since = time.monotonic() - ALONE_SECONDS
        with self._condition:
            return all(run.started_at < since for run, job, _ in self._attempts.values() if not job.synchronous)

    def _begin(self, job: Job) -> Attempt:
        job_type = self._registry.get(job.job_type)
        kind = Run if self._engine is None or job.synchronous else RemoteRun
        run = kind(job.job_id, job.seq, job.attempts, self._announce, job_type.timeout if job_type else None)
        _runs[job.job_id] = run
        attempt = Attempt(run, job, job_type)
        with self._condition:
            self._attempts[job.seq] = attempt
            self._busy += not job.synchronous
        return attempt

    def _start(self, attempt: Attempt) -> None:
        run, job, job_type = attempt
        if job_type is None:
            self._end(attempt, Ending(ENDED, failure(f"Job type {job.job_type} not available. Available job types are "
                                                     f"{', '.join(self._registry.names())}")))
        elif job.cancelled or run.is_cancelled:
            self._end(attempt, Ending(CANCELLED))
        else:
            try:
                self._pool.submit(self._work, attempt, job_type)
            except RuntimeError as error:  # no more threads, and yet one of the others may take it
                if run.begin():
                    self._end(attempt, Ending(NOT_STARTED, reason=f"It could not be started: {error}."))

    def _work(self, attempt: Attempt, job_type: JobType) -> None:
        run, job, _ = attempt
        if not run.begin():
            return
        if not isinstance(run, RemoteRun) or self._engine is None:
            take_stream = join_stream if job_type.synchronous else None
            self._end(attempt, Ending(ENDED, run_function(job_type.function, run, job.read_input, take_stream)))
            return
        def read_soon(future: Future[Any]) -> None:  # an executor's own thread must not wait for the disk
            with suppress(RuntimeError):  # the service has stopped: the next start takes the job up
                self._pool.submit(self._read_ending, attempt, future)

        ending = self._engine.start(job, job_type, run, read_soon)
        if ending is not None:
            self._end(attempt, ending)
        if run.is_cancelled:  # told to stop before there was a future
            run.tell_to_stop()

    def _read_ending(self, attempt: Attempt, future: Future[Any]) -> None:
        if self._engine is not None and isinstance(attempt.run, RemoteRun) and not attempt.run.is_ended:
            self._end(attempt, self._engine.read_ending(attempt.run, future))

    # -- endings

    def _end(self, attempt: Attempt, ending: Ending, must_raise: bool = False) -> Optional[Job]:
        """Record how an attempt ended; return its job as it is then, None if that ending came too late.

        If the disk cannot take it now, it is kept and recorded later; ``must_raise`` then raises Unavailable.
        """
        run, job, job_type = attempt
        told = job._replace(cancelled=1) if run.is_cancelled else job
        decision = decide(told, job_type, ending, time.time())
        message = decision.message if isinstance(decision, Requeue) else ""
        if not run.end(service_line("WARNING", message) if message else None):
            return None
        if isinstance(decision, Finish):
            self._metrics.jobs.add((("job_type", job.job_type), ("status", decision.outcome.status)),
                                   time.monotonic() - run.started_at)
        try:
            return self._record(job, decision, run)
        except Unavailable:
            if must_raise:
                raise
            return None
        finally:
            with self._condition:
                self._flush_at.pop(run, None)
                if self._attempts.get(job.seq) is attempt:  # else the job's next attempt has begun already
                    del self._attempts[job.seq]
                self._busy -= not job.synchronous
                if not job.synchronous or self._is_stopping:
                    self._claim_at = 0.0
                    self._condition.notify_all()

    def _record(self, job: Job, decision: Union[Finish, Requeue], run: Optional[Run]) -> Optional[Job]:
        """Store what was decided; if the disk cannot take it, keep it for the loop and raise Unavailable.

        An outcome that cannot be stored at all becomes an error that says why.
        """
        try:
            return self._store.record_ending(job, decision, run)
        except Unavailable:
            with self._condition:
                self._unrecorded.append((job, decision, run))
                self._condition.notify_all()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the job has to end
            reason = failure(safe_text(error) or type(error).__name__)
            if decision == Finish(reason):
                raise
            return self._record(job, Finish(reason), None)

    def _record_again(self) -> None:
        for _ in range(len(self._unrecorded)):
            try:
                self._record(*self._unrecorded.popleft())
            except Unavailable:  # it is kept again
                return
            except Exception:  # noqa: BLE001 - the runner's loop: the other endings must not be lost with this one
                log.exception("the ending of a job cannot be stored at all")

    # -- output

    def _announce(self, run: Run, is_log: bool) -> None:
        """Store a run's new log lines now, its progress a while after the last."""
        if is_log:
            with suppress(Unavailable):  # the store is closed
                self._store.save_output(run, functools.partial(self._flush_later, run, RETRY_DISK_SECONDS))
        else:
            self._flush_later(run, run.peeked_at + PROGRESS_SECONDS - time.monotonic())

    def _flush_later(self, run: Run, seconds: float) -> None:
        with self._condition:
            if not run.is_ended:
                self._flush_at.setdefault(run, time.monotonic() + seconds)
            self._condition.notify_all()

    def _adjust_switching(self) -> None:
        """Let threads take turns more often while jobs run for long: one that computes would delay requests.

        (Short turns all the time would cost a busy service a fifth of its requests.)
        """
        if self.may_adjust_switching:
            since = time.monotonic() - LONG_JOB_SECONDS
            with self._condition:
                is_long = any(run.started_at <= since for run, job, _ in self._attempts.values() if not job.synchronous)
            if abs(sys.getswitchinterval() - SWITCH_SECONDS[is_long]) > 1e-6:
                sys.setswitchinterval(SWITCH_SECONDS[is_long])

    # -- synchronous jobs

    def run_now(self, job: Job, is_new_id: bool, read_input: Callable[[], Dict[str, Any]],
                ) -> Tuple[Run, Union[Job, None, Iterator[bytes]]]:
        """Run a synchronous job in this thread; return it when it has ended, or a stream that ends it when it ends.

        None stands for a job that was deleted meanwhile. ``read_input`` returns the submitted object. ``is_new_id``:
        the service made the id, so that nobody can have taken it and the job may be stored when it has ended.
        """
        begun: List[Attempt] = []
        if is_new_id:
            begun.append(self._begin(job))
            self._store.hold_job(job, begun[0].run)
        else:
            self._store.add_job(job, begin=lambda job: begun.append(self._begin(job))).wait()
        attempt = begun[0]
        run, _, job_type = attempt
        assert job_type is not None, "a submission has been checked"
        function = job_type.function
        streams: List[Callable[[], Iterable[Any]]] = []

        def call() -> Outcome:
            return run_function(function, run, read_input, streams.append) if run.begin() else failure(CANCELLED)

        try:
            ending = self._call_in_time(run, call)
            if streams and ending.kind == ENDED:
                self._store.store_held_job(job.seq)
                return run, self._stream(attempt, streams[0])
        except BaseException as error:
            self._end(attempt, Ending(ENDED, failure(safe_text(error))))
            raise
        return run, self._end(attempt, ending, must_raise=True)

    def _call_in_time(self, run: Run, call: Callable[[], Outcome]) -> Ending:
        """Call in this thread or, where the job has a timeout, in one that can be left behind."""
        try:
            outcome = call() if run.deadline is None else self._pool.submit(call).result(
                max(0.0, run.deadline - time.monotonic()))
        except FutureTimeoutError:
            run.tell_to_stop()
            return Ending(TIMED_OUT, reason=_timeout_message(run.timeout_seconds))
        except RuntimeError as error:  # no more threads
            return Ending(NOT_STARTED, reason=f"It could not be started: {error}.")
        return Ending(ENDED, outcome)

    def _stream(self, attempt: Attempt, function: Callable[[], Iterable[Any]]) -> Iterator[bytes]:
        """Yield what iterating ``function()`` yields, as bytes; end the job when that ends or takes too long."""
        parts = itertools.chain.from_iterable(make() for make in (function,))  # calls it when the first is read

        def read(task_id: str, input: Dict[str, Any]) -> Optional[bytes]:
            for part in parts:
                return encode_part(part)
            return None

        ending = gone = Ending(ENDED, failure("The client went away before the result was complete."))
        try:
            while True:
                ending = self._call_in_time(attempt.run, lambda: run_function(read, attempt.run, dict, None))
                outcome = ending.outcome
                if outcome is None or outcome.status == ERROR:
                    raise StreamBroken
                if not isinstance(outcome.data, bytes):
                    return
                ending = gone
                yield outcome.data
        finally:
            self._end(attempt, ending, must_raise=True)


def _timeout_message(timeout_seconds: Optional[float]) -> str:
    return f"The job took longer than its timeout of {timeout_seconds or 0:g} seconds."


# ---------------------------------------------------------------------------------------------------------------------
# Requests and responses
#
# Values without sockets. A Request has been parsed strictly (see Transports) before anything here sees it. A Route says
# what there is at an address and who may use it.
# ---------------------------------------------------------------------------------------------------------------------

ANYBODY, LISTERS = "all", "all, or admin, secure key"  # who may use a route
JOB_KEY, ADMIN, RUN_TOKEN = "job key, admin, secure key", "admin, secure key", "token of the run"
MAX_OFFSET = 10**9  # SQLite counts to 2^63, and skipping so much is not worth waiting for
MAX_METADATA_FILTERS = 10
MAX_LISTED = 10_000  # job ids in one answer; the Link header leads to more
MAX_PARAMETERS = 50  # of a query
MAX_FORM_BYTES = 2**18  # parsing takes many times as much memory
MAX_FORM_FIELDS = 200  # a page of jobs has a box for each
SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"))
SANDBOX = ("Content-Security-Policy", "sandbox; default-src 'none'; frame-ancestors 'none'")
_REASONS = {status.value: status.phrase for status in http.HTTPStatus}
_WORD = r"[!#$&^_.+\-0-9A-Za-z]{1,127}"
_MEDIA_TYPE = rf'{_WORD}/{_WORD}(?: *; *{_WORD}=(?:{_WORD}|"[\x20\x21\x23-\x5b\x5d-\x7e]*"))*'
_INERT_TYPE = r"(?i)(?:text/plain|text/csv|application/json|image/(?:png|jpeg|gif|webp)|(?:audio|video)/[^;]+)(?:;|\Z)"


class Request:
    """A request: ``path`` as sent (percent-encoded), ``headers`` by lower-case name, ``remote`` and ``scheme`` those of
    the client (behind a trusted proxy: what the proxy says)."""

    def __init__(self, method: str, target: str, headers: Optional[Mapping[str, str]] = None, body: bytes = b"",
                 remote: str = "", scheme: str = "http") -> None:
        self.method = method
        self.target = target
        self.path, _, self.query_string = target.partition("?")
        self.headers = headers or {}
        self.body = body
        self.remote = remote
        self.scheme = scheme

    @property
    def is_safe(self) -> bool:
        return self.method in ("GET", "HEAD")

    @property
    def query(self) -> List[Tuple[str, str]]:
        if self.query_string.count("&") >= MAX_PARAMETERS:
            raise Conflict("The query has too many parameters.")
        return urllib.parse.parse_qsl(self.query_string, keep_blank_values=True)

    def number(self, name: str, default: Optional[int], maximum: int = 2**63 - 1) -> Optional[int]:
        """Return what query or form say as a whole number from 0 to ``maximum``; raise Conflict if it is none."""
        text = {**self.form, **dict(self.query)}.get(name)
        if text is None:
            return default
        if not re.fullmatch("[0-9]{1,19}", text) or int(text) > maximum:
            raise Conflict(f"{name} has to be a whole number from 0 to {maximum}")
        return int(text)

    @property
    def is_json(self) -> bool:
        """Whether the content type says that the body is JSON (RFC 8259, RFC 6839)."""
        return bool(re.match(r"(?i)application/(?:[^;\s]+\+)?json\s*(?:;|\Z)", self.headers.get("content-type", "")))

    @property
    def wants_html(self) -> bool:
        """Whether ``Accept`` names pages, as browsers do, and not JSON before them."""
        named = re.search("text/html|application/json", self.headers.get("accept", ""))
        return named is not None and named[0] == "text/html" and "_format=json" not in self.query_string.split("&")

    @property
    def fields(self) -> List[Tuple[str, str]]:
        if not self.headers.get("content-type", "").lower().startswith("application/x-www-form-urlencoded"):
            return []
        if len(self.body) > MAX_FORM_BYTES or self.body.count(b"&") >= MAX_FORM_FIELDS:
            raise CspError(413, f"A form may have {MAX_FORM_BYTES:,} bytes and {MAX_FORM_FIELDS} fields.")
        return urllib.parse.parse_qsl(self.body.decode("ascii", "replace"), keep_blank_values=True)

    @property
    def form(self) -> Dict[str, str]:
        return dict(self.fields)

    @property
    def preferences(self) -> Dict[str, str]:
        """The preferences of Prefer headers, by lower-case name, the first of each (RFC 7240, section 2)."""
        pairs = re.findall(r'(?:^|,)\s*([^\s=,;]+)\s*(?:=\s*("[^"]*"|[^",;]*))?', self.headers.get("prefer", ""))
        return {name.lower(): value.strip(' "') for name, value in reversed(pairs)}

    def cookie(self, name: str) -> str:
        """Return the cookie's value (RFC 6265, section 5.4), empty if it was not sent."""
        found = re.search(rf"(?:^|;)\s*{name}=([^;]*)", self.headers.get("cookie", ""))
        return found[1].strip() if found else ""


class Response:
    """An answer. ``body`` is bytes or Pieces, or an iterator that is sent as it comes and always closed."""

    def __init__(self, status: int = 200, body: Union[bytes, Pieces, Iterator[bytes]] = b"",
                 content_type: str = "application/json", headers: Iterable[Tuple[str, str]] = ()) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = list(headers)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Iterable[Tuple[str, str]] = ()) -> Response:
        return cls(status, to_json(value).encode("utf-8"), headers=headers)

    @classmethod
    def error(cls, error: CspError) -> Response:
        more = {} if error.detail is None else {"detail": clean(error.detail)}
        return cls.json({"error": clean(error.message), **more}, error.status, error.headers)

    @classmethod
    def redirect(cls, path: str, headers: Iterable[Tuple[str, str]] = ()) -> Response:
        return cls.json({}, 302, [("Location", path), *headers])

    @classmethod
    def data(cls, data: Union[str, bytes, None], metadata: Optional[str]) -> Response:
        """Return a job's raw result, a string as its text; harmless to a browser whatever type the metadata name."""
        body: Union[bytes, Pieces]
        if isinstance(data, bytes):
            body, kind = data, "application/octet-stream"
        else:
            text, kind = data or "null", "application/json"
            if text.startswith('"'):
                text, kind = json.loads(text), "text/plain; charset=utf-8"
            body = text.encode("utf-8") if len(text) < LARGE_CHARACTERS else Pieces([text])
        wanted = json.loads(metadata or "{}").get("mimetype")
        if isinstance(wanted, str) and re.fullmatch(_MEDIA_TYPE, wanted):
            kind = wanted
        disposition = [] if re.match(_INERT_TYPE, kind) else [("Content-Disposition", "attachment")]
        return cls(200, body, kind, [SANDBOX, *disposition])


def render_event(name: str, value: Any, event_id: Optional[int] = None) -> bytes:
    """Return a Server-Sent Event (html.spec.whatwg.org) with ``value`` as JSON."""
    number = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{number}data: {to_json(value)}\n\n".encode("utf-8")


class Route(NamedTuple):
    """A row of the route table. ``path`` may hold ``<job_id>`` as its second segment.

    ``access`` is checked before the endpoint is called: with JOB_KEY that gets the checked job (``columns`` of it),
    with RUN_TOKEN the run, else the job id if there is one. ``page`` answers browsers instead of ``endpoint``. The rest
    describes: ``answer`` names a schema or is a media type, ``body`` names a schema, ``parameters`` are of the query or
    header fields, ``refusals`` are statuses that do not follow from ``access``.
    """

    method: str
    path: str
    endpoint: Callable[..., Response]
    answer: str = "text/html"
    access: str = ANYBODY
    body: str = ""
    parameters: Tuple[str, ...] = ()
    refusals: Tuple[int, ...] = ()
    page: Optional[Callable[..., Response]] = None
    columns: str = LIGHT

    @property
    def summary(self) -> str:
        """The first sentence of the endpoint's docstring, in one line."""
        return " ".join((self.endpoint.__doc__ or "").partition(".")[0].split())


class Router:
    def __init__(self, routes: Iterable[Route]) -> None:
        self._methods: Dict[Tuple[Optional[str], ...], Dict[str, Route]] = {}  # None stands for a job id
        for route in routes:
            segments = [None if segment == "<job_id>" else segment for segment in route.path.strip("/").split("/")]
            self._methods.setdefault(tuple(segments), {})[route.method] = route

    def find(self, request: Request) -> Tuple[Route, List[str]]:
        """Return the route and the path's arguments; raise CspError: 404, or 405 with ``Allow``."""
        segments: Tuple[Optional[str], ...] = tuple(request.path.rstrip("/")[1:].split("/"))
        arguments: List[str] = []
        methods = self._methods.get(segments)
        if methods is None and len(segments) > 1:
            methods = self._methods.get((segments[0], None, *segments[2:]))
            try:
                arguments = [urllib.parse.unquote(segments[1] or "", errors="strict")]
            except UnicodeDecodeError:
                methods = None
        if methods is None:
            raise CspError(404, "There is nothing at this address; GET / says where the documentation is.")
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            allowed = {*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}  # RFC 9110, section 10.2.1
            raise CspError(405, "This method is not for this address.", [("Allow", ", ".join(sorted(allowed)))])
        return route, arguments


class ProxyTrust:
    """Says who a client is; only the X-Forwarded fields of trusted proxies are believed."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def identify(self, address: str, headers: Dict[str, str], scheme: str = "http") -> Tuple[str, str]:
        """Return the client's address and scheme, and put the host that it named into ``headers``."""
        if not self._networks or not self.is_trusted(address):
            return address, scheme
        if "x-forwarded-host" in headers:
            headers["host"] = headers["x-forwarded-host"]
        forwarded = headers.get("x-forwarded-for", "").split(",")
        while forwarded and self.is_trusted(address):
            host = re.fullmatch(r"\s*(?:\[([^\]]+)\](?::\d+)?|([\d.]+)(?::\d+)?|([\da-fA-F:.]+))\s*", forwarded.pop())
            try:
                address = str(ipaddress.ip_address(next(filter(None, host.groups())) if host else ""))
            except ValueError:
                break  # who wrote that is the client
        proto = headers.get("x-forwarded-proto", scheme).partition(",")[0]  # of several proxies the first one's
        return address, "https" if proto.strip().lower() == "https" else "http"

    def is_trusted(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._networks)


# ---------------------------------------------------------------------------------------------------------------------
# Auth
#
# Three credentials: the administrator's login (Basic, or a session begun at /login), the secure key, a job's own key.
# Secrets are compared in constant time. A session is a random token in a cookie, of which the database holds a hash:
# neither a copied database nor a cookie copied before logout is of any use.
# ---------------------------------------------------------------------------------------------------------------------

SCRYPT = {"n": 2**14, "r": 8, "p": 1}  # OWASP's minimum that fits OpenSSL's default of 32 MB
SESSION_COOKIES = {  # by scheme; a browser takes a name with __Host- only with Secure, from this very host
    "http": "csp_session", "https": "__Host-csp_session"}
KEY_COOKIE = "csp_job_key"  # the key of one job, after somebody entered it in the console
FREE_FAILURES = 10  # a person tries several passwords before remembering the right one
MANY_FAILURES = 100  # so many from all addresses within THROTTLE_SECONDS are an attack
THROTTLE_SECONDS = 900.0
LOGIN_TURNS = 8  # logins checked at the same time
MAX_THROTTLED = 10_000  # addresses remembered; a botnet that has more is counted by larger networks
WEAK_SECRETS = ("please_replace_me", "change_me_please", "correcthorse", "administrator")
SESSION_NOTE_SECONDS = 60.0  # how often the use of a session is stored

_scrypt_turns = threading.BoundedSemaphore(4)  # each scrypt takes 16 MB and a core


def hash_password(password: str) -> str:
    import hashlib
    salt = os.urandom(16)
    key = hashlib.scrypt(password.encode("utf-8"), salt=salt, dklen=32, **SCRYPT)
    encoded = [base64.b64encode(part).decode("ascii") for part in (salt, key)]
    return "$".join(["scrypt", *map(str, SCRYPT.values()), *encoded])


class Secret:
    """The value of a setting, plain or as a hash; raises StartError if it looks like a hash but is not one."""

    def __init__(self, setting: str, wanted: str) -> None:
        self._wanted = wanted
        self._memory_key = os.urandom(32)
        self._approved: Set[bytes] = set()  # digests of what the slow hash has approved
        try:
            self.matches("")
        except ValueError:
            raise StartError(f"The setting {setting} looks like a hash but is none; "
                             "make one with --hash-password.") from None

    def matches(self, given: str) -> bool:
        """Return whether ``given`` is the secret; how long that takes does not tell how similar it is."""
        if not self._wanted.startswith("scrypt$"):
            return is_same(given, self._wanted)
        import hashlib
        text = given.encode("utf-8", "replace")
        digest = sign(self._memory_key, text)
        if digest not in self._approved:
            _, n, r, p, salt, key = self._wanted.split("$")
            salt_bytes, key_bytes = (base64.b64decode(part, validate=True) for part in (salt, key))
            with _scrypt_turns:
                made = hashlib.scrypt(text, salt=salt_bytes, n=int(n), r=int(r), p=int(p), dklen=len(key_bytes))
            if compare_digest(made, key_bytes):
                self._approved.add(digest)
        return digest in self._approved


class LoginThrottle:
    """Slows down password guessing.

    An address (for IPv6 a /64 network) may fail FREE_FAILURES times; then it waits, twice as long after each further
    failure. During an attack from many addresses each has one free failure. The right password from an address that
    has not failed always works at once, so that nobody can lock the administrator out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(LOGIN_TURNS)]
        self._failures: Dict[str, Tuple[int, float]] = {}  # by address: how many, when the last
        self._all: Deque[float] = deque(maxlen=MANY_FAILURES)

    def attempt(self, address: str, check: Callable[[], bool]) -> bool:
        """Return ``check()``, and count it if it fails; raise TooManyRequests if the address has to wait."""
        now = self._clock()
        with self._lock:
            while self._failures and now - next(iter(self._failures.values()))[1] >= THROTTLE_SECONDS:
                del self._failures[next(iter(self._failures))]  # the dictionary is ordered by the last failure
            group = next(group for group in _address_groups(address)
                         if group in self._failures or len(self._failures) < MAX_THROTTLED or not group)
        with self._turns[hash(group) % LOGIN_TURNS]:  # one by one, so that parallel guesses are counted, too
            count, last = self._failures.get(group, (0, 0.0))
            is_attack = len(self._all) == MANY_FAILURES and now - self._all[0] < THROTTLE_SECONDS
            over = count - (1 if is_attack else FREE_FAILURES)
            wait = last + min(2.0 ** min(over, 20), THROTTLE_SECONDS) - now if over >= 0 else 0.0
            if wait > 0:
                raise TooManyRequests("Too many failed logins; try again later.", int(wait) + 1)
            is_success = check()
            with self._lock:
                self._failures.pop(group, None)
                if not is_success:
                    self._failures[group] = (count + 1 if now - last < THROTTLE_SECONDS else 1, now)
                    self._all.append(now)
            return is_success


def _address_groups(address: str) -> Tuple[str, ...]:
    """Return who counts as one client: an address (of IPv6 a /64 network), a larger network, everybody."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address, ""
    ip = getattr(ip, "ipv4_mapped", None) or ip  # how a socket for both families names IPv4 addresses
    sizes = (64, 32) if ip.version == 6 else (32, 16)
    return (*(str(ipaddress.ip_network((ip, size), strict=False)) for size in sizes), "")


def is_same_origin(request: Request) -> Optional[bool]:
    """Return whether a browser sent the request from a page of this service; None if it does not say."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    if origin is None:
        return None
    host = request.headers.get("host", "").lower()
    return bool(host) and origin.partition("://")[2].lower() == host


class Authenticator:
    """Decides who sent a request. Without the setting PASSWORD it makes one, ``generated_password``."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self.generated_password = None if settings["PASSWORD"] else make_token()[:16]
        password = self.generated_password or settings["PASSWORD"]
        self._password = Secret("PASSWORD", password)
        self._api_keys = [Secret("API_KEYS", key) for key in settings["API_KEYS"]]
        self._throttle = LoginThrottle()
        self._session_key = f"{settings['USERNAME']}:{password}".encode("utf-8", "replace")  # a new one ends sessions
        for name in ("PASSWORD", "SECRET_KEY"):
            if settings[name] and (len(settings[name]) < 12 or settings[name].lower() in WEAK_SECRETS):
                log.warning("the setting %s is short or well known: somebody will guess it", name)

    def is_login(self, username: str, password: str, address: str) -> bool:
        """Return whether this is the administrator's login; raise TooManyRequests if the address has to wait."""
        return self._throttle.attempt(  # the password first: an unknown user takes as long as a wrong password
            address, lambda: self._password.matches(password) and is_same(username, self._settings["USERNAME"]))

    def is_admin(self, request: Request) -> bool:
        """Return whether the request has the administrator's Basic credentials or a live session.

        A browser sends both by itself. To change something, a cookie counts only if the browser says that a page of
        this service sent it, and Basic unless the browser says that another site's page did.
        """
        credentials = basic_credentials(request)
        is_safe = request.is_safe or is_same_origin(request)
        if credentials is not None:
            return is_safe is not False and self.is_login(*credentials, request.remote)
        token, now = request.cookie(SESSION_COOKIES[request.scheme]), time.time()
        session = self._store.get_session(self._token_hash(token)) if token and is_safe else None
        if session is None:
            return False
        created_at, used_at = session
        idle_seconds: float = self._settings["SESSION_IDLE_SECONDS"]
        if now - used_at > idle_seconds or now - created_at > self._settings["SESSION_SECONDS"]:
            return False
        if now - used_at > min(SESSION_NOTE_SECONDS, idle_seconds / 2):
            self._store.mark_session_used(self._token_hash(token), now)
        return True

    def may_submit(self, api_key: Union[str, int, float]) -> bool:
        """Return whether API_KEYS, if it is set, lists the api_key."""
        return not self._api_keys or any([key.matches(str(api_key)) for key in self._api_keys])

    def may_administer(self, request: Request) -> bool:
        given, key = request.headers.get("authorization"), self._settings["SECRET_KEY"]
        return bool(given and key and is_same(given, key)) or self.is_admin(request)

    def may_see(self, request: Request, job: Job) -> bool:
        """Return whether the request has the job's key, or ``may_administer``."""
        given = request.headers.get("authorization")
        if given is None and (request.is_safe or is_same_origin(request)):
            given = request.cookie(KEY_COOKIE)
        return bool(given and job.job_key and is_same(given, job.job_key)) or self.may_administer(request)

    def begin_session(self, request: Request) -> Tuple[str, str]:
        token, now = make_token(), time.time()
        self._store.add_session(self._token_hash(token), now, now - self._settings["SESSION_IDLE_SECONDS"],
                                now - self._settings["SESSION_SECONDS"])
        return set_cookie(request, SESSION_COOKIES[request.scheme], token)

    def end_session(self, request: Request) -> List[Tuple[str, str]]:
        """End the request's session, if any, and return the fields that remove its cookie."""
        for name in SESSION_COOKIES.values():
            if request.cookie(name):
                self._store.delete_session(self._token_hash(request.cookie(name)))
        return [set_cookie(request, SESSION_COOKIES[request.scheme], "")]

    def _token_hash(self, token: str) -> str:
        return sign(self._session_key, token.encode("utf-8", "replace")).hex()


def basic_credentials(request: Request) -> Optional[Tuple[str, str]]:
    """Return username and password of Basic authentication (RFC 7617), if the request has any."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        username, colon, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except ValueError:
        return None
    return (username, password) if colon else None


def set_cookie(request: Request, name: str, value: str, path: str = "/") -> Tuple[str, str]:
    """Return a Set-Cookie field (RFC 6265, section 4.1); no value removes the cookie."""
    same_site = "Lax" if path == "/" else "Strict"  # a session has to survive the way from a link on another site
    end = ("; Secure" if request.scheme == "https" else "") + ("" if value else "; Max-Age=0")
    return "Set-Cookie", f"{name}={value}; Path={path}; HttpOnly; SameSite={same_site}{end}"


def local_path(path: Optional[str], default: str) -> str:
    """Return ``path`` if every browser takes it for a path of this service, else ``default``."""
    return path if path and re.fullmatch(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*", path) else default


# ---------------------------------------------------------------------------------------------------------------------
# API description
#
# OpenAPI 3.1 (spec.openapis.org/oas/v3.1), made from the route table and the endpoints' docstrings; schemas, parameters
# and refusals are described here.
# ---------------------------------------------------------------------------------------------------------------------


def _object(optional: str = "", /, **properties: Schema) -> Schema:
    """Return the schema of an object that has all these properties, but for the ``optional`` ones."""
    return {"type": "object", "required": [name for name in properties if name not in optional.split()],
            "properties": properties}


def _reference(name: str) -> Schema:
    return {"$ref": "#/components/schemas/" + name}


_ANY: Schema = {"description": "any JSON"}
_FLAG: Schema = {"type": "boolean"}
_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_NULL: Schema = {"type": "null"}
_PROGRESS: Schema = {"anyOf": [_reference("Progress"), _NULL]}
_LINES: Schema = {"type": "array", "items": _reference("LogLine")}
_TIME: Schema = {**_MAYBE_TEXT, "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}$", "description": "local time"}
_URL: Schema = {**_MAYBE_TEXT, "description": "an http(s) URL: the finished job is POSTed there"}
_API_KEY: Schema = {"anyOf": [{**_TEXT, "minLength": 1}, {"type": "number"}], "description":
                    "sent with the callback: as Authorization or, as `Name: value`, in a field of its own"}
_JOB: Dict[str, Schema] = {
    "job_id": _TEXT, "job_type": _TEXT, "status": {"enum": [PENDING, COMPLETE, ERROR]}, "sent_data": _ANY,
    "data": {"description": "what the function returned; bytes as {\"base64\": …}"},
    "error": {"anyOf": [_reference("JobError"), _NULL]}, "metadata": {"type": "object"}, "logs": _LINES,
    "result_url": _URL, "requested_timestamp": _TIME, "started_timestamp": _TIME, "finished_timestamp": _TIME,
    "progress": _PROGRESS, "attempts": _WHOLE, "callback": {"anyOf": [_reference("Callback"), _NULL]},
    "resubmitted_from": _MAYBE_TEXT}
SCHEMAS: Dict[str, Schema] = {
    "Error": _object("detail", error={**_TEXT, "description": "a sentence"}, detail=_TEXT),
    "Failure": _object(error={"anyOf": [_TEXT, _reference("JobError")]}),
    "Help": _object(help=_TEXT),
    "Status": _object(version={"type": "number"}, job_types=_TEXTS, name=_TEXT,
                      stats=_object(pending=_WHOLE, complete=_WHOLE, error=_WHOLE)),
    "User": _object(id={"type": ["integer", "null"]}, name=_TEXT, is_active=_FLAG, is_anonymous=_FLAG),
    "JobList": _object(list=_TEXTS),
    "Job": _object(**_JOB),
    "SubmittedJob": _object(**_JOB, job_key=_TEXT),
    "JobError": _object("traceback", message=_TEXT, traceback=_TEXT),
    "LogLine": _object(timestamp=_TIME, message=_TEXT, level=_TEXT, module=_TEXT, funcName=_TEXT,
                       lineno={"type": "integer"}),
    "Progress": _object(fraction={"type": "number", "minimum": 0, "maximum": 1}, message=_MAYBE_TEXT),
    "Callback": _object(status={"enum": [PENDING, "delivered", "failed"]}, attempts=_WHOLE, error=_MAYBE_TEXT,
                        next_attempt_timestamp=_TIME),
    "Success": _object(success={"const": True}),
    "Cleared": _object(success={"const": True}, deleted=_WHOLE),
    "Submission": dict(_object(
        "data metadata result_url", job_type=_TEXT, api_key=_API_KEY, data=_ANY,
        metadata={"type": ["object", "null"]}, result_url=_URL), additionalProperties=False),
    "Report": dict(_object(
        execution={**_TEXT, "minLength": 1, "maxLength": 100}, first=_WHOLE, lines=_LINES,
        progress=_PROGRESS, seconds={"type": "number", "minimum": 0}), additionalProperties=False),
    "Instruction": _object(cancelled=_FLAG),
    "NewKey": dict(_object("api_key", api_key=_API_KEY), additionalProperties=False),
    "Login": _object("next", username=_TEXT, password=_TEXT, next=_TEXT),
}
RAW_RESULT = "*/*"
_NUMBER: Schema = {**_WHOLE, "maximum": 2**63 - 1}
_EVENT_ID: Schema = {**_TEXT, "pattern": "^[0-9]{0,18}$"}
PARAMETERS: Dict[str, Tuple[Schema, str]] = {  # those that begin with a capital are header fields
    "_limit": (_NUMBER, f"how many, by default 100, at most {MAX_LISTED:,}"),
    "_offset": ({**_NUMBER, "maximum": MAX_OFFSET}, "how many to skip; the Link header is cheaper"),
    "_before": (_NUMBER, "from the Link header"),
    "_status": (_TEXT, "pending, complete or error; also queued or running"),
    "_type": (_TEXT, "a job type"),
    "_id": (_TEXT, "only jobs whose id starts with this, by id, without other filters"),
    "metadata": ({"type": "object", "additionalProperties": _TEXT}, "all others: metadata keys and their values"),
    "limit": (_NUMBER, "at most so many log entries, newest first"),
    "days": ({**_WHOLE, "maximum": 36_500}, "jobs that finished more days ago"),
    "next": (_TEXT, "the path of this service to redirect to"),
    "last_event_id": (_EVENT_ID, "only events after this one"),
    "Last-Event-ID": (_EVENT_ID, "only events after this one"),
    "Prefer": (_TEXT, "RFC 7240: wait=N answers when the job has finished or after N seconds; respond-async queues "
               "synchronous jobs, too"),
}
REFUSALS = (400, 401, 403, 404, 408, 409, 413, 414, 429, 431, 500, 503)


def describe_api(routes: Iterable[Route], job_types: Sequence[str], name: str) -> Dict[str, Any]:
    """Return the OpenAPI document for the routes of a service that has these job types."""
    paths: Dict[str, Dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path.replace("<", "{").replace(">", "}"), {})[route.method.lower()] = _describe(route)
    submission = SCHEMAS["Submission"]
    if job_types:
        submission = {**submission, "properties": {**submission["properties"], "job_type": {"enum": [*job_types]}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": __version__, "license": {"name": "MIT"},
                 "description": "Functions as jobs: submit them, watch them, read their logs and results (csp.py). A "
                 "request whose content is wrong is refused with 409."},
        "paths": paths,
        "components": {
            "schemas": {**SCHEMAS, "Submission": submission},
            "responses": {str(status): _answer(_REASONS[status], "Error") for status in REFUSALS},
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "Authorization", "description":
                        "the whole value is a job's key, the secure key or a run's token"},
                "basic": {"type": "http", "scheme": "basic", "description": "the administrator"},
                "session": {"type": "apiKey", "in": "cookie", "name": SESSION_COOKIES["http"], "description":
                            f"the administrator, after a login; {SESSION_COOKIES['https']} behind TLS"}}}}


def _describe(route: Route) -> Dict[str, Any]:
    is_open, is_redirect = route.access in (ANYBODY, LISTERS), route.answer == "redirect"
    parameters = [{"name": name, "in": "header" if name[0].isupper() else "query", "description": text,
                   "schema": schema, **({"style": "form", "explode": True} if schema["type"] == "object" else {})}
                  for name, (schema, text) in PARAMETERS.items() if name in route.parameters]
    if "<job_id>" in route.path:
        parameters.append({"name": "job_id", "in": "path", "required": True,
                           "schema": {**_TEXT, "minLength": 1, "maxLength": 255}})
    refusals = {*route.refusals, *([] if route.access == ANYBODY else [403]),
                *([404] if route.access == JOB_KEY else [])}
    answer = _answer("success", route.answer) if not is_redirect else {
        **_answer("redirect", "application/json"), "headers": {"Location": {"schema": _TEXT}}}
    operation: Dict[str, Any] = {
        "summary": route.summary, "operationId": re.sub(r"\W+", "_", route.method.lower() + route.path).strip("_"),
        "description": " ".join((route.endpoint.__doc__ or "").split()), "parameters": parameters,
        "responses": {"302" if is_redirect else "200": answer, **{
            str(status): {"$ref": f"#/components/responses/{status}"} for status in REFUSALS
            if status in refusals or status not in (401, 403, 404)}}}
    if route.answer == RAW_RESULT:  # its refusal is the job's own error, if it failed
        operation["responses"]["409"] = _answer(_REASONS[409], "Failure")
    if route.body:
        kind = "application/x-www-form-urlencoded" if route.body == "Login" else "application/json"
        operation["requestBody"] = {"required": route.body == "Submission",
                                    "content": {kind: {"schema": _reference(route.body)}}}
    if not is_open:
        operation["security"] = [{"key": []}, *([] if route.access == RUN_TOKEN else [{"basic": []}, {"session": []}])]
    return operation


def _answer(text: str, answer: str) -> Dict[str, Any]:
    """Return an OpenAPI response whose body is of a schema, or of a media type."""
    content = {"application/json": {"schema": _reference(answer)}} if answer in SCHEMAS else {answer: {}}
    return {"description": text, "content": content}


# ---------------------------------------------------------------------------------------------------------------------
# Console
#
# HTML pages for people, at the addresses that programs use. The server renders them; they work without JavaScript.
# ``render`` escapes every value that is not Html. Style and script are files of their own, named by their content:
# the Content-Security-Policy allows nothing inline.
# ---------------------------------------------------------------------------------------------------------------------

PAGE_ROWS = 50  # jobs on a page: about 30 kB
PAGE_LINES = 200  # log lines on a page; the JSON has all
PAGE_LOG_CHARACTERS = 20_000
PAGE_TEXT_CHARACTERS = 6_000  # of an input, a result or a traceback
PARSED_CHARACTERS = 200_000  # longer JSON is shown as it is stored, not indented
CHART_HOURS = 24
PAGE_HEADERS = (
    ("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
     "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer, browsers send "Origin: null" with forms
)
STATE_WORDS = {QUEUED: "queued", RUNNING: "running", COMPLETE: "complete", ERROR: "failed"}
LEVELS = {"error": ("ERROR", "CRITICAL"), "warning": ("WARNING", "ERROR", "CRITICAL"),
          "info": ("INFO", "WARNING", "ERROR", "CRITICAL")}
NOTICES = {
    "cancel": "Cancellation requested.", "delete": "Deleted.", "resubmit": "Resubmitted.", "submit": "Submitted.",
    "callback": "Sending the callback again.", "clear": "Old jobs deleted.", "out": "You are signed out.",
    "none": "No jobs selected."}

STYLE = """
:root { color-scheme: light dark; --back: #f4f6f8; --card: #fff; --text: #18212c; --faint: #556172; --line: #d5dbe3;
  --code: #eef1f5; --link: #0a58a6; --complete: #17722f; --error: #b0241b; --queued: #6a5600; }
@media (prefers-color-scheme: dark) { :root { --back: #11151b; --card: #191f28; --text: #e7ebf1; --faint: #a5b0c0;
  --line: #343d4b; --code: #232b37; --link: #84bdff; --complete: #63d683; --error: #ff8f85; --queued: #e2c553; } }
* { box-sizing: border-box; overflow-wrap: anywhere; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
a, summary, .running { color: var(--link); }
.complete { color: var(--complete); }
.queued, .WARNING b { color: var(--queued); }
.error, .ERROR b, .CRITICAL b, button.danger { color: var(--error); }
.name, [aria-current], .tiles b { color: var(--text); font-weight: 700; }
.name { font-size: 18px; }
.name, .tiles a, .button { text-decoration: none; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
html:not(.script) .needs-script, .log:empty, .log:not(:empty) + p { display: none; }
.skip:not(:focus) { position: absolute; left: -999px; }
header, main, footer { max-width: 1200px; margin: 0 auto; padding: 12px 16px; }
header, nav, footer, .row, .axis { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; }
.row { align-items: end; }
#head .row { align-items: center; margin-bottom: 12px; }
nav, .axis :first-child { flex: 1; }
h1 { font-size: 24px; line-height: 1.25; margin: 8px 0 12px; }
h1.id { font-size: 20px; }
h2 { font-size: 18px; margin: 0 0 8px; }
h3 { font-size: 16px; margin: 0; }
section, .notice, .tiles a, table.jobs { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
section, .notice { padding: 16px; margin: 0 0 16px; min-width: 0; }
section > :last-child { margin-bottom: 0; }
.notice { padding-top: 10px; padding-bottom: 10px; border-left: 5px solid var(--link); }
.notice[role=alert] { border-left-color: var(--error); }
.faint, footer, small, dd time, thead th { color: var(--faint); font-size: 14px; }
dt { color: var(--faint); }
.columns, .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 16px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 0 0 16px; padding: 0; }
.tiles, .log { list-style: none; }
.tiles a { display: block; padding: 12px 16px; border-top: 4px solid currentColor; }
.tiles b { display: block; font-size: 26px; line-height: 1.2; }
.badge { font-weight: 600; white-space: nowrap; }
.badge::before { content: ""; display: inline-block; margin-right: 6px; border: 5px solid; border-radius: 50%; }
.badge.queued::before { border-width: 2px; padding: 3px; }
.badge.error::before { border-radius: 2px; }
.chart { display: block; width: 100%; height: 140px; border-bottom: 1px solid var(--faint); fill: currentColor; }
label { display: block; font-size: 14px; font-weight: 600; }
label.check { display: inline-flex; gap: 8px; align-items: center; min-height: 40px; }
input, select, textarea, button, .button { font: inherit; color: inherit; background: var(--card); padding: 7px 10px;
  border: 1px solid var(--faint); border-radius: 6px; max-width: 100%; min-height: 40px; }
input[type=checkbox] { min-height: 0; width: 20px; height: 20px; margin: 0; }
textarea { width: 100%; min-height: 120px; }
button, .button { cursor: pointer; background: var(--code); }
button.main { background: var(--link); color: var(--card); border-color: var(--link); font-weight: 600; }
button.danger { border-color: currentColor; }
button.copy { min-height: 30px; padding: 2px 10px; font-size: 14px; }
pre, code, textarea, .id, .log { font-family: ui-monospace, monospace; font-size: 14px; }
pre, .log { background: var(--code); padding: 10px; border-radius: 6px; margin: 4px 0 8px; white-space: pre-wrap; }
pre, .log, .scroll { overflow: auto; max-height: 480px; }
.scroll { font-size: 14px; white-space: nowrap; }
.doc { white-space: pre-line; margin: 4px 0 8px; }
summary { cursor: pointer; min-height: 28px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 10px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; }
dd { margin: 0; min-width: 0; }
progress { width: 100%; height: 14px; accent-color: var(--link); }
img.result { max-width: 100%; background: #fff; }
.login { max-width: 420px; margin: 5vh auto; }
.login input { width: 100%; margin-bottom: 10px; }
@media (max-width: 720px) {
  .jobs thead, .api thead { display: none; }
  .jobs tr, .api tr { display: block; padding: 8px 0; border-top: 1px solid var(--line); }
  .jobs td, .jobs th, .api td { display: flex; gap: 10px; border: 0; padding: 2px 12px; }
  [data-label]::before { content: attr(data-label); flex: 0 0 84px; color: var(--faint); font: 14px system-ui; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin: 0 0 6px; }
}
@media (prefers-reduced-motion: no-preference) { .badge.running::before { animation: pulse 1.6s infinite; } }
@keyframes pulse { 50% { opacity: 0.3; } }
"""

SCRIPT = """
const $ = (selector) => document.querySelector(selector);
let source, timer;

// Fetch this page again and replace its live parts, but not one that somebody is typing in.
async function refresh() {
  timer = null;
  const answer = await fetch(location.href, { headers: { Accept: 'text/html' } });
  if (!answer.ok) { return; }
  const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
  for (const old of document.querySelectorAll('[data-live]')) {
    const fresh = page.getElementById(old.id);
    if (fresh && !old.querySelector('input:focus')) { old.replaceWith(document.adoptNode(fresh)); }
  }
}
function soon(milliseconds) { timer = timer || setTimeout(refresh, milliseconds); }
function listen(url, handlers) {
  source = new EventSource(url);
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data), event.lastEventId));
  }
}
function stop() { source?.close(); }
function start() {
  if ($('#numbers')) { listen('/events', { stats() { soon(1000); } }); }
  const log = $('#log[data-events]');
  if (!log) { return; }
  listen(log.dataset.events + '?last_event_id=' + log.dataset.last, {
    log(line, id) {
      log.dataset.last = id;
      if (log.dataset.levels && !log.dataset.levels.split(' ').includes(line.level)) { return; }
      const item = document.createElement('li'), level = document.createElement('b');
      item.className = level.textContent = line.level;
      item.append(line.timestamp.slice(11, 23) + ' ', level, ' ' + line.message);
      log.append(item);
      if (log.children.length > 2000) { log.firstChild.remove(); }
      if ($('#follow').checked) { log.scrollTop = log.scrollHeight; }
    },
    progress(value) {
      $('#progress').hidden = false;
      $('#progress progress').value = value.fraction;
      $('#progress span').textContent = Math.round(value.fraction * 100) + ' % ' + (value.message || '');
    },
    status(value) {
      if (value.status !== 'pending') { stop(); }
      if (!$('#head .badge.' + value.state)) { soon(0); }
    },
  });
}
document.addEventListener('click', ({ target }) => {
  if (target.matches('button.copy')) {
    getSelection().selectAllChildren(document.getElementById(target.dataset.copy));
    document.execCommand('copy');  // navigator.clipboard exists only over HTTPS
    target.textContent = 'Copied';
    setTimeout(() => { target.textContent = 'Copy'; }, 2000);
  } else if (target.id === 'all') {
    for (const box of document.querySelectorAll('input[name=job_id]')) { box.checked = target.checked; }
  }
});
// A hidden tab closes its stream: browsers allow six connections to one service.
document.addEventListener('visibilitychange', () => { stop(); if (!document.hidden) { soon(0); start(); } });
document.documentElement.className = 'script';
start();
"""

STYLE_PATH = f"/console/style-{binascii.crc32(STYLE.encode()):08x}.css"
SCRIPT_PATH = f"/console/script-{binascii.crc32(SCRIPT.encode()):08x}.js"

_PAGE = """<!DOCTYPE html>
<html lang="en"><head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title – $service</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E%3Crect
 width='8' height='8' rx='2' fill='%230a58a6'/%3E%3Cpath d='M2 4l1.5 1.5L6 3' stroke='white' fill='none'/%3E%3C/svg%3E">
<link rel="stylesheet" href="$style">
<script type="module" src="$script"></script>
</head><body>
<a class="skip" href="#main">Skip to content</a>
<header><a class="name" href="/">$service</a><nav aria-label="Pages">$links</nav>$sign</header>
<main id="main">$notice$content</main>
<footer><span>csp.py $version</span><a href="/openapi.json">openapi.json</a><a href="/metrics">metrics</a></footer>
</body></html>
"""
_ALERT = '<p class="notice" role="alert">$value</p>'
_COPYABLE = """<button type="button" class="copy needs-script" data-copy="$id">Copy</button>
<pre id="$id" tabindex="0">$text</pre>"""
_MORE = '<p class="faint">The first $shown of $all characters. <a href="$address">Show all</a></p>'
_OVERVIEW = """<h1>$service</h1>
<p class="faint">Runs functions as jobs that are submitted over HTTP.</p>
<ul class="tiles" id="numbers" data-live>$tiles</ul>
<section id="chart" data-live><h2>Jobs ended per hour</h2>$chart</section>
$failures
<h2 id="types">Job types</h2><div class="columns">$types</div>
<section><h2 id="api">API</h2><p>Send JSON to <code>$url</code>. Errors are answered with
<code>{"error": "a sentence"}</code>. <a href="/openapi.json">openapi.json</a> describes the whole API.</p>
<details><summary>All routes</summary>$routes</details></section>"""
_FAILURE = "<li>$link <small>$type, $time</small><br>$message</li>"
_BAR = '<rect class="$status" x="$x" y="$y" width="8" height="$height"><title>from $label: $jobs $word</title></rect>'
_CHART = """<svg class="chart" role="img" aria-label="$text" viewBox="0 0 $width 100" preserveAspectRatio="none">
$bars</svg><div class="axis faint"><span>$hours h ago</span><span>now</span></div><p class="faint">$text.</p>"""
_TYPE = """<section><h3>$name</h3><p class="faint">$facts</p><p class="doc">$doc</p>
<details><summary>How to submit</summary>$curl$python</details>$form</section>"""
_PYTHON = """import json, urllib.request
body = json.dumps({body}).encode()
request = urllib.request.Request("{url}", body, {{"Content-Type": "application/json"}})
print(json.load(urllib.request.urlopen(request)))"""
_JOBS = """<h1>Jobs</h1><form method="get" action="/job" class="row" role="search">$fields
<button class="main">Show</button></form><br>
$form<table class="jobs"><caption class="faint">$caption</caption>$head$rows</table>
<p class="row">$newest$older</p>$actions$clear"""
_SELECTION = '<form method="post" action="/console/selection"><input type="hidden" name="back" value="$value">'
_CLEAR = """</form><section><form method="post" action="/console/clear" class="row"><div>$value</div>
<button class="danger">Delete old jobs</button></form></section>"""
_HEAD = """<thead><tr><th scope="col"><label class="check needs-script"><input type="checkbox" id="all"
 aria-label="Select all"></label></th><th scope="col">Job</th><th scope="col">Type</th><th scope="col">Status</th>
<th scope="col">Submitted</th><th scope="col">Duration</th><th scope="col">Metadata</th></tr></thead>"""
_ROW = """<tr><td data-label="Select"><input type="checkbox" name="job_id" value="$id" aria-label="Select $id"></td>
<th scope="row" data-label="Job">$link</th><td data-label="Type">$type</td>
<td data-label="Status"><span class="badge $state">$word</span></td><td data-label="Submitted">$time</td>
<td data-label="Duration">$duration</td><td data-label="Metadata">$metadata</td></tr>"""
_ACTIONS = """<p class="row"><span>Selected jobs:</span>
<span><label for="key">API key, to resubmit</label><input id="key" name="api_key" autocomplete="off"></span>
<button name="action" value="resubmit">Resubmit</button><button name="action" value="cancel">Cancel</button>
<button name="action" value="delete" class="danger">Delete</button></p>"""
_JOB_PAGE = """<div id="head" data-live><h1 class="id">$id</h1><div class="row">
<span class="badge $state">$word</span> $action<details><summary>Delete …</summary>$delete</details></div>
<div id="progress"$hidden><progress max="1" value="$fraction" aria-label="Progress"></progress>
<span class="faint">$progress</span></div></div>
<div id="error" data-live>$error</div>
<div class="columns"><section id="facts" data-live><h2>Job</h2>$facts</section>
<section id="result" data-live><h2>Result</h2>$result</section></div>
<section><h2>Log</h2><form class="row" method="get" action="$path"><div>$level</div><button>Show</button>
<label class="check needs-script"><input type="checkbox" id="follow" checked>Follow</label></form>
<ol class="log" id="log" tabindex="0" aria-label="Log" data-levels="$levels" data-last="$last"$events>$lines</ol>
<p class="faint">No log lines.</p>
<p class="faint">The newest lines. <a href="$path?_format=json">Show the whole job as JSON</a></p></section>
<div class="columns"><section><h2>Input</h2>$input</section>
<section id="callback" data-live><h2>Callback</h2>$callback$again</section></div>"""
_KEY_FIELD = '<label class="check">API key <input name="api_key" autocomplete="off"$required></label> '
_TRACE = '<details><summary>Traceback</summary><pre tabindex="0">$value</pre></details>'
_SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="The first rows">$value</div>'


class Html(str):
    """Text that is markup already."""


def render(template: str, **values: Any) -> Html:
    """Fill in a ``string.Template``. Values that are not Html are escaped."""
    return Html(string.Template(template).substitute({
        name: value if isinstance(value, Html) else html.escape(str(value)) for name, value in values.items()}))


def _each(template: str, rows: Iterable[Iterable[Any]]) -> Html:
    """Render the template once for each row, whose values are in the order in which the template names them."""
    names = list(dict.fromkeys(re.findall(r"\$(\w+)", template)))
    return Html("".join(render(template, **dict(zip(names, row))) for row in rows))


def _when(value: Any, template: str) -> Html:
    """Render the template with ``$value``, if there is one."""
    return render(template, value=value) if value else Html("")


def _facts(facts: Iterable[Tuple[str, Any]]) -> Html:
    rows = (fact for fact in facts if fact[1] is not None)
    return render("<dl>$rows</dl>", rows=_each("<dt>$name</dt><dd>$value</dd>", rows))


def _table(kind: str, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Html:
    return render('<table class="$kind"><thead><tr>$head</tr></thead><tbody>$rows</tbody></table>', kind=kind,
                  head=_each('<th scope="col">$cell</th>', zip(head)),
                  rows=_each("<tr>$cells</tr>", zip(_each("<td>$cell</td>", zip(row)) for row in rows)))


def _form(action: str, button: str, fields: str = "", kind: str = "") -> Html:
    return render('<form method="post" action="$action">$fields<button class="$kind">$button</button></form>',
                  action=action, button=button, fields=fields, kind=kind)


def _field(text: str, name: str, control: str, value: Any = "") -> Html:
    """Return a labelled control; ``$name`` in its template stands for both of its attributes id and name."""
    identifier = name.lstrip("_")
    return render(f'<label for="{identifier}">$text</label>{control}', text=text, value=value,
                  name=Html(f'id="{identifier}" name="{name}"'))


def _select(text: str, name: str, choices: Iterable[Tuple[str, str]], selected: str) -> Html:
    options = _each('<option value="$value"$selected>$text</option>', (
        (value, _when(value == selected, " selected"), text) for value, text in choices))
    return _field(text, name, "<select $name>$value</select>", options)


class Viewer(NamedTuple):
    service: str
    is_admin: bool
    path: str  # of the page, to return to after signing in
    notice: str = ""  # one of NOTICES


def render_page(viewer: Viewer, title: str, content: Html, error: Optional[CspError] = None) -> Response:
    links = [("/", "Overview"), ("/job", "Jobs")] + [("/console/submit", "Try it")] * viewer.is_admin
    path = viewer.path.partition("?")[0]
    sign = Html(f'<a href="/login?next={urllib.parse.quote(viewer.path)}">Sign in</a>')
    if viewer.is_admin:
        sign = _form("/logout", "Sign out", Html('<input type="hidden" name="next" value="/?done=out">'))
    page = render(
        _PAGE, title=title, service=viewer.service, style=STYLE_PATH, script=SCRIPT_PATH, version=__version__,
        content=content, sign=sign,
        notice=_when(NOTICES.get(viewer.notice), '<p class="notice" role="status">$value</p>'),
        links=_each('<a href="$href"$current>$text</a>', (
            (href, _when(href == path, ' aria-current="page"'), text) for href, text in links)))
    headers = [pair for pair in error.headers if pair[0] != "WWW-Authenticate"] if error else []  # it opens a pop-up
    return Response(error.status if error else 200, page.encode("utf-8", "replace"), "text/html; charset=utf-8",
                    (*PAGE_HEADERS, *headers))


def error_page(viewer: Viewer, error: CspError) -> Response:
    reason = _REASONS.get(error.status, "Error")
    return render_page(viewer, reason, render(
        '<h1>$reason</h1><section><p>$message</p><p class="faint">$detail</p><p><a href="/">Go to the overview</a></p>'
        '</section>', reason=reason, message=error.message, detail=error.detail or ""), error)


def login_page(viewer: Viewer, path: str, username: str = "", error: Optional[CspError] = None) -> Response:
    """Return the form to sign in; it leads on to ``path``."""
    fields = render(
        '<input type="hidden" name="next" value="$next">$name$password', next=path,
        name=_field("User name", "username", '<input $name autocomplete="username" value="$value" required>', username),
        password=_field(
            "Password", "password", '<input $name type="password" autocomplete="current-password" required>'))
    return render_page(viewer, "Sign in", render(
        '<section class="login"><h1>Sign in</h1>$error$form</section>', error=_when(error, _ALERT),
        form=_form("/login", "Sign in", fields, "main")), error)


def key_page(viewer: Viewer, path: str, error: str = "") -> Response:
    field = _field("Job key", "job_key", '<input $name autocomplete="off" required>')
    return render_page(viewer, "Job key", render(
        '<section class="login"><h1>This job needs a key</h1>$error<p>The response to the job\'s submission contains '
        'it as <code>job_key</code>.</p>$form<p>Or <a href="/login?next=$next">sign in</a> as the administrator.</p>'
        '</section>', error=_when(error, _ALERT), form=_form(path + "/key", "Show the job", field, "main"),
        next=urllib.parse.quote(path)), Forbidden(error))


def human_seconds(seconds: float) -> str:
    """Return a duration in its two largest units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "under 1 ms"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    numbers = (seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60, seconds % 60)
    parts = itertools.dropwhile(lambda part: part[0] < 1, zip(numbers, ("d", "h", "min", "s")))
    return " ".join(f"{int(number)} {unit}" for number, unit in itertools.islice(parts, 2) if number >= 1)


def _time(text: Optional[str], now: float, is_exact: bool = False) -> Html:
    """Return how long ago it was; the exact time is a tooltip or, if ``is_exact``, stands before it."""
    if not text:
        return Html("–")
    ago, exact = int(now - epoch_seconds(text)), text[:19].replace("T", " ")
    return render('$prefix<time datetime="$iso" title="$exact">$ago</time>', iso=text[:23], exact=exact,
                  ago=" ".join([*human_seconds(ago).split(" ")[:2], "ago"]) if ago > 0 else "now",
                  prefix=exact + " " if is_exact else "")


def _duration(job: Job, now: float) -> str:
    if not job.started_timestamp or job.state == QUEUED:
        return "–"
    end = epoch_seconds(job.finished_timestamp) if job.finished_timestamp else now
    return human_seconds(max(0.0, end - epoch_seconds(job.started_timestamp)))


def job_path(job_id: str) -> str:
    return "/job/" + urllib.parse.quote(job_id, safe="")


def _job_link(job_id: str) -> Html:
    return render('<a class="id" href="$path">$id</a>', path=job_path(job_id), id=_shorten(job_id, 60))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _metadata_texts(job: Job) -> List[Tuple[str, str]]:
    return [(key, value if isinstance(value, str) else to_json(value))
            for key, value in json.loads(job.metadata or "{}").items()]


def _copyable(identifier: str, text: str, address: str = "", is_json: bool = False) -> Html:
    """Return the beginning of a text with a button to copy it and, if there is more, a link to the whole."""
    if is_json and len(text) <= PARSED_CHARACTERS:
        with suppress(RecursionError):  # a result may nest deeper than Python can print
            text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return render(_COPYABLE + _MORE * (len(text) > PAGE_TEXT_CHARACTERS), id=identifier, address=address,
                  text=text[:PAGE_TEXT_CHARACTERS], shown=f"{PAGE_TEXT_CHARACTERS:,}", all=f"{len(text):,}")


def overview_page(viewer: Viewer, states: Mapping[str, int], hours: Mapping[Tuple[int, str], int], now: float,
                  failures: Iterable[Job], types: Iterable[JobType], counts: Mapping[Tuple[str, str], int], url: str,
                  routes: Iterable[Route]) -> Response:
    """Return the first page. ``hours`` are jobs ended by hour since 1970 and status, ``counts`` by type and status."""
    failed = _each(_FAILURE, (
        (_job_link(job.job_id), job.job_type, _time(job.finished_timestamp, now),
         _shorten(str(json.loads(job.error or "{}").get("message", "")), 160)) for job in failures))
    return render_page(viewer, "Overview", render(
        _OVERVIEW, service=viewer.service, chart=_chart(hours, now), url=url,
        tiles=_each('<li><a class="$state" href="/job?_status=$state"><b>$jobs</b>$word</a></li>', (
            (state, f"{jobs:,}", STATE_WORDS[state]) for state, jobs in states.items())),
        failures=_when(viewer.is_admin and (_when(failed, "<ul>$value</ul>") or Html("<p>None.</p>")),
                       '<section id="failures" data-live><h2>Latest failures</h2>$value</section>'),
        types=Html("".join(_type_section(viewer, job_type, counts, url) for job_type in types)) or
        Html("<p>No job types. Name a module with --jobs.</p>"),
        routes=_table("api", ("Request", "What it does", "Who may use it"), (
            (render("<code>$method $path</code>", method=route.method, path=route.path), route.summary, route.access)
            for route in routes))))


def _chart(hours: Mapping[Tuple[int, str], int], now: float) -> Html:
    """Return a bar chart of the last CHART_HOURS hours, failures on top."""
    first = int(now // 3600) - CHART_HOURS + 1
    numbers = [(hours.get((hour, COMPLETE), 0), hours.get((hour, ERROR), 0))
               for hour in range(first, first + CHART_HOURS)]
    most = max(*map(sum, numbers), 1)
    bars = ((status, index * 10 + 1, f"{100 - 100 * top / most:.2f}", f"{100 * jobs / most:.2f}",
             time.strftime("%H:%M", time.localtime((first + index) * 3600)), f"{jobs:,}", STATE_WORDS[status])
            for index, (complete, error) in enumerate(numbers)
            for status, jobs, top in ((COMPLETE, complete, complete), (ERROR, error, complete + error)) if jobs)
    complete, error = map(sum, zip(*numbers))
    text = f"{complete:,} complete and {error:,} failed in the last {CHART_HOURS} hours, at most {most:,} in one hour"
    return render(_CHART, text=text if complete + error else f"No jobs ended in the last {CHART_HOURS} hours",
                  bars=_each(_BAR, bars), width=CHART_HOURS * 10, hours=CHART_HOURS)


def _type_section(viewer: Viewer, job_type: JobType, counts: Mapping[Tuple[str, str], int], url: str) -> Html:
    import inspect
    import shlex
    name = job_type.name
    facts = ["synchronous" if job_type.synchronous else "asynchronous", ", ".join(
        f"{counts.get((name, status), 0):,} {STATE_WORDS[status]}" for status in (COMPLETE, ERROR))]
    facts += [f"timeout {job_type.timeout:g} s"] if job_type.timeout else []
    facts += [f"retries {job_type.retries}"] if job_type.retries else []
    body = json.dumps({"job_type": name, "api_key": "your key", "data": "hello"})
    curl = f"curl -H 'Content-Type: application/json' -d {shlex.quote(body)} {shlex.quote(url)}"
    return render(
        _TYPE, name=name, facts=" · ".join(facts), doc=_shorten(inspect.getdoc(job_type.function) or "", 600),
        curl=_copyable(f"curl-{name}", curl),
        python=_copyable(f"python-{name}", _PYTHON.format(body=body, url=url)),
        form=_when(viewer.is_admin and urllib.parse.quote(name),
                   '<p><a href="/console/submit?type=$value">Try it</a></p>'))


def jobs_page(viewer: Viewer, jobs: Sequence[Job], query: Mapping[str, str], following: str, types: Sequence[str],
              keep_days: int, now: float) -> Response:
    """Return a page of the list. Only the administrator sees more than IDs, as in the JSON."""
    if viewer.is_admin:
        rows = _each(_ROW, (
            (job.job_id, _job_link(job.job_id), job.job_type, job.state, STATE_WORDS.get(job.state, job.state),
             _time(job.requested_timestamp, now), _duration(job, now),
             _shorten(", ".join(map("=".join, _metadata_texts(job))), 120) or "–") for job in jobs))
    else:
        rows = _each('<tr><td data-label="Job">$link</td></tr>', zip(_job_link(job.job_id) for job in jobs))
    is_filtered = any(value for name, value in query.items() if name != "done")
    days = _field("Delete jobs that ended more than this many days ago", "days",
                  '<input $name type="number" min="0" max="36500" value="$value" required>', keep_days)
    return render_page(viewer, "Jobs", render(
        _JOBS, form=_when(viewer.is_admin and viewer.path, _SELECTION), rows=rows,
        caption="" if jobs else "No jobs match." if is_filtered else "No jobs yet.",
        head=_when(viewer.is_admin and jobs, _HEAD), newest=_when(query, '<a class="button" href="/job">Newest</a>'),
        older=_when(following, '<a class="button" href="$value" rel="next">Older</a>'),
        actions=_when(viewer.is_admin and jobs, _ACTIONS), clear=_when(viewer.is_admin and days, _CLEAR),
        fields=_each("<div>$field</div>", zip((
            _select("Status", "_status", [("", "all"), *STATE_WORDS.items()], query.get("_status", "")),
            _select("Type", "_type", [("", "all"), *zip(types, types)], query.get("_type", "")),
            _field("Metadata", "_metadata", '<input $name value="$value" placeholder="key=value">',
                   query.get("_metadata", "")),
            _field("ID starts with", "_id", '<input $name value="$value">', query.get("_id", "")))))))


def job_page(viewer: Viewer, job: Job, newest: Iterable[LogLine], last_id: int, level: str, now: float) -> Response:
    """Return a job's page with as many of its ``newest`` log lines as fit; events follow the line ``last_id``."""
    path, is_pending = job_path(job.job_id), job.status == PENDING
    cut = [line._replace(message=_shorten(line.message, 2000)) for line in newest]
    sizes = itertools.accumulate(len(line.message) + 60 for line in cut)
    lines = [line for line, size in zip(cut, sizes) if size <= PAGE_LOG_CHARACTERS][::-1]
    progress: Dict[str, Any] = json.loads(job.progress or '{"fraction": 0, "message": null}')
    error: Dict[str, Any] = json.loads(job.error or "{}")
    message, trace = str(error.pop("message", "")), str(error.pop("traceback", None) or "")
    facts: List[Tuple[str, Any]] = [
        ("Type", job.job_type), ("Submitted", _time(job.requested_timestamp, now, True)),
        ("Started", _time(job.started_timestamp, now, True)), ("Ended", _time(job.finished_timestamp, now, True)),
        ("Duration", _duration(job, now)), ("Attempts", job.attempts),
        ("Resubmitted from", job.resubmitted_from and _job_link(job.resubmitted_from)),
        *((_shorten(key, 60), _shorten(value, 300)) for key, value in _metadata_texts(job))]
    wait = None if job.callback_at is None else job.callback_at - now
    callback = _facts([
        ("To", job.result_url), ("Status", job.callback_status),
        ("Attempts", job.callback_attempts if job.callback_status else None),
        ("Last error", job.callback_error or None),
        ("Next attempt", None if wait is None else f"in {human_seconds(wait)}" if wait > 0 else "now")])
    return render_page(viewer, job.job_id, render(
        _JOB_PAGE, id=job.job_id, path=path, state=job.state, word=STATE_WORDS.get(job.state, job.state),
        action=_form(path + "/cancel", "Cancel") if is_pending else
        _form(path + "/resubmit", "Resubmit", render(_KEY_FIELD, required=Html(" required"))),
        delete=_form(path + "/delete", "Delete permanently", kind="danger"),
        hidden=_when(not job.progress, " hidden"), fraction=progress["fraction"],
        progress=f"{progress['fraction'] * 100:.0f} % {progress['message'] or ''}",
        error=_when(job.error, render(
            "<section><h2>Error</h2><p>$message</p>$rest$trace</section>",
            message=_shorten(message, PAGE_TEXT_CHARACTERS),
            rest=_when(error and _shorten(to_json(error), PAGE_TEXT_CHARACTERS), '<pre tabindex="0">$value</pre>'),
            trace=_when(trace[-PAGE_TEXT_CHARACTERS:], _TRACE))),
        facts=_facts(facts[:60]), result=_result(job, path),
        callback=callback if job.result_url else "None: the job was submitted without a result_url.",
        again=_when(job.result_url and not is_pending and _form(
            path + "/callback", "Send again", render(_KEY_FIELD, required="")), "$value"),
        level=_select("Level", "level", [("", "all"), *((name, f"{name} and above") for name in reversed(LEVELS))],
                      level),
        levels=" ".join(LEVELS.get(level, ())), last=last_id,
        events=_when(is_pending and path, ' data-events="$value/events"'),
        lines=_each('<li class="$level">$time <b>$level</b> $message</li>', (
            (line.level, line.timestamp[11:23], line.message) for line in lines)),
        input=Html("<p>None.</p>") if job.sent_data in (None, "null") else
        _copyable("input", job.sent_data, path + "?_format=json", True)))


def _result(job: Job, path: str) -> Html:
    """Return the result shown according to its media type: image, table, text, JSON, or a link to it."""
    import csv
    if job.status != COMPLETE:
        return Html("<p>None.</p>" if job.status == ERROR else "<p>Not yet.</p>")
    data = Response.data(job.data, job.metadata)
    kind = data.content_type.partition(";")[0].strip().lower()
    body = data.body if isinstance(data.body, bytes) else b"".join(data.body)
    text = "" if isinstance(job.data, bytes) else body.decode("utf-8")
    content = Html("")
    if re.fullmatch("image/(?:png|jpeg|gif|webp)", kind):
        content = Html(f'<img class="result" src="{path}/data" alt="The result">')
    elif kind == "text/csv" and text:
        # The reader raises csv.Error for a NUL (before Python 3.11) and for a line end of old Macs.
        lines = csv.reader(io.StringIO(text[:PAGE_TEXT_CHARACTERS * 2].replace("\0", ""), newline=None))
        rows = [[_shorten(cell, 100) for cell in row[:20]] for row in itertools.islice(lines, 51)] or [[]]
        content = _when(_table("csv", rows[0], rows[1:]), _SCROLL)
    elif not isinstance(job.data, bytes):
        content = _copyable("data", text, path + "/data", not (job.data or "").startswith('"'))
    return render('<p><a href="$path/data">$kind, $size bytes</a></p>$content', path=path, kind=kind,
                  size=f"{len(body):,}", content=content)


def submit_page(viewer: Viewer, types: Sequence[str], form: Mapping[str, str],
                error: Optional[CspError] = None) -> Response:
    text = '<textarea $name spellcheck="false">$value</textarea>'
    fields = [_select("Job type", "job_type", [*zip(types, types)], form.get("job_type", "")), *(
        _field(label, name, control, form.get(name, "")) for label, name, control in (
            ("Data (JSON)", "data", text), ("Metadata (a JSON object)", "metadata", text),
            ("Callback URL", "result_url", '<input $name type="url" value="$value" size="60">'),
            ("API key", "api_key", '<input $name value="$value" required autocomplete="off">')))]
    return render_page(viewer, "Try it", render(
        "<h1>Try it</h1>$error<section>$form</section>", error=_when(error, _ALERT), form=_form(
            "/console/submit", "Submit", _each("<p>$field</p>", zip(fields)), "main")), error)


# ---------------------------------------------------------------------------------------------------------------------
# Service
#
# Holds the parts and answers requests: route, access check, endpoint. An endpoint takes the request and what the access
# check hands over, and returns a Response or raises a CspError; ``handle`` is the only place that catches. The forms of
# the console call the endpoints of the API.
# ---------------------------------------------------------------------------------------------------------------------

API_VERSION = 0.1  # of the documented interface; not this program's version
HELP = "https://pypi.org/project/ckanserviceprovider/ documents the interface; README.md of csp.py what is added to it."
FIRST_ATTEMPT_SECONDS = 2.0  # how long a synchronous submission waits for the first attempt at its callback
CLEAR_SECONDS = 86_400.0
MAX_DAYS = 36_500  # for clearing: a century
KEEP_ALIVE_SECONDS = 15.0  # between comments in a quiet stream: proxies give up after 30 or 60, and lost clients show
EVENT_SECONDS = 0.1  # between looks at a job that changes all the time, and more
EVENT_SECONDS_PER_WATCHER = 0.001  # for each watcher: together they look a thousand times a second at most
STATS_SECONDS = 1.0
MAX_EVENT_LINES = 500  # log lines read at a time
LIST_PARAMETERS = ("_limit", "_offset", "_before", "_status", "_type", "_id", "_metadata", "_format",
                   "done")  # others are metadata filters
STREAM_HEADERS = (("X-Accel-Buffering", "no"),)  # or nginx holds events back
SUBMIT_KEYS = frozenset(("job_type", "api_key", "data", "result_url", "metadata"))
_TIMESTAMP = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}"
_JOB_ID = r"(?!\.\.?\Z)[^/\x00-\x1f\x7f-\x9f]{1,255}"


def read_body(request: Request) -> Dict[str, Any]:
    value: Any = None
    if request.is_json and request.body:
        try:
            value = from_json(request.body)
        except (json.JSONDecodeError, UnicodeError) as error:
            raise Conflict("Malformed json", detail=str(error)) from None
        except ValueError as error:
            raise Conflict(f"Malformed json: {error}") from None
        request.body = b""  # a large one is not held longer than necessary
    if not isinstance(value, dict):
        raise Conflict("Not recognised as json, make sure content type is application/json")
    return value


def read_new_key(request: Request) -> Dict[str, Any]:
    body = read_body(request) if request.body else {}
    if set(body) - {"api_key"}:
        raise Conflict("Too many arguments. The body may hold an api_key and nothing else")
    return body


def check_submission(body: Dict[str, Any], registry: Registry) -> Job:
    """Return the job that the body asks for, without what the service adds to it; raise Conflict if it is wrong."""
    if not SUBMIT_KEYS.issuperset(body):
        raise Conflict(f"Too many arguments. Extra keys are {', '.join(sorted(set(body) - SUBMIT_KEYS))}")
    url, name, metadata = body.get("result_url"), body.get("job_type"), body.get("metadata")
    if url not in (None, ""):
        check_result_url(url)
    if name in (None, ""):
        raise Conflict("Please specify a job type")
    job_type = registry.get(name)
    if job_type is None:
        raise Conflict(f"Job type {clean(str(name))[:200]} not available. Available job types are "
                       f"{', '.join(registry.names())}")
    api_key = check_api_key(body.get("api_key"))
    if metadata is not None and not isinstance(metadata, dict):
        raise Conflict("metadata has to be a json object")
    try:
        return Job(
            seq=0, job_id="", job_type=job_type.name, status=PENDING, data=None, error=None, result_url=url or None,
            sent_data=to_json(body["data"]) if "data" in body else None,
            metadata=None if metadata is None else to_json(metadata), api_key=api_key, job_key="",
            requested_timestamp="", synchronous=int(job_type.synchronous),
            callback_host=callback_host(url) if url else None)
    except (ValueError, RecursionError):
        raise Conflict("Malformed json: a number in it is not finite") from None


def check_api_key(api_key: Any) -> Union[str, int, float]:
    if api_key is None or api_key is False or api_key == "":
        raise Conflict("Please provide your API key.")
    if not isinstance(api_key, (str, int, float)) or isinstance(api_key, bool) or not (
            isinstance(api_key, str) or abs(api_key) < 2**63):
        raise Conflict("api_key has to be a string or a number of at most 64 bits")
    callback_header(api_key)
    return api_key


def hash_submission(job: Job, job_key: str) -> str:
    """Return a digest that tells whether another body is the same, without keeping its api_key."""
    values = [json.loads(text) if text else None for text in (job.sent_data, job.metadata)]
    text = json.dumps([job.job_type, job.api_key, job.result_url, *values], sort_keys=True)
    return sign(job_key.encode("ascii"), text.encode("ascii")).hex()


def check_report(body: Dict[str, Any]) -> Dict[str, Any]:
    """Return the report of a worker; raise Conflict if it is none, because a job can send anything."""
    def has(value: Any, **kinds: Any) -> bool:  # these fields and no others, their types, and numbers that are sound
        return isinstance(value, dict) and set(value) == set(kinds) and all(
            type(field) in kinds[name] and (type(field) not in (int, float) or 0 <= field < 2**31)
            for name, field in value.items())

    text, whole, number, nothing = (str,), (int,), (int, float), type(None)
    line = {**dict.fromkeys(LogLine._fields, text), "lineno": whole}
    if not has(body, execution=text, first=whole, lines=(list,), progress=(dict, nothing), seconds=number) or not (
            0 < len(body["execution"]) <= 100
            and all(has(value, **line) and re.fullmatch(_TIMESTAMP, value["timestamp"]) for value in body["lines"])
            and (body["progress"] is None or has(body["progress"], fraction=number, message=(str, nothing)))):
        raise Conflict("This is no report as openapi.json describes it")
    return body


@functools.lru_cache(maxsize=1)  # monitors ask again and again, and mostly nothing has changed
def _render_status(name: str, job_types: Tuple[str, ...], stats: Tuple[Tuple[str, int], ...]) -> bytes:
    return to_json({"version": API_VERSION, "job_types": list(job_types), "name": name,
                    "stats": dict(stats)}).encode("utf-8")


class Service:
    """The job service, without sockets: opens the database and begins to run jobs; ``close`` ends it.

    Any thread may call ``handle``. Raises StartError if the database or the executor cannot be used.
    """

    def __init__(self, settings: Optional[Settings] = None, registry: Registry = registry) -> None:
        self.settings = settings if settings is not None else Settings()
        self.registry = registry
        self.database = database_path(self.settings["SQLALCHEMY_DATABASE_URI"])
        self.store = Store(self.database)
        self.metrics = Metrics()
        with ExitStack() as begun:
            begun.callback(self.store.close)
            try:
                self.auth = Authenticator(self.store, self.settings)
                self._engine = make_engine(self.settings, registry)
                if self._engine is not None:
                    begun.callback(self._engine.close)
                self.callbacks = CallbackSender(
                    self.store, self.settings["SSL_VERIFY"], self.settings["CALLBACK_SECRET"],
                    CallbackPolicy(self.settings["CALLBACK_HOSTS"]), self.metrics)
                begun.callback(self.callbacks.stop, 0.0)
                self.store.on_callback_due = self.callbacks.notify
                self.runner = Runner(self.store, registry, self.settings["WORKERS"], self._engine, self.metrics)
            except Unavailable as error:
                raise StartError(f"The service cannot start: {error}") from None
            begun.pop_all()
        self._router = Router((*ROUTES, *CONSOLE_ROUTES))
        self._closing = threading.Event()
        if self.settings["AUTO_CLEAR"]:
            threading.Thread(target=self._clear_daily, name="csp-clear", daemon=True).start()

    def reachable_at(self, url: Optional[str]) -> None:
        """Say under which address a server answers for this service, None if nobody knows."""
        if self._engine is not None:
            self._engine.reachable_at(url)

    def release(self) -> None:
        """End event streams and answer everybody who waits for a job: the service is about to stop."""
        self._closing.set()
        self.runner.is_paused = True
        self.store.release()

    def close(self, grace_seconds: Optional[float] = None) -> bool:
        """Stop: running jobs get the grace period, the rest stays on disk. Return whether every job had ended."""
        self.release()
        is_done = self.runner.stop(self.settings["GRACE_SECONDS"] if grace_seconds is None else grace_seconds)
        self.callbacks.stop(1.0)
        self.store.close()
        return is_done

    # -- the way of a request

    def handle(self, request: Request) -> Response:
        """Answer a request; never raises."""
        started = time.perf_counter()
        route, response = self._answer(request)
        method, path = (route.method, route.path) if route else ("", "")
        self.metrics.requests.add((("method", method), ("route", path), ("status", str(response.status))),
                                  time.perf_counter() - started)
        if self.settings["CORS_ORIGINS"]:  # which pages may read the answer (fetch.spec.whatwg.org), as nobody
            response.headers.append(("Vary", "Origin"))
            origin = request.headers.get("origin", "")
            if origin in self.settings["CORS_ORIGINS"]:
                response.headers += [
                    ("Access-Control-Allow-Origin", origin),
                    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE"),
                    ("Access-Control-Allow-Headers", "Authorization, Content-Type, Last-Event-ID, Prefer"),
                    ("Access-Control-Expose-Headers", "Link, Preference-Applied, Retry-After"),
                    ("Access-Control-Max-Age", "600")]
        return response

    def _answer(self, request: Request) -> Tuple[Optional[Route], Response]:
        route: Optional[Route] = None
        try:
            route, arguments = self._router.find(request)
            values = self._authorize(route, request, arguments)
            if route.page is None:
                return route, route.endpoint(self, request, *values)
            response = (route.page if request.wants_html else route.endpoint)(self, request, *values)
            response.headers.append(("Vary", "Accept"))
            return route, response
        except CspError as error:
            if request.method == "OPTIONS" and error.status == 405:
                return None, Response(204, headers=error.headers)
            return route, self._refuse(request, error, route)
        except Exception:  # noqa: BLE001 - a defect of ours must not end the connection without an answer
            incident = os.urandom(4).hex()
            log.exception("incident %s at %s %s", incident, request.method, clean(request.path))
            return route, self._refuse(request, CspError(
                500, f"Something went wrong; the service's log has it as incident {incident}."), route)

    def _authorize(self, route: Route, request: Request, arguments: List[str]) -> List[Any]:
        """Return what the endpoint gets; raise Forbidden if the request may not use the route."""
        values: List[Any] = [*arguments]
        if route.access == JOB_KEY:
            values = [self._find_job(arguments[0], route.columns)]
            may = self.auth.may_see(request, values[0])
        elif route.access == RUN_TOKEN:
            run = find_run(arguments[0])
            values = [run]
            may = isinstance(run, RemoteRun) and is_same(request.headers.get("authorization", ""), run.token)
        else:
            may = route.access == ANYBODY or (route.access == LISTERS and self.settings["PUBLIC_JOB_LIST"])
            may = may or self.auth.may_administer(request)
        if not may:
            raise Forbidden
        return values

    def _find_job(self, job_id: str, columns: str = LIGHT) -> Job:
        job = self.store.get_job(job_id, columns)
        if job is None:
            raise CspError(404, "job_id not found")
        return job

    def _refuse(self, request: Request, error: CspError, route: Optional[Route]) -> Response:
        if not request.wants_html:
            response = Response.error(error)
        elif isinstance(error, Forbidden) and route is not None and route.page == Service.job_page:
            response = key_page(self._stranger(request.path), request.path.rstrip("/"))
        else:
            viewer = self._stranger(request.target if request.is_safe else "/job")  # where signing in leads
            response = error_page(viewer, error)
        response.headers.append(("Vary", "Accept"))
        return response

    # -- the service itself, and logins

    def show_help(self, request: Request) -> Response:
        """Say where the documentation is."""
        return Response.json({"help": HELP})

    def show_status(self, request: Request) -> Response:
        """Show version, job types, name and how many jobs there are."""
        return Response(200, _render_status(self.settings["NAME"], tuple(self.registry.names()),
                                            tuple(self.store.count_jobs().items())))

    def log_in(self, request: Request) -> Response:
        """Begin a session, by Basic auth or by form fields."""
        form = request.form if request.method == "POST" else {}
        credentials = basic_credentials(request) or (form.get("username", ""), form.get("password", ""))
        if is_same_origin(request) is False:
            raise Forbidden("A login has to come from a page of this service.")
        if credentials == ("", "") or not self.auth.is_login(*credentials, request.remote):  # asking is no guess
            raise CspError(401, "Could not verify your login; user name or password is wrong.",
                           [("WWW-Authenticate", 'Basic realm="Login Required"')])
        return Response.redirect(self._next_path(request), [self.auth.begin_session(request)])

    def log_out(self, request: Request) -> Response:
        """End the session."""
        is_foreign = is_same_origin(request) is False  # a link of another site signs nobody out
        return Response.redirect(self._next_path(request), [] if is_foreign else self.auth.end_session(request))

    def _next_path(self, request: Request) -> str:
        return local_path(request.form.get("next") or dict(request.query).get("next"),
                          "/" if request.wants_html else "/user")

    def show_user(self, request: Request) -> Response:
        """Show who is logged in."""
        is_admin = self.auth.is_admin(request)
        return Response.json({"id": 0 if is_admin else None, "name": "Admin" if is_admin else "Anonymous",
                              "is_active": is_admin, "is_anonymous": not is_admin})

    # -- submitting

    def submit(self, request: Request, job_id: Optional[str] = None) -> Response:
        """Submit a job: a synchronous one is answered when it has ended, others when they are stored."""
        return self._submit(request, check_submission(read_body(request), self.registry), job_id)

    def put_job(self, request: Request, job_id: str) -> Response:
        """Submit a job under an id of your own, or return the one that the same body has submitted before."""
        submitted = check_submission(read_body(request), self.registry)
        known = self.store.get_job(job_id)
        if known is None:
            try:
                return self._submit(request, submitted, job_id)
            except Conflict:  # another request has just submitted it
                known = self.store.get_job(job_id)
                if known is None:
                    raise
        if known.submission_hash is None or not is_same(known.submission_hash,
                                                        hash_submission(submitted, known.job_key)):
            raise Conflict(f"job_id {job_id} already exists")
        return self._show(request, known, job_key=True)

    def resubmit_job(self, request: Request, job: Job) -> Response:
        """Submit a new job like this one; the body brings the api_key, because the old one is erased."""
        return self._submit(request, self._repeat(job, read_new_key(request)))

    def _repeat(self, job: Job, new_key: Mapping[str, Any]) -> Job:
        return check_submission({**job.read_input(), **new_key}, self.registry)._replace(resubmitted_from=job.job_id)

    def _submit(self, request: Request, submitted: Job, job_id: Optional[str] = None) -> Response:
        """Store a checked submission; run it at once if it is synchronous and no preference says otherwise."""
        if job_id is not None and not re.fullmatch(_JOB_ID, job_id):
            raise Conflict("job_id has to be 1 to 255 characters, without slashes and control characters")
        if not self.auth.may_submit(str(submitted.api_key)):
            raise Forbidden("This api_key may not submit jobs.")
        limit = self.settings["MAX_PENDING"]
        if limit is not None and self.store.count_jobs()[PENDING] >= limit:
            raise Unavailable(f"There may be {limit:,} unfinished jobs at most; try again later.", 30)
        is_now = bool(submitted.synchronous) and not self._read_preferences(request)[1]
        now, (new_id, job_key) = time.time(), make_ids()
        requested = timestamp(now)
        job = submitted._replace(
            seq=self.store.take_seq(), job_id=job_id or new_id, job_key=job_key, requested_timestamp=requested,
            started_timestamp=requested if is_now else None, run_at=None if is_now else now, attempts=int(is_now),
            synchronous=int(is_now), submission_hash=hash_submission(submitted, job_key) if job_id else None)
        if not is_now:
            self.store.add_job(job, job_id is None).wait()
            return self._show(request, job, job_key=True)
        run, ended = self.runner.run_now(job, job_id is None, job.read_input)
        if ended is not None and not isinstance(ended, Job):
            stream = _prefetched(ended)
            try:
                next(stream)
                return Response(200, stream)
            except StreamBroken:  # before anything was sent
                ended = self.store.get_job(job.job_id)
        if ended is not None and ended.result_url is not None:
            ended = self.store.wait_for_job(job.job_id, lambda job: bool(job.callback_attempts), FIRST_ATTEMPT_SECONDS)
        if ended is None:
            raise CspError(404, "job_id not found")
        lines = self.store.get_logs(ended) if run.has_logged else ()
        return Response(200, render_job(ended, lines, job_key=True))

    def _read_preferences(self, request: Request) -> Tuple[int, List[Tuple[str, str]]]:
        """Return how many seconds to wait for the job to finish, and the field that says which preferences count.

        A client that sends ``wait`` wants an answer in that time, so that a synchronous job is queued then, too.
        """
        given, wait = request.preferences if "prefer" in request.headers else {}, 0
        applied = ["respond-async"] if request.method != "GET" and given.get("respond-async") == "" else []
        if re.fullmatch("[0-9]{1,9}", given.get("wait", "")):
            wait = min(int(given["wait"]), self.settings["MAX_WAIT_SECONDS"])
            applied.append(f"wait={wait}")
        return wait, [("Preference-Applied", ", ".join(applied))] if applied else []

    def _wait(self, request: Request, job: Job) -> Tuple[Job, List[Tuple[str, str]]]:
        seconds, applied = self._read_preferences(request)
        if not seconds:
            return job, applied
        current = self.store.wait_for_job(job.job_id, lambda job: job.status != PENDING, seconds)
        if current is None or current.seq != job.seq:
            raise CspError(404, "job_id not found")
        return current, applied

    def _show(self, request: Request, job: Job, job_key: bool = False, limit: Optional[int] = None) -> Response:
        job, applied = self._wait(request, job)
        is_new = job.state == QUEUED and not job.attempts  # so that it has no log
        return Response(200, render_job(job, () if is_new else self.store.get_logs(job, limit), job_key),
                        headers=applied)

    # -- jobs

    def list_jobs(self, request: Request) -> Response:
        """List job ids, newest first, filtered by status, type and metadata."""
        jobs, following = self._choose_jobs(request, 100, MAX_LISTED)
        return Response.json({"list": [job_path(job_id) for _, job_id in jobs]},
                             headers=[("Link", f'<{following}>; rel="next"')] if following else [])

    def _choose_jobs(self, request: Request, default_limit: int, most: int) -> Tuple[List[Tuple[int, str]], str]:
        """Return (seq, id) of the jobs that the query asks for, and the address of the next page, if any."""
        limit = min(request.number("_limit", default_limit) or 0, most)
        offset, before = request.number("_offset", 0, MAX_OFFSET) or 0, request.number("_before", None)
        query = dict(request.query)
        if query.get("_id"):
            return self.store.find_jobs(query["_id"], limit), ""
        filters = dict.fromkeys(pair for pair in request.query if pair[0] not in LIST_PARAMETERS)
        key, equals, value = query.get("_metadata", "").partition("=")
        if equals:
            filters[key.strip(), value.strip()] = None
        if len(filters) > MAX_METADATA_FILTERS:
            raise Conflict(f"There may be {MAX_METADATA_FILTERS} metadata filters at most.")
        jobs = self.store.list_jobs(limit, offset, query.get("_status") or None, list(filters), before,
                                    query.get("_type") or None)
        if not jobs or len(jobs) < limit:
            return jobs, ""
        kept = [pair for pair in request.query if pair[0] not in ("_offset", "_before")]
        return jobs, "/job?" + urllib.parse.urlencode([*kept, ("_before", jobs[-1][0])])

    def show_job(self, request: Request, job: Job) -> Response:
        """Show a job and its log."""
        return self._show(request, job, limit=request.number("limit", None))

    def show_data(self, request: Request, job: Job) -> Response:
        """Show the raw result of a job."""
        job, applied = self._wait(request, job)
        if job.status == ERROR:
            return Response(409, f'{{"error": {job.error or "null"}}}'.encode("utf-8"), headers=applied)
        if job.status != COMPLETE:
            raise Conflict(f"job {job.job_id} has not finished yet", headers=applied)
        response = Response.data(job.data, job.metadata)
        response.headers += applied
        return response

    def delete_job(self, request: Request, job: Job) -> Response:
        """Delete a job with its log and metadata; if it runs, tell it to stop and drop its result."""
        if self.store.delete_job(job) is None:
            raise CspError(404, "job_id not found")
        self.runner.tell_to_stop(job)
        return Response.json({"success": True})

    def clear_jobs(self, request: Request) -> Response:
        """Delete the jobs that finished more than ``days`` days ago."""
        unknown = sorted({name for name, _ in request.query} - {"days", "_format"})
        if unknown:  # a misspelt parameter must not delete more than was meant
            raise Conflict(f"Clearing jobs takes days and no {', '.join(unknown)}")
        days = request.number("days", self.settings["KEEP_JOBS_AGE"], MAX_DAYS) or 0
        deleted = self.store.delete_finished_jobs(timestamp(time.time() - days * 86_400))
        return Response.json({"success": True, "deleted": deleted})

    def _clear_daily(self) -> None:
        while True:
            try:
                before = timestamp(time.time() - self.settings["KEEP_JOBS_AGE"] * 86_400)
                log.info("cleared %d old jobs", self.store.delete_finished_jobs(before))
            except Unavailable as error:
                log.warning("old jobs are not cleared: %s", error.message)
            if self._closing.wait(CLEAR_SECONDS):
                return

    def cancel_job(self, request: Request, job: Job) -> Response:
        """Cancel a job: a queued one never runs, a running one is told to stop."""
        self.runner.cancel(job)
        return self.show_job(request, self._find_job(job.job_id, WHOLE))

    def send_callback(self, request: Request, job: Job) -> Response:
        """Send a finished job's callback again; the body may bring the api_key, if the old one is erased."""
        body = read_new_key(request)
        api_key = check_api_key(body["api_key"]) if body else None
        if job.callback_host is None or job.status == PENDING:
            raise Conflict(f"job {job.job_id} has no callback to send: it has not finished or has no result_url")
        self.store.mark_callback_due(job, api_key)
        return self.show_job(request, self._find_job(job.job_id, WHOLE))

    def take_report(self, request: Request, run: RemoteRun) -> Response:
        """Take the log and progress of a job that runs in a worker; say whether it was told to stop."""
        return Response.json({"cancelled": not run.take_report(check_report(read_body(request)))})

    # -- events

    def stream_events(self, request: Request, job: Optional[Job] = None) -> Response:
        """Stream what happens to a job until it has ended, or the numbers of jobs, as Server-Sent Events."""
        last_id = request.headers.get("last-event-id") or dict(request.query).get("last_event_id") or "0"
        if not re.fullmatch("[0-9]{1,18}", last_id):
            raise Conflict("Last-Event-ID has to be an id that this stream has sent")
        return Response(200, self._events(request, job, int(last_id)), "text/event-stream", STREAM_HEADERS)

    def _events(self, request: Request, job: Optional[Job], log_id: int) -> Iterator[bytes]:
        """Yield the log after ``log_id`` and whatever has changed, until the job has ended; or the numbers of jobs."""
        sent: Dict[str, Any] = {}
        next_comment = time.monotonic() + KEEP_ALIVE_SECONDS
        topic = "" if job is None else job.job_id  # nothing wakes who watches the numbers but the end of the service
        with self.store.watch(topic) as changed:
            while True:
                changed.clear()
                is_over = False
                if job is None:
                    events: Dict[str, Any] = {"stats": self._count_states()}
                else:
                    now = next(iter(self.store.get_light_jobs([job.seq])), None)  # before the log, which ends with it
                    lines = self.store.list_logs(job.seq, MAX_EVENT_LINES, log_id)
                    while lines:
                        yield b"".join(render_event("log", line._asdict(), number) for number, line in lines)
                        log_id = lines[-1][0]
                        lines = self.store.list_logs(job.seq, MAX_EVENT_LINES, log_id)
                    events, is_over = _job_events(now), now is None or now.status != PENDING
                for name, value in events.items():
                    if value != sent.get(name):
                        sent[name] = value
                        yield render_event(name, value)
                if is_over or self.store.is_released:
                    return
                wait = max(0.0, next_comment - time.monotonic())
                if changed.wait(wait if job is not None else min(wait, STATS_SECONDS)):
                    watchers = self.store.count_watchers(topic)
                    self._closing.wait(EVENT_SECONDS + watchers * EVENT_SECONDS_PER_WATCHER)
                if time.monotonic() >= next_comment:
                    with suppress(TooManyRequests):  # somebody else at this address guesses passwords
                        if job is not None and not self.auth.may_see(request, job):
                            return
                    yield b": keep-alive\n\n"
                    next_comment = time.monotonic() + KEEP_ALIVE_SECONDS

    def _count_states(self) -> Dict[str, int]:
        totals, running = self.store.count_jobs(), self.runner.running
        return {QUEUED: max(0, totals[PENDING] - running), RUNNING: running, COMPLETE: totals[COMPLETE],
                ERROR: totals[ERROR]}

    # -- for machines

    def show_openapi(self, request: Request) -> Response:
        """Show a description of all routes as OpenAPI 3.1."""
        return Response.json(describe_api(ROUTES, self.registry.names(), self.settings["NAME"]))

    def show_metrics(self, request: Request) -> Response:
        """Show what there is to measure, in the text format of Prometheus."""
        due_since, states = self.store.get_longest_due(), self._count_states()
        by_type = [((("job_type", job_type), ("status", status)), jobs)
                   for (job_type, status), jobs in sorted(self.store.count_by_type().items())]
        build = (("version", __version__), ("python", sys.version.split()[0]), ("sqlite", SQLITE_VERSION))
        gauges: Sequence[Tuple[str, str, Sequence[Tuple[Labels, float]]]] = (
            ("csp_build_info", "What runs here.", [(build, 1)]),
            ("process_start_time_seconds", "When the service started (seconds since 1970).",
             [((), self.metrics.started)]),
            ("csp_jobs", "Jobs in the database by type and status.", by_type),
            ("csp_jobs_running", "Jobs that run.", [((), states[RUNNING])]),
            ("csp_jobs_waiting", "Jobs that wait to be run.", [((), states[QUEUED])]),
            ("csp_jobs_longest_waiting_seconds", "How long the job that runs next has been due.",
             [((), max(0.0, time.time() - due_since) if due_since else 0.0)]))
        lines = [line for name, help, rows in gauges for line in metric_lines(name, "gauge", help, rows)]
        return Response(200, self.metrics.render(lines).encode("utf-8"), "text/plain; version=0.0.4; charset=utf-8")

    # -- pages

    def _viewer(self, request: Request) -> Viewer:
        return Viewer(self.settings["NAME"], self.auth.may_administer(request), request.target,
                      dict(request.query).get("done", ""))

    def _stranger(self, path: str) -> Viewer:
        return Viewer(self.settings["NAME"], False, path)

    def overview_page(self, request: Request) -> Response:
        viewer, now = self._viewer(request), time.time()
        failures = [seq for seq, _ in self.store.list_jobs(5, status=ERROR)] if viewer.is_admin else []
        types = [job_type for job_type in map(self.registry.get, self.registry.names()) if job_type is not None]
        url = f"{request.scheme}://{request.headers.get('host') or 'localhost'}/job"
        return overview_page(
            viewer, self._count_states(), self.store.count_by_hour(int(now // 3600) - CHART_HOURS), now,
            self.store.get_light_jobs(failures), types, self.store.count_by_type(), url, ROUTES)

    def login_page(self, request: Request) -> Response:
        viewer, path = self._stranger("/login"), self._next_path(request)
        if request.method != "POST" and basic_credentials(request) is None:
            return login_page(viewer, path)
        try:
            return self.log_in(request)
        except CspError as error:
            return login_page(viewer, path, request.form.get("username", ""), error)

    def jobs_page(self, request: Request) -> Response:
        jobs, following = self._choose_jobs(request, PAGE_ROWS, PAGE_ROWS)
        shown = self.store.get_light_jobs(seq for seq, _ in jobs)
        return jobs_page(
            self._viewer(request), shown, dict(request.query), following, self.registry.names(),
            self.settings["KEEP_JOBS_AGE"], time.time())

    def job_page(self, request: Request, job: Job) -> Response:
        level = dict(request.query).get("level", "")
        newest = self.store.list_logs(job.seq, 1)
        lines = self.store.list_logs(job.seq, PAGE_LINES, levels=LEVELS.get(level, ()))
        return job_page(self._viewer(request), job, [line for _, line in lines], newest[0][0] if newest else 0, level,
                        time.time())

    def take_key(self, request: Request, job_id: str) -> Response:
        """Take the key of a job from its form, and keep it in a cookie for this job alone."""
        job, path = self._find_job(job_id), job_path(job_id)
        if not job.job_key or not is_same(request.form.get("job_key", "").strip(), job.job_key):
            return key_page(self._stranger(path), path, "That is not the key of this job.")
        return Response.redirect(path, [set_cookie(request, KEY_COOKIE, job.job_key, path)])

    def submit_form(self, request: Request) -> Response:
        viewer, names, form = self._viewer(request), self.registry.names(), request.form
        if request.method != "POST":
            return submit_page(viewer, names, {
                "job_type": dict(request.query).get("type", ""),
                "api_key": "" if self.settings["API_KEYS"] else "console"})
        try:
            return form_of(Service.submit, "submit")(self, request)
        except CspError as error:  # with the form as it was typed
            return submit_page(viewer, names, form, error)

    def act_on_selection(self, request: Request) -> Response:
        form, action = request.form, request.form.get("action", "")
        if action not in ("cancel", "delete", "resubmit"):
            raise Conflict("action has to be cancel, delete or resubmit")
        job_ids = dict.fromkeys(value for name, value in request.fields if name == "job_id")
        jobs = list(filter(None, map(self.store.get_job, job_ids)))
        if action == "resubmit":
            new_key = {"api_key": form["api_key"]} if form.get("api_key") else {}
            for submitted in [self._repeat(job, new_key) for job in jobs]:  # all are checked before one is stored
                self._submit(Request("POST", "/job", {"prefer": "respond-async"}), submitted)
        for job in jobs:
            if action == "delete":
                self.store.delete_job(job)
                self.runner.tell_to_stop(job)
            elif action == "cancel":
                with suppress(Conflict):  # it has finished
                    self.runner.cancel(job)
        return _go_to(local_path(form.get("back"), "/job"), action if jobs else "none")


def form_of(endpoint: Callable[..., Response], done: str) -> Callable[..., Response]:
    """Return what answers a form: it passes the fields to the endpoint as the API takes them, and redirects."""
    def answer(service: Service, request: Request, *values: Any) -> Response:
        form = request.form
        query = urllib.parse.urlencode({"days": form.pop("days")}) if "days" in form else ""
        body: Dict[str, Any] = {name: value for name, value in form.items() if value.strip()}
        for name in ("data", "metadata"):
            if name in body:
                try:
                    body[name] = from_json(form[name].encode("utf-8", "replace"))
                except ValueError as error:
                    raise Conflict(f"{name} is not JSON: {error}") from None
        headers = {**request.headers, "content-type": "application/json", "prefer": "respond-async"}
        response = endpoint(service, Request(request.method, f"{request.path}?{query}", headers,
                                             json.dumps(body).encode("ascii"), request.remote, request.scheme), *values)
        is_admin = service.auth.may_administer(request)
        if done in ("delete", "clear"):
            return _go_to("/job" if is_admin else "/", done)
        if done in ("cancel", "callback"):
            return _go_to(job_path(values[0].job_id), done)
        shown = json.loads(response.body if isinstance(response.body, bytes) else b"".join(response.body))
        path, needs_key = job_path(shown["job_id"]), not is_admin
        return _go_to(path, done, [set_cookie(request, KEY_COOKIE, shown["job_key"], path)] if needs_key else [])
    return answer


def _go_to(path: str, done: str, headers: Iterable[Tuple[str, str]] = ()) -> Response:
    """Return the redirect that ends a form, to a page that says what was done."""
    path, _, query = path.partition("?")
    kept = [pair for pair in urllib.parse.parse_qsl(query) if pair[0] != "done"]
    return Response.redirect(f"{path}?{urllib.parse.urlencode([*kept, ('done', done)])}", headers)


def _job_events(job: Optional[Job]) -> Dict[str, Any]:
    """Return the events that show a job as it is now, by name; None is a deleted one."""
    if job is None:
        return {"status": {"status": "deleted", "state": "deleted"}}
    return {**({"progress": json.loads(job.progress)} if job.progress else {}), "status": {
        "status": job.status, "state": job.state, "attempts": job.attempts,
        "started_timestamp": job.started_timestamp, "finished_timestamp": job.finished_timestamp,
        "error": json.loads(job.error) if job.error else None}}


def _prefetched(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield nothing when the first part is there, then all parts: until then the stream may break unseen."""
    first = next(parts, b"")
    yield b""
    yield first
    yield from parts


def _asset(text: str, kind: str) -> Callable[..., Response]:
    headers = [("Cache-Control", "public, max-age=31536000, immutable")]  # its address changes with it
    return lambda service, request: Response(200, text.encode("utf-8"), f"{kind}; charset=utf-8", headers)


ROUTES = (
    Route("GET", "/", Service.show_help, "Help", page=Service.overview_page),
    Route("GET", "/status", Service.show_status, "Status"),
    Route("GET", "/events", Service.stream_events, "text/event-stream"),
    Route("GET", "/metrics", Service.show_metrics, "text/plain"),
    Route("GET", "/openapi.json", Service.show_openapi, "application/json"),
    Route("GET", "/login", Service.log_in, "redirect", parameters=("next",), refusals=(401, 403),
          page=Service.login_page),
    Route("POST", "/login", Service.log_in, "redirect", body="Login", parameters=("next",), refusals=(401, 403),
          page=Service.login_page),
    Route("GET", "/logout", Service.log_out, "redirect", parameters=("next",)),
    Route("POST", "/logout", Service.log_out, "redirect", parameters=("next",)),
    Route("GET", "/user", Service.show_user, "User"),
    Route("GET", "/job", Service.list_jobs, "JobList", LISTERS, parameters=(*LIST_PARAMETERS[:6], "metadata"),
          page=Service.jobs_page),
    Route("POST", "/job", Service.submit, "SubmittedJob", body="Submission", parameters=("Prefer",), refusals=(403,)),
    Route("DELETE", "/job", Service.clear_jobs, "Cleared", ADMIN, parameters=("days",)),
    Route("GET", "/job/<job_id>", Service.show_job, "Job", JOB_KEY, parameters=("limit", "Prefer"),
          page=Service.job_page, columns=WHOLE),
    Route("POST", "/job/<job_id>", Service.submit, "SubmittedJob", body="Submission", parameters=("Prefer",),
          refusals=(403,)),
    Route("PUT", "/job/<job_id>", Service.put_job, "SubmittedJob", body="Submission", parameters=("Prefer",),
          refusals=(403,)),
    Route("DELETE", "/job/<job_id>", Service.delete_job, "Success", JOB_KEY),
    Route("GET", "/job/<job_id>/data", Service.show_data, RAW_RESULT, JOB_KEY, parameters=("Prefer",), columns=RESULT),
    Route("GET", "/job/<job_id>/events", Service.stream_events, "text/event-stream", JOB_KEY,
          parameters=("Last-Event-ID", "last_event_id")),
    Route("POST", "/job/<job_id>/cancel", Service.cancel_job, "Job", JOB_KEY,
          page=form_of(Service.cancel_job, "cancel")),
    Route("POST", "/job/<job_id>/resubmit", Service.resubmit_job, "SubmittedJob", JOB_KEY, "NewKey", ("Prefer",),
          page=form_of(Service.resubmit_job, "resubmit"), columns=WHOLE),
    Route("POST", "/job/<job_id>/callback", Service.send_callback, "Job", JOB_KEY, "NewKey",
          page=form_of(Service.send_callback, "callback")),
    Route("POST", "/job/<job_id>/report", Service.take_report, "Instruction", RUN_TOKEN, "Report"),
)
CONSOLE_ROUTES = (  # used by the pages alone
    Route("GET", STYLE_PATH, _asset(STYLE, "text/css")),
    Route("GET", SCRIPT_PATH, _asset(SCRIPT, "text/javascript")),
    Route("GET", "/console/submit", Service.submit_form, access=ADMIN),
    Route("POST", "/console/submit", Service.submit_form, access=ADMIN),
    Route("POST", "/console/selection", Service.act_on_selection, access=ADMIN),
    Route("POST", "/console/clear", form_of(Service.clear_jobs, "clear"), access=ADMIN),
    Route("POST", "/job/<job_id>/delete", form_of(Service.delete_job, "delete"), access=JOB_KEY),
    Route("POST", "/job/<job_id>/key", Service.take_key),
)


# ---------------------------------------------------------------------------------------------------------------------
# Transports
#
# Bytes in, bytes out. The handlers of the standard library are lenient and slow: they have no limits and take an unread
# body for the next request. This one parses strictly (RFC 9112) and closes the connection on anything ambiguous, so
# that a body can never pass for a request. One send per response.
# ---------------------------------------------------------------------------------------------------------------------

MAX_CHUNK_LINE_BYTES = 4096  # a chunk's size and extensions
LINGER_SECONDS = 1.0  # after a refusal: keep reading for this long, or the client's system may drop the response,
LINGER_BYTES = 2**20  # but no more than what may already be on its way
BACKLOG = 1024  # connections that a burst may open before the first is accepted
ACCESS_LOG_SECONDS = 0.2  # between writes of the access log
SPARE_THREAD_SECONDS = 5.0  # how long a connection thread waits for another connection
RECEIVE_BYTES = 65_536
KEPT_HEAD_BYTES = 4096  # clients repeat their heads: up to this size a repeated head is not parsed again

_REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HOST = re.compile(r"(?:[!$&'()*+,;=\-._~%0-9A-Za-z]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_CHUNK_SIZE = rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?"
_SINGLE_FIELDS = frozenset(("host", "content-length", "transfer-encoding", "content-type", "authorization", "expect"))
_SECURITY_TEXT = "".join([f"{name}: {value}\r\n" for name, value in SECURITY_HEADERS])

_TOO_MANY_CONNECTIONS = (b"HTTP/1.1 503 Service Unavailable\r\nServer: csp\r\nContent-Type: application/json\r\n"
                         b"Retry-After: 5\r\nConnection: close\r\n\r\n"
                         b'{"error": "There are too many connections; try again later."}')


class Head(NamedTuple):
    method: str
    target: str
    headers: Dict[str, str]
    is_http_1_0: bool

    @property
    def keeps_alive(self) -> bool:
        """Whether the client keeps the connection open (RFC 9112, section 9.3)."""
        if "connection" not in self.headers:
            return not self.is_http_1_0
        options = {option.strip().lower() for option in self.headers["connection"].split(",")}
        return "keep-alive" in options if self.is_http_1_0 else "close" not in options


NO_HEAD = Head("", "", {}, False)  # of a request whose head could not be read


def parse_head(head: bytes, settings: Mapping[str, Any]) -> Head:
    """Parse request line and header fields; raise CspError for what RFC 9112 and RFC 9110 do not allow."""
    lines = head.decode("latin-1").split("\r\n")
    if len(lines[0]) > settings["MAX_URL_BYTES"]:
        raise CspError(414, f"The request line is longer than {settings['MAX_URL_BYTES']} bytes.")
    line = _REQUEST_LINE.fullmatch(lines[0])
    if line is None:
        raise CspError(400, "The request line is not valid HTTP/1.1.")
    if line[3] != "1":
        raise CspError(505, "Only HTTP/1.0 and HTTP/1.1 are supported.")
    if len(lines) - 1 > settings["MAX_HEADER_FIELDS"]:
        raise CspError(431, f"There are more than {settings['MAX_HEADER_FIELDS']} header fields.")
    headers = _parse_fields(lines[1:])
    is_http_1_0 = line[4] == "0"
    if not _HOST.fullmatch(headers.get("host", "" if is_http_1_0 else "\n")):
        raise CspError(400, "There must be exactly one valid Host field.")
    target = "/" if line[2] == "*" and line[1] == "OPTIONS" else line[2]
    if not target.startswith("/"):  # RFC 9112, section 3.2
        origin = re.match("(?i)https?://[^/?#]*", target)
        if origin is None:
            raise CspError(400, "The request target is neither a path nor an http URL.")
        target = target[origin.end():]
        target = target if target.startswith("/") else "/" + target
    if "#" in target:
        raise CspError(400, "A request target cannot have a fragment.")
    return Head(line[1], target, headers, is_http_1_0)


def _parse_fields(lines: Iterable[str]) -> Dict[str, str]:
    headers: Dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise CspError(400, "A header field is malformed.")
        name, value = field[1].lower(), field[2].strip(" \t")
        if name in headers:
            if name in _SINGLE_FIELDS:
                raise CspError(400, f"The header field {name} is repeated.")
            value = f"{headers[name]}{';' if name == 'cookie' else ','} {value}"
        headers[name] = value
    return headers


def body_length(head: Head, max_bytes: int) -> Optional[int]:
    """Return the length of the body in bytes, None if it is chunked; raise CspError if it is invalid or too large."""
    length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or head.is_http_1_0 or coding.lower() != "chunked":
            raise CspError(400, "The only transfer coding is chunked, in HTTP/1.1, without a Content-Length.")
        return None
    if length is None:
        return 0
    if not re.fullmatch("[0-9]+", length):
        raise CspError(400, "The Content-Length is not a number.")
    if len(length) > 18 or int(length) > max_bytes:
        raise CspError(413, f"The body is larger than {max_bytes:,} bytes.")
    return int(length)


class _Disconnected(Exception):
    """The client is gone or too slow; there is nobody to answer."""


def all_headers(response: Response) -> List[Tuple[str, str]]:
    names = {name for name, _ in response.headers}
    return response.headers + [header for header in SECURITY_HEADERS if header[0] not in names]


class RequestHandler:
    """One connection: reads requests and sends responses until either side closes it."""

    def __init__(self, server: Server, connection: socket.socket, address: str) -> None:
        self.server, self.connection, self.address = server, connection, address
        self.is_idle, self.idle_since = True, time.monotonic()
        self._settings = server.service.settings
        self._buffer = bytearray()
        self._kept_head = b"", NO_HEAD

    def serve(self) -> None:
        try:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option, seconds in ((socket.SO_RCVTIMEO, 1.0), (socket.SO_SNDTIMEO, self._settings["SEND_SECONDS"])):
                # cheaper than settimeout, which polls before each call
                windows, others = int(seconds * 1000), struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
                self.connection.setsockopt(socket.SOL_SOCKET, option, windows if sys.platform == "win32" else others)
            while self._serve_request():
                pass
        except (_Disconnected, OSError):
            pass
        except Exception:  # noqa: BLE001 - the thread has to serve the next connection
            log.exception("a connection from %s failed", self.address)

    def close_if_idle(self) -> bool:
        """Close the connection unless a request is under way (called by the server); return whether it did."""
        if self.is_idle:
            self.is_idle = False
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def _serve_request(self) -> bool:
        """Return whether another request may follow."""
        head, started = NO_HEAD, 0.0
        try:
            raw = self._read_head()
            started = time.monotonic()
            if raw != self._kept_head[0]:
                self._kept_head = raw, parse_head(raw, self._settings)
            head = self._kept_head[1]
            if len(raw) > KEPT_HEAD_BYTES:
                self._kept_head = b"", NO_HEAD
            body = self._read_body(head)
        except CspError as error:
            self._send(head, Response.error(error), keeps_alive=False)
            self.server.access.add(self.address, head, error.status, 0, started)
            self._linger()
            return False
        address, scheme = self.server.trust.identify(self.address, head.headers)
        request = Request(head.method, head.target, head.headers, body, address, scheme)
        del body  # only the request refers to it now, and frees it when it has been parsed
        response = self.server.service.handle(request)
        sent, keeps_alive = self._send(head, response, head.keeps_alive and not self.server.is_stopping)
        self.server.access.add(address, head, response.status, sent, started)
        return keeps_alive

    # -- receiving

    def _receive(self, started: float, limit: str, received: int = 0) -> None:
        """Receive some bytes within the setting ``limit``; received bytes earn time, announced ones do not."""
        deadline: float = started + self._settings[limit]
        if received:
            deadline += received / self._settings["BODY_BYTES_PER_SECOND"]
        data = None
        while not data:
            try:
                data = self.connection.recv(RECEIVE_BYTES)
            except (BlockingIOError, socket.timeout):
                data = None
            if data == b"":
                raise _Disconnected
            if time.monotonic() > deadline or (self.server.is_stopping and self.is_idle and not data):
                raise _Disconnected if self.is_idle else CspError(408, "The request took too long to arrive.")
        self._buffer += data

    def _read_head(self) -> bytes:
        settings, buffer = self._settings, self._buffer
        self.is_idle, self.idle_since = not buffer, time.monotonic()
        started, limit = self.idle_since, "IDLE_SECONDS" if self.is_idle else "HEADER_SECONDS"
        while True:
            while buffer.startswith(b"\r\n"):  # RFC 9112, section 2.2: ignore empty lines before a request
                del buffer[:2]
            end = buffer.find(b"\r\n\r\n")
            if 0 <= end <= settings["MAX_HEADER_BYTES"]:
                head = bytes(buffer[:end])
                del buffer[:end + 4]
                return head
            # refuse a bad head now; its sender need not wait for the timeout
            if len(buffer) > settings["MAX_URL_BYTES"] and b"\n" not in buffer:
                raise CspError(414, f"The request line is longer than {settings['MAX_URL_BYTES']} bytes.")
            if _BARE_LF.search(buffer):
                raise CspError(400, "Lines must end with CR and LF.")
            if len(buffer) > settings["MAX_HEADER_BYTES"]:
                raise CspError(431, f"The header is larger than {settings['MAX_HEADER_BYTES']} bytes.")
            self._receive(started, limit)
            if self.is_idle:
                self.is_idle, started, limit = False, time.monotonic(), "HEADER_SECONDS"

    def _read_body(self, head: Head) -> bytes:
        length = body_length(head, self._settings["MAX_BODY_BYTES"])
        expectation = head.headers.get("expect", "").lower()
        if expectation and expectation != "100-continue":
            raise CspError(417, "The only supported expectation is 100-continue.")
        if expectation and not head.is_http_1_0 and length != 0 and not self._buffer:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length == 0:
            return b""
        started = time.monotonic()
        return self._read_chunks(started) if length is None else self._read_exactly(length, started)

    def _read_exactly(self, length: int, started: float, received: int = 0) -> bytes:
        while len(self._buffer) < length:
            self._receive(started, "BODY_SECONDS", received + len(self._buffer))
        with memoryview(self._buffer) as view:
            data = bytes(view[:length])
        del self._buffer[:length]
        return data

    def _read_chunks(self, started: float) -> bytes:
        """Decode a chunked body (RFC 9112, section 7.1); trailers are checked and dropped."""
        body, max_bytes = bytearray(), self._settings["MAX_BODY_BYTES"]
        while True:
            size = re.fullmatch(_CHUNK_SIZE, self._read_line(started, len(body)))
            if size is None:
                raise CspError(400, "The size of a chunk is malformed.")
            length = int(size[1], 16)
            if len(body) + length > max_bytes:
                raise CspError(413, f"The body is larger than {max_bytes:,} bytes.")
            if length == 0:
                break
            body += self._read_exactly(length + 2, started, len(body))
            if not body.endswith(b"\r\n"):
                raise CspError(400, "A chunk is longer than its size.")
            del body[-2:]
        for _ in range(self._settings["MAX_HEADER_FIELDS"]):
            line = self._read_line(started, len(body))
            if not line:
                return bytes(body)
            _parse_fields([line.decode("latin-1")])
        raise CspError(400, "There are too many trailers.")

    def _read_line(self, started: float, received: int) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", 0, MAX_CHUNK_LINE_BYTES)
            if end >= 0:
                return self._read_exactly(end + 2, started)[:-2]
            if len(self._buffer) >= MAX_CHUNK_LINE_BYTES:
                raise CspError(400, "A line of a chunked body is too long.")
            self._receive(started, "BODY_SECONDS", received)

    # -- sending

    def _send(self, head: Head, response: Response, keeps_alive: bool) -> Tuple[int, bool]:
        """Send a response; return the number of bytes of its body and whether another request may follow."""
        body = response.body
        if not isinstance(body, (bytes, Pieces)):
            return self._send_stream(head, response, body, keeps_alive)
        size, has_body = len(body), response.status not in (204, 304)
        first = self._build_head(head, response, f"Content-Length: {size}\r\n" if has_body else "", keeps_alive)
        if not has_body or head.method == "HEAD":
            body, size = b"", 0
        if isinstance(body, bytes) and size < RECEIVE_BYTES:
            self.connection.sendall(first + body)
            return size, keeps_alive
        # a deadline for the whole, because SO_SNDTIMEO starts anew whenever the client reads a little
        deadline = time.monotonic() + self._settings["SEND_SECONDS"] + size / self._settings["BODY_BYTES_PER_SECOND"]
        for part in itertools.chain([first], [body] if isinstance(body, bytes) else body):
            rest = memoryview(part)
            while rest:
                rest = rest[self.connection.send(rest):]
                if time.monotonic() > deadline:
                    raise _Disconnected
        return size, keeps_alive

    def _send_stream(self, head: Head, response: Response, body: Iterator[bytes],
                     keeps_alive: bool) -> Tuple[int, bool]:
        """Send a body as it comes: chunked, or until the end of the connection for HTTP/1.0."""
        is_chunked, sent = not head.is_http_1_0, 0
        try:
            framing = "Transfer-Encoding: chunked\r\n" if is_chunked else ""
            self.connection.sendall(self._build_head(head, response, framing, keeps_alive and is_chunked))
            if head.method != "HEAD":
                for part in filter(None, body):
                    sent += len(part)
                    self.connection.sendall(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
                self.connection.sendall(b"0\r\n\r\n" if is_chunked else b"")
        except (StreamBroken, Unavailable):
            return sent, False
        finally:
            getattr(body, "close", lambda: None)()
        return sent, keeps_alive and is_chunked

    def _build_head(self, head: Head, response: Response, framing: str, keeps_alive: bool) -> bytes:
        fields = _SECURITY_TEXT
        if response.headers:
            fields = "".join([f"{name}: {value}\r\n" for name, value in all_headers(response)])
        connection = f"Connection: {'keep-alive' if keeps_alive else 'close'}\r\n"
        text = (f"HTTP/1.1 {response.status} {_REASONS.get(response.status, '')}\r\nServer: csp\r\n"
                f"Date: {_http_date(int(time.time()))}\r\nContent-Type: {response.content_type}\r\n"
                f"{framing}{connection if keeps_alive == head.is_http_1_0 else ''}{fields}\r\n")
        return text.encode("latin-1")

    def _linger(self) -> None:
        """Let the client read a refusal before the connection closes: closing with unread bytes resets it."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
        with suppress(BlockingIOError, socket.timeout):
            while time.monotonic() < deadline and left > 0:
                left -= len(self.connection.recv(RECEIVE_BYTES)) or left


@functools.lru_cache(maxsize=4)
def _http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


class AccessLog:
    """Logs requests in Common Log Format, a few times a second: one write per request would cost too much.

    Queries are left out because they may hold secrets.
    """

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Optional[Tuple[Any, ...]]] = queue.SimpleQueue()  # None at the end
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="csp-access", daemon=True)
        self._thread.start()

    def add(self, address: str, head: Head, status: int, sent_bytes: int, started: float) -> None:
        """Add a request that was read at ``started`` (monotonic); any thread may call this."""
        if access_log.isEnabledFor(logging.INFO):
            seconds = time.monotonic() - started if started else 0.0
            self._requests.put((address, head, status, sent_bytes, seconds))

    def _run(self) -> None:
        while not self._is_closed.is_set():
            requests = [self._requests.get()]
            date = time.strftime("%d/%b/%Y:%H:%M:%S %z")
            self._is_closed.wait(ACCESS_LOG_SECONDS)
            requests += [self._requests.get() for _ in range(self._requests.qsize())]
            lines = []
            for address, head, status, sent_bytes, seconds in filter(None, requests):
                path = head.target.partition("?")[0].replace('"', "%22")
                words = "-" if head is NO_HEAD else f"{head.method} {path} HTTP/1.{0 if head.is_http_1_0 else 1}"
                line = f'{address} - - [{date}] "{words}" {status} {sent_bytes} {seconds * 1000:.1f}ms'
                lines.append(line.encode("unicode_escape").decode("ascii"))
            if lines:
                access_log.info("%s", "\n".join(lines))

    def close(self) -> None:
        self._is_closed.set()
        self._requests.put(None)
        self._thread.join(1.0)  # longer only if nobody reads stderr


class Server(ThreadingHTTPServer):
    """The HTTP server of a service: a limited number of connections, with a thread each; threads are reused.

    Binds in the constructor (port 0 picks a free one; see ``url``); raises StartError if it cannot. ``serve_forever``
    and ``stop`` are called from different threads.
    """

    request_queue_size = BACKLOG
    allow_reuse_port = False

    def __init__(self, service: Service, host: Optional[str] = None, port: Optional[int] = None) -> None:
        self.service = service
        self.trust = ProxyTrust(service.settings["TRUSTED_PROXIES"])
        self.is_stopping = False
        self.lock = threading.Condition()  # guards the next two
        self.handlers: Set[RequestHandler] = set()  # one for each connection
        self._spare_threads = 0
        self._accepted: queue.SimpleQueue[RequestHandler] = queue.SimpleQueue()  # for spare threads
        host = service.settings["HOST"] if host is None else host
        port = service.settings["PORT"] if port is None else int(port)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), socketserver.BaseRequestHandler)  # its handlers are not used
        except (OSError, OverflowError) as error:
            raise StartError(f"The address {host} port {port} cannot be used: {getattr(error, 'strerror', error)}; "
                             "choose another with --host or --port.") from None
        self.access = AccessLog()
        _closed_in_children.add(self)
        service.reachable_at(self.url)

    def server_bind(self) -> None:
        """Bind without the name lookup of the standard server, which is slow without DNS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """The URL of the service as seen from this machine, with a slash at the end."""
        host = str(self.server_name)
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        handler, settings = RequestHandler(self, request, client_address[0]), self.service.settings
        with self.lock:
            of_address = sum(other.address == handler.address for other in self.handlers)
            is_full = (of_address >= settings["MAX_CONNECTIONS_PER_ADDRESS"]
                       and not self.trust.is_trusted(handler.address))
            if not is_full and len(self.handlers) >= settings["MAX_CONNECTIONS"]:  # one that is idle makes room
                idle = [other for other in self.handlers if other.is_idle]
                is_full = not idle or not min(idle, key=lambda other: other.idle_since).close_if_idle()
            if not is_full:
                self.handlers.add(handler)
                if self._spare_threads > 0:
                    self._spare_threads -= 1
                    self._accepted.put(handler)
                    return
        try:
            if not is_full:
                threading.Thread(target=self._serve, args=(handler,), name="csp-connection", daemon=True).start()
                return
        except RuntimeError:  # no more threads
            with self.lock:
                self.handlers.discard(handler)
        with suppress(OSError):
            request.settimeout(0.1)
            request.sendall(_TOO_MANY_CONNECTIONS)
        self.shutdown_request(request)

    def _serve(self, handler: RequestHandler) -> None:
        """Serve this connection and further ones, until none comes for a while."""
        while True:
            handler.serve()
            with suppress(OSError):
                self.shutdown_request(handler.connection)
            with self.lock:
                self.handlers.discard(handler)
                self._spare_threads += 1
                self.lock.notify_all()
            try:
                handler = self._accepted.get(timeout=SPARE_THREAD_SECONDS)
            except queue.Empty:
                with self.lock:
                    if self._spare_threads > 0:
                        self._spare_threads -= 1
                        return
                handler = self._accepted.get()  # process_request has just counted on this thread

    def close_in_child(self) -> None:
        self.socket.close()

    def stop(self, timeout_seconds: float) -> None:
        """Stop accepting, let running requests end, and close the other connections."""
        self.is_stopping = True
        self.service.release()
        self.shutdown()
        self.server_close()
        with self.lock:
            for handler in self.handlers:
                handler.close_if_idle()
            self.lock.wait_for(lambda: not self.handlers, timeout_seconds)
        self.access.close()


class Wsgi:
    """A service as a WSGI application (PEP 3333), for servers with one process and many threads."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._trust = ProxyTrust(service.settings["TRUSTED_PROXIES"])

    def __call__(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            response = self._service.handle(self._read_request(environ))
        except CspError as error:
            response = Response.error(error)
        headers, body = [("Content-Type", response.content_type), *all_headers(response)], response.body
        if isinstance(body, (bytes, Pieces)):
            headers.append(("Content-Length", str(len(body))))
        start_response(f"{response.status} {_REASONS.get(response.status, '')}", headers)
        if environ["REQUEST_METHOD"] == "HEAD":
            return []
        return [body] if isinstance(body, bytes) else body

    def _read_request(self, environ: Dict[str, Any]) -> Request:
        headers = {name[5:].replace("_", "-").lower(): str(value) for name, value in environ.items()
                   if name.startswith("HTTP_")}
        headers["content-type"] = environ.get("CONTENT_TYPE") or ""
        path = urllib.parse.quote(environ.get("PATH_INFO", "").encode("latin-1")) or "/"
        target = f"{path}?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else path
        address, scheme = self._trust.identify(environ.get("REMOTE_ADDR") or "", headers, environ["wsgi.url_scheme"])
        length, max_bytes, body = environ.get("CONTENT_LENGTH") or "", self._service.settings["MAX_BODY_BYTES"], b""
        if not re.fullmatch("[0-9]{0,18}", length):
            raise CspError(400, "The Content-Length is not a number.")
        announced = int(length or 0)
        if announced <= max_bytes and (length or environ.get("wsgi.input_terminated")):
            body = environ["wsgi.input"].read(announced if length else max_bytes + 1)
        if max(len(body), announced) > max_bytes:
            raise CspError(413, f"The body is larger than {max_bytes:,} bytes.")
        if len(body) < announced:
            raise CspError(400, "The body is shorter than its Content-Length.")
        return Request(environ["REQUEST_METHOD"], target, headers, body, address, scheme)


# ---------------------------------------------------------------------------------------------------------------------
# Process
#
# A service as a process of its own: where its log goes, what it prints at the start, and how it stops: SIGTERM or
# Ctrl-C, then GRACE_SECONDS for running requests and jobs, then the process ends whatever jobs have left behind.
# ---------------------------------------------------------------------------------------------------------------------

class _LogFormatter(logging.Formatter):
    """One line per record, whatever was logged; access lines stand as they are."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == access_log.name:
            return record.getMessage()
        message = record.getMessage().encode("unicode_escape").decode("ascii")
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(settings: Settings) -> None:
    """Send this program's log to where the settings say; raise StartError if the file cannot be written."""
    handlers: List[logging.Handler] = [logging.StreamHandler()] if settings["STDERR"] else []
    if settings["LOG_FILE"]:
        from logging.handlers import RotatingFileHandler

        class LogFile(RotatingFileHandler):  # only its owner may read it
            def _open(self) -> Any:
                return open(self.baseFilename, "a", encoding="utf-8",
                            opener=lambda path, flags: os.open(path, flags, 0o600))

        try:
            handlers.append(LogFile(settings["LOG_FILE"], maxBytes=64 * 2**20, backupCount=5))
        except OSError as error:
            raise StartError(f"The log file {settings['LOG_FILE']} cannot be written: {error.strerror}.") from None
    if settings["ADMINS"]:
        from logging.handlers import SMTPHandler
        mail = SMTPHandler("127.0.0.1", settings["FROM_EMAIL"], list(settings["ADMINS"]), f"{settings['NAME']}: error")
        mail.setLevel(logging.ERROR)
        handlers.append(mail)
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    for handler in handlers or [logging.NullHandler()]:
        handler.setFormatter(_LogFormatter())
        log.addHandler(handler)
    log.setLevel(logging.DEBUG if settings["DEBUG"] else logging.INFO)
    log.propagate = False
    access_log.disabled = not handlers  # do not make lines that nobody reads
    for doubt in settings.doubts:
        log.warning("%s", doubt)


def announce(server: Server) -> None:
    service, settings, types = server.service, server.service.settings, server.service.registry.names()
    password = (f"password {service.auth.generated_password} (for this run; set PASSWORD to keep one)"
                if service.auth.generated_password else f"with your PASSWORD, at {server.url}login")
    lines = [f"{settings['NAME']} (csp.py {__version__}) at {server.url}",
             f"Job types: {', '.join(types) or 'none; name a module that has some with --jobs'}",
             f"Database:  {os.path.abspath(service.database) if service.database else 'in memory, gone at the end'}",
             f"Log in:    user {settings['USERNAME']}, {password}"]
    if types:
        example = to_json({"job_type": "echo" if "echo" in types else types[0],
                           "api_key": "one of API_KEYS" if settings["API_KEYS"] else "any", "data": "hello"})
        lines.append(f"Try it:    curl -H 'Content-Type: application/json' -d '{example}' {server.url}job")
    print("\n".join(lines), flush=True)


class Signals:
    """SIGINT and SIGTERM: the first ends ``wait``, the second ends the process at once. Main thread only."""

    def __init__(self) -> None:
        self._received: queue.SimpleQueue[int] = queue.SimpleQueue()  # unlike Event, safe to use in a signal handler
        self._is_stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)
        _closed_in_children.add(self)

    def _receive(self, number: int, _frame: Any) -> None:
        if self._is_stopping:
            os._exit(1)
        self._is_stopping = True
        self._received.put(number)

    def wait(self) -> None:
        while not self._is_stopping:
            with suppress(queue.Empty):
                self._received.get(timeout=1.0)  # Python handles a signal that another thread got when this one moves

    def close_in_child(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def serve(settings: Settings, registry: Registry, host: Optional[str] = None, port: Optional[int] = None) -> int:
    """Serve until SIGTERM or Ctrl-C, then stop in order; return the exit code. Main thread only.

    Raises StartError if the service cannot start.
    """
    if not registry.is_in_use:
        raise StartError("A worker imports the job module, which begins to serve: put that under "
                         "`if __name__ == \"__main__\":`.")
    configure_logging(settings)
    logging.raiseExceptions = False  # a job that closes stderr must not make every log line an exception
    with suppress(ImportError):  # Windows has no limit on open files
        import resource
        wanted = settings["MAX_CONNECTIONS"] + settings["WORKERS"] * 8 + CALLBACK_THREADS + 100
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    service = Service(settings, registry)
    service.runner.may_adjust_switching = True
    try:
        server = Server(service, host, port)
    except StartError:
        service.close(0.0)
        raise
    signals = Signals()
    threading.Thread(target=server.serve_forever, args=(0.1,), name="csp-accept", daemon=True).start()
    announce(server)
    signals.wait()
    log.info("stopping; running jobs have %g seconds", settings["GRACE_SECONDS"])
    deadline = time.monotonic() + settings["GRACE_SECONDS"]
    server.stop(settings["GRACE_SECONDS"])
    is_done = service.close(max(0.0, deadline - time.monotonic()))
    if not is_done:
        log.warning("jobs are still running; they will run again after the next start")
    # the interpreter would wait for jobs and callbacks that go on, maybe forever
    multiprocessing = sys.modules.get("multiprocessing")
    children = multiprocessing.active_children() if multiprocessing else []
    holders = [thread for thread in threading.enumerate()
               if thread.name.startswith(("csp-job", "csp-process", "csp-callback"))] + children
    deadline = time.monotonic() + 0.5
    for holder in holders:
        holder.join(max(0.0, deadline - time.monotonic()))
    if not is_done or any(holder.is_alive() for holder in holders):
        for child in children:
            with suppress(OSError):
                os.kill(child.pid, SIGKILL)  # not every kind of child has a method for it
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Predecessor's names
#
# One file is module and package, as os is with os.path: ``import csp.job as job`` finds the module in sys.modules.
# ---------------------------------------------------------------------------------------------------------------------

class Application:
    """What ``web.app`` is: the settings, a way to serve the registered jobs, and a WSGI application.

    As the latter it starts the service with its first request and ends it with the process.
    """

    def __init__(self) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._service: Optional[Service] = None
        self._trouble = ""

    @property
    def service(self) -> Service:
        """The service, started when first needed; raises StartError if it cannot be."""
        with self._lock:
            if self._service is None:
                configure_logging(self.config.settings)
                self._service = Service(self.config.settings, registry)
                self._service.reachable_at(None)
                atexit.register(self._service.close, 1.0)
            return self._service

    def __call__(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return Wsgi(self.service)(environ, start_response)
        except StartError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("%s", error)
            body = to_json({"error": "The service cannot be started; its log says why."}).encode("ascii")
            start_response("503 Service Unavailable", [
                ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Retry-After", "30")])
            return [body]

    def _request(self, method: str, path: str, data: Union[str, bytes, Mapping[str, str]] = b"",
                 headers: Optional[Mapping[str, str]] = None,
                 content_type: Optional[str] = None) -> types.SimpleNamespace:
        fields = {"host": "localhost", **{name.lower(): value for name, value in (headers or {}).items()}}
        if isinstance(data, collections.abc.Mapping):
            content_type, data = "application/x-www-form-urlencoded", urllib.parse.urlencode(data)
        if content_type is not None:
            fields["content-type"] = content_type
        body = data.encode("utf-8") if isinstance(data, str) else data
        response = self.service.handle(Request(method, path, fields, body))
        content = response.body if isinstance(response.body, bytes) else b"".join(response.body)
        return types.SimpleNamespace(status_code=response.status, data=content, headers={
            "Content-Type": response.content_type, **dict(response.headers)})

    def test_client(self) -> types.SimpleNamespace:
        """Return what sends requests to this application without a socket, for the tests of projects that use it."""
        return types.SimpleNamespace(**{
            method: functools.partial(self._request, method.upper()) for method in ("get", "post", "delete")})

    def run(self, host: Optional[str] = None, port: Union[int, str, None] = None, **options: Any) -> None:
        try:
            serve(self.config.settings, registry, host, int(port) if port is not None else None)
        except StartError as error:
            raise SystemExit(f"csp: {error}") from None


def _make_module(name: str, doc: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(f"{__name__}.{name}", doc)
    module.__dict__.update(names)
    sys.modules[module.__name__] = module
    return module


_application = Application()
job = _make_module("job", "The decorators.", synchronous=registry.synchronous, asynchronous=registry.asynchronous,
                   sync=registry.synchronous, async_=registry.asynchronous, **{"async": registry.asynchronous})
util = _make_module("util", "For the code of jobs.", JobError=JobError, JobCancelled=JobCancelled,
                    StoringHandler=StoringHandler, set_progress=set_progress, check_cancelled=check_cancelled)
web = _make_module("web", "The service.", app=_application, init=config.load, configure=config.load)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="csp.py", description="Serve Python functions as jobs over HTTP.")
    group = parser.add_argument_group("what to serve")
    group.add_argument("--jobs", action="append", default=[], metavar="MODULE",
                       help="a module name or a .py file with job functions; may be repeated")
    group.add_argument("--config", metavar="FILE", help="a Python settings file")
    group = parser.add_argument_group("settings, instead of the file's and the environment's")
    for row in SETTINGS:
        if row.option:
            group.add_argument(row.option, dest=row.name, metavar="VALUE", help=row.help.replace("%", "%%"))
    group = parser.add_argument_group("instead of serving")
    group.add_argument("--run", nargs="+", metavar=("JOB_TYPE", "JSON"),
                       help="run one job here and now with this data (- reads it from standard input), and exit")
    group.add_argument("--hash-password", action="store_true", help="make a hash for the setting PASSWORD, and exit")
    group.add_argument("--version", action="version", version=f"csp.py {__version__}",
                       help="show the version, and exit")
    return parser


def _run_once(arguments: Sequence[str]) -> int:
    name, *texts = arguments
    job_type = registry.get(name)
    if len(texts) > 1:
        raise StartError("--run takes a job type and its data as one JSON text; put that into quotes.")
    if job_type is None:
        raise StartError(f"There is no job type {name}; there are: {', '.join(registry.names()) or 'none'}.")
    input: Dict[str, Any] = {"job_type": name, "api_key": "none"}
    try:
        for text in texts:
            input["data"] = from_json((sys.stdin.read() if text == "-" else text).encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise StartError(f"The data for --run is not JSON: {error}.") from None

    def print_lines(run: Run, is_log: bool) -> None:
        output = run.peek()
        for line in output.lines:
            print(f"{line.timestamp} {line.level} {line.message}", file=sys.stderr)
        run.drop(output)

    def print_stream(stream: Callable[[], Iterable[Any]]) -> None:
        for part in stream():
            sys.stdout.write(part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part))
        sys.stdout.write("\n")

    run = Run("command-line", 0, 1, print_lines)
    outcome = run_function(job_type.function, run, lambda: input, print_stream if job_type.synchronous else None)
    run.end()
    if outcome.error is not None:
        document = json.loads(outcome.error)
        print(document.pop("traceback", ""), to_json(document), sep="", file=sys.stderr)
        return 1
    if outcome.data is not None:
        sys.stdout.flush()
        body = Response.data(outcome.data, None).body
        sys.stdout.buffer.writelines([body, b"\n"] if isinstance(body, bytes) else [*body, b"\n"])
    return 0


def _make_hash() -> int:
    """Print the hash of a password that is typed twice, or read from standard input if that is no terminal."""
    import getpass
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = getpass.getpass("Password: ")
        if getpass.getpass("Again: ") != password:
            raise StartError("The two passwords differ; start again.")
    if not password:
        raise StartError("The password is empty; choose one.")
    print(hash_password(password))
    return 0


def wsgi_app(*jobs: str) -> Application:
    """Return the WSGI application that serves these job modules (names or .py files), for ``csp:wsgi_app("my_jobs")``.

    Settings come from JOB_CONFIG and the environment. Raises StartError if they or a module cannot be loaded.
    """
    become("csp")
    become("ckanserviceprovider")
    sys.path.insert(0, os.getcwd())
    for name in jobs:
        load_module(name)
    config.get("NAME")  # loads the settings, whose mistakes are not to wait for the first request
    return _application


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit code: 0, 1 if ``--run``'s job failed, 2 for what is wrong at the start."""
    options = _build_parser().parse_args(arguments)
    try:
        if options.hash_password:
            return _make_hash()
        overrides = {row.name: getattr(options, row.name) for row in SETTINGS
                     if row.option and getattr(options, row.name) is not None}
        config.load(load_settings(options.config, None, overrides))
        sys.path.insert(0, os.getcwd())
        for name in options.jobs:
            load_module(name)
        return _run_once(options.run) if options.run else serve(config.settings, registry)
    except (StartError, CspError) as error:
        print(f"csp: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    become("csp")
    become("ckanserviceprovider")
    sys.exit(main())
