"""The Hugging Face Trainer with our callback against a plain loop with the same penalty."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import AttachError, CheckpointError

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

from guywire.integrations.transformers import FILE, GuywireCallback  # noqa: E402

LABELS = 3


class Rows(torch.utils.data.Dataset):
    """Sequences of 5 tokens with a label each."""

    def __init__(self, n=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, 50, (n, 5), generator=generator)
        self.labels = torch.randint(LABELS, (n,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def bert(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=LABELS, max_position_embeddings=8,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)


class InOrder(transformers.Trainer):
    """Reads the data in order, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    model, folder, callback, *, accumulation=1, batch=4, loss=None, rows=None, **options
):
    settings = {
        "output_dir": str(folder), "num_train_epochs": 1, "learning_rate": 0.01,
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "optim": "adamw_torch", "logging_strategy": "no", "seed": 0,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip
    trainer = InOrder(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=rows or Rows(),
        callbacks=[callback],
        compute_loss_func=loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def plain_loop(model, extra, *, batch=4, rows=None, epochs=1):
    """AdamW on cross entropy plus ``extra(model, batch, logits)``."""
    rows = rows or Rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    model.train()
    for _ in range(epochs):
        for start in range(0, len(rows), batch):
            ids, labels = rows.ids[start : start + batch], rows.labels[start : start + batch]
            optimizer.zero_grad()
            logits = model(input_ids=ids).logits
            loss = nn.functional.cross_entropy(logits, labels)
            (loss + extra(model, {"input_ids": ids, "labels": labels}, logits)).backward()
            optimizer.step()


def same(one, two, tolerance=1e-6):
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def task_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def anchors_of(model):
    return {n: p.detach() + 0.2 for n, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_side_equals_a_plain_loop(tmp_path, accumulation):
    plain, held = bert(), bert()
    anchors = anchors_of(plain)
    callback = GuywireCallback(gw.L2(0.3, anchor=anchors))
    # With a loss of our own: the model's ignores num_items_in_batch, and the Trainer then adds up
    # the means of the micro-batches instead of averaging them.
    trainer_of(
        held, tmp_path, callback, accumulation=accumulation, batch=4 // accumulation, loss=task_loss
    ).train()
    plain_loop(plain, lambda m, b, z: 0.3 * gw.l2_penalty(dict(m.named_parameters()), anchors))
    same(plain, held)
    assert callback.wires.steps == 6
    callback.detach()
    free = bert()
    plain_loop(free, lambda m, b, z: 0.0)
    pairs = zip(free.parameters(), held.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-3


def test_consolidate_after_and_at_the_end_of_training(tmp_path):
    model = bert()
    ewc = gw.EWC(10.0, labels="true")
    callback = GuywireCallback(ewc)
    with pytest.raises(AttachError, match="comes after trainer"):
        callback.consolidate([])
    trainer = trainer_of(model, tmp_path, callback)
    trainer.train()
    callback.consolidate(trainer.get_train_dataloader())
    assert ewc.tasks_ == 1
    rows = Rows()
    data = [{"input_ids": rows.ids, "labels": rows.labels}]
    wanted = gw.curvature.diagonal_fisher(model, data, labels="true")
    for name, f in wanted.items():
        torch.testing.assert_close(ewc.precision_[name], f, rtol=1e-4, atol=1e-9)
    second = GuywireCallback(ewc, consolidate=True)
    trainer_of(model, tmp_path, second, rows=Rows(seed=1)).train()
    assert ewc.tasks_ == 2
    assert second.wires is None
    assert not model._forward_pre_hooks


class Loss:
    """The two lines of the guide."""

    callback = None

    def __call__(self, outputs, labels, num_items_in_batch=None):
        loss = task_loss(outputs, labels, num_items_in_batch)
        return loss + self.callback.loss(outputs, labels, num_items_in_batch)


# 24 rows, and 20, whose last step has fewer micro-batches than the others.
@pytest.mark.parametrize(("accumulation", "n"), [(1, 24), (2, 24), (4, 20)])
def test_loss_side_counts_once_under_accumulation(tmp_path, accumulation, n):
    start, rows = bert(), Rows(n)
    held, plain = copy.deepcopy(start), copy.deepcopy(start)
    teacher = bert(seed=1).eval()
    distil = gw.PredictionDistillation(2.0)
    with gw.attach(teacher, torch.optim.SGD(teacher.parameters(), lr=0.1), distil) as wires:
        wires.consolidate()
    loss = Loss()
    loss.callback = GuywireCallback(distil)
    trainer = trainer_of(
        held, tmp_path, loss.callback, accumulation=accumulation, batch=8 // accumulation,
        loss=loss, rows=rows,
    )  # fmt: skip
    trainer.train()

    def extra(model, batch, logits):
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"]).logits
        return 2.0 * gw.prediction_distillation_loss(logits, wanted)

    plain_loop(plain, extra, batch=8, rows=rows)
    same(plain, held, 2e-6)
    # In evaluation nothing is added.
    assert float(loss.callback.loss(None, rows.labels, 3)) == 0.0


def test_a_teacher_taken_while_attached_copies_the_model_and_nothing_that_hangs_on_it(tmp_path):
    distil = gw.PredictionDistillation(2.0)
    callback = GuywireCallback(distil)
    model = bert()
    trainer = trainer_of(model, tmp_path, callback)
    trainer.train()
    trainer.optimizer.__deepcopy__ = lambda memo: pytest.fail("the optimiser is copied")
    assert model._forward_pre_hooks  # of the callback, which keeps the batch
    callback.consolidate(trainer.get_train_dataloader())
    assert not distil.teacher_._forward_pre_hooks


def test_resume_equals_no_interruption(tmp_path):
    def ewc():
        made = gw.EWC(3.0)
        model = bert(seed=2)
        with gw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), made) as wires:
            rows = Rows(seed=3)
            wires.consolidate([{"input_ids": rows.ids, "labels": rows.labels}])
        return made

    options = {"save_strategy": "steps", "save_steps": 3}
    whole = bert()
    trainer_of(whole, tmp_path / "a", GuywireCallback(ewc()), **options).train()
    saved = checkpoint.load(tmp_path / "a" / "checkpoint-3" / FILE)
    assert saved["steps"] == 3
    assert saved["regularizers"][0]["kind"] == "EWC"

    again = bert(seed=5)
    callback = GuywireCallback(gw.EWC(3.0))  # knows nothing: all it needs is in the file
    trainer = trainer_of(again, tmp_path / "a", callback, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    same(whole, again, 0.0)
    assert callback.wires.steps == 6

    (tmp_path / "a" / "checkpoint-3" / FILE).unlink()
    trainer = trainer_of(bert(), tmp_path / "a", GuywireCallback(gw.EWC(3.0)), **options)
    with pytest.raises(CheckpointError, match="resumes at step 3, but there is no"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


class Texts(torch.utils.data.Dataset):
    """Token sequences of which some positions are ignored, as a causal model is trained on."""

    def __init__(self, n=12):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, 50, (n, 6), generator=generator)
        self.labels = self.ids.clone()
        self.labels[torch.rand(n, 6, generator=generator) < 0.3] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


class Constant(gw.Regularizer):
    """A term of which the weight alone can be seen: the gradient of 1 per step is 1."""

    place = "loss"

    def __init__(self):
        self.weights_ = []

    def loss(self, batch, outputs):
        assert set(batch) == {"input_ids", "labels"}
        return torch.ones((), requires_grad=True)


# The Trainer counts first labels for the one and not for the other.
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_weights_of_a_causal_models_micro_batches_add_up_to_one(tmp_path, accumulation, kind):
    with torch.random.fork_rng([]):
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=8,
            )  # fmt: skip
            model = transformers.LlamaForCausalLM(config)
    callback = GuywireCallback(Constant())
    weights = []

    def loss(outputs, labels, num_items_in_batch=None):
        weights.append(float(callback.loss(outputs, labels, num_items_in_batch).detach()))
        return outputs.logits.sum() * 0

    trainer = trainer_of(
        model, tmp_path, callback, accumulation=accumulation, batch=2, loss=loss, rows=Texts()
    )
    trainer.train()
    assert len(weights) == 6
    for start in range(0, 6, accumulation):
        assert sum(weights[start : start + accumulation]) == pytest.approx(1.0)
