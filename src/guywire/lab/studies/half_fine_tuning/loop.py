"""The base model, and an arm's way through the stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.half_fine_tuning import texts
from guywire.lab.studies.half_fine_tuning.texts import BASE, STREAM, Corpus
from guywire.lab.studies.study import Work

__all__ = ["learn", "network", "pretrain", "reset"]

_START = "start.safetensors"
_LEVELS = {"HFT": "category", "HFT, layers": "layer", "HFT, model": "model"}


def pretrain(work: Work) -> list[dict[str, Any]]:
    """Train the base model on stories; leave its weights and the tokenizer.

    Args:
        work: of the study.

    Returns:
        Rows: loss in bits a byte, and accuracy, on the stories' test chapters.
    """
    s = work.settings
    tokenizer = texts.tokenizer_of(texts.chapters()[BASE]["train"], s["vocabulary"]).to_str()
    corpus = texts.read(tokenizer, s["length"])[BASE]
    model = network(s, work.generator("network"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["base_rate"], weight_decay=0.1)
    rows = _batches(corpus.train, s["batch"], work.generator("batches"))
    for step in range(s["base_steps"]):
        _set_rate(optimizer, s["base_rate"], step, s["base_steps"])
        _step(model, optimizer, None, next(rows))
    save(
        work.leaves(_START),
        {"weights": {k: v.detach() for k, v in model.state_dict().items()}, "tokenizer": tokenizer},
    )
    bits, accuracy = evaluate(model, corpus, corpus.test[: s["test_rows"]])
    return [work.row("base_bits", bits), work.row("base_accuracy", accuracy)]


def learn(
    work: Work, *, arm: str, rate: float, strength: float = 0.0, tune: bool = False
) -> list[dict[str, Any]]:
    """Take the base model through the stream, each domain with a fresh optimiser.

    Args:
        work: of the study.
        arm: ``FFT``, ``FFT, half the steps``, ``HFT``, ``HFT, layers``, ``HFT, model``, ``LoRA``,
            ``L2``.
        rate: learning rate.
        strength: of L2.
        tune: the first domain only, measured on validation chapters.

    Returns:
        Rows: what was forgotten of the base (bits a byte more), accuracies, backward transfer, and
        what a step cost; the first domain's way as rows with a step.
    """
    s = work.settings
    model, corpora = _begin(work.folder / _START, s)
    base = corpora[BASE]
    part = "valid" if tune else "test"
    start, _ = evaluate(model, base, getattr(base, part)[: s["test_rows"]])
    before = {d: evaluate(model, c, c.test[: s["test_rows"]])[0] for d, c in corpora.items()}
    regularizers = _regularizers(arm, strength, work.seed, model)
    if arm == "LoRA":
        _add_lora(model, work.generator("adapters"))
    steps = s["steps"] // 2 if arm == "FFT, half the steps" else s["steps"]
    out: list[dict[str, Any]] = []
    right, seconds, held = {}, 0.0, 0
    for number, domain in enumerate(STREAM[:1] if tune else STREAM):
        corpus = corpora[domain]
        free = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(free, lr=rate, weight_decay=0.0)
        rows = _batches(corpus.train, s["batch"], work.generator(f"batches of {domain}"))
        with gw.attach(model, optimizer, regularizers) as wires:
            for step in range(steps):
                if number == 0 and not tune and step % max(1, steps // s["looks"]) == 0:
                    out += _look(work, model, corpora, domain, step)
                _set_rate(optimizer, rate, step, steps)
                begun = time.process_time()
                _step(model, optimizer, wires, next(rows))
                seconds += time.process_time() - begun
            held = max(held, _bytes(model, optimizer))
            wires.consolidate()
        if number == 0 and not tune:
            out += _look(work, model, corpora, domain, steps)
        right[domain] = evaluate(model, corpus, getattr(corpus, part)[: s["test_rows"]])
    end, _ = evaluate(model, base, getattr(base, part)[: s["test_rows"]])
    if tune:
        bits = right[STREAM[0]][0]
        return [work.row("valid_bits", bits), work.row("valid_both", (bits + end) / 2)]
    last = {d: evaluate(model, corpora[d], corpora[d].test[: s["test_rows"]]) for d in STREAM}
    if arm == "FFT":
        save(
            work.leaves(f"tuned-{work.seed}.safetensors"),
            {"weights": {k: v.detach() for k, v in model.state_dict().items()}},
        )
    transfers = [last[d][1] - right[d][1] for d in STREAM]
    out += [
        work.row("forgotten", end - start),
        work.row("learnt_accuracy", sum(right[d][1] for d in STREAM) / len(STREAM)),
        work.row("learnt_bits", sum(right[d][0] for d in STREAM) / len(STREAM)),
        work.row("final_accuracy", sum(last[d][1] for d in STREAM) / len(STREAM)),
        work.row("backward_transfer", sum(transfers) / len(STREAM)),
        work.row("last_gain", before[STREAM[-1]] - last[STREAM[-1]][0]),
        work.row("seconds_a_step", seconds / (steps * len(STREAM))),
        work.row("held_mb", held / 2**20),
    ]
    return out


def reset(work: Work) -> list[dict[str, Any]]:
    """Half-Reset: set a half of what full fine-tuning ended with back to the base.

    Args:
        work: of the study.

    Returns:
        Rows as for :func:`learn`, those that apply.
    """
    s = work.settings
    model, corpora = _begin(work.folder / _START, s)
    base = {k: v.detach().clone() for k, v in model.state_dict().items()}
    tuned = load(work.folder / f"tuned-{work.seed}.safetensors")["weights"]  # pyright: ignore
    test = {d: c.test[: s["test_rows"]] for d, c in corpora.items()}
    start, last = (evaluate(model, corpora[d], test[d])[0] for d in (BASE, STREAM[-1]))
    model.load_state_dict(gw.half_reset(tuned, base, gw.half(model, work.seed)))
    end, now = (evaluate(model, corpora[d], test[d])[0] for d in (BASE, STREAM[-1]))
    return [work.row("forgotten", end - start), work.row("last_gain", last - now)]


def network(settings: dict[str, Any] | Any, generator: torch.Generator) -> nn.Module:
    """Return a small Llama with random weights.

    Args:
        settings: of the study.
        generator: draws them.

    Returns:
        The model.
    """
    transformers = need("transformers", extra="hf")
    config = transformers.LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["width"],
        intermediate_size=settings["width"] * 11 // 4,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings["length"] + 1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    with seeded(generator):
        return transformers.LlamaForCausalLM(config)


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, rows: Tensor) -> tuple[float, float]:
    """Return the loss in bits a byte and the next token's accuracy.

    Args:
        model: the model.
        corpus: what the rows are of.
        rows: ``[rows, length + 1]``.

    Returns:
        Both.
    """
    loss, right = 0.0, 0
    for part in rows.split(32):
        logits = model(input_ids=part[:, :-1]).logits.flatten(0, 1)
        labels = part[:, 1:].flatten()
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
    count = rows[:, 1:].numel()
    return loss / count / torch.log(torch.tensor(2.0)).item() / corpus.bytes_a_token, right / count


def _begin(path: Path, settings: Any) -> tuple[nn.Module, dict[str, Corpus]]:
    start = _loaded(str(path), path.stat().st_mtime_ns)
    model = network(settings, torch.Generator().manual_seed(0))
    model.load_state_dict(start["weights"])
    return model, texts.read(start["tokenizer"], settings["length"])


@lru_cache(maxsize=1)
def _loaded(path: str, changed: int) -> Any:
    return load(path)


def _regularizers(arm: str, strength: float, seed: int, model: nn.Module) -> list[gw.Regularizer]:
    if arm in _LEVELS:
        level: Any = _LEVELS[arm]
        return [gw.HalfFineTuning(level=level, seed=seed)]
    if arm == "L2":
        return [
            gw.L2(strength, anchor={n: p.detach().clone() for n, p in model.named_parameters()})
        ]
    return []


def _add_lora(model: nn.Module, generator: torch.Generator) -> None:
    peft = need("peft", extra="adapters")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    with seeded(generator):
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=8, lora_alpha=16, target_modules=names), model
        )


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        for part in torch.randperm(len(rows), generator=generator).split(size):
            if len(part) == size:
                yield rows[part]


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, wires: gw.Wires | None, rows: Tensor
) -> None:
    model.train()
    optimizer.zero_grad()
    logits = model(input_ids=rows[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Warm up over a thirtieth of the steps, then fall linearly to zero."""
    warm = max(1, steps // 30)
    for group in optimizer.param_groups:
        group["lr"] = rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def _look(
    work: Work, model: nn.Module, corpora: dict[str, Corpus], domain: str, step: int
) -> list[dict[str, Any]]:
    rows = work.settings["look_rows"]
    return [
        work.row(name, evaluate(model, corpora[d], corpora[d].test[:rows])[0], step=step)
        for name, d in (("way_base", BASE), ("way_domain", domain))
    ]


def _bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of gradients and of the optimiser's state."""
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(t.numel() * t.element_size() for t in (*state, *grads))
