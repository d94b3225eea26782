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

An answer to a submission means that the job is on disk. It will run, its result is kept, and its callback is
delivered or tried for a day, whatever happens to this process in between.

The file reads from top to bottom; each part uses only what stands above it:

    Errors, JSON and time, Settings, Metrics, Jobs, Store, Callbacks, Executors, Runner, Requests and responses, Auth,
    API description, Console, Service, Transports, Predecessor's names, Command line
"""

from __future__ import annotations

# Modules that few starts need and that load much are imported by the functions that use them: csv, getpass, hashlib,
# hmac, importlib.util, inspect, logging.handlers, multiprocessing, pickle, shlex, smtplib, ssl, subprocess and
# urllib.request.
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
import http.client
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
from collections import deque, namedtuple
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, contextmanager, suppress
from http.server import ThreadingHTTPServer

try:  # hmac.compare_digest without hmac, which loads OpenSSL: 3.6 MB
    from _operator import _compare_digest as compare_digest
except ImportError:
    from hmac import compare_digest  # type: ignore[no-redef]

TYPE_CHECKING = False
if TYPE_CHECKING:  # no start imports typing: that and its NamedTuple take a twentieth of the time
    import ssl
    from multiprocessing.connection import Connection
    from typing import (
        Any,
        Callable,
        Deque,
        Dict,
        FrozenSet,
        Iterable,
        Iterator,
        List,
        Mapping,
        NamedTuple,
        NoReturn,
        Optional,
        Sequence,
        Set,
        TextIO,
        Tuple,
        Type,
        TypeVar,
        Union,
    )

    T = TypeVar("T")
    Function = TypeVar("Function", bound=Callable[..., Any])
    Values = Mapping[str, Any]
    Labels = Tuple[Tuple[str, str], ...]
    Schema = Dict[str, Any]
    Location = Dict[str, Optional[str]]  # of a function: its module, file and name
else:
    Values = collections.abc.Mapping

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
    "CspError", "JobCancelled", "JobError", "Registry", "Server", "Service", "Settings", "StartError", "Store",
    "StoringHandler", "load_settings", "job", "main", "util", "web", "wsgi_app",
]

log = logging.getLogger("csp")
access_log = logging.getLogger("csp.access")
_OWN_LOGGERS = frozenset((log.name, access_log.name))


# ---------------------------------------------------------------------------------------------------------------------
# Errors
#
# A refusal *is* an exception that carries its HTTP status; whoever notices raises it, and Service.handle alone turns
# it into an answer. What stops a start is a StartError: one sentence on stderr, exit code 2.
# ---------------------------------------------------------------------------------------------------------------------

class CspError(Exception):
    """A refused request: an HTTP ``status`` and a ``message``, a sentence for the client.

    Only refusals that somebody catches by class have a subclass.
    """

    def __init__(self, status: int, message: str, headers: Sequence[Tuple[str, str]] = (),
                 detail: Optional[str] = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)
        self.detail = detail  # more than the documented sentence, which clients may compare


class Forbidden(CspError):
    """No credentials, or the wrong ones."""

    def __init__(self, message: str = "not authorized") -> None:
        super().__init__(403, message)


class Conflict(CspError):
    """An error in what the request says (the documentation's "an error occurred")."""

    def __init__(self, message: str, headers: Sequence[Tuple[str, str]] = (), detail: Optional[str] = None) -> None:
        super().__init__(409, message, headers, detail)


class TooManyRequests(CspError):
    """Too many failed logins from an address (RFC 6585, section 4)."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(429, message, [("Retry-After", str(retry_after_seconds))])


class Unavailable(CspError):
    """The service cannot store anything, or accept more, at the moment."""

    def __init__(self, message: str, retry_after_seconds: int = 5) -> None:
        super().__init__(503, message, [("Retry-After", str(retry_after_seconds))])


class StreamBroken(Exception):
    """A streamed result broke off in the middle; its job says why."""


class StartError(Exception):
    """The service cannot start; the message is a sentence that says why and what to do."""


class JobError(Exception):
    """An expected failure of a job: its verdict, which is stored as the job's error and never retried.

    ``message`` is a string. A subclass may override ``as_dict`` to say more; what it returns has to be JSON.
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
# JSON is RFC 8259 and nothing else, in both directions. Timestamps are naive local time with six digits of
# microseconds, because CKAN's client parses exactly that.
# ---------------------------------------------------------------------------------------------------------------------

MAX_JSON_DEPTH = 100  # real submissions nest under ten deep; far below the interpreter's recursion limit of 1,000
_JSON_STRING = rb'"[^"]*(?:"|\Z)'  # in a text without escapes
_TOO_DEEP = rb"[\[{]{%d}" % (MAX_JSON_DEPTH + 1)  # seen at once; the rest takes a pass for each level
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE_ESCAPE = r"\\u[dD][89a-fA-F]"
_quote = json.encoder.encode_basestring  # a string as JSON text, many times faster than an encoder
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode


def to_json(value: Any) -> str:
    """Return ``value`` as JSON text that UTF-8 can carry; raise ValueError, TypeError or RecursionError if none is."""
    text = _quote(value) if type(value) is str else _encode_json(value)
    if not text.isascii():
        text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return text


def text_to_json(text: Optional[str]) -> str:
    """Return the JSON text of a string that UTF-8 can carry, or of None."""
    return "null" if text is None else _quote(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


_decode_json = json.JSONDecoder(object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant).decode


def _check_depth(body: bytes) -> None:
    """Raise ValueError if ``body`` nests deeper than MAX_JSON_DEPTH: strip innermost pairs, a level at a time.

    A cleverer pattern for strings would need memory of fifty times the text to track back.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = re.sub(_JSON_STRING, b"", without_escapes).translate(None, _NOT_BRACKETS)
    if re.search(_TOO_DEEP, brackets):
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")
    for _ in range(MAX_JSON_DEPTH):
        inner = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    if brackets:
        raise ValueError(f"brackets do not match or nest deeper than {MAX_JSON_DEPTH}")


def from_json(body: bytes) -> Any:
    """Return the value of the JSON text ``body``; raise ValueError if RFC 8259 or this service's bounds refuse it."""
    _check_depth(body)
    text = body.decode("utf-8")
    try:
        value = _decode_json(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if re.search(_SURROGATE_ESCAPE, text):
        to_json(value)
    return value


def sign(key: bytes, message: bytes) -> bytes:
    """Return the HMAC-SHA256 of a message (RFC 2104)."""
    import hmac
    return hmac.new(key, message, "sha256").digest()


def is_same(given: str, wanted: str) -> bool:
    """Return whether two secrets are the same, in a time that does not tell how nearly."""
    return compare_digest(given.encode("utf-8", "replace"), wanted.encode("utf-8", "replace"))


def make_token() -> str:
    """Return 256 random bits as text for addresses and cookies."""
    return base64.urlsafe_b64encode(os.urandom(32)).decode("ascii").rstrip("=")


def jitter(most: float) -> float:
    """Return a number from 1 to ``most``, so that what has failed together is not tried again together."""
    return 1.0 + (most - 1.0) * os.urandom(1)[0] / 255


def timestamp(instant: float) -> str:
    """Return the instant (epoch seconds) as naive local time, ``%Y-%m-%dT%H:%M:%S.%f`` (always six digits)."""
    whole, micros = divmod(round(instant * 1_000_000), 1_000_000)
    return "%s.%06d" % (_local_second(whole, time.tzname), micros)


@functools.lru_cache(maxsize=16)
def _local_second(whole: int, zone: Tuple[str, str]) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(whole))


def epoch_seconds(text: str) -> float:
    """Return the instant that a timestamp names; 0.0 if it is none (a database may hold what others wrote)."""
    whole, _, fraction = text.partition(".")
    try:
        return time.mktime(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")
    except (ValueError, OverflowError):
        return 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Settings
#
# One row per setting: name, parser, default, help, and the command-line option if it has one. README.md documents
# every row (a test compares). Parsers take what a Python settings file or an environment variable may hold.
# ---------------------------------------------------------------------------------------------------------------------

def _text(value: Any) -> str:
    return str(value)


def _host(value: Any) -> str:
    if not str(value):
        raise ValueError("has to be an address; 0.0.0.0 or :: for all")
    return str(value)


def _optional_text(value: Any) -> Optional[str]:
    return None if value is None or value == "" else str(value)


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


def _optional_number(minimum: float, maximum: float) -> Callable[[Any], Any]:
    parse = _number(minimum, maximum)
    return lambda value: None if value is None or value == "" else parse(value)


def _words(value: Any) -> Tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else () if value is None else value
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise ValueError("has to be a list, or words with commas between")
    return tuple(str(item).strip() for item in items if str(item).strip())


def _webhook_secret(value: Any) -> Optional[str]:
    text = _optional_text(value)
    if text is not None and text.startswith("whsec_"):
        try:
            is_key = bool(base64.b64decode(text[6:], validate=True))
        except ValueError:
            is_key = False
        if not is_key:
            raise ValueError("begins with whsec_, so base64 has to follow")
    return text


def _networks(value: Any) -> Tuple[str, ...]:
    words = _words(value)
    for word in words:
        ipaddress.ip_network(word, strict=False)
    return words


def _origins(value: Any) -> Tuple[str, ...]:
    words = _words(value)
    for word in words:
        if not re.fullmatch(r"https?://[^/?#\s]+", word):
            raise ValueError(f"has to list origins such as https://example.org, and {word} is none")
    return words


def database_path(uri: str) -> Optional[str]:
    """Return the file that a database URI or plain path names, None for one in memory; raise ValueError if neither."""
    if uri in ("sqlite://", "sqlite:///:memory:", ":memory:"):
        return None
    if "://" not in uri:
        return uri
    if not uri.startswith("sqlite:///") or uri == "sqlite:///":
        raise ValueError("has to be sqlite:///relative/path, sqlite:////absolute/path or sqlite://, "
                         "because jobs are stored in SQLite and in nothing else")
    return uri[len("sqlite:///"):]


def _database(value: Any) -> str:
    if not str(value):
        raise ValueError("has to name a database file")
    database_path(str(value))
    return str(value)


def _executor_name(value: Any) -> str:
    if not re.fullmatch(r"thread|process|.+:[^\W\d]\w*", str(value)):
        raise ValueError("has to be thread, process, or MODULE:FACTORY")
    return str(value)


def _service_url(value: Any) -> Optional[str]:
    text = _optional_text(value)
    if text is not None and not re.fullmatch(r"https?://[^/?#\s]+(?:/[^?#\s]*)?", text):
        raise ValueError("has to be an address such as http://10.0.0.5:8000/")
    return text and text.rstrip("/") + "/"


class Setting(NamedTuple):
    """A row of the settings table."""

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    option: str = ""


SETTINGS = (
    Setting("NAME", _text, "csp", "name of the service, shown by `/status`", "--name"),
    Setting("HOST", _host, "127.0.0.1", "address to listen on; `0.0.0.0` or `::` for all", "--host"),
    Setting("PORT", _number(0, 65535), 8000, "port to listen on; 0 picks a free one", "--port"),
    Setting("USERNAME", _text, "admin", "the administrator's name"),
    Setting("PASSWORD", _optional_text, None, "the administrator's password, or its hash from `--hash-password`; "
            "without it one is made for each run and printed"),
    Setting("SECRET_KEY", _optional_text, None, "the secure key: sent as the whole `Authorization` header it opens "
            "every job; without it there is none"),
    Setting("SQLALCHEMY_DATABASE_URI", _database, "sqlite:///jobs.db", "the database: `sqlite:///relative`, "
            "`sqlite:////absolute`, `sqlite://` for memory, or a path; the variable DATABASE_URL is read too", "--db"),
    Setting("WORKERS", _number(1, 10_000), 16, "asynchronous jobs that run at the same time; jobs mostly wait for "
            "networks, so more than there are cores, and few enough that each may hold a file in memory", "--workers"),
    Setting("EXECUTOR", _executor_name, "thread", "what runs asynchronous jobs: `thread`; `process`, one for each "
            "job; or `MODULE:FACTORY`, which is given the settings and returns a `concurrent.futures.Executor`",
            "--executor"),
    Setting("URL", _service_url, None, "address at which workers on other machines reach the service; without it they "
            "use the one that it listens on"),
    Setting("KEEP_JOBS_AGE", _number(0, 36_500), 10, "days that finished jobs are kept when old ones are cleared"),
    Setting("AUTO_CLEAR", _flag, False, "clear jobs older than KEEP_JOBS_AGE at the start and then daily"),
    Setting("MAX_PENDING", _optional_number(1, 10**12), None, "unfinished jobs above which a submission is answered "
            "503; without it there is no such limit, because CKAN never repeats a refused submission"),
    Setting("GRACE_SECONDS", _number(0, 86_400, float), 30.0, "time that running jobs get to end when the service is "
            "stopped"),
    Setting("MAX_BODY_BYTES", _number(1024, 2**31), 64 * 2**20, "largest request body; a job's input is held in memory "
            "a few times over"),
    Setting("MAX_URL_BYTES", _number(100, 2**20), 8192, "longest request line; RFC 9112 asks for at least 8,000"),
    Setting("MAX_HEADER_BYTES", _number(1000, 2**20), 65_536, "largest request head; browsers send a few kB"),
    Setting("MAX_HEADER_FIELDS", _number(10, 10_000), 100, "most header fields; browsers send about twenty"),
    Setting("HEADER_SECONDS", _number(1, 3600, float), 15.0, "time a client has to send a request's head"),
    Setting("BODY_SECONDS", _number(1, 3600, float), 30.0, "time a client has to send a body, and more for a large "
            "one, see BODY_BYTES_PER_SECOND"),
    Setting("BODY_BYTES_PER_SECOND", _number(1, 2**30), 16_384, "the slowest sender of a large body, and "
            "reader of a large answer, that is waited for"),
    Setting("SEND_SECONDS", _number(1, 3600, float), 60.0, "how long a client may stop reading its answer; a large one "
            "may take longer, see BODY_BYTES_PER_SECOND"),
    Setting("IDLE_SECONDS", _number(1, 3600, float), 60.0, "time an unused connection is kept open"),
    Setting("MAX_WAIT_SECONDS", _number(0, 86_400), 55, "the longest that `Prefer: wait` is waited; most proxies give "
            "up after 60"),
    Setting("MAX_CONNECTIONS", _number(1, 100_000), 2500, "connections at the same time, each of which has a thread; "
            "above it the longest unused one is closed for a new one; if all are in use the new one is answered 503"),
    Setting("MAX_CONNECTIONS_PER_ADDRESS", _number(1, 100_000), 1250, "of these from one address, unless it is a "
            "trusted proxy; half, so that one stranger cannot take all"),
    Setting("SESSION_IDLE_SECONDS", _number(60, 10**9, float), 3600.0, "a login unused for so long is over"),
    Setting("SESSION_SECONDS", _number(60, 10**9, float), 43_200.0, "a login is over after so long, used or not"),
    Setting("API_KEYS", _words, (), "if set, only these api_keys may submit; each as it is or as its hash from "
            "`--hash-password`"),
    Setting("CORS_ORIGINS", _origins, (), "origins such as `https://example.org` whose pages may use the service "
            "from a browser; without it none may"),
    Setting("PUBLIC_JOB_LIST", _flag, True, "anybody may list job ids (`GET /job`); off: administrators only"),
    Setting("TRUSTED_PROXIES", _networks, (), "addresses or networks of reverse proxies whose `X-Forwarded-For`, "
            "`X-Forwarded-Proto` and `X-Forwarded-Host` are believed"),
    Setting("SSL_VERIFY", _flag, True, "verify the TLS certificates of callback receivers"),
    Setting("CALLBACK_HOSTS", _words, (), "where callbacks may go: nothing set means anywhere; `public` means no "
            "private, loopback or link-local address; else host names, addresses and networks"),
    Setting("CALLBACK_SECRET", _webhook_secret, None, "signs callbacks with the three headers of Standard Webhooks "
            "1.0: `whsec_` and base64, or any text"),
    Setting("LOG_FILE", _optional_text, None, "log to this file, mode 0600, rotated at 64 MiB, five kept",
            "--log-file"),
    Setting("STDERR", _flag, True, "log to standard error"),
    Setting("ADMINS", _words, (), "mail errors to these addresses, through the mail server on 127.0.0.1"),
    Setting("FROM_EMAIL", _text, "csp@localhost", "sender of those mails"),
    Setting("DEBUG", _flag, False, "log more; never changes what a client sees"),
)


class Settings(Values):
    """The settings, read-only, by upper-case name; unknown upper-case names of a settings file are kept too."""

    def __init__(self, values: Optional[Mapping[str, Any]] = None, doubts: Sequence[str] = ()) -> None:
        """Take ``values`` over the defaults; raise StartError for a wrong one. ``doubts`` are sentences for the log."""
        self.doubts = doubts
        self._values: Dict[str, Any] = {**{row.name: row.default for row in SETTINGS}, **(values or {})}
        for row in SETTINGS:
            try:
                self._values[row.name] = row.parse(self._values[row.name])
            except ValueError as error:
                raise StartError(f"The setting {row.name} {error}.") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


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
    except Exception as error:
        raise StartError(f"The settings file {path} fails: {type(error).__name__}: {error}.") from error
    return {name: value for name, value in names.items() if name.isupper()}


def _doubt(names: Iterable[str], place: str, prefix: str = "") -> List[str]:
    """Return a sentence for each name that is none of a setting, but nearly: jobs may have settings of their own."""
    known = [prefix + row.name for row in SETTINGS]
    unknown = set(names).difference(known)
    if not unknown:
        return []
    import difflib
    near = [(name, found) for name in sorted(unknown) for found in difflib.get_close_matches(name, known, 1, 0.75)]
    return [f"{place} has {name}, which is no setting; is {found} meant?" for name, found in near]


def load_settings(file: Optional[str] = None, environ: Optional[Mapping[str, str]] = None,
                  overrides: Optional[Mapping[str, Any]] = None) -> Settings:
    """Return defaults, overlaid by the settings file (else the one that JOB_CONFIG names), environment, overrides.

    ``environ`` defaults to the process's; its DATABASE_URL and CSP_<NAME> count. Raises StartError for what is wrong.
    """
    environ = os.environ if environ is None else environ
    values: Dict[str, Any] = {}
    doubts = _doubt([name for name in environ if name.startswith("CSP_")], "The environment", "CSP_")
    path = file or environ.get("JOB_CONFIG")
    if path:
        values.update(_read_settings_file(path))
        doubts += _doubt(values, f"The settings file {path}") if values else [
            f"The settings file {path} sets nothing: it is Python, with lines such as PORT = 8000."]
    if environ.get("DATABASE_URL"):
        values["SQLALCHEMY_DATABASE_URI"] = environ["DATABASE_URL"]
    values.update((row.name, environ["CSP_" + row.name]) for row in SETTINGS if "CSP_" + row.name in environ)
    values.update(overrides or {})
    return Settings(values, doubts)


class Config(Values):
    """The settings in force, as ``web.app.config``; loaded when first looked at."""

    def __init__(self) -> None:
        self._settings: Optional[Settings] = None
        self._is_fixed = False  # by the command line, which a job module's web.init() must not undo

    def load(self, settings: Optional[Settings] = None) -> Settings:
        """Put ``settings`` in force, for good, or those that file and environment give now."""
        if settings is not None or not self._is_fixed:
            self._is_fixed = settings is not None
            self._settings = load_settings() if settings is None else settings
        return self.settings

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings if self._settings is not None else self.load()

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)


config = Config()  # this process's


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
#
# What has happened since the start, for Prometheus (prometheus.io/docs/instrumenting/exposition_formats): counters and
# histograms that any thread may add to; what is the case now is asked of the store and the runner.
# ---------------------------------------------------------------------------------------------------------------------

JOB_BUCKETS = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0)  # seconds: from an echo to a large import
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metric:
    """A counter, or with ``buckets`` (upper bounds in seconds) a histogram, for each set of labels."""

    def __init__(self, name: str, help: str, buckets: Tuple[float, ...] = ()) -> None:
        self.name, self._help, self._buckets = name, help, buckets
        self._lock = threading.Lock()
        self._counts: Dict[Labels, List[int]] = {}
        self._sums: Dict[Labels, float] = {}

    def add(self, labels: Labels = (), value: float = 1.0) -> None:
        """Count one: in a histogram an observation of ``value`` seconds."""
        with self._lock:
            counts = self._counts.get(labels)
            if counts is None:
                counts = self._counts[labels] = [0] * (len(self._buckets) + 1)
                self._sums[labels] = 0.0
            counts[bisect.bisect_left(self._buckets, value) if self._buckets else 0] += 1
            self._sums[labels] += value

    def totals(self) -> List[Tuple[Labels, float]]:
        """Return how many were counted for each set of labels."""
        with self._lock:
            return [(labels, sum(counts)) for labels, counts in sorted(self._counts.items())]

    def lines(self) -> List[str]:
        """Return the metric in the text format."""
        if not self._buckets:
            return metric_lines(self.name, "counter", self._help, self.totals())
        with self._lock:
            rows = [(labels, list(counts), self._sums[labels]) for labels, counts in sorted(self._counts.items())]
        lines = metric_lines(self.name, "histogram", self._help, [])
        for labels, counts, total in rows:
            sums = itertools.accumulate(counts)
            for bound, count in zip((*map(str, self._buckets), "+Inf"), sums):
                lines.append(f"{self.name}_bucket{_label_text((*labels, ('le', bound)))} {count}")
            lines.append(f"{self.name}_sum{_label_text(labels)} {total:.6f}")
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
        self.jobs = Metric("csp_job_duration_seconds", "Time from start to end of jobs, by type and outcome.",
                           JOB_BUCKETS)
        self.requests = Metric("csp_request_duration_seconds", "Time to answer requests, streams not included.",
                               REQUEST_BUCKETS)
        self.callbacks = Metric("csp_callback_attempts_total", "Attempts at callbacks by result.")

    def render(self, now: List[str]) -> str:
        """Return everything in the text format, with the lines of what is the case ``now``."""
        responses = metric_lines("csp_responses_total", "counter", "Answers by route and status.",
                                 self.requests.totals())
        return "\n".join([*now, *self.jobs.lines(), *self.requests.lines(), *responses, *self.callbacks.lines(), ""])


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
#
# A job is queued, then running, then complete or error; TRANSITIONS is the whole lifecycle and finished is final.
# Clients know three words: what is queued or running is "pending" to them. Each attempt at a job is a JobRun, which
# the job's function reaches through a context variable; a JobRun that has ended takes nothing more.
# ---------------------------------------------------------------------------------------------------------------------

QUEUED, RUNNING, COMPLETE, ERROR = "queued", "running", "complete", "error"
PENDING = "pending"
TRANSITIONS: Dict[str, FrozenSet[str]] = {
    QUEUED: frozenset((RUNNING, ERROR)),
    RUNNING: frozenset((QUEUED, COMPLETE, ERROR)),
    COMPLETE: frozenset(),
    ERROR: frozenset(),
}
MAX_ATTEMPTS = 3  # a job that ends the whole process each time must not do so for ever
LARGE_CHARACTERS = 2**20  # a text with more is not copied more than need be, and sent in pieces of so many
MAX_LOG_MESSAGE = 65_536  # characters; what is longer belongs into the result
BACKOFF_SECONDS = (1.0, 300.0)  # first and longest pause before a job is repeated, doubled each time,
BACKOFF_JITTER = 1.5  # times up to that
LONGEST_BACKOFF_SECONDS = BACKOFF_SECONDS[1] * BACKOFF_JITTER
MAX_UNWRITTEN_LINES = 10_000  # log lines that a job may be ahead of the disk before it has to wait; a 64th of them
LONG_MESSAGE = 1_024  # if one has had more characters
MANY_LINES = 2_000  # a synchronous job that has logged so many is stored while it runs
AFTER_CRASH, AFTER_STOP = 0.0, 1.0  # run_at (epoch seconds) of what runs again: before all that waits
CANCELLED = "cancelled"


def check_transition(old: str, new: str) -> None:
    """Raise ValueError if a job in state ``old`` may not become ``new``."""
    if new not in TRANSITIONS[old]:
        raise ValueError(f"a job that is {old} cannot become {new}")


class Job(NamedTuple):
    """A record. ``sent_data``, ``data``, ``error``, ``metadata`` and ``progress`` are JSON texts or None.

    ``data`` is bytes if the function returned bytes. ``run_at`` (epoch seconds: may run from then on) is None unless
    the job is queued; ``callback_at`` (epoch seconds: next delivery) is None unless one is due. Of its ``attempts``,
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
    def payload(self) -> Tuple[Tuple[str, Union[str, bytes, None]], ...]:
        """What may be large, with its name."""
        return ("sent_data", self.sent_data), ("data", self.data)

    @property
    def is_suspect(self) -> bool:
        """Whether the queued job was running in all crashes but the one that would be its last."""
        return self.run_at == AFTER_CRASH and self.crashes >= MAX_ATTEMPTS - 1

    def read_input(self) -> Dict[str, Any]:
        """Return the submitted object, as the job's function gets it."""
        value = {"job_type": self.job_type, "api_key": self.api_key}
        for key, text in (("data", self.sent_data), ("metadata", self.metadata)):
            if text is not None:
                value[key] = json.loads(text)
        if self.result_url is not None:
            value["result_url"] = self.result_url
        return value


class Claim(NamedTuple):
    """What a runner has been given: jobs to run; when the next one is due (epoch seconds), None if there is none;
    and whether the only job is a suspect, which is to run alone for a while."""

    jobs: List[Job]
    next_at: Optional[float]
    is_suspect: bool


class LogLine(NamedTuple):
    """An entry of a job's log."""

    timestamp: str
    message: str
    level: str
    module: str
    funcName: str
    lineno: int

    def to_json(self) -> str:
        """Return the entry as a JSON object; what other programs may have written into the database is borne."""
        try:
            return f'{{"timestamp": {_quote(self[0])}, "message": {_quote(self[1])}, {_origin_json(*self[2:])}}}'
        except TypeError:
            return to_json(self._asdict())


@functools.lru_cache(maxsize=256)
def _origin_json(level: str, module: str, function: str, lineno: int) -> str:
    return (f'"level": {_quote(level)}, "module": {_quote(module)}, "funcName": {_quote(function)}, '
            f'"lineno": {int.__repr__(lineno)}')


class Outcome(NamedTuple):
    """How an attempt ended: the JSON text or bytes of its result, or of its error object."""

    status: str
    data: Union[str, bytes, None] = None
    error: Optional[str] = None
    may_retry: bool = False


def failure(message: str, may_retry: bool = False, **more: str) -> Outcome:
    """Return the outcome of an attempt that failed with ``message``."""
    return Outcome(ERROR, error=to_json({"message": message, **more}), may_retry=may_retry)


POST_FAILED = to_json({"message": "Process completed but unable to post to result_url"})


def _callback_document(job: Job) -> Optional[Dict[str, Any]]:
    if job.callback_status is None:
        return None
    return {"status": job.callback_status, "attempts": job.callback_attempts, "error": job.callback_error,
            "next_attempt_timestamp": timestamp(job.callback_at) if job.callback_at is not None else None}


def _result_text(data: Union[str, bytes, None]) -> str:
    if isinstance(data, bytes):
        return to_json({"base64": base64.b64encode(data).decode("ascii")})
    return "null" if data is None else data


def render_job(job: Job, logs: Iterable[LogLine], job_key: bool = False, callback_error: bool = True) -> bytes:
    """Return the job as clients see it, JSON in UTF-8. Stored JSON texts are spliced in, never parsed.

    ``job_key``: show it (submit, callback). ``callback_error``: a delivery that is failing shows as the job's error.
    """
    return "".join(_job_texts(job, logs, job_key, callback_error)).encode("utf-8")


class Pieces:
    """Texts that are too large to be joined and encoded as one: iterating yields them in pieces, as UTF-8."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        """Return the number of bytes."""
        return sum(map(len, self._texts if all(text.isascii() for text in self._texts) else self))

    def __iter__(self) -> Iterator[bytes]:
        for text in self._texts:
            for begin in range(0, len(text), LARGE_CHARACTERS):
                yield text[begin:begin + LARGE_CHARACTERS].encode("utf-8")


def render_parts(job: Job, logs: Iterable[LogLine], job_key: bool = False) -> Union[bytes, Pieces]:
    """Return what ``render_job`` does, a large job in pieces that are made while it is sent."""
    texts = _job_texts(job, logs, job_key, True)
    return "".join(texts).encode("utf-8") if sum(map(len, texts)) < LARGE_CHARACTERS else Pieces(texts)


def _job_texts(job: Job, logs: Iterable[LogLine], job_key: bool, callback_error: bool) -> List[str]:
    """Return the job as JSON text, in pieces of which those that may be large are as they are stored."""
    error = job.error
    if error is None and callback_error and job.callback_attempts and job.callback_status in ("pending", "failed"):
        error = POST_FAILED
    sent_data = "{}" if job.sent_data is None or job.sent_data == "null" else job.sent_data
    begin = (
        f'{{"job_id": {_quote(job.job_id)}, "job_type": {_quote(job.job_type)}, "status": {_quote(job.status)}, '
        '"sent_data": ')
    end = (
        f', "error": {error or "null"}, "metadata": {job.metadata or "{}"}, '
        f'"logs": [{", ".join([line.to_json() for line in logs])}], '
        f'"result_url": {text_to_json(job.result_url)}, '
        f'"requested_timestamp": {text_to_json(job.requested_timestamp)}, '
        f'"started_timestamp": {text_to_json(job.started_timestamp)}, '
        f'"finished_timestamp": {text_to_json(job.finished_timestamp)}, "progress": {job.progress or "null"}, '
        f'"attempts": {job.attempts}, '
        f'"callback": {to_json(_callback_document(job)) if job.callback_status else "null"}, '
        f'"resubmitted_from": {text_to_json(job.resubmitted_from)}'
        + (f', "job_key": {text_to_json(job.job_key)}}}' if job_key else "}"))
    return [begin, sent_data, ', "data": ', _result_text(job.data), end]


class JobType(NamedTuple):
    """A registered function and how it wants to be run; ``timeout`` in seconds, ``memory_limit`` in bytes, or None."""

    name: str
    function: Callable[[str, Dict[str, Any]], Any]
    synchronous: bool
    timeout: Optional[float]
    retries: int
    at_most_once: bool
    memory_limit: Optional[int]


class Registry:
    """The job types of a service, by name. Its decorators return the function unchanged."""

    def __init__(self) -> None:
        self._types: Dict[str, JobType] = {}
        self.is_in_use = True  # not where workers import modules of several services: names may be the same there

    def synchronous(self, function: Optional[Function] = None, **options: Any) -> Any:
        """Register a function whose submit answers when it has returned. Options: ``timeout`` (seconds)."""
        return self._decorate(function, True, options)

    def asynchronous(self, function: Optional[Function] = None, **options: Any) -> Any:
        """Register a function that is queued. Options: ``timeout`` (seconds), ``retries``, ``at_most_once``,
        ``memory_limit`` (bytes).

        ``retries`` counts how often an attempt that raised anything but JobError is repeated. With ``at_most_once`` a
        job that was running when the process died is an error at the next start instead of running again.
        ``memory_limit`` bounds what the job's process may have in all, where it has one of its own (RLIMIT_DATA).
        """
        return self._decorate(function, False, options)

    def get(self, name: Any) -> Optional[JobType]:
        """Return the job type of that name, or None."""
        return self._types.get(name) if isinstance(name, str) else None

    def names(self) -> List[str]:
        """Return the names, sorted."""
        return sorted(self._types)

    def _decorate(self, function: Optional[Function], synchronous: bool, options: Dict[str, Any]) -> Any:
        unknown = sorted(set(options) - {"timeout", "retries", "at_most_once", "memory_limit"})
        if unknown:
            raise TypeError(f"a job has no option {', '.join(unknown)}")

        def register(function: Function) -> Function:
            self._add(function, synchronous, **options)
            return function
        return register if function is None else register(function)

    def _add(self, function: Callable[..., Any], synchronous: bool, timeout: Optional[float] = None, retries: int = 0,
             at_most_once: bool = False, memory_limit: Optional[int] = None) -> None:
        _check_function(function)
        numbers = {"timeout": timeout, "retries": retries, "memory_limit": memory_limit}
        for option, number in numbers.items():
            if number is not None and not isinstance(number, (int, float)):
                raise TypeError(f"{function.__name__}: {option} has to be a number")
        if timeout is not None and not timeout > 0 or retries < 0:
            raise ValueError(f"{function.__name__}: timeout has to be above 0 and retries not below 0")
        if memory_limit is not None and not 0 < memory_limit < 2**63:
            raise ValueError(f"{function.__name__}: memory_limit has to be a number of bytes")
        if synchronous and (retries or at_most_once or memory_limit):
            raise ValueError(f"{function.__name__}: a synchronous job is never repeated and has no process of its own, "
                             "so it takes only timeout")
        known = self._types.get(function.__name__)
        if known is not None and self.is_in_use and _place(known.function) != _place(function):
            raise ValueError(f"two job types are called {function.__name__}: {_place(known.function)} and "
                             f"{_place(function)}; rename one")
        self._types[function.__name__] = JobType(function.__name__, function, synchronous, timeout, retries,
                                                 at_most_once, memory_limit)


_NOT_PLAIN = 0x20 | 0x80 | 0x200  # the flags of code that makes a generator, a coroutine or both (inspect.CO_…)
_VARIABLE = 0x04  # the flag of code that takes any number of arguments


def _check_function(function: Callable[..., Any]) -> None:
    """Raise TypeError for a function that could be no job: it would fail each time that it is called."""
    if not isinstance(function, types.FunctionType):
        return
    code, defaults = function.__code__, len(function.__defaults__ or ())
    if code.co_flags & _NOT_PLAIN:
        raise TypeError(f"{function.__name__}: a job has to be a plain function, neither async nor a generator")
    if not code.co_flags & _VARIABLE and not code.co_argcount - defaults <= 2 <= code.co_argcount:
        raise TypeError(f"{function.__name__}: a job takes two arguments, its id and the submitted object")


def _place(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    where = f" (line {code.co_firstlineno} of {code.co_filename})" if code else ""
    return f"{function.__module__}.{function.__qualname__}{where}"


class JobRun:
    """One attempt at one job: its log, progress and cancel flag, for as long as its function runs.

    Any thread may call its methods. ``written`` is called when there are lines for the store (and True if the caller
    wants to wait until it has them), ``wake`` when there is something to be written in a while: ``is_unwritten``.
    """

    def __init__(self, job_id: str, seq: int, attempt: int, written: Callable[[JobRun, bool], None],
                 wake: Callable[[], None]) -> None:
        self.job_id, self.seq, self.attempt = job_id, seq, attempt
        self.started = time.monotonic()
        self.cancelled = threading.Event()
        self.ended = False
        self.old_loggers = frozenset() if re.fullmatch(_MADE_ID, job_id) else frozenset(_loggers_named_by(job_id))
        self.handlers: List[StoringHandler] = []
        self.lines: Deque[LogLine] = deque()  # not yet on disk; only the store's writer removes
        self.most_lines = MAX_UNWRITTEN_LINES
        self.line_count = 0
        self.stored: Optional[List[LogLine]] = None  # lines on disk that are kept for an answer, if any are
        self.new_job: Optional[Job] = None  # whose row is not on disk yet; only the store's writer takes it
        self.progress: Optional[str] = None
        self.progress_written = 0.0  # monotonic seconds
        self.is_unwritten = False
        self.is_announced = False
        self.is_queued = False  # whether there is a write of its output that the store has not begun
        self._written = written
        self._wake = wake
        self._turn = threading.Lock()

    def tell_to_stop(self) -> None:
        """Set the flag that ``check_cancelled`` looks at."""
        self.cancelled.set()

    def take(self) -> bool:
        """Return True to the first caller only: an executor may run what it has refused."""
        return self._turn.acquire(blocking=False)

    def add_line(self, line: LogLine) -> None:
        """Add to the job's log; wait for the disk if the job is too far ahead of it."""
        if self.ended:
            return
        if len(line.message) > LONG_MESSAGE:
            self.most_lines, self.stored = MAX_UNWRITTEN_LINES // 64, None
        self.lines.append(line)
        self.line_count += 1
        if len(self.lines) >= self.most_lines:
            self._written(self, True)
        elif not self.is_announced or self.line_count == MANY_LINES:
            self.is_announced = True
            self._written(self, False)

    def note_stored(self, lines: List[LogLine]) -> None:
        """Keep lines that are on disk now for the answer, if that is wanted and they are not too many."""
        stored = self.stored
        if self.line_count > MAX_UNWRITTEN_LINES:
            self.stored = None
        elif stored is not None:
            stored.extend(lines)

    def add_message(self, level: str, message: str) -> None:
        """Add a line of the service's own to the job's log."""
        self.add_line(LogLine(timestamp(time.time()), message, level, "csp", "", 0))

    def set_progress(self, fraction: float, message: Optional[str]) -> None:
        """Show ``fraction`` (0 to 1) and ``message`` as the job's progress; written to disk a few times a second."""
        fraction = min(1.0, max(0.0, float(fraction)))
        self.progress = to_json({"fraction": fraction, "message": None if message is None else clean(str(message))})
        if not self.is_unwritten:
            self.is_unwritten = True
            self._wake()

    def note_refused(self) -> None:
        """The disk could not take what there is; have it written in a while."""
        self.progress_written, self.is_unwritten, self.is_queued = time.monotonic(), True, False
        self._wake()

    def end(self) -> None:
        """Take no more, and take this run's handlers off whatever loggers they are on."""
        self.ended = True
        if _runs.get(self.job_id) is self:
            del _runs[self.job_id]
        if self.handlers or self.job_id in logging.root.manager.loggerDict:
            _clean_loggers(self)


_current_run: contextvars.ContextVar[Optional[JobRun]] = contextvars.ContextVar("csp_run", default=None)
_runs: Dict[str, JobRun] = {}  # by job id, for threads that a job starts: they do not inherit the context variable


def _find_run(task_id: str) -> Optional[JobRun]:
    run = _current_run.get()
    return run if run is not None and run.job_id == task_id else _runs.get(task_id)


def clean(text: str) -> str:
    """Return ``text`` without what UTF-8 cannot carry (lone surrogates become question marks), and not too long."""
    if len(text) > MAX_LOG_MESSAGE:
        text = f"{text[:MAX_LOG_MESSAGE]}… (cut: {len(text):,} characters)"
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


_clean_name = functools.lru_cache(maxsize=256)(clean)


class StoringHandler(logging.Handler):
    """A logging handler that writes to the log of the job ``task_id``; the service removes it when the job ends.

    On a logger that several jobs share, each handler takes only what its own job logs. A line from a thread that a job
    started itself is taken if no other job's handler is on that logger, because then there is no doubt whose it is.
    """

    def __init__(self, task_id: str, input: Any) -> None:
        super().__init__()
        self.task_id = task_id
        self.run = _find_run(task_id)
        if self.run is not None:
            self.run.handlers.append(self)

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit the record without the lock of other handlers: a job may wait for the disk here, and must alone."""
        wanted = self.filter(record)
        if wanted:
            self.emit(wanted if isinstance(wanted, logging.LogRecord) else record)  # Python 3.12: a filter's own record
        return bool(wanted)

    def emit(self, record: logging.LogRecord) -> None:
        """Store the record as a LogLine; a record that cannot be formatted is stored as it is."""
        run = self.run
        if run is None or run.ended or record.name in _OWN_LOGGERS:
            return
        current = _current_run.get()
        if current is not run and (current is not None or self._is_shared(record)):
            return
        try:
            is_plain = not (self.formatter or record.exc_info or record.exc_text or record.stack_info)
            message = record.getMessage() if is_plain else self.format(record)
        except Exception as error:  # noqa: BLE001 - a job's bad log call is no reason to fail the job
            message = f"{record.msg if isinstance(record.msg, str) else ''} ({type(error).__name__} in logging)"
        lineno = record.lineno if isinstance(record.lineno, int) and 0 <= record.lineno < 2**31 else 0
        run.add_line(LogLine(timestamp(record.created), clean(message), _clean_name(str(record.levelname)),
                             _clean_name(str(record.module)), _clean_name(str(record.funcName)), lineno))

    def _is_shared(self, record: logging.LogRecord) -> bool:
        """Whether other jobs have handlers where it was logged, so that it may be theirs."""
        logger: Optional[logging.Logger] = logging.getLogger(record.name)
        while logger is not None:
            if any(isinstance(other, StoringHandler) and other.run is not self.run for other in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


_random_digits: List[str] = []  # of 64 each, in advance: asking the system hands the interpreter lock over


def make_ids() -> Tuple[str, str]:
    """Return a new job's id, a random UUID (RFC 9562, version 4), and its key: 122 and 128 random bits."""
    try:
        digits = _random_digits.pop()
    except IndexError:
        digits, *more = map("".join, zip(*[iter(os.urandom(2048).hex())] * 64))
        _random_digits.extend(more)
    variant = "89ab"[int(digits[16], 16) & 3]
    return (f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}", digits[32:])


_MADE_ID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # ours: no logger can have had that name before


def _loggers_named_by(job_id: str) -> List[str]:
    """Return the names of loggers that have the id between their dots, or are it."""
    return [name for name in list(logging.root.manager.loggerDict) if f".{job_id}." in f".{name}."]


def _clean_loggers(run: JobRun) -> None:
    """Remove the run's handlers from all loggers, and loggers that were made for this job alone (named by its id)."""
    known = logging.root.manager.loggerDict
    own = set(_loggers_named_by(run.job_id)) - run.old_loggers
    for logger in [logging.root, *known.values()]:
        if isinstance(logger, logging.PlaceHolder):
            for child in [child for child in logger.loggerMap if child.name in own]:
                del logger.loggerMap[child]
            continue
        for handler in run.handlers:
            if handler in logger.handlers:
                logger.removeHandler(handler)
    for name in own:
        known.pop(name, None)
    for handler in run.handlers:
        handler.close()


def set_progress(task_id: str, fraction: float, message: Optional[str] = None) -> None:
    """Show how far the running job is: ``fraction`` from 0 to 1, and a message. Does nothing for a job not running."""
    run = _find_run(task_id)
    if run is not None and not run.ended:
        run.set_progress(fraction, message)


def check_cancelled(task_id: str) -> None:
    """Raise JobCancelled if the running job was told to stop (cancelled, deleted, timed out)."""
    run = _find_run(task_id)
    if run is not None and run.cancelled.is_set():
        raise JobCancelled


registry = Registry()  # what the decorators of the module ``job`` fill


# ---------------------------------------------------------------------------------------------------------------------
# Store
#
# The database is the queue. Every write goes to one writer thread, which takes all waiting writes, runs them in one
# transaction, commits, and only then lets the callers go on (group commit): an answer means durable, and the price of
# a commit is shared. WAL with synchronous=FULL syncs at each commit (sqlite.org/pragma.html#pragma_synchronous,
# sqlite.org/wal.html); readers never wait for the writer. A crash loses no committed transaction and nothing of a
# half-done one. All SQL is here; statements are constant texts, so they stay compiled.
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 3
APPLICATION_ID = 0x43535031  # "CSP1" in the file's header (sqlite.org/pragma.html#pragma_application_id)
BUSY_SECONDS = 5.0  # how long a write waits for another program's lock before it is answered 503
BATCH_WRITES = 500  # writes in one transaction: bounds the time that the last of them waits
READERS = 2  # connections for reading: each step hands the interpreter lock over, so more of them only convoy
ANY_JOB = ""  # what to watch for a change of whatever job
CLEAR_SLICE = 500  # jobs deleted in one transaction, so that nobody waits behind a million rows

_LARGE = """CREATE TABLE large (
    seq INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, name TEXT NOT NULL, value,
    PRIMARY KEY (seq, name))"""  # columns of jobs that are large: whatever changes in a row, all of it is written again
_SCHEMA = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY, job_id TEXT NOT NULL UNIQUE, job_type TEXT NOT NULL, status TEXT NOT NULL,
        requested_timestamp TEXT, started_timestamp TEXT, finished_timestamp TEXT, run_at REAL,
        attempts INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0,
        failures INTEGER NOT NULL DEFAULT 0, synchronous INTEGER NOT NULL DEFAULT 0,
        cancelled INTEGER NOT NULL DEFAULT 0, callback_status TEXT, callback_attempts INTEGER NOT NULL DEFAULT 0,
        callback_error TEXT, callback_at REAL, callback_host TEXT, result_url TEXT, api_key, job_key TEXT,
        submission_hash TEXT, resubmitted_from TEXT, progress TEXT, metadata TEXT, error TEXT, sent_data TEXT, data,
        aps_job_id TEXT)""",  # what may be long stands last: a row is read no further than the last column asked for
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
_FILL_HOURS = """INSERT INTO hours
    SELECT CAST(strftime('%s', finished_timestamp, 'utc') AS INTEGER) / 3600 AS hour, status, count(*) FROM jobs
    WHERE finished_timestamp > strftime('%Y-%m-%dT%H', 'now', 'localtime', '-1 day')
    AND strftime('%s', finished_timestamp, 'utc') IS NOT NULL GROUP BY hour, status"""
# From the predecessor's tables, renamed to old_*. What stands in them is checked, because this program splices JSON.
_FROM_PREDECESSOR = (
    """INSERT INTO jobs (job_id, job_type, status, sent_data, data, error, metadata, result_url, api_key, job_key,
        requested_timestamp, finished_timestamp, run_at, callback_host)
        SELECT job_id, coalesce(job_type, ''), coalesce(status, 'error'), as_json(sent_data), as_json(data),
        as_error(error),
        CASE WHEN EXISTS (SELECT 1 FROM old_metadata m WHERE m.job_id = j.job_id) THEN (
            SELECT json_pairs(key, value, type) FROM old_metadata m WHERE m.job_id = j.job_id) END,
        nullif(result_url, ''), CASE status WHEN 'pending' THEN api_key END, job_key, as_time(requested_timestamp),
        as_time(finished_timestamp), CASE status WHEN 'pending' THEN 0 END, as_host(result_url)
        FROM old_jobs j ORDER BY requested_timestamp, rowid""",
    """INSERT INTO metadata (job_id, key, value, type, seq) SELECT m.job_id, key, coalesce(value, ''), type, seq
        FROM old_metadata m JOIN jobs USING (job_id)""",
    """INSERT INTO logs (job_id, timestamp, message, level, module, funcName, lineno, seq)
        SELECT l.job_id, as_time(timestamp), coalesce(message, ''), level, module, funcName, lineno, seq
        FROM old_logs l JOIN jobs USING (job_id) ORDER BY l.rowid""",
    "INSERT INTO counts SELECT job_type, status, count(*) FROM jobs GROUP BY 1, 2",
    _FILL_HOURS,
)
_COLUMNS_1 = """seq, job_id, job_type, status, sent_data, data, error, metadata, result_url, api_key, job_key,
    requested_timestamp, started_timestamp, finished_timestamp, run_at, attempts, synchronous, cancelled, progress,
    callback_status, callback_attempts, callback_error, callback_at, callback_host, resubmitted_from, aps_job_id"""
_FROM_VERSION_1 = (
    f"INSERT INTO jobs ({_COLUMNS_1}) SELECT {_COLUMNS_1} FROM old_jobs",
    *(f"INSERT INTO {table} SELECT * FROM old_{table}" for table in ("metadata", "logs", "counts", "sessions")),
    _FILL_HOURS,
)
_OLD_TABLES = {0: ("logs", "metadata", "jobs"), 1: ("logs", "metadata", "jobs", "counts", "sessions")}  # by version
_JOB_COLUMNS = ", ".join(Job._fields)
_IN_STATE = {QUEUED: "status = 'pending' AND run_at IS NOT NULL", RUNNING: "status = 'pending' AND run_at IS NULL"}
_INSERT_JOB = f"INSERT INTO jobs ({_JOB_COLUMNS}) VALUES ({', '.join('?' * len(Job._fields))})"
_JOB_ROWS = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # for each statement: fewer values than SQLite's oldest limit of 999
_INSERT_JOBS = {count: _INSERT_JOB + f", ({', '.join('?' * len(Job._fields))})" * (count - 1) for count in _JOB_ROWS}
_SELECT_JOB, _SELECT_RESULT, _SELECT_LIGHT = (
    f"SELECT {', '.join('NULL' if name in left_out else name for name in Job._fields)} FROM jobs "
    for left_out in ((), ("sent_data",), ("sent_data", "data")))
_APART = ""  # stands, as no JSON does, in a column of a row whose value is in the table ``large``
_SELECT_LARGE = "SELECT value FROM large WHERE seq = ? AND name = ?"
# (what could be replaced is only what somebody else's hand has left)
_INSERT_LARGE = "INSERT OR REPLACE INTO large (seq, name, value) VALUES (?, ?, ?)"
_FINISH_JOB = {state: f"""UPDATE jobs SET status = ?, data = ?, error = ?, finished_timestamp = ?, progress = ?,
    callback_status = ?, callback_at = ?, api_key = ?, run_at = NULL
    WHERE seq = ? AND attempts = ? AND {where}""" for state, where in _IN_STATE.items()}
_REQUEUE_JOB = f"""UPDATE jobs SET run_at = ?, crashes = ?, failures = ?, progress = NULL
    WHERE seq = ? AND attempts = ? AND {_IN_STATE[RUNNING]}"""
_LINE_ROWS = (1, 10, 150, 2000 if sqlite3.sqlite_version_info >= (3, 32) else 160)  # 6 values each; old ones bear 999


def sqlite_version() -> str:
    """Return the version of SQLite in use."""
    return sqlite3.sqlite_version


class _Spoiled(Exception):
    """An operation failed after it had changed something: the batch must be undone and run one by one."""


_DISK_ERRORS = (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.InternalError)  # these, and no subclasses


class Transaction:
    """What a write operation is given: a way to execute statements, counters, and what to do when it is over."""

    def __init__(self, connection: sqlite3.Connection, is_alone: bool) -> None:
        self._connection = connection
        self.is_alone = is_alone  # one operation: what it cannot store is its own mistake
        self.counts: Dict[Tuple[str, str], int] = {}
        self.hours: Dict[Tuple[int, str], int] = {}
        self.on_commit: List[Callable[[], None]] = []
        self.on_rollback: List[Callable[[], None]] = []
        self.touched: Set[str] = set()
        self._jobs: List[Job] = []  # to be inserted with the next statement at the latest
        self.inserted = 0  # how many of them have been
        self.promised = 0  # how many there have been in all

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute a statement."""
        if self._jobs:
            self.insert_jobs()
        return self._connection.execute(statement, values)

    def executemany(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute a statement for each row."""
        if self._jobs:
            self.insert_jobs()
        self._connection.executemany(statement, rows)

    def forget_values(self, statement: str, values: Sequence[Any]) -> None:
        """Free the large values of a statement: SQLite keeps them until it has others. These are refused or no rows."""
        with suppress(sqlite3.IntegrityError):
            self._connection.execute(statement, values)

    def insert_soon(self, job: Job) -> None:
        """Insert the row of a job whose id nobody else can have, together with others."""
        self._jobs.append(job)
        self.promised += 1

    def insert_jobs(self) -> None:
        """Insert what is to be inserted soon: each statement hands the interpreter's lock over, whatever its rows.

        Raises _Spoiled if one of them cannot be stored: that is nobody's mistake who comes by here.
        """
        jobs, self._jobs = self._jobs, []
        for rows in _split(jobs, _JOB_ROWS):
            try:
                self._connection.execute(_INSERT_JOBS[len(rows)], list(itertools.chain.from_iterable(rows)))
            except (sqlite3.Error, OverflowError, UnicodeError) as error:
                if type(error) in _DISK_ERRORS:
                    raise
                raise _Spoiled from error
            self.inserted += len(rows)

    def count(self, job_type: str, status: str, change: int) -> None:
        """Note that there are ``change`` more jobs of that type and status."""
        self.counts[job_type, status] = self.counts.get((job_type, status), 0) + change

    def count_end(self, job_type: str, status: str, now: float) -> None:
        """Note that a pending job of that type has ended as ``status``."""
        self.count(job_type, PENDING, -1)
        self.count(job_type, status, 1)
        hour = int(now // 3600)
        self.hours[hour, status] = self.hours.get((hour, status), 0) + 1


def _split(rows: List[T], sizes: Sequence[int]) -> Iterator[List[T]]:
    """Yield the rows in as few pieces of these sizes (the largest first, 1 the last) as can be."""
    begin = 0
    for size in sizes:
        while len(rows) - begin >= size:
            yield rows[begin:begin + size]
            begin += size


class Write:
    """An operation on its way through the writer; ``wait`` returns its result once it is durable, or raises."""

    __slots__ = ("operation", "refused", "result", "error", "_done")

    def __init__(self, operation: Callable[[Transaction], Any], refused: Optional[Callable[[], None]] = None) -> None:
        self.operation = operation
        self.refused = refused  # called if the disk cannot take it
        self.result: Any = None
        self.error: Optional[Exception] = None
        self._done = threading.Lock()
        self._done.acquire()

    def finish(self) -> None:
        """Let the caller go on (the writer calls this once)."""
        self._done.release()

    def wait(self) -> Any:
        """Return the operation's result or raise its error, after the commit."""
        with self._done:
            if self.error is not None:
                raise self.error
            return self.result


@contextmanager
def _borrowed(pool: queue.SimpleQueue[sqlite3.Connection]) -> Iterator[sqlite3.Connection]:
    try:
        connection = pool.get(timeout=BUSY_SECONDS)
    except queue.Empty:  # closed while somebody still asks, or others have been reading for long
        raise Unavailable("The database cannot be read now; try again.") from None
    try:
        yield connection
    finally:
        pool.put(connection)


class Store:
    """Jobs, logs, metadata and sessions in SQLite. Any thread may call any method.

    Methods that write return when the change is durable and raise Unavailable when the disk cannot take it. ``path``
    None keeps everything in memory. Raises StartError for a file that is not ours, not readable or in use.
    """

    def __init__(self, path: Optional[str]) -> None:
        if path is not None:
            _check_database(path)
        self._lock_file = _lock_database(path) if path else None
        _closed_in_children.add(self)
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._writers = self._readers if path is None else queue.SimpleQueue()
        try:
            self._writers.put(_open_database(path))
            for _ in range(READERS if path else 0):
                self._readers.put(_connect(path))
            self._load()
        except (OSError, sqlite3.Error, Unavailable) as error:
            self._unlock()
            raise StartError(f"The database {path} cannot be opened: {error}.") from None
        self._queue: queue.SimpleQueue[Optional[Write]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _is_closed and _watchers; never held while waiting for anything
        self._is_closed = False
        self._watchers: Dict[str, Set[threading.Event]] = {}
        self.is_released = False
        self._trouble = ""
        self._writer = threading.Thread(target=self._run_writer, name="csp-writer", daemon=True)
        self._writer.start()

    def _load(self) -> None:
        rows = self._read("SELECT job_type, status, jobs FROM counts")
        self._counts = {(job_type, status): jobs for job_type, status, jobs in rows}
        self._next_seq = itertools.count(self._read("SELECT coalesce(max(seq), 0) + 1 FROM jobs")[0][0])

    def close(self) -> None:
        """Finish the writes that are waiting, fold the WAL into the database file, and let go of it."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self.release()
        self._writer.join()
        while not self._writers.empty():
            connection = self._writers.get()
            try:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:
                log.info("the write-ahead log stays beside the database; the next start reads it")
            connection.close()
        while not self._readers.empty():
            self._readers.get().close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    close_in_child = _unlock  # a job's own child process must not hold the lock when this one has died

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
        goes_on = True
        while goes_on:
            goes_on = self._commit_waiting()

    def _commit_waiting(self) -> bool:
        """Wait for a write and commit it with those that wait behind it; return False when the store is closed."""
        batch: List[Write] = []
        while not batch or (len(batch) < BATCH_WRITES and not self._queue.empty()):
            write = self._queue.get()
            if write is None:
                break
            batch.append(write)
        if batch:
            self._commit(batch)
        return write is not None

    def _commit(self, batch: List[Write]) -> None:
        """Run the operations in one transaction and tell each caller; never raises."""
        try:
            transaction = self._run_transaction(batch)
        except _Spoiled:
            for write in batch:
                self._commit([write])
            return
        except Exception as error:  # noqa: BLE001 - the worker loop: without it nothing could be stored any more
            self._note_trouble(str(error))
            for write in batch:
                write.error = Unavailable(f"The database cannot be written ({error}); try again.")
                if write.refused is not None:
                    write.refused()
        else:
            self._note_trouble("")
            self._publish(transaction)
        for write in batch:
            write.finish()

    def _run_transaction(self, batch: List[Write]) -> Transaction:
        with _borrowed(self._writers) as connection:
            transaction = Transaction(connection, len(batch) == 1)
            try:
                connection.execute("BEGIN IMMEDIATE")
                for write in batch:
                    self._run_operation(connection, transaction, write)
                transaction.insert_jobs()
                transaction.executemany("""INSERT INTO counts VALUES (?, ?, ?)
                    ON CONFLICT (job_type, status) DO UPDATE SET jobs = jobs + excluded.jobs""",
                    [(*key, change) for key, change in transaction.counts.items() if change])
                transaction.executemany("""INSERT INTO hours VALUES (?, ?, ?)
                    ON CONFLICT (hour, status) DO UPDATE SET jobs = jobs + excluded.jobs""",
                    [(*key, jobs) for key, jobs in transaction.hours.items()])
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                for undo in reversed(transaction.on_rollback):
                    undo()
                raise
            return transaction

    @staticmethod
    def _run_operation(connection: sqlite3.Connection, transaction: Transaction, write: Write) -> None:
        """Run one operation. Its own mistake is its caller's alone; the disk's is everybody's, and raised."""
        before = (connection.total_changes - transaction.inserted, transaction.promised)
        undone, announced = len(transaction.on_rollback), len(transaction.on_commit)
        write.error = None
        try:
            write.result = write.operation(transaction)
        except Exception as error:  # noqa: BLE001 - the worker loop: the other callers wait, whatever it is
            if type(error) in (*_DISK_ERRORS, _Spoiled):
                raise
            is_changed = (connection.total_changes - transaction.inserted, transaction.promised) != before
            if is_changed and not transaction.is_alone:
                raise _Spoiled from error
            for undo in reversed(transaction.on_rollback[undone:]):
                undo()
            del transaction.on_rollback[undone:], transaction.on_commit[announced:]
            is_value = isinstance(error, (sqlite3.Error, OverflowError, UnicodeError))
            write.error = ValueError(f"It cannot be stored: {error}") if is_value else error
            if is_changed:
                connection.execute("ROLLBACK")
                for noted in (transaction.counts, transaction.hours, transaction.touched):
                    noted.clear()
                connection.execute("BEGIN IMMEDIATE")

    def _publish(self, transaction: Transaction) -> None:
        """After a commit: counters, then whoever waits for it."""
        for key, change in transaction.counts.items():
            self._counts[key] = self._counts.get(key, 0) + change
        for then in transaction.on_commit:
            then()
        if self._watchers and transaction.touched:
            with self._lock:
                for job_id in (*transaction.touched, ANY_JOB):
                    for event in self._watchers.get(job_id, ()):
                        event.set()

    def _note_trouble(self, trouble: str) -> None:
        """Log that the disk fell ill or recovered: once, not for each write."""
        if trouble and not self._trouble:
            log.error("the database cannot be written: %s; submissions are answered 503 until it can", trouble)
        elif self._trouble and not trouble:
            log.warning("the database can be written again")
        self._trouble = trouble

    # -- reading

    def _read(self, statement: str, values: Sequence[Any] = ()) -> List[Any]:
        with _borrowed(self._readers) as connection:
            try:
                return connection.execute(statement, values).fetchall()
            except sqlite3.OperationalError as error:
                raise Unavailable(f"The database cannot be read ({error}); try again.") from None

    def get_job(self, job_id: str, has_sent_data: bool = True) -> Optional[Job]:
        """Return the job (with its ``sent_data`` or without), or None."""
        rows = self._read((_SELECT_JOB if has_sent_data else _SELECT_RESULT) + "WHERE job_id = ?", (job_id,))
        return next(iter(_make_jobs(rows, self._read)), None)

    def get_light_jobs(self, seqs: Iterable[int]) -> List[Job]:
        """Return the jobs with these numbers that there still are, without their ``sent_data`` and ``data``."""
        return [Job._make(row) for seq in seqs for row in self._read(_SELECT_LIGHT + "WHERE seq = ?", (seq,))]

    def get_logs(self, job: Job, limit: Optional[int] = None) -> List[LogLine]:
        """Return the job's log, oldest first; with ``limit`` only the newest lines, newest first."""
        columns = "SELECT timestamp, message, level, module, funcName, lineno FROM logs WHERE seq = ? ORDER BY log_id "
        if limit is None:
            return list(map(LogLine._make, self._read(columns, (job.seq,))))
        return list(map(LogLine._make, self._read(columns + "DESC LIMIT ?", (job.seq, limit))))

    def list_newest_logs(self, seq: int, limit: int, levels: Tuple[str, ...] = ()) -> List[Tuple[int, LogLine]]:
        """Return (log id, line) of the job's newest lines, newest first, of all ``levels`` or these (four at most)."""
        condition = "AND level IN (?, ?, ?, ?)" if levels else ""
        rows = self._read(f"""SELECT log_id, timestamp, message, level, module, funcName, lineno FROM logs
            WHERE seq = ? {condition} ORDER BY log_id DESC LIMIT ?""",
            (seq, *(levels * 4)[:4 if levels else 0], limit))
        return [(row[0], LogLine._make(row[1:])) for row in rows]

    def list_new_logs(self, seq: int, after_log_id: int, limit: int) -> List[Tuple[int, LogLine]]:
        """Return (log id, line) of the job's lines after that id, oldest first."""
        rows = self._read("""SELECT log_id, timestamp, message, level, module, funcName, lineno FROM logs
            WHERE seq = ? AND log_id > ? ORDER BY log_id LIMIT ?""", (seq, after_log_id, limit))
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
        elif status is not None:
            where.append("j.status = ?")
            values.append(status)
        if job_type is not None:
            where.append("j.job_type = ?")
            values.append(job_type)
        if before_seq is not None:
            where.append(f"{seq} < ?")
            values.append(before_seq)
        condition = "WHERE " + " AND ".join(where) if where else ""
        return self._read(f"SELECT j.seq, j.job_id FROM {table} {condition} ORDER BY {seq} DESC LIMIT ? OFFSET ?",
                          (*values, limit, offset))

    def find_jobs(self, id_prefix: str, limit: int) -> List[Tuple[int, str]]:
        """Return (seq, job id) of the jobs whose id begins so, in the order of their ids."""
        return self._read("SELECT seq, job_id FROM jobs WHERE job_id >= ? AND job_id < ? ORDER BY job_id LIMIT ?",
                          (id_prefix, id_prefix + "\U0010ffff" * 256, limit))

    def count_by_type(self) -> Dict[Tuple[str, str], int]:
        """Return how many jobs there are by (job type, status)."""
        return {key: jobs for key, jobs in list(self._counts.items()) if jobs}

    def count_by_hour(self, since_hour: int) -> Dict[Tuple[int, str], int]:
        """Return how many jobs ended by (hour, status), from that hour on; hours since 1970."""
        rows = self._read("SELECT hour, status, jobs FROM hours WHERE hour >= ?", (since_hour,))
        return {(hour, status): jobs for hour, status, jobs in rows}

    def get_longest_due(self) -> Optional[float]:
        """Return since when (epoch seconds) the job that runs next has been due; None if none is queued."""
        rows = self._read("SELECT run_at, requested_timestamp FROM jobs WHERE run_at IS NOT NULL "
                          "ORDER BY run_at, seq LIMIT 1")
        if not rows:
            return None
        run_at, requested = rows[0]
        return float(run_at) if run_at > AFTER_STOP else epoch_seconds(requested or "")

    def count_jobs(self) -> Dict[str, int]:
        """Return how many jobs are pending, complete and error, at constant cost."""
        totals = {PENDING: 0, COMPLETE: 0, ERROR: 0}
        for (_, status), jobs in list(self._counts.items()):
            totals[status] = totals.get(status, 0) + jobs
        return totals

    def list_running(self) -> List[Job]:
        """Return the jobs that are marked as running, oldest first."""
        return _make_jobs(self._read(
            f"{_SELECT_JOB} INDEXED BY jobs_running WHERE {_IN_STATE[RUNNING]} ORDER BY seq"), self._read)

    def list_callback_hosts(self) -> List[Tuple[str, float]]:
        """Return (host, earliest epoch seconds) for every host that a callback is due to, now or later."""
        return self._read("""WITH RECURSIVE hosts (host) AS (
            SELECT min(callback_host) FROM jobs WHERE callback_at IS NOT NULL UNION ALL
            SELECT (SELECT min(callback_host) FROM jobs WHERE callback_at IS NOT NULL AND callback_host > host)
            FROM hosts WHERE host IS NOT NULL)
            SELECT host, (SELECT min(callback_at) FROM jobs WHERE callback_at IS NOT NULL AND callback_host = host)
            FROM hosts WHERE host IS NOT NULL""")

    def list_due_callbacks(self, host: str, limit: int) -> List[Job]:
        """Return the jobs whose callback goes to ``host``, the earliest due first, due or not."""
        return _make_jobs(self._read(
            _SELECT_JOB + "WHERE callback_at IS NOT NULL AND callback_host = ? ORDER BY callback_at LIMIT ?",
            (host, limit)), self._read)

    # -- waiting

    @contextmanager
    def watch(self, job_id: str) -> Iterator[threading.Event]:
        """Give an event that the writer sets when the job (or ANY_JOB) has changed, and ``release`` for good."""
        event = threading.Event()
        with self._lock:
            self._watchers.setdefault(job_id, set()).add(event)
        if self.is_released:
            event.set()
        try:
            yield event
        finally:
            with self._lock:
                self._watchers[job_id].discard(event)
                if not self._watchers[job_id]:
                    del self._watchers[job_id]

    def count_watchers(self, job_id: str) -> int:
        """Return how many threads watch the job."""
        return len(self._watchers.get(job_id, ()))

    def release(self) -> None:
        """Let all who wait for jobs go on: the service is about to stop."""
        self.is_released = True
        with self._lock:
            for event in itertools.chain.from_iterable(self._watchers.values()):
                event.set()

    def wait_for_job(self, job_id: str, is_ready: Callable[[Job], bool], timeout_seconds: float) -> Optional[Job]:
        """Return the job once ``is_ready``, after the time or when released; None if it is deleted."""
        deadline = time.monotonic() + timeout_seconds
        with self.watch(job_id) as changed:
            while True:
                changed.clear()
                job = self.get_job(job_id)
                if job is None or is_ready(job) or self.is_released:
                    return job
                if not changed.wait(deadline - time.monotonic()):
                    return job

    # -- the lifecycle

    def take_seq(self) -> int:
        """Return the number of a new job: higher than all before, never used twice by one process."""
        seq: int = next(self._next_seq)
        return seq

    def add_job(self, job: Job, then: Callable[[], None], is_new_id: bool = False) -> Write:
        """Store a new job without waiting; ``then`` is called after the commit. The Write raises Conflict: id taken.

        ``is_new_id``: the service has made the id, so that it cannot be taken.
        """
        def operation(transaction: Transaction) -> None:
            _insert_job(transaction, job, is_new_id)
            transaction.on_commit.append(then)
        return self._enqueue(operation)

    def claim_jobs(self, limit: int, now: float, is_calm: Callable[[], bool]) -> Claim:
        """Mark up to ``limit`` queued jobs as running, the longest due first, and return them.

        A suspect is claimed by itself, and only if the runner ``is_calm``. A clock that has been set back makes nobody
        wait: what has never run is due, and so is what would have to wait longer than any retry.
        """
        check_transition(QUEUED, RUNNING)

        def is_due(job: Job) -> bool:
            wait = (job.run_at or 0.0) - now
            return not job.is_suspect and (wait <= 0 or not job.attempts or wait > LONGEST_BACKOFF_SECONDS)

        def operation(transaction: Transaction) -> Claim:
            rows = transaction.execute(
                _SELECT_JOB + "WHERE run_at IS NOT NULL ORDER BY run_at, seq LIMIT ?", (limit + 1,))
            waiting = _make_jobs(rows, transaction.execute, is_current=True)
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
            return Claim(claimed, waiting[len(due)].run_at if len(due) < len(waiting) else None, is_suspect)
        return self._write(operation)

    def mark_finished(self, job: Job, outcome: Outcome, run: Optional[JobRun], then: Callable[[], None],
                      ) -> Optional[Job]:
        """End the job, with its log and its callback due, if it is still in the state (and attempt) of ``job``.

        Return the finished job; or None, with nothing changed: it was cancelled, deleted or timed out, or runs again.
        """
        check_transition(job.state, outcome.status)
        now = time.time()
        has_callback = job.result_url is not None
        finished = job._replace(
            status=outcome.status, data=outcome.data, error=outcome.error, finished_timestamp=timestamp(now),
            run_at=None, progress=job.progress if run is None or run.progress is None else run.progress,
            callback_status=PENDING if has_callback else None, callback_at=now if has_callback else None,
            api_key=job.api_key if has_callback else None)

        def operation(transaction: Transaction) -> Optional[Job]:
            if run is not None and _take_new_job(transaction, run) is not None:
                _insert_job(transaction, finished, is_new_id=True, counted_as=PENDING)
            elif not _finish_job(transaction, finished, job.state):
                return None
            if run is not None:
                _add_lines(transaction, run)
            transaction.count_end(job.job_type, finished.status, now)
            transaction.touched.add(job.job_id)
            transaction.on_commit.append(then)
            return finished
        return self._write(operation)

    def mark_queued(self, job: Job, run_at: float, run: Optional[JobRun], then: Callable[[], None]) -> bool:
        """Put a running job back into the queue, to run from ``run_at`` on; False if it is not running any more."""
        check_transition(job.state, QUEUED)

        def operation(transaction: Transaction) -> bool:
            if not transaction.execute(_REQUEUE_JOB, (
                    run_at, job.crashes, job.failures, job.seq, job.attempts)).rowcount:
                return False
            if run is not None:
                _add_lines(transaction, run)
            transaction.touched.add(job.job_id)
            transaction.on_commit.append(then)
            return True
        return self._write(operation)

    def mark_cancelled(self, job: Job) -> bool:
        """Note on a running job that it was told to stop, so that it does not run again; False if it is not running."""
        return self._write(lambda transaction: transaction.execute(
            f"UPDATE jobs SET cancelled = 1 WHERE seq = ? AND {_IN_STATE[RUNNING]}", (job.seq,)).rowcount > 0)

    def add_run_output(self, run: JobRun) -> Write:
        """Store what the run has logged and its progress, and first its job if it is new, without waiting."""
        def operation(transaction: Transaction) -> None:
            run.is_announced = run.is_queued = False
            job = _take_new_job(transaction, run)
            if job is not None:
                _insert_job(transaction, job, is_new_id=True)
            elif not transaction.execute("SELECT 1 FROM jobs WHERE seq = ?", (run.seq,)).fetchone():
                _take_lines(transaction, run)
                return
            _add_lines(transaction, run)
            if run.is_unwritten:
                run.is_unwritten = False
                transaction.on_rollback.append(functools.partial(setattr, run, "is_unwritten", True))
                run.progress_written = time.monotonic()
                transaction.execute("UPDATE jobs SET progress = ? WHERE seq = ? AND attempts = ?",
                                    (run.progress, run.seq, run.attempt))
            transaction.touched.add(run.job_id)
        run.is_queued = True
        return self._enqueue(operation, run.note_refused)

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

    def mark_callback_due(self, job: Job, api_key: Union[str, int, float, None], then: Callable[[], None]) -> None:
        """Make the finished job's callback due now, from the first attempt; ``api_key`` if there is none any more."""
        def operation(transaction: Transaction) -> None:
            transaction.execute(
                """UPDATE jobs SET callback_status = 'pending', callback_attempts = 0, callback_error = NULL,
                callback_at = ?, api_key = coalesce(?, api_key)
                WHERE seq = ? AND finished_timestamp IS NOT NULL AND result_url IS NOT NULL""",
                (time.time(), api_key, job.seq))
            transaction.touched.add(job.job_id)
            transaction.on_commit.append(then)
        self._write(operation)

    def delete_job(self, job: Job) -> Optional[Job]:
        """Delete the job and all of it; return it as it was at that moment, but light, or None if it was gone."""
        def operation(transaction: Transaction) -> Optional[Job]:
            row = transaction.execute(_SELECT_LIGHT + "WHERE seq = ?", (job.seq,)).fetchone()
            if row is None:
                return None
            transaction.execute("DELETE FROM jobs WHERE seq = ?", (job.seq,))
            deleted = Job._make(row)
            transaction.count(job.job_type, deleted.status, -1)
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
                transaction.count(job_type, status, -1)
                transaction.touched.add(job_id)
            return len(rows)
        deleted = part = self._write(operation)
        while part == CLEAR_SLICE:
            part = self._write(operation)
            deleted += part
        return deleted

    # -- sessions

    def add_session(self, token_hash: str, now: float, idle_since: float, created_since: float) -> None:
        """Store a login, and forget those that were unused or begun before the given times."""
        def operation(transaction: Transaction) -> None:
            transaction.execute("DELETE FROM sessions WHERE used_at < ? OR created_at < ?", (idle_since, created_since))
            transaction.execute("INSERT INTO sessions VALUES (?, ?, ?)", (token_hash, now, now))
        self._write(operation)

    def get_session(self, token_hash: str) -> Optional[Tuple[float, float]]:
        """Return when the login began and when it was last used (epoch seconds), or None."""
        rows: List[Tuple[float, float]] = self._read(
            "SELECT created_at, used_at FROM sessions WHERE token_hash = ?", (token_hash,))
        return rows[0] if rows else None

    def mark_session_used(self, token_hash: str, now: float) -> None:
        """Note, without waiting, that the login is in use."""
        self._enqueue(lambda transaction: transaction.execute(
            "UPDATE sessions SET used_at = ? WHERE token_hash = ?", (now, token_hash)).rowcount)

    def delete_session(self, token_hash: str) -> None:
        """End the login."""
        self._write(lambda transaction: transaction.execute(
            "DELETE FROM sessions WHERE token_hash = ?", (token_hash,)).rowcount)


def _insert_job(transaction: Transaction, job: Job, is_new_id: bool, counted_as: str = "") -> None:
    """Insert the job with its metadata; raise Conflict if its id is taken."""
    row, large = _set_apart(job)
    if is_new_id and not transaction.is_alone:
        transaction.insert_soon(row)
    else:
        try:
            transaction.execute(_INSERT_JOB, row)
        except sqlite3.IntegrityError:
            raise Conflict(f"job_id {job.job_id} already exists") from None
    _insert_large(transaction, job.seq, large)
    if job.metadata is not None:
        transaction.executemany("INSERT INTO metadata (job_id, key, value, type, seq) VALUES (?, ?, ?, ?, ?)",
                                _metadata_rows(job))
    transaction.count(job.job_type, counted_as or job.status, 1)
    transaction.touched.add(job.job_id)


def _take_new_job(transaction: Transaction, run: JobRun) -> Optional[Job]:
    """Return the run's job to be inserted, if its row is not on disk yet; a rollback puts it back."""
    job, run.new_job = run.new_job, None
    if job is not None:
        transaction.on_rollback.append(functools.partial(setattr, run, "new_job", job))
    return job


def _finish_job(transaction: Transaction, job: Job, old_state: str) -> bool:
    """Write how the job ended; return False if it was not in that state (and attempt) any more."""
    row, large = _set_apart(job)
    large.pop("sent_data", None)  # has been since the submission
    count = transaction.execute(_FINISH_JOB[old_state], (
        row.status, row.data, row.error, row.finished_timestamp, row.progress, row.callback_status, row.callback_at,
        row.api_key, row.seq, row.attempts)).rowcount
    if count:
        _insert_large(transaction, job.seq, large)
    return count > 0


def _set_apart(job: Job) -> Tuple[Job, Dict[str, Union[str, bytes]]]:
    """Return the job as its row has it, and by name the large values that have rows of their own."""
    large = {name: value for name, value in job.payload if value is not None and len(value) >= LARGE_CHARACTERS}
    hints: Dict[str, Any] = dict.fromkeys(large, _APART)
    return job._replace(**hints) if large else job, large


def _make_jobs(rows: Iterable[Sequence[Any]], read: Callable[[str, Sequence[Any]], Iterable[Any]],
               is_current: bool = False) -> List[Job]:
    """Return the jobs of the rows, but for those deleted meanwhile; ``read`` gives the rows of a statement.

    Large values are read by themselves, one after the other, so that there is no more than one copy. What is missing
    though nothing can have been deleted (``is_current``) is damage: that job fails when it reads its input.
    """
    jobs = []
    for job in map(Job._make, rows):
        apart = [name for name, value in job.payload if isinstance(value, str) and value == _APART]
        found: Dict[str, Any] = {name: value for name in apart for value, in read(_SELECT_LARGE, (job.seq, name))}
        if is_current or len(found) == len(apart):
            jobs.append(job._replace(**found) if found else job)
    return jobs


def _insert_large(transaction: Transaction, seq: int, values: Mapping[str, Union[str, bytes]]) -> None:
    for name, value in values.items():
        try:
            transaction.execute(_INSERT_LARGE, (seq, name, value))
        finally:
            transaction.forget_values(_INSERT_LARGE, (None, None, None))


def _metadata_rows(job: Job) -> List[Tuple[str, str, str, str, int]]:
    return [(job.job_id, key, value, "string", job.seq) if isinstance(value, str) else
            (job.job_id, key, to_json(value), "json", job.seq)
            for key, value in json.loads(job.metadata or "{}").items()]


@functools.lru_cache(maxsize=None)
def _insert_lines(count: int) -> str:
    return ("INSERT INTO logs (job_id, seq, timestamp, message, level, module, funcName, lineno) "
            f"SELECT ?, ?, * FROM (VALUES {', '.join(['(?, ?, ?, ?, ?, ?)'] * count)}) LIMIT ?")


def _take_lines(transaction: Transaction, run: JobRun) -> List[LogLine]:
    """Take the run's log lines; a rollback puts them back."""
    lines = [run.lines.popleft() for _ in range(len(run.lines))]
    transaction.on_rollback.append(lambda: run.lines.extendleft(reversed(lines)))
    return lines


def _add_lines(transaction: Transaction, run: JobRun) -> None:
    """Move the run's log lines to the database; a rollback puts them back."""
    lines = _take_lines(transaction, run)
    if lines:
        transaction.on_commit.append(lambda: run.note_stored(lines))
        for begin in range(0, len(lines), _LINE_ROWS[-1]):
            rows = lines[begin:begin + _LINE_ROWS[-1]]
            size = next(size for size in _LINE_ROWS if size >= len(rows))
            nothing = (0,) * (6 * (size - len(rows)))  # (None would cost: sqlite3 looks for an adapter)
            transaction.execute(_insert_lines(size), (
                run.job_id, run.seq, *itertools.chain.from_iterable(rows), *nothing, len(rows)))
        if len(lines) > _LINE_ROWS[-2]:
            transaction.forget_values(_insert_lines(_LINE_ROWS[-1]), (0,) * (6 * _LINE_ROWS[-1] + 3))


# -- opening the file

def _lock_database(path: str) -> int:
    """Return the descriptor of a lock that dies with this process; raise StartError if another one holds it."""
    try:
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartError(f"The database {path} cannot be opened: {error.strerror}.") from None
    if not _try_lock(descriptor):
        owner = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise StartError(f"The database {path} is in use by another csp server, process {owner}; "
                         "stop it first, or choose another file with --db.")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor


_closed_in_children: weakref.WeakSet[Any] = weakref.WeakSet()  # have a method ``close_in_child``


def _close_in_child() -> None:
    _random_digits.clear()  # or the child would make the same ids and keys
    for owner in list(_closed_in_children):
        owner.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; its file locks are mandatory, and SQLite's own must do
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _connect(path: Optional[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None,
                                 check_same_thread=False, cached_statements=200)
    for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON", "journal_size_limit = 67108864",
                   "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _open_database(path: Optional[str]) -> sqlite3.Connection:
    """Return the writer's connection to a database with our schema, made or migrated if need be."""
    if path is not None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives -wal and -shm the mode of this file
        os.chmod(path, 0o600)
    connection = _connect(path)
    if path is not None:
        connection.execute("PRAGMA journal_mode = WAL")
    if connection.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
        _migrate(connection)
    return connection


def _check_database(path: str) -> None:
    """Raise StartError, with the file untouched, unless it is missing, empty, ours or the predecessor's."""
    if not os.path.exists(path):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise StartError(f"The database {path} cannot be made: its directory does not exist.")
        return
    if not os.access(path, os.R_OK | os.W_OK) or os.path.isdir(path):
        raise StartError(f"The database {path} is not a file that may be read and written.")
    with open(path, "rb") as file:
        if file.read(16) not in (b"", b"SQLite format 3\0"):  # SQLite itself takes a very short file for a new database
            raise StartError(f"The file {path} is not a database; choose another with --db.")
    connection = sqlite3.connect(f"file:{urllib.parse.quote(os.path.abspath(path))}?mode=ro", uri=True)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = {row[1] for row in connection.execute("PRAGMA table_info(jobs)")}
    except sqlite3.DatabaseError as error:
        raise StartError(f"The file {path} is not a database that can be read: {error}.") from None
    finally:
        connection.close()
    if owner == APPLICATION_ID and version > SCHEMA_VERSION:
        raise StartError(f"The database {path} was written by a newer csp.py (schema {version}, this one knows "
                         f"{SCHEMA_VERSION}); use that one.")
    is_old = {"job_id", "job_type", "status", "sent_data", "job_key"} <= columns and {"metadata", "logs"} <= tables
    if owner != APPLICATION_ID and tables and not (is_old and version == 0):
        raise StartError(f"The database {path} belongs to another program; choose another file with --db.")


def _make_tables(connection: sqlite3.Connection, version: Optional[int]) -> None:
    """Make the schema's tables, with what those of that version (None: there are none) hold."""
    if version == 2:
        connection.execute(_LARGE)
        return
    tables = _OLD_TABLES[version] if version is not None else ()
    for (index,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL "
                                       "AND tbl_name IN ('jobs', 'metadata', 'logs')").fetchall():
        connection.execute(f'DROP INDEX "{index}"')
    for table in tables:
        connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for statement in _SCHEMA:
        connection.execute(statement)
    _create_functions(connection)
    for statement in (_FROM_VERSION_1 if version else _FROM_PREDECESSOR) if tables else ():
        connection.execute(statement)
    for table in tables:
        connection.execute(f"DROP TABLE old_{table}")


def _migrate(connection: sqlite3.Connection) -> None:
    """Make the schema, and take over the tables of the predecessor or of an older version, in one transaction."""
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        is_old = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone() is not None
        _make_tables(connection, version if is_old else None)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("PRAGMA foreign_keys = ON")


class _Pairs:
    """An SQL aggregate: rows of key, value, type ('json' or a string) become the text of one JSON object."""

    def __init__(self) -> None:
        self._pairs: Dict[str, Any] = {}

    def step(self, key: Any, value: Any, kind: Any) -> None:
        """Take a row."""
        text = _as_json(value) if kind == "json" else None
        self._pairs[key] = json.loads(text) if text else value

    def finalize(self) -> str:
        """Return the object's text."""
        return to_json(self._pairs)


def _as_json(text: Optional[str]) -> Optional[str]:
    if text is None:
        return None
    try:
        return to_json(json.loads(text))
    except (ValueError, RecursionError):
        return to_json(clean(text))


def _as_error(text: Optional[str]) -> Optional[str]:
    value = None if text is None else json.loads(_as_json(text) or "null")
    if value is None:
        return None
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        return to_json(value)
    return to_json({"message": value if isinstance(value, str) else to_json(value)})


def _as_time(text: Optional[str]) -> Optional[str]:
    if text is None:
        return None
    whole, _, fraction = text.replace(" ", "T", 1).partition(".")
    return f"{whole}.{fraction[:6]:0<6}"


def _as_host(url: Optional[str]) -> Optional[str]:
    try:
        return callback_host(url) if url else None
    except ValueError:  # no address at all, which the callback will find out
        return ""


def callback_host(url: str) -> str:
    """Return the host and port of a URL, lower case: callbacks to one host wait for each other."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2].lower()


def _create_functions(connection: sqlite3.Connection) -> None:
    for name, function in (("as_json", _as_json), ("as_error", _as_error), ("as_time", _as_time),
                           ("as_host", _as_host)):
        connection.create_function(name, 1, function)
    connection.create_aggregate("json_pairs", 3, _Pairs)  # type: ignore[arg-type]  # the stub knows numbers only


# ---------------------------------------------------------------------------------------------------------------------
# Callbacks
#
# A finished job with a result_url is due: the row says so from the same transaction that ended it. One thread looks
# which hosts have something due, and a few threads per host send it, so that a receiver that hangs holds up nobody
# else. Every attempt is written down before the next; a crash in between sends twice, never not at all.
# ---------------------------------------------------------------------------------------------------------------------

RETRY_SECONDS = (1, 2, 4, 8, 15, 15, 15, 15, 15, 15, 60, 300, 1800, 7200, 18_000, 36_000)
CALLBACK_SECONDS = 15.0  # per attempt
CALLBACK_THREADS = 64
CALLBACK_THREADS_PER_HOST = 4  # for a host whose last callback was accepted; every other gets one
MAX_CALLBACK_ANSWER_BYTES = 4096  # enough for an error text
MAX_RETRY_AFTER_SECONDS = 36_000.0
LONGEST_RETRY_SECONDS = 1.1 * RETRY_SECONDS[-1]  # with its jitter

_HEADER_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HEADER_VALUE = r"[\x20-\x7e\xa0-\xff]*"
_RESERVED_HEADERS = frozenset(("host", "content-length", "transfer-encoding", "connection"))


def callback_header(api_key: Union[str, int, float]) -> Tuple[str, str]:
    """Return name and value of the header that carries the api_key; raise Conflict if that is no legal header."""
    name, colon, value = str(api_key).partition(":")
    name, value = (name.strip(), value.strip()) if colon else ("Authorization", name.strip())
    is_legal = re.fullmatch(_HEADER_NAME, name) and re.fullmatch(_HEADER_VALUE, value)
    if not is_legal or name.lower() in _RESERVED_HEADERS:
        raise Conflict("api_key cannot be sent as a header: it has to be a value for Authorization, "
                       "or a header's name and value with a colon between")
    return name, value


def check_result_url(url: Any) -> None:
    """Raise Conflict unless ``url`` is one that a callback can be sent to."""
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
    """Where callbacks may go, decided on the address that is then connected to: names can be rebound in between.

    ``allowed`` is empty (anywhere), ("public",), or host names, addresses and networks. ``resolve`` maps host and port
    to addresses and may be replaced by one's own.
    """

    def __init__(self, allowed: Sequence[str] = (), resolve: Optional[Callable[[str, int], List[str]]] = None) -> None:
        self._is_public = "public" in allowed
        self._names = {word.lower() for word in allowed if word != "public"}
        self._networks = [network for network in map(_as_network, self._names) if network is not None]
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
        mapped = getattr(ip, "ipv4_mapped", None)
        ip = mapped if mapped is not None else ip
        if host.lower() in self._names or any(ip in network for network in self._networks):
            return True
        return self._is_public and ip.is_global and not ip.is_multicast


def _as_network(word: str) -> Union[ipaddress.IPv4Network, ipaddress.IPv6Network, None]:
    try:
        return ipaddress.ip_network(word, strict=False)
    except ValueError:
        return None


def _resolve(host: str, port: int) -> List[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _CallbackConnections:
    """Makes callbacks' connections through the policy, and tells ``opened`` about each socket."""

    def __init__(self, policy: CallbackPolicy, ssl_verify: bool, opened: Callable[[socket.socket], None]) -> None:
        self._policy, self._ssl_verify, self._opened = policy, ssl_verify, opened
        self._tls: Optional[ssl.SSLContext] = None

    def _context(self) -> ssl.SSLContext:
        """Return the TLS context, made when first needed: reading the certificates takes a while."""
        import ssl
        if self._tls is None:
            self._tls = ssl.create_default_context() if self._ssl_verify else ssl._create_unverified_context()
        return self._tls

    def of(self, base: Type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        """Return what makes a connection of that class to a host; the certificate has to be the host name's."""
        def connect(connection: http.client.HTTPConnection) -> None:
            connection.sock = self._policy.connect(connection.host, connection.port, CALLBACK_SECONDS)
            self._opened(connection.sock)
            if base.default_port == http.client.HTTPS_PORT:
                wrapped = self._context().wrap_socket(connection.sock, server_hostname=connection.host,
                                                      do_handshake_on_connect=False)
                self._opened(wrapped)
                wrapped.do_handshake()
                connection.sock = wrapped

        def make(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = base(host, **options)
            connection.connect = functools.partial(connect, connection)  # type: ignore[method-assign]
            return connection
        return make


def _make_opener(connections: _CallbackConnections) -> urllib.request.OpenerDirector:
    """Return an opener of http and https URLs that refuses redirects: the api_key must not travel to elsewhere."""
    import urllib.request

    class Handler(urllib.request.AbstractHTTPHandler):
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(connections.of(http.client.HTTPConnection), request)

        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(connections.of(http.client.HTTPSConnection), request)

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *arguments: Any) -> None:
            return None

    opener = urllib.request.OpenerDirector()
    for handler in (Handler(), NoRedirects(), urllib.request.HTTPErrorProcessor(),
                    urllib.request.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    return opener


class CallbackAnswer(NamedTuple):
    """What came of one attempt: ``error`` is None if it was accepted; ``is_final`` forbids another attempt."""

    error: Optional[str] = None
    is_final: bool = False
    retry_after_seconds: float = 0.0


def next_callback_at(attempts: int, answer: CallbackAnswer, now: float) -> Optional[float]:
    """Return when to try again after the ``attempts``-th attempt (epoch seconds), or None: never."""
    if answer.error is None or answer.is_final or attempts > len(RETRY_SECONDS):
        return None
    delay = RETRY_SECONDS[attempts - 1] * jitter(1.1)
    return now + max(delay, min(answer.retry_after_seconds, MAX_RETRY_AFTER_SECONDS))


def _is_over(wait_seconds: float) -> bool:
    """Return whether a wait is over; one longer than any there is comes from a clock that has been set back."""
    return wait_seconds <= 0 or wait_seconds > LONGEST_RETRY_SECONDS


def _retry_after_seconds(text: Optional[str], now: float) -> float:
    """Return the seconds that a Retry-After header asks for (RFC 9110, section 10.2.3), 0 if it makes no sense."""
    if text is None:
        return 0.0
    if re.fullmatch("[0-9]{1,9}", text.strip()):
        return float(text)
    try:
        date = email.utils.parsedate_tz(text)
        return max(0.0, email.utils.mktime_tz(date) - now) if date else 0.0
    except (ValueError, OverflowError, TypeError):
        return 0.0


def sign_callback(secret: str, job_id: str, now: float, body: bytes) -> Dict[str, str]:
    """Return the three headers of Standard Webhooks 1.0 (standardwebhooks.com)."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode("utf-8")
    job_id = urllib.parse.quote(job_id)  # a header holds no letters beyond latin-1
    signed = f"{job_id}.{int(now)}.".encode("ascii") + body
    signature = base64.b64encode(sign(key, signed)).decode("ascii")
    return {"webhook-id": job_id, "webhook-timestamp": str(int(now)), "webhook-signature": "v1," + signature}


class CallbackSender:
    """Sends due callbacks until they are accepted or given up. ``notify`` and ``stop`` may be called by any thread."""

    def __init__(self, store: Store, ssl_verify: bool = True, secret: Optional[str] = None,
                 policy: Optional[CallbackPolicy] = None, metrics: Optional[Metrics] = None) -> None:
        self._store = store
        self._metrics = metrics or Metrics()
        self._secret = secret
        self._connections = _CallbackConnections(policy or CallbackPolicy(), ssl_verify, self._watch)
        self._sockets: Dict[int, Tuple[float, socket.socket]] = {}  # by thread: when to end the attempt (monotonic)
        self._condition = threading.Condition()  # guards the fields below
        self._due: Dict[str, float] = dict(store.list_callback_hosts())
        self._sending: Dict[str, Set[int]] = {}
        self._healthy: Set[str] = set()
        self._is_stopping = False
        self._pool = ThreadPoolExecutor(CALLBACK_THREADS, "csp-callback")
        self._thread = threading.Thread(target=self._run, name="csp-callbacks", daemon=True)
        self._thread.start()

    def notify(self, host: str, at: float) -> None:
        """Say that a callback to ``host`` is due ``at`` (epoch seconds)."""
        with self._condition:
            self._due[host] = min(at, self._due.get(host, at))
            self._condition.notify()

    def stop(self, timeout_seconds: float) -> None:
        """Start no more deliveries and wait a moment for those under way; what is not sent is on disk."""
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._sending, timeout_seconds)
        self._thread.join()
        self._pool.shutdown(wait=False)

    def _run(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._due or self._is_stopping)
        while not (hasattr(self, "_opener") or self._is_stopping):  # not made at the start: that costs
            try:
                self._opener = _make_opener(self._connections)
            except OSError as error:  # no more files can be opened now, not even a module's
                log.warning("callbacks cannot be sent yet: %s", error)
                with self._condition:
                    if self._condition.wait_for(lambda: self._is_stopping, 1.0):
                        return
        while True:
            with self._condition:
                now = time.time()
                waits = {host: at - now for host, at in self._due.items() if self._has_place(host)}
                ready = [host for host, wait in waits.items() if _is_over(wait)]
                if not ready and not self._is_stopping:
                    self._condition.wait(min([*waits.values(), 1.0 if self._sending else 60.0]))
                if self._is_stopping:
                    return
                for host in ready:
                    del self._due[host]
            self._end_late_attempts()
            for host in ready:
                try:
                    self._dispatch(host, now)
                except Exception:  # noqa: BLE001 - the worker loop: without it no callback would ever go out again
                    log.exception("callbacks to %s cannot be sent now", host)
                    self.notify(host, now + 1.0)

    def _watch(self, connection: socket.socket) -> None:
        deadline = self._sockets.get(threading.get_ident(), (time.monotonic() + CALLBACK_SECONDS, None))[0]
        self._sockets[threading.get_ident()] = (deadline, connection)

    def _end_late_attempts(self) -> None:
        """Cut connections whose attempt takes too long: a socket's timeout counts anew with every byte that drips."""
        now = time.monotonic()
        for deadline, connection in list(self._sockets.values()):
            if deadline < now:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    log.debug("a late callback's connection had ended already")

    def _has_place(self, host: str) -> bool:
        limit = CALLBACK_THREADS_PER_HOST if host in self._healthy else 1
        total = sum(map(len, self._sending.values()))
        return len(self._sending.get(host, ())) < limit and total < CALLBACK_THREADS

    def _dispatch(self, host: str, now: float) -> None:
        """Hand what is due to ``host`` to the pool, as far as there is place; note when the next is due."""
        with self._condition:
            sending = set(self._sending.get(host, ()))  # before reading: what ends meanwhile may still be read as due
        limit = len(sending) + CALLBACK_THREADS_PER_HOST + 1
        try:
            jobs = self._store.list_due_callbacks(host, limit)
        except Unavailable:
            self.notify(host, now + 1.0)
            return
        for job in jobs:
            if job.seq in sending:
                continue
            with self._condition:
                is_due = not job.callback_attempts or _is_over((job.callback_at or 0.0) - now)
                has_place = self._has_place(host) and is_due and not self._is_stopping
                if has_place:
                    self._sending.setdefault(host, set()).add(job.seq)
            if not has_place:
                self.notify(host, job.callback_at or now)
                return
            try:
                self._pool.submit(self._deliver, host, job)
            except RuntimeError:  # no more threads
                with self._condition:
                    self._sending[host].discard(job.seq)
                raise
        if len(jobs) == limit:  # what has been sent meanwhile has made place for more than were read
            self.notify(host, now)

    def _deliver(self, host: str, job: Job) -> None:
        """Try once, write down what came of it, and make place for the next."""
        answer = CallbackAnswer("the attempt could not be made")
        next_at: Optional[float] = None
        try:
            answer = self._send(job)
            next_at = next_callback_at(job.callback_attempts + 1, answer, time.time())
            status = "delivered" if answer.error is None else "failed" if next_at is None else PENDING
            self._metrics.callbacks.add((("result", {PENDING: "retry", "failed": "given_up"}.get(status, status)),))
            if not self._record(job, status, answer.error, next_at):
                next_at = time.time()  # made due anew, or gone: look
        except Unavailable:
            next_at = time.time() + 1.0  # nothing has been sent: the job's log cannot be read
        except Exception:  # noqa: BLE001 - the worker loop: the callback has to be tried again whatever happened
            log.exception("the callback of job %s failed in an unexpected way", job.job_id)
            next_at = time.time() + RETRY_SECONDS[-1]
        finally:
            self._finish(host, job, answer, next_at)

    def _record(self, job: Job, status: str, error: Optional[str], next_at: Optional[float]) -> bool:
        """Write an attempt down, however long the disk is ill: what was delivered must not be sent every second."""
        while True:
            try:
                return self._store.mark_callback(job, status, error, next_at)
            except Unavailable:
                with self._condition:
                    if self._condition.wait_for(lambda: self._is_stopping, 1.0):
                        return True

    def _finish(self, host: str, job: Job, answer: CallbackAnswer, next_at: Optional[float]) -> None:
        if answer.error is not None:
            log.warning("callback of job %s to %s: %s", job.job_id, host, answer.error)
        with self._condition:
            self._sending.get(host, set()).discard(job.seq)
            if not self._sending.get(host):
                self._sending.pop(host, None)
            (self._healthy.add if answer.error is None else self._healthy.discard)(host)
            if next_at is not None:
                self._due[host] = min(next_at, self._due.get(host, next_at))
            self._condition.notify_all()

    def _send(self, job: Job) -> CallbackAnswer:
        import urllib.error
        now = time.time()
        try:
            with self._opener.open(self._build_request(job, now), timeout=CALLBACK_SECONDS) as response:
                response.read(MAX_CALLBACK_ANSWER_BYTES)
                return CallbackAnswer()
        except urllib.error.HTTPError as error:
            with error:
                return CallbackAnswer(f"answered {error.code}", error.code == 410,
                                      _retry_after_seconds(error.headers.get("Retry-After"), now))
        except Conflict as error:
            return CallbackAnswer(error.message, is_final=True)
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is has to be written down, or it repeats at once
            reason = getattr(error, "reason", error)
            return CallbackAnswer(clean(f"{type(reason).__name__}: {reason}"))
        finally:
            self._sockets.pop(threading.get_ident(), None)

    def _build_request(self, job: Job, now: float) -> urllib.request.Request:
        import urllib.request
        body = render_job(job, self._store.get_logs(job), job_key=True, callback_error=False)
        headers = {"Content-Type": "application/json", "User-Agent": f"csp.py/{__version__}"}
        if job.api_key is not None:
            headers.update([callback_header(job.api_key)])
        if self._secret:
            headers.update(sign_callback(self._secret, job.job_id, now, body))
        return urllib.request.Request(job.result_url or "", body, headers, method="POST")


# ---------------------------------------------------------------------------------------------------------------------
# Executors
#
# A job's function runs in a thread of this process, in a process of its own, or wherever a concurrent.futures.Executor
# takes it. Elsewhere goes not the function but a text that says where to find it: ``run_task`` imports it there, runs
# it, catches everything and returns a text. Meanwhile the log goes to the service by HTTP, with a token that is good
# for that run alone; what could not be sent comes with the result.
# ---------------------------------------------------------------------------------------------------------------------

MAX_RESULT_BYTES = 2**29  # SQLite stores at most 10^9 bytes in a value (sqlite.org/limits.html)
REPORT_SECONDS = 1.0  # between questions whether to stop, of a run elsewhere that has nothing to say
REPORT_PAUSES = (0.1, 30.0)  # seconds between reports; doubled up to the longest while they fail
REPORT_TIMEOUT_SECONDS = 10.0
REPORT_LINES, REPORT_CHARACTERS = 1000, 2**20  # in one report
FIRST_REPORTS = 3  # how often a run that may only begin once asks whether it may
SERVER_END_SECONDS = 2.0  # how long a stop waits for the server process, which has little to do
MAX_REFUSALS = 3  # of an executor, one after the other, before it is thought to be broken
ADDRESS_SECONDS = 1.0  # how long the first jobs wait for the server to have an address
NOT_AGAIN = "It is not of a kind that is run again."
KILL_SECONDS = 0.5  # between SIGTERM and SIGKILL: time for a job to put its files away
SIGKILL: int = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process either way
OWN_SECRETS = frozenset(("PASSWORD", "SECRET_KEY", "API_KEYS", "CALLBACK_SECRET"))  # go to no other machine
_PROCESS = make_token()  # with the process id it says whether a task has come to another process


def error_document(error: BaseException) -> str:
    """Return the JSON text of the error object that a job shows for what its function raised; never raises.

    ``as_dict`` and ``__str__`` are the job author's code and may do anything.
    """
    message = type(error).__name__
    try:
        if not isinstance(error, JobError):
            text = _safe_text(error)
            message += f": {text}" if text else ""
            _free_memory(error)
            lines = traceback.format_exception(type(error), error, error.__traceback__)
            return to_json({"message": message, "traceback": clean("".join(lines))})
        message = _safe_text(getattr(error, "message", "")) or message
        document = error.as_dict()
        if isinstance(document, dict) and isinstance(document.get("message"), str):
            text = to_json(document)
            _check_depth(text.encode("utf-8"))
            return text
    except BaseException:  # noqa: BLE001 - part of the job run, which has to end somehow
        log.debug("an error of type %s cannot describe itself", type(error).__name__)
    return to_json({"message": message})


def _free_memory(error: Optional[BaseException]) -> None:
    """Clear the frames of a MemoryError in the chain: what its functions hold may be all the memory there is."""
    seen: Set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            traceback.clear_frames(error.__traceback__)
        error = error.__context__ if error.__cause__ is None else error.__cause__


@functools.lru_cache(maxsize=1)
def prepare_for_shortage() -> None:
    """Import what describing and logging a failure needs late: a job may have left no memory or file descriptors."""
    for name in ("ast", "encodings.unicode_escape", "textwrap", "tokenize"):
        with suppress(Exception):
            importlib.import_module(name)


def _safe_text(value: Any) -> str:
    """Return ``str(value)``; where that raises or is no string, nothing."""
    try:
        return clean(str(value))
    except BaseException:  # noqa: BLE001 - part of the job run: __str__ is the job author's code
        return ""


def encode_result(result: Any) -> Union[str, bytes, None]:
    """Return what is stored for a function's result: JSON text, bytes, or None; raise ValueError if it is neither."""
    if result is None:
        return None
    if isinstance(result, (bytes, bytearray, memoryview)):
        data: Union[str, bytes] = bytes(result)
    else:
        try:
            data = to_json(result)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The result of the job is not JSON: {error}") from None
    if len(data) > MAX_RESULT_BYTES:
        raise ValueError(f"The result of the job is larger than {MAX_RESULT_BYTES:,} bytes.")
    return data


def call_function(function: Callable[[str, Dict[str, Any]], Any], run: JobRun, read_input: Callable[[], Dict[str, Any]],
                  streams: bool) -> Union[Outcome, Callable[[], Iterable[Any]]]:
    """Run the job's function to its outcome, whatever it does; if it ``streams``, a callable result is returned."""
    token = _current_run.set(run)
    prepare_for_shortage()
    try:
        result = function(run.job_id, read_input())
        if streams and callable(result):
            stream: Callable[[], Iterable[Any]] = result
            return stream
        try:
            return Outcome(COMPLETE, data=encode_result(result))
        except ValueError as error:
            return failure(str(error))
    except JobCancelled:
        return failure(CANCELLED)
    except BaseException as error:  # noqa: BLE001 - the job run: SystemExit and KeyboardInterrupt of a job are its own
        return Outcome(ERROR, error=error_document(error), may_retry=not isinstance(error, JobError))
    finally:
        _current_run.reset(token)


def _encode_part(part: Any) -> bytes:
    if not isinstance(part, str):
        raise TypeError(f"a streamed result has to yield str or bytes, not {type(part).__name__}")
    return part.encode("utf-8")


def _join_stream(parts: Iterable[Any]) -> Union[str, bytes]:
    """Return a streamed result in one piece, as text if it is UTF-8."""
    data = b"".join(part if isinstance(part, bytes) else _encode_part(part) for part in parts)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def run_function(function: Callable[[str, Dict[str, Any]], Any], run: JobRun, read_input: Callable[[], Dict[str, Any]],
                 streams: bool) -> Outcome:
    """Run the job's function to its outcome; what it would have streamed is put together."""
    outcome = call_function(function, run, read_input, streams)
    if not isinstance(outcome, Outcome):
        stream = outcome
        outcome = call_function(lambda *_: _join_stream(stream()), run, dict, streams=False)
        assert isinstance(outcome, Outcome)
    return outcome


# -- what a task is

class RemoteRun(JobRun):
    """A run whose function runs elsewhere; ``token`` lets it report, ``executor`` and ``future`` are where it is.

    An executor may begin a task again, when a worker of its own has died: only the latest execution counts then, and of
    a job that may run at most once only the first. Any thread may call the methods.
    """

    def __init__(self, job: Job, at_most_once: bool, written: Callable[[JobRun, bool], None],
                 wake: Callable[[], None]) -> None:
        super().__init__(job.job_id, job.seq, job.attempts, written, wake)
        self.token = make_token()
        self.executor: Optional[Executor] = None
        self.future: Optional[Future[str]] = None
        self.begun = self.started  # when the latest execution began (monotonic)
        self._at_most_once = at_most_once
        self.asks_first = False
        self._executions: List[str] = []
        self._received = 0
        self._intake = threading.Lock()

    def tell_to_stop(self) -> None:
        """Set the flag that the next report brings back, and ask the executor to stop it, which it may or may not."""
        super().tell_to_stop()
        if self.future is not None:
            try:
                self.future.cancel()
            except Exception as error:  # noqa: BLE001 - foreign code, and the runner's loop is what calls it
                log.debug("a future cannot be cancelled: %s", _safe_text(error))

    def take_report(self, report: Mapping[str, Any]) -> bool:
        """Take lines and progress, those that have come before only once; return whether that execution goes on."""
        with self._intake:
            if not self._knows(report["execution"], report["seconds"]):
                return False
            lines = [LogLine(**line) for line in report["lines"]]
            for line in lines[max(0, self._received - report["first"]):]:
                self.add_line(line)
            self._received = max(self._received, report["first"] + len(lines))
        if report["progress"] is not None:
            self.set_progress(**report["progress"])
        return not self.cancelled.is_set()

    @property
    def may_have_begun(self) -> bool:
        """Whether it may have begun; one that may run at most once has asked first, unless it is a process of ours."""
        return bool(self._executions) or not self.asks_first

    def _knows(self, execution: str, seconds: float) -> bool:
        if execution not in self._executions:
            if self._executions and self._at_most_once:
                return False
            if self._executions:
                self.add_message("WARNING", "The executor has begun the job again.")
            self._executions.append(execution)
            self._received = 0
            self.begun = max(self.started, time.monotonic() - seconds)
        return execution == self._executions[-1]


def import_name(module: types.ModuleType) -> str:
    """Return the name by which another process can import the module, which may be running as ``__main__``."""
    if module.__name__ != "__main__":
        return module.__name__
    spec = getattr(module, "__spec__", None)
    return spec.name if spec is not None else _stem(getattr(module, "__file__", None) or "csp.py")


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def locate(function: Callable[..., Any]) -> Location:
    """Return module, file and name of the function; raise ValueError if another process cannot find it by them."""
    module = sys.modules.get(function.__module__)
    if module is None or _get_attribute(module, function.__qualname__) is not function:
        raise ValueError(f"{_place(function)} cannot be found by another process: the function of a job has to stand "
                         "at the top level of a module, under its name, unless EXECUTOR is thread.")
    path = getattr(module, "__file__", None)
    return {"module": import_name(module), "file": path and os.path.abspath(path), "name": function.__qualname__}


def _get_attribute(module: types.ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def describe_place(settings: Mapping[str, Any], is_here: bool) -> Dict[str, Any]:
    """Return what makes another process, on this machine (``is_here``) or not, one that jobs feel at home in."""
    this = sys.modules[__name__]
    aliases = [name for name, module in list(sys.modules.items()) if module is this and not name.startswith("__")]
    kept = {name: value for name, value in settings.items() if (is_here or name not in OWN_SECRETS) and _is_json(value)}
    return {"process": [_PROCESS, os.getpid()], "aliases": aliases, "settings": kept}


def _is_json(value: Any) -> bool:
    try:
        return bool(to_json(value))
    except (TypeError, ValueError, RecursionError):
        return False


def describe_task(job: Job, job_type: JobType, run: RemoteRun, url: Optional[str], place: Mapping[str, Any],
                  is_here: bool) -> str:
    """Return the text that ``run_task`` takes; raise ValueError for a function that cannot be found elsewhere."""
    return to_json({
        "job_id": job.job_id, "attempt": job.attempts, "function": locate(job_type.function),
        "input": job.read_input(), "streams": job_type.synchronous, "place": place,
        "url": f"{url}job/{urllib.parse.quote(job.job_id, safe='')}/report" if url else None, "token": run.token,
        "asks_first": job_type.at_most_once and not is_here, "reports_first": job_type.timeout is not None,
        "memory_limit": job_type.memory_limit if is_here else None})


def read_result(text: str) -> Tuple[Outcome, Dict[str, Any]]:
    """Return the outcome and the last report that ``run_task`` has put into its text."""
    result = json.loads(text)
    data = base64.b64decode(result["base64"]) if result["base64"] is not None else result["data"]
    return Outcome(result["status"], data, result["error"], result["may_retry"]), result["report"]


# -- where a task runs

def become(name: str) -> None:
    """Make ``import name`` and its submodules mean this module, which may be running as ``__main__``."""
    for part in ("", ".job", ".util", ".web"):
        sys.modules[name + part] = sys.modules[__name__ + part]


_loading = threading.RLock()  # several threads of one worker may want the same file at the same time


def _load_file(path: str) -> types.ModuleType:
    """Import a file under its own name, or one like it if another module has that."""
    import importlib.util
    name = stem = re.sub(r"\W", "_", _stem(path))
    for number in itertools.count(2):
        known = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
        if name in sys.modules and known is not None and known.origin == path:
            return sys.modules[name]
        if known is None or known.origin == path:
            break
        name = f"{stem}_{number}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ImportError("there is no such file")
    sys.path.append(os.path.dirname(path))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_module(name: str) -> types.ModuleType:
    """Import a module by name or by the path of its .py file; raise StartError if that fails."""
    try:
        return _load_file(os.path.realpath(name)) if name.endswith(".py") else importlib.import_module(name)
    except StartError:
        raise
    except ImportError as error:
        raise StartError(f"The module {name} cannot be imported: {error}.") from None
    except SyntaxError as error:
        raise StartError(f"The module {name} has a syntax error: {error}.") from None
    except Exception as error:
        lines = traceback.extract_tb(error.__traceback__)
        line = next((line for line in reversed(lines) if line.filename != __file__), lines[-1])  # the module's own
        raise StartError(f"The module {name} fails: {type(error).__name__}: {_safe_text(error)} "
                         f"({line.filename}, line {line.lineno}).") from error


def _find_function(module: str, file: Optional[str], name: str) -> Callable[..., Any]:
    """Return what ``locate`` has located, imported by name or else from its file."""
    with _loading:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if file is None or not f"{module}.".startswith(f"{error.name}."):  # it is there, and misses another one
                raise
            found = _load_file(file)
    function: Optional[Callable[..., Any]] = _get_attribute(found, name)
    if function is None:
        raise ImportError(f"The module {module} of {getattr(found, '__file__', 'unknown origin')} has no {name}.")
    return function


def settle_in(place: Mapping[str, Any]) -> None:
    """Make this process what ``describe_place`` describes, unless it is the one that has described it."""
    if place["process"] != [_PROCESS, os.getpid()]:
        for alias in place["aliases"]:
            become(alias)
        registry.is_in_use = False
        _end_with_parent()
        config.load(Settings(place["settings"]))


@functools.lru_cache(maxsize=None)  # once in a process
def _end_with_parent() -> None:
    """Have this process, if it belongs to a pool, end when the pool's owner has been killed: it would wait for ever."""
    if "multiprocessing" in sys.modules:
        import multiprocessing
        parent = multiprocessing.parent_process()
        if parent is not None:
            def end() -> None:
                parent.join()
                os._exit(1)
            threading.Thread(target=end, name="csp-parent", daemon=True).start()


def _limit_memory(limit_bytes: Optional[int]) -> None:
    if limit_bytes is not None:
        try:
            import resource
        except ImportError:  # Windows has no such limit
            return
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


class Reporter:
    """Brings what a run logs, and its progress, to the service by HTTP; tells the run when it is to stop.

    A thread sends, in batches, and again what did not arrive; ``close`` returns what has not. Any thread may call
    ``note`` and ``wake``.
    """

    def __init__(self, url: Optional[str], token: str) -> None:
        self._url = urllib.parse.urlsplit(url) if url else None
        self._token = token
        self._execution = make_token()
        self._connection: Optional[http.client.HTTPConnection] = None
        self._lock = threading.Condition()  # guards the next two and the run's lines
        self._sent = 0
        self._is_closed = False
        self._failures = 0
        self._wanted = threading.Event()
        self._closing = threading.Event()

    def begin(self, run: JobRun, must_ask: bool, reports_first: bool) -> Optional[Outcome]:
        """Report for ``run`` from now on. With ``must_ask`` the service has to agree first; return why it has not."""
        self._run = run
        for _ in range(FIRST_REPORTS if must_ask else 0):
            if self._url is not None and self._report():
                break
            self._closing.wait(REPORT_SECONDS)
        else:
            if must_ask:
                return failure("The worker cannot reach the service (setting URL), and a job that may run at most once "
                               "is not begun without it.")
        if run.cancelled.is_set():
            return failure(f"A worker has died while it ran the job. {NOT_AGAIN}" if must_ask else CANCELLED)
        if self._url is not None:
            if reports_first:
                self._wanted.set()
            threading.Thread(target=self._work, name="csp-report", daemon=True).start()
        return None

    def note(self, run: JobRun, must_wait: bool) -> None:
        """Say that there are lines; wait, if the run is far ahead, while they can be sent."""
        self._wanted.set()
        if must_wait and self._url is not None:
            with self._lock:
                self._lock.wait_for(lambda: len(run.lines) < run.most_lines or self._failures > 0,
                                    REPORT_TIMEOUT_SECONDS)

    def wake(self) -> None:
        """Say that there is progress."""
        self._wanted.set()

    def close(self) -> Dict[str, Any]:
        """Send no more; return a report of what may not have arrived."""
        with self._lock:
            self._is_closed = True
            report = self._describe(list(self._run.lines))
        self._closing.set()
        self._wanted.set()
        return report

    def _describe(self, lines: List[LogLine]) -> Dict[str, Any]:
        progress = self._run.progress
        return {"execution": self._execution, "first": self._sent, "lines": [line._asdict() for line in lines],
                "progress": json.loads(progress) if progress is not None else None,
                "seconds": time.monotonic() - self._run.started}

    def _work(self) -> None:
        while not self._is_closed:
            self._wanted.wait(max(REPORT_SECONDS, self._pause))
            if not self._is_closed:
                self._wanted.clear()
                self._report()
                self._closing.wait(self._pause)
        if self._connection is not None:
            self._connection.close()

    @property
    def _pause(self) -> float:
        return min(REPORT_PAUSES[0] * 2.0 ** min(self._failures, 20), REPORT_PAUSES[1])

    def _report(self) -> bool:
        """Make a report; return whether it has arrived."""
        with self._lock:
            self._run.is_announced = self._run.is_unwritten = False
            lines = list(self._run.lines)[:REPORT_LINES]  # one step: the job goes on logging
            sizes = itertools.accumulate(len(line.message) for line in lines)
            del lines[max(1, sum(size <= REPORT_CHARACTERS for size in sizes)):]
            body = to_json(self._describe(lines)).encode("utf-8")
        goes_on = self._post(body)
        with self._lock:
            self._failures = self._failures + 1 if goes_on is None else 0
            if goes_on is False:
                self._run.cancelled.set()
            if goes_on is not None and not self._is_closed:
                for _ in lines:
                    self._run.lines.popleft()
                self._sent += len(lines)
            if self._run.lines:
                self._wanted.set()
            self._lock.notify_all()
        return goes_on is not None

    def _post(self, body: bytes) -> Optional[bool]:
        """Send a report; return whether the run goes on, None if nobody has said so."""
        assert self._url is not None
        try:
            if self._connection is None:
                kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
                self._connection = kind(self._url.netloc, timeout=REPORT_TIMEOUT_SECONDS)
            headers = {"Authorization": self._token, "Content-Type": "application/json"}
            self._connection.request("POST", self._url.path, body, headers)
            with self._connection.getresponse() as response:
                answer = response.read()
            if response.status in (403, 404):
                return False  # the run is over for the service
            return not json.loads(answer)["cancelled"] if response.status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return None


def run_task(text: str) -> str:
    """Run the function that a task names, in whatever process this is; return what came of it. Raises nothing."""
    task = json.loads(text)
    reporter = Reporter(task["url"], task["token"])
    run = JobRun(task["job_id"], 0, task["attempt"], reporter.note, reporter.wake)

    def call(task_id: str, input: Dict[str, Any]) -> Any:
        _limit_memory(task["memory_limit"])
        settle_in(task["place"])
        return _find_function(**task["function"])(task_id, input)

    outcome = reporter.begin(run, task["asks_first"], task["reports_first"])
    if outcome is None:
        _runs[run.job_id] = run
        outcome = run_function(call, run, lambda: task["input"], task["streams"])
    run.end()
    is_binary = isinstance(outcome.data, bytes)
    return to_json({
        "status": outcome.status, "data": None if is_binary else outcome.data,
        "base64": base64.b64encode(outcome.data).decode("ascii") if isinstance(outcome.data, bytes) else None,
        "error": outcome.error, "may_retry": outcome.may_retry, "report": reporter.close()})


# What an executor is given to call with ``eval``: texts, and nothing that it would have to find, so that what stands in
# between (a scheduler that unpickles) needs no csp.py, and a worker on this machine finds it where the service has it.
TRAMPOLINE = ("[__import__('sys').path.extend(entry for entry in path if entry not in __import__('sys').path), "
              "__import__('importlib').import_module(module).run_task(task)][1]")


def own_import_name() -> str:
    """Return the name by which another process can import this module."""
    return import_name(sys.modules[__name__])


# -- a process for each job

class NotStarted(Exception):
    """A task has not been begun, and may be given to the executor again."""


class WorkerDied(Exception):
    """The process of one task has ended without a result; the message says how. No other task is concerned."""


class ProcessFuture(Future):  # type: ignore[type-arg]  # it is no generic class before Python 3.9
    """The future of a call in a process of its own; ``cancel`` also ends a process that is running."""

    def __init__(self) -> None:
        super().__init__()
        self._child: Optional[_Child] = None
        self._is_unwanted = False

    def cancel(self) -> bool:
        """Cancel the call, or end its process: it is told by SIGTERM, and killed KILL_SECONDS later."""
        if super().cancel():
            return True
        self._is_unwanted = True
        self._end_child()
        return False

    def run(self, child: _Child) -> None:
        """Wait for the process's result."""
        self._child = child
        if self._is_unwanted:
            self._end_child()
        try:
            self.set_result(child.get_result())
        except (WorkerDied, BrokenExecutor) as error:
            self.set_exception(error)

    def _end_child(self) -> None:
        if self._child is not None and not self.done():
            self._child.kill(signal.SIGTERM)
            timer = threading.Timer(KILL_SECONDS, self._kill_child)
            timer.daemon = True
            timer.start()

    def _kill_child(self) -> None:
        if self._child is not None and not self.done():
            self._child.kill(SIGKILL)


class ProcessExecutor(Executor):
    """Runs each call in a process of its own, forked from a server process that has imported the job modules already.

    The functions have to be importable, their arguments picklable and their results str; a process that ends without a
    result is a WorkerDied. ``place`` is from ``describe_place``; ``functions`` are what to preload, from ``locate``.
    Where there is no fork, processes are spawned. (multiprocessing's own fork server would run the main module of the
    service again in each process, and cannot preload what has been loaded from a file.)
    """

    def __init__(self, workers: int, place: Mapping[str, Any], functions: Sequence[Location]) -> None:
        self._threads = ThreadPoolExecutor(2 * workers + 8, "csp-process")  # late ones are still being killed
        self._server = _ForkServer(place, functions) if hasattr(os, "fork") else None

    def submit(self, function: Callable[..., str],  # type: ignore[override]  # the class is generic in nothing
               *arguments: Any, **named: Any) -> ProcessFuture:
        """Begin a call; ``cancel`` of the future that is returned ends its process."""
        import pickle
        call = pickle.dumps((function, arguments, named))
        future = ProcessFuture()
        self._threads.submit(self._run, future, call)
        return future

    def shutdown(self, wait: bool = True, **options: Any) -> None:
        """End; with the server process all others end, too."""
        if self._server is not None:
            self._server.close()
        self._threads.shutdown(wait=wait)

    def _run(self, future: ProcessFuture, call: bytes) -> None:
        if future.set_running_or_notify_cancel():
            try:
                child = _ForkedChild(self._server) if self._server is not None else _SpawnedChild()
                with child:
                    child.call(call)
                    future.run(child)
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for the future
                if not future.done():
                    future.set_exception(error)


class _Child:
    """A process that takes one call; ``exited`` becomes readable when it has ended."""

    data: Connection
    exited: Any

    def call(self, call: bytes) -> None:
        """Say what to do; whether it could be said shows when it has ended."""
        with suppress(OSError):
            self.data.send_bytes(call)

    def get_result(self) -> str:
        """Return the result; raise WorkerDied, or BrokenExecutor if the server process has died."""
        from multiprocessing.connection import wait
        wait([self.data, self.exited])
        result: Optional[bytes] = None
        with suppress(OSError, EOFError):
            if self.data.poll(0):  # also what it has sent just before its end
                result = self.data.recv_bytes()
        code = self.exit_code()
        if result is None:
            raise WorkerDied(f"The process of the job was killed by signal {-code} ({_signal_name(-code)})."
                             if code < 0 else
                             f"The process of the job ended with exit code {code} before the job had returned.")
        return result.decode("utf-8")

    def exit_code(self) -> int:
        """Return how the process has ended, a signal as a negative number; wait for its end."""
        raise NotImplementedError

    def kill(self, number: int) -> None:
        """Send the process a signal, if it has not ended."""
        raise NotImplementedError

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self.data.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


class _ForkedChild(_Child):
    """A child of the server process, in a session of its own, so that a signal reaches what it has started, too."""

    def __init__(self, server: _ForkServer) -> None:
        from multiprocessing.connection import Pipe
        self._server = server
        with ExitStack() as opened:
            try:
                self.data, data = map(opened.enter_context, Pipe())
                self.exited, exited = map(opened.enter_context, Pipe(duplex=False))
            except OSError as error:
                raise NotStarted(f"No process can be made: {error.strerror}.") from None
            opened.pop_all()
        try:
            with data, exited:
                server.fork(data, exited)
            self._pid: int = self.exited.recv()
        except (OSError, EOFError) as error:
            self.__exit__()
            raise BrokenExecutor("The server process has ended.") from error
        if self._pid < 0:
            self.__exit__()
            raise NotStarted(f"No process can be made: {os.strerror(-self._pid)}.")

    def exit_code(self) -> int:
        try:
            code: int = self.exited.recv()
            return code
        except (OSError, EOFError):
            with suppress(OSError):
                os.killpg(self._pid, SIGKILL)
            raise BrokenExecutor("The server process has ended.") from None

    def kill(self, number: int) -> None:
        self._server.kill(self._pid, number)

    def __exit__(self, *_: Any) -> None:
        self.data.close()
        self.exited.close()


class _SpawnedChild(_Child):
    """A new process, for systems without fork."""

    def __init__(self) -> None:
        import multiprocessing
        context = multiprocessing.get_context("spawn")
        self.data, data = context.Pipe()
        self._process = context.Process(target=be_child, args=(data,))
        with data:
            self._process.start()
        self.exited = self._process.sentinel

    def exit_code(self) -> int:
        self._process.join()
        return self._process.exitcode or 0

    def kill(self, number: int) -> None:
        (self._process.terminate if number == signal.SIGTERM else self._process.kill)()


_BOOT = """import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module(sys.argv[2]).serve_forks(int(sys.argv[3]))"""


class _ForkServer:
    """The service's end of the server process: asks for forks and signals. Any thread may call the methods."""

    def __init__(self, place: Mapping[str, Any], functions: Sequence[Location]) -> None:
        import subprocess
        from multiprocessing.connection import Pipe
        self._lock = threading.Lock()
        self._control, control = Pipe()
        with control:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), own_import_name(), str(control.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[control.fileno()], start_new_session=True)
        self._control.send_bytes(to_json({"place": place, "functions": functions}).encode("utf-8"))
        self._channel = socket.socket(fileno=os.dup(self._control.fileno()))
        _closed_in_children.add(self)

    def fork(self, *connections: Connection) -> None:
        """Have a child made that takes its call from the first connection; its end is written to the second."""
        from multiprocessing.reduction import sendfds
        with self._lock:
            self._control.send_bytes(b"")
            sendfds(self._channel, [connection.fileno() for connection in connections])  # needs no descriptor

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to the child, if there still is that child."""
        with self._lock, suppress(OSError):
            self._control.send_bytes(f"{number:d} {pid:d}".encode("ascii"))

    def close(self) -> None:
        """End the server process and all its children."""
        import subprocess
        with self._lock:
            self._control.close()
            self._channel.close()
        try:
            self._process.wait(SERVER_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def close_in_child(self) -> None:
        """Let go of the server process in a child that a job has forked."""
        self._control.close()
        self._channel.close()


def serve_forks(descriptor: int) -> None:
    """Be the server process: import the job modules, then fork for each request, until the service's end closes."""
    from multiprocessing.connection import Connection, wait
    control = Connection(descriptor)
    children: Dict[int, Connection] = {}
    told: Set[int] = set()
    for number in (signal.SIGTERM, signal.SIGINT):  # whoever sends one to all processes means the service
        signal.signal(number, signal.SIG_IGN)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        _preload(json.loads(control.recv_bytes()))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        while True:
            ready = wait([control, reader])
            if reader in ready:
                os.read(reader, 4096)
                _reap(children, told)
            if control in ready:
                _obey(control, children, told)
    except (EOFError, OSError, RuntimeError):  # the last: there are no more descriptors here
        for pid in children:
            with suppress(OSError):
                os.killpg(pid, SIGKILL)
        os._exit(0)


def _preload(wanted: Mapping[str, Any]) -> None:
    import gc
    prepare_for_shortage()
    settle_in(wanted["place"])
    for function in wanted["functions"]:
        try:
            _find_function(**function)
        except BaseException as error:  # noqa: BLE001 - the job's own process will say it, where somebody sees it
            log.debug("%s cannot be loaded beforehand: %s", function["module"], _safe_text(error))
    for number in (signal.SIGTERM, signal.SIGINT):  # a module may have set its own
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()  # or each child would write what the modules have printed
    gc.collect()
    gc.freeze()  # so that children share the memory with this process


def _obey(control: Connection, children: Dict[int, Connection], told: Set[int]) -> None:
    """Fork a child, or send one a signal; ``told`` are those that have been sent one."""
    from multiprocessing.connection import Connection
    from multiprocessing.reduction import recvfds
    words = control.recv_bytes().split()
    if words:
        number, pid = map(int, words)
        if pid in children:
            told.add(pid)
            with suppress(OSError):
                os.killpg(pid, number)
        return
    with socket.socket(fileno=os.dup(control.fileno())) as channel:
        data, exited = [Connection(descriptor) for descriptor in recvfds(channel, 2)]
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or 1)
    if pid == 0:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for connection in (control, exited, *children.values()):
            connection.close()
        be_child(data)
    data.close()
    with suppress(OSError):
        exited.send(pid)
    if pid > 0:
        children[pid] = exited
    else:
        exited.close()


def _reap(children: Dict[int, Connection], told: Set[int]) -> None:
    for pid, exited in list(children.items()):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            del children[pid]
            if os.WIFSIGNALED(status) or pid in told:
                told.discard(pid)
                with suppress(OSError):
                    os.killpg(pid, SIGKILL)  # what it had started
            with exited, suppress(OSError):
                exited.send(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def be_child(data: Connection) -> NoReturn:
    """Be a process that takes one call: make it, send its result, end."""
    import pickle
    code = 1
    try:
        function, arguments, named = pickle.loads(data.recv_bytes())
        data.send_bytes(function(*arguments, **named).encode("utf-8"))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, this process has to end here
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


# -- the executor of a service

class Engine:
    """Hands jobs to the executor that ``make`` makes, and makes it anew when it has broken.

    ``is_here``: its processes are the service's own, which may know the secrets among the settings. Any thread may call
    the methods.
    """

    def __init__(self, make: Callable[[], Executor], settings: Mapping[str, Any], is_here: bool) -> None:
        self._make, self._settings, self._is_here = make, settings, is_here
        self._lock = threading.Lock()
        self._making = threading.Lock()  # held while the factory works, which may take for ever
        self._is_closed = False
        self._refusals = 0
        self._executor: Optional[Executor] = make()
        self._place = describe_place(settings, is_here)
        self._url: Optional[str] = None
        self._is_url_known = threading.Event()

    def reachable_at(self, url: Optional[str]) -> None:
        """Say under which address workers reach the service, unless the setting URL does; None: under none."""
        self._url = self._settings["URL"] or url
        self._is_url_known.set()

    def describe(self, job: Job, job_type: JobType, run: RemoteRun) -> str:
        """Return the job's task; raise ValueError if its function cannot be found elsewhere."""
        if not self._is_url_known.wait(ADDRESS_SECONDS):
            self.reachable_at(None)
        return describe_task(job, job_type, run, self._url, self._place, self._is_here)

    def submit(self, task: str, job_type: JobType, run: RemoteRun, then: Callable[[Future[str]], Any]) -> Future[str]:
        """Hand a task over, ``then`` being called when it is done; raise whatever the executor raises."""
        run.asks_first = job_type.at_most_once and not self._is_here
        run.executor = executor = self._get_executor()
        texts = {"path": sys.path[:], "module": own_import_name(), "task": task}
        run.future = executor.submit(eval, TRAMPOLINE, texts)
        run.future.add_done_callback(then)
        self._refusals = 0
        return run.future

    def _get_executor(self) -> Executor:
        with self._making:
            if self._executor is None and not self._is_closed:
                made = self._make()
                with self._lock:
                    self._executor = None if self._is_closed else made
                if self._executor is None:
                    self._shut_down(made)
            executor = self._executor
        if executor is None:
            raise RuntimeError("The service has stopped.")
        return executor

    def note_refusal(self, run: RemoteRun, error: BaseException) -> None:
        """Note that the executor has not taken a job; if that is no exception, make another for the next one."""
        self._refusals += 1
        if isinstance(error, BrokenExecutor) or self._refusals >= MAX_REFUSALS:
            self._refusals = 0
            self.discard(run)

    def discard(self, run: RemoteRun) -> None:
        """Make another executor for the next job: the one of this run is broken."""
        with self._lock:
            if self._executor is run.executor:
                self._executor = None
        self._shut_down(run.executor)

    def close(self) -> None:
        """End the executor; what still runs in it is not waited for."""
        with self._lock:
            self._is_closed = True
            executor = self._executor
        self._shut_down(executor)

    @staticmethod
    def _shut_down(executor: Optional[Executor]) -> None:
        if executor is not None:
            try:
                executor.shutdown(wait=False)
            except Exception as error:  # noqa: BLE001 - an executor is foreign code, and this one is at its end
                log.debug("an executor cannot be shut down: %s", _safe_text(error))


def make_engine(settings: Mapping[str, Any], registry: Registry) -> Optional[Engine]:
    """Return what EXECUTOR asks for, None for threads; raise StartError if it cannot be had."""
    name: str = settings["EXECUTOR"]
    if name == "thread":
        return None
    types = [job_type for job_type in map(registry.get, registry.names()) if job_type and not job_type.synchronous]
    try:
        functions = [locate(job_type.function) for job_type in types]
    except ValueError as error:
        raise StartError(str(error)) from None
    if name == "process":
        place = describe_place(settings, is_here=True)
        return Engine(lambda: ProcessExecutor(settings["WORKERS"], place, functions), settings, is_here=True)
    module, _, attribute = name.rpartition(":")
    factory = getattr(load_module(module), attribute, None)
    if not callable(factory):
        raise StartError(f"The setting EXECUTOR names {attribute}, and {module} has no such function.")
    try:
        return Engine(functools.partial(_make_executor, factory, settings), settings, is_here=False)
    except Exception as error:
        raise StartError(f"The executor {name} cannot be made: {type(error).__name__}: {_safe_text(error)}.") from error


# What threads of the service import late. While one does it holds that module's lock, and a process that an executor
# forks meanwhile has the lock without the thread: whatever imports the module there waits for ever.
_IMPORTED_BY_THREADS = ("_strptime", "csv", "encodings.idna", "hashlib", "hmac", "inspect", "shlex", "urllib.request")


def _make_executor(factory: Callable[[Mapping[str, Any]], Any], settings: Mapping[str, Any]) -> Executor:
    prepare_for_shortage()
    for name in _IMPORTED_BY_THREADS:
        importlib.import_module(name)
    executor = factory(settings)
    if not callable(getattr(executor, "submit", None)) or not callable(getattr(executor, "shutdown", None)):
        raise TypeError(f"it has returned {type(executor).__name__}, which is no concurrent.futures.Executor")
    if "multiprocessing" in sys.modules:
        import multiprocessing.util
        multiprocessing.util.register_after_fork(executor, lambda _: _end_with_parent())
    return executor  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Runner
#
# One thread claims as many queued jobs as there are free places and hands them to the executor; the backlog stays on
# disk. A job's function runs in the executor's thread (a synchronous one in the thread that asked); its outcome goes
# to the store, which drops it if the job was ended otherwise meanwhile. What was running when the process died is
# found at the next start and queued again, or ended as an error if it may not run again. Lock order: the runner's
# condition is held for dictionary work only, never while the store is asked.
# ---------------------------------------------------------------------------------------------------------------------

ABANDONED_THREADS = 1000  # functions past their timeout cannot be stopped in a thread: so many may linger
SWITCH_SECONDS = (0.005, 0.0005)  # sys.setswitchinterval: usually, and while jobs run longer than
LONG_JOB_SECONDS = 0.25
HOLD_TURNS = 50  # of so many seconds without one before the thread that looks after them sleeps
HOLD_SECONDS = 0.02  # a synchronous job that takes longer is stored before it ends, too; and for each character that
HOLD_SECONDS_PER_CHARACTER = 2.0**-25  # was sent, so much: to write a large one twice is no help to anybody
PROGRESS_SECONDS = 0.2  # how often progress is written, however often it is set
ALONE_SECONDS = 60.0  # how long a suspect runs alone: whoever kills the process must not take the others along again
STOPPED = "The service stopped while the job was running."


class Runner:
    """Runs jobs: queued ones at most ``workers`` at a time, synchronous ones in the caller's thread.

    ``notify_callback`` is called with host and epoch seconds when a callback has become due. Queued jobs run in threads
    or, with an ``engine``, in its executor. Any thread may call the public methods.
    """

    def __init__(self, store: Store, registry: Registry, workers: int,
                 notify_callback: Callable[[str, float], None], engine: Optional[Engine] = None,
                 metrics: Optional[Metrics] = None) -> None:
        self._store, self._registry, self._workers = store, registry, workers
        self._metrics = metrics or Metrics()
        self._notify_callback = notify_callback
        self._threads = ThreadPoolExecutor(workers + ABANDONED_THREADS, "csp-job")
        self._engine = engine
        self._condition = threading.Condition()  # guards what follows
        self._running: Dict[int, Tuple[JobRun, Job, Optional[float]]] = {}  # by seq; the float: deadline (monotonic)
        self._remote: Dict[str, RemoteRun] = {}  # by job id
        self._queued_running = 0
        self._alone_until = 0.0  # monotonic seconds
        self._to_stop: Set[int] = set()  # told to stop between being claimed and being begun
        self._unrecorded: List[Callable[[], Any]] = []  # what the disk could not take, to be called again
        self._held: Dict[int, Tuple[Job, JobRun]] = {}  # synchronous jobs that may end before they are stored, by seq
        self._has_held = threading.Event()
        self.may_adjust_switching = False  # the interval is the whole process's
        self._is_woken = True
        self._is_paused = False
        self._is_stopping = False
        self._recover()
        self._thread = threading.Thread(target=self._run, name="csp-runner", daemon=True)
        self._thread.start()
        threading.Thread(target=self._store_held_jobs, name="csp-holder", daemon=True).start()

    @property
    def running(self) -> int:
        """How many jobs run now."""
        return len(self._running)

    def wake(self) -> None:
        """Say that there may be a job to run."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def pause(self) -> None:
        """Claim no more jobs: the service is about to stop."""
        self._is_paused = True

    def stop(self, grace_seconds: float) -> bool:
        """Claim no more jobs and wait for the running ones; return whether all have ended and are recorded.

        What has not ended is left to the next start.
        """
        with self._condition:
            self._is_stopping = True
            self._condition.notify_all()
        self._has_held.set()
        self._thread.join()
        deadline = time.monotonic() + grace_seconds
        with self._condition:
            self._condition.wait_for(lambda: not self._running, grace_seconds)
            left = [(run, job) for run, job, _ in self._running.values()]
        for run, job in left:
            run.ended = True
            run.tell_to_stop()
            try:
                self._leave(job, run)
            except Unavailable as error:
                log.warning("job %s is found as running at the next start: %s", job.job_id, error.message)
        while self._unrecorded and time.monotonic() < deadline:
            time.sleep(0.1)
            self._record_again()
        self._threads.shutdown(wait=False)
        if self._engine is not None:
            self._engine.close()
        return not left and not self._unrecorded

    def _leave(self, job: Job, run: Optional[JobRun], run_at: float = AFTER_STOP, reason: str = STOPPED) -> None:
        """Queue a job again whose run was ended from outside, or end it with the ``reason`` if it may not run again."""
        job_type = self._registry.get(job.job_type)
        if job.cancelled:
            self._store.mark_finished(job, failure(CANCELLED), run, self._due(job))
        elif job.synchronous or (job_type is not None and job_type.at_most_once):
            outcome = failure(f"{reason} {NOT_AGAIN}")
            self._store.mark_finished(job, outcome, run, self._due(job))
        else:
            self._store.mark_queued(job, run_at, run, self.wake)

    def run_now(self, job: Job, is_new_id: bool, read_input: Callable[[], Dict[str, Any]],
                ) -> Tuple[JobRun, Union[Job, None, Iterator[bytes]]]:
        """Run a synchronous job in this thread; return how it ended, or a stream that ends the job when it ends.

        None stands for a job that was deleted meanwhile. ``read_input`` returns the submitted object (and should keep
        none: it may be large). ``is_new_id``: this service made the id, so that nobody can have taken it, and one
        commit will do: if the job ends soon, its row is stored when it has ended, not before.
        """
        job_type = self._registry.get(job.job_type)
        assert job_type is not None, "a submission has been checked"
        if not is_new_id:
            self._store.add_job(job, lambda: None).wait()
        run = self._begin(job, job_type)
        run.stored = []
        if is_new_id:
            run.new_job = job
            self._held[job.seq] = job, run
            if not self._has_held.is_set():
                self._has_held.set()
        try:
            outcome = self._call(job_type, run, read_input)
            if callable(outcome):
                self._store_held(job.seq, must_wait=True)
        except BaseException as error:
            with suppress(Unavailable):
                self._finish(job, failure(_safe_text(error)), run)
            raise
        if callable(outcome):
            return run, self._stream(job, run, outcome)
        return run, self._finish(job, outcome, run)

    def _store_held(self, seq: int, must_wait: bool = False) -> None:
        """Store the job as pending if it is still held."""
        _, run = self._held.pop(seq, (None, None))
        if run is not None:
            write = self._store.add_run_output(run)
            if must_wait:
                write.wait()

    def _store_held_jobs(self) -> None:
        """Store held jobs after HOLD_SECONDS: others want to see what runs. Sleeps while there have been none."""
        pause = threading.Event()
        quiet_turns = 0
        while not self._is_stopping:
            if quiet_turns > HOLD_TURNS:
                self._has_held.clear()
                quiet_turns = 0 if self._held else quiet_turns
                self._has_held.wait(0.0 if self._held else None)
            pause.wait(HOLD_SECONDS)
            quiet_turns = 0 if self._held else quiet_turns + 1
            late = time.monotonic() - HOLD_SECONDS
            for seq in [seq for seq, (job, run) in list(self._held.items())
                        if run.started + len(job.sent_data or "") * HOLD_SECONDS_PER_CHARACTER < late]:
                with suppress(Unavailable):  # its end tries again
                    self._store_held(seq)

    def cancel(self, job: Job) -> None:
        """Cancel the job: a queued one ends as an error, a running one is told to stop; raise Conflict if finished."""
        if job.state == QUEUED and self._store.mark_finished(job, failure(CANCELLED), None, self._due(job)):
            return
        if self._store.mark_cancelled(job):
            self.tell_to_stop(job)
            return
        current = self._store.get_job(job.job_id)
        if current is None or current.status != PENDING:
            raise Conflict(f"job {job.job_id} has already finished")
        self.cancel(current)

    def tell_to_stop(self, job: Job) -> None:
        """Set the flag that the ``check_cancelled`` of the running job looks at."""
        with self._condition:
            entry = self._running.get(job.seq)
            if entry is None:
                self._to_stop.add(job.seq)
        if entry is not None:
            entry[0].tell_to_stop()

    # -- the loop

    def _run(self) -> None:
        timeout: Optional[float] = 0.0
        while True:
            with self._condition:
                if not self._is_woken and not self._is_stopping:
                    self._condition.wait(timeout)
                if self._is_stopping:
                    return
                self._is_woken = False
                running, alone = self._queued_running, self._alone_until - time.monotonic()
                running = self._workers if self._is_paused else running
            try:
                timeout = self._turn(running, alone if running else 0.0)
            except Unavailable:
                timeout = 1.0
            except Exception:  # noqa: BLE001 - the worker loop: without it no job would ever run again
                log.exception("the runner failed; it goes on in a second")
                timeout = 1.0

    def _turn(self, running: int, alone_seconds: float) -> Optional[float]:
        """Do what is to be done now; return in how many seconds there may be more, None if only a wake can tell."""
        waits: List[Optional[float]] = []
        self._end_late_runs()
        if alone_seconds > 0:
            waits.append(alone_seconds)
        elif running < self._workers:
            now = time.time()
            claim = self._store.claim_jobs(self._workers - running, now, self._is_calm)
            self._alone_until = time.monotonic() + ALONE_SECONDS if claim.is_suspect and claim.jobs else 0.0
            for job in claim.jobs:
                self._start(job)
            if claim.is_suspect:
                waits.append(ALONE_SECONDS if claim.jobs else 1.0)
            elif claim.next_at is not None and len(claim.jobs) < self._workers - running:
                waits.append(claim.next_at - now if claim.next_at > now else 1.0)  # what is due and was left: a suspect
        waits += [self._end_late_runs(), self._write_progress(), self._record_again(),  # know the runs just started
                  self._adjust_switching()]
        return min((wait for wait in waits if wait is not None), default=None)

    def _adjust_switching(self) -> Optional[float]:
        """Let threads take turns more often while jobs run for long: one that computes would hold requests up.

        Return when to look again. (Short turns all the time would cost a fifth of the requests of a busy service.)
        """
        if not self.may_adjust_switching:
            return None
        now = time.monotonic()
        with self._condition:
            ages = [now - run.started for run, job, _ in self._running.values() if not job.synchronous]
        wanted = SWITCH_SECONDS[1] if any(age >= LONG_JOB_SECONDS for age in ages) else SWITCH_SECONDS[0]
        if abs(sys.getswitchinterval() - wanted) > 1e-6:
            sys.setswitchinterval(wanted)
        return min((LONG_JOB_SECONDS - age for age in ages if age < LONG_JOB_SECONDS), default=None)

    def _is_calm(self) -> bool:
        """Whether all jobs have been running for so long that they are not what kills the process."""
        since = time.monotonic() - ALONE_SECONDS
        with self._condition:
            return all(run.started < since for run, job, _ in self._running.values() if not job.synchronous)

    def _start(self, job: Job) -> None:
        """Hand a claimed job to the executor."""
        job_type = self._registry.get(job.job_type)
        run = self._begin(job, job_type)
        if job_type is None:
            available = ", ".join(self._registry.names())
            outcome = failure(f"Job type {job.job_type} not available. Available job types are {available}")
            self._end(job, outcome, run)
        elif job.cancelled or run.cancelled.is_set():
            self._end(job, failure(CANCELLED), run)
        else:
            try:
                self._threads.submit(self._work, job, job_type, run)
            except RuntimeError as error:  # no more threads, and yet it may be taken by one that there is
                if run.take():
                    self._requeue(job, time.time() + BACKOFF_SECONDS[0], run, f"It could not be started: {error}.")

    def _work(self, job: Job, job_type: JobType, run: JobRun) -> None:
        if not run.take():
            return
        if isinstance(run, RemoteRun):
            self._work_elsewhere(job, job_type, run)
        else:
            outcome = run_function(job_type.function, run, job.read_input, job_type.synchronous)
            self._conclude(job, job_type, run, outcome)

    def _conclude(self, job: Job, job_type: JobType, run: JobRun, outcome: Outcome) -> None:
        """Record how an attempt at a queued job has ended, or that there is another."""
        if outcome.may_retry and job.failures < job_type.retries and not run.cancelled.is_set():
            try:
                return self._retry(job, outcome, run)
            except Exception:  # noqa: BLE001 - a defect of ours must not leave the job pending and its place taken
                log.exception("job %s: another attempt cannot be arranged", job.job_id)
        self._end(job, outcome, run)

    def _retry(self, job: Job, outcome: Outcome, run: JobRun) -> None:
        pause = min(BACKOFF_SECONDS[0] * 2 ** min(job.failures, 20), BACKOFF_SECONDS[1])
        delay = pause * jitter(BACKOFF_JITTER)
        message = json.loads(outcome.error or "{}").get("message")
        self._requeue(job._replace(failures=job.failures + 1), time.time() + delay, run,
                      f"Attempt {job.attempts} failed ({message}); the next is in {delay:.1f} seconds.")

    def _requeue(self, job: Job, run_at: float, run: JobRun, message: str) -> None:
        run.add_message("WARNING", message)
        run.ended = True
        try:
            self._record(functools.partial(self._store.mark_queued, job, run_at, run, self.wake))
        except Unavailable:
            log.debug("that job %s runs again is kept until it can be stored", job.job_id)
        finally:
            self._forget(run)

    # -- in an executor

    def _work_elsewhere(self, job: Job, job_type: JobType, run: RemoteRun) -> None:
        """Hand a job to the executor, which may take its time, too."""
        assert self._engine is not None
        try:
            task = self._engine.describe(job, job_type, run)
        except ValueError as error:
            self._end(job, failure(_safe_text(error)), run)
            return
        try:
            self._engine.submit(task, job_type, run, functools.partial(self._settle_soon, job, job_type, run))
        except Exception as error:  # noqa: BLE001 - an executor is foreign code and may fail in any way
            self._engine.note_refusal(run, error)
            if not run.ended:
                self._start_again_later(job, run, error)
        if run.cancelled.is_set():  # told to stop before there was a future
            run.tell_to_stop()

    def _start_again_later(self, job: Job, run: JobRun, error: BaseException) -> None:
        self._requeue(job, time.time() + BACKOFF_SECONDS[0], run,
                      f"It could not be started: {type(error).__name__}: {_safe_text(error)}")

    def _settle_soon(self, job: Job, job_type: JobType, run: RemoteRun, future: Future[str]) -> None:
        """Settle in a thread of our own: an executor's must not wait for the disk."""
        try:
            self._threads.submit(self._settle, job, job_type, run, future)
        except RuntimeError:  # the interpreter is about to end, or there are no more threads
            self._settle(job, job_type, run, future)

    def _settle(self, job: Job, job_type: JobType, run: RemoteRun, future: Future[str]) -> None:
        """Record what has come of a job in the executor; what comes late is dropped."""
        if run.ended:
            return
        try:
            outcome, report = read_result(future.result())
            run.take_report(report)
            if outcome.status == ERROR and run.cancelled.is_set():
                outcome = failure(CANCELLED)  # whatever it has made of its being told to stop
        except BaseException as error:  # noqa: BLE001 - an executor is foreign code and may fail in any way
            if run.cancelled.is_set():
                outcome = failure(CANCELLED)
            elif isinstance(error, WorkerDied):
                outcome = failure(str(error), may_retry=not job_type.at_most_once)
            elif isinstance(error, NotStarted):
                return self._start_again_later(job, run, error)
            else:
                return self._give_up_attempt(job, run, error)
        self._conclude(job, job_type, run, outcome)

    def _give_up_attempt(self, job: Job, run: RemoteRun, error: BaseException) -> None:
        """The executor has lost the job: that counts as an attempt, as a crash does."""
        if isinstance(error, BrokenExecutor) and self._engine is not None:
            self._engine.discard(run)
        if not run.may_have_begun:
            return self._start_again_later(job, run, error)
        reason = f"The executor has failed: {type(error).__name__}: {_safe_text(error)}"
        run.add_message("ERROR", reason)
        run.ended = True
        pause = BACKOFF_SECONDS[0] * 2 ** job.crashes
        run_at = AFTER_CRASH if isinstance(error, BrokenExecutor) else time.time() + pause
        try:
            self._record(functools.partial(self._count_crash, job, run, run_at, reason))
        except Unavailable:
            log.debug("that job %s was lost by the executor is kept until it can be stored", job.job_id)
        finally:
            self._forget(run)

    def find_remote(self, job_id: str, token: str) -> Optional[RemoteRun]:
        """Return the run elsewhere of that job if this is its token."""
        run = self._remote.get(job_id)
        return run if run is not None and is_same(token, run.token) else None

    def take_report(self, run: RemoteRun, report: Mapping[str, Any]) -> bool:
        """Take what a run elsewhere reports; return whether it goes on. Its timeout counts from when it began there."""
        goes_on = run.take_report(report)
        with self._condition:
            entry = self._running.get(run.seq)
            if entry is not None and entry[0] is run and entry[2] is not None:
                job_type = self._registry.get(entry[1].job_type)
                if job_type is not None and job_type.timeout is not None:
                    self._running[run.seq] = (run, entry[1], run.begun + job_type.timeout)
        return goes_on and not run.ended

    # -- runs

    def _begin(self, job: Job, job_type: Optional[JobType]) -> JobRun:
        timeout_seconds = job_type.timeout if job_type else None
        if self._engine is None or job.synchronous:
            run = JobRun(job.job_id, job.seq, job.attempts, self._write_output, self.wake)
        else:
            is_once = job_type is not None and job_type.at_most_once
            run = self._remote[job.job_id] = RemoteRun(job, is_once, self._write_output, self.wake)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        _runs[job.job_id] = run
        with self._condition:
            self._running[job.seq] = (run, job, deadline)
            self._queued_running += not job.synchronous
            if job.seq in self._to_stop:
                self._to_stop.discard(job.seq)
                run.cancelled.set()
        return run

    def _forget(self, run: JobRun) -> None:
        """The run is over: free its place."""
        run.end()
        with self._condition:
            self._to_stop.discard(run.seq)
            if self._remote.get(run.job_id) is run:
                del self._remote[run.job_id]
            entry = self._running.get(run.seq)
            if entry is not None and entry[0] is run:
                del self._running[run.seq]
                self._queued_running -= not entry[1].synchronous
            if entry is None or not entry[1].synchronous or self._is_stopping:
                self._is_woken = True
                self._condition.notify_all()

    def _due(self, job: Job) -> Callable[[], None]:
        """Return what to call when the job's end is durable."""
        if job.callback_host is None:
            return lambda: None
        return functools.partial(self._notify_callback, job.callback_host, time.time())

    def _finish(self, job: Job, outcome: Outcome, run: JobRun) -> Optional[Job]:
        """Record the outcome and return the finished job, None if it did not count.

        If the disk cannot take it now, it is kept and recorded later, and Unavailable is raised.
        """
        run.ended = True
        self._metrics.jobs.add((("job_type", job.job_type), ("status", outcome.status)),
                               time.monotonic() - run.started)
        self._held.pop(job.seq, None)
        try:
            return self._record(functools.partial(self._record_outcome, job, outcome, run))
        finally:
            self._forget(run)

    def _record_outcome(self, job: Job, outcome: Outcome, run: JobRun) -> Optional[Job]:
        """Store the outcome; one that cannot be stored becomes an error that says why."""
        try:
            return self._store.mark_finished(job, outcome, run, self._due(job))
        except Unavailable:
            raise
        except Exception as error:  # noqa: BLE001 - part of the job run, which has to end somehow
            run.lines.clear()
            return self._store.mark_finished(job, failure(_safe_text(error) or type(error).__name__), run,
                                             self._due(job))

    def _end(self, job: Job, outcome: Outcome, run: JobRun) -> None:
        """Record the outcome of a queued job, now or later: nobody waits for it."""
        try:
            self._finish(job, outcome, run)
        except Unavailable:
            log.debug("the outcome of job %s is kept until it can be stored", job.job_id)

    def _record(self, write: Callable[[], T]) -> T:
        """Make a write; if the disk cannot take it now, keep it for later and raise Unavailable."""
        try:
            return write()
        except Unavailable:
            with self._condition:
                self._unrecorded.append(write)
                self._is_woken = True
                self._condition.notify_all()
            raise

    def _record_again(self) -> Optional[float]:
        """Try what the disk could not take before; return in how many seconds to try the rest."""
        with self._condition:
            writes, self._unrecorded = self._unrecorded, []
        for index, write in enumerate(writes):
            try:
                write()
            except Unavailable:
                with self._condition:
                    self._unrecorded += writes[index:]
                return 1.0
            except Exception:  # noqa: BLE001 - the worker loop: the other outcomes must not be lost with this one
                log.exception("something that could not be stored before cannot be stored at all")
        return None

    def _end_late_runs(self) -> Optional[float]:
        """End queued jobs that are past their timeout; their threads go on, unheard. Return when the next may be."""
        now = time.monotonic()
        with self._condition:
            timed = [entry for entry in self._running.values() if entry[2] is not None and not entry[1].synchronous]
        late = [(run, job) for run, job, deadline in timed if deadline is not None and deadline <= now]
        for run, _ in late:  # all at once, however long it takes to write it down
            run.ended = True  # before it is told: that it dies of that is not its outcome
            run.tell_to_stop()
        for run, job in late:
            self._end(job, self._timeout_outcome(job), run)
        return min((deadline - now for _, _, deadline in timed if deadline is not None and deadline > now),
                   default=None)

    def _timeout_outcome(self, job: Job) -> Outcome:
        job_type = self._registry.get(job.job_type)
        return failure(f"The job took longer than its timeout of {job_type.timeout if job_type else 0:g} seconds.")

    def _write_progress(self) -> Optional[float]:
        """Write the progress of runs, a while after their last, and what was refused; return when to look again."""
        now = time.monotonic()
        with self._condition:
            runs = [run for run, _, _ in self._running.values() if run.is_unwritten]
        waits = []
        for run in runs:
            wait = run.progress_written + PROGRESS_SECONDS - now
            if wait > 0:
                waits.append(wait)
            elif run.seq not in self._held and not run.is_queued:
                self._store.add_run_output(run)
        return min(waits, default=None)

    def _write_output(self, run: JobRun, must_wait: bool) -> None:
        """Send a run's log to the store; a job that is far ahead of the disk waits, also while the disk is ill."""
        if run.seq in self._held:
            if not must_wait and run.line_count < MANY_LINES:
                return  # it goes with the job
            self._held.pop(run.seq, None)
        while True:
            try:
                write = self._store.add_run_output(run)
                if must_wait:
                    write.wait()
                return
            except Unavailable:
                if not must_wait or run.ended or self._is_stopping:
                    return
                time.sleep(1.0)

    # -- synchronous jobs

    def _call(self, job_type: JobType, run: JobRun, read_input: Callable[[], Dict[str, Any]],
              ) -> Union[Outcome, Callable[[], Iterable[Any]]]:
        """Call the function in this thread or, where it has a timeout, in one that can be left behind."""
        if job_type.timeout is None:
            return call_function(job_type.function, run, read_input, streams=True)
        def call() -> Union[Outcome, Callable[[], Iterable[Any]]]:
            return call_function(job_type.function, run, read_input, True) if run.take() else failure(CANCELLED)
        try:
            return self._threads.submit(call).result(job_type.timeout)
        except RuntimeError as error:  # no more threads
            if run.take():
                return failure(f"It could not be started: {error}.")
            raise
        except FutureTimeoutError:
            run.cancelled.set()
            return failure(f"The job took longer than its timeout of {job_type.timeout:g} seconds.")

    def _stream(self, job: Job, run: JobRun, function: Callable[[], Iterable[Any]]) -> Iterator[bytes]:
        """Yield what iterating ``function()`` yields, as bytes; end the job when that ends."""
        outcome = failure("The client went away before the result was complete.")
        token = _current_run.set(run)
        try:
            for part in function():
                yield part if isinstance(part, bytes) else _encode_part(part)
            outcome = Outcome(COMPLETE)
        except GeneratorExit:
            raise
        except BaseException as error:
            is_cancelled = isinstance(error, JobCancelled)
            outcome = failure(CANCELLED) if is_cancelled else Outcome(ERROR, error=error_document(error))
            raise StreamBroken from error
        finally:
            try:
                _current_run.reset(token)
            except ValueError:  # closed by another thread, where it was never set
                log.debug("the stream of job %s was closed by another thread", job.job_id)
            finally:
                self._finish(job, outcome, run)

    # -- after a crash

    def _recover(self) -> None:
        """Decide on the jobs that were running when the process before this one ended."""
        for job in self._store.list_running():
            try:
                self._record(functools.partial(self._recover_job, job))
            except Unavailable as error:
                log.warning("job %s is taken up when the database can be written: %s", job.job_id, error.message)

    def _recover_job(self, job: Job) -> None:
        self._count_crash(job, None, AFTER_CRASH, STOPPED)

    def _count_crash(self, job: Job, run: Optional[JobRun], run_at: float, reason: str) -> None:
        """Queue a job again whose attempt ended with what ran it, unless it was its last or it may not run again."""
        job_type = self._registry.get(job.job_type)
        limit = max(MAX_ATTEMPTS, (job_type.retries if job_type else 0) + 1)
        attempts = job.crashes + job.failures + 1  # without those that an orderly stop has ended
        if attempts >= limit and not job.cancelled and not job.synchronous:
            outcome = failure(f"{reason} That was attempt {attempts} of {limit}, so it is not run again.")
            self._store.mark_finished(job, outcome, run, self._due(job))
        else:
            self._leave(job._replace(crashes=job.crashes + 1), run, run_at, reason)


# ---------------------------------------------------------------------------------------------------------------------
# Requests and responses
#
# Values without sockets. A Request has been parsed strictly (see Transports) before anything here sees it; a Response
# is a status, header fields and a body, or an iterator of bytes where a result is streamed.
# ---------------------------------------------------------------------------------------------------------------------

ANYBODY, JOB_KEY, ADMIN = "all", "job key, admin, secure key", "admin, secure key"  # who may use a route
RUN_TOKEN = "token of the run"
MAX_OFFSET = 10**9  # SQLite counts to 2^63, and what skips so much is not worth waiting for
MAX_METADATA_FILTERS = 10
MAX_LISTED = 10_000  # job ids in one answer; the Link header leads on
MAX_FORM_BYTES = 2**18  # parsing takes many times as much memory
MAX_FORM_FIELDS = 200  # a page of jobs has a box for each
SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
)
_REASONS = {status.value: status.phrase for status in http.HTTPStatus}
SANDBOX = "sandbox; default-src 'none'; frame-ancestors 'none'"
_MEDIA_TYPE = (r"[!#$&^_.+\-0-9A-Za-z]{1,127}/[!#$&^_.+\-0-9A-Za-z]{1,127}"
               r"(?: *; *[!#$&^_.+\-0-9A-Za-z]+="
               r"(?:[!#$&^_.+\-0-9A-Za-z]+|\"[\x20\x21\x23-\x5b\x5d-\x7e]*\"))*")
_INERT_TYPE = (r"(?i)(?:text/plain|text/csv|application/json|image/(?:png|jpeg|gif|webp)|audio/[^;]+|video/[^;]+)"
               r"(?:;.*|\Z)")
_LOCAL_PATH = r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*"


class Request:
    """A request: ``path`` as sent (percent-encoded), ``headers`` by lower-case name, ``remote`` the client's address,
    ``scheme`` as the client used it (behind a trusted proxy: what the proxy says)."""

    __slots__ = ("method", "path", "query_string", "headers", "body", "remote", "scheme")

    def __init__(self, method: str, target: str, headers: Optional[Mapping[str, str]] = None, body: bytes = b"",
                 remote: str = "", scheme: str = "http") -> None:
        self.method = method
        self.path, _, self.query_string = target.partition("?")
        self.headers = headers or {}
        self.body = body
        self.remote = remote
        self.scheme = scheme

    @property
    def target(self) -> str:
        """The path with its query."""
        return f"{self.path}?{self.query_string}" if self.query_string else self.path

    @property
    def query(self) -> List[Tuple[str, str]]:
        """The query's parameters in order; raises Conflict if there are too many."""
        try:
            return urllib.parse.parse_qsl(self.query_string, keep_blank_values=True, max_num_fields=50)
        except ValueError:
            raise Conflict("The query has too many parameters.") from None

    def number(self, name: str, default: Optional[int], maximum: int = 2**63 - 1) -> Optional[int]:
        """Return the query's parameter as a whole number from 0 to ``maximum``; raise Conflict if it is none."""
        for key, value in self.query:
            if key == name:
                if not re.fullmatch("[0-9]{1,19}", value) or int(value) > maximum:
                    raise Conflict(f"{name} has to be a whole number from 0 to {maximum}")
                return int(value)
        return default

    @property
    def is_json(self) -> bool:
        """Whether the content type says that the body is JSON (RFC 8259, RFC 6839)."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))

    @property
    def wants_html(self) -> bool:
        """Whether the client prefers pages to JSON, as browsers do (RFC 9110, section 12.5.1)."""
        accept = self.headers.get("accept", "")
        if "text/html" not in accept or "_format=json" in self.query_string.split("&"):
            return False
        weights = {"application/json": 0.0}
        for part in accept.split(","):
            kind, _, parameters = part.partition(";")
            weight = re.search(r"(?:^|;)\s*q=([01](?:\.[0-9]{0,3})?)\s*$", parameters)
            weights[kind.strip().lower()] = float(weight[1]) if weight else 1.0
        return weights.get("text/html", 0.0) > 0.0 and weights["text/html"] >= weights["application/json"]

    @property
    def fields(self) -> List[Tuple[str, str]]:
        """The fields of a URL-encoded form in order; none if the body is no such form."""
        if not self.headers.get("content-type", "").lower().startswith("application/x-www-form-urlencoded"):
            return []
        if len(self.body) > MAX_FORM_BYTES:
            raise CspError(413, f"A form may have {MAX_FORM_BYTES:,} bytes; send JSON to /job for more.")
        try:
            return urllib.parse.parse_qsl(self.body.decode("ascii", "replace"), keep_blank_values=True,
                                          max_num_fields=MAX_FORM_FIELDS)
        except ValueError:
            raise CspError(413, f"A form may have {MAX_FORM_FIELDS} fields.") from None

    @property
    def form(self) -> Dict[str, str]:
        """The fields of a URL-encoded form by name, the last of each."""
        return dict(self.fields)

    @property
    def preferences(self) -> Dict[str, str]:
        """The preferences of Prefer headers, by lower-case name, the first of each (RFC 7240, section 2)."""
        found: Dict[str, str] = {}
        for preference in re.findall(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+', self.headers.get("prefer", "")):
            name, _, value = preference.partition(";")[0].partition("=")
            found.setdefault(name.strip().lower(), value.strip().strip('"'))
        return found

    def cookie(self, name: str) -> Optional[str]:
        """Return the cookie's value (RFC 6265, section 5.4), None if it was not sent."""
        for pair in self.headers.get("cookie", "").split(";"):
            key, _, value = pair.strip().partition("=")
            if key == name:
                return value
        return None


class Response:
    """An answer. ``body`` is bytes, or Pieces of them; or an iterator that is sent as it comes and always closed."""

    __slots__ = ("status", "body", "content_type", "headers")

    def __init__(self, status: int = 200, body: Union[bytes, Pieces, Iterator[bytes]] = b"",
                 content_type: str = "application/json", headers: Iterable[Tuple[str, str]] = ()) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = list(headers)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Iterable[Tuple[str, str]] = ()) -> Response:
        """Return an answer whose body is ``value`` as JSON."""
        return cls(status, to_json(value).encode("utf-8"), headers=headers)

    @classmethod
    def error(cls, error: CspError) -> Response:
        """Return the answer that a refusal is: ``{"error": sentence}``."""
        more = {} if error.detail is None else {"detail": clean(error.detail)}
        return cls.json({"error": clean(error.message), **more}, error.status, error.headers)

    @classmethod
    def redirect(cls, path: str, headers: Iterable[Tuple[str, str]] = ()) -> Response:
        """Return a 302 to a path of this service."""
        return cls.json({}, 302, [("Location", path), *headers])

    @classmethod
    def data(cls, job: Job) -> Response:
        """Return a finished job's raw result, harmless to a browser whatever the job says that it is."""
        wanted = json.loads(job.metadata or "{}").get("mimetype")
        body, kind = _raw_result(job.data)
        if isinstance(wanted, str) and re.fullmatch(_MEDIA_TYPE, wanted):
            kind = wanted
        headers = [("Content-Security-Policy", SANDBOX)]
        if not re.match(_INERT_TYPE, kind):
            headers.append(("Content-Disposition", "attachment"))
        return cls(200, body, kind, headers)


def render_event(name: str, value: Any, event_id: Optional[int] = None) -> bytes:
    """Return a Server-Sent Event (html.spec.whatwg.org/multipage/server-sent-events.html) with ``value`` as JSON."""
    identifier = "" if event_id is None else f"id: {event_id}\n"
    return f"event: {name}\n{identifier}data: {to_json(value)}\n\n".encode("utf-8")


def _raw_result(data: Union[str, bytes, None]) -> Tuple[Union[bytes, Pieces], str]:
    """Return the result's bytes, a string as its text, and the media type unless the metadata knows better."""
    if isinstance(data, bytes):
        return data, "application/octet-stream"
    is_text = data is not None and data.startswith('"')
    text = json.loads(data or "") if is_text else data or "null"
    body = text.encode("utf-8") if len(text) < LARGE_CHARACTERS else Pieces([text])
    return body, "text/plain; charset=utf-8" if is_text else "application/json"


class Route(NamedTuple):
    """A row of the route table. ``path`` may hold ``<job_id>`` as a segment.

    The rest is for documentation: ``answer`` names a schema or is a media type, ``access`` says who may, ``body``
    names a schema, ``parameters`` are names of query parameters and header fields, ``refusals`` statuses.
    """

    method: str
    path: str
    endpoint: Callable[..., Response]
    summary: str
    answer: str
    access: str = ANYBODY
    body: str = ""
    parameters: Tuple[str, ...] = ()
    refusals: Tuple[int, ...] = ()
    page: Optional[Callable[..., Response]] = None  # answers browsers instead of ``endpoint``


class Router:
    """Finds the endpoint of a request by dictionary."""

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
            arguments = [_decode_segment(segments[1] or "")]
        if methods is None:
            raise CspError(404, "There is nothing at this address; GET / says where the documentation is.")
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            raise CspError(405, "This method is not for this address.", [("Allow", allowed_methods(methods))])
        return route, arguments


def allowed_methods(methods: Iterable[str]) -> str:
    """Return the value of an Allow header (RFC 9110, section 10.2.1)."""
    return ", ".join(sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}))


def _decode_segment(segment: str) -> str:
    try:
        return urllib.parse.unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise Conflict("The address is not UTF-8.") from None


class ProxyTrust:
    """Says who a client is, believing the X-Forwarded fields of trusted proxies only."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def identify(self, address: str, headers: Dict[str, str], scheme: str = "http") -> Tuple[str, str]:
        """Return the client's address and scheme, and put the host that it named into ``headers``."""
        if not self._networks or not self.is_trusted(address):
            return address, scheme
        if "x-forwarded-host" in headers:
            headers["host"] = headers["x-forwarded-host"]
        forwarded = [part.strip() for part in headers.get("x-forwarded-for", "").split(",") if part.strip()]
        while forwarded and self.is_trusted(address):
            address = forwarded.pop()
        return address[:64], "https" if headers.get("x-forwarded-proto", scheme).strip().lower() == "https" else "http"

    def is_trusted(self, address: str) -> bool:
        """Return whether that is the address of a trusted proxy."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._networks)


# ---------------------------------------------------------------------------------------------------------------------
# Auth
#
# Three ways in: the administrator (Basic, or a session begun at /login), the secure key, a job's own key. Secrets are
# compared in constant time. A session is a random token in a cookie; the database holds only its hash, so that
# neither a copied database nor a cookie copied before logout opens anything.
# ---------------------------------------------------------------------------------------------------------------------

SCRYPT = {"n": 2**14, "r": 8, "p": 1}  # OWASP's minimum that fits OpenSSL's default of 32 MB
COOKIE = "csp_session"
SECURE_COOKIE = "__Host-csp_session"  # a browser takes this name only with Secure, from this very host
KEY_COOKIE = "csp_job_key"  # of one job, whose key somebody has typed into its page
FREE_FAILURES = 10  # a person who tries what the password might have been
MANY_FAILURES = 100  # of all addresses within THROTTLE_SECONDS: an attack
THROTTLE_SECONDS = 900.0
LOGIN_TURNS = 8  # logins looked at the same time: each may take the 16 MB of a scrypt
MAX_THROTTLED = 10_000  # addresses remembered; a botnet must not fill the memory
WEAK_SECRETS = frozenset(("please_replace_me", "change_me_please", "correcthorse", "administrator", "password123",
                          "1234567890"))
SESSION_NOTE_SECONDS = 60.0  # how often the use of a session is written down


_scrypt_turns = threading.BoundedSemaphore(4)  # each takes 16 MB and a core


def hash_password(password: str) -> str:
    """Return a hash for the setting PASSWORD: ``scrypt$n$r$p$salt$key``, in base64."""
    import hashlib
    salt = os.urandom(16)
    key = hashlib.scrypt(password.encode("utf-8"), salt=salt, dklen=32, **SCRYPT)
    fields = [base64.b64encode(part).decode("ascii") for part in (salt, key)]
    return "$".join(["scrypt", *(str(SCRYPT[name]) for name in "nrp"), *fields])


def _matches_hash(password: bytes, hashed: str) -> bool:
    """Return whether ``password`` gives the hash; raise ValueError if that is not a hash of ours."""
    import hashlib
    _, n, r, p, salt, key = hashed.split("$")
    wanted = base64.b64decode(key, validate=True)
    with _scrypt_turns:
        given = hashlib.scrypt(password, salt=base64.b64decode(salt, validate=True), n=int(n), r=int(r), p=int(p),
                               dklen=len(wanted))
    return compare_digest(given, wanted)


class Secret:
    """A secret of the settings, as it is or as its hash; raises ValueError if it looks like a hash but is none."""

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self._is_hash = wanted.startswith("scrypt$")
        self._memory_key = os.urandom(32)
        self._approved: Set[bytes] = set()  # digests of what the slow hash has approved
        if self._is_hash:
            _matches_hash(b"", wanted)

    def matches(self, given: str) -> bool:
        """Return whether ``given`` is the secret, in a time that does not tell how nearly."""
        if not self._is_hash:
            return is_same(given, self._wanted)
        text = given.encode("utf-8", "replace")
        digest = sign(self._memory_key, text)
        if digest not in self._approved and _matches_hash(text, self._wanted):
            self._approved.add(digest)
        return digest in self._approved

    @property
    def is_weak(self) -> bool:
        """Whether somebody could guess it: a hash cannot be judged."""
        return not self._is_hash and (len(self._wanted) < 10 or self._wanted.lower() in WEAK_SECRETS)


class LoginThrottle:
    """Slows the guessing of passwords down: by address, and for all addresses together.

    An address (an IPv6 network of 64 bits) may fail FREE_FAILURES times; then it waits, twice as long with every
    further failure. While there are many failures from everywhere, each address has only one free failure: guesses
    from many addresses are slowed too, and yet the right password from an address that has not failed works at once,
    so that nobody can lock the administrator out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(LOGIN_TURNS)]
        self._failures: Dict[str, Tuple[int, float]] = {}  # by address: how many, when the last
        self._all: Deque[float] = deque(maxlen=MANY_FAILURES)

    def turn_of(self, address: str) -> threading.Lock:
        """Return the lock to hold from check to note, so that guesses sent at once are counted one after the other."""
        return self._turns[hash(_address_group(address)) % LOGIN_TURNS]

    def check(self, address: str) -> None:
        """Raise TooManyRequests if this address has to wait."""
        now = self._clock()
        with self._lock:
            count, last = self._failures.get(_address_group(address), (0, 0.0))
            is_attack = len(self._all) == MANY_FAILURES and now - self._all[0] < THROTTLE_SECONDS
        over = count - (1 if is_attack else FREE_FAILURES)
        wait = last + min(2.0 ** min(over, 20), THROTTLE_SECONDS) - now if over >= 0 else 0.0
        if wait > 0:
            raise TooManyRequests("Too many failed logins; try again later.", int(wait) + 1)

    def note(self, address: str, is_success: bool) -> None:
        """Take note of a login; a success forgives the address its failures."""
        now, group = self._clock(), _address_group(address)
        with self._lock:
            count, last = self._failures.pop(group, (0, 0.0))
            if is_success:
                return
            if len(self._failures) >= MAX_THROTTLED:
                del self._failures[next(iter(self._failures))]
            self._failures[group] = (count + 1 if now - last < THROTTLE_SECONDS else 1, now)
            self._all.append(now)


def _address_group(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = getattr(ip, "ipv4_mapped", None)  # how a socket for both families names IPv4 addresses
    if mapped is not None:
        return str(mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else address


def is_same_origin(request: Request) -> Optional[bool]:
    """Return whether a browser sent the request from a page of this service; None if no browser says."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    if origin is None:
        return None
    host = request.headers.get("host", "").lower()
    return bool(host) and origin.partition("://")[2].lower() == host


class Authenticator:
    """Decides who a request comes from. Without a ``password`` one is made; ``generated_password`` then holds it."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._username: str = settings["USERNAME"]
        self.generated_password = None if settings["PASSWORD"] else make_token()[:16]
        password = self.generated_password or settings["PASSWORD"]
        self._password = _read_secret("PASSWORD", password)
        self._session_key = f"{self._username}:{password}".encode("utf-8", "replace")  # another password ends sessions
        self._secret_key: Optional[str] = settings["SECRET_KEY"]
        self._api_keys = [_read_secret("API_KEYS", key) for key in settings["API_KEYS"]]
        self._idle_seconds: float = settings["SESSION_IDLE_SECONDS"]
        self._session_seconds: float = settings["SESSION_SECONDS"]
        self._throttle = LoginThrottle()
        weak = {"PASSWORD": self._password.is_weak, "SECRET_KEY": Secret(self._secret_key or "x" * 10).is_weak}
        for name in (name for name, is_weak in weak.items() if is_weak):
            log.warning("the setting %s is short or well known: somebody will guess it", name)

    def is_login(self, username: str, password: str, address: str) -> bool:
        """Return whether these are the administrator's name and password, in the same time for any wrong ones.

        Raises TooManyRequests if ``address`` has failed too often.
        """
        with self._throttle.turn_of(address):
            self._throttle.check(address)
            is_password = self._password.matches(password)
            is_login = is_same(username, self._username) and is_password
            self._throttle.note(address, is_login)
            return is_login

    def is_admin(self, request: Request) -> bool:
        """Return whether the request has the administrator's Basic credentials or a live session.

        What a browser adds by itself does not count for a request that changes something, unless a page of this
        service sent it: for a cookie the browser has to say so, for Basic it must not say otherwise.
        """
        credentials = basic_credentials(request)
        is_safe = request.method in ("GET", "HEAD") or is_same_origin(request)
        if credentials is not None:
            return is_safe is not False and self.is_login(*credentials, request.remote)
        return bool(is_safe) and self._session_hash(request) is not None

    def may_submit(self, api_key: Union[str, int, float]) -> bool:
        """Return whether the api_key may submit jobs: any may, unless API_KEYS lists those that may."""
        return not self._api_keys or any([key.matches(str(api_key)) for key in self._api_keys])

    def has_secure_key(self, request: Request) -> bool:
        """Return whether the Authorization header is the secure key."""
        given = request.headers.get("authorization")
        return bool(given and self._secret_key) and is_same(given or "", self._secret_key or "")

    def may_administer(self, request: Request) -> bool:
        """Return whether the request may do everything: administrator or secure key."""
        return self.has_secure_key(request) or self.is_admin(request)

    def may_see(self, request: Request, job: Job) -> bool:
        """Return whether the request may see and administer the job: its key, or as above."""
        given = request.headers.get("authorization")
        if given is None and (request.method in ("GET", "HEAD") or is_same_origin(request)):
            given = request.cookie(KEY_COOKIE)
        return bool(given and job.job_key and is_same(given, job.job_key)) or self.may_administer(request)

    # -- sessions

    def begin_session(self, request: Request) -> Tuple[str, str]:
        """Store a new session and return the Set-Cookie field for it."""
        token, now = make_token(), time.time()
        self._store.add_session(self._token_hash(token), now, now - self._idle_seconds, now - self._session_seconds)
        return _set_cookie(request, token)

    def end_session(self, request: Request) -> List[Tuple[str, str]]:
        """End the request's session, if any, and return the fields that remove its cookie."""
        for name in (COOKIE, SECURE_COOKIE):
            token = request.cookie(name)
            if token:
                self._store.delete_session(self._token_hash(token))
        return [_set_cookie(request, "")]

    def _token_hash(self, token: str) -> str:
        return sign(self._session_key, token.encode("utf-8", "replace")).hex()

    def _session_hash(self, request: Request) -> Optional[str]:
        """Return the hash of the request's session token if that session is alive."""
        token = request.cookie(SECURE_COOKIE if request.scheme == "https" else COOKIE)
        session = self._store.get_session(self._token_hash(token)) if token else None
        if not token or session is None:
            return None
        created_at, used_at = session
        now = time.time()
        if now - used_at > self._idle_seconds or now - created_at > self._session_seconds:
            return None
        if now - used_at > min(SESSION_NOTE_SECONDS, self._idle_seconds / 2):
            self._store.mark_session_used(self._token_hash(token), now)
        return self._token_hash(token)


def _read_secret(name: str, text: str) -> Secret:
    try:
        return Secret(text)
    except (ValueError, binascii.Error):
        raise StartError(f"The setting {name} looks like a hash but is none; "
                         "make one with --hash-password.") from None


def basic_credentials(request: Request) -> Optional[Tuple[str, str]]:
    """Return name and password of a Basic Authorization header (RFC 7617), None if there is none."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        username, colon, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (username, password) if colon else None


def _set_cookie(request: Request, token: str) -> Tuple[str, str]:
    is_secure = request.scheme == "https"
    name, secure = (SECURE_COOKIE, "; Secure") if is_secure else (COOKIE, "")
    end = "" if token else "; Max-Age=0"
    return "Set-Cookie", f"{name}={token}; Path=/; HttpOnly; SameSite=Lax{secure}{end}"


def key_cookie(request: Request, path: str, job_key: str) -> Tuple[str, str]:
    """Return the Set-Cookie field that opens the job at ``path``, and nothing else, to this browser."""
    secure = "; Secure" if request.scheme == "https" else ""
    return "Set-Cookie", f"{KEY_COOKIE}={job_key}; Path={path}; HttpOnly; SameSite=Strict{secure}"


def local_path(path: Optional[str], default: str = "/user") -> str:
    """Return ``path`` if it is a path of this service and can be nothing else to a browser, else ``default``."""
    return path if path and re.fullmatch(_LOCAL_PATH, path) else default


# ---------------------------------------------------------------------------------------------------------------------
# API description
#
# OpenAPI 3.1 (spec.openapis.org/oas/v3.1), made from the table of routes and the endpoints' docstrings. Schemas are
# JSON Schema 2020-12; what is said once about a field, a parameter or a refusal is said here.
# ---------------------------------------------------------------------------------------------------------------------


def _object(required: str, **properties: Schema) -> Schema:
    """Return the schema of an object; ``required`` names those of its properties that are always there."""
    return {"type": "object", "required": required.split(), "properties": properties}


_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_ANY: Schema = {"description": "any JSON"}
_TIME: Schema = {"type": ["string", "null"], "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}$",
                 "description": "local time without zone"}
_API_KEY: Schema = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "number"}], "description":
                    "handed to the callback, as the Authorization header or, as `Name: value`, as a header of its own"}
_URL: Schema = {"type": ["string", "null"], "description": "an http(s) address: where the job is POSTed when it ends"}


def _nullable(name: str) -> Schema:
    return {"anyOf": [{"$ref": "#/components/schemas/" + name}, {"type": "null"}]}


_JOB: Dict[str, Schema] = {
    "job_id": _TEXT, "job_type": _TEXT, "status": {"enum": [PENDING, COMPLETE, ERROR]}, "sent_data": _ANY,
    "data": {"description": "what the function returned; bytes as {\"base64\": …}"}, "error": _nullable("JobError"),
    "metadata": {"type": "object"}, "logs": {"type": "array", "items": {"$ref": "#/components/schemas/LogLine"}},
    "result_url": _URL, "requested_timestamp": _TIME, "started_timestamp": _TIME, "finished_timestamp": _TIME,
    "progress": _nullable("Progress"), "attempts": _WHOLE, "callback": _nullable("Callback"),
    "resubmitted_from": {"type": ["string", "null"]}}
SCHEMAS: Dict[str, Schema] = {
    "Error": _object("error", error={"type": "string", "description": "a sentence"}, detail=_TEXT),
    "Failure": _object("error", error={"anyOf": [_TEXT, {"$ref": "#/components/schemas/JobError"}]}),
    "Help": _object("help", help=_TEXT),
    "Status": _object("version job_types name stats", version={"type": "number"}, name=_TEXT,
                      job_types={"type": "array", "items": _TEXT},
                      stats=_object("pending complete error", pending=_WHOLE, complete=_WHOLE, error=_WHOLE)),
    "User": _object("id name is_active is_anonymous", id={"type": ["integer", "null"]}, name=_TEXT,
                    is_active={"type": "boolean"}, is_anonymous={"type": "boolean"}),
    "JobList": _object("list", list={"type": "array", "items": _TEXT}),
    "Job": _object(" ".join(_JOB), **_JOB),
    "SubmittedJob": _object(" ".join((*_JOB, "job_key")), **_JOB, job_key=_TEXT),
    "JobError": _object("message", message=_TEXT, traceback=_TEXT),
    "LogLine": _object("timestamp message level module funcName lineno", timestamp=_TIME, message=_TEXT, level=_TEXT,
                       module=_TEXT, funcName=_TEXT, lineno={"type": "integer"}),
    "Progress": _object("fraction message", fraction={"type": "number", "minimum": 0, "maximum": 1},
                        message={"type": ["string", "null"]}),
    "Callback": _object("status attempts error next_attempt_timestamp", attempts=_WHOLE,
                        status={"enum": [PENDING, "delivered", "failed"]},
                        error={"type": ["string", "null"]}, next_attempt_timestamp=_TIME),
    "Success": _object("success", success={"const": True}),
    "Cleared": _object("success deleted", success={"const": True}, deleted=_WHOLE),
    "Submission": {**_object("job_type api_key", job_type=_TEXT, api_key=_API_KEY, data=_ANY,
                             metadata={"type": ["object", "null"]}, result_url=_URL), "additionalProperties": False},
    "Report": {**_object("execution first lines progress seconds", first=_WHOLE,
                         execution={**_TEXT, "minLength": 1, "maxLength": 100},
                         lines={"type": "array", "items": {"$ref": "#/components/schemas/LogLine"}},
                         progress=_nullable("Progress"), seconds={"type": "number", "minimum": 0}),
               "additionalProperties": False},
    "Instruction": _object("cancelled", cancelled={"type": "boolean"}),
    "NewKey": {**_object("", api_key=_API_KEY), "additionalProperties": False},
    "Login": _object("username password", username=_TEXT, password=_TEXT, next=_TEXT),
}
RAW_RESULT = "*/*"
FORMS = frozenset(("Login",))  # bodies that are URL-encoded; all others are JSON
_NUMBER: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
PARAMETERS: Dict[str, Tuple[str, Schema, str]] = {  # where, schema, description
    "_limit": ("query", _NUMBER, f"how many, 100 unless told, {MAX_LISTED:,} at most"),
    "_offset": ("query", {**_NUMBER, "maximum": MAX_OFFSET}, "how many to skip; the Link header leads on at less cost"),
    "_before": ("query", _NUMBER, "as the Link header has it"),
    "_status": ("query", _TEXT, "pending, complete or error; also queued or running"),
    "_type": ("query", _TEXT, "a job type"),
    "_id": ("query", _TEXT, "only jobs whose id begins so, in the order of their ids; other filters do not count then"),
    "metadata": ("query", {"type": "object", "additionalProperties": _TEXT},
                 "every other parameter is a metadata key and its value"),
    "limit": ("query", _NUMBER, "only so many log entries, the newest first"),
    "days": ("query", {"type": "integer", "minimum": 0, "maximum": 36_500}, "finished more than so many days ago"),
    "next": ("query", _TEXT, "a path of this service, to go on to"),
    "last_event_id": ("query", {"type": "string", "pattern": "^[0-9]{0,18}$"}, "go on after this event"),
    "Last-Event-ID": ("header", {"type": "string", "pattern": "^[0-9]{0,18}$"}, "go on after this event"),
    "Prefer": ("header", _TEXT, "RFC 7240: wait=N answers when the job has finished, or after N seconds; respond-async "
               "queues also a job of a synchronous type"),
}
REFUSALS = {
    400: "the request is not HTTP", 401: "the login failed", 403: "not authorized", 404: "there is no such job",
    408: "the request took too long to arrive", 409: "what the request says cannot be done",
    413: "the body is too large", 414: "the request line is too long", 429: "too many failed logins",
    431: "the header is too large",
    500: "a defect of the service, which its log explains", 503: "nothing can be stored, or no more taken, for now"}
_ALWAYS = (400, 408, 409, 413, 414, 429, 431, 500, 503)


def describe_api(routes: Iterable[Route], job_types: Sequence[str], name: str) -> Dict[str, Any]:
    """Return the OpenAPI document for the routes of a service that has these job types."""
    paths: Dict[str, Dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path.replace("<", "{").replace(">", "}"), {})[route.method.lower()] = _describe(route)
    submission = dict(SCHEMAS["Submission"]["properties"], job_type={"enum": list(job_types)} if job_types else _TEXT)
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": __version__, "license": {"name": "MIT"}, "description":
                 "Functions as jobs: submit them, watch them, read their logs and results (csp.py)."},
        "paths": paths,
        "components": {
            "schemas": {**SCHEMAS, "Submission": {**SCHEMAS["Submission"], "properties": submission}},
            "responses": {str(status): _answer_object(text, "Error") for status, text in REFUSALS.items()},
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "Authorization",
                        "description": "a job's key, the secure key, or the token of a run, as the whole field"},
                "basic": {"type": "http", "scheme": "basic", "description": "the administrator"},
                "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description":
                            f"the administrator, after a login; {SECURE_COOKIE} behind TLS"},
            },
        },
    }


def _describe(route: Route) -> Dict[str, Any]:
    parameters = [{"name": name, "in": where, "description": text, "schema": schema,
                   **({"style": "form", "explode": True} if schema.get("type") == "object" else {})}
                  for name, (where, schema, text) in PARAMETERS.items() if name in route.parameters]
    if "<job_id>" in route.path:
        parameters.append({"name": "job_id", "in": "path", "required": True, "schema":
                           {"type": "string", "minLength": 1, "maxLength": 255}})
    refusals = {*_ALWAYS, *route.refusals, *([] if route.access == ANYBODY else [403])}
    operation: Dict[str, Any] = {
        "summary": route.summary, "operationId": re.sub(r"\W+", "_", route.method.lower() + route.path).strip("_"),
        "description": " ".join((route.endpoint.__doc__ or "").split()), "parameters": parameters,
        "responses": {**_success(route.answer), **{str(status): {"$ref": f"#/components/responses/{status}"}
                                                   for status in sorted(refusals)}}}
    if route.answer == RAW_RESULT:  # its refusal is the job's own error, if it failed
        operation["responses"]["409"] = _answer_object(REFUSALS[409], "Failure")
    if route.body:
        kind = "application/x-www-form-urlencoded" if route.body in FORMS else "application/json"
        operation["requestBody"] = {"required": route.body == "Submission", "content": {
            kind: {"schema": {"$ref": "#/components/schemas/" + route.body}}}}
    if route.access != ANYBODY:
        operation["security"] = [{"key": []}, {"basic": []}, {"session": []}]
    return operation


def _success(answer: str) -> Dict[str, Any]:
    if answer == "redirect":
        headers = {"Location": {"schema": _TEXT}}
        return {"302": {**_answer_object("go on there", "application/json"), "headers": headers}}
    return {"200": _answer_object("success", answer)}


def _answer_object(text: str, answer: str) -> Dict[str, Any]:
    """Return an OpenAPI response whose body is of a schema, or of a media type."""
    if answer in SCHEMAS:
        return {"description": text, "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/" + answer}}}}
    return {"description": text, "content": {answer: {}}}


# ---------------------------------------------------------------------------------------------------------------------
# Console
#
# Pages for people, at the addresses that programs use: server-rendered, complete without JavaScript, made live with a
# little of it. All markup is here. ``render`` escapes whatever is not Html already; style and script have addresses
# of their own, named by their content, so that the Content-Security-Policy allows nothing inline.
# ---------------------------------------------------------------------------------------------------------------------

PAGE_ROWS = 50  # jobs on a page: about 30 kB
PAGE_LINES = 200  # log lines on a page that is opened; the rest is a link away
PAGE_LOG_CHARACTERS = 20_000
PAGE_TEXT_CHARACTERS = 6_000  # of an input, a result or a traceback
PARSED_CHARACTERS = 200_000  # a longer text is shown as it is stored, not laid out
PAGE_SNIPPETS = 20  # job types with examples for each; of more, one at a time
CHART_HOURS = 24
PAGE_HEADERS = (
    ("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
     "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"),
    ("Referrer-Policy", "same-origin"),  # with no-referrer browsers send "Origin: null" with forms
)
STATE_WORDS = {QUEUED: "waiting", RUNNING: "running", COMPLETE: "complete", ERROR: "failed"}
LEVELS = {"error": ("ERROR", "CRITICAL"), "warning": ("WARNING", "ERROR", "CRITICAL"),
          "info": ("INFO", "WARNING", "ERROR", "CRITICAL")}
NOTICES = {
    "cancel": "Told to stop, or taken out of the queue.", "delete": "Deleted.", "resubmit": "Submitted again.",
    "callback": "The callback is on its way.", "clear": "Old jobs are cleared.", "submit": "Submitted.",
    "out": "You are signed out.", "none": "No job was chosen."}

STYLE = """
:root { color-scheme: light dark; --back: #f4f6f8; --card: #fff; --text: #18212c; --faint: #556172; --line: #d5dbe3;
  --link: #0a58a6; --on-link: #fff; --complete: #17722f; --error: #b0241b; --running: #0a58a6; --queued: #6a5600;
  --code: #eef1f5; --mark: #fff3cd; }
@media (prefers-color-scheme: dark) { :root { --back: #11151b; --card: #191f28; --text: #e7ebf1; --faint: #a5b0c0;
  --line: #343d4b; --link: #84bdff; --on-link: #0b1520; --complete: #63d683; --error: #ff8f85; --running: #84bdff;
  --queued: #e2c553; --code: #232b37; --mark: #40371a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 8px; top: 8px; background: var(--card); padding: 8px; z-index: 1; }
header, main, footer { max-width: 1200px; margin: 0 auto; padding: 12px 16px; }
header { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: center; }
header nav { display: flex; flex-wrap: wrap; gap: 4px 16px; flex: 1; align-items: center; }
header form { margin-left: auto; }
header .name { font-weight: 700; font-size: 18px; text-decoration: none; color: var(--text); }
[aria-current] { font-weight: 700; color: var(--text); }
footer { color: var(--faint); font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 16px; }
h1 { font-size: 24px; line-height: 1.25; margin: 8px 0 12px; }
h1.id { font-size: 20px; margin-bottom: 4px; }
h2 { font-size: 18px; margin: 0 0 8px; }
h3 { font-size: 16px; margin: 0; }
section, .notice, table.jobs { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
section { padding: 16px; margin: 0 0 16px; min-width: 0; }
.notice { padding: 10px 16px; margin: 0 0 16px; border-left: 5px solid var(--link); }
.notice.bad { border-left-color: var(--error); }
.faint, small { color: var(--faint); font-size: 14px; }
.row { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: end; }
.row.top { align-items: center; margin-bottom: 12px; }
section > :last-child { margin-bottom: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 0 0 16px;
  padding: 0; list-style: none; }
.tiles a { display: block; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px; text-decoration: none; color: var(--text); border-top: 4px solid currentColor; }
.tiles b { display: block; font-size: 26px; line-height: 1.2; color: var(--text); }
.tiles .queued, .badge.queued { color: var(--queued); } .tiles .running, .badge.running { color: var(--running); }
.tiles .complete, .badge.complete { color: var(--complete); } .tiles .error, .badge.error { color: var(--error); }
.badge { font-weight: 600; white-space: nowrap; }
.badge::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 6px;
  border-radius: 50%; background: currentColor; }
.badge.queued::before { background: none; border: 2px solid currentColor; }
.badge.error::before { border-radius: 2px; }
svg.chart { display: block; width: 100%; height: 140px; border-bottom: 1px solid var(--faint); }
svg .complete { fill: var(--complete); } svg .error { fill: var(--error); }
.axis { display: flex; justify-content: space-between; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 16px; }
label { display: block; font-size: 14px; font-weight: 600; }
label.check { display: inline-flex; gap: 8px; align-items: center; min-height: 40px; }
input, select, textarea, button, .button { font: inherit; color: inherit; padding: 7px 10px; border-radius: 6px;
  border: 1px solid var(--faint); background: var(--card); max-width: 100%; min-height: 40px; }
input[type=checkbox] { min-height: 0; width: 20px; height: 20px; margin: 0; }
textarea { width: 100%; min-height: 120px; font-family: ui-monospace, monospace; font-size: 14px; }
button, .button { cursor: pointer; background: var(--code); text-decoration: none; display: inline-block; }
button.main { background: var(--link); color: var(--on-link); border-color: var(--link); font-weight: 600; }
button.danger { color: var(--error); border-color: var(--error); }
button.copy { min-height: 30px; padding: 2px 10px; font-size: 14px; }
pre, code, .id { font-family: ui-monospace, monospace; font-size: 14px; }
pre { background: var(--code); padding: 10px; border-radius: 6px; margin: 4px 0 8px; overflow: auto; max-height: 420px;
  white-space: pre-wrap; }
.doc { white-space: pre-line; margin: 4px 0 8px; }
details { margin: 4px 0; }
summary { cursor: pointer; color: var(--link); min-height: 28px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 10px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; font-size: 14px; color: var(--faint); }
.scroll { overflow: auto; max-height: 480px; }
.scroll table { font-size: 14px; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; min-width: 0; }
progress { width: 100%; height: 14px; accent-color: var(--running); }
ol.log { list-style: none; margin: 8px 0 0; padding: 8px; max-height: 480px; overflow: auto; background: var(--code);
  border-radius: 6px; font: 14px/1.5 ui-monospace, monospace; }
ol.log li { white-space: pre-wrap; }
ol.log .WARNING b { color: var(--queued); } ol.log .ERROR b, ol.log .CRITICAL b { color: var(--error); }
img.result { max-width: 100%; background: #fff; }
.login { max-width: 420px; margin: 5vh auto; }
.login input { width: 100%; margin-bottom: 10px; }
@media (max-width: 720px) {
  table.jobs thead { display: none; }
  table.jobs tr { display: block; padding: 8px 0; border-top: 1px solid var(--line); }
  table.jobs td, table.jobs th[scope=row] { display: flex; gap: 10px; border: 0; padding: 2px 12px; min-width: 0; }
  table.jobs td::before, table.jobs th[scope=row]::before { content: attr(data-label); flex: 0 0 84px;
    color: var(--faint); font-size: 14px; font-weight: 400; }
  table.api td { display: block; border: 0; padding: 1px 0; } table.api thead { display: none; }
  table.api tr { display: block; padding: 6px 0; border-top: 1px solid var(--line); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 6px; }
}
@media (prefers-reduced-motion: no-preference) { .badge.running::before { animation: pulse 1.6s infinite; }
  @keyframes pulse { 50% { opacity: 0.3; } } }
"""

SCRIPT = """
'use strict';
(() => {
  const $ = (selector, root) => (root || document).querySelector(selector);
  let source = null, timer = null;

  // Fetch this page again and put in what is marked as live.
  async function refresh() {
    timer = null;
    const answer = await fetch(location.href, { headers: { Accept: 'text/html' } });
    if (!answer.ok) { return; }
    const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
    for (const old of document.querySelectorAll('[data-live]')) {
      const fresh = page.getElementById(old.id);
      if (fresh && !$('input:focus', old)) {
        old.replaceWith(document.adoptNode(fresh));
      }
    }
    prepare();
  }
  const soon = (milliseconds) => { timer = timer || setTimeout(refresh, milliseconds); };

  const RANKS = { DEBUG: 10, INFO: 20, WARNING: 30, ERROR: 40, CRITICAL: 50 };
  function addLine(log, line) {
    const least = RANKS[log.dataset.level.toUpperCase()] || 0;
    if (least && !((RANKS[line.level] || 0) >= least)) { return; }
    const item = document.createElement('li'), level = document.createElement('b');
    item.className = line.level;
    level.textContent = line.level;
    item.append(line.timestamp.slice(11, 23) + ' ', level, ' ' + line.message);
    log.append(item);
    while (log.children.length > 2000) { log.firstChild.remove(); }
    const empty = $('#log-empty');
    if (empty) { empty.hidden = true; }
    log.hidden = false;
    if ($('#follow').checked) { log.scrollTop = log.scrollHeight; }
  }

  function watchJob(log) {
    source = new EventSource(log.dataset.events + '?last_event_id=' + log.dataset.last);
    source.addEventListener('log', (event) => {
      log.dataset.last = event.lastEventId;
      addLine(log, JSON.parse(event.data));
    });
    source.addEventListener('progress', (event) => {
      const value = JSON.parse(event.data);
      $('#progress').hidden = false;
      $('#progress progress').value = value.fraction;
      $('#progress span').textContent = Math.round(value.fraction * 100) + ' % ' + (value.message || '');
    });
    let state = document.body.dataset.state;
    source.addEventListener('status', (event) => {
      const value = JSON.parse(event.data);
      if (value.status !== 'pending') { stop(); }
      if (value.state !== state) { soon(0); }
      state = value.state;
    });
  }

  function watchNumbers() {
    let first = true;
    source = new EventSource('/events');
    source.addEventListener('stats', () => { if (!first) { soon(1000); } first = false; });
  }

  function stop() { if (source) { source.close(); source = null; } }
  function start() {
    const log = $('#log[data-events]');
    if (source) { return; }
    if (log) { watchJob(log); } else if ($('#numbers')) { watchNumbers(); }
  }

  function prepare() {
    for (const button of document.querySelectorAll('button.copy')) { button.hidden = false; }
    for (const element of document.querySelectorAll('.needs-script')) { element.hidden = false; }
  }

  document.addEventListener('click', async (event) => {
    const button = event.target.closest('button.copy');
    if (button) {
      const text = document.getElementById(button.dataset.copy);
      getSelection().selectAllChildren(text);
      try { await navigator.clipboard.writeText(text.textContent); } catch (error) { document.execCommand('copy'); }
      button.textContent = 'Copied';
      setTimeout(() => { button.textContent = 'Copy'; }, 2000);
    }
    if (event.target.id === 'all') {
      for (const box of document.querySelectorAll('input[name=job_id]')) { box.checked = event.target.checked; }
    }
  });
  // A tab that nobody sees gives its connection back: browsers allow six to one service.
  document.addEventListener('visibilitychange', () => { if (document.hidden) { stop(); } else { soon(0); start(); } });
  prepare();
  start();
})();
"""


def _asset_path(name: str, text: str) -> str:
    stem, _, kind = name.partition(".")
    return f"/console/{stem}-{binascii.crc32(text.encode('utf-8')):08x}.{kind}"


STYLE_PATH, SCRIPT_PATH = _asset_path("style.css", STYLE), _asset_path("script.js", SCRIPT)


class Html(str):
    """Text that is markup already."""


def render(template: str, **values: Any) -> Html:
    """Return the ``string.Template`` with ``values`` put in, each escaped unless it is Html; lists of them joined."""
    return Html(string.Template(template).substitute({name: _escape(value) for name, value in values.items()}))


def _escape(value: Any) -> str:
    if isinstance(value, Html):
        return value
    return "".join(map(_escape, value)) if isinstance(value, (list, tuple)) else html.escape(str(value))


class Viewer(NamedTuple):
    """Who looks at a page: ``path`` is where they are (to come back to after signing in)."""

    service: str
    is_admin: bool
    path: str
    notice: str = ""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title – $service</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E%3Crect
 width='8' height='8' rx='2' fill='%230a58a6'/%3E%3Cpath d='M2 4l1.5 1.5L6 3' stroke='white' fill='none'/%3E%3C/svg%3E">
<link rel="stylesheet" href="$style">
<script src="$script" defer></script>
</head>
<body data-state="$state">
<a class="skip" href="#main">Skip to the content</a>
<header><a class="name" href="/">$service</a><nav aria-label="Pages">$links</nav>$sign</header>
<main id="main">$notice$content</main>
<footer><span>csp.py $version</span><a href="/openapi.json">openapi.json</a><a href="/metrics">metrics</a></footer>
</body>
</html>
"""
_SIGN_OUT = """<form method="post" action="/logout"><input type="hidden" name="next" value="/?done=out">
<button>Sign out</button></form>"""


def render_page(viewer: Viewer, title: str, content: Html, state: str = "") -> Html:
    """Return a whole page."""
    links = [("/", "Overview"), ("/job", "Jobs"), *([("/console/submit", "Try it")] if viewer.is_admin else [])]
    path = viewer.path.partition("?")[0]
    sign = Html(_SIGN_OUT) if viewer.is_admin else render(
        '<a href="/login?next=$next">Sign in</a>', next=urllib.parse.quote(viewer.path, safe="/"))
    notice = NOTICES.get(viewer.notice, "")
    return render(
        _PAGE, title=title, service=viewer.service, style=STYLE_PATH, script=SCRIPT_PATH, version=__version__,
        content=content, sign=sign, state=state,
        notice=render('<p class="notice" role="status">$text</p>', text=notice) if notice else "",
        links=[render('<a href="$href"$current>$text</a>', href=href, text=text,
                      current=Html(' aria-current="page"') if href == path else "") for href, text in links])


def page_response(page: Html, status: int = 200, headers: Iterable[Tuple[str, str]] = ()) -> Response:
    """Return the answer that shows a page."""
    return Response(status, page.encode("utf-8", "replace"), "text/html; charset=utf-8", [*PAGE_HEADERS, *headers])


def error_page(viewer: Viewer, error: CspError) -> Html:
    """Return the page of a refusal."""
    return render_page(viewer, _REASONS.get(error.status, "Error"), render(
        '<h1>$reason</h1><section><p>$message</p><p class="faint">$detail</p><p><a href="/">To the overview</a></p>'
        '</section>', reason=_REASONS.get(error.status, "Error"), message=error.message, detail=error.detail or ""))


_LOGIN = """<section class="login"><h1>Sign in</h1>$error<form method="post" action="/login">
<input type="hidden" name="next" value="$next">
<label for="username">User name</label>
<input id="username" name="username" autocomplete="username" required value="$username">
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<button class="main">Sign in</button></form></section>"""
_BAD_NOTICE = '<p class="notice bad" role="alert">$text</p>'


def login_page(viewer: Viewer, path: str, username: str = "", error: str = "") -> Html:
    """Return the form to sign in, which leads on to ``path``."""
    return render_page(viewer, "Sign in", render(
        _LOGIN, next=path, username=username, error=render(_BAD_NOTICE, text=error) if error else ""))


_KEY = """<section class="login"><h1>This job needs a key</h1>$error
<p>Whoever submitted it got the key (<code>job_key</code>) with the answer.</p>
<form method="post" action="$path/key"><label for="job_key">Job key</label>
<input id="job_key" name="job_key" autocomplete="off" required>
<button class="main">Show the job</button></form>
<p>Or <a href="/login?next=$next">sign in</a> as the administrator.</p></section>"""


def key_page(viewer: Viewer, path: str, error: str = "") -> Html:
    """Return the form that takes the key of the job at ``path``."""
    return render_page(viewer, "Job key", render(
        _KEY, path=path, next=urllib.parse.quote(path), error=render(_BAD_NOTICE, text=error) if error else ""))


# -- what people read

def human_seconds(seconds: float) -> str:
    """Return a duration in the two units that matter."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "under 1 ms"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    for size, unit, small_size, small in ((60, "min", 1, "s"), (3600, "h", 60, "min"), (86_400, "d", 3600, "h")):
        if seconds < size * (60 if size < 3600 else 24) or unit == "d":
            rest = int(seconds % size // small_size)
            return f"{int(seconds // size)} {unit}" + (f" {rest} {small}" if rest else "")
    return ""


def _time(text: Optional[str], now: float) -> Html:
    """Return a time element: how long ago, and exactly when."""
    if not text:
        return Html("–")
    ago = int(now - epoch_seconds(text))
    return render('<time datetime="$iso" title="$exact">$ago</time>', iso=text[:23], exact=text[:19].replace("T", " "),
                  ago=" ".join([*human_seconds(ago).split(" ")[:2], "ago"]) if ago > 0 else "now")


def _full_time(text: Optional[str], now: float) -> Html:
    return render("$exact <small>$ago</small>", exact=text[:19].replace("T", " "), ago=_time(text, now)) if text else (
        Html("–"))


def _duration(job: Job, now: float) -> str:
    if not job.started_timestamp or job.state == QUEUED:
        return "–"
    end = epoch_seconds(job.finished_timestamp) if job.finished_timestamp else now
    return human_seconds(max(0.0, end - epoch_seconds(job.started_timestamp)))


def _badge(state: str) -> Html:
    return render('<span class="badge $state">$word</span>', state=state, word=STATE_WORDS.get(state, state))


def job_path(job_id: str) -> str:
    """Return the address of a job."""
    return "/job/" + urllib.parse.quote(job_id, safe="")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"


def _lay_out(text: str) -> str:
    """Return JSON text laid out for people; as it is if it is long or nested deeper than Python goes."""
    if len(text) > PARSED_CHARACTERS:
        return text
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except RecursionError:
        return text


def fit_lines(lines: Iterable[LogLine]) -> List[LogLine]:
    """Return as many of the lines, given newest first, as a page holds, oldest first, long messages cut."""
    room = PAGE_LOG_CHARACTERS
    kept: List[LogLine] = []
    for line in lines:
        line = line._replace(message=_shorten(line.message, 2000))
        room -= len(line.message) + 60
        if room < 0:
            break
        kept.append(line)
    return kept[::-1]


def _text_block(identifier: str, text: str, address: str) -> Html:
    more = render('<p class="faint">The first $shown of $all characters; <a href="$address">all</a>.</p>',
                  shown=f"{PAGE_TEXT_CHARACTERS:,}", all=f"{len(text):,}", address=address)
    return render('<button type="button" class="copy" data-copy="$id" hidden>Copy</button>'
                  '<pre id="$id" tabindex="0">$text</pre>$more', id=identifier, text=text[:PAGE_TEXT_CHARACTERS],
                  more=more if len(text) > PAGE_TEXT_CHARACTERS else "")


# -- the overview

class Overview(NamedTuple):
    """What the overview shows. ``hours``: jobs ended by (hour since 1970, status); ``example`` a job type's name."""

    states: Mapping[str, int]
    hours: Mapping[Tuple[int, str], int]
    now: float
    failures: Sequence[Job]
    types: Sequence[JobType]
    counts: Mapping[Tuple[str, str], int]
    url: str
    routes: Sequence[Route]
    example: str


_OVERVIEW = """<h1>$service</h1>
<p class="faint">Runs functions as jobs that are submitted over HTTP.</p>
<ul class="tiles" id="numbers" data-live>$tiles</ul>
<section id="chart" data-live><h2>Jobs ended per hour</h2>$chart</section>
$failures
<h2 id="types">Job types</h2><div class="columns">$types</div>
<section><h2 id="api">Interface</h2><p>Send JSON to <code>$url</code>. A refused request is answered
<code>{"error": "a sentence"}</code>. <a href="/openapi.json">openapi.json</a> describes everything for programs.</p>
<details><summary>All addresses</summary><table class="api"><thead><tr><th scope="col">Request</th>
<th scope="col">What</th><th scope="col">Who</th></tr></thead><tbody>$routes</tbody></table></details></section>"""
_TILE = '<li><a class="$state" href="/job?_status=$state"><b>$jobs</b>$word</a></li>'
_TYPE = """<section id="type-$name"><h3>$name</h3>
<p class="faint">$kind · $complete complete, $error failed$options</p><p class="doc">$doc</p>$snippets</section>"""
_SNIPPETS = """<details><summary>How to submit</summary>
<button type="button" class="copy" data-copy="curl-$name" hidden>Copy</button>
<pre id="curl-$name" tabindex="0">$curl</pre>
<button type="button" class="copy" data-copy="python-$name" hidden>Copy</button>
<pre id="python-$name" tabindex="0">$python</pre></details>"""
_PYTHON = """import json, urllib.request
body = json.dumps({body}).encode()
request = urllib.request.Request("{url}", body, {{"Content-Type": "application/json"}})
print(json.load(urllib.request.urlopen(request)))"""


def overview_page(viewer: Viewer, view: Overview) -> Html:
    """Return the overview: numbers, chart, latest failures, job types, and the interface."""
    rows = [render("<tr><td><code>$method $path</code></td><td>$summary</td><td>$access</td></tr>", method=route.method,
                   path=route.path, summary=route.summary, access=route.access) for route in view.routes]
    return render_page(viewer, "Overview", render(
        _OVERVIEW, service=viewer.service, chart=_chart(view.hours, view.now), url=view.url, routes=rows,
        failures=_failures(view.failures, view.now) if viewer.is_admin else "",
        tiles=[render(_TILE, state=state, jobs=f"{jobs:,}", word=STATE_WORDS[state])
               for state, jobs in view.states.items()],
        types=[_type_section(viewer, view, job_type) for job_type in view.types] or
        Html("<p>There are none; name a module with --jobs.</p>")))


def _failures(failures: Sequence[Job], now: float) -> Html:
    rows = [render('<li><a class="id" href="$path">$id</a> <small>$type, $time</small><br>$message</li>',
                   path=job_path(job.job_id), id=_shorten(job.job_id, 60), type=job.job_type,
                   time=_time(job.finished_timestamp, now),
                   message=_shorten(str(json.loads(job.error or "{}").get("message", "")), 160)) for job in failures]
    return render('<section id="failures" data-live><h2>Latest failures</h2>$rows</section>',
                  rows=render("<ul>$rows</ul>", rows=rows) if rows else Html("<p>None.</p>"))


def _chart(hours: Mapping[Tuple[int, str], int], now: float) -> Html:
    """Return the chart of the last CHART_HOURS hours: a bar for each, failures on top."""
    last = int(now // 3600)
    numbers = [(hour, hours.get((hour, COMPLETE), 0), hours.get((hour, ERROR), 0))
               for hour in range(last - CHART_HOURS + 1, last + 1)]
    most = max(max(complete + error for _, complete, error in numbers), 1)
    bars: List[Html] = []
    for index, (hour, complete, error) in enumerate(numbers):
        label = time.strftime("%H:%M", time.localtime(hour * 3600))
        top = 0.0
        for kind, jobs in ((COMPLETE, complete), (ERROR, error)):
            height = 100 * jobs / most
            top += height
            if jobs:
                bars.append(render(
                    '<rect class="$kind" x="$x" y="$y" width="8" height="$height"><title>from $label: $jobs $word'
                    "</title></rect>", kind=kind, x=index * 10 + 1, y=f"{100 - top:.2f}", height=f"{height:.2f}",
                    label=label, jobs=f"{jobs:,}", word=STATE_WORDS[kind]))
    complete, error = (sum(row[column] for row in numbers) for column in (1, 2))
    text = f"{complete:,} complete and {error:,} failed in the last {CHART_HOURS} hours, at most {most:,} in one"
    return render(
        '<svg class="chart" role="img" aria-label="$text" viewBox="0 0 $width 100" preserveAspectRatio="none">$bars'
        "</svg>"
        '<div class="axis faint"><span>$hours h ago</span><span>now</span></div><p class="faint">$text.</p>',
        text=text if complete + error else f"No job ended in the last {CHART_HOURS} hours", bars=bars,
        width=CHART_HOURS * 10, hours=CHART_HOURS)


def _type_section(viewer: Viewer, view: Overview, job_type: JobType) -> Html:
    kind = "synchronous" if job_type.synchronous else "asynchronous"
    options = [f"{word} {value:g}{unit}" for word, value, unit in (
        ("timeout", job_type.timeout or 0, " s"), ("retries", job_type.retries, "")) if value]
    import inspect
    doc = inspect.getdoc(job_type.function) or ""
    return render(
        _TYPE, name=job_type.name, kind=kind, doc=_shorten(doc, 600),
        options="".join(f" · {option}" for option in options),
        complete=f"{view.counts.get((job_type.name, COMPLETE), 0):,}",
        error=f"{view.counts.get((job_type.name, ERROR), 0):,}", snippets=[
            _snippets(job_type.name, view) if len(view.types) <= PAGE_SNIPPETS or view.example == job_type.name else
            render('<p><a href="/?type=$name#type-$name">How to submit</a></p>', name=job_type.name),
            render('<p><a href="/console/submit?type=$name">Try it</a></p>', name=urllib.parse.quote(job_type.name))
            if viewer.is_admin else ""])


def _snippets(name: str, view: Overview) -> Html:
    import shlex
    body = json.dumps({"job_type": name, "api_key": "your key", "data": "hello"})
    curl = f"curl -H 'Content-Type: application/json' -d {shlex.quote(body)} {shlex.quote(view.url)}"
    return render(_SNIPPETS, name=name, curl=curl, python=_PYTHON.format(body=body, url=view.url))


# -- the list of jobs

class JobsView(NamedTuple):
    """What the list shows: ``jobs`` without their data, and the query that chose them."""

    jobs: Sequence[Job]
    query: Mapping[str, str]
    following: str
    types: Sequence[str]
    keep_days: int
    now: float


_JOBS = """<h1>Jobs</h1>
<form method="get" action="/job" class="row" role="search"><div><label for="status">Status</label>
<select id="status" name="_status">$statuses</select></div>
<div><label for="type">Type</label><select id="type" name="_type">$types</select></div>
<div><label for="metadata">Metadata</label>
<input id="metadata" name="_metadata" value="$metadata" placeholder="key=value"></div>
<div><label for="id">Id begins with</label><input id="id" name="_id" value="$id"></div>
<button class="main">Show</button></form><br>$list$clear"""
_JOB_TABLE = """<table class="jobs"><caption class="faint">$caption</caption>$rows</table>
<p class="row">$pages</p>"""
_SELECTION = """<form method="post" action="/console/selection"><input type="hidden" name="back" value="$back">
$table$actions</form>"""
_HEAD = """<thead><tr><th scope="col"><label class="check needs-script" hidden><input type="checkbox" id="all"
 aria-label="Choose all"></label></th><th scope="col">Job</th><th scope="col">Type</th><th scope="col">Status</th>
<th scope="col">Submitted</th><th scope="col">Duration</th><th scope="col">Metadata</th></tr></thead>"""
_ROW = """<tr><td data-label="Choose"><input type="checkbox" name="job_id" value="$id" aria-label="Choose $id"></td>
<th scope="row" data-label="Job"><a class="id" href="$path">$short</a></th><td data-label="Type">$type</td>
<td data-label="Status">$badge</td><td data-label="Submitted">$time</td><td data-label="Duration">$duration</td>
<td data-label="Metadata">$metadata</td></tr>"""
_ACTIONS = """<p class="row"><span>With the chosen jobs:</span>
<span><label for="key">API key, to resubmit</label><input id="key" name="api_key" autocomplete="off"></span>
<button name="action" value="resubmit">Resubmit</button><button name="action" value="cancel">Cancel</button>
<button name="action" value="delete" class="danger">Delete</button></p>"""
_CLEAR = """<section><form method="post" action="/console/clear" class="row"><div>
<label for="days">Delete jobs that ended more than so many days ago</label>
<input id="days" name="days" type="number" min="0" max="36500" value="$days" required></div>
<button class="danger">Clear old jobs</button></form></section>"""


def _options(choices: Iterable[Tuple[str, str]], chosen: str) -> List[Html]:
    return [render('<option value="$value"$selected>$text</option>', value=value, text=text,
                   selected=Html(" selected") if value == chosen else "") for value, text in choices]


def jobs_page(viewer: Viewer, view: JobsView) -> Html:
    """Return a page of the list; who is not the administrator sees ids only, as in the JSON."""
    pages = [Html('<a class="button" href="/job">Newest</a>')] if view.query else []
    if view.following:
        pages.append(render('<a class="button" href="$path" rel="next">Older</a>', path=view.following))
    table = render(_JOB_TABLE, caption="" if view.jobs else "There is no such job.", pages=pages, rows=[
        Html(_HEAD) if viewer.is_admin and view.jobs else "",
        [_job_row(viewer, job, view.now) for job in view.jobs]])
    return render_page(viewer, "Jobs", render(
        _JOBS, metadata=view.query.get("_metadata", ""), id=view.query.get("_id", ""),
        statuses=_options([("", "all"), *STATE_WORDS.items()], view.query.get("_status", "")),
        types=_options([("", "all"), *((name, name) for name in view.types)], view.query.get("_type", "")),
        list=render(_SELECTION, back=viewer.path, table=table, actions=Html(_ACTIONS) if view.jobs else "")
        if viewer.is_admin else table,
        clear=render(_CLEAR, days=view.keep_days) if viewer.is_admin else ""))


def _job_row(viewer: Viewer, job: Job, now: float) -> Html:
    short, path = _shorten(job.job_id, 60), job_path(job.job_id)
    if not viewer.is_admin:
        return render('<tr><td data-label="Job"><a class="id" href="$path">$short</a></td></tr>', path=path,
                      short=short)
    metadata = ", ".join(f"{key}={value if isinstance(value, str) else to_json(value)}"
                         for key, value in json.loads(job.metadata or "{}").items())
    return render(_ROW, id=job.job_id, path=path, short=short, type=job.job_type, badge=_badge(job.state),
                  time=_time(job.requested_timestamp, now), duration=_duration(job, now),
                  metadata=_shorten(metadata, 120) or "–")


# -- one job

class JobView(NamedTuple):
    """What a job's page shows: ``lines`` the newest of its log, oldest first; ``last_id`` where the events go on."""

    job: Job
    lines: Sequence[LogLine]
    last_id: int
    level: str
    now: float


_JOB_PAGE = """<div id="head" data-live><h1 class="id">$id</h1><div class="row top">$badge $actions</div>
<div id="progress"$hidden><progress max="1" value="$fraction" aria-label="Progress"></progress>
<span class="faint">$progress</span></div></div>
<div id="error" data-live>$error</div>
<div class="columns"><section id="facts" data-live><h2>Job</h2><dl>$facts</dl></section>
<section id="result" data-live><h2>Result</h2>$result</section></div>
<section><h2>Log</h2><form class="row" method="get" action="$path"><div><label for="level">Level</label>
<select id="level" name="level">$levels</select></div><button>Show</button>
<label class="check needs-script" hidden><input type="checkbox" id="follow" checked>Follow</label></form>
<p id="log-empty" class="faint"$log_full>Nothing yet.</p>
<ol class="log" id="log" tabindex="0" aria-label="Log" data-level="$level" data-last="$last"$events$log_empty>
$lines</ol>
<p class="faint">The newest lines; <a href="$path?_format=json">the whole job as JSON</a>.</p></section>
<div class="columns"><section><h2>Input</h2>$input</section>
<section id="callback" data-live><h2>Callback</h2>$callback</section></div>"""
_LINE = '<li class="$level">$time <b>$level</b> $message</li>'
_CANCEL = '<form method="post" action="$path/cancel"><button>Cancel</button></form>'
_KEY_BUTTON = """<form method="post" action="$path/$action"><label class="check">API key
<input name="api_key"$required autocomplete="off"></label> <button>$text</button></form>"""
_DELETE = """<details><summary>Delete …</summary><form method="post" action="$path/delete">
<button class="danger">Delete for good</button></form></details>"""
_FACT = "<dt>$name</dt><dd>$value</dd>"


def job_page(viewer: Viewer, view: JobView) -> Html:
    """Return the page of a job."""
    job, path, now = view.job, job_path(view.job.job_id), view.now
    progress: Dict[str, Any] = json.loads(job.progress) if job.progress else {"fraction": 0, "message": None}
    events = render(' data-events="$path/events"', path=path) if job.status == PENDING else ""
    return render_page(viewer, job.job_id, render(
        _JOB_PAGE, id=job.job_id, path=path, badge=_badge(job.state), actions=_job_actions(job, path),
        hidden="" if job.progress else Html(" hidden"), fraction=progress["fraction"], events=events,
        progress=f"{progress['fraction'] * 100:.0f} % {progress['message'] or ''}", error=_error_section(job),
        facts=_job_facts(job, now), result=_result(job, path), lines=[
            render(_LINE, time=line.timestamp[11:23], level=line.level, message=line.message) for line in view.lines],
        log_full=Html(" hidden") if view.lines else "", log_empty="" if view.lines else Html(" hidden"),
        level=view.level, last=view.last_id, input=_text_block("input", _lay_out(job.sent_data), path + "?_format=json")
        if job.sent_data not in (None, "null") else Html("<p>None.</p>"),
        levels=_options([("", "all"), *((name, f"{name} and above") for name in reversed(list(LEVELS)))], view.level),
        callback=_callback_facts(job, path, now)), state=job.state)


def _job_actions(job: Job, path: str) -> List[Html]:
    if job.status == PENDING:
        first = render(_CANCEL, path=path)
    else:
        first = render(_KEY_BUTTON, path=path, action="resubmit", required=Html(" required"), text="Resubmit")
    return [first, render(_DELETE, path=path)]


def _job_facts(job: Job, now: float) -> List[Html]:
    facts: List[Tuple[str, Any]] = [
        ("Type", job.job_type), ("Submitted", _full_time(job.requested_timestamp, now)),
        ("Started", _full_time(job.started_timestamp, now)), ("Ended", _full_time(job.finished_timestamp, now)),
        ("Duration", _duration(job, now)), ("Attempts", job.attempts)]
    if job.resubmitted_from:
        facts.append(("Resubmitted from", render('<a class="id" href="$path">$id</a>', id=job.resubmitted_from,
                                                 path=job_path(job.resubmitted_from))))
    for key, value in json.loads(job.metadata or "{}").items():
        facts.append((_shorten(key, 60), _shorten(value if isinstance(value, str) else to_json(value), 300)))
    return [render(_FACT, name=name, value=value) for name, value in facts[:60]]


def _error_section(job: Job) -> Html:
    if job.error is None:
        return Html("")
    error = json.loads(job.error)
    trace = error.pop("traceback", None)
    rest = {key: value for key, value in error.items() if key != "message"}
    return render('<section><h2>Error</h2><p>$message</p>$rest$trace</section>',
                  message=_shorten(str(error.get("message", "")), PAGE_TEXT_CHARACTERS),
                  rest=render("<pre tabindex=\"0\">$text</pre>", text=_shorten(to_json(rest), PAGE_TEXT_CHARACTERS))
                  if rest else "", trace=render(
                      '<details><summary>Traceback</summary><pre tabindex="0">$text</pre></details>',
                      text=str(trace)[-PAGE_TEXT_CHARACTERS:]) if trace else "")


def _result(job: Job, path: str) -> Html:
    """Return the result as its media type wants to be seen: image, table, text, JSON, or a link to it."""
    if job.status != COMPLETE:
        return Html("<p>None.</p>" if job.status == ERROR else "<p>Not yet.</p>")
    data = Response.data(job)
    kind = data.content_type.partition(";")[0].strip().lower()
    body = data.body if isinstance(data.body, bytes) else b"".join(data.body)
    link = render('<p><a href="$path/data">$kind, $size bytes</a></p>', path=path, kind=kind, size=f"{len(body):,}")
    if re.fullmatch("image/(?:png|jpeg|gif|webp)", kind):
        return render('$link<img class="result" src="$path/data" alt="The result">', link=link, path=path)
    if isinstance(job.data, bytes):
        return link
    text = body.decode("utf-8")
    if kind == "text/csv":
        return render('$link$table', link=link, table=_csv_table(text))
    is_text = (job.data or "").startswith('"')
    block = _text_block("data", text if is_text else _lay_out(text), path + "/data")
    return render("$link$block", link=link, block=block)


def _csv_table(text: str) -> Html:
    """Return the first rows and columns as a table."""
    import csv
    lines = csv.reader(io.StringIO(text[:PAGE_TEXT_CHARACTERS * 2]))
    try:
        rows = [[_shorten(cell, 100) for cell in row[:20]] for row in itertools.islice(lines, 51)]
    except csv.Error:
        rows = []
    head = [render('<th scope="col">$cell</th>', cell=cell) for cell in (rows[0] if rows else [])]
    body = [render("<tr>$cells</tr>", cells=[render("<td>$cell</td>", cell=cell) for cell in row]) for row in rows[1:]]
    return render('<div class="scroll" tabindex="0" role="region" aria-label="The first rows"><table><thead>'
                  "<tr>$head</tr></thead><tbody>$body</tbody></table></div>", head=head, body=body)


def _callback_facts(job: Job, path: str, now: float) -> Html:
    if job.result_url is None:
        return Html("<p>None: no result_url was given.</p>")
    facts: List[Tuple[str, Any]] = [("To", job.result_url)]
    if job.callback_status is not None:
        facts += [("Status", job.callback_status), ("Attempts", job.callback_attempts)]
        facts += [("Last error", job.callback_error)] if job.callback_error else []
        if job.callback_at is not None:
            facts.append(("Next attempt", "now" if job.callback_at <= now else
                          f"in {human_seconds(job.callback_at - now)}"))
    again = render(_KEY_BUTTON, path=path, action="callback", required="", text="Send again")
    return render("<dl>$facts</dl>$again", facts=[render(_FACT, name=name, value=value) for name, value in facts],
                  again=again if job.status != PENDING else "")


# -- try it

_SUBMIT = """<h1>Try it</h1>$error<section><form method="post" action="/console/submit">
<p><label for="job_type">Job type</label><select id="job_type" name="job_type">$types</select></p>
<p><label for="data">Data, as JSON</label><textarea id="data" name="data" spellcheck="false">$data</textarea></p>
<p><label for="metadata">Metadata, a JSON object</label>
<textarea id="metadata" name="metadata" spellcheck="false">$metadata</textarea></p>
<p><label for="result_url">Address for the callback</label>
<input id="result_url" name="result_url" type="url" value="$result_url" size="60"></p>
<p><label for="api_key">API key</label>
<input id="api_key" name="api_key" value="$api_key" required autocomplete="off"></p>
<button class="main">Submit</button></form></section>"""


def submit_page(viewer: Viewer, types: Sequence[str], form: Mapping[str, str], error: str = "") -> Html:
    """Return the form that submits a job, filled with ``form``."""
    values = {name: form.get(name, "") for name in ("data", "metadata", "result_url", "api_key")}
    return render_page(viewer, "Try it", render(
        _SUBMIT, types=_options([(name, name) for name in types], form.get("job_type", "")),
        error=render(_BAD_NOTICE, text=error) if error else "", **values))


# ---------------------------------------------------------------------------------------------------------------------
# Service
#
# Holds the parts and answers requests. An endpoint takes the request (and a path's job id) and returns a Response or
# raises a CspError; ``handle`` is the only place that catches.
# ---------------------------------------------------------------------------------------------------------------------

API_VERSION = 0.1  # of the documented interface; not this program's version
HELP = "https://pypi.org/project/ckanserviceprovider/ documents the interface; README.md of csp.py what is added to it."
FIRST_ATTEMPT_SECONDS = 2.0  # how long a synchronous submit waits for the first attempt at its callback
CLEAR_SECONDS = 86_400.0
KEEP_ALIVE_SECONDS = 15.0  # between comments in a quiet stream: proxies give up after 30 or 60, and who has left shows
EVENT_SECONDS = 0.1  # between looks at a job that changes all the time, and more
EVENT_SECONDS_PER_WATCHER = 0.001  # for each who watches it: together they look a thousand times a second at most
STATS_SECONDS = 1.0
LIST_PARAMETERS = ("_limit", "_offset", "_before", "_status", "_type", "_id", "_metadata", "_format",
                   "done")  # others: metadata
ASSET_HEADERS = (("Cache-Control", "public, max-age=31536000, immutable"),)  # their addresses change with them
MAX_EVENT_LINES = 500  # log lines read at a time
STREAM_HEADERS = (("X-Accel-Buffering", "no"),)  # nginx would hold events back
SUBMIT_KEYS = frozenset(("job_type", "api_key", "data", "result_url", "metadata"))
_TIMESTAMP = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}"
_BAD_ID = r"[/\x00-\x1f\x7f-\x9f\ud800-\udfff]"


_STATUS_LABELS = {status: ("status", str(status)) for status in map(int, http.HTTPStatus)}


@functools.lru_cache(maxsize=1)  # asked for again and again by monitors, and mostly the same
def _render_status(name: str, job_types: Tuple[str, ...], stats: Tuple[Tuple[str, int], ...]) -> bytes:
    return to_json({"version": API_VERSION, "job_types": list(job_types), "name": name,
                    "stats": dict(stats)}).encode("utf-8")


class Submission(NamedTuple):
    """A submitted body, checked; ``data`` and ``metadata`` are JSON texts, None where not given.

    ``take_input`` returns what Job.read_input would, once.
    """

    job_type: JobType
    api_key: Union[str, int, float]
    data: Optional[str]
    metadata: Optional[str]
    result_url: Optional[str]
    take_input: Callable[[], Dict[str, Any]]

    def hash(self, job_key: str) -> str:
        """Return what tells that another body is the same as this, without keeping its api_key."""
        values = [json.loads(text) if text else None for text in (self.data, self.metadata)]
        text = json.dumps([self.job_type.name, self.api_key, self.result_url, *values], sort_keys=True)
        return sign(job_key.encode("ascii"), text.encode("ascii")).hex()


def read_body(request: Request) -> Dict[str, Any]:
    """Return the JSON object that the body is; raise Conflict if it is none."""
    value: Any = None
    if request.is_json and request.body:
        try:
            value = from_json(request.body)
        except (json.JSONDecodeError, UnicodeError) as error:
            raise Conflict("Malformed json", detail=str(error)) from None
        except ValueError as error:
            raise Conflict(f"Malformed json: {error}") from None
        request.body = b""  # a large one is held no longer than need be
    if not isinstance(value, dict):
        raise Conflict("Not recognised as json, make sure content type is application/json")
    return value


def check_submission(body: Dict[str, Any], registry: Registry) -> Submission:
    """Return the checked submission; raise Conflict with the sentence of the first thing that is wrong."""
    if not SUBMIT_KEYS.issuperset(body):
        raise Conflict(f"Too many arguments. Extra keys are {', '.join(sorted(set(body) - SUBMIT_KEYS))}")
    result_url = body.get("result_url")
    if result_url == "":
        result_url = None
    if result_url is not None:
        check_result_url(result_url)
    job_type = _check_job_type(body.get("job_type"), registry)
    api_key = _check_api_key(body.get("api_key"))
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise Conflict("metadata has to be a json object")
    input = {key: value for key, value in body.items() if key == "data" or value not in (None, "")}
    return Submission(job_type, api_key, _json_text(body, "data"),
                      None if metadata is None else _json_text(body, "metadata"), result_url, [input].pop)


def _check_job_type(name: Any, registry: Registry) -> JobType:
    if name is None or name == "":
        raise Conflict("Please specify a job type")
    job_type = registry.get(name)
    if job_type is None:
        raise Conflict(f"Job type {clean(str(name))[:200]} not available. Available job types are "
                       f"{', '.join(registry.names())}")
    return job_type


def _check_api_key(api_key: Any) -> Union[str, int, float]:
    if api_key is None or api_key is False or api_key == "":
        raise Conflict("Please provide your API key.")
    if isinstance(api_key, bool) or not isinstance(api_key, (str, int, float)):
        raise Conflict("api_key has to be a string or a number")
    if not isinstance(api_key, str) and not abs(api_key) < 2**63:
        raise Conflict("api_key has to be a string or a number of at most 64 bits")
    callback_header(api_key)
    return api_key


def _json_text(body: Dict[str, Any], key: str) -> Optional[str]:
    try:
        return to_json(body[key]) if key in body else None
    except (ValueError, RecursionError):
        raise Conflict(f"Malformed json: {key} holds a number that is not finite") from None


def check_report(body: Dict[str, Any]) -> Dict[str, Any]:
    """Return the report of a run elsewhere, checked; raise Conflict with the sentence of the first wrong thing."""
    extra = sorted(set(body) - {key for key, _, _ in _REPORT_CHECKS})
    if extra:
        raise Conflict(f"Too many arguments. Extra keys are {', '.join(extra)}")
    for key, is_good, what in _REPORT_CHECKS:
        if not is_good(body.get(key)):
            raise Conflict(f"{key} has to be {what}")
    return {**body, "lines": [{key: clean(value) if isinstance(value, str) else value for key, value in line.items()}
                              for line in body["lines"]]}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def _is_line(value: Any) -> bool:
    return (isinstance(value, dict) and set(value) == set(LogLine._fields) and _is_count(value["lineno"])
            and all(isinstance(text, str) for name, text in value.items() if name != "lineno")
            and bool(re.fullmatch(_TIMESTAMP, value["timestamp"])))


def _is_progress(value: Any) -> bool:
    return (isinstance(value, dict) and set(value) == {"fraction", "message"} and _is_number(value["fraction"])
            and (value["message"] is None or isinstance(value["message"], str)))


_REPORT_CHECKS: Tuple[Tuple[str, Callable[[Any], bool], str], ...] = (
    ("execution", lambda value: isinstance(value, str) and 0 < len(value) <= 100,
     "a string of 1 to 100 characters, made for this execution of the task"),
    ("first", _is_count, "a whole number: how many lines this execution has sent before"),
    ("lines", lambda value: isinstance(value, list) and all(map(_is_line, value)),
     f"a list of objects with {', '.join(LogLine._fields)}"),
    ("progress", lambda value: value is None or _is_progress(value), "null, or an object of fraction and message"),
    ("seconds", _is_number, "a number: for how long this execution has been running"),
)


def check_job_id(job_id: str) -> None:
    """Raise Conflict if a client may not choose this id."""
    if not job_id or len(job_id) > 255 or re.search(_BAD_ID, job_id) or job_id in (".", ".."):
        raise Conflict("job_id has to be 1 to 255 characters, without slashes and control characters")


class Service:
    """The job service, without sockets: opens the database and begins to run jobs; ``close`` ends it.

    Any thread may call ``handle``. Raises StartError if the database cannot be used.
    """

    def __init__(self, settings: Optional[Settings] = None, registry: Registry = registry) -> None:
        self.settings = settings if settings is not None else Settings()
        self.registry = registry
        self.database = database_path(self.settings["SQLALCHEMY_DATABASE_URI"])
        self.store = Store(self.database)
        self.auth = Authenticator(self.store, self.settings)
        self.metrics = Metrics()
        self.callbacks = CallbackSender(self.store, self.settings["SSL_VERIFY"], self.settings["CALLBACK_SECRET"],
                                        CallbackPolicy(self.settings["CALLBACK_HOSTS"]), self.metrics)
        try:
            self._engine = make_engine(self.settings, registry)
        except StartError:
            self.callbacks.stop(0.0)
            self.store.close()
            raise
        self.runner = Runner(self.store, registry, self.settings["WORKERS"], self.callbacks.notify, self._engine,
                             self.metrics)
        self._router = Router((*ROUTES, *CONSOLE_ROUTES))
        self._closing = threading.Event()
        if self.settings["AUTO_CLEAR"]:
            threading.Thread(target=self._clear_daily, name="csp-clear", daemon=True).start()

    def reachable_at(self, url: Optional[str]) -> None:
        """Say under which address a server answers for this service, None if nobody knows."""
        if self._engine is not None:
            self._engine.reachable_at(url)

    def release(self) -> None:
        """End event streams and answer who waits for a job: the service is about to stop."""
        self._closing.set()
        self.runner.pause()
        self.store.release()

    def close(self, grace_seconds: Optional[float] = None) -> bool:
        """Stop: running jobs get the grace period, the rest stays on disk. Return whether every job had ended."""
        self.release()
        is_done = self.runner.stop(self.settings["GRACE_SECONDS"] if grace_seconds is None else grace_seconds)
        self.callbacks.stop(1.0)
        self.store.close()
        return is_done

    def handle(self, request: Request) -> Response:
        """Answer a request; never raises."""
        started = time.perf_counter()
        route, response = self._answer(request)
        method, path = (route.method, route.path) if route else ("", "")
        self.metrics.requests.add((("method", method), ("route", path), _STATUS_LABELS[response.status]),
                                  time.perf_counter() - started)
        if self.settings["CORS_ORIGINS"]:
            response.headers += self._cors_headers(request)
        return response

    def _cors_headers(self, request: Request) -> List[Tuple[str, str]]:
        """Return what lets pages of CORS_ORIGINS read the answer (fetch.spec.whatwg.org); never with credentials."""
        origin = request.headers.get("origin", "")
        if origin not in self.settings["CORS_ORIGINS"]:
            return [("Vary", "Origin")]
        return [("Vary", "Origin"), ("Access-Control-Allow-Origin", origin),
                ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE"),
                ("Access-Control-Allow-Headers", "Authorization, Content-Type, Last-Event-ID, Prefer"),
                ("Access-Control-Expose-Headers", "Link, Preference-Applied, Retry-After"),
                ("Access-Control-Max-Age", "600")]

    def _answer(self, request: Request) -> Tuple[Optional[Route], Response]:
        route: Optional[Route] = None
        try:
            if request.method == "OPTIONS":
                return None, self._answer_options(request)
            route, arguments = self._router.find(request)
            if route.page is None:
                return route, route.endpoint(self, request, *arguments)
            response = (route.page if request.wants_html else route.endpoint)(self, request, *arguments)
            response.headers.append(("Vary", "Accept"))
            return route, response
        except CspError as error:
            return route, self._refuse(request, error)
        except Exception:  # noqa: BLE001 - a defect of ours must not end the connection without an answer
            incident = os.urandom(4).hex()
            log.exception("incident %s at %s %s", incident, request.method, clean(request.path))
            return route, self._refuse(request, CspError(500, "Something went wrong; the service's log has it "
                                                         f"as incident {incident}."))

    def _refuse(self, request: Request, error: CspError) -> Response:
        if request.wants_html:
            headers = [(name, value) for name, value in error.headers if name != "WWW-Authenticate"]
            path = request.target if request.method in ("GET", "HEAD") else "/job"  # where signing in leads
            viewer = Viewer(self.settings["NAME"], False, path)
            response = page_response(error_page(viewer, error), error.status, headers)
        else:
            response = Response.error(error)
        response.headers.append(("Vary", "Accept"))
        return response

    def _answer_options(self, request: Request) -> Response:
        try:
            self._router.find(request)
        except CspError as error:
            if error.status == 405:
                return Response(204, headers=error.headers)
            raise
        return Response(204, headers=[("Allow", "GET, HEAD, OPTIONS")])

    def _clear_daily(self) -> None:
        while True:
            try:
                deleted = self._clear(self.settings["KEEP_JOBS_AGE"])
                log.info("cleared %d old jobs", deleted)
            except Unavailable as error:
                log.warning("old jobs are not cleared: %s", error.message)
            if self._closing.wait(CLEAR_SECONDS):
                return

    def _clear(self, days: int) -> int:
        return self.store.delete_finished_jobs(timestamp(time.time() - days * 86_400))

    # -- the service itself

    def show_help(self, request: Request) -> Response:
        """Say where the documentation is."""
        return Response.json({"help": HELP})

    def show_status(self, request: Request) -> Response:
        """Show version, job types, name and how many jobs there are."""
        return Response(200, _render_status(self.settings["NAME"], tuple(self.registry.names()),
                                            tuple(self.store.count_jobs().items())))

    # -- login

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
        is_theirs = is_same_origin(request) is False  # another site's link signs nobody out
        return Response.redirect(self._next_path(request), [] if is_theirs else self.auth.end_session(request))

    def _next_path(self, request: Request) -> str:
        return local_path(request.form.get("next") or dict(request.query).get("next"),
                          "/" if request.wants_html else "/user")

    def show_user(self, request: Request) -> Response:
        """Show who is logged in."""
        is_admin = self.auth.is_admin(request)
        return Response.json({"id": 0 if is_admin else None, "name": "Admin" if is_admin else "Anonymous",
                              "is_active": is_admin, "is_anonymous": not is_admin})

    # -- jobs

    def list_jobs(self, request: Request) -> Response:
        """List job ids, newest first, filtered by status, type and metadata."""
        jobs, following = self._choose_jobs(request, 100)
        return Response.json({"list": [job_path(job_id) for _, job_id in jobs]},
                             headers=[("Link", f'<{following}>; rel="next"')] if following else [])

    def _choose_jobs(self, request: Request, default_limit: int, most: int = MAX_LISTED,
                     ) -> Tuple[List[Tuple[int, str]], str]:
        """Return (seq, id) of the jobs that the query asks for, and the address that goes on, if there may be more."""
        if not self.settings["PUBLIC_JOB_LIST"] and not self.auth.may_administer(request):
            raise Forbidden
        limit = min(request.number("_limit", default_limit) or 0, most)
        offset, before = request.number("_offset", 0, MAX_OFFSET) or 0, request.number("_before", None)
        query = dict(request.query)
        if query.get("_id"):
            return self.store.find_jobs(query["_id"], limit), ""
        filters = [(key, value) for key, value in request.query if key not in LIST_PARAMETERS]
        key, equals, value = query.get("_metadata", "").partition("=")
        filters += [(key.strip(), value.strip())] if equals else []
        filters = list(dict.fromkeys(filters))
        if len(filters) > MAX_METADATA_FILTERS:
            raise Conflict(f"There may be {MAX_METADATA_FILTERS} metadata filters at most.")
        jobs = self.store.list_jobs(limit, offset, query.get("_status") or None, filters, before,
                                    query.get("_type") or None)
        if not jobs or len(jobs) < limit:
            return jobs, ""
        kept = [pair for pair in request.query if pair[0] not in ("_offset", "_before")]
        return jobs, "/job?" + urllib.parse.urlencode([*kept, ("_before", jobs[-1][0])])

    def submit(self, request: Request, job_id: Optional[str] = None) -> Response:
        """Submit a job: a synchronous one is answered when it has ended, others when they are stored."""
        submission = check_submission(read_body(request), self.registry)
        if job_id is not None:
            check_job_id(job_id)
        return self._submit(request, submission, job_id)

    def put_job(self, request: Request, job_id: str) -> Response:
        """Submit a job under an id of your own, or return the one that the same body has submitted before."""
        submission = check_submission(read_body(request), self.registry)
        check_job_id(job_id)
        try:
            if self.store.get_job(job_id) is None:
                return self._submit(request, submission, job_id)
        except Conflict:
            log.debug("job %s has just been submitted by another request", clean(job_id))
        known = self.store.get_job(job_id)
        wait, applied = self._read_preferences(request)
        if known is None or known.submission_hash is None or not is_same(known.submission_hash,
                                                                          submission.hash(known.job_key)):
            raise Conflict(f"job_id {job_id} already exists")
        return self._answer_with(known, wait, applied)

    def _submit(self, request: Request, submission: Submission, job_id: Optional[str] = None,
                origin: Optional[str] = None) -> Response:
        self._check_admission(submission)
        wait, applied = self._read_preferences(request)
        job = self._new_job(submission, job_id, origin, submission.job_type.synchronous and not applied)
        if job.synchronous:
            return self._run_now(job, job_id is None, submission.take_input)
        self.store.add_job(job, self.runner.wake, job_id is None).wait()
        if wait:
            return self._answer_with(job, wait, applied)
        return Response(200, render_parts(job, (), job_key=True), headers=applied)

    def _check_admission(self, submission: Submission, count: int = 1) -> None:
        if not self.auth.may_submit(submission.api_key):
            raise Forbidden("This api_key may not submit jobs.")
        limit = self.settings["MAX_PENDING"]
        if limit is not None and self.store.count_jobs()[PENDING] + count > limit:
            raise Unavailable(f"There may be {limit:,} unfinished jobs at most; try again later.", 30)

    def _read_preferences(self, request: Request) -> Tuple[int, List[Tuple[str, str]]]:
        """Return how many seconds to wait for the job to finish, and the field that says which preferences count.

        Whoever sends ``wait`` wants an answer in that time, so that a synchronous job is queued then, too.
        """
        if "prefer" not in request.headers:
            return 0, []
        given = request.preferences
        applied = ["respond-async"] if request.method != "GET" and given.get("respond-async") == "" else []
        wait = 0
        if re.fullmatch("[0-9]{1,9}", given.get("wait", "")):
            wait = min(int(given["wait"]), self.settings["MAX_WAIT_SECONDS"])
            applied.append(f"wait={wait}")
        return wait, [("Preference-Applied", ", ".join(applied))] if applied else []

    def _wait(self, job: Job, seconds: int) -> Job:
        """Return the job as it is when it has finished or the time is over; raise CspError (404) if it is deleted."""
        current = self.store.wait_for_job(job.job_id, lambda job: job.status != PENDING, seconds) if seconds else job
        if current is None or current.seq != job.seq:
            raise CspError(404, "job_id not found")
        return current

    def _answer_with(self, job: Job, wait: int, applied: List[Tuple[str, str]]) -> Response:
        job = self._wait(job, wait)
        return Response(200, render_parts(job, self.store.get_logs(job), job_key=True), headers=applied)

    def _new_job(self, submission: Submission, job_id: Optional[str], origin: Optional[str],
                 is_synchronous: bool) -> Job:
        now = time.time()
        requested = timestamp(now)
        made_id, job_key = make_ids()
        return Job(
            seq=self.store.take_seq(), job_id=job_id or made_id, job_type=submission.job_type.name,
            status=PENDING, sent_data=submission.data, data=None, error=None, metadata=submission.metadata,
            result_url=submission.result_url, api_key=submission.api_key, job_key=job_key,
            requested_timestamp=requested, started_timestamp=requested if is_synchronous else None,
            run_at=None if is_synchronous else now, attempts=int(is_synchronous), synchronous=int(is_synchronous),
            resubmitted_from=origin,
            callback_host=callback_host(submission.result_url) if submission.result_url else None,
            submission_hash=submission.hash(job_key) if job_id is not None else None)

    def _run_now(self, job: Job, is_new_id: bool, read_input: Callable[[], Dict[str, Any]]) -> Response:
        """Run a synchronous job and answer with it, or with the stream that it returned."""
        run, ended = self.runner.run_now(job, is_new_id, read_input)
        if ended is not None and not isinstance(ended, Job):
            try:
                first = next(ended, b"")
            except StreamBroken:
                ended = self.store.get_job(job.job_id)
            else:
                return Response(200, _Prepended(first, ended))
        if ended is not None and ended.result_url is not None:
            ended = self.store.wait_for_job(job.job_id, lambda job: bool(job.callback_attempts), FIRST_ATTEMPT_SECONDS)
        if ended is None:
            raise CspError(404, "job_id not found")
        lines = run.stored
        if lines is None or len(lines) != run.line_count:
            lines = self.store.get_logs(ended)
        return Response(200, render_parts(ended, lines, job_key=True))

    def _find_job(self, request: Request, job_id: str, has_sent_data: bool = True) -> Job:
        """Return the job; raise CspError (404), or Forbidden if the request may not see it."""
        job = self.store.get_job(job_id, has_sent_data) if not re.search(_BAD_ID, job_id) else None
        if job is None:
            raise CspError(404, "job_id not found")
        if not self.auth.may_see(request, job):
            raise Forbidden
        return job

    def show_job(self, request: Request, job_id: str) -> Response:
        """Show a job and its log."""
        limit = request.number("limit", None)
        wait, applied = self._read_preferences(request)
        job = self._wait(self._find_job(request, job_id), wait)
        return Response(200, render_parts(job, self.store.get_logs(job, limit)), headers=applied)

    def show_data(self, request: Request, job_id: str) -> Response:
        """Show the raw result of a job."""
        wait, applied = self._read_preferences(request)
        job = self._wait(self._find_job(request, job_id, has_sent_data=False), wait)
        if job.status == ERROR:
            return Response(409, f'{{"error": {job.error or "null"}}}'.encode("utf-8"), headers=applied)
        if job.status != COMPLETE:
            raise Conflict(f"job {job_id} has not finished yet", headers=applied)
        response = Response.data(job)
        response.headers += applied
        return response

    def delete_job(self, request: Request, job_id: str) -> Response:
        """Delete a job with its log and metadata; if it runs, tell it to stop and drop its result."""
        if not self._delete(self._find_job(request, job_id)):
            raise CspError(404, "job_id not found")
        return Response.json({"success": True})

    def _delete(self, job: Job) -> bool:
        deleted = self.store.delete_job(job)
        if deleted is not None and deleted.state == RUNNING:
            self.runner.tell_to_stop(deleted)
        return deleted is not None

    def clear_jobs(self, request: Request) -> Response:
        """Delete the jobs that finished more than ``days`` days ago."""
        if not self.auth.may_administer(request):
            raise Forbidden
        unknown = sorted({name for name, _ in request.query} - {"days", "_format"})
        if unknown:  # days misspelt must not delete what it was to keep
            raise Conflict(f"Clearing jobs takes days and no {', '.join(unknown)}")
        days = request.number("days", self.settings["KEEP_JOBS_AGE"], maximum=36_500) or 0
        return Response.json({"success": True, "deleted": self._clear(days)})

    def cancel_job(self, request: Request, job_id: str) -> Response:
        """Cancel a job: a queued one never runs, a running one is told to stop."""
        job = self._find_job(request, job_id)
        self.runner.cancel(job)
        return self.show_job(request, job_id)

    def resubmit_job(self, request: Request, job_id: str) -> Response:
        """Submit a new job like this one; the body brings the api_key, because the old one is erased."""
        job = self._find_job(request, job_id)
        body = read_body(request) if request.body else {}
        if set(body) - {"api_key"}:
            raise Conflict("Too many arguments. The body may hold an api_key and nothing else")
        again = {**job.read_input(), "api_key": body.get("api_key", job.api_key)}
        return self._submit(request, check_submission(again, self.registry), origin=job.job_id)

    def _resend(self, job: Job, api_key: Union[str, int, float, None]) -> None:
        """Make the job's callback due again; raise Conflict if it has none."""
        if job.result_url is None or job.callback_host is None or job.status == PENDING:
            raise Conflict(f"job {job.job_id} has no callback to send: it has not finished or has no result_url")
        then = functools.partial(self.callbacks.notify, job.callback_host, time.time())
        self.store.mark_callback_due(job, api_key, then)

    def send_callback(self, request: Request, job_id: str) -> Response:
        """Send a finished job's callback again; the body may bring the api_key, if the old one is erased."""
        job = self._find_job(request, job_id)
        body = read_body(request) if request.body else {}
        if set(body) - {"api_key"}:
            raise Conflict("Too many arguments. The body may hold an api_key and nothing else")
        self._resend(job, _check_api_key(body["api_key"]) if "api_key" in body else None)
        return self.show_job(request, job_id)

    def take_report(self, request: Request, job_id: str) -> Response:
        """Take what a job has logged that runs elsewhere, and its progress; say whether it was told to stop."""
        run = self.runner.find_remote(job_id, request.headers.get("authorization", ""))
        if run is None:
            raise Forbidden
        return Response.json({"cancelled": not self.runner.take_report(run, check_report(read_body(request)))})

    # -- pages

    def _viewer(self, request: Request) -> Viewer:
        return Viewer(self.settings["NAME"], self.auth.may_administer(request), request.target,
                      dict(request.query).get("done", ""))

    def overview_page(self, request: Request) -> Response:
        """Show what there is: numbers, latest failures, job types, the interface."""
        viewer, now = self._viewer(request), time.time()
        failures = [seq for seq, _ in self.store.list_jobs(5, status=ERROR)] if viewer.is_admin else []
        types = [job_type for job_type in map(self.registry.get, self.registry.names()) if job_type is not None]
        url = f"{request.scheme}://{request.headers.get('host') or 'localhost'}/job"
        return page_response(overview_page(viewer, Overview(
            self._count_states(), self.store.count_by_hour(int(now // 3600) - CHART_HOURS), now,
            self.store.get_light_jobs(failures), types, self.store.count_by_type(), url, ROUTES,
            dict(request.query).get("type", ""))))

    def login_page(self, request: Request) -> Response:
        """Show the form to sign in, or sign in."""
        if request.method != "POST" and basic_credentials(request) is None:
            return page_response(login_page(Viewer(self.settings["NAME"], False, "/login"), self._next_path(request)))
        try:
            return self.log_in(request)
        except CspError as error:
            page = login_page(Viewer(self.settings["NAME"], False, "/login"), self._next_path(request),
                              request.form.get("username", ""), error.message)
            return page_response(page, error.status, [pair for pair in error.headers if pair[0] == "Retry-After"])

    def jobs_page(self, request: Request) -> Response:
        """Show the list of jobs."""
        viewer = self._viewer(request)
        jobs, following = self._choose_jobs(request, PAGE_ROWS, PAGE_ROWS)
        shown = self.store.get_light_jobs(seq for seq, _ in jobs)
        return page_response(jobs_page(viewer, JobsView(shown, dict(request.query), following, self.registry.names(),
                                                        self.settings["KEEP_JOBS_AGE"], time.time())))

    def job_page(self, request: Request, job_id: str) -> Response:
        """Show one job, or ask for its key."""
        try:
            job = self._find_job(request, job_id)
        except Forbidden:
            return page_response(key_page(Viewer(self.settings["NAME"], False, request.path), job_path(job_id)), 403)
        level = dict(request.query).get("level", "")
        newest = self.store.list_newest_logs(job.seq, 1)
        lines = self.store.list_newest_logs(job.seq, PAGE_LINES, LEVELS.get(level, ()))
        return page_response(job_page(self._viewer(request), JobView(
            job, fit_lines([line for _, line in lines]), newest[0][0] if newest else 0,
            level if level in LEVELS else "", time.time())))

    def take_key(self, request: Request, job_id: str) -> Response:
        """Take the key of a job from its form, and keep it in a cookie for this job alone."""
        job = self.store.get_job(job_id) if not re.search(_BAD_ID, job_id) else None
        given, path = request.form.get("job_key", "").strip(), job_path(job_id)
        if job is None:
            raise CspError(404, "job_id not found")
        if not job.job_key or not is_same(given, job.job_key):
            viewer = Viewer(self.settings["NAME"], False, path)
            return page_response(key_page(viewer, path, "That is not the key of this job."), 403)
        return Response.redirect(path, [key_cookie(request, path, job.job_key)])

    def cancel_form(self, request: Request, job_id: str) -> Response:
        """Cancel a job and show it."""
        self.runner.cancel(self._find_job(request, job_id))
        return _go_to(job_path(job_id), "cancel")

    def delete_form(self, request: Request, job_id: str) -> Response:
        """Delete a job and go to the list."""
        self._delete(self._find_job(request, job_id))
        return _go_to("/job" if self.auth.may_administer(request) else "/", "delete")

    def callback_form(self, request: Request, job_id: str) -> Response:
        """Send a job's callback again and show the job."""
        api_key = request.form.get("api_key")
        self._resend(self._find_job(request, job_id), _check_api_key(api_key) if api_key else None)
        return _go_to(job_path(job_id), "callback")

    def resubmit_form(self, request: Request, job_id: str) -> Response:
        """Submit a job again and show the new one."""
        old = self._find_job(request, job_id)
        job = self._queue(_input_again(old, request.form.get("api_key")), old.job_id)
        path = job_path(job.job_id)
        return _go_to(path, "resubmit", [] if self.auth.may_administer(request) else
                      [key_cookie(request, path, job.job_key)])

    def _queue(self, body: Dict[str, Any], origin: Optional[str] = None) -> Job:
        """Submit a job that somebody will look at: it is queued, whatever its type."""
        submission = check_submission(body, self.registry)
        self._check_admission(submission)
        job = self._new_job(submission, None, origin, is_synchronous=False)
        self.store.add_job(job, self.runner.wake).wait()
        return job

    def act_on_selection(self, request: Request) -> Response:
        """Cancel, delete or resubmit the jobs chosen on a page of the list."""
        if not self.auth.may_administer(request):
            raise Forbidden
        form = request.form
        if form.get("action") not in ("cancel", "delete", "resubmit"):
            raise Conflict("action has to be cancel, delete or resubmit")
        job_ids = [value for name, value in request.fields if name == "job_id" and not re.search(_BAD_ID, value)]
        jobs = list(filter(None, map(self.store.get_job, dict.fromkeys(job_ids))))
        if form.get("action") == "resubmit":
            for job in jobs:  # all or none
                again = _input_again(job, form.get("api_key"))
                self._check_admission(check_submission(again, self.registry), len(jobs))
        for job in jobs:
            if form.get("action") == "delete":
                self._delete(job)
            elif form.get("action") == "resubmit":
                self._queue(_input_again(job, form.get("api_key")), job.job_id)
            elif form.get("action") == "cancel" and job.status == PENDING:
                with suppress(Conflict):  # it has just finished
                    self.runner.cancel(job)
        return _go_to(local_path(form.get("back"), "/job"), form["action"] if jobs else "none")

    def clear_form(self, request: Request) -> Response:
        """Clear old jobs and go to the list."""
        if not self.auth.may_administer(request):
            raise Forbidden
        days = request.form.get("days", "")
        if not re.fullmatch("[0-9]{1,5}", days):
            raise Conflict("days has to be a whole number from 0 to 99,999")
        self._clear(int(days))
        return _go_to("/job", "clear")

    def submit_form(self, request: Request) -> Response:
        """Show the form that submits a job, or submit what it holds."""
        viewer = self._viewer(request)
        if not viewer.is_admin:
            raise Forbidden
        form = request.form
        if request.method != "POST":
            return page_response(submit_page(viewer, self.registry.names(), {
                "job_type": dict(request.query).get("type", ""),
                "api_key": "" if self.settings["API_KEYS"] else "console"}))
        try:
            body: Dict[str, Any] = {name: form[name] for name in ("job_type", "api_key", "result_url")
                                    if form.get(name)}
            for name in ("data", "metadata"):
                if form.get(name, "").strip():
                    body[name] = _read_json_field(name, form[name])
            job = self._queue(body)
        except (Conflict, Forbidden, Unavailable) as error:  # what has been typed is not lost
            page = submit_page(viewer, self.registry.names(), form, error.message)
            return page_response(page, error.status, error.headers)
        return _go_to(job_path(job.job_id), "submit")

    def show_style(self, request: Request) -> Response:
        """Show the pages' style."""
        return Response(200, STYLE.encode("utf-8"), "text/css; charset=utf-8", ASSET_HEADERS)

    def show_script(self, request: Request) -> Response:
        """Show the pages' script."""
        return Response(200, SCRIPT.encode("utf-8"), "text/javascript; charset=utf-8", ASSET_HEADERS)

    # -- events

    def stream_job_events(self, request: Request, job_id: str) -> Response:
        """Stream what happens to a job as Server-Sent Events, until it has ended."""
        job = self._find_job(request, job_id)
        last_id = request.headers.get("last-event-id") or dict(request.query).get("last_event_id") or "0"
        if not re.fullmatch("[0-9]{1,18}", last_id):
            raise Conflict("Last-Event-ID has to be an id that this stream has sent")
        return Response(200, self._job_events(request, job, int(last_id)), "text/event-stream", STREAM_HEADERS)

    def _job_events(self, request: Request, job: Job, last_id: int) -> Iterator[bytes]:
        """Yield the events in the order of the log; many at once when much happens, see EVENT_SECONDS."""
        shown: Optional[Job] = None
        next_look = time.monotonic() + KEEP_ALIVE_SECONDS
        with self.store.watch(job.job_id) as changed:
            while True:
                changed.clear()
                current = next(iter(self.store.get_light_jobs([job.seq])), None)  # before the log: its end is its last
                if current is None:
                    yield render_event("status", {"status": "deleted", "state": "deleted"})
                    return
                lines = self.store.list_new_logs(job.seq, last_id, MAX_EVENT_LINES)
                while lines:
                    yield b"".join(render_event("log", line._asdict(), log_id) for log_id, line in lines)
                    last_id = lines[-1][0]
                    lines = self.store.list_new_logs(job.seq, last_id, MAX_EVENT_LINES)
                yield b"".join(_change_events(shown, current))
                shown = current
                if current.status != PENDING or self.store.is_released:
                    return
                if changed.wait(max(0.0, next_look - time.monotonic())):
                    watchers = self.store.count_watchers(job.job_id)
                    self._closing.wait(EVENT_SECONDS + watchers * EVENT_SECONDS_PER_WATCHER)
                if time.monotonic() >= next_look:
                    with suppress(TooManyRequests):  # somebody else at this address guesses passwords
                        if not self.auth.may_see(request, job):
                            return
                    yield b": keep-alive\n\n"
                    next_look = time.monotonic() + KEEP_ALIVE_SECONDS

    def stream_events(self, request: Request) -> Response:
        """Stream the numbers of jobs as Server-Sent Events, whenever they change."""
        return Response(200, self._stats_events(), "text/event-stream", STREAM_HEADERS)

    def _stats_events(self) -> Iterator[bytes]:
        shown: Dict[str, int] = {}
        next_look = time.monotonic() + KEEP_ALIVE_SECONDS
        with self.store.watch(ANY_JOB) as changed:
            while not self.store.is_released:
                changed.clear()
                stats = self._count_states()
                is_new = stats != shown
                yield render_event("stats", stats) if is_new else b""
                shown = stats  # a run leaves the numbers just after its end has been written: look once more
                changed.wait(STATS_SECONDS if is_new else max(0.0, next_look - time.monotonic()))
                if time.monotonic() >= next_look:
                    yield b": keep-alive\n\n"
                    next_look = time.monotonic() + KEEP_ALIVE_SECONDS
                self._closing.wait(STATS_SECONDS)

    def _count_states(self) -> Dict[str, int]:
        """Return how many jobs wait, run, are complete and failed."""
        totals, running = self.store.count_jobs(), self.runner.running
        return {QUEUED: max(0, totals[PENDING] - running), RUNNING: running, COMPLETE: totals[COMPLETE],
                ERROR: totals[ERROR]}

    # -- for machines

    def show_openapi(self, request: Request) -> Response:
        """Show a description of all routes as OpenAPI 3.1."""
        return Response.json(describe_api(ROUTES, self.registry.names(), self.settings["NAME"]))

    def show_metrics(self, request: Request) -> Response:
        """Show what there is to measure, in the text format of Prometheus."""
        due_since = self.store.get_longest_due()
        states = self._count_states()
        by_type = [((("job_type", job_type), ("status", status)), jobs)
                   for (job_type, status), jobs in sorted(self.store.count_by_type().items())]
        build = (("version", __version__), ("python", sys.version.split()[0]), ("sqlite", sqlite_version()))
        lines = [
            *metric_lines("csp_build_info", "gauge", "What runs here.", [(build, 1)]),
            *metric_lines("process_start_time_seconds", "gauge", "When the service started (seconds since 1970).",
                          [((), self.metrics.started)]),
            *metric_lines("csp_jobs", "gauge", "Jobs in the database by type and status.", by_type),
            *metric_lines("csp_jobs_running", "gauge", "Jobs that run.", [((), states[RUNNING])]),
            *metric_lines("csp_jobs_waiting", "gauge", "Jobs that wait to be run.", [((), states[QUEUED])]),
            *metric_lines("csp_jobs_longest_waiting_seconds", "gauge", "How long the job that runs next has been due.",
                          [((), max(0.0, time.time() - due_since) if due_since else 0.0)]),
        ]
        return Response(200, self.metrics.render(lines).encode("utf-8"), "text/plain; version=0.0.4; charset=utf-8")


def _input_again(job: Job, api_key: Optional[str]) -> Dict[str, Any]:
    """Return what submits the job again; the old api_key may be erased."""
    return {**job.read_input(), "api_key": api_key or job.api_key}


def _go_to(path: str, done: str, headers: Iterable[Tuple[str, str]] = ()) -> Response:
    """Return the redirect that ends a form, to a page that says what has been done."""
    path, _, query = path.partition("?")
    kept = [pair for pair in urllib.parse.parse_qsl(query) if pair[0] != "done"]
    return Response.redirect(f"{path}?{urllib.parse.urlencode([*kept, ('done', done)])}", headers)


def _read_json_field(name: str, text: str) -> Any:
    try:
        return from_json(text.encode("utf-8", "replace"))
    except ValueError as error:
        raise Conflict(f"{name} is not JSON: {error}") from None


def _change_events(shown: Optional[Job], current: Job) -> Iterator[bytes]:
    """Yield the events for what is other than what was ``shown`` last."""
    if current.progress is not None and (shown is None or shown.progress != current.progress):
        yield render_event("progress", json.loads(current.progress))
    if shown is None or (shown.state, shown.attempts) != (current.state, current.attempts):
        yield render_event("status", {
            "status": current.status, "state": current.state, "attempts": current.attempts,
            "started_timestamp": current.started_timestamp, "finished_timestamp": current.finished_timestamp,
            "error": json.loads(current.error) if current.error else None})


class _Prepended:
    """An iterator that gives ``first`` before the rest, and passes ``close`` on."""

    def __init__(self, first: bytes, rest: Iterator[bytes]) -> None:
        self._chain = itertools.chain([first], rest)
        self.close = getattr(rest, "close", lambda: None)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._chain)


ROUTES = (
    Route("GET", "/", Service.show_help, "where the documentation is", "Help", page=Service.overview_page),
    Route("GET", "/status", Service.show_status, "version, job types, name, numbers of jobs", "Status"),
    Route("GET", "/events", Service.stream_events, "numbers of jobs, as they change", "text/event-stream"),
    Route("GET", "/metrics", Service.show_metrics, "measurements for Prometheus", "text/plain"),
    Route("GET", "/openapi.json", Service.show_openapi, "this description of the interface", "application/json"),
    Route("GET", "/login", Service.log_in, "begin a session with Basic auth", "redirect",
          parameters=("next",), refusals=(401, 403), page=Service.login_page),
    Route("POST", "/login", Service.log_in, "begin a session with Basic auth or a form", "redirect", body="Login",
          parameters=("next",), refusals=(401, 403), page=Service.login_page),
    Route("GET", "/logout", Service.log_out, "end the session", "redirect", parameters=("next",)),
    Route("POST", "/logout", Service.log_out, "end the session", "redirect", parameters=("next",)),
    Route("GET", "/user", Service.show_user, "who is logged in", "User"),
    Route("GET", "/job", Service.list_jobs, "list job ids", "JobList", parameters=(*LIST_PARAMETERS[:6], "metadata"),
          refusals=(403,), page=Service.jobs_page),
    Route("POST", "/job", Service.submit, "submit a job", "SubmittedJob", body="Submission", parameters=("Prefer",),
          refusals=(403,)),
    Route("DELETE", "/job", Service.clear_jobs, "clear old jobs", "Cleared", ADMIN, parameters=("days",)),
    Route("GET", "/job/<job_id>", Service.show_job, "show a job", "Job", JOB_KEY, parameters=("limit", "Prefer"),
          refusals=(404,), page=Service.job_page),
    Route("POST", "/job/<job_id>", Service.submit, "submit a job under an id of your own", "SubmittedJob",
          body="Submission", parameters=("Prefer",), refusals=(403,)),
    Route("PUT", "/job/<job_id>", Service.put_job, "submit a job under an id of your own; may be repeated",
          "SubmittedJob", body="Submission", parameters=("Prefer",), refusals=(403,)),
    Route("DELETE", "/job/<job_id>", Service.delete_job, "delete a job", "Success", JOB_KEY, refusals=(404,)),
    Route("GET", "/job/<job_id>/data", Service.show_data, "the raw result of a job", RAW_RESULT, JOB_KEY,
          parameters=("Prefer",), refusals=(404,)),
    Route("GET", "/job/<job_id>/events", Service.stream_job_events, "what happens to a job, as it happens",
          "text/event-stream", JOB_KEY, parameters=("Last-Event-ID", "last_event_id"), refusals=(404,)),
    Route("POST", "/job/<job_id>/cancel", Service.cancel_job, "cancel a job", "Job", JOB_KEY, refusals=(404,),
          page=Service.cancel_form),
    Route("POST", "/job/<job_id>/resubmit", Service.resubmit_job, "submit a job again", "SubmittedJob", JOB_KEY,
          body="NewKey", parameters=("Prefer",), refusals=(404,), page=Service.resubmit_form),
    Route("POST", "/job/<job_id>/callback", Service.send_callback, "send a job's callback again", "Job", JOB_KEY,
          body="NewKey", refusals=(404,), page=Service.callback_form),
    Route("POST", "/job/<job_id>/report", Service.take_report, "report from the worker that runs a job elsewhere",
          "Instruction", RUN_TOKEN, body="Report"),
)
CONSOLE_ROUTES = (  # what only the pages' own forms use
    Route("GET", STYLE_PATH, Service.show_style, "the style of the pages", "text/css"),
    Route("GET", SCRIPT_PATH, Service.show_script, "the script of the pages", "text/javascript"),
    Route("GET", "/console/submit", Service.submit_form, "the form that submits a job", "text/html", ADMIN),
    Route("POST", "/console/submit", Service.submit_form, "submit a job", "text/html", ADMIN),
    Route("POST", "/console/selection", Service.act_on_selection, "act on the chosen jobs", "text/html", ADMIN),
    Route("POST", "/console/clear", Service.clear_form, "clear old jobs", "text/html", ADMIN),
    Route("POST", "/job/<job_id>/delete", Service.delete_form, "delete a job", "text/html", JOB_KEY),
    Route("POST", "/job/<job_id>/key", Service.take_key, "take the key of a job", "text/html"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Transports
#
# Bytes in, bytes out. The standard library's handler is trusting and slow (a body it does not read becomes the next
# request, no limits, two packets per answer); this one parses strictly by RFC 9112 and closes the connection on
# anything ambiguous, so that no byte is ever taken for a next request. One receive and one send per request.
# ---------------------------------------------------------------------------------------------------------------------

MAX_CHUNK_LINE_BYTES = 4096  # a chunk's size and extensions
LINGER_SECONDS = 1.0  # after a refusal: read on for so long, or the client's system may drop the answer unread,
LINGER_BYTES = 2**20  # and not more than what may be on its way already
BACKLOG = 1024  # connections that a burst may open before the first is accepted
ACCESS_LOG_SECONDS = 0.2  # between writes of what has been requested
SPARE_THREAD_SECONDS = 5.0  # how long a connection thread waits for another connection
RECEIVE_BYTES = 65_536
LARGE_BYTES = 2**20  # what is larger is not copied more than need be
KEPT_HEAD_BYTES = 4096  # clients repeat their heads: up to this size one is compared before it is parsed again

_REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([\t\x20-\x7e\x80-\xff]*)")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HOST = re.compile(r"(?:[!$&'()*+,;=\-._~%0-9A-Za-z]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_CHUNK_SIZE = rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?"
_ABSOLUTE = r"(?i)https?://[^/?#]*"
_SINGLE_FIELDS = frozenset(("host", "content-length", "transfer-encoding", "content-type", "authorization", "expect"))
_SECURITY_LINES = {name: f"{name}: {value}\r\n" for name, value in SECURITY_HEADERS}
_SECURITY_TEXT = "".join(_SECURITY_LINES.values())

_FULL_HOUSE = (b"HTTP/1.1 503 Service Unavailable\r\nServer: csp\r\nContent-Type: application/json\r\n"
               b"Retry-After: 5\r\nConnection: close\r\n\r\n"
               b'{"error": "There are too many connections; try again later."}')


class Head(NamedTuple):
    """The parsed head of a request."""

    method: str
    target: str
    headers: Dict[str, str]
    is_http_1_0: bool

    @property
    def keeps_alive(self) -> bool:
        """Whether the client leaves the connection open (RFC 9112, section 9.3)."""
        if "connection" not in self.headers:
            return not self.is_http_1_0
        options = {option.strip().lower() for option in self.headers["connection"].split(",")}
        return "keep-alive" in options if self.is_http_1_0 else "close" not in options


class Limits(NamedTuple):
    """The settings that bound a connection, by their names in lower case."""

    max_body_bytes: int
    max_url_bytes: int
    max_header_bytes: int
    max_header_fields: int
    header_seconds: float
    body_seconds: float
    body_bytes_per_second: int
    send_seconds: float
    idle_seconds: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Limits:
        """Return the limits that the settings set."""
        return cls(*(settings[name.upper()] for name in cls._fields))


def parse_head(head: bytes, limits: Limits) -> Head:
    """Parse request line and fields; raise the CspError of what RFC 9112 and RFC 9110 do not allow."""
    lines = head.decode("latin-1").split("\r\n")
    if len(lines[0]) > limits.max_url_bytes:
        raise CspError(414, f"The request line is longer than {limits.max_url_bytes} bytes.")
    line = _REQUEST_LINE.fullmatch(lines[0])
    if line is None:
        raise CspError(400, "The request line is not one of HTTP/1.1.")
    if line[3] != "1":
        raise CspError(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    if len(lines) - 1 > limits.max_header_fields:
        raise CspError(431, f"There are more than {limits.max_header_fields} header fields.")
    headers = _parse_fields(lines[1:])
    is_http_1_0 = line[4] == "0"
    if not _HOST.fullmatch(headers.get("host", "" if is_http_1_0 else "\n")):
        raise CspError(400, "There has to be one valid Host field.")
    return Head(line[1], _local_target(line[2], line[1]), headers, is_http_1_0)


def _parse_fields(lines: Iterable[str]) -> Dict[str, str]:
    headers: Dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise CspError(400, "A header field is malformed.")
        name, value = field[1].lower(), field[2].strip(" \t")
        if name in headers:
            if name in _SINGLE_FIELDS:
                raise CspError(400, f"The field {name} is there twice.")
            value = f"{headers[name]}{';' if name == 'cookie' else ','} {value}"
        headers[name] = value
    return headers


def _local_target(target: str, method: str) -> str:
    """Return the path and query of a request target (RFC 9112, section 3.2)."""
    if target == "*" and method == "OPTIONS":
        return "/"
    if not target.startswith("/"):
        origin = re.match(_ABSOLUTE, target)
        if origin is None:
            raise CspError(400, "The request target is neither a path nor an http address.")
        target = target[origin.end():]
        target = target if target.startswith("/") else "/" + target
    if "#" in target:
        raise CspError(400, "A request target has no fragment.")
    return target


def body_length(head: Head, maximum: int) -> Optional[int]:
    """Return the body's length in bytes, None if it comes in chunks; raise the CspError of what is not allowed."""
    length, coding = head.headers.get("content-length"), head.headers.get("transfer-encoding")
    if coding is not None:
        if length is not None or head.is_http_1_0 or coding.lower() != "chunked":
            raise CspError(400, "The only transfer coding is chunked, in HTTP/1.1, without a Content-Length.")
        return None
    if length is None:
        return 0
    if not re.fullmatch("[0-9]+", length):
        raise CspError(400, "The Content-Length is not a number.")
    if len(length) > 18 or int(length) > maximum:
        raise CspError(413, f"The body is larger than {maximum:,} bytes.")
    return int(length)


class _Disconnected(Exception):
    """The client has gone or has been quiet for too long; there is nobody to answer."""


def _set_socket_timeout(connection: socket.socket, option: int, seconds: float) -> None:
    """Bound a blocking receive or send in the kernel: cheaper than settimeout, which polls before each call."""
    if sys.platform == "win32":
        connection.setsockopt(socket.SOL_SOCKET, option, int(seconds * 1000))
    else:
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


class RequestHandler(socketserver.BaseRequestHandler):
    """One connection: reads requests, has them answered, until one of the sides closes."""

    server: Server

    def setup(self) -> None:
        """Prepare the socket."""
        self._limits = self.server.limits
        self.connection: socket.socket = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_socket_timeout(self.connection, socket.SO_RCVTIMEO, 1.0)
        _set_socket_timeout(self.connection, socket.SO_SNDTIMEO, self._limits.send_seconds)
        self._buffer = bytearray()
        self._head: Optional[Head] = None
        self._last_head: Tuple[bytes, Optional[Head]] = b"", None
        self.is_idle, self.idle_since = True, time.monotonic()
        self.server.enter(self)

    def finish(self) -> None:
        """Be forgotten by the server."""
        self.server.leave(self)

    def handle(self) -> None:
        """Serve the connection."""
        try:
            while self._serve_request():
                pass
        except (_Disconnected, OSError):
            pass

    def close_if_idle(self) -> bool:
        """Close the connection if no request is under way (called by the server); return whether it did."""
        if not self.is_idle:
            return False
        self.is_idle = False
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def _serve_request(self) -> bool:
        """Read and answer one request; return whether another may follow."""
        self._head = None
        started = 0.0
        try:
            raw = self._read_head()
            started = time.monotonic()
            known, last_head = self._last_head
            if raw != known or last_head is None:  # else it says what the one before it said
                last_head = parse_head(raw, self._limits)
                self._last_head = (raw, last_head) if len(raw) <= KEPT_HEAD_BYTES else (b"", None)
            self._head = head = last_head
            body = self._read_body(head)
        except CspError as error:
            self._send(Response.error(error), keeps_alive=False)
            self._log_access(error.status, 0, started)
            self._linger()
            return False
        address, scheme = self.server.trust.identify(self.client_address[0], head.headers)
        request = Request(head.method, head.target, head.headers, body, address, scheme)
        del body  # the request's alone, so that it is gone when that has read it
        response = self.server.service.handle(request)
        keeps_alive = head.keeps_alive and not self.server.is_stopping
        sent, keeps_alive = self._send(response, keeps_alive)
        self._log_access(response.status, sent, started, address)
        return keeps_alive

    # -- receiving

    def _receive(self, deadline: float) -> None:
        """Add what comes to the buffer; raise CspError (408) after ``deadline`` (monotonic)."""
        while True:
            try:
                data = self.connection.recv(RECEIVE_BYTES)
            except (BlockingIOError, socket.timeout):
                data = None
            if data == b"":
                raise _Disconnected
            if time.monotonic() > deadline or (self.server.is_stopping and self.is_idle and not data):
                raise CspError(408, "The request took too long to arrive.")
            if data:
                self._buffer += data
                return

    def _read_head(self) -> bytes:
        """Return the bytes up to the empty line, without it."""
        self.is_idle, self.idle_since = not self._buffer, time.monotonic()
        deadline = time.monotonic() + (self._limits.idle_seconds if self.is_idle else self._limits.header_seconds)
        while True:
            if self._buffer:
                while self._buffer.startswith(b"\r\n"):  # RFC 9112, section 2.2: ignore empty lines before a request
                    del self._buffer[:2]
                end = self._buffer.find(b"\r\n\r\n")
                if 0 <= end <= self._limits.max_header_bytes:
                    head = bytes(self._buffer[:end])
                    del self._buffer[:end + 4]
                    self.is_idle = False
                    return head
                self._check_partial_head()
            try:
                self._receive(deadline)
            except CspError:
                if self.is_idle:
                    raise _Disconnected from None
                raise
            if self.is_idle:
                self.is_idle = False
                deadline = time.monotonic() + self._limits.header_seconds

    def _check_partial_head(self) -> None:
        """Raise for a head that can no longer become a good one, so that its sender need not wait for the time."""
        if b"\n" not in self._buffer and len(self._buffer) > self._limits.max_url_bytes:
            raise CspError(414, f"The request line is longer than {self._limits.max_url_bytes} bytes.")
        if _BARE_LF.search(self._buffer):
            raise CspError(400, "Lines have to end with CR and LF.")
        if len(self._buffer) > self._limits.max_header_bytes:
            raise CspError(431, f"The header is larger than {self._limits.max_header_bytes} bytes.")

    def _read_body(self, head: Head) -> bytes:
        length = body_length(head, self._limits.max_body_bytes)
        expectation = head.headers.get("expect", "").lower()
        if expectation and expectation != "100-continue":
            raise CspError(417, "The only expectation that is met is 100-continue.")
        if expectation and not head.is_http_1_0 and length != 0 and not self._buffer:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._read_chunks() if length is None else self._read_bytes(length)

    def _body_deadline(self, started: float, received: int) -> float:
        """Return until when more has to come: what has come earns time, what was announced does not."""
        return started + self._limits.body_seconds + received / self._limits.body_bytes_per_second

    def _read_bytes(self, length: int) -> bytes:
        if length - len(self._buffer) > LARGE_BYTES:
            return self._read_large(length)
        started = time.monotonic() if len(self._buffer) < length else 0.0
        while len(self._buffer) < length:
            self._receive(self._body_deadline(started, len(self._buffer)))
        if len(self._buffer) == length:
            body, self._buffer = self._buffer, bytearray()
            return bytes(body)
        data = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        return data

    def _read_large(self, length: int) -> bytes:
        """Read a large body to where it stays: memory that is not yet written to is not yet taken."""
        started = time.monotonic()
        body = bytearray(length)
        have = len(self._buffer)
        body[:have] = self._buffer
        self._buffer = bytearray()
        view = memoryview(body)
        while have < length:
            try:
                count = self.connection.recv_into(view[have:have + LARGE_BYTES])
            except (BlockingIOError, socket.timeout):
                count = -1
            if count == 0:
                raise _Disconnected
            if time.monotonic() > self._body_deadline(started, have):
                raise CspError(408, "The request took too long to arrive.")
            have += max(count, 0)
        view.release()
        return bytes(body)

    def _read_chunks(self) -> bytes:
        """Decode a chunked body (RFC 9112, section 7.1); trailers are checked and dropped."""
        body = bytearray()
        started = time.monotonic()
        while True:
            deadline = self._body_deadline(started, len(body))
            size = re.fullmatch(_CHUNK_SIZE, self._read_line(deadline))
            if size is None:
                raise CspError(400, "A chunk's size is malformed.")
            length = int(size[1], 16)
            if len(body) + length > self._limits.max_body_bytes:
                raise CspError(413, f"The body is larger than {self._limits.max_body_bytes:,} bytes.")
            if length == 0:
                self._read_trailers(deadline)
                return bytes(body)
            while len(self._buffer) < length + 2:
                self._receive(self._body_deadline(started, len(body) + len(self._buffer)))
            if self._buffer[length:length + 2] != b"\r\n":
                raise CspError(400, "A chunk does not end where it says.")
            body += memoryview(self._buffer)[:length]
            del self._buffer[:length + 2]

    def _read_line(self, deadline: float) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", 0, MAX_CHUNK_LINE_BYTES)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[:end + 2]
                return line
            if len(self._buffer) >= MAX_CHUNK_LINE_BYTES:
                raise CspError(400, "A line of a chunked body is too long.")
            self._receive(deadline)

    def _read_trailers(self, deadline: float) -> None:
        for _ in range(self._limits.max_header_fields):
            line = self._read_line(deadline)
            if not line:
                return
            _parse_fields([line.decode("latin-1")])
        raise CspError(400, "There are too many trailers.")

    # -- sending

    def _send(self, response: Response, keeps_alive: bool) -> Tuple[int, bool]:
        """Send the answer, in one piece if it is not streamed; return the body's bytes and whether to go on."""
        is_head = self._head is not None and self._head.method == "HEAD"
        body = response.body
        if not isinstance(body, (bytes, Pieces)):
            return self._send_stream(response, keeps_alive)
        has_body = response.status not in (204, 304)
        size = len(body)
        head = self._build_head(response, f"Content-Length: {size}\r\n" if has_body else "", keeps_alive)
        if is_head or not has_body:
            body, size = b"", 0
        if isinstance(body, bytes) and size < RECEIVE_BYTES:
            self.connection.sendall(head + body)
        else:
            self.connection.sendall(head)
            self._send_large([body] if isinstance(body, bytes) else body, size)
        return size, keeps_alive

    def _send_large(self, parts: Iterable[bytes], size: int) -> None:
        """Send a large body; raise _Disconnected if the client is too slow, also if it reads a little all the time."""
        deadline = time.monotonic() + self._limits.send_seconds + size / self._limits.body_bytes_per_second
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[self.connection.send(left):]
                if time.monotonic() > deadline:
                    raise _Disconnected

    def _build_head(self, response: Response, framing: str, keeps_alive: bool) -> bytes:
        fields = _SECURITY_TEXT
        if response.headers:
            lines = {**_SECURITY_LINES, **{name: "" for name, _ in response.headers}}
            fields = "".join([f"{name}: {value}\r\n" for name, value in response.headers] + [*lines.values()])
        is_http_1_0 = self._head is not None and self._head.is_http_1_0
        connection = "" if keeps_alive != is_http_1_0 else f"Connection: {'keep-alive' if keeps_alive else 'close'}\r\n"
        text = (f"HTTP/1.1 {response.status} {_REASONS.get(response.status, '')}\r\nServer: csp\r\n"
                f"Date: {self.server.http_date()}\r\nContent-Type: {response.content_type}\r\n"
                f"{framing}{connection}{fields}\r\n")
        return text.encode("latin-1")

    def _send_stream(self, response: Response, keeps_alive: bool) -> Tuple[int, bool]:
        """Send a streamed body in chunks, to HTTP/1.0 until the end of the connection."""
        assert not isinstance(response.body, (bytes, Pieces))
        is_head = self._head is not None and self._head.method == "HEAD"
        is_chunked = self._head is not None and not self._head.is_http_1_0
        framing = "Transfer-Encoding: chunked\r\n" if is_chunked else ""
        sent = 0
        try:
            self.connection.sendall(self._build_head(response, framing, keeps_alive and is_chunked))
            for part in response.body if not is_head else ():
                if part:
                    sent += len(part)
                    self.connection.sendall(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
            if is_chunked and not is_head:
                self.connection.sendall(b"0\r\n\r\n")
        except (StreamBroken, Unavailable):
            return sent, False
        finally:
            getattr(response.body, "close", lambda: None)()
        return sent, keeps_alive and is_chunked

    def _linger(self) -> None:
        """Let the client read a refusal before the connection goes: closing with unread bytes resets it."""
        self.connection.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
        while time.monotonic() < deadline and left > 0:
            try:
                received = len(self.connection.recv(RECEIVE_BYTES))
            except (BlockingIOError, socket.timeout):
                return
            left -= received or left

    def _log_access(self, status: int, sent: int, started: float, address: Optional[str] = None) -> None:
        head = self._head
        request = (head.method, head.target, 0 if head.is_http_1_0 else 1) if head else None
        self.server.access.add(address or self.client_address[0], request, status, sent,
                               (time.monotonic() - started) * 1000 if started else 0.0)


class AccessLog:
    """Logs requests in Common Log Format, a few times a second: a write for each would cost more than its answer.

    Any thread may call its methods. The query is left out: it may hold what is nobody's business.
    """

    def __init__(self) -> None:
        self._entries: Deque[Tuple[Any, ...]] = deque()
        self._is_wanted = threading.Event()
        self._has_thread = self._is_closed = False

    def add(self, *entry: Any) -> None:
        """Note a request: address, (method, target, minor version) or None, status, bytes sent, milliseconds."""
        if access_log.isEnabledFor(logging.INFO):
            self._entries.append((time.time(), *entry))
            if not self._is_wanted.is_set():
                self._is_wanted.set()
                if not self._has_thread:
                    self._has_thread = True
                    threading.Thread(target=self._run, name="csp-access", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while not self._is_closed:
            self._is_wanted.wait()
            pause.wait(0.0 if self._is_closed else ACCESS_LOG_SECONDS)
            self._is_wanted.clear()
            self.flush()

    def close(self) -> None:
        """Log what is left, and end."""
        self._is_closed = True
        self._is_wanted.set()
        self.flush()

    def flush(self) -> None:
        """Log what has been noted."""
        lines = [self._line(*self._entries.popleft()) for _ in range(len(self._entries))]
        if lines:
            access_log.info("%s", "\n".join(lines))

    @staticmethod
    def _line(when: float, address: str, request: Optional[Tuple[str, str, int]], status: int, sent: int,
              milliseconds: float) -> str:
        words = "-"
        if request is not None:
            method, target, minor = request
            path = target.partition("?")[0].replace('"', "%22")
            words = f"{method} {path} HTTP/1.{minor}"
        line = f'{address} - - [{_log_date(int(when))}] "{words}" {status} {sent} {milliseconds:.1f}ms'
        return line if line.isascii() and line.isprintable() else line.encode("unicode_escape").decode("ascii")


@functools.lru_cache(maxsize=4)
def _log_date(second: int) -> str:
    return time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second))


class Server(ThreadingHTTPServer):
    """The HTTP server of a service: a bounded number of connections, each with a thread; threads are used again.

    Binds in the constructor (port 0 picks one; ``url`` tells), raises StartError if it cannot. ``serve_forever`` and
    ``stop`` are called from different threads.
    """

    request_queue_size = BACKLOG
    daemon_threads = True
    allow_reuse_port = False

    def __init__(self, service: Service, host: Optional[str] = None, port: Optional[int] = None) -> None:
        self.service = service
        self.trust = ProxyTrust(service.settings["TRUSTED_PROXIES"])
        self.is_stopping = False
        self.access = AccessLog()
        self.limits = Limits.of(service.settings)
        self._max_connections: int = service.settings["MAX_CONNECTIONS"]
        self._max_per_address: int = service.settings["MAX_CONNECTIONS_PER_ADDRESS"]
        self._accepted: queue.SimpleQueue[Tuple[socket.socket, Any]] = queue.SimpleQueue()
        self._lock = threading.Condition()  # guards the next four
        self._spare_threads = 0
        self._connections = 0
        self._per_address: Dict[str, int] = {}
        self._handlers: Set[RequestHandler] = set()
        self._date = (0, "")
        host = service.settings["HOST"] if host is None else host
        port = service.settings["PORT"] if port is None else int(port)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), RequestHandler)
        except OSError as error:
            raise StartError(f"The address {host} port {port} cannot be used: {error.strerror}; "
                             "choose another with --host or --port.") from None
        except OverflowError:
            raise StartError(f"The port {port} is not between 0 and 65535.") from None
        _closed_in_children.add(self)
        service.reachable_at(self.url)

    def server_bind(self) -> None:
        """Bind, without the look-up of a name that the standard server makes (slow without DNS)."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """The address to reach the service at from this machine, with a slash at the end."""
        host = str(self.server_name)
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{self.server_port}/"

    def http_date(self) -> str:
        """Return the time as a Date field has it, made once a second."""
        second = int(time.time())
        if self._date[0] != second:
            self._date = (second, email.utils.formatdate(second, usegmt=True))
        return self._date[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection to a spare thread or a new one; refuse it if there are too many."""
        address = client_address[0]
        with self._lock:
            is_full = (self._connections >= self._max_connections and not self._close_an_idle_one()) or (
                self._per_address.get(address, 0) >= self._max_per_address and not self.trust.is_trusted(address))
            if not is_full:
                self._connections += 1
                self._per_address[address] = self._per_address.get(address, 0) + 1
            has_thread = self._spare_threads > 0
            self._spare_threads -= has_thread and not is_full
        if is_full:
            self._refuse(request)
            return
        if has_thread:
            self._accepted.put((request, client_address))
            return
        try:
            threading.Thread(target=self._serve_connections, args=(request, client_address), name="csp-connection",
                             daemon=True).start()
        except RuntimeError:  # no more threads
            self._uncount(address)
            self._refuse(request)

    def _close_an_idle_one(self) -> bool:
        idle = [handler for handler in self._handlers if handler.is_idle]
        return bool(idle) and min(idle, key=lambda handler: handler.idle_since).close_if_idle()

    def enter(self, handler: RequestHandler) -> None:
        """Know a connection."""
        with self._lock:
            self._handlers.add(handler)

    def leave(self, handler: RequestHandler) -> None:
        """Forget a connection."""
        with self._lock:
            self._handlers.discard(handler)

    def _refuse(self, request: socket.socket) -> None:
        try:
            request.settimeout(0.1)
            request.sendall(_FULL_HOUSE)
        except OSError:
            pass
        self.shutdown_request(request)

    def _serve_connections(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and others as long as they come."""
        while True:
            try:
                self.process_request_thread(request, client_address)
            finally:
                self._uncount(client_address[0], spare_threads=1)
            while True:
                try:
                    request, client_address = self._accepted.get(timeout=SPARE_THREAD_SECONDS)
                    break
                except queue.Empty:
                    with self._lock:
                        if self._spare_threads > 0:  # else a connection is on its way to this thread
                            self._spare_threads -= 1
                            return

    def _uncount(self, address: str, spare_threads: int = 0) -> None:
        with self._lock:
            self._connections -= 1
            self._spare_threads += spare_threads
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]
            self._lock.notify_all()

    def close_in_child(self) -> None:
        """Close the listening socket in a child process that a job has forked."""
        self.socket.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a handler did not expect; the connection is closed."""
        log.exception("a connection from %s failed", client_address[0])

    def stop(self, timeout_seconds: float) -> None:
        """Accept no more, let requests under way end, close the rest of the connections when they are idle."""
        self.is_stopping = True
        self.service.release()
        self.shutdown()
        self.server_close()
        with self._lock:
            for handler in self._handlers:
                handler.close_if_idle()
            self._lock.wait_for(lambda: self._connections == 0, timeout_seconds)
        self.access.close()

    def server_close(self) -> None:
        """Close the listening socket; connections end by themselves."""
        self.socket.close()


class Wsgi:
    """A service as a WSGI application (PEP 3333), for servers with one process and many threads."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._trust = ProxyTrust(service.settings["TRUSTED_PROXIES"])
        self._max_body_bytes: int = service.settings["MAX_BODY_BYTES"]

    def __call__(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request; a streamed result that breaks off raises, so that the server cuts the connection."""
        try:
            response = self._service.handle(self._read_request(environ))
        except CspError as error:
            response = Response.error(error)
        headers = [("Content-Type", response.content_type), *response.headers]
        names = {name for name, _ in headers}
        headers += [(name, value) for name, value in SECURITY_HEADERS if name not in names]
        content = [response.body] if isinstance(response.body, bytes) else response.body
        if isinstance(response.body, (bytes, Pieces)):
            headers.append(("Content-Length", str(len(response.body))))
        body: Iterable[bytes] = [] if environ["REQUEST_METHOD"] == "HEAD" else content
        start_response(f"{response.status} {_REASONS.get(response.status, '')}", headers)
        return body

    def _read_request(self, environ: Dict[str, Any]) -> Request:
        headers = {name[5:].replace("_", "-").lower(): str(value) for name, value in environ.items()
                   if name.startswith("HTTP_")}
        headers["content-type"] = environ.get("CONTENT_TYPE") or ""
        path = urllib.parse.quote(environ.get("PATH_INFO", "").encode("latin-1")) or "/"
        target = f"{path}?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else path
        address, scheme = self._trust.identify(environ.get("REMOTE_ADDR") or "", headers, environ["wsgi.url_scheme"])
        return Request(environ["REQUEST_METHOD"], target, headers, self._read_body(environ), address, scheme)

    def _read_body(self, environ: Dict[str, Any]) -> bytes:
        length = environ.get("CONTENT_LENGTH") or ""
        if not re.fullmatch("[0-9]{0,18}", length):
            raise CspError(400, "The Content-Length is not a number.")
        if not length and not environ.get("wsgi.input_terminated"):
            return b""
        wanted = int(length) if length else self._max_body_bytes + 1
        if int(length or 0) > self._max_body_bytes:
            raise CspError(413, f"The body is larger than {self._max_body_bytes:,} bytes.")
        body: bytes = environ["wsgi.input"].read(wanted)
        if length and len(body) < wanted:
            raise CspError(400, "The body is shorter than its Content-Length.")
        if len(body) > self._max_body_bytes:
            raise CspError(413, f"The body is larger than {self._max_body_bytes:,} bytes.")
        return body


class _LogFormatter(logging.Formatter):
    """One line per record, whatever was logged; access lines stand as they are."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, and its traceback below it."""
        if record.name == access_log.name:
            return record.getMessage()
        message = record.getMessage().encode("unicode_escape").decode("ascii")
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _open_log_file(path: str) -> logging.Handler:
    """Return the handler for a rotating file that only its owner may read; raise OSError."""
    from logging.handlers import RotatingFileHandler

    class LogFile(RotatingFileHandler):
        def _open(self) -> Any:
            return os.fdopen(os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a",
                             encoding="utf-8")

    return LogFile(path, maxBytes=64 * 2**20, backupCount=5)


def configure_logging(settings: Settings) -> None:
    """Send this program's log to where the settings say; raise StartError if the file cannot be written."""
    handlers: List[logging.Handler] = []
    if settings["STDERR"]:
        handlers.append(logging.StreamHandler())
    if settings["LOG_FILE"]:
        try:
            handlers.append(_open_log_file(settings["LOG_FILE"]))
        except OSError as error:
            raise StartError(f"The log file {settings['LOG_FILE']} cannot be written: {error.strerror}.") from None
    if settings["ADMINS"]:
        from logging.handlers import SMTPHandler
        import smtplib  # noqa: F401 - or the handler imports it when something has gone wrong
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
    access_log.disabled = not handlers  # lines that nobody reads need not be made
    for doubt in settings.doubts:
        log.warning("%s", doubt)


def announce(server: Server, stream: TextIO) -> None:
    """Print in a few lines what runs where, how to log in, and a command that works."""
    service = server.service
    types = service.registry.names()
    lines = [f"{service.settings['NAME']} (csp.py {__version__}) at {server.url}",
             f"Job types: {', '.join(types) or 'none; name a module that has some with --jobs'}",
             f"Database:  {os.path.abspath(service.database) if service.database else 'in memory, gone at the end'}"]
    if service.auth.generated_password:
        lines.append(f"Log in:    user {service.settings['USERNAME']}, password {service.auth.generated_password} "
                     "(for this run; set PASSWORD to keep one)")
    else:
        lines.append(f"Log in:    user {service.settings['USERNAME']}, with your PASSWORD, at {server.url}login")
    if types:
        api_key = "one of API_KEYS" if service.settings["API_KEYS"] else "any"
        example = to_json({"job_type": _example_type(service.registry), "api_key": api_key, "data": "hello"})
        lines.append(f"Try it:    curl -H 'Content-Type: application/json' -d '{example}' {server.url}job")
    print("\n".join(lines), file=stream, flush=True)


def _example_type(registry: Registry) -> str:
    names = registry.names()
    synchronous = [name for name in names if (job_type := registry.get(name)) and job_type.synchronous]
    return "echo" if "echo" in names else (synchronous or names)[0]


def _raise_file_limit(wanted: int) -> None:
    """Let the process open as many files as its connections may need, as far as the system allows."""
    try:
        import resource
    except ImportError:  # Windows knows no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def serve(settings: Settings, registry: Registry, host: Optional[str] = None, port: Optional[int] = None) -> int:
    """Serve until SIGTERM or Ctrl-C, then stop in order; return the exit code. Main thread only.

    Raises StartError if the service cannot start.
    """
    if not registry.is_in_use:
        raise StartError("A worker imports the job module, which begins to serve: put that under "
                         "`if __name__ == \"__main__\":`.")
    configure_logging(settings)
    logging.raiseExceptions = False  # a job that closes stderr must not make every log line an exception
    _raise_file_limit(settings["MAX_CONNECTIONS"] + settings["WORKERS"] * 8 + CALLBACK_THREADS + 100)
    service = Service(settings, registry)
    service.runner.may_adjust_switching = True
    try:
        server = Server(service, host, port)
    except StartError:
        service.close(0.0)
        raise
    signals = Signals()
    threading.Thread(target=server.serve_forever, args=(0.1,), name="csp-accept", daemon=True).start()
    announce(server, sys.stdout)
    signals.stopping.wait()
    log.info("stopping; running jobs have %g seconds", settings["GRACE_SECONDS"])
    deadline = time.monotonic() + settings["GRACE_SECONDS"]
    server.stop(settings["GRACE_SECONDS"])
    is_done = service.close(max(0.0, deadline - time.monotonic()))
    if not is_done:
        log.warning("jobs were still running; they are taken up again at the next start")
    _end_process_if_held(is_done)
    return 0


class Signals:
    """SIGINT and SIGTERM: the first sets ``stopping``, the second ends the process at once. Main thread only.

    The system may give a signal to any thread, and Python's handlers wait for the main one to move; so a thread reads
    the bytes that the interpreter writes for each signal (signal.set_wakeup_fd).
    """

    WANTED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in self.WANTED:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        _closed_in_children.add(self)
        threading.Thread(target=self._read, name="csp-signals", daemon=True).start()

    def _read(self) -> None:
        while True:
            if self._reader.recv(1)[0] in self.WANTED:
                if self.stopping.is_set():
                    os._exit(1)
                self.stopping.set()

    def close_in_child(self) -> None:
        """Let signals mean in a forked child what they mean by themselves, and tell the service nothing."""
        signal.set_wakeup_fd(-1)
        for number in self.WANTED:
            signal.signal(number, signal.SIG_DFL)


def _end_process_if_held(is_done: bool) -> None:
    """Exit here and now if jobs or callbacks go on: the interpreter would wait for them, maybe for ever."""
    children: List[Any] = []
    if "multiprocessing" in sys.modules:  # the processes of a pool, which may wait for work without an end
        import multiprocessing
        children = multiprocessing.active_children()
    threads = [thread for thread in threading.enumerate()
               if thread.name.startswith(("csp-job", "csp-process", "csp-callback"))]
    deadline = time.monotonic() + 0.5
    for holder in (*threads, *children):
        holder.join(max(0.0, deadline - time.monotonic()))
        is_done = is_done and not holder.is_alive()
    if not is_done:
        for child in children:
            with suppress(OSError):
                os.kill(child.pid, SIGKILL)  # not every kind of process has a method for it
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------
# Predecessor's names
#
# One file is module and package, as os is with os.path: ``import csp.job as job`` finds the module in sys.modules.
# ---------------------------------------------------------------------------------------------------------------------

class ClientAnswer(NamedTuple):
    """What a test client gets."""

    status_code: int
    data: bytes
    headers: Dict[str, str]


class ApplicationClient:
    """Sends requests to an application without a socket, for the tests of projects that use it."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self.get = functools.partial(self._open, "GET")
        self.post = functools.partial(self._open, "POST")
        self.delete = functools.partial(self._open, "DELETE")

    def _open(self, method: str, path: str, data: Union[str, bytes, Mapping[str, str]] = b"",
              headers: Optional[Mapping[str, str]] = None, content_type: Optional[str] = None) -> ClientAnswer:
        """Answer a request; ``data`` is a body, or the fields of a form."""
        fields = {name.lower(): value for name, value in (headers or {}).items()}
        if isinstance(data, collections.abc.Mapping):
            content_type, data = "application/x-www-form-urlencoded", urllib.parse.urlencode(data)
        if content_type is not None:
            fields["content-type"] = content_type
        body = data.encode("utf-8") if isinstance(data, str) else data
        response = self._application.service.handle(Request(method, path, {"host": "localhost", **fields}, body))
        content = response.body if isinstance(response.body, bytes) else b"".join(response.body)
        return ClientAnswer(response.status, content, {"Content-Type": response.content_type, **dict(response.headers)})


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
        """Answer a request (PEP 3333): with 503 as long as the service cannot be started."""
        try:
            service = self.service
        except StartError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("%s", error)
            body = to_json({"error": "The service cannot be started; its log says why."}).encode("ascii")
            start_response("503 Service Unavailable", [
                ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Retry-After", "30")])
            return [body]
        return Wsgi(service)(environ, start_response)

    def test_client(self) -> ApplicationClient:
        """Return a client for tests: ``get``, ``post`` and ``delete``."""
        return ApplicationClient(self)

    def run(self, host: Optional[str] = None, port: Union[int, str, None] = None, **options: Any) -> None:
        """Serve the jobs that have been registered until SIGTERM or Ctrl-C."""
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
web = _make_module("web", "The service.", app=_application, init=lambda: _application.config.load() and None,
                   configure=lambda: _application.config.load() and None)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

def _build_parser() -> argparse.ArgumentParser:
    # In groups also because each option that a parser itself is given makes a formatter of help.
    parser = argparse.ArgumentParser(prog="csp.py", description="Serve Python functions as jobs over HTTP.",
                                     add_help=False)
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
    group.add_argument("-h", "--help", action="help", help="show this help, and exit")
    return parser


def _run_once(arguments: Sequence[str]) -> int:
    """Run one job here and now; print its log and result; return 1 if it failed."""
    name, data = arguments[0], arguments[1] if len(arguments) > 1 else None
    job_type = registry.get(name)
    if len(arguments) > 2:
        raise StartError("--run takes a job type and its data as one JSON text; put that into quotes.")
    if job_type is None:
        raise StartError(f"There is no job type {name}; there are: {', '.join(registry.names()) or 'none'}.")
    input: Dict[str, Any] = {"job_type": name, "api_key": "none"}
    try:
        if data is not None:
            input["data"] = from_json((sys.stdin.read() if data == "-" else data).encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise StartError(f"The data for --run is not JSON: {error}.") from None
    run = JobRun("command-line", 0, 1, _print_lines, lambda: None)
    outcome = call_function(job_type.function, run, lambda: input, streams=job_type.synchronous)
    if not isinstance(outcome, Outcome):
        stream = outcome
        outcome = call_function(lambda task_id, input: _print_stream(stream()), run, lambda: input, streams=False)
        assert isinstance(outcome, Outcome)
    run.end()
    if outcome.error is not None:
        document = json.loads(outcome.error)
        print(document.pop("traceback", ""), to_json(document), sep="", file=sys.stderr)
        return 1
    if outcome.data is not None:
        body = _raw_result(outcome.data)[0]
        sys.stdout.buffer.writelines([body, b"\n"] if isinstance(body, bytes) else [*body, b"\n"])
    return 0


def _print_stream(parts: Iterable[Any]) -> None:
    for part in parts:
        sys.stdout.write(part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part))
    sys.stdout.write("\n")


def _print_lines(run: JobRun, _must_wait: bool) -> None:
    run.is_announced = False
    while run.lines:
        line = run.lines.popleft()
        print(f"{line.timestamp} {line.level} {line.message}", file=sys.stderr)


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


def _run_command(options: argparse.Namespace) -> int:
    if options.hash_password:
        return _make_hash()
    overrides = {row.name: getattr(options, row.name) for row in SETTINGS
                 if row.option and getattr(options, row.name) is not None}
    settings = _application.config.load(load_settings(options.config, None, overrides))
    sys.path.insert(0, os.getcwd())
    for name in options.jobs:
        load_module(name)
    return _run_once(options.run) if options.run else serve(settings, registry)


def wsgi_app(*jobs: str) -> Application:
    """Return the WSGI application that serves these job modules (names or .py files), for ``csp:wsgi_app("my_jobs")``.

    Settings come from JOB_CONFIG and the environment. Raises StartError if they or a module cannot be loaded.
    """
    become("csp")
    become("ckanserviceprovider")
    sys.path.insert(0, os.getcwd())
    for name in jobs:
        load_module(name)
    _application.config.get("NAME")  # loads the settings, whose mistakes are not to wait for the first request
    return _application


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; return the exit code: 0, 1 if ``--run``'s job failed, 2 for what is wrong at the start."""
    options = _build_parser().parse_args(arguments)
    try:
        return _run_command(options)
    except (StartError, CspError) as error:
        print(f"csp: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    become("csp")
    become("ckanserviceprovider")
    sys.exit(main())
