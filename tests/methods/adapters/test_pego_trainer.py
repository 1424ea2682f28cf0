"""PEGO on a vision transformer in the Hugging Face Trainer, and on a CLIP tower in a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.methods.adapters._lora import sites

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks
]

from guywire.integrations.transformers import GuywireCallback  # noqa: E402

TARGETS = ["q_proj", "v_proj"]
SIZES = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


class Images(torch.utils.data.Dataset):
    def __init__(self, n=24):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(n, 3, 8, 8, generator=generator)
        self.labels = torch.arange(n) % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


class InOrder(transformers.Trainer):
    """Reads the data in order, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def vit(seed=0, wrap=False):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES
        )
        model = transformers.ViTForImageClassification(config)
    model = gw.lora_group(model, 2, 2, target_modules=TARGETS, wrap=wrap)
    for name, p in model.named_parameters():
        if "classifier" in name:
            p.requires_grad_(True)
    return model


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

    def loss(outputs, labels, num_items_in_batch=None):
        total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / (num_items_in_batch or len(labels))

    trainer = InOrder(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=Images(),
        callbacks=[callback],
        compute_loss_func=loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(model, strength):
    layers, total = {}, 0.0
    for site in sites(model):
        layers.setdefault(site.name, []).append(site)
    for found in layers.values():
        one, two = (s.update() for s in found)
        base = found[0].base
        terms = (base @ one.T, base @ two.T, one @ two.T)
        total = total + sum(t.abs().sum() for t in terms)
    return strength * total


def same(one, two, tolerance):
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("wrap", "accumulation"), [(False, 1), (False, 2), (True, 2)])
def test_the_trainer_is_a_plain_loop_with_the_penalty_in_its_loss(tmp_path, wrap, accumulation):
    held, wanted = vit(wrap=wrap), vit(wrap=wrap)
    start = copy.deepcopy(held)
    callback = GuywireCallback(gw.PEGO(1e-2))
    run(held, tmp_path, callback, accumulation=accumulation)
    assert callback.wires.steps == 6
    callback.detach()
    optimizer = torch.optim.AdamW(
        [p for p in wanted.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
    )
    data = Images()
    for i in 2 * list(torch.arange(24).split(8)):
        optimizer.zero_grad()
        logits = wanted(pixel_values=data.images[i]).logits
        loss = nn.functional.cross_entropy(logits, data.labels[i])
        (loss + by_hand(wanted, 1e-2)).backward()
        optimizer.step()
    same(held, wanted, 2e-5)
    moved = {n for n, p in held.named_parameters() if not torch.equal(p, dict(
        start.named_parameters())[n])}  # fmt: skip
    trainable = {n for n, p in held.named_parameters() if p.requires_grad}
    assert moved == trainable
    assert all("lora_" in n or "classifier" in n for n in trainable)


class Inside(nn.Module):
    """A plain module around the transformer.

    The Trainer of transformers 5 saves a bare ViT under the names of transformers 4 and does not
    find them again on resume, with or without adapters; a plain module's names stay.
    """

    def __init__(self, seed):
        super().__init__()
        self.inner = vit(seed)

    def forward(self, pixel_values, labels=None):
        return self.inner(pixel_values=pixel_values, labels=labels)


def test_the_trainer_resumes_bit_for_bit(tmp_path):
    whole = Inside(0)
    run(whole, tmp_path / "a", GuywireCallback(gw.PEGO(1e-2)), save_strategy="epoch")
    part = Inside(1)  # everything comes from the checkpoint
    folder = tmp_path / "a" / "checkpoint-3"
    assert (folder / "guywire.safetensors").is_file()
    run(part, tmp_path / "a", GuywireCallback(gw.PEGO(1e-2)), resume=str(folder))
    same(part, whole, 0.0)


def test_merged_a_vit_gives_the_same_logits_and_loads_as_a_plain_one(tmp_path):
    model = vit()
    run(model, tmp_path, GuywireCallback(gw.PEGO(1e-3)))
    x = Images().images
    with torch.no_grad():
        wanted = model.eval()(pixel_values=x).logits
        merged = gw.merge_lora_group(model)
        merged.save_pretrained(tmp_path / "merged")
        loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
        assert (merged(pixel_values=x).logits - wanted).abs().max() < 1e-5
        assert (loaded(pixel_values=x).logits - wanted).abs().max() < 1e-5


def test_a_clip_tower_in_a_plain_loop():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))
        head = nn.Linear(16, 3)
    tower = gw.lora_group(tower, 2, 2, target_modules=TARGETS)
    assert len(sites(tower)) == 2 * 2 * 2
    params = [p for p in (*tower.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=0.01)
    data, losses = Images(), []
    with gw.attach(tower, optimizer, gw.PEGO(1e-4)) as wires:
        for _ in range(15):
            optimizer.zero_grad()
            features = tower(pixel_values=data.images).pooler_output
            loss = nn.functional.cross_entropy(head(features), data.labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert 0 < float(wires.penalty()) < 1.0
    assert losses[-1] < 0.9 * losses[0]
