"""Templates of questions, and tokens of texts."""

import numpy as np
import pytest

from hrm.errors import UserError
from hrm.tasks.text import END, NEXT, Template, TextTokens, padded, slots_of

BOARDS = [
    "A board of size 3 with 1 queen:\n_ Q _\n_ _ _\nComplete it.",
    "A board of size 4 with 2 queen:\n_ Q _\nComplete it.",
]


def test_template_holds_the_wording_that_all_share() -> None:
    template = Template.of(BOARDS)
    assert template.parts == ("A board of size ", None, " with ", None, " queen:\n_ Q _\n", None, "Complete it.") or (
        [part for part in template.parts if part] and str(template).startswith("A board of size ...")
    )
    for board in BOARDS:
        slots = template.slots(board)
        assert slots is not None
        filled = iter(slots)
        assert "".join(next(filled) if part is None else part for part in template.parts) == board


def test_what_is_no_wording_stays_where_it_is() -> None:
    """Rows that all boards have are part of the boards, whose cells must keep their places."""
    template = Template.of(
        ["Fill in the board below.\n_ _ _ _\nQ _ _ _\n", "Fill in the board below.\nQ _ _ _\n_ _ _ _\n"]
    )
    assert template.parts == ("Fill in the board below.\n", None)
    assert template.slots("Fill in the board below.\n_ _\n") == ("_ _\n",)


def test_a_template_fits_questions_outside_its_first_sample() -> None:
    questions = [f"Start from the left side: {number}, please and thank you." for number in range(100)]
    questions.append("Start from the right side: 7, please and thank you.")
    template = Template.of(questions)
    assert all(template.slots(question) is not None for question in questions)
    assert len({template.slots(question) for question in questions}) == len(questions)


@pytest.mark.parametrize(
    ("parts", "text", "slots"),
    [
        ((None,), "ab", ("ab",)),
        (("a", None), "ab", ("b",)),
        (("a", None), "ba", None),
        ((None, "b"), "abab", ("aba",)),  # the last part is at the end
        ((None, "b"), "ba", None),
        ((None, "b", None), "abab", ("a", "ab")),
        (("a", None, "a"), "a", None),  # a part serves once
        (("a",), "a", ()),
        (("a",), "ab", None),
        (("a", "b", None), "abc", ("c",)),
    ],
)
def test_slots(parts: tuple[str | None, ...], text: str, slots: tuple[str, ...] | None) -> None:
    assert Template(parts).slots(text) == slots


def test_a_template_that_fits_nowhere_is_found_out_at_once() -> None:
    assert Template((None, "a") * 2000).slots("a" * 1000 + "b") is None


def test_tokens() -> None:
    template = Template(("Here ", None, " and there ", None))
    symbols = TextTokens.symbols_of(["ab", "b", "ca"], template)
    assert symbols == [END, NEXT, "a", "b", "c"]
    tokens = TextTokens(symbols)
    assert tokens.question(("ab", "c")) == [3, 4, 2, 5]
    answer = padded([tokens.answer("ca"), tokens.answer("")], 4)
    assert answer.tolist() == [[5, 3, 1, 0], [1, 0, 0, 0]]
    assert [tokens.text(row) for row in answer] == ["ca", ""]
    assert tokens.text(np.array([3, 3])) == "aa"  # without an end
    with pytest.raises(UserError, match="it has the character 'd', which the model does not know"):
        tokens.answer("d")
    assert TextTokens.symbols_of(["a"], Template()) == [END, "a"]


def test_questions_that_a_user_gives() -> None:
    one, two = Template(("Sort them: ", None)), Template(("From ", None, " to ", None))
    assert slots_of("Sort them: 3 1", one) == slots_of("3 1", one) == slots_of(["3 1"], one) == ("3 1",)
    assert slots_of("From a to b", two) == slots_of(["a", "b"], two) == ("a", "b")
    for wrong in ("a b", ["a"], ["a", 1], 3, None):
        with pytest.raises(
            UserError, match=r"it does not read as the questions do .* 'From \.\.\. to \.\.\.': give a whole"
        ):
            slots_of(wrong, two)
