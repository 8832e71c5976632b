"""What the options of several entry points may be, and what people type for them."""

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "bfloat16", "float32", "float16", "float64")
QUANTIZE = ("none", "int8", "fp8")
SAVEABLE_OUTPUTS = (
    "inputs",
    "labels",
    "puzzle_identifiers",
    "logits",
    "q_halt_logits",
    "q_continue_logits",
)
