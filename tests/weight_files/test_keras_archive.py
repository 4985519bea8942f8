import contextlib
import struct
import zipfile

import pytest
from weight_samples import write_keras

from polyak_model.errors import InputError
from polyak_model.weight_files.keras_archive import (
    copy_member,
    list_assets,
    open_archive,
    open_member,
    parse_json,
    read_json,
)

COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


@contextlib.contextmanager
def refused(problem):
    with pytest.raises(InputError) as caught:
        yield
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def open_and_close(path):
    with open_archive(path):
        pass


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_member_reads_as_it_was_written(tmp_path, compression):
    content = bytes(range(256)) * 100
    path = write_keras(tmp_path / "a.keras", content, compression=compression)
    with open_archive(path) as archive, open_member(archive, "model.weights.h5", path) as member:
        assert member.size == len(content)
        member.seek(1000)
        assert member.read(500) == content[1000:1500]
        member.seek(0)
        assert member.read(len(content)) == content


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_flipped_bit_of_a_member_is_found(tmp_path, compression):
    path = write_keras(tmp_path / "a.keras", bytes(range(256)) * 100, compression=compression)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("model.weights.h5")
        middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    damaged = bytearray(path.read_bytes())
    damaged[middle] ^= 1
    path.write_bytes(damaged)
    with (
        refused("its member 'model.weights.h5' is damaged"),
        open_archive(path) as archive,
        open_member(archive, "model.weights.h5", path),
    ):
        pass


@pytest.mark.parametrize(
    "name",
    ["../evil", "/evil", "assets/../../evil", "c:/evil", "..\\evil", "assets/a\nb", "a\x1b["],
)
def test_a_member_outside_the_folder_is_refused(tmp_path, name):
    path = write_keras(tmp_path / "a.keras", **{name: b"evil"})
    with refused("is outside the archive's folder"):
        open_and_close(path)


@pytest.mark.parametrize("name", ["metadata.json", "config.json", "model.weights.h5"])
def test_a_missing_member_is_named(tmp_path, name):
    path = write_keras(tmp_path / "a.keras", **{name: None})
    with refused(f"it has no {name}"):
        open_and_close(path)


def test_two_members_of_one_name_are_refused(tmp_path):
    path = write_keras(tmp_path / "a.keras")
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("config.json", "{}")
    with refused("two of its members have the same name"):
        open_and_close(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = bytes(2**27)
    path = write_keras(tmp_path / "a.keras", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < len(bomb) // 100
    with refused("declares 134,217,728 bytes in"):
        open_and_close(path)


def test_a_member_with_another_compression_is_refused(tmp_path):
    path = write_keras(tmp_path / "a.keras", compression=zipfile.ZIP_LZMA)
    with refused("has an unusual compression"):
        open_and_close(path)


def test_an_encrypted_member_is_refused(tmp_path):
    path = write_keras(tmp_path / "a.keras")
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    path.write_bytes(content[: start + 8] + struct.pack("<H", 1) + content[start + 10 :])
    with refused("is encrypted"):
        open_and_close(path)


@pytest.mark.parametrize("text", ["[]", "7", "{", "", "\udcff", "[" * 10**5, '{"a":' * 10**5])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, text):
    content = text.encode("utf-8", "surrogateescape")
    path = write_keras(tmp_path / "a.keras", **{"config.json": content})
    with refused("its config.json"), open_archive(path) as archive:
        read_json(archive, "config.json", path)


def test_a_long_config_is_refused_before_it_is_parsed(tmp_path):
    path = write_keras(tmp_path / "a.keras", **{"config.json": b"[" * (2**24 + 1)})
    with refused("longer than 16,777,216 bytes"), open_archive(path) as archive:
        read_json(archive, "config.json", path)


def test_json_is_parsed_from_bytes():
    assert parse_json(b'{"a": [1, null]}', "it", "a.json") == {"a": [1, None]}


def test_assets_are_listed_and_copied(tmp_path):
    path = write_keras(tmp_path / "a.keras", **{"assets/x/vocabulary.txt": b"a\nb", "notes": b""})
    with open_archive(path) as archive, zipfile.ZipFile(tmp_path / "b.zip", "w") as target:
        (name,) = list_assets(archive)
        copy_member(archive, name, target, path)
    with zipfile.ZipFile(tmp_path / "b.zip") as copy:
        assert copy.read("assets/x/vocabulary.txt") == b"a\nb"
