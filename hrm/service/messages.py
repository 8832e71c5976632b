"""What `POST /infer` takes and gives."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_EXAMPLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


class InferRequest(BaseModel):
    """Puzzles, written as `predict` takes them."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"inputs": [_EXAMPLE]}]})

    inputs: list[Any] = Field(description="Sudoku and mazes: text or grids; ARC: {input, puzzle} or a task; lists.")
    act_max_steps: int | None = Field(None, ge=1, description="ACT steps at most; null: the service's default")
    augmentations: int = Field(1, ge=1, description="symmetric copies of each input to try")
    trajectory: bool = Field(False, description="give what was answered after every ACT step too")


class InferResponse(BaseModel):
    """Answers, in the order of the inputs."""

    answers: list[Any] = Field(description="as JSON: grids of digits, rows of a maze, lists of symbols")
    texts: list[str] = Field(description="each answer on one line")
    q_halt: list[float] = Field(description="the probability that an answer is right, as the model estimates it")
    steps: list[int] = Field(description="ACT steps spent, over all augmentations")
    index: list[int] = Field(description="which input each answer is to: a task of ARC may hold several puzzles")
    trajectory: list[list[dict[str, Any]]] | None = Field(None, description="answer and q_halt after every ACT step")
    model: str = Field(description="what answered")
    ms: float = Field(description="from the request's arrival on")
