"""AlignGuard-LoRA on small language models: in the Hugging Face Trainer, and in a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch

import guywire as gw
from guywire.methods.adapters._lora import sites
from guywire.methods.adapters.alignguard_terms import fisher_norm, geodesic_overlap, split_update

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks
]

from guywire.integrations.transformers import GuywireCallback  # noqa: E402

VOCABULARY = 30


class Texts(torch.utils.data.Dataset):
    def __init__(self, n=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCABULARY, (n, 7), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i].clone()}


def batch(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}


def alignment():
    """Prompts of four tokens, of which only the three of the answer count."""
    rows = Texts(16, seed=5)
    whole = batch([rows[i] for i in range(16)])
    whole["labels"][:, :4] = -100
    return [{key: value[lo : lo + 8] for key, value in whole.items()} for lo in (0, 8)]


def llama(wrap=False):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=24,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"])
        dress = peft.get_peft_model if wrap else lambda m, c: peft.inject_adapter_in_model(c, m)
        return gw.add_branch(dress(model, lora))


def gpt2():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        lora = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        model = transformers.GPT2LMHeadModel(config)
        return gw.add_branch(peft.inject_adapter_in_model(lora, model))


class InOrder(transformers.Trainer):
    """Reads the data in order, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run(model, folder, callback, *, accumulation=1, resume=None, **options):
    settings = {
        "output_dir": str(folder), "num_train_epochs": 2, "learning_rate": 0.01,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "optim": "adamw_torch", "logging_strategy": "no", "seed": 0,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip
    trainer = InOrder(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=Texts(),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


def by_hand(model, regularizer):
    """The penalty from dense updates, with a graph, at strength 3."""
    layers, total = {}, 0.0
    for site in sites(model):
        layers.setdefault(site.name, []).append(site)
    for name, (one, two) in layers.items():
        task, aligned = one.update(), two.update()
        basis, values = regularizer.basis_[name], regularizer.values_[name]
        held = fisher_norm(aligned, basis, values) + fisher_norm(task, basis, values)
        free = task.square().sum() + split_update(aligned, basis)[1].square().sum()
        eta = 1 + 4 * torch.sigmoid((aligned + task).abs() - 0.01)
        total = total + 0.25 * held + 0.5 * free
        total = total + 0.05 * (eta * (aligned * task).abs()).mean()
        total = total + 0.05 * geodesic_overlap(aligned, task)
    return 3.0 * total


def plain_loop(model, extra):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
    )
    rows = Texts()
    for _ in range(2):
        for lo in range(0, 24, 8):
            optimizer.zero_grad()
            loss = model(**batch([rows[i] for i in range(lo, lo + 8)])).loss
            (loss + extra()).backward()
            optimizer.step()


def farthest(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("wrap", "accumulation"), [(False, 1), (False, 2), (True, 2)])
def test_the_trainer_is_a_plain_loop_with_the_penalty_in_its_loss(tmp_path, wrap, accumulation):
    held, wanted = llama(wrap), llama(wrap)
    free = copy.deepcopy(held)
    regularizer = gw.AlignGuardLoRA(3.0)
    regularizer.fit(held, alignment())
    callback = GuywireCallback(regularizer)
    run(held, tmp_path, callback, accumulation=accumulation)
    assert callback.wires.steps == 6
    callback.detach()
    plain_loop(wanted, lambda: by_hand(wanted, regularizer))
    plain_loop(free, lambda: 0.0)
    assert farthest(held, wanted) < 2e-4
    assert farthest(free, wanted) > 1e-2


@pytest.mark.parametrize("make", [llama, gpt2])
def test_in_a_plain_loop_it_holds_and_merges(make):
    results = []
    for strength in (0.0, 30.0):
        model = make()
        regularizer = gw.AlignGuardLoRA(strength)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        rows = Texts()
        with gw.attach(model, optimizer, regularizer) as wires:
            wires.consolidate(alignment())
            for _ in range(20):
                optimizer.zero_grad()
                model(**batch([rows[i] for i in range(24)])).loss.backward()
                optimizer.step()
            results.append(regularizer.terms())
    assert results[1]["aligned"] < 0.2 * results[0]["aligned"]
    ids = Texts(4, seed=9).ids
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        merged = gw.merge_lora_group(model)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=0, atol=1e-5)


def test_the_trainer_resumes_with_the_held_directions(tmp_path):
    whole = llama()
    regularizer = gw.AlignGuardLoRA(3.0)
    regularizer.fit(whole, alignment())
    run(whole, tmp_path / "a", GuywireCallback(regularizer), save_strategy="steps", save_steps=3)
    again = llama()
    fresh = gw.AlignGuardLoRA(
        3.0
    )  # has seen no alignment data: its state comes with the checkpoint
    folder = tmp_path / "a" / "checkpoint-3"
    callback = GuywireCallback(fresh, resume_from=folder)
    run(again, tmp_path / "a", callback, resume=str(folder))
    assert fresh.basis_.keys() == regularizer.basis_.keys()
    assert farthest(whole, again) == 0.0
