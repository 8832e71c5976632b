"""Answer puzzles of a file or a pipe, an answer a line: `hrm predict checkpoint=sudoku input=FILE output=FILE`.

An input is a line: a puzzle as text, JSON, or a row of CSV under a header with `input` or `question`; a file
`<name>.json` is a task of ARC, tasks by their names, or a list. Answers are JSON lines with index (from 0), answer,
q_halt, steps and text; a line that is no puzzle gets index and error. Without input= and output=, or for `-`, stdin is
read and stdout written, each answer as soon as it is there. With puzzle= one is answered as by `hrm evaluate`.

Exit status: 0; 3 where a line could not be answered, though the others were; 2 where nothing could be done.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    if {"--help", "-h"} & set(argv):
        print(
            f"{(__doc__ or '').strip()}\n\nThe other options are those of `hrm evaluate --help`: dtype, device, "
            "act_max_steps, ensemble.augmentations ..."
        )
        return 0
    from hrm.config import EvaluateConfig
    from hrm.config.compose import run
    from hrm.inference.command import evaluate_or_predict

    names = {argument.lstrip("+").partition("=")[0] for argument in argv}
    defaults = [] if names & {"input", "puzzle"} else ["input=-"]
    run(EvaluateConfig, "evaluate", evaluate_or_predict, "hrm predict", [*argv, *defaults])
    return 0
