"""
What lies where in a tar or a zip, found without unpacking it; what is there is read by its place.

    members    of a tar, by its headers: ustar, GNU and PAX names, base-256 sizes; or by the .idx that DALI writes
               beside it; of a zip, by its directory: stored or deflated, zip64
    samples    consecutive members of one key, as webdataset groups them
    contents   the bytes of a member     name_at  its name, from the header before it

Nothing here holds a file's position, so a descriptor may be shared by threads and by processes that are forked.
tarfile stops without a word at a damaged header, and loses all of an archive that is cut short: hence our own walk.
"""

import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from engine.images import EXTENSIONS
from engine.system import read_at

TAR, STORED, DEFLATED = range(3)   # Member.kind
BLOCK = 512                    # bytes that everything in a tar is a multiple of
ZEROS = bytes(BLOCK)
LONGEST = 1 << 20              # bytes of a header's own data that are believed: names and attributes
LARGEST = 1 << 30              # bytes that a member may unpack to
CHUNK = 1 << 20                # bytes of zeros that are passed at once
PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}  # first bytes
END, END64, LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")  # of a zip
ENTRY, LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")


class Member(NamedTuple):
    """A regular file in an archive."""
    name: str
    start: int                 # byte where its data begin; in a zip, its local header
    size: int                  # bytes there, before they are unpacked
    kind: int                  # TAR, STORED, DEFLATED
    head: int = 0              # blocks of 512 bytes from its first header to its data; in a zip 0


class CutShort(ValueError):
    """The archive ends too early; all members before its end have been given."""


def members(path, fd):
    """
    Each Member, in the order of the archive.

    path    its suffix says what it is    fd  of the same file, open to read
    raises  ValueError that begins with the byte or the reason, but does not name the file: damaged, compressed, locked;
            CutShort after the last whole member
    """
    size = os.fstat(fd).st_size
    if Path(path).suffix.lower() == ".zip":
        return zip_members(fd, size)
    return listed(Path(path).with_suffix(".idx"), path, size) or tar_members(fd, size)

# --------------------------------------------------------------------------------
# Tar


def tar_members(fd, size, at=0):
    """Walks from header to header; archives that were written one after the other are one."""
    first, name, length, ended = at, None, None, False  # of the member whose headers are being read
    while at + BLOCK <= size:
        block = read_at(fd, BLOCK, at)
        if block == ZEROS:
            ended, at = True, past_zeros(fd, at, size)
            first = at
            continue
        stored, ended = check_header(block, at), False
        kind, data = block[156:157], at + BLOCK
        if kind in (b"L", b"K", b"x", b"X", b"g"):  # it describes the next header, or (g) all of them
            if stored > LONGEST:
                raise ValueError(f"byte {at}: a header that describes others with {stored} bytes")
            said = read_at(fd, stored, data)
            if len(said) < stored:
                break
            if kind == b"L":
                name = said.partition(b"\0")[0]
            if kind in b"xX":
                records = attributes(said, at)
                name, length = records.get(b"path", name), records.get(b"size", length)
        elif kind in (b"0", b"\0", b"7"):
            stored = stored if length is None else number(length, at)
            if data + stored > size:
                break
            text = name or own_name(block)
            if not text.endswith(b"/"):  # as old ones write a folder
                yield Member(clean(text.decode("utf-8", "surrogateescape")), data, stored, TAR, (data - first) // BLOCK)
        elif kind in b"123456":  # links, devices and folders have no data, whatever their size is
            stored = 0
        elif kind == b"S":  # with holes: more headers, each saying whether another follows
            more = block[482]
            while more and data + BLOCK <= size:
                more, data = read_at(fd, BLOCK, data)[504], data + BLOCK
        at = data + -(-stored // BLOCK) * BLOCK
        if kind not in b"LKxXg":
            first, name, length = at, None, None
    if not ended or at < size and read_at(fd, size - at, at).strip(b"\0"):
        raise CutShort(f"cut short at byte {size}")


def check_header(block, at):
    """The size that a tar's header has. Raises ValueError if it is no header."""
    try:
        told = int(block[148:156].strip(b"\0 "), 8)
    except ValueError:
        told = -1
    # adler32 ends in 1 + the sum of all bytes, modulo 65521; the field itself counts as eight spaces
    if zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xffff != (1 + told) % 65521 and told != signed_sum(block):
        packed = next((tool for magic, tool in PACKED.items() if at == 0 and block.startswith(magic)), "")
        raise ValueError(f"it is compressed, so that no member can be read by its place: {packed} it" if packed else
                         f"byte {at}: no header of a tar")
    field = block[124:136]
    if field[0] & 0x80:  # base 256
        size = int.from_bytes(field[1:], "big")
        return size if field[0] == 0x80 and size < 1 << 62 else number(b"", at)
    return number(field.strip(b"\0 ") or b"0", at, 8)


def signed_sum(block):
    """As some old programs add up a header."""
    return sum(byte - 256 * (byte > 127) for byte in block[:148] + b" " * 8 + block[156:])


def number(text, at, base=10):
    """Raises ValueError that names the byte."""
    if not text.isdigit() or len(text) > 20 or base == 8 and text.strip(b"01234567"):
        raise ValueError(f"byte {at}: a header with no size")
    return int(text, base)


def own_name(block):
    """Of a header; POSIX has room for the folders before it."""
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def attributes(data, at):
    """{key: value} of a PAX header: records `length key=value`, a line each. Raises ValueError."""
    found, place = {}, 0
    while place < len(data) and data[place]:
        space = data.find(b" ", place, place + 20)
        length = data[place:space]
        end = place + int(length) if space > place and length.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or not equals:
            raise ValueError(f"byte {at}: a PAX header whose records are damaged")
        found[key], place = value, end
    return found


def past_zeros(fd, at, size):
    """The first block from `at` on that is not all zeros; or the end."""
    while at + BLOCK <= size:
        data = read_at(fd, CHUNK, at)
        rest = data.lstrip(b"\0")
        if rest or len(data) < BLOCK:
            return at + (len(data) - len(rest)) // BLOCK * BLOCK
        at += len(data) // BLOCK * BLOCK
    return at


def clean(name):
    """As `tar c .` and absolute paths are understood: from the archive's own root."""
    while name.startswith("./"):
        name = name[2:]
    return name.lstrip("/")


def listed(idx, tar, size):
    """
    Members as DALI's .idx lists them: `v1.2 N`, then for each sample a line of `suffix start size name`. None if there
    is none, or one that is older than the tar, not understood, or does not fit: then the headers are walked.
    """
    try:
        if os.stat(idx).st_mtime < os.stat(tar).st_mtime:
            return None
        head, *lines = idx.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        version, count = head.split()
        found = []
        for line in lines:
            words = line.split(" ")
            for suffix, start, length, name in zip(*[iter(words)] * 4, strict=True):
                start, length = int(start), int(length)
                if not name.endswith(suffix) or start % BLOCK or not 0 < start <= start + length <= size:
                    return None
                found.append(Member(clean(name), start, length, TAR,
                                    1 if len(name) <= 100 and name.isascii() else 3))
        return found if version == "v1.2" and int(count) == len(lines) else None
    except (OSError, ValueError):
        return None

# --------------------------------------------------------------------------------
# Zip


def zip_members(fd, size):
    """As the directory at its end says. One that is cut short has none, and is an error."""
    directory, begin, shift, count = find_directory(fd, size)
    place, n = 0, 0
    while place < len(directory):
        if len(directory) < place + ENTRY.size or directory[place : place + 4] != b"PK\1\2":
            raise ValueError(f"byte {begin + place}: no entry of a zip's directory")
        (_, _, _, flags, method, _, _, _, packed, full, n_name, n_extra, n_more, _, _, mode, start
         ) = ENTRY.unpack_from(directory, place)
        text, extra = place + ENTRY.size, place + ENTRY.size + n_name
        name = decoded(directory[text:extra], flags)
        full, packed, start = larger(directory[extra : extra + n_extra], full, packed, start)
        if not name.endswith("/") and mode >> 28 != 0o12:  # a link is none of its own
            if flags & 1:
                raise ValueError(f"{name} is locked by a password: unpack it")
            if method not in (0, 8):
                raise ValueError(f"{name} is packed by method {method}, wanted stored or deflated: pack it anew")
            if start + shift + LOCAL.size + packed > begin:
                raise ValueError(f"byte {begin + place}: {name} would lie beyond byte {begin}")
            yield Member(clean(name), start + shift, packed, DEFLATED if method else STORED)
        place, n = extra + n_extra + n_more, n + 1
    if n & 0xffff != count & 0xffff:  # old programs write no more of it
        raise ValueError(f"byte {begin}: a directory of {n} entries that says it has {count}")


def find_directory(fd, size):
    """Its bytes, where they begin, how much was put before the zip itself, entries. Raises ValueError."""
    tail = read_at(fd, 1 << 16 | END.size, max(0, size - (1 << 16 | END.size)))
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) < found + END.size:
        raise ValueError("no directory at its end: it is cut short, or no zip")
    end = size - len(tail) + found
    _, disk, _, _, count, length, start, _ = END.unpack_from(tail, found)
    wide = read_at(fd, END64.size + LOCATOR.size, max(0, end - END64.size - LOCATOR.size))
    if wide[:4] == b"PK\6\6" and wide[END64.size :][:4] == b"PK\6\7":
        end -= END64.size + LOCATOR.size
        _, _, _, _, disk, _, _, count, length, start = END64.unpack_from(wide)
    if disk or length + start > end:
        raise ValueError(f"byte {end}: a directory that does not lie before it: it is damaged, or a part of several")
    return read(fd, length, end - length), end - length, end - length - start, count


def larger(extra, full, packed, start):
    """The three numbers of an entry, those of zip64 where 32 bits do not hold them."""
    place, wide = 0, b""
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        wide = extra[place + 4 : place + 4 + length] if kind == 1 else wide
        place += 4 + length
    numbers = []
    for value in full, packed, start:
        if value == 0xffffffff and len(wide) >= 8:
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        numbers.append(value)
    return numbers


def decoded(name, flags):
    """A name in a zip, as text: UTF-8 where a bit says so, else the letters of the first PCs."""
    return name.decode("utf-8", "surrogateescape") if flags & 0x800 else name.decode("cp437")

# --------------------------------------------------------------------------------
# Samples, and what members hold


def samples(found):
    """
    (key, {suffix: Member}) of consecutive members of one key: the name up to the first dot after its last slash; the
    suffix, in small letters, is the rest. Files that begin with a dot, __x__ and those without a suffix are in none.

    raises  ValueError for a suffix that a sample has twice; what `found` raises, CutShort after the last sample
    """
    key, group, cut = None, {}, None
    try:
        for member in found:
            folder, slash, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not (stem and suffix) or base.startswith("__") and base.endswith("__"):
                continue
            if folder + slash + stem != key:
                if group:
                    yield key, group
                key, group = folder + slash + stem, {}
            suffix = suffix.lower()
            if suffix in group:
                raise ValueError(f"{member.name} follows another {suffix} of the same sample: rename one of them")
            group[suffix] = member
    except CutShort as error:
        cut = error
    if group:
        yield key, group
    if cut:
        raise cut


def images_of(group):
    """Members of a sample that are images by their suffix, as jpg or seg.png."""
    return [member for suffix, member in group.items() if f".{suffix.rpartition('.')[2]}" in EXTENSIONS]


def contents(fd, member):
    """
    The bytes of a member, unpacked.

    raises  OSError, without a number where the bytes are wrong, with one where the system could not read them
    """
    if member.kind == TAR:
        return read(fd, member.size, member.start)
    spare = LOCAL.size + 512  # the name and more stand before the data; how long they are, only the bytes tell
    data = read(fd, min(member.size + spare, os.fstat(fd).st_size - member.start), member.start)
    if data[:4] != b"PK\3\4" or len(data) < LOCAL.size:
        raise OSError(f"no header at byte {member.start}")
    _, _, flags, _, _, _, crc, _, _, n_name, n_extra = LOCAL.unpack_from(data)
    begin = LOCAL.size + n_name + n_extra
    data = data[begin : begin + member.size] if begin <= spare else read(fd, member.size, member.start + begin)
    if member.kind == DEFLATED:
        stream = zlib.decompressobj(-15)
        try:
            data = stream.decompress(data, LARGEST)
        except zlib.error as error:
            raise OSError(str(error)) from error
        if not stream.eof:
            raise OSError(f"its data do not end, or not before {LARGEST:,} bytes")
    if not flags & 8 and zlib.crc32(data) != crc:  # else the sum stands after the data
        raise OSError("its checksum is wrong")
    return data


def read(fd, n, at):
    """n bytes from byte `at` on: a system gives 2 GB at most in one call. Raises OSError if they are not there."""
    data = read_at(fd, n, at)
    while len(data) < n:
        more = read_at(fd, n - len(data), at + len(data))
        if not more:
            raise OSError(f"it ends at byte {at + len(data)}, before the {n} bytes from byte {at} on")
        data += more
    return data


def name_at(fd, member):
    """The name that stands in the header before a member's data. Raises OSError, ValueError where there is none."""
    if member.kind == TAR:
        for head in (member.head, 1):  # an .idx does not tell how many blocks there are
            first = member.start - head * BLOCK
            found = next(tar_members(fd, member.start + member.size, first), None) if first >= 0 else None
            if found and found.start == member.start:
                return found.name
        raise ValueError(f"byte {member.start}: no header before it")
    magic, _, flags, *_, length, _ = LOCAL.unpack(read(fd, LOCAL.size, member.start))
    if magic != b"PK\3\4":
        raise ValueError(f"byte {member.start}: no header")
    return clean(decoded(read(fd, length, member.start + LOCAL.size), flags))


def shown(text):
    """In one line that can be printed, whatever bytes names have."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
