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
from datetime import date, datetime, timedelta, timezone
from http.client import BadStatusLine, HTTPException, IncompleteRead
from typing import IO, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import csp.job as job
import csp.util as util

CHUNK_BYTES = 65_536  # large enough to be fast, small enough that progress moves and a cancelled job stops soon
DOWNLOAD_SECONDS = 1_800  # for all of it: a server that sends a byte now and then must not hold a worker for ever
TIMEOUT_SECONDS = 30  # for each read: a server that says nothing for that long is not going to
MAX_CHECKSUM_BYTES = 2**30  # nothing is stored, so only time counts: some minutes on an ordinary line
MAX_CSV_BYTES = 100 * 2**20  # fits any temporary directory, and is read in a minute or two
MAX_COLUMNS = 1_000  # more is a matrix, and a profile of it nothing that anybody reads
MAX_DISTINCT = 10_000  # different values remembered per column,
MAX_DISTINCT_IN_ALL = 1_000_000  # and in all columns together: about 100 MB of memory at the worst
MAX_TEXT_CHARACTERS = 200  # of a text shown as min or max
HEAD_BYTES = 1_024  # enough to tell a web page or an archive from a table
SAMPLE_BYTES = 65_536  # what delimiter and header are guessed from
SAMPLE_ROWS = 50
PROGRESS_ROWS = 2_000  # a few milliseconds of work

Input = Dict[str, Any]

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # a job's log is for those who wait for it; the default would hide all but warnings


# -- The documentation's example

@job.synchronous
def echo(task_id: str, input: Input) -> str:
    """Send a text as data; the same text comes back with ``>`` before it.

    Three first letters show what else can happen: with ``>`` the job is refused, with ``#`` it crashes, with ``&`` it
    writes a warning to its log.
    """
    logger.addHandler(util.StoringHandler(task_id, input))
    data = input.get("data")
    if not isinstance(data, str):
        raise util.JobError('data has to be a text; send for example "data": "hello".')
    if data.startswith(">"):
        raise util.JobError("do not start message with >")
    if data.startswith("#"):
        raise Exception("serious exception")
    if data.startswith("&"):
        logger.warning("just a warning")
    return ">" + data


@job.asynchronous
def async_echo(task_id: str, input: Input) -> str:
    """Send a text as data, as for echo; it is queued, and ``>`` and the text are the job's result when it has run."""
    return echo(task_id, input)  # type: ignore[no-any-return,unused-ignore]  # any: where csp is not type-checked


# -- Downloading
#
# Only http and https are opened, also after a redirect: with file: or ftp: anybody who may submit could read what is
# on the server. Whatever goes wrong on the way is a JobError, because it is news for the submitter and no bug.

def _check_url(url: Any) -> str:
    """Return ``url`` ready to be sent (blanks and non-ASCII letters escaped); raise JobError if it is not http(s)."""
    if not isinstance(url, str) or not re.match(r"https?://[^/?#\s]", url, re.IGNORECASE):
        raise util.JobError('data.url has to be an address that begins with http:// or https://; '
                            'send for example "data": {"url": "https://example.org/file.csv"}.')
    return urllib.parse.quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]")


class _HttpRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Refuse an address that is not http, else do as urllib does."""
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise util.JobError(f"{req.full_url} redirects to {newurl}, and only http and https addresses are opened.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _explain(error: BaseException) -> str:
    """Return an error's reason in one line, without errno where the system has words for it."""
    if isinstance(error, IncompleteRead):
        return "the connection was closed"
    reason = getattr(error, "reason", error)
    if isinstance(reason, BadStatusLine) and not isinstance(reason, OSError):  # which a closed connection is as well
        return "the answer is not HTTP"
    return " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(reason).__name__


def _open(url: str) -> Any:
    """Return the response for ``url``; raise JobError with a sentence that says why there is none."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "csp.py jobs_example", "Accept": "*/*"})
        return urllib.request.build_opener(_HttpRedirects).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise util.JobError(f"{url} was answered with status {error.code} ({_explain(error)}); "
                            "open the address in a browser to see whether it is right.") from None
    except (OSError, HTTPException, ValueError) as error:
        raise util.JobError(f"{url} cannot be reached: {_explain(error)}.") from None


def _too_large(size: str, limit_bytes: int) -> util.JobError:
    return util.JobError(f"The file is too large: it has {size} bytes, and the limit is {limit_bytes:,}.")


def _read_chunk(response: Any, done_bytes: int, missing_bytes: float) -> bytes:
    """Return what the network has next; raise JobError if it fails, or ends before the declared length."""
    try:
        chunk: bytes = response.read1(int(min(CHUNK_BYTES, missing_bytes)))  # read() waits until it is full
    except (OSError, HTTPException) as error:
        raise util.JobError(f"The download failed after {done_bytes:,} bytes: {_explain(error)}. "
                            "Submit the job again to try once more.") from None
    if not chunk and response.length and missing_bytes < math.inf:
        raise util.JobError(f"The download was cut short: {missing_bytes:,} bytes are missing after {done_bytes:,}. "
                            "Submit the job again to try once more.")
    return chunk


def _show_download(task_id: str, done_bytes: int, declared_bytes: Optional[int], progress_share: float) -> None:
    of_all = f" of {declared_bytes:,}" if declared_bytes else ""
    fraction = progress_share * done_bytes / declared_bytes if declared_bytes else 0.0
    util.set_progress(task_id, fraction, f"downloaded {done_bytes:,}{of_all} bytes")


def _download(task_id: str, response: Any, limit_bytes: int, progress_share: float = 1.0) -> Iterator[bytes]:
    """Yield the body in chunks; raise JobError if it is larger than ``limit_bytes``, too slow or cut short.

    Shows progress up to ``progress_share``, if the server has declared a length.
    """
    declared_bytes: Optional[int] = response.length  # None where there is none, and for a chunked body
    if declared_bytes is not None and declared_bytes > limit_bytes:
        raise _too_large(f"{declared_bytes:,}", limit_bytes)
    done_bytes = 0
    while declared_bytes is None or done_bytes < declared_bytes:
        util.check_cancelled(task_id)
        chunk = _read_chunk(response, done_bytes, math.inf if declared_bytes is None else declared_bytes - done_bytes)
        if not chunk:
            return
        done_bytes += len(chunk)
        if done_bytes > limit_bytes:
            raise _too_large(f"more than {limit_bytes:,}", limit_bytes)
        yield chunk
        _show_download(task_id, done_bytes, declared_bytes, progress_share)


class Order(NamedTuple):
    """What a job that downloads was asked for."""

    url: str
    limit_bytes: int


def _read_order(input: Input, max_bytes: int) -> Order:
    """Return the order in ``input``; raise JobError if it has no address, or a limit above ``max_bytes``."""
    data = input.get("data")
    if not isinstance(data, dict):
        raise util.JobError('data has to be an object such as {"url": "https://example.org/file.csv"}.')
    limit_bytes = data.get("limit_bytes", max_bytes)
    if type(limit_bytes) is not int or not 0 < limit_bytes <= max_bytes:
        raise util.JobError(f"data.limit_bytes has to be a whole number from 1 to {max_bytes}, or left out.")
    return Order(_check_url(data.get("url")), limit_bytes)


@job.synchronous(timeout=DOWNLOAD_SECONDS)
def checksum(task_id: str, input: Input) -> Dict[str, Any]:
    """Send ``{"url": …}`` as data; SHA-256 and size of what is there come back as ``url, sha256, size_bytes``.

    At most 1 GiB is read, or less if ``limit_bytes`` beside ``url`` says so.
    """
    order = _read_order(input, MAX_CHECKSUM_BYTES)
    digest, size_bytes = hashlib.sha256(), 0
    with _open(order.url) as response:
        for chunk in _download(task_id, response, order.limit_bytes):
            digest.update(chunk)
            size_bytes += len(chunk)
    return {"url": input["data"]["url"], "sha256": digest.hexdigest(), "size_bytes": size_bytes}


# -- What is no CSV file

_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook"), (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b", "a file compressed with gzip"), (b"BZh", "a file compressed with bzip2"),
    (b"\xfd7zXZ", "a file compressed with xz"), (b"7z\xbc\xaf", "a 7-Zip archive"), (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF document"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"PAR1", "a Parquet file"),
    (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"),
    (b"\x7fELF", "a program"), (b"SQLite format 3", "an SQLite database"),
)
_MARKUP = (
    (re.compile(rb"(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL),
     "an HTML page; give the address of the file itself, not of a page about it"),
    (re.compile(rb"<\?xml\b"), "an XML document"),
    (re.compile(rb"\{\s*\"|\[\s*[{\[]"), "a JSON document"),
)
_BOMS = (  # UTF-32's begins with UTF-16's, so it has to come first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)


def _check_head(head: bytes) -> None:
    """Raise JobError if a file that begins with ``head`` is known to be something else."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise util.JobError(f"This is not CSV but {what}.")
    text = (head[3:] if head.startswith(codecs.BOM_UTF8) else head).lstrip()
    for pattern, what in _MARKUP:
        if pattern.match(text):
            raise util.JobError(f"This is not CSV but {what}.")


def _check_content_type(content_type: str) -> None:
    if content_type in ("text/html", "application/xhtml+xml"):
        raise util.JobError(f"This is not CSV: the server says it is an HTML page ({content_type}); "
                            "give the address of the file itself, not of a page about it.")


def _save(task_id: str, order: Order, file: IO[bytes]) -> int:
    """Download to ``file`` and return the size in bytes; raise JobError as soon as it cannot be CSV."""
    head = b""
    with _open(order.url) as response:
        _check_content_type(response.headers.get_content_type())
        for chunk in _download(task_id, response, order.limit_bytes, progress_share=0.5):
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                _check_head(head)
            file.write(chunk)
    if not head:
        raise util.JobError("The file is empty; there is nothing to profile.")
    return file.tell()


# -- How a CSV file is written

class Format(NamedTuple):
    """How a CSV file is written: ``encoding`` is a name that Python knows."""

    encoding: str
    delimiter: str
    has_header: bool


def _marked_encoding(head: bytes) -> Optional[str]:
    return next((encoding for bom, encoding in _BOMS if head.startswith(bom)), None)


def _guess_encoding(task_id: str, file: IO[bytes]) -> str:
    """Return the byte order mark's encoding, else UTF-8 if the whole file is that, else Windows-1252.

    The whole, because the first ``é`` may be in the last row. Raises JobError for zero bytes: no such text has any.
    """
    file.seek(0)
    marked = _marked_encoding(file.read(HEAD_BYTES))
    if marked is not None:
        return marked
    file.seek(0)
    encoding = "utf-8"
    decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder(encoding)()
    for chunk in itertools.chain(iter(lambda: file.read(CHUNK_BYTES), b""), [b""]):
        util.check_cancelled(task_id)
        if b"\x00" in chunk:
            raise util.JobError("This is not CSV but binary data, or UTF-16 without a byte order mark; "
                                "save it as CSV in UTF-8.")
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            encoding = "cp1252"
            decoder = codecs.getincrementaldecoder(encoding)("ignore")
    return encoding


def _read_sample(file: IO[bytes], encoding: str) -> str:
    """Return the file's first lines; a line that the sample cuts in two is left out."""
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
    """Return what a value looks like to a guess: its kind, where a decimal comma makes a number as well."""
    return _kind(value.replace(",", "."))


def _rate_delimiter(text: str, delimiter: str) -> Tuple[float, float]:
    """Return the share of rows that have the usual number of fields, and the share of fields that are not just text."""
    rows = _sample_rows(text, delimiter)
    widths = [len(row) for row in rows]
    usual = max(sorted(set(widths)), key=widths.count, default=1)
    if usual == 1:
        return 0.0, 0.0
    fields = [field for row in rows for field in row]
    return widths.count(usual) / len(rows), sum(_shape(field) != "text" for field in fields) / len(fields)


def _guess_delimiter(text: str) -> str:
    """Return the delimiter that gives the most regular rows; of equals the one that is rarer within texts."""
    best = max("\t|;,", key=lambda delimiter: _rate_delimiter(text, delimiter))
    return best if _rate_delimiter(text, best)[0] else ","


def _is_year(value: str) -> bool:
    return re.fullmatch("(?:19|20)[0-9]{2}", value.strip()) is not None


def _vote_header(name: str, values: List[str]) -> int:
    """Return 1 if ``name`` looks like a heading of ``values``, -1 if it looks like one of them, 0 if it may be either.

    A text above numbers or dates is a heading. A year says nothing: tables have them as headings and as values.
    """
    filled = [value for value in values if value.strip()]
    is_text = sum(_shape(value) == "text" for value in filled) * 2 >= len(filled)
    if _shape(name) == "text":
        return -1 if name in values else 0 if is_text else 1
    return 0 if is_text or not name.strip() or _is_year(name) else -1


def _guess_header(rows: List[List[str]]) -> bool:
    """Return whether the first row names the columns; if nothing else tells, whether it has texts and no numbers."""
    first, others = (rows[0], rows[1:]) if rows else ([], [])
    votes = sum(_vote_header(name, [row[index] for row in others if index < len(row)])
                for index, name in enumerate(first))
    kinds = {"year" if _is_year(name) else _shape(name) for name in first}
    return votes > 0 or (votes == 0 and "text" in kinds and kinds <= {"text", "empty", "year"})


def _guess_format(task_id: str, file: IO[bytes]) -> Format:
    encoding = _guess_encoding(task_id, file)
    text = _read_sample(file, encoding)
    delimiter = _guess_delimiter(text)
    return Format(encoding, delimiter, _guess_header(_sample_rows(text, delimiter)))


# -- What a value may be
#
# A parser returns what a value is worth, for comparing it, or None where it does not fit. A column is of the first
# type below that fits every value in it: one that does not makes it text, rather than being dropped unseen.

Parser = Callable[[str], Any]

_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,29})")  # no leading zero: 01001 is a code; nor 31 digits and more
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]{0,299})(?:\.[0-9]{0,299})?|\.[0-9]{1,299})(?:[eE][+-]?[0-9]{1,3})?")
_WORDS = {"true": True, "yes": True, "false": False, "no": False}
_YEAR_FIRST = r"(?P<year>[0-9]{4})(?P<mark>[-/])(?P<month>[0-9]{1,2})(?P=mark)(?P<day>[0-9]{1,2})"
_DAY_FIRST = r"(?P<day>[0-9]{1,2})(?P<mark>[-/.])(?P<month>[0-9]{1,2})(?P=mark)(?P<year>[0-9]{4})"
_MONTH_FIRST = r"(?P<month>[0-9]{1,2})(?P<mark>[-/])(?P<day>[0-9]{1,2})(?P=mark)(?P<year>[0-9]{4})"
_TIME = r"(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:[.,](?P<fraction>[0-9]{1,9}))?)?"
_ZONE = r" ?(?:Z|(?P<sign>[+-])(?P<zone_hour>[0-9]{2}):?(?P<zone_minute>[0-9]{2})?)"


def _parse_integer(text: str) -> Optional[int]:
    return int(text) if _INTEGER.fullmatch(text) else None


def _parse_number(text: str) -> Optional[float]:
    if not _NUMBER.fullmatch(text) or (text.lstrip("+-").isdigit() and not _INTEGER.fullmatch(text)):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _parse_boolean(text: str) -> Optional[bool]:
    return _WORDS.get(text.lower())


def _date_parser(pattern: str) -> Parser:
    """Return a parser for dates: ``pattern`` has the groups year, month and day."""
    compiled = re.compile(pattern)

    def parse(text: str) -> Optional[date]:
        match = compiled.fullmatch(text)
        try:
            return date(int(match["year"]), int(match["month"]), int(match["day"])) if match else None
        except ValueError:  # such as 30 February
            return None
    return parse


def _read_instant(match: Dict[str, str]) -> datetime:
    """Return the instant, in UTC, of the groups of a match; one without a zone is taken for UTC."""
    local = datetime(int(match["year"]), int(match["month"]), int(match["day"]), int(match["hour"]),
                     int(match["minute"]), int(match["second"]), int(match["fraction"][:6].ljust(6, "0")),
                     tzinfo=timezone.utc)
    offset = timedelta(hours=int(match.get("zone_hour", "0")), minutes=int(match.get("zone_minute", "0")))
    return local + offset if match.get("sign") == "-" else local - offset


def _datetime_parser(zone: str) -> Parser:
    """Return a parser for a date and a time with ``zone`` after them; with and without are never compared."""
    compiled = re.compile(f"{_YEAR_FIRST}[Tt ]{_TIME}{zone}")

    def parse(text: str) -> Optional[datetime]:
        match = compiled.fullmatch(text)
        try:
            return _read_instant({name: value or "0" for name, value in match.groupdict().items()}) if match else None
        except (ValueError, OverflowError):  # such as 25 o'clock
            return None
    return parse


_PARSERS: Tuple[Tuple[str, Parser], ...] = (
    ("integer", _parse_integer), ("number", _parse_number), ("boolean", _parse_boolean),
    ("date", _date_parser(_YEAR_FIRST)), ("datetime", _datetime_parser("")), ("datetime", _datetime_parser(_ZONE)),
    ("day-first", _date_parser(_DAY_FIRST)), ("month-first", _date_parser(_MONTH_FIRST)),
)


def _kind(value: str) -> str:
    """Return what a single value looks like: the name of the first parser that fits, "text" or "empty"."""
    value = value.strip()
    if not value:
        return "empty"
    return next((kind for kind, parse in _PARSERS if parse(value) is not None), "text")


class Reading:
    """One way to read all values of a column: the least and the greatest so far, and the sum of numbers."""

    def __init__(self, kind: str, parse: Parser) -> None:
        self.kind = kind
        self.sum: Any = 0
        self._parse = parse
        self._low: Optional[Tuple[Any, str]] = None
        self._high: Optional[Tuple[Any, str]] = None

    @property
    def is_number(self) -> bool:
        """Whether the values are numbers."""
        return self.kind in ("integer", "number")

    def add(self, text: str) -> bool:
        """Take a value into account; return False if it cannot be read this way."""
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
        """Return the least and the greatest value: numbers as numbers, all else as it stands in the file."""
        if self._low is None or self._high is None:
            return None, None
        return (self._low[0], self._high[0]) if self.is_number else (self._low[1], self._high[1])


class Column:
    """What is known of a column, in bounded memory: readings that have not failed yet, and hashes of its values."""

    def __init__(self, name: str, max_distinct: int) -> None:
        self.name = name
        self.empties = self.filled = 0
        self._readings = [Reading(kind, parse) for kind, parse in _PARSERS]
        self._text = Reading("text", lambda text: text[:MAX_TEXT_CHARACTERS])
        self._hashes: Set[int] = set()  # a value may be long, its hash is not; two of 64 bits are hardly ever the same
        self._max_distinct = max_distinct

    def add(self, value: str) -> None:
        """Take a value into account."""
        text = value.strip()
        if not text:
            self.empties += 1
            return
        self.filled += 1
        if len(self._hashes) <= self._max_distinct:
            self._hashes.add(hash(value))
        self._text.add(text)
        if self._readings:
            self._readings = [reading for reading in self._readings if reading.add(text)]

    def _choose(self) -> Reading:
        """Return the first reading that fits all values; dates that fit with day or month first are left as text."""
        kinds = [reading.kind for reading in self._readings]
        is_ambiguous = kinds == ["day-first", "month-first"]
        return self._readings[0] if kinds and not is_ambiguous else self._text

    def _mean(self, reading: Reading) -> Optional[float]:
        mean = reading.sum / self.filled if reading.is_number and self.filled else math.nan
        return mean if math.isfinite(mean) else None  # a sum may overflow, and JSON has no infinity

    def report(self) -> Dict[str, Any]:
        """Return what profile_csv says about the column."""
        reading = self._choose()
        kind = "date" if reading.kind in ("day-first", "month-first") else reading.kind
        low, high = reading.extremes()
        return {"name": self.name, "type": kind if self.filled else "empty", "empties": self.empties,
                "distinct": min(len(self._hashes), self._max_distinct),
                "distinct_is_bounded": len(self._hashes) > self._max_distinct,
                "min": low, "max": high, "mean": self._mean(reading)}


# -- Reading the file

def _read_rows(file: IO[bytes], form: Format) -> Iterator[List[str]]:
    """Yield the rows, without blank lines; raise JobError where the file is not CSV. Closes the file."""
    file.seek(0)
    with io.TextIOWrapper(file, encoding=form.encoding, errors="replace", newline="") as text:
        reader = csv.reader(text, delimiter=form.delimiter)
        try:
            yield from (row for row in reader if row)
        except csv.Error as error:
            raise util.JobError(f"The file is not CSV near line {reader.line_num:,}: {error}. "
                                "Look for a quotation mark that is never closed.") from None


def _name_columns(first: List[str], has_header: bool) -> List[Column]:
    """Return a column for each field of the first row, named by it, or by its number if it has no name."""
    if len(first) > MAX_COLUMNS:
        raise util.JobError(f"The file has {len(first):,} columns, and the limit is {MAX_COLUMNS:,}; send fewer.")
    max_distinct = min(MAX_DISTINCT, MAX_DISTINCT_IN_ALL // len(first))
    names = (name.strip()[:MAX_TEXT_CHARACTERS] if has_header else "" for name in first)
    return [Column(name or f"column {number}", max_distinct) for number, name in enumerate(names, 1)]


def _add_row(columns: List[Column], row: List[str]) -> bool:
    """Add a row's values to their columns; missing ones are empty. Return whether it has as many as there are."""
    is_even = len(row) == len(columns)
    if len(row) < len(columns):
        row = row + [""] * (len(columns) - len(row))
    for index, column in enumerate(columns):
        column.add(row[index])
    return is_even


def _profile(task_id: str, file: IO[bytes], form: Format, size_bytes: int) -> Dict[str, Any]:
    """Return the part of the result that takes reading all rows."""
    rows = _read_rows(file, form)
    first = next(rows, None)
    if first is None:
        raise util.JobError("The file has only blank lines; there is nothing to profile.")
    columns = _name_columns(first, form.has_header)
    count = uneven_rows = 0
    for row in rows if form.has_header else itertools.chain([first], rows):
        count += 1
        uneven_rows += not _add_row(columns, row)
        if count % PROGRESS_ROWS == 0:
            util.check_cancelled(task_id)
            util.set_progress(task_id, 0.5 + 0.5 * file.tell() / size_bytes, f"read {count:,} rows")
    return {"rows": count, "uneven_rows": uneven_rows, "columns": [column.report() for column in columns]}


def _log_format(form: Format) -> None:
    header = "with a header" if form.has_header else "without a header"
    logger.info("encoding %s, delimiter %r, %s", form.encoding, form.delimiter, header)


def _log_profile(profile: Dict[str, Any]) -> None:
    logger.info("read %s rows of %s columns", f"{profile['rows']:,}", f"{len(profile['columns']):,}")
    if profile["uneven_rows"]:
        logger.warning("%s rows have more or fewer fields than the first; missing ones count as empty, "
                       "additional ones are left out", f"{profile['uneven_rows']:,}")


@job.asynchronous(timeout=DOWNLOAD_SECONDS)
def profile_csv(task_id: str, input: Input) -> Dict[str, Any]:
    """Send ``{"url": …}`` of a CSV file as data; what is in each of its columns comes back.

    The result has ``url``, ``size_bytes``, ``encoding``, ``delimiter``, ``has_header``, ``rows`` (without the header),
    ``uneven_rows`` (those with more or fewer fields than the first) and ``columns``. Each column has ``name``, ``type``
    (integer, number, boolean, date, datetime, text or empty), ``empties``, ``distinct`` (different values, counted up
    to 10,000; then ``distinct_is_bounded``), ``min``, ``max`` and ``mean`` (of numbers).

    Delimiter, encoding and header are guessed. At most 100 MiB are read, or less if ``limit_bytes`` beside ``url``
    says so.
    """
    logger.addHandler(util.StoringHandler(task_id, input))
    order = _read_order(input, MAX_CSV_BYTES)
    with tempfile.TemporaryFile() as file:
        size_bytes = _save(task_id, order, file)
        logger.info("downloaded %s bytes", f"{size_bytes:,}")
        form = _guess_format(task_id, file)
        _log_format(form)
        profile = _profile(task_id, file, form, size_bytes)
    _log_profile(profile)
    util.set_progress(task_id, 1.0, f"read {profile['rows']:,} rows")
    return {"url": input["data"]["url"], "size_bytes": size_bytes, **form._asdict(), **profile}
