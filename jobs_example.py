"""Jobs to use and to learn from: run ``python csp.py --jobs jobs_example``."""

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
from datetime import date, datetime, timedelta, timezone
from http.client import BadStatusLine, HTTPException, IncompleteRead
from typing import IO, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import csp.job as job
import csp.util as util

CHUNK_BYTES = 65_536  # large enough to be fast, small enough for smooth progress and a quick cancel
DOWNLOAD_SECONDS = 1_800  # for the whole job: a server that sends a byte now and then must not block a worker forever
TIMEOUT_SECONDS = 30  # for each read: a server that is silent for that long has probably failed
MAX_CHECKSUM_BYTES = 2**30  # nothing is stored, so only time matters: a few minutes on an ordinary line
MAX_CSV_BYTES = 100 * 2**20  # fits into any temporary directory and is read in a minute or two
MAX_COLUMNS = 1_000  # nobody reads a profile of more columns
MAX_DISTINCT = 10_000  # distinct values remembered per column
MAX_DISTINCT_IN_ALL = 1_000_000  # distinct values remembered in all columns together: about 100 MB of memory
MAX_TEXT_CHARACTERS = 200  # of a text shown as min or max
HEAD_BYTES = 1_024  # enough to recognize a web page or an archive
SAMPLE_BYTES = 65_536  # used to guess delimiter and header
SAMPLE_ROWS = 50
PROGRESS_ROWS = 2_000  # a few milliseconds of work

Input = Dict[str, Any]
Parser = Callable[[str], Any]

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # the default would hide everything but warnings from the job's log


# -- The documentation's example

@job.synchronous
def echo(task_id: str, input: Input) -> str:
    """Return the text in ``data`` with ``>`` in front of it.

    The first letter of the text can show more: ``>`` makes the job fail, ``#`` raises an unexpected exception, and
    ``&`` writes a warning to the job's log.
    """
    logger.addHandler(util.StoringHandler(task_id, input))
    data = input.get("data")
    if not isinstance(data, str):
        raise util.JobError('data has to be a text, for example "data": "hello".')
    if data.startswith(">"):
        raise util.JobError("do not start message with >")
    if data.startswith("#"):
        raise Exception("serious exception")
    if data.startswith("&"):
        logger.warning("just a warning")
    return ">" + data


@job.asynchronous
def async_echo(task_id: str, input: Input) -> str:
    """Do the same as echo, but in the background: the job is queued, and its result is there when it has run."""
    return echo(task_id, input)  # type: ignore[no-any-return,unused-ignore]  # Any where csp is not type-checked


# -- Downloading
#
# Only http and https URLs are opened, also after a redirect: with file: or ftp:, anybody who may submit a job could
# read files of the server. Every failed download is a JobError, because it concerns the submitter and is not a bug.

class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Refuse any other scheme; otherwise do what urllib does."""
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise util.JobError(f"{req.full_url} redirects to {newurl}, but only http and https URLs are allowed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _explain(error: BaseException) -> str:
    """Return the reason of an error in one line."""
    if isinstance(error, IncompleteRead):
        return "the connection was closed"
    reason = getattr(error, "reason", error)
    if isinstance(reason, BadStatusLine) and not isinstance(reason, OSError):  # a closed connection is both
        return "the answer is not HTTP"
    return " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(reason).__name__


def _read_input(input: Input, max_bytes: int) -> Tuple[str, int]:
    """Return the URL to download and the limit in bytes; raise JobError if the submission is wrong."""
    data = input.get("data")
    if not isinstance(data, dict):
        raise util.JobError('data has to be an object, for example {"url": "https://example.org/file.csv"}.')
    limit_bytes = data.get("limit_bytes", max_bytes)
    if type(limit_bytes) is not int or not 0 < limit_bytes <= max_bytes:
        raise util.JobError(f"data.limit_bytes has to be a whole number from 1 to {max_bytes}. You may leave it out.")
    url = data.get("url")
    if not isinstance(url, str) or not re.match(r"https?://[^/?#\s]", url, re.IGNORECASE):
        raise util.JobError('data.url has to be a URL that begins with http:// or https://, '
                            'for example "data": {"url": "https://example.org/file.csv"}.')
    return urllib.parse.quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]"), limit_bytes


def _open(url: str) -> Any:
    """Return the response for ``url``; raise JobError if there is none."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "csp.py jobs_example", "Accept": "*/*"})
        return urllib.request.build_opener(_HttpRedirects).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise util.JobError(f"The server answered {url} with status {error.code} ({_explain(error)}). "
                            "Open the URL in a browser to check it.") from None
    except (OSError, HTTPException, ValueError) as error:
        raise util.JobError(f"{url} cannot be reached: {_explain(error)}.") from None


def _download(task_id: str, response: Any, limit_bytes: int, progress_share: float = 1.0) -> Iterator[bytes]:
    """Yield the body in chunks; raise JobError if it is too large or cut short.

    If the server has declared a length, the job's progress rises to ``progress_share``.
    """
    declared_bytes: Optional[int] = response.length  # None for a chunked body
    if declared_bytes is not None and declared_bytes > limit_bytes:
        raise util.JobError(f"The file is too large: it has {declared_bytes:,} bytes; the limit is {limit_bytes:,}.")
    done_bytes = 0
    while declared_bytes is None or done_bytes < declared_bytes:
        util.check_cancelled(task_id)
        size = CHUNK_BYTES if declared_bytes is None else min(CHUNK_BYTES, declared_bytes - done_bytes)
        try:
            chunk = response.read1(size)  # read() would wait for a full chunk
        except (OSError, HTTPException) as error:
            raise util.JobError(f"The download failed after {done_bytes:,} bytes: {_explain(error)}. "
                                "Submit the job again to retry.") from None
        if not chunk:
            if declared_bytes is None:
                return
            raise util.JobError(f"The download ended after {done_bytes:,} of {declared_bytes:,} bytes. "
                                "Submit the job again to retry.")
        done_bytes += len(chunk)
        if done_bytes > limit_bytes:
            raise util.JobError(f"The file is too large: it has more bytes than the limit of {limit_bytes:,}.")
        yield chunk
        if declared_bytes:
            fraction, message = progress_share * done_bytes / declared_bytes, f"{done_bytes:,} of {declared_bytes:,}"
        else:
            fraction, message = 0.0, f"{done_bytes:,}"
        util.set_progress(task_id, fraction, f"downloaded {message} bytes")


@job.synchronous(timeout=DOWNLOAD_SECONDS)
def checksum(task_id: str, input: Input) -> Dict[str, Any]:
    """Return the SHA-256 and the size of a file. ``data`` is ``{"url": …}``, the result ``url, sha256, size_bytes``.

    The limit is 1 GiB. ``limit_bytes`` beside ``url`` sets a lower one.
    """
    url, limit_bytes = _read_input(input, MAX_CHECKSUM_BYTES)
    digest, size_bytes = hashlib.sha256(), 0
    with _open(url) as response:
        for chunk in _download(task_id, response, limit_bytes):
            digest.update(chunk)
            size_bytes += len(chunk)
    return {"url": input["data"]["url"], "sha256": digest.hexdigest(), "size_bytes": size_bytes}


# -- Recognizing what is not CSV

_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook"), (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b", "a file compressed with gzip"), (b"BZh", "a file compressed with bzip2"),
    (b"\xfd7zXZ", "a file compressed with xz"), (b"7z\xbc\xaf", "a 7-Zip archive"), (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF document"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"PAR1", "a Parquet file"),
    (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"),
    (b"\x7fELF", "a program"), (b"SQLite format 3", "an SQLite database"),
)
_HTML_HINT = "use the URL of the file itself, not of a page about it"
_MARKUP = (
    (re.compile(rb"(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL),
     f"an HTML page; {_HTML_HINT}"),
    (re.compile(rb"<\?xml\b"), "an XML document"),
    (re.compile(rb"\{\s*\"|\[\s*[{\[]"), "a JSON document"),
)
_BOMS = (  # the one of UTF-32 starts with the one of UTF-16, so it comes first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)


def _check_head(head: bytes) -> None:
    """Raise JobError if the beginning of a file shows that it is not CSV."""
    text = (head[3:] if head.startswith(codecs.BOM_UTF8) else head).lstrip()
    kinds = [*(what for magic, what in _MAGIC if head.startswith(magic)),
             *(what for pattern, what in _MARKUP if pattern.match(text))]
    if kinds:
        raise util.JobError(f"This is not CSV but {kinds[0]}.")


def _save(task_id: str, url: str, limit_bytes: int, file: IO[bytes]) -> int:
    """Download to ``file`` and return the size in bytes; raise JobError as soon as it cannot be CSV."""
    head = b""
    with _open(url) as response:
        content_type = response.headers.get_content_type()
        if content_type in ("text/html", "application/xhtml+xml"):
            raise util.JobError(f"This is not CSV: the server says it is an HTML page ({content_type}); {_HTML_HINT}.")
        for chunk in _download(task_id, response, limit_bytes, progress_share=0.5):
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                _check_head(head)
            file.write(chunk)
    if not head:
        raise util.JobError("The file is empty.")
    return file.tell()


# -- Guessing encoding, delimiter and header

class Format(NamedTuple):
    """How a CSV file is written; ``encoding`` is a name that Python knows."""

    encoding: str
    delimiter: str
    has_header: bool


def _guess_encoding(task_id: str, file: IO[bytes]) -> str:
    """Return the encoding of the byte order mark, otherwise UTF-8 if the whole file is UTF-8, otherwise Windows-1252.

    The whole file is read because the first ``é`` may be in the last row. A zero byte raises JobError.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    for bom, encoding in _BOMS:
        if head.startswith(bom):
            return encoding
    file.seek(0)
    encoding = "utf-8"
    decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder(encoding)()
    for chunk in itertools.chain(iter(lambda: file.read(CHUNK_BYTES), b""), [b""]):
        util.check_cancelled(task_id)
        if b"\x00" in chunk:
            raise util.JobError("This is not CSV but binary data, or UTF-16 without a byte order mark. "
                                "Save the file as CSV in UTF-8.")
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            encoding = "cp1252"
            decoder = codecs.getincrementaldecoder(encoding)("ignore")
    return encoding


def _read_sample(file: IO[bytes], encoding: str) -> str:
    """Return the first lines of the file, without a last line that the sample cuts off."""
    file.seek(0)
    sample = file.read(SAMPLE_BYTES)
    text = codecs.getincrementaldecoder(encoding)("ignore").decode(sample)
    return text if len(sample) < SAMPLE_BYTES else text.rpartition("\n")[0] or text


def _sample_rows(text: str, delimiter: str) -> List[List[str]]:
    rows = (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row)
    try:
        return list(itertools.islice(rows, SAMPLE_ROWS))
    except csv.Error:
        return []


def _shape(value: str) -> str:
    """Return the kind of a value, where a decimal comma is allowed in numbers."""
    return _kind(value.replace(",", "."))


def _rate_delimiter(text: str, delimiter: str) -> Tuple[float, float]:
    """Return the share of rows with the most frequent number of fields, and the share of fields that are not text."""
    rows = _sample_rows(text, delimiter)
    widths = [len(row) for row in rows]
    usual = max(sorted(set(widths)), key=widths.count, default=1)
    if usual == 1:
        return 0.0, 0.0
    fields = [field for row in rows for field in row]
    return widths.count(usual) / len(rows), sum(_shape(field) != "text" for field in fields) / len(fields)


def _is_year(value: str) -> bool:
    return re.fullmatch("(?:19|20)[0-9]{2}", value.strip()) is not None


def _vote_header(name: str, values: List[str]) -> int:
    """Return 1 if ``name`` looks like the heading of ``values``, -1 if it looks like one of them, otherwise 0.

    A text above numbers or dates is a heading. A year may be a heading or a value, so it does not count.
    """
    filled = [value for value in values if value.strip()]
    is_text = sum(_shape(value) == "text" for value in filled) * 2 >= len(filled)
    if _shape(name) == "text":
        return -1 if name in values else 0 if is_text else 1
    return 0 if is_text or not name.strip() or _is_year(name) else -1


def _guess_header(rows: List[List[str]]) -> bool:
    """Return whether the first row names the columns. If the votes are even, it does if it has texts and no numbers."""
    first, others = (rows[0], rows[1:]) if rows else ([], [])
    votes = sum(_vote_header(name, [row[index] for row in others if index < len(row)])
                for index, name in enumerate(first))
    kinds = {"year" if _is_year(name) else _shape(name) for name in first}
    return votes > 0 or (votes == 0 and "text" in kinds and kinds <= {"text", "empty", "year"})


def _guess_format(task_id: str, file: IO[bytes]) -> Format:
    encoding = _guess_encoding(task_id, file)
    text = _read_sample(file, encoding)
    ratings = {delimiter: _rate_delimiter(text, delimiter) for delimiter in "\t|;,"}  # of equals, the rarer in texts
    best = max(ratings, key=ratings.__getitem__)
    delimiter = best if ratings[best][0] else ","
    return Format(encoding, delimiter, _guess_header(_sample_rows(text, delimiter)))


# -- Parsing values
#
# A parser returns a value that can be compared, or None if the text does not fit. The type of a column is the first
# one below that fits all of its values: a single value that does not fit makes it text, so that none is ignored.

_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,29})")  # 01001 is a code, and so is a number of more than 30 digits
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]{0,299})(?:\.[0-9]{0,299})?|\.[0-9]{1,299})(?:[eE][+-]?[0-9]{1,3})?")
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_YEAR_FIRST = r"(?P<year>[0-9]{4})(?P<mark>[-/])(?P<month>[0-9]{1,2})(?P=mark)(?P<day>[0-9]{1,2})"
_DAY_FIRST = r"(?P<day>[0-9]{1,2})(?P<mark>[-/.])(?P<month>[0-9]{1,2})(?P=mark)(?P<year>[0-9]{4})"
_MONTH_FIRST = r"(?P<month>[0-9]{1,2})(?P<mark>[-/])(?P<day>[0-9]{1,2})(?P=mark)(?P<year>[0-9]{4})"
_TIME = r"(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,9}))?)?"
_ZONE = r" ?(?:Z|(?P<sign>[+-])(?P<zone_hour>[0-9]{2}):?(?P<zone_minute>[0-9]{2})?)"


def _parse_number(text: str) -> Optional[float]:
    if not _NUMBER.fullmatch(text) or (text.lstrip("+-").isdigit() and not _INTEGER.fullmatch(text)):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _date_parser(pattern: str) -> Parser:
    """Return a parser for dates; ``pattern`` has the groups year, month and day."""
    compiled = re.compile(pattern)

    def parse(text: str) -> Optional[date]:
        match = compiled.fullmatch(text)
        try:
            return date(int(match["year"]), int(match["month"]), int(match["day"])) if match else None
        except ValueError:  # such as 30 February
            return None
    return parse


def _datetime_parser(zone: str) -> Parser:
    """Return a parser for date and time, followed by ``zone`` (a pattern; UTC if it is empty)."""
    compiled = re.compile(f"{_YEAR_FIRST}[Tt ]{_TIME}{zone}")

    def parse(text: str) -> Optional[datetime]:
        match = compiled.fullmatch(text)
        if not match:
            return None
        group = {name: value or "0" for name, value in match.groupdict().items()}
        try:
            year, month, day, hour, minute, second = (
                int(group[name]) for name in ("year", "month", "day", "hour", "minute", "second"))
            microsecond = int(group["fraction"][:6].ljust(6, "0"))
            local = datetime(year, month, day, hour, minute, second, microsecond, timezone.utc)
            offset = timedelta(hours=int(group.get("zone_hour", 0)), minutes=int(group.get("zone_minute", 0)))
            return local + offset if group.get("sign") == "-" else local - offset
        except (ValueError, OverflowError):  # such as 25 o'clock
            return None
    return parse


_PARSERS: Tuple[Tuple[str, Parser], ...] = (
    ("integer", lambda text: int(text) if _INTEGER.fullmatch(text) else None), ("number", _parse_number),
    ("boolean", lambda text: _WORDS.get(text.lower())), ("date", _date_parser(_YEAR_FIRST)),
    ("datetime", _datetime_parser("")), ("datetime", _datetime_parser(_ZONE)),  # the two cannot be compared
    ("day-first", _date_parser(_DAY_FIRST)), ("month-first", _date_parser(_MONTH_FIRST)),
)


def _kind(value: str) -> str:
    """Return the name of the first parser that fits the value, "text" or "empty"."""
    value = value.strip()
    if not value:
        return "empty"
    return next((kind for kind, parse in _PARSERS if parse(value) is not None), "text")


class Reading:
    """One interpretation of the values of a column: their minimum and maximum, and the sum of numbers."""

    def __init__(self, kind: str, parse: Parser) -> None:
        self.kind, self.is_number = kind, kind in ("integer", "number")
        self.sum: Any = 0
        self._parse = parse
        self._low: Optional[Tuple[Any, str]] = None
        self._high: Optional[Tuple[Any, str]] = None

    def add(self, text: str) -> bool:
        """Add a value; return False if the parser does not accept it."""
        value = self._parse(text)
        if value is None:
            return False
        if self._low is None or value < self._low[0]:
            self._low = (value, text[:MAX_TEXT_CHARACTERS])
        if self._high is None or value > self._high[0]:
            self._high = (value, text[:MAX_TEXT_CHARACTERS])
        if self.is_number:
            self.sum += value
        return True

    def extremes(self) -> Tuple[Any, Any]:
        """Return minimum and maximum: numbers as numbers, everything else as it is in the file."""
        if self._low is None or self._high is None:
            return None, None
        return (self._low[0], self._high[0]) if self.is_number else (self._low[1], self._high[1])


class Column:
    """The statistics of a column, in bounded memory."""

    def __init__(self, name: str, max_distinct: int) -> None:
        self.name = name
        self.empties = self.filled = 0
        self._readings = [Reading(kind, parse) for kind, parse in _PARSERS]  # those that have accepted all values
        self._text = Reading("text", lambda text: text[:MAX_TEXT_CHARACTERS])
        self._hashes: Set[int] = set()  # instead of values, which may be long; 64 bits hardly ever collide
        self._max_distinct = max_distinct

    def add(self, value: str) -> None:
        """Add a value."""
        text = value.strip()
        if not text:
            self.empties += 1
            return
        self.filled += 1
        if len(self._hashes) <= self._max_distinct:
            self._hashes.add(hash(value))
        self._text.add(text)
        self._readings = [reading for reading in self._readings if reading.add(text)]

    def report(self) -> Dict[str, Any]:
        """Return what profile_csv shows of the column."""
        is_ambiguous = [reading.kind for reading in self._readings] == ["day-first", "month-first"]  # such as 1/2/2024
        reading = self._text if is_ambiguous or not self._readings else self._readings[0]
        kind = "date" if reading.kind in ("day-first", "month-first") else reading.kind
        low, high = reading.extremes()
        mean = reading.sum / self.filled if reading.is_number and self.filled else math.nan
        return {"name": self.name, "type": kind if self.filled else "empty", "empties": self.empties,
                "distinct": min(len(self._hashes), self._max_distinct),
                "distinct_is_bounded": len(self._hashes) > self._max_distinct,
                "min": low, "max": high, "mean": mean if math.isfinite(mean) else None}  # a sum may overflow


# -- Reading the file

def _read_rows(file: IO[bytes], form: Format) -> Iterator[List[str]]:
    """Yield the rows that are not blank; raise JobError where the file is not CSV. Closes the file."""
    file.seek(0)
    with io.TextIOWrapper(file, encoding=form.encoding, errors="replace", newline="") as text:
        reader = csv.reader(text, delimiter=form.delimiter)
        try:
            yield from (row for row in reader if row)
        except csv.Error as error:
            raise util.JobError(f"The file is not CSV near line {reader.line_num:,}: {error}. "
                                "Look for a quotation mark that is never closed.") from None


def _make_columns(first: List[str], has_header: bool) -> List[Column]:
    """Return a column for each field of the first row. A column without a name is named by its number."""
    if len(first) > MAX_COLUMNS:
        raise util.JobError(f"The file has {len(first):,} columns; the limit is {MAX_COLUMNS:,}.")
    max_distinct = min(MAX_DISTINCT, MAX_DISTINCT_IN_ALL // len(first))
    names = (name.strip()[:MAX_TEXT_CHARACTERS] if has_header else "" for name in first)
    return [Column(name or f"column {number}", max_distinct) for number, name in enumerate(names, 1)]


def _profile(task_id: str, file: IO[bytes], form: Format, size_bytes: int) -> Dict[str, Any]:
    """Read all rows and return the part of the result that depends on them."""
    rows = _read_rows(file, form)
    first = next(rows, None)
    if first is None:
        raise util.JobError("The file has only blank lines.")
    columns = _make_columns(first, form.has_header)
    count = uneven_rows = 0
    for row in rows if form.has_header else itertools.chain([first], rows):
        count += 1
        uneven_rows += len(row) != len(columns)
        for column, value in zip(columns, itertools.chain(row, itertools.repeat(""))):
            column.add(value)
        if count % PROGRESS_ROWS == 0:
            util.check_cancelled(task_id)
            util.set_progress(task_id, 0.5 + 0.5 * file.tell() / size_bytes, f"read {count:,} rows")
    return {"rows": count, "uneven_rows": uneven_rows, "columns": [column.report() for column in columns]}


@job.asynchronous(timeout=DOWNLOAD_SECONDS)
def profile_csv(task_id: str, input: Input) -> Dict[str, Any]:
    """Return statistics of each column of a CSV file. ``data`` is ``{"url": …}``.

    The result has ``url``, ``size_bytes``, ``encoding``, ``delimiter``, ``has_header``, ``rows`` (without the header),
    ``uneven_rows`` (those with more or fewer fields than the first) and ``columns``. Each column has ``name``, ``type``
    (integer, number, boolean, date, datetime, text or empty), ``empties``, ``distinct`` (distinct values, counted up
    to 10,000; beyond that ``distinct_is_bounded`` is true), ``min``, ``max`` and ``mean`` (of numbers).

    Delimiter, encoding and header are guessed. The limit is 100 MiB. ``limit_bytes`` beside ``url`` sets a lower one.
    """
    logger.addHandler(util.StoringHandler(task_id, input))
    url, limit_bytes = _read_input(input, MAX_CSV_BYTES)
    with tempfile.TemporaryFile() as file:
        size_bytes = _save(task_id, url, limit_bytes, file)
        logger.info("downloaded %s bytes", f"{size_bytes:,}")
        form = _guess_format(task_id, file)
        logger.info("encoding %s, delimiter %r, %s header", form.encoding, form.delimiter,
                    "with a" if form.has_header else "without a")
        profile = _profile(task_id, file, form, size_bytes)
    logger.info("read %s rows of %s columns", f"{profile['rows']:,}", f"{len(profile['columns']):,}")
    if profile["uneven_rows"]:
        logger.warning("%s rows have more or fewer fields than the first row. Missing fields count as empty, "
                       "extra fields are ignored.", f"{profile['uneven_rows']:,}")
    util.set_progress(task_id, 1.0, f"read {profile['rows']:,} rows")
    return {"url": input["data"]["url"], "size_bytes": size_bytes, **form._asdict(), **profile}
