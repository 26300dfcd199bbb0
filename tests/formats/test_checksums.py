"""SHA256SUMS: every changed byte of a file that decides the model is noticed."""

import hashlib
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError
from cospadi.files.untrusted import shown
from cospadi.formats.checkpoint import INDEX
from cospadi.formats.checksums import CHECKSUMS, check_checksums, decides, write_checksums
from cospadi.formats.verify import verify_checkpoint

from ..fuzz.seeds import small_checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint in two shards with a tokenizer, a report and checksums."""
    folder = small_checkpoint(tmp_path_factory.mktemp("sums") / "model", shards=2)
    for name in ("tokenizer.json", "generation_config.json", "report.json", "README.md"):
        (folder / name).write_text("{}")
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(sharded, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sharded, tmp_path / "copy")


def refused(folder, *texts):
    with pytest.raises(CheckpointError) as caught:
        check_checksums(folder)
    for text in texts:
        assert text in str(caught.value)
    assert str(caught.value).isprintable()


def listed(folder):
    return dict(reversed(line.split("  ")) for line in (folder / CHECKSUMS).read_text().splitlines())


def test_the_files_that_decide_the_model_are_listed_by_name_and_digest(folder):
    names = {"config.json", "generation_config.json", "tokenizer.json", INDEX}
    names |= {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert set(listed(folder)) == names
    for name, digest in listed(folder).items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert check_checksums(folder)
    before = (folder / CHECKSUMS).read_bytes()
    write_checksums(folder)
    assert (folder / CHECKSUMS).read_bytes() == before


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_file(folder):
    check = ["sha256sum", "--strict", "--check", "--quiet", CHECKSUMS]
    assert subprocess.run(check, cwd=folder).returncode == 0
    (folder / "config.json").write_text("{}")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_without_the_file_there_is_nothing_to_compare(folder):
    (folder / CHECKSUMS).unlink()
    (folder / "tokenizer.json").write_text("changed")
    assert not check_checksums(folder)
    verify_checkpoint(folder)


def test_reports_may_change(folder):
    (folder / "report.json").write_text("changed")
    (folder / "README.md").unlink()
    assert check_checksums(folder)
    verify_checkpoint(folder)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_of_a_listed_file_is_noticed(sharded, tmp_path_factory, data):
    folder = shutil.copytree(sharded, tmp_path_factory.mktemp("flip") / "copy")
    path = folder / data.draw(st.sampled_from(sorted(listed(folder))))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    refused(folder, str(path), "differs from its checksum", f"delete {CHECKSUMS}")
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        verify_checkpoint(folder)
    shutil.rmtree(folder.parent)


@given(position=st.integers(0, 10**4), change=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_changed_checksums_are_refused_or_say_the_same(sharded, tmp_path_factory, position, change, cut):
    folder = shutil.copytree(sharded, tmp_path_factory.mktemp("sums") / "copy")
    original = (folder / CHECKSUMS).read_bytes()
    content = bytearray(original)
    position %= len(content)
    if cut:
        del content[position:]
    else:
        content[position] ^= change
    (folder / CHECKSUMS).write_bytes(content)
    try:
        accepted = check_checksums(folder)
    except CheckpointError:
        accepted = False
    # sha256sum marks binary files by a star, and the last line may lack its end.
    means_the_same = bytes(content).replace(b" *", b"  ").removesuffix(b"\n") == original.removesuffix(b"\n")
    assert accepted == means_the_same
    shutil.rmtree(folder.parent)


GOOD = "0" * 64
LINES = {
    "nothing": ("", "line 1 is no checksum"),
    "a short digest": ("0" * 63 + "  config.json\n", "line 1 is no checksum"),
    "no name": (GOOD + "  \n", "line 1 is no checksum"),
    "one separator": (GOOD + " config.json\n", "line 1 is no checksum"),
    "a blank line": ("\n" + GOOD + "  config.json\n", "line 1 is no checksum"),
    "a file twice": ((GOOD + "  config.json\n") * 2, "line 2 is no checksum"),
    "a very long line": (GOOD + "  " + "x" * 10**6 + "\n", "..."),
    "an escape sequence": ("\x1b[2J\n", "line 1 is no checksum"),
}


@pytest.mark.parametrize("what", LINES)
def test_malformed_checksums_are_refused(folder, what):
    text, expected = LINES[what]
    (folder / CHECKSUMS).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        check_checksums(folder)
    assert len(str(caught.value)) < 1000
    if what != "a very long line":
        assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["../copy/config.json", "/etc/passwd", "a/b", "..", ".", "a\\b", "x\0"])
def test_names_that_leave_the_folder_are_refused(folder, name):
    with (folder / CHECKSUMS).open("a") as file:
        file.write(f"{GOOD}  {name}\n")
    refused(folder, "leaves the folder")


def test_a_listed_file_that_is_missing_is_named(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "tokenizer.json", "missing")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "vocab.txt", "\n.model"])
def test_a_file_that_a_reader_would_use_must_be_listed(folder, name):
    assert decides(name)
    (folder / name).write_text("{}")
    refused(folder, shown(name), f"is not listed in {CHECKSUMS}: download")


def test_a_file_for_people_need_not_be_listed(folder):
    (folder / "LICENSE.txt").write_text("free")
    (folder / "._model.safetensors").write_text("a remark of a file system")
    (folder / "tokenizer").mkdir()
    assert check_checksums(folder)


def test_a_file_of_absurd_size_is_not_read(folder):
    with (folder / CHECKSUMS).open("wb") as file:
        file.truncate(2**40)
    refused(folder, CHECKSUMS, "larger than")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0" * 100])
def test_bytes_that_are_no_text_are_refused(folder, content):
    (folder / CHECKSUMS).write_bytes(content)
    refused(folder, CHECKSUMS)


def test_links_out_of_the_folder_and_into_nothing_are_refused(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "outside.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    refused(folder, "tokenizer.json", "leaves the folder")
    (folder / CHECKSUMS).unlink()
    (folder / CHECKSUMS).symlink_to("nowhere")
    refused(folder, CHECKSUMS, "missing")


def test_one_file_alone_can_be_compared(folder):
    (folder / "tokenizer.json").write_text("changed")
    assert check_checksums(folder, ["config.json"])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        check_checksums(folder, ["tokenizer.json"])
    with pytest.raises(CheckpointError, match=r"'README\.md' is not listed"):
        check_checksums(folder, ["README.md"])
