"""``guywire probe connectivity`` on tiny models made here: folders, bare tensors, adapters, images."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from guywire.cli import main
from guywire.diagnostics import connectivity

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "rug",
    "and",
    "then",
    "slept",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", model_max_length=16
    )


def llama(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=15, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
            tie_word_embeddings=True,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def bert(seed, labels=3):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=15, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=labels, max_position_embeddings=16,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("models")
    for name, model in {
        "one": llama(0), "two": llama(1), "bert-one": bert(0), "bert-two": bert(1),
    }.items():  # fmt: skip
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "old.txt"
    path.write_text("the cat sat on the mat\n\na dog ran\nthe dog slept under a rug and then ran\n")
    return path


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("words,class\nthe cat sat,LABEL_0\na dog ran on,2\nand then slept,LABEL_1\n")
    return path


def probe(*words):
    return main(["probe", "connectivity", *map(str, words)])


def test_two_language_models_as_a_table_and_as_json(folders, texts, tmp_path, capsys):
    ends = folders / "one", folders / "two"
    out = tmp_path / "line.json"
    assert probe(*ends, "--data", texts, "--points", 5, "--out", out) == 0
    shown = capsys.readouterr()
    assert "old: barrier" in shown.out
    assert "0.75" in shown.out
    assert probe(*ends, "--data", texts, "--points", 5, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["data"] == {"old": str(texts)}
    entry = document["sets"]["old"]
    assert len(entry["loss"]) == len(entry["accuracy"]) == 5
    assert entry["loss"] == document["sets"]["all"]["loss"]


def test_the_numbers_are_those_of_the_models_own_loss(folders, texts, tokenizer, capsys):
    ends = folders / "one", folders / "two"
    assert probe(*ends, "--data", texts, "--points", 3, "--json") == 0
    entry = json.loads(capsys.readouterr().out)["sets"]["old"]
    lines = [line for line in texts.read_text().splitlines() if line]
    one, two = llama(0), llama(1)
    middle = llama(2)
    with torch.no_grad():
        for p, a, b in zip(middle.parameters(), one.parameters(), two.parameters(), strict=True):
            p.copy_((a + b) / 2)
        for i, model in enumerate((one, middle, two)):
            total = count = 0
            for line in lines:
                ids = torch.tensor([tokenizer(line)["input_ids"]])
                total += float(model.eval()(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
            assert entry["loss"][i] == pytest.approx(total / count, rel=1e-4)


def test_bare_tensors_need_an_architecture(folders, texts, tmp_path, capsys):
    for name in ("one", "two"):
        shutil.copy(folders / name / "model.safetensors", tmp_path / f"{name}.safetensors")
    ends = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert probe(*ends, "--data", texts) == 2
    assert "add --model" in capsys.readouterr().err
    assert probe(*ends, "--data", texts, "--model", folders / "one", "--json") == 0
    bare = json.loads(capsys.readouterr().out)
    assert probe(folders / "one", folders / "two", "--data", texts, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert bare["sets"]["old"]["loss"] == pytest.approx(whole["sets"]["old"]["loss"], rel=1e-5)
    assert bare["distance"] == pytest.approx(whole["distance"], rel=1e-5)


def adapters(base, root, make, task, targets, ranks=(2, 2)):
    paths = []
    for seed, rank in enumerate(ranks):
        with torch.random.fork_rng([]):
            torch.manual_seed(10 + seed)
            config = peft.LoraConfig(task_type=task, r=rank, target_modules=targets)
            model = peft.get_peft_model(make(0), config)
            for name, p in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    p.data.normal_(0, 0.5)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(root / f"adapter{seed}")
        paths.append(root / f"adapter{seed}")
    return paths


def test_adapters_of_a_language_model_are_interpolated_factor_by_factor(
    folders, texts, tmp_path, capsys
):
    ends = adapters(folders / "one", tmp_path, llama, "CAUSAL_LM", ["q_proj", "v_proj"])
    assert probe(*ends, "--data", texts, "--points", 3, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["adapters"] is True
    files = [load_file(path / "adapter_model.safetensors") for path in ends]
    squares = sum(float((files[0][n] - files[1][n]).square().sum()) for n in files[0])
    assert document["distance"] == pytest.approx(squares**0.5, rel=1e-5)
    half = tmp_path / "half"
    shutil.copytree(ends[0], half)
    save_file(
        {n: (files[0][n] + files[1][n]) / 2 for n in files[0]}, half / "adapter_model.safetensors"
    )
    assert probe(half, ends[1], "--data", texts, "--points", 3, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    found = document["sets"]["old"]["loss"]
    assert again["sets"]["old"]["loss"][0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_adapters_of_a_classifier_bring_their_head(folders, rows, tmp_path, capsys):
    ends = adapters(folders / "bert-one", tmp_path, bert, "SEQ_CLS", ["query", "value"])
    options = ["--text-column", "words", "--label-column", "class", "--points", 3, "--json"]
    assert probe(*ends, "--data", f"new={rows}", *options) == 0
    document = json.loads(capsys.readouterr().out)
    model = peft.PeftModel.from_pretrained(bert(0), ends[1]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "bert-one")
    with torch.no_grad():
        losses = [
            float(
                model(
                    input_ids=torch.tensor([tokenizer(t)["input_ids"]]), labels=torch.tensor([y])
                ).loss
            )
            for t, y in (("the cat sat", 0), ("a dog ran on", 2), ("and then slept", 1))
        ]
    assert document["sets"]["new"]["loss"][-1] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_several_sets_and_their_mean(folders, rows, tmp_path, capsys):
    lines = [{"words": "the dog sat", "class": 0}, {"words": "a cat ran", "class": 1}] * 4
    other = tmp_path / "old.jsonl"
    other.write_text("\n".join(map(json.dumps, lines)))
    ends = folders / "bert-one", folders / "bert-two"
    options = ["--text-column", "words", "--label-column", "class", "--samples", 5]
    data = ["--data", f"old={other}", "--data", f"new={rows}"]
    assert probe(*ends, *data, *options, "--json") == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert set(sets) == {"old", "new", "all"}
    means = [(a + b) / 2 for a, b in zip(sets["old"]["loss"], sets["new"]["loss"], strict=True)]
    assert sets["all"]["loss"] == pytest.approx(means)
    assert probe(*ends, *data, *options) == 0
    assert "all: barrier" in capsys.readouterr().out


def resnet(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10,
            layer_type="basic",
        )  # fmt: skip
        model = transformers.ResNetForImageClassification(config)
        model.train()(torch.randn(8, 1, 8, 8) * (seed + 1))
        return model


def test_images_and_running_statistics(tmp_path, capsys):
    for seed in range(2):
        resnet(seed).save_pretrained(tmp_path / str(seed))
    ends = tmp_path / "0", tmp_path / "1"
    options = ["--data", "digits", "--points", 3, "--samples", 40]
    assert probe(*ends, *options) == 2
    assert "--renew-statistics" in capsys.readouterr().err
    assert probe(*ends, *options, "--renew-statistics", "--json") == 0
    entry = json.loads(capsys.readouterr().out)["sets"]["digits"]
    assert all(0 < loss < 20 for loss in entry["loss"])


def test_wrong_words_name_the_remedy(folders, texts, rows, tmp_path, capsys):
    one, two = folders / "one", folders / "two"
    unlike = adapters(one, tmp_path, llama, "CAUSAL_LM", ["q_proj"], ranks=(2, 3))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ')
    hollow = tmp_path / "hollow"
    shutil.copytree(one, hollow)
    tensors = load_file(one / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hollow / "model.safetensors", {"format": "pt"})
    cases = [
        ([one, tmp_path / "nothing", "--data", texts], 2, "no checkpoint"),
        ([one, tmp_path, "--data", texts], 2, "neither config.json nor"),
        ([one, two, "--data", tmp_path / "none.txt"], 2, "no file"),
        ([one, two, "--data", broken], 1, "cannot be read"),
        ([one, two, "--data", rows], 2, "--text-column"),
        ([one, two, "--data", texts, "--data", texts], 2, "name them"),
        ([one, two, "--data", f"all={texts}"], 2, "another name"),
        ([one, two, "--data", texts, "--points", 2], 2, "--points 2"),
        ([one, two, "--data", texts, "--out", tmp_path / "no" / "x.json"], 2, "no folder"),
        ([one, unlike[0], "--data", texts], 2, "two adapters of one base"),
        ([*unlike, "--data", texts], 2, "have r 2 and 3"),
        ([one, folders / "bert-two", "--data", texts], 2, "different architectures"),
        ([one, hollow, "--data", texts], 1, "lacks 'model.norm.weight'"),
        ([folders / "bert-one", folders / "bert-two", "--data", texts], 2, "no labels"),
    ]
    for words, code, said in cases:
        found = probe(*words)
        shown = capsys.readouterr().err
        assert (found, said in shown) == (code, True), (words, found, shown)
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nthe cat,seven\n")
    assert probe(folders / "bert-one", folders / "bert-two", "--data", bad) == 2
    assert "'seven' is none of the model's 3 classes" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert main(["probe", "connectivity", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "barrier" in shown
    assert "--renew-statistics" in shown
    assert main(["probe"]) in (0, 2)
    assert callable(connectivity)
