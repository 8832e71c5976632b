"""From a checkpoint to answers: a model that takes puzzles as people write them, and files of puzzles."""
