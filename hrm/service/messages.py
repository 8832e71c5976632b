"""What `POST /infer` and the like take and give."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

_EXAMPLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
_BEGIN: dict[str, JsonValue] = {"session": "mine", "inputs": [_EXAMPLE], "updates": 2}
_GO_ON: dict[str, JsonValue] = {"session": "mine", "updates": 1, "state": True}


class InferRequest(BaseModel):
    """Puzzles, written as `predict` takes them."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"inputs": [_EXAMPLE]}]})

    inputs: list[Any] = Field(description="Sudoku and mazes: text or grids; ARC: {input, puzzle} or a task; lists.")
    act_max_steps: int | None = Field(None, ge=1, description="ACT steps at most; null: the service's default")
    augmentations: int = Field(1, ge=1, description="symmetric copies of each input to try")
    trajectory: bool = Field(False, description="give what was answered after every ACT step too")
    tokens: bool = Field(False, description="give inputs and answers as the model's own tokens too")


class InferResponse(BaseModel):
    """Answers, in the order of the inputs."""

    answers: list[Any] = Field(description="as JSON: grids of digits, rows of a maze, lists of symbols")
    texts: list[str] = Field(description="each answer on one line")
    q_halt: list[float] = Field(description="the probability that an answer is right, as the model estimates it")
    steps: list[int] = Field(description="ACT steps spent, over all augmentations")
    index: list[int] = Field(description="which input each answer is to: a task of ARC may hold several puzzles")
    trajectory: list[list[dict[str, Any]]] | None = Field(
        None,
        description="after every ACT step: answer, q_halt; where the task has rules, keeps_rules, and in broken the "
        "numbers of the cells that break them",
    )
    tokens: list[dict[str, Any]] | None = Field(
        None, description="of each: input, and answers, of all ACT steps with trajectory, else the last"
    )
    model: str = Field(description="what answered")
    ms: float = Field(description="from the request's arrival on")
    id: str | None = Field(default=None, description="its name in the results store: GET /results/{id} gives it again")


class UpdateRequest(BaseModel):
    """A session, and how often to update one of its states."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [_BEGIN, _GO_ON]})

    session: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="its name; null with inputs: one that nobody can guess is drawn",
    )
    inputs: list[Any] | None = Field(None, description="the one puzzle to begin with, as /infer takes it; else null")
    updates: int = Field(1, ge=1, description="of this level's state")
    state: bool = Field(False, description="give all states too")


class UpdateResponse(BaseModel):
    """What the output heads read off a session's states after the updates."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "session": "mine",
                    "answers": [[[5, 3, 4, 6, 7, 8, 9, 1, 2], [6, 7, 2, 1, 9, 5, 3, 4, 8]]],
                    "texts": ["534678912672195348"],
                    "q_halt": [0.93],
                    "q_continue": [0.41],
                    "updates": {"L": 2, "H": 1},
                    "model": "sudoku",
                    "ms": 41.2,
                }
            ]
        }
    )

    session: str = Field(description="its name")
    answers: list[Any] = Field(description="one, as /infer gives it")
    texts: list[str] = Field(description="the answer on one line")
    q_halt: list[float] = Field(description="the value of halting: the probability that the answer is right")
    q_continue: list[float] = Field(description="the value of continuing; one half where the model learnt none")
    updates: dict[str, int] = Field(description="made so far, by level")
    state: str | None = Field(
        None, description="base64 of a .npz: each state by its name [tokens, width], the puzzle's tokens, the updates"
    )
    model: str = Field(description="what answered")
    ms: float = Field(description="from the request's arrival on")
