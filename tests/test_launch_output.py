"""What is shown of a rank's output, without ranks: lines, lines without an end, progress bars."""

import io
import os
import time

import pytest
from tqdm import tqdm

from helpers.launch import output
from helpers.launch.output import RankOutput


@pytest.fixture
def stream():
    return io.StringIO()


@pytest.fixture
def rank(stream):
    rank = RankOutput(0, stream)
    yield rank
    rank.write_end.close()
    if not rank.read_end.closed:
        rank.read_end.close()


def write(rank, data):
    os.write(rank.write_end.fileno(), data)
    rank.show()


def test_an_unfinished_line_is_shown_after_a_moment(rank, stream, monkeypatch):
    write(rank, b"Compiling ... ")
    rank.show_incomplete()
    assert stream.getvalue() == "" and rank.incomplete
    monkeypatch.setattr(output, "UNFINISHED_SECONDS", 0)
    rank.show_incomplete()
    write(rank, b"done\n")
    assert stream.getvalue() == "[rank 0] Compiling ... \n[rank 0] done\n"


def test_the_end_of_a_line_that_was_shown_adds_no_empty_line(rank, stream, monkeypatch):
    monkeypatch.setattr(output, "UNFINISHED_SECONDS", 0)
    write(rank, b"part")
    rank.show_incomplete()
    write(rank, b"\n\nnext\n")
    assert stream.getvalue() == "[rank 0] part\n[rank 0] \n[rank 0] next\n"


@pytest.mark.parametrize("bar", ["\r{}%", "{}%\r"])
def test_a_bar_moves_and_is_not_repeated_for_each_update(bar, rank, stream):
    for percent in range(0, 100, 10):
        write(rank, bar.format(percent).encode())
        rank.show_incomplete()
    assert stream.getvalue() == "[rank 0] 0%\n"
    write(rank, bar.format(100).encode() + b"\n")
    assert stream.getvalue() == "[rank 0] 0%\n[rank 0] 100%\n"


def test_a_bar_of_tqdm_moves(rank, stream, monkeypatch):
    monkeypatch.setattr(output, "UPDATE_SECONDS", 0)
    with open(rank.write_end.fileno(), "w", closefd=False) as file:
        for _ in tqdm(range(20), file=file, mininterval=0):
            file.flush()
            rank.show()
            rank.show_incomplete()
    moved = stream.getvalue().splitlines()
    assert "| 0/20 [" in moved[0] and "| 19/20 [" in moved[-1]
    assert len(moved) == 20 and all(line.startswith("[rank 0] ") for line in moved)
    rank.show()
    assert "| 20/20 [" in stream.getvalue().splitlines()[-1]


def test_a_windows_line_end_is_one(rank, stream):
    write(rank, b"text\r\n")
    assert stream.getvalue() == "[rank 0] text\n"


def test_a_long_line_takes_time_in_proportion(rank, stream):
    piece, pieces = b"x" * (1 << 16), 1000
    start = time.process_time()
    for _ in range(pieces):
        write(rank, piece)
    write(rank, b"\n")
    assert len(stream.getvalue()) == len("[rank 0] \n") + pieces * len(piece)
    assert time.process_time() - start < 5  # joined anew for each piece it takes far longer: 32 GiB are copied


def test_a_closed_stream_ends_nothing(rank, stream):
    stream.close()
    write(rank, b"text\n")
