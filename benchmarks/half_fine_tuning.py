"""What a step of half fine-tuning costs beside full fine-tuning: time, gradients, optimiser state.

Both train the same Llama-style model with AdamW, interleaved step by step in one process; times are
medians of the ratio within a round, each round with another half.

    python benchmarks/half_fine_tuning.py [--json] [--rounds 5] [--steps 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time

import torch
from torch import nn

import guywire as gw

LIMIT_TIME = 0.92
"""The matrix products alone fall to 5/6 inside the layers; the rest of a step does not."""


def llama() -> nn.Module:
    """Return a Llama-style model of 14.6M parameters, most of them in its layers."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
            num_attention_heads=6, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


class Side:
    """A model with its optimiser, trained in its own way."""

    def __init__(self, model: nn.Module, regularizers: list[gw.Regularizer]) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
        self.wires = gw.attach(model, self.optimizer, regularizers)

    def step(self, ids: torch.Tensor) -> float:
        """Train on a batch; return the seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def bytes(self) -> dict[str, int]:
        """Return what gradients and the optimiser's state hold."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        return {
            "gradients": sum(g.numel() * g.element_size() for g in grads),
            "state": sum(v.numel() * v.element_size() for v in state),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = llama()
    full = Side(copy.deepcopy(model), [])
    half = Side(model, [gw.HalfFineTuning()])
    generator = torch.Generator().manual_seed(0)
    ratios, held = [], []
    for number in range(args.rounds):
        times: dict[str, list[float]] = {"full": [], "half": []}
        for step in range(args.steps + 1):
            ids = torch.randint(512, (4, 128), generator=generator)
            for name, side in (("full", full), ("half", half)):
                seconds = side.step(ids)
                if step:  # the first one of a round makes the optimiser's state
                    times[name].append(seconds)
        ratios.append(statistics.median(times["half"]) / statistics.median(times["full"]))
        held.append({k: v / full.bytes()[k] for k, v in half.bytes().items()})
        if number + 1 < args.rounds:
            half.wires.consolidate()
    names = gw.half(model)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": args.threads,
        "updated_fraction": gw.half_fractions(model, names)["model"],
        "time_ratio": statistics.median(ratios),
        "time_ratios": ratios,
        "gradient_bytes_ratio": statistics.median(h["gradients"] for h in held),
        "state_bytes_ratio": statistics.median(h["state"] for h in held),
        "limit_time": LIMIT_TIME,
    }
    memory = max(result["gradient_bytes_ratio"], result["state_bytes_ratio"])
    result["met"] = result["time_ratio"] <= LIMIT_TIME and memory < 0.55
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['parameters'] / 1e6:.1f}M parameters; half against full fine-tuning:")
        print(f"  time of a step      {result['time_ratio']:.2f}")
        print(f"  bytes of gradients  {result['gradient_bytes_ratio']:.2f}")
        print(f"  optimiser's state   {result['state_bytes_ratio']:.2f}")
        print("met" if result["met"] else "MISSED")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
