"""Take a data file apart into rows, whatever its name: JSON lines, a JSON array, CSV or Parquet, each also gzipped."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.errors import UserError
from helpers.files import check_not_lfs_pointer, decode_utf8, unique_keys
from helpers.finetune.messages import shown
from helpers.finetune.shapes import KNOWN_KEYS

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
# What other files begin with, and what to do about them.
_SAVE = "save the rows as JSON lines, CSV or Parquet"
FOREIGN = {
    b"PK\x03\x04": "is a zip archive or an Excel file; unpack it, or save the sheet as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "is an Excel file; save the sheet as CSV in UTF-8",
    b"BZh": "is compressed with bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed with xz; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it with unzstd",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"ARROW1": f"is an Arrow file; {_SAVE}",
    b"\xff\xff\xff\xff": f"is an Arrow file; load it with datasets.Dataset.from_file and {_SAVE}",
    b"SQLite format 3": f"is an SQLite database; {_SAVE}",
    b"\x80": f"is a pickle; {_SAVE}",
    b"\xff\xfe": "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    b"<": "is a web page or XML, perhaps saved instead of the file itself; download the raw file",
}
DELIMITERS = {",": "CSV", "\t": "tab-separated", ";": "CSV with semicolons"}


class RawFile(NamedTuple):
    """The rows of a file, not yet checked.

    Attributes:
        format: How the file is written, for the report.
        unit: What stands before a row's number: nothing if it is a line, "row " if rows are counted.
        rows: Number and content of each row; the content is a UserError if it could not be read.
    """

    format: str
    unit: str
    rows: Iterable[tuple[int, Any]]


def read_file(path: Path) -> RawFile:
    """Detect the format of a data file by its content, and take it apart.

    Args:
        path: The file.

    Returns:
        Its rows.

    Raises:
        UserError: The file cannot be read, or is of no format that is known.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    zipped = raw.startswith(GZIP)
    if zipped:
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a damaged gzip file ({error}); copy it again") from error
    file = _taken_apart(path, raw)
    return file._replace(format=f"gzipped {file.format}") if zipped else file


def parse_line(raw: bytes) -> Any:
    """Parse one line of JSON. Raises UserError with the reason if it is not JSON."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # a number with too many digits, a key that occurs twice
        raise UserError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise UserError("nested too deeply") from error


def _taken_apart(path: Path, raw: bytes) -> RawFile:
    if raw.startswith(PARQUET):
        return RawFile("Parquet", "row ", enumerate(_parquet(path, raw), start=1))
    check_not_lfs_pointer(path, raw)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    start = raw.lstrip()
    if start.startswith(GZIP):
        raise UserError(f"{path} is gzipped twice; unpack it once with gunzip")
    if raw[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it, and name a file of it")
    for beginning, what in FOREIGN.items():
        if start.startswith(beginning):
            raise UserError(f"{path} {what}")
    if b"\0" in raw:
        raise UserError(f"{path} holds binary data, not text; {_SAVE}")
    if start.startswith(b"["):
        return RawFile("JSON array", "row ", enumerate(_array(path, raw), start=1))
    if start and not start.startswith(b"{") and not _is_json(start.partition(b"\n")[0]):
        return _table(path, raw)
    _check_one_line_per_object(path, start)
    return RawFile("JSON lines", "", _lines(raw))


def _is_json(line: bytes) -> bool:
    try:
        parse_line(line)
    except UserError:
        return False
    return True


def _lines(raw: bytes) -> Iterator[tuple[int, Any]]:
    # Only a line feed ends a line: a JSON string may contain U+2028 and other separators as they are.
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, parse_line(line)
            except UserError as error:
                yield number, error


def _check_one_line_per_object(path: Path, start: bytes) -> None:
    """Raise UserError if the file begins with an object that goes over several lines."""
    first_line = start.partition(b"\n")[0]
    if not start or _is_json(first_line):
        return
    try:
        value, end = json.JSONDecoder().raw_decode(start.decode(errors="replace"))
    except (ValueError, RecursionError):
        return
    if end > len(first_line.decode(errors="replace")):
        lists = [
            key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)
        ]
        inside = lists and not KNOWN_KEYS.intersection(value)
        remedy = f"write the list under its key {lists[0]!r} alone" if inside else "convert it with jq -c . FILE"
        raise UserError(f"{path} begins with an object over several lines; write each row on one line: {remedy}")


def _array(path: Path, raw: bytes) -> list[Any]:
    try:
        return json.loads(decode_utf8(path, raw), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); "
            "the file begins with [, so it must be one JSON array"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _table(path: Path, raw: bytes) -> RawFile:
    """Read a table with a header; raise UserError if the file is not a table."""
    text = decode_utf8(path, raw)
    headers = {delimiter: _header(text, delimiter) for delimiter in DELIMITERS}
    delimiter = max(headers, key=lambda d: (len(KNOWN_KEYS.intersection(headers[d])), len(headers[d])))
    keys = headers[delimiter]
    if not KNOWN_KEYS.intersection(keys) and path.name.removesuffix(".gz")[-4:] not in (".csv", ".tsv"):
        raise UserError(
            f"{path} holds neither JSON nor a table with a known column: it begins with {shown(text.lstrip()[:20])}; "
            "write one JSON object per line, or a table whose first line names its columns, like content,summary"
        )
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}; rename or delete one")
    return RawFile(DELIMITERS[delimiter], "", _table_rows(text, delimiter, keys))


def _reader(text: str, delimiter: str) -> Any:
    csv.field_size_limit(sys.maxsize)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(filter(any, _reader(text, delimiter)), [])]
    except csv.Error:
        return []


def _table_rows(text: str, delimiter: str, keys: list[str]) -> Iterator[tuple[int, Any]]:
    reader = _reader(text, delimiter)
    next(filter(any, reader), None)  # the header
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, UserError(f"not a row of the table ({error})")
            continue
        if len(fields) == len(keys):
            yield line, dict(zip(keys, fields, strict=True))
        elif any(fields):
            found = f"{len(fields)} fields in {len(keys)} columns"
            yield line, UserError(f"{found}; put a field that holds {delimiter!r} in quotes")


def _parquet(path: Path, raw: bytes) -> list[dict[str, Any]]:
    try:
        return pq.read_table(pa.BufferReader(raw)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{path} is a damaged Parquet file ({reason}); copy it again") from error
