"""Data files into prompts: values, ids, templates and errors, against hand-written expectations and real rows."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from spo_lightning.data import PromptDataset, PromptFormatter, PromptSource, load_prompts

from tiny_models import make_byte_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real rows in {REAL}")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}</think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerFast:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, limit: int = 1000, **source: object) -> PromptDataset:
    return load_prompts(PromptSource(str(path), **source), PromptFormatter(tokenizer), limit)  # type: ignore[arg-type]


# Values


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, plain, suffix):
    rows = [
        {"problem": 'What is "2,5"\n+ 1?', "solution": "025", "extra": "x"},
        {"problem": "é?", "solution": "\\frac{1}{2}", "extra": "y"},
    ]
    dataset = load(
        write_rows(tmp_path / f"rows{suffix}", rows), plain, prompt_column="problem", answer_column="solution"
    )
    assert dataset.texts == ['What is "2,5"\n+ 1?', "é?"]
    assert dataset.references == ["025", "\\frac{1}{2}"]
    assert [prompt.index for prompt in dataset] == [0, 1]
    assert [plain.decode(prompt.token_ids) for prompt in dataset] == dataset.texts
    # blake2b, 8 bytes, of json.dumps(["é?", "\\frac{1}{2}"]); ids must never change: value files name prompts by them
    assert dataset[1].id == "be768f13a9abae1b"
    assert dataset.num_merged == dataset.num_filtered == 0


def test_answers_become_text_without_losing_anything(tmp_path, plain):
    cells = [70, 70.0, "025", 25, 0.5, 2**99, -3, "2020-01-01", " \\sqrt{2} ", "1e3", 1e-5, -2.5e-7, 1e22]
    texts = ["70", "70", "025", "25", "0.5", str(2**99), "-3", "2020-01-01", "\\sqrt{2}", "1e3"]
    texts += ["0.00001", "-0.00000025", "1" + 22 * "0"]
    rows = [{"prompt": f"p{i}", "answer": cell} for i, cell in enumerate(cells)]
    assert load(write_rows(tmp_path / "rows.jsonl", rows), plain).references == texts


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path, plain):
    content = b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\n\n{"prompt": "b", "answer": 2}\n\n'
    for name in ("rows.jsonl", "lines.json"):
        (tmp_path / name).write_bytes(content)
        assert load(tmp_path / name, plain).references == ["1", "2"]
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfprompt,answer\na,1\n\nb,2\n")
    assert load(tmp_path / "rows.csv", plain).references == ["1", "2"]
    (tmp_path / "rows.csv").write_text(",prompt,answer\n0,a,1\n1,b,2\n")  # with its row numbers, as pandas writes it
    assert load(tmp_path / "rows.csv", plain).references == ["1", "2"]


def test_conversations_end_with_the_user(tmp_path, chat, plain):
    talk = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "+1?"},
    ]
    path = write_rows(tmp_path / "rows.parquet", [{"prompt": talk, "answer": 3}, {"prompt": talk[2:], "answer": 3}])
    dataset = load(path, chat)
    assert dataset.texts == ["+1?", "+1?"]
    assert chat.decode(dataset[0].token_ids) == "<user>1+1?<assistant>2<user>+1?<assistant>"
    assert dataset[0].id != dataset[1].id  # the same last message after another history is another prompt
    with pytest.raises(ValueError, match=r"row 1.*3 messages needs a chat template"):
        load(path, plain)


# Templates


def test_instruction_system_prompt_and_template_variables(chat):
    formatter = PromptFormatter(
        chat, instruction="\n\nBox it.", system_prompt="Be brief.", chat_template_kwargs={"enable_thinking": False}
    )
    ask = {"role": "user", "content": "1+1?"}
    assert formatter.render([ask]) == "<system>Be brief.<user>1+1?\n\nBox it.<assistant></think>"
    own = [{"role": "system", "content": "Own."}, ask]
    assert formatter.render(own) == "<system>Own.<user>1+1?\n\nBox it.<assistant></think>"
    assert own == [{"role": "system", "content": "Own."}, {"role": "user", "content": "1+1?"}]  # untouched
    assert PromptFormatter(chat, instruction="!", chat_template="never").render([ask]) == "1+1?!"


def test_special_tokens_are_written_once():
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert PromptFormatter(tokenizer).encode(["ab"])[0].count(bos) == 1  # a base model gets its own beginning
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    formatter = PromptFormatter(tokenizer)
    ids = formatter.encode([formatter.render([{"role": "user", "content": "ab"}])])[0]
    assert ids[0] == bos and ids.count(bos) == 1


def test_missing_template_is_refused_where_it_is_needed(plain):
    with pytest.raises(ValueError, match="'always', but the tokenizer has none"):
        PromptFormatter(plain, chat_template="always")
    with pytest.raises(ValueError, match="system_prompt is 'x'.*chat_template_kwargs is"):
        PromptFormatter(plain, system_prompt="x", chat_template_kwargs={"enable_thinking": False})


# Length, ids, duplicates


def test_over_long_prompts_are_left_out_and_counted(tmp_path, plain):
    rows = [{"prompt": "x" * n, "answer": n} for n in (3, 9, 4, 5)]
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows), plain, limit=4)
    assert dataset.references == ["3", "4"] and dataset.num_filtered == 2
    assert [(prompt.index, len(prompt.token_ids)) for prompt in dataset] == [(0, 3), (1, 4)]
    with pytest.raises(ValueError, match="none of 4 prompts has at most 2 tokens, the shortest has 3; raise"):
        load(tmp_path / "rows.jsonl", plain, limit=2)


def test_ids_survive_reordering_and_fingerprint_does_not(tmp_path, plain):
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(5)]
    forward = load(write_rows(tmp_path / "a.jsonl", rows), plain)
    backward = load(write_rows(tmp_path / "b.jsonl", rows[::-1]), plain)
    shorter = load(tmp_path / "a.jsonl", plain, max_rows=4)
    again = load(write_rows(tmp_path / "c.csv", rows), plain)
    assert forward.ids == backward.ids[::-1] and len(set(forward.ids)) == 5
    assert shorter.ids == forward.ids[:4]
    assert again.fingerprint == forward.fingerprint
    assert len({forward.fingerprint, backward.fingerprint, shorter.fingerprint}) == 3


def test_equal_rows_are_merged_and_other_answers_are_other_prompts(tmp_path, plain):
    rows = [
        {"prompt": p, "answer": a, "key": k} for p, a, k in [("p", 1, "x"), ("p", 2, "y"), ("p", 1, "z"), ("q", 1, "x")]
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    dataset = load(path, plain)
    assert list(zip(dataset.texts, dataset.references, strict=True)) == [("p", "1"), ("p", "2"), ("q", "1")]
    assert dataset.num_merged == 1 and len(set(dataset.ids)) == 3
    with pytest.raises(ValueError, match=r"rows 1 and 4 both have the id 'x' in column 'key'.*correct the file"):
        load(path, plain, id_column="key")
    assert load(path, plain, id_column="key", max_rows=3).ids == ["x", "y", "z"]


def test_tokens_are_kept_in_one_tensor_of_4_bytes_a_token(tmp_path, plain):
    dataset = load(write_rows(tmp_path / "r.jsonl", [{"prompt": "x" * 7, "answer": i} for i in range(9)]), plain)
    tensors = [value for value in vars(dataset).values() if isinstance(value, torch.Tensor)]
    assert any(t.dtype == torch.int32 and t.shape == (63,) for t in tensors)


def test_index_out_of_range(tmp_path, plain):
    dataset = load(write_rows(tmp_path / "r.jsonl", [{"prompt": "x", "answer": 1}]), plain)
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"prompt {index} of a data set of 1"):
            dataset[index]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_columns_lie_within_records_too(tmp_path, plain, monkeypatch, kind):
    """verl's columns. A name with a dot that is a column's own means that column."""
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra": {"index": {"id": number}},
            "a.b": f"own {number}",
        }
        for number, (text, truth) in enumerate([("1 + 1", "2"), ("2 + 2", "4")])
    ]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        write_rows(path, rows)
    else:
        path.mkdir()
        write_rows(path / "train.jsonl", rows)
    given = {"answer_column": "reward_model.ground_truth", "id_column": "extra.index.id"}
    dataset = load(path, plain, **given)
    assert (dataset.texts, dataset.references, dataset.ids) == (["1 + 1", "2 + 2"], ["2", "4"], ["0", "1"])
    assert load(path, plain, answer_column="a.b").references == ["own 0", "own 1"]
    with pytest.raises(
        ValueError, match="no 'reward_model.truth': its column 'reward_model' holds .*'ground_truth'; set"
    ):
        load(path, plain, answer_column="reward_model.truth")
    with pytest.raises(ValueError, match="row 1: column 'reward_model' holds records; .*reward_model.ground_truth"):
        load(path, plain, answer_column="reward_model")


def test_an_empty_cell_stays_empty_within_records_and_beside_them(tmp_path, plain):
    rows = [
        {"prompt": "a", "answer": 1, "x": {"value": None, "id": "p"}, "x.id": None},
        {"prompt": "b", "answer": 2, "x": {"value": None, "id": "q"}, "x.id": "own"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert load(path, plain, value_column="x.value").start_values.isnan().all()
    with pytest.raises(ValueError, match="row 1: column 'x.id' is empty"):
        load(path, plain, answer_column="x.id")


# Errors: value, rule, remedy

GOOD = '{"prompt": "a", "answer": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "r.jsonl",
            GOOD,
            {"prompt_column": "promt"},
            r"no column 'promt'; it has 'prompt', 'answer': did you mean 'prompt'\?",
        ),
        ("r.jsonl", GOOD, {"answer_column": "Answer"}, "did you mean 'answer'"),
        ("r.csv", "prompt,answer\na,1\n", {"id_column": "zzz"}, "no column 'zzz'.*set the column option"),
        ("r.jsonl", GOOD + '{"prompt": "b", "answer": ""}\n', {}, "row 2: column 'answer' is empty; fill it or remove"),
        ("r.jsonl", GOOD + '{"prompt": "b"}\n', {}, "row 2: column 'answer' is empty"),
        ("r.jsonl", GOOD + '{"prompt": "b", "answer": NaN}\n', {}, "row 2: column 'answer' is empty"),
        ("r.jsonl", GOOD + '{"prompt": null, "answer": 1}\n', {}, r"row 2: the prompt \(column 'prompt'\) is empty"),
        ("r.jsonl", GOOD + '{"prompt": " ", "answer": 1}\n', {}, r"row 2: the prompt \(column 'prompt'\) is empty"),
        ("r.jsonl", '{"prompt": [], "answer": 1}\n', {}, r"row 1: the prompt \(column 'prompt'\) is empty"),
        ("r.jsonl", '{"prompt": 5, "answer": 1}\n', {}, "row 1: the prompt .* is a int; it must be text or a list"),
        ("r.jsonl", '{"prompt": [{"role": "user"}], "answer": 1}\n', {}, "row 1: .*a list of {role, content}"),
        (
            "r.jsonl",
            '{"prompt": [{"role": "assistant", "content": "x"}], "answer": 1}\n',
            {},
            "row 1: the conversation .*must end with a user message",
        ),
        (
            "r.jsonl",
            '{"prompt": "a", "answer": ["1"]}\n',
            {},
            "row 1: column 'answer' is a list; it must be text or a num",
        ),
        (
            "r.jsonl",
            GOOD + r'{"prompt": "1 \ud83d 2", "answer": 1}',
            {},
            r"row 2: '1 \\ud83d 2' holds '\\ud83d', half of a surrogate pair and no character; correct the text or",
        ),
        ("r.jsonl", r'{"prompt": "a", "answer": "\ud83d"}', {}, "row 1: .* half of a surrogate pair"),
        ("r.jsonl", GOOD + "{oops\n", {}, "line 2 is not JSON: .*each line must be one JSON object"),
        ("r.jsonl", GOOD + "[1]\n", {}, "line 2 is a JSON list; each row must be an object"),
        ("r.jsonl", b'{"prompt": "\xff", "answer": 1}\n', {}, "line 1 is not JSON"),
        ("r.json", '[{"prompt": "a", "answer": 1},', {}, "is not JSON: .*one array of objects"),
        ("r.json", "[3]", {}, "row 1 is a JSON int"),
        ("r.csv", 'prompt,answer\n"x,1\n', {}, "line 2 is not CSV"),
        ("r.csv", "prompt,answer\na,1\nx,1,2\n", {}, "row 2 does not have 2 cells like the header; quote"),
        ("r.csv", "prompt,answer\nx\n", {}, "row 1 does not have 2 cells"),
        ("r.csv", b"prompt,answer\n\xff,1\n", {}, "is not CSV in UTF-8"),
        ("r.parquet", "no parquet", {}, "is not Parquet"),
        ("r.txt", GOOD, {}, r"suffix '.txt'; known are .jsonl, .json, .csv, .parquet: rename or convert"),
        ("r.jsonl", "", {}, "has no rows"),
        ("r.json", "[]", {}, "has no rows"),
        ("r.csv", "", {}, "has no rows"),
        ("r.csv", "prompt,answer\n", {}, "has no rows"),
        (
            "r.jsonl",
            GOOD,
            {"answer_pattern": "#### (.+)"},
            "row 1: answer_pattern '#### .* finds nothing in '1'; correct",
        ),
        ("r.jsonl", '{"prompt": "a", "answer": 1, "v": 1.5}\n', {"value_column": "v"}, r"'v' is 1.5; .* in \[0, 1\]"),
        ("r.jsonl", '{"prompt": "a", "answer": 1, "v": "x"}\n', {"value_column": "v"}, r"row 1: column 'v' is 'x'"),
        ("r.jsonl", '{"prompt": "a", "answer": 1, "id": null}\n', {"id_column": "id"}, "row 1: column 'id' is empty"),
        ("r.jsonl", GOOD, {"split": "test", "name": "main"}, "name 'main', split 'test' given with the single file"),
    ],
)
def test_malformed_data_names_place_rule_and_remedy(tmp_path, plain, name, content, options, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load(path, plain, **options)
    assert name in str(caught.value)


def test_parquet_without_rows(tmp_path, plain):
    empty = pyarrow.table(
        {"prompt": pyarrow.array([], pyarrow.string()), "answer": pyarrow.array([], pyarrow.string())}
    )
    parquet.write_table(empty, tmp_path / "r.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        load(tmp_path / "r.parquet", plain)


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "./nothing", "/nowhere/at/all", "data.PARQUET"])
def test_a_path_that_looks_like_a_file_is_never_asked_from_the_hub(plain, path):
    with pytest.raises(FileNotFoundError, match="does not exist .*correct the path, or give a hub name"):
        load_prompts(PromptSource(path), PromptFormatter(plain), 100)


def test_hub_out_of_reach_says_how_to_go_on(plain, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot load 'some-org/none-such'.*set path to that file"):
        load_prompts(PromptSource("some-org/none-such", name="main"), PromptFormatter(plain), 100)


def test_folder_goes_through_datasets_with_its_splits(tmp_path, plain, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"prompt": "a", "answer": 1}])
    write_rows(folder / "test.jsonl", [{"prompt": "b", "answer": 2}, {"prompt": "c", "answer": 3}])
    assert load(folder, plain, split="test").references == ["2", "3"]
    assert load(folder, plain, split="test[:1]").references == ["2"]
    with pytest.raises(ValueError, match="no column 'question'"):
        load(folder, plain, prompt_column="question")
    (folder / "train.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": ')
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded by datasets: .*JSON"):
        load(folder, plain)


def test_source_collects_every_problem():
    with pytest.raises(ValueError, match="path is empty.*max_rows is 0.*answer_pattern .* is no regular expression"):
        PromptSource("", max_rows=0, answer_pattern="(")


# Real rows


@needs_real_rows
def test_gsm8k_answers_follow_the_hashes(plain):
    dataset = load(
        REAL / "gsm8k" / "train.jsonl", plain, limit=10_000, prompt_column="question", answer_pattern=r"####\s*(.+)$"
    )
    assert len(dataset) == 7473 and dataset.references[:3] == ["72", "10", "5"]
    assert all(reference.replace(",", "").lstrip("-").replace(".", "", 1).isdigit() for reference in dataset.references)


@needs_real_rows
@pytest.mark.parametrize("name", ["aime_2024", "aime_2025", "brumo_2025", "hmmt_feb_2025"])
def test_benchmark_rows_arrive_unchanged(plain, name):
    path = REAL / "benchmarks" / f"{name}.jsonl"
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    dataset = load(
        path, plain, limit=10_000, prompt_column="problem", id_column="id" if "id" in raw[0] else "problem_idx"
    )
    assert len(dataset) == 30
    assert dataset.texts == [row["problem"] for row in raw]
    assert dataset.references == [str(row["answer"]).strip() for row in raw]
    if name == "aime_2024":
        assert "025" in dataset.references and dataset.ids[0] == "60"


def test_importing_the_data_package_stays_light():
    heavy = "{'lightning', 'transformers', 'datasets', 'pyarrow', 'vllm'} & set(sys.modules)"
    code = f"import sys, spo_lightning.data; sys.exit(str({heavy}) if {heavy} else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
