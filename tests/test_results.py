"""What a notebook cannot show about result files: a process that dies in the middle of a write."""
import subprocess, sys

import pytest
from vitprune_nb.evidence.results import FIELDS, append_rows, make_row, read_rows

DIE = """
import os, sys
from pathlib import Path
from vitprune_nb.evidence.results import append_rows, make_row
die = lambda *a, **k: os._exit(9)
match sys.argv[2]:
    case 'writing':
        write = Path.write_text
        def half(self, text, **k): write(self, text[:len(text)//2], **k); die()
        Path.write_text = half
    case 'syncing': os.fsync = die
    case 'renaming': os.replace = die
append_rows(sys.argv[1], [make_row('new')]*50)
"""


@pytest.mark.parametrize('moment', ['writing', 'syncing', 'renaming'])
def test_a_killed_append_leaves_the_old_file_whole(tmp_path, moment):
    file = tmp_path/'r.csv'
    append_rows(file, [make_row('old', seed=1), make_row('old', seed=2)])
    before = file.read_bytes()
    died = subprocess.run([sys.executable, '-c', DIE, str(file), moment], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert file.read_bytes() == before
    assert append_rows(file, [make_row('next')]) == 3
    assert [r['method'] for r in read_rows(file)] == ['old', 'old', 'next']


def test_a_killed_first_write_leaves_no_file(tmp_path):
    file = tmp_path/'r.csv'
    died = subprocess.run([sys.executable, '-c', DIE, str(file), 'renaming'], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert not file.exists()
    assert append_rows(file, [make_row('first')]) == 1


def test_every_field_survives_the_round_trip(tmp_path):
    sample = {str: 'ä, "b"\n|c', int: 7, float: 1/3}
    row = {k: sample[t] for k, t in FIELDS.items()}
    append_rows(tmp_path/'r.csv', [row])
    assert read_rows(tmp_path/'r.csv') == [row]


def test_a_file_without_a_final_newline_is_continued_properly(tmp_path):
    file = tmp_path/'r.csv'
    append_rows(file, [make_row('a', note='x')])
    file.write_bytes(file.read_bytes().rstrip(b'\n'))
    append_rows(file, [make_row('b')])
    assert [r['method'] for r in read_rows(file)] == ['a', 'b']
