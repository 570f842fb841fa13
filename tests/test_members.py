"""engine/members.py: every dialect of tar and zip, and damage to each."""

import gzip
import io
import os
import struct
import tarfile
import zipfile

import pytest

from engine.members import DEFLATED, STORED, TAR, CutShort, contents, members, name_at, samples, shown

LONG = "folder" * 10 + "/" + "n" * 90 + ".jpg"    # 155 letters: ustar splits it, GNU and PAX write more headers
LONGER = "é" * 150 + ".jpg"                       # more than ustar has room for
DIALECTS = dict(ustar=tarfile.USTAR_FORMAT, gnu=tarfile.GNU_FORMAT, pax=tarfile.PAX_FORMAT)


def make_tar(path, files, dialect="ustar", **fields):
    """files  {name: bytes}, or a list of pairs"""
    with tarfile.open(path, "w", format=DIALECTS[dialect]) as tar:
        for name, data in dict(files).items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_zip(path, files, method=zipfile.ZIP_STORED, **options):
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, data in files.items():
            with packed.open(name, "w", **options) as file:
                file.write(data)
    return path


def opened(path):
    """{name: bytes} as members and contents give them; each name is found again by its place."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = {}
        for member in members(path, fd):
            assert name_at(fd, member) == member.name
            found[member.name] = contents(fd, member)
        return found
    finally:
        os.close(fd)


def walked(path):
    with open(path, "rb") as file:
        return list(members(path, file.fileno()))


def change(path, at, data):
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)


def resum(path, at):
    """The checksum of the header at byte `at`, made right again."""
    block = bytearray(path.read_bytes()[at : at + 512])
    block[148:156] = b" " * 8
    change(path, at + 148, b"%06o\0 " % sum(block))

# --------------------------------------------------------------------------------
# Tar


@pytest.mark.parametrize("dialect, names", [("ustar", [LONG]), ("gnu", [LONG, LONGER]), ("pax", [LONG, LONGER])])
def test_dialects(dialect, names, tmp_path):
    files = {name: name.encode() * k for k, name in enumerate(["a/1.jpg", "2.cls", *names, "ü.png"], 3)}
    files["b.jpg"] = b""
    assert opened(make_tar(tmp_path / "a.tar", files, dialect)) == files


def test_where_a_member_lies(tmp_path):
    """Data follow the header, or, with a long name, three headers."""
    short, long = walked(make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 600, LONG: b"y"}, "gnu"))
    assert short[1:] == (512, 600, TAR, 1) and long[1:] == (512 + 1024 + 1536, 1, TAR, 3)


def test_times_and_sizes_of_pax(tmp_path):
    """A header of attributes that are no name; a size that stands in it alone."""
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 700}, "pax", pax_headers=dict(size="700", mtime="1.5"))
    header = path.read_bytes().index(b"1.jpg\0")
    change(path, header + 124, b"%011o\0" % 0)
    resum(path, header)
    assert opened(path) == {"1.jpg": b"x" * 700}


def test_sizes_of_base_256(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y"})
    change(path, 124, b"\x80" + (700).to_bytes(11, "big"))
    resum(path, 0)
    assert opened(path) == {"1.jpg": b"x" * 700, "2.jpg": b"y"}
    for size in b"\xff" * 12, b"00000000909\0", b"-0000000001\0":  # -1; no octal number; -1
        change(path, 124, size)
        resum(path, 0)
        with pytest.raises(ValueError, match="byte 0: a header with no size"):
            walked(path)


def test_times_where_others_have_folders(tmp_path):
    """Some of GNU's headers have them there."""
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x"}, "gnu")
    change(path, 345, b"14000000000\0")
    resum(path, 0)
    assert opened(path) == {"1.jpg": b"x"}


def test_what_is_no_file_has_no_data(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for kind in tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE:
            info = tarfile.TarInfo("l" * 120 if kind == tarfile.DIRTYPE else "other")
            info.type, info.linkname, info.size = kind, "k" * 120, 700
            tar.addfile(info)
        info = tarfile.TarInfo("1.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert opened(path) == {"1.jpg": b"abc"}
    old = make_tar(tmp_path / "b.tar", {"folder/": b""})   # a folder, before there was a letter for it
    assert opened(old) == {}


def test_a_global_header_and_one_of_holes_are_passed(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"0.jpg": b"z", "1.jpg": b"x", "2.jpg": b"y"})
    change(path, 156, b"g")
    change(path, 512, b"18 comment=a word\n")
    change(path, 124, b"%011o\0" % 18)
    resum(path, 0)
    change(path, 1024 + 156, b"S")
    resum(path, 1024)
    assert opened(path) == {"2.jpg": b"y"}
    data = bytearray(path.read_bytes())
    data[1024 + 482] = 1                                     # two more blocks of holes
    path.write_bytes(data[:1536] + bytes(504) + b"\1" + bytes(7 + 512) + data[1536:])
    resum(path, 1024)
    assert opened(path) == {"2.jpg": b"y"}


def test_sums_of_signed_bytes(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"é.jpg": b"x"})
    block = bytearray(path.read_bytes()[:512])
    block[148:156] = b" " * 8
    change(path, 148, b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in block))
    assert opened(path) == {"é.jpg": b"x"}


def test_names_from_the_root(tmp_path):
    assert list(opened(make_tar(tmp_path / "a.tar", {"./a/1.jpg": b"x", "/b/2.jpg": b"y"}))) == ["a/1.jpg", "b/2.jpg"]


def test_names_that_cannot_be_printed():
    assert shown("a/ü 1.jpg") == "a/ü 1.jpg" and shown("a\n\x1b\udcff.jpg") == r"a\n\x1b\udcff.jpg"


def test_one_tar_after_another(tmp_path):
    """cat a.tar b.tar: tarfile would stop after the first."""
    first, second = make_tar(tmp_path / "a.tar", {"1.jpg": b"x"}), make_tar(tmp_path / "b.tar", {"2.jpg": b"y"}, "gnu")
    (tmp_path / "c.tar").write_bytes(first.read_bytes() + bytes(3 << 20) + second.read_bytes())
    assert opened(tmp_path / "c.tar") == {"1.jpg": b"x", "2.jpg": b"y"}


@pytest.mark.parametrize("size, whole", [(0, 0), (300, 0), (512, 0), (1000, 0), (1024, 1), (1536, 1), (2047, 1),
                                         (2048, 2), (2300, 2)])
def test_cut_short(size, whole, tmp_path):
    """What ends inside of the file is given, then CutShort; also where only the zeros of the end are gone."""
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 512, "2.jpg": b"y" * 512})
    path.write_bytes(path.read_bytes()[:size])
    found = []
    with open(path, "rb") as file, pytest.raises(CutShort, match=f"cut short at byte {size}"):
        for member in members(path, file.fileno()):
            found.append(member)
    assert [member.name for member in found] == ["1.jpg", "2.jpg"][:whole]


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_cut_short_in_what_describes_a_header(dialect, tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x", LONG: b"y"}, dialect)
    path.write_bytes(path.read_bytes()[: 1024 + 512 + 30])
    with pytest.raises(CutShort, match="cut short at byte 1566"):
        walked(path)


def test_damage_in_the_middle(tmp_path):
    """tarfile ends there without a word."""
    path = make_tar(tmp_path / "a.tar", {f"{k}.jpg": b"x" for k in range(3)})
    change(path, 1024 + 10, b"?")
    assert len(tarfile.open(path).getmembers()) == 1
    with pytest.raises(ValueError, match="^byte 1024: no header of a tar$"):
        walked(path)
    change(path, 1024, b"\0")
    with pytest.raises(ValueError, match="^byte 1024: no header of a tar$"):
        walked(path)
    change(path, 1024, bytes(512))   # a hole: what follows is read, and is data, not a header
    with pytest.raises(ValueError, match="^byte 1536: no header of a tar$"):
        walked(path)


@pytest.mark.parametrize("records", [b"9 path", b"x path=1\n", b"999 path=1\n", b"4 p=1\n", b"7 path\n", b"0 a=1\n"])
def test_damaged_attributes(records, tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": records, "2.jpg": b"x"})
    change(path, 156, b"x")
    resum(path, 0)
    with pytest.raises(ValueError, match="^byte 0: a PAX header whose records are damaged"):
        walked(path)


def test_a_header_of_others_that_is_too_long(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x"})
    change(path, 156, b"L")
    change(path, 124, b"%011o\0" % (1 << 21))
    resum(path, 0)
    with pytest.raises(ValueError, match="byte 0: a header that describes others with 2097152 bytes"):
        walked(path)


@pytest.mark.parametrize("data, tool", [(gzip.compress(b"x" * 999), "gunzip"), (b"BZh9", "bunzip2"),
                                        (b"\x28\xb5\x2f\xfd", "unzstd"), (b"\xfd7zXZ", "unxz")])
def test_compressed_as_a_whole(data, tool, tmp_path):
    (tmp_path / "a.tar").write_bytes(data + bytes(999))
    with pytest.raises(ValueError, match=f"it is compressed, so that no member can be read by its place: {tool} it"):
        walked(tmp_path / "a.tar")


def test_listed_by_dali(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": b"7", LONG: b"y" * 9}, "gnu")
    lines = ["v1.2 2", "jpg 512 1 1.jpg cls 1536 1 1.cls", f"jpg 3584 9 {LONG}"]
    idx = tmp_path / "a.idx"
    idx.write_text("\n".join(lines) + "\n")
    assert [member.start for member in walked(path)] == [512, 1536, 3584]
    assert opened(path) == {"1.jpg": b"x", "1.cls": b"7", LONG: b"y" * 9}
    change(path, 0, b"\xff")  # the headers are not walked
    os.utime(idx)
    assert len(walked(path)) == 3
    for text in ("v1.1 2\n" + "\n".join(lines[1:]), "\n".join(lines[:2]), "\n".join(lines).replace("3584", "3585"),
                 "\n".join(lines).replace(" 9 ", " 99999 "), "", "v1.2 1\njpg 512 1 a b.jpg", "v1.2 1\njpg x 1 a.jpg",
                 "v1.2 1\npng 512 1 a.jpg", "\n".join(lines).replace(" 9 ", " -9 ")):
        idx.write_text(text)
        with pytest.raises(ValueError, match="byte 0: no header"):  # then they are
            walked(path)
    idx.write_text("\n".join(lines))
    os.utime(idx, (1, 1))  # older than the tar
    with pytest.raises(ValueError, match="byte 0: no header"):
        walked(path)

# --------------------------------------------------------------------------------
# Zip


FILES = {"a/1.jpg": b"x" * 5000, "ü/2.png": bytes(range(256)) * 9, "empty.jpg": b""}


@pytest.mark.parametrize("method, kind", [(zipfile.ZIP_STORED, STORED), (zipfile.ZIP_DEFLATED, DEFLATED)])
@pytest.mark.parametrize("wide", [False, True])
def test_zips(method, kind, wide, tmp_path):
    path = make_zip(tmp_path / "a.zip", FILES, method, force_zip64=wide)
    assert opened(path) == FILES and {member.kind for member in walked(path)} == {kind}


def test_something_before_and_after_a_zip(tmp_path):
    path = make_zip(tmp_path / "a.zip", FILES)
    with zipfile.ZipFile(path, "a") as packed:
        packed.comment = b"PK\5\6 is no end"[4:] * 99
        packed.mkdir("folder")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, "a/1.jpg")
    path.write_bytes(b"#!/bin/sh\n" * 99 + path.read_bytes())
    assert opened(path) == FILES


def test_a_zips_names_of_old(tmp_path):
    """Without the bit that says UTF-8."""
    path = make_zip(tmp_path / "a.zip", {"x.jpg": b"1"})
    path.write_bytes(path.read_bytes().replace(b"x.jpg", b"\x81.jpg"))
    assert opened(path) == {"ü.jpg": b"1"}


def test_zip64(tmp_path, monkeypatch):
    """A directory as those of more than 65,535 files, or 4 GB, have it."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    path = make_zip(tmp_path / "a.zip", FILES, force_zip64=True)
    assert b"PK\6\6" in path.read_bytes() and b"\xff" * 4 in path.read_bytes()
    assert opened(path) == FILES


def test_zips_that_are_written_as_a_stream(tmp_path):
    """Sizes and sums stand after the data."""
    class Stream(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *_):
            raise io.UnsupportedOperation

        def tell(self):
            raise io.UnsupportedOperation
    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in FILES.items():
            packed.writestr(name, data)
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    assert opened(tmp_path / "a.zip") == FILES


def test_a_zips_long_extra_field(tmp_path):
    """Data that begin further from their header than is read at first."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        info = zipfile.ZipInfo("n" * 400 + ".jpg")
        info.extra = struct.pack("<HH", 0x7777, 300) + bytes(300)
        packed.writestr(info, b"abc" * 99)
    assert list(opened(path).values()) == [b"abc" * 99]


@pytest.mark.parametrize("cut", [1, 22, 60, 400])
def test_a_zip_that_is_cut_short(cut, tmp_path):
    path = make_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="no directory at its end: it is cut short, or no zip"):
        walked(path)


def test_damaged_zips(tmp_path):
    path = make_zip(tmp_path / "a.zip", FILES)
    whole = path.read_bytes()
    entry, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")

    def says(text, at, data):
        path.write_bytes(whole)
        change(path, at, data)
        with pytest.raises(ValueError, match=text):
            walked(path)
    says("a/1.jpg is locked by a password: unpack it", entry + 8, b"\1")
    says("a/1.jpg is packed by method 12, wanted stored or deflated", entry + 10, b"\x0c")
    says(f"byte {entry}: no entry of a zip's directory", entry, b"?")
    says(f"byte {entry}: a/1.jpg would lie beyond byte {entry}", entry + 42, b"\xff\xff\xff\0")
    says(f"byte {end}: a directory that does not lie before it", end + 12, b"\xff\xff\xff\0")
    says(f"byte {end}: .* a part of several", end + 4, b"\1\0")
    says(f"byte {entry}: a directory of 3 entries that says it has 4", end + 10, b"\4\0")


def test_data_of_zips_that_are_wrong(tmp_path):
    def says(text, at, data):
        path.write_bytes(whole)
        change(path, at, data)
        with open(path, "rb") as file, pytest.raises(OSError, match=text) as caught:
            contents(file.fileno(), walked(path)[0])
        assert caught.value.errno is None  # not the system's fault: it is not tried again
    path = make_zip(tmp_path / "a.zip", FILES)
    whole = path.read_bytes()
    says("its checksum is wrong", 1000, b"?")
    says("no header at byte 0", 0, b"?")
    path = make_zip(tmp_path / "b.zip", FILES, zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    says("Error -3|its data do not end", 30 + 7, b"\xff" * 8)
    with open(path, "rb") as file:
        path.write_bytes(whole)
        first = walked(path)[0]
        with pytest.raises(OSError, match="its data do not end"):
            contents(file.fileno(), first._replace(size=first.size - 3))


def test_a_zip_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.members.LARGEST", 4999)
    path = make_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_DEFLATED)
    with pytest.raises(OSError, match="its data do not end, or not before 4,999 bytes"):
        opened(path)


def test_data_beyond_the_end_of_a_file(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 9})
    with open(path, "rb") as file, pytest.raises(OSError, match="it ends at byte 10240, before the 99999 bytes from"):
        contents(file.fileno(), walked(path)[0]._replace(size=99999))

# --------------------------------------------------------------------------------
# Samples


def grouped(*names):
    from engine.members import Member
    return [(key, list(group)) for key, group in samples([Member(name, 0, 1, TAR) for name in names])]


def test_samples_are_neighbours_of_one_key():
    assert grouped("a/1.jpg", "a/1.cls", "a/2.JPG", "b.d/1.jpg", "b.d/1.seg.png", "a/1.jpg") == [
        ("a/1", ["jpg", "cls"]), ("a/2", ["jpg"]), ("b.d/1", ["jpg", "seg.png"]), ("a/1", ["jpg"])]


def test_what_is_in_no_sample():
    assert grouped("__meta__", "a/__x.jpg__", "a/._1.jpg", ".jpg", "README", "a/1.", "2.jpg") == [("2", ["jpg"])]


def test_a_suffix_twice():
    with pytest.raises(ValueError, match="a/1.JPG follows another jpg of the same sample: rename one of them"):
        grouped("a/1.jpg", "a/1.JPG")


def test_samples_of_what_is_cut_short(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"1.jpg": b"x", "2.jpg": b"x", "2.cls": b"y"})
    path.write_bytes(path.read_bytes()[:2500])  # in the last header
    found = []
    with open(path, "rb") as file, pytest.raises(CutShort):
        for key, group in samples(members(path, file.fileno())):
            found.append((key, list(group)))
    assert found == [("1", ["jpg"]), ("2", ["jpg"])]
