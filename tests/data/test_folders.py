"""Folders that the library ``datasets`` wrote or reads, and files in the cache of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_gpt.config import SourceConfig
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.errors import InputError


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def texts(**source) -> list[str]:
    return [document.text for document in iterate_documents(SourceConfig(name="s", **source))]


def refused(*parts: str, **source) -> None:
    """Check that a source is refused in one line that has all parts."""
    with pytest.raises(InputError) as caught:
        texts(**source)
    message = str(caught.value)
    assert [part for part in ("source s", *parts) if part not in message] == []
    assert "\n" not in message
    assert "could not be opened" not in message


def save(folder: str, text: str, is_dict: bool = True, split: str | None = None) -> Path:
    """Save a dataset of one text; return the folder of its files."""
    import datasets

    data = datasets.Dataset.from_dict({"text": [text]}, split=split)
    (datasets.DatasetDict({split or "train": data}) if is_dict else data).save_to_disk(folder)
    return Path(folder, split or "train") if is_dict else Path(folder)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("is_dict", [True, False])
@pytest.mark.parametrize("name", ["../outside/data-00000-of-00001.arrow", "{here}/outside/data-00000-of-00001.arrow"])
def test_a_saved_dataset_names_files_of_its_folder(name, is_dict):
    """Its state.json is a stranger's; a link is as good as a name."""
    part = save("saved", "mine", is_dict)
    outside = save("outside", "secret", is_dict=False)
    edit(part / "state.json", _data_files=[{"filename": name.format(here=Path.cwd())}])
    refused("plain name", "outside", dataset="saved")
    edit(part / "state.json", _data_files=[{"filename": "link.arrow"}])
    (part / "link.arrow").symlink_to((outside / "data-00000-of-00001.arrow").resolve())
    refused("link.arrow is a link", "outside of its folder", dataset="saved")


def test_a_saved_dataset_names_folders_of_its_own():
    """In dataset_dict.json, by a name or by a link."""
    save("saved", "mine")
    save("outside", "secret", is_dict=False)
    Path("saved/dataset_dict.json").write_text('{"splits": ["../outside", "train", "link"]}')
    Path("saved/link").symlink_to(Path("outside").resolve())
    refused("plain name", dataset="saved", split="../outside")
    refused("outside of its folder", dataset="saved", split="link")
    assert texts(dataset="saved") == ["mine"]


def test_a_split_that_was_not_saved_is_refused():
    """It names the key and what there is; a single dataset has the split that it was made with, or train."""
    save("dict", "t", split="test")
    save("one", "t", is_dict=False, split="test")
    save("bare", "t", is_dict=False)
    for folder, there in [("dict", "test"), ("one", "test"), ("bare", "train")]:
        refused("split='other'", f"set split to one of: {there}", dataset=folder, split="other")
        assert texts(dataset=folder, split=there) == ["t"]
    refused("split='train'", dataset="one")


@pytest.mark.parametrize("name", ["dataset_info.json", "data-00000-of-00001.arrow", "state.json"])
def test_a_saved_dataset_that_is_not_whole_says_what_to_do(name):
    """The file is named."""
    (save("saved", "t") / name).unlink()
    refused(name, "copy or write the whole folder again", dataset="saved")


@pytest.mark.parametrize("content", ["[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', "{"])
def test_a_damaged_state_is_one_line(content):
    """Whatever it holds."""
    (save("saved", "t") / "state.json").write_text(content)
    refused("saved", dataset="saved")


def test_links_in_a_folder_of_data_stay_inside():
    """To a file and to a folder; those of the cache of Hugging Face lead to its blobs."""
    blobs, snapshot = Path("datasets--a--b/blobs"), Path("datasets--a--b/snapshots/1f/data")
    for folder in (blobs, snapshot, Path("outside")):
        folder.mkdir(parents=True)
    (blobs / "0a").write_text('{"text": "one"}\n')
    (snapshot / "train.jsonl").symlink_to("../../../blobs/0a")
    assert texts(dataset=str(snapshot.parent.resolve())) == ["one"]
    Path("outside/x.jsonl").write_text('{"text": "secret"}\n')
    for target in ("../../../../outside/x.jsonl", "../../../../outside"):
        (snapshot / "x.jsonl").symlink_to(target)
        refused("x.jsonl is a link", "outside of its folder", "put a copy", dataset=str(snapshot.parent))
        (snapshot / "x.jsonl").unlink()


def test_a_link_names_its_format():
    """A blob of the cache has no suffix; without the link's, a table would be one document of text."""
    blobs, snapshot = Path("datasets--a--b/blobs"), Path("datasets--a--b/snapshots/1f")
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "0a").write_text("n,text\n1,one\n")
    (snapshot / "a.csv").symlink_to("../../blobs/0a")
    (snapshot / "b.csv").symlink_to("../../blobs/0a")
    assert texts(files=str(snapshot / "*.csv")) == ["one"]
    assert texts(files=(str(snapshot / "a.csv"), str(snapshot / "b.csv"))) == ["one"]


def test_files_about_a_dataset_are_no_part_of_it():
    """A card and a licence lie in most folders."""
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text('{"text": "one"}\n')
    for name in ("README.md", "LICENSE.txt", "CHANGELOG.md"):
        Path("folder", name).write_text("about\n")
    assert texts(dataset=str(Path("folder").resolve())) == ["one"]


@pytest.mark.parametrize("streaming", [True, False])
def test_pictures_without_text_are_refused_before_they_are_decoded(streaming):
    """The columns are known; the picture is damaged."""
    Path("folder").mkdir()
    Path("folder/a.png").write_bytes(b"no picture")
    refused("text_field='text' is not a column", "image", dataset=str(Path("folder").resolve()), streaming=streaming)
