"""Jobs to keep, and to learn from: run ``python csp.py --jobs jobs_example``."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import logging
import math
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import IO, Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import csp.job as job
import csp.util as util

CHUNK_BYTES = 65_536
TIMEOUT_SECONDS = 30  # for each read from the network
MAX_CHECKSUM_BYTES = 2**30  # a minute or so on an ordinary line
MAX_CSV_BYTES = 100 * 2**20
MAX_COLUMNS = 1000
MAX_DISTINCT = 1000  # different values remembered per column
MAX_FIELD_CHARACTERS = 131_072
SAMPLE_BYTES = 65_536  # what delimiter, encoding and header are guessed from
PROGRESS_ROWS = 10_000

Input = Dict[str, Any]


# -- the documentation's example

@job.synchronous
def echo(task_id: str, input: Input) -> str:
    """Send a text, get it back with ``>`` before it. Beginning with ``>`` or ``#`` it fails, with ``&`` it logs."""
    logger = logging.getLogger(__name__)
    logger.addHandler(util.StoringHandler(task_id, input))
    data = input.get("data")
    if not isinstance(data, str):
        raise util.JobError("data has to be a text")
    if data.startswith(">"):
        raise util.JobError("do not start message with >")
    if data.startswith("#"):
        raise Exception("serious exception")
    if data.startswith("&"):
        logger.warning("just a warning")
    return ">" + data


@job.asynchronous
def async_echo(task_id: str, input: Input) -> str:
    """The same as echo, queued: ask for the job, or give a result_url, to get the answer."""
    return echo(task_id, input)


# -- downloading

class _NoRedirectOut(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Refuse what is not http."""
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: Any) -> str:
    if not isinstance(url, str) or not url.lower().startswith(("http://", "https://")):
        raise util.JobError("data.url has to be an address that begins with http:// or https://")
    return url


def _read_options(input: Input) -> Dict[str, Any]:
    data = input.get("data")
    if not isinstance(data, dict):
        raise util.JobError('data has to be an object such as {"url": "https://example.org/file.csv"}')
    _check_url(data.get("url"))
    return data


def _limit_bytes(options: Dict[str, Any], maximum: int) -> int:
    limit = options.get("limit_bytes", maximum)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= maximum:
        raise util.JobError(f"data.limit_bytes has to be a whole number from 1 to {maximum}")
    return limit


def _open(url: str) -> Any:
    """Return the response for ``url``; raise JobError with a sentence for whatever goes wrong."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "csp.py jobs_example"})
        return urllib.request.build_opener(_NoRedirectOut).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise util.JobError(f"{url} was answered with status {error.code} {error.reason}".rstrip()) from None
    except urllib.error.URLError as error:
        raise util.JobError(f"{url} cannot be reached: {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise util.JobError(f"{url} cannot be read: {error or type(error).__name__}") from None


def _declared_bytes(response: Any) -> Optional[int]:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _chunks(task_id: str, response: Any, limit: int) -> Iterator[bytes]:
    """Yield the body; raise JobError if it is larger than ``limit``, slow or cut short. Shows progress, if it can."""
    declared, done = _declared_bytes(response), 0
    if declared is not None and declared > limit:
        raise util.JobError(f"the file is too large: {declared:,} bytes, and the limit is {limit:,}")
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise util.JobError(f"the download failed after {done:,} bytes: {error or type(error).__name__}") from None
        if not chunk:
            break
        done += len(chunk)
        if done > limit:
            raise util.JobError(f"the file is too large: more than {limit:,} bytes")
        yield chunk
        util.check_cancelled(task_id)
        if declared:
            util.set_progress(task_id, 0.5 * done / declared, f"downloaded {done:,} of {declared:,} bytes")
    if declared is not None and done < declared:
        raise util.JobError(f"the download was cut short: {done:,} of {declared:,} bytes")


@job.synchronous
def checksum(task_id: str, input: Input) -> Dict[str, Any]:
    """Send ``{"url": …}``, get SHA-256 and size in bytes of what is there (at most 1 GiB, or ``limit_bytes``)."""
    options = _read_options(input)
    limit = _limit_bytes(options, MAX_CHECKSUM_BYTES)
    digest, size = hashlib.sha256(), 0
    with _open(options["url"]) as response:
        for chunk in _chunks(task_id, response, limit):
            digest.update(chunk)
            size += len(chunk)
    return {"url": options["url"], "sha256": digest.hexdigest(), "size_bytes": size}


# -- what is in a CSV file

class Format(NamedTuple):
    """How a CSV file is written."""

    encoding: str
    delimiter: str
    has_header: bool


_MAGIC = ((b"PK\x03\x04", "a ZIP archive (or an Excel file)"), (b"\x1f\x8b", "compressed with gzip"),
          (b"%PDF", "a PDF document"), (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"),
          (b"GIF8", "a GIF image"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"\x7fELF", "a program"))
_HTML = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def _check_content(sample: bytes, content_type: str) -> None:
    """Raise JobError for what is not text or not CSV."""
    if not sample:
        raise util.JobError("the file is empty")
    for magic, what in _MAGIC:
        if sample.startswith(magic):
            raise util.JobError(f"this is no CSV file but {what}")
    if _HTML.match(sample) or (content_type == "text/html" and sample.lstrip().startswith(b"<")):
        raise util.JobError("this is no CSV file but an HTML page; is the address that of the file itself?")
    if b"\x00" in sample and not sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise util.JobError("this is no CSV file but binary data")


def _guess_encoding(sample: bytes, is_whole: bool) -> str:
    """Return a byte order mark's encoding, UTF-8 if the sample is that, else Windows-1252."""
    for bom, encoding in _BOMS:
        if sample.startswith(bom):
            return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=is_whole)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _sample_rows(text: str, delimiter: str, count: int = 50) -> List[List[str]]:
    try:
        return [row for row in itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), count)
                if row]
    except csv.Error:
        return []


def _guess_delimiter(text: str) -> str:
    """Return the delimiter that splits most rows into the same number (above one) of fields."""
    def score(delimiter: str) -> Tuple[float, int]:
        widths = [len(row) for row in _sample_rows(text, delimiter)]
        common = max(set(widths), key=widths.count, default=1)
        return (widths.count(common) / len(widths) if common > 1 else 0.0, common)
    return max(",;\t|", key=score)


def _guess_header(rows: List[List[str]]) -> bool:
    """Return whether the first row names the columns: all its fields are different texts, and not like those below."""
    if not rows or len(set(rows[0])) < len(rows[0]) or any(_kind(field) not in ("text",) for field in rows[0]):
        return False
    columns = list(zip(*rows[1:]))
    if any(_kind(value) not in ("text", "empty") for column in columns for value in column):
        return True
    return not any(name in column for name, column in zip(rows[0], columns))


def _guess_format(sample: bytes, is_whole: bool) -> Format:
    encoding = _guess_encoding(sample, is_whole)
    text = sample.decode(encoding, "ignore")
    if not is_whole:
        text = text.rpartition("\n")[0] or text
    delimiter = _guess_delimiter(text)
    return Format(encoding, delimiter, _guess_header(_sample_rows(text, delimiter)))


_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]{0,300})(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_DATE = re.compile(r"[0-9]{4}([-/])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])")
_DATETIME = re.compile(_DATE.pattern + r"[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?(?:Z|[+-][0-9]{2}:?[0-9]{2})?")


def _kind(value: str) -> str:
    """Return what a single value looks like; codes such as 01001 are text."""
    value = value.strip()
    if not value:
        return "empty"
    if _INTEGER.fullmatch(value):
        return "integer"
    if _NUMBER.fullmatch(value) and math.isfinite(float(value)):
        return "number"
    if value.lower() in ("true", "false"):
        return "boolean"
    return "date" if _DATE.fullmatch(value) else "datetime" if _DATETIME.fullmatch(value) else "text"


class Column:
    """What is known of a column, in bounded memory: for each kind of value how many, the least and the greatest."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._counts: Dict[str, int] = {}
        self._extremes: Dict[str, Tuple[Any, Any]] = {}
        self._text: Optional[Tuple[str, str]] = None
        self._sum = 0.0
        self._distinct: set[str] = set()

    def add(self, value: str) -> None:
        """Take a value into account."""
        kind = _kind(value)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if kind == "empty":
            return
        if len(self._distinct) <= MAX_DISTINCT:
            self._distinct.add(value)
        least, greatest = self._text or (value, value)
        self._text = (min(least, value), max(greatest, value))
        if kind in ("integer", "number"):
            number = int(value) if kind == "integer" else float(value)
            self._sum += number
            low, high = self._extremes.get("number", (number, number))
            self._extremes["number"] = (min(low, number), max(high, number))

    @property
    def kind(self) -> str:
        """The kind of the column: that of all its values, numbers if they are numbers and integers, else text."""
        kinds = {kind for kind, count in self._counts.items() if count} - {"empty"}
        if kinds == {"integer", "number"}:
            return "number"
        return kinds.pop() if len(kinds) == 1 else "text" if kinds else "empty"

    def report(self) -> Dict[str, Any]:
        """Return what profile_csv says about the column."""
        kind = self.kind
        filled = sum(self._counts.values()) - self._counts.get("empty", 0)
        is_number = kind in ("integer", "number")
        low, high = self._extremes["number"] if is_number else self._text or (None, None)
        return {"name": self.name, "type": kind, "empty": self._counts.get("empty", 0),
                "distinct": min(len(self._distinct), MAX_DISTINCT),
                "distinct_is_bounded": len(self._distinct) > MAX_DISTINCT,
                "min": low if is_number or low is None else low[:200],
                "max": high if is_number or high is None else high[:200],
                "mean": self._sum / filled if is_number else None}


def _read_rows(file: IO[bytes], form: Format) -> Iterator[List[str]]:
    """Yield the rows that are not empty; raise JobError where the file is no CSV."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    text = io.TextIOWrapper(file, encoding=form.encoding, errors="replace", newline="")
    reader = csv.reader(text, delimiter=form.delimiter)
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise util.JobError(f"line {reader.line_num} is no CSV: {error}") from None


def _name_columns(first: List[str], has_header: bool) -> List[Column]:
    if len(first) > MAX_COLUMNS:
        raise util.JobError(f"the file has {len(first):,} columns; the limit is {MAX_COLUMNS:,}")
    return [Column(name.strip() if has_header else f"column {number}") for number, name in enumerate(first, 1)]


def _profile(task_id: str, file: IO[bytes], form: Format, logger: logging.Logger) -> Dict[str, Any]:
    rows = _read_rows(file, form)
    first = next(rows, None)
    if first is None:
        raise util.JobError("the file has no rows")
    columns = _name_columns(first, form.has_header)
    count = uneven = 0
    for row in rows if form.has_header else itertools.chain([first], rows):
        count += 1
        uneven += len(row) != len(columns)
        for column, value in zip(columns, row):
            column.add(value)
        if count % PROGRESS_ROWS == 0:
            util.check_cancelled(task_id)
            util.set_progress(task_id, 0.5 + 0.49 * count / (count + PROGRESS_ROWS), f"read {count:,} rows")
    if uneven:
        logger.warning("%d rows have more or fewer than %d fields", uneven, len(columns))
    return {"rows": count, "uneven_rows": uneven, "columns": [column.report() for column in columns]}


@job.asynchronous
def profile_csv(task_id: str, input: Input) -> Dict[str, Any]:
    """Send ``{"url": …}`` of a CSV file (at most 100 MiB, or ``limit_bytes``), get what is in each of its columns.

    The result has rows, encoding, delimiter, has_header, and per column: name, type (integer, number, boolean, date,
    datetime, text, empty), empty, distinct (counted up to 1,000), min, max and, for numbers, mean.
    """
    logger = logging.getLogger(task_id)
    logger.addHandler(util.StoringHandler(task_id, input))
    logger.setLevel(logging.INFO)
    options = _read_options(input)
    limit = _limit_bytes(options, MAX_CSV_BYTES)
    with tempfile.TemporaryFile() as file:
        with _open(options["url"]) as response:
            content_type = response.headers.get_content_type()
            for chunk in _chunks(task_id, response, limit):
                file.write(chunk)
        size = file.tell()
        logger.info("downloaded %d bytes", size)
        file.seek(0)
        sample = file.read(SAMPLE_BYTES)
        _check_content(sample, content_type)
        form = _guess_format(sample, is_whole=size <= SAMPLE_BYTES)
        logger.info("encoding %s, delimiter %r, %s", form.encoding, form.delimiter,
                    "with a header" if form.has_header else "without a header")
        file.seek(0)
        profile = _profile(task_id, file, form, logger)
    logger.info("read %d rows of %d columns", profile["rows"], len(profile["columns"]))
    util.set_progress(task_id, 1.0, "done")
    return {"url": options["url"], "size_bytes": size, **form._asdict(), **profile}
