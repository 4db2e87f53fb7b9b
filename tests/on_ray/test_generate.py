"""Text from a published run: here and on workers the same, with its statement, or refused early.

pytest tests/on_ray/test_generate.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import udp_ray
from tests.support.published import published_run
from udp_ray.config.generate import GenerateConfig
from udp_ray.data.store import TokenStore
from udp_ray.errors import UdpRayError
from udp_ray.on_ray import generate as generating
from udp_ray.on_ray.generate import dry_run_text, generate, sample_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run with a valid statement."""
    return published_run(tmp_path_factory.mktemp("run"))


def settings(run: Path, **fields: Any) -> GenerateConfig:
    values = {"run": str(run), "num_samples": 5, "max_new_tokens": 8, "temperature": 0.8}
    return GenerateConfig.model_validate(values | fields)


def prompts_file(folder: Path) -> str:
    file = folder / "prompts.txt"
    file.write_text("w5 w9 w3\nw7\nw4 w8\nw2\n")
    return str(file)


def test_texts_come_with_their_prompts_and_those_of_the_base_model(
    run: Path, tmp_path: Path
) -> None:
    result = generate(settings(run, prompts=prompts_file(tmp_path)))
    assert [each.number for each in result.samples] == list(range(20))
    assert [each.prompt for each in result.samples[4:6]] == ["w5 w9 w3", "w7"]
    assert all(each.base_text is not None for each in result.samples)
    assert result.coverage.is_guarantee
    shown = result.to_text()
    assert "differentially private" in " ".join(shown.split())
    assert "Prompts are not covered" in shown
    assert result.comparison is None


def test_prompts_are_longer_than_one_and_batches_change_nothing(run: Path, tmp_path: Path) -> None:
    file = prompts_file(tmp_path)
    whole = generate(settings(run, prompts=file)).samples
    assert generate(settings(run, prompts=file, batch_size=3)).samples == whole
    given = ["w5 w9 w3", "w7", "w4 w8", "w2"]
    assert udp_ray.generate(settings(run), prompts=given).samples == whole
    assert generate(settings(run, prompts=file, seed=1)).samples != whole


def test_batches_hold_contexts_of_one_length_and_every_text_once(run: Path, tmp_path: Path) -> None:
    job = generating._check(settings(run, prompts=prompts_file(tmp_path), batch_size=4), None)
    batches = generating._batches(job)
    assert all(len({len(context) for context in batch.contexts}) == 1 for batch in batches)
    assert sorted(n for batch in batches for n in batch.numbers) == list(range(20))
    assert max(len(batch.numbers) for batch in batches) == 4


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_an_output_folder_has_texts_statement_and_comparison(
    run: Path, tmp_path: Path, form: str
) -> None:
    output = tmp_path / "out"
    result = generate(settings(run, output=str(output), format=form, num_samples=12))
    assert {file.name for file in output.iterdir()} == {
        f"samples.{form}", "privacy.json", "statement.md", "generation.json", "comparison.json",
        "comparison.md", "comparison.png",
    }  # fmt: skip
    assert (output / "privacy.json").read_bytes() == (run / "privacy.json").read_bytes()
    if form == "parquet":
        rows = pq.read_table(output / "samples.parquet").to_pylist()
    else:
        rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [each.text for each in result.samples]
    assert [row["base_num_tokens"] for row in rows] == [s.base_num_tokens for s in result.samples]
    compared = json.loads((output / "comparison.json").read_text())
    assert list(compared["sets"]) == ["fine-tuned", "base", "held-out"]
    assert compared["sets"]["held-out"]["num_texts"] == 12
    assert "Held-out users are not covered" in (output / "comparison.md").read_text()
    note = json.loads((output / "generation.json").read_text())
    assert set(note["weights"]) == {"model.safetensors"}
    store = TokenStore.open(run.parent / "store", verify=False).heldout
    assert store is not None
    texts = [store.tokens(example).tolist() for example in range(store.num_examples)]
    written = b"".join(file.read_bytes() for file in output.iterdir()).decode(errors="ignore")
    assert not [text for text in texts if len(text) > 3 and words(text) in written]
    assert rows[0]["text"][:12] in written  # the failing arm: a text that is there is found


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def test_few_held_out_texts_are_left_out_with_a_sentence(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    file.write_text('{"text": "w1 w2"}\n' * 9)
    output = tmp_path / "out"
    result = generate(settings(run, output=str(output), heldout=str(file)))
    assert result.comparison is not None
    assert list(result.comparison.sets) == ["fine-tuned", "base"]
    assert "Not compared with held-out text" in result.to_text()


def test_a_base_model_alone_says_that_nothing_is_promised(run: Path) -> None:
    result = generate(settings(run.parent / "model"))
    assert result.samples[0].base_text is None
    assert "NO STATEMENT" in result.to_text()


def test_a_seeded_run_says_that_its_statement_is_void(tmp_path: Path) -> None:
    output = tmp_path / "out"
    void = published_run(tmp_path / "void", seed=1)
    result = generate(settings(void, output=str(output)))
    assert "NO GUARANTEE" in result.to_text()
    assert json.loads((output / "generation.json").read_text())["is_guarantee"] is False


def test_adapters_are_sampled_beside_their_base(tmp_path: Path) -> None:
    run = published_run(tmp_path, lora=True)
    found = sample_here(settings(run), prompts=["w5 w9"])
    assert any(each.base_text != each.text for each in found)
    assert "adapters" in dry_run_text(settings(run))


def test_workers_write_the_same_texts(run: Path, tmp_path: Path, ray_2_cpus: None) -> None:
    file = prompts_file(tmp_path)
    here = generate(settings(run, prompts=file, batch_size=4))
    there = settings(
        run, prompts=file, batch_size=4, output=str(tmp_path / "out"), cluster={"num_workers": 2}
    )
    result = generate(there, announce=lambda text: None)
    assert result.samples == here.samples
    assert result.comparison is not None
    lost = there.model_copy(update={"output": None})
    with pytest.MonkeyPatch.context() as patch:
        # A folder that this machine has and the workers lack.
        patch.setattr(generating, "_base_of", lambda *_: str(tmp_path / "gone"))
        patch.setattr(generating, "_require_same_vocabulary", lambda *_: None)
        with pytest.raises(UdpRayError, match="there is no such folder") as caught:
            generate(lost, announce=lambda text: None)
    assert "\n" not in str(caught.value)


# ---- mistakes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"run": "TMP/none"}, ["run is", "TMP/none", "correct the path"]),
        ({"run": "TMP"}, ["run is TMP", "without a model", "finished run"]),
        ({"base": "TMP/none"}, ["base is", "no such folder", "correct the path"]),
        ({"max_new_tokens": 40}, ["max_new_tokens is 40", "32 positions", "lower max_new_tokens"]),
        ({"prompt": "w1 " * 30}, ["start of a text has 30 tokens", "32 positions", "shorten"]),
        ({"prompts": "TMP/a.docx"}, ["prompts is", "a.docx", "ends in"]),
        ({"output": "RUN/.."}, ["output", "not empty", "give another folder"]),
    ],
)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(
    run: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("udp_ray.models.generate._load", no_model)
    places = {"TMP": str(tmp_path), "RUN": str(run)}

    def placed(text: Any) -> Any:
        for name, place in places.items():
            text = text.replace(name, place) if isinstance(text, str) else text
        return text

    given = {"run": str(run)} | {name: placed(value) for name, value in fields.items()}
    config = settings(Path(given.pop("run")), **given)
    with pytest.raises(UdpRayError) as caught:
        generate(config)
    assert "\n" not in str(caught.value)
    for word in words:
        assert placed(word) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_base_model_that_is_gone_names_its_setting(tmp_path: Path) -> None:
    run = published_run(tmp_path / "there")
    (tmp_path / "there" / "model").rename(tmp_path / "moved")
    with pytest.raises(UdpRayError, match=r"base is missing.*give base.*or set compare_base false"):
        generate(settings(run))
    assert generate(settings(run, compare_base=False)).samples[0].base_text is None
    assert generate(settings(run, base=str(tmp_path / "moved"))).samples[0].base_text is not None
