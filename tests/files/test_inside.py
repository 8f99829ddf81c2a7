"""Names and links in folders of strangers, and what lies in the place of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_gpt.errors import InputError
from moe_gpt.files.inside import inside, read_json
from moe_gpt.files.mistaken import disguise, other_weights, unfinished_download


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one file, beside something that is nobody's business."""
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:\\x", "C:x", "a\0b", "\ud800", "a\nb", "\x1b[2J"],
    ids=ascii,
)
def test_names_with_a_path_in_them_are_refused(folder, name):
    """Whether or not something is there, in the form of any system; the message can be printed."""
    with pytest.raises(InputError, match="must be the plain name of a file in .*model") as caught:
        inside(folder, name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../secret", "config.json is a link to .*secret, outside of its folder"),
        ("/etc/passwd", "outside of its folder"),
        ("nowhere", "config.json is a link to nowhere, which is not there"),
        ("config.json", "a link that leads to itself"),
        ("..", "outside of its folder"),
        (".", "must be a file, got a folder"),
        ("/dev/zero", "outside of its folder"),
    ],
)
def test_links_that_lead_outside_are_refused(folder, target, message):
    """By the link's name and its target; also through a second link, and where the folder itself is a link."""
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    (folder / "second").symlink_to("config.json")
    (folder.parent / "alias").symlink_to(folder)
    for path in (folder / "config.json", folder / "second", folder.parent / "alias" / "config.json"):
        with pytest.raises(InputError, match=message if path.name == "config.json" else None):
            inside(path.parent, path.name)


def test_links_within_the_folder_are_followed(folder):
    """And a file that is not there is for the caller to miss."""
    (folder / "other").symlink_to("config.json")
    assert inside(folder, "other").read_text() == "{}"
    assert not inside(folder, "absent").exists()


def test_the_cache_of_hugging_face_is_read(tmp_path):
    """Its snapshots link into blobs; nothing else beside them may be reached."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    (blobs / "0a").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/0a")
    assert read_json(snapshot, "config.json") == {"a": 1}
    (tmp_path / "models--a--b" / "refs").write_text("{}")
    (snapshot / "other.json").symlink_to("../../refs")
    (blobs / "0b").symlink_to(tmp_path / "models--a--b" / "refs")
    (snapshot / "third.json").symlink_to("../../blobs/0b")
    for name in ("other.json", "third.json"):
        with pytest.raises(InputError, match="outside of its folder"):
            read_json(snapshot, name)
    (blobs / "0c.incomplete").touch()
    assert "0c.incomplete is a download that has not ended" in unfinished_download(snapshot)


def test_a_pipe_is_refused_and_not_waited_for(folder):
    """Opening one that nobody writes to would take for ever."""
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="must be a file, got a device or a pipe"):
        read_json(folder, "pipe")


def test_json_of_too_many_values_is_refused(folder):
    """Each needs many times the memory of its text."""
    (folder / "config.json").write_text("[" + "{}," * 600_000 + "{}]")
    with pytest.raises(InputError, match="must have at most 500,000 values"):
        read_json(folder, "config.json")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        (b"\n<!doctype HTML><html>", "web page"),
        (b"<html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "web page"),
        (b"Entry not found", "server's error message"),
        (b"", "empty"),
        (b"\0" * 1000, "unfinished download"),
        (b"PK\x03\x04...", "pickle.*save_pretrained"),
        (b"\x80\x02}q", "pickle"),
        (b"GGUF\x03", "GGUF.*gguf_file"),
        (b"\x1f\x8b\x08", "gzip data; unpack it"),
        (b"\xff\xfe{\0}\0", "UTF-16.*iconv"),
        (b"\x89PNG\r\n", "image.*download the file again"),
        (b"/annex/objects/SHA256E-s5", "git annex get"),
    ],
)
def test_a_file_in_the_place_of_another_is_named(folder, content, what):
    """In the place of JSON, which says what to do."""
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"config.json is not JSON: .*{what}"):
        read_json(folder, "config.json")


def test_a_key_twice_and_too_many_digits_in_json(folder):
    """The one is named, and the other does not hide the rest of the file."""
    (folder / "config.json").write_text('{"a": 1, "b": {"a": 1, "a": 2}}')
    with pytest.raises(InputError, match=r"config\.json is not JSON: the key 'a' occurs twice"):
        read_json(folder, "config.json")
    (folder / "config.json").write_text(f'{{"a": {"9" * 6000}, "b": 1}}')
    assert read_json(folder, "config.json")["b"] == 1


def test_an_honest_file_has_no_disguise(folder):
    """JSON and safetensors begin as no other kind does."""
    assert disguise(folder / "config.json") is None
    (folder / "x").write_bytes((80).to_bytes(8, "little") + b'{"a"')
    assert disguise(folder / "x") is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", "safe_serialization=True"),
        ("pytorch_model.bin.index.json", "safe_serialization=True"),
        ("pytorch_model-00001-of-00002.bin", "safe_serialization=True"),
        ("consolidated.00.pth", "made for transformers"),
        ("consolidated.safetensors", "made for transformers"),
        ("model.Q4_K_M.gguf", "gguf_file"),
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
        ("last.ckpt", "save_pretrained"),
        ("model.pth", "save_pretrained"),
        ("adapter_model.safetensors", "merge_and_unload"),
        ("adapter_config.json", "merge_and_unload"),
    ],
)
def test_other_weights_are_named_with_a_remedy(folder, name, remedy):
    """For every format that a model folder may have."""
    assert not other_weights(folder)
    (folder / name).touch()
    assert other_weights(folder).startswith(f"; {name} is ")
    assert remedy in other_weights(folder)


@pytest.mark.parametrize("end", ["incomplete", "part", "crdownload", "aria2"])
def test_downloads_that_have_not_ended_are_named(folder, end):
    """In the folder, and where huggingface-cli keeps them."""
    place = folder / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    for path in (folder / f"model.safetensors.{end}", place / f"x.{end}"):
        path.touch()
        assert f"{path} is a download that has not ended" in unfinished_download(folder)
        path.unlink()
