"""SaRA through the Hugging Face Trainer, against a plain loop, and with DDP's parts left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

from guywire.integrations.transformers import GuywireCallback  # noqa: E402

IDS = torch.randint(4, 50, (24, 5), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": LABELS[i]}


class InOrder(transformers.Trainer):
    """Reads the data in order, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def bert():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=3, max_position_embeddings=8,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)


def sara(**options):
    return gw.SaRA(**{"strength": 0.01, "share": 0.3, "rank_above": 6} | options)


def train(model, method, folder, *, optimizer=None, resume=False, **options):
    settings = {
        "output_dir": str(folder), "num_train_epochs": 2, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 0.0, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "optim": "adamw_torch", "logging_strategy": "no", "seed": 0,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip
    trainer = InOrder(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=Rows(),
        callbacks=[GuywireCallback(method)],
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain_loop(model, method, *, clip=None):
    optimizer = torch.optim.AdamW(method.prepare(model), lr=0.01, weight_decay=0.0)
    model.train()
    with gw.attach(model, optimizer, method):
        for _ in range(2):
            for start in range(0, 24, 4):
                optimizer.zero_grad()
                logits = model(input_ids=IDS[start : start + 4]).logits
                nn.functional.cross_entropy(logits, LABELS[start : start + 4]).backward()
                if clip:
                    nn.utils.clip_grad_norm_(method.parameters(), clip)
                optimizer.step()
    return model


def assert_same(one, two, tolerance=1e-6):
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_with_an_optimiser_of_the_vectors(tmp_path):
    wanted = plain_loop(bert(), sara(reselect_at=6))
    model, method = bert(), sara(reselect_at=6)
    vectors = method.prepare(model)
    train(model, method, tmp_path, optimizer=torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0))
    assert method.reselected_
    assert_same(model, wanted)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_with_the_trainers_own_optimiser_and_clipping(tmp_path, clip):
    wanted = plain_loop(bert(), sara(), clip=clip)
    model, method = bert(), sara()
    vectors = method.prepare(model)
    trainer = train(model, method, tmp_path, max_grad_norm=clip)
    owned = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(v) for v in vectors}
    assert_same(model, wanted)


def test_resumed_after_the_second_choice(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 8}
    model, method = bert(), sara(reselect_at=6)
    method.prepare(model)
    train(model, method, tmp_path, **options)
    again, method = bert(), sara(reselect_at=6)
    method.prepare(again)
    train(again, method, tmp_path, resume=str(tmp_path / "checkpoint-8"), **options)
    assert_same(again, model, 0.0)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-12")
    assert_same(saved, gw.sara_fold(model), 0.0)
