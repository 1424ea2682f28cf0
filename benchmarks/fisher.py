"""Cost of the diagonal Fisher against one plain forward and backward pass over the same samples.

    python benchmarks/fisher.py [--case NAME] [--repeats 5] [--threads 1] [--json]

Runs are interleaved and the medians of times are compared, so that a busy machine harms all alike.
Peak memory is that of a fresh process: its highest resident size less what it had before the model
was built. Peers (nngeometry, BackPACK) are skipped with a note where they are missing or fail.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.curvature import diagonal_fisher

sys.path.insert(0, str(Path(__file__).resolve().parent / "sides"))
import models  # what the peers' processes build, too

warnings.filterwarnings("ignore")

# ratio of time allowed, ratio of memory allowed
TARGETS = {"mlp": 1.3, "resnet18": 1.6, "bert": 1.6, "gpt2": 1.6}
MEMORY = 1.2
Batches = list[Any]


def mlp() -> tuple[nn.Module, Batches]:
    """1.8M parameters, batch 50."""
    return models.mlp(), [(torch.randn(50, 784), torch.randint(10, (50,))) for _ in range(20)]


def resnet18() -> tuple[nn.Module, Batches]:
    """11M parameters, 32 x 32 pixels, batch 16."""
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(2)]
    return models.resnet18(), batches


def bert() -> tuple[nn.Module, Batches]:
    """A 22M BERT encoder (the size of MiniLM-L6) with a classifier, 128 tokens, batch 8."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=28_000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=10,
    )
    model = transformers.BertForSequenceClassification(config)
    batches = [
        {
            "input_ids": torch.randint(1, 28_000, (8, 128)),
            "attention_mask": torch.ones(8, 128, dtype=torch.long),
            "labels": torch.randint(10, (8,)),
        }
        for _ in range(4)
    ]
    return model, batches


def gpt2() -> tuple[nn.Module, Batches]:
    """A 21M GPT-2 with a tied head, 128 tokens, batch 8."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=4096, n_embd=512, n_layer=6, n_head=8, n_positions=128,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    batches = []
    for _ in range(3):
        ids = torch.randint(4096, (8, 128))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return transformers.GPT2LMHeadModel(config), batches


CASES: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "mlp": mlp,
    "resnet18": resnet18,
    "bert": bert,
    "gpt2": gpt2,
}


def plain(model: nn.Module, batches: Batches) -> None:
    """One forward and backward pass over the same samples."""
    model.eval()
    for batch in batches:
        model.zero_grad(set_to_none=True)
        if isinstance(batch, dict):
            model(**batch).loss.backward()
        else:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
    model.zero_grad(set_to_none=True)


def ours(model: nn.Module, batches: Batches) -> None:
    diagonal_fisher(model, batches, labels="true")


def nngeometry(model: nn.Module, batches: Batches) -> None:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    if isinstance(batches[0], dict):
        raise NotImplementedError("takes no dicts")
    data = torch.utils.data.TensorDataset(
        torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    )
    loader = torch.utils.data.DataLoader(data, batch_size=len(batches[0][1]))

    def logp(*d: Tensor) -> Tensor:
        return F.log_softmax(model(d[0]), 1).gather(1, d[1][:, None])

    model.eval()
    FIM(model, loader, PMatDiag, variant="regression", function=logp)


def backpack(model: nn.Module, batches: Batches) -> None:
    import copy

    from backpack import backpack as passing
    from backpack import extend
    from backpack.extensions import SumGradSquared

    if isinstance(batches[0], dict):
        raise NotImplementedError("takes no dicts")
    held = getattr(model, "_for_backpack", None)
    if held is None:
        held = extend(copy.deepcopy(model).eval(), use_converter=any(
            isinstance(m, models.Block) for m in model.modules()))  # fmt: skip
        object.__setattr__(model, "_for_backpack", held)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    totals: list[Tensor] | None = None
    for x, y in batches:
        held.zero_grad(set_to_none=True)
        with passing(SumGradSquared()):
            loss(held(x), y).backward()
        squares = [p.sum_grad_squared for p in held.parameters()]
        totals = (
            squares if totals is None else [a + b for a, b in zip(totals, squares, strict=True)]
        )


METHODS = {"plain": plain, "guywire": ours, "nngeometry": nngeometry, "backpack": backpack}


def build(case: str) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    return CASES[case]()


def measure(case: str, repeats: int, peers: bool = True) -> dict[str, Any]:
    model, batches = build(case)
    times: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    for name, run in METHODS.items():
        if not peers and name not in ("plain", "guywire"):
            continue
        try:
            run(model, batches[:1])
            times[name] = []
        except Exception as error:
            notes[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    for _ in range(repeats):
        for name in times:
            start = time.perf_counter()
            METHODS[name](model, batches)
            times[name].append(time.perf_counter() - start)
    base = times["plain"]
    ratios = {name: [a / b for a, b in zip(t, base, strict=True)] for name, t in times.items()}
    row: dict[str, Any] = {
        "case": case,
        "parameters": sum(p.numel() for p in model.parameters()),
        "target": TARGETS[case],
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "ratios": ratios,
        "ratio_of_best": {name: min(t) / min(base) for name, t in times.items()},
        "notes": notes,
    }
    # (What an allocator keeps differs from process to process by a tenth and more.)
    each = [{name: peak(case, name) for name in ("plain", "guywire")} for _ in range(repeats)]
    row["peak_mb"] = each
    memory = [p["guywire"] / p["plain"] for p in each if p["guywire"] and p["plain"]]
    if memory:
        row["memory_ratio"] = statistics.median(memory)
        row["memory_ratios"] = memory
    return row


def peak(case: str, method: str) -> float | None:
    """Peak memory in MB in a fresh process."""
    command = [sys.executable, __file__, "--peak", case, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def report_peak(case: str, method: str) -> None:
    build("mlp")
    tiny = nn.Linear(4, 4)
    METHODS[method](tiny, [(torch.randn(4, 4), torch.randint(4, (4,)))])  # imports and caches
    before = _status("VmRSS")
    model, batches = build(case)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the highest resident size so far
    METHODS[method](model, batches)
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        report_peak(*args.peak)
        return
    rows = [measure(case, args.repeats, not args.no_peers) for case in args.case or CASES]
    if args.json:
        print(json.dumps({"results": rows, "threads": args.threads}, indent=2))
        return
    for row in rows:
        ratios = ", ".join(f"{n} {r:.2f}" for n, r in row["ratio"].items() if n != "plain")
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "not measured"
        print(
            f"{row['case']} ({row['parameters'] / 1e6:.1f}M): plain {row['seconds']['plain']:.2f} s; "
            f"times that: {ratios} (target {row['target']}); best of each: "
            f"{row['ratio_of_best']['guywire']:.2f}; memory {memory} (target {MEMORY})"
        )
        for name, note in row["notes"].items():
            print(f"  {name} skipped: {note}")


if __name__ == "__main__":
    main()
