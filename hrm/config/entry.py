"""What the options of several entry points may be, and what people type for them."""

DEVICES = ("auto", "cuda", "mps", "cpu")
SAVEABLE_OUTPUTS = (
    "inputs",
    "labels",
    "puzzle_identifiers",
    "logits",
    "q_halt_logits",
    "q_continue_logits",
)
