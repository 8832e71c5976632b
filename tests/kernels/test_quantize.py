"""The option `quantize`: what it chooses, and where it says no in a sentence."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hrm.config import KernelsConfig
from hrm.errors import UserError
from hrm.kernels import KernelRequest, choice, describe, make_kernels, naive, resolve
from hrm.kernels.naive import MixerWeights
from hrm.kernels.quantize import dtype_beside, quantized

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("quantize", "device", "capability", "sentence"),
    [
        (
            "fp8",
            "cpu",
            None,
            "quantize=fp8 cannot run: it needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), and "
            "this is cpu; take quantize=int8 or none.",
        ),
        (
            "fp8",
            "cuda",
            (8, 0),
            "quantize=fp8 cannot run: it needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), and "
            "this GPU has 8.0; take quantize=int8 or none.",
        ),
        (
            "int8",
            "cuda",
            (7, 0),
            "quantize=int8 cannot run: it needs a CPU or an NVIDIA GPU of compute capability 7.5 or later, and this "
            "GPU has 7.0; take quantize=none.",
        ),
        (
            "int8",
            "mps",
            None,
            "quantize=int8 cannot run: it needs a CPU or an NVIDIA GPU of compute capability 7.5 or later, and this is "
            "mps; take quantize=none.",
        ),
        ("int4", "cpu", None, "quantize=int4 is not a choice; did you mean int8?"),
    ],
)
def test_where_it_cannot_run(
    quantize: str, device: str, capability: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    with pytest.raises(UserError) as raised:
        quantized(KernelsConfig(), quantize, torch.device(device))
    assert str(raised.value) == sentence


def test_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    plain = KernelsConfig("auto", chunk=3)
    assert quantized(plain, "none", CPU) is plain
    assert quantized(plain, "int8", CPU) == KernelsConfig("auto", chunk=3, int8="all")
    assert quantized(plain, "fp8", CUDA) == KernelsConfig("auto", chunk=3, fp8="all")
    with pytest.raises(UserError, match=r"kernels\.fp8=H cannot be combined with kernels\.int8=all: drop one\."):
        quantized(KernelsConfig(fp8="H"), "int8", CPU)


def test_beside_integers_a_cpu_computes_in_float32() -> None:
    assert dtype_beside("int8", "auto", CPU) == "float32"
    assert dtype_beside("int8", "bfloat16", CPU) == "bfloat16"
    assert dtype_beside("int8", "auto", CUDA) == "auto"
    assert dtype_beside("none", "auto", CPU) == "auto"


@pytest.mark.parametrize("option", ["int8", "fp8"])
def test_modules_by_name(option: str) -> None:
    modules = ("H_level", "L_level")
    request = KernelRequest(CPU, torch.float32, 8, block_types=(MixerWeights,), modules=modules)
    config = resolve(KernelsConfig(**{option: "L"}), request)  # type: ignore[arg-type]
    assert f"{option} in L" in describe(config)
    kernels = make_kernels(config, modules)
    assert list(kernels.eight_bit) == ["L_level"]
    blocks = [MixerWeights(*(torch.ones(4, 4) for _ in range(4)))]
    assert kernels.prepare("H_level", blocks) is blocks
    (rounded,) = kernels.prepare("L_level", blocks)
    assert rounded.down[0].dtype in (torch.int8, torch.float8_e4m3fn)
    with pytest.raises(UserError, match=rf"kernels\.{option}=M is not a choice"):
        resolve(KernelsConfig(**{option: "M"}), request)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "recorded", "compiled"),
    [("triton_mixer", True, True), ("triton_mixer", False, False), ("naive", True, False)],
)
def test_what_has_no_kernels_in_8_bit_is_compiled_beside_those_of_mixers(
    backend: str, recorded: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def module(*, compiled: bool) -> Any:
        asked.append(compiled)
        return naive.reasoning_module

    monkeypatch.setattr(choice, "_eight_bit", lambda option: SimpleNamespace(module=module, BLOCK_TYPES=()))
    make_kernels(KernelsConfig(backend, "own", cuda_graphs=recorded, fp8="all", by_core=False), ("L_level",))
    assert asked == [compiled]
