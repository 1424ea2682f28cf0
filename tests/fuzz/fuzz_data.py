"""Malformed settings, images, tables and texts."""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import json
import os
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from fuzz_bytes import NAMES, VALUES, Rng, as_json, damaged, pick, twisted
from fuzz_run import Make, Place, Read, Skipped

from guywire.core.errors import GuywireError


def command(*arguments: str) -> str:
    """Run a command of the CLI in this process; one that fails as it should is a GuywireError."""
    from guywire.cli.app import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(arguments))
    text = out.getvalue() + err.getvalue()
    assert "Traceback" not in text, text
    if code in (1, 2):
        raise GuywireError(err.getvalue()[-3000:] or "said nothing" * 500)
    assert code in (0, 130), (code, text)
    return out.getvalue()


def stream(data: Path | str, **settings: Any) -> Any:
    from guywire.lab.streams import StreamConfig, load

    loaded = load(StreamConfig(data=str(data), **settings))
    loaded.describe()
    if loaded.kind == "image":
        loaded.montage(0)
    return loaded


# --- settings ---------------------------------------------------------------------------------

_CONFIG: dict[str, Any] = {
    "model": "mlp",
    "methods": ["finetune", "ewc", "l2+replay"],
    "epochs": 1,
    "batch_size": 32,
    "lr": 0.01,
    "optimizer": "adam",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "loss": "masked",
    "threads": 1,
    "seeds": [0, 1],
    "seed": 3,
    "workers": 0,
    "stream": {
        "data": "digits", "scenario": "class", "tasks": 5, "image_size": 8, "valid_fraction": 0.1,
        "test_fraction": 0.2, "max_per_class": 20, "min_per_class": 5, "class_order": "seed",
        "classes": 10, "seed": 1,
    },
    "evaluation": {"enabled": True, "every": "auto", "dense": 30, "share": 0.1, "subset": 10},
    "checkpoint": {"steps": 10, "seconds": 30.0},
    "options": {
        "ewc": {"strength": 100.0, "samples": 20},
        "replay": {"capacity": 20},
        "l2": {"strength": 0.1},
    },
}  # fmt: skip
_TOML = (
    b"[" * 3000, b"x = " + b"[" * 3000, b"x = " + b"9" * 5000, b"x = 0x" + b"f" * 9000,
    b"a." * 20000 + b"a = 1", b"[" + b"a." * 20000 + b"a]", b"a = 1\na = 2", b"[stream]\n[stream]",
    b"\xef\xbb\xbfepochs = 1", "epochs = 1".encode("utf-16"), b"epochs = 1\r\n", b"\r", b"\x00",
    b"x = 1e999", b"x = -nan", b"x = 1979-05-27T07:32:00Z", b"x = 2024-02-30", b"x = 25:00:00",
    b"seeds = 1_0_0", b"seeds = 1000000000000", b"seed = 123456789012345678901234567890",
    b"[options]\newc.method = 'ewc+ewc'", b'methods = ["../x"]', b'methods = ["a/../../b"]',
    b'methods = "."', b"epochs = 1e308", b"epochs = inf", b"options = 3", b"options.ewc = 3",
    b"x = {" + b"a = {" * 1200, b"x = '''" + b"'" * 9, b'x = "\\uD800"', b'x = "\\U00110000"',
    b'[stream]\ndata = "~nobody/x"', b'[stream]\ndata = "a\\u0000b"', b'out = "a\\u0000b"',
    b'out = "../../escape"', b'out = "/proc/nothing"', b'model = "hf:"', b'model = "hf:../x"',
    b'[stream]\ndata = "hf:"', b'[stream]\ndata = ""', b"[stream]\nimage_size = 4096",
    b"batch_size = 100000000000000000000000", b"threads = 1000000000", b"workers = 1000000000",
    b"epochs = 100000000000000000000000000", b"[evaluation]\nevery = 1" + b"0" * 50,
)  # fmt: skip


def config(rng: Rng, place: Place) -> Read:
    """A settings file for ``compare``, which stops before it trains."""
    import tomli_w

    _load_late()
    file = place.source / "study.toml"
    tree = json.loads(json.dumps(_CONFIG))
    chance = rng.random()
    if chance < 0.08:
        text = pick(rng, _TOML)
    elif chance < 0.6:
        tree = twisted(rng, tree, ["digits", "ewc", "class", "hf:x", "sgd", "/", str(place.source)])
        try:
            text = tomli_w.dumps(_without_none(tree)).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, AttributeError):
            text = damaged(rng, tomli_w.dumps(_CONFIG).encode())
    else:
        text = damaged(rng, tomli_w.dumps(tree).encode())
        if chance > 0.9:
            lines = text.split(b"\n")
            lines.insert(int(rng.integers(len(lines))), pick(rng, lines))
            text = b"\n".join(lines)
    file.write_bytes(text)
    # An `out` in the file is where its user wants the run to be: the flag is stronger.
    return lambda: _stopped("compare", str(file), "--out", str(place.out / "run"))


def flags(rng: Rng, place: Place) -> Read:
    """Flags of ``compare`` and their values."""
    _load_late()
    names = (
        "--data", "--scenario", "--tasks", "--image-size", "--max-per-class", "--model", "--methods",
        "--epochs", "--batch-size", "--lr", "--optimizer", "--loss", "--seed", "--seeds", "--workers",
        "--threads", "--image-column",
    )  # fmt: skip
    values = [str(v) for v in (*VALUES, *NAMES) if "\x00" not in str(v)]
    words = ["compare", "--out", str(place.out / "run")]
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.4:
            option = pick(
                rng, ("ewc.strength", "ewc", "a.b", "a.b.c", "replay.capacity", "", ".", "x.")
            )
            words += ["--option", option + pick(rng, ("=", "", "==")) + pick(rng, values)]
        else:
            words += [pick(rng, names), pick(rng, values)]
    return lambda: _stopped(*words)


@functools.cache
def _load_late() -> None:
    """The first optimiser makes torch import what writes to torch's own cache folder."""
    import torch

    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        kind([torch.zeros(1, requires_grad=True)], lr=0.1)


def _stopped(*words: str) -> str:
    def runner(*_: Any, **__: Any) -> Any:
        def run(specs: Any, folder: Path) -> Any:
            assert all(spec.id for spec in specs)
            raise KeyboardInterrupt

        return run

    with mock.patch("guywire.lab.training.compare.runner", runner):
        return command(*words)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value if v is not None] if isinstance(value, list) else value


# --- IDX --------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    codes = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    head = bytes([0, 0, codes[array.dtype.str[1:]], array.ndim])
    return (
        head
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def idx(rng: Rng, place: Place) -> Read:
    """A folder of IDX files of which one is damaged."""
    labels = np.arange(40, dtype=np.uint8) % 4
    images = rng.integers(0, 256, (40, 5, 5), dtype=np.uint8)
    parts = {
        "train-images-idx3-ubyte": idx_bytes(images),
        "train-labels-idx1-ubyte": idx_bytes(labels),
    }
    name = pick(rng, list(parts))
    data = parts[name]
    match int(rng.integers(8)):
        case 0:
            shape = [int(v) for v in rng.integers(0, 1 << 32, int(rng.integers(1, 10)))]
            data = bytes([0, 0, int(pick(rng, (8, 9, 11, 14, 0, 255))), len(shape)])
            data += struct.pack(f">{len(shape)}I", *shape) + bytes(100)
        case 1:
            kind = pick(rng, ("u1", "i1", "i2", "i4", "f4", "f8"))
            shape = pick(
                rng, ((40,), (40, 5, 5), (40, 3, 5, 5), (0, 5, 5), (40, 0, 5), (40, 5), (1, 5, 5))
            )
            data = idx_bytes(np.zeros(shape, kind))
        case 2:
            data = idx_bytes(np.full(40, pick(rng, (np.nan, np.inf, -1.5, 1e300))))
        case 3:  # a bomb: what it declares is what deflate could hold
            body = bytes(1 << 20)
            data = bytes([0, 0, 8, 3]) + struct.pack(
                ">3I", 1 << int(rng.integers(6, 24)), 1 << 10, 1 << 10
            )
            parts[name] = gzip.compress(data + body * int(rng.integers(1, 64)), 1)
            name = ""
        case _:
            data = damaged(rng, data)
    if name:
        zipped = rng.random() < 0.5
        parts[name] = gzip.compress(data, 1) if zipped else data
        if zipped and rng.random() < 0.5:
            parts[name] = damaged(rng, parts[name])
    for role, content in parts.items():
        (place.source / role).write_bytes(content)
    return lambda: stream(
        place.source, **pick(rng, ({}, {"image_size": 7}, {"tasks": 2}, {"classes": 2}))
    )


# --- images -----------------------------------------------------------------------------------

_KINDS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


@functools.cache
def picture(kind: str, mode: str = "RGB") -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(5).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that declares any size."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def strange_image(rng: Rng) -> bytes:
    kind = pick(rng, _KINDS)
    mode = pick(rng, ("RGB", "L") if kind in ("WEBP", "JPEG", "PPM") else ("RGB", "L", "P", "1"))
    match int(rng.integers(8)):
        case 0:
            sides = (0, 1, 50_000, 1 << 16, 1 << 30, (1 << 31) - 1, 1 << 31, 12_000)
            return png(pick(rng, sides), pick(rng, sides), bytes(1 << int(rng.integers(0, 18))))
        case 1:
            return pick(
                rng,
                (
                    b"",
                    b"x",
                    b"GIF89a",
                    b"\x89PNG\r\n\x1a\n",
                    b"\xff\xd8\xff",
                    b"BM",
                    b"II*\0",
                    b"P6 99999999 9 255 ",
                    b"RIFF\0\0\0\0WEBP",
                ),
            )
        case 2:
            return bytes(rng.integers(0, 256, int(rng.integers(1, 300)), dtype=np.uint8))
        case _:
            return damaged(rng, picture(kind, mode))


def images(rng: Rng, place: Place) -> Read:
    """Bytes that should be an image."""
    from guywire.lab.streams.images import decode

    data, size = strange_image(rng), pick(rng, (None, 4, 32))
    return lambda: decode(data, "it", size)


def folder(rng: Rng, place: Place) -> Read:
    """A folder of images by class, with strange files, names and links in it."""
    _load_late()
    root, sound = place.source / "pictures", picture("PNG")
    for k in range(3):
        (root / f"class{k}").mkdir(parents=True)
        for i in range(6):
            (root / f"class{k}" / f"{i}.png").write_bytes(sound)
    (place.source / "secret.png").write_bytes(sound)
    home = root / f"class{int(rng.integers(3))}"
    with contextlib.suppress(OSError, ValueError):
        for _ in range(int(rng.integers(1, 4))):
            file = home / f"{int(rng.integers(8))}.png"
            match int(rng.integers(12)):
                case 0:
                    file.write_bytes(strange_image(rng))
                case 1:
                    file.write_bytes(b"")
                case 2:
                    link = home / "link.png"
                    link.symlink_to(
                        pick(
                            rng,
                            (
                                "link.png",
                                "../../secret.png",
                                "/dev/zero",
                                "/dev/stdin",
                                "0.png",
                                "nowhere",
                                "other.png",
                                "..",
                                str(place.base / "a"),
                            ),
                        )
                    )
                    (home / "other.png").symlink_to("link.png")
                case 3:
                    os.mkfifo(home / "pipe.png")
                case 4:
                    (home / "folder.png").mkdir()
                    (home / "folder.png" / "x.png").write_bytes(sound)
                case 5:
                    (root / pick(rng, ("loop", "train", "test", "class9"))).symlink_to(
                        pick(rng, (".", "..", "class0", "loop"))
                    )
                case 6:
                    (home / (pick(rng, NAMES) + ".png")).write_bytes(sound)
                case 7:
                    name = pick(
                        rng,
                        (
                            b"\xff\xfe",
                            b"a\nb",
                            b"-",
                            b"~",
                            b"\xed\xa0\x80",
                            b"<b>&",
                            b"%s",
                            b" ",
                            b"[red]",
                            b"...",
                        ),
                    )
                    os.rename(home, os.path.join(os.fsencode(root), name))
                    home = Path(os.fsdecode(os.path.join(os.fsencode(root), name)))
                case 8:
                    deep = home
                    for _ in range(200):
                        deep = deep / "d"
                    deep.mkdir(parents=True)
                    (deep / "x.png").write_bytes(sound)
                case 9:
                    (root / pick(rng, ("train", "test", "VALID", "Train"))).mkdir()
                case 10:
                    file.write_bytes(picture(pick(rng, _KINDS)))
                case _:
                    file.write_bytes(picture("PNG", pick(rng, ("L", "1", "P"))))
    settings = pick(
        rng, ({}, {"image_size": 4}, {"scenario": "domain"}, {"tasks": 1}, {"min_per_class": 2})
    )
    if rng.random() < 0.3:  # all the way to the files that describe a run, and to its report

        def whole() -> None:
            _stopped(
                "compare",
                "--data",
                str(root),
                "--methods",
                "finetune",
                "--seeds",
                "1",
                "--out",
                str(place.out / "run"),
            )
            command("runs", str(place.out))
            command("report", str(place.out / "run"))

        return whole
    return lambda: stream(root, **settings)


# --- parquet ----------------------------------------------------------------------------------


def parquet(rng: Rng, place: Place) -> Read:
    """A parquet file: damaged, of another schema, or with strange cells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = place.source / "table.parquet"
    rows = 24
    cells: dict[str, Any] = {
        "image": [picture("PNG")] * rows,
        "label": [i % 3 for i in range(rows)],
        "domain": ["ab"[i // 3 % 2] for i in range(rows)],
        "text": ["some words"] * rows,
        "who": [i // 2 for i in range(rows)],
    }
    settings: dict[str, Any] = pick(
        rng,
        (
            {},
            {"image_size": 6},
            {"scenario": "domain"},
            {"subject_column": "who"},
            {"text_column": "text"},
            {"text_column": "text+domain"},
        ),
    )
    chance = rng.random()
    compression = pick(rng, ("none", "snappy", "zstd", "gzip"))
    if chance < 0.45:
        buffer = io.BytesIO()
        pq.write_table(
            pa.table(cells), buffer, compression=compression, use_dictionary=rng.random() < 0.5
        )
        data = buffer.getvalue()
        if rng.random() < 0.5:  # in the footer, where the schema stands
            at = len(data) - int.from_bytes(data[-8:-4], "little") - 8
            file.write_bytes(data[:at] + damaged(rng, data[at:]))
        else:
            file.write_bytes(damaged(rng, data))
    else:
        column = pick(rng, list(cells))
        strange: list[Any] = [
            [None] * rows, [float("nan")] * rows, [1 << 62] * rows, [b"\xff"] * rows, [""] * rows,
            [[1, 2]] * rows, [[[0] * 3] * 3] * rows, [{"bytes": picture("PNG")}] * rows,
            [{"bytes": None, "path": "../../secret.png"}] * rows, [{"path": "/etc/hostname"}] * rows,
            [1.5] * rows, [True] * rows, [[0.5] * 9] * rows, [[[256] * 3] * 3] * rows, [[]] * rows,
            [[[float("inf")] * 3] * 3] * rows, ["x" * 100_000] * rows, ["../../escape"] * rows,
            ["a\x00b", *["c"] * (rows - 1)], [{}] * rows, [{"bytes": b""}] * rows,
        ]  # fmt: skip
        values = (
            pick(rng, strange) if rng.random() < 0.6 else [strange_image(rng) for _ in range(rows)]
        )
        if rng.random() < 0.3:
            values = [*cells[column][:-1], values[-1]]
        cells[column] = values
        if rng.random() < 0.15:
            del cells[pick(rng, list(cells))]
        if rng.random() < 0.1:
            cells = {k: v[: int(rng.integers(0, 3))] for k, v in cells.items()}
        if rng.random() < 0.1:
            cells[pick(rng, NAMES[6:])] = cells.pop(pick(rng, list(cells)))
        try:
            table = pa.table(cells)
            if rng.random() < 0.15:
                name = pick(rng, list(cells))
                table = table.set_column(
                    table.column_names.index(name), name, table[name].dictionary_encode()
                )
            if rng.random() < 0.1 and table.num_columns:  # the same name twice
                table = table.append_column(table.column_names[0], table.column(0))
            pq.write_table(table, file, compression=compression)
        except (pa.ArrowException, UnicodeError, TypeError, NotImplementedError) as error:
            raise Skipped from error
    return lambda: stream(file, **settings)


# --- texts ------------------------------------------------------------------------------------


def texts(rng: Rng, place: Place) -> Read:
    """Pairs, verses, texts to evaluate on and to calibrate with."""
    from guywire.lab.models.evals import read_texts
    from guywire.lab.studies.fisher_sequential_transfer import text_pairs
    from guywire.methods.merging import calibration

    which = pick(rng, ("jsonl", "csv", "tsv", "txt", "verses"))
    rows = [
        {"findings": f"a{i}, b", "impression": 'c "d"', "text": "x y", "label": str(i % 2)}
        for i in range(5)
    ]
    if which == "jsonl":
        lines = [
            as_json(rng, row if rng.random() < 0.6 else twisted(rng, row)).replace(b"\n", b" ")
            for row in rows
        ]
        data = b"\n".join(lines)
    elif which in ("csv", "tsv"):
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if which == "tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        data = buffer.getvalue().encode()
        if rng.random() < 0.2:
            data += pick(
                rng,
                (
                    b'"' * 999,
                    b'"' + b"x" * 200_000,
                    b"\x00,\x00",
                    b"," * 5000,
                    b"\r\r\r",
                    b'a,"b\nc',
                ),
            )
    else:
        data = (
            b"Gen1:1 In the beginning God created.\nGen1:2 And the earth: was, without form\n" * 3
        )
    if rng.random() < 0.6:
        data = damaged(rng, data)
    zipped = rng.random() < 0.4
    if zipped:
        if rng.random() < 0.03:
            filler = pick(rng, (b"x", b"x\n", b"\n", b'{"text": "x"}\n'))
            data = data + filler * ((256 << 20) // len(filler))
        data = gzip.compress(data, 1)
        if rng.random() < 0.6:
            data = damaged(rng, data)
    ending = "txt" if which == "verses" else which
    file = place.source / f"texts.{ending}{'.gz' if zipped else ''}"
    file.write_bytes(data)
    group = pick(rng, (None, "label", "nothing"))
    readers: list[Read] = [lambda: read_texts(file, "text", pick(rng, (None, "label")))]
    if which in ("jsonl", "csv"):
        readers += [lambda: text_pairs.read_pairs(file, group=group)] * 2
    if which == "verses":
        readers += [lambda: text_pairs.half_verses(text_pairs.read_verses(file))] * 3
    if which in ("jsonl", "txt") and not zipped:
        readers += [lambda: calibration(file)] * 2
    return pick(rng, readers)


# --- a run's folder ---------------------------------------------------------------------------


@functools.cache
def _run() -> dict[str, bytes]:
    """The files of a small run that is over."""
    import tempfile

    from guywire.lab import training

    with tempfile.TemporaryDirectory() as home:
        training.compare(
            training.CompareConfig(
                stream={"max_per_class": 6, "classes": 4, "tasks": 2},  # pyright: ignore[reportArgumentType]
                methods=("finetune",), seeds=1, epochs=1, workers=0, out=f"{home}/run",
            )
        )  # fmt: skip
        root = Path(home) / "run"
        return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def runs(rng: Rng, place: Place) -> Read:
    """A run's folder in which one file is damaged: list it, report it, resume it."""
    _load_late()
    files = dict(_run())
    name = pick(rng, [n for n in files if not n.endswith((".lock", ".png"))])
    data = files[name]
    if name.endswith(".json") and rng.random() < 0.7:
        data = as_json(rng, twisted(rng, json.loads(data)))
    elif rng.random() < 0.05:
        data = pick(rng, _TOML)
    else:
        data = damaged(rng, data)
    root = place.out / "run"
    for other, content in files.items():
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes(data if other == name else content)
    if rng.random() < 0.1:
        (root / name).unlink()
        (root / name).symlink_to(pick(rng, ("../../in", "/nowhere", root / name)))
    match int(rng.integers(3)):
        case 0:
            return lambda: command("runs", str(place.out), "--json")
        case 1:
            return lambda: command("report", str(root))
        case _:
            return lambda: command("compare", "--resume", "--out", str(root))


FORMATS: dict[str, Make] = {
    "config": config, "flags": flags, "idx": idx, "images": images, "folder": folder,
    "parquet": parquet, "texts": texts, "runs": runs,
}  # fmt: skip
