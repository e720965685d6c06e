"""Ways to spoil what a user gives: text, bytes, JSON, recipes, folders, tables, tar files, command lines.

Every function takes a `random.Random` and draws from nothing else, so a case is repeated by its seed.
"""

import copy
import json
import os
import re
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

LONG = 100_000
NUMBERS = [
    "0", "-1", "1", "2", "0.5", "-0.0", "1e400", "-1e400", "1e308", "1e-320", "nan", "inf", "-inf", "1_000", "0x10", "010", "12:30:00", "1e3",
    "4097", "2147483648", "9223372036854775808", "1" + "0" * 400, "0." + "3" * 400, "١٢", "½", "1,5", "+3", " 7", "3 ", "3.0", "1e2.5",
]  # fmt: skip
TEXTS = [
    "", " ", "null", "~", "true", "no", "None", "[]", "{}", "[1, 2]", "[1", "{a: b}", "{a: {b: {c: d}}}", "- a", "a: b", "a: b: c", "'", '"',
    "!!python/object/apply:os.system [id]",
    "&a [*a]", "*a", "#", "a # b", "%s", "{0}", "{{x}}", "$HOME", "`id`", "<b>x</b>", "../..", "/", ".", "-", "--", "--help", "/dev/null", "/dev/zero",
    "/dev/full", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "file:///etc/passwd", "http://127.0.0.1:9/x", "hf-hub:a/b", "a/b", "a/b@c",
    "local-dir:in/images", "local-dir:",
    "C:\\x", "con", "a\tb", "a\nb", "a\r\nb", "a\rerror: b", "a\x00b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x07", "\u202etxt.gpj",
    "\u2066a\u2069", "\u200b", "\ufeff", "é", "😀", "日本",
    "\udc80\udcff", "x" * 300, "x" * LONG, "a/" * 3000 + "b", "[" * 3000, "{a: " * 500, "," * 5000, "\n" * 1000, "\u0085\u2028",
]  # fmt: skip
NAMES = [
    "a:b", "http:x", "s3://x", "a#b", "a.b.c", "v1.0", "a b", " a", "a ", "-x", "--out", "a\nb", "a\rb", "a\tb", "a\x1b[31mb", "a\x07", "\u202eb",
    "\ufeffa", "é", "e\u0301", "日本", "😀", "%41",
    "a%sb", "{x}", "a*b", "[a]", "?", "a'b", 'a"b', "a\\b", "a`b`", "<i>", "a|b", "a;b", "a,b", "a=b", "~", "$HOME", "...", "..a", "con", "nul.png",
    "a" * 240, "a\udc80b", "\udcff", "train", "val", ".hidden",
    "embeddings.json", "config.json", "0", "None", "null",
]  # fmt: skip
DROPPINGS = [
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "._a.png",
    ".a.png.swp",
    "a.png~",
    "a.png.part",
    "README.md",
    "LICENSE",
    "a.csv",
    ".gitkeep",
    "._SUCCESS",
]
SUFFIXES = [".png", ".PNG", ".jpg", ".jpeg.png", ".heic", ".avif", ".svg", ".txt", ".tar", ".parquet", ".zip", ".gz", ".npy", ".pkl", ".exe", "", ".",
".pt", ".json", ".safetensors", ".npz"]  # fmt: skip


def odd(rng: Random) -> str:
    """A text that a field may not expect."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NUMBERS)
    if kind < 0.9:
        return rng.choice(TEXTS)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x250), rng.randrange(0x2000, 0x2070)))) for _ in range(rng.randrange(1, 40))
    )


def misspelt(rng: Random, text: str) -> str:
    if not text:
        return "x"
    i = rng.randrange(len(text))
    return rng.choice(
        (text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:], text[:i] + rng.choice("abc_-.") + text[i + 1 :], text.upper(), text + "s")
    )


def of_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes with some damage."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, n = rng.randrange(len(data) + 1), len(data)
        match rng.randrange(9):
            case 0 | 1 if n:
                data[rng.randrange(n)] ^= 1 << rng.randrange(8)
            case 2:
                del data[at:]
            case 3:
                data[at : at + rng.randrange(1, 40)] = b""
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 5:
                big = rng.choice((0, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
                data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", big)
            case 6:
                data[at : at + 64] = bytes(min(64, n - at))
            case 7:
                data += data[at:] + b"\0" * rng.randrange(600)
            case _:
                data = bytearray(rng.choice((b"", b"\0", b"\xff" * 100, b"PK\3\4", b"not what it says", bytes(data) * 2)))
    return bytes(data)


def deep(rng: Random) -> Any:
    value: Any = 1
    for _ in range(rng.choice((40, 900))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def of_json(rng: Random, value: Any) -> Any:
    """A JSON value with one to three odd entries."""
    value = copy.deepcopy(value)
    strange = [
        None, True, False, 0, -1, 1.5, 1e308, 10**20, 10**400, "", "x", "\x1b[31m", "\u202e", "x" * LONG, "../x", "/etc/passwd", [], {}, [[]], [None],
        {"a": 1}, [1] * 5000,
        float("nan"), float("inf"), {"": ""}, "\ud800",
    ]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(strange)
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[misspelt(rng, key)] = holder.pop(key)
            case 2:
                holder[key] = deep(rng)
            case 3 if isinstance(holder, dict):
                holder[odd(rng)[:200]] = rng.choice(strange)
            case _:
                holder[key] = rng.choice(strange)
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)


def of_json_text(rng: Random, text: str) -> bytes:
    """The text of a JSON file with odd contents or odd form."""
    match rng.randrange(8):
        case 0:
            return of_bytes(rng, text.encode())
        case 1:
            return rng.choice(
                (b"", b"null", b"[]", b"{}", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", "﻿{}".encode("utf-16"))
            )
        case 2:  # a key twice
            return re.sub(r"\{", '{"rlpjepa_zoo": 1, "format": 2, "rows": 3, ', text, count=1).encode()
        case _:
            return json.dumps(of_json(rng, json.loads(text))).encode()


def of_yaml(rng: Random, text: str) -> bytes:
    """The text of a recipe with odd contents or odd form."""
    lines = text.strip().splitlines()
    i = rng.randrange(len(lines))
    match rng.randrange(12):
        case 0:
            return of_bytes(rng, text.encode())
        case 1:
            lines.insert(i, lines[i])
        case 2:
            del lines[i]
        case 3:
            lines[i] = "\t" + lines[i]
        case 4:
            lines[i] = re.sub(r"\w+", lambda m: misspelt(rng, m[0]), lines[i], count=1)
        case 5:
            lines[i] = re.sub(r"[\d.e-]+(?=[,}\]]|$)", lambda _: odd(rng), lines[i], count=rng.choice((0, 1)))
        case 6:
            lines.append(
                rng.choice(
                    (
                        "x: 1",
                        "name: again",
                        "? [a]: b",
                        "1: 2",
                        "a: &x [1]\nb: *x",
                        "<<: {a: b}",
                        "---\nname: two",
                        "!!binary x: y",
                        "data:",
                        "data: []",
                    )
                )
            )
        case 7:
            lines[i] = lines[i] + " " + odd(rng)
        case 8:
            return rng.choice(
                (
                    b"",
                    b"\xef\xbb\xbf",
                    "a: b".encode("utf-16"),
                    b"\0" * 100,
                    b"a: " + b"[" * 5000,
                    b"a: " + b"{b: " * 3000,
                    b"x: y\n" * 300_000,
                    b"- a\n",
                    b"'",
                    b"%YAML 9\n---\na: b",
                )
            )
        case 9:
            return "\r\n".join(lines).encode()
        case 10:
            lines[i] = re.sub(r": .*", ":", lines[i])
        case _:
            lines[i] = re.sub(r"name: \w+", lambda _: f"name: {json.dumps(odd(rng))}", lines[0])
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def override(rng: Random, keys: list[str]) -> str:
    """SECTION.KEY=VALUE with an odd key or value."""
    key = rng.choice(keys)
    match rng.randrange(10):
        case 0:
            return f"{misspelt(rng, key)}={odd(rng)}"
        case 1:
            return rng.choice(
                (f"{key}.{odd(rng)[:50]}=1", key, f"={odd(rng)}", f"{key.partition('.')[0]}={odd(rng)}", f".{key}=1", f"{key}==1", odd(rng))
            )
        case _:
            return f"{key}={odd(rng)}"


# --- images, tables and archives --------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def picture_file(rng: Random, valid: bytes) -> bytes:
    """The bytes of an image with damage, or of one that lies about its size."""
    if rng.random() < 0.6:
        return of_bytes(rng, valid)
    side = rng.choice((0, 1, 30_000, 65_535, 2**31 - 1))
    header = struct.pack(">IIBBBBB", side, rng.choice((side, 1)), rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(bytes(rng.choice((0, 10, 4_000_000)))))
        + _chunk(b"IEND", b"")
    )
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side - 1, side - 1, 1, 24, 0, 0, 0, 0, 0, 0)
    return rng.choice(
        (png, bmp, b"GIF89a" + struct.pack("<HH", side & 0xFFFF, 9) + b"\0\0\0;", b"<svg/>", b"%PDF-1.4", b"RIFF\0\0\0\0WEBP")
    )


def table_file(rng: Random, path: Path, outside: Path) -> None:
    """Rewrite a parquet file with odd columns or cells, or damage its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if rng.random() < 0.4:
        path.write_bytes(of_bytes(rng, path.read_bytes()))
        return
    rows = pq.read_table(path).to_pylist()
    fifo = path.with_name("pipe")
    cell = rng.choice((
        {"bytes": None, "path": str(outside)}, {"bytes": b"", "path": str(outside)}, {"bytes": None, "path": "/dev/zero"}, {"bytes": None,
        "path": str(fifo)}, {"bytes": None, "path": None},
        {"bytes": b"junk", "path": "x" * 1000}, {"bytes": rows[0]["image"]["bytes"], "path": "a\x1b[31m\u202e.png"}, {"bytes": None,
        "path": "http://127.0.0.1:9/a.png"},
    ))  # fmt: skip
    if cell["path"] == str(fifo):
        os.mkfifo(fifo)
    column: Callable[[int], Any] = rng.choice((
        lambda i: i * 10**15, lambda i: -i, lambda i: i + 0.5, lambda i: float("nan"), lambda i: None, lambda i: "x" * 50_000,
        lambda i: f"c\x1b[31m{i}", lambda i: {"a": [i]}, lambda i: [i] * i,
        lambda i: b"\xff", lambda i: True, lambda i: "same",
    ))  # fmt: skip
    for i, row in enumerate(rows):
        row[rng.choice(("label", "note", "id", "extra \u202e", "image2"))] = column(i)
        if rng.random() < 0.5:
            row["image"] = cell
    names = sorted({name for row in rows for name in row})
    arrays = [[row.get(name) for row in rows] for name in names]
    try:
        table = pa.table(dict(zip(names, [pa.array(a) for a in arrays], strict=True)))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        table = pa.table({"image": pa.array([row["image"]["bytes"] for row in rows])})
    if rng.random() < 0.3:
        table = table.rename_columns([rng.choice((name, name, "image", "", "a\nb")) for name in table.column_names])
    pq.write_table(table.slice(0, rng.choice((0, 1, len(rows), len(rows)))), path, row_group_size=rng.choice((1, 3, 100)))


def tar_file(rng: Random, path: Path) -> None:
    """Rewrite a tar file with odd members, or damage its bytes."""
    if rng.random() < 0.4:
        path.write_bytes(of_bytes(rng, path.read_bytes()))
        return
    content = path.read_bytes()
    with tarfile.open(path, "a") as archive:
        for _ in range(rng.randrange(1, 4)):
            member = tarfile.TarInfo(
                rng.choice(["x/s00.png", "x/s99.png", "../up.png", "/abs.png", "x", "x/s98.cls", "x/s97.txt", "x/.png", *NAMES])
            )
            member.type = rng.choice(
                (
                    tarfile.REGTYPE,
                    tarfile.REGTYPE,
                    tarfile.LNKTYPE,
                    tarfile.SYMTYPE,
                    tarfile.FIFOTYPE,
                    tarfile.CHRTYPE,
                    tarfile.DIRTYPE,
                    b"Z",
                )
            )
            member.linkname = rng.choice(("x/s00.png", "x/none.png", "../../photo.tar", "/etc/passwd", member.name))
            if rng.random() < 0.3:
                member.pax_headers = {
                    rng.choice(("path", "size", "comment", "mtime")): rng.choice(("a\x1b[31m", "-1", "99999999999999", "x" * 5000))
                }
            archive.addfile(member)
    if rng.random() < 0.3:
        path.write_bytes(content + path.read_bytes())  # two archives in one file


def layout(rng: Random, folder: Path, outside: Path) -> None:
    """Put odd entries into a folder of images, or take some away."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    valid = files[0].read_bytes() if files else b""
    home = rng.choice([folder, folder, *[p for p in sorted(folder.rglob("*")) if p.is_dir() and not p.is_symlink()]])
    name = rng.choice((rng.choice(NAMES), rng.choice(DROPPINGS), f"n{rng.randrange(99)}")) + rng.choice((".png", ".png", "", *SUFFIXES))
    path = home / os.fsencode(name[:250]).replace(b"/", b"_").replace(b"\0", b"_")[:250].decode("utf-8", "surrogateescape")
    kind = rng.randrange(16)
    if kind < 5:
        _special(rng, _free(path), folder, outside)
    elif kind < 9 and files:
        _changed(rng, files)
    elif kind < 12:
        _write(path, rng.choice((valid, valid, b"", b"\0", b"text", picture_file(rng, valid))))
    else:
        _more(rng, home, valid, outside)


def _special(rng: Random, path: Path, folder: Path, outside: Path) -> None:
    """Something that is no file, or leads elsewhere."""
    match rng.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            with socket.socket(socket.AF_UNIX) as listener:
                here = os.open(path.parent, os.O_RDONLY)
                try:
                    listener.bind(f"/proc/self/fd/{here}/s{rng.randrange(99)}.png")  # the path of a socket has at most 107 bytes
                finally:
                    os.close(here)
        case 2:
            try:
                os.mknod(path, 0o20666, os.makedev(1, rng.choice((3, 5))))  # /dev/null, /dev/zero
            except PermissionError:  # not root
                path.symlink_to("/dev/zero")
        case 3:
            os.makedirs(path, exist_ok=True)
            _write(path / "c.png", outside.read_bytes())
        case _:
            targets = (outside, outside.parent, folder, Path("."), Path("none.png"), Path("/dev/zero"), Path("/etc"), path)
            path.symlink_to(rng.choice(targets))


def _changed(rng: Random, files: list[Path]) -> None:
    """Files damaged, unreadable or gone."""
    victim = rng.choice(files)
    match rng.randrange(4):
        case 0 | 1:
            victim.write_bytes(picture_file(rng, victim.read_bytes()))
        case 2:
            victim.chmod(0)
        case _:
            for file in rng.choice(([victim], files)):
                file.unlink()


def _more(rng: Random, home: Path, valid: bytes, outside: Path) -> None:
    """Other layouts beside the present one: deep folders, splits, archives, many files, files of other programs."""
    match rng.randrange(5):
        case 0:
            nested = home.joinpath(*["d"] * rng.choice((3, 60)))
            os.makedirs(nested, exist_ok=True)
            _write(nested / "deep.png", valid)
        case 1:
            for other in rng.sample(("photo.tar", "photo.parquet", "photo.zip"), 2):
                shutil.copy(outside.parent / other, home)
        case 2:
            for split in rng.sample(("train", "val", "valid", "test", "validation"), 2):
                os.makedirs(home / split / "a", exist_ok=True)
                _write(home / split / "a" / "0.png", valid)
        case 3:
            for i in range(300):
                _write(home / f"many{i}.png", b"junk" if rng.random() < 0.5 else valid)
        case _:
            name = rng.choice(("metadata.csv", "metadata.jsonl", "state.json", "dataset_info.json", "config.json", "embeddings.json"))
            _write(home / name, rng.choice((b"", b"{}", b"file_name,label\n00.png,3\n", b"[" * 9999)))


def _free(path: Path) -> Path:
    if path.is_symlink() or path.is_file():
        path.unlink()
    return path if not os.path.lexists(path) else path.with_name(path.name[:200] + "_2")


def _write(path: Path, content: bytes) -> None:
    if not path.is_dir():
        _free(path).write_bytes(content)
