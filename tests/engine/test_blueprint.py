from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sleeperbench.contracts.access import Access, Needs
from sleeperbench.engine.blueprint import Blueprint, read
from sleeperbench.engine.parameters import Misfit, Unsupported, checker
from sleeperbench.errors import BadInput, BrokenPlugin

HEAD = """import math
from dataclasses import dataclass, field
from sleeperbench import Access, Attack, Defense, Evaluator, Metric, Needs
"""
DATACLASS = "@dataclass(frozen=True, kw_only=True)\n"


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Reads `Thing` from a module that would raise if it were imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def parse(source: str, value: str = "bp_thing:Thing", method: bool = True) -> Blueprint:
        (tmp_path / "bp_thing.py").write_text(HEAD + source + "\nraise RuntimeError('imported')\n")
        return read(value, method=method)

    return parse


def refused(parse, source: str) -> str:
    with pytest.raises(BrokenPlugin) as e:
        parse(source)
    return str(e.value)


def test_reads_everything_of_an_evaluator(parse):
    b = parse(
        f'''{DATACLASS}class Thing(Evaluator):
    """First line.

    More.

    Args:
        ks: Budgets that are tried,
            in images.
        lr: Step; unit: none.
        unused (int): Of no field.

    Differs: nothing.
    """
    INFO = {{"title": "T", "version": 3, "api": 1, "kind": "probe", "deep": [1, (2.5, None)]}}
    NEEDS: ClassVar[Needs] = Needs(scope="zoo", outcome=("model", "inverted"), clean_models=2, white_box=True)
    METRICS = (
        Metric(name="a", unit="fraction", low=0.0, high=1, better="up", doc="A share"),
        Metric("b", "dB", -math.inf, float("inf"), "none", "A ratio"),
    )
    ks: tuple[int, ...] = (1, 2)
    eps: float = 8 / 255
    lr: "float | None" = None
    mode: Literal["x", "y"] = field(default="y")
    COUNT: ClassVar[int] = len("not a field")
'''
    )
    assert (b.base, b.title, b.doc) == ("Evaluator", "T", "First line.")
    assert b.docstring.endswith("Differs: nothing.")
    assert b.info == {"title": "T", "version": 3, "api": 1, "kind": "probe", "deep": [1, (2.5, None)]}
    assert b.needs == Needs(scope="zoo", outcome=("model", "inverted"), clean_models=2, white_box=True)
    assert b.access is None
    assert b.metrics == (
        ("a", "fraction", 0.0, 1, "up", "A share"),
        ("b", "dB", float("-inf"), float("inf"), "none", "A ratio"),
    )
    assert {n: (p.annotation, p.default) for n, p in b.fields.items()} == {
        "ks": ("tuple[int, ...]", (1, 2)),
        "eps": ("float", 8 / 255),
        "lr": ("float | None", None),
        "mode": ("Literal['x', 'y']", "y"),
    }
    assert list(b.fields) == ["ks", "eps", "lr", "mode"]
    assert (b.fields["ks"].doc, b.fields["lr"].doc) == ("Budgets that are tried, in images.", "Step; unit: none.")
    assert b.fields["eps"].doc == ""


def test_defaults_are_those_of_the_contracts(parse):
    b = parse("class Thing(Defense): pass")
    assert (b.access, b.needs, b.snapshot, b.requires) == (Access(), None, "exact", frozenset())
    b = parse("class Thing(Attack): pass")
    assert (b.access, b.needs) == (None, {})
    assert parse("class Thing(Evaluator): pass").needs == Needs()


def test_attack_and_defense_declarations(parse):
    b = parse('class Thing(Attack):\n    NEEDS = {"clean_models": 1}\n    SNAPSHOT = "none"')
    assert b.needs == {"clean_models": 1}
    assert b.snapshot == "none"
    b = parse('class Thing(Defense):\n    REQUIRES = frozenset({"bn"})\n    ACCESS = Access(clean=100, train=True)')
    assert b.requires == {"bn"}
    assert b.access == Access(clean=100, train=True)
    assert type(b.access.clean) is int


def test_follows_bases_and_the_nearest_declaration_wins(parse, tmp_path):
    (tmp_path / "bp_base").mkdir()
    (tmp_path / "bp_base" / "__init__.py").write_text("from .far import Far as Other\nraise RuntimeError('imported')")
    (tmp_path / "bp_base" / "far.py").write_text(
        HEAD + f'{DATACLASS}class Far(Defense):\n    INFO = {{"title": "far", "version": 1}}\n'
        "    ACCESS = Access(references=2)\n    a: int = 1\n    b: int = 1\n"
    )
    b = parse(
        f"import bp_base as bb\n{DATACLASS}class Near(bb.Other):\n    a: int = 2\n"
        f'{DATACLASS}class Thing(Near):\n    INFO = {{"title": "near"}}\n    c: int = 3'
    )
    assert {n: p.default for n, p in b.fields.items()} == {"a": 2, "b": 1, "c": 3}
    assert b.info == {"title": "near"}
    assert b.access == Access(references=2)


def test_a_reexported_class_is_followed(parse, tmp_path):
    (tmp_path / "bp_front.py").write_text("from bp_thing import Thing\n")
    assert parse("class Thing(Defense):\n    'Doc.'", value="bp_front:Thing").doc == "Doc."


def test_no_parent_is_executed_and_namespaces_work(tmp_path, monkeypatch):
    inner = tmp_path / "bp_top" / "space" / "deeper"
    inner.mkdir(parents=True)
    (tmp_path / "bp_top" / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner / "mod.py").write_text(HEAD + "class Thing(Defense):\n    'Doc.'")
    monkeypatch.syspath_prepend(tmp_path)
    assert read("bp_top.space.deeper.mod:Thing", method=True).doc == "Doc."
    assert "bp_top" not in sys.modules


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('    INFO = dict(title="x")', "`INFO` must be literal"),
        ('    INFO = {**{}, "title": "x"}', "`INFO` must be literal"),
        ('    INFO = {"title": "x" + "y"}', "`INFO` must be literal"),
        ('    INFO = {"title": f"{1}"}', "`INFO` must be literal"),
        ("    INFO = {[]: 1}", "`INFO` must be literal"),
        ('    INFO = {"title": {1, 2}}', "`INFO` must hold only what JSON can"),
        ("    INFO = 3", "`INFO` must be a dict"),
        ("    ACCESS = make()", "`ACCESS` must be literal"),
        ("    ACCESS = Access(**{})", "`ACCESS` must be literal"),
        ("    ACCESS = Access(cleam=1)", "did you mean `clean`"),
        ('    ACCESS = Access(model="all")', "`model` is 'all'"),
        ("    ACCESS = Access(clean=True)", "`clean` is True"),
        ('    ACCESS = Access("weights")', "takes keywords only"),
        ("    ACCESS = None", "`ACCESS` must be Access(...)"),
        ("    SNAPSHOT = 1", "`SNAPSHOT` must be a string"),
        ("    SNAPSHOT = 'some'", "`SNAPSHOT` is 'some'; it may be exact, declared, none"),
        ("    REQUIRES = {'bn'}", "`REQUIRES` must be frozenset"),
        ("    NEEDS = {}", "`NEEDS` must be Needs(...)"),
        ("    METRICS = tuple(Metric(n) for n in 'ab')", "`METRICS` must be literal"),
        ("    METRICS = Metric('a', 'b', 0, 1, 'up', 'd')", "`METRICS` must be a tuple"),
        ("    METRICS = (Metric('a', 'b', 0, 1, 'up'),)", "Metric needs name, unit"),
        ("    METRICS = (Metric('a', 'b', 0, 1, 'more', 'd'),)", "`better` is 'more'"),
        ("    lr: float = compute()", "`lr` must be literal"),
        ("    lr: float = 1 / 0", "`lr` must be literal"),
        ("    lr: float = field(default_factory=list)", "give parameter `lr` a literal default"),
        ("    lr: float", "give parameter `lr` a literal default"),
        ("    lr: float = 'x'", "the default of `lr` is 'x'"),
        ("    lr: float = math.inf", "the default of `lr` is inf"),
        ("    lr: float | None = 'none'", "the default of `lr` is 'none', which is no float | None"),
        ("    net: Module = None", "`net: Module` cannot be checked"),
    ],
)
def test_what_is_not_literal_is_named(parse, body, named):
    message = refused(parse, f"{DATACLASS}class Thing(Defense):\n{body}")
    assert named in message
    assert "bp_thing.py" in message


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def Thing(): pass", "is not a class"),
        ("class Thing: pass", "derive the class from one of sleeperbench's"),
        ("class Thing(Unknown): pass", "base class `Unknown` is not found"),
        ("class Thing(Defense): pass\nclass Thing(", "mend the syntax error"),
        ("class Other(Defense): pass", "has no `Thing` at its top level"),
        ("import Thing", "has no `Thing` at its top level"),
        ("Base = object()\nclass Thing(Base): pass", "must be a class statement"),
        ("from bp_nowhere import B\nclass Thing(B): pass", "there is no module `bp_nowhere`"),
        (
            "from bp_thing import Thing as Other\nclass Thing(Defense):\n    lr: float = 1.0",
            "put `@dataclass(frozen=True",
        ),
        ("@dataclass(kw_only=True)\nclass Thing(Defense):\n    lr: float = 1.0", "put `@dataclass(frozen=True"),
        ("class Thing(Defense): pass\nx = " + "(" * 3000 + ")" * 3000, "bp_thing"),
        ("class Thing(Defense): pass\nx = " + "-" * 200_000 + "1", "nests too deeply"),
        ("class Thing(Defense): pass\nx = '\0'", "bp_thing"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(parse, source, named):
    assert named in refused(parse, source)


def test_bases_in_a_circle_end(parse):
    assert "derive the class" in refused(parse, "class A(Thing): pass\nclass Thing(A): pass")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("bp_thing", "must read `package.module:Name`"),
        ("bp_thing:Thing.inner", "must read `package.module:Name`"),
        ("os:system('x')", "must read `package.module:Name`"),
        ("bp_nowhere:Thing", "there is no module `bp_nowhere`"),
        ("bp_thing.sub:Thing", "`bp_thing` is a module"),
        ("math:Thing", "no Python source"),
        ("sys:Thing", "no Python source"),
    ],
)
def test_bad_entry_point_values(parse, value, named):
    with pytest.raises(BrokenPlugin, match=r".") as e:
        parse("class Thing(Defense): pass", value=value)
    assert named in str(e.value)


def test_a_finder_that_raises_only_breaks_this_plugin(parse, monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            raise OSError("no network")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert "OSError: no network" in refused(parse, "class Thing(Defense): pass")


def test_objects_of_data_sets_and_models(parse):
    assert parse("Thing = make(name='a', title='A set')", method=False).title == "A set"
    assert parse("Thing: Source = make(name='a', title=name)", method=False).title == ""
    b = parse("class Thing(nn.Module):\n    '''A net.\n\n    More.'''\n    width: int = compute()", method=False)
    assert (b.title, b.doc, b.fields) == ("A net.", "A net.", {})


THING = f"""{DATACLASS}class Thing(Defense):
    lr: float = 1
    clean: float | int = 0.05
    sizes: tuple[int, ...] = (1,)
    pair: tuple[int, str] = (1, "a")
    size: int | None = None
    mode: Literal['a', 1] = 'a'
    on: bool = False
"""


def test_resolve_fills_and_normalises(parse):
    b = parse(THING)
    full = b.resolve({"sizes": [3, 4], "lr": 2, "pair": [2, "b"]})
    assert full == {"lr": 2.0, "clean": 0.05, "sizes": (3, 4), "pair": (2, "b"), "size": None, "mode": "a", "on": False}
    assert type(full["lr"]) is float
    assert type(b.resolve({})["lr"]) is float
    assert type(b.resolve({"clean": 5})["clean"]) is int
    assert list(full) == list(b.fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "1"), ("lr", True), ("lr", float("nan")), ("lr", 10**400), ("clean", None), ("sizes", 3),
        ("sizes", [1.5]), ("sizes", "12"), ("pair", [1]), ("pair", ["a", 1]), ("size", True), ("size", 1.0),
        ("mode", "b"), ("mode", True), ("on", 1),
    ],
)  # fmt: skip
def test_resolve_refuses_the_wrong_type(parse, key, value):
    b = parse(THING)
    with pytest.raises(BadInput) as e:
        b.resolve({key: value})
    assert f"`{key}` is {value!r}" in str(e.value)
    assert f"wanted: {b.fields[key].annotation}" in str(e.value)
    assert "Thing (bp_thing)" in str(e.value)


def test_resolve_names_the_nearest_parameter(parse):
    with pytest.raises(BadInput, match=r"Thing \(bp_thing\) has no parameter `sizs`: did you mean `sizes`"):
        parse(THING).resolve({"sizs": 1})
    with pytest.raises(BadInput, match="it has none"):
        parse("class Thing(Defense): pass").resolve({"lr": 1})


@pytest.mark.parametrize(
    ("annotation", "value", "wanted"),
    [
        ("int | float", 5, 5),
        ("float | int", 5, 5),
        ("Optional[float]", 1, 1.0),
        ("Union[int, str]", "a", "a"),
        ("dict[str, int]", {"a": 1}, {"a": 1}),
        ("Mapping[str, float]", {"a": 1}, {"a": 1.0}),
        ("list[tuple[float, float]]", [[1, 2]], [(1.0, 2.0)]),
        ("tuple", [1, "a"], (1, "a")),
        ("typing.Any", {"x": []}, {"x": []}),
        ("'int'", 3, 3),
    ],
)
def test_annotations(annotation, value, wanted):
    got = checker(annotation)(value)
    assert got == wanted
    assert type(got) is type(wanted)


def test_annotations_refuse():
    for annotation, value in (
        ("dict[str, int]", {1: 1}),
        ("dict[str, int]", {"a": "b"}),
        ("list[int]", (1.5,)),
        ("None", 0),
    ):
        with pytest.raises(Misfit):
            checker(annotation)(value)
    for annotation in ("torch.Tensor", "int |", "Callable[[int], int]", "3", "set[int]", "tuple[Tensor, ...]"):
        with pytest.raises(Unsupported):
            checker(annotation)


@pytest.mark.parametrize(
    ("annotation", "value", "wanted"),
    [
        ("None", "none", None),
        ("float | None", "none", None),
        ("None | float", "none", None),
        ("Optional[int]", "none", None),
        ("Union[int, bool, None]", "none", None),
        ("'int | None'", "none", None),
        ("Literal['a', 'b'] | None", "none", None),
        ("tuple[float, ...] | None", "none", None),
        ("tuple[float | None, ...]", [1, "none"], (1.0, None)),
        ("list[tuple[str, int | None]]", [["none", "none"]], [("none", None)]),
        ("dict[str, int | None] | None", {"none": "none"}, {"none": None}),
        # What takes the word as it is keeps it, on either side of None.
        ("str | None", "none", "none"),
        ("Optional[str]", "none", "none"),
        ("int | None | str", "none", "none"),
        ("str | (int | None)", "none", "none"),
        ("Literal['none', 'all'] | None", "none", "none"),
        ("Any | None", "none", "none"),
        ("list[str] | None", ["none"], ["none"]),
        # None itself is None, whatever stands beside it.
        ("str | None", None, None),
        ("float | None", None, None),
    ],
)
def test_none_is_written_as_a_word(annotation, value, wanted):
    assert checker(annotation)(value) == wanted


def test_the_word_for_none_is_that_alone_and_fits_only_where_none_does():
    for annotation, value in (
        ("float", "none"), ("int | float", "none"), ("tuple[float, ...]", "none"), ("Literal['a']", "none"),
        ("tuple[float, ...] | None", ["none"]), ("float | None", "None"), ("float | None", ""), ("int | None", False),
        ("float | None", ["none"]), ("None", []),
    ):  # fmt: skip
        with pytest.raises(Misfit):
            checker(annotation)(value)


@pytest.mark.parametrize(
    ("annotation", "written"),
    [("float | None", True), ("tuple[int, ...] | None", True), ("float", False), ("Literal['none', 1] | None", False)],
)
def test_a_misfit_tells_how_none_is_written_where_it_may_be(parse, annotation, written):
    b = parse(f"{DATACLASS}class Thing(Defense):\n    x: {annotation} = {'None' if 'None' in annotation else '1.0'}\n")
    with pytest.raises(BadInput) as e:
        b.resolve({"x": {"a": 1}})
    assert ('(None is written "none")' in str(e.value)) is written


def test_reading_imports_nothing_of_it():
    code = (
        "import sys; from sleeperbench.engine.blueprint import read\n"
        "print(read('sleeperbench.attacks.badnets:BadNets', method=True).title)\n"
        "print([m for m in ('torch', 'numpy', 'sleeperbench.attacks') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["BadNets", "[]"]


def test_path_is_the_file(parse, tmp_path):
    assert Path(parse("class Thing(Defense): pass").path) == tmp_path / "bp_thing.py"
