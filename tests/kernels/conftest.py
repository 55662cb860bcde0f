import pytest

from gptj_serve.kernels.weights import OperandType


@pytest.fixture(autouse=True)
def _kernels(cpu_kernels: None, one_torch_thread: None) -> None:
    """Skips where they can't be."""


@pytest.fixture(params=list(OperandType), ids=lambda operand_type: operand_type.name.lower())
def operand_type(request: pytest.FixtureRequest) -> OperandType:
    """Each that this CPU has."""
    if request.param is OperandType.INT8:
        request.getfixturevalue("int8_kernels")
    return request.param
