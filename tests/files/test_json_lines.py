"""Files of JSON lines, damaged ones among them."""

from __future__ import annotations

import pytest

from moe_gpt.errors import InputError
from moe_gpt.files.json_lines import read_json_lines

DAMAGED = [b'{"a": 2', b"[1]", b"3", b'{"b": 2}', b"[" * 100_000, b'"\xff', b"", b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage[:9])
@pytest.mark.parametrize(("stops_at_damage", "lines", "n_left_out"), [(False, [1, 3], 1), (True, [1], 2)])
def test_damaged_lines_are_left_out_and_counted(tmp_path, damage, stops_at_damage, lines, n_left_out):
    """Alone, or with all that follows: cut off, no object, without its key, too deep, no UTF-8, empty, long numbers."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'\n{"a": 3}\n')
    found = read_json_lines(path, lambda line: "a" in line, stops_at_damage)
    assert [line["a"] for line in found.lines] == lines
    assert found.n_left_out == n_left_out


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    """Whether that is a problem is for the caller to say."""
    with pytest.raises(FileNotFoundError):
        read_json_lines(tmp_path / "nothing.jsonl")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    """A log of strangers may be one."""
    (tmp_path / "secret").write_text('{"a": 1}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("../secret")
    with pytest.raises(InputError, match="outside of its folder"):
        read_json_lines(tmp_path / "run" / "metrics.jsonl")
