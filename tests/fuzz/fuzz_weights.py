"""Malformed checkpoints: single files, shards, adapters, deltas, masks, states of regularizers."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_bytes import NAMES, Rng, as_json, damaged, pick, twisted
from fuzz_data import command
from fuzz_run import Make, Place, Read

_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64")


def packed(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def table(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """A sound header and its bytes, written independently of the readers."""
    rows: dict[str, Any] = {}
    body = b""
    for name, array in tensors.items():
        end = len(body) + array.nbytes
        rows[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), end]}
        body += array.tobytes()
    return rows, body


def weights(seed: int, head: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    named = {
        "encoder.layer.0.weight": rng.normal(size=(6, 5)), "encoder.layer.0.bias": rng.normal(size=6),
        "embed.weight": rng.normal(size=(7, 5)), "encoder.layer.1.weight": rng.normal(size=(5, 6)),
    }  # fmt: skip
    if head:
        named["classifier.weight"] = rng.normal(size=(2, 5))
    return {name: array.astype("<f4") for name, array in named.items()}


_LONG = ",".join(f'"t{i}":{{}}' for i in range(40_000))
_HEADERS = (
    b"{}", b"[]", b"null", b"", b"{", b'{"a":' * 50_000, b"[" * 200_000, b"9" * 6000, b'{"a": NaN}',
    b'{"a": {"dtype": "F32", "shape": [' + b"4611686018427387903," * 200_000 + b'1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [' + b"1," * 300_000 + b'1], "data_offsets": [0, 4]}}',
    ("{" + _LONG + ',"t39999":{}}').encode(), b'{"a": {}, "a": {}}', b"\xff\xfe{}", b"\xc3(",
    b'{"' + b"x" * 1_000_000 + b'": {}}', b'{"__metadata__": 3}', b'{"__metadata__": {"a": 1}}',
    b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
    b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [false, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387903], "data_offsets": [0, 0]}}',
)  # fmt: skip
_LENGTHS = (0, 1, 7, 8, 1 << 20, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def strange_weights(rng: Rng, tensors: dict[str, np.ndarray], metadata: Any = None) -> bytes:
    """A safetensors file with something wrong in its length, header or body."""
    rows, body = table(tensors)
    full = {"__metadata__": {"format": "pt"} if metadata is None else metadata, **rows}
    match int(rng.integers(10)):
        case 0:
            return packed(pick(rng, _HEADERS), body[: int(rng.integers(len(body)))])
        case 1:
            return packed(json.dumps(full).encode(), body, int(pick(rng, _LENGTHS)))
        case 2 | 3 | 4:
            return packed(as_json(rng, twisted(rng, full, [*_TYPES, "__metadata__"])), body)
        case 5:  # names only; the rest is sound
            name = pick(rng, list(rows))
            full = {(pick(rng, NAMES) if k == name else k): v for k, v in full.items()}
            return packed(json.dumps(full).encode(), body)
        case 6:  # another type that fits
            row = rows[pick(rng, list(rows))]
            row["dtype"], row["shape"] = (
                pick(rng, _TYPES),
                [row["data_offsets"][1] - row["data_offsets"][0]],
            )
            return packed(json.dumps(full).encode(), body)
        case 7:  # offsets swapped, overlapping, out of order
            one, two = rows[pick(rng, list(rows))], rows[pick(rng, list(rows))]
            one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
            return packed(json.dumps(full).encode(), body)
        case 8:
            strange = np.frombuffer(body, "<f4").copy()
            strange[int(rng.integers(len(strange)))] = pick(rng, (np.nan, np.inf, 3e38, -0.0))
            return packed(json.dumps(full).encode(), strange.tobytes())
        case _:
            return damaged(rng, packed(json.dumps(full).encode(), body))


def sound(tensors: dict[str, np.ndarray]) -> bytes:
    rows, body = table(tensors)
    return packed(json.dumps({"__metadata__": {"format": "pt"}, **rows}).encode(), body)


def _huge(file: Path, rng: Rng) -> None:
    """A sparse file as long as it claims: terabytes."""
    size = int(pick(rng, (1 << 40, 1 << 42, 3 << 30)))
    header = {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode() if rng.random() < 0.5 else b"{" + b" " * 100
    length = len(text) if rng.random() < 0.5 else size - 8
    file.write_bytes(packed(text, b"", length))
    _truncate(file, 8 + len(text) + size)


def _truncate(file: Path, size: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    os.truncate(file, size)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _model(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(sound(tensors))
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')


def _merge(place: Place, base: Path, *tuned: Path, rng: Rng) -> Read:
    how = pick(
        rng,
        (
            ("--rate", "0.5"),
            ("--method", "linear"),
            ("--method", "ties"),
            ("--method", "darex-q", "--rate", "0.9"),
            ("--method", "magnitude"),
            ("--delta-only",),
            ("--method", "dare-ties"),
        ),
    )
    words = [
        "merge",
        str(base),
        *map(str, tuned),
        *how,
        "--threads",
        "1",
        "--out",
        str(place.out / "made"),
    ]
    return lambda: command(*words, *(["--json"] if "ties" in how else []))


def header(rng: Rng, place: Place) -> Read:
    """A safetensors file with a strange header: as base, tuned model or bare checkpoint."""
    from guywire.lab.models.ends import _tensors
    from guywire.methods.merging.files import Checkpoint

    base, tuned = place.source / "base", place.source / "tuned"
    _model(base, weights(0))
    _model(tuned, weights(1))
    file = pick(rng, (base, tuned)) / "model.safetensors"
    if rng.random() < 0.03:
        _huge(file, rng)
    else:
        file.write_bytes(strange_weights(rng, weights(2)))
    if rng.random() < 0.06:
        file.unlink()
        file.symlink_to(pick(rng, ("model.safetensors", "/dev/zero", "..", "/nowhere")))

    def alone() -> None:
        with Checkpoint(file) as found:
            for name in found.tensors:
                found.read(name)

    return pick(rng, (alone, lambda: _tensors(file), *[_merge(place, base, tuned, rng=rng)] * 3))


def index(rng: Rng, place: Place) -> Read:
    """A sharded checkpoint with a strange index, shards that are links, companions that lie."""
    base, tuned = place.source / "base", place.source / "tuned"
    _model(base, weights(0))
    _model(tuned, weights(1))
    home = pick(rng, (base, tuned))
    named = weights(3)
    halves = [dict(list(named.items())[:2]), dict(list(named.items())[2:])]
    files = ["model-1.safetensors", "model-2.safetensors"]
    (home / "model.safetensors").unlink()
    for file, half in zip(files, halves, strict=True):
        (home / file).write_bytes(sound(half))
    outside = place.source / "outside.safetensors"
    outside.write_bytes(sound(halves[0]))
    tree: Any = {
        "metadata": {"total_size": 1},
        "weight_map": {n: f for f, h in zip(files, halves, strict=True) for n in h},
    }
    match int(rng.integers(6)):
        case 0 | 1:
            tree = twisted(
                rng,
                tree,
                [
                    "../outside.safetensors",
                    str(outside),
                    "model-1.safetensors",
                    "./model-1.safetensors",
                    "config.json",
                ],
            )
        case 2:
            (home / files[0]).unlink()
            (home / files[0]).symlink_to(
                pick(rng, (outside, files[0], files[1], "/dev/zero", "..", "../../.."))
            )
        case 3:
            (home / files[1]).write_bytes(strange_weights(rng, halves[1]))
        case 4:  # what lies beside the weights
            name = pick(
                rng,
                (
                    "modules.json",
                    "config.json",
                    "tokenizer.json",
                    "adapter_config.json",
                    "special_tokens_map.json",
                ),
            )
            modules = [
                {
                    "path": pick(
                        rng,
                        (
                            "..",
                            "../..",
                            ".",
                            "1_Pooling",
                            "/",
                            "\x00",
                            "../tuned",
                            3,
                            None,
                            "n" * 3000,
                        ),
                    )
                }
                for _ in range(2)
            ]
            (home / name).write_bytes(
                as_json(
                    rng,
                    pick(
                        rng,
                        (
                            modules,
                            {"a": modules},
                            twisted(rng, modules),
                            {"quantization_config": 1},
                            {"model_type": [1]},
                        ),
                    ),
                )
            )
            (home / "1_Pooling").mkdir()
            (home / "1_Pooling" / "config.json").symlink_to(
                pick(rng, ("config.json", "../../../../witness", "/dev/zero", "../config.json"))
            )
        case _:
            (home / "tokenizer.json").symlink_to(
                pick(rng, ("tokenizer.json", "/dev/zero", "..", "config.json"))
            )
    (home / "model.safetensors.index.json").write_bytes(as_json(rng, tree))
    if rng.random() < 0.05:
        _truncate(home / "config.json", 1 << 41)
    return _merge(place, base, tuned, rng=rng)


def adapters(rng: Rng, place: Place) -> Read:
    """A folder of a LoRA adapter with strange settings or factors."""
    base, tuned = place.source / "base", place.source / "tuned"
    _model(base, weights(0))
    tuned.mkdir()
    draw = np.random.default_rng(4)
    name = "base_model.model.encoder.layer.0."
    factors = {
        f"{name}lora_A.weight": draw.normal(size=(2, 5)).astype("<f4"),
        f"{name}lora_B.weight": draw.normal(size=(6, 2)).astype("<f4"),
    }
    config: Any = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["encoder.layer.0"],
        "alpha_pattern": {}, "rank_pattern": {}, "use_rslora": False, "fan_in_fan_out": False,
        "base_model_name_or_path": "base", "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    if rng.random() < 0.5:
        if rng.random() < 0.3:
            config["alpha_pattern"] = pick(
                rng,
                (
                    {"(": 1},
                    {"(a+)+$": 1},
                    {"(.*)*x": 2, "layer.0": "x"},
                    {"layer.0": 1e400},
                    {"layer.0": None},
                    {"x" * 9000: 1},
                    {"(" * 200 + ")" * 200: 1},
                    [1],
                    {"a{99999999}": 1},
                    {"(x+x+)+y": 3},
                ),
            )
        config = twisted(rng, config, ["LORA", "IA3", {"(": 1}, "pissa"])
        data = sound(factors)
    else:
        data = strange_weights(rng, factors)
    (tuned / "adapter_config.json").write_bytes(as_json(rng, config))
    (tuned / "adapter_model.safetensors").write_bytes(data)
    if rng.random() < 0.05:
        _truncate(tuned / "adapter_config.json", 1 << 41)
    return _merge(place, base, tuned, rng=rng)


@functools.cache
def _delta() -> dict[str, bytes]:
    from guywire.methods import merging

    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        _model(root / "base", weights(0))
        _model(root / "tuned", weights(1))
        merging.merge_checkpoints(
            root / "base", [root / "tuned"], root / "delta", rate=0.5, delta_only=True
        )
        files = (f for f in (root / "delta").rglob("*") if f.is_file())
        return {str(f.relative_to(root / "delta")): f.read_bytes() for f in files}


def deltas(rng: Rng, place: Place) -> Read:
    """A compressed delta: damaged, or forged with checksums that match."""
    base, delta = place.source / "base", place.source / "delta"
    _model(base, weights(0))
    delta.mkdir()
    for name, content in _delta().items():
        (delta / name).write_bytes(content)
    file = delta / "delta.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    rows, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.2:
        file.write_bytes(damaged(rng, data))
    else:
        metadata = rows["__metadata__"]
        about = json.loads(metadata["guywire_delta"])
        if rng.random() < 0.3:  # the names of the files to be made
            old = next(iter(about["files"]))
            new = pick(
                rng,
                (
                    *NAMES,
                    "../../witness.json",
                    str(place.base / "a" / "absolute"),
                    "../made2/x",
                    "journal",
                    "config.json",
                    "guywire-merge.json",
                ),
            )
            about["files"][new] = about["files"].pop(old)
        elif rng.random() < 0.9:
            about = twisted(rng, about, [{"x.safetensors": []}, "F32", "encoder.layer.0.weight"])
        text = as_json(rng, about).decode("utf-8", "replace")
        metadata["guywire_delta"] = text
        metadata["header_sha256"] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
        if rng.random() < 0.15:
            rows = twisted(rng, rows)
        file.write_bytes(packed(json.dumps(rows).encode(), body))
    if rng.random() < 0.1:
        (delta / pick(rng, ("config.json", "more.json"))).unlink(missing_ok=True)
        (delta / "more.json").symlink_to(
            pick(rng, ("more.json", "../../witness.json", "/dev/zero", ".."))
        )
    if rng.random() < 0.1:  # the target is no folder, or a link
        made = place.out / "made"
        if rng.random() < 0.5:
            made.symlink_to(pick(rng, ("made", "../in", "/nowhere", "elsewhere")))
        else:
            made.write_bytes(b"")
    return lambda: command(
        "merge",
        str(base),
        "--apply",
        str(delta),
        "--threads",
        "1",
        "--out",
        str(place.out / "made"),
    )


# --- files of guywire's own ------------------------------------------------------------------


def forged(data: bytes, change: Any, rng: Rng) -> bytes:
    """Change header or tree of a file of ours, and make its checksums match again."""
    length = int.from_bytes(data[:8], "little")
    rows, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = rows.pop("__metadata__")
    tree = json.loads(metadata["tree"])
    if rng.random() < 0.7:
        tree = change(
            rng,
            tree,
            [
                {"tensor": "model/weight"},
                {"float": "x"},
                {"tuple": 3},
                {"dict": [[1, 2, 3]]},
                {"dict": [[[1], 2]]},
                {"float": 10**400},
            ],
        )
        text = as_json(rng, tree).decode("utf-8", "replace")
    else:
        rows = change(rng, rows, _TYPES)
        text = metadata["tree"]
        if not isinstance(rows, dict):
            rows = {"a": rows}
    metadata["tree"] = text
    canonical = json.dumps(["guywire-1", rows, text], sort_keys=True, separators=(",", ":"))
    metadata["structure_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    if rng.random() < 0.1:
        metadata = change(rng, metadata)
    return packed(json.dumps({"__metadata__": metadata, **rows}).encode(), body)


def _model_and_wires() -> tuple[Any, Any, list[Any]]:
    import guywire as gw

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.cross_entropy
    methods = [
        gw.L2(), gw.L1(), gw.EWC(), gw.PredictionDistillation(), gw.FeatureDistillation(),
        gw.Replay(criterion=lambda o, b: loss(o, b[1]), capacity=4),
        gw.GEM(criterion=lambda o, b: loss(o, b[1])), gw.HalfFineTuning(categories={"*": "feed-forward"}),
    ]  # fmt: skip
    return model, optimizer, methods


@functools.cache
def _ours() -> dict[str, bytes]:
    import guywire as gw
    from guywire.core import checkpoint
    from guywire.methods.sparsity.mask_files import save_mask

    found = {}
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "file"
        checkpoint.save(
            file,
            {
                "model": {"weight": torch.ones(2, 3), "n": torch.arange(3)},
                "lr": [0.1, float("inf")],
                "t": (1, None),
                3: "x",
            },
        )
        found["plain"] = file.read_bytes()
        save_mask(
            file,
            {"a.weight": torch.ones(3, 5, dtype=torch.bool), "b": torch.zeros(9, dtype=torch.bool)},
        )
        found["mask"] = file.read_bytes()
        gw.SaRAAdaptation(
            {"0.weight": torch.ones(2)}, None, {"0.weight": torch.tensor([0, 3])}
        ).save(file)
        found["sara"] = file.read_bytes()
        batch = [
            (
                torch.randn(6, 3, generator=torch.Generator().manual_seed(0)),
                torch.tensor([0, 1] * 3),
            )
        ]
        for at in range(8):
            model, optimizer, methods = _model_and_wires()
            with gw.attach(model, optimizer, [methods[at]]) as wires:
                wires.consolidate(batch)
                checkpoint.save(file, wires.state_dict())
            found[f"state{at}"] = file.read_bytes()
    return found


def ours(rng: Rng, place: Place) -> Read:
    """A checkpoint of Guywire's own: tree, masks, SaRA's adaptation, a regularizer's state."""
    import guywire as gw
    from guywire.core import checkpoint
    from guywire.methods.sparsity.mask_files import load_mask

    kind = pick(rng, [*["plain", "mask", "sara"] * 3, *(f"state{i}" for i in range(8))])
    file, data = place.source / "file.safetensors", _ours()[kind]
    chance = rng.random()
    if chance < 0.25:
        file.write_bytes(damaged(rng, data))
    elif chance < 0.35:
        file.write_bytes(strange_weights(rng, weights(0)))
    elif chance < 0.38:
        _huge(file, rng)
    else:
        file.write_bytes(forged(data, twisted, rng))
    if chance > 0.97:
        file.unlink()
        file.symlink_to(pick(rng, ("file.safetensors", "/dev/zero", "..", "/nowhere")))

    def state() -> None:
        model, optimizer, methods = _model_and_wires()
        with gw.attach(model, optimizer, [methods[int(kind[5:])]]) as wires:
            wires.load_state_dict(checkpoint.load(file))

    def sara() -> None:
        gw.sara_adapt(torch.nn.Sequential(torch.nn.Linear(3, 2)), gw.SaRAAdaptation.load(file))

    readers = {
        "plain": lambda: checkpoint.load(file),
        "mask": lambda: load_mask(file),
        "sara": sara,
    }
    return readers.get(kind, state)


# --- probe -----------------------------------------------------------------------------------


@functools.cache
def _tiny() -> str:
    """A folder with a tiny causal model and its tokenizer; lives as long as the process."""
    import atexit

    import tokenizers
    import transformers

    home = tempfile.mkdtemp(prefix="guywire-fuzz-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "a", "b", "c"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", model_max_length=16
    ).save_pretrained(home)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=5, n_embd=8, n_layer=1, n_head=2, n_positions=16
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(home)
    return home


def probe(rng: Rng, place: Place) -> Read:
    """Two ends of a probe of which one is damaged, or the texts are."""
    one, two = place.source / "one", place.source / "two"
    for end in (one, two):
        shutil.copytree(_tiny(), end)
    texts = place.source / "texts.txt"
    texts.write_bytes(b"a b c\nc b a\n")
    file = pick(
        rng, (*sorted(two.iterdir()), *[two / "model.safetensors", two / "config.json"] * 2, texts)
    )
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.6:
        file.write_bytes(as_json(rng, twisted(rng, json.loads(data))))
    elif file.suffix == ".safetensors" and rng.random() < 0.6:
        file.write_bytes(strange_weights(rng, weights(0)))
    else:
        file.write_bytes(damaged(rng, data))
    ends = pick(rng, ((one, two), (two, one), (one, two / "model.safetensors")))
    return lambda: command(
        "probe",
        "connectivity",
        *map(str, ends),
        "--data",
        f"x={texts}",
        "--points",
        "3",
        "--json",
        "--out",
        str(place.out / "found.json"),
    )


FORMATS: dict[str, Make] = {
    "header": header, "index": index, "adapters": adapters, "deltas": deltas, "ours": ours,
    "probe": probe,
}  # fmt: skip
