from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trainers.checkpoints import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").write_bytes(b"alpha")
    for name in ("state.json", "index.json"):
        (tmp_path / name).write_bytes(b"")
    manifest.write(tmp_path, step=7, entries={n: manifest.entry(tmp_path / n) for n in ("state.json", "index.json", "a")},
                   metrics={"loss": 0.1, "bad": None})
    return tmp_path


def test_a_written_manifest_is_read_back(folder):
    content = manifest.read(folder, 7)
    assert content["metrics"] == {"loss": 0.1, "bad": None} and list(content["files"]) == ["a", "index.json", "state.json"]
    assert content["files"]["a"] == {
        "size": 5, "sha256": "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8"}
    assert manifest.verify(folder, 7) == content


@pytest.mark.parametrize("content, problem", [
    (b"alphb", r"a has changed"), (b"alph", r"a has 4 bytes, not 5"), (None, r"a is missing")])
def test_a_changed_file_is_found(folder, content, problem):
    (folder / "a").unlink() if content is None else (folder / "a").write_bytes(content)
    with pytest.raises(manifest.Broken, match=problem):
        manifest.verify(folder, 7)


@pytest.mark.parametrize("name", ["state.json", "index.json"])
def test_a_manifest_without_the_state_or_the_index_is_refused(folder, name):
    entries = manifest.read(folder, 7)["files"]
    del entries[name]
    manifest.write(folder, step=7, entries=entries)
    with pytest.raises(manifest.Broken, match=f"{name} is missing from manifest.json"):
        manifest.read(folder, 7)


def test_any_flipped_byte_of_the_manifest_is_found(folder):
    path = folder / manifest.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 4, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1:])
            with pytest.raises(manifest.Broken, match="manifest.json"):
                manifest.read(folder, 7)
    path.write_bytes(whole)
    manifest.verify(folder, 7)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"digest": 1}', "\ud800"])
def test_a_file_that_is_not_a_manifest_is_refused(folder, text):
    (folder / manifest.NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(manifest.Broken, match="manifest.json"):
        manifest.read(folder, 7)


def test_an_unknown_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 99)
    manifest.write(folder, step=7, entries={})
    monkeypatch.undo()
    with pytest.raises(manifest.Broken, match="format 99; this version reads 2"):
        manifest.read(folder, 7)


def test_a_manifest_of_another_step_is_refused(folder):
    with pytest.raises(manifest.Broken, match="for step 7"):
        manifest.read(folder, 8)


def test_a_name_that_leads_out_of_the_folder_is_refused(folder):
    manifest.write(folder, step=7, entries={"../a": {"size": 1, "sha256": ""}})
    with pytest.raises(manifest.Broken, match="not the name of a file"):
        manifest.read(folder, 7)


def test_the_manifest_is_plain_json(folder):
    assert json.loads((folder / manifest.NAME).read_text())["format"] == 2


def test_reading_and_exporting_checkpoints_imports_neither_torch_nor_numpy():
    modules = ", ".join(f"trainers.checkpoints.{name}" for name in ("export", "folders", "manifest", "retention", "tensor_files"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
