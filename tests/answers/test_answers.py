"""Equal answers and chosen letters, in every way that a model writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.answers.letter_sets import chosen_letters
from syncr1.engine.answers.letters import chosen_letter, true_letter
from syncr1.engine.answers.plain_texts import canonical
from syncr1.engine.answers.same import same_answer

OPTIONS = ("a cat", "a dog", "two birds", "none of them")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Dog", "dog"),
        ("  dog. ", "dog"),
        ("the dog", "A dog!"),
        ("ｄｏｇ", "dog"),
        ("two", "2"),
        ("Twenty-one dogs", "21 dogs"),
        ("twenty one", "21"),
        ("one hundred and five", "105"),
        ("a hundred", "100"),
        ("two thousand five hundred", "2,500"),
        ("three million two thousand and one", "3002001"),
        ("two three", "2 3"),
        ("zero", "0"),
        ("−5", "-5"),
        (".5", "0.5"),
        ("(30)", "30"),
        ("$5", "5"),
        ("A", "a"),
        ("A.", "a"),
        ("!", "!"),
        ("don't", "Don't."),
        ("हिन्दी", "हिन्दी।"),
    ],
)
def test_same(said: str, right: str) -> None:
    assert same_answer(said, right) and same_answer(right, said)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("", ""),
        ("", "dog"),
        ("o", "dog"),
        ("dogs", "dog"),
        ("hot dog", "dog"),
        ("-5", "5"),
        ("-.5", "5"),
        (".5", "5"),
        ("√3", "3"),
        ("x < 5", "x > 5"),
        ("C++", "C"),
        ("a", "an"),
        ("!", "?"),
        ("2 3", "5"),
        ("nineteen ninety", "109"),
        ("twenty zero", "20"),
        ("one thousand hundred", "1100"),
        ("one thousand hundred", "1000"),
        ("dont", "don't"),
        ("1,00", "100"),
    ],
)
def test_different(said: str, right: str) -> None:
    assert not same_answer(said, right) and not same_answer(right, said)


ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
SMALL = [*ONES.split(), "eighteen", "nineteen"]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905


def spell(number: int) -> str:
    """British English, written apart from the reader under test."""
    for scale, word in ((10**9, "billion"), (10**6, "million"), (1000, "thousand")):
        if number >= scale:
            rest = number % scale
            joint = "" if not rest else " and " if rest < 100 else " "
            return f"{spell(number // scale)} {word}{joint}{spell(rest) if rest else ''}"
    if number >= 100:
        rest = number % 100
        return f"{SMALL[number // 100]} hundred{f' and {spell(rest)}' if rest else ''}"
    if number >= 20:
        return TENS[number // 10 - 2] + (f"-{SMALL[number % 10]}" if number % 10 else "")
    return SMALL[number]


@given(st.one_of(st.integers(0, 1200), st.integers(0, 10**12 - 1)))
def test_every_number_in_words_is_its_digits(number: int) -> None:
    assert canonical(spell(number)) == str(number)
    assert canonical(spell(number).replace("-", " ").replace(" and ", " ")) == str(number)
    assert same_answer(f"about {spell(number)} dogs", f"About {number:,} dogs.")


@given(st.text())
def test_canonical_takes_any_text_and_is_stable(text: str) -> None:
    once = canonical(text)
    assert same_answer(text, text) is bool(text.strip())
    assert once == " ".join(once.split())


@pytest.mark.parametrize(
    "said",
    [
        "B",
        "b",
        "(B)",
        "[B]",
        "B.",
        "B)",
        "(b).",
        "B:",
        "Ｂ",
        "B. a dog",
        "(B) dog",
        "b) Dog!",
        "B: it barks",
        "a dog",
        "DOG",
        "B.\na dog",
    ],
)
def test_letters_and_texts_choose_b(said: str) -> None:
    assert chosen_letter(said, OPTIONS) == "B"


@pytest.mark.parametrize(
    "said",
    [
        "",
        "E",
        "(Z)",
        "1",
        "B or C",
        "B. a cat",
        "A. a dog",
        "A. B. C. D.",
        "A, B",
        "A) B) C)",
        "bird",
        "dogs",
        "BB",
        "<B>",
        "Ä",
        "?",
    ],
)
def test_what_names_no_option(said: str) -> None:
    assert chosen_letter(said, OPTIONS) is None


def test_a_letter_comes_before_a_text_and_a_text_before_a_lettered_one() -> None:
    assert chosen_letter("A", ("B", "A")) == "A"
    assert chosen_letter("a.m.", ("p.m.", "a.m.")) == "B"
    assert chosen_letter("B. I. Newton", ("G. Leibniz", "I. Newton")) == "B"


def test_equal_texts_are_read_as_the_right_one() -> None:
    assert chosen_letter("red", ("red", "blue", "Red")) == "A"
    assert chosen_letter("red", ("red", "blue", "Red"), prefer="C") == "C"
    assert chosen_letter("red", ("red", "blue", "Red"), prefer="B") == "A"


def test_without_options_any_letter_is_one() -> None:
    assert chosen_letter("(K) text", ()) == "K"
    assert chosen_letter("text", ()) is None


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("B", OPTIONS, "B"),
        ("(b)", OPTIONS, "B"),
        ("a dog", OPTIONS, "B"),
        ("E", OPTIONS, None),
        ("fish", OPTIONS, None),
        ("B. a dog", OPTIONS, "B"),
        ("B: it barks", OPTIONS, None),
        ("B. a cat", OPTIONS, None),
        ("B. text", (), None),
        ("E", (), "E"),
        ("fish", (), None),
    ],
)
def test_true_letter(answer: str, options: tuple[str, ...], expected: str | None) -> None:
    assert true_letter(answer, options) == expected


SEVERAL = ("red", "blue", "red and blue", "Paris, France")


@pytest.mark.parametrize(
    ("said", "letters"),
    [
        *((said, "AB") for said in ("A, B", "AB", "A B", "A和B", "B & A", "red, blue", "A. red; B. blue", "(A), (B)")),
        *((said, "AB") for said in (r"\boxed{A, B}", "$A, B$", "{A, B}", "**A**, **B**", "The answers are A and B.")),
        *((said, "AB") for said in ("选AB", "答案：A、B", "Options A and B", "both A and B")),
        *(("red and blue", "C"), ("Paris, France", "D"), ("**C**", "C")),
        *((said, "") for said in ("A, A", "A or B", "ABE", "A, B or C", "A. blue, B. red", "")),
    ],
)
def test_several_letters_in_any_dress(said: str, letters: str) -> None:
    assert chosen_letters(said, SEVERAL) == set(letters)


def test_a_number_without_its_unit_names_none_of_two_options() -> None:
    lengths = ("5 cm", "5 m", "50 mm", "7 km")
    assert [chosen_letter("5", lengths, prefer) for prefer in "AB"] == [None, None]
    assert chosen_letter("7", lengths) == "D"
    assert [chosen_letter("0.05 m", lengths, prefer) for prefer in "AC"] == ["A", "C"]
