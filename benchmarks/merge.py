"""`guywire merge` on a 270M-parameter bf16 checkpoint beside reading and writing the same bytes.

    python benchmarks/merge.py [--repeats 5] [--folder DIR] [--methods dare,ties] [--no-mergekit] [--json]

Base and two fine-tuned copies, 542 MB each, are made in a temporary folder. Every timed run is a fresh
process. "read and write" reads the three files and writes one of the base's size, flushed to the disk
as ours is. Runs are interleaved and medians compared; the spread is the smallest and largest. A ratio
divides a repetition's seconds by the median of reading and writing, not by its neighbour's: flushing
to a disk is itself noisy.

Wall time of ours is that of the merge inside the process, and of the whole command beside it: the
command also starts Python and imports torch, which does not grow with the checkpoint. Private memory
is the highest anonymous resident memory, sampled from /proc every 10 ms; torch's own 150 MB count.

mergekit 0.1.5 gets an environment of its own, made here by pip; if that fails the table says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 3.0
MEMORY_TIMES, MEMORY_MB = 4, 500
CASES = (
    ("dare", 0.9),
    ("dare", 0.99),
    ("dare-ties", 0.9),
    ("darex-q", 0.99),
    ("magnitude", 0.9),
    ("ties", 0.9),
)
PEERS = (("dare_linear", 0.9), ("dare_ties", 0.9))


class Size(NamedTuple):
    """Shapes of a small language model with a tied embedding."""

    words: int
    width: int
    layers: int
    inner: int


FULL = Size(160_000, 640, 24, 2560)
"""271M parameters, a large embedding among them."""

PLAIN = """
import os, sys, time
start, cpu = time.perf_counter(), time.process_time()
buffer = bytearray(4 << 20)
out = os.open(sys.argv[4], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for name in sys.argv[1:4]:
    file = os.open(name, os.O_RDONLY)
    while got := os.readv(file, [buffer]):
        if name == sys.argv[1]:
            os.write(out, memoryview(buffer)[:got])
    os.close(file)
os.fsync(out)
os.close(out)
print(time.perf_counter() - start, time.process_time() - cpu)
"""

OURS = """
import sys, time
from guywire.methods.merging import merge_checkpoints
method, rate, base, a, b, out = sys.argv[1:]
start, cpu = time.perf_counter(), time.process_time()
merge_checkpoints(base, [a, b], out, method=method, rate=float(rate),
                  q=0.02 if method == "darex-q" else None)
print(time.perf_counter() - start, time.process_time() - cpu)
"""


def shapes(size: Size = FULL) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.words, size.width)}
    inside = {
        "self_attn.q_proj": (2 * size.width, size.width),
        "self_attn.k_proj": (size.width // 2, size.width),
        "self_attn.v_proj": (size.width // 2, size.width),
        "self_attn.o_proj": (size.width, 2 * size.width),
        "mlp.gate_proj": (size.inner, size.width),
        "mlp.up_proj": (size.inner, size.width),
        "mlp.down_proj": (size.width, size.inner),
        "input_layernorm": (size.width,),
        "post_attention_layernorm": (size.width,),
    }
    for layer in range(size.layers):
        found |= {f"model.layers.{layer}.{n}.weight": s for n, s in inside.items()}
    return found | {"model.norm.weight": (size.width,)}


def make(folder: Path, size: Size = FULL) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 2 * size.width // 64,
        "num_key_value_heads": size.width // 2 // 64,
        "head_dim": 64,
        "vocab_size": size.words,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    for model, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        tensors = {}
        for number, (key, shape) in enumerate(shapes(size).items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
            if model:
                g = torch.Generator().manual_seed(1000 * model + number)
                value += torch.randn(shape, generator=g) * 0.0005
            tensors[key] = value.bfloat16()
        save_file(tensors, str(folder / name / "model.safetensors"), metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))


def anonymous_mb(pid: int) -> float:
    """Private memory now; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else 0.0


class Run(NamedTuple):
    """Seconds inside the process, of its CPUs meanwhile, of all of it; its highest private memory."""

    inside: float
    cpu: float
    whole: float
    memory: float


def run(words: list[str], env: dict[str, str] | None = None) -> tuple[float, float, str]:
    """Wall time, highest private memory in MB, and what was printed."""
    start = time.perf_counter()
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    highest, over = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.01):
            highest = max(highest, anonymous_mb(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = child.communicate()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    if child.returncode:
        raise RuntimeError(" ".join(err.split())[-400:])
    return seconds, highest, out


def environment() -> dict[str, str]:
    """Without the thread limits of the tests: a merge may use both cores."""
    return {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}


def plain(folder: Path) -> Run:
    names = [str(folder / n / "model.safetensors") for n in ("base", "a", "b")]
    whole, memory, out = run([sys.executable, "-c", PLAIN, *names, str(folder / "copy")])
    (folder / "copy").unlink()
    inside, cpu = map(float, out.split())
    return Run(inside, cpu, whole, memory)


def ours(folder: Path, method: str, rate: float) -> Run:
    out = folder / "out"
    names = [str(folder / n) for n in ("base", "a", "b")]
    words = [sys.executable, "-c", OURS, method, str(rate), *names, str(out)]
    whole, memory, said = run(words, environment())
    shutil.rmtree(out)
    inside, cpu = map(float, said.split())
    return Run(inside, cpu, whole, memory)


def command(folder: Path) -> float:
    """Seconds of the command itself, as typed."""
    out = folder / "out"
    names = [str(folder / n) for n in ("base", "a", "b")]
    words = [sys.executable, "-m", "guywire.cli", "merge", *names, "--out", str(out)]
    seconds, _, _ = run(words, environment())
    shutil.rmtree(out)
    return seconds


def mergekit(folder: Path, found: Path | None) -> Path:
    """Make an environment with mergekit, and return its command."""
    home = folder / "mergekit-env" if found is None else found
    if not (home / "bin" / "mergekit-yaml").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        words = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        words += ["-c", str(ROOT / "constraints.txt"), "mergekit==0.1.5", "torch==2.13.0"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip: {' '.join(done.stderr.split())[-300:]}")
    return home / "bin" / "mergekit-yaml"


def peer(folder: Path, tool: Path, method: str, rate: float) -> tuple[float, float]:
    density = 1.0 - rate
    models = "\n".join(
        f"  - model: {folder / n}\n    parameters: {{weight: 0.5, density: {density}}}"
        for n in ("a", "b")
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"models:\n{models}\nmerge_method: {method}\nbase_model: {folder / 'base'}\ndtype: bfloat16\n"
    )
    words = [str(tool), str(recipe), str(folder / "peer"), "--no-copy-tokenizer"]
    seconds, memory, _ = run(words, environment())
    shutil.rmtree(folder / "peer")
    return seconds, memory


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(
    folder: Path, args: argparse.Namespace, tool: Path | None, note: str | None
) -> dict[str, Any]:
    cases = [c for c in CASES if not args.methods or c[0] in args.methods.split(",")]
    reading: list[Run] = []
    seconds: dict[tuple[str, float], list[Run]] = {c: [] for c in cases}
    typed: list[float] = []
    theirs: dict[tuple[str, float], list[tuple[float, float]]] = {c: [] for c in PEERS}
    plain(folder)  # fills the file cache
    for number in range(args.repeats):
        for case in cases:
            reading.append(plain(folder))
            seconds[case].append(ours(folder, *case))
        typed.append(command(folder))
        for case in PEERS if tool is not None and number < args.peer_repeats else ():
            try:
                theirs[case].append(peer(folder, tool, *case))
            except RuntimeError as error:
                tool, note = None, f"mergekit failed: {error}"
                break
    base = statistics.median(r.inside for r in reading)
    cpu = statistics.median(r.cpu for r in reading)
    largest = max(math.prod(s) for s in shapes().values()) * 2 / 2**20
    limit = MEMORY_TIMES * largest + MEMORY_MB
    rows = [
        {
            "method": method,
            "rate": rate,
            "seconds": spread([r.inside for r in runs]),
            "ratio": statistics.median(r.inside for r in runs) / base,
            "ratios": [r.inside / base for r in runs],
            "cpu_seconds": spread([r.cpu for r in runs]),
            "process_seconds": spread([r.whole for r in runs]),
            "process_ratio": statistics.median(r.whole for r in runs) / base,
            "private_mb": max(r.memory for r in runs),
            "private_mbs": [r.memory for r in runs],
        }
        for (method, rate), runs in seconds.items()
    ]
    peers = [
        {
            "method": method,
            "rate": rate,
            "seconds": spread([s for s, _ in runs]),
            "ratio": statistics.median(s for s, _ in runs) / base,
            "private_mb": max(m for _, m in runs),
            "runs": len(runs),
        }
        for (method, rate), runs in theirs.items()
        if runs
    ]
    met = all(row["ratio"] <= TIME_LIMIT and row["private_mb"] <= limit for row in rows)
    return {
        "read_and_write_seconds": spread([r.inside for r in reading]),
        "read_and_write_cpu_seconds": cpu,
        "rows": rows,
        "command_seconds": spread(typed),
        "command_ratio": statistics.median(typed) / base,
        "command_ratios": [seconds / base for seconds in typed],
        "mergekit": peers,
        "mergekit_note": note,
        "repeats": args.repeats,
        "time_limit": TIME_LIMIT,
        "private_mb_limit": limit,
        "load": os.getloadavg(),
        "met": met,
    }


def show(found: dict[str, Any]) -> None:
    def said(times: dict[str, float]) -> str:
        return f"{times['median']:6.2f} s [{times['low']:.2f}, {times['high']:.2f}]"

    print(
        f"read and write          {said(found['read_and_write_seconds'])}; "
        f"CPUs {found['read_and_write_cpu_seconds']:.2f} s; load {found['load'][0]:.1f}"
    )
    for row in found["rows"]:
        print(
            f"{row['method']:10s} {row['rate']:<12g} {said(row['seconds'])}  {row['ratio']:.2f}x; "
            f"CPUs {row['cpu_seconds']['median']:.2f} s; "
            f"process {row['process_seconds']['median']:.2f} s, {row['process_ratio']:.2f}x; "
            f"{row['private_mb']:.0f} MB"
        )
    print(
        f"the command, dare 0.9   {said(found['command_seconds'])}  {found['command_ratio']:.2f}x"
    )
    for row in found["mergekit"]:
        print(
            f"mergekit {row['method']:14s} {said(row['seconds'])}  {row['ratio']:.2f}x; "
            f"{row['private_mb']:.0f} MB; {row['runs']} runs"
        )
    if found["mergekit_note"]:
        print(found["mergekit_note"])
    limits = f"{found['time_limit']:g}x and {found['private_mb_limit']:.0f} MB"
    print(f"limits {limits}: {'met' if found['met'] else 'MISSED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put 3 GB for a while")
    parser.add_argument("--methods", help="some of ours, with commas")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--mergekit-env", type=Path, help="an environment to use or make")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        tool, note = None, "mergekit was not asked for"
        if not args.no_mergekit:
            try:
                tool, note = mergekit(folder, args.mergekit_env), None
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                note = f"mergekit's environment could not be made: {error}"
        make(folder)
        found = measure(folder, args, tool, note)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0 if found["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
