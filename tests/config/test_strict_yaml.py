from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from pydantic import FiniteFloat

from megabert.config.strict_yaml import Name, build, read_dataclass, read_yaml


@dataclass(frozen=True, kw_only=True)
class Layer:
    width: int
    dropout: FiniteFloat | None = None

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width is {self.width}, expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class Network:
    name: str
    rate: FiniteFloat = 0.1
    kind: Literal["wide", "deep"] = "deep"
    bias: bool = True
    first: Layer = Layer(width=1)
    last: Layer | None = None
    layers: tuple[Layer, ...] = ()
    named: dict[str, Layer] = field(default_factory=dict)
    labels: tuple[Name, ...] = ()


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "network.yaml"
        path.write_text(text)
        return path

    return write


def test_nested_dataclasses_are_built_with_tuples_for_lists_and_defaults_for_missing_keys(file):
    text = """
    name: small
    rate: 5e-5
    first: &first {width: 3, dropout: null}
    layers: [*first, {width: 4, dropout: 0}]
    named: {output: {<<: *first, width: 5}}
    labels: [0, 1, other]
    """
    network = read_dataclass(Network, file(text))
    assert network == Network(
        name="small", rate=5e-5, first=Layer(width=3), layers=(Layer(width=3), Layer(width=4, dropout=0.0)),
        named={"output": Layer(width=5)}, labels=("0", "1", "other"),
    )  # fmt: skip
    assert isinstance(network.layers[1].dropout, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: a", "unknown key nam. Did you mean name?"),
        ("name: a\nzzz: 3", "unknown key zzz. Expected some of bias, first, kind,"),
        ("name: a\nfirst: {widht: 3}", "unknown key first.widht. Did you mean first.width?"),
        ("name: a\nlast: {widht: 3}", "unknown key last.widht. Did you mean last.width?"),
        ("name: a\nlayers: [{width: 3}, {widht: 3}]", "unknown key layers.1.widht. Did you mean layers.1.width?"),
        ("name: a\nnamed: {x: {widht: 3}}", "unknown key named.x.widht. Did you mean named.x.width?"),
        ("", "lacks name."),
        ("name: a\nfirst: {}", "lacks first.width."),
        ("name: 3", "name is 3, expected a string. Quote it."),
        (
            "name: yes",
            "name is True, expected a string. YAML reads a bare yes, no, on, off, true or false as a boolean",
        ),
        ("name: null", "name is None, expected a string."),
        ("name: a\nrate: '5e-5'", "rate is '5e-5', expected a number. Remove the quotes."),
        ("name: a\nrate: fast", "rate is 'fast', expected a number."),
        ("name: a\nrate: true", "rate is True, expected a number."),
        ("name: a\nrate: .nan", "rate is nan, expected a finite number."),
        ("name: a\nrate: 1e999", "rate is inf, expected a finite number."),
        ("name: a\nrate: 1" + 90 * "0" + ".0e300", "rate is inf, expected a finite number."),
        ("name: a\nrate:", "rate is None, expected a number."),
        ("name: a\nkind: long", "kind is 'long', expected wide or deep."),
        ("name: a\nkind: [wide]", "kind is ['wide'], expected wide or deep."),
        ("name: a\nbias: 1", "bias is 1, expected true or false."),
        ("name: a\nfirst: 3", "first is 3, expected keys and values."),
        ("name: a\nfirst: {width: 3.0}", "first.width is 3.0, expected an integer."),
        ("name: a\nfirst: {width: true}", "first.width is True, expected an integer."),
        ("name: a\nfirst: {width: 010}", "first.width is '010', expected an integer."),
        ("name: a\nfirst: {width: 0}", "first.width is 0, expected at least 1."),
        ("name: a\nlayers: {width: 3}", "layers is {'width': 3}, expected a list."),
        ("name: a\nnamed: [3]", "named is [3], expected keys and values."),
        ("name: a\nlabels: [a, yes]", "labels.1 is True, expected a string. YAML reads a bare yes, no,"),
        ("name: a\nlabels: [" + "long " * 30 + ", 1.5]", "labels.1 is 1.5, expected a string. Quote it."),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_file_and_key(file, text, message):
    path = file(text)
    with pytest.raises(ValueError, match="network.yaml") as error:
        read_dataclass(Network, path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", ", line 3: duplicate key a."),
        ("x:\n  a: 1\n  a: 1", ", line 3: duplicate key a."),
        ("a: 1\n2: b", ", line 2: key 2 is not a string: quote it."),
        ("a: 1\n[b]: c", ", line 2: key [...] or {...} is not a string"),
        ("a:\n- &x [*x]", ", line 2: alias *x is inside its own anchor."),
        ("a: &x {b: {<<: *x}}", ", line 1: alias *x is inside its own anchor."),
        ("a: 2026-01-31", ", line 1: YAML reads 2026-01-31 as a timestamp: quote it."),
        ("a: !!python/name:os.system b", ", line 1: tag tag:yaml.org,2002:python/name:os.system: explicit tags"),
        ("a: !!int '3'", ", line 1: tag tag:yaml.org,2002:int: explicit tags are not supported."),
        ("a: [", ": not valid YAML: while parsing a flow node"),
        ("a: *b", ": not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", ": not valid YAML: expected a single document"),
        ("[" * 3000, ": not valid YAML: maximum recursion depth"),
        ("- a", ": is ['a'], expected keys and values."),
        ("text", ": is 'text', expected keys and values."),
    ],
)
def test_unusual_yaml_is_refused_in_one_line(file, text, message):
    path = file(text)
    with pytest.raises(ValueError, match="network.yaml") as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_refused(file):
    path = file("")
    path.write_bytes(b"a: caf\xe9\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5), ("1E5", 1e5), ("1.", 1.0), ("-.5", -0.5), ("1_000", 1000), ("+3", 3), ("no", False),
        ("~", None), ("1:30", "1:30"), ("0x1f", "0x1f"), ("'5e-5'", "5e-5"), ("v1", "v1"), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_plain_values_mean_what_they_look_like(file, text, value):
    read = read_yaml(file(f"a: {text}"))["a"]
    assert read == value
    assert type(read) is type(value)


def test_an_empty_file_has_no_keys(file):
    assert read_yaml(file("# nothing\n")) == {}


@pytest.mark.parametrize(
    ("width", "message"),
    [("widht", "unknown key tasks.a.widht. Did you mean tasks.a.width?"), ("width", "tasks.a.width is -1, expected")],
)
def test_a_part_of_a_file_is_built_with_its_key_in_messages(file, width, message):
    path = file("")
    with pytest.raises(ValueError, match="network.yaml") as error:
        build(Layer, {width: -1}, path, "tasks.a")
    assert str(error.value).startswith(f"{path}: {message}")


def test_aliases_that_multiply_and_huge_files_are_refused_at_once(tmp_path):
    path = tmp_path / "bomb.yaml"
    levels = [f"  - &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    path.write_text("\n".join(["data:", "  - &a0 [x, x, x, x, x, x, x, x, x, x]", *levels]))
    with pytest.raises(ValueError, match=r"bomb.yaml, line 1: aliases make more than 100,000 values"):
        read_yaml(path)
    path.write_bytes(b"a: '" + b"x" * 1_000_000 + b"'")
    with pytest.raises(ValueError, match=r"bomb.yaml: has more than 1,000,000 bytes"):
        read_yaml(path)
    path.write_text("base: &base {width: 3}\nfirst: {<<: *base, depth: 2}\n")
    assert read_yaml(path) == {"base": {"width": 3}, "first": {"width": 3, "depth": 2}}
