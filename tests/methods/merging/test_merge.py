from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from guywire.core.errors import CheckpointError, DataError, SelectionError, UsageError
from guywire.methods.merging import (
    apply_delta,
    calibration,
    drop_and_rescale,
    magnitude_mask,
    merge_checkpoints,
    q_star,
    wanda_mask,
)
from guywire.methods.merging import merge as merge_module
from guywire.methods.merging.masks import BLOCK, keep_mask

Tensors = dict[str, torch.Tensor]


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "made"}))
    return folder


def read(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(str(file)).items()}


SHAPES = {
    "model.embed_tokens.weight": (40, 8),
    "model.layers.0.up.weight": (24, 8),
    "model.layers.0.up.bias": (24,),
    "model.layers.1.up.weight": (24, 8),
    "model.norm.weight": (8,),
}


def family(
    folder: Path,
    count: int = 2,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> tuple[Path, list[Path]]:
    base = {
        n: torch.randn(s, generator=gen(i)).to(dtype) for i, (n, s) in enumerate(shapes.items())
    }
    paths = []
    for k in range(count):
        g = gen(100 + k)
        tuned = {
            n: (v.float() + 0.1 * torch.randn(v.shape, generator=g)).to(dtype)
            for n, v in base.items()
        }
        paths.append(write(folder / f"tuned{k}", tuned))
    return write(folder / "base", base), paths


def digests(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_model_is_what_the_function_on_tensors_gives(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base, tuned = family(tmp_path, 1, dtype)
    merge_checkpoints(base, tuned, tmp_path / "out", rate=0.6, seed=3)
    found, wanted = (
        read(tmp_path / "out"),
        drop_and_rescale(read(base), read(tuned[0]), 0.6, seed=3),
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == dtype
        # d * (1 / q) here, d / q there: a last bit.
        torch.testing.assert_close(
            found[name], value, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=1e-6
        )
        assert (found[name] != read(base)[name]).equal(value != read(base)[name])


def test_two_models_each_drop_their_own(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    merge_checkpoints(
        base, tuned, tmp_path / "out", rate=0.5, weights=[0.3, 0.9], scale=2.0, seed=1
    )
    before, after, found = read(base), [read(t) for t in tuned], read(tmp_path / "out")
    for name, b in before.items():
        wanted = b.double()
        for i, w in enumerate((0.3, 0.9)):
            kept = keep_mask(f"{name}#{i}" if i else name, b.numel(), 0.5, 1).view(b.shape)
            wanted = wanted + 2.0 * w * kept * (after[i][name].double() - b.double()) / 0.5
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "dare", "darex-q", "magnitude"])
def test_nothing_dropped_is_the_fine_tuned_model_bit_for_bit(tmp_path: Path, method: str) -> None:
    base, tuned = family(tmp_path, 1, torch.bfloat16)
    rate = None if method == "linear" else 0.0
    merge_checkpoints(base, tuned, tmp_path / "out", method=method, rate=rate)
    for name, value in read(tuned[0]).items():
        assert read(tmp_path / "out")[name].equal(value)


def test_no_change_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    base, _ = family(tmp_path)
    for method in ("dare", "dare-ties", "ties", "magnitude", "darex-q"):
        merge_checkpoints(base, [base, base], tmp_path / method, method=method, rate=0.7)
        for name, value in read(base).items():
            assert read(tmp_path / method)[name].equal(value)


def test_magnitude_and_ties_against_dense_formulas(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    merge_checkpoints(base, tuned, tmp_path / "m", method="magnitude", rate=0.75)
    merge_checkpoints(base, tuned, tmp_path / "t", method="ties", rate=0.75, weights=[1.0, 3.0])
    after = [read(t) for t in tuned]
    for name, b in read(base).items():
        d = [(t[name] - b) for t in after]
        trimmed = torch.stack([x * magnitude_mask(x, 0.75) for x in d])
        torch.testing.assert_close(read(tmp_path / "m")[name], b + trimmed.mean(0))
        w = torch.tensor([1.0, 3.0]).view(2, *[1] * b.dim())
        sign = torch.where((w * trimmed).sum(0) >= 0, 1.0, -1.0)
        agree = w * (trimmed * sign > 0)
        mean = (agree * trimmed).sum(0) / agree.sum(0).masked_fill(agree.sum(0) == 0, 1.0)
        torch.testing.assert_close(read(tmp_path / "t")[name], b + mean)


def test_darex_q_given_free_and_calibrated(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 1)
    b, t = read(base), read(tuned[0])
    name, bias = "model.layers.0.up.weight", "model.layers.0.up.bias"
    delta, shift = t[name] - b[name], t[bias] - b[bias]
    x = torch.rand(30, 8, generator=gen(9)) + 1.0
    save_file({"model.layers.0.up": x}, str(tmp_path / "x.safetensors"))
    runs: dict[str, tuple[dict[str, Any], float]] = {
        "given": ({"q": 0.6}, 0.6),
        "data-free": ({}, q_star(delta, torch.ones(8), 0.8, shift)),
        "calibrated": (
            {"inputs": calibration(tmp_path / "x.safetensors")},
            q_star(delta, x, 0.8, shift),
        ),
    }
    for how, (options, q) in runs.items():
        out = tmp_path / how
        done = merge_checkpoints(base, tuned, out, method="darex-q", rate=0.8, **options)
        assert done.recipe["q"]["chosen"] == how
        assert 0.2 < q <= 1.0
        for key in (name, bias):
            kept = keep_mask(key, b[key].numel(), 0.8).view(b[key].shape)
            wanted = b[key] + kept * (t[key] - b[key]) / q
            torch.testing.assert_close(read(out)[key], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_wanda_ranks_rows_by_inputs(tmp_path: Path, turned: bool) -> None:
    base, tuned = family(tmp_path, 1)
    if turned:
        (base / "config.json").write_text('{"model_type": "gpt2"}')
    name = "model.layers.0.up.weight"
    b, t = read(base)[name], read(tuned[0])[name]
    x = torch.randn(50, b.shape[0 if turned else 1], generator=gen(5))
    save_file({"model.layers.0.up": x}, str(tmp_path / "x.safetensors"))
    inputs = calibration(tmp_path / "x.safetensors")
    merge_checkpoints(base, tuned, tmp_path / "out", method="wanda", rate=0.75, inputs=inputs)
    delta = t - b
    if turned:
        kept = wanda_mask(delta.T, x.norm(dim=0), 0.75).T
    else:
        kept = wanda_mask(delta, x.norm(dim=0), 0.75)
    assert read(tmp_path / "out")[name].equal(torch.where(kept, t, b))
    other = "model.layers.1.up.weight"  # without inputs: by magnitude alone
    b, t = read(base)[other], read(tuned[0])[other]
    assert read(tmp_path / "out")[other].equal(torch.where(magnitude_mask(t - b, 0.75), t, b))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_compressed_delta_restores_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    shapes = {
        f"part{i}.weight": tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
        for i in range(data.draw(st.integers(1, 4)))
    } | {"body.weight": (7, 5)}
    dtype = data.draw(
        st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    )
    base, tuned = family(folder, data.draw(st.integers(1, 3)), dtype, shapes)
    how: dict[str, Any] = {
        "method": data.draw(st.sampled_from(("dare", "darex-q", "dare-ties"))),
        "rate": data.draw(st.sampled_from((0.0, 0.3, 0.9, 0.999))),
        "seed": data.draw(st.integers(0, 5)),
        "exclude": data.draw(st.sampled_from(((), ("part0*",)))),
    }
    merge_checkpoints(base, tuned, folder / "full", **how)
    merge_checkpoints(base, tuned, folder / "delta", delta_only=True, **how)
    apply_delta(folder / "delta", base, folder / "restored")
    assert digests(folder / "restored") == digests(folder / "full")


BIG = {"big.weight": (BLOCK // 512 * 3 + 5, 512), "small.bias": (77,)}


def test_a_big_delta_is_small_and_holds_no_index(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, torch.bfloat16, BIG)
    merge_checkpoints(base, tuned, tmp_path / "full", rate=0.99, seed=4)
    done = merge_checkpoints(base, tuned, tmp_path / "delta", rate=0.99, seed=4, delta_only=True)
    numel = sum(v.numel() for v in read(base).values())
    # Two models at 0.99: the union of their survivors is 1.99 %, two bytes each.
    assert abs(done.size - 0.0199 * 2 * numel) < 0.0005 * 2 * numel + 4000
    assert {v.dim() for v in read(tmp_path / "delta").values()} == {1}
    apply_delta(tmp_path / "delta" / "delta.safetensors", base, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "full")


def test_a_delta_knows_its_base_and_its_own_bytes(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 1)
    merge_checkpoints(base, tuned, tmp_path / "delta", rate=0.5, delta_only=True)
    with pytest.raises(CheckpointError, match="is not the base that this delta was made from"):
        apply_delta(tmp_path / "delta", tuned[0], tmp_path / "out")
    file = tmp_path / "delta" / "delta.safetensors"
    whole = file.read_bytes()
    for at in (len(whole) - 3, len(whole) // 3, 20):
        broken = bytearray(whole)
        broken[at] ^= 1
        file.write_bytes(bytes(broken))
        with pytest.raises((CheckpointError, DataError), match=r"delta\.safetensors"):
            apply_delta(tmp_path / "delta", base, tmp_path / "out")
    with pytest.raises(DataError, match="no compressed delta"):
        apply_delta(base, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_methods_that_rank_have_no_compressed_delta(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 1)
    with pytest.raises(UsageError, match="would need an index"):
        merge_checkpoints(base, tuned, tmp_path / "o", method="magnitude", delta_only=True)


def sharded(folder: Path, parts: list[Tensors]) -> Path:
    folder.mkdir()
    listed = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, str(folder / file), metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("method", ["dare", "dare-ties", "magnitude"])
def test_threads_shards_and_order_change_nothing(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = family(tmp_path, 2, torch.bfloat16, BIG | SHAPES)
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "_SMALL", 0)  # tensors one by one, each on all threads
        merge_checkpoints(base, tuned, tmp_path / "one", method=method, rate=0.9, threads=1)
    merge_checkpoints(base, tuned, tmp_path / "two", method=method, rate=0.9, threads=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    whole = read(base)
    names = sorted(whole, reverse=True)
    cut = sharded(tmp_path / "cut", [{n: whole[n] for n in names[i::3]} for i in range(3)])
    merge_checkpoints(cut, tuned, tmp_path / "three", method=method, rate=0.9)
    found = read(tmp_path / "three")
    for name, value in read(tmp_path / "one").items():
        assert found[name].equal(value)
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    old = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())


KILLED = """
import os, signal, sys
from guywire.methods.merging import merge_checkpoints
def progress(what, done, total):
    if what == "writing" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
merge_checkpoints(sys.argv[1], sys.argv[2:-1], sys.argv[-1], rate=0.9, threads=1, progress=progress)
"""


def test_a_killed_merge_goes_on(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 2, torch.bfloat16, BIG | SHAPES)
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(base), *map(str, tuned), str(out)]
    assert subprocess.run(words, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(UsageError, match="go on with --resume"):
        merge_checkpoints(base, tuned, out, rate=0.9)
    with pytest.raises(UsageError, match="was another one"):
        merge_checkpoints(base, tuned, out, rate=0.8, resume=True)
    # One finished stretch was torn (a power cut), the last line of the journal was cut.
    work = tmp_path / ".out.guywire-merge"
    lines = (work / "journal").read_text().splitlines()
    name, at, length, _ = json.loads(lines[1])
    with (work / name).open("r+b") as stream:
        stream.seek(at)
        stream.write(bytes(length // 2))
    (work / "journal").write_text("\n".join(lines) + '\n["model.saf')
    done = merge_checkpoints(base, tuned, out, rate=0.9, resume=True)
    whole = sum(v.numel() for v in read(base).values())
    assert whole // 3 - BLOCK <= done.reused < whole
    assert done.reused > 0
    merge_checkpoints(base, tuned, tmp_path / "fresh", rate=0.9)
    assert digests(out) == digests(tmp_path / "fresh")
    assert not work.exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 1)
    out = tmp_path / "out"
    merge_checkpoints(base, tuned, out, rate=0.5)
    first = digests(out)
    with pytest.raises(UsageError, match="or --force"):
        merge_checkpoints(base, tuned, out, rate=0.6)
    assert digests(out) == first
    merge_checkpoints(base, tuned, out, rate=0.6, force=True)
    assert digests(out) != first
    with pytest.raises(UsageError, match="would be overwritten"):
        merge_checkpoints(base, tuned, base, force=True)
    with pytest.raises(UsageError, match="would be overwritten"):
        merge_checkpoints(base, tuned, tmp_path, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="not made by a merge"):
        merge_checkpoints(base, tuned, tmp_path / "mine", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "mine", "out", "tuned0"]


def test_a_full_disk_is_said_and_leaves_nothing_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = family(tmp_path, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        merge_checkpoints(base, tuned, tmp_path / "out", rate=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "dares"}, "no method 'dares'"),
        ({"rate": 1.0}, "the rate is 1.0"),
        ({"rate": float("nan")}, "the rate is nan"),
        ({"method": "linear", "rate": 0.5}, "linear does not prune"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 models"),
        ({"weights": [float("inf")]}, "finite"),
        ({"method": "ties", "weights": [-1.0]}, "not be negative"),
        ({"method": "ties", "weights": [0.0]}, "nor all 0"),
        ({"scale": float("nan")}, "the scale is nan"),
        ({"q": 0.5}, "dare has no q"),
        ({"method": "darex-q", "rate": 0.5, "q": 0.4}, "q is 0.4"),
        ({"method": "darex-q", "rate": 0.5, "q": 1.1}, "q is 1.1"),
        ({"method": "wanda"}, "give --calibrate"),
        ({"inputs": lambda *_: []}, "needs no calibration"),
        ({"select": ["nothing*"]}, "nothing is left to prune"),
        ({"exclude": ["*"]}, "nothing is left to prune"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    base, tuned = family(tmp_path, 1)
    with pytest.raises(UsageError, match=says):
        merge_checkpoints(base, tuned, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned0"]
    assert issubclass(SelectionError, UsageError)


def test_selected_tensors_are_pruned_and_others_merged(tmp_path: Path) -> None:
    base, tuned = family(tmp_path, 1)
    done = merge_checkpoints(
        base, tuned, tmp_path / "out", rate=0.9, select=["*layers*"], exclude=["*.bias"]
    )
    assert done.tensors == {"pruned": 2, "merged": 3, "kept": 0, "unchanged": 0}
    b, t, o = read(base), read(tuned[0]), read(tmp_path / "out")
    for name in b:
        if "layers" in name and "bias" not in name:
            assert float((o[name] == b[name]).double().mean()) > 0.8
        else:
            assert o[name].equal(t[name])


def test_masks_counters_and_statistics_are_not_pruned(tmp_path: Path) -> None:
    def tensors(seed: int) -> Tensors:
        return {
            "h.0.attn.bias": torch.ones(1, 1, 80, 80, dtype=torch.uint8),
            "h.0.bn.num_batches_tracked": torch.tensor(5 + seed),
            "h.0.bn.running_var": torch.rand(50, generator=gen(seed)) + 1.0,
            "h.0.weight": torch.randn(50, 50, generator=gen(seed)),
        }

    base, tuned = write(tmp_path / "base", tensors(0)), write(tmp_path / "tuned", tensors(1))
    merge_checkpoints(base, [tuned], tmp_path / "out", rate=0.99)
    out, after = read(tmp_path / "out"), tensors(1)
    for name in ("h.0.attn.bias", "h.0.bn.num_batches_tracked", "h.0.bn.running_var"):
        assert out[name].equal(after[name])
        assert out[name].dtype == after[name].dtype
    assert float((out["h.0.weight"] == tensors(0)["h.0.weight"]).double().mean()) > 0.95


def test_codes_without_a_configuration_are_refused(tmp_path: Path) -> None:
    base, _ = family(tmp_path, 0)
    codes = read(base) | {"model.norm.weight": torch.zeros(8, dtype=torch.int8)}
    with pytest.raises(DataError, match=r"'model\.norm\.weight' as I8, which looks quantised"):
        merge_checkpoints(base, [write(tmp_path / "codes", codes)], tmp_path / "out")


def test_a_broken_adapter_configuration_is_refused(tmp_path: Path) -> None:
    base, _ = family(tmp_path, 0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.up.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(24, 2)}
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}

    def attempt(config: object, tensors: Tensors, says: str) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, str(adapter / "adapter_model.safetensors"))
        with pytest.raises((CheckpointError, DataError), match=says):
            merge_checkpoints(base, [adapter], tmp_path / "out")

    attempt([], factors, r"adapter_config\.json holds a list")
    attempt({**config, "lora_alpha": "high"}, factors, "no lora_alpha that is a number")
    attempt({**config, "alpha_pattern": [1]}, factors, "no lora_alpha that is a number")
    attempt(config, {name.format("A"): torch.ones(2, 8)}, "only one factor")
    attempt(config, factors | {name.format("B"): torch.ones(24, 3)}, "do not belong together")
    attempt(config, factors | {name.format("B"): torch.ones(20, 2)}, "do not match")
    attempt(config, factors | {"up.lora_C": torch.ones(1)}, "no part of a plain LoRA")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
        merge_checkpoints(base, [adapter], tmp_path / "out")
