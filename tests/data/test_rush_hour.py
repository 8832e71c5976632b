"""The search that finds answers to Rush Hour."""

import pytest

from hrm.data.builders.rush_hour import fewest_moves


@pytest.mark.parametrize(
    ("board", "moves"),
    [
        ("....BB\n......\nAA....\n......\n......\n......", "A+4"),
        ("......\n...B..\nAA.B..\n......\n......\n......", "B+2 A+4"),
        ("...B..\n...B..\nAA.B..\n......\n......\n......", "B+3 A+4"),  # up is no room for three cells
        ("...B..\n...B..\nAA.B..\n...x..\n......\n......", None),
        ("......\n......\nAA..x.\n......\n......\n......", None),
        ("......\n......\n....AA\n......\n......\n......", None),  # nothing to move
    ],
)
def test_fewest_moves(board: str, moves: str | None) -> None:
    assert fewest_moves(board) == moves


def test_a_search_has_an_end() -> None:
    assert fewest_moves("...B..\n...B..\nAA.B..\n......\nCC....\nDD....", most_states=10) is None
