"""Every combination of choices is a sound project; some, with each pair, are trained and tested."""

import shutil
from itertools import combinations, product
from pathlib import Path

import pytest
from conftest import ASKED, Bake, Run, default_answers
from inspection import inspect
from test_project import OWN_TESTS, RUFF_CHECK, RUFF_FORMAT

from hooks.post_gen_project import unwanted

Answers = dict[str, str]
CHOICES = {
    name: default if isinstance(default, list) else ["no", "yes"]
    for name, default in ASKED.items()
    if not isinstance(default, str)
}
ALL = [dict(zip(CHOICES, answers, strict=True)) for answers in product(*CHOICES.values())]


def pairs(answers: Answers) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(sorted(answers.items()), 2))


def pairwise(candidates: list[Answers]) -> list[Answers]:
    """Return a few in which every two answers meet.

    Always the next one with most pairs that have not met yet.
    """
    left, few = set().union(*map(pairs, candidates)), list[Answers]()
    while left:
        few.append(max(candidates, key=lambda answers: len(pairs(answers) & left)))
        left -= pairs(few[-1])
    return few


def parts(**answers: str) -> list[str]:
    return unwanted(default_answers(**answers))


# The options that change which files there are; each combination of theirs stands for all of its
# files.
STRUCTURAL = [
    name
    for name, values in CHOICES.items()
    if len({str(parts(**{name: value})) for value in values}) > 1
]


def test_every_two_answers_meet_in_the_few_that_stand_for_all() -> None:
    few = pairwise(ALL)
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, ALL))
    assert max(map(len, CHOICES.values())) <= len(few) < 20 < len(ALL)


@pytest.mark.parametrize(
    "several", [pairwise(ALL), pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_combination_is_a_sound_project_that_ruff_leaves_as_it_is(
    several: list[Answers], bake: Bake, run: Run, tmp_path: Path
) -> None:
    for number, answers in enumerate(several):
        project = bake(tmp_path / "baked" / str(number), **answers)
        try:
            inspect(project, default_answers(**answers))
        except Exception as error:
            error.add_note(f"with {answers}")
            raise
    for command in (RUFF_CHECK, RUFF_FORMAT):
        run(*command, cwd=tmp_path / "baked")
    shutil.rmtree(tmp_path / "baked")


@pytest.mark.slow
@pytest.mark.parametrize(
    "answers",
    pairwise([{name: answers[name] for name in STRUCTURAL} for answers in ALL]),
    ids=lambda answers: "-".join(answers.values()),
)
def test_a_combination_passes_its_own_tests(
    answers: Answers, bake: Bake, run: Run, tmp_path: Path
) -> None:
    assert " passed" in run(*OWN_TESTS, cwd=bake(tmp_path, **answers))


@pytest.mark.slow
def test_a_project_for_which_no_hook_ran_passes_its_own_tests(
    bake: Bake, run: Run, tmp_path: Path
) -> None:
    assert " passed" in run(*OWN_TESTS, cwd=bake(tmp_path, accept_hooks=False))
