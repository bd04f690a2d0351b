"""Readers of the data: all layouts give the same examples, and every error names file, line and column."""

import pytest

from megabert.finetune.tasks.readers import file_hashes, locate_data, read_split
from megabert.finetune.tasks.task import GLUE, glue_tasks, read_task
from tests.finetune.helpers.layouts import label, splits, text, write_parquet, write_tsv


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    return write_tsv(tmp_path_factory.mktemp("tsv"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), reverse=True)


@pytest.mark.parametrize("name", GLUE)
def test_both_layouts_give_the_same_examples_with_labels_by_name(name, tsv, parquet):
    task = GLUE[name]
    for split in splits(task):
        examples = read_split(task, tsv, split)
        assert examples == read_split(task, parquet, split)
        assert examples.first == [text(number, 0) for number in range(12)]
        assert examples.second == (None if len(task.texts) == 1 else [text(number, 1) for number in range(12)])
        if split in task.test.values():
            assert examples.labels is None
        elif task.is_regression:
            assert examples.labels == [label(task, number) for number in range(12)]
        else:
            assert examples.labels == [number % len(task.labels) for number in range(12)]
    assert all(len(digest) == 64 for digest in file_hashes(task, tsv, splits(task)).values())


def edit(path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "RTE/train.tsv", "\tnot_entailment\n", "\tmaybe\n",
            r"RTE/train\.tsv, line 3, column label: is 'maybe', expected entailment",
        ),
        (
            "RTE/train.tsv", "\tentailment\n", "\n",
            r"RTE/train\.tsv, line 2: has 3 columns, expected 4: label is missing",
        ),
        (
            "RTE/train.tsv", "\tentailment\n", "\t0\n",
            r"line 2, column label: is '0', expected entailment, not_entailment\.",
        ),
        ("CoLA/train.tsv", "gj04\t1", "gj04\t2", r"CoLA/train\.tsv, line 2, column label: is '2'.*or 0 to 1"),
        (
            "STS-B/train.tsv", "\t0.8\n", "\tnan\n",
            r"STS-B/train\.tsv, line 3, column score: is 'nan', expected a number",
        ),
        (
            "RTE/train.tsv", "sentence1\tsentence2", "sentence2\tsentence3",
            r"RTE/train\.tsv, line 1: has no column sentence1, only index, ",
        ),
        ("RTE/train.tsv", "index", "label", r"RTE/train\.tsv, line 1: has two columns label"),
        (
            "RTE/train.tsv", "on l", "on\tl",
            r"RTE/train\.tsv, line 3: has 5 columns, expected 4: a tab or comma too many",
        ),
        (
            "MRPC/train.tsv", "Quality", "quality",
            r"MRPC/train\.tsv, line 1: has no column Quality, only quality, #1 ID",
        ),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(tmp_path, file, old, new, message):
    write_tsv(tmp_path)
    edit(tmp_path / file, old, new)
    task = next(task for task in GLUE.values() if task.folder == file.split("/")[0])
    with pytest.raises(ValueError, match=message):
        read_split(task, tmp_path, "train")


def test_columns_of_glues_files_are_found_by_name(tmp_path):
    write_tsv(tmp_path)
    path = tmp_path / "RTE/train.tsv"
    before = read_split(GLUE["rte"], tmp_path, "train")
    path.write_text("".join("\t".join(reversed(line.split("\t"))) + "\n" for line in path.read_text().splitlines()))
    assert read_split(GLUE["rte"], tmp_path, "train") == before


def test_many_broken_rows_of_qqp_are_refused(tmp_path):
    write_tsv(tmp_path, count=4)
    path = tmp_path / "QQP/train.tsv"
    path.write_text(path.read_text() + "7\t1\t2\tonly a\n" * 4)
    with pytest.raises(ValueError, match=r"QQP/train\.tsv: 4 of its 8 rows do not have 6 columns"):
        read_split(GLUE["qqp"], tmp_path, "train")


def test_a_missing_part_of_a_parquet_set_is_named(tmp_path):
    write_parquet(tmp_path)
    first = tmp_path / "rte/train-00000-of-00001.parquet"
    content = first.read_bytes()
    first.rename(tmp_path / "rte/train-00000-of-00003.parquet")
    (tmp_path / "rte/train-00001-of-00003.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"rte/train-00002-of-00003\.parquet: no such file; the set has 3 of them"):
        read_split(GLUE["rte"], tmp_path, "train")
    (tmp_path / "rte/train-00002-of-00003.parquet").write_bytes(content)
    assert len(read_split(GLUE["rte"], tmp_path, "train").first) == 36
    first.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet and .* are not parts of one set"):
        read_split(GLUE["rte"], tmp_path, "train")


def test_a_broken_row_is_skipped_in_qqp_and_refused_in_its_test_set(tmp_path):
    write_tsv(tmp_path)
    edit(tmp_path / "QQP/train.tsv", "\t1\n", "\n")
    assert len(read_split(GLUE["qqp"], tmp_path, "train").first) == 11
    edit(tmp_path / "QQP/test.tsv", "\t" + text(3, 1), "")
    with pytest.raises(ValueError, match=r"QQP/test\.tsv, line 5: has 2 columns, expected 3: question2 is missing"):
        read_split(GLUE["qqp"], tmp_path, "test")


def test_missing_files_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has neither SST-2/train\.tsv \(GLUE's layout\) nor sst2/train-\*\.parquet"):
        read_split(GLUE["sst2"], tmp_path, "train")
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2/train.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(ValueError, match="has no examples"):
        read_split(GLUE["sst2"], tmp_path, "train")
    (tmp_path / "SST-2/train.tsv").write_bytes(b"sentence\tlabel\ngood\t1\n\xff\xfe\t0\n")
    with pytest.raises(ValueError, match=r"SST-2/train\.tsv, line 3: not UTF-8: byte 1 is 0xff"):
        read_split(GLUE["sst2"], tmp_path, "train")
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train-0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="not a parquet file that can be read"):
        read_split(GLUE["sst2"], tmp_path, "train")
    (tmp_path / "sst2/train-0.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    with pytest.raises(ValueError, match=r"sst2/train-0\.parquet: not a parquet file that can be read"):
        read_split(GLUE["sst2"], tmp_path, "train")
    with pytest.raises(ValueError, match="no such folder; expected one, or a hub data set such as nyu-mll/glue"):
        locate_data(str(tmp_path / "nothing"), [])


def test_numbers_without_names_are_refused_unless_the_readme_names_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    task, folder = GLUE["rte"], tmp_path / "rte"
    folder.mkdir()
    table = pyarrow.table({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, folder / "train-0.parquet")
    with pytest.raises(ValueError, match="Write the labels as words"):
        read_split(task, tmp_path, "train")
    for odd in (
        b"---\ndataset_info: 7\n---\n",
        b"---\ndataset_info:\n- config_name: rte\n  features: [x]\n---\n",
        b"---\n- 1\n---\n",
    ):
        (tmp_path / "README.md").write_bytes(odd)
        with pytest.raises(ValueError, match="Write the labels as words"):
            read_split(task, tmp_path, "train")
    for odd in (b"[", b'{"info": 3}', b'{"info": {"features": {"label": {"names": 5}}}}'):
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": odd}), folder / "train-0.parquet")
        with pytest.raises(ValueError, match="Write the labels as words"):
            read_split(task, tmp_path, "train")
    (tmp_path / "README.md").write_bytes(b"---\ndataset_info: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: its front matter is not valid YAML"):
        read_split(task, tmp_path, "train")
    names = "names:\n          '0': not_entailment\n          '1': entailment"
    info = "dataset_info:\n- config_name: rte\n  features:\n  - name: label\n    dtype:\n      class_label:\n        "
    info += names
    (tmp_path / "README.md").write_text(f"---\n{info}\n---\nGLUE\n")
    assert read_split(task, tmp_path, "train").labels == [1, 0]
    table = pyarrow.table({"sentence1": ["a", None], "sentence2": ["c", "d"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, folder / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet, row 1, column sentence1: is null, expected a string"):
        read_split(task, tmp_path, "train")
    pyarrow.parquet.write_table(table.drop(["sentence2"]), folder / "train-0.parquet")
    with pytest.raises(ValueError, match="has no column sentence2, only sentence1, label"):
        read_split(task, tmp_path, "train")
    twice = pyarrow.Table.from_arrays([table["label"], *table.columns], ["label", *table.column_names])
    pyarrow.parquet.write_table(twice, folder / "train-0.parquet")
    with pytest.raises(ValueError, match="has 2 columns label, only label, sentence1, sentence2, label"):
        read_split(task, tmp_path, "train")
    latin = pyarrow.array([b"caf\xe9", b"b"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(table.set_column(0, "sentence1", latin), folder / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet: not a parquet file that can be read: 'utf-8' codec"):
        read_split(task, tmp_path, "train")


OWN = "name: own\ntexts: [text]\nlabels: [bad, good]\nmetrics: [accuracy, f1]\ntrain: own.csv\ndev: own.tsv\n"


def test_a_users_task_reads_csv_and_tsv_files(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    task = read_task(tmp_path / "own.yaml")
    (tmp_path / "own.csv").write_text('label,text\ngood,"one, with\ta comma"\nbad,two\n')
    (tmp_path / "own.tsv").write_text('text\tlabel\n"quoted\tgood\n')
    assert read_split(task, tmp_path, "train") == (["one, with\ta comma", "two"], None, [1, 0])
    assert read_split(task, tmp_path, "validation") == (['"quoted'], None, [1])
    (tmp_path / "own.tsv").write_text("text\tlabel\nonly\n")
    with pytest.raises(ValueError, match=r"own\.tsv, line 2: has 1 columns, expected 2: label is missing"):
        read_split(task, tmp_path, "validation")
    (tmp_path / "own.tsv").write_text("words\tlabel\nonly\tgood\n")
    with pytest.raises(ValueError, match=r"own\.tsv, line 1: has no column text, only words, label"):
        read_split(task, tmp_path, "validation")
    (tmp_path / "own.csv").write_text("label,text\ngood,one\rbad,two\n", newline="")
    with pytest.raises(ValueError, match=r"own\.csv, line 2: new-line character seen in unquoted field"):
        read_split(task, tmp_path, "train")
    (tmp_path / "own.csv").write_text('label,text\ngood,"' + "long " * 30_000 + '"\n')
    assert len(read_split(task, tmp_path, "train").first[0]) == 150_000
    (tmp_path / "own.tsv").write_text("text\tlabel\n" + "long " * 30_000 + "\tgood\n")
    assert len(read_split(task, tmp_path, "validation").first[0]) == 150_000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("labels", "lables", "unknown key lables. Did you mean labels?"),
        ("[bad, good]", "[yes, no]", "quote it"),
        ("[bad, good]", "[bad]", "expected two or more different names"),
        (
            "[accuracy, f1]",
            "[pearson]",
            "metrics has 'pearson', which does not fit 2 labels: expected some of accuracy, f1, matthews",
        ),
        ("labels: [bad, good]\n", "", "metrics has 'accuracy', which does not fit a regression"),
        ("[text]", "[a, b, c]", "texts has 3 columns"),
        ("name: own", "name: cola", "which is a GLUE task"),
        ("train: own.csv\n", "", "lacks train"),
        ("train: own.csv", "train: [own.csv]", r"train is \['own.csv'\], expected a string"),
        ("name: own", "name: [a]", r"name is \['a'\], expected a string"),
        ("name: own", "name: ../../own", "name is '../../own', expected letters, digits"),
        ("name: own", "name: ..", "name is '..', expected letters, digits"),
        ("name: own", "name: own\nlabel: text", "label is text, which is one of the texts"),
        ("name: own", "name: own\nlabel: 3", "label is 3, expected a string"),
        ("name: own", "name: own\nname: other", "line 2: duplicate key name"),
        ("metrics: [accuracy, f1]", "metrics: []", "metrics is empty, expected some of accuracy, f1, matthews"),
        ("train: own.csv", "train: ''", "train is empty"),
        ("[bad, good]", '["b\\tad", good]', "labels has 'b.tad', expected names without tabs and line breaks"),
        ("[text]", "[text, text]", "texts: 'text' is listed twice"),
        ("[accuracy, f1]", "[accuracy, accuracy]", "metrics: 'accuracy' is listed twice"),
        ("train: own.csv", "train: 'pipe:touch pwned'", "train begins with pipe:, expected a file: a task file may"),
        ("dev: own.tsv", "dev: ' PIPE:touch pwned'", "dev begins with .*PIPE:, expected a file"),
        ("dev: own.tsv", "dev: https://host/x.tsv", "dev begins with https:, expected a file"),
        ("dev: own.tsv", "dev: own.tsv\ntest: 'hf:a/b'", "test begins with hf:, expected a file"),
        ("dev: own.tsv", 'dev: "a\\0b"', "dev is 'a.x00b', expected the name of a file"),
        ("name: own", "name: own\nclass_path: os.system", "unknown key class_path"),
        ("name: own", "name: !!python/object/apply:os.system [id]", "explicit tags are not supported"),
        ("labels: [bad, good]", "labels: " + "[" * 300 + "]" * 300, "line 1: is nested 301 levels deep"),
        (OWN, "{a: " * 2000 + "1" + "}" * 2000, r"own\.yaml: not valid YAML: maximum"),
        (OWN, "[", "not valid YAML"),
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, old, new, message):
    (tmp_path / "own.yaml").write_text(OWN.replace(old, new))
    with pytest.raises(ValueError, match=message.replace("labels?", r"labels\?")):
        read_task(tmp_path / "own.yaml")


def test_tasks_are_chosen_by_name():
    assert [task.name for task in glue_tasks("all")] == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
    assert [task.name for task in glue_tasks("all,wnli,rte,ax")][8:] == ["wnli", "ax"]
    with pytest.raises(ValueError, match="Did you mean stsb"):
        glue_tasks("cola,sts-b")
    with pytest.raises(ValueError, match="--tasks: 'rte' is listed twice"):
        glue_tasks("rte,cola, rte")
    with pytest.raises(ValueError, match="--tasks ,: names no task; expected all, or some of cola"):
        glue_tasks(",")
