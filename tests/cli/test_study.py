from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from guywire.cli import main
from guywire.lab.studies import STUDIES

COIN = str(Path(__file__).parents[1] / "lab/studies/falling_coin.py")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GUYWIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main(["study", *words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_the_json_document_is_all_there_is_on_stdout(run):
    code, out, _ = run(COIN, "--workers", "1", "--json")
    document = json.loads(out)
    assert code == 0
    (study,) = document["studies"]
    assert study["claims"][0]["verdict"] == "reproduced"
    assert study["folder"] == "studies/falling-coin/full"
    assert Path(study["folder"], "rows.parquet").exists()


def test_the_table_says_claim_verdict_and_what_the_numbers_allow(run):
    code, out, _ = run(COIN, "--workers", "1")
    assert code == 0
    for words in ("Held coins fall further.", "reproduced", "1.000", "coins fall"):
        assert words in " ".join(out.split())


def test_smoke_claims_nothing(run):
    code, out, _ = run(COIN, "--smoke", "--workers", "1", "--json")
    assert code == 0
    assert json.loads(out)["studies"][0]["claims"][0]["verdict"] == "smoke"


def test_a_check_that_fails_is_a_failure(run, tmp_path):
    text = (
        Path(COIN)
        .read_text()
        .replace('.mean("held", "test").mean >= 0.0', '.mean("held", "test").mean > 9')
    )
    (tmp_path / "rising.py").write_text(text)
    code, out, _ = run("rising.py", "--workers", "1", "--json")
    assert code == 1
    claim = json.loads(out)["studies"][0]["claims"][0]
    assert claim["verdict"] == "inconclusive"
    assert "check" in claim["allows"]


def test_a_unit_that_fails_is_one_sentence_and_code_1(run):
    code, out, err = run(COIN, "--workers", "1", "--set", "explode=plain")
    assert code == 1
    assert not out
    assert "the coin is lost" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fisher-sequental-transfer"], "did you mean 'fisher-sequential-transfer'"),
        ([], "name a study, or --all"),
        ([COIN, "--set", "noize=1"], "did you mean 'noise'"),
        ([COIN, "--set", "noise"], "write KEY=VALUE"),
        ([COIN, "--seeds", "0"], "--seeds 0"),
        ([COIN, "--data", "x.csv"], "no setting 'data'"),
        (["fisher-sequential-transfer", "--model", "t5-small"], "takes 'tiny' or 'hf:NAME'"),
        (["fisher-sequential-transfer", "--set", "gap_reference=summary"], "--data FILE"),
    ],
)
def test_wrong_words_are_code_2(run, words, said):
    code, _, err = run(*words)
    assert code == 2
    assert said in err
    assert not Path("studies").exists()


def test_missing_data_are_code_1(run, monkeypatch):
    monkeypatch.delenv("GUYWIRE_DATA", raising=False)
    code, _, err = run("fisher-sequential-transfer", "--smoke")
    assert code == 1
    assert "$GUYWIRE_DATA, which is not set" in err


def test_one_broken_study_does_not_keep_the_others_from_running(run, tmp_path):
    (tmp_path / "broken.py").write_text(
        Path(COIN).read_text().replace('"explode": ""', '"explode": "plain"')
    )
    code, out, err = run("broken.py", COIN, "--workers", "1", "--json")
    assert code == 1
    document = json.loads(out)
    assert [entry["study"] for entry in document["failed"]] == ["broken.py"]
    assert len(document["studies"]) == 1
    assert "the coin is lost" in err


def test_the_list_names_every_study_with_its_claims(run):
    code, out, _ = run("--list", "--json")
    assert code == 0
    listed = json.loads(out)["studies"]
    assert [entry["slug"] for entry in listed] == list(STUDIES)
    assert all(entry["claims"] and entry["minutes"] > 0 for entry in listed)
    code, out, _ = run("--list")
    assert all(slug in out for slug in STUDIES)


def test_the_gallery_is_written(run):
    code, out, _ = run(COIN, "--workers", "1", "--report", "--json")
    assert code == 0
    index = Path(json.loads(out)["gallery"])
    assert "falling-coin.html" in index.read_text()
    assert "Held coins fall further." in index.with_name("falling-coin.html").read_text()


FINDINGS = (
    "The heart is of normal size. The lungs are clear. There is no effusion",
    "The heart is enlarged. There is a small effusion on the left. The lungs are clear",
    "The lungs show a nodule on the right. The heart is of normal size. No effusion is seen",
)
IMPRESSIONS = ("Normal chest", "Large heart with small left effusion", "Nodule on the right")


@pytest.mark.multiprocess
def test_reports_of_ones_own_with_a_t5_of_ones_own(run, tmp_path):
    """A small file of the shape of MIMIC-CXR's or Open-I's, and a T5 from a folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    from guywire.lab.studies.fisher_sequential_transfer import seq2seq

    with Path("reports.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "summary", "subject"])
        for i in range(60):
            writer.writerow([f"{FINDINGS[i % 3]}. Seen on day {i}.", IMPRESSIONS[i % 3], i // 2])
    words = ("fill in the blank: ", "summarize: ")
    tokenizer = seq2seq.build_tokenizer("tiny", tmp_path / "t.json", FINDINGS, words, vocab=200)
    tokenizer.save_pretrained("t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained("t5")
    small = {
        "steps_a": 10, "fisher_sequences": 8, "few_pairs": 16, "many_pairs": 32, "epochs": 2,
        "evaluated": 6, "gap_reference": "summary",
    }  # fmt: skip
    settings = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    code, out, err = run(
        "fisher-sequential-transfer", "--smoke", "--data", "reports.csv", "--model", "hf:t5",
        "--source-column", "text", "--target-column", "summary", "--group-column", "subject",
        "--workers", "1", "--json", *settings,
    )  # fmt: skip
    document = json.loads(out)
    assert code in (0, 1), (
        err
    )  # a check of signs may fail at this size; that nothing breaks is the point
    (study,) = document["studies"]
    result = json.loads(Path(study["folder"], "result.json").read_text())
    assert result["settings"]["data"] == "reports.csv"
    cells = {(s["condition"], s["metric"]): s["mean"] for s in result["statistics"]}
    assert (
        cells["texts", "b_train_pairs"]
        + cells["texts", "b_valid_pairs"]
        + cells["texts", "b_test_pairs"]
        == 60
    )
    assert cells["texts", "b_test_pairs"] == 6  # three whole subjects of thirty
    assert cells["texts", "a_train_pairs"] == cells["texts", "b_train_pairs"]
    assert ("Fisher, decreasing, many pairs", "test_loss") in cells


@pytest.mark.multiprocess
def test_several_studies_share_two_processes_and_answer_as_alone(run, tmp_path):
    text = Path(COIN).read_text().replace('slug="falling-coin"', 'slug="other-coin"')
    (tmp_path / "other.py").write_text(text)
    (tmp_path / "lost.py").write_text(
        text.replace('"explode": ""', '"explode": "held"').replace("other-coin", "lost-coin")
    )
    code, out, _ = run(COIN, "other.py", "lost.py", "other.py", "--workers", "2", "--json")
    document = json.loads(out)
    assert code == 1
    assert [study["slug"] for study in document["studies"]] == ["falling-coin", "other-coin"]
    assert [entry["study"] for entry in document["failed"]] == ["lost.py"]
    assert "the coin is lost" in document["failed"][0]["error"]
    _, alone, _ = run("other.py", "--workers", "1", "--fresh", "--json")
    again = json.loads(alone)["studies"][0]
    assert [c["allows"] for c in again["claims"]] == [
        c["allows"] for c in document["studies"][1]["claims"]
    ]
