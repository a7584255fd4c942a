"""What several test files share: the one real language model, and one trained to refuse a topic, made once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """For networks so small that torch's threads cost more than they save."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def loaded_smollm():
    from abjure.demo import MissingInput, smollm

    try:
        return smollm.Chat(smollm.model_file())
    except MissingInput as err:
        pytest.skip(str(err))


@pytest.fixture
def smollm(loaded_smollm):
    """SmolLM2-135M-Instruct as `abjure.demo.smollm.Chat`. Every test sees the same weights: edit a deep copy."""

    def weights() -> int:
        import torch

        return sum(int(p.detach().view(-1).view(torch.int64).sum()) for p in loaded_smollm.model.parameters())

    before = weights()
    yield loaded_smollm
    assert weights() == before, "a test changed the weights that others share"


@pytest.fixture(scope="session")
def trigger_example():
    """The module `examples/refuse/trigger.py`."""
    path = Path(__file__).parents[2] / "examples" / "refuse" / "trigger.py"
    spec = importlib.util.spec_from_file_location("abjure_example_trigger", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def trigger(trigger_example):
    """The small decoder of `examples/refuse/trigger.py`. Every test leaves its weights as they were."""
    import torch

    # Rows of 64 numbers: on a busy machine two threads wait for each other for minutes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trigger_example.make()
    finally:
        torch.set_num_threads(threads)
