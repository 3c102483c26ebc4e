"""Answers of any kind: refused in one sentence with nothing left on disk, or kept as typed."""

import ast
import email
import email.policy
import keyword
import re
import shutil
import sys
import tomllib
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

import pytest
import yaml
from bakery import TEMPLATE
from conftest import ASKED, Bake, Run, default_answers
from cookiecutter.exceptions import FailedHookException
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inspection import inspect, metadata, one_line, words

from check_answers import CONTROL, EMAIL, UNTRACKED

HOSTILE = [
    "He said \"yes\" and 'no', and \"\"\"maybe\"\"\" or '''not'''",
    "one line\nand another",
    "a tab\tand a backslash at the end \\",
    r"C:\new\table and \u0041 and \N{DASH}",
    "Größe, 数字, 👩\N{ZERO WIDTH JOINER}🔬, no\N{NO-BREAK SPACE}break",
    "{{ cookiecutter.license }} {% raw %} %} }} {# braces #} ${run} {x}",
    "- 1: [a, b] # & * ! | > @ = ~ null",
    "<b>bold</b> *star* _under_ `code` [link](x) &amp; $math$ ~~gone~~ ![image](x)",
    "1. first",
    "# heading",
]
TAKEN = set(" ".join(default_answers()["_taken"].values()).split())
TEXTS = [name for name, default in ASKED.items() if isinstance(default, str)]


def read_back(project: Path, answers: dict[str, str]) -> None:
    """Fails where a project does not give back what was answered."""
    inspect(project, answers, plain=False)
    given = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    author = (
        one_line(answers["author_name"]) or f"The authors of {one_line(answers['project_name'])}"
    )
    address = {"email": answers["author_email"]} if answers["author_email"] else {}
    assert (given["name"], given["description"]) == (
        answers["project_slug"],
        answers["description"],
    )
    assert [{**entry, "name": one_line(entry["name"])} for entry in given["authors"]] == [
        {"name": author, **address}
    ]
    logger = yaml.safe_load((project / "configs/defaults.yaml").read_text(encoding="utf-8"))[
        "trainer"
    ]["logger"]
    track = (answers["wandb_project"], answers["wandb_entity"] or None)
    assert (logger["init_args"]["project"], logger["init_args"]["entity"]) == track
    assert author in one_line((project / "LICENSE").read_text(encoding="utf-8"))
    readme = words((project / "README.md").read_text(encoding="utf-8"))
    begin = one_line(f"{answers['project_name']} {answers['description']} First run With Python")
    assert readme.startswith(begin), f"{readme[: len(begin)]!a} is not {begin!a}"
    told = email.message_from_string(metadata(project), policy=email.policy.default)
    assert (told["Name"], one_line(told["Summary"] or "")) == (
        answers["project_slug"],
        one_line(answers["description"]),
    )


PIECES = [
    *HOSTILE,
    *(
        "'",
        '"',
        '"""',
        "\\",
        "\r\n",
        "\t",
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        "{{ 7 * 7 }}",
        "${run}",
        "$(id)",
        "%s",
    ),
    *(
        "..",
        "../",
        "..\\",
        "/etc/passwd",
        "C:\\",
        "~",
        "-",
        "--",
        "|",
        "<",
        ">",
        ":",
        "*",
        "?",
        "&a *a",
        "#",
        ";",
    ),
    *(
        "CON",
        "nul.txt",
        "COM1",
        "aux.",
        "x ",
        ".git",
        ".",
        "yes",
        "null",
        "1e3",
        "0x10",
        "2026-01-01",
        "!!str",
        "---",
    ),
    *(
        "\x00",
        "\x07",
        "\x1b[31m",
        "\x85",
        "\u2028",
        "\udc00",
        "\ufeff",
        "\u202e",
        "\u200d",
        "\uffff",
        "e\u0301",
        "İß",
    ),
    *(
        "العربية",
        "עברית",
        "हिन्दी",
        "ไทย",
        "中文",
        "한국어",
        "ქართული",
        "👩‍👩‍👧",
        "ﬁ",
        "\N{NO-BREAK SPACE}",
        "\n\n",
        "===",
    ),
    *("a", "A1", " ", "   "),
]
ANYTHING = (
    st.lists(st.sampled_from(PIECES) | st.text(st.characters(), max_size=5), max_size=9).map(
        "".join
    )
    | st.text(st.characters(), max_size=80)
    | st.builds(str.__mul__, st.sampled_from(PIECES), st.integers(20, 3000))
)
SEEMLY = {  # what no rule refuses, and is as hostile as can be within the rules
    "project_name": ANYTHING.map(lambda text: CONTROL.sub("", text)).filter(str.strip),
    "description": ANYTHING.map(lambda text: CONTROL.sub("", text)),
    "author_name": ANYTHING.map(lambda text: CONTROL.sub("", text)),
    "author_email": st.just("") | st.from_regex(EMAIL, fullmatch=True),
    "project_slug": st.from_regex("[A-Za-z0-9]([A-Za-z0-9._-]{0,58}[A-Za-z0-9])?", fullmatch=True),
    "package_name": st.from_regex("[A-Za-z][A-Za-z0-9_]{0,59}", fullmatch=True),
    "wandb_project": ANYTHING.map(lambda text: UNTRACKED.sub("", CONTROL.sub("", text))[:128]),
    "wandb_entity": ANYTHING.map(lambda text: UNTRACKED.sub("", CONTROL.sub("", text))[:128]),
}


@st.composite
def hostile(draw: st.DrawFn) -> dict[str, str]:
    """Answers to some questions that take any text; in half of the cases some break the rules."""
    wild = draw(st.just(set()) | st.sets(st.sampled_from(TEXTS), min_size=1, max_size=3))
    asked = draw(st.sets(st.sampled_from(TEXTS), min_size=1)) | wild
    return {name: draw(ANYTHING if name in wild else SEEMLY[name]) for name in sorted(asked)}


def refused(**answers: str) -> list[str]:
    """The sentences that refuse these answers, where one presses Enter at the other prompts."""
    try:
        default_answers(**answers)
    except FailedHookException as error:
        return str(error).splitlines()
    return []


def bake_or_refuse(
    answers: dict[str, str], bake: Bake, folder: Path
) -> tuple[Path | None, list[str]]:
    """Bake into an empty folder; return the project, or the sentences that refused the answers.

    Nothing else may be left.
    """
    (folder / "here").mkdir()
    try:
        project = bake(folder / "here", **answers)
    except FailedHookException as error:
        assert list(folder.rglob("*")) == [folder / "here"]
        return None, str(error).splitlines()
    assert [project] == [*(folder / "here").iterdir()]
    assert [folder / "here"] == [*folder.iterdir()]
    return project, []


def what_to_type(sentence: str) -> tuple[str, str]:
    """The question that a sentence is about, and the answer that it suggests."""
    variable, _, said = sentence.partition(" ")
    instead = re.search(r": type (.+) instead\.$|: type one like (\S+@\S+), or nothing\.$", said)
    assert instead, sentence
    return variable, str(ast.literal_eval(instead[1])) if instead[1] else instead[2]


def test_every_question_that_takes_any_text_is_among_those_that_are_tried() -> None:
    assert sorted(SEEMLY) == sorted(TEXTS)


@pytest.mark.parametrize("text", HOSTILE)
def test_free_text_arrives_unharmed(text: str, bake: Bake) -> None:
    track = UNTRACKED.sub("-", text)
    answers = dict.fromkeys(("project_name", "description", "author_name"), text)
    answers |= {
        "project_slug": "p",
        "package_name": "p",
        "wandb_project": track,
        "wandb_entity": track,
    }
    read_back(bake(**answers), default_answers(**answers))


@pytest.mark.slow
def test_a_thousand_hostile_projects_are_refused_in_a_sentence_or_sound(
    bake: Bake, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended, variables, samples = Counter[str](), Counter[str](), list[tuple[Path, str]]()

    @settings(
        max_examples=1000,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(hostile())
    def judge(answers: dict[str, str]) -> None:
        folder = Path(mkdtemp(dir=tmp_path))
        project, sentences = bake_or_refuse(answers, bake, folder)
        ended["made" if project else "refused"] += 1
        if project:
            baked = default_answers(**answers)
            read_back(project, baked)
            package = baked["package_name"]
            assert package.isidentifier()
            assert not keyword.iskeyword(package)
            if ended["made"] % 20 == 1:
                samples.append((project, package))
                return
        else:
            better = dict(map(what_to_type, sentences))
            assert better.keys() <= answers.keys(), sentences
            left = refused(**answers | better)
            if answers.get("wandb_project") == answers.get("project_slug"):  # told as one
                better |= dict(map(what_to_type, left))
                left = refused(**answers | better)
            assert not left, f"{sentences} But then: {left}"
            variables.update(better.keys())
        shutil.rmtree(folder)

    judge()
    assert sum(ended.values()) >= 1000
    assert min(ended["made"], ended["refused"]) >= 200, ended
    assert set(variables) == set(TEXTS), "an answer that nothing refuses"
    statements = [
        f"sys.path.insert(0, {str(path)!r}); import {name}.data, {name}.network"
        for path, name in samples
    ]
    run(sys.executable, "-B", "-c", "import sys\n" + "\n".join(statements), cwd=tmp_path)
    with capfd.disabled():
        print(f"\n{dict(ended)}, refused for {dict(variables)}, imported {len(samples)}")


NO_FOLDER = [
    "",
    " ",
    ".",
    "..",
    ".git",
    "-x",
    "x.",
    "x ",
    "a b",
    "a/b",
    "../x",
    r"a\b",
    "a:b",
    "größe",
    "a\nb",
    "x" * 61,
]
RESERVED = {
    "CON": "CON-project",
    "nul.txt": "nul-txt",
    "com1": "com1-project",
    "torch": "torch-project",
    "Scikit.Learn": "Scikit-Learn-project",
}
NO_MODULE = ["", "1a", "a b", "a-b", "a.b", "größe", "_x", "__init__", "x" * 61]
HIDING = [
    "class",
    "None",
    "none",
    "torch",
    "Torch",
    "lightning",
    "wandb",
    "main",
    "tests",
    "Configs",
    "runs",
    "json",
]


@pytest.mark.parametrize(
    ("variable", "answer", "instead"),
    [("project_slug", name, r"type '[A-Za-z0-9-]+' instead") for name in NO_FOLDER]
    + [("project_slug", name, f"type '{better}' instead") for name, better in RESERVED.items()]
    + [("package_name", name, r"type '[a-z][a-z0-9_]*' instead") for name in NO_MODULE]
    + [("package_name", name, f"type '{name}_project' instead") for name in HIDING]
    + [
        ("project_slug", "torch!", "type 'torch-project' instead"),
        ("package_name", "class!", "type 'class_project' instead"),
        ("project_name", " ", "type 'My Project' instead"),
        ("author_email", "jo at home", "type one like jo@example.com"),
        ("author_email", "jo..o@example.com", "type one like jo@example.com"),
        ("author_email", 'jo"@example.com\n', "type one like jo@example.com"),
        ("wandb_project", "team/project", "type 'team-project' instead"),
        ("wandb_entity", "x" * 129, f"type '{'x' * 128}' instead"),
        ("description", "a\x07bell", "type 'abell' instead"),
        ("author_name", "half of an emoji: \udc00", "type 'half of an emoji: ' instead"),
    ],
)
def test_a_bad_answer_is_refused_with_what_to_type_instead_and_nothing_left(
    variable: str,
    answer: str,
    instead: str,
    bake: Bake,
    tmp_path: Path,
) -> None:
    output_dir = tmp_path / "here"
    output_dir.mkdir()
    with pytest.raises(FailedHookException) as refusal:
        bake(output_dir, **{variable: answer})
    (sentence,) = str(refusal.value).splitlines()
    assert sentence.startswith(variable)
    assert re.search(instead, sentence)
    assert list(tmp_path.rglob("*")) == [output_dir]


def test_a_slug_that_is_an_absolute_path_makes_no_folder_there(bake: Bake, tmp_path: Path) -> None:
    for accept_hooks in (True, False):
        out = tmp_path / f"out-{accept_hooks}"
        with pytest.raises(FailedHookException, match="no name for a folder"):
            bake(out, accept_hooks, project_slug=str(tmp_path / "deep" / "er"))
        assert not (tmp_path / "deep").exists()
        assert not out.exists()


WRONG = {
    "project_slug": "a/b",
    "package_name": "torch",
    "description": "a bell\x07",
    "author_email": "jo at home",
    "wandb_entity": "team#1",
}


def test_the_command_prints_a_sentence_for_each_wrong_answer_and_nothing_else(
    run: Run, tmp_path: Path
) -> None:
    options = ("--no-input", "--output-dir", str(tmp_path / "out"), str(TEMPLATE))
    command = (sys.executable, "-m", "cookiecutter", *options)
    wrong = [f"{variable}={answer}" for variable, answer in WRONG.items()]
    sentences = run(*command, *wrong, cwd=tmp_path, code=1).splitlines()
    assert [what_to_type(sentence) for sentence in sentences] == [
        ("project_slug", "a-b"),
        ("package_name", "torch_project"),
        ("description", "a bell"),
        ("author_email", "jo@example.com"),
        ("wandb_entity", "team-1"),
    ]
    assert not (tmp_path / "out").exists()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.text(max_size=100)
    | st.sampled_from([*HOSTILE, *sorted(TAKEN | sys.stdlib_module_names), "3D", "x y " * 50])
)
def test_the_derived_names_are_right_when_one_just_presses_enter(name: str) -> None:
    wrong_title = CONTROL.search(name) or not name.strip()
    assert bool(refused(project_name=name)) == bool(wrong_title)
    answers = default_answers(project_name=CONTROL.sub("", name).strip() or "x")
    slug, package = answers["project_slug"], answers["package_name"]
    assert re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", slug)
    assert package.isidentifier()
    assert not keyword.iskeyword(package)
    assert not {slug, package} & (TAKEN | sys.stdlib_module_names)
    assert max(len(slug), len(package), len(answers["wandb_project"])) <= 60


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=70) | st.text("aB1.-_/\\", max_size=8) | st.sampled_from(sorted(TAKEN)))
def test_of_a_wrong_slug_what_derives_from_it_is_not_refused_besides(slug: str) -> None:
    assert {what_to_type(sentence)[0] for sentence in refused(project_slug=slug)} <= {
        "project_slug"
    }


def test_every_module_that_a_name_could_hide_is_known(run: Run, project: Path) -> None:
    needed = "main, lightning.pytorch, sklearn.datasets, tensorboardX, torch.utils.tensorboard"
    needed += ", pytest, hydra, rich"
    files = "{name for name, module in sys.modules.items() if hasattr(module, '__file__')}"
    printed = run(
        sys.executable,
        "-B",
        "-c",
        f"import {needed}, sys; print('modules:', *{files})",
        cwd=project,
    )
    modules = {name.split(".")[0] for name in printed.split("modules: ")[1].splitlines()[0].split()}
    assert "torch" in modules
    known = TAKEN | {"my_project", "sitecustomize", "usercustomize"}
    assert {name for name in modules if name[0] != "_" and name.lower() not in known} == set()
    assert {
        name.lower() for name in {*sys.stdlib_module_names, *keyword.kwlist} if name[0] != "_"
    } <= TAKEN
