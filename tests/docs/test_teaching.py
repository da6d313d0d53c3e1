"""The pages for a course are complete: solutions, schedules, marking, slides."""

import re
from pathlib import Path

import pytest
from PIL import Image

from minilora.course.exercises import EXERCISES
from minilora.course.puzzles import ALL

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEACHING = (DOCS / "teaching.md").read_text(encoding="utf-8")
SOLUTIONS = (DOCS / "solutions.md").read_text(encoding="utf-8")
DECKS = sorted((DOCS / "slides").glob("*.md"))
each_deck = pytest.mark.parametrize("deck", DECKS, ids=lambda deck: deck.stem)


def exercises_of(text):
    """The numbers of the exercises that end a text."""
    return re.findall(r"^(?:# )?(\d+)\. ", text.partition("## Exercises")[2], re.M)


def test_every_exercise_has_a_collapsed_solution():
    sections = re.split(r"^## ", SOLUTIONS, flags=re.M)[1:]
    solved = {section.partition("\n")[0]: section for section in sections}
    asked = {"For teachers": exercises_of(TEACHING)}
    for path in sorted((ROOT / "tutorials").glob("*.py")):
        (title,) = [name for name in solved if name.startswith(f"Tutorial {path.stem[:2]}")] or [""]
        asked[title or path.stem] = exercises_of(path.read_text(encoding="utf-8"))
    assert sum(map(len, asked.values())) == 29 + 6
    assert set(solved) == {title for title, numbers in asked.items() if numbers}
    for title, section in solved.items():
        found = re.findall(r"^<details><summary>(\d+)\. .+</summary>\n\n", section, re.M)
        assert found == asked[title], title
        assert section.count("</details>") == len(found)


def test_the_weeks_hold_every_exercise_of_the_course_and_its_hours():
    weeks = re.findall(r"^\| \d, .*\|$", TEACHING, re.M)
    given = []
    for week in weeks:
        _, _, _, names, hours, *_ = (cell.strip() for cell in week.split("|"))
        exercises = [EXERCISES[name] for name in re.findall(r"`(\w+)`", names)]
        given += [exercise.name for exercise in exercises]
        assert abs(sum(e.minutes for e in exercises) / 60 - float(hours)) <= 0.051, week
    assert len(weeks) == 4 and sorted(given) == sorted(EXERCISES)
    for name in given:  # nothing is set before what it needs
        before = given[: given.index(name)]
        assert set(EXERCISES[name].needs) <= set(before), name


def test_the_hours_beside_two_lectures_are_those_of_their_exercises():
    """Half an hour more for each tutorial, 20 minutes for the rest of what is read."""
    rows = re.findall(r"^\| (before lecture 1|between|after) \| (.*) \| (.*) \|$", TEACHING, re.M)
    assert len(rows) == 3
    for when, what, hours in rows:
        minutes = sum(ALL[name].minutes for name in re.findall(r"`(?:.* )?(\w+)`", what))
        minutes += 60 * ("tutorials" in what)
        assert minutes / 60 <= float(hours) + 0.05, (when, minutes / 60)


def test_the_shares_of_the_mark_and_the_points_of_each_rubric_add_up():
    section = TEACHING.partition("## Marking")[2].partition("\n## ")[0]
    assert sum(map(int, re.findall(r"\| (\d+) % \|", section))) == 100
    for table in re.split(r"^\| of an? ", section, flags=re.M)[1:]:
        of = int(re.match(r"\w+ \| of (\d+) \|", table)[1])
        assert sum(map(int, re.findall(r"\| (\d+) \|$", table, re.M))) == of


@each_deck
def test_a_deck_has_ninety_minutes_and_three_questions(deck):
    text = deck.read_text(encoding="utf-8")
    times = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+)–(\d+) \|", text, re.M)]
    assert times[0][0] == 0 and times[-1][1] == 90
    assert all(end == start for (_, end), (start, _) in zip(times, times[1:], strict=False))
    questions = re.findall(r"^## Question \d\n(.*?)(?=^## )", text, re.M | re.S)
    assert len(questions) == 3
    for question in questions:
        assert re.findall(r"^- (\w): ", question, re.M) == ["a", "b", "c"], question
        right = re.search(r"<details><summary>Answer</summary>\n\n([abc])\. ", question)[1]
        wrong = re.search(r"usual wrong answer is ([abc])", " ".join(question.split()))[1]
        assert right != wrong


@each_deck
def test_the_pictures_of_a_deck_are_those_of_the_tutorials(deck):
    """By their titles: one that says something else now has to be made anew."""
    text = deck.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)]+\.png)\)", text):
        stem, number = re.fullmatch(r"(\w+)-(\d+)\.png", name).groups()
        tutorial = (ROOT / "tutorials" / f"{stem}.py").read_text(encoding="utf-8")
        titles = re.findall(r'^show\(\w+, f?"(.*)"\)$', tutorial, re.M)
        with Image.open(deck.parent / name) as picture:
            assert picture.text["Title"] == titles[int(number) - 1], name


@each_deck
def test_a_deck_hands_out_exercises_that_there_are(deck):
    for names in re.findall(r"--only (.*)$", deck.read_text(encoding="utf-8"), re.M):
        assert set(names.split()) <= set(ALL)


def test_every_lecture_has_a_deck():
    assert [deck.stem for deck in DECKS] == ["lecture1", "lecture2"]
    for deck in DECKS:
        assert f"(slides/{deck.name})" in TEACHING
