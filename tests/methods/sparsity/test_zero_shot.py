"""CLIP with fixed texts as a classifier, and mask tuning of it through the Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.core.errors import UsageError
from guywire.methods.sparsity.masks import masks_of

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

from guywire.integrations.transformers import GuywireCallback  # noqa: E402

CLASSES = 3


def clip():
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = tower | {
        "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 2, "bos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = tower | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.CLIPModel(config).eval()


def tokens():
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 8, 9, 2]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def classifier(model=None):
    model = clip() if model is None else model
    return gw.ZeroShotClassifier(model, gw.text_features(model, tokens()))


class Images(torch.utils.data.Dataset):
    def __init__(self, n=24):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 3, 8, 8, generator=generator)
        self.y = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


def test_logits_are_those_of_clip_with_the_texts_encoded_each_time():
    model, x = clip(), Images().x
    with torch.no_grad():
        wanted = model(pixel_values=x, **tokens()).logits_per_image
        found = classifier(model)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_texts_have_length_one_no_graph_and_do_not_move():
    model = clip()
    texts = gw.text_features(model, tokens())
    assert not texts.requires_grad
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    head = classifier(model)
    scores = gw.mask(head)
    assert len(scores) == 9
    optimizer = torch.optim.Adam(scores.values(), lr=3e-3)
    data = Images()
    with gw.attach(head, optimizer, gw.MaskTuning()) as wires:
        for _ in range(12):
            outputs = head(data.x)
            loss = F.cross_entropy(outputs, data.y) + wires.loss((data.x, data.y), outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert gw.mask_report(head).share > 0.0
    assert torch.equal(head.texts, texts)
    # The tower is the CLIP model's own, so folding the classifier folds that too.
    gw.fold_mask(head)
    assert type(model.vision_model.embeddings.patch_embedding) is nn.Conv2d
    assert bool((model.vision_model.encoder.layers[0].self_attn.q_proj.weight == 0).any())


def test_what_is_no_clip_or_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="CLIPModel"):
        gw.text_features(nn.Linear(2, 2), tokens())
    with pytest.raises(UsageError, match="6 wide"):
        gw.ZeroShotClassifier(clip(), torch.zeros(3, 5))


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_equals_a_plain_loop(tmp_path, accumulation):
    plain, held = classifier(), classifier()
    rows = Images()
    scores = gw.mask(plain)
    optimizer = torch.optim.Adam(scores.values(), lr=2e-3)
    with gw.attach(plain, optimizer, gw.MaskTuning(0.7)) as wires:
        for _ in range(3):
            for start in range(0, len(rows), 4):
                x, y = rows.x[start : start + 4], rows.y[start : start + 4]
                outputs = plain(x)
                loss = F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    gw.mask(held)
    start = copy.deepcopy(masks_of(held))
    callback = GuywireCallback(gw.MaskTuning(0.7))

    def compute_loss(outputs, labels, num_items_in_batch=None):
        loss = F.cross_entropy(outputs, labels, reduction="sum") / num_items_in_batch
        return loss + callback.loss(outputs, labels, num_items_in_batch)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, learning_rate=2e-3,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, optim="adamw_torch", seed=0,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = InOrder(
        held, arguments, train_dataset=rows, callbacks=[callback], compute_loss_func=compute_loss
    )
    trainer.remove_callback(transformers.PrinterCallback)
    held.eval()
    trainer.train()
    for name, on in masks_of(plain).items():
        assert torch.equal(masks_of(held)[name], on), name
    found = {n: p for n, p in held.named_parameters() if n.endswith("scores")}
    for name, value in plain.named_parameters():
        if name.endswith("scores"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert gw.mask_report(held).share > 0.0
    assert all(on.all() for on in start.values())
