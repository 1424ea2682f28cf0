"""I-LoRA on models of Hugging Face: in a plain loop, saved by PEFT, and in the Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks
]

from guywire.integrations.transformers import FILE, GuywireCallback  # noqa: E402


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def llama(layers=2):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
            )
        )  # fmt: skip


def vit():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=16, num_labels=4,
            )
        )  # fmt: skip


def bert():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=16, num_labels=4, max_position_embeddings=16,
            )
        )  # fmt: skip


def t5():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
                decoder_start_token_id=0, pad_token_id=0,
            )
        )  # fmt: skip


TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj", "query", "value"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
}
MODELS = {"llama": llama, "vit": vit, "bert": bert, "t5": t5}


def config_for(task_type, targets=("q_proj", "v_proj")):
    return peft.LoraConfig(
        task_type=task_type, r=2, lora_alpha=4, lora_dropout=0.1, target_modules=list(targets)
    )


def batch_for(kind):
    g = torch.Generator().manual_seed(0)
    if kind == "vit":
        return {
            "pixel_values": torch.randn(4, 3, 8, 8, generator=g),
            "labels": torch.arange(4),
        }
    ids = torch.randint(3, 30, (4, 6), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "bert":
        return batch | {"labels": torch.arange(4)}
    if kind == "t5":
        return batch | {"labels": ids[:, :5].clone()}
    return batch | {"labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "inject"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_hugging_face_in_a_plain_loop(kind, wrapped, tmp_path):
    types = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "vit": None}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        base = MODELS[kind]()
        config = config_for(types[kind], TARGETS[kind])
        if wrapped:
            model = peft.get_peft_model(base, config)
        else:
            model = peft.inject_adapter_in_model(config, base)
        batch = batch_for(kind)
        i_lora = gw.ILoRA(strength=3.0, decay=0.9, capacity=16)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        with gw.attach(model, optimizer, i_lora) as wires:
            blocks = list(i_lora._blocks)
            for _ in range(2):
                for _ in range(3):
                    outputs = model(**batch)
                    (outputs.loss + wires.loss(batch, outputs)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                wires.consolidate([batch])
            with_term = wires.loss(batch).item()
            state = i_lora.state_dict()
    assert with_term > 0
    assert state["steps"] == 6
    expected = {"llama": 2, "vit": 2, "bert": 2, "t5": 4}[kind]
    assert len(blocks) == expected, blocks
    if wrapped:
        model.eval()
        inputs = batch_for(kind)
        with i_lora.slow(model), torch.no_grad():
            slow = model(**inputs).logits
            model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, slow)
            assert not torch.allclose(model(**inputs).logits, slow)


@pytest.mark.parametrize("kind", ["left", "right"])
def test_check_10_padding_changes_neither_loss(kind):
    model = peft.get_peft_model(llama(), config_for("CAUSAL_LM")).double().eval()
    generator = torch.Generator().manual_seed(0)
    slow = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.add_(0.2 * torch.randn(p.shape, generator=generator).double())
            slow[name] = p.detach() + 0.2 * torch.randn(p.shape, generator=generator).double()
    lengths = (4, 7)
    singles = [torch.randint(3, 30, (1, n), generator=generator) for n in lengths]
    padded = torch.zeros(2, 7, dtype=torch.long)
    mask = torch.zeros(2, 7, dtype=torch.long)
    for row, ids in enumerate(singles):
        place = slice(0, ids.shape[1]) if kind == "right" else slice(7 - ids.shape[1], 7)
        padded[row, place], mask[row, place] = ids[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def both(ids, attention, positions):
        batch = {
            "input_ids": ids, "attention_mask": attention, "position_ids": positions,
            "labels": ids.masked_fill(attention.cumsum(1) < 2, -100).masked_fill(attention == 0, -100),
        }  # fmt: skip
        i_lora = gw.ILoRA(replay=0.0, capacity=2)
        with gw.attach(model, sgd(model), i_lora) as wires:
            wires.consolidate([batch])
            i_lora.slow_ = {n: v.clone() for n, v in slow.items()}
            state = wires.loss(batch).item()
        i_lora = gw.ILoRA(strength=0.0, capacity=2)
        with gw.attach(model, sgd(model), i_lora) as wires:
            wires.consolidate([batch])
            return state, wires.loss(batch).item()

    apart = [both(i, torch.ones_like(i), torch.arange(i.shape[1])[None]) for i in singles]
    found = both(padded, mask, positions)
    states = sum(n * a[0] for n, a in zip(lengths, apart, strict=True)) / sum(lengths)
    tokens = [n - 1 for n in lengths]  # the first token is predicted by none, or by padding
    entropy = sum(n * a[1] for n, a in zip(tokens, apart, strict=True)) / sum(tokens)
    assert states > 1e-4
    assert found == pytest.approx((states, entropy), rel=1e-5)


class Rows(torch.utils.data.Dataset):
    """Sequences of 6 tokens with a label each; two tasks have labels of their own."""

    def __init__(self, number):
        generator = torch.Generator().manual_seed(number)
        self.ids = torch.randint(3, 30, (16, 6), generator=generator)
        self.labels = torch.randint(2, (16,), generator=generator) + 2 * number

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


class InOrder(transformers.Trainer):
    """Reads the data in order, so that a plain loop can do the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(model, folder, callback, rows, resume=None, **options):
    settings = {
        "output_dir": str(folder), "num_train_epochs": 2, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 0.0, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "optim": "adamw_torch", "logging_strategy": "no", "seed": 0,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip

    def loss(outputs, labels, num_items_in_batch=None):
        total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / num_items_in_batch + callback.loss(outputs, labels, num_items_in_batch)

    trainer = InOrder(
        model, transformers.TrainingArguments(**settings), train_dataset=rows,
        callbacks=[callback], compute_loss_func=loss,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def classifier():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=TARGETS["bert"]
        )
        model = peft.get_peft_model(bert(), config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_the_trainer_equals_a_plain_loop(tmp_path):
    ours, theirs = classifier(), classifier()
    i_lora = gw.ILoRA(strength=3.0, decay=0.9, capacity=16)
    for number in range(2):
        callback = GuywireCallback(i_lora, consolidate=True)
        train(ours, tmp_path, callback, Rows(number))
    plain = gw.ILoRA(strength=3.0, decay=0.9, capacity=16)
    for number in range(2):
        rows = Rows(number)
        data = [
            {"input_ids": rows.ids[i : i + 4], "labels": rows.labels[i : i + 4]}
            for i in range(0, 16, 4)
        ]
        optimizer = torch.optim.AdamW(
            [p for p in theirs.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
        )
        theirs.train()
        with gw.attach(theirs, optimizer, plain) as wires:
            for batch in data * 2:
                logits = theirs(input_ids=batch["input_ids"]).logits
                loss = nn.functional.cross_entropy(logits, batch["labels"])
                optimizer.zero_grad()
                (loss + wires.loss(batch)).backward()
                optimizer.step()
            wires.consolidate(data)
    assert i_lora.steps_ == plain.steps_ == 16
    for name, value in plain.slow_.items():
        torch.testing.assert_close(i_lora.slow_[name], value, rtol=0, atol=1e-5)
    fast = dict(ours.named_parameters())
    assert max(float((fast[n] - v).detach().abs().max()) for n, v in i_lora.slow_.items()) > 1e-3
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(fast[name], p, rtol=0, atol=1e-5)


def test_the_trainer_resumes_bit_for_bit(tmp_path):
    def first():
        i_lora, model = gw.ILoRA(strength=3.0, decay=0.9, capacity=16), classifier()
        train(model, tmp_path / "one", GuywireCallback(i_lora, consolidate=True), Rows(0))
        return i_lora, model

    whole, model = first()
    options = {"save_strategy": "steps", "save_steps": 4}
    train(model, tmp_path / "two", GuywireCallback(whole), Rows(1), **options)
    assert (tmp_path / "two" / "checkpoint-4" / FILE).exists()
    half, again = first()
    folder = str(tmp_path / "two" / "checkpoint-4")
    assert checkpoint.load(f"{folder}/{FILE}")["regularizers"][0]["state"]["steps"] == 12
    train(again, tmp_path / "two", GuywireCallback(half), Rows(1), folder)
    assert half.steps_ == whole.steps_ == 16
    for name, value in whole.slow_.items():
        assert torch.equal(half.slow_[name], value), name
